"""The command line of `ctpo.train`: `ctpo sandbox | score | data | eval | train`, for `ctpo.cli`.

Arguments are declared here without importing what the commands need: `ctpo --help` takes no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

__all__ = ["add_commands"]

# Options of `load_problems`.
_LOADING = ("split", "columns", "drop", "system_prompt", "instruction", "shuffle_seed", "limit")
_SOURCES = """sources of problems:
  FILE.parquet, FILE.jsonl, FILE.json, each also .gz where it is text
  DIRECTORY                                     datasets.save_to_disk
  hub:ORG/NAME[@SPLIT]                          the Hugging Face Hub
  reasoning-gym:TASK?min_terms=2&size=100&seed=0
  arithmetic?difficulty=2&size=256&seed=0"""


def add_commands(commands: Any) -> None:
    """Add the commands to a parser.

    Args:
        commands: What `argparse.ArgumentParser.add_subparsers` returns. Each command sets `run`, a function of the
            parsed options that returns the text to print, and may set `status` among the options.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_commands(parser.add_subparsers())
        >>> parser.parse_args(["score", "It is 4.", "--ground-truth", "4"]).ground_truth
        '4'
    """
    _add_sandbox(commands)
    _add_score(commands)
    _add_data(commands)
    _add_eval(commands)
    _add_train(commands)


# ------------------------------------------------------------------------------------------------------------- sandbox


def _add_sandbox(commands: Any) -> None:
    parser = commands.add_parser(
        "sandbox",
        help="run Python in the sandbox, or see which isolation works here",
        description="Run Python as a model's tool would: isolated, with limits, one session for all files in order.\n"
        "Without a file: which isolation works here, and what to install where it does not.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit status: 0, or 1 if a program failed or (without a file) nothing can isolate.",
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="program; - for standard input")
    parser.add_argument("-c", dest="code", metavar="CODE", help="a program given here")
    parser.add_argument("--backend", choices=("auto", "bubblewrap", "monty"), default="auto")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="seconds a program (default: 10)")
    parser.set_defaults(run=_sandbox)


def _sandbox(options: argparse.Namespace) -> str:
    from ctpo.train.sandbox import Limits, SandboxUnavailable, backends, open_sandbox

    programs = [sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8") for name in options.files]
    programs += [] if options.code is None else [options.code]
    if not programs:
        found = backends()
        options.status = 0 if "" in found.values() else 1
        return "\n".join(f"{name:12}{reason or 'works'}" for name, reason in found.items())
    shown: list[str] = []
    try:
        with open_sandbox(options.backend, limits=Limits(timeout=options.timeout)) as sandbox:
            session = sandbox.session()
            for program in programs:
                result = session.run(program)
                shown += [text.rstrip("\n") for text in (result.output, result.error) if text]
                if result.error:
                    options.status = 1
                    break
    except SandboxUnavailable as error:
        raise ValueError(str(error)) from None
    return "\n".join(shown)


# --------------------------------------------------------------------------------------------------------------- score


def _add_score(commands: Any) -> None:
    parser = commands.add_parser(
        "score",
        help="score an answer, or a file of answers",
        description="Score an answer against its ground truth, or every line of a JSON lines file that has a\n"
        "response and what it is judged by.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit status: 0, or 1 if a reward could not be computed for some answer.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("response", nargs="?", metavar="RESPONSE", help="the text to score")
    what.add_argument("--file", metavar="FILE", help='JSON lines with "response" and "ground_truth" (or as in `data`)')
    parser.add_argument("--ground-truth", metavar="TEXT", help="what RESPONSE is compared with")
    parser.add_argument("--rewards", default="math", metavar="SPEC", help="e.g. math:1,format:0.1 (default: math)")
    parser.add_argument("--json", action="store_true", help="every score as a line of JSON")
    parser.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> str:
    from ctpo.train.rewards import Rewards

    if options.file is None:
        rows = [{"response": options.response, "ground_truth": options.ground_truth or ""}]
    elif options.ground_truth is not None:
        raise ValueError("--ground-truth goes with RESPONSE; the lines of --file have their own")
    else:
        rows = _responses(Path(options.file))
    with Rewards(options.rewards) as rewards:
        scores = rewards.score([row["response"] for row in rows], rows)
    failed = [score for score in scores if score.failures]
    options.status = 1 if failed else 0
    if options.json:
        keys = ("total", "parts", "failures", "answer", "correct")
        return "\n".join(json.dumps({key: getattr(score, key) for key in keys}) for score in scores)
    if options.file is None:
        parts = [f"{name} {value:g}" for name, value in scores[0].parts.items()]
        reasons = [f"{name} failed: {reason}" for name, reason in scores[0].failures.items()]
        answer = "no answer found" if scores[0].answer is None else f"answer {scores[0].answer}"
        verdict = "correct" if scores[0].correct else "not correct"
        return "\n".join([f"{verdict}, {answer}, total {scores[0].total:g} ({', '.join(parts)})", *reasons])
    count = len(scores)
    lines = [f"{count} answers, {sum(score.correct for score in scores)} correct"]
    for name in scores[0].parts:
        mean = sum(score.parts[name] for score in scores) / count
        failures = sum(name in score.failures for score in scores)
        lines.append(f"  {name}: mean {mean:.4g}" + (f", {failures} failed and count 0" if failures else ""))
    return "\n".join([*lines, f"  total: mean {sum(score.total for score in scores) / count:.4g}"])


def _responses(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
            if not isinstance(row, dict) or not isinstance(row.get("response"), str):
                raise ValueError(f'{path}, line {number}: must be an object with a text "response"')
            if "ground_truth" not in row and isinstance(row.get("reward_model"), dict):
                row["ground_truth"] = row["reward_model"].get("ground_truth")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no lines")
    return rows


# ---------------------------------------------------------------------------------------------------------------- data


def _add_data(commands: Any) -> None:
    parser = commands.add_parser("data", help="look at problems as the model will see them")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser(
        "show",
        help="print a few problems of a source",
        description="Print a few problems of a source, rendered as the model will see them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_SOURCES,
    )
    show.add_argument("source", metavar="SOURCE", help="where the problems are, see below")
    show.add_argument("--rows", type=int, default=3, metavar="N", help="how many to print (default: 3)")
    show.add_argument("--model", metavar="MODEL", help="directory or name whose chat template renders them")
    show.add_argument("--max-prompt-tokens", type=int, metavar="N", help="leave out longer prompts; needs --model")
    _add_loading(show)
    show.add_argument("--skip-bad-rows", action="store_true", help="count bad rows instead of stopping at the first")
    show.set_defaults(run=_show)


def _add_loading(parser: argparse._ActionsContainer) -> None:
    """Options of `load_problems`."""
    parser.add_argument("--split", metavar="NAME", help="of a dataset that has several")
    parser.add_argument("--columns", metavar="A=B,..", help="field=column for files with other names")
    parser.add_argument("--drop", metavar="A,..", help="columns to leave out")
    parser.add_argument("--system-prompt", metavar="TEXT", help="put before every prompt")
    parser.add_argument("--instruction", metavar="TEXT", help="appended to every prompt")
    parser.add_argument("--shuffle-seed", type=int, metavar="N", help="shuffle, before --limit")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems")


def _loading(options: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, as `load_problems` takes them."""
    given = {name: getattr(options, name) for name in _LOADING if getattr(options, name) is not None}
    if "columns" in given:
        pairs = [part.partition("=") for part in given["columns"].split(",")]
        if not all(field.strip() and column.strip() for field, _, column in pairs):
            raise ValueError(f"--columns: got {options.columns!r}; allowed is FIELD=COLUMN,FIELD=COLUMN")
        given["columns"] = {field.strip(): column.strip() for field, _, column in pairs}
    if "drop" in given:
        given["drop"] = [name.strip() for name in given["drop"].split(",")]
    return given


