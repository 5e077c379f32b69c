"""Completions from vLLM in `CTPOTrainer`: the weights that correct for its log-probabilities.

vLLM itself is not here. What stands for it draws tokens with log-probabilities of its own, some of them unknown; the
trainer's code from there on is the real one, and for TRL's modes the steps are those of TRL's trainer.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_trainer, train
from trl import GRPOTrainer
from trl_harness import VOCABULARY

import ctpo
from ctpo.train.trainer import CTPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
HIGH = 1.3


class Engine:
    """Uniform tokens, log-probabilities off by noise around those of the uniform distribution."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(3)

    def sync_weights(self) -> None:
        pass

    def generate(self, prompts: list[list[int]], **_: Any) -> tuple[Any, ...]:
        ids, logps = [], []
        for _prompt in prompts:
            length = int(torch.randint(1, 7, (), generator=self._generator))
            ids.append(torch.randint(2, len(VOCABULARY), (length,), generator=self._generator).tolist())
            noise = 0.3 * torch.randn(length, generator=self._generator)
            logps.append([[float(x) - math.log(len(VOCABULARY))] for x in noise])
        logps[0][0] = [math.nan]
        return None, ids, logps, None


def with_engine(trainer: GRPOTrainer) -> GRPOTrainer:
    """The trainer, sampling from the engine."""
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Engine(), -1
    return trainer


def options(mode: str) -> dict[str, Any]:
    return {
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": HIGH,
        "num_iterations": 1,
        "save_strategy": "no",
        "max_steps": 6,
    }


class Recording(CTPOTrainer):
    """Keeps the inputs of every loss."""

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        self.__dict__.setdefault("seen", []).append(dict(inputs))
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize(
    ("estimator", "theirs", "mode"),
    [
        (estimator, theirs, mode)
        for estimator, theirs in [
            ("grpo", {"loss_type": "grpo"}),
            ("dapo", {"loss_type": "dapo", "epsilon_high": 0.28}),
            ("vespo", {"loss_type": "vespo"}),
        ]
        for mode in ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
        if estimator != "vespo" or mode.startswith("token")
    ],
)
def test_steps_are_those_of_trl(tmp_path: Path, mode: str, estimator: str, theirs: dict[str, Any]) -> None:
    ours = with_engine(tiny_trainer(tmp_path, kind=CTPOTrainer, estimator=estimator, **options(mode)))
    stock = with_engine(tiny_trainer(tmp_path, kind=GRPOTrainer, **theirs, **options(mode)))
    train(ours), train(stock)
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, stock.model.get_parameter(name), rtol=1e-7, atol=1e-9)
    name = "sampling/sampling_logp_difference/"
    for one, other in zip(ours.state.log_history[:-1], stock.state.log_history[:-1], strict=True):
        for ending in ("mean", "max"):
            if name + ending in other:
                assert one[name + ending] == pytest.approx(other[name + ending], rel=1e-5)
    other_mode = "token_mask" if mode != "token_mask" else "token_truncate"
    another = train(with_engine(tiny_trainer(tmp_path, kind=GRPOTrainer, **theirs, **options(other_mode))))
    pairs = zip(ours.model.parameters(), another.model.parameters(), strict=True)
    assert max((one - two).abs().max() for one, two in pairs) > 1e-5


@pytest.mark.parametrize("mode", ["cumulative_truncate", "cumulative_mask", "sequence_mean_mask"])
def test_weights_are_those_of_rollout_correction(tmp_path: Path, mode: str) -> None:
    """Also for levels that TRL does not have; every weight multiplies what `policy_loss` says without it."""
    trainer = tiny_trainer(tmp_path, kind=Recording, **options(mode))
    with_engine(trainer)
    train(trainer)
    level, mode = mode.rsplit("_", 1)
    assert len(trainer.seen) >= 6
    moved = 0
    for inputs in trainer.seen:
        old, engine = inputs["old_per_token_logps"], inputs["sampling_per_token_logps"]
        mask = inputs["completion_mask"].bool()
        engine = torch.where(engine.isnan(), old, engine)
        found = ctpo.rollout_correction(old, engine, mask, level=level, mode=mode, high=HIGH)
        expected = found.weights.where(mask, 1.0)
        torch.testing.assert_close(inputs["importance_sampling_ratio"], expected, rtol=1e-6, atol=1e-7)
        moved += int((found.weights != 1)[mask].sum())
    assert moved > 10
    assert "rollout/ess_fraction" in trainer.state.log_history[0]


def test_the_rollout_is_scored_once(tmp_path: Path) -> None:
    """TRL would score for the weights in micro-batches of its own; here the update's scores serve both."""
    trainer = tiny_trainer(tmp_path, kind=CTPOTrainer, noise_floor_sequences=0, **options("token_truncate"))
    with_engine(trainer)
    passes = []
    trainer.model.register_forward_hook(lambda *_: passes.append(1))
    train(trainer)
    rollouts, updates = 2, 6
    assert len(passes) == rollouts * 4 + updates


def test_unknown_modes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vllm_importance_sampling_mode must be one of .*'tokn_mask' \(did you mean"):
        tiny_trainer(tmp_path, kind=CTPOTrainer, vllm_importance_sampling_mode="tokn_mask")
