"""Rollouts with the python tool in a real `CTPOTrainer`, from the tokens that are sampled to the batch of the loss."""

from __future__ import annotations

import inspect
import itertools
import json
import re
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import rollout_ranks
import torch
from datasets import Dataset
from sandbox_backends import sandbox_fixture
from scripted_rollouts import ODD, Turns
from tiny_models import tiny_chat_model
from transformers import Qwen3ForCausalLM
from trl import GRPOTrainer
from trl_harness import config_on_cpu

from ctpo.train._trainer_rollouts import TrainerGenerator, _samples_together, python_rollouts
from ctpo.train.config import CTPOConfig
from ctpo.train.generation import LogpGenerator, Sampling
from ctpo.train.trainer import CTPOTrainer

# TRL 1.16 asks transformers 5.23 by former names.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

END = "<|im_end|>"
sandbox = sandbox_fixture(timeout=20.0)


class ScriptedModel(Qwen3ForCausalLM):
    """What it samples is written in `turns`; elsewhere it is the random model that it was made from."""

    turns: Turns | None = None
    _coming = None  # ids by row while it generates

    def generate(self, *, input_ids, attention_mask, **options):
        if self.turns is not None:
            rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
            self._coming = [iter(self.turns.rest(row)) for row in rows]
        try:
            return super().generate(input_ids=input_ids, attention_mask=attention_mask, **options)
        finally:
            self._coming = None

    def forward(self, *args, **options):
        found = super().forward(*args, **options)
        for row, coming in enumerate(self._coming or ()):
            found.logits[row, -1] = -1e4
            found.logits[row, -1, next(coming, self.turns.tokenizer.eos_token_id)] = 1e4
        return found


def call(code):
    return f"<tool_call>\n{json.dumps({'name': 'python', 'arguments': {'code': code}})}\n</tool_call>{END}"


def block(code):
    return f"```python\n{code}\n```\n"


def prompts(count):
    return [[{"role": "user", "content": f"task {i}"}] for i in range(count)]


@pytest.fixture
def make(tmp_path):
    """A trainer whose model writes `scripts`, or is random; two samples of every task are a rollout batch."""

    def made(scripts=None, *, template="qwen3", tool="calls", sandbox=None, reward=None, peft_config=None, **options):
        model, tokenizer = tiny_chat_model(template)
        model.__class__ = ScriptedModel
        tasks = 2 if scripts is None else len(scripts)
        if scripts is not None:
            model.turns = Turns(tokenizer, scripts)
        defaults = {
            "max_completion_length": 30 if scripts is None else 400,
            "per_device_train_batch_size": tasks,
            "steps_per_generation": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 2,
            "learning_rate": 1e-4,
            "disable_tqdm": True,
        }
        trainer = CTPOTrainer(
            model,
            reward or (lambda completions, **_: [float(i) for i in range(len(completions))]),
            config_on_cpu(tmp_path, CTPOConfig, python_tool=tool, python_sandbox="monty", **defaults | options),
            train_dataset=Dataset.from_dict({"prompt": prompts(tasks)}),
            processing_class=tokenizer,
            sandbox=sandbox,
            peft_config=peft_config,
        )
        if sandbox is None and trainer.sandbox is not None:
            opened.append(trainer.sandbox)
        return trainer

    opened = []
    yield made
    for own in opened:
        own.close()


def roll(trainer, tasks=2, mode="train"):
    """The rollouts of one sample per task, as TRL takes them."""
    getattr(trainer.model, mode)()
    return trainer.rollout_func(prompts(tasks), trainer)


def recorded(trainer):
    """Continues the trainer's own sampling; what every row was continued with is written into the mapping."""
    found = {}
    sample = TrainerGenerator.generate_with_logps

    def watched(generator, rows, sampling, seed):
        sampled, logps = sample(generator, rows, sampling, seed)
        for row, ids in zip(rows, sampled, strict=True):
            found.setdefault(tuple(row), []).append(tuple(ids))
        return sampled, logps

    return found, patch.object(TrainerGenerator, "generate_with_logps", watched)


def train(trainer):
    """Train; the sequences of every micro-batch as the loss sees them: ids of prompt and completion, and a mask."""
    rows, batches = [], []
    compute_loss = trainer._compute_loss

    def watched(model, inputs):
        batches.append(dict(inputs))
        for i in range(len(inputs["prompt_ids"])):
            prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist()
            kept = inputs["completion_mask"][i].bool()
            completion, mask = (inputs[name][i][kept].tolist() for name in ("completion_ids", "tool_mask"))
            rows.append((prompt, completion, mask))
        return compute_loss(model, inputs)

    with patch.object(trainer, "_compute_loss", watched):
        trainer.train()
    return rows, batches


