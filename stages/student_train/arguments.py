"""A run as Trainer takes it: schedule, reports, ``TrainingArguments``, and what is refused."""

import copy
import inspect
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.nn import Embedding, Module
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import SchedulerType

from distilcache.data.errors import UserError, require
from distilcache.stages.models.device import as_recipe_says, one_device, trainer_place
from distilcache.stages.models.families import family_of
from distilcache.stages.student_train.config import TrainConfig

KEPT_CHECKPOINTS = 2
BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow a figure of evaluations during training."""
OF_TRAINER = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
"""What Trainer gives to every schedule."""

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
SCHEDULE = {
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "warmup": "warmup_steps",
    "lr_schedule": "lr_scheduler_type",
    "lr_schedule_kwargs": "lr_scheduler_kwargs",
    "report_to": "report_to",
    "logging_steps": "logging_steps",
    "save_steps": "save_steps",
}
"""Settings of ``[train]`` that ``TrainingArguments`` have with other meanings."""

_FIXED = "the cache decides which sequences make a batch"
_SHARDED = "the student is trained in one process and one piece"
_COMPILED = "the last layer computes only some positions, which torch.compile does not follow"
_FULL_EVAL = "evaluation uses the autocast of bf16"
_AVERAGING = (
    "an optimizer that evaluates with averaged weights, as Trainer saves the others; use AdamW"
)
REFUSED = {
    "fp16": "its loss scale does not reach the losses; use bf16",
    "fp16_full_eval": _FULL_EVAL,
    "bf16_full_eval": _FULL_EVAL,
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "label_smoothing_factor": "the teacher smooths the labels; raise alpha_ce instead",
    "label_names": "the labels are those of the cache",
    "use_liger_kernel": "the losses have kernels of their own",
    "liger_kernel_config": "the losses have kernels of their own",
    "auto_find_batch_size": _FIXED,
    "dataloader_drop_last": _FIXED,
    "train_sampling_strategy": _FIXED,
    "length_column_name": _FIXED,
    "accelerator_config": _FIXED,
    "batch_eval_metrics": "preprocess_logits_for_metrics makes what is kept small",
    "save_only_model": "checkpoints are whole, so that training can go on from them",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint in any case",
    "parallelism_config": _SHARDED,
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
    "deepspeed": _SHARDED,
}
"""Fields of ``TrainingArguments`` that must keep their default, and why."""


def total_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run; an epoch's last step may hold fewer micro-batches."""
    if train.steps:
        return train.steps
    return max(1, math.ceil(train.epochs * math.ceil(steps_per_epoch / train.accumulation)))


def _warmup(train: TrainConfig, steps: int) -> int:
    return math.ceil(train.warmup * steps)


