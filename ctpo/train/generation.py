"""Sample tokens from a language model, with transformers or vLLM.

`load_model` reads a model from wherever it lies, `open_generator` makes a `Generator` of it. A generator maps token ids
to token ids: it neither renders nor parses text (`ctpo.train.tools` does), so what was sampled is never tokenized
again.

Nothing but the options of `Sampling` shapes the distribution. Many models ship sampling defaults of their own
(temperature 0.6, top_p 0.95 and a repetition penalty in Qwen's generation_config.json); only the ids that end a
sequence are taken from there.
"""

from __future__ import annotations

import contextlib
import json
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import numpy as np

__all__ = [
    "Backend",
    "Generator",
    "LogpGenerator",
    "Sampling",
    "TransformersGenerator",
    "VllmGenerator",
    "load_model",
    "load_tokenizer",
    "open_generator",
]

Backend = Literal["auto", "transformers", "vllm"]


@dataclass(frozen=True)
class Sampling:
    r"""How tokens are drawn: :math:`p(a) \propto \pi(a)^{1/\tau}` on the tokens that `top_k` and `top_p` leave.

    Args:
        max_tokens: Most tokens to sample.
        temperature: :math:`\tau`; 0 takes the most probable token.
        top_p: Smallest set of tokens that has this probability, in (0, 1]; 1 keeps all.
        top_k: Most probable tokens that are kept; 0 keeps all.
        stop: A sequence ends with the token that completes one of these strings; the token is kept.

    Raises:
        ValueError: An option is outside its range.

    Assumptions:
        Importance ratios of what was sampled are those of the policy at temperature 1 only without `top_p` and `top_k`.

    Example:
        >>> Sampling(max_tokens=64, temperature=0.0)
        Sampling(max_tokens=64, temperature=0.0, top_p=1.0, top_k=0, stop=())
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("top_k", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not _is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number, at least 0 and finite, got {self.temperature!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be a number in (0, 1], got {self.top_p!r}")
        if not isinstance(self.stop, (tuple, list)) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be a sequence of strings that are not empty, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


class Generator(Protocol):
    """What samples tokens.

    Attributes:
        tokenizer: Of the model, as transformers gives it.
        context: Most tokens that a prompt and its completion may have together; None where there is no limit.
        eos_token_ids: Ids that end a sequence.
    """

    tokenizer: Any
    context: int | None
    eos_token_ids: frozenset[int]

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[int]]:
        """Sample one completion of every prompt.

        Args:
            prompt_ids: Token ids by prompt.
            sampling: How tokens are drawn.
            seed: At least 0. The same prompts in the same order, `sampling` and `seed` give the same tokens, whatever
                was sampled before.

        Returns:
            The ids that were sampled, by prompt; the last one is of `eos_token_ids` where the model ended the sequence.
        """
        ...


@runtime_checkable
class LogpGenerator(Generator, Protocol):
    """A generator that knows with which probability it sampled."""

    def generate_with_logps(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, seed: int
    ) -> tuple[list[list[int]], list[list[float | None]] | None]:
        """What `generate` returns, and the log-probability of every sampled token.

        Args:
            prompt_ids: See `generate`.
            sampling: See `generate`.
            seed: See `generate`.

        Returns:
            The ids, and log-probabilities in nats, None for a token that has none; or None for all.
        """
        ...


def load_model(name: str | Path, *, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: One of

            - a directory with config.json, a Trainer's checkpoint among them,
            - a directory with adapter_config.json: a LoRA adapter (needs `peft`), put on the base model that it names,
            - a .gguf file (needs `gguf`), dequantized,
            - a name on the Hugging Face Hub, as in "Qwen/Qwen3-4B"; nothing is downloaded where HF_HUB_OFFLINE=1.
        dtype: "auto" (as saved; float32 on a CPU) or the name of a torch dtype.
        device: "auto" (the first accelerator that torch finds, else the CPU) or a torch device.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        ValueError: There is no model of that name; one line says where it was looked for.
        ImportError: A package that this kind of model needs is missing.

    Example:
        >>> load_model("./nowhere")
        Traceback (most recent call last):
        ...
        ValueError: model './nowhere': no such file or directory
    """
    import torch

    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = "cpu" if accelerator is None else accelerator.type
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype must be 'auto' or the name of a torch dtype such as 'bfloat16', got {dtype!r}")
    _check_device(device)
    if dtype == "auto" and torch.device(device).type == "cpu":
        dtype = "float32"
    source = _Source.find(name)
    if source.adapter is not None and find_spec("peft") is None:
        raise ImportError(f"model '{name}' is an adapter; to load it: pip install peft")
    tokenizer = _load_tokenizer(source)
    model = _from_pretrained("AutoModelForCausalLM", source, dtype=dtype)
    if source.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, source.adapter)
    return model.to(device).eval(), tokenizer


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch was built without it, it is not there, or no device
        raise ValueError(f"device {device!r}: {str(error).splitlines()[0]}") from None


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model, without the model.

    Args:
        name: As for `load_model`, or a directory that holds no more than a tokenizer.

    Returns:
        A tokenizer of transformers.

    Raises:
        ValueError: There is none; one line says where it was looked for.
        ImportError: A package that this kind of model needs is missing.

    Example:
        >>> load_tokenizer("./nowhere")
        Traceback (most recent call last):
        ...
        ValueError: model './nowhere': no such file or directory
    """
    directory = Path(name).expanduser()
    alone = bool(str(name)) and _has_tokenizer(directory)
    return _load_tokenizer(_Source(str(name), str(directory)) if alone else _Source.find(name))


def open_generator(
    model: str | Path | tuple[Any, Any],
    *,
    backend: Backend = "auto",
    batch_size: int = 16,
    dtype: str = "auto",
    device: str = "auto",
    **engine: Any,
) -> TransformersGenerator | VllmGenerator:
    """Make a `Generator` of a model.

    Args:
        model: What `load_model` takes, or what it returns.
        backend: "transformers", "vllm", or "auto": vLLM where it and a CUDA device are there and `model` is a Hub name
            or the directory of a whole model, else transformers.
        batch_size: Sequences that transformers samples at once; vLLM decides by itself.
        dtype: As in `load_model`.
        device: As in `load_model`; for transformers only.
        **engine: Further options of `vllm.LLM`; for vLLM only.

    Returns:
        The generator.

    Raises:
        ValueError: As in `load_model`, or an option does not fit the backend.
        ImportError: vLLM was asked for and is not installed.

    Example:
        >>> open_generator("Qwen/Qwen3-4B", backend="tensorflow")
        Traceback (most recent call last):
        ...
        ValueError: backend must be one of 'auto', 'transformers', 'vllm', got 'tensorflow'
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(map(repr, get_args(Backend)))}, got {backend!r}")
    if backend == "auto":
        backend = "vllm" if _vllm_can(model, device) else "transformers"
    if backend == "vllm":
        if isinstance(model, tuple):
            raise ValueError("backend 'vllm' loads the model itself: give its name, not a loaded model")
        return VllmGenerator(model, dtype=dtype, **engine)
    if engine:
        raise ValueError(f"options of vLLM with backend 'transformers': {', '.join(sorted(engine))}")
    loaded, tokenizer = model if isinstance(model, tuple) else load_model(model, dtype=dtype, device=device)
    return TransformersGenerator(loaded, tokenizer, batch_size=batch_size)


