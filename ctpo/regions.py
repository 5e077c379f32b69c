r"""Trust regions: rules that take tokens away from the gradient for where the policy has moved, not for their ratio.

A clip window (`ctpo.clipping`) judges an importance ratio by its position. A region judges by what else is known:
probabilities rather than ratios, the rest of the sequence, or the rest of the batch. A rejected token has weight 0
and value 0; it still counts in the denominators of a loss. Any region goes with any estimator:
``Estimator(..., region=...)``.

================ ========== ================================================= ========================================
class            scope      a token is rejected if                            source
================ ========== ================================================= ========================================
DivergenceRegion token      it moves away and its divergence is too large     DPPO, arXiv:2602.04879
PrefixBudget     sequence   it moves away and its divergence, weighted by     CPPO, arXiv:2606.10968
                 or prefix  position, exceeds what its prefix has left
SequenceRegion   sequence   the mean or maximum over its sequence is too      TRM, arXiv:2512.23075;
                            large, for A < 0 only if so wished                OPSM, DeepSeek-V3.2
SecondMoment     batch      it moves away and is among those of the largest   M2PO, arXiv:2510.01161
                            log-ratios of the batch
================ ========== ================================================= ========================================

A token moves away if A > 0 and its ratio is above 1, or A < 0 and its ratio is below 1: the gradient would carry
it farther from the behavior policy. The scope says what a decision depends on. A region of the scope "batch" sees
the batch that it is given: micro-batches are judged one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

from ctpo._arrays import Array, Namespace, delay, device, either, one_of, only_where, positive_fields, prefix_sum
from ctpo.ratios import policy_tokens

__all__ = ["DivergenceRegion", "PrefixBudget", "Region", "Scope", "SecondMoment", "SequenceRegion"]

Scope = Literal["token", "prefix", "sequence", "batch"]
Divergence = Literal["tv", "kl"]
Estimate = Literal["k1", "k2", "k3"]
Statistic = Literal["mean", "max"]

# Added to the probabilities of "any other token" in the binary KL divergence, as its authors do: a log-probability
# that has been rounded to 0 does not make the divergence infinite.
_OTHER_TOKENS = 1e-8
# Quantile of a sequence's divergences that an adaptive prefix budget follows, and its largest multiple of `budget`.
_QUANTILE, _LARGEST_BUDGET = 0.9, 2.0


class Moves(NamedTuple):
    """What regions look at: arrays of (or that broadcast against) shape (..., T), not empty, 0 where masked."""

    logp: Array
    behavior_logp: Array
    log_ratio: Array  # of single tokens, without any limit
    advantages: Array
    mask: Array | None
    position: Array  # t, at least 1

    def away(self) -> Array:
        """True where the gradient carries a token farther from the behavior policy; False where masked."""
        up, down = self.log_ratio > 0, self.log_ratio < 0
        return (up & (self.advantages > 0)) | (down & (self.advantages < 0))

    def shift(self, xp: Namespace) -> Array:
        """Change of the token's probability, at most 1 in size."""
        return xp.exp(self.logp) - xp.exp(self.behavior_logp)


@dataclass(frozen=True)
class DivergenceRegion:
    r"""Rejects a token whose own probability has moved too far, on the side that the advantage pushes to.

    With p = pi(a_t|s_t) and q = b(a_t|s_t), the divergence between the two-point distributions (this token,
    any other) is

    * "tv": :math:`|p - q|`,
    * "kl": :math:`q \log(q/p) + (1-q) \log((1-q)/(1-p))`, from the behavior to the target policy; 1e-8 is added
      to 1 - q and 1 - p within the logarithm.

    Rejected are tokens with A > 0, p > q and a divergence above `high`, and those with A < 0, p < q and a
    divergence above `low`.

    Args:
        low: Threshold for tokens with A < 0, positive.
        high: Threshold for tokens with A > 0, positive.
        kind: "tv" or "kl".

    Raises:
        ValueError: A field is out of its range.

    References:
        arXiv:2602.04879.

    Example:
        >>> DivergenceRegion(0.2, 0.2)
        DivergenceRegion(low=0.2, high=0.2, kind='tv')
    """

    low: float = 0.2
    high: float = 0.2
    kind: Divergence = "tv"
    scope: ClassVar[Scope] = "token"

    def __post_init__(self) -> None:
        one_of("DivergenceRegion: kind", self.kind, get_args(Divergence))
        positive_fields(self, "low", "high")

    def rejects(self, xp: Namespace, moves: Moves) -> Array:
        """True at the tokens to take away, shape (..., T); anything where masked."""
        if self.kind == "tv":
            divergence = abs(moves.shift(xp))
        else:
            q = xp.exp(moves.behavior_logp)
            others, now = (xp.clip(-xp.expm1(x), min=0.0) for x in (moves.behavior_logp, moves.logp))
            own = q * xp.where(q > 0, -moves.log_ratio, 0.0)
            divergence = own + others * xp.log((others + _OTHER_TOKENS) / (now + _OTHER_TOKENS))
        threshold = either(xp, moves.advantages < 0, self.low, self.high, divergence)
        return moves.away() & (divergence > threshold)


