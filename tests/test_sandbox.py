"""Sessions as notebooks, their limits, their errors, and what becomes of sessions whose worker is lost."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import pathlib
import platform
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from sandbox_backends import every_backend, require_backend, sandbox_fixture

from ctpo.train import sandbox as module
from ctpo.train._jail import seccomp
from ctpo.train._jail.notebook import Capture, capped
from ctpo.train.sandbox import Limits, RunResult, Sandbox, SandboxUnavailable, Session, backends, open_sandbox

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIMITS = Limits(timeout=60.0, memory=256 << 20, tmp=1 << 20, files=20, output=2000)
LONG = 60.0  # seconds for what takes none: other work may hold both cores
sandbox = sandbox_fixture(**{name: getattr(LIMITS, name) for name in ("timeout", "memory", "tmp", "files", "output")})


@pytest.fixture
def session(sandbox):
    with sandbox.session() as opened:
        yield opened


@pytest.fixture(scope="module", params=["nested", "one jail per session"])
def bubblewrap(request):
    """Both forms of this backend."""
    require_backend("bubblewrap")
    from ctpo.train._bubblewrap import Bubblewrap

    with Sandbox("bubblewrap", Bubblewrap(LIMITS, nested=request.param == "nested"), LIMITS) as opened:
        yield opened


@pytest.fixture
def either(bubblewrap):
    """A session in one form, then in the other."""
    with bubblewrap.session() as opened:
        yield opened


@pytest.fixture(scope="module")
def lasting(bubblewrap):
    """The same for all tests, which leave it as it is."""
    with bubblewrap.session() as opened:
        yield opened


@pytest.fixture(scope="module")
def nested():
    require_backend("bubblewrap")
    with open_sandbox("bubblewrap", limits=LIMITS) as opened:
        yield opened


@pytest.fixture
def jailed(nested):
    """A session in the form that was found to work."""
    with nested.session() as opened:
        yield opened


def shown(session: Session, code: str, **options: Any) -> str:
    result = session.run(code, **options)
    assert (result.error, result.timed_out, result.restarted) == ("", False, False), result
    return result.output


def error_of(session: Session, code: str) -> str:
    result = session.run(code)
    assert result.error
    assert (result.timed_out, result.restarted) == (False, False), result
    return result.error


def descendants(pid: int) -> set[int]:
    """Processes below `pid`."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = pathlib.Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            state, parent = stat.rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(entry)] = int(parent)
    found: set[int] = set()
    level = {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level}
        found |= level
    return found


def worker_pid(session: Session) -> int:
    """The host's number of a bubblewrap session's process."""
    process = session._held[0]._process  # type: ignore[attr-defined]
    text = pathlib.Path(f"/proc/self/fdinfo/{process}").read_text()
    return int(re.search(r"^Pid:\s+(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]


def await_none_of(pids: set[int]) -> None:
    deadline = threading.Event()
    for _ in range(600):
        if not pids & descendants(os.getpid()):
            return
        deadline.wait(0.1)
    pytest.fail(f"still there: {pids & descendants(os.getpid())}")


# A notebook.


def test_variables_live_from_call_to_call(session):
    assert shown(session, "x = 6\ndef double(v):\n    return 2 * v") == ""
    assert shown(session, "double(x) + 30") == "42\n"


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("'a'", "'a'\n"),
        ("None", ""),
        ("x = 1", ""),
        ("1; 2", "2\n"),
        ("print('a'); 'b'", "a\n'b'\n"),
        ("(1,\n 2)", "(1, 2)\n"),
        ("1, 2", "(1, 2)\n"),
        ("if True: 3", ""),
        ("for i in range(2):\n    i", ""),
        ("5  # five", "5\n"),
        ("5\n\n# five\n", "5\n"),
        ("'''a\nb'''", "'a\\nb'\n"),
        ("'''(;'''; 'ü'", "'ü'\n"),
        ("match = 2\nmatch", "2\n"),
        ("if False: 1\nelse: 2; 3", ""),
        ("x = '\\\\'  # '\nx", "'\\\\'\n"),
        ("7  # a\r\n", "7\n"),
        ("(8 +\\\n 1)", "9\n"),
        ("", ""),
        ("__name__", "'__main__'\n"),
    ],
)
def test_output_ends_with_the_value_of_the_last_expression(session, code, output):
    assert shown(session, code) == output


def test_both_streams_are_shown_in_order(session):
    code = "import sys\nprint(1)\nprint(2, file=sys.stderr)\nprint(3, end='')\nprint(4, file=sys.stderr)\n5"
    assert shown(session, code) == "1\n2\n34\n5\n"


def test_traceback_has_the_frames_and_lines_of_the_code(session):
    shown(session, "def divide(a):\n    return 1 / a\n")
    error = error_of(session, "print('before')\ndef outer():\n    divide(0)\nouter()")
    assert [line for line in error.splitlines() if set(line) - set(" ~^")] == [
        "Traceback (most recent call last):",
        '  File "<cell 2>", line 4, in <module>',
        "    outer()",
        '  File "<cell 2>", line 3, in outer',
        "    divide(0)",
        '  File "<cell 1>", line 2, in divide',
        "    return 1 / a",
        "ZeroDivisionError: division by zero",
    ]


def test_error_in_the_last_expression_is_at_its_place(session):
    error = error_of(session, "x = 0\n(x +\n    1 / x)")
    assert '  File "<cell 1>", line 3, in <module>\n    1 / x)\n    ~~^~~\n' in error


def test_underscore_is_the_last_value(session):
    shown(session, "5")
    assert shown(session, "x = 3\nNone") == ""
    assert shown(session, "_ + 1") == "6\n"


def test_failed_call_keeps_what_it_did(session):
    result = session.run("y = 1\nprint('seen')\nraise ValueError('k')")
    assert result.output == "seen\n"
    assert result.error.endswith("ValueError: k")
    assert shown(session, "y") == "1\n"


def test_syntax_error_points_at_the_place(session):
    error = error_of(session, "a = 1\nb = (2 + )\n")
    lines = error.splitlines()
    assert lines[:2] == ['  File "<cell 1>", line 2', "    b = (2 + )"]
    assert set(lines[2]) == {" ", "^"}
    assert lines[-1].startswith("SyntaxError: ")
    assert error_of(session, "a").endswith("NameError: name 'a' is not defined")  # nothing of it was run


def test_error_in_repr_is_the_codes_own(session):
    error = error_of(session, "class A:\n    def __repr__(self):\n        return 1 / 0\nA()")
    assert re.findall(r'File "(.*?)", line (\d+)', error) == [("<cell 1>", "3")]


@pytest.mark.parametrize("code", ["'\\ud800'", "print('\\ud800')", "raise ValueError('\\ud800')", "x = '\ud800'\nx"])
def test_lone_surrogates_harm_nobody(session, code):
    result = session.run(code)
    (result.output + result.error).encode("utf-8")
    assert not result.restarted


