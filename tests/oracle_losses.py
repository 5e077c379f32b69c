"""Aggregation and metrics of a policy loss by plain loops over lists of sequences; imports nothing from ctpo."""

import math


def shares(mask, aggregation, *, num_tokens=None, num_sequences=None, data_parallel_size=1, horizon=None):
    """Factor of every token's term, per sequence; 0 for a sequence without policy tokens."""
    lengths = [sum(row) for row in mask]
    tokens = sum(lengths) if num_tokens is None else num_tokens
    sequences = sum(n > 0 for n in lengths) if num_sequences is None else num_sequences
    found = []
    for n in lengths:
        if n == 0:
            found.append(0.0)
        elif aggregation == "token-mean":
            found.append(data_parallel_size / tokens)
        elif aggregation == "seq-mean-token-mean":
            found.append(data_parallel_size / sequences / n)
        elif aggregation == "seq-mean-token-sum":
            found.append(data_parallel_size / sequences)
        elif aggregation == "seq-mean-token-sum-norm":
            found.append(data_parallel_size / sequences / (len(mask[0]) if horizon is None else horizon))
        else:
            raise AssertionError(aggregation)
    return found


def loss(values, coefficients, advantages, weights, mask, aggregation, **options):
    """(loss, gradient): every argument a list of rows of numbers by token."""
    total, gradient = 0.0, []
    for row, share in enumerate(shares(mask, aggregation, **options)):
        gradient.append([0.0] * len(mask[row]))
        for t, policy in enumerate(mask[row]):
            if policy:
                factor = -share * weights[row][t]
                total += factor * values[row][t]
                gradient[row][t] = factor * coefficients[row][t] * advantages[row][t]
    return total, gradient


def effective_fraction(log_weights):
    """(sum w)^2 / sum w^2 / n; 0 if there is no weight above 0."""
    largest = max(log_weights, default=-math.inf)
    if largest == -math.inf:
        return 0.0
    w = [math.exp(x - largest) for x in log_weights]
    return sum(w) ** 2 / sum(x * x for x in w) / len(w)


def mean(values):
    return sum(values) / len(values) if values else 0.0


def variance(values):
    m = mean(values)
    return mean([(x - m) ** 2 for x in values])


def metrics(log_ratios, applied, log_rhos, advantages, flags, mask):
    """Arguments are lists of rows by token; `log_rhos` of the cumulative ratio; `flags` has rows by name."""
    spots = [(i, t) for i, row in enumerate(mask) for t, policy in enumerate(row) if policy]

    def of(rows):
        return [rows[i][t] for i, t in spots]

    position = [sum(mask[i][: t + 1]) for i, t in spots]
    drift = mean([x / t for x, t in zip(of(log_rhos), position, strict=True)])
    last = {i: log_rhos[i][t] for i, t in spots}  # the last policy token's stays
    found = {f"clip/{name}": mean(of(flags[name])) for name in ("low", "high", "dual", "rejected")}
    found |= {
        "clip/total": found["clip/low"] + found["clip/high"] + found["clip/dual"],
        "log_ratio/mean": mean(of(log_ratios)),
        "log_ratio/std": math.sqrt(variance(of(log_ratios))),
        "log_ratio/applied_mean": mean(of(applied)),
        "log_ratio/applied_std": math.sqrt(variance(of(applied))),
        "log_rho/mean_per_token": drift,
        "log_rho/var_per_token": mean([(x - drift * t) ** 2 / t for x, t in zip(of(log_rhos), position, strict=True)]),
        "ess/sequence": effective_fraction(list(last.values())),
        "saturated": sum(of(flags["saturated"])),
        "advantage/zero": mean([a == 0 for a in of(advantages)]),
        "tokens": len(spots),
        "sequences": len(last),
    }
    first = 1
    while first <= max(len(mask[0]), 1):
        after = 16 if first == 1 else 4 * first
        inside = [x for x, t in zip(of(log_ratios), position, strict=True) if first <= t < after]
        found[f"ess/position_{first}"] = effective_fraction(inside)
        first = after
    return found
