r"""How far recorded importance ratios can be trusted: spread, drift, sample size and clip rate by position.

Log-probabilities recorded by any trainer go in (NumPy, torch or another array API library; any leading
dimensions, time last, `mask` True at policy tokens), plain tables come out: a dict of column name to 1-D
NumPy array, and small frozen dataclasses. Everything is computed in NumPy float64 on the host: this module
reports, it does not train.

Notation: r_t is the ratio of target to behavior policy at the t-th policy token of a sequence o, rho_t = r_1
... r_t, and T the position up to which a fit looks. Log-ratios are in nats, positions in policy tokens.

Three things decide how the numbers read.

* The population at position t. E_b rho_t = 1 holds for the process that stops with the sequence
  (`ended="stopped"`: rho_t = rho_{|o|} for t > |o|). Over the sequences still alive at t (`ended="alive"`)
  the mean is P_pi(|o| >= t) / P_b(|o| >= t) instead, which can be anything, and neither mean nor variance
  follows the martingale's laws. The mean of the token ratio r_t over the living is 1 all the same: whether
  there is a token t is settled before it is drawn.
* What sqrt(t) does not show. Rounding noise (a bfloat16 forward pass against a float32 one) spreads log rho_t
  like sigma sqrt(t) and lets it drift by about -sigma^2 t / 2, just as a small change of the policy does.
* What an average does not show. A target that was trained on these very sequences pushes some up and others
  down; then log rho_t spreads like t while its mean may still look right.

The independent units of every standard error are sequences, or whole prompts where `groups` is given; never
tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from ctpo._arrays import (
    Array,
    check_finite,
    check_floating,
    check_mask,
    check_sequence_or_token,
    check_shape,
    one_of,
)
from ctpo.clipping import CalibratedClip
from ctpo.estimators import Estimator
from ctpo.ratios import Level, log_ratio, positions
from ctpo.zoo import get_estimator

__all__ = [
    "Diagnosis",
    "Finding",
    "SpreadFit",
    "by_position",
    "calibrate_clip",
    "chi2_divergence",
    "diagnose",
    "effective_sample_size",
    "fit_spread",
    "format_table",
    "pareto_k",
]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.intp]
Table = dict[str, NDArray[Any]]
Seed = int | np.random.SeedSequence | np.random.Generator

# Spread below this, relative to the numbers it comes from, is rounding.
_ROUNDING = 1e-12
# A tail is fitted to the largest fifth of the weights, and to five of them at least.
_PARETO_MIN_SAMPLES = 25
# In a table, where one looks for the worst of many, k waits until its own standard error is about 0.2.
_PARETO_TABLE_SAMPLES = 100
_PARETO_LIMIT = 0.7
# Replicates handled by one matrix product: bounds memory at a few matrices of this many rows and T columns.
_BOOTSTRAP_CHUNK = 256
# E rho_t = 1 is tested while Var(log rho_t) is at most this: with heavier weights most sample means are below
# 1, and their standard errors too small.
_MAX_LOG_VARIANCE = 0.25
# A finding is flagged beyond this many standard errors, and from this many independent units on.
_FLAG_Z = 4.0
_MIN_UNITS = 20

# What a statistic is compared with: its name, that value, and what it means to be at, above and below it.
_FIXED_TARGET = "the value for a fixed target all of whose tokens the sampler can draw"
_CAUSES = f"{_FIXED_TARGET}; a truncated sampler, another sampler or a target trained on these sequences moves it"
_DRIFT = "the value for Gaussian log-ratios of a fixed target"
_DRIFT_MISS = f"{_DRIFT}; heavy tails and selection by length move it too, so the mean ratios decide"
_REFERENCES = {
    "mean_token_ratio": ("Mean token ratio up to position {}", 1.0, _FIXED_TARGET, _CAUSES, _CAUSES),
    "mean_ratio": ("Mean of rho_t, stopped, at position {}", 1.0, _FIXED_TARGET, _CAUSES, _CAUSES),
    "drift_ratio": ("Mean over variance of log rho_t at position {}", -0.5, _DRIFT, _DRIFT_MISS, _DRIFT_MISS),
    "power": (
        "Power of t by which log rho_t spreads up to position {}",
        0.5,
        "the sigma sqrt(t) law, which rounding noise obeys as well",
        "the sigma sqrt(t) law; some sequences diverge more than others, later tokens more than earlier ones, or "
        "(a power near 1) the target was trained on these sequences",
        "the sigma sqrt(t) law; later tokens spread less or undo earlier ones",
    ),
    "variance_ratio": (
        "Var(log rho_t) over the sum of token variances at position {}",
        1.0,
        "the value for uncorrelated tokens",
        "the value for uncorrelated tokens; the tokens of a sequence move together",
        "the value for uncorrelated tokens; the tokens of a sequence offset each other",
    ),
}
# What there would be instead, to tell apart before meeting a reference says anything: no drift, linear growth.
_ALTERNATIVES = {"drift_ratio": 0.0, "power": 1.0}
_ESS_TEXT = ("ESS fraction", "the first below {:g}.")
_PARETO_TEXT = ("Pareto k", "the first above {:g}; ESS and mean ratio may be unreliable there.")

_UNITS = {
    "t_low": "token",
    "t_high": "token",
    "mean_log_ratio": "nat",
    "mean_log_ratio_se": "nat",
    "std_log_ratio": "nat",
    "std_log_ratio_se": "nat",
    "drift": "nat/token",
    "var_over_t": "nat^2/token",
}


def effective_sample_size(log_weights: Array, mask: Array | None = None, *, axis: int = 0) -> Floats:
    r"""Kish's effective sample size of importance weights given by their logarithms.

    .. math:: \mathrm{ESS} = \frac{(\sum_i w_i)^2}{\sum_i w_i^2} = \frac{n}{1 + \chi^2}

    with chi^2 from `chi2_divergence`.

    Args:
        log_weights: Log weights, nats, any shape; -inf is a weight of 0. A common factor of the weights drops
            out, and so does the size of the logarithms: the largest is subtracted before the exponential.
        mask: bool, same shape; False leaves an entry out, whatever it holds. None keeps all.
        axis: The axis along which the samples run.

    Returns:
        float64, the shape of `log_weights` without `axis`, between 1 and n samples. 0 where there is no
        sample or every weight is 0; never NaN.

    Raises:
        ValueError: Shapes or dtypes do not fit, there is no such axis, or an unmasked entry is NaN or +inf.

    Assumptions:
        Independent samples. In one batch ESS may rise with position, although the population's n / E w^2
        cannot.

    References:
        Kish (1965), Survey Sampling; Owen (2013), Monte Carlo theory, methods and examples, section 9.3.

    Example:
        The sequences (1, 0) and (0, 1) of fair coin tosses under pi(1) = 3/4, after one toss and after two:

        >>> import numpy as np
        >>> effective_sample_size(np.log([[3 / 2, 3 / 4], [1 / 2, 3 / 4]]))
        array([1.6, 2. ])
    """
    return _kish(_scaled_weights(log_weights, mask, axis)[0])


def chi2_divergence(log_weights: Array, mask: Array | None = None, *, axis: int = 0) -> Floats:
    r"""Sample chi-square divergence of the target from the sampler, from log importance weights.

    .. math:: \chi^2 = \frac{\frac1n \sum_i w_i^2}{(\frac1n \sum_i w_i)^2} - 1 = \frac{n}{\mathrm{ESS}} - 1

    Its population value is Var_b(w) where E_b w = 1.

    Args:
        log_weights: Log weights, nats, any shape; -inf is a weight of 0. A common factor of the weights drops
            out.
        mask: bool, same shape; False leaves an entry out, whatever it holds. None keeps all.
        axis: The axis along which the samples run.

    Returns:
        float64, the shape of `log_weights` without `axis`, between 0 and n - 1. Computed from deviations from
        the mean weight, so that small divergences keep their digits. NaN where there is no sample or every
        weight is 0.

    Raises:
        ValueError: As `effective_sample_size`.

    Assumptions:
        Independent samples. The sample value cannot exceed n - 1, so it is far too low where the truth does.

    References:
        Owen (2013), Monte Carlo theory, methods and examples, section 9.3.

    Example:
        >>> import numpy as np
        >>> chi2_divergence(np.log([3 / 2, 1 / 2]))
        array(0.25)
    """
    return _relative_variance(*_scaled_weights(log_weights, mask, axis))


def pareto_k(log_weights: Array, mask: Array | None = None, *, axis: int = 0) -> Floats:
    r"""Shape k of the generalized Pareto distribution fitted to the largest importance weights.

    E w^m is finite for m < 1/k. Averages under the weights are usable for k < 0.7; with n samples the sharper
    limit is k < min(1 - 1/log10(n), 0.7). Beyond it, ESS and standard errors are themselves not to be
    trusted. The fit is that of arviz-stats: right tail, the largest 3 sqrt(n) of the weights but at most a
    fifth of them.

    Args:
        log_weights: Log weights, nats, any shape; -inf is a weight of 0. A common factor of the weights drops
            out.
        mask: bool, same shape; False leaves an entry out, whatever it holds. None keeps all.
        axis: The axis along which the samples run.

    Returns:
        float64, the shape of `log_weights` without `axis`. NaN: cannot be estimated, from fewer than 25
        samples or with a quarter of the tail tied where it begins (few distinct weights). -inf: a constant
        tail, all weights being equal for one. +inf: a quarter of the tail is 0 next to the largest weight, or
        below float64's range.

    Raises:
        ImportError: arviz-stats is not installed.
        ValueError: As `effective_sample_size`.

    Assumptions:
        Independent samples.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), arXiv:1507.02646.

    Example:
        Weights u^(-1/2) of a uniform u have k = 1/2:

        >>> import numpy as np
        >>> u = (np.arange(4000) + 0.5) / 4000
        >>> pareto_k(-np.log(u) / 2).round(2), pareto_k(np.zeros(100))
        (np.float64(0.5), array(-inf))
    """
    array_stats = _arviz_array_stats()
    weights, kept = _scaled_weights(log_weights, mask, axis)
    result = np.empty(weights.shape[1:])
    for index in np.ndindex(*result.shape):
        sample = (slice(None), *index)
        result[index] = _tail_shape(array_stats, weights[sample][kept[sample]])
    return result


def by_position(
    logp: Array,
    behavior_logp: Array,
    mask: Array | None = None,
    *,
    advantages: Array | None = None,
    estimator: Estimator | str | None = None,
    edges: Sequence[int] | None = None,
    level: Level = "cumulative",
    window: int | None = None,
    turn_ids: Array | None = None,
    ended: Literal["alive", "stopped"] = "alive",
    groups: Any = None,
    pareto: bool | None = None,
) -> Table:
    r"""Importance-ratio statistics and clip rates over buckets of the position t.

    A ratio column takes a statistic s_t over the n_t sequences at each position t and averages it over the
    bucket:

    .. math:: \frac{\sum_{t \in \text{bucket}} n_t\, s_t}{\sum_{t \in \text{bucket}} n_t}

    Below, x_t is the log-ratio at `level`, w_t = exp(x_t); statistics marked * need n_t >= 2 and take the
    average over the positions that have it. Clip columns are fractions of the bucket's policy tokens.

    =========================== ========================================================================
    t_low, t_high               first and last position of the bucket
    n_sequences, n_tokens       sequences that enter at t_low; policy tokens in the bucket
    mean_log_ratio, .._se       mean of x_t, nats
    std_log_ratio*, .._se       standard deviation of x_t (n_t - 1 degrees of freedom), nats
    drift                       mean of x_t, over t; nats per token
    var_over_t*                 variance of x_t, over t; nats^2 per token
    ess_fraction*, .._se        effective sample size of w_t over n_t
    chi2*                       mean(w_t^2) / mean(w_t)^2 - 1
    pareto_k                    `pareto_k` of w_t at the bucket's last position with n_t >= 100
    mean_ratio, .._se           mean of w_t
    clip_low, clip_high         where the estimator's lower, upper bound acts
    clip_dual                   where its dual bound acts
    clip_total, .._se           where any of its bounds acts
    saturated                   where one of its numerical limits acts
    clip_low_given_negative     lower bound acts, as a fraction of the tokens with A < 0
    clip_high_given_positive    upper bound acts, as a fraction of the tokens with A > 0
    zero_advantage              A = 0
    =========================== ========================================================================

    Standard errors are linearized, over independent sequences or groups, and take in that neighboring
    positions and the tokens of a sequence are correlated. Those of ess_fraction and mean_ratio are too small
    where the weights are heavy: for 256 sequences and Gaussian log-ratios of variance 2.6, ess_fraction has half
    of its true error.

    Args:
        logp: Log-probabilities of the sampled tokens under the target policy, nats, shape (..., T).
        behavior_logp: The same under the behavior policy.
        mask: bool, same shape, True at policy tokens; None for all. Masked places may hold anything.
        advantages: Shape (...,), one per sequence, or (..., T); with `estimator`, adds the clip columns.
        estimator: An `Estimator` or the name of one.
        edges: Increasing positions from 1 on: bucket j holds edges[j] <= t < edges[j + 1], and what lies
            outside is left out. None: powers of two, up to the longest sequence.
        level: Ratio level, as in `log_ratio`. The columns drift and var_over_t mean something at
            "cumulative".
        window: As in `log_ratio`.
        turn_ids: As in `log_ratio`.
        ended: What a sequence counts as after its last token. "alive": nothing; position t is then
            conditional on survival to t, and E w_t may differ from 1 for genuine ratios. "stopped", for the
            level "cumulative" only: it keeps rho_{|o|}, so that E_b rho_t = 1 at every t and Var(rho_t) never
            falls with t.
        groups: Label of the prompt of each sequence, shape (...,), for standard errors over prompts. None:
            each sequence for itself.
        pareto: Whether to have the column pareto_k. None: if arviz-stats is installed.

    Returns:
        Column name to 1-D array with an entry for each bucket. NaN: not defined, such as a spread or a
        standard error from one sequence, a rate among no tokens, anything in an empty bucket. inf: beyond
        float64's range. Sequences without policy tokens count nowhere.

    Raises:
        ImportError: `pareto` is True and arviz-stats is not installed.
        ValueError: Shapes or dtypes do not fit, an entry at a policy token is NaN or infinite, `edges` do not
            increase, one of `advantages` and `estimator` is missing, or a name is unknown.

    Assumptions:
        E_b rho_t = 1 needs a target that was fixed before the tokens were drawn and has no mass where the
        sampler has none (top-p and top-k samplers fail that), and log-probabilities of the sampler itself.

    References:
        arXiv:2605.07331, section 3.1 (spread and clip rate by position).

    Example:
        All results of two fair coin tosses, under pi(1) = 3/4:

        >>> import numpy as np
        >>> tosses = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
        >>> logp, behavior_logp = np.log(np.where(tosses, 0.75, 0.25)), np.log(np.full((4, 2), 0.5))
        >>> table = by_position(logp, behavior_logp, pareto=False)
        >>> print(format_table(table, ["t_low", "n_sequences", "drift", "ess_fraction", "mean_ratio"]))
        t_low  n_sequences      drift  ess_fraction  mean_ratio
        token               nat/token
            1            4    -0.1438           0.8           1
            2            4    -0.1438          0.64           1
    """
    if (advantages is None) != (estimator is None):
        missing, given = ("advantages", "estimator") if advantages is None else ("estimator", "advantages")
        raise ValueError(f"{missing} must be given together with {given}; got None")
    one_of("ended", ended, ("alive", "stopped"))
    if ended == "stopped" and level != "cumulative":
        raise ValueError(
            f"ended must be 'alive' at level {level!r}, where no value outlasts the sequence; got 'stopped'"
        )
    batch = _read(logp, behavior_logp, mask, groups)
    if turn_ids is not None:
        turn_ids = _to_host(turn_ids)
        check_shape(batch.shape, "logp", turn_ids=turn_ids)
        turn_ids = turn_ids.reshape(batch.mask.shape)
    bounds = _bucket_edges(edges, batch.longest)
    if pareto is None:
        pareto = importlib.util.find_spec("arviz_stats") is not None
    array_stats = _arviz_array_stats() if pareto else None

    values = log_ratio(batch.logp, batch.behavior_logp, batch.mask, level=level, window=window, turn_ids=turn_ids)
    x = batch.by_position(values)
    time = np.arange(1, batch.longest + 1)
    counted = time <= batch.length[:, None]
    if ended == "stopped":
        x, counted = _stopped(x, batch.length)
    buckets = [slice(low - 1, high - 1) for low, high in pairwise(bounds)]
    empty, *rows = (
        _ratio_columns(x[:, bucket], counted[:, bucket], time[bucket], batch.unit, array_stats)
        for bucket in (slice(0), *buckets)
    )
    tokens = _TokenCounts(batch, bounds)
    table: Table = {"t_low": bounds[:-1], "t_high": bounds[1:] - 1}
    table["n_sequences"] = np.array([row.pop("n_sequences") for row in rows], dtype=np.intp)
    table["n_tokens"] = tokens.all.sum(axis=0)
    table |= {name: np.array([row[name] for row in rows], dtype=np.float64) for name in list(empty)[1:]}
    if advantages is not None and estimator is not None:
        table |= _clip_columns(get_estimator(estimator), batch, advantages, turn_ids, tokens)
    return table


@dataclass(frozen=True)
class SpreadFit:
    r"""How log rho_t spreads and drifts over the positions 1..T.

    Each `.._se` is the bootstrap standard error of the attribute before it.

    Attributes:
        horizon: T, tokens.
        n_sequences: Sequences with a policy token.
        n_units: Independent units among them: prompts where groups were given, else sequences.
        sigma: From Var(log rho_t) = sigma^2 t; nats per square root of a token.
        power: p of std(log rho_t) = const t^p; 1/2 for uncorrelated increments of constant variance.
        drift: kappa of E log rho_t = -kappa t, nats per token; for genuine ratios the mean KL(b || pi) of a
            token.
        token_drift: The same from tokens: mean of -log r_t, nats per token. Survival does not bias it.
        token_kl: Mean of r_t - 1 - log r_t, which is never negative and, for genuine ratios, has the mean of
            -log r_t with a far smaller error. Without E_b r_t = 1 it is no estimate of the drift: the two differ
            by mean_token_ratio - 1.
        drift_ratio: mean(log rho_T) / Var(log rho_T); -1/2 where E rho_T = 1 and log rho_T is Gaussian.
        token_std: Standard deviation of log r_t at a position, in the root of the mean square, nats.
        variance_ratio: Var(log rho_T) / sum_t Var(log r_t); 1 for uncorrelated tokens, T for tokens that move
            as one.
        mean_token_ratio: Mean of r_t over tokens; tends to 1 for genuine ratios, survival or not.
        mean_log_ratio: Mean of log rho_T, nats.
        var_log_ratio: Variance of log rho_T, nats^2.
    """

    horizon: int
    n_sequences: int
    n_units: int
    sigma: float
    sigma_se: float
    power: float
    power_se: float
    drift: float
    drift_se: float
    token_drift: float
    token_drift_se: float
    token_kl: float
    token_kl_se: float
    drift_ratio: float
    drift_ratio_se: float
    token_std: float
    token_std_se: float
    variance_ratio: float
    variance_ratio_se: float
    mean_token_ratio: float
    mean_token_ratio_se: float
    mean_log_ratio: float
    mean_log_ratio_se: float
    var_log_ratio: float
    var_log_ratio_se: float


def fit_spread(
    logp: Array,
    behavior_logp: Array,
    mask: Array | None = None,
    *,
    groups: Any = None,
    horizon: int | None = None,
    bootstrap: int = 200,
    seed: Seed = 0,
) -> SpreadFit:
    r"""Fit the sigma sqrt(t) law, the power of t and the drift to cumulative log-ratios.

    With m_t and v_t the mean and the variance (n_t - 1 degrees of freedom) of log rho_t over the n_t
    sequences alive at t, for t = 1..T:

    .. math::

        \hat\sigma^2 = \frac{\sum_t (n_t - 1)\, v_t / t}{\sum_t (n_t - 1)}, \qquad
        \hat\kappa = -\frac{\sum_t n_t m_t}{\sum_t n_t t}, \qquad
        \hat p = \text{slope of } \tfrac12 \log v_t \text{ on } \log t \text{ under weights } (n_t - 1)/t

    The first two are least squares through the origin, weighted by the inverse sampling variances of a
    Gaussian random walk, 2 sigma^4 t^2 / (n_t - 1) of v_t and sigma^2 t / n_t of m_t; the third weighs every
    doubling of t alike. Standard errors are those of a bootstrap that draws sequences, or whole groups, with
    replacement.

    Args:
        logp: Log-probabilities of the sampled tokens under the target policy, nats, shape (..., T).
        behavior_logp: The same under the behavior policy.
        mask: bool, same shape, True at policy tokens; None for all. Masked places may hold anything.
        groups: Label of the prompt of each sequence, shape (...,), to draw whole prompts. None: each sequence
            for itself.
        horizon: T. None: the last position that at least half of the sequences, and two, reach.
        bootstrap: Number of replicates, at least 2.
        seed: Seed or generator of the bootstrap.

    Returns:
        The fits. NaN: not defined, such as a variance from one sequence, a power from one position or without
        spread, a standard error from one unit. Sequences without policy tokens count nowhere.

    Raises:
        ValueError: Shapes or dtypes do not fit, an entry at a policy token is NaN or infinite, or `horizon`
            or `bootstrap` is out of range.

    Assumptions:
        Independent units; responses to one prompt are not independent in general, hence `groups`. Where
        length depends on the ratio, the sequences alive at t are a selection (see the top of this module).

    References:
        arXiv:2605.07331, Figure 1 (sigma sqrt(t)).

    Example:
        Log-ratios of independent Gaussian tokens with E rho_t = 1:

        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> behavior_logp = np.full((400, 64), -1.0)
        >>> logp = behavior_logp + rng.normal(-(0.05**2) / 2, 0.05, behavior_logp.shape)
        >>> fit = fit_spread(logp, behavior_logp)
        >>> f"sigma {fit.sigma:.4f} +- {fit.sigma_se:.4f}, power {fit.power:.3f} +- {fit.power_se:.3f}"
        'sigma 0.0521 +- 0.0016, power 0.510 +- 0.014'
    """
    if not _is_integer(bootstrap) or bootstrap < 2:
        raise ValueError(f"bootstrap must be an integer of at least 2; got {bootstrap!r}")
    batch = _read(logp, behavior_logp, mask, groups)
    moments = _spread_moments(batch, horizon)
    rows = np.flatnonzero(batch.length)
    if moments is None:
        return SpreadFit(0, 0, 0, *[math.nan] * 22)
    labels, unit = np.unique(batch.unit[rows], return_inverse=True)
    estimates = moments.fit(np.ones((1, len(rows))))
    replicates: dict[str, list[Floats]] = {name: [] for name in estimates}
    rng = np.random.default_rng(seed)
    share = np.full(len(labels), 1.0 / len(labels))
    for start in range(0, bootstrap if len(labels) > 1 else 0, _BOOTSTRAP_CHUNK):
        draws = rng.multinomial(len(labels), share, size=min(_BOOTSTRAP_CHUNK, bootstrap - start))
        for name, values in moments.fit(draws[:, unit].astype(np.float64)).items():
            replicates[name].append(values)
    numbers: dict[str, float] = {}
    for name, estimate in estimates.items():
        numbers[name] = float(estimate[0])
        numbers[f"{name}_se"] = _finite_std(replicates[name]) if math.isfinite(estimate[0]) else math.nan
    return SpreadFit(horizon=len(moments.time), n_sequences=len(rows), n_units=len(labels), **numbers)


def calibrate_clip(
    logp: Array,
    behavior_logp: Array,
    mask: Array | None = None,
    *,
    low: float,
    high: float,
    dual: float | None = None,
    power: float | None = 0.5,
    drift: Literal["log_ratio", "kl"] = "log_ratio",
    horizon: int | None = None,
) -> CalibratedClip:
    r"""A clip window for wanted clip rates, from the drift and the spread of recorded log-ratios.

    With v_t the variance of log rho_t over the n_t sequences alive at t, as in `fit_spread`, the window has

    .. math:: \hat\sigma^2 = \frac{\sum_{t \le T} (n_t - 1)\, v_t / t^{2p}}{\sum_{t \le T} (n_t - 1)}

    and the drift `SpreadFit.token_drift` or `SpreadFit.token_kl`.

    Args:
        logp: Log-probabilities of the sampled tokens under the target policy, nats, shape (..., T).
        behavior_logp: The same under the behavior policy.
        mask: bool, same shape, True at policy tokens; None for all. Masked places may hold anything.
        low: Wanted share below the window among tokens with A < 0, between 0 and 0.5.
        high: Wanted share above the window among tokens with A > 0, between 0 and 0.5.
        dual: Wanted share above the dual bound among tokens with A < 0, between 0 and 0.5; None for no bound.
        power: p, the exponent of t in the standard deviation of log rho_t. None: `SpreadFit.power`.
        drift: "log_ratio": the mean of -log r_t, which centers the window whatever the ratios are. "kl": the mean
            of r_t - 1 - log r_t, much more precise from few sequences, but the drift only if E_b r_t = 1.
        horizon: Last position to look at. None: the last that at least half of the sequences, and two, reach.

    Returns:
        The window. Its rates hold for later sequences of the same two policies that the target was not trained on;
        with n sequences its center errs at T by about 1/sqrt(n) of the standard deviation with "log_ratio".

    Raises:
        ValueError: Shapes or dtypes do not fit, an entry at a policy token is NaN or infinite, a rate or `power`
            or `horizon` is out of range, `drift` is unknown, or the log-ratios have no spread (one sequence, or
            a target that is the behavior policy).

    Assumptions:
        Those of `CalibratedClip`.

    Example:
        Log-ratios of independent Gaussian tokens with E rho_t = 1. Half of the sequences calibrate a window for
        rates of 10% and 5%; the other half is clipped:

        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> behavior_logp = np.full((8000, 32), -1.0)
        >>> logp = behavior_logp + rng.normal(-(0.05**2) / 2, 0.05, behavior_logp.shape)
        >>> clip = calibrate_clip(logp[:4000], behavior_logp[:4000], low=0.1, high=0.05)
        >>> table = by_position(
        ...     logp[4000:],
        ...     behavior_logp[4000:],
        ...     advantages=np.tile([1.0, -1.0], 2000),
        ...     estimator=Estimator("cumulative", clip),
        ...     edges=[1, 2, 8, 33],
        ... )
        >>> print(format_table(table, ["t_low", "clip_low_given_negative", "clip_high_given_positive"]))
        t_low  clip_low_given_negative  clip_high_given_positive
        token
            1                   0.0935                     0.054
            2                   0.1017                   0.05358
            8                   0.1059                   0.05268
    """
    one_of("drift", drift, ("log_ratio", "kl"))
    # Every field is checked before any arithmetic; sigma and drift come from the data.
    clip = CalibratedClip(low=low, high=high, dual=dual, power=0.5 if power is None else power, sigma=1.0, drift=0.0)
    moments = _spread_moments(_read(logp, behavior_logp, mask, None), horizon)
    found = None if moments is None else moments.fit(np.ones((1, len(moments.alive))), power)
    sigma = math.nan if found is None else float(found["sigma"][0])
    if found is None or not 0.0 < sigma < math.inf:
        raise ValueError(
            "logp must differ from behavior_logp, and not by the same in every sequence, for a window to be "
            f"calibrated; got a standard deviation of {sigma}"
        )
    center = "token_drift" if drift == "log_ratio" else "token_kl"
    fitted = float(found["power"][0]) if power is None else power
    return replace(clip, sigma=sigma, drift=float(found[center][0]), power=fitted)


@dataclass(frozen=True)
class Finding:
    """One sentence of a diagnosis and the number behind it.

    Attributes:
        name: What was looked at: "mean_token_ratio", "mean_ratio", "drift_ratio", "power", "variance_ratio",
            "ess", "pareto_k" or "clip_rate".
        flagged: True where the number speaks against ratios of a fixed target, sqrt(t) spread or usable
            weights.
        value: The statistic; NaN where it is not defined.
        standard_error: Its standard error; NaN where there is none.
        statement: The sentence.
    """

    name: str
    flagged: bool
    value: float
    standard_error: float
    statement: str


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` returns; `print` shows it as text.

    Attributes:
        table: `by_position` of the cumulative ratio.
        spread: `fit_spread` of the same sequences.
        verdict: The findings, always in the same order.
    """

    table: Table
    spread: SpreadFit
    verdict: tuple[Finding, ...]

    def __str__(self) -> str:
        """Return log-ratios, weights and clip rates by position, and the verdict, `!` before a flag."""
        names = list(self.table)
        weights, clips = names.index("ess_fraction"), names.index("mean_ratio_se") + 1
        positions = ["t_low", "t_high"]
        blocks = [names[:weights], positions + names[weights:clips]]
        if names[clips:]:
            blocks.append(positions + names[clips:])
        parts = [format_table(self.table, block) for block in blocks]
        parts.append("\n".join(f"{'!' if found.flagged else '-'} {found.statement}" for found in self.verdict))
        return "\n\n".join(parts)


