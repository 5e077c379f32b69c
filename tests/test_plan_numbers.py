"""The numbers of a plan against what happens: memory that autograd keeps, steps and ages of updates."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from tiny_run import quiet, tiny_trainer, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from trl import ModelConfig
from trl.trainer.utils import add_fused_lm_head
from trl_harness import config_on_cpu

from ctpo.train import _memory
from ctpo.train._memory import Estimate, estimate, sizes_of
from ctpo.train._options import parse
from ctpo.train._plan import _ages, oldest_update, optimizer_steps, rollout_batches
from ctpo.train.config import CTPOConfig
from ctpo.train.trainer import CTPOTrainer

# --------------------------------------------------------------------------------------------------------------- memory

# No two of hidden, MLP, queries, keys and tokens are the same, so that none stands in for another.
SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 160,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
ROWS, LENGTH = 4, 85
KINDS: dict[str, Any] = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
# Weights and whether autocast computes in bfloat16.
PRECISIONS = {
    "float32": ("float32", False),
    "autocast": ("float32", True),
    "bfloat16 weights": ("bfloat16", False),
    "bfloat16 weights, autocast": ("bfloat16", True),
}


def language_model(kind: str, layers: int, dtype: str, checkpointed: bool) -> Any:
    config, cls = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config(num_hidden_layers=layers, **SHAPE)).to(getattr(torch, dtype)).train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def log_probs(model: Any, amp: bool, padded: bool) -> torch.Tensor:
    tokens = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % SHAPE["vocab_size"]
    mask = torch.ones_like(tokens)
    mask[0, : 3 * padded] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        return model(input_ids=tokens, attention_mask=mask, labels=tokens, fused_lm_head=True)["log_probs"]


def kept_bytes(kind: str, precision: str, *, layers: int, checkpointed: bool = False, padded: bool = True) -> int:
    """What autograd keeps for the backward pass, without weights and their 16-bit copies."""
    dtype, amp = PRECISIONS[precision]
    model = language_model(kind, layers, dtype, checkpointed)
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    shapes = {shape for one in model.parameters() for shape in (tuple(one.shape), tuple(one.shape[::-1]))}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in weights and tuple(tensor.shape) not in shapes:
            found[storage] = tensor  # held, so that nothing else is made in its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        log_probs(model, amp, padded)
    return sum(one.untyped_storage().nbytes() for one in found.values())


def estimated(
    tmp_path: Path, kind: str, precision: str, *, layers: int, checkpointed: bool, split: str = "none", **model: Any
) -> Estimate:
    dtype, amp = PRECISIONS[precision]
    KINDS[kind][0](num_hidden_layers=layers, **SHAPE).save_pretrained(tmp_path)
    trainer = SimpleNamespace(
        bf16=amp,
        fp16=False,
        optim="adamw_torch",
        per_device_train_batch_size=ROWS,
        max_completion_length=LENGTH - 5,
        activation_checkpointing=checkpointed,
        beta=0.0,
        use_vllm=False,
        steps_per_generation=3,
        use_cpu=True,
    )
    sizes = sizes_of(str(tmp_path))
    assert sizes is not None
    assert sizes.normed == (kind == "qwen3")
    settings = ModelConfig(dtype=dtype, **model)
    return estimate(sizes, trainer, settings, processes=1, split=split, max_prompt=5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_what_autograd_keeps(tmp_path: Path, kind: str, precision: str) -> None:
    """To 2 %: norms' factors and attention's sums, one number a token and head, are left out of the estimate."""
    kept = kept_bytes(kind, precision, layers=3)
    found = estimated(tmp_path, kind, precision, layers=3, checkpointed=False).training["activations"][0]
    assert found == pytest.approx(kept, rel=0.02)
    # Checkpointed: what is kept forward, and a layer that is computed again.
    layer = kept - kept_bytes(kind, precision, layers=2)
    kept = kept_bytes(kind, precision, layers=3, checkpointed=True) + layer
    found = estimated(tmp_path, kind, precision, layers=3, checkpointed=True).training["activations"][0]
    assert found == pytest.approx(kept, rel=0.02)
    # Flash attention has no mask and repeats no keys and values: so does sdpa where nothing is padded.
    kept = kept_bytes(kind, precision, layers=3, padded=False)
    flash = estimated(
        tmp_path, kind, precision, layers=3, checkpointed=False, attn_implementation="flash_attention_2"
    ).training["activations"][0]
    assert flash == pytest.approx(kept, rel=0.02)


class Live(TorchDispatchMode):
    """Bytes of all tensors that operations have made and that are still there, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor) and one.untyped_storage()._cdata not in self.known:
                storage = one.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_update_needs_no_more_than_the_plan_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, checkpointed: bool
) -> None:
    """Forward and backward of a micro-batch that is not the first one of its update: gradients are there."""
    dtype, amp = PRECISIONS[precision]
    # A processor touches of a tile what the vocabulary is, and what is counted here is what is asked for.
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", SHAPE["vocab_size"])
    model = language_model("qwen3", 3, dtype, checkpointed)
    log_probs(model, amp, padded=True).sum().backward()
    gc.collect()
    given = [tensor.untyped_storage() for one in model.parameters() for tensor in (one, one.grad)]
    with Live() as live:
        live.known |= {storage._cdata for storage in given}
        log_probs(model, amp, padded=True).sum().backward()
    found = estimated(tmp_path, "qwen3", precision, layers=3, checkpointed=checkpointed).training
    rows = {name: size for name, (size, _) in found.items() if name not in ("weights", "gradients", "optimizer")}
    said = sum(rows.values())
    assert live.most <= said
    # Nor much more; of the head and a layer that is computed again, with its 16-bit copies, one is there at a time.
    apart = min(rows["head"], rows["activations"] + rows["their gradients"]) if checkpointed else 0
    assert said - apart <= (1.4 if checkpointed else 1.1) * live.most


