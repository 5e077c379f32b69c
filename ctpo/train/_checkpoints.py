"""`ResumableTrainer`: TRL's `GRPOTrainer` that goes on from a checkpoint as if it had never stopped.

transformers restores weights, optimizer, schedule, random numbers and the place in the data; TRL adds nothing of its
own. What is lost then, and kept here, by every process for itself:

- the micro-batches that were made by the last rollout and not yet trained on, and the count by which TRL picks them
  (else rollouts are drawn anew in the middle of a batch, and from then on at other steps);
- the order of the data in later epochs (TRL's sampler starts again from its seed);
- metrics, loss and time since the last log, and the completions of the last rollout that are logged with them;
- the reference model where it follows the policy (`sync_ref_model`).

Besides: a run that has reached its last step does no further one; a checkpoint at the end of an epoch is saved after
that epoch's evaluation, which the resumed run would leave out; settings that a checkpoint is tied to may not change.
A signal ends a run after the running step, with a checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_model, save_model
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from trl import GRPOTrainer

from ctpo.train._checkpoint_files import begin, check_writable, discard, finish, inspect, last_checkpoint, rotate

__all__ = ["ResumableTrainer", "check_writable", "last_checkpoint"]

logger = logging.getLogger(__name__)

# What a checkpoint is tied to: TRL's buffers and the place in the data are counted in these, ...
_TIED = (
    "world_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
    "seed",
    "shuffle_dataset",
    "train_dataset",
    # ... and these are in the optimizer's state, from which they would come back whatever is asked for now.
    "optim",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)
# What has no bearing on what is learned.
FREE = ("output_dir", "disable_tqdm", "resume_from_checkpoint", "project", "local_rank", "skip_memory_metrics", "ctpo")
FREE_PREFIXES = (
    "dataloader_",
    "ddp_",
    "do_",
    "eval_",
    "hub_",
    "include_",
    "log_",
    "logging_",
    "per_device_eval_",
    "push_to_hub",
    "report_to",
    "run_name",
    "save_",
    "trackio_",
    "torch_empty_cache",
    "vllm_server_",
)
REFERENCE = "reference.safetensors"
_PACKAGES = ("ctpo", "torch", "transformers", "trl")


class ResumableTrainer(GRPOTrainer):
    """TRL's trainer with checkpoints that continue exactly; arguments are those of `GRPOTrainer`.

    Attributes:
        interrupted_by: The signal that ended `train`, None where none came. A first SIGINT or SIGTERM (all processes
            agree on it) ends training after the running step, with a checkpoint unless `save_strategy` is "no"; the
            former handlers are then back in place, so that a second one acts at once. Who calls `train` decides what
            follows, by convention exit status 128 + the signal's number.
    """

    args: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.interrupted_by: signal.Signals | None = None
        self._caught = 0
        self._to_restore: dict[str, Any] | None = None
        self._resumed_from = Path()
        self._sampler: Any = None
        self._order: torch.Tensor | None = None  # the sampler's generator at the beginning of the epoch
        self._data_fingerprint: str | None = None
        self._seconds_before = 0.0
        self._started = 0.0
        self._saving = False
        self._saved: Path | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_Flow(self))

    # What subclasses add to a checkpoint.

    def _extra_state(self) -> dict[str, Any]:
        """State of this process that a subclass adds: tensors, numbers, strings, None, lists and dicts of them."""
        return {}

    def _load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `_extra_state` gave, its tensors on the CPU; called when training begins again."""

    # ------------------------------------------------------------------------------------------------------- resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """Train as TRL's trainer does.

        Args:
            resume_from_checkpoint: A checkpoint; True for the one in `output_dir` that was completed last.
            *args: See transformers.
            **options: See transformers.

        Raises:
            ValueError: There is no complete checkpoint, or it was saved with other settings; the message names them.
            OSError: `output_dir` cannot be written to, or a checkpoint cannot be saved. Former ones are intact.
        """
        path = self._named(resume_from_checkpoint)
        if path is not None:
            self._to_restore = self._read_state(path)
        if self.args.save_strategy != SaveStrategy.NO and self.args.should_save:
            check_writable(self.args.output_dir)
        self.interrupted_by, self._caught, self._seconds_before, self._saved = None, 0, 0.0, None
        # The evaluation before the first step is not of a run that goes on.
        on_start = self.args.eval_on_start and path is None
        with _first_signal(self._catch), self._with(eval_on_start=on_start):
            found = super().train(None if path is None else str(path), *args, **options)
            if self.interrupted_by is None and self._is_to_stop():  # it came after the last step
                self._say_where()
            return found

    def _named(self, asked: str | bool | None) -> Path | None:
        """The checkpoint to go on from."""
        if asked is None or asked is False:
            return None
        if asked is not True:
            return Path(asked)
        path, skipped = last_checkpoint(self.args.output_dir)
        named = [f"{skip} {reason}" for skip, reason in skipped]
        if path is None:
            raise ValueError(
                f"no complete checkpoint in {self.args.output_dir}" + "".join(f"; {line}" for line in named)
            )
        if self.args.should_save:
            for line in named:
                logger.warning("Skipped: %s", line)
        return path

    def _read_state(self, path: Path) -> dict[str, Any] | None:
        """What this process saved in a checkpoint, once it is known to fit."""
        manifest, reason = inspect(path)
        if manifest is None and reason.endswith("another trainer wrote it"):
            logger.warning(
                "%s %s. Training goes on from its weights, but not exactly: rollouts are drawn anew.", path, reason
            )
            return None
        if manifest is None or reason:
            raise ValueError(f"cannot resume from {path}: it {reason}")
        if self.args.ignore_data_skip:
            raise ValueError("ignore_data_skip must be False to resume: the checkpoint knows its place in the data")
        self._compare(path, manifest["settings"])
        if self.args.dataloader_persistent_workers and self.args.should_save:
            logger.warning("dataloader_persistent_workers=True: later epochs draw other random numbers after a resume")
        self._resumed_from = path
        return torch.load(path / self._state_name, map_location="cpu", weights_only=True)

    def _compare(self, path: Path, saved: Mapping[str, Any]) -> None:
        """Refuse changes of what a checkpoint is tied to, and warn of others."""
        now = self._settings()
        changed = {
            name: f"{name} was {_shown(saved.get(name))} and is {_shown(now.get(name))}"
            for name in sorted({*saved, *now})
            if saved.get(name) != now.get(name)
        }
        if refused := [changed[name] for name in _TIED if name in changed]:
            raise ValueError(
                f"cannot resume from {path}: {'; '.join(refused)}. Set it back, or begin a run in another output_dir"
            )
        shown = [text for name, text in changed.items() if name not in FREE and not name.startswith(FREE_PREFIXES)]
        if shown and self.args.should_save:
            logger.warning("Not exactly the run that %s belongs to: %s", path, "; ".join(shown))

    def _settings(self) -> dict[str, Any]:
        """Settings and versions, as JSON gives them back."""
        if self._data_fingerprint is None:
            self._data_fingerprint = fingerprint(self.train_dataset)
        found = {
            **self.args.to_dict(),
            **_versions(),
            "world_size": self.args.world_size,
            "train_dataset": self._data_fingerprint,
        }
        return json.loads(json.dumps(found, default=lambda value: type(value).__name__))

    def _restore(self) -> None:
        """Take up the state that was read, once transformers has set its own."""
        state, self._to_restore = self._to_restore, None
        if state is None:
            return
        device = self.args.device
        self._step = state["step"]
        self._buffered_inputs = send_to_device(state["buffered_inputs"], device)
        self._metrics["train"].clear()
        self._metrics["train"].update(state["metrics"])
        self._current_train_step_time = state["step_time"]
        for name, logged in (state["logs"] or {}).items():
            kept: Any = self._logs[name]
            if isinstance(logged, dict):
                for column, values in logged.items():
                    kept[column].extend(values)
            else:
                kept.extend(logged)
        self._tr_loss = state["loss"].to(device)
        self._total_loss_scalar = state["logged_loss"]
        self._globalstep_last_logged = state["logged_step"]
        # Time, loss and throughput at the end are those of the whole run.
        self._seconds_before = state["seconds"]
        self._initial_global_step = self._initial_num_input_tokens_seen = 0
        if state["order"] is not None:
            self._sampler.generator.set_state(state["order"])
        if self.args.sync_ref_model and (self._resumed_from / REFERENCE).exists():
            load_model(self.accelerator.unwrap_model(self.ref_model), self._resumed_from / REFERENCE)
        if self.state.global_step >= self.state.max_steps:
            # transformers does it before the first step.
            self._load_rng_state(str(self._resumed_from))
        self._load_extra_state(state["extra"])

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # transformers looks only after a step.
            self.control.should_training_stop = True
            return
        options["start_time"] -= self._seconds_before
        super()._run_epoch(*args, **options)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        # With a limit of 1, transformers would remove all but the best checkpoint: the run could not be continued, nor
        # be known to have ended.
        with self._with(save_total_limit=None):
            return super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)

    # --------------------------------------------------------------------------------------------------------- saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        directory = Path(self._get_output_dir(trial))
        path = directory / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self._saved == path:
            return
        writes = self.args.should_save
        self._saving = True
        try:
            # Rotation waits until this checkpoint is complete.
            with self._with(save_total_limit=None):
                if writes:
                    begin(path)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if writes:
                    saved = {"step": self.state.global_step, "settings": self._settings()}
                    finish(path, saved, resumable=not self.args.save_only_model)
        except Exception as error:
            reason = _write_error(error, directory)
            if reason is None:
                raise
            if writes:
                discard(path)
            last, _ = last_checkpoint(directory)
            kept = "there is no former one" if last is None else f"{last} is intact, to go on from"
            raise OSError(f"cannot save {path}: {reason}; {kept}") from error
        finally:
            self._saving = False
        self._saved = path
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(path))
        if writes:
            best = self.state.best_model_checkpoint
            rotate(directory, self.args.save_total_limit, keep=[] if best is None else [Path(best)])

    @contextmanager
    def _with(self, **changes: Any) -> Iterator[None]:
        """Other arguments for a while."""
        kept = {name: getattr(self.args, name) for name in changes}
        vars(self.args).update(changes)
        try:
            yield
        finally:
            vars(self.args).update(kept)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:  # else too early: it is not complete
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        state = self._rank_state()
        _check_plain(state, "state")
        torch.save(state, Path(output_dir) / self._state_name)
        if self.args.sync_ref_model and self.args.should_save:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                logger.warning("The reference model is sharded and not in the checkpoint: a resume is not exact.")
            else:
                save_model(
                    self.accelerator.unwrap_model(self.ref_model), os.path.join(output_dir, "reference.safetensors")
                )

    @property
    def _state_name(self) -> str:
        return f"ctpo_state_{self.args.process_index}.pt"

    def _rank_state(self) -> dict[str, Any]:
        """What this process needs to go on, of what transformers does not save."""
        used_up = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        logs: dict[str, Any] = {}
        for name, logged in dict[str, Any](self._logs).items():
            by_column = isinstance(logged, dict)
            logs[name] = {column: list(values) for column, values in logged.items()} if by_column else list(logged)
        del logs["images"]  # of no safe format
        return {
            "step": self._step,
            "buffered_inputs": None if used_up else self._buffered_inputs,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "step_time": self._current_train_step_time,
            "logs": logs if self.log_completions and _is_plain(logs) else None,
            "loss": self._tr_loss.detach().cpu(),
            "logged_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "seconds": self._seconds_before + time.time() - self._started,
            "order": self._current_order() if self._epoch_is_over else self._order,
            "extra": self._extra_state(),
        }

    def _current_order(self) -> torch.Tensor | None:
        generator = getattr(self._sampler, "generator", None)
        return None if generator is None else generator.get_state()

    @property
    def _epoch_is_over(self) -> bool:
        return float(self.state.epoch or 0.0).is_integer()  # exact: transformers adds n / n

    # -------------------------------------------------------------------------------------------------------- signals

    def _catch(self, number: int) -> None:
        self._caught = number
        if self.args.process_index == 0:
            # Not print: a handler may run within one.
            saved = "" if self.args.save_strategy == SaveStrategy.NO else " and saved"
            name = signal.Signals(number).name
            with suppress(OSError):  # of a terminal that was closed
                os.write(2, f"\n{name}: the running step is finished{saved}; once more ends it at once\n".encode())

    def _is_to_stop(self) -> bool:
        """Whether a signal reached any process, at the end of a step."""
        caught = self._caught
        if self.accelerator.num_processes > 1:
            caught = int(self.accelerator.gather(torch.tensor([caught], device=self.accelerator.device)).max())
        if caught:
            self.interrupted_by = signal.Signals(caught)
        return bool(caught)

    def _say_where(self) -> None:
        if self.interrupted_by is None or self.args.process_index != 0:
            return
        place = "nothing was saved (save_strategy is 'no')" if self._saved is None else f"saved in {self._saved}"
        progress = f"step {self.state.global_step} of {self.state.max_steps}"
        print(f"stopped by {self.interrupted_by.name} after {progress}: {place}", file=sys.stderr)


class _Flow(TrainerCallback):
    """When a `ResumableTrainer` restores, saves and stops."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer
        self._held = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._trainer._started = time.time()
        self._held = False
        self._trainer._restore()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._trainer._order = self._trainer._current_order()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self._trainer._is_to_stop():
            control.should_training_stop = True
            control.should_save = args.save_strategy != SaveStrategy.NO
        if control.should_save and self._trainer._epoch_is_over:
            control.should_save, self._held = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self._trainer.interrupted_by is not None and not self._trainer._epoch_is_over:
            # The epoch goes on when the run does.
            control.should_log = control.should_evaluate = control.should_save = False
        elif self._held:
            control.should_save, self._held = True, False

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._trainer._say_where()


