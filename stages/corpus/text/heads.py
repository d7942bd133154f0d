"""Checks of files before anything is written: their sizes and their first bytes."""

import contextlib
import re

from distilcache.data.errors import UserError, require
from distilcache.stages.corpus.text.readers import Source, empty_error
from distilcache.stages.corpus.text.streams import open_bytes, text_chunks

_POINTER_BYTES = 1 << 15
"""Longest file that may be a pointer; git-annex reads no more of one."""
_POINTERS = {
    re.compile(rb"version https://git-lfs\.github\.com/spec/v1\n"): "git lfs pull",
    re.compile(rb"(?:[^\n]*/)?\.git/annex/objects/|/annex/objects/"): "git annex get FILE",
}
"""Starts of files that stand for others, and what fetches these."""


def check_head(source: Source) -> None:
    """Refuse a file that is empty, binary, or stands for another one.

    Raises:
        UserError: It is; of many files some may be empty.
    """
    if source.kind in ("hf", "docstrings"):
        return
    size = source.size()
    if size == 0:
        if source.of_many:
            return
        raise empty_error(source)
    if size is not None and size <= _POINTER_BYTES:
        _require_no_pointer(source)
    if source.kind in ("parquet", "arrow"):
        require(
            size is not None,
            f"corpus: source must be where a {source.kind} file has a known size, got none from "
            f"the server of {source.name}; download it and pass the file",
        )
        return
    start = next(text_chunks(source), "").lstrip()
    require(
        source.kind != "fasta" or not start or start.startswith((">", ";")),
        f"corpus: source must begin with the > of a record, as FASTA files do, got {start[:20]!r}: "
        f"{source.name}; give text of another kind the ending .txt",
    )


def _require_no_pointer(source: Source) -> None:
    with contextlib.closing(open_bytes(source.path, source.filesystem)) as raw:
        start = raw.read(256)
    for pointer, remedy in _POINTERS.items():
        if pointer.match(start):
            raise UserError(
                f"corpus: source must hold its data, got a pointer to them: {source.name}; fetch "
                f"them: {remedy}"
            )
