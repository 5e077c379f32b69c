"""Sharded time and packed batches against whole, padded sequences."""

from __future__ import annotations

import dataclasses
import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from sharded_ranks import AGGREGATIONS, CUTS, calls, cases, compiled_input, estimators, losses, run
from strategies import batches

from ctpo import ESTIMATORS, Coefficients, Estimator, PositionClip
from ctpo.estimators import Evaluation
from ctpo.losses import policy_loss
from ctpo.ratios import SCANNED_LEVELS
from ctpo.sharding import Packing, ProcessGroupShards, evaluate

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


WHOLE = {name: estimator for name, estimator in estimators().items() if not estimator.scans_time}


@given(batch=batches().map(exact), data=st.data())
def test_estimators_of_whole_sequences_cut_anywhere(batch, data):
    rows, length = batch.mask.shape
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, length), min_size=1, max_size=3))), length]
    for name in data.draw(st.lists(st.sampled_from(list(WHOLE)), min_size=1, max_size=4, unique=True)):
        estimator = WHOLE[name]

        def run(start=0, stop=length, shards=None, estimator=estimator):
            fields = (batch.logp, batch.behavior_logp, batch.advantages, batch.mask, batch.turn_ids)
            *fields, turn_ids = (torch.tensor(x[:, start:stop]) for x in fields)
            turn_ids = turn_ids if estimator.level.startswith("turn") else None
            return evaluate(estimator, *fields, turn_ids=turn_ids, shards=shards)

        whole = run()
        lengths = [stop - start for start, stop in itertools.pairwise(cuts)]
        pieces, _ = in_turns(torch, len(lengths), lambda rank, shards: run(cuts[rank], cuts[rank + 1], shards))
        for field in FIELDS:
            parts = joined([part(piece, field).numpy() for piece in pieces], lengths, rows)
            np.testing.assert_array_equal(
                parts, joined([part(whole, field).numpy()], [length], rows), err_msg=f"{name} {field}"
            )


def test_the_core_refuses_shards_that_it_cannot_use():
    x = torch.zeros(1, 3)
    for name in ("lookahead", "level window", "level turn"):
        turn_ids = torch.zeros(1, 3, dtype=torch.int64) if name == "level turn" else None
        with pytest.raises(ValueError, match="shards must be None for an estimator that has to see whole sequences"):
            WHOLE[name].evaluate(x, x, x, turn_ids=turn_ids, shards=Replayed(torch, 0, 1, []))


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
            "no group": "process_group must be a torch.distributed.ProcessGroup, such as torch.distributed.group.WORLD "
            "or mesh.get_group(...); got str",
            "outside": f"process_group must contain this process; got a group without rank {rank}",
            "place": (rank // 2, len(ranks) // 2),
            "members": list(range(rank % 2, len(ranks), 2)),
        }


def test_ranks_with_different_sequences_are_refused_on_all(ranks):
    shapes = ", ".join(f"({rank + 1}, 3)" for rank in range(len(ranks)))
    for found in ranks:
        assert found["rows"].startswith("logp must have the same leading dimensions")
        assert found["rows"].endswith(f"got {shapes}")


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_compiled_without_a_graph_break(ranks):
    """Both ranks hold the same rows: the second one's have all of the first one's before them."""
    x, estimator = compiled_input(), ESTIMATORS["ctpo"]
    whole = estimator.coefficients(x.repeat(1, 2), x.flip(-1).repeat(1, 2), torch.ones(3)).weight
    rows = [estimator.coefficients(*x[:, piece]).weight for piece in (slice(0, 4), slice(4, 6))]
    for rank, found in enumerate(ranks):
        sharded, packed = found["compiled"]
        torch.testing.assert_close(sharded, whole[:, 6 * rank : 6 * rank + 6])
        torch.testing.assert_close(packed, torch.cat(rows))


def test_process_groups_that_cannot_be():
    message = r"process_group needs an initialized torch.distributed .*; got str without it"
    with pytest.raises(ValueError, match=message):
        ProcessGroupShards("cp")  # type: ignore[arg-type]
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=message):
        policy_loss(x, x, x.sum(), process_group="cp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cu_seqlens must be None with process_group, .*; got both"):
        policy_loss(x, x, x, cu_seqlens=torch.tensor([0, 3]), process_group="cp")  # type: ignore[arg-type]


# Packed batches.


@st.composite
def packed_batches(draw):
    """Sequences one after another, of which some may be without tokens, and where each begins and ends."""
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 5, 9]), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    tokens = sum(lengths)
    behavior_logp = rng.uniform(-3, 0, tokens)
    batch = {
        "logp": behavior_logp + rng.normal(0, draw(st.sampled_from([0.02, 0.3, 12.0])), tokens),
        "behavior_logp": behavior_logp,
        "mask": rng.random(tokens) < draw(st.sampled_from([0.0, 0.6, 1.0])),
        "turn_ids": np.cumsum(rng.random(tokens) < 0.3),
        "advantages": rng.choice([-1.0, 0.0, 2.0], tokens),
        "weights": rng.uniform(0, 2, tokens),
    }
    for name in ("logp", "behavior_logp", "advantages", "weights"):
        batch[name] = np.where(batch["mask"], batch[name], rng.choice([np.nan, np.inf, -np.inf], tokens))
    each = {"advantages": rng.choice([-1.0, 0.0, 2.0], len(lengths)), "weights": rng.uniform(0, 2, len(lengths))}
    return lengths, batch, each


