"""Figure of spread and drift of log rho_t on the recorded language model."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from paper_figures import data, style
from paper_figures.data import MissingError, Positions, Results

#: A spread that nowhere reaches this is rounding of the recording itself and would stretch a logarithmic axis.
FLOOR = 1e-3
KIND_COLORS = {
    "temperature": style.GREEN,
    "precision": style.PURPLE,
    "weight_noise": style.ORANGE,
    "truncation": style.INK,
}


def spread_and_drift(results: Results) -> Figure:
    """Spread and drift of log rho_t: fixed targets, then updated ones on held-out and on trained-on sequences."""
    series = data.recorded(results)
    updates = [s for s in series if s.kind == "update"]
    parts = {
        "Target fixed beforehand": [s for s in series if s.kind != "update"],
        "Updated target, held-out sequences": [s for s in updates if not is_used(s)],
        "Updated target, trained-on sequences": [s for s in updates if is_used(s)],
    }
    parts = {title: part for title, part in parts.items() if drawn(part)}
    if not parts:
        raise MissingError(f"series.recorded: no pair spreads by {FLOOR:g} nats")
    figure = style.sheet(
        11 if len(parts) == 3 else 8,
        6.4,
        f"{data.model(results)}: {finding(series, 'spread like {} on held-out, {} on trained-on samples')}",
        "Over the sequences still running at t. Top: standard deviation, and the fitted power of t. "
        "Bottom: mean ± 2 standard errors.\n"
        r"Dotted: $-\mathrm{Var}(\log\rho_t)\,/\,2$, the mean of a Gaussian log-ratio for which "
        r"$\mathrm{E}\,\rho_t = 1$.",
        data.source(results),
    )
    grid = figure.subplots(2, len(parts), squeeze=False)
    for (spread, mean), (title, part) in zip(grid.T, parts.items(), strict=True):
        spread.set_title(title)
        draw_spread(spread, part)
        _draw_mean(mean, part)
        if spread is not grid[0, 0]:
            spread.set_ylabel("")
            mean.set_ylabel("")
    low, high = zip(*(axes.get_ylim() for axes in grid[0]), strict=True)
    for (spread, mean), part in zip(grid.T, parts.values(), strict=True):
        spread.set_ylim(min(low), max(high))
        if max(high) < 100 * min(low):
            style.plain_numbers(spread.yaxis, (1, 2, 5))
        style.slope_key(spread)
        _name_lines(spread, mean, part)
    return figure


def growth(series: Sequence[Positions]) -> tuple[float, float] | None:
    """Median power of t by which the spread grows on held-out and on trained-on sequences, if there are both."""
    held_out, used = (
        [s.power for s in drawn(series) if s.kind == "update" and is_used(s) is wanted] for wanted in (False, True)
    )
    return (float(np.median(held_out)), float(np.median(used))) if held_out and used else None


def finding(series: Sequence[Positions], text: str) -> str:
    """The text with both powers of t filled in, or a plain title where they are not known."""
    powers = growth(series)
    if powers is None:
        return "spread of the log-ratio by position"
    return text.format(*(rf"$\mathbf{{t^{{\,{power:.2f}}}}}$" for power in powers))


def is_used(series: Positions) -> bool:
    """Whether the target's updates used these sequences."""
    return series.name.endswith("trained on")


def pretty(series: Positions) -> str:
    """The name of a pair for readers."""
    if found := re.fullmatch(r"updates_(\d+), .*", series.name):
        return f"{found[1]} update{'s' if found[1] != '1' else ''}"
    return series.name.replace("_", " ")


def color(series: Positions, part: Sequence[Positions]) -> style.Color:
    """Blue where fresh, vermilion where trained on, paler for fewer updates; other kinds have a color each."""
    if series.kind != "update":
        return KIND_COLORS.get(series.kind, style.GRAY)
    same = [s.name for s in part if s.kind == "update" and is_used(s) == is_used(series)]
    pale = 0.4 * (1 - (same.index(series.name) + 1) / len(same))
    red, green, blue = (pale + (1 - pale) * c for c in to_rgb(style.VERMILION if is_used(series) else style.BLUE))
    return red, green, blue


