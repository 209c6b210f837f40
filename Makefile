# `make demo` and `make test` set up .venv by themselves; nothing else has to be installed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SETUP := pyproject.toml constraints.txt

.PHONY: demo test lint types check clean

demo: $(STAMP)
	@$(BIN)/python tools/demo.py

test: $(VENV)/.developed
	$(BIN)/python -m pytest

lint: $(VENV)/.developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.developed
	$(BIN)/basedpyright

check: lint types test

clean:
	rm -rf $(VENV)

$(STAMP): $(SETUP)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.developed: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable ".[triton]"
	touch $@
