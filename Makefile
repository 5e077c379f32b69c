# Every target is plain pip and python lines; README.md shows them for people without make.
PYTHON ?= python3
RUN := .venv/bin/python
INSTALL = @echo "installing into .venv, a minute or more" && $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: verify test proofs train test-verl figures studies report bench bench-verl check clean

## Check every claim, print the table, draw the figures (results/).
verify: .venv/simulations.installed
	$(RUN) -m simulations verify
	$(RUN) -m paper_figures

## Run all tests on all cores.
test: .venv/test.installed
	$(RUN) -m pytest -n auto

## Check the machine's proofs and print what each theorem rests on (needs Coq; says which packages are missing).
proofs:
	$(PYTHON) -m proofs

## Train a small model from nothing to use a Python tool, on a CPU: warm-up, reinforcement learning, evaluation.
train: .venv/train.installed
	.venv/bin/ctpo train --config toy

## Run the tests of the verl plug-in, in an environment of its own: verl needs an older transformers.
test-verl: .venv-verl/installed
	.venv-verl/bin/python -m pytest tests_verl -n auto

## Draw the figures from the results of the last verification.
figures: .venv/simulations.installed
	$(RUN) -m paper_figures

## The longer studies (minutes each; an interrupted one goes on), then the report of everything.
studies: .venv/simulations.installed
	$(RUN) -m simulations run grid phase search training
	$(RUN) -m simulations report

## The report, results/report.md and results/report.html, from the results that are there.
report: .venv/simulations.installed
	$(RUN) -m simulations report

## Measure the speeds that the README states.
bench: .venv/test.installed
	$(RUN) -m benchmarks
	$(RUN) -m benchmarks.losses
	$(RUN) -m benchmarks.sandbox
	$(RUN) -m benchmarks.intervals
	$(RUN) -m benchmarks.trainer

## The losses beside those of verl, in its environment.
bench-verl: .venv-verl/installed
	.venv-verl/bin/python -m benchmarks.losses

## Style, types, direction of imports: what a commit must pass besides the tests.
check: .venv/dev.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	.venv/bin/lint-imports
	.venv/bin/typos

.venv/simulations.installed: pyproject.toml constraints.txt | .venv
	$(INSTALL) -e ".[simulations,figures]"
	touch $@

.venv/train.installed: pyproject.toml constraints.txt | .venv
	$(INSTALL) -e ".[train]"
	touch $@

.venv/test.installed: pyproject.toml constraints.txt | .venv
	$(INSTALL) -e ".[test]"
	touch $@

.venv/dev.installed: pyproject.toml constraints.txt | .venv
	$(INSTALL) -e ".[dev]"
	touch $@

.venv-verl/installed: pyproject.toml constraints-verl.txt
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-verl.txt \
		-e ".[verl]" hypothesis pytest pytest-xdist
	touch $@

.venv:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv .venv-verl build dist results ctpo.egg-info
	cd proofs/rocq && rm -f *.vo* *.glob .*.aux *Makefile.coq* .Makefile.coq.d .lia.cache
