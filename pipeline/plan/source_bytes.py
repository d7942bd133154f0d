"""How many bytes of text the sources of a recipe hold, and a sample of it.

Of many files some are read, evenly spaced: as much of each as tells how its text relates to its
size.
"""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from distilcache.data.errors import UserError
from distilcache.stages.corpus.config import CorpusConfig
from distilcache.stages.corpus.text.documents import segments_of
from distilcache.stages.corpus.text.readers import Reading, Source, empty_error
from distilcache.stages.corpus.text.rows import row_texts
from distilcache.stages.corpus.text.streams import open_bytes

SAMPLE_BYTES = 1 << 22
"""Text that is taken as a sample."""
READ_BYTES = 1 << 26
"""Text that is read of all files of a kind to estimate their size."""
FILE_BYTES = 1 << 22
"""Text that is enough of one file, where there are many."""
MOST_FILES = 256
"""Files of a kind that are read."""

Sized = list[tuple[Source, float]]
"""Sources, and the bytes of text that each of them stands for."""


def text_bytes(config: CorpusConfig, sources: Sequence[Source], most: float = math.inf) -> Sized:
    """Some of the sources, which stand for all of them.

    ``most`` is the text that is wanted at all.

    Raises:
        UserError: A source cannot be read or sized; one that was named, or all, have no text.
    """
    reading = config.reading(lambda _: None)
    found: Sized = []
    groups: dict[tuple[str, str], list[tuple[Source, int]]] = {}
    for source in sources:
        if source.kind in ("hf", "docstrings"):
            found.append((source, _whole(source, reading, most)))
        elif (size := source.size()) is None:
            raise UserError(
                f"plan: size of {source.name} must be known, got none from its server; pass "
                "--tokens N"
            )
        elif size:
            groups.setdefault((source.kind, source.compression), []).append((source, size))
    for files in groups.values():
        sizes = [size for _, size in files]
        wanted = READ_BYTES // min(FILE_BYTES, sum(sizes) // len(files))
        count = max(1, min(len(files), MOST_FILES, wanted))
        chosen = [files[i * len(files) // count] for i in range(count)]
        scale = sum(sizes) / sum(size for _, size in chosen)
        for source, stored in chosen:
            found.append((source, scale * _file_bytes(source, stored, reading, READ_BYTES / count)))
    for source, bytes_ in found:
        if not bytes_ and not source.of_many:
            raise empty_error(source)
    if not any(bytes_ for _, bytes_ in found):
        raise empty_error(sources[0])
    return found


def sample_of(config: CorpusConfig, sized: Sized) -> tuple[list[str], int]:
    """About ``SAMPLE_BYTES`` of text, of each source its share, and how many bytes these are."""
    total = sum(bytes_ for _, bytes_ in sized)
    texts: list[str] = []
    taken = 0
    for source, bytes_ in sized:
        rest = math.ceil(SAMPLE_BYTES * bytes_ / total)
        with closing(segments_of(source, config.reading(lambda _: None))) as found:
            for text, data, _ in found:
                if len(data) > rest:
                    data = data[:rest]
                    text = data.decode(errors="ignore")
                texts += text.split("\n") if config.packing == "lines" else (text,)
                taken += len(data)
                rest -= len(data)
                if rest <= 0:
                    break
    return texts, taken


def _whole(source: Source, reading: Reading, most: float) -> int:
    """Bytes of text in a source without a size of its own, which is read for that."""
    limit = SAMPLE_BYTES if source.kind == "hf" else most
    size = 0
    with closing(segments_of(source, reading)) as found:
        for _, data, _ in found:
            size += len(data)
            if size >= limit:
                break
    if source.kind == "hf" and size >= limit:
        raise UserError(
            f"plan: size of {source.name} must be known, got a data set of the hub, whose size is "
            "not known; pass --tokens N"
        )
    return size


def _file_bytes(source: Source, stored: int, reading: Reading, enough: float) -> float:
    """Bytes of text in one file, from its size and the text at its start."""
    if source.kind == "parquet":
        return _parquet_bytes(source, reading, enough)
    counted = _Counted(source.filesystem)
    size, position, seen = 0, 0, (0, 0)
    watched = replace(source, filesystem=counted, of_many=False)
    with closing(segments_of(watched, reading)) as found:
        for _, data, _ in found:
            if counted.position != position:  # all bytes before have been returned as text by now
                seen, position = (size, position), counted.position
            size += len(data)
            if size >= enough and all(seen):
                return seen[0] / seen[1] * stored
    return size


class _Counted:
    """A file system that knows how far its last opened file has been read.

    So the size of compressed text can be related to that of the file.
    """

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem
        self._file: Any = None
        self.position = 0

    def open(self, path: str, _: str) -> "_Counted":
        self._file = open_bytes(path, self._filesystem)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> Any:
        data = self._file.read(size)
        self.position = self._file.tell()
        return data


def _parquet_bytes(source: Source, reading: Reading, enough: float) -> float:
    """Bytes of text in a table, from the number of its rows and the text of the first ones."""
    import pyarrow.parquet as pq

    size = 0
    for rows, text in enumerate(row_texts(source, reading), start=1):
        lines = text.split("\n") if reading.document == "line" else (text,)
        size += sum(len(line.strip().encode(errors="replace")) for line in lines)
        if size >= enough:
            with closing(open_bytes(source.path, source.filesystem)) as raw:
                return size / rows * int(pq.ParquetFile(raw).metadata.num_rows)
    return size
