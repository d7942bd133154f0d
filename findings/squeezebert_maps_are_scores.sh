#!/usr/bin/env bash
# Attention maps of SqueezeBERT. Its documentation says that output_attentions gives weights "after
# the attention softmax", and one expects rows of probabilities, as BERT's. SqueezeBERT gives the
# scores before the softmax: numbers of either sign whose rows add up to anything, and the lowest
# number of the type where the mask hides a position. Nothing is raised. A divergence of such maps
# means nothing, and a mean squared error to a BERT's maps is that of other things; beside padding
# it is infinite. Take softmax(-1) of them: that gives the very probabilities.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers import BertConfig, BertForMaskedLM, SqueezeBertConfig, SqueezeBertForMaskedLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
small = dict(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=64, initializer_range=0.3)
groups = dict.fromkeys(("q_groups", "k_groups", "v_groups", "intermediate_groups",
                        "output_groups"), 2)
models = {"bert": BertForMaskedLM(BertConfig(**small, attn_implementation="eager")),
          "squeezebert": SqueezeBertForMaskedLM(SqueezeBertConfig(**small, **groups,
                                                                  embedding_size=32))}
ids, mask = torch.randint(5, 90, (4, 12)), torch.ones(4, 12, dtype=torch.long)
mask[0, 8:] = 0
used = []  # What the last layer of SqueezeBERT multiplies the values with.
layer = models["squeezebert"].transformer.encoder.layers[-1].attention
layer.softmax.register_forward_hook(lambda module, scores, output: used.append(output))
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: maps of probabilities, of which each row adds up to 1")
seen = {}
for name, model in models.items():
    with torch.no_grad():
        maps = model.eval()(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    whole, padded = maps[-1][1:], maps[-1][0, :, :8]
    sums = whole.sum(-1)
    seen[name] = float(sums.min()), float(sums.max()), float(padded.min())
    print("seen: {}: rows add up to {:.3g} to {:.3g}; the least value beside padding is {:.3g}"
          .format(name, *seen[name]))
same = float((maps[-1].softmax(-1) - used[-1]).abs().max())
print(f"seen: squeezebert: softmax(-1) of its maps is off by {same:.2g} from what the layer used")
if max(abs(total - 1) for total in seen["bert"][:2]) > 1e-4 or seen["bert"][2] < 0:
    sys.exit("changed: BERT's maps")
if not (seen["squeezebert"][0] < 0 and seen["squeezebert"][2] < -1e30 and same < 1e-6):
    sys.exit("changed: SqueezeBERT gives other maps")
PY
