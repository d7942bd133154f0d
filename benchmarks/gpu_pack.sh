#!/usr/bin/env bash
# Gather what benchmarks.gpu needs on a machine without a network, in one ignored folder of at most
# 64 MiB: wheels, teacher (as bfloat16), text and tasks.
#
#   benchmarks/gpu_pack.sh [SHARED]      folder with teacher/, corpus/ and glue/ (../shared)
#
# There, from the checkout:
#
#   tar -C gpu-pack -xf gpu-pack/data.tar.xz && python -m pip install --no-index --no-deps --target site gpu-pack/*.whl
#   PYTHONPATH=site:src python -m benchmarks.gpu --data gpu-pack/data --out runs/gpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

shared=${1:-../shared}
pack=gpu-pack
python=${PYTHON:-.venv/bin/python}
for path in teacher corpus/wiki_train_10MB.txt.xz corpus/wiki_valid_2MB.txt.xz glue; do
  [ -e "$shared/$path" ] || { echo "gpu_pack: $shared/$path must be there, got nothing" >&2; exit 2; }
done
rm -rf "$pack" && mkdir -p "$pack/data/corpus"

# What such a machine may lack; torch, transformers and pytest it has.
for wheel in zstandard webdataset braceexpand tensorboard protobuf absl-py pytest-timeout hypothesis sortedcontainers; do
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$pack" -c constraints.txt \
    --python-version "${PYTHON_VERSION:-3.12}" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 "$wheel"
done

"$python" - "$shared/teacher" "$pack/data/teacher" <<'PYTHON'
import shutil, sys
from pathlib import Path
from safetensors.torch import load_file, save_file

source, target = map(Path, sys.argv[1:])
shutil.copytree(source, target)
weights = load_file(source / "model.safetensors")
save_file({name: x.bfloat16() for name, x in weights.items()}, target / "model.safetensors", {"format": "pt"})
PYTHON
cp "$shared"/corpus/wiki_{train_10MB,valid_2MB}.txt.xz "$pack/data/corpus"
cp -r "$shared/glue" "$pack/data"
tar -C "$pack" -cJf "$pack/data.tar.xz" data && rm -r "$pack/data"
size=$(du -sb "$pack" | cut -f 1)
echo "$pack: $((size / 2**20)) MiB"
((size <= 64 * 2**20)) || { echo "gpu_pack: pack must be at most 64 MiB, got $size bytes" >&2; exit 2; }
