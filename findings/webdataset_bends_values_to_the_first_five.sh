#!/usr/bin/env bash
# load_dataset("webdataset"): tar files of samples. One expects the values of the files, or an
# error where a column's type does not fit. Types are taken from the first five samples, and later
# ones are bent to them in silence: 1.5 becomes 1 if five whole numbers came first, a field that
# comes later than that is left out, and float32 becomes float16 with inf in it. Streaming does
# the same. Scores of a teacher lose their fraction and rare labels vanish. Pass features= with the
# types you mean.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q datasets==5.2.0 numpy==2.4.6
cd "$work"
HF_HOME="$work/home" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import io, json, sys, tarfile
import datasets, numpy as np
from datasets import Features, List, Value, load_dataset

datasets.disable_progress_bars()


def tar(name, ending, contents):
    with tarfile.open(name, "w") as out:
        for i, content in enumerate(contents):
            member = tarfile.TarInfo(f"{i:03d}.{ending}")
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))


def npy(values):
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def last(column, name, **settings):
    read = load_dataset("webdataset", data_files=name, split="train", **settings)
    return list(read)[-1][column]


rows = [{"score": 1}] * 5 + [{"score": 1.5, "label": 7}]
tar("json.tar", "json", [json.dumps(row).encode() for row in rows])
tar("npy.tar", "npy", [npy(np.ones(2, t)) for t in [np.float16] * 5]
    + [npy(np.array([0.1, 70000], np.float32))])
names = {"__key__": Value("string"), "__url__": Value("string")}
meant = Features({"json": {"score": Value("float64"), "label": Value("int64")}, **names})
wide = Features({"npy": List(Value("float32")), **names})
read = {way: last("json", "json.tar", streaming=way == "streamed") for way in ("whole", "streamed")}
array = last("npy", "npy.tar")
told = last("json", "json.tar", features=meant), last("npy", "npy.tar", features=wide)
print(f"datasets {datasets.__version__}")
print(f"expected: the sixth sample as it was written: {rows[-1]} and [0.1, 70000.0], or an error")
print(f"seen: read whole {read['whole']}, streamed {read['streamed']}, the array {array}")
print(f"seen: with features= {told[0]}, the array {told[1]}")
if set(map(str, read.values())) != {"{'score': 1}"} or array[1] != float("inf"):
    sys.exit("changed: samples after the fifth keep their values")
if told[0] != rows[-1] or told[1][1] != 70000:
    sys.exit("changed: features= does not help")
PY
