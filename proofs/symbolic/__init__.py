"""Closed forms of the claims, each derived from its definition by SymPy, every step checked.

`CLAIMS` names the derivations and the claims they belong to; `python -m proofs.symbolic [NAME ...]` prints them.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Name of every derivation -> ids of the claims that it is about.
CLAIMS: Mapping[str, tuple[str, ...]] = {
    "product_formula_error": ("2.general", "2.product", "2.uncorrelated"),
    "variance_ratio": ("2r.bounds",),
    "variance_ratio_limits": ("2r.limit",),
    "ratio_table": ("3.table", "3.token", "3.gspo"),
    "outcome_sign": ("4.unbiased", "4.expectation"),
    "outcome_term_variance": ("4.variance",),
    "first_order_half": ("4.first_order",),
    "crossover_batch": ("4.crossover",),
    "crossover_batch_all_ones": ("4.crossover",),
    "zero_variance": ("5.ordered", "5.direction", "5.zero_variance"),
    "variance_slope": ("5.slope",),
    "group_mean": ("6.mean", "6.baseline_off_policy"),
    "leave_one_out": ("6.leave_one_out", "6.baseline_off_policy"),
    "std_scale": ("6.std_binary",),
    "std_sign": ("6.std_sign",),
    "length_baseline": ("6.length",),
    "token_mean": ("6.token_mean",),
    "hot_and_cold": ("7.superlinear", "7.variance"),
    "forced_drift": ("7.forced",),
    "drift_by_tails": ("7.forced", "7.drift"),
    "clip_rates": ("7.rates", "7.window"),
    "clipped_target_mass": ("7.pi_mass",),
    "crossover_times": ("7.crossover",),
    "power_windows": ("7.power",),
    "centered_window": ("7.centered",),
    "effective_sample_size": ("8.scale", "8.population"),
    "sample_effective_sample_size": ("8.batch", "8.sample"),
    "stop_gradient_table": ("9.target_advantage", "9.behavior_advantage", "9.outcome", "9.action_value"),
    "dual_clip": ("10.dual",),
}
