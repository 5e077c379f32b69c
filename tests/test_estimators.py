"""Coefficients against plain loops and against automatic differentiation of the published surrogates."""

from __future__ import annotations

import dataclasses
import json
import math

import array_api_strict
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from strategies import Batch, batches

from ctpo import ESTIMATORS, CalibratedClip, Coefficients, Estimator, PositionClip, RatioClip, get_estimator
from ctpo.ratios import LEVELS

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

    rows = [
        oracle.coefficients(
            *(getattr(batch, name)[i].tolist() for name in ("logp", "behavior_logp", "advantages", "mask")),
            name=estimator.level,
            form=estimator.form,
            bounds=bounds,
            window=estimator.window,
            turn_ids=batch.turn_ids[i].tolist(),
            max_log_ratio=estimator.max_log_ratio,
            max_token_log_ratio=estimator.max_token_log_ratio,
        )
        for i in range(len(batch.mask))
    ]
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


@st.composite
def estimators(draw) -> Estimator:
    """Any level with any clip and any form that go together."""
    level = draw(st.sampled_from(LEVELS))
    window = draw(st.integers(1, 6)) if level in ("window", "lookahead") else None
    form = draw(st.sampled_from(["ppo", "ppo", "cispo", "unclipped"]))
    clip = None
    if form != "unclipped":
        dual = draw(st.booleans()) and form == "ppo"
        scale = st.floats(0.01, 1.0)
        clip = draw(
            st.one_of(
                st.builds(RatioClip, scale, st.floats(0.01, 5.0), st.floats(1.01, 4.0) if dual else st.none()),
                st.builds(
                    PositionClip,
                    scale,
                    scale,
                    st.sampled_from([-0.5, 0.0, 0.5, 1.0]),
                    scale if dual else st.none(),
                    st.sampled_from([0.0, 0.01, -0.2]),
                ),
                st.builds(
                    CalibratedClip,
                    low=st.floats(0.001, 0.45),
                    high=st.floats(0.001, 0.45),
                    sigma=scale,
                    drift=st.sampled_from([0.0, 0.01, -0.2]),
                    dual=st.floats(0.001, 0.45) if dual else st.none(),
                ),
            )
        )
    limits = st.one_of(st.none(), st.sampled_from([10.0, 0.5, 3.0]))
    # Ratios beyond e^20 say nothing about digits: one limit stays on.
    return Estimator(level, clip, form, window, draw(st.sampled_from([10.0, 0.5, 3.0])), draw(limits))


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
    for name in ("grpo", "gspo", "cispo", "ctpo", "ctpo_fixed", "ctpo_mean", "minpro"):
        compare(computed(xp, ESTIMATORS[name], batch), by_loops(ESTIMATORS[name], batch), rtol=1e-11, margin=1e-9)


@given(batch=batches(smallest=-3.0))
def test_float32_stays_float32(xp, batch):
    for name in ("reinforce", "grpo", "gspo", "cispo", "ctpo", "ctpo_mean", "minpro"):
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


# Automatic differentiation of the published surrogates, each written from its formula.


def sg(x):
    return x.detach()


def ppo_terms(log_w, advantages, log_low, log_high, log_dual=None):
    """min(w A, clip(w) A), and for A < 0 no lower than exp(log_dual) A."""
    w = torch.exp(log_w)
    clipped = torch.minimum(torch.maximum(w, torch.exp(log_low)), torch.exp(log_high))
    terms = torch.minimum(w * advantages, clipped * advantages)
    if log_dual is not None:
        terms = torch.where(advantages < 0, torch.maximum(terms, torch.exp(log_dual) * advantages), terms)
    return terms


def token_d(logp, b):
    return torch.clamp(logp - b, -20, 20)


def prefix(logp, b):
    """sg[log rho_t] + logp - sg[logp]: only the current token carries a gradient."""
    return sg(torch.cumsum(token_d(logp, b), -1)) + logp - sg(logp)


def fixed(low, high, like):
    return torch.full_like(like, math.log(1 - low)), torch.full_like(like, math.log(1 + high))


