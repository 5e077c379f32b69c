"""Coefficients against plain loops and against automatic differentiation of the published surrogates."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import get_args

import array_api_strict
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from strategies import Batch, batches

from ctpo import ESTIMATORS, CalibratedClip, Coefficients, Estimator, PositionClip, RatioClip, get_estimator
from ctpo.clipping import GammaWeight, ProbabilityShift, SigmoidGate
from ctpo.estimators import Form
from ctpo.ratios import LEVELS
from ctpo.regions import DivergenceRegion, PrefixBudget, SecondMoment, SequenceRegion

FLAGS = ("clipped_low", "clipped_high", "clipped_dual", "saturated", "rejected")
TURN_LEVELS = ("turn", "turn_mean")


def computed(xp, estimator: Estimator, batch: Batch, dtype: str = "float64", advantages=None) -> Coefficients:
    """The library on the backend `xp`, as NumPy arrays."""
    turns = {"turn_ids": xp(batch.turn_ids)} if estimator.level in TURN_LEVELS else {}
    advantages = batch.advantages if advantages is None else advantages
    found = estimator.coefficients(
        xp(batch.logp, dtype), xp(batch.behavior_logp, dtype), xp(advantages, dtype), xp(batch.mask), **turns
    )
    for name, array in found._asdict().items():
        assert array.shape == batch.mask.shape
        assert array.dtype == (xp.xp.bool if name in FLAGS else xp.dtype(dtype))
    return Coefficients(*(xp.numpy(array) for array in found))


def numbers_of(clip) -> tuple[float, ...] | None:
    """The gate of a form without window, as the oracle takes it."""
    if isinstance(clip, SigmoidGate | ProbabilityShift):
        return dataclasses.astuple(clip)
    return dataclasses.astuple(clip) if isinstance(clip, GammaWeight) else None


def by_loops(estimator: Estimator, batch: Batch) -> dict[str, np.ndarray]:
    """The oracle, row by row; adds `margin`, the distance from the nearest threshold."""
    clip, bounds = estimator.clip, None
    if isinstance(clip, RatioClip):

        def bounds(t):
            return oracle.ratio_bounds(t, clip.low, clip.high, clip.dual)
    elif isinstance(clip, PositionClip):

        def bounds(t):
            return oracle.position_bounds(t, clip.low, clip.high, clip.power, clip.dual, clip.drift)
    elif isinstance(clip, CalibratedClip):

        def bounds(t):
            return oracle.calibrated_bounds(t, **dataclasses.asdict(clip))

    inputs = [getattr(batch, name).tolist() for name in ("logp", "behavior_logp", "advantages", "mask")]
    rows = [
        oracle.coefficients(
            *row,
            name=estimator.level,
            form=estimator.form,
            bounds=bounds,
            gate=numbers_of(clip),
            window=estimator.window,
            turn_ids=batch.turn_ids[i].tolist(),
            max_log_ratio=estimator.max_log_ratio,
            max_token_log_ratio=estimator.max_token_log_ratio,
        )
        for i, row in enumerate(zip(*inputs, strict=True))
    ]
    if estimator.region is not None:
        of_region = type(estimator.region).__name__, dataclasses.asdict(estimator.region)
        for row, found, margins in zip(rows, *oracle.rejections(*of_region, *inputs), strict=True):
            for token, rejected, margin in zip(row, found, margins, strict=True):
                token["margin"] = min(token["margin"], margin)
                token["rejected"] = rejected
                if rejected:
                    token["value"] = token["weight"] = 0.0
    return {name: np.array([[token[name] for token in row] for row in rows]) for name in rows[0][0]}


def compare(found: Coefficients, expected: dict[str, np.ndarray], *, rtol: float, margin: float) -> None:
    """Equality at every token that lies farther than `margin` from a threshold."""
    clear = expected["margin"] > margin
    for name in FLAGS:
        np.testing.assert_array_equal(getattr(found, name)[clear], expected[name][clear], err_msg=name)
    for name in ("weight", "value"):
        np.testing.assert_allclose(
            getattr(found, name)[clear], expected[name][clear], rtol=rtol, atol=rtol, err_msg=name
        )


def windows(dual: bool, drift: bool = True):
    """Any clip window, with a dual bound or without."""
    scale = st.floats(0.01, 1.0)
    drifts = st.sampled_from([0.0, 0.01, -0.2]) if drift else st.just(0.0)
    found = [
        st.builds(RatioClip, scale, st.floats(0.01, 5.0), st.floats(1.01, 4.0) if dual else st.none()),
        st.builds(
            PositionClip,
            scale,
            scale,
            st.sampled_from([-0.5, 0.0, 0.5, 1.0]),
            scale if dual else st.none(),
            drifts,
        ),
    ]
    calibrated = st.builds(
        CalibratedClip,
        low=st.floats(0.001, 0.45),
        high=st.floats(0.001, 0.45),
        sigma=scale,
        drift=drifts,
        dual=st.floats(0.001, 0.45) if dual else st.none(),
    )
    return st.one_of(*found, calibrated) if drift else st.one_of(*found)


SCALE = st.floats(0.1, 4.0)
GATES = {
    "sapo": st.builds(SigmoidGate, SCALE, SCALE),
    "vespo": st.builds(GammaWeight, SCALE, SCALE, SCALE, SCALE),
    "shift": st.builds(ProbabilityShift, st.floats(0.05, 12.5), st.floats(0.05, 12.5)),
}
MEANS = ("sequence_mean", "turn_mean", "cumulative_mean")
WINDOWED = ("window", "forward", "lookahead")
REGIONS = st.one_of(
    st.builds(DivergenceRegion, st.floats(0.01, 0.5), st.floats(0.01, 0.5), st.sampled_from(["tv", "kl"])),
    st.builds(PrefixBudget, st.floats(0.01, 0.4), st.floats(0.005, 0.1), st.floats(0.1, 1.0), st.booleans()),
    st.builds(
        SequenceRegion,
        st.floats(0.01, 1.0),
        st.sampled_from(["k1", "k2", "k3"]),
        st.sampled_from(["mean", "max"]),
        st.booleans(),
    ),
    st.builds(SecondMoment, st.floats(0.01, 1.0)),
)


@st.composite
def estimators(draw) -> Estimator:
    """Any level with any clip, any form and any region that go together."""
    form = draw(st.sampled_from(["ppo", "ppo", *get_args(Form)]).filter(lambda form: form != "reinforce"))
    level = draw(st.sampled_from(MEANS if form == "gmpo" else LEVELS))
    window = draw(st.integers(1, 6)) if level in WINDOWED else None
    clip = None
    if form == "cfpo" and level == "token" and draw(st.booleans()):
        clip = draw(GATES["shift"])
    elif form in GATES:
        clip = draw(GATES[form])
    elif form not in ("unclipped", "topr"):
        dual = draw(st.booleans()) and form in ("ppo", "gppo")
        clip = draw(windows(dual, drift=form != "cfpo"))
    region = draw(st.one_of(st.none(), st.none(), REGIONS))
    limits = st.one_of(st.none(), st.sampled_from([10.0, 0.5, 3.0]))
    # Ratios beyond e^20 say nothing about digits: one limit stays on.
    highest = draw(st.sampled_from([10.0, 0.5, 3.0]))
    return Estimator(level, clip, form, window, highest, draw(limits), region)


@given(batch=batches(zero_ratios=False, smallest=-12.0), estimator=estimators())
def test_any_estimator_equals_loops(xp, batch, estimator):
    compare(computed(xp, estimator, batch), by_loops(estimator, batch), rtol=1e-11, margin=1e-9)


@given(batch=batches(smallest=-12.0))
def test_named_estimators_equal_loops(xp, batch):
    for estimator in ESTIMATORS.values():
        if estimator.max_log_ratio is None:  # e^(12 * 13) fits float64; twelve digits of it do not matter
            batch = dataclasses.replace(batch, logp=np.minimum(batch.logp, batch.behavior_logp + 0.5))
        compare(computed(xp, estimator, batch), by_loops(estimator, batch), rtol=1e-11, margin=1e-9)


@given(batch=batches())
def test_limits_equal_loops(xp, batch):
    """Log-probabilities down to -30: both limits act, ratios of 0 occur."""
    for name in ESTIMATORS:
        if name in ("sequence", "lookahead"):  # without limits
            continue
        compare(computed(xp, ESTIMATORS[name], batch), by_loops(ESTIMATORS[name], batch), rtol=1e-11, margin=1e-9)


@given(batch=batches(smallest=-3.0))
def test_float32_stays_float32(xp, batch):
    for name in ESTIMATORS:
        if name == "sequence":
            continue
        found = computed(xp, ESTIMATORS[name], batch, "float32")
        compare(found, by_loops(ESTIMATORS[name], batch), rtol=1e-4, margin=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@given(batch=batches(smallest=-3.0))
def test_half_precision_is_computed_in_float32(dtype, batch):
    half = getattr(torch, dtype)
    logp, behavior_logp, advantages = (
        torch.asarray(x).to(half) for x in (batch.logp, batch.behavior_logp, batch.advantages)
    )
    mask = torch.asarray(batch.mask)
    found = ESTIMATORS["ctpo"].coefficients(logp, behavior_logp, advantages, mask)
    wide = ESTIMATORS["ctpo"].coefficients(logp.float(), behavior_logp.float(), advantages.float(), mask)
    assert found.weight.dtype == torch.float32
    for a, b in zip(found, wide, strict=True):
        assert torch.equal(a, b)


def test_dtype_of_advantages_counts_only_if_floating(xp):
    logp = xp([-0.5, -1.0], "float32")
    for dtype, expected in (
        ("float64", "float64"),
        ("float32", "float32"),
        ("int64", "float32"),
        ("bool", "float32"),
    ):
        found = ESTIMATORS["ctpo"].coefficients(logp, logp, xp([1, 0], dtype))
        assert found.value.dtype == xp.dtype(expected)
        assert xp.numpy(found.value).tolist() == [1.0, 0.0]


# Exactly at a threshold, and one rounding step beyond it.

EDGE_CLIPS = [
    RatioClip(0.2, 0.28, dual=3.0),
    PositionClip(),
    PositionClip(0.3, 0.5, 0.5, 0.7, 0.01),
    CalibratedClip(low=0.1, high=0.3, dual=0.05, sigma=0.2, drift=0.02),
]


@pytest.mark.parametrize("clip", EDGE_CLIPS, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("bound", "advantage", "flag"),
    [(0, -1.0, "clipped_low"), (1, 1.0, "clipped_high"), (2, -1.0, "clipped_dual")],
)
def test_a_token_at_its_bound_is_kept_and_beyond_it_is_not(xp, clip, dtype, bound, advantage, flag):
    edge = np.asarray(clip.bounds(np.ones(1, dtype=dtype))[bound])
    beyond = np.nextafter(edge, np.asarray(-np.inf if bound == 0 else np.inf, dtype=dtype))
    logp = np.stack([edge, beyond])
    estimator = Estimator("token", clip)
    zero = np.zeros_like(logp)
    found = estimator.coefficients(xp(logp, dtype), xp(zero, dtype), xp([advantage, advantage], dtype))
    assert xp.numpy(getattr(found, flag)).tolist() == [[False], [True]]
    weight, value = xp.numpy(found.weight)[:, 0], xp.numpy(found.value)[:, 0]
    np.testing.assert_allclose(weight, [np.exp(edge[0]), 0.0], rtol=1e-6)
    np.testing.assert_allclose(value, advantage * np.exp(edge[0]), rtol=1e-6)
    # The other sign is not clipped there (below: only A < 0; above: only A > 0 or the dual bound), 0 never.
    neutral = estimator.coefficients(xp(logp, dtype), xp(zero, dtype), xp([0.0, 0.0], dtype))
    for name in FLAGS:
        assert not xp.numpy(getattr(neutral, name)).any()
    np.testing.assert_allclose(xp.numpy(neutral.weight), np.exp(logp), rtol=1e-6)
    assert not xp.numpy(neutral.value).any()


def test_a_ppo_gate_is_one_sided():
    """Without dual bound: A > 0 far below the window and A < 0 far above it keep their weight."""
    logp = np.array([-3.0, 3.0])
    found = ESTIMATORS["grpo"].coefficients(logp, np.zeros(2), np.array([1.0, -1.0]))
    np.testing.assert_allclose(found.weight, np.exp(logp))
    assert not (found.clipped_low | found.clipped_high | found.clipped_dual).any()


def test_cispo_moves_the_weight_whatever_the_sign():
    clip = RatioClip(0.5, 1.0)
    logp = np.tile(np.array([-2.0, 0.1, 2.0]), (3, 1))
    found = Estimator("token", clip, "cispo").coefficients(logp, np.zeros_like(logp), np.array([1.0, -1.0, 0.0]))
    np.testing.assert_allclose(found.weight, [[0.5, math.exp(0.1), 2.0]] * 3)
    np.testing.assert_array_equal(found.clipped_low, [[True, False, False]] * 3)
    np.testing.assert_array_equal(found.clipped_high, [[False, False, True]] * 3)
    np.testing.assert_allclose(found.value[:2], [[-1.0, 0.1 * math.exp(0.1), 4.0], [1.0, -0.1 * math.exp(0.1), -4.0]])
    assert not found.value[2].any()


# The two numerical limits, as the released code has them.


def unclipped(level: str, log_ratios, **changes):
    estimator = Estimator(level, form="unclipped", **changes)
    d = np.array(log_ratios)
    return estimator.coefficients(d, np.zeros_like(d), np.array(1.0))


def test_token_clamps_enter_a_prefix_product_without_a_gate():
    found = unclipped("cumulative", [25.0, -25.0])
    assert found.weight.tolist() == [0.0, 1.0]  # log rho_1 = 20 > 10; the two clamps cancel
    assert found.saturated.tolist() == [True, True]
    found = unclipped("cumulative", [25.0, -15.0])
    np.testing.assert_allclose(found.weight, [0.0, math.exp(5.0)])  # exact would be exp(10)
    assert found.saturated.tolist() == [True, False]
    found = unclipped("cumulative", [-25.0, 15.0])
    np.testing.assert_allclose(found.weight, [math.exp(-20.0), math.exp(-5.0)])
    assert found.saturated.tolist() == [True, False]


@pytest.mark.parametrize("level", ["window", "forward", "lookahead", "min_prefix", "cumulative_mean"])
def test_token_clamps_enter_every_prefix_level(level):
    window = {"window": 2, "forward": 2, "lookahead": 0}.get(level)
    found = unclipped(level, [-25.0, 5.0], window=window)
    first, second = {"cumulative_mean": (-20.0, -7.5), "forward": (-15.0, 5.0)}.get(level, (-20.0, -15.0))
    np.testing.assert_allclose(found.weight, [math.exp(first), math.exp(second)])


def test_token_limit_gates_at_the_token_level():
    found = unclipped("token", [20.0, -20.0, 20.5, -20.5, 10.5])
    np.testing.assert_allclose(found.weight, [math.exp(20), math.exp(-20), 0.0, 0.0, math.exp(10.5)])
    np.testing.assert_allclose(found.value[2:4], [math.exp(20), math.exp(-20)])
    assert found.saturated.tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("level", ["sequence", "turn"])
def test_sequence_levels_sum_unclamped_log_ratios(level):
    d = np.array([25.0, -15.0])
    turns = {"turn_ids": np.array([4, 4])} if level == "turn" else {}
    estimator = Estimator(level, form="unclipped")
    found = estimator.coefficients(d, np.zeros(2), np.array(1.0), **turns)
    np.testing.assert_allclose(found.weight, math.exp(10.0))
    assert not found.saturated.any()
    mean = Estimator(level + "_mean", form="unclipped").coefficients(d, np.zeros(2), np.array(1.0), **turns)
    np.testing.assert_allclose(mean.weight, math.exp(5.0))


def test_a_log_ratio_above_the_limit_loses_its_weight_and_keeps_a_value():
    for level in ("cumulative", "sequence", "cumulative_mean", "min_prefix"):
        found = unclipped(level, [10.5])
        assert (found.weight[0], found.saturated[0]) == (0.0, True)
        np.testing.assert_allclose(found.value, math.exp(10.0))
        found = unclipped(level, [10.0])
        np.testing.assert_allclose((found.weight[0], found.saturated[0]), (math.exp(10.0), False))
    # The cut log-ratio is what a window sees: 10 is inside of [-20, 20], so no bound acts.
    wide = Estimator("cumulative", PositionClip(20.0, 20.0, dual=None))
    found = wide.coefficients(np.array([30.0]), np.zeros(1), np.array(1.0))
    assert (found.weight[0], found.clipped_high[0], found.saturated[0]) == (0.0, False, True)


def test_none_switches_a_limit_off():
    off = {"max_log_ratio": None, "max_token_log_ratio": None}
    np.testing.assert_allclose(unclipped("cumulative", [25.0, -15.0], **off).weight, np.exp([25.0, 10.0]))
    np.testing.assert_allclose(unclipped("token", [25.0, -25.0], **off).weight, np.exp([25.0, -25.0]))
    assert not unclipped("token", [25.0, -25.0], **off).saturated.any()
    found = unclipped("cumulative", [25.0, -15.0], max_log_ratio=None)
    np.testing.assert_allclose(found.weight, np.exp([20.0, 5.0]))
    found = unclipped("cumulative", [25.0, -15.0], max_token_log_ratio=None)
    np.testing.assert_allclose(found.weight, [0.0, math.exp(10.0)])


def test_reinforce_knows_no_limit():
    found = ESTIMATORS["reinforce"].coefficients(np.array([-1.0, -90.0]), np.zeros(2), np.array(2.0))
    assert found.weight.tolist() == [1.0, 1.0]
    assert found.value.tolist() == [-2.0, -180.0]
    assert not found.saturated.any()


def test_zero_times_an_overflow_is_zero():
    """An advantage of 0 leaves value 0 beside an infinite ratio; a ratio of 0 leaves it beside log 0."""
    estimator = Estimator("token", form="unclipped", max_token_log_ratio=None)
    found = estimator.coefficients(torch.tensor([2000.0]), torch.zeros(1), torch.tensor(0.0))
    assert (found.weight.item(), found.value.item()) == (math.inf, 0.0)
    for name, estimator in ESTIMATORS.items():
        for a in (0.0,) if name == "reinforce" else (0.0, 1.0, -1.0):
            found = estimator.coefficients(torch.tensor([-math.inf]), torch.zeros(1), torch.tensor(a))
            assert math.isfinite(found.value.item())
            assert found.weight.item() == (1.0 if name == "reinforce" else pytest.approx(0.0, abs=1e-8))
            if name in ("cispo", "reinforce", "ctpo", "topr", "vespo", "dppo_kl", "minpro_cispo") and a >= 0:
                assert abs(found.value.item()) < 1e-8


# What must not change a coefficient.


def of_a_batch(estimator: Estimator) -> bool:
    """Whether one sequence's coefficients depend on the others."""
    return estimator.region is not None and estimator.region.scope == "batch"


