"""The Rocq proofs: which theorems there are, whether they compile, and on what they rest.

A theorem named `claim_` and a claim's id, with underscores for dots and perhaps the name of a part, states that claim.
The files are compiled by coq_makefile's rules from _CoqProject; then `Print Assumptions` is asked of every theorem, and
must answer that it is closed: mathcomp's ssreflect and algebra need no axiom, and neither do we.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from proofs import FOLDER

__all__ = [
    "CLOSED",
    "PACKAGES",
    "ROCQ",
    "ProofError",
    "Theorem",
    "assumptions",
    "claim_of",
    "compile_files",
    "differing_numbers",
    "forbidden",
    "missing_packages",
    "numbers",
    "sources",
    "theorems",
]

ROCQ = FOLDER / "rocq"
#: Debian packages and what each must have put in place: a program, or a folder among Coq's libraries.
PACKAGES = {
    "coq": "coqc",
    "libcoq-mathcomp-ssreflect": "mathcomp/ssreflect",
    "libcoq-mathcomp-algebra": "mathcomp/algebra",
    "libcoq-mathcomp-algebra-tactics": "mathcomp/algebra_tactics",
}
#: What Rocq prints of a theorem that rests on no axiom.
CLOSED = "Closed under the global context"
#: Ways to claim without a proof.
UNPROVED = (
    r"Admitted|admit|give_up|Axioms?|Parameters?|Conjectures?|Abort|Unset\s+Guard\s+Checking|bypass_check|"
    r"Unset\s+Universe\s+Checking|Unset\s+Positivity\s+Checking|type_in_type"
)


class ProofError(RuntimeError):
    """A proof does not compile, or Rocq cannot be asked."""


@dataclass(frozen=True)
class Theorem:
    """A theorem of a source file.

    Attributes:
        name: As in the source.
        file: Name of the file.
        line: Where it begins, counted from 1.
        statement: From its name to the period, comments included.
    """

    name: str
    file: str
    line: int
    statement: str


def sources(folder: Path = ROCQ) -> list[Path]:
    """The files that _CoqProject lists, in its order.

    Raises:
        ProofError: It lists a file that is not there, or a file is there that it does not list.
    """
    listed = [line.strip() for line in (folder / "_CoqProject").read_text().splitlines() if line.strip().endswith(".v")]
    there = {path.name for path in folder.glob("*.v")}
    if there != set(listed):
        odd = ", ".join(sorted(there ^ set(listed)))
        raise ProofError(f"_CoqProject and the folder {folder.name} differ in {odd}")
    return [folder / name for name in listed]


def without_comments(text: str) -> str:
    """Rocq text with its comments, which nest, turned into spaces; lines stay where they are."""
    kept, depth, position = [], 0, 0
    while position < len(text):
        pair = text[position : position + 2]
        if pair == "(*" or (pair == "*)" and depth):
            depth += 1 if pair == "(*" else -1
            kept.append("  ")
            position += 2
            continue
        character = text[position]
        kept.append(character if depth == 0 or character == "\n" else " ")
        position += 1
    return "".join(kept)


def theorems(files: Iterable[Path]) -> list[Theorem]:
    """Every `Theorem` of the files, in order."""
    found = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        bare = without_comments(text)
        for match in re.finditer(r"^\s*Theorem\s+(\w+)", bare, re.MULTILINE):
            end = re.compile(r"\.\s+Proof\b").search(bare, match.end())
            if end is None:
                raise ProofError(f"{path.name}: no `Proof` after theorem {match[1]}")
            line = bare.count("\n", 0, match.start(1)) + 1
            found.append(Theorem(match[1], path.name, line, text[match.start(1) : end.start()]))
    return found


def claim_of(name: str, ids: Iterable[str]) -> str | None:
    """The claim that a theorem is named after: the longest id that fits, None if there is none.

    Examples:
        >>> claim_of("claim_4_lookahead_exact", ["4.lookahead", "4"])
        '4.lookahead'
    """
    fitting = [
        identifier
        for identifier in ids
        if f"{name}_".startswith(f"claim_{identifier.replace('.', '_').replace('-', '_')}_")
    ]
    return max(fitting, key=len, default=None)


def numbers(theorem: Theorem) -> list[tuple[str, Fraction]]:
    """The numbers that a statement names: `= - 3%:R / 4%:R (* quantity *)` gives ("quantity", -3/4)."""
    number = r"=\s*(?P<sign>-\s*)?\(?\s*(?P<over>\d+)(?:%:[RQ])?(?:\s*/\s*(?P<under>\d+)(?:%:[RQ])?)?\s*\)?"
    return [
        (
            " ".join(match["quantity"].split()),
            Fraction(int(match["over"]) * (-1 if match["sign"] else 1), int(match["under"] or 1)),
        )
        for match in re.finditer(number + r"[\s;\])]*\(\*\s*(?P<quantity>[^*]+?)\s*\*\)", theorem.statement)
    ]


def differing_numbers(stated: Iterable[Theorem], entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where theorems and counterexamples.json disagree, in words; none if each has the numbers of the other.

    Args:
        stated: The theorems.
        entries: Of counterexamples.json; one whose `theorem` is null has no theorem.

    Returns:
        A sentence for each difference.
    """
    known = {theorem.name: dict(numbers(theorem)) for theorem in stated}
    wanted = {entry["theorem"]: name for name, entry in entries.items() if entry["theorem"] is not None}
    wrong = [
        f"{name} names numbers, but no counterexample names it" for name in known if known[name] and name not in wanted
    ]
    for theorem, name in wanted.items():
        expected = {quantity: Fraction(value) for quantity, value in entries[name]["numbers"].items()}
        if theorem not in known:
            wrong.append(f"counterexample {name} names the theorem {theorem}, which is not there")
        elif known[theorem] != expected:
            odd = sorted({q for q, _ in known[theorem].items() ^ expected.items()})
            wrong.append(f"counterexample {name} and the theorem {theorem} differ in {', '.join(odd)}")
    return wrong


