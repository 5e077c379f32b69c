"""A run that was cut off and resumed is the run that was not: bit for bit, wherever it was cut."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import resumed_ranks
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import tiny_chat_model
from tiny_run import differences, outcome, quiet, same, tiny_trainer, train
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl_harness import config_on_cpu, tiny_model

from ctpo.train._checkpoints import ResumableTrainer
from ctpo.train._trainer_rollouts import TrainerGenerator
from ctpo.train.config import CTPOConfig
from ctpo.train.sandbox import open_sandbox
from ctpo.train.trainer import CTPOTrainer

EVALUATED: dict[str, Any] = {"eval_dataset": Dataset.from_dict({"prompt": ["a b"]}), "per_device_eval_batch_size": 2}
# 4 micro-batches an epoch instead of 8, 2 steps.
HALF: dict[str, Any] = {"gradient_accumulation_steps": 2, "num_iterations": 1}
CUTS: dict[str, dict[str, Any]] = {
    "inside a generation batch": {},
    "inside, accumulating": {"gradient_accumulation_steps": 2},
    "at an epoch's end": HALF,
    "in the second epoch": HALF | {"max_steps": 6, "save_steps": 3},
    "in the third epoch": {
        "num_iterations": 1,
        "gradient_accumulation_steps": 4,
        "prompts": 8,
        "max_steps": 6,
        "save_steps": 5,
    },
    "between generation batches": {"num_iterations": 1, "max_steps": 6, "save_steps": 4, "prompts": 12},
    "an epoch with a remainder": {"gradient_accumulation_steps": 3, "max_steps": 8, "save_steps": 4},
    "between logs": {"logging_steps": 3, "max_steps": 6, "save_steps": 4},
    "in order": {"shuffle_dataset": False, "num_iterations": 1, "max_steps": 6, "save_steps": 5},
    "by epochs": {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"},
    "evaluated by steps": EVALUATED | {"eval_strategy": "steps", "eval_steps": 1},
    "evaluated at the start": EVALUATED | {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True},
    # The checkpoint of the epoch's last step comes after that epoch's evaluation.
    "evaluated by epochs": HALF | EVALUATED | {"eval_strategy": "epoch"},
    "with workers": HALF | {"dataloader_num_workers": 1},
}


def resumed_and_whole(
    tmp_path: Path, kind: type[GRPOTrainer], make: Callable[[], Mapping[str, Any]]
) -> tuple[dict[str, Any], ...]:
    whole = outcome(train(tiny_trainer(tmp_path / "whole", kind=kind, **make())))
    cut = min((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    trainer = tiny_trainer(tmp_path / "resumed", kind=kind, **make())
    return outcome(train(trainer, resume_from_checkpoint=str(cut))), whole


@pytest.mark.parametrize("options", CUTS.values(), ids=CUTS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    resumed, whole = resumed_and_whole(tmp_path, ResumableTrainer, lambda: options)
    assert differences(resumed, whole) == []


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_so_is_one_of_adapters_with_dropout(tmp_path: Path, beta: float) -> None:
    def make() -> dict[str, Any]:
        return {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1), "beta": beta}

    resumed, whole = resumed_and_whole(tmp_path, ResumableTrainer, make)
    assert differences(resumed, whole) == []


@pytest.mark.parametrize("follows", [False, True])
def test_so_is_one_with_a_reference_model(tmp_path: Path, follows: bool) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "beta": 0.1}
    if follows:
        options |= {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    resumed, whole = resumed_and_whole(tmp_path, ResumableTrainer, lambda: options)
    assert differences(resumed, whole) == []


def test_so_are_the_completions_that_it_logs(tmp_path: Path) -> None:
    options = {"log_completions": True, "logging_steps": 3, "max_steps": 6, "save_steps": 5}
    resumed_and_whole(tmp_path, ResumableTrainer, lambda: options)
    name = "completions/completions_00006.parquet"
    resumed, whole = pd.read_parquet(tmp_path / "resumed" / name), pd.read_parquet(tmp_path / "whole" / name)
    assert len(whole) == 8
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)


@pytest.mark.parametrize("estimator", ["ctpo", "grpo"])
def test_so_is_one_of_ctpo_with_its_metrics_by_position(tmp_path: Path, estimator: str) -> None:
    options = {"estimator": estimator, "logging_steps": 3, "max_steps": 6, "save_steps": 4}
    resumed, whole = resumed_and_whole(tmp_path, CTPOTrainer, lambda: options)
    assert differences(resumed, whole) == []
    assert any(name.startswith("position/") for name in whole["log"][1])


def test_the_noise_floor_is_measured_across_the_cut(tmp_path: Path) -> None:
    """Where a model computes in bfloat16 it needs the scores of the rollout, which was before the cut."""
    resumed, whole = resumed_and_whole(
        tmp_path,
        CTPOTrainer,
        lambda: {"bf16": True, "model": tiny_model().float(), "num_iterations": 1, "max_steps": 6, "save_steps": 3},
    )
    assert differences(resumed, whole) == []
    # At the second rollout, after step 4.
    assert [entry.get("noise_floor/lower_bound") for entry in whole["log"][:6]] == [None, None, None, None, 0.0, None]


def test_several_cuts_are_as_good_as_one(tmp_path: Path) -> None:
    whole = outcome(train(tiny_trainer(tmp_path / "whole", logging_steps=4, max_steps=6, save_steps=100)))
    for last in (1, 2, 5, 6):
        trainer = tiny_trainer(tmp_path / "cut", logging_steps=4, max_steps=6, save_steps=last)
        if last < 6:
            trainer.callback_handler.callbacks.insert(0, Stop(last))
        train(trainer, resume_from_checkpoint=last > 1)
    assert differences(outcome(trainer), whole) == []


class Stop(TrainerCallback):
    """Save and stop at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class Counting(ResumableTrainer):
    """Adds to a checkpoint."""

    count = 0

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        self.count += 1
        return super().training_step(*args, **options)

    def _extra_state(self) -> dict[str, Any]:
        return {"count": self.count, "as": {"tensor": torch.tensor([self.count])}}

    def _load_extra_state(self, state: Mapping[str, Any]) -> None:
        assert state["as"]["tensor"].item() == state["count"]
        self.count = state["count"]


