# Every target sets up what it needs in .venv; a second call finds it there. ARGS= passes further flags on.
#
#     make train ARGS="--workers 2 --epochs 3"

PYTHON ?= python3
BIN := .venv/bin

# The extra for the GPU, after the CUDA version of the driver; none without a driver, or by CUDA_EXTRA= on the command line.
# Asked only for the targets that install it, since nvidia-smi can take a second.
ifneq ($(filter train test bench,$(MAKECMDGOALS)),)
CUDA_VERSION := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA.* Version *: *\([0-9]*\)\..*/\1/p' | head -n 1)
CUDA_EXTRA := $(if $(filter 12,$(CUDA_VERSION)),cuda12,$(if $(filter-out 9 10 11,$(CUDA_VERSION)),cuda13))
endif

RUN_EXTRA := $(or $(CUDA_EXTRA),cpu)
TEST_EXTRA := $(if $(filter cuda12,$(CUDA_EXTRA)),test-cuda12,test)

.DEFAULT_GOAL := help
.PHONY: help train test bench lint clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST)

train: .venv/installed-$(RUN_EXTRA)  ## train a small network on handwritten digits with four workers
	$(BIN)/easgd-local train eamsgd --workers 4 $(ARGS)

test: .venv/installed-$(TEST_EXTRA)  ## run the tests; those marked gpu need one
	$(BIN)/python -m pytest --numprocesses 3 $(ARGS)

bench: .venv/installed-$(RUN_EXTRA)  ## time the exchange, and training as a whole
	$(BIN)/python bench/exchange.py
	$(BIN)/python bench/throughput.py
	$(BIN)/python bench/startup.py

lint: .venv/installed-lint  ## check style and types
	$(BIN)/ruff check
	$(BIN)/mypy

clean:  ## remove caches and build products; .venv and runs stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp a set of extras: a changed setup.py installs again, and so does a set not installed yet.
.venv/installed-cpu: setup.py pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --editable .
	@touch $@

.venv/installed-%: setup.py pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --editable '.[$*]'
	@touch $@

# Where Python comes without ensurepip, the pip at hand installs one into .venv.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "easgd_local needs Python 3.10 or newer, and '$(PYTHON)' is not: give one, make PYTHON=/path/to/python3.12" >&2; \
	    exit 1; }
	$(PYTHON) -m venv .venv || { \
	    $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
