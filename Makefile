# Each target sets up what it needs in .venv; on a fresh machine `make demo` or `make test` is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A process for each core; what a module prepares is prepared once, and the blocks of a page run in their order.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile
# What is run once more without compiled loops; runs of thousands of steps are left out.
CORE := tests/moves tests/manifold tests/optim/test_in_place.py --ignore tests/moves/test_drift.py

.DEFAULT_GOAL := help
.PHONY: help demo bench compare device test test-all integration lint hooks docs dist clean

help: ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per extra, so that each target installs no more than it needs.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(INSTALL) -e ".[$*]"
	@touch $@

demo: $(VENV)/.examples ## see what projUNN is for: a table, a verdict, a plot (under 8 minutes)
	$(BIN)/python examples/demo.py

bench: $(VENV)/.bench ## time a step against torch's optimisers and the rivals, with tables and plots (under 40 minutes)
	$(BIN)/python benchmarks/run.py

compare: $(VENV)/.bench ## train projUNN and nine other systems (Stiefel, POGO, expRNN, ...) on six tasks, with plots (under 60 minutes)
	$(BIN)/python benchmarks/systems.py

device: $(VENV)/.test ## check the package on the device at hand, or on DEVICE=..., and time its steps (under 2 minutes)
	$(BIN)/python -m projunn_manifold.selftest $(if $(DEVICE),--device $(DEVICE))

lint: $(VENV)/.test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

hooks: $(VENV)/.test $(VENV)/.hooks ## check every commit as .pre-commit-config.yaml says
	$(BIN)/pre-commit install

test: lint $(VENV)/.test $(VENV)/.examples ## the test suite (under 10 minutes on two cores), and its core without compiled loops
	$(PYTEST)
	PROJUNN_MANIFOLD_LOOPS=0 $(PYTEST) $(CORE)

test-all: lint $(VENV)/.test $(VENV)/.examples ## the test suite with the slow proofs
	$(PYTEST) -m "slow or not slow"

integration: $(VENV)/.test $(VENV)/.integration ## tests with Lightning, accelerate, safetensors, ONNX, TensorBoard and Triton
	$(PYTEST) -m integration tests/integration

docs: $(VENV)/.docs ## build the documentation, warnings as errors, and follow its links
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html
	$(BIN)/python docs/check_links.py docs/_build/html

# The tests come from the sdist, without the package beside them, so that only the installed wheel can be imported.
# mypy finds types in it by py.typed alone.
dist: $(VENV)/.test $(VENV)/.dist ## build sdist and wheel, check them, test the wheel in an environment of its own (10 minutes)
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m pytest tests/test_dist.py
	$(BIN)/python -m twine check --strict dist/*
	mkdir -p build/source
	tar -xzf dist/*.tar.gz -C build/source --strip-components 1
	rm -r build/source/projunn_manifold
	$(PYTHON) -m venv build/venv
	build/venv/bin/python $(INSTALL) "$$(ls dist/*.whl)[test]"
	cd build/source && ../venv/bin/python -c "import projunn_manifold as p; assert 'site-packages' in p.__file__, p.__file__"
	cd build/source && ../venv/bin/mypy --config-file= --strict -c "from projunn_manifold import UnitaryLowRank"
	cd build/source && ../venv/bin/python -m pytest -m "not site and not slow and not integration" tests --pyargs projunn_manifold

clean: ## remove the environment and everything built
	-$(BIN)/pre-commit uninstall
	rm -rf $(VENV) build dist docs/_build docs/gallery docs/tutorials results .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
