"""`policy_loss` against the loss of TRL's own `GRPOTrainer`: value and gradient, for every loss type that it has.

The trainer runs its own `_compute_loss` (`trl_harness`). Both sides see the same log-probabilities at policy tokens;
at masked places TRL sees ordinary numbers and `policy_loss` sees NaN, so that agreement also says that NaN does not
matter. Our numerical limits are switched off: TRL has none. Where TRL differs by design or is wrong, the last part of
this file says so, one test for each difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest.mock import PropertyMock, patch

import numpy as np
import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from strategies import Batch, batches
from trl_harness import Result, tiny_model, trainer, trl_loss, trl_parameter_gradients, trl_rollout_batch

import ctpo
from ctpo import Estimator, PositionClip, RatioClip, get_estimator, rollout_correction
from ctpo.clipping import GammaWeight, SigmoidGate
from ctpo.regions import SequenceRegion

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
UNLIMITED: dict[str, Any] = {"max_log_ratio": None, "max_token_log_ratio": None}
HORIZON = 16  # the trainer's max_completion_length

AGGREGATIONS = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "vespo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "luspo": "seq-mean-token-sum",
}
LEVELS = {"token": "token", "sequence": "sequence_mean"}
WINDOWS: list[tuple[dict[str, Any], RatioClip]] = [
    ({}, RatioClip(0.2, 0.2)),
    ({"epsilon": 0.125, "epsilon_high": 0.3}, RatioClip(0.125, 0.3)),
    ({"epsilon_high": 0.28, "delta": 2.0}, RatioClip(0.2, 0.28, dual=2.0)),
]

SIGMOID_GATES: list[tuple[dict[str, Any], SigmoidGate]] = [
    ({}, SigmoidGate(1.0, float(np.float32(1.05)))),  # see the test of TRL's temperatures
    ({"sapo_temperature_pos": 3.0, "sapo_temperature_neg": 0.5}, SigmoidGate(3.0, 0.5)),
]
GAMMA_WEIGHTS: list[tuple[dict[str, Any], GammaWeight]] = [
    ({}, GammaWeight(2.0, 3.0, 3.0, 2.0)),
    (
        {"vespo_k_pos": 2.5, "vespo_lambda_pos": 1.5, "vespo_k_neg": 4.0, "vespo_lambda_neg": 0.5},
        GammaWeight(2.5, 1.5, 4.0, 0.5),
    ),
]


class Pair(NamedTuple):
    """Options of TRL's configuration, and the estimator that should be the same."""

    options: dict[str, Any]
    estimator: Estimator

    @property
    def aggregation(self) -> str:
        return AGGREGATIONS[self.options["loss_type"]]

    def __str__(self) -> str:
        return "-".join(str(value) for value in self.options.values())


def pairs() -> list[Pair]:
    found = []
    for trl_level, level in LEVELS.items():
        for changes, clip in WINDOWS:
            estimator = Estimator(level, clip, **UNLIMITED)
            for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
                options = {"loss_type": loss_type, "importance_sampling_level": trl_level, **changes}
                found.append(Pair(options, estimator))
        # The bound is epsilon_high itself, where every other loss type has 1 + epsilon_high.
        for bound in (5.0, 1.25):
            options = {"loss_type": "cispo", "importance_sampling_level": trl_level, "epsilon_high": bound}
            found.append(
                Pair(options, get_estimator("cispo", level=level, clip=RatioClip(1.0, bound - 1), **UNLIMITED))
            )
        for changes, gate in SIGMOID_GATES:
            options = {"loss_type": "sapo", "importance_sampling_level": trl_level, **changes}
            found.append(Pair(options, get_estimator("sapo", level=level, clip=gate, **UNLIMITED)))
        # At both levels, the ratio of the whole sequence.
        for changes, weight in GAMMA_WEIGHTS:
            options = {"loss_type": "vespo", "importance_sampling_level": trl_level, **changes}
            found.append(Pair(options, get_estimator("vespo", clip=weight, **UNLIMITED)))
    return found


PAIRS = pairs()


def named(loss_type: str, level: str = "token") -> Pair:
    """The first pair of a loss type and level."""
    return next(
        pair
        for pair in PAIRS
        if (pair.options["loss_type"], pair.options["importance_sampling_level"]) == (loss_type, level)
    )


def policy_loss(
    logp: torch.Tensor, behavior_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, **options: Any
) -> Result:
    """`ctpo.policy_loss` and its gradient."""
    logp = logp.detach().clone().requires_grad_()
    found = ctpo.policy_loss(logp, behavior_logp, advantages, mask, **options)
    found.loss.backward()
    assert logp.grad is not None
    return Result(found.loss.detach(), logp.grad, found.metrics)


