r"""Claim 10: what the released CTPO code does beside the printed formula, and what each peculiarity does to bias.

The released loss differs from :math:`\min(\rho_t A, \mathrm{clip}(\rho_t) A)`, averaged over the tokens of a sequence
and then over sequences, in its derivative (claim 9), a clamp of token log-ratios, a limit on log rho_t, a second upper
bound for negative advantages, and the mean that it takes over a batch. `CONFIGURATIONS` names them one by one, and
`table` measures each exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from scipy.stats import binom, norm

import ctpo
from simulations.claims.effective_sample_size import SIGMAS
from simulations.claims.gradient_bias import SHARINGS
from simulations.claims.registry import Claim, Context, Evidence
from simulations.claims.stop_gradient import undetached
from simulations.claims.worlds import HALF, known, listed
from simulations.exact import (
    AdvantageKind,
    Trajectories,
    enumerate_trajectories,
    policy_gradient,
)
from simulations.mdp import World, bigram, policy_table, random_tree, tree

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]

# --- the loss, piece by piece ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """A loss over a batch of sequences.

    Attributes:
        estimator: Weight and gate of every token.
        aggregation: How the terms are averaged: over all tokens of the batch, or per sequence first.
        literal: Differentiate the whole product rho_t instead of its last factor (see claim 9).
    """

    estimator: ctpo.Estimator
    aggregation: Aggregation = "seq-mean-token-mean"
    literal: bool = False


PRINTED = Configuration(
    ctpo.get_estimator("ctpo", clip=ctpo.PositionClip(dual=None), max_log_ratio=None, max_token_log_ratio=None)
)
RELEASED = Configuration(ctpo.get_estimator("ctpo"), "token-mean")


def _with(configuration: Configuration, aggregation: Aggregation | None = None, **changes: Any) -> Configuration:
    estimator = ctpo.get_estimator(configuration.estimator, **changes)
    return Configuration(estimator, aggregation or configuration.aggregation, configuration.literal)


#: What the released code adds to the printed formula, in the order in which it does.
PECULIARITIES: Mapping[str, Callable[[Configuration], Configuration]] = {
    "token clamp": lambda c: _with(c, max_token_log_ratio=20.0),
    "log-ratio limit": lambda c: _with(c, max_log_ratio=10.0),
    "dual clip": lambda c: _with(c, clip=ctpo.PositionClip()),
    "token-mean": lambda c: _with(c, "token-mean"),
}


def _configurations() -> dict[str, Configuration]:
    unclipped = ctpo.Estimator("cumulative", form="unclipped", max_log_ratio=None, max_token_log_ratio=None)
    result = {
        "rho_t alone, summed": Configuration(unclipped, "seq-mean-token-sum"),
        "rho_t alone": Configuration(unclipped),
        "printed formula": PRINTED,
        "printed formula, differentiated literally": replace(PRINTED, literal=True),
    }
    result |= {f"printed formula with {name} only": change(PRINTED) for name, change in PECULIARITIES.items()}
    so_far = PRINTED
    for name, change in PECULIARITIES.items():
        so_far = change(so_far)
        result["released code" if so_far == RELEASED else f"... and {name}"] = so_far
    return result


#: The printed formula, each peculiarity alone, and all of them one after the other up to the released code.
CONFIGURATIONS: Mapping[str, Configuration] = _configurations()


def sequence_gradients(paths: Trajectories, configuration: Configuration, advantages: np.ndarray) -> np.ndarray:
    """(N, D) sum over tokens of coefficient times score, with float advantages (N, H), before any averaging."""
    weight = configuration.estimator.coefficients(*paths.log_probabilities(), advantages, paths.mask).weight
    terms = np.where(paths.mask, weight * advantages, 0.0)
    return paths.summed_scores(undetached(terms) if configuration.literal else terms)


def token_weights(mask: np.ndarray, aggregation: Aggregation) -> np.ndarray:
    """(n, T) share of every policy token in a batch's loss; sequences without any count in no mean."""
    lengths = mask.sum(axis=1, keepdims=True)
    sequences = max(int((lengths > 0).sum()), 1)
    if aggregation == "token-mean":
        return mask / max(int(mask.sum()), 1)
    if aggregation == "seq-mean-token-mean":
        return mask / np.maximum(lengths, 1) / sequences
    return mask / sequences


@dataclass(frozen=True)
class BatchMoments:
    """Mean (D,) and trace of the covariance of a batch's gradient."""

    mean: np.ndarray
    total_variance: Any


