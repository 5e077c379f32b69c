"""Claim 4: prefix weights with an outcome reward, what they estimate, when they still win, and what is unbiased.

An outcome reward is not known when token t is written, so the cumulative ratio rho_t, which ends there, corrects the
past of the token and leaves its future to the behavior policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np

import ctpo
from ctpo.ratios import Level
from simulations import toy_lm
from simulations.claims.gradient_bias import SHARINGS, UNLIMITED
from simulations.claims.martingale import median_interval
from simulations.claims.registry import Claim, Context, Evidence
from simulations.claims.worlds import HALF, known, listed, random_trees, two_step
from simulations.exact import (
    AdvantageKind,
    GradientMoments,
    Trajectories,
    advantage_table,
    enumerate_trajectories,
    gradient_mean,
    gradient_moments,
    policy_gradient,
    rational_weights,
)
from simulations.mdp import (
    Parameters,
    TokenMDP,
    World,
    as_numbers,
    chain,
    independent_tokens,
    one_logit,
    random_policy,
    softmax,
    tree,
    zeros,
)
from simulations.monte_carlo import SummedGradient, estimate, z_scores, z_threshold

#: (N, H) weights of trajectories.
Weights = Callable[[Trajectories, str], np.ndarray]
THREE_QUARTERS = Fraction(3, 4)


def returns(paths: Trajectories) -> np.ndarray:
    """(N, H) the trajectory's return at each policy token, 0 elsewhere: the advantage that an outcome reward is."""
    return np.where(paths.mask, paths.returns[:, None], 0)


def both_ones(b: Fraction, pi: Fraction, horizon: int = 2, parameters: Parameters = "position") -> World:
    """Binary tokens, one logit per block, b(1) = b and pi(1) = pi after any prefix, and reward 1 if all are 1."""
    return one_logit(
        independent_tokens([1 - b, b], [1 - pi, pi], horizon, outcome=lambda s: int(all(s)), parameters=parameters)
    )


def ones_so_far(b: Fraction, pi: Fraction, horizon: int) -> World:
    """The same with a logit pair per position, as a Markov process of two states."""
    mdp = chain(
        "all ones", np.array([[1, 0], [1, 1]]), horizon=horizon, initial=0, outcome=np.array([1, 0]), exact=True
    )
    return World(mdp, as_numbers([[1 - b, b]] * 2, True), as_numbers([[1 - pi, pi]] * 2, True), "position")


def equal_tokens() -> World:
    """Reward 1 if both tokens agree; the first is fair, the second is 1 with b = 1/4 and pi = 3/4."""
    second = (Fraction(1, 4), THREE_QUARTERS)
    world = two_step((HALF, HALF), {0: second, 1: second})
    mdp = tree(2, 2, name="equal tokens", outcome=lambda s: int(s[0] == s[1]))
    return one_logit(World(mdp, world.behavior, world.target, "position"))


def only_step(values: np.ndarray, step: int) -> np.ndarray:
    """(N, H) values of one step of the stream, 0 at the others."""
    result = zeros(values.shape, values.dtype == object)
    result[:, step] = values[:, step]
    return result


# --- 4.expectation --------------------------------------------------------------------------------------------------


def check_expectation(context: Context, future: AdvantageKind) -> Iterator[Evidence]:
    """E_b[sum_t rho_t g_t R] = sum_t E_pi[g_t Q^b]; the bias is that of Q^b, the last token has none."""
    worlds = good = last = 0
    for world in random_trees(context, "outcome", 60, parameters=SHARINGS):
        worlds += 1
        paths = enumerate_trajectories(world)
        terms = rational_weights(paths, "cumulative") * returns(paths)
        found = paths.expectation(paths.summed_scores(terms))
        gap = paths.advantage(future) - paths.advantage("Q_target")
        on_policy = paths.expectation(paths.summed_scores(paths.advantage(future)), "target")
        bias = paths.expectation(paths.summed_scores(gap), "target")
        good += int(np.all(found == on_policy) and np.all(found - policy_gradient(world) == bias))
        step = world.mdp.horizon - 1
        off = paths.expectation(paths.summed_scores(only_step(terms, step)))
        on = paths.expectation(paths.summed_scores(only_step(paths.advantage("Q_target"), step)), "target")
        last += int(np.all(off == on))
    yield Evidence(
        "cumulative ratio with the return against sum_t E_pi[g_t Q^b], and its bias against "
        "sum_t E_pi[g_t (Q^b - Q^pi)]; the last token's term against E_pi[g_H Q^pi]",
        "enumeration",
        f"both identities on {good}, the last token unbiased on {last}, of {worlds} random trees, as fractions",
        good == last == worlds,
        {"worlds": worlds, "identities": good, "last_token": last},
    )
    yield _baselines(context)


def _baselines(context: Context) -> Evidence:
    """A constant and a leave-one-out baseline leave the expectation, the latter over every group of responses."""
    rng, worst, good, count = context.rng("baselines"), 0.0, 0, 0
    for world in random_trees(context, "baselines", 12, parameters=SHARINGS):
        paths = enumerate_trajectories(world)
        n = len(paths.returns)
        size = 3 if n <= 6 else 2
        scores = paths.summed_scores(rational_weights(paths, "cumulative"))
        expected = paths.expectation(scores * paths.returns[:, None])
        constant = as_numbers(rng.integers(1, 9), True)[()]
        group = np.array(list(product(range(n), repeat=size)))
        probability = paths.behavior_probability[group].prod(axis=1)
        reward = paths.returns[group]
        by_ctpo = ctpo.leave_one_out(reward.astype(float))
        exactly = reward - (reward.sum(axis=1, keepdims=True) - reward) / Fraction(size - 1)
        worst = max(worst, float(np.abs(by_ctpo - exactly.astype(float)).max()))
        grouped = (exactly[:, :, None] * scores[group]).sum(axis=1) / Fraction(size)
        count += 1
        good += int(
            np.all(paths.expectation(scores * (paths.returns - constant)[:, None]) == expected)
            and np.all((probability[:, None] * grouped).sum(axis=0) == expected)
        )
    return Evidence(
        "the same expectation with a constant and with a leave-one-out baseline (every group of 2 or 3 responses), "
        "ctpo.leave_one_out against fractions",
        "enumeration",
        f"constant and leave-one-out baselines change nothing on {good} of {count} trees, as fractions; "
        f"ctpo.leave_one_out within {worst:.0e}",
        good == count and worst < 1e-12,
        {"worlds": count, "unchanged": good, "largest_gap": worst},
    )


# --- 4.unbiased -----------------------------------------------------------------------------------------------------


