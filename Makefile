# Everything a fresh machine needs: Python 3.10 or newer, pip, make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR ?= runs/demo

.PHONY: help setup demo test lint format bench clean

help:
	@echo "make setup   environment with DALI and all development tools"
	@echo "make demo    pack, train and evaluate on the CPU, with a report"
	@echo "make test    the test suite"
	@echo "make lint    ruff and mypy"
	@echo "make bench   loader, step and both, on the demo's shards"

setup: $(VENV)/.dev

demo: $(VENV)/.demo
	$(BIN)/python -m fastssl.demo $(DEMO_DIR)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.demo
	$(BIN)/python -m shard_tools pack demo $(DEMO_DIR)/shards
	$(BIN)/python -m fastssl.bench mode=train recipe=demo data.root=$(DEMO_DIR)/shards bench.json=$(DEMO_DIR)/bench.json

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("fastssl needs Python 3.10 or newer, this is " + sys.version) if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv $(VENV)

# The demo runs without DALI; where the development environment is there already, it serves.
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	test -f $(VENV)/.dev || $(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dali,dev]'
	touch $@
