#!/usr/bin/env bash
# mLUKE, which was trained with XLM-R's words: the pieces of sentencepiece.bpe.model moved on by
# one, with <s> 0, <pad> 1, </s> 2 and <unk> 3. One expects MLukeTokenizer of transformers 5 to give
# these ids, as that of transformers 4 does and as XLMRobertaTokenizer does in both. It gives the
# ids of the sentencepiece file itself: every word is read as the one before it, <s> is the row of
# <pad>, <unk> that of <s>, and <pad> that of the last word. All these ids have a row, so a teacher
# answers without an error, and nothing is reported; folders that transformers 4 saved are read so
# too. For texts without entities, open the same file with XLMRobertaTokenizer.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 4.57.6 5.24.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "transformers==$version" sentencepiece==0.2.1 \
      protobuf==7.36.2
done
cd "$work"
export HF_HUB_OFFLINE=1
"$work/4.57.6/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import json, os, shutil
import sentencepiece

for folder in ("mluke", "xlmr"):
    os.mkdir(folder)
with open("texts.txt", "w") as file:
    file.write("the cat sat on the mat\na dog ran, and ran.\nhello world of words\n" * 50)
sentencepiece.SentencePieceTrainer.train(
    input="texts.txt", model_prefix="mluke/sentencepiece.bpe", vocab_size=40, unk_id=0, bos_id=1,
    eos_id=2, model_type="unigram", hard_vocab_limit=False, minloglevel=2)
shutil.copy("mluke/sentencepiece.bpe.model", "xlmr")
with open("mluke/entity_vocab.json", "w") as file:
    json.dump({"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "[MASK2]": 3, "Paris": 4}, file)
PY
cat >read.py <<'PY'
import json, sys
import sentencepiece, transformers
from transformers import MLukeTokenizer, XLMRobertaTokenizer

text = "the cat sat"
names = ("<s>", "<pad>", "</s>", "<unk>")
new = transformers.__version__.startswith("5")
found = {}
for folder, kind in (("mluke", MLukeTokenizer), ("saved", MLukeTokenizer),
                     ("xlmr", XLMRobertaTokenizer)):
    tokenizer = kind.from_pretrained(folder)
    if folder == "mluke" and not new:
        tokenizer.save_pretrained("saved")
    found[folder] = [tokenizer(text).input_ids, tokenizer.convert_tokens_to_ids(list(names))]
if not new:
    with open("old.json", "w") as file:
        json.dump([transformers.__version__, found], file)
    sys.exit()
with open("old.json") as file:
    version, old = json.load(file)
pieces = sentencepiece.SentencePieceProcessor(model_file="mluke/sentencepiece.bpe.model")
raw = pieces.encode(text)
print(f"transformers {transformers.__version__} beside {version}")
print(f"expected: {text!r} is {old['mluke'][0]}, and {', '.join(names)} are {old['mluke'][1]}")
for folder, (ids, special) in found.items():
    print(f"seen: {folder}: {ids}, {special}")
print(f"seen: the sentencepiece file itself: {raw}")
if old["mluke"] != old["saved"] or old["mluke"] != old["xlmr"] or old["mluke"][1] != [0, 1, 2, 3]:
    sys.exit("changed: transformers 4")
if old["mluke"][0][1:-1] != [piece + 1 for piece in raw]:
    sys.exit("changed: the order of the pieces")
for folder in ("mluke", "saved"):
    ids, special = found[folder]
    if ids != [1, *raw, 2] or special != [1, pieces.get_piece_size(), 2, 0]:
        sys.exit(f"changed: {folder}")
if found["xlmr"] != old["xlmr"]:
    sys.exit("changed: what helps")
PY
"$work/4.57.6/bin/python" read.py 2>log.txt || { cat log.txt >&2; exit 1; }
"$work/5.24.0/bin/python" read.py 2>log.txt || { cat log.txt >&2; exit 1; }
