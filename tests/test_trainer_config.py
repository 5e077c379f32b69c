"""Settings of the trainer: what follows from the estimator, what is refused, and what is said before a run."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
import tempfile
from typing import Any

import pytest
import yaml
from transformers import HfArgumentParser
from trl import GRPOConfig, TrlParser
from trl_harness import config_on_cpu

from ctpo import CalibratedClip, PositionClip, RatioClip
from ctpo.clipping import GammaWeight, SigmoidGate
from ctpo.regions import SequenceRegion
from ctpo.train.config import CTPOConfig
from ctpo.zoo import RECIPES

DERIVED = ("loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level")
OFF_POLICY = {"steps_per_generation": 8}


def config(**options: Any) -> CTPOConfig:
    return config_on_cpu(tempfile.gettempdir(), CTPOConfig, **options)


# ---------------------------------------------------------------------------------------------------------------------
# What follows from the estimator.

ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("trl", {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.2}),
    "dr_grpo": ("trl", {"loss_type": "dr_grpo", "epsilon": 0.2, "epsilon_high": 0.2}),
    "dapo": ("trl", {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
    "decoupled_ppo": ("trl", {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.2}),
    "ppo": ("trl", {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.2, "delta": 3.0}),
    "gspo": ("trl", {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4}),
    "gspo_token": ("trl", {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_high": 4e-4}),
    "luspo": ("trl", {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon_high": 4e-4}),
    "cispo": ("trl", {"loss_type": "cispo", "epsilon_high": 5.0}),
    "sapo": ("trl", {"loss_type": "sapo"}),
    "vespo": ("trl", {"loss_type": "vespo", "importance_sampling_level": "token"}),
    "opsm": ("trl", {"loss_type": "grpo", "off_policy_mask_threshold": 0.1}),
    "ctpo": ("bounds", {"loss_type": "grpo"}),
    "ctpo_fixed": ("bounds", {"loss_type": "grpo"}),
    "ctpo_mean": ("bounds", {"loss_type": "grpo"}),
    "minpro": ("bounds", {"loss_type": "grpo"}),
    "tic_grpo": ("bounds", {"loss_type": "grpo"}),
    "drpo": ("coefficients", {"loss_type": "dr_grpo"}),
    "m2po": ("coefficients", {"loss_type": "dapo"}),
}


@pytest.mark.parametrize("estimator", sorted(RECIPES))
def test_options_of_trl_that_follow(estimator: str) -> None:
    route, expected = ROUTES.get(estimator, ("coefficients", {}))
    args = config(estimator=estimator)
    assert args.route == route
    assert {name: getattr(args, name) for name in expected} == expected
    if route != "trl":
        assert args.importance_sampling_level == "token"
        assert args.delta is None
    assert args.estimator_options()["aggregation"] == RECIPES[estimator].aggregation
    if route == "trl":
        # TRL's losses have no numerical limit.
        assert args.built_estimator.max_log_ratio is None
        assert args.built_estimator.max_token_log_ratio is None
    else:
        assert args.built_estimator == RECIPES[estimator].estimator


@pytest.mark.parametrize(
    ("aggregation", "loss_type"),
    [
        ("token-mean", "dapo"),
        ("seq-mean-token-mean", "grpo"),
        ("seq-mean-token-sum", "luspo"),
        ("seq-mean-token-sum-norm", "dr_grpo"),
    ],
)
@pytest.mark.parametrize("estimator", ["ctpo", "grpo", "gspo", "gppo"])
def test_aggregations(estimator: str, aggregation: str, loss_type: str) -> None:
    args = config(estimator=estimator, aggregation=aggregation)
    assert (args.loss_type, args.built_aggregation) == (loss_type, aggregation)


@pytest.mark.parametrize("estimator", ["cispo", "sapo", "vespo"])
def test_a_loss_of_trl_has_one_aggregation(estimator: str) -> None:
    other = "seq-mean-token-sum"
    args = config(estimator=estimator, aggregation=other)
    assert (args.route, args.loss_type, args.built_aggregation) == ("coefficients", "luspo", other)


WINDOWS: list[tuple[dict[str, Any], Any]] = [
    ({}, PositionClip(0.025, 0.05, dual=0.05)),
    ({"clip_low": 0.1}, PositionClip(0.1, 0.05, dual=0.05)),
    # The released code's dual bound is its upper edge.
    ({"clip_high": 0.08}, PositionClip(0.025, 0.08, dual=0.08)),
    ({"clip_high": 0.08, "clip_dual": 0.2}, PositionClip(0.025, 0.08, dual=0.2)),
    ({"clip_high": 0.08, "clip_dual": 0.0}, PositionClip(0.025, 0.08, dual=None)),
    ({"clip_power": 0.25, "clip_drift": 0.01}, PositionClip(0.025, 0.05, power=0.25, dual=0.05, drift=0.01)),
    (
        {"clip_sigma": 0.04, "clip_low": 0.1, "clip_high": 0.05, "clip_drift": 0.0008},
        CalibratedClip(low=0.1, high=0.05, sigma=0.04, drift=0.0008),
    ),
    (
        {"clip_sigma": 0.04, "clip_low": 0.1, "clip_high": 0.05, "clip_drift": 0.0, "clip_dual": 0.02, "clip_power": 1},
        CalibratedClip(low=0.1, high=0.05, sigma=0.04, drift=0.0, dual=0.02, power=1.0),
    ),
    ({"estimator": "grpo", "clip_high": 0.3}, RatioClip(0.2, 0.3)),
    ({"estimator": "ppo", "clip_high": 0.3}, RatioClip(0.2, 0.3, dual=3.0)),
    ({"estimator": "ppo", "clip_dual": 0.0}, RatioClip(0.2, 0.2)),
    ({"estimator": "ctpo_fixed", "clip_high": math.inf}, RatioClip(0.5, math.inf)),
    ({"estimator": "sapo", "sapo_temperature_neg": 2.0}, SigmoidGate(1.0, 2.0)),
    ({"estimator": "vespo", "vespo_k_neg": 4.0, "vespo_lambda_pos": 1.0}, GammaWeight(2.0, 1.0, 4.0, 2.0)),
]  # fmt: skip


@pytest.mark.parametrize(("options", "clip"), WINDOWS, ids=str)
def test_windows(options: dict[str, Any], clip: Any) -> None:
    assert config(**options).built_estimator.clip == clip


def test_other_fields_of_the_estimator() -> None:
    assert config(estimator="nfpo", estimator_window=2).built_estimator.window == 2
    limited = config(max_log_ratio=3.0, max_token_log_ratio=1.0).built_estimator
    assert (limited.max_log_ratio, limited.max_token_log_ratio) == (3.0, 1.0)
    unlimited = config(max_log_ratio=0.0, max_token_log_ratio=0.0).built_estimator
    assert (unlimited.max_log_ratio, unlimited.max_token_log_ratio) == (None, None)
    region = config(estimator="opsm", off_policy_mask_threshold=0.3).built_estimator.region
    assert isinstance(region, SequenceRegion)
    assert region.threshold == 0.3


@pytest.mark.parametrize(
    ("options", "route"),
    [
        ({"clip_dual": 0.03}, "coefficients"),
        ({"clip_dual": 0.05}, "bounds"),
        ({"estimator": "ppo", "clip_high": 4.0}, "coefficients"),  # a dual bound inside of the window
        ({"estimator": "ppo", "clip_high": 2.0}, "trl"),
        ({"estimator": "cispo", "clip_low": 0.5}, "coefficients"),
        (
            {"estimator": "grpo", "clip_sigma": 0.1, "clip_low": 0.1, "clip_high": 0.1, "clip_drift": 0.0},
            "coefficients",
        ),
        ({"estimator": "gspo", "clip_sigma": 0.1, "clip_low": 0.1, "clip_high": 0.1, "clip_drift": 0.0}, "bounds"),
    ],
    ids=str,
)
def test_routes(options: dict[str, Any], route: str) -> None:
    assert config(**options).route == route


# ---------------------------------------------------------------------------------------------------------------------
# What is refused: the message names the argument, what came, and what to do.

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"estimator": "ctp"}, r"estimator must be one of .*; got 'ctp' \(did you mean 'ctpo'\?\)"),
    ({"aggregation": "token_mean"}, r"aggregation must be one of .*'token_mean' \(did you mean 'token-mean'\?\)"),
    ({"python_tool": "call"}, r"python_tool must be one of none, calls, .*; got 'call' \(did you mean 'calls'"),
    ({"python_sandbox": "docker"}, "python_sandbox must be one of auto, bubblewrap, monty; got 'docker'"),
    ({"noise_floor_sequences": -1}, "noise_floor_sequences must be an integer of at least 0, got -1"),
    ({"noise_floor_sequences": True}, "noise_floor_sequences must be an integer of at least 0, got True"),
    ({"log_ratio_traces": 0.5}, "log_ratio_traces must be an integer of at least 0, got 0.5"),
    ({"python_timeout": "x"}, "python_timeout must be a positive number of seconds, got 'x'"),
    ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha must be None, got 5.0: two passes"),
    ({"fp16": True}, "fp16 must be False with use_cpu=True"),
    ({"generation_kwargs": {"temperature": 0.5}}, "generation_kwargs must not have temperature, got"),
    ({"python_output": 0}, "python_output must be an integer of at least 1, got 0"),
    ({"python_timeout": 0.0}, "python_timeout must be a positive number of seconds, got 0.0"),
    ({"python_timeout": math.nan}, "python_timeout must be a positive number of seconds, got nan"),
    ({"loss_type": "dapo"}, "loss_type must not be set, got 'dapo': .* Set estimator and aggregation instead"),
    ({"epsilon": 0.1}, "epsilon must not be set, got 0.1: .* Set clip_low, clip_high and clip_dual instead"),
    ({"estimator": "grpo", "epsilon_high": 0.28}, "epsilon_high must not be set, got 0.28: .*clip_high"),
    ({"delta": 2.0}, "delta must not be set, got 2.0: .*clip_dual"),
    ({"importance_sampling_level": "sequence"}, "importance_sampling_level must not be set, .* Set estimator instead"),
    ({"estimator": "topr", "clip_high": 0.3}, "clip_high must not be set: the estimator 'topr' has no window"),
    ({"estimator": "sapo", "clip_low": 0.3}, "clip_low must not be set: the estimator 'sapo' has no window"),
    (
        {"estimator": "grpo", "clip_power": 0.5, "clip_drift": 0.1},
        "clip_power, clip_drift must not be set: .* is a RatioClip, with clip_low, clip_high, clip_dual",
    ),
    ({"clip_sigma": 0.04, "clip_low": 0.1}, "clip_sigma needs clip_high, clip_drift; see .*calibrate_clip"),
    ({"clip_low": -0.1}, r"PositionClip: low must be a positive finite number; got -0\.1"),
    ({"estimator": "cispo", "clip_dual": 2.0}, "dual=None for the form 'cispo'"),
    ({"estimator_window": 3}, "estimator_window must be None for the estimator 'ctpo', got 3"),
    ({"estimator": "grpo", "max_log_ratio": 3.0}, "max_log_ratio must be None for the estimator 'grpo'.*; got 3.0"),
    ({"max_log_ratio": -1.0}, r"max_log_ratio must be a positive finite number, or None; got -1\.0"),
    ({"leave_one_out": True}, "leave_one_out needs scale_rewards='none', got 'group'"),
    (
        {"leave_one_out": True, "scale_rewards": "none", "multi_objective_aggregation": "normalize_then_sum"},
        "leave_one_out needs multi_objective_aggregation='sum_then_normalize', got 'normalize_then_sum'",
    ),
    ({"sapo_temperature_pos": 2.0}, "sapo_temperature_pos goes with estimator='sapo' only, got estimator='ctpo'"),
    ({"estimator": "sapo", "vespo_k_pos": 1.0}, "vespo_k_pos goes with estimator='vespo' only, got estimator='sapo'"),
    ({"estimator": "gppo", "beta": 0.1}, "use_bias_correction_kl must be False with estimator='gppo' and beta=0.1"),
    ({"estimator": "cfpo", "off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold must be None with .*'cfpo'"),
    ({"vllm_importance_sampling_mode": "sequence"}, "vllm_importance_sampling_mode must be one of .*; got 'sequence'"),
    (
        {"estimator": "vespo", "use_vllm": True, "vllm_importance_sampling_mode": "sequence_mask"},
        "vllm_importance_sampling_mode must be one of .*; got 'sequence_mask'",
    ),
    ({"num_generations": 3}, "must be divisible by num_generations"),  # TRL's own
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize("estimator", sorted(RECIPES))
def test_derived_values_may_be_given_again(estimator: str) -> None:
    """So that a saved configuration can be read."""
    first = config(estimator=estimator)
    again = config(estimator=estimator, **{name: getattr(first, name) for name in DERIVED})
    assert again.built_estimator == first.built_estimator


# ---------------------------------------------------------------------------------------------------------------------
# What is said before a run.


@pytest.mark.parametrize(
    ("options", "beginnings"),
    [
        (OFF_POLICY, []),
        ({}, ["Every importance ratio is 1"]),
        ({"gradient_accumulation_steps": 8, "steps_per_generation": 8}, ["Every importance ratio is 1"]),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 8}, []),
        ({"num_iterations": 2}, ["num_iterations=2 trains on every sample more than once"]),
        (OFF_POLICY | {"top_p": 0.9}, ["top_p=0.9: samples come from a policy that is cut"]),
        (OFF_POLICY | {"top_k": 20, "min_p": 0.1}, ["top_k=20, min_p=0.1: samples"]),
        (OFF_POLICY | {"repetition_penalty": 1.1}, ["repetition_penalty=1.1: samples"]),
        (OFF_POLICY | {"disable_dropout": False}, ["disable_dropout=False"]),
        (OFF_POLICY | {"generation_kwargs": {"top_k": 5, "top_p": 1.0}}, ["top_k=5: samples"]),
        ({"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 8}, ["Every importance"]),
        (OFF_POLICY | {"estimator": "m2po"}, ["m2po drops tokens"]),
        ({"top_p": 0.9, "estimator": "m2po"}, ["Every importance ratio is 1", "top_p=0.9", "m2po drops tokens"]),
    ],
    ids=str,
)
def test_cautions(options: dict[str, Any], beginnings: list[str]) -> None:
    found = config(**options).cautions()
    assert len(found) == len(beginnings)
    assert all(text.startswith(beginning) for text, beginning in zip(found, beginnings, strict=True))


@pytest.mark.parametrize(
    ("accumulation", "generation", "iterations", "updates", "needed"),
    [(1, 1, 1, 1.0, False), (2, 8, 1, 4.0, True), (4, 4, 1, 1.0, False), (4, 4, 2, 2.0, True), (4, 2, 1, 0.5, False)],
)
def test_updates_per_rollout(accumulation: int, generation: int, iterations: int, updates: float, needed: bool) -> None:
    args = config(gradient_accumulation_steps=accumulation, steps_per_generation=generation, num_iterations=iterations)
    assert args.updates_per_rollout == updates
    assert args.needs_old_logps == needed


def test_defaults_that_differ_from_trl() -> None:
    ours, theirs = config(), config_on_cpu(tempfile.gettempdir(), loss_type="grpo")
    names = {entry.name for entry in dataclasses.fields(GRPOConfig)}
    changed = {name for name in names if getattr(ours, name) != getattr(theirs, name)} - {"logging_dir", "run_name"}
    assert changed == {"disable_dropout", "max_tool_calling_iterations", "vllm_importance_sampling_mode"}


# ---------------------------------------------------------------------------------------------------------------------
# The command line, files and copies.


def test_every_field_has_a_help_that_renders() -> None:
    """argparse reads % in a help as a format."""
    parser = HfArgumentParser(CTPOConfig)
    text = re.sub(r"\s+", "", parser.format_help())
    own = [entry for entry in dataclasses.fields(CTPOConfig) if entry.name in CTPOConfig.__annotations__]
    assert len(own) > 20
    for entry in own:
        assert f"--{entry.name}" in text
        assert re.sub(r"\s+", "", entry.metadata["help"] % {}) in text


def test_help_does_not_fail(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        HfArgumentParser(CTPOConfig).parse_args(["--help"])
    assert left.value.code == 0
    assert "--clip_sigma" in capsys.readouterr().out


def test_every_own_field_is_documented() -> None:
    assert CTPOConfig.__doc__ is not None
    hidden = {*DERIVED, "disable_dropout", "max_tool_calling_iterations", "vllm_importance_sampling_mode"}
    for name in CTPOConfig.__annotations__:
        assert name in hidden or f"        {name}: " in CTPOConfig.__doc__, name


def test_from_a_file_and_a_line(tmp_path: Any) -> None:
    """Types that a YAML file and a command line give."""
    path = tmp_path / "recipe.yaml"
    settings = {"output_dir": str(tmp_path), "estimator": "ctpo", "clip_high": 0.08, "clip_dual": 0, "max_log_ratio": 5}
    settings |= {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "leave_one_out": True}
    path.write_text(yaml.safe_dump(settings | {"scale_rewards": "none", "report_to": "none"}))
    (args,) = TrlParser((CTPOConfig,)).parse_args_and_config(
        ["--config", str(path), "--clip_high", "0.1", "--aggregation", "token-mean", "--noise_floor_sequences", "0"]
    )
    assert args.built_estimator.clip == PositionClip(0.025, 0.1, dual=None)
    assert args.built_estimator.max_log_ratio == 5
    assert (args.loss_type, args.leave_one_out, args.noise_floor_sequences) == ("dapo", True, 0)


@pytest.mark.parametrize("estimator", ["ctpo", "gspo", "vespo", "dppo_tv"])
def test_pickle_and_json(estimator: str) -> None:
    args = config(estimator=estimator, **OFF_POLICY)
    copy = pickle.loads(pickle.dumps(args))
    assert isinstance(copy, CTPOConfig)
    assert (copy.built_estimator, copy.route) == (args.built_estimator, args.route)
    written = json.loads(json.dumps(args.to_dict()))
    assert written["estimator"] == estimator
    assert "built_estimator" not in written
    assert json.loads(args.to_json_string())["loss_type"] == args.loss_type
    names = {entry.name for entry in dataclasses.fields(CTPOConfig) if entry.init}
    kept = {name: value for name, value in written.items() if name in names and name != "generation_batch_size"}
    assert CTPOConfig(**kept).built_estimator == args.built_estimator
