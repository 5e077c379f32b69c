"""Figure of bias and variance by ratio."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import data, style
from paper_figures.data import Ratio, Results

FORMULAS = {
    "token": r"$r_t$",
    "cumulative": r"$\rho_t$",
    "cumulative mean": r"$\rho_t^{\,1/t}$",
    "sequence": r"$\rho_H$",
    "sequence mean (GSPO)": r"$\rho_H^{\,1/H}$",
}


def bias_and_variance(results: Results) -> Figure:
    """Relative bias and relative variance of each ratio over the worlds of Table 1."""
    ratios = data.table_one(results)
    figure = style.sheet(
        8,
        3.7,
        finding(ratios),
        f"Each dot: one of {len(ratios[0].relative_bias)} small worlds, enumerated; bar: median. Exact advantage "
        r"$A^\pi$, no clipping." + "\n"
        "Cumulative below 1 is a theorem for orthogonal scores (logits per prefix or position), not in general.",
        data.source(results),
    )
    bias, variance = figure.subplots(1, 2, sharey=True)
    draw_bias(bias, ratios)
    bias.set_title("Bias")
    draw_variance(variance, ratios)
    variance.set_title("Variance")
    figure.align_xlabels()
    return figure


def finding(ratios: Sequence[Ratio]) -> str:
    """The title: which ratios are unbiased, and which of them varies least."""
    if not as_claimed(ratios):
        return f"Unbiased ratios: {', '.join(ratio.name for ratio in ratios if ratio.unbiased) or 'none'}"
    values = next(ratio for ratio in ratios if ratio.name == "cumulative").relative_variance
    lower = sum(value < 1 for value in values)
    where = "" if lower == len(values) else f" in {lower} of {len(values)} worlds"
    return f"Only cumulative and sequence ratios are unbiased; of the two, cumulative varies less{where}"


def as_claimed(ratios: Sequence[Ratio]) -> bool:
    """Whether the unbiased ratios are the cumulative and the sequence ratio."""
    return {ratio.name for ratio in ratios if ratio.unbiased} == {"cumulative", "sequence"}


def color(ratio: Ratio) -> str:
    """Blue if unbiased, vermilion if not."""
    return style.BLUE if ratio.unbiased else style.VERMILION


def draw_bias(axes: Axes, ratios: Sequence[Ratio]) -> None:
    """One row of dots for each ratio; what is exactly 0 but for rounding stands apart, left of the scale."""
    biases = [b for ratio in ratios for b in ratio.relative_bias if b >= data.ROUNDING]
    lowest = 10.0 ** np.floor(np.log10(min(biases, default=0.01)))
    highest = max([*biases, 1.0])
    zero = lowest / 6
    axes.set_xscale("log")
    axes.set_xlim(zero / 2.2, highest * 1.6)
    axes.axvspan(zero / 2.2, lowest / 2.4, color=style.PALE, linewidth=0)
    decades = 10.0 ** np.arange(np.log10(lowest), np.log10(highest) + 0.01)
    axes.set_xticks([zero, *decades], ["exact 0\n(rounding)", *[f"{100 * d:g}%" for d in decades]])
    axes.minorticks_off()
    axes.set_xlabel("bias: share of the true gradient's norm")
    for row, ratio in enumerate(ratios):
        _dots(axes, row, [b if b >= data.ROUNDING else zero for b in ratio.relative_bias], ratio)
    _rows(axes, ratios)


def draw_variance(axes: Axes, ratios: Sequence[Ratio]) -> None:
    """One row of dots for each ratio, and in how many worlds it varies less than the sequence ratio."""
    axes.set_xscale("log")
    axes.axvline(1, color=style.GRAY, linewidth=0.9)
    values = [v for ratio in ratios for v in ratio.relative_variance]
    axes.set_xlim(min(values) / 1.5, max(values) * 1.5)
    style.plain_numbers(axes.xaxis, (1, 3))
    axes.set_xlabel("variance over that of the sequence ratio")
    for row, ratio in enumerate(ratios):
        _dots(axes, row, ratio.relative_variance, ratio)
        lower = sum(value < 1 for value in ratio.relative_variance)
        text = (
            "= 1" if set(ratio.relative_variance) == {1.0} else f"below 1 in\n{lower} of {len(ratio.relative_variance)}"
        )
        axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def _dots(axes: Axes, row: int, values: Sequence[float], ratio: Ratio) -> None:
    height = row + np.linspace(-0.24, 0.24, len(values))
    axes.plot(values, height, "o", color=color(ratio), markersize=4, alpha=0.75, markeredgewidth=0)
    if max(values) > 1.01 * min(values):
        axes.plot([np.median(values)] * 2, [row - 0.36, row + 0.36], color=color(ratio), linewidth=1.6)


def _rows(axes: Axes, ratios: Sequence[Ratio]) -> None:
    axes.set_yticks(range(len(ratios)), [f"{r.name} {FORMULAS.get(r.name, '')}" for r in ratios])
    axes.set_ylim(len(ratios) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    for tick, ratio in zip(axes.get_yticklabels(), ratios, strict=True):
        tick.set_color(color(ratio))