def check_unbiased(context: Context, level: Level) -> Iterator[Evidence]:
    """Two binary tokens: the bias, the reversed sign, how often, and a sample that shows it."""
    world = equal_tokens()
    gradient, estimated = policy_gradient(world), gradient_mean(world, level, "one", outcome=True)
    yield Evidence(
        "R = 1{a1 = a2}, first token fair, second b(1) = 1/4, pi(1) = 3/4, gradient of both tokens' logits",
        "dynamic programming",
        f"R = 1{{a1 = a2}}: true gradient {listed(gradient)}, estimated {listed(estimated)}: it points the other way",
        [gradient[0], estimated[0], gradient[1], estimated[1]] == known("sign_reversal"),
        {"true": [str(g) for g in gradient], "found": [str(g) for g in estimated]},
    )
    ones = both_ones(HALF, THREE_QUARTERS)
    true, found = policy_gradient(ones)[0], gradient_mean(ones, level, "one", outcome=True)[0]
    yield Evidence(
        "R = a1 a2, b = 1/2, pi = 3/4, gradient of the first logit",
        "dynamic programming",
        f"R = a1 a2, first logit: true gradient {true}, estimated {found}",
        [true, found] == known("outcome_both_ones"),
        {"true": str(true), "found": str(found)},
    )
    biased = reversed_ = count = 0
    for tried in random_trees(context, "outcome bias", 80, parameters=SHARINGS):
        paths = enumerate_trajectories(tried)
        expected = policy_gradient(tried)
        mean = paths.expectation(paths.summed_scores(rational_weights(paths, level) * returns(paths)))
        count += 1
        biased += int(np.any(mean != expected))
        reversed_ += int((mean * expected).sum() < 0)
    yield Evidence(
        "random trees: biased, and with an angle of more than 90 degrees to the true gradient",
        "enumeration",
        f"biased on {biased} of {count} random trees, more than 90 degrees off on {reversed_}",
        2 * biased > count,
        {"worlds": count, "biased": biased, "reversed": reversed_},
    )
    n = context.count(80_000)
    floating = world.as_float()
    statistic = SummedGradient(floating, ctpo.Estimator(level=level, **UNLIMITED), "one", True)
    result = estimate(floating, statistic, n=n, seed=context.sequence("outcome sign"))
    limit = z_threshold(len(gradient))
    wrong, right = z_scores(result, gradient.astype(float)), z_scores(result, estimated.astype(float))
    yield Evidence(
        "the same world sampled, weights by ctpo.Estimator: distance from the true gradient, and from the predicted "
        "mean, in standard errors",
        "Monte Carlo",
        f"sampled: {wrong.max():.0f} standard errors from the true gradient, {right.max():.1f} from the predicted mean "
        f"(limit {limit:.2f}), n = {n}",
        bool(wrong.max() > 2 * limit and right.max() < limit),
        {"n": n, "z_true": float(wrong.max()), "z_predicted": float(right.max()), "limit": limit},
    )


# --- 4.additive -----------------------------------------------------------------------------------------------------

#: (numbers per step and token, string) -> outcome reward.
RewardRule = Callable[[np.ndarray, tuple[int, ...]], int]


def additive(numbers: np.ndarray, string: tuple[int, ...]) -> int:
    """Sum of a number per token."""
    return sum(int(numbers[t, a]) for t, a in enumerate(string))


def multiplicative(numbers: np.ndarray, string: tuple[int, ...]) -> int:
    """Product of a number per token."""
    result = 1
    for t, a in enumerate(string):
        result *= int(numbers[t, a])
    return result


def _biased(context: Context, name: str, count: int, policies: Parameters, rule: RewardRule) -> int:
    """On how many random trees of fixed length the cumulative ratio with the outcome is biased."""
    rng, found = context.rng(name), 0
    for _ in range(count):
        n_actions, horizon = int(rng.integers(2, 4)), int(rng.integers(2, 4))
        numbers = rng.integers(-2, 4, size=(horizon, n_actions))
        mdp = tree(n_actions, horizon, name="fixed length", outcome=partial(rule, numbers))
        behavior, target = (random_policy(mdp, rng, parameters=policies) for _ in range(2))
        world = World(mdp, behavior, target, "position")
        found += int(np.any(gradient_mean(world, "cumulative", "one", outcome=True) != policy_gradient(world)))
    return found


def check_additive(context: Context, rule: RewardRule) -> Iterator[Evidence]:
    """Additive rewards and policies that do not look back: no bias. Without either condition there is some."""
    count = max(12, context.count(32))
    bad = _biased(context, "additive", count, "position", rule)
    yield Evidence(
        "outcome reward a sum over tokens, policies that depend on the position only",
        "dynamic programming",
        f"biased on {bad} of {count} random trees, as fractions",
        bad == 0,
        {"worlds": count, "biased": bad},
    )
    ones = np.array([[0, 1]] * 3)
    world = independent_tokens(
        [HALF, HALF],
        [1 - THREE_QUARTERS, THREE_QUARTERS],
        3,
        outcome=lambda s: rule(ones, s),
        parameters="position",
    )
    true, found = policy_gradient(world)[1::2], gradient_mean(world, "cumulative", "one", outcome=True)[1::2]
    yield Evidence(
        "R = a1 + a2 + a3, b = 1/2, pi = 3/4: gradient of the three logits, true and estimated",
        "dynamic programming",
        f"R = a1 + a2 + a3: true {listed(true)}, estimated {listed(found)}",
        all([*pair] == known("outcome_additive") for pair in zip(true, found, strict=True)),
        {"true": [str(g) for g in true], "found": [str(g) for g in found]},
    )
    planted = 0
    for k in range(count):
        world = planted_world(context.rng(f"planted {k}"))
        planted += int(np.any(gradient_mean(world, "cumulative", "one", outcome=True) != policy_gradient(world)))
    yield Evidence(
        "rewards that are no sum and policies that look back, made so that Q^b - Q^pi is the same for every first "
        "token: that is enough",
        "dynamic programming",
        f"Q^b - Q^pi planted constant in the token: biased on {planted} of {count} trees",
        planted == 0,
        {"worlds": count, "biased": planted},
    )
    product_ = _biased(context, "product", count, "position", multiplicative)
    history = _biased(context, "history", count, "prefix", additive)
    yield Evidence(
        "without the conditions: products instead of sums, and sums under policies that look back",
        "dynamic programming",
        f"biased on {product_} of {count} trees with products, on {history} of {count} with policies that look back",
        min(product_, history) > 0,
        {"worlds": count, "biased_product": product_, "biased_history": history},
    )


def planted_world(rng: np.random.Generator) -> World:
    """Two tokens; the rewards after each first token are scaled so that E_b - E_pi of them is 1 after all."""
    bare = tree(3, 2)
    behavior, target = random_policy(bare, rng), random_policy(bare, rng)
    reward: dict[tuple[int, ...], Fraction] = {}
    second = [bare.labels.index(f"({a},)") for a in range(3)]
    for a, s in enumerate(second):
        drawn = as_numbers(rng.integers(-2, 5, size=3), True)
        gap = ((behavior[s] - target[s]) * drawn).sum()
        if gap == 0:  # the policies agree here, or these rewards cannot tell them apart
            target[s] = as_numbers([Fraction(k, 6) for k in (1, 2, 3)], True)
            behavior[s] = as_numbers([Fraction(k, 6) for k in (3, 2, 1)], True)
            drawn = as_numbers([3, 1, 0], True)
            gap = ((behavior[s] - target[s]) * drawn).sum()
        reward |= {(a, x): value / gap for x, value in enumerate(drawn)}
    return World(tree(3, 2, name="planted", outcome=lambda s: reward[s]), behavior, target, "position")


# --- bigram models with a reward for every string -------------------------------------------------------------------

TOKENS, LENGTH = 3, 5


