# Every target sets itself up from a fresh clone. `make` or `make help` lists them.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest tests --ignore=tests/gpu -n 2 --dist loadfile --no-loadscope-reorder
PIP := $(PY) -m pip install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help run preview check-parity verify-resume export test test-all test-gpu lint wheel bench bench-startup clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

run: $(VENV)/run ## fine-tune the embedded default on the CPU; ARGS="key=value ..." changes it
	$(PY) -m automodel.run $(ARGS)

preview: $(VENV)/run ## show the rows as they would be trained on; ARGS="key=value ..." chooses them
	$(PY) -m automodel.preview $(ARGS)

check-parity: $(VENV)/run ## compare a layout with one process; ARGS="key=value ..." chooses it
	$(PY) -m automodel.check_parity $(ARGS)

verify-resume: $(VENV)/run ## kill a run at random moments and compare it with a whole one; ARGS chooses it
	$(PY) -m automodel.verify_resume $(ARGS)

export: $(VENV)/run ## write a Hugging Face directory from a checkpoint; ARGS="CHECKPOINT OUT key=value ..."
	$(PY) -m automodel.export $(ARGS)

# Two files at a time, in their order: what tests fork from has not run a backward then, and the short ones come last.
test: $(VENV)/test ## run the CPU tests without the slow ones; ARGS="-k name" chooses some, ARGS="-n 0 -s" shows their output
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/test ## run all CPU tests, as CI does
	$(PYTEST) $(ARGS)

test-gpu: ## run the tests that need a CUDA device, with the interpreter PYTHON and what it has installed
	$(PYTHON) -m pytest tests/gpu $(ARGS)

lint: $(VENV)/test ## check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

wheel: $(VENV)/test ## build the wheel into dist/
	rm -rf build dist
	$(PY) -m build --wheel --no-isolation --outdir dist .

bench: $(VENV)/bench ## compare training on the CPU with a plain loop, Trainer and TRL; ARGS="--case small --rounds 1"
	$(PY) -m benchmarks.compare $(ARGS)

bench-startup: $(VENV)/run ## measure start-up times
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.startup

clean: ## remove what the targets above built
	rm -rf $(VENV) build dist *.egg-info

# torch first: with the constraint it is the tried version, and nothing else pulls in another.
$(VENV)/run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("automodel needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/test: $(VENV)/run
	$(PIP) --editable '.[test]' setuptools wheel
	touch $@

$(VENV)/bench: $(VENV)/run
	$(PIP) --editable '.[bench]'
	touch $@
