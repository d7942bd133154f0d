#!/usr/bin/env bash
# DataCollatorForLanguageModeling. One expects the column special_tokens_mask to save work and to
# change nothing, since the collator makes that mask itself where the column is absent. The two
# differ for words that the tokenizer does not know: a tokenizer's mask marks the tokens that it
# added around the text, while the collator's own leaves out every special id, and [UNK] is one.
# So unknown words are masked and have to be predicted with the column, and never without it.
# Trainer drops the column before the collator sees it, so a bare loop and Trainer train the same
# data on different tasks. Set remove_unused_columns=False, or take [UNK] out of the labels
# yourself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers import (BertConfig, BertForMaskedLM, BertTokenizer,
                          DataCollatorForLanguageModeling, Trainer, TrainingArguments)

transformers.logging.set_verbosity_error()
words = "[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e".split()
tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
row = dict(tokenizer("a x b y c z d e a b", return_special_tokens_mask=True))
bare = {"input_ids": row["input_ids"]}
unknown = torch.tensor(row["input_ids"]) == tokenizer.unk_token_id
model = BertForMaskedLM(BertConfig(vocab_size=10, hidden_size=32, num_hidden_layers=1,
                                   num_attention_heads=2, intermediate_size=64))


def share(labels):
    chosen = (labels != -100).float().mean(0)
    return float(chosen[unknown].mean()), float(chosen[1:-1][~unknown[1:-1]].mean())


def by_trainer(drop):
    settings = TrainingArguments("out", per_device_train_batch_size=4000, use_cpu=True,
                                 report_to=[], remove_unused_columns=drop)
    trainer = Trainer(model=model, args=settings, train_dataset=[row] * 4000, data_collator=collate)
    return next(iter(trainer.get_train_dataloader()))["labels"]


torch.manual_seed(0)
seen = {"collator, with the column": share(collate([row] * 4000)["labels"]),
        "collator, without": share(collate([bare] * 4000)["labels"]),
        "Trainer, with the column": share(by_trainer(drop=True)),
        "the same, none removed": share(by_trainer(drop=False))}
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: 15 % of the words are chosen, unknown or not, with and without the column")
for name, (odd, known) in seen.items():
    print(f"seen: {name:25s} {odd:5.1%} of the unknown words, {known:.1%} of the others")
right = (0.15, 0, 0, 0.15)
if any(abs(odd - share) > 0.01 or abs(known - 0.15) > 0.01
       for share, (odd, known) in zip(right, seen.values())):
    sys.exit("changed: unknown words are chosen otherwise")
PY
