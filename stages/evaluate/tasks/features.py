"""Texts to token ids, and batches padded to their longest example.

Shapes: N examples (span: windows of contexts), B of them in a batch, L tokens, C outputs.

Ids of all examples are concatenated: a task of 400,000 pairs takes about ten bytes per token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distilcache.data.errors import require
from distilcache.stages.evaluate.tasks.catalogue import CLASSES, SCORE, SPAN, TAGS, Task
from distilcache.stages.evaluate.tasks.examples import Split
from distilcache.stages.evaluate.tasks.spans import Cut, Windows, cut_contexts
from distilcache.stages.models.piece_tokenizer import PieceTokenizer

CHUNK = 2048
"""Examples per call of the tokenizer."""
NO_TAG = -100
"""Label of tokens that no loss and no metric looks at."""
LANES = 8
"""On a GPU, lengths are rounded up to a multiple of it, the step of its matrix units."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Examples as token ids."""

    ids: NDArray[np.int32]
    types: NDArray[np.int32]
    """Token types; not every model takes them."""
    bounds: NDArray[np.int64]
    """Example i is ``ids[bounds[i]:bounds[i + 1]]``."""
    labels: NDArray[Any]
    """int64 [N] classes, float32 [N] scores, int64 [N, 2] first and last token; for tagging a class
    per token, int64 like ``ids``: that of its word at a word's first token, else ``NO_TAG``."""
    words: NDArray[np.int64] | None
    """For tagging, like ``ids``: at a word's first token its number in the text, else -1."""
    windows: Windows | None
    """Where tokens of a context lie in its text (span only)."""
    pad: tuple[int, int]
    """Id and type of padding."""
    pad_left: bool
    """Padding comes first, for models that read the last position."""
    cut: int
    """Texts, or for tagging words, that do not fit."""

    def __len__(self) -> int:
        """N."""
        return len(self.bounds) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.bounds)

    def first(self, count: int) -> "Encoded":
        """The first examples."""
        bounds = self.bounds[: count + 1]
        end, rows = bounds[-1], len(bounds) - 1
        words = self.words
        return replace(
            self,
            ids=self.ids[:end],
            types=self.types[:end],
            bounds=bounds,
            labels=self.labels[: rows if words is None else end],
            words=None if words is None else words[:end],
        )

    @property
    def cls(self) -> int:
        """Position of [CLS] in a padded batch."""
        return -1 if self.pad_left else 0


def encode(
    task: Task, split: Split, tokenizer: Any, max_length: int, *, pad_left: bool = False
) -> Encoded:
    """Tokenise examples.

    Args:
        task: Task of the examples.
        split: The examples.
        tokenizer: A fast tokenizer.
        max_length: Tokens per example. Of a pair, the longer text is cut; a context is split into
            overlapping windows.
        pad_left: The model reads the last position, as XLNet's heads of texts do.
    """
    words: list[NDArray[np.int64]] = []
    windows, cut = None, 0
    if task.kind == SPAN:
        found = _of_contexts(task, split, tokenizer, max_length)
        ids, types, labels, windows = found.ids, found.types, found.labels, found.windows
    else:
        ids, types, words, cut = _of_texts(task, split, tokenizer, max_length)
        labels = _labels(task, split, words)
    return Encoded(
        ids=np.concatenate(ids),
        types=np.concatenate(types),
        bounds=np.concatenate([[0], np.cumsum([len(row) for row in ids])]),
        labels=labels,
        words=np.concatenate(words) if words else None,
        windows=windows,
        pad=(tokenizer.pad_token_id, tokenizer.pad_token_type_id),
        pad_left=pad_left and task.kind in (CLASSES, SCORE),
        cut=cut,
    )


def _of_contexts(task: Task, split: Split, tokenizer: Any, max_length: int) -> Cut:
    require(
        not isinstance(tokenizer, PieceTokenizer),
        f"tasks: {task.name} must have a tokenizer that tells where in a text a token lies, "
        "got one that cuts text by Python code; leave the task out",
    )
    return cut_contexts(split, tokenizer, max_length)


def _of_texts(
    task: Task, split: Split, tokenizer: Any, max_length: int
) -> tuple[list[NDArray[np.int32]], list[NDArray[np.int32]], list[NDArray[np.int64]], int]:
    """Ids and types of each text, for tagging its words at their first tokens, and what is cut."""
    ids, types, words, cut = [], [], [], 0
    tagged = task.kind == TAGS
    # A tokenizer of pieces knows words, but not their places.
    joined = tagged and not isinstance(tokenizer, PieceTokenizer)
    for start in range(0, len(split), CHUNK):
        texts = [column[start : start + CHUNK] for column in split.texts]
        made = tokenizer(
            *([" ".join(of_text) for of_text in texts[0]],) if joined else texts,
            is_split_into_words=tagged and not joined,
            truncation=True,
            max_length=max_length,
            return_token_type_ids=True,
            return_attention_mask=False,
        )
        ids += [np.asarray(row, np.int32) for row in made["input_ids"]]
        types += [np.asarray(row, np.int32) for row in made["token_type_ids"]]
        if not tagged:
            cut += sum(bool(row.overflowing) for row in made.encodings)
            continue
        for row, of_text in zip(made.encodings, texts[0], strict=True):
            places = (
                _at_first_tokens(row.offsets, of_text) if joined else _at_first_pieces(row.word_ids)
            )
            words.append(places)
            cut += len(of_text) - int((places >= 0).sum())
    return ids, types, words, cut


