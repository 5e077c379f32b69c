r"""Rewards of a model's answers: each within a time and a memory limit, whatever the answer contains.

`Rewards("math:1,format:0.1,my.module:function:0.5")` scores the responses of a batch in order, by worker processes that
are killed and replaced when they take too long, use too much memory or crash. A reward that fails on a sample counts 0
there, is recorded in that sample's `Score.failures`, and touches no other sample.

====================  ==================================================================================
reward                value
====================  ==================================================================================
math                  1 if math-verify finds the answer equal to the ground truth, else 0
format                1 if the response has exactly one ``\boxed{}`` and that is not empty, else 0; with
                      `format_pattern`: 1 if that regular expression is found in the response
reasoning-gym         what the task's own `score_answer` gives
package.mod:function  what the function returns: a number, or a dict with "score" as in verl
====================  ==================================================================================

The answer that "math" and "reasoning-gym" judge is taken by `extract_answer` from what `without_thoughts` leaves of the
response; "format" counts the boxes of that.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["ANSWER_LIMIT", "RESPONSE_LIMIT", "Rewards", "Score", "extract_answer", "extract_boxed", "without_thoughts"]

# Characters at the end of a response in which the built-in rewards look for an answer.
RESPONSE_LIMIT = 1_000_000
# Characters of an answer that "math" reads; a longer one is a failure. Of a response without a marked answer it reads
# as many characters at the end.
ANSWER_LIMIT = 4_000

BUILT_IN = {"math": "math_verify", "format": "", "reasoning-gym": "reasoning_gym"}

# Escaped characters are skipped: the braces of \{1, 2\} are not LaTeX's.
_TOKEN = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|[{}]", re.DOTALL)


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """Start of the command, start and end of the content, for every complete box, by where it starts."""
    first = text.find(r"\boxed")
    # Braces before the first box never close one, but backslashes may escape its own.
    while first > 0 and text[first - 1] == "\\":
        first -= 1
    found, open_braces = [], []
    for token in _TOKEN.finditer(text, max(first, 0)) if first >= 0 else ():
        if token["box"]:
            open_braces.append((token.start(), token.end()))
        elif token[0] == "{":
            open_braces.append((-1, -1))
        elif token[0] == "}" and open_braces:
            command, start = open_braces.pop()
            if command >= 0:
                found.append((command, start, token.start()))
    return sorted(found)


def extract_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` of a text.

    Braces are balanced as LaTeX does: escaped ones do not count. Of nested boxes the inner one is taken; one that is
    never closed is none.

    Args:
        text: Any text.

    Returns:
        What stands between the braces, stripped; None without a box.

    Example:
        >>> extract_boxed(r"Let $S=\boxed{\{1,2\}}$. So we get \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
        >>> extract_boxed(r"\boxed{3") is None
        True
    """
    boxes = _boxes(text)
    return text[boxes[-1][1] : boxes[-1][2]].strip() if boxes else None


# What a repetition of the instructions has in place of an answer: "put it in \boxed{}", "<answer>...</answer>".
_NOTHING = r"(?:[\s$.…]|\\[lc]?dots|\\[,;: ])*"
_BLANK = re.compile(_NOTHING)
_BLANK_MARK = re.compile(rf"\\boxed\s*\{{{_NOTHING}\}}|<answer>{_NOTHING}</answer>")

# What may stand between two boxes that together are one answer.
_BETWEEN = re.compile(r"(?:[\s$,;&]|\\[()\[\],;: ]|\\q?quad|and|or|\\text\s*\{\s*(?:and|or)\s*\}){0,20}")


