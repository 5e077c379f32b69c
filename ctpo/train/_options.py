"""The options of `ctpo train`: recipes, YAML files and the command line become configurations, or one clear line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import os
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

__all__ = [
    "Options",
    "Plan",
    "RunConfig",
    "accelerate_settings",
    "all_options_text",
    "find_accelerate_config",
    "help_text",
    "is_toy",
    "parse",
    "recipe_names",
    "to_yaml",
]

Origin = Literal["recipe", "line"]

# Names that people bring from other versions and tools.
_OTHERS = {
    "batch_size": "per_device_train_batch_size",
    "dataset": "data",
    "dataset_name": "data",
    "eval_temp": "eval_temperature",
    "kl_coef": "beta",
    "lr": "learning_rate",
    "max_length": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "max_prompt_length": "max_prompt_tokens",
    "max_response_length": "max_completion_length",
    "max_tokens": "max_completion_length",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "model_path": "model_name_or_path",
    "num_epochs": "num_train_epochs",
    "output": "output_dir",
    "reward_funcs": "rewards",
    "rollout_n": "num_generations",
    "torch_dtype": "dtype",
    "train_data": "data",
}
# Options of TRL and transformers that mean nothing here: values that do no harm, and what to do instead.
_NOT_BETWEEN = "the problems of eval_data are answered before and after the training, not in between"
_NO_BEST = "no checkpoint is evaluated, so that none is the best; ctpo eval compares those that save_steps keeps"
_MEANINGLESS: dict[str, tuple[tuple[Any, ...], str]] = {
    "eval_strategy": (("no",), _NOT_BETWEEN),
    "eval_steps": ((), _NOT_BETWEEN),
    "eval_on_start": ((False,), f"{_NOT_BETWEEN}; eval_before is about before"),
    "do_eval": ((False,), _NOT_BETWEEN),
    "load_best_model_at_end": ((False,), _NO_BEST),
    "metric_for_best_model": ((), _NO_BEST),
    "save_strategy": (("no", "steps", "epoch"), _NO_BEST),
    "reward_weights": ((), "weights go into rewards, as in --rewards math:0.5,format:0.5"),
    "remove_unused_columns": ((False,), "rewards read the other columns of the data"),
    "data_seed": ((), "it has no effect, seed decides the order of the data"),
    "label_smoothing_factor": ((0.0,), "it has no effect, this loss has no labels"),
}
# Of a recipe's variables those that a plan needs: where files are, and which GPUs.
_FOR_PLANS = ("CUDA_VISIBLE_DEVICES", "HF_DATASETS_CACHE", "HF_HOME", "HF_HUB_CACHE")
_KINDS = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false", "dict": "a mapping"}


def _option(default: Any, text: str) -> Any:
    metadata = {"help": text.replace("%", "%%")}
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    r"""What `ctpo train` needs besides the settings of the trainer and the model.

    Args:
        data: Sources of problems to train on, each as for `ctpo.train.data.load_problems`.
        columns: Field to column for sources with other names, as in "prompt=question,ground_truth=final".
        system_prompt: System message of every problem, in place of its own.
        instruction: Added to the last message of the user; None adds what `load_problems` adds.
        limit: At most so many problems of each source of `data`, the first ones.
        max_prompt_tokens: Leave out problems whose rendered prompt is longer.
        skip_bad_rows: Count bad rows rather than stop at the first.
        rewards: What is rewarded, as for `ctpo.train.rewards.Rewards`: "math:1,format:0.1,my.module:function:0.5".
        eos_token: Token that ends a turn, where the tokenizer's own is another, as of base models with a chat template.
        eval_data: Sources of problems to be measured by, before and after; none: no evaluation.
        eval_limit: At most so many problems of each source of `eval_data`.
        eval_samples: Answers to each of them.
        eval_temperature: Temperature of these answers; 0 is greedy.
        eval_top_p: Their nucleus.
        eval_max_tokens: Their length; None for `max_completion_length`.
        eval_seed: Their seed, the same before and after.
        eval_batch_size: Answers drawn together; None for what `ctpo.train.evaluation.evaluate` chooses.
        eval_backend: "auto", "transformers" or "vllm".
        eval_before: Whether to evaluate before the training, too.
        accelerate_config: Configuration of Accelerate to launch with: a file, or single_gpu, multi_gpu, fsdp2, zero2,
            zero3.
        num_processes: Processes to launch in all, one per GPU. With this or `accelerate_config`, `ctpo train` calls
            Accelerate's launcher by itself, unless it was called by it.
        num_machines: Machines; the command is given on each of them.
        machine_rank: Number of this machine, from 0.
        main_process_ip: Address of machine 0.
        main_process_port: Port there.

    Raises:
        ValueError: A field is out of its range.

    Example:
        >>> RunConfig(data=["arithmetic?difficulty=2"], eval_samples=4).rewards
        'math'
    """

    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Sources of problems to train on: files, hub:NAME, reasoning-gym:TASK, arithmetic."},
    )
    columns: str | None = _option(None, "field=column,... for sources with other names of columns.")
    system_prompt: str | None = _option(None, "System message of every problem, in place of its own.")
    instruction: str | None = _option(None, "Added to the last message of the user.")
    limit: int | None = _option(None, "At most so many problems of each source of data.")
    max_prompt_tokens: int | None = _option(None, "Leave out problems with longer prompts.")
    skip_bad_rows: bool = _option(False, "Count bad rows rather than stop at the first.")
    rewards: str = _option("math", "NAME[:WEIGHT],...: math, format, reasoning-gym, package.module:function.")
    eos_token: str | None = _option(None, "Token that ends a turn, where the tokenizer's own is another.")
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "Sources of problems to be measured by, before and after."}
    )
    eval_limit: int | None = _option(None, "At most so many problems of each source of eval_data.")
    eval_samples: int = _option(4, "Answers to each of these problems.")
    eval_temperature: float = _option(1.0, "Temperature of these answers; 0 is greedy.")
    eval_top_p: float = _option(1.0, "Nucleus of these answers.")
    eval_max_tokens: int | None = _option(None, "Length of these answers. Default: max_completion_length.")
    eval_seed: int = _option(0, "Seed of these answers, the same before and after.")
    eval_batch_size: int | None = _option(None, "Answers drawn together. Default: 32, with vLLM 512.")
    eval_backend: str = _option("auto", "What draws them: auto, transformers or vllm.")
    eval_before: bool = _option(True, "Evaluate before the training, too.")
    accelerate_config: str | None = _option(
        None, "Launch with this configuration of Accelerate: a file, or single_gpu, multi_gpu, fsdp2, zero2, zero3."
    )
    num_processes: int | None = _option(None, "Launch so many processes in all, one per GPU.")
    num_machines: int = _option(1, "Machines; the command is given on each.")
    machine_rank: int = _option(0, "Number of this machine, from 0.")
    main_process_ip: str | None = _option(None, "Address of machine 0.")
    main_process_port: int | None = _option(None, "Port there.")

    def __post_init__(self) -> None:
        for name, least in (
            ("limit", 1),
            ("max_prompt_tokens", 1),
            ("eval_limit", 1),
            ("eval_samples", 1),
            ("eval_max_tokens", 1),
            ("eval_seed", 0),
            ("eval_batch_size", 1),
            ("num_processes", 1),
            ("num_machines", 1),
            ("machine_rank", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= self.eval_temperature < float("inf"):
            raise ValueError(f"eval_temperature must be at least 0 and finite, got {self.eval_temperature}")
        if not 0 < self.eval_top_p <= 1:
            raise ValueError(f"eval_top_p must be in (0, 1], got {self.eval_top_p}")
        if self.eval_backend not in ("auto", "transformers", "vllm"):
            raise ValueError(f"eval_backend must be auto, transformers or vllm, got {self.eval_backend!r}")
        if self.eval_temperature == 0 and self.eval_samples != 1:
            raise ValueError(
                f"eval_samples must be 1 at eval_temperature 0, where every answer is alike; got {self.eval_samples}"
            )
        if self.num_machines > 1 and (self.main_process_ip is None or self.main_process_port is None):
            raise ValueError(f"num_machines={self.num_machines} needs main_process_ip and main_process_port")
        if self.machine_rank >= self.num_machines:
            raise ValueError(f"machine_rank must be below num_machines={self.num_machines}, got {self.machine_rank}")

    def column_names(self) -> dict[str, str] | None:
        """What `columns` says, as `load_problems` takes it."""
        if self.columns is None:
            return None
        pairs = [part.partition("=") for part in self.columns.split(",")]
        if not all(name.strip() and column.strip() for name, _, column in pairs):
            raise ValueError(f"columns must be FIELD=COLUMN,FIELD=COLUMN, got {self.columns!r}")
        return {name.strip(): column.strip() for name, _, column in pairs}


@dataclass(frozen=True)
class Options:
    """What was asked for, before it is made to configurations.

    Attributes:
        recipe: Name of the recipe, or path of the YAML file; None without one.
        given: Values by name.
        origins: Where each of them is from.
        dry_run: Whether to show the plan only.
    """

    recipe: str | None
    given: dict[str, Any]
    origins: dict[str, Origin]
    dry_run: bool

    def run_config(self) -> RunConfig:
        """The part that is not the trainer's."""
        return RunConfig(**self._part(RunConfig))

    def plan(self, *, world_size: int | None = None) -> Plan:
        """Configurations of all parts.

        Args:
            world_size: Number of processes that the trainer's settings are completed for, on a machine that need not
                have a GPU; None for those that this process belongs to.
        """
        from trl import ModelConfig

        from ctpo.train.config import CTPOConfig

        run = self.run_config()
        model = ModelConfig(**self._part(ModelConfig))
        if not model.model_name_or_path:
            raise ValueError("model_name_or_path is missing: a directory, a .gguf file, a name on the Hub, or toy")
        if not run.data:
            raise ValueError(
                "data is missing: a file, a directory, hub:NAME, reasoning-gym:TASK or arithmetic?difficulty=2"
            )
        given = self._part(CTPOConfig)
        if given.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
            if not self.dry_run:
                raise ValueError("deepspeed needs the package deepspeed, which is not here: pip install deepspeed")
            del given["deepspeed"]  # a plan can do without
        try:
            with _quiet():
                trainer = CTPOConfig(**given) if world_size is None else _planned(CTPOConfig, given, world_size)
        except ValueError as error:
            if "doesn't support bf16" in str(error):
                raise ValueError(
                    "bf16: no GPU that computes in bfloat16 is here; on a processor: --use_cpu true --bf16 false"
                ) from None
            text = " ".join(str(error).split())
            if "must be divisible by num_generations" in text:
                text = (
                    f"{text.rstrip('.')}: a rollout batch has per_device_train_batch_size x processes x "
                    "steps_per_generation answers; change one of these or num_generations"
                )
            raise ValueError(text) from None
        return Plan(self, run, trainer, model)

    def _part(self, kind: Any) -> dict[str, Any]:
        names = {own.name for own in dataclasses.fields(kind)}
        return {name: value for name, value in self.given.items() if name in names}


