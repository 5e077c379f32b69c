"""What must hold on recorded log-probabilities of a real language model, whatever its numbers turn out to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

import ctpo
from ctpo.diagnostics import fit_spread
from simulations.claims.effective_sample_size import SIGMAS
from simulations.claims.registry import Claim, Context, Evidence
from simulations.monte_carlo import z_threshold
from simulations.traces import Trace, load_recordings

#: The positions from which on log-ratios are tested against exact divergences, and the first of them again.
BUCKETS = (1, 17, 65, 257)
#: Positions at which the mean of rho_t is tested, if its spread there still permits a test.
POSITIONS = (16, 64, 128, 256)
#: Largest sample variance of log rho_t at which its sample mean is tested. The mean of a hundred skewed ratios in
#: its own standard errors has a longer lower tail than a normal: beyond -5.6 about once in 30,000 at this variance.
LARGEST_VARIANCE = 0.5
#: Largest mean chi2 at which squares of sampled ratios are tested.
LARGEST_CHI2 = 0.02
#: Fewest updates after which the shift of trained-on sequences is tested.
LEAST_UPDATES = 4


def recorded() -> Iterator[tuple[str, Trace]]:
    """Every trace of every recording, with a name that says of which."""
    for recording, traces in load_recordings().items():
        for name, trace in traces.items():
            yield f"{recording}, {name}", trace


def stopped_log_ratio(trace: Trace) -> np.ndarray:
    """(n, T) log rho_t, kept at its last value after the end of a sequence."""
    tokens = ctpo.log_ratio(trace.logp, trace.behavior_logp, trace.mask, level="token")
    return np.cumsum(tokens, axis=1)


def fixed_targets(trace: Trace) -> Trace | None:
    """The sequences on which the target is a policy fixed before they were drawn, with full support; or None."""
    if trace.kind in ("truncation", "other"):
        return None
    return trace.select(trace.held_out) if trace.kind == "update" else trace


def any_sampler(trace: Trace) -> Trace | None:
    """Wrong: takes the truncated sampler's sequences too."""
    return trace if trace.kind == "truncation" else fixed_targets(trace)


def check_mean(_context: Context, select: Callable[[Trace], Trace | None]) -> Iterator[Evidence]:
    """E_b rho_t = 1 wherever the target was fixed before the sequences were drawn."""
    z, names, errors, skipped = [], [], [], []
    for name, trace in recorded():
        chosen = select(trace)
        if chosen is None:
            continue
        log_rho = stopped_log_ratio(chosen)
        for t in sorted({min(t, log_rho.shape[1]) for t in POSITIONS}):
            values = log_rho[:, t - 1]
            rho = np.exp(values)
            error = rho.std(ddof=1) / np.sqrt(len(rho))
            gap = abs(rho.mean() - 1)
            if values.var(ddof=1) > LARGEST_VARIANCE:
                skipped.append(float(gap / error))
                continue
            errors.append(float(error))
            # A target that recomputes the behavior exactly has no spread; its ratios must be 1 to rounding.
            z.append(gap / error if error > 1e-6 else 0.0 if gap < 1e-3 else np.inf)
            names.append(f"{name} at {t}")
    limit = z_threshold(len(z))
    worst = int(np.argmax(z))
    yield Evidence(
        f"sample mean of rho_t, t = {', '.join(map(str, POSITIONS))}, for targets fixed before sampling (temperature, "
        f"weight noise, precision, updates on other sequences), where Var(log rho_t) <= {LARGEST_VARIANCE}",
        "recorded",
        f"largest |z| {z[worst]:.2f} of {len(z)} (limit {limit:.2f}), {names[worst]}; standard errors up to "
        f"{max(errors):.2f}"
        + (f"; {len(skipped)} more left out as too spread (|z| up to {max(skipped):.2f})" if skipped else ""),
        bool(z[worst] < limit),
        {
            "largest_z": float(z[worst]),
            "limit": limit,
            "tested": len(z),
            "largest_error": max(errors),
            "z_too_spread": skipped,
        },
    )


