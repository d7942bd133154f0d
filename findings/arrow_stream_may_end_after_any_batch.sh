#!/usr/bin/env bash
# Arrow streams. One expects pyarrow to read two streams that were put end to end, or to refuse
# them, and to refuse a stream that lacks its end, as it refuses such an Arrow file. It reads the
# first stream and leaves the rest without a word, and takes a stream that ends after any batch
# for a whole one: the marker at the end is optional in the format. A writer that was killed
# between two batches, or a copy that stopped there, leaves a cache with fewer rows that opens
# without an error. Keep the number of rows or a hash elsewhere, or write Arrow files (new_file),
# whose footer lists the batches.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pyarrow==26.0.1
cd "$work"
"$work/venv/bin/python" - <<'PY'
import io, sys
import pyarrow as pa
from pyarrow import ipc

batches = [pa.record_batch({"id": list(range(10 * i, 10 * i + 10))}) for i in range(4)]


def written(rows, new=ipc.new_stream):
    out = io.BytesIO()
    with new(out, rows[0].schema) as writer:
        for batch in rows:
            writer.write_batch(batch)
    return out.getvalue()


def rows(raw, read=ipc.open_stream):
    try:
        return read(raw).read_all().num_rows
    except (pa.ArrowInvalid, OSError) as error:
        return f"{type(error).__name__}: {error}"


marker = 8  # bytes at the end of a stream
two = rows(written(batches[:2]) + written(batches[2:]))
cut = [rows(written(batches)[:len(written(batches[:n])) - marker]) for n in (1, 2, 3)]
inside = rows(written(batches)[:-marker - 4])
file = rows(written(batches, ipc.new_file)[:-marker], ipc.open_file)
print(f"pyarrow {pa.__version__}")
print("expected: 40 rows or an error, for 4 batches of 10 in two streams or in one that is cut")
print(f"seen: two streams end to end {two} rows; cut after batch 1, 2, 3: {cut} rows; cut inside a "
      f"batch: {inside}; an Arrow file that is cut: {file}")
if two != 20 or cut != [10, 20, 30]:
    sys.exit("changed: pyarrow says that a stream goes on or is cut")
if isinstance(inside, int) or isinstance(file, int):
    sys.exit("changed: a cut inside a batch, or a cut file, is read")
PY
