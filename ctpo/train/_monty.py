"""Sessions in the interpreter of pydantic-monty: no files, no network, no processes, nothing of the host by design.

The code sees a subset of Python. Values never cross to the host, where a small one could unfold without bound: the
interpreter itself prints the last expression's value, and keeps it in `_`. The message of an exception that the code
does not catch does cross: for a moment it may take three times its size of the host's memory. That size is within
`Limits.memory`, and within 256 MiB, where the pool ends the worker.

The thread of the event loop serves all sessions: what takes time that grows with the code is done by the caller's.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import threading
import time
import traceback
from collections.abc import Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ctpo.train._jail.notebook import Capture
from ctpo.train.sandbox import MOST_CODE, Limits, Reply, SandboxUnavailable, WorkerLost

if TYPE_CHECKING:
    from pydantic_monty import AsyncMonty, AsyncMontySession, MontyRuntimeError, MontySyntaxError

    _Error: TypeAlias = MontySyntaxError | MontyRuntimeError

_Result = TypeVar("_Result")
_INSTALL = 'pip install "pydantic-monty>=1.4,<1.5"'
_START, _GRACE, _END = 60.0, 1.0, 10.0
_SETTLE = 0.2  # after a call was cut off: a thread of Monty aborts the process if Python ends while it tells so
_MOST_WORKERS = 4096
_LONGEST_LINE = 300
_VALUE = "_last_value_"
_SHOW = f"\n)\nif {_VALUE} is not None:\n    print(repr({_VALUE}))\n    _ = {_VALUE}\nNone"
_COMPOUND = (
    *("if", "elif", "else", "for", "while", "with", "try", "except", "finally"),
    *("class", "def", "async", "@"),
)
_LINE_END = re.compile(r"\r\n|\r|\n")
# Nothing matches in two ways and a quote without its end is a token by itself, at which the search ends: the time is
# linear in the code. Groups are not possessive: before 3.11.5 Python loses matches of those (gh-106052).
_TOKEN = re.compile(
    r"""
    (?P<space> [ \t\f\ufeff]++ | \#[^\r\n]*+ | \\(?:\r\n|\r|\n) )
    | (?P<newline> \r\n | \r | \n )
    | (?P<string> \"{3} [^"\\]*+ (?: (?: \\. | "(?!"") ) [^"\\]*+ )* \"{3}
                | '{3} [^'\\]*+ (?: (?: \\. | '(?!'') ) [^'\\]*+ )* '{3}
                | "(?!"") [^"\\\r\n]*+ (?: \\(?:\r\n|.) [^"\\\r\n]*+ )* "
                | '(?!'') [^'\\\r\n]*+ (?: \\(?:\r\n|.) [^'\\\r\n]*+ )* ' )
    | (?P<opening> [(\[{] ) | (?P<closing> [)\]}] )
    | \w++ | .
    """,
    re.DOTALL | re.VERBOSE,
)
_used_by: int | None = None  # the process that started Monty's threads, which a fork does not have


class MontyPool:
    """Starts sessions, each in a process of its own, driven by one event loop in a thread.

    Raises:
        SandboxUnavailable: pydantic-monty or its program is missing or does not run.
    """

    def __init__(self, limits: Limits) -> None:
        try:
            import pydantic_monty
        except ImportError as error:
            raise SandboxUnavailable(f"{error}: {_INSTALL}") from None
        global _used_by
        if _used_by not in (None, os.getpid()):
            raise SandboxUnavailable(
                "this process was forked from one that had used Monty, whose threads it lacks: start it by the method "
                '"spawn", multiprocessing.get_context("spawn")'
            )
        _used_by = os.getpid()
        self._limits = limits
        self._closed = False
        self.cut_off = -math.inf  # when a call was, last
        self._lock = threading.RLock()  # a signal handler, or the garbage collector, may close what this thread opens
        self._whole: set[asyncio.Task[Any]] = set()  # starts and ends; like the next, for the thread of the loop only
        self._sessions: set[AsyncMontySession] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="ctpo-monty", daemon=True)
        self._thread.start()
        try:
            self._pool: AsyncMonty = self.submit(self._enter(pydantic_monty.AsyncMonty)).result(_START)
            worker = self.start(30.0)
            try:
                reply = worker.run("6 * 7", 30.0)
            finally:
                worker.close()
            if reply != ("42\n", "", False):
                raise RuntimeError(f"6 * 7 gives {reply}")
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception) or isinstance(error, SandboxUnavailable):
                raise
            reason = str(error).partition(";")[0] or type(error).__name__
            raise SandboxUnavailable(f"a trial failed ({reason}): {_INSTALL}") from None

    @staticmethod
    async def _enter(pool: type[AsyncMonty]) -> AsyncMonty:
        # A process serves one session only: nothing can be left behind for the next.
        return await pool(max_processes=_MOST_WORKERS, max_checkouts_per_worker=1).__aenter__()

    def _serve(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def submit(self, coroutine: Coroutine[Any, Any, _Result]) -> Future[_Result]:
        """Run a coroutine in the thread of the pool."""
        with self._lock:  # what is submitted before the pool is closed is there for `_leave` to end
            try:
                if not self._closed:
                    return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            except RuntimeError:  # closed a moment ago, by a signal handler
                pass
        coroutine.close()
        raise ValueError("run: the sandbox is closed")

    def start(self, timeout: float) -> _Worker:
        """A worker for a session; none of its calls takes longer than the first or than the limit."""
        most = max(timeout, self._limits.timeout)
        future = self.submit(self._checkout(most))
        try:
            session = future.result(_START)
        except Exception as error:
            if self._closed:
                raise ValueError("run: the sandbox is closed") from None
            raise SandboxUnavailable(f"a session does not start: {type(error).__name__}: {error}") from None
        finally:
            future.cancel()  # no longer waited for: an interrupt, or too late
        return _Worker(self, session, self._limits, most)

    async def _checkout(self, most: float) -> AsyncMontySession:
        session = self._pool.checkout(
            limits={
                "max_memory": self._limits.memory,
                "max_suspensions": 1_000_000,
                # Calls are stopped from here; this ends the process of a host that was killed.
                "max_feed_duration_secs": most + _GRACE,
            },
            os_policy={"sleep": "system", "sleep_system_max": math.inf},
            assert_message_annotations=False,
        )
        with self._not_cut_off():
            session = await session.__aenter__()
            self._sessions.add(session)
        return session

    @contextlib.contextmanager
    def _not_cut_off(self) -> Iterator[None]:
        """What takes milliseconds, and would hold up the end of the pool for seconds if it were cancelled."""
        task = asyncio.current_task()
        assert task is not None
        self._whole.add(task)
        try:
            yield
        finally:
            self._whole.discard(task)

    def release(self, session: AsyncMontySession) -> None:
        """End a session, and with it its process."""
        with contextlib.suppress(Exception):  # closed: then it has ended already
            ended = self.submit(self._return(session))
            if threading.current_thread() is not self._thread:
                ended.result(_END)

    async def _return(self, session: AsyncMontySession) -> None:
        with self._not_cut_off():
            self._sessions.discard(session)
            await session.__aexit__(None, None, None)

    def close(self) -> None:
        """Kill all processes."""
        with self._lock:
            if self._closed:
                return
            self.submit(self._leave())
            self._closed = True
        if threading.current_thread() is not self._thread:
            self._thread.join(_END)

    async def _leave(self) -> None:
        try:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others - self._whole:
                task.cancel()
            if others:
                await asyncio.wait(others, timeout=_END / 4)
            await asyncio.gather(*map(self._return, tuple(self._sessions)), return_exceptions=True)
            if hasattr(self, "_pool"):
                await self._pool.__aexit__(None, None, None)
            await asyncio.sleep(self.cut_off + _SETTLE - time.monotonic())
        finally:
            self._loop.stop()


class _Worker:
    """A session."""

    def __init__(self, pool: MontyPool, session: AsyncMontySession, limits: Limits, most: float) -> None:
        self._pool = pool
        self._most = most
        self._session = session
        self._limits = limits
        self._count = 0
        self._cells: dict[int, str] = {}  # the last ones by number, for tracebacks
        self._feeds: dict[str, tuple[int, int, int]] = {}  # file name: cell, line and length of an inserted prefix
        self._used = 0.0
        self._call: Future[_Error | None] | None = None
        self._killed = False
        self._closed = False

    def run(self, code: str, timeout: float) -> Reply:
        """Run a cell."""
        capture = Capture(self._limits.output)
        left = self._limits.cpu - self._used
        timeout = min(timeout, self._most)
        start = time.monotonic()
        self._remember(code)
        sources = self._sources(code)
        try:
            self._call = self._pool.submit(self._run(sources, capture, min(timeout, left)))
            if self._killed:  # a moment ago, when there was no call to cancel
                self._call.cancel()
            error = self._call.result()
        except TimeoutError:
            if left <= timeout:
                reason = f"The worker was killed: the session used up its {self._limits.cpu:g} s of processor time."
                raise WorkerLost(reason, output=capture.text(), timed_out=True) from None
            reason = f"TimeoutError: the call took longer than {timeout:g} s; its worker was killed."
            raise WorkerLost(reason, output=capture.text(), timed_out=True) from None
        except CancelledError:
            raise WorkerLost("The worker was killed.") from None
        except Exception as lost:
            from pydantic_monty import MontyCrashedError

            reason = "died" if isinstance(lost, MontyCrashedError) else "failed"
            raise WorkerLost(f"The worker {reason}: {lost}.", output=capture.text()) from None
        finally:
            self._used += time.monotonic() - start
        return Reply(capture.text(), "" if error is None else self._shown(error), False)

    def _remember(self, code: str) -> None:
        self._count += 1
        self._cells[self._count] = code
        while sum(map(len, self._cells.values())) > 2 * MOST_CODE:
            del self._cells[min(self._cells)]

    def _sources(self, code: str) -> list[tuple[str, int, int]]:
        """What to feed, with the line and length of a prefix; the second where the first is no Python.

        Then the last statement was no expression, and nothing has run.
        """
        sources = [(f"{code}\nNone", 0, 0)]
        if (place := _last_statement(code)) is not None:
            line, offset = place
            prefix = f"{_VALUE} = ("
            sources.insert(0, (f"{code[:offset]}{prefix}{code[offset:]}{_SHOW}", line, len(prefix)))
        return sources

    async def _run(self, sources: list[tuple[str, int, int]], capture: Capture, timeout: float) -> _Error | None:
        try:
            return await asyncio.wait_for(self._cell(sources, capture), timeout)
        except (TimeoutError, asyncio.CancelledError):
            self._pool.cut_off = time.monotonic()
            raise

    async def _cell(self, sources: list[tuple[str, int, int]], capture: Capture) -> _Error | None:
        from pydantic_monty import MontyRuntimeError, MontySyntaxError

        error: _Error | None = None
        for source, line, shift in sources:
            self._feeds[f"<python-input-{len(self._feeds)}>"] = self._count, line, shift
            try:
                await self._session.feed_run(source, print_callback=lambda _, text: capture.write(text))
                return None
            except MontySyntaxError as no_python:
                error = no_python
            except MontyRuntimeError as raised:
                return raised
        return error

    def _shown(self, error: _Error) -> str:
        from pydantic_monty import MontySyntaxError

        capture = Capture(self._limits.output)
        capture.write(self._place(error) if isinstance(error, MontySyntaxError) else self._traceback(error))
        capture.write(error.display("type-msg"))
        return capture.text()

    def _traceback(self, error: MontyRuntimeError) -> str:
        """As CPython prints it, with the code's own lines."""
        frames = []
        lines = {number: _LINE_END.split(code) for number, code in self._cells.items()}
        for frame in error.traceback():
            cell, line, shift = self._feeds.get(frame.filename, (0, 0, 0))
            own = lines.get(cell, [])
            if cell == self._count and frame.line > len(own):
                continue  # what prints the value
            text = own[frame.line - 1] if frame.line <= len(own) else ""
            short = 0 < len(text) <= _LONGEST_LINE  # only then the place in it, found by Python's own parser
            moved = shift if frame.line == line else 0
            moved_end = shift if frame.end_line == line else 0
            frames.append(
                traceback.FrameSummary(
                    f"<cell {cell}>" if cell else frame.filename,
                    frame.line,
                    frame.function_name or "<module>",
                    lookup_line=False,
                    line=text[:_LONGEST_LINE] + "\n",
                    end_lineno=frame.end_line,
                    colno=frame.column - 1 - moved if short else None,
                    end_colno=frame.end_column - 1 - moved_end if short else None,
                )
            )
        head = "Traceback (most recent call last):\n" if frames else ""
        return head + "".join(traceback.StackSummary.from_list(frames).format())

    def _place(self, error: MontySyntaxError) -> str:
        lines = _LINE_END.split(self._cells[self._count])
        for frame in error.traceback()[-1:]:
            line = min(frame.line, len(lines))
            if line:
                text = lines[line - 1]
                where = f'  File "<cell {self._count}>", line {line}\n    {text.strip()[:_LONGEST_LINE]}\n'
                if len(text) > _LONGEST_LINE:
                    return where
                column = min(frame.column, len(text) + 1) - (len(text) - len(text.lstrip()))
                return f"{where}    {' ' * (column - 1)}^\n"
        return ""

    def kill(self) -> None:
        """End it from any thread."""
        self._killed = True
        if self._call is not None:
            self._call.cancel()

    def close(self) -> None:
        """End the session, and with it its process."""
        if not self._closed:
            self._closed = True
            self.kill()
            self._pool.release(self._session)


def _last_statement(code: str) -> tuple[int, int] | None:
    """Line and offset of the last statement, if it could be an expression.

    Python's tokenizer and parser are not for hostile code in one's own process: this knows strings, comments, brackets
    and the ends of lines, in linear time. Where it is wrong Monty finds a syntax error, and nothing has run.
    """
    start: int | None = None
    line, lines, depth = 1, 1, 0
    fresh, after, simple = True, False, True
    for token in _TOKEN.finditer(code):
        kind, text = token.lastgroup, token[0]
        if kind == "space":
            lines += text[0] == "\\"
            continue
        if kind == "newline":
            lines += 1
            if not depth:
                fresh, after = True, False
            continue
        if fresh or (after and text != ";"):
            if fresh:
                simple = text not in _COMPOUND and (not token.start() or code[token.start() - 1] in "\r\n\f\ufeff")
            start = token.start() if simple else None
            line, fresh, after = lines, False, False
        if kind == "string":
            lines += len(_LINE_END.findall(text))
        elif kind == "opening":
            depth += 1
        elif kind == "closing":
            depth -= 1
        elif text == ";" and not depth:
            after = simple
        elif text in "'\"":
            return None  # a string without its end
        if depth < 0:
            return None
    return None if start is None or depth else (line, start)
