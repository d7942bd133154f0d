#!/usr/bin/env bash
# Accelerator.gather_for_metrics in an evaluation. Its documentation says that it gathers from all
# processes and may drop duplicates of the last batch in a distributed run. One expects it to
# return what it is given where there is one process, as gather does. In the last batch it returns
# as many rows as that batch has texts, whatever a row is. A tensor with one number for each masked
# token, which has many more rows than the batch has texts, loses most of them there, without a
# word. Where the number of texts is a multiple of the batch size nothing is cut, so a trial passes.
# The mean over masked tokens, and a perplexity from it, leave out most of the last batch. Give it
# tensors with one row for each text, such as sums and counts, or use gather.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import math, sys
import accelerate, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

accelerator = Accelerator(cpu=True)
TOKENS = 6  # Masked tokens of each text.


def losses(texts, size, gather):
    """A loss for each masked token; the later texts are the harder ones."""
    loader = accelerator.prepare(DataLoader(range(texts), batch_size=size))
    kept = [gather((batch / 10).repeat_interleave(TOKENS)) for batch in loader]
    return torch.cat(kept), [len(batch) for batch in kept]


print(f"torch {torch.__version__}, accelerate {accelerate.__version__}, "
      f"{accelerator.num_processes} process")
print(f"expected: {TOKENS} losses for each text, in batches of 16")
seen = {}
for texts in (30, 32):
    for gather in (accelerator.gather, accelerator.gather_for_metrics):
        values, rows = losses(texts, 16, gather)
        seen[texts, gather.__name__] = rows
        print(f"seen: {texts} texts, {gather.__name__}: {rows} losses, "
              f"perplexity {math.exp(values.mean()):.2f}")
if accelerator.num_processes != 1:
    sys.exit("this is meant for one process")
if seen[30, "gather"] != [96, 84] or seen[32, "gather"] != [96, 96]:
    sys.exit("changed: gather")
if seen[32, "gather_for_metrics"] != [96, 96]:
    sys.exit("changed: gather_for_metrics where all batches are full")
if seen[30, "gather_for_metrics"] != [96, 14]:
    sys.exit("changed: gather_for_metrics keeps all rows of the last batch")
PY
