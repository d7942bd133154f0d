"""Copy a cache to a URL; it counts as complete there only when all of it is there.

Order: provenance, teacher, shards (each its tar, then its marker), index, manifest. The provenance
of another machine that made the same cache is replaced just before the manifest. Other objects that
are there already are not changed, so a repeated call does the rest, and several machines may
publish the same cache at the same time. A repository of the Hugging Face hub gets all in one
commit. Where storage cannot create an object exclusively, one may publish at a time. What is sent
is hashed before: nothing damaged leaves.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distilcache.data.cache.cache import Cache, lacking
from distilcache.data.cache.manifest import CacheManifest
from distilcache.data.cache.shards import read_marker, shard_path
from distilcache.data.errors import UserError, require, tell
from distilcache.data.storage.files import sha256_file, sha256_json
from distilcache.data.storage.remote import Remote

WEIGHTS = "model.safetensors"
THREADS = 4
"""Shards that are uploaded at the same time."""
_MEND = "run distilcache verify --repair and teacher-cache, then publish again"


def publish_cache(folder: Path, place: Remote, progress: Callable[[int], Any]) -> None:
    """Publish a finished cache.

    Args:
        folder: The cache.
        place: The URL; empty, or with some of the files of the same cache.
        progress: Called with the bytes of each file once it is there.

    Raises:
        UserError: The cache is not finished, a file of it is missing or damaged, another cache is
            at the URL, or it cannot be written.
    """
    cache = Cache.open(folder)
    manifest = sha256_file(folder / "manifest.json")
    name = lacking(folder, cache.manifest)
    require(not name, f"cache: {folder / name} must be there as it was written, got none; {_MEND}")
    if place.repository is not None:
        progress(_commit(cache, place, manifest))
        return
    if not place.exclusive:
        tell(
            f"publish: {place.url}: this storage does not refuse to overwrite what another process "
            "is writing; let only one publish to it at a time"
        )
    _settle_provenance(cache, place)
    there = place.sizes("teacher") | place.sizes("shards")

    def put_teacher(item: tuple[str, str]) -> int:
        return _put_group(folder, place, {f"teacher/{item[0]}": item[1]}, there)

    def put_shard(blocks: range) -> int:
        return _put_group(folder, place, _shard(cache, blocks), there)

    with ThreadPoolExecutor(THREADS, "distilcache-publish") as pool:
        for size in pool.map(put_teacher, sorted(cache.manifest.teacher_files.items())):
            progress(size)
        for size in pool.map(put_shard, cache.shards()):
            progress(size)
    small = {
        "index.arrow": _read(folder, "index.arrow", cache.manifest.index_sha256),
        "provenance.json": _settle_provenance(cache, place),  # Another may have written since.
        "manifest.json": _read(folder, "manifest.json", manifest),
    }
    for name, content in small.items():
        place.replace(name, content)
        progress(len(content))


def _commit(cache: Cache, place: Remote, manifest: str) -> int:
    """All files in one commit, which is refused where there is a newer one than was looked at.

    ``manifest`` is the hash of the manifest. Returns the bytes of all.
    """
    parent = place.head()
    with contextlib.suppress(FileNotFoundError):  # No cache is there yet.
        _require_same_cache(cache, place)
    files = {f"teacher/{name}": sha256 for name, sha256 in cache.manifest.teacher_files.items()}
    for blocks in cache.shards():
        files |= _shard(cache, blocks)
    files |= {"index.arrow": cache.manifest.index_sha256, "manifest.json": manifest}
    for name, sha256 in files.items():
        _require_hash(cache.path / name, sha256_file(cache.path / name), sha256)
    paths = {name: cache.path / name for name in (_checked_provenance(cache), *files)}
    place.commit(paths, parent, f"Teacher cache {cache.manifest.fingerprint[:12]}")
    return sum(path.stat().st_size for path in paths.values())


def total_bytes(folder: Path) -> int:
    """Approximate sum of the bytes that :func:`publish_cache` reports."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _shard(cache: Cache, blocks: range) -> dict[str, str]:
    """Names and hashes of the files of the shard with these blocks, its tar, then its marker.

    Raises:
        UserError: The marker is damaged.
    """
    entries = [cache.entry(block) for block in blocks]
    tar = shard_path(cache.path, entries[0].round, entries[0].shard)
    path = tar.with_suffix(".json")
    sha256 = sha256_file(path)
    marker = read_marker(tar) or {}
    wanted = {
        "identity": sha256_json(cache.manifest.provenance["identity"]),
        "blocks": [asdict(entry) for entry in entries],
    }
    require(
        wanted.items() <= marker.items(),
        f"cache: {path} must be the marker of its rows in the index, got another; {_MEND}",
    )
    names = (file.relative_to(cache.path).as_posix() for file in (tar, path))
    return dict(zip(names, (str(marker["sha256"]), sha256), strict=True))


