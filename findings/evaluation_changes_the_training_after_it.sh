#!/usr/bin/env bash
# An evaluation in the midst of training, without shuffling, in eval mode and under no_grad. One
# expects training to go on as if it had not been. Each pass over a DataLoader draws a number from
# torch's global generator for its workers, even if it has none and nothing is shuffled. Dropout
# draws from that generator after it, so each evaluation changes all that is trained later. Two
# runs that evaluate at other steps do not end with the same student though the seeds are the
# same. Give each DataLoader a generator of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys
import torch
from torch import nn
from torch.utils.data import DataLoader

torch.manual_seed(0)
inputs, held_out = torch.randn(16, 8, 8), torch.randn(16, 8)


def trained(evaluate, generator=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.1), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(held_out, batch_size=8, shuffle=False, generator=generator)
    for step, batch in enumerate(inputs):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        if evaluate and step == 7:
            model.eval()
            with torch.no_grad():
                for rows in loader:
                    model(rows)
            model.train()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


plain = trained(evaluate=False)
seen = {"no evaluation, again": trained(evaluate=False), "one evaluation": trained(evaluate=True),
        "one, own generator": trained(evaluate=True, generator=torch.Generator())}
off = {name: float((weights - plain).abs().max()) for name, weights in seen.items()}
print(f"torch {torch.__version__}")
print("expected: after 16 steps the same weights, with an evaluation after the eighth or without")
for name, largest in off.items():
    print(f"seen: {name:20s} largest difference of a weight {largest:.2g}")
if off["one evaluation"] < 1e-4:
    sys.exit("changed: a pass over a DataLoader leaves the global generator alone")
if off["no evaluation, again"] or off["one, own generator"]:
    sys.exit("changed: training differs without an evaluation, or with a generator of its own")
PY
