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

An arithmetic problem of difficulty d, 1 to 10, has 2 + (d - 1) // 2 operands of 1 + d // 2 digits, and between them +,
- or *. The split "test" has a fifth of all sets of operands, and "train" the others.

What a row has to hold is said at `load_problems`; a bad row is named by file, row and column in a `DataError`.
Nothing in the data is ever executed: no pickles, no loading scripts.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import math
import numbers
import os
import re
import statistics
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from ctpo.train._made_problems import digest, open_arithmetic, open_gym
from ctpo.train._rows import (
    DataError,
    InvalidField,
    Source,
    as_mapping,
    check_text,
    check_whole,
    json_value,
    open_directory,
    open_file,
    open_hub,
    parse_json,
    short,
    unknown,
)

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

# What problems made here ask for; `ctpo.train.rewards` reads the answer from there.
BOXED = "Put the final answer in \\boxed{}."

_log = logging.getLogger(__name__)
_ROLES = ("system", "user", "assistant")
_FIELDS = ("id", "prompt", "ground_truth", "data_source", "ability", "extra_info")
_KINDS = (
    "a .parquet, .jsonl or .json file (the last two also .gz), a directory of a data set, hub:org/name[@split], "
    "reasoning-gym:TASK[?key=value&...] or arithmetic[?difficulty=1&...]"
)


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
            object.__setattr__(self, name, check_text(name, getattr(self, name)))
        if not self.id.strip():
            raise InvalidField("id", f"got {short(self.id)}, allowed is text that is not blank")
        object.__setattr__(self, "prompt", _messages(self.prompt))
        if not isinstance(self.extra_info, Mapping):
            raise InvalidField("extra_info", f"got {short(self.extra_info)}, allowed is a mapping")
        object.__setattr__(self, "extra_info", json_value(self.extra_info))
        if not self.ground_truth.strip() and not _is_scored_by_gym(self.extra_info):
            raise InvalidField("ground_truth", f"got {short(self.ground_truth)}, allowed is text that is not blank")

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
    id           ``id``: text or a whole number; else the source's name, its split if it has some, and the row. Each
                 only once.
    prompt       ``prompt``, else ``question`` or ``problem`` (not both): messages, those as JSON text, or plain text
                 (one message of the user)
    ground_truth ``ground_truth``: taken as it is. Else ``reward_model.ground_truth``, ``answer``, ``solution``: a
                 number; text; a list of one of these, or ``["..."]`` as JSON text. From text with ``#### 42`` as its
                 last line the 42 is taken, without commas, from ``solution`` else what is in its last ``\boxed{}`` or
                 ``\fbox{}``; the whole text is kept in `extra_info`.
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
        limit: At most so many problems; after the shuffle if there is one, else reading stops there. Before
            `filter_by_length`, if that is used.
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
        _log.warning("left out %s", _left_out(bad))
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

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
        >>> tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        >>> short = Problem(id="a", prompt=({"role": "user", "content": "What is 1 + 2?"},), ground_truth="3")
        >>> long = Problem(id="b", prompt=({"role": "user", "content": "What is 1 + 2 + 3?"},), ground_truth="6")
        >>> [problem.id for problem in filter_by_length([short, long], tokenizer, 5)]
        ['a']
    """
    kept, left_out = _filtered(problems, tokenizer, max_prompt_tokens, tools, chat_template_kwargs)
    if left_out:
        _log.warning("left out %s", left_out)
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
    """`load_problems`, and the errors of the rows left out."""
    if columns is not None and not isinstance(columns, Mapping):
        raise ValueError(f"columns is {short(columns)}, allowed is a mapping of field to column")
    columns = dict(columns or {})
    for name, column in columns.items():
        if name not in _FIELDS:
            raise ValueError(f"columns: {unknown(name, _FIELDS)}")
        if not isinstance(column, str) or not column:
            raise ValueError(f"columns: {name} is {short(column)}, allowed is the name of a column")
    if isinstance(drop, str) or not isinstance(drop, Collection) or not all(isinstance(name, str) for name in drop):
        raise ValueError(f"drop is {short(drop)}, allowed is a list of columns")
    if limit is not None:
        check_whole("limit", limit, 1)
    if shuffle_seed is not None:
        check_whole("shuffle_seed", shuffle_seed)
    for name, text in (("system_prompt", system_prompt), ("instruction", instruction), ("split", split)):
        if text is not None:
            try:
                check_text(name, text)
            except InvalidField as error:
                raise ValueError(f"{name} {error.problem}") from error
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row is {short(on_bad_row)}, allowed are 'error' and 'skip'")

    opened = _open(source, split)
    reader = _Reader(
        opened, columns, frozenset(drop), system_prompt, BOXED if instruction is None and opened.made else instruction
    )
    problems: list[Problem] = []
    bad: list[DataError] = []
    first_at: dict[str, int] = {}
    not_dropped = set(drop)
    with contextlib.closing(opened.rows) as rows:
        for number, row in rows:
            not_dropped.difference_update(row if isinstance(row, dict) else ())
            try:
                problem = reader.problem(row, number, first_at)
            except DataError as error:
                bad.append(error)
                continue
            first_at[problem.id] = number
            problems.append(problem)
            if shuffle_seed is None and len(problems) == limit:
                break
        else:
            if not_dropped and (problems or bad):
                raise DataError(f"has no column {sorted(not_dropped)[0]!r} to drop", opened.name)
    if bad and (on_bad_row == "error" or not problems):
        first = bad[0]
        more = f" ({_others(bad)})" if len(bad) > 1 else ""
        raise DataError(first.problem + more, first.source, first.unit, first.row, first.column)
    if not problems:
        raise DataError("has no rows, allowed is at least one", opened.name)
    if shuffle_seed is not None:
        problems.sort(key=lambda problem: digest("shuffle", int(shuffle_seed), problem.id))
    return problems[:limit], bad


def _others(bad: Sequence[DataError]) -> str:
    places = ", ".join(str(error.row) for error in bad[1:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
    return f"also bad: {bad[0].unit}{'s' * (len(bad) > 2)} {places}"


def _left_out(bad: Sequence[DataError]) -> str:
    return f"1 bad row: {bad[0]}" if len(bad) == 1 else f"{len(bad)} bad rows: {bad[0]} ({_others(bad)})"


def _open(source: str | os.PathLike[str], split: str | None) -> Source:
    text = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise DataError(f"source is {short(source)}, allowed is {_KINDS}")
    if isinstance(source, str):
        kind, _, rest = text.partition(":")
        if kind == "hub":
            return open_hub(rest, split, text)
        if kind == "reasoning-gym":
            return open_gym(rest, split, text)
        kind, _, rest = text.partition("?")
        if kind == "arithmetic":
            return open_arithmetic(rest, split, text)
    path = Path(text)
    try:
        if path.is_dir():
            return open_directory(path, split, text)
        if path.is_file():
            if split is not None:
                raise DataError(f"is a file, which has no splits, but split is {split!r}", text)
            if found := open_file(path, text):
                return found
    except OSError as error:  # such as a name that is too long
        raise DataError(f"cannot be read: {error.strerror or error}", text) from error
    what = "is a file of another kind" if path.exists() else "is not there"
    raise DataError(f"{what}, allowed is {_KINDS}", text)


# ----------------------------------------------------------------------------------------------------------- one row

_ABSENT = object()
# Where a field is looked for that has no column of its own name.
_OTHERS = {"prompt": ("question", "problem"), "ground_truth": ("reward_model.ground_truth", "answer", "solution")}


@dataclass(frozen=True, slots=True)
class _Reader:
    """Makes problems of a source's rows."""

    source: Source
    columns: Mapping[str, str]
    drop: frozenset[str]
    system_prompt: str | None
    instruction: str | None

    def problem(self, row: Any, number: int, taken: Mapping[str, int]) -> Problem:
        """The problem of a row; `taken` are the ids of rows before it."""
        if isinstance(row, DataError):
            raise row
        origin: dict[str, str] = {}  # field to column
        try:
            if not isinstance(row, dict):
                raise InvalidField("", f"got {short(row)}, allowed is an object with a prompt and a ground truth")
            row = {name: value for name, value in row.items() if name not in self.drop and "__index_level_" not in name}
            for value in row.values():
                if isinstance(value, DataError):
                    raise value
            found = {name: self._find(name, row, origin) for name in _FIELDS}
            truth = _truth(found["ground_truth"], origin["ground_truth"])
            problem = Problem(
                id=self._id(found["id"], number, origin["id"]),
                prompt=self._prompt(found["prompt"]),
                ground_truth=truth,
                data_source=self.source.label if found["data_source"] is None else found["data_source"],
                ability="" if found["ability"] is None else found["ability"],
                extra_info=_extra_info(found, row, truth, origin),
            )
            if problem.id in taken:
                before = f"{self.source.unit} {taken[problem.id]}"
                raise InvalidField("id", f"got {short(problem.id)}, as in {before}, allowed is each id once")
        except InvalidField as error:
            column = origin.get(error.name) or error.name
            raise DataError(error.problem, self.source.name, self.source.unit, number, column) from None
        return problem

    def _find(self, name: str, row: Mapping[str, Any], origin: dict[str, str]) -> Any:
        """What a row holds for a field, None where it may hold nothing; `origin` is told the column, "" for none."""
        column = origin[name] = self.columns.get(name, name)
        found = _get(row, column)
        if found is not _ABSENT:
            if found is None and name == "id":
                raise InvalidField("id", "got null, allowed is text or a whole number")
            return found
        if name in self.columns:
            raise InvalidField(name, f"there is no such column; {_columns_of(row, column)}")
        others = [column for column in _OTHERS.get(name, ()) if _get(row, column) is not _ABSENT]
        if name == "prompt" and len(others) > 1:
            both = " and ".join(map(repr, others))
            raise InvalidField(name, f"columns {both} may both be meant; say which by columns={{'prompt': ...}}")
        if name in _OTHERS and not others:
            known = ", ".join(map(repr, _OTHERS[name]))
            problem = f"there is no such column, nor any of {known}; {_columns_of(row, name)}"
            raise InvalidField(name, f"{problem}; say which by columns={{{name!r}: ...}}")
        origin[name] = others[0] if others else ""
        return _get(row, others[0]) if others else None

    def _id(self, found: Any, number: int, column: str) -> str:
        if not column:
            return "-".join(filter(None, (self.source.label, self.source.split, str(number))))
        if isinstance(found, bool) or not isinstance(found, int | str):
            raise InvalidField("id", f"got {short(found)}, allowed is text or a whole number")
        return str(found)

    def _prompt(self, found: Any) -> list[dict[str, str]]:
        if isinstance(found, str):
            found = _messages_in(found) or [{"role": "user", "content": found}]
        messages = list(_messages(found))
        if self.system_prompt is not None:
            system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
            messages = system + messages[messages[0]["role"] == "system" :]
        if self.instruction:
            messages[-1] = {"role": "user", "content": f"{messages[-1]['content']}\n\n{self.instruction}"}
        return messages


