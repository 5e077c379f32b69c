"""The work of an evaluation: answers are drawn and scored a chunk at a time, and a line says how far it is."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ctpo.train._run_directory import RunDirectory
from ctpo.train._run_settings import named

if TYPE_CHECKING:
    from ctpo.train.data import Problem
    from ctpo.train.generation import Generator, Sampling
    from ctpo.train.rewards import Rewards
    from ctpo.train.sandbox import Sandbox
    from ctpo.train.tools import ToolFormat, Tools

__all__ = ["BATCH_SIZE", "Draw", "Note", "chunks_of", "draw_all", "duration", "note_on_stderr", "silent"]

# Answers that are drawn together where nothing is said; vLLM is fast only with many.
BATCH_SIZE = {"transformers": 32, "vllm": 512}

Note = Callable[[str], None]


@dataclasses.dataclass
class Draw:
    """Draws and scores the answers of a chunk."""

    generator: Generator
    sandbox: Sandbox | None
    scorer: Rewards
    problems: list[Problem]
    sampling: Sampling
    tools: Tools
    max_rounds: int
    seed: int
    template: dict[str, Any]

    @functools.cached_property
    def form(self) -> ToolFormat:
        from ctpo.train.tools import tool_format

        return tool_format(
            self.generator.tokenizer,
            self.tools,
            backend="" if self.sandbox is None else self.sandbox.backend,
            eos_token_ids=self.generator.eos_token_ids,
            chat_template_kwargs=self.template,
        )

    def resolved(self, batch_size: int | None) -> dict[str, Any]:
        """What the defaults have become on this machine; samples depend on it as on what was asked for."""
        backend = {"TransformersGenerator": "transformers", "VllmGenerator": "vllm"}.get(type(self.generator).__name__)
        model = getattr(self.generator, "model", None)
        return {
            "backend": backend,
            "dtype": str(getattr(model, "dtype", None)).removeprefix("torch."),
            "device": str(getattr(model, "device", None)).partition(":")[0],
            "context": self.generator.context,
            "batch_size": batch_size or BATCH_SIZE.get(backend or "transformers"),
            "tools": self.form.name,
            "sandbox": None if self.sandbox is None else self.sandbox.backend,
        }

    def leave_out_long(self, skip: bool, note: Note) -> list[str]:
        """Leave out problems whose prompts leave no room for an answer, or refuse them; returns their ids."""
        context = self.generator.context
        if context is None:
            return []
        lengths = [len(self.form.prompt_ids(problem.prompt)) for problem in self.problems]
        long = [problem.id for problem, length in zip(self.problems, lengths, strict=True) if length >= context]
        if long:
            text = (
                f"the prompts of {len(long)} of {len(lengths)} problems have {context} tokens or more, which is the "
                f"model's context: {named(long)}"
            )
            if not skip or len(long) == len(lengths):
                raise ValueError(f"{text}; --skip-long (skip_long=True) leaves such problems out")
            note(f"left out: {text}")
            self.problems = [problem for problem in self.problems if problem.id not in set(long)]
        cut = sum(context - self.sampling.max_tokens < length < context for length in lengths)
        if cut:
            note(
                f"the model's context of {context} tokens leaves fewer than max_tokens={self.sampling.max_tokens} "
                f"for {cut} of {len(lengths)} problems"
            )
        return long

    def chunk(self, number: int, pairs: Sequence[tuple[int, int]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The rows of the samples of a chunk, and what it took."""
        from ctpo.train.tools import rollouts

        started = time.perf_counter()
        problems = [self.problems[problem] for problem, _ in pairs]
        drawn = rollouts(
            self.generator,
            [problem.prompt for problem in problems],
            sampling=self.sampling,
            tools=self.tools,
            sandbox=self.sandbox,
            max_rounds=self.max_rounds,
            seed=_chunk_seed(self.seed, number),
            chat_template_kwargs=self.template,
        )
        generated = time.perf_counter()
        scores = self.scorer.score([one.answer for one in drawn], [problem.row() for problem in problems])
        rows: list[dict[str, Any]] = [
            {
                "chunk": number,
                "problem": place,
                "sample": sample,
                "id": problem.id,
                "data_source": problem.data_source,
                "correct": score.correct,
                "reward": score.total,
                "parts": score.parts,
                "failures": score.failures,
                "answer": score.answer,
                "tokens": sum(one.sampled),
                "completion_tokens": len(one.completion_ids),
                "prompt_tokens": len(one.prompt_ids),
                "tool_calls": one.tool_calls,
                "tool_failures": one.tool_failures,
                "truncated": one.truncated,
                "out_of_rounds": one.out_of_rounds,
                "messages": one.messages,
            }
            for (place, sample), problem, one, score in zip(pairs, problems, drawn, scores, strict=True)
        ]
        timing = {
            "chunk": number,
            "tokens": sum(row["tokens"] for row in rows),
            "generate_seconds": round(generated - started, 3),
            "score_seconds": round(time.perf_counter() - generated, 3),
        }
        return rows, timing


