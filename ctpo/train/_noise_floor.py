r"""How much of a log-ratio is rounding, measured on a few sequences of every rollout batch.

Where weights are float32 and a model computes in 16 bits (autocast, one process or data parallel), the log-ratio
x = log pi(theta_1) - log pi(theta_0) of the weights before and after a rollout batch's updates is computed twice, in 16
bits and in float32, each sequence by itself. Their difference is rounding:

.. math:: \text{token} = \sqrt{\overline{(x_{16} - x_{32})^2}}, \qquad
    \text{share} = \overline{(x_{16} - x_{32})^2} \big/ \overline{x_{16}^2}

Elsewhere (float32, 16-bit weights, weights that are split over processes) there is nothing more precise to compare
with. What is left is the effect of the batch's shape: the difference between a sequence's scores within its micro-batch
and by itself, from the same weights. That is a lower bound: kernels whose rows do not depend on each other show 0,
whatever they round.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType

__all__ = ["NoiseFloor", "policy_mask"]

logger = logging.getLogger("ctpo.train.trainer")

Batch = dict[str, Any]
# Of earlier rollouts in what the warning is about.
_MEMORY = 0.75


class NoiseFloor:
    """Measures, logs and warns for a `CTPOTrainer`.

    Metrics, each with the prefix "noise_floor/": "batch_shape", root mean square per token of what the shape of the
    batch changes, nats; "token", that of the noise; "sqrt_t", of its sum along a sequence over the root of the length;
    "share" of the mean square of the log-ratios; and "lower_bound", 1 where the noise is the effect of the shape only,
    else 0.

    Args:
        trainer: The trainer.
        sequences: How many of each rollout batch and process.
    """

    def __init__(self, trainer: Any, sequences: int) -> None:
        self._trainer = trainer
        self._sequences = sequences
        self._warned = False
        self._held: list[dict[str, Any]] = []
        self._recent = (0.0, 0.0)  # mean squares of noise and log-ratios, of the last rollouts
        wide = torch.float32 if trainer.accelerator.device.type == "mps" else torch.float64
        # Sum of squares, and number, of token log-ratios of the updates since the last rollout after the first.
        self._signal = torch.zeros(2, dtype=wide, device=trainer.accelerator.device)

    def add(self, token_log_ratio: torch.Tensor, mask: torch.Tensor) -> None:
        """Count the log-ratios, 0 where masked, of an update of a policy that has moved since the rollout."""
        squares = (token_log_ratio * token_log_ratio).sum()
        self._signal += torch.stack([squares, mask.sum()]).to(self._signal.dtype)

    def begin(self, batches: Sequence[Batch]) -> None:
        """Measure at a rollout: every process makes as many passes as the others."""
        signal, self._signal = self._signal, torch.zeros_like(self._signal)
        if not self._sequences or "pixel_values" in batches[0]:
            return
        precise, score = self._can_be_precise(), self._trainer._scored
        sums, together = signal.new_zeros(4), dict[int, torch.Tensor]()
        for index, row in self._rows(batches):
            batch = batches[index]
            if index not in together:
                old = batch.get("old_per_token_logps")
                together[index] = score(batch) if old is None else old
            alone = _without_padding(batch, row)
            logp = self._alone(alone)
            sums += self._sums(logp - together[index][row : row + 1, : logp.shape[1]], alone)
            if precise:
                with self._in_float32():
                    exact = self._alone(alone)
                self._held.append({"batch": alone, "logp": logp, "exact": exact})
        squares, tokens, per_length, sequences, moved, compared = self._reduced(torch.cat([sums, signal]))
        if not tokens:
            return
        self._log("batch_shape", math.sqrt(squares / tokens))
        if not precise:
            self._log_noise(squares / tokens, per_length / sequences, moved / compared if compared else 0.0, bound=True)

    def end(self) -> None:
        """Measure after the last update of a rollout batch, where float32 can be had."""
        held, self._held = self._held, []
        if not held:
            return
        sums = self._signal.new_zeros(6)
        for one in held:
            alone = one["batch"]
            change = self._alone(alone) - one["logp"]
            with self._in_float32():
                noise = change - (self._alone(alone) - one["exact"])
            sums += torch.cat([self._sums(noise, alone), self._sums(change, alone)[:2]])
        squares, tokens, per_length, sequences, moved, _ = self._reduced(sums)
        if tokens:
            self._log_noise(squares / tokens, per_length / sequences, moved / tokens, bound=False)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"signal": self._signal.cpu(), "recent": list(self._recent), "held": self._held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called."""

        def here(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: here(part) for name, part in value.items()}
            return value.to(self._signal.device)

        self._signal = state["signal"].to(self._signal)
        self._recent = tuple(state["recent"])
        self._held = [here(one) for one in state["held"]]

    def _rows(self, batches: Sequence[Batch]) -> list[tuple[int, int]]:
        """Micro-batch and row of the sequences to measure: the first ones with a token of the policy."""
        used = torch.stack([policy_mask(batch).any(1) for batch in batches]).tolist()
        places = [(index, row) for index, rows in enumerate(used) for row in range(len(rows))]
        return sorted(places, key=lambda place: not used[place[0]][place[1]])[: self._sequences]

    def _alone(self, alone: Batch) -> torch.Tensor:
        """Scores of one sequence; by the model as it is, which `torch.compile` need not compile for every length."""
        scored: torch.Tensor = self._trainer._scored(alone, self._trainer.model)
        return scored

    def _can_be_precise(self) -> bool:
        trainer = self._trainer
        accelerator, model = trainer.accelerator, trainer.model
        # Only where ratios differ from 1 is there something to compare.
        reused = trainer.args.needs_old_logps
        whole = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        return bool(
            reused
            and accelerator.native_amp
            and accelerator.distributed_type in whole
            and hasattr(model, "_original_forward")
            and all(parameter.dtype == torch.float32 for parameter in model.parameters())
        )

    @contextmanager
    def _in_float32(self) -> Iterator[None]:
        """Without the autocast that Accelerate has put around the model, and that TRL asks it for."""
        accelerator, model = self._trainer.accelerator, self._trainer.model
        forward, amp = model.forward, accelerator.native_amp
        model.forward, accelerator.native_amp = model._original_forward, False
        try:
            yield
        finally:
            model.forward, accelerator.native_amp = forward, amp

    def _sums(self, difference: torch.Tensor, alone: Batch) -> torch.Tensor:
        """Sum of squares, tokens, squared sum over the length, and sequences, of differences of shape (1, T)."""
        mask = policy_mask(alone)
        x = difference.where(mask, 0.0).to(self._signal.dtype)
        length = mask.sum().to(x.dtype)
        return torch.stack([(x * x).sum(), length, x.sum() ** 2 / length.clamp(min=1), length.clamp(max=1)])

    def _reduced(self, sums: torch.Tensor) -> list[float]:
        found: list[float] = self._trainer.accelerator.reduce(sums).tolist()
        return found

    def _log(self, name: str, value: float) -> None:
        self._trainer._metrics["train"][f"noise_floor/{name}"].append(value)

    def _log_noise(self, noise: float, per_length: float, moved: float, *, bound: bool) -> None:
        self._log("token", math.sqrt(noise))
        self._log("sqrt_t", math.sqrt(per_length))
        self._log("lower_bound", float(bound))
        if not moved:
            return
        self._log("share", min(noise / moved, 1.0))
        self._recent = (_MEMORY * self._recent[0] + noise, _MEMORY * self._recent[1] + moved)
        share = self._recent[0] / self._recent[1]
        if share <= 0.5 or self._warned or not self._trainer.accelerator.is_main_process:
            return
        self._warned = True
        logger.warning(
            "Rounding makes up %s%.0f%% of the mean square of the log-ratios (%.2g of %.2g nats per token). Clip rates "
            "and spreads then show arithmetic, not what the policy has learned: see noise_floor in docs/trainer.md.",
            "at least " if bound else "",
            100 * min(share, 1.0),
            math.sqrt(noise),
            math.sqrt(moved),
        )


def policy_mask(inputs: Mapping[str, Any]) -> torch.Tensor:
    """True at the tokens that the policy chose, shape (B, T)."""
    mask = inputs["completion_mask"]
    return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()


def _without_padding(batch: Batch, row: int) -> Batch:
    """One sequence of a micro-batch by itself."""
    prompt = batch["prompt_mask"][row].bool()
    length = max(1, int(batch["completion_mask"][row].sum()))
    alone = {"advantages": batch["advantages"][row : row + 1]}
    for name in ("prompt_ids", "prompt_mask"):
        alone[name] = batch[name][row, prompt][None]
    for name in ("completion_ids", "completion_mask", "tool_mask"):
        if name in batch:
            alone[name] = batch[name][row, :length][None]
    return alone