def _get(row: Mapping[str, Any], column: str) -> Any:
    """What is in a column; a dot goes into one."""
    if column in row:
        return row[column]
    name, dot, rest = column.partition(".")
    if not dot or name not in row:
        return _ABSENT
    inner = row[name]
    if isinstance(inner, str):
        try:
            inner = parse_json(inner)
        except InvalidField as error:
            raise InvalidField(name, error.problem) from error
    return _get(inner, rest) if isinstance(inner, dict) else _ABSENT


def _columns_of(row: Mapping[str, Any], wanted: str) -> str:
    if not row:
        return "there are none"
    near = difflib.get_close_matches(wanted, list(row), 1)
    listed = textwrap.shorten(", ".join(map(short, row)), 200, placeholder=" ...")
    return f"there are {listed}" + (f"; did you mean {near[0]!r}?" if near else "")


def _extra_info(found: Mapping[str, Any], row: Mapping[str, Any], truth: str, origin: dict[str, str]) -> dict[str, Any]:
    """The row's own, with the columns that no field was taken from."""
    extra = dict(as_mapping(found["extra_info"], "extra_info"))
    rest = {name: value for name, value in row.items() if value is not None}
    for name, column in origin.items():
        # A text that the answer was taken out of stays.
        if column and not (name == "ground_truth" and isinstance(found[name], str) and found[name] != truth):
            _remove(rest, [column] if column in row else column.split("."))
    column = origin["extra_info"]
    for name, value in rest.items():
        origin["extra_info"] = name  # for errors
        kept = json_value(value)
        if name in extra and json_value(extra[name]) != kept:
            raise InvalidField("extra_info", "is also in extra_info, with another value; leave the column out")
        extra[name] = kept
    origin["extra_info"] = column
    return extra