def draw_all(
    draw: Draw, chunks: Sequence[Sequence[tuple[int, int]]], files: RunDirectory, note: Note
) -> list[dict[str, Any]]:
    """Rows of all samples in order: those that are there, and those that are drawn now."""
    total = sum(map(len, chunks))
    rows = files.read_samples(chunks)
    if rows:
        note(f"going on after {len(rows)} of {total} samples in {files.path}")
    else:
        note(f"drawing {total} samples into {files.path}")
    with _Progress(total, rows, note) as bar:
        try:
            for number in range(rows[-1]["chunk"] + 1 if rows else 0, len(chunks)):
                added, timing = draw.chunk(number, chunks[number])
                files.append(added, timing)
                rows += added
                bar.update(added)
        except KeyboardInterrupt:
            bar.close()
            note(f"stopped; {len(rows)} of {total} samples are in {files.path}, the same command goes on from there")
            raise
        except Exception as error:
            if type(error).__name__ != "OutOfMemoryError":
                raise
            raise ValueError(
                f"out of memory with {len(chunks[0])} answers at once: choose a smaller batch_size and, since samples "
                "depend on it, another directory or overwrite"
            ) from error
    return rows


def chunks_of(problems: int, samples: int, size: int) -> list[list[tuple[int, int]]]:
    """(problem, sample) pairs in chunks, the samples of a problem together."""
    pairs = [(problem, sample) for problem in range(problems) for sample in range(samples)]
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def _chunk_seed(seed: int, chunk: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(chunk,)).generate_state(1, np.uint64)[0])


def note_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def silent(text: str) -> None:
    pass


class _Progress:
    """A bar on a terminal, else a line per chunk: how far, how good, how fast, how long still."""

    def __init__(self, total: int, rows: Sequence[Mapping[str, Any]], note: Note) -> None:
        self._total, self._done, self._new = total, len(rows), 0
        self._right = sum(row["correct"] for row in rows)
        self._tokens = 0
        self.note_on_stderr = note
        self._started = time.perf_counter()
        self._bar: Any = None
        if note is not silent and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(
                BarColumn(bar_width=20),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self._text(), total=total, completed=self._done)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._done += len(rows)
        self._new += len(rows)
        self._right += sum(row["correct"] for row in rows)
        self._tokens += sum(row["tokens"] for row in rows)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=self._text())
        else:
            self.note_on_stderr(self._text())

    def _text(self) -> str:
        parts = [f"{self._done} of {self._total} samples"]
        if self._done:
            parts.append(f"avg {self._right / self._done:.2f}")
        if self._new:
            seconds = time.perf_counter() - self._started
            parts.append(f"{self._tokens / seconds:.0f} tokens/s")
            if self._done < self._total:
                parts.append(f"{duration((self._total - self._done) * seconds / self._new)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"
