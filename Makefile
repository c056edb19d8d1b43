# Everything a fresh machine needs: Python 3.10 or newer, pip, make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR ?= runs/demo
TEST_WORKERS ?= 2
KERNEL := $(wildcard pipelines/native/*.[ch]) pipelines/native/build.py

.PHONY: help setup demo test faults lint format bench clean

help:
	@echo "make setup   environment with DALI and all development tools"
	@echo "make demo    pack, train and evaluate on the CPU, with a report"
	@echo "make test    the test suite"
	@echo "make faults  every fault as often as promised, and the table in docs/reliability.md; hours"
	@echo "make lint    ruff and mypy"
	@echo "make bench   fastssl's loader beside eight others, on DATA=FOLDER of images; half an hour"

setup: $(VENV)/.dev

demo: $(VENV)/.demo
	$(BIN)/python -m fastssl.demo $(DEMO_DIR)

# One thread of OpenMP a process: with as many as cores, processes beside each other take ten times as long.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

faults: $(VENV)/.dev
	FASTSSL_FAULTS=full FASTSSL_RECORD_FAULTS=bench/results/faults.json $(BIN)/python -m pytest -m fault $(PYTEST_ARGS)
	$(BIN)/python -m tests.faults.table

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	@test -n "$(DATA)" || { echo "error: say where images are, one folder a class: make bench DATA=FOLDER"; exit 2; }
	$(BIN)/python -m bench.loader --data $(DATA) --views moco_v2 swav clsa_multi

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("fastssl needs Python 3.10 or newer, this is " + sys.version) if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv $(VENV)

# The demo runs without DALI; where the development environment is there already, it serves.
$(VENV)/.demo: pyproject.toml $(KERNEL) | $(VENV)/bin/python
	test -f $(VENV)/.dev || $(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml $(KERNEL) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dali,dev]'
	touch $@