def batch_moments(
    probability: np.ndarray, lengths: np.ndarray, summed: np.ndarray, aggregation: Aggregation, batch: int
) -> BatchMoments:
    r"""Exact moments of the gradient of a batch of independent sequences, also where it is a ratio of sums.

    A mean over tokens divides by the total length L of the batch, whose distribution given the lengths of one or two
    sequences is that of a sum of the others':

    .. math:: E\,\frac{\sum_i X_i}{L} = n \sum_{t,s} E[X; T=t]\, P(L_{n-1}=s) / (t+s)

    Args:
        probability: (N,) of every possible sequence, Fractions or floats.
        lengths: (N,) number of its policy tokens, at least 1.
        summed: (N, D) its summed gradient.
        aggregation: How a batch is averaged.
        batch: Number of sequences n.

    Raises:
        ValueError: A sequence has no policy token, or the batch no sequence.
    """
    if batch < 1:
        raise ValueError(f"batch: must be at least 1, got {batch}")
    if lengths.min() < 1:
        raise ValueError("lengths: every sequence needs a policy token, got one without")
    if aggregation != "token-mean":
        each = summed / lengths[:, None] if aggregation == "seq-mean-token-mean" else summed
        mean = (probability[:, None] * each).sum(axis=0)
        variance = (probability * ((each - mean) ** 2).sum(axis=1)).sum()
        return BatchMoments(mean, variance / batch)
    values = sorted(set(lengths.tolist()))
    chance = {t: probability[lengths == t].sum() for t in values}
    first = {t: (probability[:, None] * summed)[lengths == t].sum(axis=0) for t in values}
    square = {t: (probability * (summed**2).sum(axis=1))[lengths == t].sum() for t in values}
    others: list[dict[int, Any]] = [{0: 1}]  # distribution of the total length of 0, 1, .. sequences
    for _ in range(batch - 1):
        longer: dict[int, Any] = {}
        for s, p in others[-1].items():
            for t, q in chance.items():
                longer[s + t] = longer.get(s + t, 0) + p * q
        others.append(longer)
    mean = batch * sum(first[t] * p / (t + s) for t in values for s, p in others[-1].items())
    second = batch * sum(square[t] * p / (t + s) ** 2 for t in values for s, p in others[-1].items())
    if batch > 1:
        second += (
            batch
            * (batch - 1)
            * sum(
                (first[t] * first[u]).sum() * p / (t + u + s) ** 2
                for t in values
                for u in values
                for s, p in others[-2].items()
            )
        )
    return BatchMoments(mean, second - (mean**2).sum())


# --- the table ------------------------------------------------------------------------------------------------------


def mishap_world() -> World:
    """A small world in which every peculiarity acts: two kinds of mishap that pi makes and b all but never does.

    Token 0 stops, 1 goes on and 2 is a mishap; the reward is the number of tokens 1, and 0 after a mishap. At the first
    token a mishap has log-ratio 16 log 2 = 11.1, above the limit of 10, at the second 30 log 2 = 20.8, above the clamp
    of 20. The ordinary tokens leave the window on either side, with advantages of either sign.
    """
    sixteenth = Fraction(1, 16)
    mishap = (Fraction(1, 2**20), Fraction(1, 2**34), Fraction(0))
    goes_on = (Fraction(9, 16), Fraction(6, 16), Fraction(5, 8))
    slips = (sixteenth, sixteenth, Fraction(0))
    mdp = tree(
        3, 3, eos=0, name="mishaps", outcome=lambda string: 0 if 2 in string else sum(token == 1 for token in string)
    )

    def behavior(prefix: tuple[int, ...]) -> list[Fraction]:
        rare = mishap[len(prefix)]
        return [HALF - rare, HALF, rare]

    def target(prefix: tuple[int, ...]) -> list[Fraction]:
        on, slip = goes_on[len(prefix)], slips[len(prefix)]
        return [1 - on - slip, on, slip]

    return World(mdp, policy_table(mdp, behavior), policy_table(mdp, target), "position").as_float()


def ordinary_world() -> World:
    """A bigram model with an end-of-sequence token, its target a step of 0.3 away in logits."""
    return bigram(np.random.default_rng(20), n_tokens=4, horizon=5, step=0.3, eos=True)


def released_rows(
    world: World,
    advantage: AdvantageKind = "A_target",
    batch: int = 8,
    configurations: Mapping[str, Configuration] = CONFIGURATIONS,
) -> list[dict[str, Any]]:
    """What each configuration does on a world that can be enumerated, exactly, for batches of some size.

    Gradients that are divided by lengths are multiplied by the mean length, so that a mere change of the step size is
    no bias.

    Returns:
        One row per configuration: "mean" is the mean gradient (D,), "bias" the norm of its bias over that of grad J,
        "cosine" its cosine with grad J (NaN if it is 0), "noise" the root of the total variance of a batch's
        gradient over the norm of grad J, "silenced" the share of policy tokens with an advantage that get no gradient,
        and "pg_clipfrac" what the released metric of that name shows.
    """
    world = world.as_float() if world.exact else world
    paths = enumerate_trajectories(world)
    gradient = policy_gradient(world)
    size = float(np.linalg.norm(gradient))
    if size == 0.0:
        raise ValueError(f"world: the true gradient of {world.name!r} is 0, so no bias is relative to it")
    advantages = paths.advantage(advantage).astype(float)
    lengths, probability = paths.mask.sum(axis=1), paths.behavior_probability
    mean_length = float((probability * lengths).sum())
    rows = []
    for name, configuration in configurations.items():
        summed = sequence_gradients(paths, configuration, advantages)
        found = batch_moments(probability, lengths, summed, configuration.aggregation, batch)
        scale = 1.0 if configuration.aggregation == "seq-mean-token-sum" else mean_length
        mean = scale * found.mean
        length = float(np.linalg.norm(mean))
        counted = configuration.estimator.coefficients(*paths.log_probabilities(), advantages, paths.mask)
        silent = paths.mask & (counted.weight == 0) & (advantages != 0)
        rows.append(
            {
                "world": world.name,
                "configuration": name,
                "mean": mean,
                "bias": float(np.linalg.norm(mean - gradient)) / size,
                "cosine": float(mean @ gradient) / length / size if length > 0 else math.nan,
                "noise": scale * math.sqrt(max(found.total_variance, 0.0)) / size,
                "silenced": token_share(paths, silent, paths.mask & (advantages != 0)),
                "pg_clipfrac": token_share(paths, counted.clipped_low | counted.clipped_high, paths.mask),
            }
        )
    return rows


