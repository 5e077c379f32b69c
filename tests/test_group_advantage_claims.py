"""The formulas behind claim 6 on groups and lengths, against plain loops over everything that can happen."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import oracle
import pytest

from simulations.claims.group_advantages import (
    GROUP_MEAN,
    _two_prompts,
    _under_a_clip,
    _under_a_root,
    against_frozen_copy,
    bandit,
    binary,
    centered,
    expected_inverse_length,
    group_shares,
    length_weighted,
    minus_others,
    normalized,
    on_policy,
    pair_signs,
    per_length,
    response_length,
    sequence_mean,
    sign_world,
    std_scale,
    stop_later,
    stop_or_go,
    three_rewards,
    token_mean,
    trees_with_ends,
    zero_std_share,
)
from simulations.claims.registry import Context
from simulations.exact import enumerate_trajectories, policy_gradient
from simulations.mdp import as_numbers, random_tree

F = Fraction
PROBABILITY = [F(1, 2), F(1, 3), F(1, 6)]
REWARDS = [F(0), F(1), F(5, 2)]


def population_std(rewards):
    mean = sum(rewards) / len(rewards)
    return math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_std_scale_is_that_of_all_groups(size, p, ddof):
    with_reward = 0.0
    for rewards in product((0, 1), repeat=size):
        std = population_std(rewards) * math.sqrt(size / (size - ddof))
        if std > 0:
            advantage = (rewards[0] - sum(rewards) / size) / std
            with_reward += math.prod(p if r else 1 - p for r in rewards) * advantage * rewards[0]
    assert std_scale(size, p, ddof) == pytest.approx(with_reward / (p * (1 - p)), rel=1e-12)


def test_std_scale_of_a_large_group():
    size, p = 300, 0.03
    mass = [math.comb(size, k) * p**k * (1 - p) ** (size - k) for k in range(size + 1)]
    spread = sum(m * math.sqrt(k / size * (1 - k / size)) for k, m in enumerate(mass))
    assert std_scale(size, p, 0) == pytest.approx(spread / (p * (1 - p)), rel=1e-11)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_zero_std_share_counts_groups(size):
    p = 0.2
    equal = [rewards for rewards in product((0, 1), repeat=size) if len(set(rewards)) == 1]
    assert zero_std_share(size, p) == pytest.approx(sum(math.prod(p if r else 1 - p for r in g) for g in equal))


@pytest.mark.parametrize(
    ("size", "advantage", "one_of"),
    [
        (2, centered, lambda rewards, i: rewards[i] - sum(rewards) / len(rewards)),
        (3, centered, lambda rewards, i: rewards[i] - sum(rewards) / len(rewards)),
        (3, minus_others, lambda rewards, i: rewards[i] - sum(rewards[:i] + rewards[i + 1 :]) / (len(rewards) - 1)),
        (2, pair_signs, lambda rewards, i: (rewards[i] > rewards[1 - i]) - (rewards[i] < rewards[1 - i])),
    ],
)
def test_group_shares_sum_over_all_groups(size, advantage, one_of):
    expected = [F(0)] * 3
    for members in product(range(3), repeat=size):
        chance = math.prod([PROBABILITY[n] for n in members], start=F(1))
        rewards = [REWARDS[n] for n in members]
        for i, n in enumerate(members):
            expected[n] += chance * one_of(rewards, i) / size
    found = group_shares(as_numbers(PROBABILITY, True), as_numbers(REWARDS, True), size, advantage)
    assert found.tolist() == expected
    floating = group_shares(np.array(PROBABILITY, float), np.array(REWARDS, float), size, advantage)
    assert floating == pytest.approx([float(e) for e in expected], abs=1e-15)


def test_normalized_is_the_library_without_its_constant():
    rewards = [0.0, 1.0, 10.0, 1.0]
    expected = oracle.group_relative(rewards, scale_by_std=True, eps=1e-300)
    assert normalized(np.array(rewards)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_token_mean_over_all_batches(size):
    length, terms = [1, 2, 4], [(F(1), F(-2)), (F(3), F(0)), (F(-5), F(7))]
    expected = [F(0), F(0)]
    for members in product(range(3), repeat=size):
        chance = math.prod([PROBABILITY[n] for n in members], start=F(1))
        tokens = sum(length[n] for n in members)
        for d in range(2):
            expected[d] += chance * sum(terms[n][d] for n in members) / tokens
    arguments = [as_numbers(x, True) for x in (PROBABILITY, length, terms)]
    assert token_mean(*arguments, size).tolist() == expected
    assert token_mean(*(x.astype(float) for x in arguments), size) == pytest.approx([float(e) for e in expected])
    by_sequence = [sum(p * y[d] / t for p, y, t in zip(PROBABILITY, terms, length, strict=True)) for d in range(2)]
    assert sequence_mean(*arguments, size).tolist() == by_sequence


def test_worlds_by_hand():
    assert policy_gradient(bandit(F(1, 2), F(3, 4)))[1] == F(3, 16)
    assert policy_gradient(bandit(F(1, 2), F(3, 4), (1, 3)))[1] == 2 * F(3, 16)
    assert policy_gradient(sign_world())[:2].tolist() == [F(-1, 8), F(1, 8)]
    # d/dz of s 3/4 + (1 - s), s = 1/2 the probability to stop.
    assert policy_gradient(stop_or_go())[:2].tolist() == [F(-1, 16), F(1, 16)]
    rare = enumerate_trajectories(three_rewards((0, 1, 40), F(1, 32)))
    assert rare.target_probability.tolist() == [F(1, 2), F(15, 32), F(1, 32)]
    assert rare.returns.tolist() == [0, 1, 40]


def test_baseline_is_not_free_under_a_root_or_a_clip():
    """-48/125 under rho_H^(1/2); with the window [4/5, 6/5] gradient 0 and -3/16 with the baselines 0 and 2."""
    b, p, root = F(1, 5), F(4, 5), {0: F(1, 4), 1: F(1), 2: F(4)}
    free = raw = F(0)
    for a, c in product((0, 1), repeat=2):
        term = (b if a else 1 - b) * (b if c else 1 - b) * root[a + c] * (a + c - 2 * p)
        free += term
        raw += term * a * c
    under_root = _under_a_root(GROUP_MEAN, "group mean")
    expected = {"mean_score": free, "raw": raw, "with_baseline": (raw - b * b * free) / 2}
    assert free == F(-48, 125)
    assert under_root.numbers == {name: str(value) for name, value in expected.items()}
    gradients = []
    for baseline in (0, 2):
        total = F(0)
        for a, ratio in ((0, F(1, 2)), (1, F(3, 2))):
            clipped = (a > baseline and ratio > F(6, 5)) or (a < baseline and ratio < F(4, 5))
            total += 0 if clipped else F(1, 2) * ratio * (a - baseline) * (a - F(3, 4))
        gradients.append(str(total))
    assert gradients == ["0", "-3/16"] == _under_a_clip().numbers["gradient"]


def test_two_prompts_by_plain_loops():
    """Groups of 8, success rates 1/2 and 1/20: the sum of the two gradients turns around."""
    scales = []
    for p in (0.5, 0.05):
        covered = 0.0
        for k in range(1, 8):
            chance, mean = math.comb(8, k) * p**k * (1 - p) ** (8 - k), k / 8
            std = math.sqrt((k * (1 - mean) ** 2 + (8 - k) * mean**2) / 7)
            covered += chance * (mean * (1 - mean) * (1 - p) + (1 - mean) * mean * p) / std
        scales.append(covered / (p * (1 - p)))
    found = _two_prompts(normalized).numbers
    np.testing.assert_allclose(found["scales"], scales, rtol=1e-10)
    assert found["true"] == pytest.approx(0.25 - 4.5 * 0.0475)
    assert found["divided"] == pytest.approx(0.25 * scales[0] - 4.5 * 0.0475 * scales[1])
    assert round(found["divided"], 3) == -0.061


def test_frozen_copy_wins_and_losses():
    world = against_frozen_copy(three_rewards((0, 1, 10)))
    assert enumerate_trajectories(world).returns.tolist() == [F(-1, 2), F(1, 4), F(3, 4)]


def test_lengths_by_hand():
    world = stop_later()
    paths = enumerate_trajectories(world)
    strings = [tuple(map(int, row[live])) for row, live in zip(paths.actions, paths.live, strict=True)]
    assert strings == [(0,), (1, 0), (1, 1, 0), (1, 1, 1)]
    assert response_length(paths).tolist() == [1, 2, 3, 3]
    assert paths.behavior_probability.tolist() == [F(1, 2), F(1, 8), F(3, 16), F(3, 16)]
    divided = per_length(paths, response_length(paths), F(1, 3))
    assert enumerate_trajectories(divided).returns.tolist() == [F(-1, 3), F(1, 3), F(2, 9), F(2, 9)]
    # After going on, b stops with 1/4 and pi with 1/2.
    for who, share in (("behavior", F(1, 4)), ("target", F(1, 2))):
        inverse = expected_inverse_length(world, who)
        assert inverse[0, 0].tolist() == [1, share / 2 + (1 - share) / 3]
    # A^pi = +-1/2 and g = +-1/2 at the first token: all products are 1/4, rho_1 = 1, and later advantages are 0.
    off, on, true = (value[1] for value in length_weighted(paths))
    assert off == F(1, 4) * (F(1, 2) + F(1, 2) * F(3, 8))
    assert on == F(1, 4) * (F(1, 2) + F(1, 2) * F(5, 12))
    assert true == F(1, 4)


def test_tool_tokens_do_not_count():
    worlds = [w for w in trees_with_ends(Context(0), "tools", 40) if "tool" in w.name]
    shorter = 0
    for world in worlds:
        paths = enumerate_trajectories(world)
        assert response_length(paths).tolist() == [sum(map(bool, row)) for row in paths.mask]
        shorter += int((paths.mask.sum(axis=1) < paths.live.sum(axis=1)).any())
    assert shorter > 0


def test_binary_keeps_the_policies_and_has_both_rewards():
    world = random_tree(np.random.default_rng(3), horizon=3)
    result = binary(world, np.random.default_rng(0))
    assert set(enumerate_trajectories(result).returns) == {0, 1}
    assert result.behavior is world.behavior
    assert on_policy(result).behavior is world.target
