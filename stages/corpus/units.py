"""Documents to units of work: which split and which unit, a pure function of the text.

Text is encoded to UTF-8 once: its bytes decide the split, the size and the hash of a unit.
"""

import contextlib
import hashlib
import sys
from collections.abc import Generator, Iterator
from typing import NamedTuple

from distilcache.data.cores import cores
from distilcache.data.corpus.manifest import SPLITS
from distilcache.stages.corpus.account import say
from distilcache.stages.corpus.config import CorpusConfig
from distilcache.stages.corpus.duplicates import Duplicates
from distilcache.stages.corpus.text.documents import iter_documents
from distilcache.stages.corpus.text.readers import Source
from distilcache.stages.corpus.worker import Batch, Unit, Work

BATCH_BYTES = 1 << 19
"""Text per call of the tokenizer: its encodings take about 30 times the memory of the text."""
_TO_SPACES = bytes.maketrans(b"\t\n\r\v\f", b"     ")


class Passage(NamedTuple):
    """A document, a stretch of a long one, or a line of one."""

    split: str
    text: str
    data: bytes
    """The text in UTF-8."""
    begins: bool
    """It is the first of its document."""


def split_documents(
    config: CorpusConfig, sources: list[Source], heldout: list[Source]
) -> Generator[Passage, None, None]:
    """Documents with their split, up to ``max_bytes`` of training text.

    The hash of a document, or of the first stretch of a long one, decides the split of the whole
    document. Differences in white space do not change the hash, so duplicates are in one split.
    """
    reading = config.reading(say, config.workers or cores())
    limit = config.max_bytes or sys.maxsize
    threshold = 0 if heldout else int(config.heldout_fraction * 2**64)
    taken, split, duplicates = 0, "train", Duplicates()
    cut = config.packing == "lines" and not config.document  # text files give single lines
    rows_of_lines = 0
    with contextlib.closing(iter_documents(sources, reading)) as found:
        for text, data, begins in found:
            if begins:
                key = _hash64(data)
                split = "heldout" if key < threshold else "train"
                if heldout:
                    duplicates.add(split, key)
                rows_of_lines += cut and "\n" in text
            yield from _passages(config, Passage(split, text, data, begins))
            taken += len(data) if split == "train" else 0
            if taken >= limit:
                break
    for text, data, begins in iter_documents(heldout, reading):
        if begins:
            duplicates.add("heldout", _hash64(data))
        yield from _passages(config, Passage("heldout", text, data, begins))
    if rows_of_lines:
        say(
            f"{rows_of_lines:,} rows have several lines: each line is a sequence, a row is held "
            "out as a whole"
        )
    if line := duplicates.line():
        say(line)


def _passages(config: CorpusConfig, whole: Passage) -> Iterator[Passage]:
    """A text as it is packed: whole, or line by line."""
    if config.packing == "blocks" or "\n" not in whole.text:
        yield whole
        return
    begins = whole.begins
    for line, data in zip(whole.text.split("\n"), whole.data.split(b"\n"), strict=True):
        if text := line.strip():
            yield Passage(whole.split, text, data if text == line else text.encode(), begins)
            begins = False


def _hash64(data: bytes) -> int:
    """Hash of a text with each run of white space as one space."""
    plain = data.translate(_TO_SPACES)
    while b"  " in plain:
        plain = plain.replace(b"  ", b" ")
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "big")


def cut_units(passages: Iterator[Passage], chunk_bytes: int) -> Iterator[Work]:
    """Cut each split into units of about ``chunk_bytes`` with their text; the last is shorter."""
    drafts = {name: _Draft(name) for name in SPLITS}
    for passage in passages:
        draft = drafts[passage.split]
        if draft.size >= chunk_bytes:
            yield draft.close(alone=False)
        draft.add(passage)
    for draft in drafts.values():
        if draft.batches:
            yield draft.close(alone=draft.index == 0)


class _Draft:
    """A unit that still takes text."""

    def __init__(self, split: str) -> None:
        self.split = split
        self.index = 0
        self._reset()

    def _reset(self) -> None:
        self.batches: list[Batch] = []
        self.documents = self.size = 0
        self._digest = hashlib.sha256()

    def add(self, passage: Passage) -> None:
        size = len(passage.data)
        if not self.batches or self.batches[-1].size >= BATCH_BYTES:
            self.batches.append(Batch([], 0))
        texts, before = self.batches[-1]
        texts.append(passage.text)
        self.batches[-1] = Batch(texts, before + size)
        self.documents += passage.begins
        self.size += size
        self._digest.update(size.to_bytes(8, "big"))
        self._digest.update(passage.data)

    def close(self, alone: bool) -> Work:
        digest = self._digest.hexdigest()
        unit = Unit(self.split, self.index, self.documents, self.size, digest, alone)
        work = unit, self.batches
        self.index += 1
        self._reset()
        return work
