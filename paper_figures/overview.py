"""The figure of the README: which ratio is unbiased, and how far log rho_t spreads on a real model."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import data, recorded, style, table_one
from paper_figures.data import MissingError, Positions, Ratio, Results


def overview(results: Results) -> Figure:
    """Bias by ratio beside the spread of log rho_t, on held-out and on trained-on sequences."""
    ratios = data.table_one(results)
    series = recorded.drawn(data.recorded(results))
    if not any(s.kind == "update" for s in series):
        raise MissingError("series.recorded: no pair of kind update spreads, or none is there")
    claimed = table_one.as_claimed(ratios)
    powers = recorded.growth(series)
    linear = powers is not None and powers[1] > max(0.8, powers[0] + 0.2)
    figure = style.sheet(
        8,
        3.5,
        "With exact advantages cumulative ratios are unbiased; trained-on, logs spread almost like t"
        if claimed and linear
        else "Bias by ratio, and spread of the log-ratio on a language model",
        f"Left: a dot for each of {len(ratios[0].relative_bias)} enumerated worlds, exact advantage; bar: median. "
        f"Right: traces of {data.model(results)}.",
        data.source(results),
    )
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.05))
    # Titles begin at the left edge of what belongs to the panel, names of rows included.
    left.set_title("Only cumulative and sequence ratios are unbiased" if claimed else "Bias by ratio", x=-0.68)
    table_one.draw_bias(left, ratios)
    _add_variances(left, ratios)
    right.set_title(recorded.finding(series, "Spread: {} if held out, {} if trained on"), x=-0.2)
    _draw_spread(right, series)
    return figure


def _add_variances(axes: Axes, ratios: Sequence[Ratio]) -> None:
    """A column with the median variance of each ratio over that of the sequence ratio."""
    place = axes.get_yaxis_transform()
    axes.text(1.03, len(ratios) - 0.4, "variance /\nsequence,\nmedian", transform=place, va="top", fontsize=7)
    for row, ratio in enumerate(ratios):
        text = f"× {median(ratio.relative_variance):.2g}"
        axes.text(1.03, row, text, transform=place, va="center", color=table_one.color(ratio))


def _draw_spread(axes: Axes, series: Sequence[Positions]) -> None:
    """Updated targets, and one that differs by rounding alone."""
    updates = [s for s in series if s.kind == "update"]
    rounding = [s for s in series if s.kind == "precision"][:1]
    recorded.draw_spread(axes, [*updates, *rounding])
    style.slope_key(axes)
    groups = {
        "trained on": [s for s in updates if recorded.is_used(s)],
        "held out": [s for s in updates if not recorded.is_used(s)],
    }
    ends = [(s.std[-1], f"{recorded.pretty(s)}:\nrounding only", recorded.color(s, rounding)) for s in rounding]
    for name, group in groups.items():
        if group:
            count = " to ".join(dict.fromkeys(recorded.pretty(s).split()[0] for s in (group[0], group[-1])))
            ends.append((group[-1].std[-1], f"{name},\n{count} updates", recorded.color(group[-1], updates)))
    style.label_ends(axes, ends)
