r"""Problems to train on and to be measured by: any source, one form.

========================================== ============================================================================
source                                     what it is
========================================== ============================================================================
``file.parquet``                           verl's layout or any with a prompt and a ground truth
``file.jsonl``, ``file.json``, ``...gz``   an object a line, or (``.json``) a list of objects
a directory                                `datasets.Dataset.save_to_disk`, or a clone of a data set of the Hub
``hub:org/name@split?config=C&revision=R`` a data set of the Hub; everything after the name may be left out
``reasoning-gym:TASK?key=value&seed=0``    a task of reasoning-gym with fields of its configuration
``arithmetic?difficulty=2&size=256``       built-in problems with exact answers; also ``seed`` and ``split=train|test``
========================================== ============================================================================

What a row has to hold is said at `load_problems`; a bad row is named by file, row and column in a `DataError`.
Nothing in the data is ever executed: no pickles, no loading scripts.
"""

from __future__ import annotations

import difflib
import enum
import gzip
import hashlib
import json
import logging
import math
import numbers
import os
import re
import reprlib
import subprocess
import sys
import textwrap
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import unquote

__all__ = [
    "BOXED",
    "DataError",
    "Problem",
    "filter_by_length",
    "load_problems",
    "show",
    "show_source",
    "to_dataset",
]

# What generated problems ask for; `ctpo.train.rewards` reads the answer from there.
BOXED = "Put the final answer in \\boxed{}."

_log = logging.getLogger(__name__)
_ROLES = ("system", "user", "assistant")
_FIELDS = ("id", "prompt", "ground_truth", "data_source", "ability", "extra_info")
_KINDS = (
    "a .parquet, .jsonl or .json file (the last two also .gz), a directory of a data set, hub:org/name[@split], "
    "reasoning-gym:TASK[?key=value&...] or arithmetic[?difficulty=1&...]"
)
_DEPTH = 64  # of nested values in extra_info
_LINE = 1 << 26  # bytes of a line of JSON
_BATCH = 1024  # rows
_SURROGATE = re.compile("[\ud800-\udfff]")


class DataError(ValueError):
    """A source, or a row of it, is not what it has to be.

    Attributes:
        problem: What came, and what is allowed.
        source: File or name of the source.
        unit: "row", counted from 0, or "line" of a file of JSON lines, counted from 1.
        row: Its number; None if the error is of the whole source.
        column: Where in the row; dotted if nested; "" for all of it.

    Example:
        >>> print(DataError("got null, allowed is text", "train.jsonl", "line", 3, "prompt"))
        train.jsonl: line 3, column 'prompt': got null, allowed is text
    """

    def __init__(self, problem: str, source: str = "", unit: str = "row", row: int | None = None, column: str = ""):
        super().__init__(problem, source, unit, row, column)
        self.problem, self.source, self.unit, self.row, self.column = problem, source, unit, row, column

    def __str__(self) -> str:
        place = [] if self.row is None else [f"{self.unit} {self.row}"]
        place += [f"column {self.column!r}"] if self.column else []
        return ": ".join(part for part in (self.source, ", ".join(place), self.problem) if part)


