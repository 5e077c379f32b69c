"""The program of a reward worker: scores what `ctpo.train.rewards` sends it, one request after the other.

It is run as a file of its own and imports nothing of ctpo: the parent's main module is not imported again, as
multiprocessing would, and a worker starts in the time that its rewards need for their own imports. The parent kills it
when a request takes too long; what is done here is whatever must hold without the parent: a limit on memory, an alarm
that ends the process should the parent be gone, and no path from an answer's text to `eval`.

Messages are JSON after their length in four bytes. Parent to worker: the setup, then requests {"task", "part", ...}.
Worker to parent: {"ready"} or {"error"}, then for each request any of {"task", "value"}, {"task", "answer"} (its key
for majority voting) and {"task", "failure"}, and at last {"task", "done"}.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import importlib
import inspect
import json
import keyword
import logging
import math
import os
import queue
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

# The value, then perhaps the key of the answer, sent one by one: a key that cannot be made costs no value.
Outcomes = Iterator[dict[str, Any]]
Scorer = Callable[[dict[str, Any]], Outcomes]

USER_ARGUMENTS = ("response", "solution_str", "ground_truth", "prompt", "data_source", "extra_info", "id")
LONGEST_FAILURE = 500
ALARM_GRACE = 10.0


class SetupError(Exception):
    """A reward cannot be made ready; the text is for the user."""


def describe(error: BaseException) -> str:
    """One line about an exception whose own methods may fail too."""
    try:
        text = str(error)
    except BaseException:
        text = "(its text cannot be made)"
    text = " ".join(text.split())
    return f"{type(error).__name__}: {text}"[:LONGEST_FAILURE] if text else type(error).__name__


# --- arithmetic instead of eval ---------------------------------------------------------------------------------------

_ARITHMETIC = (
    *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Load),
    *(ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator),
)


def arithmetic(source: Any, *_: Any) -> Any:
    """What reasoning-gym's scorers get in place of `eval`: literals and operators, no names and no calls."""
    tree = ast.parse(str(source).strip(), mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, _ARITHMETIC):
            raise ValueError(f"{type(node).__name__} is not arithmetic")
    return eval(compile(tree, "<answer>", "eval"), {"__builtins__": {}})


def refuse_code(*_: Any) -> None:
    """In place of `exec`."""
    raise ValueError("code is not run")


@contextlib.contextmanager
def expressions_only(package: str) -> Iterator[None]:
    """Inside, neither `package` nor sympy's own conversion of text evaluates an answer as Python."""
    import sympy.parsing.sympy_parser

    original = sympy.parsing.sympy_parser.parse_expr

    def checked(s: str, local_dict: Any = None, *args: Any, **kwargs: Any) -> Any:
        # No quotes, so no text to evaluate later; no attributes, subscripts, statements or format strings.
        if not re.fullmatch(r"[\w\s+\-*/^%(),.!=<>]*", s, flags=re.ASCII) or re.search(r"\.\s*[^\W\d]", s, re.ASCII):
            raise ValueError("not a mathematical expression")
        for name in re.findall(r"[^\W\d]\w*", s, flags=re.ASCII):
            if name not in (local_dict or ()) and not harmless(name):
                raise ValueError(f"{name} is not allowed in a mathematical expression")
        return original(s, local_dict, *args, **kwargs)

    replaced: list[tuple[dict[str, Any], str]] = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package:
            module.__dict__.update(eval=arithmetic, exec=refuse_code)
        if getattr(module, "__dict__", {}).get("parse_expr") is original:
            replaced.append((module.__dict__, "parse_expr"))
            module.__dict__["parse_expr"] = checked
    try:
        yield
    finally:
        for names, name in replaced:
            names[name] = original


def harmless(name: str) -> bool:
    """Whether sympy makes a symbol, a number or a mathematical function of a name."""
    import sympy

    found = getattr(sympy, name, None)
    if found is None:
        return not (hasattr(builtins, name) or keyword.iskeyword(name) or name.startswith("_"))
    number_like = isinstance(found, sympy.Expr) or (isinstance(found, type) and issubclass(found, sympy.Expr))
    return number_like or name in ("sqrt", "cbrt", "root", "ln")


# --- rewards ----------------------------------------------------------------------------------------------------------

