"""The bounded cache of what came over the network."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distilcache.data.storage.kept_blocks import KeptBlocks


class Fetched:
    """Counts how often a key is fetched."""

    def __init__(self):
        self.keys = []

    def __call__(self, key, size=100):
        def fetch():
            self.keys.append(key)
            return key.encode().ljust(size, b".")

        return fetch


@pytest.fixture
def fetched():
    return Fetched()


def held(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_key_is_fetched_once(tmp_path, fetched):
    cache = KeptBlocks(tmp_path / "held", 1000)
    for _ in range(3):
        assert cache.get("a", fetched("a")) == b"a".ljust(100, b".")
    assert fetched.keys == ["a"]
    assert KeptBlocks(tmp_path / "held", 1000).get("a", fetched("a")).startswith(b"a")
    assert fetched.keys == ["a"]
    cache.forget("a")
    cache.get("a", fetched("a"))
    assert fetched.keys == ["a", "a"]


def test_a_file_of_someone_else_is_read(tmp_path, fetched, monkeypatch):
    def refused(path):
        raise PermissionError(1, "Operation not permitted")

    cache = KeptBlocks(tmp_path / "held", 1000)
    cache.get("a", fetched("a"))
    monkeypatch.setattr(os, "utime", refused)
    assert cache.get("a", fetched("a")) == b"a".ljust(100, b".")
    assert fetched.keys == ["a"]


def test_the_bound_holds_and_the_longest_unused_goes_first(tmp_path, fetched):
    folder = tmp_path / "held"
    cache = KeptBlocks(folder, 1000)
    for i in range(9):
        cache.get(f"{i}", fetched(f"{i}"))
        os.utime(cache._path(f"{i}"), (i, i))
    cache.get("0", fetched("0"))  # used just now
    for i in range(9, 40):
        cache.get(f"{i}", fetched(f"{i}"))
        assert held(folder) <= 1000
        if i == 12:
            fetched.keys.clear()
            cache.get("0", fetched("0"))
            cache.get("1", fetched("1"))
            assert fetched.keys == ["1"]


def test_nothing_is_kept_that_is_larger_than_the_bound(tmp_path, fetched):
    cache = KeptBlocks(tmp_path / "held", 50)
    assert len(cache.get("a", fetched("a"))) == 100
    assert not list((tmp_path / "held").iterdir())
    none = KeptBlocks(tmp_path / "none", 0)
    assert len(none.get("a", fetched("a"))) == 100
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_written_fails_nothing(tmp_path, fetched):
    (tmp_path / "file").write_bytes(b"")
    cache = KeptBlocks(tmp_path / "file", 1000)
    assert cache.get("a", fetched("a")).startswith(b"a")
    assert cache.get("a", fetched("a")).startswith(b"a")
    assert fetched.keys == ["a", "a"]


def test_threads_and_a_second_process_share_a_folder(tmp_path, fetched):
    caches = [KeptBlocks(tmp_path / "held", 2000) for _ in range(2)]

    def work(cache):
        for i in range(200):
            key = f"{i % 60}"  # more than both may hold
            assert cache.get(key, fetched(key)) == key.encode().ljust(100, b".")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, 3 * caches))
    assert held(tmp_path / "held") <= 2 * 2000


def test_the_bound_holds_for_all_processes_together(tmp_path, fetched):
    folder = tmp_path / "held"
    caches = [KeptBlocks(folder, 10_000) for _ in range(4)]
    most = 0
    for i in range(400):
        caches[i % 4].get(f"{i}", fetched(f"{i}"))
        most = max(most, held(folder))
    assert 9_000 <= most <= 11_500


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_less_is_kept_and_one_line_says_so(
    tmp_path, fetched, monkeypatch, capsys, number
):
    folder = tmp_path / "held"
    cache = KeptBlocks(folder, 10_000)
    for i in range(40):
        cache.get(f"{i}", fetched(f"{i}"))
    write = Path.write_bytes

    def full(path, content):
        if held(folder) + len(content) > 4_000:
            raise OSError(number, os.strerror(number))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    for i in range(40, 200):
        assert cache.get(f"{i}", fetched(f"{i}")).startswith(f"{i}".encode())
    assert 3_000 <= held(folder) <= 4_000
    assert cache.get("199", fetched("a new one")).startswith(b"199")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cache: the disk of {folder} is full: at most ")
    assert "DISTILCACHE_KEEP_GB" in line
