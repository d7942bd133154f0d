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

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from distilcache.data.errors import UserError
from distilcache.data.storage.files import hashes_of, read_json, write_bytes, write_json
from distilcache.stages.student_train.checkpoint_folders import MARKER


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
        rng: :func:`~distilcache.stages.student_train.generators.rng_state` of every rank.

    Raises:
        UserError: The disk is full, or the optimizer or the schedule holds what is neither a
            tensor nor plain; nothing of this checkpoint is left.
    """
    moments, plain = _flat(optimizer["state"])
    tensors = {"model": model, "projection": projection, "optimizer": moments}
    trainer = {
        "groups": optimizer["param_groups"],
        "plain": plain,
        "scheduler": dict(scheduler),
        "totals": dict(totals),
        "since_log": dict(since_log),
    }
    with _whole_or_gone(folder):
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


@contextlib.contextmanager
def _whole_or_gone(folder: Path) -> Iterator[None]:
    """A checkpoint that counts from its marker on; nothing of it is left where writing fails."""
    (folder / MARKER).unlink(missing_ok=True)
    try:
        yield
    except TypeError as error:  # of JSON
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            "train: optimizer and schedule must hold tensors and plain values to be saved, got: "
            f"{error}; use others, or save_strategy='no'"
        ) from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _flat(state: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an optimizer's state as ``<parameter>.<name>``, and its plain values."""
    moments = {
        f"{index}.{name}": value
        for index, values in state.items()
        for name, value in values.items()
    }
    tensors = {name: value for name, value in moments.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in moments.items() if name not in tensors}


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
