"""What is left of a training: the summary, as text and as numbers, and the card of the model."""

from __future__ import annotations

import math
import resource
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctpo.train._drawing import duration
from ctpo.train._options import to_yaml

__all__ = ["card", "summarize", "summary_text"]

# Share of the logged steps at both ends over which the reward is averaged.
_ENDS = 0.1


def summarize(
    *,
    history: Sequence[Mapping[str, Any]],
    steps: int,
    updates_per_rollout: float,
    output_dir: Path,
    evaluations: Mapping[str, Mapping[str, Any]],
    comparison: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The numbers of a finished run.

    Args:
        history: What the trainer has logged.
        steps: Optimizer steps.
        updates_per_rollout: Of them with each rollout batch.
        output_dir: Where everything is.
        evaluations: "before" and "after", as `ctpo.train.evaluation.evaluate` returns them; either may be missing.
        comparison: What `ctpo.train.evaluation.compare` says of the two.
    """
    rewards = [float(entry["reward"]) for entry in history if "reward" in entry]
    few = max(1, round(_ENDS * len(rewards)))
    last: dict[str, Any] = {}
    for entry in history:
        last |= entry
    seconds, tokens = last.get("train_runtime"), last.get("num_tokens")
    found: dict[str, Any] = {
        "steps": steps,
        "rollout_batches": math.ceil(steps / updates_per_rollout),
        "train_seconds": seconds,
        "tokens": None if tokens is None else int(tokens),
        "tokens_per_second": round(tokens / seconds, 1) if tokens and seconds else None,
        "reward_first": sum(rewards[:few]) / few if rewards else None,
        "reward_last": sum(rewards[-few:]) / few if rewards else None,
        "reward_entries": few if rewards else 0,
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
        text = duration(summary["train_seconds"])
        if summary["tokens_per_second"]:
            text += f", {summary['tokens_per_second']:.0f} tokens a second"
        rows.append(("training", text))
    if summary["reward_last"] is not None:
        few = summary["reward_entries"]
        ends = "in the first and last logged step" if few == 1 else f"in the first and last {few} logged steps"
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
    on_hub = not name.startswith("toy") and not Path(name).expanduser().exists()
    data = ModelCardData(
        base_model=name if on_hub else None,
        datasets=[one.removeprefix("hub:").partition("@")[0].partition("?")[0] for one in run.data if "hub:" in one]
        or None,
        library_name="peft" if plan.model.use_peft else "transformers",
        tags=["ctpo", "trl", "reinforcement-learning"],
        model_name=title if results else None,
        eval_results=results,
    )
    given = to_yaml({key: value for key, value in plan.options.given.items() if key != "output_dir"})
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
        f"`{trainer.estimator}`: gradient weight {recipe.weight}, window {recipe.window} unless changed below; loss "
        f"averaged as {trainer.built_aggregation}. Source: {recipe.source}.\n\n```\n{trainer.built_estimator}\n```",
        "## Results",
        "\n".join(measured),
        "## Training",
        f"- {_count(summary['steps'], 'update')} with {_count(summary['rollout_batches'], 'rollout batch')} of "
        f"{trainer.generation_batch_size} answers; {trainer.updates_per_rollout:g} updates with each\n"
        f"- data: {', '.join(run.data)}; rewards: {run.rewards}\n"
        f"- reward {_number(summary['reward_first'])} at the beginning, {_number(summary['reward_last'])} at the end "
        "(of the training, sampled)\n"
        f"- {_number(summary['train_seconds'])} s on {device}\n"
        f"- {', '.join(f'{package} {version}' for package, version in versions.items())}",
        "Settings that were given:",
        f"```yaml\n{given}```",
        "## Not verified",
        "- one run with one seed: how much another seed would differ is not known\n"
        "- safety, languages and tasks other than those above were not looked at\n"
        "- that the reward cannot be gained otherwise than by right answers",
    ]
    return str(ModelCard("\n\n".join(sections) + "\n"))


def _count(number: int, what: str) -> str:
    ending = "" if number == 1 else "es" if what.endswith("ch") else "s"
    return f"{number} {what}{ending}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
