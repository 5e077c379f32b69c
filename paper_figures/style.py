"""One style for all figures, and files that are written whole, the same bytes for the same numbers."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

Color = str | tuple[float, float, float]

# Okabe and Ito's palette, told apart with any color vision; orange and purple are darkened, for they also color text.
BLUE, GREEN, ORANGE, VERMILION, PURPLE = "#0072B2", "#009E73", "#B87A00", "#D55E00", "#A8548A"
INK, GRAY, PALE = "#1A1A1A", "#6B6B6B", "#ECECEC"
DOTTED = (0, (1, 1.5))
DPI = 200
POSITION = "position t (policy tokens)"
SPREAD = r"standard deviation of $\log\rho_t$ (nats)"

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 6,
    "axes.labelsize": 8,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "lines.linewidth": 1.5,
    "text.color": INK,
    "svg.hashsalt": "paper_figures",
}


def styled() -> Any:
    """Context in which figures are drawn and saved; nothing of the user's own settings enters."""
    return matplotlib.style.context(["default", STYLE])


def sheet(width: float, height: float, title: str, subtitle: str, foot: str) -> Figure:
    """An empty figure, in inches, with the finding on top and the source at the foot."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    lines = subtitle.count("\n") + 1
    head = 0.36 + 0.15 * lines
    figure.set_layout_engine(
        "constrained", rect=(0.0, 0.22 / height, 1.0, 1 - (0.22 + head) / height), w_pad=0.08, h_pad=0.06, wspace=0.04
    )
    figure.text(0.1 / width, 1 - 0.1 / height, title, fontsize=10.5, fontweight="bold", va="top")
    figure.text(0.1 / width, 1 - 0.34 / height, subtitle, fontsize=8, color=GRAY, va="top", linespacing=1.25)
    figure.text(0.1 / width, 0.06 / height, foot, fontsize=6.5, color=GRAY, va="bottom")
    return figure


def log_axes(axes: Axes, x: str, y: str) -> None:
    """Both axes logarithmic."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for axis in (axes.xaxis, axes.yaxis):
        plain_numbers(axis)


def plain_numbers(axis: Axis, between: tuple[float, ...] = (1,)) -> None:
    """Ticks on a logarithmic axis at the decades, and at these multiples of them, written 0.01 and not as a power."""
    axis.set_major_locator(LogLocator(subs=between))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_locator(NullLocator())


def plain(value: float) -> str:
    """A round number written out."""
    return f"{value:,.12f}".rstrip("0").rstrip(".")


def slope_key(axes: Axes) -> None:
    """Slopes to compare lines with, t and sqrt(t), in the upper left corner of logarithmic axes.

    Call when the limits of the axes are final.
    """
    t, y = (axes.transScale + axes.transLimits).inverted().transform((0.06, 0.72))
    wide, high = (np.log10(limits[1] / limits[0]) for limits in (axes.get_xlim(), axes.get_ylim()))
    decades = min(0.32 * wide, 0.22 * high)
    for power, name in ((1.0, r"$\propto t$"), (0.5, r"$\propto\sqrt{t}$")):
        end = (t * 10**decades, y * 10 ** (decades * power))
        axes.plot((t, end[0]), (y, end[1]), color=GRAY, linewidth=0.9, linestyle=DOTTED)
        axes.annotate(name, end, xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5, color=GRAY)


def label_ends(
    axes: Axes, labels: Sequence[tuple[float, str, Color]], size: float = 7, height: float | None = None
) -> None:
    """Name lines at the right edge: (y at the edge, text, color), moved apart where they would overlap.

    Call when the limits of the axes are final. A thin line leads from each end to its name. `height` is that of the
    axes in points, if it is known.
    """
    transform = axes.transScale + axes.transLimits
    ends = [min(max(float(transform.transform((1.0, y))[1]), 0.0), 1.0) for y, _, _ in labels]
    order = np.argsort(ends, kind="stable")
    lines = max(text.count("\n") + 1 for _, text, _ in labels)
    if height is None:
        # About that: their share of the figure less titles and labels.
        spec = axes.get_subplotspec()
        sheet_height = axes.figure.get_figure(root=True).get_size_inches()[1] if axes.figure else 1.0
        height = 0.72 * 72 * sheet_height / (spec.get_gridspec().nrows if spec else 1)
    places = spread_out([ends[k] for k in order], gap=(0.45 + 1.3 * lines) * size / height)
    for k, place in zip(order, places, strict=True):
        _, text, color = labels[k]
        axes.annotate(
            text,
            xy=(1.0, ends[k]),
            xytext=(1.05, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=size,
            color=color,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.5,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


def spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in [0, 1] at least `gap` apart, in order and as near as can be to the wanted ones, which ascend."""
    blocks: list[tuple[float, int]] = []
    for k, place in enumerate(wanted):
        mean, size = place - k * gap, 1
        while blocks and blocks[-1][0] >= mean:
            other, count = blocks.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        blocks.append((mean, size))
    flat = [mean for mean, size in blocks for _ in range(size)]
    room = max(0.0, 1 - (len(flat) - 1) * gap)
    return [min(max(mean, 0.0), room) + k * gap for k, mean in enumerate(flat)]


def lay_out(figure: Figure) -> None:
    """Place everything, and keep it there: once more would move it by a hair."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write name.png and name.svg, each whole or not at all."""
    formats: dict[str, dict[str, str | None]] = {"png": {"Software": None}, "svg": {"Date": None}}
    lay_out(figure)
    paths = []
    for kind, metadata in formats.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
        paths.append(folder / f"{name}.{kind}")
        _write(paths[-1], buffer.getvalue())
    return paths


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
