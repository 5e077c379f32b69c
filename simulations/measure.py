r"""Bias, variance, clip rate and effective sample size of estimators on a world, exactly wherever that is possible.

Each estimator gets the first engine that can take it: enumeration of every trajectory; dynamic programming for
weights that are products of token ratios, without window and limits; Monte Carlo, one pass for all that are left.

That pass uses what is known exactly. The mean of Y, an estimator's summed gradient, is taken as

.. math:: E Y = E C + E[Y - C]

where C is one of a few unclipped estimators whose mean comes from dynamic programming, evaluated on the same
trajectories. Close to on-policy Y - C is small, and so is the error bar.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

import ctpo
from simulations.exact import (
    MAX_TRAJECTORIES,
    AdvantageKind,
    WeightMoments,
    check_sees_one_trajectory,
    enumerate_trajectories,
    estimator_moments,
    gradient_mean,
    gradient_moments,
    policy_gradient,
    ratio_moments,
    score_summer,
    trajectory_count,
    weight_moments,
)
from simulations.mdp import World
from simulations.monte_carlo import CHUNK_TOKENS, LEAST_EFFECTIVE_SAMPLES, Advantages, Batch, reduced

#: The named estimators that the studies measure.
STUDIED = (
    "reinforce",
    "grpo",
    "dapo",
    "gspo",
    "cispo",
    "sequence",
    "ctpo",
    "ctpo_fixed",
    "ctpo_mean",
    "minpro",
    "lookahead",
)
#: Unclipped estimators with exact means, which those by Monte Carlo are compared with on the same trajectories.
CONTROLS = {
    level: ctpo.Estimator(level, form="unclipped", max_log_ratio=None, max_token_log_ratio=None)
    for level in ("token", "cumulative")
} | {"none": ctpo.get_estimator("reinforce")}
#: The exact full-sequence estimator, the yardstick of every relative variance.
SEQUENCE = ctpo.get_estimator("sequence")
#: Levels that dynamic programming takes, see `simulations.exact.gradient_moments`.
PRODUCT_LEVELS = ("token", "cumulative", "window", "lookahead", "sequence")
#: Forms whose weight is the ratio itself where no bound acts.
PRODUCT_FORMS = ("ppo", "gppo", "cispo", "reject", "unclipped")
#: Above this log E rho_H^2 dynamic programming would come close to the largest float64.
MOST_LOG_SECOND_MOMENT = 500.0
#: Chunks of the Monte Carlo, at least, so that leaving out one at a time gives error bars.
LEAST_CHUNKS = 32


@dataclass(frozen=True)
class Measurement:
    """One estimator on one world.

    With g the true gradient and Y the estimator's summed gradient of one trajectory:

    Attributes:
        world: Name of the world and of its parameters.
        estimator: Name of the estimator.
        engine: "enumeration", "dynamic programming" or "Monte Carlo".
        relative_bias: |E Y - g| / |g|. By Monte Carlo the norm of a noisy vector: about `relative_bias_error` where
            there is no bias. NaN where fewer than `LEAST_EFFECTIVE_SAMPLES` trajectories carry its squared error, so
            that neither the mean nor its error bar can be believed.
        relative_bias_error: Its scale of noise, the root of the summed squared standard errors; 0 if exact.
        gain: E Y . g / |g|^2, the step made along the true gradient: 1 if unbiased, below 0 if it points away.
        gain_error: Its standard error.
        total_variance: Trace of the covariance of Y; NaN where too few trajectories carry it.
        total_variance_error: Its standard error.
        relative_variance: `total_variance` over that of the full-sequence estimator; NaN if either is.
        clip_rate: Share of policy tokens clipped or rejected under the behavior policy.
        clip_rate_error: Its standard error; 0 also where no sample was clipped.
        ess: Effective sample size of the weights that it applies as a share of the tokens, see
            `simulations.exact.WeightMoments`; NaN where too few trajectories carry the squared weights.
        ess_error: Its standard error.
        gradient_norm: |g|.
    """

    world: str
    estimator: str
    engine: str
    relative_bias: float
    relative_bias_error: float
    gain: float
    gain_error: float
    total_variance: float
    total_variance_error: float
    relative_variance: float
    clip_rate: float
    clip_rate_error: float
    ess: float
    ess_error: float
    gradient_norm: float

    def relative_mse(self, batch: int) -> float:
        r"""Mean squared error of the mean over a batch of trajectories, over the squared norm of the true gradient.

        .. math:: \frac{|E Y - g|^2 + \mathrm{tr Cov}(Y) / n}{|g|^2}

        1 is what no step at all would have. The share of noise in a sampled bias is taken off.
        """
        return max(self._squared_bias, 0.0) + self._noise(batch)

    def relative_mse_error(self, batch: int) -> float:
        """At most the standard error of `relative_mse`: as if all noise of the bias lay along it."""
        squared, noise = self.relative_bias**2, self.relative_bias_error**2
        of_bias = math.sqrt(4 * squared * noise + 2 * noise**2)
        return of_bias + self.total_variance_error / (batch * self.gradient_norm**2)

    def direction_error(self, batch: int) -> float:
        r"""`relative_mse` of the same estimate times the best constant >= 0, in [0, 1].

        .. math:: \min_{c \ge 0} \frac{E|c \bar Y - g|^2}{|g|^2}
            = 1 - \frac{\max(E Y \cdot g, 0)^2}{|g|^2 \, (|E Y|^2 + \mathrm{tr Cov}(Y) / n)}

        What is left when an optimizer sets the length of the step, as Adam does: an estimator that only shrinks the
        gradient, or clips nearly everything, gains nothing by that.
        """
        # |E Y|^2 / |g|^2, never below the square of its part along g.
        length = max(self._squared_bias + 2 * self.gain - 1, self.gain**2)
        total = length + self._noise(batch)
        return 1.0 if total == 0 else 1.0 - max(self.gain, 0.0) ** 2 / total

    @property
    def _squared_bias(self) -> float:
        return self.relative_bias**2 - self.relative_bias_error**2

    def _noise(self, batch: int) -> float:
        if batch < 1:
            raise ValueError(f"batch: must be a whole number of trajectories >= 1, got {batch!r}")
        return self.total_variance / (batch * self.gradient_norm**2)


def measure(
    world: World,
    estimators: Mapping[str, ctpo.Estimator],
    advantage: AdvantageKind = "A_target",
    *,
    outcome: bool = False,
    samples: int = 100_000,
    seed: int | np.random.SeedSequence = 0,
    jobs: int = 1,
    limit: int = MAX_TRAJECTORIES,
) -> list[Measurement]:
    """Measure estimators with their own coefficients, the code that a trainer runs.

    Dynamic programming alone computes the weights by itself; tests hold it to the same numbers.

    Args:
        world: A world in float64 or Fractions.
        estimators: By name.
        advantage: Name of the advantage table.
        outcome: Multiply it by the outcome of the state in which the stream stops.
        samples: Trajectories, for the estimators that need Monte Carlo.
        seed: Of the Monte Carlo; all estimators see the same samples.
        jobs: Processes of the Monte Carlo.
        limit: Largest number of trajectories to enumerate; 0 leaves everything to the other engines.

    Raises:
        ValueError: The world's true gradient is 0, an estimator looks at more than one trajectory, or the engines
            refuse an argument.
    """
    for estimator in estimators.values():
        check_sees_one_trajectory(estimator)
    world = world.as_float() if world.exact else world
    gradient = policy_gradient(world)
    if not np.any(gradient):
        raise ValueError(f"world: the true gradient of {world.name!r} is 0, so no bias is relative to it")
    task = _Task(world, gradient, advantage, outcome)
    everything = {**estimators, "": SEQUENCE}
    if trajectory_count(world, limit) <= limit:
        found = task.enumerated(everything)
    else:
        products = {key: level for key, e in everything.items() if (level := task.product_level(e)) is not None}
        recursions = {level: task.by_recursion(*level) for level in set(products.values())}
        found = {key: recursions[level] for key, level in products.items()}
        left = {key: e for key, e in everything.items() if key not in products}
        if set(left) - {""}:
            found |= task.sampled(left, samples, seed, jobs)
    base = found[""].total_variance if "" in found else math.nan
    return [found[key].row(task.name, key, task.gradient, base) for key in estimators]


@dataclass(frozen=True)
class _Found:
    """What an engine finds: moments of the summed gradient, and of the weights; errors of what was sampled."""

    engine: str
    mean: np.ndarray
    total_variance: float
    clip_rate: float
    ess: float
    mean_error: float = 0.0
    along_error: float = 0.0
    total_variance_error: float = 0.0
    clip_rate_error: float = 0.0
    ess_error: float = 0.0

    def row(self, world: str, estimator: str, gradient: np.ndarray, base: float) -> Measurement:
        size = float(np.linalg.norm(gradient))
        return Measurement(
            world=world,
            estimator=estimator,
            engine=self.engine,
            relative_bias=float(np.linalg.norm(self.mean - gradient)) / size,
            relative_bias_error=self.mean_error / size,
            gain=float(self.mean @ gradient) / size**2,
            gain_error=self.along_error / size**2,
            total_variance=self.total_variance,
            total_variance_error=self.total_variance_error,
            relative_variance=self.total_variance / base if base else math.nan,
            clip_rate=self.clip_rate,
            clip_rate_error=self.clip_rate_error,
            ess=self.ess,
            ess_error=self.ess_error,
            gradient_norm=size,
        )


@dataclass(frozen=True)
class _Task:
    """A world with its advantages, and the three engines."""

    world: World
    gradient: np.ndarray
    advantage: AdvantageKind
    outcome: bool

    @property
    def name(self) -> str:
        world = self.world
        return f"{world.name}, {'network' if world.scores is not None else world.parameters} parameters"

    def enumerated(self, estimators: Mapping[str, ctpo.Estimator]) -> dict[str, _Found]:
        paths = enumerate_trajectories(self.world)
        found = {}
        for key, estimator in estimators.items():
            moments = estimator_moments(self.world, estimator, self.advantage, outcome=self.outcome, trajectories=paths)
            found[key] = _Found("enumeration", moments.mean, moments.total_variance, moments.clip_rate, moments.ess)
        return found

    @cached_property
    def log_second_moment(self) -> float:
        moments = ratio_moments(self.world).log_second_moment
        assert moments is not None
        return float(moments[-1])

    @cached_property
    def token_range(self) -> tuple[float, float]:
        """Smallest and largest token ratio that the behavior policy can sample."""
        sampled = self.world.mdp.policy_states[:, None] & (self.world.behavior > 0)
        ratio = self.world.ratio[sampled]
        return float(ratio.min()), float(ratio.max())

    def product_level(self, estimator: ctpo.Estimator) -> tuple[str, int | None] | None:
        """Level and window of an estimator that dynamic programming takes, else None.

        A window for token ratios that no token of the world leaves is none.
        """
        if self.log_second_moment > MOST_LOG_SECOND_MOMENT:
            return None
        if estimator.form == "reinforce":
            return "none", None
        if estimator.level not in PRODUCT_LEVELS or estimator.form not in PRODUCT_FORMS or estimator.region is not None:
            return None
        if estimator.level == "token":
            low, high = self.token_range
            limit = estimator.max_token_log_ratio
            if limit is not None and not (low > 0 and max(-math.log(low), math.log(high)) <= limit):
                return None
            if isinstance(estimator.clip, ctpo.RatioClip):
                clip = estimator.clip
                inside = 1 - clip.low <= low and high <= min(1 + clip.high, clip.dual or math.inf)
                return ("token", None) if inside else None
        elif estimator.max_log_ratio is not None or estimator.max_token_log_ratio is not None:
            return None
        return (estimator.level, estimator.window) if estimator.clip is None else None

    def by_recursion(self, level: str, window: int | None) -> _Found:
        moments = gradient_moments(self.world, level, self.advantage, window=window, outcome=self.outcome)
        ess = float(weight_moments(self.world, level, window=window).ess)
        return _Found("dynamic programming", moments.mean, float(moments.total_variance), 0.0, ess)

    def sampled(
        self,
        estimators: Mapping[str, ctpo.Estimator],
        samples: int,
        seed: int | np.random.SeedSequence,
        jobs: int,
    ) -> dict[str, _Found]:
        world = self.world
        means = {}
        if self.log_second_moment <= MOST_LOG_SECOND_MOMENT:
            for level in CONTROLS:
                means[level] = gradient_mean(world, level, self.advantage, outcome=self.outcome)
        reduction = _Pass(
            Advantages(world, self.advantage, self.outcome),
            self.gradient,
            tuple(estimators.values()),
            tuple(CONTROLS[level] for level in means),
        )
        tokens = min(CHUNK_TOKENS, max(samples // LEAST_CHUNKS, 2) * world.mdp.horizon)
        chunks = list(reduced(world, reduction, n=samples, seed=seed, jobs=jobs, tokens=tokens))
        exact = [np.zeros(len(self.gradient)), *means.values()]
        return {
            key: self._from_sums([chunk[k] for chunk in chunks], exact, samples) for k, key in enumerate(estimators)
        }

    def _from_sums(self, chunks: Sequence[_Sums], exact: Sequence[np.ndarray], n: int) -> _Found:
        """Moments of one estimator from the sums of every chunk."""
        differences, squares, fourths, along = (
            np.sum([getattr(chunk, name) for chunk in chunks], axis=0)
            for name in ("differences", "squares", "fourths", "along")
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            carried = np.where(fourths > 0, squares**2 / fourths, 0.0)
        # squares are about the true gradient for Y itself (place 0), about 0 for the differences from controls.
        centers = differences / n
        away = centers.copy()
        away[0] -= self.gradient
        spread = np.maximum(squares / n - (away**2).sum(axis=1), 0.0) * (n / (n - 1))
        best = min(
            (k for k in range(len(exact)) if carried[k] >= LEAST_EFFECTIVE_SAMPLES),
            key=lambda k: float(spread[k]),
            default=None,
        )
        mean, mean_error, along_error = np.full(len(self.gradient), math.nan), math.nan, math.nan
        if best is not None:
            mean = exact[best] + centers[best]
            mean_error = math.sqrt(spread[best] / n)
            along_spread = along[best] / n - float(centers[best] @ self.gradient) ** 2
            along_error = math.sqrt(max(along_spread, 0.0) / n)
        told = carried[0] >= LEAST_EFFECTIVE_SAMPLES
        tail = np.sum([chunk.tail for chunk in chunks], axis=0)
        weighed = tail[0] ** 2 >= LEAST_EFFECTIVE_SAMPLES * tail[1]
        clip_rate, clip_error = _jackknife([chunk.clips for chunk in chunks], lambda sums: sums[0] / sums[1])
        ess, ess_error = _jackknife([chunk.weights for chunk in chunks], lambda sums: WeightMoments(*sums).ess)
        return _Found(
            "Monte Carlo",
            mean,
            float(spread[0]) if told else math.nan,
            clip_rate,
            ess if weighed else math.nan,
            mean_error=mean_error,
            along_error=along_error,
            total_variance_error=math.sqrt(max(fourths[0] / n - (squares[0] / n) ** 2, 0.0) / n) if told else math.nan,
            clip_rate_error=clip_error,
            ess_error=ess_error if weighed else math.nan,
        )


@dataclass(frozen=True)
class _Sums:
    """Sums over a chunk of trajectories, for one estimator; first axis: nothing subtracted, then each control.

    Attributes:
        differences: (C, D) of Y - C.
        squares, fourths: (C,) of |Y - g|^2, then |Y - C|^2, and of their squares.
        along: (C,) of ((Y - C) . g)^2.
        clips: Tokens clipped or rejected, and tokens written.
        weights: (3, H) tokens written, their weights and squared weights, at each place.
        tail: (2,) of the summed squared weights of a trajectory, and of their squares.
    """

    differences: np.ndarray
    squares: np.ndarray
    fourths: np.ndarray
    along: np.ndarray
    clips: np.ndarray
    weights: np.ndarray
    tail: np.ndarray


@dataclass(frozen=True)
class _Pass:
    """Reduction of a batch: `_Sums` of every estimator, on the same trajectories."""

    advantages: Advantages
    gradient: np.ndarray
    estimators: tuple[ctpo.Estimator, ...]
    controls: tuple[ctpo.Estimator, ...]

    def __call__(self, batch: Batch) -> list[_Sums]:
        advantages = self.advantages(batch)
        add_up = score_summer(self.advantages.world, batch.states, batch.actions)
        arrays = (batch.logp, batch.behavior_logp, advantages, batch.mask)
        controls = [add_up(control.coefficients(*arrays).weight * advantages) for control in self.controls]
        written = batch.mask.sum(axis=0).astype(float)
        result = []
        for estimator in self.estimators:
            found = estimator.coefficients(*arrays)
            summed = add_up(found.weight * advantages)
            differences, squares, fourths, along = [], [], [], []
            for control in (None, *controls):
                difference = summed if control is None else summed - control
                from_center = difference - self.gradient if control is None else difference
                square = np.einsum("ij,ij->i", from_center, from_center)
                differences.append(difference.sum(axis=0))
                squares.append(square.sum())
                fourths.append(square @ square)
                along.append(((difference @ self.gradient) ** 2).sum())
            heavy = np.einsum("ij,ij->i", found.weight, found.weight)
            clipped = found.clipped_low | found.clipped_high | found.clipped_dual | found.rejected
            result.append(
                _Sums(
                    np.array(differences),
                    np.array(squares),
                    np.array(fourths),
                    np.array(along),
                    np.array([clipped.sum(), written.sum()], dtype=float),
                    np.stack([written, found.weight.sum(axis=0), np.einsum("ij,ij->j", found.weight, found.weight)]),
                    np.array([heavy.sum(), heavy @ heavy]),
                )
            )
        return result


def _jackknife(sums: Sequence[np.ndarray], function: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """A function of summed chunks, and its standard error by leaving out one chunk at a time."""
    total = np.sum(sums, axis=0)
    without = np.array([function(total - chunk) for chunk in sums])
    m = len(sums)
    return float(function(total)), math.sqrt((m - 1) / m * float(((without - without.mean()) ** 2).sum()))
