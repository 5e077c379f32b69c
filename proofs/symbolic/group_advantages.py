"""Group baselines, division by the group's standard deviation, and division by length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import sympy as sp

from proofs.symbolic.derivation import Chain, Derivation, Sign, Solution, about

p = sp.Symbol("p", positive=True)
HALF = sp.Rational(1, 2)
#: Mean of R Y, of R and of Y for one response; Y = sum_t w_t g_t.
M, MEAN_R, MEAN_Y = sp.symbols("m r y", real=True)


def over_groups(
    size: int,
    chance: Sequence[sp.Expr],
    advantages: Callable[[tuple[int, ...]], Sequence[sp.Expr]],
    y: Sequence[sp.Expr],
) -> sp.Expr:
    """E[(1/G) sum_i A_i Y_i] over all groups of independent responses of finitely many kinds.

    Args:
        size: G.
        chance: Probability of each kind.
        advantages: From the kinds of a group's members to their advantages.
        y: Y of each kind.
    """
    terms = []
    for kinds in product(range(len(chance)), repeat=size):
        members = sp.Add(*(a * y[k] for a, k in zip(advantages(kinds), kinds, strict=True)))
        terms.append(sp.Mul(*(chance[k] for k in kinds)) * members / size)
    return sp.Add(*terms)


def _bandit_chain(name: str, size: int, own: bool, factor: sp.Expr) -> Chain:
    """A binary reward and a binary token, on-policy: every group of one size."""

    def advantages(kinds: tuple[int, ...]) -> list[sp.Expr]:
        total = sum(kinds)
        return [k - (sp.Rational(total, size) if own else sp.Rational(total - k, size - 1)) for k in kinds]

    definition = over_groups(size, (1 - p, p), advantages, (-p, 1 - p))
    return Chain(
        f"{name}, R = a, on-policy, G = {size}",
        (
            (f"over all {2**size} groups", definition),
            ("(1 - 1/G) p (1 - p)" if own else "p (1 - p)", factor * p * (1 - p)),
        ),
    )


@about("6.mean", "6.baseline_off_policy")
def group_mean() -> Derivation:
    """Subtracting the mean of the group, oneself included: the factor 1 - 1/G for every G."""
    size = sp.Symbol("G", integer=True, positive=True)
    j = sp.Symbol("j", integer=True, positive=True)
    same = sp.KroneckerDelta(1, j)
    definition = M - sp.Sum(same * M + (1 - same) * MEAN_R * MEAN_Y, (j, 1, size)) / size
    split = M - (M + (size - 1) * MEAN_R * MEAN_Y) / size
    end = (1 - 1 / size) * (M - MEAN_R * MEAN_Y)
    b, q, shift = sp.symbols("b q s", positive=True)
    # One binary token without any weight: Y = a - q under b, R = s + a.
    free, raw = b * (1 - q) - (1 - b) * q, b * (1 - q) * (1 + shift) - (1 - b) * q * shift
    true = q * (1 - q)
    at = {b: HALF, q: sp.Rational(3, 4)}
    moved = raw - (shift + b) * free
    numbers = {f"R = a, p = 1/2, G = {g}": (end.subs({size: g, MEAN_Y: 0, M: sp.Rational(1, 4)})) for g in (2, 4, 8)}
    numbers |= {
        f"no weight, R = {s} + a, {name}": value.subs(at | {shift: s})
        for s in (0, 1)
        for name, value in (("true", true), ("raw", raw), ("leave-one-out", moved))
    }
    return Derivation(
        "E[(1/G) sum_i (R_i - mean_j R_j) Y_i] = (1 - 1/G)(E[R Y] - E[R] E[Y]): the factor 1 - 1/G where E[Y] = 0, and "
        "E[R] E[Y] is lost where it is not.",
        "independent responses, Y_i = sum_t w_t g_t of response i; m = E[R Y], r = E[R], y = E[Y]; y = 0 on-policy "
        "and under r_t, rho_t and rho_H.",
        (
            Chain(
                "E[(R_1 - mean_j R_j) Y_1]",
                (
                    ("by independence E[R_j Y_1] is m for j = 1 and r y for others", definition),
                    ("one term of the first kind, G - 1 of the other", split),
                    ("collected", end),
                ),
                (sp.Ge(size, 1),),
            ),
            Chain(
                "the same with E[Y] = 0",
                (("by substitution", end.subs(MEAN_Y, 0)), ("the factor 1 - 1/G", (1 - 1 / size) * M)),
            ),
            *(_bandit_chain("E[(R_i - mean) Y_i]", g, True, 1 - sp.Rational(1, g)) for g in (2, 3, 4)),
            Chain(
                "E_b[Y] without weight, one binary token, b(1) = b, pi(1) = q",
                (("over both tokens", free), ("not 0 off-policy", b - q)),
            ),
            Chain(
                "E_b[R Y] - E_b[R] E_b[Y], R = s + a",
                (("raw less what the baseline takes", moved), ("the constant s is gone", b * (1 - b))),
            ),
        ),
        numbers,
    )


@about("6.leave_one_out", "6.baseline_off_policy")
def leave_one_out() -> Derivation:
    """Subtracting the mean of the others: no factor, for every G."""
    size = sp.Symbol("G", integer=True, positive=True)
    j = sp.Symbol("j", integer=True, positive=True)
    definition = M - sp.Sum(MEAN_R * MEAN_Y, (j, 2, size)) / (size - 1)
    end = M - MEAN_R * MEAN_Y
    return Derivation(
        "E[(R_1 - mean of the others) Y_1] = E[R Y] - E[R] E[Y]: the raw-reward expectation where E[Y] = 0.",
        "G >= 2 independent responses, Y_i = sum_t w_t g_t of response i; m = E[R Y], r = E[R], y = E[Y].",
        (
            Chain(
                "E[(R_1 - mean_{j > 1} R_j) Y_1]",
                (("by independence E[R_j Y_1] = r y for all others", definition), ("G - 1 equal terms", end)),
            ),
            Chain("the same with E[Y] = 0", (("by substitution", end.subs(MEAN_Y, 0)), ("raw", M))),
            *(_bandit_chain("E[(R_i - mean of the others) Y_i]", g, False, sp.Integer(1)) for g in (2, 3, 4)),
        ),
    )


def std_factor(size: int, ddof: int, rate: sp.Expr) -> sp.Expr:
    """c_G(p) = sqrt((G - ddof)/G) E[sqrt(K/G (1 - K/G))] / (p (1 - p)), K binomial, with the quotient carried out."""
    terms = (
        sp.binomial(size, k) * rate ** (k - 1) * (1 - rate) ** (size - k - 1) * sp.sqrt(k * (size - k)) / size
        for k in range(1, size)
    )
    return sp.sqrt(sp.Rational(size - ddof, size)) * sp.Add(*terms)


@about("6.std_binary")
def std_scale() -> Derivation:
    """Binary rewards divided by the group's standard deviation: the gradient times c_G(p)."""
    u = sp.Symbol("u", real=True)
    k, left = sp.symbols("k l", positive=True)
    delta = sp.Symbol("delta", real=True)
    failure = -p * u / (1 - p)  # E[Y | R = 0], as p u + (1 - p) E[Y | R = 0] = E[Y] = 0
    size = k + left
    v = sp.Symbol("v", real=True)
    population = (k * (1 - k / size) ** 2 + left * (k / size) ** 2) / size
    spread = sp.sqrt(k * left) / size
    parts: list[Chain | Solution | Sign] = [
        Chain(
            "population variance of k ones and l zeros, G = k + l",
            (("mean squared distance from the mean k/G", population), ("collected", spread**2)),
        ),
        Chain(
            "(1/G) sum_i A_i E[Y_i | R_i] for k ones and l zeros, any G",
            (
                (
                    "A = (1 - k/G)/s and -(k/G)/s, s = spread sqrt(G/(G - delta)); E[Y | R = 1] = u, E[Y | R = 0] = v",
                    (k * (1 - k / size) * u - left * (k / size) * v) / size / spread * sp.sqrt((size - delta) / size),
                ),
                ("collected", sp.sqrt((size - delta) / size) * spread * (u - v)),
            ),
        ),
        Chain(
            "u - v where E[Y] = p u + (1 - p) v = 0",
            (("by substitution of v", u - failure), ("so the sum over K is c_G(p) times p u = E[R Y]", u / (1 - p))),
        ),
    ]
    numbers: dict[str, sp.Expr] = {}
    for group in (2, 4, 8):
        for ddof in (0, 1):
            # Population std 0, sample std 1; groups of equal rewards have A = 0.
            def advantages(kinds: tuple[int, ...], group: int = group, ddof: int = ddof) -> list[sp.Expr]:
                mean = sp.Rational(sum(kinds), group)
                variance = sum((kind - mean) ** 2 for kind in kinds) / (group - ddof)
                return [(kind - mean) / sp.sqrt(variance) if variance else sp.Integer(0) for kind in kinds]

            definition = over_groups(group, (1 - p, p), advantages, (failure, u))
            scale = std_factor(group, ddof, p)
            parts.append(
                Chain(
                    f"E[(1/G) sum_i A_i Y_i], G = {group}, {'sample' if ddof else 'population'} std",
                    ((f"over all {2**group} groups", definition), ("c_G(p) E[R Y]", scale * p * u)),
                )
            )
    parts.append(
        Chain(
            "c_2(p), population std",
            (("sum over K = 1", std_factor(2, 0, p)), ("exactly 1: A = +-1 for unequal pairs", sp.Integer(1))),
        )
    )
    for rate in (sp.Rational(1, 100), sp.Rational(1, 4), HALF):
        numbers[f"c_8, sample std, p = {rate}"] = sp.nsimplify(std_factor(8, 1, rate))
    for rate in (sp.Rational(1, 100), sp.Rational(1, 20), sp.Rational(1, 8), sp.Rational(1, 4), HALF):
        numbers[f"share of groups of 8 with equal rewards, p = {rate}"] = rate**8 + (1 - rate) ** 8
    return Derivation(
        "With 0/1 rewards the expected std-normalized estimator is c_G(p) E[R Y], c_G(p) = sqrt((G - ddof)/G) "
        "E[sqrt(K/G (1 - K/G))]/(p (1 - p)) with K binomial; 1 for pairs with the population std.",
        "independent responses with P(R = 1) = p and E[Y] = 0, Y = sum_t w_t g_t; A = 0 in groups of equal rewards.",
        tuple(parts),
        numbers,
    )