def surrogate_ppo(logp, b, a, t):
    return ppo_terms(token_d(logp, b), a, *fixed(0.2, 0.2, b))


def surrogate_dapo(logp, b, a, t):
    return ppo_terms(token_d(logp, b), a, *fixed(0.2, 0.28, b))


def surrogate_ppo_dual(logp, b, a, t):
    return ppo_terms(token_d(logp, b), a, *fixed(0.2, 0.2, b), torch.full_like(b, math.log(3.0)))


def surrogate_gspo(logp, b, a, t):
    """One term per sequence, weighted with its length as a sum over tokens is."""
    log_s = torch.clamp((logp - b).mean(-1, keepdim=True), max=10)
    return ppo_terms(log_s, a[..., :1], *fixed(3e-4, 4e-4, log_s)) * logp.shape[-1]


def surrogate_cispo(logp, b, a, t):
    return sg(torch.clamp(torch.exp(token_d(logp, b)), 0, 5)) * a * logp


def surrogate_ctpo(logp, b, a, t):
    log_rho = torch.clamp(prefix(logp, b), max=10)
    return ppo_terms(log_rho, a, -0.025 * t.sqrt(), 0.05 * t.sqrt(), 0.05 * t.sqrt())


def surrogate_ctpo_printed(logp, b, a, t):
    log_rho = torch.clamp(prefix(logp, b), max=10)
    return ppo_terms(log_rho, a, -0.025 * t.sqrt(), 0.05 * t.sqrt())


def surrogate_ctpo_fixed(logp, b, a, t):
    return ppo_terms(torch.clamp(prefix(logp, b), max=10), a, *fixed(0.5, 4.0, b))


def surrogate_ctpo_mean(logp, b, a, t):
    mean = sg(torch.cumsum(token_d(logp, b), -1) / t) + logp - sg(logp)
    mean = torch.clamp(mean, max=10)
    return ppo_terms(mean, a, -0.025 / t.sqrt(), 0.05 / t.sqrt(), 0.05 / t.sqrt())


def surrogate_minpro(logp, b, a, t):
    """r_t times the smallest earlier ratio, which is held constant."""
    d = token_d(logp, b)
    smallest = torch.cat([torch.zeros_like(d[..., :1]), torch.cummin(d, -1).values[..., :-1]], -1)
    log_w = torch.clamp(sg(d) + logp - sg(logp) + sg(smallest), max=10)
    return ppo_terms(log_w, a, *fixed(0.2, 0.2, b))


def surrogate_sequence(logp, b, a, t):
    return torch.exp((logp - b).sum(-1, keepdim=True)) * a[..., :1]


def surrogate_lookahead(logp, b, a, t):
    """rho_{t+16} is a constant to token t but for the ratio of token t itself."""
    rho = torch.exp(torch.cumsum(logp - b, -1))
    ahead = rho[..., [min(i + 16, logp.shape[-1] - 1) for i in range(logp.shape[-1])]]
    r = torch.exp(logp - b)
    return sg(ahead / r) * r * a


def surrogate_reinforce(logp, b, a, t):
    return a * logp


SURROGATES = {
    "reinforce": (ESTIMATORS["reinforce"], surrogate_reinforce),
    "grpo": (ESTIMATORS["grpo"], surrogate_ppo),
    "dapo": (ESTIMATORS["dapo"], surrogate_dapo),
    "grpo with dual clip": (get_estimator("grpo", clip=RatioClip(dual=3.0)), surrogate_ppo_dual),
    "gspo": (ESTIMATORS["gspo"], surrogate_gspo),
    "cispo": (ESTIMATORS["cispo"], surrogate_cispo),
    "ctpo": (ESTIMATORS["ctpo"], surrogate_ctpo),
    "ctpo as printed": (get_estimator("ctpo", clip=PositionClip(dual=None)), surrogate_ctpo_printed),
    "ctpo_fixed": (ESTIMATORS["ctpo_fixed"], surrogate_ctpo_fixed),
    "ctpo_mean": (ESTIMATORS["ctpo_mean"], surrogate_ctpo_mean),
    "minpro": (ESTIMATORS["minpro"], surrogate_minpro),
    "sequence": (ESTIMATORS["sequence"], surrogate_sequence),
    "lookahead": (ESTIMATORS["lookahead"], surrogate_lookahead),
}
ONE_TERM_PER_SEQUENCE = ("gspo", "sequence")
DETACHED_RATIO = ("cispo", "reinforce")  # no surrogate of a ratio: the limits cannot act through a gradient


