"""The two exact engines against each other, against plain recursion, and on the numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import oracle_worlds as oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from world_strategies import KINDS, LEVELS, exact_chain, examples, random_world, two_step, worlds

import ctpo
from simulations import exact
from simulations.exact import (
    advantage_table,
    enumerate_trajectories,
    estimator_moments,
    exact_root,
    gradient_moments,
    objective,
    policy_gradient,
    ratio_moments,
    rational_weights,
    values,
)
from simulations.mdp import (
    END,
    POLICY,
    World,
    as_numbers,
    bigram,
    chain,
    independent_tokens,
    random_chain,
    sticky_hot,
    tree,
)

F = Fraction
PARAMETERS = ("prefix", "position", "shared")
#: Advantages and whether they multiply an outcome reward; "array" is a random table.
ADVANTAGES = (
    ("A_target", False),
    ("A_behavior", False),
    ("Q_target", False),
    ("Q_behavior", False),
    ("one", True),
    ("array", True),
)
CASES = [(level, window, *advantage) for (level, window), advantage in product(LEVELS, ADVANTAGES)]
WORLDS_PER_KIND = 36


def number_of_case(number: int, turn: int) -> int:
    """Which two cases a world tries: each comes up in turn 0, for every way of sharing parameters (`number % 3`)."""
    half = len(CASES) // 2
    return (2 * (number // 3) + turn + number // 3 // half) % len(CASES)


def random_table(world: World, seed: int) -> np.ndarray:
    """A state-action function that knows nothing of returns, different at every step."""
    shape = (world.mdp.horizon, world.mdp.n_states, world.mdp.n_actions)
    return as_numbers(np.random.default_rng(seed).integers(-3, 4, size=shape), True)


def by_enumeration(world: World, level: str, window: int | None, advantage, outcome: bool, covariance: bool = True):
    paths = enumerate_trajectories(world)
    coefficients = rational_weights(paths, level, window) * paths.advantage(advantage)
    if outcome:
        coefficients = coefficients * world.mdp.outcome[paths.final_state][:, None]
    return paths.moments(paths.summed_scores(coefficients), covariance)


def by_recursion(world: World, level: str, window: int | None, advantage, outcome: bool):
    plain = oracle.Plain(world)
    if isinstance(advantage, str):
        function = oracle.advantages(plain, advantage)
    else:

        def function(step, s, a):
            return advantage[step, s, a]

    return oracle.summed_gradient(plain, level, function, window, outcome)


# --- three ways to the moments of a summed gradient ---


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_programming_enumeration_and_recursion_agree_exactly(kind):
    """252 worlds, two estimators each: mean, total variance and (for one of them) covariance are the same Fractions."""
    stochastic = 0
    for seed in range(WORLDS_PER_KIND):
        world = random_world(seed, kind, PARAMETERS[seed % 3])
        for turn in range(2):
            number = number_of_case(seed + WORLDS_PER_KIND * KINDS.index(kind), turn)
            level, window, name, outcome = CASES[number]
            advantage = random_table(world, seed) if name == "array" else name
            fast = gradient_moments(world, level, advantage, window=window, outcome=outcome, covariance=turn == 0)
            slow = by_enumeration(world, level, window, advantage, outcome, covariance=turn == 0)
            label = f"{kind} {seed} {CASES[number]}"
            assert fast.mean.tolist() == slow.mean.tolist(), label
            assert fast.total_variance == slow.total_variance, label
            assert all(isinstance(x, Fraction) for x in [*fast.mean, fast.total_variance]), label
            stochastic += fast.total_variance > 0
            if turn == 0:
                mean, covariance = by_recursion(world, level, window, advantage, outcome)
                assert fast.covariance.tolist() == slow.covariance.tolist(), label
                assert fast.total_variance == fast.covariance.trace(), label
                assert fast.mean.tolist() == mean, label
                assert fast.covariance.tolist() == covariance, label
    assert stochastic > WORLDS_PER_KIND


def test_every_case_of_the_agreement_is_met_with_every_kind_of_parameters():
    numbers = range(WORLDS_PER_KIND * len(KINDS))
    met = {(number_of_case(number, 0), number % 3) for number in numbers}
    assert len(met) == len(CASES) * 3


def test_the_agreement_would_notice_a_wrong_level_advantage_or_score():
    """Negative control: the neighbouring estimator is another one on nearly every world."""
    differ = dict.fromkeys(("level", "window", "advantage", "outcome", "parameters", "target"), 0)
    for seed in range(12):
        world = random_world(seed + 100, "tree", "position")
        right = gradient_moments(world, "cumulative", covariance=True)
        longer = world.mdp.horizon > 1
        differ["level"] += (
            not longer or gradient_moments(world, "token", covariance=True).mean.tolist() != right.mean.tolist()
        )
        differ["window"] += (
            not longer
            or gradient_moments(world, "window", window=1).total_variance
            != gradient_moments(world, "window", window=2).total_variance
        )
        differ["advantage"] += gradient_moments(world, "cumulative", "A_behavior").mean.tolist() != right.mean.tolist()
        differ["outcome"] += gradient_moments(world, "cumulative", outcome=True).mean.tolist() != right.mean.tolist()
        shared = gradient_moments(world.with_parameters("shared"), "cumulative")
        differ["parameters"] += not longer or shared.total_variance != right.total_variance
        other = World(world.mdp, world.behavior, world.behavior, "position")
        differ["target"] += (
            gradient_moments(other, "none").mean.tolist() != gradient_moments(world, "none").mean.tolist()
        )
    assert min(differ.values()) >= 9, differ


@given(worlds(), st.sampled_from(CASES))
@examples(0.67)
def test_dynamic_programming_equals_recursion_on_any_world(world, case):
    level, window, name, outcome = case
    advantage = random_table(world, 5) if name == "array" else name
    found = gradient_moments(world, level, advantage, window=window, outcome=outcome)
    mean, covariance = by_recursion(world, level, window, advantage, outcome)
    assert found.mean.tolist() == mean
    assert found.total_variance == sum(covariance[i][i] for i in range(len(mean)))
    assert found.covariance is None


@given(st.integers(0, 10_000), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(PARAMETERS))
@examples(0.83)
def test_engines_agree_in_floating_point_on_random_chains(seed, deterministic, end, tool, parameters):
    rng = np.random.default_rng(seed)
    world = random_chain(
        rng,
        n_states=int(rng.integers(2, 4)) + tool,
        n_actions=2,
        horizon=int(rng.integers(1, 5)),
        deterministic=deterministic,
        end=end,
        tool=tool,
        step=float(rng.uniform(0.1, 1.5)),
        parameters=parameters,
    )
    for k in rng.permutation(len(CASES))[:4]:
        level, window, name, outcome = CASES[k]
        advantage = random_table(world, seed).astype(float) if name == "array" else name
        fast = gradient_moments(world, level, advantage, window=window, outcome=outcome, covariance=True)
        slow = by_enumeration(world, level, window, advantage, outcome)
        scale = np.abs(slow.covariance).max() + (slow.mean**2).sum()
        np.testing.assert_allclose(fast.mean, slow.mean, rtol=1e-10, atol=1e-12 * (1 + scale))
        np.testing.assert_allclose(fast.covariance, slow.covariance, rtol=1e-10, atol=1e-12 * (1 + scale))
        np.testing.assert_allclose(fast.total_variance, slow.total_variance, rtol=1e-10, atol=1e-12 * (1 + scale))


def test_sparse_dense_and_deterministic_transitions_agree():
    """Enough states that float worlds take the sparse route; a third successor makes it the dense one."""
    rng = np.random.default_rng(8)
    n_states, horizon = 80, 3
    sparse = np.zeros((n_states, 2, n_states))
    for s, a in product(range(n_states), range(2)):
        sparse[s, a, rng.choice(n_states, size=2, replace=False)] = (0.25, 0.75)
    dense = np.maximum(sparse, 1e-300)  # the same world, but for impossible surprises
    deterministic = rng.integers(0, n_states, size=(n_states, 2))
    reward, start = rng.standard_normal((n_states, 2)), rng.dirichlet(np.ones(n_states))
    behavior, target = rng.dirichlet(np.ones(2), size=(2, n_states))
    found = []
    for next_state in (sparse, dense, deterministic):
        mdp = chain("wide", next_state, horizon=horizon, initial=start, reward=reward)
        world = World(mdp, behavior, target, "shared")
        found.append((world, gradient_moments(world, "cumulative", covariance=True), ratio_moments(world)))
    for k in (0, 2):
        world, fast, _ = found[k]
        slow = by_enumeration(world, "cumulative", None, "A_target", False)
        np.testing.assert_allclose(fast.mean, slow.mean, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(fast.covariance, slow.covariance, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found[0][1].covariance, found[1][1].covariance, rtol=1e-10)
    np.testing.assert_allclose(found[0][2].second_moment, found[1][2].second_moment, rtol=1e-12)


def test_repeated_edges_add_up():
    """Two edges between the same states, as when two tool outcomes lead to one state."""
    rng = np.random.default_rng(3)
    world = exact_chain(rng, zeros=0.0)
    state, action, nxt, probability = world.mdp.edges
    twice = tuple(np.concatenate([x, x]) for x in (state, action, nxt, probability / 2))
    doubled = replace(world, mdp=replace(world.mdp, edges=twice))
    for one, two in ((world, doubled), (world.as_float(), doubled.as_float())):
        for level, parameters in product(("token", "sequence"), PARAMETERS):
            a, b = (gradient_moments(w.with_parameters(parameters), level, covariance=True) for w in (one, two))
            np.testing.assert_allclose(a.covariance.astype(float), b.covariance.astype(float), rtol=1e-11, atol=1e-14)
            assert float(a.total_variance) == pytest.approx(float(b.total_variance), rel=1e-11)
        np.testing.assert_allclose(policy_gradient(one).astype(float), policy_gradient(two).astype(float), rtol=1e-12)


def test_what_stands_where_no_policy_writes_does_not_matter():
    rng = np.random.default_rng(11)
    world = random_chain(rng, n_states=4, horizon=4, end=True, tool=True)
    own = world.mdp.policy_states[:, None]
    garbage = replace(
        world,
        mdp=replace(world.mdp, tool=np.where((world.mdp.kind == 1)[:, None], world.mdp.tool, np.nan)),
        behavior=np.where(own, world.behavior, np.nan),
        target=np.where(own, world.target, -np.inf),
    )
    for level, window in LEVELS:
        a = gradient_moments(world, level, window=window, covariance=True)
        b = gradient_moments(garbage, level, window=window, covariance=True)
        assert np.array_equal(a.covariance, b.covariance)
    table = advantage_table(world, "A_target")
    dirty = np.where(own, table, np.nan)
    assert gradient_moments(world, "token", dirty).total_variance == gradient_moments(world, "token").total_variance
    clean = ratio_moments(world)
    assert np.array_equal(ratio_moments(garbage).second_moment, clean.second_moment)
    assert np.array_equal(ratio_moments(garbage).var_log, clean.var_log)
    assert np.array_equal(policy_gradient(garbage), policy_gradient(world))
    assert estimator_moments(garbage, "ctpo").total_variance == estimator_moments(world, "ctpo").total_variance


# --- values, gradient, enumeration ---


@given(worlds())
@examples(0.67)
def test_values_objective_and_gradient_equal_recursion(world):
    plain = oracle.Plain(world)
    for who, policy in (("target", plain.pi), ("behavior", plain.b)):
        assert objective(world, who) == oracle.objective(plain, policy)
        table = values(world, who)
        q = oracle.advantages(plain, f"Q_{who}")
        a = oracle.advantages(plain, f"A_{who}")
        steps, states = range(plain.horizon), range(plain.n_states)
        for step, s, token in product(steps, states, range(plain.n_actions)):
            if plain.kind[s] == POLICY and (plain.parameters == "shared" or step == 0 or world.mdp.initial[s] == 0):
                assert table.q[step, s, token] == q(step, s, token)
                assert table.advantage[step, s, token] == a(step, s, token)
    gradient = policy_gradient(world)
    assert gradient.tolist() == oracle.score_gradient(plain)
    assert np.abs(gradient.astype(float) - oracle.difference_gradient(plain)).max() < 1e-7


@given(worlds())
@examples(0.67)
def test_trajectories_are_all_there_with_their_probabilities(world):
    paths = enumerate_trajectories(world)
    plain = oracle.Plain(world)
    expected = {}
    for p0, last, moves in oracle.streams(plain):
        either = [p0 * oracle.probability(plain, moves, policy) for policy in (plain.b, plain.pi)]
        if any(either):
            states = (*(s for _, s, _, _, _ in moves), last)
            key = (states, tuple(a for _, _, a, _, _ in moves))
            expected[key] = (*either, oracle.earned(plain, last, moves))
    found = {}
    for n in range(len(paths.states)):
        length = int(paths.live[n].sum())
        assert paths.live[n, :length].all()
        assert (world.mdp.kind[paths.states[n, length:]] == END).all()
        key = (
            (*map(int, paths.states[n, :length]), int(paths.final_state[n])),
            tuple(map(int, paths.actions[n, :length])),
        )
        found[key] = (paths.behavior_probability[n], paths.target_probability[n], paths.returns[n])
    assert found == expected
    assert paths.behavior_probability.sum() == 1
    assert paths.expectation(paths.returns, "target") == oracle.objective(plain, plain.pi)
    # Log-probabilities are what a trainer would record.
    logp, behavior_logp = paths.log_probabilities()
    assert np.all(logp[~paths.mask] == 0)
    assert np.all(behavior_logp[~paths.mask] == 0)
    np.testing.assert_allclose(
        np.exp(logp.sum(axis=1)) * paths.environment.astype(float), paths.target_probability.astype(float), atol=1e-15
    )


@given(worlds(), st.sampled_from([*LEVELS, ("min_prefix", None)]))
@examples(0.67)
def test_rational_weights_equal_recursion_and_the_core(world, choice):
    """The same weights three ways: multiplication, the oracle's slices, and the logarithms of `ctpo.log_ratio`."""
    level, window = choice
    paths = enumerate_trajectories(world)
    weights = rational_weights(paths, level, window)
    logp, behavior_logp = paths.log_probabilities()
    if level != "none":
        sampled = paths.mask & (paths.behavior_probability > 0)[:, None]
        found = ctpo.log_ratio(logp, behavior_logp, sampled, level=level, window=window)
        np.testing.assert_allclose(
            np.exp(np.where(sampled, found, -np.inf)),
            np.where(sampled, weights, 0).astype(float),
            rtol=1e-12,
            atol=1e-300,
        )
    for n in range(0, len(weights), 7):
        own = np.flatnonzero(paths.mask[n])
        ratios = [paths.ratio[n, k] for k in own]
        expected = [oracle.weight(level, ratios, t, window) for t in range(len(own))]
        assert [weights[n, k] for k in own] == expected
        assert all(weights[n, k] == 0 for k in np.flatnonzero(~paths.mask[n]))


