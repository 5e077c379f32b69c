"""Losses of the plug-in against those that verl has registered itself: value and gradient.

verl sees 0 at masked places, ours NaN and worse, so that agreement also says that nothing there matters. Where verl is
wrong, or differs by design, a test says so by its name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn
from verl.workers.config import ActorConfig

from ctpo.verl_plugin import REGISTERED, CTPOPolicyLossConfig

MODES = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}


@dataclass
class Peer:
    """A loss of verl with options of its actor, and ours with options of our own."""

    theirs: str
    ours: str
    actor: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    modes: tuple[str, ...] = MODES


PEERS = {
    "ppo": Peer("vanilla", "ctpo_ppo"),
    "grpo": Peer("vanilla", "ctpo_grpo", {"clip_ratio_c": 1e30}),
    "dapo": Peer("vanilla", "ctpo_dapo", {"clip_ratio_high": 0.28, "clip_ratio_c": 10.0}, {"clip_dual": 10.0}),
    "gspo": Peer("gspo", "ctpo_gspo", {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}),
    "gspo, wide": Peer("gspo", "ctpo_gspo", {}, {"clip_low": 0.2, "clip_high": 0.2}),
    "cispo": Peer("cispo", "ctpo_cispo", {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}),
    "cispo, narrow": Peer("cispo", "ctpo_cispo", {}, {"clip_low": 0.2, "clip_high": 0.2}),
    "sapo": Peer("sapo", "ctpo_sapo", modes=("seq-mean-token-mean",)),
    "sapo, steep": Peer(
        "sapo",
        "ctpo_sapo",
        {"tau_pos": 2.0, "tau_neg": 5.0},
        {"clip_positive": 2.0, "clip_negative": 5.0},
        ("seq-mean-token-mean",),
    ),
    "dppo_tv": Peer("dppo_tv", "ctpo_dppo_tv", {"clip_ratio_c": 20.0}),
    "dppo_tv, uneven": Peer(
        "dppo_tv",
        "ctpo_dppo_tv",
        {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1, "clip_ratio_c": 3.0},
        {"region_low": 0.05, "region_high": 0.1, "clip_high": 2.0},
    ),
    "dppo_kl": Peer("dppo_kl", "ctpo_dppo_kl", {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05, "clip_ratio_c": 20.0}),
    "reinforce": Peer("gpg", "ctpo_reinforce"),
}
GMPO = Peer("geo_mean", "ctpo_gmpo", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4})


@dataclass
class Case:
    """Tensors (B, T) of one precision; `dirty` has garbage at masked places."""

    logp: torch.Tensor
    old: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor | None
    garbage: torch.Tensor

    def dirty(self) -> dict[str, torch.Tensor | None]:
        soiled = {
            name: None if x is None else torch.where(self.mask, x, self.garbage.roll(shift))
            for shift, (name, x) in enumerate(self.tensors().items())
        }
        return soiled

    def tensors(self) -> dict[str, torch.Tensor | None]:
        return {
            "log_prob": self.logp,
            "old_log_prob": self.old,
            "advantages": self.advantages,
            "rollout_is_weights": self.weights,
        }


@st.composite
def cases(draw, dtype=torch.float64, per_sequence=False) -> Case:
    batch = draw(batches(zero_ratios=False, smallest=-40.0))
    shape = batch.mask.shape
    clean = {name: np.where(batch.mask, getattr(batch, name), 0.0) for name in ("logp", "behavior_logp", "advantages")}
    clean["logp"] = np.minimum(clean["logp"], 0.0)  # probabilities, which some losses look at
    clean["behavior_logp"] = np.minimum(clean["behavior_logp"], 0.0)
    if per_sequence or draw(st.booleans()):
        advantages = draw(st.lists(st.floats(-4, 4, width=16), min_size=shape[0], max_size=shape[0]))
        clean["advantages"] = np.where(batch.mask, np.reshape(advantages, (-1, 1)), 0.0)
    weights = None
    if draw(st.booleans()):
        drawn = draw(
            st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=batch.mask.size, max_size=batch.mask.size)
        )
        weights = torch.tensor(np.where(batch.mask, np.reshape(drawn, shape), 0.0), dtype=dtype)
    garbage = draw(st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 1e30]), min_size=1, max_size=5))
    return Case(
        *(torch.tensor(clean[name], dtype=dtype) for name in clean),
        mask=torch.tensor(batch.mask),
        weights=weights,
        garbage=torch.tensor(np.resize(garbage, shape), dtype=dtype),
    )


def config(mode: str, info: dict[str, Any] | None = None, loss: Any = None, **actor: Any) -> ActorConfig:
    common = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1, "loss_agg_mode": mode}
    if loss is not None:
        common["policy_loss"] = loss
    return ActorConfig(**common, **actor, global_batch_info=info or {})


def evaluate(name: str, settings: ActorConfig, case: Case, tensors: dict[str, torch.Tensor | None]):
    """Loss, gradient, metrics of a registered loss."""
    logp = tensors["log_prob"].clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(name)(
        **{**tensors, "log_prob": logp},
        response_mask=case.mask,
        loss_agg_mode=settings.loss_agg_mode,
        config=settings,
    )
    assert loss.shape == ()
    return loss.detach(), torch.autograd.grad(loss, logp)[0], metrics


def verl_terms(name: str, settings: ActorConfig, case: Case) -> float:
    """Sum of the sizes of what verl adds up: the scale that its rounding, and ours, is relative to."""
    weights = torch.ones_like(case.logp, requires_grad=True)
    tensors = case.tensors() | {"rollout_is_weights": weights}
    loss, _ = get_policy_loss_fn(name)(
        **tensors, response_mask=case.mask, loss_agg_mode=settings.loss_agg_mode, config=settings
    )
    return torch.autograd.grad(loss, weights)[0].abs().sum().item()


def assert_same(found, expected, scale, dtype, rounding=8):
    """Equal to rounding: the loss relative to the sum of its terms, the gradient element by element."""
    rtol = TOLERANCE[dtype]
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=rtol * scale + 1e-30)
    torch.testing.assert_close(found[1], expected[1], rtol=rtol, atol=rounding * torch.finfo(dtype).eps * scale + 1e-30)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", PEERS)
@given(data=st.data())
def test_loss_and_gradient_are_those_of_verl(name, dtype, data):
    peer, case = PEERS[name], data.draw(cases(dtype))
    if not case.mask.any():
        return
    mode = data.draw(st.sampled_from(peer.modes))
    theirs = config(mode, **peer.actor)
    ours = config(mode, loss=CTPOPolicyLossConfig(loss_mode=peer.ours, **peer.options))
    expected = evaluate(peer.theirs, theirs, case, case.tensors())
    found = evaluate(peer.ours, ours, case, case.dirty())
    scale = verl_terms(peer.theirs, theirs, case)
    # verl's gradient of a sigmoid s near 1 is r (1 - s), the difference rounded on the scale of 1, r as large as 40.
    assert_same(found, expected, scale, dtype, rounding=256 if peer.theirs == "sapo" else 8)


def large(dtype=torch.float64, *, spread=2.0, empty_rows=True, per_sequence=False, seed=7) -> Case:
    """48 rows of 24 places: padding, tool gaps, single tokens, empty rows; ratios from nearly 1 to e^(3 spread)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (48, 24)
    old = -6 * torch.rand(shape, generator=generator, dtype=torch.float64)
    size = spread * torch.logspace(-3, 0, shape[0], dtype=torch.float64)[:, None]
    mask = torch.arange(shape[1]) < torch.randint(2, shape[1] + 1, (shape[0], 1), generator=generator)
    mask &= torch.rand(shape, generator=generator) < 0.85
    mask[3], mask[30], mask[30, 4] = False, False, True
    if not empty_rows:
        mask[:, 0] = True
    advantages = torch.randn((shape[0], 1 if per_sequence else shape[1]), generator=generator, dtype=torch.float64)
    case = Case(
        (old + size * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(max=0.0),
        old,
        advantages.expand(shape),
        mask,
        2 * torch.rand(shape, generator=generator, dtype=torch.float64),
        torch.full(shape, math.nan, dtype=torch.float64),
    )
    kept = {name: getattr(case, name) for name in ("logp", "old", "advantages", "weights")}
    return replace(case, **{name: torch.where(mask, x, 0.0).to(dtype) for name, x in kept.items()})


@pytest.mark.parametrize("name", PEERS)
def test_large_batches_agree_in_every_aggregation_and_metric(name):
    peer, case = PEERS[name], large()
    for mode in peer.modes:
        theirs = config(mode, **peer.actor)
        ours = config(mode, loss=CTPOPolicyLossConfig(loss_mode=peer.ours, **peer.options))
        expected = evaluate(peer.theirs, theirs, case, case.tensors())
        found = evaluate(peer.ours, ours, case, case.dirty())
        assert_same(found, expected, verl_terms(peer.theirs, theirs, case), torch.float64)
        wrong = evaluate("ctpo", config(mode), case, case.dirty())
        assert (wrong[1] - expected[1]).abs().max() > 1e-3 * expected[1].abs().max()
    clipped = found[2]["actor/pg_clipfrac"]
    if peer.theirs in ("vanilla", "gspo", "cispo", "dppo_tv", "dppo_kl"):
        # verl divides by the number of tokens + 1e-8, and in float32.
        assert 0.01 < clipped < 0.99
        assert clipped == pytest.approx(expected[2]["actor/pg_clipfrac"], rel=1e-6)
    if peer.theirs in ("vanilla", "gspo", "cispo"):
        lower = found[2]["actor/pg_clipfrac_lower"]
        assert lower == pytest.approx(expected[2]["actor/pg_clipfrac_lower"], rel=1e-6)
        assert (lower > 0) == (name in ("ppo", "dapo"))
    if peer.theirs != "gpg":
        assert found[2]["actor/ppo_kl"] == pytest.approx(expected[2]["actor/ppo_kl"], rel=1e-6)


def test_metrics_are_numbers_under_names_that_verl_averages():
    """It takes the maximum of a name that contains "max" and the minimum of one with "min"."""
    names = set()
    for name in REGISTERED:
        metrics = evaluate(name, config("token-mean"), large(), large().dirty())[2]
        assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
        assert {"actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl"} < set(metrics)
        names |= set(metrics)
    assert all(name.startswith("actor/") and "max" not in name and "min" not in name for name in names)


def test_metrics_have_the_same_names_for_every_micro_batch():
    """Ranks whose micro-batches differ in a name or in the number of values stop verl."""
    case = large()
    few = Case(*(x[3:5, :5] for x in (case.logp, case.old, case.advantages, case.mask, case.weights, case.garbage)))
    assert few.mask.any(-1).tolist() == [False, True]
    none = replace(few, mask=torch.zeros_like(few.mask))
    names = [set(evaluate("ctpo", config("token-mean"), x, x.dirty())[2]) for x in (case, few, none)]
    assert names[0] == names[1] == names[2]


@pytest.mark.parametrize("name", REGISTERED)
def test_every_loss_is_what_agg_loss_makes_of_its_coefficients(name):
    """Over micro-batches and ranks: the shares of a global batch add up to verl's own aggregation of it."""
    case, estimator = large(), REGISTERED[name]
    parts = [slice(0, 10), slice(10, 31), slice(31, 48)]
    dp_size = 4
    if estimator.region is not None and estimator.region.scope == "batch":
        parts = [slice(0, 48)]  # micro-batches are judged one by one
    for mode in MODES:
        info = {
            "dp_size": dp_size,
            "batch_num_tokens": int(case.mask.sum()) * dp_size,
            "global_batch_size": len(case.mask) * dp_size,
            "loss_scale_factor": 100,
        }
        found = torch.zeros_like(case.logp)
        total = 0.0
        for rows in parts:
            part = Case(
                *(x[rows] for x in (case.logp, case.old, case.advantages, case.mask, case.weights, case.garbage))
            )
            loss, gradient, _ = evaluate(name, config(mode, info), part, part.dirty())
            found[rows], total = gradient, total + loss
        coefficients = estimator.coefficients(case.logp, case.old, case.advantages, case.mask)
        value = agg_loss(-coefficients.value * case.weights, case.mask, mode, **info)
        weight = case.weights.clone().requires_grad_()
        surrogate = agg_loss(-coefficients.weight * case.advantages * weight, case.mask, mode, **info)
        gradient = torch.autograd.grad(surrogate, weight)[0] * case.weights
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-30)
        torch.testing.assert_close(total, value, rtol=1e-11, atol=1e-15)


