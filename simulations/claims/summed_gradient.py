"""Claim 5: is the variance of the summed gradient ordered, as that of each of its terms is?

Throughout, Y = sum_t rho_t f_t is the gradient under prefix weights and Z = rho_H sum_t f_t the one under the sequence
weight, with f_t = A^pi_t g_t; both have the mean grad J. Worlds of two tokens have one logit per block, so that a
trace over one shared logit is a variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np

import ctpo
from simulations.claims.gradient_bias import UNLIMITED, sum_counterexample
from simulations.claims.martingale import cumulative, variance
from simulations.claims.registry import Claim, Context, Evidence
from simulations.claims.worlds import known, listed, random_trees, two_step
from simulations.counterexamples import STATEMENTS, Statement, describe, in_words, search
from simulations.exact import (
    Trajectories,
    enumerate_trajectories,
    gradient_moments,
    policy_gradient,
)
from simulations.mdp import (
    Parameters,
    World,
    as_numbers,
    bigram,
    independent_tokens,
    one_logit,
    random_tree,
    tree,
    zeros,
)
from simulations.monte_carlo import SummedGradient, estimate, variance_test, z_threshold


def terms(paths: Trajectories, advantage: Any = "A_target") -> np.ndarray:
    """(H, N, D) f_t = A_t g_t of every token."""
    value = paths.advantage(advantage)
    steps = range(value.shape[1])
    return np.stack([paths.summed_scores(np.where(np.arange(len(steps)) == t, value, 0)) for t in steps])


def variances(world: World) -> tuple[Any, Any]:
    """Total variance of Y and of Z."""
    prefix, full = (gradient_moments(world, level).total_variance for level in ("cumulative", "sequence"))
    return prefix, full


def enumerated_variances(paths: Trajectories, f: np.ndarray) -> tuple[Any, Any]:
    """Total variance of sum_t rho_t f_t and of rho_H sum_t f_t, for any (H, N, D) terms."""
    f = f[:, :, np.any(f != 0, axis=(0, 1))]  # where strings have ended there are no scores
    rho = cumulative(paths)
    prefix, full = (rho.T[:, :, None] * f).sum(axis=0), rho[:, -1, None] * f.sum(axis=0)
    return paths.moments(prefix).total_variance, paths.moments(full).total_variance


def of_the_same_family() -> World:
    """R = 1 for the string 10, pi(1) = 2/5 and b(1) = 1/5 at both tokens: b and pi share their one logit."""
    behavior, target = ([1 - one, one] for one in (Fraction(1, 5), Fraction(2, 5)))
    return independent_tokens(behavior, target, 2, outcome=lambda s: int(s == (1, 0)))


# --- 5.identity -----------------------------------------------------------------------------------------------------


def every_pair(paths: Trajectories) -> tuple[Any, Any]:
    """E_b[(rho_H^2 - rho_s rho_t) f_s . f_t] summed over s = t, and over all other pairs."""
    rho, f = cumulative(paths), terms(paths)
    own = cross = Fraction(0)
    for s, t in product(range(len(f)), repeat=2):
        gain = paths.expectation((rho[:, -1] ** 2 - rho[:, s] * rho[:, t]) * (f[s] * f[t]).sum(axis=1))
        own, cross = (own + gain, cross) if s == t else (own, cross + gain)
    return own, cross


def same_token_only(paths: Trajectories) -> tuple[Any, Any]:
    """Wrong: as if the terms of different tokens were uncorrelated."""
    return every_pair(paths)[0], Fraction(0)


def check_identity(context: Context, parts: Callable[[Trajectories], tuple[Any, Any]]) -> Iterator[Evidence]:
    """Var Z - Var Y = sum over pairs; the pairs s = t never lower it, the others can."""
    worlds = good = raised = lowered = negative = 0
    for world in random_trees(context, "pairs", 90, parameters=("shared", "shared", "position", "prefix")):
        worlds += 1
        own, cross = parts(enumerate_trajectories(world))
        prefix, full = variances(world)
        good += int(full - prefix == own + cross)
        negative += int(own < 0)
        raised, lowered = raised + int(cross > 0), lowered + int(cross < 0)
    yield Evidence(
        "Var Z - Var Y (traces, by dynamic programming) against the sum over s, t of E_b[(rho_H^2 - rho_s rho_t) "
        "f_s.f_t] (by enumeration), as fractions; half of the trees with shared logits",
        "enumeration",
        f"equal on {good} of {worlds} random trees; pairs s = t below 0 on {negative}; the other pairs in favor of the "
        f"prefix weight on {raised}, against it on {lowered}",
        good == worlds and negative == 0 and (context.quick or min(raised, lowered) > 0),
        {"worlds": worlds, "equal": good, "own_below_0": negative, "cross_above_0": raised, "cross_below_0": lowered},
    )


# --- 5.orthogonal ---------------------------------------------------------------------------------------------------


def check_orthogonal(context: Context, sharings: tuple[Parameters, ...]) -> Iterator[Evidence]:
    """With per-prefix or per-position logits the trace of the variance is ordered, for any A(prefix, token)."""
    rng = context.rng("any advantage")
    worlds = good = strict = orthogonal = with_any = 0
    for world in random_trees(context, "orthogonal", 150, parameters=sharings):
        worlds += 1
        paths = enumerate_trajectories(world)
        f = terms(paths)
        orthogonal += int(not any(np.any((f[s] != 0) & (f[t] != 0)) for t in range(len(f)) for s in range(t)))
        prefix, full = enumerated_variances(paths, f)
        good, strict = good + int(prefix <= full), strict + int(prefix < full)
        anything = as_numbers(rng.integers(-4, 5, size=(world.mdp.horizon, *world.behavior.shape)), True)
        prefix, full = enumerated_variances(paths, terms(paths, anything))
        with_any += int(prefix <= full)
    yield Evidence(
        "total variance under prefix weights <= under the sequence weight, with A^pi and with random A(prefix, token); "
        "on every trajectory f_s and f_t have no parameter in common; as fractions",
        "enumeration",
        f"ordered with A^pi on {good} ({strict} strictly), with random A on {with_any}, terms orthogonal on "
        f"{orthogonal}, of {worlds} random trees, logits by {' or '.join(sharings)}",
        good == with_any == orthogonal == worlds,
        {"worlds": worlds, "ordered": good, "strict": strict, "any_advantage": with_any, "orthogonal": orthogonal},
    )
    rows = {}
    for name, world in (("A", sum_counterexample()), ("B'", of_the_same_family())):
        for sharing in sharings:
            rows[f"{name}, {sharing}"] = variances(one_logit(world.with_parameters(sharing)))
    yield Evidence(
        "the worlds that break the order with one shared logit (5.ordered), with these parameters instead: Var Y and "
        "Var Z",
        "dynamic programming",
        "; ".join(f"{name}: {prefix}, {full}" for name, (prefix, full) in rows.items()),
        all(prefix <= full for prefix, full in rows.values()),
        {name: [str(v) for v in pair] for name, pair in rows.items()},
    )
    yield _outcome_reward()


def _outcome_reward() -> Evidence:
    """One logit per position, but a reward that is not known at its token: the order is reversed."""
    second = (Fraction(1, 10), Fraction(9, 10))
    world = two_step((Fraction(4, 5), Fraction(7, 10)), {0: second, 1: second})
    mdp = tree(2, 2, name="second token 0", outcome=lambda s: 1 - s[1])
    world = one_logit(World(mdp, world.behavior, world.target, "position"))
    prefix, full = (
        gradient_moments(world, level, "one", outcome=True).total_variance for level in ("cumulative", "sequence")
    )
    return Evidence(
        "an outcome reward instead: R = 1 if the second token is 0, b(1) = 4/5 and 1/10, pi(1) = 7/10 and 9/10, one "
        "logit per position: total variance under prefix weights and under the sequence weight",
        "dynamic programming",
        f"outcome reward, one logit per position: total variance {prefix} (prefix) against {full} (sequence)",
        [prefix, full] == known("summed_outcome"),
        {"prefix": str(prefix), "sequence": str(full)},
    )


# --- 5.direction ----------------------------------------------------------------------------------------------------


def check_direction(context: Context, direction: tuple[int, int]) -> Iterator[Evidence]:
    """Per-position logits order the trace, not the variance of every direction."""
    world = one_logit(sum_counterexample().with_parameters("position"))
    u = as_numbers(direction, True)
    prefix, full = (gradient_moments(world, level, covariance=True) for level in ("cumulative", "sequence"))
    assert prefix.covariance is not None
    assert full.covariance is not None
    along = [u @ moments.covariance @ u for moments in (prefix, full)]
    yield Evidence(
        f"world (A) of 5.ordered with one logit per position, direction {direction}: variance of Y, of Z; their traces",
        "dynamic programming",
        f"direction {direction}: {along[0]} against {along[1]}; trace {prefix.total_variance} against "
        f"{full.total_variance}",
        along == known("direction") and prefix.total_variance <= full.total_variance,
        {"direction": [str(v) for v in along], "trace": [str(prefix.total_variance), str(full.total_variance)]},
    )
    rng, worlds, reversed_, ordered = context.rng("directions"), context.count(60), 0, 0
    for _ in range(worlds):
        paths = enumerate_trajectories(one_logit(random_tree(rng, horizon=2, parameters="position")))
        f = terms(paths)
        prefix_along, full_along = enumerated_variances(paths, (f @ u)[:, :, None])
        prefix_trace, full_trace = enumerated_variances(paths, f)
        reversed_ += int(prefix_along > full_along)
        ordered += int(prefix_trace <= full_trace)
    yield Evidence(
        f"random trees with one logit per position: variance reversed in direction {direction}, trace ordered",
        "enumeration",
        f"on random trees reversed in that direction on {reversed_}, trace ordered on {ordered}, of {worlds}",
        (context.quick or reversed_ > 0) and ordered == worlds,
        {"worlds": worlds, "reversed": reversed_, "trace_ordered": ordered},
    )


# --- 5.ordered ------------------------------------------------------------------------------------------------------


def check_ordered(_context: Context, parameters: Parameters) -> Iterator[Evidence]:
    """Two worlds with one shared logit and the true A^pi in which the prefix weight is the noisier one."""
    worlds = (
        (
            "(A) pi = 1/3 twice, R = a1 + a2, b(1) = 1/2, then 5/9 after 0 and 4/9 after 1",
            "summed_A",
            sum_counterexample(),
        ),
        ("(B') pi = 2/5, b = 1/5 at both tokens, R = 1 for the string 10", "summed_B", of_the_same_family()),
    )
    for name, entry, plain in worlds:
        world = one_logit(plain.with_parameters(parameters))
        paths = enumerate_trajectories(world)
        rho, f = cumulative(paths), terms(paths)
        single = [
            (variance(paths, rho[:, t, None] * f[t]).sum(), variance(paths, rho[:, -1, None] * f[t]).sum())
            for t in range(len(f))
        ]
        both = list(variances(world))
        gradient = policy_gradient(world).sum()
        whole = list(f.sum(axis=0).sum(axis=1))
        yield Evidence(
            f"{name}: summed integrand F of 00, 01, 10, 11; gradient; variance of each term under rho_t and rho_H; of "
            "their sum",
            "dynamic programming",
            f"{name}: F = {listed(whole)}; gradient {gradient}; terms "
            + ", ".join(f"{prefix} <= {full}" for prefix, full in single)
            + f"; sum {both[0]} (prefix) against {both[1]} (sequence)",
            [*whole, gradient, *single[0], *single[1], *both] == known(entry)
            and gradient == paths.expectation(f.sum(axis=(0, 2)), "target"),
            {
                "F": [str(v) for v in whole],
                "gradient": str(gradient),
                "terms": [[str(v) for v in pair] for pair in single],
                "sum": [str(v) for v in both],
            },
        )


# --- 5.zero_variance ------------------------------------------------------------------------------------------------


def tree_policy(paths: Trajectories, weight: np.ndarray) -> np.ndarray:
    """(S, A) the policy of a tree that writes each string with probability proportional to its weight."""
    mdp = paths.world.mdp
    mass = zeros(mdp.n_states, True)
    for states in paths.states.T:
        np.add.at(mass, states, np.where(mdp.policy_states[states], weight, 0))
    np.add.at(mass, paths.final_state, weight)
    state, action, nxt, _ = mdp.edges
    policy = zeros((mdp.n_states, mdp.n_actions), True)
    policy[state, action] = mass[nxt] / mass[state]
    return policy


def summed_integrand(paths: Trajectories) -> np.ndarray:
    """(N,) F = sum_t f_t of a world with one parameter."""
    return terms(paths).sum(axis=(0, 2))


def positive_return(paths: Trajectories) -> np.ndarray:
    """Wrong: the recipe for the value J, not for its gradient."""
    return paths.returns - paths.returns.min() + 1


def worlds_of_one_sign(context: Context, count: int) -> Iterator[World]:
    """Random two-token trees with one shared logit whose summed integrand F has one sign on all strings."""
    rng = context.rng("one sign")
    found = 0
    while found < context.count(count):
        world = one_logit(random_tree(rng, horizon=2 + found % 2, parameters="shared", rewards="dense"))
        whole = summed_integrand(enumerate_trajectories(world))
        if whole.min() * whole.max() > 0:
            found += 1
            yield world


def check_zero_variance(context: Context, tilt: Callable[[Trajectories], np.ndarray]) -> Iterator[Evidence]:
    """Sampling b proportional to pi F makes every single sequence-weighted gradient exact; prefix weights are not."""
    worlds = zero = positive = 0
    for world in worlds_of_one_sign(context, 24):
        worlds += 1
        paths = enumerate_trajectories(world)
        behavior = tree_policy(paths, paths.target_probability * abs(tilt(paths)))
        prefix, full = variances(World(world.mdp, behavior, world.target, scores=world.scores))
        zero, positive = zero + int(full == 0), positive + int(prefix > 0)
    yield Evidence(
        "random trees with one shared logit where F = sum_t f_t has one sign; b proportional to pi F: Var Z, Var Y",
        "dynamic programming",
        f"Var Z = 0 on {zero}, Var Y > 0 on {positive}, of {worlds} random trees",
        zero == worlds and (context.quick or positive > 0),
        {"worlds": worlds, "zero": zero, "prefix_positive": positive},
    )
    plain = sum_counterexample()
    on_policy = enumerate_trajectories(one_logit(World(plain.mdp, plain.target, plain.target, "shared")))
    behavior = tree_policy(on_policy, on_policy.target_probability * abs(tilt(on_policy)))
    ones = [behavior[s, 1] for s in range(3)]
    yield Evidence(
        "the recipe on pi = 1/3 twice, R = a1 + a2 gives the b of example (A): b(1) first, after 0, after 1",
        "enumeration",
        f"the recipe gives b(1) = {listed(ones)}, the world (A) of 5.ordered",
        ones == known("zero_variance_recipe"),
        {"b": [str(v) for v in ones]},
    )
    yield _sampled(context, World(plain.mdp, behavior, plain.target, "shared"))


def _sampled(context: Context, plain: World) -> Evidence:
    """Monte Carlo variances of Y and Z in example (A)."""
    world, n = one_logit(plain).as_float(), context.count(100_000)
    found = {
        level: estimate(
            world,
            SummedGradient(world, ctpo.Estimator(level=level, **UNLIMITED)),
            n=n,
            seed=context.sequence("summed"),
        )
        for level in ("cumulative", "sequence")
    }
    test = variance_test(found["cumulative"], np.array([16 / 3645]))
    limit = z_threshold(1)
    z, sequence = float(test.z[0]), float(found["sequence"].variance[0])
    return Evidence(
        f"example (A) sampled, n = {n}, weights by ctpo.Estimator: variance of Y against 16/3645, of Z against 0",
        "Monte Carlo",
        f"(A), n = {n}: sample variance {found['cumulative'].variance[0]:.6f} (prefix, |z| {z:.2f}, limit "
        f"{limit:.2f}), {sequence:.0e} (sequence)",
        z < limit and sequence < 1e-28,
        {"n": n, "prefix": float(found["cumulative"].variance[0]), "z": z, "limit": limit, "sequence": sequence},
    )


# --- one shared logit, many worlds at once --------------------------------------------------------------------------


def one_logit_terms(outcome: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and terms of binary strings whose tokens all share one logit.

    Args:
        outcome: (..., 2^H) reward of every string, in binary order.
        target: (...) probability of token 1 under pi.

    Returns:
        (..., 2^H, H) scores g_t = a_t - pi(1) and terms f_t = g_t A^pi_t.
    """
    horizon = outcome.shape[-1].bit_length() - 1
    one = target[..., None]
    after, score, found = outcome, [], []
    for t in range(horizon - 1, -1, -1):
        # Strings that share t tokens lie side by side, first those that go on with 0.
        pair = after.reshape(*after.shape[:-1], 2**t, 2, 2 ** (horizon - t - 1))
        mean = (1 - one[..., None]) * pair[..., 0, :] + one[..., None] * pair[..., 1, :]
        before = np.stack([mean, mean], axis=-2).reshape(after.shape)
        score.append((np.arange(2**horizon) >> (horizon - t - 1)) % 2 - one)
        found.append(score[-1] * (after - before))
        after = before
    return np.stack(score[::-1], axis=-1), np.stack(found[::-1], axis=-1)


