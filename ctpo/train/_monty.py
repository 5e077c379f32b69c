"""Sessions in the interpreter of pydantic-monty: no files, no network, no processes, nothing of the host by design.

The code sees a subset of Python. Values never cross to the host, where a small one could unfold without bound: the
interpreter itself prints the last expression's value.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
import threading
import time
import tokenize
import traceback
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any, TypeVar

from ctpo.train._jail.notebook import Capture, capped
from ctpo.train.sandbox import Limits, Reply, SandboxUnavailable, WorkerLost

if TYPE_CHECKING:
    from pydantic_monty import AsyncMonty, AsyncMontySession, MontyRuntimeError, MontySyntaxError

_Result = TypeVar("_Result")
_INSTALL = 'pip install "pydantic-monty>=1.4,<1.5"'
_START, _GRACE = 60.0, 1.0
_MOST_WORKERS = 4096
_VALUE = "_last_value_"
_SHOW = f"\n)\nif {_VALUE} is not None: print(repr({_VALUE}))\nNone"
_COMPOUND = ("if", "for", "while", "with", "try", "class", "def", "async", "match", "@")


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
        self._limits = limits
        self._closed = False
        self._lock = threading.Lock()
        self._sessions: set[AsyncMontySession] = set()  # changed by the thread of the loop only
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ctpo-monty", daemon=True)
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
        except SandboxUnavailable:
            self.close()
            raise
        except Exception as error:
            self.close()
            reason = str(error).partition(";")[0] or type(error).__name__
            raise SandboxUnavailable(f"a trial failed ({reason}): {_INSTALL}") from None

    @staticmethod
    async def _enter(pool: type[AsyncMonty]) -> AsyncMonty:
        # A process serves one session only: nothing can be left behind for the next.
        return await pool(max_processes=_MOST_WORKERS, max_checkouts_per_worker=1).__aenter__()

    def submit(self, coroutine: Coroutine[Any, Any, _Result]) -> Future[_Result]:
        """Run a coroutine in the thread of the pool."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def start(self, timeout: float) -> _Worker:
        """A worker for a session; none of its calls takes longer than the first or than the limit."""
        if self._closed:
            raise ValueError("run: the sandbox is closed")
        most = max(timeout, self._limits.timeout)
        try:
            session = self.submit(self._checkout(most)).result(_START)
        except Exception as error:
            raise SandboxUnavailable(f"a session does not start: {type(error).__name__}: {error}") from None
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
        session = await session.__aenter__()
        self._sessions.add(session)
        return session

    def release(self, session: AsyncMontySession) -> None:
        """End a session, and with it its process."""
        if not self._closed:
            with contextlib.suppress(Exception):
                self.submit(self._return(session)).result(10.0)

    async def _return(self, session: AsyncMontySession) -> None:
        self._sessions.discard(session)
        await session.__aexit__(None, None, None)

    def close(self) -> None:
        """Kill all processes."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if hasattr(self, "_pool"):
            with contextlib.suppress(Exception):
                self.submit(self._leave()).result(10.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        if not self._loop.is_running():
            self._loop.close()

    async def _leave(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.gather(*map(self._return, tuple(self._sessions)), return_exceptions=True)
        await self._pool.__aexit__(None, None, None)


class _Worker:
    """A session."""

    def __init__(self, pool: MontyPool, session: AsyncMontySession, limits: Limits, most: float) -> None:
        self._pool = pool
        self._most = most
        self._session = session
        self._limits = limits
        self._cells: list[str] = []
        self._feeds: dict[str, tuple[int, int, int]] = {}  # file name: cell, line and length of an inserted prefix
        self._fed = 0
        self._used = 0.0
        self._call: Future[str] | None = None
        self._closed = False

    def run(self, code: str, timeout: float) -> Reply:
        """Run a cell."""
        capture = Capture(self._limits.output)
        left = self._limits.cpu - self._used
        timeout = min(timeout, self._most)
        start = time.monotonic()
        self._call = self._pool.submit(self._run(code, capture, min(timeout, left)))
        try:
            shown = self._call.result()
        except TimeoutError:
            if left <= timeout:
                reason = f"The worker was killed: the session used up its {self._limits.cpu:g} s of processor time."
                raise WorkerLost(reason, output=capture.text(), timed_out=True) from None
            reason = f"TimeoutError: the call took longer than {timeout:g} s; its worker was killed."
            raise WorkerLost(reason, output=capture.text(), timed_out=True) from None
        except CancelledError:
            raise WorkerLost("The worker was killed.") from None
        except Exception as error:
            from pydantic_monty import MontyCrashedError

            reason = "died" if isinstance(error, MontyCrashedError) else "failed"
            raise WorkerLost(f"The worker {reason}: {error}.", output=capture.text()) from None
        finally:
            self._used += time.monotonic() - start
        return Reply(capture.text(), capped(shown, self._limits.output), False)

    async def _run(self, code: str, capture: Capture, timeout: float) -> str:
        return await asyncio.wait_for(self._cell(code, capture), timeout)

    async def _cell(self, code: str, capture: Capture) -> str:
        from pydantic_monty import MontyRuntimeError, MontySyntaxError

        self._cells.append(code)
        place = _last_statement(code)
        try:
            if place is not None:
                line, offset, prefix = place
                source = f"{code[:offset]}{prefix}{code[offset:]}{_SHOW}"
                try:
                    await self._feed(source, capture, line, len(prefix))
                    return ""
                except MontySyntaxError:  # the last statement is no expression; nothing has run
                    pass
            await self._feed(f"{code}\nNone", capture, 0, 0)
            return ""
        except MontySyntaxError as error:
            return self._syntax_error(error)
        except MontyRuntimeError as error:
            return self._traceback(error)

    async def _feed(self, source: str, capture: Capture, line: int, shift: int) -> None:
        self._feeds[f"<python-input-{self._fed}>"] = len(self._cells), line, shift
        self._fed += 1
        await self._session.feed_run(source, print_callback=lambda _, text: capture.write(text))

    def _traceback(self, error: MontyRuntimeError) -> str:
        """As CPython prints it, with the code's own lines."""
        frames = []
        for frame in error.traceback():
            cell, line, shift = self._feeds.get(frame.filename, (0, 0, 0))
            lines = self._cells[cell - 1].splitlines() if cell else []
            if cell and frame.line > len(lines):
                continue  # what prints the value
            moved = shift if frame.line == line else 0
            moved_end = shift if frame.end_line == line else 0
            frames.append(
                traceback.FrameSummary(
                    f"<cell {cell}>" if cell else frame.filename,
                    frame.line,
                    frame.function_name or "<module>",
                    lookup_line=False,
                    line=(lines[frame.line - 1] if cell else frame.source_line or "") + "\n",
                    end_lineno=frame.end_line,
                    colno=frame.column - 1 - moved,
                    end_colno=frame.end_column - 1 - moved_end,
                )
            )
        head = "Traceback (most recent call last):\n" if frames else ""
        return head + "".join(traceback.StackSummary.from_list(frames).format()) + error.display("type-msg")

    def _syntax_error(self, error: MontySyntaxError) -> str:
        number = len(self._cells)
        lines = self._cells[-1].splitlines()
        where = ""
        for frame in error.traceback()[-1:]:
            line = min(frame.line, len(lines))
            if line:
                text = lines[line - 1]
                column = min(frame.column, len(text) + 1) - (len(text) - len(text.lstrip()))
                where = f'  File "<cell {number}>", line {line}\n    {text.strip()}\n    {" " * (column - 1)}^\n'
        return where + error.display("type-msg")

    def kill(self) -> None:
        """End it from any thread."""
        if self._call is not None:
            self._call.cancel()

    def close(self) -> None:
        """End the session, and with it its process."""
        if not self._closed:
            self._closed = True
            self.kill()
            self._pool.release(self._session)


def _last_statement(code: str) -> tuple[int, int, str] | None:
    """Line, offset and prefix with which the last statement, if it is an expression, becomes an assignment.

    Found by the tokenizer: Python's parser is not for hostile code in one's own process.
    """
    start: tuple[int, int] | None = None
    fresh, simple = True, True
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.COMMENT, tokenize.ENDMARKER):
                fresh = fresh or token.type == tokenize.NEWLINE
            elif token.type in (tokenize.INDENT, tokenize.DEDENT):
                continue
            elif fresh:
                fresh, simple = False, token.string not in _COMPOUND
                start = token.start if token.start[1] == 0 and simple else None
                after = False
            elif token.string == ";":
                after = start is not None
            elif after:
                start, after = token.start, False
    except (tokenize.TokenError, SyntaxError):
        return None
    if start is None:
        return None
    row, column = start
    offset = sum(len(line) for line in io.StringIO(code).readlines()[: row - 1]) + column
    return row, offset, f"{_VALUE} = ("
