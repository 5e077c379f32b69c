"""How results read: tables for the terminal and for markdown."""

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


def claims_table(outcomes: Sequence[Mapping[str, Any]], *, every: bool = True) -> Table:
    """The table that `verify` prints: one row per claim, with its first evidence and what missed, or with all of it."""
    table = Table(title="Claims about importance ratios", show_lines=True, title_justify="left", expand=True)
    table.add_column("claim, verdict", no_wrap=True)
    table.add_column("statement", ratio=5)
    table.add_column(
        "evidence (by enumeration, dynamic programming, Monte Carlo, formula, recording)",
        ratio=7 if every else 4,
    )
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("pass", no_wrap=True)
    for outcome in outcomes:
        evidence = Text()
        shown = [item for k, item in enumerate(outcome["evidence"]) if every or k == 0 or not item["holds"]]
        for k, item in enumerate(shown):
            style = "" if item["holds"] else "bold red"
            evidence.append("\n" if k else "")
            evidence.append(f"{SHORT_ENGINE[item['engine']]} ", style="dim")
            evidence.append(item["found"], style=style)
        if hidden := len(outcome["evidence"]) - len(shown):
            evidence.append(f" (+{hidden} more)", style="dim")
        if not outcome["control_rejected"]:
            evidence.append(f"\nnegative control not rejected: {outcome['control']}", style="bold red")
        passed = Text("yes", style="green") if outcome["passed"] else Text("NO", style="bold red")
        statement = Text(outcome["statement"])
        if every or outcome["verdict"] != "true":
            statement.append(f"\n{ASSUMPTION_LABEL[outcome['verdict']]}: {outcome['assumptions']}", style="dim")
        seconds = f"{outcome['seconds']:.1f}"
        claim = Text.assemble(outcome["id"], (f"\n{outcome['verdict']}", "bold"))
        table.add_row(claim, statement, evidence, seconds, passed)
    return table


def plain_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of any rows; numbers are right-aligned and shortened."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = list(rows[0]) if rows else []
    for name in names:
        numeric = all(isinstance(row[name], (int, float)) or row[name] is None for row in rows)
        table.add_column(Text(name), justify="right" if numeric else "left", no_wrap=name == names[0])
    for row in rows:
        table.add_row(*[Text(cell(row[name])) for name in names])  # as text: [t] is no markup
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
    lines = ["| " + " | ".join(name.replace("|", "\\|") for name in names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell(row[name]).replace("|", "\\|") for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def console() -> Console:
    """A console that keeps tables readable when the output is a file."""
    out = Console()
    return out if out.is_terminal else Console(width=140)
