"""Sessions against a plain model of them: what they remember, what they forget, and that they say so.

The model is a dictionary of variables for every session. Where a session says `restarted` its dictionary is emptied;
every value that is read must then agree.
"""

from __future__ import annotations

import ast
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sandbox_arena import descendants
from sandbox_backends import BACKENDS, require_backend

SLOTS = st.integers(0, 1)
NAMES = st.sampled_from("abc")
VALUES = st.integers(-5, 5) | st.text("xyz'\\\n", max_size=4) | st.lists(st.integers(0, 9), max_size=3)
MISSING = object()
LONG = 60.0  # seconds that no call here should need: two busy cores


def kill(processes: Iterable[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


class Sessions(RuleBasedStateMachine):
    """Two sessions of one sandbox at a time."""

    backend = ""
    sandbox: Any = None

    @initialize()
    def begin(self) -> None:
        self.sessions = [self.sandbox.session() for _ in range(2)]
        self.model: list[dict[str, Any]] = [{}, {}]
        self.shaken = [False, False]  # a program did what may cost the worker, at once or at the next call

    def teardown(self) -> None:
        for session in getattr(self, "sessions", ()):
            session.close()

    def call(self, slot: int, code: str, *, timeout: float = LONG, may_restart: bool = False) -> Any:
        result = self.sessions[slot].run(code, timeout=timeout)
        if result.restarted:
            assert may_restart or self.shaken[slot], result
            assert result.error
            self.model[slot].clear()
        self.shaken[slot] = may_restart
        return result

    def settle(self, slot: int) -> None:
        """A call that changes nothing, so that a loss is told before the call that is looked at."""
        if self.shaken[slot]:
            self.call(slot, "pass", may_restart=True)
            result = self.call(slot, "1 + 1")
            assert (result.output, result.error) == ("2\n", "")

    @rule(slot=SLOTS, name=NAMES, value=VALUES)
    def assign(self, slot: int, name: str, value: Any) -> None:
        self.settle(slot)
        result = self.call(slot, f"{name} = {value!r}")
        assert (result.output, result.error, result.timed_out) == ("", "", False)
        self.model[slot][name] = value

    @rule(slot=SLOTS, name=NAMES)
    def read(self, slot: int, name: str) -> None:
        self.settle(slot)
        result = self.call(slot, name)
        value = self.model[slot].get(name, MISSING)
        if value is MISSING:
            assert result.output == ""
            assert result.error.splitlines()[-1].startswith("NameError: "), result
        else:
            assert result.error == ""
            assert ast.literal_eval(result.output) == value

    @rule(slot=SLOTS, name=NAMES, text=st.text("ab π\n", max_size=5))
    def show(self, slot: int, name: str, text: str) -> None:
        self.settle(slot)
        result = self.call(slot, f"print({text!r})\n{name} = 7\nprint({name} + 1)\n'end'")
        assert (result.output, result.error) == (f"{text}\n8\n'end'\n", "")
        self.model[slot][name] = 7

    @rule(slot=SLOTS, name=NAMES, value=VALUES)
    def fail(self, slot: int, name: str, value: Any) -> None:
        self.settle(slot)
        result = self.call(slot, f"print('before')\n{name} = {value!r}\nraise ValueError('boom')\n{name} = None")
        assert result.output == "before\n"
        assert result.error.splitlines()[-1] == "ValueError: boom"
        assert not result.timed_out
        self.model[slot][name] = value

    @rule(slot=SLOTS)
    def misspell(self, slot: int) -> None:
        self.settle(slot)
        result = self.call(slot, "a = 9\nb = = 1")
        assert result.output == ""
        assert "SyntaxError" in result.error
        assert not result.timed_out

    @rule(slot=SLOTS, name=NAMES)
    def loop(self, slot: int, name: str) -> None:
        """A loop that can be interrupted: its variables stay unless `restarted` says otherwise."""
        self.settle(slot)
        before = dict(self.model[slot])
        result = self.call(slot, f"{name} = 'looped'\nwhile True:\n    pass", timeout=0.2, may_restart=True)
        assert result.timed_out
        assert result.error
        if not result.restarted:
            self.model[slot] = before | {name: "looped"}
            if self.call(slot, name, may_restart=True).output != "'looped'\n":
                assert self.model[slot] == {}

    @precondition(lambda self: self.backend == "bubblewrap")
    @rule(slot=SLOTS)
    def loop_that_hears_nothing(self, slot: int) -> None:
        self.settle(slot)
        code = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass"
        result = self.call(slot, code, timeout=0.2, may_restart=True)
        assert result.timed_out
        assert result.restarted

    @precondition(lambda self: self.backend == "bubblewrap")
    @rule(slot=SLOTS)
    def leave(self, slot: int) -> None:
        self.settle(slot)
        result = self.call(slot, "print('last words')\nimport os\nos._exit(3)", may_restart=True)
        assert result.restarted
        assert not result.timed_out

    @precondition(lambda self: self.backend == "bubblewrap")
    @rule(slot=SLOTS)
    def forge(self, slot: int) -> None:
        code = (
            "import os\nfor fd in range(3, 64):\n    try:\n        os.set_blocking(fd, False)\n"
            '        os.write(fd, b\'\\0\\0\\0\\x12{"output": "forged"}\')\n    except OSError: pass'
        )
        self.call(slot, code, may_restart=True)

    @precondition(lambda self: self.backend == "bubblewrap")
    @rule(slot=SLOTS, value=VALUES)
    def kill_between_calls(self, slot: int, value: Any) -> None:
        """The worker dies while it waits: the next call says that the variables are lost, and its code is not run."""
        self.close_and_open(slot)
        before = set(descendants())
        self.assign(slot, "a", value)
        kill(set(descendants()) - before)
        result = self.call(slot, "b = 1", may_restart=True)
        assert result.restarted
        assert result.output == ""
        self.settle(slot)

    @rule(slot=SLOTS)
    def close_and_open(self, slot: int) -> None:
        self.sessions[slot].close()
        with pytest.raises(ValueError, match="closed"):
            self.sessions[slot].run("1")
        self.sessions[slot] = self.sandbox.session()
        self.model[slot].clear()
        self.shaken[slot] = False

    @rule(name=NAMES, values=st.tuples(VALUES, VALUES))
    def at_once(self, name: str, values: tuple[Any, Any]) -> None:
        """Both sessions run at the same time, each with its own value of one name."""
        for slot in range(2):
            self.settle(slot)
        results: list[Any] = [None, None]

        def work(slot: int) -> None:
            results[slot] = self.sessions[slot].run(f"{name} = {values[slot]!r}\n{name}", timeout=LONG)

        threads = [threading.Thread(target=work, args=(slot,)) for slot in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for slot, result in enumerate(results):
            assert result.error == ""
            assert not result.restarted
            assert ast.literal_eval(result.output) == values[slot]
            self.model[slot][name] = values[slot]

    @invariant()
    def results_are_those_of_the_model(self) -> None:
        """Only names that the model has: those of one session never appear in the other."""
        for slot, model in enumerate(getattr(self, "model", ())):
            if not self.shaken[slot] and model:
                name = min(model)
                result = self.call(slot, name)
                assert ast.literal_eval(result.output) == model[name]


@pytest.fixture(scope="module", params=BACKENDS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Any]:
    require_backend(request.param)
    from ctpo.train.sandbox import Limits, open_sandbox

    with open_sandbox(request.param, limits=Limits(timeout=LONG)) as opened:
        yield opened


def test_sessions_do_as_their_model(sandbox):
    machine = type("Machine", (Sessions,), {"backend": sandbox.backend, "sandbox": sandbox})
    thorough = settings().max_examples > 100
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60 if thorough else 8,
            stateful_step_count=40 if thorough else 15,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_killed_workers_are_replaced_and_their_sessions_told(sandbox):
    """All of them at once, whatever else the backend has running."""
    sessions = [sandbox.session() for _ in range(3)]
    before = set(descendants())
    for i, session in enumerate(sessions):
        assert session.run(f"x = {i}").error == ""
    kill(set(descendants()) - before or before)
    for i, session in enumerate(sessions):
        result = session.run("x")
        assert (result.output, result.restarted, result.timed_out) == ("", True, False)
        assert "variables of this session are lost" in result.error
        assert session.run(f"x = {i}\nx").output == f"{i}\n"
        session.close()


def test_interrupted_call_keeps_the_variables_where_the_code_can_be_stopped(sandbox):
    if sandbox.backend != "bubblewrap":
        pytest.skip("Monty loses them, and says so")
    with sandbox.session() as session:
        session.run("x = 3")
        result = session.run("print('on')\nwhile True: pass", timeout=0.3)
        assert (result.output, result.timed_out, result.restarted) == ("on\n", True, False)
        assert result.error.splitlines()[-1].startswith("TimeoutError: ")
        assert session.run("x").output == "3\n"


def test_sessions_draw_different_random_numbers(sandbox):
    code = "import random\nprint(random.random())\n"
    if sandbox.backend == "bubblewrap":
        code += "import numpy as np, sympy\nprint(np.random.rand(), sympy.randMatrix(9, 9))"
    outputs = []
    for _ in range(2):
        with sandbox.session() as session:
            result = session.run(code)
            assert result.error == ""
            outputs.append(result.output.split("\n", 1))
    assert outputs[0][0] != outputs[1][0]
    assert sandbox.backend == "monty" or outputs[0][1] != outputs[1][1]


def test_many_sessions_in_many_threads(sandbox):
    """More threads than cores, each with sessions of its own one after the other."""
    wrong: list[Any] = []

    def work(i: int) -> None:
        for k in range(4):
            with sandbox.session() as session:
                session.run(f"x = {100 * i + k}")
                result = session.run("x", timeout=LONG)
                if result.output != f"{100 * i + k}\n":
                    wrong.append(result)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def gone_within(seconds: float, processes: Iterable[int]) -> bool:
    deadline = time.monotonic() + seconds
    waiting = set(processes)
    while waiting and time.monotonic() < deadline:
        time.sleep(0.02)
        waiting = {pid for pid in waiting if running(pid)}
    return not waiting


def running(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_of_a_sandbox_may_be_killed(backend):
    """Not the sessions' workers only: what starts them, too."""
    require_backend(backend)
    from ctpo.train.sandbox import open_sandbox

    before = set(descendants())
    with open_sandbox(backend) as opened, opened.session() as session:
        session.run("x = 1")
        started = set(descendants()) - before
        assert started
        kill(started)
        assert session.run("x").restarted
        assert session.run("x = 2\nx").output == "2\n"
        with opened.session() as other:
            assert other.run("1").output == "1\n"
        started |= set(descendants()) - before
    assert gone_within(LONG, started)


HOST = """
import sys, threading
from ctpo.train.sandbox import Limits, open_sandbox

sandbox = open_sandbox(sys.argv[1], limits=Limits(timeout=float(sys.argv[2])))
sessions = [sandbox.session() for _ in range(2)]
loop = "x = 1\\n" + sys.argv[3] + "\\nwhile True: pass"
for session in sessions:
    session.run("x = 1")
threading.Thread(target=sessions[0].run, args=(loop,)).start()
print("ready", flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("backend", "timeout", "deaf"),
    [
        ("bubblewrap", "600", "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))"),
        ("monty", "3", "pass"),  # the worker of a killed host ends with its time
    ],
)
def test_nothing_outlives_a_host_that_is_killed(backend, timeout, deaf):
    """One session waits, one loops."""
    require_backend(backend)
    command = [sys.executable, "-c", HOST, backend, timeout, deaf]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == "ready\n"
        time.sleep(0.2)  # into the loop
        started = set(descendants(of=host.pid))
        assert started
        host.kill()
    try:
        assert gone_within(20.0, started)
    finally:
        kill(filter(running, started))


@pytest.mark.parametrize("backend", BACKENDS)
def test_descriptors_of_any_number_will_do(backend):
    """A trainer has thousands of them open; select() takes those below 1024 only."""
    require_backend(backend)
    from ctpo.train.sandbox import open_sandbox

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"no more than {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        null = os.open(os.devnull, os.O_RDONLY)
        stack.callback(os.close, null)
        for _ in range(1100):
            stack.callback(os.close, os.dup(null))
        with open_sandbox(backend) as opened, opened.session() as session:
            assert session.run("x = 1").error == ""
            assert session.run("x").output == "1\n"