def diagnose(
    logp: Array,
    behavior_logp: Array,
    mask: Array | None = None,
    *,
    advantages: Array | None = None,
    estimator: Estimator | str | None = None,
    edges: Sequence[int] | None = None,
    groups: Any = None,
    min_ess: float = 0.5,
    bootstrap: int = 200,
    seed: Seed = 0,
) -> Diagnosis:
    r"""Tables by position, fits of spread and drift, and a verdict in sentences that each carry a number.

    Means, the drift ratio, the power and the variance ratio are flagged when they lie more than 4 standard
    errors from the value that ratios of a fixed target (for the last two: with uncorrelated tokens) have, and
    only with 20 independent units or more. E rho_t = 1 is tested for the stopped process, at the last t up to
    which Var(log rho_t) <= 0.25. ESS and Pareto k are flagged where the estimate is beyond its limit; the
    sample ESS is too high where the weights are heavy. A flag says that a number is off and names what can
    cause it, no more. The absence of flags proves nothing.

    Args:
        logp: Log-probabilities of the sampled tokens under the target policy, nats, shape (..., T).
        behavior_logp: The same under the behavior policy.
        mask: bool, same shape, True at policy tokens; None for all. Masked places may hold anything.
        advantages: Shape (...,), one per sequence, or (..., T); with `estimator`, adds clip rates.
        estimator: An `Estimator` or the name of one.
        edges: Edges of the buckets, as in `by_position`.
        groups: Label of the prompt of each sequence, shape (...,).
        min_ess: ESS fraction that counts as low, between 0 and 1.
        bootstrap: Number of bootstrap replicates.
        seed: Seed or generator of the bootstrap.

    Returns:
        Table, fits and verdict.

    Raises:
        ValueError: As `by_position` and `fit_spread`, or `min_ess` is not between 0 and 1.

    Assumptions:
        Those of `fit_spread`.

    Example:
        Log-ratios without drift are not those of two fixed policies:

        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> behavior_logp = np.full((400, 64), -1.0)
        >>> diagnosis = diagnose(behavior_logp + rng.normal(0.0, 0.1, behavior_logp.shape), behavior_logp)
        >>> [finding.name for finding in diagnosis.verdict if finding.flagged]
        ['mean_token_ratio', 'mean_ratio', 'drift_ratio', 'ess']
        >>> diagnosis.verdict[2].statement.split(",")[0]
        'Mean over variance of log rho_t at position 64 is 0.043 (s.e. 0.058): 9.4 s.e. from -0.5'
    """
    if not 0.0 < min_ess < 1.0:
        raise ValueError(f"min_ess must be between 0 and 1; got {min_ess!r}")
    table = by_position(
        logp, behavior_logp, mask, advantages=advantages, estimator=estimator, edges=edges, groups=groups
    )
    spread = fit_spread(logp, behavior_logp, mask, groups=groups, bootstrap=bootstrap, seed=seed)
    n, steps = spread.n_units, spread.horizon
    verdict = [
        _judged("mean_token_ratio", spread.mean_token_ratio, spread.mean_token_ratio_se, n, steps),
        _mean_ratio_finding(_read(logp, behavior_logp, mask, groups)),
        _judged("drift_ratio", spread.drift_ratio, spread.drift_ratio_se, n, steps),
        _judged("power", spread.power, spread.power_se, n, steps),
        _judged("variance_ratio", spread.variance_ratio, spread.variance_ratio_se, n, steps),
        _extreme_finding(table, "ess", "ess_fraction", min_ess, False, *_ESS_TEXT),
        _extreme_finding(table, "pareto_k", "pareto_k", _PARETO_LIMIT, True, *_PARETO_TEXT),
    ]
    if "clip_total" in table:
        verdict.append(_clip_finding(table))
    return Diagnosis(table, spread, tuple(verdict))


