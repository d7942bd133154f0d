#!/usr/bin/env bash
# safetensors.numpy.save_file of an array that is a view: transposed, or its first columns. One
# expects the values of the view, as np.save writes them, or an error, as save_file for torch
# raises. It writes the shape of the view and the bytes of memory as they lie: other values,
# without a word. Logits cut with top[:, :8] or hidden states turned with .T are wrong in the
# file. Pass np.ascontiguousarray(array).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys
import numpy as np, safetensors
from safetensors.numpy import load_file, save_file

whole = np.arange(6, dtype=np.float32).reshape(2, 3)
views = {"whole": whole, "transposed": whole.T, "first columns": whole[:, :2]}
save_file(views, "views")
save_file({name: np.ascontiguousarray(view) for name, view in views.items()}, "copies")
read, copies = load_file("views"), load_file("copies")
for name, view in views.items():
    np.save("view.npy", view)
    if not (np.array_equal(np.load("view.npy"), view) and np.array_equal(copies[name], view)):
        sys.exit("changed: np.save, or a contiguous copy")
print(f"safetensors {safetensors.__version__}, numpy {np.__version__}")
for name, view in views.items():
    print(f"{name}: expected {view.tolist()}, seen {read[name].tolist()}")
wrong = {name for name, view in views.items() if not np.array_equal(read[name], view)}
if wrong != {"transposed", "first columns"}:
    sys.exit("changed: views are saved with their values")
PY
