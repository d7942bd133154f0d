#!/usr/bin/env bash
# Writing a file only if it is not there yet: mode "xb". One expects fsspec.open(url, "xb") to
# raise FileExistsError for a file that exists, whatever stands before its path. It does for a
# local path. Through simplecache:: or filecache::, which one puts before a remote path to read it
# from a local copy, "x" looks for the name among the local copies alone, and the file itself is
# overwritten. Two workers that publish the same shard, or a run started twice, replace each
# other's cache and see no error. Write without the prefix.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q fsspec==2026.9.0
cd "$work"
TMPDIR="$work" "$work/venv/bin/python" - <<'PY'
import sys
from pathlib import Path

import fsspec

shard = Path("shard.bin").resolve()
print(f"fsspec {fsspec.__version__}")
print("expected: FileExistsError each time, and the file still says 'first'")
seen = {}
for scheme in ("file", "simplecache::file", "filecache::file"):
    shard.write_bytes(b"first")
    try:
        with fsspec.open(f"{scheme}://{shard}", "xb") as out:
            out.write(b"second")
        said = "no error"
    except FileExistsError:
        said = "FileExistsError"
    seen[scheme] = said, shard.read_text()
    print(f"seen: {scheme:17s} {said}, the file says {shard.read_text()!r}")
if seen.pop("file") != ("FileExistsError", "first"):
    sys.exit("changed: 'xb' overwrites a local file")
if set(seen.values()) != {("no error", "second")}:
    sys.exit("changed: 'xb' through a caching file system no longer overwrites")
PY
