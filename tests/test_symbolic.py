"""The symbolic derivations: every step confirmed, results equal to the exact engine's, wrong definitions told apart."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction as F
from itertools import product

import numpy as np
import pytest
import sympy as sp

from proofs import counterexample
from proofs.symbolic import CLAIMS, DERIVATIONS, Chain, Derivation, Sign, Solution, __main__, clip_window
from proofs.symbolic.derivation import WIDTH, is_positive, is_zero
from proofs.symbolic.gaussian import density
from proofs.symbolic.group_advantages import std_factor
from proofs.symbolic.outcome_reward import any_reward
from proofs.symbolic.strings import Strings
from simulations import claims
from simulations.claims import (
    clip_rates,
    drift,
    effective_sample_size,
    group_advantages,
    outcome_reward,
    released_loss,
    stop_gradient,
    summed_gradient,
)
from simulations.claims import product_formula as pf
from simulations.claims.martingale import cumulative, variance
from simulations.claims.worlds import two_step
from simulations.exact import (
    enumerate_trajectories,
    gradient_mean,
    gradient_moments,
    policy_gradient,
    ratio_moments,
    rational_weights,
)
from simulations.mdp import World, as_numbers, independent_tokens, one_logit, policy_table, tree

HALF = F(1, 2)


def number(value):
    """A SymPy rational as a Fraction; anything else is no exact number."""
    assert value.is_Rational, value
    return F(int(value.p), int(value.q))


def at(expression, **values):
    """An expression of symbols, by name, at rational points."""
    left = {symbol.name for symbol in expression.free_symbols} - set(values)
    assert not left, left
    where = {s: sp.Rational(v.numerator, v.denominator) for s in expression.free_symbols for v in [F(values[s.name])]}
    return number(sp.simplify(expression.subs(where).doit()))


def result(name, quantity, **values):
    """The result of one part of a derivation at rational points."""
    return at(DERIVATIONS[name]().part(quantity).result, **values)


# --- the registry and the checker -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DERIVATIONS)
def test_every_step_is_confirmed(name):
    derivation = DERIVATIONS[name]()
    assert derivation.failures() == []
    assert (derivation.name, derivation.claims) == (name, CLAIMS[name])
    assert derivation.claims
    assert set(derivation.claims) <= set(claims.CLAIMS)
    quantities = [part.quantity for part in derivation.parts]
    assert len(quantities) == len(set(quantities))
    # At least one part goes somewhere: its definition is not already written as its result.
    assert any(
        isinstance(part, Solution) or sp.srepr(part.steps[0][1]) != sp.srepr(part.result)
        for part in derivation.parts
        if not isinstance(part, Sign)
    )


def test_a_wrong_step_fails():
    x = sp.Symbol("x", positive=True)
    n, j = sp.symbols("n j", integer=True, positive=True)
    assert list(Chain("square", (("by definition", (x + 1) ** 2), ("wrong", x**2 + 1))).failures())
    assert list(Chain("alone", (("by definition", x),)).failures())
    geometric = sp.Sum(x**j, (j, 1, n))
    right, wrong = x * (x**n - 1) / (x - 1), x * (x**n - 1) / (x + 1)
    assert not list(Chain("sum", (("", geometric), ("", right)), (sp.Ne(x, 1),)).failures())
    assert list(Chain("sum", (("", geometric), ("", wrong)), (sp.Ne(x, 1),)).failures())
    assert list(Solution("root", (x**2 - 2,), "", x, sp.Integer(2)).failures())
    assert list(Sign("difference", x - 1, "").failures())
    assert not is_positive((x - 1) * (x - 1) * x)
    # Almost equal is not equal, and numbers in floating point never are.
    assert not is_zero(sp.Rational(1, 10**30) * x)
    assert not is_zero(sp.Float(0.1) + sp.Float(0.2) - sp.Float(0.3))
    assert not is_zero(sp.nan)
    bad = Derivation("", "", (Sign("one", x, ""),), {"half": sp.Float(0.5), "open": x}, "bad", ("2r.bounds",))
    assert len(bad.failures()) == 2
    assert Derivation("", "", (), {}, "empty", ()).failures() == ["empty: nothing is derived"]


def test_wrong_definitions_are_told_apart():
    """Drift of the other sign, a group that excludes the response, the first power as tilt, d of the other sign."""
    sigma, t, mu, y = clip_window.sigma, clip_window.t, clip_window.mu, clip_window.y
    drifting = DERIVATIONS["forced_drift"]().part("mu with E_b rho_t = 1")
    assert list(Solution("wrong", drifting.equations, "", mu, sigma**2 * t / 2).failures())
    up = sp.Integral(sp.exp(y) * density(y, sigma**2 * t / 2, sigma * sp.sqrt(t)), (y, -sp.oo, sp.oo))
    assert list(Chain("E rho", (("mean +sigma^2 t/2", up), ("", sp.Integer(1)))).failures())
    others = DERIVATIONS["leave_one_out"]().part("E[(R_1 - mean_{j > 1} R_j) Y_1]").definition
    size = next(s for s in others.free_symbols if s.name == "G")
    own = DERIVATIONS["group_mean"]().part("E[(R_1 - mean_j R_j) Y_1]").result
    assert list(Chain("self-excluded", (("", others), ("", own))).failures())
    assert size in own.free_symbols
    moments = DERIVATIONS["variance_ratio"]().parts[0]
    assert list(Solution("wrong", moments.equations, "", moments.unknown, 1 / moments.value).failures())
    covariance = DERIVATIONS["product_formula_error"]().part("E_b rho_2^2 - (1 + chi2_1)(1 + chi2_2)")
    assert list(Chain("other sign", (("", covariance.definition), ("", -covariance.result))).failures())
    slope = DERIVATIONS["first_order_half"]().part("slope of the bias at pi = b, weight rho_t with R, H = 3")
    assert list(Chain("twice", (("", slope.definition), ("", 2 * slope.result))).failures())
    mass = DERIVATIONS["clipped_target_mass"]().part("E_b[rho_t 1{log rho_t > eps sqrt(t)}]").definition
    under_b = DERIVATIONS["clip_rates"]().part("P_b(log rho_t > eps sqrt(t))").result
    assert list(Chain("mass under b", (("", mass), ("", under_b))).failures())


def test_the_command(capsys, monkeypatch):
    assert __main__.main(["hot_and_cold", "group_mean"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "2 derivations, every step confirmed"
    assert any("17/36" in line for line in shown)
    assert max(map(len, shown)) <= WIDTH
    assert __main__.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(DERIVATIONS)
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["no_such_derivation"])
    assert stopped.value.code == 2
    capsys.readouterr()
    x = sp.Symbol("x")
    wrong = Derivation("", "", (Chain("x", (("", x), ("doubled", 2 * x))),), {}, "wrong", ("2r.bounds",))
    monkeypatch.setitem(DERIVATIONS, "wrong", lambda: wrong)
    assert __main__.main(["wrong"]) == 1
    assert "wrong: x: not shown equal: doubled" in capsys.readouterr().err


def test_the_command_as_a_process():
    done = subprocess.run(
        [sys.executable, "-m", "proofs.symbolic", "outcome_sign"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 derivations, every step confirmed" in done.stdout


@pytest.mark.parametrize("name", DERIVATIONS)
def test_printed_lines_are_readable(name):
    lines = list(DERIVATIONS[name]().lines())
    assert lines[0].startswith(f"{name}  [")
    assert max(map(len, lines)) <= WIDTH


# --- the numbers of the claims --------------------------------------------------------------------------------------

#: Entry of counterexamples.json -> derivation, and name of its number from the entry's.
SAME_NUMBERS = {
    "product_more": ("product_formula_error", {
        "Var rho_2": "Var(rho_2), chi2 = 1/4 after up-weighted",
        "product formula": "product formula, chi2 = 1/4 after up-weighted",
    }),
    "product_less": ("product_formula_error", {
        "Var rho_2": "Var(rho_2), chi2 = 1/4 after down-weighted",
        "product formula": "product formula, chi2 = 1/4 after down-weighted",
    }),
    "product_iid": ("product_formula_error", {
        "Var rho_2": "Var(rho_2), chi2 = 1/4 after both",
        "product formula": "product formula, chi2 = 1/4 after both",
    }),
    "variance_ratio": ("variance_ratio", {f"t = {t}": f"H = 5, d = 1/4, t = {t}" for t in range(1, 6)}),
    "six_weights": ("ratio_table", {"true gradient": "grad J"} | {
        f"{theirs} with {a}": f"weight {ours} with {a}"
        for theirs, ours in (("rho_t", "rho_t"), ("r_t", "r_t"), ("rho_H", "rho_H"), ("GSPO rho_H^(1/2)", "GSPO"),
                             ("rho_t^(1/t)", "rho_t^(1/t)"), ("none", "none"))
        for a in ("A^pi", "R")
    }),
    "sign_reversal": ("outcome_sign", {
        "true gradient": "true gradient, R = 1{a1 = a2}, first logit",
        "cumulative ratio": "under rho_t, R = 1{a1 = a2}, first logit",
    }),
    "outcome_both_ones": ("outcome_sign", {
        "true gradient": "true gradient, R = a1 a2, first logit",
        "cumulative ratio": "under rho_t, R = a1 a2, first logit",
    }),
    "half_of_the_bias": ("first_order_half", {
        "bias of rho_t": "bias of rho_t, b = 1/2, q = 3/4", "bias of r_t": "bias of r_t, b = 1/2, q = 3/4",
    }),
    "term_variance": ("outcome_term_variance", {
        f"rho_{t} at q = {q}": f"Var(rho_{t} g_1 R) at pi = {q}" for t in (1, 2) for q in ("1/4", "1/2", "3/4")
    }),
    "crossover": ("crossover_batch", {
        f"q = {q}": f"n* at q = {q}" for q in ("51/100", "11/20", "3/5", "3/4", "9/10", "2/5")
    }),
    "summed_A": ("zero_variance", {"Var Y": "Var Y at pi = 1/3", "Var Z": "Var Z"}),
    "zero_variance_recipe": ("zero_variance", {
        "b(1)": "b(a1 = 1) at pi = 1/3", "b(1) after 0": "b(a2 = 1) after 0 at pi = 1/3",
        "b(1) after 1": "b(a2 = 1) after 1 at pi = 1/3",
    }),
    "slope": ("variance_slope", {f"R = {r}": f"slope for R = {r}, b = 1/3" for r in ("a1 + a2", "a1 - a2")}),
    "group_mean": ("group_mean", {f"G = {g}": f"R = a, p = 1/2, G = {g}" for g in (2, 4, 8)}),
    "baseline_off_policy": ("group_mean", {
        "true gradient": "no weight, R = 0 + a, true",
        "no baseline, R = a": "no weight, R = 0 + a, raw",
        "leave-one-out, R = a": "no weight, R = 0 + a, leave-one-out",
        "no baseline, R = 1 + a": "no weight, R = 1 + a, raw",
        "leave-one-out, R = 1 + a": "no weight, R = 1 + a, leave-one-out",
    }),
    "std_sign": ("std_sign", {
        "true gradient": "true, rewards 0, 1, 10", "divided by std": "normalized, rewards 0, 1, 10",
    }),
    "std_sign_small": ("std_sign", {
        "true gradient": "true, rewards 0, 1, 4", "divided by std": "normalized, rewards 0, 1, 4",
    }),
    "length": ("length_baseline", {"true gradient": "grad J"} | {
        f"1/T at c = {c}": f"c = {c}" for c in ("0", "1/2", "7/8")
    } | {"E[(1/T) sum g]": "E[(1/T) g]", "all wrong, 1/T at c = 1/2": "all wrong, c = 1/2"}),
    "token_mean": ("token_mean", {f"n = {n}": f"n = {n}" for n in (1, 2, 3, 4, 6)} | {
        "limit grad J / E[T]": "limit",
    }),
    "superlinear": ("hot_and_cold", {f"n = {n}": f"n = {n}" for n in (1, 2, 4, 6)}),
    "ess_population": ("effective_sample_size", {f"t = {t}": f"d = 1/4, t = {t}" for t in range(1, 5)}),
    "ess_batch": ("sample_effective_sample_size", {
        "t = 1": "{10, 01}, p = 3/4, t = 1", "t = 2": "{10, 01}, t = 2",
    }),
    "ess_expected": ("sample_effective_sample_size", {
        f"t = {t}": f"expected sample ESS of 2, p = 3/4, t = {t}" for t in (1, 2, 3)
    }),
    "stop_gradient_target": ("stop_gradient_table", {
        "true gradient": "grad J", "stop-gradient": "stop-gradient with A^pi", "un-detached": "un-detached with A^pi",
        "Var of stop-gradient": "variance, stop-gradient with A^pi",
        "Var of un-detached": "variance, un-detached with A^pi",
    }),
    "stop_gradient_behavior": ("stop_gradient_table", {
        "stop-gradient": "stop-gradient with A^b", "un-detached": "un-detached with A^b",
    }),
    "stop_gradient_outcome": ("stop_gradient_table", {
        "stop-gradient": "stop-gradient with R", "un-detached": "un-detached with R",
    }),
    "stop_gradient_action_value": ("stop_gradient_table", {
        "stop-gradient": "stop-gradient with Q^pi", "un-detached": "un-detached with Q^pi",
    }),
    "dual_drifted": ("dual_clip", {
        "true gradient": "bad token, true and printed", "printed window": "bad token, true and printed",
        "with the dual bound": "bad token, dual bound",
    }),
    "dual_sign": ("dual_clip", {
        "true gradient": "worst of three, true", "printed window": "worst of three, printed",
        "with the dual bound": "worst of three, dual bound",
    }),
}  # fmt: skip


@pytest.mark.parametrize("entry", SAME_NUMBERS)
def test_numbers_are_those_of_the_counterexamples(entry):
    name, pairs = SAME_NUMBERS[entry]
    numbers, expected = DERIVATIONS[name]().numbers, counterexample(entry)
    for theirs, ours in pairs.items():
        assert number(numbers[ours]) == expected[theirs], (theirs, ours)


#: Derivation, name of its number, the number, places to which it was rounded.
ROUNDED = [
    ("effective_sample_size", "half is left at, sigma = 0.0335", 618, 0),
    ("effective_sample_size", "half is left at, sigma = 0.0387", 463, 0),
    ("effective_sample_size", "half is left at, sigma = 0.0393", 449, 0),
    ("effective_sample_size", "fraction at t = 1000, sigma = 0.0335", 0.326, 3),
    ("effective_sample_size", "fraction at t = 4000, sigma = 0.0335", 0.0112, 4),
    ("std_scale", "c_8, sample std, p = 1/100", 2.44, 2),
    ("std_scale", "c_8, sample std, p = 1/4", 1.895, 3),
    ("std_scale", "c_8, sample std, p = 1/2", 1.736, 3),
    ("std_scale", "share of groups of 8 with equal rewards, p = 1/20", 0.66, 2),
    ("clip_rates", "low, sigma = 0.0335, t = 100", 0.281, 3),
    ("clip_rates", "high, sigma = 0.0335, t = 4000", 0.0054, 4),
    ("clip_rates", "low, sigma = 0.0387, t = 8000", 0.861, 3),
    ("clip_rates", "low, sigma = 0.0393, t = 1000", 0.494, 3),
    ("clipped_target_mass", "sigma = 0.0335, t = 8000", 0.502, 3),
    ("clipped_target_mass", "sigma = 0.0387, t = 100", 0.136, 3),
    ("clipped_target_mass", "sigma = 0.0393, t = 4000", 0.488, 3),
    *(
        ("crossover_times", f"half of {what} clipped, sigma = {spread}", value, 0)
        for what, values in (("A < 0", (1985, 1115, 1048)), ("the A > 0 mass", (7940, 4458, 4192)))
        for spread, value in zip((0.0335, 0.0387, 0.0393), values, strict=True)
    ),
    *(
        ("centered_window", f"{side}, sigma = {spread}", value, 3)
        for side, values in (("low", (0.228, 0.259, 0.262)), ("high", (0.068, 0.098, 0.102)))
        for spread, value in zip((0.0335, 0.0387, 0.0393), values, strict=True)
    ),
    ("centered_window", "pi-mass above, sigma = 0.0335, t = 8000", 0.93, 2),
    ("dual_clip", "clipped under b, sigma = 0.0335, t = 100", 0.189, 3),
    ("dual_clip", "clipped under b, sigma = 0.0393, t = 8000", 0.436, 3),
    *(
        ("drift_by_tails", f"(e^x - 1 - x)/x^2 at x = {x}", value, 2)
        for x, value in (("-1/5", 0.47), ("-1", 0.37), ("-2", 0.28), ("-5", 0.16), ("-10", 0.09))
    ),
    *(
        ("crossover_batch_all_ones", f"n*, H = {h}, b = 1/2, q = 3/5", value, 0)
        for h, value in zip(range(2, 9), (33, 48, 75, 123, 211, 370, 663), strict=True)
    ),
    ("crossover_batch_all_ones", "relative bias, H = 2, b = 1/2, q = 3/5", 0.12, 2),
    ("crossover_batch_all_ones", "relative bias, H = 8, b = 1/2, q = 3/5", 0.49, 2),
]


@pytest.mark.parametrize(("name", "what", "expected", "places"), ROUNDED)
def test_numbers_of_the_paper_scale(name, what, expected, places):
    found = float(sp.N(DERIVATIONS[name]().numbers[what], 30))
    assert abs(found - expected) <= 0.501 * 10.0**-places


# --- against the exact engine ---------------------------------------------------------------------------------------

POINTS = [(F(1, 2), F(3, 4)), (F(1, 3), F(1, 5)), (F(4, 7), F(2, 3))]


@pytest.mark.parametrize(("b", "q"), POINTS)
def test_second_moments(b, q):
    world = independent_tokens([1 - b, b], [1 - q, q], 4)
    spread = ratio_moments(world).variance[1:]
    d = q**2 / b + (1 - q) ** 2 / (1 - b) - 1
    for t in range(1, 5):
        assert result("variance_ratio", "Var(rho_t)", d=d, t=t) == spread[t - 1]
        assert result("variance_ratio", "Var(rho_H) / Var(rho_t)", d=d, t=t, H=4) == spread[3] / spread[t - 1]
        ess = ratio_moments(world).ess_fraction[t]
        assert result("effective_sample_size", "(E_b rho_t)^2 / E_b rho_t^2, shared chi2", d=d, t=t) == ess
    assert result("variance_ratio_limits", "limit of Var(rho_H)/Var(rho_t) as d -> 0", H=12, t=3) == 4


@pytest.mark.parametrize(("b", "p"), POINTS)
def test_error_of_the_product_formula(b, p):
    second = {0: (F(1, 3), F(2, 5)), 1: (F(3, 4), F(1, 2))}
    world = two_step((b, p), second)
    chi2 = [q**2 / c + (1 - q) ** 2 / (1 - c) - 1 for c, q in second.values()]
    true, product_ = ratio_moments(world).variance[2], pf.product_of_marginals(world)[1]
    name = "E_b rho_2^2 - (1 + chi2_1)(1 + chi2_2)"
    assert result("product_formula_error", name, b=b, p=p, c_0=chi2[0], c_1=chi2[1]) == true - product_
    assert true != product_
    assert (
        result("product_formula_error", "Cov_b(r_1, r_2), second token binary, b(1) = b_a and pi(1) = p_a after a") == 0
    )


@pytest.mark.parametrize("p", [F(3, 4), F(1, 3), F(9, 10)])
def test_expected_sample_size(p):
    paths = enumerate_trajectories(independent_tokens([HALF, HALF], [1 - p, p], 3))
    expected = effective_sample_size.expected_pair_ess(paths)
    for t in (1, 2, 3):
        found = result("sample_effective_sample_size", f"E[(w + v)^2 / (w^2 + v^2)], t = {t}", p=p)
        assert found == expected[t - 1]


LEVELS = {"rho_t": "cumulative", "r_t": "token", "rho_H": "sequence", "none": "none"}


@pytest.mark.parametrize(("b", "q"), POINTS)
def test_table_of_ratios(b, q):
    world = outcome_reward.both_ones(b, q, parameters="shared")
    assert result("ratio_table", "grad J", q=q) == policy_gradient(world)[0]
    for ours, level in LEVELS.items():
        for label, advantage, outcome in (("A^pi", "A_target", False), ("R", "one", True)):
            expected = gradient_mean(world, level, advantage, outcome=outcome)[0]
            part = DERIVATIONS["ratio_table"]().part(f"weight {ours} with {label}")
            assert at(part.result, b=b, q=q) == expected


@pytest.mark.parametrize(("u", "v"), [(F(2), F(1, 2)), (F(3), F(1)), (F(2, 3), F(3, 4))])
def test_table_of_ratios_with_roots(u, v):
    b, q = 1 / (1 + u**2), 1 / (1 + v**2)
    paths = enumerate_trajectories(outcome_reward.both_ones(b, q, parameters="shared"))
    for ours, level in (("GSPO", "sequence_mean"), ("rho_t^(1/t)", "cumulative_mean")):
        root = rational_weights(paths, level)
        for label, advantage, values in (
            ("A^pi", paths.advantage("A_target"), {"u": u, "v": v}),
            ("R", outcome_reward.returns(paths), {"b": b, "q": q}),
        ):
            expected = paths.expectation(paths.summed_scores(root * advantage))[0]
            assert result("ratio_table", f"weight {ours} with {label}", **values) == expected


def first_logit(world, level):
    found = gradient_moments(world, level, "one", outcome=True, covariance=True)
    return found.mean[0], found.covariance[0, 0]


@pytest.mark.parametrize(("p", "q", "qb"), [(HALF, F(3, 4), F(1, 4)), (F(2, 5), F(1, 7), F(2, 3))])
def test_outcome_rewards(p, q, qb):
    for name, rule in (("a1 a2", lambda s: s[0] * s[1]), ("1{a1 = a2}", lambda s: int(s[0] == s[1]))):
        policies = two_step((F(3, 8), p), {0: (qb, q), 1: (qb, q)})
        mdp = tree(2, 2, outcome=rule)
        world = one_logit(World(mdp, policies.behavior, policies.target, "position"))
        assert result("outcome_sign", f"true gradient, R = {name}", p=p, q=q) == policy_gradient(world)[0]
        expected = gradient_mean(world, "cumulative", "one", outcome=True)[0]
        assert result("outcome_sign", f"under rho_t, R = {name}", p=p, q_b=qb) == expected
    policies = two_step((p, p), {0: (qb, q), 1: (qb, q)})
    mdp = tree(2, 2, outcome=lambda s: s[0] * s[1])
    world = one_logit(World(mdp, policies.behavior, policies.target, "position"))
    paths = enumerate_trajectories(world)
    for ours, level in (("rho_1", "cumulative"), ("rho_2", "sequence")):
        terms = outcome_reward.only_step(rational_weights(paths, level) * outcome_reward.returns(paths), 0)
        expected = paths.moments(paths.summed_scores(terms)).total_variance
        assert result("outcome_term_variance", f"Var({ours} g_1 R)", p=p, q=q, q_b=qb) == expected


@pytest.mark.parametrize("horizon", [2, 3])
def test_slopes_of_the_bias(horizon):
    """The derivations' slopes for any reward against exact central differences of the engine's bias."""
    b, step = F(2, 5), F(1, 10**5)
    rng = np.random.default_rng(horizon)
    rewards = {s: F(int(rng.integers(-3, 6))) for s in product((0, 1), repeat=horizon)}
    c = F(1, 3)
    values = {"b": b, "c": c} | {"R_" + "".join(map(str, s)): r for s, r in rewards.items()}
    for ours, level, label in (
        ("rho_t", "cumulative", "R"), ("r_t", "token", "R"), ("none", "none", "R"), ("rho_H", "sequence", "R"),
        ("r_t", "token", "A^pi"), ("rho_t", "cumulative", "A^pi"),
    ):  # fmt: skip
        bias = []
        for q in (b + step, b - step):
            world = one_logit(independent_tokens([1 - b, b], [1 - q, q], horizon, outcome=lambda s: rewards[s] - c))
            how = {"advantage": "one", "outcome": True} if label == "R" else {"advantage": "A_target"}
            bias.append(gradient_mean(world, level, **how)[0] - policy_gradient(world)[0])
        expected = b * (1 - b) * (bias[0] - bias[1]) / (2 * step)
        found = result(
            "first_order_half", f"slope of the bias at pi = b, weight {ours} with {label}, H = {horizon}", **values
        )
        assert abs(found - expected) < F(1, 10**7)
        assert (label, ours) in (("A^pi", "rho_t"), ("R", "rho_H")) or found != 0
    root = f"slope of the bias at pi = b, weight GSPO with R, H = {horizon}"
    none = f"slope of the bias at pi = b, weight none with R, H = {horizon}"
    share = 1 - F(1, horizon)
    assert result("first_order_half", root, **values) == share * result("first_order_half", none, **values)


@pytest.mark.parametrize(("b", "q"), POINTS)
def test_batch_size_at_which_errors_cross(b, q):
    world = outcome_reward.both_ones(b, q)
    true = policy_gradient(world)[0]
    mean, prefix = first_logit(world, "cumulative")
    full = first_logit(world, "sequence")[1]
    assert result("crossover_batch", "n*", b=b, q=q) == (full - prefix) / (mean - true) ** 2
    assert result("crossover_batch", "bias of rho_t", b=b, q=q) == mean - true
    shared = outcome_reward.both_ones(b, q, parameters="shared")
    for ours, level in (("rho_t", "cumulative"), ("r_t", "token")):
        expected = gradient_mean(shared, level, "one", outcome=True)[0] - policy_gradient(shared)[0]
        assert result("first_order_half", f"bias of {ours}, R = a1 a2, pi not near b", b=b, q=q) == expected
    for horizon in (2, 5):
        ones = outcome_reward.ones_so_far(b, q, horizon)
        # Two logits a position, which count variances and squared bias twice.
        gradient = policy_gradient(ones)
        moments = {level: gradient_moments(ones, level, "one", outcome=True) for level in ("cumulative", "sequence")}
        bias = ((moments["cumulative"].mean - gradient) ** 2).sum()
        expected = (moments["sequence"].total_variance - moments["cumulative"].total_variance) / bias
        assert result("crossover_batch_all_ones", "n*", b=b, r=q / b, H=horizon) == expected


@pytest.mark.parametrize("q", [F(3, 4), F(1, 3)])
def test_stop_gradient_table(q):
    for label, kind in (("A^pi", "A_target"), ("A^b", "A_behavior"), ("R", None), ("Q^pi", "Q_target")):
        expected = stop_gradient.example_moments(kind, stop_gradient.FORMS, q)
        for ours, (mean, spread) in zip(("stop-gradient", "un-detached"), expected.values(), strict=True):
            part = DERIVATIONS["stop_gradient_table"]().part(f"{ours} with {label}")
            values = {"b": HALF, "q": q}
            assert at(part.result, **values) == mean
            if label == "A^pi":
                assert result("stop_gradient_table", f"variance, {ours} with {label}", **values) == spread


def test_slope_of_the_variances():
    reward = [F(x) for x in (2, -1, 5, 3)]
    world, rewards = any_reward(2, sp.Symbol("b", positive=True), sp.Symbol("q", positive=True))
    values = {rewards[s].name: r for s, r in zip(world.all(), reward, strict=True)}
    for b in (F(1, 3), F(3, 5)):
        expected = summed_gradient.slope(as_numbers(reward, True), as_numbers(b, True), summed_gradient.after_the_first)
        assert result("variance_slope", "d(Var Z - Var Y)/dq at q = b, any reward", b=b, **values) == expected


@pytest.mark.parametrize("p", [F(1, 3), F(3, 4), F(1, 2)])
def test_sampler_of_no_variance(p):
    on_policy = one_logit(independent_tokens([1 - p, p], [1 - p, p], 2, outcome=sum))
    paths = enumerate_trajectories(on_policy)
    behavior = summed_gradient.tree_policy(paths, paths.target_probability * summed_gradient.summed_integrand(paths))
    prefix, full = summed_gradient.variances(World(on_policy.mdp, behavior, on_policy.target, scores=on_policy.scores))
    assert full == 0
    assert result("zero_variance", "Var Y, sum_t rho_t f_t", p=p) == prefix
    assert (prefix == 0) == (p == HALF)


# --- groups, windows, the released loss -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_group_baselines(size):
    """Weight 1 off-policy, where E[Y] is not 0, so that all of the identity is seen."""
    b, q = F(2, 5), F(3, 4)
    paths = enumerate_trajectories(group_advantages.bandit(b, q, (1, 3)))
    terms = group_advantages.weighted_scores(paths, "none")
    probability, rewards = paths.behavior_probability, paths.returns
    values = {
        "m": group_advantages.with_returns(terms, paths)[1],
        "r": paths.expectation(rewards),
        "y": paths.expectation(terms)[1],
    }
    assert values["y"] != 0
    for name, quantity, advantage, extra in (
        ("group_mean", "E[(R_1 - mean_j R_j) Y_1]", group_advantages.centered, {"G": size}),
        ("leave_one_out", "E[(R_1 - mean_{j > 1} R_j) Y_1]", group_advantages.minus_others, {}),
    ):
        shares = group_advantages.group_shares(probability, rewards, size, advantage)
        assert result(name, quantity, **values, **extra) == group_advantages.total(shares, terms)[1]


def test_scale_of_the_standard_deviation():
    for p in (F(1, 10), HALF, F(4, 5)):
        for size, ddof in ((2, 0), (2, 1), (4, 0), (4, 1), (8, 1)):
            exact = std_factor(size, ddof, sp.Rational(p.numerator, p.denominator))
            assert float(sp.N(exact, 20)) == pytest.approx(group_advantages.std_scale(size, float(p), ddof), rel=1e-12)
    paths = enumerate_trajectories(group_advantages.bandit(F(1, 3), F(1, 3)))
    shares = group_advantages.group_shares(paths.behavior_probability, paths.returns, 2, group_advantages.pair_signs)
    assert group_advantages.total(shares, group_advantages.weighted_scores(paths, "none"))[1] == F(2, 9)
    assert std_factor(2, 0, sp.Rational(1, 3)) == 1  # times p (1 - p) = 2/9


def test_three_rewards():
    for rare in (F(1, 4), F(1, 10)):
        world = group_advantages.three_rewards((0, 1, 7), rare)
        paths = enumerate_trajectories(world)
        terms = group_advantages.weighted_scores(paths, "none")
        shares = group_advantages.group_shares(
            paths.behavior_probability, paths.returns, 2, group_advantages.pair_signs
        )
        values = {"alpha": HALF, "beta": HALF - rare}
        true = result("std_sign", "gradient of the second logit", **values, R_1=0, R_2=1, R_3=7)
        assert true == policy_gradient(world)[1]
        found = result("std_sign", "E[(A_1 g_1 + A_2 g_2)/2]", **values)
        assert found == group_advantages.total(shares, terms)[1]


def test_length_and_token_mean():
    paths = enumerate_trajectories(group_advantages.stop_or_go(F(1, 3), F(5, 7)))
    scores = group_advantages.weighted_scores(paths, "none")[:, 1]
    length = group_advantages.response_length(paths)
    values = {"p": HALF, "R_s": F(1, 3), "R_g": F(5, 7)}
    assert result("length_baseline", "grad J", **values) == paths.expectation(paths.returns * scores)
    divided = paths.expectation((paths.returns - F(2, 9)) / length * scores)
    assert result("length_baseline", "E[(1/T)(R - c) g]", **values, c=F(2, 9)) == divided
    paths = enumerate_trajectories(group_advantages.stop_or_go())
    terms = paths.returns[:, None] * group_advantages.weighted_scores(paths, "none")
    numbers = DERIVATIONS["token_mean"]().numbers
    for n in (1, 2, 3, 4, 6):
        found = group_advantages.token_mean(paths.behavior_probability, length, terms, n)[1]
        assert number(numbers[f"n = {n}"]) == found
        assert 0 <= F(1, 24) - found <= F(5, 16) * F(4, n + 1)  # (5/16) J_n


@pytest.mark.parametrize("n", [1, 3, 5])
def test_hot_and_cold(n):
    paths = enumerate_trajectories(drift.hot_or_cold(n + 1))
    expected = variance(paths, drift.log2_ratios(paths).sum(axis=1))
    assert result("hot_and_cold", "Var_b(log2 rho)", n=n) == expected


def test_window_rates_against_the_normal_law():
    positions = np.array(clip_window.POSITIONS)
    for spread in clip_window.SPREADS:
        law = clip_rates.Gaussian(float(spread), float(spread) ** 2 / 2)
        low, high, dual = clip_rates.rates(law, clip_rates.RELEASED, positions)
        numbers = DERIVATIONS["clip_rates"]().numbers
        both = DERIVATIONS["dual_clip"]().numbers
        for k, t in enumerate(positions):
            where = f"sigma = {float(spread)}, t = {t}"
            assert float(sp.N(numbers[f"low, {where}"], 20)) == pytest.approx(low[k], rel=1e-9)
            assert float(sp.N(numbers[f"high, {where}"], 20)) == pytest.approx(high[k], rel=1e-9)
            share = low[k] / 2 + high[k] / 2 + dual[k] / 2
            assert float(sp.N(both[f"clipped under b, {where}"], 20)) == pytest.approx(share, rel=1e-9)
            mass = released_loss.gaussian_tails(float(spread), positions)["high_target"][k]
            found = float(sp.N(DERIVATIONS["clipped_target_mass"]().numbers[where], 20))
            assert found == pytest.approx(mass, rel=1e-9)


def test_rates_of_exactly_normalized_tokens():
    """Sums of many small coins, which have E rho_t = 1 exactly and know of no normal law."""
    spread = float(clip_window.SPREADS[0])
    coins = clip_rates.Coins.even(spread, flips=64)
    low, high, _ = clip_rates.rates(coins, clip_rates.RELEASED, np.array([4000]))
    numbers = DERIVATIONS["clip_rates"]().numbers
    assert float(sp.N(numbers["low, sigma = 0.0335, t = 4000"])) == pytest.approx(low[0], abs=2e-3)
    assert float(sp.N(numbers["high, sigma = 0.0335, t = 4000"])) == pytest.approx(high[0], abs=2e-4)


@pytest.mark.parametrize(("b", "q"), [(HALF, F(3, 4)), (F(1, 5), F(2, 3))])
def test_dual_bound(b, q):
    mdp = tree(2, 1, outcome=lambda s: 1 - s[0])
    world = World(mdp, policy_table(mdp, lambda _: [1 - b, b]), policy_table(mdp, lambda _: [1 - q, q]))
    for quantity, configuration in (
        ("gradient of a bad token's logit, R = 1 for the other, q > b", released_loss.PRINTED),
        ("the same without the bad token's own term, which is above the dual bound", released_loss.RELEASED),
    ):
        assert result("dual_clip", quantity, q=q) == released_loss.exact_gradient(world, configuration.estimator)[1]


def test_numerical_limits():
    numbers = {what: float(sp.N(value, 20)) for what, value in DERIVATIONS["numerical_limits"]().numbers.items()}
    changes = released_loss.PECULIARITIES
    limited = released_loss.mean_with(
        released_loss.overflow_world(16), changes["log-ratio limit"](released_loss.PRINTED)
    )
    clamped = released_loss.mean_with(released_loss.overflow_world(31), changes["token clamp"](released_loss.PRINTED))
    assert limited == pytest.approx(numbers["limit of 10, b = 2^-16"], rel=1e-12)
    assert clamped == pytest.approx(numbers["clamp of 20, b = 2^-31"], rel=1e-9)
    assert numbers["t where the released window reaches 10"] == 40_000
    assert numbers["grad J, q = 1/2"] == float(policy_gradient(released_loss.overflow_world(16))[1])
    assert numbers["right weight after (25, -15)"] == pytest.approx(22026, rel=1e-4)
    assert numbers["weight after (25, -15), clamp 20"] == pytest.approx(148.4, rel=1e-3)


def test_cumulative_ratio_of_the_strings():
    """The symbolic strings against the engine's trajectories, history-dependent policies."""

    def one(who):
        return lambda prefix: sp.Rational(1 + len(prefix) + sum(prefix) + who, 7)

    strings = Strings(3, one(0), one(1), lambda s: sp.Integer(s[0] - 2 * s[1] * s[2]))
    mdp = tree(2, 3, outcome=lambda s: s[0] - 2 * s[1] * s[2])

    def rows(policy):
        return policy_table(mdp, lambda prefix: [1 - number(policy(prefix)), number(policy(prefix))])

    world = World(mdp, rows(strings.b), rows(strings.pi))
    paths = enumerate_trajectories(world)
    rho, advantages = cumulative(paths), {who: paths.advantage(f"A_{who}") for who in ("target", "behavior")}
    for n, string in enumerate(map(tuple, paths.actions.tolist())):
        assert number(strings.chance("behavior", string)) == paths.behavior_probability[n]
        for t in (1, 2, 3):
            assert number(strings.rho(string, t)) == rho[n, t - 1]
            for who, table in advantages.items():
                assert number(strings.advantage(who, string, t)) == table[n, t - 1]
    assert number(strings.expectation(strings.reward).doit()) == paths.expectation(paths.returns)
