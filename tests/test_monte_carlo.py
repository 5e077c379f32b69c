"""Monte Carlo against both exact engines, and whether its error bars and refusals mean what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from world_strategies import KINDS, exact_chain, examples, random_world

import ctpo
from simulations import monte_carlo
from simulations.exact import (
    enumerate_trajectories,
    estimator_moments,
    gradient_moments,
    policy_gradient,
    ratio_moments,
)
from simulations.mdp import END, World, as_numbers, chain, random_chain, sticky_hot, tree
from simulations.monte_carlo import (
    FAMILY_LEVEL,
    LEAST_EFFECTIVE_SAMPLES,
    Estimate,
    Moments,
    RatioByPosition,
    Sampler,
    SummedGradient,
    estimate,
    variance_test,
    z_scores,
    z_threshold,
)

F = Fraction


def token_world(log_variance: float, horizon: int) -> World:
    """i.i.d. coin tosses whose log rho_H has a given variance."""
    spread = math.sqrt(log_variance / horizon)  # log r is +-spread around its mean, with probability 1/2 each
    heads = 1 / (1 + math.exp(-2 * spread))
    mdp = chain("coins", np.zeros((1, 2), dtype=int), horizon=horizon, initial=0)
    return World(mdp, np.array([[0.5, 0.5]]), np.array([[1 - heads, heads]]), "shared")


@dataclass(frozen=True)
class Together:
    """Several statistics of one batch side by side."""

    parts: tuple[Any, ...]

    def __call__(self, batch):
        return np.concatenate([part(batch) for part in self.parts], axis=1)


@dataclass(frozen=True)
class FullWeight:
    """rho_H."""

    def __call__(self, batch):
        return np.exp((batch.logp - batch.behavior_logp).sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Minus:
    """The negative of a statistic: its long tail is on the other side."""

    statistic: Any

    def __call__(self, batch):
        return -self.statistic(batch)


@dataclass(frozen=True)
class Misrecorded:
    """A statistic of log-probabilities that the sampler did not use, as at another temperature."""

    statistic: Any

    def __call__(self, batch):
        return self.statistic(replace(batch, behavior_logp=1.3 * batch.behavior_logp))


# --- sampling ---


def slot_masses(accept: np.ndarray, alias: np.ndarray, width: int) -> np.ndarray:
    """Probability of every slot from its own acceptance and from those that are its alias, row by row."""
    rows = len(accept) // width
    masses = np.zeros((rows, width))
    for k in range(len(accept)):
        row, slot = divmod(k, width)
        assert 0 <= accept[k] <= 1
        other_row, other = divmod(int(alias[k]), width)
        assert other_row == row
        masses[row, slot] += accept[k] / width
        masses[row, other] += (1 - accept[k]) / width
    return masses


weights_lists = st.lists(
    st.one_of(st.just(0.0), st.floats(0.0, 1.0), st.sampled_from([1.0, 1e-12, 1e-300, 1 / 3])), min_size=1, max_size=12
)


@given(st.lists(weights_lists, min_size=1, max_size=3))
@examples(3.3)
def test_alias_tables_hold_the_distribution(rows):
    width = max(map(len, rows))
    table = np.zeros((len(rows), width))
    for k, row in enumerate(rows):
        table[k, : len(row)] = row
        if table[k].sum() < 1e-6:
            table[k, 0] = 1.0
    accept, alias = monte_carlo._alias_tables(table)
    masses = slot_masses(accept, alias, width)
    np.testing.assert_allclose(masses, table / table.sum(axis=1, keepdims=True), rtol=0, atol=1e-12)
    assert np.all(masses[table == 0] == 0)


@pytest.mark.parametrize("width", [1, 3, 64, 1000])
def test_alias_tables_of_wide_and_equal_rows(width):
    rng = np.random.default_rng(width)
    for weights in (np.ones(width), rng.random(width), rng.dirichlet(np.full(width, 0.05)), np.eye(width)[width // 2]):
        masses = slot_masses(*monte_carlo._alias_tables(weights[None]), width)
        np.testing.assert_allclose(masses[0], weights / weights.sum(), rtol=0, atol=1e-12)
        assert np.all(masses[0][weights == 0] == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_sampler_tables_hold_every_transition(kind):
    for seed in range(5):
        world = random_world(seed, kind).as_float()
        sampler = Sampler(world)
        masses = slot_masses(sampler.accept, sampler.alias, sampler.width)
        mdp = world.mdp
        found = np.zeros((mdp.n_states, mdp.n_actions, mdp.n_states))
        for s in range(mdp.n_states):
            for k in range(sampler.width):
                slot = s * sampler.width + k
                found[s, sampler.action[slot], sampler.next[slot]] += masses[s, k]
        expected = np.zeros_like(found)
        written = world.token_probabilities("behavior")
        for s, a, n, p in zip(*mdp.edges, strict=True):
            expected[s, a, n] += written[s, a] * p
        for s in np.flatnonzero(mdp.kind == END):
            expected[s, 0, s] = 1
        np.testing.assert_allclose(found, expected, atol=1e-14)
        np.testing.assert_allclose(slot_masses(sampler.start_accept, sampler.start_alias, mdp.n_states)[0], mdp.initial)


@given(st.integers(0, 1000), st.sampled_from(KINDS))
@examples(0.5)
def test_batches_are_trajectories(seed, kind):
    world = random_world(seed, kind).as_float()
    mdp = world.mdp
    batch = Sampler(world).draw(50, np.random.default_rng(seed))
    possible = {(int(s), int(a), int(n)) for s, a, n, p in zip(*mdp.edges, strict=True) if p > 0}
    for i in range(50):
        visited = [*batch.states[i], batch.final_state[i]]
        assert mdp.initial[visited[0]] > 0
        for t in range(mdp.horizon):
            s, a, n = int(visited[t]), int(batch.actions[i, t]), int(visited[t + 1])
            if mdp.kind[s] == END:
                assert (n, a) == (s, 0)
            else:
                assert (s, a, n) in possible
                assert world.token_probabilities("behavior")[s, a] > 0
            written = bool(mdp.policy_states[s])
            assert batch.mask[i, t] == written
            with np.errstate(divide="ignore"):
                assert batch.logp[i, t] == (np.log(world.target[s, a]) if written else 0)
                assert batch.behavior_logp[i, t] == (np.log(world.behavior[s, a]) if written else 0)


class Edge:
    """A generator whose every uniform number is the smallest or the largest one possible."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self, n: int) -> np.ndarray:
        return np.full(n, self.value)