def runs(mask):
    """Intervals of equal entries: begin, end, entry."""
    cuts = [0, *(i for i in range(1, len(mask)) if mask[i] != mask[i - 1]), len(mask)]
    return [(begin, end, mask[begin]) for begin, end in itertools.pairwise(cuts)]


def check_sampled(found, prompt, completion, mask):
    """Every run of tokens in the loss is what the generator returned for what comes before it; no other token is."""
    whole = prompt + completion
    for begin, end, sampled in runs(mask):
        if not sampled:
            continue
        place, stop = len(prompt) + begin, len(prompt) + end
        while place < stop:
            following = [ids for ids in found[tuple(whole[:place])] if list(ids) == whole[place : place + len(ids)]]
            cut = [ids for ids in found[tuple(whole[:place])] if list(ids[: stop - place]) == whole[place:stop]]
            assert following or cut, (place, stop)
            place += len(following[0]) if following else stop - place


# ---------------------------------------------------------------------------- from the sample to the batch of the loss

TASKS = {
    "calls": [
        [f"Hm{ODD}. {call('x = 6')}", call("x * 7"), f"42{END}"],
        [call("1 / 0"), f"none{ODD}{END}"],
    ],
    "fenced": [
        [f"Hm{ODD}.\n{block('x = 6')}never seen", f"So\n{block('x * 7')}", f"42{END}"],
        [f"{block('1 / 0')}{END}", f"none{ODD}{END}"],
    ],
}
OUTPUTS = {
    "calls": r"<tool_response>\n(.*?)\n</tool_response>",
    "fenced": r"```output\n(.*?)\n```\n",
}


@pytest.mark.parametrize("tool", ["calls", "fenced"])
def test_what_is_trained_on_is_what_was_sampled(make, sandbox, tool):
    """Also bytes that are no text; the outputs of the sandbox are there, and no part of the loss."""
    seen = []

    def reward(completions, **columns):
        seen.append({"completions": completions, **columns})
        return [float(i) for i in range(len(completions))]

    trainer = make(
        TASKS[tool], tool=tool, template="qwen3" if tool == "calls" else "plain", sandbox=sandbox, reward=reward
    )
    found, recording = recorded(trainer)
    with recording:
        rows, _ = train(trainer)
    assert len(rows) == 4
    tokenizer = trainer.processing_class
    odd = tokenizer.encode(ODD)[1]
    texts = []
    for prompt, completion, mask in rows:
        check_sampled(found, prompt, completion, mask)
        assert odd in completion
        assert tokenizer.encode(tokenizer.decode(completion)) != completion
        inserted = "".join(tokenizer.decode(completion[a:b]) for a, b, sampled in runs(mask) if not sampled)
        said = "".join(tokenizer.decode(completion[a:b]) for a, b, sampled in runs(mask) if sampled)
        texts.append((said, re.findall(OUTPUTS[tool], inserted, flags=re.DOTALL)))
    for said, outputs in texts:
        if "42" in said:
            assert outputs == ["(no output; print what you want to see, or end with an expression)", "42"]
        else:
            assert said.replace("\ufffd", ODD).endswith(f"none{ODD}{END}")
            assert len(outputs) == 1
            assert "ZeroDivisionError" in outputs[0]
        assert "never seen" not in said
    assert sorted("42" in said for said, _ in texts) == [False, False, True, True]
    (columns,) = seen
    assert sorted(columns["rollout_answer"]) == ["42", "42", "none\ufffd", "none\ufffd"]
    for answer, messages, calls, failures in zip(
        columns["rollout_answer"],
        columns["completions"],
        columns["rollout_tool_calls"],
        columns["rollout_tool_failures"],
        strict=True,
    ):
        assert (calls, failures) == ((2, 0) if answer == "42" else (1, 1))
        assert [message["role"] for message in messages] == ["assistant", "tool"] * calls + ["assistant"]
        assert messages[-1]["content"].strip() == answer
    assert columns["rollout_truncated"] == columns["rollout_out_of_rounds"] == [False] * 4
    logged = next(row for row in trainer.state.log_history if "tools/call_frequency" in row)
    assert logged["tools/call_frequency"] == 1.5
    assert logged["tools/failure_frequency"] == pytest.approx(1 / 3)
    assert logged["tools/truncated"] == logged["tools/out_of_rounds"] == logged["completions/clipped_ratio"] == 0.0


