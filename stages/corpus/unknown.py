"""What unknown tokens stand for, from a sample of the text: one may hide a word or half a genome.

Legend: ``C`` characters of a text, ``T`` tokens of it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from random import Random

import numpy as np
from tokenizers import Tokenizer

from distilcache.stages.corpus.account import Lost
from distilcache.stages.corpus.units import Passage
from distilcache.stages.corpus.worker import PartSettings, corpus_tokenizer
from distilcache.stages.models.pieces import CutFirst
from distilcache.stages.models.tokenizers import MANY_UNKNOWN

PIECE_CHARS, SAMPLE_CHARS = 1 << 12, 1 << 19
_ONE_LENGTH = 0.75
"""Fraction of a vocabulary's entries that have as many letters, where all words are to have so."""

Change = Callable[[str], str]


class Sample:
    """Pieces of the training text, drawn from a seed; all of a text that is small."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def watch(self, passages: Iterator[Passage]) -> Iterator[Passage]:
        """The same passages, from which the sample is taken."""
        draw, halvings, room = Random(0).getrandbits, 0, SAMPLE_CHARS
        for passage in passages:
            if passage.split == "train":
                for start in range(0, len(passage.text), PIECE_CHARS):
                    if not draw(halvings):
                        self.pieces.append(passage.text[start : start + PIECE_CHARS])
                        room -= len(self.pieces[-1])
                while room < 0:
                    self.pieces = [piece for piece in self.pieces if draw(1)]
                    halvings += 1
                    room = SAMPLE_CHARS - sum(map(len, self.pieces))
            yield passage

    def lost(self, settings: PartSettings) -> Lost:
        """What of it the tokenizer does not know, and how the text may be written instead."""
        tokenizer, unk = corpus_tokenizer(settings), settings.special_ids["unk"]
        by_code = isinstance(tokenizer, CutFirst)
        share = unknown_share(tokenizer, self.pieces, unk)
        remedy = _remedy(tokenizer, self.pieces, unk) if share >= MANY_UNKNOWN else ""
        return Lost(0.0 if by_code else share, remedy)


def unknown_share(tokenizer: Tokenizer | CutFirst, texts: list[str], unk: int) -> float:
    """Fraction of the characters that are behind unknown tokens; of tokens where code cuts text."""
    lost = total = 0
    if isinstance(tokenizer, CutFirst):
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            lost += encoding.ids.count(unk)
            total += len(encoding.ids)
        return lost / max(1, total)
    for text, encoding in zip(
        texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        spaces = np.fromiter(map(str.isspace, text), dtype=bool, count=len(text))  # [C]
        visible = np.concatenate([[0], np.cumsum(~spaces)])  # before each character, [C + 1]
        total += int(visible[-1])
        unknown = np.array(encoding.ids) == unk
        if unknown.any():
            starts, ends = np.array(encoding.offsets)[unknown].T  # [T]
            lost += int((visible[ends] - visible[starts]).sum())
    return lost / max(1, total)


def _remedy(tokenizer: Tokenizer | CutFirst, texts: list[str], unk: int) -> str:
    upper: tuple[str, Change] = ("in upper case", str.upper)
    ways = [upper]
    if length := _word_length(tokenizer):

        def spaced(text: str) -> str:
            return with_spaces(text, length)

        def both(text: str) -> str:
            return spaced(text.upper())

        ways += [
            (f"with spaces, as in '{_start(spaced, texts)}'", spaced),
            (f"in upper case with spaces, as in '{_start(both, texts)}'", both),
        ]
    for name, change in ways:
        share = unknown_share(tokenizer, [*map(change, texts)], unk)
        if share < MANY_UNKNOWN:
            return f"write the text {name}: {100 * (1 - share):.2f} % of that is known"
    return ""


def _start(change: Change, texts: list[str]) -> str:
    return " ".join(change(texts[0]).split()[:4])


def _word_length(tokenizer: Tokenizer | CutFirst) -> int:
    """Letters of nearly all entries, as of ProtBERT's (1) and DNABERT's (6); 0 if they differ."""
    opened = tokenizer.tokenizer if isinstance(tokenizer, CutFirst) else tokenizer
    [(length, number)] = Counter(map(len, opened.get_vocab())).most_common(1)
    return length if number >= _ONE_LENGTH * opened.get_vocab_size() else 0


def with_spaces(text: str, length: int) -> str:
    """A text as all words of that many letters in it: ``GATTA`` as ``GAT ATT TTA``."""
    return " ".join(
        word[start : start + length]
        for word in text.split()
        for start in range(max(1, len(word) - length + 1))
    )
