"""Stage two: train one student from a teacher cache.

Output folder::

    out/training.json              settings of the run; its result once it is complete
    out/checkpoints/               newest two, see training_state.py
    out/metrics.jsonl              loss terms, learning rate, gradient norm, tokens/s
    out/tensorboard/               the same for TensorBoard
    out/config.json, model.safetensors, tokenizer, README.md    the finished model
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from distilcache.data.cache.cache import Cache
from distilcache.data.storage.files import make_folder, remove_temporaries
from distilcache.data.storage.locks import locked
from distilcache.stages.models.cards import recorded_origin
from distilcache.stages.models.device import resolve_dtype
from distilcache.stages.models.families import Shape, shape_of
from distilcache.stages.models.trimmed_ids import TrimmedIds
from distilcache.stages.student_train.advice import advice, start_of
from distilcache.stages.student_train.arguments import (
    check_reports,
    check_schedule,
    total_steps,
)
from distilcache.stages.student_train.asked import Run, as_begun, settings_of
from distilcache.stages.student_train.assembly import assemble
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.export import CardFacts, export_model, loss_words
from distilcache.stages.student_train.fitting import fit
from distilcache.stages.student_train.output import open_output, read_record, write_record
from distilcache.stages.student_train.ranks import Ranks, ending_together, join_ranks, say
from distilcache.stages.student_train.signals import required_signals
from distilcache.stages.student_train.student import build_student
from distilcache.stages.student_train.trimming import trimmed_ids
from distilcache.stages.student_train.weights import config_in

LAST_RANKS_SECONDS = 10.0
"""For the ranks of an attempt that failed to be gone, where others have been started anew."""


def train_student(
    *,
    cache_dir: Path | str,
    out: Path,
    size: str,
    student: StudentConfig,
    train: TrainConfig,
    device: str = "auto",
    dtype: str = "auto",
    recipe: dict[str, Any] | None = None,
    role: str = "student",
    teacher_dir: Path | None = None,
) -> dict[str, Any]:
    """Train a student, resume its training, or find that it is done.

    Args:
        cache_dir: A finished teacher cache, folder or URL.
        out: Folder of this student.
        size: ``LAYERSxWIDTH``.
        student: Recipe section.
        train: Recipe section; ``alpha_ce = alpha_cos = 0`` trains by L_mlm alone.
        device: See ``resolve_device``.
        dtype: See ``resolve_dtype``.
        recipe: The whole recipe, for the model card.
        role: ``student``, ``control`` or ``teacher``.
        teacher_dir: Checkpoint whose layers the student starts from; None: the cache's copy.

    Returns:
        Figures of the run: steps, seconds, tokens, tokens_per_s, final loss terms, parameters.

    Raises:
        UserError: Bad input; nothing is written then. Or a signal stopped the run; the same
            command goes on.
        InUse: Another process trains this student.
    """
    ranks, target = join_ranks(device)
    with ending_together():
        check_reports(train)
        cache = Cache.open(cache_dir)
        teacher = config_in(cache.teacher_dir)  # None in mask-only caches
        autocast_dtype = resolve_dtype(dtype, target, [teacher] if teacher else [])
        start_dir = teacher_dir or cache.teacher_dir
        asked = Run(
            cache=cache, out=out, size=size, student=student, train=train, role=role,
            recipe=recipe, start_dir=start_dir,
        )  # fmt: skip
        run = as_begun(asked)
        required_signals(cache.encoding, run.train, trimmed=student.vocabulary != 1)
        settings = settings_of(run, str(autocast_dtype))
        finished = ranks.is_first and open_output(out, settings) is not None
        if ranks.from_first(finished):  # All ranks do what the first one finds.
            say(f"{run.label}: complete in {out}, reused")
            result: dict[str, Any] = read_record(out, "train")["result"]
            return result
        return _trained(run, settings, ranks, target, autocast_dtype)


def _trained(
    run: Run, settings: dict[str, Any], ranks: Ranks, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Train the student, or go on, and export it."""
    hf_logging.set_verbosity_error()
    cache = run.cache
    cache.teacher.check()  # Students begin with its layers and carry its tokenizer.
    trimmed = trimmed_ids(cache, run.student.vocabulary)
    signals = required_signals(cache.encoding, run.train, trimmed=trimmed is not None)
    model = build_student(
        size=run.size,
        student=run.student,
        seed=run.train.seed,
        encoding=cache.encoding,
        teacher_dir=run.start_dir,
        trimmed=trimmed,
        old=run.old,
    )
    module, dataset = assemble(cache, model, run.train, signals, ranks, trimmed)
    check_schedule(run.train, total_steps(run.train, dataset.steps_per_epoch))
    with _begun(run.out, settings, ranks):
        if run.recipe is not None and ranks.is_first:
            _announce(run, model.config, dataset.steps_per_epoch)
        figures = fit(module, dataset, run, ranks, device, dtype)
        figures["parameters"] = sum(p.numel() for p in model.parameters())
        if ranks.is_first:
            files = _export(run, model, trimmed, settings, figures)
            write_record(run.out, {"settings": settings, "result": figures, "files": files})
        ranks.wait()
    return figures


