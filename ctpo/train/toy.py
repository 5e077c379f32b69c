r"""A language model that is made in a minute, to see a training from beginning to end on any laptop.

`make_toy` makes a Qwen3 of 363 thousand parameters from nothing: a vocabulary of bytes and of the fixed pieces of the
chat template, then a short supervised warm-up on dialogues of arithmetic. After it the model can do what the task
needs, but seldom does: in about one answer of six it calls the tool with the right expression and repeats what the tool
printed; mostly it guesses. Which of the two is right is left for reinforcement learning to find out.

The fixed pieces are single tokens: in bytes they would be nine tenths of a conversation, and of the time. All else is
as with any model: the stock template of Qwen3-Instruct-2507, and dialogues that `ctpo.train.tools.rollouts` makes with
a script in place of a model, so that their ids are those which training will see.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import numpy as np

from ctpo.train._made_problems import whole
from ctpo.train._rows import DataError, query, short
from ctpo.train.data import Problem, load_problems
from ctpo.train.generation import Sampling
from ctpo.train.sandbox import BackendName, Limits, Reply, Sandbox
from ctpo.train.tools import Rollout, rollouts, tool_format

if TYPE_CHECKING:
    import torch

__all__ = ["make_toy", "toy_options"]

WARMUP_STEPS = 700
BATCH = 32
LEARNING_RATE = 3e-3
# Few enough that their dialogues are made in seconds, many enough that none is learned by heart.
PROBLEMS = 2048
# After so large a part of the steps dialogues are as the model is to be at first; before, all are right.
RIGHT_UNTIL = 0.75
CORRECT, FAULTY = 0.2, 0.2

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CALL, CALLED = '<tool_call>\n{"name": "python", "arguments": {"code": "', '"}}\n</tool_call>'
ANSWER = f"{END}\n{START}assistant\n"
ASK = f"{START}user\n"
# A guess begins with words: bare numbers would share their probability among them, and the call be the likeliest
# beginning before any training.
GUESS = "The answer is "
MOST_TOKENS = 1024

Progress = Callable[[int, int, float], None]


def toy_options(name: str, *, seed: int = 0) -> dict[str, int]:
    """The options of `make_toy` that are in a model's name, ``toy`` or ``toy?warmup_steps=700&seed=0``.

    Args:
        name: Of the model.
        seed: What "seed" is where the name does not say.

    Returns:
        The options by name; those that are not given have their defaults.

    Raises:
        ValueError: The name is another one, or an option is unknown or out of its range.

    Example:
        >>> toy_options("toy?seed=3")
        {'warmup_steps': 700, 'seed': 3}
    """
    kind, _, options = name.partition("?")
    if kind != "toy":
        raise DataError(f"the model is {short(name)}, allowed is toy[?warmup_steps={WARMUP_STEPS}&seed=0]")
    given = query(options, ("warmup_steps", "seed"), name)
    return {
        "warmup_steps": whole(given, "warmup_steps", WARMUP_STEPS, 0, None, name),
        "seed": whole(given, "seed", seed, 0, None, name),
    }


def make_toy(
    directory: str | os.PathLike[str],
    *,
    warmup_steps: int = WARMUP_STEPS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Make the toy model and save it as `ctpo.train.generation.load_model` reads it.

    Runs on one thread of the processor: more are not faster for so small a model, and much slower where another process
    has the other cores.

    Args:
        directory: Where to; it appears when all is in it.
        warmup_steps: Optimizer steps of the warm-up. From 700 on, copying what the tool printed is learned for every
            seed that was tried; with 0 the model is random.
        seed: Of the parameters, the problems and their order, at least 0.
        progress: Called after every step with its number, `warmup_steps` and the step's loss in nats per token.

    Returns:
        The directory.

    Raises:
        ValueError: `directory` holds something, or another argument is out of its range.
        OSError: It cannot be written.

    Assumptions:
        The same arguments give the same model on the same machine and versions; elsewhere rounding may differ.

    Example:
        >>> import tempfile
        >>> from ctpo.train.generation import load_tokenizer
        >>> from ctpo.train.tools import tool_format
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     tokenizer = load_tokenizer(make_toy(f"{directory}/toy", warmup_steps=0))
        >>> prompt = [{"role": "user", "content": "What is 12 + 34?"}]
        >>> len(tool_format(tokenizer, "calls", backend="monty").prompt_ids(prompt))
        18
    """
    from transformers import GenerationConfig

    for option, value in (("warmup_steps", warmup_steps), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{option} must be an integer of at least 0, got {value!r}")
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"directory must be new or empty, got {path}, which is not")
    tokenizer = _tokenizer()
    with _one_thread():
        model = _model(tokenizer, seed)
        if warmup_steps:
            _warm_up(model, tokenizer, warmup_steps, seed, progress)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        os.chmod(temporary, 0o755)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ tokenizer and model


