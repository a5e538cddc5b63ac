# make run: the built-in task end to end.   make test: the tests.   make smoke: every stage in half a minute.
# make bench: seconds a step by stage, against a matrix product.   make vectors: golden numbers for ports, in vectors/.
# make ablations, make evidence, make collection, make real MODEL=folder-or-hub-name: the README's tables and pictures,
# from runs in runs/. What is there is not done again, and broken runs go on:  make ablations SEEDS="0 1" JOBS=2
# More arguments for osp.py:  make run ARGS="--seed 1"
# Without a GPU, the small build of torch:  make run PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
BIN := .venv/bin
# Else glibc gives every freed block back to the system, which then clears each of its pages anew: without that, SFT of
# small models is 9% to 20% faster.
export MALLOC_TRIM_THRESHOLD_ := 1000000000
export MALLOC_MMAP_THRESHOLD_ := 1000000000

# A plain `make run` starts anew. With ARGS nothing is removed: the same command goes on with a run, or shows its result.
run: $(BIN)/ready
	$(if $(ARGS),,rm -rf runs/builtin-osp-seed0)
	$(BIN)/python osp.py $(ARGS)

smoke: $(BIN)/ready
	rm -rf runs/smoke
	$(BIN)/python osp.py --output_dir runs/smoke --sft_max_steps 20 --sft_batch_size 8 --num_train_prompts 16 \
	  --num_train_epochs 1 --prompts_per_step 8 --num_eval_prompts 16 --num_eval_pairs 16 $(ARGS)

test: $(BIN)/ready
	$(BIN)/python -m pytest -q test_osp.py $(ARGS)

bench ablations evidence collection: $(BIN)/ready
	$(BIN)/python test_osp.py $@ $(ARGS)

real: $(BIN)/ready
	test -d $(or $(MODEL),$(error give MODEL=folder-or-hub-name)) || $(BIN)/hf download $(MODEL)
	$(BIN)/pip install -q --disable-pip-version-check vaderSentiment==3.3.2
	$(BIN)/python test_osp.py real $(MODEL) $(ARGS)

vectors: $(BIN)/ready
	$(BIN)/python test_osp.py vectors vectors

$(BIN)/ready: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2> /dev/null || \
	  { echo "$(PYTHON) is missing or older than Python 3.11: give a newer one, as in make PYTHON=python3.12." >&2; false; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	touch $@

.PHONY: run smoke test bench vectors ablations evidence collection real
