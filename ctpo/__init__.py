"""Importance ratios for off-policy reinforcement learning of language models.

`ctpo.ratios` has the ratios, `ctpo.clipping` their windows, `ctpo.regions` trust regions, `ctpo.estimators` the
policy-gradient coefficients made of them, `ctpo.zoo` those that have a name, `ctpo.advantages` what they are
multiplied by, `ctpo.rollout` the weights for a rollout engine. Importing this package needs NumPy and array-api-compat
only; `ctpo.policy_loss`, the loss for training, imports torch when it is first asked for.
"""

import typing

from ctpo.advantages import doubly_robust, group_relative, leave_one_out, per_decision
from ctpo.clipping import CalibratedClip, PositionClip, RatioClip
from ctpo.estimators import Coefficients, Estimator
from ctpo.ratios import log_ratio, positions
from ctpo.rollout import RolloutCorrection, rollout_correction
from ctpo.zoo import ESTIMATORS, get_estimator

if typing.TYPE_CHECKING:
    from ctpo.losses import PolicyLoss, policy_loss

__version__ = "0.1.0"

__all__ = [
    "ESTIMATORS",
    "CalibratedClip",
    "Coefficients",
    "Estimator",
    "PolicyLoss",
    "PositionClip",
    "RatioClip",
    "RolloutCorrection",
    "__version__",
    "doubly_robust",
    "get_estimator",
    "group_relative",
    "leave_one_out",
    "log_ratio",
    "per_decision",
    "policy_loss",
    "positions",
    "rollout_correction",
]


def __getattr__(name: str) -> typing.Any:
    """What needs torch, imported on first use."""
    if name not in ("PolicyLoss", "policy_loss"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from ctpo import losses
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(f"ctpo.{name} needs torch, which is not installed", name="torch") from None

    return getattr(losses, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
