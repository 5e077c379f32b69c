"""Problems of every source: what is read, what is refused and how, and what is made."""

from __future__ import annotations

import collections
import contextlib
import datetime
import decimal
import functools
import gzip
import io
import json
import logging
import math
import os
import pickle
import re
import subprocess
import sys
import unicodedata
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer

from ctpo.train import _made_problems, _rows
from ctpo.train._made_problems import parsed
from ctpo.train.data import (
    BOXED,
    DataError,
    Problem,
    filter_by_length,
    load_problems,
    show,
    show_source,
    to_dataset,
)

USER = {"role": "user", "content": "6 * 7?"}
ROW = {
    "id": "a",
    "data_source": "made/up",
    "prompt": [USER],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"index": 3, "split": "train"},
}
VERL = Problem("a", [USER], "42", "made/up", "math", {"index": 3, "split": "train", "reward_model": {"style": "rule"}})


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list, **options) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def write_list(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


WRITERS = {"a.parquet": write_parquet, "a.jsonl": write_lines, "a.json": write_list}


def one(path: Path, row: dict, **options) -> Problem:
    """The problem of a row in a file of JSON lines."""
    return load_problems(write_lines(path / "one.jsonl", [row]), **options)[0]


def refused(path: Path, row: object, **options) -> DataError:
    with pytest.raises(DataError) as caught:
        load_problems(write_lines(path / "bad.jsonl", [row]), **options)
    assert "\n" not in str(caught.value)
    return caught.value


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("name", WRITERS)
def test_layout_of_verl(tmp_path, name):
    assert load_problems(WRITERS[name](tmp_path / name, [ROW])) == [VERL]
    assert load_problems(str(tmp_path / name)) == [VERL]


@pytest.mark.parametrize("zipped", ["a.jsonl.gz", "a.json.gz"])
def test_zipped(tmp_path, zipped):
    plain = WRITERS[zipped.removesuffix(".gz")](tmp_path / zipped.removesuffix(".gz"), [ROW])
    (tmp_path / zipped).write_bytes(gzip.compress(plain.read_bytes()))
    assert load_problems(tmp_path / zipped) == [VERL]


def test_json_file_may_hold_lines(tmp_path):
    assert load_problems(write_lines(tmp_path / "a.json", [ROW])) == [VERL]


@pytest.mark.parametrize("nested", ["reward_model", "extra_info", "prompt"])
def test_nested_column_may_be_json_text(tmp_path, nested):
    assert one(tmp_path, {**ROW, nested: json.dumps(ROW[nested])}) == VERL


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("6 * 7?", "6 * 7?"),
        ("[1, 2] has which sum?", "[1, 2] has which sum?"),
        ("[1, 2]", "[1, 2]"),
        ("[]", "[]"),
        ('[{"role": "user"}]', '[{"role": "user"}]'),
        ('  [{"role": "user", "content": "x"}]', "x"),
    ],
)
def test_prompt_as_text(tmp_path, text, prompt):
    assert one(tmp_path, {**ROW, "prompt": text}).prompt == ({"role": "user", "content": prompt},)


def test_content_in_parts_and_null_keys_of_messages(tmp_path):
    parts = [{"type": "text", "text": "6 *"}, {"type": "text", "text": " 7?"}]
    assert one(tmp_path, {**ROW, "prompt": [{"role": "user", "content": parts, "name": None}]}) == VERL


@pytest.mark.parametrize(
    ("found", "answer"),
    [
        ("42", "42"),
        (42, "42"),
        (42.0, "42"),
        (-0.5, "-0.5"),
        (1e22, "10000000000000000000000"),
        (1e-7, "0.0000001"),
        (100.0, "100"),
        (-0.0, "0"),
        (-0.25, "-0.25"),
        (0, "0"),
        (10**40, str(10**40)),
        (["42"], "42"),
        ([42], "42"),
        ('["42"]', "42"),
        ("[1, 2]", "[1, 2]"),
        ("[1]", "[1]"),
        ("[1, 2)", "[1, 2)"),
        ('["1", "2"]', '["1", "2"]'),
        ("6 * 7 = 42\n#### 42", "42"),
        ("#### 1,234,567 \r\n", "1234567"),
        ("#### 1, 2", "1, 2"),
        ("#### 3\nno:\n#### -4.5", "-4.5"),
        ("#### 42\n\n  \n", "42"),
        ("####42", "42"),
        ("#### Solution\nIt is 42", "#### Solution\nIt is 42"),
        ("#### Solution\nIt is\n#### 42", "42"),
        ("##### Solution", "##### Solution"),
        ("42\n####", "42\n####"),
        ("a #### 3", "a #### 3"),
        (r"\boxed{3}", r"\boxed{3}"),
    ],
)
def test_answers(tmp_path, found, answer):
    assert one(tmp_path, {**ROW, "reward_model": {"ground_truth": found}}).ground_truth == answer
    assert one(tmp_path, {"question": "?", "answer": found}).ground_truth == answer


@pytest.mark.parametrize("text", ['["42"]', "#### 42", "[1]", " 42", "42.0"])
def test_column_ground_truth_is_taken_as_it_is(tmp_path, text):
    assert one(tmp_path, {"prompt": "?", "ground_truth": text}).ground_truth == text


def test_text_that_an_answer_was_taken_from_is_kept(tmp_path):
    found = one(tmp_path, {"question": "?", "answer": "so\n#### 42"})
    assert found.extra_info == {"answer": "so\n#### 42"}
    assert one(tmp_path, {"question": "?", "answer": "42"}).extra_info == {}
    found = one(tmp_path, {**ROW, "reward_model": {"ground_truth": '["42"]', "style": "rule"}})
    assert found.extra_info["reward_model"] == {"ground_truth": '["42"]', "style": "rule"}


def test_solution_gives_the_answer_in_its_box(tmp_path):
    solution = r"First \boxed{1}, then $\boxed{\frac{1}{2}}$."
    found = one(tmp_path, {"problem": "?", "solution": solution})
    assert found.ground_truth == r"\frac{1}{2}"
    assert found.extra_info == {"solution": solution}
    found = one(tmp_path, {"problem": "?", "solution": solution, "answer": "0.5"})
    assert (found.ground_truth, found.extra_info) == ("0.5", {"solution": solution})
    assert refused(tmp_path, {"problem": "?", "solution": "It is 3."}).column == "solution"
    assert refused(tmp_path, {"problem": "?", "solution": r"\boxed{ }"}).column == "solution"
    found = one(tmp_path, {"problem": "?", "solution": "#### Step 1\nAdd: \\boxed{7}."})
    assert found.ground_truth == "7"


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so $\boxed 4$.", "4"),
        (r"so $\boxed  -4.5 $.", "-4.5"),
        (r"so \(\boxed \frac{1}{2}\).", r"\frac{1}{2}"),
        (r"so \[x = \boxed4\]", "4"),
        (r"so $\fbox{4}$.", "4"),
        (r"so $\fbox {\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"$\boxed{1}$, no, $\boxed 2$", "2"),
        (r"$\boxed 1$, no, $\fbox{2}$", "2"),
        (r"$\boxed 1$, no, $\boxed{2}$", "2"),
        (r"$\boxed {3}$ and $y$", "3"),
        (r"${\boxed 5}$", "5"),
        ("a\\\\boxed 6$ \\boxed{7}", "7"),  # a line break, then the word
        ("a\\\\\\boxed 6$", "6"),  # a line break, then the command
    ],
)
def test_other_boxes_of_math(tmp_path, solution, answer):
    found = one(tmp_path, {"problem": "?", "solution": solution})
    assert (found.ground_truth, found.extra_info) == (answer, {"solution": solution})


@pytest.mark.parametrize("solution", [r"\boxed 4 is it", r"$\boxedtext 4$", "\\boxed a\nb$", r"$\boxed{4$", r"\fbox 4"])
def test_boxes_without_an_end_hold_no_answer(tmp_path, solution):
    assert refused(tmp_path, {"problem": "?", "solution": solution}).column == "solution"


