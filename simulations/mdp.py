r"""Finite token-generation worlds: who writes each token, with which probability, and what it earns.

A `World` is a token MDP together with the two policies that every claim of this project is about: the
behavior policy b that sampled the tokens and the target policy pi whose gradient is wanted.

Conventions used throughout `simulations`:

* A trajectory is a stream of at most `horizon` tokens; step h counts the tokens of the stream from 0.
* Each state has a kind. In a `POLICY` state the policy chooses the token (mask True). In a `TOOL` state the
  environment does: the token's ratio is 1 and the policy has no score there (mask False). An `END` state is
  absorbing: nothing more is written.
* After token a in state s the next state is drawn from the world's transition, which is deterministic for
  language models and may be random in general.
* The return of a trajectory is the sum of `reward[s, a]` over its policy and tool tokens, plus
  `outcome[s_end]` of the state in which it stops. A tree world's end state is the whole string, so `outcome`
  can be any function of it.
* Probabilities are float64, or `fractions.Fraction` in object arrays ("exact worlds"): every engine but Monte
  Carlo takes both, and on exact worlds its answers are exact.
* Policies are softmax in logits; the score of token a in state s is 1{a=a'} - pi(a'|s) in the block of logits
  that state s uses, a rational function of the probabilities. `parameters` says which states share a block:
  each state its own ("prefix"), each step its own ("position"), or one block for all ("shared"). A world may
  instead bring its own score vectors (`scores`), as a neural network does.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

POLICY, TOOL, END = 0, 1, 2

Parameters = Literal["prefix", "position", "shared"]

#: How far a float64 distribution may be from summing to 1.
SUM_TOLERANCE = 1e-9
#: Above this many prefixes a tree is refused.
MAX_PREFIXES = 300_000


def as_numbers(values: Any, exact: bool) -> np.ndarray:
    """An array of Fractions (exact) or of float64, whatever numbers come in."""
    if not exact:
        return np.asarray(values, dtype=np.float64)
    array = np.asarray(values, dtype=object)
    result = np.empty(array.size, dtype=object)
    result[:] = [_fraction(v) for v in array.ravel()]
    return result.reshape(array.shape)


def _fraction(value: Any) -> Fraction:
    value = value.item() if isinstance(value, np.generic) else value
    number = value if isinstance(value, Fraction) else Fraction(value)
    if type(number.numerator) is int and type(number.denominator) is int:
        return number
    # Fraction keeps NumPy integers as they come, and their products overflow in silence.
    return Fraction(int(number.numerator), int(number.denominator))


def zeros(shape: int | tuple[int, ...], exact: bool) -> np.ndarray:
    """Zeros of the kind that `as_numbers` makes."""
    if not exact:
        return np.zeros(shape)
    return np.full(shape, Fraction(0), dtype=object)


def check_kind(name: str, array: np.ndarray, exact: bool) -> None:
    """Raise ValueError unless an array holds Fractions (exact) or floating-point numbers."""
    if not exact:
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{name}: numbers must be float64 as the world's others are, got {array.dtype}")
    elif array.dtype != object or not all(type(getattr(v, "numerator", None)) is int for v in array.ravel()):
        raise ValueError(
            f"{name}: numbers must be Fractions as the world's others are (use as_numbers), got an array of "
            f"{array.dtype if array.dtype != object else {type(v).__name__ for v in array.ravel()}}"
        )


def check_distribution(name: str, probabilities: np.ndarray, rows: np.ndarray) -> None:
    """Raise ValueError unless the chosen rows of a table are probability distributions."""
    exact = probabilities.dtype == object
    index = np.flatnonzero(rows)
    chosen = probabilities[index]
    if not exact and not np.all(np.isfinite(chosen)):
        row = index[~np.isfinite(chosen).all(axis=1)][0]
        raise ValueError(f"{name}: probabilities must be finite, got {probabilities[row]} in row {row}")
    if chosen.size and chosen.min() < 0:
        row = index[(chosen < 0).any(axis=1)][0]
        raise ValueError(f"{name}: probabilities must be >= 0, got {probabilities[row].min()} in row {row}")
    totals = chosen.sum(axis=1)
    wrong = totals != 1 if exact else np.abs(totals - 1.0) > SUM_TOLERANCE
    if np.any(wrong):
        raise ValueError(
            f"{name}: probabilities must sum to 1 (within {0 if exact else SUM_TOLERANCE}), "
            f"row {index[wrong][0]} sums to {totals[wrong][0]}"
        )


def check_name(argument: str, name: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless a name is one of the allowed ones."""
    if not isinstance(name, str) or name not in allowed:
        raise ValueError(f"{argument}: must be one of {allowed}, got {name!r}")


