r"""Claim 11: a third policy between sampler and target, and the weights that are meant to correct for it.

An inference engine samples from mu; the trainer recomputes the old policy b, and its ratio rho_t = pi/b corrects for
the step from b to pi only. The step from mu to b is corrected by a second weight u, at some level:

============  ===========================================
level         u at token t
============  ===========================================
"none"        1
"token"       (b/mu) of token t
"prefix"      product of b/mu over tokens 1..t
"sequence"    product of b/mu over all tokens
============  ===========================================

used as it is, truncated to min(u, c), or masked to u if u <= c, else 0. Trajectories are those of a world whose
behavior policy is mu and whose target is pi; b enters as a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from scipy.stats import binom, norm

import ctpo
from simulations.claims.gradient_bias import SHARINGS
from simulations.claims.martingale import variance
from simulations.claims.registry import Claim, Context, Evidence
from simulations.claims.worlds import HALF, known, listed, random_trees
from simulations.exact import Trajectories, enumerate_trajectories, policy_gradient
from simulations.mdp import World, as_numbers, independent_tokens, policy_table, random_policy

Level = Literal["none", "token", "prefix", "sequence"]
Treatment = Literal["exact", "truncated", "masked"]

LEVELS: tuple[Level, ...] = ("none", "token", "prefix", "sequence")
TREATMENTS: tuple[Treatment, ...] = ("exact", "truncated", "masked")


@dataclass(frozen=True)
class Rollouts:
    """Trajectories of the sampler mu with the old policy's probabilities beside them.

    Attributes:
        paths: Every trajectory of a world whose behavior policy is mu and whose target is pi.
        old: (N, H) b of every token, 1 where the policy writes nothing.
    """

    paths: Trajectories
    old: np.ndarray

    @property
    def correction(self) -> np.ndarray:
        """(N, H) b/mu of every token."""
        return self.old / self.paths.behavior

    @property
    def old_probability(self) -> np.ndarray:
        """(N,) probability of the trajectory under the old policy."""
        return self.paths.environment * self.old.prod(axis=1)

    @property
    def rho(self) -> np.ndarray:
        """(N, H) product of pi/b over tokens 1..t."""
        return (self.paths.target / self.old).cumprod(axis=1)


def rollouts(world: World, old: np.ndarray) -> Rollouts:
    """Enumerate a world whose behavior policy is the sampler; `old` is the (S, A) table of the old policy."""
    paths = enumerate_trajectories(world)
    return Rollouts(paths, as_numbers(np.where(paths.mask, old[paths.states, paths.actions], 1), world.exact))


def correction_weight(correction: np.ndarray, level: Level) -> np.ndarray:
    """(N, H) weight u at a level, from (N, H) token ratios b/mu."""
    if level == "none":
        return correction * 0 + 1
    if level == "token":
        return correction
    prefix = correction.cumprod(axis=1)
    return prefix if level == "prefix" else np.repeat(prefix[:, -1:], prefix.shape[1], axis=1)


def capped(weight: np.ndarray, treatment: Treatment, cap: Fraction) -> np.ndarray:
    """A weight as it is ("exact"), cut to the cap ("truncated"), or dropped above it ("masked")."""
    if treatment == "exact":
        return weight
    above: Any = cap if treatment == "truncated" else 0
    return np.where(weight <= cap, weight, above)


def never_capped(weight: np.ndarray, _treatment: Treatment, _cap: Fraction) -> np.ndarray:
    """Wrong: the weight as it is, passed off as capped."""
    return weight


def random_rollouts(context: Context, name: str, count: int) -> Iterator[Rollouts]:
    """Random trees with three unrelated policies, under each sharing of logits in turn."""
    rng = context.rng(f"{name}, old policy")
    for k, world in enumerate(random_trees(context, name, count)):
        yield rollouts(world.with_parameters(SHARINGS[k % 3]), random_policy(world.mdp, rng))


def example(horizon: int, outcome: Callable[[tuple[int, ...]], Any] | None = None) -> Rollouts:
    """I.i.d. binary tokens, one shared logit, mu = 1/2, b = 3/5, pi = 3/4."""
    world = independent_tokens([HALF, HALF], [Fraction(1, 4), Fraction(3, 4)], horizon, outcome=outcome)
    return rollouts(world, policy_table(world.mdp, lambda _: [Fraction(2, 5), Fraction(3, 5)]))


#: A weight at every token from the rollouts.
Weight = Callable[[Rollouts], np.ndarray]


def weighted_by(level: Level) -> Weight:
    """The correction of a level times rho_t."""
    return lambda r: correction_weight(r.correction, level) * r.rho


# --- 11.prefix ------------------------------------------------------------------------------------------------------


def check_prefix(context: Context, weight: Weight) -> Iterator[Evidence]:
    """Both products are unbiased for integrands of the prefix, and the prefix correction is never noisier."""
    rng = context.rng("prefix integrands")
    full = weighted_by("sequence")
    trees = terms = unbiased = ordered = strict = summed = gradients = louder = 0
    worst = 0.0
    for r in random_rollouts(context, "prefix", 100):
        trees += 1
        paths, world = r.paths, r.paths.world
        table = as_numbers(rng.integers(-4, 5, size=(world.mdp.horizon, *world.behavior.shape)), True)
        value = paths.advantage(table)
        wanted = paths.expectation(value, "target")
        prefix, sequence = weight(r) * value, full(r) * value
        terms += len(wanted)
        unbiased += int(((paths.expectation(prefix) == wanted) & (paths.expectation(sequence) == wanted)).sum())
        low, high = variance(paths, prefix), variance(paths, sequence)
        ordered += int((low <= high).sum())
        strict += int((low < high).sum())
        rho = np.where(paths.mask, ctpo_weight(paths), 1.0)
        worst = max(worst, float(np.abs(rho / np.where(paths.mask, weight(r), 1).astype(float) - 1).max()))
        if trees % 4:
            continue
        summed += 1
        gradient, advantages = policy_gradient(world), paths.advantage("A_target")
        moments = [paths.moments(paths.summed_scores(w(r) * advantages)) for w in (weight, full)]
        gradients += int(all(np.all(m.mean == gradient) for m in moments))
        louder += int(moments[0].total_variance > moments[1].total_variance)
    yield Evidence(
        "E_mu[(b/mu)(1..t) rho_t f_t] and E_mu[(b/mu)(whole) rho_t f_t] against E_pi f_t for random integrands of the "
        "prefix, as fractions; their variances",
        "enumeration",
        f"both unbiased at {unbiased} of {terms} tokens on {trees} random trees; prefix variance never above at "
        f"{ordered}, below at {strict}",
        unbiased == ordered == terms and strict > 0,
        {"trees": trees, "terms": terms, "unbiased": unbiased, "ordered": ordered, "strict": strict},
    )
    yield Evidence(
        "summed gradient with exact A^pi: both means against grad J, and total variances",
        "enumeration",
        f"summed gradient: both are grad J on {gradients} of {summed} trees; the prefix correction noisier on {louder} "
        "(a sum need not follow the order of its terms, see T1)",
        gradients == summed,
        {"trees": summed, "unbiased": gradients, "prefix_noisier": louder},
    )
    yield Evidence(
        "the prefix correction times rho_t against the cumulative ratio of pi over mu, by ctpo.log_ratio",
        "enumeration",
        f"b cancels: the product is ctpo's cumulative ratio with mu as behavior policy, within {worst:.0e}",
        worst < 1e-12,
        {"largest_relative_gap": worst},
    )
    r = example(2)
    found = [variance(r.paths, w(r))[0] for w in (full, weight)]
    yield Evidence(
        "mu = 1/2, b = 3/5, pi = 3/4, two tokens, t = 1: variance with the sequence's and with the prefix's correction",
        "enumeration",
        f"mu = 1/2, b = 3/5, pi = 3/4, t = 1: variance {found[0]} with the whole sequence's, {found[1]} with the "
        "prefix's correction",
        found == known("correction_variance"),
        {"sequence": str(found[0]), "prefix": str(found[1])},
    )
    both, equal = (_first_update(outcome, weight) for outcome in (lambda s: s[0] * s[1], lambda s: int(s[0] == s[1])))
    yield Evidence(
        "outcome reward before the first update, mu = 1/4, pi = b = 1/2, two tokens, one shared logit: grad J, mean "
        "gradient with the prefix's and with the whole sequence's correction times the reward",
        "enumeration",
        "outcome reward before the first update, mu = 1/4, pi = b = 1/2: "
        + "; ".join(
            f"R = {name}: true {true}, prefix {prefix}, whole sequence {sequence}"
            for name, (true, prefix, sequence) in (("a1 a2", both), ("1{a1 = a2}", equal))
        ),
        [*both, *equal] == known("correction_outcome"),
        {"a1 a2": [str(x) for x in both], "1{a1 = a2}": [str(x) for x in equal]},
    )


def _first_update(outcome: Callable[[tuple[int, ...]], Any], weight: Weight) -> list[Fraction]:
    """Grad J, and the mean gradient with the return under a weight and under the whole sequence's; pi = b."""
    world = independent_tokens([Fraction(3, 4), Fraction(1, 4)], [HALF, HALF], 2, outcome=outcome)
    r = rollouts(world, world.target)
    returns = r.paths.returns[:, None]
    means = [r.paths.expectation(r.paths.summed_scores(w(r) * returns))[1] for w in (weight, weighted_by("sequence"))]
    return [policy_gradient(world)[1], *means]


