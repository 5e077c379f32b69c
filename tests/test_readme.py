"""The README: its examples run, its table is the registry's, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ctpo
from simulations import report
from simulations.claims import CLAIMS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", README, flags=re.DOTALL))


def test_examples_are_found():
    assert set(EXAMPLES) == {"numpy", "torch", "diagnose"}
    assert README.count("```python") == len(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, capsys):
    scope: dict[str, object] = {}
    exec(compile(EXAMPLES[name], f"README example {name}", "exec"), scope)
    printed = capsys.readouterr().out
    if name == "numpy":
        assert "log rho after 1000 tokens" in printed
    elif name == "torch":
        # The documented gradient: -weight * advantage * grad logp, the mean over sequences of the mean over tokens.
        logits, advantages, torch = scope["logits"], scope["advantages"], scope["torch"]
        logp, behavior_logp = scope["logp"].detach(), scope["behavior_logp"]
        weight = ctpo.get_estimator("ctpo").coefficients(logp, behavior_logp, advantages).weight
        scores = torch.nn.functional.one_hot(scope["tokens"], 11) - torch.softmax(logits.detach(), -1)
        expected = -(weight * advantages[:, None])[..., None] * scores / scope["tokens"].numel()
        assert torch.allclose(logits.grad, expected)
        assert weight.count_nonzero() > 0
        assert "clip/total" in printed
    else:
        assert "E rho_t" in printed or "Mean" in printed


def test_table_is_that_of_the_registry():
    outcomes = [{"id": name, "verdict": claim.verdict, "passed": True} for name, claim in CLAIMS.items()]
    seconds = int(re.findall(r"All as expected, in (\d+) s on (\d+) cores", README)[0][0])
    verification = {"claims": outcomes, "provenance": {"seconds": seconds, "machine": {"cores": 2}}}
    assert report.readme(README, verification) == README
    assert len(re.findall(r"^\| `", README.split("claims: end")[0], flags=re.MULTILINE)) == len(report.CHAPTERS)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"checks {len(CLAIMS)} claims in {len(report.CHAPTERS)} chapters" in " ".join(changelog.split())


def test_table_states_only_what_is_verified():
    outcomes = [{"id": "1.log", "verdict": "false", "passed": False}]
    with pytest.raises(ValueError, match=r"1\.log is not"):
        report.readme(README, {"claims": outcomes, "provenance": {}})
    with pytest.raises(ValueError, match="markers"):
        report.readme("no table", {"claims": [], "provenance": {}})


def test_images_and_links_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if "://" not in target]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_commands_are_the_makefiles():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
    for extra in re.findall(r'-e "\.\[([\w,]+)\]"', README):
        assert f'-e ".[{extra}]"' in makefile