@pytest.mark.parametrize("value", [0.0, np.nextafter(1.0, 0.0)])
def test_impossible_tokens_are_not_drawn_even_at_the_edge(value):
    mdp = chain("edges", np.zeros((1, 4), dtype=int), horizon=2, initial=0)
    behavior = np.array([[0.0, 0.3, 0.7, 0.0]])
    batch = Sampler(World(mdp, behavior, behavior)).draw(3, Edge(value))
    assert set(batch.actions.ravel()) <= {1, 2}


def test_the_split_of_one_uniform_number_stays_in_its_slots():
    top = np.nextafter(1.0, 0.0)
    for width in range(1, 3000):
        slot, fraction = monte_carlo._split(np.array([0.0, top]), width)
        assert slot.tolist() == [0, width - 1]
        assert 0 <= fraction.min() <= fraction.max() < 1 or width == 1


def test_trajectories_come_with_their_probabilities():
    """Chi-square of all trajectories of a world with stochastic transitions, tools and an end; and the control."""
    world = exact_chain(np.random.default_rng(2), n_states=4, horizon=3, end=True, tool=True).as_float()
    paths = enumerate_trajectories(world)
    expected = {}
    for k, p in enumerate(paths.behavior_probability):
        key = (*paths.states[k], *paths.actions[k], paths.final_state[k])
        expected[key] = expected.get(key, 0.0) + p
    n = 200_000
    batch = Sampler(world).draw(n, np.random.default_rng(0))
    keys = np.column_stack([batch.states, batch.actions, batch.final_state])
    unique, counts = np.unique(keys, axis=0, return_counts=True)
    counts = {tuple(key): count for key, count in zip(unique, counts, strict=True)}
    assert set(counts) <= {key for key, p in expected.items() if p > 0}

    def p_value(expected):
        often = [key for key, p in expected.items() if n * p >= 10]
        observed = np.array([counts.get(key, 0) for key in often] + [0])
        observed[-1] = n - observed.sum()
        wanted = n * np.array([expected[key] for key in often] + [0.0])
        wanted[-1] = n - wanted.sum()
        keep = wanted > 1e-6
        return scipy.stats.chisquare(observed[keep], wanted[keep] * observed[keep].sum() / wanted[keep].sum()).pvalue

    assert len(expected) > 50
    assert p_value(expected) > FAMILY_LEVEL
    # Negative control: the target's probabilities instead of the behavior policy's.
    wrong = dict.fromkeys(expected, 0.0)
    for k, p in enumerate(paths.target_probability):
        wrong[(*paths.states[k], *paths.actions[k], paths.final_state[k])] += p
    assert p_value(wrong) < FAMILY_LEVEL


def test_what_stands_where_no_policy_writes_does_not_matter():
    world = random_chain(np.random.default_rng(11), n_states=4, horizon=4, end=True, tool=True)
    own = world.mdp.policy_states[:, None]
    garbage = replace(
        world, behavior=np.where(own, world.behavior, np.nan), target=np.where(own, world.target, -np.inf)
    )
    a, b = (estimate(w, RatioByPosition(), n=500, seed=0) for w in (world, garbage))
    assert np.array_equal(a.mean, b.mean)