def ctpo_weight(paths: Trajectories) -> np.ndarray:
    """(N, H) cumulative ratio of the target over the sampler as the library computes it."""
    return np.exp(ctpo.log_ratio(*paths.log_probabilities(), paths.mask))


# --- 11.none --------------------------------------------------------------------------------------------------------


def check_none(context: Context, level: Level) -> Iterator[Evidence]:
    """Without a correction rho_t is no importance ratio of the samples, and the gradient is biased, also at pi = b."""
    trees = moved = biased = 0
    for r in random_rollouts(context, "none", 40):
        trees += 1
        paths = r.paths
        weight = correction_weight(r.correction, level) * r.rho
        moved += int(
            np.any(paths.expectation(np.where(paths.mask, weight, 0)) != paths.expectation(paths.mask, "target"))
        )
        gradient = paths.expectation(paths.summed_scores(weight * paths.advantage("A_target")))
        biased += int(np.any(gradient != policy_gradient(paths.world)))
    yield Evidence(
        "without correction: E_mu rho_t against 1, and the summed gradient with exact A^pi against grad J",
        "enumeration",
        f"E_mu rho_t is not 1 on {moved}, the gradient biased on {biased} of {trees} random trees",
        moved > 0.9 * trees and biased > 0.9 * trees,
        {"trees": trees, "mean_not_1": moved, "biased": biased},
    )
    r = example(6)
    means = list(r.paths.expectation(correction_weight(r.correction, level) * r.rho))
    yield Evidence(
        "mu = 1/2, b = 3/5, pi = 3/4: E_mu rho_t for t = 1..6",
        "enumeration",
        f"mu = 1/2, b = 3/5, pi = 3/4: E_mu rho_t = {listed(means[:2])} at t = 1, 2, and (15/16)^t up to t = 6",
        means == [Fraction(15, 16) ** t for t in range(1, 7)] and means[:2] == known("no_correction"),
        {"mean": [str(m) for m in means]},
    )
    three_fifths = [Fraction(2, 5), Fraction(3, 5)]
    world = independent_tokens([HALF, HALF], three_fifths, 2, outcome=lambda s: s[0] * s[1])
    first = rollouts(world, policy_table(world.mdp, lambda _: three_fifths))
    weight = correction_weight(first.correction, level) * first.rho
    found = first.paths.expectation(first.paths.summed_scores(weight * first.paths.advantage("A_target")))[1]
    gradient = policy_gradient(world)[1]
    yield Evidence(
        "first update, pi = b = 3/5, mu = 1/2, R = a1 a2, one shared logit, exact A^pi: mean gradient and grad J",
        "enumeration",
        f"also before any update, pi = b = 3/5: rho_t = 1 everywhere, the gradient is {found} instead of {gradient}",
        [gradient, found] == known("no_correction_gradient"),
        {"found": str(found), "gradient": str(gradient)},
    )


