"""What `ctpo train --dry-run` prints: everything that a run would do, as far as it can be known before."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctpo.train._memory import Sizes, estimate, offline, sizes_of, splitting
from ctpo.train._options import Options, Plan, RunConfig, accelerate_settings, is_toy

__all__ = [
    "Loaded",
    "load_training_problems",
    "missing_packages",
    "not_held_out",
    "plan_text",
    "processes_of",
    "stand_in",
]

# Positions at which the window is shown.
_POSITIONS = (1, 100, 1000, 8000)
_PROMPT_LINES = 14
_GYM = "reasoning-gym:"
# Columns of the names of settings.
_MARGIN = 32


def processes_of(run: RunConfig) -> int:
    """Processes that a run is launched with."""
    if run.num_processes is not None:
        return run.num_processes
    return int(accelerate_settings(run.accelerate_config).get("num_processes") or 1)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Problems to train on.

    Attributes:
        problems: All of them.
        counts: How many each source gave.
        missing: Why a source could not be read, by source.
    """

    problems: list[Any]
    counts: dict[str, int]
    missing: dict[str, str]


def load_training_problems(
    run: RunConfig, sources: Sequence[str], limit: int | None, *, cached: bool = False
) -> Loaded:
    """The problems of some sources.

    Args:
        run: How to read them.
        sources: Where from.
        limit: Most problems of each.
        cached: Whether nothing may be downloaded; what is not in the cache is then noted, not raised.
    """
    from ctpo.train.data import DataError, load_problems

    problems: list[Any] = []
    counts: dict[str, int] = {}
    missing: dict[str, str] = {}
    for source in sources:
        distant = source.startswith("hub:")
        if cached and source.startswith(_GYM) and importlib.util.find_spec("reasoning_gym") is None:
            missing[source] = "needs reasoning-gym, which is not here"
            continue
        try:
            with offline() if cached and distant else contextlib.nullcontext():
                found = load_problems(
                    source,
                    columns=run.column_names(),
                    limit=limit,
                    system_prompt=run.system_prompt,
                    instruction=run.instruction,
                    on_bad_row="skip" if run.skip_bad_rows else "error",
                )
        except DataError as error:
            if not (cached and distant and error.row is None):
                raise
            missing[source] = "not in the cache: the run downloads it"
            continue
        counts[source] = len(found)
        problems += found
    return Loaded(problems, counts, missing)


def missing_packages(plan: Plan) -> dict[str, str]:
    """Packages that options need and that are not here, by option."""
    from transformers.integrations import get_available_reporting_integrations

    run, trainer, model = plan.run, plan.trainer, plan.model
    split = splitting(accelerate_settings(run.accelerate_config))
    needed = {
        "use_vllm": ("vllm", trainer.use_vllm),
        "eval_backend vllm": ("vllm", run.eval_backend == "vllm" and run.eval_data),
        "use_liger_kernel": ("liger-kernel", trainer.use_liger_kernel),
        "load_in_4bit": ("bitsandbytes", model.load_in_4bit),
        "load_in_8bit": ("bitsandbytes", model.load_in_8bit),
        "deepspeed": ("deepspeed", plan.options.given.get("deepspeed")),
        f"accelerate_config {run.accelerate_config}": ("deepspeed", split.startswith("zero")),
    }
    for source in (*run.data, *(run.eval_data or ())):
        needed[f"data {source.partition('?')[0]}"] = ("reasoning-gym", source.startswith(_GYM))
    known = get_available_reporting_integrations()
    missing = {
        option: package
        for option, (package, asked) in needed.items()
        if asked and importlib.util.find_spec(package.replace("-", "_")) is None
    }
    return missing | {f"report_to {name}": name for name in trainer.report_to if name not in (*known, "none", "all")}


def not_held_out(problems: Sequence[Any], held_out: Sequence[Any]) -> list[Any]:
    """The problems whose prompts are not among those that the model is measured by."""

    def messages(problem: Any) -> str:
        return json.dumps(problem.row()["prompt"], sort_keys=True)

    measured = {messages(problem) for problem in held_out}
    kept = [problem for problem in problems if messages(problem) not in measured]
    if problems and not kept:
        raise ValueError(f"data: all of its problems, {len(problems)}, are among those of eval_data")
    return kept


@contextlib.contextmanager
def stand_in(name: str) -> Iterator[str]:
    """The model's name, or for the toy a directory with a model of its sizes and its tokenizer, not warmed up."""
    if not is_toy(name):
        yield name
        return
    from ctpo.train.toy import make_toy, toy_options

    toy_options(name)
    with tempfile.TemporaryDirectory() as directory:
        yield str(make_toy(Path(directory) / "toy", warmup_steps=0))


