"""What is to be run: one job per task, model and seed, and which of them are done.

::

    <home>/tasks/rte/teacher-seed0.json           figures of one finished run
    <home>/tasks/rte/teacher-seed0.safetensors    its logits for the training examples
    <home>/tasks/rte/teacher-seed0.states.safetensors   its states of [CLS], if any are wanted
    <home>/tasks/rte/copies.safetensors           altered copies of these, if any are wanted
    <home>/tasks/rte/3x384+distil-seed0.json      a student that learned from these as well
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from distilcache.data.errors import require
from distilcache.data.storage.files import sha256_json
from distilcache.stages.evaluate.tasks.altered import Copies
from distilcache.stages.evaluate.tasks.catalogue import SPAN
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.examples import TaskData
from distilcache.stages.evaluate.tasks.finetune import distil_steps_of
from distilcache.stages.evaluate.tasks.shared import has_tensor, read_tensor
from distilcache.stages.evaluate.tasks.task_models import Candidate

VERSION = 2
"""Raised where the same settings would give other figures."""
COPIES_VERSION = 1
"""Raised where they would give other copies."""
DISTIL = "+distil"
LOGITS = "logits"
"""Name of the tensor with a teacher's logits."""
STATES = "states"
"""Name of the tensor with its final hidden states of [CLS]."""


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
    has_states: bool = False
    """Others learn from its states as well, or it from its teacher's."""
    copies: Copies | None = None
    """Copies of the examples that it learns from, or gives logits of."""

    @property
    def name(self) -> str:
        """Of the row that it belongs to."""
        return self.model.entry.name + (DISTIL if self.soft_from else "")

    @property
    def soft_path(self) -> Path:
        """Where its logits go."""
        return self.path.with_suffix(".safetensors")

    def soft(self) -> Tensor | None:
        """Its logits of the examples and their copies; None where they are still to be made."""
        return read_tensor(self.soft_path, LOGITS, self.soft_key)

    @property
    def states_path(self) -> Path:
        """Where its states go."""
        return self.path.with_suffix(".states.safetensors")

    def states(self) -> Tensor | None:
        """Its states of the examples and their copies; None where they are still to be made."""
        return read_tensor(self.states_path, STATES, self.soft_key)

    @property
    def soft_key(self) -> str:
        """Hash of everything that its logits and states depend on."""
        return f"{self.key}:{self.copies.key}" if self.copies else self.key

    def result(self) -> dict[str, Any] | None:
        """Its figures; None where it is still to be run."""
        try:
            found: dict[str, Any] = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("key") != self.key:
            return None
        wanted = [self.soft_path] if self.gives_soft else []
        wanted += [self.states_path] if self.gives_soft and self.has_states else []
        return found if all(has_tensor(path, self.soft_key) for path in wanted) else None


def plan_jobs(
    tasks: Sequence[TaskData],
    models: Sequence[Candidate],
    config: TasksConfig,
    out: Path,
    dtype: str,
) -> list[Job]:
    """All jobs; the teacher's come first in each task."""
    jobs = []
    teachers = [model for model in models if model.entry.role == "teacher"]
    if config.distil_copies:
        _require_one_tokenizer(models, teachers[0])
    for data in tasks:
        common = _Common(
            data=data,
            fingerprint=data.fingerprint,
            max_length=longest(data, models, config),
            config=config,
            out=out / data.task.name,
            dtype=dtype.removeprefix("torch."),
        )
        copies = _copies(common, teachers[0]) if config.distil_copies else None
        for seed in config.seeds:
            teacher = None
            for model in sorted(models, key=lambda m: m.entry.role != "teacher"):
                is_teacher = model.entry.role == "teacher"
                gives = is_teacher and config.distil
                of = copies if gives else None
                job = _job(common, model, seed, gives_soft=gives, copies=of)
                jobs.append(job)
                if is_teacher:
                    teacher = job
                elif config.distil and teacher:
                    jobs.append(_job(common, model, seed, soft_from=teacher, copies=copies))
    return jobs


def _require_one_tokenizer(models: Sequence[Candidate], teacher: Candidate) -> None:
    other = [m.entry.name for m in models if m.tokenizer_hash != teacher.tokenizer_hash]
    require(
        not other,
        "tasks: distil_copies must be 0 where students have another tokenizer than the teacher, "
        f"who alters their tokens, got {', '.join(other)}",
    )


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


def _copies(common: _Common, teacher: Candidate) -> Copies:
    """Copies of one task's examples, the same for all seeds."""
    identity = {
        "version": COPIES_VERSION,
        "data": common.fingerprint,
        "weights": teacher.weights,
        "tokenizer": teacher.tokenizer_hash,
        "max_length": common.max_length,
        "dtype": common.dtype,
        "count": common.config.distil_copies,
    }
    return Copies(
        count=common.config.distil_copies,
        teacher=teacher.entry,
        path=common.out / "copies.safetensors",
        key=sha256_json(identity),
    )


def _job(
    common: _Common,
    model: Candidate,
    seed: int,
    *,
    soft_from: Job | None = None,
    gives_soft: bool = False,
    copies: Copies | None = None,
) -> Job:
    config = common.config
    names = ("epochs", "min_steps", "batch_size", "lr", "warmup", "weight_decay")
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    settings |= {"max_length": common.max_length, "dtype": common.dtype, "version": VERSION}
    if soft_from:
        settings["teacher"] = soft_from.key
        settings["temperature"] = config.distil_temperature
        settings["alpha"] = config.distil_alpha
        for name in ("distil_epochs", "distil_cos"):
            if getattr(config, name):
                settings[name] = getattr(config, name)
        examples, without = len(common.data.train), replace(config, distil_min_steps=0)
        if distil_steps_of(examples, config) > distil_steps_of(examples, without):
            settings["distil_min_steps"] = config.distil_min_steps  # It makes a difference.
        if not config.distil_dropout:
            settings["distil_dropout"] = False
        if copies:
            settings["copies"] = copies.key
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
        has_states=config.distil_cos > 0 and common.data.task.kind != SPAN,
        copies=copies,
    )
