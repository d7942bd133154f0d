#!/usr/bin/env bash
# A teacher's answers to a training set by Trainer.predict, to store them beside the texts. With
# train_sampling_strategy="group_by_length", which one sets to waste less padding in training, one
# expects training alone to change. predict and evaluate take the texts in groups of like length as
# well, and the rows of predictions are not put back: row 5 is the answer to another text. label_ids
# are in the same order, so accuracy is right and hides it. A column of such answers teaches a
# student what the teacher said of other texts. Set the strategy back to "random" before predict,
# which then goes through the texts in their order.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import torch, transformers
from transformers import (BertConfig, BertForSequenceClassification, BertTokenizer, Trainer,
                          TrainingArguments)

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(50))]
tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
model = BertForSequenceClassification(BertConfig(
    vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=64, initializer_range=0.5)).eval()
lengths = torch.randint(2, 40, (100,)).tolist()
texts = [" ".join(f"w{i}" for i in torch.randint(50, (n,)).tolist()) for n in lengths]
rows = [{**tokenizer(text), "labels": i % 2} for i, text in enumerate(texts)]
with torch.no_grad():
    alone = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in rows])
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: row i of predict's answers is the answer to text i, however training samples")
seen = {}
for strategy in ("random", "group_by_length"):
    arguments = TrainingArguments("out", train_sampling_strategy=strategy, report_to="none",
                                  per_device_eval_batch_size=8, use_cpu=True, disable_tqdm=True)
    found = Trainer(model, arguments, processing_class=tokenizer).predict(rows)
    answers = torch.tensor(found.predictions)
    same = (answers[:, None] - alone[None]).abs().amax(2) < 1e-4  # answer i, text j
    own, there = int(same.diagonal().sum()), int(same.any(1).sum())
    labels = torch.tensor(found.label_ids)
    right = float((answers.argmax(1) == labels).float().mean())
    seen[strategy] = own, there, right
    print(f"seen: {strategy:16s} {own} of 100 rows answer their own text, {there} some text; "
          f"accuracy {right:.2f}")
if seen["random"][:2] != (100, 100):
    sys.exit("changed: predict with the usual sampling")
if not (seen["group_by_length"][0] < 20 and seen["group_by_length"][1] == 100
        and abs(seen["group_by_length"][2] - seen["random"][2]) < 1e-6):
    sys.exit("changed: predict answers in the order of the texts")
PY
