#!/usr/bin/env bash
# Pairs of texts (inference, questions) for a Funnel. It was trained with token types: 2 for <cls>,
# 0 for the first text and 1 for the second, and its attention asks which tokens are of one text.
# One expects the tokenizer to give them, as BERT's does and as Funnel's does in transformers 4.
# That of transformers 5 knows them and does not give them unless it is asked to, and the model
# takes all tokens for those of one text: other logits, without a word. One text gets the same
# logits with and without them, so nothing shows but in pairs. Pass return_token_type_ids=True, or
# add "token_type_ids" to the tokenizer's model_input_names.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 4.57.6 5.23.0; do
  python3 -m venv "$work/$version"
done
"$work/4.57.6/bin/pip" install -q transformers==4.57.6
"$work/5.23.0/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
export HF_HUB_OFFLINE=1
4.57.6/bin/python - 2>old.txt <<'PY'
import json
from pathlib import Path
import transformers
from transformers import FunnelConfig, FunnelTokenizerFast

words = "<pad> <unk> <cls> <sep> <mask> <s> </s> who sees the cat a dog him in town".split()
Path("vocab.txt").write_text("\n".join(words) + "\n")
tokenizer = FunnelTokenizerFast("vocab.txt")
tokenizer.save_pretrained("model")
FunnelConfig(vocab_size=len(words), d_model=32, n_head=2, d_head=16, d_inner=64, block_sizes=[1, 1],
             num_decoder_layers=1, initializer_std=0.3).save_pretrained("model")
Path("wanted.json").write_text(json.dumps(dict(tokenizer("who sees the cat", "a dog sees him"))))
print(f"transformers {transformers.__version__} has saved the tokenizer")
PY
5.23.0/bin/python - 2>new.txt <<'PY'
import json, sys
from pathlib import Path
import torch, transformers
from transformers import AutoConfig, AutoTokenizer, FunnelForMaskedLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
wanted = json.loads(Path("wanted.json").read_text())
tokenizer = AutoTokenizer.from_pretrained("model")
model = FunnelForMaskedLM(AutoConfig.from_pretrained("model")).eval()
named = AutoTokenizer.from_pretrained("model")
named.model_input_names = [*named.model_input_names, "token_type_ids"]


def logits(**inputs):
    with torch.no_grad():
        return model(**{name: torch.tensor([row]) for name, row in inputs.items()}).logits


pair, one = ("who sees the cat", "a dog sees him"), ("who sees the cat in town",)
gap = {}
for name, texts in (("a pair", pair), ("one text", one)):
    told = logits(**tokenizer(*texts, return_token_type_ids=True))
    gap[name] = float((logits(**tokenizer(*texts)) - told).abs().max() / told.std())
plain = dict(tokenizer(*pair))
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print(f"expected: {sorted(wanted)}, token types {wanted['token_type_ids']}")
print(f"seen: {sorted(plain)}")
print(f"seen: largest difference of logits / their deviation: {gap}")
if sorted(wanted["token_type_ids"]) != [0] * 5 + [1] * 5 + [2]:
    sys.exit("changed: transformers 4")
if "token_type_ids" in plain or plain["input_ids"] != wanted["input_ids"]:
    sys.exit("changed: Funnel's tokenizer gives token types")
if gap["a pair"] < 0.02 or gap["one text"] > 1e-4:
    sys.exit("changed: what token types do")
if not wanted == dict(tokenizer(*pair, return_token_type_ids=True)) == dict(named(*pair)):
    sys.exit("changed: what helps")
PY