@cache
def _strings() -> tuple[TokenMDP, np.ndarray, Trajectories]:
    """All strings of a bigram model: the tree, the row of logits that each prefix uses, and its trajectories."""
    mdp = tree(TOKENS, LENGTH, name=f"bigram n={TOKENS} H={LENGTH}, reward by string", exact=False)
    row = np.array([int(label.rstrip(",)")[-1]) if label != "()" else TOKENS for label in mdp.labels])
    uniform = np.full((mdp.n_states, TOKENS), 1.0 / TOKENS)
    return mdp, row, enumerate_trajectories(World(mdp, uniform, uniform, require_support=False))


def bigram_strings(logits: np.ndarray, step: np.ndarray, reward: np.ndarray) -> Trajectories:
    """Every string of a bigram language model whose outcome reward is any function of the string.

    Args:
        logits: (n + 1, n) of the behavior policy; the last row writes the first token.
        step: (n + 1, n) what the target adds to them.
        reward: One number per string.
    """
    mdp, row, paths = _strings()
    outcome = np.zeros(mdp.n_states)
    outcome[paths.final_state] = reward
    target = softmax(logits + step)
    scores = np.zeros((mdp.n_states, TOKENS, TOKENS + 1, TOKENS))
    states = np.arange(mdp.n_states)
    scores[states, :, row] = np.eye(TOKENS) - target[row][:, None]
    world = World(
        replace(mdp, outcome=outcome),
        softmax(logits)[row],
        target[row],
        scores=scores.reshape(mdp.n_states, TOKENS, -1),
        require_support=False,  # a softmax has it
    )
    return replace(paths, world=world)


def on_policy_gradient(paths: Trajectories) -> np.ndarray:
    """(D,) E_pi[R sum_t g_t]: no ratio."""
    return paths.expectation(paths.summed_scores(returns(paths)), "target")


def level_weights(paths: Trajectories, level: str) -> np.ndarray:
    """(N, H) weights by ctpo.log_ratio; "none" is 1."""
    if level == "none":
        return paths.mask.astype(float)
    logp, behavior_logp = paths.log_probabilities()
    return np.exp(ctpo.log_ratio(logp, behavior_logp, paths.mask, level=level))  # type: ignore[arg-type]


# --- 4.first_order --------------------------------------------------------------------------------------------------


#: (past, own, t) -> slope of the bias along the step, with past_t = E_b[x_t (R - c) sum_{k<t} x_k] and
#: own_t = E_b[x_t^2 (R - c)] for the positions t = 1..H.
Slope = Callable[[np.ndarray, np.ndarray, np.ndarray], float]


def _no_slope(past: np.ndarray, own: np.ndarray, t: np.ndarray) -> float:
    return 0.0


def _past(past: np.ndarray, own: np.ndarray, t: np.ndarray) -> float:
    return -float(past.sum())


def _twice(past: np.ndarray, own: np.ndarray, t: np.ndarray) -> float:
    return -2.0 * float(past.sum())


def _everything(past: np.ndarray, own: np.ndarray, t: np.ndarray) -> float:
    return -float((2 * past + own).sum())


#: Weight level and advantage -> slope of v.bias in the size of the step v.
FIRST_ORDER: Mapping[tuple[str, str], Slope] = {
    ("cumulative", "R"): _past,
    ("token", "R"): _twice,
    ("sequence", "R"): _no_slope,
    ("sequence_mean", "R"): lambda past, own, t: (1 - 1 / len(t)) * _everything(past, own, t),
    ("cumulative_mean", "R"): lambda past, own, t: -float((past + (1 - 1 / t) * (past + own)).sum()),
    ("none", "R"): _everything,
    ("token", "A_target"): _past,
    ("cumulative", "A_target"): _no_slope,
    ("sequence", "A_target"): _no_slope,
}
NAMES = {"sequence_mean": "GSPO", "cumulative_mean": "cumulative mean", "none": "no weight"}


def check_first_order(context: Context, law: Mapping[tuple[str, str], Slope]) -> Iterator[Evidence]:
    """Bias along a small step: the cumulative ratio has half of the token ratio's."""
    rng, count, size = context.rng("first order"), context.count(100), 1e-4
    position = np.arange(1, LENGTH + 1)
    worst = dict.fromkeys(law, 0.0)
    shares = []
    for _ in range(count):
        logits, direction = rng.standard_normal((2, TOKENS + 1, TOKENS))
        reward, baseline = rng.standard_normal(TOKENS**LENGTH), float(rng.standard_normal())
        here = bigram_strings(logits, 0 * direction, reward)
        x = _along(here, direction)
        centred = here.returns[:, None] - baseline
        past = here.expectation(x * centred * (np.cumsum(x, axis=1) - x))
        own = here.expectation(x**2 * centred)
        slope = dict.fromkeys(law, 0.0)
        for sign in (1, -1):
            there = bigram_strings(logits, sign * size * direction, reward)
            x = _along(there, direction)
            true = float(on_policy_gradient(there) @ direction.ravel())
            advantages = {"R": there.returns[:, None] - baseline, "A_target": there.advantage("A_target")}
            for level, advantage in law:
                weight = level_weights(there, level)
                bias = float(there.expectation((weight * advantages[advantage] * x).sum(axis=1))) - true
                slope[level, advantage] += sign * bias / (2 * size)
        for entry, predicted in law.items():
            worst[entry] = max(worst[entry], abs(slope[entry] - predicted(past, own, position)))
        shares.append(slope["cumulative", "R"] / slope["token", "R"])
    low, high = min(shares), max(shares)
    yield Evidence(
        "d(v.bias)/d(step) by central differences against the law, with the return less a constant (R) and with A^pi: "
        + ", ".join(f"{NAMES.get(level, level)} {a}" for level, a in law),
        "enumeration",
        f"{len(law)} slopes within {max(worst.values()):.1g} of the law on {count} bigram models; cumulative over "
        f"token ratio {low:.5f} to {high:.5f}",
        max(worst.values()) < 1e-6,
        {
            "worlds": count,
            "largest_error": {f"{level} {a}": e for (level, a), e in worst.items()},
            "share": [low, high],
        },
    )
    found = []
    for eps in (Fraction(1, 4), Fraction(1, 10), Fraction(1, 100)):
        world = both_ones(HALF, HALF + eps, parameters="shared")
        true_gradient = policy_gradient(world)
        found.append([gradient_mean(world, level, "one", outcome=True)[0] - true_gradient[0] for level in EXACT_PAIR])
    yield Evidence(
        "one shared logit, R = a1 a2, b = 1/2, pi = 1/2 + eps, eps = 1/4, 1/10, 1/100: bias of cumulative and token",
        "dynamic programming",
        f"exactly, eps = 1/4: cumulative {found[0][0]}, token {found[0][1]}; eps = 1/100: {found[2][0]}, {found[2][1]}",
        found[0] == known("half_of_the_bias") and all(2 * a == b != 0 for a, b in found),
        {"bias": [[str(x) for x in pair] for pair in found]},
    )
    yield _other_directions()


EXACT_PAIR = ("cumulative", "token")


