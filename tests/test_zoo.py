"""The zoo: every published surrogate, written from its formula in torch, against the coefficients by autograd.

A surrogate gets logp (with gradient), behavior_logp `b`, advantages `a` and positions `t`, all of shape (B, T) or
broadcast to it, and gives one term per token, or one per sequence times its length.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import ctpo.estimators
import ctpo.zoo
from ctpo import ESTIMATORS, Estimator, PositionClip, RatioClip, get_estimator
from ctpo.clipping import GammaWeight, ProbabilityShift, SigmoidGate
from ctpo.regions import DivergenceRegion, PrefixBudget, SecondMoment, SequenceRegion
from ctpo.zoo import RECIPES

FLAGS = ("clipped_low", "clipped_high", "clipped_dual", "saturated", "rejected")


def sg(x):
    return x.detach()


def ppo_terms(log_w, advantages, log_low, log_high, log_dual=None):
    """min(w A, clip(w) A), and for A < 0 no lower than exp(log_dual) A."""
    w = torch.exp(log_w)
    clipped = torch.minimum(torch.maximum(w, torch.exp(log_low)), torch.exp(log_high))
    terms = torch.minimum(w * advantages, clipped * advantages)
    if log_dual is not None:
        terms = torch.where(advantages < 0, torch.maximum(terms, torch.exp(log_dual) * advantages), terms)
    return terms


def token_d(logp, b):
    return torch.clamp(logp - b, -20, 20)


def prefix(logp, b):
    """sg[log rho_t] + logp - sg[logp]: only the current token carries a gradient."""
    return sg(torch.cumsum(token_d(logp, b), -1)) + logp - sg(logp)


def fixed(low, high, like):
    return torch.full_like(like, math.log(1 - low)), torch.full_like(like, math.log(1 + high))


def surrogate_ppo(logp, b, a, t):
    return ppo_terms(token_d(logp, b), a, *fixed(0.2, 0.2, b))


def surrogate_dapo(logp, b, a, t):
    return ppo_terms(token_d(logp, b), a, *fixed(0.2, 0.28, b))


def surrogate_ppo_dual(logp, b, a, t):
    return ppo_terms(token_d(logp, b), a, *fixed(0.2, 0.2, b), torch.full_like(b, math.log(3.0)))


def surrogate_gspo(logp, b, a, t):
    """One term per sequence, weighted with its length as a sum over tokens is."""
    log_s = torch.clamp((logp - b).mean(-1, keepdim=True), max=10)
    return ppo_terms(log_s, a[..., :1], *fixed(3e-4, 4e-4, log_s)) * logp.shape[-1]


def surrogate_cispo(logp, b, a, t):
    return sg(torch.clamp(torch.exp(token_d(logp, b)), 0, 5)) * a * logp


def surrogate_ctpo(logp, b, a, t):
    log_rho = torch.clamp(prefix(logp, b), max=10)
    return ppo_terms(log_rho, a, -0.025 * t.sqrt(), 0.05 * t.sqrt(), 0.05 * t.sqrt())


def surrogate_ctpo_printed(logp, b, a, t):
    log_rho = torch.clamp(prefix(logp, b), max=10)
    return ppo_terms(log_rho, a, -0.025 * t.sqrt(), 0.05 * t.sqrt())


def surrogate_ctpo_fixed(logp, b, a, t):
    return ppo_terms(torch.clamp(prefix(logp, b), max=10), a, *fixed(0.5, 4.0, b))


def surrogate_ctpo_mean(logp, b, a, t):
    mean = sg(torch.cumsum(token_d(logp, b), -1) / t) + logp - sg(logp)
    mean = torch.clamp(mean, max=10)
    return ppo_terms(mean, a, -0.025 / t.sqrt(), 0.05 / t.sqrt(), 0.05 / t.sqrt())


def surrogate_minpro(logp, b, a, t):
    """r_t times the smallest earlier ratio, which is held constant."""
    d = token_d(logp, b)
    smallest = torch.cat([torch.zeros_like(d[..., :1]), torch.cummin(d, -1).values[..., :-1]], -1)
    log_w = torch.clamp(sg(d) + logp - sg(logp) + sg(smallest), max=10)
    return ppo_terms(log_w, a, *fixed(0.2, 0.2, b))


def surrogate_sequence(logp, b, a, t):
    return torch.exp((logp - b).sum(-1, keepdim=True)) * a[..., :1]


def surrogate_lookahead(logp, b, a, t):
    """rho_{t+16} is a constant to token t but for the ratio of token t itself."""
    rho = torch.exp(torch.cumsum(logp - b, -1))
    ahead = rho[..., [min(i + 16, logp.shape[-1] - 1) for i in range(logp.shape[-1])]]
    r = torch.exp(logp - b)
    return sg(ahead / r) * r * a


def surrogate_reinforce(logp, b, a, t):
    return a * logp


def ratio(logp, b):
    return torch.exp(token_d(logp, b))


def surrogate_gppo(logp, b, a, t):
    """PPO's minimum with a clipped branch that keeps the gradient of its ratio, scaled to the bound."""
    r = ratio(logp, b)
    kept = r / sg(r)
    clipped = torch.where(sg(r) > 1.2, 1.2 * kept, torch.where(sg(r) < 0.8, 0.8 * kept, r))
    return torch.minimum(r * a, clipped * a)


