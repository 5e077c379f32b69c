"""The program inside the jail: imports NumPy and SymPy once, then forks a process for every session.

The parent, called the zygote here, runs no code of a model. A session's process gives up all that it could misuse
before it reads the first request; a step that fails ends it.

Messages between host and session are JSON, each after four bytes with its length.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import mmap
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
from typing import Any, NoReturn

from . import seccomp  # relative: inside the jail this package has no parent
from .notebook import Notebook

_libc = ctypes.CDLL(None, use_errno=True)

# <linux/sched.h>, <sys/mount.h>, <linux/prctl.h>
_NEW_NAMESPACES = 0x20000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_BIND, _MS_MOVE, _MS_REC = 1 << 12, 1 << 13, 1 << 14
_NOTHING = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
# Flags of a mount as statvfs tells them, and as mount takes them: nosuid, noexec, noatime, nodiratime, relatime.
_KEPT = {2: _MS_NOSUID, 8: _MS_NOEXEC, 1024: 1 << 10, 2048: 1 << 11, 4096: 1 << 21}
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 4, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL, _CAP_SYS_ADMIN = 4, 21
_CAPABILITY_VERSION_3 = 0x20080522
_CLOSE_RANGE = 436  # the same on all architectures

_PRELOAD = """
    bisect cmath collections copy csv dataclasses datetime decimal enum fractions functools heapq inspect itertools
    logging math operator pickle re statistics string tempfile textwrap time typing uuid
    numpy numpy.random numpy.linalg mpmath sympy
"""
# SymPy imports half of itself at the first use of these; done while nobody waits, and once for all sessions.
_WARM_UP = (
    "sympy.integrate(x**2 * sympy.sin(x), x)",
    "sympy.solve(x**2 - 2, x)",
    "sympy.simplify((x**2 - 1) / (x - 1))",
    "sympy.series(sympy.exp(x), x, 0, 3)",
    "sympy.Matrix([[1, 2], [3, 4]]).eigenvals()",
    "sympy.solveset(x**2 - 1, x)",
    "sympy.nsolve(sympy.cos(x) - x, x, 1)",
    "sympy.latex(sympy.factor(x**2 - 1))",
)


def main() -> None:
    """Serve sessions until the host closes the control socket."""
    config: dict[str, Any] = json.loads(sys.argv[1])
    control = socket.socket(fileno=config["control"])
    sys.path.remove(config["here"])
    sys.path += config["path"]
    for name in _PRELOAD.split():
        try:
            importlib.import_module(name)
        except ImportError:
            if name.partition(".")[0] not in ("numpy", "mpmath", "sympy"):
                raise
    with contextlib.suppress(ImportError, AttributeError):
        # There are no semaphores by name either. Without the class Python says what does not work here, and why.
        del importlib.import_module("_multiprocessing").SemLock
    os.environ.clear()
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        # For libraries that a session loads: SciPy's own BLAS, refused a thread, would raise KeyboardInterrupt.
        _check(_libc.setenv(name.encode(), b"1", 1), "setenv")
    _close_all_but(control.fileno())
    _reopen_standard()
    if not config["nested"]:
        _finish_mounts(config)
    control.set_inheritable(False)
    gc.collect()
    gc.freeze()
    _send(control.fileno(), {"ready": True})
    if config["nested"]:
        signal.signal(signal.SIGCHLD, _reap)
    requests = select.poll()
    requests.register(control, select.POLLIN)
    steps = list(_WARM_UP if config["nested"] and "sympy" in sys.modules else ())
    while True:
        if steps and not requests.poll(0):
            _warm_up(steps.pop(0))
            continue
        try:
            _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        except OSError:
            return
        if not descriptors:
            return
        try:
            child = os.fork()
        except OSError as error:  # too many processes, or too little memory: the sessions that run go on
            with contextlib.suppress(OSError):
                _send(descriptors[0], {"failed": f"{type(error).__name__}: {error}"})
            os.close(descriptors[0])
            continue
        if child == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _session(descriptors[0], config)
        if not config["nested"]:
            _attend(control, child)
            _report(descriptors[0], child, config)  # and the jail ends
        os.close(descriptors[0])


def _warm_up(step: str) -> None:
    import sympy

    with contextlib.suppress(Exception):  # another version of SymPy only stays cold
        eval(step, {"sympy": sympy, "x": sympy.Symbol("x")})
    sympy.core.cache.clear_cache()
    gc.collect()
    gc.freeze()


def _reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _attend(control: socket.socket, child: int) -> None:
    """Wait for the end of the one session of this jail; if the host is gone before, end the jail and thereby it."""
    watch = select.poll()
    watch.register(control, select.POLLIN)
    process = os.pidfd_open(child)
    watch.register(process, select.POLLIN)
    if process not in dict(watch.poll()):
        os._exit(0)


def _session(descriptor: int, config: dict[str, Any]) -> NoReturn:
    try:
        _close_all_but(descriptor)
        _reopen_standard()  # flags of an open file are shared by all that inherit it
        _isolate(descriptor, config)
        notebook = Notebook(config["output"])
        _send(descriptor, {"ready": True})
        while True:
            request = _receive(descriptor)
            output, error, late = notebook.run(request["code"], request["timeout"])
            _send(descriptor, {"id": request["id"], "output": output, "error": error, "timed_out": late})
    except EOFError:
        os._exit(0)
    except BaseException as error:
        try:
            _send(descriptor, {"failed": f"{type(error).__name__}: {error}"[:500]})
        finally:
            os._exit(1)


def _isolate(descriptor: int, config: dict[str, Any]) -> None:
    """Give up everything; returns in the process that is to run the model's code."""
    user = config["user"]
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        _prctl(_PR_SET_DUMPABLE, 1)  # else /proc/self belongs to root
    if 0 in (*os.getresuid(), *os.getresgid()):
        raise PermissionError("a session must not run as root")
    if config["nested"]:
        _enter_namespaces(config)
        child = os.fork()
        if child:
            _report(descriptor, child, config)
    os.chdir("/tmp")
    os.umask(0o022)
    _limit(config)
    _drop_capabilities()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _reseed()
    seccomp.install(_libc)


