"""The host that the attacks aim at, watched from outside, and the table of how each attack was contained.

`python tests/sandbox_arena.py` runs every attack on the backends that work here and writes the table in
docs/sandbox.md.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from sandbox_attacks import ATTACKS, ESCAPED, PRELUDE, SECRET, Attack

PROJECT = Path(__file__).resolve().parents[1]
PAGE = PROJECT / "docs" / "sandbox.md"
VARIABLE = "CTPO_ATTACK_SECRET"

# Small, so that running into a limit is quick. `memory` has to hold sympy, and a program's arrays of 16 MiB.
LIMITS: dict[str, Any] = {"timeout": 5.0, "memory": 512 * 2**20, "tmp": 32 * 2**20, "output": 20_000}

# What a new session shows of its surroundings: the same in every session of a sandbox, whatever ran before.
PROBES = {
    "bubblewrap": """
names = sorted(name for name in globals() if not name.startswith("__"))
import builtins, decimal, locale, math, os, resource, signal, sys, threading
print(names, sys.path, sys.getrecursionlimit(), [getattr(f, "__name__", type(f).__name__) for f in sys.meta_path])
import sympy
x = sympy.Symbol("x")
print(sympy.expand((x + 1) ** 2), sympy.Integer(7), sympy.integrate.__module__, sympy.simplify.__module__, sum([1, 2]))
print(math.sqrt(9.0), len("ab"), decimal.getcontext().prec, locale.setlocale(locale.LC_ALL), sys.gettrace())
print(sorted(os.environ.items()), os.getcwd(), sorted(os.listdir("/tmp")), os.umask(0o22), threading.active_count())
print([signal.getsignal(n) in (signal.SIG_DFL, None) for n in range(1, 65)], signal.getitimer(signal.ITIMER_PROF))
print([resource.getrlimit(n) for n in range(16) if n != resource.RLIMIT_AS], os.getpriority(os.PRIO_PROCESS, 0))
print(resource.getrlimit(resource.RLIMIT_AS)[0] >> 26, sorted(os.sched_getaffinity(0)), os.getuid(), os.getpid())
opened = []
for fd in range(64):
    try:
        os.fstat(fd)
        opened.append(fd)
    except OSError:
        pass
print(opened, sorted(name for name in os.listdir("/proc") if name.isdigit()))
""",
    "monty": """
import math, sys
print(math.sqrt(9.0), sum([1, 2]), len("ab"), sys.version)
try:
    print(secret)
except NameError:
    print("no such name")
""",
}
# A session that is open all the time, with a secret in every place where one session could reach another's.
NEIGHBORS = {
    "bubblewrap": """
import ctypes, os, socket, threading
kept = "$neighbor"
open("/tmp/neighbor", "w").write(kept)
os.environ["NEIGHBOR"] = "neighbor" + kept
def serve(s):
    while True:
        s.accept()[0].send(kept.encode())
for family, address in ((socket.AF_INET, ("127.0.0.1", 47113)), (socket.AF_UNIX, "\\0neighbor")):
    try:
        s = socket.socket(family)
        s.bind(address)
        s.listen()
        threading.Thread(target=serve, args=(s,), daemon=True).start()
    except OSError:
        pass
libc = ctypes.CDLL(None)
libc.prctl(15, b"neighbor", 0, 0, 0)
for make in (lambda: libc.shmget(47113, 100, 0o1666), lambda: libc.msgget(47113, 0o1666)):
    make()
