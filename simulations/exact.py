r"""Exact moments of importance ratios and of policy-gradient estimators, by two independent engines.

**Enumeration** lists every trajectory of a world. It takes any estimator of `ctpo` (clipped and
length-normalised ones too) in float64, and the rational levels in Fractions, where equality is equality. Its
cost is the number of trajectories.

**Dynamic programming** walks over Markov states. It takes the levels whose weight is a product of token
ratios along the stream (none, token, cumulative, window, lookahead, sequence) and costs O(horizon), also in
Fractions. It works because each such weight is a path weight of a small automaton: before a term is emitted
the path may carry the factor 1 or r per token, and likewise after it. The second moment of the summed
gradient pairs two copies of the automaton, whose joint carries 1, r or r^2; a forward pass holds the pairs
that have emitted nothing, a backward pass the expected remainder once one of them has.

Notation: Y = R(s_end) * sum_t W_t A_t g_t with weight W_t, advantage A_t(s_t, a_t) and score g_t. With
`outcome=True` R is the world's outcome reward, otherwise 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import scipy.sparse

import ctpo
from simulations.mdp import END, POLICY, TOOL, World, check_kind, check_name, zeros

#: Above this many trajectories enumeration is refused.
MAX_TRAJECTORIES = 200_000
#: Memory that the scores of all tokens of a set of trajectories may take, in bytes; else they are looked up anew.
MAX_GATHERED_BYTES = 256 * 1024**2
#: Memory that a dynamic-programming pass may take for its stored forward pass, in bytes.
MAX_STORED_BYTES = 2 * 1024**3

Who = Literal["behavior", "target"]
AdvantageKind = Literal["A_target", "A_behavior", "Q_target", "Q_behavior", "one"]

# --- transition operators -----------------------------------------------------------------------------------


class _EdgeMatrix:
    """A sparse matrix of Fractions, given by its entries."""

    def __init__(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray, size: int) -> None:
        self.rows, self.columns, self.values, self.size = rows, columns, values, size

    def __matmul__(self, vector: np.ndarray) -> np.ndarray:
        width = vector.size // len(vector)
        flat = vector.reshape(-1, width)[self.columns]
        entry, place = np.nonzero(flat)  # blocks of other states are mostly 0, and Fractions are slow
        result = zeros((self.size, width), True)
        np.add.at(result, (self.rows[entry], place), self.values[entry] * flat[entry, place])
        return result.reshape(self.size, *vector.shape[1:])

    @property
    def T(self) -> _EdgeMatrix:
        return _EdgeMatrix(self.columns, self.rows, self.values, self.size)


def _operator(world: World, coefficient: np.ndarray, keep_end: bool = False) -> Any:
    """The matrix M[s, s'] = sum_a coefficient[s, a] P(s'|s, a), optionally with END states kept in place."""
    state, action, nxt, probability = world.mdp.edges
    values = coefficient[state, action] * probability
    nonzero = values != 0
    rows, columns, values = state[nonzero], nxt[nonzero], values[nonzero]
    if keep_end:
        ends = np.flatnonzero(world.mdp.kind == END)
        rows, columns = np.concatenate([rows, ends]), np.concatenate([columns, ends])
        values = np.concatenate([values, zeros(len(ends), world.exact) + 1])
    n = world.mdp.n_states
    if world.exact:
        return _EdgeMatrix(rows, columns, values, n)
    return _compact(scipy.sparse.csr_array((values, (rows, columns)), shape=(n, n)))


def _compact(matrix: scipy.sparse.csr_array) -> Any:
    """Dense where that multiplies faster."""
    return matrix.toarray() if matrix.nnz * 16 >= matrix.shape[0] * matrix.shape[1] else matrix


def _power_coefficients(world: World) -> list[np.ndarray]:
    """Products b * r^p in the policy's states, p = 0, 1, 2: b, pi and pi^2/b on the support of b."""
    written = np.where(world.mdp.policy_states[:, None], world.behavior, 0)
    return [written, written * world.ratio, written * world.ratio**2]


# --- values -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """Action values q (H, S, A) and state values v (H + 1, S), for the return from step h on."""

    q: np.ndarray
    v: np.ndarray

    @property
    def advantage(self) -> np.ndarray:
        """(H, S, A) q - v."""
        return self.q - self.v[:-1, :, None]


def values(world: World, who: Who = "target") -> Values:
    r"""Q and V of one of the world's policies by backward induction.

    .. math:: Q_h(s,a) = c(s,a) + \sum_{s'} P(s'|s,a) V_{h+1}(s'), \quad V_h(s) = \sum_a \pi(a|s) Q_h(s,a)

    with V = outcome in END states and at the horizon.
    """
    mdp = world.mdp
    horizon, n_states, n_actions = mdp.horizon, mdp.n_states, mdp.n_actions
    written = world.token_probabilities(who)
    v = zeros((horizon + 1, n_states), world.exact)
    q = zeros((horizon, n_states, n_actions), world.exact)
    v[horizon] = mdp.outcome
    expect = _next_state_expectation(world)
    ends = mdp.kind == END
    for h in range(horizon - 1, -1, -1):
        q[h] = mdp.reward + expect(v[h + 1])
        q[h][ends] = mdp.outcome[ends, None]
        v[h] = np.where(ends, mdp.outcome, (written * q[h]).sum(axis=1))
    return Values(q, v)


