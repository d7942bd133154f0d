"""Special tokens that a vocabulary spells another way than the class that reads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import models
from transformers.utils.hub import cached_file

from distilcache.data.errors import require

_NAMES = {"pad": ("pad",), "unk": ("unk",), "cls": ("cls", "s"), "sep": ("sep", "/s"),
          "mask": ("mask",)}  # fmt: skip
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files that name special tokens. One that stands in none of them is the class's own."""


def require_spelling(
    tokenizer: Any, place: str | Path, options: Mapping[str, Any], name: str | Path, where: str
) -> None:
    """Refuse a WordPiece vocabulary with ``<mask>`` or ``[mask]`` to which a class adds ``[MASK]``.

    The model has no trained row for what is added.

    Args:
        tokenizer: A fast tokenizer.
        place: Folder or hub id that it was read from.
        options: What it was read with.
        name: What was asked for, for errors.
        where: Stage and what is asked for, for errors.

    Raises:
        UserError: It has such a vocabulary.
    """
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.model, models.WordPiece):
        return
    words = backend.get_vocab(with_added_tokens=False)
    special = {w.strip("<>[]").lower(): w for w in words if w[:1] in "<[" and w[-1:] in ">]"}
    there = {
        role: special[spelt]
        for role, names in _NAMES.items()
        for spelt in names
        if spelt in special and getattr(tokenizer, f"{role}_token") not in (None, *words)
    }
    if not there:
        return
    paths = (cached_file(place, f, **options, _raise_exceptions_for_missing_entries=False)
             for f in _FILES)  # fmt: skip
    named = "".join(Path(path).read_text(encoding="utf-8") for path in paths if path)
    own = {r: w for r, w in there.items() if f'"{getattr(tokenizer, f"{r}_token")}"' not in named}
    settings = ", ".join(f'"{role}_token": "{word}"' for role, word in own.items())
    require(
        not own,
        f"{where} must name its special tokens as its vocabulary does, got {str(name)!r} with "
        f"{', '.join(own.values())}, to which {type(tokenizer).__name__} adds its own; put "
        f"{settings} into its tokenizer_config.json",
    )
