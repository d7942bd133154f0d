"""Recipe sections ``[student]`` (what is trained) and ``[train]`` (how)."""

from dataclasses import dataclass, field
from typing import Any

from distilcache.data.errors import UserError, require, require_choice, require_least
from distilcache.stages.models.families import Shape

SIGNALS = ("replay", "replay+topk", "replay+residual", "sparse")
RENAMED_SIGNALS = {"replay+head": "replay+topk"}
"""Signals by the names that they had before 0.2.0."""
REPORTS = ("tensorboard", "wandb", "mlflow", "trackio")
FAMILY_CHOICES = ("usual", "teacher")
PRESETS = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
    "distilbert": (6, 768, 12),
    "distilroberta": (6, 768, 12),
}
"""Well-known sizes as layers, width, heads, with a feed-forward layer of four times the width:
BERT's miniatures (Turc et al. 2019, arXiv:1908.08962) and half-depth students (Sanh et al. 2019,
arXiv:1910.01108)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """Which students are made from the cache."""

    sizes: tuple[str, ...] = ("6x768",)
    """Students, trained one after another from the same cache: ``LAYERSxWIDTH`` or a well-known
    name (``tiny`` 2x128, ``mini`` 4x256, ``small`` 4x512, ``medium`` 8x512, ``base`` 12x768,
    ``large`` 24x1024, ``distilbert`` and ``distilroberta`` 6x768). What is written here names the
    student's folder."""
    heads: int = 0
    """Attention heads. 0: as many as the teacher, or the checkpoint ``init``, where the student
    starts from it and is as wide, else one per 64 units of width (per 32 below width 256; ``tiny``
    has 2)."""
    ffn: int = 0
    """Width of the feed-forward layers. 0: that of the same model as for ``heads``, else
    four times the width (for families other than BERT, in the teacher's proportion)."""
    family: str = "usual"
    """``usual``: the student of a DistilBERT is a DistilBERT, and so is that of a BERT whose
    ``layer_norm_eps`` is the usual 1e-12; all others have the teacher's family. ``teacher``: always
    the teacher's family; the student of a BERT then keeps token types, which tell the two texts of
    a pair apart."""
    init: str = "teacher"
    """How a student starts. ``teacher``: from some layers of the teacher (``init_layers``); they
    are projected where the student of a BERT or RoBERTa is narrower. ``random``. Or the path of a
    checkpoint of the same architecture and token ids."""
    init_layers: tuple[int, ...] = ()
    """Layers of the teacher that a student starts from, one for each of its own, in order; the
    first is 0, -1 is the last. Empty: the last of each of as many groups, such as 1, 3 and 5 of
    six (TinyBERT's mapping), and the first for a single layer; of a ModernBERT evenly spaced ones
    that keep its order of local and global attention."""
    control: bool = False
    """Also train the control: the same student, steps and seed, with L_mlm alone."""
    dropout: float = 0.0
    """All dropout of the layers, hidden states and attention, whatever the teacher's is; in
    distillation and later in fine-tuning (``config.json`` holds it). Without, a student comes
    closer to its teacher's answers, which know none; one that never knew it should not meet it
    later."""
    vocabulary: float = 1.0
    """Token ids that a student keeps of its teacher's: their number, such as 8000, or the share of
    the corpus's tokens that they make up, such as 0.99. It keeps the most frequent ones, and gets a
    tokenizer of its own that writes all others in pieces. 1: all ids."""

    def __post_init__(self) -> None:
        """Check ranges; every size must parse."""
        require(
            0 < self.vocabulary <= 1 or (self.vocabulary > 1 and self.vocabulary % 1 == 0),
            "student: vocabulary must be a whole number of ids, or a share of the corpus's tokens "
            f"above 0 and below 1, or 1 for all ids, got {self.vocabulary:g}; for example 8000 or "
            "0.99",
        )
        require(bool(self.sizes), "student: sizes must name at least one size, got none")
        require_choice("student", self, family=FAMILY_CHOICES)
        require_least("student", self, 0, "heads", "ffn")
        require(0 <= self.dropout < 1, f"student: dropout must be in [0, 1), got {self.dropout}")
        require(
            not self.init_layers or self.init == "teacher",
            "student: init_layers must be left out where a student does not start from its "
            f"teacher's layers, got {list(self.init_layers)} with init {self.init!r}",
        )
        for size in self.sizes:
            self.parse(size)

    def parse(self, size: str, *, heads: int = 0, ffn: int = 0) -> Shape:
        """Turn ``LAYERSxWIDTH`` or a preset's name into an architecture.

        Args:
            size: The text.
            heads: Attention heads where this section names none; 0: the usual ratio.
            ffn: Width of the feed-forward layer where this section names none; 0: 4 x width.

        Raises:
            UserError: The text is no size, or the heads do not divide the width.
        """
        usual = 0
        if size.lower() in PRESETS:
            layers, width, usual = PRESETS[size.lower()]
        else:
            parts = size.lower().split("x")
            if len(parts) != 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
                raise UserError(
                    f"student: size must read LAYERSxWIDTH or be one of {', '.join(PRESETS)}, got "
                    f"{size!r}; for example SIZE=6x768"
                )
            layers, width = int(parts[0]), int(parts[1])
        usual = usual or max(1, width // (64 if width >= 256 else 32))
        heads = self.heads or heads or usual
        require(
            width % heads == 0,
            f"student: size {size}: width must be divisible by the attention heads, got "
            f"{width} and {heads}; choose another width or --set student.heads=N",
        )
        return Shape(layers=layers, width=width, heads=heads, ffn=self.ffn or ffn or 4 * width)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Loss, schedule and logging of one training run."""

    signal: str = "replay+topk"
    """Where the teacher's distribution comes from: ``replay`` (the stored hidden states, through
    its LM head), ``replay+topk`` (corrected by the stored logits), ``replay+residual`` (corrected
    by the residual draws as well: unbiased), ``sparse`` (only the stored logits and tail draws)."""
    vocabulary_fraction: float = 0.2
    """Fraction of the vocabulary over which each step takes L_ce, L_mlm and L_mse: tokens of the
    batch, and others drawn by their probability, with weights that keep the sums unbiased. At least
    4,096 tokens; vocabularies below 8,192 are used whole. 1: the whole vocabulary."""
    restrict_ce_to_mask: bool = False
    """L_ce and L_mse at masked positions alone, whatever positions the cache holds."""
    alpha_ce: float = 5.0
    """Weight of L_ce = T^2 KL(teacher || student). All losses are means over positions."""
    alpha_mlm: float = 2.0
    """Weight of L_mlm, cross-entropy against the masked-out tokens."""
    alpha_cos: float = 1.0
    """Weight of L_cos = mean(1 - cos) of the last hidden states."""
    alpha_mse: float = 0.0
    """Weight of L_mse = |student - teacher|^2 of the raw logits, summed over the vocabulary; not
    with ``sparse``. That is about 50,000 where L_ce is 1 (a BERT's 30,522 tokens): try 1e-5."""
    alpha_rel: float = 0.0
    """Weight of L_rel = KL(teacher || student) of the relations of queries, of keys and of values
    (MiniLMv2), between the student's last layer and ``cache.relation_layer``: mean over heads and
    tokens, sum of the three."""
    relation_heads: int = 0
    """Relation heads of L_rel; they must divide the width of teacher and student. 0: the teacher's
    attention heads."""
    temperature: float = 2.0
    """Temperature T of L_ce."""
    epochs: float = 1.0
    """Passes over the corpus, where ``steps`` is 0."""
    steps: int = 0
    """Optimizer steps; 0: as many as ``epochs`` takes."""
    batch_size: int = 32
    """Sequences per micro-batch, over all processes that train together (a step takes
    ``accumulation`` micro-batches)."""
    accumulation: int = 1
    """Micro-batches per optimizer step."""
    lr: float = 5e-4
    """Peak learning rate of AdamW."""
    warmup: float = 0.05
    """Fraction of the steps in which the learning rate rises; then it follows ``lr_schedule``."""
    lr_schedule: str = "linear"
    """Schedule of the learning rate, by Trainer's names (``lr_scheduler_type``): ``linear`` (to 0),
    ``cosine``, ``constant_with_warmup``, ``cosine_with_min_lr``, ``warmup_stable_decay`` ..."""
    lr_schedule_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the schedule takes besides (``lr_scheduler_kwargs``), such as ``min_lr_rate = 0.1`` of
    ``cosine_with_min_lr`` or ``num_decay_steps = 500`` of ``warmup_stable_decay``."""
    weight_decay: float = 0.0
    """AdamW weight decay, not applied to biases and norms."""
    adam_eps: float = 1e-6
    """AdamW epsilon."""
    max_grad_norm: float = 5.0
    """Gradient norm limit."""
    window_blocks: int = 16
    """Blocks whose sequences are shuffled together; that many decoded blocks are in memory."""
    streams: int = 0
    """Streams into which the order of an epoch is cut. Every batch takes equally many sequences of
    each, and each process reads its own streams, so batches are the same on any number of processes
    that divides this number. 0: the largest of 8, 4, 2, 1 that divides the batch size."""
    row_chunk: int = 1024
    """Positions per pass of the LM heads (memory: row_chunk x vocabulary x 4 bytes)."""
    logging_steps: int = 20
    """Steps between log lines."""
    save_steps: int = 500
    """Steps between checkpoints."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Where log lines go besides ``metrics.jsonl``, by Trainer's names: ``tensorboard`` (events in
    the student's folder), ``wandb``, ``mlflow``, ``trackio`` (their packages must be installed; all
    of them write on this machine alone unless their variables say otherwise). Empty: nowhere."""
    seed: int = 0
    """Seed of initialisation, order and dropout."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            self.signal not in RENAMED_SIGNALS,
            f"train: signal {self.signal!r} is called {RENAMED_SIGNALS.get(self.signal)!r} since "
            "0.2.0; use that name",
        )
        require_choice("train", self, signal=SIGNALS)
        for name in self.report_to:
            require(
                name in REPORTS,
                f"train: report_to must be of {', '.join(REPORTS)}, got {name!r}",
            )
        require(0 <= self.seed < 2**32, f"train: seed must be in [0, 2^32), got {self.seed}")
        require(self.temperature > 0, f"train: temperature must be above 0, got {self.temperature}")
        require(
            0 < self.vocabulary_fraction <= 1,
            f"train: vocabulary_fraction must be above 0 and at most 1, got "
            f"{self.vocabulary_fraction:g}",
        )
        require_least("train", self, 0, "alpha_ce", "alpha_mlm", "alpha_cos", "alpha_mse")
        require_least("train", self, 0, "alpha_rel", "relation_heads")
        require_least("train", self, 0, "weight_decay", "adam_eps", "max_grad_norm")
        require_least("train", self, 0, "steps", "streams")
        require(
            self.streams == 0 or self.batch_size % self.streams == 0,
            f"train: streams must divide the batch size ({self.batch_size}), got {self.streams}; "
            "use 0 to have it chosen",
        )
        require(
            self.has_teacher or self.alpha_mlm > 0,
            "train: alpha_ce, alpha_mlm, alpha_cos, alpha_mse and alpha_rel must not all be 0",
        )
        require(
            self.alpha_mse == 0 or self.signal != "sparse",
            "train: alpha_mse must be 0 where signal is 'sparse' (it needs all logits), got "
            f"{self.alpha_mse:g}; use train.signal=replay+topk",
        )
        require(
            self.steps > 0 or self.epochs > 0,
            f"train: epochs must be above 0 where steps is 0, got {self.epochs}",
        )
        require(0 <= self.warmup < 1, f"train: warmup must be in [0, 1), got {self.warmup}")
        require(self.lr > 0, f"train: lr must be above 0, got {self.lr}")
        require_least("train", self, 1, "batch_size", "accumulation", "window_blocks")
        require_least("train", self, 1, "row_chunk", "logging_steps", "save_steps")

    @property
    def has_teacher(self) -> bool:
        """Whether a loss reads the teacher's signals."""
        return self.alpha_ce + self.alpha_cos + self.alpha_mse + self.alpha_rel > 0

    @property
    def has_head(self) -> bool:
        """Whether a loss reads the student's logits."""
        return self.alpha_ce + self.alpha_mlm + self.alpha_mse > 0
