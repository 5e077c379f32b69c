"""What the tests of the sandbox need from the machine: a backend that can isolate here, or a skip that says why not.

`CTPO_REQUIRE=bubblewrap,monty` turns the skip into a failure, for machines on which the backends must work.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

BACKENDS = ("bubblewrap", "monty")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def require_backend(name: str) -> None:
    """Skip the test where the backend cannot run; fail it where `CTPO_REQUIRE` names the backend."""
    reason = _reasons()[name]
    if not reason:
        return
    if name in [part.strip() for part in os.environ.get("CTPO_REQUIRE", "").split(",")]:
        pytest.fail(f"CTPO_REQUIRE names {name}, which cannot run here: {reason}", pytrace=False)
    pytest.skip(f"{name} cannot run here: {reason}")


@functools.cache
def _reasons() -> dict[str, str]:
    from ctpo.train.sandbox import backends

    return backends()


def sandbox_fixture(scope: Any = "module", **limits: Any) -> Callable[..., Any]:
    """A fixture: one open sandbox of each backend in turn, `sandbox = sandbox_fixture(timeout=2.0)`."""

    @pytest.fixture(scope=scope, params=BACKENDS)
    def sandbox(request: pytest.FixtureRequest) -> Iterator[Any]:
        require_backend(request.param)
        from ctpo.train.sandbox import Limits, open_sandbox

        with open_sandbox(request.param, limits=Limits(**limits)) as opened:
            yield opened

    return sandbox