# --- 11.sequence_cap ------------------------------------------------------------------------------------------------

#: The released default.
CAP = Fraction(5)


def capped_world() -> Rollouts:
    """One token, mu(1) = 1/10, b = pi = 3/5, R = a: the weight of token 1 is 6."""
    three_fifths = [Fraction(2, 5), Fraction(3, 5)]
    world = independent_tokens([Fraction(9, 10), Fraction(1, 10)], three_fifths, 1, outcome=lambda s: s[0])
    return rollouts(world, policy_table(world.mdp, lambda _: three_fifths))


def mean_truncated_weight(variance_of_log: np.ndarray, cap: float) -> np.ndarray:
    """E_mu min(w, c) for log-normal w with E_mu w = 1: P_b(w < c) + c P_mu(w > c)."""
    root = np.sqrt(variance_of_log)
    return norm.cdf((math.log(cap) - variance_of_log / 2) / root) + cap * norm.cdf(
        -(math.log(cap) + variance_of_log / 2) / root
    )


def binary_truncated_weight(sigma: float, length: int, cap: float) -> float:
    """The same exactly for binary tokens whose b/mu is e^(+-sigma), normalized: mu(up) = 1/(1 + e^sigma)."""
    ups = np.arange(length + 1)
    log_weight = sigma * (2 * ups - length)
    under_sampler = binom.pmf(ups, length, 1 / (1 + math.exp(sigma)))
    under_old = binom.pmf(ups, length, 1 / (1 + math.exp(-sigma)))
    return float(np.where(log_weight <= math.log(cap), under_old, cap * under_sampler).sum())


