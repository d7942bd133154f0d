"""Objects under an s3:// URL of a real server."""

import subprocess
import threading

import pytest

from data import remote
from data.errors import UserError
from data.remote import Remote
from tests import swift

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
    monkeypatch.setattr(remote, "PAUSE", 0.01)


def test_objects_come_and_go(server):
    place = Remote("s3://cache/one", **server.options)
    assert place.names("shards") == []
    assert place.size("shards/a") is None
    content = bytes(range(256)) * 1000
    assert place.publish("shards/a", content)
    assert not place.publish("shards/a", b"other")
    assert place.read("shards/a") == content
    assert place.read("shards/a", 1000, 5000) == content[1000:6000]
    assert place.size("shards/a") == len(content)
    assert place.names("shards") == ["shards/a"]
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
    place, wins = Remote("s3://cache/race", **server.options), []

    def write(content):
        wins.append((place.publish("shard", content), content))

    threads = [threading.Thread(target=write, args=(bytes([i]) * 50_000,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 4
    assert place.read("shard") in [content for won, content in wins if won]


@pytest.mark.parametrize(
    ("url", "changes", "reason"),
    [
        ("s3://cache/a", {"secret": "wrong"}, "signature|Forbidden"),
        ("s3://nonesuch/a", {}, "bucket"),
        ("s3://cache/a", {"client_kwargs": {"endpoint_url": "http://127.0.0.1:9"}}, "connect"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(server, monkeypatch, url, changes, reason):
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    place = Remote(url, **{**server.options, **changes, "skip_instance_cache": True})
    with pytest.raises(UserError, match=f"(?i)must be writable, got: .*({reason})") as caught:
        place.publish("x", b"x")
    assert "\n" not in str(caught.value)


def test_a_server_that_comes_back_is_waited_for(server, monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.5)
    place = Remote("s3://cache/back", **server.options)
    place.publish("a", b"0123456789")
    proxy = server._running[-1]
    subprocess.run(["kill", "-STOP", f"-{proxy.pid}"], check=False)
    timer = threading.Timer(1.0, subprocess.run, [["kill", "-CONT", "--", f"-{proxy.pid}"]])
    timer.start()
    assert place.read("a", 3, 4) == b"3456"
    timer.join()
