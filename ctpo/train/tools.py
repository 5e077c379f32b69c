r"""Python as a tool of a language model, and the loop that lets a model use it.

Two forms of a call. "calls" is the one that the model was trained on: its chat template shows the tool and renders
calls and results, and TRL's parser reads them, so that what happens here and in TRL's trainer is the same. "fenced" is
for templates without tools: a ```python block in the text is run as soon as it is complete, and its output follows it
as an ```output block.

Either way the ids that the model sampled are kept as they are and never tokenized again. What is inserted is tokenized
by itself and marked as not sampled: it belongs neither to the loss, nor to the importance ratios, nor to the position
of a token.
"""

from __future__ import annotations

import asyncio
import bisect
import copy
import functools
import re
import textwrap
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ctpo.train.generation import Generator, LogpGenerator, Sampling, stopped
from ctpo.train.rewards import without_thoughts

if TYPE_CHECKING:
    from ctpo.train.sandbox import Sandbox, Session

__all__ = ["PythonTool", "Rollout", "ToolError", "ToolFormat", "Tools", "rollouts", "tool_format"]

Tools = Literal["none", "calls", "fenced", "auto"]
Message = dict[str, Any]

LANGUAGES = ("py", "python", "python3", "tool")
"""What a fenced block that is run may be marked with."""

MOST_OPEN = 256
# Measured: two files for a session in bubblewrap, three in Monty.
FILES_OF_A_SESSION = 3
OTHER_FILES = 128

THOUGHT = "<think>"
LAST_TOKENS = 32
"""More than a template writes from the opening of a thought to the end of a prompt, even a token a byte."""

NO_OUTPUT = "(no output; print what you want to see, or end with an expression)"

INSTRUCTIONS = """\
You can run Python. Write a block that begins with ```python and ends with ```; as soon as it is complete it is run, \
and an ```output block with what it printed follows. Variables and imports are kept from block to block. {library} \
Go on after the output: run another block, or give the answer.\
"""
LIBRARY = "The standard library, numpy and sympy can be imported."
MONTY_LIBRARY = (
    "It is a subset of Python without numpy, sympy and yield; modules such as math, re and itertools can be imported."
)


class ToolError(Exception):
    """A call failed; the message is what the model is shown: the output so far, then what Python says of the error."""


class PythonTool:
    """The tool `python`, as an environment of TRL's trainers: a session of the sandbox for every rollout.

    TRL makes a tool of every public method except `reset`; this class has one, `python`. Its description, which models
    are shown, says what the sandbox's backend can do. A failed call raises `ToolError`: TRL counts what is raised and
    shows the model its text.

    Args:
        sandbox: Where sessions come from; closing it closes the session of this tool, too.

    Attributes:
        calls: Calls since the last `reset`.
        failures: Those that failed.
        timeouts: Those that took too long.

    Example:
        >>> import asyncio
        >>> from ctpo.train.sandbox import open_sandbox
        >>> with open_sandbox() as sandbox:  # GRPOTrainer(..., environment_factory=lambda: PythonTool(sandbox))
        ...     tool = PythonTool(sandbox)
        ...     asyncio.run(tool.python("x = 6"))
        ...     asyncio.run(tool.python("x * 7"))
        '(no output; print what you want to see, or end with an expression)'
        '42'
    """

    def __new__(cls, sandbox: Sandbox) -> PythonTool:
        """The variant whose description fits the sandbox."""
        return super().__new__(_MontyTool if sandbox.backend == "monty" else cls)

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._session: Session | None = None
        self._begin()

    def reset(self, **row: Any) -> None:
        """Begin a rollout: nothing of the former one is left. The row of the data set is not needed."""
        self._close()
        self._begin()

    async def python(self, code: str) -> str:
        """Run Python code in a session that keeps variables and imports between calls, like a notebook.

        The standard library, numpy and sympy can be imported. There is no network. Code that takes too long is stopped.

        Args:
            code: The code to run.

        Returns:
            What the code printed, and the value of its last expression.
        """
        # One at a time and in order: the calls of one turn share the session.
        async with self._turn:
            return await asyncio.to_thread(self._run, code)

    def _begin(self) -> None:
        self.calls = self.failures = self.timeouts = 0
        self._turn = asyncio.Lock()

    def _close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def _run(self, code: str) -> str:
        self.calls += 1
        if not isinstance(code, str):
            self.failures += 1
            raise ToolError(f"TypeError: code must be a string of Python, got {type(code).__name__}")
        if self._session is None:
            self._session = self._sandbox.session()
        result = self._session.run(code)
        self.timeouts += result.timed_out
        if result.error:
            self.failures += 1
            raise ToolError("\n".join(part.rstrip("\n") for part in (result.output, result.error) if part))
        return result.output.rstrip("\n") or NO_OUTPUT


