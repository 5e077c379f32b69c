"""Drift of the log-ratio and what clip windows do with it: rates, the mass under pi, crossover times, limits."""

from __future__ import annotations

import sympy as sp

from proofs.symbolic.derivation import Chain, Derivation, Sign, Solution, about
from proofs.symbolic.gaussian import density, normal_cdf

sigma, t, eps, kappa = sp.symbols("sigma t epsilon kappa", positive=True)
mu = sp.Symbol("mu", real=True)
y = sp.Symbol("y", real=True)
#: The released window and the paper's spreads per token.
LOW, HIGH = sp.Rational(25, 1000), sp.Rational(5, 100)
SPREADS = (sp.Rational(335, 10000), sp.Rational(387, 10000), sp.Rational(393, 10000))
POSITIONS = (100, 1000, 4000, 8000)
ROOT = sigma * sp.sqrt(t)
FALL = -(sigma**2) * t / 2


@about("7.superlinear", "7.variance")
def hot_and_cold() -> Derivation:
    """Var(log2 rho) = 4n/9 + n^2/36 where a neutral first token picks a hot or a cold state."""
    n = sp.Symbol("n", integer=True, positive=True)
    s = sp.Symbol("s", real=True)
    third, half = sp.Rational(1, 3), sp.Rational(1, 2)
    # In the hot state b writes log2 r = +1 with probability 1/3 and -1 with 2/3; in the cold one r = 1.
    token = third * sp.exp(s) + 2 * third * sp.exp(-s)
    generating = half * token**n + half
    mean, square = (sp.Subs(sp.Derivative(generating, (s, k)), s, 0) for k in (1, 2))
    closed = 4 * n / 9 + n**2 / 36
    parts: list[Chain | Solution | Sign] = [
        Chain(
            "E_b r in the hot state",
            (("pi/b = 2 with probability 1/3, 1/2 with 2/3", third * 2 + 2 * third * half), ("is 1", sp.Integer(1))),
        )
    ]
    for count in (1, 2, 3):
        # log2 rho = 2 k - n after k rises among n tokens; C(n, k) strings each.
        law = [(sp.binomial(count, k) * third**k * (2 * third) ** (count - k), 2 * k - count) for k in range(count + 1)]
        moments = [half * sp.Add(*(chance * value**power for chance, value in law)) for power in (1, 2)]
        parts.append(
            Chain(
                f"Var_b(log2 rho), n = {count}",
                (
                    ("over the hot and the cold strings", moments[1] - moments[0] ** 2),
                    ("the closed form", closed.subs(n, count)),
                ),
            )
        )
    parts += [
        Chain(
            "E_b log2 rho",
            (
                ("derivative at s = 0 of E exp(s log2 rho) = (exp(s)/3 + 2 exp(-s)/3)^n / 2 + 1/2", mean),
                ("simplified", -n / 6),
            ),
        ),
        Chain("E_b (log2 rho)^2", (("second derivative at s = 0", square), ("collected", 4 * n / 9 + n**2 / 18))),
        Chain(
            "Var_b(log2 rho)",
            (
                ("second moment less the squared mean", square.doit() - mean.doit() ** 2),
                ("collected", closed),
                (
                    "mean of the variances plus variance of the means (total variance)",
                    half * n * sp.Rational(8, 9) + (half * (n * third) ** 2 - (half * n * third) ** 2),
                ),
            ),
        ),
        Chain(
            "limit of Var_b(log2 rho)/n^2",
            (("by definition", sp.Limit(closed / n**2, n, sp.oo)), ("so it grows like n^2", sp.Rational(1, 36))),
        ),
    ]
    return Derivation(
        "Var_b(log2 rho) = 4n/9 + n^2/36: the spread grows like n, not like sqrt(n).",
        "a first token with pi = b picks hot or cold, 1/2 each; n more tokens, hot b = (2/3, 1/3) and pi = (1/3, 2/3), "
        "cold pi = b.",
        tuple(parts),
        {f"n = {count}": closed.subs(n, count) for count in (1, 2, 4, 6)},
    )


