"""Claims 1 and 1s: the cumulative ratio is a martingale, its variance grows, and when it grows strictly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise

import numpy as np
import scipy.sparse
from scipy.special import ndtr

from simulations.claims.registry import Claim, Context, Evidence
from simulations.claims.worlds import (
    HALF,
    known,
    listed,
    long_worlds,
    random_trees,
    scalar,
    two_step,
    with_forbidden_tokens,
)
from simulations.exact import Trajectories, enumerate_trajectories, exact_log2, ratio_moments
from simulations.mdp import (
    POLICY,
    World,
    as_numbers,
    independent_tokens,
    policy_table,
    random_chain,
    random_tree,
    tree,
    zeros,
)
from simulations.monte_carlo import RatioByPosition, estimate, z_scores, z_threshold

#: A process along the stream: from all trajectories to (N, H) values.
Process = Callable[[Trajectories], np.ndarray]


def cumulative(paths: Trajectories) -> np.ndarray:
    """Rho after every token of the stream, stopped at its end."""
    return paths.ratio.cumprod(axis=1)


def one_token_late(paths: Trajectories) -> np.ndarray:
    """Wrong: the product that leaves out the first token."""
    ratio = paths.ratio.copy()
    ratio[:, 0] = ratio[:, 0] * 0 + 1
    return ratio.cumprod(axis=1)


def before_token(process: np.ndarray) -> np.ndarray:
    """(N, H) values of a process just before every token: 1 before the first, else those after the last."""
    return np.column_stack([process[:, 0] * 0 + 1, process[:, :-1]])


def state_after(paths: Trajectories, step: int) -> np.ndarray:
    """(N,) state once `step + 1` tokens are written; in a tree it names the prefix."""
    return paths.states[:, step + 1] if step + 1 < paths.states.shape[1] else paths.final_state


def total_by(keys: np.ndarray, values: np.ndarray, size: int, exact: bool) -> np.ndarray:
    """Sums of values by key."""
    totals = zeros(size, exact)
    np.add.at(totals, keys, values)
    return totals


def variance(paths: Trajectories, values: np.ndarray) -> np.ndarray:
    """Exact variance under the behavior policy of (N, ...) values."""
    mean = paths.expectation(values)
    return paths.expectation((values - mean) ** 2)


# --- 1.martingale ---------------------------------------------------------------------------------------------------


def check_martingale(context: Context, process: Process) -> Iterator[Evidence]:
    """E_b rho_t = 1 and E_b[rho_H | F_t] = rho_t: exactly on trees, far out by DP, and by Monte Carlo.

    The process under test enters the enumeration; the other two carry the mean of rho_t itself further out.
    """
    worlds = equalities = good = looks_ahead = 0
    for world in random_trees(context, "martingale", 300, same_share=0.2):
        worlds += 1
        paths = enumerate_trajectories(world)
        rho, probability, n = process(paths), paths.behavior_probability, world.mdp.n_states
        good += int((paths.expectation(rho) == 1).sum())
        equalities += rho.shape[1]
        for t in range(rho.shape[1]):
            key = state_after(paths, t)
            now = total_by(key, probability * rho[:, t], n, True)
            final = total_by(key, probability * rho[:, -1], n, True)
            target = total_by(key, paths.target_probability, n, True)
            reached = np.unique(key)
            equalities += len(reached)
            good += int(((now == final) & (now == target))[reached].sum())
            mass = total_by(key, probability, n, True)
            looks_ahead += int((mass[key] * rho[:, t] != now[key]).sum())
    yield Evidence(
        "E_b rho_t = 1 for all t; E_b[rho_H | prefix] = rho_t = P_pi(prefix)/P_b(prefix) on every prefix, as fractions",
        "enumeration",
        f"{good} of {equalities} equalities on {worlds} random trees",
        good == equalities and looks_ahead == 0,  # rho_H in place of rho_t has the same means, but is no process
        {"worlds": worlds, "equalities": equalities, "exact": good},
    )
    horizon = 4096
    worst = max(float(np.abs(ratio_moments(w).mean - 1).max()) for w in long_worlds(context, horizon))
    yield Evidence(
        f"E_b rho_t = 1 for all t <= {horizon} on bigram, trigram and sticky worlds",
        "dynamic programming",
        f"|E rho_t - 1| <= {worst:.0e} for all t <= {horizon} in 3 worlds",
        worst < 1e-9,
        {"horizon": horizon, "largest_deviation": worst},
    )
    yield _monte_carlo_mean(context)


def _monte_carlo_mean(context: Context) -> Evidence:
    world = random_chain(context.rng("martingale mc"), n_states=8, n_actions=4, horizon=64, step=0.12)
    moments = ratio_moments(world)
    assert moments.var_log is not None
    assert moments.mean_log is not None
    n = context.count(40_000)
    result = estimate(world, RatioByPosition(), n=n, seed=context.sequence("martingale mc"), fourth=False)
    expected = np.concatenate([np.ones(64), moments.mean_log[1:]])
    z = z_scores(result, expected)
    limit = z_threshold(len(z))
    small = float(moments.var_log[-1])
    return Evidence(
        f"means of rho_t and log rho_t, t <= 64, weights by ctpo.log_ratio (Var log rho_64 = {small:.2f} <= 2)",
        "Monte Carlo",
        f"means of rho_t and log rho_t: largest |z| {z.max():.2f} of {len(z)} (limit {limit:.2f}), n = {n}, "
        f"ESS {result.ess_fraction:.2f}, k-hat {result.pareto_k:.2f}",
        bool(z.max() < limit and small <= 2.0),
        {
            "n": n,
            "largest_z": float(z.max()),
            "limit": limit,
            "ess_fraction": result.ess_fraction,
            "pareto_k": result.pareto_k,
        },
    )


# --- 1.support, 1.survivors: where it fails -------------------------------------------------------------------------


def check_support(context: Context, process: Process) -> Iterator[Evidence]:
    """Without absolute continuity E_b rho_t is the target's probability of staying where b can go."""
    mdp = tree(2, 3, name="b writes one token only")
    behavior = policy_table(mdp, lambda _prefix: [1, 0])
    target = policy_table(mdp, lambda _prefix: [HALF, HALF])
    paths = enumerate_trajectories(World(mdp, behavior, target, require_support=False))
    means = list(paths.expectation(process(paths)))
    yield Evidence(
        "b = (1, 0), pi = (1/2, 1/2): E_b rho_t for t = 1, 2, 3",
        "enumeration",
        f"E rho_t = {listed(means)} at t = 1, 2, 3 where b can write one of pi's two tokens",
        means == known("support"),
        {"means": [str(m) for m in means]},
    )
    step = (Fraction(1), Fraction(1, 2))  # b(1) = 1, pi(1) = 1/2
    world = two_step((HALF, Fraction(3, 4)), {0: step, 1: step}, support=False)
    paths = enumerate_trajectories(world)
    spread = list(variance(paths, process(paths)))
    yield Evidence(
        "the variance order breaks too: Var(rho_1), Var(rho_2)",
        "enumeration",
        f"Var(rho_1), Var(rho_2) = {listed(spread)}: it falls",
        spread == known("support_order"),
        {"variances": [str(v) for v in spread]},
    )
    yield _scored_after_truncation(process)
    rng = context.rng("support")
    agree = count = below = 0
    for world in random_trees(context, "support", 100):
        keep = rng.random(world.behavior.shape) < 0.7
        keep[~keep.any(axis=1), 0] = True
        cut = np.where(keep, world.behavior, 0)
        cut = cut / cut.sum(axis=1, keepdims=True)
        truncated = World(world.mdp, cut, world.target, require_support=False)
        paths = enumerate_trajectories(truncated)
        inside = np.where(paths.mask, (paths.behavior > 0), True).cumprod(axis=1)
        count += 1
        means_t = paths.expectation(process(paths))
        agree += int(np.all(means_t == paths.expectation(inside, "target")))
        below += int(means_t[-1] < 1)
    yield Evidence(
        "truncated sampling (some tokens cut, the rest renormalized): E_b rho_t = P_pi(prefix in b's support)",
        "enumeration",
        f"E rho_t = P_pi(prefix in b's support) on {agree} of {count} random trees, E rho_H < 1 on {below}",
        agree == count and below > 0,
        {"worlds": count, "equal": agree, "below_one": below},
    )


