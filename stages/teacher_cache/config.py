"""Recipe sections ``[cache]``: which signals are stored, and ``[engine]``: who computes them."""

from dataclasses import dataclass, replace

from distilcache.data.errors import require, require_choice, require_least
from distilcache.data.masks.positions import extra_fraction

HIDDEN_DTYPES = ("none", "coded", "float16", "float32")
LOGIT_DTYPES = ("float16", "uint8", "float32")
WORK_SIZES = {"cpu": (8192, 256), "cuda": (65536, 4096)}
"""``batch_tokens`` and ``row_chunk`` per kind of device. On a CPU the logits of 256 rows stay in
cache (measured: faster than 64 and 2,048 rows), and the size of a batch hardly matters. A large
GPU needs enough work per kernel."""
ENGINES = ("in-process", "local", "ray", "slurm")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Where stage one computes its shards; what it writes is the same everywhere."""

    name: str = "in-process"
    """``in-process``: this process. ``local``: one process per device of this machine. ``ray``:
    tasks on a Ray cluster. ``slurm``: one array task of many, each started with the same
    command."""
    workers: int = 0
    """``local``: number of processes; 0: one per device. ``ray``: largest number of workers at a
    time, which on CPUs share the cores; 0: what the cluster has room for, as it grows and
    shrinks."""
    ray_address: str = ""
    """Address of a running Ray cluster (``auto``, ``HOST:PORT``). Empty: RAY_ADDRESS, or a cluster
    that is started on this machine and ends with the command."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_choice("engine", self, name=ENGINES)
        require_least("engine", self, 0, "workers")
        require(
            self.workers <= 1 or self.name in ("local", "ray"),
            f"engine: workers must be 0 or 1 where name is {self.name!r}, got {self.workers}; "
            f"use --engine local --workers {self.workers}, or --set engine.name=local",
        )
        require(
            not self.ray_address or self.name == "ray",
            f"engine: ray_address must be empty where name is {self.name!r}, got "
            f"{self.ray_address!r}; use --engine ray",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Which signals are stored, and the sizes of the work."""

    rounds: int = 1
    """Maskings of the whole corpus. Student epoch e reads round e mod rounds."""
    blocks_per_shard: int = 16
    """Blocks per shard, which is what one worker makes at a time and what a killed run loses."""
    positions: str = "masked"
    """Positions that carry signals: ``masked``, ``all``, or ``masked+P``: the masked ones, and each
    other one with probability P (``masked+0.1``) and weight 1/P in the losses. For XLNet ``masked``
    alone."""
    logit_positions: str = ""
    """Positions that carry logits, if they differ from ``positions``. Empty: the same."""
    temperatures: tuple[float, ...] = (2.0,)
    """Temperatures of L_ce. For these, and for 1, the cache stores the mass of the stored logits;
    for these the codec of hidden states is calibrated."""
    top_k: int = 8
    """Number of largest logits stored per position. 0: none; the size of the vocabulary: all (exact
    mode)."""
    top_p: float = 1.0
    """Below 1: at each position only as many of the ``top_k`` logits as together have this mass at
    the largest temperature."""
    tail_samples: int = 0
    """Random draws per position from the tokens that are not stored, at the first of
    ``temperatures`` besides 1: an unbiased target for ``train.signal="sparse"``. 0: none."""
    residual_samples: int = 0
    """Signed random draws per position (an even number) from the error of replay, at the first of
    ``temperatures`` besides 1, for ``train.signal="replay+residual"``. 0: none."""
    logits_dtype: str = "float16"
    """Type of stored logits: ``float16``, ``uint8`` with a scale per position, or ``float32``
    (exact mode)."""
    hidden_layers: tuple[int, ...] = (-1,)
    """Layers whose hidden states are stored: 0 is the embeddings, n the last layer, as is -1.
    Training reads the last one alone; others are for programs that use ``open_cache``, and
    ``plan`` says what they take."""
    hidden_dtype: str = "coded"
    """``coded`` (a lossy code, see ``hidden_quality``), ``float16``, ``float32`` or ``none``."""
    hidden_quality: float = 1e-3
    """How much the code may lose. Last layer: mean KL in nats between the teacher's distribution
    and the replayed one, at the worst of ``temperatures``. Inner layers: squared error as a
    fraction of the variance."""
    relation_layer: int = 0
    """Layer whose queries, keys and values students may learn from (``train.alpha_rel``): 1 is the
    first, -1 the last. What these are computed from is stored at all tokens, in ``hidden_dtype``
    (``coded`` where that is ``none``). 0: none."""
    relation_quality: float = 0.005
    """How much the code of that layer may lose: mean KL in nats between the teacher's relations
    and the replayed ones."""
    mask_only: bool = False
    """Store only masks and labels; no teacher is run."""
    batch_tokens: int = 0
    """Tokens per teacher batch. 0: chosen for the device."""
    row_chunk: int = 0
    """Positions per pass of the LM head (memory: row_chunk x vocabulary x 10 bytes). 0: chosen for
    the device."""
    calibration_sequences: int = 512
    """Sequences on which the code of hidden states is calibrated: whole blocks, two at least,
    spread over the corpus. Where these have fewer than four positions per hidden unit, all others
    are used as well, and then further maskings, also of rounds that are not stored."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_least("cache", self, 1, "rounds", "blocks_per_shard", "calibration_sequences")
        require(self.rounds < 1 << 31, f"cache: rounds must be below 2^31, got {self.rounds}")
        require_least("cache", self, 0, "top_k", "batch_tokens", "row_chunk")
        extra_fraction(self.positions)
        extra_fraction(self.logit_positions or self.positions)
        self._check_draws()
        require_choice("cache", self, hidden_dtype=HIDDEN_DTYPES, logits_dtype=LOGIT_DTYPES)
        require(
            all(0 < t < float("inf") for t in self.temperatures),
            f"cache: temperatures must be above 0 and finite, got {list(self.temperatures)}",
        )
        require(
            0 < self.hidden_quality < float("inf"),
            f"cache: hidden_quality must be above 0 nats and finite, got {self.hidden_quality}",
        )
        require(
            0 < self.relation_quality < float("inf"),
            f"cache: relation_quality must be above 0 nats and finite, got {self.relation_quality}",
        )
        require(
            bool(self.hidden_layers) or self.hidden_dtype == "none",
            "cache: hidden_layers must name a layer (-1: the last), got none; to store no hidden "
            "states use cache.hidden_dtype=none",
        )

    def on(self, device: str) -> "CacheConfig":
        """The same, with automatic sizes replaced by those that suit a kind of device."""
        batch_tokens, row_chunk = work_sizes(device)
        return replace(
            self,
            batch_tokens=self.batch_tokens or batch_tokens,
            row_chunk=self.row_chunk or row_chunk,
        )

    def _check_draws(self) -> None:
        require(0 < self.top_p <= 1, f"cache: top_p must be in (0, 1], got {self.top_p}")
        require(
            self.top_p == 1 or self.top_k < 1 << 16,
            f"cache: top_k must be below 65536 where top_p is below 1, got {self.top_k}",
        )
        for name in ("tail_samples", "residual_samples"):
            value = getattr(self, name)
            require(0 <= value < 1 << 16, f"cache: {name} must be 0 or more, got {value}")
        if not self.residual_samples:
            return
        require(
            self.residual_samples % 2 == 0,
            "cache: residual_samples must be an even number (half of them positive), got "
            f"{self.residual_samples}",
        )
        require(
            self.hidden_dtype != "none",
            "cache: hidden_dtype must store hidden states where residual_samples is above 0, got "
            "'none'; residuals are the error of the replay from them",
        )
        require(
            self.logit_positions in ("", self.positions),
            "cache: logit_positions must equal positions where residual_samples is above 0, got "
            f"{self.logit_positions!r} and {self.positions!r}",
        )


def work_sizes(device: str) -> tuple[int, int]:
    """``batch_tokens`` and ``row_chunk`` that suit a kind of device."""
    return WORK_SIZES.get(device, WORK_SIZES["cpu"])


def check_ensemble(config: CacheConfig) -> None:
    """Refuse a cache of several averaged teachers that would store hidden states, or relations."""
    require(
        config.relation_layer == 0,
        "cache: relation_layer must be 0 with teacher.ensemble, got "
        f"{config.relation_layer}; several teachers have no relations in common",
    )
    require(
        config.hidden_dtype == "none",
        "cache: hidden_dtype must be 'none' with teacher.ensemble, got "
        f"{config.hidden_dtype!r}; an average of teachers is not replayed from hidden states: set "
        "cache.hidden_dtype=none, cache.residual_samples=0, train.signal=sparse and "
        "train.alpha_cos=0",
    )
