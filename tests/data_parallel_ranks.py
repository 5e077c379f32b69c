"""What every rank of tests/test_data_parallel.py runs, and the one process that it is compared with.

Completions are a function of the prompt and of the row in the global batch, not sampled: so one process and two have
the same. In what order the updates take the rows of a rollout batch is left to TRL on the ranks, and the one process
does the same.
"""

from __future__ import annotations

import datetime
import logging
import multiprocessing
import os
import traceback
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import trl.trainer.grpo_trainer as trl_module
from datasets import Dataset
from trl.trainer.utils import FusedCausalLMOutput
from trl_harness import VOCABULARY, tiny_model, word_tokenizer

from ctpo.train.config import CTPOConfig
from ctpo.train.trainer import CTPOTrainer

RANKS, ROWS, SPLITS, GROUP = 2, 3, 4, 8  # 24 rows a rollout; the second of its three groups lies on both ranks
PROMPTS = [" ".join(f"{i:03o}".translate(str.maketrans("01234567", "abcdefgh"))) for i in range(30)]
LONGEST = 40
Order = list[list[int]]  # rows of a rank's rollout batch as its updates take them, for each rollout


class Case(NamedTuple):
    """A run."""

    options: Mapping[str, Any]
    dtype: torch.dtype = torch.float64
    mistake: str = ""  # what to do wrong on the ranks


class Found(NamedTuple):
    """What a run leaves."""

    parameters: dict[str, torch.Tensor]
    logs: list[dict[str, float]]
    orders: Order


def config(case: Case, directory: Path, size: int) -> CTPOConfig:
    """The same global batch in `size` processes."""
    rows = RANKS * ROWS // size
    defaults: dict[str, Any] = {
        "max_steps": 6,
        "steps_per_generation": SPLITS,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",  # unlike Adam, it has the scale of a gradient
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "scale_rewards": "group",
        "per_device_train_batch_size": rows,
    }
    return CTPOConfig(
        output_dir=str(directory),
        report_to=[],
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        num_generations=GROUP,
        max_completion_length=LONGEST,
        noise_floor_sequences=rows * SPLITS,  # all of the rollout batch
        **defaults | case.options,
    )


class Rollouts:
    """Completions with tool gaps, of 1 to 40 tokens, some without a token of the policy."""

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        first = trainer.accelerator.process_index * len(prompts)
        before = trainer._step // trainer.args.steps_per_generation // trainer.num_iterations  # rollout batches
        made = [self.one(prompt, before, first + i) for i, prompt in enumerate(prompts)]
        ids, completions, masks = (list(x) for x in zip(*made, strict=True))
        return {"prompt_ids": ids, "completion_ids": completions, "env_mask": masks, "logprobs": None}

    def one(self, prompt: str, before: int, row: int) -> tuple[list[int], list[int], list[int]]:
        rng = np.random.default_rng([before, row, zlib.crc32(prompt.encode())])
        length = int(rng.integers(1, LONGEST + 1))
        completion, mask = rng.integers(2, len(VOCABULARY), length), (rng.random(length) < 0.8).astype(int)
        if row % 7 == 3 or (before == 1 and row >= ROWS * SPLITS):  # all rows of the second rank
            mask[:] = 0
        if length < LONGEST:
            completion[-1] = 1
        ids = [VOCABULARY.index(word) for word in prompt.split()]
        return ids[: 1 + row % 3], completion.tolist(), mask.tolist()


def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
    """Of the tokens; None now and then."""
    values = (sum((i + 1) * token for i, token in enumerate(ids)) % 11 / 10 for ids in completion_ids)
    return [None if value == 0.5 else value for value in values]


def exact_head(model: Any, temperature: float = 1.0, **_: Any) -> None:
    """In place of TRL's head, whose arithmetic is in float32 whatever the model's dtype."""
    plain = model.forward

    def forward(*args: Any, labels: torch.Tensor | None = None, fused_lm_head: bool = False, **options: Any) -> Any:
        if not fused_lm_head:
            return plain(*args, **options)
        assert labels is not None
        options["use_cache"] = False
        logp = torch.log_softmax(plain(*args, **options).logits[:, :-1] / temperature, -1)
        chosen = logp.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        chosen = torch.where(labels[:, 1:] == -100, 0.0, chosen)
        return FusedCausalLMOutput(log_probs=chosen, entropy=-(logp.exp() * logp).sum(-1))

    model.forward = forward


