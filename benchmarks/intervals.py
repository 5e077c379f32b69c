"""`python -m benchmarks.intervals`: do the intervals and tests of `ctpo.train.metrics` hold what they promise?

Problems are drawn from a population whose mean is known, samples are drawn for each, and counted is how often an
interval has the mean inside and how often a test rejects; beside ours, what is commonly used instead. Many
repetitions are computed at once by the formulas written out here for arrays; in every cell some of them are computed
by the public functions, too, and the run ends with an error where the two differ.

The tables of docs/evaluation.md are these: `--page docs/evaluation.md` replaces them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, hyp2f1, logit, ndtr, ndtri, stdtr, stdtrit

from ctpo.train.metrics import compare_paired, mean_interval, sampling_interval

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ends = tuple[Floats, Floats]

MEANS, ALIKE, SAMPLES = (0.02, 0.1, 0.3, 0.5, 0.9, 0.98), (0.3, 1.0, 3.0, 20.0), (1, 4, 32)
PROBLEMS = (5, 10, 30, 100, 500)
# Six difficulties, from hard to easy and from all alike to all or nothing.
COMPARED = ((0.02, 1.0), (0.1, 0.3), (0.3, 1.0), (0.5, 0.3), (0.5, 3.0), (0.9, 1.0))
LEVEL = 0.95
ODDS = 2.2
# Resamples and random sign flips, the same for the repetitions of a cell.
RESAMPLES = 999
# Sets of problems that are sampled again and again, in each cell.
SETS = 5
CHECKED = 3
BEGIN, END = "<!-- intervals: begin -->", "<!-- intervals: end -->"


class Setting(NamedTuple):
    """A population of problems, beta(a, b), and the samples of each."""

    mean: float
    alike: float
    samples: int

    @property
    def beta(self) -> tuple[float, float]:
        """Its parameters: a + b is larger the more alike the problems are."""
        return self.mean * self.alike, (1 - self.mean) * self.alike

    def difficulties(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
        """Probabilities of solving."""
        return rng.beta(*self.beta, shape)

    def values(self, rng: np.random.Generator, p: Floats) -> Floats:
        """Mean correctness of the samples of each problem."""
        return rng.binomial(self.samples, p) / self.samples


GRID = [Setting(*cell) for cell in itertools.product(MEANS, ALIKE, SAMPLES)]


@dataclass(frozen=True)
class Draw:
    """Values of many repetitions, [repetitions, problems], each a multiple of one over `samples`."""

    x: Floats
    samples: int

    @property
    def problems(self) -> int:
        """Their number."""
        return self.x.shape[1]

    @cached_property
    def mean(self) -> Floats:
        """Over problems, as all that follow: [repetitions]."""
        return np.asarray(self.x.mean(axis=1))

    @cached_property
    def squares(self) -> Floats:
        """Sum of squared distances from the mean."""
        return np.asarray(((self.x - self.mean[:, None]) ** 2).sum(axis=1))

    @cached_property
    def error(self) -> Floats:
        """Standard error of the mean."""
        return np.sqrt(self.squares / (self.problems - 1) / self.problems)

    def first(self, count: int) -> Draw:
        """Its first repetitions."""
        return Draw(self.x[:count], self.samples)


# Intervals. Where the values have no spread and a method has no answer to that, its interval is a point.


def wilson(share: Floats, n: Floats | float, t: float) -> Ends:
    """All mu with |share - mu| <= t sqrt(mu (1 - mu) / n)."""
    penalty = t * t / n
    half = np.sqrt(penalty * (share * (1 - share) + penalty / 4))
    low, high = ((share + penalty / 2 + sign * half) / (1 + penalty) for sign in (-1, 1))
    return np.maximum(low, 0), np.minimum(high, 1)


def ours(draw: Draw, *, level: float = LEVEL, added: float = 0.25) -> Ends:
    """`mean_interval`; nothing added: with the effective number of problems alone."""
    largest = (draw.problems - 1) * draw.mean * (1 - draw.mean) + added
    phi = np.divide(draw.squares + added, largest, out=np.ones_like(largest), where=largest > 0)
    # Equal values have a variance of 0, and an effective number without limit.
    return wilson(draw.mean, draw.problems / np.maximum(phi, 1e-12), student(draw.problems - 1, level))


def students(draw: Draw) -> Ends:
    """Mean and standard error over problems."""
    half = student(draw.problems - 1) * draw.error
    return draw.mean - half, draw.mean + half


def students_of_logit(draw: Draw) -> Ends:
    """The same on the logit scale, by the delta method; a mean of 0 or 1 is half a problem away from it."""
    half = 0.5 / (draw.problems + 1)
    share = np.clip(draw.mean, half, 1 - half)
    reach = student(draw.problems - 1) * draw.error / (share * (1 - share))
    low, high = expit(logit(share) - reach), expit(logit(share) + reach)
    return np.where(draw.error > 0, low, draw.mean), np.where(draw.error > 0, high, draw.mean)


def bca(draw: Draw, rng: np.random.Generator, resamples: int = RESAMPLES) -> Ends:
    """Bootstrap over problems, bias-corrected and accelerated (Efron 1987)."""
    problems = draw.problems
    correct = np.rint(draw.x * draw.samples)  # counts: sums that should be equal are
    weights = rng.multinomial(problems, np.full(problems, 1 / problems), resamples).astype(np.float64)
    total, boot = correct.sum(axis=1), np.sort(correct @ weights.T, axis=1)
    below = ((boot < total[:, None]).mean(axis=1) + (boot <= total[:, None]).mean(axis=1)) / 2
    bias = ndtri(np.clip(below, 0.5 / resamples, 1 - 0.5 / resamples))
    cubes = ((draw.x - draw.mean[:, None]) ** 3).sum(axis=1)
    spread = np.where(draw.squares > 0, draw.squares, 1.0)
    acceleration = cubes / (6 * spread**1.5)
    ends = []
    for z in (ndtri((1 - LEVEL) / 2), ndtri((1 + LEVEL) / 2)):
        shifted = bias + z
        place = ndtr(bias + shifted / (1 - acceleration * shifted)) * (resamples - 1)
        left = np.minimum(place.astype(np.int64), resamples - 2)
        pair = np.take_along_axis(boot, np.stack([left, left + 1], axis=1), axis=1)
        ends.append((pair[:, 0] + (place - left) * (pair[:, 1] - pair[:, 0])) / (problems * draw.samples))
    return ends[0], ends[1]


def ignoring_problems(draw: Draw) -> Ends:
    """Wilson's interval of all samples as if they were independent."""
    return wilson(draw.mean, draw.problems * draw.samples, float(ndtri((1 + LEVEL) / 2)))