def test_columns_of_other_names(tmp_path):
    row = {"q": "6 * 7?", "meta": {"truth": "42", "level": 1}, "key": 7, "prompt": "not this one", "where": "x"}
    columns = {"prompt": "q", "ground_truth": "meta.truth", "id": "key", "data_source": "where"}
    found = one(tmp_path, row, columns=columns)
    assert found == Problem("7", [USER], "42", "x", "", {"meta": {"level": 1}, "prompt": "not this one"})
    text = one(tmp_path, {**row, "meta": json.dumps(row["meta"])}, columns=columns)
    assert text == found


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("more", [{}, {"level": 1}])
def test_column_for_two_fields(tmp_path, more, as_text):
    meta = {"q": "6 * 7?", "a": {"b": "42"}, **more}
    row = {"meta": json.dumps(meta) if as_text else meta}
    columns = {"prompt": "meta.q", "id": "meta.q", "ground_truth": "meta.a.b", "ability": "meta.a.b"}
    found = one(tmp_path, row, columns=columns)
    assert found == Problem("6 * 7?", [USER], "42", "one", "42", {"meta": more} if more else {})


def test_column_with_a_dot_in_its_name(tmp_path):
    found = one(tmp_path, {"a.b": "6 * 7?", "a": {"b": "not this one"}, "answer": 42}, columns={"prompt": "a.b"})
    assert found.prompt == (USER,)
    assert found.extra_info == {"a": {"b": "not this one"}}


def test_defaults_of_what_is_not_there(tmp_path):
    row = {"question": "6 * 7?", "answer": 42}
    expected = Problem("train-1", [USER], "42", "train")
    assert load_problems(write_lines(tmp_path / "train.jsonl", [row])) == [expected]
    null = {**row, "data_source": None, "ability": None, "extra_info": None, "more": None}
    assert load_problems(write_lines(tmp_path / "train.jsonl", [null])) == [expected]
    assert load_problems(write_parquet(tmp_path / "train.parquet", [row, row]))[1].id == "train-1"


def test_columns_not_used_go_to_extra_info(tmp_path):
    found = one(tmp_path, {**ROW, "level": 5, "tags": ["a", None]})
    assert found.extra_info == {**VERL.extra_info, "level": 5, "tags": ["a", None]}
    assert one(tmp_path, {**ROW, "level": 5, "tags": []}, drop=["level", "tags"]) == VERL
    assert one(tmp_path, {**ROW, "split": "train"}) == VERL  # the same in both
    error = refused(tmp_path, {**ROW, "split": "test"})
    assert error.column == "split"
    with pytest.raises(DataError, match="no column 'levels' to drop"):
        one(tmp_path, ROW, drop=["levels"])


def test_values_that_json_has_not(tmp_path):
    day = datetime.datetime(2025, 2, 6, 12, 30)
    odd = {"when": day, "sum": decimal.Decimal("1.50"), "nan": math.nan, "inf": -math.inf, "big": 2**62}
    found = load_problems(write_parquet(tmp_path / "a.parquet", [{**ROW, "odd": odd}]))[0]
    expected = {"when": "2025-02-06T12:30:00", "sum": "1.50", "nan": None, "inf": None, "big": 2**62}
    assert found.extra_info["odd"] == expected
    (tmp_path / "a.jsonl").write_text('{"prompt": "?", "ground_truth": "1", "x": [NaN, Infinity, 1e999]}\n')
    assert load_problems(tmp_path / "a.jsonl")[0].extra_info == {"x": [None, None, None]}


def test_nothing_that_pandas_adds_is_kept(tmp_path):
    assert load_problems(write_parquet(tmp_path / "a.parquet", [{**ROW, "__index_level_0__": 5}])) == [VERL]


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf%b\n",
        b"%b\r\n",
        b"\n\n  \r\n%b",
        b"%b\n\n",
    ],
    ids=["mark", "crlf", "blank", "no end"],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_variants_of_lines(tmp_path, text, name):
    (tmp_path / name).write_bytes(text % json.dumps(ROW).encode())
    assert load_problems(tmp_path / name) == [VERL]


def test_lines_are_counted_as_editors_do(tmp_path):
    rows = ["", json.dumps({**ROW, "prompt": "a\u2028b\u0085c"}, ensure_ascii=False), "", json.dumps({"id": 1})]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8", newline="")
    with pytest.raises(DataError, match=r"a\.jsonl: line 4, column 'prompt': there is no such column"):
        load_problems(tmp_path / "a.jsonl")


def test_system_prompt_replaces_that_of_a_row(tmp_path):
    system = {"role": "system", "content": "old"}
    new = {"role": "system", "content": "new"}
    assert one(tmp_path, {**ROW, "prompt": [system, USER]}).prompt == (system, USER)
    assert one(tmp_path, {**ROW, "prompt": [system, USER]}, system_prompt="new").prompt == (new, USER)
    assert one(tmp_path, {**ROW, "prompt": [system, USER]}, system_prompt="").prompt == (USER,)
    assert one(tmp_path, ROW, system_prompt="new").prompt == (new, USER)
    assert one(tmp_path, ROW, system_prompt="").prompt == (USER,)


def test_instruction_ends_the_last_message(tmp_path):
    talk = [USER, {"role": "assistant", "content": "42"}, {"role": "user", "content": "sure?"}]
    found = one(tmp_path, {**ROW, "prompt": talk}, instruction="In a box.")
    assert found.prompt == (*talk[:2], {"role": "user", "content": "sure?\n\nIn a box."})


@pytest.mark.parametrize("rows_per_group", [1, 7, 5000])
def test_all_row_groups_are_read(tmp_path, rows_per_group):
    rows = [{"prompt": f"{i}?", "ground_truth": str(i)} for i in range(3000)]
    write_parquet(tmp_path / "a.parquet", rows, row_group_size=rows_per_group)
    found = load_problems(tmp_path / "a.parquet")
    assert [problem.ground_truth for problem in found] == [str(i) for i in range(3000)]
    assert [problem.id for problem in found] == [f"a-{i}" for i in range(3000)]


def test_reading_stops_at_the_limit(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{**ROW, "id": i} for i in range(5)])
    with path.open("a") as file:
        file.write("not JSON\n")
    assert [problem.id for problem in load_problems(path, limit=5)] == ["0", "1", "2", "3", "4"]
    with pytest.raises(DataError, match="line 6: is not JSON"):
        load_problems(path, limit=6)
    with pytest.raises(DataError, match="line 6: is not JSON"):
        load_problems(path, limit=1, shuffle_seed=0)  # of all rows


# ------------------------------------------------------------------------------------------------------------- orders


def test_shuffle_is_the_same_everywhere(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{**ROW, "id": i} for i in range(10)])
    assert [int(problem.id) for problem in load_problems(path, shuffle_seed=0)] == GOLDEN_ORDER
    other = [int(problem.id) for problem in load_problems(path, shuffle_seed=1)]
    assert sorted(other) == list(range(10))
    assert other not in (GOLDEN_ORDER, list(range(10)))


def test_limit_comes_after_the_shuffle_and_does_not_change_it(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{**ROW, "id": i} for i in range(50)])
    whole = load_problems(path, shuffle_seed=3)
    assert load_problems(path, shuffle_seed=3, limit=7) == whole[:7]
    # Half the rows, the other way round: those that are left keep their order.
    write_lines(path, [{**ROW, "id": i} for i in range(48, -1, -2)])
    assert load_problems(path, shuffle_seed=3) == [problem for problem in whole if int(problem.id) % 2 == 0]


# By digests of seed and id: nothing of it depends on a version of Python or NumPy.
GOLDEN_ORDER = [1, 4, 7, 0, 6, 9, 2, 5, 3, 8]


# ---------------------------------------------------------------------------------------------------------- refusals

