"""Tasks stage: fine-tune teacher, students and controls alike, and compare what they reach.

Every finished run is written at once; what is there is not run again, so an interrupted command
goes on, and other weights, data or settings are run anew.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from data.device import keep_freed_memory, resolve_device, resolve_dtype
from data.errors import require
from data.files import locked, remove_temporaries, write_json
from stages.evaluate.models import ModelEntry
from stages.tasks.config import TasksConfig
from stages.tasks.features import Encoded, Soft
from stages.tasks.finetune import Place, fine_tune, predict, predict_with_states, steps_of
from stages.tasks.jobs import LOGITS, STATES, Job, longest, plan_jobs
from stages.tasks.material import Material
from stages.tasks.metrics import majority, measure, require_libraries
from stages.tasks.models import Candidate, load_model, open_candidate
from stages.tasks.progress import Progress
from stages.tasks.readers import TaskData, locate, read_task
from stages.tasks.shared import write_tensor
from stages.tasks.spans import best_answers
from stages.tasks.speed import size_and_speed
from stages.tasks.summary import summarise
from stages.tasks.table import SCORE, SPAN, TASKS, check_names


def run_tasks(
    entries: Sequence[ModelEntry],
    config: TasksConfig,
    out: Path,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Fine-tune every model on every task with every seed, and compare.

    Args:
        entries: Models; at most one of them is the teacher.
        config: Recipe section.
        out: Folder of the runs' figures.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``, ``bfloat16`` or ``float32``.

    Returns:
        ``settings``, ``machine``, ``tasks`` and ``models``; see :func:`summarise`.

    Raises:
        UserError: Bad input, before anything is run; or a run whose loss is no longer finite.
    """
    require_libraries()
    check_names(config.names)
    teachers = [entry for entry in entries if entry.role == "teacher"]
    require(len(teachers) <= 1, f"tasks: teacher must be one model, got {len(teachers)}")
    require(
        bool(teachers) or not config.distil,
        "tasks: distil must have a teacher to learn from, got none; set tasks.distil=false",
    )
    where = resolve_device(device)
    keep_freed_memory(where)
    kind = resolve_dtype(dtype, where)
    models = [open_candidate(entry) for entry in entries]
    tasks = _read(config)
    jobs = plan_jobs(tasks, models, config, out, str(kind))
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, "tasks"):
        remove_temporaries(out)
        place = Place(device=where, dtype=kind, scratch=out)
        results = _run_all(jobs, config, place)
    speed = size_and_speed(models, tasks, config, place)
    return summarise(
        results,
        speed,
        tasks={data.task.name: _facts(data, models, config, results) for data in tasks},
        settings=asdict(config),
        machine=_machine(place),
    )


def _read(config: TasksConfig) -> list[TaskData]:
    """All tasks; what is missing is said before the first is read."""
    if config.data:
        for name in config.names:
            locate(TASKS[name], config.data)
    names = tqdm(config.names, desc="tasks: data", unit="task", disable=None, leave=False)
    return [read_task(TASKS[name], config.data, config.limit) for name in names]


def _facts(
    data: TaskData,
    models: Sequence[Candidate],
    config: TasksConfig,
    results: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What a task is, and what always answering the most frequent label scores."""
    scores: dict[str, float] = {}
    for suffix, part in data.dev.items():
        found = majority(data.task, data.train.labels, part.labels)
        scores |= {f"{name}{suffix}": value for name, value in found.items()}
    return {
        "train": len(data.train),
        "dev": sum(map(len, data.dev.values())),
        "metrics": list(scores),
        "majority": sum(scores.values()) / len(scores),
        "max_length": longest(data, models, config),
        # As many as were taken: the contexts of questions come in pieces.
        "steps": max(
            run["steps"]
            for run in results
            if run["task"] == data.task.name and not run["distilled"]
        ),
    }


def _run_all(jobs: list[Job], config: TasksConfig, place: Place) -> list[dict[str, Any]]:
    """Figures of all jobs, in their order."""
    found: dict[Path, dict[str, Any] | None] = {job.path: job.result() for job in jobs}
    pending = [job for job in jobs if found[job.path] is None]
    if len(pending) < len(jobs):
        print(f"tasks: {len(jobs) - len(pending)} of {len(jobs)} runs found", file=sys.stderr)
    total = sum(_steps(job, len(job.data.train), config) for job in pending)
    material: dict[tuple[str, str], Material] = {}
    with Progress(len(pending), total) as progress:
        for job in pending:
            of = (job.data.task.name, job.model.tokenizer_hash)
            if of not in material:
                material = {of: Material(job)}  # Tasks come one after the other.
            result = _run(job, config, place, material[of], progress)
            write_json(job.path, result)
            found[job.path] = result
            score, seconds = 100 * result["score"], result["seconds"]
            progress.finish(f"{_label(job)}: {score:.1f} in {seconds:,.0f} s")
    return [figures for job in jobs if (figures := found[job.path]) is not None]


def _label(job: Job) -> str:
    return f"{job.data.task.name}: {job.name} seed {job.seed}"


def _run(
    job: Job, config: TasksConfig, place: Place, material: Material, progress: Progress
) -> dict[str, Any]:
    """One fine-tuning and its figures; its logits are written where others learn from them."""
    begun = time.perf_counter()
    task = job.data.task
    # Contexts come in pieces, so that there may be more steps than questions tell.
    steps = _steps(job, len(material.train), config)
    progress.start(_label(job), steps - _steps(job, len(job.data.train), config))
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


def _steps(job: Job, examples: int, config: TasksConfig) -> int:
    """Optimizer steps of a job whose task has that many examples."""
    if job.soft_from is None or not config.distil_epochs:
        return steps_of(examples, config)
    copies = job.copies.count if job.copies else 0
    return math.ceil(config.distil_epochs * math.ceil(examples * (1 + copies) / config.batch_size))


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


def _machine(place: Place) -> dict[str, Any]:
    device = place.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(place.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
