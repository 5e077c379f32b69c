"""The toy training study: its gradients against plain loops and enumeration, its statistics on planted data."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest

import ctpo
from simulations import exact, learning, sweep, training
from simulations.learning import METHODS, Critic, Nodes, Problem, Responses, Schedule, train
from simulations.mdp import POLICY, chain, softmax
from simulations.toy_lm import NGramProcess

NEXT = [[1, 2], [2, 3], [3, 0], [0, 1]]
REWARD = [[0.0, 1.0], [0.5, -0.25], [2.0, 0.0], [0.0, 0.75]]
OUTCOME = [0.0, 1.0, -0.5, 2.0]
CONTEXT = [0, 1, 0, 2]
HORIZON, PROMPTS = 3, 2


def tiny(prompts: int = PROMPTS, horizon: int = HORIZON, rate: float = 1.0) -> Problem:
    """Four states that share three contexts, dense rewards and an outcome."""
    mdp = chain(
        "tiny",
        np.array(NEXT),
        horizon=horizon,
        initial=np.where(np.arange(4) < prompts, 1 / prompts, 0.0),
        reward=np.array(REWARD),
        outcome=np.array(OUTCOME),
    )
    process = NGramProcess(mdp, ((0,), (1,), (2,)), np.array(CONTEXT))
    return Problem("tiny", "tiny", process, np.array([[0.0, 0.5], [0.25, 0.0], [-0.5, 0.5]]), rate)


class Uniforms:
    """Stands for a generator whose prompts and uniform numbers are given."""

    def __init__(self, prompts: list[int], numbers: np.ndarray) -> None:
        self.prompts, self.numbers = prompts, numbers

    def integers(self, high: int, size: int) -> np.ndarray:
        assert max(self.prompts) < high
        return np.array(self.prompts[:size])

    def random(self, shape: tuple[int, int]) -> np.ndarray:
        return self.numbers.reshape(shape)


def generators(*seeds: int) -> list[np.random.Generator]:
    return [np.random.default_rng([99, seed]) for seed in seeds]


def random_logits(task: Problem, runs: int, seed: int, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return task.start + scale * rng.standard_normal((runs, *task.start.shape))


def row_softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


# --- the exact objective --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", *learning.PROBLEMS])
def test_objective_and_gradient_are_those_of_the_exact_engine(name: str) -> None:
    task = tiny() if name == "tiny" else learning.build(name)
    logits = random_logits(task, 3, seed=1)
    policies = softmax(logits)
    objective, gradient = task.nodes.objective(policies), task.nodes.gradient(policies)
    for run, policy in enumerate(policies):
        world = task.process.world(policy, policy)
        assert objective[run] == pytest.approx(exact.objective(world), rel=1e-12)
        expected = exact.policy_gradient(world).reshape(-1, policy.shape[1])
        if len(expected) > len(policy):  # a block for each state, in contexts' stead
            written = task.process.context >= 0
            by_context = np.zeros_like(policy)
            np.add.at(by_context, task.process.context[written], expected[written])
            expected = by_context
        assert np.abs(gradient[run] - expected).max() < 1e-12 * max(1, np.abs(expected).max())


def returns_of(prompt: int, tokens: tuple[int, ...]) -> tuple[list[int], list[float]]:
    """States and rewards along a string of the tiny problem, by walking its tables."""
    state, states, rewards = prompt, [], []
    for token in tokens:
        states.append(state)
        rewards.append(REWARD[state][token])
        state = NEXT[state][token]
    rewards[-1] += OUTCOME[state]
    return states, rewards


def test_the_optimum_is_that_of_the_best_strings() -> None:
    best = [
        max(sum(returns_of(prompt, tokens)[1]) for tokens in itertools.product((0, 1), repeat=HORIZON))
        for prompt in range(PROMPTS)
    ]
    assert tiny().optimum == pytest.approx(sum(best) / PROMPTS, rel=1e-14)


@pytest.mark.parametrize("name", learning.PROBLEMS)
def test_the_optimum_is_reached_and_the_start_is_far_from_it(name: str) -> None:
    task = learning.build(name)
    logits = task.start[None]
    assert task.share(logits)[0] < 0.6
    for _ in range(600):
        logits = logits + task.rate * task.nodes.gradient(softmax(logits))
    assert 0.97 < task.share(logits)[0] <= 1 + 1e-12


def test_what_cannot_be_unrolled_is_refused() -> None:
    def process(**changes: object) -> NGramProcess:
        settings: dict = {"horizon": 2, "initial": 0, **changes}
        return NGramProcess(
            chain("other", settings.pop("table", np.array(NEXT)), **settings), ((0,),), np.zeros(4, int)
        )

    Nodes.of(process())
    for changes in (
        {"table": np.full((4, 2, 4), 0.25)},
        {"initial": [0.25, 0.75, 0, 0]},
        {"exact": True},
    ):
        with pytest.raises(ValueError, match="must be float64, deterministic and uniform"):
            Nodes.of(process(**changes))
    with pytest.raises(ValueError, match="must write every token"):
        Nodes.of(process(kind=np.array([POLICY, 2, POLICY, POLICY])))


# --- sampling -------------------------------------------------------------------------------------------------------


def test_tokens_are_drawn_by_inversion_and_walk_the_process() -> None:
    task = tiny()
    logits = random_logits(task, 2, seed=2)
    size = 2 * learning.GROUP
    numbers = [np.random.default_rng(k).random(HORIZON * size) for k in range(2)]
    prompts = [[1, 0], [1, 1]]
    streams = [Uniforms(p, u) for p, u in zip(prompts, numbers, strict=True)]
    found = learning.draw(task.nodes, learning.log_softmax(logits), streams, 2)
    for run in range(2):
        for i in range(size):
            state = prompts[run][i // learning.GROUP]
            tokens, contexts, logp = [], [], []
            for step in range(HORIZON):
                policy = row_softmax(logits[run, CONTEXT[state]].tolist())
                token = int(numbers[run].reshape(HORIZON, size)[step, i] >= policy[0])
                tokens.append(token)
                contexts.append(CONTEXT[state])
                logp.append(math.log(policy[token]))
                state = NEXT[state][token]
            expected = [(run * 3 + c) * 2 + a for c, a in zip(contexts, tokens, strict=True)]
            assert found.tokens[run, i].tolist() == expected
            assert found.behavior_logp[run, i] == pytest.approx(logp, rel=1e-12)
            assert found.rewards[run, i].tolist() == returns_of(prompts[run][i // learning.GROUP], tuple(tokens))[1]


# --- the estimated gradient -----------------------------------------------------------------------------------------


def by_loops(method: str, width: float, logits: list, strings: list, behavior: list, critic: list | None) -> list:
    """The same estimate for one run from the formulas: `strings` are (prompt, tokens), `behavior` logits of b."""
    policy, b = [row_softmax(row) for row in logits], [row_softmax(row) for row in behavior]
    estimator = METHODS[method].estimator
    rows, mask = [], [True] * HORIZON
    for prompt, tokens in strings:
        states, rewards = returns_of(prompt, tokens)
        contexts = [CONTEXT[s] for s in states]
        logp = [math.log(policy[c][a]) for c, a in zip(contexts, tokens, strict=True)]
        behavior_logp = [math.log(b[c][a]) for c, a in zip(contexts, tokens, strict=True)]
        rows.append((states, contexts, tokens, rewards, logp, behavior_logp))
    falls = [x - y for row in rows for x, y in zip(row[5], row[4], strict=True)]
    drift = sum(falls) / len(falls) if METHODS[method].centered else 0.0

    def bounds(t: int) -> tuple:
        clip = estimator.clip
        if isinstance(clip, ctpo.RatioClip):
            return width * math.log(1 - clip.low), width * math.log(1 + clip.high), None
        sizes = (-clip.low, clip.high, clip.dual)
        return tuple(-drift * t + width * size * t**clip.power for size in sizes)

    gradient = [[0.0, 0.0] for _ in policy]
    for i, (states, contexts, tokens, rewards, logp, behavior_logp) in enumerate(rows):
        if critic is None:
            first = i // learning.GROUP * learning.GROUP
            group = [sum(row[3]) for row in rows[first : first + learning.GROUP]]
            advantages = [sum(rewards) - sum(group) / len(group)] * HORIZON
        else:
            q = [critic[t][s][a] for t, (s, a) in enumerate(zip(states, tokens, strict=True))]
            v = [
                sum(policy[c][a] * critic[t][s][a] for a in range(2))
                for t, (s, c) in enumerate(zip(states, contexts, strict=True))
            ]
            advantages = oracle.doubly_robust(rewards, logp, behavior_logp, q, v, mask)
        coefficients = oracle.coefficients(
            logp,
            behavior_logp,
            advantages,
            mask,
            name=estimator.level,
            form=estimator.form,
            bounds=None if estimator.clip is None else bounds,
            window=round(HORIZON / 4) if method == "lookahead" else None,
            max_log_ratio=estimator.max_log_ratio,
            max_token_log_ratio=estimator.max_token_log_ratio,
        )
        for c, token, coefficient, advantage in zip(contexts, tokens, coefficients, advantages, strict=True):
            assert coefficient["margin"] > 1e-9
            for a in range(2):
                score = (a == token) - policy[c][a]
                gradient[c][a] += coefficient["weight"] * advantage * score / len(rows)
    return gradient


def states_by_step() -> list[list[int]]:
    """The states that can occur at each step, ascending."""
    steps = [list(range(PROMPTS))]
    for _ in range(HORIZON - 1):
        steps.append(sorted({NEXT[s][a] for s in steps[-1] for a in range(2)}))
    return steps


def responses_of(task: Problem, behavior: np.ndarray, strings: list[list[tuple[int, tuple[int, ...]]]]) -> Responses:
    """A mini-batch with the given strings in each run."""
    nodes = task.nodes
    shape = (len(strings), len(strings[0]), task.nodes.horizon)
    tokens, places = np.zeros((2, *shape), dtype=np.int64)
    rewards = np.zeros(shape)
    for run, row in enumerate(strings):
        for i, (prompt, string) in enumerate(row):
            node = int(nodes.start[prompt])
            for t, token in enumerate(string):
                tokens[run, i, t] = (run * nodes.n_contexts + nodes.context[node]) * 2 + token
                places[run, i, t] = (run * len(nodes.context) + node) * 2 + token
                rewards[run, i, t] = nodes.reward[node, token]
                node = int(nodes.follow[node, token])
    return Responses(tokens, places, learning.log_softmax(behavior).ravel()[tokens], rewards)


@pytest.mark.parametrize(
    ("method", "width"),
    [(name, width) for name, m in METHODS.items() for width in ((1.0, 8.0) if m.estimator.clip else (1.0,))],
)
def test_the_gradient_is_that_of_plain_loops(method: str, width: float) -> None:
    task, rng = tiny(), np.random.default_rng(3)
    behavior = random_logits(task, 2, seed=4)
    logits = behavior + 0.3 * rng.standard_normal(behavior.shape)
    strings = [
        [(i // learning.GROUP, tuple(rng.integers(2, size=HORIZON).tolist())) for i in range(2 * learning.GROUP)]
        for _ in range(2)
    ]
    critic = None
    tables: list = [None, None]
    if METHODS[method].critic:
        critic = rng.standard_normal((2, *task.nodes.reward.shape))
        tables = []
        for run in range(2):
            values = iter(critic[run].tolist())  # nodes come step by step, their states in order
            tables.append([{state: next(values) for state in states} for states in states_by_step()])
    found = learning.estimated_gradient(
        task.nodes,
        METHODS[method],
        METHODS[method].built(HORIZON, width),
        logits,
        responses_of(task, behavior, strings),
        critic=critic,
    )
    for run in range(2):
        expected = by_loops(method, width, logits[run].tolist(), strings[run], behavior[run].tolist(), tables[run])
        assert found.gradient[run] == pytest.approx(np.array(expected), rel=1e-9, abs=1e-12)


# --- what it is in expectation --------------------------------------------------------------------------------------


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of two, so that every mini-batch of one group can be listed."""
    monkeypatch.setattr(learning, "GROUP", 2)