def plan_text(options: Options, *, width: int = 80) -> str:
    """All that is to be known before a run."""
    width -= 2  # what is below a title is indented
    processes = processes_of(options.run_config())
    plan = options.plan(world_size=processes)
    with stand_in(str(plan.model.model_name_or_path)) as model:
        sizes = _sizes(plan, model)
        loaded = load_training_problems(plan.run, plan.run.data, plan.run.limit, cached=True)
        measured = load_training_problems(plan.run, plan.run.eval_data or [], plan.run.eval_limit, cached=True)
        kept = not_held_out(loaded.problems, measured.problems)
        left_out = len(loaded.problems) - len(kept)
        loaded = dataclasses.replace(loaded, problems=kept)
        data, tokens = _data(plan, model, loaded, measured, left_out, width)
    blocks = {
        "Settings (* from the recipe, + from the line; the others are defaults)": _settings(options, width),
        "Estimator": _estimator(plan, width),
        "Data": data,
        "Model": _model(plan, sizes, width),
        f"Memory of {'the process' if processes == 1 else f'each of {processes} processes'}": _memory(
            plan, sizes, processes, tokens, width
        ),
        "Rollouts and updates": _updates(plan, processes, loaded, width),
    }
    if cautions := _cautions(plan, sizes, loaded, processes, tokens):
        blocks["Warnings"] = [line for one in cautions for line in _bullet(one, width)]
    source = f"recipe {options.recipe}" if options.recipe else "no recipe"
    lines = [f"ctpo train, {source}: a dry run, nothing is trained or written"]
    for title, inside in blocks.items():
        lines += ["", title, *(f"  {line}".rstrip() for line in inside)]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- settings


def _settings(options: Options, width: int) -> list[str]:
    from trl import ModelConfig

    from ctpo.train.config import CTPOConfig

    lines = []
    for title, kind in (("run", RunConfig), ("model", ModelConfig), ("trainer", CTPOConfig)):
        names = [own.name for own in dataclasses.fields(kind) if own.name in options.given]
        if names:
            lines.append(f"{title}:")
        margin = min(_MARGIN, max(map(len, names), default=0) + 4)
        for name in names:
            mark = "*" if options.origins[name] == "recipe" else "+"
            lines += _field(f"{mark} {name}", _shown(options.given[name]), width, margin)
    return lines


def _shown(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value]
    if isinstance(value, bool) or value is None:
        return [json.dumps(value)]
    if isinstance(value, float):
        return [f"{value:g}"]
    return [json.dumps(value) if value == "" or isinstance(value, Mapping) else str(value)]


def _field(name: str, values: Sequence[str], width: int, margin: int) -> list[str]:
    """A name and its values, which wrap beside it."""
    lines = []
    for value in values:
        lines += textwrap.wrap(value, max(20, width - margin - 2), break_on_hyphens=False, break_long_words=False) or [
            ""
        ]
    head = f"  {name}"
    if len(head) >= margin + 2:
        return [head, *(" " * (margin + 2) + line for line in lines)]
    return [(head if place == 0 else "").ljust(margin + 2) + line for place, line in enumerate(lines)]


# ------------------------------------------------------------------------------------------------------------ estimator


def _estimator(plan: Plan, width: int) -> list[str]:
    from ctpo.zoo import RECIPES

    trainer = plan.trainer
    recipe, estimator = RECIPES[trainer.estimator], trainer.built_estimator
    lines = _field(f"{trainer.estimator}:", [f"gradient weight {recipe.weight}"], width, 14)
    lines += _field("loss:", [f"{trainer.built_aggregation}"], width, 14)
    lines += textwrap.wrap(
        "r_t, rho_t, rho_H: importance ratios of token t, of tokens 1..t and of the whole answer, of t tokens that "
        "the policy chose; output of the tool does not count.",
        width - 4,
        initial_indent="  ",
        subsequent_indent="  ",
    )
    clip = estimator.clip
    if clip is None or not hasattr(clip, "bounds"):
        return [*lines, "  window: none"]
    rows = [["t", "A > 0 up to", "A < 0 down to", "A < 0 up to"]]
    for position in _POSITIONS:
        low, high, dual = (None if bound is None else float(bound) for bound in clip.bounds(float(position)))
        ratio = ["any" if bound is None else _ratio(bound) for bound in (high, low, dual)]
        rows.append([str(position), *ratio])
    lines.append("  tokens whose ratio is outside of this window get no gradient:")
    return [*lines, *("    " + "  ".join(cell.rjust(13) for cell in row) for row in rows)]


