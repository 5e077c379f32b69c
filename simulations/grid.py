r"""Which ratio, when: every estimator on one grid of worlds, and what a practitioner can read off it.

The grid crosses kinds of worlds, horizons, ways of sharing parameters and directions of the step from behavior to
target policy with its length. Steps are as long as makes the full-sequence log-ratio spread by a given standard
deviation, log rho_H under the behavior policy: that can be measured in any run, and means the same at any horizon
and vocabulary. In every world the reward comes at the end alone and is centered at its mean under the behavior
policy, as by the mean of a large group. So three kinds of advantages estimate one and the same gradient: the exact
A^pi, the exact A^b, and the outcome itself.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.optimize

import ctpo
from ctpo.ratios import Level
from simulations import toy_lm
from simulations.exact import AdvantageKind, objective, policy_gradient, ratio_moments
from simulations.mdp import Parameters, TokenMDP, World, depths, random_policy, random_tree, softmax, step_policy
from simulations.measure import STUDIED, Measurement, measure
from simulations.sweep import Study

KINDS = ("tree", "bigram", "trigram", "sticky hot state", "end of sequence", "tool tokens", "transformer")
#: Standard deviations of log rho_H, nats: from nearly on-policy to where one sequence in fifty counts.
SPREADS = (0.1, 0.5, 1.0, 2.0)
#: Horizons that are enumerated, and those left to dynamic programming and Monte Carlo.
SHORT, LONG, LONGEST = 6, 64, 256
BATCHES = (16, 256, 4096)
#: Advantage, whether it multiplies the outcome, and what it is called.
ADVANTAGES: dict[str, tuple[AdvantageKind, bool]] = {
    "exact critic": ("A_target", False),
    "critic of b": ("A_behavior", False),
    "outcome reward": ("one", True),
}
VARIANTS: tuple[tuple[Parameters, str], ...] = (
    ("prefix", "ascent"),
    ("shared", "random"),
    ("position", "ascent"),
    ("prefix", "random"),
    ("shared", "ascent"),
    ("position", "random"),
)
#: Nats that a logit may move.
LARGEST_STEP = 256.0
#: What the estimator of least error is compared with.
RIVALS = ("ctpo", "grpo", "gspo")
#: Errors closer than this are a tie.
TIE = 1.02
#: Share of the worlds of a situation in which an estimator's error must be told.
LEAST_TOLD = 0.75


def unclipped(level: Level, window: int | None = None) -> ctpo.Estimator:
    """A level without window, gate and numerical limits."""
    return ctpo.Estimator(level, form="unclipped", window=window, max_log_ratio=None, max_token_log_ratio=None)


def estimators() -> dict[str, ctpo.Estimator]:
    """The studied estimators, and every level without clipping ("sequence" and "lookahead" have names already)."""
    return {
        **{name: ctpo.get_estimator(name) for name in STUDIED},
        "token": unclipped("token"),
        "cumulative": unclipped("cumulative"),
        "cumulative mean": unclipped("cumulative_mean"),
        "sequence mean": unclipped("sequence_mean"),
        "min prefix": unclipped("min_prefix"),
        "window 4": unclipped("window", 4),
        "lookahead 4": unclipped("lookahead", 4),
    }


# --- worlds -------------------------------------------------------------------------------------------------


def grid_world(kind: str, horizon: int, spread: float, parameters: Parameters, step: str, seed: Sequence[int]) -> World:
    """A world of the grid; with the same seed only the length of the step differs between spreads.

    Args:
        kind: One of `KINDS`.
        horizon: Largest number of tokens; the recorded transformer has its own.
        spread: Standard deviation of log rho_H under the behavior policy, nats.
        parameters: As in `simulations.mdp.World`.
        step: Direction of the step from behavior to target policy in logits: "ascent" along the gradient of the
            expected return, or "random".
        seed: Entropy of everything random.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: must be one of {KINDS}, got {kind!r}")
    if step not in ("ascent", "random"):
        raise ValueError(f"step: must be 'ascent' or 'random', got {step!r}")
    if not spread > 0:
        raise ValueError(f"spread: must be > 0 nats, got {spread}")
    if kind == "transformer":
        world = toy_lm.load_transformer_world()
        return _centered(replace(world, mdp=replace(world.mdp, reward=world.mdp.reward * 0.0)))
    rng = np.random.default_rng(list(seed))
    if kind == "tree":
        mdp = random_tree(rng, n_actions=2, horizon=horizon, rewards="outcome", exact=False).mdp
        behavior = random_policy(mdp, rng, parameters=parameters)
        blocks = {
            "prefix": np.arange(mdp.n_states),
            "position": np.clip(depths(mdp), 0, horizon - 1),
            "shared": np.zeros(mdp.n_states, dtype=int),
        }[parameters]

        def made(target: np.ndarray) -> World:
            return World(mdp, behavior, target, parameters)

        rows = blocks.max() + 1
    else:
        process, table = _ngram(kind, horizon, rng)
        behavior = process.world(table, table, "shared").behavior

        def made(target: np.ndarray) -> World:
            rows_of_contexts = np.zeros_like(table)
            rows_of_contexts[process.context[written]] = target[written]
            return process.world(table, rows_of_contexts, parameters)

        written = process.mdp.policy_states
        rows = len(table) if parameters == "prefix" else 1
        blocks = np.where(written, process.context, 0) if parameters == "prefix" else 0 * process.context
    if step == "random":
        direction = rng.standard_normal((rows, behavior.shape[1]))
    else:
        direction = policy_gradient(made(behavior)).reshape(-1, behavior.shape[1])
        if len(direction) != rows:  # one block per position of a process that does not know its position
            direction = direction.sum(axis=0, keepdims=True)
    if kind == "sticky hot state" and parameters == "prefix":
        direction[[0, 2]] = 0.0  # only after token 0, the hot one, do the policies differ
    direction /= np.abs(direction).max()

    def moved(size: float) -> World:
        return made(step_policy(behavior, direction[blocks], size))

    longest = 0.25
    while not _spread_of(moved(longest)) >= spread:  # NaN too, where a probability of the target has vanished
        longest *= 2.0
        if longest > LARGEST_STEP:
            raise ValueError(f"spread: {spread} nats cannot be reached in the {kind} world of seed {list(seed)}")
    size = scipy.optimize.brentq(lambda size: _spread_of(moved(size)) - spread, 0.0, longest, xtol=1e-12, rtol=1e-12)
    return _centered(moved(size))