def expectation(
    task: Problem, method: str, logits: np.ndarray, behavior: np.ndarray, critic: np.ndarray | None = None
) -> np.ndarray:
    """The expected gradient over all mini-batches of one prompt and two responses of three tokens."""
    strings = list(itertools.product((0, 1), repeat=HORIZON))
    total = np.zeros_like(logits)
    b = [row_softmax(row) for row in behavior.tolist()]
    for prompt in range(PROMPTS):
        batches = [[(prompt, first), (prompt, second)] for first in strings for second in strings]
        chance = {}
        for string in strings:
            states, _ = returns_of(prompt, string)
            chance[string] = math.prod(b[CONTEXT[s]][a] for s, a in zip(states, string, strict=True))
        everywhere = [np.broadcast_to(x, (len(batches), *x.shape)) for x in (logits, behavior)]
        found = learning.estimated_gradient(
            task.nodes,
            METHODS[method],
            METHODS[method].built(HORIZON, 1.0),
            everywhere[0],
            responses_of(task, everywhere[1], batches),
            critic=None if critic is None else np.broadcast_to(critic, (len(batches), *critic.shape)).copy(),
        )
        for batch, gradient in zip(batches, found.gradient, strict=True):
            total += chance[batch[0][1]] * chance[batch[1][1]] * gradient / PROMPTS
    return total