@dataclass(frozen=True, eq=False)
class TokenMDP:
    """A finite token-generation process without its policies.

    Args:
        name: What to call it in tables.
        horizon: Largest number of tokens in a stream, at least 1.
        kind: (S,) POLICY, TOOL or END for every state.
        initial: (S,) distribution of the first state.
        edges: Four arrays of one length E: state, action, next state (ints) and the probability of that next
            state given state and action. END states have none.
        reward: (S, A) reward of a token, in units of return.
        outcome: (S,) reward for the state in which the stream stops.
        tool: (S, A) distribution of the environment's token in TOOL states; other rows are ignored.
        labels: S names, the prefixes of a tree; they appear in error messages.

    Raises:
        ValueError: A shape, a probability or a kind is wrong; the message names it.
    """

    name: str
    horizon: int
    kind: np.ndarray
    initial: np.ndarray
    edges: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    reward: np.ndarray
    outcome: np.ndarray
    tool: np.ndarray
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check shapes and probabilities."""
        if self.reward.ndim != 2:
            raise ValueError(f"reward: shape must be (states, actions), got {self.reward.shape}")
        n_states, n_actions = self.n_states, self.n_actions
        if not isinstance(self.horizon, int) or isinstance(self.horizon, bool) or self.horizon < 1:
            raise ValueError(f"horizon: must be a whole number >= 1, got {self.horizon!r}")
        for name, array, shape in (
            ("initial", self.initial, (n_states,)),
            ("reward", self.reward, (n_states, n_actions)),
            ("outcome", self.outcome, (n_states,)),
            ("tool", self.tool, (n_states, n_actions)),
            *(("edges", array, self.edges[0].shape) for array in self.edges),
        ):
            if array.shape != shape:
                raise ValueError(f"{name}: shape must be {shape}, got {array.shape}")
        for name, array in (
            ("initial", self.initial),
            ("reward", self.reward),
            ("outcome", self.outcome),
            ("tool", self.tool),
            ("edges", self.edges[3]),
        ):
            check_kind(name, array, self.exact)
        if len(self.labels) != n_states:
            raise ValueError(f"labels: {n_states} are needed, one per state, got {len(self.labels)}")
        if not np.isin(self.kind, (POLICY, TOOL, END)).all():
            raise ValueError(f"kind: must be POLICY (0), TOOL (1) or END (2), got {np.unique(self.kind)}")
        if not self.exact:
            for name, array in (
                ("reward", self.reward),
                ("outcome", self.outcome),
                ("edges", self.edges[3]),
            ):
                if not np.all(np.isfinite(array)):
                    raise ValueError(f"{name}: must be finite, got {array[~np.isfinite(array)][0]}")
        check_distribution("initial", self.initial[None], np.array([True]))
        check_distribution("tool", self.tool, self.kind == TOOL)
        state, action, nxt, probability = self.edges
        for name, array, bound in (
            ("state", state, n_states),
            ("action", action, n_actions),
            ("next", nxt, n_states),
        ):
            if array.size and (array.min() < 0 or array.max() >= bound):
                raise ValueError(f"edges: {name} must be in [0, {bound}), got {array.min()}..{array.max()}")
        mass = zeros((n_states, n_actions), self.exact)
        np.add.at(mass, (state, action), probability)
        live = self.kind != END
        if probability.size and probability.min() < 0:
            raise ValueError(f"edges: probabilities must be >= 0, got {probability.min()}")
        wrong = (mass != 1) if self.exact else np.abs(mass - 1) > SUM_TOLERANCE
        if np.any(wrong[live]):
            s, a = np.argwhere(wrong & live[:, None])[0]
            raise ValueError(
                f"edges: next-state probabilities must sum to 1, after token {a} in state {self.labels[s]!r} "
                f"they sum to {mass[s, a]}"
            )
        if np.any(mass[~live] != 0):
            raise ValueError("edges: END states are absorbing and must have none")

    @property
    def exact(self) -> bool:
        """Whether the numbers are Fractions."""
        return self.initial.dtype == object

    @property
    def n_states(self) -> int:
        """S, END states included."""
        return len(self.kind)

    @property
    def n_actions(self) -> int:
        """A, the size of the vocabulary."""
        return int(self.reward.shape[1])

    @property
    def policy_states(self) -> np.ndarray:
        """(S,) bool, True where the policy chooses the token."""
        return self.kind == POLICY


@dataclass(frozen=True, eq=False)
class World:
    """A token MDP with a behavior policy, a target policy and the target's parameters.

    Args:
        mdp: The process.
        behavior: (S, A) probabilities b(a|s); only rows of POLICY states count.
        target: (S, A) probabilities pi(a|s).
        parameters: Which states share a block of logits: "prefix", "position" or "shared".
        scores: (S, A, D) gradient of log pi(a|s) for a target with parameters of its own; overrides
            `parameters`.
        require_support: Check absolute continuity (AC): pi(a|s) > 0 implies b(a|s) > 0 on every prefix that b
            reaches. Turn it off only to study what breaks without it.

    Raises:
        ValueError: A shape or probability is wrong, or (AC) fails; then the offending prefix is named.
    """

    mdp: TokenMDP
    behavior: np.ndarray
    target: np.ndarray
    parameters: Parameters = "prefix"
    scores: np.ndarray | None = None
    require_support: bool = True

    def __post_init__(self) -> None:
        """Check the policies and, unless told not to, their support."""
        shape = (self.mdp.n_states, self.mdp.n_actions)
        for name, policy in (("behavior", self.behavior), ("target", self.target)):
            if policy.shape != shape:
                raise ValueError(f"{name}: shape must be {shape} (states, actions), got {policy.shape}")
            check_kind(name, policy, self.exact)
            check_distribution(name, policy, self.mdp.policy_states)
        check_name("parameters", self.parameters, get_args(Parameters))
        if self.scores is not None:
            if self.scores.ndim != 3 or self.scores.shape[:2] != shape:
                raise ValueError(f"scores: shape must be {(*shape, 'D')}, got {self.scores.shape}")
            check_kind("scores", self.scores, self.exact)
        if self.require_support and (prefix := self.unsupported_prefix()) is not None:
            raise ValueError(
                f"target: puts mass where the behavior policy has none: {prefix}. Importance ratios cannot "
                "correct for tokens that are never sampled; pass require_support=False to study what breaks."
            )

    @property
    def name(self) -> str:
        """The world's name in tables."""
        return self.mdp.name

    @property
    def exact(self) -> bool:
        """Whether the numbers are Fractions."""
        return self.mdp.exact

    @cached_property
    def ratio(self) -> np.ndarray:
        """(S, A) token ratio pi/b; 1 where the environment writes, 0 where b has no mass (never sampled)."""
        ratio = zeros(self.behavior.shape, self.exact)
        ratio[~self.mdp.policy_states] = Fraction(1) if self.exact else 1.0
        sampled = self.mdp.policy_states[:, None] & (self.behavior > 0)
        ratio[sampled] = self.target[sampled] / self.behavior[sampled]
        return ratio

    def token_probabilities(self, who: Literal["behavior", "target"]) -> np.ndarray:
        """(S, A) probability of each token: the policy's, or the environment's in TOOL states; 0 in END."""
        chosen = np.where(self.mdp.policy_states[:, None], getattr(self, who), self.mdp.tool)
        chosen[self.mdp.kind == END] = Fraction(0) if self.exact else 0.0
        return chosen

    @cached_property
    def local_scores(self) -> np.ndarray:
        """(S, A, d) score of a token within its state's block of parameters; 0 outside POLICY states."""
        if self.scores is not None:
            local = self.scores.copy()
        else:
            n = self.mdp.n_actions
            identity = as_numbers(np.eye(n, dtype=int), self.exact)
            local = identity[None] - self.target[:, None, :]
        local[~self.mdp.policy_states] = Fraction(0) if self.exact else 0.0
        return local

    @property
    def n_blocks(self) -> int:
        """Number of parameter blocks K; the parameter vector has K * d entries."""
        if self.scores is not None or self.parameters == "shared":
            return 1
        return self.mdp.horizon if self.parameters == "position" else self.mdp.n_states

    @property
    def dimension(self) -> int:
        """Number of parameters."""
        return self.n_blocks * self.local_scores.shape[2]

    def block(self, step: int) -> np.ndarray:
        """(S,) index of the parameter block that each state uses at a step."""
        n = self.mdp.n_states
        if self.scores is not None or self.parameters == "shared":
            return np.zeros(n, dtype=np.int64)
        return np.full(n, step) if self.parameters == "position" else np.arange(n)

    def unsupported_prefix(self) -> str | None:
        """Where (AC) fails, in words, or None if it holds on every prefix that b reaches."""
        state, action, nxt, probability = self.mdp.edges
        written = self.token_probabilities("behavior")
        paths: dict[int, tuple[int, ...]] = {int(s): () for s in np.flatnonzero(self.mdp.initial > 0)}
        frontier = list(paths)
        for _ in range(self.mdp.horizon):
            for s in frontier:
                if self.mdp.kind[s] != POLICY:
                    continue
                bad = np.flatnonzero((self.target[s] > 0) & ~(self.behavior[s] > 0))
                if bad.size:
                    a = int(bad[0])
                    return (
                        f"after prefix {paths[s]} (state {self.mdp.labels[s]!r}) token {a} has target "
                        f"probability {self.target[s, a]} and behavior probability 0"
                    )
            alive = np.isin(state, frontier) & (probability > 0)
            alive &= written[state, action] > 0
            new = []
            for e in np.flatnonzero(alive):
                if int(nxt[e]) not in paths:
                    paths[int(nxt[e])] = (*paths[int(state[e])], int(action[e]))
                    new.append(int(nxt[e]))
            frontier = new
            if not frontier:
                break
        return None

    def with_parameters(self, parameters: Parameters) -> World:
        """The same world with another way of sharing parameters."""
        return replace(self, parameters=parameters, scores=None)

    def as_float(self) -> World:
        """The same world in float64."""
        mdp = self.mdp
        state, action, nxt, probability = mdp.edges
        floating = replace(
            mdp,
            initial=mdp.initial.astype(float),
            edges=(state, action, nxt, probability.astype(float)),
            reward=mdp.reward.astype(float),
            outcome=mdp.outcome.astype(float),
            tool=mdp.tool.astype(float),
        )
        scores = None if self.scores is None else self.scores.astype(float)
        return replace(
            self,
            mdp=floating,
            behavior=self.behavior.astype(float),
            target=self.target.astype(float),
            scores=scores,
        )


