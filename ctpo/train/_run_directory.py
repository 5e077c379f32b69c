"""The directory of an evaluation: a lock, settings that may not change, a log that a killed process leaves usable."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

__all__ = ["RunDirectory", "read_json", "replacing"]

SETTINGS, SAMPLES, TIMINGS = "settings.json", "samples.jsonl", "timings.jsonl"
PROBLEMS, RESULTS = "problems.parquet", "results.json"
# Settings go last: as long as they are there, the rest is known to belong to them.
_FILES = (RESULTS, PROBLEMS, TIMINGS, SAMPLES, SETTINGS)
_LOCK = ".lock"
_FORMAT = "ctpo evaluation 1"
# Directories that this process has locked: POSIX locks do not hold against their own process.
_held: set[tuple[int, int]] = set()


class RunDirectory:
    """Files of one evaluation, for one process at a time.

    Args:
        path: The directory; made if it does not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None
        self._identity = (0, 0)

    def __enter__(self) -> Self:
        with self._writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / _LOCK).touch()
            status = (self.path / _LOCK).stat()
            self._identity = (status.st_dev, status.st_ino)
            if self._identity in _held:
                # Before the file is opened: a process loses its lock as soon as it closes the file anywhere.
                raise self._taken()
            lock = open(self.path / _LOCK, "a+", encoding="utf-8")
        try:
            self._take(lock)
        except BaseException:
            lock.close()
            raise
        self._lock = lock
        try:
            self._check_files()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lock is not None:
            _held.discard(self._identity)
            self._lock.close()
            self._lock = None

    def _take(self, lock: IO[str]) -> None:
        import fcntl  # not on Windows, where the other commands work

        try:
            # Not flock: workers that are forked from this process would hold it after its death.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            raise self._taken(lock.read().strip() or "another process") from None
        _held.add(self._identity)
        with self._writing(self.path / _LOCK):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()

    def _taken(self, holder: str = "this process") -> ValueError:
        return ValueError(
            f"{self.path} is being written by {holder}; wait until it has ended, or choose another directory"
        )

    def _check_files(self) -> None:
        found = [name for name in _FILES if (self.path / name).exists()]
        if found and self.settings is None:
            raise ValueError(
                f"{self.path} has a {found[0]} but no {SETTINGS}, so no evaluation wrote it; choose another directory"
            )
        for name in _FILES:
            for cut in self.path.glob(f".{name}.*"):  # of a process that was killed while it wrote
                with self._writing(cut):
                    cut.unlink(missing_ok=True)

    @property
    def settings(self) -> dict[str, Any] | None:
        """What the evaluation in this directory was begun with; None where there is none."""
        if not (self.path / SETTINGS).exists():
            return None
        found = read_json(self.path / SETTINGS)
        if found.pop("format", None) != _FORMAT:
            raise ValueError(
                f"{self.path / SETTINGS} was not written by this version of ctpo; choose another directory"
            )
        return found

    @property
    def has_samples(self) -> bool:
        """Whether any are kept, be they finished chunks or not."""
        samples = self.path / SAMPLES
        return samples.exists() and samples.stat().st_size > 0

    @property
    def results(self) -> dict[str, Any] | None:
        """The results, where the evaluation is finished."""
        return read_json(self.path / RESULTS) if (self.path / RESULTS).exists() else None

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Remove what an earlier evaluation left, and write the settings of a new one."""
        for name in _FILES:
            with self._writing(self.path / name):
                (self.path / name).unlink(missing_ok=True)
        self.write_json(SETTINGS, {"format": _FORMAT, **settings})

    def read_samples(self, chunks: Sequence[Sequence[tuple[int, int]]]) -> list[dict[str, Any]]:
        """Samples of the finished chunks; what follows them, cut off by the end of a process, is removed from the file.

        Args:
            chunks: The plan: for each chunk its (problem, sample) pairs in their order.

        Raises:
            ValueError: The file has something else than a beginning of the plan.
        """
        plan = [(chunk, *pair) for chunk, pairs in enumerate(chunks) for pair in pairs]
        path = self.path / SAMPLES
        whole = path.read_bytes() if path.exists() else b""
        samples: list[dict[str, Any]] = []
        finished = kept = offset = 0
        lines = whole.split(b"\n")[:-1]
        for number, line in enumerate(lines):
            try:
                found = json.loads(line)
                place = (found["chunk"], found["problem"], found["sample"])
            except (ValueError, KeyError, TypeError):
                place = None
            if place is None or number >= len(plan) or place != plan[number]:
                if number >= len(plan) or len(lines) - number > len(chunks[plan[number][0]]):
                    raise ValueError(
                        f"line {number + 1} of {path} is not what this evaluation writes there; "
                        "--overwrite (overwrite=True) starts again"
                    )
                break
            samples.append(found)
            offset += len(line) + 1
            if number + 1 == len(plan) or plan[number + 1][0] != plan[number][0]:
                finished, kept = number + 1, offset
        if kept < len(whole):
            with self._writing(path):
                os.truncate(path, kept)
        return samples[:finished]

    def append(self, samples: Sequence[Mapping[str, Any]], timing: Mapping[str, Any]) -> None:
        """Write the samples of one chunk; on the disk when this returns."""
        # Timings first: a chunk that is redone has two of them, never none.
        for name, entries in ((TIMINGS, [timing]), (SAMPLES, samples)):
            text = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries)
            with self._writing(self.path / name), open(self.path / name, "ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())

    def read_timings(self) -> list[dict[str, Any]]:
        """What the chunks took, the last entry of each; a cut line is left out."""
        path = self.path / TIMINGS
        found = {}
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            try:
                entry = json.loads(line)
                found[entry["chunk"]] = entry
            except (ValueError, KeyError, TypeError):
                continue
        return [found[chunk] for chunk in sorted(found)]

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a JSON file whole or not at all."""
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
        self.write(name, lambda file: file.write(text.encode()))

    def write(self, name: str, write: Callable[[IO[bytes]], Any]) -> None:
        """Write a file whole or not at all."""
        with self._writing(self.path / name), replacing(self.path / name) as file:
            write(file)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """One line about what cannot be written, and that nothing is lost."""
        try:
            yield
        except OSError as error:
            kept = "; samples that were finished are kept" if os.path.exists(self.path / SAMPLES) else ""
            raise OSError(f"cannot write {path}: {error.strerror or error}{kept}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to be written whole or not at all: a temporary file beside it, renamed once it is complete."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
