"""Claim 5's own mathematics against plain sums over strings."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import oracle_worlds as oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from world_strategies import examples, random_world

from simulations.claims import summed_gradient as claim
from simulations.claims.registry import Context
from simulations.exact import enumerate_trajectories
from simulations.mdp import as_numbers, independent_tokens, one_logit

F = Fraction

fractions = st.sampled_from([F(k, n) for n in (2, 3, 5) for k in range(1, n)])


def strings(horizon):
    return list(product((0, 1), repeat=horizon))


def plain_terms(horizon, reward, p):
    """f_t of every string, (a_t - p) A_t, from values by recursion."""

    def value(prefix):
        if len(prefix) == horizon:
            return reward[prefix]
        return (1 - p) * value((*prefix, 0)) + p * value((*prefix, 1))

    return {s: [(s[t] - p) * (value(s[: t + 1]) - value(s[:t])) for t in range(horizon)] for s in strings(horizon)}


def plain_variances(horizon, reward, p, b, shared=True):
    """Variances of Y and Z, each a sum over positions of vectors with one entry, or one entry per position."""
    found = []
    f = plain_terms(horizon, reward, p)
    for full in (False, True):
        mean, second = [F(0)] * horizon, F(0)
        for s in strings(horizon):
            ratio = [(p / b) if a else (1 - p) / (1 - b) for a in s]
            probability = oracle.product(b if a else 1 - b for a in s)
            weight = [oracle.product(ratio if full else ratio[: t + 1]) for t in range(horizon)]
            entries = [w * x for w, x in zip(weight, f[s], strict=True)]
            if shared:
                entries = [sum(entries)]
            second += probability * sum(x * x for x in entries)
            for i, x in enumerate(entries):
                mean[i] += probability * x
        found.append(second - sum(m * m for m in mean))
    return found


@st.composite
def rewards(draw, horizon):
    return {s: F(draw(st.integers(-2, 3))) for s in strings(horizon)}


@given(st.data(), st.integers(1, 3), fractions, fractions, st.booleans())
@examples(1.0)
def test_variances_of_many_binary_worlds_at_once(data, horizon, p, b, shared):
    some = [data.draw(rewards(horizon)) for _ in range(2)]
    outcome = as_numbers([list(reward.values()) for reward in some], True)
    column = as_numbers([p, p], True), as_numbers([b, b], True)
    found = claim.one_logit_variances(outcome, *column, "shared" if shared else "position")
    expected = [plain_variances(horizon, reward, p, b, shared) for reward in some]
    assert [list(pair) for pair in zip(*found, strict=True)] == expected
    score, f = claim.one_logit_terms(outcome, column[0])
    assert [list(row) for row in score[0]] == [[a - p for a in s] for s in strings(horizon)]
    assert [list(row) for row in f[1]] == list(plain_terms(horizon, some[1], p).values())
    floats = [array.astype(float) for array in (outcome, *column)]
    for exact, rounded in zip(
        found, claim.one_logit_variances(*floats, "shared" if shared else "position"), strict=True
    ):
        assert np.allclose(rounded, exact.astype(float), rtol=1e-12, atol=1e-12)


@given(st.data(), fractions, fractions, st.sampled_from(["shared", "position"]))
@examples(0.5)
def test_variances_of_a_world(data, p, b, parameters):
    reward = data.draw(rewards(2))
    world = independent_tokens([1 - b, b], [1 - p, p], 2, outcome=reward.get, parameters=parameters)
    found = claim.variances(one_logit(world))
    assert list(found) == plain_variances(2, reward, p, b, parameters == "shared")
    paths = enumerate_trajectories(one_logit(world))
    assert claim.enumerated_variances(paths, claim.terms(paths)) == found


def test_outcome_reward_by_loop():
    b, pi = (F(4, 5), F(1, 10)), (F(7, 10), F(9, 10))
    found = {}
    for name in ("prefix", "sequence"):
        mean, second = [F(0)] * 2, F(0)
        for s in strings(2):
            chance = oracle.product(q if a else 1 - q for a, q in zip(s, b, strict=True))
            r = [(p / q) if a else (1 - p) / (1 - q) for a, p, q in zip(s, pi, b, strict=True)]
            weight = [r[0] if name == "prefix" else r[0] * r[1], r[0] * r[1]]
            entries = [w * (a - p) * (1 - s[1]) for w, a, p in zip(weight, s, pi, strict=True)]
            second += chance * sum(x * x for x in entries)
            mean = [m + chance * x for m, x in zip(mean, entries, strict=True)]
        found[name] = str(second - sum(m * m for m in mean))
    evidence = claim._outcome_reward()
    assert evidence.numbers == found
    assert evidence.holds


@pytest.mark.parametrize("parameters", ["shared", "position", "prefix"])
@pytest.mark.parametrize("kind", ["tree", "tree eos", "tree tool"])
def test_pairs_make_up_the_difference(kind, parameters):
    """Against loops over pairs of tokens, and against the variances of the oracle."""
    for seed in range(3):
        world = random_world(seed, kind, parameters)
        plain = oracle.Plain(world)
        advantage = oracle.advantages(plain, "A_target")
        own = cross = F(0)
        for p0, _, moves in oracle.streams(plain):
            probability = p0 * oracle.probability(plain, moves, plain.b)
            tokens = oracle.policy_tokens(plain, moves)
            ratios = [r for *_, r in tokens]
            f = [[advantage(k, s, a) * g for g in plain.score(k, s, a)] for k, s, a, _ in tokens]
            for i, j in product(range(len(f)), repeat=2):
                factor = oracle.product(ratios) ** 2 - oracle.product(ratios[: i + 1]) * oracle.product(ratios[: j + 1])
                gain = probability * factor * sum(x * y for x, y in zip(f[i], f[j], strict=True))
                own, cross = (own + gain, cross) if i == j else (own, cross + gain)
        assert claim.every_pair(enumerate_trajectories(world)) == (own, cross)
        assert claim.same_token_only(enumerate_trajectories(world)) == (own, 0)
        traces = []
        for level in ("cumulative", "sequence"):
            _, covariance = oracle.summed_gradient(plain, level, advantage)
            traces.append(sum(covariance[k][k] for k in range(plain.dimension)))
        assert traces[1] - traces[0] == own + cross
        assert claim.variances(world) == tuple(traces)


@given(st.data(), fractions)
@examples(0.5)
def test_slope_is_the_limit_of_differences(data, b):
    horizon = data.draw(st.integers(2, 3))
    reward = data.draw(rewards(horizon))
    found = claim.slope(as_numbers(list(reward.values()), True), as_numbers(b, True), claim.after_the_first)
    gaps = []
    for size in (F(1, 100), F(1, 1000)):
        above, below = (plain_variances(horizon, reward, b + step, b) for step in (size, -size))
        gaps.append(abs((above[1] - above[0] - below[1] + below[0]) / (2 * size) - found))
    assert gaps[1] <= gaps[0] / 50
    assert gaps[1] < F(1, 100)


def test_slope_of_the_wrong_tokens_is_wrong():
    reward, b = as_numbers([0, 0, 0, 1, 0, 0, 1, 0], True), as_numbers(F(1, 3), True)
    assert claim.slope(reward, b, claim.after_the_first) != claim.slope(reward, b, claim.up_to_the_last)


def test_sign_of_the_difference_is_exact_also_in_ties():
    outcome = as_numbers([[0, 1, 0, 1, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0, 1, 0]], True)
    # Float64 takes 0 for a difference of either sign in the first two.
    pairs = [(F(3, 10), F(3, 5)), (F(9, 10), F(1, 5)), (F(2, 5), F(3, 5)), (F(1, 3), F(1, 3) + F(1, 10**6))]
    b, p = (as_numbers(column, True)[:, None] for column in zip(*pairs, strict=True))
    found = claim.noisier_prefix(outcome, p, b, "shared")
    expected = []
    for before, after in pairs:
        both = [plain_variances(3, dict(zip(strings(3), row, strict=True)), after, before) for row in outcome]
        expected.append([(y > z) - (y < z) for y, z in both])
    assert found.tolist() == expected
    assert {0, 1, -1} == set(found.ravel().tolist())


def test_rewards_of_the_grid():
    rows = {tuple(row) for row in claim.BINARY_REWARDS}
    assert len(rows) == 127
    assert all(row[0] == 0 and 1 in row for row in rows)


def test_counts_of_a_few_worlds_of_the_grid():
    """The family near b, for b = 1/10 alone, counted by loops; uphill is judged by the true gradient at b."""
    worse = uphill = worse_uphill = 0
    b = F(1, 10)
    for row, step in product(claim.BINARY_REWARDS[::7], (F(1, 100), F(-1, 100))):
        reward = dict(zip(strings(3), row, strict=True))
        y, z = plain_variances(3, reward, b + step, b)
        f = plain_terms(3, reward, b)
        gradient = sum(oracle.product(b if a else 1 - b for a in s) * sum(f[s]) for s in strings(3))
        worse += y > z
        uphill += gradient * step > 0
        worse_uphill += y > z and gradient * step > 0
    column = as_numbers([[b], [b]], True), as_numbers([[b + F(1, 100)], [b - F(1, 100)]], True)
    found = claim.noisier_prefix(claim.BINARY_REWARDS[::7], column[1], column[0], "shared")
    assert int((found > 0).sum()) == worse
    assert 0 < worse_uphill < uphill < found.size
    assert claim.counts_on_the_grid("position")["near"][0] == 0


def test_policy_that_writes_strings_in_proportion():
    world = random_world(3, "tree eos", "prefix")
    paths = enumerate_trajectories(world)
    weight = as_numbers(np.arange(1, len(paths.states) + 1), True)
    plain = oracle.Plain(world)
    policy = [list(row) for row in claim.tree_policy(paths, weight)]
    total = sum(weight)
    ends = {int(s): w / total for s, w in zip(paths.final_state, weight, strict=True)}
    found = {last: oracle.probability(plain, moves, policy) for _, last, moves in oracle.streams(plain)}
    assert found == ends


def test_worlds_of_one_sign():
    worlds = list(claim.worlds_of_one_sign(Context(5), 6))
    assert len(worlds) == 6
    for world in worlds:
        whole = []
        for _, _, moves in oracle.streams(plain := oracle.Plain(world)):
            advantage = oracle.advantages(plain, "A_target")
            whole.append(
                sum(advantage(k, s, a) * (a - plain.pi[s][1]) for k, s, a, _ in oracle.policy_tokens(plain, moves))
            )
        assert all(x > 0 for x in whole) or all(x < 0 for x in whole)
        assert claim.summed_integrand(enumerate_trajectories(world)).tolist() == whole