class TransformersGenerator:
    """Samples with `transformers`, in batches of prompts of similar length, padded on the left.

    What is sampled depends on `seed` and on which prompts come together, in which order and in batches of what size;
    it depends neither on what ran before nor on torch's global generators, which are left as they were.

    Args:
        model: A causal language model; a `peft` model and a model in training may be given too (dropout is off while
            sampling).
        tokenizer: Its tokenizer; one without a padding token will do.
        batch_size: Sequences at once.

    Raises:
        ValueError: `batch_size` is not positive.

    Example:
        >>> from types import SimpleNamespace
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=1, eos_token_id=None, **sizes))
        >>> tokenizer = SimpleNamespace(eos_token_id=None, pad_token_id=None)
        >>> generator = TransformersGenerator(model, tokenizer)
        >>> [len(ids) for ids in generator.generate([[1, 2, 3], [4]], Sampling(max_tokens=5), seed=0)]
        [5, 5]
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 16) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.eos_token_ids = _eos_token_ids(getattr(model, "generation_config", None), tokenizer)
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[int]]:
        """Sample one completion of every prompt, see `Generator.generate`."""
        import torch

        _check_prompts(prompt_ids, self.context)
        # The longest first: what does not fit into memory shows at once.
        order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        device = torch.device(self.model.device)
        completions: list[list[int]] = [[] for _ in prompt_ids]
        was_training = self.model.training
        self.model.eval()
        try:
            with self._own_generation_config(), _forked_rng(device):
                for batch, state in zip(batches, _seeds(seed, len(batches)), strict=True):
                    torch.manual_seed(state)
                    sampled = self._sample([prompt_ids[i] for i in batch], sampling, device)
                    for i, ids in zip(batch, sampled, strict=True):
                        completions[i] = ids
        finally:
            self.model.train(was_training)
        return completions

    def _sample(self, prompts: list[Sequence[int]], sampling: Sampling, device: Any) -> list[list[int]]:
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = min(self.eos_token_ids, default=0)
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
        draws: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            draws = {
                "do_sample": True,
                "temperature": float(sampling.temperature),
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
            }
        config = GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            eos_token_id=sorted(self.eos_token_ids) or None,
            pad_token_id=pad,
            **draws,
        )
        ends = Ends(self.tokenizer, width, len(prompts), self.eos_token_ids, sampling.stop)
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([ends]),
            )
        return [row[:end] for row, end in zip(out[:, width:].tolist(), ends.lengths, strict=True)]

    @contextlib.contextmanager
    def _own_generation_config(self) -> Iterator[None]:
        """Set the model's defaults aside: `generate` would take from them whatever is not given."""
        from transformers import GenerationConfig

        # `peft` hands its own to the model that it wraps.
        models = [self.model, *([self.model.get_base_model()] if hasattr(self.model, "get_base_model") else [])]
        kept = [model.generation_config for model in models]
        for model in models:
            model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            for model, config in zip(models, kept, strict=True):
                model.generation_config = config


