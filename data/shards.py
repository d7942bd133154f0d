"""Shards: WebDataset tars of blocks, each with a JSON file that commits it.

A shard is complete iff its ``.json`` is there: the tar is written under a temporary name, synced
and renamed first, its JSON after it. Names come from the task (round, shard), never from the
worker, so running a task twice writes the same files.
"""

import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data.errors import UserError
from data.files import read_json, write_atomically, write_json
from data.schema import SCHEMA_VERSION

SUFFIX = ".arrow.zst"
MARKER_FIELDS = {"identity", "bytes", "sha256", "column_bytes", "clipped_codes", "blocks"}
"""What a commit marker must hold, besides its ``schema_version``."""


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """One row of the index: where a block lies and what it counts."""

    round: int
    shard: int
    block: int
    """Number of the corpus block."""
    offset: int
    """Byte at which the frame starts in the tar."""
    size: int
    """Bytes of the frame."""
    crc32: int
    """Of the frame."""
    sequences: int
    tokens: int
    masked: int
    """Masked positions."""
    positions: int
    """Positions with teacher signals."""


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """One finished block on its way into a shard."""

    block: int
    frame: bytes
    sequences: int
    tokens: int
    masked: int
    positions: int
    column_bytes: dict[str, int]
    """Bytes per column before compression."""
    clipped: int
    """Hidden-state codes that left their range."""


def shard_path(cache: Path, round_index: int, shard: int) -> Path:
    """The tar of one shard; its commit marker has the suffix ``.json``."""
    return cache / "shards" / f"r{round_index:02d}" / f"shard-{shard:06d}.tar"


def block_key(round_index: int, shard: int, number: int) -> str:
    """WebDataset key of the ``number``-th block of a shard."""
    return f"r{round_index:02d}-{shard:06d}-{number:04d}"


def read_marker(tar: Path) -> dict[str, Any] | None:
    """The commit marker of a shard, None where the shard is not complete.

    Raises:
        UserError: The marker is damaged, or the tar beside it is gone or has another size.
    """
    path = tar.with_suffix(".json")
    if not path.exists():
        return None
    marker: dict[str, Any] = read_json(path, "cache: shard marker")
    if not isinstance(marker, dict) or not marker.keys() >= MARKER_FIELDS:
        raise UserError(
            f"cache: shard marker must hold {', '.join(sorted(MARKER_FIELDS))}, got others in "
            f"{path}; delete it and run distilcache teacher-cache"
        )
    size = tar.stat().st_size if tar.exists() else -1
    if marker["bytes"] != size:
        raise UserError(
            f"cache: shard {tar.name} must be {marker['bytes']} bytes, got "
            f"{'no file' if size < 0 else size}; delete {path} and run distilcache teacher-cache"
        )
    return marker


def write_shard(
    tar: Path, round_index: int, shard: int, blocks: Iterable[EncodedBlock], identity: str
) -> dict[str, Any]:
    """Write one shard and its commit marker; returns the marker.

    Args:
        tar: Final path, see :func:`shard_path`.
        round_index: Round of all its blocks.
        shard: Number of the shard within the round.
        blocks: Finished blocks in order; consumed while writing.
        identity: Hash of the provenance that the shard belongs to.
    """
    entries: list[BlockEntry] = []
    columns: dict[str, int] = {}
    clipped = 0

    def fill(file: BinaryIO) -> None:
        nonlocal clipped
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for number, block in enumerate(blocks):
                info = tarfile.TarInfo(block_key(round_index, shard, number) + SUFFIX)
                info.size = len(block.frame)
                info.mode = 0o644
                offset = archive.offset + tarfile.BLOCKSIZE
                archive.addfile(info, io.BytesIO(block.frame))
                entries.append(
                    BlockEntry(
                        round_index,
                        shard,
                        block.block,
                        offset,
                        len(block.frame),
                        zlib.crc32(block.frame),
                        block.sequences,
                        block.tokens,
                        block.masked,
                        block.positions,
                    )
                )
                for name, size in block.column_bytes.items():
                    columns[name] = columns.get(name, 0) + size
                clipped += block.clipped

    write_atomically(tar, fill)
    with tar.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    marker = {
        "schema_version": SCHEMA_VERSION,
        "identity": identity,
        "bytes": tar.stat().st_size,
        "sha256": digest,
        "column_bytes": columns,
        "clipped_codes": clipped,
        "blocks": [asdict(entry) for entry in entries],
    }
    write_json(tar.with_suffix(".json"), marker)
    return marker


def read_frame(tar: Path, entry: BlockEntry) -> bytes:
    """Read one block's frame with a single range read and check it.

    Raises:
        UserError: The shard cannot be read or the frame's checksum differs; names both.
    """
    try:
        descriptor = os.open(tar, os.O_RDONLY)
        try:
            frame = os.pread(descriptor, entry.size, entry.offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(
            f"cache: shard {tar.name} must be readable, got: {error.strerror}; {_REMEDY}"
        ) from None
    found = zlib.crc32(frame)
    if len(frame) != entry.size or found != entry.crc32:
        raise UserError(
            f"cache: shard {tar.name} block {entry.block} must have crc32 {entry.crc32:08x}, got "
            f"{found:08x} over {len(frame)} of {entry.size} bytes; {_REMEDY}"
        )
    return frame


_REMEDY = (
    "delete the shard's .tar and .json and run distilcache teacher-cache again: it makes exactly "
    "these shards anew"
)
