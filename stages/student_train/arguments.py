"""What of ``TrainingArguments`` a student from a cache can be trained with, and what is refused."""

import copy
from typing import Any

from torch.nn import Embedding
from transformers import PreTrainedModel, TrainingArguments

from distilcache.data.errors import require
from distilcache.stages.models.device import one_device

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
        args.neftune_noise_alpha is None or not _looks_up_elsewhere(model),
        f"train: neftune_noise_alpha must be None for a student of type "
        f"{model.config.model_type!r}, got {args.neftune_noise_alpha}: Trainer's noise does not "
        "reach the modules that look its tokens up",
    )
    args = copy.copy(args)
    args.logging_nan_inf_filter = False  # It would wait for the device at every step.
    one_device(args)
    return args


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
