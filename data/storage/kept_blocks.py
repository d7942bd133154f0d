"""Blocks that came over the network, kept on disk within a bound for the next epoch.

Files are named by the hash of their key. The one that was used longest ago goes first. Several
processes may share a folder: a file is whole or absent, and one that another process has deleted
is fetched again.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

ROOM = 0.1
"""Share of the bound that is made free at a time, so that not every new file needs a listing."""


class ReadCache:
    """Bytes by key, at most ``limit`` in all.

    Args:
        folder: Holds nothing else; made where it is missing.
        limit: Bytes; 0: nothing is kept.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._lock = threading.Lock()
        self._held = 0
        if limit:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
            self._held = sum(size for _, size, _ in self._files())

    def get(self, key: str, fetch: Callable[[], bytes]) -> bytes:
        """What is kept under a key, else what ``fetch`` returns, which is kept from then on.

        A folder that is full or read-only keeps nothing, and nothing fails.
        """
        path = self._path(key)
        try:
            content = path.read_bytes()
            os.utime(path)
            return content
        except OSError:
            content = fetch()
        if 0 < len(content) <= self._limit:
            self._keep(path, content)
        return content

    def forget(self, key: str) -> None:
        """Drop what turned out to be damaged."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        return self._folder / hashlib.sha256(key.encode()).hexdigest()

    def _keep(self, path: Path, content: bytes) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            with self._lock:
                if self._held + len(content) > self._limit:
                    self._make_room(len(content))
                self._held += len(content)
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _make_room(self, size: int) -> None:
        """Delete the oldest until ``size`` more and some room fit; counts anew what is there."""
        files = sorted(self._files())
        self._held = sum(size for _, size, _ in files)
        for _, held, path in files:
            if self._held + size <= self._limit * (1 - ROOM):
                break
            with contextlib.suppress(OSError):
                path.unlink()
            self._held -= held

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, size and path of every file."""
        found = []
        with contextlib.suppress(OSError):  # no folder
            for path in list(self._folder.iterdir()):
                with contextlib.suppress(OSError):  # another process deleted it
                    status = path.stat()
                    found.append((status.st_mtime, status.st_size, path))
        return found
