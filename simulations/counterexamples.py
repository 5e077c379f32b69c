"""Search for the smallest worlds in which a statement about importance ratios fails.

A `Statement` compares two numbers of a small rational world: two tokens, two or three positions, probabilities with
small denominators, few and small rewards. Hypothesis proposes worlds and shrinks the first one that breaks the
statement; sizes are tried from small to large, so that what is found has short strings and small denominators. All is
computed in Fractions by enumeration, and what is found is computed once more by another engine before it is reported.
A statement that holds is the search's negative control: nothing may be found.
"""

from __future__ import annotations

import math
import random
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Any, Literal

import numpy as np

import ctpo
from simulations.exact import (
    AdvantageKind,
    Trajectories,
    enumerate_trajectories,
    estimator_moments,
    exact_log2,
    gradient_mean,
    gradient_moments,
    policy_gradient,
    ratio_moments,
    rational_weights,
)
from simulations.mdp import END, Parameters, TokenMDP, World, as_numbers, one_logit, policy_table, tree, tree_prefixes
from simulations.sweep import Study

#: The two numbers that a statement compares, or two tuples of numbers.
Sides = tuple[Any, Any]
Relation = Literal["<=", "=", "same sign"]


@dataclass(frozen=True)
class Family:
    """The worlds in which a statement is tried; all have two tokens and one logit per block of parameters.

    Attributes:
        parameters: Where b and pi have the same probabilities: in each prefix, at each position or everywhere their
            own. The logits are shared likewise.
        pairs: Which b(1) and pi(1) go together: "any", "equal", or pi(1) = 1 - b(1) with ratios that are powers of
            two ("powers") or of four ("squares"), whose logarithms or square roots are rational.
        eos: Whether token 0 ends the string.
        longest: Largest number of tokens.
    """

    parameters: Parameters = "shared"
    pairs: Literal["any", "equal", "powers", "squares"] = "any"
    eos: bool = False
    longest: int = 3


@dataclass(frozen=True)
class Statement:
    """What is claimed of every world of a family: left, relation, right.

    Attributes:
        text: The statement in one sentence.
        holds: Whether theory says that it is true.
        left: What the left number is.
        relation: How it is said to compare with the right number.
        right: What the right number is.
        family: The worlds.
        sides: The two numbers of a world, in Fractions, by enumeration.
        again: The same by another engine, or as another expectation.
    """

    text: str
    holds: bool
    left: str
    relation: Relation
    right: str
    family: Family
    sides: Callable[[World], Sides]
    again: Callable[[World], Sides]

    def broken(self, world: World) -> bool:
        """Whether a world is a counterexample."""
        left, right = self.sides(world)
        if self.relation == "<=":
            return bool(left > right)
        return bool(left != right) if self.relation == "=" else bool(left * right < 0)

    def confirmed(self, world: World) -> bool:
        """Whether another engine finds the same two numbers: Fractions equal, floats to 10 digits."""
        pairs = zip(self.sides(world), self.again(world), strict=True)
        return all(
            x == y if isinstance(y, Fraction) else math.isclose(x, y, rel_tol=1e-10, abs_tol=1e-12)
            for one, other in pairs
            for x, y in zip(_tuple(one), _tuple(other), strict=True)
        )


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


