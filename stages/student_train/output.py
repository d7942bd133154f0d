"""The output folder of a student: which run it belongs to, and whether that is done."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import UserError
from distilcache.data.storage.files import read_json
from distilcache.stages.student_train.config import RENAMED_SIGNALS, StudentConfig, TrainConfig

FREE_FIELDS = {"logging_steps", "save_steps"}
"""Settings that may change when a run is resumed: the weights do not depend on them."""


def settings_of(
    cache: Cache, size: str, student: StudentConfig, train: TrainConfig, role: str, dtype: str
) -> dict[str, Any]:
    """Everything that the weights of a run depend on."""
    shape = {name: getattr(student, name) for name in ("heads", "ffn", "init", "dropout")}
    if student.family != "usual":
        shape["family"] = student.family
    losses = asdict(train)
    if train.vocabulary_fraction == 1:  # As in runs of before this field.
        del losses["vocabulary_fraction"]
    return {
        "cache": cache.manifest.fingerprint,
        "role": role,
        "size": size,
        "dtype": dtype.removeprefix("torch."),
        "student": shape,
        "train": losses,
    }


def as_begun(out: Path, train: TrainConfig) -> TrainConfig:
    """The settings of a run, over the whole vocabulary where it was begun so.

    Runs of before 0.3.0 were, and their recipes do not say it.
    """
    path = out / "training.json"
    if train.vocabulary_fraction == 1 or not path.is_file():
        return train
    begun = read_json(path, "train: training.json").get("settings", {}).get("train", {})
    if "alpha_ce" not in begun or "vocabulary_fraction" in begun:
        return train
    return replace(train, vocabulary_fraction=1.0)


def stored_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in a student's ``training.json``, with signals by their present names."""
    settings: dict[str, Any] = record.get("settings", {})
    train = settings.get("train", {})
    if train.get("signal") in RENAMED_SIGNALS:
        train = {**train, "signal": RENAMED_SIGNALS[train["signal"]]}
        settings = {**settings, "train": train}
    return settings


def open_output(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Compare an output folder with the run that wants to use it.

    Returns:
        The figures of the finished run, None where it is still to be done.

    Raises:
        UserError: The folder holds another run, or something else.
    """
    path = out / "training.json"
    if not path.is_file():
        if out.is_dir() and any(p for p in out.iterdir() if not p.name.startswith(".")):
            raise UserError(
                f"train: output must be a new folder or one of this project's students, got {out} "
                "with other files; choose another output or move them away"
            )
        return None
    stored = read_json(path, "train: training.json")
    before, now = _flat(stored_settings(stored)), _flat(settings)
    names = sorted(
        n
        for n in before.keys() | now.keys()
        if before.get(n) != now.get(n) and n.rpartition(".")[2] not in FREE_FIELDS
    )
    if names:
        changes = ", ".join(f"{n} {before.get(n)!r} -> {now.get(n)!r}" for n in names)
        raise UserError(
            f"train: settings must be those that {out} was started with, got other {changes}; "
            "remove the folder to train anew or choose another output"
        )
    result: dict[str, Any] | None = stored.get("result")
    return result


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
