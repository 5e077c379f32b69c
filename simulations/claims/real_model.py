"""What must hold on recorded log-probabilities of a real language model, whatever its numbers turn out to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

import ctpo
from simulations.claims.registry import Claim, Context, Evidence
from simulations.monte_carlo import z_threshold
from simulations.traces import Trace, load_traces

#: Positions at which the mean of rho_t is tested, if its spread there still permits a test.
POSITIONS = (16, 64, 128, 256)
#: Largest sample variance of log rho_t at which its sample mean is tested. The mean of a hundred skewed ratios in
#: its own standard errors has a longer lower tail than a normal: beyond -5.6 about once in 30,000 at this variance.
LARGEST_VARIANCE = 0.5


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
    for name, trace in load_traces().items():
        chosen = select(trace)
        if chosen is None:
            continue
        log_rho = stopped_log_ratio(chosen)
        for t in POSITIONS:
            values = log_rho[:, min(t, log_rho.shape[1]) - 1]
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
        + (f"; {len(skipped)} too spread to test (|z| up to {max(skipped):.2f})" if skipped else ""),
        bool(z[worst] < limit),
        {
            "largest_z": float(z[worst]),
            "limit": limit,
            "tested": len(z),
            "largest_error": max(errors),
            "z_too_spread": skipped,
        },
    )


def truncated_only(traces: dict[str, Trace]) -> list[Trace]:
    """Traces of a top-p sampler."""
    return [trace for trace in traces.values() if trace.kind == "truncation"]


def tempered_only(traces: dict[str, Trace]) -> list[Trace]:
    """Wrong: traces of a full sampler."""
    return [trace for trace in traces.values() if trace.kind == "temperature"]


def check_truncation(_context: Context, select: Callable[[dict[str, Trace]], list[Trace]]) -> Iterator[Evidence]:
    """Every token ratio of the full model over a top-p sampler is the nucleus' mass, so rho_t only falls."""
    for trace in select(load_traces()):
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
        "On a real model the ratio behaves as theory says, while its spread is small: this is the sanity check to "
        "run on your own logs.",
    ),
    Claim(
        "R.truncation",
        "Ratios of the full model over its own top-p sampler are importance ratios with mean 1.",
        "false",
        "each is the nucleus' mass, at most 1, so rho_t only falls and E_b rho_t = P_pi(prefix inside every nucleus)",
        "claim 1.support on recorded log-probabilities",
        check_truncation,
        truncated_only,
        tempered_only,
        "a tempered target over a full sampler",
        "Log-probabilities of the full model are the wrong denominator for samples of a top-p sampler.",
    ),
)
