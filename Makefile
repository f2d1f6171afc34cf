# Every target makes the environment it needs; nothing has to be installed by hand.
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
OLDEST_TORCH ?= torch==2.11.0 torchvision==0.26.0
VENV := .venv
EXTRAS ?= test
BIN := $(VENV)/bin
# The name of the stamp says what was installed, so a change of the requirements installs again.
READY := $(VENV)/ready-$(firstword $(shell { cat setup.py pyproject.toml; echo '$(TORCH) $(EXTRAS)'; } | cksum))
SPHINX := $(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --doctree-dir build/doctrees
# The order of the tests follows from this, any text; outside a git checkout it is 0.
SHUFFLE ?= $(shell git rev-parse --short=8 HEAD 2>/dev/null || echo 0)
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

.PHONY: demo test test-anomalib test-machines test-long test-matrix bench gpu docs docs-links check setup

demo:
	@start=$$SECONDS; \
	$(MAKE) --no-print-directory setup; \
	ready=$$SECONDS; \
	$(BIN)/hgad-fast demo; \
	echo "set-up, downloads included: $$((ready - start)) s; demo: $$((SECONDS - ready)) s"

# One process and one thread a core: small products gain nothing from more. The order is the commit's own.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --shuffle=$(SHUFFLE)

# As other machines run them: with the vector instructions of an old, a recent and this processor, one thread or two,
# one process or two, each time in another order.
test-machines: $(READY)
	ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=2 $(BIN)/python -m pytest -n 1 --shuffle=$(SHUFFLE)-1
	ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --shuffle=$(SHUFFLE)-2
	env -u ATEN_CPU_CAPABILITY OMP_NUM_THREADS=2 $(BIN)/python -m pytest -n 1 --shuffle=$(SHUFFLE)-3

# The models in anomalib, in an environment of their own: `make test` shows that the library does not need it.
test-anomalib:
	$(MAKE) setup VENV=.venv-anomalib EXTRAS=test,anomalib
	OMP_NUM_THREADS=1 .venv-anomalib/bin/python -m pytest tests/plugin -n logical --dist loadfile --shuffle=$(SHUFFLE)

# What takes minutes, such as a training that is killed thirty times.
test-long: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long

# The oldest supported torch (it brings Triton 3.6) in an environment of its own, and the newest (Triton 3.8).
test-matrix:
	$(MAKE) test VENV=.venv-oldest TORCH='$(OLDEST_TORCH)'
	$(MAKE) test

bench: $(READY)
	$(BIN)/python -m pytest benchmarks

# For a machine with a GPU, whose python has torch and Triton: nothing is installed, and the checkout is what runs. Results
# go to runs/gpu. For a rented machine without network, `python -m benchmarks.gpu --plan` prints two short runs
# of the kernels, and `--plan user` two of what a user does.
gpu:
	$(PYTHON) -m benchmarks.gpu

# The site, site/index.html; tests/site, which nothing else runs, looks at what was built. A warning is an error.
docs: $(READY)
	rm -rf site
	$(SPHINX) --builder html --quiet docs site
	$(BIN)/python -m pytest --noconftest tests/site

# Whether the links to other hosts lead anywhere, which takes a network; without one, `tests/support/links.py` lists them.
docs-links: $(READY)
	$(SPHINX) --builder linkcheck docs build/links

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: $(READY)
	@:

# An interrupted set-up leaves the mark `incomplete`, and the next one starts from nothing.
$(READY):
	@if [ -e $(VENV)/incomplete ]; then rm -rf $(VENV); fi
	@mkdir -p $(VENV)
	@touch $(VENV)/incomplete
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@rm -f $(VENV)/incomplete $(VENV)/ready-*
	@touch $@
