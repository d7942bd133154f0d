"""Rows of files, of folders and of the hub: where each stands, and its columns by name."""

import contextlib
import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distilcache.data.csv_rows import csv_reader
from distilcache.data.errors import UserError, nearest_name, reason_of, require
from distilcache.data.hub_rows import datasets_library, hub_faults, load_split
from distilcache.stages.evaluate.tasks.catalogue import SPAN, Task

Rows = Iterator[tuple[str, Mapping[str, Any]]]
"""Such as ``line 3``, and the row."""
Location = Path | str | tuple[Path, ...]
"""A file or folder, ``hf:NAME[/CONFIG]:SPLIT``, or several files of a split."""
HUB = "hf:"
"""How the name of a data set on the hub begins: ``hf:NAME[/CONFIG]:SPLIT``."""
QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')
"""A field as CSV writes one that holds quotes."""
MAX_BROKEN = 0.01
"""Fraction of lines in a published file that may lack columns."""


def name_of(place: Location) -> str:
    """A location, for people; of several files their folder."""
    return str(place[0].parent if isinstance(place, tuple) else place)


def rows_of(task: Task, place: Location) -> Rows:
    """Rows of a file, of files, of a folder, or of the hub, with the hub's column names.

    Raises:
        UserError: It cannot be read, or its content does not fit the ending.
    """
    if isinstance(place, str):
        return _hub(task, place)
    if isinstance(place, tuple):
        return _several(task, place)
    if place.is_dir():
        return _saved(task, place) if any(task.files) else _reviews(place)
    readers = {".tsv": _tsv, ".csv": _csv, ".parquet": _parquet}
    if place.suffix in readers:
        return readers[place.suffix](task, place)
    return _squad(place) if task.kind == SPAN and place.suffix == ".json" else _json(place)


def _several(task: Task, files: Sequence[Path]) -> Rows:
    for file in files:
        yield from ((f"{file.name} {row}", values) for row, values in rows_of(task, file))


def require_columns(wanted: Sequence[str], there: Sequence[str], where: str) -> None:
    """Refuse a table without some columns, or with several of one name."""
    missing = [name for name in wanted if name not in there]
    if missing:
        hint = nearest_name(missing[0], there)
        raise UserError(
            f"tasks: {where} must have the columns {', '.join(wanted)}, got no {missing[0]!r} "
            f"among {', '.join(map(str, there))[:200] or 'none'}"
            f"{f'; {hint}' if hint.startswith('did') else ''}"
        )
    twice = [name for name in wanted if list(there).count(name) > 1]
    require(
        not twice, f"tasks: {where} must have each column once, got several {twice}; rename them"
    )


def _tsv(task: Task, path: Path) -> Rows:
    """Tab-separated; quotes have no meaning."""
    # Not splitlines(): it also splits at other characters, which texts contain.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    rows = [line.rstrip("\r").split("\t") for line in lines if line.strip()]
    require(bool(rows), f"tasks: {path} must hold examples, got an empty file")
    names = [name.strip() for name in rows[0]]
    if task.bare and not set(task.columns) <= set(names):
        columns, first = list(task.bare), 0
        width = max(c + 1 if c >= 0 else -c for c in columns)
    else:
        require_columns(task.columns, names, str(path))
        columns, first = [names.index(name) for name in task.columns], 1
        width = len(names)
    broken = 0
    for number, row in enumerate(rows[first:], start=first + 1):
        if len(row) < width or (any(task.files) and len(row) > width):
            broken += 1
            if task.broken_lines and broken <= max(1, MAX_BROKEN * len(rows)):
                continue
            raise _wrong_width(path, width, len(row), number)
        found = {n: row[c] for n, c in zip(task.hub_columns, columns, strict=True)}
        require(
            not any(task.files) or not any(map(QUOTED.fullmatch, found.values())),
            f"tasks: {path} must be without quotes around fields, which have no meaning in .tsv, "
            f"got some in line {number}; name the file .csv, which tabs may part as well",
        )
        yield f"line {number}", found
    if broken:
        print(f"tasks: {path}: {broken} broken lines left out", file=sys.stderr)


