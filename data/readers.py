"""One reader per kind of source: text, jsonl, parquet, Hugging Face data set, docstrings."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import docstrings
from data.errors import UserError, require
from data.streams import MAX_CHARS, open_bytes, text_lines

PARQUET_ROWS = 1024
"""Rows decoded at a time."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file, dataset or embedded corpus."""

    name: str
    """As the recipe gives it; below a directory or glob, the path of the file."""
    kind: str
    """``txt``, ``jsonl``, ``parquet``, ``hf`` or ``docstrings``."""
    compression: str = ""
    """``gz``, ``zst``, ``xz`` or none."""
    filesystem: Any = None
    """fsspec filesystem; None: the local one."""
    path: str = ""
    """Path in ``filesystem``; of ``hf`` and ``docstrings``, what follows the colon."""

    def size(self) -> int:
        """Bytes of the file as stored."""
        if self.filesystem is None:
            return Path(self.path).stat().st_size
        return int(self.filesystem.info(self.path)["size"] or 0)


def empty_error(source: Source) -> UserError:
    """A source without a single document."""
    return UserError(
        f"corpus: source must hold text, got an empty file: {source.name}; remove it or fill it"
    )


def read_documents(source: Source, text_field: str, lines: bool, workers: int) -> Iterator[str]:
    """Raw documents of one source: unstripped, some perhaps empty.

    Raises:
        UserError: The source cannot be read or lacks the field.
    """
    if source.kind == "txt":
        return _text(source, lines)
    if source.kind == "jsonl":
        return _jsonl(source, text_field)
    if source.kind == "parquet":
        return _parquet(source, text_field)
    if source.kind == "hf":
        return _hub(source, text_field)
    return docstrings.iter_docstrings(source.path, workers=workers)


def _text(source: Source, lines: bool) -> Iterator[str]:
    stream = text_lines(source.path, source.compression, source.filesystem, cut=True)
    if lines:
        yield from stream
        return
    held: list[str] = []
    size = 0
    for line in stream:
        blank = not line or line.isspace()
        # A file without blank lines would be one document: what is too long is handed on.
        if held and (blank or size + len(line) > MAX_CHARS):
            yield "\n".join(held)
            held, size = [], 0
        if not blank:
            held.append(line)
            size += len(line) + 1
    yield "\n".join(held)


def _jsonl(source: Source, text_field: str) -> Iterator[str]:
    stream = text_lines(source.path, source.compression, source.filesystem)
    for number, line in enumerate(stream, start=1):
        if not line or line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(
                f"corpus: source must hold one JSON object per line, got something else: "
                f"{source.name} line {number}"
            ) from None
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(
                f"corpus: source must have the text field {text_field!r} in every line, got none: "
                f"{source.name} line {number}; set corpus.text_field"
            )
        yield text


def _parquet(source: Source, text_field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = open_bytes(source.path, source.filesystem)
    with raw:
        try:
            file = pq.ParquetFile(raw)
            names = file.schema_arrow.names
            require(
                text_field in names,
                f"corpus: source must have the column {text_field!r}, got {', '.join(names)}: "
                f"{source.name}; set corpus.text_field",
            )
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise UserError(
                            f"corpus: source must hold text in column {text_field!r}, got "
                            f"{type(text).__name__}: {source.name}; set corpus.text_field"
                        )
                    yield text
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"corpus: source must be an intact parquet file, got {source.name}: "
                f"{' '.join(str(error).split())}"
            ) from None


def _hub(source: Source, text_field: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"corpus: source {source.name!r} must be read with the datasets library, got none "
            "installed; pip install -e '.[hub]', or pass a file"
        ) from None
    name, _, split = source.path.rpartition(":")
    try:
        rows = _load(datasets, name, split)
        for row in rows:
            text = row.get(text_field)
            if not isinstance(text, str):
                raise UserError(
                    f"corpus: source must have the text field {text_field!r}, got "
                    f"{', '.join(row)}: {source.name}; set corpus.text_field"
                )
            yield text
    except UserError:
        raise
    except Exception as error:
        # datasets raises its own types, its builders' and the HTTP client's.
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"corpus: source must be a data set that the hub serves, got {source.name!r}: "
            f"{reason}; pass a local file instead"
        ) from None


def _load(datasets: Any, name: str, split: str) -> Any:
    """``OWNER/NAME/CONFIG``, ``OWNER/NAME``, ``NAME`` or, where that is none, ``NAME/CONFIG``."""
    parts = name.split("/")
    if len(parts) == 3:
        return datasets.load_dataset("/".join(parts[:2]), parts[2], split=split, streaming=True)
    try:
        return datasets.load_dataset(name, split=split, streaming=True)
    except FileNotFoundError:  # DatasetNotFoundError is one
        if len(parts) != 2:
            raise
        return datasets.load_dataset(parts[0], parts[1], split=split, streaming=True)
