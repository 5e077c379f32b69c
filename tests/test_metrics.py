"""Metrics of an evaluation against enumeration; intervals and tests by what they promise: coverage and size."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import statistics
from collections import Counter
from fractions import Fraction
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given

from ctpo.train.metrics import (
    Comparison,
    Interval,
    compare_paired,
    majority_at_k,
    mean_interval,
    pass_at_k,
    sampling_interval,
)

DOCS = Path(__file__).parents[1] / "docs" / "evaluation.md"
# Two-sided normal quantile at one false alarm in a million, over the comparisons of one test.
LEVEL = 1e-6


def limit(comparisons: int) -> float:
    return statistics.NormalDist().inv_cdf(1 - LEVEL / comparisons / 2)


# pass@k


def all_passes(n: int, correct: int, k: int) -> Fraction:
    """Share of the subsets of k of the samples 0 ... n - 1 that hold one of the first `correct`."""
    subsets = list(itertools.combinations(range(n), k))
    return Fraction(sum(any(i < correct for i in subset) for subset in subsets), len(subsets))


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    cases = [(n, c, k) for n in range(1, 9) for c in range(n + 1) for k in range(1, n + 1)]
    n, c, k = np.array(cases).T
    expected = [float(all_passes(*case)) for case in cases]
    np.testing.assert_allclose(pass_at_k(n, c, k), expected, rtol=1e-14)


@given(st.integers(1, 3000), st.data())
def test_pass_at_k_of_many_samples(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert float(pass_at_k(n, c, k)) == pytest.approx(float(exact), rel=1e-12)


def test_pass_at_k_keeps_the_digits_of_a_small_value():
    n = 10**12
    exact = 1 - Fraction(n - 3, n) * Fraction(n - 4, n - 1)
    assert float(pass_at_k(n, 3, 2)) == pytest.approx(float(exact), rel=1e-14)
    assert pass_at_k(10**6, 10**3, 10**6) == 1


def test_pass_at_k_is_not_drawing_with_replacement():
    assert pass_at_k(32, 1, 32) == 1
    with_replacement = 1 - (1 - 1 / 32) ** 32
    assert with_replacement == pytest.approx(0.64, abs=0.005)


def test_pass_at_k_broadcasts():
    curve = pass_at_k(6, [[0], [2], [6]], np.arange(1, 7))
    assert curve.shape == (3, 6)
    assert curve[0].tolist() == [0] * 6
    assert curve[2].tolist() == [1] * 6
    assert curve[1, 0] == pytest.approx(1 / 3)
    assert np.all(np.diff(curve[1]) >= 0)
    assert not np.signbit(curve).any()
    assert pass_at_k(5, np.array([], dtype=int), 2).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 1, 5), "k must be from 1 to 4, not 5"),
        ((4, 1, 0), "k must be from 1 to 4, not 0"),
        ((4, 5, 1), "correct must be from 0 to 4, not 5"),
        ((4, [1, -1], 1), "correct must be from 0 to 4, not -1"),
        (([4, 2], 1, 3), "k must be from 1 to 2, not 3"),
        ((0, 0, 1), "n must be at least 1, not 0"),
        ((4, 1.0, 1), "correct must be made of integers, not 1.0"),
        ((4, [True], 1), "correct must be made of integers"),
        (([4, 4], [1, 1, 1], 1), r"must broadcast, but their shapes are \(2,\), \(3,\), \(\)"),
    ],
)
def test_pass_at_k_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(*arguments)


# maj@k


def majority_by_subsets(answers: list, correct: list, k: int) -> Fraction:
    """The definition: every subset, every winner of its vote, every sample that could stand for the winner."""
    total, subsets = Fraction(0), list(itertools.combinations(range(len(answers)), k))
    for subset in subsets:
        votes = Counter(answers[i] for i in subset if answers[i] is not None)
        winners = [answer for answer in votes if votes[answer] == max(votes.values())]
        for winner in winners:
            voters = [i for i in subset if answers[i] == winner]
            total += Fraction(sum(correct[i] for i in voters), len(voters) * len(winners))
    return total / len(subsets)


def majority_by_counts(counts: list[int], shares: list[Fraction], silent: int, k: int) -> Fraction:
    """The same by the multivariate hypergeometric distribution of the votes."""
    total = Fraction(0)
    for votes in itertools.product(*(range(min(count, k) + 1) for count in counts)):
        rest = k - sum(votes)
        if not 0 <= rest <= silent or max(votes) == 0:
            continue
        winners = [i for i, vote in enumerate(votes) if vote == max(votes)]
        ways = math.comb(silent, rest) * math.prod(map(math.comb, counts, votes))
        total += ways * sum((shares[i] for i in winners), Fraction(0)) / len(winners)
    return total / math.comb(sum(counts) + silent, k)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d", None]), st.booleans()), min_size=1, max_size=8))
def test_majority_is_the_mean_over_all_subsets(samples):
    """Equal answers that were judged differently included."""
    answers, correct = map(list, zip(*samples, strict=True))
    sizes = range(1, len(answers) + 1)
    expected = [float(majority_by_subsets(answers, correct, k)) for k in sizes]
    np.testing.assert_allclose(majority_at_k(answers, correct, sizes), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("counts", "right", "silent"), [([9, 8, 5, 1], [1], 4), ([20, 20], [0], 0), ([3] * 5, [0, 3], 2), ([40], [0], 24)]
)
def test_majority_of_many_samples(counts, right, silent):
    answers = [name for name, count in enumerate(counts) for _ in range(count)] + [None] * silent
    sizes = [1, 2, 3, 8, 15, len(answers)]
    shares = [Fraction(name in right) for name in range(len(counts))]
    expected = [float(majority_by_counts(counts, shares, silent, k)) for k in sizes]
    found = majority_at_k(answers, [answer in right for answer in answers], sizes)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def majority_by_ties(counts: list[int], shares: list[Fraction], silent: int, k: int) -> Fraction:
    """The same with whole numbers, for many answers: subsets by size and number of winners, one answer at a time."""
    total = Fraction(0)
    for top in range(1, max(counts) + 1):
        ways = {(size, 0): (math.comb(silent, size), Fraction(0)) for size in range(min(silent, k) + 1)}
        for count, share in zip(counts, shares, strict=True):
            grown: dict = {}
            for (size, winners), (number, right) in ways.items():
                for votes in range(min(count, top, k - size) + 1):
                    wins = votes == top
                    before = grown.get((size + votes, winners + wins), (0, Fraction(0)))
                    choices = math.comb(count, votes)
                    gained = choices * (right + share * number * wins)
                    grown[size + votes, winners + wins] = (before[0] + choices * number, before[1] + gained)
            ways = grown
        total += sum(
            (right / winners for (size, winners), (_, right) in ways.items() if size == k and winners), Fraction(0)
        )
    return total / math.comb(sum(counts) + silent, k)


@pytest.mark.parametrize(
    ("counts", "shares", "silent"),
    [
        ([2] * 12, [1, 0, Fraction(1, 2)] * 4, 0),
        ([3, 3, 2, 2, 2, 1, 1, 1, 1, 4], [1, 0, 1, 0, Fraction(1, 2), 1, 0, 0, 1, 0], 3),
        ([1] * 20, [1] * 3 + [0] * 17, 5),
        ([6, 6, 6, 6], [1, Fraction(2, 3), Fraction(2, 3), 0], 1),
    ],
)
def test_majority_of_many_answers_with_equally_many_votes(counts, shares, silent):
    answers = [name for name, count in enumerate(counts) for _ in range(count)] + [None] * silent
    correct = [place < share * count for count, share in zip(counts, shares, strict=True) for place in range(count)]
    sizes = [1, 2, 3, 5, 8, sum(counts) // 2, sum(counts)]
    expected = [float(majority_by_ties(counts, list(map(Fraction, shares)), silent, k)) for k in sizes]
    found = majority_at_k(answers, correct + [False] * silent, sizes)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("votes", [1, 2, 5])
def test_majority_of_a_thousand_samples_that_hardly_agree(votes):
    """All answers are alike, so that each is as likely to win; this took half a minute once."""
    names = range(1000 // votes)
    answers = [name for name in names for _ in range(votes)]
    right = len(names) // 4
    curve = majority_at_k(answers, [answer < right for answer in answers], range(1, 1001))
    np.testing.assert_allclose(curve, right / len(names), rtol=1e-11)


def test_majority_of_as_many_samples_as_are_allowed():
    answers = ["right"] * 500 + ["wrong"] * 500
    curve = majority_at_k(answers, [answer == "right" for answer in answers], [1, 2, 500, 999, 1000])
    np.testing.assert_allclose(curve, 0.5, rtol=1e-11)
    with pytest.raises(ValueError, match="answers must hold 1 to 1000 samples, not 1001"):
        majority_at_k(["right"] * 1001, [True] * 1001, 1)


def test_majority_beats_the_mean_where_wrong_answers_disagree_and_loses_where_they_agree():
    scattered = ["7"] * 4 + [str(-i) for i in range(1, 7)]
    agreed = ["7"] * 4 + ["8"] * 6
    correct = [True] * 4 + [False] * 6
    assert majority_at_k(scattered, correct, [1, 10]).tolist() == pytest.approx([0.4, 1.0])
    assert majority_at_k(agreed, correct, [1, 10]).tolist() == pytest.approx([0.4, 0.0])


def test_a_sample_without_an_answer_does_not_vote():
    assert majority_at_k([None, None, "7"], [False, False, True], 3) == 1
    assert majority_at_k([None, None], [False, False], 2) == 0
    assert majority_at_k([None, "7"], [True, False], [1, 2]).tolist() == [0, 0]
    silent_is_no_candidate = majority_at_k([None, None, "7", "8"], [False, False, True, False], 4)
    assert silent_is_no_candidate == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], 1), "answers must hold 1 to 1000 samples, not 0"),
        ((["1"], [True, False], 1), r"one entry for each of the 1 answers, but its shape is \(2,\)"),
        ((["1", "2"], [True, False], 3), "k must be from 1 to 2, not 3"),
        ((["1", "2"], [True, False], 0), "k must be from 1 to 2, not 0"),
        ((["1", "2"], [True, False], 1.0), "k must be made of integers"),
        ((["1", "2"], [0.5, 1.0], 1), r"truth values \(or 0 and 1\), not \[0.5, 1.0\]"),
        ((["1", "2"], [math.nan, 1.0], 1), "truth values"),
        ((["1", "2"], ["yes", "no"], 1), "truth values"),
        (([["1"], "2"], [True, False], 1), "answers must be hashable or None"),
    ],
)
def test_majority_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        majority_at_k(*arguments)


# The interval over problems

shares = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1), min_size=2, max_size=40)
levels = st.sampled_from([0.5, 0.9, 0.95, 0.99])


def check_ends(interval: Interval, n: float, t: float) -> None:
    """Both ends are as far from the mean as the score allows, by bisection on its definition."""

    def beyond(mu: float) -> bool:
        return abs(interval.mean - mu) > t * math.sqrt(mu * (1 - mu) / n)

    for end, outside in ((interval.low, 0.0), (interval.high, 1.0)):
        inside = interval.mean
        for _ in range(80):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if beyond(middle) else (middle, outside)
        assert end == pytest.approx(inside, abs=1e-7)


@given(shares, levels)
def test_interval_is_the_one_of_the_docstring(values, level):
    interval = mean_interval(values, level=level)
    count, mean = len(values), math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    phi = (squares + 0.25) / ((count - 1) * mean * (1 - mean) + 0.25)
    assert interval.mean == pytest.approx(mean, abs=1e-14)
    assert (interval.level, interval.problems, interval.reason) == (level, count, "")
    check_ends(interval, count / phi, scipy.stats.t.ppf((1 + level) / 2, count - 1))


@given(shares)
def test_interval_has_a_width_and_contains_the_mean(values):
    interval = mean_interval(values)
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1
    # One more problem could always move the mean.
    assert interval.high - interval.low > 0.5 / len(values)


@given(shares)
def test_interval_turns_and_scales_with_the_values(values):
    interval = mean_interval(values)
    turned = mean_interval([1 - value for value in values])
    assert (1 - turned.high, 1 - turned.low) == pytest.approx((interval.low, interval.high), abs=1e-12)
    rewards = mean_interval([4 * value - 3 for value in values], bounds=(-3, 1))
    expected = [4 * number - 3 for number in (interval.mean, interval.low, interval.high)]
    assert [rewards.mean, rewards.low, rewards.high] == pytest.approx(expected, abs=1e-12)
    wider = mean_interval(values, level=0.99)
    assert wider.low <= interval.low
    assert wider.high >= interval.high
    assert mean_interval(values[::-1]).low == pytest.approx(interval.low, abs=1e-12)


def test_interval_where_no_or_every_problem_is_solved():
    for count in (2, 5, 30, 500):
        t = scipy.stats.t.ppf(0.975, count - 1)
        none, every = mean_interval(np.zeros(count)), mean_interval(np.ones(count, dtype=bool))
        assert (none.low, none.high) == pytest.approx((0, t**2 / (count + t**2)))
        assert (every.low, every.high) == pytest.approx((1 - none.high, 1))


def test_samples_are_averaged_within_problems_first():
    ragged = [[1, 0, 0, 0], [1], [True, True, False]]
    assert mean_interval(ragged) == mean_interval([0.25, 1.0, 2 / 3])
    assert mean_interval(ragged).mean == pytest.approx((0.25 + 1 + 2 / 3) / 3)
    square = np.array([[0, 1], [1, 1], [0, 0]])
    assert mean_interval(square) == mean_interval(square.mean(axis=1))
    # Repeating the samples of a problem adds no problem.
    assert mean_interval(np.repeat(square, 50, axis=1)) == mean_interval(square)


def test_interval_without_bounds_is_students():
    tokens = [812.0, 77.0, 340.5, 2048.0, 411.0]
    interval = mean_interval(tokens, bounds=None, level=0.9)
    error = statistics.stdev(tokens) / math.sqrt(5)
    expected = scipy.stats.t.interval(0.9, 4, loc=statistics.fmean(tokens), scale=error)
    assert (interval.low, interval.high) == pytest.approx(expected, rel=1e-12)


def test_where_there_is_no_interval_the_reason_is_told():
    one = mean_interval([[0, 1, 1, 1]])
    equal = mean_interval([3.0, 3.0, 3.0], bounds=None)
    single = sampling_interval([[0, 1], [1]])
    for interval, reason in ((one, "one problem"), (equal, "same value"), (single, "problem 1 has one sample")):
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)
        assert reason in interval.reason
        assert interval.reason in str(interval)
    assert (one.mean, equal.mean, single.mean) == (0.75, 3.0, 0.75)


def difficulties(rng: np.random.Generator, mean: float, alike: float, shape: tuple[int, ...]) -> np.ndarray:
    """Probabilities of solving: beta-distributed, more alike the larger `alike` is."""
    return rng.beta(mean * alike, (1 - mean) * alike, shape)


GRID = list(itertools.product((0.02, 0.1, 0.3, 0.5, 0.9, 0.98), (0.3, 1, 3, 20), (1, 4, 32)))


def covered(interval: Interval, truth: float) -> bool:
    return interval.low - 1e-12 <= truth <= interval.high + 1e-12


def samples_as_if_independent(x: np.ndarray, n: int) -> Interval:
    """Wilson's interval of P n samples: the mistake of ignoring what a problem's samples share."""
    interval = scipy.stats.binomtest(round(x.sum() * n), x.size * n).proportion_ci(method="wilson")
    return Interval(float(x.mean()), interval.low, interval.high, 0.95, x.size)


def documented_coverage() -> dict[int, tuple[float, float]]:
    """Mean and lowest coverage of `mean_interval` by number of problems, from the table of the page."""
    rows = re.findall(r"^\| (\d+) \| \**(0\.\d+) / (0\.\d+)\** \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    return {int(problems): (float(mean), float(lowest)) for problems, mean, lowest in rows}


@pytest.mark.parametrize(("problems", "repetitions"), [(5, 60), (10, 60), (30, 60), (100, 40), (500, 10)])
def test_coverage_is_the_documented_one(problems, repetitions):
    rng = np.random.default_rng([2024, problems])
    hits, naive_hits = [], []
    for mean, alike, n in GRID:
        for p in difficulties(rng, mean, alike, (repetitions, problems)):
            x = rng.binomial(n, p) / n
            hits.append(covered(mean_interval(x), mean))
            if n == 32:
                naive_hits.append(covered(samples_as_if_independent(x, n), mean))
    expected, lowest = documented_coverage()[problems]
    assert lowest >= 0.925
    # The cells differ in coverage: a common one gives the largest standard error.
    z = (np.mean(hits) - expected) / math.sqrt(expected * (1 - expected) / len(hits))
    assert abs(z) < limit(5)
    control = (np.mean(naive_hits) - 0.95) / math.sqrt(0.95 * 0.05 / len(naive_hits))
    assert control < -limit(5)


@pytest.mark.parametrize(
    ("problems", "mean", "alike", "n"), [(30, 0.02, 1, 32), (30, 0.98, 3, 4), (10, 0.1, 1, 32), (100, 0.98, 0.3, 32)]
)
def test_hard_cells_are_covered_where_students_interval_is_not(problems, mean, alike, n):
    rng = np.random.default_rng([77, problems])
    repetitions = 1000
    values = rng.binomial(n, difficulties(rng, mean, alike, (repetitions, problems))) / n
    coverage = np.mean([covered(mean_interval(x), mean) for x in values])
    student = np.mean([covered(mean_interval(x, bounds=None), mean) for x in values])
    error = math.sqrt(0.93 * 0.07 / repetitions)
    assert coverage > 0.93 - limit(4) * error
    assert student < 0.93 - limit(4) * error


# The interval for these very problems


def test_sampling_interval_is_the_one_of_the_docstring():
    samples = [[0, 1, 1], [0, 0, 0, 0, 1], [1, 1], [0.5, 1, 0.25]]
    interval = sampling_interval(samples, level=0.9)
    lengths = [len(x) for x in samples]
    inverse = sum(1 / n for n in lengths)
    within = sum(statistics.variance(x) / len(x) for x in samples) / inverse
    mean = statistics.fmean(statistics.fmean(x) for x in samples)
    phi = (within + 1 / 8) / (mean * (1 - mean) + 1 / 8)
    degrees = inverse**2 / sum(1 / (n**2 * (n - 1)) for n in lengths)
    assert interval.mean == pytest.approx(mean)
    check_ends(interval, 16 / (phi * inverse), scipy.stats.t.ppf(0.95, degrees))


def test_sampling_interval_covers_the_mean_of_these_problems_and_no_other():
    rng = np.random.default_rng(3)
    problems, mean, alike, n = 30, 0.5, 1.0, 8
    here, population, widths = [], [], []
    for _ in range(800):
        p = difficulties(rng, mean, alike, (problems,))
        interval = sampling_interval(rng.random((problems, n)) < p[:, None])
        here.append(covered(interval, p.mean()))
        population.append(covered(interval, mean))
        widths.append(interval.high - interval.low)
    error = math.sqrt(0.95 * 0.05 / len(here))
    assert np.mean(here) > 0.95 - limit(2) * error
    assert np.mean(population) < 0.95 - limit(2) * error
    # Pooling all samples as draws of one coin would cover too, by being half as wide again.
    assert np.mean(widths) < 0.8 * 2 * 1.96 * math.sqrt(0.25 / (problems * n))


def test_sampling_interval_has_a_width_where_all_samples_agree():
    interval = sampling_interval([[0] * 4] * 10)
    assert interval.low == 0
    assert interval.high == pytest.approx(4.17 / 44.17, abs=0.001)


# The comparison of two runs

pairs = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([0.0, 0.25, 0.75, 1.0])), min_size=2, max_size=30
)


@given(pairs, levels)
def test_comparison_is_the_paired_t_test(values, level):
    a, b = map(np.array, zip(*values, strict=True))
    assume(np.ptp(b - a) > 0)
    found = compare_paired(a, b, level=level)
    difference = statistics.fmean(b) - statistics.fmean(a)
    error, freedom = statistics.stdev(b - a) / math.sqrt(len(a)), len(a) - 1
    assert found.p_value == pytest.approx(2 * scipy.stats.t.sf(abs(difference) / error, freedom), rel=1e-9)
    expected = scipy.stats.t.interval(level, freedom, loc=difference, scale=error)
    assert (found.low, found.high) == pytest.approx(np.clip(expected, -1, 1), abs=1e-12)
    free = compare_paired(a, b, level=level, bounds=None)
    assert (free.low, free.high) == pytest.approx(expected, abs=1e-12)
    assert found.difference == pytest.approx(difference, abs=1e-14)
    assert (found.mean_a, found.mean_b) == pytest.approx((a.mean(), b.mean()))
    assert (found.larger, found.smaller, found.problems) == ((b > a).sum(), (b < a).sum(), len(a))


@given(pairs | st.builds(lambda pair, count: [pair] * count, st.tuples(*[st.floats(0, 1)] * 2), st.integers(2, 30)))
def test_p_value_and_interval_agree(values):
    a, b = map(list, zip(*values, strict=True))
    found = compare_paired(a, b)
    assert -1 <= found.low <= found.difference <= found.high <= 1
    assert found.low < found.high
    assert 0 < found.p_value <= 1
    assume(abs(found.p_value - 0.05) > 1e-6)
    assert (found.p_value < 0.05) == (not found.low < 0 < found.high)


@given(pairs)
def test_comparison_turns_with_its_runs(values):
    a, b = map(list, zip(*values, strict=True))
    there, back = compare_paired(a, b), compare_paired(b, a)
    assert (-back.difference, -back.high, -back.low) == pytest.approx(
        (there.difference, there.low, there.high), abs=1e-12
    )
    assert back.p_value == pytest.approx(there.p_value, rel=1e-9)
    assert (back.larger, back.smaller) == (there.smaller, there.larger)


@pytest.mark.parametrize("count", [2, 5, 30])
def test_equal_differences_show_only_that_others_are_rare(count):
    alike = compare_paired([0.5] * count, [0.5] * count)
    rare = 1 - 0.025 ** (1 / count)
    assert alike.p_value == 1
    assert (alike.low, alike.high) == pytest.approx((-rare, rare))
    # From none to all solved: what the sign test says.
    solved = compare_paired([0] * count, [1] * count)
    assert solved.p_value == pytest.approx(2 * 0.5**count)
    assert (solved.low, solved.high) == pytest.approx((1 - 2 * rare, 1))
    halved = compare_paired([0] * count, [2] * count, bounds=(0, 4))
    assert halved.p_value == pytest.approx(min(1, 2 / 1.5**count))
    assert (halved.low, halved.high) == pytest.approx((2 - 6 * rare, 2 + 2 * rare))


def test_differences_that_are_equal_up_to_rounding_are_equal():
    a = [0.1 + 0.2, 0.3, 0.7 + 0.1, 0.8]
    b = [0.3, 0.1 + 0.2, 0.8, 0.7 + 0.1]
    found = compare_paired(a, b)
    assert (found.difference, found.p_value, found.larger, found.smaller) == (0, 1, 0, 0)
    assert compare_paired([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]).p_value == pytest.approx(2 / 1.3**3)


def test_where_there_is_no_comparison_the_reason_is_told():
    one = compare_paired([0.25], [0.75])
    assert "one problem" in one.reason
    assert math.isnan(one.p_value)
    same = compare_paired([3.0, 9.0], [3.0, 9.0], bounds=None)
    shifted = compare_paired([3.0, 9.0], [4.0, 10.0], bounds=None)
    assert same.p_value == 1
    assert math.isnan(shifted.p_value)
    for found in (one, same, shifted):
        assert math.isnan(found.low)
        assert math.isnan(found.high)
        assert found.reason in str(found)


def as_if_independent(a: np.ndarray, b: np.ndarray, n: int) -> float:
    """p-value of two proportions of P n samples each: the mistake of ignoring problems."""
    pooled = (a.mean() + b.mean()) / 2
    error = math.sqrt(2 * pooled * (1 - pooled) / (a.size * n))
    return float(2 * scipy.stats.norm.sf(abs(a.mean() - b.mean()) / error)) if error > 0 else 1.0


@pytest.mark.parametrize(("problems", "repetitions"), [(5, 400), (10, 400), (30, 400), (100, 150)])
def test_size_under_no_difference(problems, repetitions):
    """Runs with equal means that are better on different problems; the test that ignores problems fails."""
    rng = np.random.default_rng([5, problems])
    cells = [(0.1, 0.3, 32), (0.5, 0.3, 32), (0.5, 3, 1), (0.5, 3, 32), (0.9, 1, 4)]
    rejections, naive = np.zeros(len(cells)), np.zeros(len(cells))
    for cell, (mean, alike, n) in enumerate(cells):
        for _ in range(repetitions):
            p, other = difficulties(rng, mean, alike, (2, problems))
            a = rng.binomial(n, p) / n
            b = rng.binomial(n, np.where(rng.random(problems) < 0.3, other, p)) / n
            rejections[cell] += compare_paired(a, b).p_value <= 0.05
            naive[cell] += as_if_independent(a, b, n) <= 0.05
    error = math.sqrt(0.05 * 0.95 / repetitions)
    assert rejections.max() / repetitions < 0.05 + limit(4 * len(cells)) * error
    assert naive.max() / repetitions > 0.05 + limit(4 * len(cells)) * error


def test_power_is_in_the_pairs():
    """The same gain on problems of all difficulties: seen by the pairs, lost in two separate samples."""
    rng = np.random.default_rng(8)
    paired = unpaired = 0
    for _ in range(300):
        p = difficulties(rng, 0.4, 1.0, (30,))
        a, b = rng.binomial(16, p) / 16, rng.binomial(16, p + 0.7 * p * (1 - p)) / 16
        paired += compare_paired(a, b).p_value <= 0.05
        apart = (b.mean() - a.mean()) / math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 30)
        unpaired += abs(apart) > scipy.stats.t.ppf(0.975, 58)
    assert paired > 200
    assert unpaired < 30


# What all of them share


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "values must have at least one problem"),
        (0.5, {}, "values must be a sequence with an entry for each problem, not 0.5"),
        ("0.5", {}, "values must be a sequence"),
        ({0.5: 1}, {}, "values must be a sequence"),
        ([0.5, 1.5], {}, r"values, problem 1: values must be from 0 to 1, not 1.5"),
        ([0.5, math.nan], {}, "values, problem 1: values must be from 0 to 1, not nan"),
        ([0.5, math.inf], {"bounds": None}, "values, problem 1: values must be finite, not inf"),
        ([[0, 1], []], {}, r"values, problem 1: a number or a sequence of numbers is needed, not \[\]"),
        ([[0, 1], [[0], [1]]], {}, "values, problem 1: a number or a sequence"),
        ([[0, 1], [[0, 1], [1]]], {}, "values, problem 1: a number or a sequence"),
        ([0.5, None], {}, "values, problem 1: a number or a sequence of numbers is needed, not None"),
        ([0.5, "1"], {}, "values, problem 1: a number"),
        ([0.5, [0, -0.1]], {}, "values, problem 1: values must be from 0 to 1"),
        ([0.5], {"level": 95}, "level must be a number between 0 and 1, not 95"),
        ([0.5], {"level": 0}, "level must be a number between 0 and 1, not 0"),
        ([0.5], {"level": math.nan}, "level must be a number between 0 and 1, not nan"),
        ([0.5], {"bounds": (1, 0)}, r"bounds must be finite and in ascending order, not \(1, 0\)"),
        ([0.5], {"bounds": (0, math.inf)}, "bounds must be finite"),
        ([0.5], {"bounds": 1}, "bounds must be two numbers or None, not 1"),
        ([0.5], {"bounds": (0, 1, 2)}, "bounds must be two numbers or None"),
    ],
)
def test_bad_input_is_named(values, options, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(values, **options)
    with pytest.raises(
        ValueError, match=message.replace("values, p", "a, p").replace("values must ", "[av]\\w* must ")
    ):
        compare_paired(values, values, **options)
    with pytest.raises(ValueError, match=re.sub("values, p", "b, p", message) if ", p" in message else "must"):
        compare_paired([0.5], values, **options)


def test_runs_on_different_numbers_of_problems_are_refused():
    with pytest.raises(ValueError, match="a and b must have the same problems, but a has 2 and b has 3"):
        compare_paired([0, 1], [0, 1, 1])


def test_sampling_interval_refuses_numbers():
    with pytest.raises(ValueError, match="samples must have a sequence for each problem, but problem 1 is a number"):
        sampling_interval([[0, 1], 0.5])
    with pytest.raises(ValueError, match="samples, problem 0: values must be from 0 to 1"):
        sampling_interval([[0, 2]])
    with pytest.raises(ValueError, match="level must be"):
        sampling_interval([[0, 1]], level=1)


def test_results_are_plain_frozen_and_short():
    interval, found = mean_interval(np.array([0.25, 0.5])), compare_paired([0, 1, 1], [1, 1, 1])
    for result in (interval, found):
        kinds = {field.name: type(getattr(result, field.name)) for field in dataclasses.fields(result)}
        assert set(kinds.values()) <= {float, int, str}
        with pytest.raises(dataclasses.FrozenInstanceError):
            result.low = 0.0
    assert str(Interval(0.4167, 0.31, 0.538, 0.95, 30)) == "0.42 [0.31, 0.54]"
    assert f"{Interval(812.4, 700, 925, 0.95, 30):.0f}" == "812 [700, 925]"
    tiny = Comparison(0.5, 0.4, 0.6, 1e-30, 0.95, 500, 0.2, 0.7, 400, 20)
    assert str(tiny) == "+0.50 [+0.40, +0.60], p < 0.0001"
    assert f"{tiny:.1f}" == "0.5 [0.4, 0.6], p < 0.0001"