@about("7.forced")
def forced_drift() -> Derivation:
    """A Gaussian log rho_t of variance sigma^2 t with E rho_t = 1 has mean -sigma^2 t/2."""
    whole = (y, -sp.oo, sp.oo)
    definition = sp.Integral(sp.exp(y) * density(y, mu, ROOT), whole)
    tilted = sp.exp(mu + ROOT**2 / 2) * sp.Integral(density(y, mu + ROOT**2, ROOT), whole)
    mean = sp.exp(mu + ROOT**2 / 2)
    (drift,) = sp.solve(sp.log(mean).expand(force=True), mu)
    return Derivation(
        "E_b rho_t = 1 leaves no choice: the mean of log rho_t is -sigma^2 t/2, and sigma^2 t/2 under pi.",
        "log rho_t normal with variance sigma^2 t under b.",
        (
            Chain(
                "E_b rho_t",
                (
                    ("E exp(y) with y normal of mean mu and variance sigma^2 t", definition),
                    ("complete the square: a normal density of mean mu + sigma^2 t", tilted),
                    ("which integrates to 1", mean),
                ),
            ),
            Solution("mu with E_b rho_t = 1", (mean - 1,), "by solve, from its logarithm", mu, drift),
            Chain("E_b log rho_t", (("the solution", drift), ("simplified", FALL))),
            Chain(
                "density of log rho_t under pi",
                (
                    ("rho_t times that under b", sp.exp(y) * density(y, FALL, ROOT)),
                    ("complete the square: normal with mean +sigma^2 t/2", density(y, -FALL, ROOT)),
                ),
            ),
        ),
        {f"mean at t = {at}, sigma = 0.0335": FALL.subs({sigma: SPREADS[0], t: at}) for at in POSITIONS},
    )


@about("7.forced", "7.drift")
def drift_by_tails() -> Derivation:
    """The fall per token, E[e^x - 1 - x], where (e^x - 1 - x)/x^2 rises through 1/2 at x = 0."""
    x, u = sp.Symbol("x", real=True, nonzero=True), sp.Symbol("u", positive=True)
    quotient = (sp.exp(x) - 1 - x) / x**2
    integral = sp.Integral((1 - u) * sp.exp(u * x), (u, 0, 1))
    slope = sp.Integral((1 - u) * u * sp.exp(u * x), (u, 0, 1))
    r1, r2, b1 = sp.symbols("r_1 r_2 b_1", positive=True)
    b2 = 1 - b1
    excess = b1 * (r1 - 1 - sp.log(r1)) + b2 * (r2 - 1 - sp.log(r2))
    divergence = -b1 * sp.log(r1) - b2 * sp.log(r2)
    v = sp.Symbol("v", positive=True)
    return Derivation(
        "The fall per token is kappa = E_b[e^x - 1 - x], x = log r; (e^x - 1 - x)/x^2 is increasing and 1/2 at 0, so "
        "rare falls give kappa/E x^2 < 1/2 and rare rises more.",
        "E_b r = 1; two token ratios r_1, r_2 for the first identity.",
        (
            Chain(
                "E_b[e^x - 1 - x] - KL(b||pi), two ratios",
                (("by enumeration", excess - divergence), ("collected", b1 * r1 + b2 * r2 - 1)),
            ),
            Chain(
                "(e^x - 1 - x)/x^2",
                (("by definition", quotient), ("as an integral over u in [0, 1]", integral)),
            ),
            Chain(
                "its derivative",
                (("by definition", sp.Derivative(quotient, x)), ("under the integral", slope)),
            ),
            Sign(
                "integrand of the derivative at u = 1/(1+v)",
                sp.factor(((1 - u) * u).subs(u, 1 / (1 + v))) * sp.exp(x / (1 + v)),
                "positive for every u in (0, 1): the quotient increases in x",
            ),
            Chain(
                "limit of (e^x - 1 - x)/x^2 as x -> 0",
                (("by definition", sp.Limit((sp.exp(y) - 1 - y) / y**2, y, 0)), ("by SymPy", sp.Rational(1, 2))),
            ),
        ),
        {
            f"(e^x - 1 - x)/x^2 at x = {at}": ((sp.exp(x) - 1 - x) / x**2).subs(x, at)
            for at in (-sp.Rational(1, 5), -1, -2, -5, -10)
        },
    )


