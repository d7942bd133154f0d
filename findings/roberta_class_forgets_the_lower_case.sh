#!/usr/bin/env bash
# A RoBERTa of lower case: a byte-level BPE of one's own, with a normalizer that lowers letters,
# given to RobertaTokenizerFast as tokenizer_object. In memory it works, and save_pretrained writes
# the normalizer into tokenizer.json. One expects the same tokens after opening, as the file says.
# The class of transformers 5 takes the words and the merges from the file and makes the rest anew,
# without a normalizer. Words with a capital fall into pieces that the model never met there in
# training, and nothing says so. The classes of Longformer and DeBERTa (the first version) do the
# same. PreTrainedTokenizerFast, also as tokenizer_class in tokenizer_config.json, obeys the file.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import json, sys
from pathlib import Path
import tokenizers, transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (AutoTokenizer, DebertaTokenizerFast, LongformerTokenizerFast,
                          PreTrainedTokenizerFast, RobertaTokenizerFast)

transformers.logging.set_verbosity_error()
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TEXT = "The cat sees Paris"
ROLES = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), SPECIAL))
alphabet = pre_tokenizers.ByteLevel.alphabet()
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
bpe.normalizer = normalizers.Lowercase()
bpe.train_from_iterator(["the cat sees a dog in paris"] * 9, trainers.BpeTrainer(
    vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
bpe.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))


def saved(cls, name):
    """Its tokens in memory, after opening by AutoTokenizer, and by the general class."""
    tokenizer = cls(tokenizer_object=bpe, add_prefix_space=True, **ROLES)
    tokenizer.save_pretrained(name)
    return [opened(TEXT).tokens()[1:-1] for opened in (
        tokenizer, AutoTokenizer.from_pretrained(name),
        PreTrainedTokenizerFast.from_pretrained(name))]


print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
print(f"expected: after opening the tokens of before, {bpe.encode(TEXT).tokens[1:-1]}")
for name, cls in (("RoBERTa", RobertaTokenizerFast), ("Longformer", LongformerTokenizerFast),
                  ("DeBERTa", DebertaTokenizerFast)):
    before, after, general = saved(cls, name)
    print(f"seen: {name}: {after}")
    if not before == general == bpe.encode(TEXT).tokens[1:-1]:
        sys.exit("changed: in memory, or by PreTrainedTokenizerFast")
    written = Tokenizer.from_file(f"{name}/tokenizer.json")
    if written.encode(TEXT).tokens[1:-1] != before:
        sys.exit("changed: what the file says")
    if after[:3] != ["Ġ", "T", "he"] or "Ġparis" in after:
        sys.exit(f"changed: {name}'s class lowers letters")
path = Path("RoBERTa/tokenizer_config.json")
path.write_text(json.dumps(json.loads(path.read_text())
                           | {"tokenizer_class": "PreTrainedTokenizerFast"}))
if AutoTokenizer.from_pretrained("RoBERTa").tokenize(TEXT) != bpe.encode(TEXT).tokens[1:-1]:
    sys.exit("changed: the general class in tokenizer_config.json")
PY
