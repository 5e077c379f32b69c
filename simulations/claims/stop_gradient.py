r"""Claim 9: the stop-gradient form of the prefix-weighted loss against the derivative of the formula as printed.

The printed surrogate :math:`\sum_t \rho_t A_t` depends on the parameters through every factor of :math:`\rho_t`, so
its derivative is :math:`\sum_t \rho_t A_t \sum_{k\le t} g_k`. The released code holds all factors but the last one
constant, which leaves :math:`\sum_t \rho_t A_t g_t`. Which of the two estimates grad J depends on what A is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

import ctpo
from simulations import toy_lm
from simulations.claims.gradient_bias import SHARINGS, UNLIMITED
from simulations.claims.martingale import cumulative, variance
from simulations.claims.registry import Claim, Context, Evidence
from simulations.claims.worlds import HALF, known, listed, random_trees
from simulations.exact import (
    AdvantageKind,
    Trajectories,
    enumerate_trajectories,
    exact_root,
    gradient_mean,
    policy_gradient,
    summed_scores,
)
from simulations.mdp import World, as_numbers, bigram, independent_tokens, random_tree, zeros

#: From rho_t A_t, (N, H), to the coefficient of every token's score, (N, H).
Form = Callable[[np.ndarray], np.ndarray]


def stop_gradient(weighted: np.ndarray) -> np.ndarray:
    """Coefficients of the released form: each term moves its own token only."""
    return weighted


def undetached(weighted: np.ndarray) -> np.ndarray:
    """Coefficients of the printed formula's derivative: each term moves its own token and all earlier ones."""
    return weighted[:, ::-1].cumsum(axis=1)[:, ::-1]


def earlier_tokens(weighted: np.ndarray) -> np.ndarray:
    """Coefficients of sum_t rho_t A_t sum_{k<t} g_k, by which the two forms differ."""
    result = weighted * 0
    for k in range(weighted.shape[1] - 1):
        result[:, k] = weighted[:, k + 1 :].sum(axis=1)
    return result


FORMS: Mapping[str, Form] = {"stop-gradient": stop_gradient, "un-detached": undetached}
SWAPPED: Mapping[str, Form] = {"stop-gradient": undetached, "un-detached": stop_gradient}


# --- differentiation without a formula for the score ----------------------------------------------------------------


@dataclass(frozen=True)
class Dual:
    """Numbers with their derivatives in one direction of the logits: forward differentiation, exact in Fractions."""

    value: np.ndarray
    slope: np.ndarray

    def __mul__(self, other: Dual) -> Dual:
        return Dual(self.value * other.value, self.slope * other.value + other.slope * self.value)

    def __truediv__(self, other: Dual) -> Dual:
        quotient = self.value / other.value
        return Dual(quotient, (self.slope - other.slope * quotient) / other.value)

    def held(self) -> Dual:
        """The same numbers held constant: the stop-gradient operator."""
        return Dual(self.value, self.slope * 0)

    def prefix_products(self) -> Dual:
        """Products of the entries 0..t of every row."""
        running = [Dual(self.value[:, 0], self.slope[:, 0])]
        for t in range(1, self.value.shape[1]):
            running.append(running[-1] * Dual(self.value[:, t], self.slope[:, t]))
        return Dual(np.stack([d.value for d in running], axis=1), np.stack([d.slope for d in running], axis=1))

    def roots(self, degree: np.ndarray) -> Dual:
        """The root of each entry, of a degree of its own; Fractions need rational roots."""
        root = np.empty_like(self.value)
        for index in np.ndindex(*root.shape):
            root[index] = exact_root(self.value[index], int(degree[index]))
        return Dual(root, self.slope * root / (self.value * degree))


