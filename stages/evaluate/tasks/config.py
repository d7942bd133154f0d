"""Recipe section ``[tasks]``."""

from dataclasses import dataclass, field

from distilcache.data.errors import require, require_least
from distilcache.stages.evaluate.tasks.catalogue import TASKS, OwnTask, Task, check_names, own_task


@dataclass(frozen=True, kw_only=True, slots=True)
class TasksConfig:
    """How models are fine-tuned on tasks, all of them alike."""

    names: tuple[str, ...] = ("sst2", "rte", "stsb")
    """Tasks: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, imdb, squad, and names from
    ``own``."""
    own: dict[str, OwnTask] = field(default_factory=dict)
    """Tasks of one's own, each by a name of your choice."""
    data: str = ""
    """Folder with ``SST-2/``, ``RTE/``, ... in the layout of GLUE, ``aclImdb/``, ``SQuAD/``, or
    with clones of the hub's data sets (``glue``, ``imdb``, ``squad``), or one of these. Empty: the
    Hugging Face hub (extra ``hub``). Each data set has terms of use of its own."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the new task head, order and dropout. The median over them is reported."""
    keep: tuple[int, ...] = ()
    """Seeds whose fine-tuned models are kept: each row's model of each task, as a checkpoint for
    ``transformers`` in ``tasks/TASK/ROW-seedN/``. None by default: each is as large as its
    model."""
    epochs: float = 3.0
    """Passes over the training examples."""
    min_steps: int = 0
    """Least number of optimizer steps. Small tasks are passed over more often than ``epochs`` times
    to reach it."""
    batch_size: int = 32
    """Examples per optimizer step."""
    lr: float = 5e-5
    """Peak learning rate; linear warm-up and decay."""
    warmup: float = 0.1
    """Fraction of the steps in which the learning rate rises."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    max_length: int = 128
    """Tokens per example; longer ones are cut. Fewer where a model has fewer positions."""
    long_max_length: int = 384
    """The same for imdb and squad."""
    limit: int = 0
    """Training examples per task, drawn once. 0: all."""
    distil: bool = False
    """Add the second step: a second row per student, fine-tuned also from the logits of the
    fine-tuned teacher."""
    distil_temperature: float = 2.0
    """Temperature of both distributions in the second step's KL."""
    distil_alpha: float = 0.5
    """Weight of the teacher's term in the second step's loss; the labels' term has weight 1 minus
    this."""
    distil_copies: int = 0
    """Altered copies of each training example in the second step. In a copy the teacher's masked LM
    has replaced some tokens, and the student learns the fine-tuned teacher's logits for it (data
    augmentation as in TinyBERT, Jiao et al. 2020, arXiv:1909.10351)."""
    distil_epochs: float = 0.0
    """Passes of the second step over examples and copies. 0: as many steps as the other rows
    have."""
    distil_min_steps: int = 0
    """Least number of optimizer steps in the second step."""
    distil_cos: float = 0.0
    """Weight of L_cos in the second step: the cosine distance between the final hidden states of
    [CLS] of the student and of the fine-tuned teacher, on examples and copies. 0: none. Not for
    squad and tagging."""
    distil_dropout: bool = True
    """Dropout of the student in the second step. With many copies it learns more without: the
    teacher answered without dropout, and the student can then match it. The layers of students
    with ``student.dropout=0`` have none anyway."""
    latency_repeats: int = 20
    """Timed passes per model; models take turns, the median is reported."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_names(self.names, self.own_tasks())
        require(bool(self.seeds), "tasks: seeds must name at least one seed, got none")
        for seed in self.seeds:
            require(0 <= seed < 2**32, f"tasks: seeds must be from 0 to 2^32 - 1, got {seed}")
        require(
            len(set(self.seeds)) == len(self.seeds),
            f"tasks: seeds must be different ones, got {self.seeds}",
        )
        for seed in self.keep:
            require(
                seed in self.seeds,
                f"tasks: keep must name some of the seeds {', '.join(map(str, self.seeds))}, got "
                f"{seed}",
            )
        require_least("tasks", self, 1, "batch_size", "latency_repeats")
        require_least("tasks", self, 8, "max_length", "long_max_length")
        distil = ("distil_copies", "distil_epochs", "distil_min_steps", "distil_cos")
        require_least("tasks", self, 0, "min_steps", "limit", "weight_decay", *distil)
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
            f"{self.distil_min_steps}; use tasks.min_steps, which goes for all rows",
        )
        for name in ("epochs", "lr", "distil_temperature"):
            value = getattr(self, name)
            require(value > 0, f"tasks: {name} must be above 0, got {value}")
        for name in ("warmup", "distil_alpha"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"tasks: {name} must be from 0 to 1, got {value}")

    def own_tasks(self) -> dict[str, Task]:
        """Tasks of one's own by their names."""
        return {name: own_task(name, own) for name, own in self.own.items()}

    def tasks(self) -> list[Task]:
        """The tasks that are named, in order."""
        known = TASKS | self.own_tasks()
        return [known[name] for name in self.names]
