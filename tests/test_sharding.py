"""Sharded time and packed batches against whole, padded sequences."""

from __future__ import annotations

import dataclasses
import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from sharded_ranks import CUTS, calls, cases, losses, run
from strategies import batches

from ctpo import ESTIMATORS, Coefficients, Estimator, PositionClip
from ctpo.estimators import Evaluation
from ctpo.ratios import SCANNED_LEVELS
from ctpo.sharding import ProcessGroupShards

# Without processes: shards that take turns.


class Waiting(Exception):
    """Another shard has not come to this exchange yet."""


class Replayed:
    """Time shards in one process: every shard runs again from its start until all have met at every exchange."""

    def __init__(self, xp, rank: int, size: int, exchanges: list[dict]) -> None:
        self.rank = rank
        self._xp, self._size, self._exchanges, self._done = xp, size, exchanges, 0

    def gather(self, x):
        if self._done == len(self._exchanges):
            self._exchanges.append({})
        brought = self._exchanges[self._done]
        brought[self.rank] = x
        if len(brought) < self._size:
            raise Waiting
        self._done += 1
        return self._xp.stack([brought[rank] for rank in range(self._size)])


def in_turns(xp, size: int, function) -> tuple[list, int]:
    """Results of ``function(rank, shards)`` of every rank, and the number of exchanges."""
    exchanges: list[dict] = []
    while True:
        found = []
        for rank in range(size):
            try:
                found.append(function(rank, Replayed(xp, rank, size, exchanges)))
            except Waiting:
                continue
        if len(found) == size:
            return found, len(exchanges)


def exact(batch):
    """Log-probabilities on a grid, so that sums do not depend on their order and nothing may differ."""
    grid = 2.0**16
    return dataclasses.replace(
        batch, logp=np.round(batch.logp * grid) / grid, behavior_logp=np.round(batch.behavior_logp * grid) / grid
    )


def joined(pieces: list[np.ndarray], lengths: list[int], rows: int) -> np.ndarray:
    """Pieces of a field, which may have one column for all time steps or no rows of its own."""
    return np.concatenate(
        [np.broadcast_to(x, (rows, length)) for x, length in zip(pieces, lengths, strict=True)], axis=-1
    )


FIELDS = (*Coefficients._fields, "token_log_ratio", "log_ratio", "position")


def part(evaluation: Evaluation, field: str):
    """A field of the evaluation or of its coefficients."""
    return getattr(evaluation if field in evaluation._fields else evaluation.coefficients, field)


SCANNED = {
    **{name: estimator for name, estimator in ESTIMATORS.items() if estimator.scans_time},
    **{
        level: Estimator(level, PositionClip(0.025, 0.05, 0.5, 0.05, 0.01), max_log_ratio=0.5, max_token_log_ratio=0.25)
        for level in SCANNED_LEVELS
    },
}


@given(batch=batches().map(exact), data=st.data(), masked=st.booleans())
def test_time_cut_anywhere_changes_nothing(xp, batch, data, masked):
    rows, length = batch.mask.shape
    if not masked:
        clean = {name: np.where(batch.mask, getattr(batch, name), -1.0) for name in ("logp", "behavior_logp")}
        batch = dataclasses.replace(batch, **clean, advantages=np.where(batch.mask, batch.advantages, 1.0))
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, length), min_size=1, max_size=4))), length]
    lengths = [stop - start for start, stop in itertools.pairwise(cuts)]
    for name in data.draw(st.lists(st.sampled_from(list(SCANNED)), min_size=1, max_size=4, unique=True)):
        estimator = SCANNED[name]

        def run(start=0, stop=length, shards=None, estimator=estimator):
            piece = (np.s_[:], np.s_[start:stop])
            logp, behavior_logp, advantages = (
                xp(x[piece]) for x in (batch.logp, batch.behavior_logp, batch.advantages)
            )
            mask = xp(batch.mask[piece]) if masked else None
            return estimator.evaluate(logp, behavior_logp, advantages, mask, shards=shards)

        whole = run()
        pieces, exchanges = in_turns(xp.xp, len(lengths), lambda rank, shards: run(cuts[rank], cuts[rank + 1], shards))
        assert exchanges == 1
        for field in FIELDS:
            parts = joined([xp.numpy(part(piece, field)) for piece in pieces], lengths, rows)
            together = joined([xp.numpy(part(whole, field))], [length], rows)
            np.testing.assert_array_equal(parts, together, err_msg=f"{name} {field}")
        counted = batch.mask.sum(-1, keepdims=True) if masked else np.full((rows, 1), length)
        total = np.where(batch.mask | (not masked), xp.numpy(whole.token_log_ratio), 0.0).sum(-1, keepdims=True)
        for piece in pieces:
            np.testing.assert_array_equal(xp.numpy(piece.totals.tokens), counted)
            np.testing.assert_array_equal(xp.numpy(piece.totals.log_ratio), total)


