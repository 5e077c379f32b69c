"""Token worlds: what they refuse, and that the generators make what they say."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace
from fractions import Fraction

import numpy as np
import oracle_worlds as oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from world_strategies import KINDS, exact_chain, examples, random_world, two_step, worlds

from simulations.exact import gradient_moments
from simulations.mdp import (
    END,
    POLICY,
    TOOL,
    World,
    as_numbers,
    bigram,
    chain,
    depths,
    independent_tokens,
    one_logit,
    policy_table,
    random_chain,
    random_policy,
    random_tree,
    softmax,
    step_policy,
    sticky_hot,
    temper_policy,
    tree,
    truncate_policy,
)

F = Fraction


def small(**changes):
    """A float world of a policy, a tool and an end state, with some fields of its process changed."""
    rng = np.random.default_rng(0)
    world = random_chain(rng, n_states=4, n_actions=3, horizon=3, end=True, tool=True)
    return world, replace(world.mdp, **changes) if changes else world.mdp


def changed(array: np.ndarray, index, value) -> np.ndarray:
    copy = array.copy()
    copy[index] = value
    return copy


# --- numbers ---


def test_exact_numbers_are_python_integers_whatever_comes_in():
    """Fraction keeps NumPy integers, whose powers wrap around: 3^41 would be negative."""
    given_numbers = [np.int64(3), 3, F(3), Fraction(np.int64(3)), 3.0, np.float32(3), np.float64(3)]
    for value in given_numbers:
        number = as_numbers([value], True)[0]
        assert type(number) is Fraction
        assert type(number.numerator) is int
        assert type(number.denominator) is int
        assert number**41 == 3**41
    assert as_numbers([[0.5, F(1, 3)]], False).dtype == np.float64
    assert as_numbers(F(1, 3), True)[()] == F(1, 3)
    assert as_numbers([], True).shape == (0,)


def test_worlds_built_from_numpy_integers_are_exact():
    rewards = np.array([10**6, 10**6 + 1])
    mdp = tree(2, 3, outcome=lambda string: rewards[string[-1]] ** 2, reward=lambda prefix, a: rewards[a])
    numbers = [*mdp.outcome, *mdp.reward.ravel()]
    assert all(type(x.numerator) is int for x in numbers)


# --- refusals: the process ---


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("horizon", lambda m: 0, "horizon: must be a whole number >= 1, got 0"),
        ("horizon", lambda m: 2.0, "horizon: must be a whole number >= 1, got 2.0"),
        ("horizon", lambda m: True, "horizon: must be a whole number >= 1, got True"),
        ("initial", lambda m: m.initial[:2], r"initial: shape must be \(4,\), got \(2,\)"),
        ("initial", lambda m: m.initial * 0.5, "initial: probabilities must sum to 1 .* row 0 sums to 0.5"),
        ("initial", lambda m: changed(m.initial, 0, np.nan), "initial: probabilities must be finite, got"),
        ("initial", lambda m: np.array([1.5, -0.5, 0, 0]), "initial: probabilities must be >= 0, got -0.5"),
        ("reward", lambda m: m.reward[0], r"reward: shape must be \(states, actions\), got \(3,\)"),
        ("reward", lambda m: m.reward[:2], r"reward: shape must be \(4, 3\), got \(2, 3\)"),
        ("reward", lambda m: changed(m.reward, (1, 1), np.nan), "reward: must be finite, got nan"),
        ("outcome", lambda m: changed(m.outcome, 3, np.inf), "outcome: must be finite, got inf"),
        ("outcome", lambda m: m.outcome[:, None], r"outcome: shape must be \(4,\), got \(4, 1\)"),
        ("tool", lambda m: m.tool[:, :2], r"tool: shape must be \(4, 3\), got \(4, 2\)"),
        ("tool", lambda m: changed(m.tool, (2, 0), 2.0), "tool: probabilities must sum to 1 .* row 2 sums to"),
        ("tool", lambda m: changed(m.tool, (2, 0), -1.0), "tool: probabilities must be >= 0, got -1.0 in row 2"),
        ("tool", lambda m: as_numbers(m.tool, True), "tool: numbers must be float64"),
        (
            "kind",
            lambda m: changed(m.kind, 0, 7),
            r"kind: must be POLICY \(0\), TOOL \(1\) or END \(2\), got \[0 1 2 7\]",
        ),
        ("kind", lambda m: changed(m.kind, 0, END), "edges: END states are absorbing and must have none"),
        (
            "kind",
            lambda m: changed(m.kind, 3, POLICY),
            "edges: .* must sum to 1, after token 0 in state '3' they sum to 0",
        ),
        ("labels", lambda m: m.labels[:3], "labels: 4 are needed, one per state, got 3"),
    ],
)
def test_process_refuses(field, change, message):
    _world, mdp = small()
    with pytest.raises(ValueError, match=message):
        replace(mdp, **{field: change(mdp)})


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        (0, lambda x: changed(x, 0, 4), r"edges: state must be in \[0, 4\), got 0..4"),
        (0, lambda x: changed(x, 0, -1), r"edges: state must be in \[0, 4\), got -1..2"),
        (1, lambda x: changed(x, 0, 3), r"edges: action must be in \[0, 3\), got 0..3"),
        (2, lambda x: changed(x, 0, 9), r"edges: next must be in \[0, 4\), got 0..9"),
        (
            3,
            lambda x: changed(x, 0, x[0] + 0.25),
            "edges: next-state probabilities must sum to 1, after token 0 in state '0'",
        ),
        (3, lambda x: changed(changed(x, 0, -x[0]), 1, x[1] + 2 * x[0]), "edges: probabilities must be >= 0, got -"),
        (3, lambda x: changed(x, 0, np.nan), "edges: must be finite, got nan"),
        (3, lambda x: as_numbers(x, True), "edges: numbers must be float64"),
        (2, lambda x: x[:-1], "edges: shape must be"),
    ],
)
def test_process_refuses_edges(column, change, message):
    _, mdp = small()
    edges = [*mdp.edges]
    edges[column] = change(edges[column])
    with pytest.raises(ValueError, match=message):
        replace(mdp, edges=tuple(edges))


def test_exact_process_refuses_anything_inexact():
    world = exact_chain(np.random.default_rng(1), end=True)
    mdp = world.mdp
    nearly = mdp.initial.copy()
    nearly[0] += F(1, 10**30)
    with pytest.raises(ValueError, match=r"initial: probabilities must sum to 1 \(within 0\)"):
        replace(mdp, initial=nearly)
    for field in ("reward", "outcome", "tool"):
        with pytest.raises(ValueError, match=f"{field}: numbers must be Fractions"):
            replace(mdp, **{field: getattr(mdp, field).astype(float)})
        with pytest.raises(ValueError, match=f"{field}: numbers must be Fractions .*float"):
            replace(mdp, **{field: changed(getattr(mdp, field), 0, 0.5)})
        with pytest.raises(ValueError, match=f"{field}: numbers must be Fractions"):
            replace(mdp, **{field: changed(getattr(mdp, field), 0, Fraction(np.int64(1)))})
    with pytest.raises(ValueError, match="edges: numbers must be Fractions"):
        replace(mdp, edges=(*mdp.edges[:3], mdp.edges[3].astype(float)))


def test_float_sums_are_allowed_their_rounding():
    _, mdp = small()
    replace(mdp, initial=changed(mdp.initial, 0, mdp.initial[0] + 1e-10))
    with pytest.raises(ValueError, match="initial: probabilities must sum to 1"):
        replace(mdp, initial=changed(mdp.initial, 0, mdp.initial[0] + 1e-8))


# --- refusals: the policies ---


@pytest.mark.parametrize("name", ["behavior", "target"])
def test_world_refuses_policies(name):
    world, _ = small()
    policy = getattr(world, name)
    for bad, message in (
        (policy[:, :2], rf"{name}: shape must be \(4, 3\) \(states, actions\), got \(4, 2\)"),
        (as_numbers(policy, True), f"{name}: numbers must be float64"),
        (changed(policy, (1, 0), np.nan), f"{name}: probabilities must be finite, got .* in row 1"),
        (changed(policy, (1, 0), -0.5), f"{name}: probabilities must be >= 0, got -0.5 in row 1"),
        (changed(policy, (1, 0), 0.9999), f"{name}: probabilities must sum to 1 .* row 1 sums to"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(world, **{name: bad})
    # Rows in which no policy writes may hold anything.
    replace(world, **{name: changed(policy, [2, 3], np.nan)})


def test_world_refuses_other_things():
    world, _ = small()
    with pytest.raises(ValueError, match=r"parameters: must be one of \('prefix', 'position', 'shared'\), got 'token'"):
        replace(world, parameters="token")
    for scores in (np.zeros((4, 3)), np.zeros((3, 4, 2))):
        with pytest.raises(
            ValueError, match=r"scores: shape must be \(4, 3, 'D'\), got " + re.escape(str(scores.shape))
        ):
            replace(world, scores=scores)
    with pytest.raises(ValueError, match="scores: numbers must be float64"):
        replace(world, scores=as_numbers(np.zeros((4, 3, 2)), True))


def test_rows_are_counted_in_the_table_not_among_the_checked_ones():
    """The tool state is number 2 and the only one that is checked."""
    _, mdp = small()
    assert mdp.kind.tolist() == [POLICY, POLICY, TOOL, END]
    with pytest.raises(ValueError, match="row 2 sums to"):
        replace(mdp, tool=changed(mdp.tool, 2, 0.0))


def test_absolute_continuity_names_the_prefix():
    half = (F(1, 2), F(1, 2))
    after = {0: half, 1: (F(1), F(3, 4))}
    with pytest.raises(
        ValueError,
        match=r"target: puts mass .*: after prefix \(1,\) \(state '\(1,\)'\) token 0 has target "
        r"probability 1/4 and behavior probability 0\. .*require_support=False",
    ):
        two_step(half, after)
    assert two_step(half, after, require_support=False).unsupported_prefix() is not None
    assert two_step(half, {0: half, 1: half}).unsupported_prefix() is None
    # b never reaches the prefix: nothing to correct there.
    assert two_step((F(0), F(0)), after).unsupported_prefix() is None
    # pi never reaches it: theory.md asks for support on every prefix that b reaches.
    with pytest.raises(ValueError, match=r"after prefix \(1,\)"):
        two_step((F(1, 2), F(0)), after)
    # The shortest prefix comes first.
    with pytest.raises(ValueError, match=r"after prefix \(\) .* token 1 has target probability 1/2"):
        two_step((F(0), F(1, 2)), {0: (F(1), F(1, 2)), 1: half})


def test_absolute_continuity_stops_at_the_horizon_and_looks_through_tools_and_zero_edges():
    """A line of states 0 -> 1 -> 2 -> 2 whose last one lacks support."""
    behavior, target = np.array([[1.0, 0.0]] * 3), np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    line = np.array([[1, 1], [2, 2], [2, 2]])
    World(chain("short", line, horizon=2, initial=0), behavior, target)
    with pytest.raises(ValueError, match=r"after prefix \(0, 0\) \(state '2'\) token 1"):
        World(chain("long", line, horizon=3, initial=0), behavior, target)
    # The environment's token counts in the prefix, and only if it can be written.
    tools = {"kind": [POLICY, TOOL, POLICY], "tool": np.array([[0, 0], [0, 1.0], [0, 0]])}
    with pytest.raises(ValueError, match=r"after prefix \(0, 1\)"):
        World(chain("tool", line, horizon=3, initial=0, **tools), behavior, target)
    elsewhere = np.array([[1, 1], [2, 0], [2, 2]])
    World(chain("tool", elsewhere, horizon=9, initial=0, **tools), behavior, target)
    # A transition of probability 0 leads nowhere.
    state, action, nxt, probability = chain("long", line, horizon=3, initial=0).edges
    never = (np.append(state, 0), np.append(action, 0), np.append(nxt, 0), np.append(probability, 0.0))
    World(replace(chain("stay", np.array([[0, 0], [2, 2], [2, 2]]), horizon=3, initial=0)), behavior, target)
    with pytest.raises(ValueError, match=r"after prefix \(0, 0\)"):
        World(replace(chain("long", line, horizon=3, initial=0), edges=never), behavior, target)
    swapped = (*never[:3], np.where((never[0] == 0) & (never[1] == 0), 1.0 - never[3], never[3]))
    World(replace(chain("long", line, horizon=3, initial=0), edges=swapped), behavior, target)


def test_absolute_continuity_of_a_settled_chain_takes_no_time():
    mdp = chain("long", np.zeros((1, 2), dtype=int), horizon=10**7, initial=0)
    start = time.process_time()
    World(mdp, np.full((1, 2), 0.5), np.full((1, 2), 0.5))
    assert time.process_time() - start < 1


# --- refusals: builders ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tree(2, 60), r"horizon: 60 tokens from a vocabulary of 2 make more than 300000 prefixes"),
        (lambda: tree(50_000, 8192, eos=0), r"horizon: 8192 tokens from a vocabulary of 50000 make more than"),
        (lambda: independent_tokens([F(1, 2)] * 2, [F(1, 2)] * 2, 40), "horizon: 40 tokens"),
        (lambda: tree(2, 2.5), "horizon: must be a whole number >= 1, got 2.5"),
        (lambda: tree(2, 0), "horizon: must be a whole number >= 1, got 0"),
        (lambda: tree(0, 2), "n_actions: must be a whole number >= 1, got 0"),
        (lambda: tree(2, 2, eos=2), r"eos: must be a token in \[0, 2\) or None, got 2"),
        (lambda: tree(2, 2, tool_after=lambda prefix: [F(1, 2), F(1, 3)]), "tool: probabilities must sum to 1"),
        (lambda: chain("x", np.zeros(3), horizon=1, initial=0), r"next_state: shape must be .*, got \(3,\)"),
        (lambda: chain("x", np.zeros((2, 2, 3)), horizon=1, initial=0), r"next_state: shape .*, got \(2, 2, 3\)"),
        (lambda: chain("x", np.full((2, 2), 2), horizon=1, initial=0), r"edges: next must be in \[0, 2\), got 2..2"),
        (
            lambda: chain("x", np.zeros((2, 2)), horizon=1, initial=2),
            r"initial: a first state must be in \[0, 2\), got 2",
        ),
        (
            lambda: chain("x", np.zeros((2, 2)), horizon=1, initial=-1),
            r"initial: a first state must be in \[0, 2\), got -1",
        ),
        (
            lambda: chain("x", np.zeros((2, 2)), horizon=1, initial=0, reward=np.zeros((3, 2))),
            r"reward: shape must broadcast",
        ),
        (
            lambda: chain("x", np.zeros((2, 2)), horizon=1, initial=0, outcome=[1, 2, 3]),
            r"outcome: shape must broadcast",
        ),
        (lambda: chain("x", np.zeros((2, 2)), horizon=1, initial=0, kind=[0, 0, 0]), r"kind: shape must broadcast"),
        (lambda: chain("x", np.full((2, 2, 2), np.nan), horizon=1, initial=0), "edges: must be finite, got nan"),
        (lambda: random_tree(np.random.default_rng(0), rewards="sparse"), "rewards: must be one of .*, got 'sparse'"),
        (lambda: random_tree(np.random.default_rng(0), parameters="all"), "parameters: must be one of .*, got 'all'"),
        (
            lambda: random_tree(np.random.default_rng(0), parameters="shared", same_share=0.5),
            "same_share: must be 0 unless parameters='prefix', got 0.5",
        ),
        (
            lambda: bigram(np.random.default_rng(0), rewards="both"),
            r"rewards: must be one of \('dense', 'outcome'\), got 'both'",
        ),
        (
            lambda: bigram(np.random.default_rng(0), n_tokens=1, eos=True),
            "n_tokens: must be at least 2 with eos, got 1",
        ),
        (
            lambda: random_policy(sticky_hot(2).mdp, np.random.default_rng(0), parameters="x"),
            "parameters: must be one of",
        ),
        (
            lambda: random_policy(sticky_hot(3).mdp, np.random.default_rng(0), parameters="position"),
            "mdp: each state must occur at one step only.* state 'hot' occurs at steps 1 and 2",
        ),
        (lambda: temper_policy(np.array([[0.5, 0.5]]), 0), "temperature: must be > 0 and finite, got 0"),
        (lambda: temper_policy(np.array([[0.5, 0.5]]), math.inf), "temperature: must be > 0 and finite, got inf"),
        (lambda: temper_policy(np.array([[0.5, 0.5]]), math.nan), "temperature: must be > 0 and finite, got nan"),
        (lambda: temper_policy(as_numbers([[F(1, 2)] * 2], True), F(2, 3)), "temperature: .* whole number, got 3/2"),
        (lambda: step_policy(as_numbers([[F(1, 2)] * 2], True), np.ones(2), 1.0), "behavior: .* got Fractions"),
        (
            lambda: step_policy(np.array([[0.0, 1.0]]), np.ones(2), 1.0),
            "behavior: .* only positive probabilities, got 0.0",
        ),
        (lambda: truncate_policy(np.array([[0.5, 0.5]])), "top"),
        (lambda: truncate_policy(np.array([[0.5, 0.5]]), top_k=0), "top_k: .*got 0"),
        (lambda: truncate_policy(np.array([[0.5, 0.5]]), top_p=1.5), "top_p: .*got 1.5"),
    ],
)
def test_builders_refuse_before_they_build(call, message):
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
        call()
    assert time.process_time() - start < 2


# --- trees ---


@given(st.integers(1, 3), st.integers(1, 4), st.one_of(st.none(), st.integers(0, 2)))
@examples(0.5)
def test_tree_has_every_prefix_once(n_actions, horizon, eos):
    if eos is not None and eos >= n_actions:
        eos = 0
    mdp = tree(
        n_actions, horizon, eos=eos, outcome=lambda string: len(string), reward=lambda prefix, a: 10 * len(prefix) + a
    )
    expected = [()]
    for prefix in expected:
        if len(prefix) < horizon and not (prefix and prefix[-1] == eos):
            expected += [(*prefix, a) for a in range(n_actions)]
    assert mdp.labels == tuple(map(str, expected))
    index = {prefix: s for s, prefix in enumerate(expected)}
    ended = [len(prefix) == horizon or bool(prefix and prefix[-1] == eos) for prefix in expected]
    assert mdp.kind.tolist() == [END if done else POLICY for done in ended]
    moves = {(int(s), int(a)): int(s2) for s, a, s2, p in zip(*mdp.edges, strict=True) if p == 1}
    assert moves == {(index[p[:-1]], p[-1]): s for p, s in index.items() if p}
    assert mdp.outcome.tolist() == [len(p) if done else 0 for p, done in zip(expected, ended, strict=True)]
    for s, prefix in enumerate(expected):
        assert mdp.reward[s].tolist() == [0 if ended[s] else 10 * len(prefix) + a for a in range(n_actions)]
    assert depths(mdp).tolist() == [len(p) for p in expected]
    assert mdp.initial.tolist() == [1] + [0] * (mdp.n_states - 1)
    assert (mdp.n_states, mdp.n_actions, mdp.exact) == (len(expected), n_actions, True)


def test_tree_counts_prefixes_to_the_last_one(monkeypatch):
    from simulations import mdp as module

    for options in ({}, {"eos": 1}):
        size = tree(3, 4, **options).n_states
        monkeypatch.setattr(module, "MAX_PREFIXES", size)
        assert tree(3, 4, **options).n_states == size
        monkeypatch.setattr(module, "MAX_PREFIXES", size - 1)
        with pytest.raises(ValueError, match=f"more than {size - 1} prefixes"):
            tree(3, 4, **options)
        monkeypatch.undo()


def test_tree_gives_the_environment_its_states():
    mdp = tree(2, 3, tool_after=lambda prefix: [F(1, 4), F(3, 4)] if prefix == (1,) else None, exact=True)
    s = mdp.labels.index("(1,)")
    assert np.flatnonzero(mdp.kind == TOOL).tolist() == [s]
    assert mdp.tool[s].tolist() == [F(1, 4), F(3, 4)]
    assert not mdp.policy_states[s]
    assert tree(2, 2, exact=False).initial.dtype == np.float64


def test_policy_table_puts_every_rule_in_its_row():
    mdp = tree(12, 2, eos=11)

    def rule(prefix):
        weights = [F(1 + (7 * a + sum(prefix)) % 5) for a in range(12)]
        return [w / sum(weights) for w in weights]

    table = policy_table(mdp, rule)
    for s, label in enumerate(mdp.labels):
        prefix = tuple(int(x) for x in re.findall(r"\d+", label))
        assert table[s].tolist() == (rule(prefix) if mdp.kind[s] == POLICY else [0] * 12)


# --- policies ---


@pytest.mark.parametrize("exact", [True, False])
def test_random_policies_respect_the_sharing(exact):
    mdp = tree(3, 3, exact=exact)
    writing = np.flatnonzero(mdp.policy_states)
    depth = depths(mdp)
    rows = {}
    for parameters in ("prefix", "position", "shared"):
        policy = random_policy(mdp, np.random.default_rng(1), parameters=parameters, largest=50)
        assert policy.shape == (mdp.n_states, 3)
        assert (policy.dtype == object) == exact
        rows[parameters] = policy
        if exact:
            assert np.all(policy.sum(axis=1) == 1)
            assert np.all(policy > 0)
    distinct = {name: len({tuple(row) for row in policy[writing]}) for name, policy in rows.items()}
    assert distinct["shared"] == 1
    assert distinct["position"] == 3
    assert distinct["prefix"] > 9
    for level in range(3):
        assert len({tuple(row) for row in rows["position"][writing[depth[writing] == level]]}) == 1


def test_random_policy_obeys_its_size_options():
    mdp = tree(2, 4)
    for largest in (1, 3):
        policy = random_policy(mdp, np.random.default_rng(0), largest=largest)
        allowed = {F(i, i + j) for i in range(1, largest + 1) for j in range(1, largest + 1)}
        assert {*policy.ravel()} == allowed
    logits = {}
    for spread in (0.01, 2.0):
        policy = random_policy(tree(2, 6, exact=False), np.random.default_rng(0), spread=spread)
        logits[spread] = np.log(policy[:, 1] / policy[:, 0]).std() / (spread * math.sqrt(2))
    assert 0.7 < logits[0.01] < 1.3  # 127 normal differences
    assert logits[0.01] == pytest.approx(logits[2.0], rel=1e-9)


def test_step_policy_moves_logits():
    rng = np.random.default_rng(2)
    behavior, direction = rng.dirichlet(np.ones(4), size=3), rng.standard_normal((3, 4))
    moved = step_policy(behavior, direction, 0.7)
    np.testing.assert_allclose(moved.sum(axis=1), 1, rtol=1e-14)
    shift = np.log(moved) - np.log(behavior) - 0.7 * direction
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1], shift.shape), atol=1e-13)
    np.testing.assert_allclose(step_policy(behavior, direction, 0.0), behavior, rtol=1e-14)
    unwritten = np.vstack([behavior, np.zeros((1, behavior.shape[1]))])
    np.testing.assert_allclose(step_policy(unwritten, np.ones(4), 5.0), unwritten, rtol=1e-13)
    np.testing.assert_allclose(step_policy(behavior, np.ones(4), 5.0), behavior, rtol=1e-13)
    np.testing.assert_allclose(softmax(np.array([[1000.0, 1000.0], [-1e4, 0.0]])), [[0.5, 0.5], [0, 1]])


def test_temper_policy():
    half = as_numbers([[F(1, 4), F(3, 4)], [0, 1], [0, 0]], True)
    sharp = temper_policy(half, F(1, 2))
    assert sharp.tolist() == [[F(1, 10), F(9, 10)], [0, 1], [0, 0]]
    assert temper_policy(half, 1).tolist() == half.tolist()
    floats = half.astype(float)
    np.testing.assert_allclose(temper_policy(floats, 0.5), sharp.astype(float), rtol=1e-15)
    np.testing.assert_allclose(temper_policy(floats, 2.0)[0], np.array([1, 3**0.5]) / (1 + 3**0.5), rtol=1e-14)
    # So cold that every power vanishes in float64: the likeliest token takes all.
    np.testing.assert_allclose(temper_policy(np.array([[0.3, 0.3, 0.4]]), 1e-5), [[0, 0, 1]])
    np.testing.assert_allclose(temper_policy(np.array([[1e-300, 1e-300]]) / 2e-300, 1e-3), [[0.5, 0.5]])
    world = independent_tokens([F(1, 4), F(3, 4)], [F(1, 4), F(3, 4)], 2)
    cold = replace(world, target=temper_policy(world.behavior, F(1, 3)))
    assert cold.target[0].tolist() == [F(1, 28), F(27, 28)]


def test_truncate_policy():
    row = np.array([[F(1, 10), F(4, 10), F(3, 10), F(2, 10)], [0, 0, 0, 0]], dtype=object)
    assert truncate_policy(as_numbers(row, True), top_k=2).tolist() == [[0, F(4, 7), F(3, 7), 0], [0, 0, 0, 0]]
    assert truncate_policy(as_numbers(row, True), top_p=F(7, 10)).tolist()[0] == [0, F(4, 7), F(3, 7), 0]
    assert truncate_policy(as_numbers(row, True), top_p=F(71, 100)).tolist()[0] == [0, F(4, 9), F(3, 9), F(2, 9)]
    assert truncate_policy(as_numbers(row, True), top_p=F(1)).tolist() == row.tolist()
    assert truncate_policy(as_numbers(row, True), top_p=F(1, 100)).tolist()[0] == [0, 1, 0, 0]
    # Both: the mass is that of what top_k has left.
    assert truncate_policy(as_numbers(row, True), top_k=2, top_p=F(1, 2)).tolist()[0] == [0, 1, 0, 0]
    assert truncate_policy(as_numbers(row, True), top_k=9).tolist() == row.tolist()
    tied = truncate_policy(np.array([[0.25, 0.25, 0.25, 0.25]]), top_k=2)
    assert tied.tolist() == [[0.5, 0.5, 0, 0]]
    assert row[0].tolist() == [F(1, 10), F(4, 10), F(3, 10), F(2, 10)]  # the argument is left alone


# --- worlds ---


@given(worlds())
@examples(0.67)
def test_world_tables(world):
    mdp = world.mdp
    policy = mdp.policy_states
    for who in ("behavior", "target"):
        written = world.token_probabilities(who)
        assert np.all(written[mdp.kind == END] == 0)
        assert np.all(written.sum(axis=1)[mdp.kind != END] == 1)
        assert np.array_equal(written[policy], getattr(world, who)[policy])
        assert np.array_equal(written[mdp.kind == TOOL], mdp.tool[mdp.kind == TOOL])
    assert np.all(world.ratio[~policy] == 1)
    assert np.array_equal(world.ratio[policy] * world.behavior[policy], world.target[policy])
    scores = world.local_scores
    assert np.all(scores[~policy] == 0)
    mean = (world.target[:, :, None] * scores).sum(axis=1)
    assert np.all(mean[policy] == 0)  # E_pi of the score
    assert np.all(scores.sum(axis=2) == 0)  # a common shift of the logits changes nothing
    for s in np.flatnonzero(policy):
        assert np.array_equal(scores[s], np.eye(mdp.n_actions, dtype=int) - world.target[s])
    blocks = {"prefix": mdp.n_states, "position": mdp.horizon, "shared": 1}[world.parameters]
    assert (world.n_blocks, world.dimension) == (blocks, blocks * mdp.n_actions)
    for step in range(mdp.horizon):
        own = {"prefix": range(mdp.n_states), "position": [step] * mdp.n_states, "shared": [0] * mdp.n_states}
        assert world.block(step).tolist() == list(own[world.parameters])


@given(worlds())
@examples(0.5)
def test_as_float_is_the_same_world_rounded(world):
    floating = world.as_float()
    assert world.exact
    assert not floating.exact
    for name in ("behavior", "target", "ratio", "local_scores"):
        np.testing.assert_allclose(getattr(floating, name), getattr(world, name).astype(float), rtol=1e-15, atol=1e-16)
    for name in ("initial", "reward", "outcome", "tool"):
        assert getattr(floating.mdp, name).dtype == np.float64
        np.testing.assert_array_equal(getattr(floating.mdp, name), getattr(world.mdp, name).astype(float))
    assert np.array_equal(floating.mdp.edges[3], world.mdp.edges[3].astype(float))
    assert all(np.array_equal(a, b) for a, b in zip(floating.mdp.edges[:3], world.mdp.edges[:3], strict=True))
    assert (floating.name, floating.mdp.horizon, floating.parameters) == (
        world.name,
        world.mdp.horizon,
        world.parameters,
    )
    assert floating.mdp.kind is world.mdp.kind
    assert np.array_equal(floating.as_float().behavior, floating.behavior)
    own = replace(world, scores=world.local_scores).as_float()
    assert own.scores is not None
    assert own.scores.dtype == np.float64
    lax = replace(world, require_support=False).as_float()
    assert not lax.require_support


def test_ratio_is_zero_where_the_behavior_policy_has_no_mass():
    world = two_step((F(0), F(1, 2)), {0: (F(1, 2), F(1, 4)), 1: (F(1, 2), F(1, 2))}, require_support=False)
    assert world.ratio[0].tolist() == [F(1, 2), 0]
    assert world.ratio[1].tolist() == [F(3, 2), F(1, 2)]


def test_with_parameters_forgets_own_scores():
    world, _ = small()
    own = replace(world, scores=np.zeros((4, 3, 5)))
    assert (own.n_blocks, own.dimension) == (1, 5)
    again = own.with_parameters("position")
    assert again.scores is None
    assert (again.n_blocks, again.dimension) == (3, 9)


@given(st.integers(0, 1000), st.integers(2, 3), st.integers(2, 3), st.booleans(), st.booleans(), st.booleans())
@examples(0.5)
def test_random_trees_are_as_ordered(seed, n_actions, horizon, eos, tool, exact):
    for rewards in ("dense", "outcome", "both"):
        world = random_tree(
            np.random.default_rng(seed),
            n_actions=n_actions,
            horizon=horizon,
            eos=eos,
            tool_share=0.5 if tool else 0.0,
            rewards=rewards,
            parameters="position",
            exact=exact,
        )
        mdp = world.mdp
        assert (mdp.n_actions, mdp.horizon, mdp.exact) == (n_actions, horizon, exact)
        assert mdp.kind[0] == POLICY
        assert tool or not np.any(mdp.kind == TOOL)
        ended = [bool(re.search(r"\b0,?\)$", label)) for label in mdp.labels]
        assert eos == any(k == END and e for k, e, d in zip(mdp.kind, ended, depths(mdp), strict=True) if d < horizon)
        assert rewards != "outcome" or not np.any(mdp.reward != 0)
        assert rewards != "dense" or not np.any(mdp.outcome != 0)
        assert np.all((mdp.reward >= -2) & (mdp.reward <= 3) & (mdp.reward == mdp.reward // 1))
        assert np.all((mdp.outcome >= -2) & (mdp.outcome <= 5))
        depth = depths(mdp)
        for level in range(horizon):
            rows = np.flatnonzero(mdp.policy_states & (depth == level))
            for policy in (world.behavior, world.target):
                assert np.all(policy[rows] == policy[rows[:1]])


def test_random_trees_differ_by_seed_and_agree_by_seed():
    a, b, c = (random_tree(np.random.default_rng(k), horizon=3) for k in (0, 0, 1))
    assert np.array_equal(a.behavior, b.behavior)
    assert np.array_equal(a.mdp.reward, b.mdp.reward)
    assert not np.array_equal(a.behavior, c.behavior)
    assert not np.array_equal(a.behavior, a.target)
    assert np.any(a.mdp.reward != 0)
    assert np.any(a.mdp.outcome != 0)


def test_share_of_equal_states():
    none, all_ = (random_tree(np.random.default_rng(3), n_actions=3, horizon=4, same_share=x) for x in (0.0, 1.0))
    assert np.array_equal(all_.behavior, all_.target)
    assert not np.array_equal(none.behavior, none.target)
    counts = []
    for seed in range(20):
        world = random_tree(np.random.default_rng(seed), n_actions=3, horizon=4, same_share=0.5)
        policy = world.mdp.policy_states
        counts.append(
            np.mean([np.array_equal(a, b) for a, b in zip(world.behavior[policy], world.target[policy], strict=True)])
        )
    assert 0.45 < np.mean(counts) < 0.6  # 800 states; a few agree by chance


def test_tool_share():
    shares = []
    for seed in range(20):
        mdp = random_tree(np.random.default_rng(seed), n_actions=3, horizon=4, tool_share=0.3).mdp
        shares.append(np.mean(mdp.kind[1:][mdp.kind[1:] != END] == TOOL))
    assert abs(np.mean(shares) - 0.3) < 0.05  # 780 states, standard error 0.016


@pytest.mark.parametrize("rewards", ["dense", "outcome"])
@pytest.mark.parametrize("eos", [False, True])
def test_bigram(rewards, eos):
    world = bigram(np.random.default_rng(5), n_tokens=4, horizon=6, step=0.25, rewards=rewards, eos=eos)
    mdp = world.mdp
    assert (mdp.n_states, mdp.n_actions, mdp.horizon) == (4, 4, 6)
    live = np.flatnonzero(mdp.kind != END)
    assert live.tolist() == ([1, 2, 3] if eos else [0, 1, 2, 3])
    assert sorted(zip(*(x.tolist() for x in mdp.edges), strict=True)) == [
        (s, a, a, 1.0) for s in live for a in range(4)
    ]
    np.testing.assert_allclose(mdp.initial[live], 1 / len(live))
    assert (rewards == "dense") == np.any(mdp.reward != 0)
    assert rewards == "dense" or set(mdp.outcome) <= {0.0, 1.0}
    logits = np.log(world.target) - np.log(world.behavior)
    logits -= logits.mean(axis=1, keepdims=True)
    assert 0.05 < np.linalg.norm(logits) <= 0.25 + 1e-12  # a common shift of a row's logits does not show
    assert np.array_equal(
        world.target,
        bigram(np.random.default_rng(5), n_tokens=4, horizon=6, step=0.25, rewards=rewards, eos=eos).target,
    )


@given(
    st.integers(0, 1000), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["prefix", "position", "shared"])
)
@examples(0.5)
def test_random_chains_are_as_ordered(seed, deterministic, end, tool, parameters):
    world = random_chain(
        np.random.default_rng(seed),
        n_states=5,
        n_actions=3,
        horizon=7,
        deterministic=deterministic,
        end=end,
        tool=tool,
        step=0.3,
        parameters=parameters,
    )
    mdp = world.mdp
    assert (mdp.n_states, mdp.n_actions, mdp.horizon, world.parameters) == (5, 3, 7, parameters)
    assert mdp.kind.tolist() == [POLICY] * 3 + [TOOL if tool else POLICY, END if end else POLICY]
    assert deterministic == bool(np.all(mdp.edges[3] == 1))
    assert mdp.initial[-1] == (0 if end else 0.2)
    shift = np.log(world.target) - np.log(world.behavior)
    shift -= shift.mean(axis=1, keepdims=True)
    one_step = np.allclose(shift, shift[0])
    assert one_step == (parameters == "shared")
    assert not np.allclose(world.behavior, world.target, atol=1e-4)


def test_sticky_hot_state():
    for exact in (True, False):
        world = sticky_hot(4, exact=exact)
        assert world.mdp.labels == ("start", "hot", "cold")
        chi2 = (world.target**2 / world.behavior).sum(axis=1) - 1
        np.testing.assert_allclose(chi2.astype(float), [0, 0.09, 0], atol=1e-15)
    assert world.mdp.n_actions == 2
    moves = {(int(s), int(a)): int(n) for s, a, n, _ in zip(*world.mdp.edges, strict=True)}
    assert moves == {(0, 0): 1, (0, 1): 2, (1, 0): 1, (1, 1): 2, (2, 0): 2, (2, 1): 1}


def test_independent_tokens():
    world = independent_tokens([F(1, 5), F(4, 5)], [F(1, 2), F(1, 2)], 3, outcome=sum)
    policy = world.mdp.policy_states
    assert world.parameters == "shared"
    assert {tuple(row) for row in world.behavior[policy]} == {(F(1, 5), F(4, 5))}
    assert {tuple(row) for row in world.target[policy]} == {(F(1, 2), F(1, 2))}
    assert world.mdp.outcome[-1] == 3


def test_chain_takes_what_broadcasts_and_copies_it():
    reward = np.zeros((2, 1))
    mdp = chain("x", np.array([[0, 1], [1, 1]]), horizon=2, initial=[0.5, 0.5], reward=reward, outcome=3, kind=[0, END])
    reward += 1
    assert mdp.reward.tolist() == [[0, 0], [0, 0]]
    assert mdp.outcome.tolist() == [3, 3]
    assert mdp.labels == ("0", "1")
    assert [x.tolist() for x in mdp.edges] == [[0, 0], [0, 1], [0, 1], [1.0, 1.0]]
    stochastic = chain("x", [[[F(1, 3), F(2, 3)]], [[F(0), F(1)]]], horizon=2, initial=1, exact=True)
    assert [x.tolist() for x in stochastic.edges] == [[0, 0, 1], [0, 0, 0], [0, 1, 1], [F(1, 3), F(2, 3), 1]]
    assert stochastic.initial.tolist() == [0, 1]


def test_depths_of_worlds_without_one():
    mdp = chain("line", np.array([[1], [2], [2], [2]]), horizon=2, initial=0)
    assert depths(mdp).tolist() == [0, 1, 2, -1]
    with pytest.raises(ValueError, match="state '2' occurs at steps 2 and 3"):
        depths(replace(mdp, horizon=3))
    with pytest.raises(ValueError, match="state '1' occurs at steps 0 and 1"):
        depths(replace(mdp, initial=np.array([0.5, 0.5, 0, 0])))


@pytest.mark.parametrize("parameters", ["prefix", "position", "shared"])
@pytest.mark.parametrize("kind", ["tree", "tree eos", "tree tool"])
def test_one_logit_is_the_second_of_two(parameters, kind):
    worlds = (random_world(seed, kind, parameters) for seed in range(40))
    world = next(w for w in worlds if w.mdp.n_actions == 2 and w.mdp.horizon >= 2)
    plain = oracle.Plain(world)
    mean, covariance = oracle.summed_gradient(plain, "cumulative", oracle.advantages(plain, "A_target"))
    found = gradient_moments(one_logit(world), "cumulative", covariance=True)
    assert found.mean.tolist() == mean[1::2]
    assert found.covariance.tolist() == [row[1::2] for row in covariance[1::2]]
    assert 2 * found.total_variance == sum(covariance[i][i] for i in range(len(mean)))


def test_one_logit_needs_two_tokens_and_softmax_scores():
    world = independent_tokens([F(1, 2), F(1, 2)], [F(1, 3), F(2, 3)], 2)
    with pytest.raises(ValueError, match="got 2 tokens and scores of its own"):
        one_logit(one_logit(world))
    with pytest.raises(ValueError, match=r"got 3 tokens$"):
        one_logit(random_tree(np.random.default_rng(0), n_actions=3))


def test_random_worlds_of_the_tests_are_what_their_kinds_say():
    """Guards the tests of the engines against becoming vacuous."""
    for kind in KINDS:
        some = [random_world(seed, kind) for seed in range(12)]
        assert ("tool" in kind) == any(np.any(w.mdp.kind == TOOL) for w in some)
        assert any(w.mdp.horizon >= 2 for w in some)
        assert any(np.any(w.target[w.mdp.policy_states] == 0) for w in some) == ("chain" in kind)
        stochastic = [np.any(w.mdp.edges[3] != 1) for w in some]
        assert any(stochastic) == ("chain" in kind)
        if kind.startswith("chain"):
            assert ("end" in kind) == any(np.any(w.mdp.kind == END) for w in some)