print("ready")
""",
    "monty": 'kept = "$neighbor"\nprint("ready")\n',
}


class Host:
    """Everything on the host that an attack could read, change or reach, and what came of it.

    Listeners answer with the secret; so do the canary file, this process's environment and that of the victim, a
    process of the host.
    """

    def __enter__(self) -> Host:
        self._stack = ExitStack()
        self.secret, self.neighbor = (f"canary-{secrets.token_hex(16)}" for _ in range(2))
        self.directory = Path(tempfile.mkdtemp(prefix="ctpo-attacks-"))
        self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self.canary = self.directory / "canary"
        self.connections = 0
        self.marker = f"victim-{secrets.token_hex(8)}"
        self.abstract = f"ctpo-{secrets.token_hex(8)}"
        os.environ[VARIABLE] = self.secret
        self._stack.callback(os.environ.pop, VARIABLE, None)
        self.victim: subprocess.Popen[bytes] | None = None
        self._stack.callback(self._end_victim)
        self._tcp = self._listen(socket.AF_INET, ("127.0.0.1", 0))
        self._unix = self._listen(socket.AF_UNIX, str(self.directory / "socket"))
        self._listen(socket.AF_UNIX, "\0" + self.abstract)
        for address in (str(self.directory / "datagram"), f"\0{self.abstract}-datagram"):
            self._hear(address)
        self._udp = self._stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._udp.bind(("127.0.0.1", 0))
        threading.Thread(target=self._answer, daemon=True).start()
        self.reset()
        return self

    def __exit__(self, *error: object) -> None:
        for listener in (self._tcp, self._unix):
            listener.close()
        self._stack.close()

    def _listen(self, family: socket.AddressFamily, address: Any) -> socket.socket:
        listener = self._stack.enter_context(socket.socket(family))
        listener.bind(address)
        listener.listen(16)

        def serve() -> None:
            while True:
                try:
                    connection = listener.accept()[0]
                except OSError:
                    return
                self.connections += 1
                with connection:
                    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + self.secret.encode())

        threading.Thread(target=serve, daemon=True).start()
        return listener

    def _hear(self, address: str) -> None:
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        listener.bind(address)

        def hear() -> None:
            while True:
                try:
                    listener.recv(100)
                except OSError:
                    return
                self.connections += 1

        threading.Thread(target=hear, daemon=True).start()

    def _answer(self) -> None:
        while True:
            try:
                _, address = self._udp.recvfrom(100)
            except OSError:
                return
            self.connections += 1
            self._udp.sendto(self.secret.encode(), address)

    def _end_victim(self) -> None:
        if self.victim is not None:
            self.victim.kill()
            self.victim.wait()

    def reset(self) -> None:
        """Everything as it should be, after an attack that succeeded (the controls)."""
        for path in self.directory.iterdir():
            if path.name not in ("socket", "datagram"):
                path.unlink()
        self.canary.write_text(self.secret + "\n", encoding="utf-8")
        self.connections = 0
        if self.victim is None or self.victim.poll() is not None:
            command = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(3600)", self.marker]
            self.victim = subprocess.Popen(command)

    def fill(self, code: str) -> str:
        """A program with the places of this host in it."""
        assert self.victim is not None
        return Template(code).safe_substitute(
            canary=self.canary,
            directory=self.directory,
            project=PROJECT,
            tcp=self._tcp.getsockname()[1],
            udp=self._udp.getsockname()[1],
            unix=self.directory / "socket",
            abstract=self.abstract,
            victim=self.victim.pid,
            marker=self.marker,
            hostname=os.uname().nodename,
            neighbor=self.neighbor,
            tmp=LIMITS["tmp"],
            memory=LIMITS["memory"],
        )

    def names(self, text: str) -> str:
        """The places of this host named in words, so that two runs give the same text."""
        for place, name in ((self.canary, "<file of the host>"), (self.directory, "<folder of the host>")):
            text = text.replace(str(place), name)
        return re.sub(r"/tmp/tmp\w{8}", "/tmp/tmp…", text.replace(str(PROJECT), "<project>"))

    def changes(self) -> list[str]:
        """What an attack did to the host."""
        assert self.victim is not None
        found = []
        if self.canary.read_text(encoding="utf-8") != self.secret + "\n":
            found.append("the file of the host was changed")
        if names := sorted({path.name for path in self.directory.iterdir()} - {"canary", "socket", "datagram"}):
            found.append(f"new in the folder of the host: {names}")
        if self.connections:
            found.append("the host was connected to")
        if self.victim.poll() is not None or _stat(self.victim.pid)[1] in "tT":
            found.append("a process of the host was killed or stopped")
        return found


def _stat(pid: int) -> tuple[int, str, int]:
    """Parent, state, resident bytes of a process of the host."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return int(fields[1]), fields[0], int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


