"""A run that was cut off and resumed is the run that was not: bit for bit, wherever it was cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import differences, outcome, tiny_trainer, train
from trl import GRPOTrainer

from ctpo.train._checkpoints import ResumableTrainer

CUTS: dict[str, dict[str, Any]] = {
    "inside a generation batch": {},
    "inside, accumulating": {"gradient_accumulation_steps": 2},
    # 4 micro-batches an epoch.
    "at an epoch's end": {"gradient_accumulation_steps": 2, "num_iterations": 1},
    "in the second epoch": {"gradient_accumulation_steps": 2, "num_iterations": 1, "max_steps": 6, "save_steps": 3},
    "in the third epoch": {"num_iterations": 1, "max_steps": 12, "save_steps": 10, "gradient_accumulation_steps": 1},
    "between generation batches": {"num_iterations": 1, "max_steps": 6, "save_steps": 4, "prompts": 12},
    "an epoch with a remainder": {
        "gradient_accumulation_steps": 3,
        "steps_per_generation": 4,
        "max_steps": 8,
        "save_steps": 4,
    },
    "between logs": {"logging_steps": 3, "max_steps": 6, "save_steps": 4},
    "in order": {"shuffle_dataset": False, "num_iterations": 1, "max_steps": 6, "save_steps": 5},
    "by epochs": {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"},
}


def resumed_and_whole(tmp_path: Path, kind: type[GRPOTrainer], options: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    whole = outcome(train(tiny_trainer(tmp_path / "whole", kind=kind, **options)))
    cut = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))[0]
    trainer = tiny_trainer(tmp_path / "resumed", kind=kind, **options)
    return outcome(train(trainer, resume_from_checkpoint=str(cut))), whole


@pytest.mark.parametrize("options", CUTS.values(), ids=CUTS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    resumed, whole = resumed_and_whole(tmp_path, ResumableTrainer, options)
    assert differences(resumed, whole) == []


def test_trl_alone_loses_the_generation_batch(tmp_path: Path) -> None:
    resumed, whole = resumed_and_whole(tmp_path, GRPOTrainer, {})
    assert {"parameters", "log"} <= set(differences(resumed, whole))
