r"""Log importance ratios of a target policy over a behavior policy, at every level in use.

With :math:`d_t = \log\pi(a_t|s_t) - \log b(a_t|s_t)` at the t-th policy token of a sequence that has H of
them:

================== ================================================ ==========================================
level              log-ratio at token t                             depends on tokens
================== ================================================ ==========================================
"token"            d_t                                              t
"cumulative"       log rho_t = d_1 + ... + d_t                      1..t
"cumulative_mean"  log rho_t / t                                    1..t
"sequence"         log rho_H                                        1..H
"sequence_mean"    log rho_H / H                                    1..H
"window"           d_{t-window+1} + ... + d_t                       the last `window` ones, t included
"forward"          d_t + ... + d_min(t+window-1, H)                 t..min(t+window-1, H)
"lookahead"        log rho_min(t+window, H)                         1..min(t+window, H)
"min_prefix"       d_t + min_{k<t} d_k, the minimum over none is 0  1..t
"turn"             sum of d_k over the turn that t belongs to       the turn
"turn_mean"        mean of d_k over the turn that t belongs to      the turn
================== ================================================ ==========================================

Masked entries (prompt, padding, tool output) are not tokens of the policy: they enter no sum, do not advance
t and fill no place in a window. Arrays may belong to any array API library; all arithmetic is float32 or
wider.

Shapes and dtypes are always checked. Values are checked where looking at them is free, on concrete arrays in CPU
memory; on an accelerator or a traced array (all of JAX's count as such) that would force a synchronization, so there
a NaN at a policy token goes through to the result.
"""

from __future__ import annotations

import math
import operator
from typing import Literal, NamedTuple, Protocol, get_args

from ctpo._arrays import (
    Array,
    Namespace,
    check_finite,
    check_floating,
    check_mask,
    check_shape,
    delay,
    device,
    has_readable_values,
    is_tensor,
    namespace,
    one_of,
    only_where,
    prefix_sum,
    run_sum,
    running_minimum,
    windowed_sum,
    working_dtype,
)

__all__ = ["Level", "log_ratio", "positions"]

Level = Literal[
    "token",
    "cumulative",
    "cumulative_mean",
    "sequence",
    "sequence_mean",
    "window",
    "forward",
    "lookahead",
    "min_prefix",
    "turn",
    "turn_mean",
]
LEVELS: tuple[str, ...] = get_args(Level)
TURN_LEVELS = ("turn", "turn_mean")
# The smallest window that means something: "window" and "forward" count the current token, "lookahead" only later ones.
SMALLEST_WINDOW = {"window": 1, "forward": 1, "lookahead": 0}


def positions(mask: Array) -> Array:
    """Position of every policy token among the policy tokens of its sequence, counted from 1.

    Args:
        mask: bool, shape (..., T), True at policy tokens.

    Returns:
        Integers, shape (..., T), 0 where masked.

    Raises:
        ValueError: `mask` is not a boolean array with a time axis.

    Example:
        >>> import numpy as np
        >>> positions(np.array([True, False, True, True]))
        array([1, 0, 2, 3])
    """
    xp = namespace(mask=mask)
    check_time_axis("mask", mask)
    check_mask(xp, mask, tuple(mask.shape), "mask")
    count = xp.astype(mask, xp.__array_namespace_info__().default_dtypes()["integral"])
    return only_where(xp, mask, prefix_sum(xp, count), 0)


