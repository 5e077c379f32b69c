"""Toy language models against strings written out one by one, equivalent trees, and autograd."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simulations import toy_lm
from simulations.exact import (
    enumerate_trajectories,
    gradient_moments,
    objective,
    policy_gradient,
    ratio_moments,
    rational_weights,
)
from simulations.mdp import (
    TOOL,
    Parameters,
    World,
    as_numbers,
    chain,
    policy_table,
    step_policy,
    temper_policy,
    tree,
    truncate_policy,
    zeros,
)
from simulations.monte_carlo import Sampler
from simulations.toy_lm import (
    ALPHABET,
    TEXT,
    TinyTransformer,
    encode,
    fit_ngram,
    fitted_ngram,
    load_transformer_world,
    ngram,
    ngram_process,
    policy_gradient_steps,
    record_transformer_world,
    sampler_policy,
    transformer_world,
    word_memory,
)

ONE = Fraction(1)

# --- the definition of an n-gram model, in plain loops ------------------------------------------------------


@dataclass
class Model:
    """An n-gram model with its gaps, memory and rewards, by its definition."""

    order: int
    n_tokens: int
    horizon: int
    eos: int | None = None
    call: int | None = None
    tool: list[list[Fraction]] | None = None
    memory: list[list[int]] | None = None

    def behavior(self, context):
        return self.rule(context, 0)

    def target(self, context):
        return self.rule(context, 1)

    def rule(self, context, who):
        """Whole weights that look random and depend on the context alone."""
        rng = np.random.default_rng([who, len(context), *context])
        weights = [int(w) for w in rng.integers(1, 6, size=self.n_tokens)]
        return [Fraction(w, sum(weights)) for w in weights]

    def reward(self, context, token):
        return Fraction(3 * sum(context) + 2 * token - len(context), 2)

    def outcome(self, context, memory):
        return Fraction(1 + 2 * memory + sum((i + 1) * token for i, token in enumerate(context)), 3)

    def read(self, prefix):
        """Context, tokens that the tool has still to write, memory, and whether the string has ended."""
        left, memory, ended = 0, 0, False
        for token in prefix:
            if left > 0:
                left -= 1
            elif token == self.call:
                left = len(self.tool)
            if self.memory is not None:
                memory = self.memory[memory][token]
            ended = token == self.eos
        context = prefix[len(prefix) - min(self.order - 1, len(prefix)) :]
        return context, left, memory, ended

    def strings(self, prefix=()) -> Iterator[tuple[int, ...]]:
        """Every string that can be written and is over, by the end-of-sequence token or by its length."""
        _, left, _, ended = self.read(prefix)
        if ended or len(prefix) == self.horizon:
            yield prefix
            return
        for token in range(self.n_tokens):
            if not left or self.tool[len(self.tool) - left][token] > 0:
                yield from self.strings((*prefix, token))

    def written(self, string):
        """For each token: context, whether the policy wrote it, its probability under b and under pi."""
        for place, token in enumerate(string):
            context, left, _, _ = self.read(string[:place])
            if left:
                p = self.tool[len(self.tool) - left][token]
                yield context, token, False, p, p
            else:
                yield context, token, True, self.behavior(context)[token], self.target(context)[token]

    def process(self):
        return ngram_process(**self.settings(), reward=self.reward, outcome=self.outcome, exact=True)

    def settings(self):
        names = ("order", "n_tokens", "horizon", "eos", "call", "tool", "memory")
        return {name: getattr(self, name) for name in names}

    def world(self, parameters: Parameters = "prefix"):
        process = self.process()
        behavior, target = process.rows(self.behavior), process.rows(self.target)
        return process, process.world(behavior, target, parameters)

    def tree_world(self, parameters: Parameters, offset: dict[Any, int], dimension: int):
        """The same model as a tree of histories; with "prefix" its scores lead to the context's block."""
        mdp = tree(
            self.n_tokens,
            self.horizon,
            eos=self.eos,
            tool_after=lambda prefix: self._tool_row(prefix),
            reward=lambda prefix, token: self.reward(self.read(prefix)[0], token),
            outcome=lambda string: self.outcome(self.read(string)[0], self.read(string)[2]),
        )
        behavior = policy_table(mdp, lambda prefix: self.behavior(self.read(prefix)[0]))
        target = policy_table(mdp, lambda prefix: self.target(self.read(prefix)[0]))
        if parameters != "prefix":
            return World(mdp, behavior, target, parameters)
        scores = zeros((mdp.n_states, self.n_tokens, dimension), True)
        for s, label in enumerate(mdp.labels):
            if mdp.policy_states[s]:
                prefix = tuple(int(c) for c in label.strip("(),").split(",") if c.strip())
                first = offset.get(self.read(prefix)[0])
                if first is None:
                    continue  # beyond a token that the tool never writes
                for a, b in product(range(self.n_tokens), repeat=2):
                    scores[s, a, first + b] = (a == b) - target[s, b]
        return World(mdp, behavior, target, scores=scores)

    def _tool_row(self, prefix):
        _, left, _, ended = self.read(prefix)
        return self.tool[len(self.tool) - left] if left and not ended else None


HALF = Fraction(1, 2)
MODELS = {
    "unigram": Model(1, 2, 4),
    "unigram eos": Model(1, 3, 3, eos=2),
    "bigram": Model(2, 3, 3),
    "bigram eos": Model(2, 2, 5, eos=0),
    "bigram tool": Model(2, 3, 4, eos=0, call=2, tool=[[Fraction(0), Fraction(1, 3), Fraction(2, 3)]]),
    "trigram": Model(3, 2, 5),
    "trigram long gap": Model(3, 2, 5, call=1, tool=[[HALF, HALF], [ONE, 0 * ONE]]),
    "bigram parity": Model(2, 2, 4, memory=[[0, 1], [1, 0]]),
    "all at once": Model(
        3,
        3,
        4,
        eos=1,
        call=2,
        tool=[[HALF, 0 * ONE, HALF], [Fraction(1, 4), 0 * ONE, Fraction(3, 4)]],
        memory=[[0, 1, 0], [1, 1, 2], [2, 0, 2]],
    ),
    "order above the horizon": Model(6, 2, 3, memory=[[1, 0], [0, 1]]),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request: pytest.FixtureRequest) -> Model:
    return request.param


