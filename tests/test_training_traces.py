"""Traces of a training run: what is written and when, whole or not at all, and read back as the diagnostics take it."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import masks

from ctpo.diagnostics import by_position, diagnose
from ctpo.train import _run_directory
from ctpo.train.traces import TraceWriter, read_traces

ARRAYS = ("logp", "behavior_logp", "mask", "advantages", "groups")


def micro_batch(seed=0, rows=4, length=6, dtype=torch.float32):
    """Arguments of `TraceWriter.add`: padding and gaps, which hold NaN."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(length) < rng.integers(1, length + 1, rows)[:, None]) & (rng.random((rows, length)) < 0.8)
    behavior_logp = np.where(mask, rng.uniform(-3, -1, (rows, length)), np.nan)
    logp = np.where(mask, behavior_logp + rng.normal(0, 0.1, (rows, length)), np.inf)
    arrays = [torch.tensor(x, dtype=dtype) for x in (logp, behavior_logp)]
    return *arrays, torch.tensor(mask), torch.tensor(rng.normal(size=rows), dtype=torch.float32)


def write(directory, *batches, step=1, rank=0, iteration=0, **options):
    writer = TraceWriter(directory, 1, rank=rank)
    for batch in batches:
        writer.add(*batch, step=step, iteration=iteration, **options)
    return writer.flush()


def test_columns_hold_what_was_given(tmp_path):
    logp, behavior_logp, mask, advantages = micro_batch()
    mask[2], mask[3, -1] = False, True
    path = write(
        tmp_path,
        (logp, behavior_logp, mask, advantages[:, None]),
        step=7,
        rank=3,
        iteration=1,
        rewards=torch.tensor([1.0, 0.0, math.nan, 0.5]),
        reward_parts={"correct": torch.tensor([1, 0, 0, 1]), "format": torch.tensor([0.0, 0.25, math.nan, 0.5])},
        sampling_logp=behavior_logp - 0.5,
        rollout=5,
        groups=torch.tensor([0, 0, 1, 1]),
        prompt_ids=["a", None, 3, "b"],
    )
    assert path == tmp_path / "step-00000007-rank-00003.parquet"
    rows = pq.read_table(path).to_pylist()
    for i, row in enumerate(rows):
        last = max((t + 1 for t in range(6) if mask[i, t]), default=0)
        for name, tensor in (("logp", logp), ("behavior_logp", behavior_logp), ("sampling_logp", behavior_logp - 0.5)):
            np.testing.assert_array_equal(np.float32(row.pop(name)), tensor[i, :last].numpy())
        assert row.pop("mask") == mask[i, :last].tolist()
        assert row.pop("advantage") == advantages[i]
    assert rows.pop(2)["reward/correct"] == 0.0
    common = {"step": 7, "rank": 3, "iteration": 1, "fresh": False, "rollout": 5}
    assert rows == [
        common | {"group": 0, "prompt_id": "a", "reward": 1.0, "reward/correct": 1.0, "reward/format": 0.0},
        common | {"group": 0, "prompt_id": None, "reward": 0.0, "reward/correct": 0.0, "reward/format": 0.25},
        common | {"group": 1, "prompt_id": "b", "reward": 0.5, "reward/correct": 1.0, "reward/format": 0.5},
    ]
    schema = pq.read_schema(path)
    assert schema.field("logp").type == pa.list_(pa.float32())
    assert schema.field("mask").type == pa.list_(pa.bool_())
    assert schema.field("advantage").type == schema.field("reward").type == pa.float32()


def test_every_column_is_documented(tmp_path):
    path = write(tmp_path, micro_batch(), reward_parts={"NAME": torch.zeros(4)})
    text = (sys.modules[TraceWriter.__module__].__doc__ or "").split("\n\n")[2]
    documented = [line.split()[0] for line in text.splitlines() if line and not line.startswith(("=", " ", "column"))]
    assert documented == pq.read_schema(path).names


