#!/usr/bin/env bash
# DataCollatorForLanguageModeling(seed=0), for masks that one can make again. One expects new
# masks in each epoch, as without a seed, and they are new in a DataLoader without workers. With
# num_workers the workers start anew in each epoch, and each makes its generator from the same
# seed: every epoch chooses the same places of each batch. A corpus that is read in one order has
# one masking in all epochs: dynamic masking is static, and nothing shows it. Set
# persistent_workers=True, whose workers go on from epoch to epoch, or leave the seed out.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from torch.utils.data import DataLoader
from transformers import BertTokenizer, DataCollatorForLanguageModeling

words = "[PAD] [UNK] [CLS] [SEP] [MASK]".split() + [f"w{i}" for i in range(100)]
tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
rows = [{"input_ids": [2, *(5 + (7 * i + j) % 100 for j in range(60)), 3]} for i in range(64)]


def masks(seed, **settings):
    """How many different maskings three epochs have."""
    torch.manual_seed(1)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=seed)
    loader = DataLoader(rows, batch_size=8, collate_fn=collate, **settings)
    epochs = [torch.cat([batch["labels"] != -100 for batch in loader]) for _ in range(3)]
    return len({epoch.numpy().tobytes() for epoch in epochs})


seen = {"seed, no workers": masks(0), "seed, 2 workers": masks(0, num_workers=2),
        "no seed, 2 workers": masks(None, num_workers=2),
        "seed, 2 persistent": masks(0, num_workers=2, persistent_workers=True)}
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: three epochs have 3 different maskings of the corpus")
for name, count in seen.items():
    print(f"seen: {name:18s} {count}")
if seen.pop("seed, 2 workers") != 1:
    sys.exit("changed: epochs of workers have masks of their own")
if set(seen.values()) != {3}:
    sys.exit("changed: masks repeat in another way")
PY