BAD_ROWS = {
    "no object": ([1], "", "got [1], allowed is an object"),
    "null": (None, "", "got null"),
    "prompt null": ({**ROW, "prompt": None}, "prompt", "got null"),
    "prompt number": ({**ROW, "prompt": 3}, "prompt", "got 3"),
    "prompt NaN": ({**ROW, "prompt": math.nan}, "prompt", "got nan"),
    "prompt blank": ({**ROW, "prompt": " \n"}, "prompt", "text that is not blank"),
    "prompt empty": ({**ROW, "prompt": []}, "prompt", "got []"),
    "prompt of one message": ({**ROW, "prompt": USER}, "prompt", "list of messages"),
    "prompt of texts": ({**ROW, "prompt": ["6 * 7?"]}, "prompt", "message 0 is '6 * 7?'"),
    "message without content": ({**ROW, "prompt": [{"role": "user"}]}, "prompt", "message 0"),
    "content null": ({**ROW, "prompt": [{"role": "user", "content": None}]}, "prompt", "content of message 0 is null"),
    "content image": (
        {**ROW, "prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        "prompt",
        "content of message 0",
    ),
    "role unknown": ({**ROW, "prompt": [{"role": "human", "content": "?"}]}, "prompt", "system, user, assistant"),
    "role a list": ({**ROW, "prompt": [{"role": ["user"], "content": "?"}]}, "prompt", "role of message 0"),
    "role tool": ({**ROW, "prompt": [USER, {"role": "tool", "content": "?"}]}, "prompt", "role of message 1 is 'tool'"),
    "system later": ({**ROW, "prompt": [USER, {"role": "system", "content": "x"}, USER]}, "prompt", "message 1"),
    "assistant last": ({**ROW, "prompt": [USER, {"role": "assistant", "content": "x"}]}, "prompt", "last message"),
    "system alone": ({**ROW, "prompt": [{"role": "system", "content": "x"}]}, "prompt", "last message"),
    "more in a message": ({**ROW, "prompt": [{**USER, "tool_calls": [1]}]}, "prompt", "tool_calls"),
    "half a character": ({**ROW, "prompt": "a\ud800"}, "prompt", "half of a character, at 1"),
    "no prompt": ({"answer": 1, "prmpt": "?"}, "prompt", "did you mean 'prmpt'?"),
    "two prompts": ({"question": "?", "problem": "?", "answer": 1}, "prompt", "'question' and 'problem' may both"),
    "no truth": ({"prompt": "?"}, "ground_truth", "nor any of 'reward_model.ground_truth', 'answer', 'solution'"),
    "truth null": ({"prompt": "?", "ground_truth": None}, "ground_truth", "got null"),
    "answer null": ({"prompt": "?", "answer": None}, "answer", "got null"),
    "verl's null": ({**ROW, "reward_model": {"ground_truth": None}}, "reward_model.ground_truth", "got null"),
    "verl's blank": ({**ROW, "reward_model": {"ground_truth": " "}}, "reward_model.ground_truth", "not blank"),
    "truth NaN": ({**ROW, "reward_model": {"ground_truth": math.nan}}, "reward_model.ground_truth", "finite"),
    "truth infinite": ({"prompt": "?", "ground_truth": math.inf}, "ground_truth", "finite"),
    "truth bool": ({"prompt": "?", "ground_truth": True}, "ground_truth", "got True"),
    "truth object": ({"prompt": "?", "answer": {"a": 1}}, "answer", "text or a number"),
    "truths": ({"prompt": "?", "answer": ["1", "2"]}, "answer", "allowed is one answer"),
    "truths none": ({"prompt": "?", "answer": []}, "answer", "allowed is one answer"),
    "truth nested": ({"prompt": "?", "answer": [["1"]]}, "answer", "text or a number"),
    "reward_model text": ({**ROW, "reward_model": "{'a': 1}"}, "reward_model", "is not JSON"),
    "id null": ({**ROW, "id": None}, "id", "got null"),
    "id blank": ({**ROW, "id": " "}, "id", "not blank"),
    "id float": ({**ROW, "id": 1.5}, "id", "text or a whole number"),
    "id bool": ({**ROW, "id": True}, "id", "text or a whole number"),
    "source number": ({**ROW, "data_source": 3}, "data_source", "allowed is text"),
    "ability list": ({**ROW, "ability": ["math"]}, "ability", "allowed is text"),
    "extra_info list": ({**ROW, "extra_info": [1]}, "extra_info", "allowed is an object"),
    "extra_info text": ({**ROW, "extra_info": "nothing"}, "extra_info", "is not JSON"),
    "extra_info twice": ({**ROW, "extra_info": '{"a": 1, "a": 2}'}, "extra_info", "the key 'a' twice"),
    "extra deep": ({**ROW, "x": functools.reduce(lambda inner, _: [inner], range(70), 1)}, "x", "nested more than 64"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_named(tmp_path, case):
    row, column, text = BAD_ROWS[case]
    error = refused(tmp_path, row)
    assert (error.unit, error.row, error.column) == ("line", 1, column)
    assert text in error.problem
    assert str(error).startswith(f"{tmp_path / 'bad.jsonl'}: line 1")
    assert len(str(error)) < len(str(tmp_path)) + 400


BAD_LINES = {
    "cut": (b'{"prompt": "?", "answer"', "is not JSON"),
    "words": (b"hello", "is not JSON"),
    "latin": '{"prompt": "größer", "answer": 1}'.encode("latin-1"),
    "utf16": json.dumps(ROW).encode("utf-16"),
    "utf32": json.dumps(ROW).encode("utf-32"),
    "binary": bytes(range(1, 256)) * 20,
    "pickle": pickle.dumps(ROW),
    "nul": b"\0" * 100,
    "two values": (b'{"a": 1} {"b": 2}', "Extra data"),
    "key twice": (b'{"prompt": "?", "answer": 1, "answer": 2}', "'answer' twice"),
    "inner key twice": (b'{"prompt": "?", "answer": 1, "x": [{"a": 1, "a": 1}]}', "'a' twice"),
    "deep": (b"[" * 10**6, "nested too deep"),
    "deep objects": (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "nested too deep"),
    "digits": (b'{"prompt": "?", "answer": ' + b"9" * 10**4 + b"}", "cannot be read as JSON"),
    "mark inside": (b'{"prompt": \xef\xbb\xbf"?"}', "is not JSON"),
    "single quotes": (b"{'prompt': '?', 'answer': 1}", "is not JSON"),
}


@pytest.mark.parametrize("name", ["bad.jsonl", "bad.json"])
@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_named(tmp_path, case, name):
    content, text = BAD_LINES[case] if isinstance(BAD_LINES[case], tuple) else (BAD_LINES[case], "is not UTF-8")
    if case == "nul":
        text = "is not JSON"
    (tmp_path / name).write_bytes(json.dumps(ROW).encode() + b"\n" + content + b"\n")
    with pytest.raises(DataError) as caught:
        load_problems(tmp_path / name)
    assert text in caught.value.problem or case in ("utf16", "utf32", "binary", "pickle")
    assert caught.value.row == 2
    assert str(caught.value).isprintable()
    if name == "bad.json":
        (tmp_path / name).write_bytes(b"[" + content + b"\n]")
        with pytest.raises(DataError, match=re.escape(name)):
            load_problems(tmp_path / name)


def test_first_of_the_bad_rows_is_named_and_the_others_counted(tmp_path):
    rows = [{**ROW, "id": i, "ability": 1 if i in bad else ""} for i in range(9) for bad in [{2, 4, 5, 6, 8}]]
    path = write_parquet(tmp_path / "a.parquet", [{**row, "ability": str(row["ability"])} for row in rows])
    assert len(load_problems(path)) == 9
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"line 3, column 'ability': .* \(also bad: lines 5, 6, 7 and 1 more\)"):
        load_problems(path)
    with pytest.raises(DataError, match=r"\(also bad: line 2\)"):
        load_problems(write_lines(tmp_path / "two.jsonl", [{}, {}]))


def test_bad_rows_left_out_are_counted(tmp_path, caplog):
    path = write_lines(tmp_path / "a.jsonl", [{**ROW, "id": 1}, {}, {**ROW, "id": 2}, {**ROW, "id": 1}])
    with caplog.at_level(logging.WARNING, logger="ctpo.train.data"):
        found = load_problems(path, on_bad_row="skip")
    assert [problem.id for problem in found] == ["1", "2"]
    assert re.search(r"left out 2 bad rows: .*a\.jsonl: line 2, .*\(also bad: line 4\)", caplog.text)
    caplog.clear()
    load_problems(path, on_bad_row="skip", limit=1)
    assert not caplog.records
    with pytest.raises(DataError, match=r"line 1, column 'prompt'"):
        load_problems(write_lines(path, [{}]), on_bad_row="skip")


def test_ids_come_once(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{**ROW, "id": 7}, ROW, {**ROW, "id": "7"}])
    with pytest.raises(DataError, match=r"line 3, column 'id': got '7', as in line 1, allowed is each id once"):
        load_problems(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 3, b"\x1f\x8b", b"\xef\xbb\xbf"], ids=repr)
