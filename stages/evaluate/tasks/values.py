"""Texts and labels of an example, from the values of its row."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distilcache.data.errors import require
from distilcache.stages.evaluate.tasks.catalogue import CLASSES, SCORE, SPAN, TAGS, Task


class Answers(NamedTuple):
    """The right answers to a question, each with its first character."""

    texts: tuple[str, ...]
    starts: tuple[int, ...]


def label_name(value: Any) -> str | None:
    """The name of a class, whatever kind of file it comes from; None: it is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # A column of whole numbers with one missing.
    return _sound(str(value)).strip() or None if isinstance(value, str | int) else None


def _sound(text: str) -> str:
    """Text that UTF-8 can hold: lone surrogates (from escapes in JSON) are replaced."""
    return text.encode(errors="replace").decode()


def _lacking(value: Any) -> str:
    """The remedy for a label that is not there; "": it is."""
    empty = value is None or (isinstance(value, str) and not value.strip())
    no_number = isinstance(value, float) and math.isnan(value)
    return "; fill it, or leave the row out" if empty or no_number else ""


def words_of(value: Any) -> list[Any] | None:
    """Words, or tags, from a list or from a text with spaces; None: there are none."""
    found = value.split() if isinstance(value, str) else value
    return list(found) if isinstance(found, list | tuple) and found else None


def text_of(task: Task, value: Any, where: str) -> Any:
    """A text, or the words of one; those of one's own are not empty."""
    own, hint = any(task.files), ""
    if task.kind == TAGS:
        words = words_of(value) or [""]
    else:
        words = ["" if value is None and own else value]
        listed = own and isinstance(value, list)
        hint = "; for a list of words set kind to tagging" if listed else ""
    require(
        all(isinstance(word, str) for word in words),
        f"tasks: text must be text, got {value!r:.100} as {where}{hint}",
    )
    require(
        not own or all(map(str.strip, words)),
        f"tasks: text must not be empty, got an empty {where}; fill it, or leave the row out",
    )
    sound = list(map(_sound, words))
    return sound if task.kind == TAGS else sound[0]


def label_of(task: Task, value: Any, where: str) -> Any:
    """A class's number from its number or name, a finite score, tags, or answers."""
    if task.kind == SPAN:
        return _answers(value, where)
    if task.kind == SCORE:
        return _score(task, value, where)
    if task.kind == TAGS:
        return tuple(_class(task, tag, where) for tag in words_of(value) or ())
    return _class(task, value, where)


def _score(task: Task, value: Any, where: str) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    names = f"; for names set kind to {CLASSES}"
    require(
        math.isfinite(score),
        f"tasks: label must be a number, got {value!r} in {where}"
        f"{_lacking(value) or names if any(task.files) else ''}",
    )
    return score


def _class(task: Task, value: Any, where: str) -> int:
    if any(task.files):
        hint = "; set kind to regression" if isinstance(value, float) else ""
        if isinstance(value, list):
            hint = "; an example has one class (for a class of each word set kind to tagging)"
        hint = _lacking(value) or hint
        value = label_name(value) or value
        known = ", ".join(task.labels) or "names or whole numbers"
        also = f", as in {task.files[0]}" if task.labels else ""
    else:
        value = value.strip() if isinstance(value, str) else value
        if isinstance(value, int) and 0 <= value < len(task.labels):
            return int(value)
        known, also, hint = ", ".join(task.labels), "", ""
    require(
        isinstance(value, str) and value in task.labels,
        f"tasks: label must be one of {known[:200]}{also}, got {value!r} in {where}{hint}",
    )
    return task.labels.index(value)


def _answers(value: Any, where: str) -> Answers:
    texts: Sequence[Any] = value.get("text", ()) if isinstance(value, Mapping) else ()
    starts: Sequence[Any] = value.get("answer_start", ()) if isinstance(value, Mapping) else ()
    fits = len(texts) == len(starts) > 0 and all(isinstance(t, str) for t in texts)
    require(
        fits and all(isinstance(s, int) and s >= 0 for s in starts),
        f"tasks: answers must be texts, each with its answer_start, got {value!r:.100} in {where}",
    )
    return Answers(tuple(texts), tuple(starts))
