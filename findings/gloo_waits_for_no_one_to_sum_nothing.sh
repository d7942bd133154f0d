#!/usr/bin/env bash
# torch.distributed with gloo, on CPUs. A collective ends on no rank before all ranks have called
# it: so one that carries data is a meeting point as well, as barrier is. One expects the same of
# an all_reduce of a tensor without numbers, as a sum over an empty list makes it. Gloo returns from
# it at once, on each rank by itself, before the others have called it. With one number the first
# rank waits. A step that is to follow when all are there, such as reading what the first rank
# has written, then comes too early, but only where the list is empty.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$work"
cat >ranks.py <<'PY'
import sys, time
import torch
import torch.distributed as dist

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
ways = {
    "barrier": dist.barrier,
    "all_reduce of one number": lambda: dist.all_reduce(torch.zeros(1)),
    "all_reduce of no number": lambda: dist.all_reduce(torch.zeros(0)),
}
if rank == 0:
    print(f"torch {torch.__version__}, {dist.get_backend()}, 2 ranks, the second 2 seconds late")
    print("expected: the first rank waits for the second in each of them")
seen = {}
for name, call in ways.items():
    dist.barrier()
    if rank == 1:
        time.sleep(2)
    begun = time.monotonic()
    call()
    seen[name] = time.monotonic() - begun > 1
    if rank == 0:
        print(f"seen: {name}: {'waits' if seen[name] else 'does not wait'}")
dist.barrier()
if rank == 0 and list(seen.values()) != [True, True, False]:
    sys.exit("changed: who waits")
dist.destroy_process_group()
PY
"$work/venv/bin/python" ranks.py 1 "$work/meet" 2>late.txt &
"$work/venv/bin/python" ranks.py 0 "$work/meet" 2>log.txt || { cat log.txt >&2; exit 1; }
wait $! || { cat late.txt >&2; exit 1; }
