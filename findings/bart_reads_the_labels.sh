#!/usr/bin/env bash
# BART as a masked LM, which AutoModelForMaskedLM opens it as. One expects labels to add a loss
# and to leave the logits alone. Without labels the decoder is given the input, shifted by one;
# with labels it is given the labels, shifted by one, -100 as padding. So with labels of a masked
# LM, -100 but at the masks, it sees padding and the right tokens at masks: other logits and
# predictions, and a loss that is not the cross entropy of the logits without labels. A loss
# measured so does not belong to the predictions, nor to signals that were cached. The same holds
# for mBART and MVP. Pass no labels, and compute the loss from the logits.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForMaskedLM

transformers.logging.set_verbosity_error()
plain = dict(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=64, pad_token_id=1)
pair = dict(vocab_size=90, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
            decoder_ffn_dim=64, init_std=0.2)
torch.manual_seed(0)
ids = torch.randint(5, 90, (16, 30))
masked = torch.rand(ids.shape) < 0.15
labels = torch.where(masked, ids, -100)
inputs = torch.where(masked, 4, ids)
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: the same predictions with labels and without, loss = cross entropy of the logits")
for kind in ("bert", "roberta", "bart", "mbart", "mvp"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(plain if "bert" in kind else pair))
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        without, told = model(inputs).logits, model(inputs, labels=labels)
    changed = float((without.argmax(-1) != told.logits.argmax(-1))[masked].float().mean())
    entropy = float(cross_entropy(without[masked], ids[masked]))
    print(f"seen: {kind:7s} {changed:.0%} of the predictions at masks change; loss "
          f"{told.loss:.3f}, cross entropy {entropy:.3f}")
    same = changed == 0 and abs(float(told.loss) - entropy) < 1e-4
    if same != ("bert" in kind):
        sys.exit(f"changed: {kind}")
PY