def log_ratio(
    logp: Array,
    behavior_logp: Array,
    mask: Array | None = None,
    *,
    level: Level = "cumulative",
    window: int | None = None,
    turn_ids: Array | None = None,
) -> Array:
    r"""Log importance ratio of the target over the behavior policy at every policy token.

    .. math:: \log\rho_t = \sum_{k\le t} \log\pi(a_k|s_k) - \log b(a_k|s_k)

    for the level "cumulative"; the table at the top of this module gives the others.

    Args:
        logp: Log-probabilities of the sampled tokens under the target policy, nats, shape (..., T). -inf is
            allowed (a ratio of 0).
        behavior_logp: The same under the behavior policy, which sampled the tokens; finite at policy tokens.
        mask: bool, same shape, True at policy tokens; None for all. What stands at masked places never
            matters.
        level: Which product of token ratios.
        window: Number of policy tokens, for the levels "window" and "forward" (at least 1) and "lookahead" (at
            least 0) only.
        turn_ids: Integers, same shape, for the levels "turn" and "turn_mean" only. Consecutive policy tokens
            of equal id form a turn; ids at masked places do not matter.

    Returns:
        Same namespace and shape, the wider of the two dtypes and at least float32; 0 where masked. Levels of
        the whole sequence or turn are repeated at each of its policy tokens.

    Raises:
        ValueError: Shapes or dtypes do not fit, `level` is unknown, `window` or `turn_ids` is missing or not
            used by the level, or (arrays in CPU memory) an entry at a policy token is NaN, +inf, or -inf in
            `behavior_logp`.

    Assumptions:
        E_b[rho_t f_t] = E_pi[f_t] holds if f_t depends on tokens 1..t only, pi has no mass where b has none,
        pi was fixed before the tokens were drawn, and behavior_logp is what the sampler really used.

    References:
        "cumulative": arXiv:2605.07331, section 3.1. "cumulative_mean": arXiv:2608.01418. "sequence_mean":
        arXiv:2507.18071. "min_prefix": arXiv:2601.22718. "forward": arXiv:2605.20865.

    Example:
        >>> import numpy as np
        >>> logp, behavior_logp = np.log([[0.6, 0.9, 0.5]]), np.log([[0.5, 0.3, 0.25]])
        >>> mask = np.array([[True, False, True]])
        >>> np.exp(log_ratio(logp, behavior_logp, mask)).round(4)
        array([[1.2, 1. , 2.4]])
    """
    check_level(level, window)
    check_turn_ids(level, turn_ids)
    xp, _, tokens, _ = token_log_ratio(logp, behavior_logp, mask, turn_ids=turn_ids)
    return at_level(xp, tokens, mask, level, window=window, turn_ids=turn_ids)


class TokenLogRatio(NamedTuple):
    """Checked inputs in the working dtype."""

    xp: Namespace
    logp: Array  # anything where masked
    log_ratio: Array  # 0 where masked
    behavior_logp: Array  # anything where masked


def token_log_ratio(
    logp: Array,
    behavior_logp: Array,
    mask: Array | None,
    *,
    turn_ids: Array | None = None,
    validate: bool | None = None,
    name: str = "logp",
    **others: Array,
) -> TokenLogRatio:
    """Check the arrays that every estimate starts from, then subtract.

    `others` are named arrays that must come from the same library and take part in the choice of dtype; their
    shapes are the caller's to check. `validate` is that of `check_finite`, `name` what the caller calls `logp`.
    """
    policies = {name: logp, "behavior_logp": behavior_logp}
    xp = namespace(mask=mask, turn_ids=turn_ids, **policies, **others)
    check_time_axis(name, logp)
    check_floating(xp, **policies)
    shape = tuple(logp.shape)
    check_shape(shape, name, behavior_logp=behavior_logp)
    check_mask(xp, mask, shape, name)
    check_shape(shape, name, turn_ids=turn_ids)
    if turn_ids is not None and not xp.isdtype(turn_ids.dtype, "integral"):
        raise ValueError(f"turn_ids must have an integer dtype; got {turn_ids.dtype}")
    dtype = working_dtype(xp, logp, behavior_logp, *others.values())
    logp, behavior_logp = xp.astype(logp, dtype, copy=False), xp.astype(behavior_logp, dtype, copy=False)
    if is_tensor(logp):  # NumPy would warn of inf - inf at masked places
        tokens = only_where(xp, mask, logp - behavior_logp)
        look = has_readable_values(tokens) if validate is None else validate
        if not look or math.isfinite(float(xp.sum(tokens))):  # which no sum is with a NaN or an infinity in it
            return TokenLogRatio(xp, logp, tokens, behavior_logp)
    logp, behavior_logp = only_where(xp, mask, logp), only_where(xp, mask, behavior_logp)
    check_finite(xp, name, logp, mask, where="at every policy token", minus_infinity=True, validate=validate)
    sampled = "at every policy token, which the behavior policy has sampled"
    check_finite(xp, "behavior_logp", behavior_logp, mask, where=sampled, validate=validate)
    return TokenLogRatio(xp, logp, logp - behavior_logp, behavior_logp)


