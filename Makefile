# Targets for people. `make pretrain-tiny` and `make test` need only Python >= 3.11 and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= dev
RUN ?= runs/tiny
RUN_7B ?= runs/llama-7b

.PHONY: help setup pretrain-tiny pretrain-7b-24gb test test-slow lint format clean

help:
	@echo "make pretrain-tiny      train a small LLaMA from scratch and print a sample (about 5 minutes on 2 cores)"
	@echo "make pretrain-7b-24gb   LLaMA-7B on a 24 GB card, on C4 or with DATA=path on local text"
	@echo "make test               run the tests"
	@echo "make lint               ruff and mypy over everything"

setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("lowres needs Python 3.11 or newer; set PYTHON=python3.x" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@

# A finished run says so; an interrupted one goes on.
pretrain-tiny: $(STAMP)
	$(BIN)/lowres train configs/tiny.toml --run $(RUN) $(if $(wildcard $(RUN)/config.toml),--resume)

# DATA=path trains on local text instead of C4
pretrain-7b-24gb: $(STAMP)
	$(BIN)/lowres train configs/llama_7b_24gb.toml --run $(RUN_7B) \
		$(if $(DATA),--set data.source=$(DATA) --set data.val_source=) $(if $(wildcard $(RUN_7B)/config.toml),--resume)

# two processes of one thread each: small tensors gain nothing from threads
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