def by_token(score: np.ndarray, one: np.ndarray) -> np.ndarray:
    """(..., 2^H, H) probability of every token, given that of token 1; token 1 is the one with a score above 0."""
    return np.where(score > 0, one[..., None, None], 1 - one[..., None, None])


def one_logit_variances(
    outcome: np.ndarray, target: np.ndarray, behavior: np.ndarray, parameters: Parameters = "shared"
) -> tuple[np.ndarray, np.ndarray]:
    """Var Y and Var Z of binary strings with one shared logit, or one per position; shapes as in `one_logit_terms`."""
    score, f = one_logit_terms(outcome, target)
    probability = by_token(score, behavior).prod(axis=-1)
    rho = (by_token(score, target) / by_token(score, behavior)).cumprod(axis=-1)
    found = []
    for weight in (rho, rho[..., -1:]):
        value = weight * f
        value = value.sum(axis=-1, keepdims=True) if parameters == "shared" else value
        mean = (probability[..., None] * value).sum(axis=-2)
        found.append((probability[..., None] * value**2).sum(axis=(-2, -1)) - (mean**2).sum(axis=-1))
    return found[0], found[1]


# --- 5.slope --------------------------------------------------------------------------------------------------------

#: s, t (s < t), horizon -> the tokens k whose scores multiply f_s f_t in the slope.
Between = Callable[[int, int], range]