def sampling(draw: Draw) -> Ends:
    """`sampling_interval` of problems with equally many samples, all right or wrong."""
    problems, n = draw.problems, draw.samples
    added = 0.5 / problems
    within = (draw.x * (1 - draw.x)).mean(axis=1) * n / (n - 1)
    phi = (within + added) / (draw.mean * (1 - draw.mean) + added)
    return wilson(draw.mean, problems * n / phi, student(problems * (n - 1)))


def student(degrees: int, level: float = LEVEL) -> float:
    """The t that an interval reaches to."""
    return float(stdtrit(degrees, (1 + level) / 2))


# Tests of two runs: p-values


def paired(a: Draw, b: Draw) -> tuple[Floats, Ends]:
    """`compare_paired`: p-value and interval of the difference."""
    d = Draw(b.x - a.x, a.samples)
    equal = np.ptp(d.x, axis=1) <= 1e-12
    error = np.where(equal, 1.0, d.error)
    rare = 1 - ((1 - LEVEL) / 2) ** (1 / d.problems)
    p = np.where(
        equal,
        np.minimum(1, 2 * (1 + np.abs(d.mean)) ** -float(d.problems)),
        2 * stdtr(d.problems - 1, -np.abs(d.mean) / error),
    )
    half = student(d.problems - 1) * error
    low = np.where(equal, d.mean - rare * (1 + d.mean), np.maximum(d.mean - half, -1))
    high = np.where(equal, d.mean + rare * (1 - d.mean), np.minimum(d.mean + half, 1))
    return p, (low, high)


def sign_flips(a: Draw, b: Draw, rng: np.random.Generator) -> Floats:
    """All flips up to 10 problems, random ones (and the one that was seen) beyond."""
    d, every = np.rint((b.x - a.x) * a.samples), a.problems <= 10
    if every:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=a.problems)))
    else:
        signs = rng.choice([-1.0, 1.0], (RESAMPLES, a.problems))
    beyond = (np.abs(d @ signs.T) >= np.abs(d.sum(axis=1))[:, None]).sum(axis=1)
    return np.asarray(beyond / len(signs) if every else (beyond + 1) / (RESAMPLES + 1))


