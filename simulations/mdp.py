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


def as_numbers(values: Any, exact: bool) -> np.ndarray:
    """An array of Fractions (exact) or of float64, whatever numbers come in."""
    if not exact:
        return np.asarray(values, dtype=np.float64)
    array = np.asarray(values, dtype=object)
    flat = [v if isinstance(v, Fraction) else Fraction(v) for v in array.ravel()]
    result = np.empty(array.size, dtype=object)
    result[:] = flat
    return result.reshape(array.shape)


def zeros(shape: int | tuple[int, ...], exact: bool) -> np.ndarray:
    """Zeros of the kind that `as_numbers` makes."""
    if not exact:
        return np.zeros(shape)
    return np.full(shape, Fraction(0), dtype=object)


def check_distribution(name: str, probabilities: np.ndarray, rows: np.ndarray | slice = slice(None)) -> None:
    """Raise ValueError unless the named rows are probability distributions over the last axis."""
    exact = probabilities.dtype == object
    rows_of = probabilities[rows]
    if not exact and not np.all(np.isfinite(rows_of)):
        raise ValueError(f"{name}: probabilities must be finite, got {rows_of[~np.isfinite(rows_of)][0]}")
    if rows_of.size and rows_of.min() < 0:
        raise ValueError(f"{name}: probabilities must be >= 0, got {rows_of.min()}")
    totals = rows_of.sum(axis=-1)
    wrong = totals != 1 if exact else np.abs(totals - 1.0) > SUM_TOLERANCE
    if np.any(wrong):
        index = tuple(int(i) for i in np.argwhere(np.atleast_1d(wrong))[0])
        raise ValueError(
            f"{name}: probabilities must sum to 1 (within {0 if exact else SUM_TOLERANCE}), "
            f"row {index} sums to {np.atleast_1d(totals)[index]}"
        )


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
        n_states, n_actions = self.n_states, self.n_actions
        if not isinstance(self.horizon, int) or isinstance(self.horizon, bool) or self.horizon < 1:
            raise ValueError(f"horizon: must be a whole number >= 1, got {self.horizon!r}")
        for name, array, shape in (
            ("initial", self.initial, (n_states,)),
            ("outcome", self.outcome, (n_states,)),
            ("tool", self.tool, (n_states, n_actions)),
        ):
            if array.shape != shape:
                raise ValueError(f"{name}: shape must be {shape}, got {array.shape}")
        if len(self.labels) != n_states:
            raise ValueError(f"labels: {n_states} are needed, one per state, got {len(self.labels)}")
        if not np.isin(self.kind, (POLICY, TOOL, END)).all():
            raise ValueError(f"kind: must be POLICY (0), TOOL (1) or END (2), got {np.unique(self.kind)}")
        if not self.exact:
            for name, array in (("reward", self.reward), ("outcome", self.outcome)):
                if not np.all(np.isfinite(array)):
                    raise ValueError(f"{name}: must be finite, got {array[~np.isfinite(array)][0]}")
        check_distribution("initial", self.initial[None])
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
            if (policy.dtype == object) != self.exact:
                raise ValueError(
                    f"{name}: must be of the world's number kind, Fractions or float64, not a mix"
                )
            check_distribution(name, policy, self.mdp.policy_states)
        if self.parameters not in get_args(Parameters):
            raise ValueError(f"parameters: must be one of {get_args(Parameters)}, got {self.parameters!r}")
        if self.scores is not None and self.scores.shape[:2] != shape:
            raise ValueError(f"scores: shape must start with {shape}, got {self.scores.shape}")
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
            raise ValueError(
                f"parameters: 'position' needs a world whose states occur at one step each, not {mdp.name}"
            )
        depth[reached] = step + 1
    return depth


def step_policy(behavior: np.ndarray, direction: np.ndarray, size: float) -> np.ndarray:
    """The softmax policy whose logits are those of `behavior` moved by `size * direction` (float worlds).

    Args:
        behavior: (S, A) positive probabilities.
        direction: Broadcastable to (S, A), nats per unit step.
        size: Step length.
    """
    if behavior.dtype == object:
        raise ValueError("behavior: a step in logit space needs float64 probabilities, got Fractions")
    if np.any(behavior <= 0):
        raise ValueError(f"behavior: a softmax policy has only positive probabilities, got {behavior.min()}")
    return softmax(np.log(behavior) + size * direction)


