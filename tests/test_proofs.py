"""The proofs: the index is true, the numbers agree in all places, and what the machine checked is what is claimed."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

import proofs
from proofs import COUNTEREXAMPLES, FOLDER, __main__, counterexample, counterexamples, index, machine
from proofs.pages import HEADINGS, pages, read, rows
from proofs.symbolic import DERIVATIONS
from simulations.claims import CLAIMS

ROOT = FOLDER.parent
PAGES = pages()
USES = {use.claim: (page, use) for page in PAGES for use in page.uses}
THEOREMS = machine.theorems(machine.sources())

#: Theorems that must be there: what a claim's other theorems would not make up for.
MACHINE_CHECKED = {
    *("change_of_measure", "policy_gradient"),
    *("claim_1_martingale", "claim_1_martingale_between", "claim_1_martingale_conditional"),
    *(
        "claim_1_variance",
        "claim_1_variance_monotone",
        "claim_1s_strict",
        "claim_1s_strict_equal",
        "claim_1s_strict_example",
    ),
    *("claim_1_optimal", "claim_1_optimal_variance", "claim_1_optimal_unique", "claim_1_optimal_among_unbiased"),
    *("claim_3_prop1", "claim_3_prop1_gradient", "claim_3_prop1_derivative"),
    *("claim_4_expectation", "claim_4_expectation_bias"),
    *("claim_4_lookahead", "claim_4_lookahead_exact", "claim_4_doubly_robust", "claim_4_unbiased_sign"),
    *(
        "claim_2_product",
        "claim_2_product_reachable",
        "claim_2_recursion",
        "claim_2_general_more",
        "claim_2_general_less",
    ),
    *(
        "claim_2r_bounds_ratio",
        "claim_2r_bounds",
        "claim_5_identity",
        "claim_5_identity_same_token",
        "claim_5_orthogonal",
    ),
    *("claim_5_ordered_A", "claim_5_ordered_B", "claim_6_std_sign", "claim_6_clip_identity", "claim_6_clip_sign"),
    *("claim_6_length_prop1_example", "claim_7_power", "claim_7_power_sqrt", "claim_7_power_rational"),
}


@cache
def functions(file: str) -> set[str]:
    """Names of the functions and the classes of a Python file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def sources_of(folder: str) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / folder).rglob("*.py")))


# --- the index ------------------------------------------------------------------------------------------------------


def test_every_claim_is_stated_once_and_has_its_row():
    stated = [identifier for page in PAGES for identifier in page.claims]
    assert sorted(stated) == sorted(CLAIMS)
    for page in PAGES:
        assert [use.claim for use in page.uses] == list(page.claims), page.file


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.file)
def test_page_has_every_heading_in_order(page):
    assert page.title
    assert page.headings == HEADINGS
    text = (FOLDER / page.file).read_text(encoding="utf-8")
    for heading, body in zip(HEADINGS, re.split(r"^## .+$", text, flags=re.MULTILINE)[1:], strict=True):
        assert len(body.split()) >= 5, heading


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.file)
def test_page_gives_each_claim_the_verdict_of_the_registry(page):
    assert page.claims == {identifier: CLAIMS[identifier].verdict for identifier in page.claims}


@pytest.mark.parametrize("identifier", CLAIMS)
def test_what_a_row_names_exists(identifier):
    _, use = USES[identifier]
    named_after_it = {t.name for t in THEOREMS if machine.claim_of(t.name, CLAIMS) == identifier}
    assert set(use.theorems) == named_after_it
    assert set(use.derivations) == {name for name, made in DERIVATIONS.items() if identifier in made().claims}
    module = CLAIMS[identifier].check
    while not hasattr(module, "__module__") or module.__module__ == "functools":
        module = module.func
    assert module.__module__.replace(".", "/") + ".py" in use.simulations
    for name in use.simulations:
        assert (ROOT / name).is_file(), name
    for name in use.code:
        package, *attributes = name.split(".")
        assert package == "ctpo", name
        found = importlib.import_module(package)
        for attribute in attributes:
            found = getattr(found, attribute, None) or importlib.import_module(f"{found.__name__}.{attribute}")
    assert use.tests
    for name in use.tests:
        file, _, function = name.partition("::")
        assert function in functions(file), name


def test_theorems_are_named_after_claims_and_only_they_are_called_theorems():
    strangers = {t.name for t in THEOREMS if machine.claim_of(t.name, CLAIMS) is None}
    assert strangers == GENERAL
    assert len({t.name for t in THEOREMS}) == len(THEOREMS)


#: Theorems that serve many claims.
GENERAL = {"change_of_measure", "policy_gradient", "policy_gradient_first_order"}


