"""One fine-tuning: its figures, and what it leaves for others to learn from."""

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distilcache.data.errors import require
from distilcache.stages.evaluate.tasks.catalogue import SCORE, SPAN
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.features import Encoded, Soft
from distilcache.stages.evaluate.tasks.finetune import (
    Place,
    distil_steps_of,
    fine_tune,
    predict,
    predict_with_states,
    steps_of,
)
from distilcache.stages.evaluate.tasks.jobs import LOGITS, STATES, Job
from distilcache.stages.evaluate.tasks.material import Material
from distilcache.stages.evaluate.tasks.metrics import measure
from distilcache.stages.evaluate.tasks.progress import Progress
from distilcache.stages.evaluate.tasks.shared import write_tensor
from distilcache.stages.evaluate.tasks.spans import best_answers
from distilcache.stages.evaluate.tasks.task_models import load_model


def label(job: Job) -> str:
    """For people."""
    return f"{job.data.task.name}: {job.name} seed {job.seed}"


def run_job(
    job: Job, config: TasksConfig, place: Place, material: Material, progress: Progress
) -> dict[str, Any]:
    """One fine-tuning and its figures; its logits are written where others learn from them."""
    begun = time.perf_counter()
    task = job.data.task
    # Contexts come in pieces, so that there may be more steps than questions tell.
    steps = steps_of_job(job, len(material.train), config)
    progress.start(label(job), steps - steps_of_job(job, len(job.data.train), config))
    train = material.with_copies(job, place)
    model = load_model(job.model.entry, task, job.seed)
    figures = fine_tune(
        model,
        task.kind,
        train if job.soft_from else material.train,
        config,
        seed=job.seed,
        place=place,
        steps=steps,
        soft=_soft(job, len(material.train), config),
        step_done=progress.step,
    )
    metrics = _metrics(model, job, material, config, place)
    if job.gives_soft:
        _write_soft(model, job, train, config, place)
    return {
        "key": job.key,
        "task": task.name,
        "model": job.name,
        "role": job.model.entry.role,
        "distilled": job.soft_from is not None,
        "seed": job.seed,
        "metrics": metrics,
        "score": sum(metrics.values()) / len(metrics),
        "examples": len(train if job.soft_from else material.train),
        **figures,
        "seconds": round(time.perf_counter() - begun, 3),
    }


def _write_soft(
    model: nn.Module, job: Job, train: Encoded, config: TasksConfig, place: Place
) -> None:
    """What a fine-tuned teacher says of the examples, and copies of them, for its students."""
    if job.has_states:
        logits, states = predict_with_states(model, train, config.batch_size, place)
        _require_finite(states, job)
        write_tensor(job.states_path, STATES, states, job.soft_key)
    else:
        logits = predict(model, job.data.task.kind, train, config.batch_size, place)
    _require_finite(logits, job)
    write_tensor(job.soft_path, LOGITS, logits, job.soft_key)


def steps_of_job(job: Job, examples: int, config: TasksConfig) -> int:
    """Optimizer steps of a job whose task has that many examples."""
    return (distil_steps_of if job.soft_from else steps_of)(examples, config)


def _soft(job: Job, originals: int, config: TasksConfig) -> Soft | None:
    """The teacher's part of a job's loss; copies have no labels of their own."""
    if job.soft_from is None:
        return None
    logits = job.soft_from.soft()
    assert logits is not None, "the teacher's job comes first"
    share = torch.ones(len(logits))
    share[:originals] = config.distil_alpha
    return Soft(logits, share, job.soft_from.states() if job.has_states else None)


def _metrics(
    model: nn.Module, job: Job, material: Material, config: TasksConfig, place: Place
) -> dict[str, float]:
    """Of all held-out parts."""
    task = job.data.task
    metrics: dict[str, float] = {}
    for suffix, encoded in material.dev.items():
        part = job.data.dev[suffix]
        logits = _predict(model, job, encoded, config, place)
        found = measure(task, _predictions(task.kind, logits, encoded, part.texts), part.labels)
        metrics |= {f"{name}{suffix}": value for name, value in found.items()}
    return metrics


def _predict(
    model: nn.Module, job: Job, encoded: Encoded, config: TasksConfig, place: Place
) -> NDArray[np.float32]:
    """Logits, which must be numbers."""
    logits = predict(model, job.data.task.kind, encoded, config.batch_size, place)
    _require_finite(logits, job)
    return logits


def _require_finite(values: NDArray[Any], job: Job) -> None:
    require(
        bool(np.isfinite(values).all()),
        f"tasks: fine-tuning {job.name} on {job.data.task.name} must stay finite, got other "
        f"values with seed {job.seed}; lower tasks.lr or raise tasks.warmup",
    )


def _predictions(kind: str, logits: Any, encoded: Encoded, texts: tuple[list[str], ...]) -> Any:
    """Logits to class numbers, scores, or texts of answers."""
    if kind == SPAN:
        assert encoded.pieces is not None
        return best_answers(logits, encoded.pieces, texts[1])
    return logits[:, 0] if kind == SCORE else logits.argmax(axis=-1)