def _next_state_expectation(world: World) -> Callable[[np.ndarray], np.ndarray]:
    """A function (S, ...) -> (S, A, ...): the expectation over the next state."""
    state, action, nxt, probability = world.mdp.edges
    shape = (world.mdp.n_states, world.mdp.n_actions)
    if not world.exact:
        rows = state * shape[1] + action
        matrix = _compact(scipy.sparse.csr_array((probability, (rows, nxt)), shape=(shape[0] * shape[1], shape[0])))

        def fast(values: np.ndarray) -> np.ndarray:
            found = np.asarray(matrix @ values.reshape(len(values), -1))
            return found.reshape(shape + values.shape[1:])

        return fast

    def expect(values: np.ndarray) -> np.ndarray:
        result = zeros(shape + values.shape[1:], True)
        np.add.at(result, (state, action), probability.reshape(-1, *[1] * (values.ndim - 1)) * values[nxt])
        return result

    return expect


def advantage_table(world: World, advantage: AdvantageKind | np.ndarray) -> np.ndarray:
    """(H, S, A) table of an advantage, by name or from an (H, S, A) or (S, A) array; 0 outside POLICY states.

    "one" is 1 for every token, for outcome rewards.
    """
    horizon, n_states, n_actions = world.mdp.horizon, world.mdp.n_states, world.mdp.n_actions
    if isinstance(advantage, np.ndarray):
        if advantage.shape not in ((horizon, n_states, n_actions), (n_states, n_actions)):
            raise ValueError(
                f"advantage: shape must be {(horizon, n_states, n_actions)} (horizon, states, actions) or "
                f"{(n_states, n_actions)}, got {advantage.shape}"
            )
        check_kind("advantage", advantage, world.exact)
        table = advantage
    else:
        check_name("advantage", advantage, get_args(AdvantageKind))
        if advantage == "one":
            table = zeros((n_states, n_actions), world.exact) + 1
        else:
            letter, who = advantage.split("_")
            found = values(world, who)  # type: ignore[arg-type]
            table = found.advantage if letter == "A" else found.q
    table = np.where(world.mdp.policy_states[:, None], table, 0)
    if not world.exact and not np.all(np.isfinite(table)):
        raise ValueError(f"advantage: must be finite where the policy writes, got {table[~np.isfinite(table)][0]}")
    return np.broadcast_to(table, (horizon, n_states, n_actions))


def objective(world: World, who: Who = "target") -> Any:
    """Expected return J of a policy."""
    return (world.mdp.initial * values(world, who).v[0]).sum()


def policy_gradient(world: World) -> np.ndarray:
    r"""The true gradient of J(pi) in the target's parameters, (D,), by differentiating the Bellman equation.

    .. math:: \nabla V_h(s) = \sum_a \pi(a|s) [ g(a|s) Q_h(s,a) + \sum_{s'} P(s'|s,a) \nabla V_{h+1}(s') ]

    It uses neither the behavior policy nor any importance ratio.
    """
    mdp = world.mdp
    table = values(world, "target")
    states = np.arange(mdp.n_states)
    d = world.local_scores.shape[2]
    written = world.token_probabilities("target")
    step = _operator(world, written)
    gradient = zeros((mdp.n_states, world.n_blocks, d), world.exact)
    for h in range(mdp.horizon - 1, -1, -1):
        gradient = step @ gradient.reshape(mdp.n_states, -1)
        gradient = np.asarray(gradient).reshape(mdp.n_states, world.n_blocks, d)
        gradient[states, world.block(h)] += ((written * table.q[h])[:, :, None] * world.local_scores).sum(axis=1)
    return (mdp.initial[:, None, None] * gradient).sum(axis=0).ravel()


# --- moments of the ratio -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RatioMoments:
    """Moments of rho_t and log rho_t under the behavior policy after t = 0..T tokens of the stream.

    rho is stopped at the end of a string. Exact worlds give Fractions and no logarithms (None).

    Attributes:
        mean: E_b rho_t; 1 under absolute continuity.
        second_moment: E_b rho_t^2; inf in float64 where it overflows (`log_second_moment` does not).
        log_second_moment: log E_b rho_t^2.
        chi2_marginal: E_b chi2(s_t) for the token that step t writes (entry t-1), the paper's chi2_t.
        chi2_tilted: E chi2(s_t) under b tilted by rho_{t-1}^2; the product of 1 + it is exactly E rho_t^2.
        mean_log: E_b log rho_t, nats.
        var_log: Var_b log rho_t, nats^2.
    """

    mean: np.ndarray
    second_moment: np.ndarray
    log_second_moment: np.ndarray | None
    chi2_marginal: np.ndarray
    chi2_tilted: np.ndarray
    mean_log: np.ndarray | None
    var_log: np.ndarray | None

    @property
    def variance(self) -> np.ndarray:
        """Var_b rho_t."""
        return self.second_moment - self.mean**2

    @property
    def ess_fraction(self) -> np.ndarray:
        """Population effective sample size as a fraction, (E rho_t)^2 / E rho_t^2."""
        return self.mean**2 / self.second_moment


