#!/usr/bin/env bash
# Attention maps of a teacher. One expects output_attentions=True to give one map for each layer, or
# an error where the attention in use cannot. With scaled dot-product attention, which transformers
# chooses by itself for most encoders, it gives an empty tuple and one line in the log. A loss
# summed over the pairs of layers is then 0 and teaches nothing, and a cache holds no maps. Open the
# model with attn_implementation="eager", and check the number of maps.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys, torch, transformers
from transformers import AutoConfig, AutoModelForMaskedLM

transformers.logging.set_verbosity_error()
small = dict(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
             sep_token_id=2, mask_token_id=4)
ids = torch.arange(10, 20)[None]


def maps(model):
    with torch.no_grad():
        return model(ids, output_attentions=True).attentions


print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: 2 maps for 2 layers, or an error")
for kind in ("bert", "roberta", "distilbert", "electra", "modernbert", "esm"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **small)
    student = AutoModelForMaskedLM.from_config(config).eval()
    teacher = AutoModelForMaskedLM.from_config(config).eval()
    loss = sum((s - t).square().mean() for s, t in zip(maps(student), maps(teacher)))
    chosen, plain = student.config._attn_implementation, len(maps(student))
    student.set_attn_implementation("eager")
    print(f"seen: {kind:10s} {chosen}: {plain} maps, loss between two random models "
          f"{float(loss)}; eager: {len(maps(student))} maps")
    if not (chosen == "sdpa" and plain == 0 and loss == 0 and len(maps(student)) == 2):
        sys.exit(f"changed: {kind} no longer gives an empty tuple")
PY
