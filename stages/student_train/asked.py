"""What stage two is asked for, and what the weights of a run depend on."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distilcache.data.cache.cache import Cache
from distilcache.data.storage.files import sha256_file, sha256_json
from distilcache.stages.models.weight_files import weight_files
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.output import UNSAID, read_record


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One student that is trained from a cache into a folder."""

    cache: Cache
    out: Path
    """Folder of the student; an interrupted run goes on there."""
    size: str
    """``LAYERSxWIDTH``."""
    student: StudentConfig
    train: TrainConfig
    role: str
    """``student``, ``control`` or ``teacher``."""
    recipe: dict[str, Any] | None
    """The whole recipe, for the model card; None: a measurement, of which little is said."""
    start_dir: Path
    """Checkpoint whose layers the student starts from."""
    old: bool = False
    """It was begun before 0.3.0."""

    @property
    def label(self) -> str:
        """What lines on the console call it."""
        # The folder tells students of one size apart, by seed and settings.
        made = self.role == "teacher"
        return f"{self.role} {self.size if made else self.out.name.removesuffix('-control')}"


def as_begun(run: Run) -> Run:
    """The run as it was begun, where recipes do not say so.

    Runs of before 0.3.0 were over the whole vocabulary; teachers that they made had dropout.
    """
    if not (run.out / "training.json").is_file():
        return run
    begun = read_record(run.out, "train")["settings"]
    if run.role == "teacher":
        dropout = begun.get("student", {}).get("dropout", run.student.dropout)
        run = replace(run, student=replace(run.student, dropout=dropout))
    if "vocabulary_fraction" not in begun["train"]:
        run = replace(run, old=True, train=replace(run.train, vocabulary_fraction=1.0))
    return run


def settings_of(run: Run, dtype: str) -> dict[str, Any]:
    """Everything that the weights of a run depend on; an old run names what it did."""
    student, train = run.student, run.train
    shape, losses = (
        {name: value for name, value in values.items() if value != UNSAID.get(name, ...)}
        for values in (
            {**asdict(student), "init_layers": list(student.init_layers)},
            asdict(train),
        )
    )
    del shape["sizes"], shape["control"]
    if not run.old:
        losses["vocabulary_fraction"] = train.vocabulary_fraction
    start = [] if student.init in ("teacher", "random") else weight_files(Path(student.init))
    if start and all(path.is_file() for path in start):
        shape["init_sha256"] = sha256_json([sha256_file(path) for path in start])
    return {
        "cache": run.cache.manifest.fingerprint,
        "role": run.role,
        "size": run.size,
        "dtype": dtype.removeprefix("torch."),
        "student": shape,
        "train": losses,
    }
