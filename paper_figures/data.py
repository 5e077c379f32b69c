"""Reads results/verification.json and studies: what each figure needs, checked, or a message what is not there.

Two things can be wrong with a part of the file. It may be missing, as after `verify --only`: `MissingError`, and only
the figures that need it are left out. Or it is there and is not what it should be: `ValueError`, an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FILE = "verification.json"
VERIFY = "python -m simulations verify"
#: A relative bias below this is the rounding of float64.
ROUNDING = 1e-9

Results = Mapping[str, Any]


class MissingError(Exception):
    """A part of the result file that a figure needs is not there."""


@dataclass(frozen=True)
class Positions:
    """Mean and standard deviation of log rho_t, nats, at positions t; `n` sequences, or None if they are exact."""

    name: str
    kind: str
    t: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    n: np.ndarray | None = None

    @property
    def power(self) -> float:
        """Slope of log std on log t under weights (n_t - 1) / t, which count every doubling of t alike.

        The fit of `ctpo.diagnostics.fit_spread`, so that a figure shows the number of the report; NaN if there is
        nothing to fit.
        """
        kept = self.std > 0
        if self.n is None or kept.sum() < 2:
            return math.nan
        x, y, weight = np.log(self.t[kept]), np.log(self.std[kept]), (self.n[kept] - 1) / self.t[kept]
        x_mean, y_mean = np.average(x, weights=weight), np.average(y, weights=weight)
        return float((weight * (x - x_mean) * (y - y_mean)).sum() / (weight * (x - x_mean) ** 2).sum())


@dataclass(frozen=True)
class Sampled:
    """Exact moments of rho_t against n samples, by position t; `error` is the standard error of `sampled`."""

    world: str
    n: int
    t: np.ndarray
    exact: dict[str, np.ndarray]
    sampled: dict[str, np.ndarray]
    error: dict[str, np.ndarray]

    def z(self, moment: str) -> np.ndarray:
        """(sampled - exact) / standard error."""
        return (self.sampled[moment] - self.exact[moment]) / self.error[moment]

    @property
    def variance_samples(self) -> np.ndarray:
        r"""Effective number of samples that carry the sample variance of rho_t.

        With d the deviations from the mean it is (sum d^2)^2 / sum d^4. The standard error e of the sample variance v
        knows the fourth moment, n e^2 + v^2, so it is 1 / (e^2 / v^2 + 1 / n).
        """
        return 1 / ((self.error["variance"] / self.sampled["variance"]) ** 2 + 1 / self.n)


@dataclass(frozen=True)
class Ratio:
    """One ratio of Table 1: bias over the norm of the gradient, variance over that of the sequence ratio, by world."""

    name: str
    relative_bias: list[float] = field(default_factory=list)
    relative_variance: list[float] = field(default_factory=list)

    @property
    def unbiased(self) -> bool:
        """Whether the bias is that of rounding in every world."""
        return max(self.relative_bias) < ROUNDING


@dataclass(frozen=True)
class Cell:
    """Where one estimator has the least median error over some models.

    `margin` is the error of the best other estimator over its own, `error` its own, over that of no step at all;
    `divergence` is KL(b||pi) per token, nats.
    """

    reward: str
    horizon: int
    divergence: float
    batch: int
    winner: str
    margin: float
    error: float


@dataclass(frozen=True)
class PhaseDiagram:
    """Winners by horizon, of products of token ratios, and of all estimators at one short horizon.

    Attributes:
        estimators: The products, from none of the token ratios to all.
        rewards: Name of each kind of reward -> its title.
        tie: Margins below this factor are none.
        models: Models in a cell.
        diagram: Cells of the products.
        named: Cells of all estimators.
    """

    estimators: list[str]
    rewards: dict[str, str]
    tie: float
    models: int
    diagram: list[Cell]
    named: list[Cell]


@dataclass(frozen=True)
class Learned:
    """How well one method trains on a problem at one staleness.

    Attributes:
        problem: Name of the problem.
        staleness: Updates between two refreshments of the sampler.
        method: Key of the method.
        label: Its name.
        updates: Updates done at the points of the curve, 0 first.
        curve: Mean share of the optimum there, and the ends of its interval, "mean", "low" and "high".
        share: Mean over training.
        cosine: Mean cosine of the estimated with the true gradient; NaN where none was measured.
        leading: Whether no method is known to learn more.
    """

    problem: str
    staleness: int
    method: str
    label: str
    updates: np.ndarray
    curve: dict[str, np.ndarray]
    share: float
    cosine: float
    leading: bool


@dataclass(frozen=True)
class Best:
    """The estimator of least error in one situation.

    `error` is that of the gradient of a batch, squared and relative to the true gradient, median over worlds; the
    `criterion` is "mse", or "direction" for the same after the best rescaling. `ties` are as good within 2%.
    """

    reward: str
    length: str
    spread: float
    batch: int
    criterion: str
    name: str
    ties: list[str]
    error: float


@dataclass(frozen=True)
class Situations:
    """All situations of the grid, and the longest strings of each length in tokens."""

    best: list[Best]
    horizons: dict[str, list[int]]
    worlds: int


def load(folder: Path, file: str = FILE, command: str = VERIFY) -> Results:
    """Read a result file of a folder, which the command has written.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not a JSON object.
    """
    path = folder / file
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it is written by `{command}`")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); `{command}` writes it anew") from error
    if not isinstance(results, Mapping):
        raise ValueError(f"{path}: holds a {type(results).__name__}, not an object; `{command}` writes it anew")
    return results


def synthetic(results: Results) -> list[Positions]:
    """Exact spread and drift by position on synthetic worlds."""
    entries = _part(results, "series.synthetic", list)
    return [_positions(entry, f"series.synthetic[{k}]", sampled=False) for k, entry in enumerate(entries)]


def recorded(results: Results) -> list[Positions]:
    """Spread and drift by position on the recorded traces of a language model."""
    entries = _part(results, "series.recorded", list)
    return [_positions(entry, f"series.recorded[{k}]", sampled=True) for k, entry in enumerate(entries)]


def sampled(results: Results) -> Sampled:
    """Exact moments against Monte Carlo."""
    where = "series.monte_carlo"
    entry = _part(results, where, dict)
    t = _ascending(entry, where)
    names = {"mean": "mean_log", "variance": "variance"}
    exact, drawn, error = (
        {key: _numbers(entry, f"{source}_{name}", where, len(t)) for key, name in names.items()}
        for source in ("exact", "sampled", "error")
    )
    if not all((values > 0).all() for values in (exact["variance"], drawn["variance"], *error.values())):
        raise ValueError(f"{where} has a variance or a standard error that is not positive")
    n = entry.get("n")
    if not isinstance(n, int) or n < 2:
        raise ValueError(f"{where}.n is {n!r}, not a number of samples")
    return Sampled(_text(entry, "world", where), n, t, exact, drawn, error)


def table_one(results: Results) -> list[Ratio]:
    """Bias and variance of each ratio over the worlds of claim T1, unbiased ratios first."""
    claims = _part(results, "claims", list)
    claim = next((c for c in claims if isinstance(c, Mapping) and c.get("id") == "T1"), None)
    if claim is None:
        raise MissingError(f"claims: T1 is not among them (`{VERIFY} --only T1` would check it alone)")
    evidence = _part(claim, "evidence", list, "T1.")
    rows = _part(evidence[0], "numbers.rows", list, "T1.evidence[0].")
    ratios: dict[str, Ratio] = {}
    for k, row in enumerate(rows):
        where = f"T1.evidence[0].numbers.rows[{k}]"
        ratio = ratios.setdefault(_text(row, "estimator", where), Ratio(row["estimator"]))
        for key, values in (("relative_bias", ratio.relative_bias), ("relative_variance", ratio.relative_variance)):
            value = row.get(key)
            if not _is_number(value) or value < 0 or (value == 0 and key == "relative_variance"):
                raise ValueError(f"{where}.{key} is {value!r}, which it cannot be")
            values.append(float(value))
    worlds = {len(ratio.relative_bias) for ratio in ratios.values()}
    if len(worlds) != 1:
        raise ValueError("T1.evidence[0].numbers.rows: the ratios are measured on different numbers of worlds")
    return sorted(ratios.values(), key=lambda ratio: not ratio.unbiased)


def phase(results: Results) -> PhaseDiagram:
    """The phase diagram of the study of that name."""
    rewards, estimators = results.get("rewards"), results.get("estimators")
    tie: Any = results.get("tie")
    if not isinstance(rewards, Mapping) or not rewards or not all(isinstance(t, str) for t in rewards.values()):
        raise ValueError("rewards is not an object of titles")
    if not isinstance(estimators, list) or not estimators or not all(isinstance(name, str) for name in estimators):
        raise ValueError("estimators is not a list of names")
    if not _is_number(tie) or not tie >= 1:
        raise ValueError(f"tie is {tie!r}, not a factor")
    diagram, named = (_cells(results.get(part), part) for part in ("diagram", "named"))
    for part, cells in (("diagram", diagram), ("named", named)):
        if {cell.reward for cell in cells} - set(rewards):
            raise ValueError(f"{part}: holds a kind of reward without a title")
    return PhaseDiagram(estimators, dict(rewards), tie, results["diagram"][0]["models"], diagram, named)


def _cells(entries: Any, part: str) -> list[Cell]:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{part} is not a list of cells")
    cells = []
    for k, entry in enumerate(entries):
        where = f"{part}[{k}]"
        winner, reward = _text(entry, "winner", where), _text(entry, "reward", where)
        errors = entry.get("error")
        numbers = {key: entry.get(key) for key in ("horizon", "divergence", "batch", "margin", "models")}
        numbers["error"] = errors.get(winner) if isinstance(errors, Mapping) else None
        for key, value in numbers.items():
            if not _is_number(value) or not value > 0:
                raise ValueError(f"{where}.{key} is {value!r}, not a number above 0")
        del numbers["models"]
        cells.append(Cell(reward=reward, winner=winner, **numbers))
    return cells


def training(results: Results) -> list[Learned]:
    """What the training study found at staleness above 1, its variations left out."""
    curves = _part(results, "curves", list)
    cells = _part(results, "cells", list)
    if len(curves) != len(cells):
        raise ValueError(f"curves has {len(curves)} entries, cells {len(cells)}")
    found = []
    for k, (entry, cell) in enumerate(zip(curves, cells, strict=True)):
        where = f"curves[{k}]"
        names = {key: _text(entry, key, where) for key in ("problem", "variation", "method", "label")}
        staleness = entry.get("staleness")
        if not isinstance(staleness, int) or staleness < 1:
            raise ValueError(f"{where}.staleness is {staleness!r}, not a number of updates")
        here = {**names, "staleness": staleness}
        if not isinstance(cell, Mapping) or any(cell.get(key) != value for key, value in here.items()):
            raise ValueError(f"cells[{k}] is not about the same run as {where}")
        if names.pop("variation") or staleness == 1:
            continue
        updates = _numbers(entry, "updates", where)
        curve = {key: _numbers(entry, key, where, len(updates)) for key in ("mean", "low", "high")}
        share: Any = cell.get("mean_share")
        cosine, leading = cell.get("cosine"), cell.get("leading")
        if not (_is_number(share) and (cosine is None or _is_number(cosine)) and isinstance(leading, bool)):
            raise ValueError(f"cells[{k}] has no mean_share, cosine or leading")
        cosine = math.nan if cosine is None else float(cosine)
        label, method = names["label"], names["method"]
        found.append(Learned(names["problem"], staleness, method, label, updates, curve, float(share), cosine, leading))
    if not found:
        raise MissingError("curves has none of staleness above 1")
    return found


def which_ratio(results: Results) -> Situations:
    """The best estimators of the study "grid"."""
    entries, horizons = results.get("situations"), results.get("lengths")
    if not isinstance(horizons, Mapping) or not all(
        isinstance(found, list) and found and all(_is_number(h) and h > 0 for h in found) for found in horizons.values()
    ):
        raise ValueError("lengths is not an object of lists of horizons")
    if not isinstance(entries, list) or not entries:
        raise ValueError("situations is not a list of situations")
    best, worlds = [], []
    for k, entry in enumerate(entries):
        where = f"situations[{k}]"
        reward, length = _text(entry, "reward", where), _text(entry, "length", where)
        if length not in horizons:
            raise ValueError(f"{where}.length is {length!r}, which is not in lengths")
        numbers = {key: entry.get(key) for key in ("spread", "batch", "worlds")}
        for key, value in numbers.items():
            if not _is_number(value) or not value > 0:
                raise ValueError(f"{where}.{key} is {value!r}, not a number above 0")
        spread, batch = float(numbers["spread"]), int(numbers["batch"])
        worlds.append(int(numbers["worlds"]))
        for criterion in ("mse", "direction"):
            verdict, inside = entry.get(criterion), f"{where}.{criterion}"
            name = _text(verdict, "best", inside)
            ties = verdict.get("ties")
            if not isinstance(ties, list) or not all(isinstance(tie, str) for tie in ties):
                raise ValueError(f"{inside}.ties is not a list of names")
            error = float(_numbers(verdict, "error", inside)[0])
            if error < 0:
                raise ValueError(f"{inside}.error is {error}, below 0")
            best.append(Best(reward, length, spread, batch, criterion, name, ties, error))
    return Situations(best, {str(k): list(v) for k, v in horizons.items()}, min(worlds))


def source(results: Results, file: str = FILE) -> str:
    """Where the numbers come from, for the foot of a figure."""
    made = results.get("provenance")
    made = made if isinstance(made, Mapping) else {}
    settings = made.get("configuration")
    settings = settings if isinstance(settings, Mapping) else {}
    commit = made.get("commit")
    text = f"{file}, " + (f"commit {commit[:9]}" if isinstance(commit, str) else "commit unknown")
    if made.get("dirty"):
        text += " with local changes"
    text += f", seed {settings.get('seed', 'unknown')}"
    return text + (", quick run" if settings.get("quick") else "")


def model(results: Results) -> str:
    """Name of the recorded language model, as the findings have it."""
    findings = results.get("findings")
    for section in findings if isinstance(findings, list) else []:
        title = section.get("title") if isinstance(section, Mapping) else None
        if isinstance(title, str) and (found := re.match(r"Findings on ([^:]+):", title)):
            return found[1]
    return "a language model"


def _part(results: Any, path: str, kind: type, prefix: str = "") -> Any:
    """The value at a dotted path; missing if a key is absent, null or empty, an error if it has another type."""
    value, keys = results, path.split(".")
    for k, key in enumerate(keys):
        if not isinstance(value, Mapping):
            raise ValueError(f"{prefix}{'.'.join(keys[:k])} is a {type(value).__name__}, not an object")
        value = value.get(key)
        if value is None:
            raise MissingError(f"{prefix}{'.'.join(keys[: k + 1])} is not in {FILE}")
    if not isinstance(value, kind):
        raise ValueError(f"{prefix}{path} is a {type(value).__name__}, not a {kind.__name__}")
    if not value:
        raise MissingError(f"{prefix}{path} is empty")
    return value


def _positions(entry: Any, where: str, *, sampled: bool) -> Positions:
    name = _text(entry, "name", where)
    t = _ascending(entry, where)
    mean, std = _numbers(entry, "mean", where, len(t)), _numbers(entry, "std", where, len(t))
    if not (std >= 0).all():
        raise ValueError(f"{where}.std has numbers below 0")
    if not sampled:
        if not std[-1] > 0:
            raise ValueError(f"{where}.std ends with 0")
        return Positions(name, "exact", t, mean, std)
    n = _numbers(entry, "n", where, len(t))
    if not (n >= 2).all():
        raise ValueError(f"{where}.n has numbers of sequences below 2")
    return Positions(name, _text(entry, "kind", where), t, mean, std, n)


def _ascending(entry: Mapping[str, Any], where: str) -> np.ndarray:
    t = _numbers(entry, "t", where)
    if not (t > 0).all() or not (np.diff(t) > 0).all():
        raise ValueError(f"{where}.t are not positions in growing order")
    return t


def _text(entry: Any, key: str, where: str) -> str:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is a {type(entry).__name__}, not an object")
    value = entry.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{where}.{key} is {value!r}, not a string")
    return value


def _numbers(entry: Mapping[str, Any], key: str, where: str, length: int | None = None) -> np.ndarray:
    values = entry.get(key)
    if not isinstance(values, list) or not values or not all(_is_number(value) for value in values):
        raise ValueError(f"{where}.{key} is not a list of finite numbers")
    if length is not None and len(values) != length:
        raise ValueError(f"{where}.{key} has {len(values)} numbers, {where}.t has {length}")
    return np.array(values, dtype=float)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
