r"""Monte Carlo on token worlds: vectorised sampling, streaming moments, error bars, and honest refusals.

A run is cut into chunks of trajectories. Chunk k draws from the k-th child of the seed's `SeedSequence`, so
the answer does not depend on how many processes share the work. Each chunk's per-trajectory statistics are
reduced to central moments at once, and moments are merged pairwise (Chan, Golub and LeVeque 1979; Pebay
2008), so memory does not grow with the number of samples.

Every result carries the effective sample size and the Pareto k-hat of the full-sequence weight: when they are
bad, the error bars of anything weighted by it are not to be believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import joblib
import numpy as np
import scipy.stats

import ctpo
import ctpo.diagnostics
from simulations.exact import AdvantageKind, advantage_table, summed_scores
from simulations.mdp import END, World, check_name

#: Tokens in one chunk: large enough to amortize Python, small enough to stay in cache.
CHUNK_TOKENS = 500_000
#: A variance is tested only if its squared deviations are carried by at least this many effective samples.
LEAST_EFFECTIVE_SAMPLES = 500
#: Family-wise error of the statistical checks of the claims.
FAMILY_LEVEL = 1e-6
#: Weights kept for the Pareto k-hat.
_KEPT_WEIGHTS = 20_000


@dataclass(frozen=True)
class Batch:
    """Sampled trajectories; tables are looked up when they are asked for.

    Attributes:
        sampler: Where they come from.
        edges: (H, n) transition taken at each step.
        states: (n, H) state before each token.
        logp, behavior_logp: (n, H) what a trainer would record, in nats, 0 where the policy writes nothing.
        final_state: (n,) state in which the stream stops.
    """

    sampler: Sampler
    edges: np.ndarray
    states: np.ndarray
    logp: np.ndarray
    behavior_logp: np.ndarray
    final_state: np.ndarray

    @cached_property
    def actions(self) -> np.ndarray:
        """(n, H) token; 0 after the end."""
        return self.sampler.action.take(self.edges).T

    @cached_property
    def mask(self) -> np.ndarray:
        """(n, H) bool, True where the policy wrote the token."""
        return self.sampler.world.mdp.policy_states.take(self.states)


class Sampler:
    """Draws trajectories of a world under its behavior policy.

    Token and next state are drawn together, by Walker's alias method over the transitions out of a state: one
    uniform number and a handful of table look-ups per token, whatever the vocabulary.
    """

    def __init__(self, world: World) -> None:
        """Build the tables; `world` must be in float64."""
        if world.exact:
            raise ValueError("world: Monte Carlo needs float64 probabilities, got Fractions; use world.as_float()")
        self.world = world
        mdp = world.mdp
        state, action, nxt, probability = mdp.edges
        weight = world.token_probabilities("behavior")[state, action] * probability
        ends = np.flatnonzero(mdp.kind == END)
        state = np.concatenate([state, ends])
        order = np.argsort(state, kind="stable")
        state = state[order]
        action = np.concatenate([action, np.zeros(len(ends), dtype=np.int64)])[order]
        nxt = np.concatenate([nxt, ends])[order]
        weight = np.concatenate([weight, np.ones(len(ends))])[order]
        fan = np.bincount(state, minlength=mdp.n_states)
        width = int(fan.max())
        rank = np.arange(len(state)) - np.repeat(np.cumsum(fan) - fan, fan)
        slot = state * width + rank
        size = mdp.n_states * width
        weights = np.zeros(size)
        weights[slot] = weight
        self.width = width
        self.accept, self.alias = _alias_tables(weights.reshape(mdp.n_states, width))
        self.next = np.zeros(size, dtype=np.int64)
        self.next[slot] = nxt
        self.action = np.zeros(size, dtype=np.int64)
        self.action[slot] = action
        policy = np.repeat(mdp.policy_states, width)
        by_state = np.repeat(np.arange(mdp.n_states), width)
        with np.errstate(divide="ignore"):
            self.logp = np.log(np.where(policy, world.target[by_state, self.action], 1.0))
            self.behavior_logp = np.log(np.where(policy, world.behavior[by_state, self.action], 1.0))
        self.start_accept, self.start_alias = _alias_tables(mdp.initial[None])

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        """Sample n trajectories."""
        horizon = self.world.mdp.horizon
        edges, states = np.empty((2, horizon, n), dtype=np.int64)
        logp, behavior_logp = np.empty((2, horizon, n))
        start, fraction = _split(rng.random(n), self.start_accept.size)
        state = np.where(fraction < self.start_accept[start], start, self.start_alias[start])
        for h in range(horizon):
            states[h] = state
            slot, fraction = _split(rng.random(n), self.width)
            slot += state * self.width
            edge = np.where(fraction < self.accept.take(slot), slot, self.alias.take(slot))
            edges[h] = edge
            logp[h] = self.logp.take(edge)
            behavior_logp[h] = self.behavior_logp.take(edge)
            state = self.next.take(edge)
        return Batch(self, edges, states.T, logp.T, behavior_logp.T, state)


def _split(uniform: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    scaled = uniform * width
    slot = scaled.astype(np.int64)
    return slot, scaled - slot


def _alias_tables(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Walker's acceptance thresholds and aliases for each row, flattened; aliases index the flat arrays."""
    rows, width = weights.shape
    scaled = weights / weights.sum(axis=1, keepdims=True) * width
    accept = np.ones((rows, width))
    alias = np.tile(np.arange(width), (rows, 1))
    for row in range(rows):
        left = scaled[row].copy()
        small = [i for i in range(width) if left[i] < 1.0]
        large = [i for i in range(width) if left[i] >= 1.0]
        while small and large:
            poor, rich = small.pop(), large.pop()
            accept[row, poor], alias[row, poor] = left[poor], rich
            left[rich] -= 1.0 - left[poor]
            (small if left[rich] < 1.0 else large).append(rich)
        # What rounding leaves over has probability 1, except empty slots, which must never be drawn.
        for i in small:
            if weights[row, i] == 0.0:
                accept[row, i], alias[row, i] = 0.0, int(np.argmax(weights[row]))
    alias += np.arange(rows)[:, None] * width
    return accept.ravel(), alias.ravel()