def _remove(row: dict[str, Any], path: Sequence[str]) -> None:
    """Take a value out, and what is empty then."""
    if len(path) > 1:
        inner = row.get(path[0], {})  # gone if two fields are taken from it
        inner = dict(parse_json(inner) if isinstance(inner, str) else inner)
        _remove(inner, path[1:])
        if inner:
            row[path[0]] = inner
            return
    row.pop(path[0], None)


def _truth(found: Any, column: str) -> str:
    """The answer in what a column holds."""
    if column != "ground_truth":
        if isinstance(found, str) and found.lstrip().startswith("["):
            with contextlib.suppress(InvalidField):  # a text that only looks so, such as an interval
                parsed = parse_json(found)
                found = parsed if isinstance(parsed, list) and [type(item) for item in parsed] == [str] else found
        if isinstance(found, list):
            if len(found) != 1:
                raise InvalidField("ground_truth", f"got {short(found)}, allowed is one answer")
            found = found[0]
    if isinstance(found, numbers.Number):
        if isinstance(found, bool | complex) or not math.isfinite(found):  # type: ignore[arg-type]
            raise InvalidField("ground_truth", f"got {short(found)}, allowed is text or a finite number")
        # No exponent, not the .0 that whole numbers have in a column with gaps, and no -0.
        return re.sub(r"\.0+$", "", format(Decimal(str(found or 0)), "f"))
    if not isinstance(found, str):
        raise InvalidField("ground_truth", f"got {short(found)}, allowed is text or a number")
    if column == "ground_truth":
        return found
    # The last line, as in GSM8K: elsewhere it is a heading.
    last = found.rstrip().rpartition("\n")[2]
    if marked := re.fullmatch(r"####(?!#)[ \t]*(\S.*)", last):
        return re.sub(r"(?<=\d),(?=\d{3})", "", marked[1])
    if column.rpartition(".")[2] != "solution":
        return found
    from ctpo.train.rewards import extract_boxed

    boxed = extract_boxed(_BOX.sub(_with_braces, found))
    if not boxed:
        problem = f"got {short(found)}, allowed is a text with \\boxed{{answer}} or a last line '#### answer'"
        raise InvalidField("ground_truth", problem)
    return boxed


