# make run: the built-in task end to end.   make test: the tests.   make smoke: every stage in about ten seconds.
# make bench: seconds a step by stage, against the arithmetic alone.   make vectors: golden numbers for ports, in vectors/.
# make ablations, make evidence, make collection: the README's tables and its picture, from runs in runs/.
# More arguments for osp.py:  make run ARGS="--seed 1"
# Without a GPU, the small build of torch:  make run PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
PIP_FLAGS ?=
ARGS ?=
BIN := .venv/bin
# Else glibc gives every freed block back to the system, which then clears each of its pages anew: without that, SFT of
# small models is 9% to 20% faster.
export MALLOC_TRIM_THRESHOLD_ := 1000000000
export MALLOC_MMAP_THRESHOLD_ := 1000000000

# A second `make run` replaces the first one's folder, but never the run of a model or in a folder that ARGS names, and
# none that is to go on.
run: $(BIN)/ready
	$(BIN)/python osp.py $(if $(findstring model,$(ARGS))$(findstring output,$(ARGS))$(findstring resume,$(ARGS)),,--overwrite_output_dir) $(ARGS)

smoke: $(BIN)/ready
	$(BIN)/python osp.py --output_dir runs/smoke --overwrite_output_dir --sft_max_steps 20 --sft_batch_size 8 \
	  --num_train_prompts 16 --num_train_epochs 1 --prompts_per_step 8 --num_eval_prompts 16 --num_eval_pairs 16 $(ARGS)

test: $(BIN)/ready
	$(BIN)/python -m pytest -q test_osp.py $(ARGS)

bench: $(BIN)/ready
	$(BIN)/python test_osp.py bench

vectors: $(BIN)/ready
	$(BIN)/python test_osp.py vectors vectors

# Evidence: one run for each name and seed, of the variant METHOD_name, or name, of test_osp.py. Finished runs are not
# repeated, broken ones go on. The first run of a seed, spce, makes the pi_SFT that all others take over.
SEEDS ?= 0 1 2 3 4
JOBS ?= $(shell nproc)
ABLATIONS := spce dpo ipo sampled_once offline_dpo offline_spce random best_worst adjacent one_order \
  tso tso_policy_only tso_no_human tso_no_corrections tso_no_clip tso_fixed
EVIDENCE := spce tso tso_no_clip tso_fixed long_spce long_dpo prompts_50 prompts_100 prompts_400 prompts_800 \
  noisy_00 drawn_00 noisy_20 drawn_20 noisy_40 drawn_40
COLLECTION := base random step_1 steps_1_2 steps_1_2_3 landslides
# On 1,500 pairs the judge is best after some 400 steps of SFT; after 800 it has learned the labels by heart.
FLAGS_COLLECTION := --sft_max_steps 400
METHOD_long_spce := spce
METHOD_long_dpo := dpo
FLAGS_long_spce := --num_train_epochs 27 --eval_steps 39
FLAGS_long_dpo := $(FLAGS_long_spce)
$(foreach n,50 100 400 800,$(eval METHOD_prompts_$(n) := spce)\
  $(eval FLAGS_prompts_$(n) := --num_train_prompts $(n) --num_train_epochs 99 --max_steps 117 --eval_steps 39))
$(foreach n,00 20 40,$(foreach kind,noisy drawn,$(eval FLAGS_$(kind)_$(n) := --num_train_epochs 18 --eval_steps 26)))
runs-of = $(foreach seed,$(SEEDS),$(foreach name,$($(1)),runs/$(2)/$(name)-seed$(seed)/$(3).json))

ablations evidence collection: $(BIN)/ready
	@$(MAKE) --no-print-directory -j$(JOBS) runs-$@
	$(BIN)/python test_osp.py $@ runs/$(patsubst ablations,evidence,$@)

runs-ablations: $(call runs-of,ABLATIONS,evidence,summary)
runs-evidence: $(call runs-of,EVIDENCE,evidence,summary)
runs-collection: $(call runs-of,COLLECTION,collection,result)

.SECONDEXPANSION:
name = $(firstword $(subst -seed, ,$*))
seed = $(lastword $(subst -seed, ,$*))
finish = > $(@D).log 2>&1 || { tail -n 3 $(@D).log; false; }
first = runs/evidence/spce-seed$(seed)
runs/evidence/%/summary.json: | $$(if $$(filter-out spce,$$(name)),$$(first)/summary.json)
	@mkdir -p $(dir $(@D))
	@OMP_NUM_THREADS=1 $(BIN)/python test_osp.py $(if $(filter spce,$(name)),run,run_with_sft $(first)) \
	  $(or $(METHOD_$(name)),$(name)) --seed $(seed) $(FLAGS_$(name)) --output_dir $(@D) \
	  --resume_from_checkpoint latest $(ARGS) $(finish)
	@echo "$(@D):$$(grep '"win_rate_vs_sft"' $@ | tail -n 1) $$(ls runs/evidence/*/summary.json | wc -l) runs finished"

runs/collection/%/result.json: | $$(if $$(filter-out base,$$(name)),runs/collection/base-seed$$(seed)/result.json)
	@mkdir -p $(dir $(@D))
	@OMP_NUM_THREADS=1 $(BIN)/python test_osp.py collect $(name) $(seed) $(dir $(@D)) \
	  $(FLAGS_COLLECTION) $(ARGS) $(finish)
	@echo "$(@D): $$(ls runs/collection/*/result.json | wc -l) runs finished"

$(BIN)/ready: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2> /dev/null || \
	  { echo "$(PYTHON) is missing or older than Python 3.11: give a newer one, as in make PYTHON=python3.12." >&2; false; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	touch $@

.PHONY: run smoke test bench vectors ablations evidence collection runs-ablations runs-evidence runs-collection
