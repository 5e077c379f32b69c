r"""Trust regions: rules that take tokens away from the gradient for where the policy has moved, not for their ratio.

A clip window (`ctpo.clipping`) judges an importance ratio by its position. A region judges by what else is known:
probabilities rather than ratios, the rest of the sequence, or the rest of the batch. A rejected token has weight 0
and value 0; it still counts in the denominators of a loss. Any region goes with any estimator:
``Estimator(..., region=...)``.

================== ========= ====================================================================================
class              scope     a token is rejected if
================== ========= ====================================================================================
DivergenceRegion   token     it moves away and the divergence of its own probability is above a threshold
================== ========= ====================================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

from ctpo._arrays import Array, Namespace, one_of, real_number

__all__ = ["DivergenceRegion", "Region", "Scope"]

Scope = Literal["token", "prefix", "sequence", "batch"]
Divergence = Literal["tv", "kl"]


class Moves(NamedTuple):
    """What regions look at: arrays of (or that broadcast against) shape (..., T), 0 where masked."""

    logp: Array
    behavior_logp: Array
    log_ratio: Array  # of single tokens, without any limit
    advantages: Array
    mask: Array | None
    position: Array  # t, at least 1


@dataclass(frozen=True)
class DivergenceRegion:
    r"""Rejects a token whose own probability has moved too far, on the side that the advantage pushes to.

    With p = pi(a_t|s_t) and q = b(a_t|s_t), the divergence between the two-point distributions (this token,
    any other) is

    * "tv": :math:`|p - q|`,
    * "kl": :math:`q \log(q/p) + (1-q) \log((1-q)/(1-p))`, from the behavior to the target policy.

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

    low: float
    high: float
    kind: Divergence = "tv"
    scope: ClassVar[Scope] = "token"

    def __post_init__(self) -> None:
        one_of("kind", self.kind, get_args(Divergence))
        for name in ("low", "high"):
            value = getattr(self, name)
            number = real_number("DivergenceRegion", name, value, "a positive finite number")
            if not 0 < number < math.inf:
                raise ValueError(f"DivergenceRegion: {name} must be a positive finite number; got {value!r}")
            object.__setattr__(self, name, number)

    def rejects(self, xp: Namespace, moves: Moves) -> Array:
        """True at the tokens to take away, shape (..., T)."""
        p, q = xp.exp(moves.logp), xp.exp(moves.behavior_logp)
        up, down = moves.log_ratio > 0, moves.log_ratio < 0
        if self.kind == "tv":
            divergence = abs(p - q)
        else:
            own = xp.where(moves.log_ratio == 0, 0.0, -q * moves.log_ratio)
            # At p = q = 1 nothing else is left: log 1 - log 1.
            rest = xp.where(q < 1, (1 - q) * (xp.log1p(-q) - xp.log1p(-p)), 0.0)
            divergence = own + rest
        too_high = (moves.advantages > 0) & up & (divergence > self.high)
        return too_high | ((moves.advantages < 0) & down & (divergence > self.low))


#: Any of the regions.
Region = DivergenceRegion