def _ratio(log: float) -> str:
    if math.isinf(log):
        return "any" if log > 0 else "0"
    ratio = math.exp(min(log, 700.0))
    return f"{ratio:.3f}" if 0.001 <= ratio < 1000 else f"{ratio:.1e}"


# ----------------------------------------------------------------------------------------------------------------- data


def _data(
    plan: Plan, model: str, loaded: Loaded, measured: Loaded, left_out: int, width: int
) -> tuple[list[str], int | None]:
    """Lines, and the number of tokens of the longest prompt where it is known.

    Args:
        plan: The plan.
        model: The model or what stands in for it.
        loaded: What is trained on, without what is measured by.
        measured: What is measured by.
        left_out: How many problems were left out for that.
        width: Columns.
    """
    lines: list[str] = []
    for title, part in (("train", loaded), ("evaluate", measured)):
        for source, count in part.counts.items():
            lines += _field(f"{title}:", [f"{source}, {count} problems"], width, 12)
        for source, why in part.missing.items():
            lines += _field(f"{title}:", [f"{source}, {why}"], width, 12)
    if left_out:
        lines += _field("left out:", [f"{left_out} of the problems to train on, which eval_data has, too"], width, 12)
    if not measured.counts and not measured.missing:
        lines += _field("evaluate:", ["nothing, eval_data is not set"], width, 12)
    lines += _field("rewards:", [plan.run.rewards], width, 12)
    lines += _field("tool:", [_tool(plan)], width, 12)
    problems, what = loaded.problems, "The first prompt"
    if not problems:
        first = next(iter(loaded.missing))
        if not first.startswith(_GYM):
            lines += _field("", [f"(ctpo data show {first} --rows 1 downloads it and shows it)"], width, 12)
        problems = load_training_problems(plan.run, ["arithmetic?size=1"], 1).problems
        what = "A prompt made up here, as an example"
    problem = problems[0]
    tokenizer, why = _tokenizer(plan, model)
    if tokenizer is None:
        lines += textwrap.wrap(f"{what}, untokenized ({why}):", width - 4, initial_indent="  ", subsequent_indent="  ")
        text = "\n".join(f"[{message['role']}] {message['content']}" for message in problem.prompt)
        return [*lines, *_quoted(text, width)], None
    form = tool_form(plan, tokenizer)
    counted = [len(form.prompt_ids(one.prompt)) for one in problems[:1000]]
    ids = form.prompt_ids(problem.prompt)
    several = f"; the first {len(counted)} have {min(counted)} to {max(counted)}" if len(counted) > 1 else ""
    lines.append(f"  {what}, {len(ids)} tokens{several}:")
    return [*lines, *_quoted(tokenizer.decode(ids), width)], max(counted)


def _quoted(text: str, width: int) -> list[str]:
    lines = []
    for line in text.split("\n"):
        safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        lines += textwrap.wrap(safe, width - 8, break_on_hyphens=False, drop_whitespace=False) or [""]
    if len(lines) > _PROMPT_LINES:
        half = _PROMPT_LINES // 2
        lines = [*lines[:half], f"[{len(lines) - 2 * half} more lines]", *lines[-half:]]
    return [f"    | {line}" for line in lines]


def _tool(plan: Plan) -> str:
    trainer = plan.trainer
    if trainer.python_tool == "none":
        return "none"
    rounds = trainer.max_tool_calling_iterations
    return f"python ({trainer.python_tool}, sandbox {trainer.python_sandbox}), at most {rounds} rounds"


def _tokenizer(plan: Plan, model: str) -> tuple[Any, str]:
    """The tokenizer if it is here, and why not."""
    from ctpo.train.generation import load_tokenizer

    try:
        with offline():
            tokenizer = load_tokenizer(model)
    except (ValueError, ImportError):
        return None, "its tokenizer is not here, the run downloads it"
    if tokenizer.chat_template is None:
        raise ValueError(f"model {model!r}: its tokenizer has no chat template, which this training needs")
    set_eos(tokenizer, plan.run.eos_token)
    return tokenizer, ""


def set_eos(tokenizer: Any, eos_token: str | None) -> None:
    """Make a token of the vocabulary the one that ends a turn."""
    if eos_token is None:
        return
    if eos_token not in tokenizer.get_vocab():
        raise ValueError(f"eos_token: {eos_token!r} is no token of the model's vocabulary")
    tokenizer.eos_token = eos_token