@pytest.mark.usefixtures("pairs")
def test_the_first_update_on_policy_is_reinforce_in_expectation() -> None:
    task = tiny()
    logits = random_logits(task, 1, seed=5)[0]
    truth = task.nodes.gradient(softmax(logits[None]))[0]
    rng = np.random.default_rng(6)
    for method, m in METHODS.items():
        if m.critic:
            critic = rng.standard_normal(task.nodes.reward.shape)
            assert expectation(task, method, logits, logits, critic) == pytest.approx(truth, rel=1e-10, abs=1e-12)
        else:  # the mean of a group of two holds half of the response's own reward
            assert expectation(task, method, logits, logits) == pytest.approx(truth / 2, rel=1e-10, abs=1e-12)


@pytest.mark.usefixtures("pairs")
def test_off_policy_only_sequence_and_doubly_robust_have_the_true_expectation() -> None:
    task = tiny()
    behavior = random_logits(task, 1, seed=7)[0]
    logits = behavior + np.random.default_rng(8).standard_normal(behavior.shape)
    truth = task.nodes.gradient(softmax(logits[None]))[0]
    critic = np.random.default_rng(9).standard_normal(task.nodes.reward.shape)
    for method, m in METHODS.items():
        factor, table = (1.0, critic) if m.critic else (0.5, None)
        gap = np.abs(expectation(task, method, logits, behavior, table) - factor * truth).max()
        if m.critic or method == "sequence":
            assert gap < 1e-12
        else:
            assert gap > 0.01