@dataclass(frozen=True)
class Plan:
    """All configurations of a run.

    Attributes:
        options: What they were made of.
        run: Data, rewards, evaluation, processes.
        trainer: A `ctpo.train.config.CTPOConfig`.
        model: A `trl.ModelConfig`.
    """

    options: Options
    run: RunConfig
    trainer: Any
    model: Any


def _planned(kind: Any, given: dict[str, Any], world_size: int) -> Any:
    """The trainer's settings as they would be with so many processes with GPUs."""
    import torch

    asked = dict(given)
    if not torch.cuda.is_available():
        asked["use_cpu"] = True  # else bfloat16 is refused where there is no GPU to plan for
    planned = type(kind.__name__, (kind,), {"world_size": property(lambda self: world_size)})
    settings = planned(**asked)
    settings.use_cpu = given.get("use_cpu", False)
    return settings


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning of transformers about a name that TRL itself sets."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
        yield


# -------------------------------------------------------------------------------------------------------------- recipes


def _folder(*parts: str) -> Any:
    return resources.files("ctpo.train").joinpath("recipes", *parts)


def is_toy(name: str) -> bool:
    """Whether a model's name stands for the toy, which the run makes: "toy", or "toy?" and options."""
    return name.partition("?")[0] == "toy"


def recipe_names() -> list[str]:
    """Names of the recipes in the package, the smallest first."""
    order = ("toy", "smollm2", "qwen3-4b", "qwen3-14b")
    found = sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))
    return sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))


