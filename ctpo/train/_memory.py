"""How much memory a training needs, estimated from the model's configuration: no weights are read."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Estimate", "Sizes", "estimate", "offline", "sizes_of", "splitting"]

# Configurations of the models of the recipes, as far as sizes go: a plan needs no download.
_KNOWN: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-4B-Base": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-14B-Base": {
        "model_type": "qwen3",
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 17408,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
}
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "auto": 2.0}
# TRL's fused head: tokens by vocabulary of one tile, and float32 tiles beside it where there is no Triton.
_TILE_TOKENS, _TILE_WIDTH = 4096, 32768
_CPU_TILES = 7
# A prompt's tokens where no limit is given.
_PROMPT = 512


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model.

    Attributes:
        total: Parameters, with those of adapters.
        trainable: Those that are trained.
        head: Parameters of the output layer, 0 if they are not trained.
        layers: Number of layers.
        hidden: Width.
        queries: Numbers of the queries of a token and layer.
        cached: Those of keys and values.
        normed: Whether queries and keys have a norm of their own, as in Qwen3.
        intermediate: Width of the MLP.
        vocabulary: Number of tokens.
        context: Most tokens of a sequence; None where the configuration does not say.
        origin: Where the configuration is from.
    """

    total: int
    trainable: int
    head: int
    layers: int
    hidden: int
    queries: int
    cached: int
    normed: bool
    intermediate: int
    vocabulary: int
    context: int | None
    origin: str


def sizes_of(name: str, peft: Any = None, *, revision: str | None = None) -> Sizes | None:
    """The sizes of a model by name; None where nothing here knows its configuration.

    Args:
        name: A directory, a .gguf file, or a name on the Hub that lies in the cache or belongs to a recipe.
        peft: The configuration of adapters, of `peft`; None for none.
        revision: Of the Hub.

    Raises:
        ValueError: The adapters do not fit the model.
    """
    found = _config_of(name, revision)
    if found is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM

    config, origin = found
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight.numel()
    if peft is not None:
        from peft import get_peft_model

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = get_peft_model(model, peft)
    parameters = list(model.parameters())
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * width
    return Sizes(
        total=sum(one.numel() for one in parameters),
        trainable=sum(one.numel() for one in parameters if one.requires_grad),
        head=0 if peft is not None else head,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        queries=config.num_attention_heads * width,
        cached=cached,
        normed=any(part.endswith("q_norm") for part, _ in model.named_modules()),
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        context=getattr(config, "max_position_embeddings", None),
        origin=origin,
    )


