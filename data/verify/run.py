"""Check every checksum, index row and block of a cache.

Order: provenance, manifest and index; then the shards, in threads (zstd, crc and sha256 release
the GIL); then the files of the teacher. A state file lists the shards that passed, so that an
interrupted run can continue.
"""

import contextlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distilcache.data.cache.cache import Cache, read_manifest
from distilcache.data.cache.manifest import CacheManifest, open_index
from distilcache.data.cache.shards import INDEX_TYPES, shard_path
from distilcache.data.cores import cores
from distilcache.data.errors import Unreadable, UserError
from distilcache.data.storage.files import (
    hash_of,
    read_json,
    sha256_json,
)
from distilcache.data.verify.notes import Notes, local_stamp
from distilcache.data.verify.shard_check import (
    Fault,
    ShardReport,
    ShardTask,
    check_shard,
    marker_identities,
)

_FOREIGN = "it is not a file of this teacher; move it away"
AHEAD = 4
"""Shards per thread that are being checked or wait to be reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to verify."""

    workers: int = 0
    """Threads; 0: one per core."""
    fast: bool = False
    """Check sizes, markers and index only; read no shard."""
    state: Path | None = None
    """File that lists the shards that passed, for the next run; None: none is kept."""
    progress: Callable[[int, bool], Any] = lambda size, known: None
    """Called with the bytes of each shard, and whether it had passed in an earlier run."""
    fetch: Callable[[Path], contextlib.AbstractContextManager[None]] = lambda path: (
        contextlib.nullcontext()
    )
    """Makes a shard's tar and marker available while it is checked."""
    stamp: Callable[[Path], str] = local_stamp
    """Identifies the present content of a shard without reading it; "": not possible."""
    identities: Callable[[Path], Iterable[str]] = marker_identities
    """The caches, by the hash of their identity, that sound markers name."""


def verify_cache(path: Path, settings: Settings) -> Iterator[Fault]:
    """Check a cache, finished or not; yields what is wrong with it.

    Raises:
        UserError: There is no cache, or it is of another version.
    """
    manifest, identity, faults = _small_files(path, settings)
    yield from faults
    cache = None
    if manifest is not None:
        fault = _index_fault(path, manifest)
        if fault is None:
            cache = Cache(path, manifest, open_index(path / "index.arrow"))
            yield from _index_order(cache)
        else:
            yield fault
    sums: dict[str, int] | None = {"shards": 0}
    with contextlib.ExitStack() as stack:
        notes = None
        if settings.state is not None and not settings.fast:
            about = manifest.index_sha256 if manifest else ""
            notes = stack.enter_context(Notes(settings.state, f"1 {about} {identity}"))
        for task, report in _checked(path, cache, identity, settings, notes):
            yield from report.faults
            if task.entries is not None and sums is not None:
                sums = _added(sums, report)
        if cache is not None:
            yield from _totals(cache, sums)
        if manifest is not None:
            # With a damaged index, too: repair removes the manifest, which knows these files.
            no_rows = pa.table({name: pa.array([], kind) for name, kind in INDEX_TYPES.items()})
            yield from _teacher(cache or Cache(path, manifest, no_rows), settings.fast)
        if notes is not None:
            notes.remove()


