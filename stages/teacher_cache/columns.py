"""The teacher's signals at chosen positions of a block, as columns of the cache format.

:func:`block_signals` runs on the device: the encoder, the LM head and the codecs. It never waits
for a value. :func:`block_columns` runs on the host: checks, and the types of the format.

Shapes: ``N`` signal positions of a block, ``V`` vocabulary, ``D`` hidden width.
"""

from collections.abc import Mapping

import numpy as np
import torch

from distilcache.data.cache.schema import Encoding
from distilcache.data.codecs.hidden import HiddenCodec
from distilcache.data.errors import UserError
from distilcache.data.masks.masking import MaskedBlock
from distilcache.data.masks.positions import extra_fraction, per_sequence
from distilcache.stages.teacher_cache.batches import BlockInputs, SignalBlock
from distilcache.stages.teacher_cache.ensemble import AnyTeacher
from distilcache.stages.teacher_cache.sparse import logit_columns, logit_signals


def mask_columns(
    block: MaskedBlock, lengths: np.ndarray, encoding: Encoding
) -> dict[str, np.ndarray]:
    """The columns that every cache has, also one without a teacher."""
    dtype = encoding.token_dtype
    return {
        "lengths": lengths.astype(np.uint16),
        "input_ids": block.input_ids.astype(dtype, copy=False),
        "masked_counts": block.masked_counts,
        "masked_positions": block.masked_positions,
        "labels": block.labels.astype(dtype, copy=False),
    }


def hidden_states(
    teacher: AnyTeacher, inputs: BlockInputs, layers: tuple[int, ...]
) -> list[torch.Tensor]:
    """Hidden states of the listed layers at a block's signal positions, float32 [N, D]."""
    parts: list[list[torch.Tensor]] = []
    for batch in inputs.batches:
        ids, attention, rows = (
            _on(x, teacher.device) for x in (batch.ids_BL, batch.attention_BL, batch.rows_N)
        )
        assert ids is not None
        parts.append(teacher.encode(ids, attention, layers, rows, batch.most))
    order = _on(inputs.order_N, teacher.device)
    return [_pick(torch.cat(states).float(), order) for states in zip(*parts, strict=True)]


def block_signals(
    teacher: AnyTeacher,
    inputs: BlockInputs,
    encoding: Encoding,
    codecs: Mapping[int, HiddenCodec],
    row_chunk: int,
) -> dict[str, torch.Tensor]:
    """Run the teacher over one masked block.

    The LM head runs on signal positions only, ``row_chunk`` at a time, and not at all where no
    logits are stored.

    Returns:
        Tensors on the device for :func:`block_columns`.
    """
    layers = _layers(encoding)
    states = dict(zip(layers, hidden_states(teacher, inputs, layers), strict=True))
    signals = {"finite": torch.stack([_finite(values) for values in states.values()])}
    if encoding.stores_logits:
        index, tail, residual = (
            _on(x, teacher.device) for x in (inputs.logit_index, inputs.tail_N, inputs.residual_N2)
        )
        signals |= logit_signals(
            teacher,
            _pick(states[teacher.num_layers], index),
            encoding,
            codecs.get(teacher.num_layers),
            tail,
            residual,
            row_chunk,
        )
    index = _on(inputs.hidden_index, teacher.device)
    clipped, in_range = [], []
    for stored in encoding.hidden:
        values = _pick(states[stored.layer], index)
        if stored.dtype == "coded":
            signals[stored.column], codes = codecs[stored.layer].encode(values)
            clipped.append(codes)
        else:
            signals[stored.column] = values.to(getattr(torch, stored.dtype))
            in_range.append(_finite(signals[stored.column]))
    if clipped:
        signals["clipped"] = torch.stack(clipped).sum()
    if in_range:
        signals["in_range"] = torch.stack(in_range)
    return signals


def block_columns(
    placed: SignalBlock, encoding: Encoding, signals: Mapping[str, torch.Tensor]
) -> tuple[dict[str, np.ndarray], int]:
    """Signal columns of a block from the tensors of :func:`block_signals`, now on the host.

    Returns:
        Columns, and the number of hidden-state codes that left their range.

    Raises:
        UserError: The teacher's hidden states, or those stored in a shorter type, are not finite.
    """
    for layer, finite in zip(_layers(encoding), signals["finite"].tolist(), strict=True):
        check_finite(finite, layer)
    if "in_range" in signals:
        raw = [h.layer for h in encoding.hidden if h.dtype != "coded"]
        for layer, finite in zip(raw, signals["in_range"].tolist(), strict=True):
            check_finite(finite, layer, "use --set cache.hidden_dtype=float32 (or coded)")
    columns = _position_columns(placed, encoding)
    if encoding.stores_logits:
        columns |= logit_columns(signals, encoding)
    columns |= {h.column: signals[h.column].numpy() for h in encoding.hidden}
    return columns, int(signals.get("clipped", 0))


def _layers(encoding: Encoding) -> tuple[int, ...]:
    """Layers whose hidden states are needed: those that are stored, and the LM head's."""
    stored = [h.layer for h in encoding.hidden]
    last = [encoding.num_layers] if encoding.stores_logits else []
    return tuple(dict.fromkeys(stored + last))


def check_finite(
    finite: bool, layer: int, remedy: str = "try --set dtype=float32, or check the checkpoint"
) -> None:
    """Refuse hidden states that are not finite: they would be stored as some code."""
    if not finite:
        raise UserError(
            f"teacher: hidden states of layer {layer} must be finite, got inf or nan; {remedy}"
        )


def _finite(values_ND: torch.Tensor) -> torch.Tensor:
    """Whether all are finite, on the device."""
    return values_ND.isfinite().all()


def _position_columns(placed: SignalBlock, encoding: Encoding) -> dict[str, np.ndarray]:
    """Positions of signals that do not follow from masks and lengths."""
    columns = {}
    for name, policy, rows, used in (
        ("logit", encoding.logit_positions, placed.logit_rows, encoding.stores_logits),
        ("hidden", encoding.hidden_positions, placed.hidden_rows, bool(encoding.hidden)),
    ):
        if used and 0 < extra_fraction(policy) < 1:
            counts, positions = per_sequence(placed.lengths, rows)
            columns[f"{name}_position_counts"] = counts
            columns[f"{name}_positions"] = positions
    return columns


def _on(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Start the copy to the device."""
    return None if tensor is None else tensor.to(device, non_blocking=True)


def _pick(values_ND: torch.Tensor, index_N: torch.Tensor | None) -> torch.Tensor:
    return values_ND if index_N is None else values_ND.index_select(0, index_N)