def slope(outcome: np.ndarray, behavior: np.ndarray, between: Between) -> np.ndarray:
    """(...) derivative of Var Z - Var Y in pi(1) at pi = b: 2 sum_{s<t} sum_{s<k<=t} E_b[x_k f_s f_t], x = g/b(1-b)."""
    score, f = one_logit_terms(outcome, behavior)
    probability = by_token(score, behavior).prod(axis=-1)
    total = probability * 0
    for t in range(f.shape[-1]):
        for s in range(t):
            moved = sum(score[..., k] for k in between(s, t))
            total = total + 2 * probability * moved * f[..., s] * f[..., t]
    return total.sum(axis=-1) / (behavior * (1 - behavior))


def after_the_first(s: int, t: int) -> range:
    """The tokens s < k <= t, whose ratios rho_H^2 has twice and rho_s rho_t once."""
    return range(s + 1, t + 1)


def up_to_the_last(s: int, t: int) -> range:
    """Wrong by one: s <= k < t."""
    return range(s, t)


def check_slope(context: Context, between: Between) -> Iterator[Evidence]:
    """The slope of Var Z - Var Y where pi leaves b: its law, two signs, and the reversal of the order."""
    third = as_numbers(Fraction(1, 3), True)
    slopes, noisier = [], []
    for reward in ([0, 1, 1, 2], [0, -1, 1, 0]):
        outcome = as_numbers(reward, True)
        slopes.append(slope(outcome, third, between))
        steps = [as_numbers(Fraction(1, 3) + sign * Fraction(1, 100), True) for sign in (1, -1)]
        noisier.append([bool(np.subtract(*one_logit_variances(outcome, step, third)) > 0) for step in steps])
    logit_slopes = [value * Fraction(2, 9) for value in slopes]
    yield Evidence(
        "two tokens, b = 1/3, R = a1 + a2 and R = a1 - a2: slope of Var Z - Var Y in pi(1), and in the logit; is Y the "
        "noisier one at pi = b + 1/100, and at pi = b - 1/100?",
        "enumeration",
        f"b = 1/3, R = a1 + a2 and a1 - a2: slopes {listed(slopes)} per unit of pi(1), {listed(logit_slopes)} per unit "
        f"of the logit; is the prefix weight the noisier one after a step up: {noisier[0][0]} and {noisier[1][0]}, "
        f"after a step down: {noisier[0][1]} and {noisier[1][1]}",
        slopes == known("slope") and noisier == [[False, True], [True, False]],
        {
            "slope": [str(v) for v in slopes],
            "slope_in_the_logit": [str(v) for v in logit_slopes],
            "prefix_noisier_up_down": noisier,
        },
    )
    rng, count = context.rng("slope"), 25
    outcome = as_numbers(rng.integers(-2, 6, size=(count, 8)), True)
    behavior = as_numbers([Fraction(int(k), 12) for k in rng.integers(2, 11, size=count)], True)
    predicted = slope(outcome, behavior, between)
    largest = abs(predicted).max()
    gaps = []
    for size in (Fraction(1, 1000), Fraction(1, 10_000)):
        above, below = (np.subtract(*one_logit_variances(outcome, behavior + step, behavior)) for step in (size, -size))
        gaps.append(float(abs((below - above) / (2 * size) - predicted).max() / largest))  # of Z - Y
    positive = int((predicted > 0).sum())
    yield Evidence(
        f"{count} random rewards on strings of 3 tokens: largest gap between the slope and exact central differences "
        "of step 1/1000 and 1/10000, relative to the largest slope; it must fall with the square of the step",
        "enumeration",
        f"H = 3, {count} random rewards, {positive} slopes > 0: relative gap to central differences {gaps[0]:.1e}, and "
        f"{gaps[1]:.1e} at a tenth of the step",
        gaps[1] < 1e-6 and abs(gaps[0] / gaps[1] - 100) < 1,
        {"instances": count, "positive": positive, "relative_gap": gaps},
    )


