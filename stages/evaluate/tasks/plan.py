"""What to run: one job per task, model and seed, each with a key of what it depends on."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distilcache.data.errors import UserError, require, tell
from distilcache.data.storage.files import sha256_json
from distilcache.stages.evaluate.tasks.altered import Copies
from distilcache.stages.evaluate.tasks.catalogue import CLASSES, SCORE, TAGS
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.examples import TaskData
from distilcache.stages.evaluate.tasks.finetune import steps_of
from distilcache.stages.evaluate.tasks.jobs import DISTIL, Job
from distilcache.stages.evaluate.tasks.task_models import Candidate
from distilcache.stages.models.special_tokens import puts_between
from distilcache.stages.models.trimmed_ids import TrimmedIds

VERSION = 3
"""Part of every job's key. Increase it when a code change alters the figures of equal settings, so
that finished runs are run again."""
COPIES_VERSION = 1
"""The same for the altered copies."""


def plan_jobs(
    tasks: Sequence[TaskData],
    models: Sequence[Candidate],
    config: TasksConfig,
    out: Path,
    dtype: str,
) -> list[Job]:
    """All jobs; the teacher's job comes before those that learn from it."""
    models = sorted(models, key=lambda model: model.entry.role != "teacher")
    jobs = []
    for data in tasks:
        plan = _TaskPlan(data, models, config, out / data.task.name, dtype.removeprefix("torch."))
        for seed in config.seeds:
            teacher = None
            for model in models:
                if model.entry.role == "teacher":
                    teacher = plan.job(model, seed, gives_soft=config.distil)
                    jobs.append(teacher)
                    continue
                jobs.append(plan.job(model, seed))
                if config.distil:
                    jobs.append(plan.job(model, seed, soft_from=teacher))
    return jobs


def longest(data: TaskData, models: Sequence[Candidate], config: TasksConfig) -> tuple[int, str]:
    """Tokens per example, the same for all models, and what lets longer texts in."""
    wanted = config.long_max_length if data.task.long else config.max_length
    least = min(models, key=lambda model: model.positions)
    if wanted < least.positions:
        return wanted, "raise tasks.max_length"
    return least.positions, f"{least.entry.name} reads no more"


def _trimmed(models: Sequence[Candidate]) -> dict[str, TrimmedIds]:
    """The ids of students whose tokenizer is a part of the teacher's, by name.

    Raises:
        UserError: A student has another tokenizer.
    """
    teacher, *students = models
    others = [m for m in students if m.tokenizer_hash != teacher.tokenizer_hash]
    found = {}
    for model in others:
        try:
            found[model.entry.name] = TrimmedIds.of_student(teacher.entry.path, model.entry.path)
        except UserError as error:
            raise UserError(
                "tasks: distil_copies must be 0 where students have another tokenizer than the "
                f"teacher, which alters the tokens, got {model.entry.name} ({error})"
            ) from None
    return found


def _tell_no_separator(data: TaskData, models: Sequence[Candidate]) -> None:
    """One line where no token shows a model where the second of two texts begins."""
    names = [m.entry.name for m in models if not puts_between(m.tokenizer)]
    if names and len(data.train.texts) == 2:
        tell(
            f"tasks: {data.task.name} has pairs of texts, and the tokenizer of {', '.join(names)} "
            "puts no token between the two: only token types may tell a model where the second "
            "begins"
        )


class _TaskPlan:
    """Makes the jobs of one task."""

    def __init__(
        self,
        data: TaskData,
        models: Sequence[Candidate],
        config: TasksConfig,
        out: Path,
        dtype: str,
    ) -> None:
        self.data, self.config, self.out, self.dtype = data, config, out, dtype
        _tell_no_separator(data, models)
        self.fingerprint = data.fingerprint
        self.max_length, self.longer = longest(data, models, config)
        self.trimmed = _trimmed(models) if config.distil_copies else {}
        self.copies = self._copies(models[0]) if config.distil_copies else None
        if config.distil:
            self._require_one_tokenizer(models)

    def _copies(self, teacher: Candidate) -> Copies:
        """Altered copies of the examples, the same for all seeds."""
        identity = {
            "version": COPIES_VERSION,
            "data": self.fingerprint,
            "weights": teacher.weights,
            "tokenizer": teacher.tokenizer_hash,
            "max_length": self.max_length,
            "dtype": self.dtype,
            "count": self.config.distil_copies,
        }
        return Copies(
            count=self.config.distil_copies,
            teacher=teacher.entry,
            path=self.out / "copies.safetensors",
            key=sha256_json(identity),
        )

    def job(
        self,
        model: Candidate,
        seed: int,
        *,
        soft_from: Job | None = None,
        gives_soft: bool = False,
    ) -> Job:
        """The job of one model and seed."""
        task = self.data.task
        own = {"labels": task.labels, "metrics": task.metrics} if any(task.files) else {}
        counts = {"counts": "all words"} if task.kind == TAGS else {}
        identity = {
            "task": task.name,
            **own,
            **counts,
            "data": self.fingerprint,
            "weights": model.weights,
            "tokenizer": model.tokenizer_hash,
            "seed": seed,
            "settings": self._settings() | (self._distil_settings(soft_from) if soft_from else {}),
        }
        name = model.entry.name + (DISTIL if soft_from else "")
        return Job(
            data=self.data,
            model=model,
            seed=seed,
            max_length=self.max_length,
            longer=self.longer,
            key=sha256_json(identity),
            path=self.out / f"{name}-seed{seed}.json",
            soft_from=soft_from,
            gives_soft=gives_soft,
            has_states=self.config.distil_cos > 0 and self.data.task.kind in (CLASSES, SCORE),
            copies=self.copies if soft_from or gives_soft else None,
            trimmed=self.trimmed.get(model.entry.name),
            keeps=seed in self.config.keep,
        )

    def _require_one_tokenizer(self, models: Sequence[Candidate]) -> None:
        """Logits of tokens can be learnt where student and teacher see the same tokens."""
        others = [m.entry.name for m in models if m.tokenizer_hash != models[0].tokenizer_hash]
        require(
            not others or self.data.task.kind in (CLASSES, SCORE),
            f"tasks: distil must be false for {self.data.task.name} where students have another "
            f"tokenizer than the teacher, since they learn its logits token by token, got "
            f"{', '.join(others)}; leave the task out",
        )

    def _settings(self) -> dict[str, Any]:
        names = ("epochs", "min_steps", "batch_size", "lr", "warmup", "weight_decay")
        settings = {name: getattr(self.config, name) for name in names}
        return settings | {"max_length": self.max_length, "dtype": self.dtype, "version": VERSION}

    def _distil_settings(self, teacher: Job) -> dict[str, Any]:
        """Settings of a second distillation; those without effect do not change a job's key."""
        config = self.config
        settings: dict[str, Any] = {
            "teacher": teacher.key,
            "temperature": config.distil_temperature,
            "alpha": config.distil_alpha,
        }
        for name in ("distil_epochs", "distil_cos"):
            if getattr(config, name):
                settings[name] = getattr(config, name)
        examples, without = len(self.data.train), replace(config, distil_min_steps=0)
        if steps_of(examples, config, distilled=True) > steps_of(examples, without, distilled=True):
            settings["distil_min_steps"] = config.distil_min_steps
        if not config.distil_dropout:
            settings["distil_dropout"] = False
        if self.copies:
            settings["copies"] = self.copies.key
        return settings
