"""The human proofs: what each page says about which claim, and the tables in which it says so.

Every page has the headings of `HEADINGS`. A claim's statement carries its id as an anchor; a row of the table under
"Where it is used" says where else the claim is; a table after `<!-- counterexample: NAME -->` shows the numbers of
that entry of counterexamples.json.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from proofs import FOLDER

__all__ = ["HEADINGS", "Page", "Use", "pages"]

HEADINGS = (
    "Statement",
    "Assumptions",
    "Proof",
    "Where it is used",
    "What breaks without each assumption",
    "The smallest counterexample",
)
COLUMNS = ("claim", "machine-checked", "symbolic", "simulation", "code", "tests")


@dataclass(frozen=True)
class Use:
    """A row of the table under "Where it is used": the names in each column, none for a dash."""

    claim: str
    theorems: tuple[str, ...]
    derivations: tuple[str, ...]
    simulations: tuple[str, ...]
    code: tuple[str, ...]
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """A page of human proofs.

    Attributes:
        file: Its name.
        title: Its title.
        headings: Its second-level headings, in order.
        claims: Claim ids and the verdict stated beside each, in order.
        uses: The rows under "Where it is used".
        tables: Name of each counterexample shown, and its quantities with their values.
    """

    file: str
    title: str
    headings: tuple[str, ...]
    claims: dict[str, str]
    uses: tuple[Use, ...]
    tables: dict[str, dict[str, Fraction]]


def rows(text: str) -> list[list[str]]:
    """The cells of the first table of a text, its header first, without the line of dashes."""
    lines = []
    for line in text.splitlines():
        if line.startswith("|"):
            lines.append(line)
        elif lines:
            break
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in lines]
    return [row for row in cells if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]


def _names(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", cell))


def read(path: Path) -> Page:
    """Read one page.

    Raises:
        ValueError: A table has other columns, or a claim has two statements; the page and the place are named.
    """
    text = path.read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    sections = {name.strip(): body for name, body in zip(parts[1::2], parts[2::2], strict=True)}
    stated = re.findall(r'<a id="([^"]+)"></a>\s*\*\*([^*]+?)\*\*\s*\((true if|true|false)\b', text)
    claims = {anchor: verdict for anchor, _, verdict in stated}
    wrong = [anchor for anchor, name, _ in stated if anchor != name.strip(" .:")]
    if wrong or len(claims) != len(stated) or text.count('<a id="') != len(stated):
        raise ValueError(
            f'{path.name}: each claim needs one `<a id="ID"></a>**ID** (verdict ...`; found {sorted(claims)}, '
            f"{text.count('<a id=')} anchors, and another id beside {wrong}"
        )
    header, *body = rows(sections.get("Where it is used", "")) or [[]]
    if tuple(header) != COLUMNS or any(len(row) != len(COLUMNS) for row in body):
        raise ValueError(f"{path.name}: the table under `Where it is used` needs the columns {', '.join(COLUMNS)}")
    uses = tuple(Use(row[0].strip("`* "), *map(_names, row[1:])) for row in body)
    tables = {}
    shown = re.split(r"<!-- counterexample: ([\w-]+) -->\n", text)
    for name, after in zip(shown[1::2], shown[2::2], strict=True):
        tables[name] = {row[0]: Fraction(row[1].strip("$` ")) for row in rows(after)[1:]}
    title = re.match(r"# (.+)", text)
    return Page(path.name, title[1] if title else "", tuple(sections), claims, uses, tables)


def pages(folder: Path = FOLDER) -> list[Page]:
    """All pages, by name; README.md is the index."""
    return [read(path) for path in sorted(folder.glob("*.md")) if path.name != "README.md"]