def unpaired(a: Draw, b: Draw) -> Floats:
    """Student's t for two separate samples of problems."""
    error = np.hypot(a.error, b.error)
    t = np.divide(np.abs(b.mean - a.mean), error, out=np.full_like(error, np.inf), where=error > 0)
    return np.where(a.mean == b.mean, 1.0, 2 * stdtr(2 * a.problems - 2, -t))


def two_proportions(a: Draw, b: Draw) -> Floats:
    """All samples as if they were independent."""
    pooled = (a.mean + b.mean) / 2
    error = np.sqrt(2 * pooled * (1 - pooled) / (a.problems * a.samples))
    z = np.divide(np.abs(b.mean - a.mean), error, out=np.zeros_like(error), where=error > 0)
    return np.asarray(2 * ndtr(-z))


# What happens to the problems from one run to the other: the second run's probabilities


def more_odds(setting: Setting, rng: np.random.Generator, p: Floats) -> Floats:
    """Odds of solving a problem 2.2 times as high."""
    return ODDS * p / (1 - p + ODDS * p)


def some_redrawn(setting: Setting, rng: np.random.Generator, p: Floats) -> Floats:
    """Three problems in ten are as hard as any other."""
    return np.where(rng.random(p.shape) < 0.3, setting.difficulties(rng, p.shape), p)


def cancelling(setting: Setting, rng: np.random.Generator, p: Floats) -> Floats:
    """Of problems solved with probability 0.45, one in ten gains as much as the others lose together."""
    return np.where(rng.random(p.shape) < 0.1, 0.9, 0.4)


def independent(setting: Setting, rng: np.random.Generator, p: Floats) -> Floats:
    """Other problems are solved, half as many more where that is possible."""
    return setting._replace(mean=higher(setting)).difficulties(rng, p.shape)


def higher(setting: Setting) -> float:
    return min(1.5 * setting.mean, 0.97)


def one_in_twenty(setting: Setting, rng: np.random.Generator, p: Floats) -> Floats:
    """One problem in twenty is nearly solved, nothing else has changed."""
    return np.where(rng.random(p.shape) < 0.05, 0.1 * p + 0.9, p)


def gain_in_odds(setting: Setting) -> float:
    """Mean gain where all odds are 2.2 times as high; E p / (1 - z p) of a beta distribution is Euler's integral."""
    a, b = setting.beta
    return setting.mean * (ODDS * float(hyp2f1(1, a + 1, a + b + 1, 1 - ODDS)) - 1)


POWER = f"odds {ODDS} times as high (power)"
Change = Callable[[Setting, np.random.Generator, Floats], Floats]
# Name, what changes, and the settings.
REJECTED: list[tuple[str, Change, list[Setting]]] = [
    ("the same model twice", lambda setting, rng, p: p, [Setting(*d, n) for d in COMPARED for n in SAMPLES]),
    ("equal means, other problems solved", some_redrawn, [Setting(*d, n) for d in COMPARED for n in SAMPLES]),
    ("few large gains, many small losses", cancelling, [Setting(0.45, np.inf, n) for n in SAMPLES]),
    (POWER, more_odds, [Setting(*d, n) for d in COMPARED for n in SAMPLES]),
]
DIFFERENCES: list[tuple[str, Change, Callable[[Setting], float]]] = [
    (f"a difference: odds {ODDS} times as high", more_odds, gain_in_odds),
    ("a difference: half as many more solved, independently", independent, lambda s: higher(s) - s.mean),
    ("a difference on one problem in twenty", one_in_twenty, lambda s: 0.045 * (1 - s.mean)),
]
INTERVALS: dict[str, Callable[[Draw], Ends]] = {
    "`mean_interval`": ours,
    "Student's t": students,
    "t on the logit scale": students_of_logit,
    "samples as if independent": ignoring_problems,
    "`mean_interval` at 80 %": lambda draw: ours(draw, level=0.8),
    "`mean_interval` at 99 %": lambda draw: ours(draw, level=0.99),
    "`mean_interval` without the added problem": lambda draw: ours(draw, added=0.0),
}
BOOTSTRAP = "BCa bootstrap"
INTERVAL_COLUMNS = ("`mean_interval`", "Student's t", "t on the logit scale", BOOTSTRAP, "samples as if independent")
TEST_COLUMNS = ("paired t", "sign flips", "unpaired t", "samples as if independent")


