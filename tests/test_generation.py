"""Generation: samples against the model's probabilities, where sequences end, and models wherever they lie."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import re
import shutil
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from scipy import stats
from tiny_models import save_tiny_chat_model, tiny_chat_model
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import ctpo.train.generation as generation
from ctpo.train.generation import (
    Sampling,
    TransformersGenerator,
    VllmGenerator,
    load_model,
    open_generator,
)

# peft 0.21 asks transformers 5.23 by the former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROMPTS = [[10, 11, 12], [40, 41, 42, 43, 44, 45, 46], [7], [99, 98], [10, 11, 12]]


@pytest.fixture
def generator():
    return TransformersGenerator(*tiny_chat_model(), batch_size=2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"max_tokens": True}, "max_tokens must be an integer of at least 1, got True"),
        ({"max_tokens": 1.5}, "max_tokens must be an integer of at least 1, got 1.5"),
        ({"temperature": -0.1}, "temperature must be a number, at least 0 and finite, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be a number, at least 0 and finite, got nan"),
        ({"temperature": "1"}, "temperature must be a number, at least 0 and finite, got '1'"),
        ({"temperature": True}, "temperature must be a number, at least 0 and finite, got True"),
        ({"top_p": 0.0}, "top_p must be a number in (0, 1], got 0.0"),
        ({"top_p": 1.1}, "top_p must be a number in (0, 1], got 1.1"),
        ({"top_p": "x"}, "top_p must be a number in (0, 1], got 'x'"),
        ({"top_k": -1}, "top_k must be an integer of at least 0, got -1"),
        ({"stop": "```"}, "stop must be a sequence of strings that are not empty, got '```'"),
        ({"stop": None}, "stop must be a sequence of strings that are not empty, got None"),
        ({"stop": ("",)}, "stop must be a sequence of strings that are not empty, got ('',)"),
    ],
)
def test_sampling_refuses(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampling(**{"max_tokens": 8} | options)


@pytest.mark.parametrize("seed", [-1, 0.5, True, None])
def test_seed_is_checked(generator, seed):
    with pytest.raises(ValueError, match=f"seed must be an integer of at least 0, got {seed}"):
        generator.generate([[1, 2]], Sampling(2), seed)


def greedy(model, prompt, tokens, eos):
    """Oracle: one token after the other, without padding, batches or a cache."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in eos:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_greedy_is_the_most_probable_token_whatever_the_batch(batch_size):
    model, tokenizer = tiny_chat_model()
    made = TransformersGenerator(model, tokenizer, batch_size=batch_size)
    found = made.generate(PROMPTS, Sampling(24, temperature=0), seed=0)
    assert found == [greedy(model, prompt, 24, made.eos_token_ids) for prompt in PROMPTS]
    assert found[0] != found[1]


def test_samples_depend_on_the_seed_only(generator):
    sampling = Sampling(16)
    first = generator.generate(PROMPTS, sampling, seed=5)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = generator.generate(PROMPTS, sampling, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert again == first
    assert generator.generate(PROMPTS, sampling, seed=6) != first
    # Equal prompts are sampled independently.
    assert first[0] != first[4]


def test_samples_of_two_batches_are_independent(generator):
    copies = generator.generate([[10, 11, 12]] * 4, Sampling(16), seed=0)
    assert len({tuple(ids) for ids in copies}) == 4


def test_defaults_of_the_model_do_not_leak(generator):
    clean = generator.generate(PROMPTS, Sampling(16), seed=1)
    model = generator.model
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.2,
        top_p=0.3,
        top_k=3,
        repetition_penalty=3.0,
        min_new_tokens=9,
        eos_token_id=[258],
    )
    kept = model.generation_config.to_dict()
    assert generator.generate(PROMPTS, Sampling(16), seed=1) == clean
    assert model.generation_config.to_dict() == kept
    # They would: given only what `Sampling` says, `generate` takes the rest from them.
    given = GenerationConfig(max_new_tokens=16, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, pad_token_id=256)
    ids = torch.tensor([PROMPTS[0]] * 20)
    outs = []
    for config in (model.generation_config, GenerationConfig()):
        model.generation_config = config
        with torch.random.fork_rng():
            torch.manual_seed(0)
            outs.append(model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=given))
    assert outs[0].shape != outs[1].shape or not torch.equal(*outs)


