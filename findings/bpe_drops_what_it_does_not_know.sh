#!/usr/bin/env bash
# A BPE that is trained with the tokenizers library, with "[UNK]" among the special tokens of its
# trainer and unk_token="[UNK]" of the transformers tokenizer around it. One expects characters that
# are not in the vocabulary to become [UNK], as with WordPiece, or an error, as WordPiece and
# WordLevel raise without an unknown token. Only BPE(unk_token="[UNK]"), the model itself, decides.
# Without it such characters are left out: "Zell" becomes "e", "ll", and a word of another script
# nothing at all. A count of unknown tokens says 0, as if the vocabulary covered the text, and a
# corpus of masked words lacks what the text says. Set unk_token in the model, or use a byte-level
# BPE; compare the offsets with the text.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import tokenizers, transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

roles = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
names = dict(zip(("unk_token", "pad_token", "cls_token", "sep_token", "mask_token"), roles))
corpus = ["the cell divides", "a protein binds the cell"] * 20
text = "the Zell клетка divides"
kinds = {"WordPiece": (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer),
         "BPE(unk_token)": (models.BPE(unk_token="[UNK]"), trainers.BpeTrainer),
         "BPE()": (models.BPE(), trainers.BpeTrainer)}
print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
print(f"expected: in {text!r} unknown characters, or their words, are [UNK]")
seen = {}
for kind, (model, trainer) in kinds.items():
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(corpus, trainer(vocab_size=80, special_tokens=roles,
                                                show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    ids = tokenizer(text).input_ids
    seen[kind] = ids.count(tokenizer.unk_token_id), tokenizer.convert_ids_to_tokens(ids)
    print(f"seen: {kind}: {seen[kind][0]} unknown, {' '.join(seen[kind][1])}")
if not (seen["WordPiece"][0] and seen["BPE(unk_token)"][0]):
    sys.exit("changed: a model that has an unknown token")
if seen["BPE()"] != (0, ["the", "e", "ll", "divides"]):
    sys.exit("changed: BPE without an unknown token keeps what it does not know")
PY
