"""Studies: every task once, also after an interruption, on any backend."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from simulations import __main__ as cli
from simulations import sweep, tables


def squared(number: int, folder: str) -> dict[str, float]:
    """One task; it leaves a mark, so that a test can count how often it was done, and fails where it is told to."""
    if (Path(folder) / f"fail at {number}").exists():
        raise ZeroDivisionError("planted")
    with open(f"{folder}/{number}", "a") as file:
        file.write("x")
    return {"number": number, "square": number**2, "none": float("nan")}


def study(folder, count: int = 5) -> sweep.Study:
    marks = folder / "marks"
    marks.mkdir(exist_ok=True)

    def tasks(seed, quick):
        numbers = range(seed, seed + (2 if quick else count))
        return {f"n{k}": {"number": k, "folder": str(marks)} for k in numbers}

    def summary(done):
        rows = [{"key": key, "square": result["square"]} for key, result in done.items()]
        return {"rows": rows, "tables": [{"title": "Squares", "note": "exact", "rows": rows}]}

    return sweep.Study("squares", "What is a square?", tasks, squared, summary)


def times_done(folder: Path) -> dict[str, int]:
    return {path.name: len(path.read_text()) for path in sorted((folder / "marks").iterdir())}


def test_every_task_is_done_once_and_the_file_is_complete(tmp_path):
    data = sweep.run(study(tmp_path), tmp_path)
    assert [row["square"] for row in data["rows"]] == [0, 1, 4, 9, 16]
    written = json.loads((tmp_path / "squares.json").read_text())
    assert written["rows"] == data["rows"]
    assert written["provenance"]["configuration"] == {
        "study": "squares",
        "seed": 0,
        "quick": False,
        "jobs": 1,
        "backend": "loky",
    }
    assert times_done(tmp_path) == {str(k): 1 for k in range(5)}
    assert not (tmp_path / "squares.partial.jsonl").exists()


def interrupted(tmp_path) -> sweep.Study:
    """A study whose task 3 failed after 0, 1 and 2, and will not fail again."""
    found = study(tmp_path)
    trap = tmp_path / "marks" / "fail at 3"
    trap.touch()
    with pytest.raises(ZeroDivisionError, match="planted") as caught:
        sweep.run(found, tmp_path)
    assert "in the task 'n3'" in "".join(getattr(caught.value, "__notes__", []))
    assert not (tmp_path / "squares.json").exists()
    trap.unlink()
    return found


def test_a_run_goes_on_where_it_was_interrupted(tmp_path):
    mended = interrupted(tmp_path)
    data = sweep.run(mended, tmp_path)
    assert times_done(tmp_path) == {str(k): 1 for k in range(5)}
    assert data["rows"] == sweep.run(study(tmp_path), tmp_path)["rows"]


def test_a_torn_line_is_done_again(tmp_path):
    mended = interrupted(tmp_path)
    path = tmp_path / "squares.partial.jsonl"
    path.write_text(path.read_text()[:-9])
    sweep.run(mended, tmp_path)
    assert times_done(tmp_path) == {"0": 1, "1": 1, "2": 2, "3": 1, "4": 1}


@pytest.mark.parametrize("change", ["seed", "quick", "code"])
def test_work_of_another_run_is_not_reused(tmp_path, monkeypatch, change):
    mended = interrupted(tmp_path)
    if change == "code":
        monkeypatch.setattr(sweep, "code_fingerprint", lambda: "another version")
    sweep.run(mended, tmp_path, seed=1 if change == "seed" else 0, quick=change == "quick")
    assert times_done(tmp_path)["1"] == 2


def test_work_that_is_not_reused_is_not_thrown_away_in_silence(tmp_path, capsys):
    mended = interrupted(tmp_path)
    sweep.run(mended, tmp_path, seed=1, console=tables.console())
    assert "was of other settings" in capsys.readouterr().out


def test_the_fingerprint_is_of_the_source(tmp_path, monkeypatch):
    before = sweep.code_fingerprint()
    assert before == sweep.code_fingerprint()
    for package in ("ctpo", "simulations"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(sweep.results, "CHECKOUT", tmp_path)
    first = sweep.code_fingerprint()
    (tmp_path / "simulations" / "a.py").write_text("x = 2\n")
    assert len({before, first, sweep.code_fingerprint()}) == 3


def slow_square(number: int) -> dict[str, int]:
    time.sleep(0.01)
    return {"square": number**2}


@pytest.mark.filterwarnings("default")  # Dask's and its dependencies' own
@pytest.mark.parametrize("backend", ["loky", "threading", "dask"])
def test_backends_agree(tmp_path, backend):
    tasks = {f"n{k}": {"number": k} for k in range(6)}
    asked = sweep.Study("squares", "", lambda *_: tasks, slow_square, lambda done: {"rows": dict(done), "tables": []})
    data = sweep.run(asked, tmp_path, jobs=2, backend=backend)
    assert data["rows"] == {f"n{k}": {"square": k**2} for k in range(6)}


@pytest.mark.filterwarnings("default")
def test_a_dask_scheduler_elsewhere(tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        found = sweep.unordered(divmod, [(7, 2), (9, 4)], backend="dask", scheduler=cluster.scheduler_address)
        assert sorted(found) == [(2, 1), (3, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "dusk"}, "backend: 'dusk' cannot be used"),
        ({"scheduler": "tcp://nowhere:1"}, "scheduler: only for the backends 'dask' and 'ray'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        list(sweep.unordered(divmod, [(7, 2)], **options))


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "STUDIES", {"squares": study(tmp_path)})
    assert cli.main(["run", "squares", "--jobs", "1", "--quick", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Squares" in out
    assert "squares.json" in out
    assert json.loads((tmp_path / "squares.json").read_text())["provenance"]["configuration"]["quick"] is True
    with pytest.raises(SystemExit):
        cli.main(["run", "circles"])
    assert cli.main(["run", "squares", "--backend", "dusk", "--output", str(tmp_path)]) == 2