def token_probabilities(paths: Trajectories, direction: np.ndarray) -> tuple[Dual, Dual]:
    """Pi and b of every token, (N, H), with their derivatives along a direction (D,) of the logits; b's are 0.

    A logit x enters pi = e^x / sum e^x; moving it by dx scales e^x by 1 + dx, and the quotient rule does the rest.
    Tokens that the policy does not choose have probability 1 whatever the logits are.
    """
    world, exact = paths.world, paths.world.exact
    moves = direction.reshape(world.n_blocks, world.mdp.n_actions)
    above, below = zeros(paths.states.shape, exact), zeros(paths.states.shape, exact)
    for h in range(paths.states.shape[1]):
        live = np.flatnonzero(paths.mask[:, h])
        state, token = paths.states[live, h], paths.actions[live, h]
        move = moves[world.block(h)[state]]
        above[live, h] = world.target[state, token] * move[np.arange(len(live)), token]
        below[live, h] = (world.target[state] * move).sum(axis=1)
    # Of all tokens that the policy does not choose the probability is the int 1, and int / int is a float.
    target, behavior = (as_numbers(table, exact) for table in (paths.target, paths.behavior))
    return Dual(target, above) / Dual(target * 0 + 1, below), Dual(behavior, above * 0)


#: A surrogate's weight at every token, from the derivatives of pi and b and the positions.
Expression = Callable[[Dual, Dual, np.ndarray], Dual]


def printed_expression(target: Dual, behavior: Dual, _position: np.ndarray) -> Dual:
    """rho_t as printed: every factor depends on the parameters."""
    return (target / behavior).prefix_products()


def released_expression(target: Dual, behavior: Dual, _position: np.ndarray) -> Dual:
    """exp(sg[log rho_t] + log pi_t - sg[log pi_t]), as in the released code."""
    return (target / behavior).prefix_products().held() * (target / target.held())


def printed_mean_expression(target: Dual, behavior: Dual, position: np.ndarray) -> Dual:
    """rho_t^(1/t), every factor with its derivative."""
    return (target / behavior).prefix_products().roots(position)


def released_mean_expression(target: Dual, behavior: Dual, position: np.ndarray) -> Dual:
    """exp(sg[log rho_t / t] + log pi_t - sg[log pi_t]), as in the released code's second mode."""
    return printed_mean_expression(target, behavior, position).held() * (target / target.held())


def surrogate_slope(
    paths: Trajectories, advantages: np.ndarray, expression: Expression, direction: np.ndarray
) -> np.ndarray:
    """(N,) derivative of sum_t W_t A_t along a direction of the logits, the advantages (N, H) held constant."""
    weight = expression(*token_probabilities(paths, direction), np.maximum(paths.mask.cumsum(axis=1), 1))
    return (weight.slope * np.where(paths.mask, advantages, 0)).sum(axis=1)


def random_direction(rng: np.random.Generator, world: World) -> np.ndarray:
    """(D,) whole numbers: two different gradients agree along it with a chance of about 1 in 2,000."""
    return as_numbers(rng.integers(-1000, 1001, size=world.dimension), world.exact)


def every_sharing(paths: Trajectories) -> Iterator[Trajectories]:
    """The same trajectories with logits per prefix, per position and shared."""
    for parameters in SHARINGS:
        yield replace(paths, world=paths.world.with_parameters(parameters))


# --- 9.forms --------------------------------------------------------------------------------------------------------


