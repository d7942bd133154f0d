"""Text as pieces, for tokenizers whose Python code no ``tokenizer.json`` can hold.

See ``piece_tokenizer.py``; this module imports nothing heavy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Encoding, Tokenizer

SEPARATOR, UNKNOWN = "\x01", "\x02"
"""What parts the pieces of a text, and what stands for one that the vocabulary lacks."""


def takes_pieces(state: Mapping[str, Any]) -> bool:
    """Whether the content of a ``tokenizer.json`` gives ids to pieces, not to text."""
    rule = state.get("pre_tokenizer") or {}
    return rule.get("type") == "Split" and rule.get("pattern") == {"String": SEPARATOR}


@dataclass(frozen=True, slots=True)
class CutFirst:
    """A tokenizer of pieces that takes text."""

    tokenizer: Tokenizer
    pieces: Callable[[str], str]
    """A text as pieces with ``SEPARATOR`` between them."""

    def encode_batch_fast(self, texts: Sequence[str], **options: Any) -> list[Encoding]:
        """As that of ``Tokenizer``."""
        return self.tokenizer.encode_batch_fast([*map(self.pieces, texts)], **options)