# --- small worlds ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Bounds of the worlds that are tried together.

    Attributes:
        horizon: Number of tokens.
        rewarded: Largest number of strings with a reward other than 0.
        rewards: What they can be, the simplest first.
        denominator: Largest denominator of a probability.
    """

    horizon: int
    rewarded: int
    rewards: tuple[int, ...]
    denominator: int


#: From small to large.
SIZES = (
    Size(2, 1, (0, 1), 3),
    Size(2, 1, (0, 1), 4),
    Size(2, 1, (0, 1), 5),
    Size(2, 2, (0, 1, -1, 2), 4),
    Size(2, 4, (0, 1, -1, 2), 5),
    Size(3, 1, (0, 1), 4),
    Size(3, 4, (0, 1, -1, 2), 5),
)


@dataclass(frozen=True)
class SmallWorld:
    """A world as it is drawn.

    Attributes:
        family: Where it belongs.
        horizon: Number of tokens, or the largest where strings can end.
        pairs: (b(1), pi(1)) of each block of parameters that a policy uses, in the order of `places`.
        rewards: Of each string, in the order of `strings`.
    """

    family: Family
    horizon: int
    pairs: tuple[tuple[Fraction, Fraction], ...]
    rewards: tuple[int, ...]

    def world(self) -> World:
        """The exact world."""
        skeleton = _skeleton(self.horizon, self.family.eos)
        outcome = as_numbers(np.zeros(skeleton.n_states, dtype=int), True)
        outcome[skeleton.kind == END] = as_numbers(self.rewards, True)
        mdp = replace(skeleton, outcome=outcome)
        ones = dict(zip(places(self.family, self.horizon), self.pairs, strict=True))

        def policy(who: int) -> np.ndarray:
            def rule(prefix: tuple[int, ...]) -> list[Fraction]:
                one = ones[_place(prefix, self.family.parameters)][who]
                return [1 - one, one]

            return policy_table(mdp, rule)

        return one_logit(World(mdp, policy(0), policy(1), self.family.parameters))

    def describe(self) -> dict[str, Any]:
        """The world in strings: probabilities of token 1 by place, and the rewards that are not 0."""
        rows = zip(places(self.family, self.horizon), self.pairs, strict=True)
        named = zip(strings(self.family, self.horizon), self.rewards, strict=True)
        return {
            "tokens": self.horizon,
            "policies": {place: {"b(1)": str(b), "pi(1)": str(p)} for place, (b, p) in rows},
            "rewards": {"".join(map(str, s)): str(reward) for s, reward in named if reward},
        }


@cache
def _skeleton(horizon: int, eos: bool) -> TokenMDP:
    return tree(2, horizon, eos=0 if eos else None, name="small world")


def strings(family: Family, horizon: int) -> list[tuple[int, ...]]:
    """The finished strings of a family's worlds."""
    mdp = _skeleton(horizon, family.eos)
    return [literal_eval(label) for label, kind in zip(mdp.labels, mdp.kind, strict=True) if kind == END]


def places(family: Family, horizon: int) -> list[str]:
    """Names of the places where b and pi have probabilities of their own."""
    prefixes = tree_prefixes(_skeleton(horizon, family.eos))
    return list(dict.fromkeys(_place(prefix, family.parameters) for prefix in prefixes))


def _place(prefix: tuple[int, ...], parameters: Parameters) -> str:
    if parameters == "shared":
        return "every token"
    if parameters == "prefix" and prefix:
        return "after " + "".join(map(str, prefix))
    return f"token {len(prefix) + 1}"


def probability_pairs(family: Family, denominator: int) -> list[tuple[Fraction, Fraction]]:
    """The (b(1), pi(1)) that a place can have, the smallest denominators first."""
    small = [Fraction(k, n) for n in range(2, denominator + 1) for k in range(1, n) if math.gcd(k, n) == 1]
    if family.pairs == "any":
        pairs = [(b, p) for b in small for p in small]
        return sorted(pairs, key=lambda pair: max(value.denominator for value in pair))
    if family.pairs == "equal":
        return [(b, b) for b in small]
    base = {"powers": 2, "squares": 4}[family.pairs]
    powers = {Fraction(base**k) for k in range(-3, 4)}
    return [(b, p) for b, p in [(small[0], small[0]), *((b, 1 - b) for b in small[1:])] if p / b in powers]


# --- the two numbers of a statement ---------------------------------------------------------------------------------

Numbers = Callable[[World], Sides]


def _weighted(paths: Trajectories, weight: np.ndarray, advantage: AdvantageKind | Literal["outcome"]) -> np.ndarray:
    """(N, D) sum_t w_t A_t g_t, or with the outcome reward for A."""
    value = paths.returns[:, None] if advantage == "outcome" else paths.advantage(advantage)
    return paths.summed_scores(weight * value)


def _true_gradient(paths: Trajectories) -> np.ndarray:
    """Grad J by the score function, without any ratio."""
    return paths.expectation(paths.summed_scores(np.where(paths.mask, paths.returns[:, None], 0)), "target")


def _plain(vector: np.ndarray) -> Any:
    """A number, or a tuple of numbers."""
    return vector[0] if len(vector) == 1 else tuple(vector)