def test_length_of_the_micro_batch_is_the_default_horizon_as_in_verl():
    case = large()
    losses = [
        evaluate("ctpo", config("seq-mean-token-sum-norm", {"loss_scale_factor": length}), case, case.dirty())[0]
        for length in (None, 24, 48)
    ]
    assert losses[0] == losses[1] == pytest.approx(2 * losses[2].item(), rel=1e-12)


def test_masks_of_numbers_are_taken_too():
    case = large()
    expected = evaluate("ctpo", config("token-mean"), case, case.dirty())
    for dtype in (torch.int64, torch.float32):
        found = evaluate("ctpo", config("token-mean"), replace(case, mask=case.mask.to(dtype)), case.dirty())
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("ours", ["ctpo", "ctpo_gspo", "ctpo_minpro"])
def test_bfloat16_log_probabilities_give_a_loss_in_float32(ours):
    case = large()
    low = {name: None if x is None else x.bfloat16() for name, x in case.dirty().items()}
    loss, gradient, _ = evaluate(ours, config("token-mean"), case, low)
    exact = {name: x.float() for name, x in low.items()}
    expected = evaluate(ours, config("token-mean"), case, exact)
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    assert loss == expected[0]
    assert torch.equal(gradient, expected[1].bfloat16())


# Where verl is wrong, or differs by design.


