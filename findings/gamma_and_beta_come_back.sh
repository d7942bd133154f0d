#!/usr/bin/env bash
# Checkpoints of BERT's authors name the parameters of layer norms gamma and beta. transformers loads
# them, and state_dict() then says weight and bias. One expects save_pretrained to write the names of
# state_dict(). It writes gamma and beta again, since the model remembers how it was loaded. A program
# that looks for tensors of the saved file by the names of state_dict() finds none of the norms. Save
# with save_original_format=False.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

transformers.logging.set_verbosity_error()
config = BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                    intermediate_size=64)
BertForMaskedLM(config).save_pretrained("old")
tensors = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
    "LayerNorm.bias", "LayerNorm.beta"): x for name, x in load_file("old/model.safetensors").items()}
save_file(tensors, "old/model.safetensors", metadata={"format": "pt"})
model, info = BertForMaskedLM.from_pretrained("old", output_loading_info=True)
model.save_pretrained("again")
model.save_pretrained("today", save_original_format=False)
names = set(model.state_dict())
again, today = (set(load_file(f"{d}/model.safetensors")) for d in ("again", "today"))
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: the saved file has names of state_dict() alone")
print(f"seen: missing when loaded {sorted(info['missing_keys'])}; in the file and not in "
      f"state_dict(): {len(again - names)} names, such as {min(again - names)}; "
      f"with save_original_format=False: {len(today - names)}")
if not (not info["missing_keys"] and again - names and not today - names):
    raise SystemExit("changed: it is no longer as said above")
PY
