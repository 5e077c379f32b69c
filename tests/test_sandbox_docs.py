"""The page on the sandbox: its examples show what it says, its tables have the limits and speeds that there are."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import fields

import pytest
from sandbox_arena import PAGE, PROJECT
from sandbox_backends import require_backend

from ctpo.train.sandbox import Limits

TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", TEXT, flags=re.DOTALL)


def test_examples_print_what_the_page_shows():
    require_backend("bubblewrap")
    assert len(EXAMPLES) >= 2
    scope: dict[str, object] = {}
    for code, shown in EXAMPLES:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "example", "exec"), scope)
        assert printed.getvalue() == shown


def test_limits_of_the_page_are_those_of_the_code():
    rows = dict(re.findall(r"^\| `(\w+)`, [^|]+ \| ([^|]+) \|", TEXT, flags=re.MULTILINE))
    assert list(rows) == [field.name for field in fields(Limits)]
    for name, text in rows.items():
        number, _, unit = text.partition(" ")
        assert float(number) * (2**20 if unit == "MiB" else 1) == getattr(Limits(), name)


def test_speeds_of_the_page_are_those_that_were_measured():
    measured = json.loads((PROJECT / "benchmarks" / "results" / "sandbox.json").read_text(encoding="utf-8"))
    rows = {(row["backend"], row["what"]): row for row in measured["rows"]}
    lines = TEXT.split("<!-- speed -->\n")[1].strip().splitlines()[2:]
    assert len(lines) >= 8
    for line in lines:
        backend, what, median, high = (cell.strip() for cell in line.split("|")[1:-1])
        row = rows[backend, what]
        assert (median, high) == (row["median ms"], row["95 % ms"])
    goals = [row for row in rows.values() if row["goal"]]
    assert len(goals) == 2
    for row in goals:
        assert float(row["median ms"]) < float(row["goal"].split()[1]), row


@pytest.mark.parametrize(
    "word", ["apt install bubblewrap", "apparmor_restrict_unprivileged_userns", "seccomp=unconfined"]
)
def test_page_says_what_to_do_where_it_does_not_work(word):
    assert word in TEXT