def test_a_horizon_too_short_to_look_ahead_needs_nothing_else() -> None:
    assert METHODS["lookahead"].built(32, 1.0).window == 8
    assert METHODS["lookahead"].built(16, 1.0).window == 4


# --- pieces ---------------------------------------------------------------------------------------------------------


def test_centered_windows_are_position_clips_with_each_runs_own_drift() -> None:
    rng = np.random.default_rng(10)
    behavior_logp = -rng.random((4, 6, 5))
    logp = behavior_logp + 0.2 * rng.standard_normal(behavior_logp.shape) - np.arange(4)[:, None, None] * 0.1
    advantages = rng.standard_normal(logp.shape)
    estimator = METHODS["ctpo_centered"].built(5, 4.0)
    found = learning.centered_coefficients(estimator, logp, behavior_logp, advantages)
    differ = 0
    for run in range(4):
        drift = float((behavior_logp[run] - logp[run]).mean())
        own = replace(estimator, clip=replace(estimator.clip, drift=drift))
        expected = own.coefficients(logp[run], behavior_logp[run], advantages[run])
        for name in ("weight", "value", "clipped_low", "clipped_high", "clipped_dual"):
            assert getattr(found, name)[run] == pytest.approx(getattr(expected, name), rel=1e-12)
        plain = estimator.coefficients(logp[run], behavior_logp[run], advantages[run])
        differ += int((plain.weight != expected.weight).sum())
    assert differ > 10


def test_a_wider_window_has_wider_logarithmic_bounds() -> None:
    for clip in (ctpo.RatioClip(0.2, 0.28), ctpo.PositionClip(), ctpo.PositionClip(power=-0.5, dual=None)):
        for before, after in zip(clip.bounds([1, 7]), learning.widened(clip, 3).bounds([1, 7]), strict=True):
            assert (before is None) == (after is None)
            if before is not None:
                assert after == pytest.approx(3 * before, rel=1e-12)
    for clip in (None, ctpo.RatioClip(dual=3.0)):
        with pytest.raises(ValueError, match="clip: must be a PositionClip"):
            learning.widened(clip, 2)


