#!/usr/bin/env bash
# Seen with transformers 5.23.0 (torch 2.13.0).
#
# Expected: in eval mode, a model's logits for a row are a function of its weights and of that row.
# Seen: with rope_type "dynamic" they also depend on the calls that came before. The rotary module keeps the
#   frequencies of the longest batch so far, and only a batch SHORTER than the original context brings the
#   first ones back. A row of exactly the original length, which needs no scaling at all, is therefore scored
#   with stretched frequencies once a longer row was seen, and so is a longer row with those of a still
#   longer one. Two models of equal weights then disagree; a call with any short row mends both. Nothing of it
#   is in state_dict, so that saving and loading changes the logits as well.
#   Within one batch it is the same: a short row beside a long one is scored as a long one.
# Matters: in preference training a policy and its frozen reference start from equal weights, and the log
#   ratio of any row must be 0. It is not, once the two have seen different batches (the policy also samples
#   and is evaluated; reference log-probabilities are often computed ahead, in another order or batching).
#
# PYTHON=/path/to/python: use that environment instead of making one. PIP_FLAGS: more flags for pip.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$tmp/venv"
    PYTHON=$tmp/venv/bin/python
    "$PYTHON" -m pip install -q ${PIP_FLAGS:-} torch==2.13.0 transformers==5.23.0
fi
cat > "$tmp/seen.py" <<'EOF'
import sys
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM

for name, wanted in {"torch": "2.13.0", "transformers": "5.23.0"}.items():
    print(name, version(name))
    assert version(name).split("+")[0] == wanted

ORIGINAL = 32
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=2, max_position_embeddings=ORIGINAL, initializer_range=0.2,
                     rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0})
policy, reference = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
reference.load_state_dict(policy.state_dict())
rows = {n: torch.randint(1, 64, (1, n)) for n in (8, 24, ORIGINAL, 40, 120)}


@torch.no_grad()
def log_prob(model, row, beside=None):
    ids, mask = row, torch.ones_like(row)
    if beside is not None:                           # pad the row on the right, to the length of the other
        more = beside.shape[1] - row.shape[1]
        ids = torch.cat([torch.nn.functional.pad(row, (0, more)), beside])
        mask = torch.cat([torch.nn.functional.pad(mask, (0, more)), torch.ones_like(beside)])
    logits = model(input_ids=ids, attention_mask=mask).logits[:1, :row.shape[1] - 1]
    return logits.log_softmax(-1).gather(-1, row[:, 1:, None]).sum().item()


for n, remembers in ((24, False), (ORIGINAL, True), (40, True)):
    log_prob(policy, rows[8]), log_prob(reference, rows[8])          # both start afresh
    before = log_prob(policy, rows[n]) - log_prob(reference, rows[n])
    log_prob(policy, rows[120])                                      # only the policy sees a longer row
    after = log_prob(policy, rows[n]) - log_prob(reference, rows[n])
    policy.save_pretrained(sys.argv[1])
    again = log_prob(LlamaForCausalLM.from_pretrained(sys.argv[1]), rows[n]) - log_prob(reference, rows[n])
    log_prob(policy, rows[8])
    mended = log_prob(policy, rows[n]) - log_prob(reference, rows[n])
    print(f"row of {n:2} tokens, original context {ORIGINAL}: log ratio of equal weights {before:.4f}; "
          f"after a longer row {after:.4f}; saved and loaded {again:.4f}; after a short row {mended:.4f}")
    assert before == mended == 0 and abs(again) < 1e-4
    assert (abs(after) > 0.01) == remembers, "the frequencies are no longer kept so"
log_prob(reference, rows[8])
alone, beside = log_prob(policy, rows[24]), log_prob(policy, rows[24], beside=rows[120])
assert abs(log_prob(reference, rows[24], beside=rows[ORIGINAL]) - alone) < 1e-3      # padding alone is harmless
print(f"row of 24 tokens: alone {alone:.4f}, beside a row of 120 {beside:.4f}")
assert abs(beside - alone) > 0.01, "a short row no longer depends on its neighbour"
print("seen: equal weights and an equal row, but log-probabilities that depend on earlier and neighbouring rows")
EOF
HF_HUB_OFFLINE=1 "$PYTHON" "$tmp/seen.py" "$tmp/saved"
