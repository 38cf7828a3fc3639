# Every target sets up what it needs. Needs Python 3.11 or newer with pip and venv.
PYTHON ?= python3
# The two environments are made side by side.
MAKEFLAGS += --jobs=2
export SNAKEMAKE_PROFILE ?= workflow/profiles/default
export PATH := $(CURDIR)/.venv/bin:$(PATH)
READY := .venv/.ready
LINT := .venv-lint/.ready

STUDIES := $(notdir $(wildcard config/studies/*))

.PHONY: run $(STUDIES:%=study-%) docs test test-cluster test-families test-report test-runtimes lint clean

run: $(READY)  ## the default run: a real model, ends with a table and a report
	snakemake
	a3 show results/tables/default

$(STUDIES:%=study-%): study-%: $(READY)  ## a study of config/studies/
	snakemake --configfile config/config.yaml config/studies/$*/config.yaml
	a3 show results/tables/$*

study-%:
	@echo "there is no study $*; config/studies/ has $(STUDIES)" >&2; exit 1

test: $(READY) lint  ## the whole test suite, on two cores: two more workers while others wait
	OMP_NUM_THREADS=1 python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

test-cluster: $(READY)  ## the workflow on a Slurm of its own; needs root and apt
	tests/cluster/run

test-report: $(READY)  ## the report in a browser; Debian's Chromium, by root and apt where it is missing
	tests/browser/run

test-families: $(READY)  ## probes of all model types of transformers, about five minutes
	OMP_NUM_THREADS=1 python -m pytest -n 2 -m families tests/models/test_probe.py

test-runtimes: $(READY)  ## exports in real runtimes, which wheels hold
	tests/runtimes/run

docs: $(LINT)  ## the documentation as a site, site/index.html; needs no network to read
	NO_MKDOCS_2_WARNING=1 .venv-lint/bin/mkdocs build --strict --quiet

lint: $(READY) $(LINT) docs
	ruff check
	ruff format --check
	.venv-lint/bin/snakefmt --check --compact-diff Snakefile workflow
	PYTHONPATH=. .venv-lint/bin/lint-imports --no-cache --no-logo
	.venv-lint/bin/mypy

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "a3 needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.lock
	.venv/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

# snakefmt wants other versions of its libraries than snakemake has.
$(LINT): Makefile
	$(PYTHON) -m venv .venv-lint
	.venv-lint/bin/python -m pip install -q snakefmt==2.1.0 import-linter==2.17 mkdocs-material==9.8.2 mypy==2.4.1
	touch $@

clean:
	rm -rf .venv .venv-lint .venv-runtimes site
