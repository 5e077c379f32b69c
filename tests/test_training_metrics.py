"""Metrics by position of a training run: plain loops, any split into micro-batches and ranks, checkpoints."""

from __future__ import annotations

import io
import itertools
import math
import re

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from strategies import batches
from torch.utils._python_dispatch import TorchDispatchMode

import ctpo
from ctpo import ESTIMATORS, Estimator, PositionClip, RatioClip
from ctpo.diagnostics import by_position
from ctpo.train import _training_metrics as module
from ctpo.train._training_metrics import EDGES, PositionMetrics

BY_POSITION = ("tokens", "drift", "spread", "ess", "clip")
REASONS = ("low", "high", "dual", "rejected", "saturated", "zero_advantage")


def sample(seed, rows=5, length=300, drift=-0.002, sigma=0.04, dtype=torch.float64):
    """A batch of padded sequences with gaps, one of no tokens; NaN where masked, some advantages 0."""
    rng = np.random.default_rng(seed)
    mask = np.arange(length) < rng.integers(length // 2, length + 1, rows)[:, None]
    mask &= rng.random((rows, length)) < np.where(rng.random(rows) < 0.5, 0.8, 1.1)[:, None]
    mask[-1] = rows == 1
    step = rng.normal(drift, sigma, (rows, length))
    behavior_logp = np.where(mask, rng.uniform(-3.0, -1.0, (rows, length)), np.nan)
    logp = np.where(mask, behavior_logp + step, np.inf)
    advantages = np.where(rng.random(rows) < 0.2, 0.0, rng.normal(size=rows))
    arrays = [torch.tensor(x, dtype=dtype) for x in (logp, behavior_logp, advantages)]
    return *arrays, torch.tensor(mask)


def evaluated(batch, estimator="ctpo"):
    estimator = estimator if isinstance(estimator, Estimator) else ESTIMATORS[estimator]
    return estimator.evaluate(*batch, validate=False)


def metrics_of(batch, estimator="ctpo", *, fresh=True):
    metrics = PositionMetrics("cpu")
    metrics.add(evaluated(batch, estimator), batch[-1], fresh=fresh)
    return metrics.pop()


def expected(batch, estimator="ctpo", kind="fresh"):
    """The table of the module by plain loops; what the estimator does to a token is taken from it."""
    logp, behavior_logp, _, mask = (x.tolist() for x in batch)
    found = evaluated(batch, estimator)
    flags = {name: getattr(found.coefficients, f"clipped_{name}").tolist() for name in ("low", "high", "dual")}
    flags |= {name: getattr(found.coefficients, name).tolist() for name in ("rejected", "saturated")}
    advantages = found.advantages.expand(batch[0].shape).tolist()
    tokens = []
    for i, row in enumerate(mask):
        place = oracle.positions(row)
        log_rho = oracle.level(oracle.token_log_ratios(logp[i], behavior_logp[i], row), row, "cumulative")
        for t in range(len(row)):
            if row[t]:
                acted = {name: flag[i][t] for name, flag in flags.items()}
                tokens.append((place[t], log_rho[t], acted | {"zero_advantage": advantages[i][t] == 0}))
    result = {}
    for low, high in itertools.pairwise((*EDGES, math.inf)):
        here = [(t, x, acted) for t, x, acted in tokens if low <= t < high]
        if not here:
            continue
        n = len(here)
        drift = math.fsum(x / t for t, x, _ in here) / n
        spread = math.sqrt(math.fsum((x - drift * t) ** 2 / t for t, x, _ in here) / n)
        largest = max(x for _, x, _ in here)
        weights = [math.exp(x - largest) if largest > -math.inf else 0.0 for _, x, _ in here]
        squares = math.fsum(w * w for w in weights)
        clipped = sum(acted["low"] or acted["high"] or acted["dual"] for _, _, acted in here)
        ess = math.fsum(weights) ** 2 / squares / n if squares else 0.0
        values = dict(zip(BY_POSITION, (n, drift, spread, ess, clipped / n), strict=True))
        result |= {f"position/{kind}/{low}/{name}": value for name, value in values.items()}
    for name in REASONS if tokens else ():
        result[f"clip/{kind}/{name}"] = sum(acted[name] for _, _, acted in tokens) / len(tokens)
    return result


def close(found, wanted, *, relative=1e-9, absolute=1e-9):
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=relative, abs=absolute), name


