r"""Clip windows: the interval that an importance ratio must lie in for a token to keep its gradient.

All of them answer ``bounds(position)`` with logarithms of the window at every position t (the number of
policy tokens so far, counted from 1):

==============  ===============================  ================================  ================================
class           lower log bound                  upper log bound                   dual log bound
==============  ===============================  ================================  ================================
RatioClip       log(1 - low)                     log(1 + high)                     log(dual)
PositionClip    -drift t - low t**power          -drift t + high t**power          -drift t + dual t**power
CalibratedClip  -drift t - z(low) sigma t**power -drift t + z(high) sigma t**power -drift t + z(dual) sigma t**power
==============  ===============================  ================================  ================================

z(p) is the point beyond which a standard normal variable lies with probability p. The dual bound caps the ratio
of tokens with a negative advantage; None means no cap.

Some forms of an estimator have no window but a smooth gate: `SigmoidGate`, `GammaWeight` and `ProbabilityShift`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from ctpo._arrays import Array, check_numeric, default_float, is_array, namespace, positive_fields, real_number

__all__ = [
    "CalibratedClip",
    "Clip",
    "GammaWeight",
    "Gate",
    "PositionClip",
    "ProbabilityShift",
    "RatioClip",
    "SigmoidGate",
]

Bounds = tuple[Array, Array, Array | None]


class Scales(NamedTuple):
    """A window in parts: a log bound is center + scale x width, with None for a center of 0 and a width of 1."""

    low: float
    high: float
    dual: float | None
    width: Array | None
    center: Array | None

    def bound(self, scale: Array | float) -> Array | float:
        """Log bound of one scale, or of an array of them that broadcasts against the positions."""
        if self.width is not None:
            scale = scale * self.width
        return scale if self.center is None else self.center + scale


@dataclass(frozen=True)
class RatioClip:
    """The same window [1 - low, 1 + high] for the ratio at every position.

    Args:
        low: Room below 1, in (0, 1]; 1 means no lower bound.
        high: Room above 1, positive; inf means no upper bound.
        dual: Largest ratio of a token with a negative advantage, above 1; None for no cap.

    Raises:
        ValueError: A field is not a number of its range.

    References:
        arXiv:1707.06347 (low = high), arXiv:2503.14476 (high above low), arXiv:1912.09729 (dual).

    Example:
        >>> low, high, dual = RatioClip(0.5, 4.0).bounds([1, 2])
        >>> np.exp(low), np.exp(high), dual
        (array([0.5, 0.5]), array([5., 5.]), None)
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None

    def __post_init__(self) -> None:
        low = real_number("RatioClip", "low", self.low, "a number in (0, 1]")
        if not 0 < low <= 1:
            raise ValueError(f"RatioClip: low must be a number in (0, 1]; got {self.low!r}")
        high = real_number("RatioClip", "high", self.high, "a positive number")
        if not high > 0:
            raise ValueError(f"RatioClip: high must be a positive number; got {self.high!r}")
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)
        if self.dual is not None:
            dual = real_number("RatioClip", "dual", self.dual, "a finite number above 1, or None")
            if not 1 < dual < math.inf:
                raise ValueError(f"RatioClip: dual must be a finite number above 1, or None; got {self.dual!r}")
            object.__setattr__(self, "dual", dual)

    def bounds(self, position: Array) -> Bounds:
        """Logarithms of the window at the given positions.

        Args:
            position: Positions t, any shape; an array, or a Python number or list, which NumPy then holds.

        Returns:
            (log_low, log_high, log_dual), arrays of the shape of `position`; log_dual is None without a dual
            bound. Floating positions give their dtype, integer ones the namespace's default floating dtype.

        Raises:
            ValueError: `position` is not numeric.
        """
        position, xp = _float_positions(position)
        scales = self.scales(position)
        low, high = xp.full_like(position, scales.low), xp.full_like(position, scales.high)
        return low, high, None if scales.dual is None else xp.full_like(position, scales.dual)

    def scales(self, position: Array) -> Scales:
        """`bounds` in parts."""
        log_low = -math.inf if self.low == 1 else math.log1p(-self.low)
        return Scales(log_low, math.log1p(self.high), None if self.dual is None else math.log(self.dual), None, None)


