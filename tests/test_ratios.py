"""Log importance ratios: every level against plain loops, and what must not change them."""

from __future__ import annotations

import math
import re

import array_api_strict
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from strategies import batches

from ctpo import log_ratio, positions
from ctpo.ratios import LEVELS


def options(level: str, batch, window: int = 3) -> dict:
    """Keyword arguments that `level` needs."""
    if level in ("window", "forward", "lookahead"):
        return {"window": window}
    return {"turn_ids": batch.turn_ids} if level in ("turn", "turn_mean") else {}


def by_loops(batch, level: str, window: int | None = None) -> np.ndarray:
    """The oracle, row by row."""
    rows = []
    for logp, behavior_logp, mask, turn_ids in zip(
        batch.logp.tolist(),
        batch.behavior_logp.tolist(),
        batch.mask.tolist(),
        batch.turn_ids.tolist(),
        strict=True,
    ):
        d = oracle.token_log_ratios(logp, behavior_logp, mask)
        rows.append(oracle.level(d, mask, level, window, turn_ids))
    return np.array(rows)


def computed(xp, batch, level: str, dtype: str = "float64", window: int = 3) -> np.ndarray:
    """The library, on the backend `xp`."""
    given_ = {name: xp(value) if name == "turn_ids" else value for name, value in options(level, batch, window).items()}
    result = log_ratio(xp(batch.logp, dtype), xp(batch.behavior_logp, dtype), xp(batch.mask), level=level, **given_)
    assert result.dtype == xp.dtype(dtype)
    return xp.numpy(result)


@given(batch=batches(), window=st.integers(1, 14))
def test_every_level_equals_loops(xp, batch, window):
    for level in LEVELS:
        expected, found = by_loops(batch, level, window), computed(xp, batch, level, window=window)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=3e-11, err_msg=level)


@given(batch=batches())
def test_float32_stays_float32(xp, batch):
    for level in LEVELS:
        expected, found = by_loops(batch, level, 3), computed(xp, batch, level, "float32")
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-4, err_msg=level)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@given(batch=batches())
def test_half_precision_is_computed_in_float32(dtype, batch):
    """Rounding of the inputs is the caller's; no further rounding to half precision happens."""
    half = getattr(torch, dtype)
    logp, behavior_logp = (torch.asarray(x).to(half) for x in (batch.logp, batch.behavior_logp))
    mask = torch.asarray(batch.mask)
    for level in LEVELS:
        chosen = {
            name: torch.asarray(value) if name == "turn_ids" else value for name, value in options(level, batch).items()
        }
        result = log_ratio(logp, behavior_logp, mask, level=level, **chosen)
        assert result.dtype == torch.float32
        wide = log_ratio(logp.float(), behavior_logp.float(), mask, level=level, **chosen)
        assert torch.equal(result, wide)


def test_numpy_half_precision_and_mixed_dtypes(xp):
    values = [-0.5, -1.0]
    if xp.name == "numpy":
        assert log_ratio(xp(values, "float16"), xp(values, "float16")).dtype == np.float32
    mixed = log_ratio(xp(values, "float32"), xp(values, "float64"))
    assert mixed.dtype == xp.dtype("float64")


@given(batch=batches(garbage=False))
def test_no_mask_means_every_token(xp, batch):
    full = np.ones_like(batch.mask)
    for level in LEVELS:
        chosen = {name: xp(value) if name == "turn_ids" else value for name, value in options(level, batch).items()}
        logp, behavior_logp = xp(batch.logp), xp(batch.behavior_logp)
        without = log_ratio(logp, behavior_logp, level=level, **chosen)
        explicit = log_ratio(logp, behavior_logp, xp(full), level=level, **chosen)
        np.testing.assert_allclose(xp.numpy(without), xp.numpy(explicit), rtol=1e-13)


@given(batch=batches())
def test_positions_count_policy_tokens(xp, batch):
    found = positions(xp(batch.mask))
    assert xp.xp.isdtype(found.dtype, "integral")
    assert xp.numpy(found).tolist() == [oracle.positions(row) for row in batch.mask.tolist()]


# What must not change a log-ratio.