def _spread_of(world: World) -> float:
    """Standard deviation of log rho_H, nats."""
    moments = ratio_moments(world)
    assert moments.var_log is not None
    return math.sqrt(max(float(moments.var_log[-1]), 0.0))


def _ngram(kind: str, horizon: int, rng: np.random.Generator) -> tuple[toy_lm.NGramProcess, np.ndarray]:
    """An n-gram process whose outcome is 1 if enough good tokens were written, and its behavior policy."""
    order, n_tokens = (3 if kind == "trigram" else 2), (2 if kind == "sticky hot state" else 3)
    eos = 0 if kind == "end of sequence" else None
    options: dict[str, Any] = {"order": order, "n_tokens": n_tokens, "horizon": horizon, "eos": eos, "name": None}
    if kind == "tool tokens":
        options |= {"call": n_tokens - 1, "tool": rng.dirichlet(np.ones(n_tokens), size=3 if horizon > SHORT else 1)}
    good = 1

    def process(**more: Any) -> toy_lm.NGramProcess:
        return toy_lm.ngram_process(**options, **more)

    counting = process(reward=lambda _context, token: float(token == good))
    logits = rng.standard_normal((len(counting.contexts), n_tokens))
    if eos is not None:
        logits[:, eos] = -math.log(horizon / 2)  # strings of very different lengths
    table = softmax(logits)
    if kind == "sticky hot state":
        stay = rng.uniform(0.8, 0.95)
        table = np.array([[0.5, 0.5], [stay, 1 - stay], [1 - stay, stay]])
    wanted = max(1, round(float(objective(counting.world(table, table, "shared"), "behavior"))))
    # Counts good tokens up to the number wanted.
    memory = np.minimum(np.arange(wanted + 1)[:, None] + (np.arange(n_tokens) == good), wanted)
    return process(memory=memory, outcome=lambda _context, cell: float(cell == wanted)), table


def _centered(world: World) -> World:
    """The same world with its outcome less the mean return of the behavior policy, which moves no gradient."""
    mdp: TokenMDP = world.mdp
    return replace(world, mdp=replace(mdp, outcome=mdp.outcome - objective(world, "behavior")))


# --- the study ----------------------------------------------------------------------------------------------


