r"""Training small softmax language models with the estimators of `ctpo`, where the optimum is known exactly.

A `Problem` is a small language model (logits for each context) and a reward. The model is trained as in
reinforcement learning of large ones: responses are sampled in groups of the same prompt, each gets an
advantage, and mini-batch after mini-batch is used for one step of stochastic gradient ascent,

.. math:: \theta \leftarrow \theta + \eta \frac1B \sum_i \sum_t c_{it} A_{it} \nabla\log\pi_\theta(a_{it}|s_{it})

with the coefficients and advantages of `ctpo` itself, the code that a trainer runs, and exact softmax scores.
The sampler b is refreshed only every K updates (the *staleness*): the mini-batch of update k of such a round
was sampled from the policy before the round, k steps ago. The objective, its optimum and its gradient are
exact, by dynamic programming over the (step, state) pairs that can occur.

Many runs are trained in one array program, on a leading axis. Each run draws from a stream of its own, and no
operation mixes runs, so a run's result does not depend on which others share the program. Methods that are
compared see the same streams (common random numbers).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

import ctpo
from simulations.mdp import END, POLICY, chain, check_name, softmax
from simulations.toy_lm import NGramProcess

#: Responses to one prompt that are compared with each other.
GROUP = 8

# --- problems -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Problem:
    """What a model is trained on, and where training starts.

    Attributes:
        name: Key in result files.
        description: One sentence for tables.
        process: A float64 process with deterministic transitions and a uniform distribution over its prompts.
        start: (C, V) logits of each context before training, nats.
        rate: A learning rate of the right order for on-policy training.
    """

    name: str
    description: str
    process: NGramProcess
    start: np.ndarray
    rate: float

    @cached_property
    def nodes(self) -> Nodes:
        """The process unrolled in time."""
        return Nodes.of(self.process)

    @cached_property
    def optimum(self) -> float:
        """The largest expected return of any policy, one that sees step and state included."""
        best = self.nodes.action_values(lambda q, _: q.max(axis=-1), 1)
        return float(best[0, self.nodes.start].max(axis=-1).mean())

    def share(self, logits: np.ndarray) -> np.ndarray:
        """(N,) true objective of policies, as a share of the optimum."""
        return self.nodes.objective(softmax(logits)) / self.optimum


@dataclass(frozen=True, eq=False)
class Nodes:
    """The M (step, state) pairs that can occur, in the order of their steps.

    Attributes:
        first: (H + 1,) index of the first node of each step; the last entry is M.
        context: (M,) block of logits that writes the node's token.
        reward: (M, V) reward of a token; at the last step the outcome is included.
        follow: (M, V) next node; at the last step 0, which is never read.
        start: (P,) node of each prompt.
        n_contexts: C.
    """

    first: np.ndarray
    context: np.ndarray
    reward: np.ndarray
    follow: np.ndarray
    start: np.ndarray
    n_contexts: int

    @classmethod
    def of(cls, process: NGramProcess) -> Nodes:
        """Unroll a process.

        Raises:
            ValueError: It is exact, has tool tokens, may end early, branches at random or weighs its prompts.
        """
        mdp = process.mdp
        prompts = np.flatnonzero(mdp.initial > 0)
        if mdp.exact or not np.all(mdp.edges[3] == 1) or not np.allclose(mdp.initial[prompts], 1 / len(prompts)):
            raise ValueError(f"process: {mdp.name!r} must be float64, deterministic and uniform over its prompts")
        table = np.zeros((mdp.n_states, mdp.n_actions), dtype=np.int64)
        table[mdp.edges[0], mdp.edges[1]] = mdp.edges[2]
        layer, first = prompts, [0]
        states, follow, reward = [], [], []
        for step in range(mdp.horizon):
            if np.any(mdp.kind[layer] != POLICY):
                raise ValueError(f"process: the policy must write every token of {mdp.name!r}")
            states.append(layer)
            first.append(first[-1] + len(layer))
            after, place = np.unique(table[layer], return_inverse=True)
            last = step == mdp.horizon - 1
            reward.append(mdp.reward[layer] + (mdp.outcome[table[layer]] if last else 0.0))
            follow.append(np.zeros_like(table[layer]) if last else first[-1] + place.reshape(len(layer), -1))
            layer = after
        return cls(
            np.array(first),
            process.context[np.concatenate(states)],
            np.concatenate(reward),
            np.concatenate(follow),
            np.arange(len(prompts)),
            len(process.contexts),
        )

    @property
    def horizon(self) -> int:
        """H, tokens of a response."""
        return len(self.first) - 1

    def layers(self) -> list[slice]:
        """The nodes of each step."""
        return [slice(low, high) for low, high in zip(self.first[:-1], self.first[1:], strict=True)]

    def action_values(self, value: Callable[[np.ndarray, slice], np.ndarray], runs: int) -> np.ndarray:
        """(N, M, V) action values, where value(q, nodes) gives the state values (N, m) of a step's nodes."""
        q = np.broadcast_to(self.reward, (runs, *self.reward.shape)).copy()
        layers = self.layers()
        for here, after in zip(layers[-2::-1], layers[:0:-1], strict=True):
            q[:, here] += value(q[:, after], after)[:, self.follow[here] - after.start]
        return q

    def q(self, policy: np.ndarray) -> np.ndarray:
        """(N, M, V) action values of the policies (N, C, V)."""
        return self.action_values(lambda q, nodes: np.vecdot(policy[:, self.context[nodes]], q), len(policy))

    def objective(self, policy: np.ndarray) -> np.ndarray:
        """(N,) expected return of the policies (N, C, V)."""
        value = np.vecdot(policy[:, self.context[self.start]], self.q(policy)[:, self.start])
        return value.sum(axis=-1) / len(self.start)

    def gradient(self, policy: np.ndarray) -> np.ndarray:
        r"""(N, C, V) gradient of the objective in the logits.

        .. math:: \partial J / \partial\theta_{ca} = \sum_{nodes\,of\,c} P_\pi(node)\,\pi(a|c)\,(Q - V)(node, a)
        """
        q = self.q(policy)
        written = policy[:, self.context]
        visits = np.zeros(written.shape[:2])
        visits[:, self.start] = 1 / len(self.start)
        layers = self.layers()
        for here, after in itertools.pairwise(layers):
            flow = visits[:, here, None] * written[:, here]
            arrival = np.eye(after.stop - after.start)[self.follow[here].ravel() - after.start]
            visits[:, after] = flow.reshape(len(flow), -1) @ arrival
        advantage = q - np.vecdot(written, q)[:, :, None]
        return np.eye(self.n_contexts)[:, self.context] @ (visits[:, :, None] * written * advantage)