def _config_of(name: str, revision: str | None) -> tuple[Any, str] | None:
    from transformers import AutoConfig

    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return AutoConfig.from_pretrained(path), str(path)
    if path.suffix == ".gguf" and path.is_file():
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name), str(path)
    with offline(), contextlib.suppress(Exception):  # not in the cache, in whatever words
        return AutoConfig.from_pretrained(name, revision=revision, local_files_only=True), "the cache of the Hub"
    if name in _KNOWN:
        known = dict(_KNOWN[name])
        return AutoConfig.for_model(known.pop("model_type"), **known), "the table of the recipes"
    return None


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Nothing is downloaded here: what is not in the cache is missing at once."""
    import datasets.config
    from huggingface_hub import constants

    modules: list[Any] = [constants, datasets.config]
    kept = [(module, module.HF_HUB_OFFLINE) for module in modules]
    for module, _ in kept:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in kept:
            module.HF_HUB_OFFLINE = value


def splitting(accelerate: Mapping[str, Any]) -> str:
    """How processes with a configuration of Accelerate share the model: "none", "zero1" to "zero3", or "fsdp"."""
    kind = str(accelerate.get("distributed_type", "NO")).upper()
    if kind == "DEEPSPEED":
        stage = int((accelerate.get("deepspeed_config") or {}).get("zero_stage", 2))
        return f"zero{stage}" if stage else "none"
    return "fsdp" if kind == "FSDP" else "none"


@dataclass(frozen=True)
class Estimate:
    """Bytes that one process needs, by what for.

    Attributes:
        training: What is there during an update: name to bytes and how they come about.
        sampling: What is added while answers are sampled, the model's weights apart.
    """

    training: dict[str, tuple[float, str]]
    sampling: dict[str, tuple[float, str]]

    @property
    def weights(self) -> float:
        """Bytes of the weights alone."""
        return self.training["weights"][0]


def estimate(sizes: Sizes, trainer: Any, model: Any, *, processes: int, split: str, max_prompt: int | None) -> Estimate:
    """What one process needs.

    Args:
        sizes: Of the model.
        trainer: A `CTPOConfig`.
        model: A `trl.ModelConfig`.
        processes: In all.
        split: What `splitting` says.
        max_prompt: Most tokens of a prompt; None where there is no limit.
    """
    full = sizes.trainable == sizes.total
    held = 0.5 if model.load_in_4bit else 1.0 if model.load_in_8bit else _BYTES.get(model.dtype or "float32", 4.0)
    wide = _BYTES.get(model.dtype or "float32", 4.0)
    kept = wide if full else 4.0
    mixed = trainer.bf16 or trainer.fp16
    reckon = 2.0 if mixed else wide
    deepspeed = split.startswith("zero")
    if deepspeed and mixed:
        held = min(held, 2.0)  # DeepSpeed keeps the float32 weights with the optimizer
    elif split == "fsdp" and mixed and full:
        held = kept = 4.0  # Accelerate makes float32 of them
    if split != "none" and mixed:
        wide = 2.0  # both compute with 16-bit weights; autocast alone leaves the residual stream as the weights are
    by = {name: processes if split in splits else 1 for name, splits in _SPLITS.items()}

    def part(count: float, each: float, among: int) -> tuple[float, str]:
        how = f"{_count(count)} x {each:g} bytes" + (f" / {among}" if among > 1 else "")
        return count * each / among, how

    gradient = 2.0 if deepspeed and mixed else kept
    states = 4.0 + _states(trainer.optim, 4.0) if deepspeed and mixed else _states(trainer.optim, kept)
    prompt = max_prompt or _PROMPT
    length = prompt + trainer.max_completion_length
    tokens = trainer.per_device_train_batch_size * length
    flash = "flash" in (model.attn_implementation or "")
    layer = _layer(sizes, wide, reckon, mask=0 if flash else length)
    ends = _norm(sizes, wide) + sizes.hidden * wide  # the last norm and the head's input
    if trainer.activation_checkpointing:
        active, how = sizes.layers * sizes.hidden * wide + layer + ends, "checkpointed, one layer in full"
    else:
        active, how = sizes.layers * layer + ends, "of all layers"
    training = {
        "weights": part(sizes.total, held, by["weights"]),
        "gradients": part(sizes.trainable, gradient, by["gradients"]),
        "optimizer": part(sizes.trainable, states, by["optimizer"]),
    }
    if reckon < held:
        copies, where = (sizes.total, "all") if by["weights"] == 1 else (sizes.total / sizes.layers, "one layer")
        training["16-bit copies"] = (copies * reckon, f"of the weights, {where}")
    if by["weights"] > 1 and deepspeed:
        training["gathered"] = (sizes.total / sizes.layers * held, "weights of one layer")
    training["activations"] = (tokens * active, f"{trainer.per_device_train_batch_size} x {length} tokens, {how}")
    passing = tokens * (2 * sizes.intermediate * reckon + 2 * sizes.hidden * wide)
    training["their gradients"] = (passing, "of a part of a layer at a time")
    # A GPU makes a tile in its full width whatever the vocabulary, and folds it in place.
    tile = _TILE_WIDTH * reckon
    if trainer.use_cpu:
        tile = min(_TILE_WIDTH, sizes.vocabulary) * (reckon + 4.0 * _CPU_TILES)
    head = min(tokens, _TILE_TOKENS) * tile + sizes.head * 4.0
    training["head"] = (head, "tiles of logits, gradient in float32")
    if trainer.beta:
        training["reference"] = (0.0, "adapters switched off") if model.use_peft else training["weights"]
    sampling = {}
    if not trainer.use_vllm:
        answers = trainer.per_device_train_batch_size * trainer.steps_per_generation
        sampling["keys and values"] = (
            answers * length * sizes.layers * sizes.cached * wide,
            f"{answers} x {length} tokens, all answers of a rollout batch at once",
        )
    elif trainer.vllm_mode == "colocate":
        own = sizes.total * 2.0 / trainer.vllm_tensor_parallel_size
        sampling["vLLM's weights"] = (own, f"16 bits, over {trainer.vllm_tensor_parallel_size} GPUs")
    return Estimate(training, sampling)


def _norm(sizes: Sizes, wide: float) -> float:
    """Bytes of a token that a norm keeps: its input in float32, and what it has normalized."""
    return sizes.hidden * (4.0 + wide)


def _layer(sizes: Sizes, wide: float, reckon: float, *, mask: int) -> float:
    """Bytes of a token that a layer keeps for its gradients.

    Args:
        sizes: Of the model.
        wide: Bytes of a number of the residual stream.
        reckon: Bytes of a number that is multiplied by weights.
        mask: Tokens that the mask of a padded batch has for each token; 0 for attention without one.
    """
    # Inputs of the products with weights: autocast makes a copy for each of q, k, v, gate and up.
    inputs = 5 * reckon if reckon < wide else 2 * reckon
    found = 2 * _norm(sizes, wide) + sizes.hidden * inputs
    keys = sizes.cached / 2
    if sizes.normed:
        found += (sizes.queries + keys) * (4.0 + reckon)
    # Queries and what attention returns; keys and values, repeated for all heads where there is a mask.
    found += 2 * sizes.queries * reckon + 2 * (sizes.queries if mask else keys) * reckon
    return found + mask * reckon + 4 * sizes.intermediate * reckon


# What is split over all processes, by what splits.
_SPLITS = {
    "weights": ("fsdp", "zero3"),
    "gradients": ("fsdp", "zero2", "zero3"),
    "optimizer": ("fsdp", "zero1", "zero2", "zero3"),
}


def _states(optimizer: str, kept: float) -> float:
    """Bytes of the optimizer's states by trainable parameter."""
    name = str(getattr(optimizer, "value", optimizer))
    if "8bit" in name:
        return 2.0
    if "4bit" in name:
        return 1.0
    if "adafactor" in name or name in ("sgd", "lomo", "adalomo"):
        return 0.0
    if "lion" in name or "rmsprop" in name or "adagrad" in name:
        return kept
    return 2 * kept


def _count(number: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f}"
