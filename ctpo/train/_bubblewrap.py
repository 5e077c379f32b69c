"""Sessions in bubblewrap jails: `_jail.worker` inside, this module outside.

One jail per sandbox holds a parent with NumPy and SymPy imported, which forks a process for every session; that
process enters namespaces of its own. Where nested namespaces are refused every session gets a jail of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import threading
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ctpo.train.sandbox import Limits, Reply, SandboxUnavailable, WorkerLost

_log = logging.getLogger("ctpo.train.sandbox")

_GRACE = 1.0  # seconds between TimeoutError in the code and the end of its worker
_START = 60.0  # seconds to start a jail: the first import of NumPy and SymPy from a cold disk
_NOBODY = 65534
_PACKAGES = ("numpy", "scipy", "sympy", "mpmath", "gmpy2")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_INSTALL = "install bubblewrap (apt install bubblewrap, dnf install bubblewrap)"

# What the trial runs; it prints nothing where every door is shut.
_TRIAL = """
import os, socket
def open_door(name, action):
    try:
        action()
    except (OSError, ImportError):
        return
    print(name)
open_door("network", lambda: socket.socket())
open_door("processes", lambda: os.fork() or os._exit(0))
open_door("system", lambda: open("/ctpo.trial", "w"))
open_door("home", lambda: open("/etc/passwd"))
open_door("host processes", lambda: open("/proc/1/status"))
open("/tmp/trial", "w").write("x")
import wave
"""


@dataclass(frozen=True)
class _Form:
    """How a jail is made: with `nested` sessions, by bubblewrap as root, or in a user namespace."""

    nested: bool
    as_root: bool


class Bubblewrap:
    """Starts sessions; the first trial that works decides how.

    Args:
        limits: Those of a session.
        nested: Only one jail with nested sessions, or only one jail per session; whichever works if None.

    Raises:
        SandboxUnavailable: Nothing works here.
    """

    def __init__(self, limits: Limits, *, nested: bool | None = None) -> None:
        self._limits = limits
        self._lock = threading.RLock()  # a signal's handler may close what its own thread is starting
        self._closed = False
        self._workers: weakref.WeakSet[_Worker] = weakref.WeakSet()
        self._jail: _Jail | None = None  # the one of all sessions, or the one of the next session
        if not sys.platform.startswith("linux"):
            raise SandboxUnavailable("it needs Linux")
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise SandboxUnavailable(f"there is no `bwrap` on PATH: {_INSTALL}")
        self._bwrap = bwrap
        reasons: list[str] = []
        for form in (_Form(n, r) for r in (True, False) for n in (True, False)):
            if (form.as_root and os.geteuid() != 0) or nested not in (None, form.nested):
                continue
            self._form = form
            try:
                self._try()
                if nested is None and not form.nested:
                    _log.warning(
                        "bubblewrap: every session gets a jail of its own, and starts later for it, as a common one "
                        "does not work: %s",
                        "; ".join(reasons),
                    )
                return
            except SandboxUnavailable as reason:
                self._end()
                if str(reason) not in reasons:
                    reasons.append(str(reason))
            except BaseException:
                self._end()
                raise
        failures = "; ".join(reasons)
        raise SandboxUnavailable(f"a trial of {bwrap} failed: {failures}. It needs namespaces, see docs/sandbox.md")

    def _try(self) -> None:
        worker = self._start(attempts=1)
        try:
            output, error, _ = worker.run(_TRIAL, 30.0)
        except WorkerLost as lost:
            raise SandboxUnavailable(str(lost)) from None
        finally:
            worker.close()
        if output or error:
            raise SandboxUnavailable(f"not isolated: {' '.join((output + error).split())}")

    def start(self, timeout: float) -> _Worker:
        """A worker for a session; a jail that has died is replaced."""
        with self._lock:
            self._check_open()
            return self._start(attempts=2)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("run: the sandbox is closed")

    def _start(self, attempts: int) -> _Worker:
        while True:
            if self._jail is None:
                self._jail = _Jail(self._bwrap, self._form, self._limits)
            jail = self._jail
            attempts -= 1
            try:
                worker = jail.session()
            except SandboxUnavailable:
                self._check_open()
                if not attempts or jail.lives():  # and with it other sessions
                    raise
                self._end()
                continue
            if self._closed:
                worker.close()
            self._check_open()
            break
        if not self._form.nested:
            self._jail = None  # it is the worker's now; the next one gets ready while this one works
            self._jail = _Jail(self._bwrap, self._form, self._limits)
        self._workers.add(worker)
        return worker

    def close(self) -> None:
        """Kill all jails, and thereby all sessions."""
        with self._lock:
            self._closed = True
            self._end()
            for worker in self._workers:
                worker.kill()

    def _end(self) -> None:
        jail, self._jail = self._jail, None
        if jail is not None:
            jail.close()


class _Jail:
    """A bubblewrap process tree; `session` waits until it is ready."""

    def __init__(self, bwrap: str, form: _Form, limits: Limits) -> None:
        self._limits = limits
        self._form = form
        self._ready = False
        self._closed = False
        self._lock = threading.RLock()
        self._init: int | None = None  # pidfd of the first process inside, with which all others end
        with contextlib.ExitStack() as inside:
            self._control, control = socket.socketpair()
            inside.callback(control.close)
            self._info, info = os.pipe()
            inside.callback(os.close, info)
            config = {
                **asdict(limits),
                "nested": form.nested,
                "user": _NOBODY if form.as_root else None,
                "control": control.fileno(),
                "here": _HERE,
            }
            try:
                self._process = subprocess.Popen(
                    [bwrap, *_arguments(form, limits, info), *_command(config)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    # Both ends of the pipe: else bubblewrap, whose host is killed before it reads, would die at
                    # its report, and leave its child waiting for ever.
                    pass_fds=(control.fileno(), info, self._info),
                    start_new_session=True,  # Ctrl-C in the terminal is the host's
                    cwd="/",
                    env={},
                )
            except OSError as error:
                self._control.close()
                os.close(self._info)
                raise SandboxUnavailable(f"{bwrap} does not start: {error}; {_INSTALL}") from None

    def session(self) -> _Worker:
        """Start a session.

        Raises:
            SandboxUnavailable: The jail, or the session, says why it could not isolate itself.
        """
        deadline = time.monotonic() + _START
        if not self._ready:
            self._await_ready(deadline)
        ours, theirs = socket.socketpair()
        try:
            # The kernel tells the sender's process with every message from here on.
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            with theirs:
                socket.send_fds(self._control, [b"s"], [theirs.fileno()])
            ours.settimeout(_START)
            _, ancillary, _, _ = ours.recvmsg(4, socket.CMSG_SPACE(12), socket.MSG_PEEK)
            message = _receive(ours, 1000, deadline)
            if message.get("ready") is not True:
                raise SandboxUnavailable(f"a session cannot isolate itself: {message.get('failed')}")
            pid = next(
                struct.unpack("3i", content)[0]
                for level, kind, content in ancillary
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
            )
            process = os.pidfd_open(pid)
        except (OSError, ValueError, EOFError, StopIteration) as error:
            ours.close()
            raise SandboxUnavailable(f"a session does not start: {error or type(error).__name__}") from None
        except BaseException:
            ours.close()
            raise
        return _Worker(ours, process, self._limits, None if self._form.nested else self)

    def lives(self) -> bool:
        """Whether it can go on; a jail whose parent process has died is given a second to end."""
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return True
        return False

    def _await_ready(self, deadline: float) -> None:
        assert self._process.stderr is not None
        try:
            info = b""
            while not info.rstrip().endswith(b"}"):
                if not _readable(deadline - time.monotonic(), self._info):
                    raise TimeoutError
                piece = os.read(self._info, 4096)
                if not piece:
                    raise EOFError
                info += piece
            self._init = os.pidfd_open(json.loads(info)["child-pid"])
            if _receive(self._control, 1000, deadline).get("ready") is not True:
                raise ValueError
        except (OSError, ValueError, EOFError, KeyError) as error:
            if self._closed:
                raise SandboxUnavailable("the jail was closed while it started") from None
            self._kill()
            os.set_blocking(self._process.stderr.fileno(), False)
            said = (self._process.stderr.read() or b"").decode("utf-8", "replace").strip().splitlines()
            reason = said[-1] if said else type(error).__name__
            raise SandboxUnavailable(f"the jail does not start: {reason}") from None
        self._process.stderr.close()
        self._control.settimeout(_START)
        self._ready = True

    def _kill(self) -> None:
        if self._process.returncode is not None:
            return
        if self._init is None:  # not ready: where bubblewrap has said what it started, that goes with it
            with contextlib.suppress(OSError, ValueError, KeyError):
                if _readable(1.0, self._info):
                    self._init = os.pidfd_open(json.loads(os.read(self._info, 4096))["child-pid"])
        if self._init is not None:
            _kill(self._init)
            os.close(self._init)
            self._init = None
        else:
            # A child that waits for the first is in its group; one that has left it ends with the connection.
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Kill all that is in it; may be called more than once, from any thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._kill()
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)
            self._control.close()
            os.close(self._info)
            assert self._process.stderr is not None
            self._process.stderr.close()


class _Worker:
    """A session's process."""

    def __init__(self, connection: socket.socket, process: int, limits: Limits, jail: _Jail | None) -> None:
        self._connection = connection
        self._process: int | None = process  # pidfd
        # Garbage collection, or a signal's handler, may close it while the same thread kills it.
        self._process_lock = threading.RLock()
        self._limits = limits
        self._jail = jail
        self._most = 24 * (limits.output + 100) + 1000  # output and error, at most twelve bytes a character in JSON

    def run(self, code: str, timeout: float) -> Reply:
        """Run a cell."""
        self._check_silent()
        deadline = time.monotonic() + timeout + _GRACE
        identity = secrets.token_hex(8)
        try:
            _send(self._connection, {"id": identity, "code": code, "timeout": timeout}, deadline)
            message = _receive(self._connection, self._most, deadline)
        except TimeoutError:
            raise WorkerLost(
                f"TimeoutError: the call took longer than {timeout:g} s and could not be interrupted; "
                "its worker was killed.",
                timed_out=True,
            ) from None
        except (OSError, EOFError):
            raise WorkerLost("The worker died.") from None
        except Exception as error:
            raise WorkerLost(f"The worker was killed: it broke the protocol ({error}).") from None
        if "ended" in message:
            raise WorkerLost(_epitaph(message, self._limits))
        output, error_text, timed_out = (message.get(key) for key in ("output", "error", "timed_out"))
        if (
            message.get("id") != identity
            or not isinstance(output, str)
            or not isinstance(error_text, str)
            or not isinstance(timed_out, bool)
        ):
            raise WorkerLost("The worker was killed: it broke the protocol (not an answer to this call).")
        return Reply(self._clean(output), self._clean(error_text), timed_out)

    def _check_silent(self) -> None:
        """Nothing may be said between calls, and the process must live."""
        assert self._process is not None
        if _readable(0, self._connection.fileno(), self._process):
            try:
                message = _receive(self._connection, self._most, time.monotonic() + 1.0)
            except Exception:
                message = {}
            reason = (
                _epitaph(message, self._limits)
                if "ended" in message
                else "The worker was killed: it died or spoke out of turn."
            )
            raise WorkerLost(f"{reason} This happened before this call, whose code was not run.")

    def _clean(self, text: str) -> str:
        """A worker whose code forges its replies gets no more than others."""
        from ctpo.train._jail.notebook import capped

        return text if len(text) <= self._limits.output and text.isascii() else capped(text, self._limits.output + 100)

    def kill(self) -> None:
        """End the process; a call in another thread notices."""
        with self._process_lock:
            if self._process is not None:
                _kill(self._process)
        if self._jail is not None:
            self._jail.close()

    def close(self) -> None:
        """End the process and let go of it."""
        self.kill()
        with self._process_lock:
            if self._process is not None:
                os.close(self._process)
                self._process = None
                self._connection.close()


