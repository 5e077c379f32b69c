"""Command line: `ctpo estimators | diagnose`, and the commands of `ctpo.train`."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import re
import shutil
import sys
import textwrap
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

import ctpo
from ctpo import ratios
from ctpo._arrays import one_of
from ctpo.clipping import Clip, Gate
from ctpo.diagnostics import Diagnosis, diagnose, format_table
from ctpo.estimators import Estimator
from ctpo.regions import Region
from ctpo.train.commands import add_commands
from ctpo.zoo import ESTIMATORS, RECIPES, Recipe

__all__ = ["main"]

# Width of what goes to a file or a pipe.
_WIDTH = 100
# Exit status of a program that SIGPIPE ends: what read our output has seen enough of it.
_READER_LEFT = 141
# Exit status of a program that Ctrl-C ends.
_INTERRUPTED = 130
# Packages for which there is an option, but no extra.
_ON_REQUEST = (
    "bitsandbytes",
    "deepspeed",
    "flash_attn",
    "liger_kernel",
    "tensorboard",
    "trackio",
    "vllm",
    "wandb",
)
# Arrays of a file for `ctpo diagnose`; the first two have to be there.
_ARRAYS = {
    "logp": "log-probabilities under the policy in training, nats, (..., T)",
    "behavior_logp": "the same under the policy that sampled",
    "mask": "bool, (..., T), True at policy tokens; without it, all are",
    "advantages": "(...,) or (..., T); adds clip rates",
    "groups": "prompt of each sequence, (...,); for errors over prompts",
}
# Levels whose ratio corrects the expectation for some advantages, and which (claims 3.prop1, 4.lookahead, 4.unbiased).
_UNBIASED_FOR = {
    "cumulative": "an advantage known at its token (an exact one is, an outcome reward is not)",
    "lookahead": "an advantage known `window` tokens later (an outcome reward is only if the sequence ends by then)",
    "sequence": "any advantage, an outcome reward too",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command of the console script `ctpo`.

    Args:
        arguments: The words after `ctpo`; None for those of this process.

    Returns:
        Exit status: 0, or 1 if what was asked about has failed (`ctpo sandbox`, `ctpo score`), or 2 if an argument or
        a file is not what it has to be or a package is missing, or 130 after Ctrl-C.

    Example:
        >>> main(["estimators", "sequence"])  # doctest: +ELLIPSIS
        sequence
          weight       rho_H
        ...
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        text = options.run(options)
        if text:  # processes that were launched have printed theirs
            print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes again on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_LEFT
    except (ValueError, OSError) as error:
        print(f"ctpo {options.command}: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "ctpo":
            raise
        print(f"ctpo {options.command}: {_what_is_missing(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    return getattr(options, "status", 0)


def _what_is_missing(error: ImportError) -> str:
    """What to install."""
    name = (error.name or "").partition(".")[0]
    if not name:
        return " ".join(str(error).split())  # raised by hand: it says what it needs
    needs = f"needs {name}" if isinstance(error, ModuleNotFoundError) else str(error)
    package = name.replace("_", "-") if name in _ON_REQUEST else '".[train]" in the clone of ctpo'
    return f"{needs}: pip install {package}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ctpo", description="Importance ratios for off-policy reinforcement learning of language models."
    )
    parser.add_argument("--version", action="version", version=f"ctpo {ctpo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    listing = commands.add_parser(
        "estimators",
        help="the named estimators as a table, or one of them in full",
        description="The named policy-gradient estimators as a table, or one of them in full.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="In the table, r_t, rho_t and rho_H are the importance ratios of token t, of\n"
        "tokens 1..t and of the whole sequence of H tokens.",
    )
    listing.add_argument("name", nargs="?", metavar="NAME", help="show this one, with every field")
    form = listing.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--markdown", action="store_true", help="the generated part of docs/estimators.md")
    listing.set_defaults(run=_estimators)

    diagnosing = commands.add_parser(
        "diagnose",
        help="how far recorded importance ratios can be trusted",
        description="Spread, drift, effective sample size and clip rates by position of recorded\n"
        "log-probabilities, with standard errors and a verdict. `!` marks what speaks\nagainst the ratios.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="arrays of FILE:\n"
        + "\n".join(f"  {name:15}{meaning}" for name, meaning in _ARRAYS.items())
        + "\n\nwrite it with numpy.savez(FILE, logp=..., behavior_logp=..., mask=...), or let\n"
        "`ctpo train --log_ratio_traces N` write OUTPUT_DIR/traces",
    )
    diagnosing.add_argument(
        "file",
        metavar="FILE",
        help="an .npz file with the arrays below, or traces of `ctpo train` (a directory, a .parquet)",
    )
    diagnosing.add_argument(
        "--sequences",
        choices=("fresh", "trained_on", "all"),
        help="of traces: those not trained on before, the others, or all (default: fresh)",
    )
    diagnosing.add_argument(
        "--steps", nargs=2, type=int, metavar=("FIRST", "LAST"), help="of traces: only these updates"
    )
    diagnosing.add_argument(
        "--estimator", metavar="NAME", help="whose clip rates, if the file has advantages (default: ctpo)"
    )
    diagnosing.add_argument("--min-ess", type=float, default=0.5, help="fraction that counts as low (default: 0.5)")
    diagnosing.add_argument("--json", action="store_true", help="as JSON; what is not defined or infinite is null")
    diagnosing.set_defaults(run=_diagnose)
    add_commands(commands)
    return parser


def _estimators(options: argparse.Namespace) -> str:
    """What `ctpo estimators` prints."""
    if options.name is not None:
        one_of("NAME", options.name, RECIPES)
        if options.markdown:
            raise ValueError("--markdown is the page of all estimators; leave NAME out")
    if options.markdown:
        return _markdown()
    if options.json:
        entries = {name: {"name": name, **_plain(recipe)} for name, recipe in RECIPES.items()}
        found = list(entries.values()) if options.name is None else entries[options.name]
        return json.dumps(found, indent=2, allow_nan=False)
    width = shutil.get_terminal_size((_WIDTH, 0)).columns
    return _table(_rows(), width) if options.name is None else _entry(options.name, RECIPES[options.name], width)


def _rows() -> list[dict[str, str]]:
    """The zoo: one row per name, with what every recipe says in words."""
    names = [own.name for own in fields(Recipe) if own.default is MISSING and own.name != "estimator"]
    return [{"name": key} | {name: getattr(recipe, name) for name in names} for key, recipe in RECIPES.items()]


def _words(recipe: Recipe) -> dict[str, str]:
    """Everything that a recipe says in words."""
    words = {own.name: getattr(recipe, own.name) for own in fields(recipe) if own.name != "estimator"}
    return {name: text for name, text in words.items() if text}


def _entry(name: str, recipe: Recipe, width: int) -> str:
    """Everything about one estimator."""
    estimator = recipe.estimator
    lines = [name, *_listed(_words(recipe), width)]
    if formulas := _formulas(estimator.form):
        lines += ["", "Coefficient c of the gradient c A grad log pi, and value:", *_listed(formulas, width)]
    lines += ["", "Fields:", *_field_lines(estimator, width), "", "Expectation of the sum over tokens:"]
    lines += _filled(_expectation(estimator), width, "  ")
    lines += ["", "In Python:"]
    same = name if name in ESTIMATORS else next(key for key, one in ESTIMATORS.items() if one == estimator)
    lines += _filled(f"ctpo.get_estimator({same!r}) == {_definition(estimator)}", width, "  ", "      ")
    lines += _filled(f"ctpo.policy_loss(..., estimator={same!r}, aggregation={recipe.aggregation!r})", width, "  ")
    return "\n".join(lines)


def _field_lines(thing: Any, width: int, indent: str = "  ") -> list[str]:
    """Each field of a dataclass with its value and meaning, those of its parts below."""
    lines = []
    meanings = _documented(type(thing))
    for own in fields(thing):
        value = getattr(thing, own.name)
        meaning = _summary(type(value)) if is_dataclass(value) else meanings.get(own.name, "")
        if own.name == "level" and value in _level_table():
            formula, tokens = _level_table()[value]
            meaning = f"Log-ratio at token t: {formula}. Depends on tokens: {tokens}."
        lines += _filled(f"{own.name} = {_shown(value)}", width, indent)
        lines += _filled(meaning, width, indent + "    ")
        if is_dataclass(value):
            lines += _field_lines(value, width, indent + "    ")
    return lines


def _shown(value: Any) -> str:
    return type(value).__name__ if is_dataclass(value) else repr(value)


def _expectation(estimator: Estimator) -> str:
    """Whether the gradient is unbiased, and for what."""
    if estimator.form == "reinforce":
        return "No correction: unbiased for samples of the policy in training only."
    if estimator.form in ("topr", "vespo"):
        return "Biased off-policy, in general: its weight is not the ratio, by design."
    biasing = [
        f"{name} ({_shown(value)})"
        for name, value in ((own.name, getattr(estimator, own.name)) for own in fields(estimator))
        if value is not None and _acts(estimator, name)
    ]
    advantages = _UNBIASED_FOR.get(estimator.level)
    given = (
        " The target policy must have been fixed before the tokens were drawn, the sampler must be able to draw "
        "whatever the target can, and its log-probabilities must be those it drew with."
    )
    if advantages is None:
        return "Biased off-policy, in general: its ratio leaves a part of the change of policy uncorrected."
    if biasing:
        return f"Biased by {', '.join(biasing)}. The ratio alone is unbiased for {advantages}.{given}"
    return f"Unbiased for {advantages}.{given}"


def _acts(estimator: Estimator, name: str) -> bool:
    """Whether a field, if it is not None, changes the coefficient from the ratio to something else."""
    if name == "form":
        return estimator.form != "unclipped" and estimator.clip is None
    if name == "max_token_log_ratio":
        return estimator.level != "sequence"
    return name in ("clip", "max_log_ratio", "region")


def _definition(estimator: Estimator) -> str:
    """The call that makes it, defaults left out."""
    given = []
    for own in fields(estimator):
        value = getattr(estimator, own.name)
        if own.default is MISSING or value != own.default:
            given.append(f"{own.name}={value!r}")
    return f"Estimator({', '.join(given)})"


def _formulas(form: str) -> dict[str, str]:
    """Coefficient and value of a form, and of those that it refers to, from the documentation of `Estimator`."""
    every = _form_table()
    found: dict[str, str] = {}
    wanted = [form]
    for name in wanted:
        if name in every and name not in found:
            found[name] = every[name]
            wanted += re.findall(r'"(\w+)"', every[name])
    return found


def _form_table() -> dict[str, str]:
    """Form -> formulas."""
    items = re.findall(r'^\* "(\w+)": (.*?)(?=^\* |\n\n)', _text(Estimator), flags=re.DOTALL | re.MULTILINE)
    return {name: _one_line(text) for name, text in items}


def _level_table() -> dict[str, tuple[str, str]]:
    """Level -> log-ratio at token t, tokens it depends on; from the documentation of `ctpo.ratios`."""
    rows = re.findall(r'^"(\w+)" +(.+?)  +(.+)$', _text(ratios), flags=re.MULTILINE)
    return {level: (formula, tokens) for level, formula, tokens in rows}


def _documented(cls: type) -> dict[str, str]:
    """Field -> meaning, from the section "Args" of a docstring."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", _text(cls), flags=re.DOTALL | re.MULTILINE)
    items = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", section[1] if section else "", re.DOTALL | re.MULTILINE)
    return {name: _one_line(text) for name, text in items}