def test_output_keeps_beginning_and_end(session):
    result = session.run("print('begin')\nfor i in range(10000):\n    print(i)\nprint('end')")
    assert result.output.startswith("begin\n0\n1\n")
    assert result.output.endswith("9998\n9999\nend\n")
    left_out = int(re.search(r"\n\[\.\.\. (\d+) characters left out \.\.\.\]\n", result.output)[1])
    assert left_out == len("begin\nend\n") + sum(len(f"{i}\n") for i in range(10000)) - LIMITS.output
    assert len(result.output) < LIMITS.output + 50


@pytest.mark.parametrize("code", ["'x' * 10**6", "raise ValueError('x' * 10**6)", "print('x' * 10**6)"])
def test_long_values_and_errors_are_capped(session, code):
    result = session.run(code)
    assert LIMITS.output <= len(result.output + result.error) < LIMITS.output + 200
    assert "characters left out" in result.output + result.error


def test_memory_is_limited(session):
    assert "MemoryError" in error_of(session, f"x = [0] * {LIMITS.memory}")
    assert shown(session, "1 + 1") == "2\n"


def test_code_that_is_too_long_is_not_run(session):
    result = session.run("x = 1\n" * 10**6)
    assert "characters long" in result.error
    assert not result.restarted


@given(pieces=st.lists(st.text(max_size=30), max_size=20), limit=st.integers(1, 60))
def test_capture_is_the_beginning_and_the_end(pieces, limit):
    capture = Capture(limit)
    for piece in pieces:
        capture.write(piece)
    text = "".join(pieces)
    safe = [part.encode("utf-8", "backslashreplace").decode() for part in (text, text[: limit - limit // 2])]
    if len(text) <= limit:
        assert capture.text() == safe[0]
    else:
        tail = text[len(text) - limit // 2 :].encode("utf-8", "backslashreplace").decode()
        assert capture.text() == f"{safe[1]}\n[... {len(text) - limit} characters left out ...]\n{tail}"
    assert capture.text() == capped(text, limit)


# Time.


def test_loop_is_stopped_and_the_session_goes_on(session):
    result = session.run("print('started')\nwhile True:\n    pass", timeout=0.3)
    assert result.timed_out
    assert "TimeoutError: the call took longer than 0.3 s" in result.error
    assert result.output == "started\n"
    assert 0.3 <= result.duration < LONG
    assert shown(session, "1 + 1") == "2\n"


def test_variables_survive_an_interrupted_call(jailed):
    shown(jailed, "x = 1")
    result = jailed.run("x = 2\nwhile True:\n    pass", timeout=0.3)
    assert (result.timed_out, result.restarted) == (True, False)
    assert '  File "<cell 2>", line' in result.error
    assert shown(jailed, "x") == "2\n"


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    while True: pass\nwhile True:\n    try: f()\n    except BaseException: pass",
        "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
    ],
)
def test_what_cannot_be_interrupted_is_killed(jailed, code):
    shown(jailed, "x = 1")
    result = jailed.run(code, timeout=0.2)
    assert (result.timed_out, result.restarted) == (True, True)
    assert "TimeoutError" in result.error
    assert "variables of this session are lost" in result.error
    assert error_of(jailed, "x").endswith("NameError: name 'x' is not defined")


def test_processor_time_of_a_session_is_limited():
    require_backend("bubblewrap")
    with open_sandbox("bubblewrap", limits=Limits(cpu=1.0)) as opened, opened.session() as session:
        result = session.run("while True:\n    pass", timeout=LONG)
        assert result.restarted
        assert "processor time" in result.error


# Lost workers.


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os\nos._exit(4)", "exited with status 4"),
        ("import ctypes\nctypes.string_at(0)", "Segmentation fault"),
        ("import os\nfor fd in range(3, 64):\n    try: os.close(fd)\n    except OSError: pass", "exited with status"),
        ("import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'x' * 99)\n    except OSError: pass", "protocol"),
        ("import gc, sys\nsys.setrecursionlimit(60)\ndef f(): f()\nf()", ""),
    ],
)
def test_lost_worker_is_replaced(jailed, code, said):
    shown(jailed, "x = 1")
    result = jailed.run(code)
    assert said in result.error
    assert not result.timed_out
    if result.restarted:
        assert "variables of this session are lost" in result.error
    assert jailed.run("y = 2").restarted in (False, not result.restarted)
    assert shown(jailed, "y = 2\ny") == "2\n"


def test_exit_status_is_told(either):
    assert "exited with status 4" in either.run("import os\nos._exit(4)").error
    result = either.run(
        "while True:\n    try: (lambda: [0 for _ in iter(int, 1)])()\n    except BaseException: pass", timeout=0.2
    )
    assert (result.timed_out, result.restarted) == (True, True)
    assert shown(either, "1 + 1") == "2\n"


def test_worker_that_died_between_calls_is_told_before_anything_runs(either):
    shown(either, "x = 1")
    pid = worker_pid(either)
    os.kill(pid, signal.SIGKILL)
    await_none_of({pid})
    result = either.run("print('run')")
    assert (result.output, result.restarted, result.timed_out) == ("", True, False)
    assert "was not run" in result.error
    assert shown(either, "print('run')") == "run\n"


def test_forged_reply_does_not_become_the_next_answer(jailed):
    """A reply that the code itself sends: the call may be lied about, the next one is not."""
    code = """
import json, os, struct, sys
frame = sys._getframe()
while "request" not in frame.f_locals:
    frame = frame.f_back
reply = {"id": frame.f_locals["request"]["id"], "output": "forged", "error": "", "timed_out": False}
data = json.dumps(reply).encode()
os.write(frame.f_locals["descriptor"], struct.pack("!I", len(data)) + data)
"""
    assert jailed.run(code).output == "forged"
    results = [jailed.run("1 + 1") for _ in range(2)]
    assert results[0].restarted
    assert results[1].output == "2\n"


@pytest.mark.parametrize(
    "reply",
    [
        b"[" * 900,
        b'{"output": ' + b"9" * 900 + b"}",
        b'{"ended": "x"}',
        b'{"ended": -1e400}',
        b'{"ended": -12345}',
        b'{"ended": -1000000000000}',
        b'{"ended": 1' + b"0" * 900 + b"}",
        b'{"ended": 256}',
        b'{"ended": true}',
        b'{"ended": -0.0}',
        b'{"a": ' * 180 + b"1" + b"}" * 180,
        b"null",
        b"\xff\xfe",
        b'{"id": [], "output": 1}',
    ],
)
def test_malformed_replies_only_cost_the_worker(jailed, reply):
    code = f"""
import os, struct, sys
frame = sys._getframe()
while "request" not in frame.f_locals:
    frame = frame.f_back
os.write(frame.f_locals["descriptor"], struct.pack("!I", {len(reply)}) + {reply!r})
"""
    result = jailed.run(code)
    assert result.restarted
    assert len(result.error) < 200
    if reply.startswith(b'{"ended": '):
        assert result.error.startswith(("The worker died. ", "The worker was killed: it broke the protocol"))
    assert shown(jailed, "1 + 1") == "2\n"
    # The same, said after the answer and thus found by the next call.
    code = f"""
import os, signal, struct, sys
frame = sys._getframe()
while "request" not in frame.f_locals:
    frame = frame.f_back
def late(*_, fd=frame.f_locals["descriptor"]):
    os.write(fd, struct.pack("!I", {len(reply)}) + {reply!r})
signal.signal(signal.SIGUSR1, late)
"""
    jailed.run(code)
    process = jailed._held[0]._process
    signal.pidfd_send_signal(process, signal.SIGUSR1)
    assert select.select([jailed._held[0]._connection], [], [], LONG)[0]
    result = jailed.run("print('run')")
    assert (result.output, result.restarted) == ("", True)
    assert "was not run" in result.error
    assert len(result.error) < 300


