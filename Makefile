# One command from nothing:  make demo   make test
# VENV=          uses $(PYTHON) as it is and installs nothing:  make test VENV= PYTHON=python3 ARGS="--device cuda"
# ARGS="..."     goes to the demo or to pytest:                 make demo ARGS="--data mnist --download"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

# Processes that share the tests: one for each core.
JOBS ?= auto

# A test that hangs is stopped, where pytest-timeout is installed; seconds.
export PYTEST_TIMEOUT ?= 600

# Threads of OpenMP that wait give up their core: on a busy machine this is two to four times as fast.
export OMP_WAIT_POLICY ?= passive

ifeq ($(strip $(VENV)),)
python := $(PYTHON)
else
python := $(VENV)/bin/python
demo: $(VENV)/.installed-$(if $(filter --download,$(ARGS)),experiments,demo)
test: $(VENV)/.installed-test
lint: $(VENV)/.installed-lint
bench: $(VENV)/.installed-bench
endif

.PHONY: help demo test lint bench clean

help:
	@echo "make demo   train a small attentive network on cluttered digits, CPU or GPU"
	@echo "make test   run the tests"
	@echo "make lint   check style"
	@echo "make bench  run the benchmark suite, or a part: ARGS='--only C=320 --budget 300', ARGS=bars, ARGS=--help"
	@echo "make clean  remove the virtual environment, caches and builds (runs/ stays)"

demo:
	$(python) -m ar_kernels.experiments demo $(ARGS)

test:
	$(python) -m pytest -n $(JOBS) $(ARGS)

lint:
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	$(if $(strip $(VENV)),$(VENV)/bin/)clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cpp csrc/*/* tests/emulator/*.[chu]*)

bench:
	$(python) -m benchmarks $(ARGS)

# One virtual environment holds what the targets asked for so far.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first: it is not needed to build the package, but to build the native library with it (setup.py).
$(VENV)/.installed-%: constraints.txt pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/*/*) | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf .venv build dist ar_kernels/_native.* ar_kernels/_node-* *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
