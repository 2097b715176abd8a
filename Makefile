# Two commands are all a new machine needs: `make verify` and `make test`.
# Each makes .venv when it is missing or older than what defines it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: verify test test-all lint types pdf notebooks mutants power calibration bench clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

verify: $(VENV)/installed
	mkdir -p build
	$(BIN)/mixproof verify --seed 0 --json build/report.json --html build/report.html

test: lint types
	$(BIN)/pytest -n auto --dist worksteal -m 'not slow'

test-all: lint types
	$(BIN)/pytest -n auto --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy -p mixproof
	$(BIN)/mypy tests benchmarks

# Runs the notebooks again and writes their outputs.
notebooks: $(VENV)/installed
	$(BIN)/python notebooks/execute.py

# What the sheet asks to hand in: the solutions of problems 1 to 7, then the evaluated notebook.
pdf: $(VENV)/installed
	$(BIN)/python notebooks/make_pdf.py build/exercise_sheet_12.pdf

# Changes the families' mathematics node by node: the tests must notice.
mutants: $(VENV)/installed
	mkdir -p build
	$(BIN)/python benchmarks/mutants.py --json build/mutants.json

# Every derivation of the fault bank by every check: what each sees alone.
power: $(VENV)/installed
	mkdir -p build
	$(BIN)/python benchmarks/power.py --json build/power.json

# Samplers on data from the prior, 1,000 times for each family, and planted faults by what sees them.
calibration: $(VENV)/installed
	mkdir -p build
	$(BIN)/python benchmarks/calibration.py --json build/calibration.json

# Ratios to scikit-learn and other peers, each in one run; SIZE_ROWS=100000000 needs 13 GB of disk.
SIZE_ROWS ?= 20000000
bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	mkdir -p build
	$(BIN)/python benchmarks/em_step.py --json build/em_step.json
	$(BIN)/python benchmarks/flower.py --json build/flower.json
	$(BIN)/python benchmarks/acceleration.py --json build/acceleration.json
	$(BIN)/python benchmarks/lloyd.py --json build/lloyd.json
	$(BIN)/python benchmarks/distributed.py --json build/distributed.json
	$(BIN)/python benchmarks/samplers.py --json build/samplers.json
	$(BIN)/python benchmarks/evidence.py --json build/evidence.json
	$(BIN)/python benchmarks/size.py --rows $(SIZE_ROWS) --folder build/size --json build/size.json

clean:
	rm -rf build $(VENV)
