"""How results read: tables for the terminal, and the markdown report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

SHORT_ENGINE = {
    "enumeration": "enum",
    "dynamic programming": "DP",
    "Monte Carlo": "MC",
    "closed form": "form",
    "recorded": "rec",
}

#: How a claim's assumptions read beside its verdict.
ASSUMPTION_LABEL = {"true": "note", "true if": "if", "false": "why"}


def claims_table(outcomes: Sequence[Mapping[str, Any]]) -> Table:
    """The table that `verify` prints: one row per claim."""
    table = Table(title="Claims about importance ratios", show_lines=True, title_justify="left", expand=True)
    table.add_column("claim", no_wrap=True)
    table.add_column("statement", ratio=5)
    table.add_column("verdict", no_wrap=True)
    table.add_column(
        "evidence (by enumeration, dynamic programming, Monte Carlo, formula, recording)",
        ratio=7,
    )
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("pass", no_wrap=True)
    for outcome in outcomes:
        evidence = Text()
        for k, item in enumerate(outcome["evidence"]):
            style = "" if item["holds"] else "bold red"
            evidence.append("\n" if k else "")
            evidence.append(f"{SHORT_ENGINE[item['engine']]} ", style="dim")
            evidence.append(item["found"], style=style)
        if not outcome["control_rejected"]:
            evidence.append(f"\nnegative control not rejected: {outcome['control']}", style="bold red")
        passed = Text("yes", style="green") if outcome["passed"] else Text("NO", style="bold red")
        statement = Text(outcome["statement"])
        statement.append(f"\n{ASSUMPTION_LABEL[outcome['verdict']]}: {outcome['assumptions']}", style="dim")
        seconds = f"{outcome['seconds']:.1f}"
        table.add_row(outcome["id"], statement, Text(outcome["verdict"]), evidence, seconds, passed)
    return table


def plain_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of any rows; numbers are right-aligned and shortened."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = list(rows[0]) if rows else []
    for name in names:
        numeric = all(isinstance(row[name], (int, float)) or row[name] is None for row in rows)
        table.add_column(name, justify="right" if numeric else "left", no_wrap=name == names[0])
    for row in rows:
        table.add_row(*[cell(row[name]) for name in names])
    return table


def cell(value: Any) -> str:
    """A table cell."""
    if value is None or (isinstance(value, float) and value != value):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a markdown table."""
    if not rows:
        return ""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell(row[name]).replace("|", "\\|") for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def markdown_report(data: Mapping[str, Any]) -> str:
    """The verification as a markdown document."""
    made = data["provenance"]
    outcomes = data["claims"]
    good = sum(o["passed"] for o in outcomes)
    machine = made["machine"]
    text = [
        "# Verification report\n",
        f"{good} of {len(outcomes)} claims verified as expected. A claim with the verdict *false* passes when its "
        "counterexample is confirmed; every claim also has a negative control, a deliberately wrong subject that the "
        "same check must reject.\n",
        f"- commit: {made['commit'] or 'not a git checkout'}{' (with local changes)' if made['dirty'] else ''}",
        f"- finished: {made['finished']}",
        f"- machine: {machine['processor']}, {machine['cores']} cores, {machine['system']}, device {machine['device']}",
        "- versions: " + ", ".join(f"{k} {v}" for k, v in made["versions"].items()),
        "- settings: " + ", ".join(f"{k}={v}" for k, v in made["configuration"].items()) + "\n",
    ]
    overview = [
        {
            "claim": f"[{o['id']}](#{_anchor(o['id'])}) {o['statement']}",
            "verdict expected": o["verdict"],
            "pass": o["passed"],
            "seconds": f"{o['seconds']:.1f}",
        }
        for o in outcomes
    ]
    text.append(markdown_rows(overview))
    for o in outcomes:
        text += [
            f"\n## {o['id']}\n",
            f"{o['statement']}\n",
            f"- verdict: **{o['verdict']}**; {ASSUMPTION_LABEL[o['verdict']]}: {o['assumptions']}",
            f"- source: {o['source']}",
            f"- negative control: {o['control']}: {'rejected' if o['control_rejected'] else '**not rejected**'}\n",
        ]
        rows = [
            {"what": e["what"], "engine": e["engine"], "found": e["found"], "holds": e["holds"]} for e in o["evidence"]
        ]
        text.append(markdown_rows(rows))
    for section in data.get("findings", []):
        text += [f"\n## {section['title']}\n", section["note"] + "\n", markdown_rows(section["rows"])]
    return "\n".join(text) + "\n"


def _anchor(identifier: str) -> str:
    return identifier.lower().replace(".", "")


def console() -> Console:
    """A console that keeps tables readable when the output is a file."""
    out = Console()
    return out if out.is_terminal else Console(width=140)
