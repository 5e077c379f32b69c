"""Claim 13: ratios of sequences that the target was trained on, and several epochs against more mini-batches.

The behavior policy is a softmax on a tree of two tokens with one logit for each block of parameters. An update moves
its logits along sum_i A_i grad log b(response i); with steps in units of log 2 and integer exponents every
probability after it is a fraction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, partial
from itertools import product
from typing import Any, Literal, get_args

import numpy as np
from scipy.stats import binom

import ctpo
from ctpo.diagnostics import fit_spread
from simulations.claims.effective_sample_size import SIGMAS
from simulations.claims.registry import Claim, Context, Evidence
from simulations.claims.worlds import HALF, known, listed
from simulations.exact import Trajectories, enumerate_trajectories, policy_gradient, summed_scores
from simulations.mdp import Parameters, World, one_logit, policy_table, tree
from simulations.monte_carlo import z_threshold

#: Whose ratio is judged: that of the response the update was made from, of another response of its group, or of one
#: that was drawn afterwards.
Judged = Literal["own", "same group", "fresh"]
Advantages = Callable[[np.ndarray], np.ndarray]


def raw(returns: np.ndarray) -> np.ndarray:
    """A = R."""
    return returns


def group_mean(returns: np.ndarray) -> np.ndarray:
    """A = R minus the mean of the group."""
    return returns - returns.sum() / len(returns)


def leave_one_out(returns: np.ndarray) -> np.ndarray:
    """A = R minus the mean of the others of the group."""
    return returns - (returns.sum() - returns) / (len(returns) - 1)


def group_std(returns: np.ndarray) -> np.ndarray:
    """A = R minus the group's mean, over its standard deviation (n - 1); 0 where all are equal."""
    deviation = returns - returns.mean()
    spread = math.sqrt(float((deviation**2).sum()) / (len(returns) - 1))
    return deviation / spread if spread > 0 else 0 * deviation


def binary_tree(
    horizon: int,
    one: Callable[[tuple[int, ...]], Fraction],
    reward: Callable[[tuple[int, ...]], Any],
    parameters: Parameters = "prefix",
) -> World:
    """A world whose target is its behavior; `one` is b(1) after a prefix."""
    mdp = tree(2, horizon, outcome=reward)
    policy = policy_table(mdp, lambda prefix: [1 - one(prefix), one(prefix)])
    return World(mdp, policy, policy, parameters)


