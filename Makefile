# Each target works alone on a machine that has Python 3.10+ and make: it builds .venv first.
PYTHON ?= python3
VENV ?= .venv
OUT ?= out/demo

BIN := $(VENV)/bin
READY := $(VENV)/.stamp
WHEEL := build/types

.DEFAULT_GOAL := help
.PHONY: help demo proof test lint format types clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: $(READY)  ## distil the digits teacher by five methods; leaves out/demo/report.html
	$(BIN)/stepdistill demo --out $(OUT)

test: lint types  ## everything that CI checks: lint, types of the built wheel, tests
	$(BIN)/python -m pytest -q --numprocesses auto --dist loadgroup --no-loadscope-reorder

proof: $(READY)  ## prove every method on closed-form teachers; rewrites docs/PROOF.md
	$(BIN)/stepdistill prove --all --json out/proof/rows.json --markdown docs/PROOF.md \
	  --bands out/proof/healthy.json --overwrite

lint: $(READY)  ## ruff, formatting, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

format: $(READY)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Types what ships: the wheel's files, from a folder where the checkout cannot be seen.
types: $(READY)  ## mypy --strict on the installed wheel
	rm -rf build
	mkdir -p $(WHEEL)/empty
	$(BIN)/python -m build --wheel --no-isolation --outdir $(WHEEL) . > $(WHEEL)/log || { cat $(WHEEL)/log; exit 1; }
	$(BIN)/python -m pip install -q --no-deps --target $(WHEEL)/site $(WHEEL)/*.whl
	mypy=$$(cd $(BIN) && pwd)/mypy && cd $(WHEEL)/empty && MYPYPATH=../site "$$mypy" -p stepdistill --strict \
	  --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache/wheel"

clean:  ## remove what was built (not .venv, not runs)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "stepdistill needs Python 3.10 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV) || { rm -f $(BIN)/python; exit 1; }

$(READY): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $@
