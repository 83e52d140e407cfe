# `make demo` and `make test` need only Python 3.11 or newer, git and make. Windows: see README.

PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install demo test browser check

install: .venv/installed

demo: install
	$(BIN)/studio train-sd

test: .venv/installed-test
	$(BIN)/python -m pytest

browser: .venv/installed-test
	$(BIN)/python -m pytest -o addopts= -q tests/browser

check: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(PIP) --editable ".[test]"
	@touch $@