#: A weight, a treatment and a cap to the weight that is used.
Cap = Callable[[np.ndarray, Treatment, Fraction], np.ndarray]


def check_sequence_cap(context: Context, treat: Cap) -> Iterator[Evidence]:
    """What a cap takes away, exactly, and how much at real lengths."""
    cap = Fraction(6, 5)  # 5 seldom acts on short strings
    trees = cases = equal = biased = 0
    for r in random_rollouts(context, "sequence cap", 40):
        trees += 1
        paths, advantages = r.paths, r.paths.advantage("A_target")
        gradient = policy_gradient(paths.world)
        for level in LEVELS[2:]:
            exact = correction_weight(r.correction, level)
            for treatment in TREATMENTS[1:]:
                share = np.where(exact > cap, 1 - cap / exact if treatment == "truncated" else 1, 0)
                used = treat(exact, treatment, cap)
                bias = paths.expectation(paths.summed_scores(used * r.rho * advantages)) - gradient
                lost = paths.summed_scores(share * r.rho * advantages)
                cases += 1
                equal += int(np.all(bias == -(r.old_probability[:, None] * lost).sum(axis=0)))
                biased += int(level == "sequence" and treatment == "truncated" and np.any(bias != 0))
    yield Evidence(
        "cap c = 6/5 on the prefix's and the sequence's correction w: bias of the gradient, exact A^pi, truncated "
        "against -E_b[(1 - c/w)^+ rho_t g_t A_t] summed, masked against -E_b[1{w > c} rho_t g_t A_t], as fractions",
        "enumeration",
        f"bias of the cap as predicted in {equal} of {cases} cases on {trees} random trees; truncated sequence "
        f"correction biased on {biased}",
        equal == cases and biased > 0.8 * trees,
        {"trees": trees, "cases": cases, "exact": equal, "biased": biased},
    )
    r = capped_world()
    weight = treat(correction_weight(r.correction, "sequence"), "truncated", CAP)
    found = r.paths.expectation(r.paths.summed_scores(weight * r.rho * r.paths.advantage("A_target")))[1]
    gradient = policy_gradient(r.paths.world)[1]
    mean = r.paths.expectation(weight)[0]
    yield Evidence(
        "one token, mu(1) = 1/10, b = pi = 3/5, R = a, cap 5, exact A^pi: mean weight and gradient",
        "enumeration",
        f"one token, mu(1) = 1/10, b = pi = 3/5, cap 5: mean weight {mean}, gradient {found} instead of {gradient}",
        [mean, gradient, found] == known("sequence_cap"),
        {"mean_weight": str(mean), "gradient": str(gradient), "found": str(found)},
    )
    yield _cap_at_length()