_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|mbox|operatorname)\s*\{([^{}\\]*)\}")
_WRAPPED = (re.compile(r"\$([^$]*)\$"), re.compile(r"\\boxed\s*\{(.*)\}", re.DOTALL), _TEXT)
_LETTERS = re.compile(r"[^\W\d_]+(?:\s+[^\W\d_]+)*")
# What ends a sentence or a line of LaTeX at the end of a whole answer; an ellipsis is part of the answer.
_END = re.compile(r"(?:\s|(?<!\.)[.](?!\.)|[,;:]|\\\\|\\[ ,;:])+\Z")
_THOUSANDS = re.compile(r"([+-]?\d{1,3})((?:(?:\\[,;:! ]|\{,\}|~|\s)\d{3})+)(\.\d+)?", re.ASCII)
_EXPONENT = re.compile(r"([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})", re.ASCII)


def plain_number(text: str) -> str:
    r"""Of a text that is nothing else, 1\,000 as 1000 and 1e3 as 1 \cdot 10^{3}: math-verify reads them as products."""
    if found := _THOUSANDS.fullmatch(text):
        return found[1] + re.sub(r"\D", "", found[2]) + (found[3] or "")
    if found := _EXPONENT.fullmatch(text):
        return rf"{found[1]} \cdot 10^{{{int(found[2])}}}"
    return text


def words(text: str) -> str | None:
    r"""The words of a text that is nothing else, of a list of words each once, sorted; else None.

    math-verify reads letters as a product: BCA as ABC, silent as listen.
    """
    text = _END.sub("", text).strip()
    for wrapped in _WRAPPED:
        if found := wrapped.fullmatch(text):
            text = _END.sub("", found[1]).strip()
    parts = set()
    for part in re.split(r"\s*,\s*(?:(?:and|or)\s+)?|\s+(?:and|or)\s+", text):
        whole = found[1].strip() if (found := _TEXT.fullmatch(part)) else part
        whole = whole[1:-1].strip() if whole[:1] == "(" and whole[-1:] == ")" else whole
        if not _LETTERS.fullmatch(whole):
            return None
        each = whole.casefold().split()
        parts.add(("" if max(map(len, each)) == 1 else " ").join(each))  # x y is xy
    return parts.pop() if len(parts) == 1 else "{" + ", ".join(sorted(parts)) + "}"


def math_scorer() -> Scorer:
    """math-verify's verdict, then the key of the answer."""
    import math_verify
    from math_verify.grader import And, is_assignment_relation, take_last_relation

    # It warns that no time limit of its own is set.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    math_verify.parse("$1$", parsing_timeout=None)  # compiles its patterns
    import sympy

    def parse(text: str, whole: bool) -> list[Any]:
        def direct(text: str) -> list[Any]:
            return math_verify.parse(text, parsing_timeout=None, raise_on_error=True)

        if whole:
            text = plain_number(_END.sub("", text))
        marked = any(mark in text for mark in ("$", r"\(", r"\[", r"\boxed"))
        if not whole:
            return direct(text)
        found = direct(text) if marked else []
        return found or direct(rf"\boxed{{{text}}}")

    @functools.lru_cache(256)  # a ground truth comes with every response of its group
    def truth(text: str) -> tuple[str | None, list[Any]]:
        return words(text), parse(text, True)

    def equal(gold: tuple[str | None, list[Any]], said: str | None, found: list[Any]) -> bool:
        if gold[0] is not None and said is not None:
            return gold[0] == said
        try:
            return bool(math_verify.verify(gold[1], found, timeout_seconds=None, raise_on_error=True))
        except (MemoryError, RecursionError):
            raise
        except Exception:  # such as the comparison of a matrix with a set
            return False

    def number(value: Any) -> str:
        if value.is_Rational:
            return str(value)
        if value.is_Float:
            return str(Fraction(str(value)))
        approximate = value.evalf(15)
        if approximate.is_Float and abs(approximate) < 1e9:
            near = Fraction(str(approximate)).limit_denominator(10_000)
            if abs(Fraction(str(approximate)) - near) <= Fraction(1, 10**12):
                return str(near)
        return str(value.evalf(12))

    def key(value: Any) -> str:
        if isinstance(value, sympy.Eq) and not value.free_symbols:  # 140/2 = 70, judged by its last member
            value = value.rhs
        if not isinstance(value, sympy.Basic | sympy.MatrixBase):
            return " ".join(str(value).split())
        if is_assignment_relation(value):
            value = take_last_relation(value).rhs
        if isinstance(value, And):
            return " and ".join(map(key, value._unsorted_args))
        if isinstance(value, sympy.FiniteSet):
            keys = sorted({key(each) for each in value.args})
            return keys[0] if len(keys) == 1 else "{" + ", ".join(keys) + "}"
        if isinstance(value, sympy.Tuple):
            return "(" + ", ".join(map(key, value.args)) + ")"
        if isinstance(value, sympy.Interval):
            low, high = "(" if value.left_open else "[", ")" if value.right_open else "]"
            return f"{low}{key(value.start)}, {key(value.end)}{high}"
        if isinstance(value, sympy.Expr):
            value = value.doit()
            if value.is_infinite or value is sympy.nan:
                return str(value)
            return number(value) if value.is_number else str(sympy.cancel(value))
        return str(value)

    def score(request: dict[str, Any]) -> Outcomes:
        answer, whole = request["answer"], request["whole"]
        texts = request["ground_truth"]
        same = whole and any(text.split() == answer.split() for text in texts)
        try:
            found = parse(answer, whole)
        except (MemoryError, RecursionError):
            raise
        except Exception:  # it cannot be read
            found = []
        # Of a text that was searched, what was found in it.
        plain = answer if whole else found[-1] if found and isinstance(found[-1], str) else ""
        said = words(plain)
        value = same or any(equal(truth(text), said, found) for text in texts)
        yield {"value": float(value)}
        if said is not None:
            yield {"answer": said}
        elif found:
            with contextlib.suppress(Exception):
                yield {"answer": key(found[0])}

    return score


