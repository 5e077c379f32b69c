"""The search for counterexamples: its numbers against plain recursion, and what it must and must not find."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from ast import literal_eval
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path

import oracle_worlds as oracle
import pytest

from simulations import counterexamples, sweep
from simulations.counterexamples import SIZES, STATEMENTS, Family, SmallWorld, Statement, search

F = Fraction
FALSE = [name for name, statement in STATEMENTS.items() if not statement.holds]
TRUE = [name for name, statement in STATEMENTS.items() if statement.holds]


# --- the numbers of each statement, by recursion --------------------------------------------------------------------


def root(value, degree):
    """The root of a fraction that has a rational one."""
    found = F(round(value.numerator ** (1 / degree)), round(value.denominator ** (1 / degree)))
    assert found**degree == value
    return found


def every_string(plain):
    """(probability under b, under pi, tokens, ratios, return) of every stream."""
    for p0, last, moves in oracle.streams(plain):
        tokens = oracle.policy_tokens(plain, moves)
        yield (
            p0 * oracle.probability(plain, moves, plain.b),
            p0 * oracle.probability(plain, moves, plain.pi),
            tokens,
            [r for *_, r in tokens],
            oracle.earned(plain, last, moves),
        )


def estimates(plain, weight, advantage, places):
    """(probability, vector over places) of every stream: sum_t w_t A_t (a_t - pi(1)) at the place of token t."""
    for probability, _, tokens, ratios, earned in every_string(plain):
        vector = [F(0)] * len(set(places.values()))
        for t, (step, s, a, _) in enumerate(tokens):
            value = earned if advantage == "outcome" else advantage(step, s, a)
            vector[places[s]] += weight(ratios, t, value) * value * (a - plain.pi[s][1])
        yield probability, vector


def mean(plain, *arguments):
    found = [[p * x for x in vector] for p, vector in estimates(plain, *arguments)]
    return [sum(column) for column in zip(*found, strict=True)]


def covariance(plain, *arguments):
    centre = mean(plain, *arguments)
    rows = list(estimates(plain, *arguments))
    d = range(len(centre))
    return [[sum(p * v[i] * v[j] for p, v in rows) - centre[i] * centre[j] for j in d] for i in d]


def gradient(plain, places):
    total = [F(0)] * len(set(places.values()))
    for _, probability, tokens, _, earned in every_string(plain):
        for _, s, a, _ in tokens:
            total[places[s]] += probability * earned * (a - plain.pi[s][1])
    return total


def level(name):
    if name == "sequence_mean":
        return lambda ratios, t, _: root(oracle.product(ratios), len(ratios))
    if name == "cumulative_mean":
        return lambda ratios, t, _: root(oracle.product(ratios[: t + 1]), t + 1)
    return lambda ratios, t, _: oracle.weight(name, ratios, t)


def clipped(ratios, t, value):
    rho = oracle.product(ratios[: t + 1])
    return 0 if (value > 0 and rho > F(13, 10)) or (value < 0 and rho < F(7, 10)) else rho


def first_only(weight):
    return lambda ratios, t, value: weight(ratios, t, value) if t == 0 else 0


def falls(values):
    return next(((x, y) for x, y in pairwise(values) if x > y), tuple(values[-2:]))


def expected_sides(name, world, places):
    """The numbers of a statement: scalars where there is one place, else tuples."""
    plain = oracle.Plain(world)
    exact = oracle.advantages(plain, "A_target")
    grad = gradient(plain, places)

    def both(found):
        return tuple(x[0] if len(x) == 1 else tuple(x) for x in (found, grad))

    if name in ("prefix_outcome", "sequence_outcome"):
        which = "cumulative" if name == "prefix_outcome" else "sequence"
        return both(mean(plain, level(which), "outcome", places))
    if name in ("token", "gspo", "cumulative_mean", "prop1"):
        which = {"token": "token", "gspo": "sequence_mean", "prop1": "cumulative"}.get(name, name)
        return both(mean(plain, level(which), exact, places))
    if name == "clip":
        return both(mean(plain, clipped, exact, places))
    if name == "standardized":
        strings = [(p, tokens, earned) for p, _, tokens, _, earned in every_string(plain)]
        total = F(0)
        for (p, tokens, mine), (q, _, other) in product(strings, repeat=2):
            total += p * q * ((mine > other) - (mine < other)) * sum(a - plain.pi[s][1] for _, s, a, _ in tokens)
        return both([total])
    if name == "length":
        rows = [(p, tokens, earned) for p, _, tokens, _, earned in every_string(plain)]
        return both([sum(p * r / len(ts) * sum(a - plain.pi[s][1] for _, s, a, _ in ts) for p, ts, r in rows)])
    if name in ("summed_order", "direction_order", "trace_order_prefix", "trace_order_position"):
        some = [covariance(plain, level(which), exact, places) for which in ("cumulative", "sequence")]
        if name == "direction_order":
            return tuple(sum(map(sum, c)) for c in some)
        return tuple(sum(c[i][i] for i in range(len(c))) for c in some)
    if name in ("term_order", "term_order_outcome"):
        value = exact if name == "term_order" else "outcome"
        which = ("cumulative", "sequence")
        return tuple(covariance(plain, first_only(level(w)), value, places)[0][0] for w in which)
    moments = oracle.ratio_moments(plain)
    if name == "martingale":
        return tuple(moments["mean"][1:]), (1,) * plain.horizon
    if name == "variance":
        return falls([s - m * m for s, m in zip(moments["second"], moments["mean"], strict=True)][1:])
    if name == "product":
        return moments["second"][-1], oracle.product(1 + c for c in moments["marginal"])
    assert name == "log_variance"
    return moments["var_log"][1:]


def places_of(small):
    """Index of the logit of each state."""
    mdp = small.world().mdp
    depth = {s: len(literal_eval(label)) for s, label in enumerate(mdp.labels)}
    if small.family.parameters == "shared":
        return dict.fromkeys(depth, 0)
    if small.family.parameters == "position":
        return {s: min(d, small.horizon - 1) for s, d in depth.items()}
    return {s: s for s in depth}


def some_worlds(family, count, seed=0):
    rng = random.Random(seed)
    for k in range(count):
        size = SIZES[k % len(SIZES)]
        if size.horizon > family.longest:
            continue
        pairs = counterexamples.probability_pairs(family, size.denominator)
        rewards = [rng.choice((0, 1, -1, 2)) for _ in counterexamples.strings(family, size.horizon)]
        chosen = [rng.choice(pairs) for _ in counterexamples.places(family, size.horizon)]
        yield SmallWorld(family, size.horizon, tuple(chosen), tuple(rewards))


@pytest.mark.parametrize("name", STATEMENTS)
def test_numbers_of_a_statement(name):
    statement = STATEMENTS[name]
    for small in some_worlds(statement.family, 14):
        world = small.world()
        expected = expected_sides(name, world, places_of(small))
        if name == "log_variance":  # the oracle has natural logarithms
            values = [v / math.log(2) ** 2 for v in expected]
            drop = next((k for k, (x, y) in enumerate(pairwise(values)) if y < x - 1e-9), len(values) - 2)
            assert [float(x) for x in statement.sides(world)] == pytest.approx(values[drop : drop + 2], abs=1e-12)
        else:
            assert statement.sides(world) == expected
        assert statement.confirmed(world)


# --- small worlds ---------------------------------------------------------------------------------------------------


def test_small_world_is_as_drawn():
    family = Family("prefix", eos=True)
    assert counterexamples.strings(family, 2) == [(0,), (1, 0), (1, 1)]
    assert counterexamples.places(family, 2) == ["token 1", "after 1"]
    small = SmallWorld(family, 2, ((F(1, 3), F(1, 2)), (F(1, 4), F(3, 4))), (0, 1, -1))
    plain = oracle.Plain(small.world())
    found = {
        tuple(a for _, _, a, _, _ in moves): (
            oracle.probability(plain, moves, plain.b),
            oracle.probability(plain, moves, plain.pi),
            oracle.earned(plain, last, moves),
        )
        for _, last, moves in oracle.streams(plain)
    }
    assert found == {
        (0,): (F(2, 3), F(1, 2), 0),
        (1, 0): (F(1, 4), F(1, 8), 1),
        (1, 1): (F(1, 12), F(3, 8), -1),
    }
    assert small.describe() == {
        "tokens": 2,
        "policies": {"token 1": {"b(1)": "1/3", "pi(1)": "1/2"}, "after 1": {"b(1)": "1/4", "pi(1)": "3/4"}},
        "rewards": {"10": "1", "11": "-1"},
    }


def test_places_of_each_sharing():
    assert counterexamples.places(Family("shared"), 3) == ["every token"]
    assert counterexamples.places(Family("position"), 3) == ["token 1", "token 2", "token 3"]
    assert counterexamples.places(Family("prefix"), 2) == ["token 1", "after 0", "after 1"]
    assert counterexamples.strings(Family(), 2) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_probabilities_of_each_kind():
    pairs = counterexamples.probability_pairs(Family(), 3)
    assert pairs[0] == (F(1, 2), F(1, 2))
    assert set(pairs) == set(product((F(1, 2), F(1, 3), F(2, 3)), repeat=2))
    sizes = [max(b.denominator, p.denominator) for b, p in counterexamples.probability_pairs(Family(), 5)]
    assert sizes == sorted(sizes)
    assert len(sizes) == 9**2
    equal = counterexamples.probability_pairs(Family(pairs="equal"), 4)
    assert equal == [(x, x) for x in (F(1, 2), F(1, 3), F(2, 3), F(1, 4), F(3, 4))]
    for kind, ratios in (("powers", {1, 2, F(1, 2), 4, F(1, 4)}), ("squares", {1, 4, F(1, 4)})):
        found = counterexamples.probability_pairs(Family(pairs=kind), 5)
        assert {p / b for b, p in found} | {(1 - p) / (1 - b) for b, p in found} == ratios


# --- the search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FALSE)
def test_false_statements_are_broken(name):
    statement = STATEMENTS[name]
    found = search(statement, examples=300)
    assert found.example is not None
    left, right = expected_sides(name, found.example.world(), places_of(found.example))[:2]
    assert {"<=": left > right, "=": left != right, "same sign": left * right < 0}[statement.relation]
    assert found.example.horizon == 2
    assert all(value.denominator <= 5 for pair in found.example.pairs for value in pair)


@pytest.mark.parametrize("name", TRUE)
def test_true_statements_are_not(name):
    """The search's negative control."""
    found = search(STATEMENTS[name], examples=12)
    assert found.example is None
    assert found.tried > 40


