# Targets for users. `make pretrain-tiny` and `make test` need only Python >= 3.11 and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= dev
RUN ?= runs/tiny
PRESETS := 7b-24gb 7b-12gb 7b-8gb 13b-24gb 1b-8gb 7b-24gb-deepspeed
RELORA := tiny 7b-24gb
TUNING := sft dpo

.PHONY: help setup pretrain-tiny $(PRESETS:%=pretrain-%) $(RELORA:%=pretrain-relora-%) $(TUNING:%=smoltulu-%) smoke-7b-cpu test test-slow test-install golden torture lint format clean

help:
	@echo "make pretrain-tiny      train a small LLaMA from scratch and print a sample (about 5 minutes on 2 cores)"
	@echo "make pretrain-7b-24gb   LLaMA-7B on a 24 GB card, on C4 or with DATA=path on local text; STEPS=n"
	@echo "                        also $(wordlist 2,5,$(PRESETS:%=pretrain-%))"
	@echo "make pretrain-7b-24gb-deepspeed   the same with plain AdamW, offloaded by DeepSpeed to 96 GB of host memory"
	@echo "make pretrain-relora-7b-24gb   the same with ReLoRA; pretrain-relora-tiny is a small example"
	@echo "make smoltulu-sft MODEL=folder   tune SmolLM2-1.7B on the chats of Tulu 3 or DATA=path, on an 8 GB card"
	@echo "make smoltulu-dpo       then on its preferences; begins with runs/smoltulu-sft, or MODEL=folder"
	@echo "make smoke-7b-cpu       two steps of a real LLaMA-7B without a GPU, and a third after resuming (12 GiB, 10 to 30 minutes)"
	@echo "make test               run the tests"
	@echo "make torture            attack runs in every known way, and see whether results stay exact (20 minutes)"
	@echo "make lint               run ruff and mypy on everything"

setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("lowres needs Python 3.11 or newer; set PYTHON=python3.x" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@

pretrain-tiny: $(STAMP)
	$(BIN)/lowres train configs/tiny.toml --run $(RUN) $(if $(wildcard $(RUN)/config.toml),--resume)

# A finished run only says so; an interrupted run continues. DATA=path trains on local text instead of C4,
# STEPS=n takes another number of steps than the config.
$(PRESETS:%=pretrain-%): pretrain-%: $(STAMP)
	$(BIN)/lowres train configs/llama_$(subst -,_,$*).toml --run runs/llama-$* \
		$(if $(STEPS),--set train.steps=$(STEPS)) $(if $(DATA),--set data.source=$(DATA)) $(if $(wildcard runs/llama-$*/config.toml),--resume)

$(RELORA:%=pretrain-relora-%): pretrain-relora-%: $(STAMP)
	$(BIN)/lowres train configs/relora_$(subst -,_,$*).toml --run runs/relora-$* \
		$(if $(STEPS),--set train.steps=$(STEPS)) $(if $(DATA),--set data.source=$(DATA)) $(if $(wildcard runs/relora-$*/config.toml),--resume)

# MODEL is needed at the first start only: a Hugging Face folder (hf download HuggingFaceTB/SmolLM2-1.7B --local-dir
# FOLDER) or a run.
smoltulu-dpo: MODEL ?= runs/smoltulu-sft

$(TUNING:%=smoltulu-%): smoltulu-%: $(STAMP)
	$(if $(MODEL)$(wildcard runs/smoltulu-$*/config.toml),,$(error MODEL: give the folder of a model, such as SmolLM2-1.7B; docs/tuning.md says how to get it))
	$(BIN)/lowres train configs/smoltulu_$*.toml --run runs/smoltulu-$* $(if $(MODEL),--init-from $(MODEL)) \
		$(if $(DATA),--set data.source=$(DATA)) $(if $(wildcard runs/smoltulu-$*/config.toml),--resume)

# The real model and the real config, with batches that two cores can process.
SMOKE := configs/llama_7b_12gb.toml --run runs/smoke-7b --set run.device=cpu --set data.source=stdlib \
	--set data.seq_len=128 --set train.batch_tokens=512 --set train.micro_batch=1 --set train.eval_every=0 \
	--set optim.lr=0.0001

smoke-7b-cpu: $(STAMP)
	$(BIN)/lowres train $(SMOKE) --set train.steps=2 $(if $(wildcard runs/smoke-7b/config.toml),--resume)
	$(BIN)/lowres train $(SMOKE) --set train.steps=3 --resume

# two processes with one thread each: threads do not speed up small tensors. It ends with the slowest ten.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --durations=10 $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow $(ARGS)

# the wheel in empty environments of Python 3.11 to 3.13, and the oldest packages; downloads gigabytes
test-install: $(STAMP)
	$(BIN)/python -m pytest -q -m install tests/test_install.py $(ARGS)

# write tests/golden anew: what the command line, configs, runs and exit codes are now
golden: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_golden.py --write-golden

# ARGS="--soak 30": memory, open files and threads of a run of 30 minutes
torture: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/torture.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
