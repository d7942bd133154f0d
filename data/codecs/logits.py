"""Stored logits: the K largest of a position, the mass of all others, and draws from these.

Values are logits, not probabilities, so the temperature is chosen at stage two. The mass of the
stored tokens is one number per temperature, its log odds

    log_odds_T = log sum_{k stored} exp(z_k / T) - log sum_{v not stored} exp(z_v / T),

with a sum of its own for each, since ``1 - sum p`` would lose precision. With ``log_topk =
logsigmoid(log_odds)`` and ``log_tail = logsigmoid(-log_odds)`` the distribution at T is

    log p_k = value_k / T - logsumexp_k(value / T) + log_topk.

With the tail it sums to one, however values and odds were rounded.

Shapes: ``N`` positions, ``K`` stored tokens, ``R`` draws, ``V`` vocabulary, ``S`` temperatures.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from distilcache.data.codecs.sparsify import LogitSignals
from distilcache.data.errors import UserError

CODE_MAX = 255


def topk_log_probs(
    values_NK: Tensor, log_odds_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Teacher distribution over the stored tokens, and the mass outside them.

        log p_k  = value_k / T - logsumexp_k(value / T) + logsigmoid(log_odds)
        log_tail = logsigmoid(-log_odds)

    Args:
        values_NK: Stored raw logits, -inf in padding.
        log_odds_N: Log odds of the stored tokens at T.
        temperature: T.

    Returns:
        ``log_p_NK``, -inf in padding, and ``log_tail_N``, -inf if there is no other mass. Their
        exponentials sum to one. A row of padding only has ``log_tail`` 0, whatever its odds.
    """
    empty_N = values_NK.isneginf().all(-1)
    odds_N = log_odds_N.masked_fill(empty_N, float("-inf"))
    # In rows of padding only, log_softmax would give nan.
    scaled_NK = values_NK.masked_fill(empty_N[:, None], 0.0) / temperature
    log_p_NK = torch.log_softmax(scaled_NK, -1) + functional.logsigmoid(odds_N)[:, None]
    return log_p_NK, functional.logsigmoid(-odds_N)


def pack(
    signals: LogitSignals, token_dtype: np.dtype, dtype: str, adaptive: bool
) -> dict[str, np.ndarray]:
    """Columns of the cache format from device tensors.

    ``float32`` keeps every bit (the exact mode), ``float16`` 11 bits. ``uint8`` codes count steps
    down from the largest logit of the position: value = base - scale * code. Base and scale are
    rounded to float16 first, so the error is at most half a scale (plus the rounding of base,
    2^-11 of its size).

    Args:
        signals: What to store.
        token_dtype: Type of token ids.
        dtype: Type of the values.
        adaptive: Lengths differ: store them, and no padding.
    """
    lengths, values = signals.lengths.cpu().numpy(), signals.values.cpu().numpy()
    stored = np.arange(values.shape[1]) < lengths[:, None] if adaptive else ...
    columns = {"logit_lengths": lengths.astype(np.uint16)} if adaptive else {}
    if values.shape[1]:
        columns["logit_ids"] = signals.ids.cpu().numpy()[stored].astype(token_dtype)
        if dtype == "uint8":
            codes, base, scale = _codes(values, lengths)
            columns["logit_values"] = codes[stored]
            columns["logit_base"], columns["logit_scale"] = base, scale
        else:
            columns["logit_values"] = values[stored].astype(dtype)
    exact = dtype == "float32"
    columns["log_odds"] = signals.log_odds.cpu().numpy().astype("float32" if exact else "float16")
    if signals.tail_ids is not None:
        columns["tail_ids"] = signals.tail_ids.cpu().numpy().astype(token_dtype)
    return columns


def _codes(values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes uint8 [N, K] (undefined in padding), base and scale float16 [N]."""
    base = values[:, :1].astype(np.float16)
    smallest = np.take_along_axis(values, lengths[:, None] - 1, 1)
    span = np.maximum(base.astype(np.float32) - smallest, 1e-3)
    # Rounded up to the next float16, so that the smallest value needs no more than 255 steps.
    scale = np.nextafter((span / CODE_MAX).astype(np.float16), np.float16(np.inf))
    codes = np.rint((base.astype(np.float32) - values) / scale.astype(np.float32))
    return np.clip(codes, 0, CODE_MAX).astype(np.uint8), base[:, 0], scale[:, 0]


@dataclass(frozen=True, slots=True)
class StoredLogits:
    """Decoded columns of N positions, see ``LogitSignals``; ids have their type on disk."""

    lengths: np.ndarray
    """int64 [N]"""
    ids: np.ndarray
    """uint16/32 [N, K]; 0 beyond the length."""
    values: np.ndarray
    """float32 [N, K]; -inf beyond the length."""
    log_odds: np.ndarray
    """float32 [N, S]"""
    tail_ids: np.ndarray | None
    """uint16/32 [N, R]"""


def unpack(columns: Mapping[str, np.ndarray], top_k: int, num_temperatures: int) -> StoredLogits:
    """Inverse of ``pack``, also from flat columns; returns views of them if the type allows it.

    Args:
        columns: Columns of a block; other columns are ignored.
        top_k: K.
        num_temperatures: S.

    Raises:
        UserError: The sizes of the columns contradict each other.
    """
    try:
        odds = columns["log_odds"].reshape(-1, num_temperatures).astype(np.float32, copy=False)
        count = len(odds)
        ids, values = np.zeros((count, 0), np.uint16), np.zeros((count, 0), np.float32)
        lengths = np.full(count, top_k, np.int64)
        if "logit_lengths" in columns:
            lengths = columns["logit_lengths"].astype(np.int64)
        if top_k:
            ids, values = _unpack_topk(columns, lengths, top_k)
        drawn = columns.get("tail_ids")
        if drawn is not None:
            drawn = drawn.reshape(count, drawn.size // max(count, 1))
        if not count == len(lengths) == len(ids) == len(values):
            raise ValueError(f"{len(lengths)} positions, {len(ids)} of ids, {count} of odds")
    except (KeyError, ValueError) as error:
        raise UserError(f"cache: logit columns must fit each other, got: {error}") from None
    return StoredLogits(lengths, ids, values, odds, drawn)


def _unpack_topk(
    columns: Mapping[str, np.ndarray], lengths: np.ndarray, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and values [N, K] from flat columns."""
    ids, values = columns["logit_ids"], columns["logit_values"]
    coded = values.dtype == np.uint8
    if "logit_lengths" in columns:
        present = np.arange(top_k) < lengths[:, None]
        # Checked first, since a single value would be assigned to the whole mask.
        if not present.sum() == lengths.sum() == len(ids) == len(values):
            raise ValueError(f"lengths of {lengths.sum()} in all for {len(ids)} ids")
        padded = np.zeros(present.shape, ids.dtype)
        padded[present], ids = ids, padded
        # Codes count down from the base, so that padding becomes -inf in both cases.
        padded = np.full(present.shape, np.inf if coded else -np.inf, np.float32)
        padded[present], values = values, padded
    ids, values = ids.reshape(-1, top_k), values.reshape(-1, top_k).astype(np.float32, copy=False)
    if coded:
        base, scale = (
            columns[name].astype(np.float32).reshape(len(values), 1)
            for name in ("logit_base", "logit_scale")
        )
        values = base - scale * values
    return ids, values
