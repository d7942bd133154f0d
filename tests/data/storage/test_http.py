"""Shards over http: by this project's reader, and by plain webdataset."""

import contextlib
import http.server
import io
import shutil
import socketserver
import tarfile
import threading
from pathlib import Path

import pytest
import webdataset

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.frames import decode_block
from distilcache.data.cache.publish import publish_cache
from distilcache.data.errors import UserError
from distilcache.data.storage import attempts
from distilcache.data.storage.remote import Remote


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files, with ranges, as object stores and web servers do."""

    def log_message(self, *_):
        """Say nothing."""

    def do_GET(self):
        """A whole file or the asked-for range."""
        path, asked = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not path.is_file():
            return self.send_error(404)
        content, status = path.read_bytes(), 200
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            content = content[int(first) : int(last) + 1 if last else None]
            status = 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(content)
        return None


@pytest.fixture
def served(small_cache):
    folder = small_cache()

    class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads = True

    server = Server(("127.0.0.1", 0), lambda *a: Handler(*a, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_cache_is_read_over_http(served, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp", reason="needs the package aiohttp (extra http)")
    monkeypatch.setenv("DISTILCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(attempts, "PAUSE", 0.001)
    folder, url = served
    local, away = Cache.open(folder), Cache.open(url)
    for block in range(local.num_blocks):
        mine, theirs = local.read_block(block), away.read_block(block)
        assert all((mine[name] == theirs[name]).all() for name in mine)
    with pytest.raises(UserError, match="must be writable"):
        publish_cache(folder, Remote(url), lambda size: None)


@pytest.mark.skipif(not shutil.which("curl"), reason="webdataset reads http with curl")
def test_plain_webdataset_streams_the_same_shards(served):
    folder, url = served
    tars = sorted((folder / "shards").rglob("*.tar"))
    urls = [f"{url}/{tar.relative_to(folder).as_posix()}" for tar in tars]
    found = {
        sample["__key__"]: sample["arrow.zst"]
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    }
    wanted = {}
    for tar in tars:
        with tarfile.open(fileobj=io.BytesIO(tar.read_bytes())) as archive:
            for member in archive:
                frame = archive.extractfile(member).read()
                wanted[member.name.removesuffix(".arrow.zst")] = frame
    assert found == wanted
    assert all(len(decode_block(frame)[0]["lengths"]) for frame in found.values())
