"""verl on a machine without an accelerator, and what its imports need; these tests run in verl's own environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Read by verl when it is imported. It ships platforms for accelerators only: `cpu_worker` adds one for the CPU, which
# takes verl's engines for CUDA, as they call the platform for everything that is of the device.
os.environ["VERL_PLATFORM"] = "cpu"
os.environ["VERL_ENGINE_DEVICE"] = "cuda"
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "ctpo"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The awkward batches of the project's own tests; `tests` itself is a package of verl's wheel here.
sys.path.append(str(Path(__file__).parents[1] / "tests"))

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "thorough", deadline=None, max_examples=1000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors as in the project's own tests, but not those that verl and what it imports cause."""
    torch.set_num_threads(1)
    for package in ("verl", "ray", "transformers", "tensordict", "hydra", "omegaconf", "torch", "google"):
        config.addinivalue_line("filterwarnings", f"ignore:::{package}(\\..*)?$")
