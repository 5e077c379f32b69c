"""What tells one evaluation from another: fingerprints, versions, and differences in words."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctpo.train._run_directory import read_json

if TYPE_CHECKING:
    from ctpo.train.generation import Generator

__all__ = ["changes_between", "describe_model", "digest", "machine", "named", "plain", "refuse_others", "versions"]

# Versions of what the samples or their scores depend on.
_PACKAGES = (
    "ctpo",
    "math-verify",
    "numpy",
    "pydantic-monty",
    "reasoning-gym",
    "sympy",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
    "vllm",
)
# Bytes at both ends of a file of weights that its fingerprint depends on; every step of training changes them.
_ENDS = 1 << 20
# Ids that a message lists.
_NAMED = 3


def describe_model(model: str | Path | Generator) -> dict[str, Any]:
    """The model's name and a fingerprint of what it is."""
    if not isinstance(model, (str, Path)):
        return {"name": f"{type(model).__module__}.{type(model).__qualname__}", "fingerprint": None}
    path = Path(model).expanduser()
    if path.is_file():
        fingerprint: str | None = digest(_ends_of(path))
    elif path.is_dir():
        fingerprint = _fingerprint(path)
    else:
        fingerprint = _hub_commit(str(model))
    return {"name": str(model), "fingerprint": fingerprint}


def _fingerprint(directory: Path) -> str:
    """Of the files that a model is made of: small ones whole, of weights the size and both ends."""
    found: dict[str, Any] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix in (".safetensors", ".gguf") or path.match("pytorch_model*.bin") or path.match("adapter*.bin"):
            found[path.name] = _ends_of(path)
        elif path.suffix in (".json", ".jinja", ".model", ".txt") and path.name != "trainer_state.json":
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    if (directory / "adapter_config.json").is_file() and not (directory / "config.json").exists():
        with contextlib.suppress(ValueError):
            base = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
            found["base model"] = describe_model(str(base))["fingerprint"] if base else None
    return digest(found)


def _ends_of(path: Path) -> list[Any]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_ENDS)
        file.seek(max(0, size - _ENDS))
        return [size, hashlib.sha256(start + file.read(_ENDS)).hexdigest()]


def _hub_commit(name: str) -> str | None:
    """The commit of a model of the Hub that lies in the cache; None before it was loaded for the first time."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", "adapter_config.json"):
        with contextlib.suppress(ValueError):  # no name that the Hub could have; loading says so
            path = try_to_load_from_cache(name, file)
            if isinstance(path, str):
                return Path(path).parent.name
    return None


def digest(thing: Any) -> str:
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def machine() -> dict[str, Any]:
    """What rounding may depend on besides versions."""
    import torch

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": platform.machine(), "threads": torch.get_num_threads(), "accelerator": accelerator}


def refuse_others(path: Path, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if changes := changes_between(begun, now):
        raise ValueError(
            f"{path} was begun otherwise: {'; '.join(changes)}. Go on with what it was begun with, choose another "
            "directory, or start again with --overwrite (overwrite=True)"
        )


def changes_between(
    before: Mapping[str, Any], now: Mapping[str, Any], names: tuple[str, str] = ("there", "now")
) -> list[str]:
    """What differs, in words."""
    texts: list[str] = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if key in ("model", "data"):
            texts += _changed_content(key, old, new, names)
        elif isinstance(old, Mapping) and isinstance(new, Mapping):
            texts += [f"{key}.{text}" for text in changes_between(old, new, names)]
        elif old != new:
            texts.append(f"{key} {_shown(old)} {names[0]}, {_shown(new)} {names[1]}")
    return texts


def _changed_content(key: str, old: Any, new: Any, names: tuple[str, str]) -> list[str]:
    """What differs in a model or in data, by content: what was moved is still the same."""
    old, new = ([entry] if isinstance(entry, Mapping) else entry for entry in (old, new))
    prints = [[entry["fingerprint"] for entry in entries] for entries in (old, new)]
    first, second = (", ".join(entry.get("name") or entry["source"] for entry in entries) for entries in (old, new))
    unknown = None in prints[0] + prints[1]
    if (first == second) if unknown else (prints[0] == prints[1]):
        return []
    if first == second:
        return [f"the {key} {first} has changed in between"]
    return [f"{key} {first} {names[0]}, {second} {names[1]}"]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def plain(value: Any) -> Any:
    """As JSON gives it back, so that settings can be compared with those in a file."""
    return json.loads(json.dumps(value, default=_json_value))


def _json_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def named(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
