r"""Evaluate a model, stop, go on where it stopped, and compare two evaluations.

`evaluate` draws n answers to each of P problems, scores them, and keeps everything in one directory:

====================  ==================================================================================================
settings.json         what the result depends on: model and data with fingerprints, options, versions
samples.jsonl         one line per answer: text, tokens, calls, rewards; grows a chunk at a time
timings.jsonl         seconds that each chunk took
problems.parquet      one row per problem, written at the end
results.json          the metrics with intervals, written last: where it is, the evaluation is finished
====================  ==================================================================================================

Answers are drawn in chunks whose order and seeds are fixed by the settings, and a chunk counts once it is on the disk.
So an evaluation that was killed, whenever that was, goes on to the very samples that it would have had.
"""

from __future__ import annotations

import dataclasses
import datetime
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ctpo.train._drawing import BATCH_SIZE, Draw, chunks_of, draw_all, duration, note_on_stderr, silent
from ctpo.train._run_directory import PROBLEMS, RESULTS, SAMPLES, RunDirectory, read_json
from ctpo.train._run_settings import (
    changes_between,
    describe_model,
    digest,
    machine,
    named,
    plain,
    refuse_others,
    versions,
)

if TYPE_CHECKING:
    from ctpo.train.data import Problem
    from ctpo.train.generation import Backend, Generator, Sampling
    from ctpo.train.sandbox import Sandbox
    from ctpo.train.tools import Tools

__all__ = ["compare", "comparison_text", "evaluate", "results_text"]

_MAX_TOKENS = 1024
_SAMPLES = 8
_MAX_SAMPLES = 1000
# Characters that one call shows the model, 1000 to 2000 tokens; the sandbox's own default is more than many answers.
_OUTPUT = 4000
# Kinds of failures that a text lists.
_REASONS = 3
_WIDTH = 80


