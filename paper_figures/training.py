"""Toy training: learning curves of the true objective by problem and staleness, and all methods in two tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from paper_figures import data, style
from paper_figures.data import Learned, Results

FILE = "training.json"
#: The run with fresh samples, which is no method.
REFERENCE = "on-policy"
#: Color and width of the methods whose curves are drawn; the tables have all.
LINES: dict[str, tuple[style.Color, float]] = {
    REFERENCE: (style.INK, 1.1),
    "reinforce": (style.GRAY, 1.3),
    "grpo": (style.ORANGE, 1.3),
    "gspo": (style.PURPLE, 1.3),
    "ctpo": (style.VERMILION, 2.0),
    "sequence": (style.GREEN, 1.3),
    "dr_behavior": (style.BLUE, 1.3),
}
#: From the best of a column, white, to this much below it.
SHADED = 0.4
SHADES = LinearSegmentedColormap.from_list("below", ["#FFFFFF", "#F6C6A0", "#D9804A"])


def training(results: Results) -> Figure:
    """A row of learning curves for each problem, a column for each staleness; below, all methods in two tables."""
    found = data.training(results)
    problems = list(dict.fromkeys(run.problem for run in found))
    stale = sorted({run.staleness for run in found})
    methods = list(dict.fromkeys(run.method for run in found))
    below = 0.145 * len(methods) + 0.75
    figure = style.sheet(
        8,
        1.6 * len(problems) + below + 1.0,
        _title(found),
        "Curves: true objective, mean and pointwise 95% interval over seeds, methods at the learning rate and window "
        "width that\nwere best on other seeds. The sampler is refreshed every K updates; dashed: at every update, with "
        "as many samples.\nTables: all methods, shaded by the distance from the best; bold: not told from the best.",
        data.source(results, FILE),
    )
    rows = figure.add_gridspec(2, 1, height_ratios=(1.6 * len(problems), below))
    grid = rows[0].subgridspec(len(problems), len(stale), wspace=0.04)
    for row, problem in enumerate(problems):
        first: Axes | None = None
        for column, staleness in enumerate(stale):
            axes = figure.add_subplot(grid[row, column], sharey=first)
            first = first or axes
            some = [run for run in found if (run.problem, run.staleness) == (problem, staleness)]
            _draw_curves(axes, some)
            axes.set_title(f"{problem}, K = {staleness}" if column == 0 else f"K = {staleness}")
            if column:
                axes.tick_params(labelleft=False)
            else:
                axes.set_ylabel("share of optimum")
            if row == len(problems) - 1:
                axes.set_xlabel("updates (log scale)")
            else:
                axes.tick_params(labelbottom=False)
    tables = rows[1].subgridspec(1, 2, wspace=0.02)
    _draw_table(figure.add_subplot(tables[0]), found, "share", "Mean share of the optimum")
    _draw_table(figure.add_subplot(tables[1]), found, "cosine", "Cosine with the true gradient")
    figure.draw_without_rendering()
    for axes in figure.axes[len(stale) - 1 : len(problems) * len(stale) : len(stale)]:
        _name_lines(axes, found)
    return figure


def _title(found: Sequence[Learned]) -> str:
    """Who leads, in how many cells."""
    cells = len({(run.problem, run.staleness) for run in found})
    leads: dict[str, int] = {}
    for run in found:
        if run.method != REFERENCE:
            leads[run.label] = leads.get(run.label, 0) + run.leading
    best = max(leads, key=lambda name: leads[name])
    others = "" if best == "CTPO" else f", CTPO in {leads.get('CTPO', 0)}"
    return f"Small models, stale samples: {best} is among the best in {leads[best]} of {cells} cases{others}"


def _draw_curves(axes: Axes, runs: Sequence[Learned]) -> None:
    for run in runs:
        if run.method in LINES:
            color, width = LINES[run.method]
            dashes = "--" if run.method == REFERENCE else "-"
            axes.fill_between(run.updates, run.curve["low"], run.curve["high"], color=color, alpha=0.15, linewidth=0)
            axes.plot(run.updates, run.curve["mean"], color=color, linewidth=width, linestyle=dashes, label=run.method)
    first, last = float(runs[0].updates[1]), float(runs[0].updates[-1])
    axes.set_xscale("log")
    axes.set_xlim(first, last)
    axes.xaxis.set_major_locator(FixedLocator([first * 4**k for k in range(5) if first * 4**k <= last]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: style.plain(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def _name_lines(axes: Axes, found: Sequence[Learned]) -> None:
    names = {run.method: run.label for run in found}
    ends = [
        (float(np.asarray(line.get_ydata())[-1]), names[str(line.get_label())], LINES[str(line.get_label())][0])
        for line in axes.lines
    ]
    height = axes.get_window_extent().height / style.DPI * 72
    style.label_ends(axes, ends, size=6.5, height=height)


def _draw_table(axes: Axes, found: Sequence[Learned], quantity: str, title: str) -> None:
    """A row for each method, a column for each problem and staleness; shaded by the distance from the column's best."""
    methods = list(dict.fromkeys(run.method for run in found))
    columns = list(dict.fromkeys((run.problem, run.staleness) for run in found))
    values = np.full((len(methods), len(columns)), np.nan)
    bold = np.zeros(values.shape, dtype=bool)
    for run in found:
        place = methods.index(run.method), columns.index((run.problem, run.staleness))
        values[place] = getattr(run, quantity)
        bold[place] = quantity == "share" and run.leading
    gap = np.nanmax(values, axis=0) - values
    axes.imshow(gap, cmap=SHADES, vmin=0, vmax=SHADED, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = "–" if np.isnan(value) else f"{value:.2f}".replace("0.", ".", 1)
        weight = "bold" if bold[row, column] else "normal"
        axes.text(column, row, text, ha="center", va="center", fontsize=5.8, fontweight=weight)
    labels = {run.method: run.label for run in found}
    axes.set_yticks(range(len(methods)), [labels[method] for method in methods], fontsize=6.5)
    axes.set_xticks(range(len(columns)), [f"{staleness}" for _, staleness in columns], fontsize=6.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=1.5)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    above = axes.get_xaxis_transform()
    axes.text(-0.02, 1.015, "K =", ha="right", va="bottom", fontsize=6.5, transform=axes.transAxes)
    for problem in dict.fromkeys(name for name, _ in columns):
        here = [k for k, (name, _) in enumerate(columns) if name == problem]
        axes.text(float(np.mean(here)), 1.08, problem, ha="center", va="bottom", fontsize=7, transform=above)
        if here[0]:
            axes.axvline(here[0] - 0.5, color="white", linewidth=2.5)
    axes.set_title(title, pad=22)
