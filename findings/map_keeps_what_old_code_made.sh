#!/usr/bin/env bash
# Dataset.map keeps its results on disk and computes them anew when the function has changed. One
# expects that of any function. A function that was imported from a file of one's own counts by
# its name alone, passed to map as it is or called by a lambda: edit the file, run again, and the
# results of the old code come back without a word. A function of the script itself is read whole,
# with the values it uses. One who mends the masking or the call of a teacher goes on with what
# the mistake made. Pass load_from_cache_file=False, or a version number that you raise, in
# fn_kwargs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q datasets==5.2.0
cd "$work"
cat >run.py <<'PY'
import sys

sys.dont_write_bytecode = True
import datasets
from datasets import load_dataset
from masking import mark

datasets.disable_progress_bars()


def own(row):
    return {"mask": VALUE}


VALUE = mark({})["mask"]
rows = load_dataset("text", data_files="corpus.txt", split="train")
ways = {"imported": rows.map(mark), "lambda": rows.map(lambda row: mark(row)),
        "script": rows.map(own),
        "version": rows.map(mark, fn_kwargs={"version": int(sys.argv[1])}),
        "no-cache": rows.map(mark, load_from_cache_file=False)}
print(datasets.__version__, *(f"{way}={made['mask'][0]}" for way, made in ways.items()))
PY
printf 'one\ntwo\n' >corpus.txt
export HF_HOME="$work/home" HF_HUB_OFFLINE=1
for value in 1 2; do
    echo "def mark(row, version=0): return {'mask': $value}" >masking.py
    "$work/venv/bin/python" run.py "$value" >"seen$value"
done
echo "datasets $(cut -d' ' -f1 seen1)"
echo "expected: after masking.py was edited to give 2 in place of 1, each way gives 2"
echo "seen: before: $(cut -d' ' -f2- seen1)"
echo "seen: after:  $(cut -d' ' -f2- seen2)"
if [ "$(cut -d' ' -f2- seen1)" != "imported=1 lambda=1 script=1 version=1 no-cache=1" ]; then
    echo "changed: the first run" >&2
    exit 1
fi
if [ "$(cut -d' ' -f2- seen2)" != "imported=1 lambda=1 script=2 version=2 no-cache=2" ]; then
    echo "changed: map looks into imported functions, or a way round it fails" >&2
    exit 1
fi
