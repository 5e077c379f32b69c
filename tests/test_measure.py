"""Measurements of estimators: three engines that agree, error bars that hold, and no number without ground."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace
from fractions import Fraction
from itertools import product

import numpy as np
import oracle_worlds as oracle
import pytest
from world_strategies import KINDS, LEVELS, random_world, two_step

import ctpo
from simulations import measure as module
from simulations import toy_lm
from simulations.exact import (
    enumerate_trajectories,
    estimator_moments,
    gradient_moments,
    score_summer,
    weight_moments,
)
from simulations.mdp import World, bigram, random_chain
from simulations.measure import STUDIED, Measurement, measure
from simulations.monte_carlo import Sampler, z_threshold

F = Fraction
HALVES = (F(1, 2), F(1, 2))


def free(level: str, window: int | None = None) -> ctpo.Estimator:
    return ctpo.Estimator(level, form="unclipped", window=window, max_log_ratio=None, max_token_log_ratio=None)


ALL = {
    **{name: ctpo.ESTIMATORS[name] for name in STUDIED},
    **{f"free {level}": free(level, 2 if level == "window" else None) for level in ("token", "cumulative", "window")},
    **{f"free {level}": free(level) for level in ("cumulative_mean", "sequence_mean", "min_prefix")},
}


def row(**changes) -> Measurement:
    """An unbiased, noiseless estimator of a gradient of norm 1, with changes."""
    made = dict.fromkeys((field.name for field in fields(Measurement)), 0.0)
    made |= {"world": "w", "estimator": "e", "engine": "enumeration", "gain": 1.0, "gradient_norm": 1.0}
    return Measurement(**(made | changes))


def sampled_world() -> World:
    """A bigram model with an end of sequence, near enough to on-policy that samples tell everything."""
    return bigram(np.random.default_rng(2), n_tokens=3, horizon=6, step=0.9, eos=True)


# --- weights: moments and effective sample size ---


def plain_weights(world: World, level: str, window: int | None):
    """Mask, mean and mean square of the weight at every place of the stream, by recursion over streams."""
    plain = oracle.Plain(world)
    written, first, second = ([0] * plain.horizon for _ in range(3))
    for p0, _, moves in oracle.streams(plain):
        p = p0 * oracle.probability(plain, moves, plain.b)
        if p == 0:
            continue
        tokens = oracle.policy_tokens(plain, moves)
        ratios = [r for _, _, _, r in tokens]
        for t, (step, _, _, _) in enumerate(tokens):
            w = oracle.weight(level, ratios, t, window)
            written[step] += p
            first[step] += p * w
            second[step] += p * w * w
    return written, first, second


@pytest.mark.parametrize("kind", KINDS)
def test_weight_moments_equal_recursion(kind):
    for seed, (level, window) in enumerate(LEVELS):
        world = random_world(seed + 7, kind)
        found = weight_moments(world, level, window=window)
        written, first, second = plain_weights(world, level, window)
        assert (found.written.tolist(), found.first.tolist(), found.second.tolist()) == (written, first, second)
        shares = [a * a / c for a, c in zip(first, second, strict=True) if c]
        assert found.ess == sum(shares) / sum(written)
        if level not in ("none", "min_prefix"):
            enumerated = estimator_moments(world, free(level, window))
            assert enumerated.ess == pytest.approx(float(found.ess), rel=1e-12)


def test_effective_sample_size_by_hand():
    """Token ratios 1/2 and 3/2: E r^2 = 5/4 at both places; a window takes the weight of what it clips."""
    world = two_step((F(1, 2), F(3, 4)), {0: (F(1, 2), F(3, 4)), 1: (F(1, 2), F(3, 4))}, outcome=lambda s: s[0] - s[1])
    assert weight_moments(world, "token").ess == F(4, 5)
    assert weight_moments(world, "cumulative").ess == (F(4, 5) + F(16, 25)) / 2
    assert weight_moments(world, "sequence").ess == F(16, 25)
    assert estimator_moments(world, "reinforce").ess == 1.0
    # A = 1 everywhere, window [4/5, 6/5]: the half with ratio 3/2 gets weight 0, the other half 1/2.
    assert estimator_moments(world, "grpo", "one").ess == pytest.approx(0.5)
    # A = -1: the ratio 1/2 is cut; nothing is left where A > 0 and every ratio is above the window.
    assert estimator_moments(world, "grpo", -np.ones((7, 2))).ess == pytest.approx(0.5)


# --- what follows from the moments ---


def test_mse_and_direction_error_from_their_definitions():
    rng = np.random.default_rng(3)
    for batch in (1, 4, 50):
        gradient, mean = rng.standard_normal((2, 5))
        mean += 0.7 * gradient
        variance, size = float(rng.uniform(0.1, 3)), float(np.linalg.norm(gradient))
        made = row(
            relative_bias=float(np.linalg.norm(mean - gradient)) / size,
            gain=float(mean @ gradient) / size**2,
            total_variance=variance,
            gradient_norm=size,
        )

        def error(scale, n=batch, mean=mean, gradient=gradient, variance=variance):
            return (np.linalg.norm(scale * mean - gradient) ** 2 + scale**2 * variance / n) / np.linalg.norm(
                gradient
            ) ** 2

        assert made.relative_mse(batch) == pytest.approx(error(1.0))
        scales = np.linspace(0, 3, 30001)
        assert made.direction_error(batch) == pytest.approx(min(error(scale) for scale in scales), abs=1e-6)


def test_mse_takes_the_share_of_noise_off_and_bounds_its_error():
    noisy = row(
        relative_bias=0.5, relative_bias_error=0.3, total_variance=8.0, total_variance_error=1.0, gradient_norm=2.0
    )
    assert noisy.relative_mse(10) == pytest.approx(0.25 - 0.09 + 0.2)
    assert noisy.relative_mse_error(10) == pytest.approx(math.sqrt(4 * 0.25 * 0.09 + 2 * 0.3**4) + 1.0 / 40)
    assert row(relative_bias=0.1, relative_bias_error=0.3).relative_mse(1) == 0.0


def test_direction_error_at_its_ends():
    assert row().direction_error(1) == 0.0
    assert row(gain=0.0, relative_bias=1.0).direction_error(1) == 1.0  # no step at all
    assert row(gain=-1.0, relative_bias=2.0).direction_error(1) == 1.0  # exactly the wrong way: better none
    assert row(gain=0.2, relative_bias=0.8).direction_error(5) == pytest.approx(0.0)  # only too short
    assert math.isnan(row(total_variance=math.nan).direction_error(1))
    assert math.isnan(row(relative_bias=math.nan, gain=math.nan).relative_mse(1))
    for method in ("relative_mse", "direction_error"):
        with pytest.raises(ValueError, match="batch: must be a whole number of trajectories >= 1, got 0"):
            getattr(row(), method)(0)


# --- engines ---


@pytest.mark.parametrize("seed", range(6))
def test_enumerated_rows_equal_recursion(seed):
    world = random_world(seed + 11, KINDS[seed], ("prefix", "position", "shared")[seed % 3])
    plain = oracle.Plain(world)
    gradient = np.array(oracle.score_gradient(plain), dtype=float)
    assert gradient.any()
    outcome = seed % 2 == 1
    kind = "one" if outcome else "A_behavior"
    rows = measure(world, {level: free(level) for level in ("token", "cumulative")}, kind, outcome=outcome)
    size = np.linalg.norm(gradient)
    mean, covariance = oracle.summed_gradient(plain, "sequence", oracle.advantages(plain, kind), outcome=outcome)
    base = float(sum(covariance[i][i] for i in range(len(mean))))
    for found in rows:
        mean, covariance = oracle.summed_gradient(
            plain, found.estimator, oracle.advantages(plain, kind), outcome=outcome
        )
        mean, total = np.array(mean, dtype=float), float(sum(covariance[i][i] for i in range(len(mean))))
        assert found.engine == "enumeration"
        assert found.relative_bias == pytest.approx(np.linalg.norm(mean - gradient) / size, rel=1e-9, abs=1e-12)
        assert found.gain == pytest.approx(mean @ gradient / size**2, rel=1e-9, abs=1e-12)
        assert found.gradient_norm == pytest.approx(size)
        assert found.total_variance == pytest.approx(total, rel=1e-9, abs=1e-12)
        if base > 1e-12:
            assert found.relative_variance == pytest.approx(total / base, rel=1e-9)
        errors = [value for name, value in asdict(found).items() if name.endswith("_error")]
        assert errors == [0.0] * len(errors)


def test_engine_of_every_estimator():
    world = sampled_world()
    engines = {r.estimator: r.engine for r in measure(world, ALL, samples=2000, limit=0)}
    # No ratio of this world is above 5, the only bound of "cispo".
    products = {"reinforce", "sequence", "cispo", "lookahead", "free token", "free cumulative", "free window"}
    assert {name for name, engine in engines.items() if engine == "dynamic programming"} == products
    assert {engines[name] for name in set(ALL) - products} == {"Monte Carlo"}


def test_the_studied_estimators_are_those_that_results_were_made_with():
    assert (
        *("reinforce", "grpo", "dapo", "gspo", "cispo", "sequence"),
        *("ctpo", "ctpo_fixed", "ctpo_mean", "minpro", "lookahead"),
    ) == STUDIED
    assert set(STUDIED) < set(ctpo.ESTIMATORS)


def test_every_estimator_can_be_measured_but_those_that_look_at_a_batch():
    world = sampled_world()
    alone = {name: e for name, e in ctpo.ESTIMATORS.items() if e.region is None or e.region.scope != "batch"}
    assert set(ctpo.ESTIMATORS) - set(alone) == {"m2po"}
    new = {name: e for name, e in alone.items() if name not in STUDIED}
    for row in measure(world, new):
        assert math.isfinite(row.relative_bias)
        assert 0 <= row.clip_rate < 1
    # Dynamic programming has weights that are plain ratios only.
    engines = {r.estimator: r.engine for r in measure(world, new, samples=2000, limit=0)}
    assert set(engines.values()) == {"Monte Carlo"}
    refused = {"m2po": ctpo.ESTIMATORS["m2po"]}
    for call in (lambda: measure(world, refused), lambda: estimator_moments(world, "m2po")):
        with pytest.raises(ValueError, match=r"estimator: must look at one trajectory, not at a batch; got .*SecondMo"):
            call()


def test_a_rejected_token_counts_as_clipped():
    """Token ratios 1/2 and 3/2 with probability 1/2 each, A = 1: a region within 0.2 rejects the latter."""
    world = two_step((F(1, 2), F(3, 4)), {0: (F(1, 2), F(3, 4)), 1: (F(1, 2), F(3, 4))}, outcome=lambda s: s[0] - s[1])
    assert estimator_moments(world, "dppo_tv", "one").clip_rate == pytest.approx(0.5)
    (found,) = measure(world, {"dppo_tv": ctpo.ESTIMATORS["dppo_tv"]}, "one", samples=4000, limit=0)
    assert found.clip_rate == pytest.approx(0.5, abs=6 * found.clip_rate_error)


def test_dynamic_programming_gives_the_enumerated_rows():
    world = replace(sampled_world(), parameters="shared")
    for kind, outcome in (("A_target", False), ("A_behavior", False)):
        exact = measure(world, ALL, kind, outcome=outcome)
        again = measure(world, ALL, kind, outcome=outcome, samples=2000, limit=0)
        compared = 0
        for left, right in zip(exact, again, strict=True):
            if right.engine == "dynamic programming":
                compared += 1
                for name, value in asdict(left).items():
                    if isinstance(value, float):
                        assert getattr(right, name) == pytest.approx(value, rel=1e-9, abs=1e-12), name
        assert compared == 7


def test_a_window_that_no_token_leaves_is_none():
    behavior = np.array([[0.5, 0.5]])
    world = random_chain(np.random.default_rng(0), n_states=1, n_actions=2, horizon=4, parameters="shared")

    def engine(up: float, estimator: ctpo.Estimator) -> str:
        # Ratios up and 2 - up.
        here = World(world.mdp, behavior, np.array([[up / 2, 1 - up / 2]]), "shared")
        (found,) = measure(here, {"e": estimator}, samples=100, limit=0)
        return found.engine

    grpo = ctpo.get_estimator("grpo")
    assert engine(1.2, grpo) == engine(0.8, grpo) == "dynamic programming"  # the bound itself is kept
    assert engine(1.2 + 1e-6, grpo) == "Monte Carlo"
    one_sided = ctpo.Estimator("token", ctpo.RatioClip(0.2, 0.4))
    assert engine(1.3, one_sided) == "Monte Carlo"  # 0.7 is below
    dual = ctpo.Estimator("token", ctpo.RatioClip(0.9, 9.0, dual=1.25))
    assert engine(1.2, dual) == "dynamic programming"
    assert engine(1.3, dual) == "Monte Carlo"
    limited = ctpo.Estimator("token", form="unclipped", max_token_log_ratio=0.25)
    assert engine(1.2, limited) == "dynamic programming"
    assert engine(0.76, limited) == "Monte Carlo"  # log 0.76 = -0.27
    assert engine(1.3, ctpo.Estimator("cumulative", form="unclipped")) == "Monte Carlo"  # limits of its own
    # Weights that are no ratios.
    assert engine(1.1, ctpo.Estimator("token", ctpo.RatioClip(0.9, 9.0), "reject")) == "dynamic programming"
    assert engine(1.1, ctpo.Estimator("token", ctpo.RatioClip(0.9, 9.0), "cfpo")) == "Monte Carlo"
    topr = ctpo.Estimator("sequence", form="topr", max_log_ratio=None, max_token_log_ratio=None)
    assert engine(1.1, topr) == "Monte Carlo"


# --- Monte Carlo ---

QUANTITIES = ("gain", "total_variance", "clip_rate", "ess")


def compare(exact: list[Measurement], sampled: list[Measurement]) -> np.ndarray:
    """z of every quantity of every sampled row; a noisy vector's distance in the scale of its noise comes last."""
    z = []
    for left, right in zip(exact, sampled, strict=True):
        if right.engine != "Monte Carlo":
            continue
        for name in QUANTITIES:
            gap, error = getattr(right, name) - getattr(left, name), getattr(right, name + "_error")
            z.append(0.0 if abs(gap) < 1e-9 and error < 1e-9 else gap / error)
        # By the triangle inequality no more than the distance of the vectors.
        z.append((right.relative_bias - left.relative_bias) / max(right.relative_bias_error, 1e-12))
    return np.array(z)


