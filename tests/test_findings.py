"""Findings and claims on recordings: their statistics against plain loops, their checks on made-up recordings."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from simulations import findings
from simulations.claims import CLAIMS, real_model, verify
from simulations.claims.registry import Context
from simulations.traces import Trace


def test_clustered_quotient_equals_a_plain_loop():
    rng = np.random.default_rng(0)
    upper, lower, group = rng.normal(2, 1, 12), rng.uniform(1, 2, 12), np.repeat([7, 3, 5, 1], 3)
    value, error = findings.clustered(upper, lower, group)
    assert value == pytest.approx(sum(upper) / sum(lower))
    total = 0.0
    for label in (7, 3, 5, 1):
        total += sum(u - value * v for u, v, g in zip(upper, lower, group, strict=True) if g == label) ** 2
    assert error == pytest.approx(math.sqrt(4 / 3 * total) / sum(lower))
    assert math.isnan(findings.clustered(upper, lower, np.zeros(12))[1])


def test_clustered_error_is_the_spread_of_repetitions():
    rng = np.random.default_rng(1)
    found = []
    for _ in range(2000):
        shift = np.repeat(rng.normal(size=20), 5)
        found.append(findings.clustered(1 + shift + rng.normal(size=100), np.ones(100), np.repeat(np.arange(20), 5)))
    values, errors = np.array(found).T
    assert values.std() == pytest.approx(math.sqrt(errors @ errors / len(errors)), rel=0.08)
    # Sequences taken for independent would give half of it.
    assert values.std() > 1.5 * math.sqrt(2 / 100)


@pytest.mark.parametrize(
    ("hot", "second_moment"),
    [((1,), 49 / 32), ((0,), 41 / 32), ((0, 1), 25 / 16)],
)
def test_product_error_of_two_tokens(hot, second_moment):
    """b = 1/2; pi(1) = 3/4 first, and again after the prefixes that are hot: theory's cases, all four strings once."""
    log_ratio, chi2 = np.zeros((4, 2)), np.zeros((4, 2))
    for k, (first, second) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        log_ratio[k, 0], chi2[k, 0] = math.log(1.5 if first else 0.5), 0.25
        if first in hot:
            log_ratio[k, 1], chi2[k, 1] = math.log(1.5 if second else 0.5), 0.25
    product = 5 / 4 * (1 + 0.25 * len(hot) / 2)
    expected = math.log(second_moment) / math.log(product) - 1
    assert findings.product_error(log_ratio, chi2) == pytest.approx(expected, abs=1e-12)


def test_jackknife_of_a_mean_is_the_clustered_error():
    rng = np.random.default_rng(2)
    x, group = rng.normal(size=24), np.repeat(np.arange(6), 4)
    value, error = findings._jackknifed(lambda rows: float(x[rows].mean()), group)
    assert (value, error) == pytest.approx(findings.clustered(x, np.ones(24), group))


# --- Made-up recordings: tokens from known distributions --------------------------------------------------------------


