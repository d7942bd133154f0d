"""The teacher's signals at chosen positions of a block, as columns of the cache format.

:func:`block_signals` runs on the device: the encoder, the LM head and the codecs. It never waits
for a value. :func:`block_columns` runs on the host: checks, and the types of the format.

Shapes: ``N`` signal positions of a block, ``T`` its tokens, ``V`` vocabulary, ``D`` hidden width,
``E`` width of the word embeddings.
"""

from collections.abc import Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class BlockStates:
    """The teacher's states of one block, on its device."""

    hidden: list[torch.Tensor]
    """Of the listed layers at the signal positions, float32 [N, D]."""
    read: torch.Tensor | None = None
    """What the relation layer reads at all tokens, float32 [T, D]."""
    embedded: torch.Tensor | None = None
    """The tokens' word embeddings, [T, E]."""


def block_states(teacher: AnyTeacher, inputs: BlockInputs, layers: tuple[int, ...]) -> BlockStates:
    """Run the teacher over a block: hidden states of some layers, and the relation layer's."""
    parts: list[list[torch.Tensor]] = []
    read: list[torch.Tensor] = []
    tokens: list[torch.Tensor] = []
    tap = teacher.relation
    for batch in inputs.batches:
        ids, attention, rows, present = (
            _on(x, teacher.device)
            for x in (batch.ids_BL, batch.attention_BL, batch.rows_N, batch.tokens_T)
        )
        assert ids is not None
        if tap is None:
            parts.append(teacher.encode(ids, attention, layers, rows, batch.most))
            continue
        with tap:
            parts.append(teacher.encode(ids, attention, layers, rows, batch.most))
        read.append(_pick(tap.read().flatten(0, 1), present))
        tokens.append(_pick(ids.flatten(), present))
    order, order_T = (_on(x, teacher.device) for x in (inputs.order_N, inputs.order_T))
    hidden = [_pick(torch.cat(states).float(), order) for states in zip(*parts, strict=True)]
    if tap is None:
        return BlockStates(hidden)
    ids_T = _pick(torch.cat(tokens), order_T)
    return BlockStates(hidden, _pick(torch.cat(read).float(), order_T), tap.embedded(ids_T))


def block_signals(
    teacher: AnyTeacher,
    inputs: BlockInputs,
    encoding: Encoding,
    codecs: Mapping[str, HiddenCodec],
    row_chunk: int,
) -> dict[str, torch.Tensor]:
    """Run the teacher over one masked block.

    The LM head runs on signal positions only, ``row_chunk`` at a time, and not at all where no
    logits are stored.

    Returns:
        Tensors on the device for :func:`block_columns`.
    """
    layers = _layers(encoding)
    found = block_states(teacher, inputs, layers)
    states = dict(zip(layers, found.hidden, strict=True))
    every = [*found.hidden, *([] if found.read is None else [found.read])]
    signals = {"finite": torch.stack([_finite(values) for values in every])}
    if encoding.stores_logits:
        index, tail, residual = (
            _on(x, teacher.device) for x in (inputs.logit_index, inputs.tail_N, inputs.residual_N2)
        )
        signals |= logit_signals(
            teacher,
            _pick(states[teacher.num_layers], index),
            encoding,
            codecs.get(f"hidden_{teacher.num_layers}"),
            tail,
            residual,
            row_chunk,
        )
    index = _on(inputs.hidden_index, teacher.device)
    clipped, in_range = [], []
    for stored in encoding.states:
        if stored is encoding.relation:
            assert found.read is not None, "the teacher has a tap"
            values, embedded = found.read, found.embedded
        else:
            values, embedded = _pick(states[stored.layer], index), None
        if stored.dtype == "coded":
            signals[stored.column], codes = codecs[stored.column].encode(values, embedded)
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
    relation = [encoding.relation.layer - 1] if encoding.relation else []
    layers = (*_layers(encoding), *relation)
    for layer, finite in zip(layers, signals["finite"].tolist(), strict=True):
        check_finite(finite, layer)
    if "in_range" in signals:
        raw = [h.layer for h in encoding.states if h.dtype != "coded"]
        for layer, finite in zip(raw, signals["in_range"].tolist(), strict=True):
            check_finite(finite, layer, "use --set cache.hidden_dtype=float32 (or coded)")
    columns = _position_columns(placed, encoding)
    if encoding.stores_logits:
        columns |= logit_columns(signals, encoding)
    columns |= {h.column: signals[h.column].numpy() for h in encoding.states}
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
