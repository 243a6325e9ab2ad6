# make train          set up, then train on the embedded digits (ARGS="--dataset_name cifar10" for others)
# make test           set up, then run every test          make check    format, lint, types
# make bench          set up with torch, then every benchmark of speed, on a CPU in a quarter of an hour
# make install        only set up                          make format   rewrite to the house format
PYTHON ?= python3
BIN = .venv/bin
UV := $(shell command -v uv 2>/dev/null)
ifdef UV
PIP = $(UV) pip install --quiet --python $(BIN)/python
else
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
endif

.PHONY: train test bench check format install

train: .venv/installed
	$(BIN)/python train.py $(ARGS)

test: .venv/installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

# Fifty steps of sampling are ten times five: the loop is one program, however long it runs.
bench: .venv/installed-bench
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/sample.py --n_steps 5
	$(BIN)/python benchmarks/startup.py
	set -e; for script in $(wildcard benchmarks/input.py benchmarks/scaling.py); do \
		$(BIN)/python $$script; done

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: .venv/installed

.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt requirements-text.txt requirements-bench.txt .venv/installed
	$(PIP) -r requirements-dev.txt
	touch $@

.venv/installed-bench: requirements-bench.txt .venv/installed
	$(PIP) -r requirements-bench.txt
	touch $@
