# The entry point. `make` lists the targets; `make -n TARGET` shows the commands of a target without running them.

MODEL ?= smollm2-135m
FROM ?=
STRATEGY ?= seqft
ENGINE ?=
ARGS ?=
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Models that are made here instead of downloaded from the Hub, and the demo data that their recipes train on.
DEMO := data/tasks/sort/test.jsonl# which `hft demo` writes last
LOCAL := $(filter smollm2-135m tiny,$(MODEL))
LOCAL_FILES := $(if $(LOCAL),models/$(LOCAL)/config.json $(DEMO))

# `hft` takes every visible GPU. The models made here are too small to spread over several.
NUM_GPUS ?= $(if $(LOCAL),1)
LAUNCH := $(strip $(addprefix --num_processes ,$(NUM_GPUS)) $(addprefix --engine ,$(ENGINE)))

# $(call train,OBJECTIVE,METHOD): the command of a run; $(call run,COMMAND,RECIPE,METHOD) that of a sequence.
run = $(BIN)/hft $1 --config recipes/$(MODEL)/$2.yaml recipes/methods/$3.yaml $(LAUNCH)
train = $(call run,$1,$1,$2)

# On CPUs: glibc returns every large activation to the kernel and page-faults it in again. Keeping the memory is faster:
# results/smollm2-135m/malloc.md. An empty CUDA_VISIBLE_DEVICES, or -1, hides the GPUs.
VISIBLE := $(or $(CUDA_VISIBLE_DEVICES),$(if $(filter undefined,$(origin CUDA_VISIBLE_DEVICES)),$(shell nvidia-smi -L 2>/dev/null)))
ifeq ($(filter-out -1,$(VISIBLE)),)
export MALLOC_MMAP_THRESHOLD_ := 4294967296
export MALLOC_TRIM_THRESHOLD_ := 17179869184
endif

# Inputs of merge-*, reset-* and runtimes: P is the pretrained model, S the SFT model, D the DPO model that started from
# S. `:=`, not `?=`: an environment variable called S must not become a model.
base = $(shell sed -n 's/^model_name_or_path: *\([^ ]*\).*/\1/p' $(or $(wildcard recipes/$(MODEL)/$1.yaml),/dev/null))
P := $(call base,sft)
S := runs/$(MODEL)-sft-fft
D := runs/$(MODEL)-dpo-fft$(if $(filter-out $(S),$(call base,dpo)),-from-$(notdir $(S)))

