#!/usr/bin/env bash
# A student built from the configuration of a teacher that was opened in bfloat16, with fewer
# layers. One expects new weights in float32, as BertForMaskedLM(config) makes them. The
# configuration keeps the type of the opened model, and AutoModelForMaskedLM.from_config(config)
# obeys it: the student is in bfloat16. Steps of AdamW at a usual rate are smaller than the
# distance of two bfloat16 numbers, so here not one weight of the norms moves in 200 steps, and
# the rest learns less; no error, no warning. Pass dtype=torch.float32 to from_config.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
BertForMaskedLM(BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2,
                           num_attention_heads=2, intermediate_size=64)).save_pretrained("teacher")
teacher = AutoModelForMaskedLM.from_pretrained("teacher", dtype=torch.bfloat16)
config = teacher.config
config.num_hidden_layers = 1
torch.manual_seed(0)
ids = torch.randint(5, 90, (8, 16))
ways = {"from_config": lambda: AutoModelForMaskedLM.from_config(config),
        "the class": lambda: BertForMaskedLM(config),
        "from_config, float32":
            lambda: AutoModelForMaskedLM.from_config(config, dtype=torch.float32)}


def moved(model):
    norms = [p for name, p in model.named_parameters() if name.endswith("LayerNorm.weight")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return sum(int((p != 1).sum()) for p in norms), sum(p.numel() for p in norms)


print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: float32, and the weights of the norms are trained")
seen = {}
for name, make in ways.items():
    torch.manual_seed(0)
    model = make()
    seen[name] = model.dtype, *moved(model)
    print(f"seen: {name:21s} {model.dtype}, {seen[name][1]} of {seen[name][2]} weights of norms "
          "move in 200 steps")
kind, some, _ = seen.pop("from_config")
if kind != torch.bfloat16 or some:
    sys.exit("changed: from_config makes a student in float32, or bfloat16 trains")
if any(kind != torch.float32 or some < 0.9 * all_ for kind, some, all_ in seen.values()):
    sys.exit("changed: another way to make a student")
PY