def _summary(cls: type) -> str:
    return _one_line(_text(cls).partition("\n\n")[0])


def _text(thing: Any) -> str:
    # Under python -OO the only docstrings are those that dataclasses make of their fields.
    return "" if sys.flags.optimize > 1 else inspect.getdoc(thing) or ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _table(rows: Sequence[Mapping[str, str]], width: int) -> str:
    """Aligned columns; cells wrap where the terminal is narrow, and entries become blocks where it is too narrow."""
    names = list(rows[0])
    columns = {name: [name, *(row[name] for row in rows)] for name in names}
    widest = {name: max(map(len, column)) for name, column in columns.items()}
    least = {name: max(map(len, _filled(" ".join(column), 1, hyphens=True))) for name, column in columns.items()}
    least[names[0]] = widest[names[0]]
    room = width - 2 * (len(names) - 1)
    if sum(least.values()) > room:
        blocks = [[row[names[0]], *_listed({name: row[name] for name in names[1:]}, width)] for row in rows]
        return "\n\n".join("\n".join(block) for block in blocks)
    while sum(widest.values()) > room:
        widest[max((name for name in names if widest[name] > least[name]), key=lambda name: widest[name])] -= 1
    lines = []
    for row in [dict(zip(names, names, strict=True)), {name: "-" * widest[name] for name in names}, *rows]:
        cells = [_filled(row[name], widest[name], hyphens=True) or [""] for name in names]
        for k in range(max(map(len, cells))):
            parts = (cell[k] if k < len(cell) else "" for cell in cells)
            lines.append("  ".join(part.ljust(widest[name]) for part, name in zip(parts, names, strict=True)).rstrip())
    return "\n".join(lines)