def evaluate(
    model: str | Path | Generator,
    data: str | Path | Sequence[str | Path] | Sequence[Problem],
    *,
    output: str | Path,
    samples: int | None = None,
    sampling: Sampling | None = None,
    tools: Tools = "none",
    max_rounds: int = 8,
    sandbox: Literal["auto", "bubblewrap", "monty"] | Sandbox = "auto",
    rewards: str | Mapping[str, float] = "math",
    seed: int = 0,
    batch_size: int | None = None,
    skip_long: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    backend: Backend = "auto",
    dtype: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
    **loading: Any,
) -> dict[str, Any]:
    r"""Draw answers of a model to problems, score them, and report metrics with intervals over problems.

    The directory decides what happens: an empty one is begun, one that an evaluation with the same settings has left
    unfinished is continued, and from a finished one the results are read. One process at a time may write there.

    Args:
        model: What `ctpo.train.generation.load_model` takes, or a `Generator` (whose changes cannot be noticed when an
            evaluation is continued).
        data: One or several sources for `ctpo.train.data.load_problems`, or problems.
        output: The directory; made if it does not exist.
        samples: Answers to each problem, n, 1 to 1000; by default 8, or 1 at temperature 0.
        sampling: How tokens are drawn; by default 1024 tokens at temperature 1.
        tools: Whether and how the model may run Python, see `ctpo.train.tools.rollouts`.
        max_rounds: Most turns with calls.
        sandbox: Where calls run: a backend of `ctpo.train.sandbox.open_sandbox`, with its default limits except for
            an output of 4,000 characters a call; or what that returns, to choose other limits.
        rewards: Specification for `ctpo.train.rewards.Rewards`; the first reward says what is correct.
        seed: Of all samples, at least 0.
        batch_size: Answers that are drawn together, and saved together; by default 32, with vLLM 512. Samples depend
            on it.
        skip_long: Leave out problems whose prompts do not fit into the model's context, rather than refuse.
        chat_template_kwargs: Further variables of the chat template, as in {"enable_thinking": False}.
        backend: As in `ctpo.train.generation.open_generator`.
        dtype: As there.
        device: As there.
        overwrite: Remove what an earlier evaluation has left in the directory, once all is ready to begin anew.
        progress: Report on standard error.
        **loading: Options of `load_problems`: limit (problems of each source), split, columns, system_prompt,
            instruction, shuffle_seed and others.

    Returns:
        What results.json holds: "overall" and, by data source, "sources", each with its "metrics" by name; a metric is
        a mean over problems with "low" and "high", the ends of its 95% interval (None where there is none).

        ==============  =============================================================================================
        avg@n           share of correct answers
        pass@k          probability that one of k answers is correct, unbiased, for every k to n
        maj@k           probability that the most frequent of k answers is correct, for every k to n
        reward          weighted sum of the rewards
        format          share of answers in the form that the reward "format" asks for
        tokens          tokens that the model wrote for an answer; outputs of tools are not counted
        tool_calls      calls for an answer
        truncated       share of answers that the limit of tokens cut
        out_of_rounds   share of answers that ended with one call more than `max_rounds` allows
        ==============  =============================================================================================

    Raises:
        ValueError: An argument is not what it has to be; the directory is in use, or was begun with other settings
            (the message says which); prompts are too long.
        OSError: Something cannot be written; what was finished is kept.
        KeyboardInterrupt: As it came; what was finished is kept.

    Assumptions:
        See `ctpo.train.metrics` for what the intervals cover. Samples are reproduced exactly on the same machine with
        the same number of threads; elsewhere rounding may differ, and a token with it. With tools, as far as what the
        model runs is deterministic.

    Example:
        >>> from ctpo.train.generation import Sampling
        >>> found = evaluate(  # doctest: +SKIP
        ...     "Qwen/Qwen3-0.6B", "aime25.parquet", output="runs/aime25", sampling=Sampling(8192), tools="calls"
        ... )
        >>> print(results_text(found))  # doctest: +SKIP
        >>> evaluate("tiny", "arithmetic", output="runs/a", samples=4, sampling=Sampling(64, temperature=0.0))
        Traceback (most recent call last):
        ...
        ValueError: samples must be 1 at temperature 0, where every answer to a problem is alike; got 4
    """
    from ctpo.train.generation import Sampling
    from ctpo.train.rewards import Rewards

    sampling = Sampling(_MAX_TOKENS) if sampling is None else sampling
    samples = _check_samples(samples, sampling)
    for name, value, least in (("seed", seed, 0), ("max_rounds", max_rounds, 0), ("batch_size", batch_size, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    note = note_on_stderr if progress else silent
    from ctpo.train import _summary

    with ExitStack() as stack:
        files = stack.enter_context(RunDirectory(output))
        problems, described = _load(data, loading)
        scorer = stack.enter_context(Rewards(_with_format(rewards)))
        settings = {
            "model": describe_model(model),
            "data": described,
            "loading": loading,
            "samples": samples,
            "sampling": dataclasses.asdict(sampling),
            "tools": tools,
            "max_rounds": max_rounds,
            "sandbox": sandbox if isinstance(sandbox, str) else {"backend": sandbox.backend, "limits": sandbox.limits},
            "rewards": list(scorer.weights.items()),
            "seed": seed,
            "batch_size": batch_size,
            "skip_long": skip_long,
            "chat_template_kwargs": chat_template_kwargs or {},
            "backend": backend,
            "dtype": dtype,
            "device": device,
        }
        record = {"settings": plain(settings), "versions": versions(), "machine": machine()}
        begun = files.settings if files.has_samples and not overwrite else None
        if begun is not None:
            refuse_others(files.path, begun["settings"], record["settings"])
            if files.results is not None:
                note(f"{files.path} is finished; to draw again: --overwrite (overwrite=True)")
                if begun["versions"] != record["versions"]:
                    note(f"other versions made it: {'; '.join(changes_between(begun['versions'], record['versions']))}")
                return files.results
        opened = None if tools == "none" else _open_sandbox(sandbox, stack)
        generator = _open_generator(model, backend, batch_size, dtype, device)
        draw = Draw(
            generator, opened, scorer, problems, sampling, tools, max_rounds, seed, dict(chat_template_kwargs or {})
        )
        skipped = draw.leave_out_long(skip_long, note)
        record["resolved"] = plain(draw.resolved(batch_size))
        # Now that it is loaded, a model of the Hub is in the cache, in its newest version.
        record["settings"]["model"] = describe_model(model)
        if begun is None:
            begun = record
            files.begin(begun)
        if begun["machine"] != record["machine"]:
            changes = "; ".join(changes_between(begun["machine"], record["machine"]))
            note(f"begun on another machine, where rounding may differ and samples with it: {changes}")
        for part in ("settings", "resolved", "versions"):
            refuse_others(files.path, begun[part], record[part])
        chunks = chunks_of(len(draw.problems), samples, record["resolved"]["batch_size"])
        rows = draw_all(draw, chunks, files, note)
        table = [
            _summary.problem_row(problem, rows[start : start + samples])
            for problem, start in zip(draw.problems, range(0, len(rows), samples), strict=True)
        ]
        results = _results(begun, table, files.read_timings(), skipped)
        files.write(PROBLEMS, lambda file: _summary.write_problems(table, file))
        files.write_json(RESULTS, results)
        return results


# ----------------------------------------------------------------------------------------------------------- arguments


def _open_sandbox(sandbox: Literal["auto", "bubblewrap", "monty"] | Sandbox, stack: ExitStack) -> Sandbox:
    from ctpo.train.sandbox import Limits, open_sandbox

    if not isinstance(sandbox, str):
        return sandbox
    return stack.enter_context(open_sandbox(sandbox, limits=Limits(output=_OUTPUT)))


def _open_generator(
    model: str | Path | Generator, backend: Backend, batch_size: int | None, dtype: str, device: str
) -> Generator:
    from ctpo.train.generation import open_generator

    if not isinstance(model, (str, Path)):
        return model
    size = batch_size or BATCH_SIZE["transformers"]
    return open_generator(model, backend=backend, batch_size=size, dtype=dtype, device=device)


def _check_samples(samples: int | None, sampling: Sampling) -> int:
    if samples is None:
        return _SAMPLES if sampling.temperature > 0 else 1
    if isinstance(samples, bool) or not isinstance(samples, int) or not 1 <= samples <= _MAX_SAMPLES:
        raise ValueError(f"samples must be an integer from 1 to {_MAX_SAMPLES}, got {samples!r}")
    if samples > 1 and sampling.temperature == 0:
        raise ValueError(f"samples must be 1 at temperature 0, where every answer to a problem is alike; got {samples}")
    return samples


def _load(
    data: str | Path | Sequence[str | Path] | Sequence[Problem], loading: Mapping[str, Any]
) -> tuple[list[Problem], list[dict[str, Any]]]:
    """The problems, and for each source what tells it from another."""
    from ctpo.train.data import Problem, load_problems

    parts: list[str | Path | Problem] = [data] if isinstance(data, (str, Path)) else list(data)
    given = [part for part in parts if isinstance(part, Problem)]
    sources = [part for part in parts if not isinstance(part, Problem)]
    if not parts or (given and (sources or loading)):
        what = "problems, which take no options of load_problems" if given else "nothing"
        raise ValueError(f"data must be sources or problems, at least one; got {what}")
    loaded = [("problems", given)] if given else [(str(one), load_problems(one, **loading)) for one in sources]
    seen: dict[tuple[str, str], str] = {}
    for source, found in loaded:
        for problem in found:
            key = (problem.data_source, problem.id)
            if key in seen:
                raise ValueError(
                    f"data: the problem {problem.id!r} of {problem.data_source!r} is in {seen[key]} and in {source}; "
                    "evaluate them in two directories"
                )
            seen[key] = source
    described = [
        {"source": source, "problems": len(found), "fingerprint": digest([problem.row() for problem in found])}
        for source, found in loaded
    ]
    return [problem for _, found in loaded for problem in found], described


def _with_format(rewards: str | Mapping[str, float]) -> str | dict[str, float]:
    """The rewards and "format", which is always reported: with a weight of 0 it is in the parts only."""
    if isinstance(rewards, Mapping):
        return {**rewards, **({} if "format" in rewards else {"format": 0.0})}
    names = [name.strip().partition(":")[0] for name in rewards.split(",")]
    return rewards if "format" in names or not rewards.strip() else f"{rewards},format:0"


# ------------------------------------------------------------------------------------------------------------- results


def _results(
    begun: Mapping[str, Any],
    table: Sequence[Mapping[str, Any]],
    timings: Sequence[Mapping[str, Any]],
    skipped: Sequence[str],
) -> dict[str, Any]:
    from ctpo.train import _summary

    by_source: dict[str, list[Mapping[str, Any]]] = {}
    for row in table:
        by_source.setdefault(row["data_source"], []).append(row)
    tokens = sum(timing["tokens"] for timing in timings)
    seconds = {key: round(sum(timing[key] for timing in timings), 3) for key in ("generate_seconds", "score_seconds")}
    return {
        "level": _summary.LEVEL,
        "overall": _summary.summary(table),
        "sources": {source: _summary.summary(rows) for source, rows in by_source.items()},
        "skipped": list(skipped),
        "timing": {
            **seconds,
            "tokens": tokens,
            "tokens_per_second": round(tokens / max(seconds["generate_seconds"], 1e-3), 1),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
        **begun,
    }


def results_text(results: Mapping[str, Any], *, width: int = _WIDTH) -> str:
    """What `ctpo eval` prints: a table that is Markdown too, and what has to be known to read it.

    Args:
        results: What `evaluate` returns.
        width: Columns of the terminal; sources that do not fit come in further tables.

    Returns:
        Lines without one at the end.

    Example:
        >>> found = evaluate("Qwen/Qwen3-0.6B", "aime25.parquet", output="runs/aime25")  # doctest: +SKIP
        >>> print(results_text(found))  # doctest: +SKIP
    """
    from ctpo.train._summary import result_lines

    settings, resolved, overall = results["settings"], results["resolved"], results["overall"]
    sampling = settings["sampling"]
    drawn = [f"{key} {sampling[key]}" for key in ("max_tokens", "temperature")]
    drawn += [f"{key} {sampling[key]}" for key, off in (("top_p", 1.0), ("top_k", 0)) if sampling[key] != off]
    tools = "no tools" if resolved["sandbox"] is None else f"tools: {resolved['tools']} in {resolved['sandbox']}"
    parts = {"overall": overall}
    if len(results["sources"]) > 1:
        parts |= results["sources"]
    samples = settings["samples"]
    head = (
        f"{settings['model']['name']}: {_count(overall['problems'], 'problem')}, {_count(samples, 'sample')} of each "
        f"({', '.join(drawn)}, {tools}, seed {settings['seed']}); [{results['level']:.0%} interval over problems]"
    )
    if len(parts) == 1:
        head = head.replace(": ", f" on {next(iter(results['sources']))}: ", 1)
    notes = [head, *result_lines(parts, samples, tools=resolved["sandbox"] is not None, width=width)]
    after = []
    if failed := overall["failures"]["samples"]:
        reasons = overall["failures"]["reasons"].items()
        listed = "; ".join(f"{_one_line(reason)} ({count})" for reason, count in list(reasons)[:_REASONS])
        after.append(f"! rewards failed on {failed} of {overall['samples']} samples and count 0 there: {listed}")
    if results["skipped"]:
        after.append(f"! left out, longer than the context: {named(results['skipped'])}")
    timing = results["timing"]
    took, scored = (duration(timing[key]) for key in ("generate_seconds", "score_seconds"))
    after.append(f"{timing['tokens']} tokens in {took}, {timing['tokens_per_second']} a second; scored in {scored}")
    return "\n".join(
        [*_wrapped(notes[0], width), "", *notes[1:], "", *(line for one in after for line in _wrapped(one, width))]
    )


def compare(a: str | Path, b: str | Path) -> dict[str, Any]:
    """Compare two finished evaluations, problem by problem.

    Paired by data source and id: what makes a problem hard is the same in both, so a difference shows with far fewer
    problems than two separate intervals would need.

    Args:
        a: Directory of the first (the baseline).
        b: Directory of the second.

    Returns:
        "overall" and, by data source, "sources", each with "problems" and "metrics": the means "a" and "b", their
        "difference" b - a with the ends "low" and "high" of its 95% interval, "p_value", and the number of problems
        where b is "larger" and "smaller". pass@k and maj@k are there for every k that both have. "unpaired" lists what
        could not be paired, "settings" what else differs, "notes" what of it matters to the numbers.

    Raises:
        ValueError: A directory has no finished evaluation, or they have no problem in common.

    Example:
        >>> compare("runs/before", "runs/after")["overall"]["metrics"]["avg@8"]["p_value"]  # doctest: +SKIP
        0.021
        >>> compare("runs/nowhere", "runs/after")
        Traceback (most recent call last):
        ...
        ValueError: runs/nowhere is not the directory of an evaluation: it has no results.json and problems.parquet
    """
    from ctpo.train import _summary

    paths = [Path(a), Path(b)]
    results = [_finished(path) for path in paths]
    tables = [
        {(row["data_source"], row["id"]): row for row in _summary.read_problems(str(path / PROBLEMS))} for path in paths
    ]
    both = [key for key in tables[0] if key in tables[1]]
    other_truth = [key for key in both if tables[0][key]["ground_truth"] != tables[1][key]["ground_truth"]]
    paired = [key for key in both if key not in set(other_truth)]
    if not paired:
        raise ValueError(f"{a} and {b} have no problem in common (of the same data source, id and ground truth)")
    unpaired = {
        "only_a": [key[1] for key in tables[0] if key not in tables[1]],
        "only_b": [key[1] for key in tables[1] if key not in tables[0]],
        "other_ground_truth": [key[1] for key in other_truth],
    }
    rows = [[table[key] for key in paired] for table in tables]
    notes = [
        f"{_count(len(ids), 'problem')} {what}: {named(ids)}"
        for ids, what in (
            (unpaired["only_a"], "only in A"),
            (unpaired["only_b"], "only in B"),
            (unpaired["other_ground_truth"], "with another ground truth in B, left out"),
        )
        if ids
    ]
    if reworded := sum(first["prompt"] != second["prompt"] for first, second in zip(*rows, strict=True)):
        notes.append(f"the prompts of {_count(reworded, 'problem')} differ")
    begun = [result["settings"] for result in results]
    samples = [one["samples"] for one in begun]
    if samples[0] != samples[1]:
        notes.append(
            f"A has {_count(samples[0], 'sample')} of each problem, B {samples[1]}: avg and the rates use all of them"
        )
    same_rewards = begun[0]["rewards"] == begun[1]["rewards"]
    if not same_rewards:
        notes.append("the rewards differ, so they are not compared; 'correct' may mean something else, too")
    for side, result in zip("AB", results, strict=True):
        if failed := result["overall"]["failures"]["samples"]:
            notes.append(f"rewards failed on {_count(failed, 'sample')} of {side} and count 0 there")
    by_source: dict[str, list[int]] = {}
    for place, (source, _) in enumerate(paired):
        by_source.setdefault(source, []).append(place)

    def part(places: Sequence[int]) -> dict[str, Any]:
        first, second = ([side[place] for place in places] for side in rows)
        return {"problems": len(places), "metrics": _summary.differences(first, second, rewards=same_rewards)}

    return {
        "a": {"directory": str(a), "model": begun[0]["model"]["name"], "samples": samples[0]},
        "b": {"directory": str(b), "model": begun[1]["model"]["name"], "samples": samples[1]},
        "level": _summary.LEVEL,
        "overall": part(range(len(paired))),
        "sources": {source: part(places) for source, places in by_source.items()},
        "unpaired": unpaired,
        "settings": changes_between(begun[0], begun[1], ("in A", "in B")),
        "notes": notes,
    }


def comparison_text(comparison: Mapping[str, Any], *, width: int = _WIDTH) -> str:
    """What `ctpo eval --compare` prints.

    Args:
        comparison: What `compare` returns.
        width: Columns of the terminal.

    Returns:
        Lines without one at the end.

    Example:
        >>> print(comparison_text(compare("runs/before", "runs/after")))  # doctest: +SKIP
    """
    from ctpo.train._summary import comparison_lines

    lines = []
    for side in "ab":
        one = comparison[side]
        lines += _wrapped(f"{side.upper()}: {one['directory']} ({one['model']})", width)
    parts = comparison["sources"] if len(comparison["sources"]) > 1 else {}
    for name, part in {"overall": comparison["overall"], **parts}.items():
        title = f"{name}, {_count(part['problems'], 'problem')}" if parts else _count(part["problems"], "problem")
        lines += ["", f"{title} [{comparison['level']:.0%} interval of the difference]", "", *comparison_lines(part)]
    after = [f"! {note}" for note in comparison["notes"]]
    if comparison["settings"]:
        after.append(f"settings that differ: {'; '.join(comparison['settings'])}")
    return "\n".join([*lines, *([""] if after else []), *(line for one in after for line in _wrapped(one, width))])


def _finished(path: Path) -> dict[str, Any]:
    if (path / RESULTS).is_file() and (path / PROBLEMS).is_file():
        return read_json(path / RESULTS)
    if (path / SAMPLES).exists():
        raise ValueError(f"the evaluation in {path} is not finished; the command that began it goes on with it")
    raise ValueError(f"{path} is not the directory of an evaluation: it has no {RESULTS} and {PROBLEMS}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:97] + "..."


def _wrapped(text: str, width: int) -> list[str]:
    indent = "  " if text.startswith("!") else ""
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
