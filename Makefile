# The two commands to know: `make demo` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test fuzz lint docs clean
.DEFAULT_GOAL := demo

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("vitrim needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/vitrim demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

fuzz: $(STAMP)
	VITRIM_FUZZ=10000 $(BIN)/python -m pytest -n 2 tests/test_fuzz_*.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(STAMP)
	$(BIN)/python -m vitrim.showing.listing docs/list.md
	$(BIN)/python -m vitrim.models.census docs/models.md

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
