"""Clip windows against plain loops, at the places where they are easy to get wrong."""

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

from ctpo import CalibratedClip, PositionClip, RatioClip

positive = st.floats(1e-4, 10.0)
ratio_clips = st.builds(
    RatioClip,
    st.floats(1e-4, 1.0),
    st.one_of(positive, st.just(math.inf)),
    st.one_of(st.none(), st.floats(1.001, 20.0)),
)
position_clips = st.builds(
    PositionClip,
    low=positive,
    high=positive,
    power=st.floats(-1.5, 1.5),
    dual=st.one_of(st.none(), positive),
    drift=st.one_of(st.just(0.0), st.floats(-0.1, 0.1)),
)
rates = st.floats(1e-9, 0.499)
calibrated_clips = st.builds(
    CalibratedClip,
    low=rates,
    high=rates,
    sigma=positive,
    drift=st.one_of(st.just(0.0), st.floats(-0.1, 0.1)),
    power=st.floats(-1.5, 1.5),
    dual=st.one_of(st.none(), rates),
)
TENTH = CalibratedClip(low=0.1, high=0.1, sigma=0.04, drift=0.0008, dual=0.2)


def check(xp, found, expected, shape, dtype):
    for bound, values in zip(found, zip(*expected, strict=True), strict=True):
        if values[0] is None:
            assert bound is None
        else:
            assert bound.shape == shape
            assert bound.dtype == dtype
            np.testing.assert_allclose(xp.numpy(bound).ravel(), values, rtol=1e-12, atol=1e-14)


@given(clip=ratio_clips, places=st.lists(st.integers(0, 9000), min_size=1, max_size=6))
def test_ratio_clip_is_the_same_everywhere(xp, clip, places):
    expected = [oracle.ratio_bounds(t, clip.low, clip.high, clip.dual) for t in places]
    check(xp, clip.bounds(xp([places], "float64")), expected, (1, len(places)), xp.dtype("float64"))


@given(clip=position_clips, places=st.lists(st.integers(0, 9000), min_size=1, max_size=6))
def test_position_clip_equals_loops(xp, clip, places):
    expected = [oracle.position_bounds(t, clip.low, clip.high, clip.power, clip.dual, clip.drift) for t in places]
    check(xp, clip.bounds(xp([places], "float64")), expected, (1, len(places)), xp.dtype("float64"))


@given(clip=calibrated_clips, places=st.lists(st.integers(0, 9000), min_size=1, max_size=6))
def test_calibrated_clip_equals_loops(xp, clip, places):
    fields = dataclasses.asdict(clip)
    expected = [oracle.calibrated_bounds(t, **fields) for t in places]
    check(xp, clip.bounds(xp([places], "float64")), expected, (1, len(places)), xp.dtype("float64"))
    same = clip.position_clip
    assert (same.power, same.drift, same.dual is None) == (clip.power, clip.drift, clip.dual is None)


def test_a_gaussian_leaves_a_calibrated_window_at_its_rates():
    """The shares beyond the bounds, from the error function; the power and the drift are those of the law."""

    def above(x, t):
        return math.erfc((x + 0.01 * t) / (0.2 * t**0.7) / math.sqrt(2)) / 2

    clip = CalibratedClip(low=0.3, high=0.02, dual=0.001, sigma=0.2, drift=0.01, power=0.7)
    for t in (1, 30, 8000):
        low, high, dual = (float(bound) for bound in clip.bounds(t))
        found = (1 - above(low, t), above(high, t), above(dual, t))
        np.testing.assert_allclose(found, (0.3, 0.02, 0.001), rtol=1e-9)


@given(clip=st.one_of(position_clips, ratio_clips, calibrated_clips))
def test_a_masked_position_has_finite_bounds_of_position_one(clip):
    at_zero, at_one = clip.bounds(np.zeros(1)), clip.bounds(np.ones(1))
    for zero, one in zip(at_zero, at_one, strict=True):
        assert (zero is None and one is None) or zero == one


