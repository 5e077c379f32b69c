r"""The loss of a policy update in torch: coefficients of `ctpo.estimators`, aggregated, with metrics.

An `Estimator` gives every policy token a coefficient c_t and a value v_t. The loss is

.. math:: \mathrm{loss} = -\sum_{i,t} s_i\, u_{i,t}\, v_{i,t}, \qquad
          \frac{\partial\,\mathrm{loss}}{\partial \log\pi(a_{i,t}|s_{i,t})} = -s_i\, u_{i,t}\, c_{i,t} A_{i,t}

with the extra weight u (1 without any) and the aggregation's share s_i of a token of sequence i:

========================= ================= ==========================================================================
aggregation               s_i               is the mean over
========================= ================= ==========================================================================
"token-mean"              1 / N             policy tokens, all alike
"seq-mean-token-mean"     1 / (S H_i)       sequences, of the mean over their tokens
"seq-mean-token-sum"      1 / S             sequences, of the sum over their tokens
"seq-mean-token-sum-norm" 1 / (S horizon)   sequences, of the sum over their tokens in units of a constant length
========================= ================= ==========================================================================

N counts policy tokens, H_i those of sequence i, S the sequences that have any.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

import array_api_compat.torch as xp
import torch

from ctpo._arrays import (
    check_finite,
    check_numeric,
    check_sequence_or_token,
    has_readable_values,
    one_of,
    only_where,
    real_number,
)
from ctpo.estimators import Estimator, Evaluation
from ctpo.ratios import at_level
from ctpo.sharding import Packing, ProcessGroupShards, evaluate
from ctpo.zoo import RECIPES, named

__all__ = ["Aggregation", "PolicyLoss", "policy_loss"]

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]

# Methods that are nothing but their aggregation; to name one is to ask for it.
_NAMED_FOR_AGGREGATION = ("luspo", "dr_grpo")

# Positions at which buckets of the effective sample size begin: 1, then powers of 4 from 16 on.
_EDGES = (1, *(4**k for k in range(2, 11)))


class PolicyLoss(NamedTuple):
    """A loss to call ``backward()`` on, and what it was made of.

    Attributes:
        loss: Shape ().
        metrics: Name to a detached tensor of shape (), see `policy_loss`.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def policy_loss(
    logp: torch.Tensor,
    behavior_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    estimator: str | Estimator = "ctpo",
    aggregation: Aggregation | None = None,
    weights: torch.Tensor | None = None,
    turn_ids: torch.Tensor | None = None,
    num_tokens: int | torch.Tensor | None = None,
    num_sequences: int | torch.Tensor | None = None,
    data_parallel_size: int = 1,
    horizon: float | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    validate: bool | None = None,
) -> PolicyLoss:
    r"""Policy-gradient loss of a batch, ready for ``backward()``, and its metrics.

    With c_t and v_t the coefficient and value of the estimator, s and u as above, and everything but `logp` constant,

    .. math:: \mathrm{loss} = -\sum_{i,t} s_i\, u_{i,t}\, v_{i,t}, \qquad
              \frac{\partial\,\mathrm{loss}}{\partial\log\pi(a_{i,t}|s_{i,t})} = -s_i\, u_{i,t}\, c_{i,t} A_{i,t}.

    The gradient is written down, not derived: no differentiation goes through an exponential, a prefix sum or a
    clamp. It is exactly 0 at masked places and where the estimator drops a token. Computed in the widest dtype of
    log-probabilities and advantages, float32 at least; returned to `logp` in its own dtype. In reverse mode only, and
    with constant coefficients: there is no second derivative through the loss.

    **Micro-batches and data parallelism.** `num_tokens` and `num_sequences` are the totals of the whole optimizer step,
    over micro-batches and ranks; the one that the aggregation divides by must be given, the other may be. Then the sum
    of the losses over micro-batches and their mean over ranks is the loss of the whole batch, and so is the gradient,
    which DDP and FSDP average over `data_parallel_size` ranks. Without totals a micro-batch is a batch of its own, and
    the mean of the losses of unequal micro-batches is not the loss of the whole.

    **Metrics**, each a detached tensor of shape (), float32 at least, made without a host synchronization:

    =============================== ===================================================================================
    name                            meaning
    =============================== ===================================================================================
    clip/low, clip/high, clip/dual  shares of policy tokens at which the lower, upper, dual bound acted
    clip/total                      their sum: no token has two
    clip/rejected                   share of policy tokens that the trust region took away
    log_ratio/mean, /std            over policy tokens, of the log-ratio at the estimator's level, with
                                    `max_token_log_ratio` but before `max_log_ratio`, window and form; nats
    log_ratio/applied_mean, /..std  the same of the logarithm of the ratio in the surrogate's value
    log_rho/mean_per_token          m = mean of log rho_t / t over policy tokens; nats
    log_rho/var_per_token           mean of (log rho_t - m t)^2 / t over policy tokens. rho_t is the cumulative ratio,
                                    without limits, whatever the estimator's level. For two fixed policies close to
                                    each other m is -1/2 of it; a mean that is more negative points to other
                                    differences than a step of the policy, such as a sampler whose log-probabilities
                                    are not the trainer's
    ess/sequence                    effective sample size (sum w)^2 / sum w^2 of rho_H as a fraction of the sequences
    ess/position_1, _16, _64, ...   the same of the weights w of log_ratio/mean, over the policy tokens from that
                                    position up to the next in the list, 4 times as far. There is one for every such
                                    position up to T. 0, which no weights have, stands for no tokens, and for weights
                                    that are all 0
    saturated                       number of policy tokens at which a numerical limit acted
    advantage/zero                  share of policy tokens with A = 0
    tokens, sequences               numbers of policy tokens, and of sequences with any
    =============================== ===================================================================================

    They are of the batch at hand (of whole sequences with `process_group`); every share and mean is 0 without policy
    tokens. A ratio of 0 (`logp` of -inf) makes a mean -inf and its spread inf. In float32 a spread below some 1/3000 of
    its mean (for log rho: of its drift, times the root of the length) is lost in rounding.

    Args:
        logp: Log-probabilities of the sampled tokens under the policy being trained, nats, shape (..., T); the only
            input with a gradient.
        behavior_logp: The same under the behavior policy, finite at policy tokens, shape (..., T).
        advantages: One per sequence, shape (...,), or per token, (..., T).
        mask: bool, shape (..., T), True at policy tokens; None for all. What stands in any tensor at masked places (or,
            if it has one value per sequence, at those without policy tokens) never matters.
        estimator: An `Estimator`, a name in `ctpo.ESTIMATORS`, or "luspo" or "dr_grpo", which are "gspo" and "grpo"
            with an aggregation of their own.
        aggregation: See the top of this module. None is "seq-mean-token-mean", but for those two names, which bring
            theirs ("seq-mean-token-sum" and "seq-mean-token-sum-norm").
        weights: Extra factor u of value and coefficient, shape (...,) or (..., T), finite, of either sign; see
            `ctpo.rollout_correction`. It does not count in denominators.
        turn_ids: Integers, shape (..., T), for the levels "turn" and "turn_mean" only.
        num_tokens: Policy tokens of the whole step, for "token-mean": a positive integer, or a tensor of shape (),
            which may be 0 if there are none and is looked at as `validate` says. None takes the batch at hand.
        num_sequences: Sequences of the whole step, for the other aggregations, likewise.
        data_parallel_size: Number of ranks that gradients are averaged over, those of `process_group` included.
        horizon: Constant length of "seq-mean-token-sum-norm", tokens. None takes T, and only where `logp` is the whole
            batch: micro-batches are padded to lengths of their own.
        process_group: The processes that the time axis is split over, see `ctpo.sharding`. The loss of a rank is the
            part of its own tokens, the sum of the parts is the loss.
        cu_seqlens: Cumulative lengths, integers, shape (S+1,), of a packed batch: tensors of tokens then have shape
            (N,) or (1, N), those of sequences (S,). See `ctpo.sharding.Packing`.
        max_seqlen: Length of the longest packed sequence, for `cu_seqlens` only.
        validate: Whether to look at values, and not only at shapes and dtypes. None looks where that is free: at
            tensors in CPU memory, outside of `torch.compile`. True always looks, for a host synchronization on an
            accelerator, and one for each total that is a tensor there. False never does; NaN at a policy token then
            goes through to the loss.

    Returns:
        `PolicyLoss`. Without any policy token loss and gradient are 0.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, a name is unknown, an option is out of its range, missing, or
            not used by the estimator or aggregation, or (see `validate`) a value at a policy token is NaN or infinite
            where it must not be.

    Assumptions:
        `behavior_logp` is what the sampler really used, at its temperature and truncation. What each estimator is
        unbiased for is told in `ctpo.estimators`.

    References:
        arXiv:2605.07331 (cumulative ratios); arXiv:2503.14476 ("token-mean"); arXiv:2503.20783 (the constant length);
        arXiv:2602.05261 ("luspo").

    Example:
        >>> logp = torch.tensor([[0.6, 0.9, 0.5], [0.4, 0.8, 0.1]]).log().requires_grad_()
        >>> behavior_logp = torch.tensor([[0.6, 0.9, 0.5], [0.4, 0.8, 0.2]]).log()
        >>> mask = torch.tensor([[True, True, True], [True, False, True]])
        >>> loss, metrics = policy_loss(logp, behavior_logp, torch.tensor([1.0, -1.0]), mask)
        >>> loss.backward()
        >>> logp.grad  # the ratio 0.5 of the last token is below the window, and its advantage is negative
        tensor([[-0.1667, -0.1667, -0.1667],
                [ 0.2500,  0.0000,  0.0000]])
        >>> metrics["clip/low"], metrics["sequences"]
        (tensor(0.2000), tensor(2.))
    """
    average = _aggregation(estimator, aggregation)
    if not isinstance(estimator, Estimator):
        estimator = RECIPES[estimator].estimator if estimator in _NAMED_FOR_AGGREGATION else named(estimator)
    _check_tensors(
        logp, behavior_logp=behavior_logp, advantages=advantages, mask=mask, weights=weights, turn_ids=turn_ids
    )
    if behavior_logp.requires_grad and not logp.requires_grad:
        raise ValueError(
            "behavior_logp must be a constant, and logp what is trained; got a gradient for behavior_logp only"
        )
    if not (validate is None or isinstance(validate, bool)):
        raise ValueError(f"validate must be True, False or None; got {validate!r}")
    total = _check_totals(average, num_tokens, num_sequences, data_parallel_size, validate)
    partial = process_group is not None or cu_seqlens is not None or total is not None
    horizon = _check_horizon(average, horizon, logp, partial)
    if max_seqlen is not None and cu_seqlens is None:
        raise ValueError(f"max_seqlen must be None without cu_seqlens; got {max_seqlen!r}")
    if cu_seqlens is not None and process_group is not None:
        raise ValueError("cu_seqlens must be None with process_group, whose ranks need the same sequences; got both")
    shards = None if process_group is None else ProcessGroupShards(process_group)
    with torch.no_grad():
        # Everything but logp is a constant, and the gradient of logp is written down, not derived.
        values, packing = logp.detach(), None
        if cu_seqlens is not None:
            packing = Packing.of(cu_seqlens, values, max_seqlen=max_seqlen, validate=validate)
            values, behavior_logp, mask, advantages, weights, turn_ids = _by_rows(
                packing, values, behavior_logp, mask, advantages, weights, turn_ids
            )
        # On an accelerator one look at the results says whether the inputs need another.
        later = validate is True and not has_readable_values(values)
        look = False if later else validate
        batch = (values, behavior_logp, advantages, mask)
        found = evaluate(estimator, *batch, turn_ids=turn_ids, shards=shards, validate=look)
        counts = _Counts.of(found, mask)
        share = _share(average, counts, total, data_parallel_size, horizon)
        value, factor = found.coefficients.value, found.advantages * -share
        if weights is not None:
            weights = _checked_weights(weights, mask, counts, found.log_ratio, look)
            value, factor = torch.where(weights == 0, 0.0, value * weights), factor * weights
        if later and not _all_finite(found.token_log_ratio, found.advantages, weights, share):
            estimator.evaluate(*batch, turn_ids=turn_ids, validate=True)
            if weights is not None:
                check_finite(xp, "weights", weights, None, where="at every policy token", validate=True)
        loss = (value.sum(-1, keepdim=True) * -share).sum()
        metrics = _metrics(found, mask, counts, estimator, shards)
        if not logp.requires_grad:
            return PolicyLoss(loss, metrics)
        gradient = found.coefficients.weight * factor
        if not estimator.bounded:  # 0 times anything is 0 here, also times a ratio that has overflowed
            gradient = torch.where(factor == 0, 0.0, gradient)
        gradient = gradient if packing is None else packing.repack(gradient)
    return PolicyLoss(_WithGradient.apply(logp, loss, gradient), metrics)


