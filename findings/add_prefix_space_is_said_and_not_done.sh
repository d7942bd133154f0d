#!/usr/bin/env bash
# Tagging words with a byte-level BPE, where the space belongs to the word:
# tokenizer(words, is_split_into_words=True). Each word is cut on its own, so one asks for
# AutoTokenizer.from_pretrained(folder, add_prefix_space=True), and expects each word to get its
# space. RobertaTokenizer does that. A tokenizer of the general class PreTrainedTokenizerFast takes
# the argument, says True when asked for add_prefix_space, and cuts the words as before, without
# their spaces: other tokens than in a sentence. Nothing is said. Look at the tokens, and set
# backend_tokenizer.pre_tokenizer to ByteLevel(add_prefix_space=True).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cd "$work"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import json, sys
import tokenizers, transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, RobertaTokenizerFast

special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
trained = ByteLevelBPETokenizer()
trained.train_from_iterator(["so the cat sat on the mat of the town"] * 50, vocab_size=400,
                            special_tokens=special, show_progress=False)
model = json.loads(trained.to_str())["model"]
PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained.to_str()), unk_token="<unk>",
                        pad_token="<pad>", mask_token="<mask>").save_pretrained("general")
RobertaTokenizerFast(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]
                     ).save_pretrained("roberta")
words = ["the", "cat", "sat"]
marked = ["Ġthe", "Ġcat", "Ġsat"]
bare = ["t", "he", "cat", "sat"]


def cut(tokenizer):
    return tokenizer.convert_ids_to_tokens(
        tokenizer(words, is_split_into_words=True, add_special_tokens=False).input_ids)


print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
print(f"expected: {marked} with add_prefix_space=True")
seen = []
for folder in ("roberta", "general"):
    for options in ({}, {"add_prefix_space": True}):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        seen.append(cut(tokenizer))
        says = getattr(tokenizer, "add_prefix_space", None)
        print(f"seen: {folder}, {options or 'as saved'}: {seen[-1]}, add_prefix_space says {says}")
tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
seen.append(cut(tokenizer))
print(f"seen: general, with another pre_tokenizer: {seen[-1]}")
if seen[:2] != [bare, marked]:
    sys.exit("changed: RoBERTa's class")
if seen[2:4] != [bare, bare] or says is not True:
    sys.exit("changed: the general class")
if seen[4] != marked or tokenizer.tokenize("so " + " ".join(words))[-3:] != marked:
    sys.exit("changed: what helps, or the words in a sentence")
PY
