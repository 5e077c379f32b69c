"""verl's rollout correction is `ctpo.rollout_correction` in other words; where it is not, a test says so by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches
from verl.trainer.ppo.rollout_corr_helper import (
    compute_rollout_correction_and_rejection_mask,
    compute_rollout_correction_weights,
    compute_rollout_rejection_mask,
)

from ctpo import rollout_correction

# verl cuts every log-ratio, of a token as of a sequence, to +-20.
VERL_LIMIT = 20.0


@st.composite
def pairs(draw, *, spread=0.375):
    """Old and rollout log-probabilities with token log-ratios that sum to less than verl's limit, and a mask."""
    batch = draw(batches(zero_ratios=False))
    rows, length = batch.mask.shape
    steps = draw(
        st.lists(st.floats(-spread, spread, width=16), min_size=rows * length, max_size=rows * length),
    )
    rollout = np.where(batch.mask, batch.behavior_logp, 0.0)
    old = rollout + np.reshape(steps, (rows, length))
    return torch.from_numpy(old), torch.from_numpy(rollout), torch.from_numpy(batch.mask)


def with_garbage(x, mask):
    return torch.where(mask, x, math.nan)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("threshold", "bounds"), [(1.25, (None, 1.25)), ("0.8_1.25", (0.8, 1.25))])
@given(pair=pairs())
def test_truncated_and_masked_weights_are_those_of_verl(level, threshold, bounds, pair):
    old, rollout, mask = pair
    mode = "truncate" if bounds[0] is None else "mask"
    dirty = (with_garbage(old, mask), with_garbage(rollout, mask))
    ours = rollout_correction(*dirty, mask, level=level, mode=mode, low=bounds[0], high=bounds[1])
    if not ours.weights.any():  # verl fails, see below
        return
    theirs, _ = compute_rollout_correction_weights(old - rollout, mask, level, threshold)
    torch.testing.assert_close(ours.weights, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_extreme_ratios_are_truncated_to_the_same_weights(level):
    old = torch.tensor([[0.0, -40.0, -1.0], [-30.0, -1.0, -1.0]], dtype=torch.float64)
    rollout = torch.tensor([[-40.0, -0.5, -1.0], [-1.0, -1.5, -1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    theirs, _ = compute_rollout_correction_weights(old - rollout, mask, level, 2.0)
    ours = rollout_correction(old, rollout, mask, level=level, high=2.0).weights
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert ours[0, 0] == 2.0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_verl_limits_log_ratios_to_20_where_ours_are_exact(level):
    """The smallest weight of verl is exp(-20), also where the ratio is exp(-35); both are 0 for any purpose."""
    old, rollout, mask = torch.tensor([[-36.0]]).double(), torch.tensor([[-1.0]]).double(), torch.tensor([[True]])
    theirs, _ = compute_rollout_correction_weights(old - rollout, mask, level, 2.0)
    ours = rollout_correction(old, rollout, mask, level=level, high=2.0).weights
    assert theirs.item() == pytest.approx(math.exp(-VERL_LIMIT), rel=1e-12)
    assert ours.item() == pytest.approx(math.exp(-35.0), rel=1e-12)


def test_verl_multiplies_by_the_mask_so_that_nan_at_a_masked_place_spreads_and_ours_does_not():
    old, rollout = torch.tensor([[-1.0, math.nan, -1.0]]), torch.tensor([[-1.5, -1.0, -1.0]])
    mask = torch.tensor([[True, False, True]])
    theirs, _ = compute_rollout_correction_weights(old - rollout, mask, "token", 2.0)
    assert theirs.isnan().any()
    assert rollout_correction(old, rollout, mask).weights.isfinite().all()


def test_verl_divides_by_zero_where_every_token_is_masked_out_and_ours_gives_zero():
    old, rollout, mask = torch.tensor([[-1.0]]), torch.tensor([[-1.25]]), torch.tensor([[True]])
    with pytest.raises(ZeroDivisionError):
        compute_rollout_correction_weights(old - rollout, mask, "token", "0.8_1.25")
    ours = rollout_correction(old, rollout, mask, mode="mask", low=0.8, high=1.25)
    assert ours.weights.tolist() == [[0.0]]
    assert ours.metrics["rollout/weight_mean"] == 0


@pytest.mark.parametrize("level", ["token", "sequence"])
@given(pair=pairs())
def test_batch_normalization_of_verl_is_a_division_by_our_mean_weight(level, pair):
    old, rollout, mask = pair
    if not mask.any():
        return
    theirs, _ = compute_rollout_correction_weights(old - rollout, mask, level, 1.25, True)
    ours = rollout_correction(old, rollout, mask, level=level, high=1.25)
    # verl divides by sums plus 1e-8 and counts rows in float32.
    expected = ours.weights / ours.metrics["rollout/weight_mean"]
    torch.testing.assert_close(expected, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("option", "level"), [("token_k1", "token"), ("seq_sum_k1", "sequence"), ("seq_mean_k1", "sequence_mean")]
)
@given(pair=pairs())
def test_rejection_of_verl_bounds_the_inverse_ratio(option, level, pair):
    old, rollout, mask = pair
    low, high = 0.87, 1.3
    if not mask.any() or _at_a_bound(old - rollout, mask, level, (-math.log(low), -math.log(high))):
        return
    theirs, _ = compute_rollout_rejection_mask(old - rollout, mask, option, f"{low}_{high}")
    ours = rollout_correction(old, rollout, mask, level=level, mode="reject", low=1 / high, high=1 / low)
    assert torch.equal(ours.kept, theirs.bool() & mask)
    assert torch.equal(ours.weights, ours.kept.double())


@given(pair=pairs())
def test_squared_rejection_of_verl_is_a_symmetric_window(pair):
    old, rollout, mask = pair
    bound = math.sqrt(2 * 0.03)
    if not mask.any() or _at_a_bound(old - rollout, mask, "token", (bound, -bound)):
        return
    theirs, _ = compute_rollout_rejection_mask(old - rollout, mask, "token_k2", "0.03")
    ours = rollout_correction(old, rollout, mask, mode="reject", low=math.exp(-bound), high=math.exp(bound))
    assert torch.equal(ours.kept, theirs.bool() & mask)


def _at_a_bound(log_ratio, mask, level, bounds):
    """Whether rounding may decide: verl adds 1e-8 to the count of a mean, and compares ratios where we compare logs."""
    d = torch.where(mask, log_ratio, 0.0)
    statistic = d if level == "token" else d.sum(-1) / (mask.sum(-1).clamp(min=1) if level == "sequence_mean" else 1)
    return any((statistic - bound).abs().min() < 1e-6 for bound in bounds)


def test_both_stages_together_are_verl_s_unified_function():
    generator = torch.Generator().manual_seed(3)
    rollout = -torch.rand(6, 12, generator=generator, dtype=torch.float64)
    old = rollout + 0.3 * torch.randn(6, 12, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 12, generator=generator) < 0.8
    settings = {"rollout_is": "token", "rollout_is_threshold": 1.5}
    settings |= {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.9_1.1"}
    weights, modified, _ = compute_rollout_correction_and_rejection_mask(old, rollout, mask, **settings)
    token = rollout_correction(old, rollout, mask, high=1.5)
    rejection = rollout_correction(old, rollout, mask, level="sequence_mean", mode="reject", low=1 / 1.1, high=1 / 0.9)
    torch.testing.assert_close(token.weights, weights.batch["rollout_is_weights"], rtol=1e-12, atol=0)
    assert torch.equal(rejection.kept, modified.bool())
    assert 0 < rejection.kept.sum() < mask.sum()
