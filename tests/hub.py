"""A hub on this machine: folders ``OWNER/NAME`` as repositories of one commit, for its client.

It answers the client's own requests, as the hub's API documents them, so what is sent and fetched
is seen as the hub sees it. Every file is a regular one of a commit; large-file storage is left out.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
import yaml

COMMIT = "c" * 40
TOKEN = "hf_of_the_tests"


class _Hub(BaseHTTPRequestHandler):
    """What the client asks for: information, files, and parts of files."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, _, query = self.path.partition("?")
        path = unquote(path.strip("/"))
        if path.startswith("api/"):
            kind, owner, repo, *rest = path.removeprefix("api/").split("/")
            name = f"{owner}/{repo}" if kind == "models" else f"{kind}/{owner}/{repo}"
            return self._tell(name, rest, "recursive=true" in query.lower())
        name, _, file = path.partition("/resolve/")
        file = file if name.startswith("buckets/") else file.partition("/")[2]
        whole = self.server.folder / name / file
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

    def _tell(self, name, rest, recursive):
        """Information on a repository, or a listing: of all its files, or of one folder."""
        folder = self.server.folder / name
        if not folder.is_dir():
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if rest[:1] == ["revision"] and rest[1] not in ("main", self._head(name)):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if rest[:1] == ["tree"]:
            below = folder.joinpath(*rest[2:])
            if not below.is_dir():
                return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            found = sorted(below.rglob("*") if recursive else below.iterdir())
            return self._say(200, [_entry(path, folder) for path in found])
        said = {"id": name.removeprefix("datasets/"), "sha": self._head(name), "tags": []}
        said |= {"private": name in self.server.private, "gated": False}
        said["siblings"] = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
        return self._say(200, said)

    def _head(self, name):
        return self.server.heads.get(name, COMMIT)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0].removeprefix("/api/")
        if path == "validate-yaml":
            front = json.loads(body)["content"].split("---\n")[1]
            wrong = [] if isinstance(yaml.safe_load(front), dict) else [{"message": "no mapping"}]
            return self._say(400 if wrong else 200, {"errors": wrong, "warnings": []})
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._say(401, {"error": "Invalid credentials in Authorization header"})
        if path == "repos/create":
            return self._create(json.loads(body))
        kind, owner, repo, verb, branch = path.split("/")
        name = f"{owner}/{repo}" if kind == "models" else f"{kind}/{owner}/{repo}"
        if verb == "branch":
            self.server.branches.append(branch)
            return self._say(200, {})
        if verb == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self._say(200, {"files": [{"path": name, **plain} for name in names]})
        return self._commit(name, branch, body)

    def _create(self, asked):
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if asked.get("organization") == "other":
            return self._say(403, {"error": "You don't have the rights to create a model here"})
        there = (self.server.folder / name).is_dir()
        (self.server.folder / name).mkdir(parents=True, exist_ok=True)
        private = asked.get("private") or asked.get("visibility") == "private"
        if private and not there:
            self.server.private.add(name)
        return self._say(409 if there else 200, {"url": f"{self.server.url}/{name}", "name": name})

    def _commit(self, name, branch, body):
        """Lines of JSON: a header, then files in base64."""
        header, *entries = (json.loads(line) for line in body.splitlines())
        if header["value"].get("parentCommit", self._head(name)) != self._head(name):
            return self._say(412, {"error": "A commit has happened since. Please refresh"})
        files = {
            entry["value"]["path"]: base64.b64decode(entry["value"]["content"])
            for entry in entries
            if entry["key"] == "file"
        }
        for path, content in files.items():
            (self.server.folder / name / path).parent.mkdir(parents=True, exist_ok=True)
            (self.server.folder / name / path).write_bytes(content)
        self.server.commits.append((name, branch, header["value"]["summary"], sorted(files)))
        number = len(self.server.commits)
        commit = self.server.heads[name] = f"{number:040x}"
        url = f"{self.server.url}/{name}/commit/{commit}"
        return self._say(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def _say(self, code, values):
        self._answer(code, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _answer(self, code, body, headers):
        self.send_response(code)
        for name, value in {**headers, "X-Repo-Commit": COMMIT}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(path, folder):
    kind = "directory" if path.is_dir() else "file"
    size = 0 if path.is_dir() else path.stat().st_size
    return {"type": kind, "path": str(path.relative_to(folder)), "size": size, "oid": "0" * 40}


@contextmanager
def serving(folder):
    """The server of a folder: its ``url``, the files that were ``asked`` for, its ``commits``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.folder, server.asked = folder, []
    server.commits, server.branches, server.private, server.heads = [], [], set(), {}
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def hub_in(folder, downloads):
    """The same, and the client of this process asks it; ``downloads`` is where files come to."""
    constants = "huggingface_hub.constants"
    with serving(folder) as server, pytest.MonkeyPatch.context() as patch:
        files = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(f"{constants}.ENDPOINT", server.url)
        patch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr(f"{constants}.HF_HUB_CACHE", str(downloads))
        patch.setattr("transformers.utils.hub._hf_api", None)  # made once, for one place
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield server