def surrogate_gmpo(logp, b, a, t):
    """Geometric mean of ratios cut on the side of PPO; one term per sequence."""
    d = logp - b
    cut = torch.where(a > 0, torch.clamp(d, max=0.4), torch.where(a < 0, torch.clamp(d, min=-0.4), d))
    return torch.exp(cut.mean(-1, keepdim=True)) * a[..., :1] * logp.shape[-1]


def surrogate_sapo(logp, b, a, t):
    tau = torch.where(a > 0, torch.ones_like(a), 1.05)
    return 4 / tau * torch.sigmoid(tau * (ratio(logp, b) - 1)) * a


def surrogate_vespo(logp, b, a, t):
    log_w = torch.clamp((logp - b).sum(-1, keepdim=True), max=10)
    positive = torch.exp(3 + 2 * log_w - 3 * torch.exp(log_w))
    negative = torch.exp(2 + 3 * log_w - 2 * torch.exp(log_w))
    return sg(torch.where(a >= 0, positive, negative)) * a * logp


def surrogate_topr(logp, b, a, t):
    w = torch.exp((logp - b).sum(-1, keepdim=True))
    return sg(torch.where(a >= 0, 1.0, torch.clamp(w, max=1.0))) * a * logp


def surrogate_tic_grpo(logp, b, a, t):
    """The likelihood ratio of the whole sequence, clipped from above only; one term per sequence."""
    w = torch.exp(torch.clamp((logp - b).sum(-1, keepdim=True), max=10))
    return torch.minimum(w * a[..., :1], torch.clamp(w, max=1.2) * a[..., :1])


def surrogate_cfpo(logp, b, a, t):
    r = ratio(logp, b)
    return r * a - a.abs() * (r - 1) ** 2 / (2 * 0.2)


def surrogate_drpo(logp, b, a, t):
    r = ratio(logp, b)
    return r * a - a.abs() / (2 * 12.5) * torch.exp(b) * (r - 1) ** 2


def surrogate_dppo_tv(logp, b, a, t):
    shift = torch.exp(logp) - torch.exp(b)
    kept = torch.where(a > 0, shift <= 0.2, shift >= -0.2)
    return sg(torch.clamp(ratio(logp, b), max=20.0) * kept) * a * logp


def surrogate_dppo_kl(logp, b, a, t):
    p, q = torch.exp(logp), torch.exp(b)
    kl = q * (b - logp) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    kept = (kl <= 0.05) | torch.where(a > 0, p <= q, p >= q)
    return sg(torch.clamp(ratio(logp, b), max=20.0) * kept) * a * logp


def surrogate_cppo(logp, b, a, t):
    """Algorithm 1 of the paper, token after token."""
    size = sg(torch.abs(torch.exp(logp) - torch.exp(b)))
    length = logp.shape[-1]
    floor = torch.clamp(torch.quantile(size, 0.9, dim=-1), 0.02, 0.04)
    spent = weights = torch.zeros_like(floor)
    kept = []
    for k in range(length):
        w = 1 - (1 - 0.8) / (length - 1) * k
        limit = torch.clamp(0.15 + floor * weights - spent, max=0.15)
        back = a[:, k] * (ratio(logp, b)[:, k] - 1) <= 0
        kept.append(back | (w * size[:, k] <= limit))
        spent, weights = spent + w * size[:, k], weights + w
    return torch.stack(kept, -1) * ratio(logp, b) * a


