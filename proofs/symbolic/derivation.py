"""What a derivation is: chains of equal expressions, solved equations and signs, each checked by SymPy."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from itertools import pairwise

import sympy as sp

#: Columns of the printed form.
WIDTH = 120
#: Lines that a single expression may take in the printed form.
LINES = 16


def is_zero(expression: sp.Expr, given: Sequence[sp.Basic] = ()) -> bool:
    """Whether SymPy shows that an expression vanishes identically; a floating-point number in it is never enough.

    Args:
        expression: Sums, integrals, limits and derivatives that it holds are carried out.
        given: What is known besides the assumptions on the symbols, such as x != 1.

    Example:
        >>> x = sp.Symbol("x")
        >>> is_zero((x + 1) ** 2 - x**2 - 2 * x - 1), is_zero(x * (1 - x)), is_zero(sp.Float(0.0))
        (True, False, False)
    """
    if expression.has(sp.Float, sp.nan, sp.zoo):
        return False
    if sp.expand(expression) == 0:
        return True
    known = dict.fromkeys(given, sp.true) | {sp.Not(fact): sp.false for fact in given}
    carried_out = expression.doit().xreplace(known).replace(sp.erfc, lambda x: 1 - sp.erf(x))
    return any(
        rewrite(carried_out) == 0
        for rewrite in (
            sp.expand,
            _by_coefficients,
            lambda e: sp.radsimp(sp.cancel(sp.together(e))),
            sp.simplify,
            lambda e: sp.simplify(sp.expand_log(sp.powsimp(sp.expand(e)))),
        )
    )


def _by_coefficients(expression: sp.Expr) -> sp.Expr:
    """The expression, or 0 if all its coefficients vanish as a polynomial in the symbols in which it is one."""
    polynomial = sorted((s for s in expression.free_symbols if expression.is_polynomial(s)), key=str)
    if not polynomial:
        return expression
    coefficients = sp.Poly(sp.expand(expression), *polynomial, domain="EX").coeffs()
    return sp.Integer(0) if all(sp.cancel(sp.together(c)) == 0 for c in coefficients) else expression


def is_positive(expression: sp.Expr) -> bool:
    """Whether an expression is positive by the assumptions on its symbols, factor by factor.

    A finite sum counts as positive if its summand does; the caller answers for its range not being empty.
    """
    if isinstance(expression, sp.Mul):
        return all(is_positive(factor) for factor in expression.args)
    if isinstance(expression, sp.Sum):
        return is_positive(expression.function)
    return bool(expression.is_positive)


@dataclass(frozen=True)
class Chain:
    """A quantity rewritten step by step.

    Attributes:
        quantity: What it is, in words or symbols.
        steps: (what was done, the expression it gives); the first is the definition, the last the result.
        given: What is known besides the assumptions on the symbols, such as x != 1.
    """

    quantity: str
    steps: tuple[tuple[str, sp.Expr], ...]
    given: tuple[sp.Basic, ...] = ()

    @property
    def definition(self) -> sp.Expr:
        """The first expression."""
        return self.steps[0][1]

    @property
    def result(self) -> sp.Expr:
        """The last expression."""
        return self.steps[-1][1]

    def failures(self) -> Iterator[str]:
        """Steps that SymPy does not show to be equalities."""
        if len(self.steps) < 2:
            yield f"{self.quantity}: a chain needs at least two expressions, got {len(self.steps)}"
        for (_, before), (how, after) in pairwise(self.steps):
            if not is_zero(before - after, self.given):
                yield f"{self.quantity}: not shown equal: {how}"

    def lines(self) -> Iterator[str]:
        """The printed form."""
        yield f"  {self.quantity}" + "".join(f", {fact}" for fact in self.given)
        for how, expression in self.steps:
            yield from _shown("=", expression, how)


@dataclass(frozen=True)
class Solution:
    """Equations and values of their unknowns.

    Attributes:
        quantity: What is solved for.
        equations: Expressions that must vanish, recurrences and initial conditions included.
        how: What was done.
        unknown: The unknown, a symbol or a function of one.
        value: Its value, which is put into every equation.
    """

    quantity: str
    equations: tuple[sp.Expr, ...]
    how: str
    unknown: sp.Expr
    value: sp.Expr

    @property
    def result(self) -> sp.Expr:
        """The solution."""
        return self.value

    def _put(self, equation: sp.Expr) -> sp.Expr:
        if isinstance(self.unknown, sp.Symbol):
            return equation.subs(self.unknown, self.value)
        (argument,) = self.unknown.args
        return equation.replace(self.unknown.func, lambda x: self.value.subs(argument, x))

    def failures(self) -> Iterator[str]:
        """Equations that the value does not satisfy."""
        for equation in self.equations:
            if not is_zero(self._put(equation)):
                yield f"{self.quantity}: {equation} = 0 is not satisfied by {self.value}"

    def lines(self) -> Iterator[str]:
        """The printed form."""
        yield f"  {self.quantity}"
        for equation in self.equations:
            yield from _shown("0 =", equation, "")
        yield from _shown(f"{self.unknown} =", self.value, self.how)


@dataclass(frozen=True)
class Sign:
    """An expression that is positive by the assumptions on its symbols.

    Attributes:
        quantity: What it is.
        expression: The product or sum whose factors are all positive.
        how: What it shows.
    """

    quantity: str
    expression: sp.Expr
    how: str

    @property
    def result(self) -> sp.Expr:
        """The expression."""
        return self.expression

    def failures(self) -> Iterator[str]:
        """Nothing if SymPy shows the sign."""
        if not is_positive(self.expression):
            yield f"{self.quantity}: not shown to be positive"

    def lines(self) -> Iterator[str]:
        """The printed form."""
        yield f"  {self.quantity}"
        yield from _shown("0 <", self.expression, self.how)


@dataclass(frozen=True)
class Derivation:
    """Closed forms from their definition.

    Attributes:
        says: What is derived, in one sentence.
        assumes: Under what.
        parts: Chains, solutions and signs, in the order of reading.
        numbers: What the results give where their symbols take values.
        name: As in `DERIVATIONS`.
        claims: Ids of the claims that it is about.
    """

    says: str
    assumes: str
    parts: tuple[Chain | Solution | Sign, ...]
    numbers: Mapping[str, sp.Expr] = field(default_factory=dict)
    name: str = ""
    claims: tuple[str, ...] = ()

    def part(self, quantity: str) -> Chain | Solution | Sign:
        """The part about a quantity."""
        return {part.quantity: part for part in self.parts}[quantity]

    @property
    def results(self) -> dict[str, sp.Expr]:
        """The last expression of every part, by its quantity."""
        return {part.quantity: part.result for part in self.parts}

    def failures(self) -> list[str]:
        """Steps that SymPy does not confirm, none if all is well."""
        found = [f"{self.name}: {failure}" for part in self.parts for failure in part.failures()]
        if not self.parts:
            found.append(f"{self.name}: nothing is derived")
        found += [
            f"{self.name}: {what} is {number}, not a number in closed form"
            for what, number in self.numbers.items()
            if number.free_symbols or number.has(sp.Float) or not number.is_number
        ]
        return found

    def lines(self) -> Iterator[str]:
        """The printed form, at most `WIDTH` columns."""
        yield f"{self.name}  [{', '.join(self.claims)}]"
        yield from textwrap.wrap(self.says, WIDTH, initial_indent="  ", subsequent_indent="  ")
        yield from textwrap.wrap(f"Assumes: {self.assumes}", WIDTH, initial_indent="  ", subsequent_indent="  ")
        for part in self.parts:
            yield ""
            yield from part.lines()
        if self.numbers:
            yield ""
            for what, number in self.numbers.items():
                shown = f"{number}" if number.is_Rational else f"{sp.N(number, 6)}"
                yield f"    {what}: {shown}"


#: Name of every derivation -> the function that carries it out (once).
DERIVATIONS: dict[str, Callable[[], Derivation]] = {}
#: Name of every derivation -> ids of the claims that it is about.
CLAIMS: dict[str, tuple[str, ...]] = {}


def about(*claims: str) -> Callable[[Callable[[], Derivation]], Callable[[], Derivation]]:
    """A decorator that registers a derivation under its function's name, with the ids of its claims."""

    def register(build: Callable[[], Derivation]) -> Callable[[], Derivation]:
        name = build.__name__

        @cache
        @wraps(build)
        def derive() -> Derivation:
            return replace(build(), name=name, claims=claims)

        DERIVATIONS[name], CLAIMS[name] = derive, claims
        return derive

    return register


def _shown(sign: str, expression: sp.Expr, how: str) -> Iterator[str]:
    """An expression over several lines behind its sign, and what was done above it."""
    if how:
        yield from textwrap.wrap(how, WIDTH, initial_indent="    | ", subsequent_indent="    | ")
    indent = " " * (5 + len(sign))
    drawn = sp.pretty(expression, use_unicode=False, wrap_line=False).splitlines()
    middle = len(drawn) // 2
    if len(drawn) > LINES or max(map(len, drawn)) > WIDTH - len(indent):
        drawn, middle = textwrap.wrap(str(expression), WIDTH - len(indent)), 0
    if len(drawn) > LINES:
        drawn = [*drawn[: LINES - 1], f"... ({len(str(expression))} characters in all)"]
    for k, line in enumerate(drawn):
        yield (f"    {sign} " if k == middle else indent) + line.rstrip()
