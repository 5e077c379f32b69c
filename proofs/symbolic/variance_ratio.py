"""Second moments of the cumulative ratio: variance ratio, its limits, the product formula's error, sample sizes."""

from __future__ import annotations

from itertools import product

import sympy as sp

from proofs.symbolic.derivation import Chain, Derivation, Sign, Solution, about
from proofs.symbolic.gaussian import density
from proofs.symbolic.strings import String, Strings, memoryless

d = sp.Symbol("d", positive=True)
n, t, k, j = sp.symbols("n t k j", integer=True, positive=True)
HORIZON = sp.Symbol("H", integer=True, positive=True)


def second_moment() -> Solution:
    """E_b rho_t^2 with one chi2 = d for every token, from its recurrence."""
    m = sp.Function("m")
    time = sp.Symbol("t", integer=True, nonnegative=True)
    step = m(time + 1) - (1 + d) * m(time)
    return Solution(
        "m_t = E_b rho_t^2 where chi2(s) = d at every prefix",
        (step, m(0) - 1),
        "E_b[rho_{t+1}^2 | F_t] = rho_t^2 (1 + chi2(s_{t+1})); the recurrence is solved by rsolve",
        m(time),
        sp.rsolve(step, m(time), {m(0): 1}),
    )


def _moment_at(steps: sp.Expr) -> sp.Expr:
    solution = second_moment()
    return solution.value.subs(solution.unknown.args[0], steps)


@about("2r.bounds")
def variance_ratio() -> Derivation:
    """Var(rho_H) / Var(rho_t) with one shared chi2, and its two bounds."""
    moments = second_moment()
    ratio = (_moment_at(HORIZON) - 1) / (_moment_at(t) - 1)
    inverse = 1 / (1 + d)
    growth = (1 + d) ** (HORIZON - t)
    x = sp.Symbol("x", positive=True)
    mean_power, weighted = (1 - x**n) / n, sp.Sum(j * x ** (j - 1), (j, 1, n))
    fall = mean_power - mean_power.subs(n, n + 1)
    as_sum = (1 - x) ** 2 / (n * (n + 1)) * weighted
    at_inverse = (d / (1 + d)) ** 2 / (n * (n + 1)) * weighted.subs(x, inverse)
    at_growth = d**2 / (n * (n + 1)) * weighted.subs(x, 1 + d)
    rise = sp.Sum((1 + d) ** (j - 1), (j, 1, n))
    numbers = {f"H = 5, d = 1/4, t = {at}": ratio.subs({d: sp.Rational(1, 4), HORIZON: 5, t: at}) for at in range(1, 6)}
    return Derivation(
        "Var(rho_H)/Var(rho_t) = ((1+d)^H - 1)/((1+d)^t - 1), which for t <= H is at least H/t and (1+d)^(H-t), and at "
        "most (H/t)(1+d)^(H-t).",
        "chi2(s) = d > 0 at every prefix; absolute continuity.",
        (
            moments,
            Chain(
                "Var(rho_t)",
                (
                    ("E_b rho_t^2 - (E_b rho_t)^2 with E_b rho_t = 1", _moment_at(t) - 1),
                    ("as a geometric sum", d * rise.subs(n, t)),
                    ("and in closed form", (1 + d) ** t - 1),
                ),
            ),
            Chain(
                "Var(rho_H) / Var(rho_t)",
                (
                    ("both variances by the recurrence", ratio),
                    ("in powers of x = 1/(1+d)", growth * (1 - inverse**HORIZON) / (1 - inverse**t)),
                    ("back in closed form", ((1 + d) ** HORIZON - 1) / ((1 + d) ** t - 1)),
                ),
            ),
            Chain(
                "(1 - x^n)/n - (1 - x^(n+1))/(n+1)",
                (("difference of neighbors", fall), ("as a sum", as_sum)),
                (sp.Ne(x, 1),),
            ),
            Chain(
                "the same at x = 1/(1+d)",
                (("by substitution", as_sum.subs(x, inverse)), ("as a sum of positive terms", at_inverse)),
            ),
            Sign(
                "(1 - x^n)/n falls in n where x = 1/(1+d)",
                at_inverse,
                "so (1 - x^H)/(1 - x^t) <= H/t: the upper bound. As x^H <= x^t that quotient is also at least 1: the "
                "lower bound (1+d)^(H-t)",
            ),
            Chain(
                "the same at x = 1 + d",
                (("by substitution", as_sum.subs(x, 1 + d)), ("as a sum of positive terms", at_growth)),
            ),
            Sign(
                "((1+d)^n - 1)/n rises in n",
                at_growth,
                "so the ratio is at least H/t: the other lower bound",
            ),
        ),
        numbers,
    )


