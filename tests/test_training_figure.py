"""The figure of the training study: it shows the numbers of its file, and nothing in it covers anything else."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_paper_figures as others
from matplotlib.figure import Figure

from paper_figures import __main__ as command
from paper_figures import data, style, training

PROBLEMS, STALENESS = ("exam", "plan", "route", "items"), (4, 16, 64)
LABELS = {
    "reinforce": "no correction",
    "grpo": "GRPO",
    "minpro": "MinPRO",
    "gspo": "GSPO",
    "ctpo": "CTPO",
    "ctpo_centered": "CTPO drift-centered",
    "ctpo_mean": "CTPO mean",
    "cumulative": "cumulative, no window",
    "lookahead": "lookahead H/4",
    "sequence": "sequence",
    "dr_learned": "doubly robust, learned",
    "dr_behavior": "doubly robust, exact b",
    "on-policy": "on-policy",
}


def results() -> dict[str, Any]:
    """The layout that `python -m simulations run training` writes."""
    updates = list(range(0, 513, 16))
    curves, cells = [], []
    for problem, staleness, variation in (*itertools.product(PROBLEMS, (1, *STALENESS), [""]), ("exam", 16, "std")):
        for k, (method, label) in enumerate(LABELS.items()):
            where = {
                "problem": problem,
                "staleness": staleness,
                "variation": variation,
                "method": method,
                "label": label,
            }
            mean = [0.9 - 0.8 * 0.5 ** (u / (30 + 5 * k + staleness)) for u in updates]
            low, high = ([m + side for m in mean] for side in (-0.02, 0.02))
            curves.append({**where, "updates": updates, "mean": mean, "low": low, "high": high})
            cosine = None if method == "gspo" else 0.3 - 0.02 * k
            cells.append({**where, "mean_share": mean[8], "cosine": cosine, "leading": k < 2})
    made = {"commit": "0123456789abcdef", "dirty": False, "configuration": {"seed": 3, "quick": False}}
    return {"provenance": made, "curves": curves, "cells": cells}


def drawn(content: dict[str, Any]) -> Figure:
    with style.styled():
        figure = training.training(content)
        style.lay_out(figure)
    return figure


@pytest.fixture(scope="module")
def figure() -> Figure:
    return drawn(results())


def test_no_text_is_cut_or_covered_by_another(figure: Figure) -> None:
    others.check_texts(figure)


def test_every_panel_shows_its_curves_with_their_bands(figure: Figure) -> None:
    found = data.training(results())
    assert len(figure.axes) == len(PROBLEMS) * len(STALENESS) + 2
    for axes, (problem, staleness) in zip(figure.axes, itertools.product(PROBLEMS, STALENESS), strict=False):
        lines = {line.get_label(): line for line in axes.lines}
        assert set(lines) == set(training.LINES)
        for run in found:
            if (run.problem, run.staleness) == (problem, staleness) and run.method in lines:
                assert np.array_equal(lines[run.method].get_ydata(), run.curve["mean"])
        assert len(axes.collections) == len(lines)
        assert lines["on-policy"].get_linestyle() == "--"
        assert axes.get_title(loc="left").endswith(f"K = {staleness}")
    assert len({color for color, _ in training.LINES.values()}) == len(training.LINES)


def test_the_tables_hold_every_method_and_mark_the_leading_ones(figure: Figure) -> None:
    share, cosine = figure.axes[-2:]
    for axes in (share, cosine):
        assert [tick.get_text() for tick in axes.get_yticklabels()] == list(LABELS.values())
        assert [tick.get_text() for tick in axes.get_xticklabels()] == [f"{k}" for k in STALENESS] * len(PROBLEMS)
    numbers = {tuple(map(round, text.get_position())): text for text in share.texts if text.get_text().startswith(".")}
    assert len(numbers) == len(LABELS) * 12
    assert numbers[0, 0].get_text() == f"{0.9 - 0.8 * 0.5 ** (128 / 34):.2f}"[1:]
    assert {text.get_fontweight() for (_, row), text in numbers.items() if row < 2} == {"bold"}
    assert {text.get_fontweight() for (_, row), text in numbers.items() if row >= 2} == {"normal"}
    assert [text.get_text() for text in cosine.texts].count("–") == 12


def test_the_title_and_the_source_follow_the_file(figure: Figure) -> None:
    title = figure.texts[0].get_text()
    assert title == "Small models, stale samples: no correction is among the best in 12 of 12 cases, CTPO in 0"
    shown = "\n".join(text.get_text() for text in others.texts(figure))
    assert "training.json, commit 012345678, seed 3" in shown
    content = results()
    for cell in content["cells"]:
        cell["leading"] = cell["method"] == "ctpo"
    assert drawn(content).texts[0].get_text().endswith("CTPO is among the best in 12 of 12 cases")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["curves"], 3, "curves is a int, not a list"),
        (["curves", 20, "mean"], [0.5], r"curves\[20\].mean has 1 numbers, curves\[20\].t has 33"),
        (["curves", 20, "low", 3], None, r"curves\[20\].low is not a list of finite numbers"),
        (["curves", 20, "staleness"], "4", r"curves\[20\].staleness is '4'"),
        (["curves", 20, "method"], None, r"curves\[20\].method is None, not a string"),
        (["cells", 20, "method"], "other", r"cells\[20\] is not about the same run as curves\[20\]"),
        (["cells", 20, "mean_share"], None, r"cells\[20\] has no mean_share, cosine or leading"),
        (["cells", 20, "leading"], 1, r"cells\[20\] has no mean_share, cosine or leading"),
    ],
)
def test_malformed_results_are_named(path: list[Any], value: Any, message: str) -> None:
    content = copy.deepcopy(results())
    inner: Any = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        data.training(content)


def test_what_is_missing_is_said() -> None:
    content = results()
    for part in ("curves", "cells"):
        content[part] = [entry for entry in content[part] if entry["staleness"] == 1]
    with pytest.raises(data.MissingError, match="none of staleness above 1"):
        data.training(content)
    with pytest.raises(data.MissingError, match="cells is not in"):
        data.training({"curves": content["curves"]})


def test_it_is_drawn_when_its_file_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style, "save", lambda _figure, folder, name: [folder / name])
    (tmp_path / "training.json").write_text(json.dumps(results()))
    assert command.main(["--results", str(tmp_path)]) == 0
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == ["training"]


def test_the_bytes_repeat(tmp_path: Path) -> None:
    content = results()
    for part in ("curves", "cells"):
        content[part] = [entry for entry in content[part] if entry["problem"] == "plan" and entry["staleness"] == 4]
    with style.styled():
        first = [path.read_bytes() for path in style.save(drawn(content), tmp_path, "a")]
        second = [path.read_bytes() for path in style.save(drawn(content), tmp_path, "b")]
    assert first == second