def block_offsets(model, process):
    """Where each context's block of logits begins in the parameter vector, and the vector's length."""
    v = model.n_tokens
    if model.memory is not None and np.count_nonzero(process.context >= 0) > len(process.contexts):
        return {c: v * i for i, c in enumerate(process.contexts)}, v * len(process.contexts)
    labels = process.mdp.labels
    state = {c: next(s for s, i in enumerate(process.context) if i == k) for k, c in enumerate(process.contexts)}
    return {c: v * s for c, s in state.items()}, v * len(labels)


# --- n-gram worlds ------------------------------------------------------------------------------------------


def test_ngram_is_its_definition(model):
    """Objective, policy gradient and moments of rho_t, string by string, in fractions."""
    process, world = model.world()
    offset, dimension = block_offsets(model, process)
    total, gain = 0 * ONE, 0 * ONE
    gradient = [0 * ONE] * dimension
    mean, square = [0 * ONE] * (model.horizon + 1), [0 * ONE] * (model.horizon + 1)
    for string in model.strings():
        b = pi = rho = ONE
        returns, scores, ratios = 0 * ONE, [0 * ONE] * dimension, [ONE]
        for context, token, by_policy, p_b, p_pi in model.written(string):
            b, pi = b * p_b, pi * p_pi
            returns += model.reward(context, token)
            if by_policy:
                rho *= p_pi / p_b
                for other, p in enumerate(model.target(context)):
                    scores[offset[context] + other] += (other == token) - p
            ratios.append(rho)
        context, _, memory, _ = model.read(string)
        returns += model.outcome(context, memory)
        total += b
        gain += pi * returns
        gradient = [g + pi * returns * s for g, s in zip(gradient, scores, strict=True)]
        for t in range(model.horizon + 1):
            stopped = ratios[min(t, len(ratios) - 1)]
            mean[t] += b * stopped
            square[t] += b * stopped**2
    assert total == 1
    assert objective(world) == gain
    assert list(policy_gradient(world)) == gradient
    found = ratio_moments(world)
    assert list(found.mean) == mean == [1] * (model.horizon + 1)
    assert list(found.second_moment) == square


@pytest.mark.parametrize("parameters", ["prefix", "shared", "position"])
def test_dynamic_programming_on_contexts_equals_the_tree_of_histories(model, parameters):
    process, world = model.world(parameters)
    offset, dimension = block_offsets(model, process)
    histories = model.tree_world(parameters, offset, dimension)
    assert world.exact
    assert world.dimension == histories.dimension
    assert objective(world) == objective(histories)
    gradient = policy_gradient(world)
    assert np.all(gradient == policy_gradient(histories))
    here, there = ratio_moments(world), ratio_moments(histories)
    for name in ("mean", "second_moment", "chi2_marginal", "chi2_tilted"):
        assert np.all(getattr(here, name) == getattr(there, name)), name
    for level, window in (("token", None), ("cumulative", None), ("window", 2), ("sequence", None)):
        one = gradient_moments(world, level, window=window)
        two = gradient_moments(histories, level, window=window)
        assert np.all(one.mean == two.mean)
        assert one.total_variance == two.total_variance
        if level in ("cumulative", "sequence"):
            assert np.all(one.mean == gradient)


LEVELS = [("none", None), ("token", None), ("cumulative", None), ("sequence", None), ("lookahead", 1)]


@pytest.mark.parametrize("outcome", [False, True])
def test_dynamic_programming_equals_enumeration(model, outcome):
    world = model.world()[1]
    paths = enumerate_trajectories(world)
    assert paths.behavior_probability.sum() == paths.target_probability.sum() == 1
    assert len(paths.states) == len(list(model.strings()))
    kind = "one" if outcome else "A_target"
    advantage = paths.advantage(kind)
    if outcome:
        advantage = advantage * world.mdp.outcome[paths.final_state][:, None]
    for level, window in LEVELS:
        full = level == "cumulative" and world.dimension <= 20
        summed = paths.summed_scores(rational_weights(paths, level, window) * advantage)
        listed = paths.moments(summed, covariance=full)
        found = gradient_moments(world, level, kind, window=window, outcome=outcome, covariance=full)
        assert np.all(found.mean == listed.mean), level
        assert found.total_variance == listed.total_variance, level
        if full:
            assert np.all(found.covariance == listed.covariance)


@pytest.mark.parametrize("name", ["bigram tool", "trigram long gap", "all at once"])
def test_tool_gaps_are_masked(name):
    model = MODELS[name]
    process, world = model.world()
    gap = world.mdp.kind == TOOL
    assert np.all(process.context[gap] == -1)
    assert np.all(world.ratio[gap] == 1)
    assert np.all(world.local_scores[gap] == 0)
    paths = enumerate_trajectories(world)
    for states, tokens, mask in zip(paths.states, paths.actions, paths.mask, strict=True):
        for h in range(model.horizon):
            _, left, _, ended = model.read(tuple(tokens[:h]))
            if ended:
                break
            assert mask[h] == (left == 0) == world.mdp.policy_states[states[h]]


def test_a_gap_taken_for_tokens_of_the_policy_is_noticed():
    """Negative control: without its mask a gap changes the ratios and the gradient."""
    model = MODELS["trigram long gap"]
    world = model.world()[1]
    ungated = replace(model, call=None, tool=None).world()[1]
    assert ratio_moments(world).second_moment[-1] != ratio_moments(ungated).second_moment[-1]
    assert objective(world) != objective(ungated)


@pytest.mark.parametrize("name", ["bigram", "trigram", "all at once"])
def test_a_shorter_context_is_noticed(name):
    """Negative control: one token less of context is another model."""
    model = MODELS[name]
    shorter = replace(model, order=model.order - 1)
    assert objective(model.world()[1]) != objective(shorter.world()[1])


def test_states_with_different_memories_share_their_context():
    model = MODELS["bigram parity"]
    process, world = model.world()
    assert len(process.contexts) == 3
    assert world.mdp.policy_states.sum() > 3
    assert world.dimension == 3 * 2
    assert len(set(world.mdp.labels)) == world.mdp.n_states
    # Negative control: a block for each state, memory included, is another gradient.
    assert world.with_parameters("prefix").dimension == world.mdp.n_states * 2