def tasks(seed: int, quick: bool) -> dict[str, dict[str, Any]]:
    """A task for each world: all estimators with all advantages."""
    listed: dict[str, dict[str, Any]] = {}
    plan = [(kind, SHORT, range(2) if quick else range(6), 2000) for kind in KINDS if kind != "transformer"]
    plan += [(kind, LONG, range(1) if quick else range(4), 2000 if quick else 8000) for kind in KINDS[1:-1]]
    if not quick:
        plan += [("bigram", LONGEST, range(2), 4000)]
    else:
        plan = [(kind, horizon, variants, n) for kind, horizon, variants, n in plan if kind in ("tree", "bigram")]
    for kind, horizon, variants, samples in plan:
        for variant in variants:
            parameters, step = VARIANTS[variant]
            for spread in SPREADS:
                listed[f"{kind} H={horizon} {parameters} {step} spread={spread:g}"] = {
                    "kind": kind,
                    "horizon": horizon,
                    "spread": spread,
                    "parameters": parameters,
                    "step": step,
                    "seed": [seed, zlib.crc32(kind.encode()), horizon, variant],
                    "samples": samples,
                }
    listed["transformer"] = {
        "kind": "transformer",
        "horizon": 4,
        "spread": 1.0,
        "parameters": "shared",
        "step": "ascent",
        "seed": [seed],
        "samples": 2000,
    }
    return listed


def one(
    kind: str, horizon: int, spread: float, parameters: Parameters, step: str, seed: Sequence[int], samples: int
) -> dict[str, Any]:
    """Measure every estimator with every advantage on one world."""
    world = grid_world(kind, horizon, spread, parameters, step, seed)
    rows = [
        {"advantage": name, **{key: value for key, value in vars(row).items() if key != "world"}}
        for name, (advantage, outcome) in ADVANTAGES.items()
        for row in measure(
            world, estimators(), advantage, outcome=outcome, samples=samples, seed=np.random.SeedSequence([*seed, 1])
        )
    ]
    return {
        "kind": kind,
        "horizon": world.mdp.horizon,
        "parameters": parameters if world.scores is None or kind != "transformer" else "network",
        "step": step,
        "spread": _spread_of(world),
        "sequence_ess": float(ratio_moments(world).ess_fraction[-1]),
        "rows": rows,
    }


# --- the summary --------------------------------------------------------------------------------------------

CRITERIA: dict[str, Callable[[Measurement, int], float]] = {
    "mse": Measurement.relative_mse,
    "direction": Measurement.direction_error,
}
#: What the rows say of an estimator in the worlds of a cell: median, smallest and largest of each.
QUANTITIES: dict[str, Callable[[Measurement], float]] = {
    "bias": lambda found: found.relative_bias,
    "noise": lambda found: found.total_variance / found.gradient_norm**2,
    "variance_to_sequence": lambda found: found.relative_variance,
    "clip_rate": lambda found: found.clip_rate,
    "ess": lambda found: found.ess,
}


class _Cell:
    """The worlds of one situation, each with the measurements of every estimator."""

    def __init__(self, worlds: Sequence[Mapping[str, Measurement]]) -> None:
        self.worlds = worlds
        self.names = [name for name in worlds[0] if all(name in world for world in worlds)]

    def errors(self, criterion: str, batch: int) -> dict[str, np.ndarray]:
        """Error of each estimator in every world, NaN where it cannot be told."""
        of = CRITERIA[criterion]
        return {name: np.array([of(world[name], batch) for world in self.worlds]) for name in self.names}

    def unbiased(self, name: str) -> bool:
        """Whether no bias is found in any world: none but rounding, or within four times the scale of noise."""
        rows = [world[name] for world in self.worlds]
        return all(not row.relative_bias >= max(1e-8, 4 * row.relative_bias_error) for row in rows)

    def bias(self, name: str) -> float:
        """Median of the relative bias over worlds, rounding set to 0."""
        found = float(np.nanmedian([world[name].relative_bias for world in self.worlds]))
        return found if found > 1e-8 else 0.0

    def verdict(self, criterion: str, batch: int) -> dict[str, Any]:
        """The estimator of least error and its lead.

        An estimator's score is the geometric mean, over the worlds where its error can be told, of that error over
        the least of any estimator in the same world. The best has the least score; leads are ratios of scores. Only
        estimators that are told in `LEAST_TOLD` of the worlds take part.
        """
        errors = self.errors(criterion, batch)
        least = np.nanmin(list(errors.values()), axis=0)
        behind = {name: _ratios(values, least) for name, values in errors.items()}
        score = {
            name: float(np.exp(np.nanmean(np.log(values))))
            for name, values in behind.items()
            if np.isfinite(values).mean() >= LEAST_TOLD
        }
        order = sorted(score, key=lambda name: score[name])
        best = order[0]
        lead = {name: _short(score[name] / score[best]) for name in order}
        ties = [name for name in order[1:] if lead[name] < TIE]
        runner = next((name for name in order[1:] if name not in ties), None)
        return {
            "best": best,
            "ties": ties,
            "error": _spread(errors[best]),
            "unbiased": self.unbiased(best),
            "bias": self.bias(best),
            "least_in": int((behind[best] < TIE).sum()),
            "runner_up": runner,
            "runner_up_times": None if runner is None else lead[runner],
            "times": {rival: lead.get(rival) for rival in RIVALS},
            "times_range": {
                rival: _spread(_ratios(errors[rival], errors[best]))[1:] if rival in lead else None for rival in RIVALS
            },
        }


