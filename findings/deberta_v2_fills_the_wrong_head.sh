#!/usr/bin/env bash
# DeBERTa-v2 and v3 with the LM head that their authors trained (tensors lm_predictions.lm_head.*) and
# a configuration that does not mention it. One expects DebertaV2ForMaskedLM to read that head. It
# builds another one of BERT's kind and fills it at random; the tensors of the file are left out. With
# legacy=False in the configuration it reads them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import json, torch, transformers
from transformers import DebertaV2Config, DebertaV2ForMaskedLM

transformers.logging.set_verbosity_error()
config = DebertaV2Config(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=64, legacy=False)
model = DebertaV2ForMaskedLM(config).eval()
model.save_pretrained("published")
values = json.load(open("published/config.json"))
values.pop("legacy")
json.dump(values, open("published/config.json", "w"))
ids = torch.arange(10, 30)[None]
plain, info = DebertaV2ForMaskedLM.from_pretrained("published", output_loading_info=True)
right = DebertaV2ForMaskedLM.from_pretrained("published", legacy=False)
with torch.no_grad():
    off, exact = (float((m.eval()(ids).logits - model(ids).logits).abs().max())
                  for m in (plain, right))
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: the logits of the model that was saved")
print(f"seen: {off:.2g} off, {len(info['missing_keys'])} tensors filled at random, "
      f"{len(info['unexpected_keys'])} left out; with legacy=False {exact:.2g} off")
if not (info["missing_keys"] and off > 1e-3 and exact == 0):
    raise SystemExit("changed: it is no longer as said above")
PY