def made_up(sides, family=None, **changes):
    statement = Statement("Made up.", False, "x", "=", "y", family or Family("prefix"), sides, sides)
    return replace(statement, **changes)


def test_what_is_found_is_shrunk():
    """Policies differ somewhere: one place is enough, and the simplest pair there is."""

    def sides(world):
        writes = world.mdp.policy_states
        return tuple(world.behavior[writes, 1]), tuple(world.target[writes, 1])

    found = search(made_up(sides), examples=50)
    assert found.example is not None
    assert found.example.rewards == (0, 0, 0, 0)
    assert sorted(b != p for b, p in found.example.pairs) == [False, False, True]
    assert max(value.denominator for pair in found.example.pairs for value in pair) == 3


def test_small_sizes_come_first():
    long = search(made_up(lambda world: (world.mdp.horizon, 2)), examples=3)
    assert long.example is not None
    assert long.example.horizon == 3
    assert max(value.denominator for pair in long.example.pairs for value in pair) == 2
    assert search(made_up(lambda world: (world.mdp.horizon, 2), Family(longest=2)), examples=3).example is None

    def rewarded(world):
        return sum(world.mdp.outcome != 0), 0

    found = search(made_up(rewarded, relation="<="), examples=20)
    assert found.example is not None
    assert sorted(found.example.rewards) == [0, 0, 0, 1]
    assert set(found.example.pairs) == {(F(1, 2), F(1, 2))}