def one_logit(world: World) -> World:
    """The same world of two tokens with one logit for each block of parameters instead of two.

    The score of token a is a - pi(1|s). Two logits have the scores g and -g, which counts every trace twice.

    Raises:
        ValueError: The world has another number of tokens, or scores of its own.
    """
    if world.mdp.n_actions != 2 or world.scores is not None:
        own = "" if world.scores is None else " and scores of its own"
        raise ValueError(f"world: needs two tokens and softmax scores, got {world.mdp.n_actions} tokens{own}")
    states = np.arange(world.mdp.n_states)
    block = states * 0
    if world.parameters == "position":
        block = np.clip(depths(world.mdp), 0, world.mdp.horizon - 1)
    elif world.parameters == "prefix":
        block = states
    scores = zeros((world.mdp.n_states, 2, world.n_blocks), world.exact)
    scores[states, :, block] = world.local_scores[:, :, 1]
    return replace(world, scores=scores)


# --- policies -----------------------------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def random_policy(
    mdp: TokenMDP,
    rng: np.random.Generator,
    *,
    parameters: Parameters = "prefix",
    largest: int = 5,
    spread: float = 1.0,
) -> np.ndarray:
    """A random policy that respects the sharing of parameters.

    Exact worlds draw integer weights from 1..largest for each row; float worlds draw normal logits of
    standard deviation `spread`. With "position" the row of a state is that of its depth, which needs a tree.
    """
    check_name("parameters", parameters, get_args(Parameters))
    n_states, n_actions = mdp.n_states, mdp.n_actions
    rows = {"prefix": n_states, "shared": 1, "position": mdp.horizon}[parameters]
    if mdp.exact:
        weights = as_numbers(rng.integers(1, largest + 1, size=(rows, n_actions)), True)
        table = weights / weights.sum(axis=1, keepdims=True)
    else:
        table = softmax(spread * rng.standard_normal((rows, n_actions)))
    if parameters == "prefix":
        return table
    if parameters == "shared":
        return np.repeat(table, n_states, axis=0)
    return table[np.minimum(depths(mdp), mdp.horizon - 1)]


