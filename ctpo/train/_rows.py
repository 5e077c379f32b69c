"""Rows of files, data sets on disk and of the Hub for `ctpo.train.data`: one after the other, or a `DataError`."""

from __future__ import annotations

import contextlib
import difflib
import enum
import gzip
import json
import math
import numbers
import os
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

# Bytes of a line of JSON, and of a list in JSON, which is read at once: a damaged or hostile file must not fill memory.
_LINE, _LIST = 1 << 26, 1 << 30
_BATCH = 1024  # rows
_DEPTH = 64  # of nested values
_ENTRIES = 10_000  # of a directory and those in it
_DATA_FILE = re.compile(r"\.(parquet|jsonl?|ndjson|csv|tsv|arrow)(\.(gz|bz2|xz|zst|lz4))?$|\.zip$", re.IGNORECASE)
_DIRECTORIES = (
    "what save_to_disk wrote, or a data set as on the Hub: .parquet, .jsonl, .json, .csv or .arrow files in it, "
    "at most two directories down"
)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SURROGATE = re.compile("[\ud800-\udfff]")

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
_repr.maxlevel, _repr.maxlist, _repr.maxdict = 3, 3, 4


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


class InvalidField(ValueError):
    """A value is not what it has to be; where in a source it stood is for the caller to say."""

    def __init__(self, name: str, problem: str):
        super().__init__(name, problem)
        self.name, self.problem = name, problem

    def __str__(self) -> str:
        return f"{self.name}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of a source, of which none is read yet.

    Attributes:
        name: In messages.
        label: Of problems without `data_source`.
        rows: Number and row. A `DataError` in place of a row, or of a value in it, is what could not be read.
        unit: What is counted, see `DataError`.
        made: Whether the problems were made here, rather than read.
        split: That of several which the rows are of, "" if there are none.
    """

    name: str
    label: str
    rows: Generator[tuple[int, Any]]
    unit: str = "row"
    made: bool = False
    split: str = ""


def open_file(path: Path, source: str) -> Source | None:
    """A file by its name's ending; None if that is of no kind known here."""
    zipped = path.suffix.lower() == ".gz"
    kind = Path(path.stem if zipped else path.name).suffix.lower()
    label = re.sub(r"\.(parquet|jsonl|json)(\.gz)?$", "", path.name, flags=re.IGNORECASE) or path.name
    if kind == ".parquet" and not zipped:
        return Source(source, label, _parquet_rows(path, source))
    if kind == ".json" and _is_list(path, zipped, source):
        return Source(source, label, _json_list(path, zipped, source))
    if kind in (".json", ".jsonl"):
        return Source(source, label, _json_lines(path, zipped, source), unit="line")
    return None


def open_directory(path: Path, split: str | None, source: str) -> Source:
    """What `save_to_disk` wrote, or files as on the Hub."""
    label = path.name or source
    if (path / "dataset_dict.json").is_file():
        split = _one_split(_described(path / "dataset_dict.json", "splits"), split, source)
        return Source(source, label, _saved_rows(path / split, source), split=split)
    if (path / "state.json").is_file():
        if split is not None:
            raise DataError(f"holds one data set without splits, but split is {split!r}", source)
        return Source(source, label, _saved_rows(path, source))
    _check_holds_data(path, source)
    return _loaded(str(path), split, source, label)


def _check_holds_data(path: Path, source: str) -> None:
    """Raise where `datasets` would find nothing, or search a file system for it, which may take hours."""
    found, seen, top = False, 0, len(path.parts)
    # Links are followed, as they are there; the limit ends cycles that the system does not end.
    for directory, directories, files in os.walk(path, followlinks=True):
        seen += len(directories) + len(files)
        if seen > _ENTRIES:
            raise DataError(f"holds more than {_ENTRIES:,} files and directories, allowed is {_DIRECTORIES}", source)
        directories[:] = [name for name in directories if not name.startswith(".")]
        found = found or (len(Path(directory).parts) - top <= 2 and any(_DATA_FILE.search(name) for name in files))
    if not found:
        raise DataError(f"holds no data files, allowed is {_DIRECTORIES}", source)


