"""Diagnostics against plain loops, exact populations and simulated truths; and what must not change them."""

from __future__ import annotations

import dataclasses
import doctest
import importlib.util
import itertools
import math
import statistics
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import oracle
import oracle_diagnostics as loops
import pytest
import torch
from hypothesis import given, settings
from strategies import GARBAGE, masks

import ctpo.diagnostics
from ctpo import CalibratedClip, Estimator, get_estimator
from ctpo.diagnostics import (
    by_position,
    calibrate_clip,
    chi2_divergence,
    diagnose,
    effective_sample_size,
    fit_spread,
    format_table,
    pareto_k,
)

# Two-sided normal quantile at one false alarm in a million, over the comparisons of one test.
LEVEL = 1e-6


def limit(comparisons: int) -> float:
    return statistics.NormalDist().inv_cdf(1 - LEVEL / comparisons / 2)


@dataclasses.dataclass
class Recorded:
    """Log-probabilities of shape (n, T), NaN and worse where masked."""

    logp: np.ndarray
    behavior_logp: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray
    groups: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.logp, self.behavior_logp, self.mask

    @property
    def longest(self) -> int:
        return int(self.mask.sum(axis=-1).max(initial=0))

    def lists(self) -> tuple[list, list, list]:
        return self.logp.tolist(), self.behavior_logp.tolist(), self.mask.tolist()

    def select(self, *index) -> Recorded:
        rows = index[0]
        return Recorded(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)[:4]), self.groups[rows])


@st.composite
def recorded(draw, rows: int = 6, length: int = 9, like_sizes=(0.03, 0.3, 3.0)) -> Recorded:
    n, steps = draw(st.integers(1, rows)), draw(st.integers(1, length))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = np.array([draw(masks(steps)) for _ in range(n)]).reshape(n, steps)
    behavior_logp = -rng.exponential(1.0, (n, steps))
    logp = behavior_logp + rng.normal(0.0, draw(st.sampled_from(like_sizes)), (n, steps))
    advantages = rng.choice([-1.5, -0.5, 0.0, 2.0], (n, steps))
    bad = rng.choice(GARBAGE, (3, n, steps))
    logp, behavior_logp, advantages = (
        np.where(mask, x, garbage) for x, garbage in zip((logp, behavior_logp, advantages), bad, strict=True)
    )
    return Recorded(logp, behavior_logp, advantages, mask, rng.integers(0, max(n // 2, 1), n))


def walk(n: int, steps: int, sigma: float, *, drift: float | None = None, slope: float = 0.0, seed: int = 0):
    """Gaussian random walks of token log-ratios; E rho_t = 1 unless told otherwise.

    `slope` is the standard deviation of a log-ratio that all tokens of a sequence have in common.
    """
    rng = np.random.default_rng(seed)
    mean = -(sigma**2) / 2 if drift is None else -drift
    steps_of = rng.normal(mean, sigma, (n, steps)) + slope * rng.normal(size=(n, 1))
    behavior_logp = -rng.exponential(1.0, (n, steps))
    return behavior_logp + steps_of, behavior_logp


def assert_tables_equal(found: dict, expected: dict, rtol: float = 1e-12) -> None:
    assert list(found) == list(expected)
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=1e-12, err_msg=name)


# Effective sample size, chi-square divergence, Pareto k.


@given(
    table=st.integers(1, 4).flatmap(
        lambda k: st.lists(
            st.lists(
                st.one_of(st.floats(-1000, 1000), st.floats(-1, 1), st.just(-math.inf)),
                min_size=k,
                max_size=k,
            ),
            min_size=0,
            max_size=7,
        ).map(lambda rows: np.array(rows, dtype=float).reshape(-1, k))
    ),
    data=st.data(),
)
def test_sample_size_and_chi2_equal_loops(xp, table, data):
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=table.size, max_size=table.size)))
    mask = mask.astype(bool).reshape(table.shape)
    garbage = np.where(mask, table, data.draw(st.sampled_from(GARBAGE)))
    ess = effective_sample_size(xp(garbage), xp(mask))
    divergence = chi2_divergence(xp(garbage), xp(mask))
    assert ess.dtype == np.float64
    assert ess.shape == divergence.shape == table.shape[1:]
    for j in range(table.shape[1]):
        column = table[mask[:, j], j].tolist()
        np.testing.assert_allclose(ess[j], loops.effective_sample_size(column), rtol=1e-12)
        if column and max(column) > -math.inf:
            assert 1 - 1e-12 <= ess[j] <= len(column) * (1 + 1e-12)
            np.testing.assert_allclose(divergence[j], loops.chi2(column), rtol=1e-9, atol=1e-14)
            np.testing.assert_allclose(ess[j] * (1 + divergence[j]), len(column), rtol=1e-12)
        else:
            assert ess[j] == 0
            assert np.isnan(divergence[j])
    np.testing.assert_array_equal(effective_sample_size(xp(garbage.T), xp(mask.T), axis=1), ess)
    np.testing.assert_array_equal(chi2_divergence(xp(garbage.T), xp(mask.T), axis=-1), divergence)


def test_sample_size_of_the_published_examples():
    """One batch can gain: {10, 01} under b = 1/2, pi = 3/4. The population cannot: (4/5)^t."""
    rho = np.array([[3 / 2, 3 / 4], [1 / 2, 3 / 4]])
    np.testing.assert_allclose(effective_sample_size(np.log(rho)), [8 / 5, 2], rtol=1e-15)
    every_path = np.array(list(itertools.product([1 / 2, 3 / 2], repeat=4)))
    log_rho = np.cumsum(np.log(every_path), axis=1)
    np.testing.assert_allclose(effective_sample_size(log_rho) / 16, [4 / 5, 16 / 25, 64 / 125, 256 / 625], rtol=1e-14)
    np.testing.assert_allclose(chi2_divergence(log_rho), [1.25**t - 1 for t in (1, 2, 3, 4)], rtol=1e-13)


def test_small_divergence_keeps_its_digits():
    x = 1e-9 * np.random.default_rng(0).normal(size=1000)
    np.testing.assert_allclose(chi2_divergence(x), x.var(), rtol=1e-6)


def test_size_of_the_logarithms_does_not_matter():
    x = np.random.default_rng(1).normal(size=(200, 2))
    for shift in (-1000.0, 1000.0, 1e5):
        np.testing.assert_allclose(effective_sample_size(x + shift), effective_sample_size(x), rtol=1e-8)
        np.testing.assert_allclose(pareto_k(x + shift), pareto_k(x), rtol=1e-6)
    assert effective_sample_size(np.array([1000.0, -1000.0])) == 1
    assert effective_sample_size(np.zeros(7)) == 7