def _recipe(name: str) -> tuple[str, str]:
    """Text of a recipe of the package or of a YAML file, and what messages call it."""
    path = Path(name).expanduser()
    if name in recipe_names():
        return _folder(f"{name}.yaml").read_text(encoding="utf-8"), f"recipe {name}"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8-sig"), name
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is no text in UTF-8: {error.reason} at byte {error.start}") from None
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror or error}") from None
    what = f"{name} is a directory" if path.is_dir() else f"there is no recipe and no file {name!r}"
    names = recipe_names()
    near = difflib.get_close_matches(path.name.removesuffix(".yaml").lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"--config: {what}; {hint}recipes: {', '.join(names)}, or the path of a YAML file")


def find_accelerate_config(name: str) -> Path:
    """The file of a configuration of Accelerate, by path or by its name in the package."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    folder = _folder("accelerate")
    names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if name in names:
        return Path(str(folder.joinpath(f"{name}.yaml")))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(
        f"accelerate_config: {name!r} is neither a file nor a name; {hint}allowed are {', '.join(names)} and paths"
    )


def accelerate_settings(name: str | None) -> dict[str, Any]:
    """What a configuration of Accelerate says; nothing for None."""
    if name is None:
        return {}
    path = find_accelerate_config(name)
    return _read_yaml(path.read_text(encoding="utf-8"), str(path))


def to_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as a YAML file has them."""
    return str(yaml.safe_dump(dict(settings), sort_keys=False))


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        found = yaml.load(text, Loader=_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        problem = " ".join((error.problem or error.context or "no YAML").split())
        if "'\\t'" in problem:
            problem = "a tab; YAML is indented with spaces"
        raise ValueError(f"{place}: {problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
    if found is None:
        raise ValueError(f"{where} is empty; it must be a mapping, lines of 'name: value'")
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be a mapping, lines of 'name: value', got a {type(found).__name__}")
    for name in found:
        if not isinstance(name, str):
            raise ValueError(f"{where}: names of options are text, got {name!r}")
    return found


@functools.cache
def _loader() -> Any:
    """Reads YAML 1.2: 1e-6 is a number, "no" and dates are text; and no name twice."""

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                name = self.construct_object(key, deep=True)
                if name in seen:
                    raise yaml.MarkedYAMLError(problem=f"{name!r} is there twice", problem_mark=key.start_mark)
                seen.add(name)
            return super().construct_mapping(node, deep=deep)

    for tag, pattern, first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("int", r"[-+]?[0-9]+", "-+0123456789"),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)", "-+.0123456789"),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
    Loader.add_constructor(
        "tag:yaml.org,2002:float", lambda loader, node: float(re.sub(r"\.(inf|nan)", r"\1", node.value.lower()))
    )
    return Loader


# --------------------------------------------------------------------------------------------------------------- parser


def parse(words: Sequence[str]) -> Options:
    """Read what follows `ctpo train`, without `--help` and `--help-all`.

    Environment variables of a recipe's `env` are set here, before anything reads them; for a plan only those that say
    where files and GPUs are.

    Raises:
        ValueError: An option is unknown or has a wrong value, or a file is not what it has to be.
    """
    name = _config_name(words)
    found: dict[str, Any] = {}
    where = ""
    if name is not None:
        text, where = _recipe(name)
        found = _read_yaml(text, where)
        plan_only = "--dry-run" in words or "--dry_run" in words
        _set_environment(found.pop("env", None), where, only=_FOR_PLANS if plan_only else None)
    parser = _parser()
    given = _checked(parser, found, where)
    origins: dict[str, Origin] = dict.fromkeys(given, "recipe")
    line = vars(parser.parse_line(words))
    dry_run = bool(line.pop("dry_run", False))
    line.pop("config", None)
    origins |= dict.fromkeys(line, "line")
    for option, value in (given | line).items():
        harmless, instead = _MEANINGLESS.get(option, ((value,), ""))
        if value is not None and value not in harmless:
            raise ValueError(f"{option} must not be {_shown(value)}: {instead}")
    return Options(name, given | line, origins, dry_run)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _config_name(words: Sequence[str]) -> str | None:
    names = []
    for place, word in enumerate(words):
        if word == "--config":
            if place + 1 == len(words):
                raise ValueError(f"--config needs a recipe ({', '.join(recipe_names())}) or the path of a YAML file")
            names.append(words[place + 1])
        elif word.startswith("--config="):
            names.append(word.removeprefix("--config="))
    if len(names) > 1:
        raise ValueError(f"--config is there {len(names)} times: {', '.join(names)}; a run has one recipe")
    return names[0] if names else None


def _set_environment(found: Any, where: str, *, only: Sequence[str] | None) -> None:
    if found is None:
        return
    if not isinstance(found, dict) or not all(isinstance(value, str | int | float) for value in found.values()):
        raise ValueError(f"{where}: env must be a mapping of names to texts, got {found!r}")
    for name, value in found.items():
        if only is None or name in only:
            os.environ[str(name)] = str(value)


@functools.cache
def _parser() -> Any:
    from trl import ModelConfig, TrlParser

    from ctpo.train.config import CTPOConfig

    class Parser(TrlParser):
        """TRL's parser, with one line for what is wrong, and only what was given as its result."""

        def error(self, message: str) -> Any:
            raise ValueError(message)

        def parse_line(self, words: Sequence[str]) -> argparse.Namespace:
            try:
                found, unknown = self.parse_known_args(list(words))
            except argparse.ArgumentError as error:
                raise ValueError(_in_words(self, error)) from None
            for word in unknown:
                if word.startswith("--"):
                    raise ValueError(_unknown(word.partition("=")[0], self))
            if unknown:
                raise ValueError(f"{unknown[0]!r} belongs to no option; options are --name value")
            return found

    parser = Parser(
        (RunConfig, CTPOConfig, ModelConfig),
        prog="ctpo train",
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
        usage="ctpo train --config RECIPE [--OPTION VALUE ...]",
    )
    parser.add_argument("--config", help="Recipe, by its name or the path of a YAML file.")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="Show what would be done, and stop.")
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return parser


