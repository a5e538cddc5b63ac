#!/usr/bin/env bash
# Seen with torch 2.13.0 (torch.distributed.fsdp.fully_shard, two processes on the CPU, gloo).
#
# Expected: a parameter's gradient after backward is the mean over the processes of that parameter's
#   gradients, and a process that did not use a parameter counts as zero, as
#   DistributedDataParallel(find_unused_parameters=True) has it.
# Seen: each process packs the gradients it happens to have, in order, and reduces the packed buffer. Where
#   process 0 used expert 0 and process 1 used expert 1, of the same shape, the two gradients are averaged
#   with each other. Half of the sum lands in expert 0 on process 0, the other half in expert 1 on process 1,
#   and the other halves of both have no gradient at all. No error and no warning: the sizes agree.
#   set_reduce_scatter_unused_params(True) mends it; it is off by default, and its docstring speaks of
#   collectives that do not match, not of gradients that change places.
# Matters: experts in a ModuleList, an adapter per task or a reward head per source are trained on whatever
#   rows a process draws. Preference batches are small, so that an expert without a token is nothing rare,
#   and then experts learn from each other's tokens, with nothing in the log to show it.
#
# PYTHON=/path/to/python: use that environment instead of making one. PIP_FLAGS: more flags for pip.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$tmp/venv"
    PYTHON=$tmp/venv/bin/python
    "$PYTHON" -m pip install -q ${PIP_FLAGS:-} torch==2.13.0 numpy==2.4.6
fi
cat > "$tmp/seen.py" <<'EOF'
import sys
from datetime import timedelta
from importlib.metadata import version

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False) for _ in range(2))

    def forward(self, x, which):
        return self.experts[which](x)


def gradients(rank, how, mesh):
    """The gradient of each expert: each process's rows, or None where a process has no gradient."""
    torch.manual_seed(0)
    net = Experts()
    if how == "ddp":
        net = DistributedDataParallel(net, find_unused_parameters=True)
    else:
        fully_shard(net, mesh=mesh)
        net.set_reduce_scatter_unused_params(how == "fsdp, unused reduced")
    net(torch.full((1, 2), (1.0, 10.0)[rank]), rank).sum().backward()   # process 0: expert 0; 1: expert 1
    mine = []
    for p in net.parameters():
        g = p.grad if how == "ddp" else None if p.grad is None else p.grad.to_local()
        mine.append(None if g is None else (g[rank:rank + 1] if how == "ddp" else g).tolist())
    both = [None, None]
    dist.all_gather_object(both, mine)
    return [[of[expert] for of in both] for expert in range(2)]


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (2,))
    seen = {how: gradients(rank, how, mesh) for how in ("ddp", "fsdp", "fsdp, unused reduced")}
    if rank == 0:
        for how, grads in seen.items():
            for expert, (row0, row1) in enumerate(grads):
                print(f"{how:21} expert {expert}: process 0 has {row0}, process 1 has {row1}")
    right = [[[[0.5, 0.5]]] * 2, [[[5.0, 5.0]]] * 2]
    assert seen["ddp"] == seen["fsdp, unused reduced"] == right
    assert seen["fsdp"] == [[[[5.5, 5.5]], None], [None, [[5.5, 5.5]]]], "the gradients are no longer mixed so"
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", version("torch"))
    assert version("torch").split("+")[0] == "2.13.0"
    mp.spawn(work, (sys.argv[1],), nprocs=2)
    print("seen: by default both experts get (1 + 10) / 2 where 1 / 2 and 10 / 2 are right")
EOF
"$PYTHON" "$tmp/seen.py" "$tmp"