def test_states_are_only_those_that_occur():
    silent = ngram_process(order=3, n_tokens=4, horizon=9, eos=0, call=3, tool=[[0, 1, 0, 0], [0, 0, 1, 0]])
    contexts = set(silent.contexts)
    assert (3, 1) not in contexts  # the policy is never asked inside a gap
    assert (1, 2) in contexts
    assert not any(0 in context for context in contexts)
    capped = ngram_process(order=30, n_tokens=2, horizon=3)
    assert capped.mdp.n_states == 1 + 2 + 4 + 8


def test_float_worlds_are_the_exact_ones_rounded():
    model = MODELS["all at once"]
    exact = model.world()[1].as_float()
    process = ngram_process(
        **model.settings(),
        reward=lambda c, a: float(model.reward(c, a)),
        outcome=lambda c, m: float(model.outcome(c, m)),
    )
    world = process.world(process.rows(model.behavior), process.rows(model.target))
    assert not world.exact
    np.testing.assert_allclose(policy_gradient(world), policy_gradient(exact), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(ratio_moments(world).second_moment, ratio_moments(exact).second_moment, rtol=1e-13)


def test_support_is_checked_and_can_be_waived():
    process = ngram_process(order=2, n_tokens=2, horizon=3)
    behavior = process.rows(lambda context: [0, 1] if context == (1,) else [0.5, 0.5])
    target = process.rows(lambda _context: [0.5, 0.5])
    with pytest.raises(ValueError, match=r"target: puts mass .* after prefix \(1,\) \(state '\(1,\)'\) token 0"):
        process.world(behavior, target)
    broken = process.world(behavior, target, require_support=False)
    np.testing.assert_allclose(ratio_moments(broken).mean, [1, 1, 0.75, 0.5])


# --- random n-gram models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("tool_tokens", [0, 2])
@pytest.mark.parametrize("rewards", ["dense", "outcome", "both"])
def test_random_models_are_what_they_were_asked_to_be(exact, eos, tool_tokens, rewards):
    options: dict[str, Any] = {
        "order": 2,
        "n_tokens": 3,
        "horizon": 4,
        "eos": eos,
        "tool_tokens": tool_tokens,
    }
    world = ngram(np.random.default_rng(5), rewards=rewards, exact=exact, **options)
    again = ngram(np.random.default_rng(5), rewards=rewards, exact=exact, **options)
    other = ngram(np.random.default_rng(6), rewards=rewards, exact=exact, **options)
    assert world.exact == exact
    assert np.all(world.target == again.target)
    assert world.target.shape != other.target.shape or np.any(world.target != other.target)
    assert np.any(world.mdp.reward != 0) == (rewards != "outcome")
    assert np.any(world.mdp.outcome != 0) == (rewards != "dense")
    assert np.any(world.mdp.kind == TOOL) == bool(tool_tokens)
    assert any(label.endswith("end") for label in world.mdp.labels) == eos
    gap = abs(gradient_moments(world, "cumulative").mean - policy_gradient(world)).max()
    assert gap == 0 if exact else gap < 1e-13


def test_the_random_step_stays_in_the_family_and_scales():
    for parameters in ("prefix", "shared", "position"):
        worlds = [ngram(np.random.default_rng(2), order=3, parameters=parameters, step=size) for size in (0.2, 0.4)]
        moves = []
        for world in worlds:
            written = world.mdp.policy_states
            log_ratio = np.log(world.target[written] / world.behavior[written])
            moves.append(log_ratio - log_ratio.mean(axis=1, keepdims=True))
        np.testing.assert_allclose(moves[1], 2 * moves[0], rtol=1e-9, atol=1e-14)
        if parameters == "prefix":
            # Centering takes one of three dimensions of each context from a step of this norm.
            assert 0.5 * 0.2 < np.linalg.norm(moves[0]) < 0.2
            assert np.ptp(moves[0], axis=0).min() > 0.01
        else:
            assert 0.3 * 0.2 < np.linalg.norm(moves[0][0]) < 0.2
            np.testing.assert_allclose(np.ptp(moves[0], axis=0), 0, atol=1e-14)


def test_exact_steps_multiply_by_whole_numbers_within_the_family():
    for parameters in ("prefix", "shared"):
        world = ngram(np.random.default_rng(3), order=2, n_tokens=3, parameters=parameters, exact=True)
        written = world.mdp.policy_states
        ratio = world.target[written] / world.behavior[written]
        directions = {tuple(row / row[0]) for row in ratio}
        assert all(r.numerator <= 3 and r.denominator <= 3 for row in directions for r in row)
        assert (len(directions) == 1) == (parameters == "shared")


def test_temperature_and_given_logits():
    for exact in (False, True):
        world = ngram(np.random.default_rng(4), temperature=HALF, exact=exact)
        written = world.mdp.policy_states
        square = world.behavior[written] ** 2
        gap = abs(world.target[written] - square / square.sum(axis=1, keepdims=True)).max()
        assert gap == 0 if exact else gap < 1e-15
    world = ngram(np.random.default_rng(4), logits=lambda context: [sum(context), 0.0, 1.0])
    for s, context in enumerate([(), (0,), (1,), (2,)]):
        assert world.mdp.labels[s] == str(context)
        weights = [math.exp(sum(context)), 1.0, math.e]
        np.testing.assert_allclose(world.target[s], [w / sum(weights) for w in weights], rtol=1e-14)


# --- fitted models ------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=4),
    st.integers(1, 4),
    st.lists(st.integers(0, 2), max_size=6),
)
def test_fitting_counts_with_add_one_smoothing(sequences, order, prefix):
    rule = fit_ngram(sequences, order=order, n_tokens=3)
    context = prefix[max(0, len(prefix) - order + 1) :]
    counts = [0, 0, 0]
    for sequence in sequences:
        for place, token in enumerate(sequence):
            before = sequence[:place]
            if before[max(0, place - order + 1) :] == context:
                counts[token] += 1
    assert rule(tuple(prefix)) == [Fraction(c + 1, sum(counts) + 3) for c in counts]
    assert sum(rule(tuple(prefix))) == 1