class _Sequence(list[Any]):
    """A list that equals a tuple too: JSON has made lists of both, and scorers compare boards of tuples."""

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, list | tuple) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None


def as_sequences(value: Any) -> Any:
    if isinstance(value, list):
        return _Sequence(map(as_sequences, value))
    return {key: as_sequences(each) for key, each in value.items()} if isinstance(value, dict) else value


def gym_scorer() -> Scorer:
    """The task's own `score_answer`."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    tasks: dict[str, Callable[..., Any]] = {}

    def typed(text: Any, default: Any) -> Any:
        """A value of a configuration that may have been written as text."""
        if isinstance(default, list | tuple):
            parts = text if not isinstance(text, str) else json.loads(text) if text[:1] == "[" else text.split(",")
            return type(default)(typed(part, default[0] if default else "") for part in parts)
        if not isinstance(text, str) or isinstance(default, str):
            return text
        try:
            return json.loads(text.lower())
        except ValueError:
            return text

    def task(name: str, configuration: dict[str, Any]) -> Callable[..., Any]:
        if name not in DATASETS:
            raise ValueError(f"reasoning-gym has no task {name!r}")
        defaults = DATASETS[name][1]()
        chosen = {
            key: typed(value, getattr(defaults, key, None))
            for key, value in configuration.items()
            if key not in ("size", "seed")
        }
        return reasoning_gym.create_dataset(name, **chosen).score_answer

    def score(request: dict[str, Any]) -> Outcomes:
        name, configuration = request["task_name"], request["configuration"]
        which = json.dumps([name, configuration], sort_keys=True)
        if which not in tasks:
            tasks[which] = task(name, configuration)
        with expressions_only("reasoning_gym"):
            value = as_number(tasks[which](request["answer"], as_sequences(request["entry"])))
        yield {"value": value}

    return score


def pattern_scorer(pattern: str) -> Scorer:
    """1 where the pattern is found."""
    compiled = re.compile(pattern)

    def score(request: dict[str, Any]) -> Outcomes:
        yield {"value": float(compiled.search(request["response"]) is not None)}

    return score


def user_scorer(path: str) -> Scorer:
    """A function by import path, with those of the arguments that it takes."""
    module_name, _, name = path.partition(":")
    try:
        function: Any = importlib.import_module(module_name)
    except BaseException as error:
        raise SetupError(f"reward {path!r}: {module_name!r} cannot be imported: {describe(error)}") from error
    for attribute in name.split("."):
        if not hasattr(function, attribute):
            raise SetupError(f"reward {path!r}: {module_name!r} has no {name!r}")
        function = getattr(function, attribute)
    if not callable(function):
        raise SetupError(f"reward {path!r}: a {type(function).__name__} cannot be called")
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise SetupError(f"reward {path!r} is asynchronous: only ordinary functions are called")
    parameters = inspect.signature(function).parameters.values()
    named = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    for each in parameters:
        required = each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        if required and (each.kind is each.POSITIONAL_ONLY or each.name not in USER_ARGUMENTS):
            given = ", ".join(USER_ARGUMENTS)
            raise SetupError(f"reward {path!r} needs an argument {each.name!r}: these are given by keyword: {given}")
    # A function of verl's, which may hand its further keywords on, gets what verl gives.
    every = any(each.kind is each.VAR_KEYWORD for each in parameters) and "solution_str" not in named
    wanted = (set(USER_ARGUMENTS) - {"solution_str"} if every else set()) | named & set(USER_ARGUMENTS)

    def score(request: dict[str, Any]) -> Outcomes:
        available = {**request["row"], "response": request["response"], "solution_str": request["response"]}
        result = function(**{name: available[name] for name in wanted})
        if isinstance(result, Mapping):
            if "score" not in result:
                raise ValueError(f"a dict without 'score' was returned: {describe_keys(result)}")
            result = result["score"]
        yield {"value": as_number(result)}

    return score


def describe_keys(result: Mapping[Any, Any]) -> str:
    return ", ".join(repr(name)[:30] for name in list(result)[:8]) or "empty"


def as_number(result: Any) -> float:
    """A finite float of what a reward returned."""
    if inspect.iscoroutine(result):
        result.close()
        raise ValueError("a coroutine was returned, not a number")
    if result is None or isinstance(result, str | bytes):
        raise ValueError(f"{'None' if result is None else 'text'} was returned, not a number")
    value = float(result)
    if not math.isfinite(value):
        raise ValueError(f"{value} was returned")
    return value


def load(name: str, pattern: str | None) -> Scorer:
    if name == "math":
        return math_scorer()
    if name == "reasoning-gym":
        return gym_scorer()
    if name == "format":
        return pattern_scorer(pattern or "")
    return user_scorer(name)


# --- the process ------------------------------------------------------------------------------------------------------


def address_space() -> int | None:
    """Bytes of memory that are mapped, where the system says."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return None


