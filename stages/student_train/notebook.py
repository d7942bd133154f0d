"""Stage two in a script or a notebook: a student, and a Trainer over a cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from distilcache.data.errors import UserError, as_arguments, require
from distilcache.data.loader.dataset import CachedBatches
from distilcache.data.reading import OpenCache
from distilcache.stages.models.device import resolve_device, resolve_dtype
from distilcache.stages.student_train import student as architecture
from distilcache.stages.student_train.arguments import (
    FROM_ARGUMENTS,
    SCHEDULE,
    check_optimizers,
    check_reports,
    check_schedule,
    total_steps,
    training_arguments,
)
from distilcache.stages.student_train.assembly import batches_of, losses_around
from distilcache.stages.student_train.callbacks import MetricsCallback
from distilcache.stages.student_train.config import StudentConfig
from distilcache.stages.student_train.model import DistillationModel
from distilcache.stages.student_train.notebook_arguments import (
    check_alone,
    check_names,
    check_not_taken,
    check_types,
    checked_ids,
    settled,
)
from distilcache.stages.student_train.resuming import ResumingTrainer
from distilcache.stages.student_train.signals import required_signals
from distilcache.stages.student_train.trimming import trimmed_ids


def build_student(
    cache: OpenCache, size: str = "6x768", *, seed: int = 0, **shape: Any
) -> PreTrainedModel:
    """Make a student for a cache, started from layers of its teacher where the width allows.

    Args:
        cache: From ``distilcache.open_cache``.
        size: As in ``student.sizes`` of a recipe: ``LAYERSxWIDTH`` or a well-known name.
        seed: Of the random weights.
        shape: Fields of the recipe's section ``[student]``: ``family``, ``init``, ``heads``,
            ``ffn``, ``dropout``, ``vocabulary``.

    Returns:
        A Hugging Face masked language model.

    Raises:
        UserError: The size does not fit, or a field is unknown.
    """
    require(
        isinstance(cache, OpenCache),
        f"student: cache must be a cache from open_cache, got {type(cache).__name__}",
    )
    require(
        isinstance(size, str),
        f"student: size must be text such as '6x768', got {size!r}",
    )
    with as_arguments():
        check_names("student", shape, StudentConfig)
        cache.cache.teacher.check()
        student = StudentConfig(**{"sizes": (size,), **shape})
        return architecture.build_student(
            size=size,
            student=student,
            seed=seed,
            encoding=cache.encoding,
            teacher_dir=cache.cache.teacher_dir,
            trimmed=trimmed_ids(cache.cache, student.vocabulary),
        )


class CachedDistillationTrainer(ResumingTrainer):
    """A ``transformers.Trainer`` that trains a student from a cache; no teacher is loaded.

    It takes Trainer's arguments in Trainer's order; ``train_dataset`` is the cache. What it has
    from Trainer: ``train``, ``evaluate``, ``predict``, ``save_model``, ``push_to_hub``, callbacks,
    log history, checkpoints, the best model. Callbacks get the student as ``model``.
    ``train(resume_from_checkpoint=True)`` goes on from the newest complete checkpoint, on
    CPUs bit for bit. Ctrl-C finishes the step, saves a checkpoint and stops with
    ``KeyboardInterrupt``.

    Either pass ``TrainingArguments``, and only those fields of the recipe's section ``[train]``
    that they lack (``temperature``, ``signal``, ``alpha_ce``, ``alpha_mlm``, ``alpha_cos``,
    ``alpha_mse`` ...). Or pass ``output_dir`` and any field of ``[train]`` (``lr``, ``epochs``,
    ``steps``, ``batch_size`` ...): the same fields give the same weights as
    ``distilcache student-train``.

    Evaluation gives ``eval_loss``, the training loss on text that is not trained on, and its terms
    (``eval_ce``, ``eval_mlm`` ...). ``compute_metrics`` gets the student's logits at the M masked
    positions, float32 [M, V], and the original tokens there, [M].

    Args:
        model: The student, from ``build_student`` or of the same kind. It is trained in place.
        args: Trainer's. Fields that have no place here are refused by name.
        data_collator: Not taken: batches come whole from the cache.
        train_dataset: From ``distilcache.open_cache``.
        eval_dataset: A cache of other text; several by name; or a fraction: that many of the
            blocks of ``train_dataset`` are kept for evaluation.
        processing_class: Tokenizer saved in place of the cache's; None for a student of fewer ids.
        model_init: Not taken: ``build_student`` makes the model.
        compute_loss_func: Not taken: the losses are set by ``alpha_ce`` and its kin.
        compute_metrics: See above.
        callbacks: Added to Trainer's.
        optimizers: An optimizer of the student's parameters and a schedule.
        optimizer_cls_and_kwargs: As Trainer's.
        preprocess_logits_for_metrics: As Trainer's.
        output_dir: In place of ``args``: folder of checkpoints, metrics and the finished model.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``; not used with ``args``.
        dtype: ``auto``, ``bfloat16``, ``float32``; not used with ``args``.
        settings: Fields of ``[train]``.

    Raises:
        UserError: An argument is unknown or out of range, or the cache lacks what a loss reads.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: None = None,
        train_dataset: OpenCache | None = None,
        eval_dataset: OpenCache | Mapping[str, OpenCache] | float | None = None,
        processing_class: Any = None,
        model_init: None = None,
        compute_loss_func: None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        output_dir: Path | str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        **settings: Any,
    ) -> None:
        self.cache = check_types(model, args, train_dataset, settings)
        check_not_taken(
            data_collator=data_collator, model_init=model_init, compute_loss_func=compute_loss_func
        )
        require(
            (args is None) != (output_dir is None),
            "train: args or output_dir must be given, and not both",
        )
        check_alone()
        self.names = {**FROM_ARGUMENTS, **SCHEDULE} if args is not None else {}
        with as_arguments(self.names):
            args, train = settled(args, settings, model)
            self.train_settings = train
            cache = self.cache.cache
            self.trimmed = checked_ids(model, cache, processing_class)
            signals = required_signals(cache.encoding, train, trimmed=self.trimmed is not None)
            losses = losses_around(model, cache, train, signals, self.trimmed)
            data_seed = getattr(args, "data_seed", None)
            reads = train if data_seed is None else replace(train, seed=data_seed)
            blocks, kept = self._parts(eval_dataset)
            batches = batches_of(cache, reads, signals, blocks=blocks, trimmed=self.trimmed)
            added = list(callbacks or [])
            self.output_dir = Path(str(output_dir if args is None else args.output_dir))
            if args is None:
                reports = settings.get("report_to", ())
                args = self._arguments(losses, batches, device, dtype, reports)
                added.append(MetricsCallback(self.output_dir / "metrics.jsonl"))
            check_optimizers(optimizers, optimizer_cls_and_kwargs, losses.projection)
            self.eval_batch_size = args.per_device_eval_batch_size
            self.losses_on = {cache: losses}
            super().__init__(
                losses,
                args,
                batches,
                added,
                eval_dataset=self._eval_batches(eval_dataset if kept is None else self.cache, kept),
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )

    def _arguments(
        self,
        losses: DistillationModel,
        batches: CachedBatches,
        device: str,
        dtype: str,
        reports: Sequence[str],
    ) -> TrainingArguments:
        """Those of the recipe; Trainer's own talk and progress bars."""
        train = self.train_settings
        check_reports(train)
        place = resolve_device(device)
        kind = resolve_dtype(dtype, place, [losses.student.config])
        steps = total_steps(train, batches.steps_per_epoch)
        check_schedule(train, steps)
        # First: each that is made lets accelerate begin anew, on the first GPU.
        usual = TrainingArguments(use_cpu=place.type == "cpu")
        args = training_arguments(train, steps=steps, out=self.output_dir, device=place, dtype=kind)
        args.output_dir = str(self.output_dir)
        args.report_to = list(reports)
        args.per_device_eval_batch_size = train.batch_size
        args.log_level, args.disable_tqdm = usual.log_level, usual.disable_tqdm
        return args

    @property
    def student(self) -> PreTrainedModel:
        """The model in training, without its losses."""
        return self.model

    def _get_output_dir(self, trial: Any) -> str:
        """The folder of the checkpoints: with a recipe's fields, where the command puts them."""
        folder = Path(super()._get_output_dir(trial))
        return str(folder if self.names else folder / "checkpoints")

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Sequences, of which an item of the dataset holds many."""
        return int(dataloader.dataset.layout.sequences)  # type: ignore[attr-defined]

    def hyperparameter_search(self, *_: Any, **__: Any) -> None:
        """Refused: it would make students by ``model_init``."""
        raise UserError(
            "train: hyperparameter_search has no place here; use distilcache student-sweep, or "
            "make a trainer for each setting"
        )
