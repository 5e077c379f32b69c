"""Advantages: against loops, against identities, and for exact unbiasedness on trees that can be enumerated."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import array_api_strict
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from strategies import batches

from ctpo import doubly_robust, group_relative, leave_one_out, log_ratio, per_decision

groups = st.integers(2, 7).flatmap(
    lambda size: st.lists(
        st.lists(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-8, 8, width=16)), min_size=size, max_size=size),
        min_size=1,
        max_size=3,
    )
)


# Baselines within a group.


@given(rewards=groups, eps=st.sampled_from([1e-6, 1e-4, 0.1]))
def test_group_baselines_equal_loops(xp, rewards, eps):
    array = xp(rewards, "float64")
    near = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(xp.numpy(group_relative(array)), [oracle.group_relative(row) for row in rewards], **near)
    np.testing.assert_allclose(xp.numpy(leave_one_out(array)), [oracle.leave_one_out(row) for row in rewards], **near)
    default = xp.numpy(group_relative(array, scale_by_std=True))
    expected = [oracle.group_relative(row, True, 1e-6) for row in rewards]
    np.testing.assert_allclose(default, expected, rtol=1e-9, atol=1e-9)
    scaled = group_relative(array, scale_by_std=True, eps=eps)
    np.testing.assert_allclose(
        xp.numpy(scaled), [oracle.group_relative(row, True, eps) for row in rewards], rtol=1e-9, atol=1e-9
    )


@given(rewards=groups)
def test_group_identities(xp, rewards):
    array = xp(rewards, "float64")
    size = len(rewards[0])
    centered, left_out = xp.numpy(group_relative(array)), xp.numpy(leave_one_out(array))
    np.testing.assert_allclose(centered.sum(axis=-1), 0.0, atol=1e-12)
    np.testing.assert_allclose(left_out * (size - 1) / size, centered, atol=1e-12)
    shifted = xp.numpy(group_relative(xp((np.array(rewards) + 64.0), "float64")))
    np.testing.assert_allclose(shifted, centered, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, -2.7, 1e6 + 0.1])
@pytest.mark.parametrize("size", [2, 3, 7, 11])
def test_equal_rewards_give_exactly_zero(xp, reward, size, dtype):
    """The mean of equal numbers is not always that number in floating point, and a tiny eps would blow that up."""
    array = xp([[reward] * size], dtype)
    for found in (
        group_relative(array),
        group_relative(array, scale_by_std=True, eps=1e-12),
        leave_one_out(array),
    ):
        assert found.dtype == xp.dtype(dtype)
        assert not xp.numpy(found).any()


def test_right_or_wrong_may_be_boolean_or_integer(xp):
    expected = [0.5, -0.5]
    default = xp.xp.__array_namespace_info__().default_dtypes()["real floating"]
    for dtype in ("bool", "int32", "int64"):
        found = group_relative(xp([1, 0], dtype))
        assert found.dtype == default
        assert xp.numpy(found).tolist() == expected
        assert xp.numpy(leave_one_out(xp([1, 0], dtype))).tolist() == [1.0, -1.0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rewards_are_computed_in_float32(dtype):
    rewards = torch.tensor([1.0, 0.0, 0.0]).to(getattr(torch, dtype))
    for function in (group_relative, leave_one_out):
        found = function(rewards)
        assert found.dtype == torch.float32
        assert torch.equal(found, function(rewards.float()))


def bandit(size: int, advantage) -> float:
    """E[(1/G) sum_i A_i grad log p(a_i)] for one logit, p = 1/2, R = a, over all groups; the gradient is 1/4."""
    total = 0.0
    for actions in itertools.product([0.0, 1.0], repeat=size):
        a = advantage(np.array(actions))
        total += sum(a_i * (x - 0.5) for a_i, x in zip(a, actions, strict=True)) / size / 2**size
    return total


def test_a_mean_that_includes_oneself_scales_the_gradient():
    """theory.md 6a: 1 - 1/G for the group mean, nothing for leave-one-out."""
    for size, expected in ((2, 1 / 8), (4, 3 / 16), (8, 7 / 32)):
        assert math.isclose(bandit(size, group_relative), expected, rel_tol=1e-14)
        assert math.isclose(bandit(size, leave_one_out), 1 / 4, rel_tol=1e-14)


def test_std_scaling_of_binary_rewards():
    """theory.md 6b: c_8(p) = 1.895 at p = 1/4 and 1.736 at 1/2, from all 2^8 groups."""
    for p, expected in ((0.01, 2.44), (0.25, 1.895), (0.5, 1.736)):
        total = 0.0
        for actions in itertools.product([0.0, 1.0], repeat=8):
            x = np.array(actions)
            weight = np.prod(np.where(x == 1, p, 1 - p))
            a = group_relative(x, scale_by_std=True, eps=1e-12)
            total += weight * np.mean(a * (x - p)) / (p * (1 - p))
        assert abs(total - expected) < 0.005


def test_std_scaling_can_turn_the_gradient_around():
    """theory.md 6b: rewards 0, 1, 10 with probabilities 1/2, 1/4, 1/4; feature 1{a = 1}."""
    rewards, probabilities = [0.0, 1.0, 10.0], [0.5, 0.25, 0.25]

    def gradient(**options):
        total = 0.0
        for pair in itertools.product(range(3), repeat=2):
            a = group_relative(np.array([rewards[i] for i in pair]), eps=1e-12, **options)
            score = [(i == 1) - 0.25 for i in pair]
            total += probabilities[pair[0]] * probabilities[pair[1]] * np.dot(a, score) / 2
        return total

    assert math.isclose(gradient() * 2, -7 / 16, rel_tol=1e-12)  # 1 - 1/G = 1/2
    # A = +-1 with the population's deviation, +-1/sqrt(2) with the sample's.
    assert math.isclose(gradient(scale_by_std=True) * math.sqrt(2), 1 / 16, rel_tol=1e-9)


@pytest.mark.parametrize("function", [group_relative, leave_one_out])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2, 0)])
def test_a_group_needs_two_responses(function, shape):
    with pytest.raises(ValueError, match=r"rewards must have shape \(..., G\) with G of at least 2 .*; got \("):
        function(np.zeros(shape))


@pytest.mark.parametrize("function", [group_relative, leave_one_out])
def test_bad_rewards_are_located(xp, function):
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"rewards must be finite .*; got {value} at index \(0, 1\)"):
            function(xp([[0.0, value]]))
    with pytest.raises(ValueError, match=r"rewards must be an array .*; got list"):
        function([0.0, 1.0])
    with pytest.raises(ValueError, match=r"rewards must have a real dtype .*; got complex128"):
        function(np.array([0j, 1.0]))


@pytest.mark.parametrize("eps", [0.0, -1e-6, math.nan, math.inf, True, "1e-6", None])
def test_eps_must_be_positive(eps):
    with pytest.raises(ValueError, match=rf"eps must be a positive finite number; got {eps!r}"):
        group_relative(np.zeros(2), eps=eps)


# Credit along a sequence.


def rows_of(batch):
    return zip(
        batch.logp.tolist(),
        batch.behavior_logp.tolist(),
        batch.mask.tolist(),
        batch.advantages.tolist(),
        strict=True,
    )


@given(batch=batches(smallest=-2.0), shift=st.integers(1, 3))
def test_dense_rewards_equal_loops(xp, batch, shift):
    """Any numbers do for rewards and critic here; those at masked places are NaN and worse."""
    c = batch.advantages
    q, v = np.roll(batch.advantages, shift, axis=0) * 0.5, batch.advantages - 0.25
    q = np.where(batch.mask, np.nan_to_num(q, nan=0.0, posinf=0.0, neginf=0.0) % 8, np.nan)
    arrays = [xp(x) for x in (c, batch.logp, batch.behavior_logp)]
    mask = xp(batch.mask)
    plain = xp.numpy(per_decision(*arrays, mask))
    robust = xp.numpy(doubly_robust(*arrays, xp(q), xp(v), mask))
    for i, (logp, b, m, rewards) in enumerate(rows_of(batch)):
        near = {"rtol": 1e-11, "atol": 1e-11 * max(1.0, np.abs(plain[i]).max(), np.abs(robust[i]).max())}
        np.testing.assert_allclose(plain[i], oracle.per_decision(rewards, logp, b, m), **near)
        expected = oracle.doubly_robust(rewards, logp, b, q[i].tolist(), v[i].tolist(), m)
        np.testing.assert_allclose(robust[i], expected, **near)


@given(batch=batches(smallest=-2.0), seed=st.integers(0, 99))
def test_an_outcome_reward_stands_at_the_last_policy_token(xp, batch, seed):
    outcome = np.random.default_rng(seed).normal(size=len(batch.mask))
    outcome = np.where(batch.mask.any(axis=-1), outcome, 1.0)
    found = xp.numpy(per_decision(xp(outcome), xp(batch.logp), xp(batch.behavior_logp), xp(batch.mask)))
    for i, (logp, b, m, _) in enumerate(rows_of(batch)):
        expected = oracle.per_decision(float(outcome[i]), logp, b, m)
        np.testing.assert_allclose(found[i], expected, rtol=1e-11, atol=1e-11)
    if batch.mask.all():
        without = per_decision(xp(outcome), xp(batch.logp), xp(batch.behavior_logp))
        np.testing.assert_array_equal(xp.numpy(without), found)


@given(batch=batches(smallest=-2.0))
def test_no_critic_is_a_critic_of_zero(xp, batch):
    arrays = [xp(x) for x in (batch.advantages, batch.logp, batch.behavior_logp)]
    zero, mask = xp(np.zeros(batch.mask.shape)), xp(batch.mask)
    np.testing.assert_array_equal(
        xp.numpy(doubly_robust(*arrays, zero, zero, mask)), xp.numpy(per_decision(*arrays, mask))
    )


@given(batch=batches(smallest=-2.0))
def test_on_policy_it_is_the_reward_to_go(xp, batch):
    logp = xp(np.where(batch.mask, batch.behavior_logp, np.nan))
    rewards = np.where(batch.mask, batch.advantages, 0.0)
    found = per_decision(xp(batch.advantages), logp, logp, xp(batch.mask))
    expected = np.where(batch.mask, np.cumsum(rewards[:, ::-1], axis=-1)[:, ::-1], 0.0)
    np.testing.assert_allclose(xp.numpy(found), expected, atol=1e-12)


def test_dtypes_of_rewards_and_critic(xp):
    logp = xp([-0.5, -1.0], "float32")
    assert per_decision(xp([1, 0], "int64"), logp, logp).dtype == xp.dtype("float32")
    assert per_decision(xp([1.0, 0.0], "float64"), logp, logp).dtype == xp.dtype("float64")
    assert per_decision(xp(True, "bool"), logp, logp).dtype == xp.dtype("float32")
    assert doubly_robust(xp([1, 0], "int64"), logp, logp, xp([0.0, 0.0], "float64"), logp).dtype == xp.dtype("float64")


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_empty_arrays_give_empty_arrays(xp, shape):
    x = xp(np.zeros(shape))
    assert per_decision(x, x, x).shape == shape
    assert doubly_robust(xp(np.zeros(shape[:-1])), x, x, x, x, xp(np.zeros(shape, dtype=bool))).shape == shape


def test_off_the_cpu_everything_stays_there():
    device = array_api_strict.Device("device1")

    def there(x):
        return array_api_strict.asarray(np.asarray(x), device=device)

    logp, mask = there([[-1.0, -2.0]]), there([[True, False]])
    for found in (
        group_relative(there([math.nan, 1.0]), scale_by_std=True),
        leave_one_out(there([1, 0])),
        per_decision(there([1.0]), logp, logp, mask),
        per_decision(there([1.0]), logp, logp),
        doubly_robust(there([[1.0, math.nan]]), logp, logp, logp, logp, mask),
    ):
        assert found.device == device


# Exact expectations. A world is a binary token sequence of length 3 whose second token is the environment's: it is
# chosen with probability 2/5, the same under both policies, and masked. All numbers are fractions.

HALF = Fraction(1, 2)
ENVIRONMENT = Fraction(2, 5)
MASK = (True, False, True, True)
PREFIXES = [prefix for n in (0, 2, 3) for prefix in itertools.product((0, 1), repeat=n)]
SEQUENCES = list(itertools.product((0, 1), repeat=4))


def policy(seed: int) -> dict:
    """P(token = 1) after every prefix at which the policy chooses."""
    rng = np.random.default_rng(seed)
    return {prefix: Fraction(int(rng.integers(1, 10)), 10) for prefix in PREFIXES}


def chance(pi: dict, sequence: tuple, t: int) -> Fraction:
    p = pi[sequence[:t]] if MASK[t] else ENVIRONMENT
    return p if sequence[t] else 1 - p


def probability(pi: dict, sequence: tuple, upto: int = 4) -> Fraction:
    return math.prod((chance(pi, sequence, t) for t in range(upto)), start=Fraction(1))


def score(pi: dict, sequence: tuple, t: int, key: tuple | None) -> Fraction:
    """d log pi(token t) / d logit; every prefix has its own logit, or (key None) all share one."""
    if not MASK[t] or key not in (None, sequence[:t]):
        return Fraction(0)
    return sequence[t] - pi[sequence[:t]]


def reward(sequence: tuple, t: int, kind: str) -> Fraction:
    if kind == "outcome":
        return Fraction(int(sequence[0] == sequence[3]) + 2 * sequence[2] * sequence[1]) if t == 3 else Fraction(0)
    return Fraction(3 * sequence[t] - t) + sum(sequence[: t + 1]) ** 2 if MASK[t] else Fraction(0)


def true_gradient(pi: dict, kind: str, key: tuple | None) -> Fraction:
    """d J / d logit through the product rule, token by token: no score function, no return."""
    total = Fraction(0)
    for sequence in SEQUENCES:
        for t in range(4):
            if MASK[t] and key in (None, sequence[:t]):
                p = pi[sequence[:t]]
                slope = p * (1 - p) * (1 if sequence[t] else -1)
                others = math.prod((chance(pi, sequence, k) for k in range(4) if k != t), start=Fraction(1))
                total += others * slope * sum(reward(sequence, k, kind) for k in range(4))
    return total


def critic(pi: dict, q: dict) -> dict:
    """v(s) = sum_a pi(a|s) q(s, a)."""
    return {s: pi[s] * q[(*s, 1)] + (1 - pi[s]) * q[(*s, 0)] for s in PREFIXES}


def exact_q(pi: dict, kind: str) -> dict:
    """Expected rewards from a token on, given the tokens up to it."""
    q = {}
    for prefix in PREFIXES:
        for a in (0, 1):
            head = (*prefix, a)
            t = len(prefix)
            tails = itertools.product((0, 1), repeat=3 - t)
            q[head] = sum(
                math.prod((chance(pi, head + tail, k) for k in range(t + 1, 4)), start=Fraction(1))
                * sum(reward(head + tail, k, kind) for k in range(t, 4))
                for tail in tails
            )
    return q


def expectation(pi: dict, b: dict, key: tuple | None, advantages: np.ndarray) -> float:
    """E_b[sum_t rho_t A_t g_t] with the library's rho_t."""
    logp, behavior_logp, mask = tables(pi, b)
    weights = np.exp(log_ratio(logp, behavior_logp, mask, level="cumulative"))
    terms = [
        float(probability(b, sequence) * score(pi, sequence, t, key)) * weights[i, t] * advantages[i, t]
        for i, sequence in enumerate(SEQUENCES)
        for t in range(4)
        if MASK[t]
    ]
    return math.fsum(terms)


