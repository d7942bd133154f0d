"""Which tokens of a vocabulary go on with the word before them."""

import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from distilcache.data.errors import UserError

MARKS = ("Ġ", "▁")
"""How byte-level and SentencePiece vocabularies write a space before a token."""
BLANKS = (*MARKS, "Ċ", "ĉ")
"""First characters of tokens that are, or begin with, white space."""


def continuations(tokenizer: Mapping[str, Any], vocab_size: int) -> npt.NDArray[np.bool_]:
    """Tokens that go on with the word before them, bool [V].

    In WordPiece those with the prefix of continuations. In vocabularies that mark spaces those
    without the mark, unless they begin with a punctuation mark, which is a word of its own.

    Args:
        tokenizer: Content of a ``tokenizer.json``.
        vocab_size: V.

    Raises:
        UserError: The tokenizer does not mark where words begin.
    """
    model = tokenizer["model"]
    vocab = model.get("vocab") or {}
    pieces = {token: i for i, (token, *_) in enumerate(vocab)} if isinstance(vocab, list) else vocab
    prefix = model.get("continuing_subword_prefix")
    found = np.zeros(vocab_size, dtype=bool)
    if prefix:
        ids = [i for token, i in pieces.items() if token.startswith(prefix)]
    elif any(token[1:] and token.startswith(MARKS) for token in pieces):
        named = {token["content"] for token in tokenizer.get("added_tokens") or []}
        ids = [i for token, i in pieces.items() if token not in named and _goes_on(token)]
    else:
        ids = []
    if not ids:
        raise UserError(
            "masking: unit must be 'token' where the tokenizer does not mark where words begin, "
            f"got 'word' with a {model.get('type')} tokenizer; pass --set masking.unit=token"
        )
    found[ids] = True
    return found


def _goes_on(token: str) -> bool:
    """Whether a token of a vocabulary that marks spaces is not the first one of a word."""
    if token.startswith("<0x"):  # a byte of a character that the vocabulary lacks
        return True
    return not token.startswith(BLANKS) and unicodedata.category(token[:1] or " ")[0] not in "PSZ"
