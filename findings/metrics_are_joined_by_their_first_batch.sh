#!/usr/bin/env bash
# Several metrics in a MetricCollection of torchmetrics. Its compute_groups, on unless one says
# otherwise, save work: metrics that count the same things share one count. One expects it to know
# from their settings which do. It compares the counts after the first batch, and metrics whose
# counts are equal then share one for good. Two thresholds agree on a batch without close calls,
# accuracy with and without padding on a batch without padding. From then on the second reports the
# first one's figure, without a word. What is reported depends on which texts come
# first. Pass compute_groups=False, or the groups as lists of names.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 torchmetrics==1.9.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys
import torch, torchmetrics
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

torch.manual_seed(0)
TAGS, PAD = 8, 0


def padded(batch):
    """Tags of eight words, of which those after the fourth are padding in all batches but one."""
    truth = torch.randint(1, TAGS, (4, 8))
    scores = torch.randn(4, 8, TAGS) + torch.nn.functional.one_hot(truth, TAGS) * 2
    if batch:
        truth[:, 4:] = PAD
    return scores.transpose(1, 2), truth


def close(batch):
    """Probabilities of two classes, far from any threshold in one batch."""
    truth = torch.randint(2, (32,))
    return (torch.rand(32) if batch else truth * 0.98 + 0.01), truth


def tags():
    return {"with padding": MulticlassAccuracy(TAGS, average="micro"),
            "without padding": MulticlassAccuracy(TAGS, average="micro", ignore_index=PAD)}


def thresholds():
    return {f"from {level} %": BinaryAccuracy(threshold=level / 100) for level in (50, 90)}


def measured(metrics, batches):
    for values, truth in batches:
        metrics.update(values, truth)
    return {name: round(float(value), 4) for name, value in metrics.compute().items()}


print(f"torch {torch.__version__}, torchmetrics {torchmetrics.__version__}")
for make, draw in ((tags, padded), (thresholds, close)):
    batches = [draw(number) for number in range(20)]
    alone = {}
    for name, metric in make().items():
        for values, truth in batches:
            metric.update(values, truth)
        alone[name] = round(float(metric.compute()), 4)
    seen = measured(MetricCollection(make()), batches)
    other_order = measured(MetricCollection(make()), batches[::-1])
    apart = measured(MetricCollection(make(), compute_groups=False), batches)
    print(f"expected: {alone}, each metric on its own")
    print(f"seen: {seen}; last batch first: {other_order}")
    if len(set(alone.values())) != 2 or not alone == apart == other_order:
        sys.exit("changed: what helps, or the metrics themselves")
    first = next(iter(alone))
    if set(seen.values()) != {alone[first]}:
        sys.exit("changed: metrics with equal counts after one batch stay apart")
PY
