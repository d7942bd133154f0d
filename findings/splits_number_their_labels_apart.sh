#!/usr/bin/env bash
# DatasetDict.class_encode_column("label") turns texts of labels into numbers. One expects one
# numbering for all splits. Each split is numbered by itself, over the labels that it has: where a
# small test split lacks one, the same number means another label there. A right prediction then
# counts as wrong, or a wrong one as right, and accuracy is off without an error. Cast the texts of
# all splits to one ClassLabel with cast_column; numbers would stay as they are.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q datasets==5.2.0
cd "$work"
HF_HOME="$work/home" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys
import datasets
from datasets import ClassLabel, Dataset, DatasetDict

datasets.disable_progress_bars()
labels = {"train": ["negative", "neutral", "positive", "positive"], "test": ["positive", "neutral"]}
splits = DatasetDict({name: Dataset.from_dict({"label": rows}) for name, rows in labels.items()})
one = ClassLabel(names=sorted(set(labels["train"])))
seen = {}
for way, encoded in (("class_encode_column", splits.class_encode_column("label")),
                     ("cast_column", splits.cast_column("label", one))):
    seen[way] = {name: dict(zip(labels[name], encoded[name]["label"])) for name in labels}
print(f"datasets {datasets.__version__}")
print("expected: a label has one number in all splits")
for way, numbers in seen.items():
    print(f"seen: {way:19s} {numbers}")
numbers = seen["class_encode_column"]
if (numbers["train"]["neutral"], numbers["test"]["positive"]) != (1, 1):
    sys.exit("changed: class_encode_column gives all splits one numbering")
numbers = seen["cast_column"]
if any(numbers["train"][label] != number for label, number in numbers["test"].items()):
    sys.exit("changed: cast_column")
PY
