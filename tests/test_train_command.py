"""`ctpo train`: its options and what it says of wrong ones, the plan, a run and what may happen to it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from huggingface_hub import ModelCard
from tiny_models import save_tiny_chat_model, tiny_chat_model
from trl import GRPOConfig, ModelConfig

from ctpo.cli import main
from ctpo.train import run as run_module
from ctpo.train._checkpoints import last_checkpoint
from ctpo.train._memory import estimate, sizes_of, splitting
from ctpo.train._options import RunConfig, accelerate_settings, parse
from ctpo.train._plan import optimizer_steps, plan_text
from ctpo.train._progress import Progress
from ctpo.train._report import summarize, summary_text
from ctpo.train.config import CTPOConfig
from ctpo.train.data import load_problems

# A run of a second or two.
TINY = """\
data: arithmetic?difficulty=1&size=8
rewards: train_rewards:characters
num_generations: 2
per_device_train_batch_size: 4
steps_per_generation: 2
max_completion_length: 4
max_steps: 4
save_steps: 2
learning_rate: 1e-3
lr_scheduler_type: constant
logging_steps: 1
report_to: none
use_cpu: true
bf16: false
activation_checkpointing: false
"""


# Packages of some options, not here for the tests.
OPTIONAL = ("vllm", "bitsandbytes", "liger_kernel", "deepspeed", "reasoning_gym")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(tmp_path, model):
    path = tmp_path / "tiny.yaml"
    path.write_text(f"{TINY}model_name_or_path: {model}\noutput_dir: {tmp_path / 'out'}\n")
    return path


def environment():
    """Of a process that has the rewards of the tests."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}