def _rates() -> dict[str, tuple[sp.Expr, sp.Expr, sp.Expr]]:
    """Integral, its argument-shifted form and closed form of every rate, window eps sqrt(t)."""
    z = sp.Symbol("z", real=True)
    low, high = -eps * sp.sqrt(t), eps * sp.sqrt(t)
    standard = density(z, sp.Integer(0), sp.Integer(1))
    below = -eps / sigma + sigma * sp.sqrt(t) / 2
    above = -eps / sigma - sigma * sp.sqrt(t) / 2
    return {
        "low": (
            sp.Integral(density(y, FALL, ROOT), (y, -sp.oo, low)),
            sp.Integral(standard, (z, -sp.oo, below)),
            normal_cdf(below),
        ),
        "high": (
            sp.Integral(density(y, FALL, ROOT), (y, high, sp.oo)),
            sp.Integral(standard, (z, -above, sp.oo)),
            normal_cdf(above),
        ),
        "high under pi": (
            sp.Integral(sp.exp(y) * density(y, FALL, ROOT), (y, high, sp.oo)),
            sp.Integral(density(y, -FALL, ROOT), (y, high, sp.oo)),
            normal_cdf(below),
        ),
    }


def _slope(argument: sp.Expr) -> sp.Expr:
    """Derivative in t of Phi(sigma sqrt(t)/2 + constant), the argument given."""
    return density(argument, sp.Integer(0), sp.Integer(1)) * sigma / (4 * sp.sqrt(t))


@about("7.rates", "7.window")
def clip_rates() -> Derivation:
    """Shares of b-samples below and above a window of +-eps sqrt(t)."""
    found = _rates()
    low, high = found["low"][2], found["high"][2]
    flat = normal_cdf(-eps / sigma)
    numbers = {}
    for spread in SPREADS:
        for at in POSITIONS:
            where = {sigma: spread, t: at}
            numbers[f"low, sigma = {float(spread)}, t = {at}"] = low.subs(where | {eps: LOW})
            numbers[f"high, sigma = {float(spread)}, t = {at}"] = high.subs(where | {eps: HIGH})
    argument = sigma * sp.sqrt(t) / 2
    slope, slope_high = (_slope(argument + side * eps / sigma) for side in (-1, 1))
    standardized = "substitute y = -sigma^2 t/2 + sigma sqrt(t) z"
    return Derivation(
        "Under b a window of +-eps sqrt(t) leaves Phi(-eps/sigma + sigma sqrt(t)/2) below it, which rises to 1, and "
        "Phi(-eps/sigma - sigma sqrt(t)/2) above it, which falls to 0.",
        "log rho_t normal with variance sigma^2 t and E_b rho_t = 1 (mean by forced_drift), window power 1/2.",
        (
            Chain(
                "P_b(log rho_t < -eps sqrt(t))",
                (
                    ("integral of the density", found["low"][0]),
                    (standardized, found["low"][1]),
                    ("in terms of the error function, Phi(-eps/sigma + sigma sqrt(t)/2)", low),
                ),
            ),
            Chain(
                "P_b(log rho_t > eps sqrt(t))",
                (
                    ("integral of the density", found["high"][0]),
                    (standardized, found["high"][1]),
                    ("Phi(-eps/sigma - sigma sqrt(t)/2)", high),
                ),
            ),
            Chain("slope of the low rate in t", (("by definition", sp.Derivative(low, t)), ("collected", slope))),
            Sign("the low rate rises", slope, "at every t"),
            Chain(
                "minus the slope of the high rate in t",
                (("by definition", -sp.Derivative(high, t)), ("collected", slope_high)),
            ),
            Sign("the high rate falls", slope_high, "at every t"),
            Chain(
                "limit of the low rate as t -> oo",
                (("by definition", sp.Limit(low, t, sp.oo)), ("by SymPy", sp.Integer(1))),
            ),
            Chain(
                "limit of the high rate as t -> oo",
                (("by definition", sp.Limit(high, t, sp.oo)), ("by SymPy", sp.Integer(0))),
            ),
            Chain(
                "limit of both as t -> 0, the flat rate without drift",
                (("by definition", sp.Limit(low, t, 0)), ("Phi(-eps/sigma)", flat)),
            ),
        ),
        numbers,
    )


