"""The manifest of a cache, written last, and the index of its blocks."""

import contextlib
import hashlib
import mmap
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from distilcache.data.cache.checks import check_encoding
from distilcache.data.cache.ipc import READ_ERRORS, read_only_batch
from distilcache.data.cache.schema import SCHEMA_VERSION, Encoding
from distilcache.data.cache.shards import INDEX_TYPES, marker_columns
from distilcache.data.codecs.lm_head_spec import LMHeadSpec
from distilcache.data.errors import Unreadable, UserError, reason_of
from distilcache.data.storage.files import (
    hashes_of,
    open_plain,
    sha256_file,
    sha256_json,
    unwritable,
    write_atomically,
    write_json,
)

REMAKE_MANIFEST = (
    "; delete manifest.json and run distilcache teacher-cache again: the shards are kept"
)
_FILE_NAME = re.compile(r"[\w-][\w.-]*")
"""Names of files in ``teacher/``; others, as of temporary files and of copies, are not its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheManifest:
    """Description of a finished cache, as in ``manifest.json``."""

    schema_version: int
    encoding: Encoding
    head: LMHeadSpec | None
    """Where the LM head is in the teacher's checkpoint; None: mask-only, or an ensemble."""
    provenance: Mapping[str, Any]
    """``identity`` (must match on resume) and ``environment`` (versions, device)."""
    rounds: int
    totals: Mapping[str, Any]
    teacher_files: Mapping[str, str]
    """Name to sha256 of the files in ``teacher/``."""
    index_sha256: str
    fingerprint: str
    """Hash of identity and index: identifies the content of this cache."""
    sha256: str = ""
    """Hash of everything above: an edited manifest is refused."""

    @property
    def clipped_fraction(self) -> float:
        """Fraction of the hidden-state codes that were outside the range of their codec."""
        coded = sum(h.width for h in self.encoding.hidden if h.dtype == "coded")
        codes = coded * int(self.totals.get("positions", 0))
        relation = self.encoding.relation
        if relation is not None and relation.dtype == "coded":
            codes += relation.width * int(self.totals["tokens"])
        return int(self.totals["clipped_codes"]) / codes if codes else 0.0

    def seal(self) -> "CacheManifest":
        """The same manifest with its own hash filled in."""
        values = {k: v for k, v in self.to_dict().items() if k != "sha256"}
        return replace(self, sha256=sha256_json(values))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "encoding": self.encoding.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CacheManifest":
        """Inverse of ``to_dict``.

        Raises:
            UserError: The schema version is another, a field is missing, or the file was edited.
        """
        version = values.get("schema_version") if isinstance(values, Mapping) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"cache: schema_version must be {SCHEMA_VERSION}, got {repr(version)[:20]}; use "
                "the version of distilcache that wrote it"
            )
        try:
            head = LMHeadSpec(**values["head"]) if values["head"] else None
            known = {f.name: values[f.name] for f in fields(cls)}
            encoding = Encoding.from_dict(values["encoding"])
            check_encoding(encoding)
            _check_fields(known, head)
            content = {k: v for k, v in values.items() if k != "sha256"}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, UserError) as error:
            raise UserError(
                "cache: manifest must be whole, got a bad field: "
                f"{reason_of(error)}{REMAKE_MANIFEST}"
            ) from None
        if sha256_json(content) != known["sha256"]:
            raise UserError(
                f"cache: manifest must carry its own sha256, got an edited file{REMAKE_MANIFEST}"
            )
        return cls(**{**known, "head": head, "encoding": encoding})


def _check_fields(values: Mapping[str, Any], head: LMHeadSpec | None) -> None:
    """Check each field's type: a manifest with the right hash may still be hostile.

    Raises:
        ValueError: Or TypeError, KeyError: names the field.
    """
    counts = {"rounds": values["rounds"], **values["totals"], **values["totals"]["column_bytes"]}
    counts.pop("column_bytes")
    for name, count in counts.items():
        if type(count) is not int or not 0 <= count < 1 << 63:
            raise ValueError(f"{name[:40]} is no count")
    missing = [name for name in TOTALS if name not in counts]
    if missing:
        raise KeyError(f"totals.{missing[0]}")
    # These names become paths within the cache.
    for name, digest in values["teacher_files"].items():
        if not _FILE_NAME.fullmatch(name) or not isinstance(digest, str):
            raise ValueError(f"teacher_files has {name[:40]!r}")
    for name in ("index_sha256", "fingerprint", "sha256"):
        if not isinstance(values[name], str):
            raise TypeError(f"{name} is no text")
    for name in ("identity", "environment"):
        if not isinstance(values["provenance"][name], dict):
            raise TypeError(f"provenance.{name} is no object")
    if head is not None and (
        not head.is_whole()
        or not all(isinstance(name, str) for name in head.tensors.values())
        or not 0 <= float(head.eps) < 1
    ):
        raise ValueError("head names no LM head")


TOTALS = ("shards", "blocks", "sequences", "tokens", "masked", "positions", "bytes",
          "clipped_codes")  # fmt: skip
"""Counts in ``totals``, in addition to ``column_bytes``."""


