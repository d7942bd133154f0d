#!/usr/bin/env bash
# A classifier of three classes, trained on a teacher's probabilities: labels of floats, one row
# of three for each text. One expects cross entropy with soft targets, which torch's cross_entropy
# takes, or an error. transformers takes floats for several labels at once, uses binary cross
# entropy of each class, and writes problem_type "multi_label_classification" into the
# configuration. That is saved with the model, so the text-classification pipeline gives each
# class a sigmoid of its own, and the scores do not add up to 1. Set
# problem_type="single_label_classification" and compute the loss from the logits: with that
# setting the model itself takes whole numbers alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import (AutoConfig, AutoModelForSequenceClassification, BertTokenizer,
                          TextClassificationPipeline)

transformers.logging.set_verbosity_error()
small = dict(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
             intermediate_size=64, pad_token_id=0, num_labels=3)
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
torch.manual_seed(0)
ids = torch.randint(5, 90, (2, 12))
teacher = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])


def scores(model):
    pipeline = TextClassificationPipeline(model=model, tokenizer=tokenizer)
    return sum(score["score"] for score in pipeline("a b c", top_k=None))


print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: the loss is cross entropy, and the scores of the classes add up to 1")
for kind in ("bert", "electra", "modernbert"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **small)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        out = model(ids, labels=teacher)
    losses = {"cross entropy": cross_entropy(out.logits, teacher),
              "binary cross entropy": binary_cross_entropy_with_logits(out.logits, teacher)}
    name = min(losses, key=lambda name: abs(losses[name] - out.loss))
    problem, total = model.config.problem_type, scores(model)
    model.config.problem_type = "single_label_classification"
    single = scores(model)
    print(f"seen: {kind:10s} {name} {out.loss:.3f}, {problem}, scores add up to {total:.2f}; with "
          f"single_label_classification {single:.2f}")
    if abs(losses["binary cross entropy"] - out.loss) > 1e-5 or name == "cross entropy":
        sys.exit(f"changed: {kind} takes floats for something else")
    if problem != "multi_label_classification" or total < 1.1 or abs(single - 1) > 1e-3:
        sys.exit(f"changed: the scores of {kind}")
PY