def _names(parser: Any) -> list[str]:
    return [action.dest for action in _by_name(parser).values()]


def _by_name(parser: Any) -> dict[str, Any]:
    """The option of every name; of a truth value the one that says yes."""
    found: dict[str, Any] = {}
    for action in parser._actions:
        found.setdefault(action.dest, action)
    return found


def _unknown(name: str, parser: Any) -> str:
    plain = name.removeprefix("--").replace("-", "_")
    names = [*_names(parser), "help", "help_all"]
    near = _OTHERS.get(plain) or next(iter(difflib.get_close_matches(plain, names, n=1, cutoff=0.6)), None)
    if near is None:
        near = next((own for own in names if plain and (own.startswith(plain) or own.endswith(f"_{plain}"))), None)
    dashes = "--" if name.startswith("--") else ""
    hint = f"did you mean {dashes}{near}?" if near else "ctpo train --help-all lists all"
    return f"unknown option {name}: {hint}"


def _in_words(parser: Any, error: argparse.ArgumentError) -> str:
    """What argparse says, in our words."""
    name = (error.argument_name or "").partition("/")[0]
    if found := re.fullmatch(r"invalid (\w+) value: (.*)", error.message):
        return f"{name} must be {_KINDS.get(found[1], f'a {found[1]}')}, got {found[2]}"
    if error.message.startswith("Truthy value expected: got "):
        return f"{name} must be true or false, got {error.message.split()[4]!r}"
    if found := re.match(r"invalid choice: (.*?) \(choose from", error.message):
        choices = _by_name(parser)[name.removeprefix("--").replace("-", "_")].choices
        return f"{name} must be one of {', '.join(map(str, choices))}, got {found[1]}"
    if error.message.startswith("expected "):
        return f"{name} needs a value"
    return f"{name}: {error.message}"