def open_hub(rest: str, split: str | None, source: str) -> Source:
    """A data set of the Hub; `rest` is what follows ``hub:``."""
    name, _, options = rest.partition("?")
    name, at, own_split = name.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or (at and not own_split):
        raise DataError("allowed is hub:org/name, then @split, then ?config=name&revision=commit", source)
    given = query(options, ("config", "revision"), source)
    split = agreed(own_split or None, split, source)
    return _loaded(name, split, source, name, name=given.get("config"), revision=given.get("revision"))


def query(text: str, allowed: Iterable[str] | None, source: str) -> dict[str, str]:
    """Options ``key=value&...``; with `allowed` None every key is."""
    found: dict[str, str] = {}
    for part in text.split("&") if text else ():
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise DataError(f"got {short(part)} after '?', allowed is key=value, several with '&' between them", source)
        if key in found:
            raise DataError(f"has {key} twice, allowed is once", source)
        if allowed is not None and key not in tuple(allowed):
            raise DataError(unknown(key, allowed), source)
        found[key] = unquote(value)
    return found


def agreed(own: str | None, split: str | None, source: str) -> str | None:
    """The split that a source's name and an argument agree on."""
    if own is not None and split is not None and own != split:
        raise DataError(f"names the split {own!r}, but split is {split!r}", source)
    return own if own is not None else split


# -------------------------------------------------------------------------------------------------------------- JSON


