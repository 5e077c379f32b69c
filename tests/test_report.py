"""The report: everything that was found is in it, readable, and nothing that was not."""

from __future__ import annotations

import html.parser
import json
import re

import pytest

from simulations import __main__ as cli
from simulations import report, results, sweep
from simulations.claims import CLAIMS, Context, Evidence, Outcome

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360000002000001e221bc330000000049454e44ae426082"
)


def outcome(identifier: str, verdict: str = "true if", passed: bool = True) -> dict:
    evidence = [Evidence("a < b & rho_{t-1} | *stars*", "enumeration", "found _this_", passed)]
    return Outcome(
        id=identifier,
        statement="Var(rho_t) < Var(rho_H) for f_1 and f_2.",
        verdict=verdict,
        assumptions="absolute continuity",
        source="here",
        evidence=evidence,
        control="the wrong one",
        control_rejected=True,
        passed=passed,
        seconds=0.25,
        conclusion="Use [it] with care.",
    ).as_dict()


def verification(*outcomes: dict) -> dict:
    findings = [{"group": "4", "title": "Findings", "note": "of one model", "rows": [{"name": "x_1_y", "|g|^2": 0.5}]}]
    return {"provenance": results.provenance({"seed": 3}), "claims": list(outcomes), "findings": findings}


VOID = ("meta", "img", "br", "hr")


class Reader(html.parser.HTMLParser):
    """Text, tags and anchors of a page; tags must be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.ids, self.links = "", set(), set()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found["id"]} if "id" in found else set()
        self.links |= {found["href"]} if "href" in found else set()
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_every_claim_has_a_chapter():
    groups = [group for chapter in report.CHAPTERS for group in chapter.groups]
    assert len(groups) == len(set(groups))
    assert {identifier.split(".")[0] for identifier in CLAIMS} <= set(groups)


def test_page_shows_the_text_as_it_is(tmp_path):
    text = report.markdown(verification(outcome("1.a"), outcome("4.b", "false", passed=False), outcome("99.c", "true")))
    reader = Reader()
    reader.feed(report.page(text, tmp_path))
    assert reader.open == []
    assert "|g|^2" in reader.text
    for shown in (
        "2 of 3 claims verified as expected",
        "Var(rho_t) < Var(rho_H) for f_1 and f_2.",
        "a < b & rho_{t-1} | *stars*",
        "found _this_",
        "Use [it] with care.",
        "true if absolute continuity",
        "NOT as expected in this run. false: absolute continuity",
        "Negative control: the wrong one: rejected",
        "x_1_y",
        "seed=3",
        "Other claims",
    ):
        assert shown in re.sub(r"\s+", " ", reader.text), shown
    places = {"claim-1-a", "claim-4-b", "claim-99-c", "chapter-1", "chapter-4", "chapter-99"}
    assert {link[1:] for link in reader.links} == places == reader.ids


def test_findings_stand_in_their_chapter():
    text = report.markdown(verification(outcome("4.a"), outcome("5.a")))
    assert text.index("### 4.a") < text.index("### Findings") < text.index("## 5. ")
    assert "Findings" not in report.markdown(verification(outcome("5.a")))


def test_studies_and_figures(tmp_path):
    (tmp_path / "one.png").write_bytes(PIXEL)
    study = {"provenance": results.provenance({"seed": 0}), "tables": [{"title": "T", "note": "n", "rows": [{"a": 1}]}]}
    text = report.markdown(
        verification(outcome("1.a")),
        {"grid": study},
        questions={"grid": "Which ratio?", "phase": "Least error?"},
        figures={"overview": "one.png", "grid": "one.png"},
    )
    page = report.page(text, tmp_path)
    reader = Reader()
    reader.feed(page)
    assert {link[1:] for link in reader.links} <= reader.ids >= {"study-grid", "study-phase"}
    assert page.count('src="data:image/png;base64,') == 2
    assert "one.png" not in page
    assert "python -m simulations run phase" in page
    assert "python -m simulations run grid" not in page


def test_command_line(tmp_path, monkeypatch, capsys):
    results.write_json(tmp_path / "verification.json", verification(outcome("1.a")))
    study = sweep.Study("made-up", "Why?", lambda *_: {}, dict, dict)
    monkeypatch.setattr(cli, "STUDIES", {"made-up": study})
    (tmp_path / "out" / "figures").mkdir(parents=True)
    (tmp_path / "out" / "figures" / "overview.png").write_bytes(PIXEL)
    assert cli.main(["report", "--results", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert "run made-up" in (tmp_path / "out" / "report.md").read_text()
    assert "overview.png" not in (tmp_path / "out" / "report.md").read_text()  # left by another run
    assert "<title>Importance ratios" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("content", [None, "{", "[]", json.dumps({"claims": []})])
def test_without_a_verification(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "verification.json").write_text(content)
    assert cli.main(["report", "--results", str(tmp_path)]) == 2
    assert "verification.json" in capsys.readouterr().err


def test_quick_outcomes_of_the_registry_fit(tmp_path):
    found = cli._verify_one("1.log", Context(0, True)).as_dict()
    assert report.anchor("1.log") in report.page(report.markdown(verification(found)), tmp_path)