@about("2r.limit")
def variance_ratio_limits() -> Derivation:
    """Limits of the variance ratio and of the printed factor, which are two expressions."""
    ratio = (_moment_at(HORIZON) - 1) / (_moment_at(t) - 1)
    growth = (1 + d) ** (HORIZON - t)
    later = ratio.subs(HORIZON, t + k) / growth.subs(HORIZON, t + k)
    return Derivation(
        "As d -> 0 the exact ratio tends to H/t while (1+d)^(H-t) tends to 1; as (1+d)^t grows the two agree.",
        "chi2(s) = d > 0 at every prefix; absolute continuity.",
        (
            Chain(
                "limit of Var(rho_H)/Var(rho_t) as d -> 0",
                (("by definition", sp.Limit(ratio, d, 0)), ("by SymPy", sp.limit(ratio, d, 0))),
            ),
            Chain(
                "limit of (1+d)^(H-t) as d -> 0",
                (("by definition", sp.Limit(growth, d, 0)), ("by SymPy", sp.limit(growth, d, 0))),
            ),
            Chain(
                "limit of Var(rho_{t+k})/Var(rho_t) / (1+d)^k as t -> oo",
                (("by definition", sp.Limit(later, t, sp.oo)), ("by SymPy", sp.limit(later, t, sp.oo))),
            ),
        ),
        {"H = 12, t = 3, d -> 0": sp.limit(ratio.subs({HORIZON: 12, t: 3}), d, 0)},
    )


@about("2.general", "2.product", "2.uncorrelated")
def product_formula_error() -> Derivation:
    """Two tokens: E_b rho_2^2 minus the product of 1 + chi2 is a covariance."""
    b, p, down, up = sp.symbols("b p c_0 c_1", positive=True)
    # After a first token a the second has chi2 = c_a; the first has the ratios (1-p)/(1-b) and p/b.
    chance, square, chi2 = (1 - b, b), (((1 - p) / (1 - b)) ** 2, (p / b) ** 2), (down, up)
    first = p**2 / b + (1 - p) ** 2 / (1 - b) - 1
    marginal = sum(c * x for c, x in zip(chance, chi2, strict=True))
    second = sum(c * s * (1 + x) for c, s, x in zip(chance, square, chi2, strict=True))
    difference = second - (1 + first) * (1 + marginal)
    covariance = sum(c * s * x for c, s, x in zip(chance, square, chi2, strict=True)) - (1 + first) * marginal
    b_0, b_1, p_0, p_1 = sp.symbols("b_0 b_1 p_0 p_1", positive=True)
    products = [
        chance[a] * each * (((1 - p) / (1 - b), p / b)[a] - 1) * (ratio - 1)
        for a, one, to in ((0, b_0, p_0), (1, b_1, p_1))
        for each, ratio in ((one, to / one), (1 - one, (1 - to) / (1 - one)))
    ]
    closed = (down - up) * (b - p) * (b * (1 - p) + p * (1 - b)) / (b * (1 - b))
    at = {b: sp.Rational(1, 2), p: sp.Rational(3, 4)}
    quarter = sp.Rational(1, 4)
    numbers = {}
    for name, values in {
        "up-weighted": (0, quarter),
        "down-weighted": (quarter, 0),
        "both": (quarter, quarter),
    }.items():
        where = at | dict(zip((down, up), values, strict=True))
        numbers[f"Var(rho_2), chi2 = 1/4 after {name}"] = sp.Rational((second - 1).subs(where))
        numbers[f"product formula, chi2 = 1/4 after {name}"] = sp.Rational(
            ((1 + first) * (1 + marginal) - 1).subs(where)
        )
    return Derivation(
        "Var(rho_2) exceeds (1 + chi2_1)(1 + chi2_2) - 1 by Cov_b(rho_1^2, chi2(s_2)), which has either sign and "
        "vanishes where chi2(s_2) is constant; Cov_b(r_1, r_2) = 0 in every case.",
        "a first binary token with b(1) = b, pi(1) = p; any second token with chi2 = c_a after a first token a.",
        (
            Chain(
                "E_b rho_2^2 - (1 + chi2_1)(1 + chi2_2)",
                (
                    ("by enumeration of the first token", difference),
                    ("Cov_b(rho_1^2, chi2(s_2))", covariance),
                    ("factored", closed),
                ),
            ),
            Chain(
                "Cov_b(r_1, r_2), second token binary, b(1) = b_a and pi(1) = p_a after a",
                (("over the four strings, as E_b r = 1", sp.Add(*products)), ("always", sp.Integer(0))),
            ),
            Sign(
                "covariance where only the up-weighted prefix diverges, p = b + e",
                _above(closed.subs(down, 0), b, p, up),
                "the product formula is too low",
            ),
            Sign(
                "minus the covariance where only the down-weighted prefix diverges, p = b + e",
                _above(-closed.subs(up, 0), b, p, down),
                "the product formula is too high",
            ),
        ),
        numbers,
    )


