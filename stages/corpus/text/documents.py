"""Sources as one stream of documents: text by its lines, rows by their field; bounded memory.

A document of more than ``MAX_CHARS`` comes in pieces, each with the word whether it begins one.
"""

from collections.abc import Generator, Iterator, Sequence

from distilcache.stages.corpus.text import docstrings
from distilcache.stages.corpus.text.readers import Reading, Source, empty_error
from distilcache.stages.corpus.text.rows import row_texts
from distilcache.stages.corpus.text.streams import MAX_CHARS, cut_long, text_lines

Piece = tuple[str, bool]
"""Text, and whether a document begins with it."""


def iter_documents(sources: Sequence[Source], reading: Reading) -> Generator[Piece, None, None]:
    """Documents of all sources in order, in pieces that are stripped, none of them empty.

    Raises:
        UserError: A source cannot be read, or one is without text.
    """
    for source in sources:
        filled = begins = False
        for text, first in _read(source, reading):
            begins |= first
            for piece in cut_long(text.strip()):
                if piece := piece.strip():
                    yield _encodable(piece), begins
                    filled, begins = True, False
        if not filled:
            raise empty_error(source)


def _read(source: Source, reading: Reading) -> Iterator[Piece]:
    """Raw text of one source, some of it perhaps blank."""
    if source.kind == "txt":
        yield from _text(source, reading.document)
        return
    if source.kind == "docstrings":
        texts = docstrings.iter_docstrings(source.path, workers=reading.workers)
    else:
        texts = row_texts(source, reading)
    for text in texts:
        for part in text.split("\n") if reading.document == "line" else (text,):
            yield part, True


def _text(source: Source, document: str) -> Iterator[Piece]:
    held: list[str] = []
    size, begins = 0, True
    for line in text_lines(source.path, source.compression, source.filesystem, cut=True):
        if held and size + len(line) > MAX_CHARS:
            yield "".join(held), begins
            held, size, begins = [], 0, False
        held.append(line)
        size += len(line)
        if line.endswith("\n") if document == "line" else document != "file" and line.isspace():
            yield "".join(held), begins
            held, size, begins = [], 0, True
    yield "".join(held), begins


def _encodable(text: str) -> str:
    """Lone surrogates (escapes in JSON and Python) have no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text