@pytest.mark.parametrize("name", ["ctpo", "grpo", "gspo", "topr", "sapo", "dapo"])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 300, 1100])
def test_equal_to_plain_loops(name, length):
    batch = sample([length, len(name)], length=length)
    assert any(value > 0 for key, value in expected(batch, name).items() if key.endswith("/tokens"))
    close(metrics_of(batch, name), expected(batch, name))


@given(batch=batches(zero_ratios=False), name=st.sampled_from(list(ESTIMATORS)), fresh=st.booleans())
def test_equal_to_plain_loops_for_awkward_batches(batch, name, fresh):
    arrays = [torch.tensor(x) for x in (batch.logp, batch.behavior_logp, batch.advantages, batch.mask)]
    close(metrics_of(arrays, name, fresh=fresh), expected(arrays, name, "fresh" if fresh else "trained_on"))


def test_every_bucket_by_hand():
    """Sequences of log rho_t = c t and -c t: no drift, and spread c times the root of the mean position."""
    length, c = 70_000, 2.0**-12
    step = torch.tensor([[c], [-c]], dtype=torch.float64).expand(2, length)
    zeros, mask = torch.zeros(2, length, dtype=torch.float64), torch.ones(2, length, dtype=torch.bool)
    estimator = Estimator("cumulative", PositionClip(), max_log_ratio=None)
    found = metrics_of((step, zeros, torch.tensor([1.0, -1.0]), mask), estimator)
    assert [int(key.split("/")[2]) for key in found if key.endswith("tokens")] == [
        4**k for k in (0, 2, 3, 4, 5, 6, 7, 8)
    ]
    for low, high in itertools.pairwise((*EDGES, length + 1)):
        bucket = [found[f"position/fresh/{low}/{name}"] for name in BY_POSITION]
        weights = [math.exp(sign * c * t) for sign in (1, -1) for t in range(low, high)]
        ess = math.fsum(weights) ** 2 / math.fsum(w * w for w in weights) / len(weights)
        # The window is -0.025 to 0.05 roots of t.
        clipped = sum(c * t > 0.05 * math.sqrt(t) for t in range(low, high))
        clipped += sum(-c * t < -0.025 * math.sqrt(t) for t in range(low, high))
        assert bucket[0] == 2 * (high - low)
        assert bucket[1] == pytest.approx(0.0, abs=1e-12)
        assert bucket[2] == pytest.approx(c * math.sqrt((low + high - 1) / 2), rel=1e-9)
        assert bucket[3] == pytest.approx(ess, rel=1e-9)
        assert bucket[4] == clipped / (2 * (high - low))


def test_a_drift_alone_is_no_spread():
    batch = torch.full((3, 500), -1.25, dtype=torch.float64), torch.full((3, 500), -1.0, dtype=torch.float64)
    found = metrics_of((*batch, torch.ones(3), torch.ones(3, 500, dtype=torch.bool)))
    for low in (1, 16, 64, 256):
        assert found[f"position/fresh/{low}/drift"] == pytest.approx(-0.25, rel=1e-12)
        assert found[f"position/fresh/{low}/spread"] < 1e-6


def test_ratios_of_exactly_one():
    logp, _, advantages, mask = sample(3, dtype=torch.float32)
    found = metrics_of((logp, logp, advantages, mask))
    for name, value in found.items():
        wanted = {"drift": 0.0, "spread": 0.0, "ess": 1.0, "clip": 0.0}.get(name.rpartition("/")[2])
        assert wanted is None or value == wanted, name


@pytest.mark.parametrize("name", ["ctpo", "grpo"])
def test_equal_to_the_diagnostics(name):
    batch = sample(4, rows=7)
    logp, behavior_logp, advantages, mask = (x.numpy() for x in batch)
    table = by_position(
        logp, behavior_logp, mask, advantages=advantages, estimator=name, edges=(*EDGES[:5], 10**6), pareto=False
    )
    found = metrics_of(batch, name)
    for j, low in enumerate(EDGES[:4]):
        assert found[f"position/fresh/{low}/tokens"] == table["n_tokens"][j] > 0
        assert found[f"position/fresh/{low}/drift"] == pytest.approx(table["drift"][j], rel=1e-9)
        assert found[f"position/fresh/{low}/clip"] == pytest.approx(table["clip_total"][j], rel=1e-12)


