# make demo: install, then train, validate, detect and export on a synthetic data set.
# make test: install, then the fast tests. Everything lives in $(VENV); nothing else on the machine is changed.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
UV := $(VENV)/bin/uv
STAMP := $(VENV)/.installed

.PHONY: help install demo test test-all lint format bench results lock clean

help:
	@echo "make demo      install, then the whole pipeline on a synthetic data set (minutes, no download of data)"
	@echo "make test      install, then the fast tests"
	@echo "make test-all  the slow tests too"
	@echo "make lint      ruff and pyright"
	@echo "make bench     the benchmarks"
	@echo "make results   rebuild docs/results.md from experiments/results.csv"
	@echo "make lock      resolve requirements.lock anew"

install: $(STAMP)

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; name a newer one, e.g. make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet 'uv>=0.5'

$(STAMP): requirements.lock | $(UV)
	VIRTUAL_ENV=$(abspath $(VENV)) $(UV) pip install --compile-bytecode --no-deps --require-hashes -r requirements.lock
	@touch $@

demo: $(STAMP)
	$(PY) demo.py

test: $(STAMP)
	$(PY) -m pytest

test-all: $(STAMP)
	$(PY) -m pytest -m ''

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP)
	$(PY) -m experiments.bench

results: $(STAMP)
	$(PY) -m experiments.report

lock: | $(UV)
	UV_CUSTOM_COMPILE_COMMAND='make lock' $(UV) pip compile requirements-dev.txt --excludes requirements-exclude.txt \
		--universal --python-version 3.11 --generate-hashes --no-emit-index-url --upgrade -o requirements.lock --quiet

clean:
	rm -rf $(VENV)
