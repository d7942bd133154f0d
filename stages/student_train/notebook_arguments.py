"""What a script or notebook gives the trainer, and what of it is refused."""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import UserError, nearest_name, require, tell
from distilcache.data.reading import OpenCache
from distilcache.stages.models.device import check_variables
from distilcache.stages.models.families import max_length
from distilcache.stages.models.trimmed_ids import TrimmedIds, read_tokenizer
from distilcache.stages.models.trimmed_tokenizer import ids_of
from distilcache.stages.student_train.arguments import FROM_ARGUMENTS, SCHEDULE, checked
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.trimming import ids_of_student

NOT_TAKEN = {
    "data_collator": "batches come whole from the cache",
    "model_init": "build_student makes the model",
    "compute_loss_func": "alpha_ce and its kin set the losses",
}
"""Arguments of Trainer that have no place here, and why."""


def check_not_taken(**given: Any) -> None:
    """Refuse values for them."""
    for name, value in given.items():
        require(value is None, f"train: {name} must be None, got {value!r}: {NOT_TAKEN[name]}")


def check_types(model: Any, args: Any, cache: Any, settings: Mapping[str, Any]) -> OpenCache:
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


def checked_ids(model: Any, cache: Cache, tokenizer: Any) -> TrimmedIds | None:
    """The student's ids, where it has fewer than its teacher.

    Refuses a student whose ids are not the cache's, or that takes no sequence of it, and a
    tokenizer for one with fewer ids.
    """
    trimmed, encoding = ids_of_student(cache, model.config), cache.encoding
    ids, theirs = int(model.config.vocab_size), encoding.vocab_size
    longest, needed = max_length(model.config), encoding.max_length
    require(
        trimmed is not None or ids == theirs or encoding.mask_only,
        f"train: model must have the {theirs:,} ids of the cache's teacher, or fewer than its "
        f"tokenizer, got {ids:,}; make it with build_student",
    )
    require(
        longest is None or longest >= needed or encoding.mask_only,
        f"train: model must take the cache's sequences of {needed} tokens, got one of {longest}",
    )
    if trimmed is not None:
        require(
            tokenizer is None,
            "train: processing_class must be None for a student with fewer ids than its teacher, "
            f"got {type(tokenizer).__name__}; its own tokenizer is saved with it",
        )
        _check_kept(model, trimmed)
    return trimmed


def _check_kept(model: Any, trimmed: TrimmedIds) -> None:
    """The ids must be those that the cache gives; where nobody can see that, a line says so."""
    name, count = model.name_or_path, len(trimmed)
    seen = bool(name) and (Path(name) / "tokenizer.json").is_file()
    found = ids_of(read_tokenizer(Path(name))) if seen else {}
    if not 0 < len(found) <= count:  # else it is no tokenizer of this model
        tell(
            f"train: the model's {count:,} ids are taken for those that build_student keeps for "
            "this cache"
        )
        return
    require(
        found == ids_of(trimmed.own),
        f"train: model must have the {count:,} ids that build_student keeps for this cache, got "
        f"others in {name}; make it with build_student",
    )


def check_alone() -> None:
    """Refuse to run in several processes: all would train on the same sequences."""
    check_variables()
    world = os.environ.get("WORLD_SIZE", "1")
    require(
        world == "1",
        f"train: this trainer must run in one process, got WORLD_SIZE={world}; use distilcache "
        "student-train, with --nproc or under torchrun",
    )


def settled(
    args: TrainingArguments | None, settings: Mapping[str, Any], model: Any
) -> tuple[TrainingArguments | None, TrainConfig]:
    """The arguments as they are used, and the section ``[train]`` that they and the fields make."""
    check_names("train", settings, TrainConfig)
    if args is None:
        return None, TrainConfig(**settings)
    args = checked(args, model)
    return args, TrainConfig(**settings, **_decided(args, settings))


def _decided(args: TrainingArguments, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``[train]`` that ``TrainingArguments`` decide."""
    for name in (*FROM_ARGUMENTS, *SCHEDULE):
        require(
            name not in settings,
            f"train: {name} must be set in args where they are given, got {name}=",
        )
    return {ours: getattr(args, theirs) for ours, theirs in FROM_ARGUMENTS.items()}


def check_names(section: str, given: Mapping[str, Any], config: type) -> None:
    """Refuse fields that a section does not have, and name the nearest."""
    known = [field.name for field in fields(config)]
    for name in given:
        if name not in known:
            hint = nearest_name(name, known)
            raise UserError(f"{section}: {name!r} must be a field of [{section}]; {hint}")
