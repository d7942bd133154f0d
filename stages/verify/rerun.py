"""Run the cache's own teacher again on a few blocks and compare its signals with the stored ones.

Checksums show that a cache is what was written; this shows that what was written is right. Of stage
one only the teacher itself is used: masks, positions and signals are read from the blocks,
sequences run in plain padded batches, and every figure is computed over the full vocabulary in
float32.

Shapes: ``T`` tokens of a block, ``N`` positions, ``K`` stored tokens, ``V`` vocabulary, ``D``
hidden width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from distilcache.data.cache.cache import Cache
from distilcache.data.codecs.hidden import HiddenDecoder
from distilcache.data.codecs.logits import topk_log_probs, unpack
from distilcache.data.codecs.relations import relation_kl
from distilcache.data.errors import UserError, require
from distilcache.data.masks.positions import flat_rows
from distilcache.stages.models.device import resolve_device, room_for, settle
from distilcache.stages.models.families import shape_of
from distilcache.stages.models.relations import RelationTap
from distilcache.stages.teacher_cache.teacher import Teacher, load_teacher
from distilcache.stages.verify.limits import Row, Totals, rows_of

BATCH_TOKENS = 8192
"""Tokens per teacher batch, padding included."""
RELATION_TOKENS = 1024
"""Tokens, padding included, whose relations exist at a time."""
ROW_CHUNK = 256
"""Positions per pass of the LM head: three times so many rows of the vocabulary exist at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RerunSettings:
    """Which blocks are run again, and the limits."""

    blocks: int = 4
    """How many blocks, drawn at random."""
    seed: int = 0
    """Of the draw."""
    device: str = "auto"
    limits: Mapping[str, float] = field(default_factory=dict)
    """Of ``kl``, ``cosine``, ``top1`` or ``logit_error``; they replace those of the encoding."""
    progress: Callable[[int], Any] = lambda blocks: None


@room_for("verify: the teacher and a batch", "leave --rerun out")
def rerun(cache: Cache, settings: RerunSettings) -> list[Row]:
    """Compare stored and fresh signals of random blocks; one row per figure.

    Raises:
        UserError: The cache holds no signals, or its teacher cannot be loaded.
    """
    require(
        not cache.encoding.mask_only,
        f"verify: --rerun must have a teacher, got the mask-only cache {cache.path}; leave it out",
    )
    require(
        bool(cache.encoding.states) or cache.encoding.top_k > 0,
        f"verify: --rerun must find hidden states or stored logits, got {cache.path} with only "
        "random draws, of which no single one can be wrong; leave it out",
    )
    identity = cache.manifest.provenance["identity"]
    require(
        cache.num_teachers == 1,
        f"verify: --rerun must have the whole teacher, got {cache.path} of an ensemble of "
        f"{cache.num_teachers}, of which a cache keeps only the first; leave it out",
    )
    cache.teacher.check()
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(str(identity.get("dtype")))
    if dtype is None:
        raise UserError(
            f"verify: dtype of the cache must be float32 or bfloat16, got {identity.get('dtype')!r}"
        )
    where = resolve_device(settings.device)
    settle(where)
    teacher = load_teacher(str(cache.teacher_dir), where, dtype)
    if (relation := cache.encoding.relation) is not None:
        tap = RelationTap(teacher.model, relation.layer, "cache: relation_layer")
        teacher = replace(teacher, relation=tap)
    chosen = np.random.default_rng(settings.seed).permutation(cache.num_blocks)[: settings.blocks]
    totals = Totals(cache.encoding)
    for block in np.sort(chosen).tolist():
        _compare(cache, teacher, cache.read_block(block), totals)
        settings.progress(1)
    return rows_of(totals, identity, settings.limits)