def test_what_must_be_machine_checked_is():
    assert MACHINE_CHECKED - {theorem.name for theorem in THEOREMS} == set()


def test_readme_has_the_table_that_the_pages_give():
    text = index.INDEX.read_text(encoding="utf-8")
    assert index.with_table(text) == text, "run `python -m proofs index`"


def test_links_of_the_pages_lead_somewhere():
    for path in FOLDER.glob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if target and not target.startswith("http"):
                found = (path.parent / target).resolve()
                assert found.exists(), f"{path.name}: {target}"
                # A clone has no results until somebody runs the commands that write them.
                assert (ROOT / "results") not in (found, *found.parents), (
                    f"{path.name}: {target} is made, not committed"
                )


# --- the counterexamples --------------------------------------------------------------------------------------------


def test_counterexamples_are_fractions_in_lowest_terms():
    for name, entry in counterexamples().items():
        assert set(entry) == {"claim", "world", "theorem", "numbers"}, name
        assert entry["claim"] in CLAIMS
        assert entry["numbers"], name
        for value in entry["numbers"].values():
            assert str(Fraction(value)) == value, name


@pytest.mark.parametrize("name", counterexamples())
def test_numbers_agree_with_the_page_and_the_theorem(name):
    entry = counterexamples()[name]
    page, _ = USES[entry["claim"]]
    assert page.tables.get(name) == counterexample(name)
    if entry["theorem"] is not None:
        assert machine.claim_of(entry["theorem"], CLAIMS) == entry["claim"]


def test_theorems_have_the_numbers_of_the_counterexamples():
    assert machine.differing_numbers(THEOREMS, counterexamples()) == []


@pytest.mark.parametrize("folder", ["simulations", "tests"])
def test_simulations_and_tests_read_every_counterexample(folder):
    text = sources_of(folder)
    assert [name for name in counterexamples() if f'"{name}"' not in text] == []


def test_pages_show_no_counterexample_that_is_not_in_the_file():
    assert {name for page in PAGES for name in page.tables} == set(counterexamples())


def test_unknown_counterexample_is_named():
    with pytest.raises(KeyError, match=r"name = 'none' is not in counterexamples\.json; it has"):
        counterexample("none")


def test_examples_of_the_docstrings_run():
    for module in (proofs, machine):
        failures, tried = doctest.testmod(module)
        assert (bool(tried), failures) == (True, 0)


# --- the readers ----------------------------------------------------------------------------------------------------


def rocq(tmp_path: Path, text: str, project: str = "-Q . ctpo\nA.v\n") -> list[Path]:
    (tmp_path / "A.v").write_text(text)
    (tmp_path / "_CoqProject").write_text(project)
    return machine.sources(tmp_path)


def test_theorems_are_read_with_their_numbers(tmp_path):
    text = """(* Theorem claim_0 : in a comment (* nested *). *)
Theorem claim_1_x n :
  [/\\ f n = - 3%:R / 4%:R (* the
    slope *),
      g = 0 (* nothing *) & h = (1%:R / 2%:R) (* half *)].
Proof. by []. Qed.
"""
    (found,) = machine.theorems(rocq(tmp_path, text))
    assert (found.name, found.line) == ("claim_1_x", 2)
    assert machine.numbers(found) == [
        ("the slope", Fraction(-3, 4)),
        ("nothing", Fraction(0)),
        ("half", Fraction(1, 2)),
    ]


def test_differences_of_numbers_are_found(tmp_path):
    text = "Theorem claim_1_x : f = 1%:R / 2%:R (* half *).\nProof. by []. Qed.\n"
    stated = machine.theorems(rocq(tmp_path, text))
    entry = {"claim": "1", "theorem": "claim_1_x", "numbers": {"half": "1/2"}}
    assert machine.differing_numbers(stated, {"x": entry}) == []
    for numbers in ({"half": "1/3"}, {"halves": "1/2"}, {"half": "1/2", "third": "1/3"}, {}):
        assert machine.differing_numbers(stated, {"x": {**entry, "numbers": numbers}})
    assert machine.differing_numbers(stated, {"x": {**entry, "theorem": "claim_1_y"}})
    assert machine.differing_numbers(stated, {})


@pytest.mark.parametrize("word", ["Admitted", "admit", "Axiom", "Parameter", "Axioms", "Conjecture"])
def test_claims_without_proof_are_found(tmp_path, word):
    files = rocq(tmp_path, f"(* {word} *)\nLemma x : True.\n{word} y.\n")
    assert machine.forbidden(files) == [f"A.v:3: {word}"]


def test_sources_have_no_claims_without_proof():
    assert machine.forbidden(machine.sources()) == []


