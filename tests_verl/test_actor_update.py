"""verl's own actor update with the losses of the plug-in, against a loop of plain torch.

The loop sees a whole mini-batch at once, without verl's padding, micro-batches, ranks and engine.
"""

from __future__ import annotations

import copy

import cpu_worker
import pytest
import torch

import ctpo
from ctpo.clipping import RatioClip
from ctpo.losses import policy_loss

ACTOR = "actor_rollout_ref.actor"
OPTIONS = f"{ACTOR}.policy_loss._target_=ctpo.verl_plugin.CTPOPolicyLossConfig"


def loss_mode(name: str, **options: object) -> list[str]:
    """Command line of a loss with options."""
    given = [f"+{ACTOR}.policy_loss.{key}={'null' if value is None else value}" for key, value in options.items()]
    return [f"{ACTOR}.policy_loss.loss_mode={name}", *([OPTIONS] if options else []), *given]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cpu_worker.tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def batches(model):
    return [cpu_worker.batch(model, seed) for seed in (1, 2)]


@pytest.fixture
def job(model, batches):
    return cpu_worker.Job(model, batches)


def plain(job, estimator, aggregation="token-mean", horizon=None, extra=None):
    """The same updates by a loop: parameters, and those at the start; `extra` is added to the loss."""
    net = cpu_worker.load(job.model)
    start = {name: value.detach().clone() for name, value in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=job.learning_rate)
    for batch in job.batches:
        for first in range(0, len(batch["input_ids"]), job.mini_batch_size):
            part = {name: value[first : first + job.mini_batch_size] for name, value in batch.items()}
            logp, entropy = cpu_worker.response_logp(net, part)
            loss = policy_loss(
                logp,
                part["old_log_probs"],
                part["advantages"],
                part["response_mask"].bool(),
                estimator=estimator,
                aggregation=aggregation,
                weights=part.get("rollout_is_weights"),
                horizon=horizon,
            ).loss
            if extra is not None:
                loss = loss + extra(logp, entropy, part)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: value.detach() for name, value in net.named_parameters()}, start