@pytest.mark.parametrize(("tool", "write"), [("calls", call), ("fenced", block)])
def test_tool_tokens_are_no_part_of_ratios_and_positions(make, tool, write):
    scripts = [[write("6"), f"6{END}"], [write("1 / 0"), f"none{END}"]]
    trainer = make(scripts, tool=tool, template="qwen3" if tool == "calls" else "plain")
    _, batches = train(trainer)
    batch = batches[1]  # the policy has moved since the rollout
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    inserted = batch["completion_mask"].bool() & ~mask
    assert inserted.any(1).all()
    trainer.model.train()

    def gradients(old):
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, {**batch, "old_per_token_logps": old}).backward()
        return [parameter.grad.clone() for parameter in trainer.model.parameters()]

    old = batch["old_per_token_logps"]
    plain = gradients(old)
    assert any(gradient.abs().max() > 0 for gradient in plain)
    for garbage in (3.0, -50.0):
        for one, other in zip(plain, gradients(old.masked_fill(inserted, garbage)), strict=True):
            assert torch.equal(one, other)
    # And this does see log-probabilities before an output: the last sampled token before the first one.
    first = inserted.int().argmax(1) - 1
    moved = old.clone()
    moved[torch.arange(len(old)), first] -= 0.01
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(plain, gradients(moved), strict=True))

    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logp = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, mask.shape[1])[0].detach()
    found = trainer.args.built_estimator.evaluate(logp, old, batch["advantages"], mask)
    changed = trainer.args.built_estimator.evaluate(
        logp.masked_fill(inserted, -7.0), old.masked_fill(inserted, float("nan")), batch["advantages"], mask
    )
    for row in range(len(mask)):
        differences = [float(logp[row, t] - old[row, t]) for t in range(mask.shape[1]) if mask[row, t]]
        sums = torch.tensor([sum(differences[: t + 1]) for t in range(len(differences))])
        for evaluation in (found, changed):
            log_ratio, position = (getattr(evaluation, name).expand_as(old)[row] for name in ("log_ratio", "position"))
            torch.testing.assert_close(log_ratio[mask[row]], sums, atol=1e-5, rtol=1e-4)
            assert position[mask[row]].tolist() == list(range(1, len(differences) + 1))


# ---------------------------------------------------------------------------------------------------- ends of rollouts


def test_limits_of_tokens_and_rounds_in_calls(make):
    scripts = [
        [f"ok{END}"],
        ["x" * 300],  # is cut
        [call("print('y' * 300)"), f"ok{END}"],  # an output without room
        [call("1")] * 9,  # more calls than rounds
    ]
    trainer = make(scripts, max_tool_calling_iterations=1, max_completion_length=220)
    found = roll(trainer, 4)
    assert found["rollout_truncated"] == [False, True, True, False]
    assert found["rollout_out_of_rounds"] == [False, False, False, True]
    assert found["rollout_tool_calls"] == [0, 0, 1, 1]
    assert found["rollout_answer"][:3] == ["ok", "x" * 220, ""]
    # TRL takes what does not end a turn for truncated.
    end = trainer.processing_class.eos_token_id
    assert [ids[-1] == end for ids in found["completion_ids"]] == [True, False, True, True]
    assert [set(mask) for mask in found["env_mask"]] == [{1}, {1}, {1}, {0, 1}]
    assert found["env_mask"][3][-len(trainer.processing_class.encode(call("1"))) :][0] == 1
    metrics = trainer._metrics["train"]
    assert metrics["tools/truncated"] == [0.5]
    assert metrics["tools/out_of_rounds"] == [0.25]
    assert metrics["tools/call_frequency"] == [0.5]
    trainer.mask_truncated_completions = True
    assert [any(mask) for mask in roll(trainer, 4)["env_mask"]] == [True, True, False, True]
    assert roll(trainer, 1, mode="eval")["rollout_answer"] == ["ok"]
    assert trainer._metrics["eval"]["tools/call_frequency"] == [0.0]


