"""Text files as streams of lines: local or fsspec, plain or compressed, bounded memory."""

import codecs
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Generator, Iterator
from typing import Any

import pyarrow as pa

from distilcache.data.errors import UserError, reason_of
from distilcache.stages.corpus.text.readers import Source

COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".xz": "xz"}
READ_BYTES = 1 << 20
"""Decompressed bytes per read."""
MAX_CHARS = 1 << 20
"""Longest segment of a document, and of a line of plain text, in characters."""
MAX_ITEM = 1 << 28
"""Most characters of a row: of a line or CSV field, and of an item of a JSON array."""
_HEAD = 4096
"""Bytes at the start of a file by which an unsupported encoding is guessed."""
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
"""Bytes that do not occur in text, in any encoding with one byte per Latin letter."""
_HIGH, _LETTERS = re.compile(rb"[\x80-\xff]"), re.compile(rb"[A-Za-z]")
"""Bytes of letters that are not ASCII, in encodings other than UTF-16, and of those that are."""


def open_bytes(path: str, filesystem: Any) -> Any:
    """Open a path of an fsspec filesystem (None: a local one) for reading bytes.

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
        return _XzStreams(raw)
    if compression == "zst":
        # pyarrow's reader, unlike zstandard's, notices a truncated frame.
        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    return raw


class _XzStreams:
    """The streams of an .xz file one after another, with zeros between them or without.

    ``lzma.LZMAFile`` takes what follows a stream for its end if it is zeros or damaged.
    """

    def __init__(self, raw: Any) -> None:
        self._raw, self._stream = raw, lzma.LZMADecompressor()

    def read(self, size: int) -> bytes:
        """Up to ``size`` unpacked bytes; none at the end.

        Raises:
            lzma.LZMAError: A stream is damaged.
            EOFError: The last one is cut off.
        """
        data = b""
        while not data:
            packed = b""
            if self._stream.eof:
                packed = self._stream.unused_data.lstrip(b"\0")
                while not packed:
                    if not (block := self._raw.read(READ_BYTES)):
                        return b""
                    packed = block.lstrip(b"\0")
                self._stream = lzma.LZMADecompressor()
            elif self._stream.needs_input and not (packed := self._raw.read(READ_BYTES)):
                raise EOFError("it ends within a stream")
            data = self._stream.decompress(packed, size)
        return data


def text_chunks(source: Source) -> Generator[str, None, None]:
    """Decoded text of a file in chunks of about ``READ_BYTES``; line ends become line feeds.

    Raises:
        UserError: The file is binary, not UTF-8, or its compressed stream is damaged.
    """
    path, compression = source.path, source.compression
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    head, size, returns, is_ascii = b"", 0, False, True
    with contextlib.closing(open_bytes(path, source.filesystem)) as raw:
        try:
            stream = _decompressor(raw, compression)
            while True:
                data = stream.read(READ_BYTES)
                size += len(data)
                head += data[: _HEAD - len(head)]
                text = decoder.decode(data, final=not data)
                if b"\0" in data:
                    at = size - len(data) + data.find(b"\0")
                    raise UserError(_not_utf8(path, compression, head, at, 0, is_ascii))
                is_ascii = is_ascii and text.isascii()
                returns = returns or b"\r" in data
                if returns:
                    text = newlines.decode(text, final=not data)
                if text:
                    yield text
                if not data:
                    return
        except UnicodeDecodeError as error:
            at = size - (len(error.object) - error.start)
            byte = error.object[error.start]
            is_ascii = is_ascii and error.object[: error.start].isascii()
            raise UserError(_not_utf8(path, compression, head, at, byte, is_ascii)) from None
        except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowInvalid) as error:
            reason = reason_of(error)
            if compression == "zst" and "too much memory" in reason:
                raise UserError(
                    f"corpus: source must be a .zst file with a window of at most 128 MiB, got a "
                    f"longer one (zstd --long): {path}; pack it again: zstd -d --long=31 -c FILE "
                    "| zstd -o NEW.zst"
                ) from None
            kind = f"an intact .{compression} file" if compression else "readable"
            raise UserError(f"corpus: source must be {kind}, got {path}: {reason}") from None


def _not_utf8(path: str, compression: str, head: bytes, at: int, byte: int, is_ascii: bool) -> str:
    """Error line of a file with ``byte`` at offset ``at``; its start suggests the encoding.

    ``is_ascii`` says whether all text before that byte is, but for a mark at the start.
    """
    where = (
        f"{path} (byte 0x{byte:02x} at offset {at:,}{' of the unpacked text' * bool(compression)})"
    )
    if byte and not (is_ascii and head[:at].isascii()):  # It was UTF-8 so far.
        return (
            f"corpus: source must be UTF-8 text, got damaged text: {where}; remove other bytes: "
            "iconv -c -f UTF-8 -t UTF-8 FILE > NEW"
        )
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "")
    nuls = max(head[0::2].count(0), head[1::2].count(0))
    if not encoding and nuls > len(head) / 5 and b"\0\0" not in head:
        encoding = "UTF-16"  # Without a mark; every second byte of Latin letters is 0.
    if not encoding and byte and _CONTROLS.search(head) is None:
        if not _is_western(head):
            return (
                f"corpus: source must be UTF-8 text, got another encoding: {where}; convert it "
                "from the usual one of its script, such as KOI8-R, GB18030 or SHIFT_JIS: iconv -f "
                "ENCODING -t UTF-8 FILE > NEW"
            )
        encoding = "Windows-1252"  # The usual one; it includes Latin-1.
    is_text = head.count(0) < len(head) / 5 and not _CONTROLS.search(head.replace(b"\0", b""))
    if not encoding and not byte and is_text:
        return (
            f"corpus: source must be UTF-8 text, got text with NUL bytes: {where}; remove these: "
            "tr -d '\\000' < FILE > NEW"
        )
    if not encoding:
        return (
            f"corpus: source must be UTF-8 text, got a binary file: {where}; name a text, JSON, "
            "CSV, parquet or Arrow file"
        )
    others = " or Latin-1" if encoding == "Windows-1252" else ""
    return (
        f"corpus: source must be UTF-8 text, got what looks like {encoding}{others}: "
        f"{where}; convert it: iconv -f {encoding.upper()} -t UTF-8 FILE > NEW"
    )


def _is_western(head: bytes) -> bool:
    """Whether most letters of a text are ASCII, as in languages that Windows-1252 can write.

    It takes every byte: Cyrillic or Chinese text would become other letters without an error.
    """
    return len(_HIGH.findall(head)) < len(_LETTERS.findall(head)) / 2


def text_lines(source: Source, cut: bool = False) -> Iterator[str]:
    """Lines of a file with their line feeds.

    With ``cut``, a line much longer than ``MAX_CHARS`` is split; only its end has the line feed.

    Raises:
        UserError: Without ``cut``, a line is much longer than ``MAX_ITEM``; see also text_chunks.
    """
    line_start, number = io.StringIO(), 1
    for chunk in text_chunks(source):
        first, *lines = chunk.split("\n")
        line_start.write(first)
        if lines:
            number += len(lines)
            yield line_start.getvalue() + "\n"
            for line in lines[:-1]:
                yield line + "\n"
            line_start = io.StringIO()
            line_start.write(lines[-1])
        elif cut and line_start.tell() > MAX_CHARS:
            yield line_start.getvalue()
            line_start = io.StringIO()
        elif not cut and line_start.tell() > MAX_ITEM:
            raise UserError(
                f"corpus: source must have lines of at most {MAX_ITEM:,} characters, got a longer "
                f"one: {source.name} line {number}; write one row a line"
            )
    if line_start.tell():
        yield line_start.getvalue()


def cut_long(text: str) -> Iterator[str]:
    """A document in segments of at most ``MAX_CHARS``, cut at a line end or space if possible."""
    start = 0
    while len(text) - start > MAX_CHARS:
        half, end = start + MAX_CHARS // 2, start + MAX_CHARS  # No tiny segments.
        found = (text.rfind(separator, half, end) for separator in "\n ")
        at = next((at for at in found if at >= 0), end)
        yield text[start:at]
        start = at
    yield text[start:]
