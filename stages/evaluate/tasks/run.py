"""Tasks stage: fine-tune teacher, students and controls alike, and compare what they reach.

Every finished run is written at once; what is there is not run again, so an interrupted command
goes on, and other weights, data or settings are run anew. Several commands with one recipe share
the runs, each with a device or some cores of its own, and all of them end in the whole table.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from distilcache.data.errors import require
from distilcache.data.storage.files import claimed, joined, write_json
from distilcache.stages.evaluate.masked_lms import ModelEntry
from distilcache.stages.evaluate.tasks.catalogue import TASKS, check_names
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.examples import TaskData, locate, read_task
from distilcache.stages.evaluate.tasks.finetune import Place
from distilcache.stages.evaluate.tasks.jobs import Job, longest, plan_jobs
from distilcache.stages.evaluate.tasks.material import Material
from distilcache.stages.evaluate.tasks.metrics import majority, require_libraries
from distilcache.stages.evaluate.tasks.one_run import label, run_job, steps_of_job
from distilcache.stages.evaluate.tasks.progress import Progress
from distilcache.stages.evaluate.tasks.speed import size_and_speed
from distilcache.stages.evaluate.tasks.summary import summarise
from distilcache.stages.evaluate.tasks.task_models import Candidate, open_candidate
from distilcache.stages.models.device import keep_freed_memory, resolve_device, resolve_dtype

POLL_SECONDS = 2.0
"""Between looks at what other commands have finished."""


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
    place = Place(device=where, dtype=kind, scratch=out)
    with joined(out):
        results = _run_all(jobs, config, place)
        with claimed(out / "speed", wait=True):  # Two at once would slow each other down.
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
    total = sum(steps_of_job(job, len(job.data.train), config) for job in pending)
    material: dict[tuple[str, str], Material] = {}
    with Progress(len(pending), total) as progress:
        while pending:
            for job in list(pending):
                figures, ours = _run_if_free(job, config, place, material, progress)
                if figures is None:
                    continue  # Another command is at it, or at its teacher.
                found[job.path] = figures
                pending.remove(job)
                if ours:
                    said = f"{100 * figures['score']:.1f} in {figures['seconds']:,.0f} s"
                    progress.finish(f"{label(job)}: {said}")
                    break  # From the front: the teacher of an earlier one may be done.
                progress.leave(steps_of_job(job, len(job.data.train), config))
            else:
                _require_teachers(pending)
                time.sleep(POLL_SECONDS)
    return [figures for job in jobs if (figures := found[job.path]) is not None]


def _require_teachers(pending: Sequence[Job]) -> None:
    """Whom somebody waits for is still to be run, or there; else the wait would have no end."""
    awaited = {job.path for job in pending}
    for job in pending:
        teacher = job.soft_from
        require(
            teacher is None or teacher.path in awaited or teacher.result() is not None,
            f"tasks: {teacher and teacher.path} must stay as it was written, got one of other "
            "settings or weights; another command works there, run one after the other",
        )


def _run_if_free(
    job: Job,
    config: TasksConfig,
    place: Place,
    material: dict[tuple[str, str], Material],
    progress: Progress,
) -> tuple[dict[str, Any] | None, bool]:
    """A job's figures, None where they cannot be had yet; and whether it was run for them here."""
    if job.soft_from is not None and job.soft_from.result() is None:
        return None, False
    with claimed(job.path) as free:
        if not free:
            return None, False
        if (figures := job.result()) is not None:
            return figures, False
        of = (job.data.task.name, job.model.tokenizer_hash)
        if of not in material:
            material.clear()  # Tasks come one after the other.
            material[of] = Material(job)
        figures = run_job(job, config, place, material[of], progress)
        write_json(job.path, figures)
        return figures, True


def _machine(place: Place) -> dict[str, Any]:
    device = place.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(place.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