class Ends:
    """Ends sequences and remembers where: afterwards an end cannot be told from the padding that follows it."""

    def __init__(self, tokenizer: Any, width: int, rows: int, eos: frozenset[int], stop: tuple[str, ...]) -> None:
        self.lengths: list[int | None] = [None] * rows
        self._tokenizer, self._width, self._eos, self._stop = tokenizer, width, eos, stop

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        length = input_ids.shape[1] - self._width
        tails = input_ids[:, self._width :][:, -_window(self._stop) :].tolist()
        for row, tail in enumerate(tails):
            if self.lengths[row] is None and (tail[-1] in self._eos or stopped(self._tokenizer, tail, self._stop)):
                self.lengths[row] = length
        return torch.tensor([end is not None for end in self.lengths], device=input_ids.device)


class VllmGenerator:
    """Samples with vLLM (0.8 or newer), which batches by itself.

    Every prompt has a seed of its own, made from `seed` and its place in the list. vLLM's arithmetic depends on how it
    batches requests, so equal seeds give nearly, not always exactly, equal samples.

    This class was written from vLLM's documentation and is tested against a stand-in for its interface; it has not been
    run with vLLM itself.

    Args:
        name: A Hub name or the directory of a whole model. vLLM reads neither adapters nor .gguf files here.
        dtype: "auto" or the name of a torch dtype.
        **engine: Further options of `vllm.LLM`, as in `max_model_len=8192, gpu_memory_utilization=0.8`.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: `name` is none of those.

    Example:
        >>> generator = VllmGenerator("Qwen/Qwen3-4B", max_model_len=8192)  # doctest: +SKIP
    """

    def __init__(self, name: str | Path, *, dtype: str = "auto", **engine: Any) -> None:
        source = _Source.find(name)
        if not source.whole:
            raise ValueError(f"model '{name}': vLLM takes a Hub name or the directory of a whole model")
        if find_spec("vllm") is None:
            raise ImportError("vLLM is not installed: pip install vllm, or use backend 'transformers'")
        from transformers import GenerationConfig
        from vllm import LLM

        self.tokenizer = _load_tokenizer(source)
        try:
            defaults = GenerationConfig.from_pretrained(source.model)
        except OSError:  # the model has no generation_config.json
            defaults = None
        self.eos_token_ids = _eos_token_ids(defaults, self.tokenizer)
        self._llm = LLM(model=source.model, dtype=dtype, **engine)
        self.context: int | None = self._llm.llm_engine.model_config.max_model_len

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[int]]:
        """Sample one completion of every prompt, see `Generator.generate`."""
        from vllm import SamplingParams

        _check_prompts(prompt_ids, self.context)
        parameters = [
            SamplingParams(
                n=1,
                max_tokens=sampling.max_tokens,
                temperature=float(sampling.temperature),
                top_p=sampling.top_p,
                top_k=sampling.top_k or -1,
                seed=state,
                stop=list(sampling.stop) or None,
                include_stop_str_in_output=True,
                stop_token_ids=sorted(self.eos_token_ids) or None,
                skip_special_tokens=False,
            )
            for state in _seeds(seed, len(prompt_ids))
        ]
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        outputs = self._llm.generate(prompts, sampling_params=parameters, use_tqdm=False)
        return [self._until_stop(list(output.outputs[0].token_ids), sampling.stop) for output in outputs]

    def _until_stop(self, ids: list[int], stop: tuple[str, ...]) -> list[int]:
        """Without tokens that vLLM may have sampled before it saw that a stop string was complete."""
        if not stop:
            return ids
        window = _window(stop)
        ends = (end for end in range(1, len(ids)) if stopped(self.tokenizer, ids[max(0, end - window) : end], stop))
        return ids[: next(ends, len(ids))]