@about("6.std_sign")
def std_sign() -> Derivation:
    """Three reward levels in pairs with the population standard deviation."""
    first, second, low, middle, high = sp.symbols("alpha beta R_1 R_2 R_3", positive=True)
    third = 1 - first - second
    chance, rewards = (first, second, third), (low, middle, high)
    mean = sp.Add(*(c * r for c, r in zip(chance, rewards, strict=True)))
    score = (-second, 1 - second, -second)
    true = sp.Add(*(c * r * g for c, r, g in zip(chance, rewards, score, strict=True)))

    def signs(kinds: tuple[int, ...]) -> list[sp.Expr]:
        # R_1 < R_2 < R_3: (R_i - R_j)/2 over |R_i - R_j|/2 is the sign of i - j.
        return [sp.sign(sp.Integer(kinds[0] - kinds[1])), sp.sign(sp.Integer(kinds[1] - kinds[0]))]

    definition = over_groups(2, chance, signs, score)
    at = {first: HALF, second: sp.Rational(1, 4), low: 0, middle: 1}
    x, y = sp.symbols("x y", positive=True)
    pair_mean = (x + y) / 2
    return Derivation(
        "Pairs divided by their population standard deviation ascend P(R_i > R_j) - P(R_i < R_j): second logit "
        "beta (alpha - (1 - alpha - beta)) whatever the rewards, against beta (R_2 - E[R]).",
        "one token of three with probabilities alpha, beta, 1 - alpha - beta and rewards R_1 < R_2 < R_3, G = 2.",
        (
            Chain("gradient of the second logit", (("E[R g]", true), ("collected", second * (middle - mean)))),
            Chain(
                "population variance of a pair",
                (
                    ("mean squared distance from the mean", ((x - pair_mean) ** 2 + (y - pair_mean) ** 2) / 2),
                    ("so A = sign of R_i - R_j", ((x - y) / 2) ** 2),
                ),
            ),
            Chain(
                "E[(A_1 g_1 + A_2 g_2)/2]",
                (("over all 9 pairs", definition), ("collected", second * (first - third))),
            ),
        ),
        {
            "true, rewards 0, 1, 10": true.subs(at | {high: 10}),
            "normalized, rewards 0, 1, 10": definition.subs(at),
            "true, rewards 0, 1, 4": true.subs(at | {high: 4}),
            "normalized, rewards 0, 1, 4": definition.subs(at),
        },
    )