def forbidden(files: Iterable[Path]) -> list[str]:
    """Where a file claims something without proof, as `file:line: word`."""
    found = []
    for path in files:
        for number, line in enumerate(without_comments(path.read_text(encoding="utf-8")).splitlines(), 1):
            found += [f"{path.name}:{number}: {match[0]}" for match in re.finditer(rf"\b(?:{UNPROVED})\b", line)]
    return found


def missing_packages() -> list[str]:
    """Debian packages without which the proofs cannot be checked here."""
    if shutil.which("coqc") is None or shutil.which("coq_makefile") is None:
        return list(PACKAGES)
    where = subprocess.run(["coqc", "-where"], capture_output=True, text=True, check=True).stdout.strip()
    libraries = Path(where) / "user-contrib"
    return [name for name, folder in PACKAGES.items() if "/" in folder and not (libraries / folder).is_dir()]


def _run(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise ProofError(f"{' '.join(command)} failed:\n{done.stdout.strip()}")
    return done.stdout


def compile_files(folder: Path = ROCQ, *, jobs: int | None = None) -> None:
    """Compile what _CoqProject lists; what is compiled and unchanged is left alone.

    Args:
        folder: With _CoqProject and the sources; the compiled files go beside them.
        jobs: How many at a time (default: one per processor).

    Raises:
        ProofError: With what Rocq said.
    """
    with (folder / "_CoqProject").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at a time would write the same files
        _run(["coq_makefile", "-f", "_CoqProject", "-o", "Makefile.coq"], folder)
        _run(["make", "--no-print-directory", f"-j{jobs or os.cpu_count() or 1}", "-f", "Makefile.coq"], folder)


def assumptions(stated: Sequence[Theorem], folder: Path = ROCQ) -> dict[str, str]:
    """What Rocq says each compiled theorem rests on: `CLOSED`, or its axioms.

    The tuple of all theorems rests on what any of them rests on, so one question is enough where the answer is that it
    is closed; only where it is not is each theorem asked by itself, which takes some four times as long.

    Args:
        stated: Theorems of compiled files.
        folder: Where they are.

    Returns:
        Rocq's answer for each name.

    Raises:
        ProofError: A theorem is not in the compiled files.
    """
    names = {theorem.name: f"{Path(theorem.file).stem}.{theorem.name}" for theorem in stated}
    every = ", ".join(f"@{name}" for name in names.values())
    answers = _ask([f"Definition every_theorem := ({every})."], ["every_theorem"], stated, folder)
    if answers["every_theorem"] == CLOSED:
        return dict.fromkeys(names, CLOSED)
    answers = _ask([], names.values(), stated, folder)
    return {name: answers[qualified] for name, qualified in names.items()}


def _ask(setup: Sequence[str], names: Iterable[str], stated: Sequence[Theorem], folder: Path) -> dict[str, str]:
    """What `Print Assumptions` says of each name, after a few lines of setup."""
    with tempfile.TemporaryDirectory() as work:
        modules = sorted({Path(theorem.file).stem for theorem in stated})
        script = Path(work) / "Assumptions.v"
        lines = [f"From ctpo Require {' '.join(modules)}.", *setup]
        lines += [f'Redirect "{work}/{name}" Print Assumptions {name}.' for name in names]
        script.write_text("\n".join(lines) + "\n")
        _run(["coqc", "-q", "-Q", str(folder), "ctpo", "-w", "none", str(script)], Path(work))
        return {name: (Path(work) / f"{name}.out").read_text().strip() for name in names}