def check_truncation(_context: Context, kind: str) -> Iterator[Evidence]:
    """Every token ratio of the full model over a top-p sampler is the nucleus' mass, so rho_t only falls."""
    for trace in (trace for _, trace in recorded() if trace.kind == kind):
        tokens = ctpo.log_ratio(trace.logp, trace.behavior_logp, trace.mask, level="token")[trace.mask]
        log_rho = stopped_log_ratio(trace)
        means = [float(np.exp(log_rho[:, min(t, log_rho.shape[1]) - 1]).mean()) for t in POSITIONS]
        top_p = float(trace.meta.get("top_p", 0.0))
        # Rounding in the recorded float32 log-probabilities leaves about 1e-5.
        inside = bool(tokens.max() <= 1e-4 and tokens.min() >= np.log(max(top_p, 1e-300)) - 1e-4)
        yield Evidence(
            f"{trace.name}: token ratios are in [top_p, 1]; mean of rho_t at t = {', '.join(map(str, POSITIONS))}",
            "recorded",
            f"token ratios {np.exp(tokens.min()):.4f} to {np.exp(tokens.max()):.4f}; means "
            + ", ".join(f"{m:.2g}" for m in means),
            inside and means[-1] < 1 and all(b <= a + 1e-6 for a, b in pairwise(means)),
            {"smallest": float(np.exp(tokens.min())), "largest": float(np.exp(tokens.max())), "means": means},
        )


# --- Exact divergences at each prefix ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """The policy tokens of a trace with exact divergences, each of shape (n, T) in float64, 0 where masked."""

    mask: np.ndarray
    log_ratio: np.ndarray
    kl: np.ndarray
    chi2: np.ndarray
    log_variance: np.ndarray


def exact_tokens(trace: Trace) -> Tokens | None:
    """Log-ratios and exact divergences of a trace; None if it has none recorded."""
    if trace.kl is None or trace.chi2 is None or trace.log_variance is None:
        return None
    values = [np.where(trace.mask, x, 0.0).astype(float) for x in (trace.kl, trace.chi2, trace.log_variance)]
    return Tokens(trace.mask, ctpo.log_ratio(trace.logp, trace.behavior_logp, trace.mask, level="token"), *values)


def trained_on(trace: Trace) -> Trace | None:
    """The sequences that the target was trained on."""
    return trace.select(trace.used) if trace.used.any() else None


def chosen_tokens(select: Callable[[Trace], Trace | None]) -> Iterator[tuple[str, Trace, Tokens]]:
    """Every recorded trace that has exact divergences and is selected."""
    for name, trace in recorded():
        chosen = select(trace)
        tokens = None if chosen is None else exact_tokens(chosen)
        if chosen is not None and tokens is not None:
            yield name, chosen, tokens


def check_drift(_context: Context, select: Callable[[Trace], Trace | None]) -> Iterator[Evidence]:
    """Given the prefix, log r_t + KL(s_t) and r_t - 1 have mean 0 and exactly known variances."""
    z, names = [], []
    for name, _, tokens in chosen_tokens(select):
        for low, high in pairwise(BUCKETS):
            inside = tokens.mask[:, low - 1 : high - 1]
            if not inside.any():
                continue
            x, kl, chi2, variance = (
                value[:, low - 1 : high - 1][inside]
                for value in (tokens.log_ratio, tokens.kl, tokens.chi2, tokens.log_variance)
            )
            z += [(x + kl).sum() / np.sqrt(variance.sum()), np.expm1(x).sum() / np.sqrt(chi2.sum())]
            names += [f"log-ratio of {name} from {low}", f"ratio of {name} from {low}"]
    worst, limit = int(np.argmax(np.abs(z))), z_threshold(len(z))
    yield Evidence(
        "sum of log r_t + KL(b||pi)(s_t) over the root of the summed Var_b(log r | s_t), and of r_t - 1 over that of "
        f"chi2(s_t), for targets fixed before sampling, by position from {', '.join(map(str, BUCKETS[:-1]))}",
        "recorded",
        f"largest |z| {abs(z[worst]):.2f} of {len(z)} (limit {limit:.2f}), {names[worst]}; root mean square "
        f"{np.sqrt(np.mean(np.square(z))):.2f}",
        bool(abs(z[worst]) < limit),
        {"largest_z": float(abs(z[worst])), "limit": limit, "tested": len(z)},
    )


