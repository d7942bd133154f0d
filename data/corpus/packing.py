"""Packing: from tokenised documents to training sequences, vectorised.

Shapes: ``B`` sequences or documents, ``T`` tokens of all of them, one after another.

Documents are one flat array of token ids, without special tokens, and their lengths. With
``[CLS]`` = 1, ``[SEP]`` = 2 and ``max_length`` 6, the documents ``7 8 9 | 5 6`` become

    blocks:  1 7 8 9 2 2                  and 5 6 2 as an incomplete tail
    lines:   1 7 8 9 2    1 5 6 2         (dropped if shorter than ``min_tokens``)

Where the tokenizer puts ``[CLS]`` last (XLNet), the block is ``7 8 9 2 2 1`` and the line
``7 8 9 2 1``.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_UNKNOWN = 0.5
"""Lines with at least this fraction of unknown tokens are dropped, as in DistilBERT."""

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Packed:
    """Sequences with their special tokens, one after another."""

    ids: Array
    """uint [T]."""
    lengths: npt.NDArray[np.int64]
    """int64 [B]."""
    dropped_tokens: int
    """Tokens of the documents that are not in a sequence."""
    short: int = 0
    """Sequences that were dropped because they have too few tokens."""
    unknown: int = 0
    """Sequences that were dropped because too many of their tokens are unknown."""


def pack_blocks(
    ids: Array,
    lengths: npt.NDArray[np.int64],
    *,
    max_length: int,
    cls_id: int,
    sep_id: int,
    min_tokens: int,
    cls_last: bool = False,
    keep_tail: bool = False,
) -> Packed:
    """Join documents as ``doc [SEP] doc [SEP] ...`` and cut full sequences.

    This is RoBERTa's FULL-SENTENCES.

    Args:
        ids: uint [T], tokens of all documents.
        lengths: int64 [B], tokens per document.
        max_length: Tokens per sequence, special tokens included.
        cls_id: Id that opens every sequence.
        sep_id: Id that closes every document and every sequence; -1: nothing does.
        min_tokens: Smallest number of tokens of a kept tail, special tokens included.
        cls_last: ``cls_id`` comes after the last ``sep_id`` instead.
        keep_tail: If there is no full sequence, keep the tail as a shorter one.

    Returns:
        Sequences of exactly ``max_length`` tokens; the incomplete tail is dropped and counted.
    """
    lengths = lengths[lengths > 0]
    closes = int(sep_id >= 0)
    body = max_length - 1 - closes
    is_token = np.ones(len(ids) + closes * len(lengths), dtype=bool)
    if closes:
        is_token[np.cumsum(lengths + 1) - 1] = False
    joined = np.full(len(is_token), max(sep_id, 0), dtype=ids.dtype)
    joined[is_token] = ids
    count = len(joined) // body
    tail = slice(count * body, None)
    if count == 0 and keep_tail and len(joined) and len(joined) + 1 >= min_tokens:
        around = ([], [cls_id]) if cls_last else ([cls_id], [])
        whole = np.concatenate([around[0], joined, around[1]]).astype(ids.dtype)
        return Packed(whole, np.array([len(whole)], dtype=np.int64), 0)
    sequences = np.empty((count, max_length), dtype=ids.dtype)
    cls_at, sep_at, first = (-1, -2, 0) if cls_last else (0, -1, 1)
    if closes:
        sequences[:, sep_at] = sep_id
    sequences[:, cls_at] = cls_id
    sequences[:, first : first + body] = joined[: count * body].reshape(count, body)
    return Packed(
        sequences.ravel(),
        np.full(count, max_length, dtype=np.int64),
        int(np.count_nonzero(is_token[tail])),
    )


def pack_lines(
    ids: Array,
    lengths: npt.NDArray[np.int64],
    *,
    max_length: int,
    cls_id: int,
    sep_id: int,
    unk_id: int,
    min_tokens: int,
    cls_last: bool = False,
) -> Packed:
    """Make each document its own ``[CLS] ... [SEP]``; longer ones are split into several.

    Args:
        ids: uint [T], tokens of all documents.
        lengths: int64 [B], tokens per document.
        max_length: Largest number of tokens per sequence, special tokens included.
        cls_id: Id that opens every sequence.
        sep_id: Id that closes every sequence; -1: nothing does.
        unk_id: Id of unknown tokens; -1: the tokenizer has none.
        min_tokens: Smallest number of tokens per sequence, special tokens included.
        cls_last: ``cls_id`` comes after ``sep_id`` instead.

    Returns:
        The sequences with at least ``min_tokens`` tokens of which fewer than ``MAX_UNKNOWN`` are
        unknown; both rules count the special tokens.
    """
    closes = int(sep_id >= 0)
    body = max_length - 1 - closes
    lengths = lengths[lengths > 0]
    parts = -(-lengths // body)
    last = np.cumsum(parts) - 1
    part_lengths = np.full(int(parts.sum()), body, dtype=np.int64)
    part_lengths[last] = lengths - (parts - 1) * body
    # Parts are consecutive slices of ``ids``, so it is enough to insert the special tokens.
    total = part_lengths + 1 + closes
    ends = np.cumsum(total)
    is_token = np.ones(int(total.sum()), dtype=bool)
    cls_at, sep_at = (ends - 1, ends - 2) if cls_last else (ends - total, ends - 1)
    wrapped = np.empty(len(is_token), dtype=ids.dtype)
    for place, special in ((cls_at, cls_id), (sep_at, sep_id))[: 1 + closes]:
        is_token[place] = False
        wrapped[place] = special
    wrapped[is_token] = ids
    unknown = np.zeros(len(is_token) + 1, dtype=np.int64)
    np.cumsum(wrapped == unk_id, out=unknown[1:])
    unknown_fraction = (unknown[ends] - unknown[ends - total]) / np.maximum(total, 1)
    long = total >= min_tokens
    keep = long & (unknown_fraction < MAX_UNKNOWN)
    return Packed(
        wrapped[np.repeat(keep, total)],
        total[keep],
        dropped_tokens=int(part_lengths[~keep].sum()),
        short=int(np.count_nonzero(~long)),
        unknown=int(np.count_nonzero(long & ~keep)),
    )