def ratio_moments(world: World) -> RatioMoments:
    """Moments of rho_t and log rho_t for every t by a forward pass over states: O(H), no Monte Carlo noise.

    Returns:
        `RatioMoments` with arrays of length H + 1 (t = 0..H) and chi2 arrays of length H. Once the behavior
        policy can have written a token that the target never writes, log rho has no finite moments: there
        `mean_log` and `var_log` are NaN.
    """
    mdp, exact = world.mdp, world.exact
    horizon = mdp.horizon
    everywhere = world.token_probabilities("behavior")
    powers = [everywhere * world.ratio**p for p in range(3)]
    plain, first, second = (_operator(world, coefficient, keep_end=True).T for coefficient in powers)
    chi2 = (np.where(mdp.policy_states[:, None], powers[2], 0)).sum(axis=1) - mdp.policy_states.astype(int)
    mass, mean, square = mdp.initial, mdp.initial, mdp.initial
    means, squares = zeros(horizon + 1, exact), zeros(horizon + 1, exact)
    marginal, tilted = zeros(horizon, exact), zeros(horizon, exact)
    means[0] = squares[0] = mass.sum()
    log_squares = np.zeros(horizon + 1)
    mean_log, var_log = np.zeros(horizon + 1), np.zeros(horizon + 1)
    if not exact:
        sampled = (everywhere > 0) & mdp.policy_states[:, None]
        with np.errstate(divide="ignore"):
            log_ratio = np.where(sampled, np.log(np.where(sampled, world.ratio, 1.0)), 0.0)
        infinite = np.any(~np.isfinite(log_ratio), axis=1)
        log_ratio = np.where(np.isfinite(log_ratio), log_ratio, 0.0)
        log_first = _operator(world, everywhere * log_ratio).T
        log_second = _operator(world, everywhere * log_ratio**2).T
        centred1, centred2 = np.zeros(mdp.n_states), np.zeros(mdp.n_states)
    scale = 0.0
    for t in range(1, horizon + 1):
        marginal[t - 1] = (mass * chi2).sum()
        total = square.sum()
        tilted[t - 1] = (square * chi2).sum() / total if total != 0 else total
        if not exact:
            if np.any(mass[infinite] > 0):
                mean_log[t:], var_log[t:] = np.nan, np.nan
            # Moments of log rho - E log rho, kept centred so that a long drift costs no digits.
            gain = log_first @ mass
            moved1 = plain @ centred1 + gain
            moved2 = plain @ centred2 + 2.0 * (log_first @ centred1) + log_second @ mass
            increment = gain.sum()
        mass, mean, square = plain @ mass, first @ mean, second @ square
        means[t] = mean.sum()
        if exact:
            squares[t] = square.sum()
            continue
        centred1 = moved1 - increment * mass
        centred2 = moved2 - 2.0 * increment * moved1 + increment**2 * mass
        if not np.isnan(var_log[t]):
            mean_log[t] = mean_log[t - 1] + increment
            var_log[t] = centred2.sum()
        total = square.sum()
        if total > 0:
            scale += np.log(total)
            square = square / total
        log_squares[t] = scale if total > 0 else -np.inf
    if exact:
        return RatioMoments(means, squares, None, marginal, tilted, None, None)
    with np.errstate(over="ignore"):
        squares = np.exp(log_squares)
    return RatioMoments(means, squares, log_squares, marginal, tilted, mean_log, var_log)


# --- the summed gradient by dynamic programming -------------------------------------------------------------


@dataclass(frozen=True)
class _Phases:
    """A weight level as an automaton over policy tokens; each move carries r to the given power (0 or 1).

    `carry`: moves between phases before the term is emitted. `emit`: moves that emit it. `after`: the one
    move of each later phase. A stream may begin in any phase before emission.
    """

    n_before: int
    carry: tuple[tuple[int, int, int], ...]
    emit: tuple[tuple[int, int, int], ...]
    after: tuple[tuple[int, int], ...]

    @property
    def pair_carry(self) -> tuple[tuple[int, int, int], ...]:
        """`carry` of two copies: the pair of phases (i, k) is the phase i * n_before + k of the pair."""
        n = self.n_before
        return tuple((i * n + i2, k * n + k2, p + p2) for i, k, p in self.carry for i2, k2, p2 in self.carry)


def _phases(level: str, window: int | None, horizon: int) -> _Phases:
    if level in ("window", "lookahead"):
        least = 1 if level == "window" else 0
        if not isinstance(window, int | np.integer) or isinstance(window, bool) or window < least:
            raise ValueError(f"window: level {level!r} needs a whole number >= {least}, got {window!r}")
        # A window that no stream outgrows needs no counting.
        if window >= horizon - 1 + least:
            level = "cumulative" if level == "window" else "sequence"
    elif window is not None:
        raise ValueError(f"window: only for the levels 'window' and 'lookahead', got {window!r} with level {level!r}")
    if level == "none":
        return _Phases(1, ((0, 0, 0),), ((0, 0, 0),), ((0, 0),))
    if level == "token":
        return _Phases(1, ((0, 0, 0),), ((0, 0, 1),), ((0, 0),))
    if level == "cumulative":
        return _Phases(1, ((0, 0, 1),), ((0, 0, 1),), ((0, 0),))
    if level == "sequence":
        return _Phases(1, ((0, 0, 1),), ((0, 0, 1),), ((0, 1),))
    if level == "lookahead" and window is not None:
        # After emission `window` more tokens carry r, counted down to the phase 0 that carries nothing.
        return _Phases(1, ((0, 0, 1),), ((0, window, 1),), ((0, 0), *((c - 1, 1) for c in range(1, window + 1))))
    if level == "window" and window is not None:
        # Phase 0 waits; phase c has c tokens of the window left. A stream may begin in a window cut short.
        if window == 1:
            return _phases("token", None, horizon)
        carry = ((0, 0, 0), (0, window - 1, 1), *((c, c - 1, 1) for c in range(2, window)))
        return _Phases(window, carry, ((1, 0, 1),), ((0, 0),))
    raise ValueError(
        "level: dynamic programming knows 'none', 'token', 'cumulative', 'window', 'lookahead' and "
        f"'sequence' (others by enumeration or Monte Carlo), got {level!r}"
    )


@dataclass(frozen=True)
class GradientMoments:
    """Moments of a summed gradient: mean (D,), trace of the covariance and, on request, covariance (D, D)."""

    mean: np.ndarray
    total_variance: Any
    covariance: np.ndarray | None = None


def gradient_mean(
    world: World,
    level: str,
    advantage: AdvantageKind | np.ndarray = "A_target",
    *,
    window: int | None = None,
    outcome: bool = False,
) -> np.ndarray:
    """The mean (D,) alone of `gradient_moments`, which is much cheaper than its second moment."""
    return _Recursion(world, level, advantage, window, outcome).mean()