def both_ones_by_position(first: Fraction, second: Fraction) -> World:
    """R = a1 a2, b fair, pi(1) of the first and of the second token, one logit per position."""
    world = two_step((HALF, first), {0: (HALF, second), 1: (HALF, second)})
    mdp = tree(2, 2, name="both ones", outcome=lambda s: s[0] * s[1])
    return one_logit(World(mdp, world.behavior, world.target, "position"))


def _other_directions() -> Evidence:
    """After a step on one logit alone the cumulative ratio keeps all of the token ratio's bias, or none of it."""
    here, there = HALF, Fraction(51, 100)
    bias: dict[str, list[list[Fraction]]] = {}
    for name, pair in (("first", (there, here)), ("second", (here, there)), ("both", (there, there))):
        world = both_ones_by_position(*pair)
        true = policy_gradient(world)
        bias[name] = [list(gradient_mean(world, level, "one", outcome=True) - true) for level in EXACT_PAIR]
    return Evidence(
        "two tokens with a logit each, R = a1 a2, b = 1/2, pi = 51/100 at the first token, at the second, at both: "
        "bias of the cumulative and of the token ratio on both logits",
        "dynamic programming",
        "bias on both logits, cumulative against token: "
        + "; ".join(f"step on {name}: ({listed(a)}) against ({listed(b)})" for name, (a, b) in bias.items()),
        [value for rows in bias.values() for row in rows for value in row] == known("step_on_one_logit"),
        {name: [[str(x) for x in row] for row in rows] for name, rows in bias.items()},
    )


def _along(paths: Trajectories, direction: np.ndarray) -> np.ndarray:
    """(N, H) x_t = v.g_t."""
    return (paths.world.local_scores @ direction.ravel())[paths.states, paths.actions]


# --- 4.variance -----------------------------------------------------------------------------------------------------


def outcome_of(paths: Trajectories) -> np.ndarray:
    """(N, H) the return, which is not known when the token is written."""
    return returns(paths)


def critic_of(paths: Trajectories) -> np.ndarray:
    """(N, H) Q^pi, which is."""
    return paths.advantage("Q_target")


def check_variance(context: Context, advantage: Callable[[Trajectories], np.ndarray]) -> Iterator[Evidence]:
    """With an outcome reward a token's term can vary more under its cumulative ratio than under the sequence's."""
    found = []
    for q in (Fraction(1, 4), HALF, THREE_QUARTERS):
        paths = enumerate_trajectories(both_ones_by_position(HALF, q))
        found.append([_term_variances(paths, level, advantage(paths))[0] for level in ("cumulative", "sequence")])
    yield Evidence(
        "R = a1 a2, first token fair under both, b(a2 = 1) = 1/2, pi = 1/4, 1/2, 3/4: variance of the first token's "
        "term under the cumulative and the sequence ratio",
        "enumeration",
        "pi = 1/4, 1/2, 3/4: cumulative against sequence " + "; ".join(f"{a} and {b}" for a, b in found),
        [value for pair in found for value in pair] == known("term_variance"),
        {"variance": [[str(x) for x in pair] for pair in found]},
    )
    count = reversed_ = 0
    for world in random_trees(context, "term variance", 48):
        paths = enumerate_trajectories(world.with_parameters("position"))
        value = advantage(paths)
        prefix, full = (_term_variances(paths, level, value) for level in ("cumulative", "sequence"))
        count += len(prefix)
        reversed_ += sum(a > b for a, b in zip(prefix, full, strict=True))
    yield Evidence(
        "terms of random trees that vary more under the cumulative ratio",
        "enumeration",
        f"the order is reversed for {reversed_} of {count} terms of random trees",
        reversed_ > 0 or context.quick,
        {"terms": count, "reversed": reversed_},
    )


def _term_variances(paths: Trajectories, level: str, value: np.ndarray) -> list[Any]:
    """Total variance of each token's term."""
    terms = rational_weights(paths, level) * value
    steps = range(terms.shape[1])
    return [paths.moments(paths.summed_scores(only_step(terms, t))).total_variance for t in steps]


# --- 4.crossover ----------------------------------------------------------------------------------------------------

#: (variance of the sequence estimator, of the cumulative one, squared bias of the latter) -> n*.
Crossover = Callable[[Any, Any, Any], Any]


def crossover(full: Any, prefix: Any, squared_bias: Any) -> Any:
    """n* = (Var_full - Var_prefix) / bias^2."""
    return (full - prefix) / squared_bias


def variance_ratio(full: Any, prefix: Any, squared_bias: Any) -> Any:
    """Wrong: the batch at which the two variances would match, which ignores the bias."""
    return full / prefix


def check_crossover(context: Context, n_star: Crossover) -> Iterator[Evidence]:
    """Below n* sequences the biased cumulative ratio has the smaller mean squared error, above it the sequence's."""
    rates = [Fraction(x, 100) for x in (51, 55, 60, 75, 90, 40)]
    found, agree = [], True
    for q in rates:
        world = both_ones(HALF, q)
        true = policy_gradient(world)[0]
        mean, prefix = _first_logit(world, "cumulative")
        full = _first_logit(world, "sequence")[1]
        found.append(n_star(full, prefix, (mean - true) ** 2))
        for n in (1, 10, 11, 1000):
            better = (mean - true) ** 2 + prefix / n < full / n
            agree &= better == (n < found[-1])
    formula = [3 * (q + HALF) / (q - HALF) for q in rates]
    yield Evidence(
        "R = a1 a2, b = 1/2, pi = q for both tokens, first logit: n* at q = .51, .55, .6, .75, .9, .4 against "
        "3 (q + 1/2) / (q - 1/2), and against which mean squared error is smaller at n = 1, 10, 11, 1000",
        "dynamic programming",
        f"n* = {listed(found)} at q = .51, .55, .6, .75, .9, .4: below 0 the cumulative ratio is biased and noisier",
        bool(agree and found == formula == known("crossover")),
        {"q": [str(q) for q in rates], "n_star": [str(n) for n in found]},
    )
    yield _batches_of_two()
    by_horizon, relative = [], []
    for horizon in range(2, 9):
        world = ones_so_far(HALF, Fraction(3, 5), horizon)
        true_gradient = policy_gradient(world)
        moments = {level: gradient_moments(world, level, "one", outcome=True) for level in ("cumulative", "sequence")}
        bias = ((moments["cumulative"].mean - true_gradient) ** 2).sum()
        relative.append(float(bias / (true_gradient**2).sum()) ** 0.5)
        by_horizon.append(n_star(moments["sequence"].total_variance, moments["cumulative"].total_variance, bias))
    yield Evidence(
        "R = 1 if all H tokens are 1, b = 1/2, pi = 3/5, trace over the logits of all positions, H = 2..8: n*, and "
        "the relative bias of the cumulative ratio",
        "dynamic programming",
        f"H = 2..8: n* = {', '.join(f'{float(n):.0f}' for n in by_horizon)}, relative bias {relative[0]:.2f} to "
        f"{relative[-1]:.2f}",
        [round(float(n)) for n in by_horizon] == [33, 48, 75, 123, 211, 370, 663]
        and [round(x, 2) for x in (relative[0], relative[-1])] == [0.12, 0.49],
        {"n_star": [str(n) for n in by_horizon], "relative_bias": relative},
    )
    yield from _bigram_crossover(context, n_star)


