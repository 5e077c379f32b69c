"""Claim 11: three policies by plain loops over strings, against the weights and tables of the claims."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from proofs import counterexample
from simulations.claims import rollout_correction as claim
from simulations.claims.registry import Context
from simulations.claims.rollout_correction import COMBINATIONS, TABLE_CAP, capped, correction_weight
from simulations.mdp import as_numbers, random_policy, random_tree

F = Fraction
MU, OLD, PI = ({1: p, 0: 1 - p} for p in (F(1, 2), F(3, 5), F(3, 4)))


def by_loops(level: str, treatment: str, cap: Fraction, horizon: int = 3) -> tuple[Fraction, Fraction]:
    """Bias and variance of the logit's gradient, i.i.d. tokens, R = product, exact A^pi."""
    mean = square = F(0)
    for string in product((0, 1), repeat=horizon):
        chance = math.prod((MU[a] for a in string), start=F(1))
        step = [OLD[a] / MU[a] for a in string]
        total = F(0)
        for t, a in enumerate(string):
            weight = {
                "none": F(1),
                "token": step[t],
                "prefix": math.prod(step[: t + 1], start=F(1)),
                "sequence": math.prod(step, start=F(1)),
            }[level]
            if treatment != "exact" and weight > cap:
                weight = cap if treatment == "truncated" else F(0)
            rho = math.prod((PI[c] / OLD[c] for c in string[: t + 1]), start=F(1))
            alive = F(all(string[:t]))
            advantage = alive * (a - PI[1]) * PI[1] ** (horizon - t - 1)
            total += weight * rho * advantage * (a - PI[1])
        mean += chance * total
        square += chance * total**2
    gradient = horizon * PI[1] ** horizon * (1 - PI[1])  # of pi^H in the logit
    return mean - gradient, square - mean**2


def test_table_by_plain_loops():
    expected = [by_loops(level, treatment, TABLE_CAP) for level, treatment in COMBINATIONS]
    numbers = counterexample("correction_levels")
    names = [f"{level} {treatment}" for level, treatment in COMBINATIONS]
    assert numbers.pop("true gradient") == F(81, 256)
    assert list(numbers) == [f"{quantity}, {name}" for quantity in ("bias", "Var") for name in names]
    assert [(numbers[f"bias, {name}"], numbers[f"Var, {name}"]) for name in names] == expected
    assert claim.gradient_table(claim.table_rollouts()) == expected
    rows = claim.table()["rows"]
    assert [(row["level"], row["treatment"]) for row in rows] == list(COMBINATIONS)
    for row, (bias, spread) in zip(rows, expected, strict=True):
        assert row["bias"] == str(bias)
        assert row["variance"] == pytest.approx(float(spread))
        assert row["relative bias"] == pytest.approx(float(bias) * 256 / 81)
        assert row["error of 32"] == pytest.approx(math.sqrt(float(bias) ** 2 + float(spread) / 32) * 256 / 81)
        assert row["error of 1024"] == pytest.approx(math.sqrt(float(bias) ** 2 + float(spread) / 1024) * 256 / 81)


def test_weights_on_one_row():
    row = as_numbers([[F(2), F(1, 2), F(3)]], True)
    assert correction_weight(row, "none").tolist() == [[1, 1, 1]]
    assert correction_weight(row, "token").tolist() == [[2, F(1, 2), 3]]
    assert correction_weight(row, "prefix").tolist() == [[2, 1, 3]]
    assert correction_weight(row, "sequence").tolist() == [[3, 3, 3]]
    prefix = correction_weight(row, "prefix")
    assert capped(prefix, "exact", F(2)).tolist() == [[2, 1, 3]]
    assert capped(prefix, "truncated", F(2)).tolist() == [[2, 1, 2]]
    assert capped(prefix, "masked", F(2)).tolist() == [[2, 1, 0]]  # a weight at the cap is kept


def test_rollouts_hold_three_policies():
    world = random_tree(np.random.default_rng(2), horizon=3, eos=True, tool_share=0.4)
    old = random_policy(world.mdp, np.random.default_rng(3))
    r = claim.rollouts(world, old)
    for n, h in np.ndindex(*r.old.shape):
        state, action = r.paths.states[n, h], r.paths.actions[n, h]
        wrote = r.paths.mask[n, h]
        assert r.old[n, h] == (old[state, action] if wrote else 1)
        assert r.correction[n, h] == (old[state, action] / world.behavior[state, action] if wrote else 1)
        prefix = math.prod((world.target[s, a] / old[s, a] for s, a in policy_tokens(r.paths, n, h)), start=F(1))
        assert r.rho[n, h] == prefix
        assert isinstance(r.correction[n, h], Fraction)
    assert r.old_probability.sum() == 1


def policy_tokens(paths, n: int, last: int):
    """State and token of the policy's tokens up to a place."""
    return [(paths.states[n, k], paths.actions[n, k]) for k in range(last + 1) if paths.mask[n, k]]


