"""Rows of JSON, CSV, parquet, Arrow and hub sources, and the text of a row."""

import contextlib
import csv
import json
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from distilcache.data.csv_rows import csv_reader
from distilcache.data.errors import UserError, reason_of, require
from distilcache.data.hub_rows import datasets_library, hub_faults, load_split
from distilcache.stages.corpus.text.readers import Reading, Source
from distilcache.stages.corpus.text.streams import MAX_ITEM, open_bytes, text_chunks, text_lines

BATCH_ROWS = 1024
"""Rows of a table that are decoded at once."""
_PLACES = {"json": "line", "array": "item", "csv": "line", "tsv": "line"}


@dataclass(frozen=True, slots=True)
class Fault:
    """What a row has instead of text."""

    what: str
    remedy: str = "set corpus.text_field"


Rows = Iterator[tuple[int, Any]]
"""Number of each row in its file, from 1, and the row, or its fault."""


def row_texts(source: Source, reading: Reading) -> Iterator[str]:
    """Texts of one source's rows; of a row that is left out an empty one.

    Raises:
        UserError: The source cannot be read, or a row has no text and none is to be skipped.
    """
    place = _PLACES.get(source.kind, "row")
    rows: Rows
    if source.kind == "json":
        is_array, rows = _json(source)
        place = "item" if is_array else place
    elif source.kind in ("csv", "tsv"):
        rows = _csv(source, reading.text_field)
    elif source.kind == "hf":
        rows = _hub(source)
    else:
        rows = _table(source, reading.text_field)
    read, skipped, first = 0, 0, ("", "")
    try:
        for number, row in rows:
            read += 1
            found = row if isinstance(row, Fault) else _pick(row, reading.text_field)
            if isinstance(found, str):
                # As in text files: no NUL bytes, and one kind of line end.
                yield found.replace("\0", " ").replace("\r\n", "\n").replace("\r", "\n")
                continue
            skipped += 1
            if skipped == 1:
                first = (f"{found.what}: {source.name} {place} {number}", found.remedy)
            if not reading.skip_bad_rows:
                raise _no_text(reading, *first)
            yield ""
    finally:
        if skipped and reading.skip_bad_rows:
            reading.say(f"{skipped:,} of {read:,} rows are left out, the first with {first[0]}")
    if skipped and skipped == read:
        raise _no_text(reading, *first)


def _no_text(reading: Reading, found: str, remedy: str) -> UserError:
    rows, skip = "every row", ', or corpus.on_bad_row = "skip"'
    if reading.skip_bad_rows:
        rows, skip = "some row", ""
    return UserError(
        f"corpus: source must have text in the field {reading.text_field!r} of {rows}, got "
        f"{found}; {remedy}{skip}"
    )


def _pick(row: Any, text_field: str) -> str | Fault:
    """The text of a row; a field ``a.b`` that does not exist is b within a."""
    value = row
    names = [text_field] if isinstance(row, dict) and text_field in row else text_field.split(".")
    for name in names:
        if not isinstance(value, dict):
            return Fault(f"{_kind(value)} in place of fields")
        if name not in value:
            return Fault(f"no {name!r} among {_names(value) or 'no fields'}")
        value = value[name]
    return value if isinstance(value, str) else Fault(_kind(value))


def _names(fields: Collection[str]) -> str:
    """Names for error lines, shortened: without a header they are whole texts."""
    short = (name if len(name) <= 40 else f"{name[:37]}..." for name in fields)
    return ", ".join(map(repr, islice(short, 8))) + ", ..." * (len(fields) > 8)


def _kind(value: Any) -> str:
    kinds = {bool: "a truth value", list: "a list", bytes: "bytes", str: "a text"}
    if value is None:
        return "null"
    if isinstance(value, dict):
        return f"fields of its own ({_names(value)})"
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else "no text")


def _json(source: Source) -> tuple[bool, Rows]:
    """Whether a JSON file is one array (else a row per line), and its rows."""
    with contextlib.closing(text_chunks(source)) as chunks:
        start = next((chunk.lstrip() for chunk in chunks if not chunk.isspace()), "")
    if start.startswith("["):
        return True, _array(source, text_chunks(source))
    return False, _json_lines(text_lines(source))


def _json_lines(lines: Iterator[str]) -> Rows:
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError):
            yield number, Fault("no JSON in it", "write one object a line: jq -c . FILE > NEW")


