#!/usr/bin/env bash
# One call of a tokenizer with truncation=True and padding="max_length", and then save_pretrained.
# One expects arguments of a call to end with it. They stay in the tokenizer and are written into
# tokenizer.json. AutoTokenizer sets them back at its next call, so nothing shows. The tokenizers
# library obeys the file: Tokenizer.from_file cuts each text to that length and fills short ones
# up. A corpus made with it for speed holds the first few tokens of each document. Call
# no_truncation() and no_padding() after from_file, or on backend_tokenizer before saving.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys
import tokenizers, transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertTokenizer

words = "[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e f g h i j k".split()
text = "a b c d e f g h i j k"
tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
tokenizer.save_pretrained("before")
tokenizer(text, truncation=True, padding="max_length", max_length=6)
tokenizer.save_pretrained("after")


def lengths(tokenize):
    return [len(tokenize(x)) for x in (text, "a b")]


def file(folder):
    return Tokenizer.from_file(f"{folder}/tokenizer.json")


set_back = file("after")
set_back.no_truncation()
set_back.no_padding()
auto = AutoTokenizer.from_pretrained("after")
seen = {"saved before the call": lengths(lambda x: file("before").encode(x).ids),
        "saved after the call": lengths(lambda x: file("after").encode(x).ids),
        "the same, AutoTokenizer": lengths(lambda x: auto(x)["input_ids"]),
        "the same, set back": lengths(lambda x: set_back.encode(x).ids)}
print(f"tokenizers {tokenizers.__version__}, transformers {transformers.__version__}")
print("expected: texts of 11 and 2 words give 13 and 4 tokens from each saved tokenizer")
for name, counts in seen.items():
    print(f"seen: {name:23s} {counts[0]:2d} and {counts[1]} tokens")
if seen.pop("saved after the call") != [6, 6]:
    sys.exit("changed: the arguments of a call are not saved")
if any(counts != [13, 4] for counts in seen.values()):
    sys.exit("changed: another way to open the tokenizer cuts or fills up texts")
PY
