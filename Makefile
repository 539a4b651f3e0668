# make demo and make test set everything up on a fresh machine; a second run skips that.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NEWEST := .venv-newest
LOWEST := .venv-lowest
EXTRAS := dev,docs,report,privacy,serve,flower,tensorboard,mlflow
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test test-all test-long test-deployment test-newest test-lowest test-capabilities test-exhaustive mutants bench bench-gpu kill-test check format clean

demo: $(INSTALLED)
	$(BIN)/orchard demo --out runs/demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# What make test runs, then what is long: whole matrices, real data, shown commands, packaging.
test-all: test test-long

test-long: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "long and not deployment"

# All of what make test-all has a sample of.
test-exhaustive: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m exhaustive

# Real processes with TLS and keys; they mostly wait for each other.
test-deployment: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m deployment

# What make test runs, with the newest versions that pyproject.toml allows; torch alone is pinned,
# because its CPU build is what there is. make clean, or removing .venv-newest, asks for newer ones.
# TESTS names some of them.
TESTS :=
test-newest: $(NEWEST)/.installed
	OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest -n 2 -p no:cacheprovider $(TESTS)

# The same with the lowest versions that it allows.
test-lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/pytest -n 2 -p no:cacheprovider

# What is promised to the bit, with other instruction sets and numbers of threads.
PROMISED := tests/engine tests/deployment/test_coordinator.py tests/models/stored
test-capabilities: $(INSTALLED)
	for threads in 1 2; do \
		OMP_NUM_THREADS=$$threads $(BIN)/pytest $(PROMISED) || exit 1; \
		for capability in default avx2; do \
			ATEN_CPU_CAPABILITY=$$capability OMP_NUM_THREADS=$$threads \
				$(BIN)/pytest $(PROMISED) || exit 1; \
		done; \
	done

# 150 small changes of the source, and whether make test notices each; runs/mutants.json has all.
mutants: $(INSTALLED)
	$(BIN)/python scripts/mutants.py

# All measurements of this machine, and their charts; give MODEL and DATA for a real base.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.kernels.run --model "$(MODEL)" --data "$(DATA)"

# Whatever GPU is here; without one, what can be checked on a CPU, and what was left out.
bench-gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu.run

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
		".[$(EXTRAS)]"
	touch $(INSTALLED)

$(NEWEST)/.installed: pyproject.toml constraints.txt
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	echo "$(TORCH)" > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/pip install --quiet --constraint $(NEWEST)/constraints.txt torch
	$(NEWEST)/bin/pip install --quiet --constraint $(NEWEST)/constraints.txt \
		--editable ".[$(EXTRAS)]"
	touch $@

$(LOWEST)/.installed: pyproject.toml constraints.txt scripts/lowest_versions.py
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	echo "$(TORCH)" > $(LOWEST)/constraints.txt
	$(PYTHON) scripts/lowest_versions.py >> $(LOWEST)/constraints.txt
	$(LOWEST)/bin/pip install --quiet --constraint $(LOWEST)/constraints.txt torch
	$(LOWEST)/bin/pip install --quiet --constraint $(LOWEST)/constraints.txt \
		--editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(LOWEST) runs build site
