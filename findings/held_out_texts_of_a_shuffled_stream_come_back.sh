#!/usr/bin/env bash
# A streamed data set, shuffled with a seed, whose first texts are held out: stream.take(100) for
# evaluation, stream.skip(100) for training. One expects the two to stay apart, as they do in the
# first epoch. The shuffle comes before the cut, and a new number of epoch gives it another order:
# skip then leaves out 100 other texts. From the second epoch on held-out texts are trained on, up
# to nearly all of them, while take goes on giving the same ones. No one has to call set_epoch: the
# DataLoader of accelerate, which Trainer uses, does it with each pass. The held-out loss gets too
# good with each epoch, and nothing says so. Cut first and shuffle the part for training.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 accelerate==1.15.0 datasets==5.2.0
cd "$work"
"$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import accelerate, datasets, torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader

TEXTS, HELD = 1000, 100
accelerator = Accelerator(cpu=True)


def passes(train, epochs=3):
    """The texts of each epoch, as a loop with accelerate meets them; it never calls set_epoch."""
    loader = accelerator.prepare(DataLoader(train.with_format("torch"), batch_size=20))
    return [{int(text) for batch in loader for text in batch["text"]} for _ in range(epochs)]


print(f"torch {torch.__version__}, accelerate {accelerate.__version__}, "
      f"datasets {datasets.__version__}")
print(f"expected: 0 of {HELD} held-out texts in each epoch of training")
stream = Dataset.from_dict({"text": list(range(TEXTS))}).to_iterable_dataset(num_shards=4)
leaks = {}
for buffer in (50, TEXTS):
    mixed = stream.shuffle(seed=0, buffer_size=buffer)
    held_out, train = mixed.take(HELD), mixed.skip(HELD)
    held = {row["text"] for row in held_out}
    epochs = passes(train)
    leaks[buffer] = [len(texts & held) for texts in epochs]
    print(f"seen: buffer of {buffer}: {leaks[buffer]} held-out texts, "
          f"of {[len(texts) for texts in epochs]} in each epoch")
    if {row["text"] for row in held_out} != held:
        sys.exit("changed: the held-out texts")
held = {row["text"] for row in stream.take(HELD)}
helped = [len(texts & held) for texts in passes(stream.skip(HELD).shuffle(seed=0, buffer_size=50))]
by_hand = stream.shuffle(seed=0, buffer_size=TEXTS).skip(HELD)
by_hand.set_epoch(1)
first = {row["text"] for row in stream.shuffle(seed=0, buffer_size=TEXTS).take(HELD)}
print(f"seen: cut first, then shuffled: {helped}")
print(f"seen: set_epoch(1) by hand: {len({row['text'] for row in by_hand} & first)}")
if any(row[0] for row in leaks.values()) or any(helped):
    sys.exit("changed: the first epoch, or what helps")
if min(leaks[50][1:]) < 5 or min(leaks[TEXTS][1:]) < 70:
    sys.exit("changed: later epochs leave the held-out texts out")
if len({row["text"] for row in by_hand} & first) < 70:
    sys.exit("changed: set_epoch")
PY