def test_long_numbers_of_a_worker_are_not_read(jailed):
    """Python may have been told to read integers of any length, which takes long."""
    program = """
import json, socket, struct, time
from ctpo.train._bubblewrap import _receive
for reply in b'{"a": ' + b"9" * 400_000 + b"}", b'{"a": -' + b"9" * 30 + b"}":
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    ours.setblocking(False)
    assert ours.send(struct.pack("!I", len(reply)) + reply) == len(reply) + 4
    try:
        print(_receive(theirs, 1 << 20, time.monotonic() + 60.0))
    except ValueError as error:
        print(error)
assert int("9" * 10_000)  # nothing bounds it
"""
    done = subprocess.run(
        [sys.executable, "-X", "int_max_str_digits=0", "-c", program], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.stdout, done.stderr) == ("a message that cannot be read\n" * 2, "")


def test_refused_fork_costs_one_session(tmp_path):
    """Outside a jail, as the limits of the system that refuse it cannot be set for root: the loop of the parent."""
    program = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "ctpo" / "train")!r})
from _jail import worker
def refuse():
    raise BlockingIOError(11, "Resource temporarily unavailable")
os.fork, worker._PRELOAD = refuse, "json"
worker.main()
"""
    from ctpo.train._bubblewrap import _receive

    control, theirs = socket.socketpair()
    config = {"control": theirs.fileno(), "here": str(ROOT / "ctpo" / "train"), "path": [], "nested": True}
    command = [sys.executable, "-c", program, json.dumps(config)]
    with control, theirs, subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=tmp_path) as parent:
        theirs.close()
        deadline = time.monotonic() + LONG
        assert _receive(control, 1000, deadline) == {"ready": True}
        for _ in range(3):
            ours, other = socket.socketpair()
            with ours, other:
                socket.send_fds(control, [b"s"], [other.fileno()])
                other.close()
                said = _receive(ours, 1000, deadline)
                assert said == {"failed": "BlockingIOError: [Errno 11] Resource temporarily unavailable"}
                assert ours.recv(1) == b""
        control.close()
        assert parent.wait(LONG) == 0


def test_a_reply_that_is_announced_as_huge_is_not_awaited(jailed):
    code = "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'\\xff' * 4)\n    except OSError: pass"
    result = jailed.run(code, timeout=LONG)
    assert result.restarted
    assert result.duration < LONG


def test_killed_parent_of_the_sessions_is_replaced():
    require_backend("bubblewrap")
    others = descendants(os.getpid())
    with open_sandbox("bubblewrap", limits=LIMITS) as opened, opened.session() as session:
        shown(session, "x = 1")
        jail = descendants(os.getpid()) - others
        for pid in jail:
            os.kill(pid, signal.SIGKILL)
        await_none_of(jail)
        assert session.run("x").restarted
        assert shown(session, "1 + 1") == "2\n"
        with opened.session() as second:
            assert shown(second, "1 + 2") == "3\n"


# Nothing leaks from session to session.


def test_sessions_share_nothing(bubblewrap):
    with bubblewrap.session() as first, bubblewrap.session() as second:
        code = """
import builtins, math, os, sys, sympy, numpy
secret = 1
open("/tmp/secret", "w").write("x")
os.environ["SECRET"] = "x"
math.pi = 3
builtins.secret = 1
sympy.sqrt = None
numpy.pi = 3
sys.path.append("/secret")
"""
        shown(first, code)
        for session in (second, bubblewrap.session()):
            with session:
                code = """
import math, os, sys, sympy, numpy
print(os.listdir("/tmp"), dict(os.environ), math.pi > 3, sympy.sqrt(4), numpy.pi > 3, "/secret" in sys.path)
"""
                assert shown(session, code) == "[] {} True 2 True False\n"
                assert error_of(session, "secret").endswith("NameError: name 'secret' is not defined")


def test_sessions_draw_different_random_numbers(bubblewrap):
    code = (
        "import random, numpy as np, sympy.core.random as s\n"
        "print(random.random(), np.random.random(), s.rng.random(), np.random.default_rng().random())"
    )
    drawn = []
    for _ in range(3):
        with bubblewrap.session() as session:
            drawn += shown(session, code).split()
    assert len(set(drawn)) == 12


def test_two_sessions_run_at_the_same_time(bubblewrap):
    """Each waits for a sign of life that only the host passes on, while both calls run."""
    with bubblewrap.session() as first, bubblewrap.session() as second:
        pids = []
        for session in (first, second):
            shown(session, "import signal\nseen = []\n_ = signal.signal(signal.SIGUSR1, lambda *a: seen.append(1))")
            pids.append(worker_pid(session))
        wait = "import time\nwhile not seen: time.sleep(0.01)\n'done'"
        results: dict[int, RunResult] = {}
        threads = [
            threading.Thread(target=lambda i=i, s=s: results.update({i: s.run(wait, timeout=LONG)}))
            for i, s in enumerate((first, second))
        ]
        for thread in threads:
            thread.start()
        os.kill(pids[1], signal.SIGUSR1)  # the second ends although the first, which began before it, still runs
        threads[1].join(LONG)
        assert results[1].output == "'done'\n"
        assert 0 not in results
        os.kill(pids[0], signal.SIGUSR1)
        threads[0].join(LONG)
        assert results[0].output == "'done'\n"


@every_backend
def test_sessions_of_a_backend_run_in_parallel(backend):
    """A session that loops until its time is over does not hold up another."""
    require_backend(backend)
    with open_sandbox(backend, limits=LIMITS) as opened, opened.session() as first, opened.session() as second:
        shown(first, "x = 1")
        shown(second, "x = 2")
        stopped = threading.Event()
        thread = threading.Thread(target=lambda: (first.run("while True: pass", timeout=LONG), stopped.set()))
        thread.start()
        assert shown(second, "x") == "2\n"
        assert not stopped.is_set()
        first._held[0].kill()
        thread.join(LONG)
        assert not thread.is_alive()


# As Python, inside bubblewrap.


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("raise SystemExit", ""),
        ("import sys\nsys.exit(0)", ""),
        ("exit()", ""),
        ("raise SystemExit('bye')", "SystemExit: bye"),
        ("quit(3)", "SystemExit: 3"),
    ],
)
def test_exit_ends_the_call_but_not_the_session(jailed, code, error):
    shown(jailed, "x = 1")
    result = jailed.run(code)
    assert (result.error, result.restarted) == (error, False)
    assert shown(jailed, "x") == "1\n"


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.stdout = None",
        "import sys\nsys.stdout.close()\nsys.stderr.close()",
        "import sys\ndel sys.stdout",
        "import contextlib, io\ncontextlib.redirect_stdout(io.StringIO()).__enter__()",
        "import builtins\nbuiltins._ = None",
        "import linecache, traceback\nlinecache.getlines = traceback.format_exc = None",
        "import sys\nsys.modules.clear()",
    ],
)
def test_later_calls_show_their_output_whatever_earlier_ones_did(jailed, code):
    jailed.run(code)
    assert shown(jailed, "print('a')\n'b'") == "a\n'b'\n"
    assert error_of(jailed, "1 / 0").endswith("ZeroDivisionError: division by zero")


def test_a_handler_that_keeps_stderr_writes_to_the_call_that_runs(jailed):
    shown(jailed, "import logging\nlogging.basicConfig(format='%(message)s')")
    assert shown(jailed, "logging.warning('careful')") == "careful\n"


def test_bytes_may_be_written(jailed):
    assert shown(jailed, "import sys\n_ = sys.stdout.buffer.write('é\\n'.encode() + b'\\xff')") == "é\n\\xff"


def test_standard_streams_are_as_programs_expect_them(jailed):
    code = "import sys\nsys.stdout.reconfigure(encoding='utf-8', line_buffering=True)\nprint('ü')"
    assert shown(jailed, code) == "ü\n"
    assert shown(jailed, "sys.stdin.buffer.read(), sys.stdin.read(), list(sys.stdin)") == "(b'', '', [])\n"


def test_files_and_folders_are_copied_with_what_belongs_to_them(either):
    code = """
