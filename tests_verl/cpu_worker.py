"""verl's own actor update on a CPU: `RayPPOTrainer._update_actor` on an `ActorRolloutRefWorker`, without Ray.

`Job` says what to run; `updated_parameters` runs it in this process, or in several that hold a share of the rows each.
Only the platform (verl has none for CPUs) and the process group are provided; all else is verl's own code.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing
from hydra import compose, initialize_config_module
from transformers import Qwen3Config, Qwen3ForCausalLM
from verl import DataProto
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

VOCABULARY, PROMPT, RESPONSE = 32, 5, 9


class _CpuDevice(SimpleNamespace):
    """torch.cpu with the questions about memory that verl asks, answered by 0."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("memory_", "max_memory_")):
            return lambda *_: 0
        if name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats"):
            return lambda *_: None
        if name == "mem_get_info":
            return lambda *_: (0, 1)
        if name == "get_device_name":
            return lambda *_: "CPU"
        return getattr(torch.cpu, name)


@PlatformRegistry.register("cpu")
class CpuPlatform(PlatformBase):
    """What verl calls of a platform, for processes with no accelerator."""

    device_name = "cpu"
    vendor_name = "none"
    device_module = _CpuDevice()

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    def manual_seed_all(self, seed):
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "NO_VISIBLE_DEVICES"

    def nvtx_range(self, msg):
        return contextlib.nullcontext()

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def ray_resource_name(self):
        return "CPU"

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None


@dataclass
class Job:
    """A model, the batches of one update each, and what is set on verl's command line under the actor."""

    model: Path
    batches: list[dict[str, torch.Tensor]]
    overrides: list[str] = field(default_factory=list)
    mini_batch_size: int = 4
    micro_batch_size: int = 2
    learning_rate: float = 0.5
    remove_padding: bool = False
    before_updates: Callable[[Any], None] | None = None  # given the workers' configuration, once they are built


def tiny_model(path: Path, seed: int = 0) -> Path:
    """A Qwen3 of ten thousand parameters, written to `path`."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def load(path: Path) -> torch.nn.Module:
    return Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def response_logp(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the response tokens and the entropies of where they are from, by the plainest way."""
    ids = batch["input_ids"]
    logits = model(
        input_ids=ids, attention_mask=batch["attention_mask"], position_ids=batch["position_ids"], use_cache=False
    ).logits[:, PROMPT - 1 : -1]
    every = torch.log_softmax(logits, -1)
    return every.gather(-1, ids[:, PROMPT:, None])[..., 0], -(every.exp() * every).sum(-1)


def batch(model: Path, seed: int, *, rows: int = 8, spread: float = 0.15) -> dict[str, torch.Tensor]:
    """What verl's trainer hands to the update: left-padded prompts, right-padded responses, a tool gap, a short row.

    `old_log_probs` are the model's own with noise, so that clip windows of either side act on some tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, PROMPT + RESPONSE), generator=generator)
    attention = torch.ones(rows, PROMPT + RESPONSE, dtype=torch.long)
    attention[0, :2] = 0
    attention[1, -3:] = 0
    attention[2, PROMPT + 1 :] = 0  # a single token
    attention[5, -6:] = 0
    response_mask = attention[:, PROMPT:].clone()
    response_mask[3, 2:5] = 0  # text of a tool
    response_mask[6, :2] = 0
    made = {
        "prompts": ids[:, :PROMPT],
        "responses": ids[:, PROMPT:],
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": (attention.cumsum(-1) - 1).clamp(min=0),
        "response_mask": response_mask,
        "advantages": torch.randn(rows, 1, generator=generator).expand(rows, RESPONSE).clone(),
    }
    with torch.no_grad():
        own, _ = response_logp(load(model), made)
    made["old_log_probs"] = own + spread * torch.randn(rows, RESPONSE, generator=generator)
    return made


def compose_config(job: Job) -> Any:
    """verl's trainer configuration, as its command line would make it."""
    actor = "actor_rollout_ref.actor"
    settings = [
        f"actor_rollout_ref.model.path={job.model}",
        "+actor_rollout_ref.model.load_tokenizer=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        f"actor_rollout_ref.model.use_remove_padding={job.remove_padding}",
        "actor_rollout_ref.rollout.name=vllm",  # never started; the configuration must name one
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
        f"{actor}.strategy=fsdp2",  # FSDP 1 does not run on a CPU
        f"{actor}.use_torch_compile=False",
        f"{actor}.fsdp_config.use_torch_compile=False",
        f"+{actor}.fsdp_config.mixed_precision.param_dtype=fp32",
        f"{actor}.ppo_mini_batch_size={job.mini_batch_size}",
        f"{actor}.ppo_micro_batch_size_per_gpu={job.micro_batch_size}",
        # AdamW would turn the sign of a rounding error in a gradient near zero into a step.
        f"{actor}.optim.optimizer=SGD",
        f"{actor}.optim.lr={job.learning_rate}",
        f"{actor}.optim.weight_decay=0",
        f"{actor}.optim.clip_grad=1e9",
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*settings, *job.overrides])


def _update(job: Job, rank: int, world: int) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The parameters after all updates, and the metrics of each; `rank` holds its share of the rows."""
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.utils.metric import reduce_metrics
    from verl.workers.engine_workers import ActorRolloutRefWorker

    config = compose_config(job)
    worker = ActorRolloutRefWorker(config.actor_rollout_ref, role="actor")
    worker.init_model()
    trainer = RayPPOTrainer.__new__(RayPPOTrainer)  # its constructor asks for Ray, data and a rollout engine
    trainer.config, trainer.actor_rollout_wg = config, worker
    if job.before_updates is not None:
        job.before_updates(config.actor_rollout_ref)
    metrics = []
    for tensors in job.batches:
        data = DataProto.from_dict(tensors=dict(tensors)).chunk(world)[rank]
        metrics.append(reduce_metrics(trainer._update_actor(data).meta_info["metrics"]))
    parameters = {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in worker.actor.engine.module.named_parameters()
    }
    return parameters, metrics


def _environment(rank: int, world: int, store: str) -> None:
    # The address is asked for and never used: the processes meet in a file.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    # verl would ask for "cpu:gloo,cpu:gloo", which torch refuses.
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)


def _process(rank: int, world: int, store: str, job: Job, target: str) -> None:
    torch.set_num_threads(1)
    _environment(rank, world, store)
    found = _update(job, rank, world)
    if rank == 0:
        torch.save(found, target)
    torch.distributed.destroy_process_group()


def updated_parameters(job: Job, processes: int = 1) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        if processes == 1:
            if not torch.distributed.is_initialized():
                _environment(0, 1, store)
            return _update(job, 0, 1)
        target = str(Path(folder) / "found.pt")
        torch.multiprocessing.spawn(_process, args=(processes, store, job, target), nprocs=processes)
        return torch.load(target, weights_only=False)
