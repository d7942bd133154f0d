"""Token ids of a tokenizer, written in those of a trimmed one (``trimmed_tokenizer.py``).

A token that was dropped becomes the pieces that the trimmed tokenizer makes of it, so sequences
grow. Positions that something is known about, such as a hidden state, move to the first piece.

Shapes: ``B`` sequences, ``T`` tokens of all of them, ``V`` old ids, ``n`` new ones.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer

from distilcache.data.storage.files import read_json
from distilcache.stages.models.special_tokens import closing_tokens
from distilcache.stages.models.tokenizer_kinds import State
from distilcache.stages.models.tokenizers import load_tokenizer
from distilcache.stages.models.trimmed_tokenizer import ids_of, pieces_of

Ids = npt.NDArray[np.int64]
XLM_IDS = ("bos_index", "eos_index", "pad_index", "unk_index", "mask_index")
"""Fields of an XLM or FlauBERT that hold ids; others call theirs ``pad_token_id`` and the like."""


@dataclass(frozen=True, slots=True)
class Recut:
    """Sequences in new ids."""

    ids: Ids
    """All sequences, one after another."""
    lengths: Ids
    """Tokens of each, [B]."""
    sources: Ids
    """The old token of each, by its place among all T."""
    places_T: Ids
    """Where in its sequence the first piece of each old token lies; -1: it was cut off."""


class TrimmedIds:
    """The ids of a trimmed tokenizer.

    Args:
        theirs: The old tokenizer.
        own: The trimmed one.
        rows: V, where the old model has more rows than its tokenizer has ids.
        closing: Tokens that close a sequence, see ``closing_tokens``.
    """

    def __init__(self, theirs: State, own: State, rows: int = 0, closing: int = 1) -> None:
        self.own = own
        old, new = ids_of(theirs), ids_of(own)
        pieces = pieces_of(theirs, own)
        self.old_n: Ids = np.zeros(len(new), np.int64)
        """The old id of each new one, ascending."""
        for token, index in new.items():
            self.old_n[index] = old[token]
        unknown = own["model"].get("unk_id")
        if unknown is not None:  # Another piece may have the same name.
            self.old_n[unknown] = theirs["model"]["unk_id"]
        self.new_V: Ids = np.full(max(rows, len(pieces)), -1)
        """The new id of each old one; -1: dropped."""
        self.new_V[self.old_n] = np.arange(len(new))
        self._lengths_V = np.array([len(cut) for cut in pieces])
        self._starts_V = np.cumsum(self._lengths_V) - self._lengths_V
        self._pieces = np.concatenate([np.array(cut) for cut in pieces])
        self._closing = closing

    @classmethod
    def of_student(cls, theirs: Path, student: Path, rows: int = 0) -> "TrimmedIds":
        """The ids of a finished student, from its folder and one with its teacher's tokenizer.

        Raises:
            UserError: A tokenizer cannot be read, or the student's is no part of the other.
        """
        closing = closing_tokens(load_tokenizer(theirs))
        return cls(read_tokenizer(theirs), read_tokenizer(student), rows, closing)

    def __len__(self) -> int:
        """N."""
        return len(self.old_n)

    def first_pieces(self, ids_T: Ids) -> Ids:
        """The first piece of each token, for sequences that must not grow."""
        return np.asarray(self._pieces[self._starts_V[ids_T]])

    def tokenizer(self) -> Tokenizer:
        """The trimmed tokenizer."""
        return Tokenizer.from_str(json.dumps(self.own))

    def recut(self, ids_T: npt.NDArray[Any], lengths_B: npt.NDArray[Any], longest: int) -> Recut:
        """Sequences in new ids.

        Args:
            ids_T: Old ids of all sequences.
            lengths_B: Tokens of each.
            longest: Tokens of a sequence at most. What is more is cut off before what closes it:
                a token, two in XLNet's, none in some DNA models'.
        """
        sizes_T = self._lengths_V[ids_T]
        ends_T = np.cumsum(sizes_T)
        first_T = ends_T - sizes_T
        sources = np.repeat(np.arange(len(ids_T)), sizes_T)
        within = np.arange(len(sources)) - first_T[sources]
        pieces = self._pieces[self._starts_V[ids_T][sources] + within]
        grown_B = np.diff(ends_T[np.cumsum(lengths_B) - 1], prepend=0)
        start_B = np.cumsum(grown_B) - grown_B
        places = np.arange(len(pieces)) - np.repeat(start_B, grown_B)
        cut_B = np.maximum(grown_B - longest, 0)
        ends, cut = (np.repeat(x_B, grown_B) for x_B in (grown_B - self._closing, cut_B))
        stays = (places < longest - self._closing) | (places >= ends)
        places -= np.where(places >= ends, cut, 0)
        places_T = np.where(stays[first_T], places[first_T], -1)
        return Recut(pieces[stays], np.minimum(grown_B, longest), sources[stays], places_T)


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """The content of a folder's ``tokenizer.json``."""
    state: dict[str, Any] = read_json(folder / "tokenizer.json", "student: tokenizer")
    return state


def renumber(config: Any, trimmed: TrimmedIds) -> None:
    """Put the student's number of ids, and its special ones, into its configuration."""
    known = {old: number for number, old in enumerate(trimmed.old_n.tolist())}

    def new(old: Any) -> Any:
        # A configuration may name ids by default that no token has.
        return [new(one) for one in old] if isinstance(old, list) else known.get(old)

    for name, old in vars(config).copy().items():
        if old is not None and (name.endswith("_token_id") or name in XLM_IDS):
            with contextlib.suppress(StrictDataclassError):  # EuroBERT's must be a number
                setattr(config, name, new(old))
    config.vocab_size = len(trimmed)
