"""Rollouts with the python tool inside TRL's trainer.

TRL has a loop of its own for tools, which runs the calls of different rollouts one after another, knows no fenced
blocks, and lets every process sample as often as its own rollouts need, which several backends do not survive. So
`ctpo.train.tools.rollouts` is given to the trainer as its `rollout_func`; every token still comes from the trainer's
own way of sampling, whatever that is: transformers, continuous batching, vLLM in its process or on a server.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ctpo.train.generation import Ends, Sampling
from ctpo.train.sandbox import Sandbox
from ctpo.train.tools import Rollout, rollouts, tool_format

__all__ = ["TrainerGenerator", "python_rollouts"]


class TrainerGenerator:
    """A `LogpGenerator` that samples as a `GRPOTrainer` does: its backend, its weights, its sampling parameters.

    Of `Sampling` it takes `max_tokens` and `stop`. Its random numbers are the backend's: with transformers torch's
    global generator, which differs by process and is part of a checkpoint; a seed is ignored.

    Stop strings save work and nothing else: that a block is complete depends on the tokens up to its end alone, so a
    sequence that is cut there is distributed as one at which sampling stopped. Continuous batching has none.

    Tested with vLLM's interface, never run with vLLM itself.

    Args:
        trainer: A trainer that is ready to train.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.tokenizer = trainer._tokenizer
        self.eos_token_ids = frozenset(trainer.eos_token_ids)
        self.context: int | None = _context(trainer)

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[int]]:
        """See `Generator.generate`."""
        return self.generate_with_logps(prompt_ids, sampling, seed)[0]

    def generate_with_logps(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, seed: int
    ) -> tuple[list[list[int]], list[list[float | None]] | None]:
        """See `LogpGenerator.generate_with_logps`."""
        trainer = self._trainer
        if trainer.use_vllm:
            limited = _limited_vllm(trainer.vllm_generation, sampling)
        else:
            limited = self._limited_transformers(sampling)
        with limited as ends:
            sampled, logps = trainer._generate_single_turn(list(map(list, prompt_ids)), None, {}, num_generations=1)
        lengths = ends[0].lengths if ends else [None] * len(sampled)
        completions = [list(ids[:length]) for ids, length in zip(sampled, lengths, strict=True)]
        return completions, None if logps is None else [list(map(_number, row)) for row in logps]

    @contextlib.contextmanager
    def _limited_transformers(self, sampling: Sampling) -> Iterator[list[Ends]]:
        config = self._trainer.generation_config
        kept = config.max_new_tokens
        config.max_new_tokens = sampling.max_tokens
        try:
            if sampling.stop and not self._trainer.use_transformers_continuous_batching:
                with self._interrupted(sampling.stop) as ends:
                    yield ends
            else:
                yield []
        finally:
            config.max_new_tokens = kept

    @contextlib.contextmanager
    def _interrupted(self, stop: tuple[str, ...]) -> Iterator[list[Ends]]:
        """Have the model's `generate`, which TRL calls with a configuration alone, stop at strings, too."""
        from transformers import StoppingCriteriaList

        model = self._trainer.accelerator.unwrap_model(self._trainer.model_wrapped)
        generate, found = model.generate, list[Ends]()

        def stopping(**options: Any) -> Any:
            rows, width = options["input_ids"].shape
            found.append(Ends(self.tokenizer, width, rows, self.eos_token_ids, stop))
            return generate(**options, stopping_criteria=StoppingCriteriaList(found))

        model.generate = stopping
        try:
            yield found
        finally:
            del model.generate


@contextlib.contextmanager
def _limited_vllm(vllm: Any, sampling: Sampling) -> Iterator[list[Ends]]:
    kept = vllm.max_completion_length, vllm.generation_kwargs
    vllm.max_completion_length = sampling.max_tokens
    if sampling.stop:
        given = vllm.generation_kwargs.get("stop") or []
        stop = [*([given] if isinstance(given, str) else given), *sampling.stop]
        vllm.generation_kwargs = {**vllm.generation_kwargs, "stop": stop, "include_stop_str_in_output": True}
    try:
        yield []
    finally:
        vllm.max_completion_length, vllm.generation_kwargs = kept


def _number(logp: float | None) -> float | None:
    return None if logp is None or math.isnan(logp) else float(logp)


def _context(trainer: Any) -> int | None:
    """Most tokens of a prompt and its completion that the trainer's backend takes."""
    if trainer.use_vllm and trainer.vllm_mode == "colocate":
        return int(trainer.vllm_generation.llm.llm_engine.model_config.max_model_len)
    limits = [getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)]
    if trainer.use_vllm:
        limits.append(trainer.args.vllm_max_model_length)
    return min((limit for limit in limits if limit is not None), default=None)


