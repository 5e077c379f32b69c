"""`CTPOTrainer` against `ctpo.policy_loss`, an oracle in plain Python and TRL's `GRPOTrainer`.

Loss and gradient are those of the trainer's own `_compute_loss`, of log-probabilities that a test chooses (TRL's
scoring replaced by a leaf tensor) or of a real model. Training is real training of a model of a few thousand
parameters, its sampling included.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import oracle
import oracle_losses
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import tiny_chat_model
from trl import GRPOConfig, GRPOTrainer
from trl_harness import config_on_cpu

import ctpo
from ctpo.train.config import CTPOConfig
from ctpo.train.trainer import CTPOTrainer
from ctpo.zoo import RECIPES

# TRL 1.16 asks transformers 5.23 by the former names.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable|_disable)?` is dep:FutureWarning")

Tensors = dict[str, torch.Tensor]
HORIZON = 16
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
SPREADS = (0.02, 0.3, 3.0, 40.0)
OF_TRL = {
    "grpo", "dr_grpo", "dapo", "decoupled_ppo", "ppo", "gspo", "gspo_token", "luspo", "cispo", "sapo", "vespo", "opsm"
}  # fmt: skip
LIMITED = sorted(name for name, recipe in RECIPES.items() if recipe.estimator.bounded and name not in OF_TRL)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rewards(completions: list[str], **_: Any) -> list[float]:
    """Any function of the text that differs within groups."""
    return [float(sum(text.encode()) % 7) for text in completions]


def made(
    kind: type[GRPOTrainer] = CTPOTrainer,
    *,
    saved: Path | None = None,
    directory: str | Path | None = None,
    reward: Any = rewards,
    peft: LoraConfig | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """A trainer of a tiny model, of which some tokens end a completion, so that lengths differ."""
    given, tokenizer = tiny_chat_model()
    if saved is not None:  # a reference model is loaded from where the model came from
        given.save_pretrained(saved)
        given = type(given).from_pretrained(saved)
    given.generation_config.eos_token_id = [*range(40), given.config.eos_token_id]
    settings = CTPOConfig if issubclass(kind, CTPOTrainer) else GRPOConfig
    defaults: dict[str, Any] = {"max_completion_length": HORIZON, "disable_tqdm": True, "learning_rate": 1e-2}
    config = config_on_cpu(directory or tempfile.gettempdir(), settings, **defaults | options)
    data = Dataset.from_dict({"prompt": ["a question" + "?" * length for length in range(8)]})
    trainer = kind(
        given.to(dtype),
        reward_funcs=reward,
        args=config,
        train_dataset=data,
        eval_dataset=data.select(range(2)),
        processing_class=tokenizer,
        peft_config=peft,
    )
    trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps  # what the training loop sets
    trainer.model.train()
    return trainer


@functools.cache
def idle(**options: Any) -> CTPOTrainer:
    """A trainer whose loss is asked for, and which never trains."""
    return made(**options)


def values(seed: int, *, spread: float, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """(logp, old logp, advantages, mask) of six sequences with tool gaps and padding, the last without any token."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(1.0, (6, 12))
    logp = old + spread * rng.standard_normal((6, 12))
    mask = (rng.random((6, 12)) < 0.75) & (np.arange(12) < [[12], [9], [11], [7], [12], [0]])
    advantages = np.array([1.0, -0.5, 0.0, 2.0, -1.5, 1.0])
    floats = (torch.tensor(array, dtype=dtype) for array in (logp, old, advantages))
    return (*floats, torch.tensor(mask))


def batch_of(old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, **others: torch.Tensor) -> Tensors:
    """What TRL hands to its loss."""
    attended = mask.flip(-1).cumsum(-1).flip(-1) > 0
    return {
        "prompt_ids": torch.full((len(mask), 1), 2),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.full(mask.shape, 3),
        "completion_mask": attended.long(),
        "tool_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
        **others,
    }


