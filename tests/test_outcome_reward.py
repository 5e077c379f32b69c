"""What the checks of claim 4 are made of, against plain loops over the tokens of every string."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from world_strategies import random_world

from simulations.claims import outcome_reward as claims
from simulations.exact import enumerate_trajectories, gradient_moments, policy_gradient
from simulations.mdp import END, POLICY

F = Fraction
KINDS = ("tree", "tree eos", "tree tool", "tree eos tool")


def policy_tokens(paths, n):
    """(place, ratio, reward credited to it) of the policy tokens of one trajectory, in plain numbers."""
    world = paths.world
    tokens = []
    for h in range(paths.states.shape[1]):
        s, a = int(paths.states[n, h]), int(paths.actions[n, h])
        if world.mdp.kind[s] == END:
            break
        if world.mdp.kind[s] == POLICY:
            tokens.append([h, world.target[s][a] / world.behavior[s][a], F(0)])
        tokens[-1][2] += world.mdp.reward[s][a]
    tokens[-1][2] += world.mdp.outcome[paths.final_state[n]]
    return tokens


def trajectories(seed):
    return enumerate_trajectories(random_world(seed, KINDS[seed % 4], ("prefix", "position", "shared")[seed % 3]))


@pytest.mark.parametrize("seed", range(8))
def test_rewards_to_go_and_doubly_robust_terms_by_recursion(seed):
    paths = trajectories(seed)
    world = paths.world
    rng = np.random.default_rng(seed)
    shape = (world.mdp.horizon, *world.behavior.shape)
    q = np.array([F(int(x)) for x in rng.integers(-4, 5, size=math.prod(shape))], dtype=object).reshape(shape)
    credited = claims.rewards_by_token(paths)
    decided = claims.weighted_reward_to_go(paths)
    robust = claims.doubly_robust_terms(paths, q, claims.target_mean)
    for n in range(len(paths.returns)):
        tokens = policy_tokens(paths, n)
        assert [credited[n, h] for h, _, _ in tokens] == [c for _, _, c in tokens]
        assert sum(c for _, _, c in tokens) == paths.returns[n] == credited[n].sum()
        rho = [math.prod(r for _, r, _ in tokens[: t + 1]) for t in range(len(tokens))]
        to_go, after = F(0), F(0)
        for t, (h, ratio, c) in reversed(list(enumerate(tokens))):
            s, a = paths.states[n, h], paths.actions[n, h]
            v = sum(p * x for p, x in zip(world.target[s], q[h, s], strict=True))
            to_go += rho[t] * c
            assert decided[n, h] == to_go
            assert robust[n, h] == rho[t] * (c + after - v)
            after = v + ratio * (c - q[h, s, a]) + ratio * after


def test_a_critic_of_the_wrong_policy_is_another_one():
    paths = trajectories(0)
    q = np.array([F(int(x)) for x in range(paths.world.behavior.size)], dtype=object).reshape(
        paths.world.behavior.shape
    )
    for mean, policy in (
        (claims.target_mean, paths.world.target),
        (claims.behavior_mean, paths.world.behavior),
    ):
        expected = [sum(p * x for p, x in zip(*rows, strict=True)) for rows in zip(policy, q, strict=True)]
        assert mean(paths.world, q).tolist() == expected


def test_sums_from_a_step_on():
    values = np.array([[1, 2, 4], [0, 5, -1]])
    assert claims.from_here_on(values).tolist() == [[7, 6, 4], [4, 4, -1]]
    assert claims.only_step(values.astype(float), 1).tolist() == [[0, 2, 0], [0, 5, 0]]


def test_bigram_model_of_every_string():
    rng = np.random.default_rng(5)
    n, length = claims.TOKENS, claims.LENGTH
    logits, step = rng.standard_normal((2, n + 1, n))
    strings = list(product(range(n), repeat=length))
    reward = rng.standard_normal(len(strings))
    paths = claims.bigram_strings(logits, step, reward)
    assert [tuple(row) for row in paths.actions] == strings
    np.testing.assert_allclose(paths.returns, reward)

    def policy(row):
        total = sum(math.exp(x) for x in row)
        return [math.exp(x) / total for x in row]

    b, pi = [policy(row) for row in logits], [policy(row) for row in logits + step]
    gradient = np.zeros((n + 1, n))
    for k, string in enumerate(strings):
        before = [n, *string[:-1]]  # the last row writes the first token
        assert paths.behavior_probability[k] == pytest.approx(
            math.prod(b[p][a] for p, a in zip(before, string, strict=True))
        )
        mass = math.prod(pi[p][a] for p, a in zip(before, string, strict=True))
        assert paths.target_probability[k] == pytest.approx(mass)
        for p, a in zip(before, string, strict=True):
            for other in range(n):
                gradient[p, other] += mass * reward[k] * ((other == a) - pi[p][other])
    np.testing.assert_allclose(claims.on_policy_gradient(paths).reshape(n + 1, n), gradient, atol=1e-12)
    np.testing.assert_allclose(policy_gradient(paths.world), gradient.ravel(), atol=1e-12)
    assert (claims.level_weights(paths, "none") == 1).all()
    ratios = [[pi[p][a] / b[p][a] for p, a in zip([n, *s[:-1]], s, strict=True)] for s in strings]
    np.testing.assert_allclose(claims.level_weights(paths, "cumulative"), np.cumprod(ratios, axis=1))


@pytest.mark.parametrize("horizon", [2, 4])
@pytest.mark.parametrize("level", ["cumulative", "sequence"])
def test_all_ones_as_two_states_is_the_tree(horizon, level):
    tree = claims.both_ones(F(1, 2), F(3, 5), horizon)
    chain = claims.ones_so_far(F(1, 2), F(3, 5), horizon)
    one, two = (gradient_moments(world, level, "one", outcome=True) for world in (tree, chain))
    assert list(two.mean[1::2]) == list(one.mean) == [-x for x in two.mean[::2]]
    assert two.total_variance == 2 * one.total_variance


@pytest.mark.parametrize("pi", [(F(51, 100), F(1, 2)), (F(1, 3), F(3, 4))])
def test_both_ones_by_position_by_loop(pi):
    """Biases of the cumulative and of the token ratio on both logits, R = a1 a2 and b = 1/2."""
    true = [F(0)] * 2
    found = {"cumulative": [F(0)] * 2, "token": [F(0)] * 2}
    for string in product((0, 1), repeat=2):
        r = [2 * (p if a else 1 - p) for a, p in zip(string, pi, strict=True)]
        for t in range(2):
            term = F(1, 4) * string[0] * string[1] * (string[t] - pi[t])
            true[t] += r[0] * r[1] * term
            found["cumulative"][t] += r[0] * (r[1] if t else 1) * term
            found["token"][t] += r[t] * term
    world = claims.both_ones_by_position(*pi)
    assert policy_gradient(world).tolist() == true
    for level, expected in found.items():
        assert gradient_moments(world, level, "one", outcome=True).mean.tolist() == expected


def test_critic_fitted_to_its_own_batch_by_loop():
    """One token, R = a, b = 1/2, pi = 3/4: with d = r - v the terms are rho g d."""
    own = other = F(0)
    for batch in product((0, 1), repeat=2):
        v = F(3, 4) * (1 in batch)  # the critic says 1 for token 1 if the batch has one, 0 for all else
        terms = {0: F(1, 2) * F(-3, 4) * (0 - v), 1: F(3, 2) * F(1, 4) * (1 - v)}
        own += F(1, 4) * sum(terms[a] for a in batch) / 2
        other += F(1, 4) * sum(terms.values()) / 2
    evidence = claims._fitted_to_its_own_batch(claims.target_mean)
    assert evidence.numbers == {"true": "3/16", "own_batch": str(own), "other_batch": str(other)}
    assert evidence.holds
    assert not claims._fitted_to_its_own_batch(claims.behavior_mean).holds


def test_reward_rules():
    numbers = np.array([[1, 2], [3, 4], [-1, 5]])
    assert claims.additive(numbers, (1, 0, 1)) == 10
    assert claims.multiplicative(numbers, (1, 0, 1)) == 30
    assert claims.additive(numbers, (0,)) == 1


def test_planted_worlds_are_as_planted():
    for seed in range(6):
        world = claims.planted_world(np.random.default_rng(seed))
        paths = enumerate_trajectories(world)
        differs = 0
        for first in range(3):
            rows = [n for n in range(len(paths.returns)) if paths.actions[n, 0] == first]
            gap = sum((paths.behavior[n, 1] - paths.target[n, 1]) * paths.returns[n] for n in rows)
            assert gap == 1
            differs += len({paths.target[n, 1] for n in rows}) > 1
        assert differs


def test_lookahead_weights_end_where_the_string_ends():
    paths = trajectories(2)
    for ahead in range(4):
        weight, wrong = claims.lookahead(paths, ahead), claims.token_counted_twice(paths, ahead)
        for n in range(len(paths.returns)):
            tokens = policy_tokens(paths, n)
            for t, (h, _, _) in enumerate(tokens):
                assert weight[n, h] == math.prod(r for _, r, _ in tokens[: t + 1 + ahead])
                assert wrong[n, h] == math.prod(r for _, r, _ in tokens[: t + 1 + max(ahead - 1, 0)])
