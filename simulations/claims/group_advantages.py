"""Claim 6, advantages: group baselines, division by the group's standard deviation, and length normalization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import scipy.special

import ctpo
from proofs import counterexample
from simulations.claims.gradient_bias import SHARINGS
from simulations.claims.registry import Claim, Context, Evidence
from simulations.claims.worlds import HALF, known, listed, random_trees, two_step
from simulations.exact import (
    Trajectories,
    Who,
    advantage_table,
    enumerate_trajectories,
    gradient_mean,
    policy_gradient,
    rational_weights,
    values,
)
from simulations.mdp import World, as_numbers, independent_tokens, policy_table, random_tree, tree, zeros

#: From rewards (M, G) of M groups to their advantages.
Advantage = Callable[[np.ndarray], np.ndarray]

#: Weights under which the expected sum of weighted scores is 0, so that a constant baseline is free.
FREE = ("token", "cumulative", "sequence")
#: Added to the standard deviation by ctpo.group_relative: too little to be seen.
TINY = 1e-13

# --- expectations over groups -----------------------------------------------------------------------------------------


def centered(rewards: np.ndarray) -> np.ndarray:
    """Reward minus the mean of the group, of Fractions too."""
    return rewards - rewards.sum(axis=-1, keepdims=True) / rewards.shape[-1]


def minus_others(rewards: np.ndarray) -> np.ndarray:
    """Reward minus the mean of the other responses, of Fractions too."""
    return rewards - (rewards.sum(axis=-1, keepdims=True) - rewards) / (rewards.shape[-1] - 1)


def pair_signs(rewards: np.ndarray) -> np.ndarray:
    """Pairs centered and divided by their population standard deviation |R_1 - R_2|/2: the sign of R_i - R_j."""
    return np.sign(rewards - rewards[..., ::-1])


def group_shares(probability: np.ndarray, rewards: np.ndarray, size: int, advantage: Advantage) -> np.ndarray:
    r"""Expected share of each response in the mean over its group, by enumeration of all groups.

    .. math:: u_n = E\Big[\frac1G \sum_i A_i 1\{\tau_i = n\}\Big], \qquad
        E\Big[\frac1G \sum_i A_i Y(\tau_i)\Big] = \sum_n u_n Y(n)

    Args:
        probability: (N,) of each response; the G members of a group are independent.
        rewards: (N,) of each response.
        size: G.
        advantage: From the rewards (N^G, G) of every group to the advantages.

    Returns:
        (N,) u, Fractions or float64 as the inputs are.
    """
    n = len(probability)
    members = np.indices((n,) * size).reshape(size, -1).T
    weight = probability[members].prod(axis=1)[:, None] / size
    shares = probability * 0
    np.add.at(shares, members, weight * advantage(rewards[members]))
    return shares


def total(shares: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """(D,) sum over responses of share times term (N, D)."""
    return (shares[:, None] * terms).sum(axis=0)


@dataclass(frozen=True)
class Baseline:
    """A group baseline: its advantages in exact arithmetic, those of `ctpo`, and the scale it is said to leave.

    The scale is that of the raw-reward expectation, a function of the group's size.
    """

    exact: Advantage
    library: Advantage
    scale: Callable[[int], Fraction]


GROUP_MEAN = Baseline(centered, ctpo.group_relative, lambda size: 1 - Fraction(1, size))
LEAVE_ONE_OUT = Baseline(minus_others, ctpo.leave_one_out, lambda _size: Fraction(1))


def on_policy(world: World) -> World:
    """The world whose behavior policy is the target."""
    return replace(world, behavior=world.target)


def weighted_scores(paths: Trajectories, level: str) -> np.ndarray:
    """(N, D) sum over tokens of weight times score."""
    return paths.summed_scores(rational_weights(paths, level))


def with_returns(terms: np.ndarray, paths: Trajectories) -> np.ndarray:
    """(D,) E_b[R Y] of (N, D) terms Y."""
    return paths.expectation(paths.returns[:, None] * terms)


def group_sizes(n_responses: int) -> tuple[int, ...]:
    """Sizes of groups whose products are few enough to list."""
    return (2, 3) if n_responses <= 9 else (2,)


def compare_baseline(context: Context, name: str, baseline: Baseline) -> tuple[Evidence, Evidence]:
    """E over groups against the said scale times the raw-reward expectation: exact, and with the library's floats."""
    worlds = comparisons = good = 0
    gap = 0.0
    for world in random_trees(context, name, 24, parameters=SHARINGS):
        worlds += 1
        for levels, situation in ((FREE, world), (("none",), on_policy(world))):
            paths = enumerate_trajectories(situation)
            probability, rewards = paths.behavior_probability, paths.returns
            for size in group_sizes(len(rewards)):
                shares = group_shares(probability, rewards, size, baseline.exact)
                by_library = group_shares(probability.astype(float), rewards.astype(float), size, baseline.library)
                for level in levels:
                    terms = weighted_scores(paths, level)
                    claimed = baseline.scale(size) * with_returns(terms, paths)
                    comparisons += 1
                    good += int(np.all(total(shares, terms) == claimed))
                    found = total(by_library, terms.astype(float))
                    gap = max(gap, float(np.abs(found - claimed.astype(float)).max()))
    exact = Evidence(
        "mean over all groups of G = 2, 3 independent responses of A_i sum_t w_t g_t against the said scale times "
        "E_b[R sum_t w_t g_t]: w = 1 on-policy; r_t, rho_t and rho_H off-policy; as fractions",
        "enumeration",
        f"{good} of {comparisons} vector equalities on {worlds} random trees",
        good == comparisons,
        {"worlds": worlds, "equalities": comparisons, "exact": good},
    )
    library = Evidence(
        "the same with the advantages of ctpo in float64 against the exact value",
        "enumeration",
        f"advantages by ctpo: gap <= {gap:.0e} in {comparisons} comparisons",
        gap < 1e-12,
        {"largest_gap": gap},
    )
    return exact, library


