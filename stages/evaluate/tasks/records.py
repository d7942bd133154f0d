"""Rows of jsonl, parquet, aclImdb and SQuAD files and of the hub, with the hub's column names."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distilcache.data.errors import UserError, require
from distilcache.stages.evaluate.tasks.catalogue import Task

Rows = Iterator[Mapping[str, Any]]


def rows_of(path: Path) -> Rows:
    """Rows of a file or of a folder of reviews.

    Raises:
        UserError: The content does not fit the ending.
    """
    if path.is_dir():
        return _reviews(path)
    return {".parquet": _parquet, ".json": _squad}.get(path.suffix, _jsonl)(path)


def _parquet(path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield from pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"tasks: {path} must be a parquet file, got: {reason}") from None


def _jsonl(path: Path) -> Rows:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        require(
            isinstance(row, dict),
            f"tasks: {path} must hold one JSON object per line, got something else in line "
            f"{number}",
        )
        yield row


def _reviews(path: Path) -> Rows:
    """aclImdb: a file per review, a folder per label."""
    for label in ("neg", "pos"):
        files = sorted((path / label).glob("*.txt"))
        require(bool(files), f"tasks: {path / label} must hold *.txt files, got none")
        for file in files:
            yield {"text": file.read_text(encoding="utf-8"), "label": label}


def _squad(path: Path) -> Rows:
    """Rows of SQuAD v1.1's JSON as the hub has them."""
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        for article in articles:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    given = asked["answers"]
                    answers = {
                        "text": [answer["text"] for answer in given],
                        "answer_start": [answer["answer_start"] for answer in given],
                    }
                    row = {"question": asked["question"], "context": paragraph["context"]}
                    yield {**row, "answers": answers}
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(
            f"tasks: {path} must be SQuAD v1.1's JSON (data, paragraphs, qas, answers), got "
            f"something else: {' '.join(repr(error).split())[:100]}"
        ) from None


def hub_rows(task: Task, split: str) -> Rows:
    """Rows of one split of the task's data set on the hub.

    Raises:
        UserError: ``datasets`` is not installed, or the hub does not serve it.
    """
    name = ":".join((*task.hub, split))
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"tasks: {name} on the hub must be read with the datasets library, got none "
            "installed; pip install -e '.[hub]', or set tasks.data to a folder"
        ) from None
    try:
        yield from datasets.load_dataset(*task.hub, split=split)
    except Exception as error:
        # datasets raises its own types, its builders' and the HTTP client's.
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"tasks: {task.name} must be a data set that the hub serves, got {name}: {reason}; "
            "set tasks.data to a folder that holds it"
        ) from None