def tables(pi: dict, b: dict):
    """Log-probabilities of every sequence; the masked token has none that anybody knows."""

    def table(of):
        return np.array([[math.log(chance(of, s, t)) if MASK[t] else math.nan for t in range(4)] for s in SEQUENCES])

    return table(pi), table(b), np.array([MASK] * len(SEQUENCES))


def rewards_table(kind: str) -> np.ndarray:
    if kind == "outcome":
        return np.array([float(reward(s, 3, kind)) for s in SEQUENCES])
    return np.array([[float(reward(s, t, kind)) for t in range(4)] for s in SEQUENCES])


def critic_tables(q: dict, v: dict):
    """q and v of every token; NaN at the masked one."""
    return (
        np.array([[float(q[s[: t + 1]]) if MASK[t] else math.nan for t in range(4)] for s in SEQUENCES]),
        np.array([[float(v[s[:t]]) if MASK[t] else math.nan for t in range(4)] for s in SEQUENCES]),
    )


@pytest.mark.parametrize("kind", ["outcome", "dense"])
@pytest.mark.parametrize("key", [None, (), (0, 1), (1, 0, 1)])
@pytest.mark.parametrize("seed", range(6))
def test_weighted_advantages_have_the_gradient_as_expectation(kind, key, seed):
    """theory.md 4 (a) and (b): per decision, and doubly robust with any critic, on a tree with a tool token."""
    pi, b = policy(seed), policy(seed + 100)
    truth = float(true_gradient(pi, kind, key))
    arrays = (rewards_table(kind), *tables(pi, b)[:2])
    mask = tables(pi, b)[2]
    assert math.isclose(expectation(pi, b, key, per_decision(*arrays, mask)), truth, rel_tol=1e-12, abs_tol=1e-13)
    rng = np.random.default_rng(seed)
    arbitrary = {(*s, a): Fraction(int(rng.integers(-20, 20)), 4) for s in PREFIXES for a in (0, 1)}
    for q in (arbitrary, exact_q(pi, kind), exact_q(b, kind)):
        robust = doubly_robust(*arrays, *critic_tables(q, critic(pi, q)), mask)
        assert math.isclose(expectation(pi, b, key, robust), truth, rel_tol=1e-12, abs_tol=1e-13)


