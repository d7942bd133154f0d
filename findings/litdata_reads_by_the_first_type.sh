#!/usr/bin/env bash
# litdata's optimize writes samples for streaming. One expects a tensor to come back as it was
# written, or an error. Where tensors have one dimension, litdata keeps the type of the first sample
# and no other, and reads the bytes of all later ones as that type: 0.5 in float32 after whole
# numbers in int32 comes back as 1056964608, and int64 after int16 as four numbers for each one.
# Nothing is said. Give every sample of a column one type.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 litdata==0.2.76
cd "$work"
cat >look.py <<'PY'
import sys
import litdata, torch
from litdata import StreamingDataset, optimize


def ids(index):
    return torch.tensor([1, 300, 5], dtype=torch.int16 if index == 0 else torch.int64)


def scores(index):
    return torch.tensor([1, 2], dtype=torch.int32) if index == 0 else torch.tensor([0.5, 2.0])


def alike(index):
    return torch.tensor([0.5, 2.0 + index])


def last(function):
    folder = function.__name__
    optimize(function, [0, 1], folder, num_workers=1, chunk_bytes="1MB", verbose=False)
    return StreamingDataset(folder)[1].tolist()


if __name__ == "__main__":
    read = {function.__name__: last(function) for function in (ids, scores, alike)}
    print(f"torch {torch.__version__}, litdata {litdata.__version__}")
    print("expected: ids [1, 300, 5], scores [0.5, 2.0], alike [0.5, 3.0]")
    for name, values in read.items():
        print(f"seen: {name} {values}")
    if read["ids"] != [1, 0, 0, 0, 300, 0, 0, 0, 5, 0, 0, 0]:
        sys.exit("changed: int64 after int16 is not read as int16")
    if read["scores"] != [1056964608, 1073741824]:
        sys.exit("changed: float32 after int32 is not read as int32")
    if read["alike"] != [0.5, 3.0]:
        sys.exit("changed: tensors of one type")
PY
HOME="$work" TMPDIR="$work" "$work/venv/bin/python" look.py
