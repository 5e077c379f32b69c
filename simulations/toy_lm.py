r"""Toy language models as worlds: n-grams at any horizon, a tiny transformer, sampler mismatch.

An **n-gram** model writes the next token from the last n - 1. Its contexts are the states of a Markov
process, so dynamic programming is exact at horizons of thousands of tokens. Two things a language model in a
reinforcement learning loop meets fit into the state: *tool gaps* (after the call token the environment writes
a fixed number of tokens, masked, and the policy goes on from what it then sees) and a *memory*, a finite
automaton that reads every token of the stream, so that an outcome reward may depend on the whole string ("was
this word ever written?").

A **tiny transformer** is a real neural network whose tokens share all parameters. Every prefix up to a short
horizon is enumerated into a tree world with the network's true score vectors. Making one needs torch; one
that was recorded is read by NumPy alone (`load_transformer_world`).

The **sampling engine** of a trainer rarely samples from the very policy that is written down as the behavior
policy. `sampler_policy` gives such a third policy mu.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from simulations import results
from simulations.mdp import (
    END,
    POLICY,
    TOOL,
    Parameters,
    TokenMDP,
    World,
    as_numbers,
    chain,
    check_distribution,
    check_name,
    softmax,
    step_policy,
    temper_policy,
    tree,
    tree_prefixes,
    truncate_policy,
    zeros,
)
from simulations.monte_carlo import Sampler

if TYPE_CHECKING:
    import torch

Context = tuple[int, ...]
#: Next-token probabilities (or logits) given the tokens before.
Rule = Callable[[Context], Any]
Rewards = Literal["dense", "outcome", "both"]

#: Above this many states an n-gram process is refused.
MAX_STATES = 50_000
#: Norm of the random step in logits, nats, from behavior policy to target where no change is given.
DEFAULT_STEP = 0.5

#: The recorded tiny transformer.
RECORDED_TRANSFORMER = Path(__file__).parent / "data" / "tiny_transformer.npz"

# --- n-gram models ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class NGramProcess:
    """A token process whose next token depends on the last n - 1, and the contexts of its states.

    Attributes:
        mdp: The process.
        contexts: The C contexts in which the policy writes, shortest first; the empty one starts the string.
        context: (S,) index of each state's context, -1 where the policy does not write.
    """

    mdp: TokenMDP
    contexts: tuple[Context, ...]
    context: np.ndarray

    def rows(self, rule: Rule) -> np.ndarray:
        """(C, V) numbers that a rule gives to each context."""
        return as_numbers([rule(context) for context in self.contexts], self.mdp.exact)

    def world(
        self,
        behavior: np.ndarray,
        target: np.ndarray,
        parameters: Parameters = "prefix",
        *,
        require_support: bool = True,
    ) -> World:
        """The world of two n-gram models.

        Args:
            behavior: (C, V) next-token probabilities for each context.
            target: (C, V) likewise.
            parameters: "prefix" is a block of V logits for each context, which states with different memories
                share (then the parameter vector has C * V entries in the order of `contexts`, otherwise a
                block for each state); "position" and "shared" as in `World`.
            require_support: As in `World`.

        Raises:
            ValueError: A shape is wrong, or `World` finds a probability or the support wrong.
        """
        mdp, exact = self.mdp, self.mdp.exact
        n, v = len(self.contexts), mdp.n_actions
        written = np.flatnonzero(mdp.policy_states)
        tables = []
        for name, rows in (("behavior", behavior), ("target", target)):
            if rows.shape != (n, v):
                raise ValueError(f"{name}: shape must be {(n, v)} (contexts, tokens), got {rows.shape}")
            table = np.full((mdp.n_states, v), Fraction(1, v) if exact else 1.0 / v)  # elsewhere never read
            table[written] = rows[self.context[written]]
            tables.append(table)
        scores = None
        if parameters == "prefix" and len(written) > n:
            scores = zeros((mdp.n_states, v, n * v), exact)
            local = as_numbers(np.eye(v, dtype=int), exact) - tables[1][:, None, :]
            for s in written:
                first = self.context[s] * v
                scores[s, :, first : first + v] = local[s]
        return World(mdp, tables[0], tables[1], parameters, scores, require_support)


def ngram_process(
    *,
    order: int,
    n_tokens: int,
    horizon: int,
    eos: int | None = None,
    call: int | None = None,
    tool: Any = None,
    memory: Any = None,
    reward: Callable[[Context, int], Any] | None = None,
    outcome: Callable[[Context, int], Any] | None = None,
    exact: bool = False,
    name: str | None = None,
) -> NGramProcess:
    """The Markov process of an n-gram language model.

    Args:
        order: n >= 1; the context is the last n - 1 tokens, fewer at the start of the string.
        n_tokens: V, size of the vocabulary.
        horizon: Largest number of tokens in a stream, those of tools included.
        eos: Token that ends the string, if any.
        call: Token after which, when the policy has written it, the environment writes `len(tool)` tokens.
        tool: (L, V) distributions of those tokens; a tool cannot write `eos`.
        memory: (M, V) ints, the memory after reading a token; it starts at 0. It reads every token of the
            stream.
        reward: Given a context and the token written after it (by the policy or a tool), the token's reward.
        outcome: Given the context and the memory in which the stream stops, its reward; after the end of the
            string the context includes `eos`.
        exact: Fractions instead of float64.
        name: What to call it.

    Returns:
        An `NGramProcess` of the states that can occur; `labels` name them by context.

    Raises:
        ValueError: A number is out of range, a table has a wrong shape or the model has more than
            `MAX_STATES` states.

    Example:
        >>> process = ngram_process(order=2, n_tokens=2, horizon=3, call=1, tool=[[1, 0]])
        >>> process.contexts, process.mdp.labels
        (((), (0,)), ('()', '(0,)', '(1,) tool 1 left'))
    """
    _whole("order", order, 1)
    _whole("n_tokens", n_tokens, 1)
    _whole("horizon", horizon, 1)
    for token_name, token in (("eos", eos), ("call", call)):
        if token is not None:
            _whole(token_name, token, 0, n_tokens - 1)
    if (call is None) != (tool is None):
        raise ValueError(f"call, tool: give both or neither, got call={call!r} and tool={tool!r}")
    if call is not None and call == eos:
        raise ValueError(f"call: must differ from eos, got {call} for both")
    tools = zeros((0, n_tokens), exact) if tool is None else as_numbers(tool, exact)
    if tools.ndim != 2 or tools.shape[1] != n_tokens or (tool is not None and not len(tools)):
        raise ValueError(f"tool: shape must be (tokens of the gap >= 1, {n_tokens}), got {tools.shape}")
    check_distribution("tool", tools, np.ones(len(tools), dtype=bool))
    if eos is not None and np.any(tools[:, eos] != 0):
        raise ValueError(f"tool: a tool cannot end the string, got mass {tools[:, eos].max()} on eos={eos}")
    cells = np.zeros((1, n_tokens), dtype=np.int64) if memory is None else np.asarray(memory)
    if cells.ndim != 2 or cells.shape[1] != n_tokens or not len(cells) or cells.dtype.kind not in "iu":
        raise ValueError(
            f"memory: must be whole numbers of shape (M >= 1, {n_tokens}), got {cells.dtype} {cells.shape}"
        )
    if cells.min() < 0 or cells.max() >= len(cells):
        raise ValueError(f"memory: entries must be in [0, {len(cells)}), got {cells.min()}..{cells.max()}")
    keep = min(order - 1, horizon)  # no context is longer than the string
    gap = len(tools)

    # A state: context, tokens that the tool has left to write, memory, whether the string has ended.
    State = tuple[Context, int, int, bool]

    def after(here: State, token: int) -> State:
        context, left, cell, _ = here
        longer = (*context, token)
        left = left - 1 if left else gap * (token == call)
        return longer[max(len(longer) - keep, 0) :], left, int(cells[cell, token]), token == eos

    states: list[State] = [((), 0, 0, False)]
    index = {states[0]: 0}
    next_state: list[list[int]] = []
    for s, here in enumerate(states):  # the list grows while it is read: breadth first
        row = [s] * n_tokens  # what cannot be written leads nowhere
        left, ended = here[1], here[3]
        for token in range(0 if ended else n_tokens):
            if left and tools[gap - left, token] == 0:
                continue
            nxt = after(here, token)
            if nxt not in index:
                index[nxt] = len(states)
                states.append(nxt)
                if len(states) > MAX_STATES:
                    raise ValueError(
                        f"order: {order} with {n_tokens} tokens makes more than {MAX_STATES} states; take a "
                        "lower order, a smaller vocabulary or a smaller memory"
                    )
            row[token] = index[nxt]
        next_state.append(row)

    size = (len(states), n_tokens)
    kind = np.full(len(states), POLICY)
    written, rewards, outcomes = zeros(size, exact), zeros(size, exact), zeros(len(states), exact)
    context_of = np.full(len(states), -1)
    contexts = sorted({c for c, left, _, ended in states if not left and not ended}, key=lambda c: (len(c), c))
    number = {c: i for i, c in enumerate(contexts)}
    labels = []
    for s, (context, left, cell, ended) in enumerate(states):
        if ended:
            kind[s] = END
        elif left:
            kind[s], written[s] = TOOL, tools[gap - left]
        else:
            context_of[s] = number[context]
        if reward is not None and not ended:
            rewards[s] = as_numbers([reward(context, token) for token in range(n_tokens)], exact)
        if outcome is not None:
            outcomes[s] = as_numbers(outcome(context, cell), exact)[()]
        notes = [f"tool {left} left"] * (left > 0) + [f"memory {cell}"] * (len(cells) > 1) + ["end"] * ended
        labels.append(" ".join([str(context), *notes]))
    first = np.zeros(len(states), dtype=int)
    first[0] = 1
    if name is None:
        extras = [f" {word}" for word, there in (("eos", eos is not None), ("tool", gap > 0)) if there]
        name = f"{order}-gram V={n_tokens} H={horizon}" + "".join(extras)
    mdp = chain(
        name,
        np.array(next_state, dtype=np.int64),
        horizon=horizon,
        initial=first,
        reward=rewards,
        outcome=outcomes,
        kind=kind,
        tool=written,
        labels=labels,
        exact=exact,
    )
    return NGramProcess(mdp, tuple(contexts), context_of)


def ngram(
    rng: np.random.Generator,
    *,
    order: int = 2,
    n_tokens: int = 3,
    horizon: int = 5,
    eos: bool = False,
    tool_tokens: int = 0,
    memory: Any = None,
    rewards: Rewards = "dense",
    parameters: Parameters = "prefix",
    spread: float = 1.0,
    step: float | None = None,
    temperature: float | Fraction | None = None,
    logits: Rule | None = None,
    exact: bool = False,
) -> World:
    """A random n-gram language model.

    Behavior probabilities are drawn for each context (float: normal logits; exact: whole weights 1..5). The
    target is the behavior policy after one change: a random step in logits (the default; on exact worlds its
    probabilities are multiplied by random whole numbers 1..3, a step of their logarithms), another
    temperature, or given logits.

    Args:
        rng: Source of randomness.
        order: n of the n-gram.
        n_tokens: V, size of the vocabulary.
        horizon: Largest number of tokens in a stream.
        eos: Whether token 0 ends the string.
        tool_tokens: Number of tokens that the environment writes after token V - 1, from random
            distributions.
        memory: As in `ngram_process`.
        rewards: "dense" per context and token, an "outcome" per context and memory at the end, or "both";
            normal, or small whole numbers on exact worlds.
        parameters: As in `NGramProcess.world`; the step stays in the family of the parameters, one direction
            per context for "prefix" and one for all contexts otherwise.
        spread: Standard deviation of the behavior policy's logits, nats (float worlds).
        step: Norm of the step in all logits, nats (float worlds; `DEFAULT_STEP` if no change is given).
        temperature: The target is proportional to b^(1/temperature); exact worlds need a whole 1/temperature.
        logits: Given a context, the target's V logits, nats (float worlds).
        exact: Fractions instead of float64.

    Raises:
        ValueError: Two changes at once, one that Fractions do not allow, or what `ngram_process` refuses.

    Example:
        >>> world = ngram(np.random.default_rng(0), order=3, n_tokens=2, horizon=1000, tool_tokens=2)
        >>> world.name, world.mdp.n_states
        ('3-gram V=2 H=1000 tool', 11)
    """
    check_name("rewards", rewards, get_args(Rewards))
    _whole("tool_tokens", tool_tokens, 0)
    _whole("n_tokens", n_tokens, 2 if eos and tool_tokens else 1)  # a tool does not end the string
    tool = None
    if tool_tokens:
        weights = as_numbers(rng.integers(1, 5, size=(tool_tokens, n_tokens)), exact)
        weights[:, : int(eos)] = 0
        tool = weights / weights.sum(axis=1, keepdims=True)

    def number() -> Any:
        return int(rng.integers(-2, 6)) if exact else rng.standard_normal()

    per_token: defaultdict[tuple[Context, int], Any] = defaultdict(number)
    per_end: defaultdict[tuple[Context, int], Any] = defaultdict(number)
    process = ngram_process(
        order=order,
        n_tokens=n_tokens,
        horizon=horizon,
        eos=0 if eos else None,
        call=n_tokens - 1 if tool_tokens else None,
        tool=tool,
        memory=memory,
        reward=(lambda context, token: per_token[context, token]) if rewards != "outcome" else None,
        outcome=(lambda context, cell: per_end[context, cell]) if rewards != "dense" else None,
        exact=exact,
    )
    shape = (len(process.contexts), n_tokens)
    if exact:
        behavior = as_numbers(rng.integers(1, 6, size=shape), True)
        behavior = behavior / behavior.sum(axis=1, keepdims=True)
    else:
        behavior = softmax(spread * rng.standard_normal(shape))
    target = _changed(process, behavior, rng, parameters, step, temperature, logits)
    return process.world(behavior, target, parameters)


def _changed(
    process: NGramProcess,
    behavior: np.ndarray,
    rng: np.random.Generator,
    parameters: Parameters,
    step: float | None,
    temperature: float | Fraction | None,
    logits: Rule | None,
) -> np.ndarray:
    """(C, V) target probabilities, from the behavior policy's by the one change that is given."""
    given = {"step": step, "temperature": temperature, "logits": logits}
    names = [key for key, value in given.items() if value is not None]
    exact = process.mdp.exact
    if len(names) > 1:
        raise ValueError(f"step, temperature, logits: give at most one, got {' and '.join(names)}")
    if exact and (step is not None or logits is not None):
        raise ValueError(f"{names[0]}: logits need float64 probabilities, and exact=True asks for Fractions")
    if temperature is not None:
        return temper_policy(behavior, temperature)
    if logits is not None:
        rows = process.rows(logits)
        if rows.shape != behavior.shape or not np.all(np.isfinite(rows)):
            raise ValueError(
                f"logits: must give {behavior.shape[1]} finite numbers for each context, got an array of "
                f"shape {rows.shape}: {rows}"
            )
        return softmax(rows)
    shape = behavior.shape if parameters == "prefix" else (1, behavior.shape[1])
    if exact:
        moved = behavior * as_numbers(rng.integers(1, 4, size=shape), True)
        return moved / moved.sum(axis=1, keepdims=True)
    direction = rng.standard_normal(shape)
    direction /= np.linalg.norm(direction)
    return step_policy(behavior, direction, DEFAULT_STEP if step is None else step)


