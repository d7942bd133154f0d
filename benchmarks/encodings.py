"""The encodings that ``fidelity.py`` compares."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One cache, and the signals that are read from it."""

    name: str
    signals: tuple[str, ...]
    cache: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``CacheConfig``."""
    long: bool = False
    """Also measured over all batches, not over 80 sequences alone."""


REPLAYS = ("replay", "replay+topk")
EXACT = {"hidden_dtype": "float32", "top_k": 0}
NO_HIDDEN = {"hidden_dtype": "none"}

ENCODINGS = (
    Stored(name="float16", signals=("replay",), cache={"hidden_dtype": "float16", "top_k": 0}),
    Stored(name="coded 2.5e-4", signals=REPLAYS, cache={"hidden_quality": 2.5e-4}),
    Stored(name="coded 5e-4", signals=REPLAYS, cache={"hidden_quality": 5e-4}),
    Stored(name="coded 1e-3", signals=REPLAYS, cache={"hidden_quality": 1e-3}, long=True),
    Stored(name="coded 2e-3", signals=REPLAYS, cache={"hidden_quality": 2e-3}, long=True),
    Stored(name="coded 4e-3", signals=REPLAYS, cache={"hidden_quality": 4e-3}),
    Stored(name="coded 8e-3", signals=REPLAYS, cache={"hidden_quality": 8e-3}),
    Stored(
        name="coded 1e-3, uint8 logits",
        signals=("replay+topk",),
        cache={"hidden_quality": 1e-3, "logits_dtype": "uint8"},
    ),
    Stored(
        name="coded 1e-3, 12 residual draws",
        signals=("replay+residual",),
        cache={"hidden_quality": 1e-3, "residual_samples": 12},
        long=True,
    ),
    Stored(
        name="coded 1e-3, 32 residual draws",
        signals=("replay+residual",),
        cache={"hidden_quality": 1e-3, "residual_samples": 32},
        long=True,
    ),
    Stored(
        name="coded 4e-3, 12 residual draws",
        signals=("replay+residual",),
        cache={"hidden_quality": 4e-3, "residual_samples": 12},
        long=True,
    ),
    Stored(name="top-8", signals=("sparse",), cache={**NO_HIDDEN, "top_k": 8}),
    Stored(name="top-64", signals=("sparse",), cache={**NO_HIDDEN, "top_k": 64}, long=True),
    Stored(
        name="12 random draws",
        signals=("sparse",),
        cache={**NO_HIDDEN, "top_k": 0, "tail_samples": 12},
    ),
    Stored(
        name="50 random draws",
        signals=("sparse",),
        cache={**NO_HIDDEN, "top_k": 0, "tail_samples": 50},
        long=True,
    ),
    Stored(
        name="top-8, 12 tail draws",
        signals=("sparse",),
        cache={**NO_HIDDEN, "top_k": 8, "tail_samples": 12},
    ),
)
"""Against the live distribution at masked positions."""

POSITIONS = (
    Stored(name="masked", signals=("replay",), cache={**EXACT}),
    Stored(name="masked+0.05", signals=("replay",), cache={**EXACT, "positions": "masked+0.05"}),
    Stored(name="masked+0.1", signals=("replay",), cache={**EXACT, "positions": "masked+0.1"}),
    Stored(name="masked+0.2", signals=("replay",), cache={**EXACT, "positions": "masked+0.2"}),
)
"""Against the live distribution at all positions; hidden states exact, so that only the choice of
positions is measured."""