def _mean_and_gradient(level: str, advantage: AdvantageKind | Literal["outcome"]) -> tuple[Numbers, Numbers]:
    """Expected gradient under a weight, and grad J: by enumeration, and by dynamic programming or by ctpo's weights."""
    kind: AdvantageKind = "one" if advantage == "outcome" else advantage

    def sides(world: World) -> Sides:
        paths = enumerate_trajectories(world)
        mean = paths.expectation(_weighted(paths, rational_weights(paths, level), advantage))
        return _plain(mean), _plain(_true_gradient(paths))

    def again(world: World) -> Sides:
        if level in ("none", "token", "cumulative", "sequence"):
            mean = gradient_mean(world, level, kind, outcome=advantage == "outcome")
        else:
            unlimited: Any = {"form": "unclipped", "max_log_ratio": None, "max_token_log_ratio": None}
            estimator = ctpo.Estimator(level=level, **unlimited)  # type: ignore[arg-type]
            mean = estimator_moments(world, estimator, kind, outcome=advantage == "outcome").mean
        return _plain(mean), _plain(policy_gradient(world))

    return sides, again


def _clipped_mean_and_gradient(room: Fraction) -> tuple[Numbers, Numbers]:
    """The same for rho_t with A^pi, without the tokens that a window 1 -+ room clips."""

    def sides(world: World) -> Sides:
        paths = enumerate_trajectories(world)
        weight, advantage = rational_weights(paths, "cumulative"), paths.advantage("A_target")
        clipped = ((advantage > 0) & (weight > 1 + room)) | ((advantage < 0) & (weight < 1 - room))
        mean = paths.expectation(_weighted(paths, np.where(clipped, 0, weight), "A_target"))
        return _plain(mean), _plain(_true_gradient(paths))

    def again(world: World) -> Sides:
        window = ctpo.RatioClip(float(room), float(room))
        estimator = ctpo.Estimator(level="cumulative", clip=window, max_log_ratio=None, max_token_log_ratio=None)
        return _plain(estimator_moments(world, estimator).mean), _plain(policy_gradient(world))

    return sides, again


def _variances(
    advantage: AdvantageKind | Literal["outcome"], reduce: Callable[[np.ndarray], Any], first_term: bool = False
) -> tuple[Numbers, Numbers]:
    """A part of the covariance of the gradient under rho_t, and under rho_H: by enumeration, by dynamic programming.

    `reduce` takes the (D, D) covariance. `first_term` leaves the first token's term alone.
    """
    kind: AdvantageKind = "one" if advantage == "outcome" else advantage
    levels = ("cumulative", "sequence")

    def sides(world: World) -> Sides:
        paths = enumerate_trajectories(world)
        found = []
        for level in levels:
            weight = rational_weights(paths, level)
            if first_term:
                weight = np.where(np.arange(weight.shape[1]) == 0, weight, 0)
            covariance = paths.moments(_weighted(paths, weight, advantage), covariance=True).covariance
            assert covariance is not None
            found.append(reduce(covariance))
        return found[0], found[1]

    def again(world: World) -> Sides:
        found = []
        for level in levels:
            moments = gradient_moments(world, level, kind, outcome=advantage == "outcome", covariance=True)
            assert moments.covariance is not None
            found.append(reduce(moments.covariance))
        return found[0], found[1]

    return sides, again


def _spread(paths: Trajectories, values: np.ndarray) -> list[Fraction]:
    """Variance of each column of (N, H) values."""
    return list(paths.expectation(values**2) - paths.expectation(values) ** 2)


def _first_fall(values: Sequence[Any], slack: float = 0) -> Sides:
    """The first two neighbors of which the second is smaller, else the last two."""
    falls = [k for k in range(1, len(values)) if values[k] < values[k - 1] - slack]
    k = falls[0] if falls else len(values) - 1
    return values[k - 1], values[k]


def _ratio_variances(world: World) -> Sides:
    paths = enumerate_trajectories(world)
    return _first_fall(_spread(paths, paths.ratio.cumprod(axis=1)))


def _log_variances(world: World) -> Sides:
    paths = enumerate_trajectories(world)
    logs = paths.ratio.copy()
    logs.ravel()[:] = [Fraction(exact_log2(r)) for r in paths.ratio.ravel()]
    return _first_fall(_spread(paths, logs.cumsum(axis=1)))


def _log_variances_again(world: World) -> Sides:
    found = ratio_moments(world.as_float()).var_log
    assert found is not None
    return _first_fall(list(found[1:] / math.log(2) ** 2), slack=1e-9)


def _product(world: World) -> Sides:
    paths = enumerate_trajectories(world)
    return paths.expectation(paths.ratio.prod(axis=1) ** 2), paths.expectation(paths.ratio**2).prod()


def _product_again(world: World) -> Sides:
    moments = ratio_moments(world)
    return moments.second_moment[-1], (1 + moments.chi2_marginal).prod()


