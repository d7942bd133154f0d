#!/usr/bin/env bash
# BigBird's random blocks: beside the first, the last and three neighbouring blocks, each block of
# queries attends to three more that are chosen at random. One expects evaluation to fix the
# choice. In evaluation mode the choice is block zero three times, which is attended to already,
# and each copy counts: equal scores give the first block of a text 4 of 8 parts of the
# attention, where training gives it one. output_attentions shows one of them, and its rows do
# not add up to 1. A teacher's signals, made in evaluation mode, look at the beginning of the text
# more than it was trained to, and its maps do not say so. Use original_full attention where the
# memory allows it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers import BigBirdConfig, BigBirdForMaskedLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
BLOCK, LENGTH, MIDDLE = 16, 320, 160
config = BigBirdConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=64, block_size=BLOCK, num_random_blocks=3,
                       hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
model = BigBirdForMaskedLM(config)
attention = model.bert.encoder.layer[0].attention.self
with torch.no_grad():
    attention.query.weight.zero_()
    attention.query.bias.zero_()
ids = torch.randint(5, 90, (1, LENGTH))


def parts():
    """The weight of each token's value in the answer of the middle token, of 8 * BLOCK parts."""
    held = {}
    hook = attention.value.register_forward_hook(lambda _, __, out: held.update(value=out))
    out = attention.register_forward_hook(lambda _, __, out: held.update(context=out[0]))
    maps = model(ids, output_attentions=True).attentions[0][0, 0, MIDDLE]
    hook.remove()
    out.remove()
    weight = torch.autograd.grad(held["context"][0, MIDDLE, 0], held["value"])[0][0, :, 0]
    return tuple(float(x.detach().sum()) for x in (weight[:BLOCK], weight, maps))


model.eval()
evaluated = parts()
model.train()
trained = parts()
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: equal scores give the first block 1 of the 8 blocks' attention, 12.5 %; maps add "
      "up to 1")
for name, (first, total, maps) in (("training", trained), ("evaluation", evaluated)):
    print(f"seen: {name:10s} the first block has {first:.1%} of {total:.2f}; the map adds up to "
          f"{maps:.3f}")
if abs(evaluated[0] - 0.5) > 1e-4 or abs(evaluated[2] - 0.625) > 1e-3:
    sys.exit("changed: the first block counts otherwise in evaluation mode")
if abs(trained[0] - 0.125) > 1e-4 or abs(trained[2] - 1) > 1e-3:
    sys.exit("changed: the first block counts otherwise in training")
PY
