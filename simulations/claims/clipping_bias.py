"""Claim 6, clipping: what a window takes from the expected gradient, and in which sense clipping is pessimistic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from scipy.stats import norm

import ctpo
from ctpo import CalibratedClip, PositionClip, RatioClip
from ctpo.clipping import Clip
from ctpo.ratios import Level
from simulations.claims.gradient_bias import SHARINGS
from simulations.claims.group_advantages import bandit
from simulations.claims.registry import Claim, Context, Evidence
from simulations.claims.worlds import HALF, known, random_trees
from simulations.exact import (
    Trajectories,
    Who,
    enumerate_trajectories,
    objective,
    policy_gradient,
    rational_weights,
    summed_scores,
)
from simulations.mdp import World, independent_tokens

POLICIES: tuple[Who, Who] = ("behavior", "target")
#: The window of the examples.
USUAL = RatioClip(0.2, 0.2)

# --- clipping by its definition ---------------------------------------------------------------------------------------


def window(clip: Clip, t: int) -> tuple[Any, Any, Any]:
    """Lowest and highest ratio at position t, and the highest for a negative advantage, from the definition.

    Not by `clip.bounds`. A `RatioClip` has rational bounds, its decimals read as they are written.
    """
    if isinstance(clip, RatioClip):
        cap = math.inf if clip.dual is None else Fraction(str(clip.dual))
        return 1 - Fraction(str(clip.low)), 1 + Fraction(str(clip.high)), cap
    center, width = -clip.drift * t, t**clip.power
    low, high, dual = clip.low, clip.high, clip.dual
    if isinstance(clip, CalibratedClip):
        low, high = clip.sigma * norm.isf(low), clip.sigma * norm.isf(high)
        dual = None if dual is None else clip.sigma * norm.isf(dual)
    cap = math.inf if dual is None else math.exp(center + dual * width)
    return math.exp(center - low * width), math.exp(center + high * width), cap


def windows(paths: Trajectories, clip: Clip) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, H) lowest and highest ratio at every token, and the highest for negative advantages."""
    by_position = [window(clip, t) for t in range(1, paths.mask.shape[1] + 1)]
    position = np.maximum(paths.mask.cumsum(axis=1), 1) - 1
    low, high, dual = (np.array(bound, dtype=object)[position] for bound in zip(*by_position, strict=True))
    return low, high, dual


def is_clipped(paths: Trajectories, clip: Clip, weight: np.ndarray, advantages: np.ndarray) -> np.ndarray:
    """(N, H) whether the PPO form drops a token, for (N, H) weights and advantages, Fractions or floats."""
    low, high, dual = windows(paths, clip)
    above = (advantages > 0) & (weight > high)
    below = (advantages < 0) & ((weight < low) | (weight > dual))
    return (above | below).astype(bool) & paths.mask


def clipped_value(paths: Trajectories, clip: Clip, weight: np.ndarray, advantages: np.ndarray) -> np.ndarray:
    """(N, H) min(w A, clip(w) A), and at least dual A where A < 0."""
    low, high, dual = windows(paths, clip)
    inside = np.minimum(np.maximum(weight, low), high)
    value = np.minimum(weight * advantages, inside * advantages)
    capped = (advantages < 0) & (weight > dual)
    value[capped] = dual[capped] * advantages[capped]
    return value


def by_ctpo(paths: Trajectories, estimator: ctpo.Estimator, advantages: np.ndarray) -> tuple[np.ndarray, float]:
    """Expected gradient (D,) and expected surrogate with the coefficients of `ctpo`, in float64."""
    found = estimator.coefficients(*paths.log_probabilities(), advantages.astype(float), paths.mask)
    coefficients = np.where(paths.mask, found.weight * advantages.astype(float), 0.0)
    terms = summed_scores(paths.world.as_float(), paths.states, paths.actions, coefficients)
    probability = paths.behavior_probability.astype(float)
    return probability @ terms, float(probability @ found.value.sum(axis=1))


