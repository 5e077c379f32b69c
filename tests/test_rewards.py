"""Rewards: verdicts, hostile answers, failing functions, and the workers that outlive them."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
import trl_harness
from hypothesis import given
from hypothesis import strategies as st

from ctpo.train import _reward_worker
from ctpo.train.rewards import (
    ANSWER_LIMIT,
    RESPONSE_LIMIT,
    Rewards,
    extract_answer,
    extract_boxed,
    final_text,
    without_thoughts,
)

# Generous: the machine may be busy. Tests of the limit itself set their own.
PATIENT = 60.0
ROW = {"ground_truth": "1"}


def boxed(answer):
    return rf"So it is $\boxed{{{answer}}}$."


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """Writes a module that can be imported here, and gives its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    count = iter(range(100))

    def write(code):
        name = f"functions_{os.getpid()}_{tmp_path.name}_{next(count)}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code), encoding="utf-8")
        return name

    return write


# --- extraction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{3}", "3"),
        (r"\boxed {3}", "3"),
        (r"\boxed{3} then \boxed{4}", "4"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"{ { \boxed{3} but \boxed{4", "3"),
        (r"} } \boxed{3} }", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{3", None),
        (r"\boxed 3", None),
        (r"\\boxed{3}", None),  # a line break, then a word
        ("3", None),
        ("", None),
    ],
)
def test_extract_boxed(text, expected):
    assert extract_boxed(text) == expected


balanced = st.recursive(
    st.text(st.characters(exclude_characters="{}\\"), max_size=5),
    lambda inner: st.lists(st.one_of(inner, inner.map(lambda text: f"{{{text}}}")), max_size=3).map("".join),
    max_leaves=8,
)


@given(balanced, st.text(st.characters(exclude_characters="\\")), st.text(st.characters(exclude_characters="\\{}")))
def test_a_box_is_found_again(content, before, after):
    assert extract_boxed(rf"{before}\boxed{{{content}}}{after}") == content.strip()


def boxes_by_counting(text):
    """Contents of complete boxes by the place of their command; the oracle for `extract_boxed`."""
    found = {}
    for start in range(len(text)):
        if not text.startswith(r"\boxed{", start) or escapes_before(text, start) % 2:
            continue
        depth, place = 1, start + len(r"\boxed{")
        while place < len(text) and depth:
            if text[place] == "\\":
                place += 1
            elif text[place] in "{}":
                depth += 1 if text[place] == "{" else -1
            place += 1
        if not depth:
            found[start] = text[start + len(r"\boxed{") : place - 1]
    return found


def escapes_before(text, place):
    return place - len(text[:place].rstrip("\\"))


@given(st.lists(st.sampled_from([r"\boxed{", "{", "}", "\\", "a", r"\{", r"\frac{"]), max_size=14).map("".join))
def test_extract_boxed_agrees_with_counting_braces(text):
    found = boxes_by_counting(text)
    assert extract_boxed(text) == (found[max(found)].strip() if found else None)


@given(st.text(st.sampled_from("\\boxed{}<>/answer \ud800\0$,and"), max_size=60))
def test_extraction_never_raises(text):
    for extract in (extract_boxed, extract_answer):
        found = extract(text)
        assert found is None or found in text or ", " in found


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        (r"\boxed{1}, \boxed{2}, or \boxed{3}.", "1, 2, 3"),
        (r"\boxed{1} is wrong, \boxed{2}", "2"),
        (r"\boxed{1} <answer> 2 </answer>", "2"),
        (r"<answer>1</answer> <answer>2</answer> 3", "2"),
        (r"<answer>it is \boxed{7}</answer>", "7"),
        (r"\boxed{70}. (final answer in \boxed{} as asked)", "70"),
        (r"\boxed{70}, \boxed{...}", "70"),
        (r"\boxed{70} in $\boxed{\ldots}$", "70"),
        ("<answer>70</answer> as in <answer>...</answer>", "70"),
        ("<answer>70</answer><answer> </answer>", "70"),
        (r"<answer>70</answer><answer>\boxed{}</answer>", "70"),
        (r"<answer>\boxed{70} in \boxed{ }</answer>", "70"),
        (r"\boxed{70} <answer></answer>", "70"),
        (r"\boxed{}", None),
        ("<answer>...</answer>", None),
        (r"\boxed{\{\}}", r"\{\}"),
        (r"\boxed{.5}", ".5"),
        ("$\\boxed{70}$\n\n$\\boxed{70}$", "70"),
        (r"\boxed{1}, \boxed{2}, \boxed{1}", "1, 2, 1"),
        (r"<answer>7", None),
        ("</answer> <answer>7", None),
        ("seven", None),
    ],
)
def test_extract_answer(response, expected):
    assert extract_answer(response) == expected


def test_extraction_takes_time_in_proportion_to_the_length():
    started = time.perf_counter()
    for part in (
        r"\boxed{",
        r"\boxed ",
        "{",
        "}",
        "\\",
        "<answer>",
        "</answer>",
        r"\boxed{1}, ",
        r"\boxed{}",
        "<answer></answer>",
    ):
        text = part * (2_000_000 // len(part))
        extract_boxed(text)
        extract_answer(text)
    # Anything quadratic takes hours.
    assert time.perf_counter() - started < PATIENT


def test_answers_are_looked_for_at_the_end():
    assert extract_answer(r"\boxed{1}" + " " * RESPONSE_LIMIT) is None
    assert extract_answer(" " * RESPONSE_LIMIT + r"\boxed{1}") == "1"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("plain", "plain"),
        ([], ""),
        ([{"role": "assistant", "content": "a"}], "a"),
        ([{"role": "assistant", "content": "a"}, {"role": "tool", "content": r"\boxed{1}"}], ""),
        (
            [
                {"role": "assistant", "content": "a", "tool_calls": [{}]},
                {"role": "tool", "content": "1"},
                {"role": "assistant", "content": None, "tool_calls": [{}]},
                {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
            ],
            "\nb",
        ),
    ],
)
def test_final_text(completion, expected):
    assert final_text(completion) == expected


NOT_COMPLETIONS = [
    None,
    5,
    {"role": "assistant", "content": "1"},
    [None],
    ["x"],
    [{"role": "assistant", "content": 5}],
    [{"role": "assistant", "content": ["x"]}],
    [{"role": "assistant", "content": [{"type": "text", "text": 5}]}],
    [{"role": "assistant", "content": {"text": "x"}}],
]


@pytest.mark.parametrize("completion", NOT_COMPLETIONS)
def test_final_text_of_what_is_none(completion):
    with pytest.raises(ValueError, match="completion"):
        final_text(completion)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("plain", "plain"),
        ("", ""),
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),  # the template has opened it
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>a", ""),
        ("a<think>b", ""),
        ("<think>a</think>b<think>c", ""),
        ("<think>a<think>b</think>c", "c"),
        ("<think>a</think>", ""),
    ],
)
def test_without_thoughts(response, expected):
    assert without_thoughts(response) == expected


