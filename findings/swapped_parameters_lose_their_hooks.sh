#!/usr/bin/env bash
# A hook on a parameter, and Module.to() afterwards. By default the parameter stays the same object
# and its hooks run, on the new device or in the new type. With
# torch.__future__.set_swap_module_params_on_conversion(True), the object stays the same one, too,
# and its _backward_hooks still list the hook; but backward does not run it. Gradients that a hook
# completes, scales or clips are then plain ones. There is no error and no
# warning. Call to() first, and register hooks after it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
cd "$work"
"$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import torch
from torch import nn

print(f"torch {torch.__version__}")
print("expected: the parameter is the same object with the same hooks, so backward runs them")
for swap in (False, True):
    torch.__future__.set_swap_module_params_on_conversion(swap)
    layer = nn.Linear(2, 2, bias=False)
    weight, ran = layer.weight, []
    weight.register_hook(lambda gradient: ran.append("hook") or gradient * 10)
    weight.register_post_accumulate_grad_hook(lambda parameter: ran.append("after"))
    layer.to(torch.float64)
    if layer.weight is not weight or len(weight._backward_hooks) != 1:
        sys.exit("changed: another object, or the hook is not listed")
    layer(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    largest = weight.grad.max().item()
    print(f"seen: swapped {swap}: hooks that ran {ran}, gradient {largest:g}")
    if (ran, largest) != (([], 1.0) if swap else (["hook", "after"], 10.0)):
        sys.exit("changed: hooks on a parameter")
    moved, later = nn.Linear(2, 2, bias=False).to(torch.float64), []
    moved.weight.register_hook(lambda gradient: later.append("hook"))
    moved(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    print(f"seen: swapped {swap}: a first hook that is registered after to() ran: {later}")
    if later != ["hook"]:
        sys.exit("changed: what helps")
PY