def _means(world: World) -> Sides:
    paths = enumerate_trajectories(world)
    found = paths.expectation(paths.ratio.cumprod(axis=1))
    return tuple(found), (Fraction(1),) * len(found)


def _means_again(world: World) -> Sides:
    found = ratio_moments(world).mean[1:]
    return tuple(found), (Fraction(1),) * len(found)


def _standardized(world: World) -> Sides:
    """Groups of two, advantages over the population standard deviation: A = +-1."""
    paths = enumerate_trajectories(world)
    sign = np.sign(paths.returns[:, None] - paths.returns[None, :])
    advantage = paths.expectation(sign.T)  # of each string against a random other one
    mean = paths.expectation(paths.summed_scores(np.where(paths.mask, advantage[:, None], 0)))
    return _plain(mean), _plain(_true_gradient(paths))


def _standardized_again(world: World) -> Sides:
    """With the advantages of ctpo, whose standard deviation is the sample's: sqrt(2) times that of the population."""
    paths = enumerate_trajectories(world)
    returns, probability = paths.returns.astype(float), paths.behavior_probability.astype(float)
    groups = np.stack(np.broadcast_arrays(returns[:, None], returns[None, :]), axis=-1)
    advantage = math.sqrt(2) * ctpo.group_relative(groups, scale_by_std=True, eps=1e-15)
    score = paths.summed_scores(as_numbers(paths.mask.astype(int), True)).astype(float)
    both = advantage[..., 0, None] * score[:, None] + advantage[..., 1, None] * score[None, :]
    mean = (probability[:, None, None] * probability[None, :, None] * both).sum(axis=(0, 1)) / 2
    return _plain(mean), _plain(policy_gradient(world))


def _by_length(world: World) -> Sides:
    """The gradient of a response's mean over its own tokens."""
    paths = enumerate_trajectories(world)
    share = paths.returns / paths.mask.sum(axis=1)
    mean = paths.expectation(paths.summed_scores(np.where(paths.mask, share[:, None], 0)))
    return _plain(mean), _plain(_true_gradient(paths))


def _by_length_again(world: World) -> Sides:
    """It is the gradient of another objective, the expected reward per token."""
    mdp = world.mdp
    outcome = mdp.outcome.copy()
    for s, label in enumerate(mdp.labels):
        outcome[s] = outcome[s] / max(1, len(literal_eval(label)))
    other = replace(world, mdp=replace(mdp, outcome=outcome))
    return _plain(policy_gradient(other)), _plain(policy_gradient(world))


def _of_first_logit(covariance: np.ndarray) -> Any:
    return covariance[0, 0]


# --- statements -----------------------------------------------------------------------------------------------------

_MEAN, _TRUE = "mean estimate", "grad J"
_PREFIX, _FULL = "variance under rho_t", "variance under rho_H"

