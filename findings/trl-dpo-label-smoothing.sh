#!/usr/bin/env bash
# Seen with trl 1.16.0 (transformers 5.23.0, datasets 5.2.0, accelerate 1.15.0, torch 2.13.0).
#
# Expected: DPOConfig(label_smoothing=e) with the default loss_type "sigmoid" trains conservative DPO,
#   (1-e) * -log s(d) + e * -log s(-d),  d = beta * (difference of the log ratios),
#   as trl 0.21.0 did with these very settings, or else says that the setting is not used.
# Seen: the default loss has lost the smoothing. e = 0.3 gives the loss of e = 0, with no warning (only the
#   option's help text names losses that use it), and no loss_type is conservative DPO any more ("aot" is, for a
#   single row, but it sorts the log ratios of a batch first). "robust" is not: there e has the other sign.
# Yet conservative DPO can still be had, by a negative weight. With A = -log s(d) and B = -log s(-d):
#   robust = ((1-e) A - e B) / (1-2e),  so  2(1-e) A - (1-2e) robust = (1-e) A + e B:
#   loss_type=["sigmoid", "robust"], loss_weights=[2(1-e), -(1-2e)].  Checked below, with its gradient.
# Matters: smoothing is for noisy preference labels; a recipe from an older version now trains plain DPO.
#
# PYTHON=/path/to/python: use that environment instead of making one. PIP_FLAGS: more flags for pip.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$tmp/venv"
    PYTHON=$tmp/venv/bin/python
    "$PYTHON" -m pip install -q ${PIP_FLAGS:-} \
        torch==2.13.0 transformers==5.23.0 datasets==5.2.0 accelerate==1.15.0 trl==1.16.0
fi
cat > "$tmp/seen.py" <<'EOF'
import copy, sys, warnings
from importlib.metadata import version

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

for name, wanted in {"torch": "2.13.0", "transformers": "5.23.0", "datasets": "5.2.0", "trl": "1.16.0"}.items():
    print(name, version(name))
    assert version(name).split("+")[0] == wanted

words = "<pad> <eos> <unk> a b c d e f g".split()
raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
rows = Dataset.from_dict({"prompt": ["a b", "c"], "chosen": [" c d", " a"], "rejected": [" e f g", " g"]})

config = LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, initializer_range=0.5, pad_token_id=0, eos_token_id=1, bos_token_id=None)
torch.manual_seed(0)
policy, reference, beta, e = LlamaForCausalLM(config), LlamaForCausalLM(config), 0.5, 0.3


def loss_and_gradient(**settings):
    args = DPOConfig(output_dir=sys.argv[1], beta=beta, use_cpu=True, bf16=False, report_to="none", **settings)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = DPOTrainer(copy.deepcopy(policy), copy.deepcopy(reference), args=args, train_dataset=rows,
                             processing_class=tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert not [w for w in said if "smoothing" in str(w.message)]
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()]), batch


def margin(batch):                                   # d, from the two models alone
    def log_prob(model):
        ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
        return (logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask).sum(1)
    chosen, rejected = (log_prob(policy) - log_prob(reference).detach()).chunk(2)
    return beta * (chosen - rejected)


plain, g_plain, batch = loss_and_gradient()
smooth, g_smooth, _ = loss_and_gradient(label_smoothing=e)
mixed, g_mixed, _ = loss_and_gradient(label_smoothing=e, loss_type=["sigmoid", "robust"],
                                      loss_weights=[2 * (1 - e), -(1 - 2 * e)])
d = margin(batch)
formula = (-(1 - e) * logsigmoid(d) - e * logsigmoid(-d)).mean()
formula.backward()
g_formula = torch.cat([p.grad.flatten() for p in policy.parameters()])
print(f"sigmoid, e=0: {plain:.6f}   sigmoid, e={e}: {smooth:.6f}   conservative DPO: {formula:.6f}   "
      f"sigmoid and robust, weighted: {mixed:.6f}")
assert smooth == plain and torch.equal(g_smooth, g_plain), "the smoothing is used now"
assert abs(plain - formula.item()) > 0.01
assert abs(mixed - formula.item()) < 1e-5 and torch.allclose(g_mixed, g_formula, atol=1e-5)
print("seen: label_smoothing changes neither loss nor gradient of 'sigmoid'; the two weighted losses give it back")
EOF
HF_HUB_OFFLINE=1 "$PYTHON" "$tmp/seen.py" "$tmp/out"
