"""Claim 9: exact forward differentiation against torch's autograd, and its example by plain loops."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch

from simulations.claims import stop_gradient as claim
from simulations.claims.stop_gradient import SWAPPED, example, example_moments
from simulations.exact import Trajectories, enumerate_trajectories
from simulations.mdp import World, as_numbers, random_tree

F = Fraction
LITERAL = {"sum": claim.printed_expression, "mean": claim.printed_mean_expression}
RELEASED = {"sum": claim.released_expression, "mean": claim.released_mean_expression}


def float_worlds() -> list[World]:
    """Trees with early ends and tool gaps, under each sharing of logits."""
    worlds = []
    for seed, parameters in enumerate(("prefix", "position", "shared") * 2):
        rng = np.random.default_rng([9, seed])
        kinds = {"eos": seed % 2 == 0, "tool_share": 0.4 * (seed >= 2)}
        world = random_tree(rng, n_actions=2 + seed % 2, horizon=3, exact=False, **kinds)
        worlds.append(world.with_parameters(parameters))
    return worlds


def autograd(paths: Trajectories, advantages: np.ndarray, mode: str, released: bool) -> np.ndarray:
    """(N, D) gradients by torch of sum_t exp(log weight) A_t, written as in a training loop."""
    world = paths.world
    mask, position = torch.tensor(paths.mask), torch.tensor(np.maximum(paths.mask.cumsum(axis=1), 1))
    behavior = torch.tensor(np.log(paths.behavior))
    gradients = []
    for n in range(len(mask)):
        # Logits that are the parameters of a block plus what makes each state's policy the world's.
        theta = torch.zeros(world.n_blocks, world.mdp.n_actions, dtype=torch.float64, requires_grad=True)
        rows = []
        for h in range(mask.shape[1]):
            state = paths.states[n, h]
            if not paths.mask[n, h]:
                rows.append(torch.zeros((), dtype=torch.float64))
                continue
            logits = theta[world.block(h)[state]] + torch.tensor(np.log(world.target[state]))
            rows.append(torch.log_softmax(logits, -1)[paths.actions[n, h]])
        logp = torch.stack(rows)
        log_rho = torch.cumsum(torch.where(mask[n], logp - behavior[n], 0.0), -1)
        if mode == "mean":
            log_rho = log_rho / position[n]
        if released:
            log_rho = log_rho.detach() + logp - logp.detach()
        surrogate = torch.where(mask[n], torch.exp(log_rho) * torch.tensor(advantages[n]), 0.0).sum()
        (gradient,) = torch.autograd.grad(surrogate, theta, allow_unused=True)
        gradients.append(np.zeros(world.dimension) if gradient is None else gradient.numpy().ravel())
    return np.array(gradients)


@pytest.mark.parametrize("released", [True, False], ids=["released", "literal"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("case", range(6))
def test_exact_differentiation_is_autograd(case, mode, released):
    world = float_worlds()[case]
    paths = enumerate_trajectories(world)
    advantages = np.random.default_rng([1, case]).standard_normal(paths.mask.shape)
    expression = (RELEASED if released else LITERAL)[mode]
    along = np.eye(world.dimension)
    found = np.array([claim.surrogate_slope(paths, advantages, expression, d) for d in along]).T
    expected = autograd(paths, advantages, mode, released)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)
    # The other form is another gradient, or this test could not tell them apart.
    other = (LITERAL if released else RELEASED)[mode]
    wrong = np.array([claim.surrogate_slope(paths, advantages, other, d) for d in along]).T
    assert np.abs(wrong - expected).max() > 1e-3


def test_closed_forms_are_autograd():
    for world in float_worlds():
        paths = enumerate_trajectories(world)
        advantages = np.random.default_rng(2).standard_normal(paths.mask.shape)
        weighted = np.where(paths.mask, paths.ratio.cumprod(axis=1) * advantages, 0.0)
        for released, form in ((True, claim.stop_gradient), (False, claim.undetached)):
            expected = autograd(paths, advantages, "sum", released)
            np.testing.assert_allclose(paths.summed_scores(form(weighted)), expected, rtol=1e-11, atol=1e-12)


def test_released_weight_is_the_held_prefix_times_the_token_ratio():
    paths = enumerate_trajectories(float_worlds()[0])
    target, behavior = claim.token_probabilities(paths, np.ones(paths.world.dimension))
    found = claim.released_expression(target, behavior, paths.mask.cumsum(axis=1)).value
    before = np.column_stack([np.ones(len(found)), paths.ratio.cumprod(axis=1)[:, :-1]])
    np.testing.assert_allclose(found, before * paths.ratio, rtol=1e-14)


def test_forms_on_one_row():
    row = as_numbers([[1, 10, 100]], True)
    assert claim.stop_gradient(row).tolist() == [[1, 10, 100]]
    assert claim.undetached(row).tolist() == [[111, 110, 100]]
    assert claim.earlier_tokens(row).tolist() == [[110, 100, 0]]


# --- the example by plain loops ---


def by_hand(kind: str, literal: bool, p: Fraction) -> tuple[Fraction, Fraction]:
    """Mean and variance of the example's logit gradient: b = 1/2, pi(1) = p, two tokens, R = a1 a2."""
    half = F(1, 2)

    def continued(policy: Fraction, first: int, second: int | None) -> Fraction:
        """Expected R given the first token, or both."""
        return F(first) * (policy if second is None else second)

    values = []
    for first, second in product((0, 1), (0, 1)):
        ratio = [(p if a else 1 - p) / half for a in (first, second)]
        rho = [ratio[0], ratio[0] * ratio[1]]
        score = [a - p for a in (first, second)]
        if kind == "R":
            advantage = [F(first * second)] * 2
        else:
            who = half if kind == "A_behavior" else p
            q = [continued(who, first, None), continued(who, first, second)]
            v = [who * who, continued(who, first, None)]
            advantage = q if kind == "Q_target" else [q[0] - v[0], q[1] - v[1]]
        total = rho[0] * advantage[0] * score[0]
        total += rho[1] * advantage[1] * (score[0] + score[1] if literal else score[1])
        values.append(total)
    mean = sum(values, F(0)) / 4
    return mean, sum((x * x for x in values), F(0)) / 4 - mean * mean