def drawn(part: Sequence[Positions]) -> list[Positions]:
    """The pairs whose spread a logarithmic axis can show."""
    return [s for s in part if s.std.max() >= FLOOR]


def draw_spread(axes: Axes, part: Sequence[Positions]) -> None:
    """Standard deviation of log rho_t against t."""
    style.log_axes(axes, style.POSITION, style.SPREAD)
    for s in drawn(part):
        axes.plot(s.t, np.where(s.std > 0, s.std, np.nan), color=color(s, part), linestyle=_dashes(s, part))
    axes.set_xlim(1, max(s.t[-1] for s in drawn(part)))
    if hidden := [s for s in part if s not in drawn(part)]:
        text = "\n".join(f"{pretty(s)}: {_size(s.std.max())}" for s in hidden)
        axes.text(0.97, 0.03, text, transform=axes.transAxes, ha="right", fontsize=7, color=style.GRAY)


def _size(largest: float) -> str:
    """A spread that the axis does not show."""
    return f"below {style.plain(10 ** np.ceil(np.log10(largest)))}" if largest > 0 else "exactly 0"


def _draw_mean(axes: Axes, part: Sequence[Positions]) -> None:
    """Mean of log rho_t with two standard errors; minus half the variance too, where E rho_t = 1 asks for it."""
    axes.set_xlabel(style.POSITION)
    axes.set_ylabel(r"mean of $\log\rho_t$ (nats)")
    axes.axhline(0, color=style.GRAY, linewidth=0.7)
    shown = drawn(part)
    scaled = [s for s in shown if s.kind != "truncation"] or shown
    for s in scaled:
        tint, error = color(s, part), 2 * s.std / np.sqrt(s.n if s.n is not None else np.inf)
        axes.plot(s.t, s.mean, color=tint, linestyle=_dashes(s, part))
        axes.fill_between(s.t, s.mean - error, s.mean + error, color=tint, alpha=0.1, linewidth=0)
        if not is_used(s) and s.kind != "truncation":
            axes.plot(s.t, -(s.std**2) / 2, color=tint, linewidth=1.0, linestyle=style.DOTTED)
    axes.set_xlim(1, max(s.t[-1] for s in shown))
    axes.set_ylim(axes.get_ylim())
    if used := [s for s in shown if is_used(s)]:
        lowest = max(s.std[-1] for s in used) ** 2 / 2
        text = r"$-\mathrm{Var}(\log\rho_t)\,/\,2$ reaches" + f"\n−{lowest:,.3g}, far off this axis"
        axes.text(0.03, 0.04, text, transform=axes.transAxes, fontsize=7, color=style.GRAY)
    # A truncated sampler's mean falls far below all others, which would be one flat line on its scale.
    for s in (s for s in shown if s not in scaled):
        axes.plot(s.t, s.mean, color=color(s, part), linestyle=_dashes(s, part))
        bottom = axes.get_ylim()[0]
        at = int(np.argmax(s.mean < bottom)) if (s.mean < bottom).any() else len(s.t) - 1
        axes.annotate(
            f"{pretty(s)}: falls\nto {s.mean[-1]:.1f} at t = {s.t[-1]:.0f}".replace("-", "−"),
            (s.t[at], max(s.mean[at], bottom)),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=7,
            color=color(s, part),
        )


def _name_lines(spread: Axes, mean: Axes, part: Sequence[Positions]) -> None:
    shown = drawn(part)
    names = {s.name: pretty(s) + (" (dashed)" if _dashes(s, part) == "--" else "") for s in shown}
    powers = {s.name: rf"$t^{{\,{s.power:.2f}}}$" for s in shown}
    style.label_ends(spread, [(s.std[-1], f"{names[s.name]}  {powers[s.name]}", color(s, part)) for s in shown])
    inside = [s for s in shown if s.kind != "truncation"]
    style.label_ends(mean, [(s.mean[-1], names[s.name], color(s, part)) for s in inside])


def _dashes(series: Positions, part: Sequence[Positions]) -> str:
    """Solid for the first of a kind, dashed for the second, and so on; updates are all solid."""
    if series.kind == "update":
        return "-"
    same = [s.name for s in drawn(part) if s.kind == series.kind]
    return ("-", "--", "-.")[same.index(series.name) % 3]
