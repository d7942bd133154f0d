#!/usr/bin/env bash
# Two texts that are too long together, cut with truncation=True (longest_first). The tokenizers of
# transformers that are written in Python and those in Rust have one interface and one description
# of this rule, so with one vocabulary one expects the same ids. Where an odd number of places is
# left and both texts are cut, the Python kind gives the last place to the first text and the Rust
# kind to the second. A model that was fine-tuned with the one and is served with the other, as
# where a tokenizer is converted, reads other pairs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
from pathlib import Path
import tokenizers, transformers
from transformers import BertJapaneseTokenizer, BertTokenizer

transformers.logging.set_verbosity_error()
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
Path("vocab.txt").write_text("\n".join(words))
kinds = {"Python": BertJapaneseTokenizer("vocab.txt"),  # cuts words at spaces, if not told more
         "Rust": BertTokenizer(vocab={word: i for i, word in enumerate(words)})}
print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
print("expected: both kinds keep as many tokens of each text")
for first, second, longest, wanted in (
        (6, 6, 10, {"Python": (4, 3), "Rust": (3, 4)}),
        (6, 6, 11, {"Python": (4, 4), "Rust": (4, 4)}),
        (2, 8, 6, {"Python": (2, 1), "Rust": (1, 2)}),
        (2, 8, 9, {"Python": (2, 4), "Rust": (2, 4)})):
    found = {}
    for kind, tokenizer in kinds.items():
        made = tokenizer(" ".join("a" * first), " ".join("b" * second), truncation=True,
                         max_length=longest)
        kept = tokenizer.convert_ids_to_tokens(made["input_ids"])
        found[kind] = (kept.count("a"), kept.count("b"))
    print(f"seen: {first} and {second} tokens in {longest} places, 3 of them special: {found}")
    if found != wanted:
        sys.exit("changed")
PY