def tool_form(plan: Plan, tokenizer: Any) -> Any:
    """How the model is shown the tool."""
    from ctpo.train.tools import tool_format

    trainer = plan.trainer
    backend = trainer.python_sandbox
    if backend == "auto" and trainer.python_tool != "none":
        from ctpo.train.sandbox import backends

        backend = next((name for name, reason in backends().items() if not reason), "")
    return tool_format(
        tokenizer, trainer.python_tool, backend=backend, chat_template_kwargs=trainer.chat_template_kwargs
    )


# ---------------------------------------------------------------------------------------------------------------- model


def _peft_config(plan: Plan) -> Any:
    from trl import get_peft_config

    return get_peft_config(plan.model)


def _sizes(plan: Plan, model: str) -> Sizes | None:
    try:
        return sizes_of(model, _peft_config(plan), revision=plan.model.model_revision)
    except ValueError as error:
        raise ValueError(f"LoRA: {' '.join(str(error).split())}") from None


def _model(plan: Plan, sizes: Sizes | None, width: int) -> list[str]:
    name = str(plan.model.model_name_or_path)
    lines = _field("trained:", [name], width, 12)
    if sizes is None:
        return [*lines, *_field("", ["neither its weights nor its configuration are here: sizes unknown"], width, 12)]
    share = "all" if sizes.trainable == sizes.total else f"{_million(sizes.trainable)} by LoRA"
    kind = f"weights in {plan.model.dtype}"
    if plan.trainer.bf16 or plan.trainer.fp16:
        kind += f", computed in {'bfloat16' if plan.trainer.bf16 else 'float16'}"
    lines += _field("parameters:", [f"{_million(sizes.total)}, trained: {share}"], width, 12)
    lines += _field("precision:", [kind], width, 12)
    origin = sizes.origin if not is_toy(name) else "what the run would make"
    return [*lines, *_field("sizes:", [f"from {origin}"], width, 12)]


