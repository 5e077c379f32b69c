"""What both processes of tests/test_trainer_rollouts.py run with a generator that they must call together."""

from __future__ import annotations

import datetime
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from scripted_rollouts import Turns
from tiny_models import tiny_tokenizer

from ctpo.train.generation import Sampling
from ctpo.train.tools import rollouts

END = "<|im_end|>"
CALL = '<tool_call>\n{"name": "python", "arguments": {"code": "1"}}\n</tool_call>' + END
BLOCK = "```python\n1\n```\n"
# Turns of the tasks of each rank. A rank with a row less, one that is done at once, one that is cut, one with nothing.
SCRIPTS: dict[str, tuple[str, list[list[list[str]]]]] = {
    "calls": ("calls", [[[END], ["no" + END]], [[CALL] * 7 + ["yes" + END], ["a" * 900], [CALL, "b" * 90 + END]]]),
    "fenced": ("fenced", [[["so " + BLOCK, "x" * 900]], [[BLOCK] * 4 + ["y" + END], ["```py\n" + "z" * 300 + END]]]),
    "one is cut": ("calls", [[["a" * 900]], [[CALL] * 3 + ["yes" + END]]]),
    "nothing": ("calls", [[], [[CALL, END]]]),
    "short context": ("calls", [[["a" * 900]], [[CALL] * 3 + ["yes" * 99 + END], [END]]]),
}
MOST = 800


def generator(scripts: list[list[str]], context: int | None, together: bool) -> Any:
    """As TRL asks a vLLM server: the first process asks for all, everyone takes as many as it has brought."""
    tokenizer = tiny_tokenizer("qwen3")
    turns = Turns(tokenizer, scripts)
    made = SimpleNamespace(tokenizer=tokenizer, context=context, eos_token_ids=frozenset({tokenizer.eos_token_id}))
    made.asked = []

    def generate(prompt_ids: Any, sampling: Sampling, seed: int) -> list[list[int]]:
        request = (len(prompt_ids), sampling.max_tokens, sampling.stop)
        made.asked.append(request)
        if together:
            everyone: list[Any] = [None, None]
            dist.all_gather_object(everyone, request)
            assert everyone == [request] * 2, everyone
        assert all(len(ids) + sampling.max_tokens <= (context or 10**9) for ids in prompt_ids)
        return [turns.sample(ids, sampling.max_tokens, sampling.stop) for ids in prompt_ids]

    made.generate = generate
    return made


def roll(name: str, rank: int, all_gather: Any = None) -> tuple[list[Any], list[Any]]:
    """The rollouts of a rank, and what its generator was asked for."""
    tools, by_rank = SCRIPTS[name]
    session = SimpleNamespace(
        run=lambda code: SimpleNamespace(output="1\n", error="", timed_out=False), close=lambda: None
    )
    sandbox: Any = SimpleNamespace(backend="bubblewrap", session=lambda: session)
    prompts = [[{"role": "user", "content": f"task {i}"}] for i in range(len(by_rank[rank]))]
    made = generator(by_rank[rank], 1500 if name == "short context" else None, all_gather is not None)
    found = rollouts(
        made, prompts, sampling=Sampling(MOST), tools=tools, sandbox=sandbox, max_rounds=5, all_gather=all_gather
    )
    return found, made.asked


def run(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes has found."""
    multiprocessing.set_forkserver_preload(["ctpo.train.tools"])
    torch.multiprocessing.start_processes(work, args=(str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout)

    def all_gather(value: Any) -> list[Any]:
        everyone = [None, None]
        dist.all_gather_object(everyone, value)
        return everyone

    try:
        torch.save({name: roll(name, rank, all_gather) for name in SCRIPTS}, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
