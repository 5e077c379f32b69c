"""The phase diagram: its worlds and errors against plain loops over all strings, its winners by hand."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest

from simulations import phase_diagram as phase
from simulations import sweep
from simulations.exact import objective, ratio_moments

N = phase.TOKENS


def reward(world, string):
    """The reward of a string, before it is centered."""
    return float(0 not in string) if world == "solve" else sum(token == N - 1 for token in string) / len(string)


def rows(world, policy):
    """Next-token probabilities of the start (first row) and after each token, read off a world."""
    mdp = world.mdp
    state, _, nxt, _ = mdp.edges
    start = int(np.flatnonzero(mdp.initial)[0])
    found = {0: policy[start]}
    for s, a, s2 in zip(state, mdp.edges[1], nxt, strict=True):
        del s
        found.setdefault(1 + int(a), policy[s2])
    return [list(map(float, found[k])) for k in range(N + 1)]


def strings(world, kind, horizon):
    """(string, P_b, P_pi, token ratios, summed score per logit of each token, centered reward) of every string."""
    b, pi = rows(world, world.behavior), rows(world, world.target)
    listed = []
    for string in product(range(N), repeat=horizon):
        contexts = [0, *(1 + a for a in string[:-1])]
        pb = [b[c][a] for c, a in zip(contexts, string, strict=True)]
        pp = [pi[c][a] for c, a in zip(contexts, string, strict=True)]
        scores = np.zeros((horizon, N + 1, N))
        for t, (c, a) in enumerate(zip(contexts, string, strict=True)):
            scores[t, c] -= pi[c]
            scores[t, c, a] += 1
        ratios = [y / x for x, y in zip(pb, pp, strict=True)]
        listed.append((string, math.prod(pb), math.prod(pp), ratios, scores.reshape(horizon, -1)))
    mean = sum(p * reward(kind, s) for s, p, *_ in listed)
    return [(*entry, reward(kind, entry[0]) - mean) for entry in listed]


def weight(name, ratios, t):
    return {
        "no ratio": lambda: 1.0,
        "token": lambda: ratios[t],
        "window 4": lambda: math.prod(ratios[max(0, t - 3) : t + 1]),
        "cumulative": lambda: math.prod(ratios[: t + 1]),
        "lookahead 4": lambda: math.prod(ratios[: t + 5]),
        "sequence": lambda: math.prod(ratios),
    }[name]()


# --- worlds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["solve", "score"])
@pytest.mark.parametrize("horizon", [1, 3, 5])
def test_the_reward_is_that_of_the_string(kind, horizon):
    world = phase.make_world(kind, horizon, 0.01, np.random.default_rng(1))
    b, pi = rows(world, world.behavior), rows(world, world.target)
    for policy, who in ((b, "behavior"), (pi, "target")):
        expected = sum(
            reward(kind, s) * math.prod(policy[c][a] for c, a in zip([0, *(1 + x for x in s[:-1])], s, strict=True))
            for s in product(range(N), repeat=horizon)
        )
        base = sum(
            reward(kind, s) * math.prod(b[c][a] for c, a in zip([0, *(1 + x for x in s[:-1])], s, strict=True))
            for s in product(range(N), repeat=horizon)
        )
        assert objective(world, who) == pytest.approx(expected - base, abs=1e-12)
        if kind == "solve":
            assert base == pytest.approx(phase.SOLVED, abs=1e-8)


@pytest.mark.parametrize("kind", ["solve", "score"])
@pytest.mark.parametrize("divergence", [3e-5, 1e-2, 0.1])
def test_the_divergence_is_that_of_the_log_ratio(kind, divergence):
    for horizon in (2, 64):
        world = phase.make_world(kind, horizon, divergence, np.random.default_rng(2))
        assert -ratio_moments(world).mean_log[-1] / horizon == pytest.approx(divergence, rel=1e-6)


def test_models_are_the_same_at_every_horizon_and_divergence():
    made = [
        phase.make_world("score", horizon, divergence, np.random.default_rng(3))
        for horizon, divergence in ((2, 1e-3), (8, 1e-3), (8, 0.1))
    ]
    b = [rows(world, world.behavior) for world in made]
    assert b[0] == b[1] == b[2]
    assert rows(made[1], made[1].target) != rows(made[2], made[2].target)


def test_half_of_the_step_is_along_the_gradient():
    """Its part along the ascent direction is 1 plus the noise's own, each half having norm 1."""
    kind, horizon, seed = "solve", 4, 4
    logits, noise = np.random.default_rng(seed).standard_normal((2, N + 1, N))
    del logits
    world = phase.make_world(kind, horizon, 1e-3, np.random.default_rng(seed))
    b, pi = np.array(rows(world, world.behavior)), np.array(rows(world, world.target))
    listed = strings(phase.replace(world, target=world.behavior), kind, horizon)
    ascent = sum(p * r * scores.sum(axis=0) for _, p, _, _, scores, r in listed).reshape(N + 1, N)
    direction = ascent / np.linalg.norm(ascent) + noise / np.linalg.norm(noise)
    moved = np.log(pi / b)  # the step, up to a constant in every row
    moved -= moved.mean(axis=1, keepdims=True)
    direction -= direction.mean(axis=1, keepdims=True)
    size = (moved * direction).sum() / (direction**2).sum()
    np.testing.assert_allclose(moved, size * direction, atol=1e-8)
    assert size > 0


def test_occupancy_counts_contexts():
    b = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
    horizon, expected = 3, np.zeros(4)
    for string in product(range(3), repeat=horizon):
        contexts = [0, *(1 + a for a in string[:-1])]
        mass = math.prod(b[c][a] for c, a in zip(contexts, string, strict=True))
        for c in contexts:
            expected[c] += mass / horizon
    np.testing.assert_allclose(phase.occupancy(b, horizon), expected)


