# Each target works from a fresh clone by itself: it installs what it needs into .venv first.
#
#   make demo         install, pretrain, fine-tune and look at the result
#   make demo-segment segment made-up scenes                make demo-detect  detect objects in them
#   make test-fast    the tests that take seconds           make test     all tests
#   make lint         ruff: rules and format                make format   let ruff repair what it can
#   make types        mypy                                  make golden   remake all golden files
#   make times        all tests, with processor seconds     make hooks    let git run ruff before each commit
#   make docs         the documentation, as a site          make clean    remove .venv and runs
#   make test-newest  the fast tests with the newest JAX
#
# EXTRAS asks for more of setup.cfg's extras: make test EXTRAS=test,parity

PYTHON ?= python3
EXTRAS ?= test
BIN := .venv/bin
# JAX from 0.11 on needs Python 3.12. The environment's Python counts, once there is one.
CONSTRAINTS := $(shell $(firstword $(wildcard $(BIN)/python) $(PYTHON)) -c \
	'import sys; print("constraints%s.txt" % ("-py312" * (sys.version_info >= (3, 12))))')
# One stamp per set of extras, so that a target that needs more installs more.
INSTALLED := .venv/installed-
# A file's tests share its fixtures, so one worker runs them all. `pytest` alone starts no workers.
PARALLEL := --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

.PHONY: install demo demo-segment demo-detect test test-fast test-newest times lint format types docs golden hooks clean

install: $(INSTALLED)$(EXTRAS)

$(INSTALLED)%: setup.cfg pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$*]'
	touch $@

demo: install
	$(BIN)/python -m experiments.demo

demo-segment demo-detect: demo-%: install
	$(BIN)/python -m experiments.demo_scenes $*

test: install
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: install
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not processes"

# Needs root and debootstrap.
test-newest:
	.ci/newest runs/newest --numprocesses=auto --dist=loadfile -m "not slow and not processes"

times: install
	$(BIN)/python -m pytest $(PARALLEL) -p cpu_seconds

lint: $(INSTALLED)dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED)dev
	$(BIN)/mypy

# The variable leaves out Material's notice of its successor.
docs: $(INSTALLED)docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

golden: $(INSTALLED)parity $(INSTALLED)test
	$(BIN)/python tests/make_recipe_golden.py
	$(BIN)/python tests/parity/make_golden.py
	$(BIN)/python -m tests.launch.make_launch_golden

hooks: $(INSTALLED)dev
	$(BIN)/pre-commit install

clean:
	rm -rf .venv runs