@pytest.mark.parametrize("kind", ["tree eos tool", "chain end tool"])
def test_roots_count_the_tokens_of_the_policy(kind):
    """Length-normalized levels, in floats: a gap or an end shortens the string."""
    for seed in range(6):
        paths = enumerate_trajectories(random_world(seed, kind).as_float())
        sampled = paths.mask & (paths.behavior_probability > 0)[:, None]
        for level in ("sequence_mean", "cumulative_mean"):
            weights = np.where(sampled, rational_weights(paths, level), 0)
            found = ctpo.log_ratio(*paths.log_probabilities(), sampled, level=level)
            np.testing.assert_allclose(np.exp(np.where(sampled, found, -np.inf)), weights, rtol=1e-12, atol=1e-300)


def test_enumeration_counts_before_it_builds():
    wide = bigram(np.random.default_rng(0), n_tokens=50, horizon=8192)
    with pytest.raises(ValueError, match=r"horizon: 8192 tokens .* make more than 200000 trajectories"):
        enumerate_trajectories(wide)
    world = random_world(1, "tree")
    count = len(enumerate_trajectories(world).states)
    assert len(enumerate_trajectories(world, limit=count).states) == count
    with pytest.raises(ValueError, match=f"more than {count - 1} trajectories"):
        enumerate_trajectories(world, limit=count - 1)