# --- 5.frequency ----------------------------------------------------------------------------------------------------


def noisier_prefix(outcome: np.ndarray, target: np.ndarray, behavior: np.ndarray, parameters: Parameters) -> np.ndarray:
    """Sign of Var Y - Var Z, exactly: float64 where it is beyond doubt, else in Fractions."""
    shape = np.broadcast_shapes(outcome.shape[:-1], target.shape)
    outcome = np.broadcast_to(outcome, (*shape, outcome.shape[-1]))
    target, behavior = np.broadcast_to(target, shape), np.broadcast_to(behavior, shape)
    prefix, full = one_logit_variances(outcome.astype(float), target.astype(float), behavior.astype(float), parameters)
    sign = np.sign(prefix - full).astype(int)
    unclear = np.abs(prefix - full) < 1e-9 * (prefix + full)
    prefix, full = one_logit_variances(outcome[unclear], target[unclear], behavior[unclear], parameters)
    sign[unclear] = np.sign((prefix - full).astype(float))
    return sign


#: Every reward of 0 or 1 on the strings of three tokens but the constant one; 1 - R has the same variances as R.
BINARY_REWARDS = as_numbers([[(k >> i) & 1 for i in range(8)] for k in range(2, 256, 2)], True)


def counts_on_the_grid(parameters: Parameters) -> dict[str, list[int]]:
    """Worlds in which Y is noisier than Z, in which they tie, and all of them: three families of (b, pi, R)."""
    tenths = [Fraction(k, 10) for k in range(1, 10)]
    apart = [(b, p) for b in tenths for p in tenths if b != p]
    near = [(b, b + step) for b in tenths for step in (Fraction(1, 100), Fraction(-1, 100))]
    signs = []
    for pairs in (apart, near):
        b, p = (as_numbers(column, True)[:, None] for column in zip(*pairs, strict=True))
        signs.append(noisier_prefix(BINARY_REWARDS, p, b, parameters))
    start = np.broadcast_to(b.astype(float), signs[1].shape)
    score, f = one_logit_terms(np.broadcast_to(BINARY_REWARDS.astype(float), (*start.shape, 8)), start)
    gradient = (by_token(score, start).prod(axis=-1) * f.sum(axis=-1)).sum(axis=-1)
    signs.append(signs[1][gradient * (p - b).astype(float) > 1e-12])
    return {
        name: [int((s > 0).sum()), int((s == 0).sum()), s.size]
        for name, s in zip(("apart", "near", "uphill"), signs, strict=True)
    }


