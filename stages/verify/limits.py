"""Figures of a rerun of the teacher, and how far each may differ.

The limits follow from how the cache was made. Coded states have a quality in nats; stored logits
round by a known amount. Cosine and top-1, and the KL of raw types, are compared with the fresh
signal after the cache's own encoding: the stored signal must be as good as one that is stored now.
Each limit also allows for the noise of the teacher's arithmetic on another device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distilcache.data.cache.schema import Encoding
from distilcache.data.codecs.logits import StoredLogits

QUALITY_ROOM = 5.0
"""Times the cache's quality, which is a mean over the calibration positions: other text and few
blocks differ."""
RAW_ROOM = 2.0
"""Times what rounding raw states costs now, which depends on how large they are."""
LOGITS_KL = 1e-3
"""Nats that rounding stored logits and log-odds may cost."""


@dataclass(frozen=True, slots=True)
class Noise:
    """How far two runs of one teacher may differ in one type of arithmetic."""

    kl: float
    cosine: float
    top1: float
    logit: float
    """Mean error as a fraction of the largest logit, or of 1 where that is smaller."""
    codes: float
    """Fraction of codes that may differ."""


NOISE = {
    "float32": Noise(1e-5, 1e-4, 0.005, 1e-4, 0.005),
    "bfloat16": Noise(1e-3, 2e-3, 0.02, 3e-3, 0.1),
}
"""For bfloat16 at least five times the measured difference from float32 (6-layer teacher, real
text: KL 4e-5 nats, cosine 1e-4, top-1 0.002, mean logit error 4.5e-4, codes 0.011)."""
LARGEST = 20.0
"""Times the mean logit error: the largest of thousands of errors."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of a rerun."""

    name: str
    value: float
    limit: float | None
    """None: shown, not checked."""
    at_most: bool = True
    """Whether the limit is an upper bound."""

    @property
    def passed(self) -> bool:
        """Whether the figure is within its limit; nan never is."""
        if self.limit is None:
            return True
        return self.value <= self.limit if self.at_most else self.value >= self.limit


class Totals:
    """Sums over the blocks of a rerun."""

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        self.temperatures = (*encoding.temperatures, 1.0)
        """The temperatures of the losses, then 1."""
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.peaks: dict[str, float] = {}

    def column(self, temperature: float) -> int:
        """Column of the stored log-odds at a temperature."""
        return (1.0, *self.encoding.temperatures).index(temperature)

    def add(self, name: str, total: torch.Tensor, count: int) -> None:
        """Add ``count`` values that sum to ``total``."""
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.counts[name] = self.counts.get(name, 0) + count

    def largest(self, name: str, values: torch.Tensor) -> None:
        """Keep the largest value; nan counts as larger than all."""
        found = float(values.max()) if values.numel() else 0.0
        self.peaks[name] = float(np.fmax(self.peaks.get(name, 0.0), np.nan_to_num(found, nan=1e30)))

    def add_cosines(self, layer: int, stored_N: torch.Tensor, again_N: torch.Tensor) -> None:
        """Add cosines of stored and of freshly encoded hidden states with the fresh ones."""
        self.add(f"cosine {layer}", stored_N.double().sum(), len(stored_N))
        self.add(f"again cosine {layer}", again_N.double().sum(), len(again_N))

    def add_rounding(self, stored: StoredLogits, columns: Mapping[str, np.ndarray]) -> None:
        """Note how far rounding alone may move the stored logits."""
        values = np.abs(stored.values[np.isfinite(stored.values)])
        top = float(values.max(initial=0.0))
        step = {"float32": 0.0, "float16": 2.0**-11, "uint8": 2.0**-11}
        rounding = top * step[self.encoding.logits_dtype]
        if "logit_scale" in columns:
            rounding += float(columns["logit_scale"].astype(np.float64).max(initial=0.0)) / 2
        for name, value in (("rounding", rounding), ("top", top)):
            self.peaks[name] = max(self.peaks.get(name, 0.0), value)

    def mean(self, name: str) -> float:
        """Mean of what was added."""
        count = self.counts.get(name, 0)
        return self.sums[name] / count if count else 0.0


def rows_of(totals: Totals, identity: Mapping[str, Any], given: Mapping[str, float]) -> list[Row]:
    """The figures with their limits, of which ``given`` replace those that are derived.

    ``identity``, of the cache's provenance, holds the quality that was asked for.
    """
    noise = NOISE[str(identity["dtype"])]
    rows = _replay_rows(totals, identity, noise, given)
    if "logit error" in totals.counts:
        top = max(1.0, totals.peaks["top"])
        allowed = totals.peaks["rounding"] + noise.logit * top
        limit = given.get("logit_error", allowed)
        rows.append(Row("stored logits, mean error", totals.mean("logit error"), limit))
        peak = totals.peaks["largest logit error"]
        limit = totals.peaks["rounding"] + LARGEST * noise.logit * top
        rows.append(Row("stored logits, largest error", peak, limit))
        rows += [
            Row(f"stored logits and tail, KL (nats), T = {t:g}", totals.mean(f"logits kl {t:g}"),
                given.get("kl", LOGITS_KL + noise.kl))
            for t in totals.temperatures
        ]  # fmt: skip
    return rows


def _replay_rows(
    totals: Totals, identity: Mapping[str, Any], noise: Noise, given: Mapping[str, float]
) -> list[Row]:
    encoding, rows = totals.encoding, []
    last = encoding.hidden_layer()
    if last is not None:
        asked = identity["cache"]
        promised = {float(t) for t in asked.get("temperatures") or (1.0,)}
        for t in totals.temperatures:
            allowed = _allowed_kl(totals, f"kl {t:g}", last.dtype, asked.get("hidden_quality"))
            limit = given.get("kl", allowed + noise.kl) if t in promised else None
            rows.append(Row(f"replay, KL (nats), T = {t:g}", totals.mean(f"kl {t:g}"), limit))
        limit = given.get("top1", totals.mean("again top1") - noise.top1)
        rows.append(Row("replay, top-1 agreement", totals.mean("top1"), limit, at_most=False))
    for stored in encoding.hidden:
        name = f"cosine {stored.layer}"
        limit = given.get("cosine", totals.mean(f"again {name}") - noise.cosine)
        label = f"hidden states of layer {stored.layer}, cosine"
        rows.append(Row(label, totals.mean(name), limit, at_most=False))
    if (relation := encoding.relation) is not None:
        quality = identity["cache"].get("relation_quality")
        allowed = _allowed_kl(totals, "relation kl", relation.dtype, quality)
        label = f"relations of layer {relation.layer}, KL (nats)"
        rows.append(Row(label, totals.mean("relation kl"), allowed + noise.kl))
    if "codes" in totals.counts:
        limit = 1 - noise.codes
        rows.append(Row("codes that come out the same", totals.mean("codes"), limit, at_most=False))
    return rows


def _allowed_kl(totals: Totals, name: str, dtype: str, quality: float | None) -> float:
    """Nats that the encoding of states may cost."""
    if dtype == "coded":
        return QUALITY_ROOM * float(quality or 0.0)
    return RAW_ROOM * totals.mean(f"again {name}")