@given(batch=batches(smallest=-3.0), before=st.integers(0, 3), after=st.integers(0, 3))
def test_padding_changes_nothing(xp, batch, before, after):
    def padded(x, value):
        return np.pad(x, ((0, 0), (before, after)), constant_values=value)

    larger = Batch(
        padded(batch.logp, np.nan),
        padded(batch.behavior_logp, np.inf),
        padded(batch.advantages, np.nan),
        padded(batch.mask, False),
        padded(batch.turn_ids, 99),
    )
    inside = slice(before, before + batch.mask.shape[-1])
    for estimator in ESTIMATORS.values():
        found, small = computed(xp, estimator, larger), computed(xp, estimator, batch)
        for a, b in zip(found, small, strict=True):
            np.testing.assert_allclose(a[:, inside], b, rtol=1e-11, atol=1e-13)
            assert not a[:, :before].any()
            assert not a[:, inside.stop :].any()


@given(batch=batches(smallest=-3.0), data=st.data())
def test_batching_equals_row_by_row_without_the_gaps(xp, batch, data):
    order = data.draw(st.permutations(range(batch.mask.shape[0])))
    for estimator in ESTIMATORS.values():
        found, shuffled = computed(xp, estimator, batch), computed(xp, estimator, batch.take(order))
        for a, b in zip(found, shuffled, strict=True):
            np.testing.assert_array_equal(a[order], b)
        if of_a_batch(estimator):
            continue
        for row, mask in enumerate(batch.mask):
            if mask.any():
                alone = computed(xp, estimator, batch.take(slice(row, row + 1), mask))
                for a, b in zip(found, alone, strict=True):
                    np.testing.assert_allclose(a[row][mask], b[0], rtol=1e-11, atol=1e-13)


