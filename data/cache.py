"""The teacher cache on disk: provenance, manifest, index, and random access to blocks.

::

    provenance.json   what the cache is made of, written first: a resumed run must match it
    shards/rNN/       shard-NNNNNN.tar + .json
    index.arrow       one row per block, mapped
    manifest.json     written last
    teacher/          the teacher's checkpoint, tokenizer and hidden-state codecs
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.checks import check_columns, check_sizes
from data.codecs.hidden import HiddenCodec, HiddenDecoder
from data.codecs.lm_head import LMHead
from data.errors import UserError
from data.files import read_json, sha256_file
from data.manifest import INDEX_TYPES, CacheManifest
from data.schema import Encoding, decode_block
from data.shards import BlockEntry, read_frame, read_marker, shard_path


class Cache:
    """A finished teacher cache, open for reading.

    Use :meth:`open`. Blocks are numbered globally, in order of (round, shard, position).
    """

    def __init__(self, path: Path, manifest: CacheManifest, index: pa.Table) -> None:
        self.path = path
        self.manifest = manifest
        self.index = {
            name: index.column(name).chunk(0).to_numpy(zero_copy_only=True) for name in INDEX_TYPES
        }

    @classmethod
    def open(cls, path: Path) -> "Cache":
        """Open a finished cache.

        Raises:
            UserError: There is none, it is incomplete, or its manifest or index is damaged.
        """
        path = Path(path)
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
        manifest = CacheManifest.from_dict(read_json(path / "manifest.json", "cache: manifest"))
        index_path = path / "index.arrow"
        found = sha256_file(index_path) if index_path.exists() else "no file"
        if found != manifest.index_sha256:
            raise UserError(
                f"cache: {index_path} must have sha256 {manifest.index_sha256[:16]}, got "
                f"{found[:16]}; delete index.arrow and manifest.json and run distilcache "
                "teacher-cache again: the shards are kept"
            )
        with pa.memory_map(str(index_path)) as source:
            table = pa.ipc.open_file(source).read_all()
        return cls(path, manifest, table)

    @property
    def encoding(self) -> Encoding:
        """What the blocks hold."""
        return self.manifest.encoding

    @property
    def teacher_dir(self) -> Path:
        """The teacher's Hugging Face checkpoint (mask-only caches: the tokenizer alone)."""
        return self.path / "teacher"

    @property
    def num_blocks(self) -> int:
        """Blocks of all rounds."""
        return len(self.index["block"])

    def round_blocks(self, round_index: int) -> np.ndarray:
        """Global numbers of the blocks of one round, ascending."""
        low, high = np.searchsorted(self.index["round"], [round_index, round_index + 1])
        return np.arange(low, high)

    def entry(self, block: int) -> BlockEntry:
        """The index row of one block."""
        return BlockEntry(**{name: int(column[block]) for name, column in self.index.items()})

    def read_block(self, block: int) -> dict[str, np.ndarray]:
        """Columns of one block as read-only views (see :mod:`data.schema`).

        Raises:
            UserError: The shard or the block is damaged; names both.
        """
        entry = self.entry(block)
        tar = shard_path(self.path, entry.round, entry.shard)
        frame = read_frame(tar, entry)
        try:
            columns = decode_block(frame)[0]
            check_columns(columns, self.encoding)
            check_sizes(columns, entry.sequences, entry.tokens, entry.masked)
            return columns
        except UserError as error:
            raise UserError(f"{error} (shard {tar.name}, block {entry.block})") from None

    def lm_head(self) -> LMHead:
        """The teacher's LM head, frozen."""
        if self.manifest.head is None:
            raise UserError(
                f"cache: {self.path} must hold a teacher for replay, got a mask-only cache; run "
                "distilcache teacher-cache with cache.mask_only=false"
            )
        return LMHead.load(self.teacher_dir, self.manifest.head)

    def hidden_codec(self, layer: int) -> HiddenCodec:
        """The transform codec of one layer, checked against the hash in the manifest."""
        encoding = self.encoding.hidden_layer(layer)
        path = codec_path(self.path, encoding.layer if encoding else layer)
        found = sha256_file(path) if path.exists() else "no file"
        if encoding is None or found != encoding.codec_sha256:
            raise UserError(
                f"cache: {path} must be the codec that the shards were written with, got "
                f"{found[:16]}; {_RESTORE}"
            )
        codec = HiddenCodec.load(path)
        if (codec.packing.planes, len(codec.limits)) != (encoding.planes, encoding.width):
            raise UserError(
                f"cache: {path} must hold {encoding.planes} planes of {encoding.width} units, got "
                f"{codec.packing.planes} of {len(codec.limits)}; {_RESTORE}"
            )
        return codec

    def hidden_decoder(self, layer: int = -1) -> HiddenDecoder:
        """The decoder of one layer's stored hidden states (-1: the last layer).

        Raises:
            UserError: The cache does not hold that layer.
        """
        encoding = self.encoding.hidden_layer(layer)
        if encoding is None:
            raise UserError(
                f"cache: hidden_layers must hold layer {layer}, got "
                f"{[h.layer for h in self.encoding.hidden]}; make a cache that stores it"
            )
        codec = self.hidden_codec(layer) if encoding.dtype == "coded" else None
        return HiddenDecoder(encoding.column, codec)

    def verify(self) -> Iterator[str]:
        """Re-read everything; yields one line per fault, naming shard and block."""
        rounds, shards = self.index["round"], self.index["shard"]
        changes = np.flatnonzero((np.diff(rounds) != 0) | (np.diff(shards) != 0)) + 1
        for rows in np.split(np.arange(self.num_blocks), changes):
            tar = shard_path(self.path, int(rounds[rows[0]]), int(shards[rows[0]]))
            yield from list(self._verify_shard(tar, rows))
        for name, wanted in self.manifest.teacher_files.items():
            path = self.teacher_dir / name
            found = sha256_file(path) if path.exists() else "no file"
            if found != wanted:
                yield f"cache: {path} must have sha256 {wanted}, got {found}; {_RESTORE}"
        for hidden in self.encoding.hidden:
            if hidden.dtype == "coded":
                yield from _as_lines(lambda layer=hidden.layer: self.hidden_codec(layer))
        if self.manifest.head is not None:
            yield from _as_lines(self.lm_head)

    def _verify_shard(self, tar: Path, rows: np.ndarray) -> Iterator[str]:
        try:
            marker = read_marker(tar)
        except UserError as error:
            yield str(error)
            return
        if marker is None:
            yield f"cache: shard {tar.name} must have its .json marker, got none"
            return
        if [asdict(self.entry(int(i))) for i in rows] != marker["blocks"]:
            yield f"cache: shard {tar.name}: its marker must agree with index.arrow, got other rows"
        damaged = [line for i in rows for line in _as_lines(lambda i=i: self.read_block(int(i)))]
        yield from damaged
        if not damaged and sha256_file(tar) != marker["sha256"]:
            yield f"cache: shard {tar.name} must have sha256 {marker['sha256']}, got another"


_RESTORE = "restore it from a copy of the cache or make the cache anew"


def _as_lines(check: Any) -> Iterator[str]:
    try:
        check()
    except UserError as error:
        yield str(error)


def codec_path(cache: Path, layer: int) -> Path:
    """Parameter file of one layer's transform codec."""
    return cache / "teacher" / f"hidden_codec_{layer}.safetensors"
