#!/usr/bin/env bash
# A masked LM in int8 by quantize_dynamic of ONNX Runtime. One expects of a text what it gives in
# float32: the same logits whatever other texts are in its batch, and however many padding
# positions that the mask hides come after it. Weights have their scale from the file, but
# activations get one when they come, from the smallest and largest value of the whole tensor:
# all texts of the batch, and the padding. So a text's logits change with its neighbours, by about
# as much as int8 changes them at all, and scores of an evaluation depend on batch size and order.
# Compare int8 models text by text, without padding, or use static quantisation, whose scales are
# part of the file.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 onnx==1.22.0 \
  onnxscript==0.7.1 onnxruntime==1.32.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$work/venv/bin/python" -W ignore - <<'PY'
import logging
import sys
import numpy as np
import onnxruntime
import torch
import transformers
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import BertConfig, BertForMaskedLM

transformers.logging.set_verbosity_error()
logging.disable(logging.WARNING)
torch.manual_seed(0)
config = BertConfig(vocab_size=500, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
                    intermediate_size=128, initializer_range=0.1)


class Logits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = BertForMaskedLM(config).eval()

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask).logits


ids = torch.randint(5, 500, (32, 40))
mask = torch.ones_like(ids)
sizes = {0: torch.export.Dim("texts", min=1, max=99), 1: torch.export.Dim("tokens", min=2, max=99)}
torch.onnx.export(Logits(), (ids[:2], mask[:2]), "float32.onnx", input_names=["ids", "mask"],
                  output_names=["logits"], dynamo=True, external_data=False, verbose=False,
                  dynamic_shapes={"ids": sizes, "mask": sizes})
quantize_dynamic("float32.onnx", "int8.onnx", weight_type=QuantType.QInt8)
padded = [torch.nn.functional.pad(x, (0, 24)) for x in (ids, mask)]


def first_choices(name):
    session = onnxruntime.InferenceSession(f"{name}.onnx", providers=["CPUExecutionProvider"])

    def run(ids, mask):
        found = session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0]
        return found[:, :40].argmax(-1)

    alone, hidden = (np.concatenate([run(a[i:i + 1], b[i:i + 1]) for i in range(32)])
                     for a, b in ((ids, mask), padded))
    return alone, run(ids, mask), hidden


print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}")
print("expected: the same first choices alone, in a batch of 32, and with 24 padding positions")
truth, *_ = first_choices("float32")
for name in ("float32", "int8"):
    alone, batch, hidden = first_choices(name)
    shares = [float((x != alone).mean()) for x in (batch, hidden, truth)]
    print("seen: {}: {:.1%} of the first choices change in the batch, {:.1%} by padding; {:.1%} are "
          "not those of float32".format(name, *shares))
    if (name == "float32") != (max(shares) == 0) or (name == "int8" and min(shares) < 0.005):
        sys.exit("changed")
PY
