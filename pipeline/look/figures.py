"""Sizes of a cache's columns, and histograms of its signals.

Shapes: ``N`` positions, ``K`` stored tokens, ``V`` vocabulary, ``D`` hidden width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distilcache.data.cache.cache import Cache
from distilcache.data.distribution import TopK
from distilcache.pipeline.look.sample import Sample
from distilcache.pipeline.look.teaching import Teaching, decode_hidden
from distilcache.pipeline.plan.size import column_bytes

ROW_CHUNK = 64
"""Positions whose full distributions exist at once."""
BINS = 16
MASKED = "at masked positions"


@dataclass(frozen=True, slots=True)
class Column:
    """Size of one column of the cache."""

    name: str
    raw_bytes: int
    """Before compression, of the whole cache."""
    stored_bytes: float
    """On disk: the cache's bytes, divided as in the measured blocks."""

    @property
    def ratio(self) -> float:
        """Stored over raw."""
        return self.stored_bytes / self.raw_bytes if self.raw_bytes else 0.0


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts between edges."""

    name: str
    unit: str
    edges: np.ndarray
    counts: np.ndarray
    mean: float
    median: float
    note: str = ""

    @classmethod
    def of(cls, name: str, unit: str, values: np.ndarray, note: str = "") -> "Histogram":
        """Histogram of finite values; integers get bins of integer width."""
        low, high = float(values.min()), float(values.max())
        if np.issubdtype(values.dtype, np.integer):
            width = max(1, -(-int(high - low + 1) // BINS))
            edges = np.arange(low, high + width + 1, width, dtype=np.float64)
        else:
            edges = np.linspace(
                low, high if high > low else low + 1e-6 * max(1, abs(low)), BINS + 1
            )
        counts = np.histogram(values, edges)[0]
        return cls(name, unit, edges, counts, float(values.mean()), float(np.median(values)), note)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {n: getattr(self, n) for n in ("name", "unit", "mean", "median", "note")}
        return {**plain, "edges": self.edges.tolist(), "counts": self.counts.tolist()}


def column_costs(cache: Cache, blocks: Sequence[int]) -> list[Column]:
    """Columns in order of their bytes on disk.

    A block is one compressed frame, so no column has a size of its own on disk. Each is compressed
    alone, as the frame cuts it, and the cache's bytes are divided in these proportions.
    """
    packed: dict[str, int] = {}
    for block in blocks:
        for name, size in column_bytes(cache.read_block(block), cache.encoding).items():
            packed[name] = packed.get(name, 0) + size
    whole = sum(packed.values()) or 1
    totals = cache.manifest.totals
    columns = [
        Column(name, size, packed.get(name, 0) / whole * totals["bytes"])
        for name, size in totals["column_bytes"].items()
    ]
    return sorted(columns, key=lambda c: (-c.stored_bytes, c.name))


def read_lengths(cache: Cache, blocks: Sequence[int]) -> np.ndarray:
    """Tokens of every sequence of some blocks."""
    return np.concatenate([cache.read_block(block)["lengths"] for block in blocks]).astype(int)


def signal_histograms(
    cache: Cache, teaching: Teaching, samples: Sequence[Sample], temperatures: Sequence[float]
) -> list[Histogram]:
    """Entropy of the teacher and mass of its stored tokens, both at masked positions; norms."""
    found = []
    for temperature in temperatures:
        spread = [spread_of(teaching, sample, temperature) for sample in samples]
        entropies = _joined([entropy for entropy, _ in spread if entropy is not None])
        masses = _joined([mass for _, mass in spread if mass is not None])
        at = f"T = {temperature:g}"
        if len(entropies):
            note = MASKED if teaching.replays else f"{MASKED}, at least: all other tokens as one"
            found.append(Histogram.of(f"entropy of the teacher at {at}", "nats", entropies, note))
        if len(masses):
            found.append(Histogram.of(f"mass of the stored tokens at {at}", "", masses, MASKED))
    for hidden in cache.encoding.hidden:
        decoder = cache.teacher.hidden_decoder(hidden.layer)
        with torch.no_grad():
            norms = [decode_hidden(decoder, s.signals[hidden.column]).norm(dim=-1) for s in samples]
        values = _joined(norms)
        if len(values):
            found.append(Histogram.of(f"norm of hidden states, layer {hidden.layer}", "", values))
    return found


def spread_of(
    teaching: Teaching, sample: Sample, temperature: float
) -> tuple[Tensor | None, Tensor | None]:
    """Entropy [M] of the teacher, and mass [M] of the stored tokens; None where not known.

    Of the masked positions alone: others may hold no logits, and the teacher sees their tokens.
    """
    masked_N = np.isin(sample.positions, sample.masked)
    stored = teaching.stored(sample)[masked_N]
    with_topk = bool(stored.ids_NK.shape[1])
    hidden_ND = teaching.hidden(sample)
    if hidden_ND is None:
        if not with_topk or temperature not in teaching.temperatures:
            return None, None
        log_p_NK, log_tail_N = teaching.topk_log_probs(stored, temperature)
        return bucket_entropy(log_p_NK, log_tail_N), 1 - log_tail_N.exp()
    hidden_ND = hidden_ND[masked_N]
    entropies, masses = [], []
    for part in chunks(len(hidden_ND)):
        own = stored[part]
        log_p_NV = teaching.log_probs(teaching.replayed(hidden_ND[part]), own, temperature)
        entropies.append(entropy_of(log_p_NV))
        masses.append(mass_of(log_p_NV, own))
    return torch.cat(entropies), torch.cat(masses) if with_topk else None


def chunks(count: int) -> Iterator[slice]:
    """Slices of at most ``ROW_CHUNK`` rows; one empty slice for no rows."""
    return (slice(i, i + ROW_CHUNK) for i in range(0, max(count, 1), ROW_CHUNK))


def entropy_of(log_p_NV: Tensor) -> Tensor:
    """``-sum_v p log p``, [N]."""
    entropy_N: Tensor = torch.special.entr(log_p_NV.exp()).sum(-1)
    return entropy_N


def bucket_entropy(log_p_NK: Tensor, log_tail_N: Tensor) -> Tensor:
    """Entropy of the stored tokens and one bucket for all others: a lower bound."""
    rest_N: Tensor = torch.special.entr(log_tail_N.exp())
    return entropy_of(log_p_NK) + rest_N


def mass_of(log_p_NV: Tensor, stored: TopK) -> Tensor:
    """Probability of all stored tokens together, [N]; padding counts as 0."""
    p_NK = log_p_NV.gather(-1, stored.ids_NK).exp()
    return p_NK.masked_fill(stored.values_NK.isneginf(), 0.0).sum(-1)


def _joined(parts: list[Tensor]) -> np.ndarray:
    values: np.ndarray = torch.cat(parts).numpy() if parts else np.zeros(0)
    return values
