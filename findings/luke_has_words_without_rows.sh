#!/usr/bin/env bash
# LUKE's word tokenizer. Entities have a vocabulary of their own, with [UNK], [PAD], [MASK] and
# [MASK2], so one expects len(tokenizer) to be the number of word rows in the model, as it was in
# transformers 4. In transformers 5 these four are also added to the words, after the last row,
# and found in texts. A text that mentions [MASK], or a masked-LM collator, which draws its random
# words below len(tokenizer), yields ids that the embedding does not have: an IndexError at some
# batch, far from the cause. A student sized by len(tokenizer) gets four rows that its teacher does
# not have. For texts without entities, build RobertaTokenizer from the same vocab.json and
# merges.txt.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/4"
python3 -m venv "$work/5"
"$work/4/bin/pip" install -q transformers==4.57.6
"$work/5/bin/pip" install -q torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3
cd "$work"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$work/5/bin/python" - <<'PY'
import json, os
from tokenizers import pre_tokenizers

os.mkdir("luke")
words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()),
         "<mask>", "<ent>", "<ent2>"]
entities = ["[PAD]", "[UNK]", "[MASK]", "[MASK2]", "Paris"]
for name, entries in (("vocab", words), ("entity_vocab", entities)):
    with open(f"luke/{name}.json", "w") as file:
        json.dump({entry: i for i, entry in enumerate(entries)}, file)
with open("luke/merges.txt", "w") as file:
    file.write("#version: 0.2\n")
PY
"$work/4/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import json, transformers
from transformers import LukeTokenizer

tokenizer = LukeTokenizer.from_pretrained("luke")
tokenizer.save_pretrained("saved")
with open("old.json", "w") as file:
    json.dump([transformers.__version__, len(tokenizer), tokenizer("a [MASK] b").input_ids], file)
PY
"$work/5/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import json, sys
import torch, transformers
from transformers import (DataCollatorForLanguageModeling, LukeConfig, LukeModel, LukeTokenizer,
                          RobertaTokenizer)

with open("old.json") as file:
    version, length, ids = json.load(file)
torch.manual_seed(0)
model = LukeModel(LukeConfig(vocab_size=length, hidden_size=32, num_hidden_layers=1,
                             num_attention_heads=2, intermediate_size=64, entity_vocab_size=5,
                             entity_emb_size=8))
print(f"torch {torch.__version__}, transformers {transformers.__version__} beside {version}")
print(f"expected: len {length}, and '[MASK]' in a text in pieces, as in transformers {version}")
for folder in ("luke", "saved"):
    tokenizer = LukeTokenizer.from_pretrained(folder)
    now = tokenizer("a [MASK] b").input_ids
    print(f"seen: {folder}: len {len(tokenizer)}, 'a [MASK] b' is {now}, was {ids}")
    if len(tokenizer) != length + 4 or max(now) < length:
        sys.exit("changed: entity tokens among the words")
try:
    model(torch.tensor([now]))
    said = "no error"
except IndexError as error:
    said = f"IndexError, {error}"
print(f"seen: the model of {length} rows on it: {said}")
collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, mask_replace_prob=0.0,
                                          random_replace_prob=1.0)
read = tokenizer("plain words " * 20, return_special_tokens_mask=True)
masked = collate([read] * 64)["input_ids"]
without = int((masked >= length).sum())
print(f"seen: words that the collator drew: {without} without a row")
with open("luke/vocab.json") as words, open("luke/merges.txt") as merges:
    pairs = [tuple(line.split()) for line in list(merges)[1:]]
    plain = RobertaTokenizer(vocab=json.load(words), merges=pairs)
helped = plain("a [MASK] b").input_ids
print(f"seen: RobertaTokenizer of the same files: len {len(plain)}, {helped}")
if "IndexError" not in said or not without:
    sys.exit("changed: what follows")
if len(plain) != length or helped != ids:
    sys.exit("changed: what helps")
PY
