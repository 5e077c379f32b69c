"""`CTPOTrainer`: TRL's `GRPOTrainer` with the estimators of `ctpo`.

The loss is delegated, not copied. TRL computes log-probabilities, aggregation, tool masks, the divergence from a
reference model, the correction for vLLM, entropy terms and metrics; between its scoring of a micro-batch and its loss,
the estimator is put in. TRL's token-level loss of a ratio exp(logp - old) and a window then is the estimator's:

- "bounds": old = logp - log-ratio at the estimator's level, and a window for every token;
- "coefficients": old = logp - log of the coefficient, and no window;
- "trl": nothing, where the estimator is one of TRL's own losses.

Old log-probabilities are computed by the call that the update will make: same micro-batches, dtype and kernels. So the
ratios of the first update after a rollout are exactly 1, and what differs later is the policy and numerical noise, of
which a share is measured at every rollout.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from trl import GRPOTrainer

from ctpo.estimators import Evaluation
from ctpo.rollout import rollout_correction
from ctpo.train._checkpoints import ResumableTrainer
from ctpo.train._noise_floor import NoiseFloor, policy_mask
from ctpo.train._trainer_rollouts import python_rollouts
from ctpo.train._training_metrics import PositionMetrics
from ctpo.train.config import CTPOConfig
from ctpo.train.sandbox import Sandbox, open_sandbox
from ctpo.train.traces import TraceWriter

__all__ = ["CTPOTrainer"]

logger = logging.getLogger(__name__)

Batch = dict[str, Any]

# Above this log-ratio a ratio's square overflows in float32; what is beyond a limit only has to stay beyond it.
_LARGEST = 40.0


class _ScoredError(Exception):
    """Ends TRL's loss once the log-probabilities are there."""

    def __init__(self, logp: torch.Tensor) -> None:
        super().__init__()
        self.logp = logp