@dataclass(frozen=True)
class _Source:
    """Where a model lies: arguments of `from_pretrained`, and the adapter that goes on it."""

    name: str
    model: str
    gguf: str | None = None
    adapter: str | None = None

    @property
    def whole(self) -> bool:
        """Whether it is a model that every library can read."""
        return self.gguf is None and self.adapter is None

    @property
    def tokenizer(self) -> str:
        """Directory or Hub name of the tokenizer."""
        if self.adapter is not None and (Path(self.adapter) / "tokenizer_config.json").exists():
            return self.adapter
        return self.model

    @classmethod
    def find(cls, name: str | Path) -> _Source:
        text = str(name)
        path = Path(name).expanduser()
        if not text:
            raise ValueError("model '': give a directory, a .gguf file or a name on the Hub")
        if path.is_file():
            if path.suffix.lower() != ".gguf":
                raise ValueError(f"model '{text}': a file must be a .gguf; give the directory of other models")
            return cls(text, str(path.parent), gguf=path.name)
        if path.is_dir():
            return cls._in_directory(text, path)
        parts = text.split("/")
        here = isinstance(name, Path) or path.suffix.lower() == ".gguf" or parts[0] in (".", "..", "~")
        if here or len(parts) > 2 or not all(parts):  # the Hub has no such names
            raise ValueError(f"model '{text}': no such file or directory")
        return cls(text, text)

    @classmethod
    def _in_directory(cls, text: str, path: Path) -> _Source:
        if (path / "config.json").exists():
            return cls(text, str(path))
        settings = path / "adapter_config.json"
        if settings.exists():
            try:
                base = json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"]
            except (ValueError, KeyError, TypeError):
                base = None
            if not isinstance(base, str) or not base:
                raise ValueError(f"model '{text}': adapter_config.json names no base_model_name_or_path")
            found = cls.find(base)
            return cls(text, found.model, gguf=found.gguf, adapter=str(path))
        checkpoints = sorted(path.glob("checkpoint-*"), key=lambda found: (len(found.name), found.name))
        inside = checkpoints or sorted(path.glob("*.gguf"))
        hint = f"; did you mean '{inside[-1]}'?" if inside else ""
        raise ValueError(f"model '{text}': the directory has neither config.json nor adapter_config.json{hint}")