def test_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(name)):
        load_problems(tmp_path / name)


def test_truncated_files(tmp_path):
    rows = [{"prompt": f"{i}?", "ground_truth": str(i)} for i in range(500)]
    whole = write_parquet(tmp_path / "a.parquet", rows).read_bytes()
    zipped = gzip.compress(write_lines(tmp_path / "a.jsonl", rows).read_bytes())
    for part in range(1, 20):
        (tmp_path / "a.parquet").write_bytes(whole[: len(whole) * part // 20])
        with pytest.raises(DataError, match=r"a\.parquet: cannot be read: "):
            load_problems(tmp_path / "a.parquet")
        (tmp_path / "a.jsonl.gz").write_bytes(zipped[: len(zipped) * part // 20])
        with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read: "):
            load_problems(tmp_path / "a.jsonl.gz")


def test_no_rows(tmp_path):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(" [ ]")
    (tmp_path / "a.jsonl").write_text("\n \n")
    for name in ("a.parquet", "a.json", "a.jsonl"):
        with pytest.raises(DataError, match="has no rows"):
            load_problems(tmp_path / name)


def test_columns_of_parquet_that_are_refused(tmp_path):
    image = {**ROW, "image": b"\x89PNG"}
    write_parquet(tmp_path / "a.parquet", [image])
    with pytest.raises(DataError, match=r"row 0, column 'image': holds b'\\x89PNG', allowed is text"):
        load_problems(tmp_path / "a.parquet")
    assert load_problems(tmp_path / "a.parquet", drop=["image"]) == [VERL]
    table = pa.table([["?"], ["1"], ["2"]], names=["prompt", "ground_truth", "ground_truth"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the column 'ground_truth' twice"):
        load_problems(tmp_path / "a.parquet")


def test_value_that_python_cannot_hold_is_named_by_its_row(tmp_path):
    days = pa.array([0, 2**30, 1], pa.int32()).cast(pa.date32())  # the second lies beyond the year 9999
    table = pa.table({"prompt": ["?"] * 3, "ground_truth": ["1"] * 3, "day": days})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 1, column 'day': cannot be read as date32"):
        load_problems(tmp_path / "a.parquet")
    assert len(load_problems(tmp_path / "a.parquet", on_bad_row="skip")) == 2
    assert len(load_problems(tmp_path / "a.parquet", drop=["day"])) == 3


@pytest.mark.parametrize(
    "source",
    ["", "nothing.parquet", "hf:org/name", "x" * 5000, "a\0b", 3, None, b"a.jsonl", "nothing/", "reasoning-gymnasium"],
    ids=repr,
)
def test_source_that_is_none(source):
    with pytest.raises(DataError, match=r"allowed is a \.parquet|cannot be read"):
        load_problems(source)


def test_files_of_other_kinds(tmp_path):
    for name in ("a.pkl", "a.csv", "a.parquet.gz", "jsonl", "a"):
        (tmp_path / name).write_bytes(pickle.dumps(ROW))
        with pytest.raises(DataError, match="file of another kind"):
            load_problems(tmp_path / name)
    with pytest.raises(DataError, match="no splits"):
        load_problems(write_lines(tmp_path / "a.jsonl", [ROW]), split="train")


@pytest.mark.parametrize(
    "options",
    [
        {"limit": 0},
        {"limit": True},
        {"limit": 1.5},
        {"shuffle_seed": "0"},
        {"columns": {"prompts": "q"}},
        {"columns": {"prompt": ""}},
        {"columns": {"prompt": 3}},
        {"columns": "prompt=q"},
        {"columns": [("prompt", "q")]},
        {"drop": None},
        {"drop": "image"},
        {"drop": [3]},
        {"system_prompt": 3},
        {"instruction": "\ud800"},
        {"on_bad_row": "ignore"},
    ],
    ids=str,
)
def test_arguments(tmp_path, options):
    (name,) = options
    with pytest.raises(ValueError, match=name) as caught:
        load_problems(write_lines(tmp_path / "a.jsonl", [ROW]), **options)
    assert not isinstance(caught.value, DataError)


def test_column_named_but_not_there(tmp_path):
    error = refused(tmp_path, ROW, columns={"prompt": "pormpt"})
    assert error.column == "pormpt"
    assert "did you mean 'prompt'?" in error.problem


def test_error_survives_pickling():
    error = DataError("is bad", "a.jsonl", "line", 3, "prompt")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "a.jsonl: line 3, column 'prompt': is bad"
    assert (again.source, again.row, again.unit, again.column) == ("a.jsonl", 3, "line", "prompt")


# ------------------------------------------------------------------------------------------------- problems, round trip

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NOT_BLANK = TEXT.filter(str.strip)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.builds(
    lambda system, turns, last: [*system, *turns, {"role": "user", "content": last}],
    st.just([]) | st.builds(lambda text: [{"role": "system", "content": text}], TEXT),
    st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": NOT_BLANK}), max_size=2),
    NOT_BLANK,
)
PROBLEMS = st.lists(
    st.builds(
        Problem,
        id=NOT_BLANK,
        prompt=MESSAGES,
        ground_truth=NOT_BLANK,
        data_source=TEXT,
        ability=TEXT,
        extra_info=st.dictionaries(TEXT, JSON, max_size=3),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda problem: problem.id,
)


@given(PROBLEMS)
def test_round_trip_by_files(tmp_path_factory, problems):
    path = tmp_path_factory.mktemp("data")
    dataset = to_dataset(problems)
    assert dataset.column_names == ["id", "prompt", "ground_truth", "data_source", "ability", "extra_info"]
    pq.write_table(dataset.data.table, path / "a.parquet")
    assert load_problems(path / "a.parquet") == problems
    write_lines(path / "a.jsonl", dataset.to_list())
    assert load_problems(path / "a.jsonl") == problems
    write_list(path / "a.json", [problem.row() for problem in problems])
    assert load_problems(path / "a.json") == problems


@pytest.fixture
def quiet_datasets(tmp_path, monkeypatch):
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield datasets
    datasets.enable_progress_bars()


def test_round_trip_by_what_datasets_writes(tmp_path, quiet_datasets):
    problems = load_problems("arithmetic?difficulty=3&size=20")
    dataset = to_dataset(problems)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.to_json(tmp_path / "a.jsonl")
    dataset.save_to_disk(tmp_path / "saved", num_shards=3)
    for name in ("a.parquet", "a.jsonl", "saved"):
        assert load_problems(tmp_path / name) == problems
    assert to_dataset([]).num_rows == 0


MIXED = [
    {"prompt": "plain", "answer": 42, "meta": {"level": 1, "tags": ["a", 1]}},
    {"prompt": [USER], "answer": "\\pi", "meta": {"level": "hard", "tags": []}},
    {"prompt": 'so "quoted"', "answer": "7", "meta": {"level": None, "tags": [{"b": [2]}]}},
]


def write_mixed(path: Path, route: str, datasets) -> Path:
    (path / "d").mkdir()
    file = write_lines(path / "d" / "train.jsonl", MIXED)
    if route == "file":
        return file
    if route in ("directory", "hub"):
        return path / "d"
    dataset = datasets.load_dataset(str(path / "d"), split="train")
    assert {"prompt", "answer"} <= {name for name, feature in dataset.features.items() if feature == datasets.Json()}
    if route == "saved":
        dataset.save_to_disk(path / "saved")
        return path / "saved"
    if route == "saved splits":
        datasets.DatasetDict(train=dataset).save_to_disk(path / "saved")
        return path / "saved"
    dataset.to_parquet(path / "a.parquet")
    return path / "a.parquet"


@pytest.mark.parametrize("route", ["file", "directory", "hub", "saved", "saved splits", "parquet"])
def test_columns_of_several_types(tmp_path, quiet_datasets, monkeypatch, route):
    if not hasattr(quiet_datasets, "Json"):
        pytest.skip("datasets before 5 refuses such columns")
    path = write_mixed(tmp_path, route, quiet_datasets)
    monkeypatch.chdir(tmp_path)  # datasets looks here before it asks the Hub
    found = load_problems("hub:d" if route == "hub" else path)
    assert [problem.ground_truth for problem in found] == ["42", "\\pi", "7"]
    assert [problem.prompt[0]["content"] for problem in found] == ["plain", USER["content"], 'so "quoted"']
    tags = [problem.extra_info["meta"]["tags"] for problem in found]
    assert tags == [["a", 1], [], [{"b": [2]}]]
    assert [problem.extra_info["meta"]["level"] for problem in found] == [1, "hard", None]


def as_json(texts: list) -> pa.Array:
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))


@pytest.mark.skipif(not hasattr(pa, "json_"), reason="pyarrow before 19 has no such type")
def test_damaged_json_of_a_column_is_named_by_its_row(tmp_path):
    table = pa.table({"prompt": ["?"] * 4, "answer": as_json(["1", '{"a"', '{"a": 1, "a": 2}', '"x"'])})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 1, column 'answer': is not JSON: .* \(also bad: row 2\)"):
        load_problems(tmp_path / "a.parquet")
    found = load_problems(tmp_path / "a.parquet", on_bad_row="skip")
    assert [problem.ground_truth for problem in found] == ["1", "x"]


def test_type_that_pyarrow_does_not_know_is_told_by_the_field(tmp_path):
    fields = [
        pa.field("prompt", pa.string()),
        pa.field("answer", pa.string(), metadata={"ARROW:extension:name": "arrow.json"}),
    ]
    decoders = [_rows._decoder(field) for field in fields]
    assert decoders[0] is None
    assert decoders[1]('"x"') == "x"
    assert decoders[1](None) is None


def test_saved_data_set_with_splits(tmp_path, quiet_datasets):
    problems = load_problems("arithmetic?difficulty=2&size=5")
    splits = {"train": to_dataset(problems).select([4, 1, 2]), "test": to_dataset(problems[:1])}
    quiet_datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert load_problems(tmp_path / "saved", split="train") == [problems[4], problems[1], problems[2]]
    assert load_problems(str(tmp_path / "saved"), split="test") == problems[:1]
    with pytest.raises(DataError, match=r"split is None, allowed is one of 'train', 'test'"):
        load_problems(tmp_path / "saved")
    with pytest.raises(DataError, match=r"split is 'dev', allowed is one of 'train', 'test'"):
        load_problems(tmp_path / "saved", split="dev")
    with pytest.raises(DataError, match="one data set without splits"):
        load_problems(tmp_path / "saved" / "train", split="train")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", "{"),
        ("state.json", "[]"),
        ("state.json", '{"_data_files": 3}'),
        ("state.json", '{"_data_files": [{"filename": "../other.arrow"}]}'),
        ("state.json", '{"_data_files": [{"filename": "nothing.arrow"}]}'),
        ("state.json", '{"_data_files": ["data-00000-of-00001.arrow"]}'),
        ("data-00000-of-00001.arrow", ""),
        ("data-00000-of-00001.arrow", "no arrow"),
    ],
)
def test_damaged_data_set_is_named(tmp_path, quiet_datasets, file, content):
    to_dataset(load_problems("arithmetic?size=5")).save_to_disk(tmp_path / "saved")
    (tmp_path / "other.arrow").write_bytes((tmp_path / "saved" / "data-00000-of-00001.arrow").read_bytes())
    (tmp_path / "saved" / file).write_text(content)
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "saved"))):
        load_problems(tmp_path / "saved")


def test_problem_made_by_hand_is_checked_and_put_in_form():
    extra = {1: (np.int64(2), np.float32(0.5), {3}), "a": np.array([[1.5, np.nan]]), "b": None, "c": Fraction(1, 3)}
    problem = Problem("1", ({"content": "?", "role": "user"},), "1", extra_info=extra)
    assert problem.extra_info == {"1": [2, 0.5, [3]], "a": [[1.5, None]], "b": None, "c": "1/3"}
    assert json.loads(json.dumps(problem.row())) == problem.row()
    assert problem.row()["prompt"] == [{"role": "user", "content": "?"}]
    for wrong in (
        {"id": ""},
        {"id": 1},
        {"prompt": "?"},
        {"ground_truth": 1},
        {"ground_truth": ""},
        {"extra_info": []},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Problem(**{"id": "1", "prompt": [USER], "ground_truth": "1", **wrong})
    with pytest.raises(ValueError, match="'1' twice"):
        Problem("1", [USER], "1", extra_info={1: 0, "1": 1})
    loop: dict = {}
    loop["again"] = loop
    with pytest.raises(ValueError, match="nested more than"):
        Problem("1", [USER], "1", extra_info=loop)


# --------------------------------------------------------------------------------------------------------------- fuzz


def is_valid(path: Path, **options) -> bool:
    """Whether a source gives problems; nothing but a `DataError` of one line may come instead."""
    try:
        found = load_problems(path, **options)
    except DataError as error:
        text = str(error)
    else:
        assert all(Problem(**problem.row()) == problem for problem in found)
        json.dumps([problem.row() for problem in found], allow_nan=False)
        return True
    assert "\n" not in text
    assert str(path) in text
    return False


@functools.cache
def whole_file(kind: str) -> bytes:
    rows = [{**ROW, "id": str(i), "prompt": [{**USER, "content": f"{i} * 7?"}] * (1 + i % 2)} for i in range(20)]
    if kind == "parquet":
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=8, write_page_checksum=False, compression="none")
        return out.getvalue()
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return gzip.compress(text, mtime=0) if kind == "jsonl.gz" else text


CHANGES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["set", "flip", "cut", "add"]), st.binary(max_size=9)),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "jsonl.gz"])
@given(changes=CHANGES)
@settings(max_examples=150)
def test_damaged_bytes(tmp_path_factory, kind, changes):
    content = bytearray(whole_file(kind))
    for place, change, some in changes:
        at = int(place * len(content))
        if change == "set":
            content[at : at + len(some)] = some
        elif change == "flip":
            content[at] ^= some[0] if some else 0x80
        elif change == "cut":
            del content[at : at + len(some)]
        else:
            content[at:at] = some
    path = tmp_path_factory.mktemp("fuzz") / f"a.{kind}"
    path.write_bytes(content)
    is_valid(path, on_bad_row="skip" if changes[0][0] < 0.5 else "error")