def _scored_after_truncation(process: Process) -> Evidence:
    """One token of a top-2 sampler: the mean ratio depends on which of the two policies is scored after the cut."""
    mdp = tree(3, 1, name="top-2 of three tokens")
    b, pi = (as_numbers([Fraction(n, 20) for n in row], True) for row in ((10, 6, 4), (8, 7, 5)))
    kept = np.array([True, True, False])
    b_cut, pi_cut = (np.where(kept, p, 0) / p[kept].sum() for p in (b, pi))

    def mean(target: np.ndarray, behavior: np.ndarray) -> Fraction:
        """Of the ratio as scored, over tokens of the sampler b_cut."""
        tables = policy_table(mdp, lambda _prefix: behavior), policy_table(mdp, lambda _prefix: target)
        paths = enumerate_trajectories(World(mdp, *tables, require_support=False))
        return (b_cut[paths.actions[:, 0]] * process(paths)[:, 0]).sum()

    found = [mean(pi, b_cut), mean(pi, b), mean(b, b), mean(pi_cut, b_cut)]
    return Evidence(
        "top-2 sampling from b = (.5, .3, .2), pi = (.4, .35, .25): mean ratio with the sampler alone scored after the "
        "cut, with neither, with neither at pi = b, with both",
        "enumeration",
        f"mean ratio of a top-2 sampler: {found[0]} if it alone is scored after the cut, {found[1]} if neither policy "
        f"is ({found[2]} at pi = b), {found[3]} if both are",
        found == known("support_scored_after_cut"),
        {"mean": [str(m) for m in found]},
    )