def test_only_every_nth_update_and_only_what_was_added(tmp_path):
    writer = TraceWriter(tmp_path / "new" / "traces", 3)
    assert [writer.due(step) for step in range(1, 8)] == [False, False, True, False, False, True, False]
    for step in range(1, 8):
        for k in range(2):
            writer.add(*micro_batch(10 * step + k, rows=k + 1), step=step, iteration=0)
        found = writer.flush()
        assert (found is None) == (step % 3 != 0)
        assert writer.flush() is None
    names = sorted(path.name for path in writer.directory.iterdir())
    assert names == ["step-00000003-rank-00000.parquet", "step-00000006-rank-00000.parquet"]
    traces = read_traces(writer.directory)
    assert traces["step"].tolist() == [3, 3, 3, 6, 6, 6]
    wanted = [micro_batch(10 * step + k, rows=k + 1)[3] for step in (3, 6) for k in range(2)]
    assert traces["advantages"].tolist() == torch.cat(wanted).tolist()
    # A step that is done again replaces its file.
    write(writer.directory, micro_batch(1, rows=5), step=6)
    assert read_traces(writer.directory)["step"].tolist() == [3, 3, 3, *[6] * 5]


def test_nothing_is_copied_before_it_is_written_and_nothing_of_the_graph_is_kept(tmp_path):
    logp, *others = micro_batch()
    writer = TraceWriter(tmp_path, 1)
    tensor = logp.clone().requires_grad_()
    writer.add(tensor * 1.0, *others, step=1, iteration=0)
    kept = writer._pending[0]["tables"]
    assert kept["behavior_logp"].data_ptr() == others[0].data_ptr()
    assert not kept["logp"].requires_grad
    assert writer.flush() is not None


@given(
    data=st.data(),
    rows=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    length=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, np.float32]),
)
def test_what_is_read_is_what_was_written(tmp_path_factory, data, rows, length, dtype):
    """Micro-batches of other lengths in two files; masked places hold anything, and come back as 0 in the padding."""
    directory = tmp_path_factory.mktemp("traces")
    batches = []
    for k, n in enumerate(rows):
        width = length + k
        mask = np.array([data.draw(masks(width)) for _ in range(n)], bool).reshape(n, width)
        values = np.round(np.random.default_rng([k, n, width]).uniform(-8, 0, (2, n, width)) * 8) / 8
        values[:, ~mask] = np.nan
        logp, behavior_logp = (
            (values[j].astype(dtype) if dtype is np.float32 else torch.tensor(values[j]).to(dtype)) for j in (0, 1)
        )
        advantages = np.arange(n) / 4 - 0.25
        if dtype is not np.float32:
            mask, advantages = torch.tensor(mask), torch.tensor(advantages)
        batches.append((logp, behavior_logp, mask, advantages, values))
    write(directory, *(batch[:4] for batch in batches[:1]), step=1)
    if batches[1:]:
        write(directory, *(batch[:4] for batch in batches[1:]), step=1, rank=1)
    if not sum(rows):
        with pytest.raises(ValueError, match="has no sequences"):
            read_traces(directory)
        return
    found = read_traces(directory)
    assert len(found["logp"]) == sum(rows)
    assert found["logp"].dtype == found["behavior_logp"].dtype == found["advantages"].dtype == np.float32
    longest, i = 0, 0
    for _, _, mask, advantages, values in batches:
        for row in range(len(mask)):
            own = np.flatnonzero(mask[row])
            longest = max(longest, *(own + 1), 0)
            np.testing.assert_array_equal(np.flatnonzero(found["mask"][i]), own)
            np.testing.assert_array_equal(found["logp"][i, own], values[0, row, own])
            np.testing.assert_array_equal(found["behavior_logp"][i, own], values[1, row, own])
            padding = slice(own[-1] + 1 if len(own) else 0, None)
            assert not found["logp"][i, padding].any()
            assert found["advantages"][i] == advantages[row]
            i += 1
    assert found["mask"].shape[1] == longest


