"""Documents to units of work: which split, which unit; a pure function of the text."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Generator, Iterator

from data.corpus import SPLITS
from data.readers import Source
from data.sources import iter_documents
from stages.corpus.config import CorpusConfig
from stages.corpus.worker import Unit

Document = tuple[str, str, bytes]
"""Split, text, and its UTF-8."""


def split_documents(
    config: CorpusConfig, sources: list[Source], heldout: list[Source]
) -> Generator[Document, None, None]:
    """Documents with their split, until ``max_bytes`` of training text are there."""
    workers = config.workers or os.cpu_count() or 1
    lines = config.packing == "lines"
    limit = config.max_bytes or sys.maxsize
    threshold = 0 if heldout else int(config.heldout_fraction * 2**64)
    taken = 0
    found = iter_documents(sources, text_field=config.text_field, lines=lines, workers=workers)
    with contextlib.closing(found):
        for text in found:
            data = text.encode()
            if _hash64(data) < threshold:
                yield "heldout", text, data
                continue
            yield "train", text, data
            taken += len(data)
            if taken >= limit:
                break
    for text in iter_documents(heldout, text_field=config.text_field, lines=lines, workers=workers):
        yield "heldout", text, text.encode()


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def cut_units(documents: Iterator[Document], chunk_bytes: int) -> Iterator[tuple[Unit, list[str]]]:
    """Cut each split into units of about ``chunk_bytes``, each with its text; the last is short."""
    held = {name: _Draft(name) for name in SPLITS}
    for split, text, data in documents:
        draft = held[split]
        if draft.size >= chunk_bytes:
            yield draft.close(alone=False)
        draft.add(text, data)
    for draft in held.values():
        if draft.documents:
            yield draft.close(alone=draft.index == 0)


class _Draft:
    """A unit that still takes documents."""

    def __init__(self, split: str) -> None:
        self.split = split
        self.index = 0
        self._reset()

    def _reset(self) -> None:
        self.documents: list[str] = []
        self.size = 0
        self.digest = hashlib.sha256()

    def add(self, text: str, data: bytes) -> None:
        self.documents.append(text)
        self.size += len(data)
        self.digest.update(len(data).to_bytes(8, "big"))
        self.digest.update(data)

    def close(self, alone: bool) -> tuple[Unit, list[str]]:
        digest = self.digest.hexdigest()
        documents = self.documents
        unit = Unit(self.split, self.index, len(documents), self.size, digest, alone)
        self.index += 1
        self._reset()
        return unit, documents