def check_forms(context: Context, expressions: Mapping[str, Expression]) -> Iterator[Evidence]:
    """What differentiating the released and the printed expression gives, on every trajectory."""
    rng = context.rng("forms values")
    cases = trees = good = differences = 0
    worst, estimator = 0.0, ctpo.Estimator("cumulative", **UNLIMITED)
    for world in random_trees(context, "forms", 24):
        trees += 1
        for paths in every_sharing(enumerate_trajectories(world)):
            cases += 1
            advantages = as_numbers(rng.integers(-4, 5, size=paths.mask.shape), True)
            weighted = np.where(paths.mask, cumulative(paths) * advantages, 0)
            along = random_direction(rng, paths.world)
            found = {name: surrogate_slope(paths, advantages, e, along) for name, e in expressions.items()}
            expected = {name: paths.summed_scores(form(weighted)) @ along for name, form in FORMS.items()}
            good += int(all(np.all(found[name] == expected[name]) for name in FORMS))
            gap = found["un-detached"] - found["stop-gradient"]
            differences += int(np.all(gap == paths.summed_scores(earlier_tokens(weighted)) @ along))
            logs, floats = paths.log_probabilities(), advantages.astype(float)
            weight = estimator.coefficients(*logs, floats, paths.mask).weight
            library = summed_scores(paths.world.as_float(), paths.states, paths.actions, weight * floats)
            worst = max(
                worst, float(np.abs(library @ along.astype(float) - found["stop-gradient"].astype(float)).max())
            )
    yield Evidence(
        "derivatives of the two expressions on every trajectory along a random direction of the logits, by exact "
        "forward differentiation of the softmax, against sum rho_t A_t g_t and sum rho_t A_t sum_{k<=t} g_k; any A",
        "enumeration",
        f"both as stated on all trajectories of {good} of {cases} cases ({trees} random trees x 3 sharings of logits)",
        good == cases,
        {"cases": cases, "exact": good},
    )
    yield Evidence(
        "their difference against sum_t rho_t A_t sum_{k<t} g_k",
        "enumeration",
        f"un-detached minus stop-gradient is the sum over earlier tokens in {differences} of {cases}",
        differences == cases,
        {"cases": cases, "exact": differences},
    )
    yield Evidence(
        "ctpo.Estimator's weight x A x score against the derivative of the released expression",
        "enumeration",
        f"ctpo.Estimator gives the stop-gradient form: gap <= {worst:.0e} (slopes of up to some 10^4)",
        worst < 1e-8,
        {"largest_gap": worst},
    )


# --- 9.target_advantage to 9.action_value ---------------------------------------------------------------------------


def example(p: Fraction = Fraction(3, 4)) -> World:
    """One shared logit, two tokens, b = 1/2, pi(1) = p, R = a1 a2."""
    return independent_tokens([HALF, HALF], [1 - p, p], 2, outcome=lambda s: s[0] * s[1])


def with_return(paths: Trajectories) -> np.ndarray:
    """(N, H) the whole return as every token's advantage, 0 where masked."""
    return np.where(paths.mask, paths.returns[:, None], 0)


def example_moments(advantage: AdvantageKind | None, forms: Mapping[str, Form], p: Fraction = Fraction(3, 4)) -> Any:
    """Name of form -> mean and variance of the example's logit; the advantage None is the outcome."""
    paths = enumerate_trajectories(example(p))
    weighted = cumulative(paths) * (with_return(paths) if advantage is None else paths.advantage(advantage))
    summed = {name: paths.summed_scores(form(weighted))[:, 1] for name, form in forms.items()}
    return {name: (paths.expectation(s), variance(paths, s)) for name, s in summed.items()}


def _example_evidence(
    advantage: AdvantageKind | None,
    forms: Mapping[str, Form],
    entry: str,
    label: str,
) -> Evidence:
    found = example_moments(advantage, forms)
    means = tuple(found[name][0] for name in FORMS)
    spread = tuple(found[name][1] for name in FORMS)
    gradient = policy_gradient(example())[1]
    return Evidence(
        f"one shared logit, H = 2, b = 1/2, pi = 3/4, R = a1 a2, A = {label}: mean and variance of both forms",
        "enumeration",
        f"grad J = {gradient}: stop-gradient {means[0]} (Var {spread[0]}), un-detached {means[1]} (Var {spread[1]})",
        [gradient, *means, *spread] == known(entry),
        {"gradient": str(gradient), "mean": [str(m) for m in means], "variance": [str(v) for v in spread]},
    )