def chi_square(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Exact variances, given the prefix, of the log-ratio and of the ratio."""
    return tokens.log_variance, tokens.chi2


def divergence(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Wrong: KL in place of both."""
    return tokens.kl, tokens.kl


def check_second_moments(
    _context: Context, expected: Callable[[Tokens], tuple[np.ndarray, np.ndarray]]
) -> Iterator[Evidence]:
    """Squares of sampled log-ratios and ratios average what the sums over the vocabulary say."""
    z, names, errors = [], [], []
    for name, _, tokens in chosen_tokens(fixed_targets):
        if tokens.chi2[tokens.mask].mean() > LARGEST_CHI2:
            continue
        squares = (tokens.log_ratio + tokens.kl) ** 2, np.expm1(tokens.log_ratio) ** 2
        for what, square, variance in zip(("log-ratio", "ratio"), squares, expected(tokens), strict=True):
            gap = np.where(tokens.mask, square - variance, 0.0).sum(axis=1)
            error = gap.std(ddof=1) / np.sqrt(len(gap))
            z.append(gap.mean() / error)
            errors.append(float(error / variance.sum(axis=1).mean()))
            names.append(f"{what} of {name}")
    worst, limit = int(np.argmax(np.abs(z))), z_threshold(len(z))
    yield Evidence(
        "mean of (log r_t + KL)^2 against Var_b(log r | s_t), and of (r_t - 1)^2 against chi2(s_t), over sequences, "
        f"for targets fixed before sampling with mean chi2 up to {LARGEST_CHI2}",
        "recorded",
        f"largest |z| {abs(z[worst]):.2f} of {len(z)} (limit {limit:.2f}), {names[worst]}; relative standard errors "
        f"{min(errors):.2f} to {max(errors):.2f}",
        bool(abs(z[worst]) < limit),
        {"largest_z": float(abs(z[worst])), "limit": limit, "tested": len(z), "relative_errors": errors},
    )


def varying(chi2: np.ndarray) -> np.ndarray:
    """chi2 of every recorded prefix."""
    return chi2


def averaged(chi2: np.ndarray) -> np.ndarray:
    """Wrong: their mean at each."""
    return np.full_like(chi2, chi2.mean())


def check_constant(_context: Context, values: Callable[[np.ndarray], np.ndarray]) -> Iterator[Evidence]:
    """chi2(s_t) differs widely between the prefixes of one pair of policies; no sampling error is in it."""
    found = {}
    for name, _, tokens in chosen_tokens(fixed_targets):
        chi2 = np.sort(values(tokens.chi2[tokens.mask]))
        top = chi2[-max(1, len(chi2) // 100) :].sum() / chi2.sum()
        found[name] = (
            float(chi2.std() / chi2.mean()),
            float(top),
            float(chi2[len(chi2) * 9 // 10] / chi2[len(chi2) // 10]),
        )
    variation, top, spread = zip(*found.values(), strict=True)
    yield Evidence(
        "exact chi2(s_t) over the recorded prefixes of each target fixed before sampling: standard deviation over "
        "mean, share of the largest hundredth, ninth over first decile",
        "recorded",
        f"{len(found)} pairs of policies: standard deviation {min(variation):.2f} to {max(variation):.1f} times the "
        f"mean, the largest hundredth holds {min(top):.0%} to {max(top):.0%}, deciles differ {min(spread):.1f} to "
        f"{max(spread):.0f} times",
        min(variation) > 0.25,
        {name: {"variation": v, "top": t, "deciles": d} for name, (v, t, d) in found.items()},
    )


def exact_power(log_variance: np.ndarray, mask: np.ndarray) -> float:
    """Power of t by which the spread of log rho_t grows, from exact variances: no sampled token enters.

    Half the slope, on log t, of the log of the summed mean variances, weighted by 1/t as `fit_spread` does; over the
    positions that half of the sequences reach.

    Args:
        log_variance: Var_b(log r | s_t), 0 where masked, shape (n, T).
        mask: True at policy tokens, shape (n, T).
    """
    alive = mask.sum(axis=0)
    length = int(np.flatnonzero(alive >= len(mask) / 2)[-1]) + 1
    summed = (log_variance.sum(axis=0)[:length] / alive[:length]).cumsum()
    t = np.arange(1.0, length + 1.0)
    lever = np.log(t) - (np.log(t) / t).sum() / (1 / t).sum()
    return float((lever / t * np.log(summed)).sum() / (2 * (lever**2 / t).sum()))


def check_growth(_context: Context, kind: str) -> Iterator[Evidence]:
    """The exact variance of a token's log-ratio falls with its position, where sqrt(t) needs it constant."""
    found, powers = {}, []
    for name, trace, tokens in chosen_tokens(fixed_targets):
        if trace.kind != kind:
            continue
        early, late = (
            tokens.log_variance[:, part].sum() / tokens.mask[:, part].sum() for part in (slice(0, 16), slice(64, None))
        )
        found[name] = float(late / early)
        powers.append(exact_power(tokens.log_variance, tokens.mask))
    ratios = list(found.values())
    yield Evidence(
        "exact Var_b(log r | s_t), mean over the prefixes from t = 65 on over that up to t = 16, on held-out "
        "sequences; power of t by which the root of their sum over positions grows",
        "recorded",
        f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} pairs; power {min(powers):.2f} to {max(powers):.2f}",
        max(ratios) < 0.5 and max(powers) < 0.45,
        {"late_over_early": found, "powers": powers},
    )


def check_reused(_context: Context, select: Callable[[Trace], Trace | None]) -> Iterator[Evidence]:
    """For a fixed target log rho_T + sum of KL is a martingale: its square averages the sum of exact variances."""
    z, ratios, shifts = [], {}, []
    for name, trace, tokens in chosen_tokens(select):
        if trace.kind != "update" or trace.updates < LEAST_UPDATES:
            continue
        moved, variance = (tokens.log_ratio + tokens.kl).sum(axis=1), tokens.log_variance.sum(axis=1)
        ratios[name] = float((moved**2).mean() / variance.mean())
        # Sums of many small steps are near normal, so that a square has twice the squared variance.
        z.append((ratios[name] - 1) / np.sqrt(2 * (variance**2).mean() / variance.mean() ** 2 / len(moved)))
        shifts.append(float(np.corrcoef(moved, np.asarray(trace.advantages))[0, 1]))
    worst, limit = int(np.argmin(z)), z_threshold(len(z))
    values = list(ratios.values())
    yield Evidence(
        "mean of (log rho_T + sum of KL)^2 over the mean of the summed exact Var_b(log r | s_t), which is 1 for a "
        f"fixed target, on trained-on sequences after {LEAST_UPDATES} updates and more; correlation with the advantage",
        "recorded",
        f"{min(values):.1f} to {max(values):.0f} in {len(z)} pairs, z from {z[worst]:.0f} on (limit {limit:.2f}); "
        f"correlation with the advantage {min(shifts):.2f} to {max(shifts):.2f}",
        bool(z[worst] > limit),
        {"smallest_z": float(z[worst]), "limit": limit, "ratios": ratios, "correlations": shifts},
    )


def _z(gap: float, error: float) -> float:
    """A gap in standard errors; rounding alone leaves no error to speak of."""
    return gap / error if error > 1e-9 else float(np.copysign(np.inf, gap))


def in_bfloat16(name: str) -> bool:
    """Recomputed in bfloat16."""
    return "bfloat16" in name


def in_float32(name: str) -> bool:
    """Wrong: recomputed in float32."""
    return "float32" in name


def check_noise(_context: Context, which: Callable[[str], bool]) -> Iterator[Evidence]:
    """Bfloat16 alone spreads log rho_t like sqrt(t), more than the paper's policy, and lets it drift like one."""
    rows: list[dict[str, Any]] = []
    z, above = [], []
    for name, trace in recorded():
        if trace.kind != "precision" or not which(name):
            continue
        fit = fit_spread(trace.logp, trace.behavior_logp, trace.mask, seed=0)
        z += [_z(fit.power - 0.5, fit.power_se), _z(fit.drift_ratio + 0.5, fit.drift_ratio_se)]
        above.append(_z(fit.token_std - SIGMAS[0], fit.token_std_se))
        row = {"name": name, "token_std": fit.token_std, "power": fit.power, "drift_ratio": fit.drift_ratio}
        if (tokens := exact_tokens(trace)) is not None:
            row["exact_drift_ratio"] = -float(tokens.kl.sum() / tokens.log_variance.sum())
        rows.append(row)
    limit = z_threshold(len(z) + len(above))
    spreads, powers = ([float(row[key]) for row in rows] for key in ("token_std", "power"))
    exact = [float(row["exact_drift_ratio"]) for row in rows if "exact_drift_ratio" in row]
    yield Evidence(
        "the model recomputed in bfloat16 from the same weights: standard deviation of a token's log-ratio, power of "
        "t, mean over variance of log rho_T (sampled, and exactly by sums over the vocabulary where recorded)",
        "recorded",
        f"{len(rows)} recomputations: token spread {min(spreads):.4f} to {max(spreads):.4f} (paper's log rho: "
        f"{SIGMAS[0]} to {SIGMAS[-1]}), power {min(powers):.2f} to {max(powers):.2f}, largest |z| of power against 1/2 "
        f"and drift/var against -1/2 {max(map(abs, z)):.2f} (limit {limit:.2f})"
        + (f"; exact drift/var {min(exact):.3f} to {max(exact):.3f}" if exact else ""),
        max(map(abs, z)) < limit and min(above) > limit and all(abs(e + 0.5) < 0.02 for e in exact),
        {"rows": rows, "limit": limit},
    )


CLAIMS = (
    Claim(
        "R.mean",
        "On SmolLM2-135M-Instruct, E_b rho_t = 1 for targets fixed before the sequences were drawn.",
        "true if",
        "untruncated sampling at temperature 1 and a target that never saw these sequences",
        "claim 1 on recorded log-probabilities",
        check_mean,
        fixed_targets,
        any_sampler,
        "the top-p sampler passed off as a full one",
        "On a real model E rho_t is 1 while its spread is small, within the error bars, which reach .1: this is the "
        "sanity check to run on your own logs.",
    ),
    Claim(
        "R.truncation",
        "Ratios of the full model over its own top-p sampler are importance ratios with mean 1.",
        "false",
        "each is the nucleus' mass, at most 1, so rho_t only falls and E_b rho_t = P_pi(prefix inside every nucleus)",
        "claim 1.support on recorded log-probabilities",
        check_truncation,
        "truncation",
        "temperature",
        "a tempered target over a full sampler",
        "The full model over its top-p sampler is no pair of policies with ratio mean 1: what top-p never samples "
        "cannot be reweighted.",
    ),
    Claim(
        "R.drift",
        "On SmolLM2-135M-Instruct a token's log-ratio drifts by -KL(b||pi) at its prefix, and its ratio not at all.",
        "true if",
        "targets fixed before the sequences were drawn",
        "claim 7 on recorded log-probabilities",
        check_drift,
        fixed_targets,
        trained_on,
        "the sequences that the target was trained on",
        "The sum of KL over the prefixes measures the drift with far less noise than log rho_t itself.",
    ),
    Claim(
        "R.second_moments",
        "On SmolLM2-135M-Instruct squares of sampled ratios and log-ratios average to chi2 and to the variance of the "
        "log-ratio, summed exactly over the vocabulary.",
        "true if",
        "targets fixed before the sequences were drawn, with a small chi2: squares of large ratios have no useful "
        "error",
        "claim 2 on recorded log-probabilities",
        check_second_moments,
        chi_square,
        divergence,
        "KL in place of chi2",
        "While the policies are close, sampled squares are a fair estimate of chi2 where the vocabulary is not summed.",
    ),
    Claim(
        "R.constant",
        "The chi-square divergence of two policies is the same at every prefix of SmolLM2-135M-Instruct.",
        "false",
        "its standard deviation over the prefixes is from half of its mean to several times it",
        "the assumption of Prop. 2(ii) in its weakest form, claim 2.product",
        check_constant,
        varying,
        averaged,
        "the mean in place of the values",
        "The product formula's assumption does not hold on a real model; what its value is off by is among the "
        "findings, and is little while the policies are close.",
    ),
    Claim(
        "R.growth",
        "On SmolLM2-135M-Instruct a policy moved by updates spreads log rho_t like sqrt(t) on fresh sequences.",
        "false",
        "these few updates move the first tokens of a response most: the variance of a token's log-ratio falls with "
        "its position, while that of rounding noise does not",
        "section 3.3 on recorded log-probabilities",
        check_growth,
        "update",
        "precision",
        "rounding in bfloat16",
        "Fit the power of the position from your own log-probabilities before a window takes it to be 1/2.",
    ),
    Claim(
        "R.reused",
        "On SmolLM2-135M-Instruct the ratios of sequences from earlier updates behave as those of fresh ones.",
        "false",
        "log rho_T strays from its drift much further than any target fixed beforehand permits, with the advantage",
        "claim 13 on recorded log-probabilities",
        check_reused,
        trained_on,
        fixed_targets,
        "sequences that no update has seen",
        "In the second epoch the ratio reports what the first did to this very sequence.",
    ),
    Claim(
        "R.noise",
        "On SmolLM2-135M-Instruct bfloat16 alone, with unchanged weights, spreads log rho_t like sqrt(t), with a "
        "larger spread per token than the paper reports for its training, and lets it drift by half of its variance.",
        "true if",
        "this model on this processor, float32 against bfloat16",
        "claim 12 on recorded log-probabilities",
        check_noise,
        in_bfloat16,
        in_float32,
        "recomputation in float32",
        "Neither the sqrt(t) law nor the drift of -variance/2 shows that a policy has moved: measure your own floor.",
    ),
)
