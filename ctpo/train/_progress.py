"""How far a training is: one line that stays in its place on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from ctpo.train._drawing import duration

__all__ = ["Progress"]

# Seconds between two lines of a log.
_EVERY = 10.0
# TRL's share of prompts whose answers have one reward, and how many rollouts without another make a warning.
_ALIKE, _SEVERAL = "frac_reward_zero_std", 5

_log = logging.getLogger(__name__)


class Progress(TrainerCallback):
    """Reports step, reward, speed and what is left, in place of transformers' bar and its dictionaries.

    Args:
        every: Seconds between two lines where standard error is no terminal; the last step always has one.
    """

    def __init__(self, every: float = _EVERY) -> None:
        self._every = every
        self._terminal = sys.stderr.isatty()
        self._logs: dict[str, float] = {}
        self._begun = self._last = 0.0
        self._first_step = 0
        self._width = 0
        self._alike: int | None = 0  # logged rollouts without a difference; None: no longer of interest

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._begun = time.monotonic()
        self._last = -self._every
        self._first_step = state.global_step
        if state.is_world_process_zero and self._terminal and state.global_step < state.max_steps:
            self._write(f"step {state.global_step} of {state.max_steps}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **others: Any) -> None:
        self._logs.update(logs or {})
        if not state.is_world_process_zero or "train_runtime" in (logs or {}):
            return
        self._look_at_rewards(logs or {})
        now = time.monotonic()
        if self._terminal or now - self._last >= self._every or state.global_step >= state.max_steps:
            self._last = now
            self._write(self._text(state))

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.is_world_process_zero and self._terminal and self._width:
            self._width = 0
            print(file=sys.stderr, flush=True)

    def _look_at_rewards(self, logs: Mapping[str, Any]) -> None:
        """Warn once where the answers to each prompt have all been rewarded alike from the first rollouts on."""
        if self._alike is None or _ALIKE not in logs:
            return
        self._alike = self._alike + 1 if float(logs[_ALIKE]) == 1.0 else None
        if self._alike == _SEVERAL:
            self._alike = None
            if self._terminal and self._width:
                print(file=sys.stderr)
                self._width = 0
            _log.warning(
                "in every rollout batch so far all answers to a prompt have had the same reward: nothing is learned "
                "from them; look at the rewards, at how hard the data is, and at max_completion_length"
            )

    def _text(self, state: Any) -> str:
        seconds, done = time.monotonic() - self._begun, state.global_step - self._first_step
        parts = [f"step {state.global_step} of {state.max_steps}"]
        if done > 0 and state.global_step < state.max_steps:
            # Early in the line, whose end a narrow terminal cuts.
            parts.append(f"{duration(seconds / done * (state.max_steps - state.global_step))} left")
        for name, label, form in (
            ("reward", "reward", ".3g"),
            ("completions/mean_length", "tokens", ".0f"),
            ("tools/call_frequency", "calls", ".2g"),
        ):
            if name in self._logs:
                parts.append(f"{label} {float(self._logs[name]):{form}}")
        clipped = [float(self._logs[f"clip/fresh/{side}"]) for side in ("low", "high", "dual")
                   if f"clip/fresh/{side}" in self._logs]  # fmt: skip
        if clipped:
            parts.append(f"clipped {sum(clipped):.0%}")
        return ", ".join(parts)

    def _write(self, text: str) -> None:
        if not self._terminal:
            print(text, file=sys.stderr, flush=True)
            return
        import shutil

        text = text[: max(20, shutil.get_terminal_size((80, 0)).columns - 1)]
        print(f"\r{text}{' ' * (self._width - len(text))}", end="", file=sys.stderr, flush=True)
        self._width = len(text)
