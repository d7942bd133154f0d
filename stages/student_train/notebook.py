"""Stage two in a script or a notebook: a student, and a Trainer over a cache."""

import difflib
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from distilcache.data.errors import UserError, require
from distilcache.data.reading import OpenCache
from distilcache.stages.models.device import one_device, resolve_device, resolve_dtype
from distilcache.stages.student_train import student as architecture
from distilcache.stages.student_train.callbacks import (
    MetricsCallback,
    ProgressCallback,
    StopCallback,
)
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.export import CardFacts, export_model
from distilcache.stages.student_train.run import assemble
from distilcache.stages.student_train.signals import required_signals
from distilcache.stages.student_train.trainer import (
    DistillationTrainer,
    total_steps,
    training_arguments,
)
from distilcache.stages.student_train.training_state import complete_checkpoints

FROM_ARGUMENTS = {
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "adam_eps": "adam_epsilon",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
}
"""Settings of ``[train]``, and their names in ``TrainingArguments``."""
SCHEDULE = ("epochs", "steps", "warmup", "logging_steps", "save_steps")
"""Settings of ``[train]`` that ``TrainingArguments`` have with other meanings."""
CARD_ARGUMENTS = ("num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps", "optim",
                  "bf16")  # fmt: skip
"""Further ``TrainingArguments`` that the model card names."""


def build_student(
    cache: OpenCache, size: str = "6x768", *, seed: int = 0, **shape: Any
) -> PreTrainedModel:
    """Make a student for a cache, started from layers of its teacher where the width allows.

    Args:
        cache: From ``distilcache.open_cache``.
        size: As in ``student.sizes`` of a recipe: ``LAYERSxWIDTH`` or a well-known name.
        seed: Of the random weights.
        shape: Fields of the recipe's section ``[student]``: ``family``, ``init``, ``heads``,
            ``ffn``, ``dropout``.

    Returns:
        A Hugging Face masked language model.

    Raises:
        UserError: The size does not fit, or a field is unknown.
    """
    _check_names("student", shape, StudentConfig)
    cache.cache.check_teacher()
    return architecture.build_student(
        size=size,
        student=StudentConfig(**{"sizes": (size,), **shape}),
        seed=seed,
        encoding=cache.encoding,
        teacher_dir=cache.cache.teacher_dir,
    )


