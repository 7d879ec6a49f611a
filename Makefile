# make demo | test | test-cluster | faults | hostile | lint | bench | gpu: each makes .venv and installs what it needs, once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-cluster faults hostile lint bench gpu clean help

help: ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# Bytecode is made on all cores, without the packages' own tests. Were it left to the first import, all processes of a
# job would compile the same files at once, and anew at every start where PYTHONDONTWRITEBYTECODE is set. Templates that
# are not Python yet fail to compile, hence `|| true`.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: '$(PYTHON)' is not on the PATH; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing what is missing into $(VENV) (about 2.3 GB; some minutes)"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[serving,trainer,tracing,dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	touch $(STAMP)

demo: $(STAMP) ## images to a running service; KEEP=1 leaves it running, TRAIN='run.epochs=2' overrides the config
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python deploy/demo.py $(if $(filter 1,$(KEEP)),--keep) $(TRAIN)

test: $(STAMP) ## every test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(TESTS)

test-cluster: $(STAMP) ## as root: nodes of a cluster that are killed and cut off, some ten minutes
	PATH="$(CURDIR)/$(BIN):$$PATH" CLUSTER=long $(BIN)/python -m pytest tests/cluster $(TESTS)

faults: $(STAMP) ## training runs whose processes, nodes and disks fail at random moments; about an hour
	PATH="$(CURDIR)/$(BIN):$$PATH" FAULTS=long $(BIN)/python -m pytest -s tests/trainer/faults $(TESTS)

hostile: $(STAMP) ## the attacks on the service in their long form, with a table of what each cost
	PATH="$(CURDIR)/$(BIN):$$PATH" HOSTILE=long $(BIN)/python -m pytest tests/serving/hostile $(TESTS)

lint: $(STAMP) ## ruff, mypy in strict mode, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## the head against its peers; see benchmarks/README.md
	$(BIN)/python benchmarks/head.py --classes 200000 --batch 256 --dim 512 --ranks 1 --device cpu --dtype fp32

gpu: $(STAMP) ## on a machine with a GPU: the head's kernels tested and measured
	$(BIN)/python -m pytest tests/trainer/head/test_kernels.py
	$(BIN)/python benchmarks/head.py --device cuda --classes 1000000 --batch 1024 --dtype bf16
	$(BIN)/python benchmarks/head_scale.py --device cuda --classes 1000000 --batch 1024 --dtype bf16 --algorithm store --unfused --graph

clean: ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
