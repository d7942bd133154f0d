"""A hub on this machine: folders ``OWNER/NAME`` as repositories of one commit, for its client."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


class _Hub(BaseHTTPRequestHandler):
    """What the client asks for: information, files, and parts of files."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/models/"):
            return self._tell(path.removeprefix("api/models/").split("/"))
        name, _, file = path.partition("/resolve/")
        whole = self.server.folder / name / file.partition("/")[2]
        if not whole.is_file():
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = whole.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        self.server.asked.append((self.command, whole.name, asked))
        if asked is None or self.command == "HEAD":
            return self._answer(200, content, headers)
        first, last = asked.removeprefix("bytes=").split("-")
        part = content[int(first) : int(last or len(content)) + 1]
        span = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        return self._answer(206, part, {**headers, "Content-Range": span})

    def _tell(self, parts):
        folder = self.server.folder / "/".join(parts[:2])
        if not folder.is_dir():
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "revision" in parts and parts[3] not in ("main", COMMIT):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if "tree" in parts and parts[4:]:  # a folder in it
            return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        files = sorted(path for path in folder.iterdir())
        listed = [{"type": "file", "path": p.name, "size": p.stat().st_size} for p in files]
        said = {"id": "/".join(parts[:2]), "sha": COMMIT, "tags": [], "private": False}
        said["siblings"] = [{"rfilename": path.name} for path in files]
        body = [{**entry, "oid": "0" * 40} for entry in listed] if "tree" in parts else said
        return self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _answer(self, code, body, headers):
        self.send_response(code)
        for name, value in {**headers, "X-Repo-Commit": COMMIT}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving(folder):
    """The server of a folder: its ``url``, and the files that were ``asked`` for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.folder, server.asked = folder, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
