"""What the teacher says at the selected positions of a block, as columns of the cache format.

Shapes: ``B`` sequences, ``L`` positions, ``N`` signal positions of a block, ``V`` vocabulary,
``D`` hidden width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from data.codecs.hidden import HiddenCodec
from data.errors import UserError
from data.masking import MaskedBlock
from data.positions import drawn_rows, extra_share, flat_rows, per_sequence, random_units
from data.schema import Encoding, HiddenEncoding
from stages.teacher_cache.adapters import Teacher
from stages.teacher_cache.sparse import logit_columns


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


def place_signals(
    block: MaskedBlock, lengths: np.ndarray, encoding: Encoding, key: tuple[int, int, int]
) -> SignalBlock:
    """Decide which positions of a block carry which signal."""
    masked = flat_rows(lengths, block.masked_counts, block.masked_positions)
    units = random_units(*key, "positions", len(block.input_ids))
    hidden = drawn_rows(encoding.hidden_positions, masked, units)
    logits = drawn_rows(encoding.logit_positions, masked, units)
    return SignalBlock(block, lengths, key, hidden, logits)


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
    placed: SignalBlock,
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

    Raises:
        UserError: The teacher's hidden states are not finite.
    """
    layers = [h.layer for h in encoding.hidden]
    if encoding.stores_logits and teacher.num_layers not in layers:
        layers.append(teacher.num_layers)
    # The policies nest, so the larger set holds the other.
    rows = max(placed.hidden_rows, placed.logit_rows, key=len)
    states = hidden_states(teacher, placed, encoding, tuple(layers), batch_tokens, rows)
    columns = _position_columns(placed, encoding)
    last = states[layers.index(teacher.num_layers)] if teacher.num_layers in layers else None
    if encoding.stores_logits and last is not None:
        columns |= logit_columns(
            teacher,
            _pick(last, rows, placed.logit_rows),
            encoding,
            codecs.get(teacher.num_layers),
            placed.key,
            row_chunk,
        )
    clipped = 0
    for stored, values in zip(encoding.hidden, states, strict=False):
        picked = _pick(values, rows, placed.hidden_rows)
        columns[stored.column], lost = _hidden_column(stored, picked, codecs)
        clipped += lost
    return columns, clipped


def _position_columns(placed: SignalBlock, encoding: Encoding) -> dict[str, np.ndarray]:
    """Where signals lie, as far as masks and lengths do not say it."""
    columns = {}
    for name, policy, rows, used in (
        ("logit", encoding.logit_positions, placed.logit_rows, encoding.stores_logits),
        ("hidden", encoding.hidden_positions, placed.hidden_rows, bool(encoding.hidden)),
    ):
        if used and 0 < extra_share(policy) < 1:
            counts, positions = per_sequence(placed.lengths, rows)
            columns[f"{name}_position_counts"] = counts
            columns[f"{name}_positions"] = positions
    return columns


def _pick(values_ND: torch.Tensor, rows: np.ndarray, wanted: np.ndarray) -> torch.Tensor:
    """Rows of ``values_ND`` at the token indices ``wanted``, a subset of ``rows``."""
    if len(wanted) == len(rows):
        return values_ND
    index = torch.from_numpy(np.searchsorted(rows, wanted)).to(values_ND.device)
    return values_ND.index_select(0, index)


def hidden_states(
    teacher: Teacher,
    placed: SignalBlock,
    encoding: Encoding,
    layers: tuple[int, ...],
    batch_tokens: int,
    rows: np.ndarray,
) -> list[torch.Tensor]:
    """Hidden states of the listed layers at the flat token indices ``rows``, float32 [N, D].

    Raises:
        UserError: They are not finite.
    """
    lengths = placed.lengths
    # Where each signal position lands in the block's result; -1 marks the other tokens.
    target = torch.full((int(lengths.sum()),), -1, dtype=torch.int64)
    target[torch.from_numpy(rows)] = torch.arange(len(rows))
    target = target.to(teacher.device)
    results = [torch.empty(len(rows), teacher.width, device=teacher.device) for _ in layers]
    ids = torch.from_numpy(placed.block.input_ids.astype(np.int64)).to(teacher.device)
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
    for layer, result in zip(layers, results, strict=True):
        _check_finite(result, layer, "try --set dtype=float32, or check the checkpoint")
    return results


def _check_finite(hidden_ND: torch.Tensor, layer: int, remedy: str) -> None:
    # NaN spreads from one position to its whole sequence and would be stored as some code.
    if not bool(hidden_ND.isfinite().all()):
        raise UserError(
            f"teacher: hidden states of layer {layer} must be finite, got inf or nan; {remedy}"
        )


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


def _hidden_column(
    stored: HiddenEncoding, hidden_ND: torch.Tensor, codecs: Mapping[int, HiddenCodec]
) -> tuple[np.ndarray, int]:
    if stored.dtype == "coded":
        planes, clipped = codecs[stored.layer].encode(hidden_ND)
        return planes.cpu().numpy(), int(clipped)
    raw = hidden_ND.to(getattr(torch, stored.dtype))
    _check_finite(raw, stored.layer, "use --set cache.hidden_dtype=float32 (or coded)")
    return raw.cpu().numpy(), 0
