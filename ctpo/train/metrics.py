r"""What an evaluation reports about graded samples, and how far the numbers can be trusted.

The unit is the problem. n samples are drawn for each of P problems; a metric is a number per problem (the mean
correctness of its samples, `pass_at_k`, `majority_at_k`, the share of well-formed answers), and what is
reported is the mean of these numbers over problems, every problem with the same weight however many samples it
has. Samples of one problem are alike, so an interval that counted the P n samples as independent would be far
too narrow: `mean_interval` and `compare_paired` see one number per problem.

Two questions have two intervals.

* `mean_interval`, `compare_paired`: what would the mean be over all problems like these, of which these are
  taken to be a random sample?
* `sampling_interval`: what would the mean be over these very problems with infinitely many samples of each?

Neither covers what was done once: the training run with its seed, the prompt's wording, the grader, the limit
of tokens, problems that were seen in training, or the choice of the best of many checkpoints.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import roots_legendre, stdtr, stdtrit

__all__ = [
    "Comparison",
    "Interval",
    "compare_paired",
    "majority_at_k",
    "mean_interval",
    "pass_at_k",
    "sampling_interval",
]

Floats = NDArray[np.float64]
Values = Sequence[float] | Sequence[Sequence[float]] | NDArray[Any]
Bounds = tuple[float, float] | None

# Values whose spread is below this share of their size (or of the bounds' distance) are equal up to rounding.
_ROUNDING = 1e-12
# The largest variance of values in [0, 1], that of a fair coin.
_COIN = 0.25
# C(n, k) must be a float64.
_MAX_VOTERS = 1000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over problems with its confidence interval.

    Attributes:
        mean: The estimate; in the values' own unit, as are both ends.
        low: Lower end, NaN where there is none.
        high: Upper end, NaN where there is none.
        level: Confidence level, in (0, 1).
        problems: Number of problems P.
        reason: Why there is no interval; empty where there is one.

    Example:
        >>> interval = Interval(mean=0.4167, low=0.31, high=0.538, level=0.95, problems=30)
        >>> print(interval)
        0.42 [0.31, 0.54]
        >>> f"{interval:.3f}"
        '0.417 [0.310, 0.538]'
    """

    mean: float
    low: float
    high: float
    level: float
    problems: int
    reason: str = ""

    def __format__(self, spec: str) -> str:
        """Mean and interval, every number by `spec` (".2f" where it is empty)."""
        spec = spec or ".2f"
        return f"{self.mean:{spec}} [{_ends(self.low, self.high, spec, self.reason)}]"

    def __str__(self) -> str:
        return format(self, "")


@dataclass(frozen=True, slots=True)
class Comparison:
    """The difference of two runs on the same problems, b minus a, with interval and p-value.

    Attributes:
        difference: Mean over problems of b minus a; positive where b is larger.
        low: Lower end of the interval of the difference, NaN where there is none.
        high: Upper end, NaN where there is none.
        p_value: Two-sided p-value of no difference in the mean; at most 1 - level exactly where the interval
            leaves out zero. NaN where there is none.
        level: Confidence level, in (0, 1).
        problems: Number of problems P.
        mean_a: Mean of the first run.
        mean_b: Mean of the second run.
        larger: Number of problems on which b is larger than a.
        smaller: Number of problems on which b is smaller than a; they are equal on the others.
        reason: Why there is no interval; empty where there is one.

    Example:
        >>> print(Comparison(0.05, -0.021, 0.121, 0.1604, 0.95, 30, 0.40, 0.45, larger=11, smaller=7))
        +0.05 [-0.02, +0.12], p = 0.16
    """

    difference: float
    low: float
    high: float
    p_value: float
    level: float
    problems: int
    mean_a: float
    mean_b: float
    larger: int
    smaller: int
    reason: str = ""

    def __format__(self, spec: str) -> str:
        """Difference, interval and p-value, all but the last by `spec` ("+.2f" where it is empty)."""
        spec = spec or "+.2f"
        ends = _ends(self.low, self.high, spec, self.reason)
        p = "p < 0.0001" if self.p_value < 1e-4 else f"p = {self.p_value:.2g}"
        return f"{self.difference:{spec}} [{ends}]" + ("" if math.isnan(self.p_value) else f", {p}")

    def __str__(self) -> str:
        return format(self, "")


