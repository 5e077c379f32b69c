"""What every rank of tests/test_sharding.py runs, and the batches; imported by the spawned processes."""

from __future__ import annotations

import datetime
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist

from ctpo import ESTIMATORS, Estimator, PositionClip
from ctpo.losses import Aggregation, policy_loss
from ctpo.ratios import LEVELS, SMALLEST_WINDOW
from ctpo.sharding import Packing, ProcessGroupShards, evaluate

TURN_LEVELS = ("turn", "turn_mean")
# Where the 24 time steps are cut, by number of ranks: unevenly, where everything is compared, then with a rank that
# has no time step, and evenly, where one batch has to do.
CUTS = {2: ((0, 11, 24), (0, 0, 24), (0, 12, 24)), 4: ((0, 3, 11, 11, 24), (0, 6, 12, 18, 24))}
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)


class Call(NamedTuple):
    """Names of what is computed."""

    cut: tuple[int, ...]
    dtype: str
    batch: str
    estimator: str


class Case(NamedTuple):
    """Tensors of shape (B, T); every log-probability is a multiple of 2^-10, so that sums are exact in float32."""

    logp: torch.Tensor
    behavior_logp: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor | None
    turn_ids: torch.Tensor

    def between(self, start: int, stop: int) -> Case:
        def piece(x):
            return x if x is None or x.ndim < 2 else x[:, start:stop]

        return Case(*map(piece, self))


