"""Traces of a training run: the log-probabilities behind its importance ratios, as parquet files.

With `log_ratio_traces=N` the trainer writes one file for every N-th update and rank; a row is a sequence:

=============== =============================== =======================================================================
column          type                            meaning
=============== =============================== =======================================================================
step            int64                           update that the sequence was used in, counted from 1
rank            int32                           process that used it
iteration       int32                           how often the sequence had been trained on before
fresh           bool                            never: what holds for importance ratios holds for these only
rollout         int64, may be null              number of the batch of rollouts that it was sampled in
group           int64, may be null              number of its prompt in that batch
prompt_id       string, may be null             the prompt's own name
logp            list of float32                 log-probabilities under the policy in training before the update, nats
behavior_logp   list of float32                 those that ratios were made with
sampling_logp   list of float32, may be null    those that the sampler reported, where it is another program
mask            list of bool                    True at policy tokens; the output of tools is False
advantage       float32                         as used in the loss
reward          float32, may be null            weighted sum of all rewards; NaN where none could be given
reward/NAME     float32                         of the reward function NAME
=============== =============================== =======================================================================

Lists end with the last policy token. Files are named after step and rank, and written whole or not at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ctpo._arrays import one_of
from ctpo.train._run_directory import replacing

__all__ = ["TraceWriter", "read_traces"]

Table = Any  # pyarrow's

_FILE = "step-{:08d}-rank-{:05d}.parquet"
_STEP = re.compile(r"step-(\d+)-rank-\d+\.parquet")
_LISTS = ("logp", "behavior_logp", "sampling_logp", "mask")
# Names of columns, and of the arrays that `read_traces` makes of them.
_NUMBERS = {
    "step": "step",
    "rank": "rank",
    "iteration": "iteration",
    "fresh": "fresh",
    "advantage": "advantages",
    "reward": "rewards",
}
_SEQUENCES = {"all": None, "fresh": True, "trained_on": False}


class TraceWriter:
    """Files of every N-th update, for one process.

    Args:
        directory: Where to; made when there is something to write.
        every: N, updates.
        rank: Number of this process.

    Raises:
        ValueError: `every` is not a positive integer.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> writer = TraceWriter(directory, every=10)
        >>> logp = np.array([[-1.0, -2.0]])
        >>> for step in (10, 11):
        ...     writer.add(logp, logp - 0.1, logp < 0, np.array([1.0]), step=step, iteration=0)
        ...     path = writer.flush()
        ...     print(path.name if path else path)
        step-00000010-rank-00000.parquet
        None
    """

    def __init__(self, directory: str | os.PathLike[str], every: int, *, rank: int = 0) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive integer; got {every!r}")
        self.directory, self.every, self.rank = Path(directory), every, rank
        self._pending: list[dict[str, Any]] = []

    def due(self, step: int) -> bool:
        """Whether the update is one of those that are written."""
        return step % self.every == 0

    def add(
        self,
        logp: Any,
        behavior_logp: Any,
        mask: Any,
        advantages: Any,
        *,
        step: int,
        iteration: int,
        rewards: Any = None,
        reward_parts: Mapping[str, Any] | None = None,
        sampling_logp: Any = None,
        rollout: int | None = None,
        groups: Any = None,
        prompt_ids: Sequence[Any] | None = None,
    ) -> None:
        """Remember a micro-batch until `flush`, if its update is one of those that are written.

        Args:
            logp: Shape (B, T), nats; torch (it is not copied before `flush`, so it must not change) or NumPy, as all.
            behavior_logp: Shape (B, T).
            mask: bool, shape (B, T), True at policy tokens. Masked places may hold anything.
            advantages: Shape (B,) or (B, 1).
            step: Number of the update, from 1 on; one for all that is added until `flush`.
            iteration: How often the sequences have been trained on before.
            rewards: Shape (B,).
            reward_parts: Name of a reward function to an array of shape (B,); every time the same names.
            sampling_logp: Shape (B, T).
            rollout: Number of the batch of rollouts.
            groups: Integers, shape (B,): sequences of a batch of rollouts with the same number have the same prompt.
            prompt_ids: A name for the prompt of each sequence, or None.

        Raises:
            ValueError: Shapes do not fit.
        """
        if not self.due(step):
            return
        shape = tuple(logp.shape)
        tables = {"logp": logp, "behavior_logp": behavior_logp, "sampling_logp": sampling_logp, "mask": mask}
        columns = {"advantage": advantages, "reward": rewards, "group": groups}
        columns |= {f"reward/{name}": part for name, part in (reward_parts or {}).items()}
        for name, x in tables.items():
            if x is not None and tuple(x.shape) != shape:
                raise ValueError(f"{name} must have the shape of logp, {shape}; got {tuple(x.shape)}")
        for name, x in columns.items():
            if x is not None and tuple(x.shape) not in (shape[:1], (*shape[:1], 1)):
                raise ValueError(f"{name} must have one value per sequence, shape {shape[:1]}; got {tuple(x.shape)}")
        if prompt_ids is not None and len(prompt_ids) != shape[0]:
            raise ValueError(f"prompt_ids must have one entry per sequence, {shape[0]}; got {len(prompt_ids)}")
        if self._pending and self._pending[0]["step"] != step:
            raise ValueError(f"step must be {self._pending[0]['step']} until it is flushed; got {step}")
        self._pending.append(
            {
                "step": step,
                "iteration": iteration,
                "rollout": rollout,
                "tables": {
                    name: x if x is None or isinstance(x, np.ndarray) else x.detach() for name, x in tables.items()
                },
                "columns": columns,
                "prompt_ids": prompt_ids,
            }
        )

    def flush(self) -> Path | None:
        """Write what has been added since the last call, if anything; a file that is there is replaced.

        Returns:
            The file, or None.

        Raises:
            OSError: It cannot be written; what was added is dropped.
        """
        if not self._pending:
            return None
        import pyarrow as pa
        import pyarrow.parquet as pq

        pending, self._pending = self._pending, []
        path = self.directory / _FILE.format(pending[0]["step"], self.rank)
        table = pa.concat_tables([self._table(part) for part in pending])
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                pq.write_table(table, file, compression="zstd")
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        return path

    def discard_after(self, step: int) -> None:
        """Remove this directory's files of later updates: those of a run that was cut off, or of another one.

        Args:
            step: Updates that are done where training goes on; 0 at a new start.
        """
        for path in self.directory.glob("*.parquet"):
            found = _STEP.fullmatch(path.name)
            if found and int(found[1]) > step:
                path.unlink(missing_ok=True)

    def _table(self, part: Mapping[str, Any]) -> Table:
        import pyarrow as pa

        tables = {name: None if x is None else _to_host(x) for name, x in part["tables"].items()}
        columns = {name: None if x is None else _to_host(x).reshape(-1) for name, x in part["columns"].items()}
        mask = np.asarray(tables["mask"], np.bool_)
        # One past the last policy token; 0 without any.
        length = (mask * np.arange(1, mask.shape[1] + 1)).max(axis=1, initial=0)
        kept = np.arange(mask.shape[1]) < length[:, None]
        offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
        rows = len(mask)

        def one(value: Any, kind: Any) -> Any:
            return pa.array([value] * rows, kind)

        def lists(x: NDArray[Any] | None, dtype: Any, kind: Any) -> Any:
            if x is None:
                return pa.nulls(rows, pa.list_(kind))
            return pa.ListArray.from_arrays(pa.array(offsets), pa.array(x[kept].astype(dtype), kind))

        def numbers(x: NDArray[Any] | None, dtype: Any, kind: Any) -> Any:
            return pa.nulls(rows, kind) if x is None else pa.array(x.astype(dtype), kind)

        ids = part["prompt_ids"]
        found = {
            "step": one(part["step"], pa.int64()),
            "rank": one(self.rank, pa.int32()),
            "iteration": one(part["iteration"], pa.int32()),
            "fresh": one(part["iteration"] == 0, pa.bool_()),
            "rollout": one(part["rollout"], pa.int64()),
            "group": numbers(columns.pop("group"), np.int64, pa.int64()),
            "prompt_id": pa.nulls(rows, pa.string())
            if ids is None
            else pa.array([None if name is None else str(name) for name in ids], pa.string()),
            **{name: lists(tables[name], np.float32, pa.float32()) for name in _LISTS[:-1]},
            "mask": lists(mask, np.bool_, pa.bool_()),
            **{name: numbers(x, np.float32, pa.float32()) for name, x in columns.items()},
        }
        return pa.table(found)


def read_traces(
    path: str | os.PathLike[str],
    *,
    sequences: Literal["all", "fresh", "trained_on"] = "all",
    steps: tuple[int, int] | None = None,
) -> dict[str, NDArray[Any]]:
    """Read traces as arrays of N sequences, padded to the longest, T tokens.

    Args:
        path: A file, or a directory of them.
        sequences: All, only those that had not been trained on since they were sampled, or only the others.
        steps: First and last update to read; None for all.

    Returns:
        By name:

        =========================== ===================================================================================
        logp, behavior_logp, mask   shape (N, T), as `ctpo.diagnose` takes them; 0 and False in the padding
        advantages                  shape (N,)
        groups                      shape (N,), a number for each prompt of each batch of rollouts; if recorded
        sampling_logp               shape (N, T), if recorded for all
        step, rank, iteration,      shape (N,)
        fresh, rewards
        reward/NAME                 shape (N,), for each reward function
        =========================== ===================================================================================

    Raises:
        FileNotFoundError: There is no such file or directory.
        ImportError: pyarrow is not installed.
        ValueError: There are no traces in it, or none that were asked for, or a file is something else.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> writer = TraceWriter(directory, every=1)
        >>> behavior_logp = np.log([[0.5, 0.25, 1.0], [0.5, 1.0, 1.0]])
        >>> mask = np.array([[True, True, True], [True, False, False]])
        >>> writer.add(behavior_logp - 0.5, behavior_logp, mask, np.array([1.0, -1.0]), step=1, iteration=0)
        >>> _ = writer.flush()
        >>> traces = read_traces(directory, sequences="fresh")
        >>> (traces["logp"] - traces["behavior_logp"]).tolist(), traces["advantages"].tolist()
        ([[-0.5, -0.5, -0.5], [-0.5, 0.0, 0.0]], [1.0, -1.0])
    """
    one_of("sequences", sequences, _SEQUENCES)
    import pyarrow as pa
    import pyarrow.compute as pc

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No such file or directory: {path}")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no traces: no file ends with .parquet")
    tables = [_read_file(file) for file in files]
    table = pa.concat_tables(tables, promote_options="default")
    if steps is not None:
        first, last = steps
        table = table.filter((pc.field("step") >= first) & (pc.field("step") <= last))
    if (fresh := _SEQUENCES[sequences]) is not None:
        table = table.filter(pc.field("fresh") == fresh)
    if not len(table):
        asked = f" of the updates {steps[0]} to {steps[1]}" if steps is not None else ""
        raise ValueError(f"{path} has no sequences{asked} with sequences={sequences!r}")
    return _arrays(table)


def _read_file(path: Path) -> Table:
    """The table in a file of `TraceWriter`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error
    needed = {"step", "fresh", "logp", "behavior_logp", "mask", "advantage"}
    if missing := sorted(needed - set(table.column_names)):
        raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    return table