def test_limits_of_tokens_and_rounds_in_blocks(make):
    scripts = [[f"ok{END}"], ["x" * 300], [block("print('y' * 300)"), f"ok{END}"], [block("1")] * 9]
    trainer = make(scripts, tool="fenced", template="plain", max_tool_calling_iterations=2, max_completion_length=140)
    found = roll(trainer, 4)
    assert found["rollout_truncated"] == [False, True, True, False]
    assert found["rollout_out_of_rounds"] == [False, False, False, True]
    tokenizer = trainer.processing_class
    end = tokenizer.eos_token_id
    assert [ids[-1] == end for ids in found["completion_ids"]] == [True, False, False, True]
    # A block is where the last one ends; the end after it is not the model's.
    assert tokenizer.decode(found["completion_ids"][3]).endswith(f"```\n{END}")
    assert found["env_mask"][3][-2:] == [1, 0]
    assert found["logprobs"] is None


def test_truncated_rollouts_leave_the_loss_by_option(make):
    """TRL's option masks what did not end in time, here also where an output had no room; and nothing else."""
    scripts = [[f"ok{END}"], ["x" * 300], [call("print('y' * 300)")], [call("1")] * 9]
    options = {"max_tool_calling_iterations": 1, "max_completion_length": 220}
    trainer = make(scripts, mask_truncated_completions=True, **options)
    _, batches = train(trainer)
    seen = {}
    for batch in batches:
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"] * batch["tool_mask"], strict=True):
            text = trainer.processing_class.decode(ids)
            task = next(i for i, mark in enumerate(("ok", "xx", "'y'", '"1"')) if mark in text)
            seen.setdefault(task, []).append(int(mask.sum()))
    assert seen == {0: [3, 3], 1: [0, 0], 2: [0, 0], 3: [2 * len(trainer.processing_class.encode(call("1")))] * 2}


def test_completion_of_nothing(make):
    """TRL looks at the last token of every completion. A request that failed has none."""
    trainer = make()
    tokenizer = trainer.processing_class

    def failing(prompt_ids, *_, **__):
        return [[] if i == 1 else tokenizer.encode(f"ok{END}") for i in range(len(prompt_ids))], None

    with patch.object(trainer, "_generate_single_turn", failing):
        found = roll(trainer, 3)
        assert found["completion_ids"][1] == [tokenizer.eos_token_id]
        assert found["env_mask"][1] == [0]
        assert found["rollout_answer"] == ["ok", "", "ok"]
        rows, _ = train(trainer)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert sorted(sum(mask) for _, _, mask in rows) == [0, 3, 3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool": "calls", "template": "plain"}, "tools='calls': the chat template does not render tool calls"),
        ({"max_completion_length": None}, "max_completion_length must be a number with python_tool='calls', got None"),
    ],
)
def test_what_cannot_work_is_said_at_once(make, options, message):
    with pytest.raises(ValueError, match=message):
        roll(make(**options))


def test_prompts_that_do_not_fit(make):
    trainer = make()
    (length, _) = map(len, roll(trainer)["prompt_ids"])
    trainer.model.config.max_position_embeddings = length
    with pytest.raises(ValueError, match=rf"prompts\[0\] has {length} tokens; the model's context is {length}"):
        python_rollouts(trainer, trainer.sandbox)(prompts(2), trainer)
    with pytest.raises(ValueError, match="prompts\\[1\\] must be a list of messages"):
        trainer.rollout_func([*prompts(1), "task 1"], trainer)


# ------------------------------------------------------------------------------------------- the trainer's own sampling


def test_the_signature_of_trl():
    """What is relied on."""
    parameters = list(inspect.signature(GRPOTrainer._generate_single_turn).parameters)
    assert parameters[:5] == ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"]


def test_samples_are_those_of_the_trainer(make):
    """The same tokens as TRL's own `_generate` for the same random state, with all of its parameters."""
    trainer = make(max_completion_length=30, temperature=0.7, top_p=0.9, top_k=40, min_p=0.01, repetition_penalty=1.1)
    plain = make(
        tool="none", max_completion_length=30, temperature=0.7, top_p=0.9, top_k=40, min_p=0.01, repetition_penalty=1.1
    )
    state = torch.get_rng_state()
    found = roll(trainer)
    assert roll(trainer)["completion_ids"] != found["completion_ids"]
    torch.set_rng_state(state)
    assert roll(trainer)["completion_ids"] == found["completion_ids"]
    torch.set_rng_state(state)
    rows, _ = plain._generate_single_turn(found["prompt_ids"], None, {}, num_generations=1)
    assert [ids[: len(row)] for ids, row in zip(rows, found["completion_ids"], strict=True)] == found["completion_ids"]
    assert trainer.generation_config.max_new_tokens == 30


