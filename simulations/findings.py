"""Findings on the recorded traces, and the series that figures are drawn from.

Findings describe one model, a few prompts and one recording. They are neither passed nor failed; what must hold
whatever they are is checked by the claims R.*.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import ctpo
from ctpo import diagnostics
from simulations import toy_lm
from simulations.claims.effective_sample_size import binary_world
from simulations.claims.real_model import stopped_log_ratio
from simulations.claims.registry import Context
from simulations.exact import ratio_moments
from simulations.mdp import random_chain
from simulations.monte_carlo import RatioByPosition, estimate
from simulations.traces import Trace, load_traces

#: The windows whose clip rates are reported.
WINDOWS = ("ctpo", "ctpo_fixed", "grpo")
SPREAD_NOTE = (
    "Spread and drift of log rho over t <= T, standard errors over sequences. A fixed target with uncorrelated tokens "
    "has power 1/2, variance ratio 1 and drift/var near -1/2 (the errors are large where the spread is small). Trained "
    "on: the target's updates used these sequences. E rho_T is the sample mean with rho kept at its last value after "
    "the end; where the spread is large it usually falls short of the truth. One model, one recording."
)
CLIP_NOTE = (
    "Share of policy tokens that each window clips, by position, at the recorded group-standardized advantages of a "
    "text statistic. The policies moved are tiny updates of one model; training runs differ."
)


def splits() -> Iterator[tuple[str, Trace]]:
    """The recorded pairs, an updated target once on the sequences it was trained on and once on the others."""
    for name, trace in load_traces().items():
        if trace.kind == "update":
            yield f"{name}, trained on", trace.select(trace.used)
            yield f"{name}, held out", trace.select(trace.held_out)
        else:
            yield name, trace


def tables() -> list[dict[str, Any]]:
    """Findings as tables: title, note and rows."""
    spread, clips = [], []
    model = ""
    for name, trace in splits():
        model = str(trace.provenance.get("model", "language model"))
        spread.append(_spread_row(name, trace))
        if trace.advantages is not None:
            clips.append(_clip_row(name, trace))
    return [
        {"title": f"Findings on {model}: spread and drift", "note": SPREAD_NOTE, "rows": spread},
        {"title": f"Findings on {model}: % clipped at t = 1-16, 17-64, 65-256", "note": CLIP_NOTE, "rows": clips},
    ]


def _spread_row(name: str, trace: Trace) -> dict[str, Any]:
    fit = diagnostics.fit_spread(trace.logp, trace.behavior_logp, trace.mask)
    log_rho = stopped_log_ratio(trace)
    last = log_rho[:, fit.horizon - 1]
    rho = np.exp(last)
    ess = diagnostics.effective_sample_size(log_rho) / len(log_rho)
    return {
        "pair": name,
        "n": fit.n_sequences,
        "T": fit.horizon,
        "token sd": fit.token_std,
        "sigma": fit.sigma,
        "power": _pm(fit.power, fit.power_se),
        "variance ratio": _pm(fit.variance_ratio, fit.variance_ratio_se),
        "drift/var": _pm(fit.drift_ratio, fit.drift_ratio_se),
        "E rho_T": _pm(float(rho.mean()), float(rho.std(ddof=1) / np.sqrt(len(rho)))),
        "ESS T/4": float(ess[fit.horizon // 4 - 1]),
        "ESS T": float(ess[fit.horizon - 1]),
    }


def _pm(value: float, error: float) -> str:
    """A value with its standard error, to the error's leading digits."""
    if not np.isfinite(value):
        return "-"
    if not np.isfinite(error) or error <= 0:
        return f"{value:.3g}"
    if error >= 1000:
        return f"{value:.2g} ± {error:.2g}"
    digits = min(max(0, 1 - int(np.floor(np.log10(error)))), 4)
    return f"{round(value, digits) + 0.0:.{digits}f} ± {error:.{digits}f}"


def _clip_row(name: str, trace: Trace) -> dict[str, Any]:
    row: dict[str, Any] = {"pair": name}
    for window in WINDOWS:
        table = diagnostics.by_position(
            trace.logp,
            trace.behavior_logp,
            trace.mask,
            advantages=trace.advantages,
            estimator=window,
            edges=[1, 17, 65, 257],
            pareto=False,
        )
        rates = [100 * float(rate) for rate in table["clip_total"]]
        row[window] = ", ".join(f"{rate:.1f}" for rate in rates)
    return row


def series(context: Context) -> dict[str, Any]:
    """Numbers by position for the figures."""
    synthetic = []
    sigma, horizon = 0.0335, 4096
    worlds = {
        "independent binary tokens, sigma = 0.0335": binary_world(sigma, horizon),
        "trigram model of a text, small step": toy_lm.fitted_ngram(
            context.rng("series"), order=3, horizon=horizon, step=0.15
        ),
    }
    at = np.unique(np.geomspace(1, horizon, 60).astype(int))
    for name, world in worlds.items():
        moments = ratio_moments(world)
        assert moments.mean_log is not None
        assert moments.var_log is not None
        synthetic.append(
            {
                "name": name,
                "t": at.tolist(),
                "mean": moments.mean_log[at].tolist(),
                "std": np.sqrt(moments.var_log[at]).tolist(),
                "ess": moments.ess_fraction[at].tolist(),
            }
        )
    recorded = []
    for name, trace in splits():
        values = ctpo.log_ratio(trace.logp, trace.behavior_logp, trace.mask)
        alive = trace.mask.sum(axis=0)
        length = int(np.flatnonzero(alive >= max(2, len(values) // 2))[-1]) + 1
        columns = np.where(trace.mask, values, np.nan)[:, :length]
        recorded.append(
            {
                "name": name,
                "kind": trace.kind,
                "t": list(range(1, length + 1)),
                "mean": np.nanmean(columns, axis=0).tolist(),
                "std": np.nanstd(columns, axis=0, ddof=1).tolist(),
                "n": alive[:length].tolist(),
            }
        )
    return {"synthetic": synthetic, "recorded": recorded, "monte_carlo": _exact_against_sampled(context)}


def _exact_against_sampled(context: Context) -> dict[str, Any]:
    horizon, n = 256, context.count(20_000)
    world = random_chain(context.rng("exact against sampled"), n_states=8, n_actions=4, horizon=horizon, step=0.2)
    moments = ratio_moments(world)
    assert moments.mean_log is not None
    assert moments.var_log is not None
    result = estimate(world, RatioByPosition(), n=n, seed=context.sequence("exact against sampled"))
    assert result.variance_error is not None
    return {
        "world": world.name,
        "n": n,
        "t": list(range(1, horizon + 1)),
        "exact_mean_log": moments.mean_log[1:].tolist(),
        "sampled_mean_log": result.mean[horizon:].tolist(),
        "error_mean_log": result.standard_error[horizon:].tolist(),
        "exact_variance": moments.variance[1:].tolist(),
        "sampled_variance": result.variance[:horizon].tolist(),
        "error_variance": result.variance_error[:horizon].tolist(),
    }