def format_table(table: Mapping[str, NDArray[Any]], columns: Iterable[str] | None = None) -> str:
    """Plain text of a table: a line of names, a line of units, then an aligned line for each row.

    Args:
        table: Column name to 1-D array, all of one length.
        columns: Names to show, in this order. None: all.

    Returns:
        The text without a final newline: four significant digits; no unit for counts, fractions and ratios.

    Raises:
        ValueError: A name is not in the table, or columns differ in length.

    Example:
        >>> import numpy as np
        >>> print(format_table({"t_low": np.array([1, 2]), "drift": np.array([-0.012345, np.nan])}))
        t_low      drift
        token  nat/token
            1   -0.01235
            2        nan
    """
    names = list(table if columns is None else columns)
    for name in names:
        one_of("columns", name, table)
    lengths = sorted({len(table[name]) for name in names})
    if len(lengths) > 1:
        raise ValueError(f"table must have columns of one length; got lengths {lengths}")
    texts = [
        [
            name,
            _UNITS.get(name, ""),
            *(str(x) if isinstance(x, int) else f"{x:.4g}" for x in table[name].tolist()),
        ]
        for name in names
    ]
    aligned = [[cell.rjust(max(map(len, column))) for cell in column] for column in texts]
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))


@dataclass(frozen=True)
class _Batch:
    """Log-probabilities as float64 of shape (sequences, T), and where their policy tokens lie."""

    logp: Floats
    behavior_logp: Floats
    mask: Bools
    position: Ints
    length: Ints
    unit: Ints
    shape: tuple[int, ...]

    @property
    def longest(self) -> int:
        return int(self.length.max(initial=0))

    def by_position(self, values: NDArray[Any]) -> Floats:
        """The value of policy token t in column t - 1; 0 after the last."""
        result = np.zeros((len(self.length), self.longest))
        rows, columns = np.nonzero(self.mask)
        result[rows, self.position[rows, columns] - 1] = values[rows, columns]
        return result


