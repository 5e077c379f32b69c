"""`python -m benchmarks.sandbox`: what a call of the sandbox costs, beside an interpreter started for every call.

A warm call is one in a session that has run before; `first call` is a new session's, from the request to the answer,
and has the fork and everything that the first call has to prepare. Sessions per second are opened, used once and
closed by two threads. Median and 95th percentile; the backends that cannot run here are left out and said to be.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ctpo.train.sandbox import Sandbox, backends, open_sandbox

PURE = "sum(i * i for i in range(100))"
SOLVE = "import sympy as sp\nx = sp.Symbol('x')\nprint(sp.solve(x**2 - 5 * x + 6, x))"
INTEGRATE = "import sympy as sp\nx = sp.Symbol('x')\nprint(sp.integrate(x * sp.exp(x), x))"
NUMPY = "import numpy as np\nprint(np.linalg.det(np.eye(3)))"
CODES = {"pure Python": PURE, "NumPy": NUMPY, "SymPy solves": SOLVE, "SymPy integrates": INTEGRATE}
MARK = "<!-- speed -->\n"
GOALS = {("bubblewrap", "warm call, SymPy solves"): "< 10 ms", ("monty", "warm call, pure Python"): "< 1 ms"}


def times_of(function: Callable[[], Any], repeats: int) -> list[float]:
    """Wall seconds of each repeat."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return found


def row(backend: str, what: str, seconds: Sequence[float]) -> dict[str, Any]:
    """Median and 95th percentile in milliseconds."""
    high = sorted(seconds)[min(len(seconds) - 1, int(0.95 * len(seconds)))]
    return {
        "backend": backend,
        "what": what,
        "goal": GOALS.get((backend, what), ""),
        "median ms": f"{1000 * statistics.median(seconds):.2f}",
        "95 % ms": f"{1000 * high:.2f}",
        "calls": len(seconds),
    }


def checked(sandbox: Sandbox, code: str) -> Callable[[], None]:
    """A function that opens a session, runs one call in it and closes it."""

    def once() -> None:
        with sandbox.session() as session:
            found = session.run(code)
        if found.error:
            raise RuntimeError(found.error)

    return once


def rate(sandbox: Sandbox, code: str, *, threads: int, seconds: float) -> float:
    """Sessions per second, each with one call."""
    once, counts, start = checked(sandbox, code), [0] * threads, time.perf_counter()

    def work(i: int) -> None:
        while time.perf_counter() < start + seconds:
            once()
            counts[i] += 1

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - start)


def one_backend(backend: str, repeats: int) -> list[dict[str, Any]]:
    """All rows of a backend."""
    codes = CODES if backend == "bubblewrap" else {"pure Python": PURE}
    rows, start = [], time.perf_counter()
    with open_sandbox(backend) as sandbox:
        checked(sandbox, PURE)()
        rows.append(row(backend, "opening a sandbox, to the first answer", [time.perf_counter() - start]))
        for name, code in codes.items():
            rows.append(
                row(backend, f"first call of a session, {name}", times_of(checked(sandbox, code), repeats // 4))
            )
        for name, code in codes.items():
            with sandbox.session() as session:
                session.run(code)
                if error := session.run(code).error:
                    raise RuntimeError(error)
                rows.append(row(backend, f"warm call, {name}", times_of(functools.partial(session.run, code), repeats)))
        for threads in (1, 2):
            per_second = rate(sandbox, codes.get("SymPy solves", PURE), threads=threads, seconds=repeats / 100)
            what = f"sessions with one call each, {threads} thread{'s' if threads > 1 else ''}"
            rows.append(row(backend, what, [1 / per_second]) | {"median ms": f"{per_second:.0f} per s", "95 % ms": ""})
    return rows


def here(repeats: int) -> list[dict[str, Any]]:
    """The same code in this process: what of a call is the program itself."""
    rows = []
    for name, code in CODES.items():
        program = compile(code, name, "exec")

        def once(program: Any = program) -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(program, {})

        once()
        rows.append(row("this process, no isolation", f"a call, {name}", times_of(once, repeats)))
    return rows


def interpreters(repeats: int) -> list[dict[str, Any]]:
    """An interpreter for every call: without isolation, and in a jail of bubblewrap."""
    plain = [sys.executable, "-I", "-c"]
    commands = {"python -I -c, no isolation": plain}
    if program := shutil.which("bwrap"):
        jail = [program, "--unshare-all", "--die-with-parent", "--clearenv", "--ro-bind", "/", "/", "--dev", "/dev"]
        commands["bwrap python -I -c"] = [*jail, "--proc", "/proc", *plain]
    rows = []
    for name, command in commands.items():
        for what, code in CODES.items():
            start = [*command, code]
            done = subprocess.run(start, capture_output=True, text=True, check=False, timeout=60)
            if done.returncode != 0:
                print(f"{name}: not measured: {done.stderr.strip()[-200:]}")
                break

            def once(start: list[str] = start) -> None:
                subprocess.run(start, capture_output=True, check=True, timeout=60)

            rows.append(row(name, f"a call, {what}", times_of(once, max(3, repeats // 20))))
    return rows


def device_name() -> str:
    """The processor, and how many cores may be used."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {'root' if os.getuid() == 0 else 'ordinary user'}"


def versions() -> dict[str, str]:
    """Of what the backends are made of."""
    found = {
        name: importlib.metadata.version(name)
        for name in ("sympy", "pydantic-monty")
        if importlib.util.find_spec(name.replace("-", "_")) is not None
    }
    if program := shutil.which("bwrap"):
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=60)
        found["bubblewrap"] = done.stdout.split()[-1]
    return found


def write_page(rows: Sequence[dict[str, Any]], page: Path) -> None:
    """The table between the marks of the page."""
    columns = ("backend", "what", "median ms", "95 % ms")
    lines = ["| " + " | ".join(columns) + " |", "|---|---|--:|--:|"]
    lines += ["| " + " | ".join(row[column] for column in columns) + " |" for row in rows]
    before, _, after = page.read_text(encoding="utf-8").split(MARK)
    temporary = page.with_suffix(".new")
    temporary.write_text(MARK.join([before, "\n".join(lines) + "\n", after]), encoding="utf-8")
    os.replace(temporary, page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; write it with `--output`."""
    from simulations import results, tables

    parser = argparse.ArgumentParser(prog="python -m benchmarks.sandbox", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--output", type=Path, help="also write the rows as JSON, with commit, versions and machine")
    parser.add_argument("--page", type=Path, help="also write the table between the marks of a page")
    options = parser.parse_args(arguments)
    rows = []
    for backend, reason in backends().items():
        if reason:
            print(f"{backend} is not measured: {reason}")
        else:
            rows += one_backend(backend, options.repeats)
    rows += here(options.repeats) + interpreters(options.repeats)
    tables.console().print(tables.plain_table(f"Sandbox ({device_name()})", rows))
    if options.output is not None:
        provenance = results.provenance({"device": device_name(), "repeats": options.repeats} | versions())
        results.write_json(options.output, {"provenance": provenance, "rows": rows})
    if options.page is not None:
        write_page(rows, options.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
