"""Training runs of a few hundred parameters and a few tenths of a second, whole or cut off, and what they end with."""

from __future__ import annotations

import gc
import os
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_harness import config_on_cpu, tiny_model, word_tokenizer

from ctpo.train._checkpoints import ResumableTrainer
from ctpo.train.config import CTPOConfig
from ctpo.train.trainer import CTPOTrainer

# Log entries that a clock decides.
TIMED = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime")
TIMED += ("eval_samples_per_second", "eval_steps_per_second")


def reward(completions: list[str], **_: Any) -> list[float]:
    return [completion.count("a") - 0.5 * completion.count("b") + 0.01 * len(completion) for completion in completions]


def tiny_trainer(
    directory: str | Path, *, kind: type[GRPOTrainer] = ResumableTrainer, prompts: int = 6, **options: Any
) -> GRPOTrainer:
    """A trainer, by default of 4 steps: one generation batch of 4 prompts of 6 an epoch, used in 8 micro-batches."""
    given = {
        "max_completion_length": 6,
        "per_device_train_batch_size": 2,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_tqdm": True,
    }
    elsewhere = {name: options.pop(name) for name in ("eval_dataset", "model", "peft_config") if name in options}
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    rows = [f"{first} {second}" for first in "abcd" for second in "efgh"][:prompts]
    with quiet():
        return kind(
            elsewhere.pop("model", None) or tiny_model(),
            reward_funcs=reward,
            args=config_on_cpu(
                directory, CTPOConfig if issubclass(kind, CTPOTrainer) else GRPOConfig, **given | options
            ),
            train_dataset=Dataset.from_dict({"prompt": rows}),
            processing_class=tokenizer,
            **elsewhere,
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without a warning that means nothing here, and with one thread, which is faster for so small a model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # TRL 1.16 asks transformers 5.23 by the former name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def train(trainer: GRPOTrainer, *, seed: int = 99, **options: Any) -> GRPOTrainer:
    """Train; nothing that was drawn before in this process has a part in it."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    with quiet():
        trainer.train(**options)
    return trainer


def outcome(trainer: GRPOTrainer) -> dict[str, Any]:
    """Everything that two runs must have in common to be the same run."""
    return {
        "parameters": {name: value.detach().clone() for name, value in trainer.model.named_parameters()},
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
        "log": [
            {name: value for name, value in entry.items() if name not in TIMED} for entry in trainer.state.log_history
        ],
        "seen": (trainer.state.global_step, trainer.state.epoch, trainer.state.num_input_tokens_seen, trainer._step),
        "random": (torch.get_rng_state(), np.random.get_state()[1], random.getstate()),  # noqa: NPY002
    }


def same(left: Any, right: Any) -> bool:
    """Bit for bit, in nested containers; NaN equals NaN."""
    if isinstance(left, torch.Tensor | np.ndarray):
        return left.shape == right.shape and left.dtype == right.dtype and bytes(_raw(left)) == bytes(_raw(right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right) or (left != left and right != right)


def _raw(array: Any) -> bytes:
    return (array.contiguous().numpy() if isinstance(array, torch.Tensor) else array).tobytes()


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Names of the parts of an outcome that are not the same."""
    return [name for name in left if not same(left[name], right[name])]


class At(TrainerCallback):
    """Do something at the end of a step."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.action()


def forked(action: Callable[[], Any], log: Path) -> int:
    """Run `action` in a process of its own, without the seconds that imports take; returns the process's id.

    Its output is appended to `log`; it exits with 0, or with 1 after an exception.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, none of which does anything here
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        handle = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        torch.set_num_threads(1)
        gc.freeze()  # else every collection goes through all that was imported
        action()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
