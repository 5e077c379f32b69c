"""Claim 7, the log-ratio itself: why log rho_t drifts down, and when its variance is the sum of its tokens'."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np

import ctpo
from ctpo.diagnostics import diagnose, fit_spread
from simulations.claims.effective_sample_size import SIGMAS, binary_world
from simulations.claims.martingale import log2_ratios, variance
from simulations.claims.registry import Claim, Context, Evidence
from simulations.claims.worlds import HALF, known, listed
from simulations.exact import Trajectories, enumerate_trajectories, exact_log2, ratio_moments
from simulations.mdp import (
    POLICY,
    TokenMDP,
    World,
    as_numbers,
    bigram,
    chain,
    random_chain,
    sticky_hot,
    tree,
    zeros,
)
from simulations.monte_carlo import Sampler, z_threshold

#: From a world to the (S,) divergence of its policies in each state: bits on exact worlds, nats otherwise.
Divergence = Callable[[World], np.ndarray]

# --- worlds whose log-ratios are whole numbers -----------------------------------------------------------------------


def dyadic_policies(rng: np.random.Generator, mdp: TokenMDP, count: int) -> list[np.ndarray]:
    """Policies that permute, state by state, the same powers of two: log2 of every ratio is a whole number."""
    weights = 2 ** rng.integers(0, 4, size=(mdp.n_states, mdp.n_actions))
    tables = [as_numbers(rng.permuted(weights, axis=1), True) for _ in range(count)]
    return [table / table.sum(axis=1, keepdims=True) for table in tables]


def dyadic_mdps(context: Context, name: str, count: int) -> Iterator[tuple[np.random.Generator, TokenMDP]]:
    """Trees of 2 or 3 tokens and length 2 or 3, some with end-of-sequence and tool tokens, and a generator."""
    rng = context.rng(name)

    def uniform_tool(prefix: tuple[int, ...]) -> list[Fraction] | None:
        return [HALF, HALF] if prefix and rng.random() < 0.3 else None

    for k in range(context.count(count)):
        with_tool = k % 3 == 2
        yield (
            rng,
            tree(
                2 if with_tool or k % 4 == 0 else 3,
                int(rng.integers(2, 4)),
                eos=0 if k % 3 == 1 else None,
                tool_after=uniform_tool if with_tool else None,
            ),
        )


def dyadic_trees(context: Context, name: str, count: int) -> Iterator[World]:
    """Random exact trees whose log2 ratios are whole numbers."""
    for rng, mdp in dyadic_mdps(context, name, count):
        behavior, target = dyadic_policies(rng, mdp, 2)
        yield World(mdp, behavior, target)


# --- 7.drift ---------------------------------------------------------------------------------------------------------


def kl_from_behavior(world: World) -> np.ndarray:
    """(S,) KL(b||pi) of each policy state, 0 elsewhere."""
    return divergence(world, world.behavior, world.target)


def kl_from_target(world: World) -> np.ndarray:
    """Wrong: KL(pi||b), the divergence the other way round."""
    return divergence(world, world.target, world.behavior)


def divergence(world: World, base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(S,) KL(base||other) of two positive policies in each policy state, 0 elsewhere."""
    result = zeros(world.mdp.n_states, world.exact)
    for s in np.flatnonzero(world.mdp.kind == POLICY):
        ratio = base[s] / other[s]
        logs = np.array([exact_log2(r) for r in ratio], dtype=object) if world.exact else np.log(ratio)
        result[s] = (base[s] * logs).sum()
    return result


def occupancy(world: World) -> np.ndarray:
    """(H, S) probability under b of each state before each token, for a float64 world."""
    state, action, nxt, probability = world.mdp.edges
    moved = np.zeros((world.mdp.n_states, world.mdp.n_states))
    np.add.at(moved, (nxt, state), world.token_probabilities("behavior")[state, action] * probability)
    result = np.empty((world.mdp.horizon, world.mdp.n_states))
    result[0] = world.mdp.initial
    for t in range(1, world.mdp.horizon):
        result[t] = moved @ result[t - 1]
    return result