def _array(source: Source, chunks: Iterator[str]) -> Rows:
    """Items of a JSON array; only one item and one chunk are in memory."""
    decode, before = json.JSONDecoder().raw_decode, re.compile(r"\s*[\[,]?\s*")
    text, number, tried = "", 0, 0
    for chunk in chain(chunks, [""]):
        text += chunk
        if chunk and len(text) < 2 * tried:
            continue  # Do not parse a long item again for every chunk.
        at = 0
        while True:
            try:
                value, end = decode(text, before.match(text, at).end())  # type: ignore[union-attr]
            except (ValueError, RecursionError):
                break
            if chunk and end == len(text):
                break  # Perhaps only the first digits of a number.
            number += 1
            yield number, value
            at = end
        text = text[at:]
        tried = len(text)
        if tried > MAX_ITEM:
            break
    require(
        text.strip() in ("]", "[]"),
        f"corpus: source must be an intact JSON array, got none after item {number} of "
        f"{source.name}; correct it, or write one object a line: jq -c '.[]' FILE > NEW.jsonl",
    )


def _csv(source: Source, text_field: str) -> Rows:
    lines = text_lines(source)
    if source.kind == "tsv":  # Quotes have no meaning.
        csv.field_size_limit(MAX_ITEM)
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv_reader(lines, MAX_ITEM)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"corpus: source must be a CSV file with sound quotes, got {error} in the row that "
                f"begins in line {number} of {source.name}; double the quotes within a field"
            ) from None
        if not row:
            continue
        if header is None:
            _require_column(source, text_field, header := row)
        elif len(row) == len(header):
            yield number, dict(zip(header, row, strict=True))
        else:
            yield number, Fault(f"{len(row)} fields in place of {len(header)}", "correct it")


def _require_column(source: Source, text_field: str, names: list[str]) -> str:
    """The column with the field; ``a`` of a field ``a.b`` within column a."""
    column = text_field if text_field in names else text_field.partition(".")[0]
    ends = {"csv": " (its first line names the fields, which end at commas, semicolons or tabs)",
            "tsv": " (its first line names the fields, which end at tabs)"}  # fmt: skip
    require(
        column in names,
        f"corpus: source must have the column {column!r}, got {_names(names)}: {source.name}; "
        f"set corpus.text_field{ends.get(source.kind, '')}",
    )
    require(
        names.count(column) == 1,
        f"corpus: source must have one column {column!r}, got {names.count(column)}: "
        f"{source.name}; rename the others",
    )
    return column


def _table(source: Source, text_field: str) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    batches: Iterator[Any]
    number = 0
    with contextlib.closing(open_bytes(source.path, source.filesystem)) as raw:
        try:
            if source.kind == "parquet":
                file = pq.ParquetFile(raw)
                column = _require_column(source, text_field, file.schema_arrow.names)
                batches = file.iter_batches(batch_size=BATCH_ROWS, columns=[column])
            else:
                # The file format is the stream format between two marks.
                if raw.read(8) != b"ARROW1\0\0":
                    raw.seek(0)
                elif not _ends_in_mark(raw):  # A stream may end after any batch.
                    raise pa.ArrowInvalid("it is cut off")
                stream = pa.ipc.open_stream(raw)
                column = _require_column(source, text_field, stream.schema.names)
                batches = (batch.select([column]) for batch in stream)
            for batch in batches:
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    for row in _rows_of(batch.slice(start, BATCH_ROWS)):
                        number += 1
                        yield number, row
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise UserError(
                f"corpus: source must be an intact {source.kind} file, got {source.name}: "
                f"{reason_of(error)}"
            ) from None


def _ends_in_mark(raw: Any) -> bool:
    """Whether an Arrow file ends as it must; its place is left as it was."""
    place = raw.tell()
    raw.seek(-6, os.SEEK_END)
    end = raw.read(6)
    raw.seek(place)
    return bool(end == b"ARROW1")


def _rows_of(batch: Any) -> list[Any]:
    """The rows of a record batch; a row that Python cannot hold is a fault."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            return [row for at in range(batch.num_rows) for row in _rows_of(batch.slice(at, 1))]
        if isinstance(error, UnicodeDecodeError):
            return [Fault("bytes that are not UTF-8", "write the column again as UTF-8")]
        return [Fault("no text")]


def _hub(source: Source) -> Rows:
    datasets = datasets_library(f"corpus: source {source.name!r}", "pass a file")
    with hub_faults("corpus: source", repr(source.name), "pass a local file instead"):
        yield from enumerate(load_split(datasets, source.path, streaming=True), start=1)