def _above(expression: sp.Expr, b: sp.Symbol, p: sp.Symbol, chi2: sp.Symbol) -> sp.Expr:
    """An expression at b = u/s, p = (u + v)/s, s = u + v + w, where signs can be read off."""
    u, v, w = sp.symbols("u v w", positive=True)
    total = u + v + w
    return sp.factor(expression.subs({b: u / total, p: (u + v) / total}))


@about("8.scale", "8.population")
def effective_sample_size() -> Derivation:
    """Population effective sample size with one shared chi2 and for a Gaussian log-ratio; when half is left."""
    sigma, time = sp.symbols("sigma t", positive=True)
    y = sp.Symbol("y", real=True)
    spread = sigma * sp.sqrt(time)
    second = sp.Integral(sp.exp(2 * y) * density(y, -(spread**2) / 2, spread), (y, -sp.oo, sp.oo))
    shifted = sp.exp(sigma**2 * time) * sp.Integral(density(y, 3 * spread**2 / 2, spread), (y, -sp.oo, sp.oo))
    fraction = sp.exp(-(sigma**2) * time)
    half = sp.solve(fraction - sp.Rational(1, 2), time)[0]
    spreads = (sp.Rational(335, 10000), sp.Rational(387, 10000), sp.Rational(393, 10000))
    numbers = {f"d = 1/4, t = {at}": (1 / _moment_at(t)).subs({d: sp.Rational(1, 4), t: at}) for at in range(1, 5)}
    numbers |= {f"half is left at, sigma = {float(s)}": half.subs(sigma, s) for s in spreads}
    numbers |= {
        f"fraction at t = {at}, sigma = 0.0335": fraction.subs({sigma: spreads[0], time: at})
        for at in (100, 1000, 4000, 8000)
    }
    ess = 1 / _moment_at(t)
    return Derivation(
        "The effective sample size is (1+d)^-t of the batch, exp(-sigma^2 t) for a Gaussian log rho_t, of which half "
        "is left at t = log(2)/sigma^2.",
        "chi2(s) = d at every prefix; or log rho_t normal with variance sigma^2 t and E_b rho_t = 1.",
        (
            second_moment(),
            Chain(
                "(E_b rho_t)^2 / E_b rho_t^2, shared chi2",
                (("E_b rho_t = 1 over the solution of the recurrence", ess), ("as a power", (1 + d) ** -t)),
            ),
            Chain(
                "(1+d)^-t - (1+d)^-(t+1)",
                (("difference of neighbors", ess - ess.subs(t, t + 1)), ("factored", d * (1 + d) ** (-t - 1))),
            ),
            Sign("its fall from t to t + 1", d * (1 + d) ** (-t - 1), "the size never rises"),
            Chain(
                "E_b rho_t^2, Gaussian",
                (
                    ("E exp(2 y) with y normal of mean -sigma^2 t/2 (see forced_drift)", second),
                    ("complete the square: a normal density of another mean", shifted),
                    ("which integrates to 1", sp.exp(sigma**2 * time)),
                ),
            ),
            Solution(
                "t at which half is left",
                (fraction - sp.Rational(1, 2),),
                "by solve",
                time,
                half,
            ),
        ),
        numbers,
    )