class _InvalidField(ValueError):
    """A field of a problem is not what it has to be."""

    def __init__(self, name: str, problem: str):
        super().__init__(name, problem)
        self.name, self.problem = name, problem

    def __str__(self) -> str:
        return f"{self.name}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem in the one form that trainer, rewards and evaluation take.

    Args:
        id: Unique within a list of problems.
        prompt: Messages ``{"role": ..., "content": ...}``: at most one system message, which is the first, then those
            of user and assistant; the last is the user's.
        ground_truth: The answer as text. Empty only for a task of reasoning-gym that many answers solve: its scorer
            reads `extra_info`.
        data_source: Where the problem is from; rewards may depend on it.
        ability: Such as "math"; may be empty.
        extra_info: Whatever else is known: values that JSON has. What JSON has not is turned into what it has: tuples
            into lists, keys and dates into text, NaN and infinities into None.

    Raises:
        ValueError: A field is something else.

    Example:
        >>> problem = Problem("0", [{"role": "user", "content": "6 * 7?"}], "42", extra_info={"range": (1, 9)})
        >>> problem.prompt
        ({'role': 'user', 'content': '6 * 7?'},)
        >>> problem.extra_info
        {'range': [1, 9]}
    """

    id: str
    prompt: Sequence[Mapping[str, str]]
    ground_truth: str
    data_source: str = ""
    ability: str = ""
    extra_info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("id", "ground_truth", "data_source", "ability"):
            _check_text(name, getattr(self, name))
        if not self.id.strip():
            raise _InvalidField("id", f"got {_short(self.id)}, allowed is text that is not blank")
        object.__setattr__(self, "prompt", _messages(self.prompt))
        if not isinstance(self.extra_info, Mapping):
            raise _InvalidField("extra_info", f"got {_short(self.extra_info)}, allowed is a mapping")
        object.__setattr__(self, "extra_info", _json_value(self.extra_info))
        if not self.ground_truth.strip() and not _is_scored_by_gym(self.extra_info):
            raise _InvalidField("ground_truth", f"got {_short(self.ground_truth)}, allowed is text that is not blank")

    def row(self) -> dict[str, Any]:
        """The fields by name, the prompt as a list: what rewards are given, and ``json.dumps`` takes."""
        return {name: getattr(self, name) for name in _FIELDS} | {"prompt": [dict(message) for message in self.prompt]}


def load_problems(
    source: str | os.PathLike[str],
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    drop: Sequence[str] = (),
    limit: int | None = None,
    shuffle_seed: int | None = None,
    system_prompt: str | None = None,
    instruction: str | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
) -> list[Problem]:
    r"""Problems of a source, in its order or shuffled.

    A row gives the fields of `Problem` from the columns of the same names, or of those that `columns` names. Where they
    are not there, some others are recognized:

    ============ ======================================================================================================
    field        where it is found, and what it may be
    ============ ======================================================================================================
    id           ``id``: text or a whole number; else the source's name and the row. Each only once.
    prompt       ``prompt``, else ``question`` or ``problem`` (not both): messages, those as JSON text, or plain text
                 (one message of the user)
    ground_truth ``ground_truth``: taken as it is. Else ``reward_model.ground_truth``, ``answer`` or ``solution``: a
                 number; text; a list of one of these, or ``["..."]`` as JSON text. From text with a line ``#### 42``
                 the 42 is taken, without commas, from ``solution`` else what is in its last ``\boxed{}``; the whole
                 text is kept in `extra_info`.
    data_source  ``data_source``; else the source's name
    ability      ``ability``; else empty
    extra_info   ``extra_info``, an object or one as JSON text, and all columns not used for anything else
    ============ ======================================================================================================

    The order that a seed gives depends on it and on the ids alone: it is the same on every machine, and any two
    problems keep their order when others come or go.

    Args:
        source: See the table in the module's documentation.
        split: Of a data set with several, or of the arithmetic problems; files have none.
        columns: Field to column, as ``{"prompt": "question", "ground_truth": "meta.answer"}``; a dot goes into a nested
            column (or JSON text).
        drop: Columns to leave out, such as images.
        limit: At most so many problems; after the shuffle if there is one, else reading stops there.
        shuffle_seed: Shuffle with it; None keeps the order.
        system_prompt: System message of every problem, in place of a row's own; "" for none.
        instruction: Added to the last message of the user, after an empty line. None adds `BOXED` to problems that are
            generated here (reasoning-gym, arithmetic) and nothing to others; "" adds nothing.
        on_bad_row: "error" raises for the first bad row and says how many there are; "skip" leaves them out and logs a
            warning with their number.

    Returns:
        At least one problem.

    Raises:
        DataError: The source cannot be read, or has a bad row, or no row.
        ValueError: Another argument is not what it has to be.

    Example:
        >>> problem = load_problems("arithmetic?difficulty=2&size=8&seed=0")[0]
        >>> print(problem.prompt[-1]["content"], "->", problem.ground_truth)
        What is 76 - 92?
        <BLANKLINE>
        Put the final answer in \boxed{}. -> -16
    """
    problems, bad = _load(
        source,
        split=split,
        columns=columns,
        drop=drop,
        limit=limit,
        shuffle_seed=shuffle_seed,
        system_prompt=system_prompt,
        instruction=instruction,
        on_bad_row=on_bad_row,
    )
    if bad:
        _log.warning("left out %s", _count_bad(bad))
    return problems


def filter_by_length(
    problems: Sequence[Problem],
    tokenizer: Any,
    max_prompt_tokens: int,
    *,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Problem]:
    """The problems whose prompt has no more than `max_prompt_tokens` tokens, in their order.

    Counted as the model will see it: by the tokenizer's chat template, with the beginning of the answer. How many are
    left out is logged as a warning.

    Args:
        problems: Any number.
        tokenizer: Of transformers, with a chat template.
        max_prompt_tokens: At least 1.
        tools: What the template describes to the model, as given to ``apply_chat_template``.
        chat_template_kwargs: Further variables of the template, such as ``{"enable_thinking": False}``.

    Returns:
        At least one problem if there was any.

    Raises:
        DataError: All are longer.
        ValueError: `max_prompt_tokens` is less than 1, or the tokenizer has no chat template.
    """
    _check_whole("max_prompt_tokens", max_prompt_tokens, 1)
    lengths = _prompt_tokens(problems, tokenizer, tools, chat_template_kwargs)
    kept = [problem for problem, length in zip(problems, lengths, strict=True) if length <= max_prompt_tokens]
    if len(kept) < len(problems):
        dropped = (
            f"{len(problems) - len(kept)} of {len(problems)} problems have prompts of more than {max_prompt_tokens}"
        )
        if not kept:
            raise DataError(f"{dropped} tokens; the shortest has {min(lengths)}")
        _log.warning("left out %s tokens; the longest has %d", dropped, max(lengths))
    return kept


def to_dataset(problems: Sequence[Problem]) -> Any:
    """A `datasets.Dataset` with the fields of `Problem` as columns, `extra_info` as JSON text.

    Written by its ``to_parquet``, ``to_json`` or ``save_to_disk`` and read by `load_problems`, it gives the same
    problems.

    Args:
        problems: Any number.

    Returns:
        A data set of as many rows.

    Example:
        >>> to_dataset(load_problems("arithmetic?size=3"))["ground_truth"][:]
        ['3', '8', '6']
    """
    import datasets

    text = datasets.Value("string")
    features = dict.fromkeys(_FIELDS, text) | {"prompt": datasets.List({"role": text, "content": text})}
    rows = [problem.row() for problem in problems]
    values: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in _FIELDS}
    values["extra_info"] = [json.dumps(info, ensure_ascii=False, allow_nan=False) for info in values["extra_info"]]
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


# ----------------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True, slots=True)
class _Source:
    """Rows of a source; made before the first is read."""

    name: str  # in messages
    label: str  # of problems without id or data_source
    rows: Iterator[tuple[int, Any]]  # number and what is there; a DataError is a row that could not be read
    unit: str = "row"
    generated: bool = False


def _load(
    source: str | os.PathLike[str],
    *,
    split: str | None,
    columns: Mapping[str, str] | None,
    drop: Sequence[str],
    limit: int | None,
    shuffle_seed: int | None,
    system_prompt: str | None,
    instruction: str | None,
    on_bad_row: str,
) -> tuple[list[Problem], list[DataError]]:
    """`load_problems` with the errors of the rows left out."""
    columns = dict(columns or {})
    if unknown := sorted(set(columns) - set(_FIELDS)):
        raise ValueError(f"columns: {_unknown(unknown[0], _FIELDS)}")
    for name, column in columns.items():
        if not isinstance(column, str) or not column:
            raise ValueError(f"columns: {name} is {_short(column)}; allowed is the name of a column")
    if isinstance(drop, str):
        raise ValueError(f"drop is {drop!r}; allowed is a list of columns")
    if limit is not None:
        _check_whole("limit", limit, 1)
    if shuffle_seed is not None:
        _check_whole("shuffle_seed", shuffle_seed, None)
    for name, text in (("system_prompt", system_prompt), ("instruction", instruction), ("split", split)):
        if text is not None and (not isinstance(text, str) or _SURROGATE.search(text)):
            raise ValueError(f"{name} is {_short(text)}; allowed is text or None")
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row is {_short(on_bad_row)}; allowed are 'error' and 'skip'")

    opened = _open(source, split)
    if instruction is None and opened.generated:
        instruction = BOXED
    problems: list[Problem] = []
    bad: list[DataError] = []
    first_at: dict[str, int] = {}
    stop = limit if shuffle_seed is None else None
    for number, row in opened.rows:
        try:
            if isinstance(row, DataError):
                raise row
            problem, column_of_id = _normal(row, opened, number, columns, drop, system_prompt, instruction)
            if problem.id in first_at:
                text = f"got {_short(problem.id)}, as in {opened.unit} {first_at[problem.id]}; allowed is each id once"
                raise DataError(text, opened.name, opened.unit, number, column_of_id)
        except DataError as error:
            bad.append(error)
            continue
        first_at[problem.id] = number
        problems.append(problem)
        if stop is not None and len(problems) == stop:
            break
    if bad and (on_bad_row == "error" or not problems):
        first = bad[0]
        more = f" ({_count_others(bad)})" if len(bad) > 1 else ""
        raise DataError(first.problem + more, first.source, first.unit, first.row, first.column)
    if not problems:
        raise DataError("has no rows; allowed is at least one", opened.name)
    if shuffle_seed is not None:
        problems.sort(key=lambda problem: _hash(shuffle_seed, problem.id))
    return problems[:limit], bad


def _hash(*parts: object) -> int:
    """128 bits of these numbers and texts, the same everywhere."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:16], "big")