def _enter_namespaces(config: dict[str, Any]) -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, a session goes first, not the training run
    user, group = os.getuid(), os.getgid()
    _check(_libc.unshare(_NEW_NAMESPACES), "unshare")
    for name, content in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)
    # Bubblewrap's first process waits for all others. Set here: a change of credentials, as above, undoes it.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _make_devices_read_only(config)
    staging = config["here"] + "/tmp"
    _mount("tmpfs", staging, "tmpfs", _NOTHING, f"{_room(config)},mode=1777")
    for path in config["under_tmp"]:  # an interpreter that lies in /tmp stays there
        place = staging + path.removeprefix("/tmp")
        os.makedirs(place)
        _mount(path, place, "", _MS_BIND | _MS_REC, "")
    _mount(staging, "/tmp", "", _MS_MOVE, "")
    _mount("tmpfs", "/proc", "tmpfs", _NOTHING | _MS_RDONLY, "size=4k,nr_inodes=1,mode=555")


def _finish_mounts(config: dict[str, Any]) -> None:
    """Where sessions have no mounts of their own: what bubblewrap has no option for, then never again."""
    _make_devices_read_only(config)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_REMOUNT | _NOTHING, _room(config))
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    sets = ctypes.create_string_buffer(24)  # effective, permitted, inheritable; the same of capabilities above 31
    _check(_libc.capget(header, sets), "capget")
    low, high = struct.unpack("3I3I", sets.raw)[:3], struct.unpack("3I3I", sets.raw)[3:]
    low = tuple(bits & ~(1 << _CAP_SYS_ADMIN) for bits in low)
    _check(_libc.capset(header, struct.pack("6I", *low, *high)), "capset")