def pass_at_k(n: ArrayLike, correct: ArrayLike, k: ArrayLike) -> Floats:
    r"""Probability that at least one of k samples is correct, estimated without bias from n >= k samples.

    .. math:: 1 - \binom{n-c}{k} \Big/ \binom{n}{k}

    the share of all subsets of k of the n samples that hold a correct one. Drawing the k samples with
    replacement instead is biased: for one correct sample of 32 it gives 0.64 at k = 32, where the answer is 1.

    Args:
        n: Samples of each problem, integers of at least 1; all three arguments broadcast.
        correct: Correct ones among them, c, integers from 0 to n.
        k: Size of the subsets, integers from 1 to n.

    Returns:
        float64 of the broadcast shape, in [0, 1].

    Raises:
        ValueError: An argument is not made of integers, lies outside its range, or the shapes do not broadcast.

    References:
        Chen et al., "Evaluating large language models trained on code", arXiv:2107.03374, equation 1.

    Example:
        One problem at every k, then three problems at k = 2:

        >>> pass_at_k(4, 1, [1, 2, 3, 4])
        array([0.25, 0.5 , 0.75, 1.  ])
        >>> pass_at_k([4, 4, 8], [0, 2, 1], 2).round(4)
        array([0.    , 0.8333, 0.25  ])
    """
    counts = [_integers(name, value) for name, value in (("n", n), ("correct", correct), ("k", k))]
    try:
        samples, right, size = np.broadcast_arrays(*counts)
    except ValueError:
        shapes = ", ".join(str(count.shape) for count in counts)
        raise ValueError(f"n, correct and k must broadcast, but their shapes are {shapes}") from None
    _check_range("n", samples, 1, None)
    _check_range("correct", right, 0, samples)
    _check_range("k", size, 1, samples)
    # The product is symmetric in c and k: prod_{i < min(c, k)} 1 - max(c, k) / (n - i).
    few, many = np.minimum(right, size), np.maximum(right, size)
    certain = samples - right < size
    log_none = np.zeros(samples.shape)
    for i in range(int(np.max(few, initial=0, where=~certain))):
        share = np.where(~certain & (i < few), many / np.maximum(samples - i, 1), 0.0)
        log_none += np.log1p(-share)
    return np.asarray(np.where(certain, 1.0, 0.0 - np.expm1(log_none)))[()]


