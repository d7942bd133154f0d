#!/usr/bin/env bash
# RemBERT with the file sentencepiece.model alone as a tokenizer, as the class RemBertTokenizer of
# transformers 4 saves it. One expects [CLS] text [SEP], as that class makes it. transformers 5
# opens the folder without a word and adds neither, since its class makes no post-processor of its
# own. The model reads texts without the two tokens that it met around every text in training, a
# classifier looks at the first word in place of [CLS], and two texts have nothing between them.
# What the vocabulary lacks becomes token 2, whatever that is; here it is [CLS]. Open the folder
# once with RemBertTokenizerFast of transformers 4, save it, and open that with
# PreTrainedTokenizerFast; AutoTokenizer gives the ends there, and token 2 as before.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 4.57.6 5.23.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install -q "transformers==$version" sentencepiece==0.2.3 protobuf==7.36.2
done
cd "$work"
export HF_HUB_OFFLINE=1
cat >both.py <<'PY'
import transformers

transformers.logging.set_verbosity_error()
TEXTS = {"one text": ("the Dog sees Zoë",), "two texts": ("the dog", "sees a cat")}


def tokens(tokenizer):
    return {name: tokenizer.convert_ids_to_tokens(tokenizer(*text)["input_ids"])
            for name, text in TEXTS.items()}
PY
4.57.6/bin/python - 2>old.txt <<'PY'
import json
import sentencepiece
from both import tokens, transformers
from transformers import RemBertConfig, RemBertTokenizer, RemBertTokenizerFast

sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the dog sees a cat", "The Cat sees a Dog"] * 99),
    model_prefix="sentencepiece", vocab_size=40, hard_vocab_limit=False, minloglevel=2, pad_id=0,
    pad_piece="[PAD]", unk_id=1, unk_piece="[UNK]", bos_id=-1, eos_id=-1,
    control_symbols="[CLS],[SEP],[MASK]")
roles = dict(pad_token="[PAD]", unk_token="[UNK]")
made = RemBertTokenizer("sentencepiece.model", **roles)
made.save_pretrained("model")
RemBertConfig().save_pretrained("model")
RemBertTokenizerFast.from_pretrained("model").save_pretrained("fast")
RemBertConfig().save_pretrained("fast")
with open("wanted.json", "w") as out:
    json.dump(tokens(made), out)
print(f"transformers {transformers.__version__} has saved the tokenizer")
PY
5.23.0/bin/python - 2>new.txt <<'PY'
import json, sys
from importlib.metadata import version
from pathlib import Path
from both import tokens, transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

wanted, folder = json.loads(Path("wanted.json").read_text()), Path("model")
assert (folder / "sentencepiece.model").exists() and not (folder / "tokenizer.json").exists()
auto = AutoTokenizer.from_pretrained("model")
seen, auto_fast = tokens(auto), tokens(AutoTokenizer.from_pretrained("fast"))
fast = tokens(PreTrainedTokenizerFast.from_pretrained("fast"))
print(f"transformers {transformers.__version__}, sentencepiece {version('sentencepiece')}; "
      f"{type(auto).__name__}")
for name in wanted:
    print(f"{name}, expected: {' '.join(wanted[name])}")
    print(f"{name}, seen:     {' '.join(seen[name])}")
    print(f"{name}, by AutoTokenizer with tokenizer.json: {' '.join(auto_fast[name])}")
if wanted["one text"][0] != "[CLS]" or wanted["two texts"].count("[SEP]") != 2:
    sys.exit("changed: transformers 4")
if seen["two texts"] != [token for token in wanted["two texts"] if token[0] != "["]:
    sys.exit("changed: RemBERT's texts have their ends")
if "[CLS]" not in seen["one text"][1:] or seen["one text"][-1] == "[SEP]":
    sys.exit("changed: what becomes of unknown characters")
if fast != wanted:
    sys.exit("changed: what helps")
if auto_fast["one text"][0] != "[CLS]" or auto_fast["one text"][1:-1] != seen["one text"]:
    sys.exit("changed: AutoTokenizer with tokenizer.json")
PY
