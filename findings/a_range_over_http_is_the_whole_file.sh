#!/usr/bin/env bash
# Reading a part of a remote file: cat_file(url, start, end) or cat_ranges of an fsspec file system,
# with which indexes of shards, tar members or kerchunk references are read. One expects end - start
# bytes, or an error if the server cannot do ranges. An HTTP server may ignore Range and answer 200
# with all of the file; Python's own http.server does. fsspec does not look at the status here, so
# each range is the whole file, and no error is raised. A file opened with fs.open() does check and
# raises. Parsers read the file's beginning as the wanted part, and N ranges load the file N times.
# Check the length of what comes, or read through fs.open().
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q fsspec==2026.9.0 aiohttp==3.14.5
mkdir "$work/www"
cd "$work"
env -u http_proxy -u HTTP_PROXY "$work/venv/bin/python" - <<'PY'
import functools, http.server, sys, threading
from pathlib import Path

import aiohttp, fsspec


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


data = bytes(range(256)) * 4
Path("www/shard.bin").write_bytes(data)
server = http.server.ThreadingHTTPServer(
    ("127.0.0.1", 0), functools.partial(Quiet, directory="www"))
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/shard.bin"
web, local = fsspec.filesystem("http"), fsspec.filesystem("file")


def through_open(system, path):
    try:
        with system.open(path) as file:
            file.seek(10)
            return file.read(4)
    except ValueError as error:
        return f"ValueError: {str(error).split('. ')[0]}"


print(f"fsspec {fsspec.__version__}, aiohttp {aiohttp.__version__}")
print(f"expected: {data[10:14]}, or an error")
seen = {}
for name, system, path in (("local", local, str(Path("www/shard.bin").resolve())),
                           ("http", web, url)):
    seen[name] = {
        "cat_file": system.cat_file(path, start=10, end=14),
        "cat_ranges": system.cat_ranges([path], [10], [14])[0],
        "a reference": fsspec.filesystem("reference", fo={"member": [path, 10, 4]}).cat("member"),
        "open": through_open(system, path)}
    print(f"seen: {name}: " + ", ".join(
        f"{way} {found if len(found) < 5 or isinstance(found, str) else f'{len(found)} bytes'}"
        for way, found in seen[name].items()))
if set(seen["local"].values()) != {data[10:14]}:
    sys.exit("changed: local files")
if not str(seen["http"].pop("open")).startswith("ValueError"):
    sys.exit("changed: open")
if set(seen["http"].values()) != {data}:
    sys.exit("changed: a range is no longer the whole file")
PY
