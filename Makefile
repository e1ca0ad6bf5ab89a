# The front door. `make` lists what there is; `make -n TARGET` shows the commands of a target without running them.

MODEL ?= smollm2-135m
FROM ?=
ARGS ?=
PYTHON ?= python3
VENV ?= .venv

, := ,
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Models that are made here rather than fetched from the Hub, and the demo data that their recipes train on.
LOCAL := $(filter smollm2-135m tiny,$(MODEL))
LOCAL_FILES := $(if $(LOCAL),models/$(LOCAL)/config.json data/dpo/train.jsonl)

# The GPUs that are visible; the models made here are too small to spread over several.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU ')
ifdef CUDA_VISIBLE_DEVICES
GPUS := $(words $(subst $(,), ,$(CUDA_VISIBLE_DEVICES)))
endif
NUM_GPUS ?= $(if $(LOCAL),$(if $(filter 0,$(GPUS)),0,1),$(GPUS))
ifeq ($(NUM_GPUS),1)
export CUDA_VISIBLE_DEVICES ?= 0
endif

# Methods that are not sharded: adapters are small, and schedules and updates are untested on shards.
WHOLE := $(basename $(notdir $(shell grep -lE '^(adapter|schedule|update):' recipes/methods/*.yaml)))

ifeq ($(filter-out 0 1,$(NUM_GPUS)),)
HFT := $(BIN)/hft
else
HFT = $(BIN)/accelerate launch --config_file recipes/accelerate/$(if $(filter $(WHOLE),$*),ddp,fsdp2).yaml \
	--num_processes $(NUM_GPUS) -m hft
endif

ifeq ($(NUM_GPUS),0)
# glibc gives every large activation back to the kernel and faults it in again. Keeping the memory is faster on CPUs:
# results/smollm2-135m/malloc.md.
export MALLOC_MMAP_THRESHOLD_ := 4294967296
export MALLOC_TRIM_THRESHOLD_ := 17179869184
endif

# What merge-* merges: P the pretrained, S the SFT, D the DPO model that started from S. A merge's name ends in those it
# takes. `:=` and not `?=`, lest a variable of the environment be taken for a model.
P := $(shell sed -n 's/^model_name_or_path: *\([^ ]*\).*/\1/p' recipes/$(MODEL)/sft.yaml)
S := runs/$(MODEL)-sft-fft
D := runs/$(MODEL)-dpo-fft-from-$(notdir $(S))

.PHONY: help install reset sweep-ratios lint test test-slow test-gpu clean
.DELETE_ON_ERROR:
.PRECIOUS: models/%/config.json

help:
	@echo "make sft-METHOD [MODEL=smollm2-135m] [ARGS='--key value ...'] [NUM_GPUS=n]"
	@echo "make dpo-METHOD [MODEL=...] [FROM=runs/an-sft-run] [ARGS=...] [NUM_GPUS=n]"
	@echo "make reset [MODEL=$(firstword $(RESETS))|$(lastword $(RESETS))] [ARGS=...]"
	@echo "make merge-MERGE [MODEL=...] [S=runs/an-sft-run] [D=runs/a-dpo-run] [ARGS=...]"
	@echo "  METHOD  $(basename $(notdir $(wildcard recipes/methods/*.yaml)))"
	@echo "  MODEL   $(sort $(notdir $(patsubst %/,%,$(dir $(wildcard recipes/*/sft.yaml)))))"
	@echo "  MERGE   $(basename $(notdir $(wildcard recipes/merges/*.yaml)))"
	@echo "make sweep-ratios [MODEL=...] [ARGS=...]   the ten ratios of Table 10"
	@echo "make test | lint | test-slow | test-gpu | clean"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hft needs Python 3.11 or newer; name one with PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

models/%/config.json: | $(INSTALLED)
	$(BIN)/hft fetch $*

data/dpo/train.jsonl: | $(INSTALLED)
	$(BIN)/hft demo

sft-%: $(INSTALLED) $(LOCAL_FILES)
	$(HFT) sft --config recipes/$(MODEL)/sft.yaml recipes/methods/$*.yaml $(ARGS)

dpo-%: $(INSTALLED) $(LOCAL_FILES)
	$(HFT) dpo --config recipes/$(MODEL)/dpo.yaml recipes/methods/$*.yaml $(addprefix --model_name_or_path ,$(FROM)) $(ARGS)

# Table 10: attention and MLP fractions of its ten ratios; the last one is FFT.
RATIOS := 0.25:0 0:0.333 0.25:0.333 0.5:0.333 0.5:0.5 0.5:0.667 0.75:0.667 1:0.667 0.75:1 1:1

sweep-ratios: $(INSTALLED) $(LOCAL_FILES)
	@set -e; for ratio in $(RATIOS); do (set -x; $(HFT) sft --config recipes/$(MODEL)/sft.yaml recipes/methods/hft-ratio.yaml \
		--attention_fraction $${ratio%:*} --mlp_fraction $${ratio#*:} $(ARGS)); done

RESETS = $(notdir $(patsubst %/,%,$(dir $(wildcard recipes/*/reset.yaml))))

reset: $(INSTALLED) $(LOCAL_FILES)
	@test -f recipes/$(MODEL)/reset.yaml || { echo "reset.yaml is there for: $(RESETS)"; exit 1; }
	$(BIN)/hft reset --config recipes/$(MODEL)/reset.yaml --out runs/$(MODEL)-reset $(ARGS)

merge-%: $(INSTALLED) $(LOCAL_FILES)
	$(BIN)/hft merge --config recipes/merges/$*.yaml --models $(S) $(if $(filter %-sd,$*),$(D)) \
		$(if $(filter-out average-%,$*),--base $(P)) --out runs/$(MODEL)-merge-$* $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: $(INSTALLED)
	$(BIN)/pytest -m "not slow and not gpu" $(ARGS)

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow $(ARGS)

test-gpu: $(INSTALLED)
	$(BIN)/pytest -m gpu $(ARGS)

clean:
	rm -rf data models runs wandb
