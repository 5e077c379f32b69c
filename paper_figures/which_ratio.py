"""Which ratio, when: the estimator of least error by kind of reward, distance from on-policy and batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from paper_figures import data, style
from paper_figures.data import Best, Results

FILE = "grid.json"
#: What the weight of token t is made of -> color and the estimators that have it.
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "tokens 1 to t": (style.BLUE, ("cumulative",)),
    "1 to t, clipped or mean": (style.GREEN, ("ctpo", "ctpo_fixed", "ctpo_mean", "cumulative mean")),
    "t and few before it": (
        style.ORANGE,
        ("token", "window 4", "min prefix", "minpro", "grpo", "dapo", "cispo", "reinforce"),
    ),
    "tokens after t too": (style.PURPLE, ("sequence", "lookahead", "lookahead 4")),
    "sequence, length-normalized": (style.VERMILION, ("gspo", "sequence mean")),
}
OTHER = style.INK
CRITERIA = {
    "mse": "gradient as it is",
    "direction": "best length of step",
}
REWARDS = {
    "exact critic": "Exact critic of the target",
    "critic of b": "Exact critic of the sampler",
    "outcome reward": "Outcome reward, no critic",
}
#: Names too wide for a cell, broken.
BREAKS = {"cumulative": "cumu-\nlative", "lookahead": "look-\nahead", "lookahead 4": "look-\nahead 4"}
#: With so many ties or more the choice hardly matters.
MANY = 7


def which_ratio(results: Results) -> Figure:
    """A panel for each kind of reward and criterion; a cell for each distance and batch, with the best estimator."""
    found = data.which_ratio(results)
    length = "long" if "long" in found.horizons else next(iter(found.horizons))
    best = [b for b in found.best if b.length == length]
    rewards = list(dict.fromkeys(b.reward for b in best))
    tokens = " or ".join(str(h) for h in found.horizons[length])
    figure = style.sheet(
        8,
        5.6,
        _title(best),
        "The estimator of least mean squared error, and the root of that error as a share of the gradient's norm.\n"
        f"Strings of up to {tokens} tokens, medians over {found.worlds} worlds or more. Spread: standard deviation of "
        "log ρ of whole sequences.\n"
        f"Of equals within 2 %, the one that is best most often in its panel; pale: at least {MANY} others are its "
        "equals.",
        data.source(results, FILE),
    )
    shown: set[str] = set()
    grid = figure.add_gridspec(3, len(rewards), height_ratios=[1, 1, 0.12])
    for row, (criterion, said) in enumerate(CRITERIA.items()):
        for column, reward in enumerate(rewards):
            axes = figure.add_subplot(grid[row, column])
            shown |= _draw(axes, [b for b in best if (b.reward, b.criterion) == (reward, criterion)])
            if row == 0:
                axes.set_title(REWARDS.get(reward, reward))
            else:
                axes.set_xlabel("spread of log ρ (nats)")
            if column == 0:
                axes.set_ylabel(f"{said}\nbatch (sequences)")
            else:
                axes.set_yticklabels([])
    _key(figure.add_subplot(grid[2, :]), shown)
    return figure


def _title(best: Sequence[Best]) -> str:
    """What the panels of the plain gradient say, if they say it."""
    plain = [b for b in best if b.criterion == "mse" and b.error < 1]
    critic = [b for b in plain if b.reward == "exact critic"]
    outcome = [b for b in plain if b.reward == "outcome reward"]
    largest = max((b.batch for b in best), default=0)
    beyond = FAMILIES["tokens after t too"][1]
    if (
        critic
        and outcome
        and all("cumulative" in (b.name, *b.ties) for b in critic)
        and all(b.name == "sequence" for b in outcome if b.batch == largest)
        and all(b.name not in beyond for b in outcome if b.batch < largest)
    ):
        return "Exact critic: cumulative ratio. Outcome reward: all ratios if the batch is large, else fewer"
    return "Which ratio has the least error depends on the reward, the distance and the batch"


def color_of(name: str) -> str:
    """Color of an estimator's family."""
    return next((color for color, members in FAMILIES.values() if name in members), OTHER)


def _draw(axes: Axes, cells: Sequence[Best]) -> set[str]:
    """Draw a panel; the names that it shows."""
    spreads = sorted({b.spread for b in cells})
    batches = sorted({b.batch for b in cells})
    names = set()
    among_best = Counter(name for b in cells for name in (b.name, *b.ties))
    for b in cells:
        shown = max((b.name, *b.ties), key=lambda name: among_best[name])
        x, y = spreads.index(b.spread), batches.index(b.batch)
        hopeless, alike = b.error >= 1, len(b.ties) >= MANY
        color = style.GRAY if hopeless else color_of(shown)
        axes.add_patch(
            Rectangle(
                (x - 0.47, y - 0.46),
                0.94,
                0.92,
                facecolor="white" if hopeless else _tint(color, 0.12 if alike else 0.34),
                edgecolor=color if not alike or hopeless else _tint(color, 0.5),
                linewidth=0.8,
                linestyle=(0, (2, 2)) if hopeless else "-",
            )
        )
        if hopeless:
            axes.text(x, y, "worse than\nno step", ha="center", va="center", fontsize=6, color=style.GRAY)
            continue
        names.add(shown)
        name = BREAKS.get(shown, shown.replace("_", "\n").replace(" ", "\n"))
        weight = "normal" if alike else "bold"
        axes.text(x, y + 0.12, name, ha="center", va="center", fontsize=6.5, fontweight=weight, linespacing=0.95)
        axes.text(x, y - 0.33, _percent(b.error**0.5), ha="center", va="center", fontsize=6.5, color=style.INK)
    axes.set_xlim(-0.5, len(spreads) - 0.5)
    axes.set_ylim(-0.5, len(batches) - 0.5)
    axes.set_xticks(range(len(spreads)), [f"{value:g}" for value in spreads])
    axes.set_yticks(range(len(batches)), [f"{value:,}" for value in batches])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return names


def _tint(color: str, share: float) -> tuple[float, float, float]:
    """The color laid thinly on white."""
    red, green, blue = (1 - share + share * part for part in to_rgb(color))
    return red, green, blue


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %" if value < 0.995 else f"{100 * value:.0f} %"


def _key(axes: Axes, shown: set[str]) -> None:
    """What the colors mean."""
    axes.axis("off")
    handles = [
        Patch(facecolor=_tint(color, 0.34), edgecolor=color, linewidth=0.8, label=label)
        for label, (color, members) in FAMILIES.items()
        if shown.intersection(members)
    ]
    axes.legend(
        handles=handles,
        loc="center",
        ncols=len(handles),
        frameon=False,
        fontsize=7.5,
        title="The weight of token t is made of the ratios of",
        title_fontsize=7.5,
        handlelength=1.2,
        columnspacing=1.6,
    )
