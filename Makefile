# make demo and make test set everything up on a fresh machine; a second run skips that.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-deployment check format clean

demo: $(INSTALLED)
	$(BIN)/orchard demo --out runs/demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# Real processes with TLS and keys; they mostly wait for each other.
test-deployment: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m deployment

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_docs.py

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# One torch for everybody: constraints.txt pins it, and pip takes the CPU build where there is one.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,report,flower]"
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) runs
