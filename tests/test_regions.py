"""Trust regions: by hand, against loops, at their thresholds, and what their scope promises."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches

from ctpo import Estimator, RatioClip
from ctpo.regions import DivergenceRegion, PrefixBudget, SecondMoment, SequenceRegion

SCOPES = {
    "token": (DivergenceRegion(0.05, 0.02), DivergenceRegion(0.01, 0.01, "kl")),
    "prefix": (PrefixBudget(0.05, 0.01, last_weight=1.0, adaptive=False),),
    "sequence": (
        PrefixBudget(0.05, 0.01),
        PrefixBudget(0.05, 0.01, last_weight=1.0),
        PrefixBudget(0.05, 0.01, adaptive=False),
        SequenceRegion(0.01),
        SequenceRegion(0.1, "k1", only_negative=True),
        SequenceRegion(0.1, "k2", "max"),
    ),
    "batch": (SecondMoment(0.02),),
}
EVERY = [region for regions in SCOPES.values() for region in regions]


def rejected(region, logp, behavior_logp, advantages, mask=None):
    """Flags of an estimator with the region, after a check of what a rejection does."""
    estimator = Estimator("token", form="unclipped", max_token_log_ratio=None, region=region)
    found = estimator.coefficients(logp, behavior_logp, advantages, mask)
    free = dataclasses.replace(estimator, region=None).coefficients(logp, behavior_logp, advantages, mask)
    for with_region, without in ((found.weight, free.weight), (found.value, free.value)):
        np.testing.assert_array_equal(with_region, np.where(found.rejected, 0.0, without))
    assert not (found.clipped_low | found.clipped_high).any()
    return found.rejected


def probabilities(new, old):
    return np.log(np.array(new, dtype=float)), np.log(np.array(old, dtype=float))


# By hand.


def test_total_variation_is_one_sided_and_keeps_its_threshold():
    new = [0.75, 0.75 + 1e-9, 0.25, 0.25 - 1e-9, 0.5]
    logp, b = probabilities(new, [0.5] * 5)
    region = DivergenceRegion(low=0.25 + 1e-12, high=0.25 + 1e-12)  # exp(log p) may miss p by a rounding step
    assert rejected(region, logp, b, np.array(1.0)).tolist() == [False, True, False, False, False]
    assert rejected(region, logp, b, np.array(-1.0)).tolist() == [False, False, False, True, False]
    assert not rejected(region, logp, b, np.array(0.0)).any()
    assert rejected(DivergenceRegion(0.3, 0.2), logp, b, np.array(1.0)).tolist() == [True, True, False, False, False]
    assert not rejected(DivergenceRegion(0.3, 0.2), logp, b, np.array(-1.0)).any()


def test_a_rare_token_may_change_its_ratio_a_lot_and_a_common_one_may_not():
    """Ratio 100 from 1e-5, and 0.99 to 0.8: what a ratio clip gets wrong, by arXiv:2602.04879."""
    logp, b = probabilities([1e-3, 0.8], [1e-5, 0.99])
    a = np.array([1.0, -1.0])
    for kind, threshold in (("tv", 0.15), ("kl", 0.05)):
        assert rejected(DivergenceRegion(threshold, threshold, kind), logp, b, a).tolist() == [False, True]
    clipped = Estimator("token", RatioClip(0.2, 0.2)).coefficients(logp, b, a)
    assert (clipped.clipped_high | clipped.clipped_low).tolist() == [True, False]


def test_binary_kl_equals_the_sum_over_two_outcomes():
    rng = np.random.default_rng(0)
    p, q = rng.uniform(0.01, 0.99, (2, 500))
    kl = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    sign = np.where(p > q, 1.0, -1.0)
    for threshold in (0.001, 0.05, 0.5):
        found = rejected(DivergenceRegion(threshold, threshold, "kl"), np.log(p), np.log(q), sign)
        clear = abs(kl - threshold) > 1e-6  # the authors' 1e-8 inside of the logarithm
        np.testing.assert_array_equal(found[clear], (kl > threshold)[clear])
        assert 0 < found.sum() < 500


def test_a_log_probability_rounded_to_zero_is_not_an_infinite_divergence():
    """Half of the tokens of a confident model are of probability 1 in float32."""
    logp = np.zeros(3, dtype=np.float32)
    b = np.array([-1e-7, -1e-5, -1.0], dtype=np.float32)
    found = rejected(DivergenceRegion(0.05, 0.05, "kl"), logp, b, np.array(1.0, dtype=np.float32))
    assert found.tolist() == [False, False, True]
    gone = rejected(DivergenceRegion(0.05, 0.05, "kl"), np.array([-math.inf]), np.array([-0.1]), np.array(-1.0))
    assert gone.tolist() == [True]
    never = rejected(DivergenceRegion(0.05, 0.05, "kl"), np.array([-math.inf]), np.array([-1e4]), np.array(-1.0))
    assert never.tolist() == [False]


def test_prefix_budget_by_hand():
    """Threshold 0.1, budget 0.02 per token, no weights: divergences 0.09, 0.05, 0.04, 0.03."""
    b = np.log(np.full(4, 0.5))
    logp = np.log(0.5 + np.array([0.09, 0.05, 0.04, 0.03]))
    region = PrefixBudget(0.1, 0.02, last_weight=1.0, adaptive=False)
    # Left for t = 1..4: .1; .1 + .02 - .09 = .03; .1 + .04 - .14 = 0; .1 + .06 - .18 = -.02.
    assert rejected(region, logp, b, np.array(1.0)).tolist() == [False, True, True, True]
    # Tokens that move back are kept, and count.
    assert rejected(region, logp, b, np.array([-1.0, -1.0, -1.0, 1.0])).tolist() == [False, False, False, True]
    # What was saved does not raise the threshold.
    late = np.log(0.5 + np.array([0.0, 0.0, 0.0, 0.11]))
    assert rejected(region, late, b, np.array(1.0)).tolist() == [False, False, False, True]
    # Weights from 1 to 0.5: 0.11 of the last token counts as 0.055.
    half = dataclasses.replace(region, last_weight=0.5, threshold=0.056)
    assert not rejected(half, late, b, np.array(1.0)).any()
    assert rejected(dataclasses.replace(half, threshold=0.054), late, b, np.array(1.0)).tolist()[3]
    # The 90 % quantile of .09, .05, .04, .03 is .078, moved into [.02, .04].
    wide = dataclasses.replace(region, adaptive=True)
    # Left: .1; .1 + .04 - .09 = .05; .1 + .08 - .14 = .04; .1 + .12 - .18 = .04. Rounding decides at equality.
    logp = np.log(0.5 + np.array([0.09, 0.0499, 0.0399, 0.03]))
    assert not rejected(wide, logp, b, np.array(1.0)).any()


def test_a_single_token_has_weight_one():
    logp, b = probabilities([0.61], [0.5])
    assert rejected(PrefixBudget(0.1, 0.02, last_weight=0.1), logp, b, np.array(1.0)).tolist() == [True]


@pytest.mark.parametrize("statistic", ["mean", "max"])
@pytest.mark.parametrize(
    ("estimate", "each"),
    [
        ("k1", [-0.2, 0.4, 0.2]),
        ("k2", [0.02, 0.08, 0.02]),
        ("k3", [math.exp(0.2) - 1.2, math.exp(-0.4) - 0.6, math.exp(-0.2) - 0.8]),
    ],
)
def test_sequence_statistics_by_hand(estimate, each, statistic):
    logp, b = np.array([[0.2, -0.4, -0.2]]), np.zeros((1, 3))
    value = max(each) if statistic == "max" else sum(each) / 3
    for threshold, beyond in ((value * (1 - 1e-9), True), (value * (1 + 1e-9), False)):
        region = SequenceRegion(threshold, estimate, statistic)
        assert rejected(region, logp, b, np.array([1.0])).tolist() == [[beyond] * 3]
        mixed = dataclasses.replace(region, only_negative=True)
        assert rejected(mixed, logp, b, np.array([[1.0, -1.0, 0.0]])).tolist() == [[False, beyond, False]]


def test_second_moment_by_hand():
    """Squares .25, .16, .01 of tokens that move away: means .14, .085, .01."""
    d = np.array([[0.5, -0.4, 0.1], [3.0, -3.0, 0.0]])
    a = np.array([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]])  # the second row moves back
    zero = np.zeros_like(d)
    for threshold, expected in (
        (0.15, [False, False, False]),
        (0.12, [True, False, False]),
        (0.05, [True, True, False]),
        (0.005, [True, True, True]),
    ):
        found = rejected(SecondMoment(threshold), d, zero, a)
        assert found.tolist() == [expected, [False] * 3]
    assert not rejected(SecondMoment(1e-6), zero, zero, a).any()


def test_equal_squares_go_together():
    """Whatever the order of the batch: of two equal ones none is preferred."""
    d = np.array([0.1, 0.5, 0.5])
    assert rejected(SecondMoment(0.14), d, np.zeros(3), np.array(1.0)).tolist() == [False, True, True]


# Against loops, and with the gaps and garbage that data have.


@given(batch=batches(smallest=-3.0), fixed=st.booleans())
def test_every_region_equals_loops(xp, batch, fixed):
    """`fixed` gives every token the advantage that its change goes with: as many as can move away."""
    if fixed:
        batch.advantages = np.where(batch.mask, np.where(batch.logp > batch.behavior_logp, 1.0, -1.0), np.nan)
    arrays = [xp(getattr(batch, name)) for name in ("logp", "behavior_logp", "advantages", "mask")]
    lists = [getattr(batch, name).tolist() for name in ("logp", "behavior_logp", "advantages", "mask")]
    for region in EVERY:
        found = Estimator("token", form="unclipped", region=region).coefficients(*arrays).rejected
        of_region = type(region).__name__, dataclasses.asdict(region)
        expected, margins = (np.array(x) for x in oracle.rejections(*of_region, *lists))
        clear = margins > 1e-9
        np.testing.assert_array_equal(xp.numpy(found)[clear], expected[clear], err_msg=repr(region))


def test_a_gap_changes_no_decision():
    rng = np.random.default_rng(3)
    met = dict.fromkeys(EVERY, 0)
    for _ in range(50):
        mask = rng.random((4, 30)) < 0.5
        q = rng.uniform(0.3, 0.7, (4, 30))
        p = q + rng.choice([-0.08, -0.02, 0.0, 0.02, 0.08], (4, 30))
        logp, b, a = np.log(p), np.log(q), np.sign(p - q)
        bad = [np.where(mask, x, y) for x, y in ((logp, np.inf), (b, np.nan), (a, -np.inf))]
        for region in EVERY:
            found = rejected(region, *bad, mask)
            if region.scope == "batch":
                continue
            for row in range(4):
                alone = rejected(region, *(x[row][mask[row]] for x in (logp, b, a)))
                np.testing.assert_array_equal(found[row][mask[row]], alone, err_msg=repr(region))
                met[region] += 0 < alone.sum() < len(alone)
    for region in EVERY:
        if region.scope in ("token", "prefix") or isinstance(region, PrefixBudget):
            assert met[region] > 20  # sequences of which a part is rejected


# Scopes.


@pytest.mark.parametrize("scope", SCOPES)
def test_scopes(scope):
    for region in SCOPES[scope]:
        assert region.scope == scope
        estimator = Estimator("token", form="unclipped", region=region)
        assert estimator.scans_time == (scope == "token")


@given(batch=batches(smallest=-3.0), seed=st.integers(0, 99))
def test_a_decision_depends_on_no_more_than_its_scope(batch, seed):
    """Everything outside of the scope of a token is replaced; masks and garbage stay as they are."""
    rng = np.random.default_rng(seed)
    rows, length = batch.mask.shape
    row, token = rng.integers(rows), rng.integers(length)
    other = {
        "logp": np.where(batch.mask, -rng.exponential(1.0, batch.mask.shape), np.nan),
        "advantages": np.where(batch.mask, rng.choice([-1.0, 1.0], batch.mask.shape), np.nan),
    }
    inside = {
        "token": np.eye(length, dtype=bool)[token],
        "prefix": np.arange(length) <= token,
        "sequence": np.ones(length, dtype=bool),
    }
    for scope, kept in inside.items():
        kept = (np.arange(rows) == row)[:, None] & kept
        for region in SCOPES[scope]:
            inputs = [(batch.logp, batch.advantages)]
            inputs += [tuple(np.where(kept, getattr(batch, name), x) for name, x in other.items())]
            left, right = (rejected(region, x, batch.behavior_logp, a, batch.mask) for x, a in inputs)
            assert left[row, token] == right[row, token]


def test_wider_scopes_do_depend_on_the_rest():
    """The test above could not fail for regions that never reject."""
    b = np.log(np.full((2, 4), 0.5))
    calm, wild = np.log(np.full((2, 4), 0.52)), np.log(np.full((2, 4), 0.9))
    a = np.ones((2, 4))
    first, one = np.arange(4) < 1, (np.arange(2) < 1)[:, None]
    earlier = np.where(first, wild, np.log(0.52))
    region = SCOPES["prefix"][0]
    assert (rejected(region, calm, b, a) != rejected(region, earlier, b, a))[:, 1:].any()
    for region in SCOPES["sequence"][3:]:
        a_here = -a if region.only_negative else a
        later = np.where(first, calm, -1.5 if region.only_negative else wild)
        changed = rejected(region, calm, b, a_here) != rejected(region, later, b, a_here)
        assert changed[:, 0].all(), region
    left = rejected(SecondMoment(0.3), np.where(one, wild, calm), b, a)
    right = rejected(SecondMoment(0.3), wild, b, a)
    assert (left[0].tolist(), right[0].tolist()) == ([False] * 4, [True] * 4)


# Dtypes and bad input.


@pytest.mark.parametrize("region", EVERY, ids=repr)
def test_flags_are_boolean_and_numbers_keep_their_dtype(region):
    for dtype in (torch.float32, torch.float64):
        logp = torch.full((2, 3), -0.1, dtype=dtype)
        estimator = Estimator("token", form="unclipped", region=region)
        found = estimator.coefficients(logp, logp - 1.0, torch.ones(2, dtype=dtype))
        assert found.rejected.dtype == torch.bool
        assert found.rejected.shape == (2, 3)
        assert found.weight.dtype == found.value.dtype == dtype


BAD = {
    **{
        f"{made.__name__} {name} {value!r}": (
            lambda made=made, name=name, value=value: made(**{name: value}),
            rf"{made.__name__}: {name} must be a positive finite number; got {value!r}$",
        )
        for made, names in (
            (DivergenceRegion, ("low", "high")),
            (PrefixBudget, ("threshold", "budget", "last_weight")),
            (SequenceRegion, ("threshold",)),
            (SecondMoment, ("threshold",)),
        )
        for name in names
        for value in (0, -0.1, math.inf, math.nan, True, "0.1", None)
    },
    "weight above 1": (lambda: PrefixBudget(last_weight=1.5), r"PrefixBudget: last_weight must be at most 1; got 1.5"),
    "adaptive": (lambda: PrefixBudget(adaptive=1), r"PrefixBudget: adaptive must be True or False; got 1"),
    "only_negative": (
        lambda: SequenceRegion(0.1, only_negative="yes"),
        r"SequenceRegion: only_negative must be True or False; got 'yes'",
    ),
    "kind": (lambda: DivergenceRegion(kind="TV"), r"DivergenceRegion: kind must be one of tv, kl; got 'TV'"),
    "estimate": (lambda: SequenceRegion(0.1, "k4"), r"SequenceRegion: estimate must be one of k1, k2, k3; got 'k4'"),
    "statistic": (
        lambda: SequenceRegion(0.1, statistic="sum"),
        r"SequenceRegion: statistic must be one of mean, max; got 'sum'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_fields_are_named(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("region", EVERY, ids=repr)
def test_regions_are_values(region):
    again = type(region)(**dataclasses.asdict(region))
    assert (again, hash(again)) == (region, hash(region))
    with pytest.raises(dataclasses.FrozenInstanceError):
        region.scope = "token"  # type: ignore[misc]
