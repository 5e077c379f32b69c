"""Claims 12 and 13: their engines against plain loops that know nothing of trees, worlds or the library."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from simulations.claims import noise_floor, trained_on
from simulations.claims.registry import Context
from simulations.claims.trained_on import Update, binary_tree

STRINGS = [(0, 0), (0, 1), (1, 0), (1, 1)]
PLACE = {
    "prefix": lambda prefix: {(): 0, (0,): 1, (1,): 2}[prefix],
    "position": len,
    "shared": lambda _prefix: 0,
}


def rule(parameters):
    """b(1) after a prefix, as a fraction of sixths that the sharing allows."""
    values = {"prefix": [2, 4, 3], "position": [2, 3], "shared": [4]}[parameters]
    return lambda prefix: Fraction(values[PLACE[parameters](prefix)], 6)


def reward(string):
    return {(0, 0): 0, (0, 1): 2, (1, 0): 1, (1, 1): 1}[string]


def walk(string):
    return [(string[:t], a) for t, a in enumerate(string)]


def one_after(parameters, moves):
    """pi(1) after a prefix once each logit has moved by an integer number of log 2."""

    def policy(prefix):
        odds = rule(parameters)(prefix) / (1 - rule(parameters)(prefix))
        odds = odds * Fraction(2) ** int(moves[PLACE[parameters](prefix)])
        return odds / (1 + odds)

    return policy


def probability(policy, string):
    return math.prod((policy(prefix) if a else 1 - policy(prefix) for prefix, a in walk(string)), start=Fraction(1))


def score(policy, parameters, string):
    total = [Fraction(0)] * 3
    for prefix, a in walk(string):
        total[PLACE[parameters](prefix)] += a - policy(prefix)
    return total


def by_hand(parameters, step, size, advantages, judged):
    """E rho_2 and the bias of rho_2 R sum g, by loops over groups, judged responses and parameters."""
    b = rule(parameters)
    mean, bias = Fraction(0), [Fraction(0)] * 3
    for group in itertools.product(STRINGS, repeat=size):
        weight = math.prod((probability(b, string) for string in group), start=Fraction(1))
        advantage = advantages([Fraction(reward(string)) for string in group])[0]
        moves = [step * advantage * g for g in score(b, parameters, group[0])]
        assert all(m.denominator == 1 for m in moves)
        pi = one_after(parameters, moves)
        gradient = [
            sum(probability(pi, s) * reward(s) * score(pi, parameters, s)[k] for s in STRINGS) for k in range(3)
        ]
        if judged == "fresh":
            cases = [(probability(b, s), s) for s in STRINGS]
        else:
            cases = [(Fraction(1), group[0 if judged == "own" else 1])]
        for p, string in cases:
            rho = probability(pi, string) / probability(b, string)
            mean += weight * p * rho
            for k in range(3):
                bias[k] += weight * p * (rho * reward(string) * score(pi, parameters, string)[k] - gradient[k])
    return mean, bias


ADVANTAGES = {
    "raw": (trained_on.raw, lambda r: r),
    "mean": (trained_on.group_mean, lambda r: [x - Fraction(sum(r), len(r)) for x in r]),
    "others": (trained_on.leave_one_out, lambda r: [x - Fraction(sum(r) - x, len(r) - 1) for x in r]),
}


@pytest.mark.parametrize("parameters", PLACE)
@pytest.mark.parametrize(
    ("size", "kind", "judged"),
    [(1, "raw", "own"), (1, "raw", "fresh"), (2, "mean", "own"), (2, "mean", "same group"), (2, "others", "fresh")],
)
def test_updates_equal_plain_loops(parameters, size, kind, judged):
    ours, theirs = ADVANTAGES[kind]
    update = Update(binary_tree(2, rule(parameters), reward, parameters), Fraction(12), size=size, advantages=ours)
    mean, bias = by_hand(parameters, 12, size, theirs, judged)
    assert trained_on.mean_ratio(update, judged)[-1] == mean
    found = trained_on.gradient_bias(update, judged)
    assert sorted(x for x in found if x) == sorted(x for x in bias if x)
    assert (mean == 1) == (judged == "fresh")
    assert any(bias) == (judged != "fresh")


def test_first_order_is_the_derivative():
    world = binary_tree(2, rule("prefix"), reward).as_float()
    for advantages, size in ((trained_on.group_std, 4), (trained_on.raw, 1)):
        for judged in ("own", "same group")[: 1 + (size > 1)]:
            means = [
                trained_on.mean_ratio(Update(world, h, size=size, advantages=advantages), judged)[-1]
                for h in (1e-5, -1e-5)
            ]
            slope = trained_on.first_order(Update(world, 0.0, size=size, advantages=advantages), judged)
            # Steps are in units of log 2.
            assert slope * math.log(2) == pytest.approx((means[0] - means[1]) / 2e-5, rel=1e-6, abs=1e-9)
            assert abs(slope) > 1e-4


def test_a_step_out_of_the_fractions_is_refused():
    update = Update(binary_tree(1, lambda _p: Fraction(1, 3), lambda s: s[0]), Fraction(1))
    with pytest.raises(ValueError, match="step: must move logits by whole multiples of log 2"):
        trained_on.mean_ratio(update, "own")


def test_group_advantages():
    returns = np.array([1.0, 0.0, 0.0, 3.0])
    assert trained_on.group_mean(returns).tolist() == [0.0, -1.0, -1.0, 2.0]
    assert trained_on.leave_one_out(returns) == pytest.approx([0.0, -4 / 3, -4 / 3, 8 / 3])
    assert trained_on.group_std(returns) == pytest.approx(np.array([0.0, -1.0, -1.0, 2.0]) / math.sqrt(2))
    assert trained_on.group_std(np.ones(3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 0, 0], [0, 1, 0]])
def test_loss_terms_equal_plain_loops(order):
    def one(prefix):
        return (0.25, 0.5, 0.4)[PLACE["prefix"](prefix)]

    def p(logits, prefix):
        return 1 / (1 + math.exp(-logits[PLACE["prefix"](prefix)]))

    def chance(logits, string):
        return math.prod(p(logits, prefix) if a else 1 - p(logits, prefix) for prefix, a in walk(string))

    def g(logits, string):
        total = [0.0] * 3
        for prefix, a in walk(string):
            total[PLACE["prefix"](prefix)] += a - p(logits, prefix)
        return total

    start = [math.log(x / (1 - x)) for x in (0.25, 0.5, 0.4)]
    means = [0.0] * 3
    estimates, truths = [[0.0] * 3 for _ in order], [[0.0] * 3 for _ in order]
    for sample in itertools.product(STRINGS, repeat=3):
        weight = math.prod(chance(start, string) for string in sample)
        rewards = [reward(string) for string in sample]
        logits = list(start)
        for k, used in enumerate(order):
            advantage = rewards[used] - sum(rewards) / 3
            rho = chance(logits, sample[used]) / chance(start, sample[used])
            means[k] += weight * rho
            for d in range(3):
                estimates[k][d] += weight * rho * advantage * g(logits, sample[used])[d]
                truths[k][d] += weight * sum(chance(logits, s) * reward(s) * g(logits, s)[d] for s in STRINGS)
            logits = [x + 0.7 * advantage * y for x, y in zip(logits, g(logits, sample[used]), strict=True)]
    world = binary_tree(2, lambda prefix: Fraction(str(one(prefix))), reward)
    found = trained_on.loss_terms(world, order, 0.7, trained_on.group_mean, 3)
    assert found.mean == pytest.approx(means, rel=1e-12)
    bias = [math.dist(e, t) / math.hypot(*t) for e, t in zip(estimates, truths, strict=True)]
    assert found.relative_bias == pytest.approx(bias, rel=1e-10)


def log_ratio(x):
    """Of a fair token whose own logit has moved by x."""
    return math.log(2 / (1 + math.exp(-x)))


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_spread_of_loss_terms_equals_plain_loops(updates):
    step, length = 2 * trained_on.TOKEN_STEP, 2
    ends = []
    for sign in (1, -1):
        x = 0.0
        for _ in range(updates - 1):
            x += step * sign * (1 - 1 / (1 + math.exp(-x)))
        ends.append(length * log_ratio(x))
    expected = abs(ends[0] - ends[1]) / 2
    assert trained_on.spread_of_loss_terms(updates, length, True) == pytest.approx(expected, rel=1e-12)
    values = []
    for signs in itertools.product((1, -1), repeat=updates - 1):
        # Tokens of the earlier responses at two positions, then those of the one whose ratio is taken.
        for drawn in itertools.product((0, 1), repeat=length * updates):
            total = 0.0
            for t in range(length):
                x, tokens = 0.0, drawn[t * updates : (t + 1) * updates]
                for sign, a in zip(signs, tokens[:-1], strict=True):
                    x += step * sign * (a - 1 / (1 + math.exp(-x)))
                total += log_ratio(x if tokens[-1] else -x)
            values.append(total)
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    assert trained_on.spread_of_loss_terms(updates, length, False) == pytest.approx(spread, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("drift", [0.0, 0.0006])
def test_clip_rates_equal_sums_over_the_binomial(drift):
    x = trained_on.TOKEN_STEP
    for t in (1, 2, 3, 7, 40):
        low, high = -drift * t - 0.025 * math.sqrt(t), -drift * t + 0.05 * math.sqrt(t)
        clipped = 0.0
        for k in range(t + 1):
            value = k * log_ratio(x) + (t - k) * log_ratio(-x)
            clipped += math.comb(t, k) / 2**t * ((value < low) + (value > high)) / 2
        found = trained_on.clip_rates("fresh", np.array([t]), drift)[0]
        assert found == pytest.approx(clipped, abs=1e-12)
        own = ((t * log_ratio(x) > high) + (t * log_ratio(-x) < low)) / 2
        assert trained_on.clip_rates("own", np.array([t]), drift)[0] == own


def test_laws_of_noise_are_probabilities_with_the_stated_means():
    for law, mean in (
        (noise_floor.policy_change(3), Fraction(1)),
        (noise_floor.rounded_logits(3), Fraction(1)),
        (noise_floor.rounded_log_probabilities(3), Fraction(125, 64)),
    ):
        assert sum(law.values()) == 1
        assert sum(p * math.prod(row) for row, p in law.items()) == mean
        found = noise_floor.moments(law, 2)
        logs = [math.log(row[0] * row[1]) for row in law]
        center = sum(float(p) * x for p, x in zip(law.values(), logs, strict=True))
        assert found[1] == pytest.approx(center, abs=1e-15)
        second = sum(float(p) * (x - center) ** 2 for p, x in zip(law.values(), logs, strict=True))
        assert found[2] == pytest.approx(second)


def test_noise_is_drawn_as_it_says():
    rng = np.random.default_rng(1)
    free, normalized = (draw(rng, (400, 50), 0.1) for draw in (noise_floor.free_noise, noise_floor.normalized_noise))
    for x, mean, ratio in ((free, 0.0, math.exp(0.005)), (normalized, -0.005 * 63 / 64, 1.0)):
        error = 0.1 / math.sqrt(x.size)
        assert abs(x.mean() - mean) < 5 * error
        assert abs(np.exp(x).mean() - ratio) < 5 * error
        assert abs(x.std() - 0.1) < 0.005


def test_numbers_do_not_depend_on_how_many_cases_are_taken():
    for context in (Context(seed=2), Context(seed=2, quick=True)):
        evidence = list(trained_on.check_group(context, "same group"))
        assert evidence[0].numbers == {"same_group": "28/27", "own": "34/27"}
        assert all(e.holds for e in evidence)
