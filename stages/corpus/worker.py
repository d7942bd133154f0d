"""One unit of corpus work: documents in, one committed part out.

A unit's documents are tokenised piece by piece, perhaps by many processes, and committed as a
whole. Runs in worker processes too, so it imports no transformers and no torch. Whichever
processes do a unit, and however often, write the same bytes under the same name.

Legend: ``B`` documents or sequences, ``T`` tokens, ``V`` vocabulary.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from distilcache.data.corpus.packing import Array, Packed, pack_blocks, pack_lines
from distilcache.data.corpus.parts import count_tokens, encode_part
from distilcache.data.errors import UserError
from distilcache.data.storage.files import read_json, sha256_file, write_bytes, write_json
from distilcache.stages.corpus.tokenise import (
    Tokens,
    cut_pieces,
    open_tokenizer,
    tokenise,
    utf8_bytes,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSettings:
    """What every part of a corpus has in common."""

    folder: str
    """The corpus."""
    tokenizer_sha256: str
    packing: str
    max_length: int
    min_tokens: int
    block_sequences: int
    vocab_size: int
    special_ids: dict[str, int]
    """Ids of pad, cls, sep, mask and unk (-1: none)."""
    role_tokens: tuple[str, ...]
    """Tokens that are text where a text holds them."""
    cls_last: bool = False
    """Sequences are ``... <sep> <cls>``."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint16 where the vocabulary fits."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)


def part_name(index: int) -> str:
    """File name of a split's part, without folder."""
    return f"part-{index:06d}.arrow"


@dataclass(frozen=True, slots=True)
class Unit:
    """A stretch of one split's documents: the unit of tokenising and of resuming."""

    split: str
    index: int
    documents: int
    text_bytes: int
    text_sha256: str
    alone: bool
    """The split has no other unit."""

    @property
    def part(self) -> str:
        """File name of the part, without folder."""
        return part_name(self.index)


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
    """The unit's part where it is committed and whole, from the same text and tokenizer."""
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


def do_unit(
    settings: PartSettings,
    tokenizer: Tokenizer,
    unit: Unit,
    documents: list[str],
    progress: Callable[[int], None],
) -> Done:
    """Tokenise, pack and commit one unit.

    Args:
        settings: What the parts have in common.
        tokenizer: From :func:`corpus_tokenizer`.
        unit: Which one.
        documents: Its text.
        progress: Is told the bytes of text done since the last call.

    Raises:
        UserError: The part cannot be written.
    """
    tokens = []
    for piece in cut_pieces(documents):
        tokens.append(tokenise(tokenizer, piece, settings.dtype))
        progress(utf8_bytes(piece))
    return commit_unit(settings, unit, tokens)


def commit_unit(settings: PartSettings, unit: Unit, tokens: Sequence[Tokens]) -> Done:
    """Pack and commit one unit from the tokens of its pieces, in order.

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


def corpus_tokenizer(settings: PartSettings) -> Tokenizer:
    """The corpus's tokenizer, see :func:`open_tokenizer`."""
    path = Path(settings.folder) / "tokenizer" / "tokenizer.json"
    return open_tokenizer(path.read_text(encoding="utf-8"), settings.role_tokens)


def _key(settings: PartSettings, unit: Unit) -> dict[str, Any]:
    """What decides the content of a part, besides the settings that all share."""
    return {
        "text_sha256": unit.text_sha256,
        "tokenizer_sha256": settings.tokenizer_sha256,
        "alone": unit.alone,
    }


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


_process: tuple[PartSettings, Tokenizer] | None = None
"""What :func:`start_process` set up in a worker process."""


def start_process(settings: PartSettings) -> None:
    """Set up a worker process, whose tokenizer uses one thread."""
    global _process
    # In a pool of one: there it takes 5 % less time than in the main thread (measured).
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "1"}
    _process = settings, corpus_tokenizer(settings)


def tokenise_here(documents: list[str]) -> Tokens:
    """:func:`tokenise` with what :func:`start_process` set up."""
    assert _process is not None
    settings, tokenizer = _process
    return tokenise(tokenizer, documents, settings.dtype)


def commit_here(unit: Unit, tokens: Sequence[Tokens]) -> Done:
    """:func:`commit_unit` with what :func:`start_process` set up."""
    assert _process is not None
    return commit_unit(_process[0], unit, tokens)