@torch.no_grad()
def _compare(
    cache: Cache, teacher: Teacher, columns: Mapping[str, np.ndarray], totals: Totals
) -> None:
    """Add one block to the totals."""
    encoding = cache.encoding
    layers = sorted({*(h.layer for h in encoding.hidden), teacher.num_layers})
    rows = {}
    if encoding.hidden:
        rows["hidden"] = _rows(columns, "hidden", encoding.hidden_positions)
    if encoding.top_k:
        rows["logit"] = _rows(columns, "logit", encoding.logit_positions)
    if not rows:  # Relations alone: they are of all tokens.
        rows["masked"] = _rows(columns, "masked", "masked")
    # One policy's positions always contain the other's.
    every = max(rows.values(), key=len)
    states, read_TD = _states(teacher, columns, tuple(layers), every)
    fresh = dict(zip(layers, states, strict=True))
    if read_TD is not None:
        _relations(cache, teacher, columns, read_TD, totals)
    own = {
        name: torch.from_numpy(np.searchsorted(every, some)).to(teacher.device)
        for name, some in rows.items()
    }
    for stored in encoding.hidden:
        decoder = cache.teacher.hidden_decoder(stored.layer).to(teacher.device)
        true_ND = fresh[stored.layer][own["hidden"]]
        stored_ND, again_ND = _decoded(decoder, columns, true_ND, None, totals)
        cosines = [functional.cosine_similarity(true_ND, x, -1) for x in (stored_ND, again_ND)]
        totals.add_cosines(stored.layer, *cosines)
        if stored.layer == teacher.num_layers:
            _distributions(teacher, decoder, (true_ND, stored_ND, again_ND), totals)
    if encoding.top_k:
        _stored_logits(teacher, columns, fresh[teacher.num_layers][own["logit"]], totals)