def python_rollouts(trainer: Any, sandbox: Sandbox) -> Callable[[list[Any], Any], dict[str, Any]]:
    """The `rollout_func` of a trainer whose model may run Python.

    Besides what TRL wants, it returns a list per column that reward functions are given: `rollout_answer`,
    `rollout_messages`, `rollout_truncated`, `rollout_out_of_rounds`, `rollout_tool_calls`, `rollout_tool_failures`; see
    `Rollout`. It logs TRL's metrics of tools, and the shares of rollouts that a limit has ended.

    With `mask_truncated_completions` a truncated rollout is no part of the loss. One that has run out of rounds is.

    Args:
        trainer: The trainer, ready to train; `args.python_tool` is the form of the calls.
        sandbox: Where they run.

    Raises:
        ValueError: The tokenizer has no chat template, or none with calls where "calls" is asked for; or there is no
            limit of tokens.
    """
    args = trainer.args
    generator = TrainerGenerator(trainer)
    form = tool_format(
        generator.tokenizer,
        args.python_tool,
        backend=sandbox.backend,
        eos_token_ids=generator.eos_token_ids,
        chat_template_kwargs=trainer.chat_template_kwargs,
    )
    if args.max_completion_length is None:
        raise ValueError(f"max_completion_length must be a number with python_tool={args.python_tool!r}, got None")
    sampling = Sampling(max_tokens=args.max_completion_length)

    def roll_out(prompts: list[Any], _: Any) -> dict[str, Any]:
        found = rollouts(
            generator,
            prompts,
            sampling=sampling,
            tools=form,
            sandbox=sandbox,
            max_rounds=trainer.max_tool_calling_iterations,
            all_gather=_all_gather if _samples_together(trainer) else None,
        )
        _log(trainer, found)
        rows = [_row(trainer, generator, rollout) for rollout in found]
        return {
            "prompt_ids": [rollout.prompt_ids for rollout in found],
            "completion_ids": [ids for ids, _, _ in rows],
            "logprobs": None if any(logps is None for _, _, logps in rows) else [logps for _, _, logps in rows],
            "env_mask": [mask for _, mask, _ in rows],
            "rollout_answer": [rollout.answer for rollout in found],
            "rollout_messages": [rollout.messages for rollout in found],
            "rollout_truncated": [rollout.truncated for rollout in found],
            "rollout_out_of_rounds": [rollout.out_of_rounds for rollout in found],
            "rollout_tool_calls": [rollout.tool_calls for rollout in found],
            "rollout_tool_failures": [rollout.tool_failures for rollout in found],
        }

    return roll_out


def _row(
    trainer: Any, generator: TrainerGenerator, rollout: Rollout
) -> tuple[list[int], list[int], list[float | None] | None]:
    """Ids, mask and log-probabilities of a rollout, such that TRL takes it for truncated if and only if it is.

    TRL tells by the last token, which must be one that ends a turn.
    """
    ids, mask, logps = rollout.completion_ids, [int(sampled) for sampled in rollout.sampled], rollout.logps
    ended = bool(ids) and ids[-1] in {*generator.eos_token_ids, generator.tokenizer.pad_token_id}
    if rollout.truncated and ended and trainer.mask_truncated_completions:
        # The output of a call had no room after a turn that was complete.
        mask = [0] * len(ids)
    elif not ids or not (rollout.truncated or ended):
        # A block after the last round; or nothing, from a backend where a request failed.
        ids, mask = [*ids, generator.tokenizer.eos_token_id], [*mask, 0]
        logps = None if logps is None else [*logps, 0.0]
    return ids, mask, logps


def _samples_together(trainer: Any) -> bool:
    """Whether all processes must sample as often as each other, and as many."""
    if trainer.accelerator.num_processes == 1:
        return False
    if trainer.use_vllm and (trainer.vllm_mode == "server" or trainer.vllm_tensor_parallel_size > 1):
        return True
    return bool(trainer._dist.is_fsdp or trainer._dist.is_zero3)


def _all_gather(value: Any) -> list[Any]:
    from accelerate.utils import gather_object

    return list(gather_object([value]))


def _log(trainer: Any, found: Sequence[Rollout]) -> None:
    import torch

    names = ("tool_calls", "tool_failures", "truncated", "out_of_rounds")
    sums = [len(found), *(sum(getattr(rollout, name) for rollout in found) for name in names)]
    total = trainer.accelerator.reduce(torch.tensor(sums, device=trainer.accelerator.device)).tolist()
    count, calls, failures, truncated, out_of_rounds = total
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    metrics["tools/call_frequency"].append(calls / count)
    metrics["tools/failure_frequency"].append(failures / max(calls, 1))
    metrics["tools/truncated"].append(truncated / count)
    metrics["tools/out_of_rounds"].append(out_of_rounds / count)
