"""Documents to units of work: which split, which unit; a pure function of the text."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Generator, Iterator
from typing import NamedTuple

from distilcache.data.corpus.store import SPLITS
from distilcache.stages.corpus.account import say
from distilcache.stages.corpus.config import CorpusConfig
from distilcache.stages.corpus.duplicates import Copies
from distilcache.stages.corpus.text.documents import iter_documents
from distilcache.stages.corpus.text.readers import Source
from distilcache.stages.corpus.worker import Unit

_TO_SPACES = bytes.maketrans(b"\t\n\r\v\f", b"     ")


class Piece(NamedTuple):
    """A document, a piece of a long one, or a line of one."""

    split: str
    text: str
    data: bytes
    """Its UTF-8."""
    begins: bool
    """A document begins with it."""


def split_documents(
    config: CorpusConfig, sources: list[Source], heldout: list[Source]
) -> Generator[Piece, None, None]:
    """Documents with their split, until ``max_bytes`` of training text are there.

    The hash of a document, or of the first piece of a long one, decides for all of it; spaces and
    line ends count for nothing, so that copies are on the same side.
    """
    reading = config.reading(say, config.workers or os.cpu_count() or 1)
    limit = config.max_bytes or sys.maxsize
    threshold = 0 if heldout else int(config.heldout_fraction * 2**64)
    taken, split, copies = 0, "train", Copies()
    found = iter_documents(sources, reading)
    with contextlib.closing(found):
        for text, begins in found:
            data = text.encode()
            if begins:
                key = _hash64(data)
                split = "heldout" if key < threshold else "train"
                if heldout:
                    copies.add(split, key)
            yield from _pieces(config, Piece(split, text, data, begins))
            taken += len(data) if split == "train" else 0
            if taken >= limit:
                break
    for text, begins in iter_documents(heldout, reading):
        data = text.encode()
        if begins:
            copies.add("heldout", _hash64(data))
        yield from _pieces(config, Piece("heldout", text, data, begins))
    if line := copies.line():
        say(line)


def _pieces(config: CorpusConfig, whole: Piece) -> Iterator[Piece]:
    """A text as it is packed: as a whole, or line by line."""
    if config.packing == "blocks" or "\n" not in whole.text:
        yield whole
        return
    begins = whole.begins
    for line in whole.text.split("\n"):
        if line := line.strip():
            yield Piece(whole.split, line, line.encode(), begins)
            begins = False


def _hash64(data: bytes) -> int:
    """Of a text with single spaces."""
    plain = data.translate(_TO_SPACES)
    while b"  " in plain:
        plain = plain.replace(b"  ", b" ")
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "big")


def cut_units(pieces: Iterator[Piece], chunk_bytes: int) -> Iterator[tuple[Unit, list[str]]]:
    """Cut each split into units of about ``chunk_bytes``, each with its text; the last is short."""
    held = {name: _Draft(name) for name in SPLITS}
    for piece in pieces:
        draft = held[piece.split]
        if draft.size >= chunk_bytes:
            yield draft.close(alone=False)
        draft.add(piece)
    for draft in held.values():
        if draft.texts:
            yield draft.close(alone=draft.index == 0)


class _Draft:
    """A unit that still takes documents."""

    def __init__(self, split: str) -> None:
        self.split = split
        self.index = 0
        self._reset()

    def _reset(self) -> None:
        self.texts: list[str] = []
        self.documents = self.size = 0
        self.digest = hashlib.sha256()

    def add(self, piece: Piece) -> None:
        self.texts.append(piece.text)
        self.documents += piece.begins
        self.size += len(piece.data)
        self.digest.update(len(piece.data).to_bytes(8, "big"))
        self.digest.update(piece.data)

    def close(self, alone: bool) -> tuple[Unit, list[str]]:
        digest = self.digest.hexdigest()
        texts = self.texts
        unit = Unit(self.split, self.index, self.documents, self.size, digest, alone)
        self.index += 1
        self._reset()
        return unit, texts