def _read(logp: Array, behavior_logp: Array, mask: Array | None, groups: Any) -> _Batch:
    """Check the arrays that every table starts from and bring them to the host."""
    logp, behavior_logp = _to_host(logp), _to_host(behavior_logp)
    shape = logp.shape
    if logp.ndim < 1:
        raise ValueError("logp must have a time axis, shape (..., T); got shape ()")
    check_floating(np, logp=logp, behavior_logp=behavior_logp)
    check_shape(shape, "logp", behavior_logp=behavior_logp)
    kept = np.ones(shape, dtype=np.bool_) if mask is None else _to_host(mask)
    check_mask(np, kept, shape, "logp")
    for name, x in (("logp", logp), ("behavior_logp", behavior_logp)):
        check_finite(np, name, x, kept, where="at every policy token")
    n = math.prod(shape[:-1])
    unit = np.arange(n)
    if groups is not None:
        labels = _to_host(groups)
        check_shape(shape[:-1], "logp without its last axis", groups=labels)
        unit = np.unique(labels.reshape(n), return_inverse=True)[1].reshape(n)
    kept = kept.reshape(n, shape[-1])
    flat = [np.where(kept, x.reshape(kept.shape), 0.0).astype(np.float64) for x in (logp, behavior_logp)]
    return _Batch(flat[0], flat[1], kept, positions(kept), kept.sum(axis=-1), unit, shape)


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _to_host(x: Any) -> NDArray[Any]:
    """NumPy array of the values of any array; torch's in float64, since NumPy lacks bfloat16."""
    if array_api_compat.is_torch_array(x):
        x = x.detach().cpu()
        return (x.double() if x.is_floating_point() else x).numpy()
    return np.asarray(x)