def cases(dtype: torch.dtype) -> dict[str, Case]:
    """Batches of 24 time steps with the awkward rows that data have, and one that is all policy tokens."""
    rng = np.random.default_rng(20)
    rows, length = 9, 24
    behavior = np.round(rng.uniform(-3, 0, (rows, length)) * 1024) / 1024
    steps = rng.normal(0, 0.1, (rows, length))
    steps[2] *= 100  # extreme ratios, at which both numerical limits act
    logp = behavior + np.round(steps * 1024) / 1024
    mask = rng.random((rows, length)) < 0.7
    mask[0] = True
    mask[1] = (np.arange(length) // 4) % 2 == 1  # tool gaps, the first shard begins with one
    mask[3] = False  # an empty row
    mask[4] = np.arange(length) == 13  # one token
    mask[5, :13] = False  # nothing in the first shard
    mask[6, 2:] = False  # nothing but in the first shard
    mask[7, 5] = mask[8, 20] = True
    each = rng.choice([-1.5, 0.0, 1.0], rows)
    each[:3], each[3], each[7:] = (1.0, -1.0, 2.0), np.nan, (-1.0, 1.0)
    turns = np.cumsum(rng.random((rows, length)) < 0.2, axis=-1)
    whole = Case(*(torch.asarray(x) for x in (logp, behavior, each, mask, turns)))
    whole = Case(*(x.to(dtype) if x.is_floating_point() else x for x in whole))
    garbage = torch.asarray(rng.choice([np.nan, np.inf, -np.inf, 1e30], (rows, length))).to(dtype)

    def dirty(x: torch.Tensor, shift: int) -> torch.Tensor:
        return torch.where(mask, x, garbage.roll(shift, -1))

    mask = whole.mask
    dirtied = whole._replace(
        logp=dirty(whole.logp, 0),
        behavior_logp=dirty(whole.behavior_logp, 1),
        turn_ids=torch.where(mask, whole.turn_ids, 7 - whole.turn_ids),
    )
    by_token = torch.asarray(rng.choice([-1.5, 0.0, 1.0], (rows, length))).to(dtype)
    zero_ratios = dirtied.logp.clone()
    zero_ratios[7, 5] = zero_ratios[8, 20] = -math.inf
    return {
        "per sequence": dirtied,
        "per token, ratios of 0": dirtied._replace(logp=zero_ratios, advantages=dirty(by_token, 2)),
        "no mask": whole._replace(mask=None, advantages=torch.nan_to_num(whole.advantages, nan=1.0)),
    }


def estimators() -> dict[str, Estimator]:
    """Every named estimator, and every level with a window that depends on the position and limits that act."""
    clip = PositionClip(0.025, 0.05, 0.5, 0.05, 0.01)
    levels = {
        f"level {level}": Estimator(level, clip, "ppo", 3 if level in SMALLEST_WINDOW else None, 0.5, 0.25)
        for level in LEVELS
    }
    return {**ESTIMATORS, **levels}


def calls(size: int) -> Iterator[tuple[Call, Estimator, Case]]:
    """Every batch with every estimator, once; part of them for the other cuts and for float32."""
    first, *others = CUTS[size]
    some = [(cut, torch.float64) for cut in others] + [(first, torch.float32)]
    for cut, dtype in [(first, torch.float64), *some]:
        for batch, case in cases(dtype).items():
            for name, estimator in estimators().items():
                if (cut, dtype) in some and not (batch == "per sequence" and name.startswith("level")):
                    continue
                own = case if estimator.level in TURN_LEVELS else case._replace(turn_ids=None)
                yield Call(cut, str(dtype), batch, name), estimator, own


def losses(case: Case, estimator: Estimator, group: dist.ProcessGroup | None) -> dict[str, tuple]:
    """Loss, gradient and metrics by aggregation: all four of the prefix ratio, the default of the others."""
    found = {}
    for aggregation in AGGREGATIONS if estimator == ESTIMATORS["ctpo"] else AGGREGATIONS[1:2]:
        logp = case.logp.clone().requires_grad_()
        loss, metrics = policy_loss(
            logp,
            *case[1:-1],
            estimator=estimator,
            aggregation=aggregation,
            turn_ids=case.turn_ids,
            horizon=100.0 if aggregation == "seq-mean-token-sum-norm" else None,
            process_group=group,
        )
        (gradient,) = torch.autograd.grad(loss, logp)
        found[aggregation] = loss.detach(), gradient, metrics
    return found


def run(size: int, folder: Path) -> list[dict[Any, Any]]:
    """What each of `size` processes has computed."""
    # A server imports once what all processes need, and they are forked from it.
    multiprocessing.set_forkserver_preload(["ctpo.losses"])
    torch.multiprocessing.start_processes(work, args=(size, str(folder)), nprocs=size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def work(rank: int, size: int, folder: str) -> None:
    """Everything that one rank computes; its results go to a file, exceptions to the parent."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timeout)
    try:
        torch.save(results(rank, size), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


class Counted(ProcessGroupShards):
    """Counts its exchanges."""

    exchanges = 0

    def gather(self, x):
        self.exchanges += 1
        return super().gather(x)


def results(rank: int, size: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for call, estimator, case in calls(size):
        own = case.between(*call.cut[rank : rank + 2])
        shards = Counted(dist.group.WORLD)
        evaluation = evaluate(estimator, *own[:-1], turn_ids=own.turn_ids, shards=shards)
        found[call] = evaluation, shards.exchanges, losses(own, estimator, dist.group.WORLD)
    found["groups"] = groups(rank, size)
    if size == 2:
        found["compiled"] = compiled()
    found["rows"] = refusal(lambda: evaluate(ESTIMATORS["lookahead"], *[torch.zeros(rank + 1, 3)] * 3, shards=shards))
    return found


def groups(rank: int, size: int) -> dict[str, Any]:
    """Subgroups: the ranks of one parity share sequences; what a rank outside is told."""
    parity = [dist.new_group([r for r in range(size) if r % 2 == odd]) for odd in (0, 1)]
    shards = ProcessGroupShards(parity[rank % 2])
    return {
        "outside": refusal(lambda: ProcessGroupShards(parity[1 - rank % 2])),
        "no group": refusal(lambda: ProcessGroupShards("cp")),  # type: ignore[arg-type]
        "place": (shards.rank, shards.size),
        "members": shards.gather(torch.tensor(rank)).tolist(),
    }


def compiled() -> list[torch.Tensor]:
    """Weights of shards and of a packed batch, from one graph; a graph break is an error."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def weights(x: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shards = ProcessGroupShards(dist.group.WORLD)
        sharded = evaluate(ESTIMATORS["ctpo"], x, x.flip(-1), torch.ones_like(x[:, 0]), shards=shards)
        packing = Packing.of(offsets, x[0], max_seqlen=4)
        rows = evaluate(ESTIMATORS["ctpo"], *map(packing.unpack, (x[0], x[1], x[2])), packing.unpack_mask(None))
        return sharded.coefficients.weight, packing.repack(rows.coefficients.weight)

    return list(weights(compiled_input(), torch.tensor([0, 4, 4, 6])))


def compiled_input() -> torch.Tensor:
    return torch.linspace(-1.0, -0.1, 18).reshape(3, 6)


def refusal(call: Callable[[], object]) -> str:
    """Message of the ValueError that `call` raises."""
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was raised")
