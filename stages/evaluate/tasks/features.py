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

from distilcache.data.errors import require, tell
from distilcache.stages.evaluate.tasks.catalogue import CLASSES, SCORE, SPAN, TAGS, Task
from distilcache.stages.evaluate.tasks.examples import Split
from distilcache.stages.evaluate.tasks.spans import Windows, cut_contexts
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
    windows: Windows | None
    """Where tokens of a context lie in its text (span only)."""
    pad: tuple[int, int]
    """Id and type of padding."""
    pad_left: bool
    """Padding comes first, for models that read the last position."""
    tagged: bool = False
    """Tokens have labels, not examples."""

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
        labels = self.labels[: end if self.tagged else rows]
        return replace(
            self, ids=self.ids[:end], types=self.types[:end], bounds=bounds, labels=labels
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
    pad = (tokenizer.pad_token_id, tokenizer.pad_token_type_id)
    of_pieces = isinstance(tokenizer, PieceTokenizer)  # which knows words, but not their places
    if task.kind == SPAN:
        require(
            not of_pieces,
            f"tasks: {task.name} must have a tokenizer that tells where in a text a token lies, "
            "got one that cuts text by Python code; leave the task out",
        )
        found = cut_contexts(split, tokenizer, max_length)
        ids, types, labels, windows = found.ids, found.types, found.labels, found.windows
    else:
        ids, types, tags, cut = [], [], [], 0
        joined = task.kind == TAGS and not of_pieces
        for start in range(0, len(split), CHUNK):
            texts = [column[start : start + CHUNK] for column in split.texts]
            made = tokenizer(
                *([" ".join(words) for words in texts[0]],) if joined else texts,
                is_split_into_words=task.kind == TAGS and not joined,
                truncation=True,
                max_length=max_length,
                return_token_type_ids=True,
                return_attention_mask=False,
            )
            cut += sum(bool(row.overflowing) for row in made.encodings)
            ids += [np.asarray(row, np.int32) for row in made["input_ids"]]
            types += [np.asarray(row, np.int32) for row in made["token_type_ids"]]
            if task.kind == TAGS:
                rows = zip(made.encodings, *texts, split.labels[start:][:CHUNK], strict=True)
                tags += [
                    _at_first_tokens(made.offsets, words, of_words)
                    if joined
                    else _at_first_pieces(made.word_ids, of_words)
                    for made, words, of_words in rows
                ]
        windows = None
        if task.kind == TAGS:
            labels = np.concatenate(tags)
            _tell_untagged(task, split, labels, max_length)
        else:
            labels = np.asarray(split.labels, np.float32 if task.kind == SCORE else np.int64)
            if cut and any(task.files):
                tell(
                    f"tasks: {task.name}: {cut:,} of {len(split):,} texts are longer than "
                    f"{max_length} tokens and are cut; raise tasks.max_length"
                )
    return Encoded(
        ids=np.concatenate(ids),
        types=np.concatenate(types),
        bounds=np.concatenate([[0], np.cumsum([len(row) for row in ids])]),
        labels=labels,
        windows=windows,
        pad=pad,
        pad_left=pad_left and task.kind in (CLASSES, SCORE),
        tagged=task.kind == TAGS,
    )


def _tell_untagged(task: Task, split: Split, labels: NDArray[np.int64], max_length: int) -> None:
    """A line on words that no score counts."""
    words = sum(map(len, split.texts[0]))
    lost = words - int((labels != NO_TAG).sum())
    if lost:
        tell(
            f"tasks: {task.name}: {lost:,} of {words:,} words lie beyond {max_length} tokens, or "
            "have none; their tags are neither learnt nor scored; raise tasks.max_length"
        )


def _at_first_tokens(
    offsets: Sequence[tuple[int, int]], words: Sequence[str], tags: Sequence[int]
) -> NDArray[np.int64]:
    """The tag of each word at its first token, ``NO_TAG`` at all other tokens.

    A token belongs to the word with its last character: some tokenizers add the space before.

    Args:
        offsets: By token, its first character and the one after its last, in the words joined by
            spaces; equal at special tokens.
        words: The words.
        tags: By word.
    """
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    labels: NDArray[np.int64] = np.full(len(offsets), NO_TAG, np.int64)
    last = np.array([end for _, end in offsets]) - 1
    found = np.searchsorted(ends, last)
    before = -1
    for token in np.flatnonzero([start < end for start, end in offsets]):
        word = int(found[token])
        if word != before and word < len(words) and last[token] != ends[word]:
            labels[token], before = tags[word], word
    return labels


def _at_first_pieces(words: Sequence[int | None], tags: Sequence[int]) -> NDArray[np.int64]:
    """The tag of each word at its first token, as :func:`_at_first_tokens`, by tokens' words."""
    return np.array(
        [
            NO_TAG if word is None or word == before else tags[word]
            for before, word in pairwise([None, *words])
        ],
        np.int64,
    )


def tags_of(
    logits_NCL: NDArray[np.float32], encoded: Encoded
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Predicted and true tags of each example, of the words that are not cut off."""
    for row, (start, end) in enumerate(pairwise(encoded.bounds)):
        labels = encoded.labels[start:end]
        there = np.flatnonzero(labels != NO_TAG)
        yield logits_NCL[row].argmax(0)[there], labels[there]


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
        multiple: Lengths are rounded up to a multiple of it.
    """

    def __init__(
        self, encoded: Encoded, *, types: bool, soft: Soft | None = None, multiple: int = 1
    ) -> None:
        self.encoded = encoded
        self.types = types
        self.soft = soft
        self.multiple = multiple

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The model's inputs, ``labels``, and the fields of :class:`Soft` that there are."""
        encoded = self.encoded
        lengths = encoded.lengths[rows]
        longest = -(-int(lengths.max()) // self.multiple) * self.multiple
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
        if self.encoded.tagged:
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