def test_every_file_must_be_in_the_project(tmp_path):
    with pytest.raises(machine.ProofError, match=r"differ in A\.v"):
        rocq(tmp_path, "", "-Q . ctpo\n")


def test_longest_claim_is_meant():
    ids = ["6.std", "6.std_sign", "T1", "T1.grid"]
    assert machine.claim_of("claim_6_std_sign_flip", ids) == "6.std_sign"
    assert machine.claim_of("claim_T1", ids) == "T1"
    assert machine.claim_of("claim_T1_grid", ids) == "T1.grid"
    assert machine.claim_of("claim_6_stdx", ids) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("(true if", "(perhaps", "each claim needs one"),
        ("| symbolic |", "| sympy |", "needs the columns"),
    ],
)
def test_malformed_page_is_named(tmp_path, old, new, message):
    page = tmp_path / "page.md"
    text = (FOLDER / "martingale.md").read_text(encoding="utf-8")
    assert old in text
    page.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"page\.md: .*{message}"):
        read(page)


def test_rows_end_where_the_table_ends():
    assert rows("x\n| a | b |\n|---|:-:|\n| 1 \\| 2 | 3 |\n\n| other |\n") == [["a", "b"], ["1 \\| 2", "3"]]


# --- the machine ----------------------------------------------------------------------------------------------------


def need_rocq() -> None:
    """Skip where Rocq cannot be asked; fail where `CTPO_REQUIRE` names it."""
    missing = machine.missing_packages()
    if not missing:
        return
    reason = f"the machine's proofs were NOT checked: missing Debian packages {' '.join(missing)}"
    if "rocq" in os.environ.get("CTPO_REQUIRE", "").split(","):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def test_machine_checks_every_theorem():
    need_rocq()
    done = subprocess.run([sys.executable, "-m", "proofs"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    for theorem in THEOREMS:
        assert re.search(rf"^{theorem.name} +none +proofs/rocq/{theorem.file}:", done.stdout, re.MULTILINE)
    assert f"{len(THEOREMS)} theorems, {len(THEOREMS)} of them rest on no axiom" in done.stdout


def test_an_axiom_is_seen(tmp_path):
    need_rocq()
    text = """Section S.
Variable n : nat.
Theorem claim_1_premise : n = n.
Proof. reflexivity. Qed.
End S.
Variable free : 1 = 2.
Theorem claim_1_free : 1 = 2.
Proof. exact free. Qed.
"""
    files = rocq(tmp_path, text, "-Q . ctpo\n-arg -w -arg none\nA.v\n")
    machine.compile_files(tmp_path)
    answers = machine.assumptions(machine.theorems(files), tmp_path)
    assert answers["claim_1_premise"] == machine.CLOSED
    assert "free : 1 = 2" in answers["claim_1_free"]


def test_what_does_not_compile_is_reported(tmp_path):
    need_rocq()
    rocq(tmp_path, "Theorem claim_1_wrong : 1 = 2.\nProof. reflexivity. Qed.\n")
    with pytest.raises(machine.ProofError, match="Unable to unify"):
        machine.compile_files(tmp_path)


@pytest.fixture
def without_rocq(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def test_missing_packages_are_named(without_rocq, capsys):
    assert __main__.main([]) == 2
    printed = capsys.readouterr().err
    assert "NOT checked" in printed
    for package in machine.PACKAGES:
        assert package in printed


def test_wrong_numbers_fail_the_check(monkeypatch, tmp_path, capsys):
    """Without asking Rocq again, which takes a minute: the numbers are compared with the sources."""
    monkeypatch.setattr(machine, "missing_packages", list)
    monkeypatch.setattr(machine, "compile_files", lambda: None)
    monkeypatch.setattr(machine, "assumptions", lambda stated: {t.name: machine.CLOSED for t in stated})
    answer = SimpleNamespace(stdout="The Coq Proof Assistant, version 0")
    monkeypatch.setattr(__main__.subprocess, "run", lambda *_, **__: answer)
    entries = json.loads(COUNTEREXAMPLES.read_text(encoding="utf-8"))
    name = next(name for name, entry in entries.items() if entry["theorem"])
    quantity = next(iter(entries[name]["numbers"]))
    entries[name]["numbers"][quantity] = "17/19"
    changed = tmp_path / "counterexamples.json"
    changed.write_text(json.dumps(entries))
    monkeypatch.setattr(__main__, "COUNTEREXAMPLES", changed)
    assert __main__.main(["check"]) == 1
    assert f"WRONG: counterexample {name} and the theorem {entries[name]['theorem']} differ in {quantity}" in (
        capsys.readouterr().err
    )