def denominators(pair: Pair, mask: torch.Tensor) -> dict[str, Any]:
    """TRL's denominators of one micro-batch: it counts rows without policy tokens."""
    if pair.aggregation == "token-mean":
        return {"num_tokens": max(1, int(mask.sum()))}
    counted = {"num_sequences": len(mask)}
    return counted | {"horizon": HORIZON} if pair.aggregation == "seq-mean-token-sum-norm" else counted


def assert_same(ours: Result, theirs: Result) -> None:
    tolerance = TOLERANCE[theirs.gradient.dtype]
    torch.testing.assert_close(ours.gradient, theirs.gradient, rtol=tolerance, atol=tolerance)
    # Terms may cancel; those that are clipped are of the size of an advantage.
    terms = 1.0 + float(theirs.gradient.abs().sum())
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=tolerance, atol=tolerance * terms)


def tensors(batch: Batch, dtype: torch.dtype, *, advantages: str) -> tuple[torch.Tensor, ...]:
    """(logp, behavior_logp, advantages, mask) of a batch; one advantage per "sequence" or per "token"."""
    logp, behavior_logp, by_token = (
        torch.tensor(array, dtype=dtype) for array in (batch.logp, batch.behavior_logp, batch.advantages)
    )
    by_sequence = by_token[:, 0]
    return logp, behavior_logp, by_token if advantages == "token" else by_sequence, torch.tensor(batch.mask)


def with_nan_outside(mask: torch.Tensor, *arrays: torch.Tensor) -> list[torch.Tensor]:
    """The arrays with NaN at masked places, and for sequences without policy tokens."""
    return [array.masked_fill(~mask if array.ndim == mask.ndim else ~mask.any(-1), math.nan) for array in arrays]


def as_in_trl(pair: Pair, values: Sequence[torch.Tensor], **options: Any) -> Result:
    """Our result with TRL's aggregation and denominators, and NaN at masked places."""
    *arrays, mask = values
    options = {"estimator": pair.estimator, "aggregation": pair.aggregation, **denominators(pair, mask), **options}
    return policy_loss(*with_nan_outside(mask, *arrays), mask, **options)


def random_values(seed: int, spread: float = 0.3) -> tuple[torch.Tensor, ...]:
    """Four sequences of up to ten tokens with tool gaps and padding, one advantage each."""
    rng = np.random.default_rng(seed)
    behavior_logp = -rng.exponential(1.0, (4, 10))
    logp = behavior_logp + spread * rng.standard_normal((4, 10))
    mask = (rng.random((4, 10)) < 0.7) & (np.arange(10) < [[10], [8], [6], [9]])
    advantages = np.array([1.0, -0.5, -1.5, 2.0])
    return tuple(torch.tensor(array) for array in (logp, behavior_logp, advantages, mask))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", AGGREGATIONS)
@given(data=st.data())
def test_loss_and_gradient(loss_type: str, level: str, data: st.DataObject) -> None:
    # Where a token's log-ratio leaves +-20, TRL's "vespo" differs: see the test of its limits.
    smallest = -20.0 if loss_type == "vespo" else -40.0
    batch = data.draw(batches(zero_ratios=False, garbage=False, smallest=smallest))
    # At the sequence level TRL's coefficient averages per-token advantages: see the test of that name.
    by_token = level == "token" and data.draw(st.booleans())
    for pair in PAIRS:
        if (pair.options["loss_type"], pair.options["importance_sampling_level"]) == (loss_type, level):
            note(str(pair))
            for dtype in TOLERANCE:
                values = tensors(batch, dtype, advantages="token" if by_token else "sequence")
                assert_same(as_in_trl(pair, values), trl_loss(*values, **pair.options))