def _last_boxes(text: str) -> str | None:
    """As `extract_boxed`, but boxes joined by "and", "or" or commas make one list, and blank ones do not count."""
    boxes = [box for box in _boxes(text) if not _BLANK.fullmatch(text, box[1], box[2])]
    if not boxes:
        return None
    contents = [boxes[-1][1:]]
    for (_, start, end), (command, _, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        if end >= command or _BETWEEN.fullmatch(text, end + 1, command) is None:
            break
        contents.append((start, end))
    texts = [text[start:end].strip() for start, end in reversed(contents)]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


def extract_answer(response: str) -> str | None:
    r"""The answer that a response marks as such.

    If there is an ``<answer>...</answer>``, the last one is looked at alone. The answer is the last box of that, and
    where boxes follow one another with nothing but commas, "and" or "or" between them, the list of their contents (once
    if they are all the same); without a box the whole content of the tags. Boxes and tags with nothing or only dots in
    them do not count. Only the last `RESPONSE_LIMIT` characters are read.

    Args:
        response: Text of a model.

    Returns:
        The answer, or None where nothing is marked: "math" then reads the end of the response as math-verify does,
        "reasoning-gym" the last line that is not empty.

    Example:
        >>> extract_answer(r"The roots are $\boxed{1}$ and $\boxed{2}$.")
        '1, 2'
        >>> extract_answer("<answer> 42 </answer>")
        '42'
        >>> extract_answer(r"\boxed{42}, in \boxed{} as asked.")
        '42'
        >>> extract_answer("It is 42.") is None
        True
    """
    response = response[-RESPONSE_LIMIT:]
    end = response.rfind("</answer>")
    while end >= 0 and (start := response.rfind("<answer>", 0, end)) >= 0:
        inside = response[start + len("<answer>") : end].strip()
        boxed = _last_boxes(inside)
        if boxed is not None:
            return boxed
        if not _BLANK.fullmatch(_BLANK_MARK.sub("", inside)):
            return inside
        end = response.rfind("</answer>", 0, start)
    return _last_boxes(response)


def _unmarked(response: str) -> str:
    """The end of a response in which no answer is marked, without the blank marks."""
    return _BLANK_MARK.sub("", response[-RESPONSE_LIMIT:])


def without_thoughts(text: str) -> str:
    r"""The part of a response that is not a thought.

    Args:
        text: Text of a model.

    Returns:
        What comes after the last ``</think>``; the empty text where a ``<think>`` was opened after that and never
        closed; the text itself where there are no thoughts.

    Example:
        >>> without_thoughts(r"<think>Maybe \boxed{70}?</think>It is \boxed{71}.")
        'It is \\boxed{71}.'
        >>> without_thoughts(r"<think>Maybe \boxed{70}? wait")
        ''
    """
    said = text.rpartition("</think>")[2]
    return "" if "<think>" in said else said


@dataclass(frozen=True, slots=True)
class Score:
    r"""The reward of one response.

    Attributes:
        total: Sum of the weighted parts.
        parts: Value of each reward by its name, before its weight; 0 where it failed.
        failures: By the name of the reward, why it has no value: "timeout", "crashed (...)", or an error's type and
            text.
        answer: Key of the answer for majority voting. With "math" the same for equal numbers however they are written
            (1/2, 0.5 and \frac{2}{4}), for sets in any order and for polynomials in any form; elsewhere, and for what
            math-verify cannot read, the text of `extract_answer`. None where nothing was found.
        correct: Whether the first reward of the specification is at least 1 (and did not fail).
    """

    total: float
    parts: dict[str, float]
    failures: dict[str, str] = field(default_factory=dict)
    answer: str | None = None
    correct: bool = False


# --- workers ----------------------------------------------------------------------------------------------------------

_WORKER = Path(__file__).with_name("_reward_worker.py")
_INSIDE = "CTPO_REWARD_WORKER"
_STARTUP_SECONDS = 120.0
# For the key of an answer, once its value is known.
_KEY_SECONDS = 1.0


class _WorkerError(Exception):
    """A worker could not be made ready; the text says why."""


@dataclass(eq=False)
class _Worker:
    """A process and what is on its way to and from it.

    Started by path and spoken to over pipes, since the pools of multiprocessing and pebble import the main module
    again (a script without a main guard would start itself over and over) or fork a process that has threads and CUDA,
    and loky, which does neither, cannot end one task that hangs without ending all.
    """

    process: subprocess.Popen[bytes]
    requests: int
    replies: int
    outgoing: bytearray = field(default_factory=bytearray)
    incoming: bytearray = field(default_factory=bytearray)
    task: int | None = None  # None while it starts and while it has nothing to do
    ready: bool = False
    deadline: float = math.inf

    @staticmethod
    def start(setup: bytes) -> _Worker:
        inward, outward = os.pipe(), os.pipe()
        environment = {"OMP_NUM_THREADS": "1", **os.environ, _INSIDE: "1"}
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER), str(inward[0]), str(outward[1])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(inward[0], outward[1]),
                start_new_session=True,  # Ctrl-C is for the parent
                env=environment,
            )
        except OSError as error:
            os.close(inward[1])
            os.close(outward[0])
            raise _WorkerError(f"a worker cannot be started: {error}") from error
        finally:
            os.close(inward[0])
            os.close(outward[1])
        os.set_blocking(inward[1], False)
        os.set_blocking(outward[0], False)
        made = _Worker(process, inward[1], outward[0], deadline=time.monotonic() + _STARTUP_SECONDS)
        made.outgoing += setup
        return made

    def kill(self) -> str:
        """End it, with its process group; returns how it had ended."""
        with contextlib.suppress(OSError):
            # The leader has not been waited for, so its number still is its group's.
            os.killpg(self.process.pid, signal.SIGKILL)
        for end in (self.requests, self.replies):
            with contextlib.suppress(OSError):
                os.close(end)
        status = self.process.wait()
        if status < 0:
            with contextlib.suppress(ValueError):
                return f"crashed ({signal.Signals(-status).name})"
        return f"crashed (exit status {status})"

    def abandon(self) -> None:
        """Leave it to the process that has started it."""
        os.close(self.requests)
        os.close(self.replies)
        self.process.returncode = 0  # not ours to wait for

    def messages(self) -> Iterator[dict[str, Any]]:
        while len(self.incoming) >= 4:
            length = int.from_bytes(self.incoming[:4], "big")
            if len(self.incoming) < 4 + length:
                return
            message = json.loads(self.incoming[4 : 4 + length])
            del self.incoming[: 4 + length]
            yield message