def test_no_more_is_sampled_than_there_is_room_for(make):
    trainer = make([[call("1"), "x" * 300]], max_completion_length=200)
    found, recording = recorded(trainer)
    with recording:
        (mask,) = roll(trainer, 1)["env_mask"]
    assert len(mask) == 200
    first, second = (len(ids) for ((ids,),) in zip(found.values(), strict=True))
    assert second == 200 - first - mask.count(0)


def test_random_tokens_reach_the_loss_unchanged(make):
    """What a random model samples is hardly ever text."""
    trainer = make(tool="fenced", template="plain")
    found, recording = recorded(trainer)
    with recording:
        rows, _ = train(trainer)
    tokenizer = trainer.processing_class
    for prompt, completion, mask in rows:
        check_sampled(found, prompt, completion, mask)
    assert sum(tokenizer.encode(tokenizer.decode(completion)) != completion for _, completion, _ in rows) >= 3


@pytest.mark.parametrize("peft", [False, True])
def test_sampling_stops_at_the_end_of_a_block(make, peft):
    options = {}
    if peft:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(target_modules=["q_proj"])
    late = f"{block('6')}{'x' * 100}{END}"
    trainer = make([[late, f"6{END}"], [f"{'y' * 30}{END}"]], tool="fenced", template="plain", **options)
    found, recording = recorded(trainer)
    with recording:
        rolled = roll(trainer)
    assert rolled["rollout_answer"] == ["6", "y" * 30]
    assert rolled["rollout_tool_calls"] == [1, 0]
    texts = {trainer.processing_class.decode(ids) for sampled in found.values() for ids in sampled}
    assert texts == {"```python\n", "6\n```\n", f"6{END}", f"{'y' * 30}{END}"}
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert "generate" not in vars(model)
    # TRL gives up, and everything is as it was.
    with patch.object(trainer, "_generate_single_turn", side_effect=RuntimeError("no")), pytest.raises(RuntimeError):
        roll(trainer)
    assert "generate" not in vars(model)
    assert trainer.generation_config.max_new_tokens == 400
    # Sampled to the end of the turn and cut, as by a backend without stop strings, the rollouts are the same.
    turns = trainer.accelerator.unwrap_model(trainer.model).turns if not peft else model.get_base_model().turns

    def run_on(prompt_ids, *_, **__):
        return [turns.sample(ids, trainer.generation_config.max_new_tokens) for ids in prompt_ids], None

    trainer.use_transformers_continuous_batching = True
    with patch.object(trainer, "_generate_single_turn", run_on):
        again = roll(trainer)
    assert again == rolled


# ----------------------------------------------------------------------------------------------------------------- vLLM


class Engine:
    """What TRL makes of vLLM, with the parameters of every call; it cannot be run here."""

    def __init__(self, turns, context, generation_kwargs):
        self.turns, self.synced, self.asked = turns, 0, []
        self.unknown = turns.tokenizer.encode("!?")
        self.max_completion_length, self.generation_kwargs = 400, generation_kwargs or {}
        self.llm = SimpleNamespace(llm_engine=SimpleNamespace(model_config=SimpleNamespace(max_model_len=context)))

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, images, num_generations, profiler):
        assert images is None
        assert num_generations == 1
        self.asked.append((self.max_completion_length, dict(self.generation_kwargs)))
        sampled = [self.turns.sample(ids, self.max_completion_length) for ids in prompts]
        missing = dict(zip(self.unknown, (None, float("nan")), strict=True))
        logps = [[[missing.get(token, -token / 1000)] for token in ids] for ids in sampled]
        return prompts, [tuple(ids) for ids in sampled], logps, None


@pytest.fixture
def engine(make):
    def made(scripts, *, tool="calls", mode="colocate", context=4096, generation_kwargs=None, **options):
        trainer = make(scripts, tool=tool, template="qwen3" if tool == "calls" else "plain", **options)
        trainer.vllm_generation = Engine(trainer.model.turns, context, generation_kwargs)
        trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, mode, -1
        trainer.rollout_func = python_rollouts(trainer, trainer.sandbox)
        return trainer

    return made


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_probabilities_of_an_engine_are_kept(engine, mode):
    trainer = engine([[call("6"), f"6!?{END}"], [f"no{END}"]], mode=mode)
    unknown = trainer.vllm_generation.unknown
    found = roll(trainer)
    for ids, mask, logps in zip(found["completion_ids"], found["env_mask"], found["logprobs"], strict=True):
        known = [None if token in unknown else -token / 1000 for token in ids]
        assert logps == [logp if sampled else 0.0 for logp, sampled in zip(known, mask, strict=True)]
    assert 0 in found["env_mask"][0]
    assert found["logprobs"][0].count(None) == 2
    # The second turn has the room that the first one and its output have left.
    (first, _), (second, _) = trainer.vllm_generation.asked
    assert first == 400
    assert second == 400 - found["env_mask"][0].index(1, found["env_mask"][0].index(0))
    assert trainer.vllm_generation.max_completion_length == 400
    assert trainer.vllm_generation.synced == 1
    # As TRL gets them.
    *_, logprobs, extra, _, _ = trainer._generate(prompts(2))
    assert logprobs == found["logprobs"]
    assert extra["rollout_answer"] == ["6!?", "no"]


