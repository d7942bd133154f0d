#!/usr/bin/env bash
# encode_special_tokens of the tokenizers library reads special tokens in a text as text. One sets it
# so that a text that speaks of "[MASK]" puts no mask into a corpus. It cuts a tokenizer's own special
# tokens such as [NUM] as well, which fine-tuning keeps whole; and where the model is a list of words
# or a Unigram model, "[MASK]" still becomes the mask's id, since it is among the words. Rename the
# tokens that have a role in a copy of the tokenizer instead.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q tokenizers==0.23.3
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import tokenizers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "[MASK]": 1, "[NUM]": 2, "[": 3, "num": 4,
                                        "NUM": 5, "]": 6, "MASK": 7, "a": 8}, unk_token="[UNK]"))
words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "[MASK]": 2}, unk_token="<unk>"))
for one, names in ((wordpiece, ["[MASK]", "[NUM]"]), (words, ["[MASK]"])):
    one.pre_tokenizer = (pre_tokenizers.BertPreTokenizer() if one is wordpiece
                         else pre_tokenizers.WhitespaceSplit())
    one.add_special_tokens([AddedToken(name, special=True) for name in names])
    one.encode_special_tokens = True
cut, kept = wordpiece.encode("a [NUM] [MASK]").ids, words.encode("a [MASK]").ids
print(f"tokenizers {tokenizers.__version__}")
print("expected: [NUM] is one token, as it was added; [MASK] is text in both")
print(f"seen: WordPiece reads 'a [NUM] [MASK]' as {cut} ([NUM] is 2), words 'a [MASK]' as {kept} "
      "([MASK] is 2)")
if not (2 not in cut and 1 not in cut):
    raise SystemExit("changed: special tokens are kept")
if not (kept == [1, 2]):
    raise SystemExit("changed: the mask is text")
PY