def surrogate_m2po(logp, b, a, t):
    """Drop the largest (log r)^2 of the tokens that move away until the mean is at most 0.04."""
    d = sg(logp - b)
    away = torch.nonzero(((a > 0) & (d > 0)) | ((a < 0) & (d < 0))).tolist()
    left = sorted(((d[i, j].item() ** 2, i, j) for i, j in away), reverse=True)
    kept = torch.ones_like(d)
    while left and sum(square for square, _, _ in left) / len(left) > 0.04:
        _, i, j = left.pop(0)
        kept[i, j] = 0
    return kept * ratio(logp, b) * a


def k2(d):
    return d**2 / 2


def k3(d):
    return torch.exp(d) - 1 - d


def surrogate_trm_max(logp, b, a, t):
    kept = k2(logp - b).amax(-1, keepdim=True) <= 2.0
    return sg(kept) * ratio(logp, b) * a


def surrogate_trm_mean(logp, b, a, t):
    kept = k3(logp - b).mean(-1, keepdim=True) <= 0.01
    return sg(kept) * ratio(logp, b) * a


def surrogate_opsm(logp, b, a, t):
    off = (b - logp).mean(-1, keepdim=True) > 0.1
    return torch.where((a < 0) & off, 0.0, surrogate_ppo(logp, b, a, t))


def surrogate_pnpo(logp, b, a, t):
    mean = torch.clamp(sg(torch.cumsum(token_d(logp, b), -1) / t) + logp - sg(logp), max=10)
    g = torch.exp(mean)
    return torch.where((sg(g) >= 0.8) & (sg(g) <= 1.2), g, 0.0) * a


def surrogate_minpro_cispo(logp, b, a, t):
    d = token_d(logp, b)
    smallest = torch.cat([torch.zeros_like(d[..., :1]), torch.cummin(d, -1).values[..., :-1]], -1)
    return sg(torch.clamp(torch.exp(torch.clamp(smallest + d, max=10)), 0.8, 1.2)) * a * logp


def surrogate_nfpo(logp, b, a, t):
    """r_t times the ratios of the next three tokens, which are held constant."""
    d = token_d(logp, b)
    padded = torch.nn.functional.pad(sg(d), (0, 3))
    later = sum(padded[:, k : k + logp.shape[-1]] for k in (1, 2, 3))
    shift = torch.exp(logp) - torch.exp(b)
    kept = torch.where(a > 0, shift <= 0.2, shift >= -0.2)
    log_w = torch.clamp(sg(d) + logp - sg(logp) + later, max=10)
    return sg(kept) * torch.exp(log_w) * a


def surrogate_gspo_token(logp, b, a, t):
    """One ratio of the sequence, in which every token carries the gradient of its own probability."""
    mean = (logp - b).mean(-1, keepdim=True)
    return ppo_terms(torch.clamp(sg(mean) + logp - sg(logp), max=10), a, *fixed(3e-4, 4e-4, b))


SURROGATES = {
    "reinforce": surrogate_reinforce,
    "grpo": surrogate_ppo,
    "ppo": surrogate_ppo_dual,
    "dapo": surrogate_dapo,
    "gspo": surrogate_gspo,
    "gspo_token": surrogate_gspo_token,
    "cispo": surrogate_cispo,
    "gppo": surrogate_gppo,
    "gmpo": surrogate_gmpo,
    "sapo": surrogate_sapo,
    "vespo": surrogate_vespo,
    "topr": surrogate_topr,
    "tic_grpo": surrogate_tic_grpo,
    "cfpo": surrogate_cfpo,
    "drpo": surrogate_drpo,
    "dppo_tv": surrogate_dppo_tv,
    "dppo_kl": surrogate_dppo_kl,
    "cppo": surrogate_cppo,
    "m2po": surrogate_m2po,
    "trm_max": surrogate_trm_max,
    "trm_mean": surrogate_trm_mean,
    "opsm": surrogate_opsm,
    "sequence": surrogate_sequence,
    "ctpo": surrogate_ctpo,
    "ctpo as printed": surrogate_ctpo_printed,
    "ctpo_fixed": surrogate_ctpo_fixed,
    "ctpo_mean": surrogate_ctpo_mean,
    "pnpo": surrogate_pnpo,
    "minpro": surrogate_minpro,
    "minpro_cispo": surrogate_minpro_cispo,
    "nfpo": surrogate_nfpo,
    "lookahead": surrogate_lookahead,
}
VARIANTS = {"ctpo as printed": get_estimator("ctpo", clip=PositionClip(dual=None))}
# Surrogates of one term per sequence, times its length; those that are not sum over its tokens.
ONE_TERM = {"gspo": 1, "gmpo": 1, "sequence": 40, "tic_grpo": 40}
ONE_ADVANTAGE = (*ONE_TERM, "vespo", "topr", "trm_max", "trm_mean")
UNLIMITED = ("sequence", "lookahead")
OF_PROBABILITIES = ("drpo", "dppo_tv", "dppo_kl", "cppo", "nfpo")  # which are at most 1
SCALES = (0.03, 0.1, 0.4, 6.0)


