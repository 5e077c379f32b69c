"""Hypothesis profiles, and the `xp` fixture: one test, every array library."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import array_api_compat
import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# `ci` gives the same examples on every run; `thorough` gives new ones and prints how to get a failure again.
settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "thorough", deadline=None, max_examples=1000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


class Backend:
    """An array library: arrays from nested lists or NumPy arrays, and back."""

    def __init__(self, library: ModuleType) -> None:
        self.name = library.__name__
        self._library = library
        self.xp = array_api_compat.array_namespace(library.asarray([0.0]))

    def __call__(self, values: Any, dtype: str | None = None) -> Any:
        """An array that the code under test must not write to: NumPy's are made read-only."""
        values = np.asarray(values)
        array = self.xp.asarray(np.array(values), dtype=None if dtype is None else self.dtype(dtype))
        if self.name == "numpy":
            array.setflags(write=False)
        return array

    def dtype(self, name: str) -> Any:
        return getattr(self._library, name)

    def numpy(self, array: Any) -> np.ndarray[Any, Any]:
        """Values as a NumPy array; fails if `array` is of another library."""
        assert array_api_compat.array_namespace(array) is self.xp
        return array.numpy() if self.name == "torch" else np.asarray(array)


@pytest.fixture(scope="session", params=[np, torch, array_api_strict], ids=lambda library: library.__name__)
def xp(request: pytest.FixtureRequest) -> Backend:
    return Backend(request.param)
