"""Claims 1-3, T1 and 8: wrong subjects other than the control are rejected, and what the checks are built from."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from simulations.claims import CLAIMS, Context, gradient_bias, martingale, product_formula
from simulations.claims.effective_sample_size import gaussian_ess
from simulations.claims.gradient_bias import TABLE_ONE, noisy_token_world
from simulations.claims.martingale import (
    among,
    before_token,
    chi2_of_target,
    cumulative,
    median_batch_mean,
    one_token_late,
    tilted_chi2,
    variance,
)
from simulations.claims.worlds import long_worlds
from simulations.exact import enumerate_trajectories, ratio_moments, rational_weights
from simulations.mdp import POLICY, bigram, random_tree, tree_prefixes

QUICK = Context(seed=1, quick=True)

# --- wrong processes, formulas and tables ---


def first_token_only(paths):
    return np.repeat(paths.ratio[:, :1], paths.ratio.shape[1], axis=1)


def last_token_left_out(paths):
    ratio = paths.ratio.copy()
    ratio[:, -1] = ratio[:, -1] * 0 + 1
    return ratio.cumprod(axis=1)


def without_own_token(paths):
    return before_token(cumulative(paths))


def token_ratio(paths):
    return paths.ratio


def full_sequence(paths):
    return np.repeat(cumulative(paths)[:, -1:], paths.ratio.shape[1], axis=1)


def inverse(paths):
    return 1 / cumulative(paths)


def without_last_chi2(world):
    return np.append(product_formula.product_of_marginals(world)[:-1], product_formula.sum_of_marginals(world)[-1])


def partly_right(world):
    formula = product_formula.true_variance if world.mdp.n_actions == 3 else product_formula.product_of_marginals
    return formula(world)


def reached_by_anyone(world):
    return np.ones(world.mdp.n_states)


def table(**changes):
    return {**TABLE_ONE, **{name: TABLE_ONE[other] for name, other in changes.items()}}


WRONG = {
    "1.martingale": [first_token_only, last_token_left_out, without_own_token, token_ratio, full_sequence, inverse],
    "1.support": [first_token_only, last_token_left_out, one_token_late, without_own_token],
    "1.survivors": [first_token_only, last_token_left_out, one_token_late, without_own_token, full_sequence, inverse],
    "1.sample": [lambda v: 1.01 * v, lambda v: 0.99 * v, math.sqrt],
    "1.variance": [lambda world: 2 * chi2_of_target(world), lambda world: chi2_of_target(world) ** 2],
    "1.optimal": [first_token_only, last_token_left_out, one_token_late, without_own_token, token_ratio, inverse],
    "1.log": [lambda paths, logs: list(variance(paths, logs)), lambda paths, logs: [Fraction(64, 25)] * 2],
    "1s.strict": [reached_by_anyone],
    "2.recursion": [lambda ratio: ratio**0, lambda ratio: ratio**3, lambda ratio: 1 / ratio],
    "2.product": [
        product_formula.true_variance,
        partly_right,
        without_last_chi2,
        lambda world: ratio_moments(world).chi2_marginal,
    ],
    "2.general": [product_formula.sum_of_marginals, lambda world: ratio_moments(world).second_moment[1:]],
    "2.uncorrelated": [cumulative, inverse],
    "2r.bounds": [lambda d, horizon, t: Fraction(horizon, t), lambda d, horizon, t: (1 + d) ** horizon / (1 + d) ** t],
    "2r.limit": [lambda d, horizon, t: Fraction(horizon, t)],
    "3.token": ["sequence"],
    "3.surrogate": ["Q_target"],
    "3.gspo": [lambda horizon: 1, lambda horizon: 2],
    "3.table": [lambda paths, level: rational_weights(paths, {"sequence": "cumulative"}.get(level, level))],
    "T1": [
        table(token="cumulative"),
        table(sequence="token"),
        table(sequence="cumulative"),
        table(cumulative="sequence"),
        table(cumulative="sequence", sequence="cumulative"),
        table(cumulative="cumulative mean"),
        table(sequence="sequence mean (GSPO)"),
    ],
    "8.population": [first_token_only, last_token_left_out, one_token_late, without_own_token, inverse],
    "8.batch": [first_token_only, one_token_late, full_sequence],
    "8.scale": [lambda sigma, t: gaussian_ess(sigma, t / 2), lambda sigma, t: 1 / (1 + sigma**2 * t)],
}


@pytest.fixture(autouse=True)
def few_worlds(monkeypatch):
    """The checks on fewer and shorter float worlds, where one is as good as nine to tell a wrong subject."""
    rng = np.random.default_rng(0)
    worlds = [random_tree(rng, horizon=3, exact=False), bigram(rng, n_tokens=2, horizon=3, step=1.0)]
    monkeypatch.setattr(gradient_bias, "table_one_worlds", lambda _context: worlds)
    for module in (martingale, product_formula):
        monkeypatch.setattr(module, "long_worlds", lambda context, _horizon: long_worlds(context, 512)[::2])


@pytest.mark.parametrize("identifier", ["1.variance", "2.recursion", "T1"])
def test_few_worlds_accept_the_subject(identifier):
    assert all(e.holds for e in CLAIMS[identifier].check(QUICK, CLAIMS[identifier].subject))


@pytest.mark.parametrize(
    ("identifier", "subject"),
    [pytest.param(i, s, id=f"{i}-{k}") for i, subjects in WRONG.items() for k, s in enumerate(subjects)],
)
def test_wrong_subject_is_rejected(identifier, subject):
    assert any(not e.holds for e in CLAIMS[identifier].check(QUICK, subject))


@pytest.mark.parametrize(
    ("identifier", "subject", "parts"),
    [
        ("1.survivors", token_ratio, {1}),  # the random trees alone tell
        ("1.variance", lambda world: 2 * chi2_of_target(world), {0, 2}),
        ("2.recursion", lambda ratio: ratio**0, {0, 1}),
        ("2.product", product_formula.true_variance, {2}),
        ("3.gspo", lambda horizon: horizon + 1, {0, 1}),
        ("3.prop1", "none", {0, 1, 2, 3}),
        ("T1", table(cumulative="sequence", sequence="cumulative"), {1, 3}),
    ],
)
def test_evidence_that_must_tell(identifier, subject, parts):
    failed = {k for k, e in enumerate(CLAIMS[identifier].check(QUICK, subject)) if not e.holds}
    assert parts <= failed


# --- what the checks are built from ---


def test_median_of_one_ratio_is_that_of_the_log_normal():
    for v in (0.5, 2.0, 8.98):
        assert median_batch_mean(v, 1) == pytest.approx(math.exp(-v / 2), rel=1e-4)


@pytest.mark.parametrize("v", [0.5, 2.0])
def test_median_of_the_mean_of_two_by_quadrature(v):
    def below(total):
        """P(X + Y <= total) of independent log-normals with mean 1."""
        center, spread = -v / 2, math.sqrt(v)
        return quad(
            lambda x: norm.pdf(x) * norm.cdf((math.log(total - math.exp(center + spread * x)) - center) / spread),
            -9,
            (math.log(total) - center) / spread,
            limit=200,
        )[0]

    assert below(2 * median_batch_mean(v, 2)) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("power", [0, 1, 2])
def test_tilted_chi2_against_every_string(power):
    world = bigram(np.random.default_rng(3), n_tokens=3, horizon=3, step=1.0)
    chi2 = chi2_of_target(world)
    found = tilted_chi2(world, chi2, lambda ratio: ratio**power, 3)
    nxt = {(s, a): n for s, a, n, _ in zip(*world.mdp.edges, strict=True)}
    for t in range(3):
        above = below = 0.0
        for start, actions in product(np.flatnonzero(world.mdp.initial), product(range(3), repeat=t)):
            state, weight = start, world.mdp.initial[start]
            for a in actions:
                b, pi = world.behavior[state, a], world.target[state, a]
                weight, state = weight * b * (pi / b) ** power, nxt[state, a]
            expected = sum(world.target[state, a] ** 2 / world.behavior[state, a] for a in range(3)) - 1
            above, below = above + weight * expected, below + weight
        assert found[t] == pytest.approx(above / below, rel=1e-12)


def test_equal_divergence_worlds_have_one_chi2_at_every_position():
    rng = np.random.default_rng(5)
    laws = []
    for _ in range(10):
        world = product_formula._equal_divergence_world(rng)
        rows = {}
        for state, prefix in enumerate(tree_prefixes(world.mdp)):
            if world.mdp.kind[state] == POLICY:
                rows.setdefault(len(prefix), []).append((world.behavior[state], world.target[state]))
        for pairs in rows.values():
            values = {sum(p * p / q for q, p in zip(b, pi, strict=True)) - 1 for b, pi in pairs}
            assert len(values) == 1
            assert min(values) > 0
        second = [sorted((p / q, q) for q, p in zip(b, pi, strict=True)) for b, pi in rows[1]]
        laws.append(second[0] != second[1])
        assert product_formula._ratio_depends_on_prefix(world) is laws[-1]
    assert sum(laws) > 0


@pytest.mark.parametrize("t", [1, 2, 7])
def test_away_from_hot_over_the_formula_by_every_string(t):
    hot = {0: 0.45, 1: 0.05}  # by the last bit
    second, marginal = 0.0, [0.0] * t
    for string in product((0, 1), repeat=t):
        state, rho = 0, 1.0
        for k, a in enumerate(string):
            marginal[k] += 0.5**t * (2 * (hot[state] ** 2 + (1 - hot[state]) ** 2))
            rho *= 2 * (hot[state] if a else 1 - hot[state])
            state = a
        second += 0.5**t * rho**2
    world = product_formula.away_from_hot(t)
    found = product_formula.spread_over_formula(world, product_formula.true_variance, t)
    assert found == pytest.approx(second / math.prod(marginal), rel=1e-12)


def test_mean_ratio_of_a_truncating_sampler_by_hand():
    b, pi = [Fraction(k, 10) for k in (5, 3, 2)], [Fraction(k, 20) for k in (8, 7, 5)]
    mu = [Fraction(5, 8), Fraction(3, 8)]
    one = sum(m * p / m for m, p in zip(mu, pi, strict=False))
    neither = sum(m * p / q for m, p, q in zip(mu, pi, b, strict=False))
    evidence = martingale._scored_after_truncation(cumulative)
    assert evidence.numbers == {"mean": [str(one), str(neither), "1", "1"]}
    assert evidence.holds
    assert not martingale._scored_after_truncation(without_own_token).holds


def test_noisy_token_world_by_hand():
    """Only after the first token 1 is there an advantage; there A g is (-1/2, 1/2) whichever token comes."""
    world = noisy_token_world()
    paths = enumerate_trajectories(world)
    strings = {tuple(row): k for k, row in enumerate(paths.actions)}
    advantages = paths.advantage("A_target")
    assert [advantages[strings[s]].tolist() for s in ((0, 0), (0, 1), (1, 0), (1, 1))] == [[0, 0]] * 2 + [
        [0, -1],
        [0, 1],
    ]
    for weight, expected in ((Fraction(1), Fraction(2, 25)), (Fraction(1, 4), Fraction(1, 200))):
        chance = Fraction(4, 5)
        assert 2 * weight**2 * Fraction(1, 4) * chance * (1 - chance) == expected


def test_moments_among_survivors_by_loop():
    world = random_tree(np.random.default_rng(8), n_actions=3, horizon=3, eos=True)
    paths = enumerate_trajectories(world)
    rho = cumulative(paths)[:, 2]
    mass = first = second = Fraction(0)
    for k, actions in enumerate(paths.actions):
        if 0 not in actions[:2]:  # two tokens, neither of them the end
            p = paths.behavior_probability[k]
            mass, first, second = mass + p, first + p * rho[k], second + p * rho[k] ** 2
    assert among(paths, paths.live[:, 2], rho) == (first / mass, second / mass - (first / mass) ** 2)