def first_tokens(generator, count, **options):
    found = generator.generate([[10, 11, 12]] * count, Sampling(1, **options), seed=3)
    return [ids[0] for ids in found]


def probabilities(generator, temperature=1.0):
    with torch.no_grad():
        logits = generator.model(torch.tensor([[10, 11, 12]])).logits[0, -1].double()
    return torch.softmax(logits / temperature, -1)


def chi_square_p(tokens, expected):
    """Of counts against probabilities, tokens with fewer than 5 expected counts in one class."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected)).double()
    expected = expected * len(tokens)
    rare = expected < 5
    classes = [(counts[i], expected[i]) for i in range(len(expected)) if not rare[i]]
    classes.append((counts[rare].sum(), expected[rare].sum()))
    statistic = sum((count - mean) ** 2 / mean for count, mean in classes if mean > 0)
    return stats.chi2.sf(float(statistic), len(classes) - 1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_have_the_probabilities_of_the_model(temperature):
    generator = TransformersGenerator(*tiny_chat_model(), batch_size=4000)
    tokens = first_tokens(generator, 4000, temperature=temperature)
    assert chi_square_p(tokens, probabilities(generator, temperature)) > 1e-6 / 2
    # Negative control: the test tells a temperature from one that is a fifth higher.
    assert chi_square_p(tokens, probabilities(generator, temperature * 1.2)) < 1e-6
    if temperature == 1.0:
        assert len(set(tokens)) > 50, "transformers keeps 50 tokens where it is not told otherwise"


def test_top_k_and_top_p_keep_the_most_probable_tokens():
    generator = TransformersGenerator(*tiny_chat_model(), batch_size=2000)
    ranked = probabilities(generator).sort(descending=True)
    assert set(first_tokens(generator, 2000, top_k=3)) == set(ranked.indices[:3].tolist())
    nucleus = int((ranked.values.cumsum(-1) < 0.3).sum()) + 1
    assert 2 <= nucleus <= 20
    assert set(first_tokens(generator, 2000, top_p=0.3)) == set(ranked.indices[:nucleus].tolist())


def follow(generator, following):
    """Make the model's next token a function of the last one."""
    forward = generator.model.forward

    def forced(*args, input_ids=None, **options):
        out = forward(*args, input_ids=input_ids, **options)
        out.logits = torch.zeros_like(out.logits)
        for row, token in enumerate(input_ids[:, -1].tolist()):
            out.logits[row, -1, following.get(token, token)] = 1e4
        return out

    return patch.object(generator.model, "forward", forced)


@pytest.mark.parametrize("pad", ["<|im_end|>", "<|endoftext|>", None])
def test_sequences_end_where_they_end(generator, pad):
    """Also where the padding is a token that ends sequences, or one that a model may sample."""
    tokenizer = generator.tokenizer
    tokenizer.pad_token = pad
    assert (tokenizer.pad_token_id is None) == (pad is None)
    a, b, c, d, x = (tokenizer.encode(letter)[0] for letter in "abcdx")
    end, text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    following = {a: b, b: c, c: d, d: end, x: text}
    with follow(generator, following):
        found = generator.generate([[a], [x, x, x], [d], [c]], Sampling(6, stop=("bc", "zz")), seed=0)
        assert found == [[b, c], [text] * 6, [end], [d, end]]
        # The prompt is not searched for stop strings.
        assert generator.generate([[a, b]], Sampling(6, stop=("bc",)), seed=0) == [[c, d, end]]
        generator.eos_token_ids = frozenset({end, text})
        assert generator.generate([[x], [a]], Sampling(6), seed=0) == [[text], [b, c, d, end]]
        assert generator.generate([[a]], Sampling(2), seed=0) == [[b, c]]