@given(batch=batches(zero_ratios=False))
def test_on_policy_every_estimator_is_reinforce(xp, batch):
    batch.logp = batch.behavior_logp
    for name, estimator in ESTIMATORS.items():
        found = computed(xp, estimator, batch)
        np.testing.assert_array_equal(found.weight, np.where(batch.mask, 1.0, 0.0), err_msg=name)
        for flag in FLAGS:
            assert not getattr(found, flag).any()


@given(batch=batches(smallest=-3.0), seed=st.integers(0, 99))
def test_one_advantage_per_sequence_is_the_same_for_every_token(xp, batch, seed):
    each = np.random.default_rng(seed).choice([-1.0, 0.0, 2.0], len(batch.mask))
    spread = np.where(batch.mask, each[:, None], np.nan)
    each = np.where(batch.mask.any(axis=-1), each, np.nan)  # a sequence without tokens has no advantage
    for estimator in ESTIMATORS.values():
        found = computed(xp, estimator, batch, advantages=each)
        for a, b in zip(found, computed(xp, estimator, batch, advantages=spread), strict=True):
            np.testing.assert_array_equal(a, b)


@given(batch=batches(smallest=-3.0), seed=st.integers(0, 99))
def test_leading_dimensions_are_free(xp, batch, seed):
    """One sequence alone, (T,), and four dimensions, with an advantage per sequence."""
    each = np.random.default_rng(seed).choice([-1.0, 0.0, 2.0], len(batch.mask))
    rows, length = batch.mask.shape
    deep = Batch(*(getattr(batch, field.name).reshape(1, rows, 1, length) for field in dataclasses.fields(batch)))
    for estimator in ESTIMATORS.values():
        found = computed(xp, estimator, batch, advantages=each)
        reshaped = computed(xp, estimator, deep, advantages=each.reshape(1, rows, 1))
        first = computed(xp, estimator, batch.take(0), advantages=each[0])
        for a, b, c in zip(found, reshaped, first, strict=True):
            np.testing.assert_array_equal(a, b.reshape(rows, length))
            if rows == 1 or not of_a_batch(estimator):
                np.testing.assert_array_equal(a[0], c)


