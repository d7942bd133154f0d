#!/usr/bin/env bash
# Classifiers of two classes measured with torchmetrics, which takes probabilities or logits. One
# expects a metric that is fed batch by batch to equal the metric of all texts at once, whatever
# the batch size. Each update decides by its own values: if all of the batch lie between 0 and 1,
# they are probabilities, else logits. A single logit, or the few of a last batch, often lies
# there. Then 0.3, a "yes" of 57 %, counts as 30 %, a "no", and in an AUROC it stands beside 0.57
# of another batch. With small batches accuracy, F1 and AUROC fall and the calibration error rises,
# without a word. With 32 texts in a batch nothing shows, so a trial passes. The F1 of several
# labels falls as well. Pass logits.sigmoid().
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 torchmetrics==1.9.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys
import torch, torchmetrics
from torchmetrics.classification import (BinaryAccuracy, BinaryAUROC, BinaryCalibrationError,
                                         BinaryF1Score, MultilabelF1Score)

torch.manual_seed(0)
logits = torch.randn(2048)
truth = (torch.rand(2048) < logits.sigmoid()).long()  # A classifier that is right about itself.
SIZES = (1, 2, 4, 32, 2048)


def measured(metric, values):
    """The metric of all texts for each batch size."""
    seen = {}
    for size in SIZES:
        metric.reset()
        for values_part, truth_part in zip(values.split(size), truth.split(size)):
            metric.update(values_part.view(-1, *shape), truth_part.view(-1, *shape))
        seen[size] = round(float(metric.compute()), 4)
    return seen


print(f"torch {torch.__version__}, torchmetrics {torchmetrics.__version__}")
print("expected: one figure for all batch sizes")
for make, worse in ((BinaryAccuracy, -0.01), (BinaryF1Score, -0.05), (BinaryAUROC, -0.02),
                    (BinaryCalibrationError, 0.005),
                    (lambda: MultilabelF1Score(num_labels=2, average="micro"), -0.02)):
    metric = make()
    shape = (2,) if isinstance(metric, MultilabelF1Score) else ()
    if shape:
        SIZES = (2, 4, 32, 2048)  # Numbers in a batch: two labels for each text.
    seen, helped = measured(metric, logits), measured(metric, logits.sigmoid())
    print(f"seen: {type(metric).__name__:22s} {seen}")
    whole = seen[2048]
    if len(set(helped.values())) != 1 or whole != helped[2048] or seen[32] != whole:
        sys.exit("changed: probabilities, or large batches")
    if (seen[SIZES[0]] - whole) / worse < 1:
        sys.exit("changed: small batches of logits")
print("seen: with sigmoid() each figure is the same for all batch sizes, that of 2048")
PY
