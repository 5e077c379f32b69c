"""Tables and fits by plain loops over lists, written from the definitions; imports nothing from ctpo.

A path is the list of log-ratios of one sequence at its policy tokens, in their order.
"""

import math

import oracle


def paths(logp, behavior_logp, mask, name="cumulative", window=None, turn_ids=None):
    result = []
    for i, row in enumerate(mask):
        d = oracle.token_log_ratios(logp[i], behavior_logp[i], row)
        values = oracle.level(d, row, name, window, None if turn_ids is None else turn_ids[i])
        result.append([value for value, m in zip(values, row, strict=True) if m])
    return result


def weights_of(log_weights):
    """Weights over the largest of them."""
    largest = max(log_weights)
    return [math.exp(x - largest) for x in log_weights]


def effective_sample_size(log_weights):
    if not log_weights or max(log_weights) == -math.inf:
        return 0.0
    w = weights_of(log_weights)
    return math.fsum(w) ** 2 / math.fsum(x * x for x in w)


def chi2(log_weights):
    w = weights_of(log_weights)
    mean = math.fsum(w) / len(w)
    return math.fsum((x / mean - 1) ** 2 for x in w) / len(w)


def mean(x, share):
    return math.fsum(a * s for a, s in zip(x, share, strict=True)) / math.fsum(share)


def std(x, share):
    """With len(x) - 1 degrees of freedom where every share is 1."""
    if min(x) == max(x):
        return 0.0
    m = mean(x, share)
    return math.sqrt(len(x) / (len(x) - 1) * mean([(a - m) ** 2 for a in x], share))


def mean_ratio(x, share):
    return mean([math.exp(a) for a in x], share)


def ess_fraction(x, share):
    return mean_ratio(x, share) ** 2 / mean([math.exp(2 * a) for a in x], share)


STATISTICS = {
    "mean_log_ratio": (mean, 1),
    "std_log_ratio": (std, 2),
    "ess_fraction": (ess_fraction, 2),
    "mean_ratio": (mean_ratio, 1),
}


def over_bucket(by_sequence, times, statistic, least, share):
    """A statistic at each position, averaged by the number of sequences there; i counts share[i] times."""
    total, size = 0.0, 0.0
    for t in times:
        here = [i for i, path in enumerate(by_sequence) if len(path) >= t]
        if len(here) >= least:
            n = math.fsum(share[i] for i in here)
            total += n * statistic([by_sequence[i][t - 1] for i in here], [share[i] for i in here])
            size += n
    return total / size if size else math.nan


def clustered_error(by_sequence, times, statistic, least, unit):
    """Infinitesimal jackknife: derivatives by the share of each sequence, summed over each unit."""
    n, step = len(by_sequence), 1e-4
    reached = [t for t in times if sum(len(path) >= t for path in by_sequence) >= least]
    present = {unit[i] for i, path in enumerate(by_sequence) if any(len(path) >= t for t in reached)}
    if len(present) < 2:
        return math.nan
    slopes = dict.fromkeys(present, 0.0)
    for i in range(n):
        if unit[i] in present:
            up, down = ([1.0 + sign * step * (j == i) for j in range(n)] for sign in (1, -1))
            values = [over_bucket(by_sequence, times, statistic, least, share) for share in (up, down)]
            slopes[unit[i]] += (values[0] - values[1]) / (2 * step)
    return math.sqrt(len(present) / (len(present) - 1) * math.fsum(s * s for s in slopes.values()))


def stopped(by_sequence, longest):
    """Paths that go on at their last value; sequences without a token stay away."""
    return [path + [path[-1]] * (longest - len(path)) if path else [] for path in by_sequence]


def ratio_row(by_sequence, low, high, unit):
    """One row of the table, for positions low..high."""
    times = range(low, high + 1)
    ones = [1.0] * len(by_sequence)
    row = {"n_sequences": sum(len(path) >= low for path in by_sequence)}
    for name, (statistic, least) in STATISTICS.items():
        row[name] = over_bucket(by_sequence, times, statistic, least, ones)
        row[f"{name}_se"] = clustered_error(by_sequence, times, statistic, least, unit)
    for name, value, least in (
        ("drift", lambda x, t: mean(x, [1.0] * len(x)) / t, 1),
        ("var_over_t", lambda x, t: std(x, [1.0] * len(x)) ** 2 / t, 2),
        ("chi2", lambda x, t: chi2(x), 2),
    ):
        total, size = 0.0, 0
        for t in times:
            x = [path[t - 1] for path in by_sequence if len(path) >= t]
            if len(x) >= least:
                total, size = total + len(x) * value(x, t), size + len(x)
        row[name] = total / size if size else math.nan
    return row


