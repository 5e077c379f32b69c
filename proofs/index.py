"""The table of proofs/README.md: each claim, its verdict, and where it is proved, checked and tested.

Statement and verdict come from the registry of claims, the rest from the pages; tests/test_proofs.py compares the pages
with the Rocq files, the derivations, the code and the tests.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from proofs import FOLDER
from proofs.pages import Page, pages
from simulations.claims import CLAIMS
from simulations.results import write_text

__all__ = ["INDEX", "table", "with_table", "write"]

INDEX = FOLDER / "README.md"
BEGIN, END = "<!-- table: begin, written by `python -m proofs index` -->", "<!-- table: end -->"


def _escaped(text: str) -> str:
    for character in "\\|*<>$[]_`":
        text = text.replace(character, f"\\{character}")
    return text


def table(known: list[Page]) -> str:
    """The claims in Markdown, a table per page; pages by their first claim, claims in the order of the registry."""
    where = {use.claim: (page, use) for page in known for use in page.uses}
    lines, grouped = [], defaultdict(list)
    for identifier in CLAIMS:
        if identifier in where:
            grouped[where[identifier][0].file].append(identifier)
    for file, ids in grouped.items():
        lines += [
            f"### [{where[ids[0]][0].title}]({file})",
            "",
            "| claim | statement | verdict | human proof | Rocq theorem | symbolic | simulation | test |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for identifier in ids:
            page, use = where[identifier]
            cells = [
                identifier,
                _escaped(CLAIMS[identifier].statement),
                CLAIMS[identifier].verdict,
                f"[{page.file.removesuffix('.md')}]({page.file}#{identifier})",
                ", ".join(f"`{name}`" for name in use.theorems) or "-",
                ", ".join(f"`{name}`" for name in use.derivations) or "-",
                ", ".join(f"[{Path(name).stem}](../{name})" for name in use.simulations) or "-",
                ", ".join(f"[{name.partition('::')[2]}](../{name.partition('::')[0]})" for name in use.tests) or "-",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """The index's text with the table as it should be.

    Raises:
        ValueError: The lines between which it belongs are not there once each.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"proofs/README.md must hold the lines {BEGIN!r} and {END!r} once each")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(pages())}\n{END}{rest.partition(END)[2]}"


def write() -> None:
    """Write the table into proofs/README.md."""
    text = with_table(INDEX.read_text(encoding="utf-8"))
    write_text(INDEX, text)
