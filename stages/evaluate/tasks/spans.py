"""Answers as spans of tokens: contexts in overlapping windows, and back to text.

::

    question  [SEP]  window of the context        window 0:  ..............
                                                  window 1:          ..............
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilcache.stages.evaluate.tasks.examples import Split
from distilcache.stages.evaluate.tasks.values import Answers

STRIDE = 128
"""Most tokens that neighbouring windows have in common (Devlin et al. 2019)."""
LONGEST_ANSWER = 30
"""Tokens of an answer (Devlin et al. 2019)."""
CHUNK = 512


@dataclass(frozen=True, slots=True)
class Windows:
    """Where the tokens of windows lie in their contexts."""

    examples: NDArray[np.int64]
    """[windows] Question of each window."""
    offsets: list[NDArray[np.int32]]
    """Per window [L, 2]: each token's first character and the one after its last; -1 outside the
    context."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Questions with windows of their contexts."""

    ids: list[NDArray[np.int32]]
    types: list[NDArray[np.int32]]
    labels: NDArray[np.int64]
    """[windows, 2] First and last token of the answer; [CLS] twice if the window lacks it."""
    windows: Windows


def cut_contexts(split: Split, tokenizer: Any, max_length: int) -> Cut:
    """Tokenise questions with contexts; a long context becomes several windows."""
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
            inside = np.array([text == 1 for text in encoding.sequence_ids])
            places = np.asarray(encoding.offsets, np.int32)
            places[~inside] = -1
            ids.append(np.asarray(encoding.ids, np.int32))
            types.append(np.asarray(encoding.type_ids, np.int32))
            cls = int((ids[-1] == tokenizer.cls_token_id).argmax())  # 0 where there is none
            labels.append(_tokens_of(split.labels[start + row], places, cls))
            offsets.append(places)
            examples.append(start + row)
    return Cut(ids, types, np.array(labels), Windows(np.array(examples), offsets))


def _shortened(questions: Sequence[str], tokenizer: Any, most: int) -> list[str]:
    """Questions cut to ``most`` tokens, so that there is room for some of the context."""
    made = tokenizer(list(questions), add_special_tokens=False, truncation=True, max_length=most)
    return [
        text[: encoding.offsets[-1][1]] if len(encoding.ids) == most else text
        for text, encoding in zip(questions, made.encodings, strict=True)
    ]


def _tokens_of(answers: Answers, places: NDArray[np.int32], cls: int) -> tuple[int, int]:
    """First and last token of the first answer if the window has all of it, else ``cls`` twice."""
    begin, end = answers.starts[0], answers.starts[0] + len(answers.texts[0])
    inside = (places[:, 0] >= 0) & (places[:, 1] > begin) & (places[:, 0] < end)
    rows = np.flatnonzero(inside)
    if not len(rows) or places[rows[0], 0] > begin or places[rows[-1], 1] < end:
        return cls, cls
    return int(rows[0]), int(rows[-1])


def best_answers(
    logits_N2L: NDArray[np.float32], windows: Windows, contexts: Sequence[str]
) -> list[str]:
    """The most likely span over all windows of each question, as text.

    This is the span of at most ``LONGEST_ANSWER`` context tokens with the largest sum of start and
    end logits. Searching all spans costs about a millisecond per window.
    """
    best: NDArray[np.float64] = np.full(len(contexts), -np.inf)
    texts = [""] * len(contexts)
    for logits_2L, example, places in zip(
        logits_N2L, windows.examples, windows.offsets, strict=True
    ):
        inside = np.flatnonzero(places[:, 0] >= 0)
        if not len(inside):
            continue
        first, last = inside[0], inside[-1] + 1  # The context's tokens are contiguous.
        start, end = logits_2L[0, first:last], logits_2L[1, first:last]
        sums = start[:, None] + end[None, :]
        length = np.arange(last - first)[None, :] - np.arange(last - first)[:, None]
        sums[(length < 0) | (length >= LONGEST_ANSWER)] = -np.inf
        i, j = np.unravel_index(int(sums.argmax()), sums.shape)
        if sums[i, j] > best[example]:
            best[example] = sums[i, j]
            texts[example] = contexts[example][places[first + i, 0] : places[first + j, 1]]
    return texts