def among(paths: Trajectories, event: np.ndarray, values: np.ndarray) -> tuple[Fraction, Fraction]:
    """Mean and variance under the behavior policy of (N,) values, given an (N,) event."""
    weight = paths.behavior_probability[event] / paths.behavior_probability[event].sum()
    mean = (weight * values[event]).sum()
    return mean, (weight * (values[event] - mean) ** 2).sum()


def check_survivors(context: Context, process: Process) -> Iterator[Evidence]:
    """Conditional on being alive at t, rho_t is not a martingale."""
    mdp = tree(2, 3, name="stop or go on", eos=0)
    behavior = policy_table(mdp, lambda _prefix: [HALF, HALF])
    target = policy_table(mdp, lambda prefix: [HALF, HALF] if prefix else [Fraction(1, 4), Fraction(3, 4)])
    paths = enumerate_trajectories(World(mdp, behavior, target))
    rho = process(paths)
    means, spreads = zip(*(among(paths, paths.live[:, t], rho[:, t]) for t in range(3)), strict=True)
    yield Evidence(
        "b continues with 1/2, pi with 3/4 at the first token: E[rho_t | alive] and Var[rho_t | alive], t = 1, 2, 3",
        "enumeration",
        f"E[rho_t | alive] = {listed(means)} and Var = {listed(spreads)} at t = 1, 2, 3",
        [*means, *spreads] == known("survivors"),
        {"means": [str(m) for m in means], "variances": [str(v) for v in spreads]},
    )
    rng = context.rng("survivors")
    worlds = equalities = good = off = fell = rose = 0
    for _ in range(context.count(60)):
        world = random_tree(rng, n_actions=int(rng.integers(2, 4)), horizon=3, eos=True)
        worlds += 1
        paths = enumerate_trajectories(world)
        rho, spreads = process(paths), ()
        for t in range(rho.shape[1]):
            alive = paths.live[:, t]
            # Token t is written, and it is not the end: the second event also tells rho_t from rho_{t-1}.
            for event in (alive, alive & (paths.actions[:, t] != 0)):
                mean, spread = among(paths, event, rho[:, t])
                b, pi = (
                    total_by(state_after(paths, t)[event], probability[event], world.mdp.n_states, True)
                    for probability in (paths.behavior_probability, paths.target_probability)
                )
                expected = pi.sum() / b.sum()
                second = (pi[b > 0] ** 2 / b[b > 0]).sum() / b.sum()
                equalities += 2
                good += int(mean == expected) + int(spread == second - expected**2)
                off += int(expected != 1)
                spreads = (*spreads, spread) if event is alive else spreads
        fell += sum(after < before for before, after in pairwise(spreads))
        rose += sum(after > before for before, after in pairwise(spreads))
    yield Evidence(
        "E[rho_t | alive at t] = P_pi(alive at t)/P_b(alive at t), alive before and after token t, and the variance "
        "from the prefixes' probabilities, as fractions; Var[rho_t | alive at t] from each t to the next; trees with "
        "end-of-sequence",
        "enumeration",
        f"{good} of {equalities} equalities, E[rho_t | alive] not 1 in {off} of {equalities // 2}; Var[rho_t | alive] "
        f"falls in {fell} and rises in {rose} of {2 * worlds} steps on {worlds} random trees",
        good == equalities and min(off, fell, rose) > 0,
        {"worlds": worlds, "equalities": equalities, "exact": good, "mean_not_1": off, "fell": fell, "rose": rose},
    )