@pytest.mark.parametrize(("theirs", "ours"), [("vanilla", "ctpo_ppo"), ("gspo", "ctpo_gspo"), ("cispo", "ctpo_cispo")])
def test_verl_s_gradient_is_poisoned_by_nan_at_a_masked_place_and_ours_is_not(theirs, ours):
    case = large()
    poisoned = evaluate(theirs, config("seq-mean-token-mean"), case, case.dirty())
    assert not (poisoned[0].isfinite() and poisoned[1].isfinite().all())
    clean = evaluate(ours, config("seq-mean-token-mean"), case, case.dirty())
    assert clean[0].isfinite()
    assert clean[1].isfinite().all()


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_a_micro_batch_without_tokens_is_nan_in_verl_and_zero_in_ours(mode):
    case = large()
    nothing = replace(case, mask=torch.zeros_like(case.mask))
    assert evaluate("vanilla", config(mode), nothing, case.tensors())[0].isnan()
    loss, gradient, metrics = evaluate("ctpo_ppo", config(mode), nothing, nothing.dirty())
    assert loss == 0
    assert not gradient.any()
    assert all(math.isfinite(value) for value in metrics.values())


def test_verl_counts_rows_without_tokens_in_the_global_batch_and_here_ours_follows():
    """Else micro-batches would not add up: only verl's trainer knows the global batch, and it counts every row.

    Without the global batch, verl and `policy_loss` both leave such rows out of the mean.
    """
    case = large()
    rows, empty = len(case.mask), int((~case.mask.any(-1)).sum())
    assert empty > 0
    for theirs, ours in (("vanilla", "ctpo_ppo"),):
        for info, counted in (({}, rows - empty), ({"global_batch_size": rows}, rows)):
            settings = config("seq-mean-token-mean", info)
            total = evaluate(ours, settings, case, case.dirty())[0]
            assert total == pytest.approx(evaluate(theirs, settings, case, case.tensors())[0].item(), rel=1e-12)
            by_sum = evaluate(ours, config("seq-mean-token-mean", {"global_batch_size": 1}), case, case.dirty())[0]
            assert total == pytest.approx(by_sum.item() / counted, rel=1e-12)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "seq-mean-token-mean"])