def test_equal_to_the_diagnostics_at_a_single_position():
    batch = sample(5, rows=7, length=1, sigma=1.0)
    table = by_position(*(batch[k].numpy() for k in (0, 1, 3)), pareto=False)
    found, n = metrics_of(batch), table["n_sequences"][0]
    assert n > 2
    assert found["position/fresh/1/ess"] == pytest.approx(table["ess_fraction"][0], rel=1e-9)
    # Over tokens, not an estimate for one degree of freedom less.
    assert found["position/fresh/1/spread"] == pytest.approx(table["std_log_ratio"][0] * math.sqrt((n - 1) / n))


def test_equal_to_the_metrics_of_the_loss():
    batch = sample(4, rows=7)
    wanted = ctpo.policy_loss(*batch).metrics
    found = metrics_of(batch)
    for low in (1, 16, 64, 256):
        assert found[f"position/fresh/{low}/ess"] == pytest.approx(float(wanted[f"ess/position_{low}"]), rel=1e-9)
    for name in ("low", "high", "dual", "rejected"):
        assert found[f"clip/fresh/{name}"] == pytest.approx(float(wanted[f"clip/{name}"]), rel=1e-6)
    assert found["clip/fresh/zero_advantage"] == pytest.approx(float(wanted["advantage/zero"]), rel=1e-6)
    short = sample(6, length=15)
    found, wanted = metrics_of(short), ctpo.policy_loss(*short).metrics
    assert found["position/fresh/1/drift"] == pytest.approx(float(wanted["log_rho/mean_per_token"]), rel=1e-9)
    assert found["position/fresh/1/spread"] ** 2 == pytest.approx(float(wanted["log_rho/var_per_token"]), rel=1e-9)


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_ratios_are_cumulative_and_without_limits_whatever_the_estimator(name):
    batch = sample(7, sigma=8.0)  # many tokens beyond max_token_log_ratio, sums beyond max_log_ratio
    wanted, found = metrics_of(batch, Estimator("cumulative", None, "unclipped")), metrics_of(batch, name)
    for key, value in wanted.items():
        if key.startswith("position/") and not key.endswith("/clip"):
            assert found[key] == value


def test_saturated_and_rejected():
    region = next(estimator for estimator in ESTIMATORS.values() if estimator.region is not None)
    for estimator, reason in ((region, "rejected"), (Estimator("cumulative", RatioClip(0.2, 0.2)), "saturated")):
        batch = sample(8, sigma=0.5 if reason == "rejected" else 8.0)
        found, wanted = metrics_of(batch, estimator), expected(batch, estimator)
        assert 0.0 < found[f"clip/fresh/{reason}"] < 1.0
        close(found, wanted, absolute=1e-6)


# --- Micro-batches, ranks, passes ---


def ranks_pop(ranks):
    """What each of several ranks gets from `pop`."""
    sent = []
    for rank in ranks:
        state = rank.state_dict()
        copy = PositionMetrics("cpu")
        copy.load_state_dict(state)
        copy.pop(lambda x: sent.append(x.clone()) or x)
    return [rank.pop(lambda _: torch.cat(sent)) for rank in ranks]


@given(
    seed=st.integers(0, 2**32 - 1),
    owner=st.lists(st.integers(0, 8), min_size=9, max_size=9),
    long=st.sampled_from([14, 40, 130]),
    scale=st.sampled_from([0.03, 3.0]),
    drift=st.sampled_from([-0.1, 0.0, 2.0]),
)
def test_any_split_gives_the_same(seed, owner, long, scale, drift):
    """9 sequences over 3 ranks of 3 micro-batches each, any of which may have none; each padded to its own length."""
    batch = sample(seed, rows=9, length=long, sigma=scale, drift=drift)
    fresh = [(seed >> i) % 2 == 1 for i in range(9)]
    ranks = [PositionMetrics("cpu") for _ in range(3)]
    whole = PositionMetrics("cpu")
    for part, is_fresh in itertools.product(range(9), (False, True)):
        rows = [i for i in range(9) if owner[i] == part and fresh[i] == is_fresh]
        if rows:
            last = batch[3][rows].any(0).nonzero().flatten().tolist()
            width = last[-1] + 1 if last else 1
            own = [x[rows] if x.ndim == 1 else x[rows, :width] for x in batch]
            ranks[part % 3].add(evaluated(own), own[3], fresh=is_fresh)
    for is_fresh in (False, True):
        rows = [i for i in range(9) if fresh[i] == is_fresh]
        whole.add(evaluated([x[rows] for x in batch]), batch[3][rows], fresh=is_fresh)
    wanted = whole.pop()
    for found in ranks_pop(ranks):
        close(found, wanted)
    assert all(rank.pop() == {} for rank in ranks)