# --- 1.sample -------------------------------------------------------------------------------------------------------

#: Var(log rho) -> median of the mean of 1000 log-normal ratios with E rho = 1, to four digits.
MEDIANS = {2.0: 0.9936, 4.0: 0.9610, 8.98: 0.7345}


def median_batch_mean(variance_of_log: float, n: int, size: int = 2**16) -> float:
    """Median of the mean of n log-normal ratios with E rho = 1, by convolution on a grid.

    Ratios above twice n are left out: a batch that has one lies above the median anyway. Weights that fall along the
    grid keep the sums that wrap around its end away from its beginning.
    """
    step, place = 2 * n / size, np.arange(size)
    with np.errstate(divide="ignore"):
        edges = np.log(np.append(0.0, (place + 0.5) * step))
    spread = np.sqrt(variance_of_log)
    mass = np.diff(ndtr((edges + variance_of_log / 2) / spread))
    mean = np.diff(ndtr((edges - variance_of_log / 2) / spread)) / step
    shift = mean - mass * place  # moved to the next or the last point, so that every cell keeps its mean
    mass[1:] += np.maximum(shift, 0)[:-1]
    mass[:-1] += np.maximum(-shift, 0)[1:]
    mass -= abs(shift)
    falling = np.exp(-30 / size * place)
    total = (np.fft.irfft(np.fft.rfft(mass * falling) ** n, size) / falling).cumsum()
    above = int(np.searchsorted(total, 0.5))
    inside = (0.5 - total[above - 1]) / (total[above] - total[above - 1])
    return float((above - 0.5 + inside) * step / n)


def median_interval(values: np.ndarray, comparisons: int) -> tuple[float, float]:
    """Interval for the median from order statistics, whatever the distribution, one of some at the family level."""
    ordered = np.sort(values)
    middle = len(ordered) // 2
    reach = int(np.ceil(z_threshold(comparisons) * np.sqrt(len(ordered)) / 2))
    return float(ordered[middle - reach]), float(ordered[middle + reach])


def as_given(variance_of_log: float) -> float:
    """The variance of log rho itself."""
    return variance_of_log


def tenfold_smaller(variance_of_log: float) -> float:
    """Wrong: a tenth of it, where sample means are still near 1."""
    return variance_of_log / 10


def check_sample(context: Context, used: Callable[[float], float]) -> Iterator[Evidence]:
    """The typical mean of a batch falls below 1, though E_b rho_t never does."""
    rng, n, runs = context.rng("sample"), 1000, 2000
    exact = [median_batch_mean(used(v), n) for v in MEDIANS]
    yield Evidence(
        f"median of the mean of {n} log-normal ratios with E rho = 1, at Var(log rho) = 2, 4, 8.98, by convolution",
        "closed form",
        f"median sample mean of {n} ratios with E rho = 1: {', '.join(f'{m:.4f}' for m in exact)} at Var(log rho) = "
        "2, 4, 8.98",
        bool(np.allclose(exact, list(MEDIANS.values()), rtol=0, atol=6e-5)),
        {"variance_of_log": list(MEDIANS), "median": exact},
    )
    found, intervals = [], []
    for v in MEDIANS:
        spread = used(v)
        means = np.array([np.exp(rng.normal(-spread / 2, np.sqrt(spread), n)).mean() for _ in range(runs)])
        found.append(float(np.median(means)))
        intervals.append(median_interval(means, len(MEDIANS)))
    inside = sum(low <= m <= high for m, (low, high) in zip(MEDIANS.values(), intervals, strict=True))
    yield Evidence(
        f"the same over {runs} batches: interval of the median, from order statistics",
        "Monte Carlo",
        f"median of {runs} sampled means: {listed(found)}; {inside} of {len(MEDIANS)} intervals hold the exact one",
        inside == len(MEDIANS) and intervals[-1][1] < 0.9,
        {"median": found, "interval": intervals, "expected": list(MEDIANS.values())},
    )


