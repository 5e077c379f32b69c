"""Claims 2 and 2r: when Var(rho_t) is a product of (1 + chi2), and by how much the sequence ratio is noisier."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np

from simulations.claims.martingale import before_token, chi2_of_target, cumulative, tilted_chi2, variance
from simulations.claims.registry import Claim, Context, Evidence
from simulations.claims.worlds import HALF, known, listed, long_worlds, random_trees, two_step
from simulations.exact import Trajectories, enumerate_trajectories, ratio_moments
from simulations.mdp import (
    World,
    as_numbers,
    chain,
    depths,
    independent_tokens,
    policy_table,
    sticky_hot,
    tree,
    tree_prefixes,
)

THREE_QUARTERS = Fraction(3, 4)
SAME = (HALF, HALF)
UP = (HALF, THREE_QUARTERS)

# --- 2.recursion ----------------------------------------------------------------------------------------------------


def squared(ratio: np.ndarray) -> np.ndarray:
    """What tilts b, of token ratios or of rho_{t-1}: the square."""
    return ratio**2


def first_power(ratio: np.ndarray) -> np.ndarray:
    """Wrong: the ratio itself, which makes it the target's own distribution."""
    return ratio


def check_recursion(context: Context, tilt: Callable[[np.ndarray], np.ndarray]) -> Iterator[Evidence]:
    """E_b rho_t^2 = prod_k (1 + E_tilted chi2(s_k)), without any independence."""
    good = steps = agree = worlds = 0
    for world in random_trees(context, "recursion", 200):
        worlds += 1
        paths = enumerate_trajectories(world)
        rho, divergence = cumulative(paths), chi2_of_target(world)[paths.states]
        weight = tilt(before_token(rho))
        tilted = paths.expectation(weight * divergence) / paths.expectation(weight)
        second = paths.expectation(rho**2)
        product = (1 + tilted).cumprod()
        steps += len(second)
        good += int((product == second).sum())
        agree += int(np.all(ratio_moments(world).second_moment[1:] == second))
    yield Evidence(
        "E_b rho_t^2 against the product of 1 + tilted chi2, as fractions",
        "enumeration",
        f"exact at {good} of {steps} steps on {worlds} random trees",
        good == steps,
        {"worlds": worlds, "steps": steps, "exact": good},
    )
    worst = 0.0
    for world in long_worlds(context, 2048):
        log_m = ratio_moments(world).log_second_moment
        assert log_m is not None
        tilted = tilted_chi2(world, chi2_of_target(world), tilt, len(log_m) - 1)
        worst = max(worst, float(np.abs(np.log1p(tilted).cumsum() - log_m[1:]).max()))
    yield Evidence(
        "the same along 2048 tokens, and dynamic programming equal to enumeration on the trees",
        "dynamic programming",
        f"equal to enumeration on {agree} of {worlds} trees; log difference <= {worst:.0e} over 2048 tokens",
        agree == worlds and worst < 1e-8,
        {"equal_trees": agree, "largest_log_difference": worst},
    )


# --- 2.product ------------------------------------------------------------------------------------------------------


def product_of_marginals(world: World) -> np.ndarray:
    """prod_k (1 + chi2_k) - 1 with the marginal chi2_k = E_b chi2(s_k), for every t."""
    return (1 + ratio_moments(world).chi2_marginal).cumprod() - 1


def sum_of_marginals(world: World) -> np.ndarray:
    """Wrong: sum_k chi2_k, the first-order version."""
    return ratio_moments(world).chi2_marginal.cumsum()


def _independent_world(rng: np.random.Generator) -> World:
    n, horizon = int(rng.integers(2, 4)), int(rng.integers(2, 4))
    mdp = tree(n, horizon, name="independent tokens")

    def policy() -> np.ndarray:
        rows = rng.integers(1, 6, size=(horizon, n)).tolist()
        return policy_table(mdp, lambda prefix: [Fraction(w, sum(rows[len(prefix)])) for w in rows[len(prefix)]])

    return World(mdp, behavior=policy(), target=policy())