@pytest.mark.parametrize("clip", [RatioClip(dual=3.0), PositionClip(), TENTH])
def test_dtype_follows_the_positions(xp, clip):
    for dtype in ("float32", "float64"):
        for bound in clip.bounds(xp([1, 2], dtype)):
            assert bound.dtype == xp.dtype(dtype)
    default = xp.xp.__array_namespace_info__().default_dtypes()["real floating"]
    for dtype in ("int32", "int64"):
        for bound in clip.bounds(xp([1, 2], dtype)):
            assert bound.dtype == default


def test_python_numbers_and_lists_go_through_numpy():
    low, high, dual = PositionClip().bounds(4)
    assert (float(low), float(high), float(dual)) == (-0.05, 0.1, 0.1)
    assert low.shape == ()
    low, high, dual = PositionClip(power=-0.5, dual=None).bounds([[1, 4]])
    np.testing.assert_array_equal(low, [[-0.025, -0.0125]])
    np.testing.assert_array_equal(high, [[0.05, 0.025]])
    assert dual is None


def test_drift_moves_the_whole_window():
    clip = PositionClip(low=0.5, high=1.0, power=0.0, dual=2.0, drift=0.25)
    bounds = clip.bounds([0, 1, 4])
    np.testing.assert_array_equal(bounds[0], [-0.75, -0.75, -1.5])
    np.testing.assert_array_equal(bounds[1], [0.75, 0.75, 0.0])
    np.testing.assert_array_equal(bounds[2], [1.75, 1.75, 1.0])


def test_extreme_ratio_clips_are_open_windows():
    low, high, dual = RatioClip(low=1, high=math.inf).bounds([1])
    assert (low[0], high[0], dual) == (-math.inf, math.inf, None)


def test_bounds_stay_on_their_device():
    device = array_api_strict.Device("device1")
    for clip in (RatioClip(dual=3.0), PositionClip(drift=0.1), TENTH):
        for position in (array_api_strict.asarray([0, 2], device=device),):
            assert all(bound.device == device for bound in clip.bounds(position))


def test_positions_are_not_written_to():
    position = torch.tensor([0.0, 3.0])
    PositionClip(drift=0.1).bounds(position)
    assert position.tolist() == [0.0, 3.0]


def test_fields_are_plain_floats_that_compare_and_serialize():
    clip = RatioClip(1, np.float32(4.0))
    assert clip == RatioClip(1.0, 4.0)
    assert hash(clip) == hash(RatioClip(1.0, 4.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        clip.low = 0.5  # type: ignore[misc]
    assert repr(clip) == "RatioClip(low=1.0, high=4.0, dual=None)"
    assert RatioClip(**json.loads(json.dumps(dataclasses.asdict(clip)))) == clip
    clip = PositionClip(power=-1, dual=None)
    assert repr(clip) == "PositionClip(low=0.025, high=0.05, power=-1.0, dual=None, drift=0.0)"
    assert PositionClip(**json.loads(json.dumps(dataclasses.asdict(clip)))) == clip
    assert hash(clip) == hash(PositionClip(power=-1.0, dual=None))
    with pytest.raises(dataclasses.FrozenInstanceError):
        clip.low = 1.0  # type: ignore[misc]
    clip = CalibratedClip(low=0.25, high=np.float64(0.125), sigma=1, drift=0)
    clip.bounds(1)
    assert repr(clip) == "CalibratedClip(low=0.25, high=0.125, sigma=1.0, drift=0.0, power=0.5, dual=None)"
    assert CalibratedClip(**json.loads(json.dumps(dataclasses.asdict(clip)))) == clip
    assert hash(clip) == hash(CalibratedClip(low=0.25, high=0.125, sigma=1.0, drift=0.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        clip.low = 0.1  # type: ignore[misc]
    assert dataclasses.replace(clip, sigma=2.0).bounds(1)[0] == 2 * clip.bounds(1)[0]
    with pytest.raises(TypeError, match="positional"):
        CalibratedClip(0.1, 0.1, 1.0, 0.0)


NOT_NUMBERS = [True, "0.2", 1j, [0.2], math.nan]


@pytest.mark.parametrize("value", [*NOT_NUMBERS, None, 0, -0.1, 1.0001, math.inf])
def test_ratio_clip_low_out_of_range(value):
    with pytest.raises(ValueError, match=r"RatioClip: low must be a number in \(0, 1\]; got " + quoted(value)):
        RatioClip(low=value)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, None, 0, -0.1])
def test_ratio_clip_high_out_of_range(value):
    with pytest.raises(ValueError, match="RatioClip: high must be a positive number; got " + quoted(value)):
        RatioClip(high=value)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 1, 0.5, math.inf])
