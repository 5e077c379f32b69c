"""The docs: what they link to exists, and the report that is committed speaks of the claims as they are."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

import ctpo
from ctpo.losses import Aggregation
from simulations.claims import CLAIMS
from simulations.report import _escaped, anchor

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
REPORT = DOCS / "report" / "report.md"
# Pages whose examples say for themselves, by assertions or by what they print, whether they are right.
AROUND = ("trainer", "sandbox", "tools", "rewards", "data", "evaluation")
TRAINING = (DOCS / "training.md").read_text(encoding="utf-8")
EXAMPLES = {
    f"{page.stem}-{name}": code
    for page in PAGES
    for name, code in re.findall(
        r"<!-- example: (\w+) -->\n```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
}


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


@pytest.mark.parametrize(("page", "least"), [("which_ratio", 30), ("training", 20), ("estimators", 4)])
def test_named_claims_are_linked_to_their_own_place(page, least):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    named = re.findall(r"\[([\w.]+)\]\(report/report\.md#(claim-[^)]+)\)", text)
    assert len(named) >= least
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


def run_example(name):
    scope: dict[str, object] = {}
    exec(compile(EXAMPLES[name], f"example {name}", "exec"), scope)
    return scope


def test_every_example_of_the_guide_has_a_test():
    assert TRAINING.count("```python") == TRAINING.count("<!-- example: ")
    names = {name.removeprefix("training-") for name in EXAMPLES if name.startswith("training-")}
    assert names == {"loop", "data_parallel", "rollout", "sharded", "packed", "bf16", "compile"}
    others = {name for name in EXAMPLES if name.partition("-")[0] not in AROUND}
    assert others - {f"training-{name}" for name in names} == {"estimators-own"}


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.partition("-")[0] in AROUND])
def test_example_around_the_trainer(name, tmp_path):
    """As its reader would run it: a script, without a guard for multiprocessing, in a directory of its own."""
    (tmp_path / "example.py").write_text(EXAMPLES[name], encoding="utf-8")
    found = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("page", AROUND)
def test_every_example_around_the_trainer_is_run(page):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert text.count("```python") == text.count("<!-- example: ") > 0


def test_loop_learns():
    history = run_example("training-loop")["history"]
    assert history[0] < 2
    assert history[-1] > 8


@pytest.mark.parametrize("name", ["data_parallel", "sharded"])
def test_example_on_two_processes(name, tmp_path):
    (tmp_path / "example.py").write_text(EXAMPLES[f"training-{name}"], encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "example.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    # The processes write to one pipe: a line of one may end after that of the other.
    differences = re.findall(r"differ by (\d\.\de[+-]\d+)", found.stdout)
    assert len(differences) == 2, found.stdout
    assert max(map(float, differences)) < 1e-6
    losses = re.findall(r"loss (\S+), whole (\S+),", found.stdout)
    assert len(losses) == (2 if name == "sharded" else 0)
    assert all(loss == whole for loss, whole in losses)


def test_rollout_example_reports_both_ratios():
    scope = run_example("training-rollout")
    assert scope["loss"].isfinite()
    assert {"rollout/weight_mean", "rollout/weight_mean_raw", "clip/total"} <= set(scope["metrics"])


def test_packed_example_is_the_loss_of_its_sequences():
    scope = run_example("training-packed")
    logp = scope["logp"].detach().clone().requires_grad_()
    ends = scope["cu_seqlens"].tolist()
    for advantage, low, high in zip(scope["advantages"], ends, ends[1:], strict=False):
        part = slice(low, high)
        loss = ctpo.policy_loss(logp[None, part], scope["behavior_logp"][None, part], advantage[None]).loss
        (loss / 3).backward()
    assert torch.allclose(scope["logp"].grad, logp.grad, rtol=1e-5)


def test_bfloat16_example_shows_what_it_says(capsys):
    run_example("training-bf16")
    spreads = [float(text) for text in re.findall(r"spread (\S+) per token", capsys.readouterr().out)]
    assert spreads[0] == 0.0
    assert 0.002 < spreads[1] < 0.02
    assert abs(torch.tensor(-5 - 0.0155).bfloat16() + 5 + 0.0155) < 0.016
    assert abs(torch.tensor(-5 - 0.0155).bfloat16() + 5 + 0.0155) > 0.015


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_compile_example_gives_the_same_loss(monkeypatch):
    """Without the code generator, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    scope = run_example("training-compile")
    logp = scope["logp"].detach().clone().requires_grad_()
    loss = ctpo.policy_loss(logp, scope["behavior_logp"], torch.tensor([1.0, -1.0, 0.5, -0.5])).loss
    loss.backward()
    assert torch.allclose(scope["loss"], loss)
    assert torch.allclose(scope["logp"].grad, logp.grad)


def test_estimators_example_shows_a_window_and_a_region_acting():
    scope = run_example("estimators-own")
    assert scope["found"].clipped_high.any()
    assert scope["found"].rejected.any()


def test_guide_has_every_metric_and_aggregation():
    table = TRAINING.split('<a id="metrics"></a>')[1].split('<a id="verl"></a>')[0]
    named = {name for row in re.findall(r"^\| (`[^|]+) \|", table, flags=re.MULTILINE) for name in row.split(", ")}
    logp = torch.zeros(2, 64)
    metrics = ctpo.policy_loss(logp, logp, torch.zeros(2)).metrics
    assert named - {"..."} == {f"`{name}`" for name in metrics}
    table = TRAINING.split('<a id="aggregation"></a>')[1].split('<a id="accumulation"></a>')[0]
    assert tuple(re.findall(r"^\| `([\w-]+)`", table, flags=re.MULTILINE))[1:] == get_args(Aggregation)


def test_estimators_are_the_same_where_every_ratio_is_one():
    """As the guide says: on-policy they differ in their aggregation only."""
    torch.manual_seed(0)
    behavior_logp, advantages = -torch.rand(4, 9, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    gradients = []
    for name in ctpo.ESTIMATORS:
        logp = behavior_logp.clone().requires_grad_()
        ctpo.policy_loss(logp, behavior_logp, advantages, estimator=name, aggregation="token-mean").loss.backward()
        gradients.append(logp.grad)
    assert all(torch.allclose(gradient, gradients[0], rtol=1e-12) for gradient in gradients)