@about("6.length")
def length_baseline() -> Derivation:
    """Stop or go on: grad E[(R - c)/T] depends on c."""
    stop, go, c = sp.symbols("R_s R_g c", real=True)
    # T = 1 and score -p for stopping, T = 2 and 1 - p for going on; the last token has no choice.
    true = p * go * (1 - p) + (1 - p) * stop * -p
    divided = p * (go - c) / 2 * (1 - p) + (1 - p) * (stop - c) * -p
    free = p * (1 - p) / 2 + (1 - p) * -p
    (neutral,) = sp.solve(divided - true, c)
    (zero,) = sp.solve(divided, c)
    at = {p: HALF, stop: sp.Rational(3, 4), go: sp.Integer(1)}
    closed = p * (1 - p) * (go / 2 - stop + c / 2)
    return Derivation(
        "Divided by the length, stop-or-go has the gradient p (1 - p)(R_g/2 - R_s + c/2) instead of "
        "p (1 - p)(R_g - R_s): the baseline c sets its sign.",
        "stop with R_s after one token, or go on for one more with probability p and R_g; logit to go on, on-policy.",
        (
            Chain("grad J", (("E[R g]", true), ("collected", p * (1 - p) * (go - stop)))),
            Chain("E[(1/T)(R - c) g]", (("over both responses", divided), ("collected", closed))),
            Chain("E[(1/T) g]", (("over both responses", free), ("not 0, so c matters", -p * (1 - p) / 2))),
            Solution("c at which the gradient vanishes", (divided,), "by solve", c, zero),
            Solution("c at which it is right", (divided - true,), "by solve", c, neutral),
        ),
        {
            "grad J": true.subs(at),
            "c = 0": divided.subs(at | {c: 0}),
            "c = 1/2": divided.subs(at | {c: HALF}),
            "c = 7/8": divided.subs(at | {c: sp.Rational(7, 8)}),
            "E[(1/T) g]": free.subs(at),
            "all wrong, c = 1/2": divided.subs({p: HALF, stop: 0, go: 0, c: HALF}),
        },
    )


