#!/usr/bin/env bash
# A ModernBERT that transformers 5 saves names the attention of each layer (layer_types) and the
# bases of its rotations (rope_parameters). Transformers 4, and programs made after it, look for
# global_attn_every_n_layers, global_rope_theta and local_rope_theta instead. One expects a refusal,
# or the same answers. Version 4 opens the folder without a word and takes its own defaults: every
# third layer global, 160000 and 10000. So a model with another base, as mmBERT has, or with layers
# left out, as a distilled one has, gives other answers. What helps: write both names into
# config.json; version 5 then reads its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 4.57.6 5.24.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q torch==2.13.0 "transformers==$version"
done
cd "$work"
cat > ask.py <<'PY'
import json, sys
from pathlib import Path

import torch, transformers
from transformers import ModernBertConfig, ModernBertForMaskedLM

transformers.logging.set_verbosity_error()
ids = torch.randint(5, 60, (1, 40), generator=torch.Generator().manual_seed(0))
found = {}
for name in ("same", "base", "order"):
    if sys.argv[1] == "save":
        torch.manual_seed(0)
        near = 160000.0 if name == "base" else 10000.0
        far = [0, 2] if name == "order" else [0, 3]
        kinds = ["full_attention" if at in far else "sliding_attention" for at in range(4)]
        rope = {"full_attention": {"rope_type": "default", "rope_theta": 160000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": near}}
        ModernBertForMaskedLM(ModernBertConfig(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
            local_attention=8, initializer_range=0.2, layer_types=kinds, rope_parameters=rope,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
        )).save_pretrained(name)
        if name == "order":
            config = json.loads(Path(name, "config.json").read_text())
            print("config.json says global_attn_every_n_layers:", "global_attn_every_n_layers" in config)
    model = ModernBertForMaskedLM.from_pretrained(name, attn_implementation="eager").eval()
    with torch.no_grad():
        found[name] = model(ids).logits[0]
torch.save(found, f"{sys.argv[1]}.pt")
print("transformers", transformers.__version__)
PY
export HF_HUB_OFFLINE=1
5.24.0/bin/python ask.py save 2>/dev/null
4.57.6/bin/python ask.py open 2>/dev/null
5.24.0/bin/python - <<'PY'
import sys

import torch

five, four = (torch.load(f"{name}.pt", weights_only=True) for name in ("save", "open"))
gaps = {name: float((five[name] - four[name]).abs().max()) for name in five}
for name, gap in gaps.items():
    print(f"{name}: logits differ by up to {gap:.4f}")
if gaps["same"] > 1e-4 or min(gaps["base"], gaps["order"]) < 1e-2:
    sys.exit("changed: transformers 4 reads what transformers 5 writes, or neither agrees on the rest")
print("seen: with other bases, or another order, version 4 opens the folder and answers otherwise")
PY
