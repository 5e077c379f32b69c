"""The same quantities by plain loops over lists of one sequence, written from the formulas; imports nothing from ctpo.

A sequence is a list of tokens; `mask` a list of bools. Only `math` is used. Nothing here is clever on purpose.
"""

import math


def token_log_ratios(logp, behavior_logp, mask):
    return [p - b if m else 0.0 for p, b, m in zip(logp, behavior_logp, mask, strict=True)]


def positions(mask):
    found, t = [], 0
    for m in mask:
        t += bool(m)
        found.append(t if m else 0)
    return found


def level(d, mask, name, window=None, turn_ids=None):
    """Log-ratio at every token, 0 where masked."""
    own = [i for i, m in enumerate(mask) if m]
    values = [d[i] for i in own]
    count = len(own)
    result = [0.0] * len(mask)
    for t, i in enumerate(own):  # t counts from 0 here
        if name == "token":
            result[i] = values[t]
        elif name == "cumulative":
            result[i] = sum(values[: t + 1])
        elif name == "cumulative_mean":
            result[i] = sum(values[: t + 1]) / (t + 1)
        elif name == "sequence":
            result[i] = sum(values)
        elif name == "sequence_mean":
            result[i] = sum(values) / count
        elif name == "window":
            result[i] = sum(values[max(0, t - window + 1) : t + 1])
        elif name == "lookahead":
            result[i] = sum(values[: t + 1 + window])
        elif name == "min_prefix":
            result[i] = values[t] + (min(values[:t]) if t else 0.0)
        elif name in ("turn", "turn_mean"):
            first = last = t
            while first > 0 and turn_ids[own[first - 1]] == turn_ids[i]:
                first -= 1
            while last < count - 1 and turn_ids[own[last + 1]] == turn_ids[i]:
                last += 1
            total = sum(values[first : last + 1])
            result[i] = total if name == "turn" else total / (last - first + 1)
        else:
            raise AssertionError(name)
    return result


def ratio_bounds(t, low, high, dual=None):
    return (
        math.log(1 - low) if low < 1 else -math.inf,
        math.log(1 + high),
        None if dual is None else math.log(dual),
    )


def position_bounds(t, low, high, power, dual=None, drift=0.0):
    t = max(t, 1)
    center, width = -drift * t, t**power
    return center - low * width, center + high * width, None if dual is None else center + dual * width


def normal_tail_point(rate):
    """Where a standard normal variable lies above with probability `rate` < 1/2, by bisection."""
    low, high = 0.0, 40.0
    for _ in range(200):
        middle = (low + high) / 2
        if math.erfc(middle / math.sqrt(2)) / 2 > rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def calibrated_bounds(t, low, high, sigma, drift, power=0.5, dual=None):
    t = max(t, 1)
    std, center = sigma * t**power, -drift * t
    return (
        center - normal_tail_point(low) * std,
        center + normal_tail_point(high) * std,
        None if dual is None else center + normal_tail_point(dual) * std,
    )


PREFIX_LEVELS = ("cumulative", "cumulative_mean", "window", "lookahead", "min_prefix")