def test_the_alphabet_is_what_the_text_needs():
    assert set(TEXT) == set(ALPHABET)
    assert "".join(ALPHABET[token] for token in encode(TEXT)) == TEXT
    with pytest.raises(ValueError, match=r"text: may only use .* got \['q', 'z'\]"):
        encode("az q")


@pytest.mark.parametrize("sentences", [False, True])
def test_the_fitted_model_has_read_the_text(sentences):
    world = fitted_ngram(np.random.default_rng(0), order=2, horizon=6, sentences=sentences)
    after_h = world.behavior[world.mdp.labels.index(str((ALPHABET.index("h"),)))]
    following = [TEXT[i + 1] for i, c in enumerate(TEXT) if c == "h"]
    expected = [(following.count(c) + 1) / (len(following) + 8) for c in ALPHABET]
    np.testing.assert_allclose(after_h, expected, rtol=1e-14)
    starts = [s[0] for s in TEXT.split(". ")] if sentences else [TEXT[0]]
    expected = [(starts.count(c) + 1) / (len(starts) + 8) for c in ALPHABET]
    np.testing.assert_allclose(world.behavior[0], expected, rtol=1e-14)
    assert any(label.endswith("end") for label in world.mdp.labels) == sentences


@pytest.mark.parametrize("sentences", [False, True])
def test_the_outcome_is_whether_the_word_was_written(sentences):
    world = fitted_ngram(np.random.default_rng(1), order=2, horizon=4, sentences=sentences, word="ete", rewards="both")
    paths = enumerate_trajectories(world)
    for tokens, live, last, returns in zip(paths.actions, paths.live, paths.final_state, paths.returns, strict=True):
        string = "".join(ALPHABET[token] for token in tokens[live])
        assert world.mdp.outcome[last] == ("ete" in string)
        assert returns == ("ete" in string) + string.count("a") + string.count("e")


def test_word_memory_finds_words_and_only_them():
    for word in ((0,), (0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1, 1), (0, 1, 0, 1, 1)):
        table = word_memory(word, 2)
        assert table.shape == (len(word) + 1, 2)
        for string in product(range(2), repeat=7):
            memory = 0
            for token in string:
                memory = table[memory, token]
            there = any(string[i : i + len(word)] == word for i in range(len(string)))
            assert (memory == len(word)) == there


def test_dynamic_programming_at_a_long_horizon():
    world = fitted_ngram(np.random.default_rng(0), order=2, horizon=2000, step=0.6)
    moments = ratio_moments(world)
    np.testing.assert_allclose(moments.mean, 1, rtol=1e-10)
    assert moments.var_log[-1] > 1.0
    assert moments.mean_log[-1] / moments.var_log[-1] == pytest.approx(-0.5, abs=0.05)
    gradient = policy_gradient(world)
    for level, small in (("cumulative", True), ("none", False), ("token", False)):
        gap = np.linalg.norm(gradient_moments(world, level).mean - gradient) / np.linalg.norm(gradient)
        assert (gap < 1e-9) == small, (level, gap)


# --- the tiny transformer -----------------------------------------------------------------------------------


def plain_transformer(model: TinyTransformer, prefix: tuple[int, ...]) -> list[float]:
    """Next-token probabilities by loops over lists, from the description of the network."""
    weights, first = {}, 0
    for name, (rows, columns) in model.shapes:
        flat = [float(x) for x in model.parameters[first : first + rows * columns]]
        weights[name] = [flat[r * columns : (r + 1) * columns] for r in range(rows)]
        first += rows * columns
    assert first == len(model.parameters)

    def norm(x, name):
        mean = sum(x) / len(x)
        variance = sum((v - mean) ** 2 for v in x) / len(x)
        gain, offset = weights[name]
        return [(v - mean) / math.sqrt(variance + 1e-5) * g + o for v, g, o in zip(x, gain, offset, strict=True)]

    def times(x, name):
        return [sum(v * row[j] for v, row in zip(x, weights[name], strict=True)) for j in range(len(weights[name][0]))]

    def soft(x):
        powers = [math.exp(v - max(x)) for v in x]
        return [p / sum(powers) for p in powers]

    read = [model.n_tokens, *prefix]
    stream = [
        [t + p for t, p in zip(weights["token embedding"][token], weights["position embedding"][i], strict=True)]
        for i, token in enumerate(read)
    ]
    size = model.width // model.n_heads
    for layer in range(model.n_layers):
        made = [times(norm(x, f"{layer} attention norm"), f"{layer} query key value") for x in stream]
        mixed = [[0.0] * model.width for _ in stream]
        for head, i in product(range(model.n_heads), range(len(stream))):
            parts = [slice(k * model.width + head * size, k * model.width + (head + 1) * size) for k in range(3)]
            seen = [
                sum(q * k for q, k in zip(made[i][parts[0]], made[j][parts[1]], strict=True)) / math.sqrt(size)
                for j in range(i + 1)
            ]
            for share, j in zip(soft(seen), range(i + 1), strict=True):
                for k in range(size):
                    mixed[i][head * size + k] += share * made[j][parts[2]][k]
        for i, x in enumerate(stream):
            x = [a + b for a, b in zip(x, times(mixed[i], f"{layer} attention out"), strict=True)]
            lifted = times(norm(x, f"{layer} perceptron norm"), f"{layer} up")
            lifted = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in lifted]
            stream[i] = [a + b for a, b in zip(x, times(lifted, f"{layer} down"), strict=True)]
    return soft(times(norm(stream[-1], "last norm"), "head"))


NETWORKS = {
    "recorded size": TinyTransformer.random(1),
    "two layers": TinyTransformer.random(2, n_tokens=2, max_length=5, n_layers=2, width=6, n_heads=3, hidden=5),
    "one head": TinyTransformer.random(3, n_tokens=4, max_length=3, width=3, n_heads=1, hidden=2),
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def network(request: pytest.FixtureRequest) -> TinyTransformer:
    # Norms away from the identity, so that a forgotten gain or offset shows.
    return request.param.perturbed(np.random.default_rng(0), 0.1)


def all_prefixes(network: TinyTransformer) -> list[tuple[int, ...]]:
    return [p for n in range(network.max_length) for p in product(range(network.n_tokens), repeat=n)]


def test_the_transformer_is_the_one_described(network):
    prefixes = all_prefixes(network)
    found = network.next_token_probabilities(prefixes)
    assert found.shape == (len(prefixes), network.n_tokens)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-13)
    for prefix, row in zip(prefixes, found, strict=True):
        np.testing.assert_allclose(row, plain_transformer(network, prefix), rtol=1e-11, atol=1e-14)