@pytest.fixture(scope="module")
def both() -> list[tuple[list[Measurement], list[Measurement]]]:
    """Exact and sampled rows of all estimators, on worlds and advantages of several kinds, several seeds each."""
    worlds = [
        (sampled_world(), "A_target", False),
        (replace(sampled_world(), parameters="position"), "A_behavior", False),
        (random_world(3, "tree eos tool", "shared").as_float(), "one", True),
        (toy_lm.load_transformer_world(), "A_target", False),
    ]
    pairs = []
    for world, kind, outcome in worlds:
        exact = measure(world, ALL, kind, outcome=outcome)
        for seed in range(2):
            pairs.append((exact, measure(world, ALL, kind, outcome=outcome, samples=12_000, limit=0, seed=seed)))
    return pairs


def test_sampled_rows_agree_with_enumeration(both):
    z = np.concatenate([compare(*pair) for pair in both])
    assert len(z) > 300
    assert np.abs(z).max() < z_threshold(len(z))
    # Error bars are neither too short nor too long.
    kinds = z.reshape(-1, len(QUANTITIES) + 1)[:, :-1]
    spread = np.sqrt((kinds**2).mean(axis=0))
    assert np.all((spread > 0.5) & (spread < 1.5)), spread


def test_other_estimators_other_advantages_are_told_apart(both):
    limit = z_threshold(400)
    exact, sampled = both[0]
    by_name = {r.estimator: r for r in exact}
    wrong = [by_name[{"grpo": "ctpo_fixed", "ctpo": "grpo"}.get(r.estimator, r.estimator)] for r in exact]
    assert np.abs(compare(wrong, sampled)).max() > limit
    other = measure(sampled_world(), ALL, "A_behavior")
    assert np.abs(compare(other, sampled)).max() > limit


