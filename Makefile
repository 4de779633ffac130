# make ladder: the six rungs on the bundled model, from nothing. make test: the tests, likewise; make test-all: those too
# that take long.
PYTHON ?= python3
MODEL ?= tiny
ARGS ?=
BIN := .venv/bin
# A process a core, each with one thread: networks this small gain nothing by more. What stays together, for it shares
# what is made once, and in which order it comes, is in tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=logical --maxprocesses=8 --dist=loadgroup --no-loadscope-reorder
# `mlflow run --env-manager local` starts whichever python comes first.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: ladder test test-all lint ui bench clean

ladder: .venv/ready
	$(BIN)/mlflow run . -e ladder --env-manager local --experiment-name diffusion_fast -P model=$(MODEL) $(ARGS)

test: .venv/ready .venv/triton/ready
	$(PYTEST)
	PYTHONPATH=.venv/triton $(PYTEST) --dist=load tests/test_kernels_hopper.py

test-all: .venv/ready .venv/triton/ready
	$(PYTEST) -m ""
	PYTHONPATH=.venv/triton $(PYTEST) --dist=load -m "" tests/test_kernels_hopper.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: .venv/ready
	$(BIN)/diffusion-fast ui

bench: .venv/ready
	$(BIN)/python scripts/bench_harness.py

# A lock installed halfway leaves no stamp, and is taken up again.
.venv/ready: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# What the kernels are tested with. It stays out of the environment that measures: torch brings its own for a GPU.
.venv/triton/ready: .venv/ready
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/triton triton==3.6.0
	touch $@

clean:
	rm -rf .venv build *.egg-info