def _framed(message: Mapping[str, Any]) -> bytes:
    data = json.dumps(message, default=_plain).encode()
    return len(data).to_bytes(4, "big") + data


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays, as parquet readers give them, as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be sent to a reward")


def _kill_all(workers: set[_Worker], owner: int) -> None:
    while workers:
        worker = workers.pop()
        if os.getpid() == owner:
            worker.kill()
        else:
            worker.abandon()


class _Pool:
    """Runs requests on worker processes, each within its time."""

    def __init__(self, setup: Mapping[str, Any], size: int) -> None:
        self.setup = _framed(setup)
        self.timeout: float = setup["timeout"]
        self.size = size
        self.workers: set[_Worker] = set()
        self.owner = os.getpid()
        self.lock = threading.Lock()
        self.finalizer = weakref.finalize(self, _kill_all, self.workers, self.owner)

    def run(self, requests: Sequence[Mapping[str, Any]], start_one: bool = False) -> list[dict[str, Any]]:
        """What became of each request: some of "value", "answer" and "failure".

        Args:
            requests: In any number.
            start_one: Start a worker even without requests; a failure to do so raises `_WorkerError`.
        """
        with self.lock:
            if os.getpid() != self.owner:  # forked: the workers are the parent's
                _kill_all(self.workers, self.owner)
                self.finalizer.detach()
                self.owner = os.getpid()
                self.finalizer = weakref.finalize(self, _kill_all, self.workers, self.owner)
            try:
                return self._run(requests, start_one)
            except BaseException:
                # Interrupted: replies to abandoned requests must not be taken for those to later ones.
                _kill_all(self.workers, self.owner)
                raise

    def close(self) -> None:
        with self.lock:
            _kill_all(self.workers, self.owner)

    def _run(self, requests: Sequence[Mapping[str, Any]], start_one: bool) -> list[dict[str, Any]]:
        outcomes: list[dict[str, Any]] = [{} for _ in requests]
        waiting = deque(range(len(requests)))
        while True:
            for worker in [worker for worker in self.workers if worker.ready and worker.task is None]:
                while waiting and worker.task is None:
                    task = waiting.popleft()
                    try:
                        worker.outgoing += _framed({"task": task, **requests[task]})
                    except Exception as error:  # among them RecursionError, for what is nested too deeply
                        outcomes[task] = {"failure": _described(error)}
                    else:
                        worker.task, worker.deadline = task, time.monotonic() + self.timeout
            busy = [worker for worker in self.workers if worker.task is not None]
            starting = [worker for worker in self.workers if not worker.ready]
            if not waiting and not busy and not (start_one and not any(worker.ready for worker in self.workers)):
                return outcomes
            wanted = min(self.size, len(busy) + max(len(waiting), start_one))
            try:
                while len(self.workers) < wanted:
                    starting.append(_Worker.start(self.setup))
                    self.workers.add(starting[-1])
                self._exchange(busy + starting, outcomes)
            except _WorkerError as error:
                if start_one:
                    raise
                # It would fail for the others as well, perhaps after minutes each.
                for task in waiting:
                    outcomes[task] = {"failure": str(error)}
                waiting.clear()

    def _exchange(self, workers: Iterable[_Worker], outcomes: list[dict[str, Any]]) -> None:
        """Wait until something can be sent, was received, or is late, and do what follows from it."""
        with selectors.DefaultSelector() as selector:
            soonest = math.inf
            for worker in workers:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
                if worker.outgoing:
                    selector.register(worker.requests, selectors.EVENT_WRITE, worker)
                soonest = min(soonest, worker.deadline)
            events = selector.select(max(0.0, soonest - time.monotonic()))
        for key, event in events:
            worker = key.data
            if worker not in self.workers:
                continue
            try:
                if event & selectors.EVENT_WRITE:
                    with contextlib.suppress(BlockingIOError):
                        del worker.outgoing[: os.write(worker.requests, worker.outgoing[: 1 << 20])]
                else:
                    self._receive(worker, outcomes)
            except OSError:
                self._lost(worker, "", outcomes)
            except ValueError:
                self._lost(worker, "crashed (what it sent is no message)", outcomes)
        now = time.monotonic()
        for worker in workers:
            if worker in self.workers and worker.deadline <= now:
                self._lost(worker, "timeout", outcomes)

    def _receive(self, worker: _Worker, outcomes: list[dict[str, Any]]) -> None:
        data = os.read(worker.replies, 1 << 20)
        if not data:
            raise ConnectionError
        worker.incoming += data
        for message in worker.messages():
            if not isinstance(message, dict):
                raise ValueError
            if "error" in message and not worker.ready:
                self.workers.discard(worker)
                worker.kill()
                raise _WorkerError(message["error"])
            if "ready" in message:
                worker.ready, worker.deadline = True, math.inf
                continue
            if message.get("task") != worker.task or worker.task is None:
                raise ValueError
            if message.get("done"):
                worker.task, worker.deadline = None, math.inf
                if message["used_up"]:
                    self.workers.discard(worker)
                    worker.kill()
                    return
                continue
            outcome = outcomes[worker.task]
            if "value" not in outcome:
                outcome.update({name: message[name] for name in ("value", "failure") if name in message})
                worker.deadline = min(worker.deadline, time.monotonic() + _KEY_SECONDS)
            elif "answer" in message:
                outcome["answer"] = message["answer"]

    def _lost(self, worker: _Worker, why: str, outcomes: list[dict[str, Any]]) -> None:
        """Give a worker up, with the request that it had."""
        self.workers.discard(worker)
        ended = worker.kill()
        if not worker.ready:
            late = f"not ready after {_STARTUP_SECONDS:.0f} seconds"
            raise _WorkerError(f"a worker did not start: {late if why == 'timeout' else why or ended}")
        if worker.task is not None and "value" not in outcomes[worker.task]:
            outcomes[worker.task] = {"failure": why or ended}