def test_tiles_of_the_head_are_those_of_trl() -> None:
    assert trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE == _memory._TILE_WIDTH
    assert trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE == _memory._TILE_TOKENS


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_are_what_the_cache_holds(tmp_path: Path, kind: str, precision: str) -> None:
    dtype, amp = PRECISIONS[precision]
    model = language_model(kind, 2, dtype, checkpointed=False).eval()
    tokens = torch.arange(ROWS * 3 * (LENGTH - 20)).view(ROWS * 3, -1) % SHAPE["vocab_size"]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp), torch.no_grad():
        made = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=21, do_sample=False,
            return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    held = sum(tensor.nbytes for layer in made.past_key_values.layers for tensor in (layer.keys, layer.values))
    found = estimated(tmp_path, kind, precision, layers=2, checkpointed=False)
    # All but the last token are in the cache.
    assert found.sampling["keys and values"][0] == held


@pytest.mark.parametrize(("words", "gigabytes"), [((), 40), (("--steps_per_generation", "8"), 24)])
def test_the_gpu_that_smollm2_needs(words: tuple[str, ...], gigabytes: int) -> None:
    """As its first lines say, with a quarter to spare for CUDA and fragments."""
    plan = parse(["--config", "smollm2", *words]).plan(world_size=1)
    sizes = sizes_of(str(plan.model.model_name_or_path))
    assert sizes is not None
    found = estimate(sizes, plan.trainer, plan.model, processes=1, split="none", max_prompt=plan.run.max_prompt_tokens)
    update = sum(size for size, _ in found.training.values())
    sampling = sum(found.training[name][0] for name in ("weights", "optimizer")) + found.sampling["keys and values"][0]
    assert max(update, sampling) < 0.75 * gigabytes * 1e9


