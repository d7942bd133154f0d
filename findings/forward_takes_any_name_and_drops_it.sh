#!/usr/bin/env bash
# Arguments of an encoder's forward pass in transformers 5. Scripts that switch attention heads
# off, to find those that a student can do without, pass head_mask, as transformers 4 documents it.
# One expects it to work or to raise an error, as any unknown name does in transformers 4.
# transformers 5 has removed head_mask and takes arguments of any name: nothing is switched off,
# nothing is said, and each head seems to be of no use, as the loss without it is the same. A
# misspelt attention_mask goes the same way: padding is read as text. Look for the name in
# inspect.signature, and zero a head by a hook before the output layer of its attention.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
cd "$work"
export HF_HUB_OFFLINE=1
cat > heads.py <<'PY'
import inspect, sys
from pathlib import Path
import torch, transformers
from transformers import (AlbertConfig, AlbertForMaskedLM, BertConfig, BertForMaskedLM,
                          DistilBertConfig, DistilBertForMaskedLM, ElectraConfig,
                          ElectraForMaskedLM, RobertaConfig, RobertaForMaskedLM)

HEADS, WIDTH = 4, 32
SIZES = dict(vocab_size=50, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
             intermediate_size=64, max_position_embeddings=40, initializer_range=0.3)
MADE = {BertForMaskedLM: BertConfig(**SIZES), RobertaForMaskedLM: RobertaConfig(**SIZES),
        ElectraForMaskedLM: ElectraConfig(embedding_size=WIDTH, **SIZES),
        AlbertForMaskedLM: AlbertConfig(embedding_size=16, **SIZES),
        DistilBertForMaskedLM: DistilBertConfig(vocab_size=50, dim=WIDTH, n_layers=2, n_heads=HEADS,
                                                hidden_dim=64, initializer_range=0.3)}
old = transformers.__version__.startswith("4.")
torch.manual_seed(0)
ids = torch.randint(5, 50, (4, 12))
mask = torch.ones_like(ids)
mask[:, 8:] = 0
without = torch.ones(2, HEADS)
without[0, 1:] = 0  # One head is left in the first layer.


def logits(model, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


print(f"torch {torch.__version__}, transformers {transformers.__version__}")
for kind, config in MADE.items():
    name = kind.__name__
    if old:
        model = kind._from_config(config, attn_implementation="eager")
        model.save_pretrained(name)
    model = kind.from_pretrained(name, attn_implementation="eager").eval()
    plain = logits(model)
    masked = logits(model, head_mask=without)
    gap = float((masked - plain).abs().max() / plain.std())
    try:
        typed = float((logits(model, attention_masks=mask) - plain).abs().max())
    except TypeError:
        typed = "an error"
    wanted = float((logits(model, attention_mask=mask) - plain)[:, :8].abs().max())
    print(f"{'expected' if old else 'seen'}: {name:22s} head_mask: {gap:.2f} of the deviation, "
          f"attention_masks: {typed} (attention_mask: {wanted:.2f})")
    named = "head_mask" in inspect.signature(kind.forward).parameters
    if wanted < 0.1 or named is not old:
        sys.exit("changed: attention_mask, or the names of forward")
    if old and (gap < 0.1 or typed != "an error"):
        sys.exit("changed: transformers 4")
    if not old and (gap or typed):
        sys.exit("changed: transformers 5 obeys or refuses the names")
    if kind is BertForMaskedLM and old:
        torch.save((plain, masked), "bert.pt")
    elif kind is BertForMaskedLM:
        then = torch.load("bert.pt")
        if not torch.allclose(plain, then[0], atol=1e-4):
            sys.exit("changed: logits of all heads")
        keep = without[0].repeat_interleave(WIDTH // HEADS)
        hook = model.bert.encoder.layer[0].attention.output.dense.register_forward_pre_hook(
            lambda layer, inputs: (inputs[0] * keep,))
        if not torch.allclose(logits(model), then[1], atol=1e-4):
            sys.exit("changed: what helps")
        hook.remove()
        print("seen: a hook gives BERT the logits that head_mask gave in transformers 4")
PY
for version in 4.57.6 5.24.0; do
  "$work/venv/bin/pip" install -q torch==2.13.0 "transformers==$version"
  "$work/venv/bin/python" heads.py 2>log.txt || { cat log.txt >&2; exit 1; }
done