@given(changes=CHANGES)
@settings(max_examples=100)
def test_damaged_bytes_of_a_saved_data_set(tmp_path_factory, changes):
    path = tmp_path_factory.mktemp("fuzz")
    (path / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    table = pq.read_table(io.BytesIO(whole_file("parquet")))
    with pa.OSFile(str(path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    content = bytearray((path / "a.arrow").read_bytes())
    for place, _, some in changes:
        at = int(place * len(content))
        content[at : at + len(some)] = some
    (path / "a.arrow").write_bytes(content)
    is_valid(path)


@given(st.binary(max_size=200), st.sampled_from(["parquet", "jsonl", "json", "jsonl.gz", "json.gz"]))
def test_any_bytes(tmp_path_factory, content, kind):
    path = tmp_path_factory.mktemp("fuzz") / f"a.{kind}"
    path.write_bytes(content)
    assert not is_valid(path)


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just(" ")
    | st.just(ROW["prompt"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([*ROW, "question", "answer", "solution", "ground_truth"]), ANY, st.booleans())
@settings(max_examples=300)
def test_any_value_in_any_column(tmp_path_factory, column, value, as_text):
    path = tmp_path_factory.mktemp("fuzz")
    value = json.dumps(value) if as_text else value
    is_valid(write_lines(path / "a.jsonl", [{**ROW, column: value}]))
    try:
        write_parquet(path / "a.parquet", [{**ROW, column: value}])
    except (pa.ArrowException, OverflowError, UnicodeError):
        return  # not to be written
    is_valid(path / "a.parquet")


@given(ANY)
def test_any_row(tmp_path_factory, row):
    path = tmp_path_factory.mktemp("fuzz")
    is_valid(write_lines(path / "a.jsonl", [row]))
    is_valid(write_list(path / "a.json", row if isinstance(row, list) else [row]))


def test_fuzz_would_see_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("ctpo.train._rows.parse_json", json.loads)
    (tmp_path / "a.jsonl").write_bytes(b"{")
    with pytest.raises(DataError, match="cannot be read"):  # the file's net below the row's
        load_problems(tmp_path / "a.jsonl")
    monkeypatch.setattr("ctpo.train._rows.parse_json", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        is_valid(tmp_path / "a.jsonl")


# ---------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def clone(tmp_path, quiet_datasets):
    """What a clone of a data set of the Hub holds: files, and configurations in its README."""
    for config, splits in {"main": ("train", "test"), "socratic": ("train",)}.items():
        (tmp_path / "org" / "name" / config).mkdir(parents=True)
        for split in splits:
            rows = [{"question": f"{config} {split}?", "answer": "thus\n#### 1,234"}]
            write_parquet(tmp_path / "org" / "name" / config / f"{split}.parquet", rows)
    head = "configs:\n- config_name: main\n  data_files:\n  - {split: train, path: main/train.parquet}\n"
    head += "  - {split: test, path: main/test.parquet}\n"
    head += "- config_name: socratic\n  data_files:\n  - {split: train, path: socratic/train.parquet}\n"
    (tmp_path / "org" / "name" / "README.md").write_text(f"---\n{head}---\n")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "split", "question"),
    [
        ("hub:org/name@test?config=main", None, "main test?"),
        ("hub:org/name@test?config=main", "test", "main test?"),
        ("hub:org/name?config=main", "train", "main train?"),
        ("hub:org/name?config=socratic", None, "socratic train?"),
        ("hub:org/name?config=socratic&revision=main", None, "socratic train?"),
    ],
)
def test_hub(clone, monkeypatch, source, split, question):
    monkeypatch.chdir(clone)  # datasets looks here before it asks the Hub
    (found,) = load_problems(source, split=split)
    info = {"answer": "thus\n#### 1,234"}
    named = (split or source.partition("@")[2].partition("?")[0]) or "train"
    assert found == Problem(
        f"org/name-{named}-0", [{"role": "user", "content": question}], "1234", "org/name", "", info
    )


def test_what_the_hub_is_asked_for(monkeypatch, quiet_datasets):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return quiet_datasets.DatasetDict(train=to_dataset([VERL]))

    monkeypatch.setattr(quiet_datasets, "load_dataset", load_dataset)
    assert load_problems("hub:org/name@train?config=main&revision=abc") == [VERL]
    assert asked == [("org/name", {"name": "main", "revision": "abc"})]


def test_hub_splits_and_configurations(clone, monkeypatch):
    monkeypatch.chdir(clone)
    with pytest.raises(DataError, match=r"split is None, allowed is one of 'train', 'test'"):
        load_problems("hub:org/name?config=main")
    with pytest.raises(DataError, match=r"cannot be loaded: .*socratic"):
        load_problems("hub:org/name")
    with pytest.raises(DataError, match="names the split 'test', but split is 'train'"):
        load_problems("hub:org/name@test?config=main", split="train")
    with pytest.raises(DataError, match=r"got 'name', allowed are config, revision"):
        load_problems("hub:org/name?name=main")
    for bad in ("hub:", "hub:/tmp/x", "hub:a/b/c", "hub:a@", "hub:../a", "hub:a b"):
        with pytest.raises(DataError, match=r"allowed is hub:org/name|cannot be loaded"):
            load_problems(bad)


def test_directory_of_files_as_on_the_hub(clone):
    directory = clone / "org" / "name" / "main"
    assert load_problems(directory, split="test")[0].prompt[0]["content"] == "main test?"
    (directory / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        load_problems(directory, split="test")
    assert "\n" not in str(caught.value)


def test_ids_of_splits_differ(clone, quiet_datasets):
    directory = clone / "org" / "name" / "main"
    for split in ("train", "test"):
        (found,) = load_problems(directory, split=split)
        assert (found.id, found.data_source) == (f"main-{split}-0", "main")
    parts = {split: quiet_datasets.load_dataset(str(directory), split=split) for split in ("train", "test")}
    quiet_datasets.DatasetDict(parts).save_to_disk(clone / "saved")
    for split in ("train", "test"):
        (found,) = load_problems(clone / "saved", split=split)
        assert (found.id, found.data_source) == (f"saved-{split}-0", "saved")
    (found,) = load_problems(clone / "saved" / "test")  # holds no splits
    assert found.id == "test-0"


def refused_unasked(path: Path, monkeypatch) -> str:
    """The error of a directory that `datasets` is not asked to load."""
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("was asked"))
    with pytest.raises(DataError) as caught:
        load_problems(path)
    assert str(caught.value).startswith(str(path))
    assert ".parquet, .jsonl" in str(caught.value)
    return caught.value.problem


@pytest.mark.parametrize("file", [None, "a.txt", "a.py", "a.pkl", ".git/a.jsonl", "a/b/c/a.jsonl"])
def test_directory_without_data_is_not_searched(tmp_path, monkeypatch, file):
    if file:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    assert "holds no data files" in refused_unasked(tmp_path, monkeypatch)


def test_directory_of_too_much_is_not_searched(tmp_path, monkeypatch):
    write_lines(tmp_path / "a.jsonl", [ROW])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "cycle").symlink_to(tmp_path)
    for name in "cd":
        (tmp_path / "b" / name).write_text("")
    monkeypatch.setattr(_rows, "_ENTRIES", 4)
    assert "holds more than 4 files and directories" in refused_unasked(tmp_path, monkeypatch)
    (tmp_path / "b" / "cycle").unlink()
    _rows._check_holds_data(tmp_path, "it")


@pytest.mark.parametrize(
    "name", ["a.jsonl", "data/train.jsonl", "data/main/train.jsonl", "train.json", "data/test.JSONL.gz"]
)
def test_usual_places_of_data_are_searched(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
    _rows._check_holds_data(tmp_path, "it")


def test_hub_without_network(tmp_path):
    program = (
        "from ctpo.train.data import DataError, load_problems\n"
        "try: load_problems('hub:some-org/some-name')\n"
        "except DataError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert re.fullmatch(r"hub:some-org/some-name: cannot be loaded: .*some-org/some-name.*\n", done.stdout)


def test_loading_scripts_are_not_run(tmp_path, quiet_datasets):
    (tmp_path / "name").mkdir()
    (tmp_path / "name" / "name.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    write_lines(tmp_path / "name" / "train.jsonl", [ROW])
    with contextlib.suppress(DataError):
        load_problems(tmp_path / "name")
    assert not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------------------------------- arithmetic


def value_of(expression: str) -> Fraction:
    """By Python's own rules, in rational numbers."""
    assert re.fullmatch(r"\d+( [-+*] \d+)+", expression)
    return eval(re.sub(r"(\d+)", r"Fraction(\1)", expression), {"Fraction": Fraction})


@pytest.mark.parametrize("difficulty", range(1, 11))
def test_arithmetic(difficulty):
    found = load_problems(f"arithmetic?difficulty={difficulty}&size=60&seed=4")
    operators = collections.Counter()
    for problem in found:
        expression = problem.extra_info["expression"]
        assert problem.prompt == ({"role": "user", "content": f"What is {expression}?\n\n{BOXED}"},)
        assert Fraction(problem.ground_truth) == value_of(expression)
        assert re.fullmatch(r"0|-?[1-9]\d*", problem.ground_truth)
        operands = re.findall(r"\d+", expression)
        assert len(operands) == 2 + (difficulty - 1) // 2
        assert {len(operand) for operand in operands} == {1 + difficulty // 2}
        assert all(operand[0] != "0" for operand in operands)
        operators.update(re.findall(r" ([-+*]) ", expression))
        assert problem.extra_info == {"difficulty": difficulty, "expression": expression, "split": "train"}
        assert (problem.data_source, problem.ability) == ("arithmetic", "math")
    assert len({problem.extra_info["expression"] for problem in found}) == 60
    # One chance in a million that an operator with probability 1/3 falls outside.
    total = operators.total()
    assert all(abs(operators[o] - total / 3) < 4.9 * math.sqrt(total * 2 / 9) for o in "+-*")


def test_wrong_precedence_would_be_seen():
    found = load_problems("arithmetic?difficulty=4&size=60")

    def from_the_left(expression):
        first, *rest = expression.split()
        return functools.reduce(
            lambda value, pair: eval(f"{value} {pair[0]} {pair[1]}"), zip(rest[::2], rest[1::2], strict=True), first
        )

    wrong = [
        problem for problem in found if from_the_left(problem.extra_info["expression"]) != int(problem.ground_truth)
    ]
    assert len(wrong) > 5


def test_operands_are_spread_over_their_range():
    """All of one digit, and both ends of two; the sum of many within five standard errors."""
    found = load_problems("arithmetic?difficulty=1&size=192")
    assert set("".join(problem.extra_info["expression"] for problem in found)) >= set("123456789")
    found = load_problems("arithmetic?difficulty=2&size=2000&seed=1")
    operands = [int(operand) for problem in found for operand in re.findall(r"\d+", problem.extra_info["expression"])]
    assert (min(operands), max(operands)) == (10, 99)
    assert abs(np.mean(operands) - 54.5) < 5 * math.sqrt((90**2 - 1) / 12 / len(operands))


def most(difficulty: int, split: str) -> int:
    with pytest.raises(DataError, match=r"size is '99999', allowed is a whole number from 1 to \d+") as caught:
        load_problems(f"arithmetic?difficulty={difficulty}&size=99999", split=split)
    return int(re.findall(r"to (\d+)", str(caught.value))[0])


def test_all_problems_of_one_digit():
    """Every pair of operands with every operator is in one split, in both orders."""
    found = {}
    for split in ("train", "test"):
        problems = load_problems(f"arithmetic?size={most(1, split)}&split={split}")
        found[split] = {problem.extra_info["expression"] for problem in problems}
        assert len(found[split]) == len(problems)
    assert found["train"] | found["test"] == {f"{a} {o} {b}" for a in range(1, 10) for b in range(1, 10) for o in "+-*"}
    assert not found["train"] & found["test"]
    sets = {split: {frozenset(re.findall(r"\d+", e)) for e in expressions} for split, expressions in found.items()}
    assert not sets["train"] & sets["test"]


def test_a_fifth_is_held_out():
    assert most(2, "train") + most(2, "test") == 90 * 90 * 3
    assert 0.18 < most(2, "test") / (90 * 90 * 3) < 0.22
    assert len(
        {problem.id for problem in load_problems(f"arithmetic?difficulty=2&size={most(2, 'test')}&split=test")}
    ) == most(2, "test")


@given(st.integers(1, 10), st.integers(0, 10**9), st.integers(0, 10**9))
def test_splits_share_no_operands(difficulty, seed, other_seed):
    def operands(split, seed):
        found = load_problems(f"arithmetic?difficulty={difficulty}&size=15&seed={seed}", split=split)
        assert all(problem.extra_info["split"] == split for problem in found)
        return {tuple(sorted(re.findall(r"\d+", problem.extra_info["expression"]))) for problem in found}

    assert not operands("train", seed) & operands("test", other_seed)


def test_arithmetic_is_the_same_everywhere():
    found = load_problems("arithmetic?difficulty=3&size=4&seed=7")
    assert [problem.extra_info["expression"] for problem in found] == GOLDEN_ARITHMETIC
    assert load_problems("arithmetic?difficulty=3&size=2&seed=7") == found[:2]
    others = load_problems("arithmetic?difficulty=3&size=4&seed=8")
    assert not {problem.id for problem in others} & {problem.id for problem in found}


GOLDEN_ARITHMETIC = ["68 * 76 - 11", "40 + 62 + 19", "90 - 29 * 58", "34 + 25 + 88"]


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("difficulty=0", "difficulty is '0', allowed is a whole number from 1 to 10"),
        ("difficulty=11", "difficulty is '11'"),
        ("difficulty=2.0", "difficulty is '2.0'"),
        ("size=-1", "size is '-1'"),
        ("difficulty=3&size=1000001", "from 1 to 1000000"),
        ("seed=x", "seed is 'x', allowed is a whole number from 0 on"),
        ("split=dev", "split is 'dev', allowed are 'train' and 'test'"),
        ("difficult=1", "got 'difficult', allowed are difficulty, seed, size, split; did you mean 'difficulty'"),
        ("size", "got 'size' after '?'"),
        ("size=1&size=2", "has size twice"),
        ("size=1&", "got ''"),
    ],
)
def test_arithmetic_refuses(query, text):
    with pytest.raises(DataError, match=re.escape(text)):
        load_problems(f"arithmetic?{query}")


# ------------------------------------------------------------------------------------------------------ reasoning-gym

# Of the first two, what comes depends on the hashes of text; of the others on the configuration, or on tables.
TASKS = (
    "word_ladder",
    "knight_swap",
    "basic_arithmetic?operators=+,-",
    "fraction_simplification?styles=plain",
    "advanced_geometry",
    "mini_sudoku",
)


def gym_score(problem: Problem, answer: str | None = None) -> float:
    """By the task's own scorer, of a problem as it comes out of a file."""
    import reasoning_gym

    info = json.loads(json.dumps(problem.extra_info))
    entry = {"answer": problem.ground_truth, "metadata": info["metadata"]}
    scorer = reasoning_gym.get_score_answer_fn(info["source_dataset"])
    return scorer(problem.ground_truth if answer is None else answer, entry)


@pytest.mark.parametrize("task", TASKS)
def test_reasoning_gym(task):
    found = load_problems(f"reasoning-gym:{task}{'&' if '?' in task else '?'}size=4&seed=11")
    name = task.partition("?")[0]
    assert len(found) == 4
    for index, problem in enumerate(found):
        assert problem.id == f"{name}-11-{index}"
        assert problem.data_source == f"reasoning-gym:{name}"
        assert problem.prompt[0]["content"].endswith(f"\n\n{BOXED}")
        assert problem.extra_info["source_dataset"] == name
        assert problem.extra_info["source_index"] == index
        assert problem.extra_info["configuration"]["seed"] == 11
        assert gym_score(problem) == 1.0
        assert gym_score(problem, "nothing like it") < 0.5


def test_reasoning_gym_is_what_it_makes_itself():
    import reasoning_gym

    made = reasoning_gym.create_dataset("chain_sum", size=3, seed=5, min_terms=3, max_terms=3, allow_negation=True)
    source = "reasoning-gym:chain_sum?size=3&seed=5&min_terms=3&max_terms=3&allow_negation=true"
    found = load_problems(source, instruction="")
    assert [problem.prompt[0]["content"] for problem in found] == [entry["question"] for entry in made]
    assert [problem.ground_truth for problem in found] == [entry["answer"] for entry in made]
    assert load_problems(source, limit=2, instruction="") == found[:2]
    assert found[0].extra_info["configuration"] == {
        "size": 3, "seed": 5, "min_terms": 3, "max_terms": 3, "allow_negation": True,
    }  # fmt: skip


def test_reasoning_gym_does_not_depend_on_the_hashes_of_the_process():
    source = "reasoning-gym:word_ladder?size=3"
    program = f"from ctpo.train.data import load_problems as l; print([p.ground_truth for p in l({source!r})])"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([problem.ground_truth for problem in load_problems(source)])


def test_task_that_many_answers_solve(tmp_path):
    found = load_problems("reasoning-gym:rubiks_cube?size=2")
    assert [problem.ground_truth for problem in found] == ["", ""]
    pq.write_table(to_dataset(found).data.table, tmp_path / "a.parquet")
    assert load_problems(tmp_path / "a.parquet") == found
    assert "judged by the task's scorer" in show(found)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("chain_sums", "there is no task 'chain_sums'; did you mean 'chain_sum' or"),
        ("", "there is no task ''; allowed are ab, acre"),
        ("chain_sum?max_term=3", "configuration of chain_sum: got 'max_term', allowed are allow_negation"),
        ("chain_sum?max_terms=three", "max_terms is 'three', allowed is int"),
        ("chain_sum?allow_negation=maybe", "allow_negation is 'maybe', allowed is bool"),
        ("chain_sum?max_terms=1", "max_terms must be >= min_terms"),
        ("chain_sum?size=0", "size must be positive"),
        ("chain_sum?seed=none", "seed is 'none', allowed is a whole number"),
        ("composite", "configuration of composite: Must specify at least one dataset"),
        ("rearc?board_format_opts=x", "board_format_opts is 'x', allowed is BoardFormattingOptions"),
    ],
)
def test_reasoning_gym_refuses(source, text, monkeypatch):
    """Without the process, which takes a second; the next test has it."""

    def rows(task, options, name):
        try:
            yield from enumerate(_made_problems._gym_entries(task, options))
        except ValueError as error:
            raise DataError(str(error), name) from error

    monkeypatch.setattr(_made_problems, "_gym_rows", rows)
    with pytest.raises(DataError) as caught:
        load_problems(f"reasoning-gym:{source}")
    assert str(caught.value).startswith(f"reasoning-gym:{source}: ")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_come_from_the_process_of_reasoning_gym(monkeypatch):
    text = (
        r"^reasoning-gym:chain_sums: there is no task 'chain_sums'; did you mean 'chain_sum' or 'decimal_chain_sum'\?$"
    )
    with pytest.raises(DataError, match=text):
        load_problems("reasoning-gym:chain_sums")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="ended with status 1"):
        load_problems("reasoning-gym:chain_sum")


def test_reasoning_gym_has_no_splits():
    with pytest.raises(DataError, match="take another seed"):
        load_problems("reasoning-gym:chain_sum", split="test")


def test_types_of_configurations():
    from typing import Literal, Optional

    assert parsed("3", int) == 3
    assert parsed("3", Optional[int]) == 3  # noqa: UP045
    assert parsed("none", int | None) is None
    assert parsed("0.5", float) == 0.5
    assert [parsed(text, bool) for text in ("True", "0")] == [True, False]
    assert parsed("simple", Literal["simple", "natural"]) == "simple"
    assert parsed("a,b", list[str]) == ["a", "b"]
    assert parsed("1,2", tuple[int, ...]) == (1, 2)
    assert parsed("[1, 2]", list[float]) == [1, 2]
    assert parsed("[[0, 1]]", list[tuple[float, float]]) == [[0, 1]]
    assert parsed("+,-", tuple) == ("+", "-")
    assert parsed("2024-02-29", datetime.date) == datetime.date(2024, 2, 29)
    for text, kind in (("x", int), ("b", Literal["a"]), ("1", dict), ("2024-02-30", datetime.date)):
        with pytest.raises((ValueError, KeyError)):
            parsed(text, kind)


# ---------------------------------------------------------------------------------------------------- length and show


def tool(code: str) -> str:
    """Run code.

    Args:
        code: What to run.
    """
    return code


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def of_lengths(lengths):
    return [Problem(str(i), [{"role": "user", "content": "x" * length}], "1") for i, length in enumerate(lengths)]


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8), extra=st.integers(0, 60))
def test_length_filter(tokenizer, lengths, extra):
    """A token a byte and one for each special token, so that lengths are known without the template."""
    empty = len("\0user\n\0\n\0assistant\n")  # of <|im_start|>user ... <|im_end|> <|im_start|>assistant
    problems = of_lengths(lengths)
    expected = [problem for problem, length in zip(problems, lengths, strict=True) if length <= extra]
    if not expected:
        with pytest.raises(DataError, match=f"the shortest has {min(lengths) + empty}"):
            filter_by_length(problems, tokenizer, empty + extra)
        return
    assert filter_by_length(problems, tokenizer, empty + extra) == expected


