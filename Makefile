# The first run of any target sets up .venv, which takes a minute or two. `make help` lists the targets.

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 4

BIN   := $(VENV)/bin
READY := $(VENV)/.ready
# Off: a look on the internet for a newer pyright.
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

.PHONY: help demo test test-all lint format bench docs clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(READY) ## train federated models on handwritten digits, with a table, a picture and a report
	@$(BIN)/python -m experiments run digits

test: $(READY) ## run the tests, up to WORKERS=4 modules at a time
	@$(BIN)/python -m pytest -n auto --maxprocesses $(WORKERS) --dist loadscope

test-all: $(READY) ## run the tests, the slow ones included
	@$(BIN)/python -m pytest -n auto --maxprocesses $(WORKERS) --dist loadscope -m "slow or not slow"

lint: $(READY) ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY) ## apply the style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY) ## measure a round against a hand-written loop
	@$(BIN)/python -m experiments.benchmarks limit

docs: $(READY) ## bring the generated tables of the README up to date
	@$(BIN)/python docs/generate.py

clean: ## remove the environment and all caches, but not runs/
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an installation that was interrupted is taken up again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "fedjax_lab needs Python 3.11 or newer; \`$(PYTHON) --version\` says: $$($(PYTHON) --version 2>&1)" ; \
	  echo "Name another one: make PYTHON=python3.12 ..." ; exit 1 ; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version); this takes a minute or two."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "Python's venv module failed. On Debian and Ubuntu: apt install python3-venv" ; exit 1 ; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
