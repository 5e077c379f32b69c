"""Rollout correction: against loops, at its bounds, against what must not matter, and for exact expectations."""

from __future__ import annotations

import math
import re
from itertools import product

import array_api_strict
import hypothesis.strategies as st
import numpy as np
import oracle_rollout as oracle
import pytest
import torch
from hypothesis import assume, given
from strategies import batches

from ctpo import log_ratio, rollout_correction
from ctpo.ratios import LEVELS, SMALLEST_WINDOW

MODES = ("truncate", "mask", "reject")
bounds = st.fixed_dictionaries(
    {"low": st.sampled_from([None, 0.3, 0.93]), "high": st.sampled_from([None, 1.07, 2.0, 5.0])}
)


def options(level: str, turn_ids, window: int = 3) -> dict:
    """Keyword arguments that `level` needs."""
    if level in SMALLEST_WINDOW:
        return {"window": window}
    return {"turn_ids": turn_ids} if level in ("turn", "turn_mean") else {}


def computed(xp, batch, dtype: str = "float64", *, level: str, **chosen):
    """The library on the backend `xp`, as NumPy arrays and floats."""
    arrays = xp(batch.logp, dtype), xp(batch.behavior_logp, dtype), xp(batch.mask)
    found = rollout_correction(*arrays, level=level, **options(level, xp(batch.turn_ids)), **chosen)
    assert found.weights.dtype == xp.dtype(dtype)
    metrics = {name: xp.numpy(value) for name, value in found.metrics.items()}
    assert {(value.shape, str(value.dtype)) for value in metrics.values()} == {((), dtype)}
    return xp.numpy(found.weights), xp.numpy(found.kept), {name: float(value) for name, value in metrics.items()}


def by_loops(batch, *, level: str, **chosen):
    """The oracle; examples that rounding could decide are dropped."""
    lists = batch.logp.tolist(), batch.behavior_logp.tolist(), batch.mask.tolist()
    found = oracle.correct(*lists, level=level, **options(level, batch.turn_ids.tolist()), **chosen)
    assume(found[-1] > 1e-6)
    return found[:-1]


