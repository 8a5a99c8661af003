# Two commands: make demo, make test. Both set up .venv first; PYTHON chooses the interpreter.
PYTHON ?= python3.11
ifeq (, $(shell command -v $(PYTHON) 2>/dev/null))
PYTHON := python3
endif
BIN := .venv/bin

.PHONY: demo test lint figures clean

demo: .venv/ready
	$(BIN)/python -m analyses.mode_connectivity

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

figures: .venv/ready
	$(BIN)/python -m figures

# torch comes first and by itself: its CPU build where pip has one, and no other package may change it.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
