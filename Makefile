# Needs python 3.11 or newer, make and the package registry. Every target builds .venv first where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow soak check bench clean

demo: $(INSTALLED)
	$(BIN)/omniloom demo $(ARGS)

test: $(INSTALLED)
	$(BIN)/pytest $(ARGS)

# Exit status 5 is pytest's "no test collected".
test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow $(ARGS) || [ $$? -eq 5 ]

soak: $(INSTALLED)
	OMNILOOM_SOAK=1 $(BIN)/pytest -m slow $(ARGS) || [ $$? -eq 5 ]

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_imports.py -q

bench: $(INSTALLED)
	@for script in tests/benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) corpora runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "omniloom needs python 3.11 or newer")'
	@started=$$(date +%s); $(PYTHON) -m venv $(VENV) \
	  && $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]' && touch $@ \
	  && echo "installed in $$(( $$(date +%s) - started )) s"