# --- rewards ----------------------------------------------------------------------------------------------------------


class Rewards:
    r"""A weighted sum of rewards, computed in worker processes.

    Workers start when they are first needed; `close` (or leaving the context, or the end of the program) ends them, and
    a later `score` starts new ones. Several threads may score, one after the other. Functions by import path are
    imported in a worker, with the current directory on its path, and checked at construction; what they print goes to
    standard error.

    Args:
        specification: Names with weights, "math:1,format:0.1,package.module:function:0.5" (no weight: 1), or a mapping
            of names to weights. The first one decides whether an answer is correct. A weight of 0 leaves a reward out
            of the total but in the parts.
        timeout: Seconds that one reward may take on one response.
        memory: Bytes that a worker may map beyond what its imports have taken; None for no limit.
        workers: Processes at most; by default as many as there are processors, up to 4.
        format_pattern: Regular expression for "format", searched in the whole response.

    Raises:
        ValueError: A name is unknown, a function cannot be imported or takes arguments that are not given, a weight is
            not finite, or another argument is out of its range.

    Example:
        >>> rows = [{"ground_truth": r"\frac{1}{2}"}, {"ground_truth": "7"}]
        >>> with Rewards("math:1,format:0.1") as rewards:
        ...     for score in rewards.score([r"So it is \boxed{0.5}.", "I do not know."], rows):
        ...         print(score.total, score.parts, score.answer, score.correct)
        1.1 {'math': 1.0, 'format': 1.0} 1/2 True
        0.0 {'math': 0.0, 'format': 0.0} None False
    """

    def __init__(
        self,
        specification: str | Mapping[str, float],
        *,
        timeout: float = 5.0,
        memory: int | None = 1 << 30,
        workers: int | None = None,
        format_pattern: str | None = None,
    ) -> None:
        if os.environ.get(_INSIDE):
            raise RuntimeError(
                "rewards are being made inside a reward worker: a module with a reward function must not start a run "
                'when it is imported; move that under `if __name__ == "__main__":` or the function to another module'
            )
        self.weights = _weights(specification)
        if isinstance(timeout, bool) or not (isinstance(timeout, int | float) and 0 < timeout < math.inf):
            raise ValueError(f"timeout must be positive and finite, got {timeout!r}")
        if memory is not None and not (isinstance(memory, int) and memory >= 1 << 26):
            raise ValueError(f"memory must be a whole number of bytes, at least {1 << 26}, or None, got {memory!r}")
        if workers is not None and (isinstance(workers, bool) or not (isinstance(workers, int) and workers >= 1)):
            raise ValueError(f"workers must be a whole number, at least 1, or None, got {workers!r}")
        if format_pattern is not None:
            if not isinstance(format_pattern, str):
                raise ValueError(f"format_pattern must be a text or None, got {format_pattern!r}")
            if "format" not in self.weights:
                raise ValueError("format_pattern is given but there is no reward 'format'")
            try:
                re.compile(format_pattern)
            except re.error as error:
                raise ValueError(f"format_pattern is no regular expression: {error}") from error
        self._in_worker = [name for name in self.weights if name != "format" or format_pattern is not None]
        for name in self._in_worker:
            module = BUILT_IN.get(name)
            if module and importlib.util.find_spec(module) is None:
                raise ValueError(f"reward {name!r} needs {module}: pip install {module.replace('_', '-')}")
        setup = {
            "path": [os.getcwd(), *(os.path.abspath(place) for place in sys.path)],
            "parts": self._in_worker,
            "pattern": format_pattern,
            "memory": memory,
            "timeout": timeout,
        }
        self._pool = _Pool(setup, workers or min(4, os.cpu_count() or 1))
        if any(name not in BUILT_IN for name in self._in_worker):
            try:
                self._pool.run([], start_one=True)
            except _WorkerError as error:
                raise ValueError(str(error)) from None

    def score(self, responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Score]:
        """Score each response against its row.

        Args:
            responses: What the models wrote.
            rows: As many problems: "ground_truth" (a text, or a list of texts of which any is right), and where there
                are such "id", "prompt", "data_source" and "extra_info" (a mapping, or its JSON text).

        Returns:
            Scores in the same order. A bad row is a failure of its own score.

        Raises:
            ValueError: There are not as many rows as responses, or a response is no text.
        """
        _check_list("responses", responses)
        _check_list("rows", rows)
        if len(responses) != len(rows):
            raise ValueError(f"rows must be as many as responses, got {len(rows)} and {len(responses)}")
        for index, response in enumerate(responses):
            if not isinstance(response, str):
                raise ValueError(f"responses[{index}] must be a text, got a {type(response).__name__}")
        return self._score(responses, rows)

    def _score(self, responses: Sequence[str | ValueError], rows: Sequence[Mapping[str, Any]]) -> list[Score]:
        """As `score`; in place of a response there may be why it cannot be had, which is its failure."""
        requests: list[dict[str, Any]] = []
        places: list[tuple[int, str]] = []
        outcomes: list[dict[str, dict[str, Any]]] = [{} for _ in responses]
        answers: list[str | None] = [None] * len(responses)
        for index, (response, row) in enumerate(zip(responses, rows, strict=True)):
            if isinstance(response, ValueError):
                outcomes[index] = {name: {"failure": str(response)} for name in self.weights}
                continue
            said = without_thoughts(response)
            answers[index] = extract_answer(said)
            for name in self.weights:
                if name not in self._in_worker:
                    outcomes[index][name] = {"value": _one_box(said)}
                    continue
                # Functions and patterns of the user get the whole response.
                text = said if name in ("math", "reasoning-gym") else response
                try:
                    requests.append({"part": name, **_request(name, text, answers[index], row)})
                    places.append((index, name))
                except ValueError as error:
                    outcomes[index][name] = {"failure": str(error)}
                except Exception as error:  # a value has methods that fail, or is nested too deeply
                    outcomes[index][name] = {"failure": _described(error)}
        for (index, name), outcome in zip(places, self._pool.run(requests), strict=True):
            outcomes[index][name] = outcome
        return [self._sum(found, answer) for found, answer in zip(outcomes, answers, strict=True)]

    def _sum(self, outcomes: Mapping[str, Mapping[str, Any]], answer: str | None) -> Score:
        parts = {name: float(outcomes[name].get("value", 0.0)) for name in self.weights}
        failures = {name: outcomes[name]["failure"] for name in self.weights if "failure" in outcomes[name]}
        first = next(iter(self.weights))
        key = outcomes.get("math", {}).get("answer")
        if key is None and answer is not None:
            key = " ".join(answer.split())
        return Score(
            total=math.fsum(self.weights[name] * value for name, value in parts.items()),
            parts=parts,
            failures=failures,
            answer=key or None,
            correct=first not in failures and parts[first] >= 1.0,
        )

    def as_trl(self) -> Callable[..., list[float]]:
        r"""These rewards as one reward function of TRL's trainers.

        The columns "ground_truth", "id", "data_source" and "extra_info" of the data set are its rows. Of a
        conversational completion the text that the assistant wrote after the last tool message is scored, or that of
        the column "rollout_answer" where `CTPOTrainer` adds it. The mean of each part is logged as "parts/NAME",
        failures per response as "failures/NAME", and the failures' texts are a column of the table of completions.

        Returns:
            A function with the name "total" that gives that of each completion, never None. It raises ValueError where
            it is called wrongly: a column that "math" (ground_truth) or "reasoning-gym" (ground_truth and extra_info)
            needs is not there at all, or a column or the completions are not as many as the prompts.

        Example:
            >>> with Rewards("format") as rewards:
            ...     function = rewards.as_trl()
            ...     function(prompts=["2+2?"], completions=[[{"role": "assistant", "content": r"\boxed{4}"}]])
            [1.0]
        """

        def total(
            prompts: Sequence[Any],
            completions: Sequence[Any],
            completion_ids: Any = None,
            *,
            log_metric: Callable[[str, float], None] | None = None,
            log_extra: Callable[[str, list[str]], None] | None = None,
            **columns: Any,
        ) -> list[float]:
            _check_list("prompts", prompts)
            _check_list("completions", completions, prompts)
            self._check_columns(columns)
            names = [name for name in ("id", "ground_truth", "data_source", "extra_info") if name in columns]
            for column in names:
                _check_list(column, columns[column], prompts)
            rows = [
                {"prompt": prompt, **{name: columns[name][index] for name in names}}
                for index, prompt in enumerate(prompts)
            ]
            said = columns.get("rollout_answer")
            if said is None:
                said = [_final_text(completion) for completion in completions]
            else:  # without thoughts, also one that the prompt opened
                _check_list("rollout_answer", said, prompts)
            scores = self._score(said, rows)
            for name in self.weights if scores else ():
                failed = sum(name in score.failures for score in scores)
                if log_metric is not None:
                    log_metric(f"parts/{name}", math.fsum(score.parts[name] for score in scores) / len(scores))
                    log_metric(f"failures/{name}", failed / len(scores))
            if log_extra is not None:
                texts = ["; ".join(f"{name}: {why}" for name, why in score.failures.items()) for score in scores]
                log_extra("reward_failures", texts)
            return [score.total for score in scores]

        return total

    def _check_columns(self, columns: Mapping[str, Any]) -> None:
        """Without its column a reward would be 0 everywhere, and the training would go on."""
        for reward, needed in _COLUMNS.items():
            for column in needed if reward in self.weights else ():
                if columns.get(column) is None:
                    others = ", ".join(sorted(set(columns) - _NOT_COLUMNS)) or "none besides the prompt"
                    raise ValueError(
                        f"reward {reward!r} needs a column {column!r} of the data set, which has {others}: "
                        f"rename the column that holds it to {column!r}"
                    )

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# The columns that the built-in rewards cannot do without.
_COLUMNS = {"math": ("ground_truth",), "reasoning-gym": ("ground_truth", "extra_info")}
# What TRL's trainers pass besides the columns of the data set.
_NOT_COLUMNS = {"trainer_state", "environments"}


