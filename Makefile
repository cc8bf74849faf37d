# make demo   trains two small networks on real digits and writes a report
# make test   runs the whole test suite
# make quick  runs the first case of every short test
# make lint   style and types
# make docs   builds the documentation into site/
# Everything is installed into .venv; delete the folder to start over.

PYTHON ?= python3
# For example PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu' for torch without CUDA.
PIP_FLAGS ?=
BIN := .venv/bin

.PHONY: demo test quick lint docs wheel clean
.DELETE_ON_ERROR:

demo: .venv/core
	$(BIN)/convatlas compare recognition --config examples/digits.yaml

test: .venv/dev
	$(BIN)/pytest -n 2 --dist worksteal $(PYTEST_FLAGS)

quick: .venv/dev
	$(BIN)/pytest -n 2 -m quick $(PYTEST_FLAGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: .venv/dev
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache

.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "convatlas needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/core: .venv/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e .
	touch $@

.venv/dev: .venv/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev,docs,log]'
	touch .venv/core $@

.venv/docs: .venv/dev
	touch $@