class CTPOTrainer(ResumableTrainer):
    r"""TRL's `GRPOTrainer` whose loss is that of an estimator of `ctpo`.

    The gradient is that of `ctpo.policy_loss` with the estimator and aggregation of `args`, TRL's denominators and,
    where they are switched on, TRL's further terms. For an estimator that is a loss of TRL the steps are TRL's own,
    bit for bit.

    Args:
        model: As for `GRPOTrainer`; the other arguments that are not named here, too.
        reward_funcs: See there. With `args.python_tool` a completion is a list of messages, and a column
            `rollout_answer` holds what the model wrote after the last output of the tool.
        args: The settings; `CTPOConfig` of an output directory named after the model by default.
        sandbox: Where the tool runs; the trainer opens one if `args.python_tool` asks for it. Yours stays open.
        **others: See `GRPOTrainer`.

    Raises:
        ValueError: `args` is not a `CTPOConfig`, or an argument does not go with `args.python_tool`.
        SandboxUnavailable: No backend of the sandbox works here.

    Assumptions:
        Those of the estimator, see `ctpo.estimators` and `CTPOConfig.cautions`.

    References:
        arXiv:2605.07331; TRL 1.16, GRPOTrainer.

    Example:
        docs/trainer.md has one that needs no download.

        >>> trainer = CTPOTrainer("Qwen/Qwen3-0.6B", reward_funcs=[reward], train_dataset=data)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    _name = "CTPO"
    _tag_names: ClassVar[list[str]] = ["trl", "ctpo"]
    args: CTPOConfig
    epsilon_low: Any  # a number, or one for every token
    epsilon_high: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: CTPOConfig | None = None,
        *positional: Any,
        sandbox: Sandbox | None = None,
        **others: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = CTPOConfig(f"{str(name).rstrip('/').rpartition('/')[2] or 'model'}-CTPO")
        if not isinstance(args, CTPOConfig):
            raise ValueError(f"args must be a CTPOConfig, got {type(args).__name__}")
        self._pending: Callable[[torch.Tensor], None] | None = None
        self._skip_next_scoring = False
        # Of the last rollout batch, all processes: rewards, and those of each function.
        self._scores = self._scores_by_function = torch.empty(0)
        self._tool_rollouts: Callable[[list[Any], Any], dict[str, Any]] | None = None
        self._estimator = args.built_estimator
        self._route = args.route
        if args.python_tool != "none":
            given = [name for name in ("tools", "environment_factory", "rollout_func") if others.get(name) is not None]
            if given:
                raise ValueError(f"{given[0]} must be None with python_tool={args.python_tool!r}, which has its own")
            if sandbox is None:
                sandbox = open_sandbox(args.python_sandbox, limits=args.python_limits)
            others["rollout_func"] = self._roll_out
        self.sandbox = sandbox
        with warnings.catch_warnings():
            # Chosen here on purpose; the range of TRL's versions is pinned.
            warnings.filterwarnings("ignore", "You are using 'rollout_func'")
            super().__init__(model, reward_funcs, args, *positional, **others)
        if self.sandbox is not None and args.python_tool != "none":
            self._tool_rollouts = python_rollouts(self, self.sandbox)
        # TRL knows fewer; what it makes of this one is replaced.
        self.vllm_importance_sampling_mode = "token_mask"
        self._noise = NoiseFloor(self, args.noise_floor_sequences)
        self._by_position = PositionMetrics(self.accelerator.device)
        self._traces: TraceWriter | None = None
        if args.log_ratio_traces:
            directory = Path(args.output_dir, "traces")
            self._traces = TraceWriter(directory, args.log_ratio_traces, rank=self.accelerator.process_index)
        for caution in args.cautions() if self.accelerator.is_main_process else ():
            logger.warning(caution)

    # ------------------------------------------------------------------------------------------------------- the loss

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **options: Any) -> Any:
        if self._skip_next_scoring:
            # TRL's old log-probabilities: in other micro-batches than the update's. `_score_old` computes them.
            self._skip_next_scoring = False
            ids, kept = args[0], args[2]
            return torch.zeros(len(ids), kept, device=ids.device), None, None
        found = super()._get_per_token_logps_and_entropies(model, *args, **options)
        if self._pending is not None:
            self._pending(found[0])
        return found

    def _compute_loss(self, model: Any, inputs: Batch) -> torch.Tensor:
        inputs = dict(inputs)
        kept = self.epsilon_low, self.epsilon_high, self.args.delta
        try:
            with self._after_scoring(lambda logp: self._put_in(inputs, logp.detach())):
                return super()._compute_loss(model, inputs)
        finally:
            self.epsilon_low, self.epsilon_high, self.args.delta = kept

    @contextmanager
    def _after_scoring(self, action: Callable[[torch.Tensor], None]) -> Iterator[None]:
        """Do something with the log-probabilities of the next scoring, before the one who asked for them goes on."""

        def once(logp: torch.Tensor) -> None:
            self._pending = None
            action(logp)

        self._pending = once
        try:
            yield
        finally:
            self._pending = None

    @torch.no_grad()
    def _put_in(self, inputs: Batch, logp: torch.Tensor) -> None:
        """Put the estimator into the inputs and settings from which TRL makes its loss."""
        old = inputs.get("old_per_token_logps")
        old = logp if old is None else old
        advantages, mask = inputs["advantages"], policy_mask(inputs)
        found = self._estimator.evaluate(logp, old, advantages, mask, validate=False)
        if self.model.training:
            self._record(inputs, found, logp, old, mask)
        if self._route == "trl":
            return
        # What TRL compares with a threshold of its own is the policy that sampled.
        inputs.setdefault("sampling_per_token_logps", old)
        # A token that has become impossible keeps a ratio of 0, which -inf less -inf would not be.
        base = logp.nan_to_num(nan=torch.nan, neginf=0.0)
        if self._route == "coefficients":
            # Where A is 0 a ratio that has overflowed must not make it NaN.
            weight = found.coefficients.weight.where(found.advantages != 0, 0.0)
            inputs["old_per_token_logps"] = base - weight.abs().log()
            inputs["advantages"] = found.advantages * weight.sign().where(weight != 0, 1.0)
            self.epsilon_low = self.epsilon_high = torch.inf
            return
        estimator, clip = self._estimator, self._estimator.clip
        assert clip is not None
        limit = estimator.max_log_ratio or _LARGEST
        low, high, dual = clip.bounds(found.position)  # type: ignore[union-attr]
        cap = torch.full_like(high, limit) if dual is None else dual.clamp(max=limit)
        inputs["old_per_token_logps"] = base - found.log_ratio.clamp(-2 * _LARGEST, limit + 1.0)
        self.epsilon_low, self.epsilon_high = -torch.expm1(low), torch.expm1(high.clamp(max=limit))
        self.args.delta = cap.exp()  # type: ignore[assignment]

    def _record(
        self, inputs: Batch, found: Evaluation, logp: torch.Tensor, old: torch.Tensor, mask: torch.Tensor
    ) -> None:
        """Keep what metrics and traces need of a micro-batch."""
        generation = int(self.args.steps_per_generation)
        iteration = self._step // generation % self.num_iterations
        # One update may take in several passes over a rollout batch: then none of them comes after training on it.
        updates = [
            step // self.args.gradient_accumulation_steps for step in (self._step - iteration * generation, self._step)
        ]
        if updates[0] == updates[1]:
            iteration = 0
        self._by_position.add(found, mask, fresh=iteration == 0)
        if self._traces is not None:
            self._traces.add(
                logp,
                old,
                mask,
                inputs["advantages"],
                step=self.state.global_step + 1,
                iteration=iteration,
                rewards=inputs["rewards"],
                reward_parts=dict(zip(self.reward_func_names, inputs["reward_parts"].unbind(1), strict=True)),
                sampling_logp=inputs.get("sampling_per_token_logps"),
                rollout=self._step // (generation * self.num_iterations),
                groups=inputs["group"],
            )
        if self._step % (generation * self.num_iterations) >= self.args.gradient_accumulation_steps:
            # The policy has moved since the rollout.
            self._noise.add(found.token_log_ratio, mask)

    # ------------------------------------------------------------------------------------ old log-probabilities, noise

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        training = self.model.training
        if training:
            self._noise.end()
        self._skip_next_scoring = training and (self.args.needs_old_logps or self._corrected)
        try:
            batch = super()._generate_and_score_completions(inputs)
        finally:
            self._skip_next_scoring = False
        if self._corrected:
            metrics = self._metrics["train" if training else "eval"]
            for name in [name for name in metrics if name.startswith("sampling/")]:
                metrics[name].pop()  # of old log-probabilities that are not there
                if not metrics[name]:
                    del metrics[name]
            if not training:
                self._correct([batch])
        scores, size = self._scores, self.num_generations if training else self.num_generations_eval
        local = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        if self.args.leave_one_out and size > 1:
            # Against the others of the group that have a reward.
            scored = (~scores.isnan()).view(-1, size).sum(1).repeat_interleave(size)
            factors = scored / (scored - 1).clamp(min=1)
            batch["advantages"] = batch["advantages"] * factors[local]
            logged = self._logs["advantages"]
            for place, factor in zip(range(-len(factors), 0), factors.tolist(), strict=True):
                logged[place] *= factor
        # Beside the rest, so that they are shuffled and split with it.
        batch["rewards"], batch["reward_parts"] = scores[local], self._scores_by_function[local]
        batch["group"] = torch.arange(len(scores), device=scores.device)[local] // size
        return batch

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        by_function = super()._calculate_rewards(*args)
        total = (by_function * self.reward_weights.to(by_function.device)).nansum(1)
        self._scores, self._scores_by_function = total.masked_fill(by_function.isnan().all(1), torch.nan), by_function
        return by_function

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is before:
            return inputs
        self._score_old()
        self._noise.begin(self._buffered_inputs)
        return inputs

    def _score_old(self) -> None:
        """Old log-probabilities of a new rollout batch, each micro-batch as its update will score it."""
        for batch in self._buffered_inputs:
            if "old_per_token_logps" in batch:
                batch["old_per_token_logps"] = self._scored(batch)
        if self._corrected:
            self._correct(self._buffered_inputs)

    @property
    def _corrected(self) -> bool:
        return bool(self.use_vllm and self.vllm_importance_sampling_correction)

    def _correct(self, batches: Sequence[Batch]) -> None:
        """Weights for the difference between vLLM's log-probabilities and the model's: `ctpo.rollout_correction`."""
        names = ("old_per_token_logps", "sampling_per_token_logps")
        old, engine = (torch.cat([batch[name] for batch in batches]) for name in names)
        mask = torch.cat([policy_mask(batch) for batch in batches])
        # vLLM has NaN for what it could not score: a ratio of 1, as in TRL.
        known = mask & ~engine.isnan()
        engine = engine.where(known, old)
        level, _, mode = self.args.vllm_importance_sampling_mode.rpartition("_")
        low, high = self.args.vllm_importance_sampling_clip_min, self.args.vllm_importance_sampling_clip_max
        found = rollout_correction(old, engine, mask, level=level, mode=mode, low=low, high=high)  # type: ignore[arg-type]
        sizes = [len(batch["completion_ids"]) for batch in batches]
        for batch, weights in zip(batches, found.weights.split(sizes), strict=True):
            # 1 at masked places: TRL's "vespo" takes the product of all.
            batch["importance_sampling_ratio"] = weights.where(policy_mask(batch), 1.0)
        difference = (old - engine).abs().where(known, 0.0)
        values = {
            "sampling/sampling_logp_difference/mean": difference.sum() / known.sum().clamp(min=1),
            "sampling/sampling_logp_difference/max": difference.max(),
            **found.metrics,
        }
        by_rank = self.accelerator.gather(torch.stack([value.float() for value in values.values()])[None])
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, column in zip(values, by_rank.T.tolist(), strict=True):
            metrics[name].append(max(column) if "max" in name else sum(column) / len(column))

    @torch.no_grad()
    def _scored(self, batch: Batch, model: Any = None) -> torch.Tensor:
        """Log-probabilities of a micro-batch by the very call that the update makes."""

        def stop(logp: torch.Tensor) -> None:
            raise _ScoredError(logp)

        try:
            with self.compute_loss_context_manager(), self._after_scoring(stop):
                super()._compute_loss(self.model_wrapped if model is None else model, batch)
        except _ScoredError as scored:
            return scored.logp
        raise AssertionError("TRL's loss asked for no log-probabilities")

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        """A micro-batch; with the last one of an update its traces are written."""
        if self._traces is not None and self._step == 0 and self.state.global_step == 0:
            self._traces.discard_after(0)  # of an earlier run in the same directory
        loss = super().training_step(*args, **options)
        if self._traces is not None and self.accelerator.sync_gradients:
            self._traces.flush()
        return loss

    def _extra_state(self) -> dict[str, Any]:
        return {"noise": self._noise.state_dict(), "by_position": self._by_position.state_dict()}

    def _load_extra_state(self, state: Mapping[str, Any]) -> None:
        self._noise.load_state_dict(state["noise"])
        self._by_position.load_state_dict(state["by_position"])
        if self._traces is not None:
            self._traces.discard_after(self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the importance ratios by position, see `ctpo.train._training_metrics`."""
        if self.model.training:
            metrics = self._metrics["train"]
            if self._route != "trl":
                # TRL counts ratios that its dual bound has cut before, or none at all: 0 where a quarter is clipped.
                for name in [name for name in metrics if name.startswith("clip_ratio/")]:
                    del metrics[name]
            for name, value in self._by_position.pop(self.accelerator.gather).items():
                metrics[name].append(value)
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------------------------------- rollouts

    def _roll_out(self, prompts: list[Any], trainer: GRPOTrainer) -> Mapping[str, Any]:
        assert self._tool_rollouts is not None
        return self._tool_rollouts(prompts, trainer)

    def _generate(self, prompts: list[Any]) -> Any:
        ids, completion_ids, mask, completions, logps, columns, *images = super()._generate(prompts)
        if self._tool_rollouts is not None:
            # TRL makes one text of a rollout, in which a program's output cannot be told from what the model wrote.
            completions = columns.pop("rollout_messages")
        return ids, completion_ids, mask, completions, logps, columns, *images
