"""What is to be run: one job per task, model and seed, and which of them are done.

::

    <home>/tasks/rte/teacher-seed0.json           figures of one finished run
    <home>/tasks/rte/teacher-seed0.safetensors    its logits for the training examples
    <home>/tasks/rte/3x384+distil-seed0.json      a student that learned from these as well
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import sha256_json
from stages.tasks.config import TasksConfig
from stages.tasks.models import Candidate
from stages.tasks.readers import TaskData
from stages.tasks.soft import read_soft

VERSION = 2
"""Raised where the same settings would give other figures."""
DISTIL = "+distil"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One fine-tuning."""

    data: TaskData
    model: Candidate
    seed: int
    max_length: int
    key: str
    """Hash of everything that its figures depend on."""
    path: Path
    """Where its figures go."""
    soft_from: "Job | None" = None
    """The teacher's job whose logits it learns from."""
    gives_soft: bool = False
    """Others learn from its logits."""

    @property
    def name(self) -> str:
        """Of the row that it belongs to."""
        return self.model.entry.name + (DISTIL if self.soft_from else "")

    @property
    def soft_path(self) -> Path:
        """Where its logits go."""
        return self.path.with_suffix(".safetensors")

    def result(self) -> dict[str, Any] | None:
        """Its figures; None where it is still to be run."""
        try:
            found: dict[str, Any] = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("key") != self.key:
            return None
        if self.gives_soft and read_soft(self.soft_path, self.key) is None:
            return None
        return found


def plan_jobs(
    tasks: Sequence[TaskData],
    models: Sequence[Candidate],
    config: TasksConfig,
    out: Path,
    dtype: str,
) -> list[Job]:
    """All jobs; the teacher's come first in each task."""
    jobs = []
    for data in tasks:
        common = _Common(
            data=data,
            fingerprint=data.fingerprint,
            max_length=longest(data, models, config),
            config=config,
            out=out / data.task.name,
            dtype=dtype.removeprefix("torch."),
        )
        for seed in config.seeds:
            teacher = None
            for model in sorted(models, key=lambda m: m.entry.role != "teacher"):
                is_teacher = model.entry.role == "teacher"
                job = _job(common, model, seed, gives_soft=is_teacher and config.distil)
                jobs.append(job)
                if is_teacher:
                    teacher = job
                elif config.distil and teacher:
                    jobs.append(_job(common, model, seed, soft_from=teacher))
    return jobs


@dataclass(frozen=True, kw_only=True, slots=True)
class _Common:
    """What the jobs of a task share."""

    data: TaskData
    fingerprint: str
    max_length: int
    config: TasksConfig
    out: Path
    dtype: str


def longest(data: TaskData, models: Sequence[Candidate], config: TasksConfig) -> int:
    """Tokens per example: what is set, and what every model can read, so that all see the same."""
    wanted = config.long_max_length if data.task.long else config.max_length
    return min(wanted, *(model.positions for model in models))


def _job(
    common: _Common,
    model: Candidate,
    seed: int,
    *,
    soft_from: Job | None = None,
    gives_soft: bool = False,
) -> Job:
    config = common.config
    names = ("epochs", "min_steps", "batch_size", "lr", "warmup", "weight_decay")
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    settings |= {"max_length": common.max_length, "dtype": common.dtype, "version": VERSION}
    if soft_from:
        settings["teacher"] = soft_from.key
        settings["temperature"] = config.distil_temperature
        settings["alpha"] = config.distil_alpha
    identity = {
        "task": common.data.task.name,
        "data": common.fingerprint,
        "weights": model.weights,
        "tokenizer": model.tokenizer_hash,
        "seed": seed,
        "settings": settings,
    }
    name = model.entry.name + (DISTIL if soft_from else "")
    return Job(
        data=common.data,
        model=model,
        seed=seed,
        max_length=common.max_length,
        key=sha256_json(identity),
        path=common.out / f"{name}-seed{seed}.json",
        soft_from=soft_from,
        gives_soft=gives_soft,
    )