def test_a_critic_averages_returns_to_go_and_forgets() -> None:
    task = tiny()
    logits = random_logits(task, 1, seed=11)
    batches = [
        responses_of(task, logits, [[(0, (0, 1, 1)), (1, (1, 1, 0))]]),
        responses_of(task, logits, [[(0, (0, 0, 1)), (0, (0, 1, 1))]]),
    ]
    critic = Critic(task.nodes, 1)
    for batch in batches:
        critic.learn(batch)
    fade = 0.5 ** (1 / 16)
    seen: dict = {}
    for weight, strings in ((fade, [(0, (0, 1, 1)), (1, (1, 1, 0))]), (1.0, [(0, (0, 0, 1)), (0, (0, 1, 1))])):
        for prompt, string in strings:
            states, rewards = returns_of(prompt, string)
            for t, (s, a) in enumerate(zip(states, string, strict=True)):
                total, count = seen.get((t, s, a), (0.0, 0.0))
                seen[t, s, a] = (total + weight * sum(rewards[t:]), count + weight)
    values = iter(critic.values()[0].tolist())
    for t, states in enumerate(states_by_step()):
        totals = [seen[key] for key in seen if key[0] == t]
        mean = sum(x for x, _ in totals) / sum(n for _, n in totals)
        for s in states:
            expected = []
            for a in range(2):
                total, count = seen.get((t, s, a), (0.0, 0.0))
                expected.append((total + mean) / (count + 1))
            assert next(values) == pytest.approx(expected, rel=1e-12)
    assert not Critic(task.nodes, 2).values().any()


def test_what_is_measured_of_an_update_is_that_of_plain_loops() -> None:
    task, rng = tiny(), np.random.default_rng(12)
    behavior = random_logits(task, 1, seed=13)
    logits = behavior + 0.4 * rng.standard_normal(behavior.shape)
    # The first group is of one string, and has no advantage.
    strings = [[(0, (0, 1, 1))] * 8 + [(1, tuple(rng.integers(2, size=HORIZON).tolist())) for _ in range(8)]]
    found = learning.estimated_gradient(
        task.nodes,
        METHODS["ctpo"],
        METHODS["ctpo"].built(HORIZON, 1.0),
        logits,
        responses_of(task, behavior, strings),
    )
    truth = task.nodes.gradient(softmax(logits))
    angle, clipped, ess_sequence, ess_weight = (x[0] for x in learning.measurements(truth, found))
    a, b = found.gradient.ravel().tolist(), truth.ravel().tolist()
    dot, norms = sum(x * y for x, y in zip(a, b, strict=True)), sum(x * x for x in a) * sum(y * y for y in b)
    assert angle == pytest.approx(dot / math.sqrt(norms), rel=1e-12)
    rows = [row.tolist() for row in found.coefficients.weight[0]]
    flat = [w for row, own in zip(rows, found.advantages[0].tolist(), strict=True) for w in row if own[0] != 0]
    assert clipped == pytest.approx(flat.count(0.0) / len(flat), rel=1e-12)
    assert 0 < clipped < 1
    assert len(flat) == 8 * HORIZON
    assert ess_weight == pytest.approx(sum(flat) ** 2 / sum(w * w for w in flat) / len(flat), rel=1e-12)
    ratios = [math.exp(sum(row)) for row in found.log_ratio[0].tolist()]
    assert ess_sequence == pytest.approx(sum(ratios) ** 2 / sum(w * w for w in ratios) / len(ratios), rel=1e-12)


# --- training -------------------------------------------------------------------------------------------------------

ROUNDS = Schedule(updates=16, staleness=8, checkpoints=4)


