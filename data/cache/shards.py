"""Shards: WebDataset tars of blocks, each with a JSON file, its commit marker.

A shard is complete if its marker exists: the tar is written first (temporary name, sync, rename),
then the marker. Names follow from (round, shard) alone, so running a task twice writes the same
files.
"""

import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from distilcache.data.cache.schema import SCHEMA_VERSION
from distilcache.data.errors import UserError, reason_of
from distilcache.data.storage.files import (
    open_plain,
    read_at,
    read_json,
    sha256_file,
    sha256_json,
    write_atomically,
    write_json,
)

SUFFIX = ".arrow.zst"
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
"""Fields of :class:`BlockEntry` as columns of the index."""
MARKER_FIELDS = {"identity", "bytes", "sha256", "column_bytes", "clipped_codes", "blocks"}
"""Fields of a commit marker, in addition to ``schema_version``."""
SEAL = "marker_sha256"
"""Field of a marker: hash of its other fields, to detect changes."""
MARKER_BYTES = 1 << 28
"""No marker is larger: it takes about 200 bytes per block."""


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """One row of the index: place and size of a block."""

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
    """One finished block, to be written into a shard."""

    block: int
    frame: bytes
    sequences: int
    tokens: int
    masked: int
    positions: int
    column_bytes: dict[str, int]
    """Bytes per column before compression."""
    clipped: int
    """Hidden-state codes that were outside their range."""


def shard_path(cache: Path, round_index: int, shard: int) -> Path:
    """The tar of one shard; its commit marker has the suffix ``.json``."""
    return cache / "shards" / f"r{round_index:02d}" / f"shard-{shard:06d}.tar"


def block_key(round_index: int, shard: int, number: int) -> str:
    """WebDataset key of the ``number``-th block of a shard."""
    return f"r{round_index:02d}-{shard:06d}-{number:04d}"


def read_marker(tar: Path) -> dict[str, Any] | None:
    """The commit marker of a shard; None: the shard is not complete.

    Raises:
        UserError: The marker is damaged or of another shard, or the tar is missing or has another
            size.
    """
    path = tar.with_suffix(".json")
    if not path.exists():
        return None
    marker: dict[str, Any] = read_json(path, "cache: shard marker", MARKER_BYTES, f"; {_REMAKE}")
    fault = marker_fault(marker)
    if fault:
        raise UserError(f"cache: shard marker must be as written, got {fault} in {path}; {_REMAKE}")
    place = marker["blocks"][0]
    if shard_path(path, place["round"], place["shard"]).parts[-2:] != tar.parts[-2:]:
        raise UserError(
            f"cache: shard marker must be of its own shard, got round {place['round']} shard "
            f"{place['shard']} in {path}; delete it and its tar and run distilcache teacher-cache"
        )
    size = tar.stat().st_size if tar.is_file() else -1
    if marker["bytes"] != size:
        raise UserError(
            f"cache: shard {tar.name} must be {marker['bytes']} bytes, got "
            f"{'no file' if size < 0 else size}; delete {path} and run distilcache teacher-cache"
        )
    return marker


def marker_fault(marker: Any) -> str:
    """What is wrong with the content of a commit marker; "": nothing."""
    allowed = MARKER_FIELDS | {"schema_version", SEAL}
    if not isinstance(marker, dict) or not MARKER_FIELDS <= marker.keys() <= allowed:
        return "other fields"
    content = {name: value for name, value in marker.items() if name != SEAL}
    if SEAL in marker and marker[SEAL] != sha256_json(content):
        return f"a {SEAL} of other content"
    if marker.get("schema_version") != SCHEMA_VERSION:
        return f"schema_version {str(marker.get('schema_version'))[:20]}"
    counts = marker["column_bytes"]
    numbers = [marker["bytes"], marker["clipped_codes"]]
    numbers += counts.values() if isinstance(counts, dict) else [None]
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        return "sizes that are no counts"
    texts = [marker["identity"], marker["sha256"]]
    if not all(isinstance(t, str) and re.fullmatch("[0-9a-z]{1,64}", t) for t in texts):
        return "hashes that are none"
    try:
        columns = marker_columns(marker)
    except UserError as error:
        return str(error)
    return _misplaced(columns, int(marker["bytes"]))