def test_prompts_are_those_of_their_rollouts(tmp_path):
    """Sequences of one prompt meet again in several updates; numbers of groups begin anew with each rollout batch."""
    for step, (rollout, groups) in enumerate([(0, [0, 0, 1, 1]), (0, [2, 2, 1, 0]), (1, [0, 0, 0, 1])], start=1):
        write(tmp_path, micro_batch(step), step=step, rollout=rollout, groups=torch.tensor(groups))
    groups = read_traces(tmp_path)["groups"].tolist()
    assert groups == [0, 0, 1, 1, 2, 2, 1, 0, 3, 3, 3, 4]
    assert "groups" not in read_traces(write(tmp_path / "b", micro_batch()))
    assert read_traces(write(tmp_path / "c", micro_batch(), groups=np.array([4, 4, 2, 2])))["groups"].tolist() == [
        1, 1, 0, 0,
    ]  # fmt: skip


def test_choosing_sequences_and_updates(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, micro_batch(step, rows=2), step=step, iteration=step % 20 // 10)
    assert read_traces(tmp_path)["fresh"].tolist() == [False, False, True, True, False, False]
    assert read_traces(tmp_path, sequences="fresh")["step"].tolist() == [20, 20]
    assert read_traces(tmp_path, sequences="trained_on")["step"].tolist() == [10, 10, 30, 30]
    assert read_traces(tmp_path, steps=(10, 20))["step"].tolist() == [10, 10, 20, 20]
    assert read_traces(tmp_path, sequences="trained_on", steps=(11, 30))["iteration"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="no sequences of the updates 11 to 19 with sequences='all'"):
        read_traces(tmp_path, steps=(11, 19))
    with pytest.raises(ValueError, match="did you mean 'fresh'"):
        read_traces(tmp_path, sequences="fresch")


def test_optional_columns(tmp_path):
    plain = read_traces(write(tmp_path / "a", micro_batch()))
    assert set(plain) == {"logp", "behavior_logp", "mask", "advantages", "step", "rank", "iteration", "fresh"}
    batch = micro_batch()
    full = read_traces(
        write(tmp_path / "b", batch, rewards=batch[3], reward_parts={"x": batch[3]}, sampling_logp=batch[0])
    )
    assert set(full) - set(plain) == {"rewards", "reward/x", "sampling_logp"}
    np.testing.assert_array_equal(full["rewards"], batch[3])
    np.testing.assert_array_equal(full["sampling_logp"], full["logp"])
    # Some files with, some without.
    write(tmp_path / "b", batch, step=2)
    mixed = read_traces(tmp_path / "b")
    assert set(plain) <= set(mixed)
    assert "rewards" not in mixed
    assert "sampling_logp" not in mixed
    assert np.isnan(mixed["reward/x"][4:]).all()


def test_the_diagnostics_take_them(tmp_path):
    batch = micro_batch(3, rows=60, length=40, dtype=torch.float64)
    write(tmp_path, batch, groups=torch.arange(60) // 4)
    traces = read_traces(tmp_path)
    arrays = {name: traces[name] for name in ARRAYS}
    assert diagnose(**arrays, estimator="ctpo").spread.n_units == 15
    mine = by_position(*(traces[name] for name in ARRAYS[:3]), pareto=False)
    direct = by_position(
        *(batch[k].numpy().astype(np.float32) if k < 2 else batch[k].numpy() for k in (0, 1, 2)), pareto=False
    )
    for name, column in direct.items():
        np.testing.assert_array_equal(mine[name], column)


# --- Whole or not at all ---


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    writer = TraceWriter(tmp_path, 1)
    writer.add(*micro_batch(), step=1, iteration=0)
    with monkeypatch.context() as patch:
        patch.setattr(_run_directory.os, "fsync", full)
        with pytest.raises(OSError, match=r"cannot write .*step-00000001.*: No space left on device"):
            writer.flush()
    assert list(tmp_path.iterdir()) == []
    assert writer.flush() is None
    writer.add(*micro_batch(), step=2, iteration=0)
    assert writer.flush() is not None
    with pytest.raises(OSError, match="cannot write"):
        write(tmp_path / "step-00000002-rank-00000.parquet" / "below", micro_batch())


def test_a_file_that_is_being_written_is_not_read(tmp_path, monkeypatch):
    seen = []

    def look(table, file, **options):
        original(table, file, **options)
        seen.append(len(list(tmp_path.iterdir())))
        with pytest.raises(ValueError, match=r"no file ends with \.parquet"):
            read_traces(tmp_path)

    original = pq.write_table
    monkeypatch.setattr(pq, "write_table", look)
    write(tmp_path, micro_batch())
    assert seen == [1]
    assert len(read_traces(tmp_path)["logp"]) == 4


def test_files_of_later_updates_are_discarded(tmp_path):
    for step, rank in ((5, 0), (10, 0), (10, 1), (15, 2), (100000000, 0)):
        write(tmp_path, micro_batch(), step=step, rank=rank)
    (tmp_path / "mine.parquet").touch()
    writer = TraceWriter(tmp_path, 5)
    writer.discard_after(10)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["mine.parquet", *(f"step-{s:08d}-rank-{r:05d}.parquet" for s, r in ((5, 0), (10, 0), (10, 1)))]
    writer.discard_after(0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.parquet"]
    TraceWriter(tmp_path / "nowhere", 5).discard_after(0)


# --- Refusals ---


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_every_must_be_a_positive_integer(every):
    with pytest.raises(ValueError, match="every must be a positive integer"):
        TraceWriter("x", every)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"behavior_logp": torch.zeros(4, 5)}, r"behavior_logp must have the shape of logp, \(4, 6\); got \(4, 5\)"),
        ({"mask": torch.ones(4)}, "mask must have the shape of logp"),
        ({"sampling_logp": torch.zeros(3, 6)}, "sampling_logp must have the shape of logp"),
        ({"advantages": torch.zeros(4, 6)}, r"advantage must have one value per sequence, shape \(4,\); got \(4, 6\)"),
        ({"rewards": torch.zeros(3)}, "reward must have one value per sequence"),
        ({"groups": torch.zeros(5)}, "group must have one value per sequence"),
        ({"reward_parts": {"x": torch.zeros(3)}}, "reward/x must have one value per sequence"),
        ({"prompt_ids": ["a"]}, "prompt_ids must have one entry per sequence, 4; got 1"),
    ],
)
def test_shapes_are_checked(tmp_path, changes, message):
    names = ("logp", "behavior_logp", "mask", "advantages")
    arguments = dict(zip(names, micro_batch(), strict=True)) | changes
    writer = TraceWriter(tmp_path, 1)
    with pytest.raises(ValueError, match=message):
        writer.add(**arguments, step=1, iteration=0)
    assert writer.flush() is None


