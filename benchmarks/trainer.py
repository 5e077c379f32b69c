"""`python -m benchmarks.trainer`: time and memory of a step of `CTPOTrainer` beside TRL's `GRPOTrainer`.

Same model (random weights), prompts, seed and settings; a rollout batch serves four optimizer steps. Completions are
recorded ones, of 256 to 1024 tokens, so that what is timed is everything but their sampling: rewards, old
log-probabilities, updates, metrics, logs at every step. A second measurement samples them, with transformers.

All trainers are in one process and take turns: a turn is one rollout batch with its four steps, a round is a turn of
each, begun by another one every time. What counts is the ratio to TRL's turn of the same round: the median over the
rounds, with the order statistics that enclose the true median with 95 % (at least). The same of the time of all
processors together, which other programs on the machine disturb less. Memory is the peak of a turn above what was there
before it, all that torch allocates.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import binom
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.losses import device_name, peak_memory, synchronize
from ctpo.train.config import CTPOConfig
from ctpo.train.trainer import CTPOTrainer

STEPS, ROWS, GROUP = 4, 4, 4  # of a turn; sequences of a micro-batch, one micro-batch a step; and of a prompt
WORDS, PROMPTS, PROMPT = 1024, 64, 32
SHORTEST, LONGEST, SAMPLED = 256, 1024, 128
BEGIN, END = "<!-- trainer: begin -->", "<!-- trainer: end -->"
PEER = "TRL's GRPOTrainer, GRPO"
# What `CTPOTrainer` is given. The noise floor is off but where it is measured.
VARIANTS: dict[str, dict[str, Any]] = {
    "GRPO": {"estimator": "grpo", "noise_floor_sequences": 0},
    "CTPO": {"noise_floor_sequences": 0},
    "CTPO, noise floor of one sequence (default)": {},
    "CTPO, noise floor, traces of every step": {"log_ratio_traces": 1},
}
SAMPLING = ("CTPO, noise floor of one sequence (default)",)


def model_and_tokenizer(device: torch.device) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """A Qwen3 of one and a half million parameters, the same at every call, and a tokenizer that knows numbers."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=WORDS,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=PROMPT + LONGEST,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    words = {str(i): i for i in range(WORDS)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), pad_token="0", eos_token="1"
    )
    return Qwen3ForCausalLM(config).to(device), tokenizer


class Recorded:
    """Completions by prompt and turn: the same for every trainer."""

    def __init__(self) -> None:
        self.turn = 0

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """What TRL wants of a `rollout_func`."""
        del trainer
        rng = np.random.default_rng(self.turn)
        self.turn += 1
        lengths = rng.permutation(np.linspace(SHORTEST, LONGEST, len(prompts)).astype(int))
        return {
            "prompt_ids": [[int(word) for word in prompt.split()] for prompt in prompts],
            "completion_ids": [rng.integers(2, WORDS, length).tolist() for length in lengths],
            "logprobs": None,
        }


def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """As good as random, and always the same."""
    return [sum(ids) % 97 / 96 for ids in completion_ids]


class Clock(TrainerCallback):
    """Seconds of a turn, from its first step to the log after its last."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = self.processor = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start at the first."""
        if state.global_step == 0:
            synchronize(self.device)
            self.start = time.perf_counter(), time.process_time()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        """Stop at the last, not at the summary after it."""
        if state.global_step == STEPS and "train_runtime" not in logs:
            synchronize(self.device)
            self.seconds, self.processor = time.perf_counter() - self.start[0], time.process_time() - self.start[1]


class Runner:
    """A trainer that trains for one turn at a time."""

    def __init__(self, trainer: GRPOTrainer, device: torch.device) -> None:
        self.trainer, self.clock, self.turns = trainer, Clock(device), 0
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(self.clock)

    def turn(self) -> tuple[float, float]:
        """Seconds by the clock on the wall and of all processors."""
        torch.manual_seed(self.turns)
        self.turns += 1
        self.trainer.train()
        return self.clock.seconds, self.clock.processor


def runner(device: torch.device, directory: Path, changes: Mapping[str, Any] | None, *, sampled: bool) -> Runner:
    """TRL's trainer if there are no changes at all."""
    shared: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "steps_per_generation": STEPS,
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": 1,
        "num_generations": GROUP,
        "max_completion_length": SAMPLED if sampled else LONGEST,
        "learning_rate": 1e-5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
        "bf16": False,
        "activation_checkpointing": False,
        # So that no completion is shorter than another trainer's.
        "generation_kwargs": {"min_new_tokens": SAMPLED} if sampled else None,
    }
    model, tokenizer = model_and_tokenizer(device)
    rng = np.random.default_rng(0)
    data = Dataset.from_dict({"prompt": [" ".join(map(str, row)) for row in rng.integers(2, WORDS, (PROMPTS, PROMPT))]})
    kind: Any = GRPOTrainer if changes is None else CTPOTrainer
    args = GRPOConfig(loss_type="grpo", **shared) if changes is None else CTPOConfig(**shared | dict(changes))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are using 'rollout_func'")
        trainer = kind(
            model,
            reward_funcs=reward,
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
            rollout_func=None if sampled else Recorded(),
        )
    return Runner(trainer, device)


