# The usual ways in: `make demo`, `make test`. Each installs into .venv first if need be.

VENV := .venv
STAMP := $(VENV)/.installed
# A bare interpreter of another version may stand under each of these names: ask it.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3 python; do \
	if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then command -v $$name; break; fi; done)

.DEFAULT_GOAL := help
.PHONY: help install demo test quick stress coverage lint docs

help:  ## say what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

install: $(STAMP)  ## make .venv and install dinogen with the exact versions of constraints.txt

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer on the PATH: install it, \
	or name it: make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "installing into $(VENV) with $(PYTHON) (2 GB, some minutes)"
	@"$(PYTHON)" -m venv $(VENV)
	@# pip is silent while it unpacks gigabytes, so the size of .venv shows that work goes on.
	@( while sleep 8 && kill -0 $$$$ 2>/dev/null; do \
		echo "  installing: .venv has $$(du -sm $(VENV) | cut -f1) MB"; done ) & progress=$$!; \
	trap "kill $$progress 2>/dev/null" EXIT INT TERM; \
	$(VENV)/bin/python -m pip install --progress-bar off --disable-pip-version-check \
		-c constraints.txt -e '.[dev,deepspeed,remote,serve,timm,latents,onnx,video,wandb,mlflow,trackio,optuna]'
	@touch $@

demo: $(STAMP)  ## photos to a trained generator, offline; own photos: make demo ARGS="--photos DIR"
	@$(VENV)/bin/dinogen demo $(ARGS)

# One thread: the tests' tensors are tiny, and those that start several ranks share the cores. Three
# at a time, for many wait: those of the cluster, which are one process, nearly all the time.
test: $(STAMP)  ## run the tests
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/python -m pytest \
		--numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# Exactly `-m quick`: then tests/conftest.py passes over all other files without importing them.
quick: $(STAMP)  ## run the tests that take a minute together, on any part of the code
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/python -m pytest -m quick \
		--numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

stress: $(STAMP)  ## run the long tests of tests/stress: random kills, faults and damage (an hour)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/python -m pytest tests/stress $(ARGS)

coverage: $(STAMP)  ## run the tests and report which lines they miss: build/coverage/index.html
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/python -m pytest \
		--numprocesses 3 --dist loadfile --no-loadscope-reorder \
		--cov --cov-report term:skip-covered --cov-report html:build/coverage $(ARGS)

docs: $(STAMP)  ## the documentation as pages, in build/docs
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

lint: $(STAMP)  ## ruff and mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
