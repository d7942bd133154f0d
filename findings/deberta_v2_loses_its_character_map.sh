#!/usr/bin/env bash
# DeBERTa-v2 and v3 with the file spm.model alone as a tokenizer, as they were published. The file
# holds sentencepiece's map of characters (NFKC, unless one asks for another), which makes a
# ligature or a full-width letter a plain one. One expects AutoTokenizer to follow it, since the
# model was trained with it. transformers 5 builds a tokenizer with NFC in its place: such
# characters stay as they are, and a word falls into letters and unknown tokens. Scanned or East
# Asian text gets other ids than the teacher was trained on, and nothing says so. Normalize texts
# with NFKC before.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 sentencepiece==0.2.3 protobuf==7.36.2
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import random, sys, unicodedata
from pathlib import Path

import sentencepiece, transformers
from transformers import AutoTokenizer, DebertaV2Config

transformers.logging.set_verbosity_error()
random.seed(0)
words = "office full width model paper ten cat number word list fine flow".split()
Path("t").mkdir()
Path("text").write_text("\n".join(" ".join(random.choices(words, k=8)) for _ in range(500)))
sentencepiece.SentencePieceTrainer.train(
    input="text", model_prefix="t/spm", vocab_size=36, minloglevel=2, pad_id=0, bos_id=1, eos_id=2,
    unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]",
    user_defined_symbols=["[MASK]"])
DebertaV2Config(vocab_size=36).save_pretrained("t")
tokenizer = AutoTokenizer.from_pretrained("t")
file = sentencepiece.SentencePieceProcessor(model_file="t/spm.model")
plain, odd = "office full", "o\uFB03ce \uFF46\uFF55\uFF4C\uFF4C"


def ids(text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


print(f"transformers {transformers.__version__}, sentencepiece {sentencepiece.__version__}")
print("expected: the ids of spm.model, for a ligature and full-width letters as well")
for text in (plain, odd, unicodedata.normalize("NFKC", odd)):
    print(f"seen: {text}: file {file.encode(text)}, tokenizer {ids(text)}, "
          f"{ids(text).count(tokenizer.unk_token_id)} unknown")
if not ids(plain) == file.encode(plain) == file.encode(odd):
    sys.exit("changed: tokenizer and file differ for plain text, or the file has no map")
if tokenizer.unk_token_id not in ids(odd) or len(ids(odd)) <= len(file.encode(odd)):
    sys.exit("changed: the tokenizer follows the file's map of characters")
if ids(unicodedata.normalize("NFKC", odd)) != file.encode(odd):
    sys.exit("changed: what helps")
PY