def _show(options: argparse.Namespace) -> str:
    from ctpo.train.data import show_source

    return show_source(
        options.source,
        rows=options.rows,
        model=options.model,
        max_prompt_tokens=options.max_prompt_tokens,
        on_bad_row="skip" if options.skip_bad_rows else "error",
        width=max(60, min(120, shutil.get_terminal_size().columns - 2)),
        **_loading(options),
    )


# ---------------------------------------------------------------------------------------------------------------- eval


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="evaluate a model on problems, go on with that, or compare two evaluations",
        description="Draw answers of a model to problems, score them, and print metrics with intervals over\n"
        "problems. Everything is kept in DIR: the same command goes on where it was stopped, even\n"
        "killed, and prints the results again once it is finished.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_SOURCES,
    )
    _add_eval_arguments(parser)
    _add_loading(parser.add_argument_group("problems"))
    parser.set_defaults(run=_eval)


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """All but those of `load_problems`."""
    parser.usage = (
        "%(prog)s MODEL DATA [DATA ...] --output DIR [options]\n       %(prog)s --compare DIR_A DIR_B [--json]"
    )
    parser.add_argument(
        "model", metavar="MODEL", help="directory, checkpoint, LoRA adapter, .gguf file or name on the Hub"
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="*",
        help="parquet or JSON lines file, data set directory, hub:ORG/NAME[@SPLIT], reasoning-gym:TASK?size=100, "
        "arithmetic?difficulty=2&size=100",
    )
    parser.add_argument("--output", metavar="DIR", help="where everything is kept; the same command goes on there")
    parser.add_argument("--overwrite", action="store_true", help="remove what an earlier evaluation left in DIR")
    parser.add_argument(
        "--compare", action="store_true", help="compare the finished evaluations in two directories, B - A"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")

    group = parser.add_argument_group("answers")
    group.add_argument("--samples", type=int, metavar="N", help="answers to each problem (default: 8; greedy: 1)")
    group.add_argument("--max-tokens", type=int, default=1024, help="of an answer (default: %(default)s)")
    group.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)")
    group.add_argument("--top-p", type=float, default=1.0, help="default: 1, all tokens")
    group.add_argument("--top-k", type=int, default=0, help="default: 0, all tokens")
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    group.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="""variables of the chat template: '{"enable_thinking": false}'""",
    )

    group = parser.add_argument_group("tools and scores")
    group.add_argument(
        "--tools",
        choices=("none", "auto", "calls", "fenced"),
        default="none",
        help="let the model run Python: by its template's tool calls, by fenced blocks, or the first if it has them "
        "(default: none)",
    )
    group.add_argument("--max-rounds", type=int, default=8, help="turns with calls (default: %(default)s)")
    group.add_argument("--sandbox", choices=("auto", "bubblewrap", "monty"), default="auto", help="default: auto")
    group.add_argument(
        "--rewards",
        default="math",
        metavar="SPEC",
        help="NAME[:WEIGHT],...: math, format, reasoning-gym, package.module:function; the first says what is correct "
        "(default: math)",
    )

    group = parser.add_argument_group("machine")
    group.add_argument("--batch-size", type=int, help="answers drawn and saved together (default: 32; vLLM: 512)")
    group.add_argument("--backend", choices=("auto", "transformers", "vllm"), default="auto", help="default: auto")
    group.add_argument("--dtype", default="auto", help="default: auto, as saved; float32 on a CPU")
    group.add_argument("--device", default="auto", help="default: auto, a GPU if there is one")
    group.add_argument("--skip-long", action="store_true", help="leave out prompts longer than the model's context")


