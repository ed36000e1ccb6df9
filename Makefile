# SPDX-License-Identifier: Apache-2.0
# Everything starts from a fresh clone with Python >= 3.11, pip and npm: each target makes the environment it needs.
#   make demo                              train and predict on real scans, result in demo/report.html
#   make test                              the whole test suite
#   make integration                       MONAI Label and MLflow, each in an environment of its own
#   make bench                             speed against named rivals, side by side; tables of docs/performance.md
#   make evidence DATA=FOLDER              methods and rivals on real patients (docs/evidence.md); resumable, takes hours
#   make test PYTHON=python3.12 VENV=env   another interpreter, another folder for the environment

PYTHON ?= python3
VENV   ?= .venv
DEMO   ?= demo
DATA   ?=
TESTS  ?= tests
# a process per core, at most four, each with one thread; `make test WORKERS=` runs one process
WORKERS ?= --numprocesses logical --maxprocesses 4 --dist loadfile

python := $(VENV)/bin/python
stamp  := $(VENV)/.samda-installed

.PHONY: help venv demo test integration bench evidence docs lint format types wheel constraints clean

help:
	@sed -n 's/^#   //p' Makefile

venv: $(stamp)

# Run again only when what is to be installed has changed. An environment without a working interpreter (interrupted,
# moved, or its Python gone) is made anew; any other is completed in place.
$(stamp): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "samda needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(python) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV); PyTorch is large, so the first time takes minutes"
	@$(python) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(stamp)
	$(python) -m samda demo --output $(DEMO)

test: $(stamp)
	PYTHONWARNDEFAULTENCODING=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(python) -m pytest $(WORKERS) $(TESTS)

# not part of `make test`: it installs other projects' programs into the cache folder, and trains for some minutes
integration: $(stamp)
	$(python) -m pytest integration

bench: $(stamp)
	$(python) -m benchmarks.speed
	$(python) -m benchmarks.scaling

evidence: $(stamp)
	$(python) -m benchmarks.evidence $(if $(DATA),--data $(DATA),)

# after a change of options, docstrings or settings
docs: $(stamp)
	$(python) docs/generate.py

lint: $(stamp)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) .ci/house.py

format: $(stamp)
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

types: $(stamp)
	$(python) -m mypy

wheel: $(stamp)
	rm -rf build
	$(python) -m build --wheel --outdir dist .

# after an upgrade of the environment: pin what is installed now
constraints: $(stamp)
	$(python) .ci/constraints.py > constraints.txt.new
	mv constraints.txt.new constraints.txt
	touch $(stamp)

clean:
	rm -rf build dist samda.egg-info .pytest_cache .mypy_cache .ruff_cache
	find samda tests integration benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