# --- 1.variance: increments, convex functions -----------------------------------------------------------------------


def chi2_of_target(world: World) -> np.ndarray:
    """(S,) chi2(s) = sum_a pi^2/b - 1 of each policy state, 0 elsewhere."""
    return _chi2(world, world.behavior, world.target)


def chi2_swapped(world: World) -> np.ndarray:
    """Wrong: the divergence the other way round, sum_a b^2/pi - 1."""
    return _chi2(world, world.target, world.behavior)


def _chi2(world: World, base: np.ndarray, other: np.ndarray) -> np.ndarray:
    result = zeros(world.mdp.n_states, world.exact)
    for s in np.flatnonzero(world.mdp.kind == POLICY):
        inside = base[s] > 0
        result[s] = (other[s][inside] ** 2 / base[s][inside]).sum() - 1
    return result


def tilted_chi2(world: World, chi2: np.ndarray, tilt: Callable[[np.ndarray], np.ndarray], steps: int) -> np.ndarray:
    """(steps,) mean of a float (S,) chi2 before each token, under b tilted by a power of rho so far.

    A forward pass of its own, for worlds whose strings do not end. The tilt takes token ratios to their power.
    """
    state, action, nxt, probability = world.mdp.edges
    moves = (world.token_probabilities("behavior") * tilt(world.ratio))[state, action] * probability
    matrix = scipy.sparse.csr_array((moves, (nxt, state)), shape=(world.mdp.n_states,) * 2)
    mass, result = world.mdp.initial, np.empty(steps)
    for k in range(steps):
        result[k] = mass @ chi2
        mass = matrix @ mass
        mass = mass / mass.sum()
    return result


CONVEX: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "x^2": lambda x: x**2,
    "x^4": lambda x: x**4,
    "|x - 1|": lambda x: abs(x - 1),
    "max(x - 3/2, 0)": lambda x: np.maximum(x - Fraction(3, 2), x * 0),
}


def check_variance(context: Context, chi2: Callable[[World], np.ndarray]) -> Iterator[Evidence]:
    """Var(rho_{t+1}) - Var(rho_t) = E_b[rho_t^2 chi2(s_{t+1})] >= 0; E_b phi(rho_t) never falls if phi is convex.

    The convex functions know nothing of chi2, so their part is the same for every chi2 under test.
    """
    steps = good = ordered = compared = worlds = 0
    for world in random_trees(context, "variance", 300, same_share=0.2):
        worlds += 1
        paths = enumerate_trajectories(world)
        rho, divergence = cumulative(paths), chi2(world)
        spread = [Fraction(0), *variance(paths, rho)]
        gain = paths.expectation(before_token(rho) ** 2 * divergence[paths.states])
        steps += len(gain)
        good += sum(spread[t + 1] - spread[t] == gain[t] >= 0 for t in range(len(gain)))
        for phi in CONVEX.values():
            level = paths.expectation(phi(rho))
            compared += len(level) - 1
            ordered += int((level[1:] >= level[:-1]).sum())
    yield Evidence(
        "increment identity at every step, as fractions",
        "enumeration",
        f"identity exact at {good} of {steps} steps on {worlds} random trees",
        good == steps,
        {"worlds": worlds, "steps": steps, "exact": good},
    )
    yield Evidence(
        f"E_b phi(rho_t) non-decreasing for phi = {', '.join(CONVEX)}",
        "enumeration",
        f"E phi(rho_t) does not fall in {ordered} of {compared} comparisons, {len(CONVEX)} convex phi",
        ordered == compared,
        {"comparisons": compared, "ordered": ordered},
    )
    falls, last, gap = 0, [], 0.0
    for world in long_worlds(context, 4096):
        log_m = ratio_moments(world).log_second_moment
        assert log_m is not None
        falls += int((np.diff(log_m) < -1e-12).sum())
        last.append(float(log_m[-1]))
        gains = np.log1p(tilted_chi2(world, chi2(world), np.square, 512))
        gap = max(gap, float(np.abs(np.diff(log_m[:513]) - gains).max()))
    yield Evidence(
        "E_b rho_t^2 non-decreasing for all t <= 4096 on bigram, trigram and sticky worlds; the same increments, "
        "relative to E_b rho_t^2, for t <= 512",
        "dynamic programming",
        f"E rho_t^2 falls at {falls} of 3 x 4096 steps; in the end it is exp({'), exp('.join(map(scalar, last))}); "
        f"increments as predicted to {gap:.0e}",
        falls == 0 and gap < 1e-12,
        {"decreases": falls, "log_second_moment": last, "largest_gap": gap},
    )


