"""The formulas behind the claims on clipping, against plain loops over strings and tokens."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import oracle
import pytest

import ctpo
from ctpo import CalibratedClip, PositionClip, RatioClip
from simulations.claims.clipping_bias import (
    TABLE,
    TRIED,
    Integrand,
    alternating_world,
    by_ctpo,
    clipped_value,
    flipped_world,
    is_clipped,
    window,
    windows,
)
from simulations.exact import enumerate_trajectories, estimator_moments, policy_gradient, rational_weights
from simulations.mdp import independent_tokens, random_tree

F = Fraction
CLIPS = (*TRIED, RatioClip(0.2, 0.28), RatioClip(1.0, 0.2), PositionClip(drift=0.005), PositionClip(power=-0.5))


def log_bounds(clip, t):
    if isinstance(clip, RatioClip):
        return oracle.ratio_bounds(t, clip.low, clip.high, clip.dual)
    if isinstance(clip, CalibratedClip):
        return oracle.calibrated_bounds(t, clip.low, clip.high, clip.sigma, clip.drift, clip.power, clip.dual)
    return oracle.position_bounds(t, clip.low, clip.high, clip.power, clip.dual, clip.drift)


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("t", [1, 2, 9])
def test_window_is_the_definition(clip, t):
    low, high, dual = log_bounds(clip, t)
    found = window(clip, t)
    expected = [math.exp(low), math.exp(high), math.inf if dual is None else math.exp(dual)]
    assert [float(x) for x in found] == pytest.approx(expected, rel=1e-13)


def test_ratio_windows_are_rational():
    assert window(RatioClip(0.2, 0.28, dual=3.0), 5) == (F(4, 5), F(32, 25), 3)


@pytest.fixture(scope="module")
def tool_world():
    """A random tree in which some positions differ from the place in the stream."""
    worlds = (random_tree(np.random.default_rng(s), horizon=3, tool_share=0.4, parameters="shared") for s in range(20))
    return next(w for w in worlds if (enumerate_trajectories(w).mask.sum(axis=1) == 2).any())


@pytest.mark.parametrize("clip", TRIED, ids=str)
def test_clipping_token_by_token(tool_world, clip):
    paths = enumerate_trajectories(tool_world)
    advantages = paths.advantage("A_target")
    weight = rational_weights(paths, "cumulative")
    dropped, value = is_clipped(paths, clip, weight, advantages), clipped_value(paths, clip, weight, advantages)
    seen = set()
    for n in range(len(weight)):
        t = 0
        for h in range(weight.shape[1]):
            if not paths.mask[n, h]:
                assert not dropped[n, h]
                assert value[n, h] == 0
                continue
            t += 1
            w, a = weight[n, h], advantages[n, h]
            low, high, dual = (None if b is None else math.exp(b) for b in log_bounds(clip, t))
            expected, surrogate = False, w * a
            if a > 0 and w > high:
                expected, surrogate = True, high * a
            elif a < 0 and w < low:
                expected, surrogate = True, low * a
            elif a < 0 and dual is not None and w > dual:
                expected, surrogate = True, dual * a
            assert dropped[n, h] == expected
            assert float(value[n, h]) == pytest.approx(float(surrogate), rel=1e-13)
            seen.add(expected)
    assert seen == {False, True}


def test_positions_skip_tool_tokens(tool_world):
    paths = enumerate_trajectories(tool_world)
    low, _, _ = windows(paths, PositionClip(1.0, 1.0, power=1.0, dual=None))
    for row, mask in zip(low, paths.mask, strict=True):
        found = [-math.log(bound) for bound, kept in zip(row, mask, strict=True) if kept]
        assert found == pytest.approx(range(1, len(found) + 1))


@pytest.mark.parametrize("level", ["token", "cumulative", "sequence"])
def test_by_ctpo_is_what_the_engine_computes(tool_world, level):
    paths = enumerate_trajectories(tool_world)
    advantages = paths.advantage("A_target")
    estimator = ctpo.Estimator(level, RatioClip(0.29, 0.37, dual=1.9))
    mean, surrogate = by_ctpo(paths, estimator, advantages)
    assert mean == pytest.approx(estimator_moments(tool_world, estimator).mean, abs=1e-14)
    value = clipped_value(paths, RatioClip(0.29, 0.37, dual=1.9), rational_weights(paths, level), advantages)
    assert surrogate == pytest.approx(float(paths.expectation(value.sum(axis=1))), abs=1e-14)


def plain_effect(p, horizon, gains, clip):
    """Shares clipped under b = 1/2 and pi, true and clipped gradient, of independent tokens with R = sum c_t a_t."""
    dropped = {"b": F(0), "pi": F(0)}
    true = clipped = F(0)
    for string in product((0, 1), repeat=horizon):
        chance_b, chance_pi = F(1, 2) ** horizon, math.prod([p if a else 1 - p for a in string], start=F(1))
        rho = F(1)
        for t, a in enumerate(string, start=1):
            rho *= (p if a else 1 - p) * 2
            advantage, score = gains[t - 1] * (a - p), a - p
            low, high, dual = log_bounds(clip, t)
            x = math.log(rho)
            gone = x > high if advantage > 0 else x < low or (dual is not None and x > dual)
            true += chance_pi * score * advantage
            clipped += 0 if gone else chance_b * rho * score * advantage
            dropped["b"] += chance_b * gone / horizon
            dropped["pi"] += chance_pi * gone / horizon
    return dropped["b"], dropped["pi"], true, clipped


@pytest.mark.parametrize("clip", TABLE.values(), ids=TABLE)
def test_table_by_hand(clip):
    under_b, under_pi, true, clipped = plain_effect(F(11, 20), 5, (2, -1, 2, -1, 2), clip)
    integrand = Integrand.of(alternating_world())
    assert [integrand.share(clip, who) for who in ("behavior", "target")] == [under_b, under_pi]
    assert integrand.true.tolist() == [-true, true]
    assert integrand.mean(clip).tolist() == [-clipped, clipped]
    assert integrand.predicted(clip, "target").tolist() == [-clipped, clipped]
    assert integrand.by_ctpo(clip) == pytest.approx([-float(clipped), float(clipped)], abs=1e-15)


def test_flipped_world_by_hand():
    _, _, true, clipped = plain_effect(F(3, 4), 2, (2, -1), RatioClip(0.2, 0.2))
    assert (true, clipped) == (F(3, 16), F(-45, 256))
    assert policy_gradient(flipped_world()).tolist() == [-true, true]


def test_share_is_of_tokens_that_have_an_advantage():
    # Only the first token earns; its ratio is 3/2 or 1/2. The second has A = 0 and is neither clipped nor counted.
    world = independent_tokens([F(1, 2), F(1, 2)], [F(1, 4), F(3, 4)], 2, outcome=lambda s: s[0])
    integrand = Integrand.of(world)
    high_only = RatioClip(1.0, 0.2)
    assert [integrand.share(high_only, who) for who in ("behavior", "target")] == [F(1, 2), F(3, 4)]