@pytest.mark.parametrize("k", [0.2, 0.5, 0.8, 1.5])
def test_pareto_k_of_a_pareto_tail(xp, k):
    """u^(-k) of a uniform u has shape k exactly; the tail of its inverse, which is bounded, has not."""
    n, repeats = 2000, 60
    log_u = np.log(np.random.default_rng(2).random((n, repeats)))
    found = pareto_k(xp(-k * log_u))
    # The fit's prior pulls k towards 1/2 with the weight of 10 of the 134 tail samples.
    expected = (124 * k + 10 * 0.5) / 134 if k < 1 else k
    tolerance = 0.02 + limit(1) * found.std(ddof=1) / math.sqrt(repeats)
    assert abs(found.mean() - expected) < tolerance
    assert abs(pareto_k(xp(log_u)).mean() - expected) > tolerance


def test_pareto_k_says_what_it_cannot_estimate():
    rng = np.random.default_rng(3)
    x = rng.normal(size=200)
    assert np.isnan(pareto_k(x[:24]))
    assert np.isfinite(pareto_k(x[:25]))
    assert np.isnan(pareto_k(x[:0]))
    assert np.isnan(pareto_k(np.full(100, -np.inf)))
    assert pareto_k(np.full(100, 0.3)) == -np.inf
    assert pareto_k(rng.normal(0, 1e-16, 100)) == -np.inf
    assert pareto_k(np.where(np.arange(100) < 50, -1.0, 0.0)) == -np.inf
    assert np.isnan(pareto_k(np.log(np.where(np.arange(100) < 5, 3.0, 1.0))))
    assert pareto_k(rng.normal(0, 1e5, 400)) == np.inf
    assert pareto_k(np.where(np.arange(100) < 3, 0.0, -np.inf)) == np.inf
    # The tail is the largest 20 of 100; the fit needs that five of them do not all equal the 21st.
    tied = np.concatenate([np.linspace(-2, -1, 70), np.full(15, 0.0), np.linspace(1, 2, 15)])
    assert np.isnan(pareto_k(tied))
    assert np.isfinite(pareto_k(np.concatenate([tied[:84], [0.5], tied[85:]])))
    mask = np.arange(300) < 200
    assert pareto_k(np.where(mask, np.resize(x, 300), np.nan), mask) == pareto_k(x)


# Tables by position.