def bandit(behavior: Fraction, target: Fraction, rewards: tuple[Any, Any] = (0, 1)) -> World:
    """One binary token with probability `behavior` and `target` of a 1."""
    mdp = tree(2, 1, name="bandit", outcome=lambda s: rewards[s[0]])

    def policy(one: Fraction) -> np.ndarray:
        return policy_table(mdp, lambda _prefix: [1 - one, one])

    return World(mdp, policy(behavior), policy(target))


def sign_world() -> World:
    """R = 1{a1 = a2}; b = 1/2, then 1/4; pi = 1/2, then 3/4: an outcome reward under rho_t has the wrong sign."""
    ones = (Fraction(1, 4), Fraction(3, 4))
    policies = two_step((HALF, HALF), {0: ones, 1: ones})
    mdp = tree(2, 2, name="equal tokens", outcome=lambda s: int(s[0] == s[1]))
    return World(mdp, policies.behavior, policies.target, "position")


def check_mean(context: Context, baseline: Baseline) -> Iterator[Evidence]:
    """A mean that includes the response itself scales the expectation by 1 - 1/G."""
    yield from compare_baseline(context, "group mean", baseline)
    paths = enumerate_trajectories(bandit(HALF, HALF))
    terms = weighted_scores(paths, "none")
    probability, rewards = paths.behavior_probability, paths.returns
    sizes, true = (2, 4, 8), with_returns(terms, paths)[1]
    found = [total(group_shares(probability, rewards, size, baseline.exact), terms)[1] for size in sizes]
    claimed = [baseline.scale(size) * true for size in sizes]
    yield Evidence(
        "one binary token, p = 1/2, R = a: gradient 1/4; with the group mean of G = 2, 4, 8",
        "enumeration",
        f"bandit: gradient {true}; with the mean of G = 2, 4, 8: {listed(found)}",
        [true, *found] == known("group_mean") == [true, *claimed],
        {"gradient": str(true), "G": list(sizes), "with_group_mean": [str(f) for f in found]},
    )
    yield _under_a_root(baseline, "group mean")
    yield _under_a_clip()


def _under_a_root(baseline: Baseline, name: str) -> Evidence:
    """GSPO's ratio: E_b[sum w g] is not 0, so a baseline does more than scale."""
    world = independent_tokens(
        [Fraction(4, 5), Fraction(1, 5)], [Fraction(1, 5), Fraction(4, 5)], 2, outcome=lambda s: s[0] * s[1]
    )
    paths = enumerate_trajectories(world)
    terms = weighted_scores(paths, "sequence_mean")
    free, raw = paths.expectation(terms)[1], with_returns(terms, paths)[1]
    shares = group_shares(paths.behavior_probability, paths.returns, 2, baseline.exact)
    found, scale = total(shares, terms)[1], baseline.scale(2)
    moved = scale * (raw - paths.expectation(paths.returns) * free)
    numbers = counterexample("baseline_under_a_root")
    return Evidence(
        "not under GSPO's ratio: one shared logit, H = 2, b = 1/5, pi = 4/5, R = a1 a2: E_b[rho_H^(1/2) sum g]; raw "
        "reward; with the baseline, G = 2",
        "enumeration",
        f"under GSPO's ratio E_b[rho_H^(1/2) sum g] = {free}, not 0: raw {raw}, with the baseline {found}",
        [free, raw, found] == [numbers[key] for key in ("E[w sum g]", "no baseline", name)]
        and found == moved != scale * raw,
        {"mean_score": str(free), "raw": str(raw), "with_baseline": str(found)},
    )


def _under_a_clip() -> Evidence:
    """A window acts by the sign of the advantage, which the baseline sets."""
    paths = enumerate_trajectories(bandit(HALF, Fraction(3, 4)))
    weight = rational_weights(paths, "token")
    clipped = ctpo.Estimator("token", ctpo.RatioClip(0.2, 0.2))
    found = []
    for baseline in (0, 2):
        advantages = paths.returns[:, None] - baseline
        flags = clipped.coefficients(*paths.log_probabilities(), advantages.astype(float), paths.mask).weight != 0
        found.append(paths.expectation(paths.summed_scores(np.where(flags, weight * advantages, 0)))[1])
    return Evidence(
        "nor under a clip: one binary token, b = 1/2, pi = 3/4, R = a, window [4/5, 6/5]: expected gradient with the "
        "constant baselines 0 and 2; flags by ctpo.Estimator",
        "enumeration",
        f"clipped, b = 1/2, pi = 3/4: gradient {found[0]} with baseline 0, {found[1]} with baseline 2",
        found == known("baseline_under_a_clip"),
        {"baseline": [0, 2], "gradient": [str(f) for f in found]},
    )


# --- 6.leave_one_out ------------------------------------------------------------------------------------------------


