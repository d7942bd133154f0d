"""Examples of a task, from files in the layouts they are published in, or from the hub.

::

    data/SST-2/train.tsv, dev.tsv              GLUE; also .jsonl, .parquet with the hub's columns
    data/MNLI/train.tsv, dev_matched.tsv, dev_mismatched.tsv
    data/aclImdb/{train,test}/{pos,neg}/*.txt  or {train,test}.jsonl, .parquet
    data/SQuAD/train-v1.1.json, dev-v1.1.json
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distilcache.data.errors import UserError, require
from distilcache.data.storage.files import sha256_json
from distilcache.stages.evaluate.tasks.catalogue import SCORE, SPAN, Task
from distilcache.stages.evaluate.tasks.records import hub_rows, rows_of

ENDINGS = (".tsv", ".jsonl", ".parquet", ".json")
MAX_BROKEN = 0.01
"""Fraction of lines in a published file that may lack columns."""


class Answers(NamedTuple):
    """The right answers to a question, each with its first character."""

    texts: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """Examples, column by column."""

    texts: tuple[list[str], ...]
    """One or two texts per example (span: question, context)."""
    labels: list[Any]
    """Class number, score, or :class:`Answers`."""

    def __len__(self) -> int:
        """Examples."""
        return len(self.labels)

    def sample(self, limit: int) -> "Split":
        """``limit`` random examples (0: all) in their order, the same ones at each call."""
        if not limit or limit >= len(self):
            return self
        draws = np.random.Philox(key=len(self)).random_raw(len(self))
        rows = sorted(np.argsort(draws, kind="stable")[:limit].tolist())
        texts = tuple([column[i] for i in rows] for column in self.texts)
        return Split(texts, [self.labels[i] for i in rows])


@dataclass(frozen=True, slots=True)
class TaskData:
    """A task's examples."""

    task: Task
    train: Split
    dev: dict[str, Split]
    """Held-out splits by the suffix of their metrics; most tasks have one, with suffix ``""``."""

    @property
    def fingerprint(self) -> str:
        """Hash of all examples."""
        splits = {"train": self.train, **{f"dev{suffix}": s for suffix, s in self.dev.items()}}
        return sha256_json({name: [split.texts, split.labels] for name, split in splits.items()})


def read_task(task: Task, data: str, limit: int = 0) -> TaskData:
    """Read a task.

    Args:
        task: The task.
        data: Folder with a folder per task; empty: the Hugging Face hub.
        limit: Training examples; 0: all.

    Raises:
        UserError: A file is missing or not in one of its layouts.
    """
    if data:
        read = {name: _read_file(task, path) for name, path in locate(task, data).items()}
    else:
        splits = {"train": "train"}
        splits |= {name: split for (name, _), split in zip(task.dev, task.hub_dev, strict=True)}
        read = {
            name: _split(task, hub_rows(task, split), f"hub {':'.join((*task.hub, split))}")
            for name, split in splits.items()
        }
    return TaskData(task, read.pop("train").sample(limit), read)


def locate(task: Task, data: str) -> dict[str, Path]:
    """Files of a task, by ``train`` and the suffixes of its held-out splits.

    Raises:
        UserError: One is missing.
    """
    root = Path(data).expanduser()
    require(
        root.is_dir(),
        f"tasks: data must be a folder with {task.folder}/ in it, got {data!r}, which is none; "
        "correct tasks.data, or leave it empty to read from the Hugging Face hub",
    )
    found = {}
    for key, stem in (("train", task.train), *task.dev):
        places = [root / name / f"{stem}{end}" for name in _folders(task) for end in ENDINGS]
        places += [root / name / stem for name in _folders(task) if task.name == "imdb"]
        there = next((path for path in places if path.exists()), None)
        if there is None:
            missing = root / task.folder / stem
            raise UserError(
                f"tasks: data of {task.name} must be in {missing}{_usual(task)}, got no such file; "
                f"put it there, correct tasks.data, or leave {task.name} out"
            )
        found[key] = there
    return found


