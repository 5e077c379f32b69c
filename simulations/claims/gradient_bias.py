"""Claim 3 and the paper's Table 1: which ratio makes the policy gradient unbiased, and at what variance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, Literal

import numpy as np

import ctpo
from ctpo.ratios import Level
from proofs import counterexample
from simulations import toy_lm
from simulations.claims.martingale import before_token, cumulative, reached_under_behavior, reached_under_target
from simulations.claims.registry import Claim, Context, Evidence
from simulations.claims.worlds import HALF, known, listed, random_trees, two_step
from simulations.exact import (
    AdvantageKind,
    Trajectories,
    advantage_table,
    enumerate_trajectories,
    estimator_moments,
    gradient_mean,
    gradient_moments,
    policy_gradient,
    rational_weights,
)
from simulations.mdp import (
    Parameters,
    World,
    as_numbers,
    bigram,
    depths,
    independent_tokens,
    policy_table,
    random_tree,
    tree,
    zeros,
)
from simulations.measure import measure
from simulations.monte_carlo import SummedGradient, estimate, z_scores, z_threshold

SHARINGS: tuple[Parameters, ...] = ("prefix", "position", "shared")
UNLIMITED: Mapping[str, Any] = {"form": "unclipped", "max_log_ratio": None, "max_token_log_ratio": None}

# --- 3.prop1 --------------------------------------------------------------------------------------------------------


def check_prop1(context: Context, level: Level | Literal["none"]) -> Iterator[Evidence]:
    """E_b[rho_t g_t A_t] = E_pi[g_t A_t] for any prefix-measurable A; with A^pi or Q^pi the sum is grad J."""
    rng = context.rng("prop1")
    worlds = terms = good = 0
    for world in random_trees(context, "prop1", 200, parameters=SHARINGS):
        worlds += 1
        paths = enumerate_trajectories(world)
        weight = rational_weights(paths, level)
        anything = as_numbers(rng.integers(-4, 5, size=(world.mdp.horizon, *world.behavior.shape)), True)
        value = paths.advantage(anything)
        for t in range(value.shape[1]):
            only = zeros(value.shape, True)
            only[:, t] = value[:, t]
            off = paths.expectation(paths.summed_scores(weight * only))
            on = paths.expectation(paths.summed_scores(only), "target")
            terms += 1
            good += int(np.all(off == on))
        gradient = policy_gradient(world)
        for kind in ("A_target", "Q_target"):
            terms += 1
            good += int(np.all(gradient_mean(world, level, kind) == gradient))
    yield Evidence(
        "E_b[rho_t g_t A_t] = E_pi[g_t A_t] per token for arbitrary A(prefix, token), and = grad J summed with A^pi, "
        "Q^pi; per-prefix, per-position and shared logits, as fractions",
        "enumeration",
        f"{good} of {terms} vector equalities on {worlds} random trees, any prefix-measurable A",
        good == terms,
        {"worlds": worlds, "equalities": terms, "exact": good},
    )
    gaps = {}
    for world in (
        toy_lm.fitted_ngram(order=3, horizon=512, step=0.3, rng=context.rng("prop1 lm")),
        bigram(context.rng("prop1 bigram"), n_tokens=6, horizon=512, step=0.3),
    ):
        gradient = policy_gradient(world)
        gaps[world.name] = float(np.linalg.norm(gradient_mean(world, level) - gradient) / np.linalg.norm(gradient))
    yield Evidence(
        "relative bias of the summed gradient over 512 tokens: " + ", ".join(gaps),
        "dynamic programming",
        "relative bias over 512 tokens: " + ", ".join(f"{gap:.0e} ({name})" for name, gap in gaps.items()),
        max(gaps.values()) < 1e-9,
        {"relative_bias": gaps},
    )
    # Weight 1 is not a level of ctpo but an estimator of its own.
    estimator = ctpo.get_estimator("reinforce") if level == "none" else ctpo.Estimator(level=level, **UNLIMITED)
    world = toy_lm.load_transformer_world()
    found = estimator_moments(world, estimator)
    gap = float(np.linalg.norm(found.bias) / np.linalg.norm(found.mean - found.bias))
    yield Evidence(
        f"tiny transformer ({world.dimension} shared network parameters), weights by ctpo.Estimator: relative bias",
        "enumeration",
        f"relative bias on the tiny transformer, {world.dimension} shared parameters: {gap:.0e}",
        gap < 1e-9,
        {"relative_bias": gap},
    )
    yield _monte_carlo_sign(context, estimator)


def _monte_carlo_sign(context: Context, estimator: ctpo.Estimator) -> Evidence:
    world = sign_flip_world().as_float()
    n = context.count(200_000)
    result = estimate(world, SummedGradient(world, estimator), n=n, seed=context.sequence("sign"))
    z = z_scores(result, policy_gradient(world))
    limit = z_threshold(len(z))
    return Evidence(
        "sign-flip world below: sampled mean of the summed gradient against the true one, weights by ctpo.Estimator",
        "Monte Carlo",
        f"sign-flip world: largest |z| {z.max():.2f} (limit {limit:.2f}), n = {n}, ESS {result.ess_fraction:.2f}",
        bool(z.max() < limit),
        {"n": n, "largest_z": float(z.max()), "limit": limit},
    )


# --- 3.token: the token ratio is biased -----------------------------------------------------------------------------


def sign_flip_world() -> World:
    """R(11) = 1, R(01) = -1; b = 1/5, pi = 4/5 for the first token, both 1/2 for the second; position logits."""
    world = two_step((Fraction(1, 5), Fraction(4, 5)), {0: (HALF, HALF), 1: (HALF, HALF)}, name="sign flip")
    mdp = tree(2, 2, name="sign flip", outcome=lambda s: 2 * s[0] - 1 if s[1] else 0)
    return World(mdp, world.behavior, world.target, "position")


def mean_score_times_advantage(world: World, advantage: AdvantageKind) -> np.ndarray:
    """(S, d) G(s) = sum_a pi(a|s) g(a|s) A(s, a) of a tree."""
    result = zeros((world.mdp.n_states, world.n_blocks, world.local_scores.shape[2]), True)
    table = advantage_table(world, advantage)
    step = depths(world.mdp)
    for s in np.flatnonzero(world.mdp.policy_states):
        factor = world.target[s] * table[step[s], s]
        result[s, world.block(step[s])[s]] = (factor[:, None] * world.local_scores[s]).sum(axis=0)
    return result.reshape(world.mdp.n_states, -1)


def check_token(context: Context, level: str) -> Iterator[Evidence]:
    """The bias of the token ratio with the exact A^pi, as an identity, and its sign reversal."""
    worlds = good = biased = 0
    for world in random_trees(context, "token", 150, parameters=SHARINGS):
        worlds += 1
        bias = gradient_mean(world, level) - policy_gradient(world)
        gap = reached_under_behavior(world) - reached_under_target(world)
        per_state = mean_score_times_advantage(world, "A_target")
        predicted = (gap[:, None] * per_state).sum(axis=0)
        paths = enumerate_trajectories(world)
        before = before_token(cumulative(paths))
        covariance = zeros(len(bias), True)
        for t in range(before.shape[1]):
            value = per_state[paths.states[:, t]]
            product = before[:, t, None] * value
            covariance = covariance + paths.expectation(product) - paths.expectation(value)
        good += int(np.all(bias == predicted) and np.all(bias == -covariance))
        biased += int(np.any(bias != 0))
    yield Evidence(
        "bias = sum_s (P_b - P_pi)(s) G(s) = -sum_t Cov_b(rho_{t-1}, G(s_t)), as fractions",
        "enumeration",
        f"bias as predicted, exactly, on {good} of {worlds} random trees; not 0 on {biased}",
        good == worlds and biased > 0,
        {"worlds": worlds, "exact": good, "biased": biased},
    )
    world = sign_flip_world()
    paths = enumerate_trajectories(world)
    advantages = paths.advantage("A_target")
    found = {"true": policy_gradient(world)[3]}
    for name in (level, "sequence_mean", "cumulative_mean"):
        found[name] = paths.expectation(paths.summed_scores(rational_weights(paths, name) * advantages))[3]
    yield Evidence(
        "sign flip with exact A^pi, gradient of the second position's logit: "
        + ", ".join({"sequence_mean": "GSPO", "cumulative_mean": "cumulative mean"}.get(n, n) for n in found),
        "enumeration",
        "true gradient {}, token ratio {}, GSPO {}, cumulative mean {}".format(*found.values()),
        list(found.values()) == known("token_sign"),
        {name: str(value) for name, value in found.items()},
    )


# --- 3.surrogate ----------------------------------------------------------------------------------------------------


def check_surrogate(context: Context, advantage: AdvantageKind) -> Iterator[Evidence]:
    """With A^b or the outcome reward the token ratio gives the gradient of the CPI/TRPO surrogate, exactly."""
    worlds = good = reward_good = 0
    for world in random_trees(context, "surrogate", 120, parameters=SHARINGS):
        worlds += 1
        reach = reached_under_behavior(world)
        surrogate = (reach[:, None] * mean_score_times_advantage(world, "A_behavior")).sum(axis=0)
        paths = enumerate_trajectories(world)
        good += int(np.all(gradient_mean(world, "token", advantage) == surrogate))
        returns = np.where(paths.mask, paths.returns[:, None], 0)
        with_return = paths.expectation(paths.summed_scores(rational_weights(paths, "token") * returns))
        reward_good += int(np.all(with_return == surrogate))
    yield Evidence(
        "token ratio with A^b, and with the return, against grad of sum_s P_b(s) sum_a pi(a|s) A^b(s, a)",
        "enumeration",
        f"with A^b on {good}, with the return on {reward_good}, of {worlds} random trees, as fractions",
        good == reward_good == worlds,
        {"worlds": worlds, "with_advantage": good, "with_return": reward_good},
    )


# --- 3.gspo ---------------------------------------------------------------------------------------------------------


def check_gspo(context: Context, degree: Callable[[int], int]) -> Iterator[Evidence]:
    """The length-normalized ratio is an expectation under a policy 1/H of the way from b to pi, scaled by Z < 1."""
    rng = context.rng("gspo")
    worst, largest_z, count = 0.0, 0.0, context.count(150)
    for k in range(count):
        world = random_tree(
            rng,
            n_actions=2 + k % 2,
            horizon=2 + k % 3,
            parameters=SHARINGS[k % 3],
            exact=False,
            rewards="both",
        )
        paths = enumerate_trajectories(world)
        horizon = degree(world.mdp.horizon)
        advantages = paths.advantage("A_target")
        found = estimator_moments(
            world,
            ctpo.Estimator(level="sequence_mean", **UNLIMITED),
            trajectories=paths,
        ).mean
        tilted = paths.behavior_probability ** (1 - 1 / horizon) * paths.target_probability ** (1 / horizon)
        z = tilted.sum()
        expected = (tilted[:, None] * paths.summed_scores(advantages)).sum(axis=0)
        worst = max(worst, float(np.abs(found - expected).max()))
        largest_z = max(largest_z, float(z))
    yield Evidence(
        "E_b[rho_H^(1/H) sum g A] = Z E_q[sum g A] with q ~ b^(1-1/H) pi^(1/H), weights by ctpo.Estimator; Z < 1",
        "enumeration",
        f"gap <= {worst:.0e} on {count} random trees, Z <= {largest_z:.4f}",
        worst < 1e-11 and largest_z < 1,
        {"worlds": count, "largest_gap": worst, "largest_z": largest_z},
    )
    yield _cumulative_mean_identity(context, degree)
    paths = enumerate_trajectories(table_world())
    z_exact = paths.expectation(rational_weights(paths, "sequence_mean"))[0]
    product = paths.behavior_probability * rational_weights(paths, "sequence_mean")[:, 0]
    tilted_exact = [q / z_exact for q in product]
    yield Evidence(
        "shared logit, H = 2, b = 1/5, pi = 4/5: Z and q",
        "enumeration",
        f"one shared logit, H = 2: Z = {z_exact}, q = {listed(tilted_exact)}",
        [z_exact, *tilted_exact] == known("gspo_tilt"),
        {"Z": str(z_exact), "q": [str(q) for q in tilted_exact]},
    )


def _cumulative_mean_identity(context: Context, degree: Callable[[int], int]) -> Evidence:
    """The same per position: rho_t^(1/t) is a mean under a policy 1/t of the way, prefix by prefix."""
    rng, worst, count = context.rng("cumulative mean"), 0.0, context.count(50)
    for k in range(count):
        world = random_tree(rng, n_actions=2 + k % 2, horizon=2 + k % 3, parameters=SHARINGS[k % 3], exact=False)
        paths = enumerate_trajectories(world)
        level = ctpo.Estimator(level="cumulative_mean", **UNLIMITED)
        advantages = paths.advantage("A_target")
        found = estimator_moments(world, level, trajectories=paths).mean
        expected = np.zeros_like(found)
        for t in range(1, world.mdp.horizon + 1):
            later = paths.behavior[:, t:].prod(axis=1)  # sums to 1 over the continuations of a prefix
            way = 1 / degree(t)
            prefix = paths.behavior[:, :t].prod(axis=1) ** (1 - way) * paths.target[:, :t].prod(axis=1) ** way
            only = np.where(np.arange(world.mdp.horizon) == t - 1, advantages, 0.0)
            expected += ((prefix * later)[:, None] * paths.summed_scores(only)).sum(axis=0)
        worst = max(worst, float(np.abs(found - expected).max()))
    return Evidence(
        "E_b[rho_t^(1/t) g_t A_t] = Z_t E_{q_t}[g_t A_t] with q_t ~ b^(1-1/t) pi^(1/t) on prefixes, by ctpo.Estimator",
        "enumeration",
        f"cumulative mean likewise, 1/t of the way at position t: gap <= {worst:.0e} on {count} random trees",
        worst < 1e-11,
        {"worlds": count, "largest_gap": worst},
    )


# --- 3.table --------------------------------------------------------------------------------------------------------


def table_world() -> World:
    """One shared logit, two tokens, b(1) = 1/5, pi(1) = 4/5, R = a1 a2."""
    return independent_tokens(
        [Fraction(4, 5), Fraction(1, 5)], [Fraction(1, 5), Fraction(4, 5)], 2, outcome=lambda s: s[0] * s[1]
    )


#: Weight level -> its name among the counterexample's numbers.
TABLE = {
    "cumulative": "rho_t",
    "token": "r_t",
    "sequence": "rho_H",
    "sequence_mean": "GSPO rho_H^(1/2)",
    "cumulative_mean": "rho_t^(1/t)",
    "none": "none",
}


def check_table(_context: Context, weights: Callable[[Trajectories, str], np.ndarray]) -> Iterator[Evidence]:
    """Six weights on one shared logit, with A^pi and with the outcome reward, as fractions."""
    world = table_world()
    paths = enumerate_trajectories(world)
    gradient = policy_gradient(world)[1]
    advantages = paths.advantage("A_target")
    returns = np.where(paths.mask, paths.returns[:, None], 0)
    rows: dict[str, dict[str, str]] = {}
    expected = counterexample("six_weights")
    good = gradient == expected["true gradient"]
    for level, name in TABLE.items():
        weight = weights(paths, level)
        found = [paths.expectation(paths.summed_scores(weight * a))[1] for a in (advantages, returns)]
        good &= found == [expected[f"{name} with A^pi"], expected[f"{name} with R"]]
        rows[level] = {"A_pi": str(found[0]), "bias": str(found[0] - gradient), "outcome": str(found[1])}
    yield Evidence(
        "grad J = 32/125; each weight with A^pi (bias), and with the outcome reward",
        "enumeration",
        "grad J = 32/125; with A^pi (bias), with the outcome: "
        + "; ".join(f"{n} {r['A_pi']} ({r['bias']}), {r['outcome']}" for n, r in rows.items()),
        bool(good),
        {"rows": rows},
    )


# --- T1: the paper's Table 1 ----------------------------------------------------------------------------------------

TABLE_ONE: dict[str, ctpo.Estimator] = {
    "token": ctpo.Estimator(level="token", **UNLIMITED),
    "cumulative": ctpo.Estimator(level="cumulative", **UNLIMITED),
    "cumulative mean": ctpo.Estimator(level="cumulative_mean", **UNLIMITED),
    "sequence": ctpo.Estimator(level="sequence", **UNLIMITED),
    "sequence mean (GSPO)": ctpo.Estimator(level="sequence_mean", **UNLIMITED),
}


COMPARED = ("token", "cumulative", "sequence")  # whose variances the table orders


def table_one_worlds(context: Context) -> list[World]:
    """Worlds of several kinds and divergences, all small enough to enumerate."""
    rng = context.rng("table one")
    worlds = [
        random_tree(rng, n_actions=3, horizon=4, exact=False, parameters="prefix", rewards="both"),
        random_tree(rng, n_actions=2, horizon=6, exact=False, parameters="position", rewards="dense"),
        random_tree(rng, n_actions=2, horizon=5, exact=False, parameters="shared", rewards="outcome", eos=True),
        random_tree(rng, n_actions=2, horizon=6, exact=False, parameters="prefix", tool_share=0.3),
    ]
    worlds += [bigram(rng, n_tokens=3, horizon=7, step=step) for step in (0.3, 1.0, 3.0)]
    worlds.append(toy_lm.fitted_ngram(order=3, horizon=4, step=1.0, rng=rng))
    worlds.append(toy_lm.load_transformer_world())
    return worlds


def check_table_one(context: Context, estimators: Mapping[str, ctpo.Estimator]) -> Iterator[Evidence]:
    """Bias column on every world; variance column under orthogonal scores, and counterexamples to it."""
    rows = [row for world in table_one_worlds(context) for row in measure(world, estimators)]
    by_name = {name: [r for r in rows if r.estimator == name] for name in estimators}
    unbiased = max(r.relative_bias for n in ("cumulative", "sequence") for r in by_name[n])
    least = {n: min(r.relative_bias for r in by_name[n]) for n in by_name if n not in ("cumulative", "sequence")}
    most = {n: max(r.relative_bias for r in by_name[n]) for n in least}
    worlds = len(by_name["token"])
    yield Evidence(
        f"relative bias with exact A^pi on {worlds} worlds (trees, bigram, trigram, transformer), by ctpo.Estimator",
        "enumeration",
        f"relative bias on {worlds} worlds: cumulative and sequence <= {unbiased:.0e}; "
        + "; ".join(f"{n} {least[n]:.2g} to {most[n]:.2g}" for n in least),
        unbiased < 1e-9 and min(least.values()) > 1e-4,
        {"rows": [vars(r) for r in rows]},
    )
    relative = {
        name: [row.total_variance / full.total_variance for row, full in zip(rows, by_name["sequence"], strict=True)]
        for name, rows in by_name.items()
    }
    span = sorted(relative["cumulative"])
    lower = sum(ratio < 1 for ratio in span)
    trees = ordered = equal = unbiased_trees = token_below_sequence = token_below_cumulative = 0
    for world in random_trees(context, "table one", 100, parameters=("prefix", "position")):
        trees += 1
        paths = enumerate_trajectories(world.as_float())
        moments = {n: estimator_moments(paths.world, estimators[n], trajectories=paths) for n in COMPARED}
        token, prefix, full = (found.total_variance for found in moments.values())
        rho = cumulative(paths)
        # Equal only where rho cannot change any more after a token that has an advantage.
        matters = np.abs(paths.advantage("A_target")) > 1e-12
        tie = not np.any(matters & (np.abs(rho - rho[:, -1:]) > 1e-12))
        equal += int(tie)
        ordered += int(abs(prefix / full - 1) < 1e-9 if tie else prefix < full * (1 - 1e-9))
        gap = max(np.abs(moments[n].bias).max() for n in ("cumulative", "sequence"))
        unbiased_trees += int(gap < 1e-12 * (1 + np.abs(paths.policy_gradient).max()))
        token_below_sequence += int(token < full)
        token_below_cumulative += int(token < prefix)
    yield Evidence(
        "total variance of the summed gradient, by ctpo.Estimator, on trees with orthogonal scores: cumulative below "
        "sequence, but equal where rho no longer changes after a token with an advantage; both unbiased",
        "enumeration",
        f"orthogonal scores: variance below sequence on {ordered - equal} of {trees} trees, equal as predicted on "
        f"{equal}, both unbiased on {unbiased_trees}; on the worlds above below it on {lower} of {worlds}, "
        f"{span[0]:.2g} to {span[-1]:.3g} times",
        ordered == unbiased_trees == trees and equal < trees,
        {
            "trees": trees,
            "ordered": ordered,
            "equal": equal,
            "unbiased": unbiased_trees,
            "worlds_lower": lower,
            "ratio": span,
        },
    )
    below = [
        sum(t < 1 for t in relative["token"]),
        sum(t < c for t, c in zip(relative["token"], relative["cumulative"], strict=True)),
    ]
    world = noisy_token_world()
    spread = {n: gradient_moments(world, estimators[n].level).total_variance for n in COMPARED}
    yield Evidence(
        "is the token ratio's variance low? below the sequence's and the cumulative's on the same trees and worlds; "
        "and where b mostly writes what pi seldom does (4/5 against 1/5) before the only token with an advantage",
        "enumeration",
        f"token ratio's variance below sequence's on {token_below_sequence} of {trees} trees and {below[0]} of "
        f"{worlds} worlds, below cumulative's on {token_below_cumulative} and {below[1]}: mostly, not always, as in "
        f"two tokens: token {spread['token']}, cumulative {spread['cumulative']}, sequence {spread['sequence']}",
        2 * (token_below_sequence + below[0]) > trees + worlds and list(spread.values()) == known("noisy_token_ratio"),
        {
            "trees": trees,
            "trees_below_sequence": token_below_sequence,
            "trees_below_cumulative": token_below_cumulative,
            "worlds_below_sequence": below[0],
            "worlds_below_cumulative": below[1],
            "example": {name: str(value) for name, value in spread.items()},
        },
    )
    counter = sum_counterexample()
    prefix, full = (gradient_moments(counter, estimators[n].level).total_variance for n in ("cumulative", "sequence"))
    share = Fraction(1, 2)  # two shared logits whose scores are g and -g: the trace is twice the one-logit variance
    yield Evidence(
        "with one shared logit the order can be reversed: variance of the cumulative and of the sequence estimator",
        "dynamic programming",
        f"one shared logit: variance of the cumulative {prefix * share}, of the sequence estimator {full * share}",
        [prefix * share, full] == known("summed_A")[-2:],
        {"cumulative": str(prefix * share), "sequence": str(full * share)},
    )


def noisy_token_world() -> World:
    """R(11) = 1, R(10) = -1; b = 4/5, pi = 1/5 for the first token, both 1/2 for the second; per-prefix logits."""
    world = two_step((Fraction(4, 5), Fraction(1, 5)), {0: (HALF, HALF), 1: (HALF, HALF)})
    mdp = tree(2, 2, name="noisy token ratio", outcome=lambda s: s[0] * (2 * s[1] - 1))
    return World(mdp, world.behavior, world.target)


def sum_counterexample() -> World:
    """pi(1) = 1/3 twice, one shared logit, R = a1 + a2, and b proportional to pi times the summed integrand."""
    mdp = tree(2, 2, name="zero-variance sequence ratio", outcome=lambda s: s[0] + s[1])
    ones = {(): Fraction(1, 2), (1,): Fraction(4, 9), (0,): Fraction(5, 9)}
    behavior = policy_table(mdp, lambda prefix: [1 - ones[prefix], ones[prefix]])
    target = policy_table(mdp, lambda _prefix: [Fraction(2, 3), Fraction(1, 3)])
    return World(mdp, behavior, target, "shared")


CLAIMS = (
    Claim(
        "3.prop1",
        "E_b[rho_t g_t A_t] = E_pi[g_t A_t]: the prefix ratio corrects the gradient of every token.",
        "true if",
        "A_t depends on the first t tokens only (A^pi, Q^pi; not an outcome reward); absolute continuity",
        "arXiv:2605.07331, Prop. 1",
        check_prop1,
        "cumulative",
        "token",
        "the token ratio",
        "With the exact advantage of the target policy, weigh each token by the cumulative ratio: it is unbiased and "
        "needs no later token. A learned critic's error is a bias of its own.",
    ),
    Claim(
        "3.token",
        "The token ratio (PPO, GRPO) gives an unbiased policy gradient with the exact A^pi.",
        "false",
        "it ignores that the prefix came from b; its sign can be wrong; GSPO and cumulative mean are biased too",
        "arXiv:2605.07331, section 3.2 and Table 1",
        check_token,
        "token",
        "cumulative",
        "the cumulative ratio",
        "The token ratio is a biased correction even with a perfect critic, and can point the wrong way: its "
        "excuse is low variance, not correctness.",
    ),
    Claim(
        "3.surrogate",
        "With A^b, or the return itself, the token ratio gives exactly the gradient of the CPI/TRPO surrogate.",
        "true if",
        "absolute continuity",
        "Kakade and Langford 2002; Schulman et al. 2015",
        check_surrogate,
        "A_behavior",
        "A_target",
        "A^pi instead of A^b",
        "What PPO's ratio optimizes without clipping is the surrogate under the behavior policy's states: right "
        "at the behavior policy itself, and drifting from the true objective as the policy moves.",
    ),
    Claim(
        "3.gspo",
        "The length-normalized ratio estimates Z E_q with q 1/H of the way from b to pi and Z < 1.",
        "true if",
        "sequences of one length H >= 2; pi != b",
        'arXiv:2605.07331, Table 1 ("biased, scale shrunk"), made exact',
        check_gspo,
        lambda horizon: horizon,
        lambda horizon: horizon + 1,
        "the root of degree H + 1",
        "A length-normalized ratio corrects only 1/H of the way: for long answers it is nearly no correction, "
        "however stable it looks.",
    ),
    Claim(
        "3.table",
        "On one shared logit only the cumulative and the sequence ratio meet grad J with A^pi; with an outcome "
        "reward only the sequence ratio does.",
        "true",
        "the two-token world of the check",
        "our own smallest table",
        check_table,
        rational_weights,
        lambda paths, _level: rational_weights(paths, "token"),
        "token weights in every row",
        "Which ratio is right depends on the advantage. The cumulative ratio needs the exact one of the target policy; "
        "of these six weights only the full sequence's is unbiased for an outcome reward in general.",
    ),
    Claim(
        "T1",
        "Token: biased, mostly low variance. Sequence: unbiased, high variance. GSPO: biased. Cumulative: unbiased, "
        "variance below that.",
        "true if",
        "bias with the exact A^pi; the variance order of the summed gradient needs orthogonal scores "
        "(per-prefix or per-position logits), else it can be reversed, and is strict if rho can still change after a "
        "token that has an advantage; the token ratio's low variance is the rule on our worlds, with exceptions",
        "arXiv:2605.07331, Table 1",
        check_table_one,
        TABLE_ONE,
        {**TABLE_ONE, "cumulative": TABLE_ONE["token"]},
        "the token ratio passed off as the cumulative one",
        "The paper's table holds for a single token's term with an exact advantage; for the gradient that you "
        "actually sum, the variance order needs more than the table says (see claim 5).",
    ),
)