class _WithGradient(torch.autograd.Function):
    """A loss together with its gradient with respect to the log-probabilities, both given."""

    @staticmethod
    def forward(logp: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        logp, _, gradient = inputs
        ctx.save_for_backward(gradient)
        ctx.dtype = logp.dtype

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (upstream[0] * gradient).to(ctx.dtype), None, None


def _aggregation(estimator: object, aggregation: object) -> str:
    """The aggregation asked for, or that of the methods that are nothing else."""
    if aggregation is None:
        return RECIPES[estimator].aggregation if estimator in _NAMED_FOR_AGGREGATION else "seq-mean-token-mean"
    one_of("aggregation", aggregation, get_args(Aggregation))
    return str(aggregation)


def _check_tensors(logp: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raise unless all are torch tensors on one device; mask, weights and turn_ids may be None."""
    for name, x in {"logp": logp, **others}.items():
        if x is None and name in ("mask", "weights", "turn_ids"):
            continue
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
        if x.device != logp.device:
            raise ValueError(f"{name} must be on the device of logp, {logp.device}; got {x.device}")


def _check_totals(
    aggregation: str, num_tokens: Any, num_sequences: Any, data_parallel_size: object, validate: bool | None
) -> int | torch.Tensor | None:
    """The total that the aggregation divides by, None for that of the batch at hand."""
    if isinstance(data_parallel_size, bool) or not isinstance(data_parallel_size, int) or data_parallel_size < 1:
        raise ValueError(f"data_parallel_size must be a positive integer; got {data_parallel_size!r}")
    totals: dict[str, Any] = {"num_tokens": num_tokens, "num_sequences": num_sequences}
    for name, total in totals.items():
        if isinstance(total, torch.Tensor):
            if total.ndim or total.dtype == torch.bool or total.is_complex():
                raise ValueError(
                    f"{name} must be a positive integer, or a tensor of shape () and a real dtype; "
                    f"got shape {tuple(total.shape)}, {total.dtype}"
                )
            look = has_readable_values(total) if validate is None else validate
            if look and not 0 <= total < math.inf:  # 0: a step without policy tokens
                raise ValueError(f"{name} must be a finite number of at least 0; got {total.item()}")
        elif total is not None and (isinstance(total, bool) or not isinstance(total, Integral) or total < 1):
            raise ValueError(f"{name} must be a positive integer, or a tensor of shape (); got {total!r}")
    needed = "num_tokens" if aggregation == "token-mean" else "num_sequences"
    if totals[needed] is None:
        (other,) = totals.keys() - {needed}
        if totals[other] is not None:
            raise ValueError(f"{needed} must be given for the aggregation {aggregation!r}; got {other} only")
        if data_parallel_size > 1:
            raise ValueError(f"{needed}, the total of all ranks, must be given if data_parallel_size > 1; got None")
    return totals[needed]


def _check_horizon(aggregation: str, horizon: float | None, logp: torch.Tensor, partial: bool) -> float | None:
    """The length that "seq-mean-token-sum-norm" divides by."""
    if aggregation != "seq-mean-token-sum-norm":
        if horizon is not None:
            raise ValueError(
                f"horizon must be None for an aggregation other than 'seq-mean-token-sum-norm'; got {horizon!r}"
            )
        return None
    if horizon is None:
        if partial:
            raise ValueError(
                "horizon must be given with process_group, cu_seqlens or num_sequences, where the length of one tensor "
                "is not that of all; got None"
            )
        return max(logp.shape[-1], 1) if logp.ndim else 1
    if not 0 < real_number("policy_loss", "horizon", horizon, "a positive finite number") < math.inf:
        raise ValueError(f"policy_loss: horizon must be a positive finite number; got {horizon!r}")
    return float(horizon)


def _by_rows(
    packing: Packing,
    logp: torch.Tensor,
    behavior_logp: torch.Tensor,
    mask: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor | None,
    turn_ids: torch.Tensor | None,
) -> tuple[Any, ...]:
    """The arguments with a row for every sequence of the packed batch."""
    return (
        packing.unpack(logp, "logp"),
        packing.unpack(behavior_logp, "behavior_logp"),
        packing.unpack_mask(mask),
        packing.unpack_either(advantages, "advantages"),
        None if weights is None else packing.unpack_either(weights, "weights"),
        None if turn_ids is None else packing.unpack(turn_ids, "turn_ids"),
    )


class _Counts(NamedTuple):
    """Policy tokens of the whole sequences, in the working dtype."""

    by_sequence: torch.Tensor  # (..., 1)
    tokens: torch.Tensor  # ()
    sequences: torch.Tensor  # those with a policy token, ()

    @classmethod
    def of(cls, found: Evaluation, mask: torch.Tensor | None) -> _Counts:
        like = found.log_ratio
        if found.totals is not None:
            counts = found.totals.tokens
        elif mask is None:
            counts = like.new_full((*like.shape[:-1], 1), like.shape[-1])
        else:
            counts = _number(mask, -1).to(like.dtype)
        return cls(counts, counts.sum(), (counts > 0).to(like.dtype).sum())


def _share(
    aggregation: str,
    counts: _Counts,
    total: int | torch.Tensor | None,
    data_parallel_size: int,
    horizon: float | None,
) -> torch.Tensor:
    """s_i, the share of a token of each sequence, of a shape that broadcasts against (..., 1)."""
    own = counts.tokens if aggregation == "token-mean" else counts.sequences
    if total is None:
        total = own
    elif isinstance(total, torch.Tensor):
        total = total.to(own.dtype)
    else:
        total = torch.full_like(own, int(total))
    share = data_parallel_size / total.clamp(min=1.0)
    if aggregation == "seq-mean-token-mean":
        share = share / counts.by_sequence.clamp(min=1.0)
    return share if horizon is None else share / horizon


def _checked_weights(
    weights: torch.Tensor,
    mask: torch.Tensor | None,
    counts: _Counts,
    like: torch.Tensor,
    validate: bool | None,
) -> torch.Tensor:
    """Weights of a shape that broadcasts against (..., T), 0 where masked."""
    check_numeric(xp, weights=weights)
    if check_sequence_or_token("weights", weights, tuple(like.shape)):
        acting, where = mask, "at every policy token"
    else:
        acting, where = counts.by_sequence > 0, "in every sequence with a policy token"
        weights = weights[..., None]
    weights = only_where(xp, acting, weights.to(like.dtype))
    check_finite(xp, "weights", weights, acting, where=where, validate=validate)
    return weights


def _all_finite(*arrays: torch.Tensor | None) -> bool:
    """Whether no entry is NaN or infinite, in one host synchronization; a sum that overflows counts as infinite."""
    return bool(torch.stack([x.sum() for x in arrays if x is not None]).isfinite().all())


def _metrics(
    found: Evaluation,
    mask: torch.Tensor | None,
    counts: _Counts,
    estimator: Estimator,
    shards: ProcessGroupShards | None,
) -> dict[str, torch.Tensor]:
    """The metrics of `policy_loss`: sums over this process's tokens first, brought together, then made means."""
    coefficients, totals, raw = found.coefficients, found.totals, found.log_ratio
    applied = found.applied_log_ratio
    log_rho = raw
    if estimator.level != "cumulative" or found.tokens_limited:
        log_rho = at_level(xp, found.token_log_ratio, mask, "cumulative", totals=totals)
    per_token = log_rho / found.position
    zero = found.advantages == 0
    if zero.shape == raw.shape or shards is not None:
        zeros = _number(zero.expand(raw.shape) if mask is None else zero & mask)
    else:
        zeros = torch.where(zero, counts.by_sequence, 0.0).sum()
    flags = {
        "low": coefficients.clipped_low,
        "high": coefficients.clipped_high,
        "dual": coefficients.clipped_dual,
        "rejected": coefficients.rejected,
        "saturated": coefficients.saturated,
    }
    numbers = torch.stack([_number(flag) for flag in flags.values()]).to(raw.dtype)
    terms = {
        "raw": raw.sum(),
        "applied": applied.sum(),
        "raw^2": _dot(raw, raw),
        "applied^2": _dot(applied, applied),
        "log_rho": log_rho.sum(),
        "log_rho/t": per_token.sum(),
        "log_rho^2/t": _dot(per_token, log_rho),
        "zeros": zeros.to(raw.dtype),
    }
    sums = torch.cat([numbers, torch.stack(list(terms.values()))])
    # Shards may differ in length: all ranks send as many buckets as there can be.
    edges = _EDGES if shards is not None else [edge for edge in _EDGES if edge <= max(raw.shape[-1], 1)]
    # Filled in, not copied from a list: a copy to an accelerator waits for it.
    bounds = torch.cat([raw.new_full((1,), value) for value in (*edges, math.inf)])
    log_sums = _log_sums(only_where(xp, mask, raw, -math.inf), found.position, bounds)
    sums, log_sums = _joined(sums, log_sums, shards)
    n = counts.tokens.clamp(min=1.0)
    mean = dict(zip([*flags, *terms], (sums / n).unbind(), strict=True))
    spread = _spread(sums[7:9] / n - (sums[5:7] / n) ** 2).sqrt()
    drift, length = mean["log_rho/t"], counts.by_sequence.reshape(-1, 1)
    mean_position = (length * (length + 1.0)).sum() / (2.0 * n)
    variance = mean["log_rho^2/t"] - 2.0 * drift * mean["log_rho"] + drift * drift * mean_position
    log_rho_end = found.token_log_ratio.sum(-1, keepdim=True) if totals is None else totals.log_ratio
    log_rho_end = torch.where(length > 0, log_rho_end.reshape(-1, 1), -math.inf)
    of_sequences = torch.cat([log_rho_end, 2.0 * log_rho_end], 1).logsumexp(0)
    # Position and length tell how many tokens of a sequence lie in a bucket.
    inside = torch.minimum(length, bounds - 1.0).sum(0).diff()
    ess = _effective(torch.cat([of_sequences[:, None], log_sums], 1), torch.cat([counts.sequences.reshape(1), inside]))
    names = ["ess/sequence", *(f"ess/position_{edge}" for edge in edges)]
    return {
        "clip/low": mean["low"],
        "clip/high": mean["high"],
        "clip/dual": mean["dual"],
        "clip/total": mean["low"] + mean["high"] + mean["dual"],
        "clip/rejected": mean["rejected"],
        "log_ratio/mean": mean["raw"],
        "log_ratio/std": spread[0],
        "log_ratio/applied_mean": mean["applied"],
        "log_ratio/applied_std": spread[1],
        "log_rho/mean_per_token": drift,
        "log_rho/var_per_token": _spread(variance),
        **dict(zip(names, ess.unbind(), strict=True)),
        "saturated": sums[4],
        "advantage/zero": mean["zeros"],
        "tokens": counts.tokens,
        "sequences": counts.sequences,
    }


def _number(flag: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Number of True entries, of all or (the dimension is kept) along one."""
    if torch.compiler.is_compiling():  # generated code vectorizes floats only
        return flag.to(torch.float32).sum(dim, keepdim=dim is not None)
    return flag.view(torch.uint8).sum(dim, keepdim=dim is not None, dtype=torch.int32)  # the fastest way otherwise


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sum of products, without writing them."""
    return torch.dot(x.reshape(-1), y.reshape(-1))


# Tokens that are summed up before anything else is done with them; fewer than lie between any two later edges.
_CHUNK = 32


def _log_sums(log_weights: torch.Tensor, position: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Log sum w and log sum w^2 of the tokens from each bound up to the next, shape (2, len(bounds) - 1).

    Positions never fall along a row, so most chunks of a row lie in one bucket and are summed up first; only chunks
    with an edge inside are taken apart. All sums are relative to the largest weight of chunk and bucket, and what is
    less than exp(-40) of it (float32) counts as that: it changes no digit, and numbers below the normal range are slow.

    Args:
        log_weights: Shape (..., T), -inf where masked.
        position: Shape (..., T) or (T,), at least 1.
        bounds: Increasing, from 1 on; the last is inf.
    """
    length, dtype = log_weights.shape[-1], log_weights.dtype
    rows = math.prod(log_weights.shape[:-1])
    position = position.expand(log_weights.shape).reshape(rows, length)
    log_weights = log_weights.reshape(rows, length)
    smallest = math.log(torch.finfo(dtype).tiny) / 2.2
    chunks = length // _CHUNK
    whole, rest = chunks * _CHUNK, slice(chunks * _CHUNK, None)
    # Items: log of the largest weight, sums relative to it, and the positions from first to last.
    # The first is of no bucket: a maximum needs one.
    tokens = [log_weights.new_full((1,), -math.inf), log_weights[:, rest].reshape(-1)]
    places = [log_weights.new_zeros(1), position[:, rest].reshape(-1)]
    if chunks:
        x = log_weights[:, :whole].unflatten(1, (chunks, _CHUNK))
        t = position[:, :whole].unflatten(1, (chunks, _CHUNK))
        largest = x.amax(-1)
        w = (x - largest.clamp(min=torch.finfo(dtype).min)[..., None]).clamp(min=smallest).exp()
        first, last = t[..., 0], t[..., -1].contiguous()
        inner = bounds[1:-1].expand(len(x), -1).contiguous()
        index = torch.searchsorted(last, inner)  # of the chunk where a bucket begins
        found = index.clamp(max=chunks - 1)
        cut = (index < chunks) & (first.gather(1, found) < inner)
        taken = found[..., None].expand(-1, -1, _CHUNK)
        tokens.append(torch.where(cut[..., None], x.gather(1, taken), -math.inf).reshape(-1))
        places.append(t.gather(1, taken).reshape(-1))
    single, place = torch.cat(tokens), torch.cat(places)
    one = torch.ones_like(single)
    items = [single, one, one, place, place]
    if chunks:
        wholes = (largest, w.sum(-1), (w * w).sum(-1), first, last)
        items = [torch.cat([item, part.reshape(-1)]) for item, part in zip(items, wholes, strict=True)]
    peak, weight, square, first, last = items
    inside = (first >= bounds[:-1, None]) & (last < bounds[1:, None])
    peaks = torch.where(inside, peak, -math.inf)
    top = peaks.amax(1)
    scale = (peaks - top.clamp(min=torch.finfo(dtype).min)[:, None]).clamp(min=smallest).exp()
    return torch.stack([top + (scale * weight).sum(1).log(), 2.0 * top + (scale * scale * square).sum(1).log()])


def _joined(
    sums: torch.Tensor, log_sums: torch.Tensor, shards: ProcessGroupShards | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over all shards: one exchange."""
    if shards is None:
        return sums, log_sums
    parts = shards.gather(torch.cat([sums, log_sums.reshape(-1)]))
    return parts[:, : len(sums)].sum(0), parts[:, len(sums) :].unflatten(1, log_sums.shape).logsumexp(0)


def _effective(log_sums: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """(sum w)^2 / sum w^2 as a fraction of the number of weights; 0 of none, and if all are 0."""
    fraction = torch.exp(2.0 * log_sums[0] - log_sums[1]) / number.clamp(min=1.0)
    return torch.where(log_sums[0] == -math.inf, 0.0, fraction.clamp(max=1.0))  # rounding can lead beyond 1


def _spread(variance: torch.Tensor) -> torch.Tensor:
    """A variance that rounding may have made negative; inf where a ratio of 0 has made it inf - inf."""
    return torch.where(variance.isnan(), math.inf, variance).clamp(min=0.0)
