"""The laws and formulas behind the claims on drift and clip rates, against plain sums over tokens and strings."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import oracle
import pytest

from ctpo import CalibratedClip, PositionClip, RatioClip
from simulations.claims.clip_rates import (
    AT,
    RELEASED,
    TABLE,
    Coins,
    Flagged,
    Gaussian,
    Mixture,
    Sparse,
    calibrated,
    columns,
    flagged,
    gaussian_tokens,
    half_and_half,
    minibatches,
    near,
    population_windows,
    rates,
)
from simulations.claims.drift import (
    LogParts,
    _fading_tokens,
    check_third_policy,
    divergence,
    drift_ratio,
    dyadic_policies,
    dyadic_trees,
    hot_or_cold,
    kl_from_behavior,
    kl_from_target,
    occupancy,
    sampled_drift,
    total_variance,
    with_divergence,
    within_only,
)
from simulations.claims.martingale import log2_ratios
from simulations.claims.registry import Context
from simulations.exact import enumerate_trajectories
from simulations.mdp import World, as_numbers, bigram, independent_tokens, random_chain, sticky_hot, tree
from simulations.monte_carlo import Sampler, z_threshold

F = Fraction


def normal(x):
    return math.erfc(-x / math.sqrt(2)) / 2


def tosses(share, up, down, n):
    """All results of n flips: (probability, log-ratio)."""
    for flips in product((True, False), repeat=n):
        yield (
            math.prod(share if head else 1 - share for head in flips),
            math.fsum(up if head else down for head in flips),
        )


COINS = [Coins.even(0.3), Coins.of(0.2, 0.5), Coins.of(0.1, -1.5), Coins.even(0.4, flips=2), Coins.of(0.9, -0.2, 2)]


@pytest.mark.parametrize("coins", COINS)
@pytest.mark.parametrize("under_pi", [False, True])
def test_coins_equal_sums_over_all_flips(coins, under_pi):
    law = coins.under_target() if under_pi else coins
    heads = [coins.share, 1 - coins.share]
    ratios = [math.exp(coins.up), math.exp(coins.down)]
    assert math.fsum(b * r for b, r in zip(heads, ratios, strict=True)) == pytest.approx(1, abs=1e-15)
    share = heads[0] * ratios[0] if under_pi else heads[0]
    assert law.share == pytest.approx(share, rel=1e-15)
    mean = coins.flips * (share * coins.up + (1 - share) * coins.down)
    square = coins.flips * (share * coins.up**2 + (1 - share) * coins.down**2)
    assert law.drift == pytest.approx(-mean, rel=1e-12)
    assert law.sigma == pytest.approx(math.sqrt(square - mean**2 / coins.flips), rel=1e-12)
    for t in (1, 2, 4):
        results = list(tosses(share, coins.up, coins.down, t * coins.flips))
        for x in (-2.0, -0.31, -0.1, 0.0123, 0.25, 0.77, 3.0):
            np.testing.assert_allclose(law.below(x, t), math.fsum(p for p, s in results if s < x), atol=1e-13)
            np.testing.assert_allclose(law.above(x, t), math.fsum(p for p, s in results if s > x), atol=1e-13)
            values = sorted({round(s, 9) for _, s in results})
            sizes = [math.fsum(p for p, s in results if abs(s - v) < 1e-8) for v in values]
            beside = [size for v, size in zip(values, sizes, strict=True) if abs(v - x) <= coins.up - coins.down]
            if values[0] <= x <= values[-1]:
                assert any(law.atom(x, t) == pytest.approx(size, abs=1e-13) for size in beside)


def test_few_deciding_tokens_equal_sums_over_which_they_are():
    coins, share, t = Coins.even(0.5), 0.3, 4
    law = Sparse(coins, share)
    for x in (-0.9, -0.2, 0.01, 0.6):
        below = above = 0.0
        for kinds in product(((0.7, 0.0), (0.3 * coins.share, 0.5), (0.3 * (1 - coins.share), -0.5)), repeat=t):
            weight, total = math.prod(p for p, _ in kinds), math.fsum(s for _, s in kinds)
            below += weight * (total < x)
            above += weight * (total > x)
        np.testing.assert_allclose(law.below(np.array([x]), np.array([t])), [below], atol=1e-11)
        np.testing.assert_allclose(law.above(np.array([x]), np.array([t])), [above], atol=1e-11)


def test_gaussians_and_their_mixtures():
    law = Gaussian(0.2, 0.03)
    for t, x in ((1, -0.1), (50, -2.0), (50, 0.4)):
        z = (x + 0.03 * t) / (0.2 * math.sqrt(t))
        np.testing.assert_allclose((law.below(x, t), law.above(x, t)), (normal(z), normal(-z)), rtol=1e-12)
    still = Gaussian(0.0, 0.0)
    assert (still.below(-0.1, 9), still.below(0.1, 9), still.above(0.1, 9)) == (0, 1, 0)
    both = Mixture((law, still))
    assert both.below(-0.1, 1) == pytest.approx(law.below(-0.1, 1) / 2)
    sizes = [part.sigma for part in minibatches(0.05, 2).laws]
    np.testing.assert_allclose(np.mean(np.square(sizes)), 0.05**2, rtol=1e-12)
    np.testing.assert_allclose(sizes[5] / sizes[1], 5, rtol=1e-12)
    assert all(part.drift == part.sigma**2 / 2 for part in minibatches(0.05, 2).laws)


def test_rates_are_those_beyond_the_bounds():
    law, t = Gaussian(0.1, 0.01), 25
    for clip, (low, high, dual) in (
        (PositionClip(0.2, 0.3, 0.25, 0.4, 0.02), oracle.position_bounds(t, 0.2, 0.3, 0.25, 0.4, 0.02)),
        (RatioClip(0.5, 4.0, dual=3.0), oracle.ratio_bounds(t, 0.5, 4.0, 3.0)),
        (
            CalibratedClip(low=0.2, high=0.1, sigma=0.1, drift=0.0, dual=0.3),
            oracle.calibrated_bounds(t, 0.2, 0.1, 0.1, 0.0, 0.5, 0.3),
        ),
    ):
        expected = [normal((low + 0.25) / 0.5), *(normal(-(x + 0.25) / 0.5) for x in (high, dual))]
        np.testing.assert_allclose(rates(law, clip, t), expected, rtol=1e-9)
    assert rates(law, PositionClip(dual=None), t)[2] == 0
    assert half_and_half(law, RELEASED, t) == pytest.approx(sum(rates(law, RELEASED, t)[:2]) / 2)


def test_the_table_of_clip_rates_from_the_error_function():
    for sigma, expected in TABLE.items():
        found = columns(Gaussian(sigma, sigma**2 / 2), Gaussian(sigma, -(sigma**2) / 2), Gaussian(sigma, 0.0))
        for j, t in enumerate(AT.tolist()):
            half = sigma * math.sqrt(t) / 2
            low, high = normal(-0.025 / sigma + half), normal(-0.05 / sigma - half)
            rows = {
                "low": low,
                "high": high,
                "half": (low + high) / 2,
                "dual": (low + 2 * high) / 2,
                "no drift": (normal(-0.025 / sigma) + normal(-0.05 / sigma)) / 2,
                "pi": normal(-0.05 / sigma + half),
            }
            assert rows.keys() == expected.keys()
            for name, value in rows.items():
                assert found[name][j] == pytest.approx(value, rel=1e-9)
                assert abs(expected[name][j] - value) <= 5.01e-4


def test_near_takes_ties_either_way():
    assert near([0.1235, 0.12449], [0.123, 0.124], 1e-3)
    assert near(0.1235, 0.124, 1e-3)
    assert not near(0.1236, 0.123, 1e-3)


def test_flags_are_counted_by_sign_and_position():
    tokens = gaussian_tokens(np.random.default_rng(3), 40, 30, 0.1, 0.01)
    assert tokens.dtype == np.float32
    at = np.array([1, 7, 30])
    found = flagged(RELEASED, tokens, at)
    low, high, dual = np.zeros(3), np.zeros(3), np.zeros(3)
    for i, row in enumerate(tokens.astype(float).tolist()):
        for j, t in enumerate(at.tolist()):
            total = math.fsum(row[:t])
            if i % 2:
                high[j] += total > 0.05 * math.sqrt(t)
            else:
                low[j] += total < -0.025 * math.sqrt(t)
                dual[j] += total > 0.05 * math.sqrt(t)
    assert (found.positive, found.negative) == (20, 20)
    for a, b in ((found.low, low), (found.high, high), (found.dual, dual)):
        np.testing.assert_array_equal(a, b)


def test_scores_of_counts_are_exact_tails():
    found = Flagged(50, 80, np.array([3]), np.array([20]), np.array([0]))

    def tail(count, n, p, up):
        chosen = range(count, n + 1) if up else range(count + 1)
        return math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in chosen)

    z, limit = found.largest_z((0.1, 0.01, 0.02))
    assert limit == z_threshold(3)
    smallest = min(tail(20, 80, 0.1, True), tail(3, 50, 0.01, True), tail(0, 80, 0.02, False))
    assert normal(-z) == pytest.approx(smallest, rel=1e-9)
    # A share that meets its expectation scores nothing.
    assert Flagged(10, 10, np.array([5]), np.array([5]), np.array([5])).largest_z((0.5, 0.5, 0.5))[0] <= 0.0


def test_windows_of_a_population_follow_its_moments():
    world = independent_tokens([F(1, 3), F(2, 3)], [F(2, 3), F(1, 3)], 4).as_float()
    found = population_windows(world, calibrated)
    clip = found["calibrated"]
    kappa, spread = math.log(2) / 3, math.sqrt(8 / 9) * math.log(2)
    assert (clip.low, clip.high, clip.dual) == (0.1, 0.05, 0.02)
    np.testing.assert_allclose((clip.sigma, clip.drift), (spread, kappa), rtol=1e-12)
    assert found["centered"] == PositionClip(drift=clip.drift)
    assert (found["calibrated to 1 %"].low, found["calibrated to 1 %"].sigma) == (0.01, clip.sigma)


# Drift and variance.


def test_dyadic_worlds_have_whole_logarithms():
    worlds = list(dyadic_trees(Context(), "test", 24))
    assert {world.mdp.n_actions for world in worlds} == {2, 3}
    for world in worlds:
        paths = enumerate_trajectories(world)
        logs = log2_ratios(paths)
        for row, exact in zip(logs, paths.ratio, strict=True):
            assert all(Fraction(2) ** int(k) == r for k, r in zip(row, exact, strict=True))
    assert any((enumerate_trajectories(world).mask.sum(axis=1) < world.mdp.horizon).any() for world in worlds)
    # At least one pair of policies diverges differently in the two directions: the control can be told.
    assert any((kl_from_behavior(world) != kl_from_target(world)).any() for world in worlds)
    for table in dyadic_policies(np.random.default_rng(0), tree(3, 2), 3):
        assert (table.sum(axis=1) == 1).all()


def test_divergence_in_bits_and_in_nats():
    mdp = tree(3, 1)
    tables = [
        as_numbers([row] + [[0, 0, 0]] * 3, True) for row in ([F(1, 7), F(2, 7), F(4, 7)], [F(2, 7), F(4, 7), F(1, 7)])
    ]
    world = World(mdp, *tables)
    assert divergence(world, *tables).tolist() == [F(5, 7), 0, 0, 0]
    assert kl_from_target(world)[0] == F(4, 7)
    np.testing.assert_allclose(kl_from_behavior(world.as_float()), [5 / 7 * math.log(2), 0, 0, 0], rtol=1e-12)
    uniform = as_numbers([[F(1, 3)] * 3] + [[0] * 3] * 3, True)
    mu, reverse = tables
    assert sampled_drift(World(mdp, mu, reverse), mu)[0] == -F(5, 7)
    assert sampled_drift(World(mdp, reverse, mu), mu)[0] == F(5, 7)
    with pytest.raises(ValueError, match="must be a power of two"):
        divergence(world, uniform, tables[0])


def test_occupancy_is_that_of_sampled_and_of_enumerated_strings():
    world = bigram(np.random.default_rng(1), n_tokens=3, horizon=4, step=0.7)
    paths = enumerate_trajectories(world)
    expected = np.zeros((4, 3))
    for t in range(4):
        np.add.at(expected[t], paths.states[:, t], paths.behavior_probability)
    np.testing.assert_allclose(occupancy(world), expected, atol=1e-14)
    ended = random_chain(np.random.default_rng(2), horizon=6, end=True, tool=True)
    batch = Sampler(ended).draw(20_000, np.random.default_rng(3))
    live = np.stack([np.bincount(column, minlength=4) / 20_000 for column in batch.states.T])
    found = occupancy(ended)
    # Ended sequences are nowhere in one and at the end in the other.
    np.testing.assert_allclose(found[:, :3], live[:, :3], atol=0.025)


@pytest.mark.parametrize("name", ["decomposition", "more"])
def test_log_parts_of_random_trees(name):
    for world in dyadic_trees(Context(), name, 8):
        parts = LogParts.of(world)
        paths = parts.paths
        for i in range(len(paths.states)):
            for t in range(paths.states.shape[1]):
                s = paths.states[i, t]
                if not paths.mask[i, t]:
                    assert parts.kappa[i, t] == parts.within[i, t] == parts.logs[i, t] == 0
                    continue
                pairs = list(zip(world.behavior[s], world.target[s], strict=True))
                logs = [math.log2(p / b) for b, p in pairs]
                mean = math.fsum(float(b) * x for (b, _), x in zip(pairs, logs, strict=True))
                square = math.fsum(float(b) * x * x for (b, _), x in zip(pairs, logs, strict=True))
                assert float(parts.kappa[i, t]) == pytest.approx(-mean, abs=1e-12)
                assert float(parts.within[i, t]) == pytest.approx(square - mean**2, abs=1e-12)
        total = parts.logs.sum(axis=1)
        assert with_divergence(parts) == parts.covariance(total, total)
        weight = [float(p) for p in paths.behavior_probability]
        x, y = ([float(v) for v in column] for column in (parts.logs[:, 0], parts.kappa[:, -1]))
        means = [math.fsum(w * v for w, v in zip(weight, values, strict=True)) for values in (x, y)]
        joint = math.fsum(w * a * b for w, a, b in zip(weight, x, y, strict=True))
        found = float(parts.covariance(parts.logs[:, 0], parts.kappa[:, -1]))
        assert found == pytest.approx(joint - means[0] * means[1], abs=1e-12)


def test_variance_of_the_hot_or_cold_world():
    parts = LogParts.of(hot_or_cold(3))
    assert with_divergence(parts) == F(1)
    assert within_only(parts) == F(8, 9)
    assert total_variance(np.array([2.0, 0.0]), np.array([1.0, 3.0])) == 2.0


def test_fading_tokens_of_two_speeds():
    """V + V^2/16 = .01 t: the law is sigma sqrt(t), the variance ratio at 1000 is 10 over the summed variances."""
    numbers = _fading_tokens(Context(0, quick=True)).numbers
    summed = [8 * (math.sqrt(1 + 0.0025 * t) - 1) for t in range(1001)]
    token = [b - a for a, b in pairwise(summed)]
    # Mean 1 and variance 1/4 of the speeds; each speed moves the mean by half of its variance.
    assert summed[1000] + summed[1000] ** 2 / 16 == pytest.approx(10)
    assert numbers["variance_ratio"] == pytest.approx(10 / math.fsum(v + v * v / 16 for v in token))
    assert numbers["std_over_sqrt_t"] == pytest.approx([0.1] * 3)


def test_drift_ratio_of_a_rare_token():
    for jump, share in ((-1.0, 0.01), (0.5, 0.2)):
        other = math.log((1 - share * math.exp(jump)) / (1 - share))
        mean = share * jump + (1 - share) * other
        square = share * jump**2 + (1 - share) * other**2
        assert drift_ratio(jump, share) == pytest.approx(-mean / (square - mean**2), rel=1e-10)


def test_a_third_policy_is_found_out():
    evidence = list(check_third_policy(Context(2), sampled_drift))
    assert all(e.holds for e in evidence)
    assert set(evidence[2].numbers["flagged"]) >= {"mean_token_ratio"}


def test_sticky_worlds_offset_their_tokens():
    """The number behind the variance claim, by a sum over all strings."""
    world = sticky_hot(8)
    paths = enumerate_trajectories(world)
    logs = np.log(paths.ratio)
    probability = paths.behavior_probability

    def variance(values):
        return float(probability @ values**2 - (probability @ values) ** 2)

    assert variance(logs.sum(axis=1)) < sum(variance(logs[:, t]) for t in range(8))
