#!/usr/bin/env bash
# A masked LM with rotary positions (ModernBERT and others) in bfloat16. One expects from_pretrained
# with dtype=torch.bfloat16 and a model that is opened and then cast with .to(torch.bfloat16) to be
# the same: their weights are. The second also rounds the frequencies of the positions, which the
# first keeps in float32. An angle is position times frequency, so the error grows with the
# position: at 32 tokens nothing shows, at 2,048 nearly half of the first choices are others. Pass
# dtype to from_pretrained.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import torch, transformers
from transformers import ModernBertConfig, ModernBertForMaskedLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
tokens = dict(pad_token_id=0, cls_token_id=1, bos_token_id=1, sep_token_id=2, eos_token_id=2)
ModernBertForMaskedLM(ModernBertConfig(
    vocab_size=500, hidden_size=64, num_hidden_layers=3, num_attention_heads=2,
    intermediate_size=96, initializer_range=0.3, **tokens)).save_pretrained("teacher")
opened = ModernBertForMaskedLM.from_pretrained("teacher", dtype=torch.bfloat16).eval()
cast = ModernBertForMaskedLM.from_pretrained("teacher").to(torch.bfloat16).eval()
weights = opened.state_dict()
same = all(torch.equal(value, weights[name]) for name, value in cast.state_dict().items())
truth = ModernBertForMaskedLM.from_pretrained("teacher").eval()
truth.load_state_dict({name: value.float() for name, value in weights.items()})
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: a model opened in bfloat16 and one cast to it make the same first choices")
kept, rounded = ({buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name}
                 for model in (opened, cast))
print(f"seen: the same weights: {same}; frequencies in {kept} and in {rounded}")
if (kept, rounded) != ({torch.float32}, {torch.bfloat16}):
    sys.exit("changed: the type of the frequencies")
seen = {}
for length in (32, 512, 2048):
    ids = torch.randint(5, 500, (1, length))
    with torch.no_grad():
        first, *others = (model(ids).logits.argmax(-1) for model in (truth, opened, cast))
    seen[length] = [float((other == first).float().mean()) for other in others]
    print("seen: {} tokens: opened in bfloat16 {:.0%} of the first choices in float32 with these "
          "weights, cast {:.0%}".format(length, *seen[length]))
if not (same and min(opened for opened, _ in seen.values()) > 0.85):
    sys.exit("changed: the weights, or a model opened in bfloat16")
if not (seen[32][1] > 0.85 and seen[2048][1] < 0.75):
    sys.exit("changed: a cast model knows its positions")
PY
