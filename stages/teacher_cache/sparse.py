"""The parts of the teacher's logits that are stored: the largest, their odds, and unbiased draws.

Shapes: ``N`` logit positions of a block, ``K`` stored logits, ``R`` draws, ``V`` vocabulary,
``D`` hidden width.
"""

from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np
import torch

from distilcache.data.cache.schema import Encoding
from distilcache.data.codecs.draws import residual_draws
from distilcache.data.codecs.hidden import HiddenCodec
from distilcache.data.codecs.joined import corrected_log_probs
from distilcache.data.codecs.logits import pack, topk_log_probs, unpack
from distilcache.data.codecs.sparsify import LogitSignals, sparsify
from distilcache.stages.teacher_cache.ensemble import AnyTeacher
from distilcache.stages.teacher_cache.teacher import Teacher

REFINED_TOKENS = 64
"""Up to this many stored tokens per position, their logits are computed again in float32."""
KEPT = tuple(field.name for field in fields(LogitSignals))


def logit_signals(
    teacher: AnyTeacher,
    hidden_ND: torch.Tensor,
    encoding: Encoding,
    codec: HiddenCodec | None,
    tail_N: torch.Tensor | None,
    residual_N2: torch.Tensor | None,
    row_chunk: int,
) -> dict[str, torch.Tensor]:
    """The stored parts of a block's logits, from the last hidden states at its logit positions.

    Args:
        teacher: Its LM head is run here, ``row_chunk`` rows at a time.
        hidden_ND: Float32.
        encoding: What is stored.
        codec: The codec of the last layer; None where its hidden states are not coded.
        tail_N: Uniform numbers for the tail draws; None where there are none.
        residual_N2: Those for the residual draws.
        row_chunk: Rows per pass.

    Returns:
        Tensors for :func:`logit_columns`, on the device.
    """
    parts = []
    for start in range(0, max(1, len(hidden_ND)), row_chunk):
        part = slice(start, start + row_chunk)
        tail = None if tail_N is None else tail_N[part]
        residual = None if residual_N2 is None else residual_N2[part]
        parts.append(_chunk_signals(teacher, hidden_ND[part], encoding, codec, tail, residual))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def logit_columns(signals: Mapping[str, torch.Tensor], encoding: Encoding) -> dict[str, np.ndarray]:
    """Logit columns of the cache format from the tensors of :func:`logit_signals`."""
    kept = LogitSignals(**{name: signals.get(name) for name in KEPT})  # type: ignore[arg-type]
    columns = pack(kept, encoding.token_dtype, encoding.logits_dtype, encoding.top_p < 1)
    if encoding.residual_samples:
        columns["residual_ids"] = signals["residual_ids"].numpy().astype(encoding.token_dtype)
        columns["residual_mass"] = signals["residual_mass"].numpy().astype(np.float16)
    return columns


def _chunk_signals(
    teacher: AnyTeacher,
    hidden_ND: torch.Tensor,
    encoding: Encoding,
    codec: HiddenCodec | None,
    tail_N: torch.Tensor | None,
    residual_N2: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    temperatures = (1.0, *encoding.temperatures)
    # The LM head runs in float32 where most logits are stored, or their small differences.
    precise = encoding.top_k > REFINED_TOKENS or encoding.residual_samples > 0
    rows_ND = teacher.transform(hidden_ND)
    logits_NV = teacher.decode(rows_ND, precise)
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
        kept = _refined(kept, teacher.decode_at(rows_ND, kept.ids), temperatures)
    signals = {name: getattr(kept, name) for name in KEPT}
    if residual_N2 is not None:
        (replayed,) = teacher.members  # of several averaged teachers nothing is replayed
        log_p_NV = (logits_NV.float() / encoding.sample_temperature).log_softmax(-1)
        log_q_NV = _replayed(replayed, hidden_ND, kept, encoding, codec)
        ids_NR, mass_N = residual_draws(log_p_NV, log_q_NV, encoding.residual_samples, residual_N2)
        signals |= {"residual_ids": ids_NR, "residual_mass": mass_N}
    return {name: values for name, values in signals.items() if values is not None}


def _refined(
    kept: LogitSignals, values_NK: torch.Tensor, temperatures: tuple[float, ...]
) -> LogitSignals:
    """Replace values of a shorter type by float32: its rounding changes p by some per cent.

    The mass outside the stored tokens is a sum of thousands of terms, whose roundings average out.
    """
    values_NK = values_NK.masked_fill(kept.values.isneginf(), float("-inf"))
    shift = [
        torch.logsumexp(values_NK / t, -1) - torch.logsumexp(kept.values / t, -1)
        for t in temperatures
    ]
    # Values that were close may now be in another order.
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
    kept: LogitSignals,
    encoding: Encoding,
    codec: HiddenCodec | None,
) -> torch.Tensor:
    """Log of the distribution that stage two replays from the stored signals, [N, V].

    Only here the host waits for the device: ``pack`` rounds on the host.
    """
    stored = encoding.hidden_layer()
    assert stored is not None, "residuals need stored hidden states"
    temperature = encoding.sample_temperature
    if codec is None:
        logits_NV = teacher.lm_head(hidden_ND.to(getattr(torch, stored.dtype)).float())
    else:
        logits_NV = teacher.lm_head(codec.decode(codec.encode(hidden_ND)[0]))
        bias_V = codec.bias_at(temperature)
        if bias_V is not None:
            logits_NV += bias_V.to(logits_NV.device)
    columns = pack(kept, encoding.token_dtype, encoding.logits_dtype, encoding.top_p < 1)
    rounded = unpack(columns, encoding.top_k, 1 + len(encoding.temperatures))
    device = logits_NV.device
    values_NK, odds_NS = (
        torch.from_numpy(x).to(device) for x in (rounded.values, rounded.log_odds)
    )
    ids_NK = torch.from_numpy(rounded.ids.astype(np.int64)).to(device)
    column = (1.0, *encoding.temperatures).index(temperature)
    log_p_NK, log_tail_N = topk_log_probs(values_NK, odds_NS[:, column], temperature)
    return corrected_log_probs(logits_NV.div_(temperature), ids_NK, log_p_NK, log_tail_N)
