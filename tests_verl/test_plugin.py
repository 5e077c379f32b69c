"""Registration, options and the self-check of the plug-in."""

from __future__ import annotations

import doctest
import math
import os
import subprocess
import sys

import pytest
import torch
import verl
from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from verl.trainer.ppo import core_algos
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig, PolicyLossConfig

import ctpo
from ctpo import verl_plugin
from ctpo.losses import policy_loss

ACTOR = "actor_rollout_ref.actor"
TARGET = f"{ACTOR}.policy_loss._target_=ctpo.verl_plugin.CTPOPolicyLossConfig"
PLAIN = f"~{ACTOR}.policy_loss._target_"
OF_VERL = {"vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "dro", "cispo"}
OF_VERL |= {"bypass_mode"}


def actor(*overrides: str):
    """verl's actor configuration as its workers see it."""
    common = [f"{ACTOR}.ppo_micro_batch_size_per_gpu=1", "actor_rollout_ref.rollout.name=vllm"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=[*common, *overrides])
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def run(config, loss_mode=None):
    """Loss and metrics of a few rows through the registered function, and what `policy_loss` gives."""
    generator = torch.Generator().manual_seed(1)
    old = -torch.rand(8, 5, generator=generator)
    batch = {
        "old_log_prob": old,
        "log_prob": (old + 0.1 * torch.randn(8, 5, generator=generator)).requires_grad_(),
        "advantages": torch.tensor([[1.0], [-1.0]] * 4).expand(8, 5),
        "response_mask": torch.ones(8, 5, dtype=torch.bool),
    }
    function = core_algos.get_policy_loss_fn(loss_mode or config.policy_loss.get("loss_mode"))
    found, metrics = function(loss_agg_mode=config.loss_agg_mode, config=config, rollout_is_weights=None, **batch)
    same = (batch["log_prob"], old, batch["advantages"], batch["response_mask"])
    return found, metrics, lambda estimator: policy_loss(*same, estimator=estimator, aggregation="token-mean").loss


def test_verl_loads_the_plugin_by_its_entry_point():
    code = "import verl, sys; print('ctpo.verl_plugin' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "True"


def test_every_estimator_is_registered_and_no_loss_of_verl_is_replaced():
    registry = core_algos.POLICY_LOSS_REGISTRY
    for name, estimator in ctpo.ESTIMATORS.items():
        full = name if name.startswith("ctpo") else f"ctpo_{name}"
        assert verl_plugin.REGISTERED[full] == estimator
        assert registry[full].__module__ == "ctpo.verl_plugin"
        assert (registry[name].__module__ == "ctpo.verl_plugin") == (name not in OF_VERL)
    for name in OF_VERL:
        assert registry[name].__module__ == "verl.trainer.ppo.core_algos"


def test_importing_the_plugin_leaves_the_choice_of_the_platform_to_others():
    """Another plug-in may bring the platform, and verl chooses once."""
    code = "import verl\nfrom verl.plugin.platform import platform_manager\nprint(platform_manager._current_platform)"
    clean = {name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, timeout=120)
    assert found.stdout.strip() == "None", found.stderr


@pytest.mark.parametrize("way", [TARGET, PLAIN], ids=["dataclass", "plain"])
def test_options_reach_the_estimator(way):
    own = [f"+{ACTOR}.policy_loss.{option}" for option in ("clip_power=0.25", "clip_dual=null", "max_log_ratio=null")]
    config = actor(f"{ACTOR}.policy_loss.loss_mode=ctpo", way, *own)
    found, _, plain = run(config)
    changed = ctpo.get_estimator("ctpo", clip=ctpo.PositionClip(power=0.25, dual=None), max_log_ratio=None)
    assert found == plain(changed)
    assert found != plain("ctpo")


def test_without_options_the_loss_mode_alone_is_enough():
    found, _, plain = run(actor(f"{ACTOR}.policy_loss.loss_mode=ctpo"))
    assert found == plain("ctpo")


def test_level_and_window_can_be_changed():
    own = [f"+{ACTOR}.policy_loss.level=window", f"+{ACTOR}.policy_loss.window=3"]
    found, _, plain = run(actor(f"{ACTOR}.policy_loss.loss_mode=ctpo", TARGET, *own))
    assert found == plain(ctpo.get_estimator("ctpo", level="window", window=3))


WRONG = {
    "clip_powr=0.5": "clip_powr",
    "clip_power=much": "power",
    "clip_low=-1": "low must be a positive finite number",
    "clip_positive=1": "policy_loss.clip_positive is no option of the loss mode 'ctpo'",
    "level=turn": "does not tell a loss the turns",
    "level=tokens": "level",
    "window=4": "window",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_refused_when_the_configuration_is_made(wrong):
    with pytest.raises(InstantiationException, match=WRONG[wrong]):
        actor(f"{ACTOR}.policy_loss.loss_mode=ctpo", TARGET, f"+{ACTOR}.policy_loss.{wrong}")


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_in_a_plain_mapping_is_refused_by_the_loss(wrong):
    config = actor(f"{ACTOR}.policy_loss.loss_mode=ctpo", PLAIN, f"+{ACTOR}.policy_loss.{wrong}")
    with pytest.raises(ValueError, match=WRONG[wrong]):
        run(config)


def test_options_of_ours_on_a_loss_of_verl_are_refused():
    with pytest.raises(InstantiationException, match="clip_power is an option of the losses of ctpo"):
        actor(TARGET, f"+{ACTOR}.policy_loss.clip_power=0.5")
    assert actor(TARGET).policy_loss.loss_mode == "vanilla"


@pytest.mark.parametrize(
    "option",
    ["clip_ratio=0.1", "clip_ratio_low=0.1", "clip_ratio_high=0.28", "clip_ratio_c=10", "tau_pos=2", "tau_neg=2"],
)
def test_clip_options_of_the_actor_are_refused_rather_than_ignored(option):
    config = actor(f"{ACTOR}.policy_loss.loss_mode=ctpo_gspo", f"{ACTOR}.{option}")
    with pytest.raises(ValueError, match=f"actor.{option.split('=')[0]}=.* does not act"):
        run(config)


def test_clip_options_of_the_actor_that_are_verl_s_defaults_change_nothing():
    config = actor(f"{ACTOR}.policy_loss.loss_mode=ctpo_gspo", f"{ACTOR}.clip_ratio_low=null")
    assert config.clip_ratio_high == 0.2
    found, _, plain = run(config)
    assert found == plain("gspo")
    assert found != plain(ctpo.get_estimator("gspo", clip=ctpo.RatioClip()))


def test_options_of_other_losses_of_verl_are_refused():
    with pytest.raises(InstantiationException, match=r"policy_loss.dro_beta=0.1 does not act"):
        actor(f"{ACTOR}.policy_loss.loss_mode=ctpo", TARGET, f"{ACTOR}.policy_loss.dro_beta=0.1")


def test_options_of_the_configuration_are_those_of_the_estimators():
    own = {name for estimator in ctpo.ESTIMATORS.values() for name in verl_plugin.options(estimator)}
    theirs = set(PolicyLossConfig.__dataclass_fields__)
    assert not own & theirs
    assert set(verl_plugin.CTPOPolicyLossConfig.__dataclass_fields__) == own | theirs


def test_every_option_of_every_loss_can_be_given_its_own_value():
    for name, estimator in verl_plugin.REGISTERED.items():
        verl_plugin.CTPOPolicyLossConfig(loss_mode=name, **verl_plugin.options(estimator))


@pytest.fixture
def forgetful():
    """What a test registers is forgotten after it."""
    registries = verl_plugin.REGISTERED, core_algos.POLICY_LOSS_REGISTRY
    before = [set(registry) for registry in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry) - names:
            del registry[name]


@pytest.mark.usefixtures("forgetful")
def test_an_estimator_of_one_s_own():
    estimator = ctpo.Estimator("cumulative", ctpo.CalibratedClip(low=0.1, high=0.1, sigma=0.05, drift=0.0))
    verl_plugin.register("mine", estimator)
    found, _, plain = run(actor(f"{ACTOR}.policy_loss.loss_mode=mine"))
    assert found == plain(estimator)
    with pytest.raises(ValueError, match="loss_mode must be a name that verl does not have yet; got 'gspo'"):
        verl_plugin.register("gspo", estimator)
    with pytest.raises(ValueError, match="turns"):
        verl_plugin.register("turns", ctpo.Estimator("turn", ctpo.RatioClip()))


def test_configuration_survives_a_pickle():
    """Ray sends it to the workers."""
    import pickle

    config = verl_plugin.CTPOPolicyLossConfig(loss_mode="ctpo", clip_power=0.25)
    again = pickle.loads(pickle.dumps(config))
    assert type(again) is verl_plugin.CTPOPolicyLossConfig
    assert again.get("clip_power") == 0.25


def test_missing_configuration_is_refused():
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    run(config, "ctpo")
    with pytest.raises(ValueError, match="config must be"):
        core_algos.get_policy_loss_fn("ctpo")(
            torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
        )


def check(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ctpo.verl_plugin"],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )


def test_check_prints_what_is_registered():
    found = check()
    assert found.returncode == 0, found.stderr
    assert "BROKEN" not in found.stderr
    for name in ctpo.ESTIMATORS:
        assert name in found.stdout
    assert "clip_power=0.5" in found.stdout
    assert f"verl {verl.__version__}: {len(verl_plugin.REGISTERED)} loss modes, 0 problems" in found.stdout


def test_check_says_that_the_plugin_is_switched_off():
    found = check(VERL_USE_EXTERNAL_PLUGINS="none")
    assert found.returncode == 1
    assert found.stderr.strip().endswith(
        "BROKEN: VERL_USE_EXTERNAL_PLUGINS=none leaves out 'ctpo': unset it or add the name"
    )


def test_check_says_why_verl_cannot_be_imported(tmp_path):
    (tmp_path / "verl").mkdir()
    (tmp_path / "verl" / "__init__.py").write_text("raise ImportError('no accelerator library')\n")
    found = check(PYTHONPATH=str(tmp_path))
    assert found.returncode == 1
    assert "verl cannot be imported: ImportError: no accelerator library" in found.stderr
    assert "Traceback" not in found.stderr


def test_check_says_why_a_plugin_cannot_be_imported(tmp_path):
    """The error that verl hides: here another plug-in has taken a name."""
    (tmp_path / "taken.py").write_text(
        "from verl.trainer.ppo.core_algos import register_policy_loss\n@register_policy_loss('ctpo')\ndef f(): pass\n"
    )
    found = check(PYTHONPATH=str(tmp_path), VERL_USE_EXTERNAL_MODULES="taken")
    assert found.returncode == 1
    assert (
        "the plug-in cannot be imported: ValueError: loss_mode must be a name that verl does not have" in found.stderr
    )


def test_check_says_that_a_version_is_not_tested(monkeypatch, capsys):
    monkeypatch.setattr(verl, "__version__", "0.9.7")
    assert verl_plugin.main() == 0
    assert "verl 0.9.7 (not tested; 0.9.1 is): " in capsys.readouterr().out


def test_check_tries_every_loss(monkeypatch, capsys):
    def gives_nan(log_prob, **_):
        return log_prob.sum() * math.nan, {}

    def fails(**_):
        raise RuntimeError("no such operator")

    monkeypatch.setitem(core_algos.POLICY_LOSS_REGISTRY, "ctpo_mean", gives_nan)
    monkeypatch.setitem(core_algos.POLICY_LOSS_REGISTRY, "ctpo_grpo", fails)
    assert verl_plugin.main() == 1
    error = capsys.readouterr().err
    assert "BROKEN: loss_mode=ctpo_mean gives loss nan" in error
    assert "BROKEN: loss_mode=ctpo_grpo fails: RuntimeError: no such operator" in error


def test_check_sees_that_verl_calls_its_losses_in_another_way(monkeypatch, capsys):
    def vanilla(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, weights):
        pass

    monkeypatch.setitem(core_algos.POLICY_LOSS_REGISTRY, "vanilla", vanilla)
    assert verl_plugin.main() == 1
    assert "BROKEN: this verl calls its losses with" in capsys.readouterr().err


@pytest.mark.usefixtures("forgetful")
def test_docstring_examples():
    assert doctest.testmod(verl_plugin).failed == 0