class CachedDistillationTrainer(DistillationTrainer):
    """A ``transformers.Trainer`` that trains a student from a cache; no teacher is loaded.

    ``train()``, ``state.log_history``, callbacks and checkpoints are Trainer's own.
    ``train(resume_from_checkpoint=True)`` goes on bit for bit from the newest complete checkpoint.
    Ctrl-C finishes the step, saves a checkpoint and stops with ``KeyboardInterrupt``.

    Either pass an output folder and fields of the recipe's section ``[train]`` (``lr``, ``epochs``,
    ``steps``, ``batch_size``, ``temperature``, ``alpha_ce`` ...). Or pass ``TrainingArguments`` and
    only those fields that they lack (``temperature``, ``signal``, ``alpha_ce``, ``alpha_mlm``,
    ``alpha_cos``, ``alpha_mse`` ...).

    Args:
        model: The student, from ``build_student`` or of the same kind. It is trained in place.
        cache: From ``distilcache.open_cache``.
        output_dir: Folder of checkpoints, metrics and the finished model.
        args: In place of ``output_dir``. They set schedule and precision. Evaluation during
            training is not supported.
        callbacks: Added to Trainer's.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``; not used with ``args``.
        dtype: ``auto``, ``bfloat16``, ``float32``; not used with ``args``.
        settings: Fields of ``[train]``.

    Raises:
        UserError: A setting is unknown or out of range, or the cache lacks what a loss reads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: OpenCache,
        output_dir: Path | str | None = None,
        *,
        args: TrainingArguments | None = None,
        callbacks: list[TrainerCallback] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        **settings: Any,
    ) -> None:
        _check_names("train", settings, TrainConfig)
        require(
            (args is None) != (output_dir is None),
            "train: output_dir or args must be given, and not both",
        )
        _check_alone()
        train = TrainConfig(**{**settings, **(_settings_of(args, settings) if args else {})})
        self.train_settings = train
        self.cache = cache
        module, batches = assemble(
            cache.cache, model, train, required_signals(cache.encoding, train)
        )
        added = list(callbacks or [])
        if args is None:
            target = resolve_device(device)
            out = Path(str(output_dir))
            steps = total_steps(train, batches.steps_per_epoch)
            args = training_arguments(
                train, steps=steps, out=out, device=target, dtype=resolve_dtype(dtype, target)
            )
            added += [ProgressCallback("student"), MetricsCallback(out / "metrics.jsonl")]
        else:
            out = Path(args.output_dir)
            args.remove_unused_columns = False  # Batches have other keys than the model's inputs.
            args.logging_nan_inf_filter = False  # It would wait for the device at every step.
            one_device(args)
        self.output_dir = out
        self._by_arguments = output_dir is None
        super().__init__(module, args, batches, added)

    @property
    def student(self) -> PreTrainedModel:
        """The model in training, without its losses."""
        return self.model

    def train(
        self, resume_from_checkpoint: str | bool | None = None, **options: Any
    ) -> TrainOutput:
        """Train, or go on from a checkpoint.

        Args:
            resume_from_checkpoint: True: the newest complete one of the output folder; or a path.
            options: See ``transformers.Trainer.train``.

        Raises:
            KeyboardInterrupt: A signal stopped it; a checkpoint is saved.
        """
        if resume_from_checkpoint is True:
            found = complete_checkpoints(Path(self.args.output_dir))
            require(
                bool(found),
                f"train: {self.args.output_dir} must hold a complete checkpoint, got none; call "
                "train() without resume_from_checkpoint",
            )
            resume_from_checkpoint = str(found[-1])
        with StopCallback() as stop:
            self.add_callback(stop)
            try:
                output = super().train(resume_from_checkpoint or None, **options)
            finally:
                self.remove_callback(stop)
        if stop.stops and self.state.global_step < self.state.max_steps:
            raise KeyboardInterrupt(
                f"stopped at step {self.state.global_step} of {self.state.max_steps}, checkpoint "
                "saved; train(resume_from_checkpoint=True) goes on from there"
            )
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student alone, with tokenizer and model card, in plain Hugging Face format.

        Args:
            output_dir: Folder; None: the trainer's output folder.
        """
        out = Path(output_dir) if output_dir else self.output_dir
        out.mkdir(parents=True, exist_ok=True)
        facts = CardFacts(
            name=out.name,
            role="student",
            cache_fingerprint=self.cache.cache.manifest.fingerprint,
            train=self.train_settings,
            settings=self._all_settings(),
            figures={"steps": self.state.global_step, **self.last_losses},
            teachers=self.cache.cache.num_teachers,
        )
        teacher = self.cache.cache.teacher_dir
        export_model(self.student, tokenizer_dir=teacher, out=out, facts=facts)
        print(f"student: {out}", file=sys.stderr)

    def _all_settings(self) -> dict[str, Any]:
        """For the card: the fields of ``[train]``, or ``args`` in place of some of them."""
        ours = {f.name: getattr(self.train_settings, f.name) for f in fields(TrainConfig)}
        if not self._by_arguments:
            return ours
        theirs = self.args.to_dict()
        kept = {name: value for name, value in ours.items() if name not in SCHEDULE}
        return {**kept, "args": {name: theirs[name] for name in CARD_ARGUMENTS}}


def _check_alone() -> None:
    """Refuse to run in several processes: all would train on the same sequences."""
    world = os.environ.get("WORLD_SIZE", "1")
    require(
        world == "1",
        f"train: this trainer must run in one process, got WORLD_SIZE={world}; use distilcache "
        "student-train, with --nproc or under torchrun",
    )


def _settings_of(args: TrainingArguments, settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``[train]`` that ``TrainingArguments`` decide."""
    for name in (*FROM_ARGUMENTS, *SCHEDULE):
        require(
            name not in settings,
            f"train: {name} must be set in args where they are given, got {name}=",
        )
    require(
        not args.label_smoothing_factor,
        f"train: label_smoothing_factor must be 0, got {args.label_smoothing_factor}: the teacher "
        "smooths the labels; raise alpha_ce instead",
    )
    return {ours: getattr(args, theirs) for ours, theirs in FROM_ARGUMENTS.items()}


def _check_names(section: str, given: dict[str, Any], config: type) -> None:
    """Refuse fields that a section does not have, and name the nearest."""
    known = [field.name for field in fields(config)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"{section}: {name!r} must be a field of [{section}]; {hint}")
