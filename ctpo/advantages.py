r"""Advantages: group baselines, and credit assignment that is unbiased under cumulative ratios.

`group_relative` and `leave_one_out` take one reward per response and compare the responses to a prompt with
each other. `per_decision` and `doubly_robust` take rewards along one response; multiplied by the unclipped
cumulative ratio rho_t their result has the right expectation for the target policy's gradient, which an
outcome reward under rho_t has not.
"""

from __future__ import annotations

from ctpo._arrays import (
    Array,
    Namespace,
    advance,
    backward_recurrence,
    check_finite,
    check_floating,
    check_numeric,
    check_sequence_or_token,
    check_shape,
    default_float,
    namespace,
    only_where,
)
from ctpo.ratios import token_log_ratio

__all__ = ["doubly_robust", "group_relative", "leave_one_out", "per_decision"]


def group_relative(rewards: Array, *, scale_by_std: bool = False, eps: float = 1e-6) -> Array:
    r"""Reward minus the mean of its group, optionally over the group's standard deviation.

    .. math:: A_i = R_i - \frac1G \sum_j R_j \quad\text{or}\quad A_i / (s + \mathrm{eps})

    with s the sample standard deviation (G - 1 degrees of freedom).

    Args:
        rewards: One per response, shape (..., G), the G responses to a prompt on the last axis; finite, any
            real dtype.
        scale_by_std: Divide by s + `eps` (GRPO); otherwise only center (Dr. GRPO).
        eps: Added to the standard deviation, in units of reward, positive.

    Returns:
        Shape (..., G), float32 or wider. Exactly 0 in a group whose rewards are all equal.

    Raises:
        ValueError: G < 2, a reward is NaN or infinite (arrays in CPU memory), or `eps` is not positive.

    Assumptions:
        The mean includes the response itself, which scales the expected gradient by 1 - 1/G. Division by s
        weights prompts differently, and with more than two reward levels it can turn the gradient around.

    References:
        arXiv:2402.03300 (GRPO), arXiv:2503.20783 (Dr. GRPO).

    Example:
        >>> import numpy as np
        >>> group_relative(np.array([1.0, 0.0, 0.0, 1.0]))
        array([ 0.5, -0.5, -0.5,  0.5])
        >>> group_relative(np.array([1.0, 0.0, 0.0, 1.0]), scale_by_std=True).round(4)
        array([ 0.866, -0.866, -0.866,  0.866])
    """
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < float("inf"):
        raise ValueError(f"eps must be a positive finite number; got {eps!r}")
    xp, rewards = _group(rewards)
    centered = _centered(xp, rewards)
    if not scale_by_std:
        return centered
    variance = xp.sum(centered * centered, axis=-1, keepdims=True) / (rewards.shape[-1] - 1)
    return centered / (xp.sqrt(variance) + eps)


def leave_one_out(rewards: Array) -> Array:
    r"""Reward minus the mean of the other responses of its group.

    .. math:: A_i = R_i - \frac1{G-1} \sum_{j\ne i} R_j = \frac{G}{G-1} (R_i - \bar R)

    Args:
        rewards: One per response, shape (..., G), the G responses to a prompt on the last axis; finite, any
            real dtype.

    Returns:
        Shape (..., G), float32 or wider. Exactly 0 in a group whose rewards are all equal.

    Raises:
        ValueError: G < 2, or a reward is NaN or infinite (arrays in CPU memory).

    Assumptions:
        The responses of a group are independent given the prompt. Then the baseline leaves the expectation of
        a gradient weighted by token, cumulative or sequence ratios unchanged; with weight 1 off-policy it
        does not.

    References:
        arXiv:2402.14740 (RLOO).

    Example:
        >>> import numpy as np
        >>> leave_one_out(np.array([1.0, 0.0, 0.0])).round(4)
        array([ 1. , -0.5, -0.5])
    """
    xp, rewards = _group(rewards)
    size = rewards.shape[-1]
    return _centered(xp, rewards) * (size / (size - 1))


