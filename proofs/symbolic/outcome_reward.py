"""Outcome rewards under prefix weights: bias, its first order, variances and the batch size at which they cross."""

from __future__ import annotations

from collections.abc import Callable

import sympy as sp

from proofs.symbolic.derivation import Chain, Derivation, Sign, Solution, about
from proofs.symbolic.strings import String, Strings, memoryless

b, p, q = sp.symbols("b p q", positive=True)
HALF = sp.Rational(1, 2)


def _root(world: Strings, s: String, t: int) -> sp.Expr:
    """Geometric mean of the first t token ratios, rho_t^(1/t)."""
    return sp.Mul(*(world.ratio(s, k) ** sp.Rational(1, t) for k in range(1, t + 1)))


#: (strings, string, t) -> weight of token t.
Weight = Callable[[Strings, String, int], sp.Expr]
WEIGHTS: dict[str, Weight] = {
    "rho_t": lambda world, s, t: world.rho(s, t),
    "r_t": lambda world, s, t: world.ratio(s, t),
    "rho_H": lambda world, s, t: world.rho(s, world.horizon),
    # Roots of the factors, which are positive: SymPy does not know that 1 - q is.
    "GSPO": lambda world, s, t: _root(world, s, world.horizon),
    "rho_t^(1/t)": lambda world, s, t: _root(world, s, t),
    "none": lambda world, s, t: sp.Integer(1),
}


def all_ones(horizon: int, behavior: sp.Expr, target: sp.Expr) -> Strings:
    """Independent tokens and a reward of 1 where all are ones."""
    return Strings(
        horizon,
        memoryless(*[behavior] * horizon),
        memoryless(*[target] * horizon),
        lambda s: sp.Integer(int(all(s))),
    )


def any_reward(horizon: int, behavior: sp.Expr, target: sp.Expr) -> tuple[Strings, dict[String, sp.Symbol]]:
    """Independent tokens and a symbol for the reward of every string."""
    bare = all_ones(horizon, behavior, target)
    rewards = {s: sp.Symbol("R_" + "".join(map(str, s)), real=True) for s in bare.all()}
    return Strings(horizon, bare.b, bare.pi, lambda s: rewards[s]), rewards


def summed(world: Strings, weight: Weight, advantage: Callable[[String, int], sp.Expr]) -> Callable[[String], sp.Expr]:
    """The statistic sum_t w_t g_t A_t on one shared logit."""
    return world.total(lambda s, t: weight(world, s, t) * world.score(s, t) * advantage(s, t))


def moments(world: Strings, statistic: Callable[[String], sp.Expr]) -> tuple[sp.Expr, sp.Expr]:
    """Mean and variance under b, as sums over strings."""
    mean = world.expectation(statistic)
    return mean, world.expectation(lambda s: statistic(s) ** 2) - mean**2


# --- what the weights estimate --------------------------------------------------------------------------------------


@about("3.table", "3.token", "3.gspo")
def ratio_table() -> Derivation:
    """Mean gradient of R = a1 a2 on one shared logit under six weights, with A^pi and with the reward."""
    u, v = sp.symbols("u v", positive=True)
    world = all_ones(2, b, q)
    by_odds = all_ones(2, 1 / (1 + u**2), 1 / (1 + v**2))
    true, mixed, token = 2 * q**2 * (1 - q), q * (1 - q) * (b + q), 2 * b * q * (1 - q)
    closed: dict[tuple[str, str], sp.Expr] = {
        ("rho_t", "A^pi"): true,
        ("rho_t", "R"): mixed,
        ("r_t", "A^pi"): mixed,
        ("r_t", "R"): token,
        ("rho_H", "A^pi"): true,
        ("rho_H", "R"): true,
        ("GSPO", "R"): token,
        ("rho_t^(1/t)", "R"): token,
        ("none", "A^pi"): (b + q) * (b * (1 - q) + q * (q - b)),
        ("none", "R"): 2 * b**2 * (1 - q),
    }
    at = {b: sp.Rational(1, 5), q: sp.Rational(4, 5), u: sp.Integer(2), v: sp.Rational(1, 2)}
    parts = [Chain("grad J", (("E_pi[R sum_t g_t] over the four strings", world.gradient()), ("collected", true)))]
    numbers = {"grad J": true.subs(at)}
    for name, weight in WEIGHTS.items():
        for label in ("A^pi", "R"):
            here = world if (name, label) in closed else by_odds

            def advantage(s: String, t: int, label: str = label, here: Strings = here) -> sp.Expr:
                return here.advantage("target", s, t) if label == "A^pi" else here.reward(s)

            mean = here.expectation(summed(here, weight, advantage))
            end = closed.get((name, label), sp.factor(sp.powdenest(mean.doit(), force=False)))
            how = "" if here is world else ", where b = 1/(1 + u^2) and q = 1/(1 + v^2) make the roots rational"
            parts.append(
                Chain(
                    f"weight {name} with {label}",
                    ((f"E_b[sum_t w_t g_t {label}] over the four strings{how}", mean), ("collected", end)),
                )
            )
            numbers[parts[-1].quantity] = end.subs(at)
    return Derivation(
        "Mean gradients in closed form: rho_t is exact with A^pi, rho_H always; the others are biased.",
        "two independent binary tokens, b(1) = b, pi(1) = q, R = a1 a2, one shared logit; numbers at b = 1/5, q = 4/5.",
        tuple(parts),
        numbers,
    )


