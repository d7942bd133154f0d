"""One fine-tuning: its figures, and the files that other runs learn from."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distilcache.data.errors import require
from distilcache.data.progress import Bar
from distilcache.stages.evaluate.tasks.altered import Copies, recut_copies
from distilcache.stages.evaluate.tasks.catalogue import CLASSES, SCORE, TAGS
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.examples import Split
from distilcache.stages.evaluate.tasks.features import Encoded, Soft, encode, tags_of
from distilcache.stages.evaluate.tasks.finetune import Place, fine_tune
from distilcache.stages.evaluate.tasks.jobs import KEPT, LOGITS, STATES, Job
from distilcache.stages.evaluate.tasks.kept import keep_model
from distilcache.stages.evaluate.tasks.metrics import measure
from distilcache.stages.evaluate.tasks.predictions import predict, predict_with_states
from distilcache.stages.evaluate.tasks.remarks import tell_cut, tell_unknown
from distilcache.stages.evaluate.tasks.spans import best_answers
from distilcache.stages.evaluate.tasks.task_models import Candidate, load_model, reads_the_end
from distilcache.stages.evaluate.tasks.tensors import write_tensor


class TokenIds:
    """Token ids of one task for one tokenizer, those of a job; each is made at its first use."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._augmented: tuple[str, Encoded] | None = None

    @cached_property
    def train(self) -> Encoded:
        """Training examples."""
        return self._encoded(self.job.data.train, self.job.model)

    @cached_property
    def dev(self) -> dict[str, Encoded]:
        """Held-out splits."""
        job = self.job
        return {s: self._encoded(split, job.model) for s, split in job.data.dev.items()}

    def _encoded(self, split: Split, model: Candidate) -> Encoded:
        job, left = self.job, reads_the_end(model.config)
        found = encode(job.data.task, split, model.tokenizer, job.max_length, pad_left=left)
        tell_cut(job.data.task, split, found, job.max_length, job.longer)
        tell_unknown(job.data.task, found, model)
        return found

    def with_copies(self, job: Job, place: Place) -> Encoded:
        """Training examples, followed by the altered copies that a job asks for."""
        if job.copies is None:
            return self.train
        if self._augmented is None or self._augmented[0] != job.copies.key:
            found = self._altered(job, job.copies, place)
            self._augmented = (job.copies.key, found)
        return self._augmented[1]

    def _altered(self, job: Job, copies: Copies, place: Place) -> Encoded:
        teacher = (job.soft_from or job).model
        if job.trimmed is None:
            return copies.of(self.train, teacher.tokenizer, place)
        theirs = self._encoded(job.data.train, teacher)
        made = copies.of(theirs, teacher.tokenizer, place)
        return recut_copies(self.train, made, job.trimmed, job.max_length)


class Progress:
    """A bar over the steps of all runs, and a line per finished run."""

    def __init__(self, runs: int, steps: int) -> None:
        self.runs, self.total = runs, steps
        self.done = self.finished = 0
        self._begun = time.perf_counter()
        self._bar: Any = Bar(total=steps, unit="step")

    def close(self) -> None:
        """Leave the terminal in order."""
        self._bar.close()

    def start(self, label: str, more: int) -> None:
        """Name the run that begins, which has ``more`` steps than expected."""
        self._resize(more)
        self._bar.set_description(f"{label} {self.finished + 1}/{self.runs}")

    def prepared(self) -> None:
        """Leave the time since the last step out of the rate: no step was taken in it."""
        self._bar.unpause()

    def step(self) -> None:
        """Count a step."""
        self.done += 1
        self._bar.update()

    def leave(self, steps: int) -> None:
        """Take out a run that another command has done."""
        self.runs -= 1
        self._resize(-steps)

    def finish(self, line: str) -> None:
        """Print the result of a run."""
        self.finished += 1
        seconds = time.perf_counter() - self._begun
        left = Bar.format_interval(seconds / max(self.done, 1) * (self.total - self.done))
        counts = f"{self.finished}/{self.runs}, {left} left"
        self._bar.write(f"tasks: {line} ({counts})", file=sys.stderr)

    def _resize(self, more: int) -> None:
        self.total += more
        self._bar.total = self.total
        self._bar.refresh()