class TimeShards(Protocol):
    """Access to the other shards of sequences whose time axis is split over processes, in the order of time."""

    rank: int

    def gather(self, x: Array) -> Array:
        """The same array of every shard, in order, stacked along a new first axis."""


class Totals(NamedTuple):
    """Sums over the earlier shards and over all shards of every sequence, each of shape (..., 1)."""

    log_ratio_before: Array
    tokens_before: Array
    minimum_before: Array  # +inf if no policy token came before
    log_ratio: Array
    tokens: Array


# Levels for which the totals of the other shards are all that is needed of them.
SCANNED_LEVELS = ("token", "cumulative", "cumulative_mean", "sequence", "sequence_mean", "min_prefix")


def shard_totals(xp: Namespace, mask: Array | None, shards: TimeShards, *tokens: Array) -> list[Totals]:
    """Totals of each of `tokens`, token log-ratios that are 0 where masked: one exchange of a few numbers per row."""
    counted = xp.ones_like(tokens[0]) if mask is None else xp.astype(mask, tokens[0].dtype)
    own = [xp.sum(counted, axis=-1)]
    for x in tokens:
        # The minimum over nothing in a shard of no time steps.
        least = xp.min(only_where(xp, mask, x, math.inf), axis=-1) if x.shape[-1] else xp.full_like(own[0], math.inf)
        own += [xp.sum(x, axis=-1), least]
    count, *others = xp.unstack(shards.gather(xp.stack(own, axis=-1))[..., None, :], axis=-1)
    earlier = (slice(0, shards.rank), ...)  # an exclusive scan; before the first shard stands what is neutral
    found = []
    for total, least in zip(others[::2], others[1::2], strict=True):
        minimum = xp.min(least[earlier], axis=0) if shards.rank else xp.full_like(least[0, ...], math.inf)
        before = (xp.sum(total[earlier], axis=0), xp.sum(count[earlier], axis=0), minimum)
        found.append(Totals(*before, xp.sum(total, axis=0), xp.sum(count, axis=0)))
    return found


def at_level(
    xp: Namespace,
    tokens: Array,
    mask: Array | None,
    level: str,
    *,
    window: int | None = None,
    turn_ids: Array | None = None,
    totals: Totals | None = None,
) -> Array:
    """Log-ratios at `level` from token log-ratios that are 0 where masked.

    `totals` are those of time shards, for the `SCANNED_LEVELS` only.
    """
    if level == "token":
        return tokens
    assert totals is None or level in SCANNED_LEVELS
    if level in SMALLEST_WINDOW:
        assert window is not None
        return _over_neighbors(xp, tokens, mask, level, window)
    if level in TURN_LEVELS:
        assert turn_ids is not None
        return _over_turns(xp, tokens, mask, level, turn_ids)
    if level == "min_prefix":
        # +inf is neutral in a minimum, and no token log-ratio is +inf: where it stays, nothing came before.
        earlier = delay(xp, running_minimum(xp, only_where(xp, mask, tokens, math.inf)), 1, math.inf)
        if totals is not None:
            earlier = xp.minimum(earlier, totals.minimum_before)
        value = tokens + xp.where(earlier == math.inf, 0.0, earlier)
    elif level in ("cumulative", "cumulative_mean"):
        value = prefix_sum(xp, tokens)
        if totals is not None:
            value = value + totals.log_ratio_before
        if level == "cumulative_mean":
            value = value / bounded_positions(xp, tokens, mask, totals)
    else:
        total = xp.sum(tokens, axis=-1, keepdims=True) if totals is None else totals.log_ratio
        if level == "sequence_mean":
            total = total / policy_tokens(xp, tokens, mask, totals)
        value = total + xp.zeros_like(tokens)  # written out, not a view whose entries share memory
    return only_where(xp, mask, value)


def bounded_positions(xp: Namespace, like: Array, mask: Array | None, totals: Totals | None = None) -> Array:
    """Positions in the dtype of `like`, at least 1 everywhere, of a shape that broadcasts against it."""
    if mask is None:
        count = xp.arange(1, like.shape[-1] + 1, dtype=like.dtype, device=device(like))
    else:
        count = prefix_sum(xp, xp.astype(mask, like.dtype))
    if totals is not None:
        count = count + totals.tokens_before
    return count if mask is None else xp.clip(count, min=1.0)