import os, shutil
os.makedirs("d/e")
open("d/e/f", "w").write("x")
os.utime("d/e/f", (5, 5))
shutil.copy2("d/e/f", "g")
shutil.copytree("d", "h")
print(os.stat("g").st_mtime, os.stat("h/e/f").st_mtime, os.listdir("h"))
"""
    assert shown(either, code) == "5.0 5.0 ['e']\n"
    assert "Operation not supported" in error_of(either, "os.setxattr('g', 'user.x', b'1')")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import multiprocessing\nmultiprocessing.Pool(2)", "ImportError: This platform lacks a functioning sem_open"),
        ("import multiprocessing\nmultiprocessing.Queue()", "ImportError: This platform lacks a functioning sem_open"),
        ("import concurrent.futures as c\nc.ProcessPoolExecutor(2)", "NotImplementedError: This Python build lacks"),
        ("import multiprocessing\nmultiprocessing.Process(target=print).start()", "PermissionError"),
    ],
)
def test_error_of_several_processes_can_be_understood(jailed, code, error):
    assert error_of(jailed, code).splitlines()[-1].startswith(error)


def test_input_ends_at_once(jailed):
    assert error_of(jailed, "input()").endswith("EOFError: EOF when reading a line")


def test_chained_errors_show_no_frame_of_the_worker(jailed):
    error = error_of(jailed, "try:\n    1 / 0\nexcept Exception as e:\n    raise ValueError('x') from e")
    assert "The above exception was the direct cause" in error
    assert set(re.findall(r'File "(.*?)"', error)) == {"<cell 1>"}
    group = error_of(jailed, "raise ExceptionGroup('g', [ValueError('a'), TypeError('b')])")
    assert "TypeError: b" in group
    assert set(re.findall(r'File "(.*?)"', group)) == {"<cell 2>"}


def test_classes_can_be_pickled_and_files_imported(jailed):
    shown(jailed, "import pickle\nclass A: pass\na = A()")
    assert shown(jailed, "type(pickle.loads(pickle.dumps(a))) is A") == "True\n"
    code = "open('helper.py', 'w').write('value = 7')\nimport helper\nhelper.value"
    assert shown(jailed, code) == "7\n"


def test_numpy_sympy_and_asyncio_work(jailed):
    assert shown(jailed, "import sympy\nx = sympy.Symbol('x')\nsympy.integrate(2 * x, x)") == "x**2\n"
    assert shown(jailed, "import numpy as np\nnp.linalg.solve([[2.0]], [4.0])") == "array([2.])\n"
    code = "import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    return 5\nasyncio.run(f())"
    assert shown(jailed, code) == "5\n"


@pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="no SciPy")
def test_scipy_works(either):
    """Its BLAS is one that NumPy has not loaded, and would start threads."""
    code = "import scipy.linalg\nimport sympy as sp\nprint(scipy.linalg.det([[1.0, 2.0], [3.0, 4.0]]))"
    assert float(shown(either, code)) == pytest.approx(-2.0)
    assert shown(either, "import os\nx = sp.Symbol('x')\nprint(dict(os.environ), sp.lambdify(x, sp.sin(x))(0.0))") == (
        "{} 0.0\n"
    )
    assert float(shown(either, "import scipy.optimize\nprint(scipy.optimize.brentq(lambda x: x * x - 4, 0, 5))")) == (
        pytest.approx(2.0)
    )


def test_session_has_no_rights_at_all(lasting):
    shown(lasting, "x = 1")
    status = dict(
        line.split(":\t", 1) for line in pathlib.Path(f"/proc/{worker_pid(lasting)}/status").read_text().splitlines()
    )
    assert {status[name].strip("0") for name in status if name.startswith("Cap") and name != "CapBnd"} == {""}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert "0" not in status["Uid"].split() or os.geteuid() != 0
    ours, theirs = (pathlib.Path(f"/proc/{pid}/ns") for pid in ("self", worker_pid(lasting)))
    for namespace in ("cgroup", "ipc", "mnt", "net", "pid", "uts"):
        assert os.readlink(ours / namespace) != os.readlink(theirs / namespace), namespace


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os\nos.fork()", "PermissionError"),
        ("import threading\nthreading.Thread(target=print).start()", "RuntimeError: can't start new thread"),
        ("import subprocess\nsubprocess.run(['true'])", "Error"),
        ("import os\nos.execv('/usr/bin/true', ['true'])", "Error"),
        ("import socket\nsocket.socket()", "PermissionError"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
        ("open('/file', 'w')", "Read-only file system"),
        ("open('/proc/self/status')", "FileNotFoundError"),
        ("open('/etc/passwd')", "FileNotFoundError"),
        ("import os\nos.listdir('/home')", "FileNotFoundError"),
        ("import ctypes\nif ctypes.CDLL(None).unshare(0x10000000): raise OSError('unshare')", "OSError: unshare"),
        ("f = open('/tmp/f', 'wb')\nfor _ in range(3): f.write(bytes(1 << 20))\nf.flush()", "File too large"),
        ("for i in range(3): open(f'/tmp/g{i}', 'wb').write(bytes(1 << 19))", "No space left on device"),
        ("files = [open('/tmp/f', 'w') for _ in range(100)]", "Too many open files"),
        ("import fcntl\nfcntl.flock(open('/tmp/f', 'w'), fcntl.LOCK_EX)", "PermissionError"),
        ("import fcntl\nfcntl.lockf(open('/tmp/f', 'w'), fcntl.LOCK_EX)", "PermissionError"),
        ("import socket\na, b = socket.socketpair()\na.send(b'x', socket.MSG_OOB)", "PermissionError"),
    ],
)
def test_system_refuses(lasting, code, error):
    assert error in error_of(lasting, code).splitlines()[-1]
    assert shown(lasting, "1 + 1") == "2\n"


def test_number_of_files_is_limited(either):
    error = error_of(either, "for i in range(100): open(f'/tmp/{i}', 'w').close()\n")
    assert f"No space left on device: '/tmp/{LIMITS.files}'" in error


def test_devices_can_be_used_but_not_changed(either):
    shown(either, "import os\nopen('/dev/null', 'w').write('x')\nos.write(os.open('/dev/null', os.O_RDWR), b'x')")
    assert shown(either, "open('/dev/zero', 'rb').read(2), len(os.urandom(3))") == "(b'\\x00\\x00', 3)\n"
    for device in ("null", "zero", "full", "random", "urandom"):
        before = os.stat(f"/dev/{device}")
        for change in ("os.utime({})", "os.utime({}, (0, 0))", "os.chmod({}, 0o666)"):
            error = error_of(either, change.format(repr(f"/dev/{device}")))
            assert re.search("Read-only file system|Operation not permitted", error)
        assert "Read-only file system" in error_of(either, f"os.utime('/dev/{device}')")
        assert os.stat(f"/dev/{device}").st_ctime_ns == before.st_ctime_ns


def test_flags_of_open_files_are_not_shared(bubblewrap):
    with bubblewrap.session() as first, bubblewrap.session() as second:
        flags = "import fcntl, os\n[fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK for fd in (0, 1, 2)]"
        shown(first, "import os\nfor fd in (0, 1, 2): os.set_blocking(fd, False)")
        assert shown(first, flags) == f"{[os.O_NONBLOCK] * 3}\n"
        assert shown(second, flags) == "[0, 0, 0]\n"
        with bubblewrap.session() as later:
            assert shown(later, flags) == "[0, 0, 0]\n"


def test_limits_of_the_process_as_the_kernel_has_them(lasting):
    shown(lasting, "x = 1")
    pid = worker_pid(lasting)
    limits = {
        line[:26].strip(): line[26:].split()[:2]
        for line in pathlib.Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    }
    exact = {
        "Max cpu time": round(LIMITS.cpu),
        "Max file size": LIMITS.tmp,
        "Max processes": 0,
        "Max open files": 64,
        "Max core file size": 0,
        "Max stack size": 8 << 20,
        "Max locked memory": 0,
        "Max msgqueue size": 0,
        "Max nice priority": 0,
        "Max realtime priority": 0,
    }
    for name, value in exact.items():
        assert limits[name] == [str(value)] * 2, name
    soft, hard = limits["Max address space"]
    size = int(re.search(r"VmSize:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1]) << 10  # type: ignore[index]
    assert soft == hard
    assert LIMITS.memory < int(soft) < size + LIMITS.memory + (16 << 20)
    # What cannot be dumped belongs to root, whoever runs it, and only root can look into it.
    assert os.stat(f"/proc/{pid}/mem").st_uid == 0
    if os.geteuid() != 0:
        with pytest.raises(PermissionError):
            os.listdir(f"/proc/{pid}/fd")


@pytest.mark.parametrize(
    "place", ["lib/python3/dist-packages", "lib/site-packages", "lib/own tool/lib/py/site-packages"]
)
def test_other_packages_of_the_interpreter_are_not_there(monkeypatch, tmp_path, place):
    """Where the permitted ones lie in the folders of the system themselves; this one is under /tmp, with a space."""
    require_backend("bubblewrap")
    from ctpo.train import _bubblewrap

    library = tmp_path / "a b" / place
    for name in ("permitted", "secret"):
        (library / name).mkdir(parents=True)
        (library / name / "__init__.py").write_text(f"value = {name!r}")
    (library / "secret.txt").write_text("secret")
    monkeypatch.setattr(sys, "path", [str(library), *sys.path])
    monkeypatch.setattr(_bubblewrap, "_PACKAGES", (*_bubblewrap._PACKAGES, "permitted"))
    paths = _bubblewrap._system_paths
    monkeypatch.setattr(_bubblewrap, "_system_paths", lambda: [*paths(), str(tmp_path / "a b" / "lib")])
    for nested in (True, False):
        backend = _bubblewrap.Bubblewrap(LIMITS, nested=nested)
        with Sandbox("bubblewrap", backend, LIMITS) as opened, opened.session() as session:
            assert shown(session, "import permitted\npermitted.value") == "'permitted'\n"
            assert shown(session, f"import os\nos.listdir({str(library)!r})") == "['permitted']\n"
            assert "No module named 'secret'" in error_of(session, "import secret")
            assert "No such file" in error_of(session, f"open({str(library / 'secret.txt')!r})")
            assert "Read-only file system" in error_of(session, f"open({str(library / 'new')!r}, 'w')")


def test_folders_of_packages_have_no_others(lasting):
    """Of this interpreter, and of the system's."""
    code = """
import glob, os
for top in ("/usr/lib*", "/usr/local/lib*", os.path.dirname(os.path.dirname(os.__file__))):
    for folder in glob.glob(f"{top}/*/*-packages"):
        found = {name.split(".")[0] for name in os.listdir(folder)}
        if found - {"numpy", "scipy", "sympy", "mpmath", "gmpy2"}:
            print(folder, found)
"""
    assert shown(lasting, code) == ""


