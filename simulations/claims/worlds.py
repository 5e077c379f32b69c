"""The worlds that several claims are checked on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from proofs import counterexample
from simulations import toy_lm
from simulations.claims.registry import Context
from simulations.mdp import Parameters, World, as_numbers, bigram, policy_table, random_tree, sticky_hot, tree

HALF = Fraction(1, 2)


def known(name: str) -> list[Fraction]:
    """The numbers of a counterexample of the proofs, in its order: what is found here must be equal to them."""
    return list(counterexample(name).values())


def random_trees(
    context: Context,
    name: str,
    count: int,
    *,
    parameters: tuple[Parameters, ...] = ("prefix",),
    fixed_length: bool = False,
    same_share: float = 0.0,
) -> Iterator[World]:
    """Random exact trees of 2 or 3 tokens and length 2 or 3, some with end-of-sequence and tool tokens."""
    rng = context.rng(name)
    for k in range(context.count(count)):
        yield random_tree(
            rng,
            n_actions=int(rng.integers(2, 4)),
            horizon=int(rng.integers(2, 4)),
            eos=not fixed_length and k % 3 == 1,
            tool_share=0.3 if not fixed_length and k % 3 == 2 else 0.0,
            parameters=parameters[k % len(parameters)],
            same_share=same_share,
        )


def two_step(
    first: tuple[Fraction, Fraction],
    second: dict[int, tuple[Fraction, Fraction]],
    *,
    support: bool = True,
    name: str = "two steps",
) -> World:
    """Two binary tokens; (b(1), pi(1)) for the first, and for the second after each first token."""
    mdp = tree(2, 2, name=name)

    def policy(who: int) -> np.ndarray:
        def rule(prefix: tuple[int, ...]) -> list[Fraction]:
            one = second[prefix[0]][who] if prefix else first[who]
            return [1 - one, one]

        return policy_table(mdp, rule)

    behavior, target = policy(0), policy(1)
    return World(mdp, behavior, target, require_support=support)


def with_forbidden_tokens(context: Context, name: str, count: int) -> Iterator[World]:
    """Random trees whose target gives some tokens probability 0, and agrees with b on many prefixes."""
    rng = context.rng(name)
    for world in random_trees(context, name, count, same_share=0.5):
        weights = as_numbers(rng.integers(0, 3, size=world.target.shape), True)
        weights[weights.sum(axis=1) == 0, 0] = Fraction(1)
        table = weights / weights.sum(axis=1, keepdims=True)
        target = world.target.copy()
        some = rng.random(len(target)) < 0.4
        target[some] = table[some]
        yield World(world.mdp, world.behavior, target)


def long_worlds(context: Context, horizon: int) -> list[World]:
    """Markov worlds for dynamic programming: a bigram model, a fitted trigram model, and the sticky hot state."""
    rng = context.rng("long worlds")
    return [
        bigram(rng, n_tokens=8, horizon=horizon, step=0.3),
        toy_lm.fitted_ngram(order=3, horizon=horizon, step=0.2, rng=rng),
        sticky_hot(horizon),
    ]


def scalar(value: Any) -> str:
    """A number for reading: a fraction as it is, a float to three digits."""
    return str(value) if isinstance(value, (Fraction, int, np.integer)) else f"{float(value):.3g}"


def listed(values: Iterable[Any]) -> str:
    """Numbers for reading, separated by commas."""
    return ", ".join(scalar(v) for v in values)