def test_example_numbers_by_plain_loops():
    """Variance 3/10 against 1/4 at t = 1; E_mu rho_t = 15/16, 225/256 without correction; first update 143/500."""
    second = {"sequence": F(0), "prefix": F(0)}
    plain = [F(0), F(0)]
    first_update = F(0)
    for a, c in product((0, 1), repeat=2):
        chance = MU[a] * MU[c]
        ratio = PI[a] / OLD[a]
        second["prefix"] += chance * (OLD[a] / MU[a] * ratio) ** 2
        second["sequence"] += chance * (OLD[a] * OLD[c] / MU[a] / MU[c] * ratio) ** 2
        plain[0] += chance * ratio
        plain[1] += chance * ratio * PI[c] / OLD[c]
        p = OLD[1]
        first_update += chance * ((a - p) ** 2 * p + a * (c - p) ** 2)
    assert second["sequence"] - 1 == F(3, 10)
    assert second["prefix"] - 1 == F(1, 4)
    assert plain == [F(15, 16), F(225, 256)]
    assert first_update == F(143, 500)


@pytest.mark.parametrize("equal", [False, True])
def test_outcome_reward_before_the_first_update_by_plain_loops(equal):
    """mu = 1/4, pi = b = 1/2: the prefix correction misses 1/4 and 0 by giving 3/16 and -1/8."""
    mu, p = F(1, 4), F(1, 2)

    def outcome(s):
        return int(s[0] == s[1]) if equal else s[0] * s[1]

    true = prefix = sequence = F(0)
    for a, c in product((0, 1), repeat=2):
        u, v = (p / (mu if x else 1 - mu) for x in (a, c))
        chance, reward = p * p / u / v, outcome((a, c))
        true += p * p * reward * (a + c - 2 * p)
        prefix += chance * reward * (u * (a - p) + u * v * (c - p))
        sequence += chance * reward * u * v * (a + c - 2 * p)
    assert [true, prefix, sequence] == ([0, F(-1, 8), 0] if equal else [F(1, 4), F(3, 16), F(1, 4)])
    assert claim._first_update(outcome, claim.weighted_by("prefix")) == [true, prefix, sequence]


def test_capped_example_by_hand():
    """Weight 6 cut to 5: the gradient's term of token 1 shrinks by 5/6."""
    p = F(3, 5)
    terms = {a: (p if a else 1 - p) * (a - p) ** 2 for a in (0, 1)}
    assert sum(terms.values()) == F(6, 25)
    assert terms[0] + terms[1] * F(5, 6) == F(28, 125)
    r = claim.capped_world()
    assert sorted(r.correction[:, 0]) == [F(4, 9), 6]
    assert F(9, 10) * F(4, 9) + F(1, 10) * 5 == F(9, 10)


@pytest.mark.parametrize(("sigma", "length", "cap"), [(0.5, 1, 1.2), (0.3, 7, 2.0), (0.05, 40, 1.1)])
def test_truncated_weight_of_binary_tokens_by_plain_loops(sigma, length, cap):
    up = 1 / (1 + math.exp(sigma))
    expected = 0.0
    for k in range(length + 1):
        weight = math.exp(sigma * (2 * k - length))
        expected += math.comb(length, k) * up**k * (1 - up) ** (length - k) * min(weight, cap)
    assert claim.binary_truncated_weight(sigma, length, cap) == pytest.approx(expected, rel=1e-12)
    assert claim.binary_truncated_weight(sigma, length, 1e9) == pytest.approx(1.0, rel=1e-12)


def test_truncated_log_normal_weight_by_quadrature():
    for v, cap in ((0.2, 1.5), (2.0, 5.0), (9.0, 2.0)):
        x = np.linspace(-v / 2 - 12 * math.sqrt(v), -v / 2 + 12 * math.sqrt(v), 400_001)
        density = np.exp(-((x + v / 2) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v)
        expected = float(np.sum(np.minimum(np.exp(x), cap) * density) * (x[1] - x[0]))
        assert claim.mean_truncated_weight(np.array([v]), cap)[0] == pytest.approx(expected, rel=1e-4)
    assert claim.mean_truncated_weight(np.array([3.0]), 1e30)[0] == pytest.approx(1.0)


def test_random_rollouts_are_of_three_policies_and_every_sharing():
    found = list(claim.random_rollouts(Context(seed=4), "a name", 9))
    assert {r.paths.world.parameters for r in found} == {"prefix", "position", "shared"}
    for r in found:
        assert not np.all(r.correction == 1)
        assert not np.all(r.rho == 1)
        assert r.paths.behavior_probability.sum() == 1


def test_prefix_correction_is_the_conditional_mean_of_the_sequence_correction():
    """Why it is never noisier: E_mu[(b/mu)(whole) | tokens 1..t] = (b/mu)(1..t)."""
    world = random_tree(np.random.default_rng(7), horizon=3, eos=True)
    r = claim.rollouts(world, random_policy(world.mdp, np.random.default_rng(8)))
    whole, prefix = (correction_weight(r.correction, level) for level in ("sequence", "prefix"))
    chance = r.paths.behavior_probability
    for t in range(3):
        groups: dict[tuple[int, ...], list[int]] = {}
        for n in range(len(chance)):
            groups.setdefault(tuple(r.paths.actions[n, : t + 1][r.paths.mask[n, : t + 1]]), []).append(n)
        for rows in groups.values():
            mass = sum((chance[n] for n in rows), F(0))
            mean = sum((chance[n] * whole[n, t] for n in rows), F(0)) / mass
            assert all(prefix[n, t] == mean for n in rows)
