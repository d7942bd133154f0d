#!/usr/bin/env bash
# Pairs of texts (inference, questions) for a DeBERTa, the first version: [CLS] A [SEP] B [SEP], as
# its authors and transformers 4 make them, and as the post-processor in tokenizer.json says. One
# expects AutoTokenizer to follow the file. transformers 5 builds its own: [CLS] A [SEP] [SEP] B
# [SEP], RoBERTa's form, and its token types are all 0. One text gives the right tokens, so nothing
# shows but in pairs: a model for inference reads what it never met in training. The classes of
# RoBERTa and BART agree with their files. Set backend_tokenizer.post_processor to that of the file
# (Tokenizer.from_file).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
python3 -m venv "$work/older"
"$work/older/bin/pip" install -q transformers==4.57.6
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
"$work/older/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import json
import transformers
from tokenizers import pre_tokenizers
from transformers import BartTokenizerFast, DebertaTokenizerFast, RobertaTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
for kind, special in ((DebertaTokenizerFast, ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]),
                      (RobertaTokenizerFast, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]),
                      (BartTokenizerFast, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])):
    with open("vocab.json", "w") as file:
        json.dump({token: i for i, token in enumerate([*special, *letters])}, file)
    open("merges.txt", "w").write("#version: 0.2\n")
    kind("vocab.json", "merges.txt").save_pretrained(kind.__name__.removesuffix("Fast"))
print(f"files by transformers {transformers.__version__}")
PY
"$work/venv/bin/python" - <<'PY'
import sys
import tokenizers, transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer

print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
print("expected: tokens and types of a pair as tokenizer.json has them")
seen = {}
for name in ("DebertaTokenizer", "RobertaTokenizer", "BartTokenizer"):
    library = Tokenizer.from_file(f"{name}/tokenizer.json").encode("a", "b")
    opened = AutoTokenizer.from_pretrained(name).backend_tokenizer.encode("a", "b")
    alone = [x.encode("a").tokens for x in (Tokenizer.from_file(f"{name}/tokenizer.json"),
                                            AutoTokenizer.from_pretrained(name).backend_tokenizer)]
    seen[name] = (library.tokens, library.type_ids), (opened.tokens, opened.type_ids)
    print(f"seen: {name}: {' '.join(library.tokens)} {library.type_ids} by the file,"
          f" {' '.join(opened.tokens)} {opened.type_ids} by AutoTokenizer; "
          f"one text the same: {alone[0] == alone[1]}")
    if alone[0] != alone[1]:
        sys.exit(f"changed: one text of {name}")
deberta, *others = seen.values()
if deberta != ((["[CLS]", "a", "[SEP]", "b", "[SEP]"], [0, 0, 0, 1, 1]),
               (["[CLS]", "a", "[SEP]", "[SEP]", "b", "[SEP]"], [0] * 6)):
    sys.exit("changed: DeBERTa's pairs")
if any(file != opened for file, opened in others):
    sys.exit("changed: pairs of RoBERTa or BART")
mended = AutoTokenizer.from_pretrained("DebertaTokenizer")
mended.backend_tokenizer.post_processor = Tokenizer.from_file(
    "DebertaTokenizer/tokenizer.json").post_processor
tokens = mended.convert_ids_to_tokens(mended("a", "b").input_ids)
print(f"seen: with the post-processor of the file: {' '.join(tokens)}")
if tokens != deberta[0][0]:
    sys.exit("changed: what helps")
PY