def test_controls_shorten_the_error_bar_and_move_nothing(monkeypatch):
    world = bigram(np.random.default_rng(1), n_tokens=3, horizon=12, step=0.6)
    some = {name: ctpo.ESTIMATORS[name] for name in ("grpo", "minpro", "gspo")}
    with_controls = measure(world, some, samples=20_000, limit=0)
    monkeypatch.setattr(module, "CONTROLS", {})
    without = measure(world, some, samples=20_000, limit=0)
    for left, right in zip(with_controls, without, strict=True):
        assert left.total_variance == pytest.approx(right.total_variance, rel=1e-12)
        assert left.relative_bias_error <= right.relative_bias_error * (1 + 1e-9)
        gap = abs(left.gain - right.gain)
        assert gap < z_threshold(3) * math.hypot(left.gain_error, right.gain_error)
    errors = {
        r.estimator: (r.relative_bias_error, s.relative_bias_error) for r, s in zip(with_controls, without, strict=True)
    }
    assert errors["grpo"][0] < errors["grpo"][1] / 5


def test_error_bars_without_controls_are_those_of_the_population(monkeypatch):
    monkeypatch.setattr(module, "CONTROLS", {})
    world, n = sampled_world(), 20_000
    (found,) = measure(world, {"minpro": ctpo.ESTIMATORS["minpro"]}, samples=n, limit=0)
    paths = enumerate_trajectories(world)
    logp, behavior_logp = paths.log_probabilities()
    advantages = paths.advantage("A_target")
    weight = ctpo.ESTIMATORS["minpro"].coefficients(logp, behavior_logp, advantages, paths.mask).weight
    covariance = paths.moments(paths.summed_scores(weight * advantages), covariance=True).covariance
    gradient, size = paths.policy_gradient, found.gradient_norm
    assert found.gain_error == pytest.approx(math.sqrt(gradient @ covariance @ gradient / n) / size**2, rel=0.03)
    assert found.relative_bias_error == pytest.approx(math.sqrt(np.trace(covariance) / n) / size, rel=0.03)