def token_share(paths: Trajectories, which: np.ndarray, among: np.ndarray) -> float:
    """Share of some tokens among others, both (N, H) bool, under the behavior policy."""
    return float(paths.expectation(which.sum(axis=1)) / paths.expectation(among.sum(axis=1)))


def table() -> dict[str, Any]:
    """Title, note and rows of the table of configurations on both worlds, for a report."""
    return {
        "title": "The released loss, piece by piece",
        "note": "Exact, with exact A^pi and batches of 8 sequences, per configuration of "
        "simulations.claims.released_loss: norm of the bias over that of the true gradient, cosine with it, noise of a "
        "batch over its norm, share of tokens with an advantage that get no gradient, and what pg_clipfrac shows. In "
        "the world of mishaps the target makes grave mistakes that the sampler all but never made; nothing of the kind "
        "happens in the bigram model. Gradients divided by lengths are scaled by the mean length.",
        "rows": [
            {name: value for name, value in row.items() if name != "mean"}
            for world in (mishap_world(), ordinary_world())
            for row in released_rows(world)
        ],
    }


# --- 10.printed -----------------------------------------------------------------------------------------------------


def check_printed(_context: Context, configurations: Mapping[str, Configuration]) -> Iterator[Evidence]:
    """Each peculiarity by itself changes the mean gradient; the numerical limits only where mishaps are possible."""
    alone = ["printed formula, differentiated literally"]
    alone += [f"printed formula with {name} only" for name in PECULIARITIES]
    for world, acting in (
        (mishap_world(), alone),
        (ordinary_world(), [name for name in alone if "clamp" not in name and "limit" not in name]),
    ):
        rows = released_rows(world, configurations=configurations)
        means = {row["configuration"]: row.pop("mean") for row in rows}
        printed = means["printed formula"]
        moved = {
            n: float(np.linalg.norm(means[n] - printed) / np.linalg.norm(printed)) for n in [*alone, "released code"]
        }
        by_name = {row["configuration"]: row for row in rows}
        first, last = by_name["printed formula"], by_name["released code"]
        yield Evidence(
            f"{world.name}, exact A^pi, batches of 8: change of the mean gradient, relative to the printed formula's, "
            "by each peculiarity alone and by all; bias and cosine with grad J",
            "enumeration",
            f"{world.name}: mean gradient moved by "
            + ", ".join(f"{n.removeprefix('printed formula').strip(' ,')} {x:.2g}" for n, x in moved.items())
            + f"; relative bias printed {first['bias']:.2f}, released {last['bias']:.2f}; cosine with grad J "
            f"{first['cosine']:.2f}, {last['cosine']:.2f}; noise {first['noise']:.2g}, {last['noise']:.2g}",
            all((moved[name] > 1e-4) == (name in acting) for name in alone) and moved["released code"] > 0.01,
            {"rows": rows, "moved": moved},
        )


# --- 10.weight ------------------------------------------------------------------------------------------------------

#: Coefficients from log pi, log b, advantages and the mask of policy tokens.
Loss = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], ctpo.Coefficients]


def released_loss(
    logp: np.ndarray, behavior_logp: np.ndarray, advantages: np.ndarray, mask: np.ndarray
) -> ctpo.Coefficients:
    """The released estimator."""
    return RELEASED.estimator.coefficients(logp, behavior_logp, advantages, mask)


def unmasked_loss(
    logp: np.ndarray, behavior_logp: np.ndarray, advantages: np.ndarray, mask: np.ndarray
) -> ctpo.Coefficients:
    """Wrong: tool tokens count as the policy's."""
    found = RELEASED.estimator.coefficients(logp, behavior_logp, advantages)
    return ctpo.Coefficients(*(np.where(mask, field, 0) for field in found))