def clip_row(found, advantages, mask, low, high):
    """One row of clip rates; `found` holds, per sequence, the oracle's coefficients of every token."""
    tokens = []
    for i, row in enumerate(mask):
        place = oracle.positions(row)
        for t, m in enumerate(row):
            if m and low <= place[t] <= high:
                tokens.append((i, advantages[i][t], found[i][t]))

    def rate(chosen, among=lambda a: True):
        pool = [(a, c) for _, a, c in tokens if among(a)]
        return sum(chosen(a, c) for a, c in pool) / len(pool) if pool else math.nan

    row = {f"clip_{side}": rate(lambda a, c, side=side: c[f"clipped_{side}"]) for side in ("low", "high", "dual")}
    row["clip_total"] = rate(lambda a, c: c["clipped_low"] or c["clipped_high"] or c["clipped_dual"])
    row["saturated"] = rate(lambda a, c: c["saturated"])
    row["clip_low_given_negative"] = rate(lambda a, c: c["clipped_low"], lambda a: a < 0)
    row["clip_high_given_positive"] = rate(lambda a, c: c["clipped_high"], lambda a: a > 0)
    row["zero_advantage"] = rate(lambda a, c: a == 0)
    row["n_tokens"] = len(tokens)
    return row


def clip_error(found, mask, low, high, unit):
    """Standard error of clip_total, a quotient of two sums over units."""
    clipped, size = {}, {}
    for i, row in enumerate(mask):
        place = oracle.positions(row)
        for t, m in enumerate(row):
            if m and low <= place[t] <= high:
                c = found[i][t]
                size[unit[i]] = size.get(unit[i], 0) + 1
                hit = c["clipped_low"] or c["clipped_high"] or c["clipped_dual"]
                clipped[unit[i]] = clipped.get(unit[i], 0) + hit
    n = len(size)
    if n < 2:
        return math.nan
    p = sum(clipped.values()) / sum(size.values())
    squares = math.fsum((clipped[u] - p * size[u]) ** 2 for u in size)
    return math.sqrt(n / (n - 1) * squares) / sum(size.values())


def fit(steps, horizon):
    """The fits to paths of token log-ratios."""
    cumulative = [[math.fsum(path[: t + 1]) for t in range(len(path))] for path in steps]
    counts, means, variances, token_variances = [], [], [], []
    for t in range(1, horizon + 1):
        x = [path[t - 1] for path in cumulative if len(path) >= t]
        d = [path[t - 1] for path in steps if len(path) >= t]
        counts.append(len(x))
        ones = [1.0] * len(x)
        means.append(mean(x, ones) if x else math.nan)
        variances.append(std(x, ones) ** 2 if len(x) > 1 else math.nan)
        token_variances.append(std(d, ones) ** 2 if len(x) > 1 else math.nan)
    times = range(1, horizon + 1)
    several = [t for t in times if counts[t - 1] > 1]
    freedom = sum(counts[t - 1] - 1 for t in several)
    tokens = [d for path in steps for d in path[:horizon]]
    result = {
        "token_drift": -math.fsum(tokens) / len(tokens),
        "token_kl": math.fsum(math.exp(d) - 1 - d for d in tokens) / len(tokens),
        "drift": -math.fsum(counts[t - 1] * means[t - 1] for t in times if counts[t - 1])
        / sum(counts[t - 1] * t for t in times),
        "mean_log_ratio": means[-1],
        "var_log_ratio": variances[-1],
        "drift_ratio": means[-1] / variances[-1] if variances[-1] else math.nan,
        "variance_ratio": math.nan,
        "sigma": math.nan,
        "token_std": math.nan,
        "power": math.nan,
        "mean_token_ratio": math.fsum(math.exp(d) for d in tokens) / len(tokens),
    }
    if several:
        result["sigma"] = math.sqrt(math.fsum((counts[t - 1] - 1) * variances[t - 1] / t for t in several) / freedom)
        result["token_std"] = math.sqrt(
            math.fsum((counts[t - 1] - 1) * token_variances[t - 1] for t in several) / freedom
        )
    if len(several) == horizon and math.fsum(token_variances):
        result["variance_ratio"] = variances[-1] / math.fsum(token_variances)
    points = [
        (math.log(t), 0.5 * math.log(variances[t - 1]), (counts[t - 1] - 1) / t) for t in several if variances[t - 1]
    ]
    if len(points) > 1:
        q = [w for _, _, w in points]
        center_x, center_y = mean([x for x, _, _ in points], q), mean([y for _, y, _ in points], q)
        result["power"] = math.fsum(w * (x - center_x) * (y - center_y) for x, y, w in points) / math.fsum(
            w * (x - center_x) ** 2 for x, _, w in points
        )
    return result


def spread_at_one(steps, horizon, power):
    """Standard deviation at t = 1 of log-ratios that spread like t^power, from their variances up to the horizon."""
    total, freedom = 0.0, 0
    for t in range(1, horizon + 1):
        x = [math.fsum(path[:t]) for path in steps if len(path) >= t]
        if len(x) > 1:
            total += (len(x) - 1) * std(x, [1.0] * len(x)) ** 2 / t ** (2 * power)
            freedom += len(x) - 1
    return math.sqrt(total / freedom) if freedom else math.nan


def horizon(lengths):
    """The last position that half of the sequences with a token, and two of them, reach."""
    lengths = [n for n in lengths if n]
    need = max(math.ceil(len(lengths) / 2), min(2, len(lengths)))
    return max(t for t in range(1, max(lengths) + 1) if sum(n >= t for n in lengths) >= need)