def _cap_at_length() -> Evidence:
    lengths = np.array([192, 1000, 4000, 8000])
    rows: dict[str, list[float]] = {}
    worst = 0.0
    for sigma in (0.0335, 0.05):
        rows[str(sigma)] = mean_truncated_weight(sigma**2 * lengths, float(CAP)).tolist()
        exact_rows = [binary_truncated_weight(sigma, int(n), float(CAP)) for n in lengths]
        worst = max(worst, float(np.abs(np.array(exact_rows) - rows[str(sigma)]).max()))
    two = float(mean_truncated_weight(np.array([0.0335**2 * 8000]), 2.0)[0])
    return Evidence(
        "log-normal sequence correction with token spread .0335 and .05 over 192, 1000, 4000, 8000 tokens: mean weight "
        "after the cap of 5 (1 without it); exact binary tokens for comparison",
        "closed form",
        "mean weight after the cap of 5 over 192, 1000, 4000, 8000 tokens: "
        + "; ".join(f"token spread {sigma}: {listed(row)}" for sigma, row in rows.items())
        + f" (exact binary tokens within {worst:.1g}); cap 2, .0335, 8000 tokens: {two:.2g}",
        worst < 5e-3 and rows["0.05"][-1] < 0.1 and round(two, 2) == 0.19,
        {"length": lengths.tolist(), "mean_weight": rows, "largest_gap": worst, "cap_2": two},
    )


# --- 11.masked ------------------------------------------------------------------------------------------------------


def check_masked(context: Context, treatment: Treatment) -> Iterator[Evidence]:
    """Masking can raise the variance of a weight, which truncation cannot, and loses at least as much of its mean."""
    world = independent_tokens([HALF, HALF], [Fraction(9, 20), Fraction(11, 20)], 1)
    r = rollouts(world, world.target)
    one = Fraction(1)
    whole = correction_weight(r.correction, "sequence")
    plain, cut, dropped = whole, capped(whole, "truncated", one), capped(whole, treatment, one)
    spread = [variance(r.paths, w)[0] for w in (plain, cut, dropped)]
    means = [r.paths.expectation(w)[0] for w in (plain, cut, dropped)]
    yield Evidence(
        "one token, mu = 1/2, b = 11/20, c = 1: mean and variance of the weight as it is, truncated and masked",
        "enumeration",
        f"weights 9/10 and 11/10, c = 1: mean {listed(means)}, variance {listed(spread)} as it is, truncated, masked",
        [*means, *spread] == known("masked_correction"),
        {"mean": [str(m) for m in means], "variance": [str(v) for v in spread]},
    )
    cases = truncated_lower = masked_higher = mean_order = 0
    for r in random_rollouts(context, "masked", 60):
        plain = correction_weight(r.correction, "sequence")[:, 0]
        for cap in (Fraction(1), Fraction(3, 2), Fraction(3)):
            cases += 1
            cut, dropped = capped(plain, "truncated", cap), capped(plain, treatment, cap)
            spread = [variance(r.paths, w) for w in (plain, cut, dropped)]
            truncated_lower += int(spread[1] <= spread[0])
            masked_higher += int(spread[2] > spread[0])
            mean_order += int(r.paths.expectation(dropped) <= r.paths.expectation(cut) <= 1)
    yield Evidence(
        "variance and mean of the sequence's correction on random trees, caps 1, 3/2 and 3",
        "enumeration",
        f"truncation never raises the variance ({truncated_lower} of {cases}), masking raises it in {masked_higher}; "
        f"mean masked <= truncated <= 1 in {mean_order}",
        truncated_lower == mean_order == cases,
        {"cases": cases, "truncated_lower": truncated_lower, "masked_higher": masked_higher, "mean_order": mean_order},
    )