# --- streaming moments --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Per column: count, mean, sums of the 2nd, 3rd and 4th powers of deviations, smallest and largest value."""

    n: int
    mean: np.ndarray
    m2: np.ndarray
    m3: np.ndarray | None
    m4: np.ndarray | None
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, fourth: bool = True) -> Moments:
        """Moments of (n, M) values."""
        mean = values.mean(axis=0)
        centred = values - mean
        square = centred * centred
        m3 = (square * centred).sum(axis=0) if fourth else None
        m4 = (square * square).sum(axis=0) if fourth else None
        return cls(len(values), mean, square.sum(axis=0), m3, m4, values.min(axis=0), values.max(axis=0))

    def merge(self, other: Moments) -> Moments:
        """Moments of both samples together (Pebay 2008, equations 2.1 and 3.1)."""
        n = self.n + other.n
        shift = other.mean - self.mean
        a, b = self.n / n, other.n / n
        mean = self.mean + b * shift
        m2 = self.m2 + other.m2 + shift**2 * (self.n * b)
        low, high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        if self.m3 is None or self.m4 is None or other.m3 is None or other.m4 is None:
            return Moments(n, mean, m2, None, None, low, high)
        m3 = self.m3 + other.m3 + shift**3 * (self.n * b * (a - b)) + 3 * shift * (a * other.m2 - b * self.m2)
        m4 = (
            self.m4
            + other.m4
            + shift**4 * (self.n * b * (a * a - a * b + b * b))
            + 6 * shift**2 * (a * a * other.m2 + b * b * self.m2)
            + 4 * shift * (a * other.m3 - b * self.m3)
        )
        return Moments(n, mean, m2, m3, m4, low, high)


@dataclass(frozen=True)
class Estimate:
    """A Monte Carlo estimate with its error bars.

    Attributes:
        n: Trajectories.
        mean: (M,) sample mean of each statistic.
        standard_error: (M,) of the mean.
        variance: (M,) sample variance of each statistic (divisor n - 1).
        variance_error: (M,) standard error of `variance`, or None if fourth moments were not kept.
        variance_samples: (M,) effective number of samples that carry the variance, (sum q)^2 / sum q^2 for
            the squared deviations q; None likewise.
        largest_square: (M,) largest squared deviation from the mean.
        ess_fraction: Kish effective sample size of the full-sequence weight, as a share of n.
        pareto_k: k-hat of the full-sequence weight.
    """

    n: int
    mean: np.ndarray
    standard_error: np.ndarray
    variance: np.ndarray
    variance_error: np.ndarray | None
    variance_samples: np.ndarray | None
    largest_square: np.ndarray
    ess_fraction: float
    pareto_k: float


Statistic = Callable[[Batch], np.ndarray]
Reduced = TypeVar("Reduced")