def marker_columns(marker: Mapping[str, Any]) -> dict[str, Any]:
    """The index rows of a marker as Arrow arrays.

    Raises:
        UserError: A row has other fields, or a value that its column cannot hold.
    """
    rows = marker["blocks"]
    try:
        if not all(row.keys() == INDEX_TYPES.keys() for row in rows):
            raise ValueError("rows of other fields")
        # Arrow would cut off decimals.
        if not all(type(value) is int for row in rows for value in row.values()):
            raise TypeError("rows with other than whole numbers")
        return {n: pa.array([row[n] for row in rows], t) for n, t in INDEX_TYPES.items()}
    except (pa.ArrowException, AttributeError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"rows that do not fit the index ({reason_of(error)})") from None


def _misplaced(columns: Mapping[str, Any], size: int) -> str:
    """Blocks must follow each other within ``size`` bytes, a tar header before each."""
    end = 0
    if not len(columns["offset"]):
        return "no rows"
    if any(column.null_count for column in columns.values()):
        return "rows with nothing in them"
    for offset, length in zip(
        columns["offset"].to_pylist(), columns["size"].to_pylist(), strict=True
    ):
        if offset < end + tarfile.BLOCKSIZE or offset + length > size:
            return "rows that overlap or leave the shard"
        end = offset + length
    if len(columns["round"].unique()) > 1 or len(columns["shard"].unique()) > 1:
        return "rows of several shards"
    return ""


def write_shard(
    tar: Path, round_index: int, shard: int, blocks: Iterable[EncodedBlock], identity: str
) -> dict[str, Any]:
    """Write one shard and its commit marker; returns the marker.

    A shard that another process has finished meanwhile stays as it is: readers know its bytes.

    Args:
        tar: Final path, see :func:`shard_path`.
        round_index: Round of all its blocks.
        shard: Number of the shard within the round.
        blocks: Finished blocks in order; may be a generator.
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
                place = (round_index, shard, block.block, offset, info.size)
                counts = (block.sequences, block.tokens, block.masked, block.positions)
                entries.append(BlockEntry(*place, zlib.crc32(block.frame), *counts))
                for name, size in block.column_bytes.items():
                    columns[name] = columns.get(name, 0) + size
                clipped += block.clipped
        file.flush()
        os.fsync(file.fileno())  # takes long: what is looked at next is as new as can be
        marker = read_marker(tar)
        if marker is not None and marker["identity"] == identity:
            raise _FinishedMeanwhile(marker)

    try:
        write_atomically(tar, fill)
    except _FinishedMeanwhile as found:
        return found.marker
    marker: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "identity": identity,
        "bytes": tar.stat().st_size,
        "sha256": sha256_file(tar),
        "column_bytes": columns,
        "clipped_codes": clipped,
        "blocks": [asdict(entry) for entry in entries],
    }
    marker[SEAL] = sha256_json(marker)
    write_json(tar.with_suffix(".json"), marker)
    return marker


class _FinishedMeanwhile(Exception):
    def __init__(self, marker: dict[str, Any]) -> None:
        self.marker = marker


def read_frame(tar: Path, entry: BlockEntry) -> bytes:
    """Read one block's frame, by its range, and check it.

    Raises:
        UserError: The shard cannot be read or the frame's checksum differs; names both.
    """
    try:
        with open_plain(tar) as file:
            frame = read_at(file, entry.offset, entry.size)
    except OSError as error:
        raise UserError(
            f"cache: shard {tar.name} must be readable, got: {error.strerror}; {_REMEDY}"
        ) from None
    check_frame(tar, entry, frame)
    return frame


def check_frame(tar: Path, entry: BlockEntry, frame: bytes | memoryview) -> None:
    """Compare a frame with its row of the index.

    Raises:
        UserError: Its size or checksum differs.
    """
    found = zlib.crc32(frame)
    if len(frame) != entry.size or found != entry.crc32:
        raise UserError(
            f"cache: shard {tar.name} block {entry.block} must have crc32 {entry.crc32:08x}, got "
            f"{found:08x} over {len(frame)} of {entry.size} bytes; {_REMEDY}"
        )


_REMEDY = (
    "run distilcache verify --repair on the cache, then teacher-cache, which makes exactly this "
    "shard again (or publish, where the cache lies at a URL)"
)
_REMAKE = "delete it and run distilcache teacher-cache"
