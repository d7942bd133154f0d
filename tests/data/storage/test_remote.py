"""Objects under a URL: exclusive publishing, ranges, retries; the server is a process-wide dict."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from pathlib import Path

import pytest
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

from distilcache.data.errors import UserError
from distilcache.data.storage import attempts
from distilcache.data.storage.remote import Remote, is_url, located


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(attempts, "PAUSE", 0.001)


@pytest.fixture
def place():
    return Remote(f"memory://{uuid.uuid4()}")


def test_what_is_a_url():
    assert is_url("s3://bucket/cache")
    assert is_url("https://host/cache")
    assert not any(map(is_url, ("runs/cache", "/runs/cache", "file:///runs/cache", "C:\\runs")))


def test_a_file_url_is_a_path():
    assert located("file:///runs/my%20cache") == Path("/runs/my cache")
    assert located("file://localhost/runs/cache") == located("/runs/cache") == Path("/runs/cache")
    assert located("file:/runs/cache") == located("local:///runs/cache") == Path("/runs/cache")
    assert located(Path("runs/cache")) == Path("runs/cache")
    assert located("s3://bucket/cache") == "s3://bucket/cache"


def test_an_object_is_published_once(place):
    assert place.size("shards/a.tar") is None
    assert place.publish("shards/a.tar", b"0123456789")
    assert not place.publish("shards/a.tar", b"other")
    assert place.read("shards/a.tar") == b"0123456789"
    assert place.read("shards/a.tar", 3, 4) == b"3456"
    assert place.read("shards/a.tar", 3, 0) == b""
    assert place.size("shards/a.tar") == 10
    place.replace("shards/a.tar", b"new")
    assert place.read("shards/a.tar") == b"new"
    place.remove("shards/a.tar")
    place.remove("shards/a.tar")
    assert place.size("shards/a.tar") is None


def test_a_range_beyond_the_end_is_of_an_object_that_is_cut_off(place, monkeypatch):
    monkeypatch.setattr(attempts, "ATTEMPTS", 1)
    place.publish("a.tar", b"0123456789")
    with pytest.raises(UserError, match=r"/a\.tar must be whole, got 2 of 9 bytes at 8: it is cut"):
        place.read("a.tar", 8, 9)


def test_a_server_that_tells_no_size_gives_one_line(place, monkeypatch):
    """fsspec's http gives None for one that does not say how long its answers are."""
    place.publish("a.tar", b"0123456789")
    monkeypatch.setattr(place._fs, "info", lambda path: {"name": path, "size": None})
    with pytest.raises(UserError, match=r"/a\.tar must be of a size that the server tells, got"):
        place.size("a.tar")


def test_a_server_that_sends_all_for_a_part_is_asked_once(place, monkeypatch):
    """It knows no ranges, and each block would cost the whole tar, six times."""
    place.publish("a.tar", b"0123456789")
    calls = count(place, monkeypatch, "cat_file")
    own = place._fs.cat_file
    monkeypatch.setattr(place._fs, "cat_file", lambda path, start=None, end=None: own(path))
    with pytest.raises(UserError, match="answers requests for part of a file, got 10 bytes for 4"):
        place.read("a.tar", 2, 4)
    assert len(calls) == 1
    assert place.read("a.tar", 0, 10) == b"0123456789"


class Answer(Exception):
    """As the errors of aiohttp: with the status that the server answered."""

    def __init__(self, status):
        self.status = status


def absent(cause):
    """What fsspec's http makes of any error."""
    error = FileNotFoundError("https://host/a")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("cause", [Answer(503), ConnectionError("reset"), TimeoutError("late")])
def test_a_server_that_fails_does_not_say_that_there_is_nothing(place, monkeypatch, cause):
    place.publish("a", b"0123456789")
    calls = count(place, monkeypatch, "info", [(False, absent(cause))] * 2)
    assert place.size("a") == 10
    assert len(calls) == 3
    count(place, monkeypatch, "info", [(False, absent(cause))] * 9)
    with pytest.raises(UserError, match=f"/a must be readable, got: {type(cause).__name__}"):
        place.size("a")


@pytest.mark.parametrize("cause", [Answer(404), KeyError("a"), OSError(2, "none"), None])
def test_a_server_that_has_no_object_is_asked_once(place, monkeypatch, cause):
    calls = count(place, monkeypatch, "info", [(False, absent(cause))])
    assert place.size("a") is None
    assert len(calls) == 1


