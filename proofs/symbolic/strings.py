"""Binary strings under two policies with symbolic probabilities: the definitions that derivations begin with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import sympy as sp

String = tuple[int, ...]
#: From a prefix to the probability of a 1.
Policy = Callable[[String], sp.Expr]
Who = Literal["behavior", "target"]
#: From a string to a number.
Statistic = Callable[[String], sp.Expr]


def memoryless(*ones: sp.Expr) -> Policy:
    """A policy that writes a 1 with the given probability at each position, whatever came before."""
    return lambda prefix: sp.sympify(ones[len(prefix)])


@dataclass(frozen=True)
class Strings:
    """Binary strings of one length, written by b and reweighted to pi.

    Attributes:
        horizon: Their length H.
        b, pi: Behavior and target policy.
        reward: Outcome reward of a string.
    """

    horizon: int
    b: Policy
    pi: Policy
    reward: Statistic

    def all(self) -> list[String]:
        """All strings, in lexicographic order."""
        return list(product((0, 1), repeat=self.horizon))

    def token(self, who: Who, prefix: Sequence[int], token: int) -> sp.Expr:
        """Probability of a token after a prefix."""
        one = (self.b if who == "behavior" else self.pi)(tuple(prefix))
        return one if token else 1 - one

    def chance(self, who: Who, string: String) -> sp.Expr:
        """Probability of a string."""
        return sp.Mul(*(self.token(who, string[:t], a) for t, a in enumerate(string)))

    def ratio(self, string: String, t: int) -> sp.Expr:
        """Token ratio r_t, t = 1..H."""
        prefix, token = string[: t - 1], string[t - 1]
        return self.token("target", prefix, token) / self.token("behavior", prefix, token)

    def rho(self, string: String, t: int) -> sp.Expr:
        """Cumulative ratio rho_t."""
        return sp.Mul(*(self.ratio(string, k) for k in range(1, t + 1)))

    def score(self, string: String, t: int) -> sp.Expr:
        """Derivative of log pi(a_t|s_t) in the logit of a 1, a_t - pi(1|s_t)."""
        return string[t - 1] - self.pi(string[: t - 1])

    def value(self, who: Who, prefix: String) -> sp.Expr:
        """V of a policy at a prefix; of a whole string, which is Q of its last token, the reward."""
        if len(prefix) == self.horizon:
            return sp.sympify(self.reward(prefix))
        return sp.Add(*(self.token(who, prefix, a) * self.value(who, (*prefix, a)) for a in (0, 1)))

    def advantage(self, who: Who, string: String, t: int) -> sp.Expr:
        """A_t = Q(s_t, a_t) - V(s_t) of a policy."""
        return sp.expand(self.value(who, string[:t]) - self.value(who, string[: t - 1]))

    def expectation(self, statistic: Statistic, who: Who = "behavior") -> sp.Expr:
        """Sum over strings of probability times statistic, as it stands; terms that are 0 are left out."""
        terms = [sp.Mul(self.chance(who, s), statistic(s), evaluate=False) for s in self.all() if statistic(s) != 0]
        return sp.Add(*terms, evaluate=False) if len(terms) != 1 else terms[0]

    def reweighted(self, statistic: Statistic, t: int) -> Statistic:
        """The statistic times rho_t."""
        return lambda string: self.rho(string, t) * statistic(string)

    def total(self, term: Callable[[String, int], sp.Expr]) -> Statistic:
        """The statistic sum_t term(string, t)."""
        return lambda string: sp.Add(*(term(string, t) for t in range(1, self.horizon + 1)))

    def gradient(self) -> sp.Expr:
        """Derivative of J(pi) in one logit that all positions share: E_pi[R sum_t g_t]."""
        return self.expectation(lambda s: self.reward(s) * self.total(self.score)(s), "target")