@contextlib.contextmanager
def _begun(out: Path, settings: dict[str, Any], ranks: Ranks) -> Iterator[None]:
    """The output folder, locked and with a record of the run; the first rank sees to it."""
    if not ranks.is_first:
        yield
        return
    make_folder(out)
    patience = LAST_RANKS_SECONDS if ranks.world > 1 else 0.0
    with locked(out, "train", patience=patience):
        remove_temporaries(out)
        write_record(out, {"settings": settings})
        yield


def _announce(run: Run, config: Any, steps_per_epoch: int) -> None:
    """Say what is trained for, what of the cache is not read, and what speaks against it."""
    say(f"train: loss = {loss_words(run.train)}")
    steps = total_steps(run.train, steps_per_epoch)
    rounds = run.cache.manifest.rounds
    read = math.ceil(steps / math.ceil(steps_per_epoch / run.train.accumulation))
    if read < rounds:
        say(
            f"train: reads {read} of the cache's {rounds} rounds of masks; train.epochs={rounds} "
            "reads all",
        )
    if run.role == "student":  # once for it and its control
        shapes = _shapes(config, run.cache)
        for line in advice(run.size, run.student, *shapes, config.model_type, steps):
            say(line)


def _export(
    run: Run,
    model: PreTrainedModel,
    trimmed: TrimmedIds | None,
    settings: dict[str, Any],
    figures: dict[str, Any],
) -> dict[str, str]:
    """Write the finished model; the hashes of its files."""
    cache = run.cache
    facts = CardFacts(
        name=run.size,
        role=run.role,
        cache_fingerprint=cache.manifest.fingerprint,
        train=run.train,
        settings=run.recipe or settings,
        figures=figures,
        teachers=cache.num_teachers,
        max_length=cache.encoding.max_length,
        origin=_origin(run, model.config),
    )
    return export_model(
        model, tokenizer_dir=cache.teacher_dir, out=run.out, facts=facts, trimmed=trimmed
    )


def _origin(run: Run, config: Any) -> dict[str, Any]:
    """For the card; a control that starts from random weights is made from the text alone."""
    origin = recorded_origin(run.cache.manifest.provenance)
    start = start_of(run.student.init, *_shapes(config, run.cache), config.model_type)
    if start == "random" and not run.train.has_teacher:
        return {name: value for name, value in origin.items() if name in ("datasets", "example")}
    return origin


def _shapes(config: Any, cache: Cache) -> tuple[Shape, Shape]:
    """The student's, and its teacher's (its own where there is none)."""
    ours, teacher = shape_of(config), config_in(cache.teacher_dir)
    return ours, ours if teacher is None else shape_of(teacher)