def covered(ends: Ends, truth: float) -> float:
    """Share of the intervals with the truth inside."""
    return float(((ends[0] <= truth + 1e-12) & (truth - 1e-12 <= ends[1])).mean())


def width(ends: Ends) -> float:
    """Mean width inside [0, 1]."""
    return float((np.minimum(ends[1], 1) - np.maximum(ends[0], 0)).mean())


class Table:
    """Numbers by row name and number of problems, cell by cell, and their summary."""

    def __init__(self, part: str, worst: Callable[..., Any]) -> None:
        self.part, self.worst = part, worst
        self.found: dict[tuple[str, str, int], dict[Setting, tuple[float, float]]] = {}

    def add(
        self, name: str, problems: int, setting: Setting, value: float, size: float = np.nan, *, of: str = ""
    ) -> None:
        """A share, and a width where there is one."""
        self.found.setdefault((of, name, problems), {})[setting] = value, size

    def rows(self) -> list[dict[str, Any]]:
        """One for each name and number of problems, with the cell that is worst."""
        rows = []
        for (of, name, problems), cells in self.found.items():
            worst = self.worst(cells, key=lambda setting: cells[setting][0])
            widths = [cells[setting][1] for setting in cells if 0.1 <= setting.mean <= 0.9]
            rows.append(
                {
                    "part": self.part,
                    "of": of,
                    "what": name,
                    "problems": problems,
                    "cells": len(cells),
                    "mean": float(np.mean([value for value, _ in cells.values()])),
                    "worst": cells[worst][0],
                    "worst at": worst._asdict(),
                    "width": float(np.mean(widths)) if widths else None,
                }
            )
        return rows


