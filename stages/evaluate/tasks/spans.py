"""Answers as spans of tokens: contexts in overlapping pieces, and the way back to text.

::

    question  [SEP]  piece of the context         piece 0:  ..............
                                                  piece 1:          ..............
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilcache.stages.evaluate.tasks.examples import Answers, Split

STRIDE = 128
"""Tokens that neighbouring pieces share (Devlin et al. 2019); a third of short ones."""
LONGEST_ANSWER = 30
"""Tokens of an answer (Devlin et al. 2019)."""
CHUNK = 512


@dataclass(frozen=True, slots=True)
class Pieces:
    """Where the tokens of pieces lie in their contexts."""

    examples: NDArray[np.int64]
    """[pieces] Question that each belongs to."""
    offsets: list[NDArray[np.int32]]
    """Per piece [L, 2]: first character and the one after the last; -1 outside the context."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Questions with pieces of their contexts."""

    ids: list[NDArray[np.int32]]
    types: list[NDArray[np.int32]]
    labels: NDArray[np.int64]
    """[pieces, 2] First and last token of the answer; the class token where it is elsewhere."""
    pieces: Pieces


def cut_contexts(split: Split, tokenizer: Any, max_length: int) -> Cut:
    """Tokenise questions with contexts; what is too long becomes several pieces."""
    ids, types, labels, offsets, examples = [], [], [], [], []
    for start in range(0, len(split), CHUNK):
        questions, contexts = (column[start : start + CHUNK] for column in split.texts)
        made = tokenizer(
            _shortened(questions, tokenizer, max_length // 2),
            contexts,
            truncation="only_second",
            max_length=max_length,
            stride=min(STRIDE, max_length // 6),
            return_overflowing_tokens=True,
            return_token_type_ids=True,
        )
        for encoding, row in zip(made.encodings, made["overflow_to_sample_mapping"], strict=True):
            inside = np.array([part == 1 for part in encoding.sequence_ids])
            places = np.asarray(encoding.offsets, np.int32)
            places[~inside] = -1
            ids.append(np.asarray(encoding.ids, np.int32))
            types.append(np.asarray(encoding.type_ids, np.int32))
            cls = int((ids[-1] == tokenizer.cls_token_id).argmax())  # 0 where there is none
            labels.append(_tokens_of(split.labels[start + row], places, cls))
            offsets.append(places)
            examples.append(start + row)
    return Cut(ids, types, np.array(labels), Pieces(np.array(examples), offsets))


def _shortened(questions: Sequence[str], tokenizer: Any, most: int) -> list[str]:
    """Questions of at most ``most`` tokens, so that some of the context finds room."""
    made = tokenizer(list(questions), add_special_tokens=False, truncation=True, max_length=most)
    return [
        text[: encoding.offsets[-1][1]] if len(encoding.ids) == most else text
        for text, encoding in zip(questions, made.encodings, strict=True)
    ]


def _tokens_of(answers: Answers, places: NDArray[np.int32], cls: int) -> tuple[int, int]:
    """The first answer's first and last token where this piece holds all of it, else ``cls``."""
    begin, end = answers.starts[0], answers.starts[0] + len(answers.texts[0])
    held = (places[:, 0] >= 0) & (places[:, 1] > begin) & (places[:, 0] < end)
    rows = np.flatnonzero(held)
    if not len(rows) or places[rows[0], 0] > begin or places[rows[-1], 1] < end:
        return cls, cls
    return int(rows[0]), int(rows[-1])


def best_answers(
    logits_N2L: NDArray[np.float32], pieces: Pieces, contexts: Sequence[str]
) -> list[str]:
    """The most likely span over all pieces of each question, as text.

    Of all spans of context tokens with at most ``LONGEST_ANSWER`` of them, the one with the
    largest sum of its start's and end's logits. (Searching all of them costs about a millisecond
    per piece, so no list of the n best is needed.)
    """
    best: NDArray[np.float64] = np.full(len(contexts), -np.inf)
    texts = [""] * len(contexts)
    for logits_2L, example, places in zip(logits_N2L, pieces.examples, pieces.offsets, strict=True):
        inside = np.flatnonzero(places[:, 0] >= 0)
        if not len(inside):
            continue
        first, last = inside[0], inside[-1] + 1  # a context is one stretch of tokens
        start, end = logits_2L[0, first:last], logits_2L[1, first:last]
        sums = start[:, None] + end[None, :]
        length = np.arange(last - first)[None, :] - np.arange(last - first)[:, None]
        sums[(length < 0) | (length >= LONGEST_ANSWER)] = -np.inf
        i, j = np.unravel_index(int(sums.argmax()), sums.shape)
        if sums[i, j] > best[example]:
            best[example] = sums[i, j]
            texts[example] = contexts[example][places[first + i, 0] : places[first + j, 1]]
    return texts
