"""A notebook without pictures: cells run in one namespace, and show what Python would show."""

from __future__ import annotations

import ast
import builtins
import io
import linecache
import os
import signal
import site
import sys
import traceback
import types
from collections import deque
from collections.abc import Iterator

_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep


class Capture:
    """Text of any length in bounded memory: its beginning and its end, and how much is missing between them."""

    def __init__(self, limit: int) -> None:
        self._head: list[str] = []
        self._head_room = limit - limit // 2
        self._tail: deque[str] = deque()
        self._tail_limit = limit // 2
        self._tail_length = 0
        self._dropped = 0

    def write(self, text: str) -> None:
        if self._head_room:
            self._head.append(text[: self._head_room])
            text = text[self._head_room :]
            self._head_room -= len(self._head[-1])
        if not text:
            return
        if len(text) > self._tail_limit:
            self._dropped += len(text) - self._tail_limit
            text = text[len(text) - self._tail_limit :]
        self._tail.append(text)
        self._tail_length += len(text)
        while self._tail_length > self._tail_limit:
            first = self._tail.popleft()
            excess = min(self._tail_length - self._tail_limit, len(first))
            self._dropped += excess
            self._tail_length -= excess
            if excess < len(first):
                self._tail.appendleft(first[excess:])
        if len(self._tail) > 1000:  # many short pieces would cost more than their text
            self._tail = deque(["".join(self._tail)])

    def text(self) -> str:
        head = "".join(self._head)
        if self._dropped:
            head += f"\n[... {self._dropped} characters left out ...]\n"
        # What JSON and UTF-8 cannot carry is shown as Python's repr shows it.
        return (head + "".join(self._tail)).encode("utf-8", "backslashreplace").decode("utf-8")


def capped(text: str, limit: int) -> str:
    """`text`, or its beginning and end with a note between them."""
    capture = Capture(limit)
    capture.write(text)
    return capture.text()


class _Stream(io.TextIOBase):
    """sys.stdout and sys.stderr: writes to the capture of the cell that runs, and cannot be closed."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, notebook: Notebook, name: str) -> None:
        self._notebook = notebook
        self.name = name
        self.buffer = _Bytes(self)

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self._notebook.capture.write(text)
        return len(text)

    def reconfigure(self, **_: object) -> None:
        """Another encoding, errors or buffering would make no difference."""

    def close(self) -> None:
        pass


class _Bytes(io.BufferedIOBase):
    """The `buffer` of such a stream."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        content = bytes(data)
        self._stream.write(content.decode("utf-8", "backslashreplace"))
        return len(content)

    def close(self) -> None:
        pass


class Notebook:
    """One namespace, `__main__`, and the cells run in it; output and errors are each capped at `limit` characters."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._cells = 0
        self._late = False
        self.capture = Capture(limit)
        self._streams = _Stream(self, "<stdout>"), _Stream(self, "<stderr>")
        self._module = types.ModuleType("__main__")
        self._module.__builtins__ = builtins  # type: ignore[attr-defined]
        sys.modules["__main__"] = self._module
        sys.argv, sys.orig_argv = [""], [""]
        sys.path.insert(0, "")
        site.setquit()
        site.sethelper()

    def run(self, code: str, timeout: float) -> tuple[str, str, bool]:
        """Run a cell: what it showed, its error or "", and whether TimeoutError was raised in it after `timeout` s."""
        self._cells += 1
        name = f"<cell {self._cells}>"
        self.capture, self._late = Capture(self._limit), False
        sys.stdin = io.TextIOWrapper(io.BytesIO(), "utf-8")
        sys.stdout = sys.__stdout__ = self._streams[0]  # type: ignore[assignment,misc]
        sys.stderr = sys.__stderr__ = self._streams[1]  # type: ignore[assignment,misc]
        # An entry without a time of modification is one that linecache does not look for on disk.
        linecache.cache[name] = (len(code), None, [line + "\n" for line in code.splitlines()], name)
        error = ""
        try:
            try:
                self._arm(timeout)
                self._execute(code, name)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except SystemExit as stop:
            error = _farewell(stop)
        except BaseException as exception:
            error = self._formatted(exception)
        return self.capture.text(), capped(error, self._limit), self._late

    def _execute(self, code: str, name: str) -> None:
        # Not ast.parse, whose frame would be in the traceback of a SyntaxError.
        tree: ast.Module = compile(code, name, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)  # type: ignore[assignment]
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec", dont_inherit=True), self._module.__dict__)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), self._module.__dict__)
            if value is not None:
                self._streams[0].write(repr(value) + "\n")
                builtins._ = value  # type: ignore[attr-defined]

    def _arm(self, timeout: float) -> None:
        def late(*_: object) -> None:
            self._late = True
            raise TimeoutError(f"the call took longer than {timeout:g} s")

        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, timeout)

    def _formatted(self, exception: BaseException) -> str:
        """The traceback, without the frames of this file."""
        try:
            report = traceback.TracebackException.from_exception(exception, compact=True)
            for part in _chain(report):
                own = [frame for frame in part.stack if not frame.filename.startswith(_OWN)]
                part.stack[:] = own
                if not own:
                    part.stack = None  # type: ignore[assignment]
            capture = Capture(self._limit)
            for piece in report.format():
                capture.write(piece)
            return capture.text().rstrip("\n")
        except BaseException:  # no memory is left, or the user's code has changed what is used here
            return _last_line(exception)


def _chain(report: traceback.TracebackException) -> Iterator[traceback.TracebackException]:
    parts: list[traceback.TracebackException | None] = [report]
    while parts:
        part = parts.pop()
        if part is not None:
            yield part
            parts += [part.__cause__, part.__context__, *(getattr(part, "exceptions", None) or [])]


def _farewell(stop: SystemExit) -> str:
    """What an interpreter would say on its way out."""
    if stop.code is None or (isinstance(stop.code, int) and not stop.code):
        return ""
    return _last_line(stop)


def _last_line(exception: BaseException) -> str:
    try:
        return f"{type(exception).__name__}: {exception}"
    except BaseException:
        return type(exception).__name__