@dataclass(frozen=True)
class PositionClip:
    """A window for the log-ratio that widens (or narrows) as a power of the position.

    Args:
        low: Scale of the lower log bound, positive.
        high: Scale of the upper log bound, positive.
        power: Exponent of the position: 0.5 follows the spread of a cumulative log-ratio with independent tokens,
            -0.5 that of its mean, 0 gives a fixed window.
        dual: Scale of the upper log bound for negative advantages, positive; None for no bound. The released
            code of arXiv:2605.07331 has one, equal to `high`; the formula printed in the paper has none.
        drift: Fall of the center of the window per token, nats. 0 in the paper. E_b[log rho_t] falls by the
            divergence KL(b||pi) per token, so a window centered at 0 is left downwards in the end.

    Raises:
        ValueError: A field is not a number of its range.

    References:
        arXiv:2605.07331, section 3.3.

    Example:
        >>> low, high, dual = PositionClip(dual=None).bounds([1, 4, 100])
        >>> low, high, dual
        (array([-0.025, -0.05 , -0.25 ]), array([0.05, 0.1 , 0.5 ]), None)
    """

    low: float = 0.025
    high: float = 0.05
    power: float = 0.5
    dual: float | None = 0.05
    drift: float = 0.0

    def __post_init__(self) -> None:
        for name in ("low", "high", "dual"):
            value = getattr(self, name)
            if name == "dual" and value is None:
                continue
            allowed = "a positive finite number" + (", or None" if name == "dual" else "")
            number = real_number("PositionClip", name, value, allowed)
            if not 0 < number < math.inf:
                raise ValueError(f"PositionClip: {name} must be {allowed}; got {value!r}")
            object.__setattr__(self, name, number)
        for name in ("power", "drift"):
            value = getattr(self, name)
            number = real_number("PositionClip", name, value, "a finite number")
            if not math.isfinite(number):
                raise ValueError(f"PositionClip: {name} must be a finite number; got {value!r}")
            object.__setattr__(self, name, number)

    def bounds(self, position: Array) -> Bounds:
        """Logarithms of the window at the given positions.

        Args:
            position: Positions t, any shape; an array, or a Python number or list, which NumPy then holds. 0
                (a masked place) counts as 1, so that no bound is ever inf or NaN.

        Returns:
            (log_low, log_high, log_dual), arrays of the shape of `position`; log_dual is None without a dual
            bound. Floating positions give their dtype, integer ones the namespace's default floating dtype.

        Raises:
            ValueError: `position` is not numeric.
        """
        position, xp = _float_positions(position)
        scales = self.scales(xp.clip(position, min=1.0))
        dual = None if scales.dual is None else scales.bound(scales.dual)
        return scales.bound(scales.low), scales.bound(scales.high), dual

    def scales(self, position: Array) -> Scales:
        """`bounds` in parts, at floating positions of at least 1."""
        center = -self.drift * position if self.drift else None
        return Scales(-self.low, self.high, self.dual, position**self.power, center)


@dataclass(frozen=True, kw_only=True)
class CalibratedClip:
    r"""A window that a wanted share of the tokens leaves at every position, from the drift and spread of log rho_t.

    With `low` the wanted share below the window, `high` and `dual` those above:

    .. math:: P_b(\log\rho_t < \text{lower}_t) = \text{low}, \qquad P_b(\log\rho_t > \text{upper}_t) = \text{high}

    at every t if log rho_t is Gaussian with mean -drift t and standard deviation sigma t**power. In an
    `Estimator` of the level "cumulative" and the form "ppo", `low` is then the clip rate among the tokens with a
    negative advantage at any position, `high` that among the tokens with a positive one, and `dual` the share of
    the tokens with a negative advantage that the dual bound clips, all under the behavior policy.
    `ctpo.diagnostics.calibrate_clip` estimates the constants.

    A rate under the behavior policy is not a bias. What clipping takes from the gradient is weighed by rho_t, that
    is by the target policy, under which log rho_t drifts upwards: where E_b rho_t = 1, the share of the A > 0
    gradient mass beyond the upper bound is P(N > z(high) - sigma t**0.5) for standard normal N at power 0.5,
    and tends to 1, whatever `high`.

    Args:
        low: Wanted share below the lower bound among tokens with A < 0, between 0 and 0.5.
        high: Wanted share above the upper bound among tokens with A > 0, between 0 and 0.5.
        sigma: Standard deviation of log rho_1 (with power 0.5: per square root of a token), nats, positive.
        drift: Fall of E_b log rho_t per token, nats; for the ratios of two fixed policies KL(b||pi), which is
            sigma**2 / 2 where log rho_t is Gaussian.
        power: Exponent of the position in the standard deviation; 0.5 for uncorrelated tokens.
        dual: Wanted share above the dual bound among tokens with A < 0, between 0 and 0.5; None for no bound.

    Raises:
        ValueError: A field is not a number of its range.

    Assumptions:
        log rho_t is Gaussian at every t, over the sequences that are clipped: neither selected by survival to t
        nor a mixture of sequences that diverge at different speeds. The sign of the advantage tells nothing
        about log rho_t, which fails for sequences that the target was trained on.

    Example:
        >>> clip = CalibratedClip(low=0.1, high=0.05, sigma=0.04, drift=0.0008)
        >>> low, high, dual = clip.bounds([1, 100, 2500])
        >>> low.round(4), high.round(4), dual
        (array([-0.0521, -0.5926, -4.5631]), array([0.065 , 0.5779, 1.2897]), None)
    """

    low: float
    high: float
    sigma: float
    drift: float
    power: float = 0.5
    dual: float | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high", "dual"):
            value = getattr(self, name)
            if name == "dual" and value is None:
                continue
            allowed = "a number between 0 and 0.5" + (", or None" if name == "dual" else "")
            number = real_number("CalibratedClip", name, value, allowed)
            if not 0 < number < 0.5:
                raise ValueError(f"CalibratedClip: {name} must be {allowed}; got {value!r}")
            object.__setattr__(self, name, number)
        for name in ("sigma", "drift", "power"):
            value = getattr(self, name)
            allowed = "a positive finite number" if name == "sigma" else "a finite number"
            number = real_number("CalibratedClip", name, value, allowed)
            if not math.isfinite(number) or (name == "sigma" and number <= 0):
                raise ValueError(f"CalibratedClip: {name} must be {allowed}; got {value!r}")
            object.__setattr__(self, name, number)

    @cached_property
    def position_clip(self) -> PositionClip:
        """The `PositionClip` that has the same bounds."""
        return PositionClip(
            low=self._scale(self.low),
            high=self._scale(self.high),
            power=self.power,
            dual=None if self.dual is None else self._scale(self.dual),
            drift=self.drift,
        )

    def _scale(self, rate: float) -> float:
        """Distance of a bound from the center of the window at t = 1."""
        return -NormalDist().inv_cdf(rate) * self.sigma

    def bounds(self, position: Array) -> Bounds:
        """Logarithms of the window at the given positions, those of `position_clip`.

        Args:
            position: Positions t, any shape, as in `PositionClip.bounds`.

        Returns:
            (log_low, log_high, log_dual), as `PositionClip.bounds`.

        Raises:
            ValueError: `position` is not numeric.
        """
        return self.position_clip.bounds(position)

    def scales(self, position: Array) -> Scales:
        """`bounds` in parts, as `PositionClip.scales`."""
        return self.position_clip.scales(position)


