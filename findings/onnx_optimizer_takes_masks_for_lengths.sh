#!/usr/bin/env bash
# A BERT as ONNX, made faster with the optimizer for transformers that comes with ONNX Runtime
# (onnxruntime.transformers.optimizer, model_type="bert"). One expects the logits of the exported
# model. Where the optimizer recognises attention, it replaces the mask by one number for each text:
# how many tokens it has, the sum of the mask. That is right for padding at the end alone. Of a text
# that is padded on the left, or whose mask has a hole, it reads the padding and leaves out its last
# tokens, without a word; texts that are padded on the right agree to the last digits, so a test
# with these passes. Pass FusionOptions with use_raw_attention_mask(True).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 onnx==1.23.2 \
  onnxruntime==1.32.0 sympy==1.14.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import numpy as np, onnxruntime, torch, transformers
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.fusion_options import FusionOptions
from transformers import BertConfig, BertForMaskedLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


model = Logits(BertForMaskedLM(BertConfig(
    vocab_size=90, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=128, max_position_embeddings=64, initializer_range=0.3,
    attn_implementation="eager"))).eval()
ids = torch.randint(5, 90, (4, 16))
mask = torch.ones_like(ids)
mask[1, 10:] = mask[2, :6] = mask[3, 4:8] = 0
kinds = ("whole", "padded on the right", "padded on the left", "with a hole")
names = ["input_ids", "attention_mask"]
torch.onnx.export(model, (ids, mask), "plain.onnx", input_names=names, output_names=["logits"],
                  dynamic_axes={name: {0: "texts", 1: "tokens"} for name in names}, dynamo=False,
                  opset_version=17)
raw = FusionOptions("bert")
raw.use_raw_attention_mask(True)
fused = {}
for name, options in (("optimized", None), ("raw mask", raw)):
    made = optimizer.optimize_model("plain.onnx", model_type="bert", num_heads=4, hidden_size=64,
                                    optimization_options=options)
    fused[name] = made.get_fused_operator_statistics()["Attention"]
    made.save_model_to_file(f"{name}.onnx")
with torch.no_grad():
    wanted = model(ids, mask).numpy()
print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
      f"onnxruntime {onnxruntime.__version__}")
print("expected: the logits of the model at all tokens of a text, within 1e-3")
seen = {}
for name in ("plain", "optimized", "raw mask"):
    session = onnxruntime.InferenceSession(f"{name}.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    off = np.abs(found - wanted).max(2)
    seen[name] = [float(off[i][mask[i].bool().numpy()].max()) for i in range(4)]
    print(f"seen: {name:9s} " + ", ".join(
        f"{kind} off by {error:.1g}" for kind, error in zip(kinds, seen[name], strict=True)))
if set(fused.values()) != {2}:
    sys.exit("changed: the optimizer no longer recognises attention")
if max(seen["plain"] + seen["raw mask"] + seen["optimized"][:2]) > 1e-3:
    sys.exit("changed: the exported model, the remedy, or padding on the right")
if min(seen["optimized"][2:]) < 1:
    sys.exit("changed: the optimizer heeds the mask")
PY
