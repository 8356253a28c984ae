# Everything from a fresh machine with Python >= 3.11 and make. `make demo`, `make test`; the rest below.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# accelerate launch would set one thread, and the second core would idle. Not more than two: the embedded model is too
# small to gain, and a thread that waits for a core that something else took holds all the others up.
export OMP_NUM_THREADS ?= $(shell $(PYTHON) -c "import os; print(min(2, os.cpu_count()))")
# Another wheel index for torch, a CPU one say: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: demo test test-slow test-all clients lint gpu-check results bench chaos fuzz figure clean

demo: $(VENV)/.run
	$(BIN)/accelerate launch --config_file accelerate_config.yaml train.py --exp exp_002 --tiny

# Two tests at a time with one thread each: faster than one with two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(VENV)/.dev
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

# The rest of the tests: real launches, kills, larger models.
test-slow: $(VENV)/.dev
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-all: test test-slow

# llama.cpp and `transformers serve`, in which tests run exports; they are skipped without them.
clients: $(VENV)/.clients

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Needs a GPU: the recipes at TinyLlama's true size, bf16 and fp16, with a stop and continuation.
gpu-check: $(VENV)/.run
	$(BIN)/python -m benchmarks.gpu_check

# The experiments with a real model and data: results/<setting>.json and the README's table. Needs a GPU, or --cpu:
# make results RESULTS_ARGS="--experiments exp_002 exp_004"
# make results RESULTS_ARGS="--cpu --model HuggingFaceTB/SmolLM2-135M-Instruct --examples 800 --limit 200"
results: $(VENV)/.run
	$(BIN)/python -m benchmarks.results $(RESULTS_ARGS)

# HF Trainer, its options, TRL and our loop on the same rows, on one thread: half an hour or more on a quiet machine.
# make bench BENCH_ARGS="--full --profile --write"
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.compare --plot docs/bench.png $(BENCH_ARGS)

# 200 SIGKILLs and every damage to a checkpoint; the figures of one run are in benchmarks/RESULTS.md.
chaos: $(VENV)/.run
	$(BIN)/python -m benchmarks.chaos --out chaos.json

# Generated data files; what it tries differs from run to run.
fuzz: $(VENV)/.dev
	$(BIN)/python -m pytest fuzz $(PYTEST_ARGS)

# The README's figure: our losses on HF Trainer's.
figure: $(VENV)/.dev
	$(BIN)/python -m benchmarks.parity_figure

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python >= 3.11 is needed: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements.txt pyproject.toml | $(VENV)/bin/python
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) $$(grep '^torch==' requirements.txt))
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --editable .
	touch $@

$(VENV)/.dev: requirements-dev.txt requirements.txt $(VENV)/.run
	$(PIP) -r requirements-dev.txt
	touch $@

$(VENV)/.clients: requirements-llama.txt $(VENV)/.dev
	$(PIP) -r requirements-llama.txt
	touch $@

$(VENV)/.bench: requirements-bench.txt $(VENV)/.dev
	$(PIP) -r requirements-bench.txt
	touch $@