# --- 1.optimal ------------------------------------------------------------------------------------------------------


def check_optimal(context: Context, weight: Process) -> Iterator[Evidence]:
    """Among weights w with E_b[w | F_t] = rho_t, rho_t has the least variance for every prefix-measurable f."""
    rng = context.rng("optimal")
    compared = least = 0
    for world in random_trees(context, "optimal", 100):
        paths = enumerate_trajectories(world)
        claimed, rho = weight(paths), cumulative(paths)
        horizon = rho.shape[1]
        for t in range(horizon):
            prefix, following = state_after(paths, t), min(t + 1, horizon - 1)
            value, noise = as_numbers(rng.integers(-3, 4, size=(2, world.mdp.n_states)), True)[:, prefix]
            share = Fraction(int(rng.integers(0, 4)), 3)
            surprise = paths.ratio[:, following] - 1 if following > t else 0  # mean 0 after every prefix
            rivals = [
                rho[:, -1],
                rho[:, following],
                share * rho[:, t] + (1 - share) * rho[:, -1],
                rho[:, t] + noise * surprise,
            ]
            mine = claimed[:, t] * value
            target = paths.expectation(rho[:, t] * value)
            compared += len(rivals)
            for rival in rivals:
                unbiased = paths.expectation(rival * value) == target == paths.expectation(mine)
                least += int(unbiased and variance(paths, mine) <= variance(paths, rival * value))
    yield Evidence(
        "Var(rho_t f) <= Var(w f) against full-sequence, one-longer, mixed and noisy unbiased weights w, random f",
        "enumeration",
        f"rho_t has the least variance in {least} of {compared} comparisons",
        least == compared,
        {"comparisons": compared, "least": least},
    )
    world = independent_tokens([HALF, HALF], [Fraction(1, 4), Fraction(3, 4)], 2)
    paths = enumerate_trajectories(world)
    rho2 = cumulative(paths)[:, 1]
    merged = paths.ratio[:, 1]  # E[rho_2 | a_2] for independent tokens
    numbers = [variance(paths, rho2), variance(paths, merged)]
    yield Evidence(
        "but if f depends on a_2 alone the merged weight E[rho_2 | a_2] is better: variances",
        "enumeration",
        f"where f needs a_2 only: Var(rho_2) = {numbers[0]}, of its average {numbers[1]}",
        numbers == known("merged_state"),
        {"variances": [str(v) for v in numbers]},
    )


# --- 1.log ----------------------------------------------------------------------------------------------------------


def log2_ratios(paths: Trajectories) -> np.ndarray:
    """(N, H) log2 of the token ratios of a world in which they are powers of two, as Fractions."""
    logs = np.empty(paths.ratio.shape, dtype=object)
    logs.ravel()[:] = [Fraction(exact_log2(Fraction(r))) for r in paths.ratio.ravel()]
    return logs


def variance_of_sum(paths: Trajectories, logs: np.ndarray) -> list[Fraction]:
    """Var(l_1 + ... + l_t) for every t."""
    return list(variance(paths, logs.cumsum(axis=1)))


def sum_of_variances(paths: Trajectories, logs: np.ndarray) -> list[Fraction]:
    """Wrong: Var(l_1) + ... + Var(l_t), as if token log-ratios were uncorrelated."""
    return list(variance(paths, logs).cumsum())


