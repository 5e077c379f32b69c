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


@pytest.fixture(scope="module")
def arena_of_jails() -> Iterator[Arena]:
    """Bubblewrap as where namespaces within namespaces are refused: a jail for every session."""
    require_backend("bubblewrap")
    from ctpo.train._bubblewrap import Bubblewrap
    from ctpo.train.sandbox import Limits, Sandbox

    limits = Limits(**LIMITS)
    with Host() as host, Sandbox("bubblewrap", Bubblewrap(limits, nested=False), limits) as sandbox:
        yield Arena(host, sandbox)


# What could differ between the two forms of the jail: how it is mounted, who else is in it, how it ends.
OF_JAILS = [
    "abstract_datagram",
    "open_canary",
    "proc_environ",
    "sysctl",
    "kill_all",
    "daemon",
    "any_folder",
    "system_folders",
    "device_times",
    "own_executable",
    "setns",
    "unshare_user",
    "umount_proc",
    "fill_shm",
    "os_exit",
    "neighbor_files",
    "neighbor_processes",
    "left_files",
    "left_settings",
]


def expected(attack: Attack, backend: str) -> str:
    return attack.contained if backend == "bubblewrap" else attack.monty


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_is_contained(arena, attack):
    outcome = arena.run(attack)
    assert outcome.escapes == []
    assert outcome.damage == []
    pattern = expected(attack, arena.sandbox.backend)
    assert re.search(pattern, outcome.how), f"{outcome.how!r} does not match {pattern!r}"


@pytest.mark.parametrize("name", OF_JAILS)
def test_attack_is_contained_by_a_jail_of_its_own(arena_of_jails, name):
    outcome = arena_of_jails.run(BY_NAME[name])
    assert outcome.escapes == []
    assert outcome.damage == []
    assert re.search(BY_NAME[name].contained, outcome.how), outcome.how


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
    rows = [[re.sub(r"\\(.)", r"\1", cell) for cell in cells(line)] for line in text.splitlines()[2:]]
    return [row for row in rows if not row[0].startswith("**")]


def test_table_of_the_docs_has_every_attack_as_it_ended():
    rows: dict[str, Any] = {row[0].strip("`"): row[1:] for row in table_of_the_docs()}
    assert list(rows) == [attack.name for attack in ATTACKS]
    for name, (tries, *ends) in rows.items():
        assert tries == BY_NAME[name].tries
        for backend, end in zip(BACKENDS, ends, strict=True):
            patterns = expected(BY_NAME[name], backend)
            assert re.search(patterns, end) or re.search(patterns, f"contained: {end}"), (name, backend, end)


def test_programs_name_what_is_watched():
    """A typing error in the folder or the variable would let them pass for the wrong reason."""
    assert all("$directory" in BY_NAME[name].code for name in ("pickled_reply", "value_with_reduce", "same_path"))
    assert sandbox_arena.VARIABLE in BY_NAME["environ"].code
    with Host() as host:
        assert not [attack.name for attack in ATTACKS if re.search(r"\$[a-z]", host.fill(attack.code))]