def test_unknown_world_is_refused():
    with pytest.raises(ValueError, match="world: must be 'solve' or 'score', got 'chess'"):
        phase.process("chess", 3)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["solve", "score"])
def test_errors_of_products_by_plain_loops(monkeypatch, kind):
    """Bias^2 + Var / n of every product with the outcome, over all strings of six tokens."""
    horizon, divergence, seed = 6, 0.03, [9, 9]
    monkeypatch.setattr(phase, "BATCHES", (8, 4096))
    found = phase.one(kind, horizon, [divergence], seed, named=False)
    name = {"solve": "solved", "score": "score"}[kind]
    cells = {row["batch"]: row["error"] for row in found["rows"] if row["reward"] == name}
    world = phase.make_world(kind, horizon, divergence, np.random.default_rng(seed))
    listed = strings(world, kind, horizon)
    gradient = sum(q * r * scores.sum(axis=0) for _, _, q, _, scores, r in listed)
    for estimator in phase.PRODUCTS:
        mean, square = 0.0, 0.0
        for _, p, _, ratios, scores, r in listed:
            y = sum(weight(estimator, ratios, t) * r * scores[t] for t in range(horizon))
            mean, square = mean + p * y, square + p * float(y @ y)
        bias, variance = float((mean - gradient) @ (mean - gradient)), square - float(mean @ mean)
        for batch in (8, 4096):
            expected = (bias + variance / batch) / float(gradient @ gradient)
            assert cells[batch][estimator] == pytest.approx(expected, rel=1e-7), estimator


def test_critics_share_the_gradient_of_the_outcome(monkeypatch):
    """With exact critics the error of a large batch is the squared bias: none for A^pi under the cumulative ratio."""
    monkeypatch.setattr(phase, "BATCHES", (10**12,))
    found = phase.one("solve", 16, [0.03], [1], named=False)["rows"]
    errors = {row["reward"]: row["error"] for row in found}
    assert set(errors) == {"solved", "critic of the target", "critic of the behavior"}
    for reward_, unbiased in (("solved", {"sequence"}), ("critic of the target", {"cumulative", "sequence"})):
        for name, error in errors[reward_].items():
            late = reward_ == "critic of the target" and name == "lookahead 4"
            assert (error < 1e-6) is (name in unbiased or late), (reward_, name)
    assert min(errors["critic of the behavior"].values()) > 1e-6


def test_named_estimators_are_all_there():
    found = phase.one("solve", 3, [0.01], [1], named=True)
    names = set(found["rows"][0]["error"])
    assert set(phase.PRODUCTS) <= names
    assert {"grpo", "gspo", "ctpo", "ctpo_mean", "minpro", "cispo", "dapo", "ctpo_fixed"} <= names
    assert {row["batch"] for row in found["rows"]} == set(phase.SHORT_BATCHES)
    assert all(math.isfinite(x) for row in found["rows"] for x in row["error"].values())


# --- winners --------------------------------------------------------------------------------------------------------


def test_the_winner_has_the_least_median():
    measured = [
        {"error": {"a": a, "b": b, "c": c}, "direction": {"a": c, "b": b, "c": a}}
        for a, b, c in ((1.0, 2.0, 9.0), (2.0, 1.0, 9.0), (3.0, 6.0, 4.5))
    ]
    found = phase.cell("solved", 8, 0.1, 256, measured)
    assert found["error"] == {"a": 2.0, "b": 2.0, "c": 9.0}
    assert found["winner"] == "a"  # of equals the first
    assert found["share"] == pytest.approx(2 / 3)
    assert found["margin"] == 1.5  # of 2, 1/2 and 3/2
    assert found["by_direction"] == "b"
    assert (found["models"], found["horizon"], found["batch"]) == (3, 8, 256)


def test_equal_to_rounding_is_equal():
    assert phase.best({"a": 1.0 + 1e-12, "b": 1.0, "c": 2.0}) == "a"
    assert phase.best({"a": 1.0 + 1e-6, "b": 1.0, "c": 2.0}) == "b"


def test_the_study_runs_and_says_who_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(phase, "HORIZONS", (4, 5, 6, 7))
    monkeypatch.setattr(phase, "SHORT", 3)
    tasks = phase.tasks(0, True)
    assert len(tasks) == 2 * 2 * 4
    json.dumps(tasks)
    data = sweep.run(phase.STUDY, tmp_path, quick=True)
    assert json.loads((tmp_path / "phase.json").read_text())["diagram"] == data["diagram"]
    divergences = 3
    assert len(data["diagram"]) == len(phase.KINDS) * 3 * divergences * len(phase.BATCHES)
    assert len(data["named"]) == len(phase.KINDS) * divergences * len(phase.SHORT_BATCHES)
    assert {entry["winner"] for entry in data["diagram"]} <= set(data["estimators"])
    for entry in data["diagram"]:
        assert entry["error"][entry["winner"]] == pytest.approx(min(entry["error"].values()))
        assert 0 <= entry["share"] <= 1
    titles = [table["title"] for table in data["tables"]]
    assert len(titles) == len(phase.KINDS) + 2
    assert all(table["rows"] for table in data["tables"])
    assert [row["horizon"] for row in data["tables"][0]["rows"]] == [4, 5, 6]


def test_tasks_do_not_depend_on_one_another():
    full = phase.tasks(3, False)
    assert len(full) == 2 * phase.MODELS * (len(phase.HORIZONS) + 1)
    seeds = {tuple(task["seed"]) for task in full.values()}
    assert len(seeds) == 2 * phase.MODELS
    assert all(seed[0] == 3 for seed in seeds)
