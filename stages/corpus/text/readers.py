"""Sources of text, and the settings for reading documents from them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilcache.data.errors import UserError

DOCUMENTS = ("blank_line", "line", "file")
"""What may end a document of a text file."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file, dataset or embedded corpus."""

    name: str
    """Name in the recipe; of a directory or glob, the path of the file."""
    kind: str
    """``txt``, ``json``, ``csv``, ``tsv``, ``parquet``, ``arrow``, ``hf`` or ``docstrings``."""
    compression: str = ""
    """``gz``, ``zst``, ``xz`` or none."""
    filesystem: Any = None
    """fsspec filesystem; None: local files."""
    path: str = ""
    """Path in ``filesystem``; for ``hf`` and ``docstrings``, the text after the colon."""
    of_many: bool = False
    """Found in a folder or by a glob, where some may be empty."""

    def size(self) -> int | None:
        """Bytes of the file as stored; None: the server does not tell."""
        if self.filesystem is None:
            return Path(self.path).stat().st_size
        size = self.filesystem.info(self.path).get("size")
        return None if size is None else int(size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How documents are read from sources."""

    text_field: str = "text"
    """Field of a row with the text; ``a.b``: field b within field a."""
    document: str = "blank_line"
    """One of ``DOCUMENTS``."""
    split_rows: bool = False
    """Whether each line of a row's text is a document, not the whole of it."""
    skip_bad_rows: bool = False
    """Leave out rows without text, and report how many."""
    workers: int = 1
    """Processes that may help (docstrings)."""
    say: Callable[[str], None] = lambda _: None
    """Called with a line about what was left out."""


def empty_error(source: Source) -> UserError:
    """A source without a single document."""
    return UserError(
        f"corpus: source must have text, got an empty file: {source.name}; remove it or fill it"
    )
