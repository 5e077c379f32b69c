"""Hypothesis strategies for batches of token log-probabilities, with the awkward cases that data have."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from hypothesis import strategies as st

GARBAGE = (float("nan"), float("inf"), float("-inf"), 1e30, -1e30)


@dataclass
class Batch:
    """Arrays of shape (B, T); every number is exact in float32."""

    logp: np.ndarray
    behavior_logp: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray
    turn_ids: np.ndarray

    def take(self, rows, columns=slice(None)) -> Batch:
        return replace(self, **{f.name: getattr(self, f.name)[rows][..., columns] for f in fields(self)})


def log_probabilities(smallest: float = -30.0):
    """Ordinary values, and the extremes at which limits act."""
    return st.one_of(
        st.floats(smallest, 0.0, width=32),
        st.floats(-2.0, 0.0, width=32),
        st.sampled_from([0.0, -0.5, -1.0, smallest]),
    )


@st.composite
def masks(draw, length: int) -> list[bool]:
    """All policy tokens, none, a response with padding, tool gaps, or anything."""
    kind = draw(st.sampled_from(["all", "none", "padded", "gaps", "any"]))
    if kind in ("all", "none"):
        return [kind == "all"] * length
    if kind == "padded":
        first = draw(st.integers(0, length))
        last = draw(st.integers(first, length))
        return [first <= t < last for t in range(length)]
    if kind == "gaps":
        mask: list[bool] = []
        own = draw(st.booleans())
        while len(mask) < length:
            mask += [own] * draw(st.integers(1, 5))
            own = not own
        return mask[:length]
    return draw(st.lists(st.booleans(), min_size=length, max_size=length))


@st.composite
def batches(draw, *, zero_ratios: bool = True, garbage: bool = True, smallest: float = -30.0) -> Batch:
    """1-3 sequences of 1-13 tokens; NaN and worse at masked places, ratios of 0, advantages of 0.

    Half of the batches stay within a few hundredths of the behavior policy, as those of a real run do: windows of
    both sides must be met from inside as well as from outside.
    """
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 13))

    def table(elements):
        return np.array([draw(st.lists(elements, min_size=length, max_size=length)) for _ in range(rows)]).reshape(
            rows, length
        )

    behavior_logp = table(log_probabilities(smallest))
    if draw(st.booleans()):
        logp = table(log_probabilities(smallest))
    else:
        steps = table(st.floats(-0.375, 0.375, width=16))
        logp = np.float32(np.round(behavior_logp * 256) / 256 + steps).astype(np.float64)
        behavior_logp = np.round(behavior_logp * 256) / 256
    if zero_ratios and draw(st.booleans()):
        logp = np.where(table(st.sampled_from([False, False, False, True])), -np.inf, logp)
    advantages = table(st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-4.0, 4.0, width=16)))
    mask = np.array([draw(masks(length)) for _ in range(rows)], dtype=bool).reshape(rows, length)
    turn_ids = np.cumsum(table(st.booleans()), axis=-1)
    if garbage:
        bad = table(st.sampled_from(GARBAGE))
        logp, behavior_logp, advantages = (
            np.where(mask, x, np.roll(bad, shift, axis=-1)) for shift, x in enumerate((logp, behavior_logp, advantages))
        )
        turn_ids = np.where(mask, turn_ids, 7 - turn_ids)
    return Batch(logp, behavior_logp, advantages, mask, turn_ids)
