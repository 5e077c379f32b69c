"""Rollout correction by plain loops over lists of sequences, written from the formulas; imports nothing from ctpo."""

import math

import oracle


def correct(proximal, behavior, masks, *, level, mode, low=None, high=None, window=None, turn_ids=None):
    """(weights, kept, metrics, margin); `margin` is the distance of the nearest log-ratio from a bound."""
    weights, kept, raw_used, applied_used, lost = [], [], [], [], []
    below = above = 0
    margin = math.inf
    for row, mask in enumerate(masks):
        d = oracle.token_log_ratios(proximal[row], behavior[row], mask)
        logs = oracle.level(d, mask, level, window, None if turn_ids is None else turn_ids[row])
        weights.append([])
        kept.append([])
        seen = False
        for t, own in enumerate(mask):
            if not own:
                weights[row].append(0.0)
                kept[row].append(False)
                continue
            w = math.exp(logs[t])
            too_low = low is not None and w < low
            too_high = high is not None and w > high
            for bound in (low, high):
                if bound is not None:
                    margin = min(margin, abs(logs[t] - math.log(bound)))
            if mode == "truncate":
                used, keep = (low if too_low else high if too_high else w), True
            else:
                keep = not (too_low or too_high)
                used = (w if mode == "mask" else 1.0) if keep else 0.0
            weights[row].append(used)
            kept[row].append(keep)
            if level in ("sequence", "sequence_mean") and seen:
                continue
            seen = True
            raw_used.append(w)
            applied_used.append(used)
            below += too_low
            above += too_high
        if any(mask):
            lost.append(not any(kept[row]))
    metrics = {f"rollout/{name}": value for name, value in statistics(applied_used).items()}
    metrics |= {f"rollout/{name}_raw": value for name, value in statistics(raw_used).items()}
    count = max(len(raw_used), 1)
    total = sum(raw_used)
    metrics |= {
        "rollout/log_weight_mean_raw": (math.log(total / count) if total else -math.inf) if raw_used else 0.0,
        "rollout/low_fraction": below / count,
        "rollout/high_fraction": above / count,
        "rollout/rejected_sequence_fraction": sum(lost) / max(len(lost), 1),
    }
    return weights, kept, metrics, margin


def statistics(weights):
    if not weights:
        return {"weight_mean": 0.0, "weight_std": 0.0, "weight_max": 0.0, "ess_fraction": 0.0}
    count, largest = len(weights), max(weights)
    mean = math.fsum(weights) / count
    relative = [w / largest for w in weights] if largest else weights
    squares = math.fsum(w * w for w in relative)
    return {
        "weight_mean": mean,
        "weight_std": math.sqrt(math.fsum(((w - mean) / (largest or 1)) ** 2 for w in weights) / count) * largest,
        "weight_max": largest,
        "ess_fraction": math.fsum(relative) ** 2 / (count * squares) if squares else 0.0,
    }
