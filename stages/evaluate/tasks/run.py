"""Fine-tune teacher, students and controls alike on tasks, and compare their scores.

The figures of a finished run are written at once, and a finished run is not repeated: an
interrupted command continues, and new weights, data or settings cause new runs. Several commands
with one recipe divide the runs among them, each with a device or cores of its own; all of them end
with the whole table.
"""

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distilcache.data.errors import require
from distilcache.data.progress import Bar
from distilcache.data.storage.files import make_folder, write_json
from distilcache.data.storage.locks import claimed, joined
from distilcache.stages.evaluate.latency import machine, measure_speed
from distilcache.stages.evaluate.masked_lms import ModelEntry
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.examples import TaskData, read_task
from distilcache.stages.evaluate.tasks.finetune import Place
from distilcache.stages.evaluate.tasks.jobs import Job
from distilcache.stages.evaluate.tasks.metrics import majority, require_libraries
from distilcache.stages.evaluate.tasks.one_run import Progress, TokenIds, run_job
from distilcache.stages.evaluate.tasks.places import locate
from distilcache.stages.evaluate.tasks.plan import longest, plan_jobs
from distilcache.stages.evaluate.tasks.summary import summarise
from distilcache.stages.evaluate.tasks.task_models import Candidate, load_model, open_candidate
from distilcache.stages.models.device import resolve_device, resolve_dtype, room_for, settle

POLL_SECONDS = 2.0
"""Between two checks for runs that other commands have finished."""


