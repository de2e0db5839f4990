# Everything a new checkout needs: `make quickstart`, then `make test`.
#
#   PYTHON    the interpreter to build the environment with (3.10 or newer)
#   VENV      where the environment goes
#   PIP_ARGS  extra arguments for pip, for example an index with CPU builds of torch:
#             make quickstart PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
SOURCES := megakda tools tests setup.py

.PHONY: help quickstart test test-parity test-recipes test-peers lint format kernel-report docs-figures clean

help:
	@echo "make quickstart    environment, a small model trained on 2 CPU ranks, exported, a sample, a plot"
	@echo "make test          the test suite (2 cores, no GPU)"
	@echo "make test-parity   layouts and context parallelism in all combinations of choices (hours)"
	@echo "make test-recipes  every recipe with scale=smoke, 20 steps on 2 CPU ranks"
	@echo "make test-peers    FLA=checkout: flash-linear-attention's tests of KDA on our operators"
	@echo "make lint          ruff and mypy"
	@echo "make format        ruff's formatter and import order"
	@echo "make kernel-report compiles the GPU kernels for three architectures, counts their bytes"
	@echo "make docs-figures  trains the models behind the figures in docs/"
	@echo "make clean         remove build products and caches (runs and data stay)"

# torch is installed by its pinned version: a bare requirement may choose a much larger build.
$(VENV)/.base: pyproject.toml setup.py constraints.txt
	@echo "creating $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@$(PIP) -e '.[dev]'
	@touch $@

quickstart: $(VENV)/.base
	@$(BIN)/python tools/quickstart.py

# Each worker has up to four ranks of its own; files stay together, for the ranks and models they share.
TEST_WORKERS ?= 2

test: $(VENV)/.dev
	@$(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile

test-parity: $(VENV)/.dev
	@$(BIN)/python -m pytest -q -m "parity or not parity" tests/parallel/test_layouts.py \
		tests/parallel/test_context_parity.py

test-recipes: $(VENV)/.dev
	@$(BIN)/python -m pytest -q -m "recipes or not recipes" tests/test_recipes.py

# fla-core lies apart from the environment, where transformers would find it and use it.
$(VENV)/peers: $(VENV)/.dev
	@$(PIP) --no-deps --target $@ fla-core==0.6.0 einops

PEER_ARGS ?= --kda-limit 300000000

test-peers: $(VENV)/peers
	@test -d "$(FLA)" || { echo "FLA=... must be a checkout of flash-linear-attention"; exit 2; }
	@PYTHONPATH=$(VENV)/peers $(BIN)/python -m pytest -q -rsxfE -c /dev/null --rootdir $(FLA) \
		-p tests.peers.fla_suite $(FLA)/tests/ops/test_kda.py $(PEER_ARGS)

lint: $(VENV)/.dev
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

# Writes benchmarks/results/kernels_aot.* and kernels_bytes.*; needs triton, and no GPU.
kernel-report: $(VENV)/.dev
	@$(BIN)/python tools/kernel_report.py
	@$(BIN)/python tools/kernel_bytes.py

docs-figures: $(VENV)/.base
	@$(BIN)/python tools/compare_precision.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
