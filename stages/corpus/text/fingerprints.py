"""What identifies the content of a source, by whatever path it is named.

fingerprint(source)  ->  {"sha256": ...}
unchanged(old, new)  ->  True
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from distilcache.data.storage.files import sha256_file
from distilcache.stages.corpus.text import docstrings
from distilcache.stages.corpus.text.readers import Source
from distilcache.stages.corpus.text.sources import kind_of

FULL_HASH_BYTES = 1 << 30
"""Larger files are fingerprinted from samples: hashing terabytes would cost hours."""
SAMPLES = 256
SAMPLE_BYTES = 1 << 20


def fingerprint(source: Source) -> dict[str, Any]:
    """What identifies the content of a source, apart from its path.

    Local files: size and sha256 (above ``FULL_HASH_BYTES`` of ``SAMPLES`` evenly spaced
    samples); remote ones: size and the store's entity tag; docstrings of one package: its version.
    Those of all packages are whatever is installed: only the corpus itself knows what it holds.
    """
    values: dict[str, Any] = {"source": source.name}
    if source.kind == "docstrings":
        if source.path:
            values["packages"] = docstrings.package_versions(source.path)
    elif source.kind == "hf":
        pass  # Before it is read, the hub gives only the name.
    elif source.filesystem is not None:
        info = source.filesystem.info(source.path)
        keys = ("ETag", "etag", "md5Hash", "content_md5", "blob_id", "mtime")
        tag = next((str(info[key]) for key in keys if info.get(key)), "")
        values |= {"size": info.get("size"), "tag": tag}
    else:
        values |= {"size": source.size(), "sha256": _file_hash(Path(source.path))}
    return values


def unchanged(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a source holds what it held when a corpus was made, by its fingerprints.

    The old one may be of an earlier version; the new one may name the source by another path.
    """
    before, now = str(old.get("source")), str(new["source"])
    if now == "docstrings":
        return before == now
    if "sha256" not in new:
        return old == new
    if "tag" in old and before.startswith("file://"):  # until 0.2.0: the time of its change
        there = Path(now).stat()
        return bool((old.get("size"), old["tag"]) == (there.st_size, str(there.st_mtime)))
    content = ("size", "sha256")
    kinds = [kind_of(PurePosixPath(name)) for name in (before, now)]
    return kinds[0] == kinds[1] and all(old.get(key) == new[key] for key in content)


def _file_hash(path: Path) -> str:
    size = path.stat().st_size
    if size <= FULL_HASH_BYTES:
        return sha256_file(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for index in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * index // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
