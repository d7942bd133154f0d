"""The tasks: where their data are, what a row means, which metrics count.

The files are those of GLUE (Wang et al. 2019, arXiv:1804.07461) as its download script leaves them,
of aclImdb, and of SQuAD v1.1. ``jsonl`` and ``parquet`` files have the hub's column names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distilcache.data.errors import UserError, nearest_name, require

CLASSES, SCORE, SPAN = "classes", "score", "span"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task."""

    name: str
    folder: str
    """Folder within the data folder."""
    kind: str = CLASSES
    """``classes``, ``score`` (a number per example) or ``span`` (an answer within a text)."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers on the hub."""
    metrics: tuple[str, ...] = ("accuracy",)
    """The score of the task is their mean."""
    columns: tuple[str, ...]
    """Column names in the TSV: one or two texts, then the label."""
    bare: tuple[int, ...] = ()
    """The same columns by number, for files without column names."""
    broken_lines: bool = False
    """Whether some lines of the published file lack columns; they are left out."""
    train: str = "train"
    """Name of the training file, without its ending."""
    dev: tuple[tuple[str, str], ...] = (("", "dev"),)
    """Held-out splits: suffix of their metrics, name of the file."""
    hub: tuple[str, ...]
    """Name, and configuration, of the data set on the Hugging Face hub."""
    hub_columns: tuple[str, ...]
    """Its columns."""
    hub_dev: tuple[str, ...] = ("validation",)
    """Names of its held-out splits."""
    long: bool = False
    """Whether texts are whole documents, cut at ``long_max_length``."""


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2", "label")
_BOTH = ("accuracy", "f1")


def _glue(name: str, folder: str, columns: tuple[str, ...], **more: Any) -> Task:
    """A task of GLUE with two classes, whose columns have the same names on the hub."""
    usual = {"labels": _BINARY, "hub": ("nyu-mll/glue", name), "hub_columns": columns}
    return Task(name=name, folder=folder, columns=columns, **(usual | more))


_ALL = (
    _glue("cola", "CoLA", ("sentence", "label"), metrics=("matthews",), bare=(3, 1)),
    _glue("sst2", "SST-2", ("sentence", "label")),
    _glue("mrpc", "MRPC", ("#1 String", "#2 String", "Quality"), metrics=_BOTH, hub_columns=_PAIR),
    _glue(
        "stsb",
        "STS-B",
        ("sentence1", "sentence2", "score"),
        kind=SCORE,
        labels=(),
        metrics=("pearson", "spearman"),
        bare=(-3, -2, -1),
        hub_columns=_PAIR,
    ),
    _glue(
        "qqp",
        "QQP",
        ("question1", "question2", "is_duplicate"),
        metrics=_BOTH,
        broken_lines=True,
        hub_columns=("question1", "question2", "label"),
    ),
    _glue(
        "mnli",
        "MNLI",
        ("sentence1", "sentence2", "gold_label"),
        labels=("entailment", "neutral", "contradiction"),
        dev=(("_m", "dev_matched"), ("_mm", "dev_mismatched")),
        hub_columns=("premise", "hypothesis", "label"),
        hub_dev=("validation_matched", "validation_mismatched"),
    ),
    _glue("qnli", "QNLI", ("question", "sentence", "label"), labels=_ENTAILMENT),
    _glue("rte", "RTE", _PAIR, labels=_ENTAILMENT),
    _glue("wnli", "WNLI", _PAIR),
    Task(
        name="imdb",
        folder="aclImdb",
        labels=("neg", "pos"),
        columns=("text", "label"),
        dev=(("", "test"),),
        hub=("stanfordnlp/imdb",),
        hub_columns=("text", "label"),
        hub_dev=("test",),
        long=True,
    ),
    Task(
        name="squad",
        folder="SQuAD",
        kind=SPAN,
        metrics=("exact_match", "f1"),
        columns=("question", "context", "answers"),
        train="train-v1.1",
        dev=(("", "dev-v1.1"),),
        hub=("rajpurkar/squad",),
        hub_columns=("question", "context", "answers"),
        long=True,
    ),
)
TASKS = {task.name: task for task in _ALL}


def check_names(names: Sequence[str]) -> None:
    """Refuse unknown names, repeated names, and an empty list.

    Raises:
        UserError: Suggests the most similar name.
    """
    known = ", ".join(TASKS)
    require(bool(names), f"tasks: names must name at least one task, got none; known: {known}")
    for name in names:
        if name not in TASKS:
            hint = nearest_name(name.lower(), TASKS)
            raise UserError(f"tasks: names must be names of tasks, got {name!r}; {hint}")
    require(
        len(set(names)) == len(names),
        f"tasks: names must be different tasks, got {', '.join(names)}",
    )
