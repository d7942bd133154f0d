"""Which tokens of a vocabulary go on with the word before them."""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from distilcache.data.errors import UserError
from distilcache.data.masks.masking import ALONE, BEGINS, GOES_ON

SPACE, METASPACE = "\u0120", "\u2581"
"""How byte-level and SentencePiece vocabularies write a space before a token."""
UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x9FFF),  # Chinese characters, and below
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
"""Characters of scripts that put no spaces between words: there each token is taken for one."""
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PLAIN]
BYTES = {chr(byte): byte for byte in _PLAIN} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}
"""The bytes that the characters of a byte-level vocabulary stand for."""


def continuations(tokenizer: Mapping[str, Any], vocab_size: int) -> npt.NDArray[np.int8]:
    """Whether a token begins a word, goes on with the one before it or is one alone, int8 [V].

    In WordPiece those go on that have the prefix of continuations. In vocabularies that mark spaces
    it is those without the mark, except punctuation marks and line breaks, which stand alone, and
    tokens of scripts without spaces.

    Args:
        tokenizer: Content of a ``tokenizer.json``.
        vocab_size: V.

    Returns:
        ``BEGINS``, ``GOES_ON`` or ``ALONE`` of each id.

    Raises:
        UserError: The tokenizer does not mark where words begin.
    """
    model = tokenizer["model"]
    vocab = model.get("vocab") or {}
    pieces = {token: i for i, (token, *_) in enumerate(vocab)} if isinstance(vocab, list) else vocab
    prefix = model.get("continuing_subword_prefix")
    found = np.full(vocab_size, BEGINS, dtype=np.int8)
    if prefix:
        found[[i for token, i in pieces.items() if token.startswith(prefix)]] = GOES_ON
    elif any(token[1:] and token.startswith((SPACE, METASPACE)) for token in pieces):
        named = {token["content"] for token in tokenizer.get("added_tokens") or []}
        is_bytes = not any(token.startswith(METASPACE) for token in pieces)
        for token, i in pieces.items():
            if token not in named:
                found[i] = _place(token, is_bytes)
    if not (found == GOES_ON).any():
        raise UserError(
            "masking: unit must be 'token' where the tokenizer does not mark where words begin, "
            f"got 'word' with a {model.get('type')} tokenizer; pass --set masking.unit=token"
        )
    return found


def _place(token: str, is_bytes: bool) -> int:
    """Where in a word a token of a vocabulary that marks spaces stands."""
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)  # of a character that the vocabulary lacks
    if is_bytes or byte:
        raw = bytes([int(byte[1], 16)] if byte else (BYTES.get(c, 0) for c in token))
        text = raw.decode(errors="ignore")
        if b"\x80" <= raw[:1] < b"\xc0":  # within a character
            return GOES_ON
        if not text:  # the first bytes of one: from E3 to E9 they are of Chinese and Japanese
            return BEGINS if b"\xe3" <= raw[:1] < b"\xea" else GOES_ON
    else:
        text = token.replace(METASPACE, " ")
    shown = text.lstrip(" ")
    if shown and all(unicodedata.category(c)[0] in "PSZC" for c in shown):
        return ALONE
    begins = text[:1] in ("", " ") or unicodedata.category(text[0])[0] in "PSZC"
    return BEGINS if begins or _is_unspaced(text[0]) else GOES_ON


def _is_unspaced(character: str) -> bool:
    """Whether a character begins a token of a script without spaces; a mark belongs to another."""
    return unicodedata.category(character)[0] != "M" and any(
        first <= ord(character) <= last for first, last in UNSPACED
    )