@pytest.mark.parametrize("kind", ["outcome", "dense"])
def test_what_is_known_to_be_biased_is_found_biased(kind):
    """Negative control: the return without later ratios, and a critic whose v is not the mean of q."""
    missed = {"return": 0, "critic": 0}
    for seed in range(6):
        pi, b = policy(seed), policy(seed + 100)
        truth = float(true_gradient(pi, kind, None))
        logp, behavior_logp, mask = tables(pi, b)
        c = rewards_table(kind)
        returns = per_decision(c, logp, logp, mask)  # reward-to-go, every quotient of ratios taken as 1
        missed["return"] += abs(expectation(pi, b, None, returns) - truth) < 1e-3
        q = exact_q(b, kind)
        tables_ = critic_tables(q, critic(b, q))  # v of the behavior policy
        robust = doubly_robust(c, logp, behavior_logp, *tables_, mask)
        missed["critic"] += abs(expectation(pi, b, None, robust) - truth) < 1e-3
    assert max(missed.values()) <= 1


@pytest.mark.parametrize("kind", ["outcome", "dense"])
def test_the_exact_critic_leaves_the_exact_advantage_on_every_path_before_chance(kind):
    """Where no chance is left, D_t = rho_t (Q - V) pathwise: at the last two tokens, after the environment's."""
    pi, b = policy(3), policy(103)
    q = exact_q(pi, kind)
    v = critic(pi, q)
    logp, behavior_logp, mask = tables(pi, b)
    q_table, v_table = critic_tables(q, v)
    found = doubly_robust(rewards_table(kind), logp, behavior_logp, q_table, v_table, mask)
    np.testing.assert_allclose(found[:, 2:], (q_table - v_table)[:, 2:], atol=1e-12)
    # Before the environment's token they differ by its surprise, which has mean 0.
    assert not np.allclose(found[:, 0], (q_table - v_table)[:, 0])


