"""Evaluation stage: teacher, students and controls side by side on held-out text."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import require
from distilcache.data.masks.masking import MaskingConfig
from distilcache.stages.evaluate.common_ids import Asked, asked_of, fertilities
from distilcache.stages.evaluate.config import EvaluateConfig
from distilcache.stages.evaluate.heldout import HeldOut, read_heldout
from distilcache.stages.evaluate.latency import (
    Speed,
    machine,
    measure_speed,
    throughput_batch_size,
)
from distilcache.stages.evaluate.masked_lms import ModelEntry, load_model
from distilcache.stages.evaluate.mlm import Quality, measure_quality, quality_batch_size
from distilcache.stages.models.device import resolve_device, resolve_dtype, room_for, settle
from distilcache.stages.models.families import max_length as longest
from distilcache.stages.models.trimmed_ids import TrimmedIds
from distilcache.stages.models.weight_files import weight_files

__all__ = ["ModelEntry", "evaluate_models"]


@room_for("evaluate: the models and a batch", "lower evaluate.batch_size")
def evaluate_models(
    entries: Sequence[ModelEntry],
    corpus_dir: Path,
    masking: MaskingConfig,
    config: EvaluateConfig,
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """Measure quality, agreement with the teacher, size and speed of every model.

    At most one of them is the teacher. The seed of ``masking`` is replaced by ``config.seed``.

    Returns:
        ``heldout`` (the data), ``machine`` and ``models`` (one flat dictionary per entry, in
        order). Agreement is None if no entry is a teacher.

    Raises:
        UserError: No held-out text, or a model that cannot be measured on this corpus.
    """
    teacher = _teacher_of(entries)
    where = resolve_device(device)
    settle(where)
    corpus = Corpus.open(corpus_dir)
    heldout = read_heldout(corpus, masking, sequences=config.sequences, seed=config.seed)
    print(
        f"evaluate: {len(entries)} models on {len(heldout.lengths):,} held-out sequences",
        file=sys.stderr,
    )
    models, trimmed = _opened(entries, corpus, where)
    kind = resolve_dtype(dtype, where, [model.config for model in models])
    asked = asked_of(
        heldout,
        corpus.manifest.vocab_size,
        max(0, corpus.manifest.special_ids["pad"]),  # -1: none; any id does below a mask
        trimmed,
        [longest(model.config) for model in models],
    )
    quality = measure_quality(
        models,
        teacher,
        asked,
        batch_size=quality_batch_size(heldout, corpus.manifest.vocab_size, config.batch_size),
        device=where,
        dtype=kind,
    )
    _require_numbers(entries, quality)
    speed, how = _speeds(models, trimmed, corpus, config, where, kind)
    rows = [_row(*of_one) for of_one in zip(entries, models, quality, speed, strict=True)]
    _add_vocabularies(rows, trimmed, heldout, corpus)
    return {
        "heldout": {
            **_measured_on(asked[0], heldout, trimmed),
            "masking": {**asdict(masking), "seed": config.seed},
            "corpus_fingerprint": corpus.manifest.fingerprint,
        },
        "machine": how,
        "models": rows,
    }


def _teacher_of(entries: Sequence[ModelEntry]) -> int | None:
    """The place of the teacher, if there is one."""
    require(bool(entries), "evaluate: models must name at least one model, got none")
    teachers = [index for index, entry in enumerate(entries) if entry.role == "teacher"]
    require(len(teachers) <= 1, f"evaluate: teacher must be one model, got {len(teachers)}")
    return teachers[0] if teachers else None


def _opened(
    entries: Sequence[ModelEntry], corpus: Corpus, device: torch.device
) -> tuple[list[PreTrainedModel], list[TrimmedIds | None]]:
    """All models on the device; of those that have ids of their own, these."""
    manifest, tokenizer = corpus.manifest, corpus.path / "tokenizer"
    opened = [
        load_model(entry, manifest.vocab_size, manifest.max_length, tokenizer) for entry in entries
    ]
    models: list[Any] = [model for model, _ in opened]
    return [model.to(device) for model in models], [ids for _, ids in opened]


def _require_numbers(entries: Sequence[ModelEntry], quality: Sequence[Quality]) -> None:
    """Refuse a model whose logits are NaN or infinite: no figure would say so."""
    for entry, found in zip(entries, quality, strict=True):
        require(
            isfinite(found.mlm_nll),
            f"evaluate: model {entry.name!r} must give numbers at masked positions, got an MLM "
            f"loss of {found.mlm_nll}; train it again, or move {entry.path} away",
        )


def _speeds(
    models: Sequence[PreTrainedModel],
    trimmed: Sequence[TrimmedIds | None],
    corpus: Corpus,
    config: EvaluateConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[list[Speed], dict[str, Any]]:
    """Speeds of all models, and where and how they were measured; casts the models' weights."""
    vocab_size, max_length = corpus.manifest.vocab_size, corpus.manifest.max_length
    batch = throughput_batch_size(config.batch_size, max_length, vocab_size)
    # A deployed model has its weights cast once; autocast would cast them in every pass.
    cast: list[Any] = list(models)
    speed = measure_speed(
        [model.to(dtype) for model in cast],
        max_length=max_length,
        vocab_size=min([vocab_size, *(len(ids) for ids in trimmed if ids is not None)]),
        batch_size=batch,
        repeats=config.latency_repeats,
        device=device,
    )
    name, plain = str(dtype).removeprefix("torch."), dtype == torch.float32
    return speed, {
        **machine(device, dtype),
        "quality_in": "float32" if plain else f"{name} autocast, losses in float32",
        "speed_in": f"{name} weights, whole masked LM",
        "max_length": max_length,
        "throughput_batch": batch,
    }


def _add_vocabularies(
    rows: Sequence[dict[str, Any]],
    trimmed: Sequence[TrimmedIds | None],
    heldout: HeldOut,
    corpus: Corpus,
) -> None:
    """Where models have ids of their own: how many, and how many more tokens a text is in them."""
    if all(ids is None for ids in trimmed):
        return
    theirs = Tokenizer.from_file(str(corpus.path / "tokenizer" / "tokenizer.json"))
    times = fertilities(heldout, theirs, trimmed)
    for row, ids, fertility in zip(rows, trimmed, times, strict=True):
        size = corpus.manifest.vocab_size if ids is None else len(ids)
        row |= {"vocabulary": size, "fertility": fertility}


def _measured_on(
    asked: Asked, heldout: HeldOut, trimmed: Sequence[TrimmedIds | None]
) -> dict[str, Any]:
    """Counts; which positions and ids are compared, where models have different ones."""
    positions = len(asked.heldout.labels)
    counts: dict[str, Any] = {
        "sequences": len(heldout.lengths),
        "tokens": int(heldout.lengths.sum()),
        "masked_positions": positions,
    }
    if any(ids is not None for ids in trimmed):
        counts["common_ids"] = len(asked.columns_C)
        counts["compared_share"] = positions / len(heldout.labels)
    return counts


def _row(entry: ModelEntry, model: Any, quality: Quality, speed: Speed) -> dict[str, Any]:
    """All figures of one model."""
    return {
        "name": entry.name,
        "role": entry.role,
        "params": model.num_parameters(),
        "size_mb": sum(f.stat().st_size for f in weight_files(entry.path)) / 1e6,
        **asdict(quality),
        **asdict(speed),
    }
