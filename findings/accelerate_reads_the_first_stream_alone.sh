#!/usr/bin/env bash
# A stream of data in a run of several processes. One splits it by rank in the dataset, as one
# does for a bare PyTorch loop, and expects every process to read its own part. After
# Accelerator.prepare the first process alone reads its stream, and its rows are dealt out to all
# processes: that is the default for an IterableDataset. The streams of the other processes are
# never read. With 2 processes half of the rows is never seen. There is no error and no warning.
# Leave the split to accelerate, and give each process the whole stream.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import os, socket, sys
import accelerate, torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from torch.utils.data import DataLoader, IterableDataset

WORLD, ROWS = 2, 64


class Stream(IterableDataset):
    def __init__(self, first, step):
        self.rows = range(first, ROWS, step)

    def __iter__(self):
        return iter(torch.tensor(self.rows))


def worker(rank, port, results):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    accelerator = accelerate.Accelerator(cpu=True)
    for way, stream in (("split by rank", Stream(rank, WORLD)), ("whole", Stream(0, 1))):
        loader = accelerator.prepare(DataLoader(stream, batch_size=4))
        results.put((way, torch.cat(list(loader)).tolist()))
    dist.destroy_process_group()


with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
results = torch.multiprocessing.get_context("fork").Queue()
start_processes(worker, (port, results), nprocs=WORLD, start_method="fork")
seen = {}
for _ in range(2 * WORLD):
    way, rows = results.get()
    seen.setdefault(way, []).extend(rows)
print(f"torch {torch.__version__}, accelerate {accelerate.__version__}")
print(f"expected: {WORLD} processes see {ROWS} different rows together")
for way, rows in sorted(seen.items()):
    print(f"seen: each process is given the stream {way}: {len(rows)} rows, "
          f"{sorted(rows)[:3]} to {max(rows)}")
if sorted(seen["split by rank"]) != list(range(0, ROWS, WORLD)):
    sys.exit("changed: other rows than those of the first process")
if sorted(seen["whole"]) != list(range(ROWS)):
    sys.exit("changed: the whole stream is not split")
PY
