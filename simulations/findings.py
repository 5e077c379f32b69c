"""Findings on the recorded traces, and the series that figures are drawn from.

Findings describe one model, a few prompts and three recordings, which are kept apart. They are neither passed nor
failed; what must hold whatever they are is checked by the claims R.*.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

import ctpo
from ctpo import diagnostics
from simulations import toy_lm
from simulations.claims import released_loss, rollout_correction
from simulations.claims.effective_sample_size import binary_world
from simulations.claims.real_model import Tokens, exact_power, exact_tokens, stopped_log_ratio
from simulations.claims.registry import Context
from simulations.exact import ratio_moments
from simulations.mdp import random_chain
from simulations.monte_carlo import RatioByPosition, estimate
from simulations.traces import Trace, load_recordings, load_traces

#: The windows whose clip rates are reported, beside the first one centered on the drift.
WINDOWS = ("ctpo", "ctpo_fixed", "grpo")
#: Var(log rho_T) beyond which a sample mean of rho_t^2 is not to be believed.
LARGEST_VARIANCE = 0.5
SPREAD_NOTE = (
    "Spread and drift of log rho over t <= T, standard errors over sequences. A fixed target with uncorrelated tokens "
    "has power 1/2, variance ratio 1 and drift/var near -1/2 (the errors are large where the spread is small). Trained "
    "on: the target's updates used these sequences. E rho_T is the sample mean with rho kept at its last value after "
    "the end; where the spread is large it usually falls short of the truth. One model, one recording."
)
EXACT_NOTE = (
    "Sums over the whole vocabulary at each recorded prefix of the behavior, so without sampling error of the token; "
    "standard errors over prompts (jackknife for power and product error). Updated targets on held-out sequences. "
    "Power: of t in the root of the summed exact variances of log r. Only ESS is of the sampled tokens. Drift/var: "
    "-(mean KL) / (mean Var_b(log r|s)), -1/2 for Gaussian log-ratios. CV and top 1%: standard deviation of chi2(s) "
    "over its mean, and the share of its sum that the largest hundredth of prefixes holds; a prefix-constant chi2 has "
    "0 and 1%. Late/early: mean chi2 from t = 65 on over that up to 16. Product error: log of E rho_T^2 over that of "
    "the product formula, minus 1, in percent; 0 if Cov_b(rho_(t-1)^2, chi2(s_t)) vanishes."
)
REUSE_NOTE = (
    "(log rho_T + sum of KL)^2 averages the sum of exact variances for a fixed target: 'excess' is the quotient, 1 for "
    "importance ratios. Own: sequences that the updates used; same group: not used, but their rewards entered the "
    "advantages of those that were; held out: neither. Epochs: how often each used sequence was used. Standard errors "
    "over prompts (eight), so rough. The last columns are the % of tokens that the ctpo window clips. Compare one pass "
    "over eight mini-batches (updates_8) with four over two (repeated_8): in the first the next loss term is a same "
    "group or held-out one, in the second an own one."
)
CLIP_NOTE = (
    "Share of policy tokens that each window clips, by position, at the recorded group-standardized advantages of a "
    "text statistic, with standard errors over prompts. Centered: the ctpo window around -drift t, the drift being the "
    "mean of r - 1 - log r over the sequences not trained on. The policies moved are tiny updates of one model; "
    "training runs differ."
)


def splits(traces: Mapping[str, Trace]) -> Iterator[tuple[str, Trace]]:
    """Recorded pairs, an updated target once on the sequences it was trained on and once on the held-out ones."""
    for name, trace in traces.items():
        if trace.kind == "update":
            yield f"{name}, trained on", trace.select(trace.used)
            yield f"{name}, held out", trace.select(trace.held_out)
        else:
            yield name, trace


def tables(groups: Collection[str]) -> list[dict[str, Any]]:
    """Findings that go with some groups of claims, as tables: group, title, note and rows."""
    found: list[dict[str, Any]] = []
    for group, make in (("10", released_loss.table), ("11", rollout_correction.table)):
        if group in groups:
            found.append({"group": group, **make()})
    if "R" in groups:
        found += [{"group": "R", **table} for table in recorded_tables()]
    return found


def recorded_tables() -> list[dict[str, Any]]:
    """Findings on the recorded language model: title, note and rows."""
    spread, exact, reuse, clips = [], [], [], []
    recordings = load_recordings()
    for name, trace in splits(load_traces()):
        spread.append(_spread_row(name, trace))
    for recording, traces in recordings.items():
        for name, trace in traces.items():
            fixed = trace.select(trace.held_out)
            tokens = exact_tokens(fixed)
            if tokens is not None:
                exact.append({"recording": recording, **_exact_row(name, fixed, tokens)})
                if trace.kind == "update":
                    reuse.append({"recording": recording, **_reuse_row(name, trace)})
        for name, trace in splits(traces):
            if trace.advantages is not None and trace.prompt is not None:
                whole = traces[name.split(",")[0]]
                clips.append({"recording": recording, **_clip_row(name, trace, whole.select(whole.held_out))})
    model = str(next(iter(load_traces().values())).provenance.get("model", "language model"))
    return [
        {"title": f"Findings on {model}: spread and drift (seed 0)", "note": SPREAD_NOTE, "rows": spread},
        {"title": f"Findings on {model}: exact divergences at each prefix", "note": EXACT_NOTE, "rows": exact},
        {"title": f"Findings on {model}: epochs against more mini-batches", "note": REUSE_NOTE, "rows": reuse},
        {"title": f"Findings on {model}: % clipped at t = 1-16, 17-64, 65-256", "note": CLIP_NOTE, "rows": clips},
    ]


def clustered(numerator: np.ndarray, denominator: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """A quotient of sums and its linearized standard error over independent groups.

    Args:
        numerator: What each sequence adds to the upper sum, shape (n,).
        denominator: The same for the lower one.
        group: Label of each sequence's group, shape (n,).
    """
    value = float(numerator.sum() / denominator.sum())
    _, label = np.unique(group, return_inverse=True)
    moved = np.bincount(label, weights=numerator - value * denominator)
    if len(moved) < 2:
        return value, float("nan")
    error = np.sqrt(len(moved) / (len(moved) - 1) * (moved**2).sum()) / abs(denominator.sum())
    return value, float(error)


def product_error(log_ratio: np.ndarray, chi2: np.ndarray) -> float:
    """Log of E rho_T^2 over the log of the product formula's value, minus 1.

    E rho_t^2 = E rho_(t-1)^2 (1 + the mean of chi2(s_t) weighted by rho_(t-1)^2): next to the plain mean of the product
    formula, the weighted one shows the covariance alone, and most noise of the weights cancels.

    Args:
        log_ratio: log r_t of the sampled tokens, 0 after the end of a sequence, shape (n, T).
        chi2: chi2(s_t) at their prefixes, 0 after the end, shape (n, T).
    """
    before = np.cumsum(log_ratio, axis=1) - log_ratio
    weight = np.exp(2 * before)
    weighted = (weight * chi2).sum(axis=0) / weight.sum(axis=0)
    return float(np.log1p(weighted).sum() / np.log1p(chi2.mean(axis=0)).sum() - 1.0)


def _jackknifed(statistic: Callable[[np.ndarray], float], group: np.ndarray) -> tuple[float, float]:
    """A statistic of rows, given as a bool array of those to take, and its jackknife error over groups."""
    labels = np.unique(group)
    left_out = np.array([statistic(group != label) for label in labels])
    k = len(labels)
    error = np.sqrt((k - 1) / k * ((left_out - left_out.mean()) ** 2).sum()) if k > 1 else float("nan")
    return statistic(np.ones(len(group), dtype=bool)), float(error)


def _exact_row(name: str, trace: Trace, tokens: Tokens) -> dict[str, Any]:
    group = np.asarray(trace.prompt)
    kl, variance, chi2 = (x.sum(axis=1) for x in (tokens.kl, tokens.log_variance, tokens.chi2))
    every = tokens.chi2[tokens.mask]
    top = np.sort(every)[-max(1, len(every) // 100) :].sum() / every.sum()
    drift, drift_error = clustered(-kl, variance, group)
    sigma2, sigma2_error = clustered(variance, tokens.mask.sum(axis=1), group)
    early, late = (tokens.chi2[:, part].sum() / tokens.mask[:, part].sum() for part in (slice(0, 16), slice(64, None)))
    error = "-"
    if tokens.log_ratio.sum(axis=1).var(ddof=1) <= LARGEST_VARIANCE:
        value, spread = _jackknifed(lambda rows: product_error(tokens.log_ratio[rows], tokens.chi2[rows]), group)
        error = _pm(100 * value, 100 * spread)
    power = _jackknifed(lambda rows: exact_power(tokens.log_variance[rows], tokens.mask[rows]), group)
    ess = diagnostics.effective_sample_size(stopped_log_ratio(trace)[:, -1]) / len(group)
    return {
        "pair": name,
        "sigma": _pm(np.sqrt(sigma2), sigma2_error / (2 * np.sqrt(sigma2))),
        "power": _pm(*power),
        "ESS T": float(ess),
        "drift/var": _pm(drift, drift_error),
        "chi2/var": _pm(*clustered(chi2, variance, group)),
        "CV of chi2": float(every.std() / every.mean()),
        "top 1%": f"{top:.0%}",
        "late/early": float(late / early),
        "product error %": error,
    }


def _reuse_row(name: str, trace: Trace) -> dict[str, Any]:
    used, per_pass = trace.updates, int(trace.meta["updates_per_pass"])
    row: dict[str, Any] = {
        "pair": name,
        "learning rate": f"{trace.meta['learning_rate']:g}",
        "epochs": max(1.0, used / per_pass),
    }
    parts = {"own": trace.used, "same group": trace.same_group, "held out": trace.held_out}
    rates = {}
    for label, rows in parts.items():
        tokens = exact_tokens(trace.select(rows)) if rows.any() else None
        if tokens is None:
            row[f"excess, {label}"] = rates[label] = "-"
            continue
        group = np.asarray(trace.prompt)[rows]
        moved = (tokens.log_ratio + tokens.kl).sum(axis=1)
        row[f"excess, {label}"] = _pm(*clustered(moved**2, tokens.log_variance.sum(axis=1), group))
        rates[label] = _clip_rates(trace.select(rows), ctpo.get_estimator("ctpo"), [1, 257])
    return row | {f"% clipped, {label}": rate for label, rate in rates.items()}


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


def _clip_row(name: str, trace: Trace, fresh: Trace) -> dict[str, Any]:
    drift = diagnostics.fit_spread(fresh.logp, fresh.behavior_logp, fresh.mask, bootstrap=2, seed=0).token_kl
    row: dict[str, Any] = {"pair": name}
    estimators = {window: ctpo.get_estimator(window) for window in WINDOWS}
    estimators["ctpo centered"] = ctpo.get_estimator("ctpo", clip=ctpo.PositionClip(drift=drift))
    for label, estimator in estimators.items():
        row[label] = _clip_rates(trace, estimator, [1, 17, 65, 257])
    return row


def _clip_rates(trace: Trace, estimator: ctpo.Estimator, edges: list[int]) -> str:
    """Percent of tokens clipped in each bucket, with standard errors over prompts."""
    table = diagnostics.by_position(
        trace.logp,
        trace.behavior_logp,
        trace.mask,
        advantages=trace.advantages,
        estimator=estimator,
        edges=edges,
        groups=trace.prompt,
        pareto=False,
    )
    rates = zip(100 * table["clip_total"], 100 * table["clip_total_se"], strict=True)
    # Whole percents where there are many.
    return ", ".join(f"{rate:.0f}±{error:.0f}" if rate >= 9.5 else f"{rate:.1f}±{error:.1f}" for rate, error in rates)


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
    for name, trace in splits(load_traces()):
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