def majority_at_k(answers: Sequence[Hashable | None], correct: ArrayLike, k: int | Sequence[int]) -> Floats:
    r"""Probability that the most frequent answer among k of the n samples of a problem is correct.

    Exactly, over all subsets of size k:

    .. math:: \binom{n}{k}^{-1} \sum_{|S| = k} \frac{1}{|W_S|} \sum_{w \in W_S} q_w

    with W_S the most frequent answers in S (a tie is broken by drawing one of them), and q_w the share of the
    samples with answer w that were judged correct: 0 or 1 where the grader treats equal answers alike.

    Args:
        answers: One answer per sample in a form in which equal answers compare equal; None for a sample without
            an answer. Such a sample does not vote, even if it was judged correct. If nobody in S votes, S
            counts as wrong. At most 1000 samples.
        correct: Whether each sample was judged correct: booleans (or 0 and 1), shape (n,).
        k: Size of the subsets, from 1 to n; all sizes together take hardly longer than one: some milliseconds for 64
            samples, up to a second for 1000.

    Returns:
        float64 in [0, 1], of the shape of `k`.

    Raises:
        ValueError: There are no samples or too many, lengths differ, an answer is not hashable, `correct` holds
            something else than truth values, or a k is no integer from 1 to n.

    Assumptions:
        Samples of a problem are exchangeable, as independent samples are.

    Example:
        Two of five are right but do not agree with one another; the wrong ones do:

        >>> majority_at_k(["1/2", "0.5", "3", "3", None], [True, True, False, False, False], [1, 3, 5]).round(4)
        array([0.4   , 0.4333, 0.    ])
    """
    size = _integers("k", k)
    answers = list(answers)
    n = len(answers)
    if not 1 <= n <= _MAX_VOTERS:
        raise ValueError(f"answers must hold 1 to {_MAX_VOTERS} samples, not {n}")
    judged = np.asarray(correct)
    if judged.shape != (n,):
        raise ValueError(f"correct must have one entry for each of the {n} answers, but its shape is {judged.shape}")
    if judged.dtype.kind not in "biuf" or not np.all((judged == 0) | (judged == 1)):
        raise ValueError(f"correct must hold truth values (or 0 and 1), not {_shown(correct)}")
    _check_range("k", size, 1, np.int64(n))
    try:
        voters = Counter(answer for answer in answers if answer is not None)
    except TypeError as error:
        raise ValueError(f"answers must be hashable or None: {error}") from None
    right = Counter(answer for answer, good in zip(answers, judged, strict=True) if good and answer is not None)
    # Answers with as many votes and the same share of right ones are alike.
    kinds = Counter((count, right[answer] / count) for answer, count in voters.items())
    choose = {count: _binomials(count, count) for count in voters.values()}

    # For each number of votes `top` that wins: an answer's subsets with fewer votes than top, by their size, are the
    # coefficients of a polynomial B, those with top votes of a T. The product of all B + y T counts subsets with t
    # answers that tie by y^t; for a tie to be broken fairly y^(t - 1) has to become 1 / t, its integral from 0 to 1.
    # That of a polynomial in y is a sum over nodes, exact up to rounding, and none of its terms is negative.
    won = np.zeros(n + 1)
    for top in range(1, max(voters.values(), default=0) + 1):
        contenders = [(count, share, alike) for (count, share), alike in kinds.items() if count >= top]
        tied = min(sum(alike for _, _, alike in contenders), n // top)  # at most
        nodes, weights = _unit_interval((tied + 1) // 2)
        others = n - sum(count * alike for count, _, alike in contenders)
        ways = np.tile(_binomials(others, others), (len(nodes), 1))
        ways_won = np.zeros_like(ways)  # a share q of the subsets that an answer wins
        for count, share, alike in contenders:
            one = np.tile(choose[count][: top + 1], (len(nodes), 1))
            one[:, top] *= nodes
            rest = _power(one, alike - 1, n)
            every = _product(rest, one, n)
            winner = np.zeros((1, top + 1))
            winner[0, top] = share * alike * choose[count][top]
            gained = _product(_product(ways, rest, n), np.broadcast_to(winner, one.shape), n)
            ways_won = _product(ways_won, every, n) + gained
            ways = _product(ways, every, n)
        won[: ways_won.shape[1]] += weights @ ways_won
    # Rounding must not give a probability above 1.
    return np.asarray(np.minimum(won / _binomials(n, n), 1.0)[size])[()]


def mean_interval(values: Values, *, level: float = 0.95, bounds: Bounds = (0.0, 1.0)) -> Interval:
    r"""Confidence interval for the mean over all problems of which these are a random sample.

    Values in bounds, shifted and scaled to x_i in [0, 1]: Wilson's interval with an effective number of
    problems and Student's t,

    .. math::
        \left\{ \mu : |\bar x - \mu| \le t_{P-1} \sqrt{\phi\,\mu(1-\mu)/P} \right\}, \qquad
        \phi = \frac{\sum_i (x_i - \bar x)^2 + 1/4}{(P-1)\,\bar x (1 - \bar x) + 1/4}.

    phi is the variance between problems as a share of the largest that the mean allows (each problem solved
    always or never), with one more problem of that kind added to both: with few problems, or with almost all
    values at one end, the values' own variance is too small too often. Where all values are 0 or all are 1,
    phi is 1, and the interval still has a width. Without bounds: Student's t interval.

    Args:
        values: One number per problem, or one sequence of numbers per problem, which is averaged first
            (lengths may differ: every problem counts the same).
        level: Confidence level, in (0, 1).
        bounds: Smallest and largest value that is possible (not: that was seen), or None where there is no such
            limit, as for tokens.

    Returns:
        The mean and its interval, inside the bounds. NaN as ends, with the reason, for a single problem, and
        for equal values without bounds.

    Raises:
        ValueError: There is no problem, a problem has no value, a value is not finite or out of bounds, or
            `level` or `bounds` is not as described.

    Assumptions:
        Problems are independent of one another and alike; see the module's text for what is not covered.
        Coverage was measured: docs/evaluation.md has the table.

    References:
        Wilson, J. Am. Stat. Assoc. 22 (1927) 209; effective sample size as in Korn and Graubard, Survey
        Methodology 24 (1998) 193; Miller, arXiv:2411.00640, on clustered evaluations.

    Example:
        Ten problems; then as many of which none was solved:

        >>> print(mean_interval([1, 1, 0.75, 0.5, 0.25, 0.25, 0, 0, 0, 0]))
        0.38 [0.15, 0.67]
        >>> print(mean_interval([0] * 10))
        0.00 [0.00, 0.34]
        >>> print(mean_interval([[1, 0], [1], [0, 0, 1]], bounds=None))
        0.61 [-0.25, 1.47]
    """
    _check_level(level)
    low, high = _check_bounds(bounds)
    x = _problem_means("values", values, low, high)
    count, mean = len(x), float(x.mean())
    if count == 1:
        return Interval(mean, math.nan, math.nan, level, count, "one problem has no spread over problems")
    t = _student(level, count - 1)
    squares = float(((x - mean) ** 2).sum())
    if bounds is None:
        if _all_equal(x, 0.0):
            reason = "all problems have the same value, and nothing bounds the others"
            return Interval(mean, math.nan, math.nan, level, count, reason)
        half = t * math.sqrt(squares / (count - 1) / count)
        return Interval(mean, mean - half, mean + half, level, count)
    width = high - low
    share = min(max((mean - low) / width, 0.0), 1.0)
    largest = (count - 1) * share * (1 - share)
    phi = (squares / width**2 + _COIN) / (largest + _COIN)
    ends = _wilson(share, count / phi, t)
    return Interval(mean, low + width * ends[0], low + width * ends[1], level, count)


def sampling_interval(samples: Sequence[Sequence[float]], *, level: float = 0.95) -> Interval:
    r"""Confidence interval for the mean over these very problems: the noise of sampling the answers only.

    Narrower than `mean_interval`, and the answer to another question: it says how far the reported mean would
    move if the same problems were sampled again, and nothing about other problems. Wilson's interval as there,
    with the variance within problems as a share of the largest that the mean allows (all problems equally
    hard):

    .. math::
        s^2 = \frac{\sum_i s_i^2 / n_i}{\sum_i 1 / n_i}, \qquad
        \phi = \frac{s^2 + 1/(2P)}{\bar x (1 - \bar x) + 1/(2P)}, \qquad
        \nu = \frac{(\sum_i 1 / n_i)^2}{\sum_i 1 / (n_i^2 (n_i - 1))}

    in place of phi (two more problems whose samples are tosses of a coin are added), P^2 / (phi sum_i 1 / n_i)
    effective samples and nu degrees of freedom; with n samples of each problem these are P n / phi and P (n - 1).

    Args:
        samples: The values of the samples of each problem, in [0, 1]; lengths may differ.
        level: Confidence level, in (0, 1).

    Returns:
        The mean over problems of the means of their samples, and its interval. NaN as ends, with the reason,
        where a problem has a single sample.

    Raises:
        ValueError: As `mean_interval`, and for values that are not sequences.

    Assumptions:
        Samples are independent given the problem.

    Example:
        >>> samples = [[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]] * 5
        >>> print(sampling_interval(samples))
        0.50 [0.42, 0.58]
        >>> print(mean_interval(samples))
        0.50 [0.32, 0.68]
    """
    _check_level(level)
    x = _problem_means("samples", samples, 0.0, 1.0)
    lengths = [np.size(values) if np.ndim(values) else 0 for values in samples]
    if 0 in lengths:
        problem = lengths.index(0)
        raise ValueError(f"samples must have a sequence for each problem, but problem {problem} is a number")
    count, mean = len(x), float(x.mean())
    if 1 in lengths:
        reason = f"problem {lengths.index(1)} has one sample, which says nothing about the spread of its samples"
        return Interval(mean, math.nan, math.nan, level, count, reason)
    n = np.asarray(lengths, dtype=np.float64)
    parts = np.asarray([np.var(np.asarray(values, dtype=np.float64), ddof=1) for values in samples]) / n
    within = float(parts.sum() / (1 / n).sum())
    phi = (within + 2 * _COIN / count) / (mean * (1 - mean) + 2 * _COIN / count)
    degrees = float((1 / n).sum() ** 2 / (1 / (n**2 * (n - 1))).sum())
    low, high = _wilson(mean, count**2 / float((1 / n).sum()) / phi, _student(level, degrees))
    return Interval(mean, low, high, level, count)


def compare_paired(a: Values, b: Values, *, level: float = 0.95, bounds: Bounds = (0.0, 1.0)) -> Comparison:
    r"""Difference of two runs on the same problems, b minus a: is there one beyond the choice of problems?

    Student's t for the differences d_i = b_i - a_i of the P problems, cut at the largest difference that the
    bounds allow; interval and p-value come from the same
    statistic, so that p <= 1 - level exactly where the interval leaves out zero. Where all differences are
    equal (to c; most often to 0) they have no spread to go by. What such a sample does show is that another
    difference is rare: with probability 1 - alpha / 2, at most a share

    .. math:: q = 1 - (\alpha / 2)^{1/P}

    of all problems has one, and these may lie anywhere in the bounds: [c - q (w + c), c + q (w - c)] with w the
    distance of the bounds, and the p-value 2 (1 + |c| / w)^{-P} that belongs to it (1 for c = 0).

    Args:
        a: First run (the baseline), one number per problem, or one sequence of numbers, which is averaged first.
        b: Second run, the same problems in the same order.
        level: Confidence level, in (0, 1).
        bounds: Smallest and largest value that is possible for a and b, or None.

    Returns:
        The comparison. NaN as ends and p-value, with the reason, for a single problem and for equal differences
        without bounds (differences of 0 have the p-value 1 there, too).

    Raises:
        ValueError: As `mean_interval`, or a and b differ in length.

    Assumptions:
        As `mean_interval`. The answer is about these two trained models: two training runs of one recipe that
        differ in their seed may well differ.

    References:
        Miller, arXiv:2411.00640, section 4.2, on paired comparison of models.

    Example:
        >>> a = [0.00, 0.25, 0.50, 0.50, 0.75, 1.00, 0.00, 0.25]
        >>> b = [0.25, 0.50, 0.50, 0.75, 1.00, 1.00, 0.00, 0.50]
        >>> print(compare_paired(a, b))
        +0.16 [+0.05, +0.26], p = 0.011
        >>> print(compare_paired([0] * 30, [0] * 30))
        +0.00 [-0.12, +0.12], p = 1
    """
    _check_level(level)
    low, high = _check_bounds(bounds)
    first, second = _problem_means("a", a, low, high), _problem_means("b", b, low, high)
    if len(first) != len(second):
        raise ValueError(f"a and b must have the same problems, but a has {len(first)} and b has {len(second)}")
    count = len(first)
    difference = second - first
    size = np.maximum(np.maximum(np.abs(first), np.abs(second)), 0.0 if bounds is None else high - low)
    difference = np.where(np.abs(difference) <= _ROUNDING * size, 0.0, difference)
    mean = float(difference.mean())

    def comparison(ends: tuple[float, float], p_value: float, reason: str = "") -> Comparison:
        return Comparison(
            difference=mean,
            low=ends[0],
            high=ends[1],
            p_value=p_value,
            level=level,
            problems=count,
            mean_a=float(first.mean()),
            mean_b=float(second.mean()),
            larger=int((difference > 0).sum()),
            smaller=int((difference < 0).sum()),
            reason=reason,
        )

    nothing = (math.nan, math.nan)
    if count == 1:
        return comparison(nothing, math.nan, "one problem has no spread over problems")
    if not _all_equal(difference, float(size.max())):
        error = math.sqrt(float(difference.var(ddof=1)) / count)
        half = _student(level, count - 1) * error
        p_value = 2 * float(stdtr(count - 1, -abs(mean) / error))
        # No limit where there are no bounds.
        return comparison((max(mean - half, low - high), min(mean + half, high - low)), p_value)
    if bounds is None:
        reason = "all differences are equal, and nothing bounds the others"
        return comparison(nothing, 1.0 if mean == 0 else math.nan, reason)
    width = high - low
    rare = -math.expm1(math.log((1 - level) / 2) / count)
    p_value = min(1.0, 2 * math.exp(-count * math.log1p(abs(mean) / width)))
    return comparison((mean - rare * (width + mean), mean + rare * (width - mean)), p_value)


def _ends(low: float, high: float, spec: str, reason: str) -> str:
    return reason if math.isnan(low) else f"{low:{spec}}, {high:{spec}}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _integers(name: str, value: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be made of integers, not {_shown(value)}")
    return array.astype(np.int64)


def _check_range(name: str, value: NDArray[np.int64], low: int, high: np.int64 | NDArray[np.int64] | None) -> None:
    wrong = value < low if high is None else (value < low) | (value > high)
    if np.any(wrong):
        allowed = f"at least {low}" if high is None else f"from {low} to {np.broadcast_to(high, value.shape)[wrong][0]}"
        raise ValueError(f"{name} must be {allowed}, not {value[wrong][0]}")


def _check_level(level: float) -> None:
    if not (isinstance(level, (int, float)) and 0 < level < 1):
        raise ValueError(f"level must be a number between 0 and 1, not {_shown(level)}")


def _check_bounds(bounds: Bounds) -> tuple[float, float]:
    """Both ends; infinite where there are none."""
    if bounds is None:
        return -math.inf, math.inf
    try:
        low, high = (float(end) for end in bounds)
    except (TypeError, ValueError):
        raise ValueError(f"bounds must be two numbers or None, not {_shown(bounds)}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"bounds must be finite and in ascending order, not {_shown(bounds)}")
    return low, high


def _problem_means(name: str, values: Values, low: float, high: float) -> Floats:
    """One number per problem, every one of them finite and in bounds."""
    if isinstance(values, (str, bytes)) or not (isinstance(values, Sequence) or np.ndim(values) in (1, 2)):
        raise ValueError(f"{name} must be a sequence with an entry for each problem, not {_shown(values)}")
    if len(values) == 0:
        raise ValueError(f"{name} must have at least one problem")
    means = np.empty(len(values))
    for problem, entry in enumerate(values):
        where = f"{name}, problem {problem}"
        try:
            numbers = np.asarray(entry)
        except ValueError:
            raise ValueError(f"{where}: a number or a sequence of numbers is needed, not {_shown(entry)}") from None
        if numbers.ndim > 1 or numbers.size == 0 or numbers.dtype.kind not in "biuf":
            raise ValueError(f"{where}: a number or a sequence of numbers is needed, not {_shown(entry)}")
        numbers = numbers.astype(np.float64)
        if not np.all(np.isfinite(numbers)) or numbers.min() < low or numbers.max() > high:
            allowed = "finite" if math.isinf(low) else f"from {low:g} to {high:g}"
            raise ValueError(f"{where}: values must be {allowed}, not {_shown(entry)}")
        means[problem] = numbers.mean()
    return means


def _binomials(n: int, most: int) -> Floats:
    """C(n, j) for j = 0 ... most."""
    return np.asarray([math.comb(n, j) for j in range(most + 1)], dtype=np.float64)


@functools.cache
def _unit_interval(count: int) -> tuple[Floats, Floats]:
    """Nodes and weights for integrals from 0 to 1: exact for polynomials of a degree below 2 count."""
    nodes, weights = roots_legendre(count)
    return (1 + nodes) / 2, weights / 2


def _product(a: Floats, b: Floats, most: int) -> Floats:
    """Products of polynomials, one a row, up to the power `most`."""
    return np.stack([np.convolve(left, right)[: most + 1] for left, right in zip(a, b, strict=True)])


def _power(a: Floats, exponent: int, most: int) -> Floats:
    """A power of each polynomial, up to the power `most` of its variable."""
    result = np.ones((len(a), 1))
    while exponent:
        if exponent % 2:
            result = _product(result, a, most)
        exponent //= 2
        if exponent:
            a = _product(a, a, most)
    return result


def _all_equal(x: Floats, scale: float) -> bool:
    return float(np.ptp(x)) <= _ROUNDING * max(float(np.abs(x).max()), scale)


def _student(level: float, degrees: float) -> float:
    """The t that a two-sided interval reaches to."""
    return float(stdtrit(degrees, (1 + level) / 2))


def _wilson(share: float, n: float, t: float) -> tuple[float, float]:
    """All mu in [0, 1] with |share - mu| <= t sqrt(mu (1 - mu) / n)."""
    penalty = t * t / n
    center = share + penalty / 2
    half = math.sqrt(penalty * (share * (1 - share) + penalty / 4))
    return max(0.0, (center - half) / (1 + penalty)), min(1.0, (center + half) / (1 + penalty))
