#!/usr/bin/env bash
# Seen with transformers 5.23.0 (torch 2.13.0, on the CPU, without the optional kernel packages).
#
# Expected: rows packed one after another, with position_ids that start at 0 again for each row, are either
#   kept apart by the whole model or refused. A Llama keeps them apart: from the restarts it builds a mask,
#   and a row's logits are those of the row alone.
# Seen: hybrid models (attention beside Mamba, gated delta or short convolution layers) keep the rows apart
#   in their attention layers only. The recurrent state and the convolution run on from one row into the
#   next, with no warning about it. The same library does refuse the same batch where seq_idx is given too:
#   it says then that it cannot keep packed rows apart without the kernels, but position_ids alone, from
#   which it took the rows' borders a moment before, pass. Padding on the left is handled rightly.
# Matters: packing (padding-free batches) is how SFT, the first step of preference tuning, and pairs laid
#   side by side are made cheap. Here a rejected answer packed behind its chosen one is scored as if it had
#   read part of it: its log-probability, and so the margin, depends on its neighbour.
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
from importlib.metadata import version

import torch
from transformers import (BambaConfig, FalconH1Config, Lfm2Config, LlamaConfig, Qwen3NextConfig,
                          AutoModelForCausalLM)

for name, wanted in {"torch": "2.13.0", "transformers": "5.23.0"}.items():
    print(name, version(name))
    assert version(name).split("+")[0] == wanted

common = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=2, initializer_range=0.2)
mamba = dict(mamba_n_heads=4, mamba_n_groups=1, mamba_d_state=8, mamba_d_conv=4, mamba_chunk_size=8)
configs = [
    LlamaConfig(**common),
    FalconH1Config(**common, **mamba, head_dim=16, mamba_d_ssm=32, mamba_d_head=8),
    BambaConfig(**common, **mamba, mamba_d_head=16, attn_layer_indices=[1]),
    Lfm2Config(**common, layer_types=["conv", "full_attention"], block_multiple_of=8),
    Qwen3NextConfig(**common, layer_types=["linear_attention", "full_attention"], head_dim=16,
                    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
                    linear_num_value_heads=2, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
                    shared_expert_intermediate_size=16),
]
torch.manual_seed(0)
chosen, rejected = torch.randint(1, 64, (1, 7)), torch.randint(1, 64, (1, 6))
both = torch.cat([chosen, rejected], 1)
restarts = torch.tensor([[*range(7), *range(6)]])
padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), rejected], 1)
for config in configs:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()

    def log_prob(row=rejected, **batch):             # of the last row's tokens but its first
        with torch.no_grad():
            logits = model(use_cache=False, **batch).logits[:, -row.shape[1]:-1]
        return logits.log_softmax(-1).gather(-1, row[:, 1:, None]).sum().item()

    alone = log_prob(input_ids=rejected)
    left = log_prob(input_ids=padded, attention_mask=(padded > 0).long(),
                    position_ids=torch.tensor([[0, 0, 0, *range(6)]]))
    packed = log_prob(input_ids=both, position_ids=restarts)
    print(f"{config.model_type:10} the row alone {alone:9.4f}   padded {left:9.4f}   packed {packed:9.4f}")
    assert abs(left - alone) < 1e-3
    if config.model_type == "llama":
        assert abs(packed - alone) < 1e-3
        continue
    assert abs(packed - alone) > 1e-2, "the packed rows are kept apart now"
    try:
        log_prob(input_ids=both, position_ids=restarts, seq_idx=torch.tensor([[0] * 7 + [1] * 6]).int())
        raise SystemExit("seq_idx is no longer refused")
    except ValueError as error:
        print(f"{'':10} with seq_idx too: {str(error)[:80]}...")
print("seen: Llama keeps packed rows apart, the hybrid models let the first row's state into the second")
EOF
HF_HUB_OFFLINE=1 "$PYTHON" "$tmp/seen.py"
