"""`policy_loss`: value, gradient and metrics against plain loops, and what must not change them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import subprocess
import sys
import warnings
from typing import Any

import hypothesis.strategies as st
import numpy as np
import oracle
import oracle_losses
import pytest
import torch
from hypothesis import given
from strategies import Batch, batches
from torch.utils._python_dispatch import TorchDispatchMode

import ctpo
from ctpo import ESTIMATORS, Estimator, PositionClip, RatioClip, policy_loss
from ctpo.losses import Aggregation

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
ROWS_ALONE = [name for name, estimator in ESTIMATORS.items() if getattr(estimator.region, "scope", "") != "batch"]
TURNS = Estimator("turn_mean", RatioClip(0.2, 0.2))


def tensors(batch: Batch, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Keyword arguments of `policy_loss`, advantages by token."""
    return {
        "logp": torch.tensor(batch.logp, dtype=dtype),
        "behavior_logp": torch.tensor(batch.behavior_logp, dtype=dtype),
        "advantages": torch.tensor(batch.advantages, dtype=dtype),
        "mask": torch.tensor(batch.mask),
    }


def run(logp: torch.Tensor, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, gradient, metrics)."""
    logp = logp.detach().clone().requires_grad_()
    found = policy_loss(logp, *args, **options)
    found.loss.backward()
    assert logp.grad is not None
    assert logp.grad.dtype == logp.dtype
    assert not any(x.requires_grad for x in found.metrics.values())
    return found.loss.detach(), logp.grad, found.metrics


def ordinary(seed: int, shape: tuple[int, int] = (5, 24), *, dtype: torch.dtype = torch.float64, spread: float = 0.1):
    """(logp, behavior_logp, advantages by sequence, mask) of sequences with prompts, gaps and padding."""
    rng = np.random.default_rng(seed)
    behavior_logp = -rng.exponential(1.0, shape)
    logp = behavior_logp + spread * rng.standard_normal(shape)
    mask = (rng.random(shape) < 0.7) & (np.arange(shape[1]) < rng.integers(2, shape[1] + 1, (shape[0], 1)))
    mask[:, 0] = True
    advantages = rng.standard_normal(shape[0])
    return (*(torch.tensor(x, dtype=dtype) for x in (logp, behavior_logp, advantages)), torch.tensor(mask))


@st.composite
def options(draw, length: int) -> dict[str, Any]:
    """Estimator, aggregation and totals."""
    aggregation = draw(st.sampled_from([None, *AGGREGATIONS]))
    found: dict[str, Any] = {
        "estimator": draw(st.sampled_from([*ESTIMATORS, "luspo", "dr_grpo", TURNS])),
        "aggregation": aggregation,
    }
    if draw(st.booleans()):
        numbers = st.integers(1, 50)
        found["num_tokens"], found["num_sequences"] = draw(numbers), draw(numbers.map(torch.tensor))
        found["data_parallel_size"] = draw(st.integers(1, 4))
    scaled = effective_aggregation(found["estimator"], aggregation) == "seq-mean-token-sum-norm"
    if scaled and ("num_sequences" in found or draw(st.booleans())):
        found["horizon"] = draw(st.sampled_from([1, 7, 2.5]))
    return found


def effective_aggregation(estimator: str | Estimator, aggregation: str | None) -> str:
    named = {"luspo": "seq-mean-token-sum", "dr_grpo": "seq-mean-token-sum-norm"}
    default = named.get(estimator, "seq-mean-token-mean") if isinstance(estimator, str) else "seq-mean-token-mean"
    return default if aggregation is None else aggregation


def expected(batch: dict[str, torch.Tensor], weights: torch.Tensor | None, **chosen: Any) -> tuple[float, torch.Tensor]:
    """Loops over the estimator's coefficients, which have tests of their own."""
    name, turns = chosen.pop("estimator"), chosen.pop("turn_ids", None)
    estimator = name if isinstance(name, Estimator) else ctpo.zoo.RECIPES[name].estimator
    found = estimator.coefficients(**batch, turn_ids=turns)
    rows, shape = batch["mask"].tolist(), batch["mask"].shape
    by_token = batch["advantages"] if batch["advantages"].ndim == 2 else batch["advantages"][:, None].expand(shape)
    factor = torch.ones(shape) if weights is None else weights if weights.ndim == 2 else weights[:, None].expand(shape)
    chosen["aggregation"] = effective_aggregation(name, chosen["aggregation"])
    chosen["num_sequences"] = None if "num_sequences" not in chosen else int(chosen["num_sequences"])
    total, gradient = oracle_losses.loss(
        found.value.tolist(), found.weight.tolist(), by_token.tolist(), factor.tolist(), rows, **chosen
    )
    return total, torch.tensor(gradient, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(data=st.data())
def test_loss_and_gradient_equal_loops(dtype, data):
    batch = data.draw(batches(smallest=-3.0))
    chosen = data.draw(options(batch.mask.shape[1]))
    found = tensors(batch, dtype)
    if data.draw(st.booleans()):
        found["advantages"] = found["advantages"][:, 0]
        empty = ~found["mask"].any(-1)
        found["advantages"] = torch.where(
            empty, found["advantages"], found["advantages"].nan_to_num(1.0, 1.0, 1.0).clamp(-4, 4)
        )
    weights = None
    if data.draw(st.booleans()):
        weights = torch.rand(found["logp"].shape, dtype=dtype, generator=torch.Generator().manual_seed(3))
        weights = torch.where(found["mask"], weights, math.nan)
        if data.draw(st.booleans()):
            weights = torch.where(found["mask"].any(-1), weights.nan_to_num(2.0)[:, 0], math.nan)
    if chosen["estimator"] is TURNS:
        chosen["turn_ids"] = torch.tensor(batch.turn_ids)
    loss, gradient, _ = run(**found, weights=weights, **chosen)
    total, slope = expected(found, weights, **chosen)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    terms = 1.0 + float(slope.abs().sum())
    assert loss.dtype == dtype
    torch.testing.assert_close(gradient.double(), slope, rtol=rtol, atol=rtol)
    assert math.isclose(float(loss), total, rel_tol=rtol, abs_tol=rtol * 50 * terms)
    assert (gradient[~found["mask"]] == 0).all()


def test_gradient_is_the_coefficient_to_the_last_digit():
    """One sequence of a power of two tokens and weights that are powers of two: no factor rounds."""
    logp, behavior_logp, _, _ = ordinary(1, (1, 16))
    advantages = torch.tensor([-2.0], dtype=torch.float64)
    weights = torch.tensor([0.5], dtype=torch.float64)
    for name in ("grpo", "ctpo", "gspo", "cispo"):
        _, gradient, _ = run(logp, behavior_logp, advantages, estimator=name, weights=weights)
        weight = ESTIMATORS[name].coefficients(logp, behavior_logp, advantages).weight
        assert torch.equal(gradient, weight / 16)
        assert (weight == 0).any() or name == "cispo"


def without_window(level: Any) -> Estimator:
    return Estimator(level, form="unclipped")


# Estimators whose coefficient is the derivative of their value; stop-gradients take it apart elsewhere.
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    "estimator",
    ["reinforce", "grpo", "gspo", "sapo", without_window("token"), without_window("sequence_mean")],
    ids=str,
)
def test_gradcheck(estimator, aggregation):
    logp, behavior_logp, advantages, mask = ordinary(2, (3, 6), spread=0.3)
    if aggregation != "seq-mean-token-mean" and "sequence_mean" in str(ctpo.get_estimator(estimator).level):
        # sum_t of s_H A has H times the derivative of its mean, which the coefficient has: none is lost.
        aggregation = "seq-mean-token-sum"
    torch.autograd.gradcheck(
        lambda x: policy_loss(x, behavior_logp, advantages, mask, estimator=estimator, aggregation=aggregation).loss,
        logp.requires_grad_(),
    )


