"""Checks of one shard: against its marker, against its index rows, and of every block."""

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.frames import decode_block
from distilcache.data.cache.shards import (
    MARKER_BYTES,
    SUFFIX,
    BlockEntry,
    block_key,
    check_frame,
    marker_fault,
)
from distilcache.data.errors import Unreadable, UserError
from distilcache.data.storage.files import read_json

CHUNK = 1 << 20
"""Bytes that are hashed at a time after the last block."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a cache."""

    text: str
    """One line; names the file."""
    damaged: tuple[Path, ...] = ()
    """Files that are certainly not as they were written."""
    remade: bool = False
    """Whether stage one makes them again, once they and the manifest are deleted."""


@dataclass(slots=True)
class ShardReport:
    """What the check of one shard found."""

    faults: list[Fault] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    """Bytes, clipped codes and bytes per column, from its marker."""


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to check."""

    tar: Path
    round: int
    shard: int
    entries: list[BlockEntry] | None
    """Its rows of the index; None: there is no index, or the shard is not in it."""


def check_shard(
    task: ShardTask, cache: Cache | None, identity: str, *, fast: bool = False
) -> ShardReport:
    """Compare a shard with its marker, the marker with the index, and read every block.

    Without ``cache`` its manifest or index is damaged, without ``identity`` (hash of the
    provenance) that too. ``fast``: check sizes, marker and index only; do not read the tar.
    """
    # A failing disk or missing permission does not prove that the shard is damaged.
    try:
        return _check(task, cache, identity, fast)
    except Unreadable as error:
        return ShardReport([Fault(str(error))])
    except OSError as error:
        reason = error.strerror or error
        return ShardReport([Fault(f"cache: shard {task.tar.name} must be readable, got: {reason}")])


def _check(task: ShardTask, cache: Cache | None, identity: str, fast: bool) -> ShardReport:
    tar, path = task.tar, task.tar.with_suffix(".json")
    if not path.exists():
        text = f"cache: shard {tar.name} must have its .json marker, got none"
        return ShardReport([Fault(text, remade=True)])
    marker, problem = _marker(path)
    if not problem and (identity and marker["identity"] != identity):
        problem = "that of another cache"
    if not problem and _place(marker) != (task.round, task.shard):
        problem = "that of another shard"
    if problem:
        text = f"cache: marker of shard {tar.name} must be as written, got {problem}"
        return ShardReport([Fault(text, (path,), remade=True)])
    size = tar.stat().st_size if tar.is_file() else -1
    if size != marker["bytes"]:
        found = "no file" if size < 0 else str(size)
        text = f"cache: shard {tar.name} must be {marker['bytes']} bytes, got {found}"
        gone = (path,) if size < 0 else (path, tar)
        return ShardReport([Fault(text, gone, remade=True)])
    entries = [BlockEntry(**row) for row in marker["blocks"]]
    report = ShardReport()
    if not fast:
        texts = list(_contents(tar, marker, entries, cache, identity))
        report.faults += [Fault(text, (path, tar), remade=True) for text in texts]
    if not report.faults and task.entries is not None and task.entries != entries:
        # The shard fits its own marker, so the index is wrong.
        text = f"cache: index.arrow must hold the rows of shard {tar.name}, got others"
        damaged = (
            () if fast else tuple(tar.parents[2] / n for n in ("index.arrow", "manifest.json"))
        )
        report.faults.append(Fault(text, damaged, remade=True))
    report.counts = {"bytes": size, "clipped_codes": marker["clipped_codes"]}
    report.counts |= {f"column {n}": count for n, count in marker["column_bytes"].items()}
    return report


def _marker(path: Path) -> tuple[dict[str, Any], str]:
    """A shard's marker, and what is wrong with it.

    Raises:
        Unreadable: The disk fails, which proves no damage.
    """
    if not path.is_file():
        return {}, "what is not a plain file"
    try:
        marker = read_json(path, "cache: shard marker", MARKER_BYTES)
    except Unreadable:
        raise
    except UserError:
        return {}, "no JSON"
    return marker, marker_fault(marker)


def marker_identities(path: Path) -> Iterator[str]:
    """The caches, by the hash of their identity, that the sound markers in a folder name."""
    return filter(None, map(marker_identity, path.glob("shards/r*/shard-*.json")))


def marker_identity(path: Path) -> str:
    """The cache that a marker names; "": it is not there, not sound or cannot be read."""
    try:
        marker, problem = _marker(path)
    except (OSError, Unreadable):
        return ""
    return "" if problem else str(marker["identity"])


def _place(marker: dict[str, Any]) -> tuple[int, int]:
    first = marker["blocks"][0]
    return first["round"], first["shard"]


def _contents(
    tar: Path,
    marker: dict[str, Any],
    entries: Sequence[BlockEntry],
    cache: Cache | None,
    identity: str,
) -> Iterator[str]:
    """Read a shard once, from start to end; yields what is wrong."""
    digest = hashlib.sha256()
    columns: dict[str, int] = {}
    damaged, end = False, 0
    with tar.open("rb") as file:
        for number, entry in enumerate(entries):
            try:
                gap = file.read(_gap(entry, end))
                digest.update(gap)
                end = entry.offset + entry.size
                _check_header(gap[-tarfile.BLOCKSIZE :], entry, number)
                if cache is not None:
                    cache.check_entry(tar, entry)
                frame = file.read(entry.size)
                digest.update(frame)
                check_frame(tar, entry, frame)
                for name, size in _read(tar, entry, frame, cache, identity).items():
                    columns[name] = columns.get(name, 0) + size
            except UserError as error:
                damaged = True
                named = f"(shard {tar.name}, block {entry.block})"
                yield str(error) if tar.name in str(error) else f"{error} {named}"
                file.seek(end)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if damaged:
        return
    if digest.hexdigest() != marker["sha256"]:
        yield f"cache: shard {tar.name} must have sha256 {marker['sha256'][:16]}, got another"
    elif cache is not None and columns != marker["column_bytes"]:
        yield f"cache: marker of shard {tar.name} must count its columns, got other column_bytes"


def _gap(entry: BlockEntry, end: int) -> int:
    """Bytes between two frames: padding, and one tar header."""
    gap = -end % tarfile.BLOCKSIZE + tarfile.BLOCKSIZE
    if entry.offset != end + gap:
        raise UserError(f"cache: a block must lie behind one tar header, got {entry.offset} bytes")
    return gap


def _check_header(raw: bytes, entry: BlockEntry, number: int) -> None:
    """A member must be the plain file of this index row: no link, no path, no other size."""
    wanted = block_key(entry.round, entry.shard, number) + SUFFIX
    try:
        info = tarfile.TarInfo.frombuf(raw, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as error:
        raise UserError(f"cache: tar header must be whole, got: {error}") from None
    if (info.name, info.isreg(), info.size) != (wanted, True, entry.size):
        raise UserError(
            f"cache: tar member must be the file {wanted} of {entry.size} bytes, got "
            f"{info.name[:40]!r} of type {info.type!r} and {info.size} bytes"
        )


def _read(
    tar: Path, entry: BlockEntry, frame: bytes, cache: Cache | None, identity: str
) -> dict[str, int]:
    """Decode a block; bytes per column."""
    if cache is not None:
        columns = cache.decode(tar, entry, frame)
    else:
        columns, metadata = decode_block(frame)
        wanted = {"round": entry.round, "block": entry.block}
        if identity:
            wanted["provenance_sha256"] = identity  # type: ignore[assignment]
        if any(metadata.get(name) != value for name, value in wanted.items()):
            raise UserError("cache: a block must be the one of its row, got another")
    return {name: values.nbytes for name, values in columns.items()}