def test_length_filter_says_what_it_dropped(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="ctpo.train.data"):
        filter_by_length(of_lengths([1, 2, 3]), tokenizer, 100)
        assert not caplog.records
        filter_by_length(of_lengths([1, 500, 300]), tokenizer, 100)
    assert "left out 2 of 3 problems: prompts of more than 100 tokens, the longest has 519" in caplog.text


def test_length_filter_counts_tools_and_variables_of_the_template(tokenizer):
    problems = of_lengths([5])
    assert filter_by_length(problems, tokenizer, 30) == problems
    with pytest.raises(DataError):
        filter_by_length(problems, tokenizer, 30, tools=[tool])
    with pytest.raises(DataError):
        filter_by_length(problems, tokenizer, 30, chat_template_kwargs={"chat_template": "x" * 31})
    assert filter_by_length([], tokenizer, 30) == []
    for bad in (0, 1.5, True, None):
        with pytest.raises(ValueError, match="max_prompt_tokens"):
            filter_by_length(problems, tokenizer, bad)


SHOWN = """\
2 problems: made/up (1), arithmetic (1)
tokens of a prompt: 25 to 33, median 25

1 of 2 ------------------------------------- a
      source | made/up, math
   25 tokens | <|im_start|>user
             | 6 * 7?<|im_end|>
             | <|im_start|>assistant
             |
ground truth | 42
  extra_info | {"index": 3, "split": "train",
             | "reward_model": {"style":
             | "rule"}}"""


