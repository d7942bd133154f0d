"""Stage two in a script or a notebook: a student, and a Trainer over a cache."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import (
    EvalPrediction,
    HubStrategy,
    TrainOutput,
)

from distilcache.data.errors import UserError, as_arguments, nearest_name, require
from distilcache.data.loader.dataset import CachedBatches
from distilcache.data.reading import OpenCache
from distilcache.data.storage.files import make_folder
from distilcache.data.storage.locks import locked
from distilcache.stages.models.cards import PLACE, recorded_origin
from distilcache.stages.models.device import resolve_device, resolve_dtype
from distilcache.stages.student_train import student as architecture
from distilcache.stages.student_train.arguments import (
    FROM_ARGUMENTS,
    SCHEDULE,
    check_reports,
    check_schedule,
    checked,
    total_steps,
    training_arguments,
)
from distilcache.stages.student_train.assembly import batches_of, losses_around
from distilcache.stages.student_train.callbacks import MetricsCallback, StopCallback
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.evaluation import EvaluatingTrainer, held_out
from distilcache.stages.student_train.export import CardFacts, export_model
from distilcache.stages.student_train.run import newest_checkpoint
from distilcache.stages.student_train.signals import required_signals
from distilcache.stages.student_train.training_state import MARKER, fault_of
from distilcache.stages.student_train.trimming import ids_of_student, trimmed_ids

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
            ``ffn``, ``dropout``, ``vocabulary``.

    Returns:
        A Hugging Face masked language model.

    Raises:
        UserError: The size does not fit, or a field is unknown.
    """
    with as_arguments():
        _check_names("student", shape, StudentConfig)
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


