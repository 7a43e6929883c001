# Each target sets up what it needs in .venv; on a fresh machine `make demo` or `make test` is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo bench compare test test-all lint docs clean

help: ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per extra, so that each target installs no more than it needs.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[$*]"
	@touch $@

demo: $(VENV)/.examples ## train with projUNN and with Stiefel, print a table, draw a plot (under 10 minutes)
	$(BIN)/python examples/compare_stiefel.py

bench: $(VENV)/.bench ## time a step against torch's optimisers and the rivals, with tables and plots (under 20 minutes)
	$(BIN)/python examples/benchmark/run.py

compare: $(VENV)/.bench ## every system of the field on the same four tasks, with tables and plots (under 20 minutes)
	$(BIN)/python examples/compare.py

lint: $(VENV)/.test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint $(VENV)/.test $(VENV)/.examples $(VENV)/.docs ## the test suite (under 10 minutes on two cores)
	$(BIN)/python -m pytest

test-all: lint $(VENV)/.test $(VENV)/.examples $(VENV)/.docs ## the test suite with the slow proofs
	$(BIN)/python -m pytest -m "slow or not slow"

docs: $(VENV)/.docs ## build the documentation, warnings as errors
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

clean: ## remove the environment and everything built
	rm -rf $(VENV) docs/_build results
