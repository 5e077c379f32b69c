"""Proofs of the claims: for people (`*.md`), symbolic (`symbolic/`) and machine-checked (`rocq/`).

`python -m proofs` checks the machine's proofs. The numbers of every counterexample are in one file,
counterexamples.json, which the simulations and the tests read, and with which the pages and the Rocq theorems are
compared.
"""

from __future__ import annotations

import json
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["COUNTEREXAMPLES", "FOLDER", "counterexample", "counterexamples"]

FOLDER = Path(__file__).parent
COUNTEREXAMPLES = FOLDER / "counterexamples.json"


@cache
def counterexamples() -> dict[str, dict[str, Any]]:
    """All entries of counterexamples.json as they are: claim, world, theorem, numbers as strings.

    Examples:
        >>> sorted(counterexamples()["sign_reversal"])
        ['claim', 'numbers', 'theorem', 'world']
    """
    entries: dict[str, dict[str, Any]] = json.loads(COUNTEREXAMPLES.read_text(encoding="utf-8"))
    return entries


def counterexample(name: str) -> dict[str, Fraction]:
    """The exact numbers of one counterexample.

    Args:
        name: Of an entry of counterexamples.json.

    Returns:
        Each quantity's value.

    Raises:
        KeyError: There is no such entry.

    Examples:
        >>> counterexample("sign_reversal")["true gradient"]
        Fraction(1, 8)
    """
    known = counterexamples()
    if name not in known:
        raise KeyError(f"name = {name!r} is not in counterexamples.json; it has {', '.join(known)}")
    return {quantity: Fraction(value) for quantity, value in known[name]["numbers"].items()}