def depths(mdp: TokenMDP) -> np.ndarray:
    """(S,) step at which each state occurs, -1 for never; ValueError if one occurs at several steps."""
    state, _, nxt, _ = mdp.edges
    depth = np.where(mdp.initial > 0, 0, -1)
    for step in range(mdp.horizon):
        reached = np.unique(nxt[depth[state] == step])
        if np.any((depth[reached] >= 0) & (depth[reached] != step + 1)):
            again = reached[(depth[reached] >= 0) & (depth[reached] != step + 1)][0]
            raise ValueError(
                f"mdp: each state must occur at one step only, as in a tree; in {mdp.name!r} state "
                f"{mdp.labels[again]!r} occurs at steps {depth[again]} and {step + 1}"
            )
        depth[reached] = step + 1
    return depth


def step_policy(behavior: np.ndarray, direction: np.ndarray, size: float) -> np.ndarray:
    """The softmax policy whose logits are those of `behavior` moved by `size * direction` (float worlds).

    Args:
        behavior: (S, A) positive probabilities; rows of zeros, where no policy writes, stay as they are.
        direction: Broadcastable to (S, A), nats per unit step.
        size: Step length.
    """
    if behavior.dtype == object:
        raise ValueError("behavior: a step in logit space needs float64 probabilities, got Fractions")
    written = np.any(behavior != 0, axis=-1, keepdims=True)
    if np.any((behavior <= 0) & written):
        raise ValueError(f"behavior: a softmax policy has only positive probabilities, got {behavior.min()}")
    logits = np.log(np.where(written, behavior, 1.0))
    return np.where(written, softmax(logits + size * direction), 0.0)