# MATH has \fbox{4} too, and $\boxed 4$, which ends with the formula. A line break, \\, is no command's backslash.
_BOX = re.compile(r"\\\\|\\fbox(?=\s*\{)|\\boxed(?![a-zA-Z])\s*(?P<bare>[^\s{}$][^$\n]{0,200}?)\s*(?=\$|\\\)|\\\])")


def _with_braces(found: re.Match[str]) -> str:
    r"""What `_BOX` finds, as ``\boxed{...}``."""
    if found["bare"] is None:
        return found[0].replace(r"\fbox", r"\boxed")
    return rf"\boxed{{{found['bare']}}}"


def _messages_in(text: str) -> list[Any] | None:
    """Messages, if a text is a list of them in JSON."""
    if text.lstrip().startswith("["):
        with contextlib.suppress(InvalidField):
            found = parse_json(text)
            if found and all(isinstance(item, dict) and {"role", "content"} <= set(item) for item in found):
                return list(found)
    return None


def _messages(found: Any) -> tuple[dict[str, str], ...]:
    """Messages with role and content alone, checked."""
    if not isinstance(found, list | tuple) or not found:
        allowed = "text or a list of messages {'role': ..., 'content': ...}"
        raise InvalidField("prompt", f"got {short(found)}, allowed is {allowed}")
    messages = tuple(_message(message, place) for place, message in enumerate(found))
    if messages[-1]["role"] != "user":
        raise InvalidField("prompt", f"the last message is the {messages[-1]['role']}'s, allowed is the user's")
    return messages


