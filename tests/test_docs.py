"""The docs: what they link to exists, and the report that is committed speaks of the claims as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from simulations.claims import CLAIMS
from simulations.report import _escaped, anchor

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
REPORT = DOCS / "report" / "report.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"(?<!\\)\]\(([^)]+)\)", text) if "://" not in target]
    assert targets
    for target in targets:
        name, _, place = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if place:
            assert f'<a id="{place}"></a>' in file.read_text(encoding="utf-8"), target


def test_named_claims_are_linked_to_their_own_place():
    named = re.findall(
        r"\[([\w.]+)\]\(report/report\.md#(claim-[^)]+)\)", (DOCS / "which_ratio.md").read_text(encoding="utf-8")
    )
    assert len(named) > 30
    assert [(name, place) for name, place in named if name not in CLAIMS or anchor(name) != place] == []


def test_report_has_every_claim_as_it_is_registered():
    text = REPORT.read_text(encoding="utf-8")
    sections = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    found = {section.split(" · ")[0]: section for section in sections if " · " in section.split("\n")[0]}
    assert set(found) == set(CLAIMS)
    for identifier, claim in CLAIMS.items():
        assert found[identifier].startswith(f"{identifier} · {_escaped(claim.statement)}\n")
        assert f"\n**{claim.verdict}**" in found[identifier]
        assert _escaped(claim.conclusion) in found[identifier]
        assert "NOT as expected" not in found[identifier]
    assert ", changed" not in text, "made from a changed tree"


def test_tables_of_the_report_have_as_many_cells_in_every_row():
    widths = []
    for line in REPORT.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", line)))
        elif widths:
            assert len(set(widths)) == 1, line
            widths = []