def check_target_advantage(context: Context, advantage: AdvantageKind) -> Iterator[Evidence]:
    """With A^pi both forms have expectation grad J, and either can have the smaller variance."""
    cases = good = quieter = louder = 0
    for world in random_trees(context, "target advantage", 40):
        for paths in every_sharing(enumerate_trajectories(world)):
            cases += 1
            weighted = cumulative(paths) * paths.advantage(advantage)
            gradient = policy_gradient(paths.world)
            moments = {name: paths.moments(paths.summed_scores(form(weighted))) for name, form in FORMS.items()}
            good += int(all(np.all(m.mean == gradient) for m in moments.values()))
            held, through = (moments[name].total_variance for name in FORMS)
            quieter += int(through < held)
            louder += int(through > held)
    yield Evidence(
        "means of both forms against grad J, as fractions; total variance of the un-detached form against the other",
        "enumeration",
        f"both are grad J on {good} of {cases} random trees x sharings; un-detached is quieter on {quieter}, noisier "
        f"on {louder}",
        good == cases,
        {"cases": cases, "exact": good, "undetached_quieter": quieter, "undetached_noisier": louder},
    )
    yield _example_evidence(advantage, FORMS, "stop_gradient_target", "A^pi")
    found = example_moments(advantage, FORMS, Fraction(1, 4))
    spread = [found[name][1] for name in FORMS]
    yield Evidence(
        "the same with pi = 1/4: variances",
        "enumeration",
        f"with pi = 1/4 the order is reversed: stop-gradient {spread[0]}, un-detached {spread[1]}",
        spread == known("stop_gradient_target_down"),
        {"variance": [str(v) for v in spread]},
    )


def check_behavior_advantage(context: Context, forms: Mapping[str, Form]) -> Iterator[Evidence]:
    """With A^b the un-detached product is exact, and the stop-gradient form misses the change of states."""
    cases = exact = predicted = biased = noisier = 0
    for world in random_trees(context, "behavior advantage", 40):
        for paths in every_sharing(enumerate_trajectories(world)):
            cases += 1
            advantages = paths.advantage("A_behavior")
            weighted = cumulative(paths) * advantages
            gradient = policy_gradient(paths.world)
            moments = {name: paths.moments(paths.summed_scores(form(weighted))) for name, form in forms.items()}
            means = {name: m.mean for name, m in moments.items()}
            noisier += int(moments["un-detached"].total_variance > moments["stop-gradient"].total_variance)
            state_term = paths.expectation(paths.summed_scores(earlier_tokens(advantages)), "target")
            bias = means["stop-gradient"] - gradient
            exact += int(np.all(means["un-detached"] == gradient))
            predicted += int(np.all(bias == -state_term))
            biased += int(np.any(bias != 0))
    yield Evidence(
        "mean of the un-detached product with A^b against grad J, as fractions, and its total variance against the "
        "stop-gradient form's",
        "enumeration",
        f"un-detached with A^b is grad J on {exact} of {cases} random trees x sharings, noisier on {noisier}",
        exact == cases,
        {"cases": cases, "exact": exact, "noisier": noisier},
    )
    yield Evidence(
        "bias of the stop-gradient form with A^b against -E_pi[sum_t A^b_t sum_{k<t} g_k]",
        "enumeration",
        f"stop-gradient bias as predicted on {predicted} of {cases}, not 0 on {biased}",
        predicted == cases and biased > 0,
        {"cases": cases, "exact": predicted, "biased": biased},
    )
    yield _example_evidence("A_behavior", forms, "stop_gradient_behavior", "A^b")
    found = example_moments("A_behavior", forms)
    (held, held_variance), (through, through_variance) = (found[name] for name in FORMS)
    pays = (through_variance - held_variance) / (held - through) ** 2
    yield Evidence(
        "the same: number of trajectories above which the unbiased form has the smaller mean squared error",
        "enumeration",
        f"there the un-detached form has the smaller mean squared error from more than {pays} trajectories on",
        pays == 15,
        {"crossover": str(pays)},
    )
    yield _longer_bias(context)