def per_decision(rewards: Array, logp: Array, behavior_logp: Array, mask: Array | None = None) -> Array:
    r"""Importance-weighted reward-to-go, to be multiplied by the cumulative ratio.

    .. math:: A_t = \sum_{k\ge t} \frac{\rho_k}{\rho_t} c_k

    so that rho_t A_t is the per-decision return: the reward at k is weighted by rho_k.

    Args:
        rewards: c_t for every token, shape (..., T), or one outcome reward per sequence, shape (...,),
            credited to the last policy token. Rewards at masked places are ignored: credit a tool's reward to
            a policy token.
        logp: Log-probabilities of the sampled tokens under the target policy, nats, shape (..., T).
        behavior_logp: The same under the behavior policy; finite at policy tokens.
        mask: bool, shape (..., T), True at policy tokens; None for all.

    Returns:
        A_t, shape (..., T), 0 where masked, in the widest floating dtype of the inputs, float32 at least.

    Raises:
        ValueError: Shapes or dtypes do not fit, or (arrays in CPU memory) a value at a policy token is NaN,
            or infinite where it must not be.

    Assumptions:
        E_b[sum_t rho_t A_t grad log pi_t] is the gradient of the target policy's expected sum of rewards if
        pi has no mass where b has none, pi was fixed before the tokens were drawn, c_t is known once token t
        has been chosen (or its mean given the tokens is), and the weight is the unclipped level "cumulative".
        No quotient of cumulative ratios is formed, so a ratio of 0 is no difficulty; products of ratios that
        overflow the dtype are.

    References:
        Precup, Sutton and Singh (2000), "Eligibility traces for off-policy policy evaluation".

    Example:
        >>> import numpy as np
        >>> logp, behavior_logp = np.log([0.75, 0.75]), np.log([0.5, 0.5])
        >>> per_decision(np.array([1.0, 2.0]), logp, behavior_logp)  # 1 + 1.5 * 2, 2
        array([4., 2.])
    """
    return _recursive(rewards, logp, behavior_logp, mask)


def doubly_robust(
    rewards: Array,
    logp: Array,
    behavior_logp: Array,
    q: Array,
    v: Array,
    mask: Array | None = None,
) -> Array:
    r"""Doubly robust advantage with a given critic, to be multiplied by the cumulative ratio.

    .. math:: A_t = c_t + Y_{t+1} - v_t, \qquad Y_t = v_t + r_t (c_t - q_t) + r_t Y_{t+1}, \qquad Y_{H+1} = 0

    The critic changes the variance only, up or down; `per_decision` is the case q = v = 0. With the target
    policy's own q and v and deterministic rewards, A_t is q_t - v_t on every path.

    Args:
        rewards: c_t for every token, shape (..., T), or one outcome reward per sequence, shape (...,),
            credited to the last policy token. Rewards at masked places are ignored: credit a tool's reward to
            a policy token.
        logp: Log-probabilities of the sampled tokens under the target policy, nats, shape (..., T).
        behavior_logp: The same under the behavior policy; finite at policy tokens.
        q: Critic's value of the sampled token, q(s_t, a_t), rewards from t on, shape (..., T).
        v: Critic's value of the state before it, v(s_t), shape (..., T).
        mask: bool, shape (..., T), True at policy tokens; None for all.

    Returns:
        A_t, shape (..., T), 0 where masked, in the widest floating dtype of the inputs, float32 at least.

    Raises:
        ValueError: Shapes or dtypes do not fit, or (arrays in CPU memory) a value at a policy token is NaN,
            or infinite where it must not be.

    Assumptions:
        As for `per_decision`, and v(s) = sum_a pi(a|s) q(s, a) at every state, for any function q at all that is
        independent of the responses it is applied to. Where v is not that mean, or q was fitted to the same
        responses, the result is biased.

    References:
        Jiang and Li (2016), arXiv:1511.03722.

    Example:
        >>> import numpy as np
        >>> logp, behavior_logp = np.log([0.75, 0.75]), np.log([0.5, 0.5])
        >>> q, v = np.array([0.75, 1.0]), np.array([0.5625, 0.75])  # exact for the reward "both tokens are 1"
        >>> doubly_robust(np.array(1.0), logp, behavior_logp, q, v)
        array([0.1875, 0.25  ])
    """
    return _recursive(rewards, logp, behavior_logp, mask, q=q, v=v)


