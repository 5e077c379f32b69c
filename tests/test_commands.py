"""The command line of `ctpo.train`; `ctpo eval` has its tests beside those of the evaluation."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
from sandbox_backends import BACKENDS, require_backend

from ctpo.cli import main


def test_help_needs_nothing_heavy():
    code = (
        "import sys\nfrom ctpo.cli import main\n"
        "try:\n    main(['eval', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'scipy', 'pyarrow') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.splitlines()[-1] == "[]"
    assert "--compare" in found.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_sandbox_runs_files_in_one_session(tmp_path, capsys, backend):
    require_backend(backend)
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text("x = 6\nprint('six')")
    second.write_text("x * 7")
    assert main(["sandbox", str(first), str(second), "-c", "x + 1", "--backend", backend]) == 0
    assert capsys.readouterr().out == "six\n42\n7\n"


@pytest.mark.parametrize("backend", BACKENDS)
def test_sandbox_stops_at_a_failure(capsys, backend):
    require_backend(backend)
    assert main(["sandbox", "-c", "print('before')\n1 / 0", "--backend", backend]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("before\n")
    assert "ZeroDivisionError" in printed


def test_sandbox_without_a_program_says_what_works(capsys, monkeypatch):
    sandbox = importlib.import_module("ctpo.train.sandbox")
    for reasons, status in (
        ({"bubblewrap": "no bwrap", "monty": ""}, 0),
        ({"bubblewrap": "no bwrap", "monty": "x"}, 1),
    ):
        monkeypatch.setattr(sandbox, "backends", lambda reasons=reasons: reasons)
        assert main(["sandbox"]) == status
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(maxsplit=1) for line in lines] == [[k, v or "works"] for k, v in reasons.items()]


def test_sandbox_refuses_where_nothing_isolates(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert main(["sandbox", "-c", "1", "--backend", "bubblewrap"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ctpo sandbox: ")
    assert "install bubblewrap" in error


def test_sandbox_names_a_missing_file(capsys):
    assert main(["sandbox", "no-such-file.py"]) == 2
    assert "no-such-file.py" in capsys.readouterr().err


def test_score_of_one_answer(capsys):
    assert main(["score", r"It is \boxed{0.5}.", "--ground-truth", "1/2", "--rewards", "math:1,format:0.5"]) == 0
    assert capsys.readouterr().out == "correct, answer 1/2, total 1.5 (math 1, format 1)\n"
    assert main(["score", "I do not know.", "--ground-truth", "1/2"]) == 0
    assert capsys.readouterr().out == "not correct, no answer found, total 0 (math 0)\n"


def test_score_of_a_file(tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    rows = [
        {"response": r"\boxed{4}", "ground_truth": "4"},
        {"response": r"\boxed{5}", "reward_model": {"ground_truth": "4"}},
        {"response": r"\boxed{6}? I was wrong. It is \boxed{4}.", "ground_truth": "4"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert main(["score", "--file", str(file), "--rewards", "math,format:0.5"]) == 0
    lines = ["3 answers, 2 correct", "  math: mean 0.6667", "  format: mean 0.6667", "  total: mean 1"]
    assert capsys.readouterr().out.splitlines() == lines
    assert main(["score", "--file", str(file), "--json"]) == 0
    scores = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [score["correct"] for score in scores] == [True, False, True]
    assert [score["answer"] for score in scores] == ["4", "5", "4"]


def test_score_reports_what_failed(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text("def reward(response):\n    return 1 / len(response)\n")
    (tmp_path / "answers.jsonl").write_text('{"response": "ab"}\n{"response": ""}\n')
    monkeypatch.chdir(tmp_path)
    assert main(["score", "--file", "answers.jsonl", "--rewards", "mine:reward"]) == 1
    assert "mean 0.25, 1 failed and count 0" in capsys.readouterr().out
    assert main(["score", "", "--rewards", "mine:reward"]) == 1
    assert "mine:reward failed: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"response": "a"}\n{', "line 2: no JSON"),
        ("[1]", 'line 1: must be an object with a text "response"'),
        ('{"response": 3}', 'line 1: must be an object with a text "response"'),
        ("\n", "has no lines"),
    ],
)
def test_score_names_the_bad_line(tmp_path, capsys, content, text):
    file = tmp_path / "answers.jsonl"
    file.write_text(content)
    assert main(["score", "--file", str(file)]) == 2
    assert text in capsys.readouterr().err


def test_score_wants_one_source_of_truth(tmp_path, capsys):
    assert main(["score", "--file", "a.jsonl", "--ground-truth", "4"]) == 2
    assert "--ground-truth goes with RESPONSE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["score"])


def test_data_show(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"q": "What is 1 + 1?", "a": 2, "noise": 1}\n{"q": "?"}\n')
    command = ["data", "show", str(file), "--columns", "prompt=q, ground_truth=a", "--drop", "noise"]
    assert main(command) == 2
    assert f"ctpo data: {file}: line 2" in capsys.readouterr().err
    assert main([*command, "--skip-bad-rows", "--system-prompt", "Be brief."]) == 0
    printed = capsys.readouterr().out
    assert "Be brief." in printed
    assert "noise" not in printed
    assert "Left out 1 bad row" in printed
    for bad in ("prompt", "prompt=", "=q", "prompt=q,"):
        assert main(["data", "show", str(file), "--columns", bad]) == 2
        assert "--columns" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            ModuleNotFoundError("No module named 'trl.x'", name="trl.x"),
            'needs trl: pip install ".[train]" in the clone of ctpo',
        ),
        (ModuleNotFoundError("No module named 'vllm'", name="vllm"), "needs vllm: pip install vllm"),
        (ModuleNotFoundError("", name="liger_kernel.ops"), "needs liger_kernel: pip install liger-kernel"),
        (
            ImportError("cannot import name 'a' from 'trl'", name="trl"),
            "cannot import name 'a' from 'trl'" + ': pip install ".[train]" in the clone of ctpo',
        ),
        (ImportError("X needs\n  Y: pip install Y"), "X needs Y: pip install Y"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(capsys, monkeypatch, error, text):
    def missing(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(importlib.import_module("ctpo.train.data"), "show_source", missing)
    assert main(["data", "show", "x.parquet"]) == 2
    assert capsys.readouterr().err == f"ctpo data: {text}\n"


def test_missing_package_and_interruption(capsys, monkeypatch):
    data = importlib.import_module("ctpo.train.data")

    def missing(*_: object, **__: object) -> str:
        raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")

    def interrupted(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "show_source", missing)
    assert main(["data", "show", "x.parquet"]) == 2
    assert capsys.readouterr().err == 'ctpo data: needs pyarrow: pip install ".[train]" in the clone of ctpo\n'
    monkeypatch.setattr(data, "show_source", interrupted)
    assert main(["data", "show", "x.parquet"]) == 130
