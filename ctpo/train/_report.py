"""What is left of a training: the summary, as text and as numbers, and the card of the model."""

from __future__ import annotations

import json
import math
import resource
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctpo.train._drawing import duration
from ctpo.train._options import is_toy, to_yaml

__all__ = ["card", "summarize", "summary_text"]

# Share of the logged steps at both ends over which the reward is averaged, and how many steps that takes: fewer have
# had too few prompts to tell the model's progress from the prompts' difficulty.
_ENDS, _ENOUGH = 0.1, 20
# Positions at which the card shows the window.
_POSITIONS = (1, 100, 1000)


def summarize(
    *,
    history: Sequence[Mapping[str, Any]],
    steps: int,
    rollout_batches: int,
    processes: int = 1,
    output_dir: Path,
    evaluations: Mapping[str, Mapping[str, Any]],
    comparison: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The numbers of a finished run.

    Args:
        history: What the trainer has logged.
        steps: Optimizer steps.
        rollout_batches: That were sampled for them.
        processes: How many have trained.
        output_dir: Where everything is.
        evaluations: "before" and "after", as `ctpo.train.evaluation.evaluate` returns them; either may be missing.
        comparison: What `ctpo.train.evaluation.compare` says of the two.
    """
    rewards = [float(entry["reward"]) for entry in history if "reward" in entry]
    few = round(_ENDS * len(rewards)) if len(rewards) >= _ENOUGH else 0
    last: dict[str, Any] = {}
    for entry in history:
        last |= entry
    seconds, tokens = last.get("train_runtime"), last.get("num_tokens")
    found: dict[str, Any] = {
        "steps": steps,
        "processes": processes,
        "rollout_batches": rollout_batches,
        "train_seconds": seconds,
        "tokens": None if tokens is None else int(tokens),
        "tokens_per_second": round(tokens / seconds, 1) if tokens and seconds else None,
        "reward_first": sum(rewards[:few]) / few if few else None,
        "reward_last": sum(rewards[-few:]) / few if few else None,
        "reward_entries": few,
        "noise_floor": {name.partition("/")[2]: last[name] for name in last if name.startswith("noise_floor/")},
        "peak_memory": _peak_memory(),
        "output_dir": str(output_dir),
        "evaluation": {},
    }
    for name, results in evaluations.items():
        metrics = results["overall"]["metrics"]
        average = next(key for key in metrics if key.startswith("avg@"))
        found["evaluation"][name] = {
            "metric": average,
            "problems": results["overall"]["problems"],
            "level": results["level"],
            **{key: metrics[average][key] for key in ("mean", "low", "high")},
        }
    if comparison is not None:
        name, paired = next(iter(comparison["overall"]["metrics"].items()))
        found["evaluation"]["difference"] = {
            "metric": name,
            **{key: paired[key] for key in ("difference", "low", "high", "p_value")},
        }
    return found


def _peak_memory() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return {"bytes": torch.cuda.max_memory_allocated(), "of": torch.cuda.get_device_name()}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of": "the process"}


def summary_text(summary: Mapping[str, Any], *, width: int = 80) -> str:
    """What `ctpo train` prints at the end."""
    steps, batches = summary["steps"], summary["rollout_batches"]
    rows = [("updates", f"{steps} with {_count(batches, 'rollout batch')}")]
    if summary["train_seconds"]:
        text = f"{duration(summary['train_seconds'])}, {_count(summary['processes'], 'process')}"
        if summary["tokens_per_second"]:
            text += f", {summary['tokens_per_second']:.0f} tokens a second"
        rows.append(("training", text))
    if summary["reward_last"] is not None:
        ends = f"in the first and last {summary['reward_entries']} logged steps"
        rows.append(("reward", f"{summary['reward_first']:.3g} -> {summary['reward_last']:.3g}, {ends}"))
    if "token" in summary["noise_floor"]:
        rows.append(("noise floor", _noise_floor(summary["noise_floor"])))
    peak = summary["peak_memory"]
    rows.append(("memory", f"{peak['bytes'] / 1e9:.2f} GB at most, of {peak['of']}"))
    lines = [f"trained: {summary['output_dir']}/model"]
    for name, text in rows:
        lines += textwrap.wrap(text, width, initial_indent=f"  {name:14}", subsequent_indent=" " * 16)
    found = summary["evaluation"]
    for name in ("before", "after", "difference"):
        if name in found:
            one = found[name]
            lines.append(f"  {name:14}{_interval(one, signed=name == 'difference')}")
    if "after" in found:
        one = found["after"]
        lines.append(f"  {'':14}{one['metric']} on {one['problems']} held-out problems [{one['level']:.0%} interval]")
    return "\n".join(lines)


def _noise_floor(found: Mapping[str, float]) -> str:
    """What was measured, and of what; see `ctpo.train._noise_floor`."""
    token, share = found["token"], found.get("share")
    if not found.get("lower_bound"):
        of = "" if share is None else f", {min(share, 1.0):.2g} of the log-ratios' mean square"
        return f"{token:.2g} nats a token{of}"
    if token == 0.0:
        return "unknown: the batch's shape changes nothing"
    return f"at least {token:.2g} nats a token (batch shape only)"


def _interval(one: Mapping[str, Any], *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    value = one["difference"] if signed else one["mean"]
    ends = "" if one["low"] is None else f" [{one['low']:{sign}.3f}, {one['high']:{sign}.3f}]"
    return f"{value:{sign}.3f}{ends}"


# ----------------------------------------------------------------------------------------------------------------- card


def card(plan: Any, summary: Mapping[str, Any], versions: Mapping[str, str], device: str) -> str:
    """The model's README.md: what it is made of, how, what was measured and what was not."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    from ctpo.zoo import RECIPES

    trainer, run = plan.trainer, plan.run
    name = str(plan.model.model_name_or_path)
    recipe = RECIPES[trainer.estimator]
    title = Path(trainer.output_dir).resolve().name
    after = summary["evaluation"].get("after")
    results = None
    if after is not None:
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=run.eval_data[0],
                dataset_name=", ".join(run.eval_data),
                metric_type="accuracy",
                metric_name=after["metric"],
                metric_value=round(after["mean"], 4),
            )
        ]
    on_hub = not is_toy(name) and not Path(name).expanduser().exists()
    data = ModelCardData(
        base_model=name if on_hub else None,
        datasets=[one.removeprefix("hub:").partition("@")[0].partition("?")[0] for one in run.data if "hub:" in one]
        or None,
        library_name="peft" if plan.model.use_peft else "transformers",
        tags=["ctpo", "trl", "reinforcement-learning"],
        model_name=title if results else None,
        eval_results=results,
    )
    given = to_yaml({key: _whole(value) for key, value in plan.options.given.items() if key != "output_dir"})
    rows = ["| | " + (after["metric"] if after else "") + " | 95% interval |", "|---|---:|---:|"]
    for part in ("before", "after", "difference"):
        if part in summary["evaluation"]:
            one = summary["evaluation"][part]
            value = one["difference"] if part == "difference" else one["mean"]
            ends = "-" if one["low"] is None else f"{one['low']:.3f}, {one['high']:.3f}"
            rows.append(f"| {part} | {value:.3f} | {ends} |")
    if after:
        measured = [
            f"{after['problems']} held-out problems ({', '.join(run.eval_data)}), "
            f"{_count(run.eval_samples, 'answer')} to each, temperature {run.eval_temperature:g}; "
            "intervals over problems, the difference paired by problem.",
            "",
            *rows,
        ]
    else:
        measured = ["Not measured: the run had no `eval_data`."]
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        f"{name}, trained by reinforcement learning with `ctpo train`"
        + (f" and the recipe {plan.options.recipe}." if plan.options.recipe else "."),
        "## Estimator",
        f"`{trainer.estimator}`: gradient weight {recipe.weight}; {_window(trainer.built_estimator.clip, recipe)}; "
        f"loss averaged as {trainer.built_aggregation}. Source: {recipe.source}.\n\n"
        f"```\n{trainer.built_estimator}\n```",
        "## Use",
        _use(plan, title),
        "## Results",
        "\n".join(measured),
        "## Training",
        f"- {_count(summary['steps'], 'update')} with {_count(summary['rollout_batches'], 'rollout batch')} of "
        f"{trainer.generation_batch_size} answers; {trainer.updates_per_rollout:g} updates with each\n"
        f"- data: {', '.join(run.data)}; rewards: {run.rewards}\n"
        + _reward(summary)
        + f"- {_number(summary['train_seconds'])} s on {device}, {_count(summary['processes'], 'process')}\n"
        f"- {', '.join(f'{package} {version}' for package, version in versions.items())}",
        f"The command:\n\n```\n{_command(plan.options)}\n```",
        f"Settings that were given:\n\n```yaml\n{given}```",
        "## Not verified",
        "- one run with one seed: how much another seed would differ is not known\n"
        "- safety, languages and tasks other than those above were not looked at\n"
        "- that the reward cannot be gained otherwise than by right answers",
    ]
    return str(ModelCard("\n\n".join(sections) + "\n"))


