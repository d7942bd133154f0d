"""Token ids as text: the text of each token, and whether a space comes before it."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from distilcache.data.corpus.words import WITHIN_WORD, WORD_END
from distilcache.stages.models.pieces import takes_pieces
from distilcache.stages.models.tokenizers import load_tokenizer
from distilcache.stages.models.trimmed_ids import read_tokenizer

_CLINGS = re.compile(r"[.,;:!?%)\]}’”]+")
"""Marks that no space comes before; WordPiece does not keep spaces."""
_OPENS = ("(", "[", "{", "“", "$")
"""Marks that no space comes after."""
_JOINS = {"-": re.compile(r"\w+"), "'": re.compile("s|t|d|m|re|ve|ll")}
"""Marks within a word, if the text that follows looks like the rest of it."""
_CONTROLS = (
    {c: 0x2400 + c for c in range(32)} | {0x7F: 0x2421} | {c: 0xFFFD for c in range(0x80, 0xA0)}
)
"""Characters that a terminal obeys, as pictures of them."""


class Words:
    """Readable texts of a cache's tokens, for WordPiece, byte-level BPE and SentencePiece."""

    def __init__(self, tokenizer_dir: Path) -> None:
        by_code = takes_pieces(read_tokenizer(tokenizer_dir))
        # Ids and tokens are all that is asked for: the code and its packages are not needed.
        opened = PreTrainedTokenizerFast.from_pretrained if by_code else load_tokenizer
        self._tokenizer: Any = opened(str(tokenizer_dir))
        decoder = getattr(self._tokenizer.backend_tokenizer, "decoder", None)
        self._kind = type(decoder).__name__
        # Byte-level and sentencepiece tokenizers mark where words begin. Where no token is marked,
        # as with letters for amino acids, no token continues a word.
        begins = (t[1:] and t.startswith(("Ġ", "▁")) for t in self._tokenizer.get_vocab())
        self._marks_words = self._kind == "WordPiece" or any(begins)
        # In PhoBERT's, XLM's and HerBERT's a token says how the next one begins.
        self._marks_ends = self._kind == "BPEDecoder" or (by_code and self._kind == "NoneType")
        self._special = set(self._tokenizer.all_special_ids)
        self.mask_id = self._tokenizer.mask_token_id
        self._known: dict[int, tuple[str, bool]] = {}

    def token_text(self, token: int) -> tuple[str, bool]:
        """Text of one token, and whether it continues what is before it without a space."""
        if token not in self._known:
            text, glued = self._text_of(token)
            self._known[token] = text.translate(_CONTROLS), glued
        return self._known[token]

    def _text_of(self, token: int) -> tuple[str, bool]:
        raw = self._tokenizer.convert_ids_to_tokens(token)
        if raw is None:  # an id that the model has and the tokenizer has not
            return f"<{token}>", False
        if token in self._special:
            return raw, False
        if self._kind == "WordPiece":
            return (raw[2:], True) if raw.startswith("##") else (raw, False)
        if self._marks_ends:
            return raw.removesuffix(WORD_END).removesuffix(WITHIN_WORD), False
        if raw.startswith("▁"):
            return raw[1:] or " ", False
        text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return (text[1:] or " ", False) if raw.startswith("Ġ") else (text, True)

    def shown_alone(self, token: int) -> str:
        """Text of one token without its context; … before the rest of a word."""
        text, glued = self.token_text(token)
        return f"…{text}" if glued and self._marks_words and text[:1].isalnum() else text

    def is_special(self, token: int) -> bool:
        """Whether a token is one of the tokenizer's own marks."""
        return token in self._special

    def _goes_on(self, token: int) -> bool:
        """Whether the next token is of the same word, where the end of a token tells."""
        raw = self._tokenizer.convert_ids_to_tokens(token) or ""
        if token in self._special:
            return False
        return raw.endswith(WITHIN_WORD) or (
            self._kind == "BPEDecoder" and not raw.endswith(WORD_END)
        )

    def token_texts(self, tokens: Iterable[int]) -> list[tuple[str, bool]]:
        """Texts of the tokens of a sequence, with punctuation close to the words."""
        tokens = [int(token) for token in tokens]
        plain = [self.token_text(token) for token in tokens]
        if self._marks_ends:
            within = [False, *map(self._goes_on, tokens)]
            return [(text, within[number]) for number, (text, _) in enumerate(plain)]
        if self._kind != "WordPiece":
            return plain
        found: list[tuple[str, bool]] = []
        opened = True  # nothing comes before the first token
        quoted = False
        for number, (text, glued) in enumerate(plain):
            following = plain[number + 1][0] if number + 1 < len(plain) else ""
            joins = text in _JOINS and bool(found and _JOINS[text].fullmatch(following))
            clings = bool(_CLINGS.fullmatch(text)) or (text == '"' and quoted)
            found.append((text, glued or opened or joins or clings))
            quoted ^= text == '"'
            opened = joins or text in _OPENS or (text == '"' and quoted)
        return found