#: Any of the windows.
Clip = RatioClip | PositionClip | CalibratedClip


@dataclass(frozen=True)
class SigmoidGate:
    r"""A weight that fades smoothly on both sides of a ratio of 1, for the form "sapo".

    .. math:: f(w) = \frac{4}{\tau}\,\sigma(\tau (w - 1)), \qquad w f'(w) = 4 w\,\sigma(1 - \sigma)

    f is the surrogate's factor of the advantage, w f'(w) the coefficient: 1 at w = 1.

    Args:
        positive: tau of tokens with A > 0, positive; larger fades faster.
        negative: tau of all other tokens.

    Raises:
        ValueError: A field is not a number of its range.

    References:
        arXiv:2511.20347.

    Example:
        >>> SigmoidGate()
        SigmoidGate(positive=1.0, negative=1.05)
    """

    positive: float = 1.0
    negative: float = 1.05

    def __post_init__(self) -> None:
        positive_fields(self, "positive", "negative")


@dataclass(frozen=True)
class GammaWeight:
    r"""A detached weight with the shape of a gamma density, for the form "vespo".

    .. math:: \phi(w) = w^k e^{\lambda (1 - w)}

    It is 1 at w = 1, has its maximum at k / lambda and falls off on both sides.

    Args:
        positive_power: k of tokens with A >= 0, positive.
        positive_rate: lambda of those tokens, positive.
        negative_power: k of tokens with A < 0, positive.
        negative_rate: lambda of those tokens, positive.

    Raises:
        ValueError: A field is not a number of its range.

    References:
        arXiv:2602.10693.

    Example:
        >>> GammaWeight()
        GammaWeight(positive_power=2.0, positive_rate=3.0, negative_power=3.0, negative_rate=2.0)
    """

    positive_power: float = 2.0
    positive_rate: float = 3.0
    negative_power: float = 3.0
    negative_rate: float = 2.0

    def __post_init__(self) -> None:
        positive_fields(self, "positive_power", "positive_rate", "negative_power", "negative_rate")


@dataclass(frozen=True)
class ProbabilityShift:
    r"""Bounds for the change of a token's probability instead of its ratio, for the form "cfpo".

    With q = b(a_t|s_t), the ratio's bounds are

    .. math:: 1 - \text{low} / q \quad\text{and}\quad 1 + \text{high} / q,

    where the probability itself has moved by `low` or `high`. Both may be above 1: the parabola of the form "cfpo"
    then never turns around.

    Args:
        low: Bound of the fall of the probability for tokens with A < 0, positive.
        high: Bound of its rise for tokens with A > 0, positive.

    Raises:
        ValueError: A field is not a number of its range.

    References:
        arXiv:2606.09821.

    Example:
        >>> ProbabilityShift()
        ProbabilityShift(low=12.5, high=12.5)
    """

    low: float = 12.5
    high: float = 12.5

    def __post_init__(self) -> None:
        positive_fields(self, "low", "high")


#: Any of the gates, each made for one form of an estimator.
Gate = SigmoidGate | GammaWeight | ProbabilityShift


def _float_positions(position: Array) -> tuple[Array, Array]:
    """Positions in a floating dtype, and their namespace."""
    if not is_array(position):
        position = np.asarray(position)
    xp = namespace(position=position)
    check_numeric(xp, position=position)
    if not xp.isdtype(position.dtype, "real floating"):
        position = xp.astype(position, default_float(xp, position))
    return position, xp