@about("4.unbiased", "4.expectation")
def outcome_sign() -> Derivation:
    """First logit's mean under rho_t with an outcome reward: the second token's law is that of b."""
    first, qb = sp.symbols("f q_b", positive=True)
    rewards: dict[str, Callable[[String], sp.Expr]] = {
        "a1 a2": lambda s: sp.Integer(s[0] * s[1]),
        "1{a1 = a2}": lambda s: sp.Integer(int(s[0] == s[1])),
    }
    closed = {"a1 a2": lambda second: p * (1 - p) * second, "1{a1 = a2}": lambda second: p * (1 - p) * (2 * second - 1)}
    parts: list[Chain] = []
    for name, reward in rewards.items():
        world = Strings(2, memoryless(first, qb), memoryless(p, q), reward)

        def term(s: String, reward: Callable[[String], sp.Expr] = reward, world: Strings = world) -> sp.Expr:
            return reward(s) * world.score(s, 1)

        true = world.expectation(term, "target")
        prefix = world.expectation(world.reweighted(term, 1))
        parts += [
            Chain(
                f"true gradient, R = {name}",
                (("E_pi[g_1 R] over the four strings", true), ("collected", closed[name](q))),
            ),
            Chain(
                f"under rho_t, R = {name}",
                (
                    ("E_b[rho_1 g_1 R] over the four strings", prefix),
                    ("collected: q_b in place of q", closed[name](qb)),
                ),
            ),
        ]
    three, quarter = sp.Rational(3, 4), sp.Rational(1, 4)
    both, equal = {p: three, q: three, qb: HALF}, {p: HALF, q: three, qb: quarter}
    numbers = {
        f"{part.quantity}, first logit": part.result.subs(both if "a1 a2" in part.quantity else equal) for part in parts
    }
    return Derivation(
        "With an outcome reward rho_t leaves the second token to b: R = a1 a2 is underestimated, R = 1{a1 = a2} has "
        "the wrong sign where q and q_b lie on either side of 1/2.",
        "two independent binary tokens, pi(1) = p then q, b(1) = f then q_b, first token's logit.",
        tuple(parts),
        numbers,
    )


@about("4.variance")
def outcome_term_variance() -> Derivation:
    """Variance of the first token's term under the cumulative and the sequence ratio, with an outcome reward."""
    qb = sp.Symbol("q_b", positive=True)
    world = Strings(2, memoryless(p, qb), memoryless(p, q), lambda s: sp.Integer(s[0] * s[1]))

    def term(s: String) -> sp.Expr:
        return world.score(s, 1) * world.reward(s)

    found = {name: moments(world, world.reweighted(term, t))[1] for name, t in (("rho_1", 1), ("rho_2", 2))}
    closed = {
        "rho_1": p * (1 - p) ** 2 * qb * (1 - p * qb),
        "rho_2": p * (1 - p) ** 2 * q**2 * (1 - p * qb) / qb,
    }
    difference = p * (1 - p) ** 2 * (1 - p * qb) * (q - qb) * (q + qb) / qb
    parts = [
        Chain(
            f"Var({name} g_1 R)",
            ((f"E_b[({name} g_1 R)^2] - E_b[{name} g_1 R]^2 over the four strings", found[name]), ("collected", end)),
        )
        for name, end in closed.items()
    ]
    parts.append(
        Chain(
            "Var(rho_2 g_1 R) - Var(rho_1 g_1 R)",
            (("difference", closed["rho_2"] - closed["rho_1"]), ("factored: the sign of q - q_b", difference)),
        )
    )
    numbers = {
        f"Var({name} g_1 R) at pi = {rate}": closed[name].subs({p: HALF, qb: HALF, q: rate})
        for rate in (sp.Rational(1, 4), HALF, sp.Rational(3, 4))
        for name in closed
    }
    return Derivation(
        "With an outcome reward the first token's term varies more under rho_1 than under rho_2 where q < q_b.",
        "R = a1 a2, first token alike under both policies, pi(1) = b(1) = p, second pi(1) = q, b(1) = q_b.",
        tuple(parts),
        numbers,
    )