@pytest.mark.parametrize("clip", WINDOWS, ids=str)
def test_clip_fractions(clip: tuple[dict[str, Any], RatioClip]) -> None:
    """The shares of clipped tokens that both log, at the token level."""
    values = random_values(seed=15)
    theirs = trl_loss(*values, loss_type="dapo", **clip[0]).metrics
    ours = policy_loss(*values, estimator=Estimator("token", clip[1], **UNLIMITED)).metrics
    for side in ("low", "high"):
        (share,) = theirs[f"clip_ratio/{side}_mean"]
        assert 0 < share < 1
        assert float(ours[f"clip/{side}"]) == pytest.approx(share, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Through a real model.


@pytest.mark.parametrize("pair", [named(loss_type, level) for loss_type in AGGREGATIONS for level in LEVELS], ids=str)
def test_parameter_gradients(pair: Pair) -> None:
    """TRL's log-probabilities of its model with left-padded prompts, padded completions, a tool gap and a temperature.

    Ours are the log-softmax of the logits of an equal model.
    """
    temperature, prompt_length = 0.75, 3
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(2, 10, (4, prompt_length + 7), generator=generator)
    attended = torch.ones_like(ids)
    attended[0, :2] = 0
    attended[1, -3:] = 0
    attended[3, -6:] = 0
    mask = attended[:, prompt_length:].bool()
    mask[0, 2:4] = False
    mask[2, 0] = False
    advantages = torch.tensor([1.0, -0.5, -1.5, 2.0], dtype=torch.float64)

    model = tiny_model()
    logits = model(input_ids=ids, attention_mask=attended).logits[:, prompt_length - 1 : -1] / temperature
    logp = logits.log_softmax(-1).gather(-1, ids[:, prompt_length:, None]).squeeze(-1)
    noise = 0.3 * torch.randn(logp.shape, generator=generator, dtype=torch.float64)
    behavior_logp = (logp + noise).detach()
    loss, _ = ctpo.policy_loss(
        *with_nan_outside(mask, logp, behavior_logp, advantages),
        mask,
        estimator=pair.estimator,
        aggregation=pair.aggregation,
        **denominators(pair, mask),
    )
    loss.backward()

    batch = {
        "prompt_ids": ids[:, :prompt_length],
        "prompt_mask": attended[:, :prompt_length],
        "completion_ids": ids[:, prompt_length:],
        "completion_mask": attended[:, prompt_length:],
        "tool_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": behavior_logp,
        "num_items_in_batch": mask.sum(),
    }
    peer_loss, peer_gradients = trl_parameter_gradients(batch, temperature=temperature, **pair.options)
    # TRL's language-model head works in float32.
    torch.testing.assert_close(loss.detach(), peer_loss, rtol=1e-5, atol=1e-6, check_dtype=False)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, peer_gradients[name], rtol=1e-5, atol=1e-6)
    assert sum(gradient.abs().sum() for gradient in peer_gradients.values()) > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts from another engine (vLLM).


CORRECTIONS: list[tuple[str, float | None, float | None]] = [
    ("token_truncate", None, 1.5),
    ("token_truncate", 0.5, 1.5),
    ("token_mask", 0.5, 1.5),
    ("token_mask", 0.8, None),
    ("sequence_truncate", 0.5, 1.5),
    ("sequence_mask", None, 1.5),
    ("sequence_mask", 0.5, 1.5),
]


def rollouts() -> tuple[torch.Tensor, torch.Tensor, list[list[float | None]], torch.Tensor]:
    """(logp, old_logp, logp of the engine, mask): its numbers are float32, and None for two tokens."""
    logp, old_logp, _, mask = random_values(seed=12)
    noise = 0.4 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    lengths = [10, 8, 6, 9]
    engine: list[list[float | None]] = [
        row[:length] for row, length in zip((old_logp + noise).float().tolist(), lengths, strict=True)
    ]
    first = int(mask[0].nonzero()[0])
    engine[0][first] = None
    engine[2][int((~mask[2]).nonzero()[0])] = None
    return logp, old_logp, engine, mask