def _bucket_edges(edges: Sequence[int] | None, longest: int) -> Ints:
    if edges is None:
        powers = [2**j for j in range(longest.bit_length())]
        return np.array([*powers, longest + 1], dtype=np.intp)
    bounds = np.asarray(edges)
    if (
        bounds.ndim != 1
        or len(bounds) < 2
        or bounds.dtype.kind not in "iu"
        or bounds[0] < 1
        or (np.diff(bounds) < 1).any()
    ):
        raise ValueError(f"edges must be two or more increasing integers from 1 on; got {edges!r}")
    return bounds.astype(np.intp)


def _stopped(x: Floats, length: Ints) -> tuple[Floats, Bools]:
    """Every row goes on at its last value; rows without a value count nowhere."""
    time = np.arange(1, x.shape[1] + 1)
    last = np.minimum(time, np.maximum(length, 1)[:, None]) - 1
    return np.take_along_axis(x, last, axis=1), np.broadcast_to(length[:, None] > 0, x.shape)


def _scaled_weights(log_weights: Array, mask: Array | None, axis: int) -> tuple[Floats, Bools]:
    """Weights over the largest of their sample, 0 where masked, and what is not; samples along axis 0."""
    values = _to_host(log_weights)
    check_floating(np, log_weights=values)
    if not -values.ndim <= axis < values.ndim:
        raise ValueError(f"axis must be an axis of log_weights, of shape {values.shape}; got {axis!r}")
    kept = np.ones(values.shape, dtype=np.bool_) if mask is None else _to_host(mask)
    check_mask(np, kept, values.shape, "log_weights")
    check_finite(np, "log_weights", values, kept, where="where not masked", minus_infinity=True)
    kept = np.moveaxis(kept, axis, 0)
    values = np.where(kept, np.moveaxis(values, axis, 0), -np.inf).astype(np.float64)
    largest = values.max(axis=0, initial=-np.inf)
    return np.exp(values - np.where(largest > -np.inf, largest, 0.0)), kept