def _count_others(bad: Sequence[DataError]) -> str:
    places = ", ".join(str(error.row) for error in bad[1:4])
    also = f"also bad: {bad[0].unit} {places}" if len(bad) == 2 else f"also bad: {bad[0].unit}s {places}"
    return also + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")


def _count_bad(bad: Sequence[DataError]) -> str:
    first = str(bad[0])
    return f"1 bad row: {first}" if len(bad) == 1 else f"{len(bad)} bad rows; {_count_others(bad)}; the first: {first}"


def _open(source: str | os.PathLike[str], split: str | None) -> _Source:
    text = os.fspath(source)
    if not isinstance(text, str) or not text or "\0" in text:
        raise DataError(f"source is {_short(text)}; allowed is {_KINDS}")
    if isinstance(source, str):
        kind, _, rest = text.partition(":")
        if kind == "hub":
            return _open_hub(rest, split, text)
        if kind == "reasoning-gym":
            return _open_gym(rest, split, text)
        if text == "arithmetic" or text.startswith("arithmetic?"):
            return _open_arithmetic(text.partition("?")[2], split, text)
    path = Path(text)
    label = re.sub(r"\.(parquet|jsonl|json)(\.gz)?$", "", path.name, flags=re.IGNORECASE) or text
    if path.is_dir():
        saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        return _Source(text, label, (_saved_rows if saved else _directory_rows)(path, split, text))
    if not path.exists():
        raise DataError(f"there is no such file; allowed is {_KINDS}", text)
    if split is not None:
        raise DataError(f"a file has no splits, but split is {split!r}", text)
    suffixes = path.name.lower().removesuffix(".gz").rpartition(".")
    zipped = path.name.lower().endswith(".gz")
    if suffixes[2] == "parquet" and not zipped:
        return _Source(text, label, _parquet_rows(path, text))
    if suffixes[2] == "jsonl" or (suffixes[2] == "json" and not _is_list(path, zipped, text)):
        return _Source(text, label, _json_lines(path, zipped, text), unit="line")
    if suffixes[2] == "json":
        return _Source(text, label, _json_list(path, zipped, text))
    raise DataError(f"the file's name ends on {path.suffix!r}; allowed is {_KINDS}", text)


# ------------------------------------------------------------------------------------------------------------- files


def _open_text(path: Path, zipped: bool) -> IO[bytes]:
    return gzip.open(path, "rb") if zipped else path.open("rb")  # type: ignore[return-value]


def _unreadable(error: Exception, source: str) -> DataError:
    return DataError(f"cannot be read: {_first_line(error)}", source)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(lines[0], 300) if lines else type(error).__name__


def _is_list(path: Path, zipped: bool, source: str) -> bool:
    """Whether a file of JSON begins with a list."""
    try:
        with _open_text(path, zipped) as file:
            while block := file.read(1 << 12):
                if start := block.removeprefix(b"\xef\xbb\xbf").strip():
                    return start.startswith(b"[")
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(error, source) from error
    return False


def _json_lines(path: Path, zipped: bool, source: str) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with _open_text(path, zipped) as file:
            while line := file.readline(_LINE + 1):
                number += 1
                if len(line) > _LINE:
                    raise DataError(f"is longer than {_LINE >> 20} MiB", source, "line", number)
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    try:
                        yield number, _parse_json(line)
                    except _InvalidField as error:
                        yield number, DataError(error.problem, source, "line", number)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read after line {number}: {_first_line(error)}", source) from error


def _json_list(path: Path, zipped: bool, source: str) -> Iterator[tuple[int, Any]]:
    try:
        with _open_text(path, zipped) as file:
            rows = _parse_json(file.read().removeprefix(b"\xef\xbb\xbf"))
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(error, source) from error
    except _InvalidField as error:
        raise DataError(error.problem, source) from error
    yield from enumerate(rows)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _InvalidField("", f"has the key {_short(name)} twice in an object; allowed is each once")
    return found