def temper_policy(behavior: np.ndarray, temperature: float | Fraction) -> np.ndarray:
    """The policy proportional to b^(1/temperature); exact worlds need 1/temperature to be a whole number.

    Rows of zeros, where no policy writes, stay as they are.

    >>> temper_policy(np.array([[0.25, 0.75]]), 0.5).round(3)
    array([[0.1, 0.9]])
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: must be > 0 and finite, got {temperature}")
    power: Any = 1 / Fraction(temperature) if behavior.dtype == object else 1.0 / float(temperature)
    if isinstance(power, Fraction):
        if power.denominator != 1:
            raise ValueError(f"temperature: on exact worlds 1/temperature must be a whole number, got {power}")
        power = int(power)
    # Relative to the likeliest token, whose power neither overflows nor vanishes.
    peak = behavior.max(axis=-1, keepdims=True)
    raised = (behavior / np.where(peak > 0, peak, 1)) ** power
    total = raised.sum(axis=-1, keepdims=True)
    return raised / np.where(total > 0, total, 1)


def truncate_policy(
    behavior: np.ndarray, *, top_k: int | None = None, top_p: float | Fraction | None = None
) -> np.ndarray:
    """A policy cut to its likeliest tokens and renormalized, as samplers of language models do.

    Args:
        behavior: (S, A) probabilities; rows of zeros, where no policy writes, stay as they are.
        top_k: Keep this many tokens, ties in the order of the vocabulary.
        top_p: Keep the fewest tokens that hold at least this mass (of what top_k has left), in (0, 1].

    >>> truncate_policy(np.array([[0.125, 0.5, 0.375]]), top_p=0.75).round(3)
    array([[0.   , 0.571, 0.429]])
    """
    if top_k is None and top_p is None:
        raise ValueError("top_k, top_p: give at least one, got none")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
        raise ValueError(f"top_k: must be a whole number >= 1, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: must be in (0, 1], got {top_p!r}")
    order = np.argsort(-behavior, axis=-1, kind="stable")
    kept = np.take_along_axis(behavior, order, axis=-1)
    if top_k is not None:
        kept[:, top_k:] *= 0
    if top_p is not None and top_p < 1:
        mass = kept.cumsum(axis=-1)
        kept[:, 1:][mass[:, :-1] >= top_p * mass[:, -1:]] *= 0  # the likelier tokens suffice
    result = np.empty_like(kept)
    np.put_along_axis(result, order, kept, axis=-1)
    total = result.sum(axis=-1, keepdims=True)
    return result / np.where(total > 0, total, 1)


# --- worlds -------------------------------------------------------------------------------------------------


def chain(
    name: str,
    next_state: np.ndarray,
    *,
    horizon: int,
    initial: Any,
    reward: Any = 0,
    outcome: Any = 0,
    kind: Any = POLICY,
    tool: Any = 0,
    labels: Sequence[str] | None = None,
    exact: bool = False,
) -> TokenMDP:
    """A Markov token process from a table of next states.

    Args:
        name: What to call it.
        next_state: (S, A) ints for deterministic transitions, or (S, A, S) probabilities.
        horizon: Largest number of tokens.
        initial: (S,) distribution, or the index of the first state.
        reward: Broadcastable to (S, A).
        outcome: Broadcastable to (S,).
        kind: Broadcastable to (S,).
        tool: Broadcastable to (S, A), rows of TOOL states.
        labels: State names.
        exact: Fractions instead of float64.
    """
    table = np.asarray(next_state)
    if not (table.ndim == 2 or (table.ndim == 3 and table.shape[2] == table.shape[0])):
        raise ValueError(f"next_state: shape must be (S, A) or (S, A, S), got {table.shape}")
    n_states, n_actions = table.shape[:2]
    kinds = _filled("kind", np.asarray(kind), (n_states,))
    live = kinds != END
    if table.ndim == 2:
        state, action = np.nonzero(np.broadcast_to(live[:, None], table.shape))
        nxt = table[state, action].astype(np.int64)
        probability = as_numbers(np.ones(len(state), dtype=int), exact)
    else:
        state, action, nxt = np.nonzero((table != 0) & live[:, None, None])
        probability = as_numbers(table[state, action, nxt], exact)
    if np.ndim(initial) == 0:
        if initial not in range(n_states):
            raise ValueError(f"initial: a first state must be in [0, {n_states}), got {initial!r}")
        initial = np.eye(n_states, dtype=int)[initial]
    return TokenMDP(
        name=name,
        horizon=horizon,
        kind=kinds,
        initial=as_numbers(initial, exact),
        edges=(state, action, nxt, probability),
        reward=_filled("reward", as_numbers(reward, exact), (n_states, n_actions)),
        outcome=_filled("outcome", as_numbers(outcome, exact), (n_states,)),
        tool=_filled("tool", as_numbers(tool, exact), (n_states, n_actions)),
        labels=tuple(labels) if labels is not None else tuple(str(s) for s in range(n_states)),
    )


def _filled(name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.broadcast_to(values, shape).copy()
    except ValueError:
        raise ValueError(f"{name}: shape must broadcast to {shape}, got {values.shape}") from None


def tree(
    n_actions: int,
    horizon: int,
    *,
    name: str = "tree",
    eos: int | None = None,
    tool_after: Callable[[tuple[int, ...]], Any] | None = None,
    reward: Callable[[tuple[int, ...], int], Any] | None = None,
    outcome: Callable[[tuple[int, ...]], Any] | None = None,
    exact: bool = True,
) -> TokenMDP:
    """The tree of all token strings up to `horizon`: a state is a prefix, so all may depend on the history.

    Args:
        n_actions: Size of the vocabulary.
        horizon: Length of the longest string.
        name: What to call it.
        eos: Token that ends the string, if any.
        tool_after: Given a prefix, the environment's distribution over the next token, or None where the
            policy writes it.
        reward: Given a prefix and the token written after it, the token's reward.
        outcome: Given a finished string, its reward.
        exact: Fractions instead of float64.

    Example:
        >>> world = tree(2, 2, outcome=lambda string: string[0] * string[1])
        >>> world.n_states, world.labels[:3]
        (7, ('()', '(0,)', '(1,)'))
    """
    for argument, value in (("n_actions", n_actions), ("horizon", horizon)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{argument}: must be a whole number >= 1, got {value!r}")
    if eos is not None and eos not in range(n_actions):
        raise ValueError(f"eos: must be a token in [0, {n_actions}) or None, got {eos!r}")
    count = unfinished = 1
    for _ in range(horizon):
        count += unfinished * n_actions
        unfinished *= n_actions - (eos is not None)
        if count > MAX_PREFIXES:
            raise ValueError(
                f"horizon: {horizon} tokens from a vocabulary of {n_actions} make more than {MAX_PREFIXES} "
                "prefixes, too many for a tree; write the world as a chain"
            )
    prefixes: list[tuple[int, ...]] = [()]
    edges: list[tuple[int, int, int]] = []
    for s, prefix in enumerate(prefixes):  # the list grows while it is read: breadth first
        if len(prefix) == horizon or (eos is not None and prefix and prefix[-1] == eos):
            continue
        for a in range(n_actions):
            edges.append((s, a, len(prefixes)))
            prefixes.append((*prefix, a))
    n_states = len(prefixes)
    kind = np.full(n_states, END)
    kind[[s for s, _, _ in edges]] = POLICY
    tools = zeros((n_states, n_actions), exact)
    rewards = zeros((n_states, n_actions), exact)
    outcomes = zeros(n_states, exact)
    for s, prefix in enumerate(prefixes):
        if kind[s] == END:
            if outcome is not None:
                outcomes[s] = as_numbers(outcome(prefix), exact)[()]
            continue
        written = tool_after(prefix) if tool_after is not None else None
        if written is not None:
            kind[s] = TOOL
            tools[s] = as_numbers(written, exact)
        if reward is not None:
            rewards[s] = as_numbers([reward(prefix, a) for a in range(n_actions)], exact)
    state, action, nxt = (np.array(column, dtype=np.int64) for column in zip(*edges, strict=True))
    return TokenMDP(
        name=name,
        horizon=horizon,
        kind=kind,
        initial=as_numbers(np.eye(n_states, dtype=int)[0], exact),
        edges=(state, action, nxt, as_numbers(np.ones(len(edges), dtype=int), exact)),
        reward=rewards,
        outcome=outcomes,
        tool=tools,
        labels=tuple(str(p) for p in prefixes),
    )


def tree_prefixes(mdp: TokenMDP) -> list[tuple[int, ...]]:
    """The prefixes that a tree's labels name, in its policy states."""
    labels = [label for label, writes in zip(mdp.labels, mdp.policy_states, strict=True) if writes]
    if not all(label.startswith("(") and label.endswith(")") for label in labels):
        raise ValueError(f"mdp: must be a tree, whose labels are prefixes, got {mdp.name!r} with labels {labels[:3]}")
    return [literal_eval(label) for label in labels]