def test_every_named_estimator_has_its_surrogate():
    assert set(ESTIMATORS) <= set(SURROGATES)


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("scale", [0.03, 0.4, 6.0])
def test_coefficients_equal_autograd_of_the_published_surrogate(name, scale):
    estimator, surrogate = SURROGATES[name]
    rng = np.random.default_rng(20260507)
    b = torch.asarray(-rng.exponential(1.0, (8, 40)))
    d = torch.asarray(rng.normal(0.0, scale, (8, 40)))
    if name in ("sequence", "lookahead"):
        d = torch.clamp(d, -0.5, 0.5)  # no limit is on, and twelve digits are compared
    elif scale > 1 and name not in DETACHED_RATIO:
        d[:, ::7] *= 5.0  # some tokens beyond +-20
    logp = (b + d).requires_grad_()
    a = torch.asarray(rng.choice([-1.5, -0.5, 0.0, 0.7, 2.0], (8, 1 if name in ONE_TERM_PER_SEQUENCE else 40)))
    a = a.expand(8, 40)
    t = torch.arange(1, 41, dtype=torch.float64)
    terms = surrogate(logp, b, a, t)
    (gradient,) = torch.autograd.grad(terms.sum(), logp)
    found = estimator.coefficients(logp.detach(), b, a)
    torch.testing.assert_close(found.weight * a, gradient, rtol=1e-12, atol=1e-12)
    value = found.value.sum(-1, keepdim=True) if name in ONE_TERM_PER_SEQUENCE else found.value
    if name == "sequence":
        terms = terms * 40
    torch.testing.assert_close(value, terms.detach(), rtol=1e-12, atol=1e-12)
    assert found.weight.count_nonzero() > 0


def test_the_surrogates_meet_every_branch():
    """The comparison above says nothing about a flag that never comes up."""
    seen = dict.fromkeys(FLAGS, 0)
    rng = np.random.default_rng(1)
    b = -rng.exponential(1.0, (8, 40))
    for scale in (0.03, 6.0):
        logp, a = b + rng.normal(0, scale, b.shape), rng.choice([-1.0, 1.0], b.shape)
        found = ESTIMATORS["ctpo"].coefficients(logp, b, a)
        for flag in FLAGS:
            seen[flag] += int(getattr(found, flag).sum())
    assert seen.pop("rejected") == 0  # a region has its own tests
    assert min(seen.values()) > 10


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


@pytest.mark.parametrize("level", ["window", "lookahead", "min_prefix", "cumulative_mean"])
def test_token_clamps_enter_every_prefix_level(level):
    window = {"window": 2, "lookahead": 0}.get(level)
    found = unclipped(level, [-25.0, 15.0], window=window)
    expected = {"cumulative_mean": -2.5}.get(level, -5.0)
    np.testing.assert_allclose(found.weight, [math.exp(-20.0), math.exp(expected)])


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
    for name in ("cispo", "reinforce", "ctpo", "grpo"):
        a = torch.tensor(0.0) if name == "reinforce" else torch.tensor(1.0)
        found = ESTIMATORS[name].coefficients(torch.tensor([-math.inf]), torch.zeros(1), a)
        assert abs(found.value.item()) < 1e-8


# What must not change a coefficient.


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