@room_for("tasks: a model and a batch", "lower tasks.batch_size, which changes the scores")
def run_tasks(
    entries: Sequence[ModelEntry],
    config: TasksConfig,
    out: Path,
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """Fine-tune every model on every task with every seed, and compare.

    At most one of them is the teacher. ``out`` is the folder for the figures of the runs.

    Returns:
        ``settings``, ``machine``, ``tasks`` and ``models``; see :func:`summarise`.

    Raises:
        UserError: Bad input, before anything is run; or a loss that is no longer finite.
    """
    require_libraries()
    teachers = [entry for entry in entries if entry.role == "teacher"]
    require(len(teachers) <= 1, f"tasks: teacher must be one model, got {len(teachers)}")
    require(
        bool(teachers) or not config.distil,
        "tasks: distil must have a teacher to learn from, got none; set tasks.distil=false",
    )
    where = resolve_device(device)
    settle(where)
    models = [open_candidate(entry) for entry in entries]
    kind = resolve_dtype(dtype, where, [model.config for model in models])
    tasks = _read(config)
    jobs = plan_jobs(tasks, models, config, out, str(kind))
    make_folder(out)
    place = Place(device=where, dtype=kind, scratch=out)
    with joined(out):
        results = _run_all(jobs, config, place)
        with claimed(out / "speed", wait=True):  # Two at once slow each other down.
            speed = _size_and_speed(models, tasks, config, place)
    return summarise(
        results,
        {job.name: speed[job.model.entry.name] for job in jobs},
        tasks={data.task.name: _facts(data, models, config, results) for data in tasks},
        settings=asdict(config),
        machine=machine(place.device, place.dtype),
    )


def _read(config: TasksConfig) -> list[TaskData]:
    """All tasks; a missing file is an error before the first is read."""
    for task in config.tasks():
        locate(task, config.data)
    tasks = Bar(config.tasks(), desc="tasks: data", unit="task", leave=False)
    return [read_task(task, config.data, config.limit) for task in tasks]


def _facts(
    data: TaskData,
    models: Sequence[Candidate],
    config: TasksConfig,
    results: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Sizes of a task, and the score of always answering with the most frequent label."""
    scores: dict[str, float] = {}
    for suffix, split in data.dev.items():
        found = majority(data.task, data.train.labels, split.labels)
        scores |= {f"{name}{suffix}": value for name, value in found.items()}
    return {
        "train": len(data.train),
        "dev": sum(map(len, data.dev.values())),
        "metrics": list(scores),
        "majority": sum(scores.values()) / len(scores),
        "max_length": longest(data, models, config)[0],
        # From the runs, since a long context becomes several examples.
        "steps": max(
            r["steps"] for r in results if r["task"] == data.task.name and not r["distilled"]
        ),
    }


def _run_all(jobs: list[Job], config: TasksConfig, place: Place) -> list[dict[str, Any]]:
    """Figures of all jobs, in their order."""
    found: dict[Path, dict[str, Any] | None] = {job.path: job.result() for job in jobs}
    pending = [job for job in jobs if found[job.path] is None]
    if len(pending) < len(jobs):
        print(f"tasks: {len(jobs) - len(pending)} of {len(jobs)} runs found", file=sys.stderr)
    total = sum(job.steps(len(job.data.train), config) for job in pending)
    token_ids: dict[tuple[str, str], TokenIds] = {}
    with contextlib.closing(Progress(len(pending), total)) as progress:
        while pending:
            for job in list(pending):
                figures, ours = _run_if_free(job, config, place, token_ids, progress)
                if figures is None:
                    continue  # Another command works on it, or on its teacher.
                found[job.path] = figures
                pending.remove(job)
                if ours:
                    score, seconds = 100 * figures["score"], figures["seconds"]
                    progress.finish(f"{job.label}: {score:.1f} in {seconds:,.0f} s")
                    break  # Start over: the teacher of an earlier job may be done.
                progress.leave(job.steps(len(job.data.train), config))
            else:
                _require_teachers(pending)
                time.sleep(POLL_SECONDS)
    return [figures for job in jobs if (figures := found[job.path]) is not None]


def _require_teachers(pending: Sequence[Job]) -> None:
    """Refuse to wait for a teacher that is neither done nor pending: the wait would never end."""
    awaited = {job.path for job in pending}
    for job in pending:
        teacher = job.soft_from
        require(
            teacher is None or teacher.path in awaited or teacher.result() is not None,
            f"tasks: {teacher and teacher.path} must stay as it was written, got one of "
            "other settings or weights; another command works there, run one after the other",
        )


def _run_if_free(
    job: Job,
    config: TasksConfig,
    place: Place,
    token_ids: dict[tuple[str, str], TokenIds],
    progress: Progress,
) -> tuple[dict[str, Any] | None, bool]:
    """A job's figures (None: not available yet), and whether it ran here."""
    if job.soft_from is not None and job.soft_from.result() is None:
        return None, False
    with claimed(job.path) as free:
        if not free:
            return None, False
        if (figures := job.result()) is not None:
            return figures, False
        of = (job.data.task.name, job.model.tokenizer_hash)
        if of not in token_ids:
            token_ids.clear()  # Tasks come one after the other.
            token_ids[of] = TokenIds(job)
        figures = run_job(job, config, place, token_ids[of], progress)
        write_json(job.path, figures)
        return figures, True


def _size_and_speed(
    models: Sequence[Candidate], tasks: Sequence[TaskData], config: TasksConfig, place: Place
) -> dict[str, dict[str, Any]]:
    """Role, size and speed by model, each as a model of the first task."""
    loaded: list[Any] = [
        load_model(model.entry, tasks[0].task, 0).eval().to(place.device, place.dtype)
        for model in models
    ]
    # Task models of BART read the state at the end token, and want one in every text.
    first = loaded[0].config
    end = first.eos_token_id if getattr(first, "is_encoder_decoder", False) else None
    timed = measure_speed(
        loaded,
        max_length=longest(tasks[0], models, config)[0],
        vocab_size=min(made.config.vocab_size for made in loaded),
        batch_size=config.batch_size,
        repeats=config.latency_repeats,
        device=place.device,
        end_id=end,
    )
    return {
        model.entry.name: {
            "role": model.entry.role,
            "params": made.num_parameters(),
            "size_mb": 4 * made.num_parameters() / 1e6,  # Of float32 weights.
            # Models of one shape are equally fast (ALBERT's layers share parameters).
            "layers": getattr(made.config, "num_hidden_layers", None),
            "heads": getattr(made.config, "num_attention_heads", None),
            **asdict(speed),
        }
        for model, made, speed in zip(models, loaded, timed, strict=True)
    }
