# Every target sets up .venv when it is missing or out of date, and is quick when it is there.
#   PYTHON=python3.12 make setup       another interpreter
#   TORCH=torch make setup             another build of torch than the CPU one (Linux)
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# PyPI's torch for Linux brings gigabytes of CUDA libraries; the "+cpu" build does not.
TORCH ?= torch==$(TORCH_VERSION)$(if $(filter Linux,$(shell uname -s)),+cpu)

# Small tensors: with several threads each mostly waits for the others, above all on a busy machine.
demo test test-all: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint check format docs bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
	  || sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1  \2/p' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv with the tested versions (CPU build of torch)

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "AutoDual needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps '$(TORCH)' 2>/dev/null \
	  || $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --extra-index-url $(TORCH_INDEX) '$(TORCH)'
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## certify a digit classifier; prints a table, writes out/demo.png
	$(BIN)/autodual demo --output out/demo.png

test: $(STAMP)  ## the tests and doctests
	$(BIN)/python -m pytest -q -n auto --dist worksteal

test-all: $(STAMP)  ## the tests and doctests, slow ones included
	$(BIN)/python -m pytest -q -m '' -n auto --dist worksteal

lint: $(STAMP)  ## formatting and lint only
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

check: lint test  ## everything that must be green before a commit

format: $(STAMP)  ## format and sort imports in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)  ## write docs/operators.md anew from the registered rules
	$(BIN)/python docs/generate_support_table.py

bench: $(STAMP)  ## time and bound width; ARGS="--data DIR --models DIR" names published weights
	$(BIN)/python benchmarks/published.py $(ARGS)

clean:  ## remove .venv and everything generated
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache .hypothesis