@dataclass(frozen=True)
class Integrand:
    """The exact A^pi and unbiased weights on all trajectories of a world, to be clipped in several ways.

    Attributes:
        paths: The trajectories.
        level: "cumulative" or "sequence".
        weight: (N, H) rho_t or rho_H.
        advantages: (N, H) A^pi.
        true: (D,) grad J.
    """

    paths: Trajectories
    level: Level
    weight: np.ndarray
    advantages: np.ndarray
    true: np.ndarray

    @classmethod
    def of(cls, world: World, level: Level = "cumulative") -> Integrand:
        """The integrand of a world."""
        paths = enumerate_trajectories(world)
        return cls(paths, level, rational_weights(paths, level), paths.advantage("A_target"), policy_gradient(world))

    def dropped(self, clip: Clip) -> np.ndarray:
        """(N, H) the tokens that a window drops."""
        return is_clipped(self.paths, clip, self.weight, self.advantages)

    def mean(self, clip: Clip) -> np.ndarray:
        """(D,) expected gradient without the dropped tokens."""
        kept = np.where(self.dropped(clip), 0, self.weight * self.advantages)
        return self.paths.expectation(self.paths.summed_scores(kept))

    def predicted(self, clip: Clip, who: Who) -> np.ndarray:
        """(D,) grad J - E[sum_t g_t A_t 1{clipped}] under a policy, without weights."""
        lost = np.where(self.dropped(clip), self.advantages, 0)
        return self.true - self.paths.expectation(self.paths.summed_scores(lost), who)

    def share(self, clip: Clip, who: Who) -> Any:
        """Share of the tokens with an advantage other than 0 that are clipped when a policy writes them."""
        acting = (self.paths.mask & (self.advantages != 0)).sum(axis=1)
        clipped, written = (self.paths.expectation(n, who) for n in (self.dropped(clip).sum(axis=1), acting))
        return clipped / written

    def by_ctpo(self, clip: Clip) -> np.ndarray:
        """(D,) expected gradient with the coefficients of `ctpo`, in float64."""
        return by_ctpo(self.paths, _ppo(self.level, clip), self.advantages)[0]


# --- 6.clip_identity --------------------------------------------------------------------------------------------------

#: Bounds that no product of the random trees' ratios meets, so that exact and floating comparisons agree.
TRIED: tuple[Clip, ...] = (
    RatioClip(0.29, 0.37),
    RatioClip(0.29, 0.37, dual=1.9),
    PositionClip(0.3, 0.4, dual=None),
    PositionClip(0.3, 0.4, dual=0.4),
    PositionClip(0.3, 0.4, power=-0.5, dual=0.6, drift=0.1),
    CalibratedClip(low=0.2, high=0.1, sigma=0.5, drift=0.1, dual=0.15),
)

#: The windows of the named estimators and their variants.
TABLE: dict[str, Clip] = {
    "[.8, 1.2]": RatioClip(0.2, 0.2),
    "[.8, 1.2] dual 1.1": RatioClip(0.2, 0.2, dual=1.1),
    "[.8, 1.2] dual 3": RatioClip(0.2, 0.2, dual=3.0),
    "[.5, 5]": RatioClip(0.5, 4.0),
    "t^.5 as printed": PositionClip(dual=None),
    "t^.5 as released (dual .05)": PositionClip(),
    "t^.5 drift .005": PositionClip(dual=None, drift=0.005),
    "t^.5 drift .005 dual .05": PositionClip(drift=0.005),
    "t^.5 3x as wide": PositionClip(0.075, 0.15, dual=None),
    "t^.5 3x as wide dual .15": PositionClip(0.075, 0.15, dual=0.15),
    "calibrated to 10% and 10%": CalibratedClip(low=0.1, high=0.1, sigma=0.1, drift=0.005),
    "calibrated, dual 10%": CalibratedClip(low=0.1, high=0.1, sigma=0.1, drift=0.005, dual=0.1),
}


def alternating_world() -> World:
    """Five independent tokens, b = 1/2, pi = 11/20, R = 2a1 - a2 + 2a3 - a4 + 2a5, one shared block of logits.

    A token's log-ratio is about +-.1, its divergence KL(b||pi) .005: a window falling by .005 a token stays centered.
    """
    return independent_tokens(
        [HALF, HALF],
        [Fraction(9, 20), Fraction(11, 20)],
        5,
        outcome=lambda s: sum((2, -1)[t % 2] * a for t, a in enumerate(s)),
    )