def check_leave_one_out(context: Context, baseline: Baseline) -> Iterator[Evidence]:
    """Without itself in the mean the expectation is that of the raw reward, the outcome-reward bias included."""
    yield from compare_baseline(context, "leave one out", baseline)
    count = good = biased = 0
    for world in random_trees(context, "outcome bias", 20, parameters=SHARINGS):
        count += 1
        paths = enumerate_trajectories(world)
        shares = group_shares(paths.behavior_probability, paths.returns, 2, baseline.exact)
        bias = total(shares, weighted_scores(paths, "cumulative")) - policy_gradient(world)
        gap = advantage_table(world, "Q_behavior") - advantage_table(world, "Q_target")
        predicted = gradient_mean(world, "cumulative", gap)
        good += int(np.all(bias == predicted))
        biased += int(np.any(bias != 0))
    yield Evidence(
        "outcome reward under rho_t with the baseline, G = 2: its bias against sum_t E_pi[g_t (Q^b - Q^pi)]",
        "enumeration",
        f"the bias of an outcome reward under rho_t stays as it is: {good} of {count} random trees, not 0 on {biased}",
        good == count and biased > 0,
        {"worlds": count, "exact": good, "biased": biased},
    )
    world = sign_world()
    paths = enumerate_trajectories(world)
    terms, true = weighted_scores(paths, "cumulative"), policy_gradient(world)[1]
    found = [with_returns(terms, paths)[1]] + [
        total(group_shares(paths.behavior_probability, paths.returns, 2, advantage), terms)[1]
        for advantage in (baseline.exact, centered)
    ]
    yield Evidence(
        "R = 1{a1 = a2}, gradient of the first logit: true; under rho_t with raw R, with the baseline, with the mean",
        "enumeration",
        "R = 1{{a1 = a2}}: true gradient {}; under rho_t raw {}, with the baseline {}, with the group mean {}".format(
            true, *found
        ),
        [true, *found] == known("leave_one_out_sign"),
        {"true": str(true), "raw": str(found[0]), "baseline": str(found[1]), "group_mean": str(found[2])},
    )
    yield _under_a_root(baseline, "leave-one-out")
    yield _under_a_clip()


# --- 6.baseline_off_policy ------------------------------------------------------------------------------------------


def check_baseline_off_policy(context: Context, level: str) -> Iterator[Evidence]:
    """With weight 1 off-policy a baseline subtracts E_b[R] E_b[sum g_t], which is not 0."""
    comparisons = good = moved = 0
    for world in random_trees(context, "off-policy baseline", 24, parameters=SHARINGS):
        paths = enumerate_trajectories(world)
        terms, rewards = weighted_scores(paths, level), paths.returns
        raw = with_returns(terms, paths)
        taken = paths.expectation(rewards) * paths.expectation(terms)
        for size in group_sizes(len(rewards)):
            comparisons += 1
            own = total(group_shares(paths.behavior_probability, rewards, size, centered), terms)
            others = total(group_shares(paths.behavior_probability, rewards, size, minus_others), terms)
            good += int(np.all(others == raw - taken) and np.all(own == (1 - Fraction(1, size)) * (raw - taken)))
            moved += int(np.any(others != raw))
    yield Evidence(
        "leave-one-out gives E_b[R sum w_t g_t] - E_b[R] E_b[sum w_t g_t], the group mean (1 - 1/G) times that",
        "enumeration",
        f"identity exact in {good} of {comparisons} cases on random trees; the baseline changes the expectation in "
        f"{moved}",
        good == comparisons and moved > comparisons // 2,
        {"cases": comparisons, "exact": good, "changed": moved},
    )
    found: dict[str, list[Fraction]] = {}
    for name, rewards_ in (("R = a", (0, 1)), ("R = 1 + a", (1, 2))):
        world = bandit(HALF, Fraction(3, 4), rewards_)
        paths = enumerate_trajectories(world)
        terms = weighted_scores(paths, level)
        shares = group_shares(paths.behavior_probability, paths.returns, 2, minus_others)
        found[name] = [policy_gradient(world)[1], with_returns(terms, paths)[1], total(shares, terms)[1]]
    yield Evidence(
        "one binary token, b = 1/2, pi = 3/4, no weight: true gradient; raw reward; leave-one-out",
        "enumeration",
        "; ".join(f"{n}: true {t}, raw {raw}, leave-one-out {loo}" for n, (t, raw, loo) in found.items())
        + ": a constant added to the reward turns the raw estimate around, and the baseline turns it back",
        found["R = a"][0] == found["R = 1 + a"][0]
        and [*found["R = a"], *found["R = 1 + a"][1:]] == known("baseline_off_policy"),
        {name: [str(v) for v in three] for name, three in found.items()},
    )


# --- 6.std_binary ---------------------------------------------------------------------------------------------------


def std_scale(size: int, p: float, ddof: int = 1) -> float:
    r"""Scale that division by the group's standard deviation gives the gradient of a 0/1 reward.

    .. math:: c_G(p) = \sqrt{\tfrac{G - \mathrm{ddof}}{G}} \; \frac{E \sqrt{\hat p (1 - \hat p)}}{p (1 - p)},
        \qquad \hat p = K/G, \; K \sim \mathrm{Bin}(G, p)

    Args:
        size: G, responses in the group.
        p: Success rate under the behavior policy, in (0, 1).
        ddof: 1 for the sample standard deviation, 0 for the population one.

    Returns:
        E[A_i sum w g] / E[R_i sum w g], where A is 0 in a group of equal rewards.

    Example:
        >>> round(std_scale(8, 0.5), 3), round(std_scale(2, 0.3, ddof=0), 12)
        (1.736, 1.0)
    """
    k = np.arange(1, size)
    log_choose = scipy.special.gammaln(size + 1) - scipy.special.gammaln(k + 1) - scipy.special.gammaln(size - k + 1)
    mass = np.exp(log_choose + k * np.log(p) + (size - k) * np.log1p(-p))
    spread = (mass * np.sqrt(k / size * (1 - k / size))).sum()
    return float(np.sqrt((size - ddof) / size) * spread / (p * (1 - p)))


def many_responses(_size: int, p: float, _ddof: int = 1) -> float:
    """Wrong for finite groups: the law of infinite ones, 1/sqrt(p (1 - p))."""
    return float(1 / np.sqrt(p * (1 - p)))


def zero_std_share(size: int, p: float) -> float:
    """Probability that all rewards of a group are equal."""
    return float(p**size + (1 - p) ** size)


def normalized(rewards: np.ndarray) -> np.ndarray:
    """Centered and divided by the sample standard deviation, by ctpo."""
    return ctpo.group_relative(rewards, scale_by_std=True, eps=TINY)


