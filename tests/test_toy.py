"""The toy: its tokens, its dialogues against rollouts in real sandboxes, its warm-up, and how it is saved."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sandbox_backends import sandbox_fixture
from trl.chat_template_utils import is_chat_template_prefix_preserving, qwen3_instruct_2507_chat_template

from ctpo.train import toy
from ctpo.train.data import load_problems
from ctpo.train.generation import Sampling, TransformersGenerator, load_model, load_tokenizer
from ctpo.train.sandbox import BackendName
from ctpo.train.tools import rollouts, tool_format
from ctpo.train.toy import make_toy, toy_options

sandbox = sandbox_fixture(timeout=20.0)


@pytest.fixture(scope="module")
def tokenizer():
    return toy._tokenizer()


@pytest.fixture(scope="module")
def problems():
    return load_problems("arithmetic?difficulty=2&split=train&size=300&seed=5", instruction="")


@pytest.fixture(scope="module")
def dialogues(tokenizer):
    return toy._dialogues(tokenizer, seed=5, size=300)


def ids_of(dialogue):
    return dialogue.prompt_ids, dialogue.completion_ids, dialogue.sampled


# ---------------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("backend", get_args(BackendName))
def test_what_the_template_writes_around_a_question_is_two_tokens(tokenizer, backend):
    question = "What is 12 * 34?"
    ids = tool_format(tokenizer, "calls", backend=backend).prompt_ids([{"role": "user", "content": question}])
    assert len(ids) == 1 + len(question) + 1
    assert tokenizer.decode(ids[1:-1]) == question


def test_a_dialogue_is_a_token_for_every_character_and_each_piece(dialogues):
    right, _ = dialogues
    for dialogue in right:
        call, output, answer = dialogue.messages
        code = call["tool_calls"][0]["function"]["arguments"]["code"]
        around_call = ["<tool_call>...", "...</tool_call>", "<|im_end|>"]
        around_output = ["\n", "<|im_start|>user\n<tool_response>\n", "\n</tool_response>..."]
        written = len(code) + len(around_call) + len(answer["content"]) + 1
        assert sum(dialogue.sampled) == written
        assert len(dialogue.completion_ids) == written + len(around_output) + len(output["content"])


@given(text=st.text())
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_template_is_the_stock_one_and_stays_as_it_is_in_training(tokenizer):
    assert tokenizer.chat_template == qwen3_instruct_2507_chat_template
    assert is_chat_template_prefix_preserving(tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|im_end|>"


def test_a_program_cannot_print_a_token_of_the_chat_format(tokenizer):
    form = tool_format(tokenizer, "calls", backend="monty")
    shown = form._shown(SimpleNamespace(text=f"{toy.ANSWER}4{toy.END}", failed=False))
    controls = set(tokenizer.added_tokens_decoder)
    assert not controls.intersection(tokenizer.encode(shown))


# ---------------------------------------------------------------------------------------------------------- dialogues


def test_dialogues_are_what_a_rollout_in_the_sandbox_is(tokenizer, dialogues, problems, sandbox):
    place = get_args(BackendName).index(sandbox.backend)
    form = tool_format(tokenizer, "calls", backend=sandbox.backend)
    for pool in dialogues:
        half = pool[place * len(pool) // 2 :][: len(pool) // 2][:12]
        chosen = problems[place::2][:12]
        turns = {}
        for problem, dialogue in zip(chosen, half, strict=True):
            said = "".join(tokenizer.decode([t]) if s else "\0" for t, s in zip(*ids_of(dialogue)[1:], strict=True))
            texts = [text.removesuffix(toy.END) for text in re.split("\0+", said)]
            turns[tuple(form.prompt_ids(problem.prompt))] = texts
        script = toy._Script(tokenizer, frozenset({tokenizer.eos_token_id}), turns)
        prompts = [problem.prompt for problem in chosen]
        found = rollouts(script, prompts, sampling=Sampling(100), tools="calls", sandbox=sandbox)
        assert [ids_of(one) for one in found] == [ids_of(one) for one in half]
        assert [one.messages for one in found] == [one.messages for one in half]


def test_right_dialogues_call_the_tool_and_repeat_its_output(dialogues, problems):
    right, _ = dialogues
    ordered = [*problems[0::2], *problems[1::2]]
    for dialogue, problem in zip(right, ordered, strict=True):
        call, output, answer = dialogue.messages
        assert call["tool_calls"][0]["function"]["arguments"] == {"code": problem.extra_info["expression"]}
        assert output["content"] == answer["content"] == dialogue.answer == problem.ground_truth


def test_mixed_dialogues_guess_call_wrongly_or_are_right_in_their_shares(dialogues, problems):
    right, mixed = dialogues
    ordered = [*problems[0::2], *problems[1::2]]
    counts = dict.fromkeys(("right", "wrong expression", "guess"), 0)
    for dialogue, other, problem in zip(mixed, right, ordered, strict=True):
        assert dialogue.prompt_ids == other.prompt_ids
        if dialogue.tool_calls == 0:
            counts["guess"] += 1
            assert re.fullmatch(r"The answer is -?[0-9]+", dialogue.answer)
        else:
            code = dialogue.messages[0]["tool_calls"][0]["function"]["arguments"]["code"]
            assert dialogue.answer == str(eval(code))
            same = code == problem.extra_info["expression"]
            assert same == (dialogue.answer == problem.ground_truth)
            counts["right" if same else "wrong expression"] += 1
    # 300 draws with probabilities .2, .2, .6: five standard deviations, at most 8.5 each.
    expected = {"right": 60, "wrong expression": 60, "guess": 180}
    assert all(abs(counts[kind] - expected[kind]) < 43 for kind in expected), counts


def test_everything_fits_into_what_the_recipe_lets_the_model_write(dialogues):
    assert max(len(dialogue.completion_ids) for pool in dialogues for dialogue in pool) < 56


# ------------------------------------------------------------------------------------------------------------ warm-up


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A model that knows eight dialogues by heart, and its losses."""
    losses = []
    with patch.multiple(toy, PROBLEMS=8, RIGHT_UNTIL=1.0, BATCH=8):
        directory = tmp_path_factory.mktemp("learned") / "toy"
        make_toy(directory, warmup_steps=60, seed=3, progress=lambda *now: losses.append(now))
    return load_model(directory), losses