def check_log(_context: Context, spread: Callable[[Trajectories, np.ndarray], list[Fraction]]) -> Iterator[Evidence]:
    """Var(log rho_t), unlike Var(rho_t), can fall."""
    same = (HALF, HALF)
    world = two_step((Fraction(4, 5), Fraction(1, 5)), {0: (Fraction(2, 3), Fraction(1, 3)), 1: same})
    paths = enumerate_trajectories(world)
    found = spread(paths, log2_ratios(paths))
    yield Evidence(
        "b = (1/5, 4/5), pi = (4/5, 1/5), then (1/3, 2/3) against (2/3, 1/3) after token 0: Var(log2 rho_t), t = 1, 2",
        "enumeration",
        f"Var(log2 rho_1), Var(log2 rho_2) = {listed(found)}: it falls",
        found == known("log_variance_falls"),
        {"variances": [str(v) for v in found]},
    )


# --- 1s -------------------------------------------------------------------------------------------------------------


def reached_under_target(world: World) -> np.ndarray:
    """(S,) probability under pi of each state of a tree."""
    return _reach(world, "target")


def reached_under_behavior(world: World) -> np.ndarray:
    """Wrong: probability under b."""
    return _reach(world, "behavior")


def _reach(world: World, who: str) -> np.ndarray:
    state, action, nxt, probability = world.mdp.edges
    written = world.token_probabilities(who)  # type: ignore[arg-type]
    reach = world.mdp.initial.copy()
    for s, a, n, p in zip(state, action, nxt, probability, strict=True):  # parents come before children
        reach[n] = reach[n] + reach[s] * written[s, a] * p
    return reach


def check_strict(context: Context, reach: Callable[[World], np.ndarray]) -> Iterator[Evidence]:
    """Var(rho_t) < Var(rho_H) iff pi != b on some prefix reachable under pi at a later step."""
    strict = equal = wrong = 0
    for world in with_forbidden_tokens(context, "strict", 300):
        paths = enumerate_trajectories(world)
        spread = variance(paths, cumulative(paths))
        differs = (world.behavior != world.target).any(axis=1) & world.mdp.policy_states & (reach(world) > 0)
        for t in range(len(spread) - 1):
            later = np.unique(paths.states[:, t + 1 :])
            predicted = bool(differs[later].any())
            wrong += predicted != (spread[t] < spread[-1])
            strict += predicted
            equal += not predicted
    yield Evidence(
        "the criterion against exact variances, with planted equal prefixes and forbidden tokens",
        "enumeration",
        f"criterion right on {strict} strict and {equal} equal pairs, wrong on {wrong}",
        wrong == 0 and strict > 0 and equal > 0,
        {"strict": strict, "equal": equal, "mispredicted": wrong},
    )
    second = {0: (HALF, Fraction(9, 10)), 1: (HALF, HALF)}
    world = two_step((HALF, Fraction(1)), second)
    paths = enumerate_trajectories(world)
    numbers = [*variance(paths, cumulative(paths)), variance(paths, paths.ratio[:, 1])]
    differs = (world.behavior != world.target).any(axis=1) & (reach(world) > 0)
    yield Evidence(
        "so strictness without any assumption, as printed, fails: Var(rho_1), Var(rho_2), Var of the suffix ratio",
        "enumeration",
        f"Var(rho_1), Var(rho_2) = {listed(numbers[:2])}: equal, though the second token's ratio has Var {numbers[2]}",
        numbers == known("strict_equality") and not differs[1:].any(),
        {"variances": [str(v) for v in numbers]},
    )