def _ratios(values: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Error over base, 1 where both are nothing but rounding."""
    return (values + 1e-15) / (base + 1e-15)


def _spread(values: Sequence[float] | np.ndarray) -> list[float]:
    """Median, smallest and largest of what is told."""
    told = np.asarray(values)[np.isfinite(values)]
    return [_short(float(f(told))) for f in (np.median, np.min, np.max)] if len(told) else [math.nan] * 3


def _short(value: float) -> float:
    """Four significant digits, enough for every table and figure."""
    return float(f"{value:.4g}")


def summary(results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The best estimator of every situation, tables and sentences for reading, and all cells of the grid."""
    situations: defaultdict[tuple[str, str, float], list[dict[str, Measurement]]] = defaultdict(list)
    cells: defaultdict[tuple[str, str, int, float], list[dict[str, Measurement]]] = defaultdict(list)
    horizons: defaultdict[str, set[int]] = defaultdict(set)
    for key, result in results.items():
        length = "short" if result["horizon"] <= SHORT else "long"
        horizons[length].add(result["horizon"])
        spread = min(SPREADS, key=lambda s: abs(math.log(s / result["spread"])))
        by_advantage: defaultdict[str, dict[str, Measurement]] = defaultdict(dict)
        for row in result["rows"]:
            found = Measurement(world=key, **{k: v for k, v in row.items() if k != "advantage"})
            by_advantage[row["advantage"]][found.estimator] = found
        for advantage, measured in by_advantage.items():
            situations[advantage, length, spread].append(measured)
            cells[advantage, result["kind"], result["horizon"], spread].append(measured)
    found_best = [
        {
            "reward": advantage,
            "length": length,
            "spread": spread,
            "batch": batch,
            "worlds": len(worlds),
            **{criterion: _Cell(worlds).verdict(criterion, batch) for criterion in CRITERIA},
        }
        for advantage in ADVANTAGES
        for length in ("long", "short")
        for spread in SPREADS
        if (worlds := situations[advantage, length, spread])
        for batch in BATCHES
    ]
    lengths = {length: sorted(horizons[length]) for length in ("long", "short") if horizons[length]}
    return {
        "spreads": list(SPREADS),
        "batches": list(BATCHES),
        "lengths": lengths,
        "situations": found_best,
        "tables": [
            *(_which_ratio(found_best, length, lengths[length]) for length in lengths),
            *(_behavior(situations, "long" if "long" in lengths else "short", spread) for spread in (0.5, 2.0)),
        ],
        "columns": [
            *("reward", "kind", "horizon", "spread", "worlds", "estimator", "engine"),
            *(f"{name} {of}" for name in QUANTITIES for of in ("median", "least", "most")),
        ],
        "rows": [line for key, worlds in cells.items() for line in _lines(key, worlds)],
    }


def _lines(key: tuple[str, str, int, float], worlds: Sequence[Mapping[str, Measurement]]) -> list[str]:
    """A comma-separated line for each estimator in a cell of the grid."""
    lines = []
    for name in worlds[0]:
        found = [world[name] for world in worlds]
        engine = " or ".join(sorted({row.engine for row in found}))
        numbers = [value for of in QUANTITIES.values() for value in _spread([of(row) for row in found])]
        lines.append(",".join(map(str, [*key, len(worlds), name, engine, *(f"{value:g}" for value in numbers)])))
    return lines


def _which_ratio(situations: Sequence[Mapping[str, Any]], length: str, horizons: Sequence[int]) -> dict[str, Any]:
    """Which ratio, when: a row for each situation."""
    chosen = [s for s in situations if s["length"] == length]
    rows = []
    for s in chosen:
        mse = s["mse"]
        rows.append(
            {
                "reward": s["reward"],
                "sd log rho_H": s["spread"],
                "batch": s["batch"],
                "least MSE": _named(mse),
                "MSE / |grad J|^2": mse["error"][0],
                "its bias": "none" if mse["unbiased"] else f"{mse['bias']:.2g}",
                "next": "-" if mse["runner_up"] is None else f"{mse['runner_up']} {_times(mse['runner_up_times'])}",
                **{rival: _times(mse["times"][rival]) for rival in RIVALS},
                "least error of direction": _named(s["direction"]),
            }
        )
    least = min(s["worlds"] for s in chosen)
    return {
        "title": f"Which ratio, when: strings of up to {' or '.join(map(str, horizons))} tokens",
        "note": " ".join(
            [
                f"Median MSE and bias over at least {least} worlds of {len(KINDS)} kinds; x: error over that of the "
                "best, geometric mean. "
                "Direction: with the best length of the step, as an optimizer may find it. Windows are those of the "
                "named estimators, made for language models; +n: n more within 2%.",
                *_reading(chosen),
            ]
        ),
        "rows": rows,
    }


def _named(verdict: Mapping[str, Any]) -> str:
    return verdict["best"] + (f" +{len(verdict['ties'])}" if verdict["ties"] else "")


def _times(lead: float | None) -> str:
    return "-" if lead is None else f"x{lead:.3g}" if lead < 99.95 else f"x{lead:.0f}"


def _reading(situations: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the situations say, in words."""
    sentences = []
    for reward in ADVANTAGES:
        chosen = [s for s in situations if s["reward"] == reward]
        counts: defaultdict[str, int] = defaultdict(int)
        for s in chosen:
            for name in (s["mse"]["best"], *s["mse"]["ties"]):
                counts[name] += 1
        most = sorted(counts, key=lambda name: -counts[name])[:3]
        said = ", ".join(f"{name} in {counts[name]}" for name in most)
        sentences.append(f"{reward.capitalize()}: least MSE, or within 2% of it, of {len(chosen)} situations: {said}.")
        hopeless = [s for s in chosen if s["mse"]["error"][0] > 1]
        if hopeless:
            where = ", ".join(f"{s['spread']:g}/{s['batch']}" for s in hopeless)
            sentences.append(f"At spread/batch {where} even the least MSE is typically above that of no step at all.")
    return sentences


def _behavior(
    situations: Mapping[tuple[str, str, float], Sequence[Mapping[str, Measurement]]], length: str, spread: float
) -> dict[str, Any]:
    """Bias, variance, clip rate and effective sample size of every estimator at one distance."""
    by_reward = {reward: situations.get((reward, length, spread), []) for reward in ADVANTAGES}
    outcome = by_reward["outcome reward"]
    rows = [
        {
            "estimator": name,
            **{f"bias, {reward}": _range(worlds, name, "bias") for reward, worlds in by_reward.items()},
            "variance / sequence": _range(outcome, name, "variance_to_sequence"),
            "clip rate": _range(outcome, name, "clip_rate"),
            "ESS": _range(outcome, name, "ess"),
        }
        for name in (outcome[0] if outcome else ())
    ]
    return {
        "title": f"Every estimator: {length} strings, sd of log rho_H {spread:g} nats",
        "note": "Median (least to most) over worlds; bias relative to the true gradient; variance, clip rate and "
        "effective sample size per token with the outcome reward. -: samples cannot tell it.",
        "rows": rows,
    }


def _range(worlds: Sequence[Mapping[str, Measurement]], name: str, quantity: str) -> str:
    """Median and range of what is told."""
    values = np.array([QUANTITIES[quantity](world[name]) for world in worlds])
    told = values[np.isfinite(values)]
    if 2 * len(told) < len(values) or not len(told):
        return "-"
    told = np.where(told < 1e-8, 0.0, told)
    if told.max() < 1e-8:
        return "0"
    return f"{np.median(told):.2g} ({told.min():.2g} to {told.max():.2g})"


STUDY = Study(
    "grid",
    "Which importance ratio, when? Bias, variance, MSE, clip rate and ESS of every estimator on one grid of worlds.",
    tasks,
    one,
    summary,
)