def test_second_derivatives_hold_the_coefficient_constant():
    logp, behavior_logp, advantages, mask = ordinary(3, (2, 5))
    logp.requires_grad_()
    loss = policy_loss(logp, behavior_logp, advantages, mask).loss
    (gradient,) = torch.autograd.grad(loss, logp, retain_graph=True)
    (slope,) = torch.autograd.grad(loss.square(), logp, create_graph=True)
    torch.testing.assert_close(slope, 2 * loss * gradient, rtol=1e-12, atol=0)
    (second,) = torch.autograd.grad(slope.sum(), logp)
    torch.testing.assert_close(second, 2 * gradient.sum() * gradient, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# What must not matter.


def same(a, b, *, rtol: float = 1e-12, metrics: bool = True) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=rtol, atol=rtol)
    torch.testing.assert_close(a[1], b[1], rtol=rtol, atol=rtol)
    if metrics:
        for name in a[2].keys() & b[2].keys():
            torch.testing.assert_close(a[2][name], b[2][name], rtol=1e-9, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_padding_does_not_matter(name):
    logp, behavior_logp, advantages, mask = ordinary(4)
    whole = run(logp, behavior_logp, advantages, mask, estimator=name)
    bad = torch.full((5, 3), math.nan, dtype=torch.float64)
    padded = [torch.cat([bad, x, -bad / 0], -1) for x in (logp, behavior_logp)]
    more = torch.nn.functional.pad(mask, (3, 3))
    loss, gradient, metrics = run(*padded, advantages, more, estimator=name)
    assert (gradient[:, :3] == 0).all()
    assert (gradient[:, -3:] == 0).all()
    same(whole, (loss, gradient[:, 3:-3], metrics))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_order_of_the_batch_does_not_matter(name, aggregation):
    values = ordinary(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    a = run(*values, estimator=name, aggregation=aggregation)
    loss, gradient, metrics = run(*(x[order] for x in values), estimator=name, aggregation=aggregation)
    same((a[0], a[1][order], a[2]), (loss, gradient, metrics))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_tool_gap_does_not_matter(name):
    """The same policy tokens with the tool's output cut out of the tensors."""
    logp, behavior_logp, _, _ = ordinary(6)
    mask = torch.ones_like(logp, dtype=torch.bool)
    mask[:, 5:9] = False
    keep = mask[0]
    tokens = torch.arange(24, dtype=torch.float64).expand(5, -1) / 10 - 1
    with_gap = run(logp, behavior_logp, tokens, mask, estimator=name, aggregation="token-mean")
    without = run(*(x[:, keep] for x in (logp, behavior_logp, tokens)), estimator=name, aggregation="token-mean")
    same((with_gap[0], with_gap[1][:, keep], with_gap[2]), without)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", ROWS_ALONE)
def test_micro_batches_add_up(name, aggregation):
    """And the mean over ranks, if each multiplies by their number."""
    values = ordinary(7)
    whole = run(*values, estimator=name, aggregation=aggregation)
    totals = {"num_tokens": int(values[-1].sum()), "num_sequences": torch.tensor(5)}
    if aggregation == "seq-mean-token-sum-norm":
        totals["horizon"] = values[0].shape[1]
    parts = [slice(0, 1), slice(1, 4), slice(4, 5)]
    for ranks in (1, 3):
        found = [
            run(*(x[rows] for x in values), estimator=name, aggregation=aggregation, data_parallel_size=ranks, **totals)
            for rows in parts
        ]
        loss = sum(part[0] for part in found) / ranks
        gradient = torch.cat([part[1] for part in found]) / ranks
        same(whole, (loss, gradient, {}))
    alone = [run(*(x[rows] for x in values), estimator=name, aggregation=aggregation)[0] for rows in parts]
    assert abs(float(sum(alone)) / 3 - float(whole[0])) > 1e-6  # what the totals are for


def test_a_step_without_policy_tokens_may_say_so():
    """As an all_reduce of counts does, before anyone knows."""
    logp, behavior_logp, advantages, mask = ordinary(9)
    nothing = torch.zeros_like(mask)
    for totals in ({"num_sequences": torch.tensor(0)}, {"num_tokens": torch.tensor(0), "aggregation": "token-mean"}):
        loss, gradient, _ = run(logp, behavior_logp, advantages, nothing, **totals)
        assert loss == 0
        assert gradient.count_nonzero() == 0
    whole = run(logp, behavior_logp, advantages, mask, num_sequences=int(mask.any(-1).sum()))
    same(whole, run(logp, behavior_logp, advantages, mask, num_sequences=np.int64(mask.any(-1).sum())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_narrows_nothing(dtype):
    values = [x.float() if x.is_floating_point() else x for x in ordinary(10)]
    with torch.autocast("cpu", dtype):
        narrow = run(*values)
    same(run(*values), narrow)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_equal_policies_give_the_gradient_of_reinforce(name):
    logp, _, advantages, mask = ordinary(8)
    _, gradient, metrics = run(logp, logp, advantages, mask, estimator=name, aggregation="token-mean")
    if name not in ("vespo",):
        torch.testing.assert_close(
            gradient, torch.where(mask, -advantages[:, None] / mask.sum(), 0.0), rtol=1e-12, atol=0
        )
    for key in ("log_ratio/mean", "log_ratio/std", "log_rho/mean_per_token", "log_rho/var_per_token", "clip/total"):
        assert metrics[key] == 0
    assert metrics["ess/sequence"] == pytest.approx(1, rel=1e-12)
    assert metrics["ess/position_1"] == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_positive_scaling_of_advantages_scales_loss_and_gradient(name):
    logp, behavior_logp, advantages, mask = ordinary(9)
    a = run(logp, behavior_logp, advantages, mask, estimator=name)
    b = run(logp, behavior_logp, 8 * advantages, mask, estimator=name)
    same((8 * a[0], 8 * a[1], a[2]), b)


def test_advantages_by_sequence_are_those_of_its_tokens():
    logp, behavior_logp, advantages, mask = ordinary(10)
    for name in ESTIMATORS:
        a = run(logp, behavior_logp, advantages, mask, estimator=name)
        same(a, run(logp, behavior_logp, advantages[:, None].expand(mask.shape), mask, estimator=name))
        w = torch.linspace(0, 2, 5, dtype=torch.float64)
        a = run(logp, behavior_logp, advantages, mask, estimator=name, weights=w)
        same(a, run(logp, behavior_logp, advantages, mask, estimator=name, weights=w[:, None].expand(mask.shape)))


def test_leading_dimensions():
    logp, behavior_logp, advantages, mask = ordinary(11, (6, 8))
    for name in ESTIMATORS:
        a = run(logp, behavior_logp, advantages, mask, estimator=name)
        b = run(
            *(x.reshape(2, 3, 8) for x in (logp, behavior_logp)),
            advantages.reshape(2, 3),
            mask.reshape(2, 3, 8),
            estimator=name,
        )
        same(a, (b[0], b[1].reshape(6, 8), b[2]))
    a = run(logp[:1], behavior_logp[:1], advantages[:1], mask[:1])
    b = run(logp[0], behavior_logp[0], advantages[0], mask[0])
    same((a[0], a[1][0], a[2]), b)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_left_gives_zero(name, aggregation):
    bad = torch.tensor([[math.nan, math.inf], [-math.inf, 1e30]])
    mask = torch.zeros(2, 2, dtype=torch.bool)
    for advantages in (bad, bad[0]):
        for weights in (None, bad, bad[1]):
            loss, gradient, metrics = run(
                bad, bad, advantages, mask, estimator=name, aggregation=aggregation, weights=weights
            )
            assert loss == 0
            assert (gradient == 0).all()
            assert all(x == 0 for x in metrics.values())
    for shape in ((0, 3), (3, 0), (0,)):
        empty = torch.zeros(shape)
        loss, gradient, metrics = run(empty, empty, torch.ones(shape[:-1]), estimator=name, aggregation=aggregation)
        assert loss == 0
        assert gradient.shape == shape
        assert all(x == 0 for x in metrics.values())


def test_zero_takes_no_gradient_from_an_overflowed_ratio():
    logp, behavior_logp = torch.zeros(2, 1), torch.full((2, 1), -200.0)
    loss, gradient, _ = run(logp, behavior_logp, torch.tensor([0.0, 0.0]), estimator="sequence")
    assert (loss, gradient.tolist()) == (0, [[0.0], [0.0]])
    weights = torch.tensor([0.0, 1.0])
    loss, gradient, _ = run(logp, torch.tensor([[-200.0], [0.0]]), torch.ones(2), estimator="sequence", weights=weights)
    assert (loss, gradient.tolist()) == (-0.5, [[0.0], [-0.5]])


# ---------------------------------------------------------------------------------------------------------------------
# Number formats.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(batch=batches(smallest=-3.0))
def test_half_precision_is_computed_in_float32(dtype, batch):
    values = tensors(batch, dtype)
    loss, gradient, metrics = run(**values)
    wide_loss, wide_gradient, wide_metrics = run(**{k: x if k == "mask" else x.float() for k, x in values.items()})
    assert loss.dtype == torch.float32
    assert torch.equal(loss, wide_loss)
    assert torch.equal(gradient, wide_gradient.to(dtype))
    for name, value in metrics.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, wide_metrics[name])


def test_autocast_does_not_matter():
    for dtype in (torch.float32, torch.bfloat16):
        values = [x if x.dtype == torch.bool else x.to(dtype) for x in ordinary(22, (4, 100))]
        plain = run(*values)
        with torch.autocast("cpu", torch.bfloat16):
            found = run(*values)
        assert torch.equal(found[0], plain[0])
        assert torch.equal(found[1], plain[1])
        assert found[2] == plain[2]


def test_no_less_accurate_in_half_precision_than_autograd():
    """float64 as truth, the usual loss in bfloat16, ours: from the same bfloat16 log-probabilities."""
    logp, behavior_logp, advantages, mask = ordinary(12, (8, 512), spread=0.05)
    half = [x.to(torch.bfloat16) for x in (logp, behavior_logp, advantages)]

    # CTPO without limits, in the window of the recipe; written with autograd through the current token.
    def usual(logp, behavior_logp, advantages):
        d = torch.where(mask, logp - behavior_logp, torch.zeros_like(logp))
        log_rho = d.detach().cumsum(-1) + d - d.detach()
        width = mask.cumsum(-1).clamp(min=1).to(logp.dtype) ** 0.5
        w, a = log_rho.exp(), advantages[:, None]
        kept = torch.minimum(w * a, torch.clamp(w, (-0.025 * width).exp(), (0.05 * width).exp()) * a)
        kept = torch.where(a < 0, torch.maximum(kept, (0.05 * width).exp() * a), kept)
        return -(torch.where(mask, kept, torch.zeros_like(kept)).sum(-1) / mask.sum(-1)).mean()

    def errors(loss, gradient):
        # Of the loss, of the whole gradient, and its mean: drifts to one side show in the last.
        off = gradient.double() - truth[1]
        return abs(float(loss) - float(truth[0])), float(off.norm()), abs(float(off.sum()))

    exact = [x.double() for x in half]
    exact[0].requires_grad_()
    reference = usual(*exact)
    truth = (reference.detach(), torch.autograd.grad(reference, exact[0])[0])
    same(truth, run(*exact, mask)[:2], metrics=False)
    half[0].requires_grad_()
    naive = usual(*half)
    naive_errors = errors(naive.detach(), torch.autograd.grad(naive, half[0])[0])
    ours = errors(*run(*half, mask)[:2])
    for own, other in zip(ours, naive_errors, strict=True):
        assert own <= other
    # Rounding of the returned gradient is all that is left: half a unit in the last of 8 bits.
    assert ours[1] <= 2**-8 * float(truth[1].norm())
    assert ours[0] <= 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Metrics.

METRIC_ESTIMATORS = {
    "ctpo": Estimator("cumulative", PositionClip(0.025, 0.05, 0.5, dual=0.05)),
    "grpo": Estimator("token", RatioClip(0.2, 0.2)),
    "drift": Estimator("cumulative", PositionClip(0.025, 0.05, 0.5, dual=None, drift=0.1)),
    "gspo": Estimator("sequence_mean", RatioClip(0.01, 0.02, dual=1.1)),
    "cispo": Estimator("token", RatioClip(0.3, 0.4), form="cispo"),
}


def by_loops(estimator: Estimator, batch: Batch) -> dict[str, float]:
    """Metrics from lists; flags come from `coefficients`, which has tests of its own."""
    clip = estimator.clip
    found = estimator.coefficients(batch.logp, batch.behavior_logp, batch.advantages, batch.mask)
    raw, moved, rho = [], [], []
    for i, mask in enumerate(batch.mask.tolist()):
        d = oracle.token_log_ratios(batch.logp[i].tolist(), batch.behavior_logp[i].tolist(), mask)
        limited = [min(max(x, -20.0), 20.0) for x in d]
        sums = d if estimator.level == "sequence_mean" else limited
        logs = oracle.level(sums, mask, estimator.level)
        raw.append(logs)
        rho.append(oracle.level(d, mask, "cumulative"))
        row = []
        for t, (x, place) in enumerate(zip(logs, oracle.positions(mask), strict=True)):
            if isinstance(clip, RatioClip):
                low, high, dual = oracle.ratio_bounds(place, clip.low, clip.high, clip.dual)
            else:
                low, high, dual = oracle.position_bounds(place, clip.low, clip.high, clip.power, clip.dual, clip.drift)
            x = x if estimator.level == "token" else min(x, 10.0)
            acting = oracle.bound_window(estimator.form, batch.advantages[i][t], x, low, high, dual)
            row.append({"low": low, "high": high, "dual": dual, None: x}[acting])
        moved.append(row)
    flags = {name: getattr(found, f"clipped_{name}").tolist() for name in ("low", "high", "dual")}
    flags |= {name: getattr(found, name).tolist() for name in ("rejected", "saturated")}
    return oracle_losses.metrics(raw, moved, rho, batch.advantages.tolist(), flags, batch.mask.tolist())


def check_metrics(estimator: Estimator, batch: Batch, *, by_sequence: bool = False) -> None:
    values = tensors(batch)
    if by_sequence:
        batch = dataclasses.replace(batch, advantages=np.broadcast_to(batch.advantages[:, :1], batch.mask.shape))
        values["advantages"] = values["advantages"][:, 0]
    _, _, metrics = run(**values, estimator=estimator)
    wanted = by_loops(estimator, batch)
    assert metrics.keys() == wanted.keys()
    for name, value in metrics.items():
        assert value.shape == ()
        # A spread from sums of squares: digits of the mean are lost in it.
        atol = 1e-6 * (1 + abs(wanted["log_ratio/mean"])) if name.endswith("std") else 1e-9 * (1 + abs(wanted[name]))
        if name == "log_rho/var_per_token":
            atol = 1e-9 * (1 + wanted[name] + len(batch.mask[0]) * wanted["log_rho/mean_per_token"] ** 2)
        assert float(value) == pytest.approx(wanted[name], rel=1e-9, abs=atol), name


@pytest.mark.parametrize("name", METRIC_ESTIMATORS)
@given(batch=batches(zero_ratios=False))
def test_metrics_equal_loops(name, batch):
    check_metrics(METRIC_ESTIMATORS[name], batch)


@pytest.mark.parametrize("length", [15, 16, 63, 64, 65, 300])
@pytest.mark.parametrize("spread", [0.01, 0.3, 4.0])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.05])
def test_metrics_of_long_sequences_equal_loops(length, spread, share):
    """Several buckets, some of which begin inside a chunk, at its end, or nowhere; weights hundreds of nats apart."""
    rng = np.random.default_rng(13)
    shape = (4, length)
    behavior_logp = -rng.exponential(1.0, shape)
    logp = behavior_logp + spread * rng.standard_normal(shape)
    mask = (rng.random(shape) < share) & (np.arange(length) < [[length], [length // 2], [length - 1], [3]])
    advantages = rng.integers(-1, 2, shape).astype(float)
    bad = np.where(mask, 0.0, np.nan)
    batch = Batch(logp + bad, behavior_logp + bad, advantages + bad, mask, np.zeros(shape, int))
    for name in ("ctpo", "grpo", "gspo"):
        check_metrics(METRIC_ESTIMATORS[name], batch)
    if share == 1.0:
        full = dataclasses.replace(
            batch, logp=logp, behavior_logp=behavior_logp, advantages=advantages, mask=mask | True
        )
        check_metrics(METRIC_ESTIMATORS["ctpo"], full)
        values = tensors(full)
        _, _, metrics = run(**values)
        del values["mask"]
        for key, value in run(**values)[2].items():
            torch.testing.assert_close(value, metrics[key], rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", METRIC_ESTIMATORS)
def test_metrics_with_advantages_by_sequence(name):
    """Masked places then have an advantage, which must not move what stands there into a window."""
    logp, behavior_logp, advantages, mask = (x.numpy() for x in ordinary(23, (6, 40)))
    advantages = np.repeat(np.where([True, True, False, True, True, True], advantages, 0.0)[:, None], 40, axis=1)
    check_metrics(METRIC_ESTIMATORS[name], Batch(logp, behavior_logp, advantages, mask, mask), by_sequence=True)


@pytest.mark.parametrize("before", [0, 14, 15, 16])
def test_a_bucket_begins_where_a_chunk_does(before):
    """The first 32 places have that many policy tokens, the rest is all policy tokens."""
    rng = np.random.default_rng(24)
    mask = np.arange(100) >= 32
    mask[:before] = True
    behavior_logp = -rng.exponential(1.0, (1, 100))
    logp = behavior_logp + rng.standard_normal((1, 100))
    check_metrics(METRIC_ESTIMATORS["grpo"], Batch(logp, behavior_logp, np.ones((1, 100)), mask[None], mask[None]))


def test_drift_and_variance_of_a_random_walk():
    """Log-normal ratios of mean 1: variance sigma^2 per token, mean -sigma^2 / 2; z-scores from the sequences."""
    rng, sigma, shape = np.random.default_rng(14), 0.05, (400, 256)
    d = torch.tensor(-(sigma**2) / 2 + sigma * rng.standard_normal(shape))
    zero = torch.zeros(shape, dtype=torch.float64)
    found = policy_loss(d, zero, torch.ones(400, dtype=torch.float64), estimator="grpo").metrics
    t = torch.arange(1.0, 257.0, dtype=torch.float64)
    log_rho = d.cumsum(-1)

    def z(by_sequence, truth):
        return float((by_sequence.mean() - truth) / (by_sequence.std() / math.sqrt(len(by_sequence))))

    means, variances = (log_rho / t).mean(-1), ((log_rho + sigma**2 / 2 * t) ** 2 / t).mean(-1)
    assert abs(z(means, -(sigma**2) / 2)) < 5.2  # two-sided 1e-7 for each of two
    assert abs(z(variances, sigma**2)) < 5.2
    assert abs(z(variances, 1.5 * sigma**2)) > 5.2  # what it would miss
    assert float(found["log_rho/mean_per_token"]) == pytest.approx(float(means.mean()), rel=1e-9)
    assert float(found["log_rho/var_per_token"]) == pytest.approx(float(variances.mean()), rel=0.02)


def test_ratios_of_zero_are_told_by_infinities():
    logp = torch.tensor([[0.0, -math.inf, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    estimator = Estimator("cumulative", PositionClip(), max_token_log_ratio=None)
    _, gradient, metrics = run(logp, torch.zeros_like(logp), torch.ones(2, dtype=torch.float64), estimator=estimator)
    assert gradient.isfinite().all()
    assert metrics["log_ratio/mean"] == metrics["log_rho/mean_per_token"] == -math.inf
    assert metrics["log_ratio/std"] == metrics["log_rho/var_per_token"] == math.inf
    assert metrics["ess/sequence"] == 0.5
    assert metrics["ess/position_1"] == pytest.approx(4 / 6)
    assert not any(x.isnan() for x in metrics.values())


def test_rejected_and_saturated_tokens_are_counted():
    logp, behavior_logp = torch.tensor([[-0.1, -0.1, -25.0, -1.0]]), torch.tensor([[-2.0, -0.1, -1.0, -1.0]])
    _, gradient, metrics = run(logp, behavior_logp, torch.tensor([1.0]), estimator="dppo_tv")
    assert metrics["clip/rejected"] == 0.25
    assert metrics["clip/total"] == 0
    assert gradient[0, 0] == 0
    assert run(logp, behavior_logp, torch.tensor([1.0]))[2]["saturated"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is read back, and nothing is derived.


class NoReading(TorchDispatchMode):
    """Fails at operators that an accelerator would have to wait for."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in self.FORBIDDEN, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_no_host_synchronization(name):
    values = ordinary(15)
    for mask in (values[-1], None):
        logp = values[0].clone().requires_grad_()
        with NoReading():
            found = policy_loss(
                logp, *values[1:3], mask, estimator=name, num_tokens=torch.tensor(40), num_sequences=5, validate=False
            )
            found.loss.backward()
        same(
            (found.loss, logp.grad, found.metrics),
            run(logp, *values[1:3], mask, estimator=name, num_tokens=40, num_sequences=5),
        )
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReading():
        policy_loss(*values, estimator=name)  # looks at values in CPU memory


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own way to trace
@pytest.mark.parametrize("name", ["ctpo", "grpo", "gspo", "cispo", "minpro", "dppo_kl", "lookahead"])
def test_compiled_without_graph_breaks(name):
    values = ordinary(16, (4, 70), dtype=torch.float32)
    torch.compiler.reset()  # whatever has been compiled counts towards a limit
    compiled = torch.compile(policy_loss, fullgraph=True, backend="aot_eager")
    for mask in (values[-1], None):
        arguments = (*values[:3], mask)
        logp = values[0].clone().requires_grad_()
        found = compiled(logp, *values[1:3], mask, estimator=name)
        found.loss.backward()
        same((found.loss.detach(), logp.grad, found.metrics), run(*arguments, estimator=name), rtol=1e-6, metrics=False)
        plain = policy_loss(*arguments, estimator=name).metrics
        for key, value in found.metrics.items():
            torch.testing.assert_close(value, plain[key], rtol=1e-4, atol=1e-5, msg=key)


def test_compiled_by_inductor():
    """In a process of its own, as the compiler leaves threads behind."""
    if " " in torch.__file__:
        pytest.skip("torch's C++ build does not quote paths, and the path of this installation has a space")
    code = """
import torch, ctpo
torch.manual_seed(0)
behavior = -torch.rand(4, 70)
mask = torch.rand(4, 70) < 0.8
logp = torch.where(mask, behavior + 0.1 * torch.randn(4, 70), torch.nan)
compiled, results = torch.compile(ctpo.policy_loss, fullgraph=True), []
for function in (compiled, ctpo.policy_loss):
    x = logp.clone().requires_grad_()
    found = function(x, behavior, torch.tensor([1.0, -1.0, 0.0, 2.0]), mask)
    found.loss.backward()
    results.append((found.loss.detach(), x.grad, *found.metrics.values()))
for a, b in zip(*results, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
"""
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert found.returncode == 0, found.stderr[-2000:]


def test_only_logp_has_a_gradient():
    logp, behavior_logp, advantages, mask = ordinary(17)
    weights = torch.rand(5, dtype=torch.float64)
    plain = run(logp, behavior_logp, advantages, mask, weights=weights)
    constants = [x.clone().requires_grad_() for x in (behavior_logp, advantages, weights)]
    found = run(logp, constants[0], constants[1], mask, weights=constants[2])
    assert all(x.grad is None for x in constants)
    same(plain, found)
    assert not policy_loss(logp, behavior_logp, advantages, mask).loss.requires_grad
    with torch.no_grad():
        assert not policy_loss(logp.requires_grad_(), behavior_logp, advantages, mask).loss.requires_grad


def test_inputs_are_left_alone():
    values = ordinary(18)
    before = copy.deepcopy(values)
    run(*values, weights=values[0].abs(), turn_ids=None)
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))


def test_packed_batches_are_those_of_their_rows():
    logp, behavior_logp, advantages, mask = ordinary(19, (3, 9))
    lengths = [4, 9, 6]
    inside = torch.arange(9) < torch.tensor(lengths)[:, None]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    weights = torch.rand(3, 9, dtype=torch.float64)
    tokens = behavior_logp.exp()
    for name in (*ESTIMATORS, TURNS):
        turns = torch.arange(9).expand(3, 9) // 3 if name is TURNS else None
        chosen: dict[str, Any] = {"estimator": name}
        for a, w in ((advantages, None), (tokens, weights), (advantages, weights[:, 0])):
            rows = run(logp, behavior_logp, a, mask & inside, weights=w, turn_ids=turns, **chosen)
            for shape in ((19,), (1, 19)):
                pack = [
                    x if x is None or x.ndim == 1 else x[inside].reshape(shape)
                    for x in (logp, behavior_logp, a, mask, w, turns)
                ]
                packed = run(*pack[:4], weights=pack[4], turn_ids=pack[5], cu_seqlens=cu_seqlens, **chosen)
                same((rows[0], rows[1][inside].reshape(shape), rows[2]), packed)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input.


def good() -> dict[str, Any]:
    logp, behavior_logp, advantages, mask = ordinary(20, (2, 3), dtype=torch.float32)
    return {"logp": logp, "behavior_logp": behavior_logp, "advantages": advantages, "mask": mask}


NAN = torch.tensor([[math.nan, 0.0, 0.0], [0.0, 0.0, 0.0]])
BAD: list[tuple[dict[str, Any], str]] = [
    ({"logp": np.zeros((2, 3))}, "logp must be a torch.Tensor; got ndarray"),
    ({"behavior_logp": [[0.0] * 3] * 2}, "behavior_logp must be a torch.Tensor; got list"),
    ({"advantages": None}, "advantages must be a torch.Tensor; got NoneType"),
    ({"mask": np.ones((2, 3), bool)}, "mask must be a torch.Tensor; got ndarray"),
    ({"weights": 1.0}, "weights must be a torch.Tensor; got float"),
    ({"behavior_logp": torch.zeros(2, 3, device="meta")}, "behavior_logp must be on the device of logp, cpu; got meta"),
    ({"behavior_logp": torch.zeros(2, 4)}, r"behavior_logp must have the shape of logp, \(2, 3\); got \(2, 4\)"),
    ({"logp": torch.zeros(2, 3, dtype=torch.int64)}, "logp must have a real floating-point dtype; got torch.int64"),
    ({"advantages": torch.zeros(3)}, r"advantages must have the shape of logp, \(2, 3\), or one value per sequence"),
    ({"advantages": torch.zeros(2, dtype=torch.complex64)}, "advantages must have a real dtype"),
    ({"mask": torch.ones(2, 3)}, "mask must have dtype bool, True at policy tokens; got torch.float32"),
    ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask must have the shape of logp, \(2, 3\); got \(3,\)"),
    ({"weights": torch.ones(3)}, r"weights must have the shape of logp, \(2, 3\), or one value per sequence"),
    ({"weights": torch.ones(2, dtype=torch.complex64)}, "weights must have a real dtype"),
    (
        {"weights": torch.tensor([1.0, math.nan])},
        r"weights must be finite in every sequence .* got nan at index \(1, 0\)",
    ),
    ({"weights": NAN}, r"weights must be finite at every policy token; got nan at index \(0, 0\)"),
    ({"logp": NAN}, r"logp must be a number below \+inf at every policy token; got nan at index \(0, 0\)"),
    ({"logp": -NAN / 0}, "logp must be a number below"),
    ({"behavior_logp": NAN - torch.inf}, "behavior_logp must be finite at every policy token"),
    ({"advantages": NAN}, "advantages must be finite at every policy token; got nan"),
    ({"advantages": torch.tensor([1.0, math.inf])}, "advantages must be finite in every sequence"),
    ({"estimator": "ctpoo"}, r"estimator must be one of .*; got 'ctpoo' \(did you mean 'ctpo'\?\)"),
    ({"estimator": None}, "estimator must be one of .*; got None"),
    ({"aggregation": "seq_mean_token_mean"}, r"aggregation must be one of .* \(did you mean 'seq-mean-token-mean'\?\)"),
    ({"turn_ids": torch.zeros(2, 3, dtype=torch.int64)}, "turn_ids must be None at level 'cumulative'"),
    ({"estimator": TURNS}, "turn_ids must be an integer array at level 'turn_mean'; got None"),
    ({"estimator": TURNS, "turn_ids": torch.zeros(2, 3)}, "turn_ids must have an integer dtype; got torch.float32"),
    ({"num_sequences": 0}, "num_sequences must be a positive integer, or a tensor of shape (); got 0"),
    ({"num_sequences": 2.0}, "num_sequences must be a positive integer, or a tensor of shape (); got 2.0"),
    ({"num_sequences": True}, "num_sequences must be a positive integer"),
    ({"num_sequences": torch.tensor(-1)}, "num_sequences must be a finite number of at least 0; got -1"),
    ({"num_sequences": torch.tensor(math.nan)}, "num_sequences must be a finite number of at least 0; got nan"),
    ({"num_sequences": torch.tensor(math.inf), "validate": True}, "num_sequences must be a finite .* got inf"),
    (
        {"estimator": "decoupled_ppo"},
        "estimator must have coefficients of its own; got 'decoupled_ppo': estimator \"grpo\" with",
    ),
    ({"num_sequences": torch.tensor([2])}, r"num_sequences must be .* got shape (1,), torch.int64"),
    ({"num_tokens": torch.tensor(True), "num_sequences": 2}, "num_tokens must be .* got shape (), torch.bool"),
    ({"num_tokens": 6}, "num_sequences must be given for the aggregation 'seq-mean-token-mean'; got num_tokens only"),
    ({"num_sequences": 2, "aggregation": "token-mean"}, "num_tokens must be given for the aggregation 'token-mean'"),
    ({"data_parallel_size": 2}, "num_sequences, the total of all ranks, must be given if data_parallel_size > 1"),
    ({"data_parallel_size": 0}, "data_parallel_size must be a positive integer; got 0"),
    ({"data_parallel_size": 1.0}, "data_parallel_size must be a positive integer; got 1.0"),
    ({"horizon": 8}, "horizon must be None for an aggregation other than 'seq-mean-token-sum-norm'; got 8"),
    ({"horizon": 0, "aggregation": "seq-mean-token-sum-norm"}, "horizon must be a positive finite number; got 0"),
    ({"horizon": math.nan, "estimator": "dr_grpo"}, "horizon must be a positive finite number; got nan"),
    ({"horizon": "8", "estimator": "dr_grpo"}, "horizon must be a positive finite number; got '8'"),
    ({"validate": 1}, "validate must be True, False or None; got 1"),
    ({"max_seqlen": 3}, "max_seqlen must be None without cu_seqlens; got 3"),
    ({"cu_seqlens": torch.tensor([0, 3])}, r"logp must have shape \(N,\) or \(1, N\) with cu_seqlens"),
    ({"process_group": 1}, "process_group"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[f"{i}-{next(iter(c))}" for i, (c, _) in enumerate(BAD)])
def test_bad_input(changes, message):
    arguments = good() | changes
    if "mask" not in changes:
        arguments["mask"] = torch.ones(2, 3, dtype=torch.bool)
    message = (
        message.replace("()", r"\(\)").replace("(1,)", r"\(1,\)")
        if "must be a positive" in message or "got shape" in message
        else message
    )
    with pytest.raises(ValueError, match=message):
        policy_loss(**arguments)


def test_horizon_has_no_default_where_no_tensor_has_the_length():
    for partial in ({"cu_seqlens": torch.tensor([0, 3])}, {"num_sequences": 4}):
        with pytest.raises(ValueError, match="horizon must be given with process_group, cu_seqlens or num_sequences"):
            policy_loss(*(torch.zeros(3),) * 3, estimator="dr_grpo", **partial)


def test_swapped_policies_are_noticed():
    logp, behavior_logp, advantages, mask = ordinary(11)
    with pytest.raises(ValueError, match="behavior_logp must be a constant, and logp what is trained"):
        policy_loss(behavior_logp, logp.requires_grad_(), advantages, mask)


def test_values_are_looked_at_as_asked():
    bad = good() | {"logp": NAN, "mask": torch.ones(2, 3, dtype=torch.bool)}
    assert policy_loss(**bad, validate=False).loss.isnan()
    for validate in (None, True):
        with pytest.raises(ValueError, match="logp must be"):
            policy_loss(**bad, validate=validate)
    fine = good() | {"logp": torch.full((2, 3), -math.inf), "num_sequences": torch.tensor(-1)}
    assert policy_loss(**fine, validate=False).loss == policy_loss(**fine | {"num_sequences": 1}, validate=True).loss


@pytest.mark.parametrize("name", ["logp", "behavior_logp", "advantages", "weights"])
def test_values_are_looked_at_on_accelerators_if_asked(name, monkeypatch):
    """A CPU that counts as an accelerator: nothing is looked at unless asked, and then once if all is well."""
    import ctpo._arrays
    import ctpo.losses

    for module in (ctpo._arrays, ctpo.losses):
        monkeypatch.setattr(module, "has_readable_values", lambda x: False)
    values = good() | {"weights": torch.ones(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool)}
    policy_loss(**values, validate=True)
    values[name] = NAN
    policy_loss(**values)
    with pytest.raises(ValueError, match=f"{name} must be"):
        policy_loss(**values, validate=True)
    values[name] = values[name].nan_to_num(0.0)
    values["logp"] = torch.full((2, 3), -math.inf)  # worth a second look, and fine
    policy_loss(**values, validate=True)
    count = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal count
            count += func.__name__.startswith("_local_scalar_dense")
            return func(*args, **(kwargs or {}))

    with Counting():
        policy_loss(**good(), validate=True)
    assert count == 1


def test_names_of_the_aggregations():
    assert set(AGGREGATIONS) == set(Aggregation.__args__)
    assert {recipe.aggregation for recipe in ctpo.zoo.RECIPES.values()} <= set(AGGREGATIONS)
    values = ordinary(21)
    for name, base in (("luspo", "gspo"), ("dr_grpo", "grpo")):
        assert ctpo.zoo.RECIPES[name].estimator == ESTIMATORS[base]
        aggregation = effective_aggregation(name, None)
        assert ctpo.zoo.RECIPES[name].aggregation == aggregation
        same(run(*values, estimator=name), run(*values, estimator=base, aggregation=aggregation))
        same(
            run(*values, estimator=name, aggregation="token-mean"),
            run(*values, estimator=base, aggregation="token-mean"),
        )


def test_torch_is_imported_on_first_use_only():
    code = "import sys, ctpo; assert 'torch' not in sys.modules; ctpo.policy_loss; assert 'torch' in sys.modules"
    with warnings.catch_warnings():
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="has no attribute 'policy_los'"):
        getattr(ctpo, "policy" + "_los")