@pytest.mark.parametrize(("split", "each"), [("none", (2, 2, 4)), ("fsdp", (4, 4, 8)), ("zero2", (2, 2, 12))])
def test_weights_of_16_bits_in_many_processes(tmp_path: Path, split: str, each: tuple[int, ...]) -> None:
    """Accelerate trains float32 weights with FSDP, and both kinds of sharding compute with weights of 16 bits."""
    found = estimated(tmp_path, "qwen3", "bfloat16 weights, autocast", layers=2, checkpointed=True, split=split)
    total = sum(one.numel() for one in language_model("qwen3", 2, "bfloat16", checkpointed=False).parameters())
    assert tuple(found.training[name][0] / total for name in ("weights", "gradients", "optimizer")) == each
    wide = estimated(tmp_path, "qwen3", "autocast", layers=2, checkpointed=True, split=split)
    same = wide.training["activations"] == found.training["activations"]
    assert same == (split != "none")


# -------------------------------------------------------------------------------------------------------------- updates


class Ages(CTPOTrainer):
    """Notes how many optimizer steps old each micro-batch is, and how often it has sampled."""

    ages: list[int]
    sampled = 0

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            self._born = self.state.global_step
            self.sampled += 1
        self.ages = [*getattr(self, "ages", []), self.state.global_step - self._born]
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize(
    ("accumulation", "generation", "iterations", "prompts", "epochs", "max_steps"),
    [
        (1, 4, 1, 12, 2, -1),
        (2, 4, 1, 9, 1, -1),
        (4, 6, 1, 9, 2, -1),  # an epoch ends within an update
        (3, 4, 1, 12, 2, -1),
        (3, 5, 1, 10, 1, -1),
        (5, 8, 1, 16, 1, -1),
        (5, 8, 1, 8, 2, -1),  # one rollout batch an epoch: the same settings, but none starts within an update
        (4, 2, 1, 8, 1, -1),  # several rollout batches an update
        (4, 2, 2, 8, 2, -1),
        (3, 2, 2, 8, 1, -1),
        (2, 3, 1, 9, 1.5, -1),
        (4, 6, 1, 9, 1, 7),  # three epochs and a half
    ],
)
def test_steps_and_ages_are_those_of_the_run(
    tmp_path: Path, accumulation: int, generation: int, iterations: int, prompts: int, epochs: float, max_steps: int
) -> None:
    trainer = tiny_trainer(
        tmp_path,
        kind=Ages,
        prompts=prompts,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=generation,
        num_iterations=iterations,
        num_train_epochs=epochs,
        max_steps=max_steps,
        save_strategy="no",
        report_to="none",
    )
    train(trainer)
    assert optimizer_steps(trainer.args, prompts) == trainer.state.global_step
    assert rollout_batches(trainer.args, prompts) == trainer.sampled
    assert oldest_update(trainer.args, prompts) == max(trainer.ages)


@pytest.mark.parametrize(
    ("accumulation", "generation", "iterations", "problems", "text"),
    [
        (1, 4, 1, None, "; the last one is 3 updates old"),
        (2, 4, 2, None, ", each answer in 2 of them; the last one is 3 updates old"),
        (3, 4, 1, None, " on average; the last one is at most 1 update old"),
        (5, 8, 1, None, " on average; the last one is at most 2 updates old"),
        (5, 8, 1, 8, " on average; the last one is at most 1 update old"),
        (4, 2, 1, None, ", the policy is the one that sampled"),
    ],
)
def test_ages_are_told(
    tmp_path: Path, accumulation: int, generation: int, iterations: int, problems: int | None, text: str
) -> None:
    options = {"gradient_accumulation_steps": accumulation, "steps_per_generation": generation}
    with quiet():
        args = config_on_cpu(tmp_path, CTPOConfig, per_device_train_batch_size=2, num_iterations=iterations, **options)
    assert _ages(args, problems) == text
    assert optimizer_steps(args, None) is None
    assert rollout_batches(args, None) is None
