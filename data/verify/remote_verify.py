"""Verify a cache under a URL: each shard is fetched, checked like a local one, and deleted."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from distilcache.data.cache.cache import Cache, read_manifest
from distilcache.data.cache.manifest import open_index
from distilcache.data.cache.mirror import mirror, mirror_folder
from distilcache.data.cache.shards import shard_path
from distilcache.data.errors import InUse, UserError, require
from distilcache.data.storage.files import write_bytes, write_json
from distilcache.data.storage.locks import claimed
from distilcache.data.storage.remote import Remote
from distilcache.data.verify.repair import RESTORED, plan_repair
from distilcache.data.verify.shard_check import Fault, marker_identity

MARKERS = 32
"""About so many are asked which cache they are of."""


@contextlib.contextmanager
def remote_shards(url: str, *, fast: bool = False) -> Iterator["RemoteShards"]:
    """The shards of a cache under a URL, for one command at a time, since each deletes its own.

    Raises:
        InUse: Another command has them.
        UserError: As :class:`RemoteShards`.
    """
    shards = mirror_folder(url) / "shards"
    with claimed(shards) as free:
        if not free:
            raise InUse(
                f"verify: {url} must not be in use, got another verify of it on this machine; wait "
                "for it"
            )
        shutil.rmtree(shards, ignore_errors=True)  # What a killed command left.
        yield RemoteShards(url, fast=fast)


class RemoteShards:
    """The shards of a finished cache under a URL, fetched one by one.

    Args:
        url: The cache.
        fast: Ask only for the sizes of tars; the local files have these sizes and no content. Of
            small files that are on this machine, too, sizes alone are compared.

    Raises:
        UserError: There is no finished cache, or a small file of it is damaged.
    """

    def __init__(self, url: str, *, fast: bool = False) -> None:
        self._place, self._fast = Remote(url), fast
        self.folder = mirror(url, anew=not fast)
        """Local folder with the small files, and with a shard while it is checked."""
        provenance = self.folder / "provenance.json"
        provenance.unlink(missing_ok=True)  # It may be gone at the URL.
        with contextlib.suppress(FileNotFoundError):
            write_bytes(provenance, self._place.read("provenance.json"))
        if fast:
            self._check_sizes()

    def _check_sizes(self) -> None:
        """Compare the small files with those on this machine, which have the right hashes."""
        names = [f"teacher/{name}" for name in read_manifest(self.folder).teacher_files]
        for name in ("index.arrow", *names):
            wanted, size = (self.folder / name).stat().st_size, self._place.size(name)
            found = "no file" if size is None else f"{size} bytes"
            require(
                size == wanted,
                f"cache: {self._place.url}/{name} must be {wanted} bytes, got {found}; delete it "
                "there and repeat distilcache publish",
            )

    @contextlib.contextmanager
    def fetch(self, tar: Path) -> Iterator[None]:
        """Keep tar and marker, if they exist, in the folder until this ends."""
        paths = tar, tar.with_suffix(".json")
        try:
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    if self._fast and path == tar:
                        self._hollow(path)
                    else:
                        write_bytes(path, self._place.read(self._name(path)))
            yield
        finally:
            for path in paths:
                path.unlink(missing_ok=True)

    def identities(self, folder: Path) -> Iterator[str]:
        """The caches that some markers name, evenly from all shards of the index."""
        try:
            index = open_index(folder / "index.arrow")
        except UserError:
            return
        cache = Cache(folder, read_manifest(folder), index)
        shards = [blocks.start for blocks in cache.shards()]
        for first in shards[:: max(1, len(shards) // MARKERS)]:
            entry = cache.entry(first)
            path = shard_path(folder, entry.round, entry.shard).with_suffix(".json")
            with contextlib.suppress(FileNotFoundError):
                write_bytes(path, self._place.read(self._name(path)))
            identity = marker_identity(path)
            path.unlink(missing_ok=True)
            if identity:
                yield identity

    def stamp(self, tar: Path) -> str:
        """Sizes and versions of tar and marker, without reading them; "": one is missing."""
        stamps = [self._place.stamp(self._name(path)) for path in (tar, tar.with_suffix(".json"))]
        return " ".join(stamps) if all(stamps) else ""

    def remove(self, faults: Iterable[Fault]) -> list[str]:
        """Delete files that are certainly damaged, so that ``publish`` uploads them again.

        Returns:
            Names of the files that were deleted or restored.
        """
        restores, damaged = plan_repair(self.folder, faults)
        done = []
        if restores:
            provenance = self.folder / "provenance.json"
            write_json(provenance, dict(read_manifest(self.folder).provenance))
            self._place.replace(provenance.name, provenance.read_bytes())
            done.append(RESTORED)
        for path in damaged:
            self._place.remove(self._name(path))
            done.append(self._name(path))
        return done

    def _hollow(self, path: Path) -> None:
        """Make a sparse file of the object's size."""
        size = self._place.size(self._name(path))
        if size is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(size)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()
