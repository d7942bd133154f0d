#!/usr/bin/env bash
# Random masks made by Dataset.map. One expects num_proc=4 to be faster and else the same: each
# row draws its own numbers. The workers are copies of one process with one state of the random
# generators of numpy and torch, so each of the 4 parts gets the same draws: a quarter of the
# masks is new, and the other three are copies, as long as the rows are alike. Seeding before map
# does not help. The corpus looks masked at random, and its positions are far fewer than one
# counts on. Draw from the row's index: default_rng([seed, index]) and with_indices=True.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q datasets==5.2.0 torch==2.13.0 numpy==2.4.6
cd "$work"
HF_HOME="$work/home" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys
import datasets, numpy as np, torch
from datasets import Dataset

datasets.disable_progress_bars()
rows = Dataset.from_dict({"text": ["word"] * 400})


def plain(row):
    return {"numpy": np.random.rand(), "torch": torch.rand(()).item()}


def by_index(row, index):
    return {"numpy": np.random.default_rng([7, index]).random(), "torch": 0.0}


def distinct(function, processes, **settings):
    np.random.seed(0)
    torch.manual_seed(0)
    made = rows.map(function, num_proc=processes, load_from_cache_file=False, **settings)
    return [len(set(made[name])) for name in ("numpy", "torch")], list(made["numpy"])


print(f"datasets {datasets.__version__}, numpy {np.__version__}, torch {torch.__version__}")
print("expected: 400 rows draw 400 numbers, with any number of processes")
seen = {processes: distinct(plain, processes)[0] for processes in (None, 2, 4)}
for processes, (numpy, torches) in seen.items():
    print(f"seen: num_proc={processes}: {numpy} different numbers of numpy, {torches} of torch")
whole, parts = (distinct(by_index, n, with_indices=True)[1] for n in (None, 4))
print(f"seen: drawn from the index: {len(set(parts))}, the same with 4 processes: {whole == parts}")
if seen != {None: [400, 400], 2: [200, 200], 4: [100, 100]}:
    sys.exit("changed: the workers of map draw other numbers")
if whole != parts or len(set(parts)) != 400:
    sys.exit("changed: numbers drawn from the index")
PY