STATEMENTS: dict[str, Statement] = {
    "summed_order": Statement(
        "The summed gradient with exact A^pi has less variance under rho_t than under rho_H.",
        False,
        _PREFIX,
        "<=",
        _FULL,
        Family("shared"),
        *_variances("A_target", np.trace),
    ),
    "direction_order": Statement(
        "With one logit per position that order holds in every direction; here (1, ..., 1).",
        False,
        _PREFIX,
        "<=",
        _FULL,
        Family("position"),
        *_variances("A_target", np.sum),
    ),
    "term_order_outcome": Statement(
        "With the outcome reward each single term has less variance under rho_t than under rho_H; here the first.",
        False,
        _PREFIX,
        "<=",
        _FULL,
        Family("position"),
        *_variances("outcome", _of_first_logit, first_term=True),
    ),
    "log_variance": Statement(
        "Var(log rho_t) never falls with t.",
        False,
        "Var(log2 rho_t)",
        "<=",
        "Var(log2 rho_t+1)",
        Family("prefix", "powers"),
        _log_variances,
        _log_variances_again,
    ),
    "product": Statement(
        "E rho_H^2 is the product of the tokens' 1 + chi2.",
        False,
        "E rho_H^2",
        "=",
        "product",
        Family("prefix"),
        _product,
        _product_again,
    ),
    "prefix_outcome": Statement(
        "rho_t with the outcome reward keeps the sign of the gradient.",
        False,
        _MEAN,
        "same sign",
        _TRUE,
        Family("shared"),
        *_mean_and_gradient("cumulative", "outcome"),
    ),
    "token": Statement(
        "The token ratio with exact A^pi keeps the sign of the gradient.",
        False,
        _MEAN,
        "same sign",
        _TRUE,
        Family("shared"),
        *_mean_and_gradient("token", "A_target"),
    ),
    "gspo": Statement(
        "The length-normalized ratio (GSPO) with exact A^pi keeps the sign of the gradient.",
        False,
        _MEAN,
        "same sign",
        _TRUE,
        Family("shared", "squares", longest=2),
        *_mean_and_gradient("sequence_mean", "A_target"),
    ),
    "cumulative_mean": Statement(
        "The prefix geometric mean rho_t^(1/t) with exact A^pi keeps the sign of the gradient.",
        False,
        _MEAN,
        "same sign",
        _TRUE,
        Family("shared", "squares", longest=2),
        *_mean_and_gradient("cumulative_mean", "A_target"),
    ),
    "clip": Statement(
        "Clipping rho_t to [7/10, 13/10] (PPO) with exact A^pi keeps the sign of the gradient.",
        False,
        _MEAN,
        "same sign",
        _TRUE,
        Family("shared"),
        *_clipped_mean_and_gradient(Fraction(3, 10)),
    ),
    "standardized": Statement(
        "On-policy groups of two over their standard deviation (GRPO) keep the sign of the gradient.",
        False,
        _MEAN,
        "same sign",
        _TRUE,
        Family("shared", "equal"),
        _standardized,
        _standardized_again,
    ),
    "length": Statement(
        "On-policy, the mean over a response's own tokens (1/|o|) keeps the sign of the gradient.",
        False,
        _MEAN,
        "same sign",
        _TRUE,
        Family("shared", "equal", eos=True),
        _by_length,
        _by_length_again,
    ),
    "martingale": Statement(
        "E_b rho_t = 1 for every t.", True, "E rho_t", "=", "1", Family("prefix"), _means, _means_again
    ),
    "variance": Statement(
        "Var(rho_t) never falls with t.",
        True,
        "Var(rho_t)",
        "<=",
        "Var(rho_t+1)",
        Family("prefix"),
        _ratio_variances,
        lambda world: _first_fall(list(ratio_moments(world).variance[1:])),
    ),
    "prop1": Statement(
        "rho_t with exact A^pi gives the gradient.",
        True,
        _MEAN,
        "=",
        _TRUE,
        Family("prefix"),
        *_mean_and_gradient("cumulative", "A_target"),
    ),
    "sequence_outcome": Statement(
        "rho_H with the outcome reward gives the gradient.",
        True,
        _MEAN,
        "=",
        _TRUE,
        Family("shared"),
        *_mean_and_gradient("sequence", "outcome"),
    ),
    "trace_order_prefix": Statement(
        "With one logit per prefix the summed gradient has less total variance under rho_t than under rho_H.",
        True,
        _PREFIX,
        "<=",
        _FULL,
        Family("prefix"),
        *_variances("A_target", np.trace),
    ),
    "trace_order_position": Statement(
        "With one logit per position the summed gradient has less total variance under rho_t than under rho_H.",
        True,
        _PREFIX,
        "<=",
        _FULL,
        Family("position"),
        *_variances("A_target", np.trace),
    ),
    "term_order": Statement(
        "With exact A^pi each single term has less variance under rho_t than under rho_H; here the first.",
        True,
        _PREFIX,
        "<=",
        _FULL,
        Family("position"),
        *_variances("A_target", _of_first_logit, first_term=True),
    ),
}


# --- the search -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a search came to: the shrunk counterexample, if any, and how many different worlds were tried."""

    example: SmallWorld | None
    tried: int


def search(statement: Statement, *, seed: int = 0, examples: int = 200) -> Found:
    """The smallest counterexample that Hypothesis finds and shrinks; needs the package `hypothesis`.

    Args:
        statement: What to break.
        seed: Of the proposals; the same seed gives the same answer.
        examples: Worlds that are proposed at each size, at most; shrinking tries some more.
    """
    import hypothesis

    settings = hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )
    known: dict[SmallWorld, bool] = {}

    def broken(small: SmallWorld) -> bool:
        if small not in known:
            known[small] = statement.broken(small.world())
        return known[small]

    for size in SIZES:
        if size.horizon > statement.family.longest:
            continue
        try:
            found = hypothesis.find(
                _small_worlds(statement.family, size), broken, settings=settings, random=random.Random(seed)
            )
        except hypothesis.errors.NoSuchExample:
            continue
        return Found(found, len(known))
    return Found(None, len(known))