def exam() -> Problem:
    """Each of 32 tokens answers a question, one of 48 kinds in an order that the prompt sets; 4 errors are allowed."""
    n, kinds, horizon, prompts, allowed = 6, 48, 32, 4, 4
    rng = np.random.default_rng(32)
    asked = rng.integers(kinds, size=(prompts, horizon))
    right = rng.integers(n, size=kinds)
    accuracy = rng.uniform(0.5, 0.95, size=kinds)
    # A state: prompt, step, errors so far, of which one more than is allowed stands for all above.
    errors = allowed + 2
    state = np.arange(prompts * horizon * errors)
    x, t, wrong = state // (horizon * errors), state // errors % horizon, state % errors
    context = asked[x, t]
    after = np.minimum(wrong[:, None] + (np.arange(n) != right[context][:, None]), errors - 1)
    end = len(state)
    next_state = np.where(t[:, None] + 1 < horizon, (x * horizon + t + 1)[:, None] * errors + after, end)
    mdp = chain(
        "exam",
        np.vstack([next_state, np.full(n, end)]),
        horizon=horizon,
        initial=np.append(np.where((t == 0) & (wrong == 0), 1 / prompts, 0.0), 0.0),
        reward=np.vstack([(t[:, None] + 1 == horizon) & (after <= allowed), np.zeros((1, n))]),
        kind=np.append(np.full(end, POLICY), END),
    )
    start = np.log(np.where(np.arange(n) == right[:, None], accuracy[:, None], (1 - accuracy[:, None]) / (n - 1)))
    process = NGramProcess(mdp, tuple((c,) for c in range(kinds)), np.append(context, -1))
    return Problem("exam", "1 if at least 28 of 32 tokens are right, else 0", process, start, 10.0)