def _make_devices_read_only(config: dict[str, Any]) -> None:
    """They can be written to all the same; their times, which are the host's, cannot."""
    for device in config["devices"]:
        _mount("", device, "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _flags(device), "")


def _flags(path: str) -> int:
    """Those of the mount, which must stay."""
    given = os.statvfs(path).f_flag
    return sum(flag for bit, flag in _KEPT.items() if given & bit)


def _room(config: dict[str, Any]) -> str:
    """Options of /tmp, in which an interpreter that lies in the host's /tmp has its place too."""
    inodes = config["files"] + 1
    for path in config["under_tmp"]:
        inodes += path.count("/") - 1
    return f"size={config['tmp']},nr_inodes={inodes}"


def _mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    _check(result, f"mount {target}")


def _report(descriptor: int, child: int, config: dict[str, Any]) -> NoReturn:
    """Parent of a session's process: says how it ended."""
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    # The kernel limits by one clock and reports by another, which is coarse.
    used_up = code in (-signal.SIGKILL, -signal.SIGXCPU) and usage.ru_utime + usage.ru_stime >= 0.5 * config["cpu"]
    try:
        _send(descriptor, {"ended": code, "cpu": used_up})
    finally:
        os._exit(0)


def _limit(config: dict[str, Any]) -> None:
    memory = _mapped() + config["memory"]
    for name, value in (
        ("CPU", max(1, round(config["cpu"]))),
        ("FSIZE", config["tmp"]),
        ("NOFILE", 64),
        ("NPROC", 0),
        ("CORE", 0),
        ("STACK", 8 << 20),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
        ("SIGPENDING", 64),
        ("NICE", 0),
        ("RTPRIO", 0),
        ("AS", memory),
    ):
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (limit, limit))


def _mapped() -> int:
    """Bytes of address space in use, to 1 MiB: the least limit under which a page can be had; /proc is not there."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    low, high = 0, (1 << 47 if hard == resource.RLIM_INFINITY else hard)
    while high - low > 1 << 20:
        middle = (low + high) // 2
        resource.setrlimit(resource.RLIMIT_AS, (middle, hard))
        try:
            mmap.mmap(-1, mmap.PAGESIZE).close()
            high = middle
        except (OSError, MemoryError):
            low = middle
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    return high


def _drop_capabilities() -> None:
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # the kernel has no such capability, or the bounding set cannot be changed without any
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, struct.pack("6I", *[0] * 6)), "capset")


def _reseed() -> None:
    """Else all sessions would draw the same numbers; `random` does it by itself after a fork."""
    if "numpy" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "sympy" in sys.modules:
        sys.modules["sympy.core.random"].rng.seed()
    random.seed()


def _close_all_but(descriptor: int) -> None:
    os.closerange(3, descriptor)
    if _libc.syscall(_CLOSE_RANGE, ctypes.c_uint(descriptor + 1), ctypes.c_uint(0xFFFFFFFF), 0) != 0:  # Linux < 5.9
        os.closerange(descriptor + 1, 1 << 20)


def _reopen_standard() -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    if null > 2:
        os.close(null)


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _send(
    descriptor: int, message: dict[str, Any], *, write: Any = os.write, dumps: Any = json.dumps, pack: Any = struct.pack
) -> None:
    data = dumps(message).encode()
    data = pack("!I", len(data)) + data
    while data:
        data = data[write(descriptor, data) :]


def _receive(descriptor: int, *, loads: Any = json.loads, unpack: Any = struct.unpack) -> dict[str, Any]:
    (length,) = unpack("!I", _read(descriptor, 4))
    request: dict[str, Any] = loads(_read(descriptor, length))
    return request


def _read(descriptor: int, count: int, *, read: Any = os.read) -> bytes:
    data = b""
    while len(data) < count:
        piece = read(descriptor, count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data
