"""A disk cache of blocks that came over the network, least recently used first out.

A file is named by the hash of its key. Several processes may share the folder: a file is complete
or absent, and a file that another process has deleted is fetched again.
"""

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from distilcache.data.errors import tell
from distilcache.data.storage.files import temporary_of

ROOM = 0.1
"""Fraction of the limit that is freed at a time, so that not every new file lists the folder."""
SHARE = ROOM / 4
"""Fraction of the limit after which the folder is listed again: other processes write, too."""


class KeptBlocks:
    """Bytes by key, at most ``limit`` in all.

    Args:
        folder: Has nothing else in it; made if it does not exist.
        limit: Bytes; 0: keep nothing.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._lock = threading.Lock()
        self._bytes = 0
        self._written = 0  # since the folder was listed
        if limit:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
            self._list()

    def get(self, key: str, fetch: Callable[[], bytes]) -> bytes:
        """The bytes kept under a key; if there are none, those of ``fetch``, which are then kept.

        If the folder is full or read-only, nothing is kept and nothing fails.
        """
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            content = fetch()
        else:
            with contextlib.suppress(OSError):  # It belongs to someone else.
                os.utime(path)
            return content
        if 0 < len(content) <= self._limit:
            self._keep(path, content)
        return content

    def forget(self, key: str) -> None:
        """Delete bytes that are damaged."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        return self._folder / hashlib.sha256(key.encode()).hexdigest()

    def _keep(self, path: Path, content: bytes) -> None:
        temporary = temporary_of(path)
        limit = self._limit
        try:
            with self._lock:
                if self._written >= limit * SHARE or self._bytes + len(content) > limit:
                    self._make_room(len(content))
                self._bytes += len(content)
                self._written += len(content)
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._lower(limit)

    def _lower(self, limit: int) -> None:
        """Keep less than now lies here, once the disk is full; ``limit`` is what was tried."""
        with self._lock:
            if self._limit == limit:  # else another thread has done so
                self._list()
                self._limit = min(limit, self._bytes)
                self._make_room(1)
                tell(
                    f"cache: the disk of {self._folder} is full: at most {self._limit / 1e9:.3g} GB"
                    " of blocks are kept; set DISTILCACHE_KEEP_GB to what there is room for",
                    about=f"full {self._folder}",
                )

    def _list(self) -> list[tuple[float, int, Path]]:
        """Count the bytes of all files; returns the files, the longest unused first."""
        files = sorted(self._files())
        self._bytes = sum(size for _, size, _ in files)
        self._written = 0
        return files

    def _make_room(self, size: int) -> None:
        """List the folder; if it is full, delete files until ``size`` bytes and room are free."""
        files = self._list()
        if self._bytes + size <= self._limit:
            return
        for _, length, path in files:
            if self._bytes + size <= self._limit * (1 - ROOM):
                break
            with contextlib.suppress(OSError):
                path.unlink()
            self._bytes -= length

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, size and path of every file."""
        found = []
        with contextlib.suppress(OSError):  # no folder
            for path in list(self._folder.iterdir()):
                with contextlib.suppress(OSError):  # another process deleted it
                    status = path.stat()
                    found.append((status.st_mtime, status.st_size, path))
        return found
