#!/usr/bin/env bash
# Padding that is marked in attention_mask. One expects a sequence to give the same logits beside
# padding as on its own. That holds for BERT and most encoders, and not for FNet (the mask has no
# effect), ConvBERT, Nystromformer, YOSO and Funnel: they mix, convolve or pool over positions, padding
# included. What such a teacher says of a sequence depends on the longest sequence of its batch; batch
# sequences of one length alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch, transformers
from transformers import AutoConfig, AutoModelForMaskedLM

transformers.logging.set_verbosity_error()
small = dict(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=64, max_position_embeddings=64, initializer_range=0.2)
kinds = {"bert": small, "fnet": small, "yoso": small,
         "convbert": {**small, "embedding_size": 32},
         "nystromformer": {**small, "segment_means_seq_len": 64, "num_landmarks": 64},
         "funnel": dict(vocab_size=90, d_model=32, n_head=2, d_head=16, d_inner=64,
                        block_sizes=[1, 1], num_decoder_layers=1, initializer_std=0.2)}
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: 12 tokens give the same logits alone and before 8 masked positions of padding")
seen = {}
for kind, settings in kinds.items():
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    ids = torch.randint(5, 90, (1, 12))
    padded = torch.cat([ids, torch.zeros(1, 8, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 8, dtype=torch.long)], 1)
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        beside = model(input_ids=padded, attention_mask=mask).logits[:, :12]
    seen[kind] = float((alone - beside).abs().max() / alone.std())
    print(f"seen: {kind:14s} largest difference / deviation of the logits {seen[kind]:.2g}")
if not (seen["bert"] < 1e-4):
    raise SystemExit("changed: BERT's logits depend on padding")
if not (all(seen[kind] > 1e-3 for kind in kinds if kind != "bert")):
    raise SystemExit("changed: a mask shields now")
PY