def _longer_bias(context: Context) -> Evidence:
    """How large the bias is where strings are long, by the step that separates pi from b."""
    found: dict[str, dict[str, float]] = {}
    for step in (0.03, 0.1, 0.3):
        for world in (
            bigram(context.rng("behavior advantage bigram"), n_tokens=6, horizon=128, step=step),
            toy_lm.fitted_ngram(context.rng("behavior advantage lm"), order=3, horizon=128, step=step),
        ):
            gradient = policy_gradient(world)
            bias = gradient_mean(world, "cumulative", "A_behavior") - gradient
            found.setdefault(world.name, {})[str(step)] = float(np.linalg.norm(bias) / np.linalg.norm(gradient))
    return Evidence(
        "relative bias of the stop-gradient form with A^b over 128 tokens, target 0.03, 0.1 and 0.3 away in logits",
        "dynamic programming",
        "relative bias over 128 tokens at |step| = .03, .1, .3: "
        + "; ".join(f"{name} {listed(row.values())}" for name, row in found.items()),
        all(min(row.values()) > 1e-6 for row in found.values()),
        {"relative_bias": found},
    )


def reward_so_far(paths: Trajectories) -> np.ndarray:
    """(N, H) reward of all tokens before each one."""
    mdp = paths.world.mdp
    reward = np.where(paths.live, mdp.reward[paths.states, paths.actions], 0)
    return reward.cumsum(axis=1) - reward


def check_outcome(context: Context, reward: Callable[[Trajectories], np.ndarray]) -> Iterator[Evidence]:
    """With the return itself neither form estimates grad J, and what a constant baseline does to each."""
    cases = same = predicted = neither = neutral = fixed = fixed_neutral = changed = 0
    for world in random_trees(context, "outcome", 36):
        for paths in every_sharing(enumerate_trajectories(world)):
            cases += 1
            rho, returns = cumulative(paths), reward(paths)
            gradient = policy_gradient(paths.world)
            means = {n: paths.expectation(paths.summed_scores(form(rho * returns))) for n, form in FORMS.items()}
            with_advantage = paths.expectation(paths.summed_scores(rho * paths.advantage("A_behavior")))
            same += int(np.all(means["stop-gradient"] == with_advantage))
            expected_return = np.where(paths.mask, reward_so_far(paths) + paths.advantage("Q_behavior"), 0)
            over_counted = paths.expectation(paths.summed_scores(undetached(expected_return)), "target")
            predicted += int(np.all(means["un-detached"] == over_counted))
            neither += int(all(np.any(mean != gradient) for mean in means.values()))
            ones = np.where(paths.mask, rho, 0)
            constant = {n: paths.expectation(paths.summed_scores(form(ones))) for n, form in FORMS.items()}
            neutral += int(np.all(constant["stop-gradient"] == 0))
            if paths.mask.all():
                fixed += 1
                fixed_neutral += int(np.all(constant["un-detached"] == 0))
            else:
                changed += int(np.any(constant["un-detached"] != 0))
    yield Evidence(
        "with the return R: stop-gradient against stop-gradient with A^b; un-detached against "
        "sum_t E_pi[(sum_{k<=t} g_k) E_b[R|a_1..a_t]]; both against grad J",
        "enumeration",
        f"stop-gradient as with A^b on {same}, un-detached as predicted on {predicted} of {cases} random trees x "
        f"sharings; both biased on {neither}",
        same == predicted == cases and neither > 0,
        {"cases": cases, "same": same, "predicted": predicted, "both_biased": neither},
    )
    yield Evidence(
        "the same with the advantage 1, which is what a constant baseline subtracts a multiple of",
        "enumeration",
        f"a constant baseline leaves stop-gradient alone on {neutral} of {cases}; un-detached on {fixed_neutral} of "
        f"{fixed} without early ends and tool tokens, and moves it on {changed} of the other {cases - fixed}",
        neutral == cases and fixed_neutral == fixed and changed > 0,
        {"cases": cases, "neutral": neutral, "fixed": fixed, "fixed_neutral": fixed_neutral, "changed": changed},
    )
    paths = enumerate_trajectories(example())
    weighted = cumulative(paths) * reward(paths)
    found = [paths.expectation(paths.summed_scores(form(weighted)))[1] for form in FORMS.values()]
    gradient = policy_gradient(paths.world)[1]
    yield Evidence(
        "one shared logit, H = 2, b = 1/2, pi = 3/4, R = a1 a2: mean of both forms with R",
        "enumeration",
        f"grad J = {gradient}: stop-gradient {found[0]}, un-detached {found[1]}",
        [gradient, *found] == known("stop_gradient_outcome"),
        {"gradient": str(gradient), "mean": [str(m) for m in found]},
    )
    rows = {
        "a1": _on_policy(lambda s: s[0], reward),
        "2a1 - 3a2": _on_policy(lambda s: 2 * s[0] - 3 * s[1], reward),
    }
    yield Evidence(
        "on-policy, one shared logit, H = 2, b = pi = 1/2: grad J, mean of both forms with R",
        "enumeration",
        "on-policy, b = pi = 1/2: "
        + "; ".join(f"R = {r}: grad J = {g}, stop-gradient {s}, un-detached {u}" for r, (g, s, u) in rows.items()),
        [value for row in rows.values() for value in row] == known("stop_gradient_on_policy"),
        {r: [str(x) for x in row] for r, row in rows.items()},
    )


