#!/usr/bin/env bash
# A PhoBERT's or BERTweet's tokenizer and a text of several lines. White space is white space, one
# expects, so that a line end reads as a space. Both classes look for words by a pattern that takes
# a line feed along with the word before it. So the last word of every line ends in a character that
# no merge knows: it falls into other pieces, with an unknown token for the line feed itself. Texts
# that are wrapped at some width lose a word in every line that way. There is no error and no
# warning. Put a space in place of each line end.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
from pathlib import Path
import transformers
from transformers import BertweetTokenizer, PhobertTokenizer

print(f"transformers {transformers.__version__}")
print("expected: 'cat\\ndog' gives the pieces of 'cat dog'")
Path("bpe.codes").write_text("c a 9\nca t</w> 8\nd o 7\ndo g</w> 6\n")
words = ("cat", "dog", "ca@@", "do@@", "c@@", "a@@", "t", "d@@", "o@@", "g", "t@@", "g@@")
Path("vocab.txt").write_text("".join(f"{word} 1\n" for word in words))
for kind in (PhobertTokenizer, BertweetTokenizer):
    tokenizer = kind("vocab.txt", "bpe.codes")
    plain, wrapped = (tokenizer.tokenize(text) for text in ("cat dog", "cat\ndog"))
    ids = tokenizer("cat\ndog")["input_ids"]
    print(f"seen: {kind.__name__}: 'cat dog' {plain}, 'cat\\ndog' {wrapped}")
    if plain != ["cat", "dog"] or wrapped == plain or tokenizer.unk_token_id not in ids:
        sys.exit(f"changed: {kind.__name__}")
PY
