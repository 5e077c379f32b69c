"""Sequences that are not rows of one tensor: time split over processes, and packed batches without padding.

**Time shards** (sequence or context parallelism). Every process of a group holds the same rows and one contiguous
piece of their time axis, in the order of the ranks within the group: rank 0 has the first tokens of every sequence,
the last rank the last ones. Pieces may differ in length from rank to rank and may hold no token or no policy token.
Layouts that balance the load of causal attention must be undone first: with zigzag sharding, as in ring attention, a
rank holds one early and one late piece, and with striped sharding every n-th token, and prefix sums over these are
wrong without a warning.

What crosses the processes is detached: coefficients are constants in the gradient, so nothing has to come back. Each
rank calls the same functions with the same options; an error that only one rank meets (NaN among its tokens) leaves
the others waiting for it, as in any collective, until that process has gone or the group's timeout is over.

The loss of a rank is its share: the shares add up to the loss of the whole sequences, and so do their gradients with
respect to the parameters. Where a trainer averages gradients over these processes instead of adding them (DDP, FSDP),
`policy_loss` needs all the processes that are averaged over as its ``data_parallel_size``, those of the group included.

**Packed batches**. `Packing` brings the tokens of several sequences, one after another along one axis, to rows and
back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist

from ctpo._arrays import check_numeric, check_sequence_or_token, check_shape, has_readable_values
from ctpo.estimators import Coefficients, Estimator, Evaluation
from ctpo.ratios import TimeShards, shard_totals, token_log_ratio

__all__ = ["Packing", "ProcessGroupShards", "evaluate"]


class ProcessGroupShards:
    """The shards that the ranks of a process group hold; rank order is time order.

    See the top of this module for what the ranks must hold. Every call of `gather` is one collective, without
    gradient and without a host synchronization, and compiles into the graph under `torch.compile`.

    Args:
        process_group: Group of the processes that share the sequences, of any backend that takes the tensors' device
            (gloo, nccl): all processes (`torch.distributed.group.WORLD`), a subgroup, or the group of one dimension
            of a device mesh, ``mesh.get_group("cp")``.

    Attributes:
        rank: This process's place in the group, and so its shard's place in time.
        size: Number of processes in the group.

    Raises:
        ValueError: torch.distributed is not initialized, `process_group` is not a process group, or this process is
            not in it.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "process_group needs an initialized torch.distributed (torch.distributed.init_process_group); "
                f"got {type(process_group).__name__} without it"
            )
        if process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"process_group must contain this process; got a group without rank {dist.get_rank()}")
        if not isinstance(process_group, dist.ProcessGroup):
            raise ValueError(
                "process_group must be a torch.distributed.ProcessGroup, such as torch.distributed.group.WORLD or "
                f"mesh.get_group(...); got {type(process_group).__name__}"
            )
        self.process_group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of every rank in order, shape (size, *x.shape); shape and dtype must be the same on all ranks."""
        x = x.detach().contiguous()
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(gathered, x, group=self.process_group)
        return torch.stack(gathered)


def evaluate(
    estimator: Estimator,
    logp: torch.Tensor,
    behavior_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    turn_ids: torch.Tensor | None = None,
    shards: TimeShards | None = None,
    validate: bool | None = None,
) -> Evaluation:
    """`Estimator.evaluate` of this process's shard of the sequences, for every estimator.

    An estimator with `scans_time` costs one exchange of a few numbers per sequence. Any other (windows, lookahead,
    turns, regions of a wider scope than a token) has to see whole sequences: they are gathered, evaluated on every
    rank, and each keeps its own piece. That takes the memory of whole sequences (of log-probabilities, not of logits),
    and the shards' lengths are read on the host: one synchronization, and a graph break under `torch.compile`.

    A region of batch scope sees the sequences of this group only, as it sees those of this process only without
    shards: under data parallelism every replica judges its own.

    Args:
        estimator: Any.
        logp: As in `Estimator.coefficients`, shape (..., T) with this shard's T.
        behavior_logp: See there.
        advantages: See there. Those of sequences, shape (...,), must be the same on all ranks where a rank has policy
            tokens of that sequence.
        mask: See there; None on all ranks or on none.
        turn_ids: See there. Turns may go on across shards.
        shards: Access to the other shards, `ProcessGroupShards`; None if the sequences are whole.
        validate: As in `Estimator.evaluate`.

    Returns:
        `Evaluation` of this shard's tokens as if the sequences were whole. With shards `totals` is set, and
        `totals.tokens` is the number of policy tokens of each whole sequence.

    Raises:
        ValueError: As `Estimator.coefficients`, or the ranks hold different numbers of sequences.

    Example:
        >>> from ctpo import get_estimator
        >>> logp, behavior_logp = torch.tensor([[-1.0, -0.5]]), torch.tensor([[-1.25, -0.5]])
        >>> found = evaluate(get_estimator("ctpo_fixed"), logp, behavior_logp, torch.ones(1))
        >>> found.coefficients.weight
        tensor([[1.2840, 1.2840]])
    """
    if shards is None or estimator.scans_time:
        return estimator.evaluate(
            logp, behavior_logp, advantages, mask, turn_ids=turn_ids, shards=shards, validate=validate
        )
    xp, logp, tokens, behavior_logp = token_log_ratio(
        logp, behavior_logp, mask, turn_ids=turn_ids, validate=validate, advantages=advantages
    )
    check_numeric(xp, advantages=advantages)
    if not check_sequence_or_token("advantages", advantages, tuple(logp.shape)):
        advantages = advantages[..., None].expand(logp.shape)
    own = [logp, behavior_logp, advantages.to(logp.dtype), *([] if mask is None else [mask.to(logp.dtype)])]
    lengths = _lengths(logp, shards)
    whole_logp, whole_behavior, whole_advantages, *whole_mask = _whole(torch.stack(own), lengths, shards).unbind()
    whole = estimator.evaluate(
        whole_logp,
        whole_behavior,
        whole_advantages,
        whole_mask[0] > 0 if whole_mask else None,
        turn_ids=None if turn_ids is None else _whole(turn_ids, lengths, shards),
        validate=validate,
    )
    start, total = sum(lengths[: shards.rank]), sum(lengths)

    def piece(x: torch.Tensor) -> torch.Tensor:
        return x[..., start : start + lengths[shards.rank]] if x.shape[-1] == total else x

    fields: dict[str, Any] = {name: piece(x) for name, x in whole._asdict().items() if isinstance(x, torch.Tensor)}
    coefficients = Coefficients(*map(piece, whole.coefficients))
    (totals,) = shard_totals(xp, mask, shards, tokens)
    return whole._replace(coefficients=coefficients, totals=totals, **fields)


def _lengths(x: torch.Tensor, shards: TimeShards) -> list[int]:
    """Time steps of every shard; raises on all ranks alike if they do not hold the same rows."""
    shapes = shards.gather(torch.tensor(x.shape, device=x.device)).tolist()
    if any(shape[:-1] != shapes[0][:-1] for shape in shapes):
        raise ValueError(
            "logp must have the same leading dimensions, the same sequences, on every rank of process_group; "
            f"got {', '.join(str(tuple(shape)) for shape in shapes)}"
        )
    return [shape[-1] for shape in shapes]


def _whole(x: torch.Tensor, lengths: list[int], shards: TimeShards) -> torch.Tensor:
    """The shards of `x` joined along time; padded to one length for the exchange."""
    gathered = shards.gather(torch.nn.functional.pad(x, (0, max(lengths) - x.shape[-1])))
    return torch.cat([shard[..., :length] for shard, length in zip(gathered, lengths, strict=True)], dim=-1)


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of a packed (padding-free) batch stand if every sequence is a row.

    A packed batch has its sequences one after another along one axis, shape (N,) or (1, N), and cumulative lengths,
    as in variable-length attention: sequence i is the tokens from cu_seqlens[i] up to, not including,
    cu_seqlens[i+1]. Equal neighbors are a sequence without tokens; it stays a row, all padding, which enters no mean.

    Build it with `Packing.of`. A tensor of rows has S x max_seqlen numbers: little beside the N x vocabulary of logits
    that log-probabilities come from.

    Attributes:
        rows: Row of every token, integers, shape (N,).
        columns: Place of every token in its row, integers, shape (N,).
        padded: Shape of the padded batch, (S, max_seqlen).
        packed: Shape of the packed batch, (N,) or (1, N).

    Example:
        >>> packing = Packing.of(torch.tensor([0, 2, 2, 5]), torch.zeros(5))
        >>> packing.unpack(torch.tensor([1, 2, 3, 4, 5]))
        tensor([[1, 2, 0],
                [0, 0, 0],
                [3, 4, 5]])
        >>> packing.repack(packing.unpack(torch.tensor([1, 2, 3, 4, 5])))
        tensor([1, 2, 3, 4, 5])
    """

    rows: torch.Tensor
    columns: torch.Tensor
    padded: tuple[int, int]
    packed: tuple[int, ...]

    @classmethod
    def of(
        cls,
        cu_seqlens: torch.Tensor,
        logp: torch.Tensor,
        *,
        max_seqlen: int | None = None,
        validate: bool | None = None,
    ) -> Packing:
        """The packing of a batch, with its arguments checked.

        Args:
            cu_seqlens: Integers, shape (S+1,): cumulative lengths of S sequences, from 0 to N, never decreasing; in
                CPU memory or on the device of `logp`.
            logp: Any tensor of the packed batch, shape (N,) or (1, N).
            max_seqlen: Columns of the padded batch, at least the longest sequence. None reads it from `cu_seqlens`:
                on an accelerator one host synchronization, and a graph break under `torch.compile`.
            validate: Whether to check the values of `cu_seqlens`. None checks them where that costs nothing: in CPU
                memory, and together with reading `max_seqlen`.

        Raises:
            ValueError: `cu_seqlens` or `max_seqlen` is not as described. Values that were not checked make an index
                error on the device, or tokens in wrong places.
        """
        if not isinstance(cu_seqlens, torch.Tensor):
            raise ValueError(f"cu_seqlens must be an integer tensor; got {type(cu_seqlens).__name__}")
        if cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.dtype == torch.bool:
            raise ValueError(f"cu_seqlens must have an integer dtype; got {cu_seqlens.dtype}")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(
                f"cu_seqlens must have shape (S+1,), cumulative lengths from 0 on; got shape {tuple(cu_seqlens.shape)}"
            )
        packed = tuple(logp.shape)
        if not (len(packed) == 1 or (len(packed) == 2 and packed[0] == 1)):
            raise ValueError(f"logp must have shape (N,) or (1, N) with cu_seqlens, a packed batch; got {packed}")
        if max_seqlen is not None and (
            isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int) or max_seqlen < 0
        ):
            raise ValueError(f"max_seqlen must be an integer of at least 0, or None; got {max_seqlen!r}")
        if max_seqlen is None or validate or (validate is None and has_readable_values(cu_seqlens)):
            max_seqlen = _read(cu_seqlens, packed[-1], max_seqlen)
        ends = cu_seqlens.to(device=logp.device, dtype=torch.int64)
        token = torch.arange(packed[-1], device=logp.device)
        rows = torch.searchsorted(ends[1:].contiguous(), token, right=True)
        return cls(rows, token - ends[rows], (cu_seqlens.shape[0] - 1, max_seqlen), packed)

    def unpack(self, x: torch.Tensor, name: str = "x") -> torch.Tensor:
        """Values of tokens, of the packed shape, as rows, 0 (False) at the padding; the gradient goes through.

        `name` is that of the argument `x` in errors.
        """
        check_shape(self.packed, "logp", **{name: x})
        # Every place is written at most once, so the gradient is a plain look-up, the same in every run.
        return x.new_zeros(self.padded).index_put((self.rows, self.columns), x.reshape(-1))

    def unpack_mask(self, mask: torch.Tensor | None) -> torch.Tensor:
        """Mask of the padded batch from that of the packed one, which is None if every token is the policy's."""
        every = torch.ones(self.packed, dtype=torch.bool, device=self.rows.device)
        return self.unpack(every if mask is None else mask, "mask")

    def unpack_either(self, x: torch.Tensor, name: str = "x") -> torch.Tensor:
        """Values of tokens as rows, those of sequences, shape (S,), as they are: advantages, weights.

        In a packed batch of shape (N,) with as many sequences as tokens the shape does not tell, and the values are
        taken as those of tokens; it matters only if sequences without tokens are among them. The shape (1, N) has no
        such case.
        """
        shape = tuple(x.shape)
        if shape not in (self.packed, self.padded[:1]):
            raise ValueError(
                f"{name} must have the shape of logp, {self.packed}, or one value per sequence of cu_seqlens, "
                f"{self.padded[:1]}; got {shape}"
            )
        return self.unpack(x, name) if shape == self.packed else x

    def repack(self, x: torch.Tensor) -> torch.Tensor:
        """Values of tokens, of the padded shape, back in the packed one."""
        check_shape(self.padded, "the padded batch", x=x)
        return x[self.rows, self.columns].reshape(self.packed)


def _read(cu_seqlens: torch.Tensor, tokens: int, max_seqlen: int | None) -> int:
    """Check the cumulative lengths, in one transfer from the device; `max_seqlen`, or the longest length."""
    cu_seqlens = cu_seqlens.to(torch.int64)
    lengths = cu_seqlens.diff()
    extremes = [lengths.amin(), lengths.amax()] if len(lengths) else [cu_seqlens[0] - cu_seqlens[0]] * 2
    first, last, shortest, longest = cast("list[int]", torch.stack([cu_seqlens[0], cu_seqlens[-1], *extremes]).tolist())
    if first != 0:
        raise ValueError(f"cu_seqlens must start at 0; got {first}")
    if shortest < 0:
        raise ValueError(f"cu_seqlens must never decrease; got a step of {shortest}")
    if last != tokens:
        raise ValueError(f"cu_seqlens must end at the number of tokens of logp, {tokens}; got {last}")
    if max_seqlen is None:
        return longest
    if max_seqlen < longest:
        raise ValueError(f"max_seqlen must be at least the length of the longest sequence, {longest}; got {max_seqlen}")
    return max_seqlen
