r"""The policy-gradient estimators that have a name, each with its formula, source and defaults.

r_t, rho_t and rho_H are the token, cumulative and sequence ratios of `ctpo.ratios`. `RECIPES` has one row per name;
`ctpo estimators` prints it. An entry is an `Estimator` and the aggregation that its source uses; a method that is
nothing but another aggregation has the estimator of the method it changes.

The gates of "ctpo_mean" are those of "ctpo" exactly: dividing log-ratio and window by t changes no comparison, only
the weight. The weight of "lookahead" lies between "ctpo" without a window (0 tokens ahead) and "sequence" (all of
them): with an outcome reward its expectation uses the action value of following the target policy for 16 more tokens
and the behavior policy after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from ctpo._arrays import one_of
from ctpo.clipping import PositionClip, RatioClip
from ctpo.estimators import Estimator

__all__ = ["ESTIMATORS", "RECIPES", "Recipe", "get_estimator"]


@dataclass(frozen=True)
class Recipe:
    """A published method.

    Args:
        estimator: Its coefficients.
        weight: Formula of the ratio.
        window: Window, gate or region, in words.
        aggregation: What its source averages over, in the names of `ctpo.policy_loss`.
        source: Where it is from.
    """

    estimator: Estimator
    weight: str
    window: str
    aggregation: str
    source: str


_RELEASED_CLIP = PositionClip(low=0.025, high=0.05, power=0.5, dual=0.05)
_UNLIMITED: dict[str, Any] = {"max_log_ratio": None, "max_token_log_ratio": None}

_MEAN, _TOKENS = "seq-mean-token-mean", "token-mean"
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "reinforce": Recipe(Estimator("token", form="reinforce"), "1", "none", _MEAN, "Williams (1992)"),
        "grpo": Recipe(Estimator("token", RatioClip(0.2, 0.2)), "r_t", "[0.8, 1.2]", _MEAN, "arXiv:2402.03300"),
        "dapo": Recipe(Estimator("token", RatioClip(0.2, 0.28)), "r_t", "[0.8, 1.28]", _TOKENS, "arXiv:2503.14476"),
        "gspo": Recipe(
            Estimator("sequence_mean", RatioClip(3e-4, 4e-4)),
            "rho_H^(1/H)",
            "[1 - 3e-4, 1 + 4e-4]",
            _MEAN,
            "arXiv:2507.18071",
        ),
        "cispo": Recipe(
            Estimator("token", RatioClip(1.0, 4.0), form="cispo"), "r_t", "cut to [0, 5]", _TOKENS, "arXiv:2506.13585"
        ),
        "sequence": Recipe(
            Estimator("sequence", form="unclipped", **_UNLIMITED), "rho_H", "none", _MEAN, "importance sampling"
        ),
        "ctpo": Recipe(
            Estimator("cumulative", _RELEASED_CLIP),
            "rho_t",
            "exp(-.025 t^.5), exp(.05 t^.5), dual",
            _MEAN,
            "arXiv:2605.07331 (code)",
        ),
        "ctpo_fixed": Recipe(
            Estimator("cumulative", RatioClip(0.5, 4.0)), "rho_t", "[0.5, 5]", _MEAN, "arXiv:2605.07331 (Table 3)"
        ),
        "ctpo_mean": Recipe(
            Estimator("cumulative_mean", replace(_RELEASED_CLIP, power=-0.5)),
            "rho_t^(1/t)",
            "exp(-.025 t^-.5), exp(.05 t^-.5), dual",
            _MEAN,
            "arXiv:2608.01418 (PNPO)",
        ),
        "minpro": Recipe(
            Estimator("min_prefix", RatioClip(0.2, 0.2)), "r_t min_{k<t} r_k", "[0.8, 1.2]", _MEAN, "arXiv:2601.22718"
        ),
        "lookahead": Recipe(
            Estimator("lookahead", form="unclipped", window=16, **_UNLIMITED),
            "rho_min(t+16, H)",
            "none",
            _MEAN,
            "16 tokens past t",
        ),
    }
)
"""Name -> `Recipe`; read-only."""

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType({name: recipe.estimator for name, recipe in RECIPES.items()})
"""Name -> `Estimator`; read-only."""


def get_estimator(estimator: str | Estimator, **changes: Any) -> Estimator:
    """A named estimator, or a given one, with some fields changed.

    Args:
        estimator: A name in `ESTIMATORS`, or an `Estimator`.
        **changes: New values of its fields.

    Returns:
        The estimator.

    Raises:
        ValueError: The name or a field is unknown, or the changed fields do not go together.

    Example:
        >>> get_estimator("ctpo", clip=PositionClip(dual=None)).clip  # the formula as printed in the paper
        PositionClip(low=0.025, high=0.05, power=0.5, dual=None, drift=0.0)
    """
    if not isinstance(estimator, Estimator):
        one_of("estimator", estimator, ESTIMATORS)
        estimator = ESTIMATORS[estimator]
    allowed = [field.name for field in fields(Estimator)]
    for name in changes:
        one_of("changes", name, allowed)
    return replace(estimator, **changes)