def descendants(of: int | None = None, but: int | None = None) -> dict[int, int]:
    """Resident bytes of every process below this one, or another, that is not a zombie."""
    parents, sizes = {}, {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parents[int(name)], state, size = _stat(int(name))
            except (OSError, IndexError):
                continue
            if state not in "ZX":
                sizes[int(name)] = size
    found, border = set(), {of or os.getpid()}
    while border:
        border = {pid for pid, parent in parents.items() if parent in border and pid not in found and pid != but}
        found |= border
    return {pid: sizes[pid] for pid in found if pid in sizes}


class Watch:
    """Most processes and most memory below this process while an attack runs."""

    def __init__(self, host: Host) -> None:
        self.processes = self.memory = 0
        self._host = host
        self._stop = threading.Event()

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        assert self._host.victim is not None
        while not self._stop.wait(0.05):
            found = descendants(but=self._host.victim.pid)
            self.processes = max(self.processes, len(found))
            self.memory = max(self.memory, sum(found.values()))


@dataclass
class Outcome:
    """How an attack ended."""

    how: str
    escapes: list[str] = field(default_factory=list)  # what it reached that it must not reach
    damage: list[str] = field(default_factory=list)  # what no longer works as it should


def how(result: Any, host: Host, limit: int) -> str:
    """In a few words, what stopped the program."""
    lines = [line for line in result.error.strip().splitlines() if line.strip()]
    last = host.names(lines[-1] if lines else "")
    if result.timed_out:
        return "stopped at the time limit" + ("; variables lost" if result.restarted else "")
    if result.restarted:
        return f"stopped: {last.partition(' The variables')[0]} Variables lost"
    if lines:
        return last if len(last) <= 100 else (last[:100].rpartition(" ")[0] or last[:50]) + " …"
    said = [line for line in result.output.splitlines() if line.startswith("contained: ")]
    if said:
        return host.names(said[-1])
    return "output cut" if len(result.output) >= limit else "no error"


class Arena:
    """One sandbox, a neighbor in it, and the host around."""

    def __init__(self, host: Host, sandbox: Any) -> None:
        self.host, self.sandbox = host, sandbox
        self.neighbor = sandbox.session()
        started = self.neighbor.run(host.fill(NEIGHBORS[sandbox.backend]), timeout=60.0)
        assert started.output == "ready\n", started
        self.surroundings = self._probe()
        self.base = (set(descendants(but=host.victim.pid if host.victim else None)), self._descriptors())

    def _probe(self) -> str:
        with self.sandbox.session() as session:
            result = session.run(PROBES[self.sandbox.backend], timeout=60.0)
        return str(result.error or result.output)

    @staticmethod
    def _descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def run(self, attack: Attack) -> Outcome:
        """Run an attack in a session of its own; look at the host, the neighbor and a new session."""
        limits, host = self.sandbox.limits, self.host
        session = self.sandbox.session()
        start = time.monotonic()
        with Watch(host) as watch:
            result = session.run(PRELUDE + host.fill(attack.code), timeout=attack.timeout)
        elapsed = time.monotonic() - start
        outcome = Outcome(how(result, host, limits.output))
        text = result.output + result.error
        if elapsed > attack.timeout + 10:
            outcome.damage.append(f"took {elapsed:.1f} s of {attack.timeout:g}")
        if len(text) > 4 * limits.output:
            outcome.damage.append(f"{len(text)} characters of output")
        if watch.processes > len(self.base[0]) + 300:
            outcome.damage.append(f"{watch.processes} processes")
        if watch.memory > 6 * limits.memory:
            outcome.damage.append(f"{watch.memory / 2**20:.0f} MiB of memory")
        text += self._after(session, attack, outcome)
        session.close()
        outcome.escapes += host.changes() + self._seen(text, result.output)
        neighbor = self.neighbor.run("print(kept)", timeout=60.0)
        if neighbor.output != host.neighbor + "\n" or neighbor.restarted:
            outcome.damage.append(f"the other session: {neighbor}")
        if (found := self._probe()) != self.surroundings:
            pairs = zip(found.splitlines(), self.surroundings.splitlines(), strict=False)
            differing = [pair for pair in pairs if pair[0] != pair[1]]
            outcome.damage.append(f"a new session differs (now, before): {differing or found}")
        self._left(outcome)
        return outcome

    def _seen(self, text: str, output: str) -> list[str]:
        found = [f"printed {ESCAPED}"] if ESCAPED in output else []
        return found + (["a secret was read"] if re.search(SECRET, text) else [])

    def _after(self, session: Any, attack: Attack, outcome: Outcome) -> str:
        """The same session answers the next call, or says that it begins anew and then answers."""
        code, expected = attack.after
        text = ""
        for _ in range(3):
            found = session.run(code, timeout=10.0)
            text += found.output + found.error
            if found.output == expected or not expected:
                return text
            if not (found.error or found.restarted or found.timed_out):
                outcome.damage.append(f"wrong answer to the next call: {found}")
                return text
        outcome.damage.append(f"the session never answers again: {found}")
        return text

    def _left(self, outcome: Outcome) -> None:
        """Processes and open files of the closed session are gone, at once or very soon."""
        victim = self.host.victim.pid if self.host.victim else None
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            left = len(descendants(but=victim)) - len(self.base[0])
            opened = self._descriptors() - self.base[1]
            if left <= 0 and opened <= 0:
                return
            time.sleep(0.02)
        outcome.damage.append(f"left behind: {left} processes, {opened} open files")


def run_unconfined(host: Host, attack: Attack) -> list[str]:
    """The same program on the host itself: what the same watch sees."""
    host.reset()
    done = subprocess.run(
        [sys.executable, "-I", "-c", PRELUDE + host.fill(attack.code)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
        cwd="/",
    )
    found = host.changes()
    found += [f"printed {ESCAPED}"] if ESCAPED in done.stdout else []
    found += ["a secret was read"] if re.search(SECRET, done.stdout) else []
    return found


def cells(text: str) -> list[str]:
    """The cells of a row of a Markdown table."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", text.strip())[1:-1]]


def _escaped(text: str) -> str:
    return re.sub(r"([|<>*_`\\\[\]])", r"\\\1", text)


def table(found: dict[str, dict[str, str]]) -> str:
    """Markdown: every attack, what it tries, how each backend contained it."""
    rows = ["| attack | tries | bubblewrap | Monty |", "|---|---|---|---|"]
    kind = ""
    for attack in ATTACKS:
        if attack.kind != kind:
            kind = attack.kind
            rows.append(f"| **{kind}** | | | |")
        texts = [f"`{attack.name}`", _escaped(attack.tries)]
        for backend in ("bubblewrap", "monty"):
            text = re.sub(r"[^\x20-\x7e…]", "?", found[backend][attack.name].removeprefix("contained: "))
            texts.append(_escaped(text))
        rows.append("| " + " | ".join(texts) + " |")
    return "\n".join(rows)


def main() -> int:
    """Run everything, write the table."""
    from ctpo.train.sandbox import Limits, open_sandbox

    found: dict[str, dict[str, str]] = {}
    bad = 0
    for backend in ("bubblewrap", "monty"):
        with Host() as host, open_sandbox(backend, limits=Limits(**LIMITS)) as sandbox:
            arena = Arena(host, sandbox)
            found[backend] = {}
            for attack in ATTACKS:
                outcome = arena.run(attack)
                found[backend][attack.name] = outcome.how
                for problem in outcome.escapes + outcome.damage:
                    bad += 1
                    print(f"{backend} {attack.name}: {problem}", file=sys.stderr)
    if bad:
        return 1
    head, rest = PAGE.read_text(encoding="utf-8").split("<!-- attacks -->\n")[0::2]
    temporary = PAGE.with_suffix(".new")
    temporary.write_text(f"{head}<!-- attacks -->\n{table(found)}\n<!-- attacks -->\n{rest}", encoding="utf-8")
    os.replace(temporary, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