def _checked(parser: Any, found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a YAML file as their options take them."""
    actions = _by_name(parser)
    given: dict[str, Any] = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in actions or name in ("config", "dry_run"):
            raise ValueError(f"{where}: {_unknown(key, parser)}")
        if name in given:
            raise ValueError(f"{where}: {key} is there twice, with dashes and with underscores")
        try:
            given[name] = _value(actions[name], value, _hints()[name])
        except ValueError as error:
            raise ValueError(f"{where}: {name} {error}") from None
    return given


@functools.cache
def _hints() -> dict[str, str]:
    """The types of all options, as they are written."""
    from trl import ModelConfig

    from ctpo.train.config import CTPOConfig

    return {name: hint for kind in (ModelConfig, CTPOConfig, RunConfig) for name, hint in _declared(kind)}


def _declared(kind: Any) -> Iterator[tuple[str, str]]:
    """Fields with the annotations of their classes: TRL's parser writes simpler ones into the fields."""
    written: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        written |= inspect.get_annotations(base)
    for own in dataclasses.fields(kind):
        yield own.name, str(written[own.name])


def _value(action: Any, value: Any, hint: str) -> Any:
    if value is None:
        if "None" in hint or "Optional" in hint:
            return None
        raise ValueError("must not be null")
    if isinstance(value, dict):
        if "dict" in hint.lower():
            return value
        raise ValueError(f"must be {_kind(action)}, got a mapping")
    if isinstance(value, list):
        if action.nargs == "+":
            if not value:
                raise ValueError("must not be an empty list")
            return [_scalar(action, item) for item in value]
        if "list" in hint.lower():
            return [_scalar(action, item) for item in value]
        raise ValueError(f"must be {_kind(action)}, got a list")
    return [_scalar(action, value)] if action.nargs == "+" else _scalar(action, value)


def _scalar(action: Any, value: Any) -> Any:
    kind = getattr(action.type, "__name__", "")
    truth = isinstance(value, bool)
    if isinstance(value, dict | list) or (truth and kind in ("int", "float")):
        raise ValueError(f"must be {_kind(action)}, got {value!r}")
    text = str(value).lower() if truth else str(value)
    try:
        # A string may say what a number cannot be written as, so all go the way of the command line.
        found = value if action.type is None else action.type(text)
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        raise ValueError(f"must be {_kind(action)}, got {value!r}") from None
    if action.choices is not None and found not in action.choices:
        raise ValueError(f"must be one of {', '.join(map(str, action.choices))}, got {value!r}")
    return found


def _kind(action: Any) -> str:
    if action.choices is not None:
        return f"one of {', '.join(map(str, action.choices))}"
    return _KINDS.get(getattr(action.type, "__name__", ""), "text")


# ----------------------------------------------------------------------------------------------------------------- help

_HELP = """\
usage: ctpo train --config RECIPE [--OPTION VALUE ...]

Train a language model with an estimator of ctpo. RECIPE is one of
{recipes}
or the path of a YAML file, lines of "option: value". Any option can be given on
the line, too, and goes before the file's. The same command goes on with a run
that was stopped, and prints the summary again once it is finished.

  --dry-run                     show settings, data, memory and off-policyness,
                                and stop: needs neither weights nor a GPU
  --output_dir DIR              where everything is kept

what is trained, and on what:
  --model_name_or_path MODEL    directory, .gguf file, name on the Hub, or toy
  --use_peft --lora_r 16        LoRA
  --data SOURCE [SOURCE ...]    FILE.parquet, FILE.jsonl, hub:ORG/NAME@SPLIT,
                                reasoning-gym:TASK, arithmetic?difficulty=2
  --eval_data SOURCE ...        measured by these, before and after
  --rewards math:1,format:0.1   also package.module:function
  --python_tool auto            let the model run Python

how:
  --estimator ctpo              any of `ctpo estimators`
  --clip_low, --clip_high, --clip_power, --clip_dual ...   its window
  --num_generations 8           answers to a prompt
  --steps_per_generation 16     batches of a rollout: how off-policy it is
  --learning_rate 1e-6
  --max_steps 100
  --max_completion_length 512
  --use_vllm --vllm_mode colocate

where:
  --accelerate_config fsdp2 --num_processes 8
                                also by accelerate launch -m ctpo train ...
  --report_to tensorboard       or wandb, trackio

All options: ctpo train --help-all. The guide: docs/trainer.md.\
"""


def help_text() -> str:
    """What `ctpo train --help` prints, made without anything heavy."""
    about = {
        "toy": "a tiny model from scratch, on a CPU, in minutes",
        "smollm2": "SmolLM2-135M-Instruct with the Python tool, one GPU",
        "qwen3-4b": "the paper's setting, 8 GPUs with vLLM",
        "qwen3-14b": "the paper's setting, 8 GPUs with vLLM",
    }
    lines = [f"  {name:12}{about.get(name, '')}".rstrip() for name in recipe_names()]
    return _HELP.format(recipes="\n".join(lines))


def all_options_text(width: int) -> str:
    """What `ctpo train --help-all` prints: every option, by where it is from."""
    from trl import GRPOConfig, ModelConfig

    from ctpo.train.config import CTPOConfig

    own = [entry for entry in dataclasses.fields(CTPOConfig) if entry.name in inspect.get_annotations(CTPOConfig)]
    names = {entry.name for entry in own}
    inherited = [entry for entry in dataclasses.fields(GRPOConfig) if entry.name not in names]
    parts = {
        "the run (ctpo)": dataclasses.fields(RunConfig),
        "the trainer (ctpo)": own,
        "the trainer (TRL's GRPOConfig and transformers' TrainingArguments)": inherited,
        "the model (TRL's ModelConfig)": dataclasses.fields(ModelConfig),
    }
    lines = ["usage: ctpo train --config RECIPE [--OPTION VALUE ...]", "", "  --dry-run", "  --help, --help-all"]
    for title, entries in parts.items():
        lines += ["", f"{title}:"]
        for entry in entries:
            default = entry.default
            if default is dataclasses.MISSING:
                default = None if entry.default_factory is dataclasses.MISSING else entry.default_factory()
            meaning = " ".join(str(entry.metadata.get("help", "")).replace("%%", "%").split())
            lines.append(f"  --{entry.name} (default: {'none' if default in (None, []) else default})")
            lines += textwrap.wrap(meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
