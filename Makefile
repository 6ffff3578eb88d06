# make demo: install, pretrain, fine-tune and look at the result.  make test: run the tests.

PYTHON ?= python3
EXTRAS ?= test
BIN := .venv/bin
# A stamp per set of extras, so that asking for more installs more.
STAMP := .venv/installed-$(EXTRAS)

.PHONY: demo test lint install clean

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

demo: install
	$(BIN)/python experiments/demo.py

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs
