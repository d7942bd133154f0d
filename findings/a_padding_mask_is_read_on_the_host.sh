#!/usr/bin/env bash
# A BERT and its attention_mask [B, L], as every tokenizer gives it. One expects a GPU to be given
# the whole forward pass without a look at what the mask holds. transformers asks in each pass
# whether the mask hides anything at all (mask.all() as a Python bool): there the host waits for the
# device. The same mask with four axes, [B, 1, 1, L] and bool, is taken as it is, and with sdpa
# attention gives the same hidden states (eager attention would add it to the scores). Operations
# that read a number from a tensor can be counted without a GPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import torch, transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel


class Reads(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("expected: no number is read on the host in a forward pass, whatever the mask's shape")
torch.manual_seed(0)
config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                    intermediate_size=32)
model = BertModel(config).eval()
ids = torch.arange(5, 13).repeat(2, 1)
mask = torch.ones_like(ids)
mask[1, 5:] = 0
states = {}
for name, given, expected in (("none", None, 0), ("[B, L]", mask, 1),
                              ("[B, 1, 1, L]", mask.bool()[:, None, None], 0)):
    with torch.no_grad(), Reads() as reads:
        states[name] = model(ids, attention_mask=given)[0][mask.bool()]
    print(f"seen: mask {name}: {reads.number} numbers read on the host")
    if reads.number != expected:
        sys.exit(f"changed: mask {name}")
if not torch.equal(states["[B, L]"], states["[B, 1, 1, L]"]):
    sys.exit("changed: the masks give other states")
print("seen: both masks give the same hidden states")
PY