def _on_policy(
    outcome: Callable[[tuple[int, ...]], Any], reward: Callable[[Trajectories], np.ndarray]
) -> list[Fraction]:
    """Grad J and the means of both forms for two fair coins of one shared logit."""
    paths = enumerate_trajectories(independent_tokens([HALF, HALF], [HALF, HALF], 2, outcome=outcome))
    weighted = cumulative(paths) * reward(paths)
    means = [paths.expectation(paths.summed_scores(form(weighted)))[1] for form in FORMS.values()]
    return [policy_gradient(paths.world)[1], *means]


def outcome_only(world: World) -> World:
    """The same world without rewards along the way."""
    return replace(world, mdp=replace(world.mdp, reward=world.mdp.reward * 0))


def check_action_value(context: Context, forms: Mapping[str, Form]) -> Iterator[Evidence]:
    """With Q^pi the stop-gradient form is exact and the un-detached product counts each score once per later token."""
    cases = exact = counted = biased = 0
    for k, tree_world in enumerate(random_trees(context, "action value", 40)):
        world = outcome_only(tree_world) if k % 2 else tree_world
        for paths in every_sharing(enumerate_trajectories(world)):
            cases += 1
            weighted = cumulative(paths) * paths.advantage("Q_target")
            gradient = policy_gradient(paths.world)
            means = {name: paths.expectation(paths.summed_scores(form(weighted))) for name, form in forms.items()}
            # Tokens that are still to come, t itself included; with rewards along the way, what they earn.
            still = np.where(paths.mask, 1, 0)[:, ::-1].cumsum(axis=1)[:, ::-1]
            if k % 2:
                times = still * paths.returns[:, None]
            else:
                times = undetached(np.where(paths.mask, paths.returns[:, None] - reward_so_far(paths), 0))
            over = paths.expectation(paths.summed_scores(times), "target")
            exact += int(np.all(means["stop-gradient"] == gradient))
            counted += int(np.all(means["un-detached"] == over))
            biased += int(np.any(means["un-detached"] != gradient))
    yield Evidence(
        "with Q^pi: stop-gradient against grad J; un-detached against E_pi[sum_k (T-k+1) g_k R] (outcome only; else "
        "the sum over t >= k of the return from t on)",
        "enumeration",
        f"stop-gradient is grad J on {exact}, un-detached over-counts as predicted on {counted} of {cases} random "
        f"trees x sharings, and misses grad J on {biased}",
        exact == counted == cases and biased > 0,
        {"cases": cases, "exact": exact, "over_counted": counted, "biased": biased},
    )
    yield _example_evidence("Q_target", forms, "stop_gradient_action_value", "Q^pi")


