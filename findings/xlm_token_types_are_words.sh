#!/usr/bin/env bash
# An XLM or a FlauBERT with token_type_ids of zeros, as for one text. In a BERT zeros are what the
# model takes by itself, so one expects the same outputs with and without them. XLM's and
# FlauBERT's forward looks token types up among the words: zeros add the embedding of word 0 at
# every position. Code that gives token types to each model whose forward names them trains another
# model than it serves. There is no error and no warning. Leave token types out for these two.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import torch, transformers
from transformers import (BertConfig, BertModel, FlaubertConfig, FlaubertModel, XLMConfig,
                          XLMModel)

print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("expected: zeros as token types change nothing, as in a BERT")
small = {"vocab_size": 30, "emb_dim": 16, "n_layers": 1, "n_heads": 2, "pad_index": 2,
         "max_position_embeddings": 20}
bert = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                  intermediate_size=32)
ids = torch.arange(5, 13)[None]
for name, cls, config in (("BERT", BertModel, bert), ("XLM", XLMModel, XLMConfig(**small)),
                          ("FlauBERT", FlaubertModel, FlaubertConfig(**small))):
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        plain = model(ids)[0]
        typed = model(ids, token_type_ids=torch.zeros_like(ids))[0]
        if name != "BERT":
            words = model.get_input_embeddings().weight
            words[0] = 0  # the word of type 0 adds nothing now
            without = model(ids, token_type_ids=torch.zeros_like(ids))[0]
            if not torch.allclose(without, plain, atol=1e-6):
                sys.exit(f"changed: {name} adds something else than word 0")
    change = ((typed - plain).norm() / plain.norm()).item()
    print(f"seen: {name}: zeros change the hidden states by {change:.0%}")
    if (change < 1e-6) != (name == "BERT"):
        sys.exit(f"changed: {name}")
PY