def _listed(items: Mapping[str, str], width: int) -> list[str]:
    """Indented lines of name and text, the texts aligned and wrapped."""
    margin = max(map(len, items), default=0) + 4
    return [
        line for name, text in items.items() for line in _filled(text, width, f"  {name}".ljust(margin), " " * margin)
    ]


def _filled(text: str, width: int, first: str = "", later: str | None = None, *, hyphens: bool = False) -> list[str]:
    """Lines of at most `width` characters, if no word is longer; they may end at a hyphen if `hyphens`."""
    return textwrap.wrap(
        text,
        max(width, len(first) + 20 if first else 1),
        initial_indent=first,
        subsequent_indent=first if later is None else later,
        break_long_words=False,
        break_on_hyphens=hyphens,
    )


def _markdown() -> str:
    """The reference page of the zoo below its introduction."""
    if sys.flags.optimize > 1:
        raise ValueError("--markdown is made of docstrings, which python -OO leaves out")
    parts = ["## The table", "", *_markdown_table([_linked(row) for row in _rows()])]
    parts += ["", "## Forms", "", "Coefficient c and value of a token with ratio w and advantage A.", ""]
    parts += _markdown_table(
        [{"form": f"`{name}`", "coefficient and value": _escaped(text)} for name, text in _form_table().items()]
    )
    parts += ["", "## Windows, gates and regions", ""]
    parts += _markdown_table(
        [
            {
                "class": f"`{kind.__name__}`",
                "what it is": _escaped(_summary(kind)),
                "fields": "<br>".join(f"`{name}`: {_escaped(text)}" for name, text in _documented(kind).items()),
            }
            for kind in (*get_args(Clip), *get_args(Gate), *get_args(Region))
        ]
    )
    parts += ["", "## Levels", "", "d_t is the log-ratio of token t, H the number of policy tokens.", ""]
    parts += _markdown_table(
        [
            {"level": f"`{name}`", "log-ratio at token t": _escaped(formula), "depends on tokens": tokens}
            for name, (formula, tokens) in _level_table().items()
        ]
    )
    parts += ["", "## One by one"]
    for name, recipe in RECIPES.items():
        parts += ["", f'<a id="{name}"></a>', "", f"### {name}", ""]
        parts += ["```python", *_call_lines(recipe.estimator), "```", ""]
        words = _linked(_words(recipe))
        parts += [f"- {key}: {value}" for key, value in words.items()]
        parts += [f"- expectation of the sum over tokens: {_expectation(recipe.estimator)}"]
    return "\n".join(parts)


