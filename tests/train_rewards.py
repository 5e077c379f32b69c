"""A reward for training runs of random models."""

from __future__ import annotations


def characters(response: str) -> float:
    return float(len(response) % 5)