def check_weight(context: Context, loss: Loss) -> Iterator[Evidence]:
    """A token that is not clipped has weight rho_t; masked tokens enter neither rho nor the position."""
    rng, count = context.rng("weight"), context.count(60)
    tokens = kept = 0
    worst = 0.0
    for k in range(count):
        world = random_tree(
            rng, n_actions=2 + k % 2, horizon=3, eos=k % 2 == 0, tool_share=0.5, parameters="prefix", exact=False
        )
        paths = enumerate_trajectories(world)
        logp, behavior_logp = (np.where(paths.mask, x, rng.normal(size=x.shape)) for x in paths.log_probabilities())
        found = loss(logp, behavior_logp, rng.normal(size=len(logp)), paths.mask)
        on = paths.mask & ~(found.clipped_low | found.clipped_high | found.clipped_dual)
        tokens += int(paths.mask.sum())
        kept += int(on.sum())
        rho = np.where(paths.mask, paths.ratio, 1.0).cumprod(axis=1)
        worst = max(worst, float(np.abs(found.weight - np.where(on, rho, 0.0)).max()))
    yield Evidence(
        "weight of the released estimator against the product of the policy's ratios, 0 where clipped; tool tokens "
        "carry arbitrary numbers",
        "enumeration",
        f"weight is rho_t at {kept} unclipped of {tokens} tokens on {count} random trees with tool tokens: gap <= "
        f"{worst:.0e}",
        worst < 1e-12 and kept > 0,
        {"worlds": count, "tokens": tokens, "unclipped": kept, "largest_gap": worst},
    )
    mask = np.array([[True, False, True]])
    log_ratio = np.array([[0.0, 3.0, 0.08]])
    at_two, at_three = 0.05 * math.sqrt(2), 0.05 * math.sqrt(3)
    clipped = bool(loss(log_ratio, np.zeros((1, 3)), np.ones(1), mask).clipped_high[0, 2])
    yield Evidence(
        "mask 1, 0, 1: upper bound at the third token, log rho = 0.08 between 0.05 sqrt(2) and 0.05 sqrt(3)",
        "closed form",
        f"mask 1, 0, 1: log rho = 0.08 at the third token is {'above' if clipped else 'below'} its bound, which is "
        f"that of t = {2 if clipped else 3} ({at_two:.3f}; t = 3 has {at_three:.3f})",
        clipped,
        {"clipped": clipped},
    )


# --- 10.dual --------------------------------------------------------------------------------------------------------


def gaussian_tails(sigma: float, t: np.ndarray) -> dict[str, np.ndarray]:
    """Masses beyond the window's sides at positions t, for normal log rho_t of variance sigma^2 t and E rho_t = 1.

    "low" and "high" are under b; "high_target" is the mass above the window under pi.
    """
    root = np.sqrt(t)
    drift = sigma * root / 2
    return {
        "low": norm.cdf(-0.025 / sigma + drift),
        "high": norm.cdf(-0.05 / sigma - drift),
        "high_target": norm.cdf(-0.05 / sigma + drift),
    }


