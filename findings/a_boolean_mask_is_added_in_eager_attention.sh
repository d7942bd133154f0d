#!/usr/bin/env bash
# A boolean attention_mask of shape (batch, 1, length, length), True where a token may look: it
# parts texts that share a row, for instance. transformers 5 takes it as it is. One expects sdpa
# and eager attention to read it alike, as they read a mask of two axes. sdpa hides what is False.
# Eager attention adds the mask to the scores: True adds 1, False adds 0, nothing is hidden, and
# the logits are neither those with the mask nor those without. Nothing is raised. One who opens a
# model with attn_implementation="eager", for its attention maps, gets another model; MPNet and
# RoFormer have eager attention alone. A mask of floats, 0 and the lowest number, works in both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
cd "$work"
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import torch, transformers
from transformers import (BertConfig, BertForMaskedLM, ElectraConfig, ElectraForMaskedLM,
                          ModernBertConfig, ModernBertForMaskedLM, MPNetConfig, MPNetForMaskedLM,
                          RobertaConfig, RobertaForMaskedLM, RoFormerConfig,
                          RoFormerForMaskedLM)

torch.manual_seed(0)
sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=64, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
             eos_token_id=2)
models = {BertForMaskedLM: BertConfig(**sizes), RobertaForMaskedLM: RobertaConfig(**sizes),
          ElectraForMaskedLM: ElectraConfig(embedding_size=32, **sizes),
          ModernBertForMaskedLM: ModernBertConfig(cls_token_id=1, sep_token_id=2, **sizes),
          MPNetForMaskedLM: MPNetConfig(**sizes), RoFormerForMaskedLM: RoFormerConfig(**sizes)}
ids = torch.randint(5, 50, (1, 12))
of = torch.arange(12) // 6  # Two texts of six tokens.
boolean = (of[:, None] == of)[None, None]
floats = torch.where(boolean, 0.0, torch.finfo(torch.float32).min)
flat = torch.ones_like(ids)
flat[:, 9:] = 0

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: differences of 0 between a boolean mask and one of floats")
for kind, config in models.items():
    model = kind(config).eval()
    logits = {}
    if model._supports_sdpa == (kind in (MPNetForMaskedLM, RoFormerForMaskedLM)):
        sys.exit("changed: which models have sdpa")
    for attention in ("sdpa", "eager") if model._supports_sdpa else ("eager",):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            for name, mask in (("boolean", boolean), ("floats", floats), ("flat", flat),
                               ("none", torch.ones_like(ids))):
                logits[attention, name] = model(input_ids=ids, attention_mask=mask).logits

    def gap(one, two):
        return round(float((logits[one] - logits[two])[:, :9].abs().max() / logits[two].std()), 4)

    wrong = gap(("eager", "boolean"), ("eager", "floats"))
    none = gap(("eager", "boolean"), ("eager", "none"))
    right = None
    if model._supports_sdpa:
        right = gap(("sdpa", "boolean"), ("sdpa", "floats"))
        if max(gap(("eager", name), ("sdpa", name)) for name in ("flat", "floats", "none")) > 1e-3:
            sys.exit("changed: other masks")
    print(f"seen: {kind.__name__:22s} {'no sdpa' if right is None else f'sdpa {right}'}, "
          f"eager {wrong}; eager from no mask {none}")
    if right is not None and right > 1e-3 or wrong < 0.2 or none < 0.1:
        sys.exit("changed: boolean masks")
PY