# With processes.


@pytest.fixture(scope="module", params=list(CUTS))
def ranks(request, tmp_path_factory) -> list[dict]:
    """What each of 2 or 4 gloo processes has computed, all cases at once."""
    return run(request.param, tmp_path_factory.mktemp("ranks"))


def close(found: np.ndarray, expected: np.ndarray, name: tuple) -> None:
    tolerance = 1e-5 if "torch.float32" in name else 1e-12
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance, err_msg=str(name))


def test_every_estimator_on_shards_is_that_of_whole_sequences(ranks):
    """Sums are exact by construction: not even a comparison with a window may come out otherwise."""
    for call, estimator, case in calls(len(ranks)):
        whole = estimator.evaluate(*case[:-1], turn_ids=case.turn_ids)
        rows, length = case.logp.shape
        lengths = [stop - start for start, stop in itertools.pairwise(call.cut)]
        pieces = [rank[call][0] for rank in ranks]
        for field in FIELDS:
            parts = joined([part(piece, field).numpy() for piece in pieces], lengths, rows)
            close(parts, joined([part(whole, field).numpy()], [length], rows), (*call, field))
        counted = torch.full((rows, 1), length) if case.mask is None else case.mask.sum(-1, keepdim=True)
        for piece in pieces:
            assert torch.equal(piece.totals.tokens, counted.to(case.logp.dtype))


def test_prefix_ratios_cost_one_exchange(ranks):
    """The estimators that need whole sequences: lengths, tokens, totals, and turns if there are any."""
    for call, estimator, case in calls(len(ranks)):
        exchanges = {rank[call][1] for rank in ranks}
        assert exchanges == ({1} if estimator.scans_time else {3 if case.turn_ids is None else 4})
    assert all(ESTIMATORS[name].scans_time for name in ("grpo", "gspo", "ctpo", "ctpo_mean", "minpro"))


def test_loss_shares_add_up_and_gradients_and_metrics_are_those_of_the_whole(ranks):
    for call, estimator, case in calls(len(ranks)):
        for aggregation, (loss, gradient, metrics) in losses(case, estimator, None).items():
            shares, gradients, theirs = zip(*(rank[call][2][aggregation] for rank in ranks), strict=True)
            close(sum(shares).numpy(), loss.numpy(), (*call, aggregation))
            close(torch.cat(gradients, -1).numpy(), gradient.numpy(), (*call, aggregation))
            for metric, value in metrics.items():
                for own in theirs:
                    close(own[metric].numpy(), value.numpy(), (*call, aggregation, metric))


def test_without_the_exchange_prefix_ratios_are_wrong():
    """Negative control: each shard as if it were the whole."""
    case = cases(torch.float64)["per sequence"]._replace(turn_ids=None)
    for name, differs in (("ctpo", True), ("ctpo_mean", True), ("minpro", True), ("gspo", True), ("grpo", False)):
        whole = ESTIMATORS[name].coefficients(*case[:-1]).weight
        shards = [ESTIMATORS[name].coefficients(*case.between(*ends)[:-1]).weight for ends in ((0, 12), (12, 24))]
        assert torch.equal(torch.cat(shards, -1), whole) != differs
        shares = [losses(case.between(*ends), ESTIMATORS[name], None) for ends in ((0, 12), (12, 24))]
        (loss, *_) = losses(case, ESTIMATORS[name], None)["seq-mean-token-mean"]
        assert abs(sum(share["seq-mean-token-mean"][0] for share in shares) - loss) > 1e-3


def test_a_subgroup_shares_sequences_and_a_rank_outside_is_refused(ranks):
    for rank, found in enumerate(ranks):
        assert found["groups"] == {
            "outside": f"process_group must contain this process; got a group without rank {rank}",
            "place": (rank // 2, len(ranks) // 2),
            "members": list(range(rank % 2, len(ranks), 2)),
        }


def test_ranks_with_different_sequences_are_refused_on_all(ranks):
    shapes = ", ".join(f"({rank + 1}, 3)" for rank in range(len(ranks)))
    for found in ranks:
        assert found["rows"].startswith("logp must have the same leading dimensions")
        assert found["rows"].endswith(f"got {shapes}")


def test_process_groups_that_are_none():
    with pytest.raises(
        ValueError, match=r"process_group needs an initialized torch.distributed .*; got str without it"
    ):
        ProcessGroupShards("cp")  # type: ignore[arg-type]