def test_show_with_a_template(tokenizer):
    assert show([VERL, *load_problems("arithmetic?size=1", instruction="")], 1, tokenizer, width=46) == SHOWN


@given(PROBLEMS, st.integers(40, 120))
def test_show_keeps_to_its_width_and_shows_everything(problems, width):
    text = show(problems, rows=2, width=width)
    assert all(line.isprintable() for line in text.split("\n"))
    assert max(sum(not unicodedata.combining(c) for c in line) for line in text.split("\n")) <= width
    assert text.count(" | ") >= 2 * min(2, len(problems))


def test_show_escapes_what_a_terminal_would_obey():
    text = show([Problem("\x1b[2J", [{"role": "user", "content": "\x1b[31mred\u202e\r\t"}], "\x07", "a\nb")])
    assert r"\x1b[31mred\u202e\r\t" in text
    assert r"\x1b[2J" in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_show_counts_wide_characters_as_two():
    text = show([Problem("1", [{"role": "user", "content": "数" * 60}], "1")], width=55)
    assert [line.count("数") for line in text.split("\n") if "数" in line] == [20, 20, 20]


def test_show_cuts_what_is_long():
    lines = show([Problem("1", [{"role": "user", "content": "a\n" * 500 + "b"}], "1")]).split("\n")
    assert len(lines) < 60
    assert any("[462 more lines]" in line for line in lines)
    lines = show([Problem("1", [{"role": "user", "content": "ab" * 10**5}], "1")], width=55).split("\n")
    assert any("[4961 more lines]" in line for line in lines)
    text = show([Problem("1", [USER], "1", extra_info={"text": "ab" * 500})], width=55)
    _, _, shown = text.partition("extra_info | ")
    assert shown.count("\n") == 3
    assert shown.endswith("\n             | [24 more lines]")
    with pytest.raises(ValueError, match="problems is empty"):
        show([])
    with pytest.raises(ValueError, match="width"):
        show([VERL], width=10)