@given(batch=batches(smallest=-3.0))
def test_only_the_sign_of_an_advantage_reaches_the_weight(xp, batch):
    for estimator in ESTIMATORS.values():
        found = computed(xp, estimator, batch)
        larger = computed(xp, estimator, batch, advantages=batch.advantages * 4)
        np.testing.assert_array_equal(found.weight, larger.weight)
        np.testing.assert_array_equal(found.value * 4, larger.value)


@given(batch=batches(smallest=-3.0, zero_ratios=False))
def test_ctpo_mean_gates_exactly_as_ctpo(xp, batch):
    """Theory: dividing log-ratio and window by t changes no comparison."""
    names = ("clipped_low", "clipped_high", "clipped_dual")
    clear = by_loops(ESTIMATORS["ctpo"], batch)["margin"] > 1e-9
    # The limit of 10 applies to different numbers; in 13 tokens of at most 3 it can act in "ctpo" alone.
    free = [get_estimator(name, max_log_ratio=None) for name in ("ctpo", "ctpo_mean")]
    product, mean = (computed(xp, estimator, batch) for estimator in free)
    for name in names:
        np.testing.assert_array_equal(getattr(product, name)[clear], getattr(mean, name)[clear])


@given(batch=batches(smallest=-12.0))
def test_ppo_without_dual_is_the_pessimistic_minimum(xp, batch):
    clip = RatioClip(0.2, 0.28)
    found = computed(xp, Estimator("cumulative", clip), batch)
    plain = computed(xp, Estimator("cumulative", form="unclipped"), batch)
    assert (found.value <= plain.value + 1e-12 * np.abs(plain.value)).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_empty_batches_and_inputs_left_alone(xp, name):
    for shape in ((0, 3), (2, 0), (0,)):
        x = xp(np.zeros(shape))
        found = ESTIMATORS[name].coefficients(x, x, x, xp(np.zeros(shape, dtype=bool)))
        assert all(array.shape == shape for array in found)
    logp, b, a, m = (xp(x) for x in ([[-1.0, -2.0]], [[-1.5, -1.0]], [1.0], [[True, False]]))
    before = [xp.numpy(x).copy() for x in (logp, b, a, m)]
    found = ESTIMATORS[name].coefficients(logp, b, a, m)
    for old, new in zip(before, (logp, b, a, m), strict=True):
        np.testing.assert_array_equal(old, xp.numpy(new))
    # Outputs own their memory: writing to one changes no other.
    assert len({id(array) for array in found}) == 7