def same(first: learning.History, second: learning.History, runs: slice) -> None:
    assert np.array_equal(first.logits[runs], second.logits)
    assert np.array_equal(first.share[:, runs], second.share)
    for name in ("cosine", "clipped", "ess_sequence", "ess_weight"):
        assert getattr(first, name)[:, runs] == pytest.approx(getattr(second, name), rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_does_not_depend_on_those_beside_it(method: str) -> None:
    task = learning.build("plan")
    schedule = replace(ROUNDS, epochs=2 if method == "ctpo" else 1)
    rates = np.array([5.0, 5.0, 50.0, 1.0, 5.0])

    def trained(*seeds: int) -> learning.History:
        return train(task, METHODS[method], schedule, generators(*seeds), rates[list(seeds)], measure_every=3)

    everything = trained(0, 1, 2, 3, 4)
    same(everything, trained(2), slice(2, 3))
    same(everything, trained(3, 4), slice(3, 5))
    same(everything, trained(0, 1, 2, 3, 4), slice(0, 5))
    assert not np.array_equal(everything.logits[0], everything.logits[1])


def test_on_policy_every_ratio_method_makes_the_same_updates() -> None:
    task, schedule = learning.build("items"), Schedule(updates=6, checkpoints=6)
    ends = {
        name: train(task, method, schedule, generators(1, 2), np.full(2, task.rate)).logits
        for name, method in METHODS.items()
    }
    for name in METHODS:
        equal = np.array_equal(ends[name], ends["reinforce"])
        assert equal == (name not in training.ON_POLICY[1:]), name


def test_an_update_is_a_step_along_the_estimate_from_the_rounds_sampler() -> None:
    task, method = tiny(), METHODS["grpo"]
    estimator = method.built(HORIZON, 1.0)
    streams = generators(5)
    logits = task.start[None].copy()
    expected = [task.share(logits)[0]]
    for update in range(6):
        if update % 3 == 0:
            sampler = learning.log_softmax(logits)
        responses = learning.draw(task.nodes, sampler, streams, 2)
        step = learning.estimated_gradient(task.nodes, method, estimator, logits, responses).gradient
        logits = logits + 0.7 * step
        expected.append(task.share(logits)[0])
    schedule = Schedule(updates=6, staleness=3, checkpoints=6)
    found = train(task, method, schedule, generators(5), np.array([0.7]), measure_every=4)
    assert np.array_equal(found.logits, logits)
    assert np.array_equal(found.share[:, 0], expected)
    assert found.measured.tolist() == [0, 4]
    assert schedule.at.tolist() == list(range(7))


def test_epochs_reuse_the_rounds_mini_batches_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[int, float]] = []
    real = learning.estimated_gradient

    def spy(nodes, method, estimator, logits, responses, **options):
        used.append((id(responses), float(responses.tokens.sum())))
        return real(nodes, method, estimator, logits, responses, **options)

    monkeypatch.setattr(learning, "estimated_gradient", spy)
    schedule = Schedule(updates=12, staleness=6, epochs=3, checkpoints=1)
    train(tiny(), METHODS["grpo"], schedule, generators(1), np.array([0.1]))
    first, second = used[:6], used[6:]
    assert first[:2] == first[2:4] == first[4:]
    assert second[:2] == second[2:4] == second[4:]
    assert len({number for number, _ in first[:2]}) == 2
    assert first[0][1] != second[0][1]


def test_a_learned_critic_never_sees_the_round_that_it_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(updates: int, staleness: int) -> np.ndarray:
        schedule = Schedule(updates=updates, staleness=staleness, checkpoints=1)
        return train(tiny(), METHODS["dr_learned"], schedule, generators(1), np.array([0.5])).logits

    one_round, two_rounds = end(4, 4), end(4, 2)
    monkeypatch.setattr(Critic, "learn", lambda self, responses: None)
    assert np.array_equal(end(4, 4), one_round)
    assert not np.array_equal(end(4, 2), two_rounds)


