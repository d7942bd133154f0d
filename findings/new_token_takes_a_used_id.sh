#!/usr/bin/env bash
# New tokens for a tokenizer whose ids have a gap. A vocab.txt in which a word stands twice makes
# one: the word keeps the later line, and no token has the earlier id. Vocabularies that were cut
# down and kept their ids have gaps, too. One expects add_tokens to give an id that is free. It
# gives the number of tokens, which is below the largest id, so the new token shares an id with an
# old one, the last of the list. Nothing warns. Both words are one word to teacher and student,
# decode and fill-mask say the new one for the old one, and len(tokenizer) is too small for
# resize_token_embeddings as well. Compare the number of tokens with the largest id before adding,
# and fill each gap with a token of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys
import tokenizers, torch, transformers
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, BertConfig

transformers.logging.set_verbosity_error()
roles = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
      f"tokenizers {tokenizers.__version__}")
print("expected: a new token has an id that no other token has")
seen = {}
for name, words in {"each word once": ["the", "cell", "of", "a", "protein"],
                    "one word twice": ["the", "cell", "the", "of", "a", "protein"]}.items():
    BertConfig(vocab_size=len(roles + words)).save_pretrained(name)
    with open(f"{name}/vocab.txt", "w") as file:
        file.writelines(f"{word}\n" for word in roles + words)
    AutoTokenizer.from_pretrained(name).save_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    added = tokenizer.add_tokens(["brca1"])
    ids = tokenizer.convert_tokens_to_ids(["protein", "brca1"])
    back = tokenizer.decode(tokenizer("protein", add_special_tokens=False).input_ids)
    seen[name] = added, ids[0] == ids[1], back
    print(f"seen: {name}: {added} token added; ids of protein and brca1 {ids}; len(tokenizer) "
          f"{len(tokenizer)}; protein is decoded as {back}")
gap = {"[UNK]": 0, "a": 2, "b": 3}
for kind, model in {"WordLevel": models.WordLevel(gap, unk_token="[UNK]"),
                    "BPE": models.BPE(gap, [])}.items():
    plain = Tokenizer(model)
    plain.add_special_tokens(["[NUM]"])
    seen[kind] = plain.token_to_id("[NUM]")
    print(f"seen: tokenizers, {kind} with the ids 0, 2, 3: [NUM] has the id {seen[kind]}")
if seen["each word once"] != (1, False, "protein"):
    sys.exit("changed: without a gap")
if seen["one word twice"] != (1, True, "brca1") or (seen["WordLevel"], seen["BPE"]) != (3, 3):
    sys.exit("changed: with a gap a new token has an id of its own")
PY
