#!/usr/bin/env bash
# Which words does an answer rest on? Integrated gradients of captum on the word embeddings, with a
# baseline of padding tokens between the special tokens, as captum's own tutorial for BERT has it.
# One expects the attributions to add up to the model's answer to the text minus its answer to the
# baseline, closer with more steps; captum reports the rest as the convergence delta. For BERT it is
# so. RoBERTa, XLM-R and MPNet count positions over tokens that are not padding. Steps are taken at
# the positions of the text, while the answer to the baseline is that of one whose tokens all stand
# at the first place. So the delta is as large as the answer and no number of steps lessens it: it
# says nothing about the attributions. Pass position_ids, of the text, in additional_forward_args.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 captum==0.9.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys

import captum, torch, transformers
from captum.attr import LayerIntegratedGradients

IDS = torch.tensor([[0, 11, 12, 13, 14, 4, 15, 16, 2]])  # <s> ... <mask> ... </s>
BASELINE = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 2]])  # The same with padding, id 1.
MASKED = 5


def model_of(kind):
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(
        vocab_size=50, hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=64, max_position_embeddings=40, pad_token_id=1, initializer_range=0.5)
    return getattr(transformers, kind + "ForMaskedLM")(config).eval()


def rest(model, steps, positions=None):
    """What the attributions lack of the change that captum sees, and that change."""
    def score(ids, mask, positions):
        return model(ids, attention_mask=mask, position_ids=positions).logits[:, MASKED, 20]

    more = (torch.ones_like(IDS), positions)
    gradients = LayerIntegratedGradients(score, model.get_input_embeddings())
    values, delta = gradients.attribute(IDS, BASELINE, additional_forward_args=more,
                                        n_steps=steps, return_convergence_delta=True)
    with torch.no_grad():
        change = score(IDS, *more) - score(BASELINE, *more)
    if abs(float(values.sum() - change - delta)) > 1e-4:
        sys.exit("changed: what the delta is")
    return abs(float(delta)), float(change)


print(f"captum {captum.__version__}, transformers {transformers.__version__}")
print("expected: delta near 0 with many steps, for each model")
for kind in ("Bert", "Roberta", "XLMRoberta", "MPNet"):
    model = model_of(kind)
    own = torch.arange(IDS.shape[1])[None] + (0 if kind == "Bert" else 2)
    (few, change), (many, _), (helped, _) = rest(model, 50), rest(model, 400), rest(model, 400, own)
    print(f"seen: {kind:10s} change {change:7.4f}; delta {few:.4f} with 50 steps, {many:.4f} with "
          f"400, {helped:.4f} with 400 and position_ids")
    if helped > 0.002:
        sys.exit("changed: position_ids")
    if kind == "Bert" and many > 0.002:
        sys.exit("changed: BERT")
    if kind != "Bert" and (many < 0.05 or abs(many - few) > 0.1 * many):  # Not less by more steps.
        sys.exit("changed: positions over what is not padding")
PY
