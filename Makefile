# make quickstart   set everything up and run the main job        make test   set everything up and run the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Every branch of these is taken by a test, or `make test` fails.
FLOOR := src/evidence_ft/types.py,src/evidence_ft/evidence.py,src/evidence_ft/metrics.py,src/evidence_ft/contrastive.py,src/evidence_ft/heatmaps/*,src/evidence_ft/alignments/*

.PHONY: help quickstart test test-fast lint clean

help:
	@echo "make quickstart  install, fine-tune the toy model with and without evidence, write runs/quickstart/comparison.html"
	@echo "make test        install, lint, type-check, test with coverage"
	@echo "make test-fast   the same without the tests that launch processes"
	@echo "make clean       remove the environment and caches; runs/ stays"

# An editable install: the environment is made anew only when pyproject.toml changes.
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

quickstart: $(READY)
	$(BIN)/accelerate launch --num_processes 1 --mixed_precision no --dynamo_backend no --num_machines 1 \
	    recipes/flcp_evidence.py --run.name quickstart $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest --cov --cov-report=term-missing:skip-covered $(ARGS)
	$(BIN)/coverage report --fail-under=100 --include='$(FLOOR)'

test-fast: lint
	$(BIN)/pytest -m "not slow" $(ARGS)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage
