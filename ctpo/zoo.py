r"""The policy-gradient estimators that have a name, each with its formula, source and defaults.

With pi, b and A the target policy, the behavior policy and the advantage: r_t, rho_t and rho_H are the token,
cumulative and sequence ratios of `ctpo.ratios`, and [lo, hi] is a clip window. `RECIPES` has one row per published
method; ``ctpo estimators`` prints it. `ESTIMATORS` has those that are an `Estimator` of their own: a method that only
averages otherwise, or multiplies the weights of a rollout correction, has the estimator of the method it changes.

The gates of "ctpo_mean" are those of "ctpo" exactly: dividing log-ratio and window by t changes no comparison, only
the weight. The weight of "lookahead" lies between "ctpo" without a window (0 tokens ahead) and "sequence" (all of
them): with an outcome reward its expectation uses the action value of following the target policy for 16 more tokens
and the behavior policy after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal

from ctpo._arrays import one_of
from ctpo.clipping import GammaWeight, PositionClip, ProbabilityShift, RatioClip, SigmoidGate
from ctpo.estimators import Estimator
from ctpo.regions import DivergenceRegion, PrefixBudget, SecondMoment, SequenceRegion

__all__ = ["ESTIMATORS", "RECIPES", "Recipe", "get_estimator"]


@dataclass(frozen=True)
class Recipe:
    """A published method.

    Args:
        estimator: Its coefficients.
        weight: Formula of the weight.
        window: Window, gate or region, in words.
        aggregation: What its source averages over, in the names of `ctpo.policy_loss`; "seq-mean-token-mean" if the
            source says nothing.
        source: Where it is from.
        note: Where it differs from its source or leaves something open.
    """

    estimator: Estimator
    weight: str
    window: str
    aggregation: str
    source: str
    note: str = ""


_RELEASED_CLIP = PositionClip(low=0.025, high=0.05, power=0.5, dual=0.05)
_UNLIMITED: dict[str, Any] = {"max_log_ratio": None, "max_token_log_ratio": None}
_GRPO = Estimator("token", RatioClip(0.2, 0.2))
_GSPO = Estimator("sequence_mean", RatioClip(3e-4, 4e-4))

_MEAN, _TOKENS = "seq-mean-token-mean", "token-mean"
_SUM, _SCALED_SUM = "seq-mean-token-sum", "seq-mean-token-sum-norm"

# Rows whose coefficients are those of another row.
_SAME_COEFFICIENTS = ("dr_grpo", "luspo", "decoupled_ppo")


def _dppo(kind: Literal["tv", "kl"], threshold: float, words: str, note: str) -> Recipe:
    region = DivergenceRegion(threshold, threshold, kind)
    estimator = Estimator("token", RatioClip(1.0, 19.0), form="cispo", region=region)
    return Recipe(estimator, "min(r_t, 20), constant", words, _MEAN, "arXiv:2602.04879", note)


def _trm(threshold: float, estimate: Literal["k2", "k3"], statistic: Literal["mean", "max"], note: str) -> Recipe:
    region = SequenceRegion(threshold, estimate, statistic)
    words = f"sequences with {statistic} {estimate} > {threshold:g} dropped"
    return Recipe(Estimator("token", form="unclipped", region=region), "r_t", words, _MEAN, "arXiv:2512.23075", note)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "reinforce": Recipe(Estimator("token", form="reinforce"), "1", "none", _MEAN, "Williams (1992)"),
        "grpo": Recipe(_GRPO, "r_t", "[0.8, 1.2]", _MEAN, "arXiv:2402.03300"),
        "ppo": Recipe(
            Estimator("token", RatioClip(0.2, 0.2, dual=3.0)),
            "r_t",
            "[0.8, 1.2], at most 3 if A < 0",
            _TOKENS,
            "arXiv:1707.06347, arXiv:1912.09729",
            "dual clip as in verl's default loss",
        ),
        "dr_grpo": Recipe(
            _GRPO,
            "r_t",
            "[0.8, 1.2]",
            _SCALED_SUM,
            "arXiv:2503.20783",
            'estimator "grpo"; the aggregation and advantages without a standard deviation are the method',
        ),
        "dapo": Recipe(Estimator("token", RatioClip(0.2, 0.28)), "r_t", "[0.8, 1.28]", _TOKENS, "arXiv:2503.14476"),
        "decoupled_ppo": Recipe(
            _GRPO,
            "r_t",
            "[0.8, 1.2]",
            _MEAN,
            "arXiv:2505.24298 (AReaL)",
            'estimator "grpo" with the proximal policy as behavior policy, times the weights pi_prox / b of a '
            "token-level rollout correction",
        ),
        "gspo": Recipe(_GSPO, "rho_H^(1/H)", "[1 - 3e-4, 1 + 4e-4]", _MEAN, "arXiv:2507.18071"),
        "gspo_token": Recipe(
            _GSPO,
            "rho_H^(1/H)",
            "[1 - 3e-4, 1 + 4e-4]",
            _MEAN,
            "arXiv:2507.18071, section 4.3",
            "the same coefficients as gspo; with one advantage per token the gate is the token's own",
        ),
        "luspo": Recipe(
            _GSPO,
            "rho_H^(1/H)",
            "[1 - 3e-4, 1 + 4e-4]",
            _SUM,
            "arXiv:2602.05261",
            'estimator "gspo"; the aggregation is the method',
        ),
        "cispo": Recipe(
            Estimator("token", RatioClip(1.0, 4.0), form="cispo"),
            "r_t, constant",
            "cut to [0, 5]",
            _TOKENS,
            "arXiv:2506.13585",
            "the bound 5 is that of arXiv:2510.13786 (ScaleRL)",
        ),
        "gppo": Recipe(
            Estimator("token", RatioClip(0.2, 0.2), form="gppo"),
            "r_t, at least 0.8 if A < 0, at most 1.2 if A > 0",
            "[0.8, 1.2], no gate",
            _TOKENS,
            "arXiv:2508.07629",
        ),
        "gmpo": Recipe(
            Estimator("sequence_mean", PositionClip(0.4, 0.4, power=0.0, dual=None), form="gmpo"),
            "geometric mean of the r_t cut to the window",
            "[e^-.4, e^.4] for each r_t",
            _MEAN,
            "arXiv:2507.20673",
            "one advantage per sequence in the source",
        ),
        "sapo": Recipe(
            Estimator("token", SigmoidGate(1.0, 1.05), form="sapo"),
            "4 r_t s (1 - s), s = sigmoid(tau (r_t - 1))",
            "tau 1 if A > 0, else 1.05",
            _MEAN,
            "arXiv:2511.20347",
        ),
        "vespo": Recipe(
            Estimator("sequence", GammaWeight(2.0, 3.0, 3.0, 2.0), form="vespo"),
            "rho_H^k e^(lambda (1 - rho_H)), constant",
            "k 2, lambda 3 if A >= 0; k 3, lambda 2 if A < 0",
            _TOKENS,
            "arXiv:2602.10693",
        ),
        "topr": Recipe(
            Estimator("sequence", form="topr"),
            "1 if A >= 0, min(rho_H, 1) if A < 0, constant",
            "none",
            _MEAN,
            "arXiv:2503.14286",
        ),
        "tic_grpo": Recipe(
            Estimator("sequence", RatioClip(1.0, 0.2)),
            "rho_H",
            "[0, 1.2]",
            _MEAN,
            "arXiv:2508.02833",
            "clipped from above only; the bound is ours",
        ),
        "cfpo": Recipe(
            Estimator("token", RatioClip(0.2, 0.2), form="cfpo"),
            "r_t (1 - sign(A) (r_t - 1) / 0.2)",
            "0 at 0.8 and 1.2, reversed beyond",
            _MEAN,
            "arXiv:2601.22801; arXiv:2401.16025 (SPO)",
        ),
        "drpo": Recipe(
            Estimator("token", ProbabilityShift(12.5, 12.5), form="cfpo"),
            "r_t (1 - sign(A) (pi - b) / 12.5)",
            "fades with the change of probability",
            _SCALED_SUM,
            "arXiv:2606.09821",
            "probabilities differ by 1 at most, so 12.5 changes no weight by more than 8 %; UniRL averages over tokens",
        ),
        "dppo_tv": _dppo("tv", 0.2, "|pi - b| at most 0.2 moving away", "0.15 in verl's example"),
        "dppo_kl": _dppo("kl", 0.05, "binary KL(b||pi) at most 0.05 moving away", ""),
        "cppo": Recipe(
            Estimator("token", form="unclipped", region=PrefixBudget(0.15, 0.02, 0.8)),
            "r_t",
            "|pi - b| within 0.15 and what the prefix has left of 0.02 to 0.04 per token, moving away",
            _TOKENS,
            "arXiv:2606.10968",
            "divergence of the sampled token, as in UniRL; the paper has the 20 likeliest. Its threshold for dense "
            "models (0.2 for its mixture of experts), budget for base models",
        ),
        "m2po": Recipe(
            Estimator("token", form="unclipped", region=SecondMoment(0.04)),
            "r_t",
            "largest (log r_t)^2 of the batch dropped until the mean is 0.04, moving away",
            _TOKENS,
            "arXiv:2510.01161",
            "the mean is over the tokens that move away, in AReaL over all; aggregation of AReaL",
        ),
        "trm_max": _trm(2.0, "k2", "max", "the threshold is that of verl's examples"),
        "trm_mean": _trm(0.01, "k3", "mean", "the threshold is that of verl's presets"),
        "opsm": Recipe(
            Estimator("token", RatioClip(0.2, 0.2), region=SequenceRegion(0.1, "k1", "mean", only_negative=True)),
            "r_t",
            "[0.8, 1.2]; sequences with mean log(b / pi) > 0.1 dropped if A < 0",
            _MEAN,
            "DeepSeek-V3.2",
            "the source gives no threshold; 0.05 to 0.2 in Trinity-RFT",
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
            "PNPO's weight with the gates of ctpo",
        ),
        "pnpo": Recipe(
            Estimator("cumulative_mean", RatioClip(0.2, 0.2), form="reject"),
            "rho_t^(1/t)",
            "0 outside of [0.8, 1.2]",
            _MEAN,
            "arXiv:2608.01418",
            "hard rejection as others report it; the window is ours",
        ),
        "minpro": Recipe(
            Estimator("min_prefix", RatioClip(0.2, 0.2)),
            "r_t min_{k<t} r_k",
            "[0.8, 1.2]",
            _MEAN,
            "arXiv:2601.22718",
            "with the gate of PPO; minpro_cispo holds the weight constant, as the source is reported to",
        ),
        "minpro_cispo": Recipe(
            Estimator("min_prefix", RatioClip(0.2, 0.2), form="cispo"),
            "r_t min_{k<t} r_k, constant",
            "cut to [0.8, 1.2]",
            _TOKENS,
            "arXiv:2601.22718",
            "the window is ours",
        ),
        "nfpo": Recipe(
            Estimator("forward", form="unclipped", window=4, region=DivergenceRegion(0.2, 0.2)),
            "r_t r_{t+1} ... r_{t+3}",
            "|pi - b| at most 0.2 moving away",
            _MEAN,
            "arXiv:2605.20865",
            "from its abstract; the number of tokens and the mask are ours",
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

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {name: recipe.estimator for name, recipe in RECIPES.items() if name not in _SAME_COEFFICIENTS}
)
"""Name -> `Estimator`; read-only."""


def named(name: str) -> Estimator:
    """The estimator of a name; ValueError for others, those of rows with the coefficients of another row among them."""
    if name in _SAME_COEFFICIENTS:
        raise ValueError(f"estimator must have coefficients of its own; got {name!r}: {RECIPES[name].note}")
    one_of("estimator", name, ESTIMATORS)
    return ESTIMATORS[name]


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
        estimator = named(estimator)
    allowed = [field.name for field in fields(Estimator)]
    for name in changes:
        one_of("changes", name, allowed)
    return replace(estimator, **changes)