def assert_close(found, expected, **near):
    """Weights, flags and metrics agree."""
    np.testing.assert_allclose(found[0], expected[0], **near)
    np.testing.assert_array_equal(found[1], expected[1])
    assert found[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        # Rounding is relative to the weights: their deviation from the mean, and a logarithm, may be nearly 0.
        scale = {"rollout/weight_std": "rollout/weight_max", "rollout/weight_std_raw": "rollout/weight_max_raw"}
        size = expected[2][scale[name]] if name in scale else float("log" in name)
        rtol = 10 * near["rtol"]
        atol = rtol * size if math.isfinite(size) else 0.0
        np.testing.assert_allclose(found[2][name], value, rtol=rtol, atol=atol + 1e-12, err_msg=name)


@pytest.mark.parametrize("mode", MODES)
@given(batch=batches(), limits=bounds)
def test_every_level_and_mode_equals_loops(xp, mode, batch, limits):
    for level in LEVELS:
        chosen = {"level": level, "mode": mode, **limits}
        assert_close(computed(xp, batch, **chosen), by_loops(batch, **chosen), rtol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@given(batch=batches())
def test_float32_stays_float32(xp, mode, batch):
    """Weights are bounded; raw statistics are inf where they exceed the type, and their logarithm is right."""
    for level in LEVELS:
        chosen = {"level": level, "mode": mode, "low": 0.3, "high": 5.0}
        weights, kept, metrics = by_loops(batch, **chosen)
        largest = float(np.finfo(np.float32).max)
        metrics = {name: value if value < largest else math.inf for name, value in metrics.items()}
        assume(all(not 0.99 < value / largest < 1.01 for value in metrics.values()))
        assert_close(computed(xp, batch, "float32", **chosen), (weights, kept, metrics), rtol=3e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@given(batch=batches())
def test_half_precision_is_computed_in_float32(dtype, batch):
    half = getattr(torch, dtype)
    logp, behavior_logp = (torch.asarray(x).to(half) for x in (batch.logp, batch.behavior_logp))
    mask = torch.asarray(batch.mask)
    found = rollout_correction(logp, behavior_logp, mask, level="sequence")
    wide = rollout_correction(logp.float(), behavior_logp.float(), mask, level="sequence")
    assert found.weights.dtype == torch.float32
    assert torch.equal(found.weights, wide.weights)
    assert all(torch.equal(value, wide.metrics[name]) for name, value in found.metrics.items())


# At the bounds.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bound", [0.1, 0.5, 0.99, 1.0, 1.01, 2.0, 3.0, 7.3, 1e30, 1e-30])
def test_a_ratio_at_a_bound_is_inside_and_the_next_one_is_not(xp, bound, dtype):
    scalar = getattr(np, dtype)
    at = scalar(math.log(bound))
    down, up = np.nextafter(at, scalar(-math.inf)), np.nextafter(at, scalar(math.inf))
    d = xp(np.array([[down, at, up]], dtype=scalar), dtype)
    zero = xp(np.zeros((1, 3), dtype=scalar), dtype)
    for mode, outside in (("truncate", scalar(bound)), ("mask", 0.0), ("reject", 0.0)):
        for inside, arguments, name in (
            ([True, True, False], {"low": None, "high": bound}, "high"),
            ([False, True, True], {"low": bound, "high": None}, "low"),
        ):
            found = rollout_correction(d, zero, mode=mode, **arguments)
            weights = xp.numpy(found.weights)[0]
            assert (weights[~np.array(inside)] == outside).all()
            expected = np.ones(3) if mode == "reject" else np.exp(xp.numpy(d)[0].astype(np.float64))
            np.testing.assert_allclose(weights[inside], expected[inside], rtol=1e-5)
            assert xp.numpy(found.kept)[0].tolist() == ([True] * 3 if mode == "truncate" else inside)
            assert float(found.metrics[f"rollout/{name}_fraction"]) == pytest.approx(1 / 3)
            other = "low" if name == "high" else "high"
            assert float(found.metrics[f"rollout/{other}_fraction"]) == 0.0


def test_a_bound_decides_about_the_ratio_at_its_level():
    """d = .5, .5, -.9: the token, the prefix, the whole, the mean are outside at different places."""
    d = np.array([[0.5, 0.5, -0.9]])
    for level, inside in (
        ("token", [1, 1, 0]),
        ("cumulative", [1, 0, 1]),
        ("sequence", [1, 1, 1]),
        ("sequence_mean", [1, 1, 1]),
    ):
        limits = {"low": math.exp(-0.8), "high": math.exp(0.8)}
        found = rollout_correction(d, np.zeros_like(d), level=level, mode="reject", **limits)
        assert found.weights.tolist() == [inside], level
    tight = {"low": 0.99, "high": math.exp(0.05)}
    whole = rollout_correction(d, np.zeros_like(d), level="sequence", mode="reject", **tight)
    mean = rollout_correction(d, np.zeros_like(d), level="sequence_mean", mode="reject", **tight)
    assert (whole.weights.tolist(), mean.weights.tolist()) == ([[0, 0, 0]], [[1, 1, 1]])


def test_bounds_may_meet():
    d = np.array([[-0.1, 0.0, 0.1]])
    for mode, expected in (("truncate", [1, 1, 1]), ("mask", [0, 1, 0]), ("reject", [0, 1, 0])):
        found = rollout_correction(d, np.zeros_like(d), mode=mode, low=1.0, high=1.0)
        assert found.weights.tolist() == [expected]


def test_known_settings(xp):
    """Token ratios 3, 1/4, 1 and 2 in one row, as TIS, IcePop, sequence mask and geometric mask treat them."""
    d = xp(np.log([[3.0, 0.25, 1.0, 2.0]]))
    zero = xp(np.zeros((1, 4)))
    for arguments, expected in (
        ({}, [2, 0.25, 1, 2]),
        ({"low": 0.5}, [2, 0.5, 1, 2]),
        ({"mode": "mask", "low": 0.5, "high": 5.0}, [3, 0, 1, 2]),
        ({"level": "sequence"}, [1.5] * 4),
        ({"level": "sequence", "high": 1.2}, [1.2] * 4),
        ({"level": "sequence", "mode": "mask"}, [1.5] * 4),
        ({"level": "sequence", "mode": "mask", "high": 1.2}, [0] * 4),
        ({"level": "cumulative"}, [2, 0.75, 0.75, 1.5]),
        ({"level": "sequence_mean", "mode": "reject", "low": 0.9, "high": 1.2}, [1] * 4),
        ({"level": "sequence_mean", "mode": "reject", "low": 0.9, "high": 1.1}, [0] * 4),
        ({"level": "sequence_mean", "mode": "truncate", "high": None}, [1.5**0.25] * 4),
    ):
        found = rollout_correction(d, zero, **arguments)
        np.testing.assert_allclose(xp.numpy(found.weights), [expected], rtol=1e-13, err_msg=str(arguments))


# Extremes and nothing.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bounded_weights_never_overflow(xp, dtype, mode):
    """Sequence log-ratios of +-8000: no warning, no inf in what is applied, the raw logarithm is right."""
    d = np.array([[40.0] * 200, [-40.0] * 200, [0.0] * 200])
    found = rollout_correction(xp(d, dtype), xp(np.zeros_like(d), dtype), level="sequence", mode=mode, low=0.5)
    bounded = {"truncate": [2.0, 0.5, 1.0], "mask": [0.0, 0.0, 1.0], "reject": [0.0, 0.0, 1.0]}[mode]
    np.testing.assert_array_equal(xp.numpy(found.weights), np.repeat(np.array(bounded)[:, None], 200, axis=1))
    metrics = {name.removeprefix("rollout/"): float(value) for name, value in found.metrics.items()}
    assert metrics["weight_mean"] == pytest.approx(sum(bounded) / 3)
    assert metrics["weight_std"] == pytest.approx(np.std(bounded))
    assert metrics["ess_fraction"] == pytest.approx(sum(bounded) ** 2 / 3 / sum(w * w for w in bounded))
    for name in ("weight_mean_raw", "weight_std_raw", "weight_max_raw"):
        assert metrics[name] == math.inf
    assert metrics["log_weight_mean_raw"] == pytest.approx(8000 - math.log(3))
    assert metrics["ess_fraction_raw"] == pytest.approx(1 / 3)
    assert metrics["low_fraction"] == metrics["high_fraction"] == pytest.approx(1 / 3)
    assert metrics["rejected_sequence_fraction"] == pytest.approx(0 if mode == "truncate" else 2 / 3)


def test_raw_statistics_of_weights_that_underflow(xp):
    d = np.array([[-300.0], [-300.0 + math.log(3)]])
    found = rollout_correction(xp(d, "float32"), xp(np.zeros_like(d), "float32"))
    metrics = {name.removeprefix("rollout/"): float(value) for name, value in found.metrics.items()}
    assert metrics["weight_mean_raw"] == metrics["weight_max_raw"] == 0.0
    assert metrics["log_weight_mean_raw"] == pytest.approx(-300 + math.log(2), rel=1e-6)
    assert metrics["ess_fraction_raw"] == pytest.approx(0.8, rel=1e-4)


def test_equal_weights_have_no_spread_and_full_sample_size(xp):
    for value in (0.0, 0.1, -5.3):
        d = xp(np.full((3, 7), value), "float32")
        metrics = rollout_correction(d, xp(np.zeros((3, 7)), "float32"), high=None).metrics
        for end in ("", "_raw"):
            assert float(metrics["rollout/weight_std" + end]) <= 1e-7 * math.exp(value)
            assert float(metrics["rollout/ess_fraction" + end]) == pytest.approx(1.0, rel=1e-6)
            assert float(metrics["rollout/weight_mean" + end]) == pytest.approx(math.exp(value), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_to_correct_gives_zeros(xp, level, mode):
    nan, ids = xp(np.full((2, 3), math.nan)), xp(np.zeros((2, 3), dtype=int))
    found = rollout_correction(
        nan, nan, xp(np.zeros((2, 3), dtype=bool)), level=level, mode=mode, **options(level, ids)
    )
    assert not xp.numpy(found.weights).any()
    assert not xp.numpy(found.kept).any()
    assert {float(value) for value in found.metrics.values()} == {0.0}
    for shape in ((0,), (0, 4), (3, 0), (2, 0, 5)):
        empty, ids = xp(np.zeros(shape)), xp(np.zeros(shape, dtype=int))
        for mask in (None, xp(np.zeros(shape, dtype=bool))):
            found = rollout_correction(empty, empty, mask, level=level, mode=mode, **options(level, ids))
            assert found.weights.shape == found.kept.shape == shape
            assert {float(value) for value in found.metrics.values()} == {0.0}


def test_only_ratios_of_zero(xp):
    proximal, behavior_logp = xp(np.full((2, 3), -math.inf)), xp(np.full((2, 3), -1.0))
    metrics = {name: float(x) for name, x in rollout_correction(proximal, behavior_logp, low=None).metrics.items()}
    assert metrics.pop("rollout/log_weight_mean_raw") == -math.inf
    assert set(metrics.values()) == {0.0}


# What must not change a result.


def same(found, expected):
    assert_close(found, expected, rtol=1e-12)


@given(
    batch=batches(),
    level=st.sampled_from(LEVELS),
    mode=st.sampled_from(MODES),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
)
def test_padding_and_masked_values_change_nothing(xp, batch, level, mode, before, after):
    def padded(x, value):
        return np.pad(x, ((0, 1), (before, after)), constant_values=value)

    larger = type(batch)(
        padded(np.where(batch.mask, batch.logp, -1.0), np.nan),
        padded(np.where(batch.mask, batch.behavior_logp, 2.0), np.inf),
        padded(batch.advantages, np.nan),
        padded(batch.mask, False),
        padded(batch.turn_ids, 99),
    )
    rows, inside = slice(0, len(batch.mask)), slice(before, before + batch.mask.shape[-1])
    by_loops(batch, level=level, mode=mode, high=2.0, low=0.3)  # away from the bounds
    chosen = {"level": level, "mode": mode, "low": 0.3}
    weights, kept, metrics = computed(xp, larger, **chosen)
    same((weights[rows, inside], kept[rows, inside], metrics), computed(xp, batch, **chosen))
    assert np.count_nonzero(weights) == np.count_nonzero(weights[rows, inside])
    assert kept.sum() == kept[rows, inside].sum()


@given(batch=batches(), level=st.sampled_from(LEVELS), mode=st.sampled_from(MODES), data=st.data())
def test_order_of_sequences_changes_nothing(xp, batch, level, mode, data):
    order = data.draw(st.permutations(range(len(batch.mask))))
    weights, kept, metrics = computed(xp, batch, level=level, mode=mode)
    same(computed(xp, batch.take(order), level=level, mode=mode), (weights[order], kept[order], metrics))


@given(batch=batches(), level=st.sampled_from(LEVELS), mode=st.sampled_from(MODES))
def test_deleting_masked_gaps_changes_nothing(xp, batch, level, mode):
    by_loops(batch, level=level, mode=mode, high=2.0)
    for row, mask in enumerate(batch.mask):
        if mask.any():
            weights, kept, metrics = computed(xp, batch.take(slice(row, row + 1)), level=level, mode=mode)
            alone = computed(xp, batch.take(slice(row, row + 1), mask), level=level, mode=mode)
            same((weights[:, mask], kept[:, mask], metrics), alone)


@given(batch=batches(garbage=False), level=st.sampled_from(LEVELS))
def test_no_mask_means_every_token(xp, batch, level):
    logp, behavior_logp, full = xp(batch.logp), xp(batch.behavior_logp), xp(np.ones_like(batch.mask))
    chosen = {"level": level, "mode": "truncate", "low": 0.3, **options(level, xp(batch.turn_ids))}
    one, other = (rollout_correction(logp, behavior_logp, mask, **chosen) for mask in (None, full))
    np.testing.assert_allclose(xp.numpy(one.weights), xp.numpy(other.weights), rtol=1e-12)
    assert xp.numpy(one.kept).all()
    for name, value in one.metrics.items():
        assert float(value) == pytest.approx(float(other.metrics[name]), rel=1e-9, abs=1e-9), name


@given(batch=batches(), level=st.sampled_from(LEVELS))
def test_leading_dimensions_are_free(xp, batch, level):
    rows, length = batch.mask.shape
    deep = type(batch)(*(getattr(batch, f).reshape(1, rows, 1, length) for f in batch.__dict__))
    weights, kept, metrics = computed(xp, deep, level=level, mode="mask")
    same(
        (weights.reshape(rows, length), kept.reshape(rows, length), metrics),
        computed(xp, batch, level=level, mode="mask"),
    )


@given(batch=batches(zero_ratios=False), level=st.sampled_from(LEVELS), mode=st.sampled_from(MODES))
def test_an_engine_that_agrees_needs_no_correction(xp, batch, level, mode):
    batch.logp = batch.behavior_logp
    weights, kept, metrics = computed(xp, batch, level=level, mode=mode, low=0.99, high=1.01)
    assert weights.tolist() == kept.tolist() == batch.mask.tolist()
    expected = dict.fromkeys(metrics, 0.0)
    if batch.mask.any():
        names = [
            f"rollout/{name}{end}" for name in ("weight_mean", "weight_max", "ess_fraction") for end in ("", "_raw")
        ]
        expected |= dict.fromkeys(names, 1.0)
    assert metrics == pytest.approx(expected)


def test_off_the_cpu_nothing_is_read_and_everything_stays_there():
    """array-api-strict's second device stands for an accelerator."""
    device = array_api_strict.Device("device1")

    def there(x):
        return array_api_strict.asarray(np.asarray(x), device=device)

    mask = there([[True, True, False, True]])
    logp, behavior_logp, empty = (
        there([[-1.0, -2.0, -3.0, math.nan]]),
        there([[-1.5, -1.0, -1.0, -1.0]]),
        there(np.zeros((0, 4))),
    )
    for level, mode in product(LEVELS, MODES):
        chosen = {"level": level, "mode": mode, **options(level, there([[0, 0, 1, 1]]))}
        for arrays in ((logp, behavior_logp), (logp, behavior_logp, mask)):
            found = rollout_correction(*arrays, **chosen)
            assert {x.device for x in (found.weights, found.kept, *found.metrics.values())} == {device}
    assert {x.device for x in rollout_correction(empty, empty).metrics.values()} == {device}


def test_a_value_that_cannot_be_read_is_not_needed():
    """Tensors on torch's meta device have no values: whatever looks at one raises."""
    x, mask = torch.zeros(2, 3, device="meta"), torch.ones(2, 3, dtype=torch.bool, device="meta")
    for level, mode in product(LEVELS, MODES):
        chosen = {"level": level, "mode": mode, **options(level, torch.zeros(2, 3, dtype=torch.long, device="meta"))}
        for arrays in ((x, x), (x, x, mask)):
            assert rollout_correction(*arrays, **chosen).weights.shape == (2, 3)


# What is unbiased: two tokens with a tool's answer between, three policies with states, all strings.

SAMPLER, OLD = ({"": 0.3, "0": 0.6, "1": 0.45}, {"": 0.55, "0": 0.35, "1": 0.7})
STRINGS = list(product((0, 1), repeat=2))
#: Any function of the first token (at position 1) and of both (at position 2); and of the outcome, at both.
PREFIX = {(a, b): (3.0 * a - 1.0, a - 2.0 * b + 0.5 * a * b) for a, b in STRINGS}
OUTCOME = {(a, b): (1.0 if a == b else -0.25,) * 2 for a, b in STRINGS}


def chances(policy, string):
    p, q = policy[""], policy[str(string[0])]
    return [p if string[0] else 1 - p, q if string[1] else 1 - q]


def expectation(policy, integrand, weights=None):
    """E of weight x integrand at both tokens."""
    total = np.zeros(2)
    for n, string in enumerate(STRINGS):
        factor = np.ones(2) if weights is None else weights[n]
        total += math.prod(chances(policy, string)) * factor * np.array(integrand[string])
    return total


def world_weights(**arguments):
    """Weights of the four strings, the tool's answer between the tokens masked."""
    logs = [
        np.array([[math.log(first), math.nan, math.log(second)] for first, second in rows])
        for rows in ([chances(policy, string) for string in STRINGS] for policy in (OLD, SAMPLER))
    ]
    mask = np.array([[True, False, True]] * 4)
    return rollout_correction(*logs, mask, **arguments).weights[:, [0, 2]]


@pytest.mark.parametrize(
    ("level", "prefix", "outcome"),
    [("cumulative", True, False), ("sequence", True, True), ("lookahead", True, True), ("token", False, False)]
    + [(level, False, False) for level in ("cumulative_mean", "sequence_mean", "window")],
)
def test_which_level_is_unbiased_for_what(level, prefix, outcome):
    chosen = {"window": 1} if level in SMALLEST_WINDOW else {}
    weights = world_weights(level=level, high=None, **chosen)
    for integrand, unbiased in ((PREFIX, prefix), (OUTCOME, outcome)):
        gap = np.abs(expectation(SAMPLER, integrand, weights) - expectation(OLD, integrand)).max()
        assert gap < 1e-15 if unbiased else gap > 1e-2, (level, gap)


def test_the_prefix_is_never_noisier_than_the_sequence():
    square = {string: np.square(value) for string, value in PREFIX.items()}
    moments = [expectation(SAMPLER, square, world_weights(level=x, high=None) ** 2) for x in ("cumulative", "sequence")]
    assert moments[0][0] < moments[1][0] - 1e-3
    assert moments[0][1] == pytest.approx(moments[1][1], rel=1e-14)


@pytest.mark.parametrize("level", ["cumulative", "sequence"])
def test_what_a_bound_takes_away(level):
    """Truncation loses E_old[(1 - c/w)^+ f], masking E_old[1{w > c} f]."""
    cap = 1.4
    whole = world_weights(level=level, high=None)
    assert (whole > cap).any()
    for mode, lost in (("truncate", np.maximum(1 - cap / whole, 0)), ("mask", (whole > cap) * 1.0)):
        bounded = world_weights(level=level, high=cap, mode=mode)
        bias = expectation(SAMPLER, PREFIX, bounded) - expectation(OLD, PREFIX)
        np.testing.assert_allclose(bias, -expectation(OLD, PREFIX, lost), rtol=1e-13)
        assert np.abs(bias).max() > 0.01


@given(batch=batches(zero_ratios=False, smallest=-5.0))
def test_the_old_policy_cancels_at_the_level_cumulative(batch):
    """Correction times ratio over the old policy is the ratio over the engine, as when that is given directly."""
    old = np.where(batch.mask, np.roll(np.where(batch.mask, batch.logp, -1.0), 1, axis=0) - 0.125, np.nan)
    weights = rollout_correction(old, batch.behavior_logp, batch.mask, level="cumulative", high=None).weights
    both = weights * np.exp(log_ratio(batch.logp, old, batch.mask))
    direct = np.exp(log_ratio(batch.logp, batch.behavior_logp, batch.mask))
    np.testing.assert_allclose(both, np.where(batch.mask, direct, 0.0), rtol=1e-11)


def test_a_capped_product_collapses_with_its_length():
    """Binary tokens whose log-ratio is +-s, normalized under the engine; every number of ups with its probability."""
    length = 400
    for variance, applied in ((0.0335**2 * 1000, 0.79), (0.0335**2 * 8192, 0.18)):
        s = math.sqrt(variance / length)
        up = 1 / (1 + math.exp(s))
        d = np.where(np.arange(length) < np.arange(length + 1)[:, None], s, -s)
        logs = [
            math.lgamma(length + 1) - math.lgamma(k + 1) - math.lgamma(length - k + 1) + k * math.log(up)
            + (length - k) * math.log1p(-up)
            for k in range(length + 1)
        ]  # fmt: skip
        chance = np.exp(logs)
        mean = {}
        for level, high in product(("token", "sequence"), (2.0, None)):
            weights = rollout_correction(d, np.zeros_like(d), level=level, high=high).weights
            mean[level, high] = float(chance @ weights.mean(axis=1))
        assert mean["sequence", None] == pytest.approx(1, rel=1e-10)
        assert mean["sequence", 2.0] == pytest.approx(applied, abs=0.01)
        assert mean["token", 2.0] == pytest.approx(1, rel=1e-10)


def test_stages_multiply():
    """A geometric mask with truncated token weights, from the docstring."""
    d = np.array([[1.0, -1.0, 0.02], [0.5, 0.5, -0.1]])
    zero = np.zeros_like(d)
    geometric = rollout_correction(d, zero, level="sequence_mean", mode="reject", low=0.99, high=1.01)
    weights = geometric.weights * rollout_correction(d, zero).weights
    np.testing.assert_allclose(weights, [[2.0, math.exp(-1), math.exp(0.02)], [0, 0, 0]])
    assert geometric.kept.tolist() == [[True] * 3, [False] * 3]
    assert geometric.metrics["rollout/rejected_sequence_fraction"] == 0.5


# Bad input.

GOOD = np.zeros((2, 3))
BOUND = "must be a positive finite number, or None"
BAD_CALLS = {
    "unknown mode": ({"mode": "truncated"}, r"mode must be one of truncate, mask, reject; got 'truncated' \(did you"),
    "no mode": ({"mode": None}, r"mode must be one of truncate, mask, reject; got None"),
    "unknown level": ({"level": "geometric"}, r"level must be one of token, .*; got 'geometric'"),
    "no level": ({"level": None}, r"level must be one of token, .*; got None"),
    "high 0": ({"high": 0.0}, f"rollout_correction: high {BOUND}; got 0.0"),
    "high inf": ({"high": math.inf}, f"rollout_correction: high {BOUND}; got inf"),
    "high nan": ({"high": math.nan}, f"rollout_correction: high {BOUND}; got nan"),
    "high True": ({"high": True}, f"rollout_correction: high {BOUND}; got True"),
    "high of another type": ({"high": "2"}, f"rollout_correction: high {BOUND}; got '2'"),
    "high array": ({"high": np.ones(2)}, f"rollout_correction: high {BOUND}; got array"),
    "low 0": ({"low": 0}, f"rollout_correction: low {BOUND}; got 0"),
    "low negative": ({"low": -0.5}, f"rollout_correction: low {BOUND}; got -0.5"),
    "low above high": ({"low": 3.0}, r"rollout_correction: low must be at most high, 2.0; got 3.0"),
    "window at a level without": ({"window": 3}, r"window must be None at level 'token'; got 3"),
    "no window": ({"level": "window"}, r"window must be an integer of at least 1 at level 'window'; got None"),
    "turn without ids": ({"level": "turn"}, r"turn_ids must be an integer array at level 'turn'; got None"),
    "list": ({"proximal_logp": [[0.0]]}, r"proximal_logp must be an array of NumPy, .*; got list"),
    "no behavior": ({"behavior_logp": None}, r"behavior_logp must be an array of NumPy, .*; got NoneType"),
    "no time axis": (
        {"proximal_logp": np.zeros(()), "behavior_logp": np.zeros(())},
        r"proximal_logp must have a time axis, shape \(\.\.\., T\); got shape \(\)",
    ),
    "integers": ({"proximal_logp": GOOD.astype(int)}, r"proximal_logp must have a real floating.* dtype; got int64"),
    "shapes that would broadcast": (
        {"behavior_logp": np.zeros((1, 3))},
        r"behavior_logp must have the shape of proximal_logp, \(2, 3\); got \(1, 3\)",
    ),
    "mask of another shape": (
        {"mask": np.ones(3, dtype=bool)},
        r"mask must have the shape of proximal_logp, \(2, 3\); got \(3,\)",
    ),
    "mask of numbers": ({"mask": np.ones((2, 3))}, r"mask must have dtype bool, True at policy tokens; got float64"),
    "two libraries": (
        {"proximal_logp": torch.zeros(2, 3)},
        r"must be arrays of one and the same library; got proximal_logp: torch.Tensor, behavior_logp: numpy.ndarray",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_named(case):
    changed, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        rollout_correction(**{"proximal_logp": GOOD, "behavior_logp": GOOD, **changed})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("proximal_logp", math.nan, "a number below +inf"),
        ("proximal_logp", math.inf, "a number below +inf"),
        ("behavior_logp", math.nan, "finite"),
        ("behavior_logp", -math.inf, "finite"),
    ],
)
def test_bad_values_at_policy_tokens_are_located(xp, name, value, allowed):
    arrays = {"proximal_logp": np.full((2, 3), -1.0), "behavior_logp": np.full((2, 3), -1.0)}
    arrays[name][1, 2] = value
    message = re.escape(f"{name} must be {allowed}") + rf" .*got {value} at index \(1, 2\)"
    with pytest.raises(ValueError, match="^" + message):
        rollout_correction(**{key: xp(x) for key, x in arrays.items()})


@pytest.mark.parametrize("name", ["proximal_logp", "behavior_logp"])
def test_gradients_are_refused(name):
    arguments = {key: torch.zeros(2, 3) for key in ("proximal_logp", "behavior_logp")}
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} must be detached"):
        rollout_correction(**arguments)
