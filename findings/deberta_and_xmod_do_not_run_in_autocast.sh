#!/usr/bin/env bash
# DeBERTa (the first version) and X-MOD under torch.autocast in bfloat16, with transformers 5. One
# expects an encoder that runs in float32 to run in autocast; BERT and DeBERTa-v2 do. DeBERTa fills
# bfloat16 scores with a number that bfloat16 cannot hold, with relative attention or without; X-MOD
# writes bfloat16 rows into a float32 tensor. Each raises an error in the first forward pass. With
# all weights in bfloat16, and without autocast, both run. Leave autocast off for these two, or cast
# their weights.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import torch, transformers
from transformers import (BertConfig, BertForMaskedLM, DebertaConfig, DebertaForMaskedLM,
                          DebertaV2Config, DebertaV2ForMaskedLM, XmodConfig, XmodForMaskedLM)

small = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=64, max_position_embeddings=64)
relative = dict(relative_attention=True, pos_att_type=["c2p", "p2c"])
models = {
    "bert": lambda: BertForMaskedLM(BertConfig(**small)),
    "deberta-v2": lambda: DebertaV2ForMaskedLM(DebertaV2Config(**small, **relative)),
    "deberta": lambda: DebertaForMaskedLM(DebertaConfig(**small)),
    "deberta, relative": lambda: DebertaForMaskedLM(DebertaConfig(**small, **relative)),
    "xmod": lambda: XmodForMaskedLM(XmodConfig(**small, languages=["en_XX"],
                                               default_language="en_XX")),
}
OVERFLOW = "RuntimeError: value cannot be converted to type"
WANTED = {"bert": "finite", "deberta-v2": "finite", "deberta": OVERFLOW,
          "deberta, relative": OVERFLOW, "xmod": "RuntimeError: Index put requires"}
ids = torch.arange(5, 15)[None]


def run(model, autocast):
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(ids).logits
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return "finite" if logits.isfinite().all() else "not finite"


seen = {}
for name, make in models.items():
    torch.manual_seed(0)
    model = make().eval()
    seen[name] = run(model, False), run(model, True), run(model.bfloat16(), False)
    print(f"seen: {name}: float32: {seen[name][0]}; autocast: {seen[name][1]}; "
          f"bfloat16 weights: {seen[name][2]}")
print(f"torch {torch.__version__}, transformers {transformers.__version__}; expected: all finite")
for name, (plain, mixed, cast) in seen.items():
    if plain != "finite" or cast != "finite":
        sys.exit(f"changed: {name} in one type")
    if not mixed.startswith(WANTED[name]):
        sys.exit(f"changed: {name} in autocast")
PY