@about("7.pi_mass")
def clipped_target_mass() -> Derivation:
    """Share of pi's mass above the window: E_b[rho_t 1{log rho_t > eps sqrt(t)}]."""
    definition, tilted, mass = _rates()["high under pi"]
    numbers = {
        f"sigma = {float(spread)}, t = {at}": mass.subs({sigma: spread, t: at, eps: HIGH})
        for spread in SPREADS
        for at in POSITIONS
    }
    slope = _slope(sigma * sp.sqrt(t) / 2 - eps / sigma)
    return Derivation(
        "Under pi the window leaves Phi(-eps/sigma + sigma sqrt(t)/2) above it: it rises with t while the logged rate "
        "falls.",
        "log rho_t normal under b with variance sigma^2 t and E_b rho_t = 1, window power 1/2.",
        (
            Chain(
                "E_b[rho_t 1{log rho_t > eps sqrt(t)}]",
                (
                    ("integral over the density under b", definition),
                    ("complete the square: the density under pi, of mean +sigma^2 t/2", tilted),
                    ("Phi(-eps/sigma + sigma sqrt(t)/2)", mass),
                ),
            ),
            Chain("its slope in t", (("by definition", sp.Derivative(mass, t)), ("collected", slope))),
            Sign("it rises", slope, "at every t"),
        ),
        numbers,
    )


@about("7.crossover")
def crossover_times() -> Derivation:
    """t* at which half is clipped, for the power 1/2 and in general."""
    rest = sp.Symbol("c", positive=True)  # 1 - p
    low = _rates()["low"][2]
    mass = _rates()["high under pi"][2]
    (at_half,) = sp.solve(-eps / sigma + sigma * sp.sqrt(t) / 2, t)
    (general,) = sp.solve(kappa * t - eps * t ** (1 - rest), t)
    half = sp.Rational(1, 2)
    numbers = {}
    for spread in SPREADS:
        numbers[f"half of A < 0 clipped, sigma = {float(spread)}"] = at_half.subs({sigma: spread, eps: LOW})
        numbers[f"half of the A > 0 mass clipped, sigma = {float(spread)}"] = at_half.subs({sigma: spread, eps: HIGH})
    return Derivation(
        "Half of the A < 0 tokens are clipped at t* = (2 eps/sigma^2)^2, half of pi's mass above the window at the "
        "same expression in its upper scale; (eps/kappa)^(1/(1-p)) for a window eps t^p.",
        "log rho_t normal with variance sigma^2 t and E_b rho_t = 1; in general a symmetric law around -kappa t.",
        (
            Solution(
                "t* with P_b(log rho_t < -eps sqrt(t)) = 1/2",
                (low - half,),
                "where Phi's argument is 0, by solve",
                t,
                at_half,
            ),
            Solution(
                "t* with E_b[rho_t 1{log rho_t > eps sqrt(t)}] = 1/2",
                (mass - half,),
                "the same argument, eps the upper scale",
                t,
                at_half,
            ),
            Chain("t*", (("the solution", at_half), ("as a square", (2 * eps / sigma**2) ** 2))),
            Solution(
                "t* with kappa t = eps t^p, p = 1 - c",
                (kappa * t - eps * t ** (1 - rest),),
                "by solve: the median -kappa t meets the lower bound",
                t,
                general,
            ),
            Chain(
                "the general t* at p = 1/2, kappa = sigma^2/2",
                (
                    ("by substitution", general.subs({rest: half, kappa: sigma**2 / 2})),
                    ("the one above", (2 * eps / sigma**2) ** 2),
                ),
            ),
        ),
        numbers,
    )