@given(batch=batches(), before=st.integers(0, 3), after=st.integers(0, 3))
def test_padding_changes_nothing(xp, batch, before, after):
    def padded(x, value):
        return np.pad(x, ((0, 0), (before, after)), constant_values=value)

    larger = type(batch)(
        padded(batch.logp, np.nan),
        padded(batch.behavior_logp, -np.inf),
        padded(batch.advantages, np.nan),
        padded(batch.mask, False),
        padded(batch.turn_ids, 99),
    )
    inside = slice(before, before + batch.mask.shape[-1])
    for level in LEVELS:
        found = computed(xp, larger, level)
        np.testing.assert_allclose(found[:, inside], computed(xp, batch, level), rtol=1e-12, atol=1e-13)
        assert not found[:, :before].any()
        assert not found[:, inside.stop :].any()


@given(batch=batches())
def test_deleting_masked_gaps_changes_nothing(xp, batch):
    for level in LEVELS:
        found = computed(xp, batch, level)
        for row, mask in enumerate(batch.mask):
            if mask.any():
                alone = computed(xp, batch.take(slice(row, row + 1), mask), level)[0]
                np.testing.assert_allclose(found[row][mask], alone, rtol=1e-12, atol=1e-13)


@given(batch=batches(), data=st.data())
def test_rows_do_not_see_each_other(xp, batch, data):
    order = data.draw(st.permutations(range(batch.mask.shape[0])))
    for level in LEVELS:
        found = computed(xp, batch, level)
        np.testing.assert_array_equal(found[order], computed(xp, batch.take(order), level))
        for row in range(len(order)):
            np.testing.assert_array_equal(found[row], computed(xp, batch.take(row), level))


@given(batch=batches(zero_ratios=False))
def test_equal_policies_have_log_ratio_zero(xp, batch):
    batch.logp = batch.behavior_logp
    for level in LEVELS:
        assert not computed(xp, batch, level).any()


@given(batch=batches(zero_ratios=False, smallest=-5.0), window=st.integers(1, 5))
def test_levels_agree_where_they_meet(xp, batch, window):
    def at(level, window=window):
        return computed(xp, batch, level, window=window)

    length = batch.mask.shape[-1]
    near = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_array_equal(at("window", 1), at("token"))
    np.testing.assert_allclose(at("window", length + 5), at("cumulative"), **near)
    np.testing.assert_array_equal(at("forward", 1), at("token"))
    np.testing.assert_array_equal(at("lookahead", 0), at("cumulative"))
    np.testing.assert_allclose(at("lookahead", length + 5), at("sequence"), **near)
    place = np.maximum(xp.numpy(positions(xp(batch.mask))), 1)
    np.testing.assert_allclose(at("cumulative_mean") * place, at("cumulative"), **near)
    batch.turn_ids = np.zeros_like(batch.turn_ids)
    np.testing.assert_allclose(at("turn"), at("sequence"), **near)
    np.testing.assert_allclose(at("turn_mean"), at("sequence_mean"), **near)
    batch.turn_ids = np.tile(np.arange(length), (len(batch.mask), 1))
    np.testing.assert_allclose(at("turn"), at("token"), **near)


def test_a_ratio_of_zero_leaves_the_window_again():
    """A difference of prefix sums would be -inf - -inf = NaN from the second -inf on."""
    zero = -math.inf
    logp = np.array([-1.0, zero, zero, -2.0, -3.0, -4.0])
    found = log_ratio(logp, np.full(6, -1.0), level="window", window=2)
    np.testing.assert_array_equal(found, [0.0, zero, zero, zero, -3.0, -5.0])
    turns = log_ratio(logp, np.full(6, -1.0), level="turn", turn_ids=np.array([0, 1, 1, 2, 2, 3]))
    np.testing.assert_array_equal(turns, [0.0, zero, zero, -3.0, -3.0, -3.0])


def test_a_window_keeps_the_digits_that_prefix_sums_lose():
    """Tokens of 1e-4 after one of -60: prefix sums in float32 are exact to 4e-6 only."""
    d = np.full(200, 1e-4, dtype=np.float32)
    d[0] = -60.0
    found = log_ratio(d, np.zeros_like(d), level="window", window=8)
    np.testing.assert_allclose(found[8:], 8e-4, rtol=1e-6)