def binary(world: World, rng: np.random.Generator) -> World:
    """The same world with an outcome reward of 0 or 1, both of which occur."""
    mdp = world.mdp
    outcome = as_numbers(rng.integers(0, 2, size=mdp.n_states), True)
    ends = np.unique(enumerate_trajectories(world).final_state)
    outcome[ends[0]], outcome[ends[-1]] = Fraction(0), Fraction(1)
    return replace(world, mdp=replace(mdp, outcome=outcome, reward=mdp.reward * 0))


def check_std_binary(context: Context, scale: Callable[[int, float, int], float]) -> Iterator[Evidence]:
    """With 0/1 rewards division by the standard deviation only scales a prompt's gradient, by c_G(p)."""
    rng = context.rng("std binary")
    comparisons = exact = 0
    worst = 0.0
    for world in random_trees(context, "std binary", 20, parameters=SHARINGS):
        for levels, situation in ((FREE, binary(world, rng)), (("none",), on_policy(binary(world, rng)))):
            paths = enumerate_trajectories(situation)
            probability, rewards = paths.behavior_probability, paths.returns
            p = float(paths.expectation(rewards))
            pairs = group_shares(probability, rewards, 2, pair_signs)
            for size in group_sizes(len(rewards)):
                shares = group_shares(probability.astype(float), rewards.astype(float), size, normalized)
                for level in levels:
                    terms = weighted_scores(paths, level)
                    raw = with_returns(terms, paths)
                    found = total(shares, terms.astype(float))
                    worst = max(worst, float(np.abs(found - scale(size, p, 1) * raw.astype(float)).max()))
                    comparisons += 1
                    exact += int(np.all(total(pairs, terms) == raw))
    yield Evidence(
        "ctpo.group_relative(scale_by_std=True) over all groups of G = 2, 3 against c_G(p) E_b[R sum_t w_t g_t], "
        "p = P_b(R = 1), on-policy and with r_t, rho_t, rho_H; G = 2 with the population std: scale 1, as fractions",
        "enumeration",
        f"gap <= {worst:.0e} in {comparisons} vectors; G = 2, population std: scale exactly 1 in {exact}",
        worst < 1e-11 and exact == comparisons,
        {"comparisons": comparisons, "largest_gap": worst, "pairs_exact": exact},
    )
    at = (0.01, 0.05, 0.125, 0.25, 0.5)
    gap = 0.0
    for size in range(2, 9):
        rewards = np.indices((2,) * size).reshape(size, -1).T.astype(float)
        successes = rewards.sum(axis=1)
        for p in at:
            probability = p**successes * (1 - p) ** (size - successes)
            for ddof, advantage in ((1, normalized(rewards)), (0, normalized(rewards) * np.sqrt(size / (size - 1)))):
                brute = float((probability * (advantage * rewards).mean(axis=1)).sum() / (p * (1 - p)))
                gap = max(gap, abs(brute / scale(size, p, ddof) - 1))
    found_scales = [scale(8, p, 1) for p in (0.01, 0.25, 0.5)]
    shares_ = [zero_std_share(8, p) for p in at]
    yield Evidence(
        "c_G(p) against all 2^G groups, G = 2..8, sample and population std; c_8 at p = .01, .25, .5; share of groups "
        "with equal rewards, G = 8, p = .01, .05, .125, .25, .5",
        "closed form",
        f"relative gap <= {gap:.0e}; c_8 = {', '.join(f'{c:.4g}' for c in found_scales)} at p = .01, .25, .5; no "
        f"signal in a share {listed(shares_)} of the groups",
        gap < 1e-11
        and np.allclose(found_scales, [2.44, 1.895, 1.736], rtol=0, atol=[6e-3, 6e-4, 6e-4])
        and np.allclose(shares_, [0.92, 0.66, 0.34, 0.10, 0.008], rtol=0, atol=[6e-3, 6e-3, 6e-3, 6e-3, 6e-4]),
        {"largest_gap": gap, "c_8": found_scales, "p": list(at), "zero_std_share": shares_},
    )
    grid = np.linspace(0.001, 0.5, 500)
    over_grid = [scale(8, float(p), 1) for p in grid]
    spans = [scale(size, 0.01, 1) / scale(size, 0.5, 1) for size in (2, 8, 64, 1024)]
    limit = many_responses(0, 0.01) / many_responses(0, 0.5)
    yield Evidence(
        "how much more a prompt with p = .01 is weighted than one with p = .5, G = 2, 8, 64, 1024, and by the law of "
        "infinite groups, 1/sqrt(p (1 - p)); c_8 over p in [.001, .5]",
        "closed form",
        f"weight at p = .01 over p = .5: {listed(spans)} for G = 2, 8, 64, 1024; infinite groups {limit:.2g}; "
        f"c_8 falls from {over_grid[0]:.3g} (7/sqrt(8) at p = 0) to {over_grid[-1]:.3g}",
        abs(spans[1] - 1.4) < 0.05
        and abs(limit - 5) < 0.05
        and abs(spans[0] - 1) < 1e-12
        and abs(spans[3] / limit - 1) < 0.05
        and bool(np.all(np.diff(over_grid) < 0))
        and over_grid[0] < 7 / np.sqrt(8),
        {"G": [2, 8, 64, 1024], "ratio": spans, "infinite": limit},
    )


# --- 6.std_sign -----------------------------------------------------------------------------------------------------


def three_rewards(rewards: tuple[int, int, int], rare: Fraction = Fraction(1, 4)) -> World:
    """One token of three, each with its reward; pi = (1/2, 1/2 - rare, rare)."""
    mdp = tree(3, 1, name="three rewards", outcome=lambda s: rewards[s[0]])
    policy = policy_table(mdp, lambda _prefix: [HALF, HALF - rare, rare])
    return World(mdp, policy, policy)


