"""Locks: one owner at a time, nothing left behind, and file systems that have none."""

import errno
import fcntl
import os
import stat
import threading
from contextlib import ExitStack, closing

import pytest

from distilcache.data.errors import InUse, UserError
from distilcache.data.storage import locks
from distilcache.data.storage.files import temporary_of
from distilcache.data.storage.locks import claimed, in_use, joined, locked, new_output, sole_writer
from distilcache.stages.teacher_cache.engines.shard_locks import ShardLocks


@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
    monkeypatch.setattr("distilcache.data.errors._printed", set())


def test_one_run_at_a_time_and_nothing_is_left(tmp_path):
    assert not in_use(tmp_path)
    with locked(tmp_path, "train"):
        assert in_use(tmp_path)
        with pytest.raises(InUse, match="train: output must not be in use"), locked(
            tmp_path, "train"
        ):  # fmt: skip
            pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".lock").touch()  # of a run that was killed
    assert not in_use(tmp_path)
    with locked(tmp_path, "train"):
        assert in_use(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_who_shares_a_lock_does_not_take_it_away_from_others(tmp_path):
    with locked(tmp_path, "cache", shared=True):
        with locked(tmp_path, "cache", shared=True):
            pass
        with pytest.raises(InUse), locked(tmp_path, "cache"):
            pass
    with locked(tmp_path, "cache"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_goes_and_nothing_else(tmp_path):
    out = tmp_path / "model"
    left = [temporary_of(out), temporary_of(out)]
    left[0].mkdir()
    (left[0] / "weights").write_bytes(b"half")
    left[1].write_bytes(b"half")
    (tmp_path / ".model.lock").touch()
    others = [temporary_of(tmp_path / "model.v2"), tmp_path / ".model.notes.tmp", tmp_path / ".x"]
    for other in others:
        other.write_bytes(b"of others")
    with new_output(out, "export", "folder") as part:
        assert not any(path.exists() for path in left)
        with (
            pytest.raises(InUse, match=r"export: output must not be in use, got .*/model, "),
            sole_writer(out, "export"),
        ):
            pass
        assert part.is_dir()
    assert sorted(tmp_path.iterdir()) == sorted([out, *others])


def test_an_output_that_came_meanwhile_is_left_alone(tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    (out / "theirs").touch()
    with (
        pytest.raises(UserError, match=r"convert: OUT must be new, got .*/model, which is there"),
        new_output(out, "convert", "OUT"),
    ):
        pytest.fail("it would be replaced")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "theirs"]


def test_a_run_that_is_ending_is_waited_for(tmp_path):
    last = ExitStack()
    last.enter_context(locked(tmp_path, "train"))
    threading.Timer(0.2, last.close).start()
    with locked(tmp_path, "train", patience=30.0):
        assert in_use(tmp_path)


def as_on_a_network(monkeypatch):
    """Exclusive locks need a plain file that is open for writing, shared ones one for reading."""
    flock, lockf = fcntl.flock, fcntl.lockf

    def check(descriptor):
        writes = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        if not writes or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", lambda fd, how: check(fd) or flock(fd, how))
    monkeypatch.setattr(fcntl, "lockf", lambda fd, *how: check(fd) or lockf(fd, *how))


def every_lock(folder):
    """Takes each kind of lock once."""
    with locked(folder, "train"):
        pass
    with locked(folder, "cache", shared=True), joined(folder), claimed(folder / "task") as free:
        assert free
    with closing(ShardLocks(folder)) as shards:
        assert shards.take(3)
        shards.wait_for(3)


def test_every_lock_is_of_a_file_that_is_open_for_writing(tmp_path, monkeypatch):
    as_on_a_network(monkeypatch)
    every_lock(tmp_path)
    with locked(tmp_path, "train"), pytest.raises(InUse), locked(tmp_path, "train"):
        pass


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOTSUP", "ENOSYS"])
def test_without_locks_one_line_says_so(tmp_path, monkeypatch, capsys, name):
    def fail(*_):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(fcntl, "flock", fail)
    monkeypatch.setattr(fcntl, "lockf", fail)
    every_lock(tmp_path)
    assert not in_use(tmp_path)
    assert capsys.readouterr().err.splitlines() == [
        "storage: this file system has no locks; start one command at a time in one folder"
    ]


def test_a_lock_that_fails_is_not_taken_for_none(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match=r"\.lock must be a file that can be locked, got: Bad"):
        every_lock(tmp_path)


def test_a_lock_file_of_another_user(tmp_path, monkeypatch):
    """Who may write into the folder may not write into it. Its user has the lock, or left it."""
    opened = os.open

    def refuse(path, how, *mode):
        if how & os.O_ACCMODE == os.O_RDWR and os.path.exists(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, how, *mode)

    other = ExitStack()
    other.enter_context(locked(tmp_path, "cache"))
    monkeypatch.setattr(locks.os, "open", refuse)
    assert in_use(tmp_path)
    for shared in (False, True):
        with pytest.raises(InUse), locked(tmp_path, "cache", shared=shared):
            pass
    other.close()
    for shared in (False, True):
        (tmp_path / ".lock").touch()
        assert not in_use(tmp_path)
        with locked(tmp_path, "cache", shared=shared):
            assert in_use(tmp_path) is not shared
            with pytest.raises(InUse), locked(tmp_path, "cache"):
                pass
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def fail(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(locks.os, "open", fail)
    with pytest.raises(UserError, match=r"\.lock must be writable, got: Permission denied"):
        every_lock(tmp_path)
