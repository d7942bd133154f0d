"""Locks of shards, so that several processes can build one cache.

Each worker locks the shard that it makes. A lock ends with its process, however that ends. Locks
work between processes of one machine, and on network file systems that support them. Elsewhere
some shards are made twice, and the result is the same.
"""

import fcntl
import os
from pathlib import Path

from distilcache.data.storage.files import remove_temporaries, unwritable
from distilcache.data.storage.locks import taken

FILE = ".shards.lock"
"""In the folder of a cache that is being built. It has one record per shard: the number of failed
attempts, a space, and the last reason; then how many tokens of it are made, as eight bytes. To lock
a shard is to lock its record."""
RECORD, TEXT = 256, 248
"""Bytes of a record, and of its text."""


class ShardLocks:
    """The locks of this process, and the failed attempts of all."""

    def __init__(self, cache: Path) -> None:
        self._path = cache / FILE
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)

    def take(self, number: int) -> bool:
        """Lock a shard; False where another process has it."""
        return self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, RECORD, number * RECORD)

    def wait_for(self, number: int) -> None:
        """Return once no other process has the shard."""
        self._lock(fcntl.LOCK_EX, RECORD, number * RECORD)
        self.release(number)

    def release(self, number: int) -> None:
        """Let others take the shard."""
        self._lock(fcntl.LOCK_UN, RECORD, number * RECORD)

    def failures(self, number: int) -> tuple[int, str]:
        """Number of failed attempts at a shard, and the last reason."""
        record = os.pread(self._descriptor, TEXT, number * RECORD).rstrip(b"\0")
        count, _, reason = record.decode(errors="ignore").partition(" ")
        return int(count or 0), reason

    def set_failures(self, number: int, count: int, reason: str) -> None:
        """Write what :meth:`failures` reads; only for the process that has the lock.

        Nothing of the shard counts as made then.
        """
        record = f"{count} {reason}".encode()[:TEXT].ljust(RECORD, b"\0")
        self._write(record, number * RECORD)

    def set_made(self, number: int, tokens: int) -> None:
        """Write what :func:`tokens_made` reads; only for the process that has the lock."""
        self._write(tokens.to_bytes(RECORD - TEXT), number * RECORD + TEXT)

    def forget_failures(self) -> None:
        """Forget failed attempts, unless another process is making a shard."""
        if self.all_free():
            os.ftruncate(self._descriptor, 0)

    def all_free(self) -> bool:
        """Whether no other process has a lock; this one gives up its own."""
        free = self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 0)
        self._lock(fcntl.LOCK_UN, 0, 0)
        return free

    def close(self) -> None:
        """Give up all locks."""
        os.close(self._descriptor)

    def _write(self, content: bytes, start: int) -> None:
        try:
            os.pwrite(self._descriptor, content, start)
        except OSError as error:
            raise unwritable(self._path, error) from None

    def _lock(self, operation: int, length: int, start: int) -> bool:
        return taken(fcntl.lockf, self._path, self._descriptor, operation, length, start)


def tokens_made(cache: Path) -> dict[int, int]:
    """How many tokens of a shard its worker has made, by number; without those of no tokens."""
    try:
        content = (cache / FILE).read_bytes()
    except OSError:
        return {}
    starts = range(TEXT, len(content), RECORD)
    made = {n: int.from_bytes(content[at : at + RECORD - TEXT]) for n, at in enumerate(starts)}
    return {number: tokens for number, tokens in made.items() if tokens}


def clear_leftovers(cache: Path) -> None:
    """Remove what killed runs have left in a cache; only while no worker makes a shard."""
    if (cache / "provenance.json").exists():  # else it is no cache
        remove_temporaries(cache)
        for path in cache.glob(".*.lock"):
            path.unlink(missing_ok=True)