def error_of(capsys, *words):
    """The one line on standard error."""
    assert main(["train", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("ctpo train: ")
    return lines[0].removeprefix("ctpo train: ")


# ----------------------------------------------------------------------------------------------------------------- help


def test_help_needs_nothing_heavy_and_names_every_recipe():
    code = (
        "import sys\nfrom ctpo.cli import main\nmain(['train', '--help'])\n"
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    lines = found.stdout.splitlines()
    assert lines[-1] == "[]"
    assert max(map(len, lines)) <= 80
    for name in ("toy", "smollm2", "qwen3-4b", "qwen3-14b", "--dry-run", "--help-all"):
        assert name in found.stdout


def test_help_all_has_every_option(capsys):
    assert main(["train", "--help-all"]) == 0
    printed = capsys.readouterr().out
    for kind in (RunConfig, CTPOConfig, GRPOConfig, ModelConfig):
        for own in dataclasses.fields(kind):
            assert f"--{own.name} (default: " in printed


def test_no_words_at_all(capsys):
    assert error_of(capsys).startswith("nothing to train: --config toy, smollm2")


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--learning-rat 1", "unknown option --learning-rat: did you mean --learning_rate?"),
        ("--learning 1", "unknown option --learning: did you mean --learning_rate?"),
        ("--lr 1", "did you mean --learning_rate?"),
        ("--max_prompt_length 9", "did you mean --max_prompt_tokens?"),
        ("--epsilon_lo 0.2", "unknown option --epsilon_lo: did you mean --epsilon?"),
        ("--zzz=1", "unknown option --zzz: ctpo train --help-all lists all"),
        ("stray", "'stray' belongs to no option"),
        ("--max_steps 1 2", "'2' belongs to no option"),
        ("--max_steps 1.5", "--max_steps must be a whole number, got '1.5'"),
        ("--learning_rate fast", "--learning_rate must be a number, got 'fast'"),
        ("--bf16 maybe", "--bf16 must be true or false, got 'maybe'"),
        ("--dtype int8", "--dtype must be one of auto, bfloat16, float16, float32, got 'int8'"),
        ("--max_steps", "--max_steps needs a value"),
        ("--estimator ctpp", "(did you mean 'ctpo'?)"),
        ("--clip_low -1", "low must be a positive finite number"),
        ("--num_generations 3", "divisible by num_generations (3): a rollout batch has per_device_train_batch_size x"),
        ("--deepspeed x.json", "deepspeed needs the package deepspeed, which is not here: pip install deepspeed"),
        (
            "--data reasoning-gym:gcd?size=8",
            "needs the package reasoning-gym, which is not here: pip install reasoning",
        ),
        ("--eval_data arithmetic?size=1&seed=9 --rewards train_rewards:nope", "'train_rewards' has no 'nope'"),
        ("--epsilon 0.1", "epsilon must not be set"),
        ("--rewards mat", "did you mean 'math'?"),
        ("--columns prompt", "columns must be FIELD=COLUMN"),
        ("--eval_temperature 0", "eval_samples must be 1 at eval_temperature 0"),
        ("--num_machines 2", "num_machines=2 needs main_process_ip"),
        ("--accelerate_config fsdp", "did you mean fsdp2?"),
        ("--config", "--config needs a recipe"),
        ("--config toy", "--config is there 2 times"),
        ("--data nowhere.parquet", "nowhere.parquet: is not there"),
        ("--data arithmetic?size=2", "a rollout batch needs 4 prompts"),
        ("--model_name_or_path ./nowhere", "model './nowhere': no such file or directory"),
        ("--model_name_or_path toy?steps=3", "toy?steps=3"),
        ("--eos_token <|nope|>", "eos_token: '<|nope|>' is no token"),
        ("--eval_strategy steps", "eval_strategy must not be steps: the problems of eval_data are answered before and"),
        ("--eval_on_start true", "eval_on_start must not be true: the problems of eval_data"),
        ("--load_best_model_at_end", "load_best_model_at_end must not be true: no checkpoint is evaluated"),
        ("--save_strategy best", "save_strategy must not be best: no checkpoint is evaluated"),
        ("--reward_weights 0.5 0.5", "reward_weights must not be 0.5 0.5: weights go into rewards, as in --rewards"),
        ("--remove_unused_columns true", "remove_unused_columns must not be true: rewards read"),
        ("--data_seed 3", "data_seed must not be 3: it has no effect, seed decides"),
        ("--label_smoothing_factor 0.1", "label_smoothing_factor must not be 0.1: it has no effect"),
        (
            "--data arithmetic?size=8 --eval_data arithmetic?size=9",
            "all of its problems, 8, are among those of eval_data",
        ),
        ("--use_vllm", "use_vllm needs the package vllm, which is not here: pip install vllm"),
        ("--load_in_4bit", "load_in_4bit needs the package bitsandbytes, which is not here: pip install bitsandbytes"),
        ("--accelerate_config zero2 --num_processes 1", "accelerate_config zero2 needs the package deepspeed"),
        ("--report_to wandb", "report_to wandb needs the package wandb, which is not here: pip install wandb"),
        ("--use_liger_kernel true", "needs the package liger-kernel, which is not here: pip install liger-kernel"),
    ],
)
def test_what_is_wrong_on_the_line(capsys, recipe, words, text, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in OPTIONAL else found(name, *more)
    )
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", list)
    assert text in error_of(capsys, "--config", recipe, *words.split())


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("learning-rat: 1\n", "unknown option learning-rat: did you mean learning_rate?"),
        ("dataset_name: x\n", "did you mean data?"),
        ("max_steps: 1.5\n", "max_steps must be a whole number, got 1.5"),
        ("max_steps: true\n", "max_steps must be a whole number, got True"),
        ("max_steps: null\n", "max_steps must not be null"),
        ("max_steps: [1]\n", "max_steps must be a whole number, got a list"),
        ("max_steps: {a: 1}\n", "max_steps must be a whole number, got a mapping"),
        ("learning_rate: fast\n", "learning_rate must be a number, got 'fast'"),
        ("bf16: maybe\n", "bf16 must be true or false, got 'maybe'"),
        ("dtype: int8\n", "dtype must be one of auto"),
        ("data: []\n", "data must not be an empty list"),
        ("max_steps: 1\nmax_steps: 2\n", "line 2, column 1: 'max_steps' is there twice"),
        ("max_steps: 1\nmax-steps: 2\n", "max-steps is there twice, with dashes and with underscores"),
        ("data:\n\t- a\n", "line 2, column 1: a tab; YAML is indented with spaces"),
        ("data: [a\n", "line 2, column 1"),
        ("- a\n- b\n", "must be a mapping, lines of 'name: value', got a list"),
        ("toy\n", "must be a mapping, lines of 'name: value', got a str"),
        ("", "is empty"),
        ("1: 2\n", "names of options are text, got 1"),
        ("env: [a]\n", "env must be a mapping of names to texts"),
        ("config: toy\n", "unknown option config"),
        ("max_steps: 1\n", "model_name_or_path is missing"),
        ("model_name_or_path: toy\n", "data is missing"),
    ],
)
def test_what_is_wrong_in_a_file(capsys, tmp_path, content, text):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    error = error_of(capsys, "--config", path, "--dry-run")
    assert text in error
    if "missing" not in text:
        assert str(path) in error


