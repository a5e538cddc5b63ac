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

$(BIN)/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	touch $@

.PHONY: run smoke test bench vectors
