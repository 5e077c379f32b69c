r"""Which ratio has the least mean squared error: by horizon, off-policyness, batch size and kind of reward.

The error of the mean of n summed gradients is exact, bias^2 + Var / n from dynamic programming (enumeration of the
shortest worlds), relative to the squared norm of the true gradient: 1 is what no step at all would have. Estimators
with windows and roots, which no dynamic programming takes, are compared on worlds that can be enumerated.

Two worlds of bigram language models that share their logits over all positions:

* *solve*: token 0 is a mistake that spoils the answer, and the reward is 1 for an answer without one. The behavior
  policy solves `SOLVED` of its attempts, at every horizon.
* *score*: the reward is the share of tokens that are good ones: a sum over tokens, known at the end.

The reward is centered at its mean under the behavior policy, as by the mean of a large group. The target policy is a
training step away: half along the gradient, half at random, as far as makes the given divergence KL(b||pi) per token.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import scipy.optimize
from scipy.special import log_softmax

import ctpo
from ctpo.ratios import Level
from simulations import toy_lm
from simulations.exact import AdvantageKind, objective, policy_gradient
from simulations.mdp import World, softmax
from simulations.measure import STUDIED, measure
from simulations.sweep import Study

TOKENS = 3
MISTAKE, GOOD = 0, TOKENS - 1
SOLVED = 0.25
HORIZONS = (8, 16, 32, 64, 128, 256)
#: KL(b||pi) per token, nats. A spread of log-ratios of sigma per token is about sigma^2 / 2.
DIVERGENCES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
#: Sequences per gradient: one group of a prompt, a mini-batch, everything of one round of sampling.
BATCHES = (8, 256, 4096)
#: The horizon at which all named estimators are enumerated, and their batches.
SHORT = 8
SHORT_BATCHES = (8, 32, 128, 512, 2048, 8192)
#: Random models of each world.
MODELS = 6
#: Winners that are ahead by less than this factor are no winners.
TIE = 1.02


@dataclass(frozen=True)
class Kind:
    """A kind of reward signal: the world, the advantage, whether it multiplies the outcome, and what it is called."""

    world: str
    advantage: AdvantageKind
    outcome: bool
    title: str


KINDS: Mapping[str, Kind] = {
    "solved": Kind("solve", "one", True, "outcome reward, solved or not"),
    "score": Kind("score", "one", True, "outcome reward, a score summed over tokens"),
    "critic of the target": Kind("solve", "A_target", False, "exact critic of the target policy"),
    "critic of the behavior": Kind("solve", "A_behavior", False, "exact critic of the behavior policy"),
}


def _unclipped(level: Level, window: int | None = None) -> ctpo.Estimator:
    return ctpo.Estimator(level, form="unclipped", window=window, max_log_ratio=None, max_token_log_ratio=None)


#: Products of ever more token ratios; of equals the first wins.
PRODUCTS: Mapping[str, ctpo.Estimator] = {
    "no ratio": ctpo.get_estimator("reinforce"),
    "token": _unclipped("token"),
    "window 4": _unclipped("window", 4),
    "cumulative": _unclipped("cumulative"),
    "lookahead 4": _unclipped("lookahead", 4),
    "sequence": _unclipped("sequence"),
}
#: The products, and every studied estimator that is none of them.
EVERY: Mapping[str, ctpo.Estimator] = {
    **PRODUCTS,
    **{name: ctpo.get_estimator(name) for name in STUDIED if name not in ("reinforce", "sequence", "lookahead")},
}


# --- worlds ---------------------------------------------------------------------------------------------------------


def process(world: str, horizon: int) -> toy_lm.NGramProcess:
    """The bigram process of a world; its memory keeps what the reward needs."""
    if world == "solve":
        spoilt = [[int(memory or token == MISTAKE) for token in range(TOKENS)] for memory in range(2)]
        return toy_lm.ngram_process(
            order=2,
            n_tokens=TOKENS,
            horizon=horizon,
            memory=spoilt,
            outcome=lambda _context, memory: 1 - memory,
            name=f"solve H={horizon}",
        )
    if world != "score":
        raise ValueError(f"world: must be 'solve' or 'score', got {world!r}")
    return toy_lm.ngram_process(
        order=2,
        n_tokens=TOKENS,
        horizon=horizon,
        memory=[[min(count + (token == GOOD), horizon) for token in range(TOKENS)] for count in range(horizon + 1)],
        outcome=lambda _context, count: count / horizon,
        name=f"score H={horizon}",
    )


def occupancy(behavior: np.ndarray, horizon: int) -> np.ndarray:
    """(C,) share of the tokens that are written in each context: the start, and after each token."""
    now = np.eye(len(behavior))[0]
    total = np.zeros(len(behavior))
    for _ in range(horizon):
        total += now
        now = np.concatenate([[0.0], now @ behavior])
    return total / horizon


def make_world(world: str, horizon: int, divergence: float, rng: np.random.Generator) -> World:
    """A random world: the same models at every horizon and divergence, as far as these let them be.

    Args:
        world: "solve" or "score".
        horizon: Tokens of an answer.
        divergence: KL(b||pi) per token, nats.
        rng: Source of the logits and of the random half of the step.
    """
    logits, noise = rng.standard_normal((2, TOKENS + 1, TOKENS))
    made = process(world, horizon)
    if world == "solve":

        def gap(shift: float) -> float:
            behavior = softmax(logits + shift * (np.arange(TOKENS) == MISTAKE))
            return float(objective(made.world(behavior, behavior))) - SOLVED

        logits[:, MISTAKE] += scipy.optimize.brentq(gap, -30.0, 30.0, xtol=1e-10)
    behavior = softmax(logits)
    ascent = policy_gradient(made.world(behavior, behavior)).reshape(logits.shape)
    step = ascent / np.linalg.norm(ascent) + noise / np.linalg.norm(noise)
    share = occupancy(behavior, horizon)

    def excess(log_size: float) -> float:
        log_ratio = log_softmax(logits, axis=1) - log_softmax(logits + math.exp(log_size) * step, axis=1)
        return math.log(float(share @ (behavior * log_ratio).sum(axis=1)) / divergence)

    size = math.exp(scipy.optimize.brentq(excess, -7.0, 7.0, xtol=1e-12))
    found = made.world(behavior, softmax(logits + size * step))
    centered = found.mdp.outcome - objective(found, "behavior")
    return replace(found, mdp=replace(found.mdp, outcome=centered))


# --- the study ------------------------------------------------------------------------------------------------------


def tasks(seed: int, quick: bool) -> dict[str, dict[str, Any]]:
    """A task for each world's models and horizon, and one for each world's models with every named estimator."""
    horizons, divergences = (HORIZONS, DIVERGENCES) if not quick else (HORIZONS[:3], DIVERGENCES[1::3])
    listed: dict[str, dict[str, Any]] = {}
    for world in dict.fromkeys(kind.world for kind in KINDS.values()):
        for model in range(2 if quick else MODELS):
            common = {
                "world": world,
                "divergences": list(divergences),
                "seed": [seed, zlib.crc32(world.encode()), model],
            }
            for horizon in horizons:
                listed[f"{world} H={horizon} model {model}"] = {**common, "horizon": horizon, "named": False}
            listed[f"{world} H={SHORT} model {model}, all estimators"] = {**common, "horizon": SHORT, "named": True}
    return listed


def one(world: str, horizon: int, divergences: Sequence[float], seed: Sequence[int], named: bool) -> dict[str, Any]:
    """Errors of the estimators on one world's models at one horizon, for every divergence, reward and batch."""
    estimators, batches = (EVERY, SHORT_BATCHES) if named else (PRODUCTS, BATCHES)
    rows = []
    for divergence in divergences:
        made = make_world(world, horizon, divergence, np.random.default_rng(list(seed)))
        for name, kind in KINDS.items():
            if kind.world != world:
                continue
            found = measure(made, estimators, kind.advantage, outcome=kind.outcome)
            rows += [
                {
                    "reward": name,
                    "divergence": divergence,
                    "batch": batch,
                    "error": {row.estimator: row.relative_mse(batch) for row in found},
                    "direction": {row.estimator: row.direction_error(batch) for row in found},
                }
                for batch in batches
            ]
    return {"horizon": horizon, "named": named, "rows": rows}


