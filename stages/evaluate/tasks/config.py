"""Recipe section ``[tasks]``."""

from dataclasses import dataclass

from distilcache.data.errors import require
from distilcache.stages.evaluate.tasks.catalogue import check_names


@dataclass(frozen=True, kw_only=True, slots=True)
class TasksConfig:
    """How all models are fine-tuned on tasks."""

    names: tuple[str, ...] = ("sst2", "rte", "stsb")
    """Tasks: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, imdb, squad."""
    data: str = ""
    """Folder with ``SST-2/``, ``RTE/``, ... as GLUE ships them, ``aclImdb/``, ``SQuAD/``; empty:
    the Hugging Face hub (extra ``hub``). Each data set has its own licence."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the task layer, order and dropout; the median over them is reported."""
    epochs: float = 3.0
    """Passes over the training examples."""
    min_steps: int = 0
    """Optimizer steps at least: small tasks are seen more often than ``epochs`` times."""
    batch_size: int = 32
    """Examples per optimizer step."""
    lr: float = 5e-5
    """Peak learning rate; linear warm-up and decay."""
    warmup: float = 0.1
    """Fraction of the steps in which the learning rate rises."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_length: int = 128
    """Most tokens of an example; longer ones are cut. Fewer if a model has fewer positions."""
    long_max_length: int = 384
    """The same for imdb and squad."""
    limit: int = 0
    """Training examples per task, a random sample; 0: all."""
    distil: bool = False
    """Add a second row per student, which also learns the fine-tuned teacher's logits."""
    distil_temperature: float = 2.0
    """Temperature of both distributions in that row's KL."""
    distil_alpha: float = 0.5
    """Weight of the teacher's logits in that row's loss; the labels have the rest."""
    distil_copies: int = 0
    """Altered copies of each training example, on which this row learns the teacher's logits: some
    tokens are replaced by draws of the teacher's masked LM (data augmentation as in TinyBERT,
    Jiao et al. 2020, arXiv:1909.10351)."""
    distil_epochs: float = 0.0
    """Passes of this row over examples and copies; 0: as many steps as the other rows."""
    distil_min_steps: int = 0
    """Optimizer steps of this row at least: small tasks are seen more often than
    ``distil_epochs`` times."""
    distil_cos: float = 0.0
    """Weight of L_cos in that row's loss, on examples and copies: the cosine distance between the
    final hidden states of [CLS] of student and fine-tuned teacher; 0: none. Not for squad."""
    distil_dropout: bool = True
    """Whether the student has dropout in that row. With many copies it learns more without: the
    teacher's logits were computed without dropout, too."""
    latency_repeats: int = 20
    """Timed passes per model; models take turns, and the median is reported."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_names(self.names)
        require(bool(self.seeds), "tasks: seeds must name at least one seed, got none")
        for seed in self.seeds:
            require(0 <= seed < 2**32, f"tasks: seeds must be from 0 to 2^32 - 1, got {seed}")
        require(
            len(set(self.seeds)) == len(self.seeds),
            f"tasks: seeds must be different ones, got {self.seeds}",
        )
        for name in ("batch_size", "latency_repeats"):
            value = getattr(self, name)
            require(value >= 1, f"tasks: {name} must be at least 1, got {value}")
        for name in ("max_length", "long_max_length"):
            value = getattr(self, name)
            require(value >= 8, f"tasks: {name} must be at least 8 tokens, got {value}")
        distil = ("distil_copies", "distil_epochs", "distil_min_steps", "distil_cos")
        for name in ("min_steps", "limit", "weight_decay", *distil):
            value = getattr(self, name)
            require(value >= 0, f"tasks: {name} must be at least 0, got {value}")
        for name in distil:
            value = getattr(self, name)
            require(
                self.distil or value == 0,
                f"tasks: {name} must be 0 where distil is false, got {value}; use "
                "tasks.distil=true",
            )
        require(
            self.distil or self.distil_dropout,
            "tasks: distil_dropout must be true where distil is false, got false; use "
            "tasks.distil=true",
        )
        require(
            self.distil_epochs > 0 or not self.distil_min_steps,
            "tasks: distil_min_steps must be 0 where distil_epochs is, got "
            f"{self.distil_min_steps}; use tasks.min_steps, which holds for all rows",
        )
        for name in ("epochs", "lr", "distil_temperature"):
            value = getattr(self, name)
            require(value > 0, f"tasks: {name} must be above 0, got {value}")
        for name in ("warmup", "distil_alpha"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"tasks: {name} must be from 0 to 1, got {value}")
