#!/usr/bin/env bash
# BERTs of position_embedding_type "relative_key" (there are public ones). Their attention has an
# embedding of distances. One expects transformers to build it, or to refuse a configuration that asks
# for it. transformers 5 builds a BERT of absolute positions, without a word, and reads the checkpoint
# without its distances: other outputs than the model was trained with. Look at the field before you
# trust the outputs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch, transformers
from transformers import BertConfig, BertForMaskedLM

transformers.logging.set_verbosity_error()
small = dict(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
             intermediate_size=64)
absolute = BertForMaskedLM(BertConfig(**small)).eval()
relative = BertForMaskedLM(BertConfig(**small, position_embedding_type="relative_key")).eval()
relative.load_state_dict(absolute.state_dict())
ids = torch.randint(5, 90, (1, 20))
with torch.no_grad():
    difference = float((absolute(ids).logits - relative(ids).logits).abs().max())
distances = [name for name, _ in relative.named_parameters() if "distance" in name]
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: a parameter for distances, or a refusal")
print(f"seen: parameters for distances {distances}; with the weights of the absolute model its "
      f"logits differ by {difference}; the configuration still says "
      f"{relative.config.position_embedding_type!r}")
if not (not distances and difference == 0):
    raise SystemExit("changed: relative positions have an effect")
PY