class Run:
    """One simulation: its size, its seed, and what the public functions were compared on."""

    def __init__(self, *, repetitions: int, seed: int, problems: Sequence[int] = PROBLEMS) -> None:
        self.repetitions, self.seed, self.problems = repetitions, seed, problems
        self.checked, self.largest = 0, 0.0

    def generator(self, *key: int) -> np.random.Generator:
        """Randomness of one cell, independent of every other's."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def check(self, what: str, expected: Sequence[float], found: Sequence[float]) -> None:
        """The formulas for arrays are those of the public functions."""
        difference = float(np.max(np.abs(np.subtract(expected, found))))
        self.checked, self.largest = self.checked + 1, max(self.largest, difference)
        if not difference <= 1e-9:
            raise RuntimeError(f"{what} differs from its form for arrays by {difference:.3g}: {expected}, {found}")

    def coverage(self) -> list[dict[str, Any]]:
        """Intervals for the mean over problems."""
        table = Table("coverage", min)
        for problems, (index, setting) in itertools.product(self.problems, enumerate(GRID)):
            rng = self.generator(0, problems, index)
            repetitions = self.repetitions if problems < 500 else -(-self.repetitions // 2)
            draw = Draw(setting.values(rng, setting.difficulties(rng, (repetitions, problems))), setting.samples)
            for name, method in INTERVALS.items():
                ends = method(draw)
                table.add(name, problems, setting, covered(ends, setting.mean), width(ends))
            some = draw.first(-(-self.repetitions // 4))
            ends = bca(some, rng)
            table.add(BOOTSTRAP, problems, setting, covered(ends, setting.mean), width(ends))
            some = draw.first(CHECKED)
            for level in (0.8, LEVEL, 0.99):
                for x, low, high in zip(some.x, *ours(some, level=level), strict=True):
                    interval = mean_interval(x, level=level)
                    self.check("mean_interval", (interval.low, interval.high), (low, high))
        return table.rows()

    def rejections(self) -> list[dict[str, Any]]:
        """Tests of no difference."""
        table = Table("rejections", max)
        for kind, (name, change, settings) in enumerate(REJECTED):
            for problems, (index, setting) in itertools.product(self.problems, enumerate(settings)):
                if problems > 100:
                    continue
                rng = self.generator(1, kind, problems, index)
                a, b = self.pair(setting, change, rng, (self.repetitions, problems))
                some = -(-self.repetitions // 4)
                found = {
                    "paired t": paired(a, b)[0],
                    "sign flips": sign_flips(a.first(some), b.first(some), rng),
                    "unpaired t": unpaired(a, b),
                    "samples as if independent": two_proportions(a, b),
                }
                for test, p in found.items():
                    table.add(test, problems, setting, float((p <= 1 - LEVEL + 1e-12).mean()), of=name)
        return table.rows()

    def pair(
        self, setting: Setting, change: Change, rng: np.random.Generator, shape: tuple[int, int]
    ) -> tuple[Draw, Draw]:
        """Two runs on the same problems."""
        p = np.full(shape, setting.mean) if np.isinf(setting.alike) else setting.difficulties(rng, shape)
        a, b = (Draw(setting.values(rng, q), setting.samples) for q in (p, change(setting, rng, p)))
        p_values, (lows, highs) = paired(a.first(CHECKED), b.first(CHECKED))
        for x, y, *found in zip(a.x, b.x, p_values, lows, highs, strict=False):
            expected = compare_paired(x, y)
            self.check("compare_paired", (expected.p_value, expected.low, expected.high), found)
        return a, b

    def differences(self) -> list[dict[str, Any]]:
        """The interval of a difference that there is."""
        table = Table("beyond", min)
        for kind, (name, change, truth) in enumerate(DIFFERENCES):
            for problems, (index, setting) in itertools.product(self.problems, enumerate(GRID)):
                if problems > 100:
                    continue
                rng = self.generator(2, kind, problems, index)
                a, b = self.pair(setting, change, rng, (-(-self.repetitions // 2), problems))
                table.add(name, problems, setting, covered(paired(a, b)[1], truth(setting)))
        return table.rows()

    def unbounded(self) -> list[dict[str, Any]]:
        """Student's interval for lognormal values."""
        rows = []
        for problems, spread in itertools.product(self.problems, (0.5, 1.0, 1.5)):
            rng = self.generator(3, problems, round(10 * spread))
            draw = Draw(rng.lognormal(0, spread, (5 * self.repetitions, problems)), 1)
            ends = students(draw)
            share = covered(ends, float(np.exp(spread**2 / 2)))
            name = f"lognormal values, standard deviation of the logarithm {spread:g}"
            rows.append(
                {
                    "part": "beyond",
                    "of": "",
                    "what": name,
                    "problems": problems,
                    "cells": 1,
                    "mean": share,
                    "worst": share,
                }
            )
            for x, low, high in zip(draw.x[:CHECKED], *ends, strict=False):
                interval = mean_interval(x, bounds=None)
                self.check("mean_interval without bounds", (interval.low, interval.high), (low, high))
        return rows

    def these_problems(self) -> list[dict[str, Any]]:
        """`sampling_interval`: sets of problems, each sampled again and again."""
        means: dict[int, list[float]] = {}
        for problems, (index, cell) in itertools.product(self.problems, enumerate(GRID)):
            if problems > 100:
                continue
            setting = cell._replace(samples=max(cell.samples, 2))
            rng = self.generator(4, problems, index)
            for _ in range(SETS):
                p = setting.difficulties(rng, (problems,))
                shape = (-(-self.repetitions // 4), problems)
                draw = Draw(setting.values(rng, np.broadcast_to(p, shape)), setting.samples)
                ends = sampling(draw)
                means.setdefault(problems, []).append(covered(ends, float(p.mean())))
            samples = np.arange(setting.samples) < np.rint(draw.x[0] * setting.samples)[:, None]
            interval = sampling_interval(samples.tolist())
            self.check("sampling_interval", (interval.low, interval.high), (ends[0][0], ends[1][0]))
        return [
            {
                "part": "beyond",
                "of": "",
                "what": "`sampling_interval`, lowest of single sets of problems",
                "problems": problems,
                "cells": len(found),
                "mean": float(np.mean(found)),
                "worst": min(found),
            }
            for problems, found in means.items()
        ]

    def result(self) -> dict[str, Any]:
        """Rows of all parts, and what was checked on the way."""
        parts = (self.coverage, self.rejections, self.unbounded, self.these_problems, self.differences)
        rows = [row for part in parts for row in part()]
        return {
            "repetitions": self.repetitions,
            "seed": self.seed,
            "public functions": {"calls": self.checked, "largest difference": self.largest},
            "rows": rows,
        }


# Rendering


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of the page, with what they were made from."""
    rows = {(row["part"], row["of"], row["what"], row["problems"]): row for row in result["rows"]}
    by_part = [
        list(dict.fromkeys(row["problems"] for row in result["rows"] if row["part"] == part))
        for part in ("coverage", "rejections", "beyond")
    ]
    repetitions = result["repetitions"]

    def both(*key: Any, digits: int = 3, worst: bool = True) -> str:
        row = rows.get(key)
        if row is None:
            return ""
        values = [row["mean"], row["worst"]] if worst and row["cells"] > 1 else [row["mean"]]
        return " / ".join(f"{value:.{digits}f}" for value in values)

    lines = [
        f"Coverage of 95 % intervals for the mean over problems, mean / lowest of {len(GRID)} cells with {repetitions} "
        f"repetitions each ({-(-repetitions // 2)} for 500 problems, {-(-repetitions // 4)} for the bootstrap); the "
        "last column is the mean width of ours and of Student's interval where means are 0.1 to 0.9:",
        "",
        *head("Problems", *INTERVAL_COLUMNS, "width"),
    ]
    for problems in by_part[0]:
        cells = [both("coverage", "", name, problems, digits=2) for name in INTERVAL_COLUMNS]
        cells[0] = "**" + both("coverage", "", INTERVAL_COLUMNS[0], problems) + "**"
        widths = [f"{rows['coverage', '', name, problems]['width']:.2f}" for name in INTERVAL_COLUMNS[:2]]
        lines.append(line(problems, *cells, ", ".join(widths)))
    lines += [
        "",
        f"Comparison, rejections at p ≤ 0.05 with {repetitions} repetitions ({-(-repetitions // 4)} for sign flips), "
        f"mean / highest of {len(REJECTED[0][2])} settings (3 in the third case); for the power, the mean alone:",
        "",
        *head("", "Problems", *TEST_COLUMNS),
    ]
    for name, *_ in REJECTED:
        for problems in by_part[1]:
            cells = [both("rejections", name, test, problems, worst=name != POWER) for test in TEST_COLUMNS]
            lines.append(line(name if problems == by_part[1][0] else "", problems, *cells))
    lines += [
        "",
        "Other coverage, mean / lowest (of 95 % intervals where nothing else is said), by number of problems:",
        "",
        *head("", *by_part[0]),
    ]
    rest = [name for name in INTERVALS if name not in INTERVAL_COLUMNS]
    lines += [line(name, *(both("coverage", "", name, problems) for problems in by_part[0])) for name in rest]
    names = dict.fromkeys(row["what"] for row in result["rows"] if row["part"] == "beyond")
    lines += [line(name, *(both("beyond", "", name, problems) for problems in by_part[0])) for name in names]
    return "\n".join(lines) + "\n"


def head(*names: Any) -> list[str]:
    return [line(*names), "|" + "---|" * len(names)]


def line(*cells: Any) -> str:
    return "|" + "|".join(f" {cell} " if cell != "" else " " for cell in cells) + "|"


def with_tables(page: str, result: Mapping[str, Any]) -> str:
    """A page with the tables of a result between its markers.

    Raises:
        ValueError: The page does not have the markers once each, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"the page must have {BEGIN} and then {END}, once each")
    return f"{before}{BEGIN}\n{markdown(result)}{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; write them with `--output` and `--page`."""
    from simulations import results

    parser = argparse.ArgumentParser(prog="python -m benchmarks.intervals", description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=10_000, help="in each cell; some parts take a fraction")
    parser.add_argument("--problems", type=int, nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the numbers as JSON, with commit, versions and machine")
    parser.add_argument("--page", type=Path, help="also replace the tables between the markers of this page")
    options = parser.parse_args(arguments)
    if options.repetitions < CHECKED:
        parser.error(f"--repetitions must be at least {CHECKED}, not {options.repetitions}")
    settings = {"repetitions": options.repetitions, "problems": options.problems, "seed": options.seed}
    result = Run(**settings).result()
    print(markdown(result))
    checked = result["public functions"]
    print(
        f"{checked['calls']} of them computed by the public functions: at most {checked['largest difference']:.1g} off"
    )
    if options.output is not None:
        results.write_json(options.output, {"provenance": results.provenance(settings), **result})
    if options.page is not None:
        results.write_text(options.page, with_tables(options.page.read_text(encoding="utf-8"), result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
