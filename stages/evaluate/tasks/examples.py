"""Examples of a task, from files or from the hub: texts, labels, and what is held out."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distilcache.data.errors import UserError, require, tell
from distilcache.data.storage.files import sha256_json
from distilcache.stages.evaluate.tasks.catalogue import SCORE, TAGS, Task
from distilcache.stages.evaluate.tasks.places import locate
from distilcache.stages.evaluate.tasks.records import name_of, require_columns, rows_of
from distilcache.stages.evaluate.tasks.values import label_name, label_of, text_of, words_of

LEAST = 10
"""Examples that a file of one's own must have: with fewer, no score says anything."""
HELD_OUT = 0.2
"""Fraction of a training file that is held out where none is named for that."""


@dataclass(frozen=True, slots=True)
class Split:
    """Examples, column by column."""

    texts: tuple[list[Any], ...]
    """One or two texts per example (span: question, context; tagging: a list of words)."""
    labels: list[Any]
    """Class number, score, a class number for each word, or :class:`Answers`."""

    def __len__(self) -> int:
        """Examples."""
        return len(self.labels)

    def sample(self, limit: int) -> "Split":
        """``limit`` random examples (0: all) in their order, the same ones at each call."""
        if not limit or limit >= len(self):
            return self
        draws = np.random.Philox(key=len(self)).random_raw(len(self))
        return self._only(sorted(np.argsort(draws, kind="stable")[:limit].tolist()))

    def parted(self, fraction: float) -> tuple["Split", "Split"]:
        """The examples in two parts, by the hashes of their texts; the second is a fraction.

        So their order has no effect, and examples with the same texts stay together.
        """
        hashes = [sha256_json(texts) for texts in zip(*self.texts, strict=True)]
        last = sorted(hashes)[max(1, round(fraction * len(self))) - 1]
        out = [i for i, value in enumerate(hashes) if value <= last]
        return self._only([i for i, value in enumerate(hashes) if value > last]), self._only(out)

    def _only(self, rows: Sequence[int]) -> "Split":
        texts = tuple([column[i] for i in rows] for column in self.texts)
        return Split(texts, [self.labels[i] for i in rows])


@dataclass(frozen=True, slots=True)
class TaskData:
    """A task's examples."""

    task: Task
    """The task; one of one's own with the labels that its files have."""
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
        data: Folder with a folder per task; empty: the Hugging Face hub. Of no use for a task of
            one's own, which names its files.
        limit: Training examples; 0: all.

    Raises:
        UserError: A file is missing or not in one of its layouts.
    """
    places = locate(task, data)
    read = {}
    for part, place in places.items():
        rows: Iterable[Any] = rows_of(task, place)
        where = name_of(place)
        try:
            if any(task.files):
                rows = list(rows)
                task = _with_labels(task, rows, where)
            read[part] = _split(task, rows, where)
        except UnicodeDecodeError:
            raise UserError(f"tasks: {where} must be UTF-8 text, got other bytes") from None
        require(bool(len(read[part])), f"tasks: {where} must hold examples, got none")
    train = read.pop("train")
    if not read:
        train, read[""] = _held_out(task, train, name_of(places["train"]))
    elif any(task.files):
        _tell_shared(task, train, read[""])
    return TaskData(task, train.sample(limit), read)


def _held_out(task: Task, split: Split, where: str) -> tuple[Split, Split]:
    """A training file in two parts."""
    train, dev = split.parted(HELD_OUT)
    require(bool(len(train)), f"tasks: texts must differ, got one text alone in {where}")
    tell(
        f"tasks: {task.name}: {len(dev):,} of {len(split):,} examples of {where} are held out, "
        "since no file of held-out ones is named"
    )
    return train, dev


def _tell_shared(task: Task, train: Split, dev: Split) -> None:
    """A line where texts are both trained on and held out."""
    known = set(map(str, zip(*train.texts, strict=True)))
    shared = sum(str(texts) in known for texts in zip(*dev.texts, strict=True))
    if shared:
        tell(
            f"tasks: {task.name}: {shared:,} of {len(dev):,} held-out texts are also trained on; "
            "their scores say less"
        )


def _with_labels(task: Task, rows: Sequence[Any], where: str) -> Task:
    """A task of one's own with the labels of its training file, and a check of the rows.

    Raises:
        UserError: The rows are too few, or their labels do not fit the kind of the task.
    """
    per = "; in JSON, an example is an object in one array, or in a line of its own"
    require(
        len(rows) >= LEAST,
        f"tasks: {where} must hold {LEAST} examples or more, got {len(rows)}"
        f"{per if where.endswith(('.json', '.jsonl')) else ''}",
    )
    target = task.hub_columns[-1]
    require_columns(task.hub_columns, list(rows[0][1]), where)
    if task.labels:
        return task  # of the file that was read before
    values = [row.get(target) for _, row in rows]
    if task.kind == SCORE:
        require(
            len({str(value) for value in values}) > 1,
            f"tasks: {target} must differ between examples, got {values[0]!r} in all of {where}",
        )
        return task
    if task.kind == TAGS:
        values = [tag for value in values for tag in words_of(value) or ()]
    names = {name for value in values if (name := label_name(value)) is not None}
    require(
        len(names) > 1 or len(names) == 0,  # None at all: the first row says why.
        f"tasks: {target} must have two different values at least, got {', '.join(names)} in all "
        f"of {where}",
    )
    require(
        2 * len(names) <= len(values),
        f"tasks: {target} must be the name of a class, which many examples have, got "
        f"{len(names)} different values in {len(values)} examples of {where}; name another "
        f"column{', or set kind to regression' if all(map(_is_number, names)) else ''}",
    )
    numbers = all(re.fullmatch("-?[0-9]{1,18}", name) for name in names)
    labels = tuple(sorted(sorted(names), key=int if numbers else str))  # 1 and 01 are two
    if task.kind == TAGS and names and all(re.fullmatch("O|[BI]-.+", name) for name in names):
        return replace(task, labels=labels, metrics=("entity_f1",))
    return replace(task, labels=labels)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _split(task: Task, rows: Iterable[tuple[str, Mapping[str, Any]]], where: str) -> Split:
    """Rows with the hub's column names to columns."""
    *sources, target = task.hub_columns
    texts: tuple[list[Any], ...] = tuple([] for _ in sources)
    labels = []
    for place, row in rows:
        require_columns(task.hub_columns, list(row), f"{where} {place}")
        for column, name in zip(texts, sources, strict=True):
            column.append(text_of(task, row[name], f"{name} in {where} {place}"))
        labels.append(label_of(task, row[target], f"{where} {place}"))
        if task.kind == TAGS:
            words, tags = len(texts[0][-1]), len(labels[-1])
            require(
                words == tags,
                f"tasks: {target} must hold a tag for each word, got {words} words and {tags} tags "
                f"in {where} {place}",
            )
    return Split(texts, labels)