def test_files_that_cannot_be_read(capsys, tmp_path):
    assert "did you mean qwen3-4b? recipes: toy, smollm2" in error_of(capsys, "--config", "qwen3-4B")
    assert "is a directory" in error_of(capsys, "--config", tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "is no text in UTF-8" in error_of(capsys, "--config", binary)


def test_the_line_goes_before_the_file_and_both_before_defaults(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "env: {CTPO_TEST_VARIABLE: 3}\nmax-steps: 7\nlearning_rate: 1e-5\ndata: one\nrun_name: 5\neval_strategy: no\n"
        'report_to: [tensorboard, wandb]\nlr_scheduler_kwargs: {a: 1}\ninstruction: "no"\nbeta: 1\nuse_cpu: yes\n'
        "bf16: false\nclip_dual: null\n"
    )
    monkeypatch.setenv("CTPO_TEST_VARIABLE", "0")
    options = parse(["--config", str(path), "--max_steps=9", "--data", "two", "three", "--use-peft"])
    assert os.environ["CTPO_TEST_VARIABLE"] == "3"
    assert not options.dry_run
    given = options.given
    assert (given["max_steps"], given["learning_rate"], given["data"]) == (9, 1e-5, ["two", "three"])
    assert (given["run_name"], given["eval_strategy"], given["instruction"]) == ("5", "no", "no")
    assert given["report_to"] == ["tensorboard", "wandb"]
    assert given["lr_scheduler_kwargs"] == {"a": 1}
    assert (given["beta"], given["use_cpu"], given["use_peft"], given["clip_dual"]) == (1.0, True, True, None)
    assert isinstance(given["beta"], float)
    assert options.origins["max_steps"] == options.origins["use_peft"] == "line"
    assert options.origins["learning_rate"] == "recipe"


def test_options_that_mean_nothing_may_say_so(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "eval_strategy: no\neval_on_start: false\nremove_unused_columns: false\nlabel_smoothing_factor: 0\n"
        "data_seed: null\nsave_strategy: steps\n"
    )
    assert parse(["--config", str(path)]).given["label_smoothing_factor"] == 0


@pytest.mark.parametrize("word", ["--dry-run", "--dry_run"])
def test_a_plan_runs_nothing_of_a_recipe_and_sets_what_it_needs_only(recipe, tmp_path, monkeypatch, word):
    (tmp_path / "recipes_code.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("CTPO_TEST_VARIABLE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "0")
    extra = "env: {CTPO_TEST_VARIABLE: 3, CUDA_VISIBLE_DEVICES: 1}\n"
    recipe.write_text(recipe.read_text().replace("train_rewards:characters", "recipes_code:function") + extra)
    text, status = run_module.train(["--config", str(recipe), word])
    assert status == 0
    assert "recipes_code:function" in text
    assert (os.environ["CTPO_TEST_VARIABLE"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("0", "1")


# ------------------------------------------------------------------------------------------------------------- the plan


def test_plan_of_the_toy_shows_prompt_sizes_and_off_policyness(capsys):
    assert main(["train", "--config", "toy", "--dry-run", "--learning_rate", "3e-4"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "+ learning_rate                 0.0003",
        "* max_steps                     80",
        "arithmetic?difficulty=2&split=train&size=4096&seed=0, 4096",
        "The first prompt, 18 tokens",
        "| <|im_start|>assistant",
        "0.36 million, trained: all",
        "128 answers, 8 to each of 16 prompts",
        "4 updates with each rollout batch; the last one is 3 updates old",
        "80 updates with 20 rollout batches",
    ):
        assert " ".join(text.split()) in " ".join(printed.split())
    # exp(0.05 sqrt(t)) and exp(-0.025 sqrt(t)) at 1, 100, 1000 and 8000.
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    assert rows == [
        ("1", "1.051", "0.975", "1.051"),
        ("100", "1.649", "0.779", "1.649"),
        ("1000", "4.860", "0.454", "4.860"),
        ("8000", "87.544", "0.107", "87.544"),
    ]
    assert not Path("runs").exists()


def test_plan_fits_a_terminal_and_writes_nothing(recipe, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    text = plan_text(parse(["--config", str(recipe), "--dry-run"]), width=80)
    assert sorted(tmp_path.rglob("*")) == before
    long = [line for line in text.splitlines() if len(line) > 80 and str(tmp_path) not in line and "pytest" not in line]
    assert long == []


def test_plan_warns_of_what_makes_a_run_pointless(recipe):
    def cautions(*words):
        return plan_text(parse(["--config", str(recipe), *words])).partition("\nWarnings\n")[2]

    assert cautions() == ""
    assert "Every importance ratio is 1" in cautions("--steps_per_generation", "1")
    assert "trains on every sample more than once" in " ".join(cautions("--num_iterations", "2").split())
    assert "nothing would be trained" in cautions("--limit", "3")
    assert "use_vllm needs the package vllm, which is not here: pip install vllm" in cautions("--use_vllm")
    assert "the model's context is 4096" in cautions("--max_completion_length", "4096")
    assert "this machine has" in cautions("--use_cpu", "false", "--num_processes", "64", "--steps_per_generation", "1")


def test_plan_warns_of_packages_that_are_missing(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in OPTIONAL else found(name, *more)
    )
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", list)
    words = ["--config", "smollm2", "--dry-run", "--deepspeed", "x.json"]
    text = " ".join(run_module.train(words)[0].partition("\nWarnings\n")[2].split())
    for option, package in (
        ("report_to tensorboard", "tensorboard"),
        ("deepspeed", "deepspeed"),
        ("data reasoning-gym:gcd", "reasoning-gym"),
    ):
        assert f"! {option} needs the package {package}, which is not here: pip install {package}" in text


def test_problems_of_the_evaluation_are_not_trained_on(recipe, capsys):
    # The first 3 of each seed's problems; the second source has the first 5 of the same.
    words = ["--config", str(recipe), "--data", "arithmetic?size=8&seed=0", "arithmetic?size=8&seed=5"]
    words += ["--eval_data", "arithmetic?size=8&seed=0", "--eval_limit", "3"]
    text = plan_text(parse(words))
    assert "left out: 3 of the problems to train on, which eval_data has, too" in " ".join(text.split())
    plan = parse(words).plan()
    with run_module._calm():
        kept = run_module._data(plan, say=True)
    assert capsys.readouterr().err == "! left out 3 of 16 problems of data, which are among those of eval_data\n"
    everything = load_problems("arithmetic?size=8&seed=0") + load_problems("arithmetic?size=8&seed=5")
    held_out = [problem.prompt for problem in load_problems("arithmetic?size=8&seed=0", limit=3)]
    assert [problem.prompt for problem in kept] == [one.prompt for one in everything if one.prompt not in held_out]
    assert len(kept) == 13
    with run_module._calm():
        assert (
            len(run_module._data(parse([*words, "--eval_data", "arithmetic?split=test&size=8"]).plan(), say=True)) == 16
        )
    assert capsys.readouterr().err == ""


def test_plan_counts_steps_of_epochs(recipe):
    options = parse(["--config", str(recipe), "--max_steps", "-1", "--num_train_epochs", "3", "--num_iterations", "2"])
    trainer = options.plan(world_size=1).trainer
    # 8 problems, 4 prompts a rollout batch of 8 answers: 2 batches an epoch, each 2 micro-batches, twice.
    assert optimizer_steps(trainer, 8) == 3 * 2 * 2 * 2
    assert optimizer_steps(trainer, None) is None


def test_plan_of_a_model_that_is_not_here(recipe):
    text = plan_text(parse(["--config", str(recipe), "--model_name_or_path", "no-such/model"]))
    assert "untokenized" in text
    assert "sizes unknown" in " ".join(text.split())
    assert "[user] What is" in text


def test_plan_for_eight_gpus_needs_none(recipe):
    words = ["--num_processes", "8", "--accelerate_config", "fsdp2", "--use_cpu", "false", "--bf16", "true"]
    trainer = parse(["--config", str(recipe), *words]).plan(world_size=8).trainer
    assert (trainer.generation_batch_size, trainer.use_cpu, trainer.bf16) == (64, False, True)


# --------------------------------------------------------------------------------------------------------------- memory


def test_parameters_are_counted_without_weights(model):
    real, _ = tiny_chat_model()
    sizes = sizes_of(str(model))
    assert sizes.total == sizes.trainable == sum(one.numel() for one in real.parameters())
    assert sizes.context == 4096
    # Published: 134,515,008 and 14.8 billion; 4.02 billion.
    assert sizes_of("HuggingFaceTB/SmolLM2-135M-Instruct").total == 134_515_008
    assert round(sizes_of("Qwen/Qwen3-4B-Base").total / 1e9, 2) == 4.02
    assert round(sizes_of("Qwen/Qwen3-14B-Base").total / 1e9, 2) == 14.77
    assert sizes_of("no-such/model") is None


def test_adapters_are_counted(model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # peft asks transformers 5.23 by the former name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped = get_peft_model(tiny_chat_model()[0], config)
    expected = sum(one.numel() for one in wrapped.parameters() if one.requires_grad)
    sizes = sizes_of(str(model), config)
    assert sizes.trainable == expected
    assert sizes.head == 0


def memory_of(recipe, *words, processes=1):
    plan = parse(["--config", str(recipe), *words]).plan(world_size=processes)
    sizes = sizes_of(str(plan.model.model_name_or_path))
    split = splitting(accelerate_settings(plan.run.accelerate_config))
    found = estimate(sizes, plan.trainer, plan.model, processes=processes, split=split, max_prompt=100)
    return sizes, {name: number for name, (number, _) in {**found.training, **found.sampling}.items()}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), (4, 4, 8)),  # float32 and Adam
        (("--optim", "sgd"), (4, 4, 0)),
        (("--dtype", "bfloat16", "--bf16", "true"), (2, 2, 4)),
        (("--accelerate_config", "multi_gpu"), (4, 4, 8)),
        (("--accelerate_config", "fsdp2"), (4 / 8, 4 / 8, 8 / 8)),
        # DeepSpeed in bfloat16: 16-bit weights and gradients, float32 weights beside Adam's two states.
        (("--accelerate_config", "zero2", "--bf16", "true"), (2, 2 / 8, 12 / 8)),
        (("--accelerate_config", "zero3", "--bf16", "true"), (2 / 8, 2 / 8, 12 / 8)),
    ],
)
def test_bytes_of_a_parameter(recipe, words, expected):
    sizes, found = memory_of(recipe, *words, processes=8)
    each = [found[name] / sizes.total for name in ("weights", "gradients", "optimizer")]
    assert each == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model):
    """A run with evaluations, its directory and its recipe."""
    folder = tmp_path_factory.mktemp("run")
    path = folder / "tiny.yaml"
    path.write_text(
        f"{TINY}model_name_or_path: {model}\noutput_dir: {folder / 'out'}\neval_data: arithmetic?split=test&size=3\n"
        "eval_samples: 2\nlog_ratio_traces: 2\n"
    )
    text, status = run_module.train(["--config", str(path)])
    assert status == 0
    return path, folder / "out", text


def test_a_run_leaves_model_evaluations_summary_and_card(finished):
    _, output, text = finished
    found = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    assert found == {"checkpoint-2", "checkpoint-4", "evaluation", "model", "run.json", "summary.json", "traces"}
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["steps"], summary["rollout_batches"]) == (4, 2)
    assert summary["evaluation"]["before"]["problems"] == 3
    assert {"before", "after", "difference"} == set(summary["evaluation"])
    for when in ("before", "after"):
        results = json.loads((output / "evaluation" / when / "results.json").read_text())
        assert results["settings"]["samples"] == 2
        assert results["settings"]["seed"] == 0
        mean = results["overall"]["metrics"]["avg@2"]["mean"]
        assert summary["evaluation"][when]["mean"] == mean
    assert text == summary_text(summary)
    assert max(map(len, text.replace(str(output), "out").splitlines())) <= 80
    card = ModelCard.load(output / "model" / "README.md")
    assert card.data.library_name == "transformers"
    for part in (
        "## Estimator",
        "PositionClip(low=0.025",
        "## Results",
        "| after |",
        "## Not verified",
        "max_steps: 4",
        "logging_steps: 1\n",
        "ctpo train --config tiny.yaml",
        "is above 1.0513 / 1.6487 / 4.8",
        "thread",
    ):
        assert part in card.text
    [use] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    found = subprocess.run(
        [sys.executable, "-c", use], cwd=output.parent, capture_output=True, text=True, env=environment()
    )
    assert found.returncode == 0, found.stderr
    assert str(output) not in str(card)
    reloaded = torch.load(output / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert reloaded.max_steps == 4


def test_a_finished_run_says_so_and_prints_its_summary(finished, capsys):
    path, output, text = finished
    assert main(["train", "--config", str(path), "--logging_steps", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.out == text + "\n"
    assert captured.err == f"{output} is finished; another output_dir begins anew\n"


def test_other_settings_in_the_same_directory_are_refused(finished, capsys):
    path, output, _ = finished
    before = {entry: entry.stat().st_mtime_ns for entry in output.rglob("*") if entry.name != ".lock"}
    error = error_of(capsys, "--config", path, "--learning_rate", "1", "--eval_samples", "3", "--save_steps", "1")
    assert "learning_rate 0.001 there, 1.0 now" in error
    assert "eval_samples 2 there, 3 now" in error
    assert "save_steps" not in error
    assert "arithmetic?size=9" in error_of(capsys, "--config", path, "--data", "arithmetic?size=9")
    assert "max_steps 4 there, 6 now" in error_of(
        capsys, "--config", path, "--max_steps", "6", "--lr_scheduler_type", "linear"
    )
    assert before == {entry: entry.stat().st_mtime_ns for entry in output.rglob("*") if entry.name != ".lock"}


def test_settings_may_change_until_there_is_something(recipe, tmp_path, capsys):
    assert "no such file" in error_of(capsys, "--config", recipe, "--model_name_or_path", "./nowhere")
    assert not (tmp_path / "out").exists()
    assert "leaves no problem" in error_of(capsys, "--config", recipe, "--max_prompt_tokens", "1")
    assert (tmp_path / "out" / "run.json").exists()
    assert main(["train", "--config", str(recipe), "--max_steps", "2", "--save_strategy", "no"]) == 0
    assert "updates       2 with 1 rollout batch" in capsys.readouterr().out


def test_more_steps_go_on_where_the_schedule_allows_it(finished, tmp_path, capsys):
    path, output, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    words = ["train", "--config", str(path), "--output_dir", str(copy), "--max_steps", "6"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert f"going on from {copy}/checkpoint-4" in captured.err
    assert "evaluating the model before" not in captured.err
    assert "evaluating the model after" in captured.err
    assert json.loads((copy / "summary.json").read_text())["steps"] == 6


def test_a_directory_with_something_else_is_refused(recipe, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert "holds thesis.tex, which no run of ctpo wrote" in error_of(capsys, "--config", recipe)
    (tmp_path / "file").touch()
    assert "cannot write to output_dir" in error_of(capsys, "--config", recipe, "--output_dir", tmp_path / "file" / "x")


def test_an_adapter_is_trained_and_saved(recipe, tmp_path, capsys):
    words = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--max_steps", "2", "--save_strategy", "no"]
    assert main(["train", "--config", str(recipe), *words]) == 0
    assert (tmp_path / "out" / "model" / "adapter_model.safetensors").exists()
    capsys.readouterr()
    again = ["--model_name_or_path", tmp_path / "out" / "model", "--output_dir", tmp_path / "second"]
    assert "is a LoRA adapter; merge it" in error_of(capsys, "--config", recipe, *again)


def test_ctrl_c_saves_and_the_same_command_goes_on(recipe, tmp_path):
    command = [sys.executable, "-m", "ctpo", "train", "--config", str(recipe), "--max_steps", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    lines = []
    with process.stderr:
        for line in process.stderr:
            lines.append(line)
            if line.startswith("step "):
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.wait(timeout=60) == 130, "".join(lines) + rest
    assert rest.count("goes on from there") == 1
    assert rest.splitlines()[-1] == "the same command goes on from there"
    assert "Traceback" not in rest
    [saved] = re.findall(r"saved in (\S+)$", rest, re.MULTILINE)
    text, status = run_module.train(
        ["--config", str(recipe), "--max_steps", str(int(saved.rpartition("-")[2]) + 2), "--save_strategy", "no"]
    )
    assert status == 0
    assert f"{int(saved.rpartition('-')[2]) + 2} with" in text


def test_two_processes_are_launched_and_speak_with_one_voice(recipe, tmp_path):
    words = ["--num_processes", "2", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    words += ["--eval_data", "arithmetic?split=test&size=2", "--eval_samples", "1", "--save_strategy", "no"]
    words += ["--eval_before", "false"]
    command = [sys.executable, "-m", "ctpo", "train", "--config", str(recipe), *words]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("updates       2 with 1 rollout batch") == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["world_size"] == 2
    assert set(json.loads((tmp_path / "out" / "summary.json").read_text())["evaluation"]) == {"after"}


@pytest.mark.parametrize("end", ["SIGHUP", "SIGKILL"])
def test_launched_processes_save_and_end_when_the_terminal_or_the_command_is_gone(recipe, tmp_path, end):
    words = ["--num_processes", "2", "--max_steps", "100000", "--per_device_train_batch_size", "2"]
    words += ["--save_steps", "1000000"]
    command = [sys.executable, "-m", "ctpo", "train", "--config", str(recipe), *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())
    with process.stderr:
        for line in process.stderr:
            if line.startswith("step "):
                break
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= 3  # a launcher and its processes
        process.send_signal(signal.Signals[end])  # and nobody reads what they say any more
    _, alive = psutil.wait_procs(below, timeout=60)
    for one in alive:
        one.kill()
    assert not alive
    assert process.wait(timeout=60) == (128 + signal.SIGTERM if end == "SIGHUP" else -signal.SIGKILL)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] != []


def test_a_killed_process_is_named(recipe, tmp_path):
    words = ["--num_processes", "2", "--max_steps", "100000", "--per_device_train_batch_size", "2"]
    command = [sys.executable, "-m", "ctpo", "train", "--config", str(recipe), *words, "--save_strategy", "no"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())
    with process.stderr:
        for line in process.stderr:
            if line.startswith("step "):
                break
        [launcher] = psutil.Process(process.pid).children()
        one = run_module._training_processes(launcher.pid)[1]
        os.kill(one, signal.SIGKILL)
        rest = process.stderr.read()
    assert process.wait(timeout=60) == 1
    lines = [line for line in rest.splitlines() if not line.startswith("step ")]
    assert "Traceback" not in rest
    assert re.match(r"ctpo train: process \d was killed by SIGKILL; .* the same command goes on", lines[-1])


def test_ctrl_c_in_the_warm_up_says_so(tmp_path):
    command = [sys.executable, "-m", "ctpo", "train", "--config", "toy", "--output_dir", str(tmp_path / "out")]
    command += ["--eval_data", "arithmetic?size=8&seed=9"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    with process.stderr:
        for line in process.stderr:
            if line.startswith("warm-up: "):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert rest == "\nstopped by SIGINT; the warm-up begins again with the same command\n"


def test_a_closed_terminal_saves(recipe, tmp_path):
    """Without a launcher; the terminal is a real one."""
    command = [sys.executable, "-m", "ctpo", "train", "--config", str(recipe), "--max_steps", "100000"]
    take_terminal = (
        f"import fcntl, os, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv({command[0]!r}, {command})"
    )
    terminal, end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", take_terminal],
        stdin=end,
        stdout=end,
        stderr=end,
        env=environment(),
        start_new_session=True,
    )
    os.close(end)
    read = b""
    while b"reward" not in read:
        read += os.read(terminal, 4096)
    os.close(terminal)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    [last, *_] = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    assert last_checkpoint(tmp_path / "out") == (last, [])


# ------------------------------------------------------------------------------------------------------ parts of a run


@pytest.mark.parametrize("launcher", ["accelerate", "torch"])
def test_launching_hands_all_words_on(recipe, monkeypatch, launcher):
    launched = []
    monkeypatch.setattr(run_module, "_watched", lambda command: launched.append(command) or 3)
    monkeypatch.setattr(run_module, "_check_packages", lambda plan: None)
    words = ["--config", str(recipe), "--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "10.0.0.1"]
    words += ["--main_process_port", "29500", "--num_processes", "4", "--run_name", "a b"]
    if launcher == "accelerate":
        words += ["--accelerate_config", "zero2"]
        expected = {"--num_processes=4", "--num_machines=2", "--machine_rank=1", "--main_process_ip=10.0.0.1"}
    else:
        expected = {"--nproc_per_node=2", "--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1"}
    assert run_module.train(words) == ("", 3)
    command = launched[0]
    assert command[2:4] == ["ctpo.train._launcher", launcher]
    assert command[-len(words) :] == words
    assert command[-len(words) - 3 : -len(words)] == ["--module", "ctpo", "train"]
    assert expected <= set(command)


def test_several_gpus_want_a_word(recipe, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert "8 GPUs are here" in error_of(capsys, "--config", recipe, "--use_cpu", "false")


def test_what_ends_the_first_of_several_processes_is_said_once(tmp_path, capsys):
    import torch.distributed as distributed

    with pytest.raises(ValueError, match="alone"), run_module._first_decides():
        raise ValueError("alone")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with run_module._first_decides():
            pass
        with pytest.raises(run_module._Finished), run_module._first_decides():
            raise run_module._Finished("the summary")
        with pytest.raises(run_module._Stopped), run_module._first_decides():
            raise ValueError("among others")
    finally:
        distributed.destroy_process_group()
    assert capsys.readouterr().err == "ctpo train: among others\n"


def test_what_a_gguf_file_holds_is_written_as_a_model_that_can_be_trained(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from ctpo.train import generation

    loaded, tokenizer = tiny_chat_model()
    loaded.config.quantization_config = {"quant_method": "gguf"}
    loaded.is_quantized = True
    monkeypatch.setattr(generation, "load_model", lambda *_, **__: (loaded, tokenizer))
    run_module._dequantize("small.gguf", tmp_path / "initial_model")
    assert [path.name for path in tmp_path.iterdir()] == ["initial_model"]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "initial_model")
    assert not getattr(written, "is_quantized", False)
    for mine, theirs in zip(written.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.0)


def test_errors_become_one_line(recipe, tmp_path):
    plan = parse(["--config", str(recipe)]).plan(world_size=1)
    clear = run_module._clear
    assert "make per_device_train_batch_size=4 smaller" in str(clear(torch.OutOfMemoryError("CUDA"), plan, tmp_path))
    full = clear(RuntimeError("I/O error:\n  No space left on device"), plan, tmp_path)
    assert isinstance(full, OSError)
    assert str(full) == "I/O error: No space left on device"
    pushing = parse(["--config", str(recipe), "--push_to_hub", "true"]).plan(world_size=1)
    connect_error = type("ConnectError", (Exception,), {"__module__": "httpx"})
    unreachable = clear(connect_error("no such name"), pushing, tmp_path)
    assert isinstance(unreachable, OSError)
    assert str(unreachable) == "push_to_hub: the Hub cannot be reached or refuses: no such name"
    missing = clear(ModuleNotFoundError("No module named 'vllm'", name="vllm"), plan, tmp_path)
    assert (type(missing), missing.name) == (ModuleNotFoundError, "vllm")
    other = TypeError("a mistake")
    assert clear(other, plan, tmp_path) is other


def test_summary_averages_the_ends_and_counts_tokens(tmp_path):
    history = [{"reward": float(i), "num_tokens": 10 * i} for i in range(20)] + [{"train_runtime": 19.0}]
    found = summarize(
        history=history,
        steps=20,
        rollout_batches=5,
        output_dir=tmp_path,
        evaluations={},
        comparison=None,
    )
    assert (found["reward_first"], found["reward_last"], found["reward_entries"]) == (0.5, 18.5, 2)
    assert (found["tokens"], found["tokens_per_second"], found["rollout_batches"]) == (190, 10.0, 5)
    assert "held-out" not in summary_text(found)
    few = summarize(
        history=history[:19], steps=19, rollout_batches=5, output_dir=tmp_path, evaluations={}, comparison=None
    )
    assert few["reward_first"] is None
    assert "reward " not in summary_text(few)


@pytest.mark.parametrize(
    ("floor", "text"),
    [
        (
            {"token": 0.0123, "share": 0.25, "lower_bound": 0.0},
            "0.012 nats a token, 0.25 of the log-ratios' mean square",
        ),
        ({"token": 0.5, "share": 1.7, "lower_bound": 0.0}, "0.5 nats a token, 1 of the log-ratios' mean square"),
        ({"token": 0.5, "lower_bound": 0.0}, "0.5 nats a token"),
        ({"token": 1e-6, "share": 0.25, "lower_bound": 1.0}, "at least 1e-06 nats a token (batch shape only)"),
        ({"token": 0.0, "share": 0.0, "lower_bound": 1.0}, "unknown: the batch's shape changes nothing"),
        ({}, None),
    ],
)
def test_summary_says_what_the_noise_floor_is_of(tmp_path, floor, text):
    history = [{f"noise_floor/{name}": value for name, value in floor.items()}]
    found = summarize(history=history, steps=1, rollout_batches=1, output_dir=tmp_path, evaluations={}, comparison=None)
    lines = [line for line in summary_text(found).splitlines() if "noise floor" in line]
    assert lines == ([] if text is None else [f"  noise floor   {text}"])


def test_progress_in_a_log_is_a_line_now_and_then(capsys, monkeypatch):
    progress = Progress(every=3600.0)
    state = SimpleNamespace(global_step=0, max_steps=3, is_world_process_zero=True)
    progress.on_train_begin(None, state, None)
    for step in (1, 2, 3):
        state.global_step = step
        progress.on_log(None, state, None, logs={"reward": step / 4, "completions/mean_length": 12.0})
    progress.on_train_end(None, state, None)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["step 1 of 3", "step 3 of 3"]
    assert "left" in lines[0]
    assert lines[1] == "step 3 of 3, reward 0.75, tokens 12"


def test_rewards_that_are_all_alike_are_warned_of_once(caplog):
    def warnings_of(*shares):
        caplog.clear()
        progress = Progress(every=3600.0)
        for step, share in enumerate(shares):
            state = SimpleNamespace(global_step=step, max_steps=99, is_world_process_zero=True)
            progress.on_log(None, state, None, logs={"frac_reward_zero_std": share} if share is not None else {})
        return [record.getMessage() for record in caplog.records]

    [text] = warnings_of(1.0, None, 1.0, 1.0, None, *[1.0] * 20)
    assert "nothing is learned" in text
    assert warnings_of(*[1.0] * 4) == []
    assert warnings_of(1.0, 1.0, 0.9, *[1.0] * 20) == []


def test_progress_on_a_terminal_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress()
    state = SimpleNamespace(global_step=0, max_steps=2, is_world_process_zero=True)
    progress.on_train_begin(None, state, None)
    for step in (1, 2):
        state.global_step = step
        progress.on_log(None, state, None, logs={"reward": 0.5})
    progress.on_train_end(None, state, None)
    written = capsys.readouterr().err
    assert written.count("\n") == 1
    assert written.count("\r") == 3
