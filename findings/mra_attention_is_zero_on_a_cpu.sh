#!/usr/bin/env bash
# MRA on a CPU. One expects a masked LM to use its attention wherever it runs, slowly at worst. MRA's
# attention is a CUDA kernel that is fetched from the hub; where it is not there, attention gives
# zeros, and every token is read on its own. Nothing is raised. Signals cached from such a teacher
# say nothing about context. Do not run MRA without its kernel; check that other tokens matter.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch, transformers
from transformers import MraConfig, MraForMaskedLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
config = MraConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=64, max_position_embeddings=128)
model = MraForMaskedLM(config).eval()
ids = torch.randint(5, 90, (1, 128))
other = ids.clone()
other[0, 1:] = torch.randint(5, 90, (127,))
with torch.no_grad():
    moved = float((model(ids).logits[0, 0] - model(other).logits[0, 0]).abs().max())
model(ids).logits.sum().backward()
query = model.mra.encoder.layer[0].attention.self.query.weight.grad
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: the first token's logits change with the 127 others; queries get gradients")
print(f"seen: largest change of a logit {moved}, gradient of the queries {query}")
if not (moved == 0 and query is None):
    raise SystemExit("changed: MRA's attention has an effect on a CPU")
PY
