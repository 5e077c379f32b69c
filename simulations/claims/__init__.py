"""The claims about importance ratios, each with its check, its verdict and a control that must fail."""

from __future__ import annotations

from simulations.claims import (
    clip_rates,
    clipping_bias,
    drift,
    effective_sample_size,
    estimator_grid,
    gradient_bias,
    group_advantages,
    martingale,
    noise_floor,
    outcome_reward,
    product_formula,
    real_model,
    released_loss,
    rollout_correction,
    stop_gradient,
    summed_gradient,
    trained_on,
)
from simulations.claims.registry import Claim, Context, Evidence, Outcome, verify

CLAIMS: dict[str, Claim] = {
    claim.id: claim
    for module in (
        martingale,
        product_formula,
        gradient_bias,
        estimator_grid,
        outcome_reward,
        summed_gradient,
        group_advantages,
        clipping_bias,
        drift,
        clip_rates,
        effective_sample_size,
        stop_gradient,
        released_loss,
        rollout_correction,
        noise_floor,
        trained_on,
        real_model,
    )
    for claim in module.CLAIMS
}

__all__ = ["CLAIMS", "Claim", "Context", "Evidence", "Outcome", "verify"]