def against_frozen_copy(world: World) -> World:
    """The world whose outcome is the chance to win minus the chance to lose against an independent draw from b."""
    paths = enumerate_trajectories(world)
    outcome = zeros(world.mdp.n_states, True)
    for end, own in zip(paths.final_state, paths.returns, strict=True):
        outcome[end] = (paths.behavior_probability * np.sign(own - paths.returns)).sum()
    return replace(world, mdp=replace(world.mdp, outcome=outcome, reward=world.mdp.reward * 0))


def check_std_sign(context: Context, pairs: tuple[Advantage, Advantage]) -> Iterator[Evidence]:
    """Three reward levels: division by the standard deviation turns the expected gradient around."""
    exact, library = pairs
    found: dict[str, list[Fraction]] = {}
    for rewards in ((0, 1, 10), (0, 1, 4)):
        paths = enumerate_trajectories(three_rewards(rewards))
        terms = weighted_scores(paths, "none")
        shares = group_shares(paths.behavior_probability, paths.returns, 2, exact)
        found[str(rewards)] = [policy_gradient(paths.world)[1], total(shares, terms)[1]]
    yield Evidence(
        "one token, pi = (1/2, 1/4, 1/4), gradient of the second logit: true; G = 2 with the population std",
        "enumeration",
        "; ".join(f"rewards {name}: true {t}, normalized {n}" for name, (t, n) in found.items()),
        found == {"(0, 1, 10)": known("std_sign"), "(0, 1, 4)": known("std_sign_small")},
        {name: [str(v) for v in both] for name, both in found.items()},
    )
    sizes = (2, 3, 4, 8)
    usual, rare = three_rewards((0, 1, 10)), three_rewards((0, 1, 40), Fraction(1, 32))
    by_size = [_second_logit(usual, size, library) for size in sizes]
    at_eight, true = _second_logit(rare, 8, library), policy_gradient(rare)[1]
    yield Evidence(
        "the advantages of ctpo (sample std): rewards 0, 1, 10 in groups of 2, 3, 4, 8; rewards 0, 1, 40 with "
        "pi = (1/2, 15/32, 1/32) in groups of 8",
        "enumeration",
        f"advantages by ctpo, rewards 0, 1, 10, G = 2, 3, 4, 8: {listed(by_size)}, true -7/16; rewards 0, 1, 40 with a "
        f"rare 40, G = 8: {at_eight:.3g}, true {float(true):.3g}: not even 8 responses are enough",
        abs(by_size[0] - 1 / (16 * np.sqrt(2))) < 1e-12 and by_size[0] > 0 > by_size[-1] and at_eight > 0 > true,
        {"G": list(sizes), "normalized": by_size, "rare_G_8": at_eight, "rare_true": str(true)},
    )
    count = good = 0
    for world in random_trees(context, "std sign", 40, parameters=SHARINGS):
        count += 1
        here = on_policy(world)
        paths = enumerate_trajectories(here)
        shares = group_shares(paths.behavior_probability, paths.returns, 2, exact)
        ascended = policy_gradient(against_frozen_copy(here))
        good += int(np.all(total(shares, weighted_scores(paths, "none")) == ascended))
    yield Evidence(
        "what G = 2 with the population std ascends: P(R_i > R_j) - P(R_i < R_j) against a frozen copy of itself; its "
        "gradient by differentiating the Bellman equation",
        "enumeration",
        f"gradient of P(R_i > R_j) - P(R_i < R_j), R_j from a frozen copy: {good} of {count} random trees",
        good == count,
        {"worlds": count, "exact": good},
    )
    yield _two_prompts(library)


def _two_prompts(advantage: Advantage) -> Evidence:
    """Rewards of 0 and 1: each prompt keeps its sign, their sum does not."""
    features, rates = np.array([1.0, -4.5]), (HALF, Fraction(1, 20))
    worlds = [bandit(rate, rate) for rate in rates]
    true = np.array([float(policy_gradient(world)[1]) for world in worlds])
    divided = np.array([_second_logit(world, 8, advantage) for world in worlds])
    before, after = float(features @ true), float(features @ divided)
    scales = divided / true
    return Evidence(
        "a batch of two prompts on one shared logit, rewards 0 and 1, success rates 1/2 and 1/20, features 1 and -4.5, "
        "on-policy, all groups of 8: sum of their gradients, true and with the advantages of ctpo; their quotient by "
        "prompt",
        "enumeration",
        f"rewards 0 and 1, two prompts: true sum {before:.3f}, after division {after:.3f} (the prompts scaled by "
        f"{scales[0]:.3f} and {scales[1]:.3f})",
        bool(scales.min() > 0) and before > 0 > after and np.allclose(scales, [1.736, 2.313], rtol=0, atol=6e-4),
        {"true": before, "divided": after, "scales": scales.tolist()},
    )


def _second_logit(world: World, size: int, advantage: Advantage) -> float:
    """Expected gradient of the second logit over groups, in float64."""
    paths = enumerate_trajectories(world)
    shares = group_shares(paths.behavior_probability.astype(float), paths.returns.astype(float), size, advantage)
    return float(total(shares, weighted_scores(paths, "none").astype(float))[1])


# --- 6.length -------------------------------------------------------------------------------------------------------


def response_length(paths: Trajectories) -> np.ndarray:
    """(N,) policy tokens of each response."""
    return as_numbers(paths.mask.sum(axis=1), True)


def constant_length(paths: Trajectories) -> np.ndarray:
    """(N,) the horizon for every response."""
    return as_numbers(np.full(len(paths.mask), paths.world.mdp.horizon), True)


Length = Callable[[Trajectories], np.ndarray]


def per_length(paths: Trajectories, length: np.ndarray, constant: Fraction | np.ndarray) -> World:
    """The on-policy world whose only reward is (R - constant) / length, given at the end of the response."""
    world = paths.world
    outcome = zeros(world.mdp.n_states, True)
    outcome[paths.final_state] = (paths.returns - constant) / length
    return replace(world, mdp=replace(world.mdp, outcome=outcome, reward=world.mdp.reward * 0))