def summary(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Who wins where, over the models of each cell."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for result in found.values():
        for row in result["rows"]:
            key = (result["named"], row["reward"], result["horizon"], row["divergence"], row["batch"])
            cells[key].append(row)
    diagram, named = (
        [cell(key[1], key[2], key[3], key[4], rows) for key, rows in cells.items() if key[0] is wanted]
        for wanted in (False, True)
    )
    return {
        "estimators": list(PRODUCTS),
        "rewards": {name: kind.title for name, kind in KINDS.items()},
        "tie": TIE,
        "diagram": diagram,
        "named": named,
        "tables": [*_tables(diagram), _shares(diagram), _named_table(named)],
    }


def cell(reward: str, horizon: int, divergence: float, batch: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The winner of one cell: the estimator with the least median error over the models.

    Returns:
        A JSON-ready object. "share": of the models in which it is the best. "margin": median over the models of the
        error of the best other estimator over its own. "by_direction": the winner if an optimizer sets the length of
        the step. "error": the median of each estimator.
    """
    errors, directions = (
        {name: np.array([row[measure_][name] for row in rows]) for name in rows[0][measure_]}
        for measure_ in ("error", "direction")
    )
    medians = {name: float(np.median(values)) for name, values in errors.items()}
    winner = best(medians)
    others = np.min([values for name, values in errors.items() if name != winner], axis=0)
    return {
        "reward": reward,
        "horizon": horizon,
        "divergence": divergence,
        "batch": batch,
        "models": len(rows),
        "winner": winner,
        "share": float(np.mean(errors[winner] <= others)),
        "margin": float(np.median(others / errors[winner])),
        "by_direction": best({name: float(np.median(values)) for name, values in directions.items()}),
        "error": medians,
    }


def best(errors: Mapping[str, float]) -> str:
    """The name of the least error; of equals, to rounding, the first."""
    least = min(errors.values())
    return next(name for name, value in errors.items() if value <= least * (1 + 1e-9))


def _tables(diagram: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each reward the winner by horizon and divergence, at the middle batch."""
    batch = BATCHES[len(BATCHES) // 2]
    shown = []
    for name, kind in KINDS.items():
        rows: dict[int, dict[str, Any]] = {}
        for entry in diagram:
            if entry["reward"] == name and entry["batch"] == batch:
                text = entry["winner"] if entry["margin"] >= TIE else f"({entry['winner']})"
                text += " *" if entry["error"][entry["winner"]] >= 1 else ""
                rows.setdefault(entry["horizon"], {"horizon": entry["horizon"]})[f"{entry['divergence']:g}"] = text
        shown.append(
            {
                "title": f"Least mean squared error, {kind.title}, batches of {batch}: by KL per token",
                "note": f"In parentheses: ahead by less than {100 * (TIE - 1):.0f} %. *: worse than no step at all.",
                "rows": list(rows.values()),
            }
        )
    return shown


def _shares(diagram: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each reward and batch the share of the cells that each estimator wins, by error and by direction."""
    rows = []
    for name, batch in product(KINDS, BATCHES):
        here = [entry for entry in diagram if (entry["reward"], entry["batch"]) == (name, batch)]
        for criterion, key in (("error", "winner"), ("direction", "by_direction")):
            won = Counter(entry[key] for entry in here)
            rows.append(
                {"reward": name, "batch": batch, "by": criterion}
                | {estimator: f"{100 * won[estimator] / len(here):.0f} %" for estimator in PRODUCTS}
            )
    return {
        "title": "Share of the horizons and divergences at which each has the least error",
        "note": "By direction: the error after the best constant, as if an optimizer set the length of the step.",
        "rows": rows,
    }


def _named_table(named: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each reward and batch the winner of all estimators by divergence."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for entry in named:
        row = rows.setdefault((entry["reward"], entry["batch"]), {"reward": entry["reward"], "batch": entry["batch"]})
        row[f"{entry['divergence']:g}"] = entry["winner"]
    return {
        "title": f"Least mean squared error of all estimators at horizon {SHORT}: by KL per token",
        "note": "Clipped and length-normalized estimators among them, by enumeration.",
        "rows": list(rows.values()),
    }


STUDY = Study(
    "phase",
    "Which ratio has the least mean squared error, by horizon, off-policyness, batch size and kind of reward?",
    tasks,
    one,
    summary,
)
