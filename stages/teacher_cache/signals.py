"""What the teacher says at the selected positions of a block, as columns of the cache format.

Shapes: ``B`` sequences, ``L`` positions, ``N`` signal positions of a block, ``V`` vocabulary,
``D`` hidden width.
"""

from collections.abc import Mapping

import numpy as np
import torch

from data.codecs.hidden import HiddenCodec
from data.codecs.logits import LogitSignals, pack, sparsify
from data.masking import MaskedBlock
from data.schema import Encoding, HiddenEncoding
from stages.teacher_cache.adapters import Teacher


def mask_columns(
    block: MaskedBlock, lengths: np.ndarray, encoding: Encoding
) -> dict[str, np.ndarray]:
    """The columns that every cache has, teacher or not."""
    dtype = encoding.token_dtype
    return {
        "lengths": lengths.astype(np.uint16),
        "input_ids": block.input_ids.astype(dtype, copy=False),
        "masked_counts": block.masked_counts,
        "masked_positions": block.masked_positions,
        "labels": block.labels.astype(dtype, copy=False),
    }


def signal_columns(
    teacher: Teacher,
    block: MaskedBlock,
    lengths: np.ndarray,
    encoding: Encoding,
    codecs: Mapping[int, HiddenCodec],
    *,
    batch_tokens: int,
    row_chunk: int,
) -> tuple[dict[str, np.ndarray], int]:
    """Run the teacher over one masked block.

    The LM head runs on signal positions only, ``row_chunk`` at a time, and not at all where no
    logits are stored.

    Returns:
        Signal columns, and the number of hidden-state codes that left their range.
    """
    layers = tuple(h.layer for h in encoding.hidden)
    read = (
        layers
        if teacher.num_layers in layers or not encoding.top_k
        else (
            *layers,
            teacher.num_layers,
        )
    )
    hidden = hidden_states(teacher, block, lengths, encoding, read, batch_tokens)
    columns: dict[str, np.ndarray] = {}
    if encoding.top_k:
        last = hidden[read.index(teacher.num_layers)]
        columns |= _logit_columns(teacher, last, encoding, row_chunk)
    clipped = 0
    for stored, values in zip(encoding.hidden, hidden, strict=False):
        planes, lost = _hidden_columns(stored, values, codecs)
        columns |= planes
        clipped += lost
    return columns, clipped


def signal_rows(block: MaskedBlock, lengths: np.ndarray, positions: str) -> np.ndarray:
    """Flat token index of each signal position of a block, int64 [N]."""
    if positions == "all":
        return np.arange(int(lengths.sum()))
    starts = np.cumsum(lengths) - lengths
    rows: np.ndarray = np.repeat(starts, block.masked_counts) + block.masked_positions
    return rows


def hidden_states(
    teacher: Teacher,
    block: MaskedBlock,
    lengths: np.ndarray,
    encoding: Encoding,
    layers: tuple[int, ...],
    batch_tokens: int,
) -> list[torch.Tensor]:
    """Hidden states of the listed layers at the signal positions, each float32 [N, D]."""
    total = int(lengths.sum())
    rows = torch.from_numpy(signal_rows(block, lengths, encoding.positions))
    # Where each signal position lands in the block's result; -1 marks the other tokens.
    target = torch.full((total,), -1, dtype=torch.int64)
    target[rows] = torch.arange(len(rows))
    target = target.to(teacher.device)
    results = [torch.empty(len(rows), teacher.width, device=teacher.device) for _ in layers]
    ids = torch.from_numpy(block.input_ids.astype(np.int64)).to(teacher.device)
    for batch in _batches(lengths, batch_tokens):
        index, attention = _padded_index(lengths, batch)
        index = index.to(teacher.device)
        padded = ids[index]
        if attention is not None:
            attention = attention.to(teacher.device)
            padded = padded.masked_fill(attention == 0, encoding.pad_id)
        states = teacher.encode(padded, attention, layers)
        place = target[index]
        chosen = place >= 0 if attention is None else (place >= 0) & (attention > 0)
        for result, state in zip(results, states, strict=True):
            result[place[chosen]] = state[chosen].float()
    return results


def _batches(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Sequences of like length together, at most ``batch_tokens`` padded tokens each."""
    order = np.argsort(lengths, kind="stable")
    per_batch = max(1, batch_tokens // int(lengths.max()))
    return [order[i : i + per_batch] for i in range(0, len(order), per_batch)]


def _padded_index(
    lengths: np.ndarray, batch: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Flat token index [b, L] of a batch, and its attention mask where lengths differ."""
    starts = (np.cumsum(lengths) - lengths)[batch]
    width = int(lengths[batch].max())
    offsets = np.arange(width)
    present = offsets < lengths[batch][:, None]
    index = torch.from_numpy(np.where(present, starts[:, None] + offsets, 0))
    return index, None if present.all() else torch.from_numpy(present.astype(np.int64))


def _logit_columns(
    teacher: Teacher, hidden_ND: torch.Tensor, encoding: Encoding, row_chunk: int
) -> dict[str, np.ndarray]:
    temperatures = (1.0, *encoding.temperatures)
    parts = [
        sparsify(teacher.logits(rows), encoding.top_k, temperatures)
        for rows in torch.split(hidden_ND, row_chunk)
    ]
    joined = LogitSignals(
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("ids", "values", "logsumexp", "log_tail")
        )
    )
    return pack(joined, encoding.token_dtype, encoding.logits_dtype)


def _hidden_columns(
    stored: HiddenEncoding, hidden_ND: torch.Tensor, codecs: Mapping[int, HiddenCodec]
) -> tuple[dict[str, np.ndarray], int]:
    if stored.dtype == "coded":
        wide, narrow, clipped = codecs[stored.layer].encode(hidden_ND)
        planes = {
            f"{stored.column}_wide": wide.cpu().numpy(),
            f"{stored.column}_narrow": narrow.cpu().numpy(),
        }
        return planes, int(clipped)
    raw = hidden_ND.to(getattr(torch, stored.dtype)).cpu().numpy()
    return {stored.column: raw}, 0
