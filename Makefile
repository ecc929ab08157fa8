# quickstart: the first run.  test: fast tests.  check: formatter, linter, types, import layers.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test test-slow check format demo clean

quickstart: $(INSTALLED)
	$(BIN)/klippo train quickstart --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

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

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
