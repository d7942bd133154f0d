"""The checkpoint that a tokenizer is read from, and its files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Files of one checkpoint, in a folder or on the hub."""

    place: str | Path
    """Folder or hub id."""
    options: Mapping[str, Any]
    """What the library is given to read them with."""
    name: str | Path
    """What was asked for, for errors."""
    where: str
    """Stage and what is asked for, for errors."""

    def path(self, file: str) -> Path | None:
        """A file on this machine; None: there is none of this name."""
        found = cached_file(
            self.place, file, **self.options, _raise_exceptions_for_missing_entries=False
        )
        return Path(found) if found else None

    def text(self, file: str) -> str:
        """The content of a file; "" where there is none."""
        path = self.path(file)
        return path.read_text(encoding="utf-8") if path else ""

    def settings(self) -> dict[str, Any]:
        """The content of ``tokenizer_config.json``."""
        found: dict[str, Any] = get_tokenizer_config(self.place, **self.options)
        return found
