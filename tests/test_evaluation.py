"""Evaluation: numbers that can be worked out by hand, and directories that survive whatever befalls their process."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
from itertools import combinations

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sandbox_backends import require_backend
from tiny_models import save_tiny_chat_model, tiny_tokenizer

from ctpo.train._run_directory import RunDirectory
from ctpo.train._run_settings import describe_model
from ctpo.train.data import Problem
from ctpo.train.evaluation import compare, comparison_text, evaluate, results_text
from ctpo.train.generation import Sampling
from ctpo.train.sandbox import open_sandbox

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "80"}
FILES = ("samples.jsonl", "problems.parquet", "results.json", "settings.json", "timings.jsonl")


class Scripted:
    """Says what it is told to: for each "problem N" in a prompt a list of answers, one after the other.

    Where the tool is used, an answer is a list of turns, and each problem has one answer.
    """

    context = None

    def __init__(self, answers, *, template="plain", context=None):
        self.tokenizer = tiny_tokenizer(template)
        self.eos_token_ids = frozenset({self.tokenizer.eos_token_id})
        self.context = context
        self.seeds = []
        self._answers = {number: iter(texts) for number, texts in answers.items()}
        self._turns = {}

    def generate(self, prompt_ids, sampling, seed):
        self.seeds.append(seed)
        return [self._turn(list(ids))[: sampling.max_tokens] for ids in prompt_ids]

    def _turn(self, ids):
        number = int(re.search(r"problem (\d+)", self.tokenizer.decode(ids))[1])
        if not self._turns.get(number):
            found = next(self._answers[number])
            self._turns[number] = [found] if isinstance(found, str) else list(found)
        said = self._turns[number].pop(0)
        return self.tokenizer.encode(said + ("" if said.endswith("```\n") else "<|im_end|>"))


def problem(number, truth, source="sums", **extra):
    return Problem(f"{source}-{number}", [{"role": "user", "content": f"problem {number}"}], truth, source, **extra)


def boxed(answer):
    return f"\\boxed{{{answer}}}"


def quiet(model, data, output, **options):
    return evaluate(model, data, output=output, progress=False, **{"sampling": Sampling(64), **options})


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- numbers


ANSWERS = {
    # Number: truth, answers; every answer is one of truth, others, or none (None).
    1: ("7", ["7", "7", "7", "7"]),
    2: ("12", ["12", "5", "5", None]),
    3: ("3", ["1", "2", "3", "9"]),
    4: ("8", [None, None, None, "8"]),
    5: ("2", ["4", "4", "4", "5"]),
}


def majority(answers, truth, k):
    """By all subsets: ties are broken evenly, answers that are not there do not vote."""
    won = []
    for chosen in combinations(answers, k):
        votes = {answer: chosen.count(answer) for answer in chosen if answer is not None}
        best = [answer for answer in votes if votes[answer] == max(votes.values())]
        won.append(sum(answer == truth for answer in best) / len(best) if best else 0.0)
    return sum(won) / len(won)


def test_metrics_are_those_of_a_count_by_hand(tmp_path):
    script = {
        number: ["I do not know" if text is None else f"So {boxed(text)}" for text in texts]
        for number, (_, texts) in ANSWERS.items()
    }
    problems = [problem(number, truth, "odd" if number % 2 else "even") for number, (truth, _) in ANSWERS.items()]
    found = quiet(Scripted(script), problems, tmp_path / "run", samples=4, batch_size=3, rewards="math:1,format:0.5")

    def mean(value, numbers=tuple(ANSWERS)):
        return pytest.approx(sum(value(*ANSWERS[number]) for number in numbers) / len(numbers), abs=1e-12)

    for part, numbers in ((found["overall"], (1, 2, 3, 4, 5)), (found["sources"]["odd"], (1, 3, 5))):
        metrics = {name: value["mean"] for name, value in part["metrics"].items()}
        assert part["problems"] == len(numbers)
        assert part["samples"] == 4 * len(numbers)
        assert metrics.pop("avg@4") == mean(lambda truth, texts: texts.count(truth) / 4, numbers)
        for k in range(1, 5):
            assert metrics.pop(f"pass@{k}") == mean(
                lambda truth, texts, k=k: sum(truth in chosen for chosen in combinations(texts, k)) / math.comb(4, k),
                numbers,
            )
            assert metrics.pop(f"maj@{k}") == mean(lambda truth, texts, k=k: majority(texts, truth, k), numbers)
        assert metrics.pop("format") == mean(lambda truth, texts: sum(text is not None for text in texts) / 4, numbers)
        assert metrics.pop("reward") == mean(
            lambda truth, texts: sum((text == truth) + 0.5 * (text is not None) for text in texts) / 4, numbers
        )
        # A byte is a token; one more ends the turn.
        lengths = [[len(said) + 1 for said in script[number]] for number in numbers]
        assert metrics.pop("tokens") == pytest.approx(sum(map(sum, lengths)) / 4 / len(numbers))
        assert metrics == {"tool_calls": 0, "truncated": 0, "out_of_rounds": 0}
    assert list(found["sources"]) == ["odd", "even"]
    assert found["overall"]["failures"] == {"samples": 0, "reasons": {}}
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == found

    rows = pq.read_table(tmp_path / "run" / "problems.parquet").to_pylist()
    assert [row["id"] for row in rows] == [one.id for one in problems]
    assert [row["correct"] for row in rows] == [texts.count(truth) for truth, texts in ANSWERS.values()]
    assert [row["sample_answer"] for row in rows] == [texts for _, texts in ANSWERS.values()]
    assert rows[1]["pass_at_k"] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rows[0]["mean_reward"] == 1.5

    lines = read_lines(tmp_path / "run" / "samples.jsonl")
    assert [(line["problem"], line["sample"]) for line in lines] == [(p, s) for p in range(5) for s in range(4)]
    assert [line["chunk"] for line in lines] == [place // 3 for place in range(20)]
    assert lines[4]["messages"] == [{"role": "assistant", "content": "So \\boxed{12}"}]
    assert (
        sum(timing["tokens"] for timing in read_lines(tmp_path / "run" / "timings.jsonl")) == found["timing"]["tokens"]
    )


def test_every_chunk_has_a_seed_of_its_own(tmp_path):
    problems = [problem(number, "1") for number in range(4)]

    def seeds(name, seed):
        scripted = Scripted({number: [boxed(1)] * 2 for number in range(4)})
        quiet(scripted, problems, tmp_path / name, samples=2, batch_size=2, seed=seed, rewards="format")
        return scripted.seeds

    first = seeds("a", 0)
    assert len(set(first)) == 4
    assert first == seeds("b", 0)
    assert not set(first) & set(seeds("c", 1))


def test_rewards_that_fail_are_counted_and_named(tmp_path):
    script = Scripted({1: [boxed(1), boxed("1" * 5000)], 2: [boxed(2), boxed(2)]})
    found = quiet(script, [problem(1, "1"), problem(2, "2")], tmp_path, samples=2, sampling=Sampling(6000))
    assert found["overall"]["metrics"]["avg@2"]["mean"] == 0.75
    assert found["overall"]["failures"]["samples"] == 1
    (reason,) = found["overall"]["failures"]["reasons"]
    assert reason.startswith("math: ")
    assert "! rewards failed on 1 of 4 samples" in results_text(found)


def test_flags_of_rollouts_are_counted(tmp_path):
    script = Scripted({1: ["x" * 99, boxed(1)], 2: [boxed(2), boxed(2)]})
    found = quiet(script, [problem(1, "1"), problem(2, "2")], tmp_path, samples=2, rewards="format")["overall"]
    assert found["metrics"]["truncated"]["mean"] == 0.25
    assert found["metrics"]["tokens"]["mean"] == (64 + 3 * (len(boxed(1)) + 1)) / 4


# ---- tools


CODE = "```python\nprint(6 * 7)\n```\n"


def call(code):
    arguments = json.dumps({"name": "python", "arguments": {"code": code}})
    return f"<tool_call>\n{arguments}\n</tool_call>"


@pytest.mark.parametrize("backend", ["bubblewrap", "monty"])
def test_tools_in_both_forms(tmp_path, backend):
    require_backend(backend)
    for form, template, said in (("fenced", "plain", CODE), ("calls", "qwen3", call("print(6 * 7)"))):
        script = Scripted({1: [[said, boxed(42)]], 2: [[said, said]]}, template=template)
        found = quiet(
            script,
            [problem(1, "42"), problem(2, "42")],
            tmp_path / form,
            samples=1,
            sampling=Sampling(4000),
            tools="auto",
            max_rounds=1,
            sandbox=backend,
        )
        assert found["resolved"]["tools"] == form
        assert found["resolved"]["sandbox"] == backend
        metrics = {name: value["mean"] for name, value in found["overall"]["metrics"].items()}
        assert metrics["avg@1"] == 0.5
        assert metrics["tool_calls"] == 1
        assert metrics["out_of_rounds"] == 0.5
        assert metrics["truncated"] == 0
        first = read_lines(tmp_path / form / "samples.jsonl")[0]
        assert [message["role"] for message in first["messages"]] == ["assistant", "tool", "assistant"]
        assert first["messages"][1]["content"].strip() == "42"
        assert first["completion_tokens"] > first["tokens"]
        assert f"tools: {form} in {backend}" in " ".join(results_text(found).split())


def test_own_sandbox_is_used_and_left_open(tmp_path):
    require_backend("monty")
    with open_sandbox("monty") as sandbox:
        options = {"samples": 1, "sampling": Sampling(4000), "tools": "fenced", "sandbox": sandbox}
        found = quiet(Scripted({1: [[CODE, boxed(42)]]}), [problem(1, "42")], tmp_path, **options)
        assert found["settings"]["sandbox"]["backend"] == "monty"
        assert sandbox.session().run("1 + 1").output.strip() == "2"


def test_an_output_takes_a_part_of_an_answer_only(tmp_path):
    require_backend("monty")
    cell = "```python\nprint('x' * 100_000)\n```\n"
    options = {"samples": 1, "sampling": Sampling(20_000), "tools": "fenced", "sandbox": "monty"}
    quiet(Scripted({1: [[cell, boxed(42)]]}), [problem(1, "42")], tmp_path, **options)
    shown = read_lines(tmp_path / "samples.jsonl")[0]["messages"][1]["content"]
    assert 3500 < len(shown) < 4200


# ---- arguments


def test_greedy_needs_no_more_than_one_sample(tmp_path):
    greedy = {"sampling": Sampling(64, temperature=0.0), "rewards": "format"}
    with pytest.raises(ValueError, match=r"samples must be 1 at temperature 0.*got 4"):
        quiet(Scripted({1: []}), [problem(1, "1")], tmp_path / "a", samples=4, **greedy)
    assert not (tmp_path / "a").exists()
    found = quiet(Scripted({1: [boxed(1)]}), [problem(1, "1")], tmp_path / "b", **greedy)
    assert found["settings"]["samples"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be an integer from 1 to 1000, got 0"),
        ({"samples": 1001}, "got 1001"),
        ({"samples": True}, "got True"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"max_rounds": 1.5}, "max_rounds must be an integer of at least 0, got 1.5"),
        ({"rewards": "maths"}, "did you mean 'math'"),
        ({"rewards": ""}, "at least one reward"),
        ({"tools": "python"}, "tools must be one of"),
        ({"limit": 3}, "data must be sources or problems, at least one; got problems, which take no options"),
    ],
)
def test_arguments_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        quiet(Scripted({}), [problem(1, "1")], tmp_path, **{"rewards": "format", **options})


def test_data_is_checked(tmp_path):
    with pytest.raises(ValueError, match="at least one; got nothing"):
        quiet(Scripted({}), [], tmp_path)
    with pytest.raises(ValueError, match=r"nowhere\.parquet"):
        quiet(Scripted({}), ["nowhere.parquet"], tmp_path)
    with pytest.raises(
        ValueError, match=r"the problem 'arithmetic-1-.*' of 'arithmetic' is in arithmetic.*two directo"
    ):
        quiet(Scripted({}), ["arithmetic?size=4", "arithmetic?size=3"], tmp_path)
    assert not any((tmp_path / name).exists() for name in FILES)


def test_prompts_longer_than_the_context(tmp_path, capsys):
    problems = [problem(1, "1"), Problem("long", [{"role": "user", "content": "problem 2" + "?" * 500}], "2")]
    answers = {1: [boxed(1)], 2: [boxed(2)]}
    options = {"samples": 1, "rewards": "format"}
    with pytest.raises(ValueError, match=r"1 of 2 problems have 400 tokens or more.*: long; --skip-long"):
        quiet(Scripted(answers, context=400), problems, tmp_path, **options)
    found = evaluate(
        Scripted(answers, context=400), problems, output=tmp_path, sampling=Sampling(390), skip_long=True, **options
    )
    shown = capsys.readouterr().err
    assert "left out: the prompts of 1 of 2 problems" in shown
    assert "leaves fewer than max_tokens=390 for 1 of 2 problems" in shown
    assert found["skipped"] == ["long"]
    assert found["overall"]["problems"] == 1
    assert "! left out, longer than the context: long" in results_text(found)
    with pytest.raises(ValueError, match="of 1 problems have 400"):
        quiet(Scripted(answers, context=400), problems[1:], tmp_path / "all", skip_long=True, **options)


# ---- directories


def test_finished_evaluation_is_read_again(tmp_path, capsys):
    options = {"samples": 2, "rewards": "format"}
    found = quiet(Scripted({1: [boxed(1)] * 2}), [problem(1, "1")], tmp_path, **options)
    # Nothing left to say: it would fail if it were asked.
    again = evaluate(Scripted({1: []}), [problem(1, "1")], output=tmp_path, sampling=Sampling(64), **options)
    assert again == found
    assert f"{tmp_path} is finished" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nowhere"):
        quiet(Scripted({}), "nowhere.jsonl", tmp_path, overwrite=True, **options)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    anew = quiet(Scripted({1: ["no", "no"]}), [problem(1, "1")], tmp_path, overwrite=True, **options)
    assert anew["overall"]["metrics"]["format"]["mean"] == 0
    assert len(read_lines(tmp_path / "samples.jsonl")) == 2


def test_other_settings_are_refused(tmp_path):
    model = save_tiny_chat_model(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1+1", "answer": "2"}\n')
    options = {"samples": 2, "rewards": "format", "sampling": Sampling(4)}
    quiet(model, data, tmp_path / "run", **options)
    for changed, message in (
        ({"samples": 3}, "samples 2 there, 3 now"),
        ({"sampling": Sampling(4, temperature=0.5)}, r"sampling.temperature 1.0 there, 0.5 now"),
        ({"seed": 1, "limit": 1}, "loading.limit null there, 1 now; seed 0 there, 1 now"),
        ({"rewards": "format:2"}, "rewards"),
        ({"tools": "fenced"}, 'tools "none" there, "fenced" now'),
        ({"system_prompt": "Hi"}, "the data .*data.jsonl has changed in between"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x null there, 1 now"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            quiet(model, data, tmp_path / "run", **{**options, **changed})
        assert "--overwrite" in str(raised.value)
    # What has only moved is the same.
    moved = model.rename(tmp_path / "moved")
    elsewhere = data.rename(moved / data.name)
    found = quiet(moved, elsewhere, tmp_path / "run", **options)
    # One step of training further, in the same place.
    save_tiny_chat_model(moved, seed=1)
    with pytest.raises(ValueError, match=r"model .*model there, .*moved now"):
        quiet(moved, elsewhere, tmp_path / "run", **options)
    anew = quiet(moved, elsewhere, tmp_path / "run", overwrite=True, **options)
    assert anew["settings"]["model"]["fingerprint"] != found["settings"]["model"]["fingerprint"]


def test_an_evaluation_that_drew_nothing_binds_nobody(tmp_path):
    class Broken(Scripted):
        def generate(self, *_):
            raise RuntimeError("no memory at all")

    problems = [problem(1, "1")]
    with pytest.raises(RuntimeError, match="no memory at all"):
        quiet(Broken({}), problems, tmp_path, samples=2)
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["samples"] == 2
    found = quiet(Scripted({1: [boxed(1)]}), problems, tmp_path, samples=1)
    assert found["settings"]["samples"] == 1


def test_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert describe_model("org/name") == {"name": "org/name", "fingerprint": None}
    for commit in ("c0ffee", "decade"):
        snapshot = tmp_path / "models--org--name" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (tmp_path / "models--org--name" / "refs").mkdir(exist_ok=True)
        (tmp_path / "models--org--name" / "refs" / "main").write_text(commit)
        assert describe_model("org/name")["fingerprint"] == commit
    assert describe_model("not/a/name")["fingerprint"] is None


def test_unfinished_evaluation_of_other_versions_is_refused(tmp_path):
    options = {"samples": 2, "rewards": "format"}
    quiet(Scripted({1: [boxed(1)] * 2}), [problem(1, "1")], tmp_path, **options)
    settings = json.loads((tmp_path / "settings.json").read_text())
    settings["versions"]["torch"] = "1.0"
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    quiet(Scripted({1: []}), [problem(1, "1")], tmp_path, **options)
    (tmp_path / "results.json").unlink()
    with pytest.raises(ValueError, match=r'torch "1\.0" there, ".*" now'):
        quiet(Scripted({1: []}), [problem(1, "1")], tmp_path, **options)


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"has a results.json but no settings.json"):
            quiet(Scripted({}), [problem(1, "1")], tmp_path, overwrite=overwrite)
    (tmp_path / "settings.json").write_text('{"theme": "dark"}')
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="was not written by this version of ctpo"):
            quiet(Scripted({}), [problem(1, "1")], tmp_path, overwrite=overwrite)
    assert (tmp_path / "results.json").read_text() == "{}"


def test_interrupt_says_where_it_goes_on(tmp_path, capsys, monkeypatch):
    class Interrupted(Scripted):
        def generate(self, prompt_ids, sampling, seed):
            if len(self.seeds) == 2:
                raise KeyboardInterrupt
            return super().generate(prompt_ids, sampling, seed)

    problems = [problem(number, "1") for number in range(3)]
    answers = {number: [boxed(1)] * 2 for number in range(3)}
    options = {"samples": 2, "batch_size": 2, "rewards": "format", "sampling": Sampling(64)}
    with pytest.raises(KeyboardInterrupt):
        evaluate(Interrupted(answers), problems, output=tmp_path, **options)
    assert f"stopped; 4 of 6 samples are in {tmp_path}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not finished"):
        compare(tmp_path, tmp_path)
    monkeypatch.setattr(Interrupted, "generate", Scripted.generate)
    found = evaluate(Interrupted({2: [boxed(1)] * 2}), problems, output=tmp_path, **options)
    assert "going on after 4 of 6 samples" in capsys.readouterr().err
    assert found["overall"]["metrics"]["format"]["mean"] == 1


def test_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    problems = [problem(number, "1") for number in range(3)]
    answers = {number: [boxed(1)] * 2 for number in range(3)}
    options = {"samples": 2, "batch_size": 2, "rewards": "format"}
    synced = os.fsync
    left = [6]  # settings, then two writes a chunk: the samples of the third chunk do not get there

    def fsync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(
        OSError, match=r"^cannot write .*samples.jsonl: No space left on device; samples that were .* kept$"
    ):
        quiet(Scripted(answers), problems, tmp_path, **options)
    monkeypatch.undo()
    found = quiet(Scripted({2: [boxed(1)] * 2}), problems, tmp_path, **options)
    assert found["overall"]["samples"] == 6
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".") and path.name != ".lock"] == []


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^cannot write .*file: [^;]*$"):
        quiet(Scripted({}), [problem(1, "1")], tmp_path / "file")
    with pytest.raises(OSError, match=r"^cannot write .*file/run: "):
        quiet(Scripted({}), [problem(1, "1")], tmp_path / "file" / "run")


# ---- the log


CHUNKS = [[(0, 0), (0, 1)], [(0, 2), (1, 0)], [(1, 1), (1, 2)]]


def write_log(path):
    with RunDirectory(path) as files:
        files.begin({"settings": {}})
        for chunk, pairs in enumerate(CHUNKS):
            rows = [
                {"chunk": chunk, "problem": problem, "sample": sample, "text": "ä\ud800\n"} for problem, sample in pairs
            ]
            files.append(rows, {"chunk": chunk, "seconds": 1.5})
    return (path / "samples.jsonl").read_bytes()


@given(st.data())
def test_cut_log_keeps_whole_chunks(tmp_path_factory, data):
    """A process may be killed, and a machine lose its power, at any byte."""
    path = tmp_path_factory.mktemp("log")
    whole = write_log(path)
    cut = data.draw(st.integers(0, len(whole)))
    garbage = data.draw(st.sampled_from([b"", b"\0" * 40, b'{"chunk": 9', b"\xff\xfe"]))
    (path / "samples.jsonl").write_bytes(whole[:cut] + garbage)
    ends = [0] + [[place for place, byte in enumerate(whole) if byte == 10][2 * chunk + 1] + 1 for chunk in range(3)]
    kept = max(end for end in ends if end <= cut)
    with RunDirectory(path) as files:
        rows = files.read_samples(CHUNKS)
        assert len(rows) == 2 * ends.index(kept)
        assert (path / "samples.jsonl").read_bytes() == whole[:kept]
        for chunk in range(len(rows) // 2, 3):
            added = [
                {"chunk": chunk, "problem": p, "sample": sample, "text": "ä\ud800\n"} for p, sample in CHUNKS[chunk]
            ]
            files.append(added, {"chunk": chunk, "seconds": 2.5})
        assert [timing["chunk"] for timing in files.read_timings()] == [0, 1, 2]
        assert {timing["seconds"] for timing in files.read_timings()[len(rows) // 2 :]} <= {2.5}
    assert (path / "samples.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("place", "line"), [(0, b"{}"), (2, b"not JSON"), (3, b'{"chunk": 1, "problem": 1, "sample": 1}')]
)
def test_damage_in_the_middle_of_a_log_is_named(tmp_path, place, line):
    lines = write_log(tmp_path).split(b"\n")
    lines[place] = line
    (tmp_path / "samples.jsonl").write_bytes(b"\n".join(lines))
    with RunDirectory(tmp_path) as files, pytest.raises(ValueError, match=f"line {place + 1} of .*samples.jsonl"):
        files.read_samples(CHUNKS)
    assert (tmp_path / "samples.jsonl").read_bytes() == b"\n".join(lines)


def test_log_that_is_longer_than_the_plan_is_named(tmp_path):
    write_log(tmp_path)
    with RunDirectory(tmp_path) as files, pytest.raises(ValueError, match=r"line 5 of .*samples.jsonl"):
        files.read_samples(CHUNKS[:2])


def test_temporary_files_of_a_killed_process_are_removed(tmp_path):
    write_log(tmp_path)
    (tmp_path / ".results.json.x3f").write_text("{")
    (tmp_path / ".hidden").write_text("of somebody else")
    with RunDirectory(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} - set(FILES) == {".hidden", ".lock"}


def test_one_evaluation_at_a_time(tmp_path):
    with RunDirectory(tmp_path):
        with pytest.raises(ValueError, match=f"{tmp_path} is being written by this process"):
            RunDirectory(tmp_path).__enter__()
        other = subprocess.run(
            [
                sys.executable,
                "-c",
                f"from ctpo.train._run_directory import *\nRunDirectory({str(tmp_path)!r}).__enter__()",
            ],
            capture_output=True,
            text=True,
        )
        assert f"is being written by process {os.getpid()} on" in other.stderr
    with RunDirectory(tmp_path):
        pass


def test_lock_of_a_killed_process_is_free_although_its_children_live(tmp_path):
    program = f"""
        import os, signal, subprocess, sys, time
        from ctpo.train._run_directory import RunDirectory
        RunDirectory({str(tmp_path)!r}).__enter__()
        if os.fork() == 0:  # a worker that knows nothing of the lock
            print(os.getpid(), flush=True)
            time.sleep(60)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE) as process:
        worker = int(process.stdout.readline())
        try:
            process.wait(60)
            with RunDirectory(tmp_path):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)


