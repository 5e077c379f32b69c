"""The command line for a Ray cluster that ctpo ships: verl takes every option of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from verl.utils.config import omega_conf_to_dataclass

import ctpo

SCRIPT = Path(ctpo.__file__).parent / "train" / "recipes" / "verl.sh"


def words(**variables: str) -> list[str]:
    """What the script calls Python with."""
    environment = {**os.environ, "PYTHON": "echo", "MODEL": "m", "TRAIN": "t.parquet", "VAL": "v.parquet", **variables}
    found = subprocess.run(
        ["bash", str(SCRIPT), "trainer.project_name=mine"], env=environment, capture_output=True, text=True, check=True
    )
    return found.stdout.split()


@pytest.mark.parametrize("variables", [{}, {"REWARD": "r.py", "TOOLS": "tools.py", "NODES": "4"}])
def test_verl_composes_the_recipe(variables: dict[str, str]) -> None:
    start = words(**variables)
    assert start[:2] == ["-m", "verl.trainer.main_ppo"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=start[2:])
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert actor.policy_loss.loss_mode == "ctpo"
    assert (config.data.train_batch_size, actor.ppo_mini_batch_size, rollout.n) == (512, 32, 8)
    assert config.data.train_batch_size // actor.ppo_mini_batch_size == 16
    assert (config.trainer.nnodes, config.trainer.project_name) == (int(variables.get("NODES", 1)), "mine")
    assert rollout.multi_turn.enable == bool(variables)
    assert omega_conf_to_dataclass(actor.policy_loss).loss_mode == "ctpo"


def test_what_is_missing_is_named() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("MODEL", "TRAIN", "VAL")}
    found = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "TRAIN: a parquet file" in found.stderr
