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
import math
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
from ctpo.train._trainer_rollouts import python_rollouts
from ctpo.train._training_metrics import PositionMetrics
from ctpo.train.config import CTPOConfig
from ctpo.train.sandbox import Limits, Sandbox, open_sandbox
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
        self._warned_of_noise = False
        self._tool_rollouts: Callable[[list[Any], Any], dict[str, Any]] | None = None
        self._estimator = args.built_estimator
        self._route = args.route
        if args.python_tool != "none":
            given = [name for name in ("tools", "environment_factory", "rollout_func") if others.get(name) is not None]
            if given:
                raise ValueError(f"{given[0]} must be None with python_tool={args.python_tool!r}, which has its own")
            if sandbox is None:
                sandbox = open_sandbox(
                    args.python_sandbox, limits=Limits(timeout=args.python_timeout, output=args.python_output)
                )
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
        # Squares and number of token log-ratios of the updates since the last rollout in which the policy had moved.
        wide = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        self._signal = torch.zeros(2, dtype=wide, device=self.accelerator.device)
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
        advantages, mask = inputs["advantages"], _policy_mask(inputs)
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
            moved = found.token_log_ratio
            self._signal += torch.stack([(moved * moved).sum(), mask.sum()]).to(self._signal.dtype)

    # ------------------------------------------------------------------------------------ old log-probabilities, noise

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        training = self.model.training
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
            batch["advantages"] = batch["advantages"] * (scored / (scored - 1).clamp(min=1))[local]
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
        self._measure_noise()
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
        mask = torch.cat([_policy_mask(batch) for batch in batches])
        # vLLM has NaN for what it could not score: a ratio of 1, as in TRL.
        known = mask & ~engine.isnan()
        engine = engine.where(known, old)
        level, _, mode = self.args.vllm_importance_sampling_mode.rpartition("_")
        low, high = self.args.vllm_importance_sampling_clip_min, self.args.vllm_importance_sampling_clip_max
        found = rollout_correction(old, engine, mask, level=level, mode=mode, low=low, high=high)  # type: ignore[arg-type]
        sizes = [len(batch["completion_ids"]) for batch in batches]
        for batch, weights in zip(batches, found.weights.split(sizes), strict=True):
            # 1 at masked places: TRL's "vespo" takes the product of all.
            batch["importance_sampling_ratio"] = weights.where(_policy_mask(batch), 1.0)
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
    def _scored(self, batch: Batch) -> torch.Tensor:
        """Log-probabilities of a micro-batch by the very call that the update makes."""

        def stop(logp: torch.Tensor) -> None:
            raise _ScoredError(logp)

        try:
            with self.compute_loss_context_manager(), self._after_scoring(stop):
                super()._compute_loss(self.model, batch)
        except _ScoredError as scored:
            return scored.logp
        raise AssertionError("TRL's loss asked for no log-probabilities")

    def _measure_noise(self) -> None:
        r"""Log the noise floor, and what share of the last rollout's log-ratios it makes up.

        Some sequences are scored again by the same weights, each alone and without padding: what differs from their
        scores within the micro-batch is rounding. The floor is the root mean square of that per token; summed along a
        sequence it spreads like :math:`\sigma\sqrt{t}`, as a small change of the policy does.
        """
        batch = self._buffered_inputs[0]
        rows = min(self.args.noise_floor_sequences, len(batch["completion_ids"]))
        if rows == 0 or "pixel_values" in batch:
            return
        # As it is where old log-probabilities are needed; there is nothing else to compare with.
        together = batch.get("old_per_token_logps")
        together = self._scored(batch) if together is None else together
        mask = _policy_mask(batch)
        # Sequences with tokens first; every process makes as many passes.
        order = mask.any(1).sort(descending=True, stable=True).indices
        sums = self._signal.new_zeros(4)
        for row in order[:rows].tolist():
            alone = _without_padding(batch, row)
            difference = self._scored(alone)[0] - together[row, : alone["completion_ids"].shape[1]]
            difference = difference.where(_policy_mask(alone)[0], 0.0).to(sums.dtype)
            length = _policy_mask(alone).sum()
            squares, squared_sum = (difference**2).sum(), difference.sum() ** 2
            sums += torch.stack([squares, length, squared_sum / length.clamp(min=1), length.clamp(max=1)])
        found = torch.cat([sums, self._signal])
        self._signal.zero_()
        total, tokens, per_length, sequences, moved, compared = self.accelerator.reduce(found).tolist()
        if not tokens:
            return
        noise = total / tokens
        metrics = self._metrics["train"]
        metrics["noise_floor/token"].append(math.sqrt(noise))
        metrics["noise_floor/sqrt_t"].append(math.sqrt(per_length / sequences))
        if not moved:
            return
        share = noise * compared / moved
        metrics["noise_floor/share"].append(share)
        if share > 0.5 and self.accelerator.is_main_process and not self._warned_of_noise:
            self._warned_of_noise = True
            logger.warning(
                "Rounding makes up %.0f%% of the variance of the log-ratios since the last rollout (%.2g of %.2g nats "
                "per token). Clip rates and spreads then show arithmetic, not what the policy has learned: see "
                "noise_floor in docs/trainer.md.",
                100 * min(share, 1.0),
                math.sqrt(noise),
                math.sqrt(moved / compared),
            )

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        """A micro-batch; with the last one of an update its traces are written."""
        if self._traces is not None and self._step == 0 and self.state.global_step == 0:
            self._traces.discard_after(0)  # of an earlier run in the same directory
        loss = super().training_step(*args, **options)
        if self._traces is not None and self.accelerator.sync_gradients:
            self._traces.flush()
        return loss

    def _extra_state(self) -> dict[str, Any]:
        return {"signal": self._signal.cpu(), "by_position": self._by_position.state_dict()}

    def _load_extra_state(self, state: Mapping[str, Any]) -> None:
        self._signal.copy_(state["signal"])
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


def _policy_mask(inputs: Mapping[str, Any]) -> torch.Tensor:
    """True at the tokens that the policy chose, shape (B, T)."""
    mask = inputs["completion_mask"]
    return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()


def _without_padding(batch: Batch, row: int) -> Batch:
    """One sequence of a micro-batch by itself."""
    prompt = batch["prompt_mask"][row].bool()
    # At least one token, attended to or not: the model cannot score none.
    length = max(1, int(batch["completion_mask"][row].sum()))
    alone = {"advantages": batch["advantages"][row : row + 1]}
    for name in ("prompt_ids", "prompt_mask"):
        alone[name] = batch[name][row, prompt][None]
    for name in ("completion_ids", "completion_mask", "tool_mask"):
        if name in batch:
            alone[name] = batch[name][row, :length][None]
    return alone