def _tokenizer() -> Any:
    """A token for every byte, and one for each fixed piece of the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast
    from trl.chat_template_utils import qwen3_instruct_2507_chat_template

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone,
        pad_token=PAD,
        eos_token=END,
        chat_template=qwen3_instruct_2507_chat_template,
        clean_up_tokenization_spaces=False,
    )
    # What stands before the first question, by backend: the descriptions of the tool are not alike.
    asked = [{"role": "user", "content": "?"}]
    openings = []
    for backend in get_args(BackendName):
        prompt = tokenizer.decode(tool_format(tokenizer, "calls", backend=backend).prompt_ids(asked))
        openings.append(prompt.removesuffix(f"?{ANSWER}"))
    controls = [START, ASK, ANSWER, f"{ASK}<tool_response>\n", f"\n</tool_response>{ANSWER}", *openings]
    for pieces, special in ((controls, True), ([CALL, CALLED], False)):
        tokenizer.add_tokens([AddedToken(piece, special=special, normalized=False) for piece in pieces])
    return tokenizer


def _model(tokenizer: Any, seed: int) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MOST_TOKENS,
        # Short waves: positions next to one another are far apart, which copying needs.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


# ----------------------------------------------------------------------------------------------------------- dialogues


@dataclass
class _Script:
    """A `Generator` that says what is written: by question, the text of turn after turn."""

    tokenizer: Any
    eos_token_ids: frozenset[int]
    turns: Mapping[tuple[int, ...], Sequence[str]]
    context: int | None = MOST_TOKENS

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[int]]:
        """The turn that is due in each conversation."""
        begins = self.tokenizer.convert_tokens_to_ids(ANSWER)
        said = []
        for ids in map(list, prompt_ids):
            turns = self.turns[tuple(ids[: ids.index(begins) + 1])]
            turn = sum(token in self.eos_token_ids for token in ids)
            said.append(list(self.tokenizer.encode(turns[turn] + END)))
        return said


@dataclass(frozen=True)
class _Known:
    """The backend and the worker of a sandbox that runs nothing: the values of all expressions are known."""

    values: Mapping[str, str]

    def start(self, timeout: float) -> Self:
        """Start nothing."""
        return self

    def run(self, code: str, timeout: float) -> Reply:
        """What is printed."""
        return Reply(f"{self.values[code]}\n", "", False)

    def kill(self) -> None:
        """End nothing."""

    def close(self) -> None:
        """Close nothing."""


def _dialogues(tokenizer: Any, seed: int, size: int) -> tuple[list[Rollout], list[Rollout]]:
    """A dialogue about each problem, twice: as it should be, and as it is to be in one of five."""
    problems = load_problems(f"arithmetic?difficulty=2&split=train&size={size}&seed={seed}", instruction="")
    values = {problem.extra_info["expression"]: problem.ground_truth for problem in problems}
    right = [_call(problem.extra_info["expression"], values) for problem in problems]
    mixed = []
    rng = np.random.default_rng([seed, 0])
    for problem, called in zip(problems, right, strict=True):
        kind = rng.random()
        if kind < CORRECT:
            mixed.append(called)
        elif kind < CORRECT + FAULTY:
            first, operator, last = problem.extra_info["expression"].split()
            other = f"{first} {rng.choice(list('+-*'.replace(operator, '')))} {last}"
            values[other] = str(_value(other))
            mixed.append(_call(other, values))
        else:
            mixed.append([f"{GUESS}{problems[rng.integers(size)].ground_truth}"])
    return _played(tokenizer, problems, right, values), _played(tokenizer, problems, mixed, values)


def _call(expression: str, values: Mapping[str, str]) -> list[str]:
    return [f"{CALL}{expression}{CALLED}", values[expression]]


def _value(expression: str) -> int:
    first, operator, last = expression.split()
    a, b = int(first), int(last)
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def _played(
    tokenizer: Any, problems: Sequence[Problem], turns: Sequence[Sequence[str]], values: Mapping[str, str]
) -> list[Rollout]:
    """The dialogues token by token; half of them with each description of the tool."""
    played = []
    backends = get_args(BackendName)
    for place, backend in enumerate(backends):
        prompts = [problem.prompt for problem in problems[place :: len(backends)]]
        form = tool_format(tokenizer, "calls", backend=backend)
        script = _Script(
            tokenizer,
            frozenset({tokenizer.eos_token_id}),
            dict(
                zip((tuple(form.prompt_ids(prompt)) for prompt in prompts), turns[place :: len(backends)], strict=True)
            ),
        )
        with Sandbox(backend, _Known(values), Limits()) as sandbox:
            played += rollouts(script, prompts, sampling=Sampling(MOST_TOKENS), tools="calls", sandbox=sandbox)
    return played


# ------------------------------------------------------------------------------------------------------------- warm-up


def _warm_up(model: Any, tokenizer: Any, steps: int, seed: int, progress: Progress | None) -> None:
    """Train on the tokens of the dialogues that a model would have sampled."""
    # A loop of its own: two sets of dialogues one after the other, and transformers' Trainer takes a tenth longer.
    import torch
    from torch.nn.functional import cross_entropy

    pools = [_padded(dialogues, tokenizer.pad_token_id) for dialogues in _dialogues(tokenizer, seed, PROBLEMS)]
    rng = np.random.default_rng([seed, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    model.train()
    for step in range(1, steps + 1):
        ids, said = pools[step > RIGHT_UNTIL * steps]
        chosen = torch.from_numpy(rng.integers(len(ids), size=BATCH))
        ids, said = ids[chosen], said[chosen, 1:]
        # Padding on the right needs no mask: no token before it sees it, and it is not said.
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits[said], ids[:, 1:][said])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, steps, loss.item())
    model.eval()


def _padded(dialogues: Sequence[Rollout], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of all dialogues, and which of them are a model's; both (dialogues, width)."""
    import torch

    width = max(len(one.prompt_ids) + len(one.completion_ids) for one in dialogues)
    ids = torch.full((len(dialogues), width), pad)
    said = torch.zeros((len(dialogues), width), dtype=torch.bool)
    for row, one in enumerate(dialogues):
        begin, end = len(one.prompt_ids), len(one.prompt_ids) + len(one.completion_ids)
        ids[row, :end] = torch.tensor(one.prompt_ids + one.completion_ids)
        said[row, begin:end] = torch.tensor(one.sampled)
    return ids, said