def _equal_divergence_world(rng: np.random.Generator) -> World:
    """Binary tokens with chi2 = c_k^2 after every prefix of k - 1 tokens, though b and pi are drawn anew for each.

    With b(1) = u^2 / (u^2 + v^2), pi(1) - b(1) = +-c u v / (u^2 + v^2) has chi2 = c^2 whatever u and v are.
    """
    horizon = int(rng.integers(2, 4))
    mdp = tree(2, horizon, name="one chi2 at every position")
    scales = [Fraction(1, int(c)) for c in rng.integers(4, 8, size=horizon)]
    ones: dict[tuple[int, ...], tuple[Fraction, Fraction]] = {}
    for prefix in tree_prefixes(mdp):
        if len(prefix) < horizon:
            u, v = (int(x) for x in rng.integers(1, 4, size=2))
            behavior, shift = Fraction(u * u, u * u + v * v), scales[len(prefix)] * Fraction(u * v, u * u + v * v)
            ones[prefix] = (behavior, behavior + (shift if rng.random() < 0.5 else -shift))
    behavior_table = policy_table(mdp, lambda prefix: [1 - ones[prefix][0], ones[prefix][0]])
    return World(mdp, behavior_table, policy_table(mdp, lambda prefix: [1 - ones[prefix][1], ones[prefix][1]]))


def _ratio_depends_on_prefix(world: World) -> bool:
    """Whether the third moment of the second token's ratio is not the same after every first token."""
    second = depths(world.mdp) == 1
    return len(set((world.target[second] ** 3 / world.behavior[second] ** 2).sum(axis=1))) > 1


def check_product(context: Context, formula: Callable[[World], np.ndarray]) -> Iterator[Evidence]:
    """The paper's product formula under its assumption, under a weaker one, and when exactly it holds."""
    rng = context.rng("product")
    independent = [_independent_world(rng) for _ in range(context.count(60))]
    equal = [_equal_divergence_world(rng) for _ in range(context.count(60))]
    trees = list(random_trees(context, "product trees", 80, same_share=0.4))
    exact: list[np.ndarray] = []
    uncorrelated: list[np.ndarray] = []
    varying = 0
    for world in independent + equal + trees:
        paths = enumerate_trajectories(world)
        rho, divergence = cumulative(paths), chi2_of_target(world)[paths.states]
        before = before_token(rho) ** 2
        exact.append(np.logical_and.accumulate(formula(world) == variance(paths, rho)))
        product = paths.expectation(before) * paths.expectation(divergence)
        uncorrelated.append(np.logical_and.accumulate(paths.expectation(before * divergence) == product))
        varying += int(uncorrelated[-1][-1] and any(len(set(column)) > 1 for column in divergence.T))
    right = [int(e.all()) for e in exact]
    n = len(independent)
    yield Evidence(
        "Var(rho_t) = prod(1 + chi2_k) - 1 with independent tokens (different at every position)",
        "enumeration",
        f"independent tokens: exact for all t on {sum(right[:n])} of {n} random worlds",
        sum(right[:n]) == n,
        {"worlds": n, "exact": sum(right[:n])},
    )
    good, other = sum(right[n : n + len(equal)]), sum(map(_ratio_depends_on_prefix, equal))
    yield Evidence(
        "the same where b and pi differ from prefix to prefix, but chi2 does not",
        "enumeration",
        f"chi2 the same after every prefix: exact for all t on {good} of {len(equal)} random worlds, on {other} of "
        "which the law of the second token's ratio depends on the first token",
        good == len(equal) and other > 0,
        {"worlds": len(equal), "exact": good, "law_differs": other},
    )
    found = np.concatenate([np.column_stack([e, u])[1:] for e, u in zip(exact, uncorrelated, strict=True)])
    both, neither = int(found.all(axis=1).sum()), int((~found.any(axis=1)).sum())
    yield Evidence(
        "the formula is right for all t <= T if and only if Cov_b(rho_{k-1}^2, chi2(s_k)) = 0 for all k <= T; T >= 2, "
        "on these worlds and on random trees with planted equal policies",
        "enumeration",
        f"formula right if and only if Cov(rho_{{k-1}}^2, chi2(s_k)) = 0 at all tokens: both in {both}, neither in "
        f"{neither}, of {len(found)} cases; both on {varying} worlds where chi2 does depend on the prefix",
        both + neither == len(found) and min(both, neither) > 0,
        {"cases": len(found), "both": both, "neither": neither, "chi2_varies": varying},
    )
    # chi2 = 1/4 after either first token, though the second token's ratio has another law.
    world = two_step(UP, {0: UP, 1: (Fraction(4, 5), Fraction(3, 5))})
    # After 1: b = (1/5, 4/5), pi = (2/5, 3/5): ratios 2 and 3/4.
    paths = enumerate_trajectories(world)
    true, predicted = variance(paths, cumulative(paths))[1], formula(world)[1]
    yield Evidence(
        "dependent tokens with prefix-constant chi2 = 1/4: Var(rho_2) and the formula",
        "enumeration",
        f"dependent tokens with constant chi2: Var(rho_2) = {true}, formula {predicted}",
        [true, predicted] == known("product_constant_chi2"),
        {"variance": str(true), "formula": str(predicted)},
    )