def check_schedule(train: TrainConfig, steps: int = 1000) -> None:
    """Refuse a schedule that Trainer does not have, or that lacks or does not know a setting.

    Raises:
        UserError: Names the schedules or the settings that there are.
    """
    known = [kind.value for kind in SchedulerType if kind.value not in BY_EVALUATION]
    require(
        train.lr_schedule in known,
        f"train: lr_schedule must be one of {', '.join(known)}, got {train.lr_schedule!r}",
    )
    make = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(train.lr_schedule)]
    takes = [n for n in inspect.signature(make).parameters if n not in OF_TRAINER]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=train.lr)
    try:
        if unknown := train.lr_schedule_kwargs.keys() - set(takes):
            raise ValueError(f"no setting {sorted(unknown)[0]!r}")
        schedule = get_scheduler(
            train.lr_schedule, optimizer, _warmup(train, steps), steps, train.lr_schedule_kwargs
        )
        rates = [rate(step) for rate in schedule.lr_lambdas for step in (0, steps // 2, steps - 1)]
        if not all(0 <= rate < math.inf for rate in rates):
            raise ValueError(f"learning rates of {', '.join(f'{rate:g} x lr' for rate in rates)}")
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"train: lr_schedule_kwargs must be what {train.lr_schedule!r} takes "
            f"({', '.join(takes) or 'nothing'}), got {train.lr_schedule_kwargs}: {error}; for "
            f"example --set train.lr_schedule_kwargs.{(takes or ['NAME'])[0]}=..."
        ) from None


def check_reports(train: TrainConfig) -> None:
    """Refuse to report to what is not installed."""
    there = get_available_reporting_integrations()
    for name in train.report_to:
        require(
            name in there,
            f"train: report_to must name installed packages, got {name!r}, which is not; pip "
            f"install {name}, or leave it out",
        )


def training_arguments(
    train: TrainConfig, *, steps: int, out: Path, device: torch.device, dtype: torch.dtype
) -> TrainingArguments:
    """The settings of a run, as Trainer takes them."""
    # Of accelerate, about ddp_broadcast_buffers below.
    warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.lr,
        lr_scheduler_type=train.lr_schedule,
        lr_scheduler_kwargs=train.lr_schedule_kwargs,
        warmup_steps=_warmup(train, steps),
        run_name=out.name,
        weight_decay=train.weight_decay,
        adam_epsilon=train.adam_eps,
        max_grad_norm=train.max_grad_norm,
        logging_steps=train.logging_steps,
        save_strategy="steps",
        save_steps=train.save_steps,
        save_total_limit=KEPT_CHECKPOINTS,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # All ranks read them from the same cache.
        dataloader_pin_memory=False,
        seed=train.seed,
        **trainer_place(device, dtype),
    )
    as_recipe_says(arguments, device)
    return arguments


def checked(args: TrainingArguments, model: PreTrainedModel) -> TrainingArguments:
    """A copy of the arguments for a run; those that were given stay as they are.

    Raises:
        UserError: A field is set that has no place here.
    """
    usual = TrainingArguments(use_cpu=args.use_cpu)
    for name, reason in REFUSED.items():
        value, default = getattr(args, name, None), getattr(usual, name, None)
        require(
            value == default,
            f"train: {name} must be {_short(default)}, got {_short(value)}: {reason}",
        )
    require(
        args.mixed_precision in ("no", "bf16"),  # `accelerate launch` may have another.
        f"train: mixed_precision must be no or bf16, got {args.mixed_precision}: {REFUSED['fp16']}",
    )
    require(
        args.mixed_precision == "no" or family_of(model.config).bfloat16,
        f"train: mixed_precision must be no for a student of type {model.config.model_type!r}, got "
        "bf16: its code in transformers does not run in bfloat16",
    )
    require(
        args.neftune_noise_alpha is None or not _looks_up_elsewhere(model),
        f"train: neftune_noise_alpha must be None for a student of type "
        f"{model.config.model_type!r}, got {args.neftune_noise_alpha}: Trainer's noise does not "
        "reach the modules that look its tokens up",
    )
    require(not args.optim.startswith("schedule_free"), f"train: optim must not be {_AVERAGING}")
    args = copy.copy(args)
    args.logging_nan_inf_filter = False  # It would wait for the device at every step.
    one_device(args)
    return args


def check_optimizers(
    optimizers: tuple[Any, Any],
    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None,
    projection: Module,
) -> None:
    """Refuse optimizers that hold two sets of weights, or that leave out the map of L_cos.

    Raises:
        UserError: One has a method ``eval``, as those of schedulefree; or the map is trained.
    """
    given = (optimizers[0], (optimizer_cls_and_kwargs or [None])[0])
    require(
        not any(hasattr(one, "eval") for one in given),
        f"train: optimizers must not be {_AVERAGING}",
    )
    projects = any(True for _ in projection.parameters())
    require(
        optimizers == (None, None) or not projects,
        "train: optimizers must be (None, None) where the student's width is not the teacher's, "
        "as the map of L_cos is trained as well; use optimizer_cls_and_kwargs",
    )


def _looks_up_elsewhere(model: PreTrainedModel) -> bool:
    """Whether other modules share the weight of the embedding that Trainer adds noise to."""
    table = model.get_input_embeddings()
    return any(
        isinstance(module, Embedding) and module is not table and module.weight is table.weight
        for module in model.modules()
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