# --- 9.mean_form ----------------------------------------------------------------------------------------------------


def rooted_world(power: int, horizon: int) -> World:
    """Two tokens with ratios 2^power and 2^-power, one shared logit; R is the product of the tokens."""
    unit = 2**power
    rare, often = Fraction(1, unit + 1), Fraction(unit, unit + 1)
    return independent_tokens([often, rare], [rare, often], horizon, outcome=lambda s: int(all(s)))


def check_mean_form(context: Context, expression: Expression) -> Iterator[Evidence]:
    """The released rho_t^(1/t) mode has gradient rho_t^(1/t) g_t; that of rho_t^(1/t) itself is another."""
    rng = context.rng("mean form directions")
    tokens = good = other = unequal = 0
    for power, horizon in ((2, 2), (6, 3)):
        for paths in every_sharing(enumerate_trajectories(rooted_world(power, horizon))):
            target, behavior = token_probabilities(paths, random_direction(rng, paths.world))
            position = paths.mask.cumsum(axis=1)
            released = expression(target, behavior, position)
            printed = printed_mean_expression(target, behavior, position)
            score = (target / target.held()).slope
            root = (target / behavior).prefix_products().roots(position).value
            tokens += position.size
            good += int((released.slope == root * score).sum())
            other += int((printed.slope == root * score.cumsum(axis=1) / position).sum())
            unequal += int((released.slope != printed.slope)[:, 1:].sum())
    yield Evidence(
        "derivatives per token where all roots are rational (ratios 4^+-1 at H = 2, 64^+-1 at H = 3): released mode "
        "against rho_t^(1/t) g_t, rho_t^(1/t) itself against (1/t) rho_t^(1/t) sum_{k<=t} g_k",
        "enumeration",
        f"released as stated at {good}, rho_t^(1/t) itself at {other} of {tokens} tokens; they differ at {unequal} "
        "tokens after the first",
        good == other == tokens and unequal > 0,
        {"tokens": tokens, "released": good, "itself": other, "unequal": unequal},
    )
    yield _mean_form_floats(context, expression)
    paths = enumerate_trajectories(rooted_world(2, 2))
    advantages = paths.advantage("A_target")
    gradient = policy_gradient(paths.world)[1]
    logit = as_numbers([0, 1], True)
    found = [
        paths.expectation(surrogate_slope(paths, advantages, e, logit)) for e in (expression, printed_mean_expression)
    ]
    yield Evidence(
        "one shared logit, H = 2, b = 1/5, pi = 4/5, R = a1 a2, exact A^pi: mean of the two gradients",
        "enumeration",
        f"grad J = {gradient}: released mode {found[0]}, derivative of rho_t^(1/t) {found[1]}",
        [gradient, *found] == known("mean_form"),
        {"gradient": str(gradient), "released": str(found[0]), "itself": str(found[1])},
    )


def _mean_form_floats(context: Context, expression: Expression) -> Evidence:
    """The same on random trees, where roots are irrational, and against ctpo.Estimator."""
    rng, worst, count = context.rng("mean form"), 0.0, context.count(24)
    estimator = ctpo.Estimator("cumulative_mean", **UNLIMITED)
    for k in range(count):
        world = random_tree(
            rng, n_actions=2 + k % 2, horizon=2 + k % 3, parameters=SHARINGS[k % 3], tool_share=0.3, exact=False
        )
        paths = enumerate_trajectories(world)
        advantages = rng.standard_normal(paths.mask.shape)
        weight = estimator.coefficients(*paths.log_probabilities(), advantages, paths.mask).weight
        along = rng.standard_normal(world.dimension)
        found = surrogate_slope(paths, advantages, expression, along)
        worst = max(worst, float(np.abs(found - paths.summed_scores(weight * advantages) @ along).max()))
    return Evidence(
        "derivative of the released mode on random trees against the weight of ctpo.Estimator(level='cumulative_mean')",
        "enumeration",
        f"released mode is ctpo's cumulative_mean: gap <= {worst:.0e} on {count} random trees",
        worst < 1e-11,
        {"worlds": count, "largest_gap": worst},
    )


