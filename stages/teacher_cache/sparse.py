"""What is kept of the teacher's logits: the largest, their odds, and unbiased draws.

Shapes: ``N`` logit positions of a block, ``K`` stored logits, ``R`` draws, ``V`` vocabulary,
``D`` hidden width.
"""

from dataclasses import replace

import numpy as np
import torch

from data.codecs.draws import residual_draws
from data.codecs.hidden import HiddenCodec
from data.codecs.logits import LogitSignals, head_log_probs, pack, sparsify, unpack
from data.codecs.replay import corrected_log_probs
from data.positions import random_units
from data.schema import Encoding
from stages.teacher_cache.adapters import Teacher

REFINED_TOKENS = 64
"""Stored tokens per position up to which their logits are computed again in float32."""


def logit_columns(
    teacher: Teacher,
    hidden_ND: torch.Tensor,
    encoding: Encoding,
    codec: HiddenCodec | None,
    key: tuple[int, int, int],
    row_chunk: int,
) -> dict[str, np.ndarray]:
    """Logit columns of a block from the hidden states at its logit positions.

    Args:
        teacher: Its LM head is run here, ``row_chunk`` rows at a time.
        hidden_ND: Last hidden states, float32.
        encoding: What is stored.
        codec: The codec of the last layer; None where its hidden states are not coded.
        key: Names the random words of the block.
        row_chunk: Rows per pass.
    """
    tail_N = _uniforms(key, "tail", len(hidden_ND), hidden_ND.device)
    residual_N2 = _uniforms(key, "residual", 2 * len(hidden_ND), hidden_ND.device).reshape(-1, 2)
    parts = [
        _chunk_columns(teacher, rows, encoding, codec, tail, residual)
        for rows, tail, residual in zip(
            torch.split(hidden_ND, row_chunk),
            torch.split(tail_N, row_chunk),
            torch.split(residual_N2, row_chunk),
            strict=True,
        )
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _uniforms(
    key: tuple[int, int, int], stream: str, count: int, device: torch.device
) -> torch.Tensor:
    return torch.from_numpy(random_units(*key, stream, count)).to(device)


def _chunk_columns(
    teacher: Teacher,
    hidden_ND: torch.Tensor,
    encoding: Encoding,
    codec: HiddenCodec | None,
    tail_N: torch.Tensor,
    residual_N2: torch.Tensor,
) -> dict[str, np.ndarray]:
    temperatures = (1.0, *encoding.temperatures)
    # Where all or most is stored, and where a small difference is, the head runs in float32.
    precise = encoding.top_k > REFINED_TOKENS or encoding.residual_samples > 0
    logits_NV = teacher.head(hidden_ND) if precise else teacher.logits(hidden_ND)
    kept = sparsify(
        logits_NV,
        encoding.top_k,
        temperatures,
        top_p=encoding.top_p,
        tail_samples=encoding.tail_samples,
        sample_temperature=encoding.sample_temperature,
        uniforms_N=tail_N,
    )
    if logits_NV.dtype != torch.float32 and encoding.top_k:
        kept = _refined(kept, teacher.head.logits_at(hidden_ND, kept.ids), temperatures)
    columns = pack(kept, encoding.token_dtype, encoding.logits_dtype, encoding.top_p < 1)
    if encoding.residual_samples:
        log_p_NV = (logits_NV.float() / encoding.sample_temperature).log_softmax(-1)
        log_q_NV = _replayed(teacher, hidden_ND, columns, encoding, codec)
        ids_NR, mass_N = residual_draws(log_p_NV, log_q_NV, encoding.residual_samples, residual_N2)
        columns["residual_ids"] = ids_NR.cpu().numpy().astype(encoding.token_dtype)
        columns["residual_mass"] = mass_N.cpu().numpy().astype(np.float16)
    return columns


def _refined(
    kept: LogitSignals, values_NK: torch.Tensor, temperatures: tuple[float, ...]
) -> LogitSignals:
    """Put float32 values in place of those of a shorter type, whose rounding shifts p by per cents.

    The mass outside the stored tokens is a sum of thousands, whose roundings average out.
    """
    values_NK = values_NK.masked_fill(kept.values.isneginf(), float("-inf"))
    shift = [
        torch.logsumexp(values_NK / t, -1) - torch.logsumexp(kept.values / t, -1)
        for t in temperatures
    ]
    # Close neighbours may have changed places.
    values_NK, order_NK = values_NK.sort(-1, descending=True)
    return replace(
        kept,
        ids=kept.ids.gather(-1, order_NK),
        values=values_NK,
        log_odds=kept.log_odds + torch.stack(shift, -1),
    )


def _replayed(
    teacher: Teacher,
    hidden_ND: torch.Tensor,
    columns: dict[str, np.ndarray],
    encoding: Encoding,
    codec: HiddenCodec | None,
) -> torch.Tensor:
    """Log of the distribution that stage two replays from what is stored, [N, V]."""
    stored = encoding.hidden_layer()
    assert stored is not None, "residuals need stored hidden states"
    temperature = encoding.sample_temperature
    if codec is None:
        logits_NV = teacher.head(hidden_ND.to(getattr(torch, stored.dtype)).float())
    else:
        logits_NV = teacher.head(codec.decode(codec.encode(hidden_ND)[0]))
        bias_V = codec.bias_at(temperature)
        if bias_V is not None:
            logits_NV += bias_V.to(logits_NV.device)
    kept = unpack(columns, encoding.top_k, 1 + len(encoding.temperatures))
    device = logits_NV.device
    values_NK, odds_NS = (torch.from_numpy(x).to(device) for x in (kept.values, kept.log_odds))
    ids_NK = torch.from_numpy(kept.ids.astype(np.int64)).to(device)
    column = (1.0, *encoding.temperatures).index(temperature)
    log_p_NK, log_tail_N = head_log_probs(values_NK, odds_NS[:, column], temperature)
    return corrected_log_probs(logits_NV.div_(temperature), ids_NK, log_p_NK, log_tail_N)
