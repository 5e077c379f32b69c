"""Training of language models, and the world around it; `pip install ".[train]"` in a clone.

- `ctpo.train.config`, `ctpo.train.trainer`: TRL's GRPOTrainer with the estimators of `ctpo`.
- `ctpo.train.run`: what `ctpo train` does, from a recipe to a model card; `ctpo.train.toy`: a model for a laptop.
- `ctpo.train.traces`: log-probabilities of a training run as parquet files.
- `ctpo.train.sandbox`: run Python that a model wrote, isolated or not at all.
- `ctpo.train.tools`: that sandbox as a tool, and the loop of rollouts with tool calls.
- `ctpo.train.generation`: sample tokens with transformers or vLLM.
- `ctpo.train.rewards`: score answers, whatever they contain.
- `ctpo.train.data`: problems from files, the Hub, reasoning-gym or a generator, in one form.
- `ctpo.train.metrics`: avg@k, pass@k, maj@k with intervals clustered by problem; comparison of two runs.
- `ctpo.train.evaluation`: evaluate a model, stop, resume, compare.

Nothing is imported before it is asked for: the sandbox needs neither torch nor transformers.
"""
