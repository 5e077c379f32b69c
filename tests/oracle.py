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
        elif name == "forward":
            result[i] = sum(values[t : t + window])
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


PREFIX_LEVELS = ("cumulative", "cumulative_mean", "window", "forward", "lookahead", "min_prefix")


def bound_window(form, a, log_w, low, high, dual):
    """Which of the bounds acts on a log-ratio: "low", "high", "dual" or None."""
    signed = form not in ("cispo", "reject")
    if log_w > high and (a > 0 or not signed):
        return "high"
    if log_w < low and (a < 0 or not signed):
        return "low"
    if dual is not None and a < 0 and log_w > dual:
        return "dual"
    return None


def distance(log_w, *thresholds):
    """From the nearest of the thresholds that are finite numbers."""
    found = [abs(log_w - x) for x in thresholds if x is not None and math.isfinite(x) and math.isfinite(log_w)]
    return min(found, default=math.inf)


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def coefficients(
    logp,
    behavior_logp,
    advantages,
    mask,
    *,
    name,
    form,
    bounds=None,
    gate=None,
    window=None,
    turn_ids=None,
    max_log_ratio=10.0,
    max_token_log_ratio=20.0,
):
    """One dict per token; `margin` is the distance from the nearest threshold that decides something.

    `bounds` maps a position to (log_low, log_high, log_dual or None); `gate` is the numbers of a form without them:
    (tau of A > 0, tau of the others), (k, lambda of A >= 0, k, lambda of A < 0) or (shift of A < 0, shift of A > 0).
    """
    d = token_log_ratios(logp, behavior_logp, mask)
    place = positions(mask)
    far = [False] * len(d)
    clamps = name == "token" or name in PREFIX_LEVELS
    margins = [math.inf] * len(d)
    if clamps and max_token_log_ratio is not None and form != "reinforce":
        margins = [abs(abs(x) - max_token_log_ratio) for x in d]
        far = [abs(x) > max_token_log_ratio for x in d]
        d = [min(max(x, -max_token_log_ratio), max_token_log_ratio) for x in d]
    acted = [None] * len(d)
    if form == "gmpo":
        for t in range(len(d)):
            if mask[t]:
                low, high, _ = bounds(place[t])
                margins[t] = min(margins[t], distance(d[t], low, high))
                acted[t] = bound_window(form, advantages[t], d[t], low, high, None)
                d[t] = {"low": low, "high": high, None: d[t]}[acted[t]]
        margins = [min(margins)] * len(d)  # a token on the edge changes the mean of all
    logs = level(d, mask, name, window, turn_ids)
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
        which, void = acted[t], False
        if form in ("ppo", "gppo", "cispo", "reject"):
            low, high, dual = bounds(place[t])
            margin = min(margin, distance(log_w, low, high, dual))
            which = bound_window(form, a, log_w, low, high, dual)
            void = form == "reject" and which is not None
            if which is not None and form != "reject":
                log_w = {"low": low, "high": high, "dual": dual}[which]
        dropped = dropped or (which is not None and form in ("ppo", "reject", "gmpo"))
        w = math.exp(log_w)
        c = f = w
        if form == "cfpo":
            if gate is None:
                low, high, _ = bounds(place[t])
                room = math.exp(high) - 1 if a > 0 else math.exp(low) - 1
            else:
                room = (gate[1] if a > 0 else -gate[0]) / math.exp(behavior_logp[t])
            if a != 0:
                c, f = w * (1 - (w - 1) / room), w - (w - 1) ** 2 / (2 * room)
                margin = min(margin, abs((w - 1) / room - 1))
                which = ("high" if a > 0 else "low") if (w - 1) / room > 1 else None
        elif form == "sapo":
            tau = gate[0] if a > 0 else gate[1]
            s = sigmoid(tau * (w - 1))
            c, f = w * 4 * s * sigmoid(-tau * (w - 1)), 4 / tau * s
        elif form == "vespo":
            k, lam = gate[:2] if a >= 0 else gate[2:]
            c = math.exp(lam) * w**k * math.exp(-lam * w)
        elif form == "topr":
            margin = min(margin, abs(log_w))
            which = "high" if a < 0 and w > 1 else None
            c = 1.0 if a >= 0 else min(w, 1.0)
        row["margin"] = margin
        row["clipped_low"], row["clipped_high"], row["clipped_dual"] = (which == x for x in ("low", "high", "dual"))
        if form in ("cispo", "vespo", "topr"):  # the ratio is a constant: a limit cuts it and takes no gradient away
            row["weight"] = 0.0 if logp[t] == -math.inf else c
            row["value"] = row["weight"] * a * logp[t] if row["weight"] * a != 0 else 0.0
        else:
            row["weight"] = 0.0 if dropped else c
            row["value"] = f * a if a != 0 and not void else 0.0
    return result