def median(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the order statistics around it."""
    found = sorted(values)
    place = max(int(binom.ppf(0.025, len(found), 0.5)) - 1, 0)
    return statistics.median(found), found[place], found[len(found) - 1 - place]


def measure(device: torch.device, names: Sequence[str], *, rounds: int, sampled: bool) -> list[dict[str, Any]]:
    """Rounds of turns; a first one warms up."""
    variants = {PEER: None} | {name: VARIANTS[name] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        runners = {
            name: runner(device, Path(folder, str(i)), changes, sampled=sampled)
            for i, (name, changes) in enumerate(variants.items())
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
        for i in range(rounds + 1):
            order = list(runners)[i % len(runners) :] + list(runners)[: i % len(runners)]
            for name in order:
                seconds = runners[name].turn()
                if i > 0:
                    times[name].append(seconds)
        memory = {name: peak_memory(lambda here=here: here.turn(), device) for name, here in runners.items()}  # type: ignore[misc]
    rows = []
    for name, found in times.items():
        ratios = [[a[k] / b[k] for a, b in zip(found, times[PEER], strict=True)] for k in (0, 1)]
        rows.append(
            {
                "completions": "sampled" if sampled else "recorded",
                "trainer": name if name == PEER else f"CTPOTrainer, {name}",
                "seconds per step": statistics.median(seconds for seconds, _ in found) / STEPS,
                "times TRL's": median(ratios[0]),
                "processor time": median(ratios[1]),
                "peak MiB": memory[name],
            }
        )
    return rows


def cells(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """As they are printed."""
    peers = {row["completions"]: row for row in rows if row["trainer"] == PEER}
    for row in rows:
        peer = peers[row["completions"]]
        yield {
            "completions": row["completions"],
            "trainer": row["trainer"],
            "s a step": f"{row['seconds per step']:.3f}",
            **{
                name: "1" if row is peer else "{:.3f} ({:.3f} to {:.3f})".format(*row[name])
                for name in ("times TRL's", "processor time")
            },
            "peak MiB": f"{row['peak MiB']:.1f}",
            "more than TRL's": "" if row is peer else f"{100 * (row['peak MiB'] / peer['peak MiB'] - 1):+.2f} %",
        }


def markdown(result: Mapping[str, Any]) -> str:
    """The table of the page."""
    rows, settings = list(cells(result["rows"])), result["provenance"]["configuration"]
    return "\n".join(
        [
            f"{settings['device']}, {settings['processor']}; {settings['parameters'] / 1e6:.1f} million parameters, "
            f"float32, {ROWS * STEPS} completions of {SHORTEST} to {LONGEST} tokens (sampled: {SAMPLED}) for {STEPS} "
            f"steps, {settings['rounds']} rounds (sampled: {settings['sampled_rounds']}); goal: within 1 %",
            "",
            "| " + " | ".join(rows[0]) + " |",
            "|---|---|" + "--:|" * (len(rows[0]) - 2),
            *("| " + " | ".join(row.values()) + " |" for row in rows),
            "",
        ]
    )


def with_table(page: str, result: Mapping[str, Any]) -> str:
    """A page with the table between its markers; ValueError if it does not have both once."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise ValueError(f"the page must have {BEGIN} and then {END}, once each")
    return f"{before}{BEGIN}\n{markdown(result)}{END}{after}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the trainers' warnings of models and versions, the same at every turn."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; write it with `--output` and `--page`."""
    from simulations import results, tables

    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--sampled-rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, help="also write the rows as JSON, with commit, versions and machine")
    parser.add_argument("--page", type=Path, help="also write the table between the markers of a page")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    with quiet():
        rows = measure(device, list(VARIANTS), rounds=options.rounds, sampled=False)
        rows += measure(device, SAMPLING, rounds=options.sampled_rounds, sampled=True) if options.sampled_rounds else []
    settings = {
        "device": device_name(device),
        "rounds": options.rounds,
        "sampled_rounds": options.sampled_rounds,
        "parameters": sum(x.numel() for x in model_and_tokenizer(device)[0].parameters()),
    }
    provenance = results.provenance(settings)
    provenance["configuration"]["processor"] = provenance["machine"]["processor"]
    result = {"provenance": provenance, "rows": rows}
    tables.console().print(tables.plain_table(f"Trainers ({device_name(device)})", list(cells(rows))))
    if options.output is not None:
        results.write_json(options.output, result)
    if options.page is not None:
        results.write_text(options.page, with_table(options.page.read_text(encoding="utf-8"), result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