@pytest.mark.parametrize(
    ("value", "degree"),
    [(F(16, 81), 4), (F(0), 3), (F(1), 9), (F(7), 1), (F(10**40, 3**40), 2), (F((10**20 + 39) ** 3, 7**300), 3)],
)
def test_exact_root_is_exact_however_large(value, degree):
    root = exact_root(value, degree)
    assert isinstance(root, Fraction)
    assert root**degree == value


@pytest.mark.parametrize(("value", "degree"), [(F(2), 2), (F(1, 8), 2), (F((10**20 + 39) ** 3 + 1), 3)])
def test_exact_root_refuses_irrational_ones(value, degree):
    with pytest.raises(ValueError, match=f"no whole root of degree {degree}"):
        exact_root(value, degree)


def test_exact_root_of_floats_is_the_power():
    assert exact_root(0.81, 2) == pytest.approx(0.9, rel=1e-15)


# --- moments of the ratio ---


def check_ratio_moments(world: World) -> None:
    found, expected = ratio_moments(world), oracle.ratio_moments(oracle.Plain(world))
    assert found.mean.tolist() == expected["mean"]
    assert found.second_moment.tolist() == expected["second"]
    assert found.chi2_marginal.tolist() == expected["marginal"]
    assert found.chi2_tilted.tolist() == expected["tilted"]
    floating = ratio_moments(world.as_float())
    np.testing.assert_allclose(floating.mean, found.mean.astype(float), rtol=1e-13)
    np.testing.assert_allclose(floating.second_moment, found.second_moment.astype(float), rtol=1e-13)
    np.testing.assert_allclose(floating.chi2_marginal, found.chi2_marginal.astype(float), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(floating.chi2_tilted, found.chi2_tilted.astype(float), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(floating.mean_log, expected["mean_log"], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(floating.var_log, expected["var_log"], rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(floating.log_second_moment, np.log(found.second_moment.astype(float)), atol=1e-13)
    assert found.mean_log is None
    assert found.var_log is None
    assert found.log_second_moment is None


@given(worlds())
@examples(1)
def test_ratio_moments_equal_recursion(world):
    check_ratio_moments(world)


@given(worlds())
@examples(1)
def test_ratio_is_a_martingale_whose_second_moment_is_the_tilted_product(world):
    found = ratio_moments(world)
    assert found.mean.tolist() == [1] * (world.mdp.horizon + 1)
    product_so_far = F(1)
    for t, chi2 in enumerate(found.chi2_tilted, start=1):
        product_so_far *= 1 + chi2
        assert found.second_moment[t] == product_so_far
    assert all(a <= b for a, b in zip(found.variance, found.variance[1:], strict=False))
    assert all(a >= b for a, b in zip(found.ess_fraction, found.ess_fraction[1:], strict=False))
    assert found.ess_fraction[-1] == 1 / found.second_moment[-1]


def test_ratio_moments_without_absolute_continuity():
    # b never writes token 1: rho counts the mass of pi that b can reach.
    never = two_step((F(0), F(1, 2)), {0: (F(0), F(1, 2)), 1: (F(1, 2), F(1, 2))}, require_support=False)
    assert ratio_moments(never).mean.tolist() == [1, F(1, 2), F(1, 4)]
    assert ratio_moments(never).second_moment.tolist() == [1, F(1, 4), F(1, 16)]
    assert ratio_moments(never).ess_fraction.tolist() == [1, 1, 1]  # of the weights as they are, not of their mean 1
    # The order of the variances breaks too: theory.md, claim 1.
    broken = two_step((F(1, 2), F(3, 4)), {0: (F(1), F(1, 2)), 1: (F(1), F(1, 2))}, require_support=False)
    assert ratio_moments(broken).variance.tolist() == [0, F(1, 4), F(1, 16)]
    # Nothing in common: every moment falls to 0 and stays there.
    disjoint = two_step((F(0), F(1)), {0: (F(1, 2), F(1, 2)), 1: (F(1, 2), F(1, 2))}, require_support=False)
    assert ratio_moments(disjoint).second_moment.tolist() == [1, 0, 0]
    found = ratio_moments(disjoint.as_float())
    assert found.second_moment.tolist() == [1, 0, 0]
    assert found.log_second_moment.tolist() == [0, -math.inf, -math.inf]
    assert found.chi2_tilted.tolist() == [-1, 0]
    for world in (never, broken):
        check_means_without_logarithms(world)


def check_means_without_logarithms(world: World) -> None:
    found, expected = ratio_moments(world), oracle.ratio_moments(oracle.Plain(world))
    assert found.mean.tolist() == expected["mean"]
    assert found.second_moment.tolist() == expected["second"]
    assert found.chi2_marginal.tolist() == expected["marginal"]


def test_logarithms_are_refused_from_the_token_on_that_the_target_never_writes():
    world = two_step((F(1, 2), F(1, 4)), {0: (F(1, 2), F(0)), 1: (F(1, 2), F(1, 2))})
    found = ratio_moments(world.as_float())
    assert np.isfinite(found.mean_log).tolist() == [True, True, False]
    assert np.isnan(found.var_log).tolist() == [False, False, True]
    half = 0.5 * (math.log(0.5) + math.log(1.5))
    assert found.mean_log[1] == pytest.approx(half, rel=1e-14)
    assert found.second_moment[2] == pytest.approx(float(ratio_moments(world).second_moment[2]), rel=1e-14)
    # A state that the behavior policy cannot reach does not count.
    mdp = chain("island", np.array([[0, 0], [1, 1]]), horizon=3, initial=0)
    island = World(mdp, np.full((2, 2), 0.5), np.array([[0.25, 0.75], [0.0, 1.0]]))
    assert np.all(np.isfinite(ratio_moments(island).var_log))


@pytest.mark.parametrize(
    ("behavior", "target"),
    [
        ([0.2, 0.3, 0.5], [0.25, 0.15, 0.6]),
        # A token that b hardly ever writes: the drift at the end is 10^4, squared 10^8 times the variance.
        ([0.5 - 1e-6, 0.5, 1e-6], [0.05, 0.05, 0.9]),
    ],
)
def test_log_moments_keep_their_digits_over_a_long_horizon(behavior, target):
    """i.i.d. tokens: E log rho_t = t m and Var = t v, however far the mean has drifted."""
    horizon = 4096
    mdp = chain("i.i.d.", np.zeros((1, 3), dtype=int), horizon=horizon, initial=0)
    found = ratio_moments(World(mdp, np.array([behavior]), np.array([target])))
    logs = [math.log(p / b) for p, b in zip(target, behavior, strict=True)]
    mean = math.fsum(b * x for b, x in zip(behavior, logs, strict=True))
    variance = math.fsum(b * (x - mean) ** 2 for b, x in zip(behavior, logs, strict=True))
    log_growth = math.log(math.fsum(p * p / b for p, b in zip(target, behavior, strict=True)))
    t = np.arange(horizon + 1)
    np.testing.assert_allclose(found.mean_log, t * mean, rtol=1e-10, atol=0)
    np.testing.assert_allclose(found.var_log, t * variance, rtol=1e-10, atol=0)
    np.testing.assert_allclose(found.log_second_moment, t * log_growth, rtol=1e-10, atol=0)
    np.testing.assert_allclose(found.mean, 1, rtol=1e-11)


def test_log_moments_keep_their_digits_with_states_tools_and_an_end():
    """Against two copies of the recursion in which nothing is centred, in Fractions of dyadic logarithms."""
    # log2 r is +-1 in one state and 0 in the other: moments are rational.
    kind = np.array([0, 0, 1, END])
    third = F(1, 3)
    next_state = [
        [[F(1, 2), F(1, 4), F(1, 8), F(1, 8)]] * 2,
        [[F(1, 4), F(1, 2), F(1, 4), F(0)]] * 2,
        [[third, third, third, F(0)]] * 2,
        [[F(0)] * 4] * 2,
    ]
    horizon = 300
    mdp = chain(
        "dyadic", np.array(next_state, dtype=object), horizon=horizon, initial=0, kind=kind, tool=F(1, 2), exact=True
    )
    behavior = as_numbers([[third, 2 * third], [F(1, 2), F(1, 2)], [0, 1], [0, 1]], True)
    target = as_numbers([[2 * third, third], [F(1, 2), F(1, 2)], [0, 1], [0, 1]], True)
    world = World(mdp, behavior, target)
    # mass, first and second moment of log2 rho by state
    mass, first, second = [[1, 0, 0, 0], [0.0] * 4, [0.0] * 4]
    mass, first, second = ([F(x) for x in row] for row in (mass, first, second))
    means, variances = [], []
    for _ in range(horizon):
        new = [[F(0)] * 4 for _ in range(3)]
        for s in range(3):
            for a in range(2):
                jump = (1 if a == 0 else -1) if s == 0 else 0
                chosen = F(1, 2) if s == 2 else behavior[s][a]
                for s2 in range(4):
                    p = chosen * F(next_state[s][a][s2])
                    new[0][s2] += p * mass[s]
                    new[1][s2] += p * (first[s] + jump * mass[s])
                    new[2][s2] += p * (second[s] + 2 * jump * first[s] + jump * jump * mass[s])
        for moment, old in zip(new, (mass, first, second), strict=True):
            moment[3] += old[3]
        mass, first, second = ([F(x).limit_denominator(10**40) for x in row] for row in new)
        means.append(float(sum(first)) * math.log(2))
        variances.append(float(sum(second) - sum(first) ** 2) * math.log(2) ** 2)
    found = ratio_moments(world.as_float())
    np.testing.assert_allclose(found.mean_log[1:], means, rtol=1e-11)
    np.testing.assert_allclose(found.var_log[1:], variances, rtol=1e-11)


def test_second_moment_beyond_float64_is_there_in_logarithms():
    mdp = chain("i.i.d.", np.zeros((1, 2), dtype=int), horizon=4096, initial=0)
    world = World(mdp, np.array([[0.5, 0.5]]), np.array([[0.1, 0.9]]), "shared")
    found = ratio_moments(world)
    growth = math.log(2 * (0.01 + 0.81))
    assert found.log_second_moment[-1] == pytest.approx(4096 * growth, rel=1e-12)
    assert found.log_second_moment[-1] > 710
    assert found.second_moment[-1] == math.inf
    assert found.variance[-1] == math.inf
    assert found.ess_fraction[-1] == 0
    with pytest.raises(ValueError, match=r"level: the second moment at level 'sequence' over 4096 tokens"):
        gradient_moments(world, "sequence", np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"level: the second moment at level 'cumulative' over 4096 tokens"):
        gradient_moments(world, "cumulative", np.ones((1, 2)))
    assert math.isfinite(gradient_moments(world, "token", np.ones((1, 2))).total_variance)


# --- estimators of ctpo by enumeration ---


def hand_weight(name: str, r: list[float], t: int, advantage: float) -> tuple[float, bool]:
    """Weight and whether the window cut it, from the published formulas; t from 0."""
    if name == "reinforce":
        return 1.0, False
    if name == "sequence":
        return math.prod(r), False
    if name == "cispo":
        return min(r[t], 5.0), r[t] > 5.0
    if name == "ctpo":
        x, root = sum(map(math.log, r[: t + 1])), math.sqrt(t + 1)
        cut = (advantage > 0 and x > 0.05 * root) or (advantage < 0 and (x < -0.025 * root or x > 0.05 * root))
        return 0.0 if cut else math.exp(x), cut
    ratio, low, high = {
        "grpo": lambda: (r[t], 0.8, 1.2),
        "gspo": lambda: (math.prod(r) ** (1 / len(r)), 1 - 3e-4, 1 + 4e-4),
        "ctpo_fixed": lambda: (math.prod(r[: t + 1]), 0.5, 5.0),
        "minpro": lambda: (r[t] * min(r[:t], default=1.0), 0.8, 1.2),
    }[name]()
    cut = (advantage > 0 and ratio > high) or (advantage < 0 and ratio < low)
    return 0.0 if cut else ratio, cut


@pytest.mark.parametrize("name", ["reinforce", "grpo", "gspo", "cispo", "ctpo", "ctpo_fixed", "minpro", "sequence"])
def test_estimators_equal_recursion_with_the_published_formulas(name):
    cut_somewhere = False
    for seed in range(6):
        world = random_world(seed + 40, KINDS[seed], PARAMETERS[seed % 3]).as_float()
        outcome = seed % 2 == 1
        kind = "one" if outcome else "A_target"
        plain = oracle.Plain(world)
        advantage = oracle.advantages(plain, kind)
        mean, second, clipped, tokens_written = np.zeros(plain.dimension), 0.0, 0.0, 0.0
        for p0, last, moves in oracle.streams(plain):
            p = p0 * oracle.probability(plain, moves, plain.b)
            if p == 0:
                continue
            tokens = oracle.policy_tokens(plain, moves)
            total = np.zeros(plain.dimension)
            for t, (step, s, a, _) in enumerate(tokens):
                value = advantage(step, s, a) * (plain.outcome[last] if outcome else 1.0)
                ratios = [float(r) for _, _, _, r in tokens]
                if min(ratios) == 0.0:
                    ratios = [max(r, 1e-300) for r in ratios]
                weight, cut = hand_weight(name, ratios, t, value)
                total += weight * value * np.array(plain.score(step, s, a), dtype=float)
                clipped += p * cut
            tokens_written += p * len(tokens)
            mean += p * total
            second += p * float(total @ total)
        found = estimator_moments(world, name, kind, outcome=outcome)
        np.testing.assert_allclose(found.mean, mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.bias, mean - np.array(oracle.score_gradient(plain)), rtol=1e-9, atol=1e-11)
        assert found.total_variance == pytest.approx(second - float(mean @ mean), rel=1e-9, abs=1e-11)
        assert found.clip_rate == pytest.approx(clipped / tokens_written, rel=1e-12, abs=1e-15)
        cut_somewhere |= clipped > 0
    assert cut_somewhere == (name not in ("reinforce", "sequence", "cispo"))


def test_estimators_where_the_behavior_policy_has_no_mass():
    """Strings that only the target writes have no probability, no weight, and a log-probability of -inf."""
    halves = (F(1, 2), F(1, 2))
    after = {0: (F(0), F(1, 2)), 1: halves}
    world = two_step((F(1, 2), F(1, 4)), after, outcome=lambda string: 3 * string[0] - string[1], require_support=False)
    gradient = np.array(oracle.score_gradient(oracle.Plain(world))).astype(float)
    for name, level in (("sequence", "sequence"), ("reinforce", "none")):
        mean, covariance = by_recursion(world, level, None, "A_target", False)
        found = estimator_moments(world, name)
        np.testing.assert_allclose(found.mean, np.array(mean).astype(float), rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(found.bias, np.array(mean).astype(float) - gradient, rtol=1e-12, atol=1e-15)
        assert found.total_variance == pytest.approx(float(sum(covariance[i][i] for i in range(len(mean)))), rel=1e-12)
    assert np.abs(estimator_moments(world, "sequence").bias).max() > 0.01


def test_unclipped_estimators_equal_dynamic_programming():
    for seed in range(4):
        world = random_world(seed + 70, "tree eos tool", "shared")
        for level, window in LEVELS[1:]:
            free = ctpo.Estimator(level, form="unclipped", window=window, max_log_ratio=None, max_token_log_ratio=None)
            found = estimator_moments(world, free, "A_behavior")
            expected = gradient_moments(world, level, "A_behavior", window=window)
            np.testing.assert_allclose(found.mean, expected.mean.astype(float), rtol=1e-10, atol=1e-12)
            assert found.total_variance == pytest.approx(float(expected.total_variance), rel=1e-10, abs=1e-12)
            assert found.clip_rate == 0


def test_trajectories_can_be_used_again_but_only_in_their_world():
    world = random_world(3, "tree").as_float()
    paths = enumerate_trajectories(world)
    again = estimator_moments(world, "grpo", trajectories=paths)
    assert again.total_variance == estimator_moments(world, "grpo").total_variance
    with pytest.raises(ValueError, match="trajectories: must be those of this very world"):
        estimator_moments(random_world(4, "tree").as_float(), "grpo", trajectories=paths)


# --- numbers worked out by hand ---


def test_claim_3_table():
    world = independent_tokens([F(4, 5), F(1, 5)], [F(1, 5), F(4, 5)], 2, outcome=lambda string: string[0] * string[1])
    assert policy_gradient(world).tolist() == [F(-32, 125), F(32, 125)]
    table = {
        "cumulative": (F(32, 125), F(20, 125)),
        "token": (F(20, 125), F(8, 125)),
        "sequence": (F(32, 125), F(32, 125)),
        "sequence_mean": (F(884, 3125), F(8, 125)),
        "cumulative_mean": (F(148, 625), F(8, 125)),
        "none": (F(13, 25), F(2, 125)),
    }
    paths = enumerate_trajectories(world)
    for level, (with_advantage, with_outcome) in table.items():
        weights = rational_weights(paths, level)
        for advantages, expected in (
            (paths.advantage("A_target"), with_advantage),
            (paths.advantage("one") * paths.returns[:, None], with_outcome),
        ):
            assert paths.expectation(paths.summed_scores(weights * advantages))[1] == expected, level
        if not level.endswith("_mean"):
            assert gradient_moments(world, level).mean[1] == with_advantage
            assert gradient_moments(world, level, "one", outcome=True).mean[1] == with_outcome
    # GSPO: Z = 16/25 and the tilted distribution is uniform.
    geometric = rational_weights(paths, "sequence_mean")[:, 0] * paths.behavior_probability
    assert geometric.sum() == F(16, 25)
    assert (geometric / geometric.sum()).tolist() == [F(1, 4)] * 4


def test_claim_3_sign_flip():
    mdp = tree(2, 2, outcome=lambda string: {(1, 1): 1, (0, 1): -1}.get(string, 0))
    half = as_numbers(np.ones((mdp.n_states, 2), dtype=int), True) / 2
    behavior, target = half.copy(), half.copy()
    behavior[0], target[0] = [F(4, 5), F(1, 5)], [F(1, 5), F(4, 5)]
    world = World(mdp, behavior, target, "position")
    paths = enumerate_trajectories(world)
    assert policy_gradient(world)[3] == F(3, 20)
    for level, expected in (
        ("cumulative", F(3, 20)),
        ("token", F(-3, 20)),
        ("sequence_mean", 0),
        ("cumulative_mean", 0),
    ):
        weights = rational_weights(paths, level) if not level.endswith("_mean") else roots_at_second_token(paths, level)
        assert paths.expectation(paths.summed_scores(weights * paths.advantage("A_target")))[3] == expected


def roots_at_second_token(paths, level):
    """Both roots of the second token's rho_2 in {1/4, 4} are rational; the first token has another logit."""
    weights = rational_weights(paths, "cumulative").copy()
    weights[:, 0] = 0
    for n in range(len(weights)):
        weights[n, 1] = exact_root(weights[n, 1], 2)
    return weights


def test_claim_5_full_sequence_variance_can_vanish():
    mdp = tree(2, 2, outcome=lambda string: sum(string))
    third = as_numbers(np.tile([2, 1], (mdp.n_states, 1)), True) / 3
    behavior = third.copy()
    behavior[0] = [F(1, 2), F(1, 2)]
    behavior[1], behavior[2] = [F(4, 9), F(5, 9)], [F(5, 9), F(4, 9)]
    shared = World(mdp, behavior, third, "shared")
    for moments in (
        gradient_moments(shared, "cumulative", covariance=True),
        by_enumeration(shared, "cumulative", None, "A_target", False),
    ):
        assert moments.covariance[1, 1] == F(16, 3645)
        assert moments.total_variance == 2 * F(16, 3645)  # the two logits of a binary softmax move against each other
    assert gradient_moments(shared, "sequence").total_variance == 0
    assert by_enumeration(shared, "sequence", None, "A_target", False).total_variance == 0
    # With a logit per position the trace is ordered, but not the direction (1, 1).
    position = shared.with_parameters("position")
    prefix_weights = gradient_moments(position, "cumulative", covariance=True)
    sequence_weights = gradient_moments(position, "sequence", covariance=True)
    assert prefix_weights.total_variance <= sequence_weights.total_variance
    terms = [(F(4, 729), F(4, 405)), (F(4, 405), F(4, 405))]
    for k, (prefix, sequence) in zip((1, 3), terms, strict=True):
        assert (prefix_weights.covariance[k, k], sequence_weights.covariance[k, k]) == (prefix, sequence)
    both = np.ix_([1, 3], [1, 3])
    assert prefix_weights.covariance[both].sum() == F(16, 3645)
    assert sequence_weights.covariance[both].sum() == 0


def test_claim_5_binary_reward_in_one_family():
    world = independent_tokens([F(4, 5), F(1, 5)], [F(3, 5), F(2, 5)], 2, outcome=lambda string: int(string == (1, 0)))
    assert policy_gradient(world)[1] == F(6, 125)
    assert gradient_moments(world, "cumulative", covariance=True).covariance[1, 1] == F(756, 15625)
    assert gradient_moments(world, "sequence", covariance=True).covariance[1, 1] == F(54, 3125)
    position = world.with_parameters("position")
    for level, expected in (("cumulative", (324, 1296)), ("sequence", (486, 1296))):
        covariance = gradient_moments(position, level, covariance=True).covariance
        assert (covariance[1, 1], covariance[3, 3]) == tuple(F(x, 15625) for x in expected)


def test_claim_2_two_step_cases():
    half, up = (F(1, 2), F(1, 2)), (F(1, 2), F(3, 4))
    for after, true, by_product in (
        ({0: up, 1: up}, F(9, 16), F(9, 16)),
        ({0: half, 1: up}, F(17, 32), F(13, 32)),
        ({0: up, 1: half}, F(9, 32), F(13, 32)),
        ({0: up, 1: (F(4, 5), F(3, 5))}, None, None),
    ):
        world = two_step(up, after)
        found = ratio_moments(world)
        assert found.variance[1] == F(1, 4)
        if true is not None:
            assert found.variance[2] == true
            assert (1 + found.chi2_marginal).prod() - 1 == by_product
        paths = enumerate_trajectories(world)
        assert paths.expectation(paths.ratio[:, 0] * paths.ratio[:, 1]) == 1  # uncorrelated, always
    # Dependent tokens of equal chi2: the product is right.
    equal = two_step(up, {0: up, 1: (F(1, 5), F(2, 5))})
    assert ratio_moments(equal).chi2_marginal.tolist() == [F(1, 4), F(1, 4)]
    assert ratio_moments(equal).variance[2] == F(9, 16)


def test_claim_2_sticky_hot_state():
    found = ratio_moments(sticky_hot(200))
    ratio = np.exp(found.log_second_moment[1:] - np.cumsum(np.log1p(found.chi2_marginal)))
    for t, expected in ((10, 1.18), (50, 5.9), (100, 47.7), (200, 3093)):
        assert ratio[t - 1] == pytest.approx(expected, rel=0.005)
    np.testing.assert_allclose(found.chi2_marginal, [0] + [0.045] * 199, rtol=1e-12, atol=1e-15)
    growth = np.diff(found.log_second_moment)[-1]
    matrix = [[0.99**2 / 0.9, 0.01**2 / 0.1], [0.1, 0.9]]
    assert math.exp(growth) == pytest.approx(max(np.linalg.eigvals(matrix)), rel=1e-9)
    assert math.exp(growth) == pytest.approx(1.0895, abs=5e-5)
    exactly = ratio_moments(sticky_hot(12, exact=True))
    assert exactly.chi2_marginal.tolist() == [0] + [F(9, 200)] * 11
    np.testing.assert_allclose(exactly.second_moment.astype(float), found.second_moment[:13], rtol=1e-13)


def test_claim_2_ratio_of_variances_and_claim_8_sample_size():
    mdp = chain("d = 1/4", np.zeros((1, 2), dtype=int), horizon=5, initial=0, exact=True)
    world = World(mdp, as_numbers([[F(1, 2), F(1, 2)]], True), as_numbers([[F(1, 4), F(3, 4)]], True))
    found = ratio_moments(world)
    assert [found.variance[5] / v for v in found.variance[1:]] == [
        F(2101, 256),
        F(2101, 576),
        F(2101, 976),
        F(2101, 1476),
        1,
    ]
    assert found.ess_fraction.tolist() == [1, F(4, 5), F(16, 25), F(64, 125), F(256, 625), F(1024, 3125)]


def test_claim_1_examples():
    iid = two_step((F(1, 2), F(3, 4)), {0: (F(1, 2), F(3, 4)), 1: (F(1, 2), F(3, 4))})
    assert ratio_moments(iid).variance.tolist() == [0, F(1, 4), F(9, 16)]
    # Policies differ, but only where pi never goes.
    elsewhere = two_step((F(1, 2), F(1)), {0: (F(1, 2), F(9, 10)), 1: (F(1, 2), F(1, 2))})
    assert ratio_moments(elsewhere).variance.tolist() == [0, 1, 1]
    # Survivors of an end-of-sequence token are not a martingale.
    mdp = tree(2, 3, eos=0)
    rows = as_numbers(np.ones((mdp.n_states, 2), dtype=int), True) / 2
    target = rows.copy()
    target[0] = [F(1, 4), F(3, 4)]
    world = World(mdp, rows, target)
    paths = enumerate_trajectories(world)
    rho = rational_weights(paths, "cumulative")
    for t, (mean, variance) in enumerate([(1, F(1, 4)), (F(3, 2), 0), (F(3, 2), 0)]):
        alive = paths.behavior_probability * paths.mask[:, t]
        share = alive / alive.sum()
        assert (share * rho[:, t]).sum() == mean
        assert (share * rho[:, t] ** 2).sum() - mean**2 == variance
    assert ratio_moments(world).variance.tolist() == [0, F(1, 4), F(1, 4), F(1, 4)]


def test_claim_6_clipping_flips_the_sign():
    window = ctpo.RatioClip(0.2, 0.2)
    bandit = independent_tokens([F(1, 2), F(1, 2)], [F(1, 4), F(3, 4)], 1, outcome=lambda string: string[0])
    assert policy_gradient(bandit)[1] == F(3, 16)
    assert estimator_moments(bandit, ctpo.Estimator("token", window)).mean[1] == pytest.approx(0, abs=1e-15)
    world = independent_tokens(
        [F(1, 2), F(1, 2)], [F(1, 4), F(3, 4)], 2, outcome=lambda string: 2 * string[0] - string[1]
    )
    assert policy_gradient(world)[1] == F(3, 16)
    for level, expected in (("cumulative", -45 / 256), ("token", -3 / 16)):
        found = estimator_moments(world, ctpo.Estimator(level, window))
        assert found.mean[1] == pytest.approx(expected, rel=1e-13)
        assert found.bias[1] == pytest.approx(expected - 3 / 16, rel=1e-13)


def test_claim_9_table_of_variances():
    world = independent_tokens([F(1, 2), F(1, 2)], [F(1, 4), F(3, 4)], 2, outcome=lambda string: string[0] * string[1])
    found = gradient_moments(world, "cumulative", "A_target", covariance=True)
    assert (found.mean[1], found.covariance[1, 1]) == (F(9, 32), F(243, 16384))
    assert gradient_moments(world, "cumulative", "A_behavior").mean[1] == F(15, 64)
    assert gradient_moments(world, "cumulative", "one", outcome=True).mean[1] == F(15, 64)
    assert gradient_moments(world, "cumulative", "Q_target").mean[1] == F(9, 32)


def test_scores_of_ones_own():
    """A world may bring its own score vectors: those of a softmax give what the softmax gives."""
    world = random_world(5, "tree eos tool", "shared")
    own = World(world.mdp, world.behavior, world.target, "prefix", scores=world.local_scores)
    for level, window in LEVELS:
        a, b = (gradient_moments(w, level, window=window, covariance=True) for w in (world, own))
        assert a.covariance.tolist() == b.covariance.tolist()
    doubled = World(world.mdp, world.behavior, world.target, scores=np.concatenate([world.local_scores] * 2, axis=2))
    assert gradient_moments(doubled, "token").total_variance == 2 * gradient_moments(world, "token").total_variance
    assert policy_gradient(doubled).tolist() == policy_gradient(world).tolist() * 2


def test_long_horizon_gradient_of_independent_tokens():
    """One shared logit, advantage a function of the token: closed form for the cumulative weight, H = 2000."""
    horizon, b, p = 2000, 0.5, 0.51
    mdp = chain("i.i.d.", np.zeros((1, 2), dtype=int), horizon=horizon, initial=0)
    world = World(mdp, np.array([[1 - b, b]]), np.array([[1 - p, p]]), "shared")
    table = np.array([[-p, 1 - p]])  # A = a - p, so E_pi[A] = 0 and terms of different tokens are uncorrelated
    found = gradient_moments(world, "cumulative", table, covariance=True)
    # Y = sum_t rho_t f_t, f = (a - p)^2: E_pi f = p(1-p); E_b[r^2 f^2], E_b[r^2 f] by hand
    f = [p * p, (1 - p) ** 2]
    r, base = [(1 - p) / (1 - b), p / b], [1 - b, b]
    m = sum(q * x * x for q, x in zip(base, r, strict=True))
    square = sum(q * x * x * y * y for q, x, y in zip(base, r, f, strict=True))
    tilted = sum(q * x * x * y for q, x, y in zip(base, r, f, strict=True))
    mean = p * (1 - p)
    second = sum(
        m**t * (square + 2 * (horizon - 1 - t) * tilted * mean) for t in range(horizon)
    )  # E rho_s f_s rho_t f_t = m^(s-1) E[r^2 f] E_pi[f] for s < t
    assert found.mean[1] == pytest.approx(horizon * mean, rel=1e-11)
    assert found.covariance[1, 1] == pytest.approx(second - (horizon * mean) ** 2, rel=1e-9)


# --- bad input ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: gradient_moments(w, "gspo"), r"level: dynamic programming knows .*got 'gspo'"),
        (lambda w: gradient_moments(w, "min_prefix"), r"level: .*got 'min_prefix'"),
        (lambda w: gradient_moments(w, "window"), r"window: level 'window' needs a whole number >= 1, got None"),
        (lambda w: gradient_moments(w, "window", window=0), r"window: .* >= 1, got 0"),
        (lambda w: gradient_moments(w, "lookahead", window=-1), r"window: .* >= 0, got -1"),
        (lambda w: gradient_moments(w, "lookahead", window=1.0), r"window: .* >= 0, got 1.0"),
        (lambda w: gradient_moments(w, "lookahead", window=True), r"window: .* >= 0, got True"),
        (lambda w: gradient_moments(w, "token", window=2), r"window: only for .*got 2 with level 'token'"),
        (lambda w: gradient_moments(w, "token", "A_star"), r"advantage: must be one of .*got 'A_star'"),
        (lambda w: gradient_moments(w, "token", "A_exact"), r"advantage: must be one of .*got 'A_exact'"),
        (lambda w: gradient_moments(w, "token", None), r"advantage: must be one of .*got None"),
        (lambda w: advantage_table(w, "B_target"), r"advantage: must be one of .*got 'B_target'"),
        (lambda w: gradient_moments(w, "token", np.zeros((3, 3))), r"advantage: shape must be .* got \(3, 3\)"),
        (lambda w: gradient_moments(w.as_float(), "token", np.full((7, 2), np.nan)), "advantage: must be finite .*nan"),
        (lambda w: gradient_moments(w, "token", np.zeros((7, 2))), "advantage: numbers must be Fractions"),
        (lambda w: gradient_moments(w.as_float(), "token", np.zeros((7, 2), dtype=object)), "advantage: .* float64"),
        (lambda w: rational_weights(enumerate_trajectories(w), "turn"), "level: unknown level 'turn'"),
        (
            lambda w: rational_weights(enumerate_trajectories(w), "window"),
            "level: unknown level 'window' or window None",
        ),
        (lambda w: estimator_moments(w, "pppo"), "estimator must be one of"),
    ],
)
def test_bad_input_is_named(call, message):
    world = two_step((F(1, 2), F(3, 4)), {0: (F(1, 2), F(3, 4)), 1: (F(1, 2), F(3, 4))})
    with pytest.raises(ValueError, match=message):
        call(world)


def test_too_much_to_store_is_refused_before_it_is_stored(monkeypatch):
    monkeypatch.setattr(exact, "MAX_STORED_BYTES", 1000)
    world = sticky_hot(100)
    with pytest.raises(ValueError, match=r"window: 20 phases over 100 tokens and 3 states need"):
        gradient_moments(world, "window", window=20)


def test_a_window_longer_than_the_stream_costs_nothing():
    world = sticky_hot(50)
    table = np.ones((3, 2))
    for level, same in (("window", "cumulative"), ("lookahead", "sequence")):
        long = gradient_moments(world, level, table, window=10**9)
        assert long.total_variance == gradient_moments(world, same, table).total_variance