# --- 4.first_order --------------------------------------------------------------------------------------------------


def _first_order_parts(horizon: int, c: sp.Symbol) -> list[Chain]:
    """Slope of the bias in one shared logit at pi = b, for any reward of the strings."""
    world, _ = any_reward(horizon, b, q)
    here = any_reward(horizon, b, b)[0]

    def reward(s: String) -> sp.Expr:
        return world.reward(s) - c

    past = here.expectation(
        lambda s: (
            reward(s) * sum(here.score(s, k) * here.score(s, t) for t in range(1, horizon + 1) for k in range(1, t))
        )
    )
    own = here.expectation(lambda s: reward(s) * sum(here.score(s, t) ** 2 for t in range(1, horizon + 1)))
    s1, diagonal = past.doit(), own.doit()
    law = {
        ("rho_t", "R"): ("-S1", -s1),
        ("r_t", "R"): ("-2 S1", -2 * s1),
        ("rho_H", "R"): ("0", sp.Integer(0)),
        ("GSPO", "R"): ("-(1 - 1/H)(2 S1 + D)", -(1 - sp.Rational(1, horizon)) * (2 * s1 + diagonal)),
        ("none", "R"): ("-(2 S1 + D)", -(2 * s1 + diagonal)),
        ("r_t", "A^pi"): ("-S1", -s1),
        ("rho_t", "A^pi"): ("0", sp.Integer(0)),
    }
    true = world.gradient()
    parts = []
    for (name, label), (words, value) in law.items():

        def advantage(s: String, t: int, label: str = label) -> sp.Expr:
            return world.advantage("target", s, t) if label == "A^pi" else reward(s)

        bias = world.expectation(summed(world, WEIGHTS[name], advantage)) - true
        slope = (q * (1 - q) * sp.diff(bias.doit(), q)).subs(q, b)
        parts.append(
            Chain(
                f"slope of the bias at pi = b, weight {name} with {label}, H = {horizon}",
                (("d bias/d logit = q (1 - q) d bias/dq at q = b, over all strings", slope), (words, value)),
            )
        )
    return parts


@about("4.first_order")
def first_order_half() -> Derivation:
    """Bias near b along one shared logit: laws for any reward, and exactly a half for R = a1 a2."""
    c = sp.Symbol("c", real=True)
    parts = [part for horizon in (2, 3) for part in _first_order_parts(horizon, c)]
    world = all_ones(2, b, q)
    biases = {
        name: world.expectation(summed(world, WEIGHTS[name], lambda s, t: world.reward(s))) - world.gradient()
        for name in ("rho_t", "r_t")
    }
    closed = {"rho_t": -q * (1 - q) * (q - b), "r_t": -2 * q * (1 - q) * (q - b)}
    at = {b: HALF, q: sp.Rational(3, 4)}
    numbers = {}
    for name, bias in biases.items():
        parts.append(
            Chain(
                f"bias of {name}, R = a1 a2, pi not near b",
                (("E_b - E_pi over the four strings", bias), ("collected", closed[name])),
            )
        )
        numbers[f"bias of {name}, b = 1/2, q = 3/4"] = closed[name].subs(at)
    return Derivation(
        "To first order the bias along the step is -S1 for rho_t, -2 S1 for r_t and -(1 - 1/H)(2 S1 + D) for GSPO; "
        "with R = a1 a2 that of rho_t is exactly half of that of r_t at any distance.",
        "independent binary tokens with one shared logit, any reward R of the string less a constant c, H = 2 and 3; "
        "S1 = sum_{k<t} E_b[x_k x_t (R - c)], D = sum_t E_b[x_t^2 (R - c)].",
        tuple(parts),
        numbers,
    )


# --- 4.crossover ----------------------------------------------------------------------------------------------------


def _equal_errors(bias: sp.Expr, prefix: sp.Expr, full: sp.Expr) -> tuple[sp.Symbol, sp.Expr]:
    """The batch size n with bias^2 + Var_prefix/n = Var_full/n."""
    n = sp.Symbol("n")
    (solution,) = sp.solve(bias**2 + prefix / n - full / n, n)
    return n, solution