def test_a_turn_is_a_run_of_policy_tokens_with_equal_ids():
    """Masked ids neither part a turn nor join two; an id that comes back opens a new turn."""
    d = np.array([[1.0, 9.0, 2.0, 4.0, 9.0, 8.0, 16.0]])
    mask = np.array([[True, False, True, True, False, True, True]])
    ids = np.array([[1, 5, 1, 2, 2, 1, 1]])
    found = log_ratio(d, np.zeros_like(d), mask, level="turn", turn_ids=ids)
    np.testing.assert_array_equal(found, [[3.0, 0.0, 3.0, 4.0, 0.0, 24.0, 24.0]])
    found = log_ratio(d, np.zeros_like(d), mask, level="turn_mean", turn_ids=ids)
    np.testing.assert_array_equal(found, [[1.5, 0.0, 1.5, 4.0, 0.0, 12.0, 12.0]])


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 5)])
@pytest.mark.parametrize("level", LEVELS)
def test_empty_arrays_give_empty_arrays(xp, shape, level):
    x = xp(np.zeros(shape))
    chosen = {"window": 2} if level in ("window", "forward", "lookahead") else {}
    if level in ("turn", "turn_mean"):
        chosen = {"turn_ids": xp(np.zeros(shape, dtype=int))}
    assert log_ratio(x, x, level=level, **chosen).shape == shape
    assert log_ratio(x, x, xp(np.zeros(shape, dtype=bool)), level=level, **chosen).shape == shape


@given(batch=batches())
def test_leading_dimensions_are_free(xp, batch):
    rows, length = batch.mask.shape
    for level in LEVELS:
        flat = computed(xp, batch, level)
        deep = type(batch)(*(getattr(batch, f).reshape(1, rows, 1, length) for f in batch.__dict__))
        np.testing.assert_array_equal(computed(xp, deep, level).reshape(rows, length), flat)


def test_positive_log_probabilities_are_taken_as_they_come():
    """Rounding can put a log-probability above 0; only the difference matters."""
    np.testing.assert_array_equal(log_ratio(np.array([1e-7]), np.array([0.0])), [1e-7])


# Bad input.