def test_outcome_reward_under_a_prefix_weight_is_the_known_number():
    """theory.md 4: R = a1 a2, b = 1/2, pi = 3/4, first logit: true 9/64; prefix weight times R gives 3/32."""
    logp = np.log([[0.75 if a else 0.25 for a in s] for s in itertools.product((0, 1), repeat=2)])
    behavior_logp = np.full_like(logp, math.log(0.5))
    outcome = np.array([0.0, 0.0, 0.0, 1.0])
    rho = np.exp(log_ratio(logp, behavior_logp, level="cumulative"))
    first = np.array([-0.75, -0.75, 0.25, 0.25])
    found = np.mean(rho[:, 0] * per_decision(outcome, logp, behavior_logp)[:, 0] * first)
    assert math.isclose(found, 9 / 64, rel_tol=1e-14)
    assert math.isclose(np.mean(rho[:, 0] * outcome * first), 3 / 32, rel_tol=1e-14)


GOOD = np.full((2, 3), -1.0)
NAN = np.where(np.eye(2, 3) == 1, math.nan, 0.0)
BAD_CALLS = {
    "rewards shape": (
        {"rewards": np.zeros(3)},
        r"rewards must have the shape of logp, \(2, 3\), or one value per sequence, \(2,\); got \(3,\)",
    ),
    "rewards complex": ({"rewards": np.zeros(2) + 0j}, r"rewards must have a real dtype .*; got complex128"),
    "rewards list": ({"rewards": [0.0, 1.0]}, r"rewards must be an array of .*; got list"),
    "rewards NaN": ({"rewards": NAN}, r"rewards must be finite at every policy token; got nan at index \(0, 0\)"),
    "outcome NaN": (
        {"rewards": np.array([0.0, math.nan])},
        r"rewards must be finite at every policy token; got nan at index \(1, 2\)",
    ),
    "q shape": ({"q": np.zeros(2)}, r"q must have the shape of logp, \(2, 3\); got \(2,\)"),
    "v shape": ({"v": np.zeros((2, 4))}, r"v must have the shape of logp, \(2, 3\); got \(2, 4\)"),
    "q integer": ({"q": np.zeros((2, 3), dtype=int)}, r"q must have a real floating-point dtype; got int64"),
    "q NaN": ({"q": NAN}, r"q must be finite at every policy token; got nan at index \(0, 0\)"),
    "v inf": (
        {"v": np.where(np.eye(2, 3) == 1, math.inf, 0.0)},
        r"v must be finite at every policy token; got inf at index \(0, 0\)",
    ),
    "v missing": ({"v": None}, r"v must be an array of .*; got NoneType"),
    "q missing": ({"q": None}, r"q must be an array of .*; got NoneType"),
    "logp NaN": ({"logp": NAN}, r"logp must be a number below \+inf .*; got nan at index \(0, 0\)"),
    "mask": ({"mask": np.ones((2, 3))}, r"mask must have dtype bool, .*; got float64"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_named(case):
    changed, message = BAD_CALLS[case]
    arguments = {
        "rewards": np.zeros((2, 3)),
        "logp": GOOD,
        "behavior_logp": GOOD,
        "q": np.zeros((2, 3)),
        "v": np.zeros((2, 3)),
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        doubly_robust(**arguments)
    if not set(changed) & {"q", "v"}:
        del arguments["q"], arguments["v"]
        with pytest.raises(ValueError, match=message):
            per_decision(**arguments)
