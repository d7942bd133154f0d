"""Which tokens of a vocabulary begin words, go on with them and end them."""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from distilcache.data.errors import UserError
from distilcache.data.masks.masking import ALONE, BEGINS, ENDS, GOES_ON

SPACE, METASPACE = "\u0120", "\u2581"
"""How byte-level and SentencePiece vocabularies write a space before a token."""
WORD_END, WITHIN_WORD = "</w>", "@@"
"""How others mark, at its end, a token that is the last of its word, or is not."""
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
    """How each token stands in a word, int8 [V].

    In WordPiece those go on that have the prefix of continuations. In vocabularies that mark spaces
    it is those without the mark, except punctuation marks and line breaks, which stand alone, and
    tokens of scripts without spaces. Others mark where words end, and punctuation stands alone.

    Args:
        tokenizer: Content of a ``tokenizer.json``.
        vocab_size: V.

    Returns:
        ``BEGINS``, ``GOES_ON``, ``ALONE`` or ``ENDS`` of each id.

    Raises:
        UserError: The tokenizer does not mark where words begin or end.
    """
    model = tokenizer["model"]
    vocab = model.get("vocab") or {}
    pieces = {token: i for i, (token, *_) in enumerate(vocab)} if isinstance(vocab, list) else vocab
    prefix = model.get("continuing_subword_prefix")
    found = np.full(vocab_size, BEGINS, dtype=np.int8)
    if prefix:
        found[[i for token, i in pieces.items() if token.startswith(prefix)]] = GOES_ON
    elif mark := _mark(pieces):
        named = {token["content"] for token in tokenizer.get("added_tokens") or []}
        is_bytes = not any(token.startswith(METASPACE) for token in pieces)
        for token, i in pieces.items():
            if mark != SPACE:
                found[i] = ALONE if token in named else _place_by_end(token, mark)
            elif token not in named:
                found[i] = _place(token, is_bytes)
    if not (found == GOES_ON).any():
        raise UserError(
            "masking: unit must be 'token' where the tokenizer marks neither where words begin nor "
            f"where they end, got 'word' with a {model.get('type')} tokenizer; pass --set "
            "masking.unit=token"
        )
    return found


def _mark(pieces: Iterable[str]) -> str:
    """What most tokens are marked by: ``SPACE``, ``WORD_END`` or ``WITHIN_WORD``; "": none is."""
    counts = dict.fromkeys((SPACE, WORD_END, WITHIN_WORD), 0)
    for token in pieces:
        counts[SPACE] += len(token) > 1 and token.startswith((SPACE, METASPACE))
        for end in (WORD_END, WITHIN_WORD):
            counts[end] += token.endswith(end) and token != end
    mark = max(counts, key=lambda mark: counts[mark])
    return mark if counts[mark] else ""


def _place_by_end(token: str, mark: str) -> int:
    """Where in a word a token of a vocabulary that marks ends stands."""
    if _is_punctuation(token.removesuffix(mark)):
        return ALONE
    return ENDS if token.endswith(mark) == (mark == WORD_END) else GOES_ON


def _is_punctuation(text: str) -> bool:
    return bool(text) and all(unicodedata.category(c)[0] in "PSZC" for c in text)


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
    if _is_punctuation(text.lstrip(" ")):
        return ALONE
    begins = text[:1] in ("", " ") or unicodedata.category(text[0])[0] in "PSZC"
    return BEGINS if begins or _is_unspaced(text[0]) else GOES_ON


def _is_unspaced(character: str) -> bool:
    """Whether a character begins a token of a script without spaces; a mark belongs to another."""
    return unicodedata.category(character)[0] != "M" and any(
        first <= ord(character) <= last for first, last in UNSPACED
    )