def _call_lines(estimator: Estimator) -> list[str]:
    return _filled(_definition(estimator), _WIDTH, "", "    ")


def _linked(row: Mapping[str, str]) -> dict[str, str]:
    """A row for markdown: code set as code, papers linked."""
    shown = {}
    for name, text in row.items():
        if name == "name":
            text = f"[`{text}`](#{text})"
        elif name in ("weight", "window", "aggregation"):
            text = f"`{text}`"
        shown[name] = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    return shown


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("*", "\\*")


def _markdown_table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(rows[0]), "|" + "---|" * len(rows[0]), *(line(row.values()) for row in rows)]


def _diagnose(options: argparse.Namespace) -> str:
    """What `ctpo diagnose` prints."""
    arrays = _load(options)
    name = options.estimator
    if "advantages" in arrays:
        name = name or "ctpo"
    elif name is not None:
        raise ValueError(f"--estimator needs the array 'advantages', which {options.file} does not have")
    found: Diagnosis = diagnose(**arrays, estimator=name, min_ess=options.min_ess)
    if options.json:
        return json.dumps({"estimator": name, **_plain(found)}, indent=2, allow_nan=False)
    width = shutil.get_terminal_size((_WIDTH, 0)).columns
    counts = f"{found.spread.n_sequences} sequences, {found.table['n_tokens'].sum()} policy tokens"
    parts = [f"{counts}; clip rates of {name}" if name else counts]
    parts += [format_table(found.table, columns) for columns in _blocks(found.table, width)]
    verdict = [_filled(f"{'!' if one.flagged else '-'} {one.statement}", width, "", "  ") for one in found.verdict]
    return "\n\n".join([*parts, "\n".join(line for lines in verdict for line in lines)])