def test_who_writes_first_wins_where_the_client_has_a_method_of_its_own(place, monkeypatch):
    """Asynchronous clients, as of s3:// and gs://, have it by another name."""

    class Store(AsyncFileSystem):
        protocol = "store"
        cachable = False

        async def _pipe_file(self, path, value, mode="overwrite", **options):
            raise FileExistsError if mode == "create" else NotImplementedError

    class Web(Store):  # whose PUT overwrites
        protocol = ("http", "https")

    class Reader(AsyncFileSystem):
        cachable = False

    class Plain(AbstractFileSystem):
        cachable = False

    assert place.exclusive
    kinds = {Store: True, Web: False, Reader: False, Plain: False}
    for kind, exclusive in kinds.items():
        monkeypatch.setattr(place, "_fs", kind())
        assert place.exclusive == exclusive, kind
    monkeypatch.setattr(place, "_fs", Store())
    assert not place.publish("a", b"x")


def test_names_are_relative(place):
    assert place.sizes("shards") == {}
    for name in ("shards/r00/b.json", "shards/r00/a.tar", "manifest.json"):
        place.publish(name, b"x")
    assert place.sizes("shards") == {"shards/r00/a.tar": 1, "shards/r00/b.json": 1}


def test_no_object_is_not_retried(place, monkeypatch):
    calls = count(place, monkeypatch, "cat_file")
    with pytest.raises(FileNotFoundError):
        place.read("none")
    assert len(calls) == 1


def count(place, monkeypatch, name, faults=()):
    """Count the calls of a method of the filesystem; the first ones raise ``faults``."""
    inner, calls, left = getattr(place._fs, name), [], list(faults)

    def method(*args, **kwargs):
        calls.append(args)
        if left:
            after, error = left.pop(0)
            if after:
                inner(*args, **kwargs)
            raise error
        return inner(*args, **kwargs)

    monkeypatch.setattr(place._fs, name, method)
    return calls


def test_a_dropped_connection_is_tried_again(place, monkeypatch):
    place.publish("a", b"0123456789")
    faults = [(False, ConnectionError("reset")), (False, TimeoutError("late"))]
    calls = count(place, monkeypatch, "cat_file", faults)
    assert place.read("a", 2, 3) == b"234"
    assert len(calls) == 3


def test_a_short_answer_is_tried_again_and_then_refused(place, monkeypatch):
    place.publish("a", b"0123456789")
    with pytest.raises(UserError, match="4 of 8 bytes at 6") as caught:
        place.read("a", 6, 8)
    assert "\n" not in str(caught.value)


def test_a_server_that_stays_away_gives_one_line(place, monkeypatch):
    calls = count(place, monkeypatch, "pipe_file", [(False, ConnectionError("no\nroute"))] * 99)
    with pytest.raises(UserError, match="must be writable, got: ConnectionError: no route"):
        place.publish("a", b"x")
    assert len(calls) == attempts.ATTEMPTS


def test_a_put_whose_answer_was_lost_counts(place, monkeypatch):
    count(place, monkeypatch, "pipe_file", [(True, ConnectionError("reset"))])
    assert not place.publish("a", b"x")  # there already: from the first try
    assert place.read("a") == b"x"


def test_denied_access_is_not_tried_again(place, monkeypatch):
    calls = count(place, monkeypatch, "pipe_file", [(False, PermissionError("Forbidden"))] * 9)
    with pytest.raises(UserError, match="Forbidden; check the URL"):
        place.publish("a", b"x")
    assert len(calls) == 1


def test_unknown_protocols_are_refused():
    with pytest.raises(UserError, match="must be a URL that fsspec can open"):
        Remote("nonesuch://bucket/a")


def test_of_two_writers_the_first_wins(place, monkeypatch):
    """A server looks and writes in one; the dict here needs a lock for that."""
    put, lock = place._fs.pipe_file, threading.Lock()

    def pipe_file(*args, **kwargs):
        with lock:
            return put(*args, **kwargs)

    monkeypatch.setattr(place._fs, "pipe_file", pipe_file)
    contents = [bytes([i]) * 100 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        wins = pool.map(lambda content: place.publish("race", content), contents)
    (winner,) = compress(contents, wins)
    assert place.read("race") == winner