# --- streaming moments ---


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    st.sampled_from([0.0, 1.0, -1e6]),
    st.integers(0, 2**32),
)
@examples(1.7)
def test_merged_moments_are_those_of_the_whole_sample(sizes, offset, seed):
    rng = np.random.default_rng(seed)
    values = offset + rng.standard_normal((sum(sizes), 3)) ** 3
    values[:, 2] = offset  # a column without spread
    parts = np.split(values, np.cumsum(sizes)[:-1])
    merged = Moments.of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(Moments.of(part))
    exactly = [[F(x) for x in column] for column in values.T]
    for k, column in enumerate(exactly):
        mean = sum(column) / len(column)
        powers = [sum((x - mean) ** p for x in column) for p in (2, 3, 4)]
        scale = max(1e-300, float(max(abs(x - mean) for x in column)))
        assert merged.mean[k] == pytest.approx(float(mean), rel=1e-14)
        blur = 1e-15 * abs(offset) / scale + 1e-13
        for p, found, expected in zip((2, 3, 4), (merged.m2, merged.m3, merged.m4), powers, strict=True):
            size = len(column) * scale**p
            assert found[k] == pytest.approx(float(expected), rel=0, abs=20 * size * blur + 1e-300)
    assert merged.n == len(values)
    assert np.array_equal(merged.low, values.min(axis=0))
    assert np.array_equal(merged.high, values.max(axis=0))


def test_merging_without_fourth_moments():
    values = np.random.default_rng(0).standard_normal((10, 2))
    lean = Moments.of(values[:4], fourth=False).merge(Moments.of(values[4:], fourth=True))
    assert lean.m3 is None
    assert lean.m4 is None
    np.testing.assert_allclose(lean.m2, 10 * values.var(axis=0), rtol=1e-13)


def test_estimate_is_the_sample_statistics_of_its_chunks():
    """Mean, variance and both error bars against one-shot formulas on the same draws, a last chunk of 1 included."""
    world = random_chain(np.random.default_rng(1), n_states=5, horizon=4, end=True)
    statistic = Together((RatioByPosition(), Minus(FullWeight())))
    found = estimate(world, statistic, n=1001, seed=9, chunk_tokens=40)
    children = np.random.SeedSequence(9).spawn(101)
    sampler = Sampler(world)
    batches = [sampler.draw(10 if k < 100 else 1, np.random.default_rng(c)) for k, c in enumerate(children)]
    values = np.concatenate([statistic(b) for b in batches])
    assert len(values) == found.n == 1001
    np.testing.assert_allclose(found.mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.variance, values.var(axis=0, ddof=1), rtol=1e-11)
    np.testing.assert_allclose(found.standard_error, values.std(axis=0, ddof=1) / math.sqrt(1001), rtol=1e-11)
    q = (values - values.mean(axis=0)) ** 2
    np.testing.assert_allclose(found.variance_error, q.std(axis=0) / math.sqrt(1001), rtol=1e-10)
    np.testing.assert_allclose(found.variance_samples, q.sum(axis=0) ** 2 / (q**2).sum(axis=0), rtol=1e-10)
    np.testing.assert_allclose(found.largest_square, q.max(axis=0), rtol=1e-10)
    weights = np.exp(sum_log_ratios(batches))
    assert found.ess_fraction == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / 1001, rel=1e-12)
    assert found.pareto_k == pytest.approx(float(ctpo.diagnostics.pareto_k(np.log(weights))), rel=1e-12)


def sum_log_ratios(batches):
    return np.concatenate([(b.logp - b.behavior_logp).sum(axis=1) for b in batches])


# --- seeds and jobs ---


def same(a: Estimate, b: Estimate) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_answer_depends_on_the_seed_and_on_nothing_else():
    world = token_world(0.5, 4)
    options = {"n": 3000, "chunk_tokens": 2000}
    first = estimate(world, RatioByPosition(), seed=5, **options)
    assert same(first, estimate(world, RatioByPosition(), seed=5, **options))
    assert not same(first, estimate(world, RatioByPosition(), seed=6, **options))
    root = np.random.SeedSequence(5)
    for _ in range(2):  # a SeedSequence counts the children that it has spawned; the answer must not
        assert same(first, estimate(world, RatioByPosition(), seed=root, **options))
    assert root.n_children_spawned == 0
    one, two = root.spawn(2)
    assert not same(
        estimate(world, RatioByPosition(), seed=one, **options), estimate(world, RatioByPosition(), seed=two, **options)
    )
    np.random.seed(0)  # noqa: NPY002 - the global state must not matter
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    assert same(first, estimate(world, RatioByPosition(), seed=5, **options))
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002