def check_clip_identity(context: Context, who: Who) -> Iterator[Evidence]:
    """The bias of clipping is -E_pi[g_t A_t 1{clipped}]: the clipped share under pi counts, not that under b."""
    comparisons = good = biased = 0
    gap = 0.0
    levels: tuple[Level, Level] = ("cumulative", "sequence")
    for k, world in enumerate(random_trees(context, "clip identity", 20, parameters=SHARINGS)):
        integrand = Integrand.of(world, levels[k % 2])
        for clip in TRIED:
            mean, predicted = integrand.mean(clip), integrand.predicted(clip, who)
            comparisons += 1
            good += int(np.all(mean == predicted))
            biased += int(np.any(mean != integrand.true))
            gap = max(gap, float(np.abs(integrand.by_ctpo(clip) - predicted.astype(float)).max()))
    yield Evidence(
        "E_b[sum_t w_t g_t A^pi_t 1{not clipped}] - grad J = -E_pi[sum_t g_t A^pi_t 1{clipped}], w = rho_t or rho_H; "
        "fixed and position-dependent windows with and without dual bound and drift; weights by ctpo.Estimator too",
        "enumeration",
        f"identity exact in {good} of {comparisons} cases on random trees ({biased} of them biased), ctpo's weights "
        f"within {gap:.0e} of it",
        good == comparisons and gap < 1e-12 and biased > comparisons // 2,
        {"cases": comparisons, "exact": good, "biased": biased, "largest_gap": gap},
    )
    yield from _small_worlds(who)
    yield _table(who)


def _small_worlds(who: Who) -> Iterator[Evidence]:
    both = Integrand.of(bandit(HALF, Fraction(3, 4)))
    true, clipped, predicted = both.true[1], both.mean(USUAL)[1], both.predicted(USUAL, who)[1]
    library = float(both.by_ctpo(USUAL)[1])
    yield Evidence(
        "one binary token, b = 1/2, pi = 3/4, R = a, window [4/5, 6/5]: true gradient, clipped, predicted",
        "enumeration",
        f"one token, b = 1/2, pi = 3/4, window [4/5, 6/5]: true {true}, clipped {clipped}: all is lost",
        [true, clipped] == known("clip_all") and predicted == clipped and abs(library) < 1e-15,
        {"true": str(true), "clipped": str(clipped), "predicted": str(predicted), "ctpo": library},
    )
    rare, high_only = Integrand.of(bandit(Fraction(1, 100), HALF)), RatioClip(1.0, 0.2)
    shares = [rare.share(high_only, policy) for policy in POLICIES]
    true, clipped, predicted = rare.true[1], rare.mean(high_only)[1], rare.predicted(high_only, who)[1]
    library = float(rare.by_ctpo(high_only)[1])
    yield Evidence(
        "one binary token, b = 1/100, pi = 1/2, R = a, ratio at most 6/5: share of sampled tokens clipped, under pi, "
        "true gradient, clipped, predicted by the identity",
        "enumeration",
        f"one token, b = 1/100, pi = 1/2, ratio at most 6/5: {shares[0]} of the samples clipped, but {shares[1]} under "
        f"pi; gradient {true} falls to {clipped}",
        [*shares, true, clipped] == known("clip_rare") and predicted == clipped and abs(library - 0.125) < 1e-14,
        {
            "clipped_under_b": str(shares[0]),
            "clipped_under_pi": str(shares[1]),
            "true": str(true),
            "clipped": str(clipped),
            "predicted": str(predicted),
            "ctpo": library,
        },
    )


def _ppo(level: Level, clip: Clip) -> ctpo.Estimator:
    return ctpo.Estimator(level, clip, max_log_ratio=None, max_token_log_ratio=None)


def _table(who: Who) -> Evidence:
    """Every kind of window on one fixed world: the gradient that is left, and the clipped shares under b and pi."""
    integrand = Integrand.of(alternating_world())
    rows: dict[str, dict[str, float]] = {}
    gap, exact = 0.0, True
    for name, clip in TABLE.items():
        mean, predicted = integrand.mean(clip), integrand.predicted(clip, who)
        exact &= bool(np.all(mean == predicted))
        gap = max(gap, float(np.abs(integrand.by_ctpo(clip) - predicted.astype(float)).max()))
        under_b, under_pi = (float(integrand.share(clip, policy)) for policy in POLICIES)
        left = float(mean[1] / integrand.true[1])
        rows[name] = {"clipped_under_b": under_b, "clipped_under_pi": under_pi, "gradient_left": left}
    plain, more = rows["[.8, 1.2]"], rows["[.8, 1.2] dual 1.1"]
    paradox = all(more[key] > plain[key] for key in plain)
    return Evidence(
        "five tokens, b = 1/2, pi = 11/20, R = 2a1 - a2 + 2a3 - a4 + 2a5, exact A^pi under rho_t: for each window the "
        "share of tokens clipped under b and under pi, and the expected gradient over the true one; the identity, and "
        "ctpo's weights",
        "enumeration",
        "share clipped under b, under pi, and gradient left: "
        + "; ".join(
            f"{n} {r['clipped_under_b']:.2f}, {r['clipped_under_pi']:.2f}, {r['gradient_left']:.2f}"
            for n, r in rows.items()
        )
        + f" (ctpo within {gap:.0e}); a window that clips more can leave more of the gradient",
        exact and gap < 1e-12 and paradox and rows["[.5, 5]"]["gradient_left"] == 1,
        {"rows": rows, "largest_gap": gap},
    )