def test_ratio_clip_dual_out_of_range(value):
    message = "RatioClip: dual must be a finite number above 1, or None; got " + quoted(value)
    with pytest.raises(ValueError, match=message):
        RatioClip(dual=value)


@pytest.mark.parametrize("name", ["low", "high", "dual"])
@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, -0.1, math.inf])
def test_position_clip_scale_out_of_range(name, value):
    optional = ", or None" if name == "dual" else ""
    message = f"PositionClip: {name} must be a positive finite number{optional}; got " + quoted(value)
    with pytest.raises(ValueError, match=message):
        PositionClip(**{name: value})


@pytest.mark.parametrize("name", ["power", "drift"])
@pytest.mark.parametrize("value", [*NOT_NUMBERS, None, math.inf, -math.inf])
def test_position_clip_exponent_and_drift_out_of_range(name, value):
    message = f"PositionClip: {name} must be a finite number; got " + quoted(value)
    with pytest.raises(ValueError, match=message):
        PositionClip(**{name: value})


@pytest.mark.parametrize("name", ["low", "high"])
def test_position_clip_has_no_missing_side(name):
    with pytest.raises(ValueError, match=f"PositionClip: {name} must be a positive finite number; got None"):
        PositionClip(**{name: None})


@pytest.mark.parametrize("name", ["low", "high", "dual"])
@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, -0.1, 0.5, 1])
def test_calibrated_clip_rate_out_of_range(name, value):
    optional = ", or None" if name == "dual" else ""
    message = f"CalibratedClip: {name} must be a number between 0 and 0.5{optional}; got " + quoted(value)
    with pytest.raises(ValueError, match=message):
        CalibratedClip(**{"low": 0.1, "high": 0.1, "sigma": 1.0, "drift": 0.0, name: value})


@pytest.mark.parametrize("name", ["sigma", "drift", "power"])
@pytest.mark.parametrize("value", [*NOT_NUMBERS, None, math.inf, -math.inf])
def test_calibrated_clip_constant_out_of_range(name, value):
    allowed = "a positive finite number" if name == "sigma" else "a finite number"
    with pytest.raises(ValueError, match=f"CalibratedClip: {name} must be {allowed}; got " + quoted(value)):
        CalibratedClip(**{"low": 0.1, "high": 0.1, "sigma": 1.0, "drift": 0.0, name: value})
    if name == "sigma":
        for size in (0, -0.1):
            with pytest.raises(ValueError, match=f"CalibratedClip: sigma must be {allowed}; got {size}"):
                CalibratedClip(low=0.1, high=0.1, sigma=size, drift=0.0)


@pytest.mark.parametrize("clip", [RatioClip(), PositionClip(), TENTH])
def test_positions_must_be_numbers(clip):
    with pytest.raises(ValueError, match=r"position must have a real dtype .*; got complex128"):
        clip.bounds(np.array([1j]))
    with pytest.raises(ValueError, match=r"position must have a real dtype .*; got <U1"):
        clip.bounds(["a"])


def quoted(value):
    """`value` as a message shows it, ready for a pattern."""
    return repr(value).replace("[", r"\[").replace("]", r"\]").replace("(", r"\(").replace(")", r"\)") + "$"