def _reward(summary: Mapping[str, Any]) -> str:
    if summary["reward_last"] is None:
        return ""
    return (
        f"- mean reward {_number(summary['reward_first'])} in the first and {_number(summary['reward_last'])} in the "
        f"last {summary['reward_entries']} logged steps (of the training, sampled)\n"
    )


def _whole(value: Any) -> Any:
    """1 rather than 1.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _window(clip: Any, recipe: Any) -> str:
    """Which tokens have got no gradient."""
    if clip is None:
        return "no window"
    if not hasattr(clip, "bounds"):
        return f"in place of a window: {recipe.window}"
    bounds = [[None if one is None else float(one) for one in clip.bounds(float(t))] for t in _POSITIONS]

    def edge(index: int) -> str:
        ratios = ["none" if (log := row[index]) is None else f"{math.exp(min(log, 700.0)):.5g}" for row in bounds]
        if len(set(ratios)) == 1:
            return ratios[0]
        return " / ".join(ratios)

    changing = f" (at tokens {' / '.join(map(str, _POSITIONS))})" if bounds[0] != bounds[-1] else ""
    dual = "" if bounds[0][2] is None else f" or above {edge(2)}"
    return (
        f"a token gets no gradient where the ratio is above {edge(1)} and the advantage positive, or below {edge(0)}"
        f"{dual} and the advantage negative{changing}"
    )


def _use(plan: Any, title: str) -> str:
    """How to ask the model."""
    trainer, run = plan.trainer, plan.run
    asked = "What is 12 * 34?" + ("" if not run.instruction else f" {run.instruction}")
    prompt = [{"role": "user", "content": asked}]
    if run.system_prompt:
        prompt.insert(0, {"role": "system", "content": run.system_prompt})
    tool = trainer.python_tool != "none"
    lines = ["from ctpo.train.generation import Sampling, open_generator"]
    lines += ["from ctpo.train.sandbox import open_sandbox"] if tool else []
    lines += [
        "from ctpo.train.tools import rollouts",
        "",
        f'generator = open_generator("{title}/model")  # where this model lies',
        f"prompt = {prompt!r}",
        f"sampling = Sampling(max_tokens={trainer.max_completion_length}, temperature={_whole(trainer.temperature)})",
    ]
    if tool:
        rounds = trainer.max_tool_calling_iterations
        options = f'tools="{trainer.python_tool}", sandbox=sandbox, max_rounds={1000 if rounds is None else rounds}'
        lines += [
            f'with open_sandbox("{trainer.python_sandbox}") as sandbox:',
            f"    [found] = rollouts(generator, [prompt], sampling=sampling, {options})",
        ]
    else:
        lines += ['[found] = rollouts(generator, [prompt], sampling=sampling, tools="none")']
    lines += ["print(found.answer)"]
    return "```python\n" + "\n".join(lines) + "\n```"


def _command(options: Any) -> str:
    """What was typed, but for where it was written to."""
    words = ["ctpo", "train"]
    if options.recipe:
        words += ["--config", options.recipe if "/" not in options.recipe else Path(options.recipe).name]
    for name, origin in options.origins.items():
        if origin == "line" and name != "output_dir":
            value = options.given[name]
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(json.dumps(one) if isinstance(one, bool | dict) else str(one) for one in values)]
    return shlex.join(words)


def _count(number: int, what: str) -> str:
    ending = "" if number == 1 else "es" if what.endswith(("ch", "ss")) else "s"
    return f"{number} {what}{ending}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