# --- 2.general: where the product formula fails ---------------------------------------------------------------------


def true_variance(world: World) -> np.ndarray:
    """Var_b(rho_t) for every t."""
    return ratio_moments(world).variance[1:]


def check_general(context: Context, spread: Callable[[World], np.ndarray]) -> Iterator[Evidence]:
    """With prefix-dependent chi2 the product formula errs in both directions, and exponentially in t."""
    cases = {
        "after the up-weighted prefix only": ({0: SAME, 1: UP}, "product_more"),
        "after the down-weighted prefix only": ({0: UP, 1: SAME}, "product_less"),
        "after both": ({0: UP, 1: UP}, "product_iid"),
    }
    found, right = [], []
    for name, (second, entry) in cases.items():
        world = two_step(UP, second)
        true, product = spread(world)[1], product_of_marginals(world)[1]
        found.append(f"{true} ({product}) {name}")
        right.append([true, product] == known(entry))
    yield Evidence(
        "b = 1/2, pi = 3/4 at the first token, and at the second after one prefix or both: Var(rho_2) and the formula",
        "dynamic programming",
        "Var(rho_2) (formula) where the second token has chi2 = 1/4: " + ", ".join(found),
        all(right),
        {"cases": found},
    )
    above = below = count = 0
    for world in random_trees(context, "general", 200):
        count += 1
        true, product = spread(world)[-1], product_of_marginals(world)[-1]
        above += int(true > product)
        below += int(true < product)
    yield Evidence(
        "sign of true minus formula on random trees",
        "dynamic programming",
        f"true variance above the formula on {above}, below on {below}, of {count} random trees",
        above > 0 and below > 0,
        {"above": above, "below": below, "worlds": count},
    )
    times = [10, 50, 100, 200]
    world = sticky_hot(2000)
    moments = ratio_moments(world)
    ratios = [spread_over_formula(world, spread, t) for t in times]
    log_m = moments.log_second_moment
    assert log_m is not None
    growth = math.exp(float(log_m[-1] - log_m[-2]))
    matrix = np.array([[0.99**2 / 0.9, 0.01**2 / 0.1], [0.1, 0.9]])
    radius = float(np.abs(np.linalg.eigvals(matrix)).max())
    close = bool(np.allclose(ratios, [1.18, 5.9, 47.7, 3093], rtol=0.005))
    yield Evidence(
        "sticky hot state: true E rho_t^2 over the formula at t = 10, 50, 100, 200; its growth per token",
        "dynamic programming",
        f"sticky hot state: {listed(ratios)} times the formula at t = 10, 50, 100, 200; "
        f"growth {growth:.4f} per token (spectral radius {radius:.4f}, formula 1.045)",
        close and abs(growth - radius) < 1e-9 and abs(radius - 1.0895) < 5e-5,
        {"t": times, "true_over_formula": ratios, "growth": growth, "spectral_radius": radius},
    )

    drops = [spread_over_formula(away_from_hot(times[-1]), spread, t) for t in times]
    yield Evidence(
        "the state is the last bit, b = 1/2, pi(hot) = .45 from cold and .05 from hot, start cold: true E rho_t^2 over "
        "the formula at t = 10, 50, 100, 200",
        "dynamic programming",
        f"a target that leaves the hot state: {listed(drops)} times the formula at t = 10, 50, 100, 200",
        bool(np.allclose(drops, [0.2713, 6.19e-4, 3.09e-7, 7.70e-14], rtol=0.002, atol=0)),
        {"t": times, "true_over_formula": drops},
    )


def away_from_hot(horizon: int) -> World:
    """Two states, cold and hot, named by the last bit; pi leaves the hot one, where it is far from b = 1/2."""
    mdp = chain("away from hot", np.array([[0, 1], [0, 1]]), horizon=horizon, initial=0)
    target = as_numbers([[0.55, 0.45], [0.95, 0.05]], False)
    return World(mdp, np.full((2, 2), 0.5), target)


def spread_over_formula(world: World, spread: Callable[[World], np.ndarray], t: int) -> float:
    """E rho_t^2 by a variance under test, over the product of 1 + chi2 with marginal chi2."""
    return float((1 + spread(world)[t - 1]) / (1 + product_of_marginals(world)[t - 1]))