def _pair_terms(horizon: int, p: sp.Symbol) -> sp.Expr:
    """E of (w + v)^2 / (w^2 + v^2) over pairs of independent strings, b = 1/2, pi(1) = p."""
    half = sp.Rational(1, 2)
    strings = Strings(horizon, memoryless(*[half] * horizon), memoryless(*[p] * horizon), lambda _s: sp.Integer(0))
    weights = [strings.rho(s, horizon) for s in strings.all()]
    pairs = [(w + v) ** 2 / (w**2 + v**2) for w, v in product(weights, repeat=2)]
    return sp.Mul(half ** (2 * horizon), sp.Add(*pairs), evaluate=False)


@about("8.batch")
def sample_effective_sample_size() -> Derivation:
    """Expected sample ESS of two sequences, and one batch whose ESS rises."""
    p = sp.Symbol("p", positive=True)
    parts, numbers = [], {}
    for horizon in (1, 2, 3):
        definition = _pair_terms(horizon, p)
        q = 1 - p
        # The two weights differ by p^m (1-p)^(c) against p^c (1-p)^m in m places; pairs are counted by m.
        excess = sp.Add(
            *(
                sp.binomial(2 * horizon, horizon + m) * (2 if m else 1) * p**m * q**m / (p ** (2 * m) + q ** (2 * m))
                for m in range(horizon + 1)
            )
        )
        closed = 1 + 2 * excess / sp.Integer(4) ** horizon
        parts.append(
            Chain(
                f"E[(w + v)^2 / (w^2 + v^2)], t = {horizon}",
                (
                    ("over all pairs of strings", definition),
                    (
                        "1 + E[2 w v/(w^2 + v^2)], pairs counted by m, the difference of their numbers of ones: "
                        "C(2t, t + m) of 4^t for each sign of m",
                        closed,
                    ),
                ),
            )
        )
        numbers[f"expected sample ESS of 2, p = 3/4, t = {horizon}"] = closed.subs(p, sp.Rational(3, 4))

    def batch_of(chosen: tuple[String, ...], steps: int) -> sp.Expr:
        half = sp.Rational(1, 2)
        strings = Strings(2, memoryless(half, half), memoryless(p, p), lambda _s: sp.Integer(0))
        weights = [strings.rho(s, steps) for s in chosen]
        return sp.Add(*weights) ** 2 / sp.Add(*(w**2 for w in weights))

    batch = ((1, 0), (0, 1))
    one = 1 / (p**2 + (1 - p) ** 2)
    parts += [
        Chain("sample ESS of {10, 01}, t = 1", (("(sum w)^2 / sum w^2", batch_of(batch, 1)), ("simplified", one))),
        Chain(
            "sample ESS of {10, 01}, t = 2",
            (("(sum w)^2 / sum w^2", batch_of(batch, 2)), ("both weights are 4 p (1 - p)", sp.Integer(2))),
        ),
    ]
    numbers |= {"{10, 01}, p = 3/4, t = 1": one.subs(p, sp.Rational(3, 4)), "{10, 01}, t = 2": sp.Integer(2)}
    return Derivation(
        "The sample effective sample size of a batch can rise with t; its expectation over two independent binary "
        "strings, which falls here, in closed form.",
        "independent binary tokens, b = 1/2, pi(1) = p.",
        tuple(parts),
        numbers,
    )