@about("6.token_mean")
def token_mean() -> Derivation:
    """The ratio estimator sum Y / sum T of stop-or-go in batches of n, and its limit 1/24."""
    n = sp.Symbol("n", integer=True, positive=True)
    u = sp.Symbol("u", positive=True)
    power = (u + u**2) / 2  # E u^T
    first = (sp.Rational(-3, 8) * u + HALF * u**2) / 2  # E[Y u^T]
    rest = 4 * power**n / (1 + 2 * u) ** 2
    primitive = 2 * power**n / (1 + 2 * u)
    bound = sp.Integral(4 * u**n, (u, 0, 1))
    parts: list[Chain | Solution | Sign] = []
    numbers: dict[str, sp.Expr] = {}
    for size in (1, 2, 3, 4, 6):
        # K of n responses go on: sum Y = K/2 - 3 (n - K)/8, sum T = n + K.
        definition = sp.Add(
            *(
                sp.binomial(size, k) * HALF**size * (HALF * k - sp.Rational(3, 8) * (size - k)) / (size + k)
                for k in range(size + 1)
            )
        )
        integral = sp.Integral(size * first / u * power ** (size - 1), (u, 0, 1))
        parts.append(
            Chain(
                f"E[sum Y / sum T], n = {size}",
                (
                    ("over the number of responses that go on", definition),
                    ("1/T = integral of u^(T - 1) over [0, 1], with n independent responses", integral),
                ),
            )
        )
        numbers[f"n = {size}"] = definition
    factor = sp.expand(first / u)
    parts += [
        Chain(
            "n E[Y u^T]/u (E u^T)^(n - 1)",
            (
                ("integrand", n * factor * power ** (n - 1)),
                (
                    "a derivative and a rest",
                    sp.diff(power**n, u) / 4 - sp.Rational(5, 16) * n * power ** (n - 1),
                ),
            ),
        ),
        Chain(
            "n (E u^T)^(n - 1)",
            (
                ("the rest", n * power ** (n - 1)),
                ("by parts: a derivative and a small rest", sp.diff(primitive, u) + rest),
            ),
        ),
        Chain(
            "integral of the derivatives over [0, 1]",
            (
                (
                    "their values at 1, as all vanish at 0",
                    (power**n).subs(u, 1) / 4 - sp.Rational(5, 16) * primitive.subs(u, 1),
                ),
                ("the limit grad J/E[T] = (1/16)/(3/2)", sp.Rational(1, 24)),
            ),
        ),
        Sign(
            "u - (u + u^2)/2 at u = 1/(1+v)",
            sp.factor((u - power).subs(u, 1 / (1 + sp.Symbol("v", positive=True)))),
            "so 0 < (E u^T)^n <= u^n, and the rest 4 (E u^T)^n/(1 + 2 u)^2 is between 0 and 4 u^n",
        ),
        Chain("bound of the rest's integral", (("integral of 4 u^n", bound), ("by SymPy", 4 / (n + 1)))),
        Chain(
            "limit of the bound",
            (
                ("by definition", sp.Limit(4 / (n + 1), n, sp.oo)),
                ("so E[sum Y / sum T] = 1/24 - (5/16) J_n with 0 <= J_n <= 4/(n + 1)", sp.Integer(0)),
            ),
        ),
    ]
    numbers["limit"] = sp.Rational(1, 24)
    return Derivation(
        "E[sum Y / sum T] = 1/24 - (5/16) J_n with 0 <= J_n <= 4/(n + 1): negative for n = 1, 2 and tending to "
        "grad J / E[T] = 1/24.",
        "n independent responses: stop (R = 3/4, Y = -3/8, T = 1) or go on (R = 1, Y = 1/2, T = 2), 1/2 each.",
        tuple(parts),
        numbers,
    )
