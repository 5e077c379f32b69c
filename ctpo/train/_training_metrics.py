r"""Importance ratios by position during training, for the logs of `ctpo.train.trainer`.

Sequences that have not been trained on since they were sampled ("fresh") and those of later passes over the same
rollouts ("trained_on") are counted apart: what holds for importance ratios holds for the first only. A bucket is named
after its first position; it ends before the next of 1, 16, 64, 256, 1024, 4096, 16384, 65536, and the last has no end.
Over the tokens of a bucket, or (below the line) over all tokens, since the last log:

============================ ==========================================================================================
name                         meaning
============================ ==========================================================================================
position/fresh/64/tokens     N, number of policy tokens
position/fresh/64/drift      m, mean of log rho_t / t; nats per token
position/fresh/64/spread     square root of the mean of (log rho_t - m t)^2 / t; nats per square root of a token. The
                             standard deviation of log rho_t is about this times the root of t, so that it is the same
                             in all buckets if the tokens of a sequence move independently
position/fresh/64/ess        effective sample size (sum rho_t)^2 / sum rho_t^2 over N
position/fresh/64/clip       share of tokens at which the lower, upper or dual bound acted
---------------------------- ------------------------------------------------------------------------------------------
clip/fresh/low, high, dual   shares of tokens at which that bound acted
clip/fresh/rejected          share that the trust region took away
clip/fresh/saturated         share at which a numerical limit acted
clip/fresh/zero_advantage    share with A = 0, at which no bound can act
============================ ==========================================================================================

The same with "trained_on". rho_t is the cumulative ratio, without limits, whatever the estimator's level. What has no
token does not appear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ctpo.estimators import Evaluation
from ctpo.losses import _EDGES, _log_sums

__all__ = ["PositionMetrics"]

# Those of `ess/position_..` of `ctpo.policy_loss`, as far as sequences go.
EDGES = tuple(edge for edge in _EDGES if edge <= 2**16)
KINDS = ("trained_on", "fresh")
_SUMS = ("tokens", "time", "rate", "log_rho", "square", "clipped", "log_weight", "log_weight_2")
_REASONS = ("low", "high", "dual", "rejected", "saturated", "zero_advantage")
# Of the columns of _SUMS, those that add up; the rest are logarithms of what does.
_ADDITIVE = _SUMS.index("log_weight")
# A ratio of 0 counts as exp of this where a logarithm is averaged: sums stay free of inf - inf.
_LOG_ZERO = -1e9


class PositionMetrics:
    """Sums over micro-batches, in one tensor on the device; nothing waits for it before `pop`.

    Sums are in float64 where the device has it, of float32 terms. They do not depend on how tokens are split into
    micro-batches and ranks, but for the rounding of float64 (of the effective sample size: of float32).

    Args:
        device: Where the log-probabilities are.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self._clear()

    def _clear(self) -> None:
        """Start anew: 0 of everything, and the logarithm of 0."""
        # For each kind: a row of _SUMS for every bucket, then the numbers of tokens by reason.
        self._numbers = torch.zeros(2, len(EDGES) * len(_SUMS) + len(_REASONS), dtype=self._dtype, device=self._device)
        self._sums(self._numbers)[:, _ADDITIVE:] = -math.inf

    @staticmethod
    def _sums(numbers: torch.Tensor) -> torch.Tensor:
        """View of the sums by bucket, shape (2, len(_SUMS), len(EDGES))."""
        return numbers[:, : len(EDGES) * len(_SUMS)].unflatten(1, (len(_SUMS), len(EDGES)))

    @torch.no_grad()
    def add(self, evaluation: Evaluation, mask: torch.Tensor, *, fresh: bool) -> None:
        """Count a micro-batch.

        Args:
            evaluation: Of all (B, T) tokens, without time shards.
            mask: bool, shape (B, T), True at policy tokens.
            fresh: Whether the sequences have not been trained on since they were sampled.
        """
        found, position = evaluation.coefficients, evaluation.position.contiguous()
        log_rho = evaluation.token_log_ratio.cumsum(-1)
        edges = [edge for edge in EDGES if edge <= mask.shape[-1]]
        if not edges:
            return
        # Filled in, not copied from a list: a copy to an accelerator waits for it.
        bounds = torch.cat([position.new_full((1,), value) for value in (*edges, math.inf)])
        log_sums = _log_sums(torch.where(mask, log_rho, -math.inf), position, bounds)
        clipped = found.clipped_low | found.clipped_high | found.clipped_dual

        # Positions never fall along a row: a bucket's sum is a difference of two prefix sums. Written into one block,
        # as float64 temporaries of every token cost more than the arithmetic.
        prefix = torch.empty(4, *mask.shape, dtype=self._dtype, device=position.device)
        x = prefix[1].copy_(torch.where(mask, log_rho, 0.0).clamp_(min=_LOG_ZERO))
        torch.div(x, position, out=prefix[0])
        torch.mul(x, prefix[0], out=prefix[2])
        prefix[3] = clipped
        prefix.cumsum_(-1)
        begin = torch.searchsorted(position, bounds.expand(len(position), -1).contiguous())
        before = torch.where(begin > 0, prefix.gather(-1, (begin - 1).clamp(min=0).expand(4, -1, -1)), 0.0)
        # Position and length tell how many tokens of a sequence lie before a bound, and what their positions add up to.
        until = torch.minimum(mask.sum(-1, keepdim=True).to(self._dtype), bounds - 1.0)
        parts = torch.cat([torch.stack([until, until * (until + 1.0) / 2.0]), before]).sum(1).diff()

        flags = (found.clipped_low, found.clipped_high, found.clipped_dual, found.rejected, found.saturated)
        zero = (evaluation.advantages == 0) & mask
        reasons = torch.stack([*flags, zero]).view(torch.uint8).sum((1, 2), dtype=torch.int32)

        row = self._numbers[int(fresh)][None]
        sums = self._sums(row)[0, :, : len(edges)]
        sums[:_ADDITIVE] += parts
        sums[_ADDITIVE:] = torch.logaddexp(sums[_ADDITIVE:], log_sums.to(self._dtype))
        row[0, -len(_REASONS) :] += reasons

    def pop(self, gather: Callable[[torch.Tensor], torch.Tensor] | None = None) -> dict[str, float]:
        """The metrics since the last call, for the logs; every rank has to call it, and all get the same.

        Args:
            gather: Brings together tensors of shape (1, n) of all ranks as (ranks, n), as `Accelerator.gather` does;
                None if there is one.
        """
        numbers = self._numbers.reshape(1, -1)
        numbers = numbers if gather is None else gather(numbers)
        found = _metrics(numbers.cpu().to(torch.float64).unflatten(1, self._numbers.shape).numpy())
        self._clear()
        return found

    def state_dict(self) -> dict[str, Any]:
        """What this rank has counted since the last `pop`, for a checkpoint."""
        return {"edges": list(EDGES), "numbers": self._numbers.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called; ValueError if that counted other things."""
        numbers = state["numbers"]
        if list(state["edges"]) != list(EDGES) or numbers.shape != self._numbers.shape:
            raise ValueError(
                f"state must be of metrics by position with buckets from {list(EDGES)} on; got {state['edges']} and "
                f"numbers of shape {tuple(numbers.shape)}"
            )
        self._numbers = numbers.to(self._device, self._dtype, copy=True)


def _metrics(numbers: NDArray[np.float64]) -> dict[str, float]:
    """The metrics of numbers of shape (ranks, 2, ..)."""
    split = len(EDGES) * len(_SUMS)
    by_bucket = numbers[..., :split].reshape(-1, 2, len(_SUMS), len(EDGES))
    joined = by_bucket.sum(0)
    with np.errstate(invalid="ignore"):  # NaN log-probabilities: shown, not warned of
        joined[:, _ADDITIVE:] = np.logaddexp.reduce(by_bucket[:, :, _ADDITIVE:], axis=0)
    reasons = numbers[..., split:].sum(0)
    found: dict[str, float] = {}
    for k in reversed(range(len(KINDS))):
        kind = KINDS[k]
        for j, edge in enumerate(EDGES):
            tokens, time, rate, log_rho, square, clipped, weight, weight_2 = joined[k, :, j].tolist()
            if not tokens:
                continue
            drift = rate / tokens
            variance = (square - 2.0 * drift * log_rho + drift * drift * time) / tokens
            found |= {
                f"position/{kind}/{edge}/tokens": tokens,
                f"position/{kind}/{edge}/drift": drift,
                f"position/{kind}/{edge}/spread": math.sqrt(max(variance, 0.0)),
                f"position/{kind}/{edge}/ess": min(_effective(weight, weight_2) / tokens, 1.0),
                f"position/{kind}/{edge}/clip": clipped / tokens,
            }
        total = joined[k, 0].sum()
        if total:
            found |= {f"clip/{kind}/{name}": float(n / total) for name, n in zip(_REASONS, reasons[k], strict=True)}
    return found


def _effective(log_weight: float, log_weight_2: float) -> float:
    """(sum w)^2 / sum w^2 of the logarithms of the sums; 0 if every weight is 0."""
    return 0.0 if log_weight == -math.inf else math.exp(2.0 * log_weight - log_weight_2)
