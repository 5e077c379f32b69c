r"""Policy-gradient estimators as detached coefficients.

The gradient of almost every policy-gradient surrogate in use is :math:`\sum_t c_t A_t \nabla\log\pi(a_t|s_t)`
with a coefficient :math:`c_t` = gate x weight that is held constant. An `Estimator` computes :math:`c_t`, and
the surrogate's value, from log-probabilities alone: no automatic differentiation, any array API library.

`ctpo.zoo` has the estimators that have a name.

What is unbiased: with a fixed target policy, without gates and limits, rho_t A_t has the target policy's
expectation if A_t depends on tokens 1..t only (an exact advantage does, an outcome reward does not); rho_H
A_t has it always. Token ratio, length-normalized ratios and every gate are biased.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from ctpo._arrays import (
    Array,
    Namespace,
    check_finite,
    check_numeric,
    check_sequence_or_token,
    either,
    has_readable_values,
    one_of,
    only_where,
    real_number,
)
from ctpo.clipping import (
    CalibratedClip,
    Clip,
    GammaWeight,
    Gate,
    PositionClip,
    ProbabilityShift,
    RatioClip,
    SigmoidGate,
)
from ctpo.ratios import (
    SCANNED_LEVELS,
    Level,
    TimeShards,
    Totals,
    at_level,
    bounded_positions,
    check_level,
    check_turn_ids,
    shard_totals,
    token_log_ratio,
)
from ctpo.regions import Moves, Region

__all__ = ["Coefficients", "Estimator", "Evaluation", "Form"]

Form = Literal["ppo", "gppo", "cispo", "reject", "gmpo", "cfpo", "sapo", "vespo", "topr", "unclipped", "reinforce"]

# Levels made of token log-ratios that are clamped before they are summed.
_PREFIX_LEVELS = ("cumulative", "cumulative_mean", "window", "forward", "lookahead", "min_prefix")

# Forms whose surrogate is weight x A log pi, the weight held constant: no limit of a ratio can take the gradient of
# log pi away.
_DETACHED_FORMS = ("cispo", "vespo", "topr", "reinforce")

_WINDOWS: tuple[type, ...] = (RatioClip, PositionClip, CalibratedClip)
# What `clip` may be; None for the forms that are not here.
_CLIPS: dict[str, tuple[type, ...]] = {
    "ppo": _WINDOWS,
    "gppo": _WINDOWS,
    "cispo": _WINDOWS,
    "reject": _WINDOWS,
    "gmpo": _WINDOWS,
    "cfpo": (RatioClip, PositionClip, ProbabilityShift),
    "sapo": (SigmoidGate,),
    "vespo": (GammaWeight,),
}
_LEVELS: dict[str, tuple[str, ...]] = {
    "gmpo": ("sequence_mean", "turn_mean", "cumulative_mean"),
    "reinforce": ("token",),
}


class Coefficients(NamedTuple):
    """What an estimator gives for every token, each of shape (..., T); 0 or False where masked.

    Attributes:
        value: Value of the maximized surrogate, the advantage included.
        weight: c_t; the gradient of the maximized objective is the sum of weight x advantage x grad log pi.
        clipped_low: The lower bound acted.
        clipped_high: The upper bound acted.
        clipped_dual: The dual bound acted (negative advantages only).
        saturated: One of the two numerical limits acted.
        rejected: The trust region took the token away; weight and value are 0.
    """

    value: Array
    weight: Array
    clipped_low: Array
    clipped_high: Array
    clipped_dual: Array
    saturated: Array
    rejected: Array


class Evaluation(NamedTuple):
    """`Coefficients` and what they were made of, arrays of (or that broadcast against) the shape (..., T).

    Attributes:
        coefficients: The result.
        token_log_ratio: d_t, nats, 0 where masked.
        log_ratio: At the estimator's level, before `max_log_ratio`, window and form; 0 where masked.
        applied_log_ratio: After them: the logarithm of the ratio in the surrogate's value, or of w in the forms "cfpo"
            and "sapo", whose value has more of it; 0 where masked.
        advantages: As used, one per token or (..., 1).
        position: t, in the working dtype; at least 1 everywhere.
        totals: Those of `token_log_ratio`, which has no limit, over all time shards; None without any.
        tokens_limited: Whether `max_token_log_ratio` may have acted on `log_ratio`; False only if it is known not to.
    """

    coefficients: Coefficients
    token_log_ratio: Array
    log_ratio: Array
    applied_log_ratio: Array
    advantages: Array
    position: Array
    totals: Totals | None
    tokens_limited: bool


@dataclass(frozen=True)
class Estimator:
    r"""A policy-gradient estimator: ratio level, clip window and the form that makes them a coefficient.

    With w the importance ratio at `level` and [lo, hi] the window of `clip`, the coefficient c of a token
    with advantage A, and the surrogate's value, are

    * "ppo": c = w, value = w A, but c = 0 and value = hi A if A > 0 and w > hi; c = 0 and value = lo A if A <
      0 and w < lo; and, with a dual bound du, c = 0 and value = du A if A < 0 and w > du. At a bound, or with
      A = 0, a token is kept. Without dual bound the value is min(w A, clip(w, lo, hi) A).
    * "gppo": as "ppo", but a bound that acts is the coefficient instead of 0.
    * "cispo": c = w moved into [lo, hi], value = c A log pi. No gate.
    * "reject": c = w, value = w A, but both 0 outside of [lo, hi], whatever the sign of A.
    * "gmpo": the window moves the ratios of single tokens, on the side of "ppo", before w is their geometric mean.
      c = w, value = w A, but c = 0 for a token that has been moved.
    * "cfpo": with the bound u = hi if A > 0, lo if A < 0: value = A (w - (w - 1)^2 / (2 (u - 1))) and
      c = w (1 - (w - 1) / (u - 1)), which is 0 at the bound and beyond it draws the ratio back.
    * "sapo": value = f(w) A, c = w f'(w) with the f of `SigmoidGate`.
    * "vespo": c = phi(w) of `GammaWeight`, value = c A log pi.
    * "topr": c = 1 if A >= 0, else min(w, 1), value = c A log pi.
    * "unclipped": c = w, value = w A.
    * "reinforce": c = 1, value = A log pi.

    Comparisons are made between logarithms.

    Args:
        level: Ratio level, see `ctpo.ratios`.
        clip: Window of the forms "ppo", "gppo", "cispo", "reject" and "gmpo"; for "cfpo" a `RatioClip`, a
            `PositionClip` without drift or a `ProbabilityShift` (at the level "token"); `SigmoidGate` for "sapo";
            `GammaWeight` for "vespo"; None for the other forms. Only "ppo" and "gppo" take a dual bound.
        form: One of the above; "gmpo" needs the level "sequence_mean", "turn_mean" or "cumulative_mean".
        window: Number of tokens of the levels "window", "forward" and "lookahead", None at every other level.
        max_log_ratio: Numerical limit at every level but "token": a log-ratio above it is cut to it and the
            token gets weight 0. None for no limit.
        max_token_log_ratio: Numerical limit of one token's log-ratio, which is clamped to +- this value
            before it enters a sum, at the levels "cumulative", "cumulative_mean", "window", "forward",
            "lookahead" and "min_prefix"; no token loses its weight by that. At the level "token" a token
            outside gets weight 0. The levels of whole sequences and turns sum unclamped log-ratios. None for no
            limit.
        region: Trust region that takes further tokens away, see `ctpo.regions`; None for none.

    In the forms "cispo", "vespo" and "topr" the limits cut log-ratios but take no weight away: their ratio is a
    constant, which no gradient goes through. Only a token of probability 0 under the target policy has weight 0.

    The numerical limits are those of the released code of arXiv:2605.07331; `Coefficients.saturated` marks
    where they act, a clamped token at its own position. They have no part in the form "reinforce".

    Raises:
        ValueError: A field is out of its range, or the fields do not go together.

    Example:
        >>> dapo = Estimator(level="token", clip=RatioClip(0.2, 0.28))
        >>> dapo.form, dapo.max_log_ratio
        ('ppo', 10.0)
    """

    level: Level
    clip: Clip | Gate | None = None
    form: Form = "ppo"
    window: int | None = None
    max_log_ratio: float | None = 10.0
    max_token_log_ratio: float | None = 20.0
    region: Region | None = None

    def __post_init__(self) -> None:
        check_level(self.level, self.window)
        one_of("form", self.form, get_args(Form))
        self._check_clip()
        if not (self.region is None or isinstance(self.region, Region)):
            raise ValueError(f"region must be one of the classes of ctpo.regions, or None; got {self.region!r}")
        if self.form in _LEVELS:
            one_of(f"level (for the form {self.form!r})", self.level, _LEVELS[self.form])
        if self.window is not None:
            object.__setattr__(self, "window", int(self.window))
        for name in ("max_log_ratio", "max_token_log_ratio"):
            value, allowed = getattr(self, name), "a positive finite number, or None"
            if value is not None:
                number = real_number("Estimator", name, value, allowed)
                if not 0 < number < math.inf:
                    raise ValueError(f"Estimator: {name} must be {allowed}; got {value!r}")
                object.__setattr__(self, name, number)

    def _check_clip(self) -> None:
        """Raise unless `clip` is what the form needs."""
        clip, allowed = self.clip, _CLIPS.get(self.form, (type(None),))
        if not isinstance(clip, allowed):
            need = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
            raise ValueError(f"clip must be {need} for the form {self.form!r}; got {clip!r}")
        if self.form not in ("ppo", "gppo") and getattr(clip, "dual", None) is not None:
            raise ValueError(f"clip must have dual=None for the form {self.form!r}; got {clip!r}")
        if self.form == "cfpo" and getattr(clip, "drift", 0.0) != 0:
            raise ValueError(f"clip must have drift=0 for the form 'cfpo', whose bounds enclose 1; got {clip!r}")
        if isinstance(clip, ProbabilityShift) and self.level != "token":
            raise ValueError(f"clip must be a RatioClip or PositionClip at level {self.level!r}; got {clip!r}")

    def coefficients(
        self,
        logp: Array,
        behavior_logp: Array,
        advantages: Array,
        mask: Array | None = None,
        *,
        turn_ids: Array | None = None,
    ) -> Coefficients:
        """Coefficient, surrogate value and clip flags of every token.

        Args:
            logp: Log-probabilities of the sampled tokens under the target policy, nats, shape (..., T),
                detached.
            behavior_logp: The same under the behavior policy; finite at policy tokens.
            advantages: Shape (...,), one per sequence, or (..., T). Real numbers, finite at policy tokens.
            mask: bool, shape (..., T), True at policy tokens; None for all. What stands at masked places (or
                the advantage of a sequence without policy tokens) never matters.
            turn_ids: Integers, shape (..., T), for the levels "turn" and "turn_mean" only.

        Returns:
            `Coefficients` in the widest floating dtype of the inputs, float32 at least.

        Raises:
            ValueError: Shapes or dtypes do not fit, or (arrays in CPU memory) a value at a policy token is
                NaN, or infinite where it must not be.

        Example:
            >>> import numpy as np
            >>> logp, behavior_logp = np.log([[0.6, 0.9, 0.5]]), np.log([[0.5, 0.9, 0.25]])
            >>> estimator = Estimator("cumulative", RatioClip(0.5, 4.0))
            >>> found = estimator.coefficients(logp, behavior_logp, np.array([1.0]))
            >>> found.weight.round(4), found.clipped_high
            (array([[1.2, 1.2, 2.4]]), array([[False, False, False]]))
        """
        return self.evaluate(logp, behavior_logp, advantages, mask, turn_ids=turn_ids).coefficients

    def evaluate(
        self,
        logp: Array,
        behavior_logp: Array,
        advantages: Array,
        mask: Array | None = None,
        *,
        turn_ids: Array | None = None,
        shards: TimeShards | None = None,
        validate: bool | None = None,
    ) -> Evaluation:
        """`coefficients`, together with the ratios that they are made of.

        Args:
            logp: As the other arguments not named here, as in `coefficients`.
            behavior_logp: See there.
            advantages: See there.
            mask: See there.
            turn_ids: See there.
            shards: Access to the rest of the sequences if their time axis is split over processes; only for an
                estimator with `scans_time`.
            validate: Whether to look at values: always, never, or (None) where that is free.

        Returns:
            `Evaluation`.

        Raises:
            ValueError: As `coefficients`, or `shards` is given to an estimator that cannot take it.
        """
        check_turn_ids(self.level, turn_ids)
        if shards is not None and not self.scans_time:
            raise ValueError(f"shards must be None for an estimator that has to see whole sequences; got it for {self}")
        xp, logp, tokens, behavior_logp = token_log_ratio(
            logp, behavior_logp, mask, turn_ids=turn_ids, validate=validate, advantages=advantages
        )
        advantages = _advantages_by_token(xp, advantages, tokens, mask, validate)
        false = xp.zeros_like(tokens, dtype=xp.bool)
        # What no token exceeds needs no flags, if that is free to know.
        look = validate is not False and has_readable_values(tokens) and 0 not in tokens.shape
        limited, saturated, gated = self._limit_tokens(xp, tokens, look)
        totals = raw_totals = None
        if shards is not None:
            totals, raw_totals = shard_totals(xp, mask, shards, limited, tokens)
        position = bounded_positions(xp, tokens, mask, totals)
        log_ratio = at_level(xp, limited, mask, self.level, window=self.window, turn_ids=turn_ids, totals=totals)
        low = high = dual = rejected = false
        applied = log_ratio
        if self.form == "gmpo":
            low, high, _, moved = self._move_into_window(xp, limited, advantages, position)
            gated = gated | low | high
            applied = at_level(xp, only_where(xp, mask, moved), mask, self.level, turn_ids=turn_ids)
        limit = None if self.level == "token" else self.max_log_ratio
        if limit is not None and not (look and float(xp.max(applied)) <= limit):
            beyond = applied > limit
            applied = xp.clip(applied, max=limit)
            gated, saturated = gated | beyond, saturated | beyond
        if self.form == "reinforce":
            applied, gated, saturated = xp.zeros_like(tokens), false, false
        elif self.form in _DETACHED_FORMS:
            gated = logp == -math.inf  # a cut ratio is no longer 0 there, and log pi has no gradient
        if self.form in ("ppo", "gppo", "cispo", "reject"):
            low, high, dual, moved = self._move_into_window(xp, applied, advantages, position)
            if self.form in ("ppo", "reject"):
                gated = gated | low | high | dual
            if self.form != "reject":
                # 0 lies in every window that has not drifted away.
                applied = only_where(xp, mask, moved) if self._drifts else moved
        if self.form in ("cfpo", "sapo"):
            weight, factor, low, high = self._smooth(xp, applied, advantages, behavior_logp, position)
        else:
            if self.form == "vespo":
                applied = self._log_gamma_weight(xp, applied, advantages)
            elif self.form == "topr":
                high = (applied > 0) & (advantages < 0)
                applied = xp.where(high | (advantages >= 0), 0.0, applied)
            weight = factor = xp.exp(applied)
        if self.form == "reject":
            factor = xp.where(low | high, 0.0, factor)
        if self.region is not None and 0 not in tokens.shape:
            policies = (only_where(xp, mask, logp), only_where(xp, mask, behavior_logp))
            rejected = self.region.rejects(xp, Moves(*policies, tokens, advantages, mask, position))
            gated, factor = gated | rejected, xp.where(rejected, 0.0, factor)
        weight = xp.where(gated if mask is None else gated | ~mask, 0.0, weight)
        # 0 times anything is 0 here, also times a ratio that has overflowed and times log 0.
        if self.form in _DETACHED_FORMS:
            scale = weight * advantages
            value = scale * xp.where(scale == 0, 0.0, logp)
        else:
            if not self.bounded:
                factor = xp.where(advantages == 0, 0.0, factor)
            value = only_where(xp, mask, factor) * advantages
        # Combining with False makes separate arrays, also of flags that nothing has set.
        flags = (flag | false if mask is None else flag & mask for flag in (low, high, dual, saturated, rejected))
        found = Coefficients(value, weight, *flags)
        return Evaluation(found, tokens, log_ratio, applied, advantages, position, raw_totals, limited is not tokens)

    @property
    def scans_time(self) -> bool:
        """Whether totals per sequence are all that a shard of the time axis needs to know of the others."""
        scanned = self.level in SCANNED_LEVELS and self.form != "gmpo"
        return scanned and (self.region is None or self.region.scope == "token")

    @property
    def _drifts(self) -> bool:
        return getattr(self.clip, "drift", 0.0) != 0

    @property
    def bounded(self) -> bool:
        """Whether the limits keep every ratio, and its square, within the range of float32."""
        limit = self.max_token_log_ratio if self.level == "token" else self.max_log_ratio
        return limit is not None and limit < 40

    def _limit_tokens(self, xp: Namespace, tokens: Array, look: bool) -> tuple[Array, Array, Array]:
        """Token log-ratios within `max_token_log_ratio`, where it acted, and where it takes the weight away."""
        limit, none = self.max_token_log_ratio, xp.zeros_like(tokens, dtype=xp.bool)
        if limit is None or self.level not in ("token", *_PREFIX_LEVELS):
            return tokens, none, none
        if look and float(xp.max(tokens)) <= limit and float(xp.min(tokens)) >= -limit:
            return tokens, none, none
        acted = abs(tokens) > limit
        return xp.clip(tokens, min=-limit, max=limit), acted, acted if self.level == "token" else none

    def _move_into_window(
        self, xp: Namespace, log_ratio: Array, advantages: Array, position: Array
    ) -> tuple[Array, Array, Array, Array]:
        """Where the lower, upper and dual bounds act, and the log-ratios that they leave."""
        assert isinstance(self.clip, Clip)
        scales, positive, negative = self.clip.scales(position), advantages > 0, advantages < 0
        lower: Array | float = scales.low
        upper: Array | float = scales.high
        if self.form not in ("cispo", "reject"):
            # A scale for each sign of A, most often one per sequence: cheaper than a choice among bounds at each token.
            lower = either(xp, negative, scales.low, -math.inf, log_ratio)
            upper = either(xp, positive, scales.high, math.inf, log_ratio)
            if scales.dual is not None:
                upper = xp.where(negative, scales.dual, upper)
        lower, upper = scales.bound(lower), scales.bound(upper)
        low, high = log_ratio < lower, log_ratio > upper
        dual = xp.zeros_like(low)
        if scales.dual is not None:
            dual = high & negative
            high = high ^ dual  # the upper bound of A = 0 is inf
        return low, high, dual, xp.clip(log_ratio, min=lower, max=upper)

    def _smooth(
        self, xp: Namespace, log_ratio: Array, advantages: Array, behavior_logp: Array, position: Array
    ) -> tuple[Array, Array, Array, Array]:
        """Forms "cfpo" and "sapo": coefficient, the value's factor of A, and where a bound is passed."""
        ratio, change = xp.exp(log_ratio), xp.expm1(log_ratio)
        if isinstance(self.clip, SigmoidGate):
            rate = either(xp, advantages > 0, self.clip.positive, self.clip.negative, change)
            # 4 sigma (1 - sigma) = 1 - tanh^2 of half the argument; where it is 0 the ratio may have overflowed.
            half = xp.tanh(0.5 * rate * change)
            slope = (1.0 - half) * (1.0 + half)
            never = xp.zeros_like(log_ratio, dtype=xp.bool)
            return xp.where(slope == 0, 0.0, ratio) * slope, 2.0 / rate * (1.0 + half), never, never
        # One over the bound's distance from 1, with its sign.
        if isinstance(self.clip, ProbabilityShift):
            q = xp.exp(behavior_logp)
            above, below = q / self.clip.high, -q / self.clip.low
        else:
            assert isinstance(self.clip, Clip)
            log_low, log_high, _ = self.clip.bounds(position)
            above, below = 1.0 / xp.expm1(log_high), 1.0 / xp.expm1(log_low)
        steepness = xp.where(advantages > 0, above, xp.where(advantages < 0, below, 0.0))
        share = change * steepness  # of the way to the bound
        passed = share > 1
        factor = 1.0 + change * (1.0 - 0.5 * share)
        return ratio * (1.0 - share), factor, passed & (advantages < 0), passed & (advantages > 0)

    def _log_gamma_weight(self, xp: Namespace, log_ratio: Array, advantages: Array) -> Array:
        """Logarithm of the weight of the form "vespo"."""
        gate = self.clip
        assert isinstance(gate, GammaWeight)
        negative = advantages < 0
        power = either(xp, negative, gate.negative_power, gate.positive_power, log_ratio)
        rate = either(xp, negative, gate.negative_rate, gate.positive_rate, log_ratio)
        return power * log_ratio - rate * xp.expm1(log_ratio)


def _advantages_by_token(
    xp: Namespace, advantages: Array, tokens: Array, mask: Array | None, validate: bool | None
) -> Array:
    """Checked advantages in the dtype of `tokens`, of a shape that broadcasts against it, 0 where masked."""
    check_numeric(xp, advantages=advantages)
    by_token = check_sequence_or_token("advantages", advantages, tuple(tokens.shape))
    advantages = xp.astype(advantages, tokens.dtype, copy=False)
    if by_token:
        advantages = only_where(xp, mask, advantages)
        check_finite(xp, "advantages", advantages, mask, where="at every policy token", validate=validate)
        return advantages
    # Bytes, whose maximum is found faster than whether any is True.
    acting = mask
    if mask is not None:
        acting = xp.max(xp.astype(mask, xp.uint8), axis=-1) > 0 if mask.shape[-1] else xp.any(mask, axis=-1)
    advantages = only_where(xp, acting, advantages)
    where = "in every sequence with a policy token"
    check_finite(xp, "advantages", advantages, acting, where=where, validate=validate)
    return advantages[..., None]
