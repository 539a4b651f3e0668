# make demo and make test set everything up on a fresh machine; a second run skips that.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all test-deployment mutants bench kill-test check format clean

demo: $(INSTALLED)
	$(BIN)/orchard demo --out runs/demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# What make test runs, then what is long: whole matrices, real data, shown commands, packaging.
test-all: test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "long and not deployment"

# Real processes with TLS and keys; they mostly wait for each other.
test-deployment: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m deployment

# 150 small changes of the source, and whether make test notices each; runs/mutants.json has all.
mutants: $(INSTALLED)
	$(BIN)/python scripts/mutants.py

# All measurements of this machine, and their charts; give MODEL and DATA for a real base.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.kernels.run --model "$(MODEL)" --data "$(DATA)"

# Every kind of process killed at random, 30 times in one run: make kill-test MODEL=... DATA=FOLDER
kill-test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/kills.py --kills 30 --model "$(MODEL)" \
		--data "$(DATA)" --recipe tests/faults/recipe.toml --out benchmarks/faults
	$(BIN)/python -m benchmarks.pages faults

# Also builds the documentation as a site, in site/.
check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_docs.py
	$(BIN)/python scripts/build_site.py

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# One torch for everybody: constraints.txt pins it, and pip takes the CPU build where there is one.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable \
		".[dev,docs,report,flower,tensorboard,mlflow]"
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) runs build site
