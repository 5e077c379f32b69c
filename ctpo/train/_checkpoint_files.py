"""Directories of checkpoints: complete or recognizably not, the last complete one, and none removed too early.

A checkpoint is complete once `ctpo_checkpoint.json` is in it. That file is written last, after everything else is on
the disk, and lists the others with their sizes. Only then are older checkpoints removed, each by a rename first. So
whatever moment a process is killed at, or the disk fills up, what was the last complete checkpoint still is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ctpo.train._run_directory import read_json, replacing

__all__ = ["begin", "check_writable", "discard", "finish", "inspect", "last_checkpoint", "rotate"]

MANIFEST, UNFINISHED = "ctpo_checkpoint.json", "ctpo_unfinished"
_FORMAT = "ctpo checkpoint 1"
_NAME = re.compile(r"checkpoint-(\d+)")
_REMOVED = ".removed-"


def last_checkpoint(output_dir: str | os.PathLike[str]) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The checkpoint that was completed last, and those that no run can go on from.

    Args:
        output_dir: Where a trainer saves; it need not exist.

    Returns:
        The directory, None where there is none, and (directory, reason) of each that was skipped, by step.
    """
    complete, skipped = _sorted(Path(output_dir))
    return (complete[-1] if complete else None), skipped


def inspect(path: Path) -> tuple[dict[str, Any] | None, str]:
    """What is written in a checkpoint's manifest, None where it has none, and why no run can go on from it, or ""."""
    if not path.is_dir():
        return None, "is not a directory" if path.exists() else "does not exist"
    if not (path / MANIFEST).exists():
        if _half_written(path):
            return None, "was not finished: the process ended while it was being saved"
        return None, f"has no {MANIFEST}: another trainer wrote it"
    try:
        manifest = read_json(path / MANIFEST)
    except (OSError, ValueError) as error:
        return None, f"cannot be read: {error}"
    if manifest.get("format") != _FORMAT:
        return None, f"was written by another version of ctpo ({manifest.get('format')!r}, not {_FORMAT!r})"
    for name, size in manifest["files"].items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            return manifest, f"lacks {name}"
        if found != size:
            return manifest, f"has {found} of the {size} bytes of {name}"
    if not manifest["resumable"]:
        return manifest, "holds weights only (save_only_model)"
    return manifest, ""


def check_writable(output_dir: str | os.PathLike[str]) -> None:
    """Make the directory, and see that files can be written there.

    Raises:
        OSError: They cannot.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output_dir, prefix=".ctpo-") as file:
            file.write(b"-")
            file.flush()
    except OSError as error:
        raise OSError(f"cannot write to output_dir {os.fspath(output_dir)}: {error.strerror or error}") from error


def begin(path: Path) -> None:
    """Make the directory of a checkpoint, known to be unfinished; one with the same name goes."""
    discard(path)
    path.mkdir(parents=True)
    (path / UNFINISHED).touch()


def finish(path: Path, manifest: Mapping[str, Any], *, resumable: bool) -> None:
    """Write everything through to the disk, then that the checkpoint is complete."""
    files = sorted(entry for entry in path.rglob("*") if entry.is_file() and entry.name not in (MANIFEST, UNFINISHED))
    for entry in [*files, *(entry for entry in path.rglob("*") if entry.is_dir())]:
        _sync(entry)
    text = json.dumps(
        {
            "format": _FORMAT,
            # Not the step: who goes on from an earlier checkpoint leaves later steps behind.
            "serial": 1 + max((_serial(other) for other in _checkpoints(path.parent)), default=0),
            "resumable": resumable,
            **manifest,
            "files": {entry.relative_to(path).as_posix(): entry.stat().st_size for entry in files},
        },
        indent=1,
    )
    with replacing(path / MANIFEST) as file:
        file.write(text.encode() + b"\n")
    (path / UNFINISHED).unlink(missing_ok=True)
    _sync(path)
    _sync(path.parent)


def rotate(output_dir: Path, limit: int | None, *, keep: Collection[Path] = ()) -> None:
    """Remove half-written checkpoints, and the oldest complete ones beyond `limit`; never the last, nor one in `keep`.

    Args:
        output_dir: Where they are. What other trainers wrote there stays, and what was damaged.
        limit: How many may stay; None or 0: all.
        keep: Checkpoints to spare. They count.
    """
    for left in output_dir.glob(f"{_REMOVED}*"):
        shutil.rmtree(left, ignore_errors=True)
    complete, skipped = _sorted(output_dir)
    for path, _ in skipped:
        if _half_written(path):
            discard(path)
    kept = {path.resolve() for path in [*complete[-1:], *map(Path, keep)]}
    spare = [path for path in complete if path.resolve() not in kept]
    if limit:
        for path in spare[: max(len(complete) - max(limit, len(kept)), 0)]:
            discard(path)


def discard(path: Path) -> None:
    """Remove a checkpoint; a process killed in between leaves nothing that looks like one."""
    if not path.exists():
        return
    removed = path.with_name(_REMOVED + path.name)
    shutil.rmtree(removed, ignore_errors=True)
    os.replace(path, removed)
    shutil.rmtree(removed, ignore_errors=True)


def _checkpoints(output_dir: Path) -> list[Path]:
    """Directories that are named like checkpoints, by step."""
    found = [(int(match[1]), path) for path in output_dir.glob("*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def _sorted(output_dir: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Complete checkpoints in the order in which they were completed; the others by step, with the reason."""
    complete, skipped = [], []
    for path in _checkpoints(output_dir):
        _, reason = inspect(path)
        if reason:
            skipped.append((path, reason))
        else:
            complete.append(path)
    return sorted(complete, key=_serial), skipped


def _serial(path: Path) -> int:
    manifest, _ = inspect(path)
    return 0 if manifest is None else int(manifest["serial"])


def _half_written(path: Path) -> bool:
    """Whether this module began it and did not finish; a directory without anything is one, too."""
    return not (path / MANIFEST).exists() and ((path / UNFINISHED).exists() or not any(path.iterdir()))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
