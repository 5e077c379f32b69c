"""Problems that are made, not read, for `ctpo.train.data`: arithmetic, and the tasks of reasoning-gym."""

from __future__ import annotations

import contextlib
import datetime
import difflib
import enum
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ctpo.train._rows import DataError, Source, agreed, json_value, one_line, parse_json, query, short, unknown


def digest(*parts: object) -> int:
    """128 bits that depend on these numbers and texts alone."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:16], "big")


def whole(options: Mapping[str, str], name: str, default: int, least: int, most: int | None, source: str) -> int:
    """The value of an option that is a whole number."""
    text = options.get(name, str(default))
    value = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else -1
    if value < least or (most is not None and value > most):
        allowed = f"from {least} on" if most is None else f"from {least} to {most}"
        raise DataError(f"{name} is {short(text)}, allowed is a whole number {allowed}", source)
    return value


# -------------------------------------------------------------------------------------------------------- arithmetic


def open_arithmetic(options: str, split: str | None, source: str) -> Source:
    """Whole numbers added, subtracted and multiplied; `options` is what follows the question mark."""
    given = query(options, ("difficulty", "size", "seed", "split"), source)
    difficulty = whole(given, "difficulty", 1, 1, 10, source)
    chosen = agreed(given.get("split"), split, source) or "train"
    if chosen not in ("train", "test"):
        raise DataError(f"split is {short(chosen)}, allowed are 'train' and 'test'", source)
    most = _how_many(difficulty, chosen)
    size = whole(given, "size", min(256, most), 1, most, source)
    seed = whole(given, "seed", 0, 0, None, source)
    return Source(source, "arithmetic", _arithmetic_rows(difficulty, size, seed, chosen), made=True)


def _shape(difficulty: int) -> tuple[int, int, int]:
    """Operands, the least of them, and how many each may be."""
    digits = 1 + difficulty // 2
    return 2 + (difficulty - 1) // 2, 10 ** (digits - 1), 9 * 10 ** (digits - 1)


def _is_held_out(operands: Iterable[int]) -> bool:
    """A fifth of all sets of operands: no order and no operators bring one of them into the other split."""
    return digest("arithmetic", *sorted(operands)) % 5 == 0


def _how_many(difficulty: int, split: str) -> int:
    """What may be asked for: all there are with two operands, else a million, of which no split has less."""
    terms, least, each = _shape(difficulty)
    if terms > 2:
        return 10**6
    numbers = range(least, least + each)
    pairs = ((a, b) for a in numbers for b in numbers if a <= b and _is_held_out((a, b)) == (split == "test"))
    return 3 * sum(1 if a == b else 2 for a, b in pairs)


def _arithmetic_rows(difficulty: int, size: int, seed: int, split: str) -> Generator[tuple[int, Any]]:
    terms, least, each = _shape(difficulty)
    seen: set[int] = set()
    draw = 0
    while len(seen) < size:
        place = digest("arithmetic", difficulty, seed, draw) % (each**terms * 3 ** (terms - 1))
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
        words = [str(operands[0]), *(f"{o} {n}" for o, n in zip(operators, operands[1:], strict=True))]
        expression = " ".join(words)
        row = {
            "id": f"arithmetic-{difficulty}-{place}",
            "prompt": f"What is {expression}?",
            "ground_truth": str(_value(operands, operators)),
            "ability": "math",
            "extra_info": {"difficulty": difficulty, "expression": expression, "split": split},
        }
        yield len(seen), row
        seen.add(place)


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


def open_gym(rest: str, split: str | None, source: str) -> Source:
    """A task of reasoning-gym; `rest` is what follows ``reasoning-gym:``."""
    task, _, options = rest.partition("?")
    if split is not None:
        raise DataError(f"has no splits, but split is {split!r}; take another seed, further away than the size", source)
    given = query(options, None, source)
    given["seed"] = str(whole(given, "seed", 0, 0, None, source))
    return Source(source, task, _gym_rows(task, given, source), made=True)


def _gym_rows(task: str, options: Mapping[str, str], source: str) -> Generator[tuple[int, Any]]:
    """Entries from a process in which sets of text have one order: some tasks depend on it."""
    # Ctrl-C is for the process that asks: this one just ends.
    program = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    program += "from ctpo.train._made_problems import write_gym; write_gym()"
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore", "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin as request:  # its status says more
                request.write(json.dumps({"task": task, "options": dict(options)}).encode())
            for number, line in enumerate(process.stdout):
                row = json.loads(line)
                if "error" in row:
                    raise DataError(row["error"], source)
                yield number, row
            if process.wait():
                raise DataError(f"the process that makes the problems ended with status {process.returncode}", source)
        finally:
            process.kill()


def write_gym() -> None:
    """The process of `_gym_rows`: reads a task, writes an entry a line."""
    request = json.load(sys.stdin)
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as output:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a task prints
        try:
            for row in _gym_entries(request["task"], request["options"]):
                output.write(json.dumps(row, allow_nan=False) + "\n")
        except BrokenPipeError:
            os._exit(0)  # no more are wanted
        except Exception as error:  # of the task's own code
            expected = isinstance(error, ValueError | AssertionError | ImportError)
            text = one_line(error) if expected else f"{type(error).__name__}: {one_line(error)}"
            output.write(json.dumps({"error": text}) + "\n")


def _gym_entries(task: str, options: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError("needs reasoning-gym: pip install reasoning-gym") from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, 3) or sorted(DATASETS)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if len(near) <= 3 else f"allowed are {', '.join(near)}"
        raise ValueError(f"there is no task {short(task)}; {hint}")
    types = get_type_hints(DATASETS[task][1])
    values = {}
    for key, text in options.items():
        if key not in types:
            raise ValueError(f"configuration of {task}: {unknown(key, types)}")
        try:
            values[key] = parsed(text, types[key])
        except (ValueError, KeyError) as error:
            allowed = types[key].__name__ if isinstance(types[key], type) else types[key]
            raise ValueError(f"configuration of {task}: {key} is {short(text)}, allowed is {allowed}") from error
    try:
        made = reasoning_gym.create_dataset(task, **values)
    except (AssertionError, ValueError, TypeError) as error:
        raise ValueError(f"configuration of {task}: {one_line(error)}") from error
    for index in range(len(made)):
        entry = made[index]
        metadata = json_value(entry["metadata"])
        yield {
            "id": f"{task}-{values['seed']}-{index}",
            "prompt": str(entry["question"]),
            "ground_truth": "" if entry["answer"] is None else str(entry["answer"]),
            "data_source": f"reasoning-gym:{task}",
            "ability": made.category,
            "extra_info": {
                "source_dataset": task,
                "source_index": index,
                "configuration": json_value(values),
                "metadata": metadata,
            },
        }


def parsed(text: str, kind: Any) -> Any:
    """The value of a field of a configuration, by its type; lists as JSON or with commas."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {str(value): value for value in arguments}[text]
    if type(None) in arguments:
        if text.lower() in ("none", "null"):
            return None
        return parsed(text, next(argument for argument in arguments if argument is not type(None)))
    if (origin or kind) in (list, tuple) or origin is Sequence:
        if text.startswith("["):
            values = parse_json(text)
        else:
            values = [parsed(part, arguments[0] if arguments else str) for part in text.split(",")]
        return values if (origin or kind) is list else tuple(values)
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {str(name): member for member in kind for name in (member.value, member.name)}[text]
    if kind in (datetime.date, datetime.time):
        return kind.fromisoformat(text)
    raise ValueError(f"{kind} cannot be written here")
