#!/usr/bin/env bash
# webdataset.WebDataset(urls, cache_dir=...) keeps a copy of each remote shard. One expects the
# copy to go by the whole URL. It goes by what follows the last slash, so shard-000000.tar of one
# data set is also shard-000000.tar of each other one that is read with the same cache_dir:
# validation after training, for instance. The second gives the first
# one's samples without a word. Give each data set a cache_dir of its own. (webdataset reads http
# through the program curl, which must be there.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q webdataset==1.0.2
cd "$work"
env -u http_proxy -u HTTP_PROXY "$work/venv/bin/python" - <<'PY'
import functools, http.server, io, os, sys, tarfile, threading
from importlib.metadata import version

import webdataset


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


for folder in ("train", "valid"):
    os.makedirs(f"remote/{folder}")
    with tarfile.open(f"remote/{folder}/shard-000000.tar", "w") as out:
        member = tarfile.TarInfo("0.txt")
        member.size = len(folder)
        out.addfile(member, io.BytesIO(folder.encode()))
server = http.server.ThreadingHTTPServer(
    ("127.0.0.1", 0), functools.partial(Quiet, directory="remote"))
threading.Thread(target=server.serve_forever, daemon=True).start()


def texts(**cache):
    found = []
    for folder in ("train", "valid"):
        if cache:
            os.makedirs(where := cache["cache_dir"].format(folder), exist_ok=True)
        url = f"http://127.0.0.1:{server.server_port}/{folder}/shard-000000.tar"
        samples = webdataset.WebDataset(url, shardshuffle=False,
                                        **({"cache_dir": where} if cache else {}))
        found += [sample["txt"].decode() for sample in samples]
    return found


seen = {"no cache_dir": texts(), "one cache_dir": texts(cache_dir="cache"),
        "one for each": texts(cache_dir="cache-{}")}
server.shutdown()
print(f"webdataset {version('webdataset')}")
print("expected: from .../train/shard-000000.tar and then .../valid/shard-000000.tar "
      "['train', 'valid']")
for name, found in seen.items():
    print(f"seen: {name:13s} {found}")
if seen.pop("one cache_dir") != ["train", "train"]:
    sys.exit("changed: the cache tells shards of one name apart")
if any(found != ["train", "valid"] for found in seen.values()):
    sys.exit("changed: another way mixes the shards")
PY
