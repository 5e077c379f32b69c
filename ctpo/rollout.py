r"""Importance weights that correct for a rollout engine whose probabilities are not those of the trainer.

Three policies take part in one update: the rollout engine sampled from :math:`\mu`; the trainer gives the old weights
the probabilities :math:`\pi_\mathrm{old}` (the proximal policy); :math:`\pi` is being trained. An importance ratio
:math:`\pi/\pi_\mathrm{old}` leaves the step from :math:`\mu` to :math:`\pi_\mathrm{old}` uncorrected, which low
precision, other kernels, changed sampling or an engine with older weights make. `rollout_correction` gives the weight
for that step, bounded in one of the ways in use.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

from ctpo._arrays import Array, Namespace, device, is_tensor, one_of, only_where, real_number
from ctpo.ratios import Level, at_level, bounded_positions, check_level, check_turn_ids, token_log_ratio

__all__ = ["Mode", "RolloutCorrection", "rollout_correction"]

Mode = Literal["truncate", "mask", "reject"]


class RolloutCorrection(NamedTuple):
    """Weights and what they did.

    Attributes:
        weights: Factor for every token's term of the loss, shape (..., T), 0 where masked.
        kept: bool, shape (..., T): policy tokens that mode "mask" or "reject" has left. Mode "truncate" leaves all.
        metrics: Statistics by name, each an array of shape (), see `rollout_correction`.
    """

    weights: Array
    kept: Array
    metrics: dict[str, Array]


def rollout_correction(
    proximal_logp: Array,
    behavior_logp: Array,
    mask: Array | None = None,
    *,
    level: Level = "token",
    mode: Mode = "truncate",
    low: float | None = None,
    high: float | None = 2.0,
    window: int | None = None,
    turn_ids: Array | None = None,
) -> RolloutCorrection:
    r"""Bounded importance weights of the old policy over the rollout engine's.

    With w the ratio of `proximal_logp` over `behavior_logp` at `level` (see `ctpo.ratios`), the weight of a token is

    ==========  =================  ==============  ===============
    mode        w below `low`      in between      w above `high`
    ==========  =================  ==============  ===============
    "truncate"  `low`              w               `high`
    "mask"      0                  w               0
    "reject"    0                  1               0
    ==========  =================  ==============  ===============

    A ratio at a bound is in between. Comparisons are made between logarithms, so bounded weights cannot overflow.

    ==========================  ================  ===========  =====================
    known as                    level             mode         usual bounds
    ==========================  ================  ===========  =====================
    TIS                         "token"           "truncate"   high 2
    sequence TIS                "sequence"        "truncate"   high 2
    IcePop                      "token"           "mask"       low .5, high 5
    sequence mask               "sequence"        "mask"       high 2 or 3
    geometric mask              "sequence_mean"   "reject"     low .99, high 1.01
    ==========================  ================  ===========  =====================

    Stages multiply. A geometric mask that leaves truncated token weights is
    ``rollout_correction(..., level="sequence_mean", mode="reject", low=0.99, high=1.01).weights`` times
    ``rollout_correction(...).weights``.

    **Use.** Decoupled PPO: ``policy_loss(logp, proximal_logp, advantages, mask, weights=rollout_correction(
    proximal_logp, behavior_logp, mask).weights)``, where the window limits the step from the old policy only and the
    engine's part is limited here. Simpler, without a forward pass for `proximal_logp`:
    ``policy_loss(logp, behavior_logp, advantages, mask)``, one ratio over both steps. At the level "cumulative" the
    two agree but for bounds and windows, since the old policy cancels; the window then also clips the engine's noise.
    Correct once per batch of rollouts, before it is split over time shards: levels other than "token" need whole
    sequences.

    **What is unbiased.** Without bounds, :math:`E_\mu[u_t f_t] = E_\mathrm{old}[f_t]` for whatever the loss multiplies
    the weight u_t with (f_t includes the ratio of :math:`\pi` over :math:`\pi_\mathrm{old}`) holds at the level

    * "cumulative" if f_t depends on tokens 1..t only: a cumulative ratio times an advantage known at its token. At no
      token is the variance larger than at the level "sequence".
    * "sequence" for any f_t, such as an outcome reward, for which "cumulative" is biased.
    * "lookahead" if f_t depends on tokens 1..t + window only.

    The others, "token" among them, are biased. Every bound biases, too: truncation at c loses
    :math:`E_\mathrm{old}[(1 - c/w)^+ f_t]`, masking :math:`E_\mathrm{old}[1\{w > c\} f_t]`, which takes at least as
    much of the mean weight and can raise the variance. A capped product over many tokens collapses: with a log-normal
    ratio of spread .0335 per token, E min(w, 2) is .79 over 1,000 tokens and .18 over 8,192, and the gradient shrinks
    with it. Watch "rollout/weight_mean".

    **Metrics.** Once of the weights as applied and once, with the ending "_raw", of w:

    * "rollout/weight_mean", "rollout/weight_std" (of the population, not of a sample) and "rollout/weight_max".
    * "rollout/ess_fraction": effective sample size (sum w)^2 / sum w^2 over the number of weights.

    And "rollout/log_weight_mean_raw", logarithm of the mean of w; "rollout/low_fraction" and "rollout/high_fraction",
    shares of w below and above the bounds; "rollout/rejected_sequence_fraction", share of sequences without a token
    left. Moments are taken relative to the largest weight, so none overflows on the way: a raw value beyond the range
    of the dtype is inf, and its logarithm is right. At the levels "sequence" and "sequence_mean" every sequence counts
    once, at the others every policy token. Every metric is 0 if there is no policy token.

    **Other libraries.** TRL 1.16: ``vllm_importance_sampling_mode`` "token_truncate", "token_mask", "sequence_truncate"
    and "sequence_mask" are level and mode, ``..._clip_min`` and ``..._clip_max`` are `low` and `high`. Where the engine
    reported NaN TRL uses ratio 1; give `proximal_logp` there as `behavior_logp`. verl 0.9: ``rollout_is`` is the level;
    ``rollout_is_threshold`` c is mode "truncate" with high c, "a_b" is mode "mask" with low a, high b; its batch
    normalization is a division by "rollout/weight_mean" of all ranks. ``rollout_rs`` "token_k1", "seq_sum_k1" and
    "seq_mean_k1" are mode "reject" at the levels "token", "sequence" and "sequence_mean", where its threshold "a_b"
    bounds the inverse ratio: low 1/b, high 1/a. "token_k2" with threshold u is "token" with high exp(sqrt(2u)), low
    1/high. verl takes rejected tokens out of the loss's denominators as well: give `kept` as the loss's mask for that,
    with care where single tokens are rejected, as they leave the prefixes of its ratio, too. verl cuts log-ratios to
    [-20, 20] before.

    Args:
        proximal_logp: Log-probabilities of the sampled tokens under the old policy as the trainer computes them, nats,
            shape (..., T), detached. -inf is allowed (a ratio of 0).
        behavior_logp: The same as the rollout engine sampled them: of its own temperature and truncation, not
            recomputed; detached, finite at policy tokens.
        mask: bool, same shape, True at policy tokens; None for all. What stands at masked places never matters.
        level: Which product of token ratios.
        mode: What happens beyond the bounds.
        low: Lower bound of the ratio, positive; None for none.
        high: Upper bound of the ratio, positive; None for none: then a log-ratio above 88 (float32) overflows to inf
            in `weights`.
        window: For the levels that have one only, see `ctpo.log_ratio`.
        turn_ids: For the levels "turn" and "turn_mean" only, see `ctpo.log_ratio`.

    Returns:
        `RolloutCorrection`, arrays of the wider of the two dtypes, float32 at least.

    Raises:
        ValueError: Shapes or dtypes do not fit, an option is unknown or out of its range, or (arrays in CPU memory) an
            entry at a policy token is NaN, +inf, or -inf in `behavior_logp`.

    Assumptions:
        mu has mass wherever the old policy has (top-k or nucleus sampling breaks this), and the old policy was fixed
        before the tokens were drawn.

    References:
        Ionides (2008), "Truncated importance sampling". Yao et al. (2025), "Your efficient RL framework secretly brings
        you off-policy RL training" (TIS). arXiv:2510.18855, IcePop. Liu, Li et al. (2025), "When speed kills stability"
        (sequence and geometric masks). arXiv:2110.00641 and arXiv:2505.24298, decoupled PPO.

    Example:
        >>> import numpy as np
        >>> old, engine = np.log([[0.6, 0.9, 0.5]]), np.log([[0.5, 0.3, 0.5]])
        >>> found = rollout_correction(old, engine)
        >>> found.weights.round(4), found.metrics["rollout/weight_max_raw"].round(4)
        (array([[1.2, 2. , 1. ]]), np.float64(3.0))
        >>> rollout_correction(old, engine, level="sequence", mode="mask", high=3.0).weights
        array([[0., 0., 0.]])
    """
    check_level(level, window)
    check_turn_ids(level, turn_ids)
    one_of("mode", mode, get_args(Mode))
    least, most = _bounds(low, high)
    log_least, log_most = math.log(least) if least else -math.inf, math.log(most)
    for name, x in (("proximal_logp", proximal_logp), ("behavior_logp", behavior_logp)):
        if is_tensor(x) and x.requires_grad:
            raise ValueError(f"{name} must be detached: weights are constants; got a tensor that requires grad")
    checked = token_log_ratio(proximal_logp, behavior_logp, mask, turn_ids=turn_ids, name="proximal_logp")
    xp, tokens = checked.xp, checked.log_ratio
    raw = at_level(xp, tokens, mask, level, window=window, turn_ids=turn_ids)
    policy = xp.ones_like(tokens, dtype=xp.bool) if mask is None else mask
    below, above = raw < log_least, raw > log_most
    if mode == "truncate":
        kept = policy
        log_weights = xp.where(below, log_least, xp.where(above, log_most, raw))
        # exp(log(high)) need not be high.
        weights = xp.where(below, least, xp.where(above, most, xp.exp(log_weights)))
    else:
        kept = policy & ~(below | above)
        log_weights = xp.where(kept, raw if mode == "mask" else xp.zeros_like(raw), -math.inf)
        weights = xp.exp(log_weights)
    weights = only_where(xp, mask, weights)
    counted = policy
    if level in ("sequence", "sequence_mean"):
        counted = policy & (bounded_positions(xp, tokens, mask) == 1.0)
    metrics = {
        **_statistics(xp, log_weights, counted, ""),
        **_statistics(xp, raw, counted, "_raw"),
        "low_fraction": _share(xp, below, counted, raw),
        "high_fraction": _share(xp, above, counted, raw),
        "rejected_sequence_fraction": _share(xp, ~xp.any(kept, axis=-1), xp.any(policy, axis=-1), raw),
    }
    del metrics["log_weight_mean"]  # bounded, or the same as the raw one
    return RolloutCorrection(weights, kept, {f"rollout/{name}": value for name, value in metrics.items()})


def _bounds(low: float | None, high: float | None) -> tuple[float, float]:
    """Checked bounds of the ratio, 0 and inf in place of None."""
    allowed = "a positive finite number, or None"
    for name, value in (("low", low), ("high", high)):
        if value is not None and not 0 < real_number("rollout_correction", name, value, allowed) < math.inf:
            raise ValueError(f"rollout_correction: {name} must be {allowed}; got {value!r}")
    if low is not None and high is not None and low > high:
        raise ValueError(f"rollout_correction: low must be at most high, {high!r}; got {low!r}")
    return 0.0 if low is None else float(low), math.inf if high is None else float(high)


def _statistics(xp: Namespace, log_weights: Array, counted: Array, suffix: str) -> dict[str, Array]:
    """Statistics of the weights where `counted`, from their logarithms, on the scale of the largest of them."""
    log_weights = xp.where(counted, log_weights, -math.inf)
    if 0 in log_weights.shape:  # `max` refuses them
        largest = xp.full((), -math.inf, dtype=log_weights.dtype, device=device(log_weights))
    else:
        largest = xp.max(log_weights)
    scale = xp.where(largest == -math.inf, 0.0, largest)
    weights = xp.exp(log_weights - scale)
    size = _count(xp, counted, log_weights)
    mean = xp.sum(weights) / size
    deviation = xp.where(counted, weights - mean, 0.0)
    square = xp.sum(weights * weights) / size
    positive = mean > 0
    log_mean = scale + xp.log(xp.where(positive, mean, 1.0))
    found = {
        "weight_mean": _scaled(xp, mean, scale),
        "weight_std": _scaled(xp, xp.sqrt(xp.sum(deviation * deviation) / size), scale),
        "weight_max": _scaled(xp, xp.exp(largest - scale), scale),
        "ess_fraction": mean * mean / xp.where(positive, square, 1.0),
        "log_weight_mean": xp.where(positive | ~xp.any(counted), log_mean, -math.inf),
    }
    return {name + suffix: value for name, value in found.items()}


def _scaled(xp: Namespace, x: Array, log_scale: Array) -> Array:
    """X exp(log_scale), inf beyond the range of the dtype; 0 where x is 0."""
    logarithm = log_scale + xp.log(xp.where(x > 0, x, 1.0))
    limit = math.log(float(xp.finfo(x.dtype).max))
    value = xp.where(logarithm > limit, math.inf, xp.exp(xp.where(logarithm > limit, 0.0, logarithm)))
    return xp.where(x == 0, 0.0, value)


def _share(xp: Namespace, flag: Array, counted: Array, like: Array) -> Array:
    """Share of `counted` where `flag` is True, 0 of none."""
    return xp.sum(xp.astype(flag & counted, like.dtype)) / _count(xp, counted, like)


def _count(xp: Namespace, counted: Array, like: Array) -> Array:
    """Number of True entries in the dtype of `like`, at least 1."""
    count = xp.sum(xp.astype(counted, like.dtype))
    return xp.where(count > 0, count, 1.0)
