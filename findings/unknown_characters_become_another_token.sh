#!/usr/bin/env bash
# A Unigram tokenizer that one has trained oneself, in the tokenizer class of its model, as the
# course of Hugging Face makes one for XLNet. It knows its unknown token; one expects the same ids
# after save_pretrained and AutoTokenizer. The classes of XLNet, ALBERT and XLM-R take the
# words from tokenizer.json and the place of the unknown token from their own code: 0, 1 and 3, as
# in the published vocabularies. Where "<unk>" has another place, unknown characters become
# <cls>, <sep> or <pad>. unk_token_id is still right, so a count of unknown tokens says 0, a model
# reads ends of texts in the midst of them, and code that looks for padding by its id hides a word.
# Give the tokens of a new vocabulary the published order, or wrap it in PreTrainedTokenizerFast.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cd "$work"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import sys
import tokenizers, transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

SPECIAL = ["<cls>", "<sep>", "<unk>", "<pad>", "<mask>", "<s>", "</s>"]
ROLES = {f"{role}_token": f"<{role}>" for role in ("cls", "sep", "unk", "pad", "mask")}
KINDS = ("PreTrainedTokenizerFast", "XLNetTokenizer", "AlbertTokenizer", "XLMRobertaTokenizer")
TEXT = "the ☃ fox"
made = Tokenizer(models.Unigram())
made.pre_tokenizer = pre_tokenizers.Metaspace()
made.train_from_iterator(
    ["the quick brown fox jumps over the lazy dog"] * 50,
    trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>",
                            show_progress=False))
made.post_processor = processors.TemplateProcessing(
    single="$A <sep> <cls>", special_tokens=[("<sep>", 1), ("<cls>", 0)])
print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
print(f"expected: {TEXT!r} has one unknown token, before and after a tokenizer is saved")
seen = {}
for kind in KINDS:
    wrapped = getattr(transformers, kind)(tokenizer_object=made, **ROLES)
    wrapped.save_pretrained(kind)
    opened = AutoTokenizer.from_pretrained(kind)
    tokens = [one.convert_ids_to_tokens(one.encode(TEXT, add_special_tokens=False))
              for one in (wrapped, opened)]
    odd = [b for a, b in zip(*tokens, strict=True) if a == "<unk>"]
    seen[kind] = tokens[0].count("<unk>"), odd, opened.unk_token_id
    print(f"seen: {kind:23s} {tokens[0].count('<unk>')} before; after saving it is {odd[0]}, "
          f"and unk_token_id is {opened.unk_token_id}")
if seen.pop("PreTrainedTokenizerFast") != (1, ["<unk>"], 2):
    sys.exit("changed: the general class loses its unknown token")
if [seen[kind] for kind in KINDS[1:]] != [(1, [token], 2)
                                          for token in ("<cls>", "<sep>", "<pad>")]:
    sys.exit("changed: the classes keep the unknown token, or take another")
PY