def _small_files(path: Path, settings: Settings) -> tuple[CacheManifest | None, str, list[Fault]]:
    """Manifest and hash of the identity, as far as they are intact, and faults."""
    known, finished = path / "provenance.json", path / "manifest.json"
    if not known.exists() and not finished.exists():
        raise UserError(f"verify: {path} must hold a teacher cache, got none")
    manifest, faults = None, []
    if not finished.exists():
        text = f"cache: {path} must be complete, got no manifest.json"
        faults.append(Fault(f"{text}; run distilcache teacher-cache to finish it", remade=True))
    else:
        try:
            manifest = read_manifest(path)
        except Unreadable as error:  # which proves no damage
            faults.append(Fault(str(error)))
        except UserError as error:
            if _of_another_version(finished):
                raise
            faults.append(Fault(str(error), (finished,), remade=True))
    provenance: Any = None
    with contextlib.suppress(UserError):
        provenance = read_json(known, "cache: provenance")
    identity = provenance.get("identity") if isinstance(provenance, dict) else None
    own = identity if manifest is None else manifest.provenance["identity"]
    if not isinstance(own, dict):
        faults.append(Fault(f"cache: {known} must hold the cache's identity, got none"))
        return manifest, "", faults
    if named := _others_alone(settings.identities(path), sha256_json(own)):
        if isinstance(identity, dict) and sha256_json(identity) in named:
            text = f"cache: {finished} must be of the cache of its shards, got that of another"
            faults.append(Fault(text, (finished,), remade=True))
            return None, sha256_json(identity), faults
        text = f"cache: {path} must hold shards of its own, got those of another cache"
        faults.append(Fault(f"{text}; put its other files back as they were with these shards"))
        return None, "", faults
    if manifest is not None and provenance != manifest.provenance:
        text = f"cache: {known} must be the manifest's provenance, got another or none"
        faults.append(Fault(text, (known,)))
    return manifest, sha256_json(own), faults


def _others_alone(named: Iterable[str], own: str) -> set[str]:
    """The caches that markers name; none if one names the cache's own, which ends the search."""
    others: set[str] = set()
    for identity in named:
        if identity == own:
            return set()
        others.add(identity)
    return others


def _of_another_version(path: Path) -> bool:
    """Whether a manifest is intact, but of another version."""
    with contextlib.suppress(UserError):
        values = read_json(path, "cache: manifest")
        if isinstance(values, dict):
            content = {name: value for name, value in values.items() if name != "sha256"}
            return bool(values.get("sha256") == sha256_json(content))
    return False


def _index_fault(path: Path, manifest: CacheManifest) -> Fault | None:
    index = path / "index.arrow"
    found = hash_of(index)
    text = f"cache: {index} must have sha256 {manifest.index_sha256[:16]}, got {found[:16]}"
    if found == manifest.index_sha256:
        try:
            open_index(index)
            return None
        except Unreadable as error:
            return Fault(str(error))
        except UserError as error:
            text = str(error)
    return Fault(text, (index, path / "manifest.json"), remade=True)


def _index_order(cache: Cache) -> Iterator[Fault]:
    """Shards must be there once each and in order, and their rows must sum to the totals."""
    files = tuple(cache.path / name for name in ("index.arrow", "manifest.json"))
    last = -1, -1
    for blocks in cache.shards():
        first = cache.entry(blocks.start)
        key = first.round, first.shard
        if key <= last:
            text = f"cache: {files[0]} must hold each shard once and in order, got another order"
            yield Fault(text, files, remade=True)
            break
        last = key
    totals = {**cache.manifest.totals, "rounds": cache.manifest.rounds}
    names = ("sequences", "tokens", "masked", "positions")
    sums = {name: int(cache.index[name].sum(dtype=np.uint64)) for name in names}
    sums |= {"blocks": cache.num_blocks, "rounds": len(np.unique(cache.index["round"]))}
    for name, found in sums.items():
        if found != totals[name]:
            text = f"cache: {files[0]} must hold {totals[name]} {name} (manifest), got {found}"
            yield Fault(text, files, remade=True)


def _tasks(path: Path, cache: Cache | None) -> Iterator[ShardTask]:
    """Shards of the index, then finished shards that are not in it (rounds being added)."""
    named: set[tuple[int, int]] = set()
    for blocks in cache.shards() if cache is not None else ():
        assert cache is not None
        entries = [cache.entry(row) for row in blocks]
        where = entries[0].round, entries[0].shard
        named.add(where)
        yield ShardTask(shard_path(path, *where), *where, entries)
    for marker in sorted(path.glob("shards/r*/shard-*.json")):
        found = re.fullmatch(r"r(\d{2,5})/shard-(\d{6,9})", f"{marker.parent.name}/{marker.stem}")
        if found and (int(found[1]), int(found[2])) not in named:
            yield ShardTask(marker.with_suffix(".tar"), int(found[1]), int(found[2]), None)


