"""Masked held-out sequences, on which quality is measured.

Shapes: B sequences, L positions, M masked positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError
from distilcache.data.masks.masking import MaskingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Masked held-out sequences as flat columns."""

    input_ids: NDArray[np.int64]
    """Masked ids of all sequences, one after another."""
    lengths: NDArray[np.int64]
    """Tokens of each sequence."""
    masked_counts: NDArray[np.int64]
    """Masked positions of each sequence."""
    masked_positions: NDArray[np.int64]
    """Positions within their sequence."""
    labels: NDArray[np.int64]
    """The original tokens at these positions."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One padded batch on the device."""

    input_ids: Tensor
    """Masked ids [B, L]."""
    attention_mask: Tensor | None
    """1 for tokens, 0 for padding [B, L]; None where nothing is padded."""
    masked_index: Tensor
    """Masked positions in the flattened B x L [M]."""
    labels: Tensor
    """Original tokens [M]."""


def read_heldout(corpus: Corpus, masking: MaskingConfig, *, sequences: int, seed: int) -> HeldOut:
    """Take evenly spaced held-out sequences and mask them.

    They are spaced over the whole split so that they come from many documents and sources. The mask
    of a sequence depends only on the seed and its block, not on how many sequences are taken.

    Raises:
        UserError: The corpus has no held-out text.
    """
    if "heldout" not in corpus.manifest.splits or corpus.split("heldout").num_blocks == 0:
        raise UserError(
            f"evaluate: corpus must have held-out text, got none in {corpus.path}; move it away, "
            "name text that no student was trained on in corpus.heldout_sources, and run "
            "distilcache corpus"
        )
    block_sequences = corpus.split("heldout").block_sequences
    ends = np.cumsum(block_sequences)
    total = int(ends[-1])
    count = min(sequences, total)
    chosen = np.arange(count, dtype=np.int64) * total // count
    block_of = np.searchsorted(ends, chosen, side="right")
    seeded = replace(masking, seed=seed)
    blocks = []
    for block in np.unique(block_of):
        begin = ends[block] - block_sequences[block]
        blocks.append(_masked_rows(corpus, seeded, int(block), chosen[block_of == block] - begin))
    heldout = HeldOut(
        **{f.name: np.concatenate([getattr(b, f.name) for b in blocks]) for f in fields(HeldOut)}
    )
    if not heldout.labels.size:
        raise UserError(
            f"evaluate: held-out text must have tokens that can be masked, got only special and "
            f"unknown ones in {total} sequences; move {corpus.path} away, name text that "
            "the tokenizer knows in corpus.heldout_sources, and run distilcache corpus"
        )
    return heldout


def _masked_rows(
    corpus: Corpus, masking: MaskingConfig, block: int, rows: NDArray[np.int64]
) -> HeldOut:
    """Some sequences of one held-out block."""
    masked, lengths = corpus.masked("heldout", block, masking)
    keep = np.zeros(len(lengths), dtype=bool)
    keep[rows] = True
    counts = masked.masked_counts.astype(np.int64)
    of_token, of_mask = np.repeat(keep, lengths), np.repeat(keep, counts)
    return HeldOut(
        input_ids=masked.input_ids[of_token].astype(np.int64),
        lengths=lengths[keep].astype(np.int64),
        masked_counts=counts[keep],
        masked_positions=masked.masked_positions[of_mask].astype(np.int64),
        labels=masked.labels[of_mask].astype(np.int64),
    )


def padded_batches(
    heldout: HeldOut, *, batch_size: int, pad_id: int, device: torch.device
) -> Iterator[Batch]:
    """Cut held-out sequences into padded batches, in order."""
    token_ends = np.concatenate([[0], np.cumsum(heldout.lengths)])
    mask_ends = np.concatenate([[0], np.cumsum(heldout.masked_counts)])
    for start in range(0, len(heldout.lengths), batch_size):
        stop = min(start + batch_size, len(heldout.lengths))
        lengths = heldout.lengths[start:stop]
        width = int(lengths.max())
        filled_BL = np.arange(width) < lengths[:, None]
        ids_BL = np.full(filled_BL.shape, pad_id, dtype=np.int64)
        ids_BL[filled_BL] = heldout.input_ids[token_ends[start] : token_ends[stop]]
        rows = slice(mask_ends[start], mask_ends[stop])
        sequence_M = np.repeat(np.arange(stop - start), heldout.masked_counts[start:stop])
        index_M = sequence_M * width + heldout.masked_positions[rows]
        mask = None
        if not filled_BL.all():
            mask = torch.from_numpy(filled_BL.astype(np.int64)).to(device)
        yield Batch(
            input_ids=torch.from_numpy(ids_BL).to(device),
            attention_mask=mask,
            masked_index=torch.from_numpy(index_M).to(device),
            labels=torch.from_numpy(heldout.labels[rows]).to(device),
        )