def _settle_provenance(cache: Cache, place: Remote) -> bytes:
    """Write the provenance, or check that the one at the URL is of the same cache; returns it."""
    name = _checked_provenance(cache)
    content = (cache.path / name).read_bytes()
    if not place.publish(name, content):
        _require_same_cache(cache, place)
    return content


def _checked_provenance(cache: Cache) -> str:
    """Its name; what it holds is the manifest's."""
    path = cache.path / "provenance.json"
    require(
        _values(path.read_bytes() if path.is_file() else b"") == cache.manifest.provenance,
        f"cache: {path} must be the manifest's provenance, got another or none; run distilcache "
        "verify --repair, which restores it",
    )
    return path.name


def _require_same_cache(cache: Cache, place: Remote) -> None:
    """Refuse a URL at which another cache is, or this one with more rounds.

    Raises:
        FileNotFoundError: None is there.
        UserError: Such a one is.
    """
    there = _values(place.read("provenance.json"))
    require(
        isinstance(there, dict) and there.get("identity") == cache.manifest.provenance["identity"],
        f"storage: {place.url} must be empty or hold this cache, got another provenance; choose "
        "another URL",
    )
    rounds = 0
    with contextlib.suppress(FileNotFoundError):
        content = place.read("manifest.json")
        with contextlib.suppress(UserError):  # A damaged one may be replaced.
            rounds = CacheManifest.from_dict(_values(content)).rounds
    require(
        rounds <= cache.manifest.rounds,
        f"storage: {place.url} must hold at most {cache.manifest.rounds} rounds, as many as "
        f"{cache.path}, got {rounds}; choose another URL, or delete manifest.json there",
    )


def _values(content: bytes) -> Any:
    """What a JSON file holds; None where it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _read(folder: Path, name: str, sha256: str) -> bytes:
    """The content of a file, which must have this hash."""
    content = (folder / name).read_bytes()
    _require_hash(folder / name, hashlib.sha256(content).hexdigest(), sha256)
    return content


def _require_hash(path: Path, found: str, sha256: str) -> None:
    require(
        found == sha256,
        f"cache: {path} must have sha256 {sha256[:16]}, got {found[:16]}: it is damaged; {_MEND}",
    )


def _put_group(
    folder: Path, place: Remote, files: Mapping[str, str], there: Mapping[str, int | None]
) -> int:
    """Upload the files that are not ``there`` yet, in order; returns the bytes of all.

    Those that are there must have the right size. Equal provenance means equal weights, but only
    that the other files were made the same way: a calibration on another device gives another
    codec. So those are compared.
    """
    if files.keys() <= there.keys():
        sizes = {name: (folder / name).stat().st_size for name in files}
        for name, size in sizes.items():
            _require_size(place, name, size, there[name])
        name, sha256 = list(files.items())[-1]
        if name != f"teacher/{WEIGHTS}":
            _require_same(place, name, _read(folder, name, sha256))
        return sum(sizes.values())
    return sum(_put(place, name, _read(folder, name, sha256)) for name, sha256 in files.items())


def _put(place: Remote, name: str, content: bytes) -> int:
    if not place.publish(name, content):
        _require_size(place, name, len(content), place.size(name))
        _require_same(place, name, content)
    return len(content)


def _require_size(place: Remote, name: str, wanted: int, found: int | None) -> None:
    require(
        found in (wanted, None),
        f"storage: {place.url}/{name} must be {wanted} bytes, got {found}: it is damaged, or was "
        "written by something else; delete it there and repeat the command",
    )


def _require_same(place: Remote, name: str, content: bytes) -> None:
    """Refuse to mix the files of two caches, which could not be read."""
    require(
        place.read(name) == content,
        f"storage: {place.url}/{name} must be this cache's, got that of another of the same "
        "settings; choose another URL, or delete it there and repeat the command",
    )
