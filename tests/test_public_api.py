"""What `import ctpo` offers, what it costs, and that the examples in the docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from importlib.metadata import version

import pytest

import ctpo

# The plug-in can be imported beside verl only: tests_verl has its examples.
NOT_HERE = ("ctpo.__main__", "ctpo.verl_plugin")
MODULES = [
    "ctpo",
    *(module.name for module in pkgutil.walk_packages(ctpo.__path__, "ctpo.") if module.name not in NOT_HERE),
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(name), verbose=False)
    assert results.failed == 0


@pytest.mark.parametrize("name", [name for name in MODULES if not name.rpartition(".")[2].startswith("_")])
def test_every_public_name_is_documented_with_an_example(name):
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", []):
        thing = getattr(module, public)
        if inspect.isfunction(thing):
            assert ">>>" in (thing.__doc__ or ""), f"{name}.{public} has no example"
        elif inspect.isclass(thing):
            assert thing.__doc__, f"{name}.{public} has no docstring"


def test_public_names_are_exactly_the_listed_ones():
    assert len(set(ctpo.__all__)) == len(ctpo.__all__)
    names = {name for name in dir(ctpo) if not name.startswith("_")}
    visible = {name for name in names if not inspect.ismodule(getattr(ctpo, name))}
    assert visible == set(ctpo.__all__) - {"__version__"}
    assert ctpo.__version__ == version("ctpo")


def test_import_needs_numpy_and_array_api_compat_only():
    """Anything heavier must be imported by the function that needs it."""
    heavy = ("scipy", "torch", "arviz_stats", "matplotlib", "transformers", "joblib", "rich", "pandas", "jax")
    code = f"import ctpo, sys; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
