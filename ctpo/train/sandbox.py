r"""Run Python that a model wrote, isolated or not at all.

A sandbox opens sessions, a session runs cells as a notebook does::

    with open_sandbox() as sandbox, sandbox.session() as session:
        session.run("x = 6 * 7")
        session.run("x").output   # "42\n"

Two backends isolate; where neither works `open_sandbox` raises `SandboxUnavailable`, and nothing is ever run without.

* "bubblewrap" (Linux): CPython with NumPy and SymPy in namespaces of its own: no network, no processes, a read-only
  system, an empty environment, a private /tmp, limits on memory, time and files, a list of permitted system calls.
* "monty": the interpreter of `pydantic-monty`, a subset of Python without NumPy and SymPy, on any system.

docs/sandbox.md says what was attacked, and how fast a call is.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, Protocol, get_args

__all__ = ["Limits", "RunResult", "Sandbox", "SandboxUnavailable", "Session", "backends", "open_sandbox"]

BackendName = Literal["bubblewrap", "monty"]

MOST_CODE = 1_000_000
"""Longest code of one call, characters."""

# What clocks, the kernel's limits and the messages of a worker can carry.
_RANGES = {
    "timeout": (0, 1_000_000),
    "cpu": (1, 1_000_000_000),
    "memory": (0, 1 << 48),
    "tmp": (0, 1 << 48),
    "files": (0, 1_000_000_000),
    "output": (0, 100_000_000),
}


class SandboxUnavailable(RuntimeError):
    """No backend can isolate here; the message says why not and what to install."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a session may use.

    Args:
        timeout: Wall-clock seconds of one call, at most a million.
        cpu: Seconds of processor time of a session, all calls together, at least 1; bubblewrap rounds it up to whole
            seconds, Monty counts wall-clock seconds.
        memory: Bytes that a session may allocate, NumPy and SymPy themselves not counted.
        tmp: Bytes in its /tmp, and of one file in it (bubblewrap).
        files: Files and directories in its /tmp (bubblewrap).
        output: Characters of output, and of an error, that a call returns; beginning and end of what is longer.

    Raises:
        ValueError: A limit is not a positive number, or not an integer where it counts something, or out of its range.

    Example:
        >>> Limits(timeout=5.0).memory // 2**20
        512
    """

    timeout: float = 10.0
    cpu: float = 120.0
    memory: int = 512 << 20
    tmp: int = 64 << 20
    files: int = 1000
    output: int = 20_000

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")
            _check_number(field.name, value)


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a call showed.

    Attributes:
        output: What was printed to stdout and stderr, in order, then the value of the last expression; a note stands
            for what was left out in the middle.
        error: "" or what Python would print: a traceback of the code's own frames; or what befell the worker.
        timed_out: The call took longer than its time limit.
        duration: Wall-clock seconds, the start of a worker included.
        restarted: The variables of the session are lost, as `error` says; the next call starts afresh.
    """

    output: str
    error: str
    timed_out: bool
    duration: float
    restarted: bool


class Reply(NamedTuple):
    """What a worker answers."""

    output: str
    error: str
    timed_out: bool


class WorkerLost(Exception):
    """A worker died or was killed, and a session's variables with it."""

    def __init__(self, reason: str, *, output: str = "", timed_out: bool = False) -> None:
        super().__init__(reason)
        self.output = output
        self.timed_out = timed_out


class Worker(Protocol):
    """A process that serves one session."""

    def run(self, code: str, timeout: float) -> Reply:
        """Run a cell; raises `WorkerLost`."""

    def kill(self) -> None:
        """End it from any thread; a call that runs raises `WorkerLost`."""

    def close(self) -> None:
        """End it and let go of it, when no call runs; may be called more than once."""


class Backend(Protocol):
    """What starts workers."""

    def start(self, timeout: float) -> Worker:
        """Start a worker, whose first call will have this time limit; called from any thread."""

    def close(self) -> None:
        """Kill what runs; may be called more than once."""


