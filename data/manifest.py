"""The small files that sum a cache up: the index of its blocks, and the manifest, written last."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from data.codecs.lm_head import HeadSpec
from data.errors import UserError
from data.files import sha256_file, sha256_json, write_atomically, write_json
from data.schema import SCHEMA_VERSION, Encoding

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
    teacher_files: Mapping[str, str]
    """Name to sha256 of the files in ``teacher/``."""
    index_sha256: str
    fingerprint: str
    """Hash of identity and index: names the content of this cache."""
    sha256: str = ""
    """Hash of everything above: an edited manifest is refused."""

    @property
    def clipped_share(self) -> float:
        """Share of the hidden-state codes that left the range of their codec."""
        coded = sum(h.width for h in self.encoding.hidden if h.dtype == "coded")
        codes = coded * int(self.totals.get("positions", 0))
        return int(self.totals["clipped_codes"]) / codes if codes else 0.0

    def seal(self) -> "CacheManifest":
        """The same manifest with its own hash filled in."""
        values = {k: v for k, v in self.to_dict().items() if k != "sha256"}
        return replace(self, sha256=sha256_json(values))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CacheManifest":
        """Inverse of :meth:`to_dict`.

        Raises:
            UserError: The schema is another one, a field is missing, or the file was edited.
        """
        version = values.get("schema_version") if isinstance(values, Mapping) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"cache: schema_version must be {SCHEMA_VERSION}, got {version!r}; use the version "
                "of distilcache that wrote it"
            )
        try:
            head = HeadSpec(**values["head"]) if values["head"] else None
            known = {f.name: values[f.name] for f in fields(cls)}
            encoding = Encoding.from_dict(values["encoding"])
            content = {k: v for k, v in values.items() if k != "sha256"}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"cache: manifest must be whole, got a bad field: {error}") from None
        if sha256_json(content) != known["sha256"]:
            raise UserError(
                "cache: manifest must carry its own sha256, got an edited file; delete "
                "manifest.json and run distilcache teacher-cache again: the shards are kept"
            )
        return cls(**{**known, "head": head, "encoding": encoding})


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
        teacher_files={p.name: sha256_file(p) for p in sorted((path / "teacher").iterdir())},
        index_sha256=index_sha256,
        fingerprint=hashlib.sha256(f"{identity}{index_sha256}".encode()).hexdigest(),
    ).seal()
    write_json(path / "manifest.json", manifest.to_dict())
    return manifest