def plan() -> Problem:
    """The first token commits to a plan, seven are filler, and the last eight earn something if they repeat it.

    Plan 0 is worth twice as much as plan 1, the others nothing, but at first the answers rather follow plan 1. The
    model does not see its plan when it answers, so both must move together.
    """
    worth, horizon, prompts = (1.0, 0.5, 0.0, 0.0), 16, 4
    n, half = len(worth), horizon // 2
    states = [(x, 0, 0) for x in range(prompts)]
    states += [(x, t, a) for x in range(prompts) for t in range(1, horizon) for a in range(n)]
    index = {state: k for k, state in enumerate(states)}
    end = len(states)
    next_state = np.full((end + 1, n), end)
    reward = np.zeros((end + 1, n))
    for k, (x, t, a) in enumerate(states):
        if t + 1 < horizon:
            next_state[k] = [index[x, t + 1, a if t else token] for token in range(n)]
        if t >= half:
            reward[k, a] = worth[a] / half
    contexts = [(x, phase) for x in range(prompts) for phase in range(3)]
    context = [contexts.index((x, (t > 0) + (t >= half))) for x, t, _ in states]
    mdp = chain(
        "plan",
        next_state,
        horizon=horizon,
        initial=np.where(np.arange(end + 1) < prompts, 1 / prompts, 0.0),
        reward=reward,
        kind=np.append(np.full(end, POLICY), END),
    )
    start = np.zeros((len(contexts), n))
    for c, (x, phase) in enumerate(contexts):
        if phase == 0:
            start[c] = np.log([0.4, 0.4, 0.1, 0.1])
        elif phase == 2:
            first = 0.20 + 0.05 * x
            start[c] = np.log([first, 0.8 - first, 0.1, 0.1])
    process = NGramProcess(mdp, tuple(contexts), np.append(context, -1))
    return Problem("plan", "the first token's worth depends on what the last eight will say", process, start, 5.0)


def route() -> Problem:
    """Sixteen steps through six places; a token earns something and chooses the place of the next step."""
    n, horizon = 6, 16
    rng = np.random.default_rng(6)
    place, step = np.arange(n * horizon) % n, np.arange(n * horizon) // n
    onward = np.array([rng.permutation(n) for _ in place])
    last = step + 1 == horizon
    mdp = chain(
        "route",
        np.where(last[:, None], place[:, None], n * (step[:, None] + 1) + onward),
        horizon=horizon,
        initial=np.where((step == 0) & (place < 4), 0.25, 0.0),
        reward=rng.random((n * horizon, n)) / horizon,
    )
    process = NGramProcess(mdp, tuple((t, s) for t in range(horizon) for s in range(n)), np.arange(n * horizon))
    start = np.zeros((n * horizon, n))
    return Problem("route", "additive rewards; a token decides what the next can earn", process, start, 30.0)


def items() -> Problem:
    """Sixteen tokens, each of which earns what it is worth at its place, whatever the others are."""
    prompts, n, horizon = 4, 6, 16
    rng = np.random.default_rng(4)
    x, step = np.arange(prompts * horizon) // horizon, np.arange(prompts * horizon) % horizon
    mdp = chain(
        "items",
        np.broadcast_to((x * horizon + (step + 1) % horizon)[:, None], (prompts * horizon, n)),
        horizon=horizon,
        initial=np.where(step == 0, 1 / prompts, 0.0),
        reward=rng.permuted(np.tile(np.linspace(0, 1, n), (prompts * horizon, 1)), axis=1) / horizon,
    )
    contexts = tuple((a, b) for a in range(prompts) for b in range(horizon))
    process = NGramProcess(mdp, contexts, np.arange(len(x)))
    start = np.zeros((len(x), n))
    return Problem("items", "additive rewards of tokens that do not touch each other", process, start, 60.0)


PROBLEMS = MappingProxyType({make.__name__: make for make in (exam, plan, route, items)})
"""Makers of the problems by name."""