#: Steps of the bigram models in logit space.
STEPS = (0.05, 0.3, 1.0, 3.0)


def check_frequency(context: Context, parameters: Parameters) -> Iterator[Evidence]:
    """How often the prefix weight is the noisier one: close to b about every other time, far from b hardly ever."""
    counts = counts_on_the_grid(parameters)
    yield Evidence(
        "binary strings of 3 tokens, one shared logit, each of the 127 rewards of 0 or 1: Var Y > Var Z (ties) of all; "
        "b and pi different tenths; pi = b +- 1/100; the latter where pi is uphill of b. No sampling",
        "enumeration",
        "prefix weight noisier in {} of {} worlds with b and pi on tenths ({} ties), {} of {} with |pi - b| = 1/100 "
        "({}), {} of {} where that step is uphill ({})".format(
            *(value for worse, ties, every in counts.values() for value in (worse, every, ties))
        ),
        counts == {"apart": [1608, 130, 9144], "near": [996, 18, 2286], "uphill": [634, 9, 1123]},
        {name: dict(zip(("noisier", "tie", "all"), row, strict=True)) for name, row in counts.items()},
    )
    rng, count = context.rng("bigrams"), context.count(60)
    shape = {"shared": "prefix", "position": "position"}[parameters]  # a bigram's logits are shared over positions
    share: dict[float, list[float]] = {}
    median: dict[float, list[float]] = {}
    for step, n, horizon in product(STEPS, (2, 3), (3, 5)):
        pairs = []
        for _ in range(count):
            world = bigram(rng, n_tokens=n, horizon=horizon, step=step)
            pairs.append(variances(world.with_parameters(shape)))  # type: ignore[arg-type]
        ratio = np.array([prefix / full for prefix, full in pairs])
        share.setdefault(step, []).append(float((ratio > 1).mean()))
        median.setdefault(step, []).append(float(np.median(ratio)))
    average = [float(np.mean(share[step])) for step in STEPS]
    middle = [float(np.median(median[step])) for step in STEPS]
    yield Evidence(
        f"bigram models of 2 and 3 tokens over 3 and 5 positions, {count} each, random step of norm {listed(STEPS)} in "
        "logit space, A^pi: share with Var Y > Var Z; median of Var Y / Var Z",
        "dynamic programming",
        "; ".join(
            f"step {step}: prefix noisier in {100 * min(share[step]):.0f}-{100 * max(share[step]):.0f} %, median ratio "
            f"{min(median[step]):.3g}-{max(median[step]):.3g}"
            for step in STEPS
        ),
        0.15 < average[0] < 0.8
        and average[-1] < 0.15
        and 0.97 < middle[0] < 1.01
        and middle[-1] < 0.75
        and middle == sorted(middle, reverse=True),
        {"step": STEPS, "noisier": list(share.values()), "median_ratio": list(median.values())},
    )