def _message(found: Any, place: int) -> dict[str, str]:
    def wrong(what: str, value: Any, allowed: str) -> InvalidField:
        return InvalidField("prompt", f"{what} {place} is {short(value)}, allowed {allowed}")

    if not isinstance(found, Mapping) or not {"role", "content"} <= set(found):
        raise wrong("message", found, "is {'role': ..., 'content': ...}")
    if others := {key: found[key] for key in found if key not in ("role", "content") and found[key] is not None}:
        raise wrong("more than role and content of message", others, "is nothing more")
    role, content = found["role"], found["content"]
    if role not in _ROLES:
        raise wrong("role of message", role, f"are {', '.join(_ROLES)}")
    if role == "system" and place:
        raise wrong("role of message", role, "is that for the first message only")
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        content = "".join(texts) if len(texts) == len(content) else content
    if not isinstance(content, str) or (role != "system" and not content.strip()):
        raise wrong("content of message", content, "is text that is not blank")
    return {"role": str(role), "content": check_text("prompt", content)}


def _is_scored_by_gym(extra_info: Mapping[str, Any]) -> bool:
    return isinstance(extra_info.get("source_dataset"), str) and isinstance(extra_info.get("metadata"), dict)


# ---------------------------------------------------------------------------------------------------------------- show