def _check_list(name: str, value: Any, prompts: Sequence[Any] | None = None) -> None:
    """Whether an argument of a call is a list, as long as the prompts."""
    if isinstance(value, str | bytes | Mapping) or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        raise ValueError(f"{name} must be a list, got a {type(value).__name__}")
    if prompts is not None and len(value) != len(prompts):
        raise ValueError(f"{name} must be as many as prompts, got {len(value)} and {len(prompts)}")


def final_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """What the assistant wrote after the last message that is not its own.

    Args:
        completion: A text, or messages with "role" and "content" (a text, None, or parts with "text").

    Raises:
        ValueError: It is neither.

    Example:
        >>> final_text([{"role": "tool", "content": "4"}, {"role": "assistant", "content": "It is 4."}])
        'It is 4.'
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, Sequence):
        raise ValueError(f"the completion is a {type(completion).__name__}, neither a text nor messages")
    texts: list[str] = []
    for message in reversed(completion):
        if not isinstance(message, Mapping):
            raise ValueError(f"a message of the completion is a {type(message).__name__}, not a mapping")
        if message.get("role") != "assistant":
            break
        content = message.get("content")
        for part in reversed(content) if isinstance(content, list | tuple) else [{"text": content}]:
            text = part.get("text") if isinstance(part, Mapping) else part
            if not isinstance(part, Mapping) or not isinstance(text, str | None):
                raise ValueError(f"the content of a message of the completion is or holds a {type(text).__name__}")
            texts.append(text or "")
        texts.append("\n")
    return "".join(reversed(texts[:-1]))


def _final_text(completion: Any) -> str | ValueError:
    try:
        return final_text(completion)
    except ValueError as error:
        return error


def _weights(specification: str | Mapping[str, float]) -> dict[str, float]:
    if isinstance(specification, str):
        pairs = []
        for item in filter(None, (each.strip() for each in specification.split(","))):
            name, colon, last = item.rpartition(":")
            try:
                pairs.append((name.strip(), float(last)) if colon else (item, 1.0))
            except ValueError:
                pairs.append((item, 1.0))
    elif isinstance(specification, Mapping):
        pairs = list(specification.items())
    else:
        raise ValueError(f"specification must be a text or a mapping of names to weights, got {specification!r}")
    weights: dict[str, float] = {}
    for name, weight in pairs:
        if not isinstance(name, str):
            raise ValueError(f"specification must have texts as names of rewards, got {name!r}")
        if name in weights:
            raise ValueError(f"reward {name!r} is given twice")
        if name not in BUILT_IN and not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", name):
            near = difflib.get_close_matches(name, BUILT_IN, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            allowed = f"allowed are {', '.join(BUILT_IN)} and functions as package.module:function"
            raise ValueError(f"unknown reward {name!r}: {hint}{allowed}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"the weight of reward {name!r} must be a finite number, got {weight!r}")
        weights[name] = float(weight)
    if not weights:
        raise ValueError(f"specification must name at least one reward, got {specification!r}")
    return weights


def _one_box(response: str) -> float:
    text = response[-RESPONSE_LIMIT:]
    boxes = _boxes(text)
    return float(len(boxes) == 1 and bool(text[boxes[0][1] : boxes[0][2]].strip()))


def _request(name: str, response: str, answer: str | None, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker needs for one reward of one response; ValueError where the row has it not."""
    if name == "format":
        return {"response": response}
    if not isinstance(row, Mapping):
        raise ValueError(f"the row is a {type(row).__name__}, not a mapping")
    if name == "math":
        truths: Any = row.get("ground_truth")
        truths = truths.tolist() if hasattr(truths, "tolist") else truths
        truths = truths if isinstance(truths, list | tuple) else [truths]
        texts = [str(truth).strip() for truth in truths if truth is not None]
        if not any(texts):
            raise ValueError("the row has no ground_truth")
        read = _unmarked(response)[-ANSWER_LIMIT:] if answer is None else answer
        if len(read) > ANSWER_LIMIT:
            raise ValueError(f"the answer has {len(read)} characters, at most {ANSWER_LIMIT} are read")
        return {
            "answer": read,
            "whole": answer is not None,
            "ground_truth": [text for text in texts if text],
        }
    details = row.get("extra_info")
    if isinstance(details, str):
        try:
            details = json.loads(details)
        except json.JSONDecodeError as error:
            raise ValueError(f"the row's extra_info is no JSON: {error}") from error
    if name == "reasoning-gym":
        return {**_gym_task(row, details), "answer": _last_line(response) if answer is None else answer}
    given = {key: row.get(key) for key in ("id", "prompt", "data_source", "ground_truth")}
    return {"response": response, "row": {**given, "extra_info": details}}


def _last_line(response: str) -> str:
    return next((line.strip() for line in reversed(_unmarked(response).splitlines()) if line.strip()), "")


def _gym_task(row: Mapping[str, Any], details: Any) -> dict[str, Any]:
    details = details if isinstance(details, Mapping) else {}
    metadata = details.get("metadata")
    if not isinstance(metadata, Mapping):
        raise ValueError("the row's extra_info has no metadata of reasoning-gym")
    name = details.get("source_dataset") or metadata.get("source_dataset")
    if not isinstance(name, str):
        raise ValueError("the row's extra_info has no source_dataset, the name of a task of reasoning-gym")
    configuration = details.get("configuration")
    entry = {"question": details.get("question", ""), "answer": row.get("ground_truth"), "metadata": metadata}
    return {
        "task_name": name,
        "configuration": configuration if isinstance(configuration, Mapping) else {},
        "entry": entry,
    }