def trees_with_ends(context: Context, name: str, count: int) -> Iterator[World]:
    """Random exact trees of up to three tokens in which token 0 ends the response, some with tool tokens."""
    rng = context.rng(name)
    for k in range(context.count(count)):
        yield random_tree(
            rng,
            n_actions=2 + k % 2,
            horizon=3,
            eos=True,
            tool_share=0.3 if k % 4 == 3 else 0.0,
            parameters=SHARINGS[k % 3],
        )


def stop_or_go(stop: Any = Fraction(3, 4), go: Any = 1) -> World:
    """Stop at once (token 0) or write one more token, 1/2 each; two rewards."""
    mdp = tree(2, 2, name="stop or go", eos=0, outcome=lambda s: go if s[0] else stop)
    policy = policy_table(mdp, lambda _prefix: [HALF, HALF])
    return World(mdp, policy, policy)


def check_length(context: Context, length: Length) -> Iterator[Evidence]:
    """1/|o| is another objective, E[(R - c)/T], under which neither the sign nor the baseline c is safe."""
    comparisons = good = 0
    for world in trees_with_ends(context, "length", 30):
        paths = enumerate_trajectories(on_policy(world))
        scores = paths.summed_scores(as_numbers(np.ones(paths.mask.shape, dtype=int), True))
        for constant in (Fraction(0), Fraction(7, 3)):
            comparisons += 1
            factor = (paths.returns - constant) / length(paths)
            objective = per_length(paths, length(paths), constant)
            good += int(np.all(paths.expectation(factor[:, None] * scores) == policy_gradient(objective)))
    yield Evidence(
        "E[(1/T)(R - c) sum_t g_t] against grad E[(R - c)/T] by differentiating the Bellman equation; c = 0, 7/3",
        "enumeration",
        f"another objective, grad E[(R - c)/T]: {good} of {comparisons} vector equalities on random trees",
        good == comparisons,
        {"equalities": comparisons, "exact": good},
    )
    paths = enumerate_trajectories(stop_or_go())
    scores = paths.summed_scores(as_numbers(np.ones(paths.mask.shape, dtype=int), True))[:, 1]
    true = paths.expectation(paths.returns * scores)
    constants = (Fraction(0), HALF, Fraction(7, 8))
    found = [paths.expectation((paths.returns - c) / length(paths) * scores) for c in constants]
    free = paths.expectation(scores / length(paths))
    wrong = enumerate_trajectories(stop_or_go(0, 0))
    all_wrong = wrong.expectation((wrong.returns - HALF) / length(wrong) * scores)
    yield Evidence(
        "stop (R = 3/4) or write one more token (R = 1), 1/2 each; gradient of the logit to go on: true; with 1/|o| at "
        "c = 0, 1/2, 7/8 = J; E[(1/T) sum g]; all answers wrong (R = 0, c = 1/2)",
        "enumeration",
        f"stop or go: true gradient {true}; with 1/|o| {listed(found)} at c = 0, 1/2, 7/8; E[(1/T) sum g] = {free}; "
        f"all answers wrong: {all_wrong}, towards the longer answer",
        [true, *found, free, all_wrong] == known("length"),
        {
            "true": str(true),
            "c": [str(c) for c in constants],
            "with_length": [str(f) for f in found],
            "mean_score": str(free),
            "all_wrong": str(all_wrong),
        },
    )


# --- 6.length_prop1 -------------------------------------------------------------------------------------------------


def stop_later() -> World:
    """Stop or go on (1/2 each, R = 1 for going on), then stop after a second token or write a third.

    The target stops second with 1/2, the behavior policy with 1/4.
    """
    mdp = tree(2, 3, name="stop later", eos=0, outcome=lambda s: s[0])

    def policy(second: Fraction) -> np.ndarray:
        return policy_table(mdp, lambda prefix: [second, 1 - second] if len(prefix) == 1 else [HALF, HALF])

    return World(mdp, policy(Fraction(1, 4)), policy(HALF))


def expected_inverse_length(world: World, who: Who) -> np.ndarray:
    """(H, S, A) E[1/T | s_t, a_t] under one of the policies, by backward induction."""
    paths = enumerate_trajectories(world)
    return values(per_length(paths, response_length(paths), paths.returns - 1), who).q