def reduced(
    world: World,
    reduction: Callable[[Batch], Reduced],
    *,
    n: int,
    seed: int | np.random.SeedSequence,
    jobs: int = 1,
    backend: str | None = None,
    tokens: int = CHUNK_TOKENS,
) -> Iterator[Reduced]:
    """What a function makes of each chunk of n sampled trajectories, in order.

    Args:
        world: A float64 world.
        reduction: Maps a `Batch` of at most max(2, tokens / horizon) trajectories to something small.
        n: Number of trajectories, at least 2.
        seed: Whole number or SeedSequence; the chunks depend on it, `n` and `tokens`, not on `jobs`.
        jobs: Processes (joblib).
        backend: joblib backend name; None is joblib's own choice.
        tokens: Tokens per chunk.
    """
    if not isinstance(n, (int, np.integer)) or n < 2:
        raise ValueError(f"n: must be a whole number >= 2, got {n!r}")
    sampler = Sampler(world)
    size = max(2, min(n, tokens // world.mdp.horizon))
    sizes = [size] * (n // size) + ([n % size] if n % size else [])
    root = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
    # A copy: `spawn` counts its children, and a second run from the same seed must draw the same.
    root = np.random.SeedSequence(root.entropy, spawn_key=root.spawn_key, pool_size=root.pool_size)
    tasks = zip(sizes, root.spawn(len(sizes)), strict=True)
    if jobs == 1:
        yield from (_chunk(sampler, reduction, size, child) for size, child in tasks)
    else:
        parallel = joblib.Parallel(n_jobs=jobs, backend=backend, return_as="generator")
        yield from parallel(joblib.delayed(_chunk)(sampler, reduction, size, child) for size, child in tasks)


def _chunk(sampler: Sampler, reduction: Callable[[Batch], Reduced], n: int, seed: np.random.SeedSequence) -> Reduced:
    return reduction(sampler.draw(n, np.random.default_rng(seed)))


@dataclass(frozen=True)
class _Reduction:
    """Moments of a statistic, and the log of the full-sequence weight."""

    statistic: Statistic
    fourth: bool

    def __call__(self, batch: Batch) -> tuple[Moments, np.ndarray]:
        log_weights = (batch.logp - batch.behavior_logp).sum(axis=1)
        return Moments.of(self.statistic(batch), self.fourth), log_weights


def estimate(
    world: World,
    statistic: Statistic,
    *,
    n: int,
    seed: int | np.random.SeedSequence,
    jobs: int = 1,
    backend: str | None = None,
    fourth: bool = True,
    chunk_tokens: int = CHUNK_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Estimate:
    """Mean and variance of a per-trajectory statistic under the behavior policy, with error bars.

    Args:
        world: A float64 world.
        statistic: Maps a `Batch` to (n, M) values, one row per trajectory.
        n: Number of trajectories, at least 2.
        seed: Whole number or SeedSequence; the answer depends on it, `n` and `chunk_tokens`, not on `jobs`.
        jobs: Processes (joblib).
        backend: joblib backend name; None is joblib's own choice.
        fourth: Keep fourth moments, for the standard error of variances.
        chunk_tokens: Tokens per chunk.
        progress: Called with the number of trajectories done so far.
    """
    results = reduced(
        world, _Reduction(statistic, fourth), n=n, seed=seed, jobs=jobs, backend=backend, tokens=chunk_tokens
    )
    total: Moments | None = None
    log_weights: list[np.ndarray] = []
    kept = 0
    sums = np.full(2, -np.inf)  # log sum w, log sum w^2
    for moments, weights in results:
        total = moments if total is None else total.merge(moments)
        sums = np.logaddexp(sums, [np.logaddexp.reduce(weights), np.logaddexp.reduce(2 * weights)])
        if kept < _KEPT_WEIGHTS:
            log_weights.append(weights[: _KEPT_WEIGHTS - kept])
            kept += len(log_weights[-1])
        if progress is not None:
            progress(total.n)
    assert total is not None
    variance = total.m2 / (n - 1)
    error = samples = None
    if total.m4 is not None:
        error = np.sqrt(np.maximum(total.m4 / n - (total.m2 / n) ** 2, 0.0) / n)
        with np.errstate(invalid="ignore", divide="ignore"):
            samples = np.where(total.m4 > 0, total.m2**2 / total.m4, np.inf)
    return Estimate(
        n=n,
        mean=total.mean,
        standard_error=np.sqrt(variance / n),
        variance=variance,
        variance_error=error,
        variance_samples=samples,
        largest_square=np.maximum(total.high - total.mean, total.mean - total.low) ** 2,
        ess_fraction=float(np.exp(2 * sums[0] - sums[1])) / n,
        pareto_k=float(ctpo.diagnostics.pareto_k(np.concatenate(log_weights))),
    )


# --- tests --------------------------------------------------------------------------------------------------


def z_threshold(comparisons: int, level: float = FAMILY_LEVEL) -> float:
    """Two-sided normal threshold with a Bonferroni correction.

    >>> round(z_threshold(1, 0.05), 2)
    1.96
    """
    return float(scipy.stats.norm.isf(level / (2 * comparisons)))


def z_scores(result: Estimate, expected: np.ndarray) -> np.ndarray:
    """(M,) distance of the sample means from their expected values in standard errors.

    A statistic without any spread must meet its expectation to rounding: its score is 0 or inf.
    """
    return _scores(result.mean, expected, result.standard_error)


def _scores(estimated: np.ndarray, expected: np.ndarray, error: np.ndarray) -> np.ndarray:
    gap = np.abs(estimated - expected)
    exact = gap <= 1e-9 * (1.0 + np.abs(expected))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(exact & (error < 1e-9), 0.0, gap / error)


@dataclass(frozen=True)
class VarianceTest:
    """Outcome of testing sample variances: z scores (NaN where refused) and, if any was refused, why."""

    z: np.ndarray
    refused: np.ndarray
    reason: str


def variance_test(result: Estimate, expected: np.ndarray, *, least: float = LEAST_EFFECTIVE_SAMPLES) -> VarianceTest:
    """Compare sample variances with expected ones where that means anything.

    The standard error of a sample variance rests on the fourth moment. If a handful of trajectories carry the
    squared deviations, both the variance and its error bar miss the rare large weights that make up the
    truth, and the test would "find" a small variance with confidence. Then the comparison is refused.

    Close to that the error bar is still too short, and shortest where the sample variance is too small. A
    shortfall g below the expected variance, made up of squares as large as the largest seen, would vary by g
    times that square over n without a trace in the sample: so much is added to the squared error bar.
    """
    if result.variance_error is None or result.variance_samples is None:
        raise ValueError("result: a variance test needs an estimate made with fourth=True")
    refused = result.variance_samples < least
    unseen = np.maximum(expected - result.variance, 0.0) * result.largest_square / result.n
    z = _scores(result.variance, expected, np.sqrt(result.variance_error**2 + unseen))
    reason = ""
    if np.any(refused):
        reason = (
            f"refused for {int(refused.sum())} of {refused.size}: "
            f"{result.variance_samples[refused].min():.0f} effective samples carry the variance, "
            f"{least:.0f} are needed (heavy fourth moment; use the exact engines)"
        )
    return VarianceTest(np.where(refused, np.nan, z), refused, reason)


# --- statistics ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RatioByPosition:
    """Statistic: rho_t and log rho_t after every token of the stream, (n, 2H)."""

    level: Literal["token", "cumulative", "sequence"] = "cumulative"

    def __post_init__(self) -> None:
        """Refuse levels that would count the tokens that the policy did not write."""
        check_name("level", self.level, ("token", "cumulative", "sequence"))

    def __call__(self, batch: Batch) -> np.ndarray:
        """(n, 2H): the ratio, then its logarithm."""
        log_ratio = ctpo.log_ratio(batch.logp, batch.behavior_logp, level=self.level)
        return np.concatenate([np.exp(log_ratio), log_ratio], axis=1)


@dataclass(frozen=True)
class Advantages:
    """Statistic: the advantage of every policy token, (n, H), 0 where the policy writes nothing.

    Args:
        world: The world.
        advantage: Name of the advantage table.
        outcome: Multiply it by the outcome reward of the state in which the stream stops.
    """

    world: World
    advantage: AdvantageKind = "A_target"
    outcome: bool = False

    @cached_property
    def table(self) -> np.ndarray:
        """(H, S, A) advantages."""
        return advantage_table(self.world, self.advantage)

    def __call__(self, batch: Batch) -> np.ndarray:
        """(n, H) advantages."""
        steps = np.arange(batch.states.shape[1])
        advantages = np.where(batch.mask, self.table[steps, batch.states, batch.actions], 0.0)
        if self.outcome:
            advantages = advantages * self.world.mdp.outcome[batch.final_state][:, None]
        return advantages


@dataclass(frozen=True)
class SummedGradient:
    """Statistic: the summed gradient sum_t c_t A_t g_t of one estimator, (n, D).

    Args:
        world: The world, for its scores and advantages.
        estimator: A `ctpo` estimator or its name; its own coefficients are used.
        advantage: Name of the advantage table.
        outcome: Multiply the advantage by the outcome reward of the state in which the stream stops.
    """

    world: World
    estimator: ctpo.Estimator | str
    advantage: AdvantageKind = "A_target"
    outcome: bool = False

    @cached_property
    def advantages(self) -> Advantages:
        """The advantages that it weights."""
        return Advantages(self.world, self.advantage, self.outcome)

    def __call__(self, batch: Batch) -> np.ndarray:
        """(n, D) summed gradients."""
        advantages = self.advantages(batch)
        estimator = ctpo.get_estimator(self.estimator)
        result = estimator.coefficients(batch.logp, batch.behavior_logp, advantages, batch.mask)
        return summed_scores(self.world, batch.states, batch.actions, result.weight * advantages)