# --- 2.uncorrelated -------------------------------------------------------------------------------------------------


def token_ratio(paths: Trajectories) -> np.ndarray:
    """(N, H) token ratios."""
    return paths.ratio


def squared_token_ratio(paths: Trajectories) -> np.ndarray:
    """Wrong: their squares, which may be correlated."""
    return paths.ratio**2


def check_uncorrelated(context: Context, quantity: Callable[[Trajectories], np.ndarray]) -> Iterator[Evidence]:
    """Token ratios are uncorrelated in every world, also where the product formula fails."""
    zero = pairs = fails = worlds = 0
    for world in random_trees(context, "uncorrelated", 200):
        worlds += 1
        paths = enumerate_trajectories(world)
        values = quantity(paths)
        centred = values - paths.expectation(values)
        for j in range(values.shape[1]):
            for k in range(j):
                pairs += 1
                zero += int(paths.expectation(centred[:, j] * centred[:, k]) == 0)
        fails += int(product_of_marginals(world)[-1] != true_variance(world)[-1])
    yield Evidence(
        "Cov_b(r_j, r_k) = 0, as fractions; the product formula is wrong all the same",
        "enumeration",
        f"Cov = 0 for {zero} of {pairs} pairs on {worlds} random trees; the product formula fails on {fails}",
        zero == pairs and fails > 0,
        {"pairs": pairs, "zero": zero, "formula_fails": fails, "worlds": worlds},
    )


# --- 2r -------------------------------------------------------------------------------------------------------------

Ratio = Callable[[Fraction, int, int], Fraction]


def exact_variance_ratio(d: Fraction, horizon: int, t: int) -> Fraction:
    """Var(rho_H) / Var(rho_t) with independent tokens of one chi2 = d."""
    return ((1 + d) ** horizon - 1) / ((1 + d) ** t - 1)


def printed_variance_ratio(d: Fraction, horizon: int, t: int) -> Fraction:
    """The paper's factor (1 + d)^(H - t)."""
    return (1 + d) ** (horizon - t)


DIVERGENCES = [
    Fraction(1, 1000),
    Fraction(1, 100),
    Fraction(1, 10),
    Fraction(1, 4),
    Fraction(1),
    Fraction(9),
    Fraction(99),
]


def check_bounds(_context: Context, ratio: Ratio) -> Iterator[Evidence]:
    """The exact ratio, its values, and the bounds max(H/t, (1+d)^(H-t)) <= ratio <= (H/t)(1+d)^(H-t)."""
    world = independent_tokens([HALF, HALF], [Fraction(1, 4), THREE_QUARTERS], 5)
    paths = enumerate_trajectories(world)
    spread = variance(paths, cumulative(paths))
    found = [ratio(Fraction(1, 4), 5, t) for t in range(1, 6)]
    yield Evidence(
        "H = 5, d = 1/4: Var(rho_5)/Var(rho_t) for t = 1..5, enumerated and by formula",
        "enumeration",
        f"H = 5, d = 1/4: Var(rho_5)/Var(rho_t) = {listed(found)}",
        found == known("variance_ratio")[:5] == [spread[4] / v for v in spread],
        {"ratios": [str(f) for f in found]},
    )
    inside = cases = 0
    for d in DIVERGENCES:
        for horizon in range(1, 13):
            for t in range(1, horizon + 1):
                cases += 1
                growth, count = (1 + d) ** (horizon - t), Fraction(horizon, t)
                inside += max(count, growth) <= ratio(d, horizon, t) <= count * growth
    yield Evidence(
        "both bounds for all t <= H <= 12 and d from 1/1000 to 99, as fractions",
        "closed form",
        f"bounds hold in {inside} of {cases} cases, t <= H <= 12, d from 1/1000 to 99",
        inside == cases,
        {"cases": cases, "inside": inside},
    )