class Session:
    """A notebook in a sandbox: variables live from call to call. Made by `Sandbox.session`.

    Its worker starts at the first call. Calls of one session wait for one another, sessions run in parallel.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._lock = threading.RLock()  # a signal handler may close the session in the thread that is in `run`
        self._running = False
        self._held: list[Worker] = []  # the worker, if it has started
        self._closed = False
        self._finalizer = weakref.finalize(self, _close_held, self._held, os.getpid())

    def run(self, code: str, timeout: float | None = None) -> RunResult:
        r"""Run a cell.

        After `timeout` seconds TimeoutError is raised in the code, which keeps the variables; code that goes on all the
        same is killed with its worker a moment later.

        Args:
            code: Python source.
            timeout: Wall-clock seconds of this call, the sandbox's limit if None. Monty takes no more than the
                sandbox's limit, or that of the session's first call if that is longer.

        Raises:
            ValueError: The session or its sandbox is closed, or an argument is out of its range.
            SandboxUnavailable: A worker cannot be started any more.

        Example:
            >>> with open_sandbox() as sandbox, sandbox.session() as session:
            ...     _ = session.run("x = 6")
            ...     print(session.run("print('x is', x)\nx * 7").output, end="")
            x is 6
            42
        """
        timeout = self._sandbox.limits.timeout if timeout is None else timeout
        _check_number("timeout", timeout)
        if not isinstance(code, str):
            raise ValueError(f"code must be a string, got {type(code).__name__}")
        start = time.monotonic()
        if len(code) > MOST_CODE:
            error = f"The code is {len(code)} characters long; a call takes at most {MOST_CODE}."
            return RunResult("", error, False, 0.0, False)
        code = code.encode("utf-8", "backslashreplace").decode("utf-8")
        if os.getpid() != self._sandbox._pid:
            raise ValueError("run: the sandbox was opened in another process; open one in this process")
        with self._lock:
            if self._running:
                raise ValueError("run: this thread is in a call of this session, which a signal has interrupted")
            self._running = True
            try:
                return self._call(code, timeout, start)
            finally:
                self._running = False
                if self._closed:  # meanwhile, by a signal handler, which could not wait
                    self._finalizer()

    def _call(self, code: str, timeout: float, start: float) -> RunResult:
        self._check_open()
        if not self._held:
            self._held.append(self._sandbox._backend.start(timeout))
        try:
            self._check_open()  # again: a worker that has just started was not there to be killed
            output, error, timed_out = self._held[0].run(code, timeout)
        except WorkerLost as lost:
            self._held.pop().close()
            if self._closed or self._sandbox.closed:
                raise ValueError("run: the session was closed during the call") from None
            error = f"{lost} The variables of this session are lost; the next call starts afresh."
            return RunResult(lost.output, error, lost.timed_out, time.monotonic() - start, True)
        except BaseException:  # an interrupt: what the worker does is unknown
            self._held.pop().close()
            raise
        return RunResult(output, error, timed_out, time.monotonic() - start, False)

    def _check_open(self) -> None:
        if self._closed or self._sandbox.closed:
            raise ValueError("run: the session is closed")

    def close(self) -> None:
        """End the session, its worker, and a call that runs; in a forked process the session of the first goes on."""
        self._closed = True
        if os.getpid() != self._sandbox._pid:
            return  # the lock may be held by a thread that a fork has not copied
        for worker in tuple(self._held):
            worker.kill()
        with self._lock:
            if not self._running:
                self._finalizer()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Sandbox:
    """A place to run model-written code; made by `open_sandbox`, thread-safe.

    Attributes:
        backend: "bubblewrap" or "monty".
        limits: Those of every session.
    """

    def __init__(self, name: BackendName, backend: Backend, limits: Limits) -> None:
        self.backend = name
        self.limits = limits
        self._backend = backend
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _close_in, backend, self._pid)

    def session(self) -> Session:
        """A new session, which costs nothing before its first call."""
        if self.closed:
            raise ValueError("session: the sandbox is closed")
        return Session(self)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

    def close(self) -> None:
        """End all sessions and what serves them."""
        self._finalizer()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_in(closeable: Worker | Backend, pid: int) -> None:
    """A process forked from the one that opened a sandbox must leave it alone."""
    if os.getpid() == pid:
        closeable.close()


def _close_held(held: list[Worker], pid: int) -> None:
    if held:
        _close_in(held.pop(), pid)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    least, most = _RANGES[name]
    if not least <= value <= most:
        raise ValueError(f"{name} must be {f'at least {least} and ' if least else ''}at most {most}, got {value!r}")


def open_sandbox(backend: str = "auto", *, limits: Limits | None = None) -> Sandbox:
    """Open a sandbox; a trial has shown that it isolates before this returns.

    Args:
        backend: "bubblewrap", "monty", or "auto" for the first of these that works here.
        limits: What a session may use; the defaults of `Limits` if None.

    Returns:
        The sandbox, a context manager.

    Raises:
        SandboxUnavailable: The backend, or with "auto" every backend, does not work here.
        ValueError: An argument is not one of the above.

    Example:
        >>> with open_sandbox() as sandbox, sandbox.session() as session:
        ...     print(session.run("1 / 0").error.splitlines()[-1])
        ZeroDivisionError: division by zero
    """
    if backend not in ("auto", *get_args(BackendName)):
        raise ValueError(f"backend must be one of auto, {', '.join(get_args(BackendName))}, got {backend!r}")
    if limits is None:
        limits = Limits()
    elif not isinstance(limits, Limits):
        raise ValueError(f"limits must be Limits or None, got {limits!r}")
    reasons = []
    for name in get_args(BackendName) if backend == "auto" else (backend,):
        try:
            return Sandbox(name, _open(name, limits), limits)
        except SandboxUnavailable as reason:
            reasons.append(f"{name}: {reason}")
    raise SandboxUnavailable("; ".join(["no isolation for model-written code", *reasons]))


def _open(name: str, limits: Limits) -> Backend:
    if name == "bubblewrap":
        from ctpo.train._bubblewrap import Bubblewrap

        return Bubblewrap(limits)
    from ctpo.train._monty import MontyPool

    return MontyPool(limits)


def backends() -> dict[str, str]:
    """Which backends work here.

    Returns:
        Every backend by its name, with "" where a trial of it works, else why it does not and what to install.

    Example:
        >>> list(backends())
        ['bubblewrap', 'monty']
    """
    found = {}
    for name in get_args(BackendName):
        try:
            _open(name, Limits()).close()
            found[name] = ""
        except SandboxUnavailable as reason:
            found[name] = str(reason)
    return found