def _million(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def _memory(plan: Plan, sizes: Sizes | None, processes: int, longest: int | None, width: int) -> list[str]:
    if sizes is None:
        return ["  unknown"]
    run, trainer = plan.run, plan.trainer
    split = splitting(accelerate_settings(run.accelerate_config))
    found = estimate(
        sizes, trainer, plan.model, processes=processes, split=split, max_prompt=run.max_prompt_tokens or longest
    )
    training = sum(number for number, _ in found.training.values())
    rows = {**found.training, "an update": (training, "all of these"), **found.sampling}
    if not trainer.use_vllm:
        resting = sum(found.training[name][0] for name in ("weights", "optimizer"))
        sampling = resting + sum(number for number, _ in found.sampling.values())
        rows["sampling"] = (sampling, "weights, optimizer, keys and values")
    lines = []
    for name, (number, how) in rows.items():
        lines += _field(f"{name:18}{_size(number):>9}", [how], width, 32)
    if trainer.use_vllm and trainer.vllm_mode == "colocate":
        share = f"{trainer.vllm_gpu_memory_utilization:.0%}"
        rest = "asleep during updates" if trainer.vllm_enable_sleep_mode else "kept during updates"
        lines += _field(f"{'vLLM in all':18}{share:>9}", [f"of the GPU, with keys and values; {rest}"], width, 32)
    text = (
        "Estimated: batches at their longest, attention that keeps no matrix of scores (sdpa, flash), no "
        "fragmentation, without some GB of CUDA itself and of communication."
    )
    if run.max_prompt_tokens is None and longest is None:
        text += " Prompts of 512 tokens are assumed, max_prompt_tokens is not set."
    return [*lines, *textwrap.wrap(text, width - 4, initial_indent="  ", subsequent_indent="  ")]


def _size(number: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number / 1e3:.1f} kB"


# -------------------------------------------------------------------------------------------------------------- updates


def optimizer_steps(trainer: Any, problems: int | None) -> int | None:
    """Optimizer steps of a run; None where the data is not known."""
    if trainer.max_steps > 0:
        return int(trainer.max_steps)
    if problems is None:
        return None
    return math.ceil(_steps_of_epoch(trainer, problems) * trainer.num_train_epochs)


def rollout_batches(trainer: Any, problems: int | None, steps: int | None = None) -> int | None:
    """Rollout batches that a run samples, the last of them perhaps used in part; None where the data is not known.

    Args:
        trainer: Its settings.
        problems: How many the data has.
        steps: Optimizer steps; all that the settings ask for where it is not given.
    """
    steps = optimizer_steps(trainer, problems) if steps is None else steps
    if steps is None:
        return None
    epochs, uses = 0, _uses(trainer)
    if problems is not None and _batches(trainer, problems):
        epochs, steps = divmod(steps, _steps_of_epoch(trainer, problems))
    in_epochs = epochs * _batches(trainer, problems) if problems is not None else 0
    return in_epochs + math.ceil(steps * trainer.gradient_accumulation_steps / uses)


def oldest_update(trainer: Any, problems: int | None) -> int:
    """Optimizer steps between the sampling of an answer and the update that uses it, at most."""
    accumulated, uses = trainer.gradient_accumulation_steps, _uses(trainer)
    # A rollout batch starts within an update where one does not divide the other; the same recurs after so many.
    different = accumulated // math.gcd(accumulated, uses)
    if problems is not None:
        different = min(different, max(1, _batches(trainer, problems)))
    starts = (number * uses for number in range(different))
    return max((start + uses - 1) // accumulated - start // accumulated for start in starts)


def _uses(trainer: Any) -> int:
    """Micro-batches that are made with one rollout batch."""
    return int(trainer.steps_per_generation * trainer.num_iterations)


def _batches(trainer: Any, problems: int) -> int:
    """Rollout batches of an epoch."""
    return int(problems // (trainer.generation_batch_size // trainer.num_generations))


def _steps_of_epoch(trainer: Any, problems: int) -> int:
    """Optimizer steps of an epoch, whose last one may accumulate less."""
    return math.ceil(_batches(trainer, problems) * _uses(trainer) / trainer.gradient_accumulation_steps)


def _updates(plan: Plan, processes: int, loaded: Loaded, width: int) -> list[str]:
    trainer = plan.trainer
    answers = trainer.generation_batch_size
    prompts = answers // trainer.num_generations
    batch = trainer.per_device_train_batch_size * processes * trainer.gradient_accumulation_steps
    updates = trainer.updates_per_rollout
    known = None if loaded.missing else len(loaded.problems)
    steps = optimizer_steps(trainer, known)
    rows = [
        ("rollout batch:", f"{answers} answers, {trainer.num_generations} to each of {prompts} prompts"),
        (
            "update:",
            f"{batch} answers"
            + (f", {processes} processes" if processes > 1 else "")
            + f", {trainer.gradient_accumulation_steps} times {trainer.per_device_train_batch_size} in each"
            * (trainer.gradient_accumulation_steps > 1),
        ),
        ("off-policyness:", f"{updates:g} updates with each rollout batch" + _ages(trainer, known)),
    ]
    if steps is None:
        rows.append(("in all:", "as many steps as the data has, which is not here"))
    else:
        rollouts = rollout_batches(trainer, known) or 0
        passes = f", {rollouts * prompts / known:.2g} passes over the data" if known else ""
        rows.append(("in all:", f"{steps} updates with {rollouts} rollout batch{'es' * (rollouts != 1)}{passes}"))
    rows.append(("answer:", f"at most {trainer.max_completion_length} tokens, temperature {trainer.temperature:g}"))
    rows.append(("learning rate:", f"{trainer.learning_rate:g}, {getattr(trainer.lr_scheduler_type, 'value', '')}"))
    return [line for name, text in rows for line in _field(name, [text], width, 18)]


def _ages(trainer: Any, problems: int | None) -> str:
    if not trainer.needs_old_logps:
        return ", the policy is the one that sampled"
    last, divides = oldest_update(trainer, problems), _uses(trainer) % trainer.gradient_accumulation_steps == 0
    average, most = ("", "") if divides else (" on average", "at most ")
    again = f", each answer in {trainer.num_iterations} of them" if trainer.num_iterations > 1 else ""
    return f"{average}{again}; the last one is {most}{last} update{'s' * (last != 1)} old"


def _cautions(plan: Plan, sizes: Sizes | None, loaded: Loaded, processes: int, longest: int | None) -> list[str]:
    run, trainer = plan.run, plan.trainer
    found = list(trainer.cautions())
    prompts = trainer.generation_batch_size // trainer.num_generations
    if loaded.problems and not loaded.missing and len(loaded.problems) < prompts:
        found.append(
            f"the data has {len(loaded.problems)} problems, a rollout batch needs {prompts}: nothing would be trained"
        )
    for option, package in missing_packages(plan).items():
        found.append(f"{option} needs the package {package}, which is not here: pip install {package}")
    if not trainer.use_cpu:
        import torch

        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        here = math.ceil(processes / run.num_machines)
        if there < here:
            found.append(f"this machine has {there} GPUs, the run needs {here} on each machine")
    if sizes is not None and sizes.context is not None:
        most = max(longest or 0, run.max_prompt_tokens or 0) + trainer.max_completion_length
        if most > sizes.context:
            found.append(f"prompt and answer may have {most} tokens, the model's context is {sizes.context}")
    return found


def _bullet(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width - 2, initial_indent="! ", subsequent_indent="  ", break_on_hyphens=False)
