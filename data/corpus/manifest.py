"""What a corpus says of itself: its ``manifest.json``."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

from distilcache.data.errors import UserError, require
from distilcache.data.storage.files import read_json, sha256_json

SCHEMA_VERSION = 1
SPLITS = ("train", "heldout")
REBUILD = "delete the corpus folder and run distilcache corpus"
"""The remedy for a damaged one."""


class PartEntry(TypedDict):
    """One file of a split."""

    file: str
    blocks: int
    sequences: int
    tokens: int
    bytes: int
    sha256: str


class SplitEntry(TypedDict):
    """Totals and parts of a split."""

    documents: int
    sequences: int
    tokens: int
    blocks: int
    text_tokens: int  # of the documents
    unknown_tokens: int  # of these
    dropped_tokens: int  # of these, not in a sequence
    short_sequences: int  # dropped
    unknown_sequences: int  # dropped, half of their tokens are unknown
    parts: list[PartEntry]


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusManifest:
    """What a corpus holds and how to read it."""

    schema_version: int = SCHEMA_VERSION
    """Version of this layout."""
    packing: str
    """``blocks`` or ``lines``."""
    max_length: int
    """Largest number of tokens per sequence, special tokens included."""
    vocab_size: int
    """Rows of ``token_counts``: one more than the largest id of the tokenizer."""
    token_dtype: str
    """``uint16`` or ``uint32``."""
    tokenizer_sha256: str
    """See ``tokenizer_fingerprint``."""
    special_ids: dict[str, int]
    """Ids of pad, cls, sep, mask and unk (-1: none)."""
    all_special_ids: tuple[int, ...]
    """Every id that is never masked, ascending."""
    source_fingerprint: str
    """sha256 over the texts of all parts."""
    splits: dict[str, SplitEntry]
    """``train`` and ``heldout``."""
    fingerprint: str = field(default="")
    """sha256 over everything above: identifies the corpus, independent of its path."""
    tokenizer_files: dict[str, str] = field(default_factory=dict)
    """Name to sha256 of the files in ``tokenizer/``. Not part of the fingerprint, since libraries
    of other versions write other files; empty in corpora of version 0.2.0 and before."""

    def seal(self) -> "CorpusManifest":
        """The same manifest with its fingerprint filled in."""
        values = asdict(self) | {"fingerprint": ""}
        content = {name: value for name, value in values.items() if name != "tokenizer_files"}
        return CorpusManifest(**(values | {"fingerprint": sha256_json(content)}))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def read_manifest(path: Path) -> CorpusManifest:
    """The manifest of the corpus in a folder.

    Raises:
        UserError: It is missing, damaged, or of another version.
    """
    file = path / "manifest.json"
    if not file.exists():
        state = "an incomplete one" if (path / "build.json").exists() else "none"
        raise UserError(
            f"corpus: {path} must be a finished corpus, got {state}; run distilcache corpus"
        )
    values = read_json(file, "corpus: manifest", remedy=f"; {REBUILD}")
    version = values.get("schema_version") if isinstance(values, dict) else None
    require(
        version == SCHEMA_VERSION,
        f"corpus: {file} must have schema_version {SCHEMA_VERSION}, got {version}; {REBUILD}",
    )
    names = {f.name for f in fields(CorpusManifest)}
    values.setdefault("tokenizer_files", {})
    require(
        set(values) == names,
        f"corpus: {file} must hold the fields of schema_version {SCHEMA_VERSION}, got others: "
        f"{', '.join(sorted(set(values) ^ names))}; {REBUILD}",
    )
    manifest = CorpusManifest(**(values | {"all_special_ids": tuple(values["all_special_ids"])}))
    require(
        manifest.seal() == manifest,
        f"corpus: {file} must carry its own fingerprint, got an edited file; {REBUILD}",
    )
    require(
        isinstance(manifest.tokenizer_files, dict),
        f"corpus: {file} must list the tokenizer's files, got something else; {REBUILD}",
    )
    return manifest


def parts_of(manifest: CorpusManifest) -> Iterator[tuple[str, PartEntry]]:
    """All parts, each with the name of its split."""
    for name, entry in manifest.splits.items():
        for part in entry["parts"]:
            yield name, part
