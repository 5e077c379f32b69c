"""Bias and variance of estimators on a world: exactly where it can be enumerated, by Monte Carlo elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

import ctpo
from simulations.exact import (
    MAX_TRAJECTORIES,
    AdvantageKind,
    EstimatorMoments,
    enumerate_trajectories,
    estimator_moments,
    policy_gradient,
    trajectory_count,
)
from simulations.mdp import World
from simulations.monte_carlo import LEAST_EFFECTIVE_SAMPLES, SummedGradient, estimate

#: The exact full-sequence estimator, the yardstick of every relative variance.
SEQUENCE = ctpo.get_estimator("sequence")
#: Share of the total variance that may rest on fewer than `LEAST_EFFECTIVE_SAMPLES` effective samples.
UNTOLD_SHARE = 0.25


@dataclass(frozen=True)
class Measurement:
    """One estimator on one world.

    Attributes:
        world: Name of the world and of its parameters.
        estimator: Name of the estimator.
        engine: "enumeration" or "Monte Carlo".
        relative_bias: Norm of the bias over the norm of the true gradient. By Monte Carlo the norm of a noisy
            vector: about `relative_bias_error` where there is no bias. NaN where so few trajectories carry the
            variance (`UNTOLD_SHARE`) that neither the mean nor its error bar can be believed.
        relative_bias_error: Its scale of noise, the root of the summed squared standard errors; 0 if exact.
        total_variance: Trace of the covariance for one trajectory; NaN as the bias.
        relative_variance: The same over that of the full-sequence estimator; NaN if either is.
        clip_rate: Share of policy tokens clipped under the behavior policy; NaN by Monte Carlo.
    """

    world: str
    estimator: str
    engine: str
    relative_bias: float
    relative_bias_error: float
    total_variance: float
    relative_variance: float
    clip_rate: float


def measure(
    world: World,
    estimators: Mapping[str, ctpo.Estimator],
    advantage: AdvantageKind = "A_target",
    *,
    outcome: bool = False,
    samples: int = 100_000,
    seed: int | np.random.SeedSequence = 0,
    jobs: int = 1,
) -> list[Measurement]:
    """Measure estimators with their own coefficients, the code that a trainer runs.

    Args:
        world: A world in float64 or Fractions.
        estimators: By name.
        advantage: Name of the advantage table.
        outcome: Multiply it by the outcome of the state in which the stream stops.
        samples: Trajectories, if the world is too large to enumerate.
        seed: Of the Monte Carlo; all estimators see the same samples.
        jobs: Processes of the Monte Carlo.
    """
    world = world.as_float() if world.exact else world
    gradient = policy_gradient(world)
    size = float(np.linalg.norm(gradient))
    if size == 0.0:
        raise ValueError(f"world: the true gradient of {world.name!r} is 0, so no bias is relative to it")
    name = f"{world.name}, {'network' if world.scores is not None else world.parameters} parameters"
    exact = trajectory_count(world, MAX_TRAJECTORIES) <= MAX_TRAJECTORIES
    everything = {**estimators, "": SEQUENCE}
    rows: dict[str, tuple[float, float, float, float]] = {}
    if exact:
        paths = enumerate_trajectories(world)
        for key, estimator in everything.items():
            found: EstimatorMoments = estimator_moments(
                world, estimator, advantage, outcome=outcome, trajectories=paths
            )
            rows[key] = (float(np.linalg.norm(found.bias)), 0.0, found.total_variance, found.clip_rate)
    else:
        for key, estimator in everything.items():
            result = estimate(
                world,
                SummedGradient(world, estimator, advantage, outcome),
                n=samples,
                seed=seed,
                jobs=jobs,
            )
            assert result.variance_samples is not None
            total = float(result.variance.sum())
            if float(result.variance[result.variance_samples < LEAST_EFFECTIVE_SAMPLES].sum()) > UNTOLD_SHARE * total:
                rows[key] = (math.nan, math.nan, math.nan, math.nan)
                continue
            bias = float(np.linalg.norm(result.mean - gradient))
            rows[key] = (bias, float(np.linalg.norm(result.standard_error)), total, math.nan)
    base = rows[""][2]
    return [
        Measurement(
            world=name,
            estimator=key,
            engine="enumeration" if exact else "Monte Carlo",
            relative_bias=rows[key][0] / size,
            relative_bias_error=rows[key][1] / size,
            total_variance=rows[key][2],
            relative_variance=rows[key][2] / base,
            clip_rate=rows[key][3],
        )
        for key in estimators
    ]
