"""How the kinds of tokenizers (WordPiece, BPE, Unigram) cut a token into smaller ones.

Functions of the section ``model`` of a ``tokenizer.json``. A kept tokenizer has fewer tokens, and
cuts by the same rules.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from distilcache.data.errors import require

State = Mapping[str, Any]
"""Content of a ``tokenizer.json``."""


class Kind(ABC):
    """How one kind of tokenizer cuts a token into smaller ones."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.model = model

    @abstractmethod
    def symbols(self, token: str) -> list[str]:
        """The smallest pieces that a token could be made of, in the vocabulary or not."""

    @abstractmethod
    def cut(self, token: str, kept: Mapping[str, int]) -> list[str] | None:
        """A token in the pieces that the kept tokenizer makes of it; None: it is unknown."""

    def forms(self, symbol: str) -> list[str]:
        """A symbol as it may stand in other places of a word."""
        return [symbol]

    def parts(self, token: str) -> set[str]:
        """Tokens without which this one cannot be made."""
        return set()


class _WordPiece(Kind):
    """The longest piece first, from left to right."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        super().__init__(model)
        self._inner = str(model["continuing_subword_prefix"])

    def symbols(self, token: str) -> list[str]:
        start, text = self._text(token)
        return [start + text[0], *(self._inner + c for c in text[1:])]

    def forms(self, symbol: str) -> list[str]:
        _, text = self._text(symbol)
        return [text, self._inner + text]

    def cut(self, token: str, kept: Mapping[str, int]) -> list[str] | None:
        start, text = self._text(token)
        found = []
        while text:
            fits = (n for n in range(len(text), 0, -1) if start + text[:n] in kept)
            length = next(fits, 0)
            if not length:
                return None
            found.append(start + text[:length])
            start, text = self._inner, text[length:]
        return found

    def _text(self, token: str) -> tuple[str, str]:
        """The prefix of a piece within a word, or nothing; and its text."""
        inner = token.startswith(self._inner) and len(token) > len(self._inner)
        return (self._inner, token[len(self._inner) :]) if inner else ("", token)


class _Bpe(Kind):
    """Pairs are merged in the order of their ranks."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        super().__init__(model)
        require(
            not model.get("continuing_subword_prefix"),
            "student: vocabulary must be 1 where a BPE tokenizer marks pieces within a word by a "
            f"prefix, got {model.get('continuing_subword_prefix')!r}; leave it out",
        )
        self._suffix = model.get("end_of_word_suffix") or ""
        self._ranks = {pair: rank for rank, pair in enumerate(merges_of(model))}

    def symbols(self, token: str) -> list[str]:
        if not (self._suffix and token.endswith(self._suffix)) or token == self._suffix:
            return list(token)
        text = token[: -len(self._suffix)]
        return [*text[:-1], text[-1] + self._suffix]

    def forms(self, symbol: str) -> list[str]:
        text = symbol.removesuffix(self._suffix) or symbol
        return [text, text + self._suffix]

    def cut(self, token: str, kept: Mapping[str, int]) -> list[str] | None:
        found, _ = self._merged(token, kept)
        if all(piece in kept for piece in found):
            return found
        return _as_bytes(token, kept) if self.model.get("byte_fallback") else None

    def parts(self, token: str) -> set[str]:
        found, made = self._merged(token, None)
        return made if found == [token] else set()  # no merges make it: it is never met

    def _merged(self, token: str, kept: Mapping[str, int] | None) -> tuple[list[str], set[str]]:
        """Pieces once all merges are done whose results are kept, and all that were there."""
        pieces = self.symbols(token)
        seen = set(pieces)
        while True:
            pairs = {
                self._ranks.get(pair, -1): pair
                for pair in zip(pieces, pieces[1:], strict=False)
                if kept is None or "".join(pair) in kept
            }
            pairs.pop(-1, None)
            if not pairs:
                return pieces, seen
            pieces = _joined(pieces, pairs[min(pairs)])
            seen.update(pieces)


class _Unigram(Kind):
    """The likeliest of all cuts."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        super().__init__(model)
        self._kept: Mapping[str, int] | None = None
        self._library: Any = None

    def symbols(self, token: str) -> list[str]:
        return list(token)

    def cut(self, token: str, kept: Mapping[str, int]) -> list[str] | None:
        if self._kept is not kept:
            self._kept, self._library = kept, self._model_of(kept)
        found = [piece.id for piece in self._library.tokenize(token)]
        return None if None in found else [self._pieces[index] for index in found]

    def _model_of(self, kept: Mapping[str, int]) -> Any:
        """The library's model of the kept pieces."""
        model = cut_model(self.model, kept)
        self._pieces = [piece for piece, _ in model["vocab"]]
        return tokenizers.models.Unigram(
            [(piece, score) for piece, score in model["vocab"]],
            model.get("unk_id"),
            model.get("byte_fallback", False),
        )


def kind_of(state: State) -> Kind:
    """How a tokenizer cuts its tokens.

    Raises:
        UserError: Its tokens have no smaller pieces.
    """
    kinds: dict[str, Callable[[Mapping[str, Any]], Kind]]
    kinds = {"WordPiece": _WordPiece, "BPE": _Bpe, "Unigram": _Unigram}
    name = state["model"]["type"]
    require(
        name in kinds,
        f"student: vocabulary must be 1 where the tokenizer is not one of {', '.join(kinds)}, got "
        f"one of kind {name}, whose tokens have no smaller pieces; leave it out",
    )
    return kinds[name](state["model"])


def cut_model(model: Mapping[str, Any], kept: Mapping[str, int]) -> dict[str, Any]:
    """The section ``model`` with the kept tokens and their new ids."""
    vocabulary: Any = model["vocab"]
    if isinstance(vocabulary, dict):
        cut = {token: kept[token] for token in vocabulary if token in kept}
        made = {**model, "vocab": cut}
        if "merges" in model:
            both = zip(model["merges"], merges_of(model), strict=True)
            made["merges"] = [
                merge for merge, (a, b) in both if a in kept and b in kept and a + b in kept
            ]
        return made
    unknown = model.get("unk_id")
    places = {piece: i for i, (piece, _) in enumerate(vocabulary) if piece in kept}
    left = sorted(places.values())
    return {
        **model,
        "vocab": [vocabulary[i] for i in left],
        "unk_id": None if unknown is None else left.index(places[vocabulary[unknown][0]]),
    }


def merges_of(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE in order; files write them as ``"a b"`` or ``["a", "b"]``."""
    pairs: Iterable[Any] = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    return [(a, b) for a, b in pairs]


def _joined(pieces: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Pieces with every occurrence of a pair merged, from left to right."""
    made: list[str] = []
    place = 0
    while place < len(pieces):
        is_pair = tuple(pieces[place : place + 2]) == pair
        made.append("".join(pair) if is_pair else pieces[place])
        place += 2 if is_pair else 1
    return made


def _as_bytes(token: str, kept: Mapping[str, int]) -> list[str] | None:
    names = byte_names(token.encode())
    return names if all(name in kept for name in names) else None


def byte_names(values: Iterable[int]) -> list[str]:
    """The names of the pieces that stand for single bytes."""
    return [f"<0x{value:02X}>" for value in values]
