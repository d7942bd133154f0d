"""``distilcache view``: sample a cache, run the students, write one page."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import require
from distilcache.data.storage.files import write_bytes
from distilcache.data.storage.remote import located
from distilcache.pipeline.look.page.assemble import assemble
from distilcache.pipeline.look.page.gather import gather
from distilcache.pipeline.look.page.project import (
    find_models,
    find_students,
    role_of,
    training_curves,
)
from distilcache.pipeline.look.students import Student, name_students, open_student
from distilcache.pipeline.report.text import short_bytes
from distilcache.stages.models.device import resolve_device

MAX_BYTES = 5_000_000
"""Size of a page; sequences that do not fit are left out."""


def view_command(
    path: str,
    *,
    students: Sequence[Path],
    out: Path | None,
    sequences: int,
    seed: int,
    device: str,
) -> tuple[dict[str, Any], str]:
    """Write the page of a cache.

    Args:
        path: Folder or URL of a finished cache.
        students: Folders of masked LMs; empty: those in ``students`` next to the cache.
        out: The page; None: ``view.html`` next to the cache (of a URL: in the working folder).
        sequences: How many are sampled.
        seed: Chooses them.
        device: Where the students run.

    Returns:
        Values for JSON, and the text for people.
    """
    require(sequences >= 1, f"view: --sequences must be 1 or more, got {sequences}")
    require(seed >= 0, f"view: --seed must be 0 or more, got {seed}")
    cache = Cache.open(path)
    place = located(path)
    folder = None if isinstance(place, str) else place.resolve()
    out = out or (folder.parent if folder else Path()) / "view.html"
    require(
        not out.is_dir(),
        f"view: --out must be a file, got the folder {out}; add a name, such as view.html",
    )
    found = list(students) or (find_students(folder) if folder else [])
    opened = _open(found, cache, device)
    print(f"view: {sequences} sequences, {len(found)} students", file=sys.stderr)
    data = gather(
        cache, opened, sequences=sequences, seed=seed, title=_title(path, folder)
    ) | _project_files(found, opened, _project(found, folder))
    page = fit(data, MAX_BYTES)
    write_bytes(out, page)
    values = {
        "path": str(out),
        "bytes": len(page),
        "sequences": len(data["sequences"]),
        "students": [student.name for student in opened],
    }
    text = (
        f"view: {out}: {values['sequences']} sequences, "
        f"{len(opened)} students, {short_bytes(len(page))}; open it in any browser"
    )
    return values, text


def fit(data: dict[str, Any], limit: int) -> bytes:
    """The page; sequences are dropped from the end of ``data`` until it is small enough."""
    page = assemble(data).encode()
    while len(page) > limit and len(data["sequences"]) > 1:
        keep = int(len(data["sequences"]) * min(0.95, limit / len(page)))
        data["sequences"] = data["sequences"][: max(1, keep)]
        page = assemble(data).encode()
    return page


def _open(paths: Sequence[Path], cache: Cache, device: str) -> list[Student]:
    where = resolve_device(device)
    names = name_students(list(paths))
    return [
        open_student(path, name, role_of(path), cache, where)
        for path, name in zip(paths, names, strict=True)
    ]


def _title(path: str, folder: Path | None) -> str:
    """``<project>/<cache>`` of a folder, the URL of a URL."""
    return "/".join(folder.parts[-2:]) if folder else path


def _project(students: Sequence[Path], cache: Path | None) -> Path | None:
    """The folder of the project whose report goes with what is shown: the students', if any."""
    if students:
        return students[0].resolve().parent.parent
    return cache.parent if cache else None


def _project_files(
    paths: Sequence[Path], students: Sequence[Student], project: Path | None
) -> dict[str, Any]:
    training = [
        {"name": student.name, "curves": training_curves(path)}
        for student, path in zip(students, paths, strict=True)
    ]
    return {
        "training": [entry for entry in training if entry["curves"]],
        "models": find_models(project) if project else [],
    }
