"""Runs that are killed, at moments or at every single thing that they do to files; `python tests/killed_runs.py` does
all of it."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_run import differences, forked, outcome, tiny_trainer, train

from ctpo.train._checkpoints import last_checkpoint

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")


def step_of(path: Path | None) -> int:
    return 0 if path is None else int(path.name.partition("-")[2])


class KilledRun:
    """A run in `directory` that each process continues from the last complete checkpoint."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.directory, self.options = directory, options
        directory.mkdir(exist_ok=True)

    def go_on(self, *, kill_at_event: int | None = None) -> int:
        """Start a process; it writes its outcome, and how often it touched files of the run."""

        def run() -> None:
            found, _ = last_checkpoint(self.directory / "run")
            events = self._count(kill_at_event)
            trainer = train(
                tiny_trainer(self.directory / "run", **self.options), resume_from_checkpoint=found is not None
            )
            torch.save({"outcome": outcome(trainer), "events": len(events)}, self.directory / "outcome.pt")

        return forked(run, self.directory / "log.txt")

    def _count(self, kill_at: int | None) -> list[str]:
        """Things done to files of checkpoints, as they happen; the process kills itself at one of them."""
        events: list[str] = []

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event in EVENTS and args and isinstance(args[0], str | Path) and "checkpoint-" in str(args[0]):
                events.append(f"{event} {args[0]}")
                if len(events) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        return events

    def wait(self, child: int) -> int:
        """The exit status, or minus the signal."""
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def result(self) -> dict[str, Any]:
        """What the process that came to the end left."""
        return torch.load(self.directory / "outcome.pt", weights_only=False)

    def survives(self, before: Path | None, limit: int) -> tuple[Path | None, list[str]]:
        """Assert that nothing was lost; the last complete checkpoint now, and why others were skipped."""
        last, skipped = last_checkpoint(self.directory / "run")
        assert step_of(last) >= step_of(before)
        assert len(skipped) <= 1, skipped
        complete = [path for path in (self.directory / "run").glob("checkpoint-*") if path not in dict(skipped)]
        assert len(complete) <= limit + 1
        return last, [reason for _, reason in skipped]


def kill_at_moments(directory: Path, moments: list[float], **options: Any) -> tuple[list[int], list[str]]:
    """Kill a run again and again, then let it end; steps it had reached, and why checkpoints were skipped."""
    run = KilledRun(directory, **options)
    reached, reasons = [], []
    before = None
    for moment in moments:
        child = run.go_on()
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        status = run.wait(child)
        if status == 0:
            break  # it had come to its end
        assert status == -signal.SIGKILL, (directory / "log.txt").read_text()
        before, skipped = run.survives(before, options["save_total_limit"])
        reached.append(step_of(before))
        reasons += skipped
    assert run.wait(run.go_on()) == 0, (directory / "log.txt").read_text()
    return reached, reasons


def main() -> None:
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp())
    options: dict[str, Any] = {
        "save_steps": 1,
        "save_total_limit": 2,
        "gradient_accumulation_steps": 2,
        "num_iterations": 1,
    }
    whole = KilledRun(work / "whole", max_steps=250, **options)
    start = time.time()
    assert whole.wait(whole.go_on()) == 0
    print(f"uninterrupted: {time.time() - start:.1f} s")
    moments = np.random.default_rng(0).uniform(0.1, 0.9, 20)
    reached, reasons = kill_at_moments(work / "moments", list(moments), max_steps=250, **options)
    print(len(reached), "kills; steps in the last complete checkpoint:", reached, "\nskipped:", reasons)
    killed = KilledRun(work / "moments").result()["outcome"]
    print("differences to the uninterrupted run:", differences(killed, whole.result()["outcome"]))
    every_event(work, options)


def every_event(work: Path, options: dict[str, Any]) -> None:
    short = KilledRun(work / "short", max_steps=4, **options)
    assert short.wait(short.go_on()) == 0
    expected = short.result()
    print("events of a run of 4 steps:", expected["events"])
    for event in range(1, expected["events"] + 1):
        run = KilledRun(work / f"event{event}", max_steps=4, **options)
        assert run.wait(run.go_on(kill_at_event=event)) == -signal.SIGKILL
        run.survives(None, 2)
        assert run.wait(run.go_on()) == 0, (run.directory / "log.txt").read_text()
        assert not differences(run.result()["outcome"], expected["outcome"]), event
    print("killed at each of them: no differences")


if __name__ == "__main__":
    main()
