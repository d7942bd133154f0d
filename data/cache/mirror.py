"""Reading a cache under a URL: a local copy of its small files, blocks by range.

The local copy (mirror) has the manifest, the index and the teacher. They are fetched once and
compared with the hashes in the manifest. Blocks are fetched when they are needed, and kept for the
next epoch up to a limit. ``DISTILCACHE_HOME`` sets the folder (``~/.cache/distilcache``),
``DISTILCACHE_KEEP_GB`` the limit in 10^9 bytes (50).
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from distilcache.data.cache.manifest import CacheManifest
from distilcache.data.cache.shards import BlockEntry, check_frame
from distilcache.data.errors import UserError, require
from distilcache.data.storage.files import read_json, sha256_file, unwritable, write_bytes
from distilcache.data.storage.kept_blocks import KeptBlocks
from distilcache.data.storage.remote import Remote

KEEP_GB = 50.0
STARTS = 3
"""How often fetching begins where a publish exchanges the files meanwhile."""


class _Other(UserError):
    """A file that is not the manifest's."""


def home() -> Path:
    """The folder for everything that this machine has fetched."""
    named = os.environ.get("DISTILCACHE_HOME")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "distilcache"


def mirror(url: str, *, anew: bool = False) -> Path:
    """Fetch the small files of a finished cache; those that are here already, only ``anew``.

    Returns:
        The local folder with these files.

    Raises:
        UserError: There is no finished cache, or a file cannot be fetched or has another hash
            than the manifest says.
    """
    place, folder = Remote(url), mirror_folder(url)
    content = _manifest(place)
    for start in range(1, STARTS + 1):
        try:
            _fill(place, folder, content, anew)
        except _Other:
            before, content = content, _manifest(place)
            if content == before or start == STARTS:
                raise
        else:
            break
    return folder


def _manifest(place: Remote) -> bytes:
    """The content of the manifest at a URL."""
    try:
        return place.read("manifest.json")
    except FileNotFoundError:
        begun = place.size("provenance.json") is not None
        found = "an unfinished one" if begun else "none"
        raise UserError(
            f"cache: {place.url} must hold a finished teacher cache, got {found}; publish it with "
            "distilcache publish once teacher-cache has finished"
        ) from None


def _fill(place: Remote, folder: Path, content: bytes, anew: bool) -> None:
    """Fetch what a manifest of this content lists, into the mirror."""
    path = folder / "manifest.json"
    if not _is_here(path, hashlib.sha256(content).hexdigest()):
        with _in_home(path):
            write_bytes(path, content)
    manifest = CacheManifest.from_dict(read_json(path, "cache: manifest"))
    wanted = {"index.arrow": manifest.index_sha256}
    wanted |= {f"teacher/{name}": sha256 for name, sha256 in manifest.teacher_files.items()}
    for name, sha256 in wanted.items():
        if anew or not _is_here(folder / name, sha256):
            _fetch(place, name, folder / name, sha256)
    # The files of another cache that was there before could mix with these, say of a tokenizer.
    for path in (folder / "teacher").iterdir():
        if path.is_file() and path.name[0] != "." and path.name not in manifest.teacher_files:
            with _in_home(path):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _in_home(path: Path) -> Iterator[None]:
    """Let an error of writing a file of the mirror name what sets its folder."""
    try:
        yield
    except (OSError, UserError) as error:
        line = str(unwritable(path, error) if isinstance(error, OSError) else error)
        raise UserError(
            f"{line.partition('; ')[0]}; set DISTILCACHE_HOME to a folder with room that can be "
            "written, then repeat the command"
        ) from None


def _is_here(path: Path, sha256: str) -> bool:
    return path.exists() and sha256_file(path) == sha256


def _fetch(place: Remote, name: str, path: Path, sha256: str) -> None:
    """Fetch one file; a damaged one is refused, and what is here stays."""
    try:
        content = place.read(name)
    except FileNotFoundError:
        content = b""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise _Other(
            f"cache: {place.url}/{name} must have sha256 {sha256[:16]}, got {found[:16]}; delete "
            "it there and repeat distilcache publish, or, if a publish is under way, wait for it"
        )
    with _in_home(path):
        write_bytes(path, content)


def mirror_folder(url: str) -> Path:
    """Folder of the mirror of a URL."""
    return home() / "mirrors" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:32]


def remote_frames(url: str, folder: Path) -> Callable[[Path, BlockEntry], bytes]:
    """A function that reads blocks of a mirrored cache; several threads may call it.

    Checksums are compared: a damaged block on this disk is fetched again, and a block that arrives
    damaged is refused.
    """

    @functools.cache
    def opened(process: int) -> tuple[Remote, KeptBlocks]:
        """Once per process: connections and locks do not survive a fork."""
        return Remote(url), KeptBlocks(home() / "blocks", int(_keep_gb() * 1e9))

    opened(os.getpid())

    def frame(tar: Path, entry: BlockEntry) -> bytes:
        place, kept = opened(os.getpid())
        name = tar.relative_to(folder).as_posix()
        # With the checksum, since the object may be replaced by another.
        key = f"{place.url}/{name} {entry.offset} {entry.size} {entry.crc32}"

        def fetch() -> bytes:
            try:
                return place.read(name, entry.offset, entry.size)
            except FileNotFoundError:
                raise UserError(
                    f"cache: shard {tar.name} must be there, got none at {place.url}/{name}; "
                    "publish the cache again"
                ) from None

        content = kept.get(key, fetch)
        try:
            check_frame(tar, entry, content)
        except UserError:
            kept.forget(key)
            content = fetch()
            check_frame(tar, entry, content)
        return content

    return frame


def _keep_gb() -> float:
    text = os.environ.get("DISTILCACHE_KEEP_GB", str(KEEP_GB))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    require(
        0 <= value < float("inf"),
        f"cache: DISTILCACHE_KEEP_GB must be a number of gigabytes from 0 on, got {text!r}",
    )
    return value