def _prompt_tokens(
    problems: Sequence[Problem],
    tokenizer: Any,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    options = {"tools": list(tools) if tools else None, "add_generation_prompt": True, "return_dict": False}
    options.update(chat_template_kwargs or {})
    render: Callable[..., Any] = tokenizer.apply_chat_template
    return [len(render([dict(message) for message in problem.prompt], **options)) for problem in problems]


def _filtered(
    problems: Sequence[Problem],
    tokenizer: Any,
    most: int,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[Problem], str]:
    """Those with short enough prompts, and what to say of the others, "" if there are none."""
    check_whole("max_prompt_tokens", most, 1)
    lengths = _prompt_tokens(problems, tokenizer, tools, chat_template_kwargs)
    kept = [problem for problem, length in zip(problems, lengths, strict=True) if length <= most]
    if len(kept) == len(problems):
        return kept, ""
    left_out = f"{len(problems) - len(kept)} of {len(problems)} problems: prompts of more than {most} tokens"
    if not kept:
        raise DataError(f"{left_out}, the shortest has {min(lengths)}")
    return kept, f"{left_out}, the longest has {max(lengths)}"


def show(problems: Sequence[Problem], rows: int = 3, tokenizer: Any = None, *, width: int = 88) -> str:
    r"""A few problems as text for a terminal.

    With a tokenizer the prompt is what the model will see: the text of its chat template, special tokens spelled out,
    with the beginning of the answer. Characters that would move the cursor or change colors are escaped.

    Args:
        problems: At least one.
        rows: How many, the first ones.
        tokenizer: Of transformers, with a chat template; or None.
        width: Columns, at least 40.

    Returns:
        Lines without one at the end.

    Raises:
        ValueError: There is no problem, or a number is out of its range.

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
    check_whole("rows", rows, 0)
    check_whole("width", width, 40)
    if not problems:
        raise ValueError("problems is empty, allowed is at least one")
    counts = Counter(problem.data_source for problem in problems).most_common()
    named = [name if len(counts) == 1 else f"{name} ({count})" for name, count in counts[:8]]
    named += [f"{len(counts) - 8} others"] * (len(counts) > 8)
    blocks = [f"{len(problems)} problem{'s' * (len(problems) > 1)}: {', '.join(named)}"]
    blocks = ["\n".join(_wrapped(blocks[0], width))]
    lengths: Sequence[int | None] = [None] * len(problems)
    if tokenizer is not None:
        counted = _prompt_tokens(problems, tokenizer)
        lengths = counted
        blocks[0] += f"\ntokens of a prompt: {min(counted)} to {max(counted)}, median {statistics.median_low(counted)}"
    for place, problem in enumerate(problems[:rows]):
        blocks.append(_block(problem, f"{place + 1} of {len(problems)}", tokenizer, lengths[place], width))
    return "\n\n".join(blocks)


def _block(problem: Problem, title: str, tokenizer: Any, tokens: int | None, width: int) -> str:
    parts = [("source", ", ".join(filter(None, (problem.data_source, problem.ability))))]
    if tokenizer is None:
        parts += [(message["role"], message["content"]) for message in problem.prompt]
    else:
        messages = [dict(message) for message in problem.prompt]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        parts.append((f"{tokens} tokens", rendered))
    parts.append(("ground truth", problem.ground_truth or "none: judged by the task's scorer"))
    if problem.extra_info:
        parts.append(("extra_info", json.dumps(problem.extra_info, ensure_ascii=False)))
    margin = len("ground truth | ")
    name = _wrapped(problem.id, width // 2)[0]
    lines = [f"{title} {'-' * (width - len(title) - _columns(name) - 2)} {name}"]
    for label, text in parts:
        pieces = _wrapped(text, width - margin)
        most = 4 if label == "extra_info" else 40
        if len(pieces) > most:
            pieces = [*pieces[: most - 1], f"[{len(pieces) - most + 1} more lines]"]
        for number, piece in enumerate(pieces):
            lines.append(f"{'' if number else label:>{margin - 3}} | {piece}".rstrip())
    return "\n".join(lines)


def _columns(text: str) -> int:
    """What a text takes of a terminal's line."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def _wrapped(text: str, width: int) -> list[str]:
    """The text's lines, broken after spaces; what a terminal would obey, or not show, as escapes."""
    found = []
    for line in text.split("\n"):
        rest = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line).rstrip()
        start = 0
        while True:
            end = start
            used = 0
            while end < len(rest) and used + _columns(rest[end]) <= width:
                used += _columns(rest[end])
                end += 1
            if end < len(rest):
                space = rest.rfind(" ", start, end + 1) + 1
                end = space if rest[start:space].strip() else end
            found.append(rest[start:end].rstrip())
            if end == len(rest):
                break
            start = end
    return found


def show_source(
    source: str,
    *,
    rows: int = 3,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    drop: Sequence[str] = (),
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
        columns: As for `load_problems`.
        drop: As for `load_problems`.
        model: The model whose chat template renders them, named as for `ctpo.train.generation.load_model`; None shows
            roles.
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
        ValueError: Another argument is not what it has to be, or there is no such model.
        ImportError: A package that this kind of model needs is missing.

    Example:
        >>> print(show_source("arithmetic", rows=0))
        192 problems: arithmetic
    """
    if max_prompt_tokens is not None and model is None:
        raise ValueError("max_prompt_tokens needs a model, whose tokens are counted")
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
    notes = [f"Left out {_left_out(bad)}"] if bad else []
    tokenizer = None
    if model is not None:
        from ctpo.train.generation import load_tokenizer

        tokenizer = load_tokenizer(model)
    if max_prompt_tokens is not None:
        problems, left_out = _filtered(problems, tokenizer, max_prompt_tokens)
        notes += [f"Left out {left_out}"] * bool(left_out)
    return "\n\n".join([show(problems, rows, tokenizer, width=width), *notes])