# --- 11.levels ------------------------------------------------------------------------------------------------------

#: The cap of the table.
TABLE_CAP = Fraction(11, 10)


#: From (N, H) token ratios b/mu and a level to the correction.
Correction = Callable[[np.ndarray, Level], np.ndarray]
#: Treatments by level, in the order of the table.
COMBINATIONS: tuple[tuple[Level, Treatment], ...] = (
    ("none", "exact"),
    *((level, treatment) for level in LEVELS[1:] for treatment in TREATMENTS),
)
UNBIASED = (("prefix", "exact"), ("sequence", "exact"))


def table_rollouts() -> Rollouts:
    """Three i.i.d. tokens, mu = 1/2, b = 3/5, pi = 3/4, R = a1 a2 a3, one shared logit."""
    return example(3, outcome=lambda s: s[0] * s[1] * s[2])


def gradient_table(r: Rollouts, correction: Correction = correction_weight) -> list[tuple[Fraction, Fraction]]:
    """Bias and variance of the last logit's gradient with exact A^pi, in the order of `COMBINATIONS`."""
    paths, advantages = r.paths, r.paths.advantage("A_target")
    gradient = policy_gradient(paths.world)[-1]
    rows = []
    for level, treatment in COMBINATIONS:
        weight = capped(correction(r.correction, level), treatment, TABLE_CAP) * r.rho
        summed = paths.summed_scores(weight * advantages)[:, -1]
        spread: Any = variance(paths, summed)
        rows.append((paths.expectation(summed) - gradient, spread))
    return rows


def table() -> dict[str, Any]:
    """Title, note and rows of the table of levels and treatments, for a report."""
    r = table_rollouts()
    gradient = policy_gradient(r.paths.world)[-1]
    return {
        "title": "Rollout correction: level and treatment",
        "note": "Sampler mu = 1/2, old policy b = 3/5, target pi = 3/4, three tokens, R = a1 a2 a3, exact A^pi, one "
        f"shared logit with gradient {gradient}; correction b/mu times rho_t = pi/b, capped at {TABLE_CAP}; root mean "
        "squared errors relative to the gradient, for batches of 32 and of 1024 sequences. Exact; one example.",
        "rows": [
            {
                "level": level,
                "treatment": treatment,
                "bias": str(bias),
                "relative bias": float(bias / gradient),
                "variance": float(spread),
                "error of 32": math.sqrt(bias**2 + spread / 32) / float(gradient),
                "error of 1024": math.sqrt(bias**2 + spread / 1024) / float(gradient),
            }
            for (level, treatment), (bias, spread) in zip(COMBINATIONS, gradient_table(r), strict=True)
        ],
    }


def check_levels(context: Context, correction: Correction) -> Iterator[Evidence]:
    """Bias and variance of every level and treatment on one example, and which are unbiased on random trees."""
    found = gradient_table(table_rollouts(), correction)
    gradient = policy_gradient(table_rollouts().paths.world)[-1]
    names = [level if treatment == "exact" else f"{level} {treatment}" for level, treatment in COMBINATIONS]
    yield Evidence(
        "three tokens, mu = 1/2, b = 3/5, pi = 3/4, R = a1 a2 a3, one shared logit, exact A^pi, cap 11/10: bias and "
        "variance of each correction, as fractions",
        "enumeration",
        f"grad J = {gradient}; relative bias, variance: "
        + "; ".join(
            f"{name} {float(bias / gradient):.3f}, {float(spread):.4f}"
            for name, (bias, spread) in zip(names, found, strict=True)
        ),
        [gradient, *(bias for bias, _ in found), *(spread for _, spread in found)] == known("correction_levels"),
        {name: [str(bias), str(spread)] for name, (bias, spread) in zip(names, found, strict=True)},
    )
    trees, biased = 0, dict.fromkeys(COMBINATIONS, 0)
    for r in random_rollouts(context, "levels", 24):
        trees += 1
        paths, advantages = r.paths, r.paths.advantage("A_target")
        gradient = policy_gradient(paths.world)
        for level, treatment in COMBINATIONS:
            weight = capped(correction(r.correction, level), treatment, TABLE_CAP) * r.rho
            bias = paths.expectation(paths.summed_scores(weight * advantages)) - gradient
            biased[level, treatment] += int(np.any(bias != 0))
    yield Evidence(
        "the same corrections on random trees with three unrelated policies: bias of the summed gradient",
        "enumeration",
        f"biased on how many of {trees} random trees: "
        + ", ".join(f"{name} {count}" for name, count in zip(names, biased.values(), strict=True)),
        all((count == 0) == (key in UNBIASED) for key, count in biased.items()),
        {"trees": trees, **dict(zip(names, biased.values(), strict=True))},
    )


