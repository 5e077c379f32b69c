#!/usr/bin/env bash
# The paper's setting (arXiv:2605.07331) on verl and Ray: one node of 8 GPUs, or a cluster.
#
#   MODEL=Qwen/Qwen3-4B-Base TRAIN=train.parquet VAL=val.parquet bash verl.sh [KEY=VALUE ...]
#
# On a cluster: `ray start --head --port 6379` on the first machine, `ray start --address FIRST:6379` on the others, then
# there RAY_ADDRESS=auto NODES=4 bash verl.sh. Further words go to verl after these and before their meaning.
# TRAIN, VAL  parquet in verl's layout: prompt, data_source, reward_model.ground_truth. ctpo.train.data writes it.
# REWARD      a Python file with compute_score, where verl has none for the data_source
# TOOLS       a Python file with verl's @function_tool functions; without it there is no tool
# PYTHON      of the environment with verl 0.9.1 and ctpo; `python -m ctpo.verl_plugin` says whether they have met
# Composed by verl's configuration in the tests; not run by us, which takes GPUs and a rollout engine.
set -euo pipefail

more=()
[ -z "${REWARD:-}" ] || more+=("reward.custom_reward_function.path=$REWARD")
[ -z "${TOOLS:-}" ] || more+=(
  actor_rollout_ref.rollout.multi_turn.enable=True
  actor_rollout_ref.rollout.multi_turn.max_assistant_turns=6 # 5 rounds with the tool, and the answer
  "actor_rollout_ref.rollout.multi_turn.function_tool_path=$TOOLS"
)

exec "${PYTHON:-python}" -m verl.trainer.main_ppo \
  data.train_files="${TRAIN:?a parquet file}" \
  data.val_files="${VAL:?a parquet file}" \
  data.train_batch_size=512 \
  data.max_prompt_length=1024 \
  data.max_response_length=8000 \
  data.filter_overlong_prompts=True \
  algorithm.adv_estimator=grpo \
  algorithm.use_kl_in_reward=False \
  algorithm.rollout_correction.rollout_is=sequence \
  algorithm.rollout_correction.rollout_is_threshold=5.0 \
  actor_rollout_ref.model.path="${MODEL:?a directory or a name on the Hub}" \
  actor_rollout_ref.model.enable_gradient_checkpointing=True \
  actor_rollout_ref.actor.policy_loss.loss_mode=ctpo \
  actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean \
  actor_rollout_ref.actor.ppo_mini_batch_size=32 \
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1 \
  actor_rollout_ref.actor.ppo_epochs=1 \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.use_kl_loss=False \
  actor_rollout_ref.actor.entropy_coeff=0 \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.temperature=1.0 \
  actor_rollout_ref.rollout.calculate_log_probs=True \
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1 \
  actor_rollout_ref.rollout.val_kwargs.do_sample=True \
  actor_rollout_ref.rollout.val_kwargs.n=32 \
  actor_rollout_ref.rollout.val_kwargs.temperature=0.7 \
  trainer.total_training_steps=305 \
  trainer.n_gpus_per_node="${GPUS:-8}" \
  trainer.nnodes="${NODES:-1}" \
  trainer.save_freq=10 \
  trainer.test_freq=50 \
  "${more[@]}" "$@"
