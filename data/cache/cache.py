"""A teacher cache on disk: its files, and random access to its blocks.

::

    provenance.json   what the cache is made from; written first, a resumed run must match it
    shards/rNN/       shard-NNNNNN.tar and .json
    index.arrow       one row per block, mapped into memory
    manifest.json     written last
    teacher/          the teacher's checkpoint, tokenizer and hidden-state codecs
"""

import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distilcache.data.cache.checks import check_columns, check_sizes, largest_block
from distilcache.data.cache.frames import decode_block
from distilcache.data.cache.manifest import (
    REMAKE_MANIFEST,
    CacheManifest,
    open_index,
)
from distilcache.data.cache.schema import Encoding
from distilcache.data.cache.shards import INDEX_TYPES, BlockEntry, read_frame, shard_path
from distilcache.data.cache.teacher_files import TeacherFiles
from distilcache.data.errors import UserError
from distilcache.data.storage.files import hash_of, read_json, sha256_json
from distilcache.data.storage.remote import located

INDEX_ROWS = 1 << 20
"""Index rows that are read at a time."""


class Cache:
    """A finished teacher cache, open for reading.

    Use ``open``. Blocks are numbered globally, in order of (round, shard, position).
    """

    def __init__(
        self,
        path: Path,
        manifest: CacheManifest,
        index: pa.Table,
        frames: Callable[[Path, BlockEntry], bytes] | None = None,
    ) -> None:
        self.path = path
        self.source: Path | str = path
        """Its folder or URL."""
        self.manifest = manifest
        self._frames = frames
        self.index = {
            name: index.column(name).chunk(0).to_numpy(zero_copy_only=True) for name in INDEX_TYPES
        }

    @classmethod
    def open(cls, path: Path | str) -> "Cache":
        """Open a finished cache.

        Args:
            path: Its folder, or its URL: then the small files are copied to this machine, and
                blocks are read by range.

        Raises:
            UserError: There is no cache, it is not finished, or its manifest or index is damaged.
        """
        path = located(path)
        if isinstance(path, str):
            from distilcache.data.cache.mirror import mirror, remote_frames

            folder = mirror(path)
            frames = remote_frames(path, folder)
            cache = cls(folder, read_manifest(folder), open_index(folder / "index.arrow"), frames)
            cache.source = path
            return cache
        if not (path / "manifest.json").exists():
            if (path / "provenance.json").exists():
                done = len(list(path.glob("shards/*/shard-*.json")))
                raise UserError(
                    f"cache: {path} must be complete, got {done} finished shards and no "
                    "manifest.json; run the same distilcache teacher-cache command again to "
                    "finish it"
                )
            raise UserError(
                f"cache: {path} must hold a teacher cache, got no manifest.json; run distilcache "
                "teacher-cache first"
            )
        manifest = read_manifest(path)
        index_path = path / "index.arrow"
        found = hash_of(index_path)
        if found != manifest.index_sha256:
            raise UserError(
                f"cache: {index_path} must have sha256 {manifest.index_sha256[:16]}, got "
                f"{found[:16]}; run distilcache teacher-cache again, which makes it from the "
                "shards' markers"
            )
        return cls(path, manifest, open_index(index_path))

    def __reduce__(self) -> tuple[Any, ...]:
        """Opened again by a process that gets it."""
        return Cache.open, (self.source,)

    @property
    def encoding(self) -> Encoding:
        """What the blocks hold."""
        return self.manifest.encoding

    @property
    def teacher_dir(self) -> Path:
        """The teacher's Hugging Face checkpoint (mask-only caches: the tokenizer alone)."""
        return self.path / "teacher"

    @cached_property
    def teacher(self) -> TeacherFiles:
        """What is read from there."""
        return TeacherFiles(self.teacher_dir, self.manifest)

    @property
    def tokenizer_dir(self) -> Path:
        """The folder with the teacher's tokenizer, once its small files are compared.

        Raises:
            UserError: One of them is damaged.
        """
        small = [n for n in self.manifest.teacher_files if not n.endswith(".safetensors")]
        self.teacher.check(*small)
        return self.teacher_dir

    @property
    def num_blocks(self) -> int:
        """Blocks of all rounds."""
        return len(self.index["block"])

    def round_range(self, round_index: int) -> range:
        """Global numbers of the blocks of one round, which are consecutive."""
        rounds = self.index["round"]
        wanted = rounds.dtype.type(round_index)  # of another type, numpy would convert the column
        low, high = (int(np.searchsorted(rounds, wanted, side)) for side in ("left", "right"))
        return range(low, high)

    def shards(self) -> Iterator[range]:
        """The numbers of each shard's blocks, in the order of the index."""
        start, last = 0, -1
        for first in range(0, self.num_blocks, INDEX_ROWS):
            rows = slice(first, first + INDEX_ROWS)
            keys = self.index["round"][rows].astype(np.int64) << 32
            keys |= self.index["shard"][rows]
            for at in np.flatnonzero(np.diff(keys, prepend=last)).tolist():
                if first + at:
                    yield range(start, first + at)
                start = first + at
            last = int(keys[-1])
        if self.num_blocks:
            yield range(start, self.num_blocks)

    def entry(self, block: int) -> BlockEntry:
        """The index row of one block."""
        return BlockEntry(**{name: int(column[block]) for name, column in self.index.items()})

    def read_block(self, block: int) -> dict[str, np.ndarray]:
        """Columns of one block as read-only views (see ``distilcache.data.cache.schema``).

        Raises:
            UserError: The shard or the block is damaged; names both.
        """
        entry = self.entry(block)
        tar = shard_path(self.path, entry.round, entry.shard)
        self.check_entry(tar, entry)
        return self.decode(tar, entry, (self._frames or read_frame)(tar, entry))

    def check_entry(self, tar: Path, entry: BlockEntry) -> None:
        """Refuse an index row that no block of this encoding can have, before it is used.

        Raises:
            UserError: Names shard and block.
        """
        most = largest_block(self.encoding, entry.sequences, entry.tokens, entry.masked)
        if (
            not entry.sequences <= entry.tokens <= entry.sequences * self.encoding.max_length
            or entry.masked > entry.tokens
            or entry.size > most + most // 64
        ):
            raise UserError(
                f"cache: index row of a block must be one of this encoding, got {entry.size} bytes "
                f"for {entry.tokens} tokens of {entry.sequences} sequences (shard {tar.name}, "
                f"block {entry.block})"
            )

    def decode(
        self, tar: Path, entry: BlockEntry, frame: bytes | memoryview
    ) -> dict[str, np.ndarray]:
        """Columns of a block's frame, compared with the encoding and the block's index row.

        Raises:
            UserError: It is damaged, another block, or a block of another cache.
        """
        sizes = entry.sequences, entry.tokens, entry.masked
        try:
            columns, metadata = decode_block(frame, largest_block(self.encoding, *sizes))
            self._check_metadata(metadata, entry)
            check_columns(columns, self.encoding)
            check_sizes(columns, *sizes)
            return columns
        except UserError as error:
            raise UserError(f"{error} (shard {tar.name}, block {entry.block})") from None

    def _check_metadata(self, metadata: dict[str, Any], entry: BlockEntry) -> None:
        """The metadata in a block must be those of its index row and of this cache."""
        wanted = {"round": entry.round, "block": entry.block, **self._common_metadata}
        for name, value in wanted.items():
            if metadata.get(name) != value:
                found = str(metadata.get(name))
                raise UserError(
                    f"cache: a block's {name} must be {_short(value)}, got {_short(found)}: it "
                    "is another block"
                )

    @cached_property
    def _common_metadata(self) -> dict[str, Any]:
        """Metadata that every block of this cache has in common."""
        encoding = json.loads(json.dumps(self.encoding.to_dict()))
        identity = self.manifest.provenance["identity"]
        return {"provenance_sha256": sha256_json(identity), "encoding": encoding}

    @property
    def num_teachers(self) -> int:
        """Teachers whose distributions were averaged; 1 if there is no ensemble."""
        return 1 + len(self.manifest.provenance["identity"].get("ensemble_sha256", ()))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:16]}..."


