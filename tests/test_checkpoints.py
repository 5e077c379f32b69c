"""Checkpoints: complete or skipped with the reason, tied to settings, saved on a signal, whole after any death."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from killed_runs import KilledRun, kill_at_moments, step_of
from tiny_run import At, differences, forked, outcome, tiny_trainer, train
from trl import GRPOTrainer

from ctpo.train._checkpoint_files import MANIFEST, UNFINISHED, begin, finish, rotate
from ctpo.train._checkpoints import check_writable, fingerprint, last_checkpoint

SHORT: dict[str, Any] = {"gradient_accumulation_steps": 2, "num_iterations": 1, "save_total_limit": 2}


def checkpoint(directory: Path, step: int, *, resumable: bool = True) -> Path:
    path = directory / f"checkpoint-{step}"
    begin(path)
    (path / "sub").mkdir()
    (path / "weights").write_text("12345")
    (path / "sub" / "state").write_text("1")
    finish(path, {"step": step}, resumable=resumable)
    return path


def test_there_is_none_in_a_new_directory(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "missing") == (None, [])
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-3").write_text("a file")
    assert last_checkpoint(tmp_path) == (None, [])


def test_the_last_one_is_the_one_completed_last_whatever_its_step(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert last_checkpoint(tmp_path) == (second, [])
    shutil.copytree(first, tmp_path / "kept")
    # Someone went on from an earlier one.
    other = checkpoint(tmp_path, 5)
    assert last_checkpoint(tmp_path) == (other, [])


def damage(path: Path, how: str) -> None:
    if how == "no marker":
        (path / MANIFEST).unlink()
    elif how == "unfinished":
        (path / MANIFEST).rename(path / UNFINISHED)
    elif how == "empty":
        shutil.rmtree(path)
        path.mkdir()
    elif how == "file missing":
        (path / "sub" / "state").unlink()
    elif how == "file cut":
        (path / "weights").write_text("123")
    elif how == "marker cut":
        (path / MANIFEST).write_text('{"format"')
    else:
        (path / MANIFEST).write_text('{"format": "ctpo checkpoint 0"}')


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("no marker", "has no ctpo_checkpoint.json: another trainer wrote it"),
        ("unfinished", "was not finished: the process ended while it was being saved"),
        ("empty", "was not finished: the process ended while it was being saved"),
        ("file missing", "lacks sub/state"),
        ("file cut", "has 3 of the 5 bytes of weights"),
        ("marker cut", "cannot be read: "),
        ("another format", "was written by another version of ctpo ('ctpo checkpoint 0', not 'ctpo checkpoint 1')"),
    ],
)
def test_what_is_not_complete_is_skipped_with_the_reason(tmp_path: Path, how: str, reason: str) -> None:
    good, bad = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    damage(bad, how)
    found, [(path, why)] = last_checkpoint(tmp_path)
    assert (found, path) == (good, bad)
    assert why.startswith(reason)


def test_weights_alone_are_no_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 2, resumable=False)
    assert last_checkpoint(tmp_path) == (None, [(path, "holds weights only (save_only_model)")])


def test_rotation_spares_the_last_the_best_and_what_others_wrote(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path, step) for step in (8, 10, 2, 4)]
    foreign = tmp_path / "checkpoint-1"
    foreign.mkdir()
    (foreign / "trainer_state.json").write_text("{}")
    begin(tmp_path / "checkpoint-3")
    (tmp_path / ".removed-checkpoint-7").mkdir()
    rotate(tmp_path, None)
    assert sorted(os.listdir(tmp_path)) == sorted(["checkpoint-1", *(path.name for path in paths)])
    rotate(tmp_path, 3, keep=[paths[0]])
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-2", "checkpoint-4", "checkpoint-8"]
    rotate(tmp_path, 1, keep=[paths[0]])
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-4", "checkpoint-8"]
    rotate(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-4"]


def test_a_directory_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^cannot write to output_dir .*/file/run: Not a directory$"):
        check_writable(tmp_path / "file" / "run")
    check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []


def test_the_fingerprint_is_of_rows_and_their_order(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"{i}"}], "image": bytes([i % 256])} for i in range(2500)]
    data = Dataset.from_list(rows)
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    again = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    assert fingerprint(data) == fingerprint(again) == fingerprint(data.select(range(2500)))
    others = [data.select(range(2499)), data.select([*range(2498), 2499, 2498]), data.rename_column("image", "picture")]
    assert len({fingerprint(other) for other in [data, *others]}) == 4
    assert fingerprint(data.to_iterable_dataset()) == "stream"


# ------------------------------------------------------------------------------------------------ whether it may go on


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with checkpoints 2 and 4."""
    directory = tmp_path_factory.mktemp("finished")
    train(tiny_trainer(directory, **SHORT))
    return directory


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_generations": 4}, "num_generations was 2 and is 4"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size was 2 and is 4"),
        ({"steps_per_generation": 2}, "steps_per_generation was 4 and is 2"),
        ({"num_iterations": 2}, "num_iterations was 1 and is 2"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps was 2 and is 1"),
        ({"seed": 1}, "seed was 42 and is 1"),
        ({"learning_rate": 1e-3}, "learning_rate was 0.01 and is 0.001"),
        ({"prompts": 7}, "train_dataset was 6 rows, [0-9a-f]{12} and is 7 rows, [0-9a-f]{12}"),
    ],
)
def test_what_a_checkpoint_is_tied_to_may_not_change(finished: Path, change: dict[str, Any], text: str) -> None:
    trainer = tiny_trainer(finished, **SHORT | change)
    with pytest.raises(ValueError, match=f"^cannot resume from .*checkpoint-2: .*{text}.*another output_dir$"):
        train(trainer, resume_from_checkpoint=str(finished / "checkpoint-2"))
    assert trainer.state.global_step == 0


