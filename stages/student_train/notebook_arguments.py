"""What a script or notebook gives the trainer, and what of it is refused."""

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import UserError, nearest_name, require
from distilcache.data.reading import OpenCache
from distilcache.stages.models.device import check_variables
from distilcache.stages.models.families import max_length
from distilcache.stages.student_train.arguments import FROM_ARGUMENTS, SCHEDULE


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


def check_fit(model: PreTrainedModel | None, cache: Cache) -> None:
    """Refuse a student whose ids are not the cache's, or that takes no sequence of it."""
    if model is None or cache.encoding.mask_only:
        return
    ids, theirs = int(model.config.vocab_size), cache.encoding.vocab_size
    require(
        ids <= theirs,
        f"train: model must have the {theirs:,} ids of the cache's teacher or fewer, got {ids:,}, "
        "so those of another tokenizer; make it with build_student",
    )
    longest, needed = max_length(model.config), cache.encoding.max_length
    require(
        longest is None or longest >= needed,
        f"train: model must take the cache's sequences of {needed} tokens, got one of {longest}",
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


def settings_of(args: TrainingArguments, settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``[train]`` that ``TrainingArguments`` decide."""
    for name in (*FROM_ARGUMENTS, *SCHEDULE):
        require(
            name not in settings,
            f"train: {name} must be set in args where they are given, got {name}=",
        )
    return {ours: getattr(args, theirs) for ours, theirs in FROM_ARGUMENTS.items()}


def check_names(section: str, given: dict[str, Any], config: type) -> None:
    """Refuse fields that a section does not have, and name the nearest."""
    known = [field.name for field in fields(config)]
    for name in given:
        if name not in known:
            hint = nearest_name(name, known)
            raise UserError(f"{section}: {name!r} must be a field of [{section}]; {hint}")
