r"""Policy-gradient estimators as detached coefficients, and the registry of those that have a name.

The gradient of almost every policy-gradient surrogate in use is :math:`\sum_t c_t A_t \nabla\log\pi(a_t|s_t)`
with a coefficient :math:`c_t` = gate x weight that is held constant. An `Estimator` computes :math:`c_t`, and
the surrogate's value, from log-probabilities alone: no automatic differentiation, any array API library.

===========  ==================  ==============================================  ==========================
name         weight              window, form                                    source
===========  ==================  ==============================================  ==========================
reinforce    1                   none                                            Williams (1992)
grpo         r_t                 [0.8, 1.2], ppo                                 arXiv:2402.03300
dapo         r_t                 [0.8, 1.28], ppo                                arXiv:2503.14476
gspo         rho_H^(1/H)         [1 - 3e-4, 1 + 4e-4], ppo                       arXiv:2507.18071
cispo        r_t                 [0, 5], cispo                                   arXiv:2506.13585
sequence     rho_H               none, no numerical limit                        importance sampling
ctpo         rho_t               exp(-.025 t^.5), exp(.05 t^.5), dual, ppo       arXiv:2605.07331 (code)
ctpo_fixed   rho_t               [0.5, 5], ppo                                   arXiv:2605.07331 (Table 3)
ctpo_mean    rho_t^(1/t)         exp(-.025 t^-.5), exp(.05 t^-.5), dual, ppo     arXiv:2608.01418 (PNPO)
minpro       r_t min_{k<t} r_k   [0.8, 1.2], ppo                                 arXiv:2601.22718
lookahead    rho_min(t+16, H)    none, no numerical limit                        16 tokens past t
===========  ==================  ==============================================  ==========================

r_t, rho_t and rho_H are the token, cumulative and sequence ratios of `ctpo.ratios`. The gates of "ctpo_mean"
are those of "ctpo" exactly: dividing log-ratio and window by t changes no comparison, only the weight. The
weight of "lookahead" lies between "ctpo" without a window (0 tokens ahead) and "sequence" (all of them): with
an outcome reward its expectation uses the action value of following the target policy for 16 more tokens and
the behavior policy after.

What is unbiased: with a fixed target policy, without gates and limits, rho_t A_t has the target policy's
expectation if A_t depends on tokens 1..t only (an exact advantage does, an outcome reward does not); rho_H
A_t has it always. Token ratio, length-normalized ratios and every gate are biased.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

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
from ctpo.clipping import Clip, PositionClip, RatioClip
from ctpo.ratios import Level, at_level, bounded_positions, check_level, check_turn_ids, token_log_ratio

__all__ = ["ESTIMATORS", "Coefficients", "Estimator", "Form", "get_estimator"]

Form = Literal["ppo", "cispo", "unclipped", "reinforce"]

# Levels made of token log-ratios that are clamped before they are summed.
_PREFIX_LEVELS = ("cumulative", "cumulative_mean", "window", "lookahead", "min_prefix")


class Coefficients(NamedTuple):
    """What an estimator gives for every token, each of shape (..., T); 0 or False where masked.

    Attributes:
        value: Value of the maximized surrogate, the advantage included.
        weight: c_t; the gradient of the maximized objective is the sum of weight x advantage x grad log pi.
        clipped_low: The lower bound acted.
        clipped_high: The upper bound acted.
        clipped_dual: The dual bound acted (negative advantages only).
        saturated: One of the two numerical limits acted.
    """

    value: Array
    weight: Array
    clipped_low: Array
    clipped_high: Array
    clipped_dual: Array
    saturated: Array


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

    The numerical limits are those of the released code of arXiv:2605.07331; `Coefficients.saturated` marks
    where they act, a clamped token at its own position. They have no part in the form "reinforce".

    Raises:
        ValueError: A field is out of its range, or the fields do not go together.

    Example:
        >>> dapo = Estimator(level="token", clip=RatioClip(0.2, 0.28))
        >>> dapo == ESTIMATORS["dapo"], dapo.form, dapo.max_log_ratio
        (True, 'ppo', 10.0)
    """

    level: Level
    clip: Clip | None = None
    form: Form = "ppo"
    window: int | None = None
    max_log_ratio: float | None = 10.0
    max_token_log_ratio: float | None = 20.0

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
            >>> found = get_estimator("ctpo_fixed").coefficients(logp, behavior_logp, np.array([1.0]))
            >>> found.weight.round(4), found.clipped_high
            (array([[1.2, 1.2, 2.4]]), array([[False, False, False]]))
        """
        check_turn_ids(self.level, turn_ids)
        xp, logp, tokens = token_log_ratio(logp, behavior_logp, mask, turn_ids=turn_ids, advantages=advantages)
        advantages = _advantages_by_token(xp, advantages, tokens, mask)
        false = xp.zeros_like(tokens, dtype=xp.bool)
        gated = saturated = low = high = dual = false
        log_weight = xp.zeros_like(tokens)
        if self.form != "reinforce":
            log_weight, gated, saturated = self._limited_log_ratio(xp, tokens, mask, turn_ids)
        if self.clip is not None:
            log_low, log_high, log_dual = self.clip.bounds(bounded_positions(xp, tokens, mask))
            low, high = log_weight < log_low, log_weight > log_high
            if self.form == "ppo":
                low, high = low & (advantages < 0), high & (advantages > 0)
                if log_dual is not None:
                    dual = (log_weight > log_dual) & (advantages < 0)
                gated = gated | low | high | dual
            log_weight = xp.where(low, log_low, xp.where(high, log_high, log_weight))
            if log_dual is not None:
                log_weight = xp.where(dual, log_dual, log_weight)
        ratio = xp.exp(log_weight)
        weight = xp.where(gated if mask is None else gated | ~mask, 0.0, ratio)
        # 0 times anything is 0 here, also times a ratio that has overflowed and times log 0.
        if self.form in ("cispo", "reinforce"):
            scale = weight * advantages
            value = scale * xp.where(scale == 0, 0.0, logp)
        else:
            counted = advantages != 0
            value = xp.where(counted if mask is None else counted & mask, ratio, 0.0) * advantages
        # Combining with False makes four arrays, also of flags that nothing has set.
        flags = (flag | false if mask is None else flag & mask for flag in (low, high, dual, saturated))
        return Coefficients(value, weight, *flags)

    def _limited_log_ratio(
        self, xp: Namespace, tokens: Array, mask: Array | None, turn_ids: Array | None
    ) -> tuple[Array, Array, Array]:
        """Log-ratio within the numerical limits, where they take the weight away, and where they acted."""
        gated = saturated = xp.zeros_like(tokens, dtype=xp.bool)
        limit = self.max_token_log_ratio
        if limit is not None and self.level in ("token", *_PREFIX_LEVELS):
            saturated = abs(tokens) > limit
            tokens = xp.clip(tokens, min=-limit, max=limit)
            if self.level == "token":
                gated = saturated
        log_weight = at_level(xp, tokens, mask, self.level, window=self.window, turn_ids=turn_ids)
        limit = self.max_log_ratio
        if limit is not None and self.level != "token":
            gated = log_weight > limit
            log_weight = xp.clip(log_weight, max=limit)
            saturated = saturated | gated
        return log_weight, gated, saturated


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


_RELEASED_CLIP = PositionClip(low=0.025, high=0.05, power=0.5, dual=0.05)

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        "reinforce": Estimator("token", form="reinforce"),
        "grpo": Estimator("token", RatioClip(0.2, 0.2)),
        "dapo": Estimator("token", RatioClip(0.2, 0.28)),
        "gspo": Estimator("sequence_mean", RatioClip(3e-4, 4e-4)),
        "cispo": Estimator("token", RatioClip(1.0, 4.0), form="cispo"),
        "sequence": Estimator("sequence", form="unclipped", max_log_ratio=None, max_token_log_ratio=None),
        "ctpo": Estimator("cumulative", _RELEASED_CLIP),
        "ctpo_fixed": Estimator("cumulative", RatioClip(0.5, 4.0)),
        "ctpo_mean": Estimator("cumulative_mean", replace(_RELEASED_CLIP, power=-0.5)),
        "minpro": Estimator("min_prefix", RatioClip(0.2, 0.2)),
        "lookahead": Estimator("lookahead", form="unclipped", window=16, max_log_ratio=None, max_token_log_ratio=None),
    }
)
"""The named estimators of the table at the top of this module; read-only."""


def get_estimator(estimator: str | Estimator, **changes: Any) -> Estimator:
    """A named estimator, or a given one, with some fields changed.

    Args:
        estimator: A name in `ESTIMATORS`, or an `Estimator`.
        **changes: New values of its fields.

    Returns:
        The estimator.

    Raises:
        ValueError: The name or a field is unknown, or the changed fields do not go together.

    Example:
        >>> get_estimator("ctpo", clip=PositionClip(dual=None)).clip  # the formula as printed in the paper
        PositionClip(low=0.025, high=0.05, power=0.5, dual=None, drift=0.0)
    """
    if not isinstance(estimator, Estimator):
        one_of("estimator", estimator, ESTIMATORS)
        estimator = ESTIMATORS[estimator]
    allowed = [field.name for field in fields(Estimator)]
    for name in changes:
        one_of("changes", name, allowed)
    return replace(estimator, **changes)
