"""Sources as one stream of documents, in bounded memory.

A document longer than ``MAX_CHARS`` comes in several segments.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

from distilcache.stages.corpus.text import docstrings
from distilcache.stages.corpus.text.readers import Reading, Source, empty_error
from distilcache.stages.corpus.text.rows import row_texts
from distilcache.stages.corpus.text.streams import MAX_CHARS, cut_long, text_lines


class Segment(NamedTuple):
    """A document, or a stretch of a long one."""

    text: str
    data: bytes
    """The text in UTF-8."""
    begins: bool
    """Whether it is the first of its document."""


def iter_documents(sources: Sequence[Source], reading: Reading) -> Generator[Segment, None, None]:
    """Documents of all sources in order; segments are stripped and not empty.

    Raises:
        UserError: A source cannot be read; one that was named, or all of them, have no text.
    """
    empty = []
    for source in sources:
        filled = False
        for segment in segments_of(source, reading):
            yield segment
            filled = True
        if not filled:
            empty.append(source)
            if not source.of_many or len(empty) == len(sources):
                raise empty_error(source)
    if empty:
        reading.say(f"{len(empty):,} of {len(sources):,} files are empty, such as {empty[0].name}")


def segments_of(source: Source, reading: Reading) -> Generator[Segment, None, None]:
    """Documents of one source, which may have none; segments are stripped and not empty.

    Raises:
        UserError: It cannot be read.
    """
    begins = False
    for text, first in _read(source, reading):
        begins |= first
        for stretch in cut_long(text.strip()):
            if stretch := stretch.strip():
                yield Segment(*_encoded(stretch), begins)
                begins = False


def _read(source: Source, reading: Reading) -> Iterator[tuple[str, bool]]:
    """Text of one source, possibly blank, and whether a document begins with it."""
    if source.of_many and source.size() == 0:
        return
    if source.kind == "txt":
        yield from _text(source, reading.document)
        return
    if source.kind == "fasta":
        yield from _records(source)
        return
    if source.kind == "docstrings":
        texts = docstrings.iter_docstrings(source.path, workers=reading.workers)
        split = reading.document == "line"
    else:
        texts, split = row_texts(source, reading), reading.split_rows
    for text in texts:
        for document in text.split("\n") if split else (text,):
            yield document, True


def _text(source: Source, document: str) -> Iterator[tuple[str, bool]]:
    lines: list[str] = []
    size, begins = 0, True
    for line in text_lines(source, cut=True):
        if lines and size + len(line) > MAX_CHARS:
            yield "".join(lines), begins
            lines, size, begins = [], 0, False
        lines.append(line)
        size += len(line)
        if line.endswith("\n") if document == "line" else document != "file" and line.isspace():
            yield "".join(lines), begins
            lines, size, begins = [], 0, True
    yield "".join(lines), begins


def _records(source: Source) -> Iterator[tuple[str, bool]]:
    """Proteins or genes of a FASTA file, each in one piece and without its header.

    Where letters or words stand apart, as for ProtBERT, they do so across lines.
    """
    lines: list[str] = []
    size, begins = 0, True
    for line in text_lines(source, cut=True):
        header = line.startswith((">", ";"))  # The older mark of a header, or a comment.
        if header or (lines and size + len(line) > MAX_CHARS):
            yield _joined(lines), begins
            lines, size, begins = [], 0, header
        if not header:
            lines.append(line.strip())
            size += len(line)
    yield _joined(lines), begins


def _joined(lines: list[str]) -> str:
    return (" " if any(" " in line for line in lines) else "").join(lines)


def _encoded(text: str) -> tuple[str, bytes]:
    """Text and its UTF-8; lone surrogates (from escapes in JSON and Python) are replaced."""
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        data = text.encode(errors="replace")
        return data.decode(), data