def test_what_samples_cannot_tell_is_nan_and_the_rest_is_told():
    world = random_chain(np.random.default_rng(0), n_states=6, n_actions=3, horizon=48, step=1.0)
    rows = {r.estimator: r for r in measure(world, ALL, samples=4000, limit=0)}
    heavy, light = rows["ctpo_fixed"], rows["ctpo"]
    assert heavy.engine == light.engine == "Monte Carlo"
    assert math.isnan(heavy.total_variance)
    assert math.isnan(heavy.total_variance_error)
    assert math.isnan(heavy.relative_bias)
    assert math.isnan(heavy.ess)
    assert math.isnan(heavy.relative_mse(10))
    assert 0 < heavy.clip_rate < 1
    assert light.relative_bias > 5 * light.relative_bias_error > 0
    # The yardstick is exact, however heavy its tail.
    assert rows["sequence"].relative_variance == 1.0
    assert 0 < light.relative_variance < 1e-3


def test_second_moments_beyond_float64_are_left_to_samples(monkeypatch):
    world = bigram(np.random.default_rng(1), n_tokens=3, horizon=12, step=0.4)
    monkeypatch.setattr(module, "MOST_LOG_SECOND_MOMENT", 1e-6)
    rows = measure(
        world, {name: ctpo.ESTIMATORS[name] for name in ("reinforce", "sequence", "ctpo")}, samples=4000, limit=0
    )
    assert {r.engine for r in rows} == {"Monte Carlo"}
    exact = gradient_moments(world, "none").total_variance
    assert abs(rows[0].total_variance - exact) < z_threshold(1) * rows[0].total_variance_error


