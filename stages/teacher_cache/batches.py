"""Batches of a masked block for the teacher, made on the host: a device never waits for an index.

Sequences of like length go together, so that little is padded; every index that a device needs
(which positions of a batch carry signals, where they lie in the block) is computed here, and lies
in pinned memory where the device copies it by itself.

Shapes: ``B`` sequences, ``L`` positions, ``N`` signal positions of a batch or a block.
"""

from dataclasses import dataclass

import numpy as np
import torch

from distilcache.data.cache.schema import Encoding
from distilcache.data.masks.masking import MaskedBlock
from distilcache.data.masks.positions import drawn_rows, extra_share, flat_rows, random_units

PADDING = 0.05
"""Share of a batch that may be padding, once it is no small batch."""
SMALLEST = 1 / 8
"""Share of the tokens of a full batch from which on it is none."""


@dataclass(frozen=True, slots=True)
class SignalBlock:
    """One masked block, and where its signals lie."""

    block: MaskedBlock
    lengths: np.ndarray
    key: tuple[int, int, int]
    """Seed of the masking, round, corpus block: names the random words of the block."""
    hidden_rows: np.ndarray
    """Flat token index of each position with hidden states, ascending, int64 [H]."""
    logit_rows: np.ndarray
    """Flat token index of each position with logits, ascending, int64 [N]."""

    @property
    def rows(self) -> np.ndarray:
        """Flat token index of each position with any signal: the policies nest."""
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
    """Signal positions of the sequence that has most of them."""


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """All that the device reads of one block."""

    batches: list[TeacherBatch]
    order_N: torch.Tensor | None
    """Where each signal position of the block lies among the rows of all batches; None: there."""
    hidden_index: torch.Tensor | None
    """Which of the block's signal positions carry hidden states; None: all."""
    logit_index: torch.Tensor | None
    """Which carry logits."""
    tail_N: torch.Tensor | None
    """Uniform number of each logit position's tail draws; None where nothing is drawn."""
    residual_N2: torch.Tensor | None
    """Two of each logit position's residual draws."""


def place_signals(
    block: MaskedBlock, lengths: np.ndarray, encoding: Encoding, key: tuple[int, int, int]
) -> SignalBlock:
    """Decide which positions of a block carry which signal."""
    masked = flat_rows(lengths, block.masked_counts, block.masked_positions)
    policies = (encoding.hidden_positions, encoding.logit_positions)
    tokens = len(block.input_ids)
    drawn = any(0 < extra_share(policy) < 1 for policy in policies)
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
    batches, taken = [], []
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
        batches.append(
            TeacherBatch(_host(ids_BL, device), attention_BL, _host(signals_N, device), most)
        )
    # The batches' rows sorted by token are the block's.
    order = np.argsort(np.concatenate(taken), kind="stable")
    in_place = np.array_equal(order, np.arange(len(order)))
    count, key = len(placed.logit_rows), placed.key
    tail = random_units(*key, "tail", count) if encoding.tail_samples else None
    residual = random_units(*key, "residual", 2 * count) if encoding.residual_samples else None
    return BlockInputs(
        batches=batches,
        order_N=None if in_place else _host(order, device),
        hidden_index=_subset(rows, placed.hidden_rows, device),
        logit_index=_subset(rows, placed.logit_rows, device),
        tail_N=None if tail is None else _host(tail, device),
        residual_N2=None if residual is None else _host(residual.reshape(-1, 2), device),
    )


def _like_lengths(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Sequences of like length together: as many as a batch has room for, or few are padded for."""
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


def _subset(rows: np.ndarray, wanted: np.ndarray, device: torch.device) -> torch.Tensor | None:
    """Where the token indices ``wanted`` lie in ``rows``; None where they are all of them."""
    if len(wanted) == len(rows):
        return None
    return _host(np.searchsorted(rows, wanted), device)


def _host(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor that ``device`` can copy without the host."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if device.type == "cuda" else tensor
