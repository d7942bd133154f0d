"""Recipe section ``[masking]``."""

from dataclasses import dataclass

from data.errors import require


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskingConfig:
    """How tokens are selected and replaced."""

    policy: str = "uniform"
    """``uniform``, or ``smoothed``: weight max(count, 1)^-smoothing per token id."""
    probability: float = 0.15
    """Share of the ordinary tokens of a sequence that is selected."""
    mask: float = 0.8
    """Share of the selected tokens replaced by the mask token."""
    random: float = 0.1
    """Share of the selected tokens replaced by a random token; the rest is kept."""
    smoothing: float = 0.7
    """Exponent of the ``smoothed`` policy (XLM, DistilBERT)."""
    seed: int = 0
    """Seed of the masking."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            self.policy in ("uniform", "smoothed"),
            f"masking: policy must be 'uniform' or 'smoothed', got {self.policy!r}",
        )
        require(
            0 < self.probability < 1,
            f"masking: probability must be between 0 and 1, got {self.probability}",
        )
        require(
            self.mask >= 0 and self.random >= 0 and self.mask + self.random <= 1,
            "masking: mask and random must be 0 or more and sum to at most 1, got "
            f"{self.mask} and {self.random}",
        )
        require(
            0 <= self.seed < 2**63, f"masking: seed must be in [0, 2^63), got {self.seed}"
        )