def word_memory(word: Sequence[int], n_tokens: int) -> np.ndarray:
    """(L + 1, V) memory that spots a word of L tokens: how much is matched, and L ever after it was written.

    Raises:
        ValueError: The word is empty or has a token outside the vocabulary.

    Example:
        >>> word_memory([0, 1], 2)
        array([[1, 0],
               [1, 2],
               [2, 2]])
    """
    wanted = tuple(word)
    if not wanted:
        raise ValueError("word: must have at least one token, got none")
    for token in wanted:
        _whole("word", token, 0, n_tokens - 1)
    table = np.full((len(wanted) + 1, n_tokens), len(wanted))
    for matched in range(len(wanted)):
        for token in range(n_tokens):
            read = (*wanted[:matched], token)
            table[matched, token] = next(k for k in range(len(read), -1, -1) if read[len(read) - k :] == wanted[:k])
    return table


def fit_ngram(sequences: Sequence[Sequence[int]], *, order: int, n_tokens: int) -> Rule:
    r"""The n-gram model fitted to token sequences by counting, with add-one smoothing.

    .. math:: p(a|c) = (N(c, a) + 1) / (N(c) + V)

    Args:
        sequences: Token strings; contexts at the start of each are shorter. A string that ended has its
            end-of-sequence token at the end.
        order: n of the n-gram.
        n_tokens: V, size of the vocabulary.

    Returns:
        A rule: given any prefix, V Fractions that depend on its last n - 1 tokens. Contexts never seen get
            the
        uniform distribution.

    Raises:
        ValueError: A token is outside the vocabulary.

    Example:
        >>> [str(p) for p in fit_ngram([[0, 1, 0, 1, 1]], order=2, n_tokens=2)((0,))]
        ['1/4', '3/4']
    """
    _whole("order", order, 1)
    _whole("n_tokens", n_tokens, 1)
    counts: defaultdict[Context, Counter[int]] = defaultdict(Counter)
    for sequence in sequences:
        for place, token in enumerate(sequence):
            _whole("sequences", token, 0, n_tokens - 1)
            counts[tuple(sequence[max(place - order + 1, 0) : place])][token] += 1

    def rule(prefix: Context) -> list[Fraction]:
        seen = counts.get(prefix[max(len(prefix) - order + 1, 0) :], Counter())
        return [Fraction(seen[token] + 1, seen.total() + n_tokens) for token in range(n_tokens)]

    return rule