def length_weighted(paths: Trajectories) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E_b[sum_t (rho_t/T) g_t A^pi_t], E_pi[sum_t (1/T) g_t A^pi_t] and grad J."""
    advantages = paths.advantage("A_target")
    inverse = 1 / response_length(paths)[:, None]
    weight = rational_weights(paths, "cumulative")
    off = paths.expectation(paths.summed_scores(weight * advantages * inverse))
    on = paths.expectation(paths.summed_scores(advantages * inverse), "target")
    return off, on, policy_gradient(paths.world)


def check_length_prop1(context: Context, who: Who) -> Iterator[Evidence]:
    """With 1/|o| even the exact A^pi under rho_t leaves what b does later in the expectation."""
    count = good = biased = 0
    for world in trees_with_ends(context, "length prop1", 30):
        count += 1
        off, on, _ = length_weighted(enumerate_trajectories(world))
        table = advantage_table(world, "A_target") * expected_inverse_length(world, who)
        good += int(np.all(off == gradient_mean(world, "cumulative", table)))
        biased += int(np.any(off != on))
    yield Evidence(
        "E_b[sum_t (rho_t/T) g_t A^pi_t] against sum_t E_pi[g_t A^pi_t E_b[1/T | s_t, a_t]]",
        "enumeration",
        f"identity on {good} of {count} random trees with end-of-sequence; not the on-policy value on {biased}",
        good == count and biased > 0,
        {"worlds": count, "exact": good, "biased": biased},
    )
    world = stop_later()
    off, on, true = (value[1] for value in length_weighted(enumerate_trajectories(world)))
    table = advantage_table(world, "A_target") * expected_inverse_length(world, who)
    predicted = gradient_mean(world, "cumulative", table)[1]
    yield Evidence(
        "up to three tokens, R = 1 unless the first one stops, the policies differ at the second token only: "
        "E_b[rho_t/|o|], on-policy 1/|o|, true gradient, and the identity's prediction",
        "enumeration",
        f"gradient of the first logit: rho_t/|o| {off} (predicted {predicted}), on-policy with 1/|o| {on}, true {true}",
        [true, off, on] == known("length_prop1") and predicted == off,
        {"off_policy": str(off), "predicted": str(predicted), "on_policy": str(on), "true": str(true)},
    )


# --- 6.token_mean ---------------------------------------------------------------------------------------------------


def token_mean(probability: np.ndarray, length: np.ndarray, terms: np.ndarray, size: int) -> np.ndarray:
    r"""Exact expectation of the token-mean over a batch of independent responses.

    .. math:: E\frac{\sum_i Y_i}{\sum_i T_i} = n \sum_\tau p(\tau) Y(\tau)\, E\frac{1}{T(\tau) + S_{n-1}}

    with S the summed length of the other n - 1 responses, whose distribution is a convolution.

    Args:
        probability: (N,) of each response.
        length: (N,) tokens of each response.
        terms: (N, D) summed gradient of each response.
        size: n, responses in the batch.

    Returns:
        (D,), Fractions or float64 as the inputs are.
    """
    tokens = length.astype(int)
    one = np.zeros(tokens.max() + 1, dtype=probability.dtype) * probability[0]
    np.add.at(one, tokens, probability)
    rest = one[:1] * 0 + 1
    for _ in range(size - 1):
        rest = np.convolve(rest, one)
    sums = as_numbers(np.arange(len(rest)), probability.dtype == object)
    inverse = np.array([(rest / (sums + t)).sum() for t in length], dtype=probability.dtype)
    return size * total(probability * inverse, terms)


def sequence_mean(probability: np.ndarray, length: np.ndarray, terms: np.ndarray, _size: int) -> np.ndarray:
    """The mean over responses of their token means, whose expectation no batch size changes."""
    return total(probability / length, terms)


BatchMean = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


def check_token_mean(context: Context, batch_mean: BatchMean) -> Iterator[Evidence]:
    """The token-mean over a batch is a ratio estimator: on its way to grad J / E[T], never there."""
    comparisons = good = 0
    largest = 0.0
    for world in trees_with_ends(context, "token mean", 16):
        paths = enumerate_trajectories(world)
        probability, length = paths.behavior_probability, response_length(paths)
        terms = paths.summed_scores(rational_weights(paths, "cumulative") * paths.advantage("A_target"))
        for size in group_sizes(len(length)):
            comparisons += 1
            members = np.indices((len(length),) * size).reshape(size, -1).T
            weight = probability[members].prod(axis=1) / length[members].sum(axis=1)
            shares = probability * 0
            np.add.at(shares, members, np.repeat(weight[:, None], size, axis=1))
            good += int(np.all(total(shares, terms) == batch_mean(probability, length, terms, size)))
        largest = max(largest, _delta_method_gap(paths, terms, batch_mean))
    yield Evidence(
        "exact expectation of sum_i Y_i / sum_i T_i from the distribution of the summed length, against all batches of "
        "2 and 3; Y = sum_t rho_t A^pi_t g_t on random trees with end-of-sequence",
        "enumeration",
        f"{good} of {comparisons} vector equalities on random trees",
        good == comparisons,
        {"equalities": comparisons, "exact": good},
    )
    yield Evidence(
        "its distance from grad J / E[T], times n, at n = 256 against E[Y] Var(T)/E[T]^3 - Cov(Y, T)/E[T]^2",
        "enumeration",
        f"bias falls as 1/n: n x bias within {largest:.1%} of the delta method at n = 256",
        largest < 0.03,
        {"n": 256, "largest_relative_gap": largest},
    )
    paths = enumerate_trajectories(stop_or_go())
    probability, length = paths.behavior_probability, response_length(paths)
    scores = paths.summed_scores(as_numbers(np.ones(paths.mask.shape, dtype=int), True))
    terms = paths.returns[:, None] * scores
    sizes = (1, 2, 3, 4, 6)
    found = [batch_mean(probability, length, terms, size)[1] for size in sizes]
    limit = paths.expectation(terms)[1] / paths.expectation(length)
    floating = (probability.astype(float), length.astype(float), terms.astype(float))
    far = float(batch_mean(*floating, 1024)[1])
    yield Evidence(
        "stop (R = 3/4) or go on (R = 1), no baseline, gradient of the logit to go on, batches of 1, 2, 3, 4, 6 and "
        "1024 responses; limit grad J / E[T]",
        "enumeration",
        f"stop or go, n = 1, 2, 3, 4, 6: {listed(found[:4])}, {found[4]} = {float(found[4]):.3g}; n = 1024: {far:.5f}; "
        f"limit {limit} = {float(limit):.5f}: the wrong sign for n < 3",
        [*found, limit] == known("token_mean") and abs(far - float(limit)) < 2e-4,
        {"n": [*sizes, 1024], "token_mean": [str(f) for f in found] + [far], "limit": str(limit)},
    )


def _delta_method_gap(paths: Trajectories, terms: np.ndarray, batch_mean: BatchMean, size: int = 256) -> float:
    """Relative gap between n times the bias of the token-mean and its limit for large n."""
    probability = paths.behavior_probability.astype(float)
    length, terms = response_length(paths).astype(float), terms.astype(float)
    mean_length, mean = probability @ length, probability @ terms
    covariance = probability @ ((length - mean_length)[:, None] * (terms - mean))
    predicted = mean * (probability @ (length - mean_length) ** 2) / mean_length**3 - covariance / mean_length**2
    found = size * (batch_mean(probability, length, terms, size) - mean / mean_length)
    # The two parts can cancel, so the gap is measured against their sizes; both are 0 where all advantages are.
    largest = float(np.abs(covariance).max() / mean_length**2)
    return float(np.abs(found - predicted).max()) / largest if largest else 0.0


CLAIMS = (
    Claim(
        "6.mean",
        "Subtracting the group's mean, the response itself included, only scales the expected gradient, by 1 - 1/G.",
        "true if",
        "independent responses, on-policy or weighted by r_t, rho_t or rho_H, unclipped: then E[sum_t w_t g_t] = 0; "
        "not under GSPO's ratio or a clip",
        "arXiv:2402.03300 and arXiv:2503.20783, made exact",
        check_mean,
        GROUP_MEAN,
        replace(GROUP_MEAN, scale=lambda _size: Fraction(1)),
        "the scale 1, as if the mean were free",
        "Under unclipped token, cumulative or sequence ratios the group mean costs a factor 1 - 1/G, the same for "
        "every prompt: leave it to the learning rate, but count it in when group sizes differ. Under GSPO's ratio or a "
        "clip the baseline is part of the objective.",
    ),
    Claim(
        "6.leave_one_out",
        "The mean of the other responses leaves the raw-reward expectation as it is, an outcome reward's bias with it.",
        "true if",
        "independent responses, on-policy or weighted by r_t, rho_t or rho_H, unclipped; not under GSPO's ratio or a "
        "clip",
        "arXiv:2402.14740 (RLOO)",
        check_leave_one_out,
        LEAVE_ONE_OUT,
        replace(LEAVE_ONE_OUT, exact=centered, library=ctpo.group_relative),
        "the mean that includes the response itself",
        "No group baseline repairs the bias of an outcome reward under a prefix ratio; leave-one-out at least adds "
        "none of its own under unclipped token, cumulative or sequence ratios. Under GSPO's ratio or a clip the "
        "baseline is part of the objective.",
    ),
    Claim(
        "6.baseline_off_policy",
        "A group baseline does not change the direction of the expected gradient, whatever the weights.",
        "false",
        "with weight 1 off-policy it subtracts E_b[R] E_b[sum g_t], which is not 0; it can turn the sign around",
        "what a baseline is usually taken for",
        check_baseline_off_policy,
        "none",
        "token",
        "token ratios, under which a baseline is free",
        "If stale samples are used without any ratio, the baseline is part of what is optimized: even adding a "
        "constant to all rewards changes the gradient.",
    ),
    Claim(
        "6.std_binary",
        "With rewards of 0 and 1, division by the group's standard deviation keeps each prompt's direction and scales "
        "it by c_G(p).",
        "true if",
        "one prompt at a time, independent responses, weights under which a baseline is free; p is the success rate "
        "under the behavior policy",
        "arXiv:2402.03300; arXiv:2503.20783 on its difficulty bias",
        check_std_binary,
        std_scale,
        many_responses,
        "the law of infinite groups, 1/sqrt(p (1 - p))",
        "With groups of 8 a hard prompt is weighted at most 1.43 times one that is solved half of the time, where the "
        "law of large groups says 5 times at p = .01; that can still turn a batch's sum around (6.std_sign). What hard "
        "prompts lack are groups with any signal.",
    ),
    Claim(
        "6.std_sign",
        "Division by the group's standard deviation does not change the sign of a prompt's expected gradient.",
        "false",
        "three reward levels suffice; pairs ascend P(R_i > R_j) - P(R_i < R_j) against a frozen copy, not E[R]",
        "how the normalization of GRPO is usually read",
        check_std_sign,
        (pair_signs, normalized),
        (centered, ctpo.group_relative),
        "the mean subtracted, no division",
        "With graded rewards do not divide by the group's standard deviation unless winning comparisons is what you "
        "want; for rewards of 0 and 1 each prompt keeps its sign, but prompts are reweighted, and their sum can turn "
        "around.",
    ),
    Claim(
        "6.length",
        "Dividing each response's loss by its length leaves the sign of the expected gradient.",
        "false",
        "it ascends E[(R - c)/T], in which the baseline c matters; it favors long wrong answers",
        'arXiv:2605.07331, the factor 1/|o| of the objective; arXiv:2503.20783 on "response-level length bias"',
        check_length,
        response_length,
        constant_length,
        "a constant length for all (Dr. GRPO)",
        "Divide by a constant, not by each response's own length, which favors short right and long wrong answers "
        "and can even turn the gradient around.",
    ),
    Claim(
        "6.length_prop1",
        "With the exact A^pi, rho_t/|o| gives what 1/|o| gives on-policy.",
        "false",
        "the length is decided after token t, by b: it estimates E_pi[g_t A^pi_t E_b[1/T | s_t, a_t]]",
        "arXiv:2605.07331, Prop. 1 applied to its own objective",
        check_length_prop1,
        "behavior",
        "target",
        "the length that pi would go on to write",
        "The unbiasedness of the prefix ratio does not survive division by the response's length, even with a perfect "
        "critic.",
    ),
    Claim(
        "6.token_mean",
        "The mean over all tokens of a batch estimates grad J / E[T], the policy gradient up to a constant.",
        "true if",
        "many responses in a batch: it is a ratio estimator with a bias of order 1/n that can reverse the sign",
        "the default aggregation of the released code of arXiv:2605.07331; arXiv:2503.14476",
        check_token_mean,
        token_mean,
        sequence_mean,
        "the mean over responses of their token means",
        "The token mean is safe over a large batch, not over a micro-batch of one or two responses: take the number of "
        "tokens from the whole batch.",
    ),
)