def _parse_json(text: bytes | str) -> Any:
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise _InvalidField("", f"is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise _InvalidField("", f"is not JSON: {error.msg} at {where}") from error
    except _InvalidField:
        raise
    except (RecursionError, ValueError) as error:
        # Nested without end, or a whole number of more digits than Python reads.
        why = "nested too deep" if isinstance(error, RecursionError) else _first_line(error)
        raise _InvalidField("", f"cannot be read as JSON: {why}") from error


def _parquet_rows(path: Path, source: str) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield from _arrow_rows(file.iter_batches(batch_size=_BATCH), file.schema_arrow.names, source)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise error if isinstance(error, DataError) else _unreadable(error, source) from error


def _arrow_rows(batches: Iterable[Any], names: Sequence[str], source: str, start: int = 0) -> Iterator[tuple[int, Any]]:
    """Rows of record batches, checked before they are looked at: a damaged one would be read beyond its end."""
    import pyarrow as pa

    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise DataError(f"has the column {_short(twice)} twice; allowed is each once", source)
    for batch in batches:
        batch.validate(full=True)
        values = []
        for name, column in zip(names, batch.columns, strict=True):
            try:
                values.append(column.to_pylist())
            except (pa.ArrowException, ValueError, OverflowError, TypeError, KeyError) as error:
                # Such as times in nanoseconds without pandas.
                problem = f"cannot be read as {column.type}: {_first_line(error)}"
                raise DataError(problem, source, "row", start, name) from error
        for row in range(batch.num_rows):
            yield start + row, {name: value[row] for name, value in zip(names, values, strict=True)}
        start += batch.num_rows


def _saved_rows(path: Path, split: str | None, source: str) -> Iterator[tuple[int, Any]]:
    """Rows of what `save_to_disk` of datasets wrote."""
    import pyarrow as pa

    if (path / "dataset_dict.json").is_file():
        splits = _described(path / "dataset_dict.json", "splits")
        path = path / _one_split(splits, split, source)
    elif split is not None:
        raise DataError(f"holds one data set without splits, but split is {split!r}", source)
    start = 0
    for entry in _described(path / "state.json", "_data_files"):
        file = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(file, str) or Path(file).name != file:
            raise DataError(f"names the data file {_short(file)}; allowed is a name in this directory", str(path))
        try:
            with pa.memory_map(str(path / file)) as mapped, pa.ipc.open_stream(mapped) as stream:
                for number, row in _arrow_rows(_pieces(stream), stream.schema.names, source, start):
                    yield number, row
                    start = number + 1
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise error if isinstance(error, DataError) else _unreadable(error, str(path / file)) from error


def _pieces(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        batch.validate(full=True)
        for start in range(0, batch.num_rows, _BATCH):
            yield batch.slice(start, _BATCH)


def _described(path: Path, key: str) -> list[Any]:
    """A list in a file that describes a data set."""
    try:
        content = _parse_json(path.read_bytes())
    except _InvalidField as error:
        raise DataError(error.problem, str(path)) from error
    except OSError as error:
        raise _unreadable(error, str(path)) from error
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{key} is {_short(found)}; allowed is a list", str(path))
    return found


def _one_split(splits: Sequence[Any], split: str | None, source: str) -> str:
    named = [name for name in splits if isinstance(name, str) and Path(name).name == name]
    allowed = f"allowed are {', '.join(map(repr, named))}" if named else "there is none"
    if split is None:
        if len(named) == 1:
            return named[0]
        raise DataError(f"has several splits, but split is None; {allowed}", source)
    if split not in named:
        raise DataError(f"split is {split!r}; {allowed}", source)
    return split


def _directory_rows(path: Path, split: str | None, source: str) -> Iterator[tuple[int, Any]]:
    return _datasets_rows(str(path), split, source)


def _datasets_rows(path: str, split: str | None, source: str, **options: Any) -> Iterator[tuple[int, Any]]:
    """Rows by `datasets.load_dataset`; since version 4 it runs no code of the data set."""
    import datasets

    try:
        found = datasets.load_dataset(path, split=None, **options)
    except Exception as error:  # its own, of the network, of file systems, of the formats that it reads
        raise DataError(f"cannot be loaded: {_first_line(error)}", source) from error
    chosen = found[_one_split(list(found), split, source)]
    yield from _arrow_rows(_pieces(chosen.with_format("arrow").data.to_batches()), chosen.column_names, source)


def _open_hub(rest: str, split: str | None, source: str) -> _Source:
    name, _, query = rest.partition("?")
    name, at, own_split = name.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or (at and not own_split):
        raise DataError("allowed is hub:org/name, then @split, then ?config=name&revision=commit", source)
    options = _query(query, ("config", "revision"), source)
    chosen = _agree(own_split or None, split, source)
    found = {"name": options.get("config"), "revision": options.get("revision")}
    return _Source(source, name, _datasets_rows(name, chosen, source, **found))


def _agree(own: str | None, split: str | None, source: str) -> str | None:
    if own is not None and split is not None and own != split:
        raise DataError(f"names the split {own!r}, but split is {split!r}", source)
    return own if own is not None else split


def _query(text: str, allowed: Iterable[str] | None, source: str) -> dict[str, str]:
    """Options ``key=value&...``; with `allowed` None every key is."""
    found: dict[str, str] = {}
    for part in text.split("&") if text else ():
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise DataError(
                f"got {_short(part)} after '?'; allowed is key=value, several with '&' between them", source
            )
        if key in found:
            raise DataError(f"has {key} twice; allowed is once", source)
        if allowed is not None and key not in tuple(allowed):
            raise DataError(_unknown(key, allowed), source)
        found[key] = unquote(value)
    return found


# ------------------------------------------------------------------------------------------------------- one row


def _normal(
    row: Any,
    source: _Source,
    number: int,
    columns: Mapping[str, str],
    drop: Sequence[str],
    system_prompt: str | None,
    instruction: str | None,
) -> tuple[Problem, str]:
    """The problem of a row, and the column of its id."""
    origin: dict[str, str] = {}  # field to column
    try:
        if not isinstance(row, dict):
            raise _InvalidField("", f"got {_short(row)}, allowed is an object with a prompt and a ground truth")
        rest = {
            name: value for name, value in row.items() if name not in drop and not name.startswith("__index_level_")
        }
        fields = {name: _find(name, rest, columns, origin) for name in _FIELDS}
        # As found; a column that is used goes from `rest`, which becomes part of extra_info.
        truth = fields["ground_truth"]
        if origin["ground_truth"] != "ground_truth" or "ground_truth" in columns:
            truth = _truth(truth, origin["ground_truth"])
        elif isinstance(truth, numbers.Number):
            truth = _number(truth)
        unused = _unused(rest, fields, origin, truth)
        extra = _object(fields["extra_info"])
        for name, value in unused.items():
            if name in extra and extra[name] != value:
                origin["extra_info"] = name
                raise _InvalidField("extra_info", "is also a key of extra_info, with another value; leave one out")
        prompt = _prompt(fields["prompt"], system_prompt, instruction)
        problem = Problem(
            id=_identifier(fields["id"], origin, source, number),
            prompt=prompt,
            ground_truth=truth,
            data_source=source.label if fields["data_source"] is None else fields["data_source"],
            ability="" if fields["ability"] is None else fields["ability"],
            extra_info={**extra, **unused},
        )
    except _InvalidField as error:
        column = origin.get(error.name) or error.name
        raise DataError(error.problem, source.name, source.unit, number, column) from None
    return problem, origin["id"]


_ABSENT = object()
_OTHERS = {"prompt": ("question", "problem"), "ground_truth": ("reward_model.ground_truth", "answer", "solution")}


def _get(row: Mapping[str, Any], path: str) -> Any:
    """What is in a column; a dot goes into it."""
    if path in row:
        return row[path]
    name, dot, rest = path.partition(".")
    if not dot or name not in row:
        return _ABSENT
    inner = row[name]
    if isinstance(inner, str):
        try:
            inner = _parse_json(inner)
        except _InvalidField as error:
            raise _InvalidField(name, error.problem) from error
    return _get(inner, rest) if isinstance(inner, dict) else _ABSENT


def _find(name: str, row: Mapping[str, Any], columns: Mapping[str, str], origin: dict[str, str]) -> Any:
    """What a row holds for a field; `origin` is told where. None where it holds nothing and may."""
    origin[name] = columns.get(name, name)
    found = _get(row, origin[name])
    if found is not _ABSENT:
        if name == "id" and found is None:
            raise _InvalidField("id", "got null, allowed is text or a whole number")
        return found
    if name in columns:
        raise _InvalidField(name, f"there is no such column; {_columns_of(row, columns[name])}")
    others = [column for column in _OTHERS.get(name, ()) if _get(row, column) is not _ABSENT]
    if name == "ground_truth":
        others = others[:1] if others[:1] == ["reward_model.ground_truth"] else others
        others = ["answer"] if others == ["answer", "solution"] else others
    if len(others) > 1:
        listed = " and ".join(map(repr, others))
        raise _InvalidField(name, f"columns {listed} may both be meant; say which by columns={{{name!r}: ...}}")
    if others:
        origin[name] = others[0]
        return _get(row, others[0])
    origin[name] = ""
    if name in _OTHERS:
        known = ", ".join(map(repr, _OTHERS[name]))
        raise _InvalidField(
            name, f"there is no such column, nor {known}; {_columns_of(row, name)}; say which by columns={{...}}"
        )
    return None


def _columns_of(row: Mapping[str, Any], wanted: str) -> str:
    if not row:
        return "there are none"
    near = difflib.get_close_matches(wanted, list(row), 1)
    listed = textwrap.shorten(", ".join(map(_short, row)), 200, placeholder=" ...")
    return f"there are {listed}" + (f"; did you mean {near[0]!r}?" if near else "")


def _unused(row: Mapping[str, Any], fields: Mapping[str, Any], origin: Mapping[str, str], truth: Any) -> dict[str, Any]:
    """Columns that gave no field, without what is null; nested ones without the part that did."""
    found = {name: value for name, value in row.items() if value is not None}
    for name, column in origin.items():
        if not column or (name == "ground_truth" and isinstance(fields[name], str) and fields[name] != truth):
            continue  # an answer was taken from a longer text, which is kept
        if column in row:
            found.pop(column, None)
        else:
            _remove(found, column.split("."))
    return found


def _remove(row: dict[str, Any], path: Sequence[str]) -> None:
    """Take a nested value out; what is empty then goes too."""
    inner = row.get(path[0])
    if isinstance(inner, str):
        inner = _parse_json(inner) if len(path) > 1 else inner
    if len(path) > 1 and isinstance(inner, dict):
        row[path[0]] = inner = dict(inner)
        _remove(inner, path[1:])
        if inner:
            return
    row.pop(path[0], None)


def _identifier(found: Any, origin: dict[str, str], source: _Source, number: int) -> str:
    if not origin["id"]:
        return f"{source.label}-{number}"
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise _InvalidField("id", f"got {_short(found)}, allowed is text or a whole number")
    return str(found)


def _truth(found: Any, column: str) -> str:
    """The answer in what a column of answers holds."""
    if isinstance(found, str) and found.lstrip().startswith("["):
        try:
            parsed = _parse_json(found)
        except _InvalidField:
            parsed = None  # a text that only looks so, such as an interval
        if isinstance(parsed, list) and len(parsed) == 1 and isinstance(parsed[0], str):
            found = parsed
    if isinstance(found, list):
        if len(found) != 1 or isinstance(found[0], list):
            raise _InvalidField("ground_truth", f"got {_short(found)}, allowed is one answer")
        found = found[0]
    if isinstance(found, numbers.Number) and not isinstance(found, bool):
        return _number(found)
    if not isinstance(found, str):
        raise _InvalidField("ground_truth", f"got {_short(found)}, allowed is text or a number")
    if marked := re.findall(r"^####[ \t]*(\S.*?)[ \t\r]*$", found, flags=re.MULTILINE):
        return re.sub(r"(?<=\d),(?=\d{3})", "", marked[-1])
    if column.rpartition(".")[2] == "solution":
        from ctpo.train.rewards import extract_boxed

        boxed = extract_boxed(found)
        if boxed is None:
            problem = f"got {_short(found)}, allowed is a text with \\boxed{{}} or a line '#### answer'"
            raise _InvalidField("ground_truth", problem)
        return boxed
    return found


def _number(found: Any) -> str:
    """A number without exponent, and without the .0 that a column with gaps gives to whole ones."""
    if isinstance(found, bool | complex) or not math.isfinite(found):
        raise _InvalidField("ground_truth", f"got {_short(found)}, allowed is text or a finite number")
    from decimal import Decimal

    text = format(
        Decimal(repr(found)) if isinstance(found, float) else found, "f" if not isinstance(found, int) else "d"
    )
    return re.sub(r"\.0+$", "", text)


def _object(found: Any) -> dict[str, Any]:
    if found is None:
        return {}
    if isinstance(found, str):
        try:
            found = _parse_json(found)
        except _InvalidField as error:
            raise _InvalidField("extra_info", error.problem) from error
    if not isinstance(found, dict):
        raise _InvalidField("extra_info", f"got {_short(found)}, allowed is an object, or one as JSON text")
    return found


def _prompt(found: Any, system_prompt: str | None, instruction: str | None) -> Sequence[Mapping[str, str]]:
    if isinstance(found, str):
        found = _messages_in(found) or [{"role": "user", "content": found}]
    messages = list(_messages(found))
    if system_prompt is not None:
        own = messages[0]["role"] == "system"
        messages = [{"role": "system", "content": system_prompt}] * bool(system_prompt) + messages[own:]
    if instruction:
        messages[-1] = {"role": "user", "content": f"{messages[-1]['content']}\n\n{instruction}"}
    return messages


def _messages_in(text: str) -> list[Any] | None:
    """Messages if a text is a list of them in JSON."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = _parse_json(text)
    except _InvalidField:
        return None
    return (
        found if found and all(isinstance(item, dict) and {"role", "content"} <= set(item) for item in found) else None
    )


def _messages(found: Any) -> tuple[dict[str, str], ...]:
    """Messages with role and content alone, checked."""

    def wrong(problem: str) -> _InvalidField:
        return _InvalidField("prompt", problem)

    if not isinstance(found, list | tuple) or not found:
        raise wrong(f"got {_short(found)}, allowed is text or a list of messages {{'role': ..., 'content': ...}}")
    messages = []
    for place, message in enumerate(found):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise wrong(f"message {place} is {_short(message)}; allowed is {{'role': ..., 'content': ...}}")
        if others := [key for key in message if key not in ("role", "content") and message[key] is not None]:
            raise wrong(f"message {place} also has {_short(others[0])}; allowed are role and content")
        role, content = message["role"], message["content"]
        if role not in _ROLES:
            raise wrong(f"the role of message {place} is {_short(role)}; allowed are {', '.join(_ROLES)}")
        if role == "system" and place:
            raise wrong(f"message {place} is the system's; allowed is that as the first only")
        if isinstance(content, list):
            parts = [
                part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
                for part in content
            ]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
        if not isinstance(content, str) or (role != "system" and not content.strip()):
            raise wrong(f"the content of message {place} is {_short(content)}; allowed is text that is not blank")
        _check_text("prompt", content)
        messages.append({"role": str(role), "content": content})
    if messages[-1]["role"] != "user":
        raise wrong(f"the last message is the {messages[-1]['role']}'s; allowed is the user's")
    return tuple(messages)


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise _InvalidField(name, f"got {_short(text)}, allowed is text")
    if found := _SURROGATE.search(text):
        raise _InvalidField(
            name, f"has {found[0]!r}, half of a character, at {found.start()}; allowed is valid Unicode"
        )


def _json_value(value: Any, depth: int = 0) -> Any:
    """The value as JSON would give it back."""
    if depth > _DEPTH:
        raise _InvalidField("extra_info", f"is nested more than {_DEPTH} deep")
    if isinstance(value, str):
        _check_text("extra_info", value)
        return str(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        found = {}
        for key, inner in value.items():
            name = key if isinstance(key, str) else str(_json_value(key, depth + 1))
            _check_text("extra_info", name)
            found[name] = _json_value(inner, depth + 1)
        return found
    if isinstance(value, list | tuple):
        return [_json_value(inner, depth + 1) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted((_json_value(inner, depth + 1) for inner in value), key=repr)
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # NumPy
        return _json_value(value.tolist(), depth + 1)
    if isinstance(value, enum.Enum):
        return _json_value(value.value, depth + 1)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, bytes | bytearray | memoryview):
        raise _InvalidField("extra_info", f"holds {_short(bytes(value))}; allowed is text, or drop=[its column]")
    return str(value)


def _is_scored_by_gym(extra_info: Mapping[str, Any]) -> bool:
    return isinstance(extra_info.get("source_dataset"), str) and isinstance(extra_info.get("metadata"), dict)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
_repr.maxlevel, _repr.maxlist, _repr.maxdict = 3, 3, 4


def _short(value: Any) -> str:
    """What came, in a few words."""
    if value is None:
        return "null"
    try:
        text = _repr.repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:96]} ..."


def _unknown(name: str, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(allowed), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"got {_short(name)}, allowed are {', '.join(sorted(allowed))}{hint}"


def _check_whole(name: str, value: Any, least: int | None) -> None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or (least is not None and value < least):
        raise ValueError(
            f"{name} is {_short(value)}; allowed is a whole number" + ("" if least is None else f" >= {least}")
        )


# -------------------------------------------------------------------------------------------------------- arithmetic


def _open_arithmetic(query: str, split: str | None, source: str) -> _Source:
    r"""Whole numbers added, subtracted and multiplied; the answer is exact.

    Difficulty d, 1 to 10, has 2 + (d - 1) // 2 operands, each of 1 + d // 2 digits without leading zeros (1 to 9 where
    it is one digit), and between them +, - or *, all alike.
    """
    options = _query(query, ("difficulty", "size", "seed", "split"), source)
    difficulty = _whole_option(options, "difficulty", 1, 1, 10, source)
    chosen = _agree(options.get("split"), split, source) or "train"
    if chosen not in ("train", "test"):
        raise DataError(f"split is {_short(chosen)}; allowed are 'train' and 'test'", source)
    most = _arithmetic_problems(difficulty, chosen)
    size = _whole_option(options, "size", min(256, most), 1, most, source)
    seed = _whole_option(options, "seed", 0, 0, None, source)
    return _Source(source, "arithmetic", _arithmetic_rows(difficulty, size, seed, chosen), generated=True)


def _whole_option(
    options: Mapping[str, str], name: str, default: int, least: int, most: int | None, source: str
) -> int:
    text = options.get(name)
    if text is None:
        return default
    value = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else -1
    if value < least or (most is not None and value > most):
        allowed = f"from {least} to {most}" if most is not None else f"from {least}"
        raise DataError(f"{name} is {_short(text)}; allowed is a whole number {allowed}", source)
    return value


def _shape(difficulty: int) -> tuple[int, int, int]:
    """Operands, the least of them, and how many each may be."""
    digits = 1 + difficulty // 2
    return 2 + (difficulty - 1) // 2, 10 ** (digits - 1), 9 * 10 ** (digits - 1)


def _is_held_out(operands: Iterable[int]) -> bool:
    """A fifth of all sets of operands: no order and no operators bring one of them into the other split."""
    return _hash("arithmetic", *sorted(operands)) % 5 == 0


def _arithmetic_problems(difficulty: int, split: str) -> int:
    """How many may be asked for: all there are with two operands, else a million, of which no split has less."""
    terms, least, each = _shape(difficulty)
    if terms > 2:
        return 10**6
    operands = range(least, least + each)
    ordered = sum(
        1 + (a < b) for a in operands for b in operands if a <= b and _is_held_out((a, b)) == (split == "test")
    )
    return 3 * ordered


def _arithmetic_rows(difficulty: int, size: int, seed: int, split: str) -> Iterator[tuple[int, Any]]:
    terms, least, each = _shape(difficulty)
    seen: set[int] = set()
    draw = 0
    while len(seen) < size:
        place = _hash("arithmetic", difficulty, seed, draw) % (each**terms * 3 ** (terms - 1))
        draw += 1
        rest, operands, operators = place, [], []
        for _ in range(terms):
            rest, offset = divmod(rest, each)
            operands.append(least + offset)
        for _ in range(terms - 1):
            rest, operator = divmod(rest, 3)
            operators.append("+-*"[operator])
        if place in seen or _is_held_out(operands) != (split == "test"):
            continue
        yield (
            len(seen),
            {
                "id": f"arithmetic-{difficulty}-{place}",
                "prompt": f"What is {_expression(operands, operators)}?",
                "ground_truth": str(_value(operands, operators)),
                "ability": "math",
                "extra_info": {
                    "difficulty": difficulty,
                    "expression": _expression(operands, operators),
                    "split": split,
                },
            },
        )
        seen.add(place)


def _expression(operands: Sequence[int], operators: Sequence[str]) -> str:
    return " ".join([str(operands[0]), *(f"{o} {n}" for o, n in zip(operators, operands[1:], strict=True))])


def _value(operands: Sequence[int], operators: Sequence[str]) -> int:
    """Products first, then sums from the left."""
    total, product = 0, operands[0]
    for operator, operand in zip(operators, operands[1:], strict=True):
        if operator == "*":
            product *= operand
        else:
            total, product = total + product, operand if operator == "+" else -operand
    return total + product


# ----------------------------------------------------------------------------------------------------- reasoning-gym


def _open_gym(rest: str, split: str | None, source: str) -> _Source:
    task, _, query = rest.partition("?")
    if split is not None:
        raise DataError(f"has no splits, but split is {split!r}; take another seed, further away than the size", source)
    options = _query(query, None, source)
    return _Source(source, task, _gym_rows(task, {"seed": "0"} | options, source), generated=True)


def _gym_rows(task: str, options: Mapping[str, str], source: str) -> Iterator[tuple[int, Any]]:
    """Entries made in a process of its own, where sets of text have one order: some tasks depend on it."""
    program = "from ctpo.train.data import _write_gym; _write_gym()"
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore", "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"task": task, "options": dict(options)}).encode())
            process.stdin.close()
            for number, line in enumerate(process.stdout):
                row = json.loads(line)
                if "error" in row:
                    raise DataError(row["error"], source)
                yield number, row
            if process.wait():
                raise DataError(f"the process that makes the problems ended with status {process.returncode}", source)
        finally:
            process.kill()


def _write_gym() -> None:
    """The process of `_gym_rows`: an entry a line."""
    request = json.load(sys.stdin)
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as output:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a task prints
        try:
            for row in _gym_entries(request["task"], request["options"]):
                output.write(json.dumps(row, allow_nan=False) + "\n")
        except BrokenPipeError:
            os._exit(0)
        except Exception as error:
            known = isinstance(error, ValueError | AssertionError | ImportError)
            text = _first_line(error) if known else f"{type(error).__name__}: {_first_line(error)}"
            output.write(json.dumps({"error": text}) + "\n")


def _gym_entries(task: str, options: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError('needs reasoning-gym: pip install "ctpo[gym]"') from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, 3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; there are {len(DATASETS)}"
        raise ValueError(f"there is no task {_short(task)}{hint}")
    configuration = DATASETS[task][1]
    types = get_type_hints(configuration)
    values = {}
    for key, text in options.items():
        if key not in types:
            raise ValueError(f"configuration of {task}: {_unknown(key, types)}")
        try:
            values[key] = _parsed(text, types[key])
        except (ValueError, KeyError) as error:
            allowed = str(getattr(types[key], "__name__", types[key]) if not get_args(types[key]) else types[key])
            raise ValueError(f"configuration of {task}: {key} is {_short(text)}; allowed is {allowed}") from error
    try:
        made = reasoning_gym.create_dataset(task, **values)
    except (AssertionError, ValueError, TypeError) as error:
        raise ValueError(f"configuration of {task}: {_first_line(error)}") from error
    for index in range(len(made)):
        entry = made[index]
        yield {
            "id": f"{task}-{values['seed']}-{index}",
            "prompt": str(entry["question"]),
            "ground_truth": "" if entry["answer"] is None else str(entry["answer"]),
            "data_source": f"reasoning-gym:{task}",
            "ability": made.category,
            "extra_info": {
                "source_dataset": task,
                "source_index": index,
                "configuration": dict(options),
                "question": str(entry["question"]),
                "metadata": _json_value(entry["metadata"]),
            },
        }


def _parsed(text: str, kind: Any) -> Any:
    """A value of a configuration; lists as JSON or with commas."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {str(value): value for value in arguments}[text]
    if origin in (list, tuple, Sequence) or kind in (list, tuple):
        values = _parse_json(text) if text.startswith("[") else text.split(",") if text else []
        inner = arguments[0] if arguments else str
        return (list if origin is list or kind is list else tuple)(
            value if not isinstance(value, str) else _parsed(value, inner) for value in values
        )
    if type(None) in arguments:
        if text.lower() in ("none", "null"):
            return None
        return _parsed(text, next(argument for argument in arguments if argument is not type(None)))
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {str(value): member for member in kind for value in (member.name, member.value)}[text]
    if kind in (int, float, str):
        return kind(text)
    if hasattr(kind, "fromisoformat"):
        return kind.fromisoformat(text)
    raise ValueError(f"{kind} cannot be written here")


# ------------------------------------------------------------------------------------------------------------- show


def _prompt_tokens(
    problems: Sequence[Problem],
    tokenizer: Any,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    render: Callable[..., Any] = tokenizer.apply_chat_template
    options = {"tools": list(tools) if tools else None, "add_generation_prompt": True, "return_dict": False}
    options.update(chat_template_kwargs or {})
    return [len(render([dict(message) for message in problem.prompt], **options)) for problem in problems]


def show(problems: Sequence[Problem], rows: int = 3, tokenizer: Any = None, *, width: int = 88) -> str:
    r"""A few problems as text for a terminal.

    With a tokenizer the prompt is what the model will see: the text of its chat template, special tokens spelled out,
    with the beginning of the answer. Characters that would move the cursor or change colors are escaped.

    Args:
        problems: At least one.
        rows: How many, the first ones.
        tokenizer: Of transformers, with a chat template; or None.
        width: Columns.

    Returns:
        Lines without one at the end.

    Example:
        >>> print(show(load_problems("arithmetic?size=2", instruction=""), rows=1, width=60))
        2 problems: arithmetic
        <BLANKLINE>
        1 of 2 ------------------------------------ arithmetic-1-180
              source | arithmetic, math
                user | What is 1 * 3?
        ground truth | 3
          extra_info | {"difficulty": 1, "expression": "1 * 3",
                     | "split": "train"}
    """
    _check_whole("rows", rows, 0)
    _check_whole("width", width, 40)
    sources = Counter(problem.data_source for problem in problems)
    named = [name if len(sources) == 1 else f"{name} {count}" for name, count in sources.most_common(8)]
    named += [f"{len(sources) - 8} more"] * (len(sources) > 8)
    head = f"{len(problems)} problem{'s' * (len(problems) != 1)}: {_visible(', '.join(named))}"
    blocks = ["\n".join(textwrap.wrap(head, width))]
    lengths: list[int] = []
    if tokenizer is not None:
        lengths = _prompt_tokens(problems, tokenizer)
        middle = sorted(lengths)[len(lengths) // 2]
        blocks[0] += f"\ntokens of a prompt: {min(lengths)} to {max(lengths)}, median {middle}"
    for place, problem in enumerate(problems[:rows]):
        blocks.append(_block(problem, place, len(problems), tokenizer, lengths[place] if lengths else None, width))
    return "\n\n".join(blocks)


def _block(problem: Problem, place: int, total: int, tokenizer: Any, tokens: int | None, width: int) -> str:
    title, name = f"{place + 1} of {total} ", f" {_visible(problem.id)}"
    name = name if len(name) <= width // 2 else name[: width // 2 - 4] + " ..."
    parts = [("source", problem.data_source + (f", {problem.ability}" if problem.ability else ""))]
    if tokenizer is None:
        parts += [(message["role"], message["content"]) for message in problem.prompt]
    else:
        messages = [dict(message) for message in problem.prompt]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        parts += [(f"{tokens} tokens", text)]
    parts += [("ground truth", problem.ground_truth)]
    parts += [("extra_info", json.dumps(problem.extra_info, ensure_ascii=False))] * bool(problem.extra_info)
    margin = 15
    lines = [title + "-" * (width - len(title) - len(name)) + name]
    for label, text in parts:
        most = 4 if label == "extra_info" else 40
        wrapped = [
            piece
            for line in text.split("\n")
            for piece in textwrap.wrap(_visible(line), width - margin, drop_whitespace=False, break_on_hyphens=False)
            or [""]
        ]
        if len(wrapped) > most:
            wrapped = [*wrapped[: most - 1], f"... {len(wrapped) - most + 1} more lines"]
        for number, line in enumerate(wrapped):
            lines.append(f"{label if number == 0 else '':>{margin - 3}} | {line}".rstrip())
    return "\n".join(lines)


def _visible(text: str) -> str:
    """The text with what a terminal would obey, or would not show, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show_source(
    source: str,
    *,
    rows: int = 3,
    split: str | None = None,
    columns: str | None = None,
    drop: str | None = None,
    model: str | None = None,
    system_prompt: str | None = None,
    instruction: str | None = None,
    max_prompt_tokens: int | None = None,
    shuffle_seed: int | None = None,
    limit: int | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    width: int = 88,
) -> str:
    """What ``ctpo data show`` prints: `show` of a source's problems, and what was left out.

    Args:
        source: As for `load_problems`.
        rows: How many problems to show.
        split: As for `load_problems`.
        columns: ``field=column``, several with commas between them.
        drop: Columns to leave out, with commas between them.
        model: Directory or name of the model whose chat template renders them; None shows roles.
        system_prompt: As for `load_problems`.
        instruction: As for `load_problems`.
        max_prompt_tokens: Leave out longer prompts; needs `model`.
        shuffle_seed: As for `load_problems`.
        limit: As for `load_problems`.
        on_bad_row: As for `load_problems`.
        width: Columns of the terminal.

    Returns:
        Lines without one at the end.

    Raises:
        DataError: As for `load_problems`, or the length leaves none.
        ValueError: Another argument is not what it has to be.

    Example:
        >>> print(show_source("arithmetic", rows=0))
        192 problems: arithmetic
    """
    pairs = [part.partition("=") for part in columns.split(",")] if columns else []
    if wrong := [part for part in pairs if not part[0] or not part[2]]:
        raise ValueError(f"columns: got {_short(''.join(wrong[0]))}; allowed is field=column,field=column")
    if max_prompt_tokens is not None and model is None:
        raise ValueError("max_prompt_tokens needs a model, whose tokens are counted")
    problems, bad = _load(
        source,
        split=split,
        columns={name.strip(): column.strip() for name, _, column in pairs},
        drop=drop.split(",") if drop else (),
        limit=limit,
        shuffle_seed=shuffle_seed,
        system_prompt=system_prompt,
        instruction=instruction,
        on_bad_row=on_bad_row,
    )
    notes = [f"Left out {_count_bad(bad)}"] if bad else []
    tokenizer = None
    if model is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
    if max_prompt_tokens is not None:
        before = len(problems)
        problems = filter_by_length(problems, tokenizer, max_prompt_tokens)
        if len(problems) < before:
            notes.append(
                f"Left out {before - len(problems)} of {before} for prompts of more than {max_prompt_tokens} tokens"
            )
    return "\n\n".join([show(problems, rows, tokenizer, width=width), *notes])