def _eval(options: argparse.Namespace) -> str:
    from ctpo.train.evaluation import compare, comparison_text, results_text
    from ctpo.train.sandbox import SandboxUnavailable

    width = min(shutil.get_terminal_size((80, 0)).columns, 120)
    if options.compare:
        compared = compare(*_directories(options))
        return json.dumps(compared, indent=2) if options.json else comparison_text(compared, width=width)
    try:
        results = _evaluated(options)
    except SandboxUnavailable as error:
        raise ValueError(str(error)) from None
    return json.dumps(results, indent=2) if options.json else results_text(results, width=width)


def _directories(options: argparse.Namespace) -> tuple[str, str]:
    """The two arguments of --compare, where no other option has a meaning."""
    parser = argparse.ArgumentParser()
    _add_eval_arguments(parser)
    defaults = vars(parser.parse_args(["", ""])) | dict.fromkeys(_LOADING)
    given = [
        f"--{name.replace('_', '-')}"
        for name, default in defaults.items()
        if name not in ("model", "data", "compare", "json") and getattr(options, name, default) != default
    ]
    if given:
        raise ValueError(f"--compare reads finished evaluations, {', '.join(given)} has no meaning with it")
    if len(options.data) != 1:
        raise ValueError(f"--compare needs two directories, got {1 + len(options.data)}")
    return options.model, options.data[0]


def _evaluated(options: argparse.Namespace) -> dict[str, Any]:
    if not options.data:
        raise ValueError("DATA is missing: a file, a directory, hub:NAME, reasoning-gym:TASK or arithmetic")
    if options.output is None:
        raise ValueError("--output is missing: the directory where the samples and the results are kept")
    template = None
    if options.chat_template_kwargs is not None:
        try:
            template = json.loads(options.chat_template_kwargs)
        except ValueError as error:
            raise ValueError(f"--chat-template-kwargs is not JSON: {error}") from error
        if not isinstance(template, dict):
            raise ValueError(f"--chat-template-kwargs must be a JSON object, got {options.chat_template_kwargs}")
    if not sys.stderr.isatty():
        # A log gets the lines from here, not the bars of those who load models. Read by tqdm when it is imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
    from ctpo.train.evaluation import evaluate
    from ctpo.train.generation import Sampling

    return evaluate(
        options.model,
        options.data,
        output=options.output,
        samples=options.samples,
        sampling=Sampling(options.max_tokens, options.temperature, options.top_p, options.top_k),
        tools=options.tools,
        max_rounds=options.max_rounds,
        sandbox=options.sandbox,
        rewards=options.rewards,
        seed=options.seed,
        batch_size=options.batch_size,
        skip_long=options.skip_long,
        chat_template_kwargs=template,
        backend=options.backend,
        dtype=options.dtype,
        device=options.device,
        overwrite=options.overwrite,
        **_loading(options),
    )


# --------------------------------------------------------------------------------------------------------------- train


def _add_train(commands: Any) -> None:
    # No option is read here: there are hundreds, which the trainer's own classes declare.
    parser = commands.add_parser(
        "train", help="train a language model, or show what would be done", add_help=False, prefix_chars="\0"
    )
    parser.add_argument("words", nargs="*")
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> str:
    from ctpo.train._options import all_options_text, help_text

    words = options.words
    if "--help" in words or "-h" in words:
        return help_text()
    width = min(shutil.get_terminal_size((80, 0)).columns, 120)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    if "--help-all" in words or "--help_all" in words:
        return all_options_text(width)
    from ctpo.train.run import train
    from ctpo.train.sandbox import SandboxUnavailable

    try:
        text, options.status = train(words, width=width)
    except SandboxUnavailable as error:
        raise ValueError(str(error)) from None
    return text