@about("7.power")
def power_windows() -> Derivation:
    """Rates of a window eps t^p, p = 1 - c < 1: the low one tends to 1, the high one to 0; not at p = 1."""
    c, w = sp.symbols("c w", positive=True)
    low = (kappa * t - eps * t ** (1 - c)) / (sigma * sp.sqrt(t))
    high = -(kappa * t + eps * t ** (1 - c)) / (sigma * sp.sqrt(t))
    factored = sp.sqrt(t) * (kappa - eps * t**-c) / sigma
    factored_high = -sp.sqrt(t) * (kappa + eps * t**-c) / sigma
    linear = normal_cdf(sp.sqrt(t) * (kappa - (kappa + w)) / sigma)
    return Derivation(
        "For a window eps t^p with p = 1 - c < 1 the low rate Phi(sqrt(t) (kappa - eps t^-c)/sigma) tends to 1 and the "
        "high rate to 0; with p = 1 and eps > kappa the low rate tends to 0.",
        "log rho_t normal with mean -kappa t, kappa > 0, and variance sigma^2 t.",
        (
            Chain("argument of Phi, low rate", (("(-eps t^p + kappa t)/(sigma sqrt(t))", low), ("factored", factored))),
            Chain(
                "limit of the factor kappa - eps t^-c as t -> oo",
                (("by definition", sp.Limit(kappa - eps * t**-c, t, sp.oo)), ("t^-c -> 0", kappa)),
            ),
            Chain(
                "bound from below, where eps t^-c = kappa/(1 + w) is less than kappa",
                (
                    ("the factor there", kappa - kappa / (1 + w)),
                    ("a positive constant", kappa * w / (1 + w)),
                ),
            ),
            Sign(
                "that constant",
                kappa * w / (1 + w),
                "t^-c falls, so later factors are no smaller: the argument is at least sqrt(t) times a positive "
                "constant",
            ),
            Chain(
                "limit of Phi(sqrt(t) kappa w/((1 + w) sigma))",
                (
                    ("by definition", sp.Limit(normal_cdf(sp.sqrt(t) * kappa * w / ((1 + w) * sigma)), t, sp.oo)),
                    ("so the low rate tends to 1", sp.Integer(1)),
                ),
            ),
            Chain(
                "argument of Phi, high rate",
                (("-(eps t^p + kappa t)/(sigma sqrt(t))", high), ("factored", factored_high)),
            ),
            Chain(
                "limit of Phi(-sqrt(t) kappa/sigma), which is above the high rate",
                (
                    ("by definition", sp.Limit(normal_cdf(-sp.sqrt(t) * kappa / sigma), t, sp.oo)),
                    ("so the high rate tends to 0", sp.Integer(0)),
                ),
            ),
            Chain(
                "limit of the low rate with p = 1, eps = kappa + w",
                (("by definition", sp.Limit(linear, t, sp.oo)), ("by SymPy", sp.Integer(0))),
            ),
        ),
    )


@about("7.centered")
def centered_window() -> Derivation:
    """A window around the drift: no t is left in the rates under b, but in the mass under pi."""
    low, high = FALL - eps * sp.sqrt(t), FALL + eps * sp.sqrt(t)
    flat = normal_cdf(-eps / sigma)
    mass = normal_cdf(sigma * sp.sqrt(t) - eps / sigma)
    numbers = {}
    for spread in SPREADS:
        numbers[f"low, sigma = {float(spread)}"] = flat.subs({sigma: spread, eps: LOW})
        numbers[f"high, sigma = {float(spread)}"] = flat.subs({sigma: spread, eps: HIGH})
    numbers["pi-mass above, sigma = 0.0335, t = 8000"] = mass.subs({sigma: SPREADS[0], eps: HIGH, t: 8000})
    return Derivation(
        "A window centered on -sigma^2 t/2 clips Phi(-eps/sigma) on either side at every t; of pi's mass it takes "
        "Phi(sigma sqrt(t) - eps/sigma) above, which grows.",
        "log rho_t normal with variance sigma^2 t and E_b rho_t = 1, window power 1/2.",
        (
            Chain(
                "P_b(log rho_t < -sigma^2 t/2 - eps sqrt(t))",
                (
                    ("integral of the density", sp.Integral(density(y, FALL, ROOT), (y, -sp.oo, low))),
                    ("no t is left", flat),
                ),
            ),
            Chain(
                "P_b(log rho_t > -sigma^2 t/2 + eps sqrt(t))",
                (
                    ("integral of the density", sp.Integral(density(y, FALL, ROOT), (y, high, sp.oo))),
                    ("no t is left", flat),
                ),
            ),
            Chain(
                "E_b[rho_t 1{log rho_t > -sigma^2 t/2 + eps sqrt(t)}]",
                (
                    (
                        "integral over the density under b",
                        sp.Integral(sp.exp(y) * density(y, FALL, ROOT), (y, high, sp.oo)),
                    ),
                    (
                        "complete the square: the density under pi",
                        sp.Integral(density(y, -FALL, ROOT), (y, high, sp.oo)),
                    ),
                    ("Phi(sigma sqrt(t) - eps/sigma)", mass),
                ),
            ),
        ),
        numbers,
    )