def _first_logit(world: World, level: str) -> tuple[Any, Any]:
    """Mean and variance of its component."""
    found = gradient_moments(world, level, "one", outcome=True, covariance=True)
    assert found.covariance is not None
    return found.mean[0], found.covariance[0, 0]


def _batches_of_two() -> Evidence:
    """The mean squared error of a batch mean, over every batch of two sequences."""
    world = both_ones(HALF, THREE_QUARTERS)
    paths = enumerate_trajectories(world)
    true, good, errors = policy_gradient(world)[0], True, []
    pair = np.array(list(product(range(len(paths.returns)), repeat=2)))
    probability = paths.behavior_probability[pair].prod(axis=1)
    for level in ("cumulative", "sequence"):
        summed = paths.summed_scores(rational_weights(paths, level) * returns(paths))[:, 0]
        error = (probability * (summed[pair].sum(axis=1) / Fraction(2) - true) ** 2).sum()
        mean, variance = _first_logit(world, level)
        errors.append(error)
        good &= error == (mean - true) ** 2 + variance / 2
    return Evidence(
        "mean squared error over every batch of 2 sequences, q = 3/4, against bias^2 + Var / n",
        "enumeration",
        f"every batch of two, q = .75: mean squared error {errors[0]} (cumulative) and {errors[1]} (sequence)",
        bool(good and errors[0] < errors[1]),
        {"cumulative": str(errors[0]), "sequence": str(errors[1])},
    )


STEPS = (0.1, 0.3, 1.0, 3.0)
#: Medians of 60 other models: of n* by kind of reward, and of the relative bias of cumulative and token ratio.
SPECIFIED_CROSSOVER = {"normal": (117, 117, 90, 144), "0/1": (500, 238, 110, 121)}
SPECIFIED_BIAS = np.array([[0.048, 0.148, 0.42, 0.81], [0.074, 0.206, 0.61, 1.05]])


def _bigram_crossover(context: Context, n_star: Crossover) -> Iterator[Evidence]:
    """Bigram models whose target is an ascent step: the median crossover and how often there is none."""
    every = _strings()[2]
    for kind in ("normal", "0/1"):
        rng, count = context.rng(f"crossover {kind}"), context.count(60)
        crossing = np.zeros((count, len(STEPS)))
        relative = np.zeros((2, count, len(STEPS)))
        for k in range(count):
            logits = rng.standard_normal((TOKENS + 1, TOKENS))
            n = len(every.returns)
            reward = rng.standard_normal(n) if kind == "normal" else (rng.random(n) < 0.2).astype(float)
            ascent = on_policy_gradient(bigram_strings(logits, np.zeros_like(logits), reward))
            ascent = ascent.reshape(logits.shape) / np.linalg.norm(ascent)
            for j, size in enumerate(STEPS):
                paths = bigram_strings(logits, size * ascent, reward)
                true = on_policy_gradient(paths)
                found: dict[str, GradientMoments] = {
                    level: paths.moments(paths.summed_scores(level_weights(paths, level) * returns(paths)))
                    for level in ("cumulative", "sequence", "token")
                }
                bias = {level: float(((found[level].mean - true) ** 2).sum()) for level in ("cumulative", "token")}
                crossing[k, j] = n_star(
                    found["sequence"].total_variance, found["cumulative"].total_variance, bias["cumulative"]
                )
                relative[:, k, j] = np.sqrt([bias["cumulative"], bias["token"]]) / np.linalg.norm(true)
        median, never = np.median(crossing, axis=0), (crossing < 0).mean(axis=0)
        bias_median = np.median(relative, axis=1)
        least, low_quarter, high_quarter, most = np.quantile(crossing, [0, 0.25, 0.75, 1])
        intervals = [] if context.quick else [median_interval(column, 2 * len(STEPS)) for column in crossing.T]
        holds = context.quick or bool(
            np.all(median[2:] > 1)
            and np.all(bias_median[0] < bias_median[1])
            and np.allclose(bias_median, SPECIFIED_BIAS, rtol=0.4)
            and all(low <= m <= high for (low, high), m in zip(intervals, SPECIFIED_CROSSOVER[kind], strict=True))
        )
        yield Evidence(
            f"bigram models, 3 tokens, H = 5, {kind} reward by string, ascent steps of {listed(STEPS)} in the logits, "
            f"{count} of each: median n*, share with n* < 0, range and middle half of all n*, median "
            "relative bias of cumulative and token ratio",
            "enumeration",
            f"bigram models, {kind} reward, |step| {listed(STEPS)}: median n* "
            f"{', '.join(f'{x:.0f}' for x in median)} (below 0 on {', '.join(f'{100 * x:.0f}' for x in never)} %; all "
            f"from {least:.0f} to {most:.0f}, half from {low_quarter:.0f} to {high_quarter:.0f}), "
            f"relative bias {listed(bias_median[0])} (token ratio {listed(bias_median[1])})",
            holds,
            {
                "steps": list(STEPS),
                "median": median.tolist(),
                "range": [float(x) for x in (least, low_quarter, high_quarter, most)],
                "interval": intervals,
                "negative": never.tolist(),
                "relative_bias": bias_median.tolist(),
            },
        )


# --- 4.per_decision and 4.doubly_robust -----------------------------------------------------------------------------


def rewards_by_token(paths: Trajectories) -> np.ndarray:
    """(N, H) rewards credited to policy tokens: those of a tool, and the outcome, to the last one before."""
    mdp = paths.world.mdp
    reward = np.where(paths.live, mdp.reward[paths.states, paths.actions], 0)
    credited = zeros(reward.shape, mdp.exact)
    rows, place = np.arange(len(reward)), np.zeros(len(reward), dtype=np.int64)  # the policy writes the first token
    for t in range(reward.shape[1]):
        place = np.where(paths.mask[:, t], t, place)
        credited[rows, place] += reward[:, t]
    credited[rows, place] += mdp.outcome[paths.final_state]
    return credited


def from_here_on(values: np.ndarray) -> np.ndarray:
    """(N, H) sums from each step to the end."""
    return np.flip(np.cumsum(np.flip(values, axis=1), axis=1), axis=1)


def rho_before(paths: Trajectories, rho: np.ndarray) -> np.ndarray:
    """(N, H) cumulative ratio up to the policy token before."""
    before = zeros(rho.shape, rho.dtype == object)
    running = before[:, 0] + 1
    for t in range(rho.shape[1]):
        before[:, t] = running
        running = np.where(paths.mask[:, t], rho[:, t], running)
    return before


def weighted_reward_to_go(paths: Trajectories) -> np.ndarray:
    """(N, H) sum_{k>=t} rho_k c_k by multiplication."""
    return from_here_on(rational_weights(paths, "cumulative") * rewards_by_token(paths))


def in_floats(paths: Trajectories) -> Trajectories:
    """The same trajectories of the world in float64."""
    return replace(paths, world=paths.world.as_float(), environment=paths.environment.astype(float))


#: (rewards, logp, behavior_logp, mask) -> advantages, as ctpo.per_decision.
Credit = Callable[..., np.ndarray]