def parse_json(text: bytes | str) -> Any:
    """The value; keys that come twice, which JSON leaves open, are refused. NaN and infinities are floats."""
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise InvalidField("", f"is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise InvalidField("", f"is not JSON: {error.msg} at {where}") from error
    except RecursionError as error:
        raise InvalidField("", "cannot be read as JSON: nested too deep") from error
    except InvalidField:
        raise
    except ValueError as error:  # a whole number of more digits than Python reads
        raise InvalidField("", f"cannot be read as JSON: {one_line(error)}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise InvalidField("", f"has the key {short(name)} twice in an object, allowed is each once")
    return found


def _open(path: Path, zipped: bool) -> IO[bytes]:
    return gzip.open(path, "rb") if zipped else path.open("rb")  # type: ignore[return-value]


def _is_list(path: Path, zipped: bool, source: str) -> bool:
    with _errors_named(source), _open(path, zipped) as file:
        while block := file.read(1 << 12):
            if start := block.removeprefix(_BYTE_ORDER_MARK).strip():
                return start.startswith(b"[")
    return False


def _json_lines(path: Path, zipped: bool, source: str) -> Generator[tuple[int, Any]]:
    number = 0
    with _errors_named(source), _open(path, zipped) as file:
        while line := file.readline(_LINE + 1):
            number += 1
            if len(line) > _LINE:
                raise DataError(f"is longer than {_LINE >> 20} MiB", source, "line", number)
            line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if line.strip():
                try:
                    yield number, parse_json(line)
                except InvalidField as error:
                    yield number, DataError(error.problem, source, "line", number)


def _json_list(path: Path, zipped: bool, source: str) -> Generator[tuple[int, Any]]:
    with _errors_named(source), _open(path, zipped) as file:
        text = file.read(_LIST + 1)
        if len(text) > _LIST:
            raise DataError(f"is longer than {_LIST >> 20} MiB, allowed for longer files are JSON lines", source)
        rows = parse_json(text.removeprefix(_BYTE_ORDER_MARK))
    yield from enumerate(rows)


# ------------------------------------------------------------------------------------------------------------- Arrow


def _parquet_rows(path: Path, source: str) -> Generator[tuple[int, Any]]:
    import pyarrow.parquet as pq

    with _errors_named(source), pq.ParquetFile(path, page_checksum_verification=True) as file:
        yield from _arrow_rows(file.iter_batches(batch_size=_BATCH), file.schema_arrow, source)


def _saved_rows(path: Path, source: str) -> Generator[tuple[int, Any]]:
    """What `datasets.Dataset.save_to_disk` wrote, without `datasets`, which does not check what it maps into memory."""
    import pyarrow as pa

    start = 0
    for entry in _described(path / "state.json", "_data_files"):
        file = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(file, str) or Path(file).name != file:
            raise DataError(f"names the data file {short(file)}, allowed is a name in this directory", str(path))
        part = str(path / file)
        with _errors_named(part), pa.memory_map(part) as mapped, pa.ipc.open_stream(mapped) as stream:
            for number, row in _arrow_rows(stream, stream.schema, source, start):
                yield number, row
                start = number + 1


def _loaded(path: str, split: str | None, source: str, label: str, **options: Any) -> Source:
    """By `datasets.load_dataset`, which runs no code of the data set since version 4."""
    import datasets

    try:
        found = datasets.load_dataset(path, **options)
    except Exception as error:  # its own, of the network, of file systems, of the formats that it reads
        raise DataError(f"cannot be loaded: {one_line(error)}", source) from error
    split = _one_split(list(found), split, source)
    return Source(source, label, _table_rows(found[split].data, source), split=split)


def _table_rows(table: Any, source: str) -> Generator[tuple[int, Any]]:
    with _errors_named(source):
        yield from _arrow_rows(table.to_batches(), table.schema, source)


def _arrow_rows(batches: Iterable[Any], schema: Any, source: str, start: int = 0) -> Generator[tuple[int, Any]]:
    """Rows of record batches, each checked before it is looked at: a damaged one would be read beyond its end."""
    names = schema.names
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise DataError(f"has the column {short(twice)} twice, allowed is each once", source)
    decoders = [_decoder(field) for field in schema]
    for batch in batches:
        batch.validate(full=True)
        for offset in range(0, batch.num_rows, _BATCH):
            piece = batch.slice(offset, _BATCH)
            columns = [
                _values(column, name, decode, source, start)
                for name, column, decode in zip(names, piece.columns, decoders, strict=True)
            ]
            for values in zip(*columns, strict=True):
                yield start, dict(zip(names, values, strict=True))
                start += 1


def _values(column: Any, name: str, decode: _Decoder | None, source: str, start: int) -> list[Any]:
    """Python's values of a column. Some have none, such as a time in nanoseconds: a `DataError` is in their place."""
    errors = (ValueError, TypeError, LookupError, OverflowError, NotImplementedError)
    try:
        values = column.to_pylist()
        return list(values if decode is None else map(decode, values))
    except errors:
        found: list[Any] = []
        for place, value in enumerate(column):
            try:
                found.append(value.as_py() if decode is None else decode(value.as_py()))
            except errors as error:
                if isinstance(error, InvalidField):
                    problem = error.problem
                else:
                    problem = f"cannot be read as {column.type}: {one_line(error)}"
                found.append(DataError(problem, source, "row", start + place, name))
        return found


_Decoder = Callable[[Any], Any]


def _decoder(field: Any) -> _Decoder | None:
    """What turns Python's values of an Arrow field into those of its JSON texts; None where it holds none.

    `datasets` keeps what has several types as such texts (its feature ``Json``): a column, or a part of one.
    """
    import pyarrow.types as kinds

    # An older pyarrow does not know the type, and leaves its name at the field.
    names = (
        getattr(field.type, "extension_name", ""),
        (field.metadata or {}).get(b"ARROW:extension:name", b"").decode(),
    )
    if "arrow.json" in names:
        return lambda text: None if text is None else parse_json(text)
    if kinds.is_struct(field.type):
        inner = {part.name: decode for part in field.type if (decode := _decoder(part))}
        if inner:
            return lambda value: (
                value and {name: inner[name](part) if name in inner else part for name, part in value.items()}
            )
    elif kinds.is_list(field.type) or kinds.is_large_list(field.type) or kinds.is_fixed_size_list(field.type):
        of_item = _decoder(field.type.value_field)
        if of_item:
            return lambda value: value and [of_item(item) for item in value]
    return None


def _described(path: Path, key: str) -> list[Any]:
    """A list in a file that describes a data set."""
    with _errors_named(str(path)):
        content = parse_json(path.read_bytes())
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{key} is {short(found)}, allowed is a list", str(path))
    return found


def _one_split(splits: Sequence[Any], split: str | None, source: str) -> str:
    named = [name for name in splits if isinstance(name, str) and Path(name).name == name]
    if split is None and len(named) == 1:
        return named[0]
    if split is None or split not in named:
        raise DataError(f"split is {split!r}, allowed is one of {', '.join(map(repr, named)) or 'none'}", source)
    return split


# ---------------------------------------------------------------------------------------------------------- messages


@contextlib.contextmanager
def _errors_named(source: str) -> Iterator[None]:
    """What reading may raise, as a `DataError` of this source."""
    try:
        yield
    except DataError:
        raise
    except InvalidField as error:
        raise DataError(error.problem, source) from error
    # pyarrow's errors are all of these.
    except (
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        TypeError,
        LookupError,
        MemoryError,
        NotImplementedError,
    ) as error:
        raise DataError(f"cannot be read: {one_line(error)}", source) from error


def one_line(error: BaseException) -> str:
    """An error's text, which may have several lines, in one of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:296]} ..."


def short(value: Any) -> str:
    """What came, in a few words."""
    if value is None:
        return "null"
    try:
        text = _repr.repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:96]} ..."


def unknown(name: str, allowed: Iterable[str]) -> str:
    """What to say of a name that is none of the allowed ones."""
    near = difflib.get_close_matches(name, list(allowed), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"got {short(name)}, allowed are {', '.join(sorted(allowed))}{hint}"


def check_text(name: str, text: Any) -> str:
    """The text, if it is one that UTF-8 can hold."""
    if not isinstance(text, str):
        raise InvalidField(name, f"got {short(text)}, allowed is text")
    if found := _SURROGATE.search(text):
        raise InvalidField(name, f"has {found[0]!r}, half of a character, at {found.start()}, allowed is valid Unicode")
    return str(text)


def check_whole(name: str, value: Any, least: int | None = None) -> None:
    """Raise ValueError unless an argument is a whole number, and not less than `least`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or (least is not None and int(value) < least):
        allowed = "a whole number" + ("" if least is None else f" of at least {least}")
        raise ValueError(f"{name} is {short(value)}, allowed is {allowed}")


def json_value(value: Any, depth: int = 0) -> Any:
    """The value as JSON gives it back: tuples as lists, keys and dates as text, NaN and infinities as None."""
    if depth > _DEPTH:
        raise InvalidField("extra_info", f"is nested more than {_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_text("extra_info", value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, inner in value.items():
            name = check_text("extra_info", str(key))
            if name in found:
                raise InvalidField("extra_info", f"has the key {short(name)} twice, allowed is each once")
            found[name] = json_value(inner, depth + 1)
        return found
    if isinstance(value, list | tuple):
        return [json_value(inner, depth + 1) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted((json_value(inner, depth + 1) for inner in value), key=repr)
    if isinstance(value, enum.Enum):
        return json_value(value.value, depth + 1)
    if isinstance(value, bytes | bytearray | memoryview):
        raise InvalidField("extra_info", f"holds {short(bytes(value))}, allowed is text; or leave its column out")
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # NumPy
        return json_value(value.tolist(), depth + 1)
    return check_text("extra_info", value.isoformat() if hasattr(value, "isoformat") else str(value))


def as_mapping(value: Any, name: str) -> Mapping[str, Any]:
    """An object, or one as JSON text; null is an empty one."""
    if value is None:
        return {}
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except InvalidField as error:
            raise InvalidField(name, error.problem) from error
    if not isinstance(value, Mapping):
        raise InvalidField(name, f"got {short(value)}, allowed is an object, or one as JSON text")
    return value