def test_verl_s_sapo_ignores_the_aggregation_and_ours_does_not(mode):
    case = large()
    fixed = evaluate("sapo", config("seq-mean-token-mean"), case, case.tensors())[0]
    assert evaluate("sapo", config(mode), case, case.tensors())[0] == fixed
    assert abs(evaluate("ctpo_sapo", config(mode), case, case.dirty())[0] - fixed) > 1e-3


def test_tokens_beyond_the_limit_of_20_keep_their_gradient_where_the_ratio_is_constant_as_in_verl():
    base = torch.tensor([[-1.0, -31.0]], dtype=torch.float64)
    case = Case(base, base.flip(-1), torch.ones(1, 2).double(), torch.ones(1, 2).bool(), None, base)
    cispo = config("token-mean", clip_ratio_low=1.0, clip_ratio_high=4.0)
    expected = evaluate("cispo", cispo, case, case.tensors())[1]
    found = evaluate("ctpo_cispo", config("token-mean"), case, case.tensors())[1]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert found.all()
    for loss in ("vanilla", "ctpo_ppo"):
        assert not evaluate(loss, config("token-mean"), case, case.tensors())[1].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@given(data=st.data())
def test_geometric_mean_is_that_of_verl_for_one_advantage_per_sequence(dtype, data):
    case = replace(data.draw(cases(dtype, per_sequence=True)), weights=None)
    occupied = case.mask.any(-1)
    if not occupied.any():
        return
    # verl's mean counts rows without tokens, see below.
    case = Case(*(x[occupied] for x in (case.logp, case.old, case.advantages, case.mask)), None, case.garbage[occupied])
    # The limit of 10 is ours; a mean of log-ratios cut to a window of one side may exceed it on the other.
    ours = config("seq-mean-token-mean", loss=CTPOPolicyLossConfig(loss_mode=GMPO.ours, max_log_ratio=None))
    expected = evaluate(GMPO.theirs, config("seq-mean-token-mean", **GMPO.actor), case, case.tensors())
    found = evaluate(GMPO.ours, ours, case, case.dirty())
    sign, d = case.advantages.sign(), case.logp - case.old
    one_sided = torch.where(case.mask, sign * (sign * d).clamp(max=0.4), 0.0)
    ratio = torch.exp(one_sided.sum(-1) / case.mask.sum(-1))
    scale = (case.advantages.abs().amax(-1) * ratio).mean().item()
    assert_same(found, expected, scale, dtype)