@pytest.mark.parametrize(
    ("pair", "mode", "low", "high"),
    [
        (pair, *correction)
        for pair in (named("grpo"), named("dapo"), named("cispo"), named("luspo", "sequence"))
        for correction in CORRECTIONS
        # At the sequence level TRL averages token weights as it does per-token advantages: see the tests of that name.
        if pair.estimator.level == "token" or correction[0].startswith("sequence")
    ],
    ids=str,
)
def test_rollout_correction(pair: Pair, mode: str, low: float | None, high: float | None) -> None:
    """The weights that TRL gives completions of vLLM, and its loss with them."""
    logp, old_logp, engine, mask = rollouts()
    advantages = torch.tensor([1.0, -0.5, -1.5, 2.0], dtype=torch.float64)
    batch = trl_rollout_batch(
        old_logp,
        engine,
        mask,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
        per_device_train_batch_size=4,
    )
    assert torch.equal((batch["completion_mask"] * batch["tool_mask"]).bool(), mask)
    ratio = batch["importance_sampling_ratio"]
    theirs = trl_loss(
        logp,
        old_logp,
        advantages,
        mask,
        inputs={"importance_sampling_ratio": ratio},
        replaced={"use_vllm": True},
        **pair.options,
    )

    behavior_logp = batch["sampling_per_token_logps"].double()
    assert behavior_logp.isnan().sum() == 2
    # What the engine could not score, TRL leaves uncorrected.
    behavior_logp = torch.where(behavior_logp.isnan(), old_logp, behavior_logp)
    trl_level, trl_mode = mode.split("_")
    correction = rollout_correction(
        *with_nan_outside(mask, old_logp, behavior_logp), mask, level=trl_level, mode=trl_mode, low=low, high=high
    )
    expected = ratio.expand(mask.shape).masked_fill(~mask, 0.0)
    torch.testing.assert_close(correction.weights, expected, rtol=1e-12, atol=0)
    weights = correction.weights
    assert ((weights == 0) | (weights == low) | (weights == high))[mask].any()
    ours = as_in_trl(pair, (logp, old_logp, advantages, mask), weights=weights)
    assert_same(ours, theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Denominators over micro-batches and processes.


@pytest.mark.parametrize("pair", [named("dapo"), named("cispo")], ids=str)
def test_token_mean_over_an_accumulation_window(pair: Pair) -> None:
    """TRL rescales the tokens of the generation batch to one gradient step; that number is our num_tokens."""
    values = random_values(seed=1)
    options = {**pair.options, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    theirs = trl_loss(*values, num_items=100, **options)
    assert_same(as_in_trl(pair, values, num_tokens=50), theirs)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "luspo"])
def test_sequence_mean_over_an_accumulation_window(loss_type: str) -> None:
    pair, values = named(loss_type), random_values(seed=2)
    theirs = trl_loss(*values, gradient_accumulation_steps=3, **pair.options)
    assert_same(as_in_trl(pair, values, num_sequences=12), theirs)


def test_token_mean_over_processes() -> None:
    """Gradients are averaged over processes, so each multiplies its share of the global mean by their number."""
    pair, values = named("dapo"), random_values(seed=3)
    accelerator = type(trainer(**pair.options).accelerator)
    with patch.object(accelerator, "num_processes", PropertyMock(return_value=4)):
        theirs = trl_loss(*values, num_items=100, **pair.options)
    assert_same(as_in_trl(pair, values, num_tokens=100, data_parallel_size=4), theirs)


# ---------------------------------------------------------------------------------------------------------------------
# TRL's token-level loss as any estimator of the form "ppo": the hook that a trainer on TRL can rely on.


def through_trl(
    estimator: Estimator,
    values: tuple[torch.Tensor, ...],
    *,
    inputs: dict[str, torch.Tensor] | None = None,
    beta: float = 0.0,
    **options: Any,
) -> Result:
    """TRL's loss with the estimator's ratio in place of its own, and a window per token.

    The old log-probabilities handed to TRL are those that leave the estimator's log-ratio; log pi keeps its gradient.
    """
    logp, behavior_logp, advantages, mask = values
    log_ratio = ctpo.log_ratio(logp, behavior_logp, mask, level=estimator.level)
    assert estimator.clip is not None
    low, high, dual = estimator.clip.bounds(ctpo.positions(mask).to(logp.dtype))
    replaced = {"epsilon_low": -torch.expm1(low), "epsilon_high": torch.expm1(high), "beta": beta}
    with patch.object(trainer(**options).args, "delta", None if dual is None else dual.exp()):
        return trl_loss(logp, logp - log_ratio, advantages, mask, inputs=inputs, replaced=replaced, **options)


HOOKED = [
    get_estimator("ctpo", clip=PositionClip(dual=None), **UNLIMITED),
    get_estimator("ctpo", **UNLIMITED),
    get_estimator("ctpo", clip=PositionClip(0.025, 0.05, dual=0.125, drift=0.01), **UNLIMITED),
    get_estimator("ctpo_fixed", **UNLIMITED),
    get_estimator("ctpo_mean", **UNLIMITED),
    get_estimator("minpro", **UNLIMITED),
]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
@pytest.mark.parametrize("estimator", HOOKED, ids=lambda estimator: f"{estimator.level}-{estimator.clip}")
def test_hook_gives_the_estimator(estimator: Estimator, loss_type: str) -> None:
    pair = Pair({"loss_type": loss_type}, estimator)
    # Spreads at which windows act on some tokens, on most, and never; by far too large ratios last.
    for seed, spread in enumerate((0.02, 0.3, 1e-4, 8.0)):
        for dtype in TOLERANCE:
            *floats, mask = random_values(seed=20 + seed, spread=spread)
            values = (*(array.to(dtype) for array in floats), mask)
            assert_same(as_in_trl(pair, values), through_trl(estimator, values, loss_type=loss_type))