def test_show_source(tmp_path, tokenizer, caplog):
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"q": "x" * length, "a": length} for length in (5, 6, 90)] + [{"q": "?"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    options = {"columns": {"prompt": "q", "ground_truth": "a"}, "on_bad_row": "skip", "model": str(tmp_path / "model")}
    text = show_source(str(path), rows=2, max_prompt_tokens=40, system_prompt="S", **options)
    assert text.startswith("2 problems: a\ntokens of a prompt: ")
    assert "<|im_start|>system\n             | S<|im_end|>" in text
    assert f"\n\nLeft out 1 bad row: {path}: line 4, column 'a': there is no such column" in text
    assert re.search(r"\n\nLeft out 1 of 3 problems: prompts of more than 40 tokens, the longest has \d+$", text)
    assert not caplog.records  # it is in the text
    with pytest.raises(ValueError, match="max_prompt_tokens needs a model"):
        show_source(str(path), max_prompt_tokens=40)


@pytest.mark.parametrize("kind", ["nowhere", "empty", "adapter"])
def test_show_source_takes_a_model_as_evaluation_does(tmp_path, tokenizer, kind):
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    settings = {"base_model_name_or_path": str(tmp_path / "model")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    if kind == "adapter":
        assert "<|im_start|>user" in show_source("arithmetic?size=2", model=str(tmp_path / kind))
        return
    with pytest.raises(ValueError, match=f"^model '.*{kind}': (no such file|the directory has neither)") as caught:
        show_source("arithmetic?size=2", model=str(tmp_path / kind))
    assert "\n" not in str(caught.value)


def test_show_source_takes_a_gguf_file(tmp_path, tokenizer, monkeypatch):
    from ctpo.train import generation

    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options))
        return tokenizer

    monkeypatch.setattr(generation, "find_spec", lambda name: name)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    assert "<|im_start|>user" in show_source("arithmetic?size=2", model=str(tmp_path / "small.gguf"))
    assert asked == [(str(tmp_path), {"gguf_file": "small.gguf"})]


def test_importing_the_module_imports_nothing_heavy():
    program = (
        "import sys, ctpo.train.data as data; data.load_problems('arithmetic?size=2')\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'reasoning_gym', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
