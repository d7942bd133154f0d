#!/usr/bin/env bash
# Tied weights of XLM-R and CamemBERT. A file that holds each tensor once, under the first of its
# names in state_dict(), is right for BERT and RoBERTa. In XLM-R and CamemBERT the LM head comes
# before the encoder, so the file names the word embeddings lm_head.decoder.weight. With the LM head
# it opens whole; AutoModel fills the word embeddings at random, so that two openings differ. Write
# the name that the others are tied to (model.all_tied_weights_keys).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
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
    opened, info = AutoModelForMaskedLM.from_pretrained(kind, output_loading_info=True)
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        logits = [one.eval()(ids).logits for one in (opened, model)]
        if info["missing_keys"] or not torch.equal(*logits):
            sys.exit(f"changed: {kind} with the LM head")
        a, b = (AutoModel.from_pretrained(kind).eval()(ids).last_hidden_state for _ in "ab")
    seen[kind] = float((a - b).abs().max())
    print(f"seen: {kind:12s} whole with the LM head; two openings by AutoModel differ by "
          f"{seen[kind]:.2g}")
    tied = {name for name in first if name in model.all_tied_weights_keys}
    save_file({model.all_tied_weights_keys.get(name, name): tensor
               for name, tensor in first.items()},
              f"{kind}/model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        a, b = (AutoModel.from_pretrained(kind).eval()(ids).last_hidden_state for _ in "ab")
    print(f"seen: {kind:12s} with {len(tied)} other name(s) they differ by "
          f"{float((a - b).abs().max()):.2g}")
    if not torch.equal(a, b):
        sys.exit("changed: what helps")
if not seen["bert"] == seen["roberta"] == 0:
    sys.exit("changed: BERT's kind of file")
if not (seen["xlm-roberta"] > 0.1 and seen["camembert"] > 0.1):
    sys.exit("changed: the embeddings are found")
PY