def _blocks(table: Mapping[str, NDArray[Any]], width: int) -> list[list[str]]:
    """Columns of a table in groups that fit the terminal, each after the positions, errors beside their values."""
    place, rest = list(table)[:2], list(table)[2:]
    blocks: list[list[str]] = []
    for name in rest:
        if name.endswith("_se") and name.removesuffix("_se") in rest:
            continue
        unit = [name, *([f"{name}_se"] if f"{name}_se" in rest else [])]
        if blocks and len(format_table(table, [*blocks[-1], *unit]).partition("\n")[0]) <= width:
            blocks[-1] += unit
        else:
            blocks.append([*place, *unit])
    return blocks


def _load(options: argparse.Namespace) -> dict[str, Any]:
    """The arrays of a file, by name."""
    path, chosen = options.file, {"--sequences": options.sequences, "--steps": options.steps}
    if os.path.isdir(path) or path.endswith(".parquet"):
        from ctpo.train.traces import read_traces

        steps = None if options.steps is None else tuple(options.steps)
        found = read_traces(path, sequences=options.sequences or "fresh", steps=steps)
        return {name: found[name] for name in _ARRAYS if name in found}
    for option, value in chosen.items():
        if value is not None:
            raise ValueError(f"{option} is for traces of `ctpo train` (a directory or .parquet), got {path}")
    if not os.path.exists(path):
        hint = "" if path.endswith(".npz") else ", so no traces: `ctpo train` writes them with --log_ratio_traces N"
        raise ValueError(f"{path}: no such file or directory{hint}")
    with open(path, "rb") as stream:
        if not zipfile.is_zipfile(stream):
            raise ValueError(f"FILE must be an .npz file, as numpy.savez writes it; got {path}")
        stream.seek(0)
        archive = np.load(stream, allow_pickle=False)
        for name in archive.files:
            one_of(f"array in {path}", name, _ARRAYS)
        arrays = {}
        for name in archive.files:
            try:
                arrays[name] = archive[name]
            except ValueError as error:
                raise ValueError(f"array {name!r} in {path} must hold numbers, labels or bool; {error}") from error
    missing = [name for name in list(_ARRAYS)[:2] if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no array {missing[0]!r}; it has {', '.join(arrays) or 'none'}")
    return arrays


def _plain(value: Any) -> Any:
    """What JSON can say of dataclasses, mappings and arrays."""
    if is_dataclass(value):
        kind = {} if isinstance(value, (Recipe, Diagnosis)) else {"class": type(value).__name__}
        return kind | {own.name: _plain(getattr(value, own.name)) for own in fields(value)}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