def check_drift(context: Context, kappa: Divergence) -> Iterator[Evidence]:
    """E_b log rho_t = -sum_k E_b kappa(s_k): exactly on trees, far out by DP, and estimated by ctpo from samples."""
    worlds = steps = good = 0
    for world in dyadic_trees(context, "drift", 120):
        worlds += 1
        paths = enumerate_trajectories(world)
        mean = paths.expectation(log2_ratios(paths).cumsum(axis=1))
        lost = paths.expectation(np.where(paths.mask, kappa(world)[paths.states], 0).cumsum(axis=1))
        steps += len(mean)
        good += int((mean == -lost).sum())
    yield Evidence(
        "E_b log2 rho_t = -sum_{k<=t} E_b KL(b||pi)(s_k) on trees of dyadic policies, some with end-of-sequence and "
        "tool tokens, as fractions",
        "enumeration",
        f"identity exact at {good} of {steps} steps on {worlds} random trees",
        good == steps,
        {"worlds": worlds, "steps": steps, "exact": good},
    )
    horizon, gaps, slopes = 2048, [], []
    for world in (bigram(context.rng("drift bigram"), n_tokens=8, horizon=horizon), sticky_hot(horizon)):
        mean = ratio_moments(world).mean_log
        assert mean is not None
        lost = np.cumsum(occupancy(world) @ kappa(world))
        gaps.append(float(np.abs(mean[1:] + lost).max() / lost[-1]))
        slopes.append(
            [float(-mean[horizon // 2] / (horizon / 2)), float(-(mean[-1] - mean[horizon // 2]) * 2 / horizon)]
        )
    yield Evidence(
        f"the same for all t <= {horizon} on a bigram and a sticky world: largest relative gap; and the fall per "
        "token in the first and in the second half",
        "dynamic programming",
        f"relative gap <= {max(gaps):.0e} for t <= {horizon}; nats per token in the two halves: "
        + "; ".join(listed(pair) for pair in slopes),
        max(gaps) < 1e-9 and all(abs(a - b) < 0.01 * a for a, b in slopes),
        {"horizon": horizon, "largest_relative_gap": max(gaps), "fall_per_token": slopes},
    )
    yield _estimated_drift(context, kappa)


def _estimated_drift(context: Context, kappa: Divergence) -> Evidence:
    """Both of ctpo's token estimators meet the mean divergence, at very different errors."""
    world = random_chain(context.rng("estimated drift"), n_states=8, n_actions=4, horizon=64, step=0.1)
    true = float((occupancy(world) @ kappa(world)).mean())
    batch = Sampler(world).draw(context.count(4000), context.rng("estimated drift samples"))
    fit = fit_spread(batch.logp, batch.behavior_logp)
    found = {"-log r": (fit.token_drift, fit.token_drift_se), "r - 1 - log r": (fit.token_kl, fit.token_kl_se)}
    z = {name: abs(value - true) / error for name, (value, error) in found.items()}
    limit = z_threshold(len(z))
    return Evidence(
        "mean over tokens of -log r_t and of r_t - 1 - log r_t (ctpo.diagnostics.fit_spread, errors over sequences) "
        f"against the mean KL(b||pi) of a token, {fit.n_sequences} sequences of 64 tokens",
        "Monte Carlo",
        f"mean KL {true:.3g}; "
        + ", ".join(f"{name}: {value:.3g} (s.e. {error:.1g})" for name, (value, error) in found.items())
        + f"; largest |z| {max(z.values()):.2f} (limit {limit:.2f})",
        max(z.values()) < limit and fit.token_kl_se < 0.2 * fit.token_drift_se,
        {"true": true, "estimates": {name: list(pair) for name, pair in found.items()}, "limit": limit},
    )


# --- 7.variance ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogParts:
    """Log2 ratios of all trajectories, and what they are made of.

    Attributes:
        paths: The trajectories.
        logs: (N, H) l_k = log2 r_k.
        kappa: (N, H) KL(b||pi) in the state before token k, bits.
        within: (N, H) variance of log2 r_k given the prefix.
    """

    paths: Trajectories
    logs: np.ndarray
    kappa: np.ndarray
    within: np.ndarray

    @classmethod
    def of(cls, world: World) -> LogParts:
        """The parts of a world of dyadic policies."""
        paths = enumerate_trajectories(world)
        kappa, second = kl_from_behavior(world), zeros(world.mdp.n_states, True)
        for s in np.flatnonzero(world.mdp.kind == POLICY):
            second[s] = sum(p * exact_log2(r) ** 2 for p, r in zip(world.behavior[s], world.ratio[s], strict=True))
        by_token = [np.where(paths.mask, table[paths.states], 0) for table in (kappa, second - kappa**2)]
        return cls(paths, log2_ratios(paths), *by_token)

    def covariance(self, x: np.ndarray, y: np.ndarray) -> Fraction:
        """Exact covariance under b of two (N,) statistics."""
        mean = self.paths.expectation
        return mean(x * y) - mean(x) * mean(y)


def with_divergence(parts: LogParts) -> Fraction:
    """The sum of E v_k, plus Var K - 2 Cov(M, K), K = sum kappa(s_k), M = log2 rho_H + K."""
    total = parts.kappa.sum(axis=1)
    martingale = parts.logs.sum(axis=1) + total
    within = parts.paths.expectation(parts.within).sum()
    return within + parts.covariance(total, total) - 2 * parts.covariance(martingale, total)


def within_only(parts: LogParts) -> Fraction:
    """Wrong: the conditional variances of the tokens are added and nothing else."""
    return parts.paths.expectation(parts.within).sum()


def check_variance(context: Context, predicted: Callable[[LogParts], Fraction]) -> Iterator[Evidence]:
    """The decomposition, the covariances, and the criterion for Var(log rho_t) = sum_k Var(l_k)."""
    worlds = good = pairs = equal = agree = 0
    signs = {"above": 0, "below": 0, "equal": 0}
    for world in dyadic_trees(context, "log variance", 120):
        worlds += 1
        parts = LogParts.of(world)
        logs, kappa = parts.logs, parts.kappa
        total = logs.sum(axis=1)
        spread = parts.covariance(total, total)
        good += int(spread == predicted(parts))
        crossed = Fraction(0)
        for s, t in combinations(range(logs.shape[1]), 2):
            pairs += 1
            moved = parts.covariance(logs[:, s], kappa[:, t])
            equal += int(parts.covariance(logs[:, s], logs[:, t]) == -moved)
            crossed += moved
        separate = variance(parts.paths, logs).sum()
        agree += int((spread == separate) == (crossed == 0))
        sign = "equal" if spread == separate else "above" if spread > separate else "below"
        signs[sign] += 1
    yield Evidence(
        "Var(log2 rho_H) = sum_k E v_k + Var(K) - 2 Cov(M, K); Cov(l_s, l_t) = -Cov(l_s, kappa(s_t)) for s < t; "
        "Var(log2 rho_H) = sum_k Var(l_k) iff these covariances sum to 0; as fractions",
        "enumeration",
        f"decomposition exact on {good} of {worlds} random trees, covariances in {equal} of {pairs} pairs, criterion "
        f"right on {agree}; Var(log2 rho_H) above the sum on {signs['above']}, below on {signs['below']}",
        good == agree == worlds and equal == pairs and (min(signs["above"], signs["below"]) > 0 or context.quick),
        {"worlds": worlds, "decomposition": good, "pairs": pairs, "covariances": equal, "criterion": agree, **signs},
    )
    yield _constant_divergence(context, predicted)
    yield _markov_variance(context)
    yield _fading_tokens(context)


def _fading_tokens(context: Context) -> Evidence:
    """Two speeds of the sequences and fading tokens give std(log rho_t) = sigma sqrt(t) exactly."""
    sigma, speeds, horizon = 0.1, np.array([0.5, 1.5]), 1000
    at = np.array([10, 100, 1000])
    # Var(log rho_t) = V + V^2/16 = sigma^2 t with V the summed token variances at speed 1.
    summed = 8 * (np.sqrt(1 + sigma**2 * np.arange(horizon + 1) / 4) - 1)
    exact = [math.sqrt(total_variance(speeds * v, -speeds * v / 2) / t) for v, t in zip(summed[at], at, strict=True)]
    token = np.diff(summed)
    ratio = sigma**2 * horizon / float(sum(total_variance(speeds * v, -speeds * v / 2) for v in token))
    n, rng = context.count(1600), context.rng("fading tokens")
    spread = token * np.repeat(speeds, n // 2)[:, None]
    logs = rng.normal(-spread / 2, np.sqrt(spread))
    fit = fit_spread(logs, np.zeros_like(logs), bootstrap=100, seed=context.sequence("fading tokens bootstrap"))
    limit = z_threshold(3)
    z = [(fit.power - 0.5) / fit.power_se, (fit.variance_ratio - ratio) / fit.variance_ratio_se]
    away = (fit.variance_ratio - 1) / fit.variance_ratio_se
    return Evidence(
        "Gaussian tokens, E rho_t = 1 in every sequence, half of the sequences at speed 1/2 and half at 3/2, token "
        "variances such that V + V^2/16 = .01 t: std(log rho_t)/sqrt(t) at t = 10, 100, 1000 and the variance ratio at "
        f"1000; power and variance ratio by fit_spread from {n} sequences",
        "Monte Carlo",
        f"unequal speeds and fading tokens: std(log rho_t)/sqrt(t) = {listed(exact)} at t = 10, 100, 1000, but a "
        f"variance ratio of {ratio:.3f}; from {n} sequences power {fit.power:.3f}, variance ratio "
        f"{fit.variance_ratio:.2f} (s.e. {fit.variance_ratio_se:.2f})",
        bool(np.allclose(exact, sigma, rtol=1e-12))
        and ratio > 1.4
        and max(map(abs, z)) < limit
        and (away > limit or context.quick),
        {"t": at.tolist(), "std_over_sqrt_t": exact, "variance_ratio": ratio, "power": fit.power, "z": [*z, away]},
    )


def _constant_divergence(context: Context, predicted: Callable[[LogParts], Fraction]) -> Evidence:
    """Which token is likely differs from prefix to prefix, the divergence does not."""
    rng, count, good = context.rng("constant divergence"), context.count(40), 0
    for _ in range(count):
        mdp = tree(2, 3)
        size = np.array([len(label.strip("(,)").split(",")) if label != "()" else 0 for label in mdp.labels])
        weights = np.stack([np.ones(mdp.n_states, dtype=int), 2 ** rng.integers(1, 4, size=4)[size]], axis=1)
        table = as_numbers(rng.permuted(weights, axis=1), True)
        behavior = table / table.sum(axis=1, keepdims=True)
        parts = LogParts.of(World(mdp, behavior, behavior[:, ::-1].copy()))
        total = parts.logs.sum(axis=1)
        separate = variance(parts.paths, parts.logs).sum()
        good += int(parts.covariance(total, total) == separate == predicted(parts))
    return Evidence(
        "divergences that depend on the position only, token probabilities that depend on the prefix: Var(log2 "
        "rho_3) = sum_k Var(l_k), as fractions",
        "enumeration",
        f"with kappa the same after every prefix the variances add up on {good} of {count} random trees",
        good == count,
        {"worlds": count, "exact": good},
    )


def _markov_variance(context: Context) -> Evidence:
    """Var(log rho_t) over the sum of token variances far out: 1 for i.i.d. tokens, anything elsewhere."""
    horizon = 2048
    found = {}
    for name, world in (
        ("independent tokens", binary_world(SIGMAS[0], horizon)),
        ("bigram", bigram(context.rng("variance bigram"), n_tokens=8, horizon=horizon)),
        ("sticky hot state", sticky_hot(horizon)),
        ("hot or cold for ever", hot_or_cold(horizon, exact=False)),
    ):
        joint = ratio_moments(world).var_log
        assert joint is not None
        written = world.token_probabilities("behavior")
        with np.errstate(divide="ignore"):
            logs = np.where(written > 0, np.log(np.where(written > 0, world.ratio, 1.0)), 0.0)
        mean, second = ((written * logs**p).sum(axis=1) for p in (1, 2))
        states = occupancy(world)
        found[name] = float(joint[-1] / (states @ second - (states @ mean) ** 2).sum())
    return Evidence(
        f"Var(log rho_{horizon}) over the sum of its tokens' variances, by world",
        "dynamic programming",
        f"Var(log rho_{horizon}) over the sum of token variances: "
        + ", ".join(f"{r:.3f} ({n})" for n, r in found.items()),
        abs(found["independent tokens"] - 1) < 1e-9
        and found["sticky hot state"] < 0.9
        and found["hot or cold for ever"] > 10,
        {"ratio": found},
    )


# --- 7.superlinear ---------------------------------------------------------------------------------------------------


def total_variance(variances: np.ndarray, means: np.ndarray) -> Any:
    """Of an even mixture: mean of the variances plus variance of the means."""
    return variances.mean() + ((means - means.mean()) ** 2).mean()


def mean_variance(variances: np.ndarray, means: np.ndarray) -> Any:
    """Wrong: the variance of the means is forgotten."""
    return variances.mean()


def hot_or_cold(horizon: int, *, exact: bool = True) -> World:
    """A neutral first token picks hot (b = (1/3, 2/3), pi reversed, for ever) or cold (pi = b)."""
    third = Fraction(1, 3)
    behavior = as_numbers([[HALF, HALF], [third, 2 * third], [HALF, HALF]], exact)
    target = as_numbers([[HALF, HALF], [2 * third, third], [HALF, HALF]], exact)
    mdp = chain(f"hot or cold H={horizon}", np.array([[1, 2], [1, 1], [2, 2]]), horizon=horizon, initial=0, exact=exact)
    return World(mdp, behavior, target)


def check_superlinear(_context: Context, of_mixture: Callable[[np.ndarray, np.ndarray], Any]) -> Iterator[Evidence]:
    """Sequences that diverge at different speeds make Var(log rho_t) grow like t^2."""
    after, exact, formula = (1, 2, 4, 6), [], []
    for n in after:
        paths = enumerate_trajectories(hot_or_cold(n + 1))
        exact.append(variance(paths, log2_ratios(paths).sum(axis=1)))
        components = as_numbers([[Fraction(8 * n, 9), 0], [Fraction(-n, 3), 0]], True)
        formula.append(of_mixture(components[0], components[1]))
    yield Evidence(
        "a neutral first token picks hot (log2 r = +-1, kappa = 1/3 bit) or cold (pi = b): Var(log2 rho) after n = "
        "1, 2, 4, 6 more tokens, enumerated, and 4n/9 + n^2/36",
        "enumeration",
        f"hot or cold first token: Var(log2 rho) = {listed(exact)} after n = 1, 2, 4, 6 tokens, 4n/9 + n^2/36 exactly",
        exact == formula == known("superlinear"),
        {"n": list(after), "variance": [str(v) for v in exact], "formula": [str(v) for v in formula]},
    )
    horizon = 4097
    joint = ratio_moments(hot_or_cold(horizon, exact=False)).var_log
    assert joint is not None
    later = np.arange(1, horizon)
    gap = float(np.abs(joint[2:] / math.log(2) ** 2 / (4 * later / 9 + later**2 / 36) - 1).max())
    power = 0.5 * math.log(joint[-1] / joint[horizon // 2 + 1]) / math.log(2)
    yield Evidence(
        f"the same for all n <= {horizon - 1}: largest relative gap; power of n by which the spread grows at the end",
        "dynamic programming",
        f"4n/9 + n^2/36 within {gap:.0e} for n <= {horizon - 1}; there the spread grows like n^{power:.3f}",
        gap < 1e-9 and power > 0.95,
        {"largest_relative_gap": gap, "power": power},
    )
    yield _minibatches(of_mixture)


def _minibatches(of_mixture: Callable[[np.ndarray, np.ndarray], Any]) -> Evidence:
    """Sixteen minibatches, the k-th k times as far from b in variance, from exactly normalized binary worlds."""
    at = np.array([1, 1000, 8000])
    tokens = [ratio_moments(binary_world(float(size), 1)) for size in SIGMAS[0] * np.sqrt(np.arange(16) / 7.5)]
    assert all(token.var_log is not None and token.mean_log is not None for token in tokens)
    per_token = np.array([(token.var_log[1], token.mean_log[1]) for token in tokens])  # type: ignore[index]
    found = [math.sqrt(of_mixture(*(per_token.T * t)) / t) for t in at]
    return Evidence(
        "sequences of 16 minibatches, sigma_k^2 proportional to k = 0..15 with mean .0335^2, tokens independent "
        "within each: std(log rho_t)/sqrt(t) over all of them at t = 1, 1000, 8000",
        "closed form",
        f"16 minibatches with sigma_k^2 ~ k: std/sqrt(t) = {listed(found)} at t = 1, 1000, 8000: no constant",
        abs(found[0] - 0.0335) < 5e-5 and abs(found[2] - 0.0455) < 1e-4,
        {"t": at.tolist(), "std_over_sqrt_t": found},
    )


# --- 7.forced --------------------------------------------------------------------------------------------------------


def half_the_variance(sigma: float) -> float:
    """Fall of a token's mean log-ratio that E rho_t = 1 forces on a Gaussian."""
    return sigma**2 / 2


def none_at_all(_sigma: float) -> float:
    """Wrong: log-ratios around 0."""
    return 0.0


def check_forced(context: Context, drift: Callable[[float], float]) -> Iterator[Evidence]:
    """E rho_t = 1 fixes the mean of a Gaussian log rho_t, and nearly that of any with small tokens."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    at = np.array([1, 100, 1000, 8000])
    means = []
    for sigma in SIGMAS:
        logs = -drift(sigma) * at[:, None] + sigma * np.sqrt(at)[:, None] * nodes
        means.append((np.exp(logs) @ weights) / weights.sum())
    gap = float(np.abs(np.array(means) - 1).max())
    yield Evidence(
        "E rho_t of Gaussian log rho_t with variance sigma^2 t and mean -sigma^2 t/2, by quadrature; sigma = .0335, "
        ".0387, .0393, t = 1, 100, 1000, 8000",
        "closed form",
        f"|E rho_t - 1| <= {gap:.0e} with drift -sigma^2 t/2",
        gap < 1e-9,
        {"mean": [m.tolist() for m in means]},
    )
    yield _simulated_mean(context, drift)
    yield _tails()


def _simulated_mean(context: Context, drift: Callable[[float], float]) -> Evidence:
    """The simulator of Gaussian tokens against E rho_t = 1, where sample means can tell."""
    sigma, n, at = SIGMAS[0], context.count(20_000), np.array([25, 50, 100])
    rng = context.rng("simulated mean")
    z = []
    total = np.zeros((2, len(at)))
    for _ in range(10):
        tokens = rng.normal(-drift(sigma), sigma, (n // 10, at[-1]))
        rho = np.exp(ctpo.log_ratio(tokens, np.zeros_like(tokens))[:, at - 1])
        total += [rho.sum(axis=0), (rho**2).sum(axis=0)]
    mean, second = total / (n // 10 * 10)
    z = np.abs(mean - 1) / np.sqrt((second - mean**2) / n)
    limit = z_threshold(len(at))
    return Evidence(
        f"mean of rho_t over {n} simulated sequences, sigma = {sigma}, t = 25, 50, 100 (sigma^2 t <= .12)",
        "Monte Carlo",
        f"simulated E rho_t = {listed(mean)} at t = 25, 50, 100: largest |z| {z.max():.2f} (limit {limit:.2f})",
        bool(z.max() < limit),
        {"t": at.tolist(), "mean": mean.tolist(), "largest_z": float(z.max()), "limit": limit},
    )


#: Log-ratios of a rare token, and kappa/sigma^2 as it becomes ever rarer.
JUMPS = {-10.0: 0.09, -5.0: 0.16, -2.0: 0.28, -1.0: 0.37, -0.2: 0.47}


def drift_ratio(jump: float, share: float) -> float:
    """kappa/sigma^2 of a two-token world with a rare token of log-ratio `jump`, exactly normalized."""
    b = np.array([share, 1 - share])
    pi = np.array([share * math.exp(jump), 1 - share * math.exp(jump)])
    logs = np.array([jump, math.log1p(-share * math.expm1(jump) / (1 - share))])
    assert abs(pi.sum() - 1) < 1e-12
    kappa = float((b * (np.expm1(logs) - logs)).sum())
    return kappa / float((b * logs**2).sum() - (b @ logs) ** 2)


def _tails() -> Evidence:
    """As kappa = E[e^x - 1 - x] and (e^x - 1 - x)/x^2 rises through 1/2: rare falls drift less, rare rises more."""
    x = np.linspace(-12, 3, 3001)
    x = x[np.abs(x) > 1e-3]
    rising = bool(np.all(np.diff((np.expm1(x) - x) / x**2) > 0))
    left = [drift_ratio(jump, 1e-7) for jump in JUMPS]
    right = [drift_ratio(-jump, 1e-7) for jump in (-0.2, -1.0, -2.0)]
    limits = [(math.expm1(jump) - jump) / jump**2 for jump in JUMPS]
    binary = [math.sinh(sigma) / (2 * sigma) for sigma in SIGMAS]
    close = np.allclose(left, limits, rtol=1e-3) and np.allclose(limits, list(JUMPS.values()), atol=5e-3)
    return Evidence(
        "kappa/sigma^2 of two-token worlds with one rare token of log-ratio -10, -5, -2, -1, -.2, then .2, 1, 2; and "
        "of even binary tokens of the paper's spreads; (e^x - 1 - x)/x^2 increasing",
        "closed form",
        f"kappa/sigma^2 = {listed(left)} for rare falls of 10, 5, 2, 1, .2; {listed(right)} for rare rises of .2, 1, "
        f"2; {listed(binary)} for even binary tokens",
        rising and close and max(left) < 0.5 < min(right) and max(abs(r - 0.5) for r in binary) < 2e-4,
        {"jumps": list(JUMPS), "left": left, "right": right, "binary": binary},
    )


# --- 7.third_policy --------------------------------------------------------------------------------------------------


def sampled_drift(world: World, mu: np.ndarray) -> np.ndarray:
    """(S,) E_mu log(pi/b) = KL(mu||b) - KL(mu||pi)."""
    return divergence(world, mu, world.behavior) - divergence(world, mu, world.target)


def minus_kl(world: World, _mu: np.ndarray) -> np.ndarray:
    """Wrong: -KL(b||pi), as if b had written the tokens."""
    return -kl_from_behavior(world)


def check_third_policy(context: Context, drift: Callable[[World, np.ndarray], np.ndarray]) -> Iterator[Evidence]:
    """Where mu != b writes the tokens, log(pi/b) drifts at KL(mu||b) - KL(mu||pi), of any sign."""
    one = [HALF, Fraction(5, 8), Fraction(3, 4)]
    found, means = [], []
    mdp = chain("one binary token", np.zeros((1, 2), dtype=int), horizon=1, initial=0)
    world = World(mdp, np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]]))
    for share in one:
        mu = np.array([[float(1 - share), float(share)]])
        found.append(float(drift(world, mu)[0]))
        means.append((1 - share) * HALF + share * Fraction(3, 2))
    direct = [float((1 - m) * math.log(0.5) + m * math.log(1.5)) for m in map(float, one)]
    yield Evidence(
        "b(1) = 1/2, pi(1) = 3/4, sampler mu(1) = 1/2, 5/8, 3/4: E_mu log(pi/b) and E_mu[pi/b] of a token",
        "closed form",
        f"E_mu log(pi/b) = {', '.join(f'{d:.3f}' for d in found)} for mu(1) = 1/2, 5/8, 3/4, and E_mu[pi/b] = "
        + listed(means),
        bool(np.allclose(found, direct, atol=1e-15) and np.allclose(found, [-0.144, -0.007, 0.131], atol=5e-4))
        and means == known("third_policy"),
        {"drift": found, "mean_ratio": [str(m) for m in means]},
    )
    worlds = good = 0
    signs = {"down": 0, "up": 0}
    for rng, mdp in dyadic_mdps(context, "third policy", 80):
        worlds += 1
        behavior, target, mu = dyadic_policies(rng, mdp, 3)
        # Ratios of pi and of b to the policy that writes; their quotient is pi/b.
        by_target, by_behavior = (enumerate_trajectories(World(mdp, mu, policy)) for policy in (target, behavior))
        mean = by_target.expectation((log2_ratios(by_target) - log2_ratios(by_behavior)).cumsum(axis=1))
        token = drift(World(mdp, behavior, target), mu)
        good += int(
            np.all(mean == by_target.expectation(np.where(by_target.mask, token[by_target.states], 0).cumsum(axis=1)))
        )
        signs["down"] += int(mean[-1] < 0)
        signs["up"] += int(mean[-1] > 0)
    yield Evidence(
        "E_mu log2 rho_t = sum_k E_mu[KL(mu||b) - KL(mu||pi)](s_k) on trees with three dyadic policies, as fractions",
        "enumeration",
        f"identity exact on {good} of {worlds} random trees; log rho_H falls on {signs['down']}, rises on "
        f"{signs['up']}",
        good == worlds and (min(signs.values()) > 0 or context.quick),
        {"worlds": worlds, "exact": good, **signs},
    )
    yield _diagnosed(context, drift)


def _diagnosed(context: Context, drift: Callable[[World, np.ndarray], np.ndarray]) -> Evidence:
    """A sampler for which the log-ratio does not drift passes for one without drift, but not with ctpo.diagnostics."""
    n, horizon, b, pi = context.count(4000), 64, 0.5, 0.51
    # The sampler for which log(pi/b) has mean 0 lies about half-way.
    mu = math.log((1 - b) / (1 - pi)) / (math.log(pi / b) - math.log((1 - pi) / (1 - b)))
    token = context.rng("third policy").random((n, horizon)) < mu
    logp, behavior_logp = (np.log(np.where(token, p, 1 - p)) for p in (pi, b))
    diagnosis = diagnose(logp, behavior_logp, bootstrap=100)
    mdp = chain("one binary token", np.zeros((1, 2), dtype=int), horizon=1, initial=0)
    expected = float(drift(World(mdp, np.array([[1 - b, b]]), np.array([[1 - pi, pi]])), np.array([[1 - mu, mu]]))[0])
    fit = diagnosis.spread
    z = abs(-fit.token_drift - expected) / fit.token_drift_se
    flagged = [finding.name for finding in diagnosis.verdict if finding.flagged]
    limit = z_threshold(1)
    return Evidence(
        f"b(1) = .5, pi(1) = .51 and a sampler mu(1) = {mu:.4f}, {n} sequences of {horizon} tokens: drift against "
        "KL(mu||b) - KL(mu||pi) = 0, and the divergence estimate next to it (ctpo.diagnostics)",
        "Monte Carlo",
        f"a sampler half-way to pi: mean of log r {-fit.token_drift:.1g} (s.e. {fit.token_drift_se:.1g}), but mean of "
        f"r - 1 - log r {fit.token_kl:.1g} (s.e. {fit.token_kl_se:.0e}); flagged: {', '.join(flagged) or 'nothing'}",
        z < limit and abs(expected) < 1e-12 and fit.token_kl > 20 * fit.token_kl_se,
        {"mu": mu, "token_drift": fit.token_drift, "token_kl": fit.token_kl, "z": z, "flagged": flagged},
    )


CLAIMS = (
    Claim(
        "7.drift",
        "E_b log rho_t = -sum_k E_b KL(b||pi)(s_k): the log-ratio falls by the divergence, token after token.",
        "true if",
        "pi gives every token that b writes a positive probability (else log rho_t is -inf); b wrote the tokens",
        "not in the paper; section 3.3 and Figure 1 have a spread around 0",
        check_drift,
        kl_from_behavior,
        kl_from_target,
        "KL(pi||b), the other way round",
        "Log-ratios of genuine importance ratios must fall with position. Estimate the fall by the mean of r - 1 - "
        "log r, which needs far fewer tokens than the mean of -log r, and compare the two: where they differ, the "
        "ratios are not those of the policy that sampled.",
    ),
    Claim(
        "7.variance",
        "Var(log rho_t) = sum_k Var(log r_k), the law behind sigma sqrt(t).",
        "true if",
        "the covariances Cov(log r_s, KL(b||pi)(s_t)), s < t, sum to 0, and only then; it suffices that KL(b||pi) is "
        "the same after every prefix. sqrt(t) needs in addition token variances that are about the same everywhere",
        "arXiv:2605.07331, section 3.3: Var(log rho_t) = t sigma^2",
        check_variance,
        with_divergence,
        within_only,
        "only the tokens' conditional variances are added",
        "A clean sqrt(t) law is what equal speeds give, but unequal speeds and fading tokens can give it too; look at "
        "the variance ratio of fit_spread.",
    ),
    Claim(
        "7.superlinear",
        "std(log rho_t) grows like sigma sqrt(t).",
        "false",
        "some sequences diverge faster than others: Var(log2 rho) = 4n/9 + n^2/36 where the first token picks the "
        "speed",
        "arXiv:2605.07331, section 3.3",
        check_superlinear,
        total_variance,
        mean_variance,
        "the spread of the drifts between sequences is forgotten",
        "Where prompts or minibatches differ in how far the policy has moved, the spread grows faster than sqrt(t) "
        "and a sqrt(t) window is too narrow late in the sequence.",
    ),
    Claim(
        "7.forced",
        "A Gaussian log rho_t of variance sigma^2 t with E rho_t = 1 has the mean -sigma^2 t/2; there is no choice.",
        "true if",
        "log rho_t is Gaussian; otherwise kappa/sigma^2 is below 1/2 with rare falls and above 1/2 with rare rises",
        "follows from E_b rho_t = 1",
        check_forced,
        half_the_variance,
        none_at_all,
        "log-ratios around 0",
        "Report mean(log rho_t) and var(log rho_t) together: their ratio is about -1/2 for ratios of a fixed target "
        "with small log-ratios. A spread without a fall is a sign of noise, of another sampler or of selection.",
    ),
    Claim(
        "7.third_policy",
        "The logged ratio pi/b drifts down whichever policy mu wrote the tokens.",
        "false",
        "it drifts by KL(mu||b) - KL(mu||pi) a token, which has any sign",
        "what recomputed old log-probabilities amount to",
        check_third_policy,
        sampled_drift,
        minus_kl,
        "-KL(b||pi), as if b had written the tokens",
        "If the inference engine's probabilities are not the recorded ones, the log-ratio may stay level or rise, "
        "and E rho_t is not 1. A spread without drift is what such a mismatch can look like.",
    ),
)
