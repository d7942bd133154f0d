"""How much of a text a tokenizer knows, told before all of it is tokenised.

An unknown token may stand for one letter or for thousands: an ESM's stands for all between two
letters that it knows, a WordPiece's for the whole word, and for any word of over 100 characters. So
here characters are counted, not tokens.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
from tokenizers import Tokenizer

from distilcache.stages.corpus.account import MANY_UNKNOWN, MOST_UNKNOWN, Unusable, percent, say
from distilcache.stages.corpus.units import Passage
from distilcache.stages.corpus.worker import PartSettings, corpus_tokenizer
from distilcache.stages.models.pieces import CutFirst

SAMPLE_CHARACTERS = 1 << 20
"""Characters at the start of the text that are looked at."""
LONG_WORD = 100
"""Characters of the longest word that BERT's WordPiece looks at."""

_FORMS: dict[str, Callable[[str], str]] = {
    "in upper case": str.upper,
    "in lower case": str.lower,
    f"without words of over {LONG_WORD} characters": lambda text: re.sub(
        rf"\S{{{LONG_WORD + 1},}}", "", text
    ),
    "with a space between letters": " ".join,
}
"""Other forms of a text, of which a tokenizer may know more."""


def check_fit(settings: PartSettings, passages: Iterator[Passage], name: str) -> Iterator[Passage]:
    """Say what is lost of the start of the text; returns all passages again.

    Args:
        settings: The corpus's settings; its tokenizer is saved already.
        passages: The text.
        name: Name of the tokenizer.

    Raises:
        Unusable: All but all of it is lost, and another form of it would be known.
    """
    tokenizer, unknown_id = corpus_tokenizer(settings), settings.special_ids["unk"]
    if isinstance(tokenizer, CutFirst):  # It counts characters of pieces, not of the text.
        return passages
    first: list[Passage] = []
    left = SAMPLE_CHARACTERS
    for passage in passages:
        first.append(passage)
        left -= len(passage.text)
        if left <= 0:
            break
    texts = [passage.text for passage in first]
    if left < 0:
        texts[-1] = texts[-1][:left]
    lost, tokens = unknown_shares(tokenizer, unknown_id, texts)
    if lost >= MANY_UNKNOWN:
        form = _known_form(tokenizer, unknown_id, texts)
        line = (
            f"{percent(lost)} of the characters at the start of the text are unknown to {name}"
            + (f"; {form}: change the text so" if form else "")
        )
        if form and lost >= MOST_UNKNOWN:
            raise Unusable(f"corpus: sources must be text that the tokenizer knows, got {line}")
        if form or tokens < MANY_UNKNOWN:  # Else there is a remark on the whole text.
            say(line)
    return chain(first, passages)


def unknown_shares(
    tokenizer: Tokenizer, unknown_id: int, texts: Sequence[str]
) -> tuple[float, float]:
    """Which share of the characters (white space apart) and of the tokens is unknown."""
    characters = sum(len("".join(text.split())) for text in texts)
    lost = unknown = tokens = 0
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids = np.array(encoding.ids, dtype=np.int64)
        begin, end = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        lost += int((end - begin)[ids == unknown_id].sum())
        unknown += int(np.count_nonzero(ids == unknown_id))
        tokens += len(ids)
    return lost / max(1, characters), unknown / max(1, tokens)


def _known_form(tokenizer: Tokenizer, unknown_id: int, texts: Sequence[str]) -> str:
    """The first form of which less than a remark is worth is unknown, with its share, or ''."""
    for form, change in _FORMS.items():
        changed = [text for text in map(change, texts) if text.strip()]
        lost, _ = unknown_shares(tokenizer, unknown_id, changed)
        if changed and lost < MANY_UNKNOWN:
            return f"{form} {percent(lost)} are"
    return ""