def test_other_changes_are_named_and_harmless_ones_are_not(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"temperature": 0.5, "max_steps": 3, "logging_steps": 2, "report_to": [], "save_strategy": "no"}
    train(tiny_trainer(tmp_path, **SHORT | changes), resume_from_checkpoint=str(finished / "checkpoint-2"))
    [line] = [record.getMessage() for record in caplog.records if record.name == "ctpo.train._checkpoints"]
    assert line.endswith("checkpoint-2 belongs to: max_steps was 4 and is 3; temperature was 1.0 and is 0.5")


def test_one_that_is_not_complete_is_refused_by_name_and_skipped_otherwise(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    broken = tmp_path / "run" / "checkpoint-4"
    os.truncate(broken / "optimizer.pt", 10)
    with pytest.raises(
        ValueError, match=r"^cannot resume from .*checkpoint-4: it has 10 of the \d+ bytes of optimizer.pt$"
    ):
        train(tiny_trainer(tmp_path / "run", **SHORT), resume_from_checkpoint=str(broken))
    trainer = train(tiny_trainer(tmp_path / "run", **SHORT), resume_from_checkpoint=True)
    assert f"Skipped: {broken} has 10 of the" in caplog.text
    assert trainer.state.global_step == 4
    assert last_checkpoint(tmp_path / "run") == (broken, [])
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    os.truncate(broken / "optimizer.pt", 10)
    with pytest.raises(ValueError, match=r"^no complete checkpoint in .*; .*checkpoint-4 has 10 of the"):
        train(tiny_trainer(tmp_path / "run", **SHORT), resume_from_checkpoint=True)


def test_one_of_another_trainer_is_taken_by_name_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tiny_trainer(tmp_path, kind=GRPOTrainer, **SHORT))
    assert last_checkpoint(tmp_path)[0] is None
    trainer = train(tiny_trainer(tmp_path, **SHORT), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "another trainer wrote it. Training goes on from its weights, but not exactly" in caplog.text
    assert trainer.state.global_step == 4


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_where(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"save_steps": 100, "max_steps": 4}
    whole = outcome(train(tiny_trainer(tmp_path / "whole", **options)))
    before = signal.getsignal(number)
    trainer = tiny_trainer(tmp_path / "cut", **options)
    trainer.callback_handler.callbacks.insert(0, At(2, lambda: os.kill(os.getpid(), number)))
    train(trainer)
    assert trainer.interrupted_by == number
    assert signal.getsignal(number) is before
    path = tmp_path / "cut" / "checkpoint-2"
    assert last_checkpoint(tmp_path / "cut") == (path, [])
    said = capfd.readouterr().err
    assert f"{number.name}: the running step is finished and saved; once more ends it at once\n" in said
    assert (f"stopped by {number.name} after step 2 of 4: saved in {path}") in said
    resumed = train(tiny_trainer(tmp_path / "cut", **options), resume_from_checkpoint=True)
    assert resumed.interrupted_by is None
    assert differences(outcome(resumed), whole) == []


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    trainer = tiny_trainer(tmp_path, **SHORT)
    trainer.add_callback(At(1, twice))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(trainer)
    assert trainer.state.global_step == 1
    assert signal.getsignal(signal.SIGTERM) is before
    assert last_checkpoint(tmp_path) == (None, [])


def test_without_checkpoints_a_signal_ends_it_and_says_that_nothing_was_saved(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = tiny_trainer(tmp_path, **SHORT, save_strategy="no")
    trainer.callback_handler.callbacks.insert(0, At(1, lambda: os.kill(os.getpid(), signal.SIGINT)))
    train(trainer)
    assert trainer.state.global_step == 1
    assert "stopped by SIGINT after step 1 of 4: nothing was saved (save_strategy is 'no')" in capfd.readouterr().err
    assert not list(tmp_path.glob("checkpoint-*"))


def test_an_interrupted_epoch_is_not_evaluated_nor_its_last_checkpoint_removed(tmp_path: Path) -> None:
    options = {
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "per_device_eval_batch_size": 2,
        "save_total_limit": 1,
    }
    data = Dataset.from_dict({"prompt": ["a b"]})
    trainer = tiny_trainer(tmp_path, eval_dataset=data, max_steps=6, **SHORT | options)
    trainer.callback_handler.callbacks.insert(0, At(3, lambda: os.kill(os.getpid(), signal.SIGINT)))
    train(trainer)
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [2]
    assert last_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-3"


def test_in_another_thread_signals_are_left_alone(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, **SHORT)
    thread = threading.Thread(target=train, args=[trainer])
    thread.start()
    thread.join()
    assert trainer.state.global_step == 4
    assert last_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-4"


# ------------------------------------------------------------------------------------------------ full disks and death


# The largest file is the optimizer's state, then come weights, the tokenizer, other states.
@pytest.mark.parametrize("size", [300, 900, 2_000, 6_000, 12_000])
def test_a_full_disk_is_one_clear_line_and_the_former_checkpoint_is_intact(tmp_path: Path, size: int) -> None:
    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def run() -> None:
        trainer = tiny_trainer(tmp_path / "run", **SHORT)
        trainer.add_callback(At(3, fill))
        try:
            train(trainer)
        except OSError as error:
            (tmp_path / "said").symlink_to(str(error))  # nothing can be written to a file

    os.waitpid(forked(run, Path("/dev/null")), 0)  # a log would be full, too
    said = os.readlink(tmp_path / "said")
    former = tmp_path / "run" / "checkpoint-2"
    assert said.startswith(f"cannot save {tmp_path / 'run' / 'checkpoint-4'}: ")
    assert said.endswith(f"; {former} is intact, to go on from")
    assert "\n" not in said
    assert last_checkpoint(tmp_path / "run") == (former, [])
    assert not (tmp_path / "run" / "checkpoint-4").exists()


def test_other_errors_while_saving_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    trainer = tiny_trainer(tmp_path, **SHORT)
    monkeypatch.setattr(trainer, "_save_scaler", fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"^no memory$"):
        train(trainer)
    assert last_checkpoint(tmp_path)[0] is None


def test_state_that_could_not_be_read_back_is_refused_when_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(tmp_path, **SHORT)
    monkeypatch.setattr(trainer, "_extra_state", lambda: {"a": [1, object()]})
    with pytest.raises(TypeError, match=r"state\['extra'\]\['a'\]\[1\] of a checkpoint must be .* got object"):
        train(trainer)


def test_kill_9_loses_nothing_before_the_last_complete_checkpoint(tmp_path: Path) -> None:
    options = {**SHORT, "save_steps": 1, "max_steps": 12}
    whole = KilledRun(tmp_path / "whole", **options)
    start = time.perf_counter()
    assert whole.wait(whole.go_on()) == 0
    moments = (time.perf_counter() - start) * np.random.default_rng(3).uniform(0.2, 0.4, 3)
    # `python tests/killed_runs.py` does it 20 times.
    reached, _ = kill_at_moments(tmp_path / "killed", list(moments), **options)
    assert reached == sorted(reached)
    killed = KilledRun(tmp_path / "killed").result()
    assert differences(killed["outcome"], whole.result()["outcome"]) == []


def test_killed_at_any_file_it_touches_a_run_ends_the_same(tmp_path: Path) -> None:
    # `python tests/killed_runs.py` takes every one.
    options = {**SHORT, "save_steps": 1, "max_steps": 3, "save_total_limit": 1}
    whole = KilledRun(tmp_path / "whole", **options)
    assert whole.wait(whole.go_on()) == 0
    expected = whole.result()
    for event in (0.4, 0.7, 0.85, 1.0):
        at = round(event * expected["events"])
        run = KilledRun(tmp_path / f"killed{at}", **options)
        assert run.wait(run.go_on(kill_at_event=at)) == -signal.SIGKILL
        run.survives(None, 1)
        assert run.wait(run.go_on()) == 0, (run.directory / "log.txt").read_text()
        assert differences(run.result()["outcome"], expected["outcome"]) == []


def test_the_marker_lists_every_other_file(finished: Path) -> None:
    path = finished / "checkpoint-4"
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["files"] == {
        entry.name: entry.stat().st_size for entry in path.iterdir() if entry.name not in (MANIFEST, UNFINISHED)
    }
    assert manifest["step"] == step_of(path)
    assert {"ctpo_state_0.pt", "model.safetensors", "optimizer.pt", "rng_state.pth"} <= manifest["files"].keys()