def test_chunks_are_independent():
    """No chunk repeats another's draws."""
    world = token_world(0.5, 64)
    children = np.random.SeedSequence(3).spawn(20)
    sampler = Sampler(world)
    streams = {sampler.draw(1, np.random.default_rng(child)).actions.tobytes() for child in children}
    assert len(streams) == 20
    first = estimate(world, RatioByPosition(), n=40, seed=3, chunk_tokens=128)
    second = estimate(world, RatioByPosition(), n=20, seed=3, chunk_tokens=128)
    assert not np.array_equal(first.mean, second.mean)


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_jobs_do_not_change_the_answer(backend):
    world = token_world(0.5, 4)
    options = {"n": 5000, "seed": 1, "chunk_tokens": 4000}
    alone = estimate(world, RatioByPosition(), **options)
    assert same(alone, estimate(world, RatioByPosition(), jobs=2, backend=backend, **options))


def test_progress_counts_trajectories():
    counts: list[int] = []
    estimate(token_world(0.5, 4), RatioByPosition(), n=25, seed=1, chunk_tokens=40, progress=counts.append)
    assert counts == [10, 20, 25]


# --- agreement with the exact engines ---

NAMED = ("reinforce", "grpo", "gspo", "cispo", "ctpo", "ctpo_fixed", "minpro", "sequence")
FREE = tuple(
    ctpo.Estimator(level, form="unclipped", window=window, max_log_ratio=None, max_token_log_ratio=None)
    for level, window in (("token", None), ("cumulative", None), ("window", 2), ("lookahead", 1))
)
SAMPLES = 20_000


def sampled_worlds() -> list[World]:
    """24 worlds of every kind and parameter sharing; steps moderate, so that error bars can be believed."""
    found = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        parameters = ("prefix", "position", "shared")[seed % 3]
        found.append(
            random_chain(
                rng,
                n_states=3 + seed % 2,
                n_actions=2,
                horizon=2 + seed % 3,
                end=seed % 4 == 1,
                tool=seed % 4 == 2,
                deterministic=seed % 5 == 0,
                step=0.3,
                parameters=parameters,
            )
        )
        tree_world = random_world(seed, KINDS[seed % 4], ("position", "shared")[seed % 2]).as_float()
        halfway = (tree_world.behavior * 2 + tree_world.target) / 3
        found.append(replace(tree_world, target=halfway))
    return found


def advantage_of(k: int) -> dict[str, Any]:
    return ({"advantage": "A_target"}, {"advantage": "Q_behavior"}, {"advantage": "one", "outcome": True})[k % 3]


