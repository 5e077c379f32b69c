"""`python -m benchmarks.losses`: forward and backward of `ctpo.policy_loss` beside its floor and its peers.

Every variant gets the same log-probabilities and ends with the gradient with respect to them. The variants of a table
are timed in turn, round after round, and the shortest time of each counts; the ratios are what to read. The floor is
the gradient of CTPO written out in plain torch: one prefix sum, one exponential, the gate, no metrics, no checks.

TRL's and verl's losses are their own code, with the metrics that they compute themselves. TRL is taken from the
environment of the tests, verl from its own (`make bench-verl`); what is not installed is left out and said to be.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ctpo
from ctpo.losses import PolicyLoss, policy_loss

SHAPES = ((64, 4096), (8, 32768))
DTYPES = (torch.float32, torch.bfloat16)
Run = Callable[[], torch.Tensor]


class Batch:
    """Log-probabilities of a policy a few updates from its sampler, the last tenth of every row masked."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        behavior = -torch.empty(shape).exponential_(generator=generator)
        logp = behavior + 0.03 * torch.randn(shape, generator=generator) - 0.03**2 / 2
        self.behavior_logp = behavior.to(device, dtype)
        self.logp = logp.to(device, dtype).requires_grad_()
        self.advantages = torch.randn(shape[0], generator=generator).to(device)
        self.mask = (torch.arange(shape[1]) < shape[1] * 9 // 10).expand(shape).contiguous().to(device)

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """Gradient of a loss with respect to the log-probabilities."""
        return torch.autograd.grad(loss, self.logp)[0]


def closed_form(batch: Batch) -> torch.Tensor:
    """The floor: what any implementation of CTPO has to compute, and no more."""
    logp, mask = batch.logp.detach().float(), batch.mask
    log_rho = torch.cumsum(torch.where(mask, logp - batch.behavior_logp.float(), 0.0), -1)
    width = torch.arange(1, logp.shape[-1] + 1, device=logp.device, dtype=torch.float32).sqrt()
    advantages = batch.advantages[:, None]
    low = torch.where(advantages < 0, -0.025 * width, -torch.inf)
    keep = mask & (log_rho <= 0.05 * width) & (log_rho >= low)
    scale = -advantages / mask.sum(-1, keepdim=True) / len(mask)
    return torch.where(keep, log_rho.exp() * scale, 0.0).to(batch.logp.dtype)


def by_autograd(batch: Batch) -> torch.Tensor:
    """The surrogate differentiated as it is usually written, with like diagnostics, one number at a time."""
    logp, behavior, mask = batch.logp.float(), batch.behavior_logp.float(), batch.mask.float()
    d = torch.clamp(logp - behavior, -20, 20) * mask
    log_rho = torch.cumsum(d.detach(), -1) + logp - logp.detach()
    log_rho = torch.clamp(log_rho, max=10)
    t = torch.cumsum(mask, -1).clamp(min=1)
    advantages = batch.advantages[:, None]
    rho, low, high = log_rho.exp(), torch.exp(-0.025 * t**0.5), torch.exp(0.05 * t**0.5)
    plain, cut = -advantages * rho, -advantages * torch.minimum(torch.maximum(rho, low), high)
    terms = torch.maximum(plain, cut)
    terms = torch.where(advantages < 0, torch.minimum(terms, -advantages * high), terms)
    loss = ((terms * mask).sum(-1) / mask.sum(-1)).mean()
    count, fixed = mask.sum(), log_rho.detach()
    above, below = (rho > high) & (advantages > 0), (rho < low) & (advantages < 0)
    dual = (rho > high) & (advantages < 0)
    for flag in (above, below, dual, above | below | dual):
        ((flag * mask).sum() / count).item()
    mean = (fixed * mask).sum() / count
    for moment in (mean, ((fixed - mean) ** 2 * mask).sum() / count, (fixed / t * mask).sum() / count):
        moment.item()
    (((fixed**2) / t * mask).sum() / count).item()
    first = 1
    while first <= logp.shape[-1]:
        inside = (t >= first) & (t < 4 * first) & (mask > 0)
        weights = torch.where(inside, rho.detach(), 0.0)
        (weights.sum() ** 2 / weights.square().sum() / inside.sum()).item()
        first *= 4
    return batch.gradient(loss)


def ours(batch: Batch, name: str, *, compiled: bool = False, **changes: Any) -> Run:
    """`policy_loss` with all its metrics."""
    estimator = ctpo.get_estimator(name, **changes)

    def loss(logp: torch.Tensor) -> PolicyLoss:
        return policy_loss(logp, batch.behavior_logp, batch.advantages, batch.mask, estimator=estimator)

    function = torch.compile(loss, fullgraph=True) if compiled else loss
    return lambda: batch.gradient(function(batch.logp).loss)


def trl_losses(batch: Batch) -> dict[str, tuple[str, Run]]:
    """TRL's `GRPOTrainer._compute_loss`, driven as the parity tests drive it."""
    if importlib.util.find_spec("trl") is None:
        return {}
    tests = str(Path(__file__).resolve().parent.parent / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    from trl_harness import trl_loss

    modes = {
        "grpo": {"loss_type": "grpo"},
        "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
        "sapo": {"loss_type": "sapo"},
    }
    arguments = (batch.logp, batch.behavior_logp, batch.advantages, batch.mask)
    return {
        name: ("TRL", lambda options=options: trl_loss(*arguments, **options).gradient)  # type: ignore[misc]
        for name, options in modes.items()
    }


def verl_losses(batch: Batch) -> dict[str, tuple[str, Run]]:
    """The losses registered in verl, with the default actor options."""
    if importlib.util.find_spec("verl") is None:
        return {}
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import FSDPActorConfig

    found: dict[str, tuple[str, Run]] = {}
    for name, mode in {
        "grpo": "vanilla",
        "gspo": "gspo",
        "cispo": "cispo",
        "sapo": "sapo",
        "dppo_tv": "dppo_tv",
    }.items():
        config = FSDPActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
        function = get_policy_loss_fn(mode)

        def run(function: Callable[..., Any] = function, config: Any = config) -> torch.Tensor:
            loss, _ = function(
                old_log_prob=batch.behavior_logp,
                log_prob=batch.logp,
                advantages=batch.advantages[:, None].expand(batch.logp.shape),
                response_mask=batch.mask,
                loss_agg_mode="seq-mean-token-mean",
                config=config,
                rollout_is_weights=None,
            )
            return batch.gradient(loss)

        found[name] = ("verl", run)
    return found


def variants(batch: Batch, *, compiled: bool) -> dict[str, Run]:
    """What is timed together; the first is the floor."""
    found: dict[str, Run] = {"closed-form gradient": lambda: closed_form(batch), "ctpo": ours(batch, "ctpo")}
    if compiled:
        found["ctpo, torch.compile"] = ours(batch, "ctpo", compiled=True)
    found["ctpo by autograd, diagnostics one by one"] = lambda: by_autograd(batch)
    for peers in (trl_losses(batch), verl_losses(batch)):
        for name, (peer, run) in peers.items():
            found.setdefault(name, ours(batch, name))
            found[f"{name} of {peer}"] = run
    return found


def synchronize(device: torch.device) -> None:
    """Wait for the accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def best_times(functions: dict[str, Run], device: torch.device, rounds: int) -> dict[str, float]:
    """Shortest seconds of each, taken in turn, after two rounds that warm up (and compile)."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 2):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: min(found) for name, found in times.items()}


def peak_memory(function: Run, device: torch.device) -> float:
    """Largest sum of live allocations above those at the start, MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - start) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    live = peak = 0
    for event in sorted(
        (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    ):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 2**20


def copy_time(batch: Batch, device: torch.device, rounds: int) -> float:
    """Seconds to move the bytes that must move: two inputs and the mask in, the gradient out."""
    source = torch.empty(
        2 * batch.logp.numel() * batch.logp.element_size() + batch.mask.numel() // 2, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    return best_times({"copy": lambda: target.copy_(source)}, device, rounds)["copy"]


def measure(device: torch.device, *, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """All shapes and dtypes."""
    rows = []
    for shape in SHAPES:
        for dtype in DTYPES:
            batch = Batch(shape, dtype, device)
            functions = variants(batch, compiled=compiled)
            times = best_times(functions, device, rounds)
            floor = times["closed-form gradient"]
            what = f"[{shape[0]}, {shape[1]}] {str(dtype).removeprefix('torch.')}"
            for name, function in functions.items():
                rows.append(
                    {
                        "batch": what,
                        "loss": name,
                        "ms": f"{1000 * times[name]:.2f}",
                        "times the floor": f"{times[name] / floor:.1f}",
                        "peak MiB": f"{peak_memory(function, device):.1f}",
                    }
                )
            copy = copy_time(batch, device, rounds)
            rows.append({"batch": what, "loss": "copy of its bytes", "ms": f"{1000 * copy:.2f}"})
            rows[-1] |= {"times the floor": f"{copy / floor:.2f}", "peak MiB": ""}
    return rows


def device_name(device: torch.device) -> str:
    """The name that results carry."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def main() -> int:
    """Print the table; write it with `--output`."""
    from simulations import results, tables

    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", type=Path, help="also write the rows as JSON, with commit, versions and machine")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = measure(device, rounds=options.rounds, compiled=not options.no_compile)
    tables.console().print(tables.plain_table(f"Losses, forward and backward ({device_name(device)})", rows))
    for peer in ("trl", "verl"):
        if importlib.util.find_spec(peer) is None:
            print(f"{peer} is not installed here: not measured")
    if options.output is not None:
        provenance = results.provenance({"device": device_name(device), "rounds": options.rounds})
        results.write_json(options.output, {"provenance": provenance, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