def test_stop_string_in_the_middle_of_a_character(generator):
    """A token of the tiny model is a byte: a stop string ends with its last one."""
    ids = generator.tokenizer.encode("é!")
    with follow(generator, dict(zip([20, *ids], ids, strict=False))):
        assert generator.generate([[20]], Sampling(9, stop=("é",)), seed=0) == [ids[:2]]
        assert generator.generate([[20]], Sampling(9, stop=("é!",)), seed=0) == [ids]


def test_stop_string_that_begins_with_a_space():
    """Tokenizers of the kind of Llama 2's drop the space at the beginning of what they decode."""
    tokenizer = Tokenizer(BPE({"▁": 0, "x": 1, "a": 2}, []))
    tokenizer.decoder = decoders.Metaspace()
    model, _ = tiny_chat_model()
    generator = TransformersGenerator(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    with follow(generator, {5: 2, 2: 0, 0: 1}):
        assert generator.generate([[5]], Sampling(9, stop=(" x",)), seed=0) == [[2, 0, 1]]


def test_ids_that_end_sequences_are_those_of_tokenizer_and_model():
    model, tokenizer = tiny_chat_model()
    for ids, expected in ((None, {258}), (256, {256, 258}), ([256, 7], {7, 256, 258})):
        model.generation_config.eos_token_id = ids
        assert TransformersGenerator(model, tokenizer).eos_token_ids == expected


def test_model_in_training_stays_so(generator):
    generator.model.train()
    generator.generate(PROMPTS, Sampling(2), seed=0)
    assert generator.model.training


def test_no_prompts(generator):
    assert generator.generate([], Sampling(2), seed=0) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt_ids[1] is empty"),
        ([[1] * 4096], "prompt_ids[0] has 4096 tokens; the model's context is 4096"),
    ],
)
def test_prompts_that_a_model_cannot_go_on_from(generator, prompts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generator.generate(prompts, Sampling(2), seed=0)


def test_load_model_from_directory_and_checkpoint(directory, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-12"
    shutil.copytree(directory, checkpoint)
    (checkpoint / "trainer_state.json").write_text("{}")
    expected, _ = tiny_chat_model()
    for name in (directory, str(directory), checkpoint):
        model, tokenizer = load_model(name)
        assert not model.training
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), expected.parameters(), strict=True))
        assert tokenizer.encode("<|im_end|>") == [258]
    assert load_model(directory, dtype="bfloat16")[0].dtype == torch.bfloat16


def test_dtype_on_a_cpu_is_float32_unless_told(directory, tmp_path):
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(tmp_path)
    for file in directory.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    assert load_model(tmp_path, device="cpu")[0].dtype == torch.float32
    assert open_generator(tmp_path, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def adapter(directory, tmp_path_factory):
    """A LoRA adapter whose matrices are random, and the logits of base and adapter together."""
    import peft

    base = AutoModelForCausalLM.from_pretrained(directory)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(path)
    with torch.no_grad():
        return path, model.eval()(torch.tensor([PROMPTS[1]])).logits


def test_load_model_puts_an_adapter_on_its_base(directory, adapter):
    path, expected = adapter
    model, _ = load_model(path)
    plain, _ = load_model(directory)
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([PROMPTS[1]])).logits, expected)
        assert not torch.allclose(plain(torch.tensor([PROMPTS[1]])).logits, expected, atol=1e-3)