def limit_memory(allowed: int | None) -> int | None:
    """Let the process map `allowed` bytes more than now; returns the mapped bytes at which to start afresh."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    mapped = address_space()
    if allowed is None or mapped is None:
        return None
    with contextlib.suppress(ValueError, OSError):  # a lower hard limit is in force already
        resource.setrlimit(resource.RLIMIT_AS, (mapped + allowed, mapped + allowed))
    return mapped + allowed // 2


def main(requests: int, replies: int) -> None:
    """Serve until the parent closes `requests`."""
    for end in (requests, replies):
        os.set_inheritable(end, False)
    # Whatever a reward prints goes to standard error.
    with contextlib.suppress(OSError):
        os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    source, sink = os.fdopen(requests, "rb"), os.fdopen(replies, "wb")
    received: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        # In a thread of its own, so that the end of the parent is noticed whatever a reward does.
        while len(head := source.read(4)) == 4:
            length = int.from_bytes(head, "big")
            if len(data := source.read(length)) < length:  # the parent was killed while it wrote
                break
            received.put(json.loads(data))
        os._exit(0)

    def send(message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        try:
            sink.write(len(data).to_bytes(4, "big") + data)
            sink.flush()
        except BrokenPipeError:  # the parent is gone, and `read` has not been told yet
            os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    setup = received.get()
    sys.path[:] = setup["path"]
    scorers: dict[str, Scorer] = {}
    try:
        for name in setup["parts"]:
            scorers[name] = load(name, setup["pattern"])
    except SetupError as error:
        send({"error": str(error)})
        return
    except BaseException as error:
        send({"error": f"reward {name!r} cannot be made ready: {describe(error)}"})
        return
    afresh = limit_memory(setup["memory"])
    send({"ready": True})
    while True:
        request = received.get()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, setup["timeout"] + ALARM_GRACE)
        try:
            for outcome in scorers[request["part"]](request):
                send({"task": request["task"], **outcome})
        except BaseException as error:
            send({"task": request["task"], "failure": describe(error)})
        signal.setitimer(signal.ITIMER_REAL, 0)
        # Memory is not given back: the parent replaces a worker that has used up half of it.
        used_up = afresh is not None and (address_space() or 0) > afresh
        send({"task": request["task"], "done": True, "used_up": used_up})


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