def _recursive(rewards: Array, logp: Array, behavior_logp: Array, mask: Array | None, **critic: Array) -> Array:
    """The recursion of `doubly_robust` with the critic's q and v, or with none."""
    xp, _, tokens, _ = token_log_ratio(logp, behavior_logp, mask, rewards=rewards, **critic)
    rewards = _rewards_by_token(xp, rewards, tokens, mask)
    ratio = xp.exp(tokens)  # 1 where masked, and the term is 0 there: the recursion passes unchanged
    if not critic:
        return only_where(xp, mask, rewards + _from_next(xp, ratio, ratio * rewards))
    q, v = (_critic_by_token(xp, name, critic[name], tokens, mask) for name in ("q", "v"))
    after = _from_next(xp, ratio, v + ratio * (rewards - q))
    return only_where(xp, mask, rewards + after - v)


def _from_next(xp: Namespace, ratio: Array, term: Array) -> Array:
    """Y_{t+1} at every t, of the recursion Y_t = term_t + r_t Y_{t+1} that ends in 0."""
    return advance(xp, backward_recurrence(xp, ratio, term), 1, 0.0)


def _rewards_by_token(xp: Namespace, rewards: Array, tokens: Array, mask: Array | None) -> Array:
    """Checked rewards per token, 0 where masked; an outcome reward stands at the last policy token."""
    check_numeric(xp, rewards=rewards)
    by_token = check_sequence_or_token("rewards", rewards, tuple(tokens.shape))
    rewards = xp.astype(rewards, tokens.dtype, copy=False)
    if by_token:
        rewards = only_where(xp, mask, rewards)
    else:
        chosen = xp.ones_like(tokens) if mask is None else xp.astype(mask, tokens.dtype)
        from_here = xp.flip(xp.cumulative_sum(xp.flip(chosen, axis=-1), axis=-1), axis=-1)
        rewards = xp.where((from_here == 1) & (chosen == 1), rewards[..., None], 0.0)
    check_finite(xp, "rewards", rewards, mask, where="at every policy token")
    return rewards


def _critic_by_token(xp: Namespace, name: str, x: Array, tokens: Array, mask: Array | None) -> Array:
    """Checked critic values in the dtype of `tokens`, 0 where masked."""
    check_floating(xp, **{name: x})
    check_shape(tuple(tokens.shape), "logp", **{name: x})
    x = only_where(xp, mask, xp.astype(x, tokens.dtype, copy=False))
    check_finite(xp, name, x, mask, where="at every policy token")
    return x


def _group(rewards: Array) -> tuple[Namespace, Array]:
    """Checked rewards of groups on the last axis, float32 or wider."""
    xp = namespace(rewards=rewards)
    check_numeric(xp, rewards=rewards)
    if rewards.ndim < 1 or rewards.shape[-1] < 2:
        raise ValueError(f"rewards must have shape (..., G) with G of at least 2 responses; got {tuple(rewards.shape)}")
    floating = xp.isdtype(rewards.dtype, "real floating")
    dtype = xp.result_type(rewards.dtype, xp.float32) if floating else default_float(xp, rewards)
    rewards = xp.astype(rewards, dtype, copy=False)
    check_finite(xp, "rewards", rewards, None, where="everywhere")
    return xp, rewards


def _centered(xp: Namespace, rewards: Array) -> Array:
    """Rewards minus their group mean; exactly 0, without a rounding error, where all are equal."""
    equal = xp.all(rewards == rewards[..., :1], axis=-1, keepdims=True)
    return xp.where(equal, 0.0, rewards - xp.mean(rewards, axis=-1, keepdims=True))
