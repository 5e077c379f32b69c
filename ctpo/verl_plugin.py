r"""The estimators of `ctpo.zoo` as policy losses of verl: installed beside it, set the loss mode and train.

::

    python -m verl.trainer.main_ppo ... actor_rollout_ref.actor.policy_loss.loss_mode=ctpo

verl imports this module by its entry point (group ``verl.plugins``) in every process. Every estimator is registered
as ``ctpo_<name>`` (those that begin with "ctpo" as they are) and, where neither verl nor another plug-in has a loss
of that name, as ``<name>`` too: a loss of verl is never replaced. ``python -m ctpo.verl_plugin`` prints what is
registered, with every option and its value, and says what is wrong if a loss mode is not found: verl itself hides
the error of a plug-in that cannot be imported.

**Options** are the fields of the `ctpo.Estimator` and, with their part's name before them, those of its window and
trust region: ``clip_power``, ``clip_dual``, ``max_log_ratio``, ``region_high``, ... Two ways to give them to verl,
which refuse a misspelt key, an option that the loss does not have and a value out of its range:

* checked when the configuration is made, ``policy_loss._target_=ctpo.verl_plugin.CTPOPolicyLossConfig
  +policy_loss.clip_power=0.4`` (both below ``actor_rollout_ref.actor.``);
* checked at the first loss, ``~policy_loss._target_ +policy_loss.clip_power=0.4``.

================================================ =====================================================================
option of verl's actor                           what it means for these losses
================================================ =====================================================================
policy_loss.loss_mode                            the estimator
clip_ratio, clip_ratio_low, clip_ratio_high,     nothing: windows and parameters are those of the estimator, changed
clip_ratio_c, tau_pos, tau_neg                   by ``policy_loss.clip_*`` only. A value other than verl's default is
                                                 an error that says so; the defaults (0.2, 0.2, 0.2, 3) count as not
                                                 set, as verl's configuration cannot tell
policy_loss.clip_cov_*, kl_cov_*, dro_beta, ...  nothing: they are of other losses of verl; not to be set
loss_agg_mode, loss_scale_factor                 as in verl, "token-sum" too; the loss is what verl's `agg_loss` would
                                                 give, over micro-batches and data-parallel ranks
entropy_coeff, use_kl_loss, kl_loss_*            as in verl, which adds them to the loss
algorithm.rollout_correction                     as in verl: its weights multiply every token's term, its rejection
                                                 changes the mask. With ``bypass_mode`` the behavior policy of the
                                                 ratio is the rollout engine, and verl neither weighs nor rejects
================================================ =====================================================================

**Metrics**: verl's ``actor/pg_clipfrac`` (share of policy tokens outside the window or, for estimators with a trust
region, rejected by it), ``actor/pg_clipfrac_lower`` (outside the dual bound), ``actor/ppo_kl`` (mean of -log r_t), and
those of `ctpo.policy_loss` as ``actor/ctpo/...``, "saturated" as a share; not the effective sample sizes by position,
of which there are more in longer micro-batches. verl averages over micro-batches, each with the same weight.

verl hands a loss one micro-batch of whole sequences, also under sequence parallelism. So a trust region that judges a
batch ("m2po") judges micro-batches here, and the levels "turn" and "turn_mean" are refused: where turns begin is not
told.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from importlib.metadata import entry_points
from inspect import signature
from typing import Any, cast

from ctpo.estimators import Estimator
from ctpo.zoo import ESTIMATORS

try:
    import torch
    import verl
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss
    from verl.workers.config import ActorConfig, PolicyLossConfig

    from ctpo.losses import Aggregation, policy_loss
except Exception as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"verl cannot be imported: {type(error).__name__}: {error}\nctpo needs it, and all that it needs, here")

__all__ = ["CTPOPolicyLossConfig", "options", "register"]

#: The versions of verl that the tests have run with.
TESTED_VERSIONS = ("0.9.1",)

#: Value of an option that is not set: the estimator's own counts.
UNSET = "unset"

#: Loss mode -> estimator, of all that this module has registered.
REGISTERED: dict[str, Estimator] = {}

# Options of the actor that other losses read and these do not.
_ACTOR_OPTIONS = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos", "tau_neg")


def options(estimator: Estimator) -> dict[str, Any]:
    """The options that a loss has in verl, with their values.

    Args:
        estimator: The estimator behind the loss.

    Returns:
        Its fields; those of its window and of its trust region as ``clip_...`` and ``region_...``.

    Example:
        >>> from ctpo import ESTIMATORS
        >>> {name: value for name, value in options(ESTIMATORS["ctpo"]).items() if name.startswith("clip_")}
        {'clip_low': 0.025, 'clip_high': 0.05, 'clip_power': 0.5, 'clip_dual': 0.05, 'clip_drift': 0.0}
    """
    found: dict[str, Any] = {}
    for own in fields(estimator):
        value = getattr(estimator, own.name)
        if is_dataclass(value):
            found |= {f"{own.name}_{part.name}": getattr(value, part.name) for part in fields(value)}
        elif own.name not in _PARTS:
            found[own.name] = value
    return found


# Fields that hold an object with options of its own.
_PARTS = {
    own.name
    for estimator in ESTIMATORS.values()
    for own in fields(estimator)
    if is_dataclass(getattr(estimator, own.name))
}


def _changed(loss_mode: str, changes: Mapping[str, Any]) -> Estimator:
    """The estimator of a loss mode with the options that are set."""
    estimator = REGISTERED[loss_mode]
    known = options(estimator)
    top: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"policy_loss.{name} is no option of the loss mode {loss_mode!r}; it has {sorted(known)}")
        part = next((part for part in _PARTS if name.startswith(f"{part}_")), None)
        if part is None:
            top[name] = value
        else:
            parts.setdefault(part, {})[name.removeprefix(f"{part}_")] = value
    for part, values in parts.items():
        top[part] = replace(getattr(estimator, part), **values)
    estimator = replace(estimator, **top)
    _check_level("policy_loss", estimator)
    return estimator


def _check_level(owner: str, estimator: Estimator) -> None:
    if estimator.level in ("turn", "turn_mean"):
        raise ValueError(f"{owner}: the level {estimator.level!r} cannot be used: verl does not tell a loss the turns")


def _refuse_options_of_other_losses(given: Any, names: tuple[str, ...], of: type, prefix: str) -> None:
    """Nothing that is set goes unnoticed: a value other than verl's default is an error."""
    defaults = {own.name: own.default for own in fields(of)}
    for name in names:
        value = given.get(name, None)
        if value is not None and value != defaults[name]:
            raise ValueError(
                f"{prefix}{name}={value!r} does not act on the losses of ctpo; leave verl's default "
                f"({defaults[name]!r}) and change the estimator itself: policy_loss.clip_low=..., "
                "see python -m ctpo.verl_plugin"
            )