class Trainer(CTPOTrainer):
    """With rounding that one can see, and the mistakes of the negative controls."""

    mistake = ""

    def _scored(self, batch: dict[str, Any], model: Any = None) -> torch.Tensor:
        found = super()._scored(batch, model)
        if len(found) > 1:
            return found
        # Scored alone, each token is off by its own amount.
        return found + 1e-3 * torch.sin(1.0 + batch["completion_ids"] + torch.arange(found.shape[1]))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self.mistake == "tokens of the rank":
            own = (batch["completion_mask"] * batch["tool_mask"]).sum()
            batch["num_items_in_batch"] = own * self.accelerator.num_processes
        elif self.mistake == "advantages of the rank":
            own = batch["rewards"].view(-1, GROUP // 2)
            batch["advantages"] = (own - own.nanmean(1, keepdim=True)).nan_to_num().flatten()
        return batch


@contextmanager
def ordered(orders: Sequence[Order] | None) -> Iterator[Order]:
    """Rows in TRL's order, which is written down; or, in one process, in those of all ranks."""
    original, taken = trl_module.shuffle_sequence_dict, []

    def shuffle(batch: dict[str, Any]) -> dict[str, Any]:
        size = len(batch["completion_ids"])
        if orders is None:
            mixed = original(batch | {"order": torch.arange(size)})
            taken.append(mixed.pop("order").tolist())
            return mixed
        own = torch.stack([r * (size // RANKS) + torch.tensor(order[len(taken)]) for r, order in enumerate(orders)])
        order = own.unflatten(1, (SPLITS, -1)).transpose(0, 1).flatten()  # split by split, rank by rank
        taken.append(order.tolist())
        return {name: x[order] if isinstance(x, torch.Tensor) and x.ndim else x for name, x in batch.items()}

    with patch.object(trl_module, "shuffle_sequence_dict", shuffle):
        yield taken


def trainer_of(case: Case, directory: Path, size: int) -> Trainer:
    """A trainer at the start."""
    model = tiny_model(case.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are using 'rollout_func'")
        trainer = Trainer(
            model,
            reward_funcs=reward,
            args=config(case, directory, size),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=word_tokenizer(),
            rollout_func=Rollouts(),
        )
    trainer.mistake = case.mistake
    if case.mistake == "positions of the rank":
        everybody = trainer._by_position.pop
        trainer._by_position.pop = lambda gather: everybody(None)
    return trainer


def train(case: Case, directory: Path, size: int, orders: Sequence[Order] | None = None) -> Found:
    """One run, in this process or on all ranks."""
    with ExitStack() as stack:
        taken = stack.enter_context(ordered(orders))
        stack.enter_context(warnings.catch_warnings())
        # TRL 1.16 asks transformers 5.23 by the former name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        if case.dtype == torch.float64:
            stack.enter_context(patch.object(trl_module, "add_fused_lm_head", exact_head))
        trainer = trainer_of(case, directory, size)
        trainer.train()
    parameters = {name: x.detach().clone() for name, x in trainer.model.named_parameters()}
    return Found(parameters, trainer.state.log_history, taken)


def run(cases: Mapping[str, Case], folder: Path) -> list[dict[str, Found]]:
    """What each rank has found."""
    # A server imports once what takes long, and they are forked from it.
    multiprocessing.set_forkserver_preload(["ctpo.train.trainer"])
    torch.multiprocessing.start_processes(work, args=(cases, str(folder)), nprocs=RANKS, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def work(rank: int, cases: Mapping[str, Case], folder: str) -> None:
    """All runs of a rank; what it has found goes to a file, exceptions to the parent."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timeout)
    try:
        found = {name: train(case, Path(folder) / name, RANKS) for name, case in cases.items()}
        torch.save(found, Path(folder) / f"{rank}.pt")
    except BaseException:
        # The other rank waits for this one in a collective, and its error would be the one that is shown.
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()
