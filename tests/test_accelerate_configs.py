"""The configurations of Accelerate that come with the package launch as those that come with TRL."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import trl
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

OURS = Path(str(resources.files("ctpo.train"))) / "recipes" / "accelerate"
THEIRS = Path(trl.__file__).parent / "accelerate_configs"
NODES = "--num_machines 4 --machine_rank 1 --num_processes 32 --main_process_ip 10.0.0.1 --main_process_port 29500"


def launched(file: Path, line: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What `accelerate launch` makes of a file and options: its arguments, and the environment of the processes."""
    args = launch_command_parser().parse_args(["--config_file", str(file), *line.split(), "-m", "ctpo", "train"])
    args = _validate_launch_command(args)[0]
    environment = {} if args.use_deepspeed else prepare_multi_gpu_env(args)  # that of DeepSpeed asks for its package
    # The lists of a TPU are None or empty.
    return {name: value or None for name, value in vars(args).items() if name != "config_file"}, environment


@pytest.mark.parametrize("line", ["", "--num_processes 2", NODES], ids=["one node", "two processes", "four nodes"])
@pytest.mark.parametrize("name", ["multi_gpu", "fsdp2", "zero2", "zero3"])
def test_launch_is_that_of_trl(name: str, line: str) -> None:
    assert launched(OURS / f"{name}.yaml", line) == launched(THEIRS / f"{name}.yaml", line)


def test_comparison_of_launches_sees_what_matters() -> None:
    """A negative control."""
    assert launched(OURS / "zero2.yaml", "") != launched(THEIRS / "zero3.yaml", "")
    assert launched(OURS / "multi_gpu.yaml", "") != launched(THEIRS / "fsdp2.yaml", "")


@pytest.mark.parametrize("file", sorted(OURS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_file_is_read_by_accelerate(file: Path) -> None:
    found = load_config_from_file(str(file))
    assert found.num_machines == 1
    expected = {"cpu": (2, "no"), "single_gpu": (1, "bf16")}.get(file.stem, (8, "bf16"))
    assert (found.num_processes, str(found.mixed_precision)) == expected
