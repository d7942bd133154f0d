"""Recipe section ``[evaluate]``."""

from dataclasses import dataclass

from distilcache.data.errors import require, require_least


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """How models are measured on held-out text."""

    sequences: int = 512
    """Held-out sequences on which quality is measured (fewer where fewer are held out)."""
    batch_size: int = 32
    """Sequences per batch, for quality and for throughput."""
    seed: int = 1234
    """Seed of the evaluation masking."""
    latency_repeats: int = 20
    """Timed passes per model; models take turns, the median is reported."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_least("evaluate", self, 1, "sequences", "batch_size", "latency_repeats")
        require(0 <= self.seed < 2**63, f"evaluate: seed must be in [0, 2^63), got {self.seed}")
