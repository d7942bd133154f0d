"""Checkpoints without pickles: safetensors and JSON, and complete or not counted.

::

    checkpoints/checkpoint-500/
      model.safetensors      trained tensors (student, projection)
      optimizer.safetensors  "<parameter>.<name>" for every tensor of the optimizer's state
      rng.safetensors        generators: python, numpy, torch, cuda
      trainer.json           optimizer groups, schedule, generator scalars, running totals
      trainer_state.json     step, epoch and log history, as transformers reads them
      complete.json          written last: without it the folder does not count
"""

import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from data.errors import UserError
from data.files import read_json, write_bytes, write_json

MARKER = "complete.json"
PREFIX = "checkpoint-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Everything that a run needs to go on bit for bit."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    """``state_dict()`` of the optimizer."""
    scheduler: Mapping[str, Any]
    """``state_dict()`` of the learning-rate schedule."""
    state: Mapping[str, Any]
    """transformers' ``TrainerState`` as plain values."""
    totals: Mapping[str, float]
    """Running totals of the loop (seconds, tokens)."""


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint with the current random generators; its marker comes last.

    Raises:
        UserError: The disk is full; nothing of this checkpoint is left.
    """
    (folder / MARKER).unlink(missing_ok=True)
    moments = {
        f"{index}.{name}": value
        for index, values in checkpoint.optimizer["state"].items()
        for name, value in values.items()
    }
    rng, rng_scalars = _rng_state()
    trainer = {
        "groups": checkpoint.optimizer["param_groups"],
        "scheduler": dict(checkpoint.scheduler),
        "rng": rng_scalars,
        "totals": dict(checkpoint.totals),
    }
    try:
        for name, tensors in (("model", checkpoint.model), ("optimizer", moments), ("rng", rng)):
            ready = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            write_bytes(folder / f"{name}.safetensors", save(ready))
        write_json(folder / "trainer.json", trainer)
        write_json(folder / "trainer_state.json", dict(checkpoint.state))
        write_json(folder / MARKER, {"step": checkpoint.state["global_step"]})
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


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` complete checkpoints, and half-written ones."""
    kept = complete_checkpoints(folder)[-keep:]
    for path in folder.glob(f"{PREFIX}*"):
        if path not in kept:
            # Without its marker first, so that a half-deleted one does not count.
            (path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


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
    """The plain values of a checkpoint: groups, scheduler, rng, totals."""
    values: dict[str, Any] = read_json(folder / "trainer.json", "train: checkpoint")
    return values


def read_optimizer(folder: Path) -> dict[str, Any]:
    """The optimizer's ``state_dict``, rebuilt from tensors and JSON."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in read_tensors(folder, "optimizer").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = read_trainer(folder)["groups"]
    for group in groups:
        group["betas"] = tuple(group["betas"])
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


def _rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    scalars = {
        "python": [version, gauss],
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],
    }
    return tensors, scalars


def restore_rng(folder: Path) -> None:
    """Set all random generators to where they stood when the checkpoint was written."""
    tensors, scalars = read_tensors(folder, "rng"), read_trainer(folder)["rng"]
    version, gauss = scalars["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    kind, position, has_gauss, cached = scalars["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