class _Spool:
    """Columns of a growing index in temporary files, so that blocks take no memory."""

    def __init__(self, folder: Path, files: contextlib.ExitStack) -> None:
        self.rows = 0
        self.sums = dict.fromkeys(("sequences", "tokens", "masked", "positions"), 0)
        self._files: dict[str, IO[bytes]] = {
            name: files.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
            for name in INDEX_TYPES
        }

    def append(self, columns: Mapping[str, Any]) -> None:
        """Add the rows of one shard."""
        for name, column in columns.items():
            values = column.to_numpy()
            self._files[name].write(values.tobytes())
            if name in self.sums:
                self.sums[name] += int(values.sum(dtype="uint64"))
        self.rows += len(columns["round"])

    def batch(self) -> Any:
        """All rows as one record batch, mapped into memory."""
        arrays = []
        for name, file in self._files.items():
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if self.rows else b""
            buffers = [None, pa.py_buffer(mapped)]
            arrays.append(pa.Array.from_buffers(INDEX_TYPES[name], self.rows, buffers))
        return pa.record_batch(arrays, names=list(INDEX_TYPES))


def _write_index(path: Path, markers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Write the index from the markers of all shards; returns their totals."""
    totals: dict[str, Any] = {"shards": 0, "bytes": 0, "clipped_codes": 0}
    names: dict[str, int] = {}
    with contextlib.ExitStack() as files:
        spool = _Spool(path.parent, files)
        for marker in markers:
            spool.append(marker_columns(marker))
            for name, size in marker["column_bytes"].items():
                names[name] = names.get(name, 0) + size
            totals["shards"] += 1
            totals["bytes"] += marker["bytes"]
            totals["clipped_codes"] += marker["clipped_codes"]
        batch = spool.batch()

        def fill(file: Any) -> None:
            with pa.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)

        write_atomically(path, fill)
    return {**totals, **spool.sums, "blocks": spool.rows, "column_bytes": names}


def open_index(path: Path) -> Any:
    """The index as a table of one chunk, mapped into memory.

    Raises:
        Unreadable: The file cannot be read or mapped.
        UserError: It is not an index.
    """
    try:
        with open_plain(path) as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        # An Arrow file is 8 bytes of magic, then a stream, then a footer.
        batch = read_only_batch(pa.py_buffer(mapped).slice(8), lists=False)
        if {field.name: field.type for field in batch.schema} != INDEX_TYPES:
            raise ValueError("other columns")
        if any(column.null_count for column in batch.columns):
            raise ValueError("rows with nothing in them")
        return pa.Table.from_batches([batch])
    except READ_ERRORS as error:
        of_disk = isinstance(error, OSError) and error.errno is not None  # pyarrow's have none
        raise (Unreadable if of_disk else UserError)(
            f"cache: {path} must be an index of blocks, got: {reason_of(error)}"
        ) from None


def finish_cache(
    path: Path,
    markers: Iterable[dict[str, Any]],
    *,
    encoding: Encoding,
    head: LMHeadSpec | None,
    provenance: Mapping[str, Any],
    rounds: int,
) -> CacheManifest:
    """Write the index, then the manifest.

    Args:
        path: The cache.
        markers: Commit markers of all shards in order; a generator saves memory.
        encoding: Of the blocks.
        head: Where the LM head is in the teacher's checkpoint.
        provenance: Content of ``provenance.json``.
        rounds: Maskings of the corpus.

    Raises:
        UserError: The disk is full, or a file of the teacher is not the one of the shards.
    """
    files = _teacher_files(path / "teacher", encoding, provenance["identity"])
    try:
        totals = _write_index(path / "index.arrow", markers)
    except OSError as error:
        raise unwritable(path / "index.arrow", error) from None
    index_sha256 = sha256_file(path / "index.arrow")
    identity = sha256_json(provenance["identity"])
    manifest = CacheManifest(
        schema_version=SCHEMA_VERSION,
        encoding=encoding,
        head=head,
        provenance=provenance,
        rounds=rounds,
        totals=totals,
        teacher_files=files,
        index_sha256=index_sha256,
        fingerprint=hashlib.sha256(f"{identity}{index_sha256}".encode()).hexdigest(),
    ).seal()
    write_json(path / "manifest.json", manifest.to_dict())
    return manifest


def _teacher_files(folder: Path, encoding: Encoding, identity: Mapping[str, Any]) -> dict[str, str]:
    """Name to hash of the teacher's files, without files that are not its own.

    Raises:
        UserError: The weights or a codec are damaged.
    """
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and _FILE_NAME.fullmatch(p.name))
    files = hashes_of(folder, names)
    for name, wanted in known_files(encoding, identity).items():
        found = files.get(name, "no file")
        if found != wanted:
            raise UserError(
                f"cache: {folder / name} must have sha256 {wanted[:16]}, got {found[:16]}; delete "
                "it and repeat the command, which makes it again: the shards are kept"
            )
    return files


def known_files(encoding: Encoding, identity: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the teacher's files that are also written down outside ``teacher_files``."""
    known = {s.codec_name: s.codec_sha256 for s in encoding.states if s.codec_sha256}
    weights = identity.get("teacher_sha256")
    return {**known, "model.safetensors": weights} if isinstance(weights, str) else known