# The filter of system calls.

# Whatever their arguments are; whoever adds one has asked what it gives to a hostile program.
PERMITTED = """
    access alarm arch_prctl brk chdir chmod clock_getres clock_gettime clock_nanosleep close close_range
    copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait
    eventfd eventfd2 exit exit_group faccessat faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fdatasync
    fstat fstatfs fsync ftruncate futex getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups
    getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid getrlimit
    getrusage getsid getsockname gettid gettimeofday getuid link linkat lseek lstat madvise mincore mkdir
    mkdirat mmap mprotect mremap msync munmap nanosleep newfstatat open openat pause pipe pipe2 poll ppoll
    pread64 preadv preadv2 pselect6 pwrite64 pwritev pwritev2 read readlink readlinkat readv rename renameat
    renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend
    rt_sigtimedwait sched_getaffinity sched_yield select sendfile set_robust_list set_tid_address setitimer
    shutdown sigaltstack stat statfs statx symlink symlinkat sysinfo time times truncate umask uname unlink
    unlinkat utime utimensat utimes write writev
"""


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_decides_as_it_should(machine):
    """Interpreted by hand: what is let through, refused, or kills."""
    import errno
    import struct

    allow, denied = 0x7FFF0000, 0x50000 | errno.EPERM
    program = list(struct.iter_unpack("HBBI", seccomp.program(7, machine)))

    def verdict(
        number: int, *arguments: int, arch: int = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    ) -> int:
        data = struct.pack("IIQ6Q", number, arch, 0, *(*arguments, *[0] * 6)[:6])
        position, accumulator = 0, 0
        while True:
            operation, if_true, if_false, value = program[position]
            position += 1
            if operation == 0x20:
                (accumulator,) = struct.unpack_from("I", data, value)
            elif operation == 0x06:
                return value
            else:
                holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}
                position += if_true if holds[operation] else if_false

    names = [
        "read",
        "socket",
        "socketpair",
        "clone",
        "clone3",
        "kill",
        "ioctl",
        "execve",
        "ptrace",
        "sendto",
        "unshare",
    ]
    numbers = {
        "x86_64": [0, 41, 53, 56, 435, 62, 16, 59, 101, 44, 272],
        "aarch64": [63, 198, 199, 220, 435, 129, 29, 221, 117, 206, 97],
    }[machine]
    call = dict(zip(names, numbers, strict=True))
    assert verdict(call["read"]) == allow
    assert verdict(call["socketpair"], 1) == allow
    assert verdict(call["kill"], 7, 9) == allow
    assert verdict(call["ioctl"], 0, 0x5401) == allow
    assert verdict(call["sendto"], 3, 0, 1, 0x4000) == allow
    for refused in ("socket", "clone", "execve", "ptrace", "unshare"):
        assert verdict(call[refused]) == denied
    assert verdict(call["socketpair"], 2) == verdict(call["socketpair"], 10) == denied
    assert verdict(call["kill"], 8, 9) == verdict(call["kill"], 2**32 - 1, 9) == denied
    assert verdict(call["ioctl"], 0, 0x5412) == denied  # TIOCSTI
    assert verdict(call["sendto"], 3, 0, 1, 1) == denied
    assert verdict(call["clone3"]) == 0x50000 | errno.ENOSYS
    assert verdict(5000) == denied
    assert verdict(call["read"], arch=0x40000003) == 0x80000000  # i386
    if machine == "x86_64":
        assert verdict(0x40000000) == verdict(0x40000000 + 41) == 0x80000000
    getsockopt, setxattr = {"x86_64": (55, 188), "aarch64": (209, 5)}[machine]
    for option in range(100):
        allowed = option in (3, 4, 7, 8, 38, 39)
        assert verdict(getsockopt, 3, 1, option) == (allow if allowed else denied), option
        assert verdict(getsockopt, 3, 0, option) == verdict(getsockopt, 3, 6, option) == denied
    for number in range(setxattr, setxattr + 12):
        assert verdict(number) == 0x50000 | errno.ENOTSUP
    kinds = {number: verdict(number, *[2**32 - 1] * 6) for number in range(600)}
    permitted = {row[machine == "aarch64"] for name, row in seccomp._CALLS.items() if name in PERMITTED.split()}
    assert {number for number, kind in kinds.items() if kind == allow} == permitted - {None}


