#!/usr/bin/env bash
# A .zst file of several frames: two files put end to end with cat, or a log that is appended to.
# The format allows it, as gzip does, where gzip.decompress reads all. zstandard reads all frames
# with open(), stream_reader and copy_stream. decompress(), decompressobj and read_to_iter of the
# same package stop after the first frame, without an error. A corpus or a cache that is read with
# them loses its tail. Use zstandard.open() or stream_reader, and count the rows.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q zstandard==0.25.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import gzip, io, sys
import zstandard
from zstandard import ZstdCompressor, ZstdDecompressor

first, second = (b"".join(b"line %d\n" % i for i in rows) for rows in (range(10), range(10, 30)))
frames = ZstdCompressor().compress(first) + ZstdCompressor().compress(second)
copied = io.BytesIO()
ZstdDecompressor().copy_stream(io.BytesIO(frames), copied)
whole = {"gzip.decompress": gzip.decompress(gzip.compress(first) + gzip.compress(second)),
         "zstandard.open": zstandard.open(io.BytesIO(frames), "rb").read(),
         "stream_reader": ZstdDecompressor().stream_reader(io.BytesIO(frames)).read(),
         "copy_stream": copied.getvalue()}
cut = {"zstandard.decompress": zstandard.decompress(frames),
       "ZstdDecompressor.decompress": ZstdDecompressor().decompress(frames),
       "decompressobj": ZstdDecompressor().decompressobj().decompress(frames),
       "read_to_iter": b"".join(ZstdDecompressor().read_to_iter(io.BytesIO(frames)))}
print(f"zstandard {zstandard.__version__}")
print("expected: 30 lines from two frames of 10 and 20 lines, however they are read")
for name, text in {**whole, **cut}.items():
    print(f"seen: {name:28s} {text.count(b'line')} lines")
if any(text != first + second for text in whole.values()):
    sys.exit("changed: a way to read all frames stops early")
if any(text != first for text in cut.values()):
    sys.exit("changed: a way that read the first frame alone does not any more")
PY