@np.errstate(over="ignore", invalid="ignore")  # an overflow is refused at the end
def gradient_moments(
    world: World,
    level: str,
    advantage: AdvantageKind | np.ndarray = "A_target",
    *,
    window: int | None = None,
    outcome: bool = False,
    covariance: bool = False,
) -> GradientMoments:
    r"""Exact mean and covariance of a summed gradient estimator under the behavior policy, linear in H.

    .. math:: Y = R(s_{end})^{[outcome]} \sum_{t \in policy} W_t A_t(s_t, a_t) \nabla \log \pi(a_t|s_t)

    Args:
        world: Any world; Fractions give exact Fractions.
        level: "none" (weight 1), "token", "cumulative", "window", "lookahead" or "sequence".
        advantage: Name of a table or an (H, S, A) or (S, A) array.
        window: Tokens, for "window" and "lookahead"; the cost grows with its square.
        outcome: Multiply by the outcome reward of the state in which the stream stops.
        covariance: Also give the (D, D) covariance; its cost grows with D^2.

    Raises:
        ValueError: Unknown level or advantage, an advantage of the wrong shape or not finite where the policy
            writes, a window missing or out of place, or a second moment too large for float64.
    """
    recursion = _Recursion(world, level, advantage, window, outcome)
    mean = recursion.mean()
    trace, full = recursion.second_moment(covariance)
    total_variance = trace - (mean**2).sum()
    if not world.exact and not np.isfinite(total_variance):
        raise ValueError(
            f"level: the second moment at level {level!r} over {world.mdp.horizon} tokens exceeds float64; shorten "
            "the horizon, or use ratio_moments, which works in logarithms"
        )
    return GradientMoments(mean, total_variance, None if full is None else full - mean[:, None] * mean[None, :])


@dataclass(frozen=True)
class WeightMoments:
    """Moments of the weights that an estimator applies, by place h in the stream, under the behavior policy; (H,).

    Attributes:
        written: Probability that the policy writes token h.
        first: E of its weight, counted as 0 where the policy does not write.
        second: E of the squared weight, likewise.
    """

    written: np.ndarray
    first: np.ndarray
    second: np.ndarray

    @property
    def ess(self) -> Any:
        r"""Population effective sample size of the weights as a share of the tokens, averaged over the tokens.

        .. math:: \frac{\sum_h p_h (E w_h)^2 / E w_h^2}{\sum_h p_h}

        p_h is the probability that the policy writes token h, and expectations are over trajectories in which it
        does. A place where no weight is left counts 0.
        """
        shares = [a * a / c for a, c in zip(self.first, self.second, strict=True) if c > 0]
        return sum(shares) / self.written.sum()


@np.errstate(over="ignore", invalid="ignore")
def weight_moments(world: World, level: str, *, window: int | None = None) -> WeightMoments:
    """Exact moments of the weight of every token at the levels of `gradient_moments`, linear in H.

    Args:
        world: Any world; Fractions give exact Fractions.
        level: "none" (weight 1), "token", "cumulative", "window", "lookahead" or "sequence".
        window: Tokens, for "window" and "lookahead".

    Raises:
        ValueError: Unknown level, or a window missing or out of place.

    Example:
        >>> from simulations.mdp import independent_tokens
        >>> half, most = [Fraction(1, 2)] * 2, [Fraction(1, 4), Fraction(3, 4)]
        >>> found = weight_moments(independent_tokens(half, most, 2), "cumulative")
        >>> [str(m) for m in found.second], str(found.ess)
        (['5/4', '25/16'], '18/25')
    """
    return _Recursion(world, level, "one", window, False).weight_moments()