# --- 6.clip_sign ------------------------------------------------------------------------------------------------------


def flipped_world() -> World:
    """Two independent tokens, b = 1/2, pi = 3/4, R = 2a1 - a2, one shared block of logits."""
    return independent_tokens(
        [HALF, HALF], [Fraction(1, 4), Fraction(3, 4)], 2, outcome=lambda s: 2 * s[0] - s[1], parameters="shared"
    )


def check_clip_sign(context: Context, clip: Clip | None) -> Iterator[Evidence]:
    """With the exact A^pi the clipped gradient points the wrong way, under rho_t and under r_t."""
    paths = enumerate_trajectories(flipped_world())
    advantages = paths.advantage("A_target")
    levels: tuple[Level, Level] = ("cumulative", "token")
    found, library = [policy_gradient(paths.world)[1]], []
    for level in levels:
        weight = rational_weights(paths, level)
        dropped = paths.mask & False if clip is None else is_clipped(paths, clip, weight, advantages)
        kept = np.where(dropped, 0, weight * advantages)
        found.append(paths.expectation(paths.summed_scores(kept))[1])
        estimator = ctpo.Estimator(level, form="unclipped") if clip is None else _ppo(level, clip)
        library.append(float(by_ctpo(paths, estimator, advantages)[0][1]))
    yield Evidence(
        "two tokens, one shared logit, b = 1/2, pi = 3/4, R = 2a1 - a2, window [4/5, 6/5], exact A^pi: true gradient; "
        "clipped under rho_t and under r_t, as fractions and by ctpo.Estimator",
        "enumeration",
        "R = 2a1 - a2: true gradient {}; clipped under rho_t {}, under r_t {}".format(*found)
        + f" (ctpo: {library[0]:.4f}, {library[1]:.4f})",
        found == known("clip_sign") and np.allclose(library, [float(f) for f in found[1:]], rtol=0, atol=1e-15),
        {"true": str(found[0]), "cumulative": str(found[1]), "token": str(found[2]), "ctpo": library},
    )
    if clip is None:
        return
    names = ("ctpo", "ctpo_fixed", "grpo", "dapo", "cispo")
    turned = dict.fromkeys(names, 0)
    count = 0
    for world in random_trees(context, "clip sign", 60, parameters=SHARINGS):
        gradient = policy_gradient(world).astype(float)
        if not gradient.any():
            continue
        count += 1
        paths = enumerate_trajectories(world)
        advantages = paths.advantage("A_target")
        for name in names:
            mean, _ = by_ctpo(paths, ctpo.get_estimator(name), advantages)
            turned[name] += int(mean @ gradient < -1e-12)
    yield Evidence(
        "random trees whose expected gradient has a negative product with the true one, exact A^pi, by named estimator",
        "enumeration",
        f"of {count} random trees (large divergences) the step goes downhill in "
        + ", ".join(f"{n} ({name})" for name, n in turned.items()),
        turned["ctpo"] > 0 or context.quick,
        {"worlds": count, "downhill": turned},
    )


# --- 6.pessimism ------------------------------------------------------------------------------------------------------