def padded(x: np.ndarray, lengths: list[int], columns: int, fill: float) -> np.ndarray:
    """Rows by plain slicing."""
    rows, start = np.full((len(lengths), columns), fill).astype(x.dtype), 0
    for row, length in enumerate(lengths):
        rows[row, :length] = x[start : start + length]
        start += length
    return rows


@given(
    drawn=packed_batches(),
    names=st.lists(st.sampled_from(list(estimators())), min_size=1, max_size=3, unique=True),
    aggregation=st.sampled_from(AGGREGATIONS),
    options=st.fixed_dictionaries({name: st.booleans() for name in ("two_dims", "mask", "each", "weights", "int32")}),
    extra=st.integers(0, 4),
)
def test_packed_is_padded(drawn, names, aggregation, options, extra):
    """The same numbers to the last bit: the rows are the same, only how they are handed over differs."""
    lengths, batch, each = drawn
    columns = max(lengths) + extra
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32 if options["int32"] else torch.int64)
    if not options["mask"]:  # every token is the policy's
        batch = {**batch, "mask": np.ones_like(batch["mask"])} | {
            name: np.nan_to_num(batch[name], nan=-1.0, posinf=-1.0, neginf=-1.0)
            for name in ("logp", "behavior_logp", "advantages", "weights")
        }
    rows = {
        name: padded(x, lengths, columns, False if name == "mask" else np.nan if x.dtype == float else 0)
        for name, x in batch.items()
    }
    if options["each"]:
        options["two_dims"] |= sum(lengths) == len(lengths)  # else the shape of advantages would not tell, see below
        batch, rows = {**batch, **each}, {**rows, **each}
    for name in names:
        estimator = estimators()[name]

        def loss_and_gradient(x, estimator=estimator, **packing):
            x = {key: torch.asarray(value) for key, value in x.items()}
            if packing and options["two_dims"]:
                x = {key: value if options["each"] and key in each else value[None] for key, value in x.items()}
            logp = x["logp"].requires_grad_()
            loss, metrics = policy_loss(
                logp,
                x["behavior_logp"],
                x["advantages"],
                x["mask"] if options["mask"] or not packing else None,
                estimator=estimator,
                aggregation=aggregation,
                weights=x["weights"] if options["weights"] else None,
                turn_ids=x["turn_ids"] if estimator.level.startswith("turn") else None,
                horizon=7.0 if aggregation == "seq-mean-token-sum-norm" else None,
                **packing,
            )
            (gradient,) = torch.autograd.grad(loss, logp)
            return loss.detach(), gradient, metrics

        loss, gradient, metrics = loss_and_gradient(batch, cu_seqlens=offsets, max_seqlen=columns if extra else None)
        expected, by_rows, expected_metrics = loss_and_gradient(rows)
        assert torch.equal(loss, expected)
        inside = np.arange(columns) < np.array(lengths)[:, None]
        np.testing.assert_array_equal(gradient.reshape(-1).numpy(), by_rows.numpy()[inside], strict=True)
        assert gradient.shape == ((1, sum(lengths)) if options["two_dims"] else (sum(lengths),))
        assert metrics.keys() == expected_metrics.keys()
        for metric, value in metrics.items():
            np.testing.assert_array_equal(value.numpy(), expected_metrics[metric].numpy(), err_msg=metric)


@given(drawn=packed_batches(), extra=st.integers(0, 3))
def test_unpacking_and_back(drawn, extra):
    lengths, batch, _ = drawn
    offsets, tokens = torch.tensor([0, *np.cumsum(lengths)]), sum(lengths)
    for shape in ((tokens,), (1, tokens)):
        x = torch.asarray(batch["behavior_logp"]).reshape(shape)
        packing = Packing.of(offsets, x, max_seqlen=max(lengths) + extra)
        rows = packing.unpack(x)
        expected = padded(x.numpy().reshape(-1), lengths, max(lengths) + extra, 0.0)
        np.testing.assert_array_equal(rows.numpy(), expected, strict=True)
        np.testing.assert_array_equal(packing.unpack_mask(None).sum(-1).numpy(), lengths)
        np.testing.assert_array_equal(packing.repack(rows).numpy(), x.numpy(), strict=True)
        x = torch.nan_to_num(x).requires_grad_()
        weight = torch.rand(rows.shape, dtype=rows.dtype, generator=torch.Generator().manual_seed(1))
        (gradient,) = torch.autograd.grad((packing.unpack(x) * weight).sum(), x)
        assert torch.equal(gradient, packing.repack(weight))


