"""Claim 12: numerical noise spreads the cumulative ratio like sqrt(t), just as a change of the policy does."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np

from ctpo.diagnostics import SpreadFit, fit_spread
from simulations.claims.registry import Claim, Context, Evidence
from simulations.claims.trained_on import Update, binary_tree
from simulations.claims.worlds import HALF, known, listed
from simulations.exact import enumerate_trajectories
from simulations.mdp import World, policy_table
from simulations.monte_carlo import z_threshold

#: Probability of every sequence of token ratios.
Law = dict[tuple[Fraction, ...], Fraction]
TWO_THIRDS = Fraction(2, 3)


def policy_change(horizon: int) -> Law:
    """Ratios of fresh sequences after one update on another one, which moves every token ratio to 4/3 or 2/3."""
    update = Update(binary_tree(horizon, lambda _p: HALF, lambda s: 2 * s[-1] - 1, "position"), Fraction(2))
    law: Law = defaultdict(Fraction)
    for probability, _, direction in update.groups:
        ratio = update.target(direction)[update.paths.states, update.paths.actions] / update.paths.behavior
        for p, row in zip(update.paths.behavior_probability, ratio, strict=True):
            law[tuple(row)] += probability * p
    return dict(law)


def rounded_logits(horizon: int) -> Law:
    """The same policy with logits rounded up or down by log 2 as the prefix has it, then normalized again."""
    world = binary_tree(horizon, lambda _p: HALF, lambda _s: 0)

    # Any function of the prefix will do, as rounding is one.
    def rule(prefix: tuple[int, ...]) -> list[Fraction]:
        up = sum((k + 2) * a for k, a in enumerate(prefix)) % 3 == 0
        return [1 - TWO_THIRDS, TWO_THIRDS] if up else [TWO_THIRDS, 1 - TWO_THIRDS]

    paths = enumerate_trajectories(World(world.mdp, world.behavior, policy_table(world.mdp, rule)))
    law: Law = defaultdict(Fraction)
    for probability, row in zip(paths.behavior_probability, paths.ratio, strict=True):
        law[tuple(row)] += probability
    return dict(law)


def rounded_log_probabilities(horizon: int) -> Law:
    """The same policy with every recorded log-probability off by +-log 2, whatever the token: not normalized."""
    values = (Fraction(2), HALF)
    return dict.fromkeys(product(values, repeat=horizon), HALF**horizon)


def moments(law: Law, t: int) -> tuple[Fraction, float, float]:
    """E rho_t, and mean and variance of log rho_t."""
    mean = sum((p * math.prod(row[:t], start=Fraction(1)) for row, p in law.items()), Fraction(0))
    logs = [(float(p), math.log(math.prod(row[:t], start=Fraction(1)))) for row, p in law.items()]
    center = sum(p * x for p, x in logs)
    return mean, center, sum(p * (x - center) ** 2 for p, x in logs)


def check_spread(_context: Context, noise: Callable[[int], Law]) -> Iterator[Evidence]:
    """Rounded logits and an update on another sequence give the ratios one and the same law."""
    horizon = 5
    found, changed = noise(horizon), policy_change(horizon)
    variances = [moments(found, t)[2] / math.log(2) ** 2 for t in range(1, horizon + 1)]
    yield Evidence(
        "fair tokens: the law of (r_1, ..., r_5) for an unchanged policy with rounded logits, and for fresh sequences "
        "after an update; Var(log2 rho_t), t = 1..5",
        "enumeration",
        f"{'the same' if found == changed else 'not the same'} probability for each of {len(changed)} sequences of "
        f"ratios; Var(log2 rho_t) = {listed(variances)}",
        found == changed and np.allclose(variances, np.arange(1, horizon + 1) / 4, rtol=1e-12),
        {"sequences": len(changed), "variance_log2": variances},
    )


# --- 12.kind ----------------------------------------------------------------------------------------------------------


def normalized_noise(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """Log-ratios of noise on the logits of 64 equally likely tokens, a new one at each token, normalized again."""
    vocabulary = 64
    noise = rng.normal(scale=sigma, size=(*shape, vocabulary))
    # The token that was drawn is any of them, so the first will do.
    return np.asarray(noise[..., 0] - np.log(np.exp(noise).mean(axis=-1)))


def free_noise(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """Log-ratios of noise on the log-probability of the drawn token itself."""
    return rng.normal(scale=sigma, size=shape)


def check_kind(
    context: Context, kinds: tuple[Callable[[int], Law], Callable[..., np.ndarray], Callable[..., np.ndarray]]
) -> Iterator[Evidence]:
    """Mean over variance, and E rho_t, tell free noise from normalized noise; how the spread grows does not."""
    law, free, normalized = kinds
    t = (1, 2, 3, 4, 5)
    rows: dict[str, Any] = {}
    for name, found in (("free", law(5)), ("normalized", rounded_logits(5))):
        values = [moments(found, k) for k in t]
        rows[name] = {
            "mean": [v[0] for v in values],
            "ratio": [v[1] / v[2] for v in values],
            "growth": [v[2] / values[0][2] for v in values],
        }
    yield Evidence(
        "fair tokens, log-probabilities off by +-log 2, against logits rounded by log 2 and normalized: E rho_t, mean "
        "over variance of log rho_t, and Var(log rho_t) / Var(log rho_1) for t = 1..5",
        "enumeration",
        f"free: E rho_t {listed(rows['free']['mean'])}, mean/variance {abs(rows['free']['ratio'][-1]):.3f}; "
        f"normalized: {listed(rows['normalized']['mean'])}, mean/variance {rows['normalized']['ratio'][-1]:.3f}; "
        "variance grows like t in both",
        rows["free"]["mean"] == known("normalized_noise")
        and rows["normalized"]["mean"] == [1] * 5
        and np.allclose(rows["free"]["ratio"], 0, atol=1e-12)
        and np.allclose(rows["normalized"]["ratio"], 2 * math.log(8 / 9) / math.log(2) ** 2, rtol=1e-12)
        and all(np.allclose(row["growth"], t, rtol=1e-12) for row in rows.values()),
        {name: {**row, "mean": [str(m) for m in row["mean"]]} for name, row in rows.items()},
    )
    sigma, shape, rng = 0.1, (context.count(2400), 48), context.rng("noise")
    fits: dict[str, SpreadFit] = {}
    for name, draw in (("free", free), ("normalized", normalized)):
        x = draw(rng, shape, sigma)
        fits[name] = fit_spread(x - 9.0, np.full(shape, -9.0), seed=0, bootstrap=100)
    z = {
        "free drift": fits["free"].drift_ratio / fits["free"].drift_ratio_se,
        "normalized drift": (fits["normalized"].drift_ratio + 0.5) / fits["normalized"].drift_ratio_se,
        **{f"{name} power": (fit.power - 0.5) / fit.power_se for name, fit in fits.items()},
        "free mean": (fits["free"].mean_token_ratio - math.exp(sigma**2 / 2)) / fits["free"].mean_token_ratio_se,
        "normalized mean": (fits["normalized"].mean_token_ratio - 1) / fits["normalized"].mean_token_ratio_se,
    }
    limit = z_threshold(len(z))
    yield Evidence(
        f"Gaussian noise of {sigma} on log-probabilities, and on 64 logits normalized again, n = {shape[0]} sequences "
        f"of {shape[1]}: drift/var against 0 and -1/2, power against 1/2, mean token ratio against exp(sigma^2/2) and "
        "1, by ctpo.diagnostics.fit_spread",
        "Monte Carlo",
        f"drift/var {fits['free'].drift_ratio:.3f} and {fits['normalized'].drift_ratio:.3f}, power "
        f"{fits['free'].power:.3f} and {fits['normalized'].power:.3f}; largest |z| {max(map(abs, z.values())):.2f} "
        f"(limit {limit:.2f})",
        max(map(abs, z.values())) < limit,
        {"z": z, "limit": limit, "n": shape[0]},
    )


CLAIMS = (
    Claim(
        "12.spread",
        "A cumulative ratio that spreads like sigma sqrt(t) shows that the policy has changed.",
        "false",
        "logits rounded as a function of the prefix and normalized again give the ratios of an unchanged policy the "
        "very law that an update on other sequences gives them",
        "how Figure 1 is read; theory, section 12",
        check_spread,
        rounded_logits,
        rounded_log_probabilities,
        "noise that is not normalized again",
        "Measure the spread once with unchanged weights, recomputed as the trainer does; a spread at that floor is no "
        "evidence of a change of the policy.",
    ),
    Claim(
        "12.kind",
        "Mean over variance of log rho_t tells noise on the recorded log-probabilities (0) from noise on the logits or "
        "a change of the policy (near -1/2); the power of t by which it spreads does not.",
        "true if",
        "small mean-zero noise, independent of the tokens",
        "theory, section 12",
        check_kind,
        (rounded_log_probabilities, free_noise, normalized_noise),
        (rounded_logits, normalized_noise, normalized_noise),
        "noise on the logits passed off as noise on the log-probabilities",
        "If the mean of log rho_t does not fall by about half of its variance, suspect the recording; if it does, that "
        "still does not exclude rounding.",
    ),
)
