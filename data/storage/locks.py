"""Locks between processes: of folders, of tasks that several share. They end with their process.

A lock is one of a plain file, open for writing: network file systems refuse locks of folders, and
exclusive ones of files that are open for reading. A file that another user has left is opened for
reading, which others allow. Where a file system has no locks at all, one line says so, and every
lock is free.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from distilcache.data.errors import InUse, UserError, require, tell
from distilcache.data.storage.files import (
    make_folder,
    new_folder,
    remove_temporaries,
    remove_temporaries_of,
    unwritable,
)

FILE = ".lock"
"""In a folder that is in use; it goes with the last lock."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
"""Errors of file systems that have no locks."""
RETRY_SECONDS = 0.1


def taken(lock: Callable[..., None], path: Path, *how: int) -> bool:
    """Take a lock; where there are none, it counts as taken.

    Args:
        lock: ``fcntl.flock`` or ``fcntl.lockf``.
        path: The file, for error lines.
        how: Arguments of ``lock``.

    Returns:
        False where another process has it.

    Raises:
        UserError: The system fails to lock, though it has locks.
    """
    try:
        lock(*how)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in NO_LOCKS:
            raise UserError(
                f"storage: {path} must be a file that can be locked, got: {error.strerror}; delete "
                "it if no command is at work there, or choose another root"
            ) from None
        tell("storage: this file system has no locks; start one command at a time in one folder")
    return True


@contextlib.contextmanager
def locked(
    folder: Path, stage: str, *, shared: bool = False, patience: float = 0.0
) -> Iterator[None]:
    """Lock a folder, so that two runs do not write into it.

    Args:
        folder: Must exist.
        stage: Start of the error line.
        shared: Allow other runs that also ask for a shared lock.
        patience: Seconds to wait for another run to end.

    Raises:
        InUse: Another run has the lock.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + patience
    while (descriptor := _open_locked(folder / FILE, kind | fcntl.LOCK_NB)) is None:
        if time.monotonic() >= deadline:
            raise InUse(
                f"{stage}: output must not be in use, got {folder}, which another run is building; "
                "wait for it"
            )
        time.sleep(RETRY_SECONDS)
    with _held(folder / FILE, descriptor):
        yield


def in_use(folder: Path) -> bool:
    """Whether a run has the lock of a folder."""
    path = folder / FILE
    try:
        descriptor = _open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return not taken(fcntl.flock, path, descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def joined(folder: Path) -> Iterator[None]:
    """Let several runs write into one folder; the first one removes what killed runs left."""
    path = folder / FILE
    descriptor = _open_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if descriptor is None:
        descriptor = _open_locked(path, fcntl.LOCK_SH)
        assert descriptor is not None  # It waits.
    else:
        remove_temporaries(folder)
        taken(fcntl.flock, path, descriptor, fcntl.LOCK_SH)
    with _held(path, descriptor):
        yield


@contextlib.contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Lock one of the tasks that several runs share.

    Args:
        path: The file that the task makes; the lock is a hidden file beside it.
        wait: Wait until other runs have released the lock.

    Yields:
        Whether this run has the lock. Another run may have made the file before: check again.
    """
    claim = path.with_name(f".{path.name}.lock")
    try:
        make_folder(claim.parent)
    except OSError as error:
        raise unwritable(path, error) from None
    descriptor = _open_locked(claim, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), named=path)
    if descriptor is None:
        yield False
        return
    with _held(claim, descriptor):
        yield True


@contextlib.contextmanager
def sole_writer(path: Path, stage: str) -> Iterator[None]:
    """Let one run at a time make ``path``, in a folder of anyone's; what killed runs left goes.

    Raises:
        InUse: Another run is making it.
    """
    with claimed(path) as free:
        if not free:
            raise InUse(
                f"{stage}: output must not be in use, got {path}, which another run is writing; "
                "wait for it"
            )
        remove_temporaries_of(path)
        yield


def require_new(path: Path, what: str) -> None:
    """Refuse an output that is there already; ``what`` names the stage and the argument.

    Raises:
        UserError: It is there.
    """
    require(
        not os.path.lexists(path),
        f"{what} must be new, got {path}, which is there; move it away or name another",
    )


@contextlib.contextmanager
def new_output(path: Path, stage: str, what: str) -> Iterator[Path]:
    """A folder to fill that becomes ``path``, for one run at a time.

    Raises:
        UserError: Another run is making it, or has made it meanwhile; or it cannot be written.
    """
    with sole_writer(path, stage):
        require_new(path, f"{stage}: {what}")
        with new_folder(path) as part:
            yield part


def _open_locked(path: Path, operation: int, named: Path | None = None) -> int | None:
    """A locked descriptor of a file that is made for it; None: another process has the lock.

    Errors name ``named`` in place of the file.
    """
    while True:
        try:
            descriptor = _open(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise unwritable(named or path, error) from None
        ours = False
        try:
            if not taken(fcntl.flock, path, descriptor, operation):
                return None
            ours = _is_there(path, descriptor)
        finally:
            if not ours:
                os.close(descriptor)
        if ours:
            return descriptor


def _open(path: Path, how: int) -> int:
    try:
        return os.open(path, how, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY)


def _is_there(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one of that name: its last owner may have removed it."""
    try:
        found = os.fstat(descriptor)
        # On a network file system the name may be remembered after the file is gone.
        return found.st_nlink > 0 and os.path.samestat(found, path.stat())
    except OSError:
        return False


@contextlib.contextmanager
def _held(path: Path, descriptor: int) -> Iterator[None]:
    """Give up a lock at the end; the last one that has it removes the file."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if taken(fcntl.flock, path, descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                path.unlink(missing_ok=True)
        os.close(descriptor)