def test_answers_depend_on_the_seed_and_not_on_the_processes():
    world, some = sampled_world(), {"ctpo": ctpo.ESTIMATORS["ctpo"]}
    first = measure(world, some, samples=3000, limit=0, seed=5)
    assert measure(world, some, samples=3000, limit=0, seed=5) == first
    assert measure(world, some, samples=3000, limit=0, seed=5, jobs=2) == first
    assert measure(world, some, samples=3000, limit=0, seed=6) != first


def test_a_world_without_gradient_is_refused():
    world = two_step(HALVES, {0: HALVES, 1: HALVES}, outcome=lambda _s: 1)
    with pytest.raises(ValueError, match=r"world: the true gradient of .* is 0"):
        measure(world, {"grpo": ctpo.ESTIMATORS["grpo"]})


# --- sums of scores ---


@pytest.mark.parametrize(("parameters", "room"), list(product(("prefix", "position", "shared", "network"), (0, 2**30))))
def test_summed_scores_token_by_token(parameters, room, monkeypatch):
    monkeypatch.setattr("simulations.exact.MAX_GATHERED_BYTES", room)
    if parameters == "network":
        world = toy_lm.load_transformer_world()
    else:
        world = random_world(2, "tree eos tool", parameters).as_float()
    paths = enumerate_trajectories(world)
    coefficients = np.random.default_rng(0).standard_normal(paths.states.shape)
    found = score_summer(world, paths.states, paths.actions)(coefficients)
    for n in range(0, len(found), 5):
        expected = np.zeros(found.shape[1])
        for h in range(paths.states.shape[1]):
            state, action = paths.states[n, h], paths.actions[n, h]
            if paths.mask[n, h]:
                d = world.local_scores.shape[2]
                first = d * int(world.block(h)[state])
                score = world.local_scores[state, action]
                expected[first : first + d] += coefficients[n, h] * score
        np.testing.assert_allclose(found[n], expected, atol=1e-12)


def test_sampled_sums_of_scores_do_not_depend_on_memory(monkeypatch):
    world = toy_lm.ngram(np.random.default_rng(0), order=2, n_tokens=3, horizon=9, memory=toy_lm.word_memory([0, 1], 3))
    batch = Sampler(world).draw(50, np.random.default_rng(1))
    coefficients = np.random.default_rng(2).standard_normal(batch.states.shape)
    found = score_summer(world, batch.states, batch.actions)(coefficients)
    monkeypatch.setattr("simulations.exact.MAX_GATHERED_BYTES", 0)
    np.testing.assert_allclose(score_summer(world, batch.states, batch.actions)(coefficients), found, atol=1e-12)