def _kish(weights: Floats) -> Floats:
    total, squares = weights.sum(axis=0), (weights**2).sum(axis=0)
    return np.asarray(total**2 / np.where(squares > 0.0, squares, 1.0))


def _relative_variance(weights: Floats, kept: Bools) -> Floats:
    count = np.maximum(kept.sum(axis=0), 1)
    mean = weights.sum(axis=0) / count
    deviation = np.where(kept, weights / np.where(mean > 0.0, mean, 1.0) - 1.0, 0.0)
    return np.where(mean > 0.0, (deviation**2).sum(axis=0) / count, np.nan)


def _arviz_array_stats() -> Any:
    try:
        return importlib.import_module("arviz_stats.base").array_stats
    except ImportError as error:
        message = "the Pareto k estimate needs arviz-stats; install it with: pip install scipy arviz-stats"
        raise ImportError(message) from error


def _tail_shape(array_stats: Any, weights: Floats) -> float:
    """Pareto k of one sample of weights, the largest of which is 1."""
    n = len(weights)
    if n < _PARETO_MIN_SAMPLES or not weights.any():
        return math.nan
    ordered = np.sort(weights)
    size = math.floor(3.0 * math.sqrt(n)) if n > 225 else n // 5
    begin, quartile = ordered[-size - 1], ordered[-size:][int(size / 4 + 0.5) - 1]
    if 1.0 - ordered[-size] <= _ROUNDING:
        return -math.inf
    if quartile < np.finfo(np.float64).tiny:
        return math.inf
    if quartile - begin <= _ROUNDING * quartile:
        return math.nan
    with np.errstate(all="ignore"):
        # The function is made for log likelihoods: it fits the tail of exp(-argument).
        return float(array_stats.psislw(-np.log(weights))[1])


def _clustered_error(influence: Floats, size: Ints, unit: Ints) -> float:
    """Standard error of a sum over entries divided by their number, with independent units.

    `influence` is the sum over the entries of a sequence of their deviations from the quotient, `size` their
    number.
    """
    n_units = len(np.unique(unit[size > 0]))
    if n_units < 2:
        return math.nan
    squares = (np.bincount(unit, weights=influence) ** 2).sum()
    return math.sqrt(n_units / (n_units - 1) * squares) / int(size.sum())


def _ratio_columns(x: Floats, counted: Bools, time: Ints, unit: Ints, array_stats: Any) -> dict[str, float]:
    """One row of ratio columns, from log-ratios of shape (sequences, positions of the bucket).

    A bucket may have no positions, but every position has a sequence.
    """
    n = counted.sum(axis=0)
    several = counted & (n > 1)
    row: dict[str, float] = {"n_sequences": n.max(initial=0)}

    def average(statistic: Floats, among: Bools) -> float:
        count = among.sum(axis=0)
        return float((statistic * count).sum() / count.sum()) if count.any() else math.nan

    def estimate(name: str, statistic: Floats, influence: Floats, among: Bools) -> None:
        row[name] = value = average(statistic, among)
        # A sequence moves the average through the statistics and through the share of the positions it is at.
        moved = np.where(among, influence + (statistic - value), 0.0).sum(axis=1)
        row[f"{name}_se"] = _clustered_error(moved, among.sum(axis=1), unit)

    mean = np.where(counted, x, 0.0).sum(axis=0) / n
    deviation = np.where(counted, x - mean, 0.0)
    # Squares scaled so that their mean is the variance with n - 1 degrees of freedom.
    squares = deviation**2 * (n / np.maximum(n - 1, 1))
    variance = squares.sum(axis=0) / n
    std = np.sqrt(variance)
    estimate("mean_log_ratio", mean, deviation, counted)
    estimate("std_log_ratio", std, (squares - variance) / np.where(std > 0.0, 2.0 * std, 1.0), several)
    row["drift"] = average(mean / time, counted)
    row["var_over_t"] = average(variance / time, several)

    weights, _ = _scaled_weights(x, counted, 0)
    ess = _kish(weights) / n
    first, second = weights.sum(axis=0) / n, (weights**2).sum(axis=0) / n
    influence = ess * (2.0 * (weights / first - 1.0) - (weights**2 / second - 1.0))
    estimate("ess_fraction", ess, influence, several)
    row["chi2"] = average(_relative_variance(weights, counted), several)
    if array_stats is not None:
        last = np.flatnonzero(n >= _PARETO_TABLE_SAMPLES)[-1:]
        row["pareto_k"] = _tail_shape(array_stats, weights[:, last][counted[:, last]])

    # One scale for the bucket: the result may overflow to inf, but never by inf - inf.
    scale = x.max(where=counted, initial=-np.inf)
    weights = np.exp(np.where(counted, x - scale, -np.inf))
    mean = weights.sum(axis=0) / n
    estimate("mean_ratio", mean, weights - mean, counted)
    with np.errstate(over="ignore", divide="ignore"):
        row |= {name: float(np.exp(scale + np.log(row[name]))) for name in ("mean_ratio", "mean_ratio_se")}
    return row


