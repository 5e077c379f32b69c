"""What both processes of tests/test_resume.py run: whole, stopped by a signal that only one of them gets, resumed."""

from __future__ import annotations

import datetime
import functools
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from tiny_run import At, forked, outcome, tiny_trainer, train

OPTIONS: dict[str, Any] = {"max_steps": 6, "save_steps": 100, "logging_steps": 4, "prompts": 12}
CUT = 3


def run(folder: Path) -> list[dict[str, Any]]:
    """What each rank has found."""
    ranks = [forked(functools.partial(work, rank, folder), folder / f"log{rank}.txt") for rank in range(2)]
    failed = [rank for rank, child in enumerate(ranks) if os.waitpid(child, 0)[1]]
    assert not failed, "\n".join((folder / f"log{rank}.txt").read_text() for rank in failed)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def work(rank: int, folder: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # what this process was forked from had one process
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout)
    found: dict[str, Any] = {"whole": outcome(train(tiny_trainer(folder / "whole", **OPTIONS), seed=rank))}
    cut = tiny_trainer(folder / "cut", **OPTIONS)
    if rank == 1:
        cut.callback_handler.callbacks.insert(0, At(CUT, lambda: os.kill(os.getpid(), signal.SIGINT)))
    train(cut, seed=rank)
    found["stopped"] = (cut.state.global_step, cut.interrupted_by)
    found["resumed"] = outcome(train(tiny_trainer(folder / "cut", **OPTIONS), resume_from_checkpoint=True))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