def _checked(
    path: Path, cache: Cache | None, identity: str, settings: Settings, notes: Notes | None
) -> Iterator[tuple[ShardTask, ShardReport]]:
    """Check all shards in threads; reports come in order."""
    workers = settings.workers or cores()
    waiting: deque[tuple[ShardTask, str, Future[ShardReport]]] = deque()

    def finished() -> Iterator[tuple[ShardTask, ShardReport]]:
        task, note, future = waiting.popleft()
        report = future.result()
        if notes is not None and note and not report.faults:
            notes.add(note)
        settings.progress(report.counts.get("bytes", 0), False)
        yield task, report

    def check(task: ShardTask) -> ShardReport:
        with settings.fetch(task.tar):
            return check_shard(task, cache, identity, fast=settings.fast)

    with ThreadPoolExecutor(workers, "distilcache-verify") as pool:
        try:
            for task in _tasks(path, cache):
                stamp = settings.stamp(task.tar) if notes is not None else ""
                note = f"{task.round} {task.shard} {stamp}" if stamp else ""
                if notes is not None and note in notes.sound:
                    settings.progress(int(stamp.split()[0].partition(":")[0]), True)
                    yield task, ShardReport()
                    continue
                future = pool.submit(check, task)
                waiting.append((task, note, future))
                while len(waiting) >= AHEAD * workers:
                    yield from finished()
            while waiting:
                yield from finished()
        finally:
            pool.shutdown(cancel_futures=True)


def _added(sums: dict[str, int], report: ShardReport) -> dict[str, int] | None:
    """Counts with one more shard; None as soon as one is not known."""
    if not report.counts or report.faults:
        return None
    counts = {**report.counts, "shards": 1}
    return {name: sums.get(name, 0) + counts.get(name, 0) for name in sums | counts}


def _totals(cache: Cache, sums: dict[str, int] | None) -> Iterator[Fault]:
    """The manifest's totals must be the sums of the markers."""
    totals = cache.manifest.totals
    wanted = {name: totals[name] for name in ("shards", "bytes", "clipped_codes")}
    wanted |= {f"column {name}": size for name, size in totals["column_bytes"].items()}
    if sums is not None and sums != wanted:
        text = "cache: totals of the manifest must be those of its markers, got others"
        yield Fault(text, (cache.path / "manifest.json",), remade=True)


def _teacher(cache: Cache, fast: bool) -> Iterator[Fault]:
    """Check the files of the teacher, and read codecs and LM head."""
    folder = cache.teacher_dir
    there = folder.iterdir() if folder.is_dir() else ()
    found = {path.name for path in there if not path.name.startswith(".")}
    for name in sorted(found - cache.manifest.teacher_files.keys()):
        yield Fault(f"cache: {folder / name} must not be there: {_FOREIGN}")
    if fast:
        for name in sorted(cache.manifest.teacher_files.keys() - found):
            text = f"cache: {folder / name} must be there, got no file"
            yield Fault(f"{text}; run distilcache teacher-cache, which makes it again")
        return
    damaged = False
    for file, text in cache.teacher.faults():
        damaged = True
        # Stage one saves the teacher again, and calibrates a codec again, to the same bits.
        yield Fault(text, (file,), remade=True)
    if damaged:
        return
    try:
        for stored in cache.encoding.states:
            if stored.dtype == "coded":
                cache.teacher.codec_of(stored)
        if cache.encoding.relation is not None:
            cache.teacher.relations()
        if cache.manifest.head is not None:
            cache.teacher.lm_head()
    except UserError as error:
        yield Fault(str(error))