METHODS := $(basename $(notdir $(wildcard recipes/methods/*.yaml)))
MODELS := $(sort $(notdir $(patsubst %/,%,$(dir $(wildcard recipes/*/sft.yaml)))))
ARMS := $(basename $(notdir $(wildcard recipes/cpi/*.yaml)))
MERGES := $(basename $(notdir $(wildcard recipes/merges/*.yaml)))
$(if $(MODELS),$(if $(wildcard recipes/$(MODEL)/*.yaml),,$(error MODEL=$(MODEL) is not among the recipes: $(MODELS))))

NAMED := help install cpi eval report forgetting bench gpu-check sweep-ratios sweep-trace-ratios sweep-seeds runtimes reset \
	reset-sft reset-dpo lint schema test test-lowest test-newest test-slow test-gpu audit docs clean clean-runs
.PHONY: $(NAMED)
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PRECIOUS: models/%/config.json

help:
	@echo "make sft-METHOD [MODEL=smollm2-135m] [ARGS='--key value ...'] [NUM_GPUS=n]"
	@echo "make dpo-METHOD | kto-METHOD [MODEL=...] [FROM=runs/an-sft-run] [ARGS=...] [NUM_GPUS=n]"
	@echo "make trace-METHOD [MODEL=...] [STRATEGY=seqft|replay|gem|agem|self-replay|lora] [ARGS=...] [NUM_GPUS=n]"
	@echo "make cpi | cpi-ARM [MODEL=...] [ARGS=...]    CPI-FT, and what it is compared with"
	@echo "make sweep-ratios | runtimes [MODEL=...]    the ten ratios of Table 10, and the time of each"
	@echo "make sweep-trace-ratios [MODEL=...]         the ten ratios of Figure 3b, on TRACE"
	@echo "make sweep-seeds [MODEL=...]                five selections, as in Table 14"
	@echo "make reset [MODEL=$(firstword $(RESETS))|$(lastword $(RESETS))] [ARGS=...]    Half-Reset: Figure 1"
	@echo "make reset-sft | reset-dpo [MODEL=...] [S=...] [D=...]    Half-Reset of your runs: Tables 1, 2 and 15"
	@echo "make merge-MERGE [MODEL=...] [S=runs/an-sft-run] [D=runs/a-dpo-run] [ARGS=...]"
	@echo "make eval [RUN=runs/a-run] [SUITE=quick|general|knowledge|recent] [ARGS=...]"
	@echo "make forgetting [SIZE=mini|mini-dpo|mini-long|mini-constant|smollm2|smollm2-dpo] [ARGS=--quick]    what each method learns and forgets"
	@echo "make bench [ARGS=...]    what a step costs, by methods: time, memory, tokens/s, against the FLOPs"
	@echo "make gpu-check [NUM_GPUS=n] [ARGS=...]    what no CPU can settle, on a GPU of 80 GB: results/gpu"
	@echo "  METHOD  $(METHODS)"
	@echo "  MODEL   $(MODELS)"
	@echo "  ARM     $(ARMS)"
	@echo "  MERGE   $(MERGES)"
	@echo "make report [RUNS='runs/a runs/b'] [ARGS=...]    runs side by side, as a page: report/report.html"
	@echo "NUM_GPUS=n ENGINE=fsdp2|zero3|ddp    by default all visible GPUs, with fsdp2, or ddp for what cannot be sharded"
	@echo "make install | test | lint | schema | docs | audit | test-lowest | test-newest | test-slow | test-gpu | clean | clean-runs"

# A target that does not exist: the nearest one that does.
TARGETS := $(foreach one,sft dpo kto trace,$(addprefix $(one)-,$(METHODS))) $(addprefix cpi-,$(ARMS)) \
	$(addprefix merge-,$(MERGES)) $(NAMED)
NEAREST := import difflib, sys; near = difflib.get_close_matches(sys.argv[1], sys.argv[2:], n=1); \
	sys.exit(f"no target {sys.argv[1]}, did you mean {near[0]}?" if near else f"no target {sys.argv[1]}; make lists them")

.DEFAULT:
	@$(PYTHON) -c '$(NEAREST)' $@ $(TARGETS)

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hft requires Python >= 3.11; choose one with PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

models/%/config.json: | $(INSTALLED)
	$(BIN)/hft fetch $*

$(DEMO): | $(INSTALLED)
	$(BIN)/hft demo

sft-%: recipes/methods/%.yaml $(INSTALLED) $(LOCAL_FILES)
	$(call train,sft,$*) $(ARGS)

dpo-%: recipes/methods/%.yaml $(INSTALLED) $(LOCAL_FILES)
	$(call train,dpo,$*) $(addprefix --model_name_or_path ,$(FROM)) $(ARGS)

kto-%: recipes/methods/%.yaml $(INSTALLED) $(LOCAL_FILES)
	$(call train,kto,$*) $(addprefix --model_name_or_path ,$(FROM)) $(ARGS)

# A sequence of tasks: `hft continual` trains and scores all rounds. Rerun it to resume.
trace-%: recipes/methods/%.yaml $(INSTALLED) $(LOCAL_FILES)
	$(call run,continual,trace,$*) --strategy $(STRATEGY) $(ARGS)

# CPI-FT, or with an arm's file one of the runs that it is compared with.
cpi: $(INSTALLED) $(LOCAL_FILES)
	$(BIN)/hft cpi --config recipes/$(MODEL)/cpi.yaml $(LAUNCH) $(ARGS)

cpi-%: recipes/cpi/%.yaml $(INSTALLED) $(LOCAL_FILES)
	$(BIN)/hft cpi --config recipes/$(MODEL)/cpi.yaml recipes/cpi/$*.yaml $(LAUNCH) $(ARGS)

# Table 10: the fractions of the attention and of the MLP matrices of each layer that train. Its 50.0% is HFT, its 100%
# FFT, in which all norms train too.
RATIOS := 0.25_0 0_0.333 0.25_0.333 0.5_0.333 0.5_0.667 0.75_0.667 1_0.667 0.75_1

sweep-ratios: sft-fft sft-hft $(addprefix ratio-,$(RATIOS))

# Figure 3b: the same on TRACE.
sweep-trace-ratios: trace-fft trace-hft $(addprefix trace-ratio-,$(RATIOS))

trace-ratio-%: $(INSTALLED) $(LOCAL_FILES)
	$(call run,continual,trace,hft-ratio) --strategy $(STRATEGY) --attention_fraction $(firstword $(subst _, ,$*)) \
		--mlp_fraction $(lastword $(subst _, ,$*)) $(ARGS)

ratio-%: $(INSTALLED) $(LOCAL_FILES)
	$(call train,sft,hft-ratio) --attention_fraction $(firstword $(subst _, ,$*)) \
		--mlp_fraction $(lastword $(subst _, ,$*)) $(ARGS)

# Table 10's second row. All runs see the same tokens, so FFT's tokens per second over a run's is its relative time.
runtimes:
	@test -e $(S)/results.json || { echo "$(S) not found: run make sweep-ratios MODEL=$(MODEL) first" >&2; exit 1; }
	@awk -F '[:,] *' '/"tokens_per_second"/ { speed = $$2; fft = fft ? fft : speed } /"layers"/ { \
		run = FILENAME; sub(".*/runs/|^runs/", "", run); sub("/results.json", "", run); \
		printf "%5.1f%% of the layers train  %5.1f%% of the time of FFT  %s\n", 100 * $$2, 100 * fft / speed, run }' \
		$(S)/results.json $(wildcard runs/$(MODEL)-sft-hft*/results.json)

# Table 14: the selection of `make sft-hft` has seed 0; four more.
sweep-seeds: sft-hft seed-1 seed-2 seed-3 seed-4

seed-%: $(INSTALLED) $(LOCAL_FILES)
	$(call train,sft,hft) --selection_seed $* $(ARGS)

RESETS = $(notdir $(patsubst %/,%,$(dir $(wildcard recipes/*/reset.yaml))))

# RUN is one model or several; on several GPUs lm-eval splits the rows over them.
RUN ?= $(wildcard runs/$(MODEL)-*)
SUITE ?= quick
eval: $(INSTALLED) $(LOCAL_FILES)
	@test -n "$(RUN)" || { echo "no runs of $(MODEL) to evaluate; train one, or pass RUN=" >&2; exit 1; }
	$(BIN)/hft eval $(RUN) --suite $(SUITE) $(addprefix --num_processes ,$(NUM_GPUS)) $(ARGS)

# What each method learns and forgets: benchmarks/forgetting/SIZE.yaml. Resumable: rerun it to continue. `--jobs 0` writes
# the page from the cells that are there.
SIZE ?= mini
forgetting: $(INSTALLED) $(if $(filter smollm2,$(SIZE)),models/smollm2-135m/config.json)
	$(if $(filter smollm2,$(SIZE)),$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[forgetting]')
	$(BIN)/python benchmarks/forgetting/run.py $(SIZE) $(ARGS)

# What a step costs, by methods: results/bench/DEVICE.md. On a GPU random weights in Llama's shapes.
bench: $(INSTALLED) models/smollm2-135m/config.json models/tiny/config.json
	$(BIN)/python benchmarks/bench.py $(ARGS)

# What no CPU can settle: made for 12 minutes of one GPU of 80 GB, or with NUM_GPUS for several. results/gpu/DEVICE.md has
# what was found; the same command again runs what is missing there.
gpu-check: $(INSTALLED) models/tiny/config.json
	$(BIN)/python benchmarks/gpu_check.py $(addprefix --num_gpus ,$(NUM_GPUS)) $(ARGS)

reset: $(INSTALLED) $(LOCAL_FILES)
	@test -f recipes/$(MODEL)/reset.yaml || { echo "only $(RESETS) have a reset.yaml; see also reset-sft"; exit 1; }
	$(BIN)/hft reset --config recipes/$(MODEL)/reset.yaml --out runs/$(MODEL)-reset $(ARGS)

# Half-Reset in Tables 1, 2 and 15: HFT's selection, applied after FFT. The paper does not say what a DPO model is reset
# to. Ours goes back to the SFT model that it started from; `S=` names another.
reset-sft: $(INSTALLED) $(LOCAL_FILES)
	$(BIN)/hft reset --config recipes/methods/hft.yaml --tuned $(S) --base $(P) --out runs/$(notdir $(S))-reset $(ARGS)

reset-dpo: $(INSTALLED) $(LOCAL_FILES)
	$(BIN)/hft reset --config recipes/methods/hft.yaml --tuned $(D) --base $(S) --out runs/$(notdir $(D))-reset $(ARGS)

merge-%: recipes/merges/%.yaml $(INSTALLED) $(LOCAL_FILES)
	$(BIN)/hft merge --config recipes/merges/$*.yaml --models $(S) $(if $(filter %-sd,$*),$(D)) \
		$(if $(filter-out average-%,$*),--base $(P)) --out runs/$(MODEL)-merge-$* $(ARGS)

# All runs, and the models made here that were scored.
RUNS ?= $(wildcard runs/*) $(patsubst %/scores,%,$(wildcard models/*/scores))

report: $(INSTALLED)
	$(BIN)/hft report $(RUNS) $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

# What editors check recipes by. It has TRL's keys: make it again with another TRL.
schema: $(INSTALLED)
	$(BIN)/hft schema > recipes/schema.json

# Two processes of one thread each take half the time of one process of two.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not gpu" -n 2 --dist loadscope $(ARGS)

# The lowest and the newest versions that pyproject.toml allows, each in a separate environment.
test-lowest: RESOLUTION = lowest-direct
test-newest: RESOLUTION = highest
test-lowest test-newest: test-%:
	$(PYTHON) -m venv $(VENV)/$*
	$(VENV)/$*/bin/pip install --quiet --disable-pip-version-check uv
	$(VENV)/$*/bin/uv pip install --quiet --python $(VENV)/$*/bin/python --resolution $(RESOLUTION) --editable '.[dev]'
	OMP_NUM_THREADS=1 $(VENV)/$*/bin/pytest -m "not slow and not gpu" -n 2 --dist loadscope $(ARGS)

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow $(ARGS)

test-gpu: $(INSTALLED)
	$(BIN)/pytest -m gpu $(ARGS)

# Known vulnerabilities of the versions in constraints.txt. pip-audit runs in a separate environment and asks pypi.org.
audit: $(INSTALLED)
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	@echo "asking pypi.org; this needs the network"
	$(VENV)/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt $(ARGS)

# The documentation as a site, site/index.html. MkDocs is in a separate environment; the build needs no network and fails
# on a broken link.
docs: $(VENV)/docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build $(ARGS)
	@echo "open site/index.html"

$(VENV)/docs/.installed:
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/pip install --quiet --disable-pip-version-check 'mkdocs-material>=9.7,<10' 'mkdocstrings[python]>=1,<2' ruff
	@touch $@

# What can be made again. Runs take hours: `make clean-runs` lists them and asks.
clean:
	rm -rf data/sft data/dpo data/tasks models/tiny models/smollm2-135m report site .pytest_cache .ruff_cache

clean-runs:
	@ls -d runs/* wandb 2>/dev/null | grep . || { echo "no runs here"; exit 0; }; printf 'remove these? [y/N] '; read answer; \
		if [ "$$answer" = y ]; then rm -rf runs wandb; else echo kept; fi
