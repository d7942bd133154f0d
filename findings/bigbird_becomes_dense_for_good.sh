#!/usr/bin/env bash
# BigBird with its usual block-sparse attention. One expects a model in evaluation mode to give the
# same logits for the same input at any time. A batch that is too short for the blocks turns the
# model's attention to full attention, and it stays so in that object: a warning speaks of the
# change, and config.attention_type still says "block_sparse". From then on each long text gets
# other logits, so what one caches depends on which texts came before. Open one model for short
# texts and one for long ones, or call set_attention_type("block_sparse") on the encoder after each
# short batch.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys, torch, transformers
from transformers import BigBirdConfig, BigBirdForMaskedLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
config = BigBirdConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=64, max_position_embeddings=256, initializer_range=0.2,
                       attention_type="block_sparse", block_size=4, num_random_blocks=2)
model = BigBirdForMaskedLM(config).eval()
long = torch.randint(5, 90, (1, 128))


def off() -> float:
    return float((model(long).logits - first).abs().max() / first.std())


with torch.no_grad():
    first = model(long).logits
    again = off()
    model(long[:, :20])
    after = off()
    said = model.config.attention_type
    model.bert.set_attention_type("block_sparse")
    back = off()
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: 128 tokens give the same logits before and after a batch of 20 tokens")
print(f"seen: largest difference / deviation of the logits: second time {again:.2g}, after the "
      f"short batch {after:.2g} (config: {said!r}), set back by hand {back:.2g}")
if not (again < 1e-4 and back < 1e-4 and after > 0.1 and said == "block_sparse"):
    sys.exit("changed: a short batch leaves BigBird's attention as it was")
PY
