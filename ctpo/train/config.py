"""Settings of `CTPOTrainer`: those of TRL's `GRPOConfig`, with an estimator of `ctpo` in place of TRL's loss options.

The estimator decides the importance ratio, the window and the form of the loss. TRL has options of its own for these
(`loss_type`, `epsilon`, `epsilon_high`, `delta`, `importance_sampling_level`); here they follow from the estimator, and
a value of your own that says something else is refused, not ignored.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

from trl import GRPOConfig

from ctpo._arrays import one_of
from ctpo.clipping import CalibratedClip, Clip, PositionClip, RatioClip
from ctpo.estimators import Estimator
from ctpo.losses import Aggregation
from ctpo.regions import SequenceRegion
from ctpo.train.sandbox import Limits
from ctpo.zoo import RECIPES

__all__ = ["CTPOConfig", "Route"]

Route = Literal["trl", "bounds", "coefficients"]

# TRL's name of each aggregation, for losses of the form of PPO.
_LOSS_TYPES = {
    "seq-mean-token-mean": "grpo",
    "token-mean": "dapo",
    "seq-mean-token-sum-norm": "dr_grpo",
    "seq-mean-token-sum": "luspo",
}
# The one aggregation that TRL has for losses of another form, by form.
_OWN_LOSS_TYPES = {"cispo": "token-mean", "sapo": "seq-mean-token-mean", "vespo": "token-mean"}
# Level and mode of `ctpo.rollout_correction`; TRL's own are the first two at "token" and "sequence".
_CORRECTIONS = tuple(
    f"{level}_{mode}"
    for level in ("token", "sequence", "cumulative", "sequence_mean")
    for mode in ("truncate", "mask", "reject")
)
_TRL_LEVELS = {"token": "token", "sequence_mean": "sequence"}
_DERIVED = ("loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level")
_CLIP_FIELDS = ("clip_low", "clip_high", "clip_dual", "clip_power", "clip_drift", "clip_sigma")
_LIMITS = ("max_log_ratio", "max_token_log_ratio")


def _option(default: Any, text: str) -> Any:
    """A field whose help the command line shows."""
    return field(default=default, metadata={"help": text.replace("%", "%%")})


@dataclass
class CTPOConfig(GRPOConfig):
    r"""Settings of `CTPOTrainer`.

    Every field of TRL's `GRPOConfig` is here too, with its meaning. Three have another default: `disable_dropout` is
    True (a ratio of two passes with different dropout masks is noise), `vllm_importance_sampling_mode` is
    "token_truncate" (TRL's "sequence_mask" drops every long sequence of an engine that is a little off), and
    `max_tool_calling_iterations` is 5. Modes of that correction are those of `ctpo.rollout_correction`, more than
    TRL's: a level (token, cumulative, sequence, sequence_mean) and what happens beyond the bounds (truncate, mask,
    reject).

    Args:
        estimator: Name of a policy-gradient estimator, see ``ctpo estimators``.
        aggregation: What the loss averages over, in the names of `ctpo.policy_loss`; None for that of the estimator's
            source. "token-mean" is TRL's "dapo" (all tokens of an optimizer step), "seq-mean-token-mean" its "grpo",
            "seq-mean-token-sum-norm" its "dr_grpo" (with `max_completion_length`), "seq-mean-token-sum" its "luspo".
        clip_low: Lower edge of the clip window, as `low` of the estimator's window: `PositionClip` (a scale of the
            log-ratio) or `RatioClip` (room below a ratio of 1). With `clip_sigma` the wanted clip rate. This and the
            other fields of the window: None for the estimator's own value.
        clip_high: Upper edge, likewise.
        clip_dual: Bound for negative advantages, likewise; 0 for none.
        clip_power: Power of the position by which a `PositionClip` grows.
        clip_drift: Fall of its center per token, nats.
        clip_sigma: Standard deviation of the log-ratio of one token, nats, as `ctpo.diagnostics.calibrate_clip` finds
            it: makes the window a `CalibratedClip`, which a share of `clip_low` and `clip_high` of the tokens leaves.
            Needs `clip_low`, `clip_high` and `clip_drift`.
        estimator_window: Number of tokens of the estimators "lookahead" and "nfpo".
        max_log_ratio: Numerical limit of a log-ratio, see `ctpo.Estimator`; 0 for none. (A window's is then 40: the
            square of a larger ratio overflows float32, and with it the norm of the gradient.) This and the next do not
            go with an estimator that is a loss of TRL itself, which has no such limit.
        max_token_log_ratio: The same of one token's log-ratio before it enters a product.
        leave_one_out: Advantages against the mean of the group's other responses, which is unbiased: G / (G - 1) times
            those against the mean of all. Needs `scale_rewards="none"`.
        noise_floor_sequences: Sequences of each rollout batch (and process) that are scored a second time, alone, to
            measure how much of a log-ratio is numerical noise; 0 for none.
        log_ratio_traces: Write log-probabilities, masks, advantages and rewards of every N-th optimizer step to
            OUTPUT_DIR/traces, for `ctpo diagnose`; 0 for never.
        python_tool: Let the model run Python while it answers: "none", "calls" (the tool calls of its chat template),
            "fenced" (```python blocks in its text) or "auto" ("calls" where the template has them).
        python_sandbox: Backend of the sandbox: "auto", "bubblewrap" or "monty".
        python_timeout: Seconds that a call may take.
        python_output: Characters of a call's output that the model is shown.

    Raises:
        ValueError: A field is out of its range, does not go with the estimator, or would be ignored.

    Assumptions:
        Those of the estimator. What was sampled with `top_p`, `top_k`, `min_p` or a repetition penalty does not come
        from the policy whose log-probabilities are compared; `cautions` says so.

    References:
        arXiv:2605.07331; TRL 1.16, GRPOConfig.

    Example:
        >>> config = CTPOConfig("out", steps_per_generation=8, clip_high=0.08, bf16=False, use_cpu=True)
        >>> config.built_estimator.clip
        PositionClip(low=0.025, high=0.08, power=0.5, dual=0.08, drift=0.0)
        >>> config.loss_type, config.route
        ('grpo', 'bounds')
    """

    estimator: str = _option("ctpo", "Policy-gradient estimator, a name that `ctpo estimators` lists.")
    aggregation: str | None = _option(
        None,
        "What the loss averages over: token-mean, seq-mean-token-mean, seq-mean-token-sum or seq-mean-token-sum-norm. "
        "Default: as in the estimator's source.",
    )
    clip_low: float | None = _option(None, "Lower edge of the clip window. Default, here and below: the estimator's.")
    clip_high: float | None = _option(None, "Upper edge of the clip window.")
    clip_dual: float | None = _option(None, "Bound of the window for negative advantages; 0 for none.")
    clip_power: float | None = _option(None, "Power of the position by which the window grows.")
    clip_drift: float | None = _option(None, "Fall of the window's center per token, nats.")
    clip_sigma: float | None = _option(
        None, "Spread of one token's log-ratio, nats: clip_low, clip_high and clip_dual are then wanted clip rates."
    )
    estimator_window: int | None = _option(None, "Number of tokens of the estimators lookahead and nfpo.")
    max_log_ratio: float | None = _option(None, "Numerical limit of a log-ratio; 0 for none.")
    max_token_log_ratio: float | None = _option(None, "Numerical limit of one token's log-ratio; 0 for none.")
    leave_one_out: bool = _option(False, "Advantages against the group's other responses; needs scale_rewards none.")
    noise_floor_sequences: int = _option(
        1, "Sequences per rollout batch that are scored twice to measure numerical noise; 0 for none."
    )
    log_ratio_traces: int = _option(0, "Write log-probabilities of every N-th step to OUTPUT_DIR/traces; 0 for never.")
    python_tool: str = _option("none", "Python for the model: none, calls, fenced or auto.")
    python_sandbox: str = _option("auto", "Where it runs: auto, bubblewrap or monty.")
    python_timeout: float = _option(10.0, "Seconds that a call may take.")
    python_output: int = _option(4000, "Characters of a call's output that the model sees.")

    disable_dropout: bool = _option(True, "No dropout: a ratio of two passes with different dropout is noise.")
    max_tool_calling_iterations: int | None = _option(5, "Most turns with calls of the tool.")
    vllm_importance_sampling_mode: str = _option(
        "token_truncate",
        "Level and mode of the weights that correct for vLLM: token, cumulative, sequence or sequence_mean, then "
        "_truncate, _mask or _reject.",
    )
    loss_type: str | None = _option(None, "Not to be set: follows from estimator and aggregation.")
    epsilon: float | None = _option(None, "Not to be set: see clip_low.")
    epsilon_high: float | None = _option(None, "Not to be set: see clip_high.")
    delta: float | None = _option(None, "Not to be set: see clip_dual.")
    importance_sampling_level: str | None = _option(None, "Not to be set: follows from the estimator.")

    def __post_init__(self) -> None:
        self._check_fields()
        estimator = self.built_estimator
        derived = self._derived(estimator)
        for name in _DERIVED:
            given = getattr(self, name)
            if given is not None and given != derived[name]:
                instead = {"loss_type": "estimator and aggregation", "importance_sampling_level": "estimator"}
                raise ValueError(
                    f"{name} must not be set, got {given!r}: it follows from estimator={self.estimator!r}. Set "
                    f"{instead.get(name, 'clip_low, clip_high and clip_dual')} instead"
                )
        for name, value in derived.items():
            setattr(self, name, value)
        with warnings.catch_warnings():
            # TRL 1.16's own default has the former name.
            warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
            super().__post_init__()
        self._check_combinations()

    def _check_fields(self) -> None:
        """Raise unless the fields that are new here are in their ranges."""
        one_of("estimator", self.estimator, RECIPES)
        if self.aggregation is not None:
            one_of("aggregation", self.aggregation, get_args(Aggregation))
        one_of("python_tool", self.python_tool, ("none", "calls", "fenced", "auto"))
        one_of("python_sandbox", self.python_sandbox, ("auto", "bubblewrap", "monty"))
        for name, least in (("noise_floor_sequences", 0), ("log_ratio_traces", 0), ("python_output", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        timeout: Any = self.python_timeout
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
            raise ValueError(f"python_timeout must be a positive number of seconds, got {self.python_timeout!r}")

    @cached_property
    def built_estimator(self) -> Estimator:
        """The estimator that the fields describe."""
        estimator: Any = RECIPES[self.estimator].estimator
        changes: dict[str, Any] = {}
        if any(getattr(self, name) is not None for name in _CLIP_FIELDS):
            changes["clip"] = self._window(estimator)
        if self.estimator_window is not None:
            if estimator.window is None:
                raise ValueError(
                    f"estimator_window must be None for the estimator {self.estimator!r}, got {self.estimator_window}"
                )
            changes["window"] = self.estimator_window
        if self.estimator == "sapo":
            changes["clip"] = replace(
                estimator.clip, positive=self.sapo_temperature_pos, negative=self.sapo_temperature_neg
            )
        elif self.estimator == "vespo":
            powers = {"positive_power": self.vespo_k_pos, "negative_power": self.vespo_k_neg}
            rates = {"positive_rate": self.vespo_lambda_pos, "negative_rate": self.vespo_lambda_neg}
            changes["clip"] = replace(estimator.clip, **powers, **rates)
        elif self.estimator == "opsm" and self.off_policy_mask_threshold is not None:
            changes["region"] = replace(estimator.region, threshold=self.off_policy_mask_threshold)
        for name in _LIMITS:
            value = getattr(self, name)
            if value is not None:
                changes[name] = value or None
        estimator = replace(estimator, **changes)
        if self._is_trl(estimator):
            for name in _LIMITS:
                if getattr(self, name):
                    raise ValueError(
                        f"{name} must be None for the estimator {self.estimator!r}, whose loss is TRL's own and has no "
                        f"such limit; got {getattr(self, name)}"
                    )
            return replace(estimator, max_log_ratio=None, max_token_log_ratio=None)
        return estimator

    def _window(self, estimator: Estimator) -> Any:
        """The clip window with the fields that are given."""
        clip = estimator.clip
        given = {name.removeprefix("clip_"): getattr(self, name) for name in _CLIP_FIELDS}
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("dual") == 0:
            given["dual"] = None
        kind: Any = type(clip)
        if not isinstance(clip, (RatioClip, PositionClip)):
            raise ValueError(f"{self._named(given)} must not be set: the estimator {self.estimator!r} has no window")
        if "sigma" in given:
            missing = [f"clip_{name}" for name in ("low", "high", "drift") if name not in given]
            if missing:
                raise ValueError(f"clip_sigma needs {', '.join(missing)}; see ctpo.diagnostics.calibrate_clip")
            return CalibratedClip(**given)
        unknown = [name for name in given if name not in {entry.name for entry in fields(kind)}]
        if unknown:
            raise ValueError(
                f"{self._named(unknown)} must not be set: the window of the estimator {self.estimator!r} is a "
                f"{kind.__name__}, with {', '.join(f'clip_{entry.name}' for entry in fields(kind))}"
            )
        if kind is PositionClip and "dual" not in given and clip.dual is not None and "high" in given:
            # The released code's bound is the upper edge; one that stayed behind would act as another one.
            given["dual"] = given["high"] if clip.dual == clip.high else clip.dual
        return replace(clip, **given)

    @staticmethod
    def _named(names: Any) -> str:
        return ", ".join(f"clip_{name}" for name in names)

    @property
    def built_aggregation(self) -> str:
        """The aggregation that is used, in the names of `ctpo.policy_loss`."""
        return self.aggregation or RECIPES[self.estimator].aggregation

    def _is_trl(self, estimator: Estimator) -> bool:
        """Whether one of TRL's own losses is this estimator with this aggregation."""
        clip, region = estimator.clip, estimator.region
        if estimator.form in _OWN_LOSS_TYPES and self.built_aggregation != _OWN_LOSS_TYPES[estimator.form]:
            return False
        if estimator.form == "vespo":
            return estimator.level == "sequence" and region is None
        if estimator.level not in _TRL_LEVELS:
            return False
        if estimator.form == "sapo":
            return region is None
        if not isinstance(clip, RatioClip):
            return False
        if estimator.form == "cispo":
            return clip.low == 1 and region is None
        if estimator.form != "ppo":
            return False
        mean_of_sequence = (
            isinstance(region, SequenceRegion)
            and (region.estimate, region.statistic, region.only_negative) == ("k1", "mean", True)
            and estimator.level == "token"
        )
        # A dual bound inside of the window means something else in TRL.
        return (region is None or mean_of_sequence) and (clip.dual is None or clip.dual >= 1 + clip.high)

    def _derived(self, estimator: Estimator) -> dict[str, Any]:
        """TRL's options that follow."""
        found: dict[str, Any] = {
            "loss_type": _LOSS_TYPES[self.built_aggregation],
            "epsilon": 0.2,  # replaced at every step unless TRL's own loss is used
            "epsilon_high": None,
            "delta": None,
            "importance_sampling_level": "token",
        }
        if not self._is_trl(estimator):
            return found
        clip = estimator.clip
        if estimator.form in _OWN_LOSS_TYPES:
            found["loss_type"] = estimator.form
        if estimator.form != "vespo":
            found["importance_sampling_level"] = _TRL_LEVELS[estimator.level]
        if isinstance(clip, RatioClip):
            found |= {"epsilon": clip.low, "epsilon_high": clip.high, "delta": clip.dual}
            if estimator.form == "cispo":
                found |= {"epsilon": 0.2, "epsilon_high": 1 + clip.high}  # TRL's bound is that of the ratio itself
        if isinstance(estimator.region, SequenceRegion):
            found["off_policy_mask_threshold"] = estimator.region.threshold
        return found

    @property
    def route(self) -> Route:
        """How the estimator gets into TRL's loss.

        "trl": it is one of TRL's own losses, which runs unchanged. "bounds": TRL's token-level loss runs with the
        estimator's ratio and window in place of its own; value and gradient are those of `ctpo.policy_loss`.
        "coefficients": it runs with the estimator's coefficients as ratios and without a window; the gradient is that
        of `ctpo.policy_loss`, the logged loss is the sum of coefficient times advantage.
        """
        estimator = self.built_estimator
        if self._is_trl(estimator):
            return "trl"
        # The numerical limit of a token's own ratio takes weights away on both sides, which is no window.
        if estimator.form != "ppo" or estimator.region is not None or estimator.level == "token":
            return "coefficients"
        # TRL reads a dual bound below the upper edge as a bound for both signs.
        assert isinstance(estimator.clip, Clip)
        _, high, dual = estimator.clip.bounds(1.0)
        return "coefficients" if dual is not None and dual < high else "bounds"

    def _check_combinations(self) -> None:
        """Raise for inherited options that would make ratios or the estimator meaningless."""
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                f"neftune_noise_alpha must be None, got {self.neftune_noise_alpha}: two passes of the same weights "
                "would differ by its noise, and every ratio with them"
            )
        if self.fp16 and self.use_cpu:
            raise ValueError("fp16 must be False with use_cpu=True, where Accelerate ignores it; bf16 works there")
        kwargs = self.generation_kwargs if isinstance(self.generation_kwargs, Mapping) else {}
        others = ("temperature", "do_sample", "num_beams", "num_return_sequences")
        changed = [name for name in others if name in kwargs]
        if changed:
            raise ValueError(
                f"generation_kwargs must not have {', '.join(changed)}, got {kwargs}: log-probabilities are those of "
                "one sample at the option `temperature`"
            )
        if self.leave_one_out:
            if self.scale_rewards != "none":
                raise ValueError(f"leave_one_out needs scale_rewards='none', got {self.scale_rewards!r}")
            if self.multi_objective_aggregation != "sum_then_normalize":
                raise ValueError(
                    "leave_one_out needs multi_objective_aggregation='sum_then_normalize', got "
                    f"{self.multi_objective_aggregation!r}"
                )
        defaults = {entry.name: entry.default for entry in fields(GRPOConfig)}
        for prefix, owner in (("sapo_", "sapo"), ("vespo_", "vespo")):
            for name, default in defaults.items():
                if name.startswith(prefix) and self.estimator != owner and getattr(self, name) != default:
                    raise ValueError(f"{name} goes with estimator={owner!r} only, got estimator={self.estimator!r}")
        if self.route == "coefficients" and self.beta != 0 and self.use_bias_correction_kl:
            raise ValueError(
                f"use_bias_correction_kl must be False with estimator={self.estimator!r} and beta={self.beta}: the "
                "divergence would be multiplied by the estimator's coefficient, which is no importance ratio"
            )
        if self.built_estimator.form == "cfpo" and self.off_policy_mask_threshold is not None:
            # The sign of a coefficient goes into the advantage, of which TRL drops the negative ones.
            raise ValueError(
                f"off_policy_mask_threshold must be None with estimator={self.estimator!r}, some of whose coefficients "
                f"are negative; got {self.off_policy_mask_threshold}"
            )
        allowed = _CORRECTIONS
        if self.estimator == "vespo" and self.use_vllm and self.vllm_importance_sampling_correction:
            allowed = _CORRECTIONS[:2]
        one_of("vllm_importance_sampling_mode", self.vllm_importance_sampling_mode, allowed)

    @property
    def updates_per_rollout(self) -> float:
        """Optimizer steps that are made with one rollout batch; on average, where that is no whole number."""
        return int(self.steps_per_generation) * self.num_iterations / self.gradient_accumulation_steps

    @property
    def python_limits(self) -> Limits:
        """What code of the tool may take, by `python_timeout` and `python_output`."""
        return Limits(timeout=self.python_timeout, output=self.python_output)

    @property
    def needs_old_logps(self) -> bool:
        """Whether a rollout batch serves more than one optimizer step, so that ratios differ from 1."""
        return self.gradient_accumulation_steps % (int(self.steps_per_generation) * self.num_iterations) != 0

    def cautions(self) -> list[str]:
        """What to know about these settings before a run, a sentence each.

        Returns:
            Sentences; empty if there is nothing to say.

        Example:
            >>> config = CTPOConfig("out", bf16=False, use_cpu=True)
            >>> print(config.cautions()[0])  # doctest: +ELLIPSIS
            Every importance ratio is 1: ...
        """
        found = []
        if not self.needs_old_logps:
            found.append(
                "Every importance ratio is 1: each rollout batch is used for one optimizer step "
                f"(steps_per_generation={self.steps_per_generation}, num_iterations={self.num_iterations}, "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}), so the estimator makes no "
                "difference to the gradient. Raise steps_per_generation for off-policy updates."
            )
        elif self.num_iterations > 1:
            found.append(
                f"num_iterations={self.num_iterations} trains on every sample more than once. From the second time on "
                "its ratio is none of importance sampling: the policy was fitted to that very sample, the mean ratio "
                "leaves 1 and the spread grows like t. Metrics keep such samples apart (trained_on)."
            )
        # What TRL gives the sampler last.
        kwargs = self.generation_kwargs if isinstance(self.generation_kwargs, Mapping) else {}
        neutral = {"top_p": (1, None), "top_k": (0, -1, None), "min_p": (0, None), "repetition_penalty": (1, None)}
        sampling = {name: kwargs.get(name, getattr(self, name)) for name in neutral}
        cut = [f"{name}={value}" for name, value in sampling.items() if value not in neutral[name]]
        if cut:
            found.append(
                f"{', '.join(cut)}: samples come from a policy that is cut or reweighted, while both log-probabilities "
                "of a ratio are those of the whole one. Ratios of what was sampled then do not average to 1."
            )
        if not self.disable_dropout:
            found.append(
                "disable_dropout=False: where the model (or LoRA) has dropout, two passes of the same weights differ, "
                "and that goes into every ratio as if the policy had changed."
            )
        if self.estimator == "m2po":
            found.append("m2po drops tokens until a mean over the batch is small enough; here it judges micro-batches.")
        return found

    def estimator_options(self) -> Mapping[str, Any]:
        """What `ctpo.policy_loss` needs to compute the same loss of the same micro-batch.

        Returns:
            The keyword arguments estimator and aggregation.

        Example:
            >>> CTPOConfig("out", estimator="gspo", bf16=False, use_cpu=True).estimator_options()["aggregation"]
            'seq-mean-token-mean'
        """
        return {"estimator": self.built_estimator, "aggregation": self.built_aggregation}
