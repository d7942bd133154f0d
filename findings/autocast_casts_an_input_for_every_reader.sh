#!/usr/bin/env bash
# Queries, keys and values of an attention layer read one tensor. Autocast is known to keep what it
# has cast, so one expects the tensor to be cast once for all three. That holds if it is a leaf that
# needs a gradient. Hidden states are no leaves: they are cast three times, and three gradients are
# cast back to float32 and added there. Cast the input to bfloat16 before the three layers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
cd "$work"
"$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
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
config = BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
                    intermediate_size=40)
attention = BertModel(config).train().encoder.layer[0].attention.self
leaf = torch.randn(3, 7, 24, requires_grad=True)
seen = {}
for name, hidden, cast in (("a leaf", leaf, False), ("a hidden state", leaf * 1, False),
                           ("a hidden state, cast before", leaf * 1, True)):
    with torch.autocast("cpu", torch.bfloat16), Casts() as down:
        found = attention(hidden.bfloat16() if cast else hidden)[0]
    with Casts() as up:
        found.float().sum().backward()
    seen[name] = [casts.seen[(3, 7, 24), dtype]
                  for casts, dtype in ((down, "torch.bfloat16"), (up, "torch.float32"))]
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: the input of queries, keys and values is cast once, and its gradient once")
for name, (there, back) in seen.items():
    print(f"seen: {name}: {there} cast(s), {back} back in the backward pass")
once, thrice, helped = seen.values()
if once[0] != 1 or thrice[0] != 3 or thrice[1] - once[1] != 2:
    sys.exit("changed: how often the input is cast")
if helped != once:
    sys.exit("changed: what helps")
PY
