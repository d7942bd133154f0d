"""One unit of corpus work: documents in, one committed part file out.

A unit's documents are tokenised in batches, by one or many processes, and committed as a whole. The
part has the same bytes and name whichever processes make it, and however often. Worker processes
run this module, so it imports neither transformers nor torch.

Legend: ``B`` documents or sequences, ``T`` tokens, ``V`` vocabulary.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from distilcache.data.corpus.packing import Array, Packed, pack_blocks, pack_lines
from distilcache.data.corpus.parts import count_tokens, encode_part
from distilcache.data.errors import UserError
from distilcache.data.storage.files import read_json, sha256_file, write_bytes, write_json
from distilcache.stages.corpus.tokenise import Tokens, open_tokenizer, tokenise
from distilcache.stages.models.pieces import CutFirst


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSettings:
    """Settings that all parts of a corpus have in common."""

    folder: str
    """Folder of the corpus."""
    tokenizer_sha256: str
    packing: str
    max_length: int
    min_tokens: int
    block_sequences: int
    vocab_size: int
    special_ids: dict[str, int]
    """Ids of pad, cls, sep, mask and unk (-1: none)."""
    role_tokens: tuple[str, ...]
    """Tokens that are plain text within a text."""
    cls_last: bool = False
    """Whether sequences end in ``<sep> <cls>``."""
    by_code: bool = False
    """Whether Python code cuts text into pieces, see ``PieceTokenizer``."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint16 if the vocabulary fits, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)


def part_name(index: int) -> str:
    """File name of a part, without folder."""
    return f"part-{index:06d}.arrow"


@dataclass(frozen=True, slots=True)
class Unit:
    """Consecutive documents of one split that become one part; runs resume by unit."""

    split: str
    index: int
    documents: int
    text_bytes: int
    text_sha256: str
    alone: bool
    """Whether it is the only unit of its split."""

    @property
    def part(self) -> str:
        """File name of the part, without folder."""
        return part_name(self.index)


class Batch(NamedTuple):
    """Documents that are tokenised in one call."""

    texts: list[str]
    size: int
    """Bytes of UTF-8."""


Work = tuple[Unit, list[Batch]]
"""A unit and its documents."""


@dataclass(frozen=True, slots=True)
class Done:
    """A committed unit."""

    split: str
    index: int
    marker: dict[str, Any]
    """Content of its commit marker."""
    counts: npt.NDArray[np.int64]
    """int64 [V]."""


def find_done(settings: PartSettings, unit: Unit) -> Done | None:
    """The unit's part, if it is committed, undamaged and from the same text and tokenizer."""
    part = Path(settings.folder) / unit.split / unit.part
    try:
        marker = read_json(part.with_suffix(".json"), "corpus: commit marker")
    except UserError:
        return None
    key = _key(settings, unit)
    if not isinstance(marker, dict) or {name: marker.get(name) for name in key} != key:
        return None
    counts = np.zeros(settings.vocab_size, dtype=np.int64)
    if marker.get("sequences"):
        if not part.is_file() or sha256_file(part) != marker.get("sha256"):
            return None
        counts = count_tokens(part, settings.vocab_size)
    return Done(unit.split, unit.index, marker, counts)


def commit_unit(settings: PartSettings, unit: Unit, tokens: Sequence[Tokens]) -> Done:
    """Pack and commit one unit from the tokens of its batches, in order.

    Raises:
        UserError: The part cannot be written.
    """
    ids, lengths = (np.concatenate(arrays) for arrays in zip(*tokens, strict=True))
    packed = _pack(settings, unit, ids, lengths)
    marker = _key(settings, unit) | {
        "documents": unit.documents,
        "text_bytes": unit.text_bytes,
        "sequences": len(packed.lengths),
        "tokens": len(packed.ids),
        "text_tokens": len(ids),
        "unknown_tokens": int(np.count_nonzero(ids == settings.special_ids["unk"])),
        "dropped_tokens": packed.dropped_tokens,
        "short_sequences": packed.short,
        "unknown_sequences": packed.unknown,
    }
    path = Path(settings.folder) / unit.split / unit.part
    if len(packed.lengths):
        content, blocks = encode_part(packed, settings.block_sequences)
        write_bytes(path, content)
        digest = hashlib.sha256(content).hexdigest()
        marker |= {"blocks": blocks, "bytes": len(content), "sha256": digest}
    write_json(path.with_suffix(".json"), marker)
    counts = np.bincount(packed.ids, minlength=settings.vocab_size)
    return Done(unit.split, unit.index, marker, counts)


def corpus_tokenizer(settings: PartSettings) -> Tokenizer | CutFirst:
    """The corpus's tokenizer, see :func:`open_tokenizer`."""
    folder = Path(settings.folder) / "tokenizer"
    content = (folder / "tokenizer.json").read_text(encoding="utf-8")
    opened = open_tokenizer(content, settings.role_tokens)
    if not settings.by_code:
        return opened
    from distilcache.stages.models.piece_tokenizer import cutter
    from distilcache.stages.models.tokenizers import load_tokenizer

    return CutFirst(opened, cutter(load_tokenizer(folder).slow, settings.role_tokens))


def _key(settings: PartSettings, unit: Unit) -> dict[str, Any]:
    """What decides the content of a part, besides the common settings."""
    key = {
        "text_sha256": unit.text_sha256,
        "tokenizer_sha256": settings.tokenizer_sha256,
        "alone": unit.alone,
    }
    # Parts of older versions lack what mBART-25 has last.
    return key | ({"last": settings.special_ids["cls"]} if settings.cls_last else {})


def _pack(settings: PartSettings, unit: Unit, ids: Array, lengths: npt.NDArray[np.int64]) -> Packed:
    special = settings.special_ids
    shape: dict[str, Any] = {
        "max_length": settings.max_length,
        "min_tokens": settings.min_tokens,
        "cls_id": special["cls"],
        "sep_id": special["sep"],
        "cls_last": settings.cls_last,
    }
    if settings.packing == "lines":
        return pack_lines(ids, lengths, unk_id=special["unk"], **shape)
    return pack_blocks(ids, lengths, keep_tail=unit.alone, **shape)


_process: tuple[PartSettings, Tokenizer | CutFirst]
"""Settings and tokenizer of a worker process."""


def start_process(settings: PartSettings) -> None:
    """Set up a worker process, whose tokenizer uses one thread."""
    global _process
    # In a thread pool of one, which takes 5 % less time than the main thread (measured).
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "1"}
    _process = settings, corpus_tokenizer(settings)


def tokenise_here(documents: list[str]) -> Tokens:
    """:func:`tokenise` in a process that :func:`start_process` has set up."""
    settings, tokenizer = _process
    return tokenise(tokenizer, documents, settings.dtype)
