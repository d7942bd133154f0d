#!/usr/bin/env bash
# Exporting to ONNX as one file: torch.onnx.export(..., external_data=False). It is documented as
# whether to save the weights as a separate file, so one expects FILE alone, or an error for a model
# that does not fit: protobuf ends at 2 GB. Above 1,536 MiB of weights, still well below that end,
# the weights go to FILE.data all the same, without a warning. What is called the model is then a
# graph of a kilobyte or two. Moved, uploaded or hashed alone, it is no model, and that shows only
# where it is opened. A student that grew by a layer, or another data type, changes what must be
# shipped. ONNXProgram.save() does the same. Look for FILE.data, or write the program with
# onnx_ir.save(program.model, FILE), which makes one file.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnx-ir==1.1.0
cd "$work"
export OMP_NUM_THREADS=1
"$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import contextlib, io, shutil, sys, warnings
from pathlib import Path

import onnx, onnx_ir, torch


def exported(side, folder):
    """The files of a Linear of this side, the program, and what was warned of."""
    Path(folder).mkdir()
    with torch.device("meta"):
        model = torch.nn.Linear(side, side, bias=False).eval()
    model.weight = torch.nn.Parameter(torch.zeros(side, side))
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        program = torch.onnx.export(model, (torch.zeros(1, side),), f"{folder}/model.onnx",
                                    dynamo=True, external_data=False)
    return program, [str(entry.message) for entry in warned if "data" in str(entry.message)]


def sizes(folder):
    return {file.name: file.stat().st_size for file in sorted(Path(folder).iterdir())}


print(f"torch {torch.__version__}, onnx {onnx.__version__}")
print("expected: one file, model.onnx, which opens wherever it lies")
seen = {}
for side in (20_000, 20_100):
    program, warned = exported(side, "out")
    seen[side] = list(sizes("out"))
    size = side * side * 4 / 2**20
    print(f"seen: {size:,.0f} MiB of weights: {sizes('out')}, warned of {warned}")
    if warned:
        sys.exit("changed: a warning is given")
    if side == 20_100:
        Path("moved").mkdir()
        shutil.move("out/model.onnx", "moved/model.onnx")
        try:
            onnx.load("moved/model.onnx")
            opens = "opens"
        except Exception as error:
            opens = type(error).__name__
        print(f"seen: the file moved alone: {opens}")
        shutil.rmtree("out")
        Path("out").mkdir()
        program.save("out/model.onnx", external_data=False)
        saved = list(sizes("out"))
        shutil.rmtree("out")
        Path("out").mkdir()
        onnx_ir.save(program.model, "out/model.onnx")
        print(f"seen: ONNXProgram.save: {saved}; onnx_ir.save: {sizes('out')}")
        helped = list(sizes("out"))
    shutil.rmtree("out")
    del program
if seen[20_000] != ["model.onnx"]:
    sys.exit("changed: the smaller model")
if seen[20_100] != ["model.onnx", "model.onnx.data"] or saved != seen[20_100] or opens == "opens":
    sys.exit("changed: the larger model")
if helped != ["model.onnx"]:
    sys.exit("changed: what helps")
PY
