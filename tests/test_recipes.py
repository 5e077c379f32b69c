"""The recipes: each parses, says the paper's numbers, is shown as a plan, and builds a trainer without its weights."""

from __future__ import annotations

import re
from contextlib import ExitStack
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from tiny_models import save_tiny_chat_model

from ctpo.train import run as run_module
from ctpo.train._options import find_accelerate_config, parse, recipe_names
from ctpo.train._plan import plan_text, processes_of
from ctpo.train.config import CTPOConfig

GUIDE = (Path(__file__).parents[1] / "docs" / "trainer.md").read_text(encoding="utf-8")
RECIPES = ("toy", "smollm2", "qwen3-4b", "qwen3-14b")
PAPERS = ("qwen3-4b", "qwen3-14b")
FOLDER = resources.files("ctpo.train").joinpath("recipes")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("model"))


def settings(name):
    return parse(["--config", name]).given


def test_these_are_the_recipes():
    assert recipe_names() == list(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_plain_yaml_and_says_where_it_writes(name):
    # The same by YAML 1.1, which other readers use.
    found = yaml.safe_load(FOLDER.joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    assert list(found) == list(settings(name))
    assert found["output_dir"] == f"runs/{name}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_shown_as_a_plan_without_network_weights_or_gpu(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if name == "smollm2":
        pytest.importorskip("reasoning_gym")
    text = plan_text(parse(["--config", name, "--dry-run"]))
    for title in ("Estimator", "Data", "Model", "Memory of", "Rollouts and updates"):
        assert re.search(f"^{title}", text, re.MULTILINE), title
    assert "sizes unknown" not in text
    assert list(tmp_path.iterdir()) == []
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert ("untokenized" in text) == (name != "toy")


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_numbers(name):
    options = parse(["--config", name])
    trainer = options.plan(world_size=processes_of(options.run_config())).trainer
    run = options.run_config()
    assert processes_of(run) == 8
    assert trainer.generation_batch_size == 512 * 8
    assert trainer.generation_batch_size // trainer.num_generations == 512
    batch = trainer.per_device_train_batch_size * 8 * trainer.gradient_accumulation_steps
    assert batch == 32 * 8
    assert trainer.updates_per_rollout == 16
    assert trainer.max_steps == 305 * 16
    assert (trainer.learning_rate, trainer.beta, trainer.entropy_coef) == (1e-6, 0.0, 0.0)
    assert (trainer.max_completion_length, trainer.max_tool_calling_iterations) == (8000, 5)
    assert (run.eval_samples, run.eval_temperature) == (32, 0.7)
    clip = trainer.built_estimator.clip
    assert (clip.low, clip.high, clip.power, clip.dual) == (0.025, 0.05, 0.5, 0.05)
    assert trainer.built_aggregation == "seq-mean-token-mean"
    assert trainer.vllm_importance_sampling_clip_max == 5.0
    assert trainer.max_completion_length + run.max_prompt_tokens <= trainer.vllm_max_model_length


@pytest.mark.parametrize("name", PAPERS)
def test_every_setting_says_whose_it_is(name):
    lines = FOLDER.joinpath(f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    unmarked = (
        "output_dir",
        "eval_backend",
        "python_sandbox",
        "seed",
        "save_total_limit",
        "logging_steps",
        "report_to",
    )
    for line in lines:
        option = re.match(r"(\w+): ", line)
        if option and option[1] not in unmarked and not line.startswith("vllm_max_model_length"):
            assert "# " in line, line
            assert re.search("paper|ours|two of|8 GPUs", line), line


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_a_trainer(name, model, tmp_path):
    words = ["--config", name, "--model_name_or_path", str(model), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    words += ["--data", "arithmetic?difficulty=3&size=1024", "--use_vllm", "false", "--report_to", "none"]
    words += ["--eval_data", "arithmetic?split=test&size=8", "--python_sandbox", "monty", "--max_prompt_tokens", "2000"]
    plan = parse(words).plan()
    with ExitStack() as stack, run_module._calm():
        sandbox = run_module._sandbox(plan, stack)
        prepared = run_module._prepared(plan, str(model), run_module._data(plan))
        trainer = run_module._trainer(plan, str(model), *prepared, lambda **_: [0.0], sandbox)
    assert isinstance(trainer.args, CTPOConfig)
    assert trainer.model.dtype == torch.float32
    assert len(trainer.train_dataset) == 1024
    assert trainer._tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("name", ["single_gpu", "multi_gpu", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_its_configurations(name):
    config = load_config_from_file(str(find_accelerate_config(name)))
    assert str(config.mixed_precision) == "bf16"
    if name == "fsdp2":
        assert int(config.fsdp_config["fsdp_version"]) == 2
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


# ------------------------------------------------------------------------------------------------------------ the guide


def shown(value):
    """A value as the table of the guide has it."""
    if value is None:
        return ""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = {"True": "true", "False": "false", "": '""'}.get(text, text)
    if isinstance(value, float):
        text = f"{value:g}"
    text = text.replace("|", "\\|")
    return f"`{text}`" if len(text) <= 16 else "see there"


def test_every_option_of_the_recipes_is_in_the_guides_table():
    cell = r" \| ((?:[^|\\]|\\.)*?)"
    rows = re.findall(rf"^\| `(\w+)` \| (.+?){3 * cell} \|$", GUIDE, re.MULTILINE)
    table = {name: (meaning, *map(str.strip, cells)) for name, meaning, *cells in rows}
    given = {name: settings(name) for name in RECIPES}
    assert given["qwen3-4b"].keys() == given["qwen3-14b"].keys()
    options = dict.fromkeys(option for name in RECIPES for option in given[name])
    assert list(table) == list(options), "the options of the recipes, in their order"
    for option, (meaning, *cells) in table.items():
        assert len(meaning) >= 8
        assert cells == [shown(given[name].get(option)) for name in RECIPES[:3]], option


def test_every_option_that_the_guide_names_exists(capsys):
    from ctpo.train._options import all_options_text

    every = set(re.findall(r"--(\w+) \(default", all_options_text(100)))
    commands = re.findall(r"ctpo train (.*?)(?:$|\n\n)", GUIDE.replace("\\\n", " "), re.MULTILINE)
    named = {option for command in commands for option in re.findall(r"--([a-z]\w+)", command.partition(" #")[0])}
    assert len(named) > 15
    assert named - every - {"config", "dry", "help"} == set()