def _epitaph(message: dict[str, Any], limits: Limits) -> str:
    """How a worker ended, by its parent's report."""
    code = message.get("ended")
    if message.get("cpu") is True:
        return f"The worker was killed: the session used up its {limits.cpu:g} s of processor time."
    if type(code) is not int or not -64 <= code <= 255:  # forged
        return "The worker died."
    if code >= 0:
        return f"The worker exited with status {code}."
    return f"The worker died: {signal.strsignal(-code) or f'signal {-code}'}."


def _kill(process: int) -> None:
    with contextlib.suppress(OSError):  # it has ended, or was let go of meanwhile
        signal.pidfd_send_signal(process, signal.SIGKILL)


def _readable(timeout: float, *descriptors: int) -> bool:
    """Whether one of them has something to read, or its end; poll takes descriptors above 1023 too."""
    watch = select.poll()
    for descriptor in descriptors:
        watch.register(descriptor, select.POLLIN)
    return bool(watch.poll(max(0.0, timeout) * 1000))


def _send(connection: socket.socket, message: dict[str, Any], deadline: float) -> None:
    data = json.dumps(message).encode()
    connection.settimeout(max(0.001, deadline - time.monotonic()))
    connection.sendall(struct.pack("!I", len(data)) + data)


def _receive(connection: socket.socket, most: int, deadline: float) -> dict[str, Any]:
    """A message.

    Raises:
        TimeoutError: None came in time.
        EOFError: The other end is gone.
        ValueError: It is too long or not of the form.
    """
    (length,) = struct.unpack("!I", _read(connection, 4, deadline))
    if length > most:
        raise ValueError("a message that is too long")
    try:
        message = json.loads(_read(connection, length, deadline), parse_int=_integer)
    except (ValueError, RecursionError):
        raise ValueError("a message that cannot be read") from None
    if not isinstance(message, dict):
        raise ValueError("a message that is no object")
    return message


