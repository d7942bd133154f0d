"""The encodings that ``fidelity.py`` compares."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Stored:
    """One cache, and the signals that are read from it."""

    name: str
    signals: tuple[str, ...]
    cache: Mapping[str, Any] = field(default_factory=dict)
    """Fields of :class:`stages.teacher_cache.config.CacheConfig`."""
    long: bool = False
    """Also measured over all batches, not over 80 sequences alone."""
    sampled: bool = False
    """Each step over a sample of the vocabulary."""


EXACT = {"hidden_dtype": "float32", "top_k": 0}
_REPLAYS = ("replay", "replay+topk")
_RESIDUAL = ("replay+residual",)
_SPARSE = ("sparse",)


def _coded(quality: float, **more: Any) -> dict[str, Any]:
    return {"hidden_quality": quality, **more}


def _sparse(top_k: int, draws: int = 0) -> dict[str, Any]:
    return {"hidden_dtype": "none", "top_k": top_k, "tail_samples": draws}


ENCODINGS = (
    Stored("float16", ("replay",), {"hidden_dtype": "float16", "top_k": 0}),
    Stored("coded 2.5e-4", _REPLAYS, _coded(2.5e-4)),
    Stored("coded 5e-4", _REPLAYS, _coded(5e-4)),
    Stored("coded 1e-3", _REPLAYS, _coded(1e-3), long=True),
    Stored("coded 1e-3, sampled", ("replay+topk",), _coded(1e-3), long=True, sampled=True),
    Stored("coded 2e-3", _REPLAYS, _coded(2e-3), long=True),
    Stored("coded 4e-3", _REPLAYS, _coded(4e-3)),
    Stored("coded 8e-3", _REPLAYS, _coded(8e-3)),
    Stored("coded 1e-3, uint8 logits", ("replay+topk",), _coded(1e-3, logits_dtype="uint8")),
    Stored("coded 1e-3, 12 residual draws", _RESIDUAL, _coded(1e-3, residual_samples=12), True),
    Stored("coded 1e-3, 32 residual draws", _RESIDUAL, _coded(1e-3, residual_samples=32), True),
    Stored("coded 4e-3, 12 residual draws", _RESIDUAL, _coded(4e-3, residual_samples=12), True),
    Stored("top-8", _SPARSE, _sparse(8)),
    Stored("top-64", _SPARSE, _sparse(64), long=True),
    Stored("12 random draws", _SPARSE, _sparse(0, 12)),
    Stored("50 random draws", _SPARSE, _sparse(0, 50), long=True),
    Stored("top-8, 12 tail draws", _SPARSE, _sparse(8, 12)),
)
"""Compared with the live distribution at masked positions."""

POSITIONS = tuple(
    Stored(positions, ("replay",), {**EXACT, "positions": positions})
    for positions in ("masked", "masked+0.05", "masked+0.1", "masked+0.2")
)
"""Compared with the live distribution at all positions; hidden states are exact, so that only the
choice of positions is measured."""