def unweighted_reward_to_go(
    rewards: np.ndarray, logp: np.ndarray, behavior_logp: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """Wrong: later rewards keep the behavior policy's weight."""
    return from_here_on(rewards)


def check_per_decision(context: Context, credit: Credit) -> Iterator[Evidence]:
    """sum_t g_t sum_{k>=t} rho_k c_k is unbiased, and ctpo.per_decision gives it."""
    worlds = good = 0
    worst = bias = 0.0
    for world in random_trees(context, "per decision", 80, parameters=SHARINGS):
        worlds += 1
        paths = enumerate_trajectories(world)
        gradient = policy_gradient(world)
        exactly = weighted_reward_to_go(paths)
        good += int(np.all(paths.expectation(paths.summed_scores(exactly)) == gradient))
        logp, behavior_logp = paths.log_probabilities()
        advantages = credit(rewards_by_token(paths).astype(float), logp, behavior_logp, paths.mask)
        floating = in_floats(paths)
        weighted = np.where(paths.mask, level_weights(floating, "cumulative") * advantages, 0.0)
        worst = max(worst, float(np.abs(weighted - np.where(paths.mask, exactly, 0).astype(float)).max()))
        mean = floating.expectation(floating.summed_scores(weighted))
        bias = max(bias, float(np.abs(mean - gradient.astype(float)).max()))
    yield Evidence(
        "sum_t g_t sum_{k>=t} rho_k c_k against the gradient, as fractions; rho_t times ctpo.per_decision against it "
        "on every path",
        "enumeration",
        f"unbiased on {good} of {worlds} random trees, as fractions; ctpo.per_decision within {worst:.0e} on every "
        f"path, bias <= {bias:.0e}",
        good == worlds and worst < 1e-9 and bias < 1e-9,
        {"worlds": worlds, "unbiased": good, "largest_gap": worst, "largest_bias": bias},
    )
    rng, ratios, same = context.rng("per decision variance"), [], 0.0
    for _ in range(context.count(40)):
        logits = rng.standard_normal((TOKENS + 1, TOKENS))
        paths = bigram_strings(logits, 0.5 * rng.standard_normal(logits.shape), rng.standard_normal(TOKENS**LENGTH))
        logp, behavior_logp = paths.log_probabilities()
        rho, full = level_weights(paths, "cumulative"), level_weights(paths, "sequence")
        outcome_only = rho * credit(rewards_by_token(paths), logp, behavior_logp, paths.mask)
        same = max(same, float(np.abs(outcome_only - full * returns(paths)).max()))
        dense = rng.standard_normal((TOKENS, TOKENS))[paths.actions[:, :-1], paths.actions[:, 1:]]
        dense = np.column_stack([np.zeros(len(dense)), dense])
        decided = paths.moments(paths.summed_scores(rho * credit(dense, logp, behavior_logp, paths.mask)))
        whole = paths.moments(paths.summed_scores(full * dense.sum(axis=1, keepdims=True)))
        ratios.append(float(decided.total_variance / whole.total_variance))
    low, middle, high = np.quantile(ratios, [0, 0.5, 1])
    yield Evidence(
        "bigram models: variance against the full-sequence estimator with a reward per bigram; with an outcome alone "
        "both are the same on every path",
        "enumeration",
        f"rewards per bigram: variance {middle:.2f} ({low:.2f} to {high:.2f}) of the sequence ratio's; outcome reward: "
        f"the same on every path within {same:.0e}",
        bool(middle < 1 and same < 1e-9),
        {"variance_ratio": [float(x) for x in (low, middle, high)], "largest_gap": same},
    )


#: (world, (..., S, A) critic q) -> its state value v (..., S).
StateValue = Callable[[World, np.ndarray], np.ndarray]


def target_mean(world: World, q: np.ndarray) -> np.ndarray:
    """E_pi q in every state."""
    return (world.target * q).sum(axis=-1)


def behavior_mean(world: World, q: np.ndarray) -> np.ndarray:
    """Wrong: E_b q."""
    return (world.behavior * q).sum(axis=-1)


def doubly_robust_terms(paths: Trajectories, q: np.ndarray, state_value: StateValue) -> np.ndarray:
    """(N, H) sum_{k>=t} rho_k c_k + sum_{k>t} (rho_{k-1} v_k - rho_k q_k) - rho_t v_t by multiplication."""
    steps = np.arange(paths.states.shape[1])
    value = np.where(paths.mask, state_value(paths.world, q)[steps, paths.states], 0)
    of_token = paths.advantage(q)
    rho = rational_weights(paths, "cumulative")
    correction = rho_before(paths, rho) * value - rho * of_token
    return weighted_reward_to_go(paths) + from_here_on(correction) - correction - rho * value


def check_doubly_robust(context: Context, state_value: StateValue) -> Iterator[Evidence]:
    """Unbiased with any critic whose v is E_pi q; pathwise rho_t A^pi with Q^pi; the variance needs a good critic."""
    rng = context.rng("critics")
    worlds = good = pathwise = fixed = 0
    worst = bias = 0.0
    for world in random_trees(context, "doubly robust", 80, parameters=SHARINGS):
        worlds += 1
        paths = enumerate_trajectories(world)
        gradient = policy_gradient(world)
        shape = (world.mdp.horizon, *world.behavior.shape)
        q = as_numbers(rng.integers(-4, 5, size=shape), True)
        terms = doubly_robust_terms(paths, q, state_value)
        good += int(np.all(paths.expectation(paths.summed_scores(terms)) == gradient))
        steps = np.arange(shape[0])
        logp, behavior_logp = paths.log_probabilities()
        advantages = ctpo.doubly_robust(
            rewards_by_token(paths).astype(float),
            logp,
            behavior_logp,
            paths.advantage(q).astype(float),
            state_value(world, q)[steps, paths.states].astype(float),
            paths.mask,
        )
        rho = rational_weights(paths, "cumulative")
        floating = in_floats(paths)
        weighted = np.where(paths.mask, level_weights(floating, "cumulative") * advantages, 0.0)
        worst = max(worst, float(np.abs(weighted - np.where(paths.mask, terms, 0).astype(float)).max()))
        mean = floating.expectation(floating.summed_scores(weighted))
        bias = max(bias, float(np.abs(mean - gradient.astype(float)).max()))
        if np.all(paths.mask | ~paths.live):  # an environment's own randomness is beyond a critic
            fixed += 1
            terms = doubly_robust_terms(paths, advantage_table(world, "Q_target"), state_value)
            pathwise += int(np.all(np.where(paths.mask, terms - rho * paths.advantage("A_target"), 0) == 0))
    yield Evidence(
        "random critics with v = E_pi q: unbiased, as fractions; rho_t times ctpo.doubly_robust the same on every "
        "path; with Q^pi it is rho_t A^pi on every path (no tools)",
        "enumeration",
        f"unbiased with a random critic on {good} of {worlds} random trees, as fractions; ctpo.doubly_robust within "
        f"{worst:.0e} on every path, bias <= {bias:.0e}; with Q^pi equal to rho_t A^pi on every path of {pathwise} of "
        f"{fixed} trees",
        good == worlds and pathwise == fixed > 0 and worst < 1e-9 and bias < 1e-9,
        {"worlds": worlds, "unbiased": good, "pathwise": pathwise, "largest_gap": worst, "largest_bias": bias},
    )
    world = both_ones(HALF, THREE_QUARTERS)
    paths = enumerate_trajectories(world)
    exact_critic = advantage_table(world, "Q_target")
    critics = {
        "0": exact_critic * 0,
        "Q^b": advantage_table(world, "Q_behavior"),
        "Q^pi": exact_critic,
        "Q^pi/2": exact_critic * HALF,
        "3 Q^pi": exact_critic * 3,
    }
    found = {
        name: paths.moments(paths.summed_scores(doubly_robust_terms(paths, q, state_value))).total_variance
        for name, q in critics.items()
    }
    found["biased cumulative ratio"] = gradient_moments(world, "cumulative", "one", outcome=True).total_variance
    yield Evidence(
        "R = a1 a2, b = 1/2, pi = 3/4, one logit per token, total variance by critic (0: full-sequence ratio)",
        "enumeration",
        "variance by critic: " + ", ".join(f"{name}: {value}" for name, value in found.items()),
        list(found.values()) == known("critics"),
        {name: str(value) for name, value in found.items()},
    )
    yield _fitted_to_its_own_batch(state_value)


def _fitted_to_its_own_batch(state_value: StateValue) -> Evidence:
    """A critic of batch means, applied to the batch it was fitted to and to another one."""
    world = one_logit(
        independent_tokens([HALF, HALF], [1 - THREE_QUARTERS, THREE_QUARTERS], 1, outcome=sum, parameters="position")
    )
    paths = enumerate_trajectories(world)
    own = other = Fraction(0)
    for batch in product(range(len(paths.returns)), repeat=2):
        q = zeros((1, *world.behavior.shape), True)
        for n in batch:  # equal tokens have equal rewards here, so that their mean is any one's
            q[0, paths.states[n, 0], paths.actions[n, 0]] = paths.returns[n]
        gradients = paths.summed_scores(doubly_robust_terms(paths, q, state_value))[:, 0]
        probability = paths.behavior_probability[list(batch)].prod()
        own += probability * gradients[list(batch)].sum() / 2
        other += probability * paths.expectation(gradients)
    true = policy_gradient(world)[0]
    return Evidence(
        "one token, R = a, b = 1/2, pi = 3/4, q the mean reward of each token in a batch of two (0 where unseen): mean "
        "gradient on that batch, and on another",
        "enumeration",
        f"true gradient {true}; critic fitted to its own batch of two {own}, to another one {other}",
        [true, own, other] == known("critic_of_its_own_batch"),
        {"true": str(true), "own_batch": str(own), "other_batch": str(other)},
    )


# --- 4.performance_difference ---------------------------------------------------------------------------------------


def scores_so_far(coefficients: np.ndarray) -> np.ndarray:
    """Coefficients of sum_t C_t sum_{k<=t} g_k: every score gets what follows it."""
    return from_here_on(coefficients)


def own_score(coefficients: np.ndarray) -> np.ndarray:
    """Wrong: coefficients of sum_t C_t g_t."""
    return coefficients


def check_performance_difference(context: Context, attach: Callable[[np.ndarray], np.ndarray]) -> Iterator[Evidence]:
    """E_b[sum_t rho_t A^b_t sum_{k<=t} g_k] = grad J: a critic of the behavior policy is enough."""
    worlds = good = 0
    for world in random_trees(context, "performance difference", 80, parameters=SHARINGS):
        worlds += 1
        paths = enumerate_trajectories(world)
        terms = rational_weights(paths, "cumulative") * paths.advantage("A_behavior")
        good += int(np.all(paths.expectation(paths.summed_scores(attach(terms))) == policy_gradient(world)))
    yield Evidence(
        "sum_t rho_t A^b_t sum_{k<=t} g_k against the gradient",
        "enumeration",
        f"unbiased on {good} of {worlds} random trees, as fractions",
        good == worlds,
        {"worlds": worlds, "unbiased": good},
    )
    world = both_ones(HALF, THREE_QUARTERS, parameters="shared")
    paths = enumerate_trajectories(world)
    terms = rational_weights(paths, "cumulative") * paths.advantage("A_behavior")
    mean = paths.expectation(paths.summed_scores(attach(terms)))[0]
    detached = gradient_mean(world, "cumulative", "A_behavior")[0]
    yield Evidence(
        "one shared logit, R = a1 a2, b = 1/2, pi = 3/4: with A^b on all scores so far, and on the token's own alone",
        "enumeration",
        f"true gradient {policy_gradient(world)[0]}; A^b on all scores so far {mean}, on the token's own {detached}",
        [policy_gradient(world)[0], mean, detached] == known("all_scores_so_far"),
        {"so_far": str(mean), "own": str(detached)},
    )


# --- 4.lookahead ----------------------------------------------------------------------------------------------------

#: (trajectories, N) -> (N, H) weights.
Ahead = Callable[[Trajectories, int], np.ndarray]


def lookahead(paths: Trajectories, ahead: int) -> np.ndarray:
    """rho_min(t + N, H)."""
    return rational_weights(paths, "lookahead", ahead)


def token_counted_twice(paths: Trajectories, ahead: int) -> np.ndarray:
    """Wrong: N tokens from t on, not after it."""
    return rational_weights(paths, "lookahead", max(ahead - 1, 0))


def check_lookahead(context: Context, weights: Ahead) -> Iterator[Evidence]:
    """rho_min(t+N,H) g_t R has the mean of g_t R when pi writes up to N tokens past t, and b the rest."""
    worlds = cases = good = exact = needed = 0
    worst = 0.0
    for world in random_trees(context, "lookahead", 24, parameters=SHARINGS):
        worlds += 1
        paths = enumerate_trajectories(world)
        horizon, gradient = world.mdp.horizon, policy_gradient(world)
        rank = np.cumsum(paths.mask, axis=1)
        logp, behavior_logp = paths.log_probabilities()
        for ahead in range(horizon + 1):
            weight = weights(paths, ahead)
            found = paths.expectation(paths.summed_scores(weight * returns(paths)))
            expected = zeros(found.shape, True)
            for t in range(horizon):
                by_target = rank <= rank[:, t : t + 1] + ahead
                written = np.where(by_target, paths.target, paths.behavior).prod(axis=1) * paths.environment
                expected = expected + (written[:, None] * paths.summed_scores(only_step(returns(paths), t))).sum(axis=0)
            cases += 1
            good += int(np.all(found == expected))
            if ahead >= horizon - 1:
                needed += 1
                exact += int(np.all(found == gradient))
            log_weight = ctpo.log_ratio(logp, behavior_logp, paths.mask, level="lookahead", window=ahead)
            gap = np.where(paths.mask, np.exp(log_weight) - weight.astype(float), 0.0)
            worst = max(worst, float(np.abs(gap).max()))
    yield Evidence(
        "E_b[sum_t rho_min(t+N,H) g_t R] against the mean under pi for N tokens after t and b from then on, N = 0..H; "
        "N >= H - 1 against the gradient; weights by ctpo.log_ratio",
        "enumeration",
        f"{good} of {cases} identities on {worlds} random trees, as fractions; N >= H - 1 exact in {exact} of "
        f"{needed}; ctpo.log_ratio within {worst:.0e}",
        good == cases and exact == needed and worst < 1e-12,
        {"worlds": worlds, "identities": cases, "good": good, "exact": exact, "largest_gap": worst},
    )
    horizon, bias = 64, {}
    world = toy_lm.fitted_ngram(context.rng("lookahead lm"), order=2, horizon=horizon, rewards="outcome", step=2.0)
    gradient = policy_gradient(world)
    for ahead in (0, 4, 16, horizon - 1):
        found = gradient_mean(world, "lookahead", "one", window=ahead, outcome=True)
        bias[ahead] = float(np.linalg.norm(found - gradient) / np.linalg.norm(gradient))
    yield Evidence(
        f"{world.name}, reward for writing a word: relative bias with N = 0, 4, 16, 63",
        "dynamic programming",
        f"bigram model of a text, 64 characters, reward for a word: relative bias {listed(bias.values())} at "
        "N = 0, 4, 16, 63",
        bias[0] > bias[16] > bias[horizon - 1] and bias[horizon - 1] < 1e-9,
        {"N": list(bias), "relative_bias": list(bias.values())},
    )


CLAIMS = (
    Claim(
        "4.expectation",
        "With an outcome reward the cumulative ratio estimates sum_t E_pi[g_t Q^b]: its bias is that of Q^b for Q^pi.",
        "true if",
        "absolute continuity; a constant or a leave-one-out baseline changes nothing, the last token has no bias",
        "our own",
        check_expectation,
        "Q_behavior",
        "Q_target",
        "Q^pi instead of Q^b",
        "An outcome reward under the cumulative ratio trains each token for a future that the old policy writes, and "
        "no group baseline repairs that.",
    ),
    Claim(
        "4.unbiased",
        "The cumulative ratio with an outcome reward is an unbiased estimate of the policy gradient.",
        "false",
        "two binary tokens suffice, and the sign can be reversed: rho_t leaves the tokens after t to b",
        "arXiv:2605.07331, Prop. 1 read with the outcome advantage of its own objective",
        check_unbiased,
        "cumulative",
        "sequence",
        "the full-sequence ratio, which is unbiased",
        "Do not call CTPO with an outcome reward unbiased. In general that needs the exact advantage of the target "
        "policy, the full-sequence ratio, or one of the corrections below.",
    ),
    Claim(
        "4.additive",
        "The cumulative ratio with an outcome reward is unbiased if Q^b - Q^pi does not depend on the token.",
        "true if",
        "for example a reward that is a sum over tokens, and policies that do not look back",
        "our own",
        check_additive,
        additive,
        multiplicative,
        "a product instead of a sum",
        "There is no bias if the future's gap between b and pi does not depend on the token. Additive rewards with "
        "policies that do not look back are one such case; do not expect it of a right or wrong answer.",
    ),
    Claim(
        "4.first_order",
        "Near the behavior policy the bias along the step is -S1 for the cumulative, -2 S1 for the token ratio, "
        "-(1 - 1/H)(2 S1 + D) for GSPO and -(2 S1 + D) without weights: the cumulative ratio removes half.",
        "true if",
        "to first order in the step and along it, softmax policies; GSPO and cumulative mean: sequences of one length; "
        "S1 = sum_{k<t} E_b[x_k x_t R], D = sum_t E_b[x_t^2 (R - c)]",
        "our own",
        check_first_order,
        FIRST_ORDER,
        {**FIRST_ORDER, ("cumulative", "R"): _no_slope},
        "no bias for the cumulative ratio",
        "For small steps with an outcome reward CTPO's weight halves the bias of PPO's or GRPO's token ratio along the "
        "update direction; in other directions it can remove all of it or none. Along the update GSPO keeps nearly all "
        "that no correction at all has.",
    ),
    Claim(
        "4.variance",
        "With an outcome reward each token's term varies less under the cumulative ratio than under the sequence's.",
        "false",
        "the theorem needs an integrand that is known at token t; later ratios below 1 can shrink the sequence's term",
        "arXiv:2605.07331, Prop. 2(i) read with an outcome advantage",
        check_variance,
        outcome_of,
        critic_of,
        "Q^pi, which is known at token t",
        "The cumulative ratio's smaller variance is not guaranteed with an outcome reward; it is what one usually "
        "sees, not a theorem.",
    ),
    Claim(
        "4.crossover",
        "Below n* = (Var_sequence - Var_cumulative) / bias^2 sequences a batch the cumulative ratio has the smaller "
        "mean squared error, above it the sequence ratio.",
        "true if",
        "the cumulative ratio is biased; independent sequences; absolute continuity; n* below 0: the sequence ratio is "
        "better in every batch",
        "our own",
        check_crossover,
        crossover,
        variance_ratio,
        "the ratio of the variances",
        "Bias can buy variance: below n* the biased cumulative ratio has the smaller error. On these toy models n* ran "
        "from below 0 to some thousands, mostly tens to hundreds; compute it for your case.",
    ),
    Claim(
        "4.per_decision",
        "sum_t g_t sum_{k>=t} rho_k c_k is unbiased: weigh the reward at k with rho_k.",
        "true if",
        "absolute continuity; a reward known at its token; with an outcome alone it is the sequence ratio",
        "Precup, Sutton and Singh 2000",
        check_per_decision,
        ctpo.per_decision,
        unweighted_reward_to_go,
        "rewards to go without weights",
        "With rewards along the way use ctpo.per_decision: no bias, and usually less variance than the full-sequence "
        "ratio. With only a final reward it gains nothing.",
    ),
    Claim(
        "4.doubly_robust",
        "The doubly robust gradient is unbiased with any critic; with Q^pi it is rho_t A^pi on every path.",
        "true if",
        "absolute continuity; v = E_pi q in every state; the critic does not depend on the responses it is applied to",
        "Jiang and Li 2016; Huang and Jiang 2020",
        check_doubly_robust,
        target_mean,
        behavior_mean,
        "v = E_b q",
        "Such a critic with v = E_pi q adds no bias. A good one lowers the variance, a bad one can raise it above "
        "having none (here three times Q^pi). The exact Q^pi is not the variance optimum.",
    ),
    Claim(
        "4.performance_difference",
        "sum_t rho_t A^b_t sum_{k<=t} g_k is unbiased: with a critic of the behavior policy all earlier scores count.",
        "true if",
        "absolute continuity",
        "Kakade and Langford 2002, differentiated",
        check_performance_difference,
        scores_so_far,
        own_score,
        "the token's own score alone",
        "With the exact A^b of the behavior policy, let the gradient flow through the whole cumulative ratio, not the "
        "last token alone. The error of a critic fitted to data is a bias of its own.",
    ),
    Claim(
        "4.lookahead",
        "The weight rho_min(t+N,H) estimates sum_t E_pi[g_t Q] with Q for pi over N more tokens and then b: N = 0 is "
        "the cumulative ratio, N >= H - 1 exact.",
        "true if",
        "absolute continuity",
        "our own",
        check_lookahead,
        lookahead,
        token_counted_twice,
        "a window that counts the token itself",
        "The lookahead weight is a dial between CTPO and the full-sequence ratio. How far ahead is best depends on the "
        "size of the batch: the larger it is, the more the bias counts against the noise.",
    ),
)
