"""Who does what where processes without a common parent build one cache.

Locks end with the process that holds them, however it ends. They work between processes of one
machine and on network file systems with locks; where there are none, some work is done twice, and
what is written is the same.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TURN, CLAIMS = ".turn", ".claims"
"""Names in the folder of a cache, as long as it is being built."""
HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Wait until no other process has its turn in ``folder``."""
    path = folder / TURN
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _lock(descriptor, fcntl.LOCK_EX, 1, 0)
        # The one before may have removed the file that this one has just locked.
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        except FileNotFoundError:
            pass
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


class Claims:
    """Numbered pieces of work that this process has taken: a byte range each of one file."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / CLAIMS
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)

    def take(self, number: int) -> bool:
        """Whether the piece is now this process's."""
        return _lock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)

    def wait_for(self, number: int) -> None:
        """Return once its holder has finished the piece or ended."""
        _lock(self._descriptor, fcntl.LOCK_EX, 1, number)
        self.release(number)

    def release(self, number: int) -> None:
        """Let others take the piece."""
        _lock(self._descriptor, fcntl.LOCK_UN, 1, number)

    def none_held(self) -> bool:
        """Whether no process holds any; gives up those of this one."""
        free = _lock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 0)
        _lock(self._descriptor, fcntl.LOCK_UN, 0, 0)
        return free

    def remove(self) -> None:
        """Delete the file; for the end of all work."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give up all claims."""
        os.close(self._descriptor)


def _lock(descriptor: int, operation: int, length: int, start: int) -> bool:
    """Lock bytes of a file; False where another process holds them."""
    try:
        fcntl.lockf(descriptor, operation, length, start)
    except OSError as error:
        return error.errno not in HELD  # others: a file system without locks
    return True
