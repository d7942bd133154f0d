#!/usr/bin/env bash
# A folder with a model and no tokenizer, as a Trainer leaves one that was not given its tokenizer. One
# expects AutoTokenizer to refuse. It makes up a tokenizer that knows the special tokens alone: every
# word is unknown, and a corpus that is made with it holds nothing. Look for the files, or for words in
# its vocabulary, before you use a tokenizer.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch, transformers
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

transformers.logging.set_verbosity_error()
config = BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                    intermediate_size=64)
BertForMaskedLM(config).save_pretrained("checkpoint-500")
tokenizer = AutoTokenizer.from_pretrained("checkpoint-500")
tokens = tokenizer.tokenize("the quick brown fox")
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: an error, since the folder holds config.json and model.safetensors alone")
print(f"seen: a {type(tokenizer).__name__} of {len(tokenizer)} ids; four words become {tokens}")
if not (set(tokens) == {tokenizer.unk_token}):
    raise SystemExit("changed: words are known")
if not (set(tokenizer.get_vocab()) == set(tokenizer.all_special_tokens)):
    raise SystemExit("changed: other ids")
PY
