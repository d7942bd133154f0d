"""Copy a cache to a URL, so that it is complete there only once all of it is.

Order: provenance, teacher, shards (each its tar, then its marker), index, manifest. What is there
already is left as it is, so a repeated call does the rest, and several machines may publish parts
of one cache at once.
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
"""Shards on their way at once."""


def publish_cache(folder: Path, place: Remote, progress: Callable[[int], Any]) -> None:
    """Publish a finished cache.

    Args:
        folder: The cache.
        place: Where to; empty, or holding an earlier part of the same cache.
        progress: Called with the bytes of each file that is there.

    Raises:
        UserError: The cache is not finished, the place holds another one, or cannot be written.
    """
    cache = Cache.open(folder)
    progress(_settle_provenance(folder, place))
    held = set(place.names("teacher")) | set(place.names("shards"))
    first = [f"teacher/{name}" for name in sorted(cache.manifest.teacher_files)]
    with ThreadPoolExecutor(THREADS, "distilcache-publish") as pool:
        for names in ([[name] for name in first], _shards(folder)):
            for sizes in pool.map(lambda group: _put_group(folder, place, group, held), names):
                progress(sizes)
    progress(_put(folder, place, "index.arrow", replace=True))
    progress(_put(folder, place, "manifest.json", replace=True))


def total_bytes(folder: Path) -> int:
    """Bytes that :func:`publish_cache` counts in all, about."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _shards(folder: Path) -> Iterator[list[str]]:
    """Names of each shard's files: its tar, and the marker that commits it."""
    for marker in sorted((folder / "shards").rglob("shard-*.json")):
        name = marker.relative_to(folder).as_posix()
        yield [str(Path(name).with_suffix(".tar")), name]


def _settle_provenance(folder: Path, place: Remote) -> int:
    """Claim the place for this cache, or find that it is this cache's."""
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


def _put_group(folder: Path, place: Remote, names: list[str], held: set[str]) -> int:
    """Files in their order, those that the place has not got; returns their bytes.

    Of the weights, the provenance says what they are; of other files, that both caches were made
    alike, and not that they are the same: a calibration on another device is another codec.
    """
    if names[-1] in held:
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
    """A place must not come to hold parts of two caches, which nobody could read."""
    require(
        place.read(name) == content,
        f"storage: {place.url}/{name} must be this cache's, got that of another of the same "
        "settings; choose another URL, or delete it there and repeat the command",
    )