def _states(
    teacher: Teacher, columns: Mapping[str, np.ndarray], layers: tuple[int, ...], rows: np.ndarray
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Hidden states of the listed layers at some tokens of a block (``rows``), float32 [N, D].

    Also what the relation layer reads at all tokens, [T, D], where the teacher has one.
    """
    lengths = columns["lengths"].astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    ids = columns["input_ids"].astype(np.int64)
    parts: list[list[torch.Tensor]] = []
    read: list[torch.Tensor] = []
    tap = teacher.relation
    for first, last in _batches(lengths):
        own = lengths[first:last]
        stop = starts[first] + own.sum()
        present_BL = np.arange(own.max()) < own[:, None]
        ids_BL = np.zeros(present_BL.shape, np.int64)
        ids_BL[present_BL] = ids[starts[first] : stop]
        place_T = np.flatnonzero(present_BL)
        wanted = rows[(rows >= starts[first]) & (rows < stop)] - starts[first]
        ids_there, mask, chosen = (
            torch.from_numpy(x).to(teacher.device) for x in (ids_BL, present_BL, place_T[wanted])
        )
        padding = None if present_BL.all() else mask
        with tap or nullcontext():
            states = teacher.encode(ids_there, padding, layers, chosen)
        parts.append([state.float() for state in states])
        if tap is not None:
            read.append(tap.read().float()[mask])
    return [torch.cat(states) for states in zip(*parts, strict=True)], (
        torch.cat(read) if read else None
    )


def _batches(lengths: np.ndarray, most: int = BATCH_TOKENS) -> Iterator[tuple[int, int]]:
    """First and last sequence of each batch of at most so many tokens."""
    first = 0
    for last in range(1, len(lengths) + 1):
        if last == len(lengths) or (last + 1 - first) * lengths[first : last + 1].max() > most:
            yield first, last
            first = last


def _rows(columns: Mapping[str, np.ndarray], signal: str, policy: str) -> np.ndarray:
    """Tokens of a block that carry a signal, ascending, int64 [N]."""
    if policy == "all":
        return np.arange(len(columns["input_ids"]))
    names = [f"{signal}_position_counts", f"{signal}_positions"]
    if policy == "masked":
        names = ["masked_counts", "masked_positions"]
    return flat_rows(columns["lengths"], columns[names[0]], columns[names[1]]).astype(np.int64)


def _decoded(
    decoder: HiddenDecoder,
    columns: Mapping[str, np.ndarray],
    fresh_ND: torch.Tensor,
    embedded_NE: torch.Tensor | None,
    totals: Totals,
) -> tuple[torch.Tensor, torch.Tensor]:
    """States as stored, and the fresh ones after the same encoding, float32 [N, D]."""
    flat = torch.from_numpy(columns[decoder.name].copy()).to(fresh_ND.device)
    if decoder.codec is None:
        stored = flat.reshape(fresh_ND.shape)
        return stored.float(), fresh_ND.to(stored.dtype).float()
    codec = decoder.codec
    planes_GN = flat.reshape(codec.packing.planes, len(fresh_ND))
    again_GN, _ = codec.encode(fresh_ND, embedded_NE)
    table = codec.packing.table(fresh_ND.device)
    same = table.unpack(planes_GN) == table.unpack(again_GN)
    totals.add("codes", same.double().sum(), same.numel())
    return codec.decode(planes_GN, embedded_NE), codec.decode(again_GN, embedded_NE)


def _relations(
    cache: Cache,
    teacher: Teacher,
    columns: Mapping[str, np.ndarray],
    read_TD: torch.Tensor,
    totals: Totals,
) -> None:
    """Compare stored with fresh relations, in the teacher's heads."""
    decoder = cache.teacher.relations().to(teacher.device)
    ids_T = torch.from_numpy(columns["input_ids"].astype(np.int64)).to(teacher.device)
    embedded_TE = None if decoder.codec is None else decoder.embeddings[ids_T]
    decoded = _decoded(decoder, columns, read_TD, embedded_TE, totals)
    lengths = columns["lengths"].astype(np.int64)
    ends = np.cumsum(lengths)
    heads = shape_of(teacher.model.config).heads
    for first, last in _batches(lengths, RELATION_TOKENS):
        own = slice(ends[first] - lengths[first], ends[last - 1])
        cuts = lengths[first:last].tolist()
        true_RBLP, *others = (
            decoder.maps(pad_sequence(list(torch.split(x[own], cuts)), batch_first=True))
            for x in (read_TD, *decoded)
        )
        places = np.arange(true_RBLP.shape[2]) < lengths[first:last, None]
        present_BL = torch.from_numpy(places).to(teacher.device)
        for kind, other_RBLP in zip(("", "again "), others, strict=True):
            kl_RA = relation_kl(true_RBLP, other_RBLP, heads, present_BL)
            totals.add(f"{kind}relation kl", kl_RA.mean(), sum(cuts))


def _distributions(
    teacher: Teacher,
    decoder: HiddenDecoder,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    totals: Totals,
) -> None:
    """Compare replayed with fresh distributions: KL per temperature, and the likeliest token."""
    for chunk in zip(*(torch.split(x, ROW_CHUNK) for x in states), strict=True):
        true_NV, stored_NV, again_NV = (teacher.lm_head(states_ND) for states_ND in chunk)
        for number, temperature in enumerate(totals.temperatures):
            bias_V = decoder.codec.bias_at(temperature) if decoder.codec else None
            log_p_NV = (true_NV / temperature).log_softmax(-1)
            for kind, logits_NV in (("", stored_NV), ("again ", again_NV)):
                logits_NV = logits_NV if bias_V is None else logits_NV + bias_V.to(true_NV.device)
                log_q_NV = (logits_NV / temperature).log_softmax(-1)
                kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
                totals.add(f"{kind}kl {temperature:g}", kl_N.double().sum(), len(kl_N))
                if number == 0:
                    same_N = true_NV.argmax(-1) == logits_NV.argmax(-1)
                    totals.add(f"{kind}top1", same_N.double().sum(), len(same_N))


def _stored_logits(
    teacher: Teacher, columns: Mapping[str, np.ndarray], hidden_ND: torch.Tensor, totals: Totals
) -> None:
    """Compare stored with fresh logits, and the probability stored for all other tokens."""
    encoding, device = totals.encoding, hidden_ND.device
    stored = unpack(columns, encoding.top_k, 1 + len(encoding.temperatures))
    totals.add_rounding(stored, columns)
    values, odds = (torch.from_numpy(x.copy()) for x in (stored.values, stored.log_odds))
    ids = torch.from_numpy(stored.ids.astype(np.int64))
    for start in range(0, len(values), ROW_CHUNK):
        cut = slice(start, start + ROW_CHUNK)
        values_NK, odds_NS, ids_NK = (x[cut].to(device) for x in (values, odds, ids))
        there_NK = ~values_NK.isneginf()
        logits_NV = teacher.lm_head(hidden_ND[cut])
        gap = (logits_NV.gather(-1, ids_NK) - values_NK)[there_NK].abs()
        totals.add("logit error", gap.double().sum(), gap.numel())
        totals.largest("largest logit error", gap)
        for temperature in totals.temperatures:
            log_p_NV = (logits_NV / temperature).log_softmax(-1)
            true_NK = log_p_NV.gather(-1, ids_NK).masked_fill(~there_NK, float("-inf"))
            rest_NV = log_p_NV.scatter_reduce(
                1, ids_NK, torch.where(there_NK, float("-inf"), float("inf")), "amin"
            )
            stored_NK, stored_tail_N = topk_log_probs(
                values_NK, odds_NS[:, totals.column(temperature)], temperature
            )
            kl_N = _term(true_NK, stored_NK).sum(-1) + _term(rest_NV.logsumexp(-1), stored_tail_N)
            totals.add(f"logits kl {temperature:g}", kl_N.double().sum(), len(kl_N))


def _term(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """``p (log p - log q)``, 0 where p is 0; two -inf make no difference."""
    floor = torch.finfo(log_p.dtype).min / 4
    return log_p.exp() * (log_p.clamp(min=floor) - log_q.clamp(min=floor))