def test_fresh_and_trained_on_apart():
    first, second = sample(9), sample(10, drift=0.1)
    metrics = PositionMetrics("cpu")
    metrics.add(evaluated(second), second[3], fresh=False)
    metrics.add(evaluated(first), first[3], fresh=True)
    close(metrics.pop(), expected(first) | expected(second, kind="trained_on"))
    assert metrics.pop() == {}


def test_nothing_counted_nothing_said():
    assert PositionMetrics("cpu").pop() == {}
    logp, behavior_logp, advantages, mask = sample(11)
    assert metrics_of((logp, behavior_logp, advantages, torch.zeros_like(mask))) == {}
    for shape in ((0, 4), (3, 0), (0, 0)):
        empty = torch.zeros(shape)
        assert metrics_of((empty, empty, torch.zeros(shape[0]), empty > 0)) == {}


# --- Numbers ---


@pytest.mark.parametrize(("drift", "sigma"), [(-0.05, 0.03), (0.05, 0.03), (-1.0, 0.5), (0.0, 4.0)])
def test_float32_loses_nothing_to_large_drifts_and_ratios(drift, sigma):
    """log rho_t of hundreds of nats, whose exponential no float holds, and a mean 100 times its spread."""
    batch = sample(12, rows=4, length=3000, drift=drift, sigma=sigma, dtype=torch.float32)
    exact = [x.double() if x.is_floating_point() else x for x in batch]
    assert metrics_of(batch)["position/fresh/1024/tokens"] > 1000
    # The rounding of log rho_t itself: float32 sums of up to 3000 terms.
    close(metrics_of(batch), expected(exact), relative=3e-3, absolute=1e-6)


def test_many_micro_batches_add_up():
    """As many tokens as float32 could not count, at a mean that would drown the spread."""
    batch = sample(13, drift=-0.05)
    metrics = PositionMetrics("cpu")
    metrics.add(evaluated(batch), batch[3], fresh=True)
    once = metrics.state_dict()
    many = {"edges": once["edges"], "numbers": once["numbers"] * 2.0**26}
    log_weights = module.PositionMetrics._sums(many["numbers"])[:, module._ADDITIVE :]
    log_weights[:] = module.PositionMetrics._sums(once["numbers"])[:, module._ADDITIVE :] + 26 * math.log(2.0)
    metrics.load_state_dict(many)
    metrics.add(evaluated(batch), batch[3], fresh=True)
    found, wanted = metrics.pop(), expected(batch)
    for key, value in wanted.items():
        if key.endswith("/tokens"):
            assert found[key] == value * (2**26 + 1)
        else:
            assert found[key] == pytest.approx(value, rel=1e-7, abs=1e-12)


def test_half_precision():
    logp, behavior_logp, advantages, mask = sample(14, dtype=torch.bfloat16)
    exact = [x.double() for x in (logp, behavior_logp, advantages)]
    # Differences of bfloat16 numbers are formed in float32, where they are exact.
    close(metrics_of((logp, behavior_logp, advantages, mask)), expected((*exact, mask)), relative=1e-4, absolute=1e-5)


