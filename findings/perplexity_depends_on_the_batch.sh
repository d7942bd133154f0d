#!/usr/bin/env bash
# Perplexity of a masked LM: Trainer.evaluate(), and exp(eval_loss), as the example scripts compute
# it. One expects a figure of the model and the masked tokens. Trainer takes the mean loss of each
# batch and averages it over texts, so a masked token counts the less, the more of them share its
# batch. Where long and short texts differ, the figure depends on the batch size and on the order of
# the texts: here 6 or 15 for one model and one masking. Two students, or two runs on cards of other
# memory, do not compare. Add up the losses and divide by the number of masked tokens.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import math, sys
import torch, transformers
from torch.nn.functional import cross_entropy, pad
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
FILL = {"input_ids": 0, "labels": -100, "attention_mask": 0}


def masked(length, words):
    ids, labels = torch.randint(5, 5 + words, (length,)), torch.full((length,), -100)
    places = torch.randperm(length)[:max(1, round(0.15 * length))]
    labels[places] = ids[places]
    ids[places] = 4
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def collate(texts):
    longest = max(len(text["labels"]) for text in texts)
    return {name: torch.stack([pad(text[name], (0, longest - len(text[name])), value=value)
                               for text in texts]) for name, value in FILL.items()}


def perplexity(size, texts):
    arguments = TrainingArguments("out", per_device_eval_batch_size=size, use_cpu=True,
                                  report_to="none", disable_tqdm=True)
    trainer = Trainer(model, arguments, eval_dataset=texts, data_collator=collate)
    trainer.remove_callback(transformers.PrinterCallback)
    return math.exp(trainer.evaluate()["eval_loss"])


# Long texts of few words, and short ones, such as titles, of many.
texts = [masked(*((4, 55) if i % 2 else (60, 5))) for i in range(256)]
model = BertForMaskedLM(BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1,
                                   num_attention_heads=2, intermediate_size=64))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(60):
    optimizer.zero_grad()
    model(**collate([texts[i] for i in torch.randint(256, (32,))])).loss.backward()
    optimizer.step()
whole = collate(texts)
with torch.no_grad():
    logits = model.eval()(whole["input_ids"], attention_mask=whole["attention_mask"]).logits
truth = math.exp(cross_entropy(logits.transpose(1, 2), whole["labels"]))
by_length = sorted(texts, key=lambda text: len(text["labels"]))
seen = {"one by one": perplexity(1, texts), "in batches of 8": perplexity(8, texts),
        "in batches of 8, by length": perplexity(8, by_length)}
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print(f"expected: the perplexity over all masked tokens, {truth:.1f}")
for name, value in seen.items():
    print(f"seen: {name}: {value:.1f}")
alone, eight, sorted_eight = seen.values()
if abs(eight / truth - 1) > 0.05:
    sys.exit("changed: in batches of 8")
if min(alone, sorted_eight) < 1.5 * truth:
    sys.exit("changed: each masked token counts the same")
PY
