# make run: the built-in task end to end.   make test: the tests.   make smoke: every stage in about ten seconds.
# make bench: seconds a step by stage, against the arithmetic alone.   make vectors: golden numbers for ports, in vectors/.
# More arguments for osp.py:  make run ARGS="--seed 1"
# Without a GPU, the small build of torch:  make run PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3.11
PIP_FLAGS ?=
ARGS ?=
BIN := .venv/bin

run: $(BIN)/ready
	$(BIN)/python osp.py --overwrite_output_dir $(ARGS)

smoke: $(BIN)/ready
	$(BIN)/python osp.py --output_dir runs/smoke --overwrite_output_dir --sft_max_steps 20 --sft_batch_size 8 \
	  --num_train_prompts 16 --num_train_epochs 1 --per_device_train_batch_size 8 --num_eval_prompts 16 --num_eval_pairs 16 $(ARGS)

test: $(BIN)/ready
	$(BIN)/python -m pytest -q test_osp.py $(ARGS)

bench: $(BIN)/ready
	$(BIN)/python test_osp.py

vectors: $(BIN)/ready
	$(BIN)/python test_osp.py vectors vectors

# Evidence: one run for each name and seed; its flags are below. Finished runs are not repeated, broken ones go on. The
# first runs of a seed are those that make its SFT model, which the others find in the cache.
SEEDS ?= 0 1 2 3 4
JOBS ?= $(shell nproc)
ABLATIONS := spce dpo ipo sampled_once offline_dpo offline_spce random best_worst adjacent one_order
EVIDENCE := long_spce long_dpo prompts_50 prompts_100 prompts_400 prompts_800 \
  noise_00_spce noise_00_drawn noise_20_spce noise_20_drawn noise_40_spce noise_40_drawn
FLAGS_dpo := --loss_type dpo
FLAGS_ipo := --loss_type ipo
FLAGS_sampled_once := --response_source sft
FLAGS_offline_dpo := --response_source dataset --labels data --loss_type dpo
FLAGS_offline_spce := --response_source dataset
FLAGS_random := --pair_construction random
FLAGS_best_worst := --pair_construction best_worst
FLAGS_adjacent := --pair_construction adjacent
FLAGS_one_order := --judge_both_orders False
FLAGS_long_spce := --num_train_epochs 27 --eval_steps 39
FLAGS_long_dpo := $(FLAGS_long_spce) --loss_type dpo
$(foreach n,50 100 400 800,$(eval FLAGS_prompts_$(n) := --num_train_prompts $(n) --num_train_epochs 99 --max_steps 117 --eval_steps 39))
$(foreach n,00 20 40,$(eval FLAGS_noise_$(n)_spce := --response_source sft --label_noise 0.$(n) --num_train_epochs 18 --eval_steps 26))
$(foreach n,00 20 40,$(eval FLAGS_noise_$(n)_drawn := $(FLAGS_noise_$(n)_spce) --labels drawn))
runs-of = $(foreach seed,$(SEEDS),$(foreach name,$(1),runs/evidence/$(name)-seed$(seed)/summary.json))

ablations evidence: $(BIN)/ready
	@$(MAKE) --no-print-directory -j$(JOBS) runs-$@
	$(BIN)/python test_osp.py $@ runs/evidence

runs-ablations: $(call runs-of,$(ABLATIONS))
runs-evidence: $(call runs-of,spce dpo $(EVIDENCE))

.SECONDEXPANSION:
name = $(firstword $(subst -seed, ,$*))
seed = $(lastword $(subst -seed, ,$*))
runs/evidence/%/summary.json: | $$(if $$(filter spce,$$(name)),,runs/evidence/spce-seed$$(seed)/summary.json)
	@mkdir -p $(@D)
	@OMP_NUM_THREADS=1 $(BIN)/python osp.py --seed $(seed) $(FLAGS_$(name)) --output_dir $(@D) \
	  --resume_from_checkpoint latest > $(@D).log 2>&1 || { tail -n 3 $(@D).log; false; }
	@echo "$(@D):$$(grep win_rate_vs_sft\" $@ | tail -n 1) $$(ls runs/evidence/*/summary.json | wc -l) runs finished"

$(BIN)/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	touch $@

.PHONY: run smoke test bench vectors ablations evidence runs-ablations runs-evidence
