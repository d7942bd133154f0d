"""Recipe sections ``[teacher]`` (which one) and ``[cache]`` (what of it is stored)."""

from dataclasses import dataclass

from data.errors import require

HIDDEN_DTYPES = ("none", "coded", "float16", "float32")
LOGIT_DTYPES = ("float16", "uint8", "float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """What the teacher's cache holds and how the work is cut."""

    rounds: int = 1
    """Maskings of the whole corpus; student epoch e reads round e mod rounds."""
    blocks_per_shard: int = 16
    """Corpus blocks per shard: the unit of scheduling and of exactly-once writing."""
    positions: str = "masked"
    """Positions that carry signals: ``masked`` or ``all``."""
    temperatures: tuple[float, ...] = (2.0,)
    """Temperatures (besides 1) at which logsumexp and tail mass are stored."""
    top_k: int = 8
    """Largest logits stored per position; 0: none; the vocabulary size: all (exact mode)."""
    logits_dtype: str = "float16"
    """``float16``, ``uint8`` with a scale per position, or ``float32`` (exact mode)."""
    hidden_layers: tuple[int, ...] = (-1,)
    """Layers whose hidden states are stored: 0 the embeddings, n the last; -1 the last."""
    hidden_dtype: str = "coded"
    """``coded`` (transform codec), ``float16``, ``float32`` or ``none``."""
    hidden_quality: float = 5e-4
    """Coded last layer: mean replay KL in nats at the worst of ``temperatures`` that the step of
    the codec is chosen for."""
    mask_only: bool = False
    """Store masks and labels alone; no teacher is run."""
    batch_tokens: int = 8192
    """Tokens per teacher batch."""
    row_chunk: int = 2048
    """Positions per pass of the LM head (memory: row_chunk x vocabulary x 4 bytes)."""
    calibration_sequences: int = 512
    """Sequences from the start of the corpus that calibrate the transform codec."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.rounds >= 1, f"cache: rounds must be at least 1, got {self.rounds}")
        require(
            self.positions in ("masked", "all"),
            f"cache: positions must be 'masked' or 'all', got {self.positions!r}",
        )
        require(
            self.hidden_dtype in HIDDEN_DTYPES,
            f"cache: hidden_dtype must be one of {', '.join(HIDDEN_DTYPES)}, "
            f"got {self.hidden_dtype!r}",
        )
        require(
            self.logits_dtype in LOGIT_DTYPES,
            f"cache: logits_dtype must be one of {', '.join(LOGIT_DTYPES)}, "
            f"got {self.logits_dtype!r}",
        )
        require(self.top_k >= 0, f"cache: top_k must be 0 or more, got {self.top_k}")
        require(
            all(t > 0 for t in self.temperatures),
            f"cache: temperatures must be above 0, got {list(self.temperatures)}",
        )
        require(
            self.hidden_quality > 0,
            f"cache: hidden_quality must be above 0 nats, got {self.hidden_quality}",
        )
        for name in ("blocks_per_shard", "batch_tokens", "row_chunk", "calibration_sequences"):
            value = getattr(self, name)
            require(value >= 1, f"cache: {name} must be at least 1, got {value}")
