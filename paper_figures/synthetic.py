"""Figures on synthetic worlds by position t: spread and drift of log rho_t, and exact against sampled moments."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import data, style
from paper_figures.data import Positions, Results

#: Below this many samples that carry a variance, its standard error is not to be believed.
LEAST_SAMPLES = 500
#: Family-wise level at which sampled and exact moments are said to differ.
LEVEL = 1e-6
WORLD_COLORS = (style.BLUE, style.VERMILION, style.GREEN, style.PURPLE, style.ORANGE)


def spread_and_drift(results: Results) -> Figure:
    """Spread and drift of log rho_t with the lines sigma sqrt(t) and -sigma^2 t / 2."""
    worlds = sorted(data.synthetic(results), key=lambda world: -world.std[-1])
    figure = style.sheet(
        8,
        3.8,
        "Synthetic worlds: the log-ratio spreads like √t and drifts down like t"
        if all(_lawful(world) for world in worlds)
        else "Synthetic worlds: spread and drift of the log-ratio by position",
        r"Dots: exact, by dynamic programming. Lines: $\sigma\sqrt{t}$, and the mean $-\sigma^2 t/2$, "
        r"with one $\sigma^2 = \mathrm{Var}(\log\rho_T)\,/\,T$ for each world.",
        data.source(results),
    )
    spread, drift = figure.subplots(1, 2)
    style.log_axes(spread, style.POSITION, style.SPREAD)
    style.log_axes(drift, style.POSITION, r"$-$ mean of $\log\rho_t$ (nats)")
    spread.set_title("Spread")
    drift.set_title("Drift, downward")
    for k, world in enumerate(worlds):
        color = WORLD_COLORS[k % len(WORLD_COLORS)]
        sigma = float(world.std[-1] / np.sqrt(world.t[-1]))
        _draw_world(spread, world, world.std, sigma * np.sqrt(world.t), color)
        _draw_world(drift, world, -world.mean, sigma**2 * world.t / 2, color)
        name = world.name.replace("sigma", "σ")
        name = name if "σ" in name else f"{name}, σ = {sigma:.2g}"
        # The first, which lies highest, is named above its line, the others below theirs.
        above = k == 0
        at = _evenly(np.log(world.t), 9)[5 if above else 4] if len(world.t) >= 9 else 0
        for axes, law in ((spread, sigma * np.sqrt(world.t[at])), (drift, sigma**2 * world.t[at] / 2)):
            axes.annotate(
                name.replace(", ", ",\n"),
                (world.t[at], law),
                xytext=(-8, 8) if above else (10, -8),
                textcoords="offset points",
                ha="right" if above else "left",
                va="bottom" if above else "top",
                color=color,
            )
    return figure


def _draw_world(axes: Axes, world: Positions, values: np.ndarray, law: np.ndarray, color: str) -> None:
    some = _evenly(np.log(world.t), 18)
    axes.plot(world.t, law, color=color, linewidth=1.0)
    shown = np.where(values > 0, values, np.nan)[some]
    axes.plot(world.t[some], shown, "o", color=color, markersize=3.6, markerfacecolor="white")


def _lawful(world: Positions) -> bool:
    """Whether spread and drift grow like sqrt(t) and t over the last four doublings of t."""
    first = int(np.searchsorted(world.t, world.t[-1] / 16))
    return all(
        0 < values[first] < values[-1]
        and abs(np.log(values[-1] / values[first]) / np.log(world.t[-1] / world.t[first]) - power) < 0.05
        for values, power in ((world.std, 0.5), (-world.mean, 1.0))
    )


def exact_against_sampled(results: Results) -> Figure:
    """Mean of log rho_t and variance of rho_t: exact, sampled with error bars, and their difference as z."""
    found = data.sampled(results)
    trusted = np.logical_and.accumulate(found.variance_samples >= LEAST_SAMPLES)
    tested = {"mean": found.z("mean"), "variance": np.where(trusted, found.z("variance"), np.nan)}
    worst = max(np.abs(tested["mean"]).max(), np.abs(tested["variance"][trusted]).max(initial=0))
    limit = NormalDist().inv_cdf(1 - LEVEL / 2 / (len(found.t) + trusted.sum()))
    title = f"Exact and sampled moments {'agree' if worst < limit else 'DIFFER'}"
    if not trusted.all():
        title += f", until the tail of ρ outruns the sample (t ≥ {found.t[~trusted][0]:.0f})"
    figure = style.sheet(
        8,
        5.2,
        title,
        f"World: {found.world}. {found.n:,} sequences, error bars ± 2 standard errors. "
        f"Largest |z| tested {worst:.1f}, limit {limit:.1f} (dashed).\n"
        f"Gray: fewer than {LEAST_SAMPLES} effective samples carry the variance, so its error bar cannot be believed.",
        data.source(results),
    )
    grid = figure.subplots(2, 2, sharex=True, height_ratios=(3, 2))
    labels = {"mean": r"mean of $\log\rho_t$ (nats)", "variance": r"variance of $\rho_t$"}
    some = _evenly(found.t, 22)
    for (values, z), (moment, label) in zip(grid.T, labels.items(), strict=True):
        values.plot(found.t, found.exact[moment], color=style.INK, linewidth=1.1)
        middle, bar = found.sampled[moment][some], 2 * found.error[moment][some]
        values.errorbar(found.t[some], middle, bar, fmt="o", color=style.VERMILION, markersize=3, linewidth=0.9)
        values.set_ylabel(label)
        z.plot(found.t, found.z(moment), color=style.GRAY, linewidth=0.7)
        z.plot(found.t, tested[moment], color=style.VERMILION, linewidth=1.2)
        for side in (-limit, limit):
            z.axhline(side, color=style.GRAY, linewidth=0.8, linestyle="--")
        z.set_ylabel("z: (sampled − exact)\n/ standard error")
        z.set_xlabel(style.POSITION)
    grid[0, 0].set_xlim(0, 1.02 * found.t[-1])
    grid[0, 1].set_yscale("log")
    style.plain_numbers(grid[0, 1].yaxis)
    # Error bars that reach below 0 end at the axis.
    grid[0, 1].set_ylim(found.exact["variance"].min() / 2)
    low, high = zip(*(axes.get_ylim() for axes in grid[1]), strict=True)
    for axes in grid[1]:
        axes.set_ylim(min(low), max(high))
    at = int(0.6 * len(found.t))
    point, near = (found.t[at], found.exact["mean"][at]), {"textcoords": "offset points"}
    grid[0, 0].annotate("exact", point, xytext=(6, 4), ha="left", **near)
    grid[0, 0].annotate("sampled", point, xytext=(-6, -10), ha="right", color=style.VERMILION, **near)
    if not trusted.all():
        start = found.t[~trusted][0]
        for axes in grid[:, 1]:
            axes.axvspan(start, 1.02 * found.t[-1], color=style.PALE, linewidth=0, zorder=0)
        corner = (start, min(low))
        grid[1, 1].annotate("not tested", corner, xytext=(4, 4), color=style.GRAY, **near)
    return figure


def _evenly(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of at most `count` of the ascending values, as evenly spaced as they allow."""
    wanted = np.linspace(values[0], values[-1], count)
    return np.unique([int(np.abs(values - value).argmin()) for value in wanted])