@given(batch=batches(zero_ratios=False, garbage=False, smallest=-40.0))
def test_hook_gives_ctpo_for_awkward_batches(batch: Batch) -> None:
    estimator = HOOKED[0]
    values = tensors(batch, torch.float64, advantages="token")
    ours = as_in_trl(Pair({"loss_type": "grpo"}, estimator), values)
    assert_same(ours, through_trl(estimator, values, loss_type="grpo"))


@pytest.mark.parametrize("corrected", [False, True])
def test_hook_and_the_kl_term(corrected: bool) -> None:
    """The divergence from the reference policy stays as it is, but for use_bias_correction_kl.

    That multiplies it by "the" importance ratio, which is then the estimator's.
    """
    values = logp, behavior_logp, _, mask = random_values(seed=24)
    inputs = {"ref_per_token_logps": behavior_logp + 0.5}
    options = {"loss_type": "bnpo", "use_bias_correction_kl": corrected, "inputs": inputs}
    estimator = HOOKED[0]
    with_kl, without = (through_trl(estimator, values, beta=beta, **options) for beta in (0.25, 0.0))
    difference = inputs["ref_per_token_logps"] - logp
    kl = difference.exp() - difference - 1
    if corrected:
        kl = kl * ctpo.log_ratio(logp, behavior_logp, mask, level="cumulative").exp()
    torch.testing.assert_close(with_kl.loss - without.loss, 0.25 * kl[mask].mean(), rtol=1e-12, atol=0)


def test_hook_changes_what_off_policy_masking_reads() -> None:
    """It falls back to the old log-probabilities, which the hook has replaced: give the sampler's.

    Both sequences have a mean log-ratio of 0, the second a mean cumulative one of -1/2.
    """
    behavior_logp = torch.full((2, 2), -3.0, dtype=torch.float64)
    logp = behavior_logp + torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    values = (logp, behavior_logp, -torch.ones(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.bool))
    estimator = get_estimator("ctpo", clip=RatioClip(1.0, math.inf), **UNLIMITED)
    options = {"loss_type": "grpo", "off_policy_mask_threshold": 0.25}

    def dropped(result: Result) -> list[bool]:
        return (result.gradient == 0).all(-1).tolist()

    assert dropped(trl_loss(*values, **options)) == [False, False]
    assert dropped(through_trl(estimator, values, **options)) == [False, True]
    inputs = {"sampling_per_token_logps": behavior_logp}
    assert dropped(through_trl(estimator, values, inputs=inputs, **options)) == [False, False]


# ---------------------------------------------------------------------------------------------------------------------
# Where TRL differs.


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "luspo"])
def test_trl_counts_sequences_without_policy_tokens(loss_type: str) -> None:
    """A batch mean over 4 sequences of which one has no policy token: TRL divides by 4, we by 3 unless told."""
    pair, values = named(loss_type), random_values(seed=4)
    mask = values[-1].clone()
    mask[1] = False
    theirs = trl_loss(*values[:-1], mask, **pair.options)
    ours = as_in_trl(pair, (*values[:-1], mask), num_sequences=None)
    assert theirs.gradient.abs().sum() > 0
    assert_same(ours, Result(theirs.loss * 4 / 3, theirs.gradient * 4 / 3, {}))


def test_trl_bnpo_under_accumulation_is_no_token_mean() -> None:
    """TRL's "bnpo" averages the micro-batches' token means: a token of a short micro-batch weighs more.

    A token mean gives one loss however the batch is split.
    """
    pair, values = named("bnpo"), random_values(seed=5)
    mask = values[-1].clone()
    mask[:2, 1:] = False
    mask[:, 0] = True
    values = (*values[:-1], mask)
    halves = [tuple(value[rows] for value in values) for rows in (slice(0, 2), slice(2, 4))]
    whole = policy_loss(*values, estimator=pair.estimator, aggregation="token-mean")
    ours = [
        policy_loss(*half, estimator=pair.estimator, aggregation="token-mean", num_tokens=int(mask.sum()))
        for half in halves
    ]
    theirs = [trl_loss(*half, gradient_accumulation_steps=2, **pair.options) for half in halves]
    torch.testing.assert_close(sum(half.loss for half in ours), whole.loss, rtol=1e-12, atol=0)
    means = [policy_loss(*half, estimator=pair.estimator, aggregation="token-mean").loss for half in halves]
    torch.testing.assert_close(sum(half.loss for half in theirs), sum(means) / 2, rtol=1e-12, atol=0)
    assert abs(sum(half.loss for half in theirs) - whole.loss) > 0.01 * abs(whole.loss)


