#!/usr/bin/env bash
# Encoders, and a batch that is padded on the left with a right attention_mask, as a tokenizer with
# padding_side "left" gives it. Padding is masked, so one expects each text's states as without
# padding. A BERT counts its positions from the left, padding included: its states of all tokens are
# others. A RoBERTa counts from the first real token, so those stay; but its head of texts, as
# BERT's pooler, reads the first place, which is padding now. A ModernBERT, whose positions are
# relative, keeps its states as well, and reads padding in its head. So a classifier's answer depends
# on the longest text beside it. There is no error and no warning. Pad on the right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import torch, transformers
from transformers import AutoModelForSequenceClassification, BertConfig, ModernBertConfig
from transformers import RobertaConfig

print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("expected: the states of a text's tokens, and the answer, are those without padding")
small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "pad_token_id": 1, "initializer_range": 0.3}
ids = torch.tensor([[0, 11, 12, 13, 2]])
pad = torch.ones(1, 4, dtype=torch.long)
padded = torch.cat([pad, ids], 1)
mask = torch.cat([torch.zeros_like(pad), torch.ones_like(ids)], 1)
for config, keeps in ((BertConfig(**small), False), (RobertaConfig(**small), True),
                      (ModernBertConfig(**small, cls_token_id=0, sep_token_id=2), True)):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        alone = model(ids, output_hidden_states=True)
        beside = model(padded, attention_mask=mask, output_hidden_states=True)
    states = [out.hidden_states[-1][0, -5:] for out in (alone, beside)]
    same = torch.allclose(*states, atol=1e-4)
    moved = (alone.logits - beside.logits).abs().max().item()
    print(f"seen: {config.model_type}: states {'stay' if same else 'change'}, "
          f"answer moves by {moved:.2f} ({alone.logits.abs().max():.2f} at most)")
    if same != keeps or moved < 1e-2:
        sys.exit(f"changed: {config.model_type}")
PY