def moves_away(d, a):
    return (a > 0 and d > 0) or (a < 0 and d < 0)


def binary_kl(logp, behavior_logp):
    """From behavior to target, between "this token" and "any other", with 1e-8 inside of the logarithm."""
    q, others, now = math.exp(behavior_logp), -math.expm1(behavior_logp), -math.expm1(logp)
    own = q * (behavior_logp - logp) if q > 0 else 0.0
    return own + others * math.log((max(others, 0) + 1e-8) / (max(now, 0) + 1e-8))


def divergence_region(logp, behavior_logp, advantages, mask, low, high, kind):
    """Rejections of one sequence, and distances from the threshold."""
    found, margins = [], []
    for p, b, a, m in zip(logp, behavior_logp, advantages, mask, strict=True):
        if not m:
            found, margins = [*found, False], [*margins, math.inf]
            continue
        size = abs(math.exp(p) - math.exp(b)) if kind == "tv" else binary_kl(p, b)
        threshold = high if a > 0 else low
        found.append(moves_away(p - b, a) and size > threshold)
        margins.append(abs(size - threshold))
    return found, margins


def quantile(values, q):
    """By linear interpolation."""
    ordered = sorted(values)
    rank = q * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


def prefix_budget(logp, behavior_logp, advantages, mask, threshold, budget, last_weight, adaptive):
    own = [i for i, m in enumerate(mask) if m]
    found, margins = [False] * len(mask), [math.inf] * len(mask)
    if not own:
        return found, margins
    size = {i: abs(math.exp(logp[i]) - math.exp(behavior_logp[i])) for i in own}
    if adaptive:
        budget = min(max(quantile(size.values(), 0.9), budget), 2 * budget)
    spent = weights = 0.0
    for t, i in enumerate(own):
        w = 1 - (1 - last_weight) * t / max(len(own) - 1, 1)
        limit = min(threshold, threshold + budget * weights - spent)
        found[i] = moves_away(logp[i] - behavior_logp[i], advantages[i]) and w * size[i] > limit
        margins[i] = abs(w * size[i] - limit)
        spent += w * size[i]
        weights += w
    return found, margins


def sequence_region(logp, behavior_logp, advantages, mask, threshold, estimate, statistic, only_negative):
    d = [p - b for p, b, m in zip(logp, behavior_logp, mask, strict=True) if m]
    if not d:
        return [False] * len(mask), [math.inf] * len(mask)
    each = {
        "k1": lambda x: -x,
        "k2": lambda x: x * x / 2,
        "k3": lambda x: math.exp(x) - 1 - x,
    }[estimate]
    values = [each(x) for x in d]
    value = max(values) if statistic == "max" else sum(values) / len(values)
    beyond = value > threshold
    found = [m and beyond and (a < 0 or not only_negative) for a, m in zip(advantages, mask, strict=True)]
    return found, [abs(value - threshold)] * len(mask)


def second_moment(logp, behavior_logp, advantages, mask, threshold):
    """Of a whole batch: lists of lists. Removes the largest square as long as the mean is too large."""
    squares = {}
    for i, row in enumerate(mask):
        for t, m in enumerate(row):
            d = logp[i][t] - behavior_logp[i][t] if m else 0.0
            if m and moves_away(d, advantages[i][t]):
                squares[i, t] = d * d
    found = [[False] * len(row) for row in mask]
    margin = math.inf
    while squares:
        mean = sum(squares.values()) / len(squares)
        margin = min(margin, abs(mean - threshold))
        if mean <= threshold:
            break
        largest = max(squares.values())
        for i, t in [key for key, square in squares.items() if square == largest]:
            found[i][t] = True
            del squares[i, t]
    return found, [[margin] * len(row) for row in mask]


def rejections(kind, fields, logp, behavior_logp, advantages, mask):
    """Rejections and margins of a batch, lists of lists, by the region's class name and fields."""
    if kind == "SecondMoment":
        return second_moment(logp, behavior_logp, advantages, mask, **fields)
    function = {
        "DivergenceRegion": divergence_region,
        "PrefixBudget": prefix_budget,
        "SequenceRegion": sequence_region,
    }[kind]
    rows = zip(logp, behavior_logp, advantages, mask, strict=True)
    found, margins = zip(*(function(*row, **fields) for row in rows), strict=True)
    return list(found), list(margins)


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