def check_printed_limit(_context: Context, ratio: Ratio) -> Iterator[Evidence]:
    """The exact ratio tends to H/t as d -> 0, (1+d)^(H-t) to 1; at the paper's scale they differ by up to ten times."""
    horizon, t, tiny = 12, 3, Fraction(1, 10**9)
    exact, printed = ratio(tiny, horizon, t), printed_variance_ratio(tiny, horizon, t)
    yield Evidence(
        f"d = 1e-9, H = {horizon}, t = {t}: exact ratio, printed factor, H/t",
        "closed form",
        f"d = 1e-9, H = 12, t = 3: ratio {float(exact):.6f}, (1+d)^(H-t) {float(printed):.6f}, H/t {horizon // t}",
        abs(exact - Fraction(horizon, t)) < Fraction(1, 10**6) and abs(printed - 1) < Fraction(1, 10**6),
        {"exact": float(exact), "printed": float(printed), "count": horizon / t},
    )
    sigma, horizon = 0.0335, 8000
    d = Fraction(math.expm1(sigma**2))
    expected = {100: (6.67e4, 7.09e3, 80), 1000: (3.83e3, 2.58e3, 8), 4000: (90.0, 89.0, 2)}
    rows, good = [], True
    for t, numbers in expected.items():
        found = (float(ratio(d, horizon, t)), float(printed_variance_ratio(d, horizon, t)), horizon / t)
        good &= all(abs(f / e - 1) < 0.005 for f, e in zip(found, numbers, strict=True))
        rows.append(found)
    yield Evidence(
        "paper's scale (sigma = 0.0335, H = 8000), t = 100, 1000, 4000: exact / (1+d)^(H-t) / (H/t)",
        "closed form",
        "sigma = 0.0335, H = 8000, ratio (factor, H/t): "
        + "; ".join(f"{a:.3g} ({b:.3g}, {c:g}) at t = {t}" for t, (a, b, c) in zip(expected, rows, strict=True)),
        good,
        {"t": list(expected), "exact_printed_count": rows},
    )


CLAIMS = (
    Claim(
        "2.recursion",
        "E_b rho_t^2 = prod_k (1 + chi2_k) with chi2 averaged under b tilted by rho_{k-1}^2.",
        "true if",
        "absolute continuity; any dependence between tokens",
        "the exact form of Prop. 2(ii)",
        check_recursion,
        squared,
        first_power,
        "tilted by rho instead of rho^2",
        "The second moment of a prefix ratio compounds over tokens. How fast is set by the divergence where the "
        "squared ratio is large, not by its average.",
    ),
    Claim(
        "2.product",
        "Var(rho_t) = prod_k (1 + chi2_k) - 1 with marginal chi2_k.",
        "true if",
        "chi2(s_k) does not depend on the prefix; independence of the tokens is sufficient, not necessary",
        "arXiv:2605.07331, Prop. 2(ii)",
        check_product,
        product_of_marginals,
        sum_of_marginals,
        "the sum of chi2 instead of the product",
        "Forecast the variance from average chi2 only if the divergence is about the same after every prefix.",
    ),
    Claim(
        "2.general",
        "The product formula of Prop. 2(ii) holds also where chi2 depends on the prefix, as it does in language "
        "models.",
        "false",
        "its error has either sign and can grow exponentially in t",
        "Prop. 2(ii), read without its assumption",
        check_general,
        true_variance,
        product_of_marginals,
        "the formula itself passed off as the variance",
        "Do not extrapolate the variance at long horizons from per-token averages: if the divergence sits in "
        "certain contexts the truth can be larger or smaller by orders of magnitude.",
    ),
    Claim(
        "2.uncorrelated",
        "Cov_b(r_j, r_k) = 0 for j != k; so uncorrelated ratios in data are no evidence for the product formula.",
        "true if",
        "absolute continuity",
        "our own",
        check_uncorrelated,
        token_ratio,
        squared_token_ratio,
        "squared ratios",
        "Uncorrelated token ratios say nothing about independence: they are uncorrelated in every genuine data set.",
    ),
    Claim(
        "2r.bounds",
        "With one chi2 = d, Var(rho_H)/Var(rho_t) lies between max(H/t, (1+d)^(H-t)) and (H/t)(1+d)^(H-t).",
        "true if",
        "independent tokens with one shared chi2",
        "sharpens section 3.2",
        check_bounds,
        exact_variance_ratio,
        printed_variance_ratio,
        "the printed factor (1+d)^(H-t)",
        "With equal divergence at every token, expect the sequence ratio to be at least H/t times as noisy as the "
        "ratio at t, more if the policies are far apart.",
    ),
    Claim(
        "2r.limit",
        "Var(rho_H)/Var(rho_t) is (1+d)^(H-t), which tends to H/t as d -> 0.",
        "false",
        "(1+d)^(H-t) tends to 1; what tends to H/t is the exact ratio, another expression",
        "arXiv:2605.07331, section 3.2, read as one formula",
        check_printed_limit,
        exact_variance_ratio,
        printed_variance_ratio,
        "the printed factor passed off as the ratio",
        "Use the exact ratio of variances; the printed factor understates it close to on-policy.",
    ),
)