def policy_tokens(xp: Namespace, like: Array, mask: Array | None, totals: Totals | None = None) -> Array | int:
    """Number of policy tokens of each sequence, at least 1, shape (..., 1)."""
    if totals is not None:
        return xp.clip(totals.tokens, min=1.0)
    if mask is None:
        return max(like.shape[-1], 1)
    count = xp.sum(xp.astype(mask, like.dtype), axis=-1, keepdims=True)
    return xp.clip(count, min=1.0)


def _over_neighbors(xp: Namespace, tokens: Array, mask: Array | None, level: str, window: int) -> Array:
    """Levels that count in policy tokens: gaps are closed for them."""
    packed = tokens if mask is None else xp.take_along_axis(tokens, _policy_first(xp, mask), axis=-1)
    # Zeros follow the last policy token, so prefix sums stay at log rho_H from there on.
    if level == "window":
        packed = windowed_sum(xp, packed, window)
    elif level == "forward":
        packed = xp.flip(windowed_sum(xp, xp.flip(packed, axis=-1), window), axis=-1)
    else:
        packed = prefix_sum(xp, packed)
    ahead = window if level == "lookahead" else 0
    length = tokens.shape[-1]
    if mask is None:
        reach = xp.arange(length, device=device(tokens)) + min(ahead, length)
        reach = xp.where(reach < length, reach, length - 1)
        return xp.take(packed, reach, axis=-1) if ahead else packed
    reach = positions(mask) - 1 + min(ahead, length)
    reach = xp.where(reach < 0, 0, xp.where(reach < length, reach, length - 1))
    return xp.where(mask, xp.take_along_axis(packed, reach, axis=-1), 0.0)


def _over_turns(xp: Namespace, tokens: Array, mask: Array | None, level: str, turn_ids: Array) -> Array:
    """Levels "turn" and "turn_mean"; gaps are closed first, so that they neither join nor part turns."""
    counted = xp.ones_like(tokens)
    if mask is not None:
        order = _policy_first(xp, mask)
        tokens, turn_ids = (xp.take_along_axis(x, order, axis=-1) for x in (tokens, turn_ids))
        counted = xp.take_along_axis(xp.astype(mask, tokens.dtype), order, axis=-1)
    # The packed rest may join the last run: its log-ratios and counts are 0.
    starts = turn_ids != delay(xp, turn_ids, 1, 0)
    value = run_sum(xp, tokens, starts)
    if level == "turn_mean":
        value = value / xp.where(counted > 0, run_sum(xp, counted, starts), 1.0)
    if mask is None:
        return value
    index = positions(mask) - 1
    return xp.where(mask, xp.take_along_axis(value, xp.where(index < 0, 0, index), axis=-1), 0.0)


def _policy_first(xp: Namespace, mask: Array) -> Array:
    """Indices that bring the policy tokens to the front in their order."""
    return xp.argsort(xp.astype(~mask, xp.int8), axis=-1, stable=True)


def check_time_axis(name: str, x: Array) -> None:
    """Raise for a 0-dimensional array."""
    if x.ndim < 1:
        raise ValueError(f"{name} must have a time axis, shape (..., T); got shape ()")


def check_level(level: object, window: object) -> None:
    """Raise for an unknown level, and for a window that the level lacks, does not use, or cannot mean."""
    one_of("level", level, LEVELS)
    smallest = SMALLEST_WINDOW.get(str(level))
    if smallest is None:
        if window is not None:
            raise ValueError(f"window must be None at level {level!r}; got {window!r}")
        return
    try:
        valid = not isinstance(window, bool) and operator.index(window) >= smallest  # type: ignore[arg-type]
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"window must be an integer of at least {smallest} at level {level!r}; got {window!r}")


def check_turn_ids(level: str, turn_ids: object) -> None:
    """Raise if `turn_ids` is missing at a turn level or given at another."""
    if (turn_ids is None) == (level in TURN_LEVELS):
        need = "an integer array" if level in TURN_LEVELS else "None"
        got = "None" if turn_ids is None else type(turn_ids).__name__
        raise ValueError(f"turn_ids must be {need} at level {level!r}; got {got}")