CLAIMS = (
    Claim(
        "11.prefix",
        "Correcting for a third sampling policy mu, the prefix weight (b/mu)(1..t) rho_t is unbiased as the whole "
        "sequence's is, and never noisier.",
        "true if",
        "per-token integrands that depend on the prefix only, such as an advantage known at its token, but not an "
        "outcome reward; mu has mass wherever b and pi have; the sum over tokens need not follow the order",
        "our own; the released code of arXiv:2605.07331 uses the whole sequence's",
        check_prefix,
        weighted_by("prefix"),
        weighted_by("token"),
        "the token's correction passed off as the prefix's",
        "With an advantage known at its token, give the sampler's log-probabilities as behavior policy: no second "
        "weight is needed. With an outcome reward the prefix correction is biased even before the first update, when "
        "the whole sequence's, uncapped, is not. The window then clips the engine's noise too.",
    ),
    Claim(
        "11.none",
        "With samples of mu, rho_t = pi/b alone will do, as the old policy b is close to the sampler.",
        "false",
        "E_mu rho_t is not 1 and can vanish exponentially in t; the gradient is biased even before the first update, "
        "when pi = b",
        "training without a rollout correction",
        check_none,
        "none",
        "prefix",
        "the prefix correction",
        "A mean of the ratio away from 1 can mean that the recorded log-probabilities are not the sampler's (other "
        "causes: truncated sampling, few samples, reuse). If so, correct for it, or record the sampler's.",
    ),
    Claim(
        "11.sequence_cap",
        "Truncating the sequence's correction at 5, as the released code does by default, is harmless.",
        "false",
        "the bias is what lies above the cap, and over long sequences most of the weight does: the mean weight falls "
        "towards 0",
        "the released code of arXiv:2605.07331",
        check_sequence_cap,
        capped,
        never_capped,
        "the weight as it is, passed off as capped",
        "Log the mean of the applied correction. At a token spread of .05 over 8000 tokens a cap of 5 leaves a mean "
        "weight of 5% (log-normal weights).",
    ),
    Claim(
        "11.masked",
        "Dropping what lies above the cap (masking) lowers the variance of the correction, as truncation does.",
        "false",
        "truncation never raises it; masking turns weights just above the cap into 0, which can raise it, and loses at "
        "least as much of the mean",
        "masked importance sampling",
        check_masked,
        "masked",
        "truncated",
        "truncation passed off as masking",
        "A tight mask is not the cautious choice: where many weights lie just above it, it costs both bias and "
        "variance.",
    ),
    Claim(
        "11.levels",
        "Of no correction, the token's, the prefix's and the sequence's, as they are, truncated or masked, exactly the "
        "prefix's and the sequence's as they are leave the gradient unbiased.",
        "true if",
        "exact A^pi; policies in general position; a cap that acts",
        "our own table",
        check_levels,
        correction_weight,
        lambda correction, level: correction_weight(correction, "token" if level == "prefix" else level),
        "the token's correction passed off as the prefix's",
        "Choose the level first: in the example the token's correction is further off than none. Every cap trades bias "
        "for variance, so count what it cuts.",
    ),
)
