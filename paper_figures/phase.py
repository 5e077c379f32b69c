"""Phase diagram: which estimator has the least mean squared error, by horizon, off-policyness, batch and reward."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

from paper_figures import data, style
from paper_figures.data import Cell, PhaseDiagram, Results

FILE = "phase.json"
COMMAND = "python -m simulations run phase"
#: Ahead by more than this factor is a clear win.
CLEAR = 1.2
#: Marker and color of the products of token ratios, from none of them to all, and of the other estimators.
PRODUCTS = (
    ("o", style.GRAY),
    ("s", style.ORANGE),
    ("D", style.PURPLE),
    ("^", style.BLUE),
    ("v", style.GREEN),
    ("P", style.VERMILION),
)
OTHERS = (("X", style.INK), ("*", style.INK), ("p", style.INK), ("h", style.INK))
#: Areas of markers: a tie, ahead, clearly ahead; in square points.
SIZES = (9.0, 26.0, 62.0)
#: Shapes that look larger than others of the same area.
SHRINK = {"D": 0.62, "s": 0.85}


def phase(results: Results) -> Figure:
    """A row for each kind of reward: three batch sizes by horizon and divergence, and all estimators by batch."""
    found = data.phase(results)
    batches = sorted({cell.batch for cell in found.diagram})
    short = found.named[0].horizon
    figure = style.sheet(
        8,
        2.05 * len(found.rewards) + 1.7,
        _title(found),
        "Least mean squared error, bias² + variance / batch, of the summed gradient: exact, "
        f"median of {found.models} random bigram models for each cell.\n"
        "The reward comes at the end, less its mean; half of the step to the target policy is along the gradient, half "
        "random. The paper's\nσ = 0.0335 a token is a KL of about 0.0006. Critics: of the first reward.",
        data.source(results, FILE),
    )
    grid = figure.add_gridspec(
        len(found.rewards) + 1,
        len(batches) + 1,
        height_ratios=[*[1.0] * len(found.rewards), 0.32],
        width_ratios=[*[1.0] * len(batches), 1.0],
    )
    look = _looks(found)
    divergences = sorted({cell.divergence for cell in found.diagram})
    for row, (reward, title) in enumerate(found.rewards.items()):
        for column, batch in enumerate(batches):
            axes = figure.add_subplot(grid[row, column])
            cells = [cell for cell in found.diagram if (cell.reward, cell.batch) == (reward, batch)]
            _draw(axes, cells, [cell.horizon for cell in cells], divergences, look, found.tie)
            axes.set_title(f"\nbatch of {batch:,}", fontweight="normal", fontsize=7.5)
            axes.set_xlabel("horizon H (tokens)")
            if column:
                axes.set_yticklabels([])
            else:
                axes.set_ylabel("KL(b‖π) per token (nats)")
                heading = axes.annotate(
                    title[0].upper() + title[1:],
                    (0, 1),
                    xytext=(0, 16),
                    xycoords="axes fraction",
                    textcoords="offset points",
                    fontweight="bold",
                    fontsize=8.5,
                )
                heading.set_in_layout(False)  # it spans several panels; the empty line in their titles is its place
        axes = figure.add_subplot(grid[row, len(batches)])
        cells = [cell for cell in found.named if cell.reward == reward]
        _draw(axes, cells, [cell.batch for cell in cells], divergences, look, found.tie)
        axes.set_title(f"\nall estimators, H = {short}", fontweight="normal", fontsize=7.5)
        axes.set_xlabel("batch (sequences)")
        axes.set_yticklabels([])
    _draw_key(figure.add_subplot(grid[len(found.rewards), :]), look, found.estimators, found.tie)
    return figure


def _title(found: PhaseDiagram) -> str:
    """What the diagram says of the cumulative ratio, if it says it; a tie is no win."""
    wins = [cell for cell in found.diagram if cell.winner == "cumulative"]
    clear = {cell.reward for cell in wins if cell.margin >= found.tie}
    outcomes = {reward for reward, title in found.rewards.items() if title.startswith("outcome")}
    by_critic = sum(cell.reward == "critic of the target" for cell in wins)
    if outcomes and not clear & outcomes and 2 * by_critic * len(found.rewards) > len(found.diagram):
        return "On these models the cumulative ratio wins with an exact critic, not with an outcome reward"
    return "Which ratio has the least mean squared error depends on the reward"


def _looks(found: PhaseDiagram) -> dict[str, tuple[str, style.Color]]:
    """Marker and color of every estimator that wins somewhere."""
    winners = {cell.winner for cell in (*found.diagram, *found.named)}
    others = [name for name in sorted(winners) if name not in found.estimators]
    known = dict(zip(found.estimators, PRODUCTS, strict=False))
    known |= {name: OTHERS[min(k, len(OTHERS) - 1)] for k, name in enumerate(others)}
    return {name: known[name] for name in (*found.estimators, *others) if name in winners}


def _draw(
    axes: Axes,
    cells: Sequence[Cell],
    across: Sequence[int],
    divergences: Sequence[float],
    look: dict[str, tuple[str, style.Color]],
    tie: float,
) -> None:
    columns = sorted(set(across))
    for cell, value in zip(cells, across, strict=True):
        marker, color = look[cell.winner]
        size = SIZES[(cell.margin >= tie) + (cell.margin >= CLEAR)]
        hopeless = cell.error >= 1
        axes.scatter(
            columns.index(value),
            divergences.index(cell.divergence),
            s=size * SHRINK.get(marker, 1.0),
            marker=marker,
            facecolor="white" if hopeless else color,
            edgecolor=color,
            linewidth=0.8,
            zorder=2,
        )
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(-0.6, len(divergences) - 0.4)
    axes.set_xticks(range(len(columns)), [f"{value // 1000}k" if value >= 1000 else f"{value}" for value in columns])
    axes.set_yticks(range(len(divergences)), [style.plain(value) for value in divergences])
    axes.tick_params(length=0, labelsize=7)
    axes.grid(False)


def _draw_key(axes: Axes, look: dict[str, tuple[str, style.Color]], products: Sequence[str], tie: float) -> None:
    """What markers, colors, sizes and open markers mean."""
    axes.axis("off")

    def entry(marker: str, color: style.Color, area: float, label: str, *, hollow: bool = False) -> Line2D:
        return Line2D(
            [],
            [],
            linestyle="",
            marker=marker,
            color=color,
            markersize=(area * SHRINK.get(marker, 1.0)) ** 0.5,
            markerfacecolor="white" if hollow else color,
            markeredgewidth=0.8,
            label=label,
        )

    percent = f"{100 * (tie - 1):.0f}", f"{100 * (CLEAR - 1):.0f}"
    lines = {
        "Products of ratios": [entry(*look[name], SIZES[2] * 0.8, name) for name in look if name in products],
        "Other estimators": [entry(*look[name], SIZES[2] * 0.8, name) for name in look if name not in products],
        "Ahead of the next": [
            entry("o", style.INK, SIZES[0], f"by less than {percent[0]} %, a tie"),
            entry("o", style.INK, SIZES[1], f"by {percent[0]} to {percent[1]} %"),
            entry("o", style.INK, SIZES[2], f"by more than {percent[1]} %"),
            entry("o", style.INK, SIZES[2], "worse than no step at all", hollow=True),
        ],
    }
    for k, (name, handles) in enumerate((name, handles) for name, handles in lines.items() if handles):
        height = 0.85 - 0.38 * k
        legend = Legend(
            axes,
            handles,
            [str(handle.get_label()) for handle in handles],
            loc="center left",
            ncols=len(handles),
            bbox_to_anchor=(0.15, height),
            frameon=False,
            fontsize=7.5,
            handletextpad=0.2,
            columnspacing=1.4,
            borderpad=0,
            borderaxespad=0,
        )
        legend.set_in_layout(False)  # the row that the key stands in has room for it
        axes.add_artist(legend)
        axes.text(0, height, name, fontsize=7.5, color=style.GRAY, va="center", transform=axes.transAxes)