def _csv(task: Task, path: Path) -> Rows:
    """With quotes; the first line names the columns."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv_reader(file, sys.maxsize)
        names: list[str] = []
        number = 1
        try:
            for row in reader:
                if row and not names:
                    names = [name.strip() for name in row]
                    require_columns(task.hub_columns, names, str(path))
                elif row and len(row) != len(names):
                    raise _wrong_width(path, len(names), len(row), number)
                elif row:
                    yield f"line {number}", dict(zip(names, row, strict=True))
                number = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"tasks: {path} must be a CSV file with sound quotes, got {error} in the row that "
                f"begins in line {number}; double the quotes within a field"
            ) from None


def _wrong_width(path: Path, wanted: int, found: int, number: int) -> UserError:
    return UserError(
        f"tasks: {path} must have {wanted} columns in every line, got {found} in line {number}"
    )


def _parquet(task: Task, path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        require_columns(task.hub_columns, table.column_names, str(path))
        rows = table.select(list(task.hub_columns)).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"tasks: {path} must be a parquet file, got: {reason_of(error)}") from None
    names = None
    with contextlib.suppress(
        ValueError, LookupError, AttributeError, TypeError
    ):  # of another program
        written = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = written["info"]["features"].get(task.hub_columns[-1])
        names = feature.get("feature", feature).get("names")
    yield from _with_names(task, rows, names)


def _numbered(rows: Any) -> Rows:
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _json(path: Path) -> Rows:
    """One object per line, or one array of objects."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        items = _parsed(text)
        require(
            isinstance(items, list) and all(isinstance(row, dict) for row in items),
            f"tasks: {path} must hold an array of JSON objects, got something else",
        )
        yield from ((f"item {number}", row) for number, row in enumerate(items, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            row = _parsed(line)
            require(
                isinstance(row, dict),
                f"tasks: {path} must hold one JSON object per line, got something else in line "
                f"{number}",
            )
            yield f"line {number}", row


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _reviews(path: Path) -> Rows:
    """aclImdb: a file per review, a folder per label."""
    for label in ("neg", "pos"):
        files = sorted((path / label).glob("*.txt"))
        require(bool(files), f"tasks: {path / label} must hold *.txt files, got none")
        for file in files:
            try:
                text = file.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError:
                raise UserError(f"tasks: {file} must be UTF-8 text, got other bytes") from None
            yield file.name, {"text": text, "label": label}


def _squad(path: Path) -> Rows:
    """Rows of SQuAD v1.1's JSON as the hub has them."""
    try:
        articles = json.loads(path.read_text(encoding="utf-8-sig"))["data"]
        for article in articles:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    given = asked["answers"]
                    answers = {
                        "text": [answer["text"] for answer in given],
                        "answer_start": [answer["answer_start"] for answer in given],
                    }
                    row = {"question": asked["question"], "context": paragraph["context"]}
                    yield f"question {asked.get('id')}", {**row, "answers": answers}
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(
            f"tasks: {path} must be SQuAD v1.1's JSON (data, paragraphs, qas, answers), got "
            f"something else: {' '.join(repr(error).split())[:100]}"
        ) from None


def _hub(task: Task, place: str) -> Rows:
    datasets = datasets_library(f"tasks: {place}", _instead(task))
    with hub_faults(f"tasks: {task.name}", place, _instead(task)):
        rows = load_split(datasets, place.removeprefix(HUB))
    return _dataset(task, rows)


def _saved(task: Task, folder: Path) -> Rows:
    """A data set as ``datasets`` saves it."""
    datasets = datasets_library(f"tasks: {folder}", _instead(task))
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(
            f"tasks: {folder} must be a data set as save_to_disk writes it, got: "
            f"{reason_of(error)}; name a file or such a folder"
        ) from None
    if isinstance(found, dict):
        raise UserError(
            f"tasks: {folder} must be one split of a saved data set, got {', '.join(found)}; name "
            f"one, as in {folder / next(iter(found), 'train')}"
        )
    return _dataset(task, found)


def _instead(task: Task) -> str:
    return "name a file" if any(task.files) else "set tasks.data to a folder that holds it"


def _dataset(task: Task, rows: Any) -> Rows:
    """Rows of a data set; classes that it numbers get their names."""
    feature = (getattr(rows, "features", None) or {}).get(task.hub_columns[-1])
    return _with_names(task, rows, getattr(getattr(feature, "feature", feature), "names", None))


def _with_names(task: Task, rows: Any, names: Sequence[str] | None) -> Rows:
    """Rows, numbered, with the names of their classes."""
    target = task.hub_columns[-1]
    if names is None or not any(task.files):
        return _numbered(rows)

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return list(map(named, value))
        return names[value] if value is not None and value >= 0 else None  # -1: not known

    return _numbered({**row, target: named(row[target])} for row in rows)
