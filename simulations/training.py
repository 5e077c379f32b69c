"""The toy training study: which estimator learns most, by problem and staleness, and how far they can be told apart.

For each problem of `simulations.learning`, staleness and method, learning rate and width of the clip window are
chosen on tuning seeds, by the mean share of the optimum over training; then the method is trained on evaluation
seeds of its own. Everything else is the same for all: plain stochastic gradient ascent (so that a step is the
estimated gradient and nothing else, and its angle to the true gradient means something), number of updates, and
fresh responses per update. At staleness K a round of K disjoint mini-batches is sampled before its first update:
the same updates and as many samples as on-policy, only older. The variations reuse fewer samples in epochs,
enlarge the mini-batch, or divide advantages by their group's standard deviation.

The windows were published for language models, whose policies move far less in an update than these small ones.
So their logarithms are multiplied by a width that is tuned like the learning rate; the table of windows says what
the published ones give.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import scipy.stats

from simulations.learning import (
    METHODS,
    ON_POLICY,
    PROBLEMS,
    Critic,
    Estimated,
    History,
    Schedule,
    build,
    draw,
    estimated_gradient,
    log_softmax,
    measurements,
    train,
)
from simulations.mdp import softmax
from simulations.sweep import Study

# --- the tasks -----------------------------------------------------------------------------------------------

#: Learning rates tried, as multiples of the problem's.
RATES = (1 / 27, 1 / 9, 1 / 3, 1.0, 3.0, 9.0)
#: Widths of the window tried, as multiples of the published logarithmic bounds.
WIDTHS = (1.0, 4.0, 16.0, 64.0)
STALENESS = (1, 4, 16, 64)
#: Every 5th update is compared with the true gradient: 5 meets every age of a round.
MEASURE_EVERY = 5
#: The true gradient means little once there is nothing left to learn.
LEARNING_BELOW = 0.9
#: Methods of the variations.
VARIED = ("reinforce", "grpo", "gspo", "ctpo", "sequence", "dr_behavior")
#: Variations of the schedule at staleness 16, and the problems they are tried on.
VARIATIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "epochs 4": {"epochs": 4},
        "epochs 16": {"epochs": 16},
        "8 prompts": {"prompts": 8, "updates": 256},
        "std": {"scale_by_std": True},
    }
)
VARIED_ON = ("exam", "plan")


def tasks(seed: int, quick: bool) -> dict[str, dict[str, Any]]:
    """The tasks of the study, see `sweep.Study`."""
    names, stale = (("plan", "items"), (1, 16)) if quick else (tuple(PROBLEMS), STALENESS)
    size = {"updates": 128, "seeds": 8, "tuning_seeds": 2} if quick else {"seeds": 48, "tuning_seeds": 8}
    found: dict[str, dict[str, Any]] = {}
    for name, staleness in itertools.product(names, stale):
        for method in ON_POLICY if staleness == 1 else METHODS:
            key = f"{name} {staleness} {method}"
            found[key] = {"problem": name, "method": method, "staleness": staleness, "seed": seed, **size}
    for (variation, changes), name in itertools.product(VARIATIONS.items(), VARIED_ON):
        for method in VARIED:
            if quick or (variation == "std" and METHODS[method].critic):
                continue
            key = f"{name} 16 {method}, {variation}"
            found[key] = {
                "problem": name,
                "method": method,
                "staleness": 16,
                "seed": seed,
                **size,
                **changes,
                "variation": variation,
            }
    for name in names:
        found[f"{name} gradients"] = {"problem": name, "batches": 128 if quick else 512, "seed": seed}
    return found


def one(**task: Any) -> dict[str, Any]:
    """Do one task of the study: tune and train, or compare gradients."""
    return compare_gradients(**task) if "batches" in task else tune_and_train(**task)


def streams(seed: int, phase: Literal["tuning", "evaluation", "gradients"], n: int) -> list[np.random.Generator]:
    """Independent streams, the same for every method; those of different phases have nothing in common."""
    number = ("tuning", "evaluation", "gradients").index(phase)
    return [np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number, k))) for k in range(n)]


def tune_and_train(
    *,
    problem: str,
    method: str,
    staleness: int,
    seed: int,
    seeds: int,
    tuning_seeds: int,
    variation: str = "",
    **schedule: Any,
) -> dict[str, Any]:
    """Choose learning rate and window on tuning seeds, then train on the evaluation seeds.

    Args:
        problem: Name in `PROBLEMS`.
        method: Name in `METHODS`.
        staleness: K.
        seed: Root of all randomness.
        seeds: Runs of the evaluation.
        tuning_seeds: Runs for each learning rate and width.
        variation: Name in `VARIATIONS`, or empty.
        **schedule: Other fields of `Schedule`.

    Returns:
        The choice, the learning curve with a pointwise 95% t interval over the evaluation seeds, each seed's mean
        and final share of the optimum, and what was measured along the way.
    """
    task, chosen = build(problem), METHODS[method]
    course = Schedule(staleness=staleness, **schedule)
    rates = np.array(RATES) * task.rate
    widths = WIDTHS if chosen.estimator.clip is not None else (1.0,)
    score = np.empty((len(widths), len(rates)))
    for row, width in zip(score, widths, strict=True):
        generators = [stream for _ in rates for stream in streams(seed, "tuning", tuning_seeds)]
        tried = train(task, chosen, course, generators, np.repeat(rates, tuning_seeds), width=width)
        row[:] = tried.share.mean(axis=0).reshape(len(rates), tuning_seeds).mean(axis=1)
    i, j = np.unravel_index(score.argmax(), score.shape)

    def evaluate(width: float, rate: float) -> dict[str, Any]:
        found = train(
            task,
            chosen,
            course,
            streams(seed, "evaluation", seeds),
            np.full(seeds, rate),
            width=width,
            measure_every=MEASURE_EVERY,
        )
        late = max(1, course.checkpoints // 8)
        return {
            "rate": rate,
            "width": width,
            "mean_share": _round(found.share.mean(axis=0)),
            "final_share": _round(found.share[-late:].mean(axis=0)),
            "curve": _curve(found.share),
            **_along(found, course),
        }

    result = {
        "problem": problem,
        "method": method,
        "staleness": staleness,
        "variation": variation,
        "updates": course.at.tolist(),
        "tuning": {"rates": rates.tolist(), "widths": list(widths), "mean_share": _round(score)},
        "rate_at_edge": bool(j in (0, len(rates) - 1)),
        "best": evaluate(widths[i], float(rates[j])),
    }
    if i > 0:
        published = evaluate(widths[0], float(rates[score[0].argmax()]))
        result["published"] = {key: published[key] for key in ("rate", "mean_share", "final_share")}
    return result


def _along(found: History, schedule: Schedule) -> dict[str, Any]:
    """Means over the runs' measured updates while they were learning, and the cosine by quarter of the round."""
    per_checkpoint = schedule.updates // schedule.checkpoints
    learning = found.share[found.measured // per_checkpoint] < LEARNING_BELOW
    quarter = found.measured % schedule.staleness * 4 // schedule.staleness

    def mean(values: np.ndarray, where: np.ndarray) -> float | None:
        where = where & np.isfinite(values)
        return round(float(values[where].mean()), 5) if where.any() else None

    by_quarter = [mean(found.cosine, learning & (quarter == k)[:, None]) for k in range(min(4, schedule.staleness))]
    return {
        "cosine": mean(found.cosine, learning),
        "cosine_by_quarter": by_quarter,
        "zero_gradient": mean(np.isnan(found.cosine).astype(float), learning),
        "clipped": mean(found.clipped, learning),
        "ess_sequence": mean(found.ess_sequence, learning),
        "ess_weight": mean(found.ess_weight, learning),
    }


def _curve(share: np.ndarray) -> dict[str, list[float]]:
    """Mean over the runs (columns) and its pointwise 95% t interval."""
    mean, half = _interval(share)
    return {"mean": _round(mean), "low": _round(mean - half), "high": _round(mean + half)}


def _interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the last axis and half the width of its 95% t interval."""
    n = values.shape[-1]
    half = scipy.stats.t.ppf(0.975, n - 1) * values.std(axis=-1, ddof=1) / np.sqrt(n)
    return values.mean(axis=-1), half


def _round(values: np.ndarray) -> list[Any]:
    return np.round(values, 6).tolist()


# --- gradients at the same policies -------------------------------------------------------------------------

#: Mini-batches of b that a learned critic has seen when gradients are compared.
CRITIC_BATCHES = 16
#: The most steps from b to pi.
FARTHEST = 1024


def compare_gradients(*, problem: str, batches: int, seed: int) -> dict[str, Any]:
    """Every method's gradient from the same stale mini-batches, at policies ever farther from b.

    b is where exact gradient ascent from the start has come a quarter of the way to the optimum; the targets lie on
    the rest of that path. Windows are as published. The samples were not used to make the target.

    Args:
        problem: Name in `PROBLEMS`.
        batches: Independent mini-batches of two prompts.
        seed: Root of all randomness.

    Returns:
        For each target the standard deviation of log rho_H under b and, by method, the cosine of the true gradient
        with the expected one (with its standard error) and, on average, with that of one mini-batch.
    """
    task = build(problem)
    nodes, rate = task.nodes, task.rate / 9

    def ascend(logits: np.ndarray) -> np.ndarray:
        return logits + rate * nodes.gradient(softmax(logits))

    logits = task.start[None]
    quarter = task.share(logits)[0] + (1 - task.share(logits)[0]) / 4
    while task.share(logits)[0] < quarter:
        logits = ascend(logits)
    sampler = np.broadcast_to(log_softmax(logits), (batches, *task.start.shape))
    generators = streams(seed, "gradients", batches)
    learned = Critic(nodes, batches)
    for _ in range(CRITIC_BATCHES):
        learned.learn(draw(nodes, sampler, generators, 2))
    exact = np.broadcast_to(nodes.q(np.exp(sampler[:1])), learned.total.shape)
    critics = {"": None, "learned": learned.values(), "behavior": exact}
    responses = draw(nodes, sampler, generators, 2)
    behavior_share = float(task.share(logits)[0])
    spread: list[float] = []
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for step in range(1, FARTHEST + 1):
        logits = ascend(logits)
        if step & (step - 1):  # targets at 1, 2, 4, 8, ... steps
            continue
        truth = nodes.gradient(softmax(logits))
        everywhere = np.broadcast_to(logits, sampler.shape)
        for name, method in METHODS.items():
            found = estimated_gradient(
                nodes,
                method,
                method.built(nodes.horizon, 1.0),
                everywhere,
                responses,
                critic=critics[method.critic],
            )
            rows[name].append(_against(truth, found))
        spread.append(float(found.log_ratio.sum(axis=-1).std()))
        if task.share(logits)[0] > 0.99:
            break
    columns = {name: {key: [row[key] for row in some] for key in some[0]} for name, some in rows.items()}
    return {
        "problem": problem,
        "behavior_share": behavior_share,
        "spread": _round(np.array(spread)),
        "methods": columns,
    }


def _against(truth: np.ndarray, found: Estimated) -> dict[str, float | None]:
    """Cosines with the true gradient of the expected and of one mini-batch's gradient; None if it is all noise."""
    gradients = found.gradient.reshape(len(found.gradient), -1)
    value, error = expected_cosine(gradients, truth.ravel())
    one, clipped, *_ = measurements(np.broadcast_to(truth, found.gradient.shape), found)
    return {
        "expected": value,
        "error": error,
        "one": None if np.isnan(one).all() else round(float(np.nanmean(one)), 5),
        "clipped": round(float(clipped.mean()), 5),
    }


def expected_cosine(gradients: np.ndarray, truth: np.ndarray, blocks: int = 16) -> tuple[float | None, float | None]:
    """Cosine of the expected gradient with the true one, from n independent estimates (n, D), and its jackknife error.

    The squared norm of the mean of n estimates exceeds that of their expectation by the trace of their covariance
    over n, which is taken off. None if nothing is left: then the mean cannot be told from 0.
    """
    keep = np.ones((blocks + 1, len(gradients)), dtype=bool)
    for block, rows in enumerate(np.array_split(np.arange(len(gradients)), blocks)):
        keep[block + 1, rows] = False
    values = []
    for chosen in keep:
        some = gradients[chosen]
        mean = some.mean(axis=0)
        square = mean @ mean - some.var(axis=0, ddof=1).sum() / len(some)
        if not square > 0:
            return None, None
        values.append(float(mean @ truth / np.sqrt(square * (truth @ truth))))
    error = np.sqrt((blocks - 1) * np.var(values[1:]))
    return round(values[0], 5), round(float(error), 5)


# --- statistics ---------------------------------------------------------------------------------------------

#: Family-wise level of the paired tests.
LEVEL = 0.05
#: The on-policy run that stands beside the methods at every staleness.
REFERENCE = "on-policy"
#: Problem, staleness, variation.
Cell = tuple[str, int, str]
Results = Mapping[str, dict[str, Any]]


def paired_test(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Whether runs of two methods on the same seeds differ: Wilcoxon's signed-rank test.

    Returns:
        The mean difference first - second with its 95% t interval, the two-sided p (1 if all differences are 0), and
        the direction: the sign of the rank sum, 0 if the mean difference has another sign.
    """
    gaps = np.subtract(first, second)
    middle, half = _interval(gaps)
    if not gaps.any():
        return {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "direction": 0.0}
    ranks = np.sign((np.sign(gaps) * scipy.stats.rankdata(np.abs(gaps))).sum())
    return {
        "difference": float(middle),
        "low": float(middle - half),
        "high": float(middle + half),
        "p": float(scipy.stats.wilcoxon(gaps).pvalue),
        "direction": float(ranks) if ranks == np.sign(middle) else 0.0,
    }


def holm(p: Sequence[float]) -> np.ndarray:
    """The p values adjusted for their number by Holm's step-down procedure.

    >>> holm([0.01, 0.04, 0.03]).round(2)
    array([0.03, 0.06, 0.06])
    """
    values = np.asarray(p, dtype=float)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    return adjusted


def cells_of(found: Results) -> dict[Cell, dict[str, dict[str, Any]]]:
    """Results by cell and method, with the on-policy run in every cell of staleness above 1 without variation."""
    cells: dict[Cell, dict[str, dict[str, Any]]] = {}
    for result in found.values():
        if "best" in result:
            cell = (result["problem"], result["staleness"], result["variation"])
            cells.setdefault(cell, {})[result["method"]] = result
    for (name, staleness, variation), methods in cells.items():
        if staleness > 1 and not variation:
            methods[REFERENCE] = cells[name, 1, ""]["reinforce"]
    return cells


def compare(cells: Mapping[Cell, Results]) -> list[dict[str, Any]]:
    """Paired tests of the mean share between all methods of each cell, Holm-adjusted over all of them.

    The verdict is 1 if the first learns more, -1 if the second does, and 0 if they cannot be told apart.
    """
    rows: list[dict[str, Any]] = []
    for (name, staleness, variation), methods in cells.items():
        where = {"problem": name, "staleness": staleness, "variation": variation}
        for first, second in itertools.combinations(methods, 2):
            one, other = (methods[method]["best"]["mean_share"] for method in (first, second))
            rows.append({**where, "first": first, "second": second, **paired_test(one, other)})
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["adjusted"] = float(adjusted)
        row["verdict"] = int(row.pop("direction")) if adjusted < LEVEL else 0
    return rows


# --- what is written and printed ----------------------------------------------------------------------------


def label(method: str) -> str:
    """Name of a method, or of the reference, in tables and figures."""
    return METHODS[method].label if method in METHODS else method


def summary(found: Results) -> dict[str, Any]:
    """What is written to results/training.json, see `sweep.Study`."""
    cells = cells_of(found)
    tests = compare(cells)
    verdicts = _verdicts(tests)
    rows, curves = list[dict[str, Any]](), list[dict[str, Any]]()
    for cell, methods in cells.items():
        ranked = _ranked({method: np.mean(result["best"]["mean_share"]) for method, result in methods.items()})
        leading = {ranked[0], *(method for method in ranked[1:] if not verdicts[cell, ranked[0], method])}
        for method, result in methods.items():
            where = dict(zip(("problem", "staleness", "variation", "method"), (*cell, method), strict=True))
            where["label"] = label(method)
            curves.append({**where, "updates": result["updates"], **result["best"]["curve"]})
            rows.append({**where, **_cell_row(result), "leading": method in leading})
    return {
        "problems": [_problem_row(name) for name in dict.fromkeys(cell[0] for cell in cells)],
        "cells": rows,
        "curves": curves,
        "tests": [{key: float(f"{x:.6g}") if isinstance(x, float) else x for key, x in row.items()} for row in tests],
        "gradients": [result for result in found.values() if "spread" in result],
        "tables": list(_tables(cells, rows, verdicts, found)),
    }


def _verdicts(tests: Sequence[Mapping[str, Any]]) -> dict[tuple[Cell, str, str], int]:
    """The verdict on each pair of methods, either way round."""
    verdicts: dict[tuple[Cell, str, str], int] = {}
    for row in tests:
        cell = (row["problem"], row["staleness"], row["variation"])
        verdicts[cell, row["first"], row["second"]] = row["verdict"]
        verdicts[cell, row["second"], row["first"]] = -row["verdict"]
    return verdicts


def _ranked(shares: Mapping[str, Any]) -> list[str]:
    """Methods from the best to the worst, the reference left out."""
    return sorted((method for method in shares if method != REFERENCE), key=lambda method: -float(shares[method]))


def _problem_row(name: str) -> dict[str, Any]:
    task = build(name)
    return {
        "problem": name,
        "description": task.description,
        "horizon": task.nodes.horizon,
        "prompts": len(task.nodes.start),
        "parameters": task.start.size,
        "optimum": round(task.optimum, 6),
        "start": round(float(task.share(task.start[None])[0]), 6),
    }


def _cell_row(result: Mapping[str, Any]) -> dict[str, Any]:
    """One method in one cell, its seeds summed up."""
    row = {key: value for key, value in result["best"].items() if key != "curve"}
    for key in ("mean_share", "final_share"):
        middle, half = _interval(np.array(row[key]))
        row[key], row[f"{key}_half"] = round(float(middle), 6), round(float(half), 6)
    published = result.get("published", result["best"])
    row["published_share"] = round(float(np.mean(published["mean_share"])), 6)
    row["rate_at_edge"] = result["rate_at_edge"]
    return row


def _tables(
    cells: Mapping[Cell, Results],
    rows: Sequence[Mapping[str, Any]],
    verdicts: Mapping[tuple[Cell, str, str], int],
    found: Results,
) -> Iterator[dict[str, Any]]:
    """The tables that are printed."""
    by_cell: dict[Cell, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_cell.setdefault((row["problem"], row["staleness"], row["variation"]), {})[row["method"]] = row
    plain = {cell: methods for cell, methods in by_cell.items() if cell[1] > 1 and not cell[2]}
    test = (
        f"Wilcoxon's test on the same seeds, Holm over the {len(verdicts) // 2} pairs of all cells, {LEVEL:.0%}; no "
        "verdict either where most seeds and the mean disagree"
    )
    yield {
        "title": "Which method learns most",
        "note": "Mean share of the optimum over training, each method with its own best learning rate and window "
        f"width, chosen on other seeds. K: updates per round of samples. Not told from the best: {test}.",
        "rows": [_winner_row(cell, methods) for cell, methods in plain.items()],
    }
    yield {
        "title": "CTPO against each other method",
        "note": f"Cells (problem and staleness above 1) in which CTPO learns more, less, or neither: {test}.",
        "rows": [_duel_row(other, plain, verdicts) for other in (*METHODS, REFERENCE) if other != "ctpo"],
    }
    names = list(dict.fromkeys(cell[0] for cell in plain))
    for name in names:
        yield {
            "title": f"Problem {name}: {build(name).description}",
            "note": "Mean share of the optimum over training ± half a 95% interval, final share (last eighth); rate "
            "and width as chosen; share of tokens gated and cosine with the true gradient while below "
            f"{LEARNING_BELOW:.0%} of the optimum.",
            "rows": [
                _method_row(method, {cell[1]: plain[cell][method] for cell in plain if cell[0] == name})
                for method in (*METHODS, REFERENCE)
            ],
        }
    yield {
        "title": "Windows as published, and as chosen",
        "note": "Mean share of the optimum with the published window and its own best learning rate, then with the "
        f"chosen one: its logarithm times one of {', '.join(f'{width:g}' for width in WIDTHS)}.",
        "rows": [
            {"problem": name, "method": label(method)}
            | {f"K={cell[1]}": _window(plain[cell][method]) for cell in plain if cell[0] == name}
            for name in names
            for method in METHODS
            if METHODS[method].estimator.clip is not None
        ],
    }
    if any(cell[2] for cell in cells):
        yield {
            "title": "Epochs, batch size and scaling at K=16",
            "note": "Final share of the optimum. Epochs: as many updates from a 4th or 16th of the samples, by reuse; "
            "before it, disjoint mini-batches after as many samples. 8 prompts: mini-batches 4 times as large, half "
            "the updates. std: advantages over the standard deviation of their group.",
            "rows": [_variation_row(name, method, cells) for name in VARIED_ON for method in VARIED],
        }
    yield {
        "title": "Direction of the gradient at the same policies",
        "note": "Cosine of the true gradient with the expected one (whose correction for noise can take it above 1), "
        "and with that of one mini-batch, where the standard deviation of log rho_H is nearest to 1; windows as "
        "published; the samples were not used to make the target.",
        "rows": [_direction_row(method, found) for method in METHODS],
    }


def _winner_row(cell: Cell, methods: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    ranked = _ranked({method: row["mean_share"] for method, row in methods.items()})
    best = ranked[0]
    return {
        "problem": cell[0],
        "K": cell[1],
        "best": f"{label(best)} {methods[best]['mean_share']:.3f}",
        "not told from it": ", ".join(label(m) for m in ranked[1:] if methods[m]["leading"]) or "-",
        "CTPO": f"{methods['ctpo']['mean_share']:.3f}, rank {ranked.index('ctpo') + 1} of {len(ranked)}",
        "on-policy": methods[REFERENCE]["mean_share"],
    }


def _duel_row(
    other: str, plain: Mapping[Cell, Mapping[str, Any]], verdicts: Mapping[tuple[Cell, str, str], int]
) -> dict[str, Any]:
    outcomes = [verdicts[cell, "ctpo", other] for cell in plain]
    gaps = [methods["ctpo"]["mean_share"] - methods[other]["mean_share"] for methods in plain.values()]
    return {
        "method": label(other),
        "CTPO more": outcomes.count(1),
        "not told apart": outcomes.count(0),
        "CTPO less": outcomes.count(-1),
        "mean difference": round(float(np.mean(gaps)), 4),
    }


def _method_row(method: str, by_staleness: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"method": label(method)}
    for staleness, cell in by_staleness.items():
        row[f"K={staleness}"] = f"{cell['mean_share']:.3f} ± {cell['mean_share_half']:.3f}"
    last = max(by_staleness)
    for key, title in {
        "final_share": "final",
        "rate": "rate",
        "width": "width",
        "clipped": "gated",
        "cosine": "cosine",
    }.items():
        row[f"{title}, K={last}"] = by_staleness[last][key]
    return row


def _window(cell: Mapping[str, Any]) -> str:
    return f"{cell['published_share']:.3f}, {cell['mean_share']:.3f} (x{cell['width']:g})"


def _variation_row(name: str, method: str, cells: Mapping[Cell, Results]) -> dict[str, Any]:
    plain = cells[name, 16, ""][method]
    row: dict[str, Any] = {"problem": name, "method": label(method)}
    row["mini-batches"] = float(np.mean(plain["best"]["final_share"]))
    for variation, changes in VARIATIONS.items():
        if "epochs" in changes:
            at = plain["updates"].index(plain["updates"][-1] // changes["epochs"])
            row[f"as few samples as {variation}"] = plain["best"]["curve"]["mean"][at]
        varied = cells.get((name, 16, variation), {}).get(method)
        row[variation] = None if varied is None else float(np.mean(varied["best"]["final_share"]))
    return row


def _direction_row(method: str, found: Results) -> dict[str, Any]:
    row: dict[str, Any] = {"method": label(method)}
    for result in found.values():
        if "spread" in result:
            at = int(np.abs(np.log(result["spread"])).argmin())
            for key in ("expected", "one"):
                row[f"{result['problem']}, {key}"] = result["methods"][method][key][at]
    return row


STUDY = Study(
    "training",
    "Which estimator trains a small model best, at which staleness, and by how much?",
    tasks,
    one,
    summary,
)