def temper_policy(behavior: np.ndarray, temperature: float | Fraction) -> np.ndarray:
    """The policy proportional to b^(1/temperature); exact worlds need 1/temperature to be a whole number.

    >>> temper_policy(np.array([[0.25, 0.75]]), 0.5).round(3)
    array([[0.1, 0.9]])
    """
    if not temperature > 0:
        raise ValueError(f"temperature: must be > 0, got {temperature}")
    power: Any = 1 / Fraction(temperature) if behavior.dtype == object else 1.0 / float(temperature)
    if isinstance(power, Fraction):
        if power.denominator != 1:
            raise ValueError(
                f"temperature: on exact worlds 1/temperature must be a whole number, got {power}"
            )
        power = int(power)
    raised = behavior**power
    return raised / raised.sum(axis=-1, keepdims=True)


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
    n_states, n_actions = table.shape[:2]
    kinds = np.broadcast_to(np.asarray(kind), (n_states,)).copy()
    live = kinds != END
    if table.ndim == 2:
        state, action = np.nonzero(np.broadcast_to(live[:, None], table.shape))
        nxt = table[state, action].astype(np.int64)
        probability = as_numbers(np.ones(len(state), dtype=int), exact)
    elif table.ndim == 3 and table.shape[2] == n_states:
        state, action, nxt = np.nonzero((table != 0) & live[:, None, None])
        probability = as_numbers(table[state, action, nxt], exact)
    else:
        raise ValueError(f"next_state: shape must be (S, A) or (S, A, S), got {table.shape}")
    first = as_numbers(np.eye(n_states, dtype=int)[initial] if np.ndim(initial) == 0 else initial, exact)
    return TokenMDP(
        name=name,
        horizon=horizon,
        kind=kinds,
        initial=first,
        edges=(state, action, nxt, probability),
        reward=_filled(reward, (n_states, n_actions), exact),
        outcome=_filled(outcome, (n_states,), exact),
        tool=_filled(tool, (n_states, n_actions), exact),
        labels=tuple(labels) if labels is not None else tuple(str(s) for s in range(n_states)),
    )


def _filled(values: Any, shape: tuple[int, ...], exact: bool) -> np.ndarray:
    return np.broadcast_to(as_numbers(values, exact), shape).copy()


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
    if n_actions < 1 or horizon < 1:
        raise ValueError(f"n_actions, horizon: must be >= 1, got {n_actions}, {horizon}")
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


def policy_table(mdp: TokenMDP, rule: Callable[[tuple[int, ...]], Any]) -> np.ndarray:
    """(S, A) policy of a tree from a rule that maps a prefix to next-token probabilities.

    >>> world = tree(2, 1)
    >>> policy_table(world, lambda prefix: [Fraction(1, 4), Fraction(3, 4)])[0].tolist()
    [Fraction(1, 4), Fraction(3, 4)]
    """
    table = zeros((mdp.n_states, mdp.n_actions), mdp.exact)
    for s, label in enumerate(mdp.labels):
        if mdp.kind[s] == POLICY:
            inside = label.strip("()").strip(",")
            prefix = tuple(int(token) for token in inside.split(",")) if inside else ()
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

    def integer(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    mdp = tree(
        n_actions,
        horizon,
        name=f"random tree A={n_actions} H={horizon}"
        + (" eos" if eos else "")
        + (" tool" if tool_share else ""),
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
        if parameters != "prefix":
            raise ValueError(f"same_share: only for parameters='prefix', got {parameters!r}")
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
    """Two states, hot and cold, that b leaves with probability 1/10; pi leaves the hot one with 1/100 only.

    chi2 is 9/100 in the hot state and 0 in the cold one, and b is hot half of the time, so the product of
    marginal (1 + chi2) grows as 1.045^t, while the true second moment grows with the spectral radius 1.0895.
    """
    stay, leave = Fraction(9, 10), Fraction(1, 10)
    mdp = chain(
        f"sticky hot state H={horizon}",
        np.array([[0, 1], [1, 0]]),
        horizon=horizon,
        initial=[Fraction(1, 2), Fraction(1, 2)],
        labels=("hot", "cold"),
        exact=exact,
    )
    behavior = as_numbers([[stay, leave], [stay, leave]], exact)
    target = as_numbers([[Fraction(99, 100), Fraction(1, 100)], [stay, leave]], exact)
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
