"""Copy a cache to a URL; it counts as complete there only when all of it is there.

Order: provenance, teacher, shards (each its tar, then its marker), index, manifest. Objects that
are there already are not changed, so a repeated call does the rest, and several machines may
publish the same cache at the same time.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import require
from distilcache.data.storage.remote import Remote

WEIGHTS = "model.safetensors"
THREADS = 4
"""Shards that are uploaded at the same time."""


def publish_cache(folder: Path, place: Remote, progress: Callable[[int], Any]) -> None:
    """Publish a finished cache.

    Args:
        folder: The cache.
        place: The URL; empty, or with some of the files of the same cache.
        progress: Called with the bytes of each file once it is there.

    Raises:
        UserError: The cache is not finished, another cache is at the URL, or it cannot be written.
    """
    cache = Cache.open(folder)
    progress(_settle_provenance(folder, place))
    there = set(place.names("teacher")) | set(place.names("shards"))
    first = [f"teacher/{name}" for name in sorted(cache.manifest.teacher_files)]
    with ThreadPoolExecutor(THREADS, "distilcache-publish") as pool:
        for names in ([[name] for name in first], _shards(folder)):
            for sizes in pool.map(lambda group: _put_group(folder, place, group, there), names):
                progress(sizes)
    progress(_put(folder, place, "index.arrow", replace=True))
    progress(_put(folder, place, "manifest.json", replace=True))


def total_bytes(folder: Path) -> int:
    """Approximate sum of the bytes that :func:`publish_cache` reports."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _shards(folder: Path) -> Iterator[list[str]]:
    """Names of the files of each shard: its tar, then its marker."""
    for marker in sorted((folder / "shards").rglob("shard-*.json")):
        name = marker.relative_to(folder).as_posix()
        yield [str(Path(name).with_suffix(".tar")), name]


def _settle_provenance(folder: Path, place: Remote) -> int:
    """Write the provenance first, or check that the one at the URL is of the same cache."""
    name = "provenance.json"
    content = (folder / name).read_bytes()
    if place.publish(name, content):
        return len(content)
    there = json.loads(place.read(name))
    require(
        isinstance(there, dict) and there.get("identity") == json.loads(content)["identity"],
        f"storage: {place.url} must be empty or hold this cache, got another provenance; choose "
        "another URL",
    )
    return len(content)


def _put_group(folder: Path, place: Remote, names: list[str], there: set[str]) -> int:
    """Upload the files that are not there yet, in order; returns the bytes of all.

    Equal provenance means equal weights, but only that the other files were made the same way: a
    calibration on another device gives another codec. So those are compared.
    """
    if names[-1] in there:
        if names[-1] != f"teacher/{WEIGHTS}":
            _require_same(place, names[-1], (folder / names[-1]).read_bytes())
        return sum((folder / name).stat().st_size for name in names)
    return sum(_put(folder, place, name) for name in names)


def _put(folder: Path, place: Remote, name: str, replace: bool = False) -> int:
    content = (folder / name).read_bytes()
    if replace:
        place.replace(name, content)
    elif not place.publish(name, content):
        size = place.size(name)
        require(
            size == len(content),
            f"storage: {place.url}/{name} must be {len(content)} bytes, got {size}, written by "
            "something else; delete it there and repeat the command",
        )
        _require_same(place, name, content)
    return len(content)


def _require_same(place: Remote, name: str, content: bytes) -> None:
    """Refuse to mix the files of two caches, which could not be read."""
    require(
        place.read(name) == content,
        f"storage: {place.url}/{name} must be this cache's, got that of another of the same "
        "settings; choose another URL, or delete it there and repeat the command",
    )