CLAIMS = (
    Claim(
        "9.forms",
        "The released stop-gradient expression has the gradient rho_t A_t g_t; the printed formula's own derivative "
        "is rho_t A_t sum_{k<=t} g_k.",
        "true",
        "any advantage that is held constant; unclipped terms",
        "the released code of arXiv:2605.07331 against its printed objective",
        check_forms,
        {"stop-gradient": released_expression, "un-detached": printed_expression},
        {"stop-gradient": printed_expression, "un-detached": printed_expression},
        "the printed formula differentiated literally, passed off as the released loss",
        "Two different estimators share one formula: say which is meant. Differentiating exp(cumsum) by autograd does "
        "not give the released loss.",
    ),
    Claim(
        "9.target_advantage",
        "With A^pi, of the policy being trained, both forms are unbiased for grad J.",
        "true if",
        "A^pi of the target policy itself; absolute continuity; no clipping. Neither form always has less variance",
        "extends arXiv:2605.07331, Prop. 1",
        check_target_advantage,
        "A_target",
        "A_behavior",
        "the behavior policy's advantage passed off as the target's",
        "If your critic really estimates the current policy's advantage, the stop-gradient form is right. So is the "
        "other, but on most random worlds it is noisier.",
    ),
    Claim(
        "9.behavior_advantage",
        "With A^b, the advantage of the policy that sampled, the stop-gradient form is unbiased for grad J.",
        "false",
        "it leaves out how earlier tokens change which states come; the un-detached product keeps that and is exact, "
        "the gradient of the performance-difference lemma",
        "how Prop. 1 is used with a critic fitted to the samples",
        check_behavior_advantage,
        FORMS,
        SWAPPED,
        "the two forms confused",
        "A critic fitted to the sampler's data estimates A^b. Off-policy the stop-gradient loss is then biased, while "
        "the derivative of the whole product is exact, usually at a higher variance, so it pays with large batches.",
    ),
    Claim(
        "9.outcome",
        "With an outcome reward R in place of the advantage, one of the two forms is unbiased for grad J.",
        "false",
        "off-policy stop-gradient equals stop-gradient with A^b; the un-detached product over-counts earlier tokens, "
        "on-policy too, and where lengths vary a constant baseline moves it as well",
        "the objective as used, with a group-relative outcome advantage",
        check_outcome,
        with_return,
        lambda paths: paths.advantage("A_target"),
        "A^pi passed off as the outcome",
        "With outcome rewards stop-gradient is right on-policy only; differentiating the whole product is wrong even "
        "on-policy and can point the other way.",
    ),
    Claim(
        "9.action_value",
        "With Q^pi in place of A^pi the stop-gradient form stays exact, and the un-detached product counts g_k once "
        "for every token from k on.",
        "true if",
        "Q^pi of the target policy itself; absolute continuity; no clipping",
        "our own",
        check_action_value,
        FORMS,
        SWAPPED,
        "the two forms confused",
        "The stop-gradient form needs no baseline to be unbiased with the current policy's action values; "
        "differentiating the whole product does.",
    ),
    Claim(
        "9.mean_form",
        "The released rho_t^(1/t) mode follows the gradient of rho_t^(1/t).",
        "false",
        "its gradient is rho_t^(1/t) g_t; that of rho_t^(1/t) is (1/t) rho_t^(1/t) sum_{k<=t} g_k",
        "the released code of arXiv:2605.07331, second mode; arXiv:2608.01418",
        check_mean_form,
        released_mean_expression,
        printed_mean_expression,
        "rho_t^(1/t) differentiated literally, passed off as the released mode",
        "Read the geometric-mean mode as a weight on each token's own score, not as the derivative of a surrogate; "
        "neither is unbiased.",
    ),
)
