#!/usr/bin/env bash
# Tagging words (entities, parts of speech) with a byte-level BPE, as in RoBERTa and ModernBERT:
# tokenizer(words, is_split_into_words=True). One expects the tokens of the same words in a
# sentence, or an error. In these vocabularies the space belongs to the word, and each word of a
# list is cut on its own, so all words are cut as if they stood in the middle of a word: tokens
# that the model met there alone. transformers 4 refused that for RoBERTa; transformers 5 does
# not. The known remedy, add_prefix_space=True, works for the class RobertaTokenizer. A tokenizer
# of the general class PreTrainedTokenizerFast, ModernBERT's, takes it, says True when asked, and
# goes on as before. A teacher or student for tags is trained and measured on odd tokens, and is
# only a bit worse. Look at the tokens; set backend_tokenizer.pre_tokenizer to
# ByteLevel(add_prefix_space=True), or give the sentence and find the words with offsets.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cd "$work"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import json
import sys
import transformers
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


print(f"transformers {transformers.__version__}")
print(f"expected: {marked} with add_prefix_space=True; without it, an error or Ġcat and Ġsat")
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
if seen != [bare, marked, bare, bare, marked] or says is not True:
    sys.exit("changed")
PY