CLAIMS = (
    Claim(
        "1.martingale",
        "E_b rho_t = 1 for every t, and E_b[rho_H | first t tokens] = rho_t.",
        "true if",
        "absolute continuity: pi(a|s) > 0 implies b(a|s) > 0 on every prefix that b reaches",
        "arXiv:2605.07331, section 3.1",
        check_martingale,
        cumulative,
        one_token_late,
        "the product starts one token late",
        "Check the mean ratio of your data first: with full-support sampling and a target fixed before the data "
        "were drawn its expectation is 1. While the variance of log rho is small, a mean off by several standard "
        "errors says that they are not importance ratios.",
    ),
    Claim(
        "1.support",
        "E_b rho_t = 1 also when the sampler truncates (top-p, top-k).",
        "false",
        "E_b rho_t = P_pi(prefix in the support of b), which falls below 1; the variance order can break too",
        "section 3.1, read without absolute continuity",
        check_support,
        cumulative,
        lambda paths: paths.ratio,
        "token ratios instead of their products",
        "Sample at full support for training data. Scoring only the sampler after truncation gives ratios that are "
        "too small on average; scoring both policies without it can give a mean near 1 although the ratios are wrong. "
        "Cutting both to the same tokens gives ratios of the cut policies.",
    ),
    Claim(
        "1.survivors",
        "rho_t has mean 1 and growing variance among the sequences still alive at t.",
        "false",
        "conditioning on survival breaks the martingale: E[rho_t | alive] = P_pi(alive)/P_b(alive)",
        "what a plot by position over unfinished sequences suggests",
        check_survivors,
        cumulative,
        lambda paths: paths.ratio,
        "token ratios instead of their products",
        "Do not read means or spreads by position over the sequences still alive at t as properties of the ratio: "
        "keep finished sequences in at their last ratio.",
    ),
    Claim(
        "1.sample",
        "As E_b rho_t = 1, the mean of rho_t over a batch is near 1 at every t.",
        "false",
        "once Var(log rho_t) is some units large, rare huge ratios that most batches miss carry the mean",
        "how a logged mean ratio is usually read",
        check_sample,
        as_given,
        tenfold_smaller,
        "a tenth of the variance",
        "A logged mean ratio near 1 is evidence only while the variance of log rho is about 1 or less; beyond it "
        "most batches miss the ratios that matter, so look at the spread and the effective sample size.",
    ),
    Claim(
        "1.variance",
        "Var(rho_{t+1}) - Var(rho_t) = E_b[rho_t^2 chi2(s_{t+1})] >= 0; E_b phi(rho_t) never falls for a convex phi.",
        "true if",
        "absolute continuity",
        "arXiv:2605.07331, Prop. 2(i), with the exact increment",
        check_variance,
        chi2_of_target,
        chi2_swapped,
        "chi2 with b and pi swapped",
        "Stopping the product at token t can only lower the variance of the weight. Each token that is left out would "
        "add its chi2 averaged with weight rho^2, so divergence counts most where the ratio is large already.",
    ),
    Claim(
        "1.optimal",
        "rho_t is the least-variance weight among all w with E_b[w | first t tokens] = rho_t.",
        "true",
        "f may depend on all of the first t tokens; if it depends on less, averaging rho_t is better still",
        "stronger than Prop. 2(i): Rao-Blackwell",
        check_optimal,
        cumulative,
        lambda paths: np.repeat(cumulative(paths)[:, -1:], paths.ratio.shape[1], axis=1),
        "the full-sequence ratio is claimed to be optimal",
        "If the integrand is known after t tokens, no other unbiased weight has less variance than rho_t. Less noise "
        "must come from bias, from knowing what the integrand depends on, or from control variates "
        "(4.doubly_robust).",
    ),
    Claim(
        "1.log",
        "Var(log rho_t) is non-decreasing in t.",
        "false",
        "token log-ratios can be negatively correlated across steps; only Var(rho_t) must grow",
        "what sqrt(t) bounds take for granted (section 3.3)",
        check_log,
        variance_of_sum,
        sum_of_variances,
        "token variances added as if uncorrelated",
        "The spread of log rho_t need not grow; do not treat a flat or falling stretch in its plot as a bug.",
    ),
    Claim(
        "1s.strict",
        "Var(rho_t) < Var(rho_H), strictly, for every t < H.",
        "true if",
        "absolute continuity, and pi != b on some prefix that pi (not only b) reaches at a step after t; if there is "
        "none, the two are equal",
        "arXiv:2605.07331, Prop. 2(i), printed without any assumption",
        check_strict,
        reached_under_target,
        reached_under_behavior,
        "prefixes reachable under b",
        "The gain over the full-sequence ratio is strict unless target and behavior agree on everything that the "
        "target can still reach.",
    ),
)
