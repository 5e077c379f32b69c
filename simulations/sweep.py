"""Studies: many independent measurements that run in parallel and survive an interruption.

A `Study` names its tasks and how to do one. `run` does them through joblib, whose backends take them from the cores
of one machine to a Dask or Ray cluster, and keeps every finished task in a file of JSON lines beside the results:
what was interrupted goes on where it stopped. A file of another seed, size or version of the code is not reused.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import threadpoolctl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from simulations import results

Task = Mapping[str, Any]

#: Backends that are known by name; joblib may have others registered.
BACKENDS = ("loky", "threading", "sequential", "dask", "ray")


@dataclass(frozen=True)
class Study:
    """A question that many independent measurements answer.

    Attributes:
        name: Of the result file, results/<name>.json.
        question: What it answers, in one sentence.
        tasks: (seed, quick) -> the tasks by key; each is the JSON-ready keyword arguments of `one`.
        one: Does one task; a function at the top of a module, with a JSON-ready result.
        summary: Results by key, in the order of the tasks -> the contents of the result file. Its "tables" are
            printed: a list of objects with a title, a note and rows.
    """

    name: str
    question: str
    tasks: Callable[[int, bool], Mapping[str, Task]]
    one: Callable[..., dict[str, Any]]
    summary: Callable[[Mapping[str, dict[str, Any]]], dict[str, Any]]


def run(
    study: Study,
    folder: Path,
    *,
    seed: int = 0,
    quick: bool = False,
    jobs: int = 1,
    backend: str = "loky",
    scheduler: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Do the tasks of a study that are not done yet and write its result file.

    Args:
        study: The study.
        folder: Folder of the result file; unfinished work is kept there as <name>.partial.jsonl.
        seed: Root of all randomness.
        quick: The small version of the study.
        jobs: Processes.
        backend: Name of a joblib backend.
        scheduler: Address of a running Dask scheduler or Ray head; None starts a local one.
        console: Where to show progress; None for nowhere.

    Returns:
        What was written: the summary with its provenance.
    """
    tasks = study.tasks(seed, quick)
    configuration = {"study": study.name, "seed": seed, "quick": quick}
    store = _Store(folder / f"{study.name}.partial.jsonl", {**configuration, "code": code_fingerprint()}, tasks)
    missing = [key for key in tasks if key not in store.done]
    kept = len(tasks) - len(missing)
    if console is not None and store.replaced:
        console.print(f"{store.path.name} was of other settings or another version of the code: begun anew")
    if console is not None and kept:
        console.print(f"{kept} of {len(tasks)} tasks were already done: {store.path.name}")
    with progress(console) as bar:
        shown = bar.add_task(study.name, total=len(tasks), completed=kept)
        calls = [(study.one, key, tasks[key]) for key in missing]
        for key, result in unordered(_one, calls, jobs=jobs, backend=backend, scheduler=scheduler):
            store.add(key, result)
            bar.update(shown, advance=1, description=f"{study.name}: {key}")
    data = {
        "provenance": results.provenance({**configuration, "jobs": jobs, "backend": backend}),
        "question": study.question,
        **study.summary({key: store.done[key] for key in tasks}),
    }
    results.write_json(folder / f"{study.name}.json", data)
    store.path.unlink(missing_ok=True)
    return data


def unordered(
    function: Callable[..., Any],
    calls: Iterable[tuple[Any, ...]],
    *,
    jobs: int = 1,
    backend: str = "loky",
    scheduler: str | None = None,
) -> Iterator[Any]:
    """Results of independent calls as they come, from the processes of any joblib backend.

    Raises:
        ValueError: The backend is unknown, or its package is not installed.
    """
    tasks = (joblib.delayed(function)(*call) for call in calls)
    with _cluster(backend, jobs, scheduler):
        try:
            with joblib.parallel_config(backend, n_jobs=jobs):  # which knows how to register Dask
                # Ray's backend cannot give results as they come: there a chunk of calls comes as a whole.
                parallel = joblib.Parallel(return_as="list" if backend == "ray" else "generator_unordered")
        except (ValueError, ImportError) as error:
            known = ", ".join(BACKENDS)
            raise ValueError(f"backend: {backend!r} cannot be used ({error}); known are {known}") from error
        if backend != "ray":
            yield from parallel(tasks)
        while chunk := list(itertools.islice(tasks, 4 * jobs)):
            yield from parallel(chunk)


@contextlib.contextmanager
def _cluster(backend: str, jobs: int, scheduler: str | None) -> Iterator[None]:
    """Connect to a cluster, or start a local one, for the backends that need it."""
    if backend not in ("dask", "ray"):
        if scheduler is not None:
            raise ValueError(f"scheduler: only for the backends 'dask' and 'ray', got {scheduler!r} with {backend!r}")
        yield
        return
    try:
        if backend == "dask":
            import distributed

            local = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
            where = {"address": scheduler} if scheduler else local
            with distributed.Client(**where, set_as_default=True):
                yield
        else:
            import ray
            from ray.util.joblib import register_ray

            ray.init(address=scheduler, num_cpus=None if scheduler else jobs, include_dashboard=False)
            register_ray()
            try:
                yield
            finally:
                ray.shutdown()
    except ModuleNotFoundError as error:
        package = "distributed" if backend == "dask" else "ray"
        raise ValueError(f"backend: {backend!r} needs a package: pip install {package} ({error})") from error


def _one(function: Callable[..., dict[str, Any]], key: str, task: Task) -> tuple[str, dict[str, Any]]:
    try:
        # Small matrices: BLAS threads of several processes would only get in each other's way.
        with threadpoolctl.threadpool_limits(1):
            return key, function(**task)
    except Exception as error:
        error.add_note(f"in the task {key!r}")
        raise


def progress(console: Console | None) -> Progress:
    """A progress bar that leaves nothing behind."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=console is None)


def code_fingerprint() -> str:
    """A hash of the source of ctpo and simulations: results of another version are not mixed with this one's."""
    digest = hashlib.sha256()
    for package in ("ctpo", "simulations"):
        for path in sorted((results.CHECKOUT / package).rglob("*.py")):
            digest.update(path.relative_to(results.CHECKOUT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class _Store:
    """Finished tasks in a file of JSON lines, the first of which says what they belong to."""

    def __init__(self, path: Path, head: Mapping[str, Any], tasks: Mapping[str, Task]) -> None:
        # Results come back through JSON, those of this run too, so that a resumed run gives the same file.
        listed = json.dumps({key: dict(task) for key, task in tasks.items()}, sort_keys=True)
        self.path = path
        self.head = {**head, "tasks": hashlib.sha256(listed.encode()).hexdigest()[:16]}
        self.done: dict[str, dict[str, Any]] = {}
        lines = self._complete_lines()
        self.replaced = bool(lines) and lines[0] != self.head
        if lines and not self.replaced:
            self.done = {line["key"]: line["result"] for line in lines[1:] if line["key"] in tasks}
            lines = [self.head, *({"key": key, "result": result} for key, result in self.done.items())]
        else:
            lines = [self.head]
        results.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    def _complete_lines(self) -> list[dict[str, Any]]:
        """The lines of the file up to one that an interruption has torn."""
        lines: list[dict[str, Any]] = []
        if self.path.is_file():
            for text in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    break
        return lines

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Keep a finished task, on the disk before anything else is done."""
        text = json.dumps({"key": key, "result": result}, allow_nan=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[key] = json.loads(text)["result"]