class _TokenCounts:
    """Counts of policy tokens by sequence and bucket, shape (sequences, buckets)."""

    def __init__(self, batch: _Batch, bounds: Ints) -> None:
        bucket = np.searchsorted(bounds, batch.position, side="right") - 1
        self._shape = (len(batch.length), len(bounds) - 1)
        self._inside = batch.mask & (bucket >= 0) & (bucket < self._shape[1])
        self._cell = np.nonzero(self._inside)[0] * self._shape[1] + bucket[self._inside]
        self.all = self.where(self._inside)

    def where(self, flag: Bools) -> Ints:
        cells = self._cell[flag[self._inside]]
        return np.bincount(cells, minlength=math.prod(self._shape)).reshape(self._shape)


def _clip_columns(
    estimator: Estimator, batch: _Batch, advantages: Array, turn_ids: Array | None, tokens: _TokenCounts
) -> Table:
    advantage = _to_host(advantages)
    per_token = check_sequence_or_token("advantages", advantage, batch.shape)
    advantage = advantage.reshape(batch.mask.shape if per_token else len(batch.mask))
    found = estimator.coefficients(batch.logp, batch.behavior_logp, advantage, batch.mask, turn_ids=turn_ids)
    advantage = np.broadcast_to(advantage if per_token else advantage[:, None], batch.mask.shape)
    flags = {
        "clip_low": found.clipped_low,
        "clip_high": found.clipped_high,
        "clip_dual": found.clipped_dual,
        "clip_total": found.clipped_low | found.clipped_high | found.clipped_dual,
        "saturated": found.saturated,
        "zero_advantage": advantage == 0,
    }
    negative, positive = advantage < 0, advantage > 0
    n_tokens = tokens.all.sum(axis=0)

    def rate(flag: Bools, among: Ints) -> Floats:
        return _divide(tokens.where(flag).sum(axis=0).astype(np.float64), among.astype(np.float64))

    table: Table = {name: rate(flag, n_tokens) for name, flag in flags.items()}
    deviation = np.subtract(tokens.where(flags["clip_total"]), tokens.all * table["clip_total"])
    errors = [_clustered_error(deviation[:, j], tokens.all[:, j], batch.unit) for j in range(len(n_tokens))]
    negatives, positives = (tokens.where(flag).sum(axis=0) for flag in (negative, positive))
    return {
        **{name: table[name] for name in ("clip_low", "clip_high", "clip_dual", "clip_total")},
        "clip_total_se": np.array(errors, dtype=np.float64),
        "saturated": table["saturated"],
        "clip_low_given_negative": rate(flags["clip_low"] & negative, negatives),
        "clip_high_given_positive": rate(flags["clip_high"] & positive, positives),
        "zero_advantage": table["zero_advantage"],
    }


