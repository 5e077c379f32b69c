"""The figure "which ratio, when": it shows what the numbers say, and nothing in it covers anything else."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import test_paper_figures as others
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from paper_figures import __main__ as command
from paper_figures import style, which_ratio

REWARDS, SPREADS, BATCHES = ("exact critic", "critic of b", "outcome reward"), (0.1, 0.5, 2.0), (16, 4096)


def verdict(best: str, error: float, ties: list[str]) -> dict[str, Any]:
    return {"best": best, "ties": ties, "error": [error, error / 2, 2 * error]}


def results() -> dict[str, Any]:
    """The layout that `python -m simulations run grid` writes."""

    def best(reward: str, batch: int) -> str:
        if reward == "outcome reward":
            return "sequence" if batch == 4096 else "min prefix"
        return "cumulative" if reward == "exact critic" else "ctpo_fixed"

    return {
        "provenance": {"commit": "0123456789abcdef", "dirty": False, "configuration": {"seed": 3, "quick": False}},
        "lengths": {"long": [64, 256], "short": [4, 6]},
        "situations": [
            {
                "reward": reward,
                "length": length,
                "spread": spread,
                "batch": batch,
                "worlds": 22,
                "mse": verdict(best(reward, batch), spread**2 if reward == "outcome reward" else 0.04, []),
                "direction": verdict("window 4", 0.01, ["token"] * (8 if spread == 0.1 else 0)),
            }
            for length, reward, spread, batch in itertools.product(("long", "short"), REWARDS, SPREADS, BATCHES)
        ],
    }


def drawn(content: dict[str, Any], *, laid_out: bool = False) -> Figure:
    with style.styled():
        figure = which_ratio.which_ratio(content)
        if laid_out:
            style.lay_out(figure)
    return figure


@pytest.fixture(scope="module")
def figure() -> Figure:
    return drawn(results(), laid_out=True)


def said(figure: Figure, panel: int) -> dict[tuple[float, int], list[str]]:
    """Texts of a panel by cell."""
    found: dict[tuple[float, int], list[str]] = {}
    for text in figure.axes[panel].texts:
        x, y = text.get_position()
        found.setdefault((SPREADS[round(x)], BATCHES[round(y)]), []).append(text.get_text().replace("\n", " "))
    return found


def test_every_cell_names_its_estimator_and_error(figure: Figure) -> None:
    assert said(figure, 0)[0.5, 16] == ["cumu- lative", "20 %"]
    assert said(figure, 1)[2.0, 4096] == ["ctpo fixed", "20 %"]
    assert said(figure, 2)[0.5, 16] == ["min prefix", "50 %"]
    assert said(figure, 2)[0.5, 4096] == ["sequence", "50 %"]
    assert said(figure, 2)[2.0, 4096] == ["worse than no step"]
    assert all(len(said(figure, panel)) == len(SPREADS) * len(BATCHES) for panel in range(6))
    assert said(figure, 5)[2.0, 16] == ["window 4", "10 %"]


def test_cells_in_which_many_tie_are_pale(figure: Figure) -> None:
    boxes = [patch for patch in figure.axes[3].patches if isinstance(patch, Rectangle)]
    paleness = {round(box.get_x() + 0.47): sum(box.get_facecolor()[:3]) for box in boxes}
    assert paleness[0] > paleness[1] == paleness[2]
    weights = {text.get_text(): text.get_fontweight() for text in figure.axes[3].texts if "window" in text.get_text()}
    assert set(weights.values()) <= {"bold", "normal"}


def test_of_equals_the_one_that_is_best_most_often_is_shown() -> None:
    content = results()
    content["situations"][0]["mse"] |= {"best": "lookahead 4", "ties": ["cumulative"]}
    content["situations"][1]["mse"] |= {"best": "lookahead 4", "ties": []}
    panel = said(drawn(content), 0)
    assert panel[0.1, 16] == ["cumu- lative", "20 %"]
    assert panel[0.1, 4096] == ["look- ahead 4", "20 %"]


def test_the_title_says_only_what_the_numbers_say(figure: Figure) -> None:
    finding = "Exact critic: cumulative ratio. Outcome reward: all ratios if the batch is large, else fewer"
    assert figure.texts[0].get_text() == finding
    for place, name in ((0, "token"), (12, "lookahead"), (13, "min prefix")):
        content = results()
        content["situations"][place]["mse"]["best"] = name
        assert drawn(content).texts[0].get_text().startswith("Which ratio has the least error depends on")
    content = results()
    # Where no step at all is better, the name does not matter.
    (hopeless,) = [
        s for s in content["situations"][:18] if (s["reward"], s["spread"], s["batch"]) == ("outcome reward", 2.0, 16)
    ]
    hopeless["mse"]["best"] = "gspo"
    assert drawn(content).texts[0].get_text() == finding


def test_without_long_strings_the_short_ones_are_shown() -> None:
    content = results()
    content["situations"] = [s for s in content["situations"] if s["length"] == "short"]
    del content["lengths"]["long"]
    assert "4 or 6 tokens" in drawn(content).texts[1].get_text()


def test_no_text_is_cut_or_covered_by_another(figure: Figure) -> None:
    others.check_texts(figure, touch=1)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("lengths",), [], "lengths is not an object of lists"),
        (("situations",), [], "situations is not a list"),
        (("situations", 1, "spread"), -1, r"situations\[1\].spread is -1, not a number above 0"),
        (("situations", 0, "length"), "middling", r"situations\[0\].length is 'middling'"),
        (("situations", 0, "mse"), None, r"situations\[0\].mse is a NoneType"),
        (("situations", 0, "mse", "best"), 3, r"situations\[0\].mse.best is 3, not a string"),
        (("situations", 0, "mse", "ties"), "none", r"situations\[0\].mse.ties is not a list of names"),
        (("situations", 2, "direction", "error"), [None, 0, 1], r"situations\[2\].direction.error is not a list"),
        (("situations", 2, "direction", "error"), [-0.1, 0, 1], r"situations\[2\].direction.error is -0.1, below 0"),
    ],
)
def test_a_malformed_file_is_an_error_that_names_the_place(path, value, message) -> None:
    content = copy.deepcopy(results())
    inner: Any = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        which_ratio.which_ratio(content)


def test_it_is_drawn_if_the_study_is_there(tmp_path, capsys) -> None:
    others.write(tmp_path, others.results())
    assert command.main(["--results", str(tmp_path)]) == 0
    assert not (tmp_path / "figures" / "grid.png").exists()
    (tmp_path / "grid.json").write_text(json.dumps(results()))
    assert command.main(["--results", str(tmp_path)]) == 0
    assert (tmp_path / "figures" / "grid.png").stat().st_size > 10_000
    assert (tmp_path / "figures" / "grid.svg").exists()


def test_every_estimator_of_the_grid_has_a_family() -> None:
    from simulations.grid import estimators

    members = [name for _, names in which_ratio.FAMILIES.values() for name in names]
    assert sorted(members) == sorted(estimators())
