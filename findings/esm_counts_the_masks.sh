#!/usr/bin/env bash
# ESM (proteins). One expects an encoder's embedding of a token to depend on that token and its
# place. ESM with token_dropout multiplies all embeddings of a sequence by
# 0.88 / (1 - share of mask tokens), in evaluation mode as well: 0.88 where there is no mask. So
# what every layer reads depends on how many positions are masked. Compare only outputs of a
# sequence that were made with the same number of masks.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch, transformers
from transformers import EsmConfig, EsmForMaskedLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
config = EsmConfig(vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=32,
                   num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                   max_position_embeddings=140, position_embedding_type="rotary",
                   token_dropout=True)
model = EsmForMaskedLM(config).eval()
ids = torch.randint(4, 30, (1, 128))
masked = ids.clone()
masked[0, 100:119] = 32
words = model.esm.embeddings.word_embeddings.weight[ids[0, 0]]
with torch.no_grad():
    factors = [
        float((model.esm.embeddings(x, attention_mask=torch.ones_like(x))[0, 0] / words).mean())
        for x in (ids, masked)
    ]
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: the embedding of the first token is its row of the table, whatever is masked")
print(f"seen: {factors[0]:.4f} of that row without masks, {factors[1]:.4f} with 19 of 128 masked")
if not (abs(factors[0] - 0.88) < 1e-4 and abs(factors[1] - 0.88 / (1 - 19 / 128)) < 1e-4):
    raise SystemExit("changed: it is no longer as said above")
PY