def _load_tokenizer(source: _Source) -> Any:
    if source.tokenizer != source.model:
        source = _Source(source.name, source.tokenizer)
    elif Path(source.model).is_dir() and source.gguf is None and not _has_tokenizer(Path(source.model)):
        raise ValueError(f"model '{source.name}': the directory has no tokenizer; save the model's beside it")
    return _from_pretrained("AutoTokenizer", source)


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).exists() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model"))


def _from_pretrained(kind: str, source: _Source, **options: Any) -> Any:
    import transformers

    if source.gguf is not None:
        if find_spec("gguf") is None:
            raise ImportError(f"model '{source.name}' is a .gguf file; to load it: pip install gguf")
        options["gguf_file"] = source.gguf
    try:
        return getattr(transformers, kind).from_pretrained(source.model, **options)
    except Exception as error:
        # Damaged files, unknown architectures and everything that may befall a download, each an exception of its own.
        what = f"model '{source.name}': cannot be loaded"
        if not Path(source.model).exists():
            what = f"model '{source.name}': no such directory, and not to be had from the Hub or its cache"
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        raise ValueError(f"{what} ({type(error).__name__}: {first})") from error


def _eos_token_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a sequence: the tokenizer's, and those of the model's defaults (a chat model often has two)."""
    ids = getattr(generation_config, "eos_token_id", None)
    found = {ids} if isinstance(ids, int) else set(ids or ())
    return frozenset(found | ({tokenizer.eos_token_id} - {None}))


def _vllm_can(model: str | Path | tuple[Any, Any], device: str) -> bool:
    if isinstance(model, tuple) or find_spec("vllm") is None:
        return False
    import torch

    return torch.cuda.is_available() and device in ("auto", "cuda") and _Source.find(model).whole


def _check_prompts(prompt_ids: Sequence[Sequence[int]], context: int | None) -> None:
    for i, ids in enumerate(prompt_ids):
        if not len(ids):
            raise ValueError(f"prompt_ids[{i}] is empty; a model needs at least one token to go on from")
        if context is not None and len(ids) >= context:
            raise ValueError(f"prompt_ids[{i}] has {len(ids)} tokens; the model's context is {context}")


def _seeds(seed: int, count: int) -> list[int]:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
    return cast("list[int]", np.random.SeedSequence(seed).generate_state(count).tolist())


@contextlib.contextmanager
def _forked_rng(device: Any) -> Iterator[None]:
    import torch

    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        index = [device] if device.index is not None else [torch.accelerator.current_device_index()]
        with torch.random.fork_rng(devices=index, device_type=device.type):
            yield


def _window(stop: tuple[str, ...]) -> int:
    """Tokens at the end of a text that must hold a stop string completed by the last one: a token has a byte or more.

    A few more, since tokenizers with a mark for spaces drop one at the beginning of what they decode.
    """
    return max((len(text.encode()) for text in stop), default=0) + 4


def stopped(tokenizer: Any, ids: list[int], stop: tuple[str, ...]) -> bool:
    """Whether ids end with the token that completes a stop string, or a few tokens later."""
    if not stop:
        return False
    text = tokenizer.decode(ids[-_window(stop) :], skip_special_tokens=False)
    return any(end in text for end in stop)