@pytest.mark.parametrize("name", ["logp", "behavior_logp", "advantages"])
def test_trl_is_poisoned_by_nan_at_masked_places(name: str) -> None:
    """TRL multiplies by the mask, and 0 times NaN is NaN; vLLM has NaN for tokens that it could not score."""
    pair, (logp, behavior_logp, advantages, mask) = named("grpo"), random_values(seed=6)
    values = {"logp": logp, "behavior_logp": behavior_logp, "advantages": advantages[:, None].repeat(1, logp.shape[1])}
    clean = policy_loss(*values.values(), mask, estimator=pair.estimator)
    values[name] = values[name].masked_fill(~mask, math.nan)
    assert trl_loss(*values.values(), mask, **pair.options).loss.isnan()
    ours = policy_loss(*values.values(), mask, estimator=pair.estimator)
    assert torch.equal(ours.loss, clean.loss)
    assert torch.equal(ours.gradient, clean.gradient)


def test_trl_overflows_at_a_masked_ratio() -> None:
    """Ordinary log-probabilities too: a masked token ratio of e^800 is inf, and inf times 0 is NaN."""
    pair, (logp, behavior_logp, advantages, mask) = named("grpo"), random_values(seed=6)
    behavior_logp = behavior_logp.masked_fill(~mask, -800.0)
    assert trl_loss(logp, behavior_logp, advantages, mask, **pair.options).loss.isnan()
    assert policy_loss(logp, behavior_logp, advantages, mask, estimator=pair.estimator).loss.isfinite()


