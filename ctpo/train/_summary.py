"""From the samples of an evaluation to its metrics: one row per problem, means with intervals, tables of both."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ctpo.train.metrics import (
    Interval,
    compare_paired,
    majority_at_k,
    mean_interval,
    pass_at_k,
    sampling_interval,
)

if TYPE_CHECKING:
    from ctpo.train.data import Problem

__all__ = [
    "LEVEL",
    "comparison_lines",
    "differences",
    "metrics",
    "problem_row",
    "read_problems",
    "result_lines",
    "summary",
    "write_problems",
]

LEVEL = 0.95
# From so many problems on, a third digit of a share is worth its place.
_MANY = 400
_SHARE = (0.0, 1.0)
_MEANS = {
    "mean_reward": "reward",
    "mean_tokens": "tokens",
    "mean_tool_calls": "tool_calls",
    "truncated": "truncated",
    "out_of_rounds": "out_of_rounds",
}


def problem_row(problem: Problem, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What problems.parquet has of a problem.

    Args:
        problem: The problem.
        samples: Its n rows of samples.jsonl.
    """
    n = len(samples)
    correct, answers = [one["correct"] for one in samples], [one["answer"] for one in samples]
    sizes = list(range(1, n + 1))
    return {
        "id": problem.id,
        "data_source": problem.data_source,
        "prompt": json.dumps([dict(message) for message in problem.prompt], ensure_ascii=False),
        "ground_truth": problem.ground_truth,
        "n": n,
        "correct": sum(correct),
        "failures": sum(bool(one["failures"]) for one in samples),
        "pass_at_k": pass_at_k(n, sum(correct), sizes).tolist(),
        "maj_at_k": majority_at_k(answers, correct, sizes).tolist(),
        **{column: math.fsum(one[name] for one in samples) / n for column, name in _MEANS.items()},
        "format": math.fsum(one["parts"]["format"] for one in samples) / n,
        "sample_correct": correct,
        "sample_answer": [None if answer is None else _storable(answer) for answer in answers],
        "sample_reward": [one["reward"] for one in samples],
        "sample_tokens": [one["tokens"] for one in samples],
        "sample_tool_calls": [one["tool_calls"] for one in samples],
        "sample_failures": [[_storable(f"{name}: {why}") for name, why in one["failures"].items()] for one in samples],
    }


def write_problems(table: Sequence[Mapping[str, Any]], file: IO[bytes]) -> None:
    """Write the rows of all problems as parquet."""
    types = {
        "n": pa.int64(),
        "correct": pa.int64(),
        "failures": pa.int64(),
        **dict.fromkeys(("id", "data_source", "prompt", "ground_truth"), pa.string()),
        **dict.fromkeys((*_MEANS, "format"), pa.float64()),
        **dict.fromkeys(("pass_at_k", "maj_at_k", "sample_reward"), pa.list_(pa.float64())),
        **dict.fromkeys(("sample_tokens", "sample_tool_calls"), pa.list_(pa.int64())),
        "sample_correct": pa.list_(pa.bool_()),
        "sample_answer": pa.list_(pa.string()),
        "sample_failures": pa.list_(pa.list_(pa.string())),
    }
    schema = pa.schema([(name, types[name]) for name in table[0]])
    pq.write_table(pa.Table.from_pylist([dict(row) for row in table], schema=schema), file)


def read_problems(path: str) -> list[dict[str, Any]]:
    """The rows that `write_problems` wrote."""
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def metrics(
    table: Sequence[Mapping[str, Any]], sizes: int
) -> dict[str, tuple[list[float], tuple[float, float] | None]]:
    """Values by problem, and bounds, of each metric.

    Args:
        table: Rows of problems.
        sizes: k of pass@k and maj@k up to which.
    """
    found: dict[str, tuple[list[float], tuple[float, float] | None]] = {}
    found["avg"] = ([row["correct"] / row["n"] for row in table], _SHARE)
    for name, column in (("pass", "pass_at_k"), ("maj", "maj_at_k")):
        for k in range(1, sizes + 1):
            found[f"{name}@{k}"] = ([row[column][k - 1] for row in table], _SHARE)
    found["reward"] = ([row["mean_reward"] for row in table], None)
    found["format"] = ([row["format"] for row in table], _SHARE)
    found["tokens"] = ([row["mean_tokens"] for row in table], None)
    found["tool_calls"] = ([row["mean_tool_calls"] for row in table], None)
    found["truncated"] = ([row["truncated"] for row in table], _SHARE)
    found["out_of_rounds"] = ([row["out_of_rounds"] for row in table], _SHARE)
    return found