class _Recursion:
    """The forward and backward passes behind `gradient_moments`."""

    def __init__(
        self,
        world: World,
        level: str,
        advantage: AdvantageKind | np.ndarray,
        window: int | None,
        outcome: bool,
    ) -> None:
        self.world, self.mdp, self.exact = world, world.mdp, world.exact
        self.phases = _phases(level, window, world.mdp.horizon)
        self.emitted = sorted({j for _, j, _ in self.phases.emit})  # phases that begin with an emission
        self.table = advantage_table(world, advantage)
        self.local = world.local_scores
        self.coefficient = _power_coefficients(world)
        self.move = [_operator(world, c) for c in self.coefficient]
        self.rest = None
        if not np.all(self.mdp.policy_states):
            tool = np.where((self.mdp.kind == TOOL)[:, None], self.mdp.tool, 0)
            self.rest = _operator(world, tool, keep_end=True)
        self.end_value = self.mdp.outcome if outcome else zeros(self.mdp.n_states, self.exact) + 1
        self.expect = _next_state_expectation(world)

    def moved(self, power: int, vector: np.ndarray, resting: np.ndarray) -> np.ndarray:
        """One step back in time: a policy token with weight r^power, or in other states no change of phase."""
        result = _apply(self.move[power], vector)
        return result if self.rest is None else result + _apply(self.rest, resting)

    def mean(self) -> np.ndarray:
        """E Y, (D,)."""
        phases, world = self.phases, self.world
        before = _forward_pass(world, self.move, self.rest, phases.n_before, phases.carry)
        mean = zeros((world.n_blocks, self.local.shape[2]), self.exact)
        tail = [self.end_value for _ in phases.after]
        for h in range(self.mdp.horizon - 1, -1, -1):
            for i, j, p in phases.emit:
                weight = before[h][i][:, None] * self.coefficient[p] * self.table[h] * self.expect(tail[j])
                np.add.at(mean, world.block(h), _weighted_scores(weight, self.local))
            tail = [self.moved(q, tail[n], tail[j]) for j, (n, q) in enumerate(phases.after)]
        return mean.ravel()

    def weight_moments(self) -> WeightMoments:
        """Moments of the weight alone, without advantage, score and outcome."""
        phases, world, horizon = self.phases, self.world, self.mdp.horizon
        occupied = _forward_pass(world, self.move, self.rest, 1, ((0, 0, 0),))
        before = _forward_pass(world, self.move, self.rest, phases.n_before, phases.carry)
        pairs = _forward_pass(world, self.move, self.rest, phases.n_before**2, phases.pair_carry)
        written, first, second = (zeros(horizon, self.exact) for _ in range(3))
        tail = [self.end_value for _ in phases.after]
        both = self.both_at_end()
        for h in range(horizon - 1, -1, -1):
            written[h] = occupied[h][0][self.mdp.policy_states].sum()
            later = [self.expect(value) for value in tail]
            both_later = self.expect(both[:, :, self.emitted])
            for i, j, p in phases.emit:
                first[h] += (before[h][i][:, None] * self.coefficient[p] * later[j]).sum()
                for i2, j2, p2 in phases.emit:
                    joint = pairs[h][i * phases.n_before + i2][:, None] * self.coefficient[p + p2]
                    second[h] += (joint * both_later[:, :, j, self.emitted.index(j2)]).sum()
            tail = [self.moved(q, tail[n], tail[j]) for j, (n, q) in enumerate(phases.after)]
            both = self.both_moved(both)
        return WeightMoments(written, first, second)

    def both_at_end(self) -> np.ndarray:
        """(S, J, J) value of stopping in a state, for each pair of later phases of two copies."""
        n = len(self.phases.after)
        return np.tile((self.end_value * self.end_value)[:, None, None], (1, n, n))

    def both_moved(self, both: np.ndarray) -> np.ndarray:
        """One step back in time of (S, J, J) values by pairs of later phases."""
        following, power = np.array(self.phases.after).T
        moved, result = both[:, following[:, None], following], np.empty_like(both)
        powers = power[:, None] + power
        for p in np.unique(powers):
            result[:, powers == p] = _apply(self.move[p], moved[:, powers == p])
        return result if self.rest is None else result + _apply(self.rest, both)

    def second_moment(self, covariance: bool) -> tuple[Any, np.ndarray | None]:
        """Trace of E[Y Y^T] and, if asked for, all of it, (D, D)."""
        phases, world, exact, local = self.phases, self.world, self.exact, self.local
        n_states, n_blocks, d = self.mdp.n_states, world.n_blocks, local.shape[2]
        n_before, n_after = phases.n_before, len(phases.after)
        before = _forward_pass(world, self.move, self.rest, n_before**2, phases.pair_carry)
        norms = (local**2).sum(axis=2)
        expect_block = _next_block_expectation(world, d)
        edge_state, edge_action, edge_next, edge_probability = self.mdp.edges
        states = np.arange(n_states)
        both_after = self.both_at_end()
        # Copy one has emitted and is in phase j, copy two is in phase i and its terms are still to come.
        pending = {(j, i): zeros((n_states, n_blocks, d), exact) for j in range(n_after) for i in range(n_before)}
        trace: Any = Fraction(0) if exact else 0.0
        full = zeros((n_blocks, d, n_blocks, d), exact) if covariance else None
        for h in range(self.mdp.horizon - 1, -1, -1):
            advantage, block = self.table[h], world.block(h)
            both_next = self.expect(both_after[:, :, self.emitted])
            for i, j, p in phases.emit:
                # Copy one emits here. Copy two does too, or moves on and emits later (twice, by symmetry).
                for i2, j2, p2 in phases.emit:
                    joint = before[h][i * n_before + i2][:, None] * self.coefficient[p + p2]
                    weight = joint * advantage**2 * both_next[:, :, j, self.emitted.index(j2)]
                    trace = trace + (weight * norms).sum()
                    if full is not None:
                        outer = ((weight[:, :, None] * local)[:, :, :, None] * local[:, :, None, :]).sum(axis=1)
                        for s in states:
                            full[block[s], :, block[s], :] += outer[s]
                for i2, k2, p2 in phases.carry:
                    weight = before[h][i * n_before + i2][:, None] * self.coefficient[p + p2] * advantage
                    later = pending[j, k2]
                    product = np.einsum("sad,sad->sa", local, expect_block(later, block))
                    trace = trace + 2 * (weight * product).sum()
                    if full is not None:
                        left = (weight[edge_state, edge_action] * edge_probability)[:, None]
                        left = left * local[edge_state, edge_action]
                        cross = zeros(full.shape, exact)
                        np.add.at(cross, block[edge_state], left[:, :, None, None] * later[edge_next][:, None])
                        full += cross + cross.transpose(2, 3, 0, 1)
            previous = {}
            for j, (j_next, q) in enumerate(phases.after):
                for i in range(n_before):
                    moves = [_apply(self.move[q + p], pending[j_next, k]) for i2, k, p in phases.carry if i2 == i]
                    if self.rest is not None:
                        moves.append(_apply(self.rest, pending[j, i]))
                    total = sum(moves[1:], moves[0]) if moves else zeros((n_states, n_blocks, d), exact)
                    for i2, j2, p in phases.emit:
                        if i2 == i:
                            later_pair = both_next[:, :, j_next, self.emitted.index(j2)]
                            weight = self.coefficient[q + p] * advantage * later_pair
                            total[states, block] += _weighted_scores(weight, local)
                    previous[j, i] = total
            pending = previous
            both_after = self.both_moved(both_after)
        return trace, None if full is None else full.reshape(n_blocks * d, n_blocks * d)


def _weighted_scores(weight: np.ndarray, local: np.ndarray) -> np.ndarray:
    """(S, d): sum over actions of weight (S, A) times score (S, A, d)."""
    return np.matmul(weight[:, None, :], local)[:, 0]


