"""Checkpoints without pickles, in safetensors and JSON; incomplete ones are ignored.

::

    checkpoints/checkpoint-500/
      config.json            with model.safetensors, what ``from_pretrained`` opens
      model.safetensors      the student
      projection.safetensors the map of L_cos, where the student's width is not the teacher's
      optimizer.safetensors  "<parameter>.<name>" for every tensor of the optimizer's state
      rng-<rank>.safetensors random generators of each rank: python, numpy, torch, cuda
      trainer.json           optimizer groups, schedule, totals, losses since the last log line
      trainer_state.json     step, epoch and log history, as transformers reads them
      complete.json          step, and a SHA-256 of each file above; written last: without it the
                             checkpoint is incomplete

Files are checked before use; earlier versions wrote no hashes. Up to 0.2.0 model.safetensors held
the trained tensors alone, as "student.<name>" and "projection.<name>".
"""

import json
import random
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from distilcache.data.errors import UserError
from distilcache.data.storage.files import (
    files_fault,
    hashes_of,
    read_json,
    sync_folder,
    write_bytes,
    write_json,
)

MARKER = "complete.json"
PREFIX = "checkpoint-"
OWN_FILES = re.compile(
    r"(model|projection|optimizer|rng-\d+)\.safetensors"
    r"|(config|trainer|trainer_state|complete)\.json|\..*\.tmp"
)
"""Files of a checkpoint, and those that are being written."""


def write_checkpoint(
    folder: Path,
    *,
    model: Mapping[str, Tensor],
    config: bytes,
    projection: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    state: Mapping[str, Any],
    totals: Mapping[str, float],
    since_log: Mapping[str, Any],
    rng: Sequence[bytes],
) -> None:
    """Write everything that a run needs to go on bit for bit; the marker comes last.

    Args:
        folder: Of this checkpoint.
        model: The student's tensors by name.
        config: Its ``config.json``.
        projection: The tensors of the map of L_cos; none: no file.
        optimizer: Its ``state_dict()``.
        scheduler: ``state_dict()`` of the learning-rate schedule.
        state: transformers' ``TrainerState`` as plain values.
        totals: Seconds and tokens of the run so far.
        since_log: Totals at the last log line, and the sums of the losses since.
        rng: :func:`rng_state` of every rank.

    Raises:
        UserError: The disk is full, or the optimizer or the schedule holds what is neither a
            tensor nor plain; nothing of this checkpoint is left.
    """
    (folder / MARKER).unlink(missing_ok=True)
    moments = {
        f"{index}.{name}": value
        for index, values in optimizer["state"].items()
        for name, value in values.items()
    }
    plain = {name: value for name, value in moments.items() if not isinstance(value, Tensor)}
    tensors = {
        "model": model,
        "projection": projection,
        "optimizer": {name: value for name, value in moments.items() if name not in plain},
    }
    trainer = {
        "groups": optimizer["param_groups"],
        "plain": plain,
        "scheduler": dict(scheduler),
        "totals": dict(totals),
        "since_log": dict(since_log),
    }
    try:
        write_bytes(folder / "config.json", config)
        for name, values in tensors.items():
            ready = {key: value.detach().cpu().contiguous() for key, value in values.items()}
            if ready or name != "projection":
                write_bytes(folder / f"{name}.safetensors", save(ready, {"format": "pt"}))
        for rank, generators in enumerate(rng):
            write_bytes(folder / f"rng-{rank}.safetensors", generators)
        write_json(folder / "trainer.json", trainer)
        write_json(folder / "trainer_state.json", dict(state))
        write_json(folder / MARKER, {"step": state["global_step"], "files": hashes_of(folder)})
    except TypeError as error:  # of JSON
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            "train: optimizer and schedule must hold tensors and plain values to be saved, got: "
            f"{error}; use others, or save_strategy='no'"
        ) from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


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
    """Set the checkpoints of an earlier training that has come further aside; a line says so.

    ``rotate`` would keep them in place of this training's, and it would be resumed from them.
    """
    for path in complete_checkpoints(folder):
        if step_of(path) > step:
            name = _set_aside(path, "earlier")
            print(f"train: {path} is of an earlier training; it is now {name}", file=sys.stderr)


def _set_aside(checkpoint: Path, word: str) -> str:
    """Rename a checkpoint; Trainer sends nothing to the hub whose name begins with ``_``."""
    aside = checkpoint.with_name(f"_{word}-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
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


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one file of a checkpoint, on the CPU.

    Raises:
        UserError: The file is missing or damaged.
    """
    path = folder / f"{name}.safetensors"
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"train: checkpoint file {path} must be readable, got: {error}; delete {folder} to go "
            "on from the checkpoint before it"
        ) from None
    return tensors


def read_trainer(folder: Path) -> dict[str, Any]:
    """What ``trainer.json`` of a checkpoint holds."""
    values: dict[str, Any] = read_json(folder / "trainer.json", "train: checkpoint")
    return values


def read_optimizer(folder: Path) -> dict[str, Any]:
    """The optimizer's ``state_dict``, rebuilt from tensors and JSON."""
    trainer = read_trainer(folder)
    state: dict[int, dict[str, Any]] = {}
    moments = {**read_tensors(folder, "optimizer"), **trainer.get("plain", {})}
    for key, value in moments.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = [
        {n: tuple(v) if isinstance(v, list) and n != "params" else v for n, v in group.items()}
        for group in trainer["groups"]
    ]
    return {"state": state, "param_groups": groups}


def load_tensors(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into parameters of the same names.

    Raises:
        UserError: Names or shapes differ.
    """
    wanted = {name: tuple(p.shape) for name, p in parameters.items()}
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    if wanted != got:
        names = sorted(n for n in wanted.keys() | got.keys() if wanted.get(n) != got.get(n))
        raise UserError(
            f"train: checkpoint must hold this model's tensors, got other {', '.join(names[:3])}; "
            "delete the checkpoints or choose another output"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def rng_state() -> bytes:
    """All random generators of this process, as the content of a safetensors file."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if _on_gpu():
        tensors["cuda"] = torch.cuda.get_rng_state()
    scalars = {
        "python": [version, gauss],
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],
    }
    content: bytes = save(tensors, metadata={"scalars": json.dumps(scalars)})
    return content


def _on_gpu() -> bool:
    """Whether this run uses a GPU: one on a CPU leaves those of the machine alone."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def restore_rng(folder: Path, rank: int, seed: int) -> None:
    """Set all random generators to their state in the checkpoint.

    A rank without one (there are more ranks now) is seeded by ``seed``, the rank and the step.
    """
    path = folder / f"rng-{rank}.safetensors"
    if not path.exists():
        seed_rank(seed, rank, step_of(folder))
        return
    tensors = read_tensors(folder, path.stem)
    with safe_open(path, "pt") as file:
        scalars = json.loads(file.metadata()["scalars"])
    version, gauss = scalars["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    kind, position, has_gauss, cached = scalars["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and _on_gpu():
        torch.cuda.set_rng_state(tensors["cuda"])


def seed_rank(seed: int, rank: int, step: int = 0) -> None:
    """Seed torch so that every rank draws other dropout masks."""
    key = np.array([seed, rank << 40 | step], dtype=np.uint64)
    # torch's generator on a CPU reads only the lower 32 bits of a seed.
    torch.manual_seed(int(np.random.Philox(key=key).random_raw()) % 2**32)