def coefficients(
    logp,
    behavior_logp,
    advantages,
    mask,
    *,
    name,
    form,
    bounds=None,
    window=None,
    turn_ids=None,
    max_log_ratio=10.0,
    max_token_log_ratio=20.0,
):
    """One dict per token; `margin` is the distance from the nearest threshold that decides something.

    `bounds` maps a position to (log_low, log_high, log_dual or None).
    """
    d = token_log_ratios(logp, behavior_logp, mask)
    far = [False] * len(d)
    clamps = name == "token" or name in PREFIX_LEVELS
    margins = [math.inf] * len(d)
    if clamps and max_token_log_ratio is not None and form != "reinforce":
        margins = [abs(abs(x) - max_token_log_ratio) for x in d]
        far = [abs(x) > max_token_log_ratio for x in d]
        d = [min(max(x, -max_token_log_ratio), max_token_log_ratio) for x in d]
    logs = level(d, mask, name, window, turn_ids)
    place = positions(mask)
    result = []
    for t in range(len(mask)):
        row = {
            "value": 0.0,
            "weight": 0.0,
            "clipped_low": False,
            "clipped_high": False,
            "clipped_dual": False,
            "saturated": False,
            "rejected": False,
            "margin": math.inf,
        }
        result.append(row)
        if not mask[t]:
            continue
        a, log_w, margin = advantages[t], logs[t], margins[t]
        if form == "reinforce":
            row["weight"] = 1.0
            row["value"] = a * logp[t] if a != 0 else 0.0
            continue
        row["saturated"] = far[t]
        dropped = far[t] and name == "token"
        if name != "token" and max_log_ratio is not None:
            margin = min(margin, abs(log_w - max_log_ratio))
            if log_w > max_log_ratio:
                log_w, dropped, row["saturated"] = max_log_ratio, True, True
        if bounds is not None:
            low, high, dual = bounds(place[t])
            for bound in (low, high, dual):
                if bound is not None and math.isfinite(bound) and math.isfinite(log_w):
                    margin = min(margin, abs(log_w - bound))
            if form == "cispo":
                row["clipped_low"], row["clipped_high"] = log_w < low, log_w > high
                log_w = min(max(log_w, low), high)
            elif a > 0 and log_w > high:
                log_w, dropped, row["clipped_high"] = high, True, True
            elif a < 0 and log_w < low:
                log_w, dropped, row["clipped_low"] = low, True, True
            elif a < 0 and dual is not None and log_w > dual:
                log_w, dropped, row["clipped_dual"] = dual, True, True
        row["margin"] = margin
        w = math.exp(log_w)
        if form == "cispo":  # its ratio is a constant: a limit cuts it and takes no gradient away
            dropped = False
        row["weight"] = 0.0 if dropped else w
        if form == "cispo":
            row["value"] = row["weight"] * a * logp[t] if row["weight"] * a != 0 else 0.0
        else:
            row["value"] = w * a if a != 0 else 0.0
    return result


def group_relative(rewards, scale_by_std=False, eps=1e-6):
    mean = sum(rewards) / len(rewards)
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    if not scale_by_std:
        return [r - mean for r in rewards]
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (std + eps) for r in rewards]


def leave_one_out(rewards):
    return [r - sum(x for j, x in enumerate(rewards) if j != i) / (len(rewards) - 1) for i, r in enumerate(rewards)]


def token_rewards(rewards, mask):
    """Rewards at policy tokens; a single number goes to the last policy token."""
    if isinstance(rewards, list):
        return [r if m else 0.0 for r, m in zip(rewards, mask, strict=True)]
    last = max((i for i, m in enumerate(mask) if m), default=None)
    return [rewards if i == last else 0.0 for i in range(len(mask))]


def per_decision(rewards, logp, behavior_logp, mask):
    """The double sum, with the quotient rho_k / rho_t as the product of the ratios in between."""
    c = token_rewards(rewards, mask)
    d = token_log_ratios(logp, behavior_logp, mask)
    result = [0.0] * len(mask)
    for t, m in enumerate(mask):
        if m:
            for k in range(t, len(mask)):
                between = 1.0
                for j in range(t + 1, k + 1):
                    between *= math.exp(d[j])
                result[t] += between * c[k]
    return result


def doubly_robust(rewards, logp, behavior_logp, q, v, mask):
    """D_t without its weight: rewards plus, for every later token k, rho_{k-1} v_k - rho_k q_k over rho_t."""
    d = token_log_ratios(logp, behavior_logp, mask)
    result = per_decision(rewards, logp, behavior_logp, mask)
    for t, m in enumerate(mask):
        if not m:
            continue
        result[t] -= v[t]
        before = 1.0
        for k in range(t + 1, len(mask)):
            if mask[k]:
                after = before * math.exp(d[k])
                result[t] += before * v[k] - after * q[k]
                before = after
    return result
