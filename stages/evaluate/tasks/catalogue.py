"""The tasks: where their data are, what a row means, which metrics count.

The files are those of GLUE (Wang et al. 2019, arXiv:1804.07461) as its download script leaves them,
of aclImdb, and of SQuAD v1.1. ``jsonl`` and ``parquet`` files have the hub's column names.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from distilcache.data.errors import UserError

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


_GLUE = "nyu-mll/glue"
_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2", "label")

_ALL = (
    Task(
        name="cola",
        folder="CoLA",
        labels=_BINARY,
        metrics=("matthews",),
        columns=("sentence", "label"),
        bare=(3, 1),
        hub=(_GLUE, "cola"),
        hub_columns=("sentence", "label"),
    ),
    Task(
        name="sst2",
        folder="SST-2",
        labels=_BINARY,
        columns=("sentence", "label"),
        hub=(_GLUE, "sst2"),
        hub_columns=("sentence", "label"),
    ),
    Task(
        name="mrpc",
        folder="MRPC",
        labels=_BINARY,
        metrics=("accuracy", "f1"),
        columns=("#1 String", "#2 String", "Quality"),
        hub=(_GLUE, "mrpc"),
        hub_columns=_PAIR,
    ),
    Task(
        name="stsb",
        folder="STS-B",
        kind=SCORE,
        metrics=("pearson", "spearman"),
        columns=("sentence1", "sentence2", "score"),
        bare=(-3, -2, -1),
        hub=(_GLUE, "stsb"),
        hub_columns=_PAIR,
    ),
    Task(
        name="qqp",
        folder="QQP",
        labels=_BINARY,
        metrics=("accuracy", "f1"),
        columns=("question1", "question2", "is_duplicate"),
        broken_lines=True,
        hub=(_GLUE, "qqp"),
        hub_columns=("question1", "question2", "label"),
    ),
    Task(
        name="mnli",
        folder="MNLI",
        labels=("entailment", "neutral", "contradiction"),
        columns=("sentence1", "sentence2", "gold_label"),
        dev=(("_m", "dev_matched"), ("_mm", "dev_mismatched")),
        hub=(_GLUE, "mnli"),
        hub_columns=("premise", "hypothesis", "label"),
        hub_dev=("validation_matched", "validation_mismatched"),
    ),
    Task(
        name="qnli",
        folder="QNLI",
        labels=_ENTAILMENT,
        columns=("question", "sentence", "label"),
        hub=(_GLUE, "qnli"),
        hub_columns=("question", "sentence", "label"),
    ),
    Task(
        name="rte",
        folder="RTE",
        labels=_ENTAILMENT,
        columns=_PAIR,
        hub=(_GLUE, "rte"),
        hub_columns=_PAIR,
    ),
    Task(
        name="wnli",
        folder="WNLI",
        labels=_BINARY,
        columns=_PAIR,
        hub=(_GLUE, "wnli"),
        hub_columns=_PAIR,
    ),
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
    if not names:
        raise UserError(f"tasks: names must name at least one task, got none; known: {known}")
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name.lower(), TASKS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {known}"
            raise UserError(f"tasks: names must be names of tasks, got {name!r}; {hint}")
    if len(set(names)) < len(names):
        raise UserError(f"tasks: names must be different tasks, got {', '.join(names)}")