def test_one_update_per_file(tmp_path):
    writer = TraceWriter(tmp_path, 1)
    writer.add(*micro_batch(), step=1, iteration=0)
    with pytest.raises(ValueError, match="step must be 1 until it is flushed; got 2"):
        writer.add(*micro_batch(), step=2, iteration=0)


def test_files_that_are_no_traces(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_traces(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no traces: no file ends with \.parquet"):
        read_traces(tmp_path)
    (tmp_path / "text.parquet").write_text("logp")
    for path in (tmp_path, tmp_path / "text.parquet"):
        with pytest.raises(ValueError, match=r"text\.parquet is not a parquet file"):
            read_traces(path)
    pq.write_table(pa.table({"logp": [[1.0]]}), tmp_path / "text.parquet")
    with pytest.raises(ValueError, match="has no column 'advantage'; it has logp"):
        read_traces(tmp_path)
    path = write(tmp_path / "cut", micro_batch())
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index("logp"), "logp", pa.array([[0.0] * 9] * 4)), path)
    with pytest.raises(ValueError, match="logp must have as many entries as mask"):
        read_traces(path)


def test_reading_needs_no_torch(tmp_path):
    path = write(tmp_path, micro_batch())
    code = f"import sys; from ctpo.train.traces import *; read_traces({str(path)!r}); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "False"
