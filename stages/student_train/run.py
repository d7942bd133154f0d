"""Stage two: train one student from a teacher cache.

Output folder::

    out/training.json              settings of the run; its result once it is complete
    out/checkpoints/               newest two, see checkpoints.py
    out/metrics.jsonl              loss terms, learning rate, gradient norm, tokens/s
    out/tensorboard/               the same for TensorBoard
    out/config.json, model.safetensors, tokenizer, README.md    the finished model
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging as hf_logging

from data.cache import Cache
from data.dataset import CachedBatches
from data.device import keep_freed_memory, resolve_device, resolve_dtype
from data.errors import UserError
from data.files import read_json, write_json
from stages.student_train.callbacks import MetricsCallback, ProgressCallback, StopCallback
from stages.student_train.checkpoints import complete_checkpoints, step_of
from stages.student_train.config import StudentConfig, TrainConfig
from stages.student_train.export import CardFacts, export_model
from stages.student_train.model import TERMS, DistillationModel
from stages.student_train.signals import Signals, required_signals
from stages.student_train.student import build_student
from stages.student_train.trainer import (
    Batches,
    DistillationTrainer,
    total_steps,
    training_arguments,
)

FREE_FIELDS = {"logging_steps", "save_steps"}
"""Settings that may change between the parts of one run: they do not touch the weights."""


def train_student(
    *,
    cache_dir: Path | str,
    out: Path,
    size: str,
    student: StudentConfig,
    train: TrainConfig,
    device: str = "auto",
    dtype: str = "auto",
    recipe: dict[str, Any] | None = None,
    role: str = "student",
    teacher_dir: Path | None = None,
) -> dict[str, Any]:
    """Train a student, resume its training, or find that it is done.

    Args:
        cache_dir: A finished teacher cache, folder or URL.
        out: Folder of this student.
        size: ``LAYERSxWIDTH``.
        student: Recipe section.
        train: Recipe section; ``alpha_ce = alpha_cos = 0`` trains by L_mlm alone.
        device: See :func:`data.device.resolve_device`.
        dtype: See :func:`data.device.resolve_dtype`.
        recipe: The whole recipe, for the model card.
        role: ``student``, ``control`` or ``teacher``.
        teacher_dir: Checkpoint whose layers the student starts from; None: the cache's copy.

    Returns:
        Figures of the run: steps, seconds, tokens, tokens_per_s, final loss terms, parameters.

    Raises:
        UserError: Bad input; nothing is written then. Or a signal stopped the run; the same
            command goes on.
    """
    target = resolve_device(device)
    keep_freed_memory(target)
    autocast_dtype = resolve_dtype(dtype, target)
    cache = Cache.open(cache_dir)
    signals = required_signals(cache.encoding, train)
    settings = _settings(cache, size, student, train, role, str(autocast_dtype))
    finished = open_output(out, settings)
    if finished is not None:
        print(f"{role} {size}: complete in {out}, reused", file=sys.stderr)
        return finished
    hf_logging.set_verbosity_error()
    module, dataset = _assemble(cache, size, student, train, signals, teacher_dir)
    write_json(out / "training.json", {"settings": settings})
    figures = fit(
        module,
        dataset,
        train=train,
        out=out,
        device=target,
        dtype=autocast_dtype,
        label=f"{role} {size}",
    )
    figures["parameters"] = sum(p.numel() for p in module.student.parameters())
    facts = CardFacts(
        name=size,
        role=role,
        cache_fingerprint=cache.manifest.fingerprint,
        train=train,
        settings=recipe or settings,
        figures=figures,
    )
    export_model(module.student, tokenizer_dir=cache.teacher_dir, out=out, facts=facts)
    write_json(out / "training.json", {"settings": settings, "result": figures})
    return figures


def _assemble(
    cache: Cache,
    size: str,
    student: StudentConfig,
    train: TrainConfig,
    signals: Signals,
    teacher_dir: Path | None,
) -> tuple[DistillationModel, CachedBatches]:
    """The student inside its losses, and the batches that these losses read."""
    hidden = cache.encoding.hidden_layer()
    module = DistillationModel(
        build_student(
            size=size,
            student=student,
            seed=train.seed,
            encoding=cache.encoding,
            teacher_dir=teacher_dir or cache.teacher_dir,
        ),
        train=train,
        signals=signals,
        lm_head=cache.lm_head() if signals.replays else None,
        hidden_decoder=cache.hidden_decoder() if signals.hidden else None,
        teacher_width=hidden.width if hidden else None,
    )
    dataset = CachedBatches(
        cache,
        batch_size=train.batch_size,
        seed=train.seed,
        window_blocks=train.window_blocks,
        signal=signals.ce,
        hidden=signals.hidden,
        restrict_ce_to_mask=train.restrict_ce_to_mask,
    )
    return module, dataset


def fit(
    module: DistillationModel,
    dataset: Batches,
    *,
    train: TrainConfig,
    out: Path,
    device: torch.device,
    dtype: torch.dtype,
    label: str,
) -> dict[str, Any]:
    """Run the training loop, from the newest complete checkpoint where there is one.

    Returns:
        steps, seconds, tokens, tokens_per_s and the last logged loss terms.

    Raises:
        UserError: A signal stopped the run at a checkpoint, or the loss is no longer finite.
    """
    steps = total_steps(train, dataset.steps_per_epoch)
    checkpoints = complete_checkpoints(out / "checkpoints")
    newest = checkpoints[-1] if checkpoints else None
    done = step_of(newest) if newest else 0
    # Points after the checkpoint come again: TensorBoard drops the old ones.
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)
    progress = ProgressCallback(label)
    with StopCallback() as stop:
        trainer = DistillationTrainer(
            module,
            training_arguments(train, steps=steps, out=out, device=device, dtype=dtype),
            dataset,
            [MetricsCallback(out / "metrics.jsonl"), TensorBoardCallback(writer), progress, stop],
        )
        try:
            if newest is not None and done >= steps:
                trainer.restore(newest)  # Only the export is missing.
            else:
                trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        finally:
            progress.close()
            writer.close()
    if stop.received and trainer.state.global_step < steps:
        raise UserError(
            f"train: stopped by {stop.received} at step {trainer.state.global_step} of {steps}, "
            "checkpoint saved; the same command goes on from there"
        )
    history = trainer.state.log_history if trainer.state.log_history else _history(newest)
    last: dict[str, Any] = next((e for e in reversed(history) if "loss" in e), {})
    return {
        "steps": steps,
        "seconds": round(trainer.seconds, 3),
        "tokens": trainer.tokens,
        "tokens_per_s": round(trainer.tokens / max(trainer.seconds, 1e-9), 1),
        **{name: last[name] for name in ("loss", *TERMS) if name in last},
    }


def _history(checkpoint: Path | None) -> list[dict[str, Any]]:
    if checkpoint is None:
        return []
    state = read_json(checkpoint / "trainer_state.json", "train: checkpoint")
    history: list[dict[str, Any]] = state["log_history"]
    return history


def _settings(
    cache: Cache, size: str, student: StudentConfig, train: TrainConfig, role: str, dtype: str
) -> dict[str, Any]:
    """Everything that the weights of this run depend on."""
    shape = {name: getattr(student, name) for name in ("heads", "ffn", "init", "dropout")}
    return {
        "cache": cache.manifest.fingerprint,
        "role": role,
        "size": size,
        "dtype": dtype.removeprefix("torch."),
        "student": shape,
        "train": asdict(train),
    }


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
    before, now = _flat(stored.get("settings", {})), _flat(settings)
    names = sorted(
        n
        for n in before.keys() | now.keys()
        if before.get(n) != now.get(n) and n.rpartition(".")[2] not in FREE_FIELDS
    )
    if names:
        changes = ", ".join(f"{n} {before.get(n)!r} -> {now.get(n)!r}" for n in names)
        raise UserError(
            f"train: settings must be those that {out} was begun with, got other {changes}; "
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
