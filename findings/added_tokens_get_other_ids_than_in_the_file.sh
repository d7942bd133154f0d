#!/usr/bin/env bash
# A tokenizer.json whose added token has an id that does not follow the vocabulary directly, as where
# rows of padding lie between. One expects Tokenizer.from_file, and AutoTokenizer, to give the token
# the id that the file states. tokenizers numbers added tokens from the end of the vocabulary on and
# passes over the stated id. There is no error and no warning: the model reads another row, often one
# that was never trained. Compare the ids in the file with token_to_id after opening, and fill the
# gap with words without a use.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q tokenizers==0.23.3 transformers==5.24.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import json, sys
import tokenizers, transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

words = {word: number for number, word in enumerate(["[UNK]", "a", "b", "c"])}
made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
made.add_tokens([AddedToken("[NUM]", normalized=False)])
values = json.loads(made.to_str())
(token,) = values["added_tokens"]
token["id"] = 9
with open("tokenizer.json", "w") as file:
    json.dump(values, file)
with open("tokenizer_config.json", "w") as file:
    json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}, file)
seen = {
    "Tokenizer.from_file": Tokenizer.from_file("tokenizer.json").token_to_id("[NUM]"),
    "AutoTokenizer": AutoTokenizer.from_pretrained(".").convert_tokens_to_ids("[NUM]"),
}
print(f"tokenizers {tokenizers.__version__}, transformers {transformers.__version__}; expected: 9")
for name, number in seen.items():
    print(f"seen: {name}: {number}")
if set(seen.values()) != {len(words)}:
    sys.exit("the behaviour has changed")
PY