#: Eight characters; "." ends a sentence.
ALPHABET = " .aehnst"
#: What the text model is fitted to.
TEXT = (
    "the hen sat at the nest. the ant has seen the sea. she eats a neat tea at ten. then the hens "
    "ate the ants. that tent at the east sea has a net. she sees the hat that the hen has. a nest "
    "that she sees has ten ants. the tea tastes as neat as the sea. ten ants hasten then. the neat "
    "tenant sat at the sash. the nets at sea hasten the hens. she hates that heat. the east heats "
    "the sea at ten."
)


def encode(text: str) -> list[int]:
    """The tokens of a text in `ALPHABET`.

    >>> encode("tea.")
    [7, 3, 2, 1]
    """
    strange = sorted(set(text) - set(ALPHABET))
    if strange:
        raise ValueError(f"text: may only use the characters {ALPHABET!r}, got {strange}")
    return [ALPHABET.index(character) for character in text]


def fitted_ngram(
    rng: np.random.Generator,
    *,
    order: int = 3,
    horizon: int = 64,
    sentences: bool = False,
    word: str = "sea",
    rewards: Rewards = "dense",
    parameters: Parameters = "prefix",
    step: float | None = None,
    temperature: float | Fraction | None = None,
    logits: Rule | None = None,
    exact: bool = False,
) -> World:
    """A character-level n-gram model of `TEXT`, the behavior policy, and a target that is a change of it.

    Args:
        rng: Source of randomness of the step.
        order: n of the n-gram.
        horizon: Largest number of characters.
        sentences: Whether "." ends the string; otherwise the text runs on to the horizon.
        word: The outcome is 1 if this was written, otherwise 0.
        rewards: "dense" (1 for each vowel), "outcome" (the word) or "both".
        parameters: As in `NGramProcess.world`.
        step: As in `ngram`, and so are `temperature`, `logits` and `exact`.
        temperature: See `step`.
        logits: See `step`.
        exact: See `step`.

    Raises:
        ValueError: As in `ngram`, or a character of `word` is not in `ALPHABET`.

    Example:
        >>> world = fitted_ngram(np.random.default_rng(0), order=3, horizon=1024)
        >>> world.name, world.mdp.n_states
        ('3-gram of a text H=1024', 73)
    """
    check_name("rewards", rewards, get_args(Rewards))
    n_tokens, stop = len(ALPHABET), ALPHABET.index(".")
    tokens = encode(word)
    tracked = rewards != "dense"
    vowels = encode("ae")
    process = ngram_process(
        order=order,
        n_tokens=n_tokens,
        horizon=horizon,
        eos=stop if sentences else None,
        memory=word_memory(tokens, n_tokens) if tracked else None,
        reward=(lambda _context, token: int(token in vowels)) if rewards != "outcome" else None,
        outcome=(lambda _context, cell: int(cell == len(tokens))) if tracked else None,
        exact=exact,
        name=f"{order}-gram of a text H={horizon}",
    )
    texts = [f"{sentence}." for sentence in TEXT.rstrip(".").split(". ")] if sentences else [TEXT]
    rule = fit_ngram([encode(text) for text in texts], order=order, n_tokens=n_tokens)
    behavior = process.rows(rule)
    target = _changed(process, behavior, rng, parameters, step, temperature, logits)
    return process.world(behavior, target, parameters)


