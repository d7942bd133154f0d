"""Text files as streams of lines: local or fsspec, plain or compressed, bounded memory."""

import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from data.errors import UserError

COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".xz": "xz"}
READ_BYTES = 1 << 20
"""Decompressed bytes per read."""
MAX_CHARS = 1 << 20
"""Longest document, and longest line of plain text, in characters: longer ones are cut."""


def open_bytes(path: str, filesystem: Any = None) -> Any:
    """Open a local path, or a path of an fsspec filesystem, for reading bytes.

    Raises:
        UserError: It cannot be opened.
    """
    try:
        return open(path, "rb") if filesystem is None else filesystem.open(path, "rb")
    except OSError as error:
        raise UserError(
            f"corpus: source must be a readable file, got {path}: {error.strerror or error}"
        ) from None


def _decompressor(raw: Any, compression: str) -> Any:
    if compression == "gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == "xz":
        return lzma.LZMAFile(raw)
    if compression == "zst":
        # pyarrow's reader, unlike zstandard's, notices a truncated frame.
        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    return raw


def text_pieces(path: str, compression: str, filesystem: Any = None) -> Iterator[str]:
    """Decoded text of a file in pieces of about ``READ_BYTES``.

    Raises:
        UserError: The file is binary, no UTF-8, or its compressed stream is damaged.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with contextlib.closing(open_bytes(path, filesystem)) as raw:
        try:
            stream = _decompressor(raw, compression)
            while True:
                data = stream.read(READ_BYTES)
                text = decoder.decode(data, final=not data)
                if "\0" in text:
                    raise UserError(_not_text(path, "NUL bytes"))
                if text:
                    yield text
                if not data:
                    return
        except UnicodeDecodeError as error:
            raise UserError(_not_text(path, f"{error.reason}")) from None
        except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowInvalid) as error:
            kind = f"an intact .{compression} file" if compression else "readable"
            reason = " ".join(str(error).split())
            raise UserError(f"corpus: source must be {kind}, got {path}: {reason}") from None


def _not_text(path: str, what: str) -> str:
    return (
        f"corpus: source must be UTF-8 text, got a binary file: {path} ({what}); "
        "name a text, jsonl or parquet file"
    )


def text_lines(
    path: str, compression: str, filesystem: Any = None, cut: bool = False
) -> Iterator[str]:
    """Lines of a file without their ends; with ``cut``, none is much longer than ``MAX_CHARS``."""
    held = io.StringIO()
    for piece in text_pieces(path, compression, filesystem):
        first, *lines = piece.split("\n")
        held.write(first)
        if lines:
            yield held.getvalue().removesuffix("\r")
            for line in lines[:-1]:
                yield line.removesuffix("\r")
            held = io.StringIO()
            held.write(lines[-1])
        elif cut and held.tell() > MAX_CHARS:
            yield held.getvalue()
            held = io.StringIO()
    if held.tell():
        yield held.getvalue().removesuffix("\r")


def cut_long(text: str) -> Iterator[str]:
    """A document in pieces of at most ``MAX_CHARS``, cut at a line end or space where possible."""
    start = 0
    while len(text) - start > MAX_CHARS:
        half, end = start + MAX_CHARS // 2, start + MAX_CHARS  # never back to a sliver
        found = (text.rfind(separator, half, end) for separator in "\n ")
        at = next((at for at in found if at >= 0), end)
        yield text[start:at]
        start = at
    yield text[start:]