GOOD = np.zeros((2, 3))
BAD_CALLS = {
    "unknown level": (
        {"level": "cumulativ"},
        r"level must be one of token, .*turn_mean; got 'cumulativ' \(did you mean 'cumulative'\?\)",
    ),
    "level of another type": ({"level": None}, r"level must be one of .*; got None"),
    "window at a level without": (
        {"level": "token", "window": 3},
        r"window must be None at level 'token'; got 3",
    ),
    "no window": (
        {"level": "window"},
        r"window must be an integer of at least 1 at level 'window'; got None",
    ),
    "window 0": ({"level": "window", "window": 0}, r"window must be an integer of at least 1 .*; got 0"),
    "window True": (
        {"level": "window", "window": True},
        r"window must be an integer of at least 1 .*; got True",
    ),
    "window 2.0": (
        {"level": "window", "window": 2.0},
        r"window must be an integer of at least 1 .*; got 2.0",
    ),
    "lookahead -1": (
        {"level": "lookahead", "window": -1},
        r"window must be an integer of at least 0 .*; got -1",
    ),
    "turn without ids": (
        {"level": "turn"},
        r"turn_ids must be an integer array at level 'turn'; got None",
    ),
    "ids without turn": (
        {"turn_ids": np.zeros((2, 3), dtype=int)},
        r"turn_ids must be None at level 'cumulative'; got ndarray",
    ),
    "ids of another shape": (
        {"level": "turn", "turn_ids": np.zeros((2, 4), dtype=int)},
        r"turn_ids must have the shape of logp, \(2, 3\); got \(2, 4\)",
    ),
    "floating ids": (
        {"level": "turn", "turn_ids": GOOD},
        r"turn_ids must have an integer dtype; got float64",
    ),
    "no mask array": ({"mask": [[True] * 3] * 2}, r"mask must be an array of NumPy, .*; got list"),
    "no behavior": ({"behavior_logp": None}, r"behavior_logp must be an array of NumPy, .*; got NoneType"),
    "list": ({"logp": [[0.0]]}, r"logp must be an array of NumPy, .*; got list"),
    "two libraries": (
        {"logp": torch.zeros(2, 3)},
        r"must be arrays of one and the same library; got logp: torch.Tensor, behavior_logp: numpy.ndarray",
    ),
    "no time axis": (
        {"logp": np.zeros(()), "behavior_logp": np.zeros(())},
        r"logp must have a time axis, shape \(\.\.\., T\); got shape \(\)",
    ),
    "integer logp": (
        {"logp": np.zeros((2, 3), dtype=int)},
        r"logp must have a real floating-point dtype; got int64",
    ),
    "complex behavior": (
        {"behavior_logp": GOOD + 0j},
        r"behavior_logp must have a real floating-point dtype; got complex128",
    ),
    "shapes that would broadcast": (
        {"behavior_logp": np.zeros((1, 3))},
        r"behavior_logp must have the shape of logp, \(2, 3\); got \(1, 3\)",
    ),
    "mask of another shape": (
        {"mask": np.ones(3, dtype=bool)},
        r"mask must have the shape of logp, \(2, 3\); got \(3,\)",
    ),
    "mask of numbers": (
        {"mask": np.ones((2, 3), dtype=int)},
        r"mask must have dtype bool, True at policy tokens; got int64",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_named(case):
    changed, message = BAD_CALLS[case]
    arguments = {"logp": GOOD, "behavior_logp": GOOD, **changed}
    with pytest.raises(ValueError, match=message):
        log_ratio(arguments.pop("logp"), arguments.pop("behavior_logp"), arguments.pop("mask", None), **arguments)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("logp", math.nan, "a number below +inf"),
        ("logp", math.inf, "a number below +inf"),
        ("behavior_logp", math.nan, "finite"),
        ("behavior_logp", math.inf, "finite"),
        ("behavior_logp", -math.inf, "finite"),
    ],
)
def test_bad_values_at_policy_tokens_are_located(xp, name, value, allowed):
    arrays = {"logp": np.full((2, 3), -1.0), "behavior_logp": np.full((2, 3), -1.0)}
    arrays[name][1, 2] = value
    message = re.escape(f"{name} must be {allowed}") + rf" .*got {value} at index \(1, 2\)"
    with pytest.raises(ValueError, match=message):
        log_ratio(*(xp(x) for x in arrays.values()))
    mask = np.ones((2, 3), dtype=bool)
    with pytest.raises(ValueError, match=message):
        log_ratio(*(xp(x) for x in arrays.values()), xp(mask))
    mask[1, 2] = False
    assert xp.numpy(log_ratio(*(xp(x) for x in arrays.values()), xp(mask))).tolist() == [[0.0] * 3] * 2


def test_finite_extremes_are_no_error(xp):
    """The check looks at extremes; large finite numbers must not pass for infinite."""
    large = float(np.finfo(np.float32).max) / 4
    found = log_ratio(xp([-large, -large], "float32"), xp([-large, -large], "float32"))
    assert xp.numpy(found).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [np.zeros(()), np.array(True)])
def test_positions_wants_a_boolean_mask_with_time(bad):
    with pytest.raises(ValueError, match=r"mask must have a time axis, shape \(\.\.\., T\); got shape \(\)"):
        positions(bad)
    with pytest.raises(ValueError, match="mask must have dtype bool, True at policy tokens; got float64"):
        positions(np.zeros(3))
    with pytest.raises(ValueError, match=r"mask must be an array .*; got list"):
        positions([True])


@pytest.mark.parametrize("level", LEVELS)
def test_off_the_cpu_nothing_is_read_and_everything_stays_there(level):
    """array-api-strict's second device stands for an accelerator: NaN passes, results stay on the device."""
    device = array_api_strict.Device("device1")

    def there(x):
        return array_api_strict.asarray(np.asarray(x), device=device)

    chosen = {"window": 2} if level in ("window", "forward", "lookahead") else {}
    if level in ("turn", "turn_mean"):
        chosen = {"turn_ids": there([[0, 0, 1, 1]])}
    logp, behavior_logp = there([[-1.0, -2.0, -3.0, math.nan]]), there([[-1.5, -1.0, -1.0, -1.0]])
    for mask in (None, there([[True, True, False, True]])):
        found = log_ratio(logp, behavior_logp, mask, level=level, **chosen)
        assert found.device == device
        here = np.asarray(array_api_strict.asarray(found, device=array_api_strict.Device("CPU_DEVICE")))
        assert np.isnan(here[0, 3])