def _arrays(table: Table) -> dict[str, NDArray[Any]]:
    """The arrays of `read_traces`."""
    table = table.combine_chunks()
    lengths = table["mask"].combine_chunks().value_lengths().to_numpy()
    inside = np.arange(lengths.max(initial=0)) < lengths[:, None]
    found: dict[str, NDArray[Any]] = {}
    for name in _LISTS:
        if name in table.column_names and not table[name].null_count:
            column = table[name].combine_chunks()
            if (column.value_lengths().to_numpy() != lengths).any():
                raise ValueError(f"{name} must have as many entries as mask in every row")
            values = column.flatten().to_numpy(zero_copy_only=False)
            found[name] = np.zeros(inside.shape, values.dtype)
            found[name][inside] = values
    for column, name in _NUMBERS.items():
        if column in table.column_names and not table[column].null_count:
            found[name] = table[column].to_numpy()
    if {"rollout", "group"} <= set(table.column_names) and not table["group"].null_count:
        rollout = table["rollout"].fill_null(-1).to_numpy()
        pairs = np.stack([rollout, table["group"].to_numpy()], axis=1)
        found["groups"] = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
    for name in table.column_names:
        if name.startswith("reward/"):
            found[name] = table[name].to_numpy()
    return found


def _to_host(x: Any) -> NDArray[Any]:
    """A NumPy array of a tensor of any device and dtype."""
    if isinstance(x, np.ndarray):
        return x
    x = x.detach().cpu()
    return np.asarray(x.float() if x.is_floating_point() else x)