def test_policies_without_any_randomness_left_stay_finite() -> None:
    task = learning.build("plan")
    for name, method in METHODS.items():
        found = train(task, method, ROUNDS, generators(1, 2), np.array([1e6, 5.0]), measure_every=3)
        assert np.isfinite(found.logits).all(), name
        assert np.isfinite(found.ess_weight).all(), name
        assert np.abs(found.logits[0]).max() > 1e4, name


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"staleness": 3}, "staleness"), ({"checkpoints": 5}, "checkpoints"), ({"staleness": 4, "epochs": 3}, "epochs")],
)
def test_schedules_that_do_not_divide_are_refused(changes: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: must be a divisor of"):
        Schedule(**{"updates": 16, "checkpoints": 4, **changes})


# --- statistics -----------------------------------------------------------------------------------------------------


def test_wilcoxons_p_is_the_share_of_sign_patterns_at_least_as_extreme() -> None:
    gaps = [0.3, -0.1, 0.45, 0.2, 0.7, -0.25, 0.6, 0.15]
    ranks = [1 + sum(abs(other) < abs(gap) for other in gaps) for gap in gaps]
    sums = [
        abs(sum(sign * rank for sign, rank in zip(signs, ranks, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(gaps))
    ]
    observed = abs(sum(math.copysign(rank, gap) for gap, rank in zip(gaps, ranks, strict=True)))
    found = training.paired_test(np.array(gaps) + 5.0, [5.0] * len(gaps))
    assert found["p"] == pytest.approx(sum(s >= observed for s in sums) / len(sums), rel=1e-12)
    assert found["direction"] == 1
    mean = sum(gaps) / len(gaps)
    error = math.sqrt(sum((g - mean) ** 2 for g in gaps) / (len(gaps) - 1) / len(gaps))
    assert found["difference"] == pytest.approx(mean, rel=1e-9)
    assert found["high"] - found["difference"] == pytest.approx(2.364624 * error, rel=1e-6)


def test_ranks_that_contradict_the_mean_have_no_direction() -> None:
    found = training.paired_test([0.1, 0.2, 0.3, 0.4, 0.5, -9.0], [0.0] * 6)
    assert found["difference"] < 0
    assert found["direction"] == 0
    assert training.paired_test([1.0, 2.0], [1.0, 2.0]) == {
        "difference": 0.0,
        "low": 0.0,
        "high": 0.0,
        "p": 1.0,
        "direction": 0.0,
    }


def test_holm_rejects_one_after_the_other() -> None:
    rng = np.random.default_rng(14)
    for _ in range(50):
        p = (rng.random(7) ** 4).tolist()
        level = float(rng.uniform(0.01, 0.2))
        rejected, left = set(), sorted(range(7), key=lambda k: p[k])
        while left and p[left[0]] * len(left) < level:
            rejected.add(left.pop(0))
        assert {k for k, adjusted in enumerate(training.holm(p)) if adjusted < level} == rejected


def planted(gap: float, seed: int) -> dict:
    """Cells of four methods with the same noise on each seed and some of their own; `gap` is the first one's lead."""
    rng = np.random.default_rng(seed)
    cells = {}
    for k in range(12):
        shared = rng.standard_normal(48)
        cells["items", 4 + k, ""] = {
            name: {"best": {"mean_share": (lead + shared + 0.3 * rng.standard_normal(48)).tolist()}}
            for name, lead in (("ctpo", gap), ("grpo", 0.0), ("gspo", 0.0), ("sequence", 0.0))
        }
    return cells


def test_a_planted_difference_is_found_and_no_other() -> None:
    for row in training.compare(planted(0.5, seed=15)):
        assert row["verdict"] == (row["first"] == "ctpo"), row
    rows = training.compare(planted(-0.5, seed=16))
    for row in rows:
        assert row["verdict"] == -(row["first"] == "ctpo"), row
    cell = ("items", 4, "")
    verdicts = training._verdicts(rows)
    assert (verdicts[cell, "ctpo", "grpo"], verdicts[cell, "grpo", "ctpo"], verdicts[cell, "gspo", "grpo"]) == (
        -1,
        1,
        0,
    )


def test_without_a_difference_none_is_found() -> None:
    rows = training.compare(planted(0.0, seed=17))
    assert len(rows) == 12 * 6
    assert not any(row["verdict"] for row in rows)
    # Unadjusted, some pair would have been declared different.
    assert min(row["p"] for row in rows) < training.LEVEL


def test_the_expected_cosine_is_found_through_noise() -> None:
    rng = np.random.default_rng(18)
    truth, mean = np.array([1.0, 0.0, 0.0, 0.0]), np.array([0.6, 0.8, 0.0, 0.0])
    found, error = training.expected_cosine(mean + 3 * rng.standard_normal((4000, 4)), truth)
    assert error is not None
    assert 0.01 < error < 0.15
    assert abs(found - 0.6) < 4 * error
    # Of the mean alone, the noise would be taken for another direction.
    assert training.expected_cosine(3 * rng.standard_normal((64, 4)), truth)[0] is None or error


def test_a_biased_method_shows_in_the_cosine() -> None:
    found = training.compare_gradients(problem="items", batches=256, seed=1)
    at = int(np.abs(np.log(found["spread"])).argmin())
    assert 0.4 < found["spread"][at] < 2.5
    assert found["spread"] == sorted(found["spread"])

    def distance(method: str) -> float:
        """Of the expected cosine from 1, in standard errors."""
        values = found["methods"][method]
        return (1 - values["expected"][at]) / values["error"][at]

    # On this problem the future half of the ratio does not matter: the cumulative ratio is right, too.
    for method in ("cumulative", "dr_learned", "dr_behavior"):
        assert abs(distance(method)) < 4, method
    for method in ("grpo", "ctpo", "ctpo_mean", "gspo"):
        assert distance(method) > 10, method
    # A critic that has learned quiets the estimate; one that has not would make it worse than no critic at all.
    one = {method: values["one"][at] for method, values in found["methods"].items()}
    assert one["dr_behavior"] > one["dr_learned"] > 1.5 * one["cumulative"] > one["sequence"] > 0
    near = {method: values["expected"][0] for method, values in found["methods"].items()}
    assert all(value > 0.9 for method, value in near.items() if METHODS[method].estimator.clip is None)


# --- the study ------------------------------------------------------------------------------------------------------


def test_every_task_is_ready_for_json_and_named_once() -> None:
    for quick in (True, False):
        tasks = training.tasks(3, quick)
        assert json.loads(json.dumps(tasks)) == tasks
        assert all(task["seed"] == 3 for task in tasks.values())
    assert {(t["problem"], t["staleness"]) for t in tasks.values() if "staleness" in t} == {
        (name, k) for name in learning.PROBLEMS for k in training.STALENESS
    }
    for name, k in itertools.product(learning.PROBLEMS, (4, 16, 64)):
        assert {f"{name} {k} {method}" for method in METHODS} <= set(tasks)


def test_streams_are_the_same_for_every_method_and_no_phase_shares_one() -> None:
    def first(*arguments: object) -> list[float]:
        return [stream.random() for stream in training.streams(*arguments)]  # type: ignore[arg-type]

    tuning, evaluation = first(0, "tuning", 8), first(0, "evaluation", 8)
    assert tuning == first(0, "tuning", 8) == first(0, "tuning", 9)[:8]
    assert len({*tuning, *evaluation, *first(0, "gradients", 8), *first(1, "tuning", 8)}) == 32


def test_tuning_picks_the_best_rate_and_width_on_the_tuning_seeds() -> None:
    settings = {"updates": 16, "checkpoints": 4}
    found = training.tune_and_train(
        problem="items", method="grpo", staleness=8, seed=0, seeds=3, tuning_seeds=2, **settings
    )
    task, scores = learning.build("items"), {}
    for width in training.WIDTHS:
        for factor in training.RATES:
            rate = factor * task.rate
            history = train(
                task,
                METHODS["grpo"],
                Schedule(staleness=8, **settings),
                training.streams(0, "tuning", 2),
                np.full(2, rate),
                width=width,
            )
            scores[width, rate] = float(history.share.mean())
    best = max(scores, key=lambda key: scores[key])
    assert (found["best"]["width"], found["best"]["rate"]) == pytest.approx(best, rel=1e-12)
    history = train(
        task,
        METHODS["grpo"],
        Schedule(staleness=8, **settings),
        training.streams(0, "evaluation", 3),
        np.full(3, best[1]),
        width=best[0],
    )
    assert found["best"]["mean_share"] == pytest.approx(history.share.mean(axis=0), abs=1e-6)
    assert found["best"]["final_share"] == pytest.approx(history.share[-1], abs=1e-6)
    if best[0] != 1:
        assert found["published"]["rate"] == max((k for k in scores if k[0] == 1), key=lambda k: scores[k])[1]


def few(seed: int, quick: bool) -> dict:
    """A study of one problem that takes seconds."""
    chosen = {}
    for key, task in training.tasks(seed, False).items():
        if key.startswith(("items 1 ", "items 16 ")) and "variation" not in task:
            chosen[key] = {**task, "updates": 16, "seeds": 2, "tuning_seeds": 1, "checkpoints": 8}
    return chosen | {"items gradients": {"problem": "items", "batches": 32, "seed": seed}}


def fails_at_ctpo(**task: object) -> dict:
    if task.get("method") == "ctpo":
        raise ZeroDivisionError("planted")
    return training.one(**task)


def never(**task: object) -> dict:
    raise AssertionError(f"{task} was done already")


def test_an_interrupted_study_goes_on_to_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "code_fingerprint", lambda: "fixed")
    study = replace(training.STUDY, tasks=few)
    with pytest.raises(ZeroDivisionError, match="planted"):
        sweep.run(replace(study, one=fails_at_ctpo), tmp_path, backend="sequential")
    kept = [json.loads(line) for line in (tmp_path / "training.partial.jsonl").read_text().splitlines()][1:]
    assert 3 < len(kept) < len(few(0, False))
    done = {line["key"] for line in kept}

    def only_missing(**task: object) -> dict:
        key = f"{task['problem']} {task.get('staleness')} {task.get('method')}"
        return never(**task) if key in done else training.one(**task)

    resumed = sweep.run(replace(study, one=only_missing), tmp_path, backend="sequential")
    whole = sweep.run(study, tmp_path / "whole", backend="sequential")
    for key in ("cells", "curves", "tests", "gradients", "tables", "problems"):
        assert json.dumps(resumed[key]) == json.dumps(whole[key])
    assert not (tmp_path / "training.partial.jsonl").exists()
    titles = [table["title"] for table in whole["tables"]]
    assert "Which method learns most" in titles
    assert "Windows as published, and as chosen" in titles
    for table in whole["tables"]:
        assert table["rows"]
        assert table["note"]
    assert {row["method"] for row in whole["cells"] if row["staleness"] == 16} == {*METHODS, training.REFERENCE}
