# Two commands: make demo, make test. Both set up .venv first; PYTHON chooses the interpreter.
PYTHON ?= python3.11
ifeq (, $(shell command -v $(PYTHON) 2>/dev/null))
PYTHON := python3
endif
BIN := .venv/bin

.PHONY: demo test lint figures docs fuzz soak bench-peers clean

demo: .venv/ready
	$(BIN)/python -m examples.demo

test: .venv/ready
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

figures: .venv/ready
	$(BIN)/python -m figures

# docs/tables.md, the reference of every public function in build/docs, and a check of all links.
docs: .venv/ready
	$(BIN)/python docs/build.py

# Wrong input for everything that reads, some minutes of it, and docs/fuzz.md, the table of what came of it.
fuzz: .venv/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m fuzz

# Kills, flipped bits, two writers and lost workers, an hour of it, and docs/soak.md, the table of what came of them.
soak: .venv/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cluster]'
	$(BIN)/python -m fuzz.soak

# What benchmarks.ntk runs beside ours: python -m benchmarks.ntk --peer-python .venv-peers/bin/python
bench-peers: .venv-peers/ready

# The last jax on which every implementation of neural-tangents 0.6.5 runs: 0.4.26 lacks what structured ones import.
.venv-peers/ready: Makefile
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet jax==0.4.25 jaxlib==0.4.25 numpy==1.26.4 scipy==1.12.0 \
		tensorflow==2.21.0 neural-tangents==0.6.5
	touch $@

# torch comes first and by itself: its CPU build where pip has one, and no other package may change it.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,models,docs]'
	touch $@

clean:
	rm -rf .venv .venv-peers build *.egg-info
