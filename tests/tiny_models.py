"""Language models of a few thousand parameters with a byte-level tokenizer and a chat template, built offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl.chat_template_utils import qwen3_instruct_2507_chat_template

# What SmolLM2-Instruct has: calls of tools are not rendered.
PLAIN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"qwen3": qwen3_instruct_2507_chat_template, "plain": PLAIN_TEMPLATE}


def tiny_tokenizer(template: Literal["qwen3", "plain"] = "qwen3") -> PreTrainedTokenizerFast:
    """A token for every byte, then those of Qwen3's chat format; `<|im_end|>` ends a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tags = [f"<{slash}{name}>" for name in ("tool_call", "tool_response", "think") for slash in ("", "/")]
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=TEMPLATES[template],
        clean_up_tokenization_spaces=False,
    )


def random_qwen3(*, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> Qwen3ForCausalLM:
    """A model of one layer; the same for the same `seed`, whatever was drawn before."""
    config = Qwen3Config(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, bos_token_id=None, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).to(dtype)
        for parameter in model.parameters():
            # Far from the flat distribution of a fresh model.
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def tiny_chat_model(
    template: Literal["qwen3", "plain"] = "qwen3", *, seed: int = 0
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """A random model and its tokenizer; the same for the same `seed`, whatever was drawn before."""
    tokenizer = tiny_tokenizer(template)
    model = random_qwen3(
        seed=seed,
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        head_dim=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model.eval(), tokenizer


def save_tiny_chat_model(
    directory: str | Path, *, template: Literal["qwen3", "plain"] = "qwen3", seed: int = 0
) -> Path:
    """Save what `tiny_chat_model` gives as `from_pretrained` reads it; returns the directory.

    "qwen3" renders tool calls and their results as Qwen3-Instruct-2507 does, "plain" ignores tools.
    """
    model, tokenizer = tiny_chat_model(template, seed=seed)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)