def test_geometric_mean_of_verl_ignores_the_aggregation_and_the_global_batch_and_counts_rows_without_tokens():
    """So its micro-batches are scaled as if each were the whole batch; ours add up."""
    case, settings = replace(large(per_sequence=True), weights=None), GMPO.actor
    global_batch = {"global_batch_size": 10 * len(case.mask)}
    theirs = [
        evaluate("geo_mean", config(mode, info, **settings), case, case.tensors())[0]
        for mode, info in (("seq-mean-token-mean", {}), ("token-mean", {}), ("seq-mean-token-mean", global_batch))
    ]
    assert theirs[0] == theirs[1] == theirs[2]
    occupied = case.mask.any(-1)
    rows = Case(*(x[occupied] for x in (case.logp, case.old, case.advantages, case.mask)), None, case.garbage[occupied])
    ours = evaluate("ctpo_gmpo", config("seq-mean-token-mean"), rows, rows.dirty())[0]
    assert theirs[0] == pytest.approx(ours.item() * len(rows.mask) / len(case.mask), rel=1e-12)
    assert len(rows.mask) < len(case.mask)


def test_geometric_mean_of_verl_takes_the_geometric_mean_of_the_weights_and_ours_the_weight_of_each_token():
    logp, old, mask = (
        torch.tensor([[-1.0, -1.2]]).double(),
        torch.tensor([[-1.1, -1.0]]).double(),
        torch.ones(1, 2).bool(),
    )
    plain = Case(logp, old, torch.ones(1, 2).double(), mask, None, old)
    weighted = replace(plain, weights=torch.tensor([[0.5, 2.0]]).double())
    settings = config("seq-mean-token-mean", **GMPO.actor)
    theirs = [evaluate("geo_mean", settings, case, case.tensors())[0] for case in (plain, weighted)]
    ours = [evaluate("ctpo_gmpo", config("seq-mean-token-mean"), case, case.tensors())[0] for case in (plain, weighted)]
    assert theirs[0] == pytest.approx(ours[0].item(), rel=1e-12)
    assert theirs[1] == pytest.approx(theirs[0].item(), rel=1e-9)  # sqrt(0.5 x 2)
    assert ours[1] == pytest.approx(1.25 * ours[0].item(), rel=1e-12)
