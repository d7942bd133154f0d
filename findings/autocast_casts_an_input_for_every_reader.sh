#!/usr/bin/env bash
# Queries, keys and values of an attention layer read one tensor. Autocast keeps what it has cast,
# and a trial with a tensor made by hand says so: it is cast once for all three. In a model it is
# cast three times, and three gradients are cast back to float32 and added there, since autocast
# keeps casts of leaves that need a gradient alone, and hidden states are no leaves. Cast the input
# by hand before the three layers; their gradients are then added in bfloat16.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
cd "$work"
"$work/venv/bin/python" - 2>log.txt <<'PY'
import sys
from collections import Counter
import torch, transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

class Casts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.seen[tuple(args[0].shape), str(kwargs.get("dtype"))] += 1
        return function(*args, **(kwargs or {}))

torch.manual_seed(0)
config = BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40)
attention = BertModel(config).train().encoder.layer[0].attention.self
by_hand = torch.randn(3, 7, 24, requires_grad=True)
seen = {}
for name, hidden in ("by hand", by_hand), ("of a layer", by_hand * 1):
    with torch.autocast("cpu", torch.bfloat16), Casts() as down:
        found = attention(hidden)[0]
    with Casts() as up:
        found.float().sum().backward()
    seen[name] = [casts.seen[(3, 7, 24), dtype] for casts, dtype in ((down, "torch.bfloat16"), (up, "torch.float32"))]
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: the input of queries, keys and values is cast once, however it was made")
for name, (there, back) in seen.items():
    print(f"seen: a tensor {name} is cast {there} times, and {back} times back in the backward pass")
if seen["by hand"][0] != 1 or seen["of a layer"][0] != 3 or seen["of a layer"][1] - seen["by hand"][1] != 2:
    sys.exit("changed")
PY
