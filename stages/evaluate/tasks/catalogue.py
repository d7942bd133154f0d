"""The tasks: where their data are, what a row means, which metrics count.

A recipe describes tasks of its own (:class:`OwnTask`). The tasks that have names are described here
in the same terms. Their files are those of GLUE (Wang et al. 2019, arXiv:1804.07461) as its
download script leaves them, of aclImdb, and of SQuAD v1.1; ``csv``, ``jsonl`` and ``parquet`` files
have the hub's column names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distilcache.data.errors import UserError, nearest_name, require

CLASSES, SCORE, TAGS, SPAN = "classification", "regression", "tagging", "span"
OWN_KINDS = {CLASSES: ("accuracy",), SCORE: ("pearson", "spearman"), TAGS: ("word_accuracy",)}
"""Kinds of tasks of one's own, with their metrics; tags of entities have ``entity_f1``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task."""

    name: str
    folder: str = ""
    """Folder within the data folder."""
    files: tuple[str, str] = ("", "")
    """Of a task of one's own: for training, and held out ("": a part of the former)."""
    kind: str = CLASSES
    """``classification``, ``regression`` (a number per example), ``tagging`` (a class per word) or
    ``span`` (an answer within a text)."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers on the hub. Those of a task of one's own
    are found when it is read."""
    metrics: tuple[str, ...] = ("accuracy",)
    """The score of the task is their mean."""
    columns: tuple[str, ...]
    """Column names in the TSV: texts, at most two, then the label."""
    bare: tuple[int, ...] = ()
    """The same columns by number, for files without column names."""
    broken_lines: bool = False
    """Whether some lines of the published file lack columns; they are left out."""
    train: str = "train"
    """Name of the training file, without its ending."""
    dev: tuple[tuple[str, str], ...] = (("", "dev"),)
    """Held-out splits: suffix of their metrics, name of the file."""
    hub: tuple[str, ...] = ()
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


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnTask:
    """A task of one's own: where its examples are, and which columns hold what."""

    train: str = ""
    """Examples, one per row: a ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` or ``.parquet`` file; a
    folder with such files, of which those of the training split count, where their names tell
    splits, as in a clone of the hub's data set; a folder that ``datasets`` has saved, or
    ``hf:NAME[/CONFIG]:SPLIT`` on the hub (the last two need the extra ``hub``)."""
    validation: str = ""
    """The same for held-out examples; of a folder the validation split counts, or if there is none
    the test split. Empty: the validation split in the folder ``train``; if there is none, a fifth
    of the training examples, chosen by the hash of each text."""
    text: tuple[str, ...] = ("text",)
    """Columns with text, one or two. For tagging one: a list of words, or words between spaces."""
    label: str = "label"
    """Column with the label: a name or whole number; for regression a number; for tagging a list of
    tags, or tags between spaces, one per word."""
    kind: str = CLASSES
    """``classification`` (its score is the accuracy), ``regression`` (mean of Pearson's and
    Spearman's correlation) or ``tagging`` (F1 of whole entities where tags are O, B-..., I-...;
    else the accuracy over words)."""


def own_task(name: str, own: OwnTask) -> Task:
    """A task of one's own in the terms of all tasks.

    Raises:
        UserError: A field does not fit.
    """
    where = f"tasks: own.{name}"
    require(
        name not in TASKS and not set("/.,") & set(name) and bool(name.strip()),
        f"{where} must be a new and plain name, got {name!r}; choose another",
    )
    require(
        own.kind in OWN_KINDS,
        f"{where}.kind must be one of {', '.join(OWN_KINDS)}, got {own.kind!r}",
    )
    require(bool(own.train), f"{where}.train must name a file, got none")
    most = 1 if own.kind == TAGS else 2
    require(
        1 <= len(own.text) <= most,
        f"{where}.text must name {'one column' if most == 1 else 'one or two columns'}, got "
        f"{len(own.text)}",
    )
    columns = (*own.text, own.label)
    require(
        len(set(columns)) == len(columns),
        f"{where}: text and label must be different columns, got {', '.join(columns)}",
    )
    return Task(
        name=name,
        files=(own.train, own.validation),
        kind=own.kind,
        metrics=OWN_KINDS[own.kind],
        columns=columns,
        hub_columns=columns,
    )


def check_names(names: Sequence[str], own: Mapping[str, Task]) -> None:
    """Refuse unknown names, repeated names, and an empty list; ``own`` tasks are known as well."""
    all_known = (*own, *TASKS)
    known = ", ".join(all_known)
    require(bool(names), f"tasks: names must name at least one task, got none; known: {known}")
    for name in names:
        if name not in all_known:
            hint = nearest_name(name.lower(), all_known)
            raise UserError(f"tasks: names must be names of tasks, got {name!r}; {hint}")
    require(
        len(set(names)) == len(names),
        f"tasks: names must be different tasks, got {', '.join(names)}",
    )
