"""Variance of the summed gradient with one shared logit: its slope at pi = b, and a sampler under which one is 0."""

from __future__ import annotations

from collections.abc import Callable

import sympy as sp

from proofs.symbolic.derivation import Chain, Derivation, about
from proofs.symbolic.outcome_reward import any_reward, b, moments, p, q
from proofs.symbolic.strings import String, Strings, memoryless

THIRD = sp.Rational(1, 3)


def integrand(world: Strings, s: String, t: int) -> sp.Expr:
    """f_t = g_t A^pi_t."""
    return world.score(s, t) * world.advantage("target", s, t)


def variances(world: Strings) -> tuple[sp.Expr, sp.Expr]:
    """Var Y of sum_t rho_t f_t and Var Z of rho_H sum_t f_t, over the strings."""
    found = []
    for last in (False, True):

        def term(s: String, t: int, last: bool = last) -> sp.Expr:
            return world.rho(s, world.horizon if last else t) * integrand(world, s, t)

        found.append(moments(world, world.total(term))[1])
    return found[0], found[1]


@about("5.slope")
def variance_slope() -> Derivation:
    """d(Var Z - Var Y)/dq at q = b, for any reward of two tokens."""
    world, rewards = any_reward(2, b, q)
    here = any_reward(2, b, b)[0]
    var_y, var_z = variances(world)
    slope = sp.diff((var_z - var_y).doit(), q).subs(q, b)

    def pair(s: String) -> sp.Expr:
        # s = 1 < k <= t = 2 leaves k = 2; x_k = g_k / (b (1 - b)) is d log pi / dq.
        return here.score(s, 2) * integrand(here, s, 1) * integrand(here, s, 2) / (b * (1 - b))

    law = sp.Mul(2, here.expectation(pair).doit())
    parts, numbers = [], {}
    parts.append(
        Chain(
            "d(Var Z - Var Y)/dq at q = b, any reward",
            (
                ("by differentiating both variances over the four strings", slope),
                ("2 sum_{s<t} sum_{s<k<=t} E_b[x_k f_s f_t]", law),
            ),
        )
    )
    examples: dict[str, Callable[[String], int]] = {"a1 + a2": lambda s: s[0] + s[1], "a1 - a2": lambda s: s[0] - s[1]}
    for name, reward in examples.items():
        at = {rewards[s]: reward(s) for s in here.all()}
        end = {"a1 + a2": 1, "a1 - a2": -1}[name] * 2 * b * (1 - b) * (1 - 2 * b)
        parts.append(Chain(f"slope for R = {name}", (("by substitution", law.subs(at)), ("factored", end))))
        numbers[f"slope for R = {name}, b = 1/3"] = end.subs(b, THIRD)
    return Derivation(
        "At pi = b the slope of Var Z - Var Y along the shared logit is 2 sum E_b[x_k f_s f_t], of either sign.",
        "two independent binary tokens with one shared logit, b(1) = b, pi(1) = q, A^pi; slope per unit of q.",
        tuple(parts),
        numbers,
    )


def tilted(world: Strings) -> Strings:
    """The world whose sampler is b proportional to pi F, F = sum_t f_t."""
    weight = {s: world.chance("target", s) * world.total(lambda s, t: integrand(world, s, t))(s) for s in world.all()}

    def one(prefix: String) -> sp.Expr:
        def mass(start: String) -> sp.Expr:
            return sp.Add(*(w for s, w in weight.items() if s[: len(start)] == start))

        return sp.cancel(mass((*prefix, 1)) / mass(prefix))

    return Strings(world.horizon, one, world.pi, world.reward)


@about("5.ordered", "5.direction", "5.zero_variance")
def zero_variance() -> Derivation:
    """R = a1 + a2 with b proportional to pi F: the sequence weight has variance 0, the prefix weight has not."""
    plain = Strings(2, memoryless(p, p), memoryless(p, p), lambda s: sp.Integer(s[0] + s[1]))
    world = tilted(plain)
    var_y, var_z = variances(world)
    end = 2 * p**3 * (1 - p) ** 3 * (1 - 2 * p) ** 2 / (p**2 + (1 - p) ** 2)
    at = {p: THIRD}
    ones = {"b(a1 = 1)": world.b(()), "b(a2 = 1) after 1": world.b((1,)), "b(a2 = 1) after 0": world.b((0,))}
    parts = [
        Chain(f"{name}", (("mass of pi F over its strings", value), ("factored", sp.factor(value))))
        for name, value in ones.items()
    ]
    parts += [
        Chain("Var Z, rho_H sum_t f_t", (("over the four strings", var_z), ("b cancels", sp.Integer(0)))),
        Chain("Var Y, sum_t rho_t f_t", (("over the four strings", var_y), ("factored", end))),
    ]
    numbers = {f"{name} at pi = 1/3": value.subs(at) for name, value in ones.items()}
    numbers |= {"Var Z": sp.Integer(0), "Var Y at pi = 1/3": end.subs(at)}
    return Derivation(
        "Under b proportional to pi F the full-sequence weight has variance 0 and the prefix weight has not, for every "
        "pi(1) = p but 1/2.",
        "two binary tokens with one shared logit, independent under pi, R = a1 + a2, A^pi.",
        tuple(parts),
        numbers,
    )
