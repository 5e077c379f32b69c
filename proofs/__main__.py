"""Command line: `python -m proofs` checks the machine's proofs and prints what each theorem rests on.

`python -m proofs index` writes the table of proofs/README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence

from proofs import COUNTEREXAMPLES, machine


def check() -> int:
    """Compile the Rocq files, ask what every theorem rests on, compare the counterexamples' numbers; print a table.

    Returns:
        0 if all is proved, 1 if not, 2 if it could not be checked here.
    """
    missing = machine.missing_packages()
    if missing:
        print(
            f"The machine's proofs were NOT checked. Missing Debian packages: {' '.join(missing)}\n"
            f"Install them with: sudo apt install {' '.join(missing)}",
            file=sys.stderr,
        )
        return 2
    started = time.perf_counter()
    try:
        files = machine.sources()
        stated = machine.theorems(files)
        print(f"compiling {len(files)} files of proofs, a minute or two if nothing is compiled yet", flush=True)
        machine.compile_files()
        compiled = time.perf_counter()
        answers = machine.assumptions(stated)
    except machine.ProofError as error:
        print(f"The proofs were NOT checked: {error}", file=sys.stderr)
        return 1
    wrong = [f"claims without proof: {place}" for place in machine.forbidden(files)]
    wrong += [f"{name} rests on {answer}" for name, answer in answers.items() if answer != machine.CLOSED]
    wrong += machine.differing_numbers(stated, json.loads(COUNTEREXAMPLES.read_text(encoding="utf-8")))
    width = max(len(theorem.name) for theorem in stated)
    print(f"\n{'theorem':<{width}}  {'assumptions':<11}  where")
    for theorem in stated:
        closed = "none" if answers[theorem.name] == machine.CLOSED else "AXIOMS"
        print(f"{theorem.name:<{width}}  {closed:<11}  proofs/rocq/{theorem.file}:{theorem.line}")
    version = subprocess.run(["coqc", "--version"], capture_output=True, text=True, check=True).stdout.split()[5]
    print(
        f"\n{len(stated)} theorems, {len(stated) - sum(a != machine.CLOSED for a in answers.values())} of them rest on "
        f"no axiom (Coq {version}; compiled in {compiled - started:.0f} s, asked in "
        f"{time.perf_counter() - compiled:.0f} s)"
    )
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status is returned."""
    parser = argparse.ArgumentParser(prog="python -m proofs", description="Check the machine's proofs.")
    parser.add_argument(
        "command",
        nargs="?",
        choices=["check", "index"],
        default="check",
        help="check the Rocq proofs (default), or write the table of proofs/README.md",
    )
    if parser.parse_args(arguments).command == "check":
        return check()
    from proofs import index

    index.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
