"""The grid of worlds: what they are, and what the summary makes of measurements."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import numpy as np
import pytest

from simulations import grid, sweep
from simulations.exact import enumerate_trajectories, objective, policy_gradient, ratio_moments
from simulations.grid import ADVANTAGES, KINDS, SHORT, SPREADS, VARIANTS, grid_world
from simulations.mdp import END, TOOL
from simulations.measure import STUDIED, Measurement

RANDOM_KINDS = [kind for kind in KINDS if kind != "transformer"]


def spread_of(world):
    """Standard deviation of log rho_H by listing every string."""
    paths = enumerate_trajectories(world)
    logs = np.log(paths.ratio).sum(axis=1)
    p = paths.behavior_probability
    return math.sqrt(float(p @ logs**2) - float(p @ logs) ** 2)


# --- worlds ---


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_worlds_spread_as_wanted_and_are_centered(kind):
    for variant, spread in ((0, 0.1), (1, 0.5), (2, 2.0)):
        world = grid_world(kind, SHORT, spread, *VARIANTS[variant], [variant])
        assert spread_of(world) == pytest.approx(spread, rel=1e-5)
        assert objective(world, "behavior") == pytest.approx(0.0, abs=1e-12)
        assert not world.mdp.reward.any()
        assert np.linalg.norm(policy_gradient(world)) > 1e-3
        assert (END in world.mdp.kind) == (kind in ("tree", "end of sequence"))
        assert (TOOL in world.mdp.kind) == (kind == "tool tokens")


def test_only_the_length_of_the_step_differs_between_spreads():
    near, far = (grid_world("bigram", SHORT, spread, "prefix", "ascent", [4]) for spread in (0.1, 1.0))
    assert np.array_equal(near.behavior, far.behavior)
    assert np.array_equal(near.mdp.outcome, far.mdp.outcome)
    steps = [np.log(world.target / world.behavior) for world in (near, far)]
    # Directions up to a constant per state, which softmax does not see.
    left, right = ((step - step.mean(axis=1, keepdims=True)).ravel() for step in steps)
    assert left @ right == pytest.approx(np.linalg.norm(left) * np.linalg.norm(right))
    other = grid_world("bigram", SHORT, 0.1, "prefix", "ascent", [5])
    assert not np.array_equal(near.behavior, other.behavior)


@pytest.mark.parametrize("kind", ["bigram", "trigram", "end of sequence", "tool tokens"])
def test_an_ascent_raises_the_return_and_shared_parameters_move_all_contexts_alike(kind):
    for parameters in ("prefix", "shared", "position"):
        world = grid_world(kind, SHORT, 0.1, parameters, "ascent", [3])
        assert objective(world, "target") > 0.0
    world = grid_world(kind, SHORT, 0.5, "shared", "random", [3])
    written = world.mdp.policy_states
    moved = np.log(world.target[written] / world.behavior[written])
    assert np.allclose(moved - moved[:, :1], (moved - moved[:, :1])[0])


def test_the_outcome_asks_for_enough_good_tokens():
    world = grid_world("bigram", SHORT, 0.5, "shared", "random", [1])
    paths = enumerate_trajectories(world)
    good = (paths.actions == 1).sum(axis=1)
    outcome = world.mdp.outcome[paths.final_state]
    least = good[outcome > outcome.min()].min()
    assert np.array_equal(outcome > outcome.min(), good >= least)
    assert outcome.max() - outcome.min() == pytest.approx(1.0)
    assert 0.2 < paths.behavior_probability @ (good >= least) < 0.9


def test_the_cold_state_of_the_sticky_world_is_on_policy():
    for step in ("ascent", "random"):
        world = grid_world("sticky hot state", SHORT, 0.5, "prefix", step, [2])
        changed = ~np.isclose(world.ratio, 1.0).all(axis=1) & world.mdp.policy_states
        hot = np.array([label.startswith("(0,)") for label in world.mdp.labels])
        assert np.array_equal(changed, hot & world.mdp.policy_states)


def test_the_transformer_is_the_recorded_one_without_its_token_rewards():
    world = grid_world("transformer", 4, 1.0, "shared", "ascent", [0])
    assert world.dimension == 196
    assert not world.mdp.reward.any()
    assert objective(world, "behavior") == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "ring"}, "kind: must be one of"),
        ({"step": "down"}, "step: must be 'ascent' or 'random', got 'down'"),
        ({"spread": 0.0}, "spread: must be > 0 nats, got 0.0"),
        ({"spread": 1e4}, "spread: 10000.0 nats cannot be reached"),
    ],
)
def test_bad_worlds_are_refused(change, message):
    options = {"kind": "bigram", "horizon": 3, "spread": 0.5, "parameters": "shared", "step": "random", "seed": [0]}
    with pytest.raises(ValueError, match=message):
        grid_world(**(options | change))


# --- the study ---


def test_tasks_are_json_and_cover_the_grid():
    for quick in (False, True):
        tasks = grid.tasks(3, quick)
        assert json.loads(json.dumps(tasks)) == tasks
        assert {task["spread"] for task in tasks.values()} == set(SPREADS)
        assert {task["horizon"] <= SHORT for task in tasks.values()} == {False, True}
    full = grid.tasks(3, False)
    assert {task["kind"] for task in full.values()} == set(KINDS)
    assert grid.tasks(4, False) != full
    # The same world at every spread.
    seeds = {key.rsplit(" spread", 1)[0]: task["seed"] for key, task in full.items()}
    assert len(seeds) * len(SPREADS) == len(full) + len(SPREADS) - 1
    assert len({json.dumps(seed) for seed in seeds.values()}) == len(seeds)


def test_every_level_is_there_without_clipping():
    found = grid.estimators()
    assert set(STUDIED) <= set(found)
    assert len(found) == len(STUDIED) + 7
    free = {e.level for e in found.values() if e.form == "unclipped" and e.max_log_ratio is None}
    wanted = {
        "token",
        "cumulative",
        "cumulative_mean",
        "sequence_mean",
        "min_prefix",
        "window",
        "lookahead",
        "sequence",
    }
    assert free == wanted


def test_one_task_measures_everything_on_one_world():
    task = grid.tasks(0, True)["bigram H=6 prefix ascent spread=0.5"]
    result = grid.one(**task)
    assert result["spread"] == pytest.approx(0.5, rel=1e-5)
    world = grid_world(**{key: value for key, value in task.items() if key != "samples"})
    assert result["sequence_ess"] == pytest.approx(float(ratio_moments(world).ess_fraction[-1]))
    rows = {(row["advantage"], row["estimator"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == len(ADVANTAGES) * len(grid.estimators())
    assert len({row["gradient_norm"] for row in rows.values()}) == 1
    assert rows["exact critic", "ctpo"]["gradient_norm"] == pytest.approx(np.linalg.norm(policy_gradient(world)))
    for advantage, unbiased in (("exact critic", True), ("critic of b", False), ("outcome reward", False)):
        assert (rows[advantage, "cumulative"]["relative_bias"] < 1e-9) == unbiased
    assert rows["outcome reward", "sequence"]["relative_bias"] < 1e-9
    json.dumps(result)


def made_up(world: str, kind: str, horizon: int, spread: float, numbers: dict[str, tuple[float, float]]) -> dict:
    """A result with given bias and noise of some estimators, the same for every advantage."""
    rows = []
    for advantage in ADVANTAGES:
        for name, (bias, noise) in numbers.items():
            row = dict.fromkeys((field.name for field in fields(Measurement)), 0.0)
            row |= {"estimator": name, "engine": "enumeration", "relative_bias": bias, "gain": 1 - bias}
            row |= {"total_variance": 4 * noise, "gradient_norm": 2.0, "advantage": advantage}
            del row["world"]
            rows.append(row)
    return {"kind": kind, "horizon": horizon, "spread": spread, "rows": rows}


def test_summary_finds_the_least_error_and_the_leads():
    nan = math.nan
    base = {"gspo": (1.0, 0.0), "ctpo": (0.5, 0.0)}
    results = {
        "a": made_up("a", "tree", 6, 0.52, {**base, "sequence": (0.0, 16.0), "grpo": (0.0, 32.0)}),
        "b": made_up("b", "tree", 6, 0.5, {**base, "sequence": (0.0, 4.0), "grpo": (0.0, 32.0)}),
        "c": made_up("c", "bigram", 64, 2.2, {**base, "sequence": (0.0, 1e6), "grpo": (nan, nan)}),
    }
    found = grid.summary(results)
    assert found["lengths"] == {"long": [64], "short": [6]}
    by = {(s["reward"], s["length"], s["spread"], s["batch"]): s for s in found["situations"]}
    assert len(by) == len(found["situations"]) == 3 * 2 * 3
    mse = by["outcome reward", "short", 0.5, 16]["mse"]
    # Errors in "a" and "b": sequence 1, 1/4; grpo 2, 2; ctpo 1/4, 1/4; gspo 1, 1.
    assert (mse["best"], mse["ties"], mse["runner_up"]) == ("ctpo", [], "sequence")
    assert mse["error"] == [0.25, 0.25, 0.25]
    assert (mse["unbiased"], mse["bias"], mse["least_in"]) == (False, 0.5, 2)
    assert mse["runner_up_times"] == pytest.approx(2.0)  # geometric mean of 4 and 1
    assert mse["times"] == {"ctpo": 1.0, "grpo": pytest.approx(8.0), "gspo": pytest.approx(4.0)}
    mse = by["outcome reward", "short", 0.5, 4096]["mse"]
    assert (mse["best"], mse["unbiased"], mse["bias"], mse["runner_up"]) == ("sequence", True, 0.0, "grpo")
    assert mse["times"]["grpo"] == pytest.approx(4.0, rel=1e-3)
    assert mse["times_range"]["grpo"] == pytest.approx([2.0, 8.0], rel=1e-3)
    # Half the gradient, without noise: nothing is left once the step has its best length.
    direction = by["outcome reward", "short", 0.5, 16]["direction"]
    assert direction["best"] == "ctpo"
    assert direction["error"][0] == 0.0
    # What cannot be told takes no part.
    far = by["exact critic", "long", 2.0, 4096]["mse"]
    assert (far["best"], far["times"]["grpo"]) == ("ctpo", None)
    lines = [line.split(",") for line in found["rows"]]
    assert {len(line) for line in lines} == {len(found["columns"])}
    (line,) = [x for x in lines if x[:2] == ["outcome reward", "tree"] and x[5] == "sequence"]
    assert line[:7] == ["outcome reward", "tree", "6", "0.5", "2", "sequence", "enumeration"]
    assert [float(x) for x in line[10:13]] == [10.0, 4.0, 16.0]
    assert {row["least MSE"] for row in found["tables"][1]["rows"]} == {"ctpo", "sequence"}


def test_ties_are_named_and_what_helps_nobody_is_said():
    numbers = {"ctpo": (0.0, 32.0), "grpo": (0.0, 32.1), "gspo": (0.0, 64.0), "sequence": (0.0, 33.0)}
    found = grid.summary({"a": made_up("a", "tree", 6, 1.0, numbers)})
    small, middle, _ = (s["mse"] for s in found["situations"][:3])
    assert (small["best"], small["ties"], small["runner_up"]) == ("ctpo", ["grpo"], "sequence")
    assert middle["error"][0] == pytest.approx(32 / 256)
    note = found["tables"][0]["note"]
    assert "Outcome reward: least MSE, or within 2% of it, of 3 situations: ctpo in 3, grpo in 3." in note
    assert "At spread/batch 1/16 even the least MSE is typically above that of no step at all." in note


def test_the_quick_study_runs_and_writes_its_tables(tmp_path, monkeypatch):
    tasks = {key: task for key, task in grid.tasks(0, True).items() if task["horizon"] == SHORT}
    monkeypatch.setitem(vars(grid.STUDY), "tasks", lambda _seed, _quick: tasks)
    data = sweep.run(grid.STUDY, tmp_path, quick=True)
    written = json.loads((tmp_path / "grid.json").read_text())
    assert written["situations"][0]["worlds"] == 4
    assert len(written["rows"]) == 2 * len(SPREADS) * len(ADVANTAGES) * len(grid.estimators())
    assert data["tables"][0]["title"].startswith("Which ratio, when")
    exact = [s for s in written["situations"] if s["reward"] == "exact critic" and s["batch"] == 4096]
    assert {s["mse"]["unbiased"] for s in exact} == {True}