def _spread_moments(batch: _Batch, horizon: int | None) -> _SpreadMoments | None:
    """What `fit_spread` fits to, up to the given or the default horizon; None without a policy token."""
    if horizon is not None and not (_is_integer(horizon) and 1 <= horizon <= batch.longest):
        longest = f"the longest sequence, {batch.longest}"
        raise ValueError(f"horizon must be an integer between 1 and {longest}; got {horizon!r}")
    rows = np.flatnonzero(batch.length)
    if not len(rows):
        return None
    length = batch.length[rows]
    if horizon is None:
        reach = max(min(2, len(rows)), (len(rows) + 1) // 2)
        horizon = int(np.sort(length)[-reach])
    tokens = batch.by_position(log_ratio(batch.logp, batch.behavior_logp, batch.mask, level="token"))
    return _SpreadMoments(tokens[rows, :horizon], length)


class _SpreadMoments:
    """The fits of `fit_spread` under any weighting of the sequences, by matrix products."""

    def __init__(self, tokens: Floats, length: Ints) -> None:
        self.time = np.arange(1.0, tokens.shape[1] + 1.0)
        alive = self.time <= length[:, None]
        self.alive = alive.astype(np.float64)
        self.path = _ColumnMoments(np.cumsum(tokens, axis=1), alive)
        self.step = _ColumnMoments(tokens, alive)
        # On the scale of the largest: the mean may overflow to inf, but never by inf - inf.
        self.scale = tokens.max(where=alive, initial=-np.inf)
        self.ratio_sum = np.exp(np.where(alive, tokens - self.scale, -np.inf)).sum(axis=1)
        # Tokens after the last are 0 and add nothing.
        self.log_sum = tokens.sum(axis=1)
        with np.errstate(over="ignore"):
            self.kl_sum = (np.expm1(tokens) - tokens).sum(axis=1)

    def fit(self, weight: Floats, power: float | None = 0.5) -> dict[str, Floats]:
        """Estimates for each row of weights, shape (replicates, sequences); NaN where not defined.

        "sigma" is the standard deviation at t = 1 of log-ratios that spread like t^power, or like t to the fitted
        power where it is None.
        """
        count = weight @ self.alive
        freedom = np.maximum(count - 1.0, 0.0)
        mean, variance = self.path.of(weight, count)
        _, token_variance = self.step.of(weight, count)
        sum_freedom, squares = freedom.sum(axis=1), np.where(freedom > 0.0, freedom * variance, 0.0)
        token_squares = np.where(freedom > 0.0, freedom * token_variance, 0.0)
        sums = np.where(count > 0.0, count * mean, 0.0)
        n_tokens = count.sum(axis=1)
        mean_ratio = _divide(weight @ self.ratio_sum, n_tokens)
        with np.errstate(over="ignore", divide="ignore"):
            mean_token_ratio = np.exp(self.scale + np.log(mean_ratio))
        with np.errstate(invalid="ignore"):  # a divergence beyond the range of floats, 0 times
            token_kl = _divide(weight @ self.kl_sum, n_tokens)
        slope = _log_log_slope(self.time, _divide(squares, freedom), freedom / self.time)
        growth = self.time ** (2.0 * (slope[:, None] if power is None else power))
        return {
            "sigma": np.sqrt(_divide((squares / growth).sum(axis=1), sum_freedom)),
            "power": slope,
            "drift": -_divide(sums.sum(axis=1), (count * self.time).sum(axis=1)),
            "token_drift": -_divide(weight @ self.log_sum, n_tokens),
            "token_kl": token_kl,
            "drift_ratio": _divide(mean[:, -1], variance[:, -1]),
            "token_std": np.sqrt(_divide(token_squares.sum(axis=1), sum_freedom)),
            "variance_ratio": _divide(variance[:, -1], token_variance.sum(axis=1)),
            "mean_token_ratio": mean_token_ratio,
            "mean_log_ratio": mean[:, -1],
            "var_log_ratio": variance[:, -1],
        }


class _ColumnMoments:
    """Mean and variance of the living entries of each column under weights."""

    def __init__(self, values: Floats, alive: Bools) -> None:
        living = np.where(alive, values, 0.0)
        self.center = living.sum(axis=0) / alive.sum(axis=0)
        # Centered before squaring, so that the variance is a difference of small numbers.
        self.deviation = np.where(alive, values - self.center, 0.0)
        self.square = self.deviation**2
        self.rounding = (_ROUNDING * np.abs(living).max(axis=0)) ** 2

    def of(self, weight: Floats, count: Floats) -> tuple[Floats, Floats]:
        total = weight @ self.deviation
        offset = _divide(total, count)
        squares = weight @ self.square
        centered = squares - total * offset
        # A replicate of one sequence, drawn again and again, has no variance but what rounding leaves.
        centered = np.where(centered <= np.maximum(_ROUNDING * squares, self.rounding), 0.0, centered)
        variance = _divide(centered, np.maximum(count - 1.0, 0.0))
        return self.center + offset, variance


def _log_log_slope(time: Floats, variance: Floats, weight: Floats) -> Floats:
    """Slope of log std on log time in each row; positions without spread are left out."""
    spread = variance > 0.0
    weight = np.where(spread, weight, 0.0)
    log_std = 0.5 * np.log(np.where(spread, variance, 1.0))
    log_time = np.log(time)
    center = _divide((weight * log_time).sum(axis=1), weight.sum(axis=1))
    lever = np.where(spread, log_time - center[:, None], 0.0)
    return _divide((weight * lever * log_std).sum(axis=1), (weight * lever**2).sum(axis=1))


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    """Quotient, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0.0)


def _finite_std(parts: list[Floats]) -> float:
    """Standard deviation of the replicates in which the statistic is defined."""
    values = np.concatenate([*parts, np.empty(0)])
    values = values[np.isfinite(values)]
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def _with_error(value: float, error: float) -> str:
    """Value and standard error, to the digits that the error leaves."""
    if not (math.isfinite(error) and error > 0.0 and math.isfinite(value)):
        return f"{value:.3g}" + (f" (s.e. {error:.2g})" if math.isfinite(error) else "")
    decimals = max(1 - math.floor(math.log10(error)), 0)
    return f"{value:.{decimals}f} (s.e. {error:.{decimals}f})"


def _judged(name: str, value: float, error: float, n_units: int, position: int) -> Finding:
    """Finding on a statistic that has a standard error and a value to compare it with."""
    what, reference, meets, above, below = _REFERENCES[name]
    error = 0.0 if error <= _ROUNDING * abs(value) else error
    text = f"{what.format(position)} is {_with_error(value, error)}: "
    distance = abs(value - reference)
    if name == "variance_ratio" and value > 0.0:
        # Skewed like a chi-square, with small errors where it is small by chance; its logarithm is not.
        distance = abs(math.log(value)) * value
    if not (math.isfinite(value) and math.isfinite(error)):
        text = f"{what.format(position)} is not defined for these sequences, or has no standard error."
        return Finding(name, False, value, error, text)
    if n_units < _MIN_UNITS:
        text += f"{n_units} independent units are too few to judge it."
    elif distance <= max(_FLAG_Z * error, _ROUNDING):
        alternative = _ALTERNATIVES.get(name, math.inf)
        if _FLAG_Z * error >= abs(alternative - reference):
            meets = f"but too uncertain to tell it from {alternative:g}"
        text += f"within {_FLAG_Z:g} s.e. of {reference:g}, {meets}."
    else:
        multiple = distance / error if error > 0.0 else math.inf
        text += f"{multiple:.1f} s.e. from {reference:g}, {above if value > reference else below}."
        return Finding(name, True, value, error, text)
    return Finding(name, False, value, error, text)


def _mean_ratio_finding(batch: _Batch) -> Finding:
    rows = batch.length > 0
    unit = batch.unit[rows]
    x, counted = _stopped(
        batch.by_position(log_ratio(batch.logp, batch.behavior_logp, batch.mask))[rows], batch.length[rows]
    )
    calm = x.var(axis=0, ddof=1) <= _MAX_LOG_VARIANCE if len(x) > 1 else np.zeros(0, dtype=np.bool_)
    steps = int(np.logical_and.accumulate(calm).sum())
    if not steps:
        text = f"Mean cumulative ratio not tested: Var(log rho_1) undefined or above {_MAX_LOG_VARIANCE:g}."
        return Finding("mean_ratio", False, math.nan, math.nan, text)
    last = slice(steps - 1, steps)
    row = _ratio_columns(x[:, last], counted[:, last], np.array([steps]), unit, None)
    return _judged("mean_ratio", row["mean_ratio"], row["mean_ratio_se"], len(np.unique(unit)), steps)


def _extreme_finding(
    table: Table, name: str, column: str, limit: float, worst_is_high: bool, text: str, beyond: str
) -> Finding:
    """Finding on the first bucket in which a column is beyond its limit, else on the bucket nearest to it."""
    if column not in table:  # pareto_k, the only column that needs another package
        text = f"{text} is not computed: it needs arviz-stats; pip install scipy arviz-stats."
        return Finding(name, False, math.nan, math.nan, text)
    values = np.where(table["n_sequences"] < _MIN_UNITS, np.nan, table.get(column, np.nan))
    signed = values if worst_is_high else -values
    if np.isnan(signed).all():
        return Finding(
            name, False, math.nan, math.nan, f"{text} is undefined or rests on fewer than {_MIN_UNITS} sequences."
        )
    over = np.flatnonzero(signed > (limit if worst_is_high else -limit))
    j = int(over[0]) if len(over) else int(np.nanargmax(signed))
    error = float(table[f"{column}_se"][j]) if f"{column}_se" in table else math.nan
    where = f"at positions {table['t_low'][j]} to {table['t_high'][j]}"
    text += f" is {_with_error(float(values[j]), error)} {where}, "
    text += beyond.format(limit) if len(over) else f"the nearest it comes to the limit of {limit:g}."
    return Finding(name, bool(len(over)), float(values[j]), error, text)


def _clip_finding(table: Table) -> Finding:
    filled = np.flatnonzero(table["n_tokens"])
    if not len(filled):
        return Finding("clip_rate", False, math.nan, math.nan, "Clip rate is not defined for these sequences.")
    value, error = table["clip_total"], table["clip_total_se"]
    text = "Clip rate is " + " and ".join(
        f"{_with_error(value[j], error[j])} at positions {table['t_low'][j]} to {table['t_high'][j]}"
        for j in dict.fromkeys((int(filled[0]), int(filled[-1])))
    )
    return Finding("clip_rate", False, float(value[filled[-1]]), float(error[filled[-1]]), text + ".")
