#!/usr/bin/env bash
# A ModernBERT whose local layers have the rotary base (theta) of the global ones: local_rope_theta
# is null, a documented value of transformers 4, which also writes it. One expects transformers 5 to
# read it as before. It fails as soon as the model is made, with a line on NoneType and Tensor that
# names neither file nor field. Leaving the field out of config.json is worse: the model opens, and
# its answers are others. With the global base written in its place all answers are those of
# transformers 4.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 4.57.6 5.23.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install -q torch==2.13.0 "transformers==$version"
done
cd "$work"
export HF_HUB_OFFLINE=1
4.57.6/bin/python - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import torch, transformers
from transformers import ModernBertConfig, ModernBertForMaskedLM

torch.manual_seed(0)
config = ModernBertConfig(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
    local_attention=8, global_rope_theta=160000.0, local_rope_theta=None, initializer_range=0.3,
    pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
model = ModernBertForMaskedLM(config).eval()
model.save_pretrained("model")
with torch.no_grad():
    torch.save(model(torch.arange(3, 43)[None]).logits, "wanted.pt")
print(f"transformers {transformers.__version__} has written local_rope_theta: null")
PY
5.23.0/bin/python - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import json, sys
from pathlib import Path
import torch, transformers
from transformers import ModernBertForMaskedLM

transformers.logging.set_verbosity_error()
path, wanted = Path("model/config.json"), torch.load("wanted.pt", weights_only=True)
written = json.loads(path.read_text())
assert written["local_rope_theta"] is None
left_out = {name: value for name, value in written.items() if name != "local_rope_theta"}
seen, gaps = {}, {}
for name, settings in (("null", written), ("left out", left_out),
                       ("the global one", written | {"local_rope_theta": 160000.0})):
    path.write_text(json.dumps(settings))
    try:
        model = ModernBertForMaskedLM.from_pretrained("model").eval()
    except Exception as error:
        seen[name] = f"{type(error).__name__}: {error}"
    else:
        with torch.no_grad():
            gaps[name] = float((model(torch.arange(3, 43)[None]).logits - wanted).abs().max())
        seen[name] = f"logits differ by up to {gaps[name]:.2g}"
    print(f"seen: local_rope_theta {name}: {seen[name]}")
print(f"torch {torch.__version__}, transformers {transformers.__version__}; expected: no difference "
      "for null")
error = seen["null"]
if not error.startswith("TypeError") or "NoneType" not in error or "theta" in error:
    sys.exit("changed: null is read")
if gaps["left out"] < 0.1:
    sys.exit("changed: the field left out")
if gaps["the global one"] > 1e-4:
    sys.exit("changed: what helps")
PY
