"""Two processes against one with the same global batch: parameters, metrics by position, noise floor, rewards."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from data_parallel_ranks import ROWS, SPLITS, Case, Found, run, train

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
EXACT = 1e-10  # in float64
# In float32, where gradients are sums of about 500 tokens in another order: a few units in the last place of parameters
# of about 1, after eight steps.
SINGLE = 2e-6

# A rollout batch serves four optimizer steps, where nothing else is said.
ESTIMATORS = {
    f"{estimator}, {aggregation}": Case({"estimator": estimator, "aggregation": aggregation})
    for estimator in ("ctpo", "grpo")
    for aggregation in AGGREGATIONS
} | {name: Case({"estimator": name}) for name in ("gspo", "dppo_tv")}

SETTINGS = {
    "two steps a rollout": Case({"aggregation": "token-mean", "gradient_accumulation_steps": 2}),
    "one step a rollout": Case({"aggregation": "token-mean", "gradient_accumulation_steps": SPLITS}),
    "one step for two rollouts": Case({"gradient_accumulation_steps": 2 * SPLITS, "max_steps": 2}),
    "twice on every rollout": Case({"num_iterations": 2, "max_steps": 10}),
    "leave one out": Case({"leave_one_out": True, "scale_rewards": "none"}),
    "advantages over the batch": Case({"scale_rewards": "batch"}),
    "no truncated ones": Case({"aggregation": "token-mean", "mask_truncated_completions": True}),
    "AdamW": Case({"optim": "adamw_torch", "learning_rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.2}),
    "float32": Case({}, torch.float32),
    "float32, GRPO, token-mean": Case({"estimator": "grpo", "aggregation": "token-mean"}, torch.float32),
}

MISTAKES = {
    "tokens of the rank": Case({"aggregation": "token-mean"}, mistake="tokens of the rank"),
    "advantages of the rank": Case({"scale_rewards": "none"}, mistake="advantages of the rank"),
    "positions of the rank": Case({}, mistake="positions of the rank"),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """One thread, as the ranks; and none of the warnings of settings that make every ratio 1."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


def difference(a: Found, b: Found) -> float:
    """Largest of any parameter."""
    assert a.parameters.keys() == b.parameters.keys()
    return max((x - b.parameters[name]).abs().max().item() for name, x in a.parameters.items())


def logged(found: Found) -> list[dict[str, float]]:
    """What was logged, but for times."""
    timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{name: value for name, value in row.items() if name not in timed} for row in found.logs]


def unlike(a: Found, b: Found, tolerance: float) -> list[str]:
    """Names of the metrics that differ by more, relatively, or that only one has."""
    rows, others = logged(a), logged(b)
    assert len(rows) == len(others)
    names = set()
    for row, other in zip(rows, others, strict=True):
        names |= row.keys() ^ other.keys()
        names |= {
            name
            for name in row.keys() & other.keys()
            if not math.isclose(row[name], other[name], rel_tol=tolerance, abs_tol=tolerance)
        }
    return sorted(names)


def compared(cases: Mapping[str, Case], folder: Path) -> Iterator[tuple[str, list[Found], Found]]:
    """Of each case what the ranks have found, and one process in the ranks' order."""
    ranks = run(cases, folder)
    for name, case in cases.items():
        found = [rank[name] for rank in ranks]
        one = train(case._replace(mistake=""), folder / f"{name}, one", 1, [rank.orders for rank in found])
        yield name, found, one


@pytest.mark.parametrize("cases", [ESTIMATORS, SETTINGS], ids=["estimators", "settings"])
def test_two_processes_give_what_one_gives(cases: Mapping[str, Case], tmp_path: Path) -> None:
    for name, ranks, one in compared(cases, tmp_path):
        for a in ranks[1:]:
            assert difference(ranks[0], a) == 0.0, name
        double = cases[name].dtype == torch.float64
        assert difference(ranks[0], one) <= (EXACT if double else SINGLE), name
        # Losses are logged in float32 whatever the model is, and sums of ratios by position are in float32.
        assert not unlike(ranks[0], one, 1e-5 if double else 1e-3), name
        check_of_the_case(name, cases[name].options, one)


def check_of_the_case(name: str, options: Mapping[str, Any], one: Found) -> None:
    """The case has in it what it is there for."""
    names = set().union(*one.logs)
    assert {"position/fresh/1/tokens", "position/fresh/16/spread", "noise_floor/token", "reward"} <= names
    assert max(row.get("noise_floor/token", 0.0) for row in one.logs) > 1e-4
    assert len(one.orders) >= 2  # in the second rollout batch, the second rank has no token of the policy
    accumulated = options.get("gradient_accumulation_steps", 1)
    if accumulated < SPLITS:
        assert max(row.get("position/fresh/16/spread", 0.0) for row in one.logs) > 1e-3, name
        assert "noise_floor/share" in names
        if options.get("estimator", "ctpo") == "ctpo":
            assert any(row.get(f"clip/fresh/{bound}") for row in one.logs for bound in ("low", "high", "dual")), name
    else:
        assert all(row.get("position/fresh/16/spread", 0.0) == 0.0 for row in one.logs), name
    if "num_iterations" in options:
        assert "position/trained_on/1/tokens" in names


def test_comparison_finds_what_is_done_by_each_rank_alone(tmp_path: Path) -> None:
    """Negative controls, each with the same tolerances."""
    for name, ranks, one in compared(MISTAKES, tmp_path):
        assert difference(*ranks) == 0.0, name
        found = difference(ranks[0], one)
        if name == "positions of the rank":
            assert found <= EXACT
            differing = unlike(ranks[0], one, 1e-5)
            assert differing, name
            assert all(key.startswith(("position/", "clip/")) for key in differing)
        else:
            assert found > 1e-4, name


def test_order_of_the_rows_matters_between_updates_only(tmp_path: Path) -> None:
    """TRL orders the rows of a rollout batch on each rank by itself.

    With one optimizer step for a rollout batch (or more) the order makes no difference, so that any one process gives
    the same. With several, it decides which rows a step has, as another seed would: then one process with an order of
    its own gives something else, though not for want of exactness (see the first test).
    """
    cases = {"one": SETTINGS["one step a rollout"], "several": ESTIMATORS["ctpo, token-mean"]}
    ranks = run(cases, tmp_path)
    by_itself = {name: train(case, tmp_path / f"{name}, one", 1) for name, case in cases.items()}
    assert difference(ranks[0]["one"], by_itself["one"]) <= EXACT
    assert difference(ranks[0]["several"], by_itself["several"]) > 1e-3
    replayed = train(cases["several"], tmp_path / "replayed", 1, [rank["several"].orders for rank in ranks])
    assert difference(ranks[0]["several"], replayed) <= EXACT


def test_more_micro_batches_stand_in_for_a_process(tmp_path: Path) -> None:
    """Half the processes with twice the micro-batches a step and a rollout, instead of twice the rows in each."""
    cases = {name: ESTIMATORS[name] for name in ("ctpo, token-mean", "ctpo, seq-mean-token-mean")}
    ranks = run(cases, tmp_path)
    for name, case in cases.items():
        twice = {
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 2 * SPLITS,
            "per_device_train_batch_size": ROWS,
        }
        more = case._replace(options=dict(case.options) | twice)
        one = train(more, tmp_path / f"{name}, one", 1, [rank[name].orders for rank in ranks])
        assert difference(ranks[0][name], one) <= EXACT, name