@given(batch=recorded(), data=st.data())
def test_table_equals_loops(batch, data):
    level = data.draw(
        st.sampled_from(["cumulative", "cumulative", "token", "cumulative_mean", "sequence", "lookahead", "turn"])
    )
    ended = data.draw(st.sampled_from(["alive", "stopped"])) if level == "cumulative" else "alive"
    window = 2 if level == "lookahead" else None
    turn_ids = np.broadcast_to(np.arange(batch.mask.shape[1]) // 3, batch.mask.shape) if level == "turn" else None
    inner = data.draw(st.sets(st.integers(2, 12)))
    edges = data.draw(st.none() | st.just(sorted({1, *inner, 13})) | st.just(sorted({3, *inner, 14})))
    groups = data.draw(st.sampled_from([None, batch.groups]))
    table = by_position(
        *batch.arrays,
        edges=edges,
        level=level,
        window=window,
        turn_ids=turn_ids,
        ended=ended,
        groups=groups,
        pareto=False,
    )
    by_sequence = loops.paths(*batch.lists(), level, window, None if turn_ids is None else turn_ids.tolist())
    if ended == "stopped":
        by_sequence = loops.stopped(by_sequence, batch.longest)
    unit = list(range(len(by_sequence))) if groups is None else groups.tolist()
    if edges is None:
        edges = [t for t in (1, 2, 4, 8) if t <= batch.longest] + [batch.longest + 1]
    assert table["t_low"].tolist() == edges[:-1]
    assert table["t_high"].tolist() == [edge - 1 for edge in edges[1:]]
    for j, (low, high) in enumerate(zip(table["t_low"].tolist(), table["t_high"].tolist(), strict=True)):
        for name, expected in loops.ratio_row(by_sequence, low, high, unit).items():
            tolerance = {"rtol": 2e-5, "atol": 2e-7} if name.endswith("_se") else {"rtol": 1e-9, "atol": 1e-12}
            np.testing.assert_allclose(table[name][j], expected, err_msg=f"{name} {low}-{high}", **tolerance)


@given(
    batch=recorded(like_sizes=(0.05, 0.3, 8.0)),
    name=st.sampled_from(["ctpo", "ctpo_fixed", "dapo", "cispo"]),
    data=st.data(),
)
def test_clip_rates_equal_loops(batch, name, data):
    estimator = get_estimator(name)
    groups = data.draw(st.sampled_from([None, batch.groups]))
    table = by_position(
        *batch.arrays,
        advantages=batch.advantages,
        estimator=name,
        groups=groups,
        edges=[1, 2, 5, 11],
        pareto=False,
    )
    bounds = {
        "ctpo": lambda t: oracle.position_bounds(t, 0.025, 0.05, 0.5, 0.05),
        "ctpo_fixed": lambda t: oracle.ratio_bounds(t, 0.5, 4.0),
        "dapo": lambda t: oracle.ratio_bounds(t, 0.2, 0.28),
        "cispo": lambda t: oracle.ratio_bounds(t, 1.0, 4.0),
    }[name]
    advantages, mask = batch.advantages.tolist(), batch.mask.tolist()
    found = [
        oracle.coefficients(p, b, a, m, name=estimator.level, form=estimator.form, bounds=bounds)
        for p, b, a, m in zip(*batch.lists()[:2], advantages, mask, strict=True)
    ]
    unit = list(range(len(mask))) if groups is None else groups.tolist()
    for j, (low, high) in enumerate([(1, 1), (2, 4), (5, 10)]):
        for column, expected in loops.clip_row(found, advantages, mask, low, high).items():
            np.testing.assert_allclose(table[column][j], expected, rtol=1e-12, err_msg=column)
        np.testing.assert_allclose(table["clip_total_se"][j], loops.clip_error(found, mask, low, high, unit), rtol=1e-9)


def test_every_path_of_coin_tosses():
    """b = 1/2, pi = 3/4, all 64 results: E rho_t = 1, chi2 = (5/4)^t - 1, E log rho_t = -t KL(b || pi)."""
    heads = np.array(list(itertools.product([False, True], repeat=6)))
    table = by_position(np.log(np.where(heads, 0.75, 0.25)), np.full(heads.shape, math.log(0.5)), edges=range(1, 8))
    t = np.arange(1, 7)
    np.testing.assert_allclose(table["mean_ratio"], 1, rtol=1e-13)
    np.testing.assert_allclose(table["chi2"], 1.25**t - 1, rtol=1e-12)
    np.testing.assert_allclose(table["ess_fraction"], 0.8**t, rtol=1e-12)
    np.testing.assert_allclose(table["drift"], 0.5 * math.log(0.75), rtol=1e-12)
    np.testing.assert_allclose(table["var_over_t"], (0.5 * math.log(3)) ** 2 * 64 / 63, rtol=1e-12)
    # A mean over n independent equally likely values of variance v has the error sqrt(v / (n - 1)).
    np.testing.assert_allclose(table["mean_ratio_se"], np.sqrt((1.25**t - 1) / 63), rtol=1e-12)
    assert np.isnan(table["pareto_k"]).all()


def test_survivors_are_not_a_martingale():
    """b continues with 1/2, pi with 3/4, then pi = b: E[rho_t | alive] = 1, 3/2, 3/2; stopped, 1."""
    mask = np.array([[True] * 3] * 4 + [[True, False, False]] * 4)
    behavior_logp = np.where(mask, math.log(0.5), np.nan)
    logp = np.where(mask, np.log([[0.75, 0.5, 0.5]] * 4 + [[0.25, 0.5, 0.5]] * 4), np.nan)
    edges = [1, 2, 3, 4]
    alive = by_position(logp, behavior_logp, mask, edges=edges, pareto=False)
    stopped = by_position(logp, behavior_logp, mask, edges=edges, ended="stopped", pareto=False)
    np.testing.assert_allclose(alive["mean_ratio"], [1, 1.5, 1.5], rtol=1e-15)
    np.testing.assert_allclose(alive["chi2"], [1 / 4, 0, 0], atol=1e-15)
    np.testing.assert_allclose(stopped["mean_ratio"], [1, 1, 1], rtol=1e-15)
    np.testing.assert_allclose(stopped["chi2"], [1 / 4] * 3, rtol=1e-15)
    assert alive["n_sequences"].tolist() == [8, 4, 4]
    assert stopped["n_sequences"].tolist() == [8, 8, 8]
    assert alive["n_tokens"].tolist() == stopped["n_tokens"].tolist() == [8, 4, 4]
    fit = fit_spread(logp, behavior_logp, mask, horizon=3)
    np.testing.assert_allclose(fit.mean_token_ratio, 1, rtol=1e-15)


def test_one_hot_prompt_in_two_spreads_faster_than_sqrt_t():
    """log2 r = +-1 under b = 1/3, 2/3 on hot sequences, 0 on cold ones: Var(log2 rho_n) = 4n/9 + n^2/36."""
    hot = np.array(list(itertools.product([1.0, -1.0, -1.0], repeat=6)))
    log2_r = np.concatenate([hot, np.zeros_like(hot)])
    n = len(log2_r)
    table = by_position(log2_r * math.log(2) - 1, np.full_like(log2_r, -1.0), edges=range(1, 8), pareto=False)
    t = np.arange(1, 7)
    exact = (4 * t / 9 + t**2 / 36) * math.log(2) ** 2 * n / (n - 1)
    np.testing.assert_allclose(table["var_over_t"] * t, exact, rtol=1e-12)
    fit = fit_spread(log2_r * math.log(2) - 1, np.full_like(log2_r, -1.0))
    np.testing.assert_allclose(fit.variance_ratio, (24 / 9 + 1) / (6 * (4 / 9 + 1 / 36)), rtol=1e-12)
    np.testing.assert_allclose(fit.drift, math.log(2) / 6, rtol=1e-12)
    assert 0.5 < fit.power < 1


def test_pareto_column_is_of_the_last_position_with_enough_sequences():
    logp, behavior_logp = walk(150, 8, 0.3)
    mask = np.arange(8) < np.where(np.arange(150) < 120, 8, 2)[:, None]
    mask[:40, 6:] = False
    table = by_position(logp, behavior_logp, mask, edges=[1, 3, 9], pareto=True)
    log_rho = np.cumsum(logp - behavior_logp, axis=1)
    assert table["pareto_k"][0] == pytest.approx(float(pareto_k(log_rho[:, 1])), rel=1e-9)
    assert table["pareto_k"][1] == pytest.approx(float(pareto_k(log_rho[:120, 5])), rel=1e-9)
    assert np.isnan(by_position(logp[:99], behavior_logp[:99], pareto=True)["pareto_k"]).all()


def test_weights_beyond_the_range_of_floats():
    logp = np.array([[-1.0, -2.0], [-3001.0, -2.0], [-1001.0, -1000.0]])
    behavior_logp = np.array([[-1001.0, -2.0], [-1.0, -2.0], [-1.0, -1.0]])
    table = by_position(logp, behavior_logp, pareto=False)
    np.testing.assert_allclose(table["ess_fraction"], 1 / 3, rtol=1e-12)
    np.testing.assert_allclose(table["chi2"], 2, rtol=1e-12)
    assert (table["mean_ratio"] == np.inf).all()
    assert (table["mean_ratio_se"] == np.inf).all()
    assert np.isfinite(table["std_log_ratio"]).all()
    fit = fit_spread(logp, behavior_logp)
    assert fit.mean_token_ratio == fit.token_kl == np.inf
    assert np.isnan([fit.mean_token_ratio_se, fit.token_kl_se]).all()


# Fits.


@given(batch=recorded(rows=8), data=st.data())
def test_fit_equals_loops(batch, data):
    horizon = data.draw(st.none() | st.integers(1, max(batch.longest, 1))) if batch.longest else None
    fit = fit_spread(*batch.arrays, horizon=horizon, bootstrap=2)
    steps = [path for path in loops.paths(*batch.lists(), "token") if path]
    assert fit.n_sequences == fit.n_units == len(steps)
    if not steps:
        assert fit.horizon == 0
        assert all(math.isnan(x) for x in dataclasses.astuple(fit)[3:])
        return
    assert fit.horizon == (horizon or loops.horizon([len(path) for path in steps]))
    for name, expected in loops.fit(steps, fit.horizon).items():
        np.testing.assert_allclose(getattr(fit, name), expected, rtol=1e-8, atol=1e-12, err_msg=name)


@settings(max_examples=30)
@given(batch=recorded(rows=8, length=5), by_group=st.booleans(), seed=st.integers(0, 9))
def test_bootstrap_draws_whole_units(batch, by_group, seed):
    """The weights of the matrix products against units copied into lists as often as they are drawn."""
    replicates = 12
    fit = fit_spread(*batch.arrays, groups=batch.groups if by_group else None, bootstrap=replicates, seed=seed)
    steps = loops.paths(*batch.lists(), "token")
    labels = batch.groups.tolist() if by_group else list(range(len(steps)))
    units = [
        [path for path, label in zip(steps, labels, strict=True) if label == unit and path]
        for unit in sorted({label for path, label in zip(steps, labels, strict=True) if path})
    ]
    assert fit.n_units == len(units)
    names = [f.name for f in dataclasses.fields(fit) if f.name.endswith("_se")]
    if len(units) < 2:
        assert all(math.isnan(getattr(fit, name)) for name in names)
        return
    drawn = np.random.default_rng(seed).multinomial(len(units), [1 / len(units)] * len(units), size=replicates)
    repeated = [
        [path for unit, k in zip(units, row, strict=True) for _ in range(k) for path in unit] for row in drawn.tolist()
    ]
    fits = [loops.fit(paths, fit.horizon) for paths in repeated]
    for name in names:
        values = [x[name.removesuffix("_se")] for x in fits]
        defined = [x for x in values if math.isfinite(x)]
        if len(defined) >= 2 and math.isfinite(getattr(fit, name.removesuffix("_se"))):
            np.testing.assert_allclose(
                getattr(fit, name), statistics.stdev(defined), rtol=1e-6, atol=1e-9, err_msg=name
            )


def test_fit_recovers_a_gaussian_walk_and_rejects_others():
    sigma, steps, n = 0.05, 64, 3000
    truth = {
        "sigma": sigma,
        "power": 0.5,
        "drift": sigma**2 / 2,
        "token_drift": sigma**2 / 2,
        "token_kl": sigma**2 / 2,
        "drift_ratio": -0.5,
        "token_std": sigma,
        "variance_ratio": 1.0,
        "mean_token_ratio": 1.0,
        "mean_log_ratio": -(sigma**2) * steps / 2,
        "var_log_ratio": sigma**2 * steps,
    }

    def distances(logp, behavior_logp):
        fit = fit_spread(logp, behavior_logp)
        return {name: abs(getattr(fit, name) - x) / getattr(fit, f"{name}_se") for name, x in truth.items()}

    z = limit(len(truth))
    genuine = distances(*walk(n, steps, sigma))
    assert max(genuine.values()) < z, genuine
    no_drift = distances(*walk(n, steps, sigma, drift=0.0))
    assert {name for name, x in no_drift.items() if x > z} == {
        "drift",
        "token_drift",
        "drift_ratio",
        "mean_token_ratio",
        "mean_log_ratio",
    }
    linear = distances(*walk(n, steps, sigma, slope=sigma))
    assert min(linear[name] for name in ("power", "variance_ratio", "sigma", "var_log_ratio")) > z


def test_drift_is_estimated_without_bias_and_the_divergence_with_less_noise():
    """300 replications of ragged batches; two tokens, so that the truth is a sum of two terms."""
    b, pi = np.array([0.3, 0.7]), np.array([0.4, 0.6])
    kl = float((b * np.log(b / pi)).sum())
    found = []
    for seed in range(300):
        rng = np.random.default_rng([11, seed])
        token = (rng.random((40, 12)) < b[1]).astype(int)
        mask = np.arange(12) < rng.integers(1, 13, 40)[:, None]
        fit = fit_spread(np.log(pi[token]), np.log(b[token]), mask, bootstrap=50, horizon=int(mask.sum(axis=1).max()))
        found.append((fit.token_drift, fit.token_kl, fit.mean_token_ratio, fit.token_drift_se, fit.token_kl_se))
    drift, divergence, ratio, drift_se, divergence_se = np.array(found).T
    np.testing.assert_allclose(divergence - drift, ratio - 1, atol=1e-12)
    z = limit(3)
    for values in (drift, divergence):
        assert abs(values.mean() - kl) < z * values.std(ddof=1) / math.sqrt(len(values))
    # Control: the divergence the other way round is another number.
    other = float((pi * np.log(pi / b)).sum())
    assert abs(divergence.mean() - other) > z * divergence.std(ddof=1) / math.sqrt(len(divergence))
    assert divergence.std() < 0.25 * drift.std()
    assert divergence_se.mean() < 0.25 * drift_se.mean()


def test_power_of_linear_growth_is_one():
    """Tokens that move as one: std(log rho_t) is proportional to t, Var(log rho_T) T times the sum."""
    slopes = np.random.default_rng(4).normal(size=(50, 1))
    fit = fit_spread(np.repeat(slopes, 32, axis=1) - 9, np.full((50, 32), -9.0))
    assert fit.power == pytest.approx(1, abs=1e-12)
    assert fit.power_se == pytest.approx(0, abs=1e-9)
    assert fit.variance_ratio == pytest.approx(32, rel=1e-12)
    assert fit.sigma**2 == pytest.approx(slopes.var(ddof=1) * 33 / 2, rel=1e-12)


def test_rounding_is_no_spread_and_little_spread_is_no_rounding():
    """The same ratios in every sequence; ratios that differ by a billionth; replicates of a single sequence."""
    rng = np.random.default_rng(6)
    behavior_logp = -rng.exponential(size=(50, 8))
    shared, own = rng.normal(size=(1, 8)), rng.normal(size=(50, 8))
    same = fit_spread(behavior_logp + shared, behavior_logp)
    assert (same.sigma, same.var_log_ratio, same.sigma_se) == (0, 0, 0)
    assert math.isnan(same.power)
    assert math.isnan(same.drift_ratio)
    close = fit_spread(behavior_logp + shared + 1e-9 * own, behavior_logp)
    far = fit_spread(behavior_logp + own, behavior_logp)
    assert close.sigma == pytest.approx(1e-9 * far.sigma, rel=1e-5)
    assert close.power == pytest.approx(far.power, rel=1e-5)
    assert "inf s.e. from 1" in diagnose(behavior_logp - 0.1, behavior_logp).verdict[0].statement
    for seed in range(10):  # one replicate in nine draws one sequence three times
        assert fit_spread(*walk(3, 2, 0.1, seed=seed)).drift_ratio_se < 1e6


NAMES = (
    "sigma",
    "power",
    "drift",
    "token_drift",
    "token_kl",
    "drift_ratio",
    "token_std",
    "variance_ratio",
    "mean_token_ratio",
    "var_log_ratio",
)


def excess(estimates: np.ndarray, errors: np.ndarray, allowed: float) -> float:
    """How many of its own standard errors log(reported / true error) lies beyond +-`allowed`."""
    n = len(estimates)
    centered = estimates - estimates.mean()
    variance = centered.var(ddof=1)
    spread = math.sqrt(((centered**2).var() / variance**2 + (errors**2).var() / (errors**2).mean() ** 2) / n) / 2
    distance = abs(0.5 * math.log((errors**2).mean() / variance))
    return max(distance - allowed, 0.0) / spread


@pytest.mark.parametrize("ragged", [False, True])
def test_bootstrap_errors_are_right_over_replications(ragged):
    """Within 10%, the bias of a bootstrap of 100 sequences, plus what 400 replications leave open."""
    replications, n, steps = 400, 100, 24
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    naive = []
    for seed in range(replications):
        logp, behavior_logp = walk(n, steps, 0.1, seed=seed)
        lengths = np.random.default_rng(seed).integers(1, steps + 1, n) if ragged else np.full(n, steps)
        mask = np.arange(steps) < lengths[:, None]
        fit = fit_spread(logp, behavior_logp, mask, bootstrap=100, seed=seed)
        for name in NAMES:
            found[name].append((getattr(fit, name), getattr(fit, f"{name}_se")))
        tokens = np.cumsum(logp - behavior_logp, axis=1)[mask[:, :steps]]
        naive.append(
            (
                fit.drift,
                tokens.std() / math.sqrt(tokens.size) / (np.arange(1, steps + 1) * mask).sum() * mask.sum(),
            )
        )
    z = limit(2 * (len(NAMES) + 1))
    for name, pairs in found.items():
        assert excess(*np.array(pairs).T, allowed=0.1) < z, name
    # Control: errors that take tokens for independent.
    assert excess(*np.array(naive).T, allowed=0.1) > z


def test_table_errors_are_right_over_replications():
    """Linearized errors, with prompts of four responses that share half of their log-ratio."""
    replications, prompts, steps = 400, 60, 8
    columns = ("mean_log_ratio", "std_log_ratio", "ess_fraction", "mean_ratio", "clip_total")
    grouped: dict[str, list[tuple[float, float]]] = {name: [] for name in columns}
    single: dict[str, list[tuple[float, float]]] = {name: [] for name in columns}
    groups = np.repeat(np.arange(prompts), 4)
    for seed in range(replications):
        rng = np.random.default_rng([5, seed])
        step = 0.05 * (rng.normal(size=(prompts * 4, steps)) + np.repeat(rng.normal(size=(prompts, steps)), 4, axis=0))
        mask = np.arange(steps) < rng.integers(2, steps + 1, prompts * 4)[:, None]
        advantages = rng.choice([-1.0, 1.0], prompts * 4)
        for labels, found in ((groups, grouped), (None, single)):
            options = {"groups": labels, "advantages": advantages, "estimator": "ctpo"}
            table = by_position(step - 2, np.full(step.shape, -2.0), mask, edges=[3, 8], pareto=False, **options)
            for name in columns:
                found[name].append((table[name][0], table[f"{name}_se"][0]))
    z = limit(2 * len(columns))
    for name in columns:
        assert excess(*np.array(grouped[name]).T, allowed=0.1) < z, name
    # Control: responses of one prompt taken for independent.
    assert excess(*np.array(single["mean_log_ratio"]).T, allowed=0.1) > z
    assert excess(*np.array(single["mean_ratio"]).T, allowed=0.1) > z


def test_seed_decides_the_bootstrap():
    data = walk(40, 10, 0.1)
    assert fit_spread(*data, seed=1) == fit_spread(*data, seed=1)
    assert fit_spread(*data, seed=1) == fit_spread(*data, seed=np.random.default_rng(1))
    assert fit_spread(*data, seed=1).sigma_se != fit_spread(*data, seed=2).sigma_se
    assert math.isfinite(fit_spread(*data, bootstrap=2).sigma_se)
    few, many = fit_spread(*data, bootstrap=256), fit_spread(*data, bootstrap=1000)
    assert few.sigma == many.sigma
    assert few.sigma_se == pytest.approx(many.sigma_se, rel=0.3)


# Calibration.


@given(batch=recorded(rows=8), power=st.sampled_from([0.5, 0.0, 1.0, None]), drift=st.sampled_from(["log_ratio", "kl"]))
def test_calibration_equals_loops(batch, power, drift):
    options = {"low": 0.2, "high": 0.01, "dual": 0.3, "power": power, "drift": drift}
    steps = [path for path in loops.paths(*batch.lists(), "token") if path]
    horizon = loops.horizon([len(path) for path in steps]) if steps else 0
    fit = loops.fit(steps, horizon) if steps else {"power": math.nan}
    exponent = fit["power"] if power is None else power
    sigma = loops.spread_at_one(steps, horizon, exponent) if math.isfinite(exponent) else math.nan
    if not sigma > 0:
        with pytest.raises(ValueError, match="logp must differ from behavior_logp, and not by the same in every sequ"):
            calibrate_clip(*batch.arrays, **options)
        return
    clip = calibrate_clip(*batch.arrays, **options)
    assert (clip.low, clip.high, clip.dual) == (0.2, 0.01, 0.3)
    expected = (sigma, fit["token_drift" if drift == "log_ratio" else "token_kl"], exponent)
    np.testing.assert_allclose((clip.sigma, clip.drift, clip.power), expected, rtol=1e-7, atol=1e-12)


def normal_rates(clip, t, sigma, drift):
    """Exact shares beyond the bounds of a Gaussian log rho_t: below, above, above the dual bound."""
    law = statistics.NormalDist(-drift * t, sigma * math.sqrt(t))
    low, high, dual = (float(bound) for bound in clip.bounds(t))
    return law.cdf(low), 1 - law.cdf(high), 1 - law.cdf(dual)


@pytest.mark.parametrize("drift", [None, 0.0, -0.002])
def test_a_calibrated_window_has_its_rates_whatever_the_drift(drift):
    """Of 1,000 sequences: the center errs by 0.03 standard deviations, the spread by as little."""
    sigma, true = 0.05, 0.05**2 / 2 if drift is None else drift
    recorded_ = walk(1000, 64, sigma, drift=drift, seed=7)
    clip = calibrate_clip(*recorded_, low=0.2, high=0.1, dual=0.05)
    for t in (1, 8, 64):
        np.testing.assert_allclose(normal_rates(clip, t, sigma, true), (0.2, 0.1, 0.05), rtol=0.2)
    # The divergence is the drift only where E_b r_t = 1.
    by_kl = calibrate_clip(*recorded_, low=0.2, high=0.1, dual=0.05, drift="kl")
    assert by_kl.drift == pytest.approx(sigma**2 / 2, rel=0.05)
    off = abs(normal_rates(by_kl, 64, sigma, true)[0] / 0.2 - 1)
    assert off < 0.2 if drift is None else off > 0.25


def test_a_window_calibrated_to_a_fitted_power():
    """Sequences that diverge at different speeds spread like t."""
    rng = np.random.default_rng(9)
    behavior_logp = np.full((3000, 64), -2.0)
    logp = behavior_logp + 0.01 * rng.normal(size=(3000, 1))
    clip = calibrate_clip(logp, behavior_logp, low=0.1, high=0.1, power=None)
    assert clip.power == pytest.approx(1.0, abs=1e-9)
    assert clip.sigma == pytest.approx(0.01, rel=0.1)
    flat = by_position(
        logp,
        behavior_logp,
        advantages=np.full(3000, -1.0),
        estimator=Estimator("cumulative", clip),
        edges=[1, 2, 64, 65],
        pareto=False,
    )
    np.testing.assert_allclose(flat["clip_low"], 0.1, atol=0.03)


def test_calibration_is_the_same_for_every_array_library(xp):
    logp, behavior_logp = walk(30, 12, 0.1)
    mask = np.arange(12) < np.random.default_rng(1).integers(3, 13, 30)[:, None]
    expected = calibrate_clip(logp, behavior_logp, mask, low=0.1, high=0.2, power=None)
    garbage = np.where(mask, logp, np.nan)
    assert calibrate_clip(xp(garbage), xp(behavior_logp), xp(mask), low=0.1, high=0.2, power=None) == expected


def test_calibration_looks_no_further_than_its_horizon():
    logp, behavior_logp = walk(30, 12, 0.1)
    options = {"low": 0.1, "high": 0.1, "drift": "kl"}
    cut = calibrate_clip(logp[:, :7], behavior_logp[:, :7], **options)
    assert calibrate_clip(logp, behavior_logp, horizon=7, **options) == cut
    assert calibrate_clip(logp, behavior_logp, **options) != cut
    assert isinstance(cut, CalibratedClip)


# Verdicts.


def flags(diagnosis) -> set[str]:
    return {finding.name for finding in diagnosis.verdict if finding.flagged}


def test_genuine_ratios_raise_no_flag_and_others_do():
    assert flags(diagnose(*walk(1000, 64, 0.08))) == set()
    assert flags(diagnose(*walk(1000, 64, 0.08, drift=0.0))) == {
        "mean_token_ratio",
        "mean_ratio",
        "drift_ratio",
    }
    assert flags(diagnose(*walk(1000, 64, 0.02, slope=0.02))) >= {"power", "variance_ratio"}
    assert flags(diagnose(*walk(1000, 64, 0.3))) == {"ess", "pareto_k"}


def test_false_alarms_are_rare():
    """64 sequences, as few as a small run records: at most 1 in 100 of 4 findings, 1,000 batches."""
    names = ("mean_token_ratio", "mean_ratio", "drift_ratio", "power", "variance_ratio")
    alarms = dict.fromkeys(names, 0)
    for seed in range(500):
        for finding in diagnose(*walk(64, 16, 0.1, seed=seed), bootstrap=100).verdict:
            if finding.name in names:
                alarms[finding.name] += finding.flagged
    assert max(alarms.values()) <= 5, alarms


def test_truncated_sampler_is_found():
    """pi spreads 20% of its mass over tokens that a top-p sampler never draws: E rho_t = 0.8^t."""
    logp, behavior_logp = walk(200, 16, 0.05)
    diagnosis = diagnose(logp + math.log(0.8), behavior_logp)
    assert {"mean_token_ratio", "mean_ratio"} <= flags(diagnosis)
    assert diagnosis.verdict[0].value == pytest.approx(0.8, abs=0.01)


def test_findings_carry_their_numbers():
    logp, behavior_logp = walk(100, 16, 0.1)
    advantages = np.where(np.arange(100) % 2, 1.0, -1.0)
    diagnosis = diagnose(logp, behavior_logp, advantages=advantages, estimator="ctpo", seed=3)
    assert [finding.name for finding in diagnosis.verdict] == [
        "mean_token_ratio",
        "mean_ratio",
        "drift_ratio",
        "power",
        "variance_ratio",
        "ess",
        "pareto_k",
        "clip_rate",
    ]
    assert diagnosis.spread == fit_spread(logp, behavior_logp, seed=3)
    table = by_position(logp, behavior_logp, advantages=advantages, estimator="ctpo")
    assert_tables_equal(diagnosis.table, table)
    found = {finding.name: finding for finding in diagnosis.verdict}
    for name in ("mean_token_ratio", "drift_ratio", "power", "variance_ratio"):
        assert found[name].value == getattr(diagnosis.spread, name)
        assert found[name].standard_error == getattr(diagnosis.spread, f"{name}_se")
    assert found["ess"].value == table["ess_fraction"].min()
    assert found["clip_rate"].value == table["clip_total"][-1]
    text = str(diagnosis)
    assert all(finding.statement in text for finding in diagnosis.verdict)
    assert all(name in text for name in table)
    assert (
        f"is {found['power'].value:.3f} (s.e. {found['power'].standard_error:.3f}): within" in found["power"].statement
    )
    assert "s.e." in found["ess"].statement
    assert "s.e." not in found["pareto_k"].statement
    low = diagnose(logp, behavior_logp, min_ess=0.95).verdict[5]
    assert low.flagged
    assert low.value == table["ess_fraction"][np.flatnonzero(table["ess_fraction"] < 0.95)[0]]


def test_mean_ratio_is_tested_while_the_spread_allows_it():
    log_variance = 0.25
    logp, behavior_logp = walk(5000, 64, 0.1)
    finding = diagnose(logp, behavior_logp, bootstrap=2).verdict[1]
    x = np.cumsum(logp - behavior_logp, axis=1)
    steps = int((x.var(axis=0, ddof=1) <= log_variance).sum())
    assert abs(steps - 25) <= 2
    assert finding.value == pytest.approx(np.exp(x[:, steps - 1]).mean(), rel=1e-12)
    assert finding.standard_error == pytest.approx(np.exp(x[:, steps - 1]).std(ddof=1) / math.sqrt(5000), rel=1e-12)
    assert f"position {steps} " in finding.statement
    untested = diagnose(*walk(100, 4, 2.0), bootstrap=2).verdict[1]
    assert not untested.flagged
    assert math.isnan(untested.value)


def test_few_sequences_are_not_judged():
    far = walk(19, 64, 0.01, drift=-1.0)
    assert not any(finding.flagged for finding in diagnose(*far).verdict[:5])
    assert "mean_token_ratio" in flags(diagnose(*walk(20, 64, 0.01, drift=-1.0)))
    many = walk(40, 64, 0.01, drift=-1.0)
    assert not any(f.flagged for f in diagnose(*many, groups=np.arange(40) // 4).verdict[:5])


def test_what_is_too_uncertain_is_said_to_be():
    """Meeting -1/2 says nothing where 0 would be met as well: drift needs sqrt(n T) sigma of 8 or more."""
    found = {finding.name: finding for finding in diagnose(*walk(100, 16, 0.02)).verdict}
    assert "of -0.5, but too uncertain to tell it from 0" in found["drift_ratio"].statement
    assert "of 0.5, the sigma sqrt(t) law" in found["power"].statement
    found = {finding.name: finding for finding in diagnose(*walk(1000, 64, 0.2)).verdict}
    assert "of -0.5, the value for Gaussian" in found["drift_ratio"].statement
    found = {finding.name: finding for finding in diagnose(*walk(20, 2, 0.2)).verdict}
    assert "of 0.5, but too uncertain to tell it from 1" in found["power"].statement


def test_on_policy_is_nothing_to_flag():
    logp, _ = walk(30, 8, 0.1)
    diagnosis = diagnose(logp, logp, advantages=np.ones(30), estimator="ctpo")
    assert flags(diagnosis) == set()
    fit = diagnosis.spread
    assert (fit.sigma, fit.drift, fit.mean_token_ratio) == (0, 0, 1)
    assert math.isnan(fit.power)
    assert math.isnan(fit.drift_ratio)
    np.testing.assert_array_equal(diagnosis.table["ess_fraction"], 1)
    np.testing.assert_array_equal(diagnosis.table["clip_total"], 0)


# What must not change anything.


def outputs(logp, behavior_logp, mask, advantages, groups=None):
    table = by_position(logp, behavior_logp, mask, advantages=advantages, estimator="ctpo", groups=groups, pareto=False)
    return table, fit_spread(logp, behavior_logp, mask, groups=groups, bootstrap=10)


def assert_outputs_equal(found, expected, rtol=1e-12, errors=True):
    assert_tables_equal(found[0], expected[0], rtol)
    for field in dataclasses.fields(found[1]):
        if errors or not field.name.endswith("_se"):
            a, b = getattr(found[1], field.name), getattr(expected[1], field.name)
            np.testing.assert_allclose(a, b, rtol=max(rtol, 1e-8), atol=1e-9, err_msg=field.name)


@given(batch=recorded(), data=st.data())
def test_padding_garbage_gaps_and_empty_rows_do_not_matter(batch, data):
    expected = outputs(*batch.arrays, batch.advantages)
    clean = [np.where(batch.mask, x, -1.0) for x in (batch.logp, batch.behavior_logp, batch.advantages)]
    assert_outputs_equal(outputs(clean[0], clean[1], batch.mask, clean[2]), expected)
    # Gaps closed: every sequence's policy tokens moved to the front, the rest cut.
    order = np.argsort(~batch.mask, axis=1, kind="stable")[:, : max(batch.longest, 1)]
    packed = [np.take_along_axis(x, order, axis=1) for x in (*batch.arrays, batch.advantages)]
    assert_outputs_equal(outputs(*packed), expected)
    # Padding on either side, and sequences without a policy token.
    left, right, above, below = (data.draw(st.integers(0, 3)) for _ in range(4))
    padded = [
        np.pad(x, ((above, below), (left, right)), constant_values=value)
        for x, value in zip((*batch.arrays, batch.advantages), (np.nan, np.inf, False, np.nan), strict=True)
    ]
    assert_outputs_equal(outputs(*padded), expected)


@given(batch=recorded(), data=st.data())
def test_order_of_sequences_does_not_matter(batch, data):
    order = np.array(data.draw(st.permutations(range(len(batch.mask)))))
    moved = batch.select(order)
    found = outputs(*moved.arrays, moved.advantages, moved.groups)
    expected = outputs(*batch.arrays, batch.advantages, batch.groups)
    assert_outputs_equal(found, expected, rtol=1e-9, errors=False)


@given(batch=recorded())
def test_groups_of_one_and_names_of_groups_do_not_matter(batch):
    n = len(batch.mask)
    single = outputs(*batch.arrays, batch.advantages)
    assert_outputs_equal(outputs(*batch.arrays, batch.advantages, np.arange(n) + 5), single)
    names = [f"prompt {label}" for label in batch.groups]
    by_number = outputs(*batch.arrays, batch.advantages, batch.groups)
    assert_outputs_equal(outputs(*batch.arrays, batch.advantages, names), by_number)


@given(batch=recorded())
def test_leading_dimensions_and_advantages_per_sequence(batch):
    per_sequence = np.where(batch.mask.any(axis=1), batch.advantages[:, 0], np.nan)
    per_sequence = np.where(np.isfinite(per_sequence), per_sequence, 1.0)
    expected = outputs(*batch.arrays, per_sequence)
    spread_out = np.where(batch.mask, per_sequence[:, None], np.nan)
    assert_outputs_equal(outputs(*batch.arrays, spread_out), expected)
    stacked = [x.reshape(1, *x.shape) for x in (*batch.arrays, per_sequence)]
    assert_outputs_equal(outputs(*stacked), expected)
    first = [x[0] for x in (*batch.arrays, per_sequence)]
    alone = outputs(*(x[:1] for x in (*batch.arrays, per_sequence)))
    assert_outputs_equal(outputs(*first[:3], np.asarray(first[3])), alone)


@given(batch=recorded())
def test_every_array_library_gives_the_same(xp, batch):
    found = outputs(*(xp(x) for x in (*batch.arrays, batch.advantages)), groups=xp(batch.groups))
    assert_outputs_equal(found, outputs(*batch.arrays, batch.advantages, batch.groups))
    assert all(type(column) is np.ndarray for column in found[0].values())


def test_half_precision_and_gradients_of_torch():
    logp, behavior_logp = walk(20, 6, 0.5)
    low = [torch.asarray(x).to(torch.bfloat16) for x in (logp, behavior_logp)]
    exact = [x.double().numpy() for x in low]
    assert_tables_equal(by_position(*low), by_position(*exact))
    assert fit_spread(low[0].requires_grad_(), low[1]) == fit_spread(*exact)
    assert_tables_equal(by_position(logp.astype(np.float32), low[1]), by_position(logp.astype(np.float32), exact[1]))


# Small and empty inputs.


def test_a_single_sequence_has_no_spread():
    logp, behavior_logp = walk(1, 5, 0.1)
    table = by_position(logp, behavior_logp, advantages=np.array([1.0]), estimator="grpo")
    undefined = {name for name, column in table.items() if np.isnan(column).all()}
    errors = {name for name in table if name.endswith("_se")}
    spreads = {"std_log_ratio", "var_over_t", "ess_fraction", "chi2", "pareto_k"}
    assert undefined == errors | spreads | {"clip_low_given_negative"}
    np.testing.assert_allclose(table["mean_log_ratio"][0], (logp - behavior_logp)[0, 0])
    fit = fit_spread(logp, behavior_logp)
    assert fit.horizon == 5
    np.testing.assert_allclose(fit.drift, -np.cumsum(logp - behavior_logp).sum() / 15)
    assert math.isnan(fit.sigma)
    assert math.isnan(fit.drift_se)
    verdict = diagnose(logp, behavior_logp).verdict
    assert not any(finding.flagged for finding in verdict)
    assert "has no standard error" in verdict[0].statement


def test_a_single_position():
    logp, behavior_logp = walk(50, 1, 0.1)
    table, fit = by_position(logp, behavior_logp), fit_spread(logp, behavior_logp)
    assert table["t_low"].tolist() == table["t_high"].tolist() == [1]
    assert fit.horizon == 1
    assert fit.sigma == pytest.approx((logp - behavior_logp).std(ddof=1), rel=1e-12)
    assert fit.variance_ratio == 1
    assert math.isnan(fit.power)


@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (3, 4), (0,), (4,)])
def test_no_policy_token_at_all(shape):
    logp, mask = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    advantages = np.zeros(shape[:-1])
    table = by_position(logp, logp, mask, advantages=advantages, estimator="ctpo", ended="stopped")
    assert {len(column) for column in table.values()} == {0}
    wide = by_position(logp, logp, mask, edges=[1, 2, 9], advantages=advantages, estimator="ctpo")
    assert wide["n_sequences"].tolist() == wide["n_tokens"].tolist() == [0, 0]
    assert all(
        np.isnan(column).all()
        for name, column in wide.items()
        if name not in ("t_low", "t_high", "n_sequences", "n_tokens")
    )
    diagnosis = diagnose(logp, logp, mask, advantages=advantages, estimator="ctpo")
    assert diagnosis.spread.horizon == 0
    assert flags(diagnosis) == set()
    assert str(diagnosis)


def test_horizon_is_reached_by_half_of_the_sequences():
    def horizon(*lengths):
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        return fit_spread(np.zeros(mask.shape), np.zeros(mask.shape), mask).horizon

    assert horizon(3) == 3
    assert horizon(3, 9) == 3
    assert horizon(3, 9, 5) == 5
    assert horizon(3, 9, 5, 6) == 6
    assert horizon(3, 9, 5, 6, 0, 0) == 6
    logp, behavior_logp = walk(30, 12, 0.1)
    fit, cut = fit_spread(logp, behavior_logp, horizon=7), fit_spread(logp[:, :7], behavior_logp[:, :7])
    assert fit == cut


# Text, imports, bad input.


def test_table_as_text():
    table = {
        "t_low": np.array([1, 128]),
        "drift": np.array([-0.0123456, np.nan]),
        "chi2": np.array([np.inf, 2.0]),
    }
    assert format_table(table).splitlines() == [
        "t_low      drift  chi2",
        "token  nat/token",
        "    1   -0.01235   inf",
        "  128        nan     2",
    ]
    assert format_table(table, ["chi2"]).splitlines() == ["chi2", "", " inf", "   2"]
    with pytest.raises(ValueError, match=r"columns must be one of .*did you mean 'drift'"):
        format_table(table, ["drifd"])
    with pytest.raises(ValueError, match=r"table must have columns of one length; got lengths \[1, 2\]"):
        format_table({"a": np.zeros(1), "b": np.zeros(2)})


def test_import_is_light_and_scipy_optional():
    code = (
        "import sys, ctpo.diagnostics as d, numpy as np\n"
        "assert not {'scipy', 'arviz_stats', 'torch', 'pandas'} & set(sys.modules), sorted(sys.modules)\n"
        "x = np.random.default_rng(0).normal(-2, .1, (200, 4))\n"
        "sys.modules['arviz_stats'] = None\n"
        "table = d.by_position(x, x + .1 * np.sin(9 * x))\n"
        "assert 'pareto_k' not in table and 'ess_fraction' in table\n"
        "assert str(d.diagnose(x, x + .1 * np.sin(9 * x)))\n"
        "for call in (lambda: d.pareto_k(x), lambda: d.by_position(x, x, pareto=True)):\n"
        "    try:\n"
        "        call()\n"
        "    except ImportError as error:\n"
        "        assert 'pip install scipy arviz-stats' in str(error)\n"
        "    else:\n"
        "        raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    assert importlib.util.find_spec("arviz_stats")


def test_examples_in_the_docstrings():
    failed, tried = doctest.testmod(ctpo.diagnostics)
    assert failed == 0
    assert tried > 15


X = np.full((4, 3), -1.0)
NAN = np.where(np.arange(12).reshape(4, 3) == 7, np.nan, X)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: by_position(X, X[:, :2]),
            r"behavior_logp must have the shape of logp, \(4, 3\); got \(4, 2\)",
        ),
        (lambda: by_position(X.astype(int), X), "logp must have a real floating-point dtype; got int64"),
        (lambda: by_position(np.float64(1), np.float64(1)), r"logp must have a time axis"),
        (
            lambda: by_position(NAN, X),
            r"logp must be finite at every policy token; got nan at index \(2, 1\)",
        ),
        (lambda: by_position(X, NAN), r"behavior_logp must be finite"),
        (lambda: fit_spread(np.where(np.isnan(NAN), -np.inf, X), X), r"logp must be finite .* got -inf"),
        (lambda: by_position(X, X, X), "mask must have dtype bool"),
        (lambda: by_position(X, X, X[:2] > 0), "mask must have the shape of logp"),
        (
            lambda: by_position(X, X, groups=[1, 2]),
            r"groups must have the shape of logp without its last axis, \(4,\)",
        ),
        (
            lambda: by_position(X, X, estimator="ctpo"),
            "advantages must be given together with estimator; got None",
        ),
        (
            lambda: by_position(X, X, advantages=X),
            "estimator must be given together with advantages; got None",
        ),
        (
            lambda: by_position(X, X, advantages=X[0], estimator="ctpo"),
            "advantages must have the shape of logp",
        ),
        (lambda: by_position(X, X, advantages=NAN, estimator="ctpo"), "advantages must be finite"),
        (lambda: by_position(X, X, advantages=X, estimator="ctpq"), "did you mean 'ctpo'"),
        (lambda: by_position(X, X, level="tokens"), "did you mean 'token'"),
        (
            lambda: by_position(X, X, level="turn", turn_ids=np.zeros(3, int)),
            "turn_ids must have the shape of logp",
        ),
        (lambda: by_position(X, X, ended="dead"), "ended must be one of alive, stopped; got 'dead'"),
        (lambda: by_position(X, X, ended="stopped", level="token"), "ended must be 'alive' at level 'token'"),
        (
            lambda: by_position(X, X, edges=[1]),
            r"edges must be two or more increasing integers from 1 on; got \[1\]",
        ),
        (lambda: by_position(X, X, edges=[0, 2]), "edges must be"),
        (lambda: by_position(X, X, edges=[1, 3, 3]), "edges must be"),
        (lambda: by_position(X, X, edges=[1.0, 2.5]), "edges must be"),
        (
            lambda: fit_spread(X, X, horizon=4),
            "horizon must be an integer between 1 and the longest sequence, 3; got 4",
        ),
        (lambda: fit_spread(X, X, horizon=0), "horizon must be an integer between 1"),
        (lambda: fit_spread(X, X, horizon=1.5), "horizon must be an integer between 1"),
        (lambda: fit_spread(X, X, bootstrap=1), "bootstrap must be an integer of at least 2; got 1"),
        (lambda: fit_spread(X, X, bootstrap=2.5), "bootstrap must be an integer"),
        (lambda: calibrate_clip(X, X, low=0.1, high=0.1, horizon=9), "horizon must be an integer between 1"),
        (lambda: calibrate_clip(X, X, low=0.5, high=0.1), "CalibratedClip: low must be a number between 0 and 0.5"),
        (lambda: calibrate_clip(X, X, low=0.1, high=0.1, power=NAN), "CalibratedClip: power must be a finite number"),
        (lambda: calibrate_clip(X, X, low=0.1, high=0.1, drift="k3"), "drift must be one of log_ratio, kl; got 'k3'"),
        (lambda: calibrate_clip(X, X, low=0.1, high=0.1), "logp must differ .*; got a standard deviation of 0.0"),
        (
            lambda: calibrate_clip(X[:1] - 1, X[:1], low=0.1, high=0.1),
            "logp must differ .*; got a standard deviation of nan",
        ),
        (
            lambda: calibrate_clip(X, X, X > 0, low=0.1, high=0.1),
            "logp must differ .*; got a standard deviation of nan",
        ),
        (lambda: diagnose(X, X, min_ess=1.0), "min_ess must be between 0 and 1; got 1.0"),
        (
            lambda: effective_sample_size(NAN),
            r"log_weights must be a number below \+inf where not masked; got nan",
        ),
        (
            lambda: chi2_divergence(np.full(3, np.inf)),
            r"log_weights must be .* got inf",
        ),
        (lambda: pareto_k(X, X[:1] > 0), "mask must have the shape of log_weights"),
        (
            lambda: effective_sample_size(X, axis=2),
            r"axis must be an axis of log_weights, of shape \(4, 3\); got 2",
        ),
        (lambda: effective_sample_size(np.float64(0)), "axis must be an axis"),
        (lambda: effective_sample_size(np.arange(3)), "log_weights must have a real floating-point dtype"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