@cache
def build(name: str) -> Problem:
    """A problem by name.

    Raises:
        ValueError: There is none of that name.
    """
    check_name("problem", name, tuple(PROBLEMS))
    return PROBLEMS[name]()


# --- methods ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """An estimator and the advantage that it weights.

    Attributes:
        label: Name in tables and figures.
        estimator: Of `ctpo`, with the window as published.
        critic: Empty for the group-relative outcome advantage. Otherwise the advantage is `ctpo.doubly_robust`,
            with a critic fitted to earlier rounds ("learned") or the exact action values of b ("behavior").
        centered: The window follows the drift of log rho_t, estimated from the mini-batch.
        lookahead: Share of the horizon that the level "lookahead" looks ahead.
    """

    label: str
    estimator: ctpo.Estimator
    critic: Literal["", "learned", "behavior"] = ""
    centered: bool = False
    lookahead: float | None = None

    def built(self, horizon: int, width: float) -> ctpo.Estimator:
        """The estimator for responses of a horizon, its logarithmic bounds multiplied by `width`."""
        estimator = self.estimator
        if self.lookahead is not None:
            estimator = replace(estimator, window=round(self.lookahead * horizon))
        return estimator if width == 1 else replace(estimator, clip=widened(estimator.clip, width))


def widened(clip: Any, width: float) -> ctpo.RatioClip | ctpo.PositionClip:
    """A window with all its logarithmic bounds multiplied by `width`.

    >>> widened(ctpo.RatioClip(0.5, 0.5), 2)
    RatioClip(low=0.75, high=1.25, dual=None)
    """
    if isinstance(clip, ctpo.PositionClip):
        dual = None if clip.dual is None else width * clip.dual
        return replace(clip, low=width * clip.low, high=width * clip.high, dual=dual)
    if not isinstance(clip, ctpo.RatioClip) or clip.dual is not None:
        raise ValueError(f"clip: must be a PositionClip, or a RatioClip without dual bound, got {clip!r}")
    return ctpo.RatioClip(1 - (1 - clip.low) ** width, (1 + clip.high) ** width - 1)


_NO_LIMITS: dict[str, Any] = {"max_log_ratio": None, "max_token_log_ratio": None}
_CUMULATIVE = ctpo.get_estimator("ctpo", clip=None, form="unclipped", **_NO_LIMITS)

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "reinforce": Method("no correction", ctpo.get_estimator("reinforce")),
        "grpo": Method("GRPO", ctpo.get_estimator("grpo")),
        "minpro": Method("MinPRO", ctpo.get_estimator("minpro")),
        "gspo": Method("GSPO", ctpo.get_estimator("gspo")),
        "ctpo": Method("CTPO", ctpo.get_estimator("ctpo")),
        "ctpo_centered": Method("CTPO drift-centered", ctpo.get_estimator("ctpo", **_NO_LIMITS), centered=True),
        "ctpo_mean": Method("CTPO mean", ctpo.get_estimator("ctpo_mean")),
        "cumulative": Method("cumulative, no window", _CUMULATIVE),
        "lookahead": Method("lookahead H/4", ctpo.get_estimator("lookahead"), lookahead=0.25),
        "sequence": Method("sequence", ctpo.get_estimator("sequence")),
        "dr_learned": Method("doubly robust, learned", _CUMULATIVE, critic="learned"),
        "dr_behavior": Method("doubly robust, exact b", _CUMULATIVE, critic="behavior"),
    }
)
"""What is compared, by name."""

#: Methods that do not reduce to "reinforce" when every ratio is 1.
ON_POLICY = ("reinforce", "dr_learned", "dr_behavior")

# --- one update ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Responses:
    """A mini-batch of B responses for each of N runs, GROUP after GROUP of the same prompt.

    Attributes:
        tokens: (N, B, H) flat index (run, context, token) of each sampled token.
        places: (N, B, H) flat index (run, node, token).
        behavior_logp: (N, B, H) log-probability under the policy that sampled it, nats.
        rewards: (N, B, H) reward of each token.
    """

    tokens: np.ndarray
    places: np.ndarray
    behavior_logp: np.ndarray
    rewards: np.ndarray


def draw(nodes: Nodes, logp: np.ndarray, streams: Sequence[np.random.Generator], prompts: int) -> Responses:
    """Sample responses to prompts drawn with replacement, from policies with log-probabilities (N, C, V)."""
    runs, n_contexts, n_tokens = logp.shape
    horizon, size = nodes.horizon, GROUP * prompts
    asked = np.stack([stream.integers(len(nodes.start), size=prompts) for stream in streams])
    uniform = np.stack([stream.random((horizon, size)) for stream in streams], axis=1)
    thresholds = np.exp(logp).cumsum(axis=-1)[..., :-1].reshape(-1, n_tokens - 1).T.copy()
    follow, reward = nodes.follow.ravel(), nodes.reward.ravel()
    tokens, places = np.empty((2, horizon, runs, size), dtype=np.int64)
    node = np.repeat(nodes.start[asked], GROUP, axis=1)
    run = np.arange(runs)[:, None]
    for step in range(horizon):
        row = nodes.context.take(node) + n_contexts * run
        token = np.zeros((runs, size), dtype=np.int64)
        for threshold in thresholds:
            token += uniform[step] >= threshold.take(row)
        np.add(n_tokens * row, token, out=tokens[step])
        np.add(n_tokens * node, token, out=places[step])
        node = follow.take(places[step])
    rewards = reward.take(places)
    places += len(follow) * run
    tokens, places, rewards = (np.ascontiguousarray(x.transpose(1, 2, 0)) for x in (tokens, places, rewards))
    return Responses(tokens, places, logp.ravel().take(tokens), rewards)


@dataclass(frozen=True, eq=False)
class Estimated:
    """A gradient estimated from a mini-batch, (N, C, V), and what it was made of, each (N, B, H)."""

    gradient: np.ndarray
    coefficients: ctpo.Coefficients
    advantages: np.ndarray
    log_ratio: np.ndarray


def estimated_gradient(
    nodes: Nodes,
    method: Method,
    estimator: ctpo.Estimator,
    logits: np.ndarray,
    responses: Responses,
    *,
    critic: np.ndarray | None = None,
    scale_by_std: bool = False,
) -> Estimated:
    """The gradient that a method estimates at the policies with these logits.

    Args:
        nodes: The unrolled process.
        method: Says whether the window is centered.
        estimator: Gives the coefficients.
        logits: (N, C, V), nats.
        responses: The mini-batch.
        critic: (N, M, V) action values for the doubly robust advantage; None for the group-relative one.
        scale_by_std: As in `ctpo.group_relative`.
    """
    log_policy = log_softmax(logits)
    policy = np.exp(log_policy)
    logp, behavior_logp = log_policy.ravel().take(responses.tokens), responses.behavior_logp
    runs, size, _ = logp.shape
    if critic is None:
        outcome = responses.rewards.sum(axis=-1).reshape(runs, -1, GROUP)
        relative = ctpo.group_relative(outcome, scale_by_std=scale_by_std)
        advantages = np.broadcast_to(relative.reshape(runs, size, 1), logp.shape)
    else:
        value = np.vecdot(policy[:, nodes.context], critic)
        q, v = critic.ravel().take(responses.places), value.ravel().take(responses.places // policy.shape[2])
        advantages = ctpo.doubly_robust(responses.rewards, logp, behavior_logp, q, v)
    coefficients = (centered_coefficients if method.centered else ctpo.Estimator.coefficients)(
        estimator, logp, behavior_logp, advantages
    )
    credit = coefficients.weight * advantages
    summed = np.bincount(responses.tokens.ravel(), credit.ravel(), minlength=logits.size).reshape(logits.shape)
    gradient = (summed - policy * summed.sum(axis=-1, keepdims=True)) / size
    return Estimated(gradient, coefficients, advantages, logp - behavior_logp)


def centered_coefficients(
    estimator: ctpo.Estimator, logp: np.ndarray, behavior_logp: np.ndarray, advantages: np.ndarray
) -> ctpo.Coefficients:
    """Coefficients with `PositionClip(drift=...)` at each run's own drift, the mean of -log r over its tokens.

    A window that falls by d per token holds log rho_t where one that does not fall holds log rho_t + d t. So all
    runs are gated in one call, b's log-probabilities lowered by d, and exp(-d t) makes the weights rho_t again.

    Args:
        estimator: Of the level "cumulative", without numerical limits (which would act on log rho_t + d t).
        logp: (N, B, H) log-probabilities under the target, nats.
        behavior_logp: (N, B, H) under b.
        advantages: (N, B, H).
    """
    drift = (behavior_logp - logp).mean(axis=(1, 2), keepdims=True)
    with np.errstate(over="ignore"):  # of rho_t exp(d t) beyond the window, where it has no weight
        found = estimator.coefficients(logp, behavior_logp - drift, advantages)
    back = np.exp(-drift * np.arange(1, logp.shape[2] + 1))
    weight = np.where(advantages == 0, 0.0, found.weight) * back  # no bound stops the overflow where A = 0
    return found._replace(weight=weight, value=found.value * back)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithm of the softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class Critic:
    """Action values fitted by averaging returns to go, in which a mini-batch's share halves with every 16 more.

    A cell counts one more return, the average one of its step. Nothing seen yet is 0 everywhere.
    """

    FADE = 0.5 ** (1 / 16)

    def __init__(self, nodes: Nodes, runs: int) -> None:
        self.nodes = nodes
        self.total, self.count = np.zeros((2, runs, *nodes.reward.shape))

    def values(self) -> np.ndarray:
        """(N, M, V) action values."""
        q = np.empty_like(self.total)
        for step in self.nodes.layers():
            total, count = self.total[:, step], self.count[:, step]
            everything = count.sum(axis=(1, 2), keepdims=True)
            mean = total.sum(axis=(1, 2), keepdims=True) / np.where(everything > 0, everything, 1.0)
            q[:, step] = (total + mean) / (count + 1.0)
        return q

    def learn(self, responses: Responses) -> None:
        """Take in a mini-batch."""
        returns = responses.rewards[..., ::-1].cumsum(axis=-1)[..., ::-1]
        places = responses.places.ravel()
        for kept, new in ((self.total, returns.ravel()), (self.count, None)):
            kept *= self.FADE
            kept += np.bincount(places, new, minlength=kept.size).reshape(kept.shape)


# --- training -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How the updates of a run are fed.

    Attributes:
        updates: Number of updates, a multiple of `staleness` and of `checkpoints`.
        staleness: K, updates between two refreshments of the sampler.
        epochs: Passes over the mini-batches of a round, a divisor of `staleness`: a round then has K / epochs
            mini-batches, each used again in the same order.
        prompts: Prompts of a mini-batch.
        scale_by_std: Divide group-relative advantages by the group's standard deviation.
        checkpoints: Times that the objective is computed, the start not counted.

    Raises:
        ValueError: The numbers do not divide each other.
    """

    updates: int = 512
    staleness: int = 1
    epochs: int = 1
    prompts: int = 2
    scale_by_std: bool = False
    checkpoints: int = 32

    def __post_init__(self) -> None:
        """Check that the numbers divide each other."""
        for name, number in (("staleness", self.updates), ("checkpoints", self.updates), ("epochs", self.staleness)):
            divisor = getattr(self, name)
            if divisor < 1 or number % divisor:
                raise ValueError(f"{name}: must be a divisor of {number}, got {divisor}")

    @property
    def at(self) -> np.ndarray:
        """Number of updates done at each checkpoint, 0 first."""
        return np.linspace(0, self.updates, self.checkpoints + 1).astype(int)


