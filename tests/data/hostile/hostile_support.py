"""Caches whose sums and seals fit whatever was put into them."""

import io
import json
import tarfile
import zlib

from distilcache.data.cache.manifest import CacheManifest, finish_cache
from distilcache.data.cache.shards import SEAL, read_marker, shard_path
from distilcache.data.storage.files import read_json, sha256_file, sha256_json
from tests.damage import sealed


def write_marker(tar, marker) -> None:
    """A marker that agrees with its tar and itself."""
    marker = {k: v for k, v in marker.items() if k != SEAL}
    marker |= {"bytes": tar.stat().st_size, "sha256": sha256_file(tar)}
    tar.with_suffix(".json").write_text(json.dumps({**marker, SEAL: sha256_json(marker)}))


def reseal(path) -> None:
    """Index and manifest that agree with whatever the markers now say."""
    old = CacheManifest.from_dict(read_json(path / "manifest.json", "cache: manifest"))
    markers = [read_json(p, "marker") for p in sorted(path.glob("shards/*/*.json"))]
    finish_cache(path, markers, encoding=old.encoding, head=old.head, provenance=old.provenance,
                 rounds=old.rounds)  # fmt: skip


def write_manifest(path, values) -> None:
    """A manifest of any content, its seal right."""
    (path / "manifest.json").write_text(json.dumps(sealed(values)))


def put_frame(path, frame: bytes) -> None:
    """Make it the first block of the cache, all sums right."""
    tar = shard_path(path, 0, 0)
    marker = read_marker(tar)
    frames = [tar.read_bytes()[r["offset"] :][: r["size"]] for r in marker["blocks"]]
    frames[0] = frame
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, (row, content) in enumerate(zip(marker["blocks"], frames, strict=True)):
            info = tarfile.TarInfo(f"r00-000000-{number:04d}.arrow.zst")
            info.size = len(content)
            row["offset"] = archive.offset + 512
            row["size"], row["crc32"] = len(content), zlib.crc32(content)
            archive.addfile(info, io.BytesIO(content))
    write_marker(tar, marker)
    reseal(path)