def binomial_target_mass(sigma: float, t: int) -> tuple[float, float]:
    """Mass above the window under pi for normalized binary tokens of log-ratio +-sigma, and its largest atom."""
    up = 0.5 + math.tanh(sigma / 2) / 2  # pi of the token with log-ratio +sigma; b has 1 - up
    above = math.floor((0.05 * math.sqrt(t) / sigma + t) / 2)  # log rho = sigma (2 ups - t)
    return float(binom.sf(above, t, up)), float(binom.pmf(t // 2, t, 0.5))


POSITIONS = np.array([100, 1000, 4000, 8000])
#: sigma -> share of b-samples clipped by the printed window, half of the advantages positive; with the dual bound; and
#: the pi-mass above the window.
TAILS: Mapping[float, tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]] = {
    SIGMAS[0]: ((0.165, 0.218, 0.314, 0.388), (0.189, 0.229, 0.317, 0.388), (0.093, 0.168, 0.332, 0.502)),
    SIGMAS[1]: ((0.197, 0.257, 0.362, 0.431), (0.231, 0.272, 0.365, 0.432), (0.136, 0.248, 0.473, 0.670)),
    SIGMAS[2]: ((0.200, 0.262, 0.367, 0.435), (0.236, 0.276, 0.370, 0.436), (0.141, 0.258, 0.488, 0.686)),
}


def drifted_world() -> World:
    """One token, b = 1/2, pi(1) = 3/4, R = 1 for token 0: pi has moved towards the bad token."""
    mdp = tree(2, 1, name="drifted to the bad token", outcome=lambda string: 1 - string[0])
    quarter = Fraction(1, 4)
    return World(mdp, policy_table(mdp, lambda _: [HALF, HALF]), policy_table(mdp, lambda _: [quarter, 1 - quarter]))


def flipped_world() -> World:
    """One of three tokens, the worst and the best doubled by pi: the dual bound turns the worst one's gradient."""
    mdp = tree(3, 1, name="dual sign flip", outcome=lambda string: (Fraction(1, 4), Fraction(1), HALF)[string[0]])
    behavior, target = ([Fraction(k, 100) for k in row] for row in ((1, 1, 98), (2, 2, 96)))
    return World(mdp, policy_table(mdp, lambda _: behavior), policy_table(mdp, lambda _: target))


def exact_gradient(world: World, estimator: ctpo.Estimator) -> np.ndarray:
    """(D,) mean gradient as Fractions; the estimator only says which tokens keep theirs."""
    paths = enumerate_trajectories(world)
    advantages = paths.advantage("A_target")
    found = estimator.coefficients(*paths.log_probabilities(), advantages.astype(float), paths.mask)
    kept = np.where(found.weight > 0, paths.ratio.cumprod(axis=1) * advantages, 0)
    return paths.expectation(paths.summed_scores(kept))


def check_dual(context: Context, clip: ctpo.PositionClip) -> Iterator[Evidence]:
    """The dual bound of the released code is its upper bound, and what it takes away."""
    released = ctpo.get_estimator(RELEASED.estimator, clip=clip)
    t = np.arange(1, 8001)
    _, high, dual = clip.bounds(t)
    same = dual is not None and bool(np.all(dual == high))
    usual = ctpo.get_estimator("grpo", clip=ctpo.RatioClip(0.2, 0.2, dual=3.0))
    rows = {}
    for name, estimator, ratio in (
        ("released code, ratio 1.06", released, 1.06),
        ("printed formula, ratio 1.06", PRINTED.estimator, 1.06),
        ("PPO with the usual dual bound 3, ratio 1.5", usual, 1.5),
        ("the same, ratio 3.5", usual, 3.5),
    ):
        rows[name] = float(estimator.coefficients(np.log([[ratio]]), np.zeros((1, 1)), -np.ones(1)).weight[0, 0])
    yield Evidence(
        "dual bound against upper bound for all t <= 8000; weight of a token with A = -1 at t = 1",
        "closed form",
        f"the dual bound {'is' if same else 'is not'} the upper bound; weight with A < 0: "
        + ", ".join(f"{name} {value:.3g}" for name, value in rows.items()),
        same and np.allclose(list(rows.values()), [0, 1.06, 1.5, 0], atol=1e-12),
        {"same": same, "weight": rows},
    )
    rng, count, worst, acted = context.rng("dual"), context.count(80), 0.0, 0
    for k in range(count):
        world = random_tree(
            rng, n_actions=2 + k % 2, horizon=3, eos=k % 2 == 0, parameters=SHARINGS[k % 3], exact=False
        )
        paths = enumerate_trajectories(world)
        advantages = paths.advantage("A_target")
        means = [
            paths.expectation(sequence_gradients(paths, Configuration(e), advantages))
            for e in (released, PRINTED.estimator)
        ]
        log_rho = np.log(paths.ratio).cumsum(axis=1)
        removed = (advantages < 0) & (log_rho > 0.05 * np.sqrt(np.arange(1, 4)))
        lost = paths.expectation(paths.summed_scores(np.where(removed, advantages, 0.0)), "target")
        worst = max(worst, float(np.abs(means[0] - means[1] + lost).max()))
        acted += int(np.abs(lost).max() > 1e-12)
    yield Evidence(
        "mean gradient with the dual bound minus without it, against -E_pi[sum g_t A_t 1{A_t < 0, log rho_t > bound}]",
        "enumeration",
        f"the dual bound removes the pi-mass above it: gap <= {worst:.0e} on {count} random trees, acting on {acted}",
        worst < 1e-12 and acted > 0,
        {"worlds": count, "largest_gap": worst, "acted": acted},
    )
    drifted, flipped = drifted_world(), flipped_world()
    found = [policy_gradient(drifted)[1]] + [exact_gradient(drifted, e)[1] for e in (PRINTED.estimator, released)]
    signs = [policy_gradient(flipped)[0]] + [exact_gradient(flipped, e)[0] for e in (PRINTED.estimator, released)]
    yield Evidence(
        "one token, exact A^pi: gradient of a bad token's logit, true, printed formula, with the dual bound",
        "enumeration",
        f"b = 1/2, pi(bad) = 3/4: {listed(found)}; three tokens, b = (1, 1, 98)/100, pi = (2, 2, 96)/100, R = 1/4, 1, "
        f"1/2: {listed(signs)}: with the dual bound the worst token is pushed up",
        found == known("dual_drifted") and signs == known("dual_sign"),
        {"drifted": [str(f) for f in found], "flipped": [str(f) for f in signs]},
    )
    yield _dual_mass(clip)


def _dual_mass(clip: ctpo.PositionClip) -> Evidence:
    """At the paper's spreads: what the bound removes under pi, and what it adds to the clipped share under b."""
    found, good, worst = {}, clip.dual == clip.high, 0.0
    for sigma, (printed, with_dual, mass) in TAILS.items():
        tails = gaussian_tails(sigma, POSITIONS)
        share = (tails["low"] + tails["high"]) / 2
        row = {
            "printed": share.tolist(),
            "with_dual": (share + tails["high"] / 2).tolist(),
            "target_mass": tails["high_target"].tolist(),
        }
        found[str(sigma)] = row
        good &= all(
            np.allclose(value, expected, atol=6e-4)
            for value, expected in zip(row.values(), (printed, with_dual, mass), strict=True)
        )
        for k, t in enumerate(POSITIONS):
            exact, atom = binomial_target_mass(sigma, int(t))
            worst = max(worst, abs(exact - row["target_mass"][k]) / atom)
    first = found[str(SIGMAS[0])]
    return Evidence(
        "normal log rho_t, sigma = .0335, .0387, .0393, t = 100, 1000, 4000, 8000: pi-mass above the window (what the "
        "dual bound removes where A < 0, as much as the upper bound where A > 0), share clipped under b; exact binary "
        "tokens for comparison",
        "closed form",
        f"sigma = .0335, t = 100, 1000, 4000, 8000: of the pi-mass with A < 0 {listed(first['target_mass'])} is "
        f"removed; clipped under b {listed(first['printed'])} without, {listed(first['with_dual'])} with the dual "
        f"bound; exact binary tokens agree within {worst:.2g} of their largest atom",
        bool(good and worst < 1),
        {"sigma": found, "gap_in_atoms": worst},
    )


# --- 10.limits ------------------------------------------------------------------------------------------------------


def overflow_world(bits: int) -> World:
    """One token, b(1) = 2^-bits, pi(1) = 1/2, R = 1 for token 0."""
    mdp = tree(2, 1, name=f"b(1) = 2^-{bits}", outcome=lambda string: 1 - string[0])
    rare = Fraction(1, 2**bits)
    return World(mdp, policy_table(mdp, lambda _: [1 - rare, rare]), policy_table(mdp, lambda _: [HALF, HALF]))


def mean_with(world: World, configuration: Configuration) -> float:
    """Mean gradient of token 1's logit."""
    paths = enumerate_trajectories(world.as_float())
    summed = sequence_gradients(paths, configuration, paths.advantage("A_target"))
    return float(paths.expectation(summed)[1])


def check_limits(_context: Context, limits: Mapping[str, float | None]) -> Iterator[Evidence]:
    """The numerical limits take gradients away, and the clamp changes later weights."""
    none = ctpo.Estimator("cumulative", form="unclipped", max_log_ratio=None, max_token_log_ratio=None)
    wide = replace(none, max_log_ratio=limits["max_log_ratio"], max_token_log_ratio=limits["max_token_log_ratio"])

    def weights(*log_ratio: float) -> list[float]:
        row = np.array([log_ratio])
        return [float(w) for w in wide.coefficients(row, np.zeros_like(row), np.ones(1)).weight[0]]

    below, above = weights(9.5)[0], weights(10.5)[0]
    yield Evidence(
        "weight at log rho = 9.5 and 10.5 without any window",
        "closed form",
        f"weight {below:.0f} at log rho = 9.5 and {above:.0f} at 10.5 (without limit {math.exp(10.5):.0f})",
        math.isclose(below, math.exp(9.5), rel_tol=1e-12) and above == 0.0,
        {"below": below, "above": above},
    )
    cancelled, corrupted = weights(25.0, -25.0)[1], weights(25.0, -15.0)[1]
    right = float(none.coefficients(np.array([[25.0, -15.0]]), np.zeros((1, 2)), np.ones(1)).weight[0, 1])
    yield Evidence(
        "token log-ratios (25, -25) and (25, -15): weight of the second token",
        "closed form",
        f"(25, -25): {cancelled:.0f}, right as both clamps cancel; (25, -15): {corrupted:.0f} instead of {right:.0f}",
        math.isclose(cancelled, 1.0)
        and math.isclose(corrupted, math.exp(5), rel_tol=1e-12)
        and math.isclose(right, math.exp(10), rel_tol=1e-12),
        {"cancelled": cancelled, "corrupted": corrupted, "right": right},
    )
    rare, rarer = overflow_world(16), overflow_world(31)
    limited = mean_with(rare, _with(PRINTED, max_log_ratio=limits["max_log_ratio"]))
    clamped = mean_with(rarer, _with(PRINTED, max_token_log_ratio=limits["max_token_log_ratio"]))
    true = [float(policy_gradient(world)[1]) for world in (rare, rarer)]
    plain = [mean_with(world, PRINTED) for world in (rare, rarer)]
    yield Evidence(
        "one token, pi(bad) = 1/2, exact A^pi, printed formula: gradient of the bad token's logit with b(bad) = 2^-16 "
        "and the limit of 10, and with b(bad) = 2^-31 and the clamp of 20",
        "enumeration",
        f"grad J = -1/4, met without limits; limit of 10: {limited:.4g}; clamp of 20: {clamped:.4g}",
        np.allclose(true + plain, -0.25, rtol=1e-9)
        and math.isclose(limited, -1 / 8, rel_tol=1e-9)
        and math.isclose(clamped, -(1 + math.exp(20) / 2**30) / 8, rel_tol=1e-9),
        {"true": true, "limited": limited, "clamped": clamped},
    )
    # log rho = L at every position: the first token carries it.
    levels, t = np.array([9.9, 10.1, 15.0, 19.0]), 39_999
    log_ratio = np.zeros((len(levels), t))
    log_ratio[:, 0] = levels
    differ = 0
    for sign in (1.0, -1.0):
        found = [
            _with(RELEASED, max_log_ratio=limit).estimator.coefficients(
                log_ratio, np.zeros_like(log_ratio), np.full(len(levels), sign)
            )
            for limit in (limits["max_log_ratio"], None)
        ]
        differ += int((found[0].weight != found[1].weight).sum())
    clip = RELEASED.estimator.clip
    assert isinstance(clip, ctpo.PositionClip)
    first = float(clip.bounds(np.array([40_000.0]))[1][0])
    yield Evidence(
        "weights of the released estimator with and without the limit of 10, log rho from 9.9 to 19, t < 40,000",
        "closed form",
        f"behind the released window, dual bound included, the limit of 10 changes {differ} of {2 * log_ratio.size} "
        f"weights: the window reaches {first:.3g} at t = 40,000 only",
        differ == 0 and math.isclose(first, 10.0),
        {"different": differ, "bound_at_40000": first},
    )


# --- 10.aggregation -------------------------------------------------------------------------------------------------

#: Share of every policy token in a batch's loss, by name of the aggregation.
Sharing = Callable[[np.ndarray, Aggregation], np.ndarray]


def check_aggregation(context: Context, shares: Sharing) -> Iterator[Evidence]:
    """token-mean gives every token the same share, the printed formula every sequence."""
    mask = np.array([[True, False, False, False], [True, True, True, True]])
    by_token, by_sequence = (shares(mask, name) for name in ("token-mean", "seq-mean-token-mean"))
    yield Evidence(
        "sequences of 1 and 4 tokens: weight of a token of each",
        "closed form",
        f"lengths 1 and 4: token-mean {listed(by_token[:, 0])} each, 1/|o| (as printed) {listed(by_sequence[:, 0])}",
        bool(np.allclose(by_token[mask], 0.2) and np.allclose(by_sequence[mask], [0.5, *[0.125] * 4])),
        {"token_mean": by_token[:, 0].tolist(), "printed": by_sequence[:, 0].tolist()},
    )
    rng, count = context.rng("aggregation"), 40
    cosines: dict[str, list[float]] = {"token-mean": [], "seq-mean-token-mean": []}
    between = []
    for k in range(count):
        world = random_tree(rng, n_actions=2 + k % 2, horizon=3, eos=True, parameters=SHARINGS[k % 3], exact=False)
        paths = enumerate_trajectories(world)
        gradient = policy_gradient(world)
        if np.linalg.norm(gradient) < 1e-9:
            continue
        unclipped = Configuration(ctpo.get_estimator("ctpo", clip=None, form="unclipped"))
        summed = sequence_gradients(paths, unclipped, paths.advantage("A_target"))
        lengths, probability = paths.mask.sum(axis=1), paths.behavior_probability
        units = []
        for name in cosines:
            mean = batch_moments(probability, lengths, summed, name, 8).mean  # type: ignore[arg-type]
            units.append(mean / np.linalg.norm(mean))
            cosines[name].append(float(units[-1] @ gradient / np.linalg.norm(gradient)))
        between.append(float(units[0] @ units[1]))
    lowest = {name: min(values) for name, values in cosines.items()}
    yield Evidence(
        "unclipped rho_t with exact A^pi on random trees with early ends, batches of 8: cosine between the two mean "
        "gradients, and of each with grad J",
        "enumeration",
        f"cosine between the two down to {min(between):.2f}; with grad J down to {lowest['token-mean']:.2f} "
        f"(token-mean) and {lowest['seq-mean-token-mean']:.2f} (1/|o|) on {len(between)} random trees",
        min(between) < 0.999 and max(lowest.values()) < 0.999,
        {"between": min(between), "with_gradient": lowest, "worlds": len(between)},
    )


# --- 10.reported_rate -----------------------------------------------------------------------------------------------


def pg_clipfrac(found: ctpo.Coefficients, mask: np.ndarray) -> float:
    """What the released code reports under that name: tokens above or below the window, over all policy tokens."""
    return float(((found.clipped_low | found.clipped_high) & mask).sum() / mask.sum())


def total_clip_rate(found: ctpo.Coefficients, mask: np.ndarray) -> float:
    """The released code's pg_update/clip/total/rate, dual bound included."""
    return float(((found.clipped_low | found.clipped_high | found.clipped_dual) & mask).sum() / mask.sum())


def check_reported_rate(
    context: Context, reported: Callable[[ctpo.Coefficients, np.ndarray], float]
) -> Iterator[Evidence]:
    """pg_clipfrac leaves out the dual bound, and counts tokens without an advantage in its denominator."""

    def rates(log_ratio: float, advantages: list[float]) -> tuple[float, float]:
        row, a = np.full((len(advantages), 1), log_ratio), np.array(advantages)
        mask = np.ones(row.shape, dtype=bool)
        found = released_loss(row, np.zeros_like(row), a, mask)
        silent = (found.weight == 0) & (a[:, None] != 0)
        return reported(found, mask), float(silent.sum() / (a != 0).sum())

    dual, zero = rates(1.0, [-1.0, -2.0]), rates(1.0, [1.0, 0.0])
    yield Evidence(
        "two tokens above the window: reported rate, and share of the tokens with an advantage that get no gradient",
        "closed form",
        f"A = (-1, -2): reported {dual[0]:.3g}, silenced {dual[1]:.3g}; A = (1, 0): reported {zero[0]:.3g}, silenced "
        f"{zero[1]:.3g}",
        dual == (0.0, 1.0) and zero == (0.5, 1.0),
        {"negative": dual, "zero": zero},
    )
    rng, count, short, gaps = context.rng("reported rate"), context.count(40), 0, []
    for k in range(count):
        world = random_tree(rng, n_actions=2 + k % 2, horizon=3, parameters=SHARINGS[k % 3], exact=False)
        paths = enumerate_trajectories(world)
        advantages = paths.advantage("A_target")
        found = released_loss(*paths.log_probabilities(), advantages, paths.mask)
        shown = float(
            paths.behavior_probability @ [reported(_row(found, n), paths.mask[n]) for n in range(len(advantages))]
        )
        silent = token_share(
            paths, paths.mask & (found.weight == 0) & (advantages != 0), paths.mask & (advantages != 0)
        )
        short += int(shown < silent - 1e-12)
        gaps.append(silent - shown)
    yield Evidence(
        "expected reported rate against the share of tokens with an advantage that get no gradient, on random trees",
        "enumeration",
        f"reported too low on {short} of {count} random trees, by {np.median(gaps):.2f} in the median and up to "
        f"{max(gaps):.2f}",
        short > 0 and max(gaps) > 0.1,
        {"worlds": count, "too_low": short, "median": float(np.median(gaps)), "largest": max(gaps)},
    )
    tails = gaussian_tails(SIGMAS[0], POSITIONS)
    shown_share, total = (tails["low"] + tails["high"]) / 2, (tails["low"] + 2 * tails["high"]) / 2
    yield Evidence(
        "sigma = .0335, half of the advantages positive, t = 100, 1000, 4000, 8000: reported and total share",
        "closed form",
        f"sigma = .0335: reported {listed(shown_share)}, dual bound included {listed(total)}; both halve if every "
        "second advantage is 0",
        bool(np.allclose(shown_share, TAILS[SIGMAS[0]][0], atol=6e-4) and np.all(total > shown_share)),
        {"reported": shown_share.tolist(), "total": total.tolist()},
    )


def _row(found: ctpo.Coefficients, n: int) -> ctpo.Coefficients:
    """One sequence's coefficients."""
    return ctpo.Coefficients(*(field[n] for field in found))


CLAIMS = (
    Claim(
        "10.printed",
        "The released code follows the gradient of the printed formula.",
        "false",
        "its derivative, its token clamp, its limit on log rho_t, its dual clip and its aggregation each change the "
        "mean gradient; the two limits only where log-ratios above 10 can occur",
        "the released code of arXiv:2605.07331 against its printed objective",
        check_printed,
        CONFIGURATIONS,
        dict.fromkeys(CONFIGURATIONS, PRINTED),
        "the printed formula in every row",
        "Results of the released code are results of another loss than the paper's formula. Where no log-ratio "
        "exceeds 10 the differences that act are the derivative, the dual clip and the aggregation.",
    ),
    Claim(
        "10.weight",
        "In the released loss an unclipped token has weight rho_t; tool tokens enter neither the product nor the "
        "position.",
        "true",
        "as read and executed; log-ratios within the numerical limits",
        "the released code of arXiv:2605.07331",
        check_weight,
        released_loss,
        unmasked_loss,
        "the mask ignored",
        "The released code does use the cumulative ratio of the policy's own tokens; pass the mask of policy tokens, "
        "or tool output shifts weights and windows.",
    ),
    Claim(
        "10.dual",
        "The released dual clip for negative advantages is a harmless safety net.",
        "false",
        "its bound equals the upper bound, so tokens with A < 0 are clipped on both sides; where the sign of A does "
        "not depend on rho it removes as much of pi's mass as the upper bound does; it can turn the sign of a gradient",
        "the released code of arXiv:2605.07331, absent from its formula",
        check_dual,
        ctpo.PositionClip(),
        ctpo.PositionClip(dual=None),
        "the printed window passed off as the released one",
        "With the default c = 0.05 the loss stops pushing down bad tokens that the policy has made likelier. Set "
        "dual=None for the printed formula, or a much larger bound.",
    ),
    Claim(
        "10.limits",
        "The numerical limits (20 per token, 10 on log rho) only guard against overflow.",
        "false",
        "above 10 the gradient is 0 instead of saturated, and a clamped token corrupts all later weights; behind the "
        "released window the limit of 10 never acts before t = 40,000",
        "the released code of arXiv:2605.07331",
        check_limits,
        {"max_log_ratio": 10.0, "max_token_log_ratio": 20.0},
        {"max_log_ratio": None, "max_token_log_ratio": None},
        "no limits",
        "If you widen the window or drop the dual clip, watch the saturation counts: a saturated token is dropped, not "
        "bounded.",
    ),
    Claim(
        "10.aggregation",
        "The released default aggregation, token-mean, is the printed mean over sequences of token means.",
        "false",
        "token-mean weighs tokens alike, the printed 1/|o| sequences; where lengths vary neither mean gradient need "
        "be parallel to grad J",
        "the released code of arXiv:2605.07331 against its printed objective",
        check_aggregation,
        token_weights,
        lambda mask, _aggregation: token_weights(mask, "token-mean"),
        "token-mean passed off as the printed one",
        "State the aggregation with every result: to follow the printed formula set seq-mean-token-mean.",
    ),
    Claim(
        "10.reported_rate",
        "The released metric pg_clipfrac counts all tokens that the window silences.",
        "false",
        "it leaves out the dual bound, and tokens with A = 0 are in its denominator",
        "the released code of arXiv:2605.07331",
        check_reported_rate,
        pg_clipfrac,
        total_clip_rate,
        "the rate with the dual bound passed off as pg_clipfrac",
        "Read pg_update/clip/total, and divide by the share of tokens with a nonzero advantage, before comparing clip "
        "rates between runs.",
    ),
)
