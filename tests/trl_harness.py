"""TRL's own `GRPOTrainer` on a CPU, without training: its loss of log-probabilities that a test chooses.

Nothing of TRL's arithmetic is replaced. A trainer is built from a real `GRPOConfig` over a model of a few hundred
parameters (15 ms, no download); its `_compute_loss` then runs with `_get_per_token_logps_and_entropies` handing out a
leaf tensor, so that any log-probability, mask, advantage and ratio can be tried, or with the model's own.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import torch
from datasets import Dataset
from tiny_models import random_qwen3
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

Config = TypeVar("Config", bound=GRPOConfig)

VOCABULARY = ("<pad>", "<eos>", *"abcdefgh")


class Result(NamedTuple):
    """A loss, its gradient with respect to the log-probabilities, and the metrics logged beside it."""

    loss: torch.Tensor
    gradient: torch.Tensor
    metrics: dict[str, Any]


def tiny_model(dtype: torch.dtype = torch.float64) -> Qwen3ForCausalLM:
    """The same model at every call."""
    return random_qwen3(
        dtype=dtype,
        vocab_size=len(VOCABULARY),
        hidden_size=8,
        intermediate_size=8,
        head_dim=4,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """That of `tiny_model`: a token for every word."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )


def config_on_cpu(directory: str | Path, kind: type[Config] = GRPOConfig, **options: Any) -> Config:
    """A configuration for a tiny model, which reports to nobody."""
    defaults = {"num_generations": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
    defaults |= {"report_to": [], "use_cpu": True, "bf16": False, "activation_checkpointing": False}
    return kind(output_dir=str(directory), **defaults | options)


@functools.cache
def trainer(**options: Any) -> GRPOTrainer:
    """The trainer of a `GRPOConfig` with these options, ready for its first gradient step."""
    defaults = {"max_completion_length": 16, "per_device_train_batch_size": 2}
    config = config_on_cpu(tempfile.gettempdir(), **defaults | options)  # nothing is saved
    made = GRPOTrainer(
        tiny_model(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=word_tokenizer(),
    )
    made.current_gradient_accumulation_steps = config.gradient_accumulation_steps  # what the training loop sets
    return made


def masks(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """TRL's two masks: tokens up to the padding, and those of them that no tool wrote."""
    right_of = mask.flip(-1).cumsum(-1).flip(-1)
    return {"completion_mask": (right_of > 0).long(), "tool_mask": mask.long()}


def trl_loss(
    logp: torch.Tensor,
    behavior_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    num_items: int | None = None,
    inputs: Mapping[str, torch.Tensor] | None = None,
    replaced: Mapping[str, Any] | None = None,
    **options: Any,
) -> Result:
    """`GRPOTrainer._compute_loss` of one micro-batch and its gradient.

    Args:
        logp: Log-probabilities of the completions, (B, T).
        behavior_logp: TRL's `old_per_token_logps`.
        advantages: (B,) or (B, T).
        mask: bool, (B, T), True at policy tokens; the others must hold ordinary numbers (TRL multiplies by the mask).
        num_items: Policy tokens of the whole generation batch; those of `mask` by default.
        inputs: Further entries of the batch that TRL reads.
        replaced: Attributes of the trainer to set for this call, those that no `GRPOConfig` gives here (`use_vllm`
            wants a vLLM) and those of the hook under test.
        **options: Options of `GRPOConfig`.
    """
    peer = trainer(**options)
    logp = logp.detach().clone().requires_grad_()
    batch = {
        "prompt_ids": torch.full((len(logp), 1), 2),
        "prompt_mask": torch.ones(len(logp), 1, dtype=torch.long),
        "completion_ids": torch.full(logp.shape, 3),
        **masks(mask),
        "advantages": advantages,
        "old_per_token_logps": behavior_logp,
        "num_items_in_batch": mask.sum() if num_items is None else torch.tensor(num_items),
        **(inputs or {}),
    }
    peer._metrics["train"].clear()
    scored = (logp, torch.zeros_like(logp), None)
    with patch.multiple(peer, _get_per_token_logps_and_entropies=lambda *_, **__: scored, **(replaced or {})):
        loss = peer._compute_loss(peer.model, batch)
    loss.backward()
    return Result(loss.detach(), logp.grad, dict(peer._metrics["train"]))


def trl_parameter_gradients(
    batch: Mapping[str, torch.Tensor], **options: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss with the log-probabilities that TRL takes from `tiny_model`, and its gradient by parameter."""
    peer = trainer(**options)
    peer.model.zero_grad()
    loss = peer._compute_loss(peer.model, batch)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in peer.model.named_parameters()}


def trl_rollout_batch(
    old_logp: torch.Tensor,
    sampling_logp: Sequence[Sequence[float | None]],
    mask: torch.Tensor,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """The batch that TRL makes of completions sampled by vLLM, its `importance_sampling_ratio` among it.

    Args:
        old_logp: Log-probabilities of the completions under the trainer's model, (B, T).
        sampling_logp: Log-probabilities that vLLM returned, as many per completion as it has tokens; None where it
            had none.
        mask: bool, (B, T).
        **options: Options of `GRPOConfig`.
    """
    peer = trainer(**options)
    tool_mask = [row[: len(logps)].long().tolist() for row, logps in zip(mask, sampling_logp, strict=True)]
    completion_ids = [[3] * len(logps) for logps in sampling_logp]
    prompts = ["a"] * len(completion_ids)
    generated = ([[2]] * len(prompts), completion_ids, tool_mask, prompts, list(sampling_logp), {}, None, None)
    scored = (old_logp, None, None)
    parts = {"_generate": lambda _: generated, "_get_per_token_logps_and_entropies": lambda *_, **__: scored}
    with patch.multiple(peer, use_vllm=True, **parts), warnings.catch_warnings():
        # TRL 1.16 asks transformers 5.23 by the former name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