def test_generator_of_an_adapter(adapter):
    generator = open_generator(adapter[0])
    clean = generator.generate(PROMPTS, Sampling(8), seed=0)
    base = generator.model.get_base_model()
    base.generation_config.repetition_penalty = 5.0
    generator.model.generation_config.top_k = 1
    assert generator.generate(PROMPTS, Sampling(8), seed=0) == clean
    assert base.generation_config.repetition_penalty == 5.0
    assert generator.model.generation_config.top_k == 1
    assert generator.context == 4096


def missing(package):
    found = importlib.util.find_spec
    return patch.object(generation, "find_spec", lambda name: None if name == package else found(name))


def test_packages_that_are_missing_are_named(adapter, tmp_path):
    with missing("peft"), pytest.raises(ImportError, match=r"is an adapter; to load it: pip install peft"):
        load_model(adapter[0])
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    with (
        missing("gguf"),
        pytest.raises(ImportError, match=r"small.gguf' is a .gguf file; to load it: pip install gguf"),
    ):
        load_model(tmp_path / "small.gguf")
    with missing("vllm"), pytest.raises(ImportError, match=r"vLLM is not installed: pip install vllm, or use backend"):
        open_generator("org/model", backend="vllm")


def test_gguf_is_read_from_its_file(directory, tmp_path, monkeypatch):
    """Which file is asked for; reading it is left to transformers."""
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    asked = []

    def reader(kind):
        def from_pretrained(path, **options):
            asked.append((path, options["gguf_file"]))
            return kind(directory)

        return SimpleNamespace(from_pretrained=from_pretrained)

    import transformers

    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(transformers, name, reader(getattr(transformers, name).from_pretrained))
    load_model(tmp_path / "small.gguf")
    assert asked == [(str(tmp_path), "small.gguf")] * 2


def test_models_that_are_not_there(directory, tmp_path):
    def refused(name, message):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            load_model(name)
        assert "\n" not in str(error.value)

    refused(tmp_path / "nowhere", "nowhere': no such file or directory")
    refused("./nowhere", "model './nowhere': no such file or directory")
    refused("some/where/else", "model 'some/where/else': no such file or directory")
    refused("", "model '': give a directory, a .gguf file or a name on the Hub")
    refused(tmp_path, "the directory has neither config.json nor adapter_config.json")
    for step in (9, 10):
        shutil.copytree(directory, tmp_path / "run" / f"checkpoint-{step}")
    refused(tmp_path / "run", f"did you mean '{tmp_path / 'run' / 'checkpoint-10'}'?")
    (tmp_path / "file.bin").write_text("x")
    refused(tmp_path / "file.bin", "file.bin': a file must be a .gguf; give the directory of other models")

    bare = tmp_path / "bare"
    shutil.copytree(directory, bare, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    refused(bare, "bare': the directory has no tokenizer")
    damaged = tmp_path / "damaged"
    shutil.copytree(directory, damaged)
    (damaged / "config.json").write_text("{")
    refused(damaged, "damaged': cannot be loaded (")

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for settings in ("{", "[]", "{}", '{"base_model_name_or_path": null}'):
        (adapter / "adapter_config.json").write_text(settings)
        refused(adapter, "adapter': adapter_config.json names no base_model_name_or_path")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}))
    refused(adapter, "gone': no such file or directory")


def test_hub_names_without_network(monkeypatch, tmp_path):
    for name, value in (("HF_HUB_OFFLINE", True), ("HF_HUB_CACHE", str(tmp_path))):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    with pytest.raises(
        ValueError, match=r"^model 'no-org/no-model': no such directory, and not to be had from the Hub"
    ):
        load_model("no-org/no-model")


def test_other_arguments_are_checked(directory):
    with pytest.raises(
        ValueError, match=r"dtype must be 'auto' or the name of a torch dtype such as 'bfloat16', got '4"
    ):
        load_model(directory, dtype="4bit")
    with pytest.raises(ValueError, match=r"batch_size must be at least 1, got 0"):
        open_generator(directory, batch_size=0)
    with pytest.raises(ValueError, match=r"options of vLLM with backend 'transformers': max_model_len"):
        open_generator(directory, backend="transformers", max_model_len=5)
    with pytest.raises(ValueError, match=r"backend 'vllm' loads the model itself"):
        open_generator(tiny_chat_model(), backend="vllm")