@dataclass(frozen=True)
class PrefixBudget:
    r"""Rejects a token that moves away if its divergence exceeds what the tokens before it have left of a budget.

    With :math:`D_t = |\pi(a_t|s_t) - b(a_t|s_t)|` and the weights

    .. math:: w_t = 1 - (1 - w_H) \frac{t - 1}{\max(H - 1, 1)}

    that fall from 1 at the first token to `last_weight` :math:`w_H` at the last of H, a token is kept if

    .. math:: w_t D_t \le \delta + \min\Big(0, \sum_{k<t} w_k (\beta - D_k)\Big)

    with :math:`\delta` = `threshold`. The average budget :math:`\beta` is `budget`, or, if `adaptive`, the
    90 % quantile of the sequence's D, moved into [budget, 2 budget]. The sums count every earlier token, rejected or
    not.

    Args:
        threshold: Largest divergence of the first token, positive.
        budget: Average divergence of a prefix, positive.
        last_weight: Weight of the last token, in (0, 1]: later tokens change less of what follows.
        adaptive: Whether the budget follows the sequence.

    Raises:
        ValueError: A field is out of its range.

    References:
        arXiv:2606.10968, equations 8-10, with the divergence of the sampled token alone.

    Example:
        >>> PrefixBudget().scope, PrefixBudget(last_weight=1.0, adaptive=False).scope
        ('sequence', 'prefix')
    """

    threshold: float = 0.15
    budget: float = 0.02
    last_weight: float = 0.8
    adaptive: bool = True

    def __post_init__(self) -> None:
        positive_fields(self, "threshold", "budget", "last_weight")
        if self.last_weight > 1:
            raise ValueError(f"PrefixBudget: last_weight must be at most 1; got {self.last_weight!r}")
        _check_bool(self, "adaptive")

    @property
    def scope(self) -> Scope:
        """The prefix, or the sequence if weights or budget depend on it."""
        return "sequence" if self.adaptive or self.last_weight < 1 else "prefix"

    def rejects(self, xp: Namespace, moves: Moves) -> Array:
        """True at the tokens to take away, shape (..., T); anything where masked."""
        divergence = abs(moves.shift(xp))
        weight: Array | float = 1.0
        if self.last_weight < 1:
            steps = xp.clip(_length(xp, divergence, moves.mask) - 1.0, min=1.0)
            weight = 1.0 - (1.0 - self.last_weight) * (moves.position - 1.0) / steps
        budget = self._budget(xp, divergence, moves.mask) if self.adaptive else self.budget
        spent = weight * divergence
        saved = only_where(xp, moves.mask, weight * budget - spent)
        before = delay(xp, prefix_sum(xp, saved), 1, 0.0)
        return moves.away() & (spent > self.threshold + xp.clip(before, max=0.0))

    def _budget(self, xp: Namespace, divergence: Array, mask: Array | None) -> Array:
        """Average budget of each sequence, shape (..., 1)."""
        ordered = xp.sort(only_where(xp, mask, divergence, 2.0), axis=-1)  # larger than any divergence
        rank = _QUANTILE * (_length(xp, divergence, mask) - 1.0)
        below = xp.floor(rank)
        value, above = (
            xp.take_along_axis(ordered, xp.astype(index, xp.int64), axis=-1) for index in (below, xp.ceil(rank))
        )
        value = value + (rank - below) * (above - value)
        return xp.clip(value, min=self.budget, max=_LARGEST_BUDGET * self.budget)


