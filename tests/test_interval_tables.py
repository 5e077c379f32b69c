"""The measured coverage and size on the page: rendered from the committed run, whose formulas are checked here."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from benchmarks import intervals
from benchmarks.intervals import BEGIN, END, Draw, Run, Setting

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
RESULT = json.loads((ROOT / "benchmarks" / "results" / "intervals.json").read_text(encoding="utf-8"))


def test_page_has_the_tables_of_the_committed_run():
    assert intervals.with_tables(PAGE, RESULT) == PAGE
    assert RESULT["provenance"]["dirty"] is False
    assert RESULT["provenance"]["configuration"]["problems"] == [5, 10, 30, 100, 500]
    assert f"{RESULT['repetitions']} repetitions" in PAGE
    assert RESULT["public functions"]["calls"] > 5000
    assert RESULT["public functions"]["largest difference"] < 1e-12


@pytest.mark.parametrize("page", ["", BEGIN, END + BEGIN, BEGIN + BEGIN + END, BEGIN + END + END, END + BEGIN + END])
def test_page_without_a_place_for_the_tables_is_refused(page):
    with pytest.raises(ValueError, match="once each"):
        intervals.with_tables(page, RESULT)


def test_run_writes_what_it_prints(tmp_path, capsys):
    page, output = tmp_path / "page.md", tmp_path / "out.json"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    arguments = ["--repetitions", "6", "--problems", "5", "30", "--seed", "3"]
    assert intervals.main([*arguments, "--output", str(output), "--page", str(page)]) == 0
    written = json.loads(output.read_text(encoding="utf-8"))
    tables = intervals.markdown(written)
    assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}\n{tables}{END}\nafter\n"
    assert tables in capsys.readouterr().out
    assert written["provenance"]["configuration"] == {"repetitions": 6, "problems": [5, 30], "seed": 3}
    # Every cell has randomness of its own: without the other problems nothing changes, with another seed all does.
    alone = Run(repetitions=6, seed=3, problems=(30,)).coverage()
    assert alone == [row for row in written["rows"] if row["part"] == "coverage" and row["problems"] == 30]
    assert alone != Run(repetitions=6, seed=4, problems=(30,)).coverage()


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("ours", Run.coverage, "mean_interval differs"),
        ("students", Run.unbounded, "mean_interval without bounds differs"),
        ("sampling", Run.these_problems, "sampling_interval differs"),
    ],
)
def test_run_ends_where_its_formulas_are_not_those_of_the_public_functions(monkeypatch, name, part, message):
    right = getattr(intervals, name)

    def slightly_wrong(draw, **options):
        low, high = right(draw, **options)
        return low, high + 1e-6

    monkeypatch.setattr(intervals, name, slightly_wrong)
    with pytest.raises(RuntimeError, match=message):
        part(Run(repetitions=3, seed=0, problems=(5,)))


@pytest.mark.parametrize("part", [Run.rejections, Run.differences])
def test_run_ends_where_its_comparison_is_another(monkeypatch, part):
    right = intervals.paired

    def slightly_wrong(a, b):
        p, ends = right(a, b)
        return p + 1e-6, ends

    monkeypatch.setattr(intervals, "paired", slightly_wrong)
    with pytest.raises(RuntimeError, match="compare_paired differs"):
        part(Run(repetitions=3, seed=0, problems=(5,)))


# What ours is compared with must not be a straw man: each is the textbook's or SciPy's.


def draws(problems: int, samples: int = 4, count: int = 20) -> tuple[Draw, Draw]:
    """Two runs, with a repetition each of equal values, of nothing and of everything solved."""
    rng = np.random.default_rng([problems, samples])
    p = rng.beta(0.6, 0.9, (2, count, problems))
    x = rng.binomial(samples, p) / samples
    x[:, 0], x[:, 1], x[:, 2] = 0.5, 0.0, 1.0
    return Draw(x[0], samples), Draw(x[1], samples)


@pytest.mark.parametrize("problems", [5, 30])
def test_peers_of_the_interval(problems):
    draw, _ = draws(problems)
    student, logit, naive = (
        np.transpose(method(draw))
        for method in (intervals.students, intervals.students_of_logit, intervals.ignoring_problems)
    )
    t = scipy.stats.t.ppf(0.975, problems - 1)
    for i, x in enumerate(draw.x):
        mean, error = statistics.fmean(x), statistics.stdev(x) / math.sqrt(problems)
        assert student[i] == pytest.approx([mean - t * error, mean + t * error], abs=1e-12)
        pooled = scipy.stats.binomtest(round(x.sum() * 4), problems * 4).proportion_ci(method="wilson")
        assert naive[i] == pytest.approx([pooled.low, pooled.high], abs=1e-12)
        share = min(max(mean, 0.5 / (problems + 1)), 1 - 0.5 / (problems + 1))
        reach, middle = t * error / (share * (1 - share)), math.log(share / (1 - share))
        expected = [1 / (1 + math.exp(-middle - sign * reach)) for sign in (-1, 1)]
        assert logit[i] == pytest.approx(expected if error else [mean, mean], abs=1e-12)


def test_bootstrap_is_scipys():
    draw, _ = draws(30, count=8)
    many = 20_000
    low, high = intervals.bca(draw, np.random.default_rng(1), many)
    assert (low[:3].tolist(), high[:3].tolist()) == ([0.5, 0, 1], [0.5, 0, 1])
    for x, *ends in zip(draw.x[3:], low[3:], high[3:], strict=True):
        expected = scipy.stats.bootstrap(
            (x,), np.mean, n_resamples=many, method="BCa", rng=np.random.default_rng(2)
        ).confidence_interval
        # Quantiles of resamples: a standard error of about 0.0015, and steps of 1/120.
        assert ends == pytest.approx([expected.low, expected.high], abs=0.009)


@pytest.mark.parametrize("problems", [5, 9])
def test_sign_flips_are_all_of_them(problems):
    a, b = draws(problems)
    found = intervals.sign_flips(a, b, np.random.default_rng(0))
    for p, d in zip(found, 4 * (b.x - a.x), strict=True):
        every = itertools.product((1, -1), repeat=problems)
        sums = [abs(sum(sign * x for sign, x in zip(signs, d, strict=True))) for signs in every]
        assert p == sum(value >= abs(sum(d)) for value in sums) / len(sums)


def test_random_sign_flips_are_close_to_all_of_them():
    a, b = draws(12)
    found = intervals.sign_flips(a, b, np.random.default_rng(0))
    every = 4 * (b.x - a.x) @ np.array(list(itertools.product((1, -1), repeat=12))).T
    exact = (np.abs(every) >= np.abs(4 * (b.x - a.x).sum(axis=1))[:, None]).mean(axis=1)
    z = (found - exact) / np.sqrt(np.maximum(exact * (1 - exact), 1e-3) / intervals.RESAMPLES)
    assert np.abs(z).max() < 5.5
    assert found[:3].tolist() == [1, 1, 1]


def test_unpaired_tests():
    a, b = draws(10)
    apart, pooled = intervals.unpaired(a, b), intervals.two_proportions(a, b)
    for i in range(3, len(a.x)):
        error = math.sqrt((statistics.variance(a.x[i]) + statistics.variance(b.x[i])) / 10)
        t = abs(statistics.fmean(a.x[i]) - statistics.fmean(b.x[i])) / error
        assert apart[i] == pytest.approx(2 * scipy.stats.t.sf(t, 18), rel=1e-9)
        right = np.array([a.x[i].sum(), b.x[i].sum()]) * 4
        # Pearson's chi-squared of the four-fold table is the square of the z of two proportions.
        table = scipy.stats.chi2_contingency([right, 40 - right], correction=False)
        assert pooled[i] == pytest.approx(table.pvalue, rel=1e-9)
    assert apart[:3].tolist() == pooled[:3].tolist() == [1, 1, 1]
    nothing, everything = Draw(np.zeros((1, 10)), 4), Draw(np.ones((1, 10)), 4)
    assert intervals.unpaired(nothing, everything) == 0


@pytest.mark.parametrize("kind", range(len(intervals.DIFFERENCES)))
@pytest.mark.parametrize("setting", [Setting(0.02, 0.3, 4), Setting(0.5, 1.0, 4), Setting(0.98, 20.0, 4)])
def test_true_differences(kind, setting):
    name, change, truth = intervals.DIFFERENCES[kind]
    rng = np.random.default_rng([kind, round(100 * setting.mean)])
    p = setting.difficulties(rng, (100_000,))
    gain = change(setting, rng, p) - p
    assert gain.mean() == pytest.approx(truth(setting), abs=5.5 * gain.std() / math.sqrt(len(p))), name


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_cases_without_a_difference_have_none(kind):
    name, change, settings = intervals.REJECTED[kind]
    rng = np.random.default_rng(kind)
    for setting in settings[::3] if kind < 2 else settings[:1]:
        p = np.full(100_000, 0.45) if kind == 2 else setting.difficulties(rng, (100_000,))
        gain = change(setting, rng, p) - p
        assert abs(gain.mean()) <= 5.5 * gain.std() / math.sqrt(len(p)), name
        assert (gain.std() > 0) == (kind > 0)