# --- 5.search -------------------------------------------------------------------------------------------------------


def check_search(context: Context, statement: Statement) -> Iterator[Evidence]:
    """A search over small worlds breaks the order with one shared logit, and none of the orders that are theorems."""
    result = search(statement, seed=context.seed, examples=15)
    words = ""
    if result.example is not None:
        words = "{world}: {found}".format(**in_words(describe(statement, result.example)))
    yield Evidence(
        f"small rational worlds proposed and shrunk by Hypothesis, statement: {statement.text}",
        "enumeration",
        f"broken after {result.tried} worlds: {words}" if words else f"not broken by any of {result.tried} worlds",
        result.example is not None and statement.confirmed(result.example.world()),
        {"tried": result.tried, "example": words},
    )
    theorems = [STATEMENTS[name] for name in ("trace_order_position", "variance")]
    tried = [search(theorem, seed=context.seed, examples=15) for theorem in theorems]
    yield Evidence(
        "the same search on statements that are theorems: " + " ".join(theorem.text for theorem in theorems),
        "enumeration",
        "theorems not broken by any of " + ", ".join(str(found.tried) for found in tried) + " worlds",
        all(found.example is None for found in tried),
        {"tried": [found.tried for found in tried]},
    )


CLAIMS = (
    Claim(
        "5.identity",
        "Var Z - Var Y = sum over s, t of E_b[(rho_H^2 - rho_s rho_t) f_s.f_t]: a gain for each token alone, and a "
        "part of either sign for pairs of different tokens.",
        "true if",
        "absolute continuity; f_t = A_t g_t with A_t of the prefix and its token",
        "our own; Prop. 2 of arXiv:2605.07331 is about the diagonal",
        check_identity,
        every_pair,
        same_token_only,
        "the pairs s = t alone",
        "Lower variance token by token does not add up by itself: what pairs of tokens contribute can undo it.",
    ),
    Claim(
        "5.orthogonal",
        "The total variance of the summed gradient is no larger under prefix weights than under the sequence weight.",
        "true if",
        "f_s.f_t = 0 for s != t, as with logits of their own for each prefix or each position; A_t of the first t "
        "tokens, not an outcome reward",
        "our own, after arXiv:2605.07331, Table 1",
        check_orthogonal,
        ("prefix", "position"),
        ("shared",),
        "one shared set of logits",
        "Prefix weights are guaranteed no higher total variance where no two positions share parameters and the "
        "advantage is known at its token. With an outcome reward there is no such guarantee; nor is a language model "
        "such a case.",
    ),
    Claim(
        "5.direction",
        "With logits of their own for each position the prefix weight has the lower variance in every direction of the "
        "parameters.",
        "false",
        "only the sum over all directions is ordered: along (1, 1) two position logits can have 16/3645 against 0",
        "our own",
        check_direction,
        (1, 1),
        (1, 0),
        "the direction of a single position",
        "Compare total variances. Along one chosen direction, such as the step just taken, the order can be reversed.",
    ),
    Claim(
        "5.ordered",
        "The variance of the summed gradient is lower under prefix weights than under the sequence weight.",
        "false",
        "with one shared logit it can be the other way round, although each single term is ordered",
        "arXiv:2605.07331, Table 1, as usually read",
        check_ordered,
        "shared",
        "position",
        "one logit per position",
        "Where positions share parameters, as in a language model, lower variance of the whole gradient is not "
        "guaranteed by lower variance of its terms: measure it.",
    ),
    Claim(
        "5.search",
        "The variance of the summed gradient is ordered in all small worlds with one shared logit.",
        "false",
        "a search finds two tokens and one rewarded string that reverse it, with b and pi in the same family",
        "our own",
        check_search,
        STATEMENTS["summed_order"],
        STATEMENTS["trace_order_position"],
        "the order of the total variance with one logit per position, which is a theorem",
        "No contrived sampler is needed to reverse the order: two coin flips with different odds can do.",
    ),
    Claim(
        "5.zero_variance",
        "Sampling from b proportional to pi F, F = sum_t f_t, makes every sequence-weighted sample exact.",
        "true if",
        "one parameter, and F of one sign on all strings; the prefix weight keeps a variance, in general",
        "the zero-variance importance sampler of any mean, for the gradient",
        check_zero_variance,
        summed_integrand,
        positive_return,
        "the recipe for the expected return instead of its gradient",
        "No theorem can put the sequence weight last for every sampler: some suit it perfectly. They are built on "
        "knowledge of the gradient that training does not have.",
    ),
    Claim(
        "5.slope",
        "Close to b the order of the two variances depends on the direction of the step: Var Z - Var Y has a "
        "first-order slope of either sign, so that reversing a small step reverses the order.",
        "true if",
        "one shared logit and the step small enough; slope not 0",
        "our own",
        check_slope,
        after_the_first,
        up_to_the_last,
        "the tokens s <= k < t instead of s < k <= t",
        "After a small update neither weight is reliably the quieter one, and the difference is of the order of the "
        "step.",
    ),
    Claim(
        "5.frequency",
        "Close to b the prefix weight is the noisier one about every other time and by little; far from b it is nearly "
        "always the quieter one, and by much.",
        "true if",
        "the families of the check: every 0-1 reward on 3 binary tokens; random bigram models; A^pi, no clipping",
        "our own",
        check_frequency,
        "shared",
        "position",
        "logits that no two positions share",
        "With the exact advantage the prefix weight saved more variance the further the policies were apart. For tiny "
        "steps the choice between the two hardly mattered.",
    ),
)
