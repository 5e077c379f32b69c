"""Claim 10: the released loss, written once more with torch and plain loops, against the named configurations."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch

import ctpo
from simulations.claims import released_loss as claim
from simulations.claims.released_loss import CONFIGURATIONS, PRINTED, RELEASED, batch_moments
from simulations.exact import enumerate_trajectories, policy_gradient
from simulations.mdp import World, as_numbers, one_logit, policy_table, random_tree, tree

F = Fraction
PLAIN = CONFIGURATIONS["rho_t alone"]


# --- the loss itself ---


def loss_by_autograd(logp, behavior_logp, advantages, mask, *, clamp, limit, dual, token_mean, literal):
    """Gradient in log pi of the maximized objective of a batch, pieces of the released code switched one by one."""
    logp = torch.tensor(logp, requires_grad=True)
    keep = torch.tensor(mask)
    difference = torch.where(keep, logp - torch.tensor(behavior_logp), 0.0)
    if clamp:
        difference = difference.clamp(-20.0, 20.0)
    log_rho = difference.cumsum(-1)
    if not literal:
        log_rho = log_rho.detach() + torch.where(keep, logp - logp.detach(), 0.0)
    if limit:
        log_rho = log_rho.clamp(max=10.0)
    scale = keep.cumsum(-1).clamp(min=1).double().sqrt()
    a = torch.tensor(advantages)
    rho = log_rho.exp()
    clipped = torch.maximum(torch.minimum(log_rho, 0.05 * scale), -0.025 * scale).exp()
    loss = torch.maximum(-a * rho, -a * clipped)
    if dual:
        loss = torch.where(a < 0, torch.minimum(loss, -a * (0.05 * scale).exp()), loss)
    loss = torch.where(keep, loss, 0.0)
    if token_mean:
        total = loss.sum() / keep.sum()
    else:
        total = (loss.sum(-1) / keep.sum(-1).clamp(min=1)).sum() / (keep.sum(-1) > 0).sum()
    (gradient,) = torch.autograd.grad(-total, logp)
    return gradient.numpy()


def a_batch(seed: int, spread: float):
    rng = np.random.default_rng(seed)
    shape = (5, 9)
    logp, behavior_logp = -rng.exponential(size=(2, *shape))
    logp = behavior_logp + spread * rng.standard_t(2, size=shape)
    mask = rng.random(shape) < 0.7
    mask[3] = False
    return logp, behavior_logp, rng.normal(size=shape), mask


SWITCHES = {
    "printed formula": {},
    "printed formula, differentiated literally": {"literal": True},
    "printed formula with token clamp only": {"clamp": True},
    "printed formula with log-ratio limit only": {"limit": True},
    "printed formula with dual clip only": {"dual": True},
    "printed formula with token-mean only": {"token_mean": True},
    "... and token clamp": {"clamp": True},
    "... and log-ratio limit": {"clamp": True, "limit": True},
    "... and dual clip": {"clamp": True, "limit": True, "dual": True},
    "released code": {"clamp": True, "limit": True, "dual": True, "token_mean": True},
}


@pytest.mark.parametrize("spread", [0.03, 8.0])
@pytest.mark.parametrize("name", SWITCHES)
def test_configurations_are_the_loss_by_autograd(name, spread):
    configuration = CONFIGURATIONS[name]
    off = dict.fromkeys(("clamp", "limit", "dual", "token_mean", "literal"), False)
    for seed in range(10):
        logp, behavior_logp, advantages, mask = a_batch(seed, spread)
        expected = loss_by_autograd(logp, behavior_logp, advantages, mask, **(off | SWITCHES[name]))
        weight = configuration.estimator.coefficients(logp, behavior_logp, advantages, mask).weight
        shares = claim.token_weights(mask, configuration.aggregation)
        terms = np.where(mask, weight * advantages * shares, 0.0)
        if configuration.literal:
            # d log rho_t / d log pi_k is 1 for every k <= t.
            terms = np.where(mask, terms[:, ::-1].cumsum(axis=1)[:, ::-1], 0.0)
        np.testing.assert_allclose(terms, expected, rtol=1e-9, atol=1e-12)


def test_each_step_changes_what_it_names():
    assert list(SWITCHES) == [name for name in CONFIGURATIONS if not name.startswith("rho_t alone")]
    assert CONFIGURATIONS["released code"] == RELEASED
    assert RELEASED.estimator == ctpo.get_estimator("ctpo")
    assert PRINTED.estimator.clip == ctpo.PositionClip(0.025, 0.05, 0.5, dual=None)
    assert (PRINTED.aggregation, RELEASED.aggregation) == ("seq-mean-token-mean", "token-mean")
    undone = replace(
        RELEASED,
        estimator=replace(
            RELEASED.estimator, clip=PRINTED.estimator.clip, max_log_ratio=None, max_token_log_ratio=None
        ),
        aggregation="seq-mean-token-mean",
    )
    assert undone == PRINTED


# --- batches ---


def test_token_weights_by_plain_loops():
    mask = np.array([[True, False, True], [False, False, False], [True, True, True]])
    tokens, sequences = 5, 2
    for name in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        found = claim.token_weights(mask, name)
        for i, j in product(range(3), range(3)):
            length = sum(mask[i])
            share = {
                "token-mean": 1 / tokens,
                "seq-mean-token-mean": 1 / sequences / max(length, 1),
                "seq-mean-token-sum": 1 / sequences,
            }[name]
            assert found[i, j] == pytest.approx(share if mask[i, j] else 0.0)


def brute_force(probability, lengths, summed, aggregation, batch):
    """Mean and total variance over all batches, one after the other."""
    mean, square = [F(0)] * summed.shape[1], F(0)
    for chosen in product(range(len(lengths)), repeat=batch):
        chance = math.prod((probability[i] for i in chosen), start=F(1))
        total = sum(int(lengths[i]) for i in chosen)
        gradient = [F(0)] * summed.shape[1]
        for i in chosen:
            divisor = {"token-mean": total, "seq-mean-token-mean": batch * int(lengths[i])}.get(aggregation, batch)
            gradient = [g + summed[i, d] / divisor for d, g in enumerate(gradient)]
        mean = [m + chance * g for m, g in zip(mean, gradient, strict=True)]
        square += chance * sum((g * g for g in gradient), F(0))
    return mean, square - sum((m * m for m in mean), F(0))


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_batch_moments_are_those_over_all_batches(aggregation, batch):
    rng = np.random.default_rng(batch)
    weights = as_numbers(rng.integers(1, 6, size=5), True)
    probability = weights / weights.sum()
    lengths = np.array([1, 3, 1, 2, 5])
    summed = as_numbers(rng.integers(-4, 5, size=(5, 2)), True)
    found = batch_moments(probability, lengths, summed, aggregation, batch)
    mean, variance = brute_force(probability, lengths, summed, aggregation, batch)
    assert found.mean.tolist() == mean
    assert found.total_variance == variance


def test_token_mean_is_a_ratio_estimator():
    """Stop (R = 3/4) or go on for one token (R = 1), both 1/2, weight 1: the sign is right only in larger batches."""
    probability, lengths = as_numbers([F(1, 2), F(1, 2)], True), np.array([1, 2])
    summed = as_numbers([[F(-1, 2) * F(3, 4)], [F(1, 2)]], True)
    found = {n: batch_moments(probability, lengths, summed, "token-mean", n).mean[0] for n in (1, 2, 3, 4, 6)}
    assert [found[n] for n in (1, 2, 3, 4)] == [F(-1, 16), F(-1, 96), F(1, 128), F(15, 896)]
    assert float(found[6]) == pytest.approx(0.0254, abs=5e-5)
    assert batch_moments(probability, lengths, summed, "seq-mean-token-sum", 3).mean[0] == F(1, 16)


def test_mean_gradients_need_not_be_parallel():
    """Stop (R = 0) or go on for one more token (R = 1 or 3), 1/2 each, on-policy with A^pi: (Y, T) of each response."""
    probability, lengths = as_numbers([F(1, 2), F(1, 4), F(1, 4)], True), np.array([1, 2, 2])
    summed = as_numbers([[F(1, 2), 0], [F(1, 2), F(1, 2)], [F(1, 2), F(1, 2)]], True)
    mdp = tree(2, 2, eos=0, outcome=lambda s: 0 if len(s) == 1 else (1, 3)[s[1]])
    policy = policy_table(mdp, lambda _: [F(1, 2), F(1, 2)])
    world = one_logit(World(mdp, policy, policy, "position"))
    paths = enumerate_trajectories(world)
    found = zip(paths.mask.sum(axis=1), paths.summed_scores(paths.advantage("A_target")).tolist(), strict=True)
    assert sorted(found) == list(zip(lengths, summed.tolist(), strict=True))
    assert list(policy_gradient(world)) == [F(1, 2), F(1, 4)]
    for n in (1, 2, 8):
        by_sequence = batch_moments(probability, lengths, summed, "seq-mean-token-mean", n).mean
        assert list(by_sequence) == [F(3, 8), F(1, 8)]
    by_token = {n: batch_moments(probability, lengths, summed, "token-mean", n).mean for n in (1, 2, 200)}
    assert [list(by_token[n]) for n in (1, 2)] == [[F(3, 8), F(1, 8)], [F(17, 48), F(7, 48)]]
    assert float(by_token[200][0] / by_token[200][1]) == pytest.approx(2, abs=0.01)


def test_batches_that_have_no_mean_are_refused():
    half, one = as_numbers([F(1, 2)] * 2, True), as_numbers([[1], [1]], True)
    with pytest.raises(ValueError, match="batch: must be at least 1, got 0"):
        batch_moments(half, np.array([1, 2]), one, "token-mean", 0)
    with pytest.raises(ValueError, match="lengths: every sequence needs a policy token"):
        batch_moments(half, np.array([1, 0]), one, "token-mean", 2)


# --- the table ---


def test_every_peculiarity_acts_in_the_world_of_mishaps():
    world = claim.mishap_world()
    paths = enumerate_trajectories(world)
    advantages = paths.advantage("A_target")
    found = RELEASED.estimator.coefficients(*paths.log_probabilities(), advantages, paths.mask)
    reached = paths.behavior_probability > 0
    for flag in (found.clipped_low, found.clipped_high, found.clipped_dual, found.saturated):
        assert np.any(flag[reached])
    tokens = np.log(np.where(paths.mask, paths.ratio, 1.0))
    assert tokens.max() > 20
    assert np.any((tokens.cumsum(axis=1) > 10) & (advantages < 0))
    assert len(set(paths.mask.sum(axis=1))) > 1


def test_rows_of_the_table():
    for world in (claim.mishap_world(), claim.ordinary_world()):
        rows = {row["configuration"]: row for row in claim.released_rows(world)}
        assert list(rows) == list(CONFIGURATIONS)
        exact = rows["rho_t alone, summed"]
        assert exact["bias"] < 1e-12
        assert exact["cosine"] == pytest.approx(1.0)
        np.testing.assert_allclose(exact["mean"], policy_gradient(world), atol=1e-12)
        assert rows["released code"]["silenced"] > rows["released code"]["pg_clipfrac"]
        assert all(row["bias"] > 0.1 for name, row in rows.items() if name != "rho_t alone, summed")
    section = claim.table()
    assert len(section["rows"]) == 2 * len(CONFIGURATIONS)
    assert all("mean" not in row for row in section["rows"])


def test_a_change_of_step_size_is_no_bias():
    """On strings of one length the three aggregations differ by a factor only."""
    world = random_tree(np.random.default_rng(5), horizon=3, exact=False)

    three = {n: replace(PLAIN, aggregation=n) for n in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")}
    rows = claim.released_rows(world, configurations=three)
    assert all(row["bias"] < 1e-12 for row in rows)
    assert len({round(row["noise"], 12) for row in rows}) == 1


def test_noise_is_that_of_sampled_batches():
    world = claim.ordinary_world()
    paths = enumerate_trajectories(world)
    rng = np.random.default_rng(11)
    advantages = paths.advantage("A_target")
    found = claim.released_rows(world, configurations={"released code": RELEASED}, batch=3)[0]
    summed = claim.sequence_gradients(paths, RELEASED, advantages)
    lengths = paths.mask.sum(axis=1)
    scale = float((paths.behavior_probability * lengths).sum())
    n = 20_000
    drawn = rng.choice(len(lengths), size=(n, 3), p=paths.behavior_probability / paths.behavior_probability.sum())
    batches = scale * summed[drawn].sum(axis=1) / lengths[drawn].sum(axis=1)[:, None]
    error = batches.std(axis=0, ddof=1) / math.sqrt(n)
    z = np.abs(batches.mean(axis=0) - found["mean"])[error > 0] / error[error > 0]
    assert z.max() < 4.5  # 1e-4 over the dozen components
    sampled = ((batches - found["mean"]) ** 2).sum(axis=1)
    exact = (found["noise"] * np.linalg.norm(policy_gradient(world))) ** 2
    z = abs(sampled.mean() - exact) / (sampled.std(ddof=1) / math.sqrt(n))
    assert z < 4.5
    # Negative control: the mean over sequences is another one.
    other = summed[drawn] / lengths[drawn][..., None]
    assert (np.abs(scale * other.mean(axis=(0, 1)) - found["mean"])[error > 0] / error[error > 0]).max() > 10


def test_a_world_without_gradient_is_refused():
    world = random_tree(np.random.default_rng(0), exact=False)
    flat = replace(world, mdp=replace(world.mdp, reward=world.mdp.reward * 0, outcome=world.mdp.outcome * 0))
    with pytest.raises(ValueError, match=r"world: the true gradient of .* is 0"):
        claim.released_rows(flat)


# --- the numbers ---


def test_one_token_examples_by_hand():
    """g = 1{a = j} - pi_j; sums over the tokens that keep their gradient."""
    p = [F(1, 4), F(3, 4)]
    advantage = [1 - p[0], -p[0]]
    terms = [p[a] * advantage[a] * ((a == 1) - p[1]) for a in range(2)]
    assert (sum(terms), terms[0]) == (F(-3, 16), F(-9, 64))
    pi = [F(2, 100), F(2, 100), F(96, 100)]
    reward = [F(1, 4), F(1), F(1, 2)]
    value = sum(x * r for x, r in zip(pi, reward, strict=True))
    terms = [pi[a] * (reward[a] - value) * ((a == 0) - pi[0]) for a in range(3)]
    assert sum(terms) == F(-51, 10000)
    assert terms[0] + terms[2] == F(-2451, 500000)  # token 1 is above the window
    assert terms[2] == F(3, 31250)  # and token 0 above the dual bound
    for world, logit, expected in (
        (claim.drifted_world(), 1, (F(-3, 16), F(-9, 64))),
        (claim.flipped_world(), 0, (F(-2451, 500000), F(3, 31250))),
    ):
        found = [claim.exact_gradient(world, e)[logit] for e in (PRINTED.estimator, RELEASED.estimator)]
        assert tuple(found) == expected


def test_overflow_examples_by_hand():
    """b(bad) = 2^-bits, pi(bad) = 1/2, R = 0 for the bad token: g A = -1/4 for both tokens, each with pi = 1/2."""
    for bits in (16, 31):
        world = claim.overflow_world(bits)
        assert policy_gradient(world)[1] == F(-1, 4)
        assert claim.mean_with(world, PRINTED) == pytest.approx(-0.25)
    limited = replace(PRINTED, estimator=replace(PRINTED.estimator, max_log_ratio=10.0))
    clamped = replace(PRINTED, estimator=replace(PRINTED.estimator, max_token_log_ratio=20.0))
    assert claim.mean_with(claim.overflow_world(15), limited) == pytest.approx(-0.25)  # 14 log 2 < 10
    assert claim.mean_with(claim.overflow_world(16), limited) == pytest.approx(-0.125)
    assert claim.mean_with(claim.overflow_world(29), clamped) == pytest.approx(-0.25)  # 28 log 2 < 20
    expected = -0.125 - 2.0**-31 * math.exp(20.0) / 4
    assert claim.mean_with(claim.overflow_world(31), clamped) == pytest.approx(expected)


@pytest.mark.parametrize("t", [1, 4, 50])
def test_binomial_mass_by_plain_loops(t):
    sigma = 0.2
    up = math.exp(sigma) / (1 + math.exp(sigma))  # pi / b = e^sigma with b = 1 - pi
    mass = sum(
        math.comb(t, k) * up**k * (1 - up) ** (t - k) for k in range(t + 1) if sigma * (2 * k - t) > 0.05 * math.sqrt(t)
    )
    found, atom = claim.binomial_target_mass(sigma, t)
    assert found == pytest.approx(mass, rel=1e-10)
    assert atom == pytest.approx(math.comb(t, t // 2) / 2**t)


def test_gaussian_tails_by_simulation():
    sigma, t, n = 0.0335, 1000, 200_000
    rng = np.random.default_rng(3)
    log_rho = rng.normal(-(sigma**2) * t / 2, sigma * math.sqrt(t), n)
    found = claim.gaussian_tails(sigma, np.array([t]))
    rho = np.exp(log_rho)
    low, high = -0.025 * math.sqrt(t), 0.05 * math.sqrt(t)
    for name, values in (
        ("low", (log_rho < low).astype(float)),
        ("high", (log_rho > high).astype(float)),
        ("high_target", rho * (log_rho > high)),
    ):
        error = values.std() / math.sqrt(n)
        assert abs(values.mean() - found[name][0]) < 4.5 * error
    # Negative control: the mass under b is another one.
    assert abs((log_rho > high).mean() - found["high_target"][0]) > 10 * error


def test_rates_of_one_batch():
    row = np.log([[1.5, 0.5, 1.5, 1.5]])
    advantages = np.array([[1.0, -1.0, -1.0, 0.0]])
    mask = np.ones((1, 4), dtype=bool)
    found = RELEASED.estimator.coefficients(
        np.diff(row, prepend=0.0), np.zeros((1, 4)), advantages, mask
    )  # log rho is the row
    assert claim.pg_clipfrac(found, mask) == 0.5
    assert claim.total_clip_rate(found, mask) == 0.75


def test_share_of_tokens():
    world = random_tree(np.random.default_rng(8), horizon=2, eos=True, exact=False)
    paths = enumerate_trajectories(world)
    first = paths.mask & (np.arange(2) == 0)
    expected = 1 / (1 + (1 - world.behavior[0, 0]))  # the string goes on unless its first token ends it
    assert claim.token_share(paths, first, paths.mask) == pytest.approx(expected)


def test_outcome_of_the_mishap_world():
    world = claim.mishap_world()
    outcome = dict(zip(world.mdp.labels, world.mdp.outcome, strict=True))
    assert (outcome["(0,)"], outcome["(1, 0)"], outcome["(1, 1, 1)"], outcome["(1, 2, 1)"]) == (0, 1, 3, 0)
    assert world.mdp.n_states == tree(3, 3, eos=0).n_states


def test_shares_in_the_table_by_plain_loops():
    world = claim.mishap_world()
    paths = enumerate_trajectories(world)
    advantages = paths.advantage("A_target")
    rows = {row["configuration"]: row for row in claim.released_rows(world)}
    for name, dual in (("printed formula", False), ("released code", True)):
        tokens = shown = counted = silent = 0.0
        for n, h in zip(*np.nonzero(paths.mask), strict=True):
            chance, a = paths.behavior_probability[n], advantages[n, h]
            log_rho = math.fsum(math.log(paths.ratio[n, k]) for k in range(h + 1))
            above, below = log_rho > 0.05 * math.sqrt(h + 1), log_rho < -0.025 * math.sqrt(h + 1)
            clipped = (a > 0 and above) or (a < 0 and below)
            tokens += chance
            shown += chance * clipped
            counted += chance * (a != 0)
            silent += chance * (clipped or (dual and a < 0 and above))
        assert rows[name]["pg_clipfrac"] == pytest.approx(shown / tokens, rel=1e-9)
        assert rows[name]["silenced"] == pytest.approx(silent / counted, rel=1e-9)
    # Some tokens have no advantage, and some are clipped on either side, or the shares could be told wrongly.
    zero = paths.mask & (advantages == 0)
    assert np.any(zero)


def test_silenced_counts_tokens_with_an_advantage_only():
    """Two tokens of three with A = 0 after a first one that is clipped: silenced is 1, pg_clipfrac 1/3."""
    mdp = tree(2, 3, name="decided at once", outcome=lambda string: string[0])
    b = policy_table(mdp, lambda prefix: [F(1, 2), F(1, 2)])
    pi = policy_table(mdp, lambda prefix: [F(1, 2), F(1, 2)] if prefix else [F(1, 4), F(3, 4)])
    found = claim.released_rows(World(mdp, b, pi), configurations={"released code": RELEASED, "alone": PLAIN})
    assert (found[0]["silenced"], found[0]["pg_clipfrac"]) == pytest.approx((1.0, 1 / 3))
    assert math.isnan(found[0]["cosine"])
    assert (found[0]["bias"], found[0]["noise"]) == (1.0, 0.0)
    assert (found[1]["silenced"], found[1]["pg_clipfrac"]) == (0.0, 0.0)