def test_trl_has_no_numerical_limit() -> None:
    """One token with a ratio of e^30 and A < 0 decides TRL's gradient; our default takes its weight away."""
    pair = named("grpo")
    logp, mask = torch.tensor([[-1.0, -1.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    behavior_logp, advantages = torch.tensor([[-31.0, -1.0]], dtype=torch.float64), -torch.ones(1, dtype=torch.float64)
    theirs = trl_loss(logp, behavior_logp, advantages, mask, **pair.options)
    assert_same(policy_loss(logp, behavior_logp, advantages, mask, estimator=pair.estimator), theirs)
    torch.testing.assert_close(theirs.gradient, torch.tensor([[math.exp(30) / 2, 0.5]], dtype=torch.float64))
    limited = policy_loss(logp, behavior_logp, advantages, mask, estimator="grpo")
    torch.testing.assert_close(limited.gradient, torch.tensor([[0.0, 0.5]], dtype=torch.float64))


@pytest.mark.parametrize("level", LEVELS)
def test_trl_delta_below_the_upper_bound_caps_both_signs(level: str) -> None:
    """Our dual bound is for A < 0; TRL's delta cuts the ratio before the minimum is taken.

    Below 1 + epsilon_high that caps A > 0 at delta, too, and for A < 0 does nothing before 1 + epsilon_high: both signs
    behave as if the window ended at delta (A > 0) and the dual bound lay at 1 + epsilon_high (A < 0).
    """
    values = random_values(seed=7)
    options = {"loss_type": "grpo", "importance_sampling_level": level, "epsilon_high": 0.5, "delta": 1.1}
    theirs = trl_loss(*values, **options)
    positive = values[2][:, None] > 0
    reads = Estimator(LEVELS[level], RatioClip(0.2, 0.1, dual=1.5), **UNLIMITED)
    assert_same(policy_loss(*values, estimator=reads), theirs)
    written = Estimator(LEVELS[level], RatioClip(0.2, 0.5, dual=1.1), **UNLIMITED)
    changed = policy_loss(*values, estimator=written).gradient != theirs.gradient
    assert (changed & positive).any()
    assert (changed & ~positive).any()


def test_trl_cispo_bound_is_epsilon_high_itself() -> None:
    """Every other loss type clips at 1 + epsilon_high. With TRL's default, 0.2, no token of "cispo" keeps its ratio."""
    logp, behavior_logp, advantages, mask = random_values(seed=8, spread=0.1)
    theirs = trl_loss(logp, behavior_logp, advantages, mask, loss_type="cispo")
    expected = torch.where(mask, -0.2 * advantages[:, None] / mask.sum(), 0.0)
    torch.testing.assert_close(theirs.gradient, expected, rtol=1e-12, atol=0)
    pair = named("cispo")
    assert (pair.options["epsilon_high"], pair.estimator.clip) == (5.0, RatioClip(1.0, 4.0))


def test_trl_cispo_at_zero_probability_is_nan() -> None:
    """TRL's value is ratio x A x log pi, 0 x -inf at a token of probability 0; here the limit of it, 0."""
    pair, (logp, behavior_logp, advantages, mask) = named("cispo"), random_values(seed=9)
    logp = logp.masked_fill(mask & (mask.cumsum(-1) == 1), -math.inf)
    assert trl_loss(logp, behavior_logp, advantages, mask, **pair.options).loss.isnan()
    ours = policy_loss(logp, behavior_logp, advantages, mask, estimator=pair.estimator)
    assert ours.loss.isfinite()
    assert ours.gradient.isfinite().all()


def test_trl_sequence_ratio_averages_per_token_advantages() -> None:
    """With per-token advantages, each token of TRL's sequence level gets the average kept advantage of its sequence.

    The sequence ratio is one number, of which every log-probability moves an equal part. Our coefficient form keeps
    each token's own advantage, as GSPO-token does; for one advantage per sequence both are the same.
    """
    pair = named("grpo", "sequence")
    logp, behavior_logp, _, mask = random_values(seed=10, spread=0.05)
    advantages = torch.randn(logp.shape, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    theirs = trl_loss(logp, behavior_logp, advantages, mask, **pair.options)
    ours = policy_loss(logp, behavior_logp, advantages, mask, estimator=pair.estimator)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=0)
    averaged = ours.gradient.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    torch.testing.assert_close(theirs.gradient, torch.where(mask, averaged, 0.0), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(theirs.gradient, ours.gradient, rtol=0.1)


def test_trl_sequence_ratio_averages_token_weights() -> None:
    """The same with token-level rollout correction of a sequence-level ratio: TRL averages the weights, too."""
    pair, (logp, old_logp, advantages, mask) = named("grpo", "sequence"), random_values(seed=13, spread=0.05)
    weights = torch.rand(logp.shape, generator=torch.Generator().manual_seed(13), dtype=torch.float64)
    inputs = {"importance_sampling_ratio": weights}
    theirs = trl_loss(logp, old_logp, advantages, mask, inputs=inputs, replaced={"use_vllm": True}, **pair.options)
    ours = policy_loss(logp, old_logp, advantages, mask, weights=weights, estimator=pair.estimator)
    averaged = ours.gradient.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    torch.testing.assert_close(theirs.gradient, torch.where(mask, averaged, 0.0), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(theirs.gradient, ours.gradient, rtol=0.1)


def test_trl_default_correction_drops_whole_sequences() -> None:
    """TRL's default for rollouts of vLLM is "sequence_mask" with a product of ratios over the whole sequence.

    An engine that is off by .002 nats per token, always to the same side, loses every sequence of 550 tokens and more;
    a token level, ours by default, keeps all.
    """
    config = trainer().args
    assert config.vllm_importance_sampling_mode == "sequence_mask"
    assert (config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max) == (None, 3.0)
    old_logp = torch.full((2, 600), -1.0)
    engine: list[list[float | None]] = [[-1.002] * 600, [-1.002] * 500]
    mask = torch.arange(600) < torch.tensor([[600], [500]])
    batch = trl_rollout_batch(old_logp, engine, mask)
    torch.testing.assert_close(batch["importance_sampling_ratio"], torch.tensor([[0.0], [math.e]]), rtol=1e-4, atol=0)
    weights = rollout_correction(old_logp, torch.full((2, 600), -1.002), mask).weights
    torch.testing.assert_close(weights[mask], torch.full((1100,), math.exp(0.002)), rtol=1e-4, atol=0)


def test_trl_takes_an_unscored_token_for_an_exact_one() -> None:
    """A token without log-probability gets ratio 1 in TRL; here the caller has to say so."""
    _, old_logp, engine, mask = rollouts()
    batch = trl_rollout_batch(
        old_logp, engine, mask, vllm_importance_sampling_mode="token_truncate", per_device_train_batch_size=4
    )
    unscored = batch["sampling_per_token_logps"].isnan() & mask
    assert batch["importance_sampling_ratio"][unscored].tolist() == [1.0]
    with pytest.raises(ValueError, match="behavior_logp"):
        rollout_correction(old_logp, batch["sampling_per_token_logps"].double(), mask)


@pytest.mark.parametrize(
    ("log_ratios", "inside"),
    [([-25.0, 24.0], [-20.0, 20.0]), ([-15.0, -12.0], [math.log(1e-8), 0.0]), ([-2.0, 1.5], [-2.0, 1.5])],
)
def test_trl_vespo_limits(log_ratios: list[float], inside: list[float]) -> None:
    """TRL's "vespo" cuts token log-ratios to +-20 and the sequence ratio to at least 1e-8; ours has neither limit.

    With them done by hand the two agree. (TRL's third limit, e^20 for the sequence ratio, acts where the weight has
    long become 0.) A small power of the ratio makes the second one visible.
    """
    options = {"loss_type": "vespo", "vespo_k_pos": 0.25}
    estimator = get_estimator("vespo", clip=GammaWeight(0.25, 3.0, 3.0, 2.0), **UNLIMITED)
    logp = torch.tensor([[-3.0, -4.0]], dtype=torch.float64)
    mask, advantages = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, dtype=torch.float64)

    def ours(steps: list[float]) -> torch.Tensor:
        behavior_logp = logp - torch.tensor([steps], dtype=torch.float64)
        return policy_loss(
            logp, behavior_logp, advantages, mask, estimator=estimator, aggregation="token-mean"
        ).gradient

    behavior_logp = logp - torch.tensor([log_ratios], dtype=torch.float64)
    theirs = trl_loss(logp, behavior_logp, advantages, mask, **options).gradient
    torch.testing.assert_close(ours(inside), theirs, rtol=1e-12, atol=0)
    assert torch.allclose(ours(log_ratios), theirs, rtol=1e-3, atol=0) == (log_ratios == inside)


def test_trl_rounds_the_temperatures_of_sapo_to_float32() -> None:
    """They go through `torch.where` of two Python numbers: 1.05 is 1.0499999523 also for float64 log-probabilities."""
    values = random_values(seed=14)
    theirs = trl_loss(*values, loss_type="sapo").loss
    ours, rounded = (
        policy_loss(*values, estimator=get_estimator("sapo", clip=SigmoidGate(1.0, tau), **UNLIMITED)).loss
        for tau in (1.05, float(np.float32(1.05)))
    )
    assert get_estimator("sapo").clip == SigmoidGate(1.0, 1.05)
    torch.testing.assert_close(rounded, theirs, rtol=1e-12, atol=1e-12)
    assert 1e-9 < (ours - theirs).abs() < 1e-6


def test_trl_vespo_takes_the_rollout_correction_into_its_ratio() -> None:
    """TRL multiplies the sequence ratio of "vespo" by all token corrections, before it becomes a weight.

    Uncut, that is the ratio over the engine that sampled. One token that "token_mask" drops makes the whole sequence's
    ratio 1e-8: its weight is lost.
    """
    logp, old_logp, engine, mask = rollouts()
    advantages = torch.tensor([1.0, -0.5, -1.5, 2.0], dtype=torch.float64)
    pair = named("vespo")

    def theirs(mode: str, low: float | None, high: float) -> tuple[Result, dict[str, torch.Tensor]]:
        batch = trl_rollout_batch(
            old_logp,
            engine,
            mask,
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=low,
            vllm_importance_sampling_clip_max=high,
            per_device_train_batch_size=4,
        )
        inputs = {"importance_sampling_ratio": batch["importance_sampling_ratio"]}
        peer = trl_loss(logp, old_logp, advantages, mask, inputs=inputs, replaced={"use_vllm": True}, **pair.options)
        return peer, batch

    uncut, batch = theirs("token_truncate", None, 1e6)
    behavior_logp = batch["sampling_per_token_logps"].double()
    behavior_logp = torch.where(behavior_logp.isnan(), old_logp, behavior_logp)
    ours = policy_loss(logp, behavior_logp, advantages, mask, estimator=pair.estimator, aggregation=pair.aggregation)
    assert_same(ours, uncut)
    masked, batch = theirs("token_mask", 0.75, 1e6)
    lost = ((batch["importance_sampling_ratio"] == 0) & mask).any(-1)
    assert 0 < lost.sum() < len(lost)
    assert torch.equal(masked.gradient.abs().amax(-1) < 1e-12, lost)


@pytest.mark.parametrize("advantages", ["sequence", "token"])
@given(data=st.data())
def test_off_policy_sequence_mask(advantages: str, data: st.DataObject) -> None:
    """Off-policy sequence masking: A < 0 and a mean log-ratio below minus the threshold."""
    batch = data.draw(batches(zero_ratios=False, garbage=False))
    threshold = data.draw(st.sampled_from([0.01, 0.2, 2.0]))
    region = SequenceRegion(threshold, "k1", only_negative=True)
    options = {"loss_type": "grpo", "off_policy_mask_threshold": threshold}
    pair = Pair(options, get_estimator("opsm", region=region, **UNLIMITED))
    for dtype in TOLERANCE:
        values = tensors(batch, dtype, advantages=advantages)
        assert_same(as_in_trl(pair, values), trl_loss(*values, **pair.options))
