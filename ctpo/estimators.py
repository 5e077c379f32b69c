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
    one_of,
    only_where,
    real_number,
)
from ctpo.clipping import Clip
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

Form = Literal["ppo", "cispo", "unclipped", "reinforce"]

# Levels made of token log-ratios that are clamped before they are summed.
_PREFIX_LEVELS = ("cumulative", "cumulative_mean", "window", "lookahead", "min_prefix")

# Forms whose surrogate holds the ratio constant: no limit of its value can take the gradient of log pi away.
_DETACHED_FORMS = ("cispo",)


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
        applied_log_ratio: After them: the logarithm of the ratio in the surrogate's value. Anything where masked.
        advantages: As used, one per token or (..., 1).
        position: t, in the working dtype; at least 1 everywhere.
        totals: Those of `token_log_ratio`, which has no limit, over all time shards; None without any.
    """

    coefficients: Coefficients
    token_log_ratio: Array
    log_ratio: Array
    applied_log_ratio: Array
    advantages: Array
    position: Array
    totals: Totals | None


@dataclass(frozen=True)
class Estimator:
    r"""A policy-gradient estimator: ratio level, clip window and the form that makes them a coefficient.

    With w the importance ratio at `level` and [lo, hi] the window of `clip`, the coefficient c of a token
    with advantage A, and the surrogate's value, are

    * "ppo": c = w, value = w A, but c = 0 and value = hi A if A > 0 and w > hi; c = 0 and value = lo A if A <
      0 and w < lo; and, with a dual bound du, c = 0 and value = du A if A < 0 and w > du. At a bound, or with
      A = 0, a token is kept. Without dual bound the value is min(w A, clip(w, lo, hi) A).
    * "cispo": c = w moved into [lo, hi], value = c A log pi. No gate.
    * "unclipped": c = w, value = w A.
    * "reinforce": c = 1, value = A log pi.

    Comparisons are made between logarithms.

    Args:
        level: Ratio level, see `ctpo.ratios`.
        clip: Window; needed by "ppo" and "cispo" (there without dual bound), None for the other forms.
        form: One of the above.
        window: Number of tokens of the levels "window" and "lookahead", None at every other level.
        max_log_ratio: Numerical limit at every level but "token": a log-ratio above it is cut to it and the
            token gets weight 0. None for no limit.
        max_token_log_ratio: Numerical limit of one token's log-ratio, which is clamped to +- this value
            before it enters a sum, at the levels "cumulative", "cumulative_mean", "window", "lookahead" and
            "min_prefix"; no token loses its weight by that. At the level "token" a token outside gets weight
            0. The levels of whole sequences and turns sum unclamped log-ratios. None for no limit.
        region: Trust region that takes further tokens away, see `ctpo.regions`; None for none.

    In the form "cispo" the limits cut log-ratios but take no weight away: its ratio is a constant, which no gradient
    goes through.

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
    clip: Clip | None = None
    form: Form = "ppo"
    window: int | None = None
    max_log_ratio: float | None = 10.0
    max_token_log_ratio: float | None = 20.0
    region: Region | None = None

    def __post_init__(self) -> None:
        check_level(self.level, self.window)
        one_of("form", self.form, get_args(Form))
        if not (self.clip is None or isinstance(self.clip, Clip)):
            raise ValueError(f"clip must be a RatioClip, a PositionClip, a CalibratedClip or None; got {self.clip!r}")
        if (self.clip is None) == (self.form in ("ppo", "cispo")):
            need = "a RatioClip, PositionClip or CalibratedClip" if self.clip is None else "None"
            raise ValueError(f"clip must be {need} for the form {self.form!r}; got {self.clip!r}")
        if self.form == "cispo" and self.clip is not None and self.clip.dual is not None:
            raise ValueError(f"clip must have dual=None for the form 'cispo'; got {self.clip!r}")
        if not (self.region is None or isinstance(self.region, Region)):
            raise ValueError(f"region must be one of the classes of ctpo.regions, or None; got {self.region!r}")
        if self.form == "reinforce" and self.level != "token":
            raise ValueError(f"level must be 'token' for the form 'reinforce'; got {self.level!r}")
        if self.window is not None:
            object.__setattr__(self, "window", int(self.window))
        for name in ("max_log_ratio", "max_token_log_ratio"):
            value, allowed = getattr(self, name), "a positive finite number, or None"
            if value is not None:
                number = real_number("Estimator", name, value, allowed)
                if not 0 < number < math.inf:
                    raise ValueError(f"Estimator: {name} must be {allowed}; got {value!r}")
                object.__setattr__(self, name, number)

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

        Returns:
            `Evaluation`.

        Raises:
            ValueError: As `coefficients`, or `shards` is given to an estimator that cannot take it.
        """
        check_turn_ids(self.level, turn_ids)
        if shards is not None and not self.scans_time:
            raise ValueError(f"shards must be None for an estimator that has to see whole sequences; got it for {self}")
        xp, logp, tokens, behavior_logp = token_log_ratio(
            logp, behavior_logp, mask, turn_ids=turn_ids, advantages=advantages
        )
        advantages = _advantages_by_token(xp, advantages, tokens, mask)
        false = xp.zeros_like(tokens, dtype=xp.bool)
        limited, saturated, gated = self._limit_tokens(xp, tokens)
        totals = raw_totals = None
        if shards is not None:
            totals, raw_totals = shard_totals(xp, mask, shards, limited, tokens)
        position = bounded_positions(xp, tokens, mask, totals)
        log_ratio = at_level(xp, limited, mask, self.level, window=self.window, turn_ids=turn_ids, totals=totals)
        low = high = dual = false
        applied = log_ratio
        if self.max_log_ratio is not None and self.level != "token":
            beyond = log_ratio > self.max_log_ratio
            applied = xp.clip(log_ratio, max=self.max_log_ratio)
            gated, saturated = gated | beyond, saturated | beyond
        if self.form == "reinforce":
            applied, gated, saturated = xp.zeros_like(tokens), false, false
        elif self.form in _DETACHED_FORMS:
            gated = false
        if self.clip is not None:
            log_low, log_high, log_dual = self.clip.bounds(position)
            low, high = applied < log_low, applied > log_high
            if self.form == "ppo":
                low, high = low & (advantages < 0), high & (advantages > 0)
                if log_dual is not None:
                    dual = (applied > log_dual) & (advantages < 0)
                gated = gated | low | high | dual
            applied = xp.where(low, log_low, xp.where(high, log_high, applied))
            if log_dual is not None:
                applied = xp.where(dual, log_dual, applied)
        ratio = xp.exp(applied)
        rejected = false
        if self.region is not None:
            rejected = self.region.rejects(xp, Moves(logp, behavior_logp, tokens, advantages, mask, position))
            ratio = xp.where(rejected, 0.0, ratio)
        weight = xp.where(gated if mask is None else gated | ~mask, 0.0, ratio)
        # 0 times anything is 0 here, also times a ratio that has overflowed and times log 0.
        if self.form in ("cispo", "reinforce"):
            scale = weight * advantages
            value = scale * xp.where(scale == 0, 0.0, logp)
        else:
            counted = advantages != 0
            value = xp.where(counted if mask is None else counted & mask, ratio, 0.0) * advantages
        # Combining with False makes separate arrays, also of flags that nothing has set.
        flags = (flag | false if mask is None else flag & mask for flag in (low, high, dual, saturated, rejected))
        found = Coefficients(value, weight, *flags)
        return Evaluation(found, tokens, log_ratio, applied, advantages, position, raw_totals)

    @property
    def scans_time(self) -> bool:
        """Whether totals per sequence are all that a shard of the time axis needs to know of the others."""
        return self.level in SCANNED_LEVELS and (self.region is None or self.region.scope == "token")

    def _limit_tokens(self, xp: Namespace, tokens: Array) -> tuple[Array, Array, Array]:
        """Token log-ratios within `max_token_log_ratio`, where it acted, and where it takes the weight away."""
        limit, none = self.max_token_log_ratio, xp.zeros_like(tokens, dtype=xp.bool)
        if limit is None or self.level not in ("token", *_PREFIX_LEVELS):
            return tokens, none, none
        acted = abs(tokens) > limit
        return xp.clip(tokens, min=-limit, max=limit), acted, acted if self.level == "token" else none


def _advantages_by_token(xp: Namespace, advantages: Array, tokens: Array, mask: Array | None) -> Array:
    """Checked advantages in the dtype of `tokens`, of a shape that broadcasts against it, 0 where masked."""
    check_numeric(xp, advantages=advantages)
    by_token = check_sequence_or_token("advantages", advantages, tuple(tokens.shape))
    advantages = xp.astype(advantages, tokens.dtype, copy=False)
    if by_token:
        advantages = only_where(xp, mask, advantages)
        check_finite(xp, "advantages", advantages, mask, where="at every policy token")
        return advantages
    acting = None if mask is None else xp.any(mask, axis=-1)
    advantages = only_where(xp, acting, advantages)
    check_finite(xp, "advantages", advantages, acting, where="in every sequence with a policy token")
    return advantages[..., None]