@dataclass(frozen=True)
class SequenceRegion:
    r"""Rejects every token of a sequence whose log-ratios are too large on average, or at one of them.

    The log-ratio :math:`d_t` of a single token gives three estimates of the divergence from the behavior policy:

    * "k1": :math:`-d_t`, of KL(b||pi), of either sign,
    * "k2": :math:`d_t^2 / 2`,
    * "k3": :math:`e^{d_t} - 1 - d_t`, of KL(b||pi), never negative.

    Args:
        threshold: Largest mean or maximum of a sequence that is kept, positive, nats.
        estimate: "k1", "k2" or "k3".
        statistic: "mean" or "max" over the policy tokens of the sequence.
        only_negative: Whether only tokens with A < 0 are rejected.

    Raises:
        ValueError: A field is out of its range.

    References:
        arXiv:2512.23075 (maximum of k2, mean of k3); DeepSeek-V3.2 (mean of k1, A < 0 only).

    Example:
        >>> SequenceRegion(0.1, "k1", only_negative=True)
        SequenceRegion(threshold=0.1, estimate='k1', statistic='mean', only_negative=True)
    """

    threshold: float
    estimate: Estimate = "k3"
    statistic: Statistic = "mean"
    only_negative: bool = False
    scope: ClassVar[Scope] = "sequence"

    def __post_init__(self) -> None:
        positive_fields(self, "threshold")
        one_of("SequenceRegion: estimate", self.estimate, get_args(Estimate))
        one_of("SequenceRegion: statistic", self.statistic, get_args(Statistic))
        _check_bool(self, "only_negative")

    def rejects(self, xp: Namespace, moves: Moves) -> Array:
        """True at the tokens to take away, shape (..., T); anything where masked."""
        d = moves.log_ratio
        if self.estimate == "k1":
            estimate = -d
        elif self.estimate == "k2":
            estimate = 0.5 * d * d
        else:
            estimate = xp.expm1(d) - d
        # 0 where masked, as the log-ratio is, and below any threshold.
        if self.statistic == "max":
            value = xp.max(estimate, axis=-1, keepdims=True)
        else:
            value = xp.sum(estimate, axis=-1, keepdims=True) / _length(xp, d, moves.mask)
        beyond = xp.broadcast_to(value > self.threshold, d.shape)
        return beyond & (moves.advantages < 0) if self.only_negative else beyond


@dataclass(frozen=True)
class SecondMoment:
    r"""Rejects the tokens with the largest log-ratios until the mean square of the rest of the batch is small.

    Only the tokens that move away are counted and rejected. Of them those of the largest :math:`d_t^2` go, one
    after the other, while

    .. math:: \frac{1}{n} \sum_{i=1}^n d_i^2 > \text{threshold}

    over the n that are left. Tokens of equal :math:`d_t^2` go together.

    Args:
        threshold: Largest mean square of log-ratios, nats squared, positive.

    Raises:
        ValueError: The threshold is not a positive finite number.

    References:
        arXiv:2510.01161, algorithm 1. AReaL counts all tokens, and judges the proximal against the behavior policy.

    Example:
        >>> SecondMoment().scope
        'batch'
    """

    threshold: float = 0.04
    scope: ClassVar[Scope] = "batch"

    def __post_init__(self) -> None:
        positive_fields(self, "threshold")

    def rejects(self, xp: Namespace, moves: Moves) -> Array:
        """True at the tokens to take away, shape (..., T); anything where masked."""
        counted = moves.away()
        square = xp.where(counted, moves.log_ratio * moves.log_ratio, math.inf)
        ordered = xp.sort(xp.reshape(square, (-1,)))
        number = xp.arange(1, ordered.shape[0] + 1, dtype=ordered.dtype, device=device(ordered))
        # The mean of the n smallest grows with n: where it is too large, the n-th goes, and all above it.
        beyond = prefix_sum(xp, ordered) > self.threshold * number
        return counted & (square >= xp.min(xp.where(beyond, ordered, math.inf)))


#: Any of the regions.
Region = DivergenceRegion | PrefixBudget | SequenceRegion | SecondMoment


def _length(xp: Namespace, like: Array, mask: Array | None) -> Array:
    """Number of policy tokens of each sequence, at least 1, an array that broadcasts against (..., 1)."""
    count = policy_tokens(xp, like, mask)
    return xp.full_like(like[..., :1], count) if isinstance(count, int) else count


def _check_bool(region: Region, name: str) -> None:
    """Raise unless the named field is True or False."""
    value = getattr(region, name)
    if not isinstance(value, bool):
        raise ValueError(f"{type(region).__name__}: {name} must be True or False; got {value!r}")
