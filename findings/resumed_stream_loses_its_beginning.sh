#!/usr/bin/env bash
# Going on in the midst of an epoch of a streamed data set: state_dict() is saved, and
# load_state_dict() is called on the data set of the new process. One expects the rest of this
# epoch, and then whole ones. The state stays in the data set: each later pass that has
# the same number of epoch starts where the first one went on, and the rows before that place are
# never seen again. That number is 0 until set_epoch() changes it, which one calls to shuffle anew
# and has no reason to call where nothing is shuffled. Nothing is said; an epoch is only shorter. In
# a DataLoader it is the same. Call set_epoch(epoch) before each pass, shuffled or not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 datasets==5.2.0
cd "$work"
HF_HOME="$work/home" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import itertools, sys
import datasets, torch
from datasets import Dataset
from torch.utils.data import DataLoader

ROWS, DONE = 100, 70
datasets.disable_progress_bars()


def stream():
    return Dataset.from_dict({"x": list(range(ROWS))}).to_iterable_dataset(num_shards=2)


def read(data, workers=None):
    loader = data if workers is None else DataLoader(data, batch_size=None, num_workers=workers)
    return [int(row["x"]) for row in loader]


def going_on():
    first = stream()
    done = [row["x"] for row in itertools.islice(first, DONE)]
    data = stream()
    data.load_state_dict(first.state_dict())
    return done, data


print(f"torch {torch.__version__}, datasets {datasets.__version__}")
print(f"expected: {ROWS} rows in the epoch with the break, and in each one after it")
seen = {}
for name, workers, numbered in (("alone", None, False), ("DataLoader", 0, False),
                                ("set_epoch", None, True)):
    done, data = going_on()
    counts = []
    for epoch in range(3):
        if numbered:
            data.set_epoch(epoch)
        rows = read(data, workers)
        counts.append(len(set(rows) | set(done if epoch == 0 else [])))
    seen[name] = counts
    print(f"seen: {name:10s} rows of the epochs: {counts}; the last one has row 0: {0 in rows}")
if seen["set_epoch"] != [ROWS] * 3 or any(counts[0] != ROWS for counts in seen.values()):
    sys.exit("changed: the epoch with the break, or set_epoch")
if any(seen[name][1:] != [ROWS - DONE] * 2 for name in ("alone", "DataLoader")):
    sys.exit("changed: a state that was loaded is used once")
PY