class _MontyTool(PythonTool):
    async def python(self, code: str) -> str:
        """Run Python code in a session that keeps variables and imports between calls, like a notebook.

        It is a subset of Python without numpy, sympy and yield; it has math, re, itertools and a few other modules.
        There is no network. Code that takes too long is stopped.

        Args:
            code: The code to run.

        Returns:
            What the code printed, and the value of its last expression.
        """
        return await super().python(code)


@dataclass(frozen=True)
class Rollout:
    """One answer of the model, with the calls on the way.

    Attributes:
        prompt_ids: The rendered prompt.
        completion_ids: Everything after it, outputs of the tool included.
        sampled: By token of the completion: whether the model chose it.
        messages: The completion as messages of the roles "assistant" and "tool".
        tool_calls: Calls that were asked for and answered, malformed ones included.
        tool_failures: Those that were malformed or failed.
        truncated: The limit of tokens ended the rollout: the model's text was cut, or no room was left for an output.
        out_of_rounds: The model asked for another call after the last round; it was not run, and the rollout ended.
        answer: What is scored: the text that the model wrote after the last output of the tool, without its thoughts
            and without white space around it. "" where a thought was never closed, also one that the prompt opened.
        logps: By token of the completion: the log-probability with which it was sampled, in nats; 0 where the model
            did not choose, None where the generator had none. None altogether without a `LogpGenerator`.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    sampled: list[bool]
    messages: list[Message]
    tool_calls: int
    tool_failures: int
    truncated: bool
    out_of_rounds: bool
    answer: str
    logps: list[float | None] | None = None


def rollouts(
    generator: Generator,
    prompts: Sequence[Sequence[Mapping[str, Any]]],
    *,
    sampling: Sampling,
    tools: Tools | ToolFormat = "auto",
    sandbox: Sandbox | None = None,
    max_rounds: int = 8,
    seed: int = 0,
    max_open: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    all_gather: Callable[[Any], list[Any]] | None = None,
) -> list[Rollout]:
    """Sample one answer to every prompt, running the calls that the model makes on the way.

    All rollouts in flight are continued together, then all their calls run at the same time, each rollout in a session
    of its own; where one is finished, the next prompt takes its place. The same prompts in the same order, options,
    `max_open` and seed give the same rollouts, as far as the calls do; a prompt sampled in other company gives another
    sample of the same distribution.

    Args:
        generator: What samples.
        prompts: Conversations, lists of messages {"role", "content"}. Repeat one to get several answers.
        sampling: How tokens are drawn. `max_tokens` bounds the whole completion, outputs of the tool included, as
            `max_completion_length` does in TRL.
        tools: "none", "calls", "fenced", or "auto": "calls" where the template has them, else "fenced". Or what
            `tool_format` has returned for these, for many calls of this function.
        sandbox: Where the calls run; needed unless `tools` is "none".
        max_rounds: Most turns with calls; one turn of form "calls" may hold several.
        seed: Of all samples, at least 0.
        max_open: Most rollouts in flight, each of which may hold a process, a few files and some MB of memory. By
            default 256, and fewer where the system's limit of open files (`ulimit -n`) has no room for so many; without
            tools all. Up to so many prompts, samples do not depend on it.
        chat_template_kwargs: Further variables of the chat template, as in {"enable_thinking": False}.
        all_gather: For several processes with one generator that all must call together, as often and with as many
            prompts (weights in shards, one server for all). Takes a value of this process and returns those of all, in
            the same order everywhere. A process that has fewer rollouts left than another then asks for samples that
            nobody needs.

    Returns:
        Rollouts in the order of the prompts.

    Raises:
        ValueError: An argument does not fit, or a prompt leaves no room in the model's context.

    Assumptions:
        Given the same outputs of the tool, the policy's probability of a rollout is the product of those of its sampled
        tokens. In form "fenced" one choice is left out: an end-of-turn token right after a complete block, which is
        dropped because the rollout goes on.

    Example:
        docs/tools.md has one that needs no download.

        >>> from ctpo.train.generation import open_generator
        >>> from ctpo.train.sandbox import open_sandbox
        >>> generator = open_generator("Qwen/Qwen3-0.6B")  # doctest: +SKIP
        >>> prompt = [{"role": "user", "content": "What is 123 * 456?"}]  # doctest: +SKIP
        >>> with open_sandbox() as sandbox:  # doctest: +SKIP
        ...     rollouts(generator, [prompt], sampling=Sampling(1024), sandbox=sandbox)[0].answer
        '123 * 456 = 56088'
    """
    for name, value, least in (("max_rounds", max_rounds, 0), ("seed", seed, 0), ("max_open", max_open, 1)):
        if name == "max_open" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a Sampling, as in Sampling(max_tokens=1024), got {sampling!r}")
    _check_prompts(prompts)
    if sandbox is not None and not callable(getattr(sandbox, "session", None)):
        raise ValueError(f"sandbox must be what ctpo.train.sandbox.open_sandbox returns, got {sandbox!r}")
    named = tools.name if isinstance(tools, ToolFormat) else tools
    if named != "none" and sandbox is None:
        raise ValueError(f"sandbox is needed to run the calls of tools={named!r}; see ctpo.train.sandbox.open_sandbox")
    if isinstance(tools, ToolFormat):
        if chat_template_kwargs is not None:
            raise ValueError(f"chat_template_kwargs are those of the given ToolFormat, got {chat_template_kwargs!r}")
        form = tools
    else:
        form = tool_format(
            generator.tokenizer,
            tools,
            backend="" if sandbox is None else sandbox.backend,
            eos_token_ids=generator.eos_token_ids,
            chat_template_kwargs=chat_template_kwargs,
        )
    states = []
    for i, prompt in enumerate(prompts):
        ids = form.prompt_ids(prompt)
        room = sampling.max_tokens if generator.context is None else generator.context - len(ids)
        if room < 1:
            raise ValueError(f"prompts[{i}] has {len(ids)} tokens; the model's context is {generator.context}")
        tool = None if sandbox is None else PythonTool(sandbox)
        logps: list[float | None] | None = [] if isinstance(generator, LogpGenerator) else None
        states.append(_State(ids, min(room, sampling.max_tokens), tool, logps))
    if max_open is None:
        max_open = max(len(states), 1) if form.name == "none" else _most_open()
    waiting, active, turn = deque(states), list[_State](), 0
    try:
        with ThreadPoolExecutor() as pool:
            while True:
                while waiting and len(active) < max_open:
                    active.append(waiting.popleft())
                alike: dict[tuple[str, ...], list[_State]] = {}
                for state in active:
                    state.stop = form._stop(state)
                    alike.setdefault(state.stop, []).append(state)
                # What all processes ask for together.
                asked = {stop: _Request.of(group, generator.context) for stop, group in alike.items()}
                asked = _Request.joined([asked] if all_gather is None else all_gather(asked))
                if not asked:
                    break
                for place, (stop, request) in enumerate(sorted(asked.items())):
                    group = alike.get(stop, [])
                    idle = [_spare_row(states, generator, request.tokens)] * (request.rows - len(group))
                    options = replace(sampling, max_tokens=request.tokens, stop=(*sampling.stop, *stop))
                    chosen = np.random.SeedSequence(seed, spawn_key=(turn, place))
                    _continue(generator, group, idle, options, int(chosen.generate_state(1)[0]))
                for state in active:
                    state.pending = [] if state.cut else form._read(state)
                    if state.pending and state.rounds == max_rounds:
                        state.pending, state.done, state.out_of_rounds = [], True, True
                calling = [state for state in active if state.pending]
                for state, found in zip(calling, pool.map(_State.answer_calls, calling), strict=True):
                    answers = [replace(answer, text=form._shown(answer)) for answer in found]
                    state.insert(form._render(state, answers), answers)
                for state in active:
                    if state.done and state.tool is not None:
                        state.tool._close()
                active, turn = [state for state in active if not state.done], turn + 1
    finally:
        for state in states:
            if state.tool is not None:
                state.tool._close()
    return [state.rollout(form._answer(state)) for state in states]


def _check_prompts(prompts: Any) -> None:
    right = "a list of messages such as {'role': 'user', 'content': '...'}"
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be a list of conversations, each {right}, got {prompts!r}")
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, (str, Mapping)) or not isinstance(prompt, Sequence) or not prompt:
            raise ValueError(f"prompts[{i}] must be {right}, got {prompt!r}")
        for j, message in enumerate(prompt):
            if not (
                isinstance(message, Mapping)
                and isinstance(message.get("role"), str)
                and (isinstance(message.get("content"), (str, list)) or "tool_calls" in message)
            ):
                raise ValueError(
                    f"prompts[{i}][{j}] must be a message such as {{'role': 'user', 'content': '...'}}, got {message!r}"
                )


def _most_open() -> int:
    """How many rollouts may hold a session by default: as many as the limit of open files allows, at most 256."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return MOST_OPEN
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MOST_OPEN
    return max(1, min(MOST_OPEN, (limit - OTHER_FILES) // FILES_OF_A_SESSION))


@dataclass(frozen=True)
class _Call:
    """A call as the model wrote it; `problem` says why it cannot be run."""

    name: str
    arguments: Any = None
    problem: str = ""


@dataclass(frozen=True)
class _Answer:
    name: str
    text: str
    failed: bool


@dataclass(eq=False)
class _State:
    """A rollout in the making."""

    prompt_ids: list[int]
    budget: int
    tool: PythonTool | None
    logps: list[float | None] | None = None
    completion: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    pending: list[_Call] = field(default_factory=list)
    turn_start: int = 0
    fresh: int = 0
    cut: bool = False
    stop: tuple[str, ...] = ()
    in_block: bool = False
    rounds: int = 0
    calls: int = 0
    failures: int = 0
    done: bool = False
    truncated: bool = False
    out_of_rounds: bool = False

    @property
    def room(self) -> int:
        return self.budget - len(self.completion)

    @property
    def row(self) -> list[int]:
        return self.prompt_ids + self.completion

    @property
    def turn(self) -> list[int]:
        """What the model wrote since the last output."""
        return self.completion[self.turn_start :]

    def extend(self, ids: list[int], logps: list[float | None] | None) -> None:
        """Go on with what the model wrote."""
        self.fresh = len(ids)
        self.completion += ids
        self.sampled += [True] * len(ids)
        if logps is None or self.logps is None:
            self.logps = None
        else:
            self.logps += logps[: len(ids)]

    def keep(self, tokens: int) -> None:
        """Drop what the model wrote after so many tokens of its turn."""
        end = self.turn_start + tokens
        del self.completion[end:], self.sampled[end:]
        if self.logps is not None:
            del self.logps[end:]

    def answer_calls(self) -> list[_Answer]:
        assert self.tool is not None
        return [_answer(self.tool, call) for call in self.pending]

    def insert(self, ids: list[int], answers: list[_Answer]) -> None:
        self.rounds += 1
        self.calls += len(answers)
        self.failures += sum(answer.failed for answer in answers)
        if len(ids) >= self.room:
            # As in TRL, an output that does not fit is not shown.
            self.done = self.truncated = True
            return
        self.completion += ids
        self.sampled += [False] * len(ids)
        if self.logps is not None:
            self.logps += [0.0] * len(ids)
        self.messages += [{"role": "tool", "name": answer.name, "content": answer.text} for answer in answers]
        self.turn_start = len(self.completion)

    def rollout(self, answer: str) -> Rollout:
        return Rollout(
            prompt_ids=self.prompt_ids,
            completion_ids=self.completion,
            sampled=self.sampled,
            messages=self.messages,
            tool_calls=self.calls,
            tool_failures=self.failures,
            truncated=self.truncated,
            out_of_rounds=self.out_of_rounds,
            answer=answer,
            logps=self.logps,
        )


@dataclass(frozen=True)
class _Request:
    """What a process needs of a call of the generator, or all of them together."""

    rows: int
    tokens: int
    most: int | None
    """Tokens for which the longest row leaves room in the model's context."""

    @classmethod
    def of(cls, group: Sequence[_State], context: int | None) -> _Request:
        most = None if context is None else context - max(len(state.row) for state in group)
        return cls(len(group), max(state.room for state in group), most)

    @staticmethod
    def joined(asked: Sequence[Mapping[tuple[str, ...], _Request]]) -> dict[tuple[str, ...], _Request]:
        """One call for all processes, by stop strings."""
        found = {}
        for stop in {stop for one in asked for stop in one}:
            requests = [one[stop] for one in asked if stop in one]
            tokens = max(request.tokens for request in requests)
            most = min((request.most for request in requests if request.most is not None), default=None)
            # Some servers refuse a request that could leave the context, where others would end at it.
            tokens = tokens if most is None else min(tokens, most)
            found[stop] = _Request(max(request.rows for request in requests), tokens, most)
        return found


def _spare_row(states: Sequence[_State], generator: Generator, tokens: int) -> list[int]:
    """A row to complete a process's call with, whose sample nobody needs."""
    # After all that a finished rollout says but for its end, the model most probably ends it at once, and a server
    # that keeps what it has computed for former calls has it all. Else any row will do.
    rows = sorted((state.row[:-1] for state in states if state.row[-1] in generator.eos_token_ids), key=len)
    rows += [*sorted((state.prompt_ids for state in states), key=len)[:1], [0]]
    return next(row for row in rows if generator.context is None or len(row) + tokens <= generator.context)


def _continue(generator: Generator, active: list[_State], idle: list[list[int]], sampling: Sampling, seed: int) -> None:
    rows = [state.row for state in active] + idle
    logps: list[list[float | None]] | None = None
    if isinstance(generator, LogpGenerator):
        sampled, logps = generator.generate_with_logps(rows, sampling, seed)
    else:
        sampled = generator.generate(rows, sampling, seed)
    for place, state in enumerate(active):
        ids = sampled[place][: state.room]
        ended = bool(ids) and (ids[-1] in generator.eos_token_ids or stopped(generator.tokenizer, ids, sampling.stop))
        state.cut = len(ids) == sampling.max_tokens < state.room and not ended
        state.extend(ids, None if logps is None else logps[place])


def _answer(tool: PythonTool, call: _Call) -> _Answer:
    if call.problem:
        return _Answer(call.name, call.problem, failed=True)
    if not isinstance(call.arguments, Mapping):
        kind = {str: "a string", list: "an array", type(None): "null"}.get(type(call.arguments), "a number")
        return _Answer(call.name, f'arguments must be an object, such as {{"code": "1 + 1"}}; got {kind}', failed=True)
    try:
        tool.python(**call.arguments).close()
    except TypeError as error:  # arguments that do not fit, in Python's own words, as TRL shows them
        return _Answer(call.name, str(error), failed=True)
    try:
        return _Answer(call.name, tool._run(call.arguments["code"]), failed=False)
    except ToolError as error:
        return _Answer(call.name, str(error), failed=True)


def tool_format(
    tokenizer: Any,
    tools: Tools = "auto",
    *,
    backend: str = "",
    eos_token_ids: frozenset[int] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ToolFormat:
    """The form of calls for a model.

    Args:
        tokenizer: Its tokenizer, with a chat template.
        tools: As in `rollouts`.
        backend: Of the sandbox; the description of the tool depends on it.
        eos_token_ids: Ids that end a turn; the tokenizer's by default.
        chat_template_kwargs: As in `rollouts`.

    Returns:
        The form; its `name` says what "auto" has chosen.

    Raises:
        ValueError: `tools` is unknown, the tokenizer has no chat template, or "calls" was asked for and the template
            has none that TRL can read.

    Example:
        >>> from types import SimpleNamespace
        >>> tool_format(SimpleNamespace(chat_template=None), "auto")
        Traceback (most recent call last):
        ...
        ValueError: the tokenizer has no chat_template; set one, or use a model that is trained to chat
    """
    if tools not in get_args(Tools):
        raise ValueError(f"tools must be one of {', '.join(map(repr, get_args(Tools)))}, got {tools!r}")
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat_template; set one, or use a model that is trained to chat")
    if not isinstance(chat_template_kwargs, (Mapping, type(None))):
        raise ValueError(f"chat_template_kwargs must be a mapping of names to values, got {chat_template_kwargs!r}")
    eos = frozenset({tokenizer.eos_token_id} - {None}) if eos_token_ids is None else eos_token_ids
    options = dict(chat_template_kwargs or {})
    if tools == "none":
        return ToolFormat(tokenizer, eos, options)
    if tools == "fenced":
        return _Fenced(tokenizer, eos, options, backend)
    try:
        return _Calls(tokenizer, eos, options, backend)
    except ValueError as error:
        if tools == "auto":
            return _Fenced(tokenizer, eos, options, backend)
        raise ValueError(f"tools='calls': {error} tools='fenced' works with every chat template.") from error


class ToolFormat:
    """How a model is shown the tool and how its calls are read; this one is for no tools at all.

    Attributes:
        name: "none", "calls" or "fenced".
    """

    name = "none"

    def __init__(self, tokenizer: Any, eos: frozenset[int], options: dict[str, Any]) -> None:
        self._tokenizer, self._eos, self._options = tokenizer, eos, options
        added = (token for token in tokenizer.get_added_vocab() if len(token) > 2)
        controls = sorted((token for token in added if not re.fullmatch(r"[\s\w]*", token)), key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, controls)) or r"(?!)")
        specials = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._specials = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The rendered prompt, with what it says of the tool, up to where the model's answer begins."""
        return self._ids(messages, add_generation_prompt=True)

    def _stop(self, state: _State) -> tuple[str, ...]:
        """Strings at which the model is interrupted."""
        return ()

    def _read(self, state: _State) -> list[_Call]:
        """Calls of the turn that was just sampled; sets flags and messages of the rollout."""
        self._end(state)
        state.messages.append({"role": "assistant", "content": self._text(state.turn)})
        return []

    def _answer(self, state: _State) -> str:
        """What is scored of a rollout that is finished."""
        # Tags of thoughts may be special tokens, which the text of a message does not have.
        return self._specials.sub("", without_thoughts(self._opening_of_turn(state) + self._raw(state.turn))).strip()

    def _opening_of_turn(self, state: _State) -> str:
        """The tag of the thought in which the turn begins, or ""."""
        # The whole completion is one message; what a program printed is no part of it.
        before = zip(state.completion[: state.turn_start], state.sampled[: state.turn_start], strict=True)
        said = self._opening_after(state.prompt_ids) + self._raw([token for token, sampled in before if sampled])
        return THOUGHT if said.rfind(THOUGHT) > said.rfind("</think>") else ""

    def _opening_after(self, ids: list[int]) -> str:
        return THOUGHT if self._raw(ids[-LAST_TOKENS:]).rstrip().endswith(THOUGHT) else ""

    def _raw(self, ids: list[int]) -> str:
        return self._text(ids, special=True)

    def _shown(self, answer: _Answer) -> str:
        """What the model sees of an answer: no control token, so that a program cannot end the turn it is shown in."""
        text = answer.text.encode("utf-8", "replace").decode()
        while self._controls.search(text):  # a token may hold another one
            text = self._controls.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        return text

    def _render(self, state: _State, answers: list[_Answer]) -> list[int]:
        """Ids that follow the turn: the outputs, and what leads to the model's next turn."""
        raise AssertionError("a rollout without tools has no calls")

    def _end(self, state: _State) -> None:
        state.done = True
        state.truncated = state.room == 0 and not self._ended(state)

    def _ended(self, state: _State) -> bool:
        turn = state.turn
        return bool(turn) and turn[-1] in self._eos

    def _text(self, ids: list[int], *, special: bool = False) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=not special))

    def _ids(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        rendered = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=True, return_dict=False, **options, **self._options
        )
        return list(rendered)