def check_pessimism(context: Context, clip: RatioClip) -> Iterator[Evidence]:
    """The clipped surrogate never exceeds the unclipped one; with A^b and rho_t it bounds the improvement below."""
    cases = below = strict = 0
    worlds = bounded = improved = token_above = 0
    gap = 0.0
    levels: tuple[Level, ...] = ("token", "cumulative", "sequence")
    for world in random_trees(context, "pessimism", 40, parameters=SHARINGS):
        paths = enumerate_trajectories(world)
        advantages = paths.advantage("A_behavior")
        improvement = objective(world, "target") - objective(world, "behavior")
        surrogate = {}
        for level in levels:
            weight = rational_weights(paths, level)
            value = clipped_value(paths, clip, weight, advantages)
            pointwise = np.all(value <= weight * advantages)
            surrogate[level] = paths.expectation(value.sum(axis=1))
            plain = paths.expectation((weight * advantages).sum(axis=1))
            cases += 1
            below += int(pointwise and surrogate[level] <= plain)
            strict += int(surrogate[level] < plain)
            _, library = by_ctpo(paths, _ppo(level, clip), advantages)
            gap = max(gap, abs(library - float(surrogate[level])))
            if level == "cumulative":
                improved += int(plain == improvement)
        worlds += 1
        bounded += int(surrogate["cumulative"] <= improvement)
        token_above += int(surrogate["token"] > improvement)
    yield Evidence(
        "E_b[sum_t min(w A, clip(w) A)] <= E_b[sum_t w A], pointwise and in expectation; w = r_t, rho_t, rho_H; A^b; "
        "the surrogate by ctpo.Estimator",
        "enumeration",
        f"never above in {below} of {cases} cases on random trees (strictly below in {strict}); ctpo within {gap:.0e}",
        below == cases and strict > 0 and gap < 1e-12,
        {"cases": cases, "not_above": below, "strictly_below": strict, "largest_gap": gap},
    )
    yield Evidence(
        "E_b[sum_t rho_t A^b_t] = J(pi) - J(b), so the clipped one is a lower bound on the improvement; the one with "
        "r_t is none",
        "enumeration",
        f"A^b under rho_t is J(pi) - J(b) on {improved} of {worlds} random trees and clipped a lower bound on "
        f"{bounded}; with r_t the clipped surrogate exceeds the improvement on {token_above}",
        improved == bounded == worlds and (token_above > 0 or context.quick),
        {"worlds": worlds, "identity": improved, "lower_bound": bounded, "token_above": token_above},
    )
    paths = enumerate_trajectories(bandit(Fraction(1, 4), Fraction(3, 4), (1, 0)))
    advantages = paths.advantage("A_behavior")
    weight = rational_weights(paths, "cumulative")
    plain = paths.expectation((weight * advantages).sum(axis=1))
    found = [
        paths.expectation(clipped_value(paths, c, weight, advantages).sum(axis=1))
        for c in (USUAL, RatioClip(0.2, 0.2, dual=2.0))
    ]
    yield Evidence(
        "one binary token, b = 1/4, pi = 3/4, R = 1 - a, A^b: unclipped surrogate = J(pi) - J(b), clipped, and with "
        "the dual bound 2 on ratios of negative advantages",
        "enumeration",
        f"a dual bound is not pessimistic: b = 1/4, pi = 3/4, R = 1 - a: J(pi) - J(b) = {plain}; clipped {found[0]}, "
        f"with the dual bound 2 {found[1]}",
        [plain, *found] == known("dual_not_pessimistic"),
        {"unclipped": str(plain), "clipped": str(found[0]), "dual": str(found[1])},
    )


CLAIMS = (
    Claim(
        "6.clip_identity",
        "A clip window biases the gradient by -E_pi[g_t A_t 1{clipped}]: what counts is clipped under pi, not under b.",
        "true if",
        "ratio rho_t or rho_H, an advantage of the first t tokens; PPO form, any window, dual bound and drift included",
        "arXiv:2605.07331, section 3.3, whose clip rates are shares of sampled tokens",
        check_clip_identity,
        "target",
        "behavior",
        "the clipped tokens as they are sampled, E_b instead of E_pi",
        "A clip rate counts sampled tokens and says little about the bias: one clipped sample in a hundred can carry "
        "half of the gradient, and a window that clips more tokens can leave more of it.",
    ),
    Claim(
        "6.clip_sign",
        "Clipping can shrink the expected gradient but not turn it around.",
        "false",
        "two tokens and one shared logit suffice, with the exact A^pi, under the cumulative and the token ratio",
        "how clipping is usually read; arXiv:1707.06347, arXiv:2605.07331",
        check_clip_sign,
        USUAL,
        None,
        "no window",
        "Where the clipped tokens carry most of the gradient, what is left can point the other way; a window that the "
        "target policy rarely leaves avoids that.",
    ),
    Claim(
        "6.pessimism",
        "The clipped surrogate never exceeds the unclipped one; with A^b under rho_t it is at most J(pi) - J(b).",
        "true if",
        "min(w A, clip(w) A) without a dual bound; for the improvement absolute continuity: b has mass wherever pi has",
        "arXiv:1707.06347 (a pessimistic bound), with the exact improvement under rho_t",
        check_pessimism,
        USUAL,
        RatioClip(0.2, 0.2, dual=1.5),
        "a dual bound of 1.5",
        "The clipped objective under cumulative ratios, with the behavior policy's advantages, is a lower bound on the "
        "true improvement. Token ratios and dual bounds lose that, and it says nothing about the gradient's direction.",
    ),
)