def loss_of(trainer: GRPOTrainer, logp: torch.Tensor, batch: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """The trainer's loss of these log-probabilities, and its gradient."""
    logp = logp.detach().clone().requires_grad_()
    scored = (logp, torch.zeros_like(logp), None)
    with patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", lambda *_, **__: scored):
        loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    assert logp.grad is not None
    return loss.detach(), logp.grad


def denominators(aggregation: str, mask: torch.Tensor, *, micro_batches: int = 1) -> dict[str, Any]:
    """TRL's: it counts rows without policy tokens."""
    if aggregation == "token-mean":
        return {"num_tokens": int(mask.sum())}
    counted = {"num_sequences": len(mask) * micro_batches}
    return counted | {"horizon": HORIZON} if aggregation == "seq-mean-token-sum-norm" else counted


def policy_loss(
    args: CTPOConfig, logp: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, **more: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ctpo.policy_loss` and its gradient, with NaN at masked places."""
    logp = torch.where(mask, logp, torch.nan).requires_grad_()
    options = args.estimator_options()
    more = denominators(str(options["aggregation"]), mask) | more
    loss, _ = ctpo.policy_loss(logp, torch.where(mask, old, torch.nan), advantages, mask, **options, **more)
    loss.backward()
    assert logp.grad is not None
    return loss.detach(), logp.grad


def assert_close(found: torch.Tensor, expected: torch.Tensor, *, scale: float = 0.0, tolerance: float) -> None:
    """To `tolerance`, relative to a number or to `scale`: terms of which some may cancel."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * max(1e-3, scale), check_dtype=False)


# ---------------------------------------------------------------------------------------------------------------------
# Loss and gradient.


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("estimator", sorted(RECIPES))
def test_loss_and_gradient_of_every_estimator(estimator: str, aggregation: str) -> None:
    """At spreads where windows act on few tokens, on most, and where limits do; float32 and float64."""
    trainer = idle(estimator=estimator, aggregation=aggregation)
    args = trainer.args
    assert (args.route == "trl") <= (estimator in OF_TRL)
    moved = 0.0
    for seed, spread in enumerate(SPREADS):
        if spread > 1 and (args.route == "trl" or not args.built_estimator.bounded):
            continue  # TRL's losses have other limits or none; ratios without a limit overflow
        for dtype in (torch.float64, torch.float32):
            logp, old, advantages, mask = values(seed, spread=spread, dtype=dtype)
            loss, gradient = loss_of(trainer, logp, batch_of(old, advantages, mask))
            expected, expected_gradient = policy_loss(args, logp, old, advantages, mask)
            assert gradient.isfinite().all()
            # TRL has the temperatures of "sapo" in float32.
            tolerance = 1e-6 if estimator == "sapo" else 1e-11 if dtype == torch.float64 else 1e-4
            largest = float(expected_gradient.abs().max())
            assert_close(gradient, expected_gradient, scale=largest, tolerance=tolerance)
            if args.route == "coefficients":
                # The sum of coefficient times advantage, which is the value of the forms that have no more to it.
                assert_close(loss, expected_gradient.sum(), scale=largest, tolerance=tolerance)
            if args.route != "coefficients" or (args.built_estimator.form == "unclipped" and spread < 1):
                size = float(expected_gradient.abs().sum() + expected.abs())
                assert_close(loss, expected, scale=size, tolerance=tolerance)
            moved += largest
    assert moved > 0


WINDOWS: dict[str, tuple[dict[str, Any], Callable[[int], Any]]] = {
    "default": ({}, lambda t: oracle.position_bounds(t, 0.025, 0.05, 0.5, 0.05)),
    "no dual bound": ({"clip_dual": 0.0}, lambda t: oracle.position_bounds(t, 0.025, 0.05, 0.5)),
    "dual bound follows": ({"clip_high": 0.08}, lambda t: oracle.position_bounds(t, 0.025, 0.08, 0.5, 0.08)),
    "dual bound above": ({"clip_dual": 0.2}, lambda t: oracle.position_bounds(t, 0.025, 0.05, 0.5, 0.2)),
    "dual bound below": ({"clip_dual": 0.03}, lambda t: oracle.position_bounds(t, 0.025, 0.05, 0.5, 0.03)),
    "power": ({"clip_low": 0.1, "clip_power": 0.25}, lambda t: oracle.position_bounds(t, 0.1, 0.05, 0.25, 0.05)),
    "drift": ({"clip_drift": 0.02}, lambda t: oracle.position_bounds(t, 0.025, 0.05, 0.5, 0.05, drift=0.02)),
    "calibrated": (
        {"clip_low": 0.2, "clip_high": 0.1, "clip_sigma": 0.1, "clip_drift": 0.005, "clip_dual": 0.05},
        lambda t: oracle.calibrated_bounds(t, 0.2, 0.1, 0.1, 0.005, dual=0.05),
    ),
    "limits": (
        {"max_log_ratio": 0.6, "max_token_log_ratio": 0.25, "clip_dual": 0.0},
        lambda t: oracle.position_bounds(t, 0.025, 0.05, 0.5),
    ),
    "limit inside of the window": (
        {"max_log_ratio": 0.125, "clip_high": 0.3},
        lambda t: oracle.position_bounds(t, 0.025, 0.3, 0.5, 0.3),
    ),
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("window", WINDOWS)
def test_ctpo_against_the_oracle(window: str, aggregation: str) -> None:
    options, bounds = WINDOWS[window]
    trainer = idle(aggregation=aggregation, **options)
    limits = {
        name: options.get(name, default)
        for name, default in {"max_log_ratio": 10.0, "max_token_log_ratio": 20.0}.items()
    }
    acted = set()
    for seed, spread in enumerate((0.05, 0.3, 4.0, 30.0)):
        logp, old, advantages, mask = values(30 + seed, spread=spread)
        loss, gradient = loss_of(trainer, logp, batch_of(old, advantages, mask))
        rows = [
            oracle.coefficients(
                *(array.tolist() for array in (logp[i], old[i])),
                [advantages[i].item()] * mask.shape[1],
                mask[i].tolist(),
                name="cumulative",
                form="ppo",
                bounds=bounds,
                **limits,
            )
            for i in range(len(mask))
        ]
        table = {key: [[token[key] for token in row] for row in rows] for key in ("value", "weight", "margin")}
        assert min(min(row) for row in table["margin"]) > 1e-9, "a token on the edge: take another seed"
        acted |= {key for row in rows for token in row for key in token if token[key] is True}
        by_token = advantages[:, None].expand(mask.shape).tolist()
        ones = torch.ones(mask.shape).tolist()
        expected, expected_gradient = oracle_losses.loss(
            table["value"], table["weight"], by_token, ones, mask.tolist(), aggregation,
            **denominators(aggregation, mask),
        )  # fmt: skip
        expected_gradient = torch.tensor(expected_gradient, dtype=torch.float64)
        largest = float(expected_gradient.abs().max())
        assert_close(gradient, expected_gradient, scale=largest, tolerance=1e-10)
        if trainer.args.route == "bounds":
            assert_close(loss, torch.tensor(expected, dtype=torch.float64), scale=10 * largest + 10, tolerance=1e-10)
    assert {"clipped_low", "saturated"} <= acted
    assert ("clipped_high" in acted) == (window != "limit inside of the window")
    assert ("clipped_dual" in acted) == (bounds(1)[2] is not None and window != "limit inside of the window")
    assert trainer.args.route == ("coefficients" if window == "dual bound below" else "bounds")


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "grpo", "clip_sigma": 0.1, "clip_low": 0.2, "clip_high": 0.1, "clip_drift": 0.01},
        {"estimator": "gspo", "clip_sigma": 0.1, "clip_low": 0.2, "clip_high": 0.1, "clip_drift": 0.01},
        {"estimator": "ppo", "clip_high": 4.0},
        {"estimator": "cispo", "clip_low": 0.5},
        {"estimator": "cispo", "aggregation": "seq-mean-token-mean"},
        {"estimator": "opsm", "clip_dual": 1.05, "clip_high": 0.2},
        {"estimator": "minpro", "clip_dual": 3.0},
        {"estimator": "tic_grpo", "clip_high": math.inf, "clip_dual": 0.0},
        {"estimator": "ctpo_fixed", "clip_low": 1.0, "clip_high": math.inf},
        {"estimator": "ctpo_fixed", "max_log_ratio": 0.0},
        {"estimator": "ctpo", "clip_drift": 3.0},
        {"estimator": "lookahead", "estimator_window": 2},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_other_windows(options: dict[str, Any]) -> None:
    """Settings that leave TRL's own losses, or the numbers of the recipe."""
    trainer = idle(**options)
    spreads = (0.05, 0.3, 4.0, 12.0) if trainer.args.built_estimator.bounded else (0.05, 0.3, 4.0)
    for seed, spread in enumerate(spreads):
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
            logp, old, advantages, mask = values(60 + seed, spread=spread, dtype=dtype)
            loss, gradient = loss_of(trainer, logp, batch_of(old, advantages, mask))
            expected, expected_gradient = policy_loss(trainer.args, logp, old, advantages, mask)
            largest = float(expected_gradient.abs().max())
            assert_close(gradient, expected_gradient, scale=largest, tolerance=tolerance)
            if trainer.args.route != "coefficients":
                size = float(expected_gradient.abs().sum() + expected.abs())
                assert_close(loss, expected, scale=size, tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", LIMITED)
def test_overflowing_ratios(estimator: str, dtype: torch.dtype) -> None:
    """Tokens of a probability that a thousand nats have moved: no NaN, no infinity, and the limits of `policy_loss`."""
    trainer = idle(estimator=estimator)
    for shift in (100.0, 1000.0):
        logp, old, advantages, mask = values(70, spread=0.1, dtype=dtype)
        old[0, 3] -= shift
        old[1, 4] -= shift
        logp[2, 2] -= shift
        logp[4, 5] -= shift
        old[3, 1] -= shift
        _, gradient = loss_of(trainer, logp, batch_of(old, advantages, mask))
        _, expected = policy_loss(trainer.args, logp, old, advantages, mask)
        assert gradient.isfinite().all()
        tolerance = 1e-11 if dtype == torch.float64 else 1e-3
        assert_close(gradient, expected, scale=float(expected.abs().max()), tolerance=tolerance)


def test_no_limit_is_one_of_40() -> None:
    """A larger ratio has weight 0 instead of one of which the gradient's norm is infinite."""
    trainer = idle(estimator="ctpo_fixed", max_log_ratio=0.0, max_token_log_ratio=0.0)
    logp, old, advantages, mask = values(73, spread=0.0, dtype=torch.float32)
    for total, weight in ((39.0, math.exp(39)), (45.0, 0.0), (1e4, 0.0)):
        last = int(mask[4].nonzero()[-1])
        logp[4, last] = old[4, last] + total
        _, gradient = loss_of(trainer, logp, batch_of(old, advantages, mask))
        assert gradient[4, last].item() == pytest.approx(1.5 * weight / len(mask) / int(mask[4].sum()), rel=1e-3)
        assert (gradient**2).sum().isfinite()


@pytest.mark.parametrize("estimator", ["sequence", "lookahead"])
def test_a_ratio_without_limit_at_an_advantage_of_0(estimator: str) -> None:
    """0 times a ratio that has overflowed is 0."""
    logp, old, advantages, mask = values(71, spread=0.1, dtype=torch.float32)
    old[2] -= 50.0  # its advantage is 0
    loss, gradient = loss_of(idle(estimator=estimator), logp, batch_of(old, advantages, mask))
    _, expected = policy_loss(idle(estimator=estimator).args, logp, old, advantages, mask)
    assert loss.isfinite()
    assert_close(gradient, expected, tolerance=1e-4)


@pytest.mark.parametrize("estimator", sorted({"grpo", "ctpo_fixed", *LIMITED} - {"reinforce", "trm_max"}))
def test_tokens_that_have_become_impossible(estimator: str) -> None:
    """A log-probability of -inf, of a policy token or of a masked one, is a ratio of 0 and no NaN."""
    trainer = idle(estimator=estimator)
    logp, old, advantages, mask = values(72, spread=0.1)
    for row in range(5):
        own = mask[row].nonzero()[:, 0]
        logp[row, own[row % len(own)]] = -math.inf
        logp[row] = torch.where(~mask[row], -math.inf, logp[row])
    loss, gradient = loss_of(trainer, logp, batch_of(old, advantages, mask))
    _, expected = policy_loss(trainer.args, logp, old, advantages, mask)
    assert loss.isfinite()
    # What remains of a cut product, e^-20, is not 0 in `policy_loss`.
    assert_close(gradient, expected, scale=1.0, tolerance=1e-8)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("estimator", ["ctpo", "grpo", "gppo"])
def test_micro_batches_add_up(estimator: str, aggregation: str) -> None:
    """Two micro-batches of an optimizer step are `policy_loss` of both, with the denominators of both."""
    trainer = idle(estimator=estimator, aggregation=aggregation, gradient_accumulation_steps=2)
    logp, old, advantages, mask = values(7, spread=0.3)
    halves = [slice(0, 3), slice(3, 6)]
    found = [
        loss_of(
            trainer, logp[half], batch_of(old[half], advantages[half], mask[half]) | {"num_items_in_batch": mask.sum()}
        )
        for half in halves
    ]
    _, expected = policy_loss(trainer.args, logp, old, advantages, mask)
    assert_close(torch.cat([gradient for _, gradient in found]), expected, scale=1.0, tolerance=1e-12)
    if trainer.args.route != "coefficients":
        loss, _ = policy_loss(trainer.args, logp, old, advantages, mask)
        assert_close(sum(loss for loss, _ in found), loss, scale=10.0, tolerance=1e-12)


def scored_batch(seed: int = 3) -> tuple[Tensors, torch.Tensor]:
    """A batch with left-padded prompts, padded completions and tool gaps, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 250, (5, 4 + 9), generator=generator)
    attended = torch.ones_like(ids)
    attended[0, :3] = attended[2, :1] = 0
    attended[1, -4:] = attended[3, -7:] = 0
    mask = attended[:, 4:].bool()
    mask[0, 2:5] = mask[2, 0] = False
    batch = {
        "prompt_ids": ids[:, :4],
        "prompt_mask": attended[:, :4],
        "completion_ids": ids[:, 4:],
        "completion_mask": attended[:, 4:],
        "tool_mask": mask.long() | (1 - attended[:, 4:]),  # TRL pads it with 1
        "advantages": torch.tensor([1.0, -0.5, -1.5, 2.0, 0.0]),
        "num_items_in_batch": mask.sum(),
    }
    return batch, mask


def log_probabilities(model: torch.nn.Module, batch: Tensors, temperature: float) -> torch.Tensor:
    """By the logits of the whole vocabulary."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attended = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=attended).logits[:, batch["prompt_ids"].shape[1] - 1 : -1]
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(-1, batch["completion_ids"][..., None]).squeeze(-1)


@pytest.mark.parametrize("estimator", sorted(RECIPES))
def test_every_parameter_gradient(estimator: str) -> None:
    """Of a real model, with a temperature, against `policy_loss` of an equal model."""
    trainer = made(estimator=estimator, temperature=0.75)
    batch, mask = scored_batch()
    model, _ = tiny_chat_model()
    logp = log_probabilities(model, batch, 0.75)
    noise = torch.randn(logp.shape, generator=torch.Generator().manual_seed(4))
    old = (logp - 0.1 * noise).detach()
    options = trainer.args.estimator_options()
    loss, _ = ctpo.policy_loss(
        logp, old, batch["advantages"], mask, **options, **denominators(str(options["aggregation"]), mask)
    )
    loss.backward()
    trainer._compute_loss(trainer.model, batch | {"old_per_token_logps": old}).backward()
    found = dict(trainer.model.named_parameters())
    total = 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert found[name].grad is not None
        assert_close(found[name].grad, parameter.grad, scale=float(parameter.grad.abs().max()), tolerance=2e-4)
        total += float(parameter.grad.abs().sum())
    assert total > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Bit for bit TRL, where the estimator is one of its losses.

GSPO = {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
PEERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({}, {"loss_type": "grpo"}),
    "grpo-window": (
        {"clip_low": 0.1, "clip_high": 0.3, "beta": 0.05, "top_entropy_quantile": 0.5, "entropy_coef": 0.01},
        {"epsilon": 0.1, "epsilon_high": 0.3, "loss_type": "grpo"},
    ),
    "dapo": ({}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": ({"scale_rewards": "none"}, {"loss_type": "dr_grpo"}),
    "ppo": ({}, {"loss_type": "dapo", "delta": 3.0}),
    "gspo": ({}, {"loss_type": "grpo", **GSPO}),
    "luspo": ({}, {"loss_type": "luspo", **GSPO}),
    "cispo": ({}, {"loss_type": "cispo", "epsilon_high": 5.0}),
    "sapo": ({"sapo_temperature_pos": 2.0}, {"loss_type": "sapo"}),
    "vespo": ({"vespo_k_pos": 2.5}, {"loss_type": "vespo"}),
    "opsm": ({"off_policy_mask_threshold": 0.02}, {"loss_type": "grpo"}),
}  # fmt: skip
SCHEDULES = {
    "on-policy": {"max_steps": 3},
    "off-policy": {"steps_per_generation": 4, "num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 6},
}
OWN_METRICS = ("noise_floor/", "position/", "clip/", "step_time", "train_runtime", "train_samples", "train_steps")


def trained(kind: type[GRPOTrainer], **options: Any) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Parameters and what was logged, but for times, after training."""
    trainer = made(kind, **options)
    trainer.train()
    logged = [{key: value for key, value in entry.items() if "time" not in key} for entry in trainer.state.log_history]
    return [parameter.detach().clone() for parameter in trainer.model.parameters()], logged


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PEERS)
def test_steps_are_those_of_trl(name: str, schedule: str, tmp_path: Path) -> None:
    common, peer = PEERS[name]
    estimator = name.partition("-")[0]
    trl_options = {key: value for key, value in common.items() if not key.startswith("clip_")} | peer
    common = common | SCHEDULES[schedule]
    saved = tmp_path if "beta" in common else None
    ours, our_log = trained(CTPOTrainer, saved=saved, estimator=estimator, **common)
    theirs, their_log = trained(GRPOTrainer, saved=saved, disable_dropout=True, **trl_options | SCHEDULES[schedule])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(our_log, their_log, strict=True):
        shared = set(a) & set(b) - {key for key in b if key.startswith(OWN_METRICS)}
        assert {"loss", "grad_norm"} <= shared or "train_loss" in shared
        for key in shared:
            assert a[key] == b[key], key
    untrained, _ = tiny_chat_model()
    assert not all(torch.equal(a, b) for a, b in zip(ours, untrained.parameters(), strict=True))


def test_another_window_gives_other_steps() -> None:
    """What the test above would see."""
    schedule = SCHEDULES["off-policy"]
    ours, _ = trained(CTPOTrainer, estimator="grpo", clip_high=0.25, **schedule)
    theirs, _ = trained(GRPOTrainer, disable_dropout=True, loss_type="grpo", **schedule)
    assert not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Old log-probabilities.


def watched(kind: type[GRPOTrainer]) -> type[GRPOTrainer]:
    """Keeps old and new log-probabilities of the policy tokens of every update in `seen`, and counts scorings."""

    class Watched(kind):  # type: ignore[misc,valid-type]
        updated: Tensors | None = None
        scorings = 0

        def _compute_loss(self, model: Any, inputs: Tensors) -> torch.Tensor:
            self.updated = inputs
            try:
                return super()._compute_loss(model, inputs)
            finally:
                self.updated = None

        def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
            found = super()._get_per_token_logps_and_entropies(*args, **options)
            self.scorings += 1
            if self.updated is not None:
                mask = self.updated["completion_mask"].bool()
                old = self.updated.get("old_per_token_logps", found[0]).detach()
                self.__dict__.setdefault("seen", []).append((self._step, old[mask], found[0].detach()[mask]))
            return found

    return Watched


REUSED = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 6}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "autocast": {"bf16": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "lora": {"bf16": True, "peft": LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])},
    "checkpointing": {"bf16": True, "activation_checkpointing": True},
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_first_ratios_after_a_rollout_are_exactly_1(precision: str) -> None:
    """Of both micro-batches of the first update; the second update has others."""
    trainer = made(watched(CTPOTrainer), **REUSED | PRECISIONS[precision])
    trainer.train()
    assert len(trainer.seen) == 12
    moved = 0
    for step, old, logp in trainer.seen:
        assert len(old) > 0
        if step % 4 < 2:
            assert torch.equal(old, logp)
        else:
            moved += int((old != logp).sum())
    assert moved > 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ratios_of_a_policy_that_stands_still_are_exactly_1(precision: str) -> None:
    """In all micro-batches and both epochs."""
    options = REUSED | PRECISIONS[precision] | {"learning_rate": 0.0, "num_iterations": 2, "max_steps": 8}
    trainer = made(watched(CTPOTrainer), **options)
    trainer.train()
    assert len(trainer.seen) == 16
    assert all(torch.equal(old, logp) for _, old, logp in trainer.seen)


def test_old_log_probabilities_are_of_the_model_that_is_updated() -> None:
    """That is another object where it is compiled or wrapped for several processes."""
    trainer = made(**REUSED | {"max_steps": 2})
    scored: list[tuple[bool, bool]] = []
    scoring = GRPOTrainer._get_per_token_logps_and_entropies

    class Wrapped(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **options: Any) -> Any:
            return self.module(*args, **options)

        def __getattr__(self, name: str) -> Any:
            return self._modules["module"] if name == "module" else getattr(self._modules["module"], name)

    def spied(self: Any, model: Any, *args: Any, **options: Any) -> Any:
        scored.append((torch.is_grad_enabled(), isinstance(model, Wrapped)))
        return scoring(self, model, *args, **options)

    wrap = trainer._wrap_model
    trainer._wrap_model = lambda model, *args, **options: Wrapped(wrap(model))
    with patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", spied):
        trainer.train()
    # Four micro-batches' old ones, the noise floor by the model itself, four updates.
    assert scored == 4 * [(False, True)] + [(False, False)] + 4 * [(True, True)]


@pytest.mark.parametrize(("accumulation", "trained_on"), [(8, False), (4, True), (2, True)])
def test_passes_within_one_update_are_all_fresh(accumulation: int, trained_on: bool) -> None:
    """Two passes over a rollout batch come after training on it only if an update lies between them."""
    schedule = {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": accumulation}
    trainer = made(**schedule, max_steps=8 // accumulation)
    trainer.train()
    logged = [name for entry in trainer.state.log_history for name in entry]
    assert any(name.startswith("position/fresh/") for name in logged)
    assert any(name.startswith("position/trained_on/") for name in logged) == trained_on


# ---------------------------------------------------------------------------------------------------------------------
# The noise floor.


def alone(trainer: CTPOTrainer, batch: Tensors, row: int) -> torch.Tensor:
    """Log-probabilities of one sequence without padding, by TRL's scoring."""
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
    completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
    ids = torch.cat([prompt, completion])[None]
    with torch.no_grad():
        logp, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer, trainer.model, ids, torch.ones_like(ids), len(completion)
        )
    return logp[0]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_noise_of_batch_shape(precision: str, rows: int) -> None:
    """Where there is nothing more precise: by a direct computation, at the second rollout of a policy that moved."""
    learning = {"float32": 1e-2, "bfloat16": 0.1}[precision]
    options = REUSED | PRECISIONS[precision] | {"learning_rate": learning, "max_steps": 5}
    trainer = made(watched(CTPOTrainer), noise_floor_sequences=rows, **options)
    measured: list[torch.Tensor] = []
    prepare = trainer._prepare_inputs

    def spied(inputs: Any) -> Any:
        prepared = prepare(inputs)
        if trainer._step == 4:  # right after the second rollout
            batch = trainer._buffered_inputs[0]
            for row in range(rows):
                together = batch["old_per_token_logps"][row][batch["completion_mask"][row].bool()]
                measured.append((alone(trainer, batch, row) - together).double())
        return prepared

    trainer._prepare_inputs = spied
    trainer.train()
    first, _, second, _, third = (entry for entry in trainer.state.log_history if "loss" in entry)
    difference = torch.cat(measured)
    token = (difference**2).mean().sqrt().item()
    sqrt_t = torch.tensor([(d.sum() ** 2 / len(d)).item() for d in measured]).mean().sqrt().item()
    assert second["noise_floor/token"] == pytest.approx(token, rel=1e-6)
    assert second["noise_floor/sqrt_t"] == pytest.approx(sqrt_t, rel=1e-6)
    assert second["noise_floor/batch_shape"] == second["noise_floor/token"]
    assert second["noise_floor/lower_bound"] == 1
    assert "noise_floor/share" not in first
    for entry, steps in ((second, (2, 3)), (third, (6, 7))):
        moved = torch.cat([(logp - old).double() for step, old, logp in trainer.seen if step in steps])
        share = entry["noise_floor/token"] ** 2 / (moved**2).mean().item()
        assert entry["noise_floor/share"] == pytest.approx(share, rel=1e-5)
    if precision == "float32":
        assert token < 1e-5
    else:
        # Another shape of the batch, the same weights: the update's own shape is what makes ratios of 1.
        assert 1e-4 < token < 0.1


@pytest.mark.parametrize(("learning_rate", "low", "high"), [(1e-6, 0.9, 1.0), (1e-4, 0.001, 0.9)])
@pytest.mark.parametrize("rows", [1, 6])
def test_noise_of_autocast(rows: int, learning_rate: float, low: float, high: float) -> None:
    """Log-ratios of a rollout batch's updates in bfloat16, less those of two float32 copies of the same weights.

    Sequences are of both micro-batches, and with nothing to pad: the shape of the batch has no part in this.
    """
    options = REUSED | PRECISIONS["autocast"] | {"learning_rate": learning_rate, "lr_scheduler_type": "constant"}
    options |= {"max_steps": 3, "max_completion_length": 6}
    trainer = made(watched(CTPOTrainer), noise_floor_sequences=rows, **options)
    scores: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    held: list[Tensors] = []
    generate, begin = trainer._generate_and_score_completions, trainer._noise.begin

    def scored() -> list[tuple[torch.Tensor, torch.Tensor]]:
        precise, _ = tiny_chat_model()
        precise.load_state_dict(trainer.model.state_dict())
        found = []
        for batch, row in places:
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
            completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
            ids = torch.cat([prompt, completion])[None]
            with torch.no_grad():
                logp = precise(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found.append((alone(trainer, batch, row), logp.gather(-1, completion[:, None])[:, 0]))
        return found

    def spied_begin(batches: list[Tensors]) -> None:
        held[:] = batches
        if not scores:
            places.extend((batch, row) for batch in batches for row in range(len(batch["completion_ids"])))
            del places[rows:]
            scores.append(scored())
        begin(batches)

    def spied_generate(inputs: Any) -> Any:
        if len(scores) == 1:
            scores.append(scored())
        return generate(inputs)

    places: list[tuple[Tensors, int]] = []
    trainer._noise.begin, trainer._generate_and_score_completions = spied_begin, spied_generate
    trainer.train()
    first, _, third = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert "noise_floor/token" not in first
    before, after = scores
    noise, change = [], []
    for (coarse, exact), (later, exact_later) in zip(before, after, strict=True):
        change.append((later - coarse).double())
        noise.append(change[-1] - (exact_later - exact).double())
    squares = torch.cat(noise).square().mean().item()
    assert third["noise_floor/token"] == pytest.approx(squares**0.5, rel=1e-2)
    sqrt_t = torch.tensor([(x.sum() ** 2 / len(x)).item() for x in noise]).mean().sqrt().item()
    assert third["noise_floor/sqrt_t"] == pytest.approx(sqrt_t, rel=1e-2)
    share = squares / torch.cat(change).square().mean().item()
    assert third["noise_floor/share"] == pytest.approx(min(share, 1.0), rel=1e-2)
    assert third["noise_floor/lower_bound"] == 0
    assert low < third["noise_floor/share"] <= high


def test_noise_floor_of_policy_tokens() -> None:
    """Output of a tool is no token of the policy, and a sequence without any is passed over."""
    trainer = made(dtype=torch.bfloat16, noise_floor_sequences=3)
    batch, mask = scored_batch()
    mask[1] = False
    batch["tool_mask"][1] = 0
    trainer._noise.begin([batch])
    with torch.no_grad():
        ids, attended = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        together, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, ids, attended, 9)
    differences, outside = [], []
    for row in (0, 2, 3):
        length = int(batch["completion_mask"][row].sum())
        difference = (alone(trainer, batch, row) - together[row, :length]).double()
        differences.append(difference[mask[row, :length]])
        outside.append(difference[~mask[row, :length]])
    token = (torch.cat(differences) ** 2).mean().sqrt().item()
    sqrt_t = torch.tensor([(d.sum() ** 2 / len(d)).item() for d in differences]).mean().sqrt().item()
    assert token > 1e-4
    assert torch.cat(outside).abs().sum() > 0
    assert trainer._metrics["train"]["noise_floor/token"] == pytest.approx([token], rel=1e-6)
    assert trainer._metrics["train"]["noise_floor/sqrt_t"] == pytest.approx([sqrt_t], rel=1e-6)


def test_noise_floor_on_policy() -> None:
    """Without old log-probabilities in the batch, by one more scoring of it."""
    trainer = made(bf16=True, max_steps=2, noise_floor_sequences=4)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(1e-4 < entry["noise_floor/token"] < 0.1 for entry in logged)
    assert not any("noise_floor/share" in entry for entry in logged)


@pytest.mark.parametrize(("precision", "learning_rate", "warns"), [
    ("autocast", 1e-5, True), ("autocast", 1e-2, False), ("float32", 1e-5, False),
])  # fmt: skip
def test_warning_of_noise(precision: str, learning_rate: float, warns: bool, caplog: Any) -> None:
    """Where more than half of what ratios show is rounding; once."""
    options = REUSED | PRECISIONS[precision] | {"learning_rate": learning_rate, "max_steps": 8}
    trainer = made(**options, lr_scheduler_type="constant", noise_floor_sequences=4)
    with caplog.at_level(logging.WARNING, "ctpo.train.trainer"):
        trainer.train()
    shares = [entry["noise_floor/share"] for entry in trainer.state.log_history if "noise_floor/share" in entry]
    assert len(shares) == 3
    assert (max(shares) > 0.5) == warns
    assert len([record for record in caplog.records if "Rounding makes up" in record.getMessage()]) == warns


@pytest.mark.parametrize(
    ("sequences", "on_policy", "passes"), [(0, False, 8), (2, False, 10), (0, True, 2), (1, True, 6)]
)
def test_forward_passes(sequences: int, on_policy: bool, passes: int) -> None:
    """One per micro-batch and update, one per micro-batch for old log-probabilities, and those of the noise floor."""
    schedule = {"max_steps": 2} if on_policy else REUSED | {"max_steps": 2}
    trainer = made(noise_floor_sequences=sequences, **schedule)
    calls = []
    scoring = GRPOTrainer._get_per_token_logps_and_entropies

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return scoring(*args, **options)

    with patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", counted):
        trainer.train()
    assert len(calls) == passes
    assert ("noise_floor/token" in trainer.state.log_history[0]) == (sequences > 0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_truncated_completions_without_any_token(schedule: str) -> None:
    """With `mask_truncated_completions` a sequence may have no token at all."""
    trainer = made(
        watched(CTPOTrainer), mask_truncated_completions=True, max_completion_length=2, noise_floor_sequences=4,
        **SCHEDULES[schedule],
    )  # fmt: skip
    empty = []
    loss = trainer.compute_loss

    def spied(model: Any, inputs: Tensors, **options: Any) -> torch.Tensor:
        empty.append(int((inputs["completion_mask"].sum(1) == 0).sum()))
        return loss(model, inputs, **options)

    trainer.compute_loss = spied
    trainer.train()
    assert max(empty) == 4  # a micro-batch without any, too
    assert 0 < sum(empty) < 4 * len(empty)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Advantages.


@pytest.mark.parametrize(
    "options",
    [
        {"leave_one_out": True, "scale_rewards": "none"},
        {"scale_rewards": "none"},
        {"scale_rewards": "group"},
    ],
    ids=str,
)
def test_advantages(options: dict[str, Any]) -> None:
    """Per prompt, those of `ctpo.advantages` and the oracle, over the completions that have a reward."""
    drawn: dict[str, list[float | None]] = {}
    rng = np.random.default_rng(5)

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        found: list[float | None] = [float(x) for x in rng.integers(0, 4, len(prompts))]
        found[1] = found[4] = found[5] = found[6] = None  # one of four, and all but one
        for prompt, value in zip(prompts, found, strict=True):
            drawn.setdefault(prompt, []).append(value)
        return found

    trainer = made(reward=reward, num_generations=4, steps_per_generation=4, max_steps=1, **options)
    trainer.train()
    rows = [
        (len(mask), *values)
        for batch in trainer._buffered_inputs
        for mask, *values in zip(
            (row[row.bool()] for row in batch["prompt_mask"]),
            *(batch[name].tolist() for name in ("advantages", "rewards", "group")),
            strict=True,
        )
    ]
    assert len(rows) == 16
    assert len(drawn) == 4
    sizes = []
    for prompt, values in drawn.items():
        of_prompt = [row for row in rows if row[0] == len(prompt)]
        assert len({group for *_, group in of_prompt}) == 1
        scored = [value for value in values if value is not None]
        sizes.append(len(scored))
        if len(scored) == 1:
            expected = [0.0]
        elif options.get("leave_one_out"):
            expected = ctpo.leave_one_out(np.array(scored)).tolist()
            assert expected == pytest.approx(oracle.leave_one_out(scored))
        else:
            expected = oracle.group_relative(scored, scale_by_std=options["scale_rewards"] == "group", eps=1e-4)
        expected += [0.0] * (4 - len(scored))
        assert sorted(advantage for _, advantage, *_ in of_prompt) == pytest.approx(sorted(expected), abs=1e-5)
        assert sorted(r for *_, r, _ in of_prompt if not math.isnan(r)) == sorted(scored)
    assert sorted(sizes) == [1, 3, 4, 4]
    assert any(advantage for _, advantage, *_ in rows)
    # What is logged beside the completions is what was used.
    assert sorted(trainer._logs["advantages"]) == pytest.approx(sorted(advantage for _, advantage, *_ in rows))


def test_rewards_of_several_functions() -> None:
    """Weighted and summed over those that have one; advantages against the completions with any."""

    def first(completions: list[str], **_: Any) -> list[float | None]:
        return [1.0, None, 3.0, None] * (len(completions) // 4)

    def second(completions: list[str], **_: Any) -> list[float | None]:
        return [0.5, 4.0, None, None] * (len(completions) // 4)

    options = {"leave_one_out": True, "scale_rewards": "none", "reward_weights": [1.0, 2.0]}
    trainer = made(reward=[first, second], num_generations=4, max_steps=1, **options)
    trainer.train()
    (batch,) = trainer._buffered_inputs
    found = zip(*(batch[name].tolist() for name in ("rewards", "advantages")), strict=True)
    expected = zip([2.0, 3.0, 8.0], oracle.leave_one_out([2.0, 3.0, 8.0]), strict=True)
    pairs = sorted(pair for pair in found if not math.isnan(pair[0]))
    assert [x for pair in pairs for x in pair] == pytest.approx([x for pair in expected for x in pair], rel=1e-6)
    assert batch["advantages"][batch["rewards"].isnan()].tolist() == [0.0]


# ---------------------------------------------------------------------------------------------------------------------
# TRL's further terms, with the estimator's loss.


def positive(seed: int, like: torch.Tensor) -> torch.Tensor:
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("estimator", ["ctpo", "gppo", "cfpo"])
def test_divergence_from_a_reference(estimator: str, corrected: bool, tmp_path: Path) -> None:
    """`beta` adds TRL's term; with `use_bias_correction_kl` times the estimator's ratio, which must be one."""
    beta = 0.25
    options = {"estimator": estimator, "aggregation": "token-mean", "use_bias_correction_kl": corrected}
    if corrected and estimator != "ctpo":
        with pytest.raises(ValueError, match="use_bias_correction_kl must be False with estimator="):
            made(beta=beta, **options)
        return
    trainer = made(saved=tmp_path, beta=beta, **options)
    logp, old, advantages, mask = values(80, spread=0.1)
    reference = old + 0.5 * positive(80, old)
    batch = batch_of(old, advantages, mask, ref_per_token_logps=reference)
    loss, gradient = loss_of(trainer, logp, batch)
    plain, plain_gradient = loss_of(idle(**options), logp, batch)
    leaf = logp.clone().requires_grad_()
    divergence = (reference - leaf).exp() - (reference - leaf) - 1
    if corrected:
        # TRL's ratio exp(logp - old), with the old log-probabilities that leave the cumulative log-ratio.
        ratio = (leaf - (logp - ctpo.log_ratio(logp, old, mask))).exp()
        divergence = divergence * ratio
    expected = beta * divergence[mask].mean()
    expected.backward()
    assert_close(loss - plain, expected.detach(), scale=1.0, tolerance=1e-12)
    assert_close(gradient - plain_gradient, leaf.grad, scale=1.0, tolerance=1e-12)
    assert expected > 0.005


@pytest.mark.parametrize("estimator", ["ctpo_fixed", "gppo", "minpro"])
def test_off_policy_sequence_masking(estimator: str) -> None:
    """TRL drops sequences with A < 0 and a mean log(old / new) above the threshold, whatever the estimator's ratio."""
    threshold = 0.02
    logp, old, advantages, mask = values(81, spread=0.02)
    logp[1] -= 0.05
    logp[4] += 0.05
    # The first half of its tokens down, the others up: their mean stays, a mean of prefix products would not.
    own = mask[0].nonzero()[:, 0]
    half = len(own) // 2
    logp[0, own[:half]] -= 0.1
    logp[0, own[-half:]] += 0.1
    advantages[0], advantages[5] = -1.0, -1.0
    _, gradient = loss_of(
        idle(estimator=estimator, off_policy_mask_threshold=threshold), logp, batch_of(old, advantages, mask)
    )
    _, expected = loss_of(idle(estimator=estimator), logp, batch_of(old, advantages, mask))
    divergence = ((old - logp) * mask).sum(1) / mask.sum(1).clamp(min=1)
    dropped = (advantages < 0) & (divergence > threshold)
    assert dropped.tolist() == [False, True, False, False, False, False]
    assert_close(gradient, expected.masked_fill(dropped[:, None], 0.0), tolerance=1e-12)
    assert expected[dropped].abs().sum() > 0
    # With the engine's log-probabilities in the batch it is they that are compared.
    batch = batch_of(old, advantages, mask, sampling_per_token_logps=old + 1.0)
    _, gradient = loss_of(idle(estimator=estimator, off_policy_mask_threshold=threshold), logp, batch)
    assert_close(gradient, expected.masked_fill((advantages < 0)[:, None], 0.0), tolerance=1e-12)


@pytest.mark.parametrize("estimator", ["ctpo", "gppo", "cfpo"])
def test_only_tokens_of_high_entropy(estimator: str) -> None:
    options = {"estimator": estimator}
    logp, old, advantages, mask = values(82, spread=0.1)
    entropies = positive(82, logp)

    def gradient_of(trainer: CTPOTrainer) -> torch.Tensor:
        leaf = logp.clone().requires_grad_()
        scored = (leaf, entropies, None)
        with patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", lambda *_, **__: scored):
            trainer._compute_loss(trainer.model, batch_of(old, advantages, mask)).backward()
        assert leaf.grad is not None
        return leaf.grad

    least = torch.quantile(entropies[mask].float(), 0.75)
    expected = gradient_of(idle(**options)).where(entropies >= least, 0.0)
    assert_close(gradient_of(idle(top_entropy_quantile=0.25, **options)), expected, tolerance=1e-12)


@pytest.mark.parametrize("estimator", ["ctpo", "gppo", "grpo"])
def test_weights_of_an_engine(estimator: str) -> None:
    """Every token's term is multiplied by the weight that corrects for the engine."""
    logp, old, advantages, mask = values(83, spread=0.1)
    trainer, weights = idle(estimator=estimator), positive(83, logp)
    batch = batch_of(old, advantages, mask, importance_sampling_ratio=weights)
    with patch.multiple(trainer, use_vllm=True):
        _, gradient = loss_of(trainer, logp, batch)
    _, expected = policy_loss(trainer.args, logp, old, advantages, mask, weights=weights)
    assert_close(gradient, expected, tolerance=1e-12)
    assert not torch.allclose(gradient, policy_loss(trainer.args, logp, old, advantages, mask)[1])


@pytest.mark.parametrize("estimator", ["ctpo", "gppo", "grpo"])
def test_loss_leaves_the_trainer_as_it_was(estimator: str) -> None:
    """Also when it fails; and the batch, of which a later epoch makes another loss."""
    trainer = idle(estimator=estimator)
    settings = (trainer.epsilon_low, trainer.epsilon_high, trainer.args.delta)
    logp, old, advantages, mask = values(84, spread=0.1)
    batch = batch_of(old, advantages, mask)
    before = {name: tensor.clone() for name, tensor in batch.items()}
    first = loss_of(trainer, logp, batch)
    assert (trainer.epsilon_low, trainer.epsilon_high, trainer.args.delta) == settings
    assert set(batch) == set(before)
    assert all(torch.equal(batch[name], before[name]) for name in before)
    with pytest.raises(KeyError):
        loss_of(trainer, logp, {name: tensor for name, tensor in batch.items() if name != "advantages"})
    assert (trainer.epsilon_low, trainer.epsilon_high, trainer.args.delta) == settings
    again = loss_of(trainer, logp, batch)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("estimator", ["ctpo", "gppo", "grpo"])
def test_evaluation_changes_nothing(estimator: str) -> None:
    """Between the updates of one rollout: same parameters as without, nothing of it in the training's logs."""
    options = {"estimator": estimator, "steps_per_generation": 4, "max_steps": 4, "per_device_eval_batch_size": 4}
    plain, plain_log = trained(CTPOTrainer, **options)
    trainer = made(eval_strategy="steps", eval_steps=1, **options)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(plain, trainer.model.parameters(), strict=True))
    log = trainer.state.log_history
    evaluated = [entry for entry in log if "eval_loss" in entry]
    assert len(evaluated) == 4
    assert all(math.isfinite(entry["eval_loss"]) for entry in evaluated)
    assert "eval_reward" in evaluated[0]
    ours = [{key: entry[key] for key in entry if "time" not in key} for entry in log if "loss" in entry]
    assert ours == plain_log[:4]


def test_evaluation_is_that_of_trl() -> None:
    """Its loss too, for which TRL scores old log-probabilities itself."""
    found = []
    options = {"steps_per_generation": 4, "per_device_eval_batch_size": 4}
    for kind, own in ((CTPOTrainer, {"estimator": "dapo"}), (GRPOTrainer, {"loss_type": "dapo", "epsilon_high": 0.28})):
        metrics = made(kind, **options, **own).evaluate()
        found.append({name: metrics[name] for name in ("eval_loss", "eval_reward", "eval_entropy", "eval_reward_std")})
    assert found[0] == found[1]
    assert found[0]["eval_loss"] != 0


# ---------------------------------------------------------------------------------------------------------------------
# What the trainer relies on in TRL. A failure here says that the hook has to be looked at again.


class Reads(dict[str, Any]):
    """A batch that writes down what is read."""

    def __init__(self, batch: Tensors, events: list[str]) -> None:
        super().__init__(batch)
        self.events = events

    def __getitem__(self, name: str) -> Any:
        self.events.append(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.events.append(name)
        return super().get(name, default)


def test_trl_scores_before_it_reads_what_the_estimator_replaces() -> None:
    trainer = made(GRPOTrainer, loss_type="grpo")
    logp, old, advantages, mask = values(85, spread=0.1)
    events: list[str] = []

    def scored(*_: Any, **__: Any) -> Any:
        events.append("scored")
        return logp.clone().requires_grad_(), torch.zeros_like(logp), None

    with patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", scored):
        trainer._compute_loss(trainer.model, Reads(batch_of(old, advantages, mask), events))
    assert events.count("scored") == 1
    after = events[events.index("scored") :]
    for name in ("advantages", "old_per_token_logps"):
        assert name in after
        assert name not in events[: events.index("scored")]


def test_signatures_of_trl() -> None:
    def parameters(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    scoring = parameters(GRPOTrainer._get_per_token_logps_and_entropies)
    assert scoring[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    assert parameters(GRPOTrainer._compute_loss) == ["self", "model", "inputs"]
    assert parameters(GRPOTrainer._generate_and_score_completions) == ["self", "inputs"]
    rewards_of = ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    assert parameters(GRPOTrainer._calculate_rewards) == rewards_of
    assert parameters(GRPOTrainer._prepare_inputs) == ["self", "generation_batch"]


def test_trl_takes_windows_and_bounds_by_token() -> None:
    """Tensors in the place of `epsilon_low`, `epsilon_high` and `args.delta`: one number per token."""
    trainer = made(GRPOTrainer, loss_type="bnpo", delta=2.0)
    logp, old, advantages, mask = values(86, spread=0.3)
    low, high, delta = 0.3 * positive(1, logp), 0.3 * positive(2, logp), 1.5 + positive(3, logp)
    with patch.multiple(trainer, epsilon_low=low, epsilon_high=high), patch.object(trainer.args, "delta", delta):
        loss, _ = loss_of(trainer, logp, batch_of(old, advantages, mask))
    ratio = (logp - old).exp()
    by_token = advantages[:, None] * torch.ones_like(logp)
    cut = torch.minimum(torch.maximum(ratio, 1 - low), 1 + high)
    expected = -torch.minimum(torch.minimum(ratio, delta) * by_token, cut * by_token)[mask].mean()
    assert_close(loss, expected, tolerance=1e-12)


def test_trl_scores_old_log_probabilities_first(tmp_path: Path) -> None:
    """The first scoring of a rollout is that of old log-probabilities, which is replaced; a second is the reference."""
    trainer = made(saved=tmp_path, beta=0.1, **REUSED | {"max_steps": 1})
    scored = []
    scoring = GRPOTrainer._get_per_token_logps_and_entropies

    def spied(self: Any, model: Any, *args: Any, **options: Any) -> Any:
        scored.append("reference" if model is self.ref_model else "policy")
        return scoring(self, model, *args, **options)

    with patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", spied):
        trainer.train()
    # Four micro-batches' old ones, the noise floor, two updates.
    assert scored == ["reference"] + 7 * ["policy"]


# ---------------------------------------------------------------------------------------------------------------------
# Arguments.


def test_arguments_that_are_refused() -> None:
    model, tokenizer = tiny_chat_model()
    data = Dataset.from_dict({"prompt": ["a"]})
    stock = config_on_cpu(tempfile.gettempdir(), loss_type="grpo")
    with pytest.raises(ValueError, match="args must be a CTPOConfig, got GRPOConfig"):
        CTPOTrainer(model, rewards, stock, data, processing_class=tokenizer)
    ours = config_on_cpu(tempfile.gettempdir(), CTPOConfig, python_tool="calls")
    with pytest.raises(ValueError, match="tools must be None with python_tool='calls'"):
        CTPOTrainer(model, rewards, ours, data, processing_class=tokenizer, tools=[len])


def test_cautions_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ctpo.train.trainer"):
        made()
        assert "Every importance ratio is 1" in caplog.text
        caplog.clear()
        made(steps_per_generation=4)
        assert "importance ratio" not in caplog.text