def test_thoughts_are_not_answers(functions):
    module = functions("def whole(response): return len(response)")
    responses = [
        r"<think>Maybe \boxed{70}? wait",
        r"<think>\boxed{70}</think>I do not know.",
        "<think>The answer is 70.",
        "<think><answer>70</answer></think> no",
        r"<think>\boxed{71}</think> \boxed{70}",
        "<think>It is 71.</think>The answer is 70.",
    ]
    names = ["math", "format", "reasoning-gym", f"{module}:whole"]
    rows = [gym_row("chain_sum") | {"ground_truth": "70"}] * len(responses)
    with Rewards(dict.fromkeys(names, 1.0), timeout=PATIENT, workers=1) as rewards:
        scores = rewards.score(responses, rows)
    assert [score.parts["math"] for score in scores] == [0, 0, 0, 0, 1, 1]
    assert [score.parts["format"] for score in scores] == [0, 0, 0, 0, 1, 0]
    assert [score.parts["reasoning-gym"] == 1 for score in scores] == [False, False, False, False, True, False]
    assert [score.answer for score in scores] == [None, None, None, None, "70", "70"]
    assert [score.parts[names[3]] for score in scores] == list(map(len, responses))


# --- verdicts of "math" -----------------------------------------------------------------------------------------------

RIGHT = [
    ("70", "70"),
    ("70", "070"),
    ("70", "70.0"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac12", r"50\%"),
    ("50", "50%"),
    ("$3$", "3"),
    (r"\boxed{3}", "3"),
    ("1, 2", "2, 1"),
    (r"\{1,2\}", "1,2"),
    ("(1,2]", "(1,2]"),
    (r"(-\infty,3]\cup[5,\infty)", r"[5,\infty)\cup(-\infty,3]"),
    ("(1,2,3)", "(1, 2, 3)"),
    ("x=3", "3"),
    ("3", "x = 3"),
    ("y=2x+1", "2x-y+1=0"),
    ("x>3", "3<x"),
    ("x^2-1", "(x-1)(x+1)"),
    (r"\sqrt{2}/2", r"\frac{1}{\sqrt 2}"),
    (r"5\pi + 6\sqrt{3}", r"6\sqrt3+5\pi"),
    ("1/3", "0.333333"),
    ("1234", "1,234"),
    ("1000", r"1\,000"),
    ("81920", "81{,}920"),
    ("1000", "1e3"),
    ("1e-3", "0.001"),
    (r"90^\circ", "90"),
    ("5", r"5\text{ cm}"),
    (r"\$5", "5"),
    ("Monday", r"\text{Monday}"),
    ("B", r"\text{(B)}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    ("2+3i", "3i+2"),
    (r"1\frac12", "1.5"),
    (r"\binom{5}{2}", "10"),
    (r"1\pm\sqrt2", r"1+\sqrt2,1-\sqrt2"),
    ("2^{100}", "1267650600228229401496703205376"),
    ("ABC", "abc"),
    (r"\text{ABC}", r"\text{(abc)}"),
    ("true", "True"),
    (r"\mathrm{no}", "NO"),
    ("No solution", r"\text{no  solution}"),
    (r"$\boxed{\text{B}}$", "(B)"),
    ("xy", "x y"),
    ("xy", r"y \cdot x"),
    (r"\text{A, C}", "C, A"),
    ("A, B, C", "A, B and C"),
    ("A, B, C", "B, A, or C"),
    ("70", "70."),
    ("70", "70,"),
    ("70", r"70\\"),
    ("70", r"70 .\\ "),
    ("70", r"$70$;"),
    ("70.", "70"),
    ("1.5", r"1.5\,"),
    ("0.5", ".5"),
    ("0.5", "0.5."),
    ("120", "5!"),
    ("120", "5!."),
    ("1,2", "1,2,"),
    (r"\left\{ 3 \right.", "3"),
    ("Monday", r"\text{Monday}."),
    ("Monday", r"\text{Monday.}"),
    (["3", "4"], "4"),
    (70, "70"),
]
WRONG = [
    ("70", "71"),
    ("70", "69.9999"),
    ("70", "7 0"),
    ("34", "3 4"),
    ("70", ""),
    ("70", r"70 \text{ or } 71"),
    ("70", "70, 71"),
    ("1,2", "1"),
    ("1,2", "1,2,3"),
    ("(1,2)", "(2,1)"),
    ("(1,2]", "(1,2)"),
    ("x=3", "x=4"),
    ("x=3", "y=3"),
    ("1/3", "0.333"),
    ("20", "20,000"),
    ("987654321987654321", "987654321987654320"),
    (r"90^\circ", r"\frac{\pi}{2}"),
    ("Monday", "Tuesday"),
    ("B", "C"),
    ("x", "2"),
    ("ABC", "BCA"),
    ("ABC", r"\text{BCA}"),
    ("listen", "silent"),
    ("no", "on"),
    ("and", "or"),
    ("70", "7.0."),
    ("1,2", "1,2,..."),
    ("0.333", "0.333..."),
    ("1", "߄"),
    (["3", "4"], "5"),
]
# Verdicts of math-verify 0.9 that are wrong: docs/rewards.md lists them.
WRONGLY_RIGHT = [("70", "71=70"), ("12_7", "12"), ("12:30", "2:5"), ("70", "[70]"), ("3", "1 2")]
WRONGLY_WRONG = [(r"0.\overline{3}", "1/3"), ("9", "12_7"), ("70", "70=x"), ("xy", "yx")]
WITHOUT_A_BOX = [
    ("70", "The answer is 70.", 1),
    ("70", "I tried 70. The answer is $71$", 0),
    ("1,2", r"$\boxed{2}$ and $\boxed{1}$", 1),
    ("70", r"\boxed{70}, no: \boxed{71}", 0),
    ("70", r"\boxed{71} <answer>70</answer>", 1),
    ("70", r"\boxed{70", 0),
    ("70", r"The answer is 70, put in \boxed{}.", 1),
    ("70", r"The answer is $70$. <answer>...</answer>", 1),
    ("70", "", 0),
    ("on", "It is $no$", 0),
    ("no", "The answer is $No$.", 1),
    ("1", "߄", 0),
]


@pytest.fixture(scope="module")
def math_rewards():
    with Rewards("math", timeout=PATIENT, workers=2) as rewards:
        yield rewards


def test_verdicts(math_rewards):
    cases = [
        *((truth, boxed(answer), 1) for truth, answer in RIGHT + WRONGLY_RIGHT),
        *((truth, boxed(answer), 0) for truth, answer in WRONG + WRONGLY_WRONG),
        *WITHOUT_A_BOX,
    ]
    scores = math_rewards.score([case[1] for case in cases], [{"ground_truth": case[0]} for case in cases])
    unexpected = [(case, score) for case, score in zip(cases, scores, strict=True) if score.parts["math"] != case[2]]
    assert unexpected == []
    assert [score.failures for score in scores if score.failures] == []
    assert all(score.correct == (score.total == 1) for score in scores)


@pytest.mark.parametrize(
    "answers",
    [
        ("1/2", "0.5", r"\frac{2}{4}", r"\sin(\frac{\pi}{6})", "x = 0.50"),
        ("1, 2", r"\{2, 1\}", r"\{1, \frac{4}{2}\}"),
        (r"\frac{1}{\sqrt 2}", r"\frac{\sqrt 2}{2}", "2^{-1/2}"),
        ("x^2-1", "(x-1)(x+1)", "(x+1)(x-1)"),
        ("[0, 1)", "[0, 1.0)"),
        (r"\text{Monday}", "Monday", "monday", "Monday."),
        ("70", "{70}", "70, 70", r"\{70\}", "70, 70.0", "71=70", r"\frac{140}{2} = 70", "x = y = 70", "70.", r"70\\"),
        ("Yes", r"\text{YES}", "yes", r"\textbf{Yes}"),
        ("no solution", r"\text{No solution}", r"\text{No  Solution.}"),
        ("A, C", r"\text{C, A}", r"\text{A} and \text{C}"),
        # No simplification of sympy's makes a fraction of that.
        (r"\frac{2}{101}", r"\frac{\sqrt{3+2\sqrt{2}}-\sqrt{2}+1}{101}"),
        ("a^2", r"\int_0^a 2x\,dx", r"\sum_{n=1}^{2} \frac{a^2}{2}"),
        (r"\text{(B)}", "B"),
        ("(1, 2, 3)", "(1,2,3)"),
    ],
)
def test_equal_answers_have_one_key(math_rewards, answers):
    keys = {score.answer for score in math_rewards.score(list(map(boxed, answers)), [ROW] * len(answers))}
    assert len(keys) == 1
    assert None not in keys


def test_different_answers_have_different_keys(math_rewards):
    answers = ["1/2", "1/3", "0.333333", r"\sqrt 2", "1.41421356", "987654321987654321", "987654321987654320"]
    answers += ["(1,2)", "[1,2]", "(1,2]", "1,2", "x", "x+1", "x=2", r"\text{Monday}", r"\infty", "50", r"50\%+1"]
    answers += ["71=70", "71=x", "listen", "silent", "no", "on", "no solution", "2/101", "2/103", "1/10001"]
    keys = [score.answer for score in math_rewards.score(list(map(boxed, answers)), [ROW] * len(answers))]
    assert len(set(keys)) == len(answers)


def test_boxes_that_say_the_same_have_its_key(math_rewards):
    scores = math_rewards.score(["$\\boxed{70}$\n\n$\\boxed{70}$", r"\boxed{70} and \boxed{70.0}"], [ROW] * 2)
    assert [score.answer for score in scores] == ["70", "70"]


def test_a_key_that_takes_long_costs_neither_the_value_nor_the_time():
    answer = r"\sum_{n=1}^{1000000000} \frac{\sin(n^2)}{n}"
    with Rewards("math", timeout=4 * PATIENT, workers=1) as rewards:
        rewards.score([boxed("1")], [ROW])
        started = time.monotonic()
        late, fine = rewards.score([boxed(answer), boxed("1")], [{"ground_truth": answer}, ROW])
        assert time.monotonic() - started < PATIENT
    assert (late.correct, late.failures, late.answer) == (True, {}, answer)
    assert (fine.correct, fine.answer) == (True, "1")


def test_no_answer_has_no_key(math_rewards):
    assert [score.answer for score in math_rewards.score(["I do not know.", ""], [ROW] * 2)] == [None, None]


@pytest.mark.parametrize("truth", [None, "", "  ", [], [None]])
def test_a_row_without_truth_is_a_failure_of_its_own(math_rewards, truth):
    scores = math_rewards.score([boxed("1")] * 2, [{"ground_truth": truth}, ROW])
    assert scores[0].failures == {"math": "the row has no ground_truth"}
    assert (scores[0].total, scores[0].correct) == (0, False)
    assert scores[1].correct


@given(st.fractions(), st.fractions())
def test_fractions_are_equal_as_fractions_are(math_rewards, first, second):
    def latex(value):
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"

    rows = [{"ground_truth": latex(first)}] * 2
    same, other = math_rewards.score([boxed(latex(first * Fraction(2, 2))), boxed(latex(second))], rows)
    assert same.correct
    assert other.correct == (first == second)
    assert (same.answer == other.answer) == (first == second)


# --- hostile answers --------------------------------------------------------------------------------------------------

HOSTILE = {
    "tower": boxed("9^{9^{9^{9}}}"),
    "plain tower": "The answer is 10^10^10^10",
    "stars": boxed("10**10**10"),
    "factorials": boxed("((((9!)!)!)!)"),
    "fractions": boxed(r"\frac{" * 10_000 + "1" + "}{2}" * 10_000),
    "roots": boxed(r"\sqrt{" * 390 + "2" + "}" * 390),
    "parentheses": boxed("(" * 1900 + "1" + ")" * 1900),
    "power": boxed("(x+1)^{100000}"),
    "integral": boxed(r"\int_0^1 \frac{\sin(x^x)}{\ln(x+\cos(x))} dx"),
    "matrix": boxed(r"\operatorname{zeros}(100000,100000)"),
    "long": boxed("1" * 10_000_000),
    "long prose": "a " * 5_000_000,
    "open braces": "{" * 10_000_000,
    "open boxes": r"\boxed{" * 1_000_000,
    "dollars": "$" * ANSWER_LIMIT,
    "brackets": r"\[" * (ANSWER_LIMIT // 2),
    "digits": "answer: " + "123 456 " * 400 + "x",
    "nothing": "\0" * 100,
    "surrogate": boxed("\ud800"),
    "code": boxed('__import__("os").system("touch escaped")'),
}
FAILS = {"tower": "timeout", "plain tower": "timeout", "factorials": "timeout", "matrix": "MemoryError"}


def test_hostile_answers_are_worth_nothing_and_harm_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Rewards("math", timeout=2.0, workers=2) as rewards:
        rewards.score([boxed("1")] * 2, [ROW] * 2)
        started = time.monotonic()
        responses = [text for hostile in HOSTILE.values() for text in (hostile, boxed("3"))]
        scores = rewards.score(responses, [{"ground_truth": "3"}] * len(responses))
        elapsed = time.monotonic() - started
    found = dict(zip(HOSTILE, scores[::2], strict=True))
    assert {name: score.total for name, score in found.items() if score.total} == {}
    assert {name: found[name].failures["math"][:11] for name in FAILS} == FAILS
    assert "at most 4000" in found["fractions"].failures["math"]
    # On a busy machine an honest answer may come late too; it has to be recorded as such, and be rare.
    honest = scores[1::2]
    assert sum(score.correct for score in honest) >= len(honest) - 2
    assert elapsed < len(HOSTILE) * 4
    assert list(tmp_path.iterdir()) == []


def test_memory_of_a_worker_is_limited(functions):
    module = functions("def f(response): return len(bytearray(1 << 33)) if response == 'big' else 1")
    with Rewards(f"{module}:f", memory=1 << 28, timeout=PATIENT) as rewards:
        scores = rewards.score(["big", "small"], [{}] * 2)
    assert scores[0].failures == {f"{module}:f": "MemoryError"}
    assert scores[1].total == 1


def test_a_worker_that_has_used_up_its_memory_is_replaced(functions):
    code = "import os\nkept = []\ndef f(response):\n    kept.append(bytearray(1 << 26))\n    return os.getpid()"
    module = functions(code)
    with Rewards(f"{module}:f", memory=1 << 28, timeout=PATIENT, workers=1) as rewards:
        scores = rewards.score([""] * 12, [{}] * 12)
    assert [score.failures for score in scores if score.failures] == []
    assert len({score.total for score in scores}) > 2


def test_a_regular_expression_that_explodes_is_ended():
    with Rewards({"format": 1}, format_pattern=r"^(a+)+$", timeout=1.0) as rewards:
        rewards.score(["a"], [{}])
        exploding, fine = rewards.score(["a" * 64 + "!", "aaa"], [{}] * 2)
    assert exploding.failures == {"format": "timeout"}
    assert exploding.total == 0
    assert fine.total == 1


# --- format -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "value"),
    [
        (r"\boxed{1}", 1),
        (r"\boxed{1} \boxed{1}", 0),
        (r"\boxed{\boxed{1}}", 0),
        (r"\boxed{ }", 0),
        (r"\boxed{1", 0),
        ("1", 0),
        ("", 0),
    ],
)
def test_format_is_one_box(response, value):
    with Rewards("format") as rewards:
        assert rewards.score([response], [{}])[0].parts == {"format": value}


def test_format_by_a_pattern_of_the_user():
    with Rewards("format:2", format_pattern=r"(?s)\A<think>.*</think>", timeout=PATIENT) as rewards:
        scores = rewards.score(["<think>\n</think> 1", "no <think></think>"], [{}] * 2)
    assert [score.total for score in scores] == [2, 0]


# --- reasoning-gym ----------------------------------------------------------------------------------------------------

# Tasks whose scorers evaluate the answer as Python, and what their answers look like.
EVALUATING = {
    "binary_matrix": "[[0, 1], [1, 0]]",
    "countdown": "(1 + 2) * 3",
    "intermediate_integration": "x**2/2 + C",
    "n_queens": "[['Q', '_'], ['_', 'Q']]",
    "polynomial_multiplication": "x**2 + 2*x",
    "puzzle24": "(1 + 2) * 8",
    "simple_integration": "x**2/2 + C",
    "spiral_matrix": "[1, 2, 3]",
    "string_insertion": "['A', 'B']",
}
ATTACKS = [
    "__import__('os').system('touch escaped')",
    "open('escaped', 'w')",
    "exec(chr(111)+chr(112))",
    "().__class__.__base__.__subclasses__()",
    "(lambda: open('escaped', 'w'))()",
    'S(\'open("escaped", "w")\')',
    "lambdify(x, x)",
    "x.__class__",
]


def gym_row(task, index=0, **configuration):
    import reasoning_gym

    entry = reasoning_gym.create_dataset(task, size=index + 1, seed=1, **configuration)[index]
    details = {"source_dataset": task, "metadata": json.loads(json.dumps(entry["metadata"], default=str))}
    if configuration:
        details["configuration"] = {key: json.dumps(value) for key, value in configuration.items()}
    return {"ground_truth": entry["answer"], "extra_info": json.dumps(details)}


@pytest.fixture(scope="module")
def gym_rewards():
    with Rewards("reasoning-gym", timeout=PATIENT, workers=1) as rewards:
        yield rewards


def test_gym_scores_as_its_tasks_do(gym_rewards):
    tasks = ["chain_sum", "rearc", "word_sorting", "decimal_arithmetic", "countdown", "n_queens", "course_schedule"]
    rows = [gym_row(task) for task in tasks]
    scores = gym_rewards.score([f"<answer>{row['ground_truth']}</answer>" for row in rows], rows)
    assert {task: score.total for task, score in zip(tasks, scores, strict=True)} == dict.fromkeys(tasks, 1.0)
    assert all(score.correct and not score.failures for score in scores)


def test_gym_takes_a_box_or_the_last_line(gym_rewards):
    row = gym_row("chain_sum")
    answer = row["ground_truth"]
    responses = [boxed(answer), f"First 1.\nThen\n{answer}\n\n", f"{answer}\nor so"]
    scores = gym_rewards.score(responses, [row] * 3)
    assert [score.total for score in scores] == [1, 1, 0]
    assert scores[0].answer == answer


def test_gym_scores_with_the_configuration_of_the_task(gym_rewards):
    from reasoning_gym import create_dataset

    configuration = {"min_terms": 2, "max_terms": 2, "max_num_decimal_places": 9}
    row = gym_row("decimal_arithmetic", **configuration)
    answer = f"{float(row['ground_truth']) + 1e-8:.9f}"
    entry = {"answer": row["ground_truth"], "metadata": json.loads(row["extra_info"])["metadata"]}
    expected = create_dataset("decimal_arithmetic", **configuration).score_answer(answer, entry)
    assert gym_rewards.score([boxed(answer)], [row])[0].total == expected


def test_answers_to_gym_are_not_run_as_code(gym_rewards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Rewards("reasoning-gym", timeout=PATIENT, workers=2) as rewards:  # a worker in this directory
        for task in EVALUATING:
            row = gym_row(task)
            scores = rewards.score([f"<answer>{attack}</answer>" for attack in ATTACKS], [row] * len(ATTACKS))
            assert [score.total for score in scores if score.total > 0.1] == [], task
    assert list(tmp_path.iterdir()) == []


def test_scorers_of_gym_that_evaluate_are_known():
    """A new one wants a look at what the worker gives it instead of `eval`."""
    import inspect

    from reasoning_gym.factory import DATASETS

    found = set()
    for name, (dataset, _) in DATASETS.items():
        source = inspect.getsource(dataset.score_answer)
        if any(word in source for word in ("eval(", "parse_expr(", "sympify(", "exec(", "pickle")):
            found.add(name)
    assert found - {"number_sorting"} == set(EVALUATING)  # that one evaluates the ground truth


@pytest.mark.parametrize("answer", EVALUATING.values())
def test_what_replaces_evaluation_reads_the_answers_it_is_for(answer):
    import sympy

    if answer.startswith("["):
        assert _reward_worker.arithmetic(answer) == eval(answer)
        return
    with _reward_worker.expressions_only("nothing"):
        symbols = {"x": sympy.Symbol("x")}
        assert sympy.parse_expr(answer, symbols) == eval(answer, {**symbols, "C": sympy.Symbol("C")})
        assert sympy.parse_expr("exp(2*x) + log(x, 2) - 1.5e3*sqrt(pi)", local_dict=symbols).free_symbols


@pytest.mark.parametrize("attack", [*ATTACKS, "'a'", "f(x).y", "x[0]", "N", "eval", "print", "a if b else c", "ｅval"])
def test_what_replaces_evaluation_refuses_code(attack):
    import sympy

    with _reward_worker.expressions_only("nothing"), pytest.raises(ValueError, match="mathematical expression"):
        sympy.parse_expr(attack)
    if attack != "'a'":
        with pytest.raises((ValueError, SyntaxError)):
            _reward_worker.arithmetic(attack)


@pytest.mark.parametrize("details", [None, {}, "{", {"metadata": {}}, {"metadata": {}, "source_dataset": "none"}])
def test_a_row_that_is_not_of_gym_is_a_failure(gym_rewards, details):
    score = gym_rewards.score(["1"], [{"ground_truth": "1", "extra_info": details}])[0]
    assert set(score.failures) == {"reasoning-gym"}
    assert score.total == 0


# --- functions of the user --------------------------------------------------------------------------------------------


def test_functions_get_what_they_name(functions):
    module = functions("""
        def ours(response, *, ground_truth, prompt, id=None, factor=3):
            return factor * (response == "a" and ground_truth == "1" and prompt[0]["content"] == "p" and id == "7")

        def everything(**given):
            return sorted(given) == ["data_source", "extra_info", "ground_truth", "id", "prompt", "response"]

        def compute_score(data_source, solution_str, ground_truth, extra_info=None, **further):
            assert not further
            right = solution_str == "a" and data_source == "s" and extra_info == {"k": [1, 2.5]}
            return {"score": right, "acc": right, "pred": "a"}

        class Judge:
            def __call__(self, response):
                return 0.25

        judge = Judge()
    """)
    row = {
        "id": "7",
        "ground_truth": "1",
        "data_source": "s",
        "prompt": [{"content": "p"}],
        "extra_info": {"k": [1, 2.5]},
    }
    names = [f"{module}:{name}" for name in ("ours", "everything", "compute_score", "judge")]
    with Rewards(dict.fromkeys(names, 1.0), timeout=PATIENT) as rewards:
        score = rewards.score(["a"], [row])[0]
        assert score.failures == {}
        assert list(score.parts.values()) == [3, 1, 1, 0.25]
        as_text = rewards.score(["a"], [{**row, "extra_info": json.dumps(row["extra_info"])}])[0]
        assert as_text == score


FAILING = """
    import ctypes, math, os, subprocess, sys, time

    class Rude(Exception):
        def __str__(self):
            raise RuntimeError

    def f(response):
        if response == "raise":
            raise ValueError("two\\nlines")
        if response == "rude":
            raise Rude
        if response == "leave":
            sys.exit(0)
        if response == "exit":
            os._exit(3)
        if response == "segfault":
            ctypes.string_at(0)
        if response == "kill":
            os.kill(os.getpid(), 9)
        if response == "hang":
            time.sleep(1000)
        if response == "busy":
            10 ** 10 ** 9
        if response == "recursion":
            return f(response)
        if response == "forge":
            for end in range(3, 1000):
                try:
                    os.write(end, b"\\0\\0\\0\\x02{}")
                except OSError:
                    pass
        if response == "children":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
            time.sleep(1000)
        if response == "print":
            print("x" * 100_000)
            os.write(1, b'{"task": 0, "value": 5}')
            return 1
        if response == "read":
            return len(sys.stdin.read()) + 1
        if response == "coroutine":
            async def g():
                return 1
            return g()
        values = {"nan": math.nan, "inf": math.inf, "none": None, "text": "1", "dict": {"reward": 1}, "list": [1],
                  "complex": 1j, "huge": 10**400, "true": True, "numpy": __import__("numpy").float32(0.5)}
        return values.get(response, 1)
"""
FAILURES = {
    "raise": "ValueError: two lines",
    "rude": "Rude: (its text cannot be made)",
    "leave": "SystemExit: 0",
    "exit": "crashed (exit status 3)",
    "segfault": "crashed (SIGSEGV)",
    "kill": "crashed (SIGKILL)",
    "hang": "timeout",
    "busy": "timeout",
    "recursion": "RecursionError: maximum recursion depth exceeded",
    "forge": "crashed (what it sent is no message)",
    "children": "timeout",
    "coroutine": "ValueError: a coroutine was returned, not a number",
    "nan": "ValueError: nan was returned",
    "inf": "ValueError: inf was returned",
    "none": "ValueError: None was returned, not a number",
    "text": "ValueError: text was returned, not a number",
    "dict": "ValueError: a dict without 'score' was returned: 'reward'",
    "list": "TypeError: float() argument must be a string or a real number, not 'list'",
    "complex": "TypeError: float() argument must be a string or a real number, not 'complex'",
    "huge": "OverflowError: int too large to convert to float",
}
VALUES = {"print": 1.0, "read": 1.0, "true": 1.0, "numpy": 0.5, "fine": 1.0}


def test_failing_functions_are_recorded_and_harm_no_other(functions, capfd):
    name = f"{functions(FAILING)}:f"
    kinds = [*FAILURES, *VALUES]
    responses = [text for kind in kinds for text in (kind, "fine")]
    with Rewards({name: 2.0, "format": 1.0}, timeout=3.0, workers=2) as rewards:
        scores = rewards.score(responses, [{}] * len(responses))
    found = {kind: score.failures.get(name, score.parts[name]) for kind, score in zip(kinds, scores[::2], strict=True)}
    assert found == FAILURES | VALUES
    assert [score.total for score in scores[1::2]] == [2.0] * len(kinds)
    assert {scores[2 * place].total for place in range(len(FAILURES))} == {0.0}
    assert capfd.readouterr().out == ""


def test_rows_that_cannot_be_sent_are_failures(functions):
    name = f"{functions('def f(response, extra_info): return extra_info[0]')}:f"
    import numpy as np

    rows = [{"extra_info": {"a": object()}}, {"extra_info": np.array([3])}, {"extra_info": "no JSON"}]
    with Rewards(name, timeout=PATIENT) as rewards:
        scores = rewards.score([""] * 3, rows)
    assert scores[0].failures == {name: "TypeError: a object cannot be sent to a reward"}
    assert scores[1].total == 3
    assert "extra_info is no JSON" in scores[2].failures[name]


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def test_bad_rows_are_failures_of_their_own(functions):
    class Rude:
        def __str__(self):
            raise RuntimeError("rude")

    name = f"{functions('def f(response, extra_info, ground_truth): return 1')}:f"
    deep = [nested(depth) for depth in (*range(900, 1000, 3), 100_000)]
    texts = ['{"a":' * depth + "1" + "}" * depth for depth in (*range(900, 1000, 3), 100_000)]
    no_rows = [None, 5, "row", [("ground_truth", "1")], {"ground_truth": Rude()}]
    rows = [row for bad in (*deep, *texts) for row in ({"ground_truth": "1", "extra_info": bad}, ROW)]
    rows += [row for bad in no_rows for row in (bad, ROW)]
    with Rewards(f"math,{name},reasoning-gym:0,format", timeout=5, workers=1) as rewards:
        scores = rewards.score([boxed("1")] * len(rows), rows)
    assert {score.total for score in scores[1::2]} == {3.0}
    assert all(name in score.failures for score in (scores[2 * len(deep) - 2], scores[2 * len(deep + texts) - 2]))
    for score in scores[-2 * len(no_rows) :: 2]:
        assert {"math", name, "reasoning-gym"} == set(score.failures)
        assert score.parts["format"] == 1
    assert scores[-2 * len(no_rows)].failures["math"] == "the row is a NoneType, not a mapping"


def test_order_is_kept_however_long_each_takes(functions):
    code = "import time\ndef f(response):\n    time.sleep(float(response) % 7 / 500)\n    return float(response)"
    with Rewards(f"{functions(code)}:f", timeout=PATIENT, workers=3) as rewards:
        scores = rewards.score([str(index) for index in range(200)], [{}] * 200)
    assert [score.total for score in scores] == list(range(200))


def test_several_workers_score_at_once(functions):
    code = "import os, time\ndef f(response):\n    time.sleep(0.05)\n    return os.getpid()"
    with Rewards(f"{functions(code)}:f", timeout=PATIENT, workers=3) as rewards:
        workers = {score.total for score in rewards.score([""] * 30, [{}] * 30)}
    assert len(workers) == 3


def test_threads_may_score(functions):
    code = "def f(response): return float(response)"
    found = {}
    with Rewards(f"{functions(code)}:f", timeout=PATIENT, workers=2) as rewards:

        def score(first):
            responses = [str(first + index) for index in range(50)]
            found[first] = [each.total for each in rewards.score(responses, [{}] * 50)]

        threads = [threading.Thread(target=score, args=(1000 * index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {first: list(range(first, first + 50)) for first in (0, 1000, 2000, 3000)}


def test_large_responses_pass_whole(functions):
    code = "def f(response, prompt): return len(response) + len(prompt)"
    with Rewards(f"{functions(code)}:f", timeout=PATIENT) as rewards:
        assert rewards.score(["\0" * 3_000_000], [{"prompt": "x" * 2_000_000}])[0].total == 5_000_000


def alive(process):
    """Whether a process runs, one that has ended and not been waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition):
    limit = time.monotonic() + PATIENT
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    assert condition()


def test_closed_rewards_leave_nothing_and_can_be_used_again(functions):
    module = functions("import os\ndef f(response): return os.getpid()")
    rewards = Rewards(f"{module}:f", timeout=PATIENT, workers=1)
    first = rewards.score([""], [{}])[0].total
    assert rewards.score([""], [{}])[0].total == first
    descriptors = len(os.listdir("/proc/self/fd"))
    rewards.close()
    rewards.close()
    assert not alive(int(first))
    assert len(os.listdir("/proc/self/fd")) == descriptors - 2
    second = rewards.score([""], [{}])[0].total
    assert second != first
    del rewards
    wait_until(lambda: not alive(int(second)))


SCRIPT = """
import os, sys, threading
from ctpo.train.rewards import Rewards

threading.Thread(target=threading.Event().wait, daemon=True).start()
rewards = Rewards({specification!r}, timeout={timeout}, workers=2)
print(os.getpid(), flush=True)
print([score.total for score in rewards.score({responses!r}, [{{"ground_truth": "1"}}] * {count})], flush=True)
"""


def script(tmp_path, specification, responses, timeout=PATIENT):
    path = tmp_path / "script.py"
    path.write_text(
        SCRIPT.format(specification=specification, timeout=timeout, responses=responses, count=len(responses)),
        encoding="utf-8",
    )
    return path


def test_scripts_need_no_main_guard(tmp_path):
    (tmp_path / "beside.py").write_text("def f(response): return 0.5\n", encoding="utf-8")
    path = script(tmp_path, "math:1,beside:f:1", [boxed("1"), "2"])
    found = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=4 * PATIENT, cwd="/")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[1:] == ["[1.5, 0.5]"]


def test_a_function_in_the_script_itself_is_refused_not_started_over_and_over(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(
        "from ctpo.train.rewards import Rewards\n"
        "def f(response): return 1\n"
        "print(Rewards('run:f').score([''], [{}])[0].total)\n",
        encoding="utf-8",
    )
    found = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=4 * PATIENT)
    assert "move that under `if __name__" in found.stderr
    assert "ValueError: reward 'run:f': 'run' cannot be imported" in found.stderr
    path.write_text(path.read_text().replace("print(", 'if __name__ == "__main__":\n    print('), encoding="utf-8")
    found = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=4 * PATIENT)
    assert found.stdout == "1.0\n", found.stderr


def children(process):
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ended_scripts_leave_no_workers(tmp_path, ending):
    code = "import time\ndef f(response): time.sleep(1000)\n"
    (tmp_path / "sleeping.py").write_text(code, encoding="utf-8")
    path = script(tmp_path, "sleeping:f", ["", "", ""], timeout=900)
    process = subprocess.Popen(
        [sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        assert int(process.stdout.readline()) == process.pid
        wait_until(lambda: len(children(process.pid)) == 2)
        workers = children(process.pid)
        assert all(map(alive, workers))
        os.killpg(process.pid, ending)  # as a terminal does
        process.communicate(timeout=PATIENT)
    finally:
        process.kill()
    wait_until(lambda: not any(map(alive, workers)))


class RawWorker:
    """A reward worker without `Rewards`: its process and the parent's ends of its two pipes."""

    def __init__(self, *program, **setup):
        inward, outward = os.pipe(), os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, *program, str(inward[0]), str(outward[1])],
            pass_fds=(inward[0], outward[1]),
            stderr=subprocess.PIPE,
        )
        for end in (inward[0], outward[1]):
            os.close(end)
        self.requests, self.replies = os.fdopen(inward[1], "wb", buffering=0), os.fdopen(outward[0], "rb")
        self.send({"path": sys.path, "pattern": None, "memory": None, "timeout": 1, **setup})
        assert json.loads(self.replies.read(int.from_bytes(self.replies.read(4), "big"))) == {"ready": True}

    def send(self, message, part=1.0):
        data = json.dumps(message).encode()
        data = len(data).to_bytes(4, "big") + data
        self.requests.write(data[: int(part * len(data))])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        self.requests.close()
        self.replies.close()


def test_a_worker_stuck_in_c_ends_itself_when_the_parent_is_gone(tmp_path):
    """No thread of it can run, so only the alarm is left."""
    # It says that it is there without letting go of the interpreter, so that the thread which notices the end of the
    # parent cannot run between that and the computation.
    code = """
        import ctypes, sys
        def f(response):
            sys.setswitchinterval(1e6)
            ctypes.PyDLL(None).write(2, b"taken", 5)
            return 10 ** 10 ** 10
    """
    (tmp_path / "stuck.py").write_text(textwrap.dedent(code), encoding="utf-8")
    with RawWorker("-c", ALARMED, path=[str(tmp_path), *sys.path], parts=["stuck:f"]) as worker:
        worker.send({"task": 0, "part": "stuck:f", "response": "", "row": {}})
        assert worker.process.stderr.read(5) == b"taken"
        worker.requests.close()
        assert worker.process.wait(timeout=PATIENT) == -signal.SIGALRM


@pytest.mark.parametrize("gone", ["before the reply", "while it wrote a request"])
def test_a_worker_whose_parent_is_gone_ends_silently(gone):
    with RawWorker(_reward_worker.__file__, parts=["format"], pattern="a") as worker:
        request = {"task": 0, "part": "format", "response": "a", "row": {}}
        if gone == "before the reply":
            worker.replies.close()  # the end of the requests is not seen yet
            worker.send(request)
        else:
            worker.send(request, part=0.5)
            worker.requests.close()
        assert worker.process.wait(timeout=PATIENT) == 0
        assert worker.process.stderr.read() == b""


ALARMED = """
import sys
from ctpo.train import _reward_worker
_reward_worker.ALARM_GRACE = 1.0
_reward_worker.main(int(sys.argv[1]), int(sys.argv[2]))
"""


def test_a_forked_process_has_workers_of_its_own(functions):
    module = functions("import os\ndef f(response): return os.getpid()")
    with Rewards(f"{module}:f", timeout=PATIENT, workers=1) as rewards:
        mine = rewards.score([""], [{}])[0].total
        code = f"""
import os, sys
sys.path.insert(0, {str(Path(sys.path[0]))!r})
from ctpo.train.rewards import Rewards
rewards = Rewards({module + ":f"!r}, timeout={PATIENT}, workers=1)
mine = rewards.score([""], [{{}}])[0].total
child = os.fork()
other = rewards.score([""], [{{}}])[0].total
assert (other == mine) == bool(child), (other, mine, child)
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert rewards.score([""], [{{}}])[0].total == mine
"""
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=4 * PATIENT)
        assert found.returncode == 0, found.stderr
        assert rewards.score([""], [{}])[0].total == mine


def test_an_interrupted_batch_does_not_reach_the_next(functions):
    module = functions("import time\ndef f(response):\n    time.sleep(float(response))\n    return float(response)")
    with Rewards(f"{module}:f", timeout=PATIENT, workers=2) as rewards:

        def interrupt(*_):
            raise KeyboardInterrupt

        previous = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 1.0)
            with pytest.raises(KeyboardInterrupt):
                rewards.score(["40", "40"], [{}] * 2)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert [score.total for score in rewards.score(["0.1", "0.2"], [{}] * 2)] == [0.1, 0.2]


def test_workers_that_no_longer_start_are_failures(functions, tmp_path):
    module = functions("def f(response): return 1")
    with Rewards(f"{module}:f,format:1", timeout=PATIENT) as rewards:
        rewards.close()
        (tmp_path / f"{module}.py").write_text("raise OSError('gone')", encoding="utf-8")
        scores = rewards.score([r"\boxed{1}"] * 3, [{}] * 3)
    assert all("gone" in score.failures[f"{module}:f"] for score in scores)
    assert [score.total for score in scores] == [1, 1, 1]


# --- specifications ---------------------------------------------------------------------------------------------------


def test_total_is_the_weighted_sum_and_the_first_reward_decides(functions):
    module = functions("def half(response): return 0.5\ndef fails(response): raise ValueError")
    names = [f"{module}:half", f"{module}:fails", "format"]
    with Rewards({names[0]: 0.1, names[1]: 5, names[2]: -0.25}, timeout=PATIENT) as rewards:
        score = rewards.score([r"\boxed{1}"], [{}])[0]
    assert score.total == math.fsum([0.1 * 0.5, -0.25])
    assert score.parts == {names[0]: 0.5, names[1]: 0.0, names[2]: 1.0}
    assert score.correct is False
    with Rewards(f"format:0,{names[0]}:2", timeout=PATIENT) as rewards:
        score = rewards.score([r"\boxed{1}"], [{}])[0]
    assert (score.total, score.correct) == (1.0, True)
    assert score.answer == "1"


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("", "must name at least one reward"),
        ({}, "must name at least one reward"),
        (None, "specification must be a text or a mapping of names to weights, got None"),
        (["math"], r"specification must be a text or a mapping of names to weights, got \['math'\]"),
        ({1: 1}, "specification must have texts as names of rewards, got 1"),
        ("maths", "unknown reward 'maths': did you mean 'math'"),
        ("reasoning_gym:1", "did you mean 'reasoning-gym'"),
        ("length", "allowed are math, format, reasoning-gym and functions"),
        ("math:1,math:2", "'math' is given twice"),
        ("math:inf", "must be a finite number, got inf"),
        ("math:nan", "must be a finite number"),
        ({"math": "1"}, "must be a finite number, got '1'"),
        ({"math": True}, "must be a finite number"),
        ("no_such_package.rewards:f:0.5", "'no_such_package.rewards' cannot be imported: ModuleNotFoundError"),
        ("json:no_such", "'json' has no 'no_such'"),
        ("json:__name__", "a str cannot be called"),
        ("math:abc", "'math' has no 'abc'"),
        ("os.path:join", "needs an argument 'a'"),
    ],
)
def test_bad_specifications_are_refused_before_anything_runs(specification, message):
    with pytest.raises(ValueError, match=message):
        Rewards(specification)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("async def f(response): return 1", "is asynchronous"),
        ("class F:\n    async def __call__(self, response): return 1\nf = F()", "is asynchronous"),
        ("def f(answer): return 1", "needs an argument 'answer': these are given by keyword: response, solution_str"),
        ("def f(response, /): return 1", "needs an argument 'response'"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("import sys; sys.exit(1)", "cannot be imported: SystemExit"),
        ("import os; os._exit(7)", r"did not start: crashed \(exit status 7\)"),
    ],
)
def test_functions_that_cannot_be_called_are_refused(functions, code, message):
    with pytest.raises(ValueError, match=message):
        Rewards(f"{functions(code)}:f")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout must be positive"),
        ({"timeout": math.inf}, "timeout must be positive"),
        ({"timeout": "5"}, "timeout must be positive and finite, got '5'"),
        ({"timeout": True}, "timeout must be positive"),
        ({"memory": 1000}, "memory must be a whole number of bytes, at least 67108864"),
        ({"memory": "1GB"}, "memory must be a whole number of bytes.* got '1GB'"),
        ({"memory": 1e9}, "memory must be a whole number of bytes"),
        ({"workers": 0}, "workers must be a whole number, at least 1"),
        ({"workers": "2"}, "workers must be a whole number.* got '2'"),
        ({"workers": 1.5}, "workers must be a whole number.* got 1.5"),
        ({"format_pattern": 3}, "format_pattern must be a text or None, got 3"),
        ({"format_pattern": "a"}, "there is no reward 'format'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Rewards("math", **options)
    with pytest.raises(ValueError, match="no regular expression"):
        Rewards("format", format_pattern="(")


def test_rows_are_as_many_as_responses():
    with Rewards("format") as rewards:
        assert rewards.score([], []) == []
        with pytest.raises(ValueError, match="rows must be as many as responses, got 1 and 2"):
            rewards.score(["", ""], [{}])
        with pytest.raises(ValueError, match=r"responses\[1\] must be a text, got a NoneType"):
            rewards.score(["", None], [{}, {}])
        for arguments, message in (
            (("a", [{}]), "responses must be a list, got a str"),
            ((None, []), "responses must be a list, got a NoneType"),
            (([], None), "rows must be a list, got a NoneType"),
            (([""], {"ground_truth": "1"}), "rows must be a list, got a dict"),
        ):
            with pytest.raises(ValueError, match=message):
                rewards.score(*arguments)


# --- TRL --------------------------------------------------------------------------------------------------------------


def test_trl_scores_and_logs(functions):
    module = functions("""
        def f(response, ground_truth, id, data_source, extra_info, prompt):
            if response == "raise":
                raise ValueError
            return float(ground_truth == id and data_source == "s" and extra_info["k"] == 1 and bool(prompt))
    """)
    name = f"{module}:f"
    conversation = [
        {"role": "assistant", "content": r"\boxed{1}", "tool_calls": [{}]},
        {"role": "tool", "content": r"\boxed{2}"},
        {"role": "assistant", "content": "raise"},
    ]
    completions = [conversation, [{"role": "assistant", "content": r"\boxed{3}"}]]
    metrics, extra = {}, {}
    with Rewards({name: 1, "format": 0.5}, timeout=PATIENT) as rewards:
        function = rewards.as_trl()
        found = function(
            prompts=[[{"role": "user", "content": "?"}]] * 2,
            completions=completions,
            completion_ids=[[1], [2]],
            ground_truth=["a", "b"],
            id=["a", "b"],
            data_source=["s", "s"],
            extra_info=['{"k": 1}'] * 2,
            trainer_state=object(),
            environments=[object()] * 2,
            log_metric=metrics.__setitem__,
            log_extra=extra.__setitem__,
        )
    assert function.__name__ == "total"
    assert found == [0.0, 1.5]
    assert metrics == {f"parts/{name}": 0.5, f"failures/{name}": 0.5, "parts/format": 0.5, "failures/format": 0.0}
    assert extra == {"reward_failures": [f"{name}: ValueError", ""]}


def test_answer_that_the_trainer_found_is_scored():
    with Rewards("format") as rewards:
        function = rewards.as_trl()
        given = {"prompts": ["2+2?"] * 2, "completions": [[{"role": "assistant", "content": r"\boxed{4}"}]] * 2}
        assert function(**given) == [1.0, 1.0]
        assert function(**given, rollout_answer=["", r"\boxed{5}"]) == [0.0, 1.0]
        with pytest.raises(ValueError, match="rollout_answer must be as many as prompts, got 1 and 2"):
            function(**given, rollout_answer=[""])


def test_trl_is_told_of_a_missing_column():
    call = {"prompts": ["a"] * 2, "completions": [boxed("1")] * 2, "trainer_state": object()}
    with Rewards("math", timeout=PATIENT) as rewards:
        function = rewards.as_trl()
        message = "reward 'math' needs a column 'ground_truth' of the data set, which has answer, id: rename the column"
        with pytest.raises(ValueError, match=message):
            function(**call, answer=["1", "2"], id=["1", "2"])
        with pytest.raises(ValueError, match="which has none besides the prompt"):
            function(**call)
        assert function(**call, ground_truth=["1", None]) == [1, 0]  # a fault of one row
    missing = pytest.raises(ValueError, match="'reasoning-gym' needs a column 'extra_info'")
    with Rewards("format,reasoning-gym") as rewards, missing:
        rewards.as_trl()(**call, ground_truth=["1", "2"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ground_truth": ["1"]}, "ground_truth must be as many as prompts, got 1 and 2"),
        ({"ground_truth": "12"}, "ground_truth must be a list, got a str"),
        ({"ground_truth": 12}, "ground_truth must be a list, got a int"),
        ({"id": ["1"] * 3}, "id must be as many as prompts, got 3 and 2"),
        ({"completions": ["1"]}, "completions must be as many as prompts, got 1 and 2"),
        ({"completions": None}, "completions must be a list, got a NoneType"),
        ({"prompts": "ab"}, "prompts must be a list, got a str"),
    ],
)
def test_trl_calls_of_a_wrong_shape_are_refused(changes, message):
    call = {"prompts": ["a"] * 2, "completions": ["1"] * 2, "ground_truth": ["1"] * 2}
    with Rewards("math") as rewards, pytest.raises(ValueError, match=message):
        rewards.as_trl()(**call | changes)


def test_trl_completions_that_are_none_are_failures(functions):
    name = f"{functions('def f(response): return 1')}:f"
    completions = [completion for bad in NOT_COMPLETIONS for completion in (bad, boxed("1"))]
    metrics = {}
    with Rewards(f"{name},format", timeout=PATIENT) as rewards:
        found = rewards.as_trl()([""] * len(completions), completions, log_metric=metrics.__setitem__)
    assert found == [0, 2] * len(NOT_COMPLETIONS)
    assert (metrics[f"failures/{name}"], metrics["failures/format"]) == (0.5, 0.5)


def test_the_real_trainer_takes_the_function():
    trainer = trl_harness.trainer()
    with Rewards("math:1,format:0.5", timeout=PATIENT) as rewards:
        function = rewards.as_trl()
        replaced = {
            "reward_funcs": [function],
            "reward_func_names": [function.__name__],
            "reward_processing_classes": [None],
        }
        from unittest.mock import patch

        inputs = [{"prompt": "a", "ground_truth": truth, "extra_info": "{}"} for truth in ("1", "2")]
        with patch.multiple(trainer, **replaced):
            found = trainer._calculate_rewards(inputs, ["a", "a"], [r"\boxed{1}", r"\boxed{1}"], [[1], [2]])
        logged = dict(trainer._pending_metrics)
        trainer._pending_metrics.clear()
        trainer._pending_extra_logs.clear()
    assert found.tolist() == [[1.5], [0.5]]
    assert logged["parts/math"] == [0.5]
    assert logged["failures/math"] == [0.0]


# TRL 1.16 asks transformers 5.23 by the former name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_training_goes_on_with_rewards_that_fail(functions, tmp_path):
    from datasets import Dataset
    from trl import GRPOTrainer

    module = functions("import os\ndef f(response, id):\n    return 1.0 if id == '1' else os._exit(1)")
    peer = trl_harness.trainer()
    with Rewards(f"{module}:f:1,format:0.5", timeout=PATIENT) as rewards:
        trainer = GRPOTrainer(
            trl_harness.tiny_model().float(),
            reward_funcs=rewards.as_trl(),
            args=trl_harness.config_on_cpu(tmp_path, max_completion_length=4, max_steps=2, disable_tqdm=True),
            train_dataset=Dataset.from_dict(
                {"prompt": ["a", "b"] * 4, "id": ["1", "2"] * 4, "ground_truth": ["1"] * 8}
            ),
            processing_class=peer.processing_class,
        )
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if f"parts/{module}:f" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert entry[f"parts/{module}:f"] + entry[f"failures/{module}:f"] == 1
        assert entry["rewards/total/mean"] == pytest.approx(entry[f"parts/{module}:f"])