@about("4.crossover")
def crossover_batch() -> Derivation:
    """n* of R = a1 a2, first logit: 3 (q + 1/2)/(q - 1/2) at b = 1/2."""
    world = all_ones(2, b, q)

    def term(s: String) -> sp.Expr:
        return world.reward(s) * world.score(s, 1)

    true = world.expectation(term, "target")
    mean, prefix = moments(world, world.reweighted(term, 1))
    full = moments(world, world.reweighted(term, 2))[1]
    bias, var_prefix, var_full = (
        -q * (1 - q) * (q - b),
        q**2 * (1 - q) ** 2 * (1 - b**2),
        q**4 * (1 - q) ** 2 * (1 - b**2) / b**2,
    )
    n, solution = _equal_errors(bias, var_prefix, var_full)
    general = (1 - b**2) * (q + b) / (b**2 * (q - b))
    special = 3 * (q + HALF) / (q - HALF)
    rates = [sp.Rational(x, 100) for x in (51, 55, 60, 75, 90, 40)]
    return Derivation(
        "Mean squared errors of the two weights are equal at n* = (1 - b^2)(q + b)/(b^2 (q - b)), 3 (q + 1/2)/(q - "
        "1/2) where b = 1/2.",
        "R = a1 a2, independent binary tokens, b(1) = b, pi(1) = q, first token's logit, n independent strings.",
        (
            Chain("bias of rho_t", (("E_b[rho_1 g_1 R] - E_pi[g_1 R]", mean - true), ("collected", bias))),
            Chain("variance of rho_t", (("over the four strings", prefix), ("collected", var_prefix))),
            Chain("variance of rho_H", (("over the four strings", full), ("collected", var_full))),
            Solution(
                "n* with bias^2 + Var_prefix/n = Var_full/n",
                (bias**2 + var_prefix / n - var_full / n,),
                "by solve",
                n,
                solution,
            ),
            Chain("n*", (("the solution", solution), ("factored", general))),
            Chain("n* at b = 1/2", (("by substitution", general.subs(b, HALF)), ("collected", special))),
        ),
        {f"n* at q = {rate}": special.subs(q, rate) for rate in rates},
    )


@about("4.crossover")
def crossover_batch_all_ones() -> Derivation:
    """n* of R = prod a_t over the logits of all positions, for every H."""
    r = sp.Symbol("r", positive=True)
    horizon, t = sp.symbols("H t", integer=True, positive=True)
    power = b**horizon
    square = sp.Sum((r**horizon - r**t) ** 2, (t, 1, horizon))
    powers, squares = r * (r**horizon - 1) / (r - 1), r**2 * (r ** (2 * horizon) - 1) / (r**2 - 1)
    square_closed = horizon * r ** (2 * horizon) - 2 * r**horizon * powers + squares
    # All three without their common factor (1 - q)^2 b^(2H).
    var_prefix = (1 / power - 1) * sp.Sum(r ** (2 * t), (t, 1, horizon))
    var_full = (1 / power - 1) * horizon * r ** (2 * horizon)
    closed = (1 / power - 1) * (horizon * r ** (2 * horizon) - squares) / square_closed
    given = (sp.Ne(r, 1), sp.Ne(r**2, 1))
    parts: list[Chain | Solution | Sign] = []
    for size in (2, 3, 4):
        world = all_ones(size, b, q)
        bias_square, prefix, full = sp.Integer(0), sp.Integer(0), sp.Integer(0)
        for position in range(1, size + 1):

            def term(s: String, position: int = position, world: Strings = world) -> sp.Expr:
                return world.reward(s) * world.score(s, position)

            true = world.expectation(term, "target")
            mean, variance = moments(world, world.reweighted(term, position))
            bias_square += (mean - true) ** 2
            prefix += variance
            full += moments(world, world.reweighted(term, size))[1]
        scale = (1 - q) ** 2 * b ** (2 * size)
        at = {horizon: size, r: q / b}
        parts += [
            Chain(
                f"{what}, H = {size}",
                ((f"over all {2**size} strings, summed over the {size} logits", found), ("by position", scale * value)),
            )
            for what, found, value in (
                ("Var_prefix", prefix, var_prefix.subs(at).doit()),
                ("Var_full", full, var_full.subs(at)),
                ("bias^2", bias_square, square.subs(at).doit()),
            )
        ]
    n, solution = _equal_errors(sp.sqrt(square_closed), (1 / power - 1) * squares, var_full)
    parts += [
        Chain(
            "Var_prefix / ((1 - q)^2 b^(2H)), every H, r = q/b",
            (
                (
                    "only the string of ones is rewarded, with probability b^H: the term of position t is (1 - q) r^t "
                    "there, of mean (1 - q) b^H r^t",
                    var_prefix,
                ),
                ("a geometric sum", (1 / power - 1) * squares),
            ),
            given,
        ),
        Chain(
            "bias^2 / ((1 - q)^2 b^(2H)), every H",
            (("(b^H r^t - q^H)^2 over b^(2H), by position", square), ("geometric sums", square_closed)),
            given,
        ),
        Solution(
            "n* with bias^2 + Var_prefix/n = Var_full/n",
            (square_closed + (1 / power - 1) * squares / n - var_full / n,),
            "by solve; the term of the sequence weight is (1 - q) r^H at every position",
            n,
            solution,
        ),
        Chain("n*", (("the solution", solution), ("collected", closed))),
    ]
    at_two = {horizon: 2, r: q / b}
    parts.append(
        Chain(
            "n* at H = 2",
            (
                ("by substitution", closed.subs(at_two)),
                ("that of the first logit alone", (1 - b**2) * (q + b) / (b**2 * (q - b))),
            ),
        )
    )
    relative = sp.sqrt(square / (horizon * r ** (2 * horizon)))
    numbers = {}
    for size in range(2, 9):
        where = {b: HALF, r: sp.Rational(6, 5), horizon: size}
        numbers[f"n*, H = {size}, b = 1/2, q = 3/5"] = closed.subs(where)
        numbers[f"relative bias, H = {size}, b = 1/2, q = 3/5"] = relative.subs(where).doit()
    return Derivation(
        "n* = (b^-H - 1) sum_t (r^2H - r^2t) / sum_t (r^H - r^t)^2 with r = q/b, for every H, in closed form.",
        "R = 1 if all H independent binary tokens are 1, b(1) = b, pi(1) = q, one logit per position, r != 1.",
        tuple(parts),
        numbers,
    )


