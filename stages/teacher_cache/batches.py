"""Batches of a masked block for the teacher, made on the host.

Sequences of similar length share a batch, so that there is little padding. Every index that the
device needs is computed here: which positions of a batch carry signals, and where they lie in the
block. Tensors for a GPU lie in pinned memory, so that it copies them without the host.

Shapes: ``B`` sequences, ``L`` positions, ``N`` signal positions of a batch or a block.
"""

from dataclasses import dataclass

import numpy as np
import torch

from distilcache.data.cache.schema import Encoding
from distilcache.data.masks.masking import MaskedBlock
from distilcache.data.masks.positions import drawn_rows, extra_fraction, flat_rows, random_units

PADDING = 0.05
"""A batch is closed before its padding exceeds this fraction of it."""
SMALLEST = 1 / 8
"""Below this fraction of a full batch it stays open, since small batches cost more than padding."""


@dataclass(frozen=True, slots=True)
class SignalBlock:
    """One masked block, and where its signals lie."""

    block: MaskedBlock
    lengths: np.ndarray
    key: tuple[int, int, int]
    """Seed of the masking, round, corpus block: the key of the block's random numbers."""
    hidden_rows: np.ndarray
    """Flat token index of each position with hidden states, ascending, int64 [H]."""
    logit_rows: np.ndarray
    """Flat token index of each position with logits, ascending, int64 [N]."""

    @property
    def rows(self) -> np.ndarray:
        """Flat token index of each position with any signal.

        The positions of one kind of signal are among those of the other.
        """
        return max(self.hidden_rows, self.logit_rows, key=len)


@dataclass(frozen=True, slots=True)
class TeacherBatch:
    """Some sequences of a block, padded to the longest."""

    ids_BL: torch.Tensor
    attention_BL: torch.Tensor | None
    """Bool; None where nothing is padded."""
    rows_N: torch.Tensor
    """Flat index of the signal positions in the batch, sequence by sequence."""
    most: int
    """The largest number of signal positions in a sequence."""
    tokens_T: torch.Tensor | None
    """Flat index of the tokens in the batch; None: no state of all of them is stored."""


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """All that the device reads of one block."""

    batches: list[TeacherBatch]
    order_N: torch.Tensor | None
    """Row of each signal position of the block among the rows of all batches; None: the same."""
    order_T: torch.Tensor | None
    """The same of each token, where states of all of them are stored."""
    hidden_index: torch.Tensor | None
    """Which of the block's signal positions carry hidden states; None: all."""
    logit_index: torch.Tensor | None
    """Which carry logits."""
    tail_N: torch.Tensor | None
    """One uniform number per logit position, for the tail draws; None where nothing is drawn."""
    residual_N2: torch.Tensor | None
    """Two per logit position, for the residual draws."""


def place_signals(
    block: MaskedBlock, lengths: np.ndarray, encoding: Encoding, key: tuple[int, int, int]
) -> SignalBlock:
    """Decide which positions of a block carry which signal."""
    masked = flat_rows(lengths, block.masked_counts, block.masked_positions)
    policies = (encoding.hidden_positions, encoding.logit_positions)
    tokens = len(block.input_ids)
    drawn = any(0 < extra_fraction(policy) < 1 for policy in policies)
    units = random_units(*key, "positions", tokens) if drawn else np.zeros(tokens)
    hidden, logits = (drawn_rows(policy, masked, units) for policy in policies)
    return SignalBlock(block, lengths, key, hidden, logits)


def block_inputs(
    placed: SignalBlock, encoding: Encoding, batch_tokens: int, device: torch.device
) -> BlockInputs:
    """Cut a block into batches of at most ``batch_tokens`` tokens, padding included."""
    lengths, rows = placed.lengths, placed.rows
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    chosen = np.zeros(int(lengths.sum()), bool)
    chosen[rows] = True
    batches, taken, tokens = [], [], []
    for sequences in _like_lengths(lengths, batch_tokens):
        offsets = np.arange(int(lengths[sequences].max()))
        present_BL = offsets < lengths[sequences][:, None]
        padded = not present_BL.all()
        index_BL = np.where(present_BL, starts[sequences][:, None] + offsets, 0)
        ids_BL = placed.block.input_ids[index_BL].astype(np.int64)
        ids_BL[~present_BL] = encoding.pad_id
        signals_N = np.flatnonzero(chosen[index_BL] & present_BL)
        taken.append(index_BL.reshape(-1)[signals_N])
        attention_BL = _host(present_BL, device) if padded else None
        most = int(np.bincount(signals_N // ids_BL.shape[1], minlength=1).max())
        there_T = np.flatnonzero(present_BL) if encoding.relation else None
        if there_T is not None:
            tokens.append(index_BL.reshape(-1)[there_T])
        batches.append(
            TeacherBatch(
                _host(ids_BL, device),
                attention_BL,
                _host(signals_N, device),
                most,
                None if there_T is None else _host(there_T, device),
            )
        )
    count, key = len(placed.logit_rows), placed.key
    tail = random_units(*key, "tail", count) if encoding.tail_samples else None
    residual = random_units(*key, "residual", 2 * count) if encoding.residual_samples else None
    return BlockInputs(
        batches=batches,
        order_N=_order(taken, device),
        order_T=_order(tokens, device) if tokens else None,
        hidden_index=_subset(rows, placed.hidden_rows, device),
        logit_index=_subset(rows, placed.logit_rows, device),
        tail_N=None if tail is None else _host(tail, device),
        residual_N2=None if residual is None else _host(residual.reshape(-1, 2), device),
    )


def _like_lengths(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Indices of the sequences of each batch, shortest sequences first."""
    order = np.argsort(lengths, kind="stable")
    batches: list[np.ndarray] = []
    first = tokens = 0
    for last, longest in enumerate(lengths[order].tolist()):
        size = (last + 1 - first) * longest
        wasteful = size - tokens - longest > PADDING * size
        if last > first and (
            size > batch_tokens or (wasteful and tokens >= SMALLEST * batch_tokens)
        ):
            batches.append(order[first:last])
            first, tokens = last, 0
        tokens += longest
    return [*batches, order[first:]]


def _order(taken: list[np.ndarray], device: torch.device) -> torch.Tensor | None:
    """Where each row of the block lies among those of all batches; None: in the same order."""
    # Sorted by token, the rows of all batches are those of the block.
    order = np.argsort(np.concatenate(taken), kind="stable")
    in_place = np.array_equal(order, np.arange(len(order)))
    return None if in_place else _host(order, device)


def _subset(rows: np.ndarray, wanted: np.ndarray, device: torch.device) -> torch.Tensor | None:
    """Where the token indices ``wanted`` lie in ``rows``; None where they are all of them."""
    if len(wanted) == len(rows):
        return None
    return _host(np.searchsorted(rows, wanted), device)


def _host(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor that ``device`` can copy without the host."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if device.type == "cuda" else tensor
