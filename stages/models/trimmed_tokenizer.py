"""A tokenizer with fewer tokens: which are kept, and how the others are cut into them.

Functions of the content of a ``tokenizer.json`` and of how often a text uses each id. The kept
tokenizer is of the same kind (WordPiece, BPE, Unigram) and cuts text by the same rules; kept tokens
are numbered anew, in their old order. Always kept are

- added and special tokens, those put around a text, and the one for unknown text;
- the smallest pieces of every token that the text uses, so that text which the old tokenizer knows
  does not become unknown: WordPiece: its characters, at the beginning and within a word; byte-level
  BPE: all bytes; other BPE and Unigram: its characters, also at the end of a word where these are
  marked; and the pieces of single bytes, where the tokenizer falls back on these. Characters of
  Latin-1 are kept whether the text uses them or not;
- a token that the text uses and that has no smaller pieces.

A token of a BPE can only be made through its merges. So it is kept together with the tokens that it
is merged from (measured: docs/benchmarks.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from distilcache.data.errors import require

Ids = npt.NDArray[np.int64]
State = Mapping[str, Any]
"""Content of a ``tokenizer.json``."""


def ids_of(state: State) -> dict[str, int]:
    """Every token and its id, added ones included; of two pieces of one name the last."""
    vocabulary = state["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in state["added_tokens"]}}


class _Kind(ABC):
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


class _WordPiece(_Kind):
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


class _Bpe(_Kind):
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


class _Unigram(_Kind):
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
        model = _cut_model(self.model, kept)
        self._pieces = [piece for piece, _ in model["vocab"]]
        return tokenizers.models.Unigram(
            [(piece, score) for piece, score in model["vocab"]],
            model.get("unk_id"),
            model.get("byte_fallback", False),
        )


def _kind_of(state: State) -> _Kind:
    kinds: dict[str, Callable[[Mapping[str, Any]], _Kind]]
    kinds = {"WordPiece": _WordPiece, "BPE": _Bpe, "Unigram": _Unigram}
    name = state["model"]["type"]
    require(
        name in kinds,
        f"student: vocabulary must be 1 where the tokenizer is not one of {', '.join(kinds)}, got "
        f"one of kind {name}, whose tokens have no smaller pieces; leave it out",
    )
    return kinds[name](state["model"])


def choose(state: State, counts_V: Ids, wanted: float, always: Iterable[int] = ()) -> list[int]:
    """The ids that are kept, ascending.

    Those that the text uses most, after the ones that are always kept. Equal arguments give equal
    ids, and a share gives the same ids as the number that it comes to.

    Args:
        state: The tokenizer.
        counts_V: How often the text uses each id.
        wanted: Number of ids, or a share below 1 of the text's tokens: as many as that takes.
        always: Further ids that are kept.

    Raises:
        UserError: The tokenizer is of another kind, or more than ``wanted`` ids are always kept.
    """
    kind, ids = _kind_of(state), ids_of(state)
    tokens = {index: token for token, index in ids.items()}
    kept = _always(state, kind, ids, counts_V).union(always)
    total, covered = int(counts_V.sum()), int(counts_V[list(kept)].sum())
    least, size = len(kept), len(ids) if wanted < 1 else int(wanted)
    require(
        least <= size,
        f"student: vocabulary must be at least {least:,} for this corpus (special tokens, and the "
        f"pieces without which text would become unknown), got {size:,}; use --set "
        f"student.vocabulary={least} or more",
    )
    for index in np.argsort(-counts_V, kind="stable").tolist():
        if len(kept) == size or (wanted < 1 and covered >= wanted * total):
            break
        if index in kept or index not in tokens:
            continue
        more = {index, *(ids[part] for part in kind.parts(tokens[index]))} - kept
        if len(kept) + len(more) <= size:
            kept |= more
            covered += int(counts_V[list(more)].sum())
    return sorted(kept)


def _always(state: State, kind: _Kind, ids: Mapping[str, int], counts_V: Ids) -> set[int]:
    """Ids that are kept whatever their number, see the head of this module."""
    model = state["model"]
    kept = {token["id"] for token in state["added_tokens"]}
    kept |= _ids_in(state.get("post_processor")) | _ids_in(state.get("padding"))
    if model.get("unk_token") in ids:
        kept.add(ids[model["unk_token"]])
    if model.get("unk_id") is not None:
        kept.add(ids[model["vocab"][model["unk_id"]][0]])
    if model.get("byte_fallback"):
        kept |= {ids[name] for name in _byte_names(range(256)) if name in ids}
    if _is_byte_level(state):
        kept |= {ids[c] for c in tokenizers.pre_tokenizers.ByteLevel.alphabet() if c in ids}
    symbols = [form for c in map(chr, range(1, 256)) for form in kind.forms(c)]
    kept |= {ids[symbol] for symbol in symbols if symbol in ids}
    for token, index in ids.items():
        if not counts_V[index] or index in kept:
            continue
        symbols = kind.symbols(token)
        if all(symbol in ids for symbol in symbols):
            forms = (form for symbol in symbols for form in kind.forms(symbol))
            kept |= {ids[form] for form in forms if form in ids}
        else:
            kept |= {index, *(ids[part] for part in kind.parts(token))}
    return kept


def trim(state: State, kept: Sequence[int]) -> dict[str, Any]:
    """The content of the ``tokenizer.json`` with the ids that :func:`choose` has kept."""
    new = {old: index for index, old in enumerate(kept)}
    ids = ids_of(state)
    model = _cut_model(state["model"], {t: new[i] for t, i in ids.items() if i in new})
    return {
        **state,
        "added_tokens": [{**token, "id": new[token["id"]]} for token in state["added_tokens"]],
        "post_processor": _renumbered(state.get("post_processor"), new),
        "padding": _renumbered(state.get("padding"), new),
        "model": model,
    }


def _cut_model(model: Mapping[str, Any], kept: Mapping[str, int]) -> dict[str, Any]:
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


def _ids_in(part: Any) -> set[int]:
    """The ids that a post-processor, or padding, names."""
    if part is None:
        return set()
    found = set[int]().union(*map(_ids_in, part.get("processors", ())))
    found |= {part[name][1] for name in ("sep", "cls") if isinstance(part.get(name), list)}
    if isinstance(part.get("special_tokens"), dict):
        found |= {i for token in part["special_tokens"].values() for i in token["ids"]}
    return found | ({part["pad_id"]} if "pad_id" in part else set())


def _renumbered(part: Any, new: Mapping[int, int]) -> Any:
    """A post-processor, or padding, with the new ids of its tokens."""
    if part is None:
        return None
    if "processors" in part:
        return {**part, "processors": [_renumbered(p, new) for p in part["processors"]]}
    made = dict(part)
    for name in ("sep", "cls"):  # of BertProcessing and RobertaProcessing: [token, id]
        if isinstance(part.get(name), list):
            made[name] = [part[name][0], new[part[name][1]]]
    if isinstance(part.get("special_tokens"), dict):
        made["special_tokens"] = {
            name: {**token, "ids": [new[i] for i in token["ids"]]}
            for name, token in part["special_tokens"].items()
        }
    if "pad_id" in part:
        made["pad_id"] = new[part["pad_id"]]
    return made


def pieces_of(theirs: State, own: State) -> list[list[int]]:
    """How the kept tokenizer writes each token of the old one.

    Returns:
        New ids by old id, in order; one for a kept token and for what has become unknown. Ids that
        no token has are unknown as well.

    Raises:
        UserError: It is not a part of the old tokenizer.
    """
    ids, kept = ids_of(theirs), ids_of(own)
    strange = next((token for token in kept if token not in ids), None)
    require(
        strange is None,
        "student: tokenizer must hold tokens of the teacher's alone, got another one with "
        f"{strange!r}; use the files that were saved with the student",
    )
    kind = _kind_of(theirs)
    unknown = [_unknown(own, kept)]
    found = [unknown] * (1 + max(ids.values()))
    for token, index in ids.items():
        if token in kept:
            found[index] = [kept[token]]
        else:
            cut = kind.cut(token, kept)
            found[index] = [kept[piece] for piece in cut] if cut else unknown
    return found


def _unknown(state: State, ids: Mapping[str, int]) -> int:
    """What stands for text that cannot be written: the unknown token, else any special one."""
    model = state["model"]
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    if model.get("unk_token") in ids:
        return ids[model["unk_token"]]
    special = [token["id"] for token in state["added_tokens"] if token["special"]]
    require(
        bool(special),
        "student: tokenizer must have special tokens, got none; use that of a masked LM",
    )
    return int(special[-1])


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
    names = _byte_names(token.encode())
    return names if all(name in kept for name in names) else None


def _byte_names(values: Iterable[int]) -> list[str]:
    return [f"<0x{value:02X}>" for value in values]


def _is_byte_level(state: State) -> bool:
    """Whether text is turned into characters that stand for bytes."""
    found = [state.get("pre_tokenizer"), state.get("decoder")]
    for part in found:
        found += (part or {}).get("pretokenizers") or (part or {}).get("decoders") or []
    return any(part is not None and part["type"] == "ByteLevel" for part in found)