def _integer(digits: str) -> int:
    if len(digits) > 20:  # time and memory grow with their square where Python does not bound them
        raise ValueError("a number that is too long")
    return int(digits)


def _read(connection: socket.socket, count: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        piece = connection.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


_HERE = "/ctpo"
_WORKER = f"import sys; sys.path.insert(0, {_HERE!r}); from _jail.worker import main; main()"


def _command(config: dict[str, Any]) -> list[str]:
    """The interpreter, isolated from the user's site-packages; packages come by their own path."""
    inside = [place.rpartition("/")[0] for _, place in _packages()]
    under_tmp = [path for path in _system_paths() if path.startswith("/tmp/") and os.path.isdir(path)]
    config = {**config, "path": list(dict.fromkeys(inside)), "under_tmp": under_tmp, "devices": _DEVICES}
    flags = ["-I", "-S", "-B", "-X", "utf8"]
    return [str(_interpreter()), *flags, "-c", _WORKER, json.dumps(config)]


def _arguments(form: _Form, limits: Limits, info: int) -> list[str]:
    """The jail: what bubblewrap shows of the system, all of it read-only, and no more than Python needs."""
    arguments = ["--info-fd", str(info), "--new-session", "--hostname", "sandbox"]
    arguments += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    arguments += ["--cap-drop", "ALL"]
    if form.as_root:
        # To become nobody, and to be allowed the signal that ends a session with its parent.
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_KILL"):
            arguments += ["--cap-add", capability]
    if not form.nested:  # for what bubblewrap cannot mount; the parent drops it before it forks the session
        arguments += ["--cap-add", "CAP_SYS_ADMIN"]
    if not form.as_root:
        arguments += ["--unshare-user", "--uid", str(_NOBODY), "--gid", str(_NOBODY)]
    arguments += ["--clearenv", "--setenv", "OPENBLAS_NUM_THREADS", "1", "--setenv", "OMP_NUM_THREADS", "1"]
    if form.nested:
        # A session covers both, after it has written the maps of its user namespace to /proc.
        arguments += ["--proc", "/proc", "--dir", "/tmp", "--dir", f"{_HERE}/tmp"]
    else:
        arguments += ["--dir", "/proc", "--size", str(limits.tmp), "--perms", "1777", "--tmpfs", "/tmp"]
    binds: list[tuple[str, ...]] = [("--dev-bind", device, device) for device in _DEVICES]
    for path in _system_paths():
        binds.append(("--symlink", os.readlink(path), path) if os.path.islink(path) else ("--ro-bind", path, path))
    covers = _covers()
    # In the order in which they are mounted, and what is in one of them after it.
    binds += [("--tmpfs", cover) for cover in covers]
    binds += [("--ro-bind", package, place) for package, place in _packages()]
    binds.append(("--ro-bind", str(Path(__file__).resolve().parent / "_jail"), f"{_HERE}/_jail"))
    # Bubblewrap would make parents that only their owner can enter.
    parents = {str(parent) for *_, place in binds for parent in Path(place).parents} - {"/", "/tmp"}
    for parent in sorted(parents):
        arguments += ["--dir", parent]
    for bind in binds:
        arguments += bind
    for cover in (*covers, "/"):
        arguments += ["--remount-ro", cover]
    return [*arguments, "--chdir", "/", "--"]


def _interpreter() -> Path:
    # Of a virtual environment, the interpreter that it was made of.
    executable = getattr(sys, "_base_executable", None) or sys.executable
    if not executable:
        raise SandboxUnavailable("this Python does not know its own executable")
    return Path(executable).resolve()


def _system_paths() -> list[str]:
    """Interpreter, its standard library and the system's shared libraries; links that are to be links first."""
    links = [path for path in ("/lib", "/lib64", "/lib32") if os.path.islink(path)]
    folders = {path for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64") if os.path.isdir(path)} - set(links)
    base = Path(sys.base_prefix).resolve()
    folders |= {str(base / name) for name in ("lib", "lib64") if (base / name).is_dir()}
    for name in ("stdlib", "platstdlib"):
        folders.add(str(Path(sysconfig.get_path(name, vars={"base": str(base), "platbase": str(base)})).resolve()))
    folders |= {store for store in ("/nix/store", "/gnu/store") if str(base).startswith(store)}
    folders |= {
        path for path in ("/etc/ld.so.cache", "/etc/alternatives", "/usr/share/zoneinfo") if os.path.exists(path)
    }
    folders.add(str(_interpreter()))
    return links + [p for p in sorted(folders) if not any(p.startswith(other + "/") for other in folders)]


def _covers() -> list[str]:
    """Folders of packages in what is shown of the system; empty inside, but for those of `_packages`."""
    shown = [Path(path) for path in _system_paths() if os.path.isdir(path)]
    found = {
        place.resolve()
        for folder in shown
        for name in ("site-packages", "dist-packages")
        for pattern in (name, f"*/{name}")
        for place in folder.glob(pattern)
        if place.is_dir()
    }
    for package, place in _packages():  # an environment somewhere below, as of a program that brings its own
        if package == place and Path(package).parent.name in ("site-packages", "dist-packages"):
            found.add(Path(package).parent)
    return sorted(str(place) for place in found if any(place.is_relative_to(folder) for folder in shown))


def _packages() -> list[tuple[str, str]]:
    """NumPy, SymPy and what they are built on, without what else is installed beside them: where, and where inside."""
    system = _system_paths()
    found = []
    for name in _PACKAGES:
        try:
            spec = importlib.util.find_spec(name)
        except ValueError:  # a module that was put together by hand
            continue
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin).resolve()
        package = origin.parent if spec.submodule_search_locations else origin
        for path in (package, package.parent / f"{name}.libs"):
            if path.exists():
                stays = any(path.is_relative_to(folder) for folder in system)
                found.append((str(path), str(path) if stays else f"{_HERE}/packages/{path.name}"))
    return found