def run_job(
    job: Job, config: TasksConfig, place: Place, token_ids: TokenIds, progress: Progress
) -> dict[str, Any]:
    """Fine-tune and measure one model; write its logits where others learn from them."""
    begun = time.perf_counter()
    task, originals = job.data.task, len(token_ids.train)
    # A long context becomes several examples, so there may be more steps than questions suggest.
    steps = job.steps(originals, config)
    progress.start(job.label, steps - job.steps(len(job.data.train), config))
    augmented = token_ids.with_copies(job, place)
    train = augmented if job.soft_from else token_ids.train
    _require_one_end(job, [token_ids.train, *token_ids.dev.values()])
    model = load_model(job.model.entry, task, job.seed)
    progress.prepared()
    figures = fine_tune(
        model,
        task.kind,
        train,
        config,
        seed=job.seed,
        place=place,
        steps=steps,
        soft=_soft(job, originals, config),
        step_done=progress.step,
    )
    metrics = _metrics(model, job, token_ids, config, place)
    if job.gives_soft:
        _write_soft(model, job, augmented, config, place)
    kept = {}
    if job.keeps:
        facts = {"metrics": metrics, "settings": asdict(config)}
        dev = next(iter(token_ids.dev.values()))
        kept[KEPT] = keep_model(model, job, train, dev, facts, place)
    return {
        "key": job.key,
        "task": task.name,
        "model": job.name,
        "role": job.model.entry.role,
        "distilled": job.soft_from is not None,
        "seed": job.seed,
        "metrics": metrics,
        "score": sum(metrics.values()) / len(metrics),
        "examples": len(train),
        **figures,
        **kept,
        "seconds": round(time.perf_counter() - begun, 3),
    }


def _require_one_end(job: Job, parts: Sequence[Encoded]) -> None:
    """BART's heads of whole texts read the last end token, and want as many in each text."""
    config, task = job.model.config, job.data.task
    if not getattr(config, "is_encoder_decoder", False) or task.kind not in (CLASSES, SCORE):
        return
    end = config.eos_token_id
    counts = np.concatenate(
        [np.add.reduceat((part.ids == end).astype(int), part.bounds[:-1]) for part in parts]
    )
    others = int((counts > counts.min()).sum())
    require(
        not others,
        f"tasks: text must not hold {job.model.tokenizer.convert_ids_to_tokens(end)!r}, by which "
        f"{job.model.entry.name} knows where a text ends, got {others:,} such texts in "
        f"{task.name}; remove it from them",
    )


def _write_soft(
    model: nn.Module, job: Job, train: Encoded, config: TasksConfig, place: Place
) -> None:
    """Write a fine-tuned teacher's logits, and states, of the examples and their copies."""
    if job.has_states:
        logits, states = predict_with_states(model, train, config.batch_size, place)
        _require_finite(states, job)
        write_tensor(job.states_path, STATES, states, job.soft_key)
    else:
        logits = predict(model, job.data.task.kind, train, config.batch_size, place)
    _require_finite(logits, job)
    write_tensor(job.soft_path, LOGITS, logits, job.soft_key)


def _soft(job: Job, originals: int, config: TasksConfig) -> Soft | None:
    """The teacher's signals for a job's loss; copies have no labels of their own."""
    if job.soft_from is None:
        return None
    logits = job.soft_from.soft()
    if logits is None:
        raise RuntimeError(f"{job.label} must run after {job.soft_from.label}")
    weight = torch.ones(len(logits))
    weight[:originals] = config.distil_alpha
    return Soft(logits, weight, job.soft_from.states() if job.has_states else None)


def _metrics(
    model: nn.Module, job: Job, token_ids: TokenIds, config: TasksConfig, place: Place
) -> dict[str, float]:
    """Metrics of all held-out splits."""
    task, names = job.data.task, job.data.task.labels
    metrics: dict[str, float] = {}
    for suffix, encoded in token_ids.dev.items():
        split = job.data.dev[suffix]
        logits = predict(model, task.kind, encoded, config.batch_size, place)
        _require_finite(logits, job)
        labels = split.labels
        if encoded.windows is not None:
            predictions: Any = best_answers(logits, encoded.windows, split.texts[1])
        elif task.kind == TAGS:
            said = [*names, ""]  # -1, of a word that is cut off, finds the last: none
            predictions, labels = (
                [[said[tag] for tag in row] for row in side]
                for side in (tags_of(logits, encoded, labels), labels)
            )
        else:
            predictions = logits[:, 0] if task.kind == SCORE else logits.argmax(axis=-1)
        found = measure(task, predictions, labels)
        metrics |= {f"{name}{suffix}": value for name, value in found.items()}
    return metrics


def _require_finite(values: NDArray[Any], job: Job) -> None:
    require(
        bool(np.isfinite(values).all()),
        f"tasks: fine-tuning {job.name} on {job.data.task.name} must stay finite, got other "
        f"values with seed {job.seed}; lower tasks.lr or raise tasks.warmup",
    )