def test_values_of_tokens_where_the_shape_does_not_tell():
    """As many sequences as tokens, one sequence without any."""
    flat = Packing.of(torch.tensor([0, 2, 2]), torch.zeros(2))
    assert flat.unpack_either(torch.tensor([1, 2])).tolist() == [[1, 2], [0, 0]]
    rows = Packing.of(torch.tensor([0, 2, 2]), torch.zeros(1, 2))
    assert rows.unpack_either(torch.tensor([1, 2])).tolist() == [1, 2]


def test_no_sequences_and_no_tokens():
    for offsets, shape in (([0], (0, 0)), ([0, 0, 0], (2, 0))):
        packing = Packing.of(torch.tensor(offsets), torch.zeros(0))
        assert packing.unpack(torch.zeros(0)).shape == shape
        logp = torch.zeros(0, requires_grad=True)
        loss, _ = policy_loss(
            logp, torch.zeros(0), torch.zeros(shape[0], dtype=torch.float64), cu_seqlens=torch.tensor(offsets)
        )
        assert loss.item() == 0
        assert torch.autograd.grad(loss, logp)[0].shape == (0,)


OFFSETS = torch.tensor([0, 2, 5])
BAD_PACKING = {
    "type": ({"cu_seqlens": [0, 2, 5]}, r"cu_seqlens must be an integer tensor; got list"),
    "float": ({"cu_seqlens": OFFSETS.float()}, r"cu_seqlens must have an integer dtype; got torch.float32"),
    "bool": ({"cu_seqlens": OFFSETS.bool()}, r"cu_seqlens must have an integer dtype; got torch.bool"),
    "dimensions": ({"cu_seqlens": OFFSETS[None]}, r"cu_seqlens must have shape \(S\+1,\), .*; got shape \(1, 3\)"),
    "empty": ({"cu_seqlens": OFFSETS[:0]}, r"cu_seqlens must have shape \(S\+1,\), .*; got shape \(0,\)"),
    "start": ({"cu_seqlens": OFFSETS + 1}, r"cu_seqlens must start at 0; got 1"),
    "end": ({"cu_seqlens": OFFSETS[:2]}, r"cu_seqlens must end at the number of tokens of logp, 5; got 2"),
    "order": ({"cu_seqlens": torch.tensor([0, 4, 1, 5])}, r"cu_seqlens must never decrease; got a step of -3"),
    "unsigned order": (
        {"cu_seqlens": torch.tensor([0, 4, 1, 5], dtype=torch.uint8)},
        r"cu_seqlens must never decrease; got a step of -3",
    ),
    "batch": (
        {"logp": torch.zeros(5, 1)},
        r"logp must have shape \(N,\) or \(1, N\) with cu_seqlens, .*; got \(5, 1\)",
    ),
    "max_seqlen": ({"max_seqlen": 2}, r"max_seqlen must be at least the length of the longest sequence, 3; got 2"),
    "max_seqlen type": ({"max_seqlen": 3.0}, r"max_seqlen must be an integer of at least 0, or None; got 3.0"),
    "max_seqlen bool": ({"max_seqlen": True}, r"max_seqlen must be an integer of at least 0, or None; got True"),
    "behavior_logp": (
        {"behavior_logp": torch.zeros(4)},
        r"behavior_logp must have the shape of logp, \(5,\); got \(4,\)",
    ),
    "mask": ({"mask": torch.ones(1, 5, dtype=torch.bool)}, r"mask must have the shape of logp, \(5,\); got \(1, 5\)"),
    "mask dtype": ({"mask": torch.ones(5)}, r"mask must have dtype bool, .*; got torch.float32"),
    "advantages": (
        {"advantages": torch.ones(3)},
        r"advantages must have the shape of logp, \(5,\), or one value per sequence of cu_seqlens, \(2,\); got \(3,\)",
    ),
    "weights": ({"weights": torch.ones(3)}, r"weights must have the shape of logp, \(5,\), or .*; got \(3,\)"),
    "without": ({"cu_seqlens": None, "max_seqlen": 3}, r"max_seqlen must be None without cu_seqlens; got 3"),
}


@pytest.mark.parametrize("case", BAD_PACKING)
def test_bad_packing_is_named(case):
    changed, message = BAD_PACKING[case]
    arguments = {"logp": torch.zeros(5), "advantages": torch.ones(2), "cu_seqlens": OFFSETS, **changed}
    arguments = {"behavior_logp": torch.zeros_like(arguments["logp"]), **arguments}
    with pytest.raises(ValueError, match=message):
        policy_loss(**arguments)


def test_offsets_are_not_read_unless_that_is_free_or_asked_for():
    """With validate=False and max_seqlen given nothing but shapes is looked at, so wrong values go through."""
    wrong = OFFSETS.clone()
    wrong[0] = 1
    assert Packing.of(wrong, torch.zeros(5), max_seqlen=3, validate=False).padded == (2, 3)
    for options in ({"max_seqlen": 3}, {"max_seqlen": 3, "validate": True}, {"validate": False}):
        with pytest.raises(ValueError, match="cu_seqlens must start at 0; got 1"):
            Packing.of(wrong, torch.zeros(5), **options)