def test_permitted_calls_are_these():
    assert sorted(seccomp._CALLS) == sorted(PERMITTED.split())


def test_filter_says_which_architectures_it_knows():
    with pytest.raises(OSError, match="no seccomp filter for riscv64, only for x86_64, aarch64"):
        seccomp.program(1, "riscv64")


@pytest.mark.skipif(not os.path.exists("/usr/include/asm-generic/unistd.h"), reason="no kernel headers")
def test_numbers_of_system_calls_are_those_of_the_kernel():
    generic = pathlib.Path("/usr/include/asm-generic/unistd.h").read_text()
    aarch64 = {name: int(n) for name, n in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)\n", generic)}
    aarch64["newfstatat"] = aarch64["fstatat"]
    tables = [(1, aarch64)]
    native = pathlib.Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if platform.machine() == "x86_64" and native.exists():
        tables.append((0, {name: int(n) for name, n in re.findall(r"#define __NR_(\w+) (\d+)\n", native.read_text())}))
    for column, numbers in tables:
        for name, row in seccomp._CALLS.items():
            assert numbers.get(name) == row[column] or name not in numbers, name
        for name in (
            "ioctl",
            "fcntl",
            "kill",
            "tgkill",
            "prlimit64",
            "socketpair",
            "sendto",
            "recvfrom",
            "clone3",
            "getsockopt",
        ):
            row = getattr(seccomp, f"_{name.removesuffix('64').upper()}")
            assert numbers[name] == row[column], name
        kinds = [f"{link}{verb}xattr" for verb in ("set", "get", "list", "remove") for link in ("", "l", "f")]
        assert [numbers[kind] for kind in kinds] == list(seccomp._XATTR[column])


# Opening and closing.


@every_backend
def test_session_that_never_runs_costs_nothing(backend):
    require_backend(backend)
    with open_sandbox(backend) as opened:
        before = descendants(os.getpid())
        sessions = [opened.session() for _ in range(100)]
        assert descendants(os.getpid()) <= before
        for session in sessions:
            session.close()


@every_backend
def test_closing_leaves_nothing_and_stops_running_calls(backend):
    require_backend(backend)
    before = descendants(os.getpid())
    opened = open_sandbox(backend, limits=LIMITS)
    session, other = opened.session(), opened.session()
    shown(session, "x = 1")
    shown(other, "x = 1")
    failures = []

    def call() -> None:
        try:
            session.run("while True: pass", timeout=LONG)
        except ValueError as error:
            failures.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    started = descendants(os.getpid()) - before
    assert started
    opened.close()
    opened.close()
    thread.join(LONG)
    assert len(failures) == 1
    assert "closed" in failures[0]
    await_none_of(started)
    for used in (session, other):
        with pytest.raises(ValueError, match="closed"):
            used.run("1")
        used.close()
        used.close()
    with pytest.raises(ValueError, match="closed"):
        opened.session()


def test_closed_session_ends_its_call_and_its_process(either):
    shown(either, "x = 1")
    pid = worker_pid(either)
    failures = []

    def call() -> None:
        try:
            either.run("while True: pass", timeout=LONG)
        except ValueError as error:
            failures.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    while not either._running:
        threading.Event().wait(0.01)
    either.close()
    thread.join(LONG)
    assert len(failures) == 1
    await_none_of({pid})


@every_backend
def test_session_closed_while_its_worker_starts_ends_its_call(backend):
    require_backend(backend)
    with open_sandbox(backend, limits=LIMITS) as opened:
        session = opened.session()
        start = opened._backend.start

        def start_and_close(timeout: float) -> Any:
            worker = start(timeout)
            closing = threading.Thread(target=session.close)
            closing.start()
            while not session._closed:
                threading.Event().wait(0.01)
            closers.append(closing)
            return worker

        closers: list[threading.Thread] = []
        opened._backend.start = start_and_close  # type: ignore[method-assign]
        begin = time.monotonic()
        with pytest.raises(ValueError, match="closed"):
            session.run("while True: pass", timeout=LONG)
        closers[0].join(LONG)
        assert not closers[0].is_alive()
        assert time.monotonic() - begin < LONG / 2


CLOSED_BY_A_SIGNAL = """
import signal, sys, threading, time
from ctpo.train.sandbox import open_sandbox
opened = open_sandbox(sys.argv[1])
session = opened.session()
session.run("1")
def close(*_):
    try:
        session.run("1")
    except ValueError as error:
        print(error)
    (session if sys.argv[2] == "session" else opened).close()
signal.signal(signal.SIGALRM, close)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    session.run("while True: pass", timeout=50)
except ValueError as error:
    print(error)
opened.close()
"""


