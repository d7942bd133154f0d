"""The output folder of a student: which run it belongs to, and whether that is done."""

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from distilcache.data.errors import UserError, require
from distilcache.data.storage.files import (
    files_fault,
    read_json,
    sha256_json,
    write_json,
)
from distilcache.stages.student_train.checkpoint_folders import newest_sound
from distilcache.stages.student_train.config import RENAMED_SIGNALS, StudentConfig, TrainConfig

FREE_FIELDS = {"logging_steps", "save_steps", "report_to"}
"""Settings that may change when a run is resumed: the weights do not depend on them."""
UNSAID = {
    "vocabulary_fraction": 1.0,
    "lr_schedule": "linear",
    "lr_schedule_kwargs": {},
    "family": "usual",
    "vocabulary": 1,
    "init_layers": [],
    "alpha_rel": 0,
    "relation_heads": 0,
}
"""Settings that runs of before 0.3.0 do not name, and what they were.

Values that are still the default are left out. ``vocabulary_fraction`` is not: 0.2 is its default.
"""
FIGURES = ("steps", "seconds", "tokens_per_s", "parameters")
"""Numbers that the result of a finished run has, besides its loss terms."""


def write_record(student: Path, record: Mapping[str, Any]) -> None:
    """Write what :func:`read_record` reads, with a hash of it."""
    write_json(student / "training.json", {**record, "sha256": sha256_json(record)})


def read_record(student: Path, stage: str) -> dict[str, Any]:
    """A student's ``training.json``: ``settings``, and ``result`` once it is complete.

    Signals have their present names. Records of earlier versions have no hash.

    Args:
        student: Its folder.
        stage: Start of the error line.

    Raises:
        UserError: The file cannot be read, is damaged, or is something else.
    """
    path = student / "training.json"
    record = read_json(path, f"{stage}: training.json")
    found = record if isinstance(record, dict) else {}
    wanted = found.pop("sha256", None)
    require(
        wanted is None or wanted == sha256_json(found),
        f"{stage}: training.json must have the content that was written, got {path} with another "
        f"hash; move {student} away to train anew",
    )
    settings: Any = found.get("settings")
    train: Any = settings.get("train") if isinstance(settings, dict) else None
    figures = found.get("result", dict.fromkeys(FIGURES, 0))
    require(
        isinstance(train, dict)
        and isinstance(figures, dict)
        and all(isinstance(figures.get(name), int | float) for name in FIGURES),
        f"{stage}: training.json must hold the settings of a run, got {path} with something else; "
        f"move {student} away to train anew",
    )
    signal = train.get("signal")
    if isinstance(signal, str):
        train["signal"] = RENAMED_SIGNALS.get(signal, signal)
    return found


def fields_of_record(student: Path, stage: str) -> dict[str, Any]:
    """What a student was trained with: size, dtype, cache and fields of ``student`` and ``train``.

    Fields that a record of an earlier version does not name are what they were then. Those that
    the weights do not depend on are left out.
    """
    settings = read_record(student, stage)["settings"]
    found = {name: settings[name] for name in ("size", "dtype", "cache") if name in settings}
    for section, config in (("student", StudentConfig), ("train", TrainConfig)):
        names = {field.name for field in fields(config)} - FREE_FIELDS
        values = {**UNSAID, **settings.get(section, {})}
        found |= {f"{section}.{k}": v for k, v in values.items() if k in names}
    return found


def fault_of_finished(student: Path, record: Mapping[str, Any]) -> str | None:
    """How a finished student's files differ from what was exported; None: they do not.

    Students of earlier versions have no hashes: weights and configuration must be there.
    """
    if "files" in record:
        return files_fault(student, record["files"])
    names = ("model.safetensors", "config.json")
    return next((f"no {name}" for name in names if not (student / name).is_file()), None)


def require_sound(student: Path, stage: str) -> None:
    """Check the files of a finished student before it is read; other folders pass.

    Args:
        student: Its folder.
        stage: Start of the error line.

    Raises:
        UserError: A file is damaged or gone.
    """
    if not (student / "training.json").is_file():
        return
    record = read_record(student, stage)
    fault = fault_of_finished(student, record) if "result" in record else None
    require(
        fault is None,
        f"{stage}: finished student must be what was exported, got {student}: {fault}; run the "
        "command that trained it again: it exports the student from its checkpoint",
    )


def open_output(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Compare an output folder with the run that wants to use it.

    Returns:
        The figures of the finished run, None where it is still to be done, or exported again.

    Raises:
        UserError: The folder holds another run, or something else.
    """
    path = out / "training.json"
    if not path.is_file():
        if out.is_dir() and any(p for p in out.iterdir() if not p.name.startswith(".")):
            raise UserError(
                f"train: output must be a new folder or one of this project's students, got {out} "
                "with other files; move them away"
            )
        return None
    stored = read_record(out, "train")
    before, now = _flat(stored["settings"]), _flat(settings)
    # Earlier versions did not look into the checkpoint, and a finished student outlives it.
    for one, other in ((before, now), (now, before)):
        one.setdefault("student.init_sha256", other.get("student.init_sha256"))
    names = sorted(
        n
        for n in before.keys() | now.keys()
        if _said(before, n) != _said(now, n) and n.rpartition(".")[2] not in FREE_FIELDS
    )
    if names:
        changes = ", ".join(f"{n} {_said(before, n)!r} -> {_said(now, n)!r}" for n in names)
        back = "set these back to go on"
        if "cache" in names:  # It cannot be set back where it has got more rounds.
            back = "set cache_from back (a cache that has got more rounds counts as another one)"
        raise UserError(
            f"train: settings must be those that {out} was started with, got other {changes}; "
            f"{back}, remove the folder to train anew, or keep it and give the project another "
            "name (with cache_from the same cache serves)"
        )
    result: dict[str, Any] | None = stored.get("result")
    fault = fault_of_finished(out, stored) if result is not None else None
    if fault is None:
        return result
    require(
        newest_sound(out / "checkpoints") is not None,
        f"train: finished student must be what was exported, got {out}: {fault}, and no "
        "checkpoint to export it from; move the folder away to train anew",
    )
    print(f"train: {out}: {fault}; exported again from its checkpoint", file=sys.stderr)
    return None


def _said(settings: Mapping[str, Any], name: str) -> Any:
    return settings.get(name, UNSAID.get(name.rpartition(".")[2]))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
