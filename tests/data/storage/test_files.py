"""Files are whole or absent, after a power cut too."""

import errno
import os
import stat
from pathlib import Path

import pytest

from distilcache.data.errors import UserError
from distilcache.data.storage import files
from distilcache.data.storage.files import (
    make_folder,
    new_folder,
    read_at,
    read_json,
    sha256_file,
    sync_folder,
    sync_tree,
    write_atomically,
    write_bytes,
    write_json,
)
from tests.durability import node, recorded


def test_bytes_are_on_the_disk_before_the_name_and_the_folder_after(tmp_path, monkeypatch):
    with recorded(monkeypatch) as events:
        write_atomically(tmp_path / "new" / "file", lambda file: (file.write(b"x" * 9), None)[1])
    assert events.check() == {"file"}
    file, folder, above = (node(tmp_path / name) for name in ("new/file", "new", ""))
    assert [e[1:3] for e in events] == [
        ("sync", {above}),
        ("sync", {file}),
        ("name", {file}),
        ("sync", {folder}),
    ]


def test_new_folders_are_synced_all_the_way_up(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    make_folder(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    make_folder(tmp_path / "a" / "b" / "c")
    assert len(synced) == 3
    assert (tmp_path / "a" / "b" / "c").is_dir()


@pytest.mark.parametrize("call", ["open", "fsync"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES])
def test_where_folders_cannot_be_synced_files_are_written(tmp_path, monkeypatch, call, number):
    """As on network shares, and in folders that one may write but not list."""
    refuse_folders(monkeypatch, call, number)
    write_bytes(tmp_path / "new" / "file", b"x")
    with new_folder(tmp_path / "folder") as part:
        (part / "inner").mkdir()
    assert (tmp_path / "new" / "file").read_bytes() == b"x"
    assert (tmp_path / "folder" / "inner").is_dir()


def test_a_disk_that_fails_to_sync_a_folder_is_an_error(tmp_path, monkeypatch):
    refuse_folders(monkeypatch, "fsync", errno.EIO)
    with pytest.raises(UserError, match="must be writable, got: Input/output error"):
        write_bytes(tmp_path / "file", b"x")


def refuse_folders(monkeypatch, call, number):
    """Let ``os.open`` or ``os.fsync`` fail for folders alone."""
    own = getattr(os, call)

    def refused(file, *rest, **options):
        if stat.S_ISDIR(os.stat(file).st_mode):
            raise OSError(number, os.strerror(number))
        return own(file, *rest, **options)

    monkeypatch.setattr(os, call, refused)


def test_a_new_folder_is_whole_or_as_before(tmp_path, monkeypatch):
    place = tmp_path / "folder"
    for content in ("old", "new"):
        with recorded(monkeypatch) as events, new_folder(place) as part:
            assert not place.exists() or (place / "a").read_text() == "old"
            (part / "a").write_text(content)
        assert events.check() == {"folder"}
        assert (place / "a").read_text() == content
    with pytest.raises(KeyboardInterrupt), new_folder(place):
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="must be writable"), new_folder(place):
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "a"]


def test_a_long_range_is_read_in_pieces(tmp_path, monkeypatch):
    """The system returns at most 2 GiB at a time, and may return less."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 4)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 100), at))
    with path.open("rb") as file:
        assert read_at(file, 5, 700) == path.read_bytes()[5:705]
        assert read_at(file, 1000, 1 << 50) == path.read_bytes()[1000:]
        assert read_at(file, 2000, 10) == read_at(file, 5, 0) == b""


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_only_plain_files_are_opened(tmp_path, kind):
    """A device gives bytes without end, and a pipe waits for a writer."""
    path = tmp_path / "file.json"
    if kind == "device":
        path.symlink_to("/dev/null")  # /dev/zero would take all memory if this failed
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(UserError, match="must be a readable file, got .*: not a plain file"):
        read_json(path, "cache: manifest")
    with pytest.raises(OSError, match="not a plain file"):
        sha256_file(path)


def test_a_file_that_says_it_is_empty_is_read_no_further():
    """Where the system makes the content, the size is 0."""
    with pytest.raises(UserError, match="must be JSON"):
        read_json(Path("/proc/self/maps"), "cache: manifest")


def test_all_bytes_are_synced(tmp_path, monkeypatch):
    """Not those alone that Python had handed on: a file is flushed first."""
    sizes = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
        write_json(tmp_path / "a.json", {"a": 1})
    assert sizes[0] == (tmp_path / "a.json").stat().st_size > 0


def test_a_tree_is_synced_with_all_that_is_in_it(tmp_path, monkeypatch):
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    for name in ("one", "inner/two"):
        (tmp_path / "tree" / name).write_text(name)
    with recorded(monkeypatch) as events:
        sync_tree(tmp_path / "tree")
        (tmp_path / "tree").rename(tmp_path / "named")
        sync_folder(tmp_path)
    assert events.check() == {"named"}


def test_the_recorder_sees_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with recorded(monkeypatch) as events:
        (tmp_path / "file").rename(tmp_path / "named")
    with pytest.raises(AssertionError, match="before its bytes"):
        events.check()
    with recorded(monkeypatch) as events, (tmp_path / "named").open() as file:
        os.fsync(file.fileno())
        (tmp_path / "named").rename(tmp_path / "again")
    with pytest.raises(AssertionError, match="never synced"):
        events.check()