class FakeLLM:
    """Of vLLM's interface as much as is used: the second request runs a token past its stop string."""

    def __init__(self, **options):
        self.options = options
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=options.get("max_model_len", 4096))
        )

    def generate(self, prompts, *, sampling_params, use_tqdm):
        self.asked = (prompts, sampling_params, use_tqdm)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(5, 258))]) for _ in prompts]


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM = FakeLLM
    module.SamplingParams = lambda **options: options
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_vllm_is_asked_for_what_sampling_says(vllm, directory, tmp_path):
    directory = shutil.copytree(directory, tmp_path / "model")
    GenerationConfig(temperature=0.6, do_sample=True, eos_token_id=[256, 258]).save_pretrained(directory)
    made = open_generator(directory, backend="vllm", dtype="bfloat16", max_model_len=100)
    assert isinstance(made, VllmGenerator)
    assert made._llm.options == {"model": str(directory), "dtype": "bfloat16", "max_model_len": 100}
    assert made.context == 100
    assert made.eos_token_ids == {256, 258}
    assert made.generate(PROMPTS[:2], Sampling(7, temperature=0, stop=("x",)), seed=0) == [[5, 258]] * 2
    prompts, parameters, _ = made._llm.asked
    assert prompts == [{"prompt_token_ids": ids} for ids in PROMPTS[:2]]
    seeds = [options.pop("seed") for options in parameters]
    expected = {
        "n": 1,
        "max_tokens": 7,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "stop": ["x"],
        "include_stop_str_in_output": True,
        "stop_token_ids": [256, 258],
        "skip_special_tokens": False,
    }
    assert parameters == [expected] * 2

    made.generate(PROMPTS[:2], Sampling(9, temperature=0.7, top_p=0.9, top_k=20), seed=0)
    options = made._llm.asked[1][0]
    assert (options["max_tokens"], options["temperature"], options["top_p"]) == (9, 0.7, 0.9)
    assert (options["top_k"], options["stop"]) == (20, None)
    assert [options["seed"] for options in made._llm.asked[1]] == seeds
    assert len(set(seeds)) == 2
    made.generate(PROMPTS[:2], Sampling(9), seed=1)
    assert made._llm.asked[1][0]["seed"] not in seeds


def test_vllm_tokens_past_a_stop_string_are_dropped(vllm, directory):
    made = open_generator(directory, backend="vllm")
    ids = made.tokenizer.encode("ab```\ncd")
    assert made._until_stop(ids, ("```\n",)) == ids[:6]
    assert made._until_stop(ids, ("zz", "d")) == ids
    assert made._until_stop(ids, ()) == ids


def test_auto_takes_vllm_only_where_it_can_be_used(vllm, directory, adapter, monkeypatch):
    assert isinstance(open_generator(directory), TransformersGenerator), "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert isinstance(open_generator(directory), VllmGenerator)
    assert isinstance(open_generator(directory, device="cpu"), TransformersGenerator)
    assert isinstance(open_generator(tiny_chat_model()), TransformersGenerator)
    with pytest.raises(ValueError, match=r"vLLM takes a Hub name or the directory of a whole model"):
        open_generator(adapter[0], backend="vllm")


@pytest.mark.parametrize("device", ["nowhere", "xpu"])
def test_a_device_that_is_not_there_is_named(directory, device):
    with pytest.raises(ValueError, match=f"^device '{device}': ") as raised:
        load_model(directory, device=device)
    assert "\n" not in str(raised.value)


def test_a_gguf_file_is_never_looked_for_on_the_hub():
    with pytest.raises(ValueError, match=r"model 'nofile\.gguf': no such file"):
        load_model("nofile.gguf")