def test_the_registry_is_the_documented_one():
    off = {"max_log_ratio": None, "max_token_log_ratio": None}
    released = PositionClip(low=0.025, high=0.05, power=0.5, dual=0.05)
    assert dict(ESTIMATORS) == {
        "reinforce": Estimator("token", None, "reinforce"),
        "grpo": Estimator("token", RatioClip(0.2, 0.2)),
        "dapo": Estimator("token", RatioClip(0.2, 0.28)),
        "gspo": Estimator("sequence_mean", RatioClip(3e-4, 4e-4)),
        "cispo": Estimator("token", RatioClip(1.0, 4.0), "cispo"),
        "sequence": Estimator("sequence", None, "unclipped", **off),
        "ctpo": Estimator("cumulative", released),
        "ctpo_fixed": Estimator("cumulative", RatioClip(0.5, 4.0)),
        "ctpo_mean": Estimator("cumulative_mean", PositionClip(0.025, 0.05, -0.5, 0.05)),
        "minpro": Estimator("min_prefix", RatioClip(0.2, 0.2)),
        "lookahead": Estimator("lookahead", None, "unclipped", 16, **off),
    }
    with pytest.raises(TypeError, match="does not support item assignment"):
        ESTIMATORS["mine"] = ESTIMATORS["ctpo"]  # type: ignore[index]
    import ctpo.estimators

    for name in ESTIMATORS:
        assert f"\n{name} " in ctpo.estimators.__doc__


def test_estimators_compare_print_and_serialize():
    ctpo_ = get_estimator("ctpo")
    assert ctpo_ is ESTIMATORS["ctpo"] or ctpo_ == ESTIMATORS["ctpo"]
    assert get_estimator(ctpo_, max_log_ratio=None) != ctpo_
    assert hash(get_estimator("ctpo")) == hash(ctpo_)
    assert repr(ESTIMATORS["dapo"]) == (
        "Estimator(level='token', clip=RatioClip(low=0.2, high=0.28, dual=None), form='ppo', window=None, "
        "max_log_ratio=10.0, max_token_log_ratio=20.0)"
    )
    fields = json.loads(json.dumps(dataclasses.asdict(get_estimator("lookahead", window=np.int64(3)))))
    assert fields == {
        "level": "lookahead",
        "clip": None,
        "form": "unclipped",
        "window": 3,
        "max_log_ratio": None,
        "max_token_log_ratio": None,
    }
    assert Estimator(**fields) == get_estimator("lookahead", window=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ctpo_.level = "token"  # type: ignore[misc]


BAD_ESTIMATORS = {
    "level": ({"level": "tokens"}, r"level must be one of token, .*; got 'tokens' \(did you mean 'token'\?\)"),
    "window missing": ({"level": "lookahead", "clip": RatioClip()}, r"window must be .* at least 0 .*; got None"),
    "window unused": ({"window": 4, "clip": RatioClip()}, r"window must be None at level 'token'; got 4"),
    "form": ({"form": "pop"}, r"form must be one of ppo, cispo, unclipped, reinforce; got 'pop'"),
    "clip type": ({"clip": 0.2}, r"clip must be a RatioClip, a PositionClip, a CalibratedClip or None; got 0.2"),
    "ppo without clip": ({}, r"clip must be a RatioClip, PositionClip or CalibratedClip for the form 'ppo'; got None"),
    "cispo without clip": ({"form": "cispo"}, r"clip must be a RatioClip, .* 'cispo'; got None"),
    "unclipped with clip": (
        {"form": "unclipped", "clip": RatioClip()},
        r"clip must be None for the form 'unclipped'; got RatioClip",
    ),
    "reinforce with clip": (
        {"form": "reinforce", "clip": RatioClip()},
        r"clip must be None for the form 'reinforce'; got RatioClip",
    ),
    "cispo with dual": (
        {"form": "cispo", "clip": RatioClip(dual=3.0)},
        r"clip must have dual=None for the form 'cispo'; got RatioClip\(.*dual=3.0\)",
    ),
    "reinforce of a level": (
        {"form": "reinforce", "level": "cumulative"},
        r"level must be 'token' for the form 'reinforce'; got 'cumulative'",
    ),
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
