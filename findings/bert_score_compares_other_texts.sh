#!/usr/bin/env bash
# BERTScore and InfoLM of torchmetrics compare texts by what a masked LM makes of them. One expects
# score i to be that of text i and its target, as for one pair on its own. torchmetrics sorts both
# sides by length, each in its own order, and puts them back with the order it sorted by, not with
# its inverse. So text i is compared with the target of another one as soon as the lengths of the
# two sides do not sort alike. Here seven of eight texts equal their targets, and not one of them
# gets the score of equal texts. A trial with equal sides gives 1.0 everywhere, and one with a single
# pair is right, too. Students compared by such scores are not compared. Score one pair in each call.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 torchmetrics==1.9.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import torch, torchmetrics, transformers
from torchmetrics.text import BERTScore, InfoLM
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
words = "a the red blue small dog cat house tree sleeps stands runs here there now then".split()
special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BertTokenizer(vocab={t: i for i, t in enumerate([*special, *words])}).save_pretrained("model")
BertForMaskedLM(BertConfig(
    vocab_size=21, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, initializer_range=0.3)).save_pretrained("model")


def bert(texts, targets):
    metric = BERTScore(model_name_or_path="model", num_layers=2, max_length=32)
    metric.update(texts, targets)
    return metric.compute()["f1"].reshape(-1)


def infolm(texts, targets):
    metric = InfoLM(model_name_or_path="model", idf=False, max_length=16, verbose=False,
                    information_measure="l1_distance", return_sentence_level_score=True)
    metric.update(texts, targets)
    return metric.compute()[1].reshape(-1)


def places(texts):  # Which text torchmetrics has at each place, after it has put them back.
    order = torch.tensor([len(text.split()) for text in texts]).argsort()
    return order[order]


def equal(scores, wanted):
    return int((scores - wanted).abs().lt(1e-4).sum())


targets = [" ".join(words[start:start + length])
           for start, length in zip((3, 0, 5, 2, 7, 4, 1, 6), (9, 3, 7, 2, 5, 8, 4, 6))]
texts = ["the", *targets[1:]]  # One text is shorter than its target, the others are the same.
swapped = [texts[i] for i in places(texts)], [targets[i] for i in places(targets)]
print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
      f"torchmetrics {torchmetrics.__version__}")
print("expected: 7 of 8 pairs score as equal texts, as each does on its own")
for name, metric, same in (("BERTScore", bert, 1.0), ("InfoLM", infolm, 0.0)):
    alone, rule = (torch.cat([metric([a], [b]) for a, b in zip(*pairs)])
                   for pairs in ((texts, targets), swapped))
    listed, whole = metric(texts, targets), metric(targets, targets)
    print(f"seen: {name}: alone {equal(alone, same)}, in a list {equal(listed, same)}; equal lists "
          f"{equal(whole, same)} of 8")
    print(f"seen: {name}: scores in the list: {[round(x, 3) for x in listed.tolist()]}")
    print(f"seen: {name}: by the rule above:  {[round(x, 3) for x in rule.tolist()]}")
    if equal(alone, same) != 7 or equal(whole, same) != 8:
        sys.exit(f"changed: {name} of one pair, or of equal lists")
    if equal(listed, same) != 0 or equal(listed, rule) != 8:
        sys.exit(f"changed: {name} of a list compares other pairs")
PY
