"""Objects under an s3:// URL of a real server."""

import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import compress

import pytest

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.publish import publish_cache
from distilcache.data.errors import UserError
from distilcache.data.storage import attempts
from distilcache.data.storage.remote import Remote
from tests import swift
from tests.proxy import CuttingProxy

s3fs = pytest.importorskip("s3fs", reason="needs the package s3fs (extra s3)")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(swift.missing()), reason=swift.missing() or ""),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = swift.SwiftServer(tmp_path_factory.mktemp("swift"))
    server.start()
    Remote("s3://cache", **server.options)._fs.mkdir("cache")
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(attempts, "PAUSE", 0.01)


def test_objects_come_and_go(server):
    place = Remote("s3://cache/one", **server.options)
    assert place.sizes("shards") == {}
    assert place.size("shards/a") is None
    content = bytes(range(256)) * 1000
    assert place.publish("shards/a", content)
    assert not place.publish("shards/a", b"other")
    assert place.read("shards/a") == content
    assert place.read("shards/a", 1000, 5000) == content[1000:6000]
    assert place.size("shards/a") == len(content)
    assert place.sizes("shards") == {"shards/a": len(content)}
    place.replace("shards/a", b"x")
    assert place.read("shards/a") == b"x"
    place.remove("shards/a")
    with pytest.raises(FileNotFoundError):
        place.read("shards/a")


def test_a_large_object_in_several_parts_is_exclusive_too(server):
    place = Remote("s3://cache/large", **server.options)
    content = bytes(120 << 20)
    assert place.publish("shard", content)
    assert not place.publish("shard", content[: 110 << 20])
    assert place.size("shard") == len(content)


def test_writers_at_once_leave_one_whole_object(server):
    """A server may let several through that ask in the same instant; for shards they are equal."""
    place = Remote("s3://cache/race", **server.options)
    contents = [bytes([i]) * 50_000 for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        wins = pool.map(lambda content: place.publish("shard", content), contents)
    assert place.read("shard") in compress(contents, wins)


@pytest.mark.parametrize(
    ("url", "changes", "reason"),
    [
        ("s3://cache/a", {"secret": "wrong"}, "signature|Forbidden"),
        ("s3://nonesuch/a", {}, "bucket"),
        ("s3://cache/a", {"client_kwargs": {"endpoint_url": "http://127.0.0.1:9"}}, "connect"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(server, monkeypatch, url, changes, reason):
    monkeypatch.setattr(attempts, "ATTEMPTS", 2)
    place = Remote(url, **{**server.options, **changes, "skip_instance_cache": True})
    with pytest.raises(UserError, match=f"(?i)must be writable, got: .*({reason})") as caught:
        place.publish("x", b"x")
    assert "\n" not in str(caught.value)


def test_a_server_that_comes_back_is_waited_for(server, monkeypatch):
    monkeypatch.setattr(attempts, "PAUSE", 0.5)
    place = Remote("s3://cache/back", **server.options)
    place.publish("a", b"0123456789")
    proxy = server._running[-1]
    subprocess.run(["kill", "-STOP", f"-{proxy.pid}"], check=False)
    timer = threading.Timer(1.0, subprocess.run, [["kill", "-CONT", "--", f"-{proxy.pid}"]])
    timer.start()
    assert place.read("a", 3, 4) == b"3456"
    timer.join()


@pytest.fixture
def proxy(server, monkeypatch, tmp_path):
    """Every command of this test reaches the server through it."""
    proxy = CuttingProxy(server.port)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # ours is the trying again
    monkeypatch.setenv("DISTILCACHE_HOME", str(tmp_path / "home"))
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    yield proxy
    proxy.close()
    s3fs.S3FileSystem.clear_instance_cache()


def test_dropped_connections_cost_no_block(server, proxy, small_cache):
    local, url = Cache.open(small_cache()), "s3://cache/dropped"
    proxy.cuts, proxy.up_to = 4, 20_000
    publish_cache(local.path, Remote(url), lambda size: None)
    assert proxy.dropped == 4  # in mid-upload
    place = Remote(url)
    for path in sorted(local.path.rglob("*")):
        if path.is_file():
            assert place.read(path.relative_to(local.path).as_posix()) == path.read_bytes()
    proxy.cuts, proxy.up_to = 4, 1_000
    away = Cache.open(url)
    for block in range(local.num_blocks):
        mine, theirs = local.read_block(block), away.read_block(block)
        assert all((mine[name] == theirs[name]).all() for name in mine)
    assert proxy.dropped == 8  # in mid-read


def test_an_upload_that_never_succeeds_leaves_no_shard(server, proxy, small_cache, monkeypatch):
    monkeypatch.setattr(attempts, "ATTEMPTS", 2)
    local, url = Cache.open(small_cache()), "s3://cache/never"
    place = Remote(url, **server.options)
    proxy.cuts, proxy.up_to = 10_000, 8_000  # what is larger does not pass
    with pytest.raises(UserError, match="must be writable") as caught:
        publish_cache(local.path, Remote(url), lambda size: None)
    assert "\n" not in str(caught.value)
    proxy.cuts = 0
    assert place.size("manifest.json") is None
    sizes = place.sizes("")
    assert sizes  # small files get there
    assert sizes == {name: (local.path / name).stat().st_size for name in sizes}
    publish_cache(local.path, Remote(url), lambda size: None)
    assert Cache.open(url).manifest == local.manifest
