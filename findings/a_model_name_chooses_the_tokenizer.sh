#!/usr/bin/env bash
# A checkpoint of RoBERTa's layers with a WordPiece tokenizer.json, whose config.json says
# model_name: "camembertv2-base" or "modernbert". One expects AutoTokenizer to read tokenizer.json,
# and to go by the class in tokenizer_config.json, as it does where model_name is missing or is
# "camembertv2-large". transformers 5 has a list of names for which it takes the class of the model
# type, whatever the files say: RobertaTokenizer. It turns the WordPiece vocabulary into a BPE
# without merges. So words come as the few single letters that are in the vocabulary, the rest is
# dropped, and nothing is reported; len(tokenizer) and the special tokens are right. Open it with
# PreTrainedTokenizerFast, or take model_name out of the config.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3
cd "$work"
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import json, sys
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, RobertaConfig

words = "<s> <pad> </s> <unk> <mask> le chat ##s dort l d c ##e ##o ##r ##t ##h ##a".split()
made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", sep_token="</s>",
             pad_token="<pad>", cls_token="<s>", mask_token="<mask>")
text = "le chats dort"
LISTED = ("camembertv2-base", "modernbert")
wanted = made.encode(text).ids


def saved(model_name, declared):
    """A folder with this tokenizer, as a class of this name, and such a config."""
    folder = Path(f"{model_name}-{declared}")
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    more = {"model_name": model_name} if model_name else {}
    RobertaConfig(vocab_size=len(words), **more).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": declared}))
    return folder


print(f"transformers {transformers.__version__}")
print(f"expected: {text!r} is {wanted}, whatever the model's name")
seen = {}
for model_name in (None, "camembertv2-large", *LISTED):
    for declared in ("TokenizersBackend", "BertTokenizer"):
        folder = saved(model_name, declared)
        opened = AutoTokenizer.from_pretrained(folder)
        seen[model_name, declared] = opened(text).input_ids
        if len(opened) != len(words) or opened.all_special_ids != [0, 2, 3, 1, 4]:
            sys.exit("changed: the length, or the special tokens")
        print(f"seen: model_name {model_name}, class {declared}: {type(opened).__name__}, "
              f"{opened.tokenize(text)}, {opened(text).input_ids}, len {len(opened)}")
by_class = PreTrainedTokenizerFast.from_pretrained(folder)(text).input_ids
by_config = AutoTokenizer.from_pretrained(folder, config=RobertaConfig())(text).input_ids
print(f"seen: PreTrainedTokenizerFast {by_class}; AutoTokenizer with a config without the name "
      f"{by_config}")
for (model_name, declared), ids in seen.items():
    letters = [words.index(word) for word in ("<s>", *"lcd", "</s>")]
    if ids != (letters if model_name in LISTED else wanted):
        sys.exit(f"changed: {model_name}, {declared}")
if by_class != wanted or by_config != wanted:
    sys.exit("changed: what helps")
PY