@pytest.mark.parametrize("name", ESTIMATORS)
def test_off_the_cpu_nothing_is_read_and_everything_stays_there(name):
    device = array_api_strict.Device("device1")

    def there(x):
        return array_api_strict.asarray(np.asarray(x), device=device)

    logp, b = there([[-1.0, -2.0, math.nan, -1.0]]), there([[-1.5, -1.0, -1.0, -1.0]])
    for a in (there([1.0]), there([[1.0, math.nan, -1.0, 0.0]])):
        for mask in (None, there([[True, True, False, True]])):
            found = ESTIMATORS[name].coefficients(logp, b, a, mask)
            assert all(array.device == device for array in found)


# The registry and its errors.


def test_estimators_compare_print_and_serialize():
    ctpo_ = get_estimator("ctpo")
    assert ctpo_ is ESTIMATORS["ctpo"] or ctpo_ == ESTIMATORS["ctpo"]
    assert get_estimator(ctpo_, max_log_ratio=None) != ctpo_
    assert hash(get_estimator("ctpo")) == hash(ctpo_)
    assert repr(ESTIMATORS["dapo"]) == (
        "Estimator(level='token', clip=RatioClip(low=0.2, high=0.28, dual=None), form='ppo', window=None, "
        "max_log_ratio=10.0, max_token_log_ratio=20.0, region=None)"
    )
    fields = json.loads(json.dumps(dataclasses.asdict(get_estimator("lookahead", window=np.int64(3)))))
    assert fields == {
        "level": "lookahead",
        "clip": None,
        "form": "unclipped",
        "window": 3,
        "max_log_ratio": None,
        "max_token_log_ratio": None,
        "region": None,
    }
    assert Estimator(**fields) == get_estimator("lookahead", window=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ctpo_.level = "token"  # type: ignore[misc]


WINDOW = "RatioClip or PositionClip or CalibratedClip"
BAD_ESTIMATORS = {
    "level": ({"level": "tokens"}, r"level must be one of token, .*; got 'tokens' \(did you mean 'token'\?\)"),
    "window missing": ({"level": "lookahead", "clip": RatioClip()}, r"window must be .* at least 0 .*; got None"),
    "window unused": ({"window": 4, "clip": RatioClip()}, r"window must be None at level 'token'; got 4"),
    "form": ({"form": "pop"}, r"form must be one of ppo, gppo, .*, unclipped, reinforce; got 'pop'"),
    "clip type": ({"clip": 0.2}, rf"clip must be {WINDOW} for the form 'ppo'; got 0.2"),
    "ppo without clip": ({}, rf"clip must be {WINDOW} for the form 'ppo'; got None"),
    "ppo with gate": ({"clip": SigmoidGate()}, rf"clip must be {WINDOW} for the form 'ppo'; got SigmoidGate"),
    "sapo with window": (
        {"form": "sapo", "clip": RatioClip()},
        r"clip must be SigmoidGate for the form 'sapo'; got RatioClip",
    ),
    "vespo without gate": ({"form": "vespo"}, r"clip must be GammaWeight for the form 'vespo'; got None"),
    "topr with window": ({"form": "topr", "clip": RatioClip()}, r"clip must be None for the form 'topr'; got RatioCl"),
    "cfpo with a window off 1": (
        {"form": "cfpo", "clip": PositionClip(dual=None, drift=0.1)},
        r"clip must have drift=0 for the form 'cfpo', whose bounds enclose 1; got PositionClip\(.*drift=0.1\)",
    ),
    "cfpo with calibrated window": (
        {"form": "cfpo", "clip": CalibratedClip(low=0.1, high=0.1, sigma=0.1, drift=0.0)},
        r"clip must be RatioClip or PositionClip or ProbabilityShift for the form 'cfpo'; got Calibr",
    ),
    "probabilities of a prefix": (
        {"form": "cfpo", "level": "cumulative", "clip": ProbabilityShift()},
        r"clip must be a RatioClip or PositionClip at level 'cumulative'; got ProbabilityShift",
    ),
    "gmpo of tokens": (
        {"form": "gmpo", "clip": RatioClip()},
        r"level \(for the form 'gmpo'\) must be one of sequence_mean, turn_mean, cumulative_mean; got 'token'",
    ),
    "unclipped with clip": (
        {"form": "unclipped", "clip": RatioClip()},
        r"clip must be None for the form 'unclipped'; got RatioClip",
    ),
    "reinforce with clip": (
        {"form": "reinforce", "clip": RatioClip()},
        r"clip must be None for the form 'reinforce'; got RatioClip",
    ),
    "reinforce of a level": (
        {"form": "reinforce", "level": "cumulative"},
        r"level \(for the form 'reinforce'\) must be one of token; got 'cumulative'",
    ),
    "region type": (
        {"clip": RatioClip(), "region": 0.2},
        r"region must be one of the classes of ctpo.regions, or None; got 0.2",
    ),
    **{
        f"{form} with dual": (
            {"form": form, "clip": RatioClip(dual=3.0), "level": "sequence_mean"},
            rf"clip must have dual=None for the form '{form}'; got RatioClip\(.*dual=3.0\)",
        )
        for form in ("cispo", "reject", "gmpo", "cfpo")
    },
    **{
        f"{name} {value!r}": (
            {"clip": RatioClip(), name: value},
            rf"Estimator: {name} must be a positive finite number, or None; got {value!r}$",
        )
        for name in ("max_log_ratio", "max_token_log_ratio")
        for value in (0, -1.0, math.inf, math.nan, True, "10")
    },
}


@pytest.mark.parametrize("case", BAD_ESTIMATORS)
def test_fields_that_do_not_go_together(case):
    fields, message = BAD_ESTIMATORS[case]
    with pytest.raises(ValueError, match=message):
        Estimator(**{"level": "token", **fields})


def test_unknown_names_and_changes():
    with pytest.raises(ValueError, match=r"estimator must be one of reinforce, .*; got 'ctop' \(did you mean"):
        get_estimator("ctop")
    with pytest.raises(ValueError, match=r"estimator must be one of .*; got None"):
        get_estimator(None)
    with pytest.raises(ValueError, match=r"changes must be one of level, clip, .*; got 'dual'"):
        get_estimator("ctpo", dual=None)
    with pytest.raises(ValueError, match=r"clip must be None for the form 'unclipped'"):
        get_estimator("ctpo", form="unclipped")


GOOD = np.full((2, 3), -1.0)
BAD_CALLS = {
    "shape": (
        {"advantages": np.ones(3)},
        r"advantages must have the shape of logp, \(2, 3\), or one value per sequence, \(2,\); got \(3,\)",
    ),
    "one column": ({"advantages": np.ones((2, 1))}, r"advantages must have the shape .*; got \(2, 1\)"),
    "number": ({"advantages": 1.0}, r"advantages must be an array of NumPy, .*; got float"),
    "complex": ({"advantages": np.ones(2) + 0j}, r"advantages must have a real dtype .*; got complex128"),
    "library": ({"advantages": torch.ones(2)}, r"one and the same library; got .*advantages: torch.Tensor"),
    "turns": (
        {"turn_ids": np.zeros((2, 3), dtype=int)},
        r"turn_ids must be None at level 'cumulative'; got ndarray",
    ),
    "mask": ({"mask": np.ones((2, 3))}, r"mask must have dtype bool, .*; got float64"),
    "NaN per sequence": (
        {"advantages": np.array([1.0, math.nan])},
        r"advantages must be finite in every sequence with a policy token; got nan at index \(1,\)",
    ),
    "inf per token": (
        {"advantages": np.where(np.eye(2, 3) == 1, -math.inf, 1.0)},
        r"advantages must be finite at every policy token; got -inf at index \(0, 0\)",
    ),
    "NaN logp": (
        {"logp": np.where(np.eye(2, 3) == 1, math.nan, -1.0)},
        r"logp must be a number below \+inf at every policy token; got nan at index \(0, 0\)",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_named(case):
    changed, message = BAD_CALLS[case]
    arguments = {"logp": GOOD, "behavior_logp": GOOD, "advantages": np.ones(2), **changed}
    with pytest.raises(ValueError, match=message):
        ESTIMATORS["ctpo"].coefficients(**arguments)


def test_an_advantage_of_one_sequence_may_be_a_number_in_an_array(xp):
    found = ESTIMATORS["ctpo"].coefficients(xp([-1.0, -1.0]), xp([-1.0, -1.0]), xp(2.0))
    assert xp.numpy(found.value).tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match=r"advantages must be finite .*; got nan at index \(\)"):
        ESTIMATORS["ctpo"].coefficients(xp([-1.0, -1.0]), xp([-1.0, -1.0]), xp(math.nan))