def example(name: str, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logp, behavior_logp and advantages of shape (24, 40), some tokens beyond the limits at the largest scale."""
    rng = np.random.default_rng(20260507)
    b = torch.asarray(-rng.exponential(1.0, (24, 40)))
    d = torch.asarray(rng.normal(0.0, scale, (24, 40)))
    if name in UNLIMITED:
        d = torch.clamp(d, -0.5, 0.5)  # twelve digits are compared
    elif scale > 1:
        d[:, ::7] *= 5.0
    if name.startswith("trm"):
        d *= torch.logspace(-2.5, 0, 24, dtype=torch.float64)[:, None]  # else no sequence is kept
    logp = torch.clamp(b + d, max=0.0) if name in OF_PROBABILITIES else b + d
    a = torch.asarray(rng.choice([-1.5, -0.5, 0.0, 0.7, 2.0], (24, 1 if name in ONE_ADVANTAGE else 40)))
    return logp, b, a.expand(24, 40)


def estimator_of(name: str) -> Estimator:
    return VARIANTS.get(name) or ESTIMATORS[name]


def test_every_named_estimator_has_its_surrogate():
    assert set(SURROGATES) == set(ESTIMATORS) | set(VARIANTS)


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("scale", SCALES)
def test_coefficients_equal_autograd_of_the_published_surrogate(name, scale):
    logp, b, a = example(name, scale)
    logp.requires_grad_()
    t = torch.arange(1, 41, dtype=torch.float64)
    terms = SURROGATES[name](logp, b, a, t)
    (gradient,) = torch.autograd.grad(terms.sum(), logp)
    found = estimator_of(name).coefficients(logp.detach(), b, a)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found.weight * a, gradient, **close)
    value, terms = found.value, terms.detach()
    if name in ONE_TERM:
        value, terms = value.sum(-1, keepdim=True), terms * ONE_TERM[name]
    torch.testing.assert_close(value, terms, **close)
    assert found.weight.count_nonzero() > 0


@pytest.mark.parametrize("name", SURROGATES)
def test_the_comparison_meets_every_bound_gate_and_region(name):
    """It says nothing about a flag that never comes up, nor about a number that could be another."""
    estimator = estimator_of(name)
    results = [estimator.coefficients(*example(name, scale)) for scale in SCALES]
    expected = dict.fromkeys(FLAGS, False)
    if estimator.form not in ("sapo", "vespo", "reinforce", "unclipped"):
        shift = isinstance(estimator.clip, ProbabilityShift)  # by 12.5: no probability goes that far
        lower = estimator.form != "topr" and getattr(estimator.clip, "low", 0.0) < 1
        expected |= {"clipped_low": lower and not shift, "clipped_high": not shift}
        expected["clipped_dual"] = getattr(estimator.clip, "dual", None) is not None
    within = estimator.level == "sequence_mean" or name in UNLIMITED  # no mean of 40 tokens is above 10
    expected["saturated"] = estimator.form != "reinforce" and not within
    expected["rejected"] = estimator.region is not None
    for flag, comes_up in expected.items():
        met = sum(int(getattr(found, flag).sum()) for found in results)
        assert (met > 3) == comes_up, flag
    assert sum(int((found.weight != 0).sum()) for found in results) > 100
    for part in ("clip", "region"):
        numbers = getattr(estimator, part)
        for field in () if numbers is None else dataclasses.fields(numbers):
            value = getattr(numbers, field.name)
            if isinstance(value, float) and value != 0:
                changed = dataclasses.replace(numbers, **{field.name: 0.5 * value})
                other = dataclasses.replace(estimator, **{part: changed})
                again = [other.coefficients(*example(name, scale)) for scale in SCALES]
                both = zip(results, again, strict=True)
                same = [torch.equal(x.weight, y.weight) and torch.equal(x.value, y.value) for x, y in both]
                assert not all(same), field.name


# What follows from the formulas.


def test_forms_that_agree_where_no_bound_acts():
    logp, b, a = example("grpo", 0.03)
    plain = Estimator("token", form="unclipped").coefficients(logp, b, a)
    wide = RatioClip(0.9, 9.0)
    for form in ("ppo", "gppo", "cispo", "reject"):
        found = Estimator("token", wide, form).coefficients(logp, b, a)
        torch.testing.assert_close(found.weight, plain.weight)
    # A parabola without end, and geometric means of ratios that nothing cuts.
    soft = Estimator("token", RatioClip(1.0, math.inf), "cfpo").coefficients(logp, b, torch.clamp(a, min=0.0))
    torch.testing.assert_close(soft.weight, plain.weight)
    mean = Estimator("sequence_mean", form="unclipped").coefficients(logp, b, a)
    gmpo = Estimator("sequence_mean", wide, "gmpo").coefficients(logp, b, a)
    torch.testing.assert_close(gmpo.weight, mean.weight)


def test_gppo_differs_from_ppo_only_where_ppo_has_no_gradient():
    logp, b, a = example("gppo", 0.4)
    ppo, gppo = ESTIMATORS["grpo"].coefficients(logp, b, a), ESTIMATORS["gppo"].coefficients(logp, b, a)
    assert torch.equal(ppo.value, gppo.value)
    gone = ppo.clipped_low | ppo.clipped_high
    assert gone.any()
    assert torch.equal(ppo.weight[~gone], gppo.weight[~gone])
    torch.testing.assert_close(gppo.weight[ppo.clipped_low], torch.full_like(gppo.weight[ppo.clipped_low], 0.8))
    torch.testing.assert_close(gppo.weight[ppo.clipped_high], torch.full_like(gppo.weight[ppo.clipped_high], 1.2))


def test_cfpo_has_no_gradient_at_the_bound_of_ppo_and_reverses_beyond():
    clip = PositionClip(0.1, 0.2, dual=None)
    log_low, log_high, _ = clip.bounds(np.arange(1.0, 5.0))
    estimator, zero = Estimator("token", clip, "cfpo"), np.zeros(4)
    for bound, sign in ((log_low, -1.0), (log_high, 1.0)):
        at, inside, beyond = (estimator.coefficients(k * bound, zero, np.full(4, sign)) for k in (1.0, 0.9, 1.1))
        np.testing.assert_allclose(at.weight, 0.0, atol=1e-14)
        assert (inside.weight > 0).all()
        assert (beyond.weight < 0).all()
        # The value is largest there.
        assert (at.value > inside.value).all()
        assert (at.value > beyond.value).all()


def test_drpo_is_dppo_with_a_gradient_that_fades():
    """With the thresholds of DPPO both end at the same change of probability."""
    q, low, high = np.array([0.2, 0.5, 0.9]), 0.03, 0.05
    soft = Estimator("token", ProbabilityShift(low, high), "cfpo")
    hard = Estimator("token", form="unclipped", region=DivergenceRegion(low, high))
    for change in (-low, high):
        a = np.full(3, np.sign(change))
        found = soft.coefficients(np.log(q + change), np.log(q), a)
        np.testing.assert_allclose(found.weight, 0.0, atol=1e-12)
        for scale, kept in ((0.99, True), (1.01, False)):
            logp = np.log(q + scale * change)
            assert (hard.coefficients(logp, np.log(q), a).rejected != kept).all()
            assert ((soft.coefficients(logp, np.log(q), a).weight > 0) == kept).all()


def test_sapo_and_vespo_are_largest_near_one():
    logp = np.linspace(-4.0, 4.0, 401)
    zero = np.zeros_like(logp)
    for sign in (1.0, -1.0):
        sapo = ESTIMATORS["sapo"].coefficients(logp, zero, np.full_like(logp, sign))
        assert 0 <= logp[np.argmax(sapo.weight)] < 1
        assert sapo.weight[200] == 1.0
        vespo = Estimator("token", GammaWeight(), "vespo").coefficients(logp, zero, np.full_like(logp, sign))
        peak = 2 / 3 if sign > 0 else 3 / 2
        assert np.exp(logp[np.argmax(vespo.weight)]) == pytest.approx(peak, rel=0.02)
        assert vespo.weight[200] == 1.0


def test_a_form_without_gradient_of_the_ratio_is_cut_but_never_gated_by_the_limits():
    logp, b = torch.tensor([[25.0, -25.0, 12.0]], dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    wide = Estimator("token", RatioClip(1.0, math.inf), "cispo").coefficients(logp, b, one)
    torch.testing.assert_close(wide.weight, torch.exp(torch.tensor([[20.0, -20.0, 12.0]], dtype=torch.float64)))
    assert wide.saturated.tolist() == [[True, True, False]]
    prefix = Estimator("cumulative", RatioClip(1.0, math.inf), "cispo").coefficients(logp, b, one)
    torch.testing.assert_close(prefix.weight, torch.exp(torch.tensor([[10.0, 0.0, 10.0]], dtype=torch.float64)))
    assert prefix.saturated.tolist() == [[True, True, True]]
    topr = ESTIMATORS["topr"].coefficients(logp, b, -one)
    assert (topr.weight.tolist(), topr.saturated.tolist()) == ([[1.0] * 3], [[True] * 3])
    gone = wide.weight.new_tensor([[-math.inf, -1.0, -1.0]])
    for name in ("cispo", "vespo", "topr", "minpro_cispo", "dppo_tv"):
        found = ESTIMATORS[name].coefficients(gone, torch.full_like(gone, -1.0), one)
        assert found.weight[0, 0] == 0
        assert torch.isfinite(found.value).all()


def test_gmpo_cuts_no_masked_token():
    """With a drifting window 0, which stands at masked places, lies outside of it."""
    estimator = Estimator("sequence_mean", PositionClip(0.01, 0.01, dual=None, drift=0.2), "gmpo")
    logp, mask = np.array([[-0.3, 9.0, -0.5]]), np.array([[True, False, True]])
    with_gap = estimator.coefficients(logp, np.zeros_like(logp), np.array([1.0]), mask)
    without = estimator.coefficients(logp[:, ::2], np.zeros((1, 2)), np.array([1.0]))
    np.testing.assert_array_equal(with_gap.weight[:, ::2], without.weight)


def test_decoupled_ppo_is_grpo_times_the_weight_of_a_correction():
    """(prox / b) min(r A, clip(r) A) with r = pi / prox: its gradient is the weight times grpo's, from prox."""
    rng = np.random.default_rng(5)
    b = torch.asarray(-rng.exponential(1.0, (8, 40)))
    prox = b + torch.asarray(rng.normal(0.0, 0.3, (8, 40)))
    logp = (prox + torch.asarray(rng.normal(0.0, 0.3, (8, 40)))).requires_grad_()
    a = torch.asarray(rng.choice([-1.0, 1.0], (8, 40)))
    terms = torch.exp(prox - b) * surrogate_ppo(logp, prox, a, None)
    (gradient,) = torch.autograd.grad(terms.sum(), logp)
    found = RECIPES["decoupled_ppo"].estimator.coefficients(logp.detach(), prox, a)
    weight = torch.exp(prox - b)
    torch.testing.assert_close(weight * found.weight * a, gradient, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight * found.value, terms.detach(), rtol=1e-12, atol=1e-12)


# The registry.


def test_the_registry_is_the_documented_one():
    off = {"max_log_ratio": None, "max_token_log_ratio": None}
    released = PositionClip(low=0.025, high=0.05, power=0.5, dual=0.05)
    tv, kl = DivergenceRegion(0.2, 0.2, "tv"), DivergenceRegion(0.05, 0.05, "kl")
    gspo = Estimator("sequence_mean", RatioClip(3e-4, 4e-4))
    free = {"form": "unclipped"}
    assert dict(ESTIMATORS) == {
        "reinforce": Estimator("token", None, "reinforce"),
        "grpo": Estimator("token", RatioClip(0.2, 0.2)),
        "ppo": Estimator("token", RatioClip(0.2, 0.2, 3.0)),
        "dapo": Estimator("token", RatioClip(0.2, 0.28)),
        "gspo": gspo,
        "gspo_token": gspo,
        "cispo": Estimator("token", RatioClip(1.0, 4.0), "cispo"),
        "gppo": Estimator("token", RatioClip(0.2, 0.2), "gppo"),
        "gmpo": Estimator("sequence_mean", PositionClip(0.4, 0.4, 0.0, None), "gmpo"),
        "sapo": Estimator("token", SigmoidGate(1.0, 1.05), "sapo"),
        "vespo": Estimator("sequence", GammaWeight(2.0, 3.0, 3.0, 2.0), "vespo"),
        "topr": Estimator("sequence", None, "topr"),
        "tic_grpo": Estimator("sequence", RatioClip(1.0, 0.2)),
        "cfpo": Estimator("token", RatioClip(0.2, 0.2), "cfpo"),
        "drpo": Estimator("token", ProbabilityShift(12.5, 12.5), "cfpo"),
        "dppo_tv": Estimator("token", RatioClip(1.0, 19.0), "cispo", region=tv),
        "dppo_kl": Estimator("token", RatioClip(1.0, 19.0), "cispo", region=kl),
        "cppo": Estimator("token", **free, region=PrefixBudget(0.15, 0.02, 0.8, True)),
        "m2po": Estimator("token", **free, region=SecondMoment(0.04)),
        "trm_max": Estimator("token", **free, region=SequenceRegion(2.0, "k2", "max")),
        "trm_mean": Estimator("token", **free, region=SequenceRegion(0.01, "k3", "mean")),
        "opsm": Estimator("token", RatioClip(0.2, 0.2), region=SequenceRegion(0.1, "k1", "mean", True)),
        "sequence": Estimator("sequence", None, "unclipped", **off),
        "ctpo": Estimator("cumulative", released),
        "ctpo_fixed": Estimator("cumulative", RatioClip(0.5, 4.0)),
        "ctpo_mean": Estimator("cumulative_mean", PositionClip(0.025, 0.05, -0.5, 0.05)),
        "pnpo": Estimator("cumulative_mean", RatioClip(0.2, 0.2), "reject"),
        "minpro": Estimator("min_prefix", RatioClip(0.2, 0.2)),
        "minpro_cispo": Estimator("min_prefix", RatioClip(0.2, 0.2), "cispo"),
        "nfpo": Estimator("forward", None, "unclipped", 4, region=tv),
        "lookahead": Estimator("lookahead", None, "unclipped", 16, **off),
    }
    with pytest.raises(TypeError, match="does not support item assignment"):
        ESTIMATORS["mine"] = ESTIMATORS["ctpo"]  # type: ignore[index]


def test_rows_without_an_estimator_of_their_own_name_another():
    for name, other in (("dr_grpo", "grpo"), ("luspo", "gspo"), ("decoupled_ppo", "grpo")):
        assert name not in ESTIMATORS
        assert RECIPES[name].estimator is RECIPES[other].estimator
        assert f'estimator "{other}"' in RECIPES[name].note
        with pytest.raises(
            ValueError, match=f"estimator must have coefficients of its own; got '{name}': estimator \"{other}\""
        ):
            get_estimator(name)
    assert [name for name in RECIPES if name in ESTIMATORS] == list(ESTIMATORS)
    assert len(RECIPES) == len(ESTIMATORS) + 3
    assert RECIPES["dr_grpo"].aggregation == "seq-mean-token-sum-norm"
    assert RECIPES["luspo"].aggregation == "seq-mean-token-sum"


def test_every_recipe_says_what_a_reader_needs():
    for name, recipe in RECIPES.items():
        assert recipe.aggregation in (
            "token-mean",
            "seq-mean-token-mean",
            "seq-mean-token-sum",
            "seq-mean-token-sum-norm",
        ), name
        for text in (recipe.weight, recipe.window, recipe.source):
            assert text, name
            assert text == text.strip()
    for form in ctpo.estimators.Form.__args__:
        assert f'    * "{form}": ' in Estimator.__doc__
        assert form in {recipe.estimator.form for recipe in RECIPES.values()}