@every_backend
@pytest.mark.parametrize("what", ["session", "sandbox"])
def test_signal_handler_may_close_what_it_interrupts(backend, what):
    require_backend(backend)
    command = [sys.executable, "-c", CLOSED_BY_A_SIGNAL, backend, what]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=LONG / 1.5)
    first, second = done.stdout.splitlines()
    assert first == "run: this thread is in a call of this session, which a signal has interrupted"
    assert second == "run: the session was closed during the call"


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.01, 0.03])
def test_monty_closed_during_starts_says_so(delay):
    require_backend("monty")
    opened = open_sandbox("monty", limits=LIMITS)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            opened.session().run("while True: pass", timeout=LONG)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    threading.Event().wait(delay)
    opened.close()
    for thread in threads:
        thread.join(LONG)
    assert [type(error) for error in errors] == [ValueError] * 6
    assert all("closed" in str(error) for error in errors)


@every_backend
def test_code_that_is_slow_to_read_holds_up_no_other_session(backend):
    """Python's own tokenizer takes time as the square of such code."""
    require_backend(backend)
    with open_sandbox(backend, limits=LIMITS) as opened, opened.session() as session, opened.session() as other:
        shown(session, "1")
        shown(other, "1")
        threads = [
            threading.Thread(
                target=session.run, args=(f"x = {piece * (400_000 // len(piece))}",), kwargs={"timeout": 1.0}
            )
            for piece in ("'\\", '"', "(", "-", "[1,")
        ]
        for thread in threads:
            thread.start()
        longest = 0.0
        while any(thread.is_alive() for thread in threads):
            longest = max(longest, other.run("1 + 1").duration)
        assert longest < 10.0


@given(code=st.text(alphabet="'\"\\\n\r;#()x \ufeff=", max_size=40))
def test_search_for_the_last_statement_finds_a_place_or_none(code):
    from ctpo.train._monty import _last_statement

    place = _last_statement(code)
    if place is not None:
        line, offset = place
        assert len(re.split(r"\r\n|\r|\n", code[:offset])) == line
        assert not code[offset].isspace()


@pytest.mark.parametrize("piece", ["'\\", '"', "q\\", '"""a', "(", ";", " \\\n", "\n", "x", "#"])
def test_search_for_the_last_statement_takes_no_longer_than_reading(piece):
    """Of a megabyte; where the time grows as the square it is hours."""
    from ctpo.train._monty import _last_statement

    begin = time.monotonic()
    _last_statement("x = " + piece.replace("q", 3 * "'") * (1_000_000 // len(piece)))
    assert time.monotonic() - begin < LONG / 3


def test_monty_traceback_of_long_lines_is_bounded():
    """A thousand frames, each in a line of its own among many or very long."""
    require_backend("monty")
    with open_sandbox("monty", limits=LIMITS) as opened, opened.session() as session:
        for code in (
            "\n" * 500_000 + "def f(n):\n    return f(n + 1)",
            "def f(n): return f(n + 1)  # " + "x" * 50_000,
        ):
            result = session.run(f"{code}\nf(0)")
            assert result.error.endswith("RecursionError: maximum recursion depth exceeded"), result.error[-200:]
            assert len(result.error) < LIMITS.output + 100


def test_what_is_forgotten_is_closed():
    require_backend("bubblewrap")
    before = descendants(os.getpid())
    opened = open_sandbox("bubblewrap", limits=LIMITS)
    session = opened.session()
    shown(session, "x = 1")
    pid = worker_pid(session)
    del session
    gc.collect()
    await_none_of({pid})
    assert descendants(os.getpid()) - before
    started = descendants(os.getpid()) - before
    del opened
    gc.collect()
    await_none_of(started)


def test_session_that_is_collected_while_its_worker_is_killed(monkeypatch):
    """By chance, wherever memory is allocated: in the thread that closes the sandbox."""
    require_backend("bubblewrap")
    from ctpo.train import _bubblewrap

    opened = open_sandbox("bubblewrap", limits=LIMITS)
    session = opened.session()
    shown(session, "x = 1")
    pid = worker_pid(session)
    worker = session._held[0]
    session.me = session  # type: ignore[attr-defined]  # only the collector will find it
    del session
    kill, calls = _bubblewrap._kill, []

    def collecting(process: int) -> None:
        if process == worker._process:  # type: ignore[attr-defined]
            calls.append(gc.collect())
        kill(process)

    monkeypatch.setattr(_bubblewrap, "_kill", collecting)
    thread = threading.Thread(target=opened.close, daemon=True)
    thread.start()
    thread.join(LONG)
    assert calls
    assert not thread.is_alive()
    await_none_of({pid})


def test_descriptors_of_any_number_are_closed():
    """A host with many open files gives the jail a connection of a high number."""
    program = """
import os, resource, sys
from ctpo.train._jail.worker import _close_all_but
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (70001, hard if hard == resource.RLIM_INFINITY else max(hard, 70001)))
except (ValueError, OSError):
    sys.exit(f"no descriptor above {hard}")
numbers = [10, 11, 12, 65535, 65536, 69999, 70000]
for number in numbers:
    os.dup2(0, number)
_close_all_but(11)
for number in range(3, 70001):
    try:
        os.fstat(number)
        print(number)
    except OSError:
        pass
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    if done.stderr.startswith("no descriptor"):
        pytest.skip(done.stderr)
    assert (done.stdout, done.stderr) == ("11\n", "")


HOST = """
import sys, threading
from ctpo.train.sandbox import Limits, Sandbox, open_sandbox
if sys.argv[1] == "monty":
    opened = open_sandbox("monty", limits=Limits(timeout=1.0))  # its loops end with their time, not before
else:
    from ctpo.train._bubblewrap import Bubblewrap
    opened = Sandbox("bubblewrap", Bubblewrap(Limits(), nested=sys.argv[1] == "nested"), Limits())
session, looping = opened.session(), opened.session()
for each in session, looping:
    assert each.run("1").output == "1\\n"
threading.Thread(target=looping.run, args=("while True: pass", 60.0), daemon=True).start()
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["exit", "kill"])
@pytest.mark.parametrize("form", ["nested", "one jail per session", "monty"])
def test_end_of_the_host_is_the_end_of_all(form, end):
    """One session waits, one loops; nobody closes them."""
    require_backend("monty" if form == "monty" else "bubblewrap")
    command = [sys.executable, "-c", HOST, form]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == "ready\n"
        started = descendants(host.pid)
        assert len(started) >= 2
        if end == "kill":
            host.kill()
        else:
            host.communicate("\n", timeout=LONG)
    for _ in range(600):
        left = {pid for pid in started if _state(pid) != "Z"}
        if not left:
            return
        threading.Event().wait(0.1)
    pytest.fail(f"still there: {left}")


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "jail.close()"])
@pytest.mark.parametrize("nested", [True, False])
def test_jail_that_starts_ends_with_its_host(nested, end):
    """Killed, or closing it, before bubblewrap has said what it started; each try a little later."""
    require_backend("bubblewrap")
    mark = secrets.randbelow(10**15) + 10**15  # in the arguments of its processes
    program = f"""
import os, shutil, sys, time
from ctpo.train import _bubblewrap as module
from ctpo.train.sandbox import Limits
if "close" in {end!r}:
    module._readable = lambda *arguments: False  # as if nothing came in time
for delay in map(float, sys.argv[1:]):
    if os.fork() == 0:
        jail = module._Jail(shutil.which("bwrap"), module._Form({nested}, os.geteuid() == 0), Limits(output={mark}))
        time.sleep(delay)
        {end}
        os._exit(0)
    os.wait()
"""
    delays = [str(seconds) for seconds in (0.0, 0.001, 0.003, 0.006, 0.01, 0.03)]
    subprocess.run([sys.executable, "-c", program, *delays], check=True, cwd=ROOT)
    for _ in range(600):
        left = [pid for pid in os.listdir("/proc") if pid.isdigit() and str(mark) in _command_line(pid)]
        if not left:
            return
        threading.Event().wait(0.1)
    pytest.fail(f"still there: {left}")


