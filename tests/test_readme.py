"""The README: its examples run, its table is the registry's, its commands exist."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from simulations.claims import CLAIMS
from simulations.report import CHAPTERS

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
        # The documented gradient: -weight * advantage * grad logp, averaged over the tokens.
        logits, found, advantages = scope["logits"], scope["found"], scope["advantages"]
        torch = scope["torch"]
        scores = torch.nn.functional.one_hot(scope["tokens"], 11) - torch.softmax(logits.detach(), -1)
        expected = -(found.weight * advantages[:, None])[..., None] * scores / scope["tokens"].numel()
        assert torch.allclose(logits.grad, expected)
        assert found.weight.count_nonzero() > 0
    else:
        assert "E rho_t" in printed or "Mean" in printed


def test_table_has_every_chapter_with_what_it_finds():
    table = README.split("<!-- claims: begin -->")[1].split("<!-- claims: end -->")[0]
    rows = re.findall(r"^\| (`[^|]+`) \| \*\*(.*?)\*\* (.*) \| ([^|]*) \|$", table, flags=re.MULTILINE)
    assert len(rows) == len(CHAPTERS)
    for (groups, title, found, verdicts), chapter in zip(rows, CHAPTERS, strict=True):
        assert tuple(re.findall("`(.+?)`", groups)) == chapter.groups
        assert chapter.title.endswith(title.removesuffix("."))
        assert found == chapter.found
        counted = Counter(c.verdict for c in CLAIMS.values() if c.id.split(".")[0] in chapter.groups)
        assert {name: int(n) for n, name in re.findall(r"(\d+) (true if|true|false)", verdicts)} == counted
    counts = Counter(claim.verdict for claim in CLAIMS.values())
    head = f"{len(CLAIMS)} claims: {counts['true']} true, {counts['true if']} true under a stated assumption, "
    assert head + f"{counts['false']} false." in table


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