@dataclass(frozen=True, eq=False)
class History:
    """What happened to N runs.

    Attributes:
        share: (checkpoints + 1, N) true objective as a share of the optimum.
        measured: (Q,) index of the updates whose gradient was compared with the true one.
        cosine: (Q, N) of the estimated with the true gradient; NaN where the estimate is 0.
        clipped: (Q, N) share that a bound gated, of the tokens with an advantage other than 0.
        ess_sequence: (Q, N) effective share of the responses under the full-sequence ratio.
        ess_weight: (Q, N) effective share of those tokens under the weight c_t, counting gated ones as 0.
        logits: (N, C, V) in the end.
    """

    share: np.ndarray
    measured: np.ndarray
    cosine: np.ndarray
    clipped: np.ndarray
    ess_sequence: np.ndarray
    ess_weight: np.ndarray
    logits: np.ndarray


def train(
    task: Problem,
    method: Method,
    schedule: Schedule,
    streams: Sequence[np.random.Generator],
    rates: np.ndarray,
    *,
    width: float = 1.0,
    measure_every: int = 0,
) -> History:
    """Train one run for each stream by plain stochastic gradient ascent.

    Args:
        task: The problem.
        method: The method.
        schedule: Updates, staleness and mini-batches.
        streams: Random numbers of each run.
        rates: (N,) learning rate of each run.
        width: Factor of the window's logarithmic bounds.
        measure_every: Compare the estimated gradient with the true one every so many updates; 0 for never.
    """
    nodes, runs = task.nodes, len(streams)
    estimator = method.built(nodes.horizon, width)
    logits = np.broadcast_to(task.start, (runs, *task.start.shape)).copy()
    share, measured, columns = [task.share(logits)], list[int](), list[list[np.ndarray]]()
    learned = Critic(nodes, runs if method.critic == "learned" else 0)
    critic: np.ndarray | None = None
    sampler, kept = log_softmax(logits), list[Responses]()
    for update in range(schedule.updates):
        age = update % schedule.staleness
        if age == 0:
            sampler, kept = log_softmax(logits), []
            if method.critic:
                critic = learned.values() if method.critic == "learned" else nodes.q(np.exp(sampler))
        if age < schedule.staleness // schedule.epochs:
            responses = draw(nodes, sampler, streams, schedule.prompts)
            if schedule.epochs > 1:
                kept.append(responses)
            if method.critic == "learned":
                learned.learn(responses)  # for the rounds to come: `critic` stays as it is
        else:
            responses = kept[age % len(kept)]
        found = estimated_gradient(
            nodes, method, estimator, logits, responses, critic=critic, scale_by_std=schedule.scale_by_std
        )
        if measure_every and update % measure_every == 0:
            measured.append(update)
            columns.append(measurements(nodes.gradient(softmax(logits)), found))
        logits = logits + rates[:, None, None] * found.gradient
        if (update + 1) % (schedule.updates // schedule.checkpoints) == 0:
            share.append(task.share(logits))
    cosines, clipped, *ess = np.array(columns).reshape(len(columns), 4, runs).transpose(1, 0, 2)
    return History(np.array(share), np.array(measured, dtype=int), cosines, clipped, ess[0], ess[1], logits)


def measurements(truth: np.ndarray, found: Estimated) -> list[np.ndarray]:
    """Cosine with the true gradient, share of gated tokens and the two effective shares of `History`, of each run."""
    flags, acting = found.coefficients, found.advantages != 0
    count = np.maximum(acting.sum(axis=(1, 2)), 1)
    clipped = (acting & (flags.clipped_low | flags.clipped_high | flags.clipped_dual)).sum(axis=(1, 2)) / count
    ratios = found.log_ratio.sum(axis=-1)
    ratios = np.exp(ratios - ratios.max(axis=-1, keepdims=True))
    weights = np.where(acting, flags.weight, 0.0).reshape(len(truth), -1)
    return [cosine(found.gradient, truth), clipped, _kish(ratios) / ratios.shape[1], _kish(weights) / count]


def cosine(gradient: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(N,) cosines of gradients (N, C, V), NaN where one is 0."""
    a, b = gradient.reshape(len(gradient), -1), truth.reshape(len(truth), -1)
    size = np.sqrt(np.vecdot(a, a) * np.vecdot(b, b))
    return np.where(size > 0, np.vecdot(a, b) / np.where(size > 0, size, 1.0), np.nan)


def _kish(weights: np.ndarray) -> np.ndarray:
    """Effective number (sum w)^2 / sum w^2 of the weights in each row; 0 if all are 0."""
    square = np.vecdot(weights, weights)
    return np.where(square > 0, weights.sum(axis=1) ** 2 / np.where(square > 0, square, 1.0), 0.0)