def test_a_subclass_gets_back_what_it_added(tmp_path: Path) -> None:
    train(tiny_trainer(tmp_path, kind=Counting, **HALF))
    resumed = tiny_trainer(tmp_path, kind=Counting, **HALF)
    train(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.count == 8


def test_two_processes_stop_together_and_each_takes_up_its_own_state(tmp_path: Path) -> None:
    ranks = resumed_ranks.run(tmp_path)
    for found in ranks:
        assert found["stopped"] == (resumed_ranks.CUT, signal.SIGINT)  # which only the second one got
        assert differences(found["resumed"], found["whole"]) == []
    # Each draws its own, and has its own share of the rollouts.
    assert not same(ranks[0]["whole"]["random"], ranks[1]["whole"]["random"])
    cut = tmp_path / "cut" / f"checkpoint-{resumed_ranks.CUT}"
    states = [torch.load(cut / f"ctpo_state_{rank}.pt", weights_only=True)["buffered_inputs"] for rank in range(2)]
    assert not same(*states)


def test_so_is_one_with_the_python_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions end with their rollout: a checkpoint, between steps, never holds one."""
    sample = TrainerGenerator.generate_with_logps
    outputs = []

    def call_it(generator: TrainerGenerator, rows: Any, *args: Any) -> Any:
        # Turns of a random model, the first ones replaced by code that is as random.
        turns, logps = sample(generator, rows, *args)
        for i, row in enumerate(rows):
            text = generator.tokenizer.decode(row)
            if "output" in text:
                outputs.append(text)
            else:
                code = f"```python\nx = {torch.randint(100, ()).item()}\nprint(x * x)\n```\n"
                turns[i] = generator.tokenizer.encode(code)
        return turns, logps

    monkeypatch.setattr(TrainerGenerator, "generate_with_logps", call_it)

    def finish(directory: str, **options: Any) -> dict[str, Any]:
        model, tokenizer = tiny_chat_model("plain")
        with quiet(), open_sandbox("monty") as sandbox:
            trainer = CTPOTrainer(
                model,
                lambda completions, **_: [float(len(str(completion)) % 7) for completion in completions],
                config_on_cpu(
                    tmp_path / directory,
                    CTPOConfig,
                    python_tool="fenced",
                    max_completion_length=100,
                    per_device_train_batch_size=2,
                    steps_per_generation=2,
                    num_iterations=2,
                    max_steps=6,
                    save_strategy="steps",
                    save_steps=2,
                    learning_rate=1e-3,
                    disable_tqdm=True,
                ),
                train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": f"{i}"}] for i in range(3)]}),
                processing_class=tokenizer,
                sandbox=sandbox,
            )
            return outcome(train(trainer, **options))

    whole = finish("whole")
    assert len(outputs) >= 8
    resumed = finish("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert differences(resumed, whole) == []


# ------------------------------------------------------------------------------------------------------- the last step


@pytest.mark.parametrize(("steps", "options"), [(3, {"num_iterations": 1}), (4, HALF), (2, {"save_strategy": "epoch"})])
def test_a_run_that_has_reached_its_last_step_does_no_further_one(
    tmp_path: Path, steps: int, options: dict[str, Any]
) -> None:
    options = options | {"max_steps": steps}
    whole = outcome(train(tiny_trainer(tmp_path, **options)))
    assert whole["seen"][0] == steps
    again = outcome(train(tiny_trainer(tmp_path, **options), resume_from_checkpoint=True))
    assert differences(again, whole) == []


@pytest.mark.parametrize("cut", [2, 4])
def test_a_run_that_is_resumed_at_an_epochs_end_goes_on(tmp_path: Path, cut: int) -> None:
    train(tiny_trainer(tmp_path, **HALF, max_steps=cut))
    longer = train(tiny_trainer(tmp_path, **HALF, max_steps=6), resume_from_checkpoint=True)
    assert longer.state.global_step == 6
    assert [entry["step"] for entry in longer.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5, 6]


# -------------------------------------------------------------------------------------------------- what finds a fault


def test_trl_alone_loses_the_generation_batch(tmp_path: Path) -> None:
    resumed, whole = resumed_and_whole(tmp_path, GRPOTrainer, dict)
    assert {"parameters", "log"} <= set(differences(resumed, whole))


# Each part of the state, the run above that depends on it, and what would differ without it.
PARTS = {
    "step": ("inside a generation batch", "parameters"),
    "buffered_inputs": ("inside a generation batch", "parameters"),
    "order": ("in the third epoch", "parameters"),
    "metrics": ("between logs", "log"),
    "loss": ("between logs", "log"),
    "logged_step": ("between logs", "log"),
    "logged_loss": ("between logs", "log"),
}


@pytest.mark.parametrize("part", PARTS)
def test_without_any_part_of_the_state_it_would_be_another_run(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = {
        "step": 0,
        "buffered_inputs": None,
        "order": None,
        "metrics": {},
        "loss": torch.tensor(0.0),
        "logged_step": 4,
        "logged_loss": 0.0,
    }
    read = ResumableTrainer._read_state
    monkeypatch.setattr(
        ResumableTrainer, "_read_state", lambda trainer, path: {**(read(trainer, path) or {}), part: nothing[part]}
    )
    case, differs = PARTS[part]
    resumed, whole = resumed_and_whole(tmp_path, ResumableTrainer, lambda: CUTS[case])
    assert differs in differences(resumed, whole)


def test_the_comparison_sees_a_single_bit() -> None:
    left = {"a": [torch.tensor([1.0, torch.nan])], "b": (0.0, float("nan"))}
    assert same(left, {"a": [torch.tensor([1.0, torch.nan])], "b": (0.0, float("nan"))})
    assert not same(left, {"a": [torch.tensor([1.0 + 2**-23, torch.nan])], "b": (0.0, float("nan"))})
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same({"a": 1}, {"a": 1, "b": 2})
    assert not same([1], [1, 2])
