"""The figure of the phase diagram: what it shows follows the numbers, and nothing in it covers anything else."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_paper_figures as others
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from paper_figures import __main__ as command
from paper_figures import data, phase, style

PRODUCTS = ["no ratio", "token", "window 4", "cumulative", "lookahead 4", "sequence"]
HORIZONS, DIVERGENCES, BATCHES, SHORT_BATCHES = (8, 16, 32), (1e-4, 1e-3, 1e-2), (8, 256, 4096), (8, 32, 2048)
REWARDS = {
    "solved": "outcome reward, solved or not",
    "critic of the target": "exact critic of the target policy",
}


def entry(reward: str, horizon: int, divergence: float, batch: int, winner: str, **more: Any) -> dict[str, Any]:
    cell = {"reward": reward, "horizon": horizon, "divergence": divergence, "batch": batch, "winner": winner}
    return {**cell, "models": 6, "margin": 1.1, "error": {winner: 0.5}, **more}


def results() -> dict[str, Any]:
    """The layout that `python -m simulations run phase` writes."""
    winner = {"solved": "sequence", "critic of the target": "cumulative"}
    return {
        "provenance": {"commit": "0123456789abcdef", "dirty": False, "configuration": {"seed": 3, "quick": False}},
        "estimators": PRODUCTS,
        "rewards": dict(REWARDS),
        "tie": 1.02,
        "diagram": [
            entry(reward, horizon, divergence, batch, winner[reward])
            for reward, horizon, divergence, batch in itertools.product(REWARDS, HORIZONS, DIVERGENCES, BATCHES)
        ],
        "named": [
            entry(reward, 8, divergence, batch, "minpro" if batch == 8 else "token")
            for reward, divergence, batch in itertools.product(REWARDS, DIVERGENCES, SHORT_BATCHES)
        ],
    }


def drawn(content: dict[str, Any]) -> Figure:
    with style.styled():
        figure = phase.phase(content)
        style.lay_out(figure)
    return figure


@pytest.fixture(scope="module")
def figure() -> Figure:
    return drawn(results())


def marks(axes: Any) -> dict[tuple[float, float], Any]:
    """The marks of a panel by place."""
    return {tuple(map(float, mark.get_offsets()[0])): mark for mark in axes.collections}


def test_no_text_is_cut_or_covered_by_another(figure: Figure) -> None:
    # Titles of panels begin with an empty line, where the heading of the row stands.
    others.check_texts(figure, above=lambda text: text.startswith("\n"))


def test_panels_rows_and_the_source_are_named(figure: Figure) -> None:
    shown = "\n".join(text.get_text() for text in others.texts(figure))
    for expected in (
        "Outcome reward, solved or not",
        "Exact critic of the target policy",
        "batch of 8",
        "batch of 4,096",
        "all estimators, H = 8",
        "KL(b‖π) per token (nats)",
        "median of 6 random bigram models",
        "phase.json, commit 012345678, seed 3",
    ):
        assert expected in shown
    assert [axes.get_xlabel() for axes in figure.axes[:4]] == ["horizon H (tokens)"] * 3 + ["batch (sequences)"]
    assert [tick.get_text() for tick in figure.axes[3].get_xticklabels()] == ["8", "32", "2k"]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["0.0001", "0.001", "0.01"]


def test_every_cell_is_drawn_at_its_place_with_its_winner() -> None:
    content = results()
    changed = next(
        cell
        for cell in content["diagram"]
        if (cell["reward"], cell["horizon"], cell["divergence"], cell["batch"]) == ("solved", 32, 1e-3, 256)
    )
    changed |= {"winner": "token", "error": {"token": 1.5}, "margin": 1.3}
    axes = drawn(content).axes
    assert [len(panel.collections) for panel in axes] == [9] * 8 + [0]
    found = marks(axes[1])
    assert set(found) == set(itertools.product((0.0, 1.0, 2.0), repeat=2))
    odd = found.pop((2.0, 1.0))
    assert to_hex(odd.get_edgecolor()[0]).upper() == style.ORANGE
    assert to_hex(odd.get_facecolor()[0]) == "#ffffff"  # the best is worse than no step
    for mark in found.values():
        assert to_hex(mark.get_facecolor()[0]).upper() == style.VERMILION
        assert mark.get_sizes()[0] == phase.SIZES[1]
    assert {to_hex(mark.get_edgecolor()[0]).upper() for mark in marks(axes[4]).values()} == {style.BLUE}


@pytest.mark.parametrize(("margin", "size"), [(0.7, 0), (1.019, 0), (1.02, 1), (1.19, 1), (1.2, 2), (9.0, 2)])
def test_size_says_how_far_ahead_the_winner_is(margin: float, size: int) -> None:
    content = results()
    for cell in content["diagram"]:
        cell["margin"] = margin
    assert {mark.get_sizes()[0] for mark in drawn(content).axes[0].collections} == {phase.SIZES[size]}


def test_no_two_winners_look_the_same() -> None:
    content = results()
    for cell, name in zip(content["named"], [*PRODUCTS, "minpro", "ctpo_mean", "gspo", "cispo"], strict=False):
        cell |= {"winner": name, "error": {name: 0.5}}
    looks = phase._looks(data.phase(content))
    assert list(looks) == [*PRODUCTS, "cispo", "ctpo_mean", "gspo", "minpro"]
    assert len(set(looks.values())) == len(looks)


def test_the_title_follows_the_numbers() -> None:
    content = results()
    said = "On these models the cumulative ratio wins with an exact critic, not with an outcome reward"
    unsaid = "Which ratio has the least mean squared error depends on the reward"
    assert drawn(content).texts[0].get_text() == said
    content["diagram"][0] |= {"winner": "cumulative", "error": {"cumulative": 0.5}, "margin": 1.01}
    assert drawn(content).texts[0].get_text() == said  # a tie is no win
    content["diagram"][0]["margin"] = 1.03
    assert drawn(content).texts[0].get_text() == unsaid
    content = results()
    for cell in content["diagram"][-14:]:
        cell |= {"winner": "token", "error": {"token": 0.5}}
    assert drawn(content).texts[0].get_text() == unsaid


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["rewards"], None, "rewards is not an object of titles"),
        (["estimators"], "token", "estimators is not a list of names"),
        (["tie"], 0.5, "tie is 0.5, not a factor"),
        (["diagram"], [], "diagram is not a list of cells"),
        (["named"], None, "named is not a list of cells"),
        (["diagram", 2, "winner"], 3, r"diagram\[2\].winner is 3, not a string"),
        (["diagram", 2, "margin"], None, r"diagram\[2\].margin is None, not a number above 0"),
        (["diagram", 2, "error"], {}, r"diagram\[2\].error is None, not a number above 0"),
        (["named", 1, "horizon"], -8, r"named\[1\].horizon is -8"),
        (["named", 1, "reward"], "chess", "named: holds a kind of reward without a title"),
        (["diagram", 0], 7, r"diagram\[0\]"),
    ],
)
def test_malformed_results_are_named(path: list[Any], value: Any, message: str) -> None:
    content = copy.deepcopy(results())
    inner: Any = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        data.phase(content)


def test_it_is_drawn_when_its_file_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style, "save", lambda _figure, folder, name: [folder / name])
    (tmp_path / "phase.json").write_text(json.dumps(results()))
    assert command.main(["--results", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert [Path(line).name for line in captured.out.splitlines()] == ["phase"]
    assert "verification.json: no such file" in captured.err
    others.write(tmp_path, others.results())
    assert command.main(["--results", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert {Path(line).name for line in captured.out.splitlines()} == {*command.FIGURES, "phase"}
    assert not captured.err
    (tmp_path / "phase.json").write_text("{")
    assert command.main(["--results", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "phase.json: not JSON" in captured.err
    assert "`python -m simulations run phase` writes it anew" in captured.err
    assert len(captured.out.splitlines()) == len(command.FIGURES)


def test_the_bytes_repeat(tmp_path: Path, figure: Figure) -> None:
    with style.styled():
        first = [path.read_bytes() for path in style.save(drawn(results()), tmp_path, "a")]
        second = [path.read_bytes() for path in style.save(drawn(results()), tmp_path, "b")]
    assert first == second
    assert np.all([len(content) > 10_000 for content in first])