def _whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise ValueError unless value is a whole number in the range."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        upper = "" if most is None else f" and <= {most}"
        raise ValueError(f"{name}: must be a whole number >= {least}{upper}, got {value!r}")


# --- a tiny transformer -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TinyTransformer:
    """A decoder-only transformer in float64, small enough to enumerate.

    Token and position embeddings, then layers of causal self-attention and a GELU perceptron, each behind a
    layer norm and a residual connection, then a layer norm and a linear map to logits. All its parameters are
    one vector. Its methods need torch.

    Attributes:
        parameters: (D,) all weights, in the order of `shapes`.
        n_tokens: V, size of the vocabulary.
        max_length: Longest string it can write; it reads one token less, after a start token.
        width: Size of the residual stream, a multiple of `n_heads`.
        n_layers: Number of layers.
        n_heads: Attention heads per layer.
        hidden: Width of the perceptron.

    Raises:
        ValueError: A size is out of range, or `parameters` has the wrong shape or is not finite.
    """

    parameters: np.ndarray
    n_tokens: int = 3
    max_length: int = 4
    width: int = 4
    n_layers: int = 1
    n_heads: int = 2
    hidden: int = 8

    def __post_init__(self) -> None:
        """Check sizes."""
        _check_sizes(self.n_tokens, self.max_length, self.width, self.n_layers, self.n_heads, self.hidden)
        size = sum(int(np.prod(shape)) for _, shape in self.shapes)
        if self.parameters.shape != (size,) or not np.all(np.isfinite(self.parameters)):
            raise ValueError(f"parameters: must be {size} finite numbers, got shape {self.parameters.shape}")

    @classmethod
    def random(
        cls,
        seed: int,
        *,
        n_tokens: int = 3,
        max_length: int = 4,
        width: int = 4,
        n_layers: int = 1,
        n_heads: int = 2,
        hidden: int = 8,
    ) -> TinyTransformer:
        """An untrained network, the same for the same seed on every machine.

        Embeddings are standard normal, matrices normal with variance 1 / inputs, layer norms start as
        identity.

        >>> TinyTransformer.random(0, n_tokens=2, max_length=3).parameters.shape
        (184,)
        """
        _check_sizes(n_tokens, max_length, width, n_layers, n_heads, hidden)
        rng = np.random.default_rng(seed)
        parts = []
        for name, shape in _shapes(n_tokens, max_length, width, n_layers, hidden):
            if "norm" in name:
                parts.append(np.stack([np.ones(width), np.zeros(width)]).ravel())
            else:
                scale = 1.0 if "embedding" in name else shape[0] ** -0.5
                parts.append(scale * rng.standard_normal(shape).ravel())
        return cls(np.concatenate(parts), n_tokens, max_length, width, n_layers, n_heads, hidden)

    @property
    def shapes(self) -> list[tuple[str, tuple[int, int]]]:
        """Name and shape of every weight matrix; norms are (gain, offset)."""
        return _shapes(self.n_tokens, self.max_length, self.width, self.n_layers, self.hidden)

    def perturbed(self, rng: np.random.Generator, scale: float) -> TinyTransformer:
        """The network with normal noise of standard deviation `scale` on every parameter."""
        if not (np.isfinite(scale) and scale >= 0):
            raise ValueError(f"scale: must be finite and >= 0, got {scale}")
        return replace(self, parameters=self.parameters + scale * rng.standard_normal(self.parameters.shape))

    def log_probabilities(self, parameters: torch.Tensor, strings: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of every next token along strings, differentiable in the parameters.

        Args:
            parameters: (D,) float64.
            strings: (N, L) ints, L < max_length; entries that are padding must be tokens too.

        Returns:
            (N, L + 1, V); entry l is the distribution after the first l tokens.
        """
        import torch
        from torch.nn import functional

        weights: dict[str, torch.Tensor] = {}
        first = 0
        for name, shape in self.shapes:
            last = first + shape[0] * shape[1]
            weights[name] = parameters[first:last].reshape(shape)
            first = last

        def norm(value: torch.Tensor, name: str) -> torch.Tensor:
            gain, offset = weights[name]
            return functional.layer_norm(value, (self.width,), gain, offset)

        start = torch.full((len(strings), 1), self.n_tokens)
        read = torch.cat([start, strings], dim=1)
        n, length = read.shape
        stream = weights["token embedding"][read] + weights["position embedding"][:length]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        for layer in range(self.n_layers):
            projected = norm(stream, f"{layer} attention norm") @ weights[f"{layer} query key value"]
            query, key, value = projected.reshape(n, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
            affinity = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            attention = torch.where(causal, affinity, -torch.inf).softmax(dim=-1)
            mixed = (attention @ value).transpose(1, 2).reshape(n, length, self.width)
            stream = stream + mixed @ weights[f"{layer} attention out"]
            lifted = functional.gelu(norm(stream, f"{layer} perceptron norm") @ weights[f"{layer} up"])
            stream = stream + lifted @ weights[f"{layer} down"]
        return (norm(stream, "last norm") @ weights["head"]).log_softmax(dim=-1)

    def next_token_probabilities(self, prefixes: Sequence[Context]) -> np.ndarray:
        """(N, V) distribution of the next token after each prefix, which may differ in length.

        Raises:
            ValueError: There is no prefix, one is too long, or a token is outside the vocabulary.
        """
        import torch

        strings, lengths = self._padded(prefixes)
        with torch.inference_mode():
            along = self.log_probabilities(torch.tensor(self.parameters), torch.tensor(strings))
        return along.exp().numpy()[np.arange(len(lengths)), lengths]

    def scores(self, prefixes: Sequence[Context]) -> np.ndarray:
        """(N, V, D) gradient of log pi(a|prefix) in all parameters, for every token a.

        Raises:
            ValueError: As in `next_token_probabilities`.
        """
        import torch

        strings, lengths = self._padded(prefixes)
        here = torch.tensor(np.arange(strings.shape[1] + 1) == lengths[:, None])

        def log_row(parameters: torch.Tensor, string: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
            along = self.log_probabilities(parameters, string[None])[0]
            return torch.where(place[:, None], along, 0.0).sum(dim=0)

        gradient = torch.func.vmap(torch.func.jacrev(log_row), in_dims=(None, 0, 0))
        return gradient(torch.tensor(self.parameters), torch.tensor(strings), here).numpy()

    def _padded(self, prefixes: Sequence[Context]) -> tuple[np.ndarray, np.ndarray]:
        """(N, longest) strings, padded with token 0, and their (N,) lengths."""
        if not len(prefixes):
            raise ValueError("prefixes: at least one is needed, got none")
        lengths = np.array([len(prefix) for prefix in prefixes])
        if lengths.max() >= self.max_length:
            raise ValueError(
                f"prefixes: at most {self.max_length - 1} tokens can be read, got {lengths.max()}; "
                "make the transformer with a larger max_length"
            )
        strings = np.zeros((len(prefixes), lengths.max()), dtype=np.int64)
        for row, prefix in enumerate(prefixes):
            for token in prefix:
                _whole("prefixes", token, 0, self.n_tokens - 1)
            strings[row, : len(prefix)] = prefix
        return strings, lengths


def _check_sizes(n_tokens: int, max_length: int, width: int, n_layers: int, n_heads: int, hidden: int) -> None:
    sizes = {"n_tokens": n_tokens, "max_length": max_length, "width": width}
    for name, value in (sizes | {"n_layers": n_layers, "n_heads": n_heads, "hidden": hidden}).items():
        _whole(name, value, 1)
    if width % n_heads:
        raise ValueError(f"width: must be a multiple of n_heads={n_heads}, got {width}")


def _shapes(
    n_tokens: int, max_length: int, width: int, n_layers: int, hidden: int
) -> list[tuple[str, tuple[int, int]]]:
    shapes = [("token embedding", (n_tokens + 1, width)), ("position embedding", (max_length, width))]
    for layer in range(n_layers):
        shapes += [
            (f"{layer} attention norm", (2, width)),
            (f"{layer} query key value", (width, 3 * width)),
            (f"{layer} attention out", (width, width)),
            (f"{layer} perceptron norm", (2, width)),
            (f"{layer} up", (width, hidden)),
            (f"{layer} down", (hidden, width)),
        ]
    return [*shapes, ("last norm", (2, width)), ("head", (width, n_tokens))]


def transformer_world(behavior: TinyTransformer, target: TinyTransformer, mdp: TokenMDP) -> World:
    """The world of two transformers: every prefix of a tree, with the target's scores in all its parameters.

    Args:
        behavior: Network that sampled the tokens.
        target: Network whose gradient is wanted, D parameters.
        mdp: A float64 tree (`simulations.mdp.tree(..., exact=False)`), with whatever rewards, end of sequence
            and tools; its horizon is at most the networks' `max_length`.

    Returns:
        A `World` with `scores` of shape (S, V, D).

    Raises:
        ValueError: The tree is no tree, is exact, or does not fit a network.

    Example:
        >>> behavior = TinyTransformer.random(0)
        >>> target = behavior.perturbed(np.random.default_rng(1), 0.05)
        >>> transformer_world(behavior, target, tree(3, 4, exact=False)).scores.shape
        (121, 3, 196)
    """
    for name, model in (("behavior", behavior), ("target", target)):
        if model.n_tokens != mdp.n_actions or model.max_length < mdp.horizon:
            raise ValueError(
                f"mdp: {mdp.n_actions} tokens and a horizon of {mdp.horizon} do not fit the {name} network, "
                f"which has {model.n_tokens} tokens and writes at most {model.max_length}"
            )
    prefixes = _float_tree_prefixes(mdp)
    tables = []
    for model in (behavior, target):
        table = np.full((mdp.n_states, mdp.n_actions), 1.0 / mdp.n_actions)  # elsewhere never read
        table[mdp.policy_states] = model.next_token_probabilities(prefixes)
        tables.append(table)
    scores = np.zeros((mdp.n_states, mdp.n_actions, len(target.parameters)))
    scores[mdp.policy_states] = target.scores(prefixes)
    return World(mdp, tables[0], tables[1], scores=scores)


def _float_tree_prefixes(mdp: TokenMDP) -> list[Context]:
    """The prefixes of a float64 tree's policy states."""
    if mdp.exact:
        raise ValueError("mdp: a transformer needs a float64 tree, got Fractions; use tree(..., exact=False)")
    return tree_prefixes(mdp)


def policy_gradient_steps(
    model: TinyTransformer,
    mdp: TokenMDP,
    rng: np.random.Generator,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
) -> TinyTransformer:
    r"""The network after steps of REINFORCE, each on strings that it has just sampled.

    .. math:: \theta \leftarrow \theta + \frac{\eta}{n} \sum_i (R_i - \bar R)
        \sum_t \nabla\log\pi_\theta(a_{it}|s_{it})

    Args:
        model: Where to start.
        mdp: A float64 tree, which gives the returns R.
        rng: Source of the samples.
        steps: Number of updates.
        batch: n, sampled strings per update.
        learning_rate: eta.

    Raises:
        ValueError: A number is out of range, or as in `transformer_world`.
    """
    _whole("steps", steps, 0)
    _whole("batch", batch, 2)
    if not (np.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate: must be finite and > 0, got {learning_rate}")
    for _ in range(steps):
        world = transformer_world(model, model, mdp)
        sample = Sampler(world).draw(batch, rng)
        dense = np.where(mdp.kind[sample.states] != END, mdp.reward[sample.states, sample.actions], 0.0)
        returns = dense.sum(axis=1) + mdp.outcome[sample.final_state]
        credit = np.where(sample.mask, (returns - returns.mean())[:, None], 0.0)
        weight = np.zeros((mdp.n_states, mdp.n_actions))
        np.add.at(weight, (sample.states, sample.actions), credit)
        gradient = np.tensordot(weight, world.local_scores, axes=2) / batch
        model = replace(model, parameters=model.parameters + learning_rate * gradient)
    return model


def _recorded_mdp() -> TokenMDP:
    """Strings of 4 tokens 0, 1, 2: 1 if their sum is a multiple of 3, and a little for each rise."""
    return tree(
        3,
        4,
        name="tiny transformer V=3 H=4",
        reward=lambda prefix, token: 0.25 if prefix and token > prefix[-1] else 0.0,
        outcome=lambda string: float(sum(string) % 3 == 0),
        exact=False,
    )


#: How the recorded networks were made: the behavior policy by pretraining, the target from it by more steps.
_RECIPE: dict[str, Any] = {
    "seed": 4,
    "pretraining_steps": 5,
    "steps": 4,
    "batch": 64,
    "learning_rate": 0.1,
}


def record_transformer_world(path: str | os.PathLike[str] = RECORDED_TRANSFORMER) -> World:
    """Make the tiny-transformer world and write its tables to an npz file; needs torch.

    The behavior policy is a network of 196 parameters after some policy-gradient steps, the target the same
    network after a few more, on samples of their own.

    Args:
        path: Written whole or not at all.

    Returns:
        The world that `load_transformer_world` reads back.
    """
    import torch

    mdp = _recorded_mdp()
    early, late = (np.random.default_rng(child) for child in np.random.SeedSequence(_RECIPE["seed"]).spawn(2))
    settings = {"batch": _RECIPE["batch"], "learning_rate": _RECIPE["learning_rate"]}
    untrained = TinyTransformer.random(_RECIPE["seed"])
    behavior = policy_gradient_steps(untrained, mdp, early, steps=_RECIPE["pretraining_steps"], **settings)
    target = policy_gradient_steps(behavior, mdp, late, steps=_RECIPE["steps"], **settings)
    world = transformer_world(behavior, target, mdp)
    versions = {"numpy": np.__version__, "torch": str(torch.__version__)}
    scores = target.scores(_float_tree_prefixes(mdp))
    made = np.array(json.dumps(_RECIPE | versions))
    with results.replacing(path) as file:
        np.savez_compressed(file, behavior=world.behavior, target=world.target, scores=scores, made=made)
    return world


def load_transformer_world(path: str | os.PathLike[str] = RECORDED_TRANSFORMER) -> World:
    """The recorded world of a tiny transformer, its target some policy-gradient steps on; needs no torch.

    Raises:
        ValueError: The file holds something else.

    Example:
        >>> world = load_transformer_world()
        >>> world.name, world.mdp.horizon, world.dimension
        ('tiny transformer V=3 H=4', 4, 196)
    """
    mdp = _recorded_mdp()
    with np.load(path, allow_pickle=False) as file:
        missing = {"behavior", "target", "scores"} - set(file.files)
        if missing:
            raise ValueError(f"path: {path} is no recorded transformer, it has no {sorted(missing)}")
        behavior, target, rows = file["behavior"], file["target"], file["scores"]
    if rows.ndim != 3 or rows.shape[:2] != (mdp.policy_states.sum(), mdp.n_actions):
        raise ValueError(f"path: scores in {path} do not fit {mdp.name!r}, got shape {rows.shape}")
    scores = np.zeros((mdp.n_states, *rows.shape[1:]))
    scores[mdp.policy_states] = rows
    return World(mdp, behavior, target, scores=scores)


# --- sampler mismatch ---------------------------------------------------------------------------------------


def sampler_policy(
    world: World,
    *,
    rng: np.random.Generator | None = None,
    noise: float | None = None,
    top_k: int | None = None,
    top_p: float | Fraction | None = None,
) -> np.ndarray:
    """The probabilities mu of a sampling engine that means to sample from the behavior policy.

    The tokens then come from mu while a trainer forms the ratios pi/b: `replace(world, behavior=mu)` samples
    them and corrects by pi/mu. Where mu truncates, that needs `require_support=False`, and no ratio can
    correct it.

    Args:
        world: The world; its behavior policy must be positive for noise.
        rng: Source of the noise.
        noise: Standard deviation, nats, of independent normal noise on every logit (as from rounding).
        top_k: Truncation, after the noise, as in `truncate_policy`.
        top_p: Likewise.

    Returns:
        (S, A) probabilities.

    Raises:
        ValueError: Nothing is to be done, noise has no `rng`, a size is out of range, or noise is asked for
            Fractions.

    Example:
        >>> world = ngram(np.random.default_rng(0), order=1, horizon=3)
        >>> world.behavior.round(2), sampler_policy(world, top_p=0.8).round(2)
        (array([[0.35, 0.19, 0.46]]), array([[0.44, 0.  , 0.56]]))
    """
    if noise is None and top_k is None and top_p is None:
        raise ValueError("noise, top_k, top_p: give at least one, got none")
    mu = world.behavior
    if noise is not None:
        if rng is None:
            raise ValueError("rng: noise needs a random generator, got None")
        if not (np.isfinite(noise) and noise >= 0):
            raise ValueError(f"noise: must be finite and >= 0, got {noise}")
        mu, rows = mu.copy(), world.mdp.policy_states
        mu[rows] = step_policy(mu[rows], rng.standard_normal(mu[rows].shape), noise)
    if top_k is not None or top_p is not None:
        mu = truncate_policy(mu, top_k=top_k, top_p=top_p)
    return mu
