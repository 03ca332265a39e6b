# `make quickstart` and `make test` are all a fresh machine needs (Python 3.11 or later, git, gcc, make).
PYTHON ?= python3
VENV := .venv
JOBS ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count() + 1)')# processes that run tests; they wait for servers as much as they compute
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: help install constraints quickstart check test lint format retrain ui bench faults soak gpu-check clean

help:                ## what can be made
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

install: $(VENV)/.installed   ## the virtual environment, with everything in it

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "== $(VENV): installing (2 minutes or so; every version is a wheel)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; try make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[pipelines,dev]'
	@touch $@

constraints:         ## write constraints.txt from the environment, once its tests have passed
	@{ echo "# Versions that passed the tests together; \`make constraints\` writes them."; \
	   $(BIN)/python -m pip freeze --exclude-editable --disable-pip-version-check | sed 's/+[a-z0-9.]*$$//'; } > .constraints.part
	@mv .constraints.part constraints.txt

quickstart: install  ## render, shard, train, evaluate, register: `dvc repro` with the committed params.yaml
	@dvc repro
	@python -m pipelines.register --show

check: lint          ## what to run before each commit, a minute at most: lint, types, the fast tests
	@python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow"

test: install        ## the whole test suite
	@python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: install        ## ruff, mypy, codespell
	@ruff check . && ruff format --check . && mypy && codespell

format: install      ## let ruff mend what it can
	@ruff check --fix . ; ruff format .

retrain: install     ## the Prefect flow `retrain`, once
	@python -m pipelines.retrain

ui: install          ## Prefect, MLflow and the deployments of prefect.yaml, on loopback
	@python -m pipelines.ui

bench: install       ## benchmarks: ratios against a reference in the same run
	@for file in tests/benchmarks/bench_*.py; do echo "== $$file"; python $$file || exit 1; done

faults: install      ## every cell of the matrix of faults that did not hold yet, and docs/reliability.md
	@python tests/faults/run.py

HOURS ?= 1
soak: install        ## trainings, retrainings and registrations with random kills for HOURS=1
	@python tests/faults/soak.py --hours $(HOURS)

gpu-check:           ## on a machine with a GPU: tests and measurements of the training, into docs/performance.md
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tests/gpu/check.py

clean:               ## outputs and work states, not the downloads
	@rm -rf data/shards data/model data/report .runs