def test_blocks_of_an_engine(engine):
    """It is told where to stop; what it samples beyond that is dropped, with its probabilities."""
    scripts = [[f"{block('6')}never seen{END}", f"{block('7')}never seen{END}", f"7{END}"], [f"no{END}"]]
    trainer = engine(
        scripts, tool="fenced", generation_kwargs={"stop": "STOP", "seed": 1}, max_tool_calling_iterations=1
    )
    found = roll(trainer)
    assert found["rollout_out_of_rounds"] == [True, False]
    for _, kwargs in trainer.vllm_generation.asked:
        assert kwargs["stop"][0] == "STOP"
        assert "```python\n" in kwargs["stop"]
        assert kwargs["include_stop_str_in_output"] is True
        assert kwargs["seed"] == 1
    assert trainer.vllm_generation.generation_kwargs == {"stop": "STOP", "seed": 1}
    text = trainer.processing_class.decode(found["completion_ids"][0])
    assert text == f"{block('6')}```output\n6\n```\n{block('7')}{END}"
    for ids, mask, logps in zip(found["completion_ids"], found["env_mask"], found["logprobs"], strict=True):
        assert logps == [-token / 1000 * sampled for token, sampled in zip(ids, mask, strict=True)]


@pytest.mark.parametrize(
    ("mode", "engines", "given", "context"),
    [("colocate", 900, None, 900), ("server", 900, None, 4096), ("server", 900, 800, 800), ("server", 900, 5000, 4096)],
)
def test_context_of_an_engine(engine, mode, engines, given, context):
    trainer = engine([[END]], mode=mode, context=engines)
    trainer.args.vllm_max_model_length = given
    assert TrainerGenerator(trainer).context == context


def test_it_is_a_generator(make):
    generator = TrainerGenerator(make())
    assert isinstance(generator, LogpGenerator)
    (ids,) = generator.generate([generator.tokenizer.encode("a")], Sampling(3), seed=0)
    assert 1 <= len(ids) <= 3


# ------------------------------------------------------------------------------------------------------- many processes


def test_processes_sample_in_step(tmp_path):
    """Two processes with very different numbers of turns, and a generator that each call must find both at."""
    ranks = rollout_ranks.run(tmp_path)
    for name in rollout_ranks.SCRIPTS:
        asked = [found[name][1] for found in ranks]
        assert asked[0] == asked[1]
        for rank, found in enumerate(ranks):
            alone, _ = rollout_ranks.roll(name, rank)
            assert found[name][0] == alone, (name, rank)
    # Neither does it wait for nothing: five rounds are six turns at most, in blocks two calls each.
    assert len(ranks[0]["calls"][1]) == 6
    assert len(ranks[0]["nothing"][1]) == 2
    assert [rows for rows, *_ in ranks[0]["calls"][1]] == [3, 2, 1, 1, 1, 1]
    assert max(rollout.tool_calls for rollout in ranks[1]["calls"][0]) == 5


@pytest.mark.parametrize(
    ("processes", "vllm", "parallel", "sharding", "together"),
    [
        (1, "server", 1, "zero3", False),
        (2, None, 1, None, False),
        (2, "server", 1, None, True),
        (2, "colocate", 1, None, False),
        (2, "colocate", 2, None, True),
        (2, None, 1, "fsdp", True),
        (2, None, 1, "zero3", True),
        (2, "colocate", 1, "fsdp", True),
    ],
)
def test_who_must_sample_together(processes, vllm, parallel, sharding, together):
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=processes),
        use_vllm=vllm is not None,
        vllm_mode=vllm or "colocate",
        vllm_tensor_parallel_size=parallel,
        _dist=SimpleNamespace(is_fsdp=sharding == "fsdp", is_zero3=sharding == "zero3"),
    )
    assert _samples_together(trainer) is together