def _command_line(pid: str) -> str:
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _state(pid: int) -> str:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_worker_outlives_the_thread_that_started_it(bubblewrap):
    with bubblewrap.session() as session:
        thread = threading.Thread(target=session.run, args=("x = 1",))
        thread.start()
        thread.join()
        assert shown(session, "x") == "1\n"


@every_backend
def test_forked_process_neither_uses_nor_ends_the_sandbox(backend):
    require_backend(backend)
    program = f"""
import os, threading
from ctpo.train.sandbox import open_sandbox
opened = open_sandbox({backend!r})
session, busy = opened.session(), opened.session()
session.run("x = 1")
thread = threading.Thread(target=busy.run, args=("while True: pass", 2.0))
thread.start()
while not busy._running:
    pass
child = os.fork()
if child == 0:
    try:
        session.run("x = 2")
    except ValueError as error:
        print(error, flush=True)
    session.close()
    busy.close()
    opened.close()
    os._exit(0)
os.waitpid(child, 0)
print(session.run("x").output, end="")
thread.join()
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=LONG)
    assert done.stdout == "run: the sandbox was opened in another process; open one in this process\n1\n"


def test_monty_in_a_process_forked_from_one_that_used_it_says_what_to_do():
    require_backend("monty")
    program = """
import os, time
from ctpo.train.sandbox import SandboxUnavailable, open_sandbox
open_sandbox("monty").close()
child = os.fork()
if child == 0:
    begin = time.monotonic()
    try:
        open_sandbox("monty")
    except SandboxUnavailable as error:
        print("spawn" in str(error), time.monotonic() - begin < 20, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=2 * LONG)
    assert done.stdout == "True True\n"


# No isolation, no run.


def test_nothing_there_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    found = backends()
    assert "apt install bubblewrap" in found["bubblewrap"]
    assert "pip install" in found["monty"]
    with pytest.raises(SandboxUnavailable, match=r"apt install bubblewrap.*pip install \"pydantic-monty"):
        open_sandbox()
    with pytest.raises(SandboxUnavailable, match="apt install bubblewrap"):
        open_sandbox("bubblewrap")
    with pytest.raises(SandboxUnavailable, match="pip install"):
        open_sandbox("monty")


@pytest.mark.parametrize(
    "script",
    [
        "echo 'bwrap: No permissions to create new namespace' >&2; exit 1",
        "exit 0",
        'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
    ],
    ids=["refused", "silent", "no isolation at all"],
)
def test_bubblewrap_that_does_not_isolate_is_not_used(monkeypatch, tmp_path, script):
    program = tmp_path / "bwrap"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    with pytest.raises(SandboxUnavailable, match=r"a trial of .*bwrap failed") as raised:
        open_sandbox()
    if "No permissions" in script:
        assert "No permissions to create new namespace" in str(raised.value)


def test_trial_notices_an_open_door(monkeypatch):
    require_backend("bubblewrap")
    from ctpo.train import _bubblewrap

    monkeypatch.setattr(_bubblewrap, "_TRIAL", _bubblewrap._TRIAL + "\nopen_door('temporary files', lambda: 1)\n")
    with pytest.raises(SandboxUnavailable, match="not isolated: temporary files"):
        open_sandbox("bubblewrap")


def test_slower_form_is_told_and_why(monkeypatch, caplog):
    require_backend("bubblewrap")
    from ctpo.train import _bubblewrap

    attempt = _bubblewrap.Bubblewrap._try

    def refused(self):
        if self._form.nested:
            raise SandboxUnavailable("unshare: Operation not permitted")
        attempt(self)

    with open_sandbox("bubblewrap", limits=LIMITS):
        assert caplog.messages == []
    monkeypatch.setattr(_bubblewrap.Bubblewrap, "_try", refused)
    with open_sandbox("bubblewrap", limits=LIMITS) as opened, opened.session() as session:
        assert shown(session, "1 + 1") == "2\n"
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("ctpo.train.sandbox", "WARNING")
    assert "jail of its own" in record.getMessage()
    assert "unshare: Operation not permitted" in record.getMessage()


def test_auto_takes_monty_where_bubblewrap_is_missing(monkeypatch, tmp_path):
    require_backend("monty")
    monkeypatch.setenv("PATH", str(tmp_path))
    with open_sandbox() as opened, opened.session() as session:
        assert opened.backend == "monty"
        assert shown(session, "1 + 1") == "2\n"


def test_auto_takes_bubblewrap_where_it_works():
    require_backend("bubblewrap")
    with open_sandbox() as opened:
        assert opened.backend == "bubblewrap"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: open_sandbox("docker"), "backend must be one of auto, bubblewrap, monty, got 'docker'"),
        (lambda: open_sandbox(limits=5), "limits must be Limits or None, got 5"),
        (lambda: Limits(timeout=0), "timeout must be a positive number, got 0"),
        (lambda: Limits(timeout=float("nan")), "timeout must be a positive number, got nan"),
        (lambda: Limits(memory=1e9), "memory must be a positive integer, got 1000000000.0"),
        (lambda: Limits(output=True), "output must be a positive integer, got True"),
        (lambda: Limits(timeout=1e12), "timeout must be at most 1000000, got 1000000000000.0"),
        (lambda: Limits(cpu=0.01), "cpu must be at least 1 and at most 1000000000, got 0.01"),
        (lambda: Limits(memory=1 << 60), f"memory must be at most {1 << 48}, got {1 << 60}"),
        (lambda: Limits(tmp=10**400), f"tmp must be at most {1 << 48}, got {10**400}"),
        (lambda: Limits(files=10**10), "files must be at most 1000000000, got 10000000000"),
        (lambda: Limits(output=10**9), "output must be at most 100000000, got 1000000000"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_bad_arguments_of_a_call_are_named(session):
    with pytest.raises(ValueError, match="code must be a string, got int"):
        session.run(5)
    for timeout in (0, -1.0, float("inf"), "1", True):
        with pytest.raises(ValueError, match="timeout must be a positive number"):
            session.run("1", timeout=timeout)
    with pytest.raises(ValueError, match=r"^timeout must be at most 1000000, got 1000000000000\.0$"):
        session.run("1", timeout=1e12)


@every_backend
def test_largest_limits_work(backend):
    require_backend(backend)
    limits = Limits(1e6, 1e9, 1 << 48, 1 << 48, 10**9, 10**8)
    with open_sandbox(backend, limits=limits) as opened, opened.session() as session:
        assert shown(session, "1 + 1") == "2\n"


def test_names_are_public():
    assert set(module.__all__) == {
        "Limits", "RunResult", "Sandbox", "SandboxUnavailable", "Session", "backends", "open_sandbox"
    }  # fmt: skip