# --- 9: with and without detaching ----------------------------------------------------------------------------------


@about("9.target_advantage", "9.behavior_advantage", "9.outcome", "9.action_value")
def stop_gradient_table() -> Derivation:
    """Means of the stop-gradient form and of the un-detached product with four advantages, R = a1 a2."""
    world = all_ones(2, b, q)
    advantages: dict[str, Callable[[String, int], sp.Expr]] = {
        "A^pi": lambda s, t: world.advantage("target", s, t),
        "A^b": lambda s, t: world.advantage("behavior", s, t),
        "R": lambda s, t: world.reward(s),
        "Q^pi": lambda s, t: world.value("target", s[:t]),
    }
    true, prefix = 2 * q**2 * (1 - q), q * (1 - q) * (b + q)
    closed = {
        "A^pi": (true, true),
        "A^b": (prefix, true),
        "R": (prefix, q * (1 - q) * (b + 2 * q)),
        "Q^pi": (true, 3 * q**2 * (1 - q)),
    }
    at = {b: HALF, q: sp.Rational(3, 4)}
    parts = [Chain("grad J", (("E_pi[R sum_t g_t] over the four strings", world.gradient()), ("collected", true)))]
    numbers = {"grad J": true.subs(at)}
    for label, advantage in advantages.items():

        def detached(s: String, t: int, advantage: Callable[[String, int], sp.Expr] = advantage) -> sp.Expr:
            return world.rho(s, t) * world.score(s, t) * advantage(s, t)

        def whole(s: String, t: int, advantage: Callable[[String, int], sp.Expr] = advantage) -> sp.Expr:
            return world.rho(s, t) * sum(world.score(s, k) for k in range(1, t + 1)) * advantage(s, t)

        for form, term, end in zip(("stop-gradient", "un-detached"), (detached, whole), closed[label], strict=True):
            mean, variance = moments(world, world.total(term))
            parts.append(
                Chain(
                    f"{form} with {label}",
                    (("E_b over the four strings", mean), ("collected", end)),
                )
            )
            numbers[parts[-1].quantity] = end.subs(at)
            if label == "A^pi":
                parts.append(
                    Chain(
                        f"variance, {form} with {label}",
                        (("over the four strings", variance), ("collected", sp.factor(variance.doit()))),
                    )
                )
                numbers[parts[-1].quantity] = parts[-1].result.subs(at)
    return Derivation(
        "With A^pi both forms are exact, with A^b only the un-detached product, with R neither, with Q^pi only "
        "stop-gradient.",
        "two independent binary tokens, b(1) = b, pi(1) = q, R = a1 a2, one shared logit; numbers at b = 1/2, q = 3/4.",
        tuple(parts),
        numbers,
    )
