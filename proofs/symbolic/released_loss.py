"""The released loss: what its second upper bound and its numerical limits take away, in closed form."""

from __future__ import annotations

import sympy as sp

from proofs.symbolic.clip_window import FALL, HIGH, ROOT, SPREADS, eps, sigma, t, y
from proofs.symbolic.derivation import Chain, Derivation, Solution, about
from proofs.symbolic.gaussian import density, normal_cdf


@about("10.dual")
def dual_clip() -> Derivation:
    """What an upper bound for A < 0 removes: gradient examples and the Gaussian shares."""
    b, q = sp.symbols("b q", positive=True)
    # One binary token, R = 1 for token 0: g = a - q, A(1) = -(1 - q), A(0) = q. Only token 1 has r > 1.
    terms = {1: b * (q / b) * (1 - q) * -(1 - q), 0: (1 - b) * ((1 - q) / (1 - b)) * -q * q}
    whole, kept = terms[0] + terms[1], terms[0]
    best, worst, r0, r1, r2 = sp.symbols("x_1 x_0 R_0 R_1 R_2", positive=True)
    other = 1 - worst - best
    chance, rewards = (worst, best, other), (r0, r1, r2)
    value = sp.Add(*(c * r for c, r in zip(chance, rewards, strict=True)))
    scores = (1 - worst, -worst, -worst)
    each = [c * (r - value) * g for c, r, g in zip(chance, rewards, scores, strict=True)]
    at = {
        worst: sp.Rational(2, 100),
        best: sp.Rational(2, 100),
        r0: sp.Rational(1, 4),
        r1: sp.Integer(1),
        r2: sp.Rational(1, 2),
    }
    high = eps * sp.sqrt(t)
    under_b = normal_cdf(-eps / sigma - sigma * sp.sqrt(t) / 2)
    under_pi = normal_cdf(-eps / sigma + sigma * sp.sqrt(t) / 2)
    low_scale = sp.Symbol("epsilon_low", positive=True)
    below = normal_cdf(-low_scale / sigma + sigma * sp.sqrt(t) / 2)
    numbers = {
        "bad token, true and printed": whole.subs(q, sp.Rational(3, 4)),
        "bad token, dual bound": kept.subs(q, sp.Rational(3, 4)),
        "worst of three, true": sp.Add(*each).subs(at),
        "worst of three, printed": (each[0] + each[2]).subs(at),
        "worst of three, dual bound": each[2].subs(at),
    }
    numbers |= {
        f"clipped under b, sigma = {float(spread)}, t = {position}": (below / 2 + under_b).subs(
            {sigma: spread, t: position, eps: HIGH, low_scale: HIGH / 2}
        )
        for spread in SPREADS
        for position in (100, 1000, 4000, 8000)
    }
    return Derivation(
        "With the dual bound equal to the upper bound the tokens with A < 0 above it lose their gradient: of pi's mass "
        "as much as the upper bound takes from A > 0, Phi(-eps/sigma + sigma sqrt(t)/2).",
        "examples of one token, exact A^pi, r > 1 above the bound; shares for log rho_t normal, variance sigma^2 t, "
        "E_b rho_t = 1 and a sign of A that does not depend on rho_t.",
        (
            Chain(
                "gradient of a bad token's logit, R = 1 for the other, q > b",
                (("E_b[r g A] over both tokens", whole), ("true and printed", -q * (1 - q))),
            ),
            Chain(
                "the same without the bad token's own term, which is above the dual bound",
                (("the other token's term", kept), ("only the share q of it is left", q * -q * (1 - q))),
            ),
            Chain(
                "worst of three tokens, no clip",
                (("E_b[r g A] = sum of pi g A", sp.Add(*each)), ("collected", worst * (r0 - value))),
            ),
            Chain(
                "worst of three tokens, the best one above the window, the worst one above the dual bound",
                (("the third token's term", each[2]), ("collected", -worst * other * (r2 - value))),
            ),
            Chain(
                "E_b[rho_t 1{log rho_t > eps sqrt(t)}]",
                (
                    (
                        "the same integral for A > 0 and for A < 0",
                        sp.Integral(sp.exp(y) * density(y, FALL, ROOT), (y, high, sp.oo)),
                    ),
                    (
                        "complete the square: the density under pi, of mean +sigma^2 t/2",
                        sp.Integral(density(y, -FALL, ROOT), (y, high, sp.oo)),
                    ),
                    ("share of pi's mass removed on either sign", under_pi),
                ),
            ),
        ),
        numbers,
    )


@about("10.limits")
def numerical_limits() -> Derivation:
    """What a limit on log rho_t and a clamp per token leave of a bad token's gradient."""
    c, q = sp.symbols("c q", positive=True)
    b = sp.Symbol("b", positive=True)
    limit = sp.Symbol("L", positive=True)
    # R = 1 for token 0; token 1, the bad one, has b(1) = b, pi(1) = q.
    other = (1 - b) * ((1 - q) / (1 - b)) * -q * q
    bad = b * (q / b) * (1 - q) * -(1 - q)
    clamped = b * sp.exp(c) * (1 - q) * -(1 - q)
    half = sp.Rational(1, 2)
    (reached,) = sp.solve(eps * sp.sqrt(t) - limit, t)
    first, second = sp.symbols("l_1 l_2", real=True)
    return Derivation(
        "Above the limit a bad token's own term is gone, above the clamp it keeps b e^c instead of q of it; a window "
        "eps sqrt(t) reaches the limit L at t = (L/eps)^2.",
        "one binary token, R = 1 for token 0, exact A^pi; b(1) = b and pi(1) = q with q/b above the limit or the clamp "
        "e^c.",
        (
            Chain(
                "gradient of the bad token's logit",
                (("E_b[r g A] over both tokens", bad + other), ("collected", -q * (1 - q))),
            ),
            Chain(
                "the same where log(q/b) is above the limit: weight 0",
                (("the other token's term", other), ("collected", -(q**2) * (1 - q))),
            ),
            Chain(
                "the same where log(q/b) is above the clamp c: weight e^c",
                (("both terms", clamped + other), ("collected", -(1 - q) * (b * sp.exp(c) * (1 - q) + q**2))),
            ),
            Chain(
                "weight of the second token after log-ratios l_1 > c and -c < l_2 < c",
                (
                    ("exp of the clamped sum", sp.exp(c + second)),
                    ("wrong by the factor e^(c - l_1)", sp.exp(first + second) * sp.exp(c - first)),
                ),
            ),
            Solution("t at which the window reaches the limit", (eps * sp.sqrt(t) - limit,), "by solve", t, reached),
        ),
        {
            "grad J, q = 1/2": -q.subs(q, half) / 2,
            "limit of 10, b = 2^-16": other.subs(q, half),
            "clamp of 20, b = 2^-31": (clamped + other).subs({q: half, c: 20, b: sp.Rational(1, 2**31)}),
            "t where the released window reaches 10": reached.subs({eps: HIGH, limit: 10}),
            "weight after (25, -15), clamp 20": sp.exp(c + second).subs({c: 20, second: -15}),
            "right weight after (25, -15)": sp.exp(first + second).subs({first: 25, second: -15}),
        },
    )