def made_up(kind="temperature", *, n=64, length=80, size=0.08, falling=False, used=False, seed=0, **changes):
    """Tokens of a vocabulary of 6 with new policies at every prefix, and the exact divergences by plain sums."""
    rng = np.random.default_rng(seed)
    shape = (n, length)
    logits = rng.normal(size=(*shape, 6))
    scale = size * np.exp(rng.normal(size=shape) / 2)[..., None]
    if falling:
        scale = scale / np.sqrt(1 + np.arange(length) / 10)[:, None]
    moved = logits + scale * rng.normal(size=logits.shape)
    b, pi = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits, moved))
    token = (rng.random(shape)[..., None] > b.cumsum(-1)).sum(-1).clip(max=5)[..., None]
    ratio = np.log(pi / b)
    kl = -(b * ratio).sum(-1)
    mask = np.arange(length) < rng.integers(length // 2, length + 1, size=(n, 1))
    fields = {
        "name": kind,
        "kind": kind,
        "description": "made up",
        "behavior_logp": np.log(np.take_along_axis(b, token, -1))[..., 0],
        "logp": np.log(np.take_along_axis(pi, token, -1))[..., 0],
        "mask": mask,
        "prompt": np.repeat(np.arange(8), n // 8),
        "advantages": rng.normal(size=n),
        "kl": kl,
        "chi2": (pi**2 / b).sum(-1) - 1,
        "log_variance": (b * (ratio + kl[..., None]) ** 2).sum(-1),
        "provenance": {"model": "Made-up"},
        "meta": {"updates_per_pass": 8, "learning_rate": 1e-6},
    }
    if kind == "update":
        fields |= {"updates": 4, "first_update": np.where(np.arange(n) % 2, -1, 0)}
    if used:
        # Trained-on sequences as training leaves them: all tokens moved by the advantage.
        lift = 0.2 * fields["advantages"][:, None] * (np.arange(n) % 2 == 0)[:, None]
        fields["logp"] = np.minimum(fields["logp"] + lift, 0.0)
    return Trace(**{**fields, **changes})


def recorded(monkeypatch, *traces):
    found = {"seed 0": {trace.name: trace for trace in traces}}
    for module in (real_model, findings):
        monkeypatch.setattr(module, "load_recordings", lambda: found)
    monkeypatch.setattr(findings, "load_traces", lambda: found["seed 0"])


def holds(name):
    claim = CLAIMS[name]
    return all(e.holds for e in claim.check(Context(), claim.subject))


def test_claims_on_exact_divergences_pass_where_they_are_right(monkeypatch):
    recorded(monkeypatch, made_up(), made_up("update", used=True, seed=1))
    assert holds("R.drift")
    for name in ("R.second_moments", "R.constant", "R.reused"):
        outcome = verify(CLAIMS[name], Context())
        assert outcome.passed, (name, [e.found for e in outcome.evidence])


@pytest.mark.parametrize(
    ("name", "field", "wrong"),
    [
        ("R.drift", "kl", lambda x: 2 * x),
        ("R.drift", "kl", np.zeros_like),
        ("R.drift", "logp", lambda x: x - 0.01),
        ("R.second_moments", "chi2", lambda x: x / 2),
        ("R.second_moments", "log_variance", lambda x: 1.5 * x),
        ("R.constant", "chi2", lambda x: np.full_like(x, 0.01)),
        ("R.mean", "logp", lambda x: x - 0.02),
    ],
)
def test_claims_on_exact_divergences_fail_where_they_are_wrong(monkeypatch, name, field, wrong):
    trace = made_up(n=1024)

    recorded(monkeypatch, trace)
    assert holds(name)
    recorded(monkeypatch, dataclasses.replace(trace, **{field: wrong(getattr(trace, field))}))
    assert not holds(name)


def test_trained_on_sequences_are_found_out_and_fresh_ones_are_not(monkeypatch):
    recorded(monkeypatch, made_up("update", used=True))
    assert holds("R.reused")
    recorded(monkeypatch, made_up("update", used=False))
    assert not holds("R.reused")


@pytest.mark.parametrize("power", [0.2, 0.5, 1.0])
def test_exact_power_of_a_power_law(power):
    t = np.arange(1, 101.0)
    variance = np.diff(np.concatenate([[0.0], 0.3 * t ** (2 * power)]))
    mask = np.tile(np.arange(100) < 100, (4, 1))
    # One sequence ends early; where fewer than half go on, nothing is read.
    mask[0, 50:] = mask[1, 80:] = mask[2, 90:] = False
    found = real_model.exact_power(np.where(mask, np.where(t <= 90, variance, 99.0), 0.0), mask)
    assert found == pytest.approx(power, abs=1e-9)


def test_growth_is_told_by_the_variance_of_late_tokens(monkeypatch):
    recorded(monkeypatch, made_up("update", falling=True), made_up("precision"))
    outcome = verify(CLAIMS["R.growth"], Context())
    assert outcome.passed
    trace = made_up("update", falling=True).select(np.arange(64) % 2 == 1)
    early, late = (trace.log_variance[:, part][trace.mask[:, part]].mean() for part in (slice(0, 16), slice(64, None)))
    assert outcome.evidence[0].numbers["late_over_early"]["seed 0, update"] == pytest.approx(late / early)
    recorded(monkeypatch, made_up("update"))
    assert not holds("R.growth")


def test_tables_of_a_made_up_recording(monkeypatch):
    tempered, updated = made_up(), made_up("update", used=True, seed=1)
    recorded(monkeypatch, tempered, updated)
    spread, exact, reuse, clips = findings.recorded_tables()
    assert [table["title"].split(":")[0] for table in (spread, exact, reuse, clips)] == ["Findings on Made-up"] * 4
    assert [row["pair"] for row in spread["rows"]] == ["temperature", "update, trained on", "update, held out"]
    mask, kl, variance, chi2 = tempered.mask, tempered.kl, tempered.log_variance, tempered.chi2
    row = exact["rows"][0]
    assert float(row["drift/var"].split(" ")[0]) == pytest.approx(-kl[mask].sum() / variance[mask].sum(), abs=1e-3)
    assert float(row["sigma"].split(" ")[0]) == pytest.approx(math.sqrt(variance[mask].mean()), abs=1e-3)
    assert row["CV of chi2"] == pytest.approx(chi2[mask].std() / chi2[mask].mean())
    assert abs(float(row["product error %"].split(" ")[0])) < 30
    (row,) = reuse["rows"]
    own, held_out = (float(row[f"excess, {part}"].split(" ")[0]) for part in ("own", "held out"))
    assert own > 20
    assert 0.4 < held_out < 1.8
    assert row["excess, same group"] == row["% clipped, same group"] == "-"
    assert row["epochs"] == 1.0
    assert [row["pair"] for row in clips["rows"]] == ["temperature", "update, trained on", "update, held out"]
    assert set(clips["rows"][0]) == {"recording", "pair", *findings.WINDOWS, "ctpo centered"}


def test_groups_choose_their_tables():
    assert findings.tables({"1", "4"}) == []
    found = findings.tables({"10", "11", "R"})
    assert [section["group"] for section in found] == ["10", "11", "R", "R", "R", "R"]
    assert all(section["title"] and section["note"] and section["rows"] for section in found)
