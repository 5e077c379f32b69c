from __future__ import annotations

import copy
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from paper_figures import __main__ as command
from paper_figures import data, style
from paper_figures.data import MissingError, Positions

CHECKOUT = Path(__file__).parents[1]
ESTIMATORS = ("token", "cumulative", "cumulative mean", "sequence", "sequence mean (GSPO)")


def recorded(name: str, kind: str, sigma: float, power: float, n: int, drift: float) -> dict[str, Any]:
    t = range(1, 65)
    return {
        "name": name,
        "kind": kind,
        "t": list(t),
        "mean": [drift * k for k in t],
        "std": [sigma * k**power for k in t],
        "n": [n - k // 16 for k in t],
    }


def results() -> dict[str, Any]:
    """The layout that `python -m simulations verify` writes, with numbers made up from closed forms."""
    rows = [
        {
            "world": f"world {k}",
            "estimator": name,
            "engine": "enumeration",
            "relative_bias": 3e-16 if name in ("cumulative", "sequence") else 0.02 * 2**k * (1 + j / 5),
            "relative_variance": 1.0 if name == "sequence" else (0.2, 0.5, 0.9)[k] + (j == 4 and k == 2) * 0.4,
        }
        for k in range(3)
        for j, name in enumerate(ESTIMATORS)
    ]
    at = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    exact = [math.expm1(0.04 * k) for k in range(1, 97)]
    n = 20_000
    updates = [
        recorded(f"updates_{k}, {group}", "update", sigma * k**0.5, power, 40, drift * k)
        for k in (1, 4, 16)
        for group, sigma, power, drift in (("trained on", 0.02, 1.0, -0.01), ("held out", 0.01, 0.5, -5e-5))
    ]
    return {
        "provenance": {
            "commit": "0123456789abcdef0123",
            "dirty": True,
            "configuration": {"seed": 7, "quick": True},
            "finished": "never the same twice",
        },
        "claims": [{"id": "1"}, {"id": "T1", "evidence": [{"numbers": {"rows": rows}}, {"numbers": {}}]}],
        "findings": [{"title": "Findings on TinyLM: spread and drift", "rows": []}],
        "series": {
            "synthetic": [
                {
                    "name": name,
                    "t": at,
                    "mean": [-(sigma**2) * k / 2 for k in at],
                    "std": [sigma * k**0.5 for k in at],
                }
                for name, sigma in (("independent binary tokens, sigma = 0.0335", 0.0335), ("trigram of a text", 0.005))
            ],
            "recorded": [
                recorded("temperature_0.98", "temperature", 0.05, 0.5, 160, -1e-3),
                recorded("temperature_1.02", "temperature", 0.05, 0.5, 160, -1.2e-3),
                recorded("bfloat16", "precision", 0.06, 0.5, 160, -2e-3),
                recorded("float32_batch_1", "precision", 1e-7, 0.5, 160, 0.0),
                recorded("top_p_0.9", "truncation", 0.03, 0.5, 160, -0.05),
                *updates,
            ],
            "monte_carlo": {
                "world": "chain",
                "n": n,
                "t": list(range(1, 97)),
                "exact_mean_log": [-0.02 * k for k in range(1, 97)],
                "sampled_mean_log": [-0.02 * k + 0.5 * 0.2 * (k / n) ** 0.5 for k in range(1, 97)],
                "error_mean_log": [0.2 * (k / n) ** 0.5 for k in range(1, 97)],
                "exact_variance": exact,
                "sampled_variance": [0.98 * v for v in exact],
                # The error grows as the tail does: few samples carry the variance at the end.
                "error_variance": [v * 0.01 * math.exp(0.04 * k) for k, v in enumerate(exact)],
            },
        },
    }


@pytest.fixture(scope="module")
def figures() -> dict[str, Figure]:
    """Every figure, laid out."""
    found = {}
    with style.styled():
        for name, draw in command.FIGURES.items():
            found[name] = draw(results())
            style.lay_out(found[name])
    return found


def write(folder: Path, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / data.FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def without(path: str) -> dict[str, Any]:
    """The results without the entry at a dotted path."""
    content = results()
    *parents, last = path.split(".")
    inner = content
    for key in parents:
        inner = inner[key]
    del inner[last]
    return content


def texts(figure: Figure) -> list[Text]:
    """What is drawn, ticks outside the limits left out."""
    unseen: set[Text] = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high:
                unseen |= {tick.label1, tick.label2}
    found = (text for text in figure.findobj(Text) if isinstance(text, Text) and text not in unseen)
    return [text for text in found if text.get_visible() and text.get_text().strip()]


# --- the files ------------------------------------------------------------------------------------------------------


def test_every_figure_is_written_and_the_bytes_repeat(
    tmp_path: Path, figures: dict[str, Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    content = results()
    content["provenance"]["finished"] = "another time"
    folder = write(tmp_path / "with spaces", content)
    assert command.main(["--results", str(folder)]) == 0
    captured = capsys.readouterr()
    files = sorted((folder / "figures").iterdir())
    assert sorted(captured.out.splitlines()) == [str(path) for path in files]
    assert not captured.err
    assert [path.name for path in files] == sorted(
        f"{name}.{kind}" for name in command.FIGURES for kind in ("png", "svg")
    )
    for path in files:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
        assert path.stat().st_size > 10_000
    with style.styled():
        for name, figure in figures.items():
            for path in style.save(figure, tmp_path / "again", name):
                assert path.read_bytes() == (folder / "figures" / path.name).read_bytes()


def test_the_overview_is_as_large_as_the_readme_shows_it(figures: dict[str, Figure]) -> None:
    width, height = figures["overview"].get_size_inches() * style.DPI
    assert (round(width), round(height)) == (1600, 700)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, figures: dict[str, Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "overview.png").write_text("old")

    def refuse(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("os.replace", refuse)
    with style.styled(), pytest.raises(OSError, match="no room"):
        style.save(figures["overview"], tmp_path, "overview")
    assert [path.name for path in tmp_path.iterdir()] == ["overview.png"]
    assert (tmp_path / "overview.png").read_text() == "old"


def test_drawing_imports_neither_the_library_nor_the_simulations(tmp_path: Path) -> None:
    code = (
        "import sys; from paper_figures.__main__ import main; assert main(['--results', sys.argv[1]]) == 2;"
        "print([m for m in sys.modules if m.split('.')[0] in ('ctpo', 'simulations', 'torch')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert "python -m simulations verify" in done.stderr


def check_texts(figure: Figure, *, touch: float = 2, above: Callable[[str], bool] = lambda _: False) -> None:
    """Assert that no text is cut or covered by another.

    Args:
        figure: The figure.
        touch: By how many pixels the boxes of neighboring lines may overlap.
        above: Which texts begin above what is seen of them and may lie over others.
    """
    with style.styled():
        figure.draw_without_rendering()  # at its own resolution, which saving as SVG changes
    # Of the text alone: that of an annotation has its arrow in it.
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts(figure)]
    inside = figure.bbox
    for text, box in boxes:
        assert inside.x0 <= box.x0 < box.x1 <= inside.x1, text
        assert inside.y0 <= box.y0 < box.y1 <= inside.y1, text
    for (text, box), (other, second) in itertools.combinations(boxes, 2):
        across = min(box.x1, second.x1) - max(box.x0, second.x0)
        along = min(box.y1, second.y1) - max(box.y0, second.y0)
        if not (above(text) or above(other)):
            assert across <= touch or along <= touch, f"{text!r} covers {other!r}"


# --- what a reader sees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", command.FIGURES)
def test_no_text_is_cut_or_covered_by_another(figures: dict[str, Figure], name: str) -> None:
    check_texts(figures[name])


@pytest.mark.parametrize("name", command.FIGURES)
def test_every_figure_names_its_axes_and_its_source(figures: dict[str, Figure], name: str) -> None:
    shown = "\n".join(text.get_text() for text in texts(figures[name]))
    assert "verification.json, commit 012345678 with local changes, seed 7, quick run" in shown
    assert all(axes.get_xlabel() or name == "exact_sampled" for axes in figures[name].axes)
    assert any(axes.get_ylabel() for axes in figures[name].axes) or name == "bias_variance"


def test_titles_follow_the_numbers() -> None:
    def title(name: str, content: dict[str, Any]) -> str:
        with style.styled():
            return command.FIGURES[name](content).texts[0].get_text()

    content = results()
    assert "spreads like √t and drifts down like t" in title("spread_synthetic", content)
    assert re.search(
        r"TinyLM: spread like .*0\.50.* on held-out, .*1\.00.* on trained-on", title("spread_recorded", content)
    )
    assert title("bias_variance", content).endswith("of the two, cumulative varies less")
    assert "agree" in title("exact_sampled", content)
    assert "spread almost like t" in title("overview", content)

    content["series"]["synthetic"][1]["std"] = [0.001 * k for k in content["series"]["synthetic"][1]["t"]]
    assert "√t" not in title("spread_synthetic", content)
    for entry in content["series"]["recorded"]:
        if entry["name"].endswith("trained on"):
            entry["std"] = [0.02 * k**0.5 for k in entry["t"]]
    assert "like t" not in title("overview", content)
    rows = content["claims"][1]["evidence"][0]["numbers"]["rows"]
    next(row for row in rows if row["estimator"] == "cumulative")["relative_variance"] = 1.2
    assert title("bias_variance", content).endswith("cumulative varies less in 2 of 3 worlds")
    next(row for row in rows if row["estimator"] == "cumulative")["relative_bias"] = 0.1
    assert title("bias_variance", content) == "Unbiased ratios: sequence"
    content["series"]["monte_carlo"]["sampled_mean_log"][5] += 1
    assert "DIFFER" in title("exact_sampled", content)


def test_only_a_bias_of_rounding_is_drawn_as_zero(figures: dict[str, Figure]) -> None:
    bias = figures["bias_variance"].axes[0]
    zero = bias.get_xticks()[0]
    assert bias.get_xticklabels()[0].get_text() == "exact 0\n(rounding)"
    dots = [line.get_xdata() for line in bias.lines if line.get_marker() == "o"]
    assert [bool(np.all(values == zero)) for values in dots] == [True, True, False, False, False]
    # Left of every other dot, and of the scale's first tick.
    assert zero < min(np.min(values) for values in dots[2:])
    assert zero < bias.get_xticks()[1]


def test_no_variance_is_tested_where_few_samples_carry_it(figures: dict[str, Figure]) -> None:
    found = data.sampled(results())
    trusted = found.variance_samples >= 500
    assert trusted[0]
    assert not trusted[-1]
    drawn = figures["exact_sampled"].axes[3].lines[1].get_ydata()
    assert np.array_equal(np.isfinite(drawn), trusted)


# --- the numbers ----------------------------------------------------------------------------------------------------


def test_the_power_is_the_weighted_slope() -> None:
    t, std, n = [1, 2, 3, 5, 9], [0.1, 0.13, 0.2, 0.19, 0.4], [9, 9, 8, 5, 3]
    weights = [(k - 1) / s for k, s in zip(n, t, strict=True)]
    x, y = [math.log(s) for s in t], [math.log(s) for s in std]
    total = sum(weights)
    x_mean = sum(w * a for w, a in zip(weights, x, strict=True)) / total
    y_mean = sum(w * b for w, b in zip(weights, y, strict=True)) / total
    slope = sum(w * (a - x_mean) * (b - y_mean) for w, a, b in zip(weights, x, y, strict=True)) / sum(
        w * (a - x_mean) ** 2 for w, a in zip(weights, x, strict=True)
    )
    arrays = [np.array(values, dtype=float) for values in (t, [0] * 5, std, n)]
    assert Positions("pair", "update", *arrays).power == pytest.approx(slope, rel=1e-12)


def test_samples_that_carry_a_variance() -> None:
    rng = np.random.default_rng(0)
    values = rng.exponential(size=1000)
    square = (values - values.mean()) ** 2
    variance = square.mean()
    error = math.sqrt((np.mean(square**2) - variance**2) / len(values))
    one = {"mean": np.zeros(1), "variance": np.array([variance])}
    found = data.Sampled("world", 1000, np.ones(1), one, one, {"mean": np.ones(1), "variance": np.array([error])})
    assert found.variance_samples[0] == pytest.approx(square.sum() ** 2 / (square**2).sum(), rel=1e-10)


@pytest.mark.parametrize(
    ("wanted", "gap"), [([0.5, 0.5, 0.5], 0.1), ([0.0, 0.01, 0.9], 0.1), ([1.0, 1.0], 0.2), ([0.2], 0.5), ([], 0.1)]
)
def test_labels_are_moved_apart_inside_the_axes(wanted: list[float], gap: float) -> None:
    places = style.spread_out(wanted, gap)
    assert len(places) == len(wanted)
    assert all(b - a >= gap - 1e-12 for a, b in itertools.pairwise(places))
    assert all(-1e-12 <= place <= 1 + 1e-12 for place in places)
    if wanted == [0.5, 0.5, 0.5]:
        assert places == pytest.approx([0.4, 0.5, 0.6])


# --- missing and malformed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "named", "left_out"),
    [
        ("series.synthetic", "series.synthetic", {"spread_synthetic"}),
        ("series.recorded", "series.recorded", {"spread_recorded", "overview"}),
        ("series.monte_carlo", "series.monte_carlo", {"exact_sampled"}),
        ("claims", "claims", {"bias_variance", "overview"}),
    ],
)
def test_a_missing_part_is_named_and_the_rest_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, named: str, left_out: set[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(style, "save", lambda _figure, folder, name: [folder / name])
    assert command.main(["--results", str(write(tmp_path, without(path)))]) == 0
    captured = capsys.readouterr()
    assert {Path(line).name for line in captured.out.splitlines()} == set(command.FIGURES) - left_out
    messages = captured.err.splitlines()
    assert {line.split(":")[0] for line in messages} == left_out
    assert all("not drawn" in line and named in line for line in messages)


def test_after_verify_only_another_claim_table_one_is_said_to_be_missing() -> None:
    content = results()
    del content["claims"][1]
    with pytest.raises(MissingError, match="T1 is not among them"):
        data.table_one(content)
    content = results()
    content["claims"][1]["evidence"] = []
    with pytest.raises(MissingError, match=r"T1\.evidence is empty"):
        data.table_one(content)


def test_nothing_to_draw_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--results", str(write(tmp_path, {"claims": []}))]) == 1
    assert "no figure drawn" in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00"])
def test_a_file_that_is_not_a_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    assert command.main(["--results", str(write(tmp_path, content))]) == 2
    assert "verification.json: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("series", 3, r"series is a int, not an object"),
        ("series.recorded", {"a": 1}, r"series.recorded is a dict, not a list"),
        ("series.recorded.0", None, r"series.recorded\[0\] is a NoneType"),
        ("series.recorded.0.std", [1.0], r"series.recorded\[0\].std has 1 numbers, series.recorded\[0\].t has 64"),
        ("series.recorded.0.std.3", None, r"series.recorded\[0\].std is not a list of finite numbers"),
        ("series.recorded.0.std.3", -1.0, r"series.recorded\[0\].std has numbers below 0"),
        ("series.recorded.0.t.0", 2, r"series.recorded\[0\].t are not positions"),
        ("series.recorded.0.n.0", 1, r"series.recorded\[0\].n has numbers of sequences below 2"),
        ("series.recorded.0.kind", 3, r"series.recorded\[0\].kind is 3, not a string"),
        ("series.synthetic.1.std.10", 0.0, r"series.synthetic\[1\].std ends with 0"),
        ("series.synthetic.1.mean", "x", r"series.synthetic\[1\].mean is not a list"),
        ("series.monte_carlo.error_variance.0", 0.0, r"series.monte_carlo has a variance or a standard error"),
        ("series.monte_carlo.n", 1.5, r"series.monte_carlo.n is 1.5"),
        ("claims.1.evidence.0.numbers.rows.2.relative_bias", None, r"rows\[2\].relative_bias is None"),
        ("claims.1.evidence.0.numbers.rows.2.relative_variance", 0, r"rows\[2\].relative_variance is 0"),
        ("claims.1.evidence.0.numbers.rows.2", 1, r"rows\[2\] is a int"),
    ],
)
def test_a_malformed_part_is_named_and_fails(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    value: Any,
    message: str,
) -> None:
    content = copy.deepcopy(results())
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    inner: Any = content
    for key in parents:
        inner = inner[key]
    inner[last] = value
    monkeypatch.setattr(style, "save", lambda _figure, folder, name: [folder / name])
    assert command.main(["--results", str(write(tmp_path, content))]) == 1
    captured = capsys.readouterr()
    assert re.search(r"not drawn, verification\.json is malformed: .*" + message, captured.err)
    assert captured.out


def test_rows_of_a_world_that_only_some_ratios_have(tmp_path: Path) -> None:
    content = results()
    content["claims"][1]["evidence"][0]["numbers"]["rows"].pop()
    with pytest.raises(ValueError, match="different numbers of worlds"):
        data.table_one(content)


def test_what_the_recording_may_lack(figures: dict[str, Figure]) -> None:
    content = results()
    content["series"]["recorded"] = [s for s in content["series"]["recorded"] if s["kind"] != "update"]
    with style.styled():
        with pytest.raises(MissingError, match="no pair of kind update"):
            command.FIGURES["overview"](content)
        figure = command.FIGURES["spread_recorded"](content)
        assert len(figure.axes) == 2
        assert figure.texts[0].get_text() == "TinyLM: spread of the log-ratio by position"
        content["series"]["recorded"] = [s for s in content["series"]["recorded"] if s["name"] == "float32_batch_1"]
        with pytest.raises(MissingError, match="no pair spreads"):
            command.FIGURES["spread_recorded"](content)
    assert len(figures["spread_recorded"].axes) == 6


def test_a_spread_too_small_for_the_axis_is_stated() -> None:
    content = results()
    with style.styled():
        for std, said in ((None, "float32 batch 1: below 0.000001"), (0.0, "float32 batch 1: exactly 0")):
            entry = next(s for s in content["series"]["recorded"] if s["name"] == "float32_batch_1")
            entry["std"] = entry["std"] if std is None else [std] * len(entry["t"])
            figure = command.FIGURES["spread_recorded"](content)
            assert said in [text.get_text() for text in texts(figure)]
            command.FIGURES["overview"](content)


def test_an_unknown_source_is_said_to_be_unknown() -> None:
    assert data.source({}) == "verification.json, commit unknown, seed unknown"
    assert data.model({}) == "a language model"