def distance(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def assert_same_update(found, expected, start):
    assert distance(expected, start) > 1e-2, "nothing has moved"
    assert distance(found, expected) < 2e-6


CASES = {
    "ctpo": (loss_mode("ctpo"), "ctpo"),
    "ctpo, other options": (
        loss_mode("ctpo", clip_power=0.3, clip_low=0.1, clip_dual=None),
        ctpo.get_estimator("ctpo", clip=ctpo.PositionClip(0.1, 0.05, 0.3, dual=None)),
    ),
    "ctpo_gspo": (
        loss_mode("ctpo_gspo", clip_low=0.01, clip_high=0.02),
        ctpo.get_estimator("gspo", clip=RatioClip(0.01, 0.02)),
    ),
    "minpro": (loss_mode("minpro"), "minpro"),
}


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_a_plain_loop(job, case):
    overrides, estimator = CASES[case]
    job.overrides = overrides
    found, metrics = cpu_worker.updated_parameters(job)
    assert_same_update(found, *plain(job, estimator))
    assert all(0 < update["actor/pg_clipfrac"] < 1 for update in metrics), "windows that never or always act"


@pytest.mark.parametrize(
    "wrong",
    [
        ctpo.get_estimator("ctpo", clip=ctpo.PositionClip(power=0.1)),
        ctpo.get_estimator("ctpo", clip=ctpo.PositionClip(dual=None)),
        "ctpo_mean",
        "ctpo_fixed",
    ],
    ids=["power", "dual", "ctpo_mean", "ctpo_fixed"],
)
def test_another_loss_does_not_give_these_parameters(job, ctpo_parameters, wrong):
    parameters, _ = plain(job, wrong)
    assert distance(ctpo_parameters, parameters) > 1e-4


@pytest.fixture(scope="module")
def ctpo_parameters(model, batches):
    return cpu_worker.updated_parameters(cpu_worker.Job(model, batches, loss_mode("ctpo")))[0]


@pytest.mark.parametrize(
    ("aggregation", "horizon"),
    [
        ("token-mean", None),
        ("seq-mean-token-mean", None),
        ("seq-mean-token-sum", None),
        ("seq-mean-token-sum-norm", 7),
    ],
)
def test_every_aggregation_is_invariant_to_micro_batches(job, aggregation, horizon):
    job.overrides = [*loss_mode("ctpo"), f"{ACTOR}.loss_agg_mode={aggregation}"]
    if horizon is not None:
        job.overrides.append(f"{ACTOR}.loss_scale_factor={horizon}")
    job.learning_rate = 0.05 if aggregation == "seq-mean-token-sum" else 0.5
    expected = plain(job, "ctpo", aggregation, horizon)
    for job.micro_batch_size in (1, 4):
        assert_same_update(cpu_worker.updated_parameters(job)[0], *expected)


def test_rollout_weights_multiply_the_terms(job):
    job.overrides, job.batches = loss_mode("ctpo"), copy.deepcopy(job.batches)
    generator = torch.Generator().manual_seed(5)
    for batch in job.batches:
        batch["rollout_is_weights"] = 2 * torch.rand(batch["old_log_probs"].shape, generator=generator)
    found, _ = cpu_worker.updated_parameters(job)
    expected, start = plain(job, "ctpo")
    assert_same_update(found, expected, start)
    for batch in job.batches:
        del batch["rollout_is_weights"]
    assert distance(found, plain(job, "ctpo")[0]) > 1e-4


def test_without_padding_between_rows(job, ctpo_parameters):
    job.overrides, job.remove_padding = loss_mode("ctpo"), True
    found, _ = cpu_worker.updated_parameters(job)
    assert distance(found, ctpo_parameters) < 2e-6


def test_two_processes_with_half_of_the_rows_each(job, ctpo_parameters):
    """FSDP on two ranks, each with two micro-batches of one row per mini-batch, whose rows are those of the loop."""
    job.overrides, job.micro_batch_size = loss_mode("ctpo"), 1
    rows = [0, 1, 4, 5, 2, 3, 6, 7]  # the first half goes to the first rank
    job.batches = [{name: value[rows] for name, value in batch.items()} for batch in job.batches]
    found, metrics = cpu_worker.updated_parameters(job, processes=2)
    assert distance(found, ctpo_parameters) < 2e-6
    assert all(0 < update["actor/pg_clipfrac"] < 1 for update in metrics)


def test_entropy_and_divergence_are_added_by_verl(job):
    """verl does so in place, on the tensor that our loss has returned."""
    job.overrides = [
        *loss_mode("ctpo"),
        f"{ACTOR}.entropy_coeff=0.1",
        f"{ACTOR}.use_kl_loss=True",
        f"{ACTOR}.kl_loss_type=mse",
        f"{ACTOR}.kl_loss_coef=0.2",
    ]
    generator = torch.Generator().manual_seed(6)
    job.batches = [
        batch
        | {"ref_log_prob": batch["old_log_probs"] + torch.randn(batch["old_log_probs"].shape, generator=generator)}
        for batch in job.batches
    ]

    def extra(logp, entropy, part):
        mask = part["response_mask"].bool()
        added = 0.2 * 0.5 * (logp - part["ref_log_prob"]) ** 2 - 0.1 * entropy
        return torch.where(mask, added, 0.0).sum() / mask.sum()

    found, metrics = cpu_worker.updated_parameters(job)
    expected, start = plain(job, "ctpo", extra=extra)
    assert_same_update(found, expected, start)
    assert distance(found, plain(job, "ctpo")[0]) > 1e-3
    assert all({"actor/entropy_loss", "actor/kl_loss", "actor/ctpo/ess/sequence"} < set(update) for update in metrics)


def test_bypass_mode_of_verl_leaves_the_loss_and_takes_the_rollout_engine_for_the_behavior_policy(job, ctpo_parameters):
    """It renames the loss in the driver's configuration, which the workers have read before."""
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.trainer.ppo.rollout_corr_helper import apply_bypass_mode

    job.overrides = loss_mode("ctpo")
    config = cpu_worker.compose_config(job)
    batch = dict(job.batches[0])
    rollout = batch.pop("old_log_probs")
    data = DataProto.from_dict(tensors=batch | {"rollout_log_probs": rollout})
    apply_bypass_mode(data, OmegaConf.create({"bypass_mode": True}), config.actor_rollout_ref.actor.policy_loss)
    assert torch.equal(data.batch["old_log_probs"], rollout)
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == "bypass_mode"

    def renamed(worker_config):
        apply_bypass_mode(data, OmegaConf.create({"bypass_mode": True}), worker_config.actor.policy_loss)

    job.before_updates = renamed
    found, _ = cpu_worker.updated_parameters(job)
    assert distance(found, ctpo_parameters) == 0