def estimators_of(k: int) -> tuple[ctpo.Estimator, str]:
    """One that dynamic programming knows and one of the registry: every one meets tools, ends and both at some k."""
    return FREE[(k // 2 + k % 2 + k // 8) % len(FREE)], NAMED[(k // 2 + 3 * (k % 2)) % len(NAMED)]


def exact_answers(world: World, k: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Means and variances of what `statistic_of` gives: rho_t, log rho_t and two estimators' summed gradients."""
    ratio, options = ratio_moments(world), advantage_of(k)
    means = [ratio.mean[1:], ratio.mean_log[1:]]
    variances = [ratio.variance[1:], ratio.var_log[1:]]
    free, named = estimators_of(k)
    by_levels = gradient_moments(world, free.level, window=free.window, covariance=True, **options)
    means.append(by_levels.mean)
    variances.append(np.diag(by_levels.covariance))
    paths = enumerate_trajectories(world)
    means.append(estimator_moments(world, named, trajectories=paths, **options).mean)
    advantages = paths.advantage(options["advantage"])
    if options.get("outcome"):
        advantages = advantages * world.mdp.outcome[paths.final_state][:, None]
    logp, behavior_logp = paths.log_probabilities()
    weight = ctpo.get_estimator(named).coefficients(logp, behavior_logp, advantages, paths.mask).weight
    moments = paths.moments(paths.summed_scores(weight * advantages), covariance=True)
    variances.append(np.diag(moments.covariance))
    return means, variances


def statistic_of(world: World, k: int) -> Together:
    gradients = (SummedGradient(world, estimator, **advantage_of(k)) for estimator in estimators_of(k))
    return Together((RatioByPosition(), *gradients))


@pytest.fixture(scope="module")
def family() -> list[tuple[World, Estimate, np.ndarray, np.ndarray]]:
    found = []
    for k, world in enumerate(sampled_worlds()):
        result = estimate(world, statistic_of(world, k), n=SAMPLES, seed=1000 + k)
        found.append((world, result, *map(np.concatenate, exact_answers(world, k))))
    return found


def family_threshold(family) -> float:
    """Every mean and every variance is one comparison."""
    return z_threshold(sum(2 * len(mean) for _, _, mean, _ in family))


def test_monte_carlo_means_agree_with_the_exact_engines(family):
    limit = family_threshold(family)
    assert 5 < limit < 7
    everything = np.concatenate([z_scores(result, mean) for _, result, mean, _ in family])
    assert everything.max() < limit
    # The scores are those of standard normal numbers: a test that never gets near its limit tests nothing.
    assert 0.5 < np.mean(everything[everything > 0] ** 2) < 2


def test_monte_carlo_variances_agree_with_the_exact_engines(family):
    limit = family_threshold(family)
    scores, refused = [], 0
    for _, result, _, variance in family:
        outcome = variance_test(result, variance)
        scores.append(outcome.z[~outcome.refused])
        refused += int(outcome.refused.sum())
    everything = np.concatenate(scores)
    assert everything.max() < limit
    assert len(everything) > 4 * refused
    assert np.mean(everything[everything > 0] ** 2) > 0.3


def test_controls_are_rejected_by_the_same_test(family):
    """A wrong level, advantage, score, outcome, clip or record fails at the very same threshold."""
    limit = family_threshold(family)
    rng = np.random.default_rng(77)
    world = random_chain(rng, n_states=3, n_actions=2, horizon=4, step=1.0, parameters="shared")
    free = {e.level: e for e in FREE}
    right = gradient_moments(world, "cumulative", covariance=True)
    variance = np.diag(right.covariance)

    def run(sampled: World, statistic) -> Estimate:
        return estimate(sampled, statistic, n=SAMPLES, seed=4)

    fair = run(world, SummedGradient(world, free["cumulative"]))
    assert z_scores(fair, right.mean).max() < limit
    assert np.nanmax(variance_test(fair, variance).z) < limit
    # A shift of the score by state would not show: E_pi of the advantage is 0. Leaving out the other logits does.
    own_logit_only = replace(world, scores=world.local_scores * np.eye(2))
    wrong = {
        "level": run(world, SummedGradient(world, free["token"])),
        "advantage": run(world, SummedGradient(world, free["cumulative"], "A_behavior")),
        "score": run(world, SummedGradient(own_logit_only, free["cumulative"])),
        "outcome": run(world, SummedGradient(world, free["cumulative"], outcome=True)),
        "clip": run(world, SummedGradient(world, "grpo")),
    }
    for name, result in wrong.items():
        assert z_scores(result, right.mean).max() > limit, name
    ratio = run(world, RatioByPosition())
    moments = ratio_moments(world)
    assert z_scores(ratio, np.concatenate([moments.mean[1:], moments.mean_log[1:]])).max() < limit
    misrecorded = run(world, Misrecorded(RatioByPosition()))
    assert z_scores(misrecorded, np.concatenate([moments.mean[1:], misrecorded.mean[4:]])).max() > limit
    # A simulator whose log-ratios do not drift (the variance is right, the mean is not) is no importance sampler.
    assert z_scores(ratio, np.concatenate([moments.mean[1:], np.zeros(4)])).max() > limit
    assert z_scores(ratio, np.concatenate([moments.mean[1:] * 1.05, moments.mean_log[1:]])).max() > limit
    # And for variances: the level changes those too.
    windowed = np.diag(gradient_moments(world, "window", window=2, covariance=True).covariance)
    assert np.nanmax(variance_test(fair, windowed).z) > limit


@pytest.mark.parametrize("kind", ["tree eos tool", "chain end tool"])
def test_summed_gradients_are_those_of_the_enumerated_trajectories(kind):
    """Path by path, without any statistics: every estimator, with tools and an end."""
    for k, estimator in enumerate((*NAMED, *FREE)):
        world = random_world(k + 3, kind, ("prefix", "position", "shared")[k % 3]).as_float()
        world = replace(world, target=(world.behavior + world.target) / 2)
        options = advantage_of(k)
        paths = enumerate_trajectories(world)
        advantages = paths.advantage(options["advantage"])
        if options.get("outcome"):
            advantages = advantages * world.mdp.outcome[paths.final_state][:, None]
        weight = ctpo.get_estimator(estimator).coefficients(*paths.log_probabilities(), advantages, paths.mask).weight
        summed = paths.summed_scores(weight * advantages)
        keys = np.column_stack([paths.states, paths.actions, paths.final_state])
        by_path = {tuple(key): row for key, row in zip(keys, summed, strict=True)}
        batch = Sampler(world).draw(200, np.random.default_rng(k))
        found = SummedGradient(world, estimator, **options)(batch)
        for key, row in zip(np.column_stack([batch.states, batch.actions, batch.final_state]), found, strict=True):
            np.testing.assert_allclose(row, by_path[tuple(key)], rtol=1e-12, atol=1e-13)


def test_token_and_sequence_ratios_by_position():
    world = random_chain(np.random.default_rng(5), n_states=4, horizon=3, end=True, tool=True, step=0.4)
    paths = enumerate_trajectories(world)
    for level in ("token", "sequence"):
        result = estimate(world, RatioByPosition(level), n=SAMPLES, seed=2)
        logs = np.log(paths.ratio) if level == "token" else np.repeat(np.log(paths.ratio).sum(1, keepdims=True), 3, 1)
        expected = paths.expectation(np.concatenate([np.exp(logs), logs], axis=1))
        assert z_scores(result, expected).max() < z_threshold(len(expected))
    with pytest.raises(ValueError, match=r"level: must be one of .*, got 'cumulative_mean'"):
        RatioByPosition("cumulative_mean")


def test_claim_3_sign_flip_by_simulation():
    """The prefix ratio gives +3/20, the token ratio -3/20: neither can be taken for the other."""
    mdp = tree(2, 2, outcome=lambda string: {(1, 1): 1, (0, 1): -1}.get(string, 0))
    half = as_numbers(np.ones((mdp.n_states, 2), dtype=int), True) / 2
    behavior, target = half.copy(), half.copy()
    behavior[0], target[0] = [F(4, 5), F(1, 5)], [F(1, 5), F(4, 5)]
    world = World(mdp, behavior, target, "position").as_float()
    for estimator, value in ((FREE[1], 0.15), (FREE[0], -0.15)):
        result = estimate(world, SummedGradient(world, estimator), n=SAMPLES, seed=6)
        expected = np.where([False, False, True, True], [0, 0, -value, value], result.mean)
        scores = z_scores(result, expected)[2:]
        assert scores.max() < 4
        assert abs(result.mean[3] + value) / result.standard_error[3] > 20
    assert policy_gradient(world)[3] == pytest.approx(0.15)


def test_claim_5_zero_variance_by_simulation():
    mdp = tree(2, 2, outcome=sum)
    target = as_numbers(np.tile([2, 1], (mdp.n_states, 1)), True) / 3
    behavior = target.copy()
    behavior[0], behavior[1], behavior[2] = [F(1, 2)] * 2, [F(4, 9), F(5, 9)], [F(5, 9), F(4, 9)]
    world = World(mdp, behavior, target, "shared").as_float()
    z = estimate(world, SummedGradient(world, "sequence"), n=100_000, seed=8)
    y = estimate(world, SummedGradient(world, FREE[1]), n=100_000, seed=8)
    assert z.variance.max() < 1e-20
    assert variance_test(z, np.zeros(2)).z.tolist() == [0, 0]
    assert z_scores(z, policy_gradient(world)).tolist() == [0, 0]
    assert variance_test(y, np.full(2, 16 / 3645)).z.max() < 4
    assert np.all(variance_test(z, np.full(2, 16 / 3645)).z > 100)
    assert np.all(variance_test(y, np.zeros(2)).z > 100)


def test_clipped_estimators_see_the_same_tokens_as_enumeration():
    """A clip at a bound that some ratios meet exactly must fall the same way in both engines."""
    mdp = chain("bound", np.zeros((1, 2), dtype=int), horizon=2, initial=0, reward=np.array([[0.0, 1.0]]))
    world = World(mdp, np.array([[0.5, 0.5]]), np.array([[0.4, 0.6]]), "shared")
    for estimator in ("grpo", ctpo.Estimator("cumulative", ctpo.RatioClip(0.2, 0.2))):
        result = estimate(world, SummedGradient(world, estimator), n=SAMPLES, seed=3)
        expected = estimator_moments(world, estimator)
        assert z_scores(result, expected.mean).max() < z_threshold(4)


# --- do error bars cover? ---


def covered(world: World, statistic, expected: float, column: int, of: str, replications: int, n: int) -> int:
    count = 0
    for child in np.random.SeedSequence(17).spawn(replications):
        result = estimate(world, statistic, n=n, seed=child)
        value, error = {
            "mean": (result.mean, result.standard_error),
            "variance": (result.variance, result.variance_error),
        }[of]
        count += abs(value[column] - expected) <= 1.96 * error[column]
    return count


def binomial_z(count: int, trials: int, probability: float = 0.95) -> float:
    return (count - trials * probability) / math.sqrt(trials * probability * (1 - probability))


@pytest.mark.parametrize("of", ["mean", "variance"])
def test_error_bars_cover_as_often_as_they_say(of, monkeypatch):
    """95 % intervals of E rho_2 and of Var rho_2 over 600 replications, within their own binomial error."""
    monkeypatch.setattr(ctpo.diagnostics, "pareto_k", lambda log_weights: 0.0)  # 1200 fits that nobody looks at
    world = token_world(0.1, 2)
    exact = ratio_moments(world)
    expected = {"mean": exact.mean[2], "variance": exact.variance[2]}[of]
    replications, n = 600, 2000
    count = covered(world, RatioByPosition(), expected, 1, of, replications, n)
    assert abs(binomial_z(count, replications)) < z_threshold(2)
    # Negative control: around the values of another world the same intervals do not cover.
    other = ratio_moments(token_world(0.12, 2))
    wrong = {"mean": exact.mean[2] + 0.02, "variance": other.variance[2]}[of]
    missed = covered(world, RatioByPosition(), wrong, 1, of, 100, n)
    assert abs(binomial_z(missed, 100)) > z_threshold(2)


# --- refusals ---


def test_variance_test_refuses_a_heavy_tail_and_would_have_been_wrong():
    """Var(log rho) = 9: without the refusal the true variance would be rejected with confidence."""
    world = token_world(9.0, 100)
    truth = ratio_moments(world).variance[-1:]
    assert ratio_moments(world).var_log[-1] == pytest.approx(9)
    result = estimate(world, FullWeight(), n=40_000, seed=12)
    outcome = variance_test(result, truth)
    assert outcome.refused.tolist() == [True]
    assert np.isnan(outcome.z[0])
    assert "refused for 1 of 1" in outcome.reason
    assert f"{result.variance_samples[0]:.0f} effective samples" in outcome.reason
    assert f"{LEAST_EFFECTIVE_SAMPLES} are needed" in outcome.reason
    # The control: the naive comparison is sure that the exact engine is wrong by far.
    naive = (result.variance - truth) / result.variance_error
    assert naive[0] < -z_threshold(1)
    assert result.variance[0] < 0.75 * truth[0]
    # The diagnostics beside the estimate say so as well.
    assert result.pareto_k > 0.5
    assert result.ess_fraction < 0.01


def test_variance_test_accepts_a_mild_world():
    world = token_world(0.25, 100)
    moments = ratio_moments(world)
    result = estimate(world, FullWeight(), n=40_000, seed=13)
    outcome = variance_test(result, moments.variance[-1:])
    assert not outcome.refused.any()
    assert outcome.reason == ""
    assert outcome.z[0] < z_threshold(1)
    assert result.pareto_k < 0.5
    assert result.ess_fraction == pytest.approx(moments.ess_fraction[-1], rel=0.01)
    # It has the power to reject a variance that is off by a quarter, either way, and the refusal is a choice.
    for factor in (0.75, 1.25):
        assert variance_test(result, factor * moments.variance[-1:]).z[0] > z_threshold(1)
    assert variance_test(result, moments.variance[-1:], least=math.inf).refused.all()


def estimates_by_counting(world: World, n: int, replications: int) -> list[Estimate]:
    """What `estimate` finds for rho_H of coin tosses, from the number of heads alone: cheap at any n."""
    horizon = world.mdp.horizon
    rng = np.random.default_rng(20)
    heads = np.arange(horizon + 1)
    low, high = np.log(world.ratio[0])
    rho = np.exp(heads * high + (horizon - heads) * low)
    chances = scipy.stats.binom.pmf(heads, horizon, 0.5)
    counts = rng.multinomial(n, chances / chances.sum(), size=replications)
    found = []
    for count in counts:
        mean = count @ rho / n
        square = (rho - mean) ** 2
        m2, m4 = count @ square, count @ square**2
        found.append(
            Estimate(
                n=n,
                mean=np.array([mean]),
                standard_error=np.array([math.sqrt(m2 / n / n)]),
                variance=np.array([m2 / (n - 1)]),
                variance_error=np.array([math.sqrt((m4 / n - (m2 / n) ** 2) / n)]),
                variance_samples=np.array([m2**2 / m4]),
                largest_square=np.array([square[count > 0].max()]),
                ess_fraction=1.0,
                pareto_k=0.0,
            )
        )
    return found


def test_variance_test_does_not_reject_the_truth_on_the_way_to_a_refusal():
    """Where only some samples are refused, the others are the ones whose variance and error bar are both too small."""
    world = token_world(2.5, 120)
    truth = ratio_moments(world).variance[-1:]
    limit = z_threshold(1)
    results = estimates_by_counting(world, 2_000_000, 4000)
    outcomes = [variance_test(result, truth) for result in results]
    tested = [k for k, outcome in enumerate(outcomes) if not outcome.refused[0]]
    assert 0.3 < len(tested) / len(results) < 0.95
    assert max(outcomes[k].z[0] for k in tested) < limit
    naive = [abs(results[k].variance - truth)[0] / results[k].variance_error[0] for k in tested]
    assert sum(z > limit for z in naive) >= 3  # expected in 4 of a million, seen in 2 of a thousand


def test_counted_estimates_are_those_of_the_sampler():
    world = token_world(0.5, 10)
    counted = estimates_by_counting(world, 50_000, 1)[0]
    drawn = estimate(world, FullWeight(), n=50_000, seed=3)
    gap = abs(counted.variance - drawn.variance) / np.hypot(counted.variance_error, drawn.variance_error)
    assert gap[0] < 5
    assert counted.variance_samples[0] == pytest.approx(drawn.variance_samples[0], rel=0.2)


def test_diagnostics_of_the_weights():
    same_policy = token_world(0.0, 5)
    result = estimate(same_policy, RatioByPosition(), n=1000, seed=0)
    assert result.ess_fraction == pytest.approx(1)
    assert result.pareto_k == -math.inf
    few = estimate(token_world(0.5, 30), RatioByPosition(), n=10, seed=0)
    assert math.isnan(few.pareto_k)
    assert 0 < few.ess_fraction <= 1
    by_tail = [estimate(token_world(v, 60), RatioByPosition(), n=20_000, seed=1) for v in (0.1, 2.0, 9.0)]
    assert [r.ess_fraction for r in by_tail] == sorted((r.ess_fraction for r in by_tail), reverse=True)
    assert [r.pareto_k for r in by_tail] == sorted(r.pareto_k for r in by_tail)
    # In log space: weights far below float64's range still have a sample size.
    far = estimate(token_world(2000.0, 4000), FullWeight(), n=50, seed=1)
    assert 1 / 50 <= far.ess_fraction <= 1


def test_kept_weights_are_bounded(monkeypatch):
    seen = []

    def look(log_weights):
        seen.append(len(log_weights))
        return 0.0

    monkeypatch.setattr(monte_carlo, "_KEPT_WEIGHTS", 70)
    monkeypatch.setattr(ctpo.diagnostics, "pareto_k", look)
    for n in (65, 70, 500):
        estimate(token_world(0.5, 2), RatioByPosition(), n=n, seed=0, chunk_tokens=40)
    assert seen == [65, 70, 70]


# --- thresholds and scores ---


def test_z_threshold_is_two_sided_and_corrected():
    for comparisons in (1, 40, 10_000):
        limit = z_threshold(comparisons)
        assert 2 * scipy.stats.norm.sf(limit) * comparisons == pytest.approx(FAMILY_LEVEL, rel=1e-9)
    assert z_threshold(1, 0.05) == pytest.approx(1.959964, abs=1e-6)


def made(mean, error, variance=1.0, variance_error=0.1, samples=1e4, largest=0.0) -> Estimate:
    return Estimate(100, *(np.array([x]) for x in (mean, error, variance, variance_error, samples, largest)), 1.0, 0.0)


def test_scores_of_statistics_without_spread():
    assert z_scores(made(1.0, 0.0), np.array([1.0])).tolist() == [0]
    assert z_scores(made(1.0 + 1e-12, 1e-17), np.array([1.0])).tolist() == [0]
    assert z_scores(made(1.0, 0.0), np.array([1.1])).tolist() == [math.inf]
    assert z_scores(made(1.5, 0.25), np.array([1.0])).tolist() == [2]
    assert z_scores(made(0.5, 0.25), np.array([1.0])).tolist() == [2]
    assert variance_test(made(0, 0, 0.0, 0.0, math.inf), np.array([0.0])).z.tolist() == [0]
    assert variance_test(made(0, 0, 0.0, 0.0, math.inf), np.array([0.5])).z.tolist() == [math.inf]


def test_variance_scores_allow_for_what_a_tail_may_hide_only_below_the_truth():
    small = made(0, 0, variance=1.0, variance_error=0.1, largest=50.0)
    assert variance_test(small, np.array([0.5])).z[0] == pytest.approx(5)
    assert variance_test(small, np.array([1.5])).z[0] == pytest.approx(0.5 / math.sqrt(0.01 + 0.5 * 50 / 100))
    assert variance_test(made(0, 0, largest=0.0), np.array([1.5])).z[0] == pytest.approx(5)


# --- bad input ---


def test_bad_input_is_named():
    world = token_world(0.5, 2)
    for n in (1, 0, -3, 2.5, "10", None):
        with pytest.raises(ValueError, match=f"n: must be a whole number >= 2, got {n!r}"):
            estimate(world, RatioByPosition(), n=n, seed=0)
    assert estimate(world, RatioByPosition(), n=np.int64(2), seed=0).n == 2
    with pytest.raises(ValueError, match="world: Monte Carlo needs float64 probabilities, got Fractions"):
        estimate(sticky_hot(3, exact=True), RatioByPosition(), n=10, seed=0)
    with pytest.raises(ValueError, match="result: a variance test needs an estimate made with fourth=True"):
        variance_test(estimate(world, RatioByPosition(), n=10, seed=0, fourth=False), np.zeros(4))
    with pytest.raises(ValueError, match="advantage: must be one of"):
        estimate(world, SummedGradient(world, "ctpo", "A_star"), n=10, seed=0)
    with pytest.raises(ValueError, match="estimator must be one of"):
        estimate(world, SummedGradient(world, "ppoo"), n=10, seed=0)