# ---- kill -9


DRIVER = """
    import os, random, signal, sys, time
    from pathlib import Path
    from transformers.utils import logging
    from ctpo.train.evaluation import evaluate
    from ctpo.train.generation import Sampling

    logging.disable_progress_bar()
    model, whole, cut, seed = sys.argv[1:]

    def run(output, data=("arithmetic?size=7", "arithmetic?size=6&difficulty=2")):
        evaluate(model, data, output=output, samples=6, sampling=Sampling(12), batch_size=4, rewards="format",
                 progress=False)

    def started(output):
        process = os.fork()
        if process == 0:
            try:
                run(output)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        return process

    run(whole + "-before", ["arithmetic?size=1"])  # all imports: what is left for the others is the evaluation
    begin = time.perf_counter()
    assert os.waitpid(started(whole), 0)[1] == 0
    took = time.perf_counter() - begin
    moments, kills = random.Random(int(seed)), 0
    while True:
        process, deadline = started(cut), time.perf_counter() + moments.uniform(0.1, 0.5) * took
        while (ended := os.waitpid(process, os.WNOHANG))[0] == 0 and (kills == 12 or time.perf_counter() < deadline):
            time.sleep(0.002)
        if ended[0]:
            assert ended[1] == 0
            break
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        kills += 1
    print(kills)
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_evaluation_goes_on_to_the_same_samples(tmp_path, seed):
    """Bit by bit, whenever it was killed."""
    model = save_tiny_chat_model(tmp_path / "model")
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), model, tmp_path / "whole", tmp_path / "cut", str(seed)]
    found = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) >= 1
    for name in ("samples.jsonl", "problems.parquet", "settings.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("whole", "cut")]
    for result in results:
        assert result.pop("timing")["tokens"] > 0
    assert results[0] == results[1]
    # Random samples: a run that began anew with each chunk, or repeated one, would be seen.
    texts = [line["messages"][0]["content"] for line in read_lines(tmp_path / "cut" / "samples.jsonl")]
    assert len(texts) == 78
    assert len(set(texts)) > 60


# ---- comparison


def counted(path, counts, n, *, number=0, **options):
    """An evaluation in which the problem `i` has `counts[i]` of n answers right."""
    problems = [problem(number + place, "1") for place in range(len(counts))]
    script = {number + place: [boxed(1)] * right + [boxed(2)] * (n - right) for place, right in enumerate(counts)}
    return quiet(Scripted(script), problems, path, samples=n, **options)


def test_comparison_has_the_known_difference(tmp_path):
    a, b = [0, 1, 2, 3, 4, 4, 2, 0], [1, 2, 2, 4, 4, 3, 3, 2]
    counted(tmp_path / "a", a, 4)
    counted(tmp_path / "b", b, 4)
    found = compare(tmp_path / "a", tmp_path / "b")
    one = found["overall"]["metrics"]["avg@4"]
    difference = [(right - left) / 4 for left, right in zip(a, b, strict=True)]
    mean = sum(difference) / 8
    error = math.sqrt(sum((value - mean) ** 2 for value in difference) / 7 / 8)
    assert (one["a"], one["b"]) == (sum(a) / 32, sum(b) / 32)
    assert one["difference"] == pytest.approx(mean)
    assert (one["larger"], one["smaller"]) == (5, 1)
    # Student's t with 7 degrees of freedom, from a table.
    assert one["low"] == pytest.approx(mean - 2.364624 * error, rel=1e-5)
    assert one["high"] == pytest.approx(mean + 2.364624 * error, rel=1e-5)
    assert 0.05 < one["p_value"] < 0.1
    assert 1.894579 < mean / error < 2.364624
    pairs = found["overall"]["metrics"]["pass@2"]
    assert pairs["a"] == pytest.approx(sum(1 - math.comb(4 - right, 2) / 6 for right in a) / 8)
    assert found["notes"] == []
    assert found["settings"] == []
    # The other way round: the same, with the other sign.
    back = compare(tmp_path / "b", tmp_path / "a")["overall"]["metrics"]["avg@4"]
    assert back["difference"] == pytest.approx(-mean)
    assert (back["low"], back["high"]) == (pytest.approx(-one["high"]), pytest.approx(-one["low"]))
    assert back["p_value"] == pytest.approx(one["p_value"])


def test_comparison_says_what_it_does_not_compare(tmp_path):
    counted(tmp_path / "a", [1, 2, 0, 2], 2)
    script = Scripted({3: [boxed(1)] * 4, 2: [boxed(1)] * 4, 9: ["no"] * 4, 1: [boxed(5)] * 4})
    problems = [
        problem(3, "1"),
        Problem("sums-2", [{"role": "user", "content": "problem 2, in other words"}], "1", "sums"),
        problem(9, "1"),
        problem(1, "5"),
    ]
    quiet(script, problems, tmp_path / "b", samples=4, rewards="math:1,format:1", seed=3)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found["unpaired"] == {"only_a": ["sums-0"], "only_b": ["sums-9"], "other_ground_truth": ["sums-1"]}
    metrics = found["overall"]["metrics"]
    assert found["overall"]["problems"] == 2
    assert (metrics["avg"]["a"], metrics["avg"]["b"]) == (0.5, 1.0)
    assert [name for name in metrics if name.startswith("pass")] == ["pass@1", "pass@2"]
    assert "reward" not in metrics
    notes = "\n".join(found["notes"])
    assert "1 problem only in A: sums-0" in notes
    assert "1 problem only in B: sums-9" in notes
    assert "1 problem with another ground truth in B, left out: sums-1" in notes
    assert "the prompts of 1 problem differ" in notes
    assert "A has 2 samples of each problem, B 4" in notes
    assert "the rewards differ" in notes
    assert any(text.startswith("seed 0 in A, 3 in B") for text in found["settings"])
    shown = comparison_text(found)
    assert all(len(line) <= 80 for line in shown.splitlines() if "/" not in line)
    counted(tmp_path / "c", [1], 2, number=70)
    with pytest.raises(ValueError, match="have no problem in common"):
        compare(tmp_path / "a", tmp_path / "c")
    with pytest.raises(ValueError, match="nowhere is not the directory of an evaluation"):
        compare(tmp_path / "a", tmp_path / "nowhere")


def test_same_run_twice_differs_in_nothing(tmp_path):
    counted(tmp_path / "a", [1, 0, 2], 2)
    counted(tmp_path / "b", [1, 0, 2], 2)
    for one in compare(tmp_path / "a", tmp_path / "b")["overall"]["metrics"].values():
        assert one["difference"] == 0
        assert one["p_value"] == 1


# ---- tables


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_table_is_markdown_that_fits_the_terminal(tmp_path):
    sources = ["one", "a|b", "a/rather-long/name of a source", "four"]
    problems = [problem(number, "1", sources[number % 4]) for number in range(8)]
    script = {number: [boxed(1)] * 8 for number in range(8)}
    found = quiet(Scripted(script), problems, tmp_path, samples=8)
    for width in (60, 80, 200):
        lines = results_text(found, width=width).splitlines()
        assert all(len(line) <= width for line in lines)
        tables = [[]]
        for line in lines:
            if line.startswith("|"):
                tables[-1].append(cells(line))
            elif tables[-1]:
                tables.append([])
        tables = [table for table in tables if table]
        assert [name for table in tables for name in table[0][1:]] == ["overall", "one", "a\\|b", *sources[2:]]
        for table in tables:
            assert {len(row) for row in table} == {len(table[0])}
            assert all(re.fullmatch("-+:?", cell) for cell in table[1])
            rows = {row[0]: row[1:] for row in table[2:]}
            assert list(rows)[:5] == ["problems", "avg@8", "same problems", "pass@2", "pass@4"]
            assert all(re.fullmatch(r"1\.00 \[0\.\d\d, 1\.00\]", cell) for cell in rows["avg@8"])
    assert len(results_text(found, width=200).splitlines()) < len(results_text(found, width=60).splitlines())


def test_single_problem_has_no_interval(tmp_path):
    found = quiet(Scripted({1: [boxed(1)]}), [problem(1, "1")], tmp_path, samples=1)
    entry = found["overall"]["metrics"]["avg@1"]
    assert entry["mean"] == 1
    assert entry["low"] is None
    assert "one problem" in entry["reason"]
    assert "| avg@1     |    1.00 |" in results_text(found)


# ---- command line


def ctpo(*arguments, cwd, **options):
    return subprocess.run(
        [sys.executable, "-m", "ctpo", "eval", *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def test_command_line_from_nothing(tmp_path):
    save_tiny_chat_model(tmp_path / "tiny")
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+2", "answer": 3}\n')
    common = ("tiny", "arithmetic?size=3", "sums.jsonl", "--samples", "2", "--max-tokens", "16")
    first = ctpo(*common, "--output", "a", "--rewards", "math,format:0.1", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "10 of 10 samples, avg" in first.stderr
    assert "%|" not in first.stderr  # no bars in a log
    assert first.stdout.startswith("tiny: 5 problems, 2 samples of each (max_tokens 16, temperature 1.0, no tools,\n")
    assert "| overall | arithmetic | sums |" in re.sub(" +", " ", first.stdout)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted([*FILES, ".lock"])
    second = ctpo(*common, "--output", "a", "--rewards", "math,format:0.1", "--json", cwd=tmp_path)
    assert json.loads(second.stdout) == json.loads((tmp_path / "a" / "results.json").read_text())
    assert "a is finished" in second.stderr


def test_command_line_refuses_in_one_line(tmp_path):
    for arguments, message in (
        (("tiny", "arithmetic"), "--output is missing"),
        (("a", "b", "--compare", "--samples", "3", "--limit", "2"), "--samples, --limit has no meaning with it"),
        (("a", "b", "c", "--compare"), "--compare needs two directories, got 3"),
        (("--compare", "a", "b"), "a is not the directory of an evaluation"),
    ):
        found = ctpo(*arguments, cwd=tmp_path)
        assert found.returncode == 2
        assert found.stderr.startswith("ctpo eval: ")
        assert message in found.stderr
        assert found.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_needs_nothing_heavy(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "transformers.py").write_text("raise SystemExit('transformers was imported')")
    found = ctpo("--help", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "ctpo eval --compare DIR_A DIR_B" in found.stdout


def test_ctrl_c_on_the_command_line(tmp_path):
    """Status 130, no traceback, and the same command goes on."""
    save_tiny_chat_model(tmp_path / "tiny")
    command = [
        sys.executable,
        "-m",
        "ctpo",
        "eval",
        "tiny",
        "arithmetic?size=40",
        "--samples",
        "8",
        "--max-tokens",
        "64",
    ]
    command += ["--batch-size", "4", "--rewards", "format", "--output", "run"]
    with subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr.readline() == "drawing 320 samples into run\n"
            assert "4 of 320 samples" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
            assert process.wait(60) == 130
        finally:
            process.kill()
    assert re.search(r"stopped; \d+ of 320 samples are in run, the same command goes on from there", rest)
    assert "Traceback" not in rest