_VERL_OPTIONS = tuple(own.name for own in fields(PolicyLossConfig))
_FOREIGN_OPTIONS = tuple(name for name in _VERL_OPTIONS if name not in ("loss_mode", "rollout_correction", "_target_"))


def _configured(loss_mode: str, given: Mapping[str, Any]) -> Estimator:
    """The estimator as verl's `policy_loss` asks for it."""
    _refuse_options_of_other_losses(given, _FOREIGN_OPTIONS, PolicyLossConfig, "policy_loss.")
    own = {name: given[name] for name in given if name not in (*_VERL_OPTIONS, "_target_")}
    return _changed(loss_mode, {name: value for name, value in own.items() if not _is_unset(value)})


def _is_unset(value: Any) -> bool:
    return isinstance(value, str) and value == UNSET


def _check_when_made(self: Any) -> None:
    if self.loss_mode in REGISTERED:
        _configured(self.loss_mode, self)
        return
    for name in _OPTION_NAMES:
        if not _is_unset(getattr(self, name)):
            raise ValueError(f"policy_loss.{name} is an option of the losses of ctpo; loss_mode is {self.loss_mode!r}")


_OPTION_NAMES = tuple(dict.fromkeys(name for estimator in ESTIMATORS.values() for name in options(estimator)))