class CachedDistillationTrainer(EvaluatingTrainer):
    """A ``transformers.Trainer`` that trains a student from a cache; no teacher is loaded.

    It takes Trainer's arguments in Trainer's order; ``train_dataset`` is the cache. What it has
    from Trainer: ``train``, ``evaluate``, ``predict``, ``save_model``, ``push_to_hub``, callbacks,
    log history, checkpoints, the best model. Callbacks get the student as ``model``.
    ``train(resume_from_checkpoint=True)`` goes on bit for bit from the newest complete checkpoint.
    Ctrl-C finishes the step, saves a checkpoint and stops with ``KeyboardInterrupt``.

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
        processing_class: A tokenizer that is saved with the student in place of the cache's.
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
        self.cache = _check_types(model, args, train_dataset, settings)
        for name, given, reason in (
            ("data_collator", data_collator, "batches come whole from the cache"),
            ("model_init", model_init, "build_student makes the model"),
            ("compute_loss_func", compute_loss_func, "alpha_ce and its kin set the losses"),
        ):
            require(given is None, f"train: {name} must be None, got {given!r}: {reason}")
        require(
            (args is None) != (output_dir is None),
            "train: args or output_dir must be given, and not both",
        )
        _check_alone()
        self.names = {**FROM_ARGUMENTS, **SCHEDULE} if args is not None else {}
        with as_arguments(self.names):
            _check_names("train", settings, TrainConfig)
            if args is not None:
                args = checked(args, model)
                settings |= _settings_of(args, settings)
            train = TrainConfig(**settings)
            self.train_settings = train
            cache = self.cache.cache
            self.trimmed = None if model is None else ids_of_student(cache, model.config)
            trimmed = self.trimmed is not None
            signals = required_signals(cache.encoding, train, trimmed=trimmed)
            losses = losses_around(model, cache, train, signals, self.trimmed)
            data_seed = getattr(args, "data_seed", None)
            reads = train if data_seed is None else replace(train, seed=data_seed)
            blocks, kept = None, None
            if isinstance(eval_dataset, float | int):
                blocks, kept = held_out(len(cache.round_range(0)), eval_dataset)
            batches = batches_of(cache, reads, signals, blocks=blocks, trimmed=self.trimmed)
            added = list(callbacks or [])
            if args is None:
                self.output_dir = Path(str(output_dir))
                check_reports(train)
                args = self._arguments(batches, device, dtype, settings.get("report_to", ()))
                added.append(MetricsCallback(self.output_dir / "metrics.jsonl"))
            else:
                self.output_dir = Path(args.output_dir)
            projects = any(True for _ in losses.projection.parameters())
            require(
                optimizers == (None, None) or not projects,
                "train: optimizers must be (None, None) where the student's width is not the "
                "teacher's, as the map of L_cos is trained as well; use optimizer_cls_and_kwargs",
            )
            self.eval_batch_size = args.per_device_eval_batch_size
            self.losses_on = {cache: losses}
            super().__init__(
                losses,
                args,
                batches,
                added,
                eval_dataset=self._eval_batches(
                    self.cache if kept is not None else eval_dataset, kept
                ),
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )

    def _arguments(
        self, batches: CachedBatches, device: str, dtype: str, reports: Sequence[str]
    ) -> TrainingArguments:
        """Those of the recipe; Trainer's own talk and progress bars."""
        target = resolve_device(device)
        train = self.train_settings
        steps = total_steps(train, batches.steps_per_epoch)
        check_schedule(train, steps)
        args = training_arguments(
            train,
            steps=steps,
            out=self.output_dir,
            device=target,
            dtype=resolve_dtype(dtype, target),
        )
        usual = TrainingArguments(use_cpu=args.use_cpu)
        args.output_dir = str(self.output_dir)
        args.report_to = list(reports)
        args.per_device_eval_batch_size = train.batch_size
        args.log_level, args.disable_tqdm = usual.log_level, usual.disable_tqdm
        return args

    @property
    def student(self) -> PreTrainedModel:
        """The model in training, without its losses."""
        return self.model

    # Training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, or go on from a checkpoint; a run that has taken all of its steps takes no more.

        Args:
            resume_from_checkpoint: True: the newest complete one of the output folder; or a path.
            trial: See ``transformers.Trainer.train``.
            ignore_keys_for_eval: See there.

        Raises:
            KeyboardInterrupt: A signal stopped it; a checkpoint is saved.
            InUse: Another process trains into the output folder.
        """
        with as_arguments(self.names), self._alone(), StopCallback() as stop:
            checkpoint = self._checkpoint(resume_from_checkpoint)
            if checkpoint is not None:
                state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
                steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
                if state.global_step >= steps:
                    return self._finished(checkpoint, state)
            self._clock = None
            self.add_callback(stop)
            try:
                output = super().train(
                    str(checkpoint) if checkpoint else None, trial, ignore_keys_for_eval
                )
            finally:
                self.remove_callback(stop)
        if stop.stops and self.state.global_step < self.state.max_steps:
            raise KeyboardInterrupt(
                f"stopped at step {self.state.global_step} of {self.state.max_steps}, checkpoint "
                "saved; train(resume_from_checkpoint=True) goes on from there"
            )
        return output

    def _alone(self) -> AbstractContextManager[None]:
        """Lock the output folder, unless all that lies there goes to the hub."""
        if self.args.push_to_hub:
            return nullcontext()
        make_folder(self.output_dir)
        return locked(self.output_dir, "train")

    def _checkpoint(self, asked: str | bool | None) -> Path | None:
        """The checkpoint that training goes on from."""
        if not asked:
            return None
        folder = Path(self._get_output_dir(None) if asked is True else asked)
        if asked is True:
            found = newest_checkpoint(folder, self.ranks)
        else:
            found = folder if (folder / MARKER).is_file() else None
        require(
            found is not None,
            f"train: {folder} must hold a complete checkpoint, got none; call train() without "
            "resume_from_checkpoint",
        )
        fault = fault_of(folder) if found == folder else None
        require(
            fault is None,
            f"train: checkpoint must be what was written, got {folder}: {fault}; give another one",
        )
        return found

    def _finished(self, checkpoint: Path, state: TrainerState) -> TrainOutput:
        """What is left of a run that has taken all of its steps."""
        self.restore(checkpoint)
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, self.last_losses.get("loss", 0.0), {})

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

    # The finished model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student alone, with tokenizer and model card, in plain Hugging Face format.

        Args:
            output_dir: Folder; None: the trainer's output folder.
        """
        out = Path(output_dir) if output_dir else self.output_dir
        make_folder(out)
        facts = CardFacts(
            name=out.name,
            role="student",
            cache_fingerprint=self.cache.cache.manifest.fingerprint,
            train=self.train_settings,
            settings=self._all_settings(),
            figures={"steps": self.state.global_step, **self.last_losses},
            teachers=self.cache.cache.num_teachers,
            origin=recorded_origin(self.cache.cache.manifest.provenance),
        )
        teacher = self.cache.cache.teacher_dir
        export_model(self.model, tokenizer_dir=teacher, out=out, facts=facts, trimmed=self.trimmed)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(out)
        print(f"student: {out}", file=sys.stderr)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As Trainer's; tokenizer and model card go with the weights."""
        if self.args.hub_strategy != HubStrategy.END:
            self.save_model(_internal_call=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        **_: Any,
    ) -> None:
        """Add to the card that ``save_model`` has written; Trainer's draft would replace it."""
        path = self.output_dir / "README.md"
        if not path.exists():
            self.save_model(_internal_call=True)
        card = ModelCard.load(path)
        given = [tags] if isinstance(tags, str) else list(tags or [])
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *given]))
        card.data.language = language or card.data.language
        card.data.license = license or card.data.license
        card.text = card.text.replace(PLACE, self.hub_model_id or PLACE)
        card.save(path)

    def _all_settings(self) -> dict[str, Any]:
        """For the card: the fields of ``[train]``, or ``args`` in place of some of them."""
        ours = {f.name: getattr(self.train_settings, f.name) for f in fields(TrainConfig)}
        if not self.names:
            return ours
        theirs = self.args.to_dict()
        kept = {name: value for name, value in ours.items() if name not in SCHEDULE}
        return {**kept, "args": {name: theirs[name] for name in CARD_ARGUMENTS}}


def _check_types(model: Any, args: Any, cache: Any, settings: Mapping[str, Any]) -> OpenCache:
    """The cache; refuses what is not of Trainer's types, and the order of arguments of 0.2.0."""
    require(
        not isinstance(args, OpenCache) and "cache" not in settings,
        "train: args must be TrainingArguments, got a cache; give it as train_dataset=, and the "
        "folder as output_dir=",
    )
    for name, value, kind, maker in (
        ("model", model, PreTrainedModel, "a student from build_student"),
        ("train_dataset", cache, OpenCache, "a cache from open_cache"),
        ("args", args, TrainingArguments, "TrainingArguments"),
    ):
        require(
            isinstance(value, kind) or (name == "args" and value is None),
            f"train: {name} must be {maker}, got {type(value).__name__}",
        )
    given: OpenCache = cache
    return given


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
    return {ours: getattr(args, theirs) for ours, theirs in FROM_ARGUMENTS.items()}


def _check_names(section: str, given: dict[str, Any], config: type) -> None:
    """Refuse fields that a section does not have, and name the nearest."""
    known = [field.name for field in fields(config)]
    for name in given:
        if name not in known:
            hint = nearest_name(name, known)
            raise UserError(f"{section}: {name!r} must be a field of [{section}]; {hint}")
