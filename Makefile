# Each target makes what it needs; stamps inside .venv keep repeated calls quick.
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --root-user-action=ignore
# Files that are Python without saying so in their name.
SCRIPTS := tools/peers tools/reference

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench fuzz peers clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed ## install into .venv and show what blkferry does
	@$(BIN)/python examples/demo.py $(ARGS)

test: lint ## lint, then run all tests (ARGS="..." goes to pytest)
	@$(BIN)/python tools/peers make >/dev/null || true  # without it: the programs on PATH
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.tested ## ruff, mypy and the import layers
	@$(BIN)/ruff check --quiet . $(SCRIPTS)
	@$(BIN)/mypy --no-error-summary
	@for script in $(SCRIPTS); do $(BIN)/mypy --no-error-summary $$script || exit 1; done
	@$(BIN)/lint-imports >$(VENV)/lint-imports.log 2>&1 || { cat $(VENV)/lint-imports.log; exit 1; }

bench: $(VENV)/.installed peers ## compare with the peers (ARGS="..." goes to benchmarks/run.py)
	@$(BIN)/python benchmarks/run.py $(ARGS)

fuzz: $(VENV)/.tested ## run the fuzz targets (ARGS="..." goes to fuzz/run.py)
	@$(BIN)/python fuzz/run.py $(ARGS)

peers: $(VENV)/.made ## make the Debian root with QEMU, nbdkit, libnbd and fio (needs root)
	@$(BIN)/python tools/peers make

clean: ## remove all that was made here; the peers root stays in its cache
	@rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: $(VENV)/.made pyproject.toml
	@$(PIP) --editable .
	@touch $@

$(VENV)/.tested: $(VENV)/.made pyproject.toml
	@$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.installed

# Debian's python3 comes without the means to make a virtual environment.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "blkferry needs Python 3.11 or newer as $(PYTHON); name another with: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; \
	    then { apt-get update && apt-get install -y --no-install-recommends python3-venv; } >/dev/null; fi && \
	    $(PYTHON) -m venv --clear $(VENV); } || { \
	    echo "$(PYTHON) cannot make a virtual environment; on Debian, install python3-venv" >&2; exit 1; }
	@touch $@
