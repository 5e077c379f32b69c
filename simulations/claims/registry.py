"""What a claim is, and how it is checked.

A claim has an id, a statement, its assumptions and the verdict we expect: "true", "true if" (under the stated
assumptions; without them it can fail) or "false". A false claim passes when its counterexample is confirmed. Each
check takes the thing under test, its `subject`, as an argument; run once more on a subject for which the verdict is
wrong (the negative control) at least one comparison of the very same check must fail, or it could not have told right
from wrong.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

Verdict = Literal["true", "true if", "false"]
Engine = Literal["enumeration", "dynamic programming", "Monte Carlo", "closed form", "recorded"]


@dataclass(frozen=True)
class Context:
    """Settings of a verification run.

    Attributes:
        seed: Root of all randomness; every claim derives its own streams from it and from its id.
        quick: Fewer random worlds and Monte Carlo samples.
    """

    seed: int = 0
    quick: bool = False

    def rng(self, name: str) -> np.random.Generator:
        """A generator of its own for a named purpose, the same in every run with this seed."""
        return np.random.default_rng(self.sequence(name))

    def sequence(self, name: str) -> np.random.SeedSequence:
        """The seed sequence behind `rng`."""
        return np.random.SeedSequence([self.seed, zlib.crc32(name.encode())])

    def count(self, full: int) -> int:
        """How many random cases to take: `full`, or an eighth of them when quick."""
        return max(2, full // 8) if self.quick else full


@dataclass(frozen=True)
class Evidence:
    """One thing that a check established.

    Attributes:
        what: What was compared, in words.
        engine: How it was computed.
        found: The numbers, for reading.
        holds: Whether they are as the claim's verdict says.
        numbers: The numbers, for machines: JSON-ready.
    """

    what: str
    engine: Engine
    found: str
    holds: bool
    numbers: dict[str, Any] = field(default_factory=dict)


Check = Callable[[Context, Any], Iterable[Evidence]]


@dataclass(frozen=True)
class Claim:
    """A statement about importance ratios with everything needed to check it.

    Attributes:
        id: Stable identifier; the number is the claim's group.
        statement: What is claimed, in one sentence.
        verdict: What we expect to find.
        assumptions: Under which the statement is true, or why it is false.
        source: Where it is claimed.
        check: The check.
        subject: The correct thing to check.
        control: A subject for which the verdict is wrong, which must fail the same check.
        control_name: What is wrong about it.
        conclusion: What a practitioner should do or conclude, in plain words, no stronger than verified.
    """

    id: str
    statement: str
    verdict: Verdict
    assumptions: str
    source: str
    check: Check
    subject: Any
    control: Any
    control_name: str
    conclusion: str


@dataclass(frozen=True)
class Outcome:
    """Result of verifying one claim; `passed` needs all evidence to hold and the control to be rejected."""

    id: str
    statement: str
    verdict: Verdict
    assumptions: str
    source: str
    evidence: list[Evidence]
    control: str
    control_rejected: bool
    passed: bool
    seconds: float
    conclusion: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def verify(claim: Claim, context: Context) -> Outcome:
    """Check a claim and its negative control."""
    start = time.perf_counter()
    evidence = list(claim.check(context, claim.subject))
    # The control only has to be told from the subject, which few cases suffice for.
    control = list(claim.check(Context(context.seed, quick=True), claim.control))
    rejected = not all(e.holds for e in control)
    return Outcome(
        id=claim.id,
        statement=claim.statement,
        verdict=claim.verdict,
        assumptions=claim.assumptions,
        source=claim.source,
        evidence=evidence,
        control=claim.control_name,
        control_rejected=rejected,
        passed=bool(evidence) and all(e.holds for e in evidence) and rejected,
        seconds=time.perf_counter() - start,
        conclusion=claim.conclusion,
    )