def test_the_transformer_is_causal(network):
    length = network.max_length - 1
    strings = torch.tensor(list(product(range(network.n_tokens), repeat=length)))
    along = network.log_probabilities(torch.tensor(network.parameters), strings)
    assert along.shape == (len(strings), length + 1, network.n_tokens)
    assert along.dtype == torch.float64
    for place in range(length):
        changed = strings.clone()
        changed[:, place] = (changed[:, place] + 1) % network.n_tokens
        moved = (network.log_probabilities(torch.tensor(network.parameters), changed) - along).abs().amax(dim=2)
        assert moved[:, : place + 1].max() < 1e-14  # the past, and the distribution of this token itself
        assert moved[:, place + 1 :].min(dim=0).values.max() > 1e-4  # negative control: it matters afterwards


def test_networks_come_from_their_seed_alone():
    assert np.all(TinyTransformer.random(5).parameters == TinyTransformer.random(5).parameters)
    assert np.any(TinyTransformer.random(5).parameters != TinyTransformer.random(6).parameters)
    still = TinyTransformer.random(5).perturbed(np.random.default_rng(0), 0.0)
    assert np.all(still.parameters == TinyTransformer.random(5).parameters)


def test_scores_are_the_gradient_of_each_log_probability(network):
    prefixes = all_prefixes(network)[:: max(1, len(all_prefixes(network)) // 6)]
    scores = network.scores(prefixes)
    assert scores.shape == (len(prefixes), network.n_tokens, len(network.parameters))
    assert scores.dtype == np.float64
    for prefix, rows in zip(prefixes, scores, strict=True):
        for token in range(network.n_tokens):
            parameters = torch.tensor(network.parameters, requires_grad=True)
            string = torch.tensor([prefix], dtype=torch.int64)
            network.log_probabilities(parameters, string)[0, len(prefix), token].backward()
            assert parameters.grad is not None
            np.testing.assert_allclose(rows[token], parameters.grad.numpy(), rtol=1e-10, atol=1e-12)
    probabilities = network.next_token_probabilities(prefixes)
    np.testing.assert_allclose((probabilities[:, :, None] * scores).sum(axis=1), 0, atol=1e-12)


def environment(network: TinyTransformer, kind: str) -> dict[str, Any]:
    """Arguments of `tree`: plain, or with an end of sequence and a tool that answers token 1."""
    v = network.n_tokens
    options: dict[str, Any] = {
        "reward": lambda prefix, token: 0.3 * token - 0.1 * len(prefix),
        "outcome": lambda string: math.sin(sum((i + 1) * token for i, token in enumerate(string))),
    }
    if kind == "tool and eos":
        answer = [0.0, *[1.0 / (v - 1)] * (v - 1)]
        options |= {"eos": 0, "tool_after": lambda prefix: answer if prefix and prefix[-1] == 1 else None}
    return options


def summed_objective(
    network: TinyTransformer, parameters: torch.Tensor, horizon: int, options: dict[str, Any]
) -> torch.Tensor:
    """J by walking over every string, differentiable."""
    v, eos, tool_after = network.n_tokens, options.get("eos"), options.get("tool_after")
    total = torch.zeros((), dtype=torch.float64)
    frontier = [((), torch.ones((), dtype=torch.float64), 0.0)]
    while frontier:
        prefix, probability, earned = frontier.pop()
        if len(prefix) == horizon or (prefix and prefix[-1] == eos):
            total = total + probability * (earned + options["outcome"](prefix))
            continue
        answer = tool_after(prefix) if tool_after else None
        if answer is None:
            string = torch.tensor([prefix], dtype=torch.int64)
            row = network.log_probabilities(parameters, string)[0, -1].exp()
        else:
            row = torch.tensor(answer, dtype=torch.float64)
        for token in range(v):
            gained = earned + options["reward"](prefix, token)
            frontier.append(((*prefix, token), probability * row[token], gained))
    return total


@pytest.mark.parametrize("kind", ["plain", "tool and eos"])
def test_the_enumerated_gradient_is_autograd_of_the_exact_objective(network, kind):
    options = environment(network, kind)
    horizon = network.max_length
    target = network.perturbed(np.random.default_rng(1), 0.1)
    world = transformer_world(network, target, tree(network.n_tokens, horizon, exact=False, **options))
    parameters = torch.tensor(target.parameters, requires_grad=True)
    value = summed_objective(target, parameters, horizon, options)
    value.backward()
    assert parameters.grad is not None
    expected = parameters.grad.numpy()
    assert float(objective(world)) == pytest.approx(float(value.detach()), abs=1e-12)
    np.testing.assert_allclose(policy_gradient(world), expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(gradient_moments(world, "cumulative").mean, expected, rtol=0, atol=1e-10)
    gap = world.mdp.kind == TOOL
    assert gap.any() == (kind != "plain")
    assert np.all(world.local_scores[gap] == 0)
    # Negative controls: the behavior network's scores, and a tool taken for the policy, are not the gradient.
    wrong = replace(world, scores=transformer_world(network, network, world.mdp).scores)
    assert np.abs(policy_gradient(wrong) - expected).max() > 1e-3
    if kind != "plain":
        unmasked = {key: value for key, value in options.items() if key != "tool_after"}
        wrong = transformer_world(network, target, tree(network.n_tokens, horizon, exact=False, **unmasked))
        assert np.abs(policy_gradient(wrong) - expected).max() > 1e-3


def test_a_training_step_is_reinforce_on_its_own_sample():
    network = TinyTransformer.random(8)
    options = environment(network, "tool and eos")
    mdp = tree(3, 4, exact=False, **options)
    rate, batch = 0.05, 16
    trained = policy_gradient_steps(network, mdp, np.random.default_rng(3), steps=1, batch=batch, learning_rate=rate)
    sample = Sampler(transformer_world(network, network, mdp)).draw(batch, np.random.default_rng(3))
    parameters = torch.tensor(network.parameters, requires_grad=True)
    strings, returns = [], []
    for tokens in sample.actions:
        string: tuple[int, ...] = ()
        earned = 0.0
        while len(string) < 4 and (not string or string[-1] != 0):
            token = int(tokens[len(string)])
            earned += options["reward"](string, token)
            string = (*string, token)
        strings.append(string)
        returns.append(earned + options["outcome"](string))
    surrogate = torch.zeros((), dtype=torch.float64)
    for string, earned in zip(strings, returns, strict=True):
        for place, token in enumerate(string):
            if options["tool_after"](string[:place]) is None:
                before = torch.tensor([string[:place]], dtype=torch.int64)
                log_probability = network.log_probabilities(parameters, before)[0, -1, token]
                surrogate = surrogate + (earned - sum(returns) / batch) / batch * log_probability
    surrogate.backward()
    assert parameters.grad is not None
    expected = network.parameters + rate * parameters.grad.numpy()
    np.testing.assert_allclose(trained.parameters, expected, rtol=0, atol=1e-13)
    assert np.abs(trained.parameters - network.parameters).max() > 1e-3


def test_training_raises_the_objective():
    mdp = tree(3, 3, exact=False, outcome=lambda string: float(sum(string) == 3))
    network = TinyTransformer.random(9, max_length=3)
    trained = policy_gradient_steps(network, mdp, np.random.default_rng(0), steps=20, batch=256, learning_rate=0.5)
    world = transformer_world(network, trained, mdp)
    assert objective(world, "target") > objective(world, "behavior") + 0.2


def test_the_recorded_world_can_be_recorded_again(tmp_path):
    path = tmp_path / "again.npz"
    made = record_transformer_world(path)
    assert [p.name for p in tmp_path.iterdir()] == ["again.npz"]
    for world in (load_transformer_world(path), load_transformer_world()):
        for name in ("behavior", "target", "scores"):
            found = getattr(world, name)
            assert found.dtype == np.float64
            np.testing.assert_allclose(found, getattr(made, name), rtol=0, atol=1e-10)
        assert np.all(world.mdp.outcome == made.mdp.outcome)
    with np.load(toy_lm.RECORDED_TRANSFORMER, allow_pickle=False) as file:
        recipe = json.loads(str(file["made"]))
    assert {"seed", "steps", "pretraining_steps", "batch", "learning_rate", "torch", "numpy"} == set(recipe)
    assert toy_lm.RECORDED_TRANSFORMER.stat().st_size < 300_000


def test_the_recorded_target_has_moved_and_is_better():
    world = load_transformer_world()
    assert objective(world, "target") > objective(world, "behavior") + 0.01
    moments = ratio_moments(world)
    np.testing.assert_allclose(moments.mean, 1, rtol=1e-13)
    assert np.all(np.diff(moments.variance) > 0)
    gradient = policy_gradient(world)
    size = np.linalg.norm(gradient)
    assert np.linalg.norm(gradient_moments(world, "cumulative").mean - gradient) < 1e-12 * size
    assert np.linalg.norm(gradient_moments(world, "token").mean - gradient) > 0.01 * size


def test_loading_needs_no_torch():
    code = (
        "import sys\n"
        "class Without:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Without)\n"
        "from simulations.toy_lm import load_transformer_world, fitted_ngram\n"
        "print(load_transformer_world().dimension)"
    )
    checkout = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "196"


def test_an_interrupted_recording_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "world.npz"
    path.write_bytes(b"old")

    def interrupted(file, **_arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record_transformer_world(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# --- sampler mismatch ---------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 6), min_size=4, max_size=4), min_size=1, max_size=3), st.data())
def test_truncation_keeps_the_likeliest_tokens(weights, data):
    top_k = data.draw(st.none() | st.integers(1, 5))
    top_p = data.draw(st.integers(1, 12).map(lambda n: Fraction(n, 12)) | (st.none() if top_k else st.nothing()))
    table = as_numbers([[Fraction(w, sum(row) or 1) for w in row] for row in weights], True)
    found = truncate_policy(table, top_k=top_k, top_p=top_p)
    for row, cut in zip(table, found, strict=True):
        if sum(row) == 0:
            assert list(cut) == [0] * 4
            continue
        ranked = sorted(range(4), key=lambda a: (-row[a], a))[: top_k or 4]
        whole = sum(row[a] for a in ranked)
        kept: list[int] = []
        for a in ranked:
            if top_p is None or sum(row[b] for b in kept) < top_p * whole:
                kept.append(a)
        mass = sum(row[a] for a in kept)
        assert list(cut) == [row[a] / mass if a in kept else 0 for a in range(4)]
    floating = truncate_policy(table.astype(float), top_k=top_k, top_p=None if top_k else 1.0)
    np.testing.assert_allclose(floating, (truncate_policy(table, top_k=top_k) if top_k else table).astype(float))


def truncated(exact: bool) -> tuple[World, np.ndarray]:
    world = ngram(np.random.default_rng(11), order=2, n_tokens=3, horizon=4, rewards="both", exact=exact)
    return world, sampler_policy(world, top_p=Fraction(7, 10) if exact else 0.7)


def test_truncation_breaks_support_and_says_where():
    world, mu = truncated(exact=False)
    with pytest.raises(ValueError, match=r"target: puts mass .* after prefix \(\) .* behavior probability 0"):
        replace(world, behavior=mu)


def test_what_truncation_breaks():
    """E_mu rho_t is the target's mass on strings that mu can write, below 1; the policy gradient is biased."""
    world, mu = truncated(exact=True)
    sampled = replace(world, behavior=mu, require_support=False)
    inside = [ONE]
    mass = world.mdp.initial
    n = world.mdp.n_actions
    table = np.zeros((world.mdp.n_states, n), dtype=int)
    state, action, nxt, _ = world.mdp.edges
    table[state, action] = nxt
    for _ in range(4):
        moved = zeros(world.mdp.n_states, True)
        for s, a in product(range(world.mdp.n_states), range(n)):
            if mu[s, a] > 0:
                moved[table[s, a]] += mass[s] * world.target[s, a]
        mass = moved
        inside.append(mass.sum())
    assert list(ratio_moments(sampled).mean) == inside
    assert all(b < a for a, b in pairwise(inside))
    assert np.any(gradient_moments(sampled, "cumulative").mean != policy_gradient(sampled))
    # Negative control: the very same with all tokens kept breaks nothing.
    everything = replace(world, behavior=sampler_policy(world, top_p=1))
    assert np.all(gradient_moments(everything, "cumulative").mean == policy_gradient(world))


def test_noise_is_corrected_by_the_ratio_to_the_engine_and_not_by_the_ratio_to_the_behavior_policy():
    world = load_transformer_world()
    mu = sampler_policy(world, rng=np.random.default_rng(0), noise=0.1)
    written = world.mdp.policy_states
    np.testing.assert_allclose(mu[written].sum(axis=1), 1)
    log_change = np.log(mu[written] / world.behavior[written])
    assert 0.05 < (log_change - log_change.mean(axis=1, keepdims=True)).std() < 0.12
    sampled = replace(world, behavior=mu)
    gradient = policy_gradient(world)
    np.testing.assert_allclose(gradient_moments(sampled, "cumulative").mean, gradient, rtol=0, atol=1e-12)
    paths = enumerate_trajectories(sampled)
    believed = replace(paths, world=world)
    weights = np.cumprod(believed.ratio, axis=1) * believed.advantage("A_target")
    biased = paths.moments(believed.summed_scores(weights)).mean
    assert np.linalg.norm(biased - gradient) > 0.01 * np.linalg.norm(gradient)
    expected = (paths.behavior_probability * np.cumprod(believed.ratio, axis=1)[:, -1]).sum()
    assert abs(expected - 1) > 1e-4


def test_the_engine_may_do_both_and_leaves_other_states_alone():
    options: dict[str, Any] = {"order": 2, "n_tokens": 4, "tool_tokens": 1}
    world = ngram(np.random.default_rng(1), **options)
    mu = sampler_policy(world, rng=np.random.default_rng(2), noise=0.5, top_k=2)
    noisy = sampler_policy(world, rng=np.random.default_rng(2), noise=0.5)
    np.testing.assert_array_equal(mu, truncate_policy(noisy, top_k=2))
    gap = world.mdp.kind == TOOL
    np.testing.assert_array_equal(noisy[gap], world.behavior[gap])
    bare = tree(2, 2, exact=False)
    table = policy_table(bare, lambda _prefix: [0.25, 0.75])
    shaken = sampler_policy(World(bare, table, table), rng=np.random.default_rng(0), noise=0.1)
    assert np.all(shaken[~bare.policy_states] == 0)


# --- bad input ----------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
GOOD: dict[str, Any] = {"order": 2, "n_tokens": 3, "horizon": 3}
NETWORK = TinyTransformer.random(0)
PROCESS = ngram_process(order=1, n_tokens=2, horizon=2)
PAIR = np.array([[0.5, 0.5]])
TREE = tree(3, 4, exact=False)
TRAINING: dict[str, Any] = {"steps": 1, "batch": 4, "learning_rate": 0.1}

REFUSED = [
    (lambda: ngram_process(**GOOD | {"order": 0}), "order: must be a whole number >= 1, got 0"),
    (lambda: ngram_process(**GOOD | {"order": 2.0}), r"order: must be a whole number >= 1, got 2\.0"),
    (lambda: ngram_process(**GOOD | {"n_tokens": 0}), "n_tokens: must be a whole number >= 1, got 0"),
    (lambda: ngram_process(**GOOD | {"horizon": True}), "horizon: must be a whole number >= 1, got True"),
    (lambda: ngram_process(**GOOD, eos=3), "eos: must be a whole number >= 0 and <= 2, got 3"),
    (lambda: ngram_process(**GOOD, call=-1, tool=[[1, 0, 0]]), "call: must be a whole number >= 0 and <= 2"),
    (lambda: ngram_process(**GOOD, call=1), "call, tool: give both or neither, got call=1 and tool=None"),
    (lambda: ngram_process(**GOOD, tool=[[1, 0, 0]]), "call, tool: give both or neither, got call=None"),
    (lambda: ngram_process(**GOOD, eos=1, call=1, tool=[[1, 0, 0]]), "call: must differ from eos, got 1"),
    (lambda: ngram_process(**GOOD, call=1, tool=[1, 0, 0]), r"tool: shape must be .*, got \(3,\)"),
    (lambda: ngram_process(**GOOD, call=1, tool=[[1, 0]]), r"tool: shape must be .*, got \(1, 2\)"),
    (lambda: ngram_process(**GOOD, call=1, tool=np.zeros((0, 3))), r"tool: shape must be .*, got \(0, 3\)"),
    (lambda: ngram_process(**GOOD, call=1, tool=[[0.5, 0.4, 0]]), "tool: probabilities must sum to 1"),
    (lambda: ngram_process(**GOOD, call=1, tool=[[1.5, -0.5, 0]]), "tool: probabilities must be >= 0"),
    (
        lambda: ngram_process(**GOOD, eos=0, call=1, tool=[[0.5, 0.5, 0]]),
        "tool: a tool cannot end the string",
    ),
    (lambda: ngram_process(**GOOD, memory=[[0.0, 0.0, 0.0]]), "memory: must be whole numbers .* got float64"),
    (lambda: ngram_process(**GOOD, memory=[[0, 0]]), r"memory: must be .* got int64 \(1, 2\)"),
    (lambda: ngram_process(**GOOD, memory=[[0, 1, 0]]), r"memory: entries must be in \[0, 1\), got 0\.\.1"),
    (lambda: ngram_process(order=9, n_tokens=9, horizon=99), "order: 9 with 9 tokens makes more than 50000"),
    (
        lambda: PROCESS.world(PAIR[0], PAIR),
        r"behavior: shape must be \(1, 2\) \(contexts, tokens\), got \(2,\)",
    ),
    (
        lambda: PROCESS.world(PAIR, PAIR.T),
        r"target: shape must be \(1, 2\) \(contexts, tokens\), got \(2, 1\)",
    ),
    (lambda: PROCESS.world(PAIR, 2 * PAIR), "target: probabilities must sum to 1"),
    (lambda: PROCESS.world(PAIR, PAIR, "state"), "parameters: must be one of"),  # type: ignore[arg-type]
    (lambda: ngram(RNG, rewards="some"), "rewards: must be one of"),  # type: ignore[arg-type]
    (lambda: ngram(RNG, tool_tokens=-1), "tool_tokens: must be a whole number >= 0, got -1"),
    (lambda: ngram(RNG, n_tokens=1, eos=True, tool_tokens=1), "n_tokens: must be a whole number >= 2, got 1"),
    (lambda: ngram(RNG, step=0.1, temperature=0.5), "give at most one, got step and temperature"),
    (lambda: ngram(RNG, step=0.1, exact=True), "step: logits need float64 probabilities"),
    (lambda: ngram(RNG, logits=lambda c: [0] * 3, exact=True), "logits: logits need float64 probabilities"),
    (lambda: ngram(RNG, logits=lambda c: [0, 0]), r"logits: must give 3 finite numbers .* shape \(4, 2\)"),
    (lambda: ngram(RNG, logits=lambda c: [0, 0, math.nan]), "logits: must give 3 finite numbers"),
    (lambda: ngram(RNG, temperature=0.0), "temperature: must be > 0"),
    (lambda: ngram(RNG, temperature=2, exact=True), "temperature: on exact worlds 1/temperature must be"),
    (lambda: fitted_ngram(RNG, rewards="some"), "rewards: must be one of"),  # type: ignore[arg-type]
    (lambda: fitted_ngram(RNG, word="sea!"), "text: may only use the characters"),
    (lambda: fitted_ngram(RNG, word="", rewards="outcome"), "word: must have at least one token"),
    (lambda: word_memory([2], 2), "word: must be a whole number >= 0 and <= 1, got 2"),
    (
        lambda: fit_ngram([[0, 2]], order=1, n_tokens=2),
        "sequences: must be a whole number >= 0 and <= 1, got 2",
    ),
    (lambda: fit_ngram([[0]], order=0, n_tokens=2), "order: must be a whole number >= 1"),
    (lambda: fit_ngram([[0]], order=1, n_tokens=0), "n_tokens: must be a whole number >= 1"),
    (lambda: TinyTransformer.random(0, width=5), "width: must be a multiple of n_heads=2, got 5"),
    (lambda: TinyTransformer.random(0, n_layers=0), "n_layers: must be a whole number >= 1, got 0"),
    (lambda: TinyTransformer(np.zeros(3)), r"parameters: must be 196 finite numbers, got shape \(3,\)"),
    (lambda: TinyTransformer(np.full(196, np.nan)), "parameters: must be 196 finite numbers"),
    (lambda: NETWORK.perturbed(RNG, -1.0), r"scale: must be finite and >= 0, got -1\.0"),
    (lambda: NETWORK.perturbed(RNG, math.inf), "scale: must be finite and >= 0, got inf"),
    (lambda: NETWORK.next_token_probabilities([]), "prefixes: at least one is needed"),
    (lambda: NETWORK.scores([(0, 0, 0, 0)]), "prefixes: at most 3 tokens can be read, got 4"),
    (lambda: NETWORK.scores([(0, 3)]), "prefixes: must be a whole number >= 0 and <= 2, got 3"),
    (
        lambda: transformer_world(NETWORK, NETWORK, tree(2, 3, exact=False)),
        "mdp: 2 tokens .* the behavior network",
    ),
    (
        lambda: transformer_world(NETWORK, NETWORK, tree(3, 5, exact=False)),
        "mdp: 3 tokens and a horizon of 5",
    ),
    (lambda: transformer_world(NETWORK, NETWORK, tree(3, 2)), "mdp: a transformer needs a float64 tree"),
    (
        lambda: transformer_world(NETWORK, NETWORK, chain("loop", np.zeros((1, 3), int), horizon=3, initial=0)),
        "mdp: must be a tree, whose labels are prefixes, got 'loop'",
    ),
    (lambda: policy_gradient_steps(NETWORK, TREE, RNG, **TRAINING | {"steps": -1}), "steps: must be"),
    (lambda: policy_gradient_steps(NETWORK, TREE, RNG, **TRAINING | {"batch": 1}), "batch: must be"),
    (
        lambda: policy_gradient_steps(NETWORK, TREE, RNG, **TRAINING | {"learning_rate": 0.0}),
        "learning_rate:",
    ),
    (lambda: sampler_policy(ngram(RNG)), "noise, top_k, top_p: give at least one"),
    (lambda: sampler_policy(ngram(RNG), noise=0.1), "rng: noise needs a random generator"),
    (lambda: sampler_policy(ngram(RNG), rng=RNG, noise=-0.1), r"noise: must be finite and >= 0, got -0\.1"),
    (lambda: sampler_policy(ngram(RNG, exact=True), rng=RNG, noise=0.1), "behavior: a step in logit space"),
    (lambda: truncate_policy(PAIR), "top_k, top_p: give at least one"),
    (lambda: truncate_policy(PAIR, top_k=0), "top_k: must be a whole number >= 1, got 0"),
    (lambda: truncate_policy(PAIR, top_k=1.5), "top_k: must be a whole number >= 1"),  # type: ignore[arg-type]
    (lambda: truncate_policy(PAIR, top_p=0.0), r"top_p: must be in \(0, 1\], got 0\.0"),
    (lambda: truncate_policy(PAIR, top_p=1.1), r"top_p: must be in \(0, 1\], got 1\.1"),
    (lambda: truncate_policy(PAIR, top_p=math.nan), r"top_p: must be in \(0, 1\], got nan"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_files_that_hold_something_else_are_refused(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, behavior=np.zeros(3))
    with pytest.raises(ValueError, match=r"path: .* is no recorded transformer, it has no \['scores', 'target'\]"):
        load_transformer_world(path)
    np.savez(path, behavior=np.zeros(3), target=np.zeros(3), scores=np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"path: scores in .* do not fit .* got shape \(2, 3, 4\)"):
        load_transformer_world(path)


def test_policies_can_be_changed_whole():
    """`temper_policy` and `step_policy` take the tables of these worlds as they are, tool and end states included."""
    world = ngram(np.random.default_rng(0), eos=True, tool_tokens=1)
    for table in (temper_policy(world.behavior, 0.5), step_policy(world.behavior, np.arange(3.0), 0.1)):
        np.testing.assert_allclose(table.sum(axis=1), 1)