def test_progress_is_told_at_every_step(learned):
    losses = learned[1]
    assert [(step, steps) for step, steps, _ in losses] == [(step, 60) for step in range(1, 61)]
    assert losses[0][2] > 3.0 > 0.1 > losses[-1][2]


def test_a_model_that_has_learned_the_dialogues_repeats_them_token_by_token(learned, sandbox):
    model, tokenizer = learned[0]
    dialogues, _ = toy._dialogues(tokenizer, seed=3, size=8)
    place = get_args(BackendName).index(sandbox.backend)
    problems = load_problems("arithmetic?difficulty=2&split=train&size=8&seed=3", instruction="")[place::2]
    found = rollouts(
        TransformersGenerator(model, tokenizer),
        [problem.prompt for problem in problems],
        sampling=Sampling(56, temperature=0.0),
        tools="calls",
        sandbox=sandbox,
        max_rounds=2,
    )
    assert [ids_of(one) for one in found] == [ids_of(one) for one in dialogues[4 * place :][:4]]
    assert [one.answer for one in found] == [problem.ground_truth for problem in problems]


def test_only_what_a_model_would_have_said_is_learned(tokenizer, dialogues):
    ids, said = toy._padded(dialogues[1], tokenizer.pad_token_id)
    for row, dialogue in enumerate(dialogues[1]):
        whole = [*dialogue.prompt_ids, *dialogue.completion_ids]
        assert ids[row, : len(whole)].tolist() == whole
        assert ids[row, len(whole) :].eq(tokenizer.pad_token_id).all()
        assert said[row].nonzero().flatten().tolist() == [
            len(dialogue.prompt_ids) + place for place, one in enumerate(dialogue.sampled) if one
        ]


