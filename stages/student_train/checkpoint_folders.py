"""The folder of checkpoints: which of them are complete and sound, and which go.

What one holds is in ``training_state.py``.
"""

import re
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open

from distilcache.data.errors import UserError
from distilcache.data.storage.files import files_fault, read_json, sync_folder

MARKER = "complete.json"
PREFIX = "checkpoint-"
OWN_FILES = re.compile(
    r"(model|projection|optimizer|rng-\d+)\.safetensors"
    r"|(config|trainer|trainer_state|complete)\.json|\..*\.tmp"
)
"""Files of a checkpoint, and those that are being written."""


def step_of(folder: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(folder.name.removeprefix(PREFIX))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [
        path
        for path in folder.glob(f"{PREFIX}*")
        if path.name.removeprefix(PREFIX).isdecimal() and (path / MARKER).is_file()
    ]
    return sorted(found, key=step_of)


def newest_sound(folder: Path) -> Path | None:
    """The newest complete checkpoint whose files are what was written; one rank calls it.

    Newer ones that are damaged are set aside, as ``_damaged-checkpoint-<step>``; a line says so.
    """
    for path in reversed(complete_checkpoints(folder)):
        fault = fault_of(path)
        if fault is None:
            return path
        name = _set_aside(path, "damaged")
        print(
            f"train: checkpoint {path} is damaged ({fault}); it is now {name}, and the run goes on "
            "from the one before it, or from the start",
            file=sys.stderr,
        )
    return None


def set_later_aside(folder: Path, step: int) -> None:
    """Set checkpoints aside that are further than where a training begins; a line says so.

    ``rotate`` would keep them in place of this training's, and it would be resumed from them.
    """
    for path in complete_checkpoints(folder):
        if step_of(path) > step:
            name = _set_aside(path, "earlier")
            print(
                f"train: {path} is further than step {step}, where this training begins; it is "
                f"now {name}",
                file=sys.stderr,
            )


def _set_aside(checkpoint: Path, word: str) -> str:
    """Rename a checkpoint; Trainer sends nothing to the hub whose name begins with ``_``."""
    number, aside = 1, checkpoint.with_name(f"_{word}-{checkpoint.name}")
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"_{word}-{checkpoint.name}-{number}")
    checkpoint.rename(aside)
    sync_folder(checkpoint.parent)
    return aside.name


def fault_of(folder: Path) -> str | None:
    """What is wrong with a complete checkpoint; None: nothing.

    Those of earlier versions have no hashes: it is checked that their files open.
    """
    try:
        marker = read_json(folder / MARKER, "marker")
        if not isinstance(marker, dict):
            return f"{MARKER} must be an object"
        if folder.name.startswith(PREFIX) and marker.get("step") != step_of(folder):
            return f"{MARKER} must name step {step_of(folder)}"
        if marker.keys() == {"step"}:
            return _fault_without_hashes(folder)
        return files_fault(folder, marker.get("files"))
    except UserError as error:
        return str(error)


def _fault_without_hashes(folder: Path) -> str | None:
    for name, needed in (
        ("trainer.json", {"groups", "scheduler", "totals"}),
        ("trainer_state.json", {"global_step", "log_history"}),
    ):
        values = read_json(folder / name, "train: checkpoint")
        if not isinstance(values, dict) or not needed <= values.keys():
            return f"{name} must hold {', '.join(sorted(needed))}"
    names = {path.name for path in folder.glob("*.safetensors")}
    for name in sorted(names | {"model.safetensors", "optimizer.safetensors", "rng-0.safetensors"}):
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{name} must be readable, got: {error}"
    return None


def rotate(folder: Path, keep: int, best: str | None = None) -> None:
    """Delete all but the newest ``keep`` complete checkpoints, and half-written ones.

    Checkpoints that another trainer of a script wrote into the same folder stay.

    Args:
        folder: Of the checkpoints.
        keep: How many stay, at least 1.
        best: Path of one that stays in any case; it is one of ``keep`` where these are several.
    """
    found = complete_checkpoints(folder)
    kept = [path for path in found if best is not None and path.name == Path(best).name]
    others = [path for path in found if path not in kept]
    kept += others[-max(keep - len(kept), 1) :]
    for path in folder.glob(f"{PREFIX}*"):
        if path not in kept and not _is_foreign(path):
            # The marker first, so that a half-deleted checkpoint is incomplete.
            (path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def _is_foreign(folder: Path) -> bool:
    """Whether it holds a file that no checkpoint of this project has."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
    return not all(OWN_FILES.fullmatch(name) for name in names)
