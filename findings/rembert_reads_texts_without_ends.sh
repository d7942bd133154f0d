#!/usr/bin/env bash
# RemBERT with the file sentencepiece.model alone as a tokenizer, as the class RemBertTokenizer of
# transformers 4 saves it. One expects [CLS] text [SEP], as that class makes it. transformers 5
# opens the folder without a word and adds neither, since its class makes no post-processor of its
# own. The model reads texts without the two tokens that it met around every text in training, a
# classifier looks at the first word in place of [CLS], and two texts have nothing between them.
# Open the folder once with RemBertTokenizerFast of transformers 4, and save it: with that copy
# AutoTokenizer of transformers 5 gives the ends.
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
TEXTS = {"one text": ("the Dog sees",), "two texts": ("the dog", "sees a cat")}


def tokens(tokenizer):
    return {name: tokenizer.convert_ids_to_tokens(tokenizer(*text)["input_ids"])
            for name, text in TEXTS.items()}
PY
4.57.6/bin/python - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
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
5.23.0/bin/python - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import json, sys
from importlib.metadata import version
from pathlib import Path
from both import tokens, transformers
from transformers import AutoTokenizer

wanted, folder = json.loads(Path("wanted.json").read_text()), Path("model")
assert (folder / "sentencepiece.model").exists() and not (folder / "tokenizer.json").exists()
auto = AutoTokenizer.from_pretrained("model")
seen, fast = tokens(auto), tokens(AutoTokenizer.from_pretrained("fast"))
print(f"transformers {transformers.__version__}, sentencepiece {version('sentencepiece')}; "
      f"{type(auto).__name__}")
for name in wanted:
    print(f"expected: {name}: {' '.join(wanted[name])}")
    print(f"seen: {name}: {' '.join(seen[name])}; from the copy: {' '.join(fast[name])}")
if wanted["one text"][0] != "[CLS]" or wanted["two texts"].count("[SEP]") != 2:
    sys.exit("changed: transformers 4")
if seen != {name: [token for token in row if token[0] != "["] for name, row in wanted.items()}:
    sys.exit("changed: RemBERT's texts have their ends")
if fast != wanted:
    sys.exit("changed: what helps")
PY