def _small_worlds(family: Family, size: Size) -> Any:
    """A Hypothesis strategy: simpler worlds come from fewer and smaller choices."""
    from hypothesis import strategies

    @strategies.composite
    def worlds(draw: Callable[[Any], bool]) -> SmallWorld:
        def choose(options: Sequence[Any]) -> Any:
            # In binary digits, as integers would be mixed with numbers from the source code of the modules at hand.
            place = 0
            for _ in range((len(options) - 1).bit_length()):
                place = 2 * place + draw(strategies.booleans())
            return options[place % len(options)]

        rewards = [0] * len(strings(family, size.horizon))
        for _ in range(size.rewarded):
            rewards[choose(range(len(rewards)))] = choose(size.rewards)
        options = probability_pairs(family, size.denominator)
        pairs = tuple(choose(options) for _ in places(family, size.horizon))
        return SmallWorld(family, size.horizon, pairs, tuple(rewards))

    return worlds()


# --- the study ------------------------------------------------------------------------------------------------------


def tasks(seed: int, quick: bool) -> dict[str, dict[str, Any]]:
    """One search for each statement."""
    return {name: {"name": name, "seed": seed, "examples": 50 if quick else 300} for name in STATEMENTS}


def one(name: str, seed: int, examples: int) -> dict[str, Any]:
    """Search for a counterexample to a statement; JSON-ready."""
    statement = STATEMENTS[name]
    found = search(statement, seed=seed, examples=examples)
    return {
        "statement": statement.text,
        "holds": statement.holds,
        "tried": found.tried,
        "as_expected": (found.example is None) is statement.holds,
        "counterexample": None if found.example is None else describe(statement, found.example),
    }


def describe(statement: Statement, example: SmallWorld) -> dict[str, Any]:
    """A counterexample in strings of fractions: the world and the numbers compared; JSON-ready.

    Raises:
        ArithmeticError: Another engine gives other numbers.
    """
    world = example.world()
    if not statement.confirmed(world):
        raise ArithmeticError(
            f"{statement.text} {statement.sides(world)} by enumeration, {statement.again(world)} by another engine"
        )
    left, right = (", ".join(map(str, _tuple(side))) for side in statement.sides(world))
    return {
        **example.describe(),
        "left": {"what": statement.left, "value": left},
        "relation": statement.relation,
        "right": {"what": statement.right, "value": right},
    }


def in_words(counterexample: Mapping[str, Any]) -> dict[str, str]:
    """World and numbers of a counterexample from `describe`, for reading."""
    policies = []
    for place, one in counterexample["policies"].items():
        b, p = one["b(1)"], one["pi(1)"]
        policies.append(f"{place}: " + (f"b(1) = pi(1) = {b}" if b == p else f"b(1) = {b}, pi(1) = {p}"))
    rewards = [f"R({string}) = {reward}" for string, reward in counterexample["rewards"].items()]
    left, right = counterexample["left"], counterexample["right"]
    return {
        "world": "; ".join(policies) + "; " + (", ".join([*rewards, "else 0"]) if rewards else "no rewards"),
        "found": f"{left['what']} {left['value']}, {right['what']} {right['value']}",
    }


def summary(done: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The counterexamples, and the statements for which none was found."""
    broken = [
        {"name": name.replace("_", " "), "statement": result["statement"], **in_words(result["counterexample"])}
        for name, result in done.items()
        if result["counterexample"] is not None
    ]
    unbroken = [
        {
            "name": name.replace("_", " "),
            "statement": result["statement"],
            "theorem": "yes" if result["holds"] else "NO",
            "worlds tried": result["tried"],
        }
        for name, result in done.items()
        if result["counterexample"] is None
    ]
    return {
        "as_expected": all(result["as_expected"] for result in done.values()),
        "statements": dict(done),
        "tables": [
            {
                "title": "Statements that fail, each in the smallest world found",
                "note": "two tokens, one logit shared where the world says every token, else one per place; exact, by "
                "enumeration, and confirmed by a second computation",
                "rows": broken,
            },
            {
                "title": "Statements that the search could not break",
                "note": "that nothing was found proves nothing; the theorems do",
                "rows": unbroken,
            },
        ],
    }


STUDY = Study(
    name="search",
    question="What is the smallest world in which each false statement about importance ratios fails?",
    tasks=tasks,
    one=one,
    summary=summary,
)
