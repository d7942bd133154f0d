#!/usr/bin/env bash
# Added tokens of a tokenizer.json. A token with "special": true there is a special token to the
# tokenizers library. One expects it among all_special_tokens of the transformers tokenizer, which
# lists those that have a role in tokenizer_config.json alone. Code that spares all_special_ids from
# masking masks [NUM] and its like. Ask added_tokens_decoder[id].special.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import json
import tokenizers, transformers
from transformers import AutoTokenizer, BertTokenizer

words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "price", "is"]
BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained("t")
state = json.load(open("t/tokenizer.json"))
state["added_tokens"].append({"id": 8, "content": "[NUM]", "single_word": False, "lstrip": False,
                              "rstrip": False, "normalized": False, "special": True})
json.dump(state, open("t/tokenizer.json", "w"))
tokenizer = AutoTokenizer.from_pretrained("t")
ids = tokenizer("the price is [NUM]")["input_ids"]
print(f"tokenizers {tokenizers.__version__}, transformers {transformers.__version__}")
print("expected: id 8, special in the file, is in all_special_ids")
print(f"seen: ids {ids}, added_tokens_decoder[8].special "
      f"{tokenizer.added_tokens_decoder[8].special}, all_special_ids {tokenizer.all_special_ids}")
if not (8 in ids and tokenizer.added_tokens_decoder[8].special):
    raise SystemExit("changed: [NUM] is not special")
if not (8 not in tokenizer.all_special_ids):
    raise SystemExit("changed: [NUM] is listed")
PY
