#!/usr/bin/env bash
# DataCollatorForLanguageModeling(whole_word_mask=True). One expects each word to be masked on its
# own, with all of its tokens. The collator takes for a word
# what stands between two gaps of the tokens' offsets. Where a tokenizer counts the space before a
# word to the word (DeBERTa-v2 and v3), or a text has no spaces (Chinese), there is no gap: the
# whole sequence is one word. Then 85 % of the sequences have no masked token at all, and 15 % have
# nothing but masked ones, while the share of masked tokens is the wanted 15 %, so no average shows
# it. English BERT and XLM-R are masked as expected. Take words from word_ids() or from the marks in
# the vocabulary ("##", "▁") instead.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers import (BertTokenizer, DataCollatorForLanguageModeling, DebertaV2Tokenizer,
                          XLMRobertaTokenizer)

transformers.logging.set_verbosity_error()
words = "one two three four five six seven eight".split()
letters = "今 天 天 气 很 好 我 们".split()
marked = [(f"▁{word}", -1.0) for word in words]
bert = BertTokenizer(vocab={t: i for i, t in enumerate(dict.fromkeys(
    ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters]))})
xlmr = XLMRobertaTokenizer(vocab=[("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0),
                                  *marked, ("▁", -3.0), ("<mask>", 0.0)])
deberta = DebertaV2Tokenizer(vocab=[("[PAD]", 0.0), ("[UNK]", 0.0), ("[CLS]", 0.0),
                                    ("[SEP]", 0.0), *marked, ("▁", -3.0), ("[MASK]", 0.0)])


def masked(tokenizer, text):
    """Shares of sequences without a masked token and with all of them masked, and of tokens."""
    row = dict(tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True))
    assert len(row["input_ids"]) == 10 and tokenizer.unk_token_id not in row["input_ids"]
    collate = DataCollatorForLanguageModeling(tokenizer, whole_word_mask=True,
                                              mlm_probability=0.15, seed=0)
    chosen = (collate([dict(row) for _ in range(4000)])["labels"] != -100)[:, 1:-1].float()
    counts = chosen.sum(1)
    return tuple(round(float(x), 2) for x in
                 ((counts == 0).float().mean(), (counts == 8).float().mean(), chosen.mean()))


found = {
    "BERT, English": masked(bert, " ".join(words)),
    "XLM-R, English": masked(xlmr, " ".join(words)),
    "DeBERTa-v2, English": masked(deberta, " ".join(words)),
    "BERT, Chinese": masked(bert, "".join(letters)),
}
print(f"transformers {transformers.__version__}, torch {torch.__version__}; eight words a sequence")
print("expected: 27% of sequences without a mask, 0% with masks alone, 15% of the tokens masked")
for name, (none, all_, share) in found.items():
    print(f"seen: {name}: {none:.0%} of sequences without a mask, {all_:.0%} with masks alone, "
          f"{share:.0%} of the tokens masked")
split = [deberta(" ".join(words)).word_ids()[1:-1], bert("".join(letters)).word_ids()[1:-1]]
print("seen: word_ids() of DeBERTa-v2 and of the Chinese:", *split)
usual, whole = (0.27, 0.0, 0.15), (0.85, 0.15, 0.15)
expected = dict(zip(found, (usual, usual, whole, whole), strict=True))
for name, shares in found.items():
    if any(abs(a - b) > 0.02 for a, b in zip(shares, expected[name], strict=True)):
        sys.exit(f"changed: {name}")
if any(ids != list(range(8)) for ids in split):
    sys.exit("changed: word_ids()")
PY