def _apply(matrix: Any, vector: np.ndarray) -> np.ndarray:
    """A transition operator on an array whose first axis is the state."""
    return np.asarray(matrix @ vector.reshape(vector.shape[0], -1)).reshape(vector.shape)


def _next_block_expectation(world: World, d: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function of (S, K, d) and each state's block: (S, A, d), the next state's mean in one's own block."""
    state, action, nxt, probability = world.mdp.edges
    n_states, n_actions = world.mdp.n_states, world.mdp.n_actions
    if len(state) == n_states * n_actions and np.all(probability == 1):
        target = np.empty((n_states, n_actions), dtype=np.int64)
        target[state, action] = nxt
        return lambda value, block: value[target, block[:, None]]
    if not world.exact and len(state) * 4 >= n_states * n_states * n_actions:
        dense = np.zeros((n_states, n_actions, n_states))
        np.add.at(dense, (state, action, nxt), probability)
        return lambda value, block: np.matmul(dense, value[:, block].transpose(1, 0, 2))

    def expect(value: np.ndarray, block: np.ndarray) -> np.ndarray:
        result = zeros((n_states, n_actions, d), world.exact)
        np.add.at(result, (state, action), probability[:, None] * value[nxt, block[state]])
        return result

    return expect


def _forward_pass(
    world: World, move: list[Any], rest: Any, n_phases: int, carry: tuple[tuple[int, int, int], ...]
) -> list[list[np.ndarray]]:
    """Expected weight of being in each phase, by step and state, before anything is emitted."""
    horizon = world.mdp.horizon
    stored = horizon * n_phases * world.mdp.n_states * 8
    if stored > MAX_STORED_BYTES:
        raise ValueError(
            f"window: {n_phases} phases over {horizon} tokens and {world.mdp.n_states} states need "
            f"{stored / 2**30:.1f} GiB, at most {MAX_STORED_BYTES / 2**30:.0f} are allowed; take a shorter window "
            "or horizon"
        )
    backward = [m.T for m in move]
    back_rest = None if rest is None else rest.T
    weights = [[world.mdp.initial for _ in range(n_phases)]]
    for _ in range(horizon - 1):
        now = weights[-1]
        new = [value * 0 if back_rest is None else back_rest @ value for value in now]
        for i, k, p in carry:
            new[k] = new[k] + backward[p] @ now[i]
        weights.append(new)
    return weights


# --- enumeration --------------------------------------------------------------------------------------------


def score_summer(world: World, states: np.ndarray, actions: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function of (N, H) coefficients: the (N, D) sums over tokens of coefficient times score.

    What depends on the (N, H) trajectories alone is done once, for any number of coefficients.
    """
    local = world.local_scores
    n, horizon = states.shape
    d = local.shape[2]
    rows = np.arange(n)
    by_token = world.n_blocks == 1 or world.parameters == "position"
    if world.exact or (by_token and n * horizon * d * 8 > MAX_GATHERED_BYTES):

        def loop(coefficients: np.ndarray) -> np.ndarray:
            total = zeros((n, world.n_blocks, d), coefficients.dtype == object)
            for h in range(horizon):
                state = states[:, h]
                total[rows, world.block(h)[state]] += coefficients[:, h, None] * local[state, actions[:, h]]
            return total.reshape(n, -1)

        return loop
    if world.n_blocks == 1:
        gathered = local[states, actions]
        return lambda coefficients: np.matmul(coefficients[:, None, :], gathered)[:, 0]
    if world.parameters == "position":
        gathered = local[states, actions]
        return lambda coefficients: (coefficients[:, :, None] * gathered).reshape(n, -1)
    # A block for each state, and in it the scores 1{a = a'} - pi(a'|s): add up by state and token, then subtract.
    place = ((rows[:, None] * world.mdp.n_states + states) * d + actions).ravel()
    written = world.mdp.policy_states[states]
    probabilities = np.where(world.mdp.policy_states[:, None], world.target, 0.0)

    def by_state(coefficients: np.ndarray) -> np.ndarray:
        weights = np.where(written, coefficients, 0.0).ravel()
        total = np.bincount(place, weights, minlength=n * world.mdp.n_states * d).reshape(n, -1, d)
        return (total - total.sum(axis=2, keepdims=True) * probabilities).reshape(n, -1)

    return by_state


def summed_scores(world: World, states: np.ndarray, actions: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """(N, D): sum over tokens of coefficient times score, for (N, H) trajectories and coefficients."""
    return score_summer(world, states, actions)(coefficients)


@dataclass(frozen=True)
class Trajectories:
    """Every trajectory that either policy can produce, with its probabilities.

    Attributes:
        world: Where they come from.
        states, actions: (N, H) state before each token and the token; after the end, END state and token 0.
        final_state: (N,) state in which the stream stops.
        live: (N, H) bool, whether a token is written at all.
        mask: (N, H) bool, whether the policy writes it.
        environment: (N,) probability of the environment's choices.
    """

    world: World
    states: np.ndarray
    actions: np.ndarray
    final_state: np.ndarray
    live: np.ndarray
    mask: np.ndarray
    environment: np.ndarray

    def _token(self, table: np.ndarray) -> np.ndarray:
        return np.where(self.mask, table[self.states, self.actions], 1)

    @cached_property
    def behavior(self) -> np.ndarray:
        """(N, H) b(a_t|s_t), 1 where the policy writes nothing."""
        return self._token(self.world.behavior)

    @cached_property
    def target(self) -> np.ndarray:
        """(N, H) pi(a_t|s_t), 1 where the policy writes nothing."""
        return self._token(self.world.target)

    @cached_property
    def ratio(self) -> np.ndarray:
        """(N, H) token ratio r_t; 0 where the behavior policy has no mass."""
        return self._token(self.world.ratio)

    @cached_property
    def behavior_probability(self) -> np.ndarray:
        """(N,) P_b of the trajectory."""
        return self.environment * self.behavior.prod(axis=1)

    @cached_property
    def target_probability(self) -> np.ndarray:
        """(N,) P_pi of the trajectory."""
        return self.environment * self.target.prod(axis=1)

    @cached_property
    def returns(self) -> np.ndarray:
        """(N,) return of the trajectory."""
        mdp = self.world.mdp
        dense = np.where(self.live, mdp.reward[self.states, self.actions], 0).sum(axis=1)
        return dense + mdp.outcome[self.final_state]

    @cached_property
    def policy_gradient(self) -> np.ndarray:
        """(D,) true policy gradient of the world."""
        return policy_gradient(self.world)

    def log_probabilities(self) -> tuple[np.ndarray, np.ndarray]:
        """Float log pi and log b per token, (N, H), as a trainer would record them; 0 where masked."""
        target, behavior = self.target.astype(float), self.behavior.astype(float)
        with np.errstate(divide="ignore"):
            return np.log(target), np.log(behavior)

    def expectation(self, values_: np.ndarray, who: Who = "behavior") -> Any:
        """E of (N, ...) values under the behavior or the target policy."""
        probability = self.behavior_probability if who == "behavior" else self.target_probability
        return (probability.reshape(-1, *[1] * (values_.ndim - 1)) * values_).sum(axis=0)

    def advantage(self, kind: AdvantageKind | np.ndarray) -> np.ndarray:
        """(N, H) advantage of each token, 0 where masked."""
        table = advantage_table(self.world, kind)
        steps = np.arange(self.states.shape[1])
        return np.where(self.mask, table[steps, self.states, self.actions], 0)

    def summed_scores(self, coefficients: np.ndarray) -> np.ndarray:
        """(N, D): sum over policy tokens of coefficient times score, for (N, H) coefficients."""
        return summed_scores(self.world, self.states, self.actions, np.where(self.mask, coefficients, 0))

    def moments(self, summed: np.ndarray, covariance: bool = False) -> GradientMoments:
        """Behavior-policy moments of an (N, D) statistic."""
        mean = self.expectation(summed)
        centred = summed - mean
        total = self.expectation((centred**2).sum(axis=1))
        if not covariance:
            return GradientMoments(mean, total)
        weighted = self.behavior_probability[:, None] * centred
        return GradientMoments(mean, total, weighted.T @ centred)


def _possible_transitions(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Transitions that either policy can take, ordered by state, and their number per state."""
    state, action, _, probability = world.mdp.edges
    either = world.token_probabilities("behavior") + world.token_probabilities("target")
    order = np.flatnonzero((either[state, action] > 0) & (probability > 0))
    order = order[np.argsort(state[order], kind="stable")]
    return order, np.bincount(state[order], minlength=world.mdp.n_states)


def trajectory_count(world: World, limit: float = np.inf) -> float:
    """Number of trajectories that either policy can produce; counting stops once it exceeds `limit`."""
    state, _, nxt, _ = world.mdp.edges
    order, fan = _possible_transitions(world)
    count, finished = (world.mdp.initial > 0).astype(float), 0.0
    with np.errstate(over="ignore"):  # inf is a fine answer
        for _ in range(world.mdp.horizon):
            finished += count[fan == 0].sum()
            moved = np.zeros(world.mdp.n_states)
            np.add.at(moved, nxt[order], count[state[order]])
            count = moved
            if finished + count.sum() > limit:
                break
        return float(finished + count.sum())


def enumerate_trajectories(world: World, limit: int = MAX_TRAJECTORIES) -> Trajectories:
    """Every trajectory of a world that the behavior or the target policy can produce.

    Raises:
        ValueError: There are more than `limit`; they are counted first, nothing is built.
    """
    mdp = world.mdp
    if trajectory_count(world, limit) > limit:
        raise ValueError(
            f"horizon: {mdp.horizon} tokens in world {world.name!r} make more than {limit} trajectories, "
            "too many to enumerate; use gradient_moments or ratio_moments (dynamic programming), or "
            "Monte Carlo"
        )
    _, action, nxt, probability = mdp.edges
    order, fan = _possible_transitions(world)
    first = np.concatenate([[0], np.cumsum(fan)[:-1]])
    starts = np.flatnonzero(mdp.initial > 0)
    states = starts[:, None]
    actions = np.zeros((len(starts), 0), dtype=np.int64)
    environment = mdp.initial[starts]
    for _ in range(mdp.horizon):
        here = states[:, -1]
        children = np.maximum(fan[here], 1)  # a finished string keeps its one row
        parent = np.repeat(np.arange(len(here)), children)
        rank = np.arange(len(parent)) - np.repeat(np.cumsum(children) - children, children)
        goes_on = fan[here[parent]] > 0
        edge = order[np.where(goes_on, first[here[parent]] + rank, 0)] if len(order) else np.zeros_like(parent)
        token = np.where(goes_on, action[edge], 0)
        by_tool = goes_on & (mdp.kind[here[parent]] == TOOL)
        environment = environment[parent] * np.where(goes_on, probability[edge], 1)
        environment = environment * np.where(by_tool, mdp.tool[here[parent], token], 1)
        states = np.column_stack([states[parent], np.where(goes_on, nxt[edge], here[parent])])
        actions = np.column_stack([actions[parent], token])
    before = states[:, :-1]
    return Trajectories(
        world=world,
        states=before,
        actions=actions,
        final_state=states[:, -1],
        live=mdp.kind[before] != END,
        mask=mdp.kind[before] == POLICY,
        environment=environment,
    )


def rational_weights(trajectories: Trajectories, level: str, window: int | None = None) -> np.ndarray:
    """(N, H) weights of a level from the token ratios by multiplication alone, exact for Fractions.

    An implementation of its own, independent of `ctpo.log_ratio`. Levels with a root ("sequence_mean",
    "cumulative_mean") need ratios whose root is rational and raise ValueError otherwise.
    """
    ratio, mask = trajectories.ratio, trajectories.mask
    one = Fraction(1) if ratio.dtype == object else 1.0
    result = np.where(mask, ratio * 0, 0 * one)
    for n in range(len(ratio)):
        places = np.flatnonzero(mask[n])
        r = [ratio[n, place] for place in places]
        prefix = [one]
        for value in r:
            prefix.append(prefix[-1] * value)
        for t, place in enumerate(places, start=1):
            if level == "none":
                weight = one
            elif level == "token":
                weight = r[t - 1]
            elif level == "cumulative":
                weight = prefix[t]
            elif level == "sequence":
                weight = prefix[-1]
            elif level == "cumulative_mean":
                weight = exact_root(prefix[t], t)
            elif level == "sequence_mean":
                weight = exact_root(prefix[-1], len(r))
            elif level == "min_prefix":
                weight = r[t - 1] * min(r[: t - 1], default=one)
            elif level == "window" and window is not None:
                weight = one
                for value in r[max(t - window, 0) : t]:
                    weight = weight * value
            elif level == "lookahead" and window is not None:
                weight = prefix[min(t + window, len(r))]
            else:
                raise ValueError(f"level: unknown level {level!r} or window {window!r}")
            result[n, place] = weight
    return result


def exact_root(value: Any, degree: int) -> Any:
    """The degree-th root of a non-negative number; Fractions give a Fraction or a ValueError.

    >>> exact_root(Fraction(16, 81), 4)
    Fraction(2, 3)
    """
    if not isinstance(value, Fraction):
        return value ** (1.0 / degree)
    return Fraction(_integer_root(value.numerator, degree), _integer_root(value.denominator, degree))


def _integer_root(value: int, degree: int) -> int:
    if value == 0:
        return 0
    root = 1 << -(-value.bit_length() // degree)  # above the root, from where Newton's steps in integers fall
    while (lower := ((degree - 1) * root + value // root ** (degree - 1)) // degree) < root:
        root = lower
    if root**degree != value:
        raise ValueError(f"value: {value} has no whole root of degree {degree}")
    return root


def exact_log2(value: Fraction) -> int:
    """log2 of a power of two, exactly.

    >>> exact_log2(Fraction(1, 8))
    -3
    """
    numerator, denominator = value.numerator.bit_length() - 1, value.denominator.bit_length() - 1
    if value != Fraction(2**numerator, 2**denominator):
        raise ValueError(f"value: must be a power of two, got {value}")
    return numerator - denominator


@dataclass(frozen=True)
class EstimatorMoments:
    """What a `ctpo.Estimator` does on a world, by enumeration.

    Attributes:
        mean: (D,) expectation of its summed gradient.
        bias: (D,) mean minus the true policy gradient.
        total_variance: Trace of its covariance for one trajectory.
        clip_rate: Share of policy tokens, under the behavior policy, that its window clips.
        ess: Effective sample size of the weights that it applies, see `WeightMoments`.
    """

    mean: np.ndarray
    bias: np.ndarray
    total_variance: float
    clip_rate: float
    ess: float


def check_sees_one_trajectory(estimator: ctpo.Estimator) -> None:
    """Raise for an estimator whose coefficients depend on the other trajectories of a batch: here there is none."""
    if estimator.region is not None and estimator.region.scope == "batch":
        raise ValueError(f"estimator: must look at one trajectory, not at a batch; got the region {estimator.region}")


def estimator_moments(
    world: World,
    estimator: ctpo.Estimator | str,
    advantage: AdvantageKind | np.ndarray = "A_target",
    *,
    outcome: bool = False,
    trajectories: Trajectories | None = None,
) -> EstimatorMoments:
    """Bias, variance, clip rate and effective sample size of an estimator of `ctpo`, by its own coefficients.

    The weights are computed on every trajectory by the very code that a trainer runs, from log-probabilities.
    `trajectories` saves enumerating a float64 world again.

    Raises:
        ValueError: The trajectories are those of another world, or the estimator looks at more than one trajectory.
    """
    world = world.as_float() if world.exact else world
    estimator = ctpo.get_estimator(estimator)
    check_sees_one_trajectory(estimator)
    if trajectories is not None and trajectories.world is not world:
        raise ValueError("trajectories: must be those of this very world, in float64")
    paths = trajectories if trajectories is not None else enumerate_trajectories(world)
    logp, behavior_logp = paths.log_probabilities()
    advantages = paths.advantage(advantage)
    if outcome:
        advantages = advantages * world.mdp.outcome[paths.final_state][:, None]
    sampled = paths.behavior_probability > 0
    mask = paths.mask & sampled[:, None]
    result = estimator.coefficients(logp, behavior_logp, advantages, mask)
    moments = paths.moments(paths.summed_scores(result.weight * advantages))
    clipped = (result.clipped_low | result.clipped_high | result.clipped_dual | result.rejected).sum(axis=1)
    written = paths.expectation(mask.astype(float))
    weights = WeightMoments(written, paths.expectation(result.weight), paths.expectation(result.weight**2))
    return EstimatorMoments(
        mean=moments.mean,
        bias=moments.mean - paths.policy_gradient,
        total_variance=float(moments.total_variance),
        clip_rate=float(paths.expectation(clipped.astype(float)) / written.sum()),
        ess=float(weights.ess),
    )
