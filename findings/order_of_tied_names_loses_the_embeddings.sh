#!/usr/bin/env bash
# Tied weights of XLM-R and CamemBERT. A file that holds each tensor once, under the first of its names
# in state_dict(), is a usual way to write safetensors, and right for BERT and RoBERTa. In XLM-R and
# CamemBERT the LM head comes before the encoder, so the file names the word embeddings
# lm_head.decoder.weight. With the LM head it opens whole; AutoModel fills the word embeddings at
# random, so that two openings differ. Write the name that the others are tied to
# (model.all_tied_weights_keys).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch, transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

transformers.logging.set_verbosity_error()
small = dict(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
             intermediate_size=64)
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: AutoModel opens each file with the same outputs twice")
seen = {}
for kind in ("bert", "roberta", "xlm-roberta", "camembert"):
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **small))
    model.config.save_pretrained(kind)
    first, held = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in held:
            held.add(tensor.data_ptr())
            first[name] = tensor
    save_file(first, f"{kind}/model.safetensors", metadata={"format": "pt"})
    _, info = AutoModelForMaskedLM.from_pretrained(kind, output_loading_info=True)
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        a, b = (AutoModel.from_pretrained(kind).eval()(ids).last_hidden_state for _ in "ab")
    seen[kind] = float((a - b).abs().max())
    print(f"seen: {kind:12s} missing with the LM head {len(info['missing_keys'])}, two openings by "
          f"AutoModel differ by {seen[kind]:.2g}")
if not (seen["bert"] == seen["roberta"] == 0):
    raise SystemExit("changed: BERT's kind of file")
if not (seen["xlm-roberta"] > 0.1 and seen["camembert"] > 0.1):
    raise SystemExit("changed: the embeddings are found")
PY