class _Calls(ToolFormat):
    """The tool calls of the chat template, read by TRL's parser."""

    name = "calls"

    def __init__(self, tokenizer: Any, eos: frozenset[int], options: dict[str, Any], backend: str) -> None:
        from transformers.utils.chat_template_utils import get_json_schema
        from trl import chat_template_utils as trl

        if not trl.supports_tool_calling(tokenizer):
            raise ValueError("the chat template does not render tool calls and their results.")
        # What TRL sets on a tokenizer is set on a copy.
        super().__init__(copy.copy(tokenizer), eos, options)
        if getattr(tokenizer, "response_template", None) is None:
            trl.add_response_schema(self._tokenizer)
        self._template = None
        if not trl.is_chat_template_prefix_preserving(tokenizer):
            self._template = trl.get_training_chat_template(tokenizer)
        # Of a method, without a sandbox to make its object with.
        self._schema = get_json_schema(object.__new__(_MontyTool if backend == "monty" else PythonTool).python)
        opening = self._tokenizer.response_template["fields"].get("tool_calls")
        if opening is None:
            raise ValueError("the tokenizer's response_template has no tool_calls.")
        self._opening = re.compile(opening.get("open_pattern") or re.escape(opening["open"]))
        self._parse: Callable[..., Message] = trl.parse_response

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self._ids(messages, add_generation_prompt=True, tools=[self._schema])

    def _read(self, state: _State) -> list[_Call]:
        self._end(state)
        message, problem = self._message(state)
        state.messages.append(message)
        if state.truncated:  # half a call, perhaps
            return []
        if problem:
            calls = [_Call("python", problem=problem)]
        else:
            calls = [self._call(call) for call in message.get("tool_calls") or []]
        state.done = not calls
        return calls

    def _answer(self, state: _State) -> str:
        # The parser takes thoughts out, also those in other tags, but not all that a model may open and leave open.
        said = super()._answer(state)
        return said and without_thoughts(state.messages[-1]["content"]).strip()

    def _opening_of_turn(self, state: _State) -> str:
        return self._opening_after(state.prompt_ids + state.completion[: state.turn_start])

    def _shown(self, answer: _Answer) -> str:
        # As TRL shows what a tool raises.
        return super()._shown(replace(answer, text=str({"error": answer.text})) if answer.failed else answer)

    def _render(self, state: _State, answers: list[_Answer]) -> list[int]:
        # TRL's way, which its trainer does not offer as a function: what a template puts after an assistant's turn is
        # the difference of two renderings, without and with the results, of a conversation that does not matter.
        before = _conversation(answers[0].name)
        after: list[Message] = [{"role": "tool", "name": answer.name, "content": answer.text} for answer in answers]
        prefix = self._up_to_end(before)
        whole = self._ids([*before, *after], add_generation_prompt=True)
        if whole[: len(prefix)] != prefix:
            raise ValueError("the chat template renders a turn otherwise when results of tools follow it")
        suffix = whole[len(prefix) :]
        # In a few formats (GLM) the token that ends the turn is the one that begins the results.
        return suffix[suffix[:1] == state.turn[-1:] and self._ended(state) :]

    def _up_to_end(self, messages: list[Message]) -> list[int]:
        """The conversation up to the token that ends it: what a template writes after that belongs to what follows."""
        ids = self._ids(messages, add_generation_prompt=False)
        end = max((i for i, token in enumerate(ids) if token in self._eos), default=len(ids) - 1) + 1
        return ids if self._text(ids[end:]).strip() else ids[:end]

    @functools.cached_property
    def _usual_end(self) -> int:
        """The token that ends a call where the template renders one."""
        return self._up_to_end(_conversation("python"))[-1]

    def _ids(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        return super()._ids(messages, chat_template=self._template, **options)

    def _message(self, state: _State) -> tuple[Message, str]:
        """The turn as a message, and what is wrong with its call where it has one that cannot be read."""
        turn = state.turn
        if not turn:
            return {"role": "assistant", "content": ""}, ""
        prefix = state.prompt_ids + state.completion[: state.turn_start]
        message = self._parsed(turn, prefix)
        if "tool_calls" in message:
            return message, ""
        if self._ended(state) and turn[-1] != self._usual_end:
            # Llama ends some calls with <|eom_id|>, which the parser takes for text: read as if by the usual token.
            usual = self._parsed([*turn[:-1], self._usual_end], prefix)
            if "tool_calls" in usual:
                return usual, ""
            message["content"] = message["content"].removesuffix(self._raw(turn[-1:]))
        raw = self._raw(turn)
        if not self._opening.search(raw):
            return message, ""
        try:
            self._tokenizer.parse_response(turn, prefix=prefix, tools=[self._schema])
        except Exception as error:
            reason = str(error).rpartition("\nError: ")[2]  # without the call once more
            return message, f"Malformed tool call: {reason}"
        # A model may think about calls without making one.
        thought = message.get("reasoning_content") or message.get("thinking")
        rest = raw.replace(thought, "", 1) if thought else without_thoughts(self._opening_of_turn(state) + raw)
        return message, "Malformed tool call: it is not complete" if self._opening.search(rest) else ""

    def _parsed(self, turn: list[int], prefix: list[int]) -> Message:
        try:
            return self._parse(self._tokenizer, turn, prefix=prefix, tools=[self._schema])
        except RecursionError:  # JSON that is nested too deeply
            return {"role": "assistant", "content": self._text(turn)}

    @staticmethod
    def _call(call: Message) -> _Call:
        function = call.get("function", call)
        name = function["name"]
        if name != "python":
            return _Call(name, problem=f"Tool {name} not found.")
        return _Call(name, function["arguments"])


def _conversation(tool: str) -> list[Message]:
    """One that does not matter, to see how a template renders a call of the tool."""
    called = {"type": "function", "function": {"name": tool, "arguments": {}}}
    return [{"role": "user", "content": "-"}, {"role": "assistant", "content": "", "tool_calls": [called]}]


class _Fenced(ToolFormat):
    """Blocks of code in the text."""

    name = "fenced"

    def __init__(self, tokenizer: Any, eos: frozenset[int], options: dict[str, Any], backend: str) -> None:
        super().__init__(tokenizer, eos, options)
        self._instructions = INSTRUCTIONS.format(library=MONTY_LIBRARY if backend == "monty" else LIBRARY)

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        from jinja2 import TemplateError

        shown = [dict(message) for message in messages]
        if shown and shown[0]["role"] == "system":
            shown[0]["content"] = f"{shown[0]['content']}\n\n{self._instructions}"
        else:
            shown.insert(0, {"role": "system", "content": self._instructions})
        try:
            return super().prompt_ids(shown)
        except TemplateError:  # Gemma's template, for one, has no system message
            first, *rest = [dict(message) for message in messages]
            first["content"] = f"{self._instructions}\n\n{first['content']}"
            return super().prompt_ids([first, *rest])

    def _stop(self, state: _State) -> tuple[str, ...]:
        # Not at every fence: a model that writes one after the other would begin anew after each.
        return ("```\n",) if state.in_block else tuple(f"```{language}\n" for language in LANGUAGES)

    def _read(self, state: _State) -> list[_Call]:
        self._end(state)
        text = self._text(state.turn)
        block, state.in_block = _first_block(text)
        if block is not None:
            # What was written before the output could be seen does not count.
            state.keep(self._tokens(state.turn, block.end))
            state.messages.append({"role": "assistant", "content": self._text(state.turn)})
            state.truncated = state.done = False
            return [_Call("python", {"code": block.code})]
        interrupted = any(end in self._text(state.turn[-state.fresh :]) for end in state.stop)
        if interrupted and not (state.truncated or self._ended(state)):
            state.done = False
        else:
            state.messages.append({"role": "assistant", "content": text})
        return []

    def _render(self, state: _State, answers: list[_Answer]) -> list[int]:
        output = answers[0].text
        fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", output)), 0)
        newline = "" if state.messages[-1]["content"].endswith("\n") else "\n"
        inserted = f"{newline}{fence}output\n{output}\n{fence}\n"
        return list(self._tokenizer.encode(inserted, add_special_tokens=False))

    def _tokens(self, ids: list[int], end: int) -> int:
        """The fewest tokens whose text has `end` characters of that of all."""
        return bisect.bisect_left(range(len(ids)), end, key=lambda n: len(self._text(ids[:n])))


@dataclass(frozen=True)
class _Block:
    code: str
    end: int


def _first_block(text: str) -> tuple[_Block | None, bool]:
    """The first complete block of Python in a text, others passed over; and whether one is open where the text ends."""
    opened: tuple[int, bool] | None = None  # length of the fence, whether the block is Python
    code: list[str] = []
    end = 0
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        end += len(line)
        match = re.fullmatch(r"[ \t]*(`{3,})([^`\r\n]*)\r?\n?", line)
        if opened is None:
            if match and line.endswith("\n"):
                language = match[2].split()[0].lower() if match[2].strip() else ""
                opened, code = (len(match[1]), language in LANGUAGES), []
        elif match and not match[2].strip() and len(match[1]) >= opened[0]:
            if opened[1]:
                return _Block(textwrap.dedent("".join(code)), end), False
            opened = None
        else:
            code.append(line)
    return None, opened is not None and opened[1]