def _folders(task: Task) -> tuple[str, ...]:
    return tuple(dict.fromkeys((task.folder, task.name.upper(), task.name)))


def _usual(task: Task) -> str:
    return {"imdb": "/{pos,neg}", "squad": ".json"}.get(task.name, ".tsv")


def _read_file(task: Task, path: Path) -> Split:
    try:
        split = (
            _read_tsv(task, path)
            if path.suffix == ".tsv"
            else _split(task, rows_of(path), str(path))
        )
    except UnicodeDecodeError:
        raise UserError(f"tasks: {path} must be UTF-8 text, got other bytes") from None
    require(bool(len(split)), f"tasks: {path} must hold examples, got none")
    return split


def _read_tsv(task: Task, path: Path) -> Split:
    """Tab-separated; quotes have no meaning."""
    # Not splitlines(): it also splits at other characters, which texts contain.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    rows = [line.rstrip("\r").split("\t") for line in lines if line.strip()]
    require(bool(rows), f"tasks: {path} must hold examples, got an empty file")
    names = [name.strip() for name in rows[0]]
    if set(task.columns) <= set(names):
        columns, first = [names.index(name) for name in task.columns], 1
        width = len(names)
    elif task.bare:
        columns, first = list(task.bare), 0
        width = max(c + 1 if c >= 0 else -c for c in columns)
    else:
        raise UserError(
            f"tasks: {path} must have the columns {', '.join(task.columns)} as {task.name} has, "
            f"got {', '.join(names)[:100]}"
        )
    texts: tuple[list[str], ...] = tuple([] for _ in columns[:-1])
    labels, broken = [], 0
    for number, row in enumerate(rows[first:], start=first + 1):
        if len(row) < width:
            broken += 1
            if task.broken_lines and broken <= max(1, MAX_BROKEN * len(rows)):
                continue
            raise UserError(
                f"tasks: {path} must have {width} columns in every line, got {len(row)} in line "
                f"{number}"
            )
        *found, label = (row[c] for c in columns)
        labels.append(_label(task, label, f"{path} line {number}"))
        for column, text in zip(texts, found, strict=True):
            column.append(text)
    if broken:
        print(f"tasks: {path}: {broken} broken lines left out", file=sys.stderr)
    return Split(texts, labels)


def _split(task: Task, rows: Any, where: str) -> Split:
    """Rows with the hub's column names to columns."""
    *sources, target = task.hub_columns
    texts: tuple[list[str], ...] = tuple([] for _ in sources)
    labels = []
    for number, row in enumerate(rows, start=1):
        require(
            target in row and all(isinstance(row.get(name), str) for name in sources),
            f"tasks: {where} must have the columns {', '.join(task.hub_columns)}, got "
            f"{', '.join(map(str, row))} in row {number}",
        )
        for column, name in zip(texts, sources, strict=True):
            column.append(row[name])
        labels.append(_label(task, row[target], f"{where} row {number}"))
    return Split(texts, labels)


def _label(task: Task, value: Any, where: str) -> Any:
    """A class's number from its number or name, a finite score, or answers."""
    if task.kind == SPAN:
        return _answers(value, where)
    if task.kind == SCORE:
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        require(math.isfinite(score), f"tasks: label must be a number, got {value!r} in {where}")
        return score
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, int) and 0 <= text < len(task.labels):
        return int(text)
    require(
        text in task.labels,
        f"tasks: label must be one of {', '.join(task.labels)}, got {value!r} in {where}",
    )
    return task.labels.index(text)


def _answers(value: Any, where: str) -> Answers:
    texts: Sequence[Any] = value.get("text", ()) if isinstance(value, Mapping) else ()
    starts: Sequence[Any] = value.get("answer_start", ()) if isinstance(value, Mapping) else ()
    fits = len(texts) == len(starts) > 0 and all(isinstance(t, str) for t in texts)
    require(
        fits and all(isinstance(s, int) and s >= 0 for s in starts),
        f"tasks: answers must be texts, each with its answer_start, got {value!r:.100} in {where}",
    )
    return Answers(tuple(texts), tuple(starts))
