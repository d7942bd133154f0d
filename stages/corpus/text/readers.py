"""What is read, and how: a source, and the way from it to documents."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilcache.data.errors import UserError

DOCUMENTS = ("blank_line", "line", "file")
"""What ends a document of a text file."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file, dataset or embedded corpus."""

    name: str
    """As the recipe gives it; below a directory or glob, the path of the file."""
    kind: str
    """``txt``, ``json``, ``csv``, ``tsv``, ``parquet``, ``arrow``, ``hf`` or ``docstrings``."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How documents are taken out of sources."""

    text_field: str = "text"
    """Field of a row that holds the text; ``a.b``: field b within field a."""
    document: str = "blank_line"
    """One of ``DOCUMENTS``; with ``line``, every line of a row's text is a document, too."""
    skip_bad_rows: bool = False
    """Leave out rows without text, and say how many."""
    workers: int = 1
    """Processes that may help (docstrings)."""
    say: Callable[[str], None] = lambda _: None
    """Is told, in one line each, what was left out."""


def empty_error(source: Source) -> UserError:
    """A source without a single document."""
    return UserError(
        f"corpus: source must hold text, got an empty file: {source.name}; remove it or fill it"
    )