def test_same_seed_same_answer():
    statement = STATEMENTS["token"]
    assert search(statement, seed=3, examples=40) == search(statement, seed=3, examples=40)
    assert len({search(statement, seed=k, examples=40).tried for k in range(3)}) > 1


def test_relations():
    assert made_up(lambda _: (2, 1), relation="<=").broken(None)
    assert not made_up(lambda _: (1, 1), relation="<=").broken(None)
    assert made_up(lambda _: ((1, 2), (1, 3))).broken(None)
    assert not made_up(lambda _: ((1, 2), (1, 2))).broken(None)
    assert [made_up(lambda _, x=x: (x, -1), relation="same sign").broken(None) for x in (1, 0, -1)] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("again", [(F(1, 3), F(1)), (F(1, 2), 1.0 + 1e-6), ((F(1, 2), F(0)), F(1))])
def test_a_second_engine_that_disagrees_is_not_ignored(again):
    statement = made_up(lambda _: (F(1, 2), F(1)), again=lambda _: again)
    with pytest.raises((ArithmeticError, ValueError), match=r"by another engine|zip"):
        counterexamples.describe(statement, next(some_worlds(Family(), 1)))


def test_no_files_are_written(tmp_path):
    code = (
        "from simulations.counterexamples import STATEMENTS, search\n"
        "print(search(STATEMENTS['token'], examples=20).tried)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    assert int(done.stdout) > 10
    assert list(tmp_path.iterdir()) == []


# --- the study ------------------------------------------------------------------------------------------------------


def test_study(tmp_path):
    names = ["summed_order", "product", "martingale"]
    tasks = counterexamples.STUDY.tasks(5, True)
    assert list(tasks) == list(STATEMENTS)
    small = {name: {**tasks[name], "examples": 15} for name in names}
    data = sweep.run(replace(counterexamples.STUDY, tasks=lambda *_: small), tmp_path, seed=5, quick=True)
    assert data["as_expected"]
    assert json.loads((tmp_path / "search.json").read_text())["statements"] == data["statements"]
    broken, unbroken = (table["rows"] for table in data["tables"])
    assert [row["statement"] for row in broken] == [STATEMENTS[name].text for name in names[:2]]
    assert [row["theorem"] for row in unbroken] == ["yes"]
    found = data["statements"]["summed_order"]["counterexample"]
    assert F(found["left"]["value"]) > F(found["right"]["value"])
    assert (
        broken[0]["found"]
        == f"variance under rho_t {found['left']['value']}, variance under rho_H {found['right']['value']}"
    )


def test_summary_says_what_was_not_expected():
    missed = {"statement": "S", "holds": False, "tried": 3, "as_expected": False, "counterexample": None}
    data = counterexamples.summary({"s_t": missed})
    assert not data["as_expected"]
    assert data["tables"][1]["rows"] == [{"name": "s t", "statement": "S", "theorem": "NO", "worlds tried": 3}]


def test_words():
    small = SmallWorld(Family("position"), 2, ((F(1, 2), F(1, 2)), (F(1, 3), F(1, 2))), (0, 1, 0, -1))
    found = counterexamples.describe(STATEMENTS["direction_order"], small)
    assert counterexamples.in_words(found)["world"] == (
        "token 1: b(1) = pi(1) = 1/2; token 2: b(1) = 1/3, pi(1) = 1/2; R(01) = 1, R(11) = -1, else 0"
    )
    nothing = {**found, "rewards": {}}
    assert counterexamples.in_words(nothing)["world"].endswith("; no rewards")