def summary(table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics with intervals over these problems, and the failures of rewards among their samples."""
    n = table[0]["n"]
    found = {}
    for name, (values, bounds) in metrics(table, n).items():
        interval = _ends(mean_interval(values, level=LEVEL, bounds=bounds))
        if name in ("tokens", "tool_calls") and interval["low"] is not None:
            interval["low"] = max(interval["low"], 0.0)
        if name == "avg":
            name = f"avg@{n}"
            again = sampling_interval([row["sample_correct"] for row in table], level=LEVEL)
            interval |= {f"sampling_{key}": value for key, value in _ends(again).items() if key in ("low", "high")}
        found[name] = interval
    failed = Counter(text for row in table for texts in row["sample_failures"] for text in texts)
    return {
        "problems": len(table),
        "samples": sum(row["n"] for row in table),
        "metrics": found,
        "failures": {"samples": sum(row["failures"] for row in table), "reasons": dict(failed.most_common())},
    }


def differences(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], *, rewards: bool
) -> dict[str, dict[str, Any]]:
    """Paired differences b - a of all metrics; `rewards` says whether both have the same rewards."""
    n = {row["n"] for table in (a, b) for row in table}
    sizes = min(n)
    found = {}
    for (name, (first, bounds)), (second, _) in zip(metrics(a, sizes).items(), metrics(b, sizes).values(), strict=True):
        if name == "reward" and not rewards:
            continue
        one = compare_paired(first, second, level=LEVEL, bounds=bounds)
        found[f"avg@{sizes}" if name == "avg" and len(n) == 1 else name] = {
            "a": one.mean_a,
            "b": one.mean_b,
            "difference": one.difference,
            "low": _number(one.low),
            "high": _number(one.high),
            "p_value": _number(one.p_value),
            "larger": one.larger,
            "smaller": one.smaller,
            **({"reason": one.reason} if one.reason else {}),
        }
    return found


def result_lines(parts: Mapping[str, Mapping[str, Any]], n: int, *, tools: bool, width: int) -> list[str]:
    """A table of metrics (rows) by data source (columns), in blocks of columns that fit."""
    average = f"avg@{n}"
    shown = [
        average,
        *(["same problems"] if n > 1 else []),
        *(f"pass@{k}" for k in _powers(n) if k > 1),
        *([f"maj@{n}"] if n > 1 else []),
    ]
    if any(part["metrics"]["reward"]["mean"] != part["metrics"][average]["mean"] for part in parts.values()):
        shown.append("reward")
    shown += [
        "format",
        "tokens",
        *(["tool_calls"] if tools else []),
        "truncated",
        *(["out_of_rounds"] if tools else []),
    ]
    columns = []
    for name, part in parts.items():
        digits = _digits(part["problems"])
        found = dict(part["metrics"])
        if "same problems" in shown:
            ends = {key: found[average][f"sampling_{key}"] for key in ("low", "high")}
            found["same problems"] = {"mean": None, **ends}
        columns.append([name, str(part["problems"]), *(_cell(found[key], _spec(key, digits)) for key in shown)])
    head = ["", "problems", *(_title(key) for key in shown)]
    lines: list[str] = []
    while columns:
        take = 1
        while take < len(columns) and _width([head, *columns[: take + 1]]) <= width:
            take += 1
        lines += [*([""] if lines else []), *_table([head, *columns[:take]])]
        columns = columns[take:]
    return lines


def comparison_lines(part: Mapping[str, Any]) -> list[str]:
    """A table of one comparison."""
    found, digits = part["metrics"], _digits(part["problems"])
    sizes = max(int(name.removeprefix("pass@")) for name in found if name.startswith("pass@"))
    passes = [f"pass@{k}" for k in _powers(sizes) if k > 1]
    average = next(iter(found))
    shown = [average, *passes, *([f"maj@{sizes}"] if sizes > 1 else []), "reward", "format", "tokens"]
    if "reward" not in found or all(found["reward"][side] == found[average][side] for side in "ab"):
        shown.remove("reward")
    shown += [name for name in ("tool_calls", "truncated", "out_of_rounds") if found[name]["a"] or found[name]["b"]]
    columns: list[list[str]] = [["", *map(_title, shown)], ["A"], ["B"], ["B - A"], ["p"]]
    for name in shown:
        one, spec = found[name], _spec(name, digits)
        signed = f"+{spec}"
        ends = "-" if one["low"] is None else f"{one['low']:{signed}}, {one['high']:{signed}}"
        columns[1].append(f"{one['a']:{spec}}")
        columns[2].append(f"{one['b']:{spec}}")
        columns[3].append(f"{one['difference']:{signed}} [{ends}]")
        p = one["p_value"]
        columns[4].append("-" if p is None else "<0.0001" if p < 1e-4 else f"{p:.2g}")
    return _table(columns)


def _powers(n: int) -> list[int]:
    """1, 2, 4 ... and n."""
    return sorted({2**power for power in range(n.bit_length())} | {n})


def _title(name: str) -> str:
    return name.replace("_", " ")


def _digits(problems: int) -> int:
    return 2 if problems < _MANY else 3


def _spec(name: str, digits: int) -> str:
    return ".1f" if name == "tokens" else f".{digits}f"


def _cell(interval: Mapping[str, Any], spec: str) -> str:
    mean = "" if interval["mean"] is None else f"{interval['mean']:{spec}} "
    ends = "" if interval["low"] is None else f"[{interval['low']:{spec}}, {interval['high']:{spec}}]"
    return f"{mean}{ends}".strip()


def _table(columns: Sequence[Sequence[str]]) -> list[str]:
    """Markdown with aligned columns, which reads well on a terminal too; the first column holds names."""
    safe = [[cell.replace("|", "\\|") for cell in column] for column in columns]
    widths = [max(3, *map(len, column)) for column in safe]

    def line(cells: Iterable[str]) -> str:
        padded = [
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if place else "-") for place, width in enumerate(widths)) + "|"
    rows = list(zip(*safe, strict=True))
    return [line(rows[0]), rule, *map(line, rows[1:])]


def _width(columns: Sequence[Sequence[str]]) -> int:
    return len(_table(columns)[0])


def _ends(interval: Interval) -> dict[str, Any]:
    found = {"mean": interval.mean, "low": _number(interval.low), "high": _number(interval.high)}
    return found | ({"reason": interval.reason} if interval.reason else {})


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _storable(text: str) -> str:
    """Without halves of characters, which UTF-8 has not."""
    return text.encode("utf-8", "replace").decode()