@dataclass(frozen=True)
class Update:
    """One policy-gradient update of a behavior policy, made from responses of a group that it sampled.

    Attributes:
        world: Behavior policy, rewards and the sharing of parameters.
        step: Learning rate in units of log 2.
        size: Responses in the group.
        trained: Which of them the update uses.
        advantages: From their returns (G,) to their advantages.
    """

    world: World
    step: Any
    size: int = 1
    trained: tuple[int, ...] = (0,)
    advantages: Advantages = raw

    @cached_property
    def paths(self) -> Trajectories:
        """Every response of the behavior policy."""
        return enumerate_trajectories(one_logit(self.world))

    @cached_property
    def scores(self) -> np.ndarray:
        """(N, D) sum over its tokens of grad log b."""
        return self.paths.summed_scores(self.paths.behavior * 0 + 1)

    @cached_property
    def groups(self) -> list[tuple[Any, tuple[int, ...], np.ndarray]]:
        """Every group: its probability, its trajectories and the sum of A_i grad log b over those trained on."""
        found = []
        for group in product(range(len(self.scores)), repeat=self.size):
            chosen = list(group)
            advantage = self.advantages(self.paths.returns[chosen])
            direction = sum(advantage[i] * self.scores[group[i]] for i in self.trained)
            found.append((self.paths.behavior_probability[chosen].prod(), group, np.asarray(direction)))
        return found

    def target(self, direction: np.ndarray) -> np.ndarray:
        """(S, A) policy after a step along a direction (D,).

        Raises:
            ValueError: The world is exact and the step takes a probability out of the fractions.
        """
        scores = self.paths.world.local_scores
        exponent = (scores - scores[:, :1]) @ (self.step * direction)
        if self.world.exact:
            if any(value.denominator != 1 for value in exponent.flat):
                raise ValueError(f"step: must move logits by whole multiples of log 2 in exact worlds, got {self.step}")
            exponent = np.array([Fraction(2) ** int(value) for value in exponent.flat]).reshape(exponent.shape)
        else:
            exponent = np.exp2(exponent)
        weight = self.world.behavior * exponent
        return weight / np.where(self.world.mdp.policy_states, weight.sum(axis=1), 1)[:, None]

    def judged(self, group: tuple[int, ...], judged: Judged) -> int | None:
        """The trajectory whose ratio is judged; None for one drawn afterwards."""
        if judged == "fresh":
            return None
        return group[next(i for i in range(self.size) if (i in self.trained) == (judged == "own"))]

    def expectation(self, judged: Judged, values: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """E of a function of target and judged response, given as (N, ...) values for a target."""
        known: dict[tuple[Any, ...], np.ndarray] = {}
        total: Any = 0
        for probability, group, direction in self.groups:
            key, row = tuple(direction), self.judged(group, judged)
            if key not in known:
                known[key] = values(self.target(direction))
            total = total + probability * (self.paths.expectation(known[key]) if row is None else known[key][row])
        return np.asarray(total)

    def cumulative(self, target: np.ndarray) -> np.ndarray:
        """(N, H) rho_t of every response under a target."""
        return (target[self.paths.states, self.paths.actions] / self.paths.behavior).cumprod(axis=1)

    def gradient_error(self, target: np.ndarray) -> np.ndarray:
        """(N, D) rho_H R sum_t g_t, scores at the target, minus the target's policy gradient."""
        world = one_logit(replace(self.world, target=target))
        weight = self.cumulative(target)[:, -1:] * self.paths.returns[:, None]
        found = summed_scores(world, self.paths.states, self.paths.actions, weight + 0 * self.paths.behavior)
        return found - policy_gradient(world)


def mean_ratio(update: Update, judged: Judged) -> list[Any]:
    """E rho_t for every t, over the groups and, for a fresh response, over it too."""
    return list(update.expectation(judged, update.cumulative))


def gradient_bias(update: Update, judged: Judged) -> np.ndarray:
    """(D,) bias of rho_H R sum_t g_t, which is unbiased for grad J of a target fixed before."""
    return update.expectation(judged, update.gradient_error)


def first_order(update: Update, judged: Judged) -> Any:
    """Derivative of E rho_H in the step size, nats, at 0: E of the update's direction times the judged score."""
    total: Any = 0
    for probability, group, direction in update.groups:
        row = update.judged(group, judged)
        if row is not None:
            total = total + probability * (direction * update.scores[row]).sum()
    return total


def random_updates(context: Context, name: str, count: int, **changes: Any) -> Iterator[Update]:
    """Updates on random two-token trees with b(1) in {1/3, 1/2, 2/3}, rewards 0, 1, 2 and all sharings."""
    rng = context.rng(name)
    sharing = get_args(Parameters)
    for k in range(context.count(count)):
        parameters = sharing[k % len(sharing)]
        odds = [Fraction(int(n), 6) for n in rng.integers(2, 5, size=3)]
        # b(1) may differ by prefix, by position, or not at all.
        places = {"prefix": (0, 1, 2), "position": (0, 1, 1), "shared": (0, 0, 0)}[parameters]
        rewards = [int(r) for r in rng.permutation([0, 1, 2, int(rng.integers(3))])]
        one, reward = partial(_entry, [odds[k] for k in places]), partial(_entry, [0, *rewards[:2], *rewards])
        yield Update(binary_tree(2, one, reward, parameters), Fraction(12), **changes)


def _entry(table: Sequence[Any], string: tuple[int, ...]) -> Any:
    """The entry of a string of up to two tokens in a table ordered by length, then tokens."""
    return table[(0, 1, 3)[len(string)] + int("".join(map(str, string)) or "0", 2)]


def coin(one: Fraction, reward: Callable[[int], Any]) -> World:
    """A bandit of two tokens."""
    return binary_tree(1, lambda _prefix: one, lambda string: reward(string[0]))


# --- 13.own, 13.independent -------------------------------------------------------------------------------------------


def check_own(context: Context, judged: Judged) -> Iterator[Evidence]:
    """E rho is not 1 over the sequences that the target was trained on, and the weighted gradient is biased."""
    fair = coin(HALF, lambda _a: 1), coin(HALF, lambda a: a), coin(HALF, lambda _a: -1)
    means = [mean_ratio(Update(world, Fraction(2)), judged)[0] for world in fair]
    bias = gradient_bias(Update(fair[1], Fraction(2)), judged)[0]
    yield Evidence(
        "one fair coin toss, one step of log 2 along A g on it: E rho for R = 1, R = a, R = -1; bias of rho R g, R = a",
        "enumeration",
        f"fair coin: E rho = {listed(means)} for R = 1, a, -1 after one step on the toss itself; bias of the "
        f"weighted gradient {bias}",
        [*means, bias] == known("trained_coin"),
        {"means": [str(m) for m in means], "bias": str(bias)},
    )
    worlds = [
        binary_tree(2, lambda _p: HALF, reward)
        for reward in (lambda _s: 1, lambda s: s[0] * s[1], lambda s: sum(s) - 1)
    ]
    found = [mean_ratio(Update(world, Fraction(2)), judged) for world in worlds]
    yield Evidence(
        "two fair tokens, the same step: E rho_1, E rho_2 for R = 1, R = a1 a2, R = a1 + a2 - 1",
        "enumeration",
        f"two fair tokens: E rho_t = {'; '.join(map(listed, found))} at t = 1, 2 for R = 1, a1 a2, a1 + a2 - 1",
        [value for row in found for value in row] == known("trained_pair"),
        {"means": [[str(m) for m in row] for row in found]},
    )
    count, off, biased = 0, 0, 0
    for update in random_updates(context, "own", 24):
        count += 1
        off += mean_ratio(update, judged)[-1] != 1
        biased += bool((gradient_bias(update, judged) != 0).any())
    yield Evidence(
        "random two-token trees, one step on the response itself: E rho_2 and the bias of rho_2 R sum g",
        "enumeration",
        f"E rho_2 is not 1 on {off}, the weighted gradient biased on {biased} of {count} random trees",
        off > count // 2 and biased > count // 2,
        {"worlds": count, "not_one": off, "biased": biased},
    )


def check_independent(context: Context, judged: Judged) -> Iterator[Evidence]:
    """Over sequences that nothing of the update has seen, E rho_t = 1 and the weighted gradient is unbiased."""
    count = ones = unbiased = 0
    for size, advantages in ((1, raw), (2, group_mean)):
        for update in random_updates(context, f"independent {size}", 12, size=size, advantages=advantages):
            count += 1
            ones += all(m == 1 for m in mean_ratio(update, judged))
            unbiased += bool((gradient_bias(update, judged) == 0).all())
    yield Evidence(
        "random two-token trees, one step on one response, or on one of a group of two; another response is judged: "
        "E rho_t = 1 and E[rho_2 R sum g] = E grad J, as fractions",
        "enumeration",
        f"E rho_t = 1 on {ones}, gradient unbiased on {unbiased} of {count} random trees",
        ones == unbiased == count,
        {"worlds": count, "ones": ones, "unbiased": unbiased},
    )


# --- 13.group ---------------------------------------------------------------------------------------------------------


def check_group(context: Context, judged: Judged) -> Iterator[Evidence]:
    """Group-relative advantages couple the responses of a group: to second order in the step, with std to first."""
    pair = Update(coin(Fraction(1, 3), lambda a: a), Fraction(12), size=2, advantages=group_mean)
    found, own = mean_ratio(pair, judged)[0], mean_ratio(pair, "own")[0]
    yield Evidence(
        "b(1) = 1/3, R = a, group of two, step 12 log 2 on one response: E rho of the other, and of the one itself",
        "enumeration",
        f"E rho = {found} on the other response of the group, {own} on the response itself",
        [found, own] == known("trained_group"),
        {"same_group": str(found), "own": str(own)},
    )
    count = zero = moving = 0
    for size in (2, 3):
        for advantages in (group_mean, leave_one_out):
            for update in random_updates(context, f"slope {size}", 8, size=size, advantages=advantages):
                count += 1
                zero += first_order(update, judged) == 0
                moving += first_order(update, "own") != 0
    yield Evidence(
        "derivative of E rho_2 in the step size, groups of 2 and 3, advantages relative to the mean or to the others: "
        "on another response of the group, as fractions",
        "enumeration",
        f"0 on {zero} of {count} random trees; on the response itself not 0 on {moving}",
        zero == count and moving > count // 2,
        {"cases": count, "zero": zero, "own_not_zero": moving},
    )
    gaps = []
    for step in (0.02, 0.01):
        small = replace(pair, world=pair.world.as_float(), step=step)
        gaps.append([mean_ratio(small, who)[0] - 1 for who in (judged, "own")])
    rates = [math.log2(abs(a / b)) if b else 0.0 for a, b in zip(*gaps, strict=True)]
    yield Evidence(
        "the same pair at small steps: power of the step size by which E rho - 1 vanishes",
        "enumeration",
        f"E rho - 1 vanishes like the step to the power {rates[0]:.3f} on the other response, {rates[1]:.3f} on the "
        "response itself",
        abs(rates[0] - 2) < 0.02 and abs(rates[1] - 1) < 0.02,
        {"powers": rates},
    )
    four = Update(coin(Fraction(3, 10), lambda a: a).as_float(), 0.0, size=4, advantages=group_std)
    share = first_order(four, judged) / first_order(four, "own")
    yield Evidence(
        "b(1) = 3/10, R = a, group of four, advantages over the group's standard deviation: derivative on another "
        "response over that on the response itself",
        "enumeration",
        f"with the standard deviation of a group of four the derivative is {share:.3f} of that on the response itself",
        -0.1 < share < -0.01,
        {"share": float(share)},
    )


# --- 13.spread: one sequence of t independent tokens ------------------------------------------------------------------


def steps_up(update: Update, judged: Judged) -> list[tuple[Any, np.ndarray]]:
    """Law of the judged response's ratios in a world whose every ratio is 2/3 or 4/3: 0 or 1 for each token."""
    found = []
    for probability, group, direction in update.groups:
        ratio = update.target(direction)[update.paths.states, update.paths.actions] / update.paths.behavior
        up = np.array([[{Fraction(2, 3): 0, Fraction(4, 3): 1}[r] for r in row] for row in ratio])
        row = update.judged(group, judged)
        if row is None:
            found += [(probability * p, u) for p, u in zip(update.paths.behavior_probability, up, strict=True)]
        else:
            found.append((probability, up[row]))
    return found


def check_spread(context: Context, judged: Judged) -> Iterator[Evidence]:
    """The same token ratios spread like t over the sequence trained on, like sqrt(t) over a fresh one."""
    horizon = 4
    world = binary_tree(horizon, lambda _p: HALF, lambda string: 2 * string[-1] - 1, "position")
    update = Update(world, Fraction(2))
    subjects: dict[str, Judged] = {"own": judged, "fresh": "fresh"}
    variance, token, mean = {}, {}, {}
    for who in subjects:
        taken = subjects[who]
        law = steps_up(update, taken)
        weight = np.array([p for p, _ in law])[:, None]
        up = np.array([u for _, u in law])
        variance[who], token[who] = (
            list((weight * x**2).sum(axis=0) - (weight * x).sum(axis=0) ** 2) for x in (up.cumsum(axis=1), up)
        )
        mean[who] = mean_ratio(update, taken)
    yield Evidence(
        "fair independent tokens, one logit for each position, reward +1 or -1, a step that makes every token ratio "
        "4/3 or 2/3, each half of the time: Var(log2 rho_t) and E rho_t for t = 1..4, trained on and fresh",
        "enumeration",
        f"Var(log2 rho_t) = {listed(variance['own'])} trained on, {listed(variance['fresh'])} fresh; of one token 1/4 "
        f"in both; E rho_t = {listed(mean['own'])} and {listed(mean['fresh'])}",
        [*variance["own"], *variance["fresh"], *mean["own"], *mean["fresh"]] == known("trained_spread")
        and token["own"] == token["fresh"] == [Fraction(1, 4)] * horizon,
        {who: {"variance": [str(v) for v in variance[who]], "mean": [str(m) for m in mean[who]]} for who in variance},
    )
    n, length, rng = context.count(2400), 64, context.rng("trained-on spread")
    limit = z_threshold(2)
    fits = {}
    for who, taken in subjects.items():
        sign = rng.choice([-1, 1], size=(n, 1))
        matched = np.ones((n, length)) if taken == "own" else rng.choice([-1, 1], size=(n, length))
        log_ratio = -np.log1p(np.exp(-TOKEN_STEP * sign * matched)) + math.log(2)
        fits[who] = fit_spread(log_ratio + math.log(0.5), np.full((n, length), math.log(0.5)), seed=0)
    yield Evidence(
        f"the same model at a token spread of {TOKEN_STEP / 2:g}, n = {n} sequences of {length}: power and "
        "Var(log rho_T) / sum of token variances by ctpo.diagnostics.fit_spread, trained on and fresh",
        "Monte Carlo",
        f"trained on: power {fits['own'].power:.3f}, variance ratio {fits['own'].variance_ratio:.1f}; fresh: power "
        f"{fits['fresh'].power:.3f}, variance ratio {fits['fresh'].variance_ratio:.2f}",
        bool(
            abs(fits["own"].power - 1) < 0.01
            and abs(fits["own"].variance_ratio - length) < 1e-6
            and abs(fits["fresh"].power - 0.5) < limit * fits["fresh"].power_se
            and abs(fits["fresh"].variance_ratio - 1) < limit * fits["fresh"].variance_ratio_se
        ),
        {who: {"power": fit.power, "variance_ratio": fit.variance_ratio} for who, fit in fits.items()},
    )


# --- 13.window --------------------------------------------------------------------------------------------------------

#: Step of a logit after which a fair token's log-ratio has half of this standard deviation: the paper's at step 50.
TOKEN_STEP = 2 * SIGMAS[0]


def clip_rates(judged: Judged, at: np.ndarray, drift: float = 0.0) -> np.ndarray:
    """Share of tokens at each position that the paper's window clips, half with A = +1 and half with A = -1."""
    up, down = (math.log(2) - np.log1p(np.exp(-sign * TOKEN_STEP)) for sign in (1, -1))
    low, high, _ = ctpo.PositionClip(dual=None, drift=drift).bounds(at.astype(float))
    if judged == "own":
        return (np.asarray(at * up > high, dtype=float) + (at * down < low)) / 2
    # k tokens up and t - k down; k is binomial.
    beyond = (np.asarray([low, high]) - at * down) / (up - down)
    return (binom.cdf(np.ceil(beyond[0]) - 1, at, 0.5) + binom.sf(np.floor(beyond[1]), at, 0.5)) / 2


def check_window(_context: Context, judged: Judged) -> Iterator[Evidence]:
    """The sqrt(t) window cuts whole sequences by the sign of their advantage if the target was trained on them."""
    at = np.array([1, 3, 10, 100, 1000, 8000])
    drift = float(-(math.log(2) - np.log1p(np.exp([TOKEN_STEP, -TOKEN_STEP]))).mean())
    own, fresh = clip_rates(judged, at), clip_rates("fresh", at)
    centered = clip_rates(judged, at, drift), clip_rates("fresh", at, drift)
    yield Evidence(
        f"fair independent tokens, one logit for each position, token spread {TOKEN_STEP / 2:g}, one step, A = +-1: "
        "share clipped by the paper's window at t = 1, 3, 10, 100, 1000, 8000, trained on and fresh; the same with the "
        "window centered on the drift",
        "closed form",
        f"clipped {listed(own)} trained on, {listed(fresh)} fresh; centered {listed(centered[0])} and "
        f"{listed(centered[1])}",
        bool(
            (own[1:] == 1).all()
            and (centered[0][1:] == 1).all()
            and np.allclose(fresh[-3:], [0.165, 0.218, 0.388], atol=0.012)
            and centered[1].max() < 0.3
        ),
        {"t": at.tolist(), "own": own.tolist(), "fresh": fresh.tolist(), "centered": [c.tolist() for c in centered]},
    )


# --- 13.epochs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossTerms:
    """What each update of a schedule finds, by enumeration of all samples.

    Attributes:
        mean: E rho_H of the response that an update uses, under the policy that the update finds.
        relative_bias: Norm of the bias of its rho_H A sum_t g_t over the norm of the mean policy gradient.
    """

    mean: list[float]
    relative_bias: list[float]


def loss_terms(world: World, order: Sequence[int], step: float, advantages: Advantages, size: int) -> LossTerms:
    """Follow a schedule of updates, each on one sampled response, for every possible sample at once.

    Args:
        world: Two tokens, one logit for each prefix.
        order: The response that each update uses.
        step: Learning rate, nats, of theta += step A sum_t grad log pi, the policy being the current one.
        advantages: From the returns (size,) of all responses to their advantages.
        size: Responses sampled.
    """
    paths = enumerate_trajectories(one_logit(world.as_float()))
    states, actions, returns = paths.states, paths.actions, paths.returns
    samples = np.array(list(product(range(len(returns)), repeat=size)))
    weight = paths.behavior_probability[samples].prod(axis=1)
    advantage = np.array([advantages(row) for row in returns[samples]])
    one = np.where(world.mdp.policy_states, world.behavior[:, 1].astype(float), 0.5)
    start = np.log(one) - np.log1p(-one)
    logits = np.tile(start, (len(samples), 1))
    every = np.arange(len(samples))
    result = LossTerms([], [])
    for used in order:
        p = 1 / (1 + np.exp(-logits))
        # (M, N): probability of every response; (M, N, S): its score.
        chosen = np.where(actions == 1, p[:, states], 1 - p[:, states]).prod(axis=2)
        score = np.zeros((*chosen.shape, p.shape[1]))
        for h in range(states.shape[1]):
            score[:, np.arange(len(states)), states[:, h]] += actions[:, h] - p[:, states[:, h]]
        truth = np.einsum("mn,n,mns->ms", chosen, returns, score)
        own = samples[:, used]
        rho = chosen[every, own] / paths.behavior_probability[own]
        estimate = (rho * advantage[:, used])[:, None] * score[every, own]
        mean_truth = weight @ truth
        result.mean.append(float(weight @ rho))
        result.relative_bias.append(float(np.linalg.norm(weight @ estimate - mean_truth) / np.linalg.norm(mean_truth)))
        logits = logits + step * advantage[:, used, None] * score[every, own]
    return result


def spread_of_loss_terms(updates: int, length: int, epochs: bool) -> float:
    """Standard deviation of log rho_T of the response that the last of some updates uses.

    Fair independent tokens, one logit for each position, advantages +-1 that say nothing about the tokens; the step
    is that of `TOKEN_STEP`. Epochs: every update used this response; else each used one of its own.
    """
    step, before = 2 * TOKEN_STEP, updates - 1
    if epochs:
        ends = []
        for sign in (1.0, -1.0):
            logit = 0.0  # of the token that was drawn
            for _ in range(before):
                logit += step * sign / (1 + math.exp(logit))
            ends.append(math.log(2) - math.log1p(math.exp(-logit)))
        return length * abs(ends[0] - ends[1]) / 2
    drawn = np.array(list(product((0, 1), repeat=before)), dtype=float).reshape(2**before, before)
    means, variances = [], []
    # The advantages are shared by all positions, given which these are independent.
    for signs in product((1.0, -1.0), repeat=before):
        logits = np.zeros(len(drawn))
        for j, sign in enumerate(signs):
            logits += step * sign * (drawn[:, j] - 1 / (1 + np.exp(-logits)))
        values = math.log(2) - np.log1p(np.exp(np.concatenate([logits, -logits])))
        means.append(values.mean())
        variances.append(values.var())
    return math.sqrt(length * float(np.mean(variances)) + length**2 * float(np.var(means)))


def disjoint(updates: int) -> list[int]:
    """Each update on a response of its own."""
    return list(range(updates))


def repeated(updates: int) -> list[int]:
    """Every update on the same response."""
    return [0] * updates


def check_epochs(_context: Context, schedule: Callable[[int], list[int]]) -> Iterator[Evidence]:
    """At equal numbers of updates, epochs make loss terms biased that disjoint mini-batches leave exact."""
    world = binary_tree(2, lambda p: Fraction(1 + len(p), 4), lambda s: s[0] * s[1])
    baseline = float((enumerate_trajectories(world).behavior_probability * enumerate_trajectories(world).returns).sum())
    again, apart = (
        loss_terms(world, order(4), 1.0, lambda returns: returns - baseline, 4) for order in (schedule, disjoint)
    )
    yield Evidence(
        "two tokens, b(1) = 1/4 then 1/2, R = a1 a2, A = R - J(b), learning rate 1: E rho_2 and relative bias of "
        "rho_2 A sum g of the response that update 1, 2, 3, 4 uses; the same response each time, and a new one",
        "enumeration",
        f"the same response again: E rho {listed(again.mean)}, bias {listed(again.relative_bias)} of the gradient; "
        f"disjoint: E rho off 1 by {max(abs(m - 1) for m in apart.mean):.0e}, bias {max(apart.relative_bias):.0e}",
        max(abs(m - 1) for m in apart.mean) < 1e-12
        and max(apart.relative_bias) < 1e-12
        and all(b > a for a, b in zip(again.mean, again.mean[1:], strict=False))
        and again.mean[-1] > 1.2,
        {"repeated": vars(again), "disjoint": vars(apart)},
    )
    coupled, same = (loss_terms(world, order(4), 1.0, group_mean, 4) for order in (disjoint, schedule))
    off = [abs(x.mean[-1] - 1) for x in (same, coupled)]
    yield Evidence(
        "the same with advantages relative to the mean of the responses: a group of four, each in a mini-batch of its "
        "own, and one of the four again and again",
        "enumeration",
        f"disjoint within the group: E rho at update 4 {coupled.mean[-1]:.4f}, at most {max(coupled.mean):.4f}; "
        f"the same response again: {same.mean[-1]:.4f}",
        off[0] > 4 * off[1] > 0,
        {"repeated": vars(same), "disjoint": vars(coupled)},
    )
    counts, length = (2, 4, 8), 128
    spreads = [
        [spread_of_loss_terms(k, length, epochs) for k in counts] for epochs in (schedule(2) == repeated(2), False)
    ]
    yield Evidence(
        f"fair independent tokens, one logit for each position, first step of token spread {TOKEN_STEP / 2:g}: "
        f"standard deviation of log rho_{length} of the response that update 2, 4, 8 uses, the same or a new one each "
        "time",
        "enumeration",
        f"std of log rho_{length} at update 2, 4, 8: {listed(spreads[0])} repeated, {listed(spreads[1])} disjoint",
        all(a > 5 * b for a, b in zip(*spreads, strict=True)),
        {"updates": list(counts), "repeated": spreads[0], "disjoint": spreads[1]},
    )


CLAIMS = (
    Claim(
        "13.own",
        "Ratios of sequences that the target was trained on are importance ratios: E rho_t = 1.",
        "false",
        "the target is a function of the sequence; one fair coin toss, reward 1 and a step of log 2: E rho = 4/3",
        "how ratios are used from the second epoch on",
        check_own,
        "own",
        "fresh",
        "a sequence drawn after the update",
        "From the second epoch on do not read rho_t as an importance weight: neither its mean of 1 nor the "
        "unbiasedness of estimators built on it holds in general.",
    ),
    Claim(
        "13.independent",
        "Over sequences that no update has seen E rho_t = 1 and importance-weighted gradients are unbiased, however "
        "far the target was trained.",
        "true if",
        "nothing of the sequence, its reward included, entered an update",
        "claims 1 and 3 given the update",
        check_independent,
        "fresh",
        "own",
        "the sequence that the update was made from",
        "Measure spread, drift and effective sample size on held-out sequences; there they mean what the theory says.",
    ),
    Claim(
        "13.group",
        "With group-relative advantages the ratio of a response is an importance ratio if only other responses of its "
        "group were trained on.",
        "false",
        "its reward is in their advantages: E rho = 28/27 in a group of two; the error is of second order in the step "
        "(for the trained-on response itself of first), but of first order if advantages are divided by the standard "
        "deviation in groups of four",
        "one pass over mini-batches that split groups",
        check_group,
        "same group",
        "fresh",
        "a response drawn after the update",
        "Keep a prompt's whole group in one mini-batch, or accept a coupling that is small beside that of a second "
        "epoch.",
    ),
    Claim(
        "13.spread",
        "log rho_t spreads like t over the sequence trained on and like sqrt(t) over fresh ones, although each token's "
        "log-ratio has the same distribution.",
        "true if",
        "fair independent tokens with a logit for each position: an extreme case, in which the update moves every "
        "token of the sequence by the same amount",
        "theory, section 13",
        check_spread,
        "own",
        "fresh",
        "a fresh sequence in place of the one trained on",
        "A spread that grows faster than sqrt(t) can come from reused sequences; the spread of single tokens cannot "
        "show it.",
    ),
    Claim(
        "13.window",
        "A window that widens like sqrt(t) clips reused sequences at the rate at which it clips fresh ones.",
        "false",
        "log rho_t grows like t with the sign of the advantage: in the model of 13.spread every token from the third "
        "on is clipped, also by a window centered on the drift",
        "section 3.3 applied to several epochs",
        check_window,
        "own",
        "fresh",
        "a sequence drawn after the update",
        "With several epochs a sqrt(t) window can stop whole sequences; its clip rate then counts reuse, not "
        "divergence.",
    ),
    Claim(
        "13.epochs",
        "At the same number of updates several epochs over few sequences keep E rho = 1 and the gradient unbiased, as "
        "one pass over more of them does.",
        "false",
        "over disjoint mini-batches that split no group each update still finds E rho = 1 and an unbiased gradient; "
        "over the same sequence both fail from the second update on",
        "theory, section 13",
        check_epochs,
        repeated,
        disjoint,
        "disjoint mini-batches passed off as epochs",
        "At the same number of updates, disjoint mini-batches keep E rho = 1 and epochs do not. That costs more "
        "samples; with samples fixed, reuse can still learn more (training study).",
    ),
)
