"""Hostile programs on each backend: nothing of the host or of other sessions is reached, and all go on working."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import sandbox_arena
from sandbox_arena import LIMITS, PAGE, Arena, Host, cells, run_unconfined
from sandbox_attacks import ATTACKS, Attack
from sandbox_backends import BACKENDS, require_backend

BY_NAME = {attack.name: attack for attack in ATTACKS}
CONTROLS = [attack for attack in ATTACKS if attack.control]


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as opened:
        yield opened


@pytest.fixture(scope="module", params=BACKENDS)
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    require_backend(request.param)
    from ctpo.train.sandbox import Limits, open_sandbox

    with Host() as host, open_sandbox(request.param, limits=Limits(**LIMITS)) as sandbox:
        yield Arena(host, sandbox)


def expected(attack: Attack, backend: str) -> str:
    return attack.contained if backend == "bubblewrap" else attack.monty


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_is_contained(arena, attack):
    outcome = arena.run(attack)
    assert outcome.escapes == []
    assert outcome.damage == []
    pattern = expected(attack, arena.sandbox.backend)
    assert re.search(pattern, outcome.how), f"{outcome.how!r} does not match {pattern!r}"


@pytest.mark.parametrize("attack", CONTROLS, ids=lambda attack: attack.name)
def test_attack_succeeds_where_nothing_isolates(host, attack):
    """The programs do what they say, and the watch sees it."""
    assert run_unconfined(host, attack) != []


def test_attacks_are_many_and_of_every_kind():
    assert len(BY_NAME) == len(ATTACKS) >= 70
    assert len(CONTROLS) >= 30
    assert len({attack.kind for attack in ATTACKS}) >= 10
    assert {attack.kind for attack in CONTROLS} >= {"network", "reading", "environment", "processes", "writing"}


def test_watch_sees_what_was_done_to_the_host(host):
    """Each check of `Host.changes` fails by itself."""
    host.reset()
    assert host.changes() == []
    host.canary.write_text("else", encoding="utf-8")
    assert host.changes() == ["the file of the host was changed"]
    host.reset()
    (host.directory / "new").touch()
    assert host.changes() == ["new in the folder of the host: ['new']"]
    host.reset()
    host.victim.kill()
    host.victim.wait()
    assert host.changes() == ["a process of the host was killed or stopped"]
    host.reset()
    assert host.changes() == []


def table_of_the_docs() -> list[list[str]]:
    text = PAGE.read_text(encoding="utf-8").split("<!-- attacks -->\n")[1]
    rows = [cells(line) for line in text.splitlines()[2:]]
    return [row for row in rows if not row[0].startswith("**")]


def test_table_of_the_docs_has_every_attack_as_it_ended():
    rows: dict[str, Any] = {row[0].strip("`"): row[1:] for row in table_of_the_docs()}
    assert list(rows) == [attack.name for attack in ATTACKS]
    for name, (tries, *ends) in rows.items():
        assert tries == BY_NAME[name].tries
        for backend, end in zip(BACKENDS, ends, strict=True):
            end = re.sub(r"\\(.)", r"\1", end)
            patterns = expected(BY_NAME[name], backend)
            assert re.search(patterns, end) or re.search(patterns, f"contained: {end}"), (name, backend, end)


def test_unpickled_files_would_be_seen():
    """The programs that write to the host's folder name the folder that is watched."""
    assert all("$directory" in BY_NAME[name].code for name in ("pickled_reply", "value_with_reduce", "same_path"))
    assert sandbox_arena.VARIABLE in BY_NAME["environ"].code