@pytest.mark.parametrize("kind", ["A_target", "A_behavior", "Q_target", "R"])
@pytest.mark.parametrize("p", [F(3, 4), F(1, 4), F(2, 7)])
def test_example_by_plain_loops(kind, p):
    found = example_moments(None if kind == "R" else kind, claim.FORMS, p)
    assert found["stop-gradient"] == by_hand(kind, False, p)
    assert found["un-detached"] == by_hand(kind, True, p)
    swapped = example_moments(None if kind == "R" else kind, SWAPPED, p)
    assert swapped["stop-gradient"] == found["un-detached"]


def test_example_numbers():
    """The numbers that are quoted."""
    p = F(3, 4)
    assert [by_hand("A_target", x, p)[0] for x in (False, True)] == [F(9, 32)] * 2
    assert [by_hand("A_target", x, p)[1] for x in (False, True)] == [F(243, 16384), F(81, 16384)]
    assert [by_hand("A_behavior", x, p)[0] for x in (False, True)] == [F(15, 64), F(9, 32)]
    assert [round(float(by_hand("A_behavior", x, p)[1]), 4) for x in (False, True)] == [0.0198, 0.0527]
    assert [by_hand("R", x, p)[0] for x in (False, True)] == [F(15, 64), F(3, 8)]
    assert [by_hand("Q_target", x, p)[0] for x in (False, True)] == [F(9, 32), F(27, 64)]


@pytest.mark.parametrize("gains", [(1, 0), (2, -3)])
def test_outcome_on_policy_by_plain_loops(gains):
    """b = pi = 1/2: un-detached gives 1/2 for 1/4 with R = a1, and 1/4 for -1/4 with R = 2a1 - 3a2."""
    true = literal = F(0)
    for tokens in product((0, 1), repeat=2):
        reward, score = sum(g * a for g, a in zip(gains, tokens, strict=True)), [a - F(1, 2) for a in tokens]
        true += F(reward, 4) * sum(score)
        literal += F(reward, 4) * (score[0] + sum(score))
    assert (true, literal) == ((F(1, 4), F(1, 2)) if gains == (1, 0) else (F(-1, 4), F(1, 4)))
    found = claim._on_policy(lambda s: gains[0] * s[0] + gains[1] * s[1], claim.with_return)
    assert found == [true, true, literal]


def test_geometric_mean_example_by_plain_loops():
    """b = 1/5, pi = 4/5: released mode 148/625, derivative of rho_t^(1/t) 108/625."""
    b, p = F(1, 5), F(4, 5)
    root: Callable[[Fraction], Fraction] = {F(16): F(4), F(1): F(1), F(1, 16): F(1, 4)}.__getitem__
    released = literal = F(0)
    for first, second in product((0, 1), (0, 1)):
        chance = (b if first else 1 - b) * (b if second else 1 - b)
        ratio = [F(4) if a else F(1, 4) for a in (first, second)]
        weight = [ratio[0], root(ratio[0] * ratio[1])]
        score = [first - p, second - p]
        advantage = [first * p - p * p, first * (second - p)]
        released += chance * sum(weight[t] * advantage[t] * score[t] for t in (0, 1))
        literal += chance * (weight[0] * advantage[0] * score[0] + weight[1] * advantage[1] * sum(score) / 2)
    assert (released, literal) == (F(148, 625), F(108, 625))
    paths = enumerate_trajectories(claim.rooted_world(2, 2))
    for expression, expected in (
        (claim.released_mean_expression, released),
        (claim.printed_mean_expression, literal),
    ):
        slope = claim.surrogate_slope(paths, paths.advantage("A_target"), expression, as_numbers([0, 1], True))
        assert paths.expectation(slope) == expected


def test_outcome_only_keeps_the_outcome():
    world = random_tree(np.random.default_rng(3), rewards="both")
    bare = claim.outcome_only(world)
    assert np.all(bare.mdp.reward == 0)
    assert np.all(enumerate_trajectories(bare).returns == bare.mdp.outcome[enumerate_trajectories(world).final_state])


def test_reward_so_far_by_plain_loops():
    world = random_tree(np.random.default_rng(4), horizon=3, rewards="both", tool_share=0.4, eos=True)
    paths = enumerate_trajectories(world)
    found = claim.reward_so_far(paths)
    for n, h in np.ndindex(*found.shape):
        earlier = [world.mdp.reward[paths.states[n, k], paths.actions[n, k]] for k in range(h) if paths.live[n, k]]
        assert found[n, h] == sum(earlier, F(0))


def test_example_world():
    world = example(F(2, 3))
    assert world.behavior[0].tolist() == [F(1, 2)] * 2
    assert world.target[0].tolist() == [F(1, 3), F(2, 3)]
    assert world.mdp.outcome[-1] == 1
