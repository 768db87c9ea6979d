# Everything happens in .venv; PYTHON is only used to create it. `make` alone lists the targets.

PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c '$(IS_SUPPORTED)' 2>/dev/null && echo $$python && break; done)
IS_SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check -qq
LOCK := requirements-cpu.lock
TORCH := $(shell grep '^torch==' $(LOCK))
EXTENSION := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: help setup requirements demo test test-slow kernels-check benchmark lint docs dist clean
.DELETE_ON_ERROR:

help:
	@echo "make setup      create .venv, install everything, build the C++ kernels (minutes, once)"
	@echo "make demo       train a small model by PPO on the CPU"
	@echo "make test       run the fast tests"
	@echo "make test-slow  run the slow tests, which take minutes each"
	@echo "make kernels-check  compile the CUDA kernels and their binding; registers and spills (needs nvcc, no GPU)"
	@echo "make benchmark  time every part beside alternatives (an hour; see docs/benchmark.md)"
	@echo "make lint       ruff and mypy"
	@echo "make docs       build the documentation into build/site and check its links"
	@echo "make dist       build dist/*.tar.gz, and from it dist/*.whl with the compiled kernels"
	@echo "make clean      remove what was built; .venv stays"

setup: $(VENV)/.installed
	@$(RUN) -m megatron_orz.ops.extension

requirements: $(VENV)/.requirements

demo: setup
	$(RUN) examples/demo.py

test: setup
	$(RUN) -m pytest

test-slow: setup
	$(RUN) -m pytest -m slow

kernels-check: requirements
	PYTHONPATH=. $(RUN) tools/check_kernels.py

benchmark: setup
	for part in train end-to-end packing rewards kernels sync; do $(RUN) tools/benchmark.py $$part || exit 1; done
	$(RUN) tools/benchmark.py table

lint: setup
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict # with --quiet, it would look at no link
	@echo "build/site/index.html"

dist: setup
	rm -rf dist
	$(RUN) -m build --no-isolation --outdir dist .

clean:
	rm -rf build dist *.egg-info megatron_orz/_C.*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis $(VENV)/.installed
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The files below are stamps: each is touched when its step is done, and is older than what would change the step.

$(VENV)/.created:
	@$(PYTHON) -c '$(IS_SUPPORTED)' 2>/dev/null || { \
		echo "Python 3.11 or 3.12 is needed, but \"$(PYTHON)\" is not one; install it, or name it: make setup PYTHON=..." >&2; \
		exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.requirements: $(LOCK) | $(VENV)/.created
	@echo "Installing $(TORCH)"
	@$(PIP) install --constraint $(LOCK) $(TORCH)
	@echo "Installing the packages of $(LOCK) (a few minutes)"
	@$(PIP) install --no-deps --requirement $(LOCK)
	@touch $@

$(VENV)/.installed: $(VENV)/.requirements $(EXTENSION)
	@echo "Building the C++ kernels and installing megatron_orz in place"
	@$(RUN) setup.py --quiet --name >/dev/null # says what a build would lack; pip would hide it
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@
