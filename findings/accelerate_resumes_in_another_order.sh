#!/usr/bin/env bash
# Going on in the midst of an epoch with accelerate: load_state, and skip_first_batches for the
# batches that were done, as its guide shows. One expects the rest of the epoch. load_state brings
# the random generators back as they were when the state was saved, after the epoch's order had
# been drawn. So a shuffling DataLoader draws another order, and the batches that are skipped are
# not those that were done: some rows are seen twice and about as many not at all, without a word.
# use_seedable_sampler=True in DataLoaderConfiguration helps in the first epoch alone: the number
# of the epoch is not saved, and any later one goes on in the order of the first. Take both that
# setting and set_epoch(epoch) on the prepared DataLoader, before skip_first_batches and at the
# start of each epoch.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 accelerate==1.15.0 numpy==2.4.6
cd "$work"
OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PY'
import sys
import accelerate
import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import set_seed
from torch.utils.data import DataLoader


def start(seedable):
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=seedable))
    set_seed(0)
    rows = torch.arange(64)
    return accelerator, accelerator.prepare(DataLoader(rows, batch_size=4, shuffle=True))


def rest_of(epoch, seedable, told):
    accelerator, loader = start(seedable)
    for current in range(epoch + 1):
        done = []
        for step, batch in enumerate(loader):
            if current == epoch and step == 8:
                rest = []
            if current == epoch and step >= 8:
                rest += batch.tolist()
                continue
            done += batch.tolist()
            if current == epoch and step == 7:
                accelerator.save_state("state")
    accelerator, loader = start(seedable)
    accelerator.load_state("state")
    if told:
        loader.set_epoch(epoch)
    resumed = [row for batch in skip_first_batches(loader, 8) for row in batch.tolist()]
    return len(set(done) & set(resumed)), len(set(range(64)) - set(done) - set(resumed)), \
        resumed == rest


print(f"torch {torch.__version__}, accelerate {accelerate.__version__}")
print("expected: after half an epoch of 64 rows, the other half, in the order of the whole run")
results = []
for epoch, seedable, told in ((0, False, False), (1, False, False), (0, True, False),
                              (1, True, False), (1, True, True)):
    twice, never, same = rest_of(epoch, seedable, told)
    results.append(same)
    print(f"seen: epoch {epoch + 1}, use_seedable_sampler={seedable}"
          f"{', set_epoch' if told else ''}: {twice} rows twice, {never} never"
          f"{', the order is the same' if same else ''}")
    if same != (twice == never == 0):
        sys.exit("changed")
if results != [False, False, True, False, True]:
    sys.exit("changed")
PY
