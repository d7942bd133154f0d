#!/usr/bin/env bash
# Asking a web server through fsspec whether a file is there: exists(), info(), open(), glob(). One
# expects "no" and FileNotFoundError where the server says 404, and an error that names the trouble
# where it says 503 (busy), 429 (too many requests) or 403 (not allowed). All four say the same as
# for a missing file: False, FileNotFoundError, []. A loader that skips what is not there trains
# on fewer shards, and one that makes what is missing computes it again; a retry on server errors
# never begins. cat_file() and exists(url, strict=True) raise the server's answer. Ask with
# strict=True first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q fsspec==2026.9.0 aiohttp==3.14.5
cd "$work"
env -u http_proxy -u HTTP_PROXY "$work/venv/bin/python" - <<'PY'
import http.server, sys, threading

import aiohttp, fsspec


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers with the status that the address names."""

    def do_GET(self):
        status = int(self.path.strip("/"))
        body = b"data" if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
web = fsspec.filesystem("http")


def said(ask):
    try:
        return ask()
    except Exception as error:
        return f"{type(error).__name__} {getattr(error, 'status', '')}".strip()


print(f"fsspec {fsspec.__version__}, aiohttp {aiohttp.__version__}")
print("expected: 404 alone is a missing file; other answers are errors with their number")
usual, strict = {}, {}
for status in (200, 404, 503, 429, 403):
    url = f"http://127.0.0.1:{server.server_port}/{status}"
    usual[status] = {"exists": web.exists(url), "glob": [found == url for found in web.glob(url)],
                     "info": said(lambda: web.info(url)["size"]),
                     "open": said(lambda: web.open(url).read())}
    strict[status] = {"cat_file": said(lambda: web.cat_file(url)),
                      "strict": said(lambda: web.exists(url, strict=True))}
    print(f"seen: {status}: {usual[status]}; {strict[status]}")
if usual[200] != {"exists": True, "glob": [True], "info": 4, "open": b"data"}:
    sys.exit("changed: a file that is there")
if usual[404] != {"exists": False, "glob": [], "info": "FileNotFoundError",
                  "open": "FileNotFoundError"}:
    sys.exit("changed: a missing file")
for status in (503, 429, 403):
    if usual[status] != usual[404]:
        sys.exit(f"changed: {status} is no longer a missing file")
    if set(strict[status].values()) != {f"ClientResponseError {status}"}:
        sys.exit(f"changed: {status} with strict")
PY