CTPOPolicyLossConfig = make_dataclass(
    "CTPOPolicyLossConfig",
    [(name, Any, field(default=UNSET)) for name in _OPTION_NAMES],
    bases=(PolicyLossConfig,),
    namespace={
        "__module__": __name__,
        "__doc__": """verl's `PolicyLossConfig` with the options of the losses of ctpo, checked when it is made.

    Args:
        loss_mode: A loss of this module, or one of verl's if no option of ctpo is set.
        **options: See `options`; "unset" for the estimator's own value.

    Raises:
        ValueError: The loss does not have an option that is set, or its value is out of range.
    """,
        "__post_init__": _check_when_made,
    },
)


def register(loss_mode: str, estimator: Estimator) -> None:
    """Makes an estimator a loss mode of verl.

    A module that calls this for an estimator of one's own is given to verl by ``VERL_USE_EXTERNAL_MODULES=module``.

    Args:
        loss_mode: Its name in verl.
        estimator: Any estimator but one of the levels "turn" and "turn_mean".

    Raises:
        ValueError: verl has another loss of that name, or the level cannot be used.

    Example:
        >>> from ctpo import Estimator, RatioClip
        >>> register("window_8", Estimator("window", RatioClip(0.2, 0.28), window=8))
        >>> REGISTERED["window_8"].window
        8
    """
    present = POLICY_LOSS_REGISTRY.get(loss_mode)
    if present is not None and getattr(present, "__module__", None) != __name__:
        raise ValueError(f"loss_mode must be a name that verl does not have yet; got {loss_mode!r}")
    _check_level("estimator", estimator)
    REGISTERED[loss_mode] = estimator

    def loss(
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        return _loss(
            loss_mode, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
        )

    loss.__name__, loss.__doc__ = f"compute_policy_loss_{loss_mode}", f"verl's contract of a policy loss: {estimator}"
    register_policy_loss(loss_mode)(loss)


def _loss(
    loss_mode: str,
    behavior_logp: torch.Tensor,
    logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    aggregation: str,
    config: Any,
    weights: torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss and metrics under verl's contract."""
    if config is None:
        raise ValueError("config must be verl's actor configuration; got None")
    _refuse_options_of_other_losses(config, _ACTOR_OPTIONS, ActorConfig, "actor.")
    batch, mask = config.global_batch_info, mask.bool()
    num_tokens, horizon = batch.get("batch_num_tokens"), None
    if aggregation == "token-sum":  # a mean over one token
        aggregation, num_tokens = "token-mean", 1
    elif aggregation == "seq-mean-token-sum-norm":
        horizon = batch.get("loss_scale_factor") or mask.shape[-1]
    estimator = _configured(loss_mode, config.policy_loss)
    found = policy_loss(
        logp,
        behavior_logp,
        advantages,
        mask,
        estimator=estimator,
        aggregation=cast("Aggregation", aggregation),
        weights=weights,
        num_tokens=num_tokens,
        num_sequences=batch.get("global_batch_size"),
        data_parallel_size=batch.get("dp_size", 1),
        horizon=horizon,
    )
    return found.loss, _verl_metrics(found.metrics, estimator, logp, behavior_logp, mask)


def _verl_metrics(
    metrics: Mapping[str, torch.Tensor],
    estimator: Estimator,
    logp: torch.Tensor,
    behavior_logp: torch.Tensor,
    mask: torch.Tensor,
) -> dict[str, float]:
    """Under verl's names, with one host sync for all of them; verl's own losses need one for each."""
    outside = metrics["clip/low"] + metrics["clip/high"]
    with torch.no_grad():
        wide = torch.promote_types(logp.dtype, torch.float32)
        step_back = torch.where(mask, behavior_logp.to(wide) - logp.to(wide), 0.0)
        found = {
            "actor/pg_clipfrac": outside if estimator.region is None else metrics["clip/rejected"],
            "actor/pg_clipfrac_lower": metrics["clip/dual"],
            "actor/ppo_kl": step_back.sum() / mask.sum().clamp(min=1),
        }
        # verl needs the same names from every micro-batch on every rank, and the buckets depend on the longest row.
        found |= {f"actor/ctpo/{name}": value for name, value in metrics.items() if "position" not in name}
        found["actor/ctpo/saturated"] = metrics["saturated"] / metrics["tokens"].clamp(min=1)
        return dict(zip(found, torch.stack([value.to(wide) for value in found.values()]).tolist(), strict=True))


for _name, _estimator in ESTIMATORS.items() if __name__ != "__main__" else ():
    if _estimator.level in ("turn", "turn_mean"):
        continue
    register(_name if _name.startswith("ctpo") else f"ctpo_{_name}", _estimator)
    if _name not in POLICY_LOSS_REGISTRY:
        register(_name, _estimator)


def _why_verl_has_not_loaded_the_plugin() -> str | None:
    """What keeps verl from finding this module, which it would not tell; None if it has."""
    if "ctpo.verl_plugin" in sys.modules:
        return None
    found = [entry for entry in entry_points(group="verl.plugins") if entry.value == "ctpo.verl_plugin"]
    if not found:
        return "verl sees no entry point of ctpo in this environment: install ctpo (again)"
    wanted = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if wanted != "auto" and found[0].name not in [name.strip() for name in wanted.split(",")]:
        return f"VERL_USE_EXTERNAL_PLUGINS={wanted} leaves out {found[0].name!r}: unset it or add the name"
    try:
        found[0].load()
    except Exception as error:
        return f"the plug-in cannot be imported: {type(error).__name__}: {error}"
    return "verl has not loaded the plug-in, though it can be imported"


def _trial(loss_mode: str) -> str | None:
    """What goes wrong in one loss and its gradient; None if nothing does."""
    logp = torch.full((2, 3), -1.0, requires_grad=True)
    batch = {"old_log_prob": torch.full((2, 3), -1.01), "advantages": torch.tensor([[1.0] * 3, [-1.0] * 3])}
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    try:
        loss = POLICY_LOSS_REGISTRY[loss_mode](log_prob=logp, response_mask=mask, config=config, **batch)[0]
        loss.backward()
    except Exception as error:
        return f"loss_mode={loss_mode} fails: {type(error).__name__}: {error}"
    good = bool(loss.isfinite()) and logp.grad is not None and bool(logp.grad.isfinite().all())
    return None if good else f"loss_mode={loss_mode} gives loss {loss.item()} and gradient {logp.grad}"


def main() -> int:
    """Prints what verl can use and what is wrong; the exit status is 1 if anything is.

    Returns:
        0 or 1.
    """
    problem = _why_verl_has_not_loaded_the_plugin()
    if problem is not None:
        print(f"BROKEN: {problem}", file=sys.stderr)
        return 1
    plugin = sys.modules["ctpo.verl_plugin"]
    modes: dict[Estimator, list[str]] = {}
    for loss_mode, estimator in plugin.REGISTERED.items():
        modes.setdefault(estimator, []).append(loss_mode)
    for estimator, names in modes.items():
        print(" = ".join(names))
        text = "  ".join(f"{name}={value}" for name, value in options(estimator).items())
        print(textwrap.fill(text, 110, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False))
    ours, theirs = (set(signature(POLICY_LOSS_REGISTRY[name]).parameters) for name in ("ctpo", "vanilla"))
    problems = [found for found in map(_trial, plugin.REGISTERED) if found is not None]
    if ours != theirs:
        problems.append(f"this verl calls its losses with {sorted(theirs)}; those of ctpo take {sorted(ours)}")
    for found in problems:
        print(f"BROKEN: {found}", file=sys.stderr)
    tested = "" if verl.__version__ in TESTED_VERSIONS else f" (not tested; {', '.join(TESTED_VERSIONS)} is)"
    print(f"\nverl {verl.__version__}{tested}: {len(plugin.REGISTERED)} loss modes, {len(problems)} problems")
    print("use: actor_rollout_ref.actor.policy_loss.loss_mode=ctpo")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