def test_ratios_of_zero():
    logp, behavior_logp, advantages, mask = (x.clone() for x in sample(15, rows=3, length=40))
    mask[:], behavior_logp[:], logp[:] = True, -1.0, -1.25
    logp[0, 20] = -math.inf
    found = metrics_of((logp, behavior_logp, advantages, mask))
    same = metrics_of((logp[1:], behavior_logp[1:], advantages[1:], mask[1:]))
    assert found["position/fresh/1/drift"] == pytest.approx(-0.25)  # positions before
    assert all(math.isfinite(value) for value in found.values())
    assert found["position/fresh/16/drift"] < -1e6
    weights = [math.exp(-0.25 * (t - 16)) for row in range(3) for t in range(16, 41) if row or t < 21]
    ess = math.fsum(weights) ** 2 / math.fsum(w * w for w in weights) / 75
    assert found["position/fresh/16/ess"] == pytest.approx(ess)
    assert same["position/fresh/16/drift"] == pytest.approx(-0.25)
    logp[:] = -math.inf
    assert metrics_of((logp, behavior_logp, advantages, mask))["position/fresh/16/ess"] == 0.0


def test_nan_at_a_policy_token_shows():
    logp, behavior_logp, advantages, mask = (x.clone() for x in sample(16, rows=3, length=70))
    mask[0], logp[0], behavior_logp[0] = True, -1.0, -1.0
    logp[0, 30] = math.nan
    found = metrics_of((logp, behavior_logp, advantages, mask))
    for name in ("drift", "spread", "ess"):
        assert math.isnan(found[f"position/fresh/16/{name}"])
        assert math.isnan(found[f"position/fresh/64/{name}"])
    assert math.isfinite(found["position/fresh/1/drift"])


class NoReading(TorchDispatchMode):
    """Fails at operators that an accelerator would have to wait for."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in self.FORBIDDEN, name
        return func(*args, **(kwargs or {}))


def test_no_host_synchronization():
    batch = sample(17)
    found, metrics = evaluated(batch), PositionMetrics("cpu")
    with NoReading():
        metrics.add(found, batch[3], fresh=True)
    close(metrics.pop(), expected(batch))
    with NoReading(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        found.log_ratio.sum().item()


def test_nothing_is_kept_for_a_gradient():
    logp, *others = sample(18)
    logp.requires_grad_()
    metrics = PositionMetrics("cpu")
    metrics.add(evaluated((logp, *others)), others[-1], fresh=True)
    assert not metrics.state_dict()["numbers"].requires_grad


# --- Checkpoints ---


def test_a_checkpoint_goes_on_exactly():
    batches_ = [sample(seed) for seed in range(20, 24)]
    through, before = PositionMetrics("cpu"), PositionMetrics("cpu")
    for k, batch in enumerate(batches_):
        through.add(evaluated(batch), batch[3], fresh=k % 2 == 0)
        if k < 2:
            before.add(evaluated(batch), batch[3], fresh=k % 2 == 0)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    kept = before.state_dict()
    file.seek(0)
    after = PositionMetrics("cpu")
    after.load_state_dict(torch.load(file, weights_only=True))
    for k, batch in enumerate(batches_[2:]):
        after.add(evaluated(batch), batch[3], fresh=k % 2 == 0)
        before.add(evaluated(batch), batch[3], fresh=k % 2 == 0)
    assert after.pop() == through.pop() == before.pop()
    assert after.pop() == {}
    # A state is a copy: neither the metrics that it is of nor those that it is given to write to it.
    after.load_state_dict(kept)
    after.add(evaluated(batches_[0]), batches_[0][3], fresh=True)
    file.seek(0)
    assert torch.equal(kept["numbers"], torch.load(file, weights_only=True)["numbers"])


def test_a_state_of_other_buckets_is_refused():
    metrics = PositionMetrics("cpu")
    state = metrics.state_dict()
    for changed in ({"edges": [1, 2, 4]}, {"numbers": torch.zeros(2, 3)}):
        with pytest.raises(ValueError, match=r"buckets from \[1, 16, 64"):
            metrics.load_state_dict(state | changed)


def test_every_name_is_documented():
    documented = set()
    for cell in re.findall(r"^((?:position|clip)/[\w/]+(?:, \w+)*)", module.__doc__ or "", flags=re.MULTILINE):
        first, *others = cell.split(", ")
        documented |= {first} | {f"{first.rpartition('/')[0]}/{name}" for name in others}
    found = {name for name in metrics_of(sample(25)) if not name.startswith("position/") or "/64/" in name}
    assert found == documented