def _labels(task: Task, split: Split, words: Sequence[NDArray[np.int64]]) -> NDArray[Any]:
    if task.kind != TAGS:
        return np.asarray(split.labels, np.float32 if task.kind == SCORE else np.int64)
    # -1, a token that begins no word, finds the last.
    rows = zip(split.labels, words, strict=True)
    return np.concatenate([np.array([*tags, NO_TAG], np.int64)[places] for tags, places in rows])


def _at_first_tokens(offsets: Sequence[tuple[int, int]], words: Sequence[str]) -> NDArray[np.int64]:
    """The number of each word at its first token, -1 at all other tokens.

    A token belongs to the word with its last character: some tokenizers add the space before.

    Args:
        offsets: By token, its first character and the one after its last, in the words joined by
            spaces; equal at special tokens.
        words: The words.
    """
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    places: NDArray[np.int64] = np.full(len(offsets), -1, np.int64)
    last = np.array([end for _, end in offsets]) - 1
    found = np.searchsorted(ends, last)
    before = -1
    for token in np.flatnonzero([start < end for start, end in offsets]):
        word = int(found[token])
        if word != before and word < len(words) and last[token] != ends[word]:
            places[token] = before = word
    return places


def _at_first_pieces(words: Sequence[int | None]) -> NDArray[np.int64]:
    """The number of each word at its first token, as :func:`_at_first_tokens`."""
    pairs = pairwise([None, *words])
    return np.array([-1 if w is None or w == before else w for before, w in pairs], np.int64)


def tags_of(
    logits_NCL: NDArray[np.float32], encoded: Encoded, labels: Sequence[Sequence[int]]
) -> Iterator[NDArray[np.int64]]:
    """Predicted tags of each example, as many as it has labels; -1 for words that are cut off."""
    assert encoded.words is not None
    for row, (start, end) in enumerate(pairwise(encoded.bounds)):
        words = encoded.words[start:end]
        there = np.flatnonzero(words >= 0)
        tags: NDArray[np.int64] = np.full(len(labels[row]), -1, np.int64)
        tags[words[there]] = logits_NCL[row].argmax(0)[there]
        yield tags


@dataclass(frozen=True, slots=True)
class Soft:
    """A fine-tuned teacher's signals for examples."""

    logits: Tensor
    """[N, C], [N, 2, L] for spans, or [N, C, L] for tags."""
    weight: Tensor
    """[N] Weight of the teacher's logits in each example's loss; the labels' loss has the rest."""
    states: Tensor | None = None
    """[N, W] Its final hidden states of [CLS], if the student learns from them."""


class Collate:
    """Example numbers to a padded batch; a collate function of a data loader.

    Args:
        encoded: The examples.
        types: Whether the model takes token types.
        soft: A teacher's signals, which join the batch.
        multiple: Lengths are rounded up to a multiple of it, at most to the longest example's,
            which the model is known to take.
    """

    def __init__(
        self, encoded: Encoded, *, types: bool, soft: Soft | None = None, multiple: int = 1
    ) -> None:
        self.encoded = encoded
        self.types = types
        self.soft = soft
        self.multiple = multiple
        self.longest = int(encoded.lengths.max(initial=0))

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The model's inputs, ``labels``, and the fields of :class:`Soft` that there are."""
        encoded = self.encoded
        lengths = encoded.lengths[rows]
        rounded = -(-int(lengths.max()) // self.multiple) * self.multiple
        longest = min(rounded, self.longest)
        columns = np.arange(longest)
        if encoded.pad_left:
            mask = columns >= longest - lengths[:, None]
        else:
            mask = columns < lengths[:, None]
        batch = {
            "input_ids": self._padded(encoded.ids, rows, mask, encoded.pad[0]),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "labels": self._labels(rows, mask),
        }
        if self.types:
            batch["token_type_ids"] = self._padded(encoded.types, rows, mask, encoded.pad[1])
        if self.soft is not None:
            soft = self.soft.logits[rows]
            batch["soft"] = fit_length(soft, longest) if soft.ndim == 3 else soft
            batch["weight"] = self.soft.weight[rows]
            if self.soft.states is not None:
                batch["states"] = self.soft.states[rows]
        return batch

    def _labels(self, rows: Sequence[int], mask: NDArray[np.bool_]) -> Tensor:
        if self.encoded.words is not None:
            return self._padded(self.encoded.labels, rows, mask, NO_TAG)
        return torch.from_numpy(self.encoded.labels[rows])

    def _padded(
        self, values: NDArray[Any], rows: Sequence[int], mask: NDArray[np.bool_], pad: int
    ) -> Tensor:
        bounds = self.encoded.bounds
        padded: NDArray[np.int64] = np.full(mask.shape, pad, np.int64)
        padded[mask] = np.concatenate([values[bounds[i] : bounds[i + 1]] for i in rows])
        return torch.from_numpy(padded)


def fit_length(logits_BCL: Tensor, length: int) -> Tensor:
    """Cut or pad the last axis; padded values are never read."""
    missing = length - logits_BCL.shape[-1]
    return torch.nn.functional.pad(logits_BCL, (0, missing))