@pytest.fixture(scope="module")
def of_two_steps(tmp_path_factory):
    with patch.object(toy, "PROBLEMS", 8):
        return make_toy(tmp_path_factory.mktemp("toy") / "toy", warmup_steps=2)


def test_the_same_arguments_give_the_same_files(tmp_path, of_two_steps):
    """Whatever was drawn before, on however many threads, and none of it is left changed."""
    torch.manual_seed(123)
    drawn = torch.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with patch.object(toy, "PROBLEMS", 8):
            again = make_toy(tmp_path / "again", warmup_steps=2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert files_of(again) == files_of(of_two_steps)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("options", [{"seed": 1, "warmup_steps": 2}, {"warmup_steps": 1}, {"warmup_steps": 0}])
def test_every_argument_matters(tmp_path, of_two_steps, options):
    with patch.object(toy, "PROBLEMS", 8):
        other = make_toy(tmp_path / "other", **options)
    assert (other / "model.safetensors").read_bytes() != (of_two_steps / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------------- saving


def test_what_is_saved_is_read_as_any_model_is(of_two_steps, tokenizer):
    model, found = load_model(of_two_steps)
    assert model.num_parameters() < 400_000
    assert found.get_vocab() == tokenizer.get_vocab() == load_tokenizer(of_two_steps).get_vocab()
    assert found.chat_template == tokenizer.chat_template
    assert TransformersGenerator(model, found).eos_token_ids == {tokenizer.eos_token_id}
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_a_directory_is_there_whole_or_not_at_all(tmp_path):
    with (
        patch("transformers.PreTrainedTokenizerFast.save_pretrained", side_effect=OSError("No space left on device")),
        pytest.raises(OSError, match="No space left"),
    ):
        make_toy(tmp_path / "toy", warmup_steps=0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    assert (make_toy(tmp_path / "empty", warmup_steps=0) / "config.json").exists()
    assert (make_toy(tmp_path / "a" / "b", warmup_steps=0) / "config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]
    assert os.stat(tmp_path / "empty").st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps must be an integer of at least 0, got -1"),
        ({"warmup_steps": 1.0}, "warmup_steps must be an integer of at least 0, got 1.0"),
        ({"seed": True}, "seed must be an integer of at least 0, got True"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_toy(tmp_path / "toy", **options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=re.escape(f"directory must be new or empty, got {place}, which is not")):
            make_toy(place, warmup_steps=0)
    assert (tmp_path / "file").read_text() == "mine"


# --------------------------------------------------------------------------------------------------------------- name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("toy", {"warmup_steps": 700, "seed": 0}),
        ("toy?seed=7", {"warmup_steps": 700, "seed": 7}),
        ("toy?warmup_steps=0&seed=1", {"warmup_steps": 0, "seed": 1}),
    ],
)
def test_options_in_the_name(name, options):
    assert toy_options(name) == options


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toy?warmup=3", "toy?warmup=3: got 'warmup', allowed are seed, warmup_steps; did you mean 'warmup_steps'?"),
        ("toy?seed", "toy?seed: got 'seed' after '?', allowed is key=value, several with '&' between them"),
        ("toy?seed=1&seed=2", "toy?seed=1&seed=2: has seed twice, allowed is once"),
        ("toy?seed=-1", "toy?seed=-1: seed is '-1', allowed is a whole number from 0 on"),
        ("toy?warmup_steps=1e3", "toy?warmup_steps=1e3: warmup_steps is '1e3', allowed is a whole number from 0 on"),
        ("toys?seed=1", "the model is 'toys?seed=1', allowed is toy[?warmup_steps=700&seed=0]"),
    ],
)
def test_bad_names_are_refused(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        toy_options(name)