def fingerprint(dataset: Any) -> str:
    """A hash of all rows and their order, the same in every process and at every loading; "stream" without rows."""
    if not isinstance(dataset, datasets.Dataset):
        return "stream"
    found = hashlib.sha256(json.dumps(dataset.column_names).encode())
    for table in dataset.with_format("arrow").iter(1000):
        found.update(json.dumps(table.to_pylist(), default=_text).encode())
    return f"{len(dataset)} rows, {found.hexdigest()[:12]}"


def _text(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


@contextmanager
def _first_signal(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` at the first SIGINT or SIGTERM; those after it do what they did before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        # Neither where it is ignored (nohup, &), nor where it is not Python's to restore.
        if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    def handle(number: int, _: Any) -> None:
        restore()
        act(number)

    try:
        for number in former:
            signal.signal(number, handle)
        yield
    finally:
        restore()


def _write_error(error: Exception, directory: Path) -> str | None:
    """Why a file could not be written; None where that is not what went wrong."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    if from_rust := re.search(r"([^:]+) \(os error \d+\)", text):  # safetensors, tokenizers
        return from_rust[1].strip()
    if any(part in text for part in ("inline_container.cc", "PytorchStreamWriter", "iostream error")):
        # torch does not tell.
        return f"a file was cut off; {shutil.disk_usage(directory).free / 1e6:.1f} MB are free there"
    return None


def _check_plain(value: Any, name: str) -> None:
    """What a checkpoint could not give back is refused when it is saved, not when it is needed."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            _check_plain(item, f"{name}[{position}]")
    elif not isinstance(value, torch.Tensor | str | int | float | None):
        raise TypeError(f"{name} of a checkpoint must be a tensor, number, string or None, got {type(value).__name__}")


def _is_plain(value: Any) -> bool:
    try:
        _check_plain(value, "")
    except TypeError:
        return False
    return True


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and " " in value else repr(value)
