"""The teacher cache on disk: provenance, manifest, index, and random access to blocks.

::

    provenance.json   what the cache is made of, written first: a resumed run must match it
    shards/rNN/       shard-NNNNNN.tar + .json
    index.arrow       one row per block, mapped
    manifest.json     written last
    teacher/          the teacher's checkpoint, tokenizer and hidden-state codecs
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.codecs.hidden import HiddenCodec, HiddenDecoder
from data.codecs.lm_head import HeadSpec, LMHead
from data.errors import UserError
from data.files import read_json, sha256_file, sha256_json, write_atomically, write_json
from data.schema import SCHEMA_VERSION, Encoding, decode_block
from data.shards import BlockEntry, read_frame, read_marker, shard_path

INDEX_TYPES = {
    "round": pa.uint16(),
    "shard": pa.uint32(),
    "block": pa.uint32(),
    "offset": pa.uint64(),
    "size": pa.uint64(),
    "crc32": pa.uint32(),
    "sequences": pa.uint32(),
    "tokens": pa.uint32(),
    "masked": pa.uint32(),
    "positions": pa.uint32(),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheManifest:
    """What a finished cache says of itself."""

    schema_version: int
    encoding: Encoding
    head: HeadSpec | None
    """Where the LM head lies in the teacher's checkpoint; None for a mask-only cache."""
    provenance: Mapping[str, Any]
    """``identity`` (must match on resume) and ``environment`` (versions, device)."""
    rounds: int
    totals: Mapping[str, Any]
    index_sha256: str
    fingerprint: str
    """Hash of identity and index: names the content of this cache."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CacheManifest":
        """Inverse of :meth:`to_dict`.

        Raises:
            UserError: The schema is another one or a field is missing.
        """
        if values.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"cache: schema_version must be {SCHEMA_VERSION}, got "
                f"{values.get('schema_version')!r}; use the version of distilcache that wrote it"
            )
        try:
            head = HeadSpec(**values["head"]) if values["head"] else None
            known = {f.name: values[f.name] for f in fields(cls)}
            encoding = Encoding.from_dict(values["encoding"])
        except (KeyError, TypeError) as error:
            raise UserError(f"cache: manifest must be whole, got a bad field: {error}") from None
        return cls(**{**known, "head": head, "encoding": encoding})


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
            return decode_block(frame)[0]
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
                f"{found[:16]}; restore it from a copy of the cache or make the cache anew"
            )
        return HiddenCodec.load(path)

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
        return HiddenDecoder(self.hidden_codec(layer) if encoding.dtype == "coded" else None)

    def verify(self) -> Iterator[str]:
        """Re-read everything; yields one line per fault, naming shard and block."""
        shards = np.unique(np.stack([self.index["round"], self.index["shard"]], 1), axis=0)
        for round_index, shard in shards.tolist():
            tar = shard_path(self.path, round_index, shard)
            faults = list(self._verify_shard(tar, round_index, shard))
            yield from faults
        encoding = self.encoding
        for hidden in encoding.hidden:
            if hidden.dtype == "coded":
                yield from _as_lines(lambda layer=hidden.layer: self.hidden_codec(layer))
        if self.manifest.head is not None:
            yield from _as_lines(self.lm_head)
            weights = self.manifest.provenance["identity"]["teacher_sha256"]
            if sha256_file(self.teacher_dir / "model.safetensors") != weights:
                yield f"cache: {self.teacher_dir}/model.safetensors must have sha256 {weights}"

    def _verify_shard(self, tar: Path, round_index: int, shard: int) -> Iterator[str]:
        try:
            marker = read_marker(tar)
        except UserError as error:
            yield str(error)
            return
        if marker is None:
            yield f"cache: shard {tar.name} must have its .json marker, got none"
            return
        rows = np.flatnonzero((self.index["round"] == round_index) & (self.index["shard"] == shard))
        if [asdict(self.entry(int(i))) for i in rows] != marker["blocks"]:
            yield f"cache: shard {tar.name}: its marker must agree with index.arrow, got other rows"
        damaged = [line for i in rows for line in _as_lines(lambda i=i: self.read_block(int(i)))]
        yield from damaged
        if not damaged and sha256_file(tar) != marker["sha256"]:
            yield f"cache: shard {tar.name} must have sha256 {marker['sha256']}, got another"


def _as_lines(check: Any) -> Iterator[str]:
    try:
        check()
    except UserError as error:
        yield str(error)


def codec_path(cache: Path, layer: int) -> Path:
    """Parameter file of one layer's transform codec."""
    return cache / "teacher" / f"hidden_codec_{layer}.safetensors"


def finish_cache(
    path: Path,
    markers: list[dict[str, Any]],
    *,
    encoding: Encoding,
    head: HeadSpec | None,
    provenance: Mapping[str, Any],
    rounds: int,
) -> CacheManifest:
    """Write the index, then the manifest, from the commit markers of all shards in order."""
    rows = [block for marker in markers for block in marker["blocks"]]
    columns = {n: pa.array([row[n] for row in rows], t) for n, t in INDEX_TYPES.items()}
    table = pa.table(columns).combine_chunks()

    def fill(file: Any) -> None:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=max(1, len(rows)))

    write_atomically(path / "index.arrow", fill)
    names: dict[str, int] = {}
    for marker in markers:
        for name, size in marker["column_bytes"].items():
            names[name] = names.get(name, 0) + size
    totals = {
        "shards": len(markers),
        "blocks": len(rows),
        **{n: sum(row[n] for row in rows) for n in ("sequences", "tokens", "masked", "positions")},
        "bytes": sum(marker["bytes"] for marker in markers),
        "column_bytes": names,
        "clipped_codes": sum(marker["clipped_codes"] for marker in markers),
    }
    index_sha256 = sha256_file(path / "index.arrow")
    identity = sha256_json(provenance["identity"])
    manifest = CacheManifest(
        schema_version=SCHEMA_VERSION,
        encoding=encoding,
        head=head,
        provenance=provenance,
        rounds=rounds,
        totals=totals,
        index_sha256=index_sha256,
        fingerprint=hashlib.sha256(f"{identity}{index_sha256}".encode()).hexdigest(),
    )
    write_json(path / "manifest.json", manifest.to_dict())
    return manifest