def policy_table(mdp: TokenMDP, rule: Callable[[tuple[int, ...]], Any]) -> np.ndarray:
    """(S, A) policy of a tree from a rule that maps a prefix to next-token probabilities.

    >>> world = tree(2, 1)
    >>> policy_table(world, lambda prefix: [Fraction(1, 4), Fraction(3, 4)])[0].tolist()
    [Fraction(1, 4), Fraction(3, 4)]
    """
    table = zeros((mdp.n_states, mdp.n_actions), mdp.exact)
    for s, prefix in zip(np.flatnonzero(mdp.policy_states), tree_prefixes(mdp), strict=True):
        table[s] = as_numbers(rule(prefix), mdp.exact)
    return table


def random_tree(
    rng: np.random.Generator,
    *,
    n_actions: int = 2,
    horizon: int = 3,
    eos: bool = False,
    tool_share: float = 0.0,
    rewards: Literal["dense", "outcome", "both"] = "both",
    parameters: Parameters = "prefix",
    same_share: float = 0.0,
    exact: bool = True,
) -> World:
    """A random tree world: random rewards, random behavior and target policies.

    Args:
        rng: Source of randomness.
        n_actions: Size of the vocabulary.
        horizon: Length of the longest string.
        eos: Whether token 0 ends the string.
        tool_share: Probability that a state other than the root belongs to the environment.
        rewards: Per token, for the finished string, or both; small whole numbers.
        parameters: How states share parameters; policies respect it, so both lie in one softmax family.
        same_share: Probability that target and behavior agree in a state (only for "prefix").
        exact: Fractions instead of float64.
    """
    check_name("rewards", rewards, ("dense", "outcome", "both"))
    check_name("parameters", parameters, get_args(Parameters))
    if same_share and parameters != "prefix":
        raise ValueError(f"same_share: must be 0 unless parameters='prefix', got {same_share}")

    def integer(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    mdp = tree(
        n_actions,
        horizon,
        name=f"random tree A={n_actions} H={horizon}" + (" eos" if eos else "") + (" tool" if tool_share else ""),
        eos=0 if eos else None,
        tool_after=lambda prefix: (
            _random_weights(rng, n_actions, exact) if prefix and rng.random() < tool_share else None
        ),
        reward=(lambda _prefix, _a: integer(-2, 3)) if rewards != "outcome" else None,
        outcome=(lambda _string: integer(-2, 5)) if rewards != "dense" else None,
        exact=exact,
    )
    behavior = random_policy(mdp, rng, parameters=parameters)
    target = random_policy(mdp, rng, parameters=parameters)
    if same_share:
        target[rng.random(mdp.n_states) < same_share] = 0
        same = target.sum(axis=1) == 0
        target[same] = behavior[same]
    return World(mdp, behavior, target, parameters)


def _random_weights(rng: np.random.Generator, n: int, exact: bool) -> np.ndarray:
    weights = as_numbers(rng.integers(1, 5, size=n), exact)
    return weights / weights.sum()


def bigram(
    rng: np.random.Generator,
    *,
    n_tokens: int = 3,
    horizon: int = 5,
    step: float = 0.3,
    rewards: Literal["dense", "outcome"] = "dense",
    eos: bool = False,
) -> World:
    """A bigram language model (state = last token), its target a random step of norm `step` in logit space.

    Rewards are normal per token, or an outcome of 0 or 1 carried by the last token.
    """
    check_name("rewards", rewards, ("dense", "outcome"))
    if n_tokens < 1 + eos:
        raise ValueError(f"n_tokens: must be at least {1 + eos}{' with eos' if eos else ''}, got {n_tokens}")
    next_state = np.broadcast_to(np.arange(n_tokens), (n_tokens, n_tokens))
    kind = np.full(n_tokens, POLICY)
    if eos:
        kind[0] = END
    reward = rng.standard_normal((n_tokens, n_tokens)) if rewards == "dense" else 0.0
    outcome = (rng.random(n_tokens) < 0.5).astype(float) if rewards == "outcome" else 0.0
    start = np.full(n_tokens, 1.0 / n_tokens)
    if eos:
        start = np.where(kind == END, 0.0, 1.0 / (n_tokens - 1))
    mdp = chain(
        f"bigram n={n_tokens} H={horizon}" + (" eos" if eos else ""),
        next_state,
        horizon=horizon,
        initial=start,
        reward=reward,
        outcome=outcome,
        kind=kind,
    )
    behavior = random_policy(mdp, rng)
    direction = rng.standard_normal((n_tokens, n_tokens))
    direction /= np.linalg.norm(direction)
    return World(mdp, behavior, step_policy(behavior, direction, step))


def random_chain(
    rng: np.random.Generator,
    *,
    n_states: int = 4,
    n_actions: int = 3,
    horizon: int = 5,
    deterministic: bool = False,
    end: bool = False,
    tool: bool = False,
    step: float = 0.5,
    parameters: Parameters = "prefix",
) -> World:
    """A random float64 Markov world: random (stochastic) transitions, rewards and an outcome per state."""
    kind = np.full(n_states, POLICY)
    if end:
        kind[-1] = END
    if tool:
        kind[-2] = TOOL
    if deterministic:
        next_state: np.ndarray = rng.integers(0, n_states, size=(n_states, n_actions))
    else:
        next_state = rng.dirichlet(np.ones(n_states), size=(n_states, n_actions))
    start = np.where(kind == END, 0.0, 1.0)
    mdp = chain(
        f"chain S={n_states} A={n_actions} H={horizon}",
        next_state,
        horizon=horizon,
        initial=start / start.sum(),
        reward=rng.standard_normal((n_states, n_actions)),
        outcome=rng.standard_normal(n_states),
        kind=kind,
        tool=rng.dirichlet(np.ones(n_actions), size=n_states),
    )
    shared: Parameters = "prefix" if parameters == "position" else parameters
    behavior = random_policy(mdp, rng, parameters=shared)
    direction = rng.standard_normal((1 if parameters == "shared" else n_states, n_actions))
    return World(mdp, behavior, step_policy(behavior, direction, step), parameters)


def sticky_hot(horizon: int, *, exact: bool = False) -> World:
    """A neutral first token picks a hot or a cold state; b leaves either with 1/10, pi leaves the hot one with 1/100.

    chi2 is 9/100 in the hot state and 0 in the cold one, and b is hot half of the time, so the product of marginal
    (1 + chi2) grows as 1.045^t, while the true second moment grows with the spectral radius 1.0895.
    """
    half, stay, leave = Fraction(1, 2), Fraction(9, 10), Fraction(1, 10)
    mdp = chain(
        f"sticky hot state H={horizon}",
        np.array([[1, 2], [1, 2], [2, 1]]),
        horizon=horizon,
        initial=0,
        labels=("start", "hot", "cold"),
        exact=exact,
    )
    behavior = as_numbers([[half, half], [stay, leave], [stay, leave]], exact)
    target = as_numbers([[half, half], [Fraction(99, 100), Fraction(1, 100)], [stay, leave]], exact)
    return World(mdp, behavior, target)


def independent_tokens(
    behavior: Sequence[Any],
    target: Sequence[Any],
    horizon: int,
    *,
    outcome: Callable[[tuple[int, ...]], Any] | None = None,
    parameters: Parameters = "shared",
) -> World:
    """An exact tree world in which both policies write independent, identically distributed tokens."""
    mdp = tree(len(behavior), horizon, name=f"i.i.d. tokens H={horizon}", outcome=outcome)
    return World(
        mdp,
        policy_table(mdp, lambda _prefix: list(behavior)),
        policy_table(mdp, lambda _prefix: list(target)),
        parameters,
    )
