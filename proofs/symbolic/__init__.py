"""Closed forms of the claims, each derived from its definition by SymPy, every step checked.

A derivation begins with a definition (a sum over strings or groups, an expectation under a normal law, a recurrence, an
equation) and transforms it step by step; two consecutive expressions count as equal only if SymPy shows it. Sums,
integrals and limits are SymPy's. `CLAIMS` names the derivations and the claims that they are about;
`python -m proofs.symbolic [NAME ...]` prints them.
"""

from __future__ import annotations

from proofs.symbolic import (  # noqa: F401  # each registers its derivations
    clip_window,
    group_advantages,
    outcome_reward,
    released_loss,
    summed_gradient,
    variance_ratio,
)
from proofs.symbolic.derivation import CLAIMS, DERIVATIONS, Chain, Derivation, Sign, Solution

__all__ = ["CLAIMS", "DERIVATIONS", "Chain", "Derivation", "Sign", "Solution"]
