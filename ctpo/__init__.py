"""Importance ratios for off-policy reinforcement learning of language models.

`ctpo.ratios` has the ratios, `ctpo.clipping` their windows, `ctpo.estimators` the policy-gradient
coefficients made of both, `ctpo.advantages` what they are multiplied by. Importing this package needs NumPy
and array-api-compat only.
"""

from ctpo.advantages import doubly_robust, group_relative, leave_one_out, per_decision
from ctpo.clipping import CalibratedClip, PositionClip, RatioClip
from ctpo.estimators import ESTIMATORS, Coefficients, Estimator, get_estimator
from ctpo.ratios import log_ratio, positions

__version__ = "0.1.0"

__all__ = [
    "ESTIMATORS",
    "CalibratedClip",
    "Coefficients",
    "Estimator",
    "PositionClip",
    "RatioClip",
    "__version__",
    "doubly_robust",
    "get_estimator",
    "group_relative",
    "leave_one_out",
    "log_ratio",
    "per_decision",
    "positions",
]