def lacking(path: Path, manifest: CacheManifest) -> str:
    """The first file of a cache that its manifest or index lists and that is not there in its size.

    Files are not read, but for the index: ``verify`` does that.

    Returns:
        Its name within the cache; "": there is none.
    """
    if hash_of(path / "index.arrow") != manifest.index_sha256:
        return "index.arrow"
    cache = Cache(path, manifest, open_index(path / "index.arrow"))
    for name in manifest.teacher_files:
        if not (path / "teacher" / name).is_file():
            return f"teacher/{name}"
    total = 0
    for blocks in cache.shards():
        last = cache.entry(blocks[-1])
        tar = shard_path(path, last.round, last.shard)
        size = tar.stat().st_size if tar.is_file() else 0
        if size < last.offset + last.size:
            return tar.relative_to(path).as_posix()
        if not (marker := tar.with_suffix(".json")).is_file():
            return marker.relative_to(path).as_posix()
        total += size
    return "" if total == manifest.totals["bytes"] else "shards"


def read_manifest(path: Path) -> CacheManifest:
    """The manifest of the cache in ``path``.

    Raises:
        UserError: It is missing, damaged or edited.
    """
    values = read_json(path / "manifest.json", "cache: manifest", remedy=REMAKE_MANIFEST)
    return CacheManifest.from_dict(values)
