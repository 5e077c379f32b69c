"""Random worlds for the tests of the engines: by seed and kind, and as a Hypothesis strategy."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from simulations.mdp import END, TOOL, World, as_numbers, chain, policy_table, random_policy, random_tree, tree

KINDS = ("tree", "tree eos", "tree tool", "tree eos tool", "chain", "chain end", "chain end tool")
#: Levels that every engine knows, with windows; 50 is longer than any stream here.
LEVELS: tuple[tuple[str, int | None], ...] = (
    ("none", None),
    ("token", None),
    ("cumulative", None),
    ("sequence", None),
    ("window", 1),
    ("window", 2),
    ("window", 3),
    ("lookahead", 0),
    ("lookahead", 1),
    ("lookahead", 2),
    ("lookahead", 50),
)


def examples(share: float) -> settings:
    """A share of the examples of the profile in use, more or fewer than 1, without a deadline."""
    return settings(max_examples=max(1, round(share * settings.default.max_examples)), deadline=None)


def random_rows(rng: np.random.Generator, shape: tuple[int, ...], zeros: float = 0.0) -> np.ndarray:
    """Random rational distributions over the last axis, some entries 0."""
    weights = rng.integers(1, 6, size=shape)
    weights[..., 1:] *= rng.random((*shape[:-1], shape[-1] - 1)) >= zeros
    numbers = as_numbers(weights, True)
    return numbers / numbers.sum(axis=-1, keepdims=True)


def exact_chain(
    rng: np.random.Generator,
    *,
    n_states: int = 3,
    n_actions: int = 2,
    horizon: int = 3,
    end: bool = False,
    tool: bool = False,
    zeros: float = 0.2,
) -> World:
    """A Markov world in Fractions: stochastic transitions, some of them impossible, and tokens that only pi shuns."""
    kind = np.zeros(n_states, dtype=int)
    if tool:
        kind[1] = TOOL
    if end:
        kind[-1] = END
    mdp = chain(
        f"exact chain S={n_states} A={n_actions} H={horizon}",
        random_rows(rng, (n_states, n_actions, n_states), 0.5),
        horizon=horizon,
        initial=random_rows(rng, (n_states,), 0.3),
        reward=as_numbers(rng.integers(-2, 4, size=(n_states, n_actions)), True),
        outcome=as_numbers(rng.integers(-2, 6, size=n_states), True),
        kind=kind,
        tool=random_rows(rng, (n_states, n_actions), zeros),
        exact=True,
    )
    return World(mdp, random_policy(mdp, rng), random_rows(rng, (n_states, n_actions), zeros))


def random_world(seed: int, kind: str, parameters: Any = "prefix") -> World:
    """A small exact world of one of the `KINDS`."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    if kind.startswith("chain"):
        n_actions = int(rng.integers(2, 4))
        world = exact_chain(
            rng,
            n_states=int(rng.integers(2, 4)) + ("tool" in kind),
            n_actions=n_actions,
            horizon=int(rng.integers(1, 5 - n_actions + ("end" in kind))),
            end="end" in kind,
            tool="tool" in kind,
        )
        return world.with_parameters(parameters)
    n_actions = int(rng.integers(2, 4))
    longest = 4 if n_actions == 2 else 3
    return random_tree(
        rng,
        n_actions=n_actions,
        horizon=int(rng.integers(1 if kind == "tree" else 2, longest)),
        eos="eos" in kind,
        tool_share=0.4 if "tool" in kind else 0.0,
        parameters=parameters,
    )


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Any of the small exact worlds."""
    return random_world(
        draw(st.integers(0, 10_000)),
        draw(st.sampled_from(KINDS)),
        draw(st.sampled_from(("prefix", "position", "shared"))),
    )


def two_step(first: tuple[Any, Any], after: dict[int, tuple[Any, Any]], **options: Any) -> World:
    """Two binary tokens with behavior and target probability of token 1, first and after each first token."""
    mdp = tree(2, 2, outcome=options.pop("outcome", None))

    def table(who: int) -> np.ndarray:
        def rule(prefix: tuple[int, ...]) -> list[Fraction]:
            one = Fraction((first if not prefix else after[prefix[0]])[who])
            return [1 - one, one]

        return policy_table(mdp, rule)

    return World(mdp, table(0), table(1), **options)
