"""The teacher beside the student: what offline training replaces, through the same code path.

Training reads batches and a decoder of stored hidden states. Here the batches come from a cache
that holds masks alone, and the decoder runs the teacher on them. Everything else (model, losses,
loop, schedule, dropout) is the product's own.

Shapes: ``B`` sequences, ``L`` positions, ``H`` positions with hidden states, ``D`` hidden width.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distilcache.data.cache.cache import Cache
from distilcache.data.codecs.hidden import HiddenDecoder
from distilcache.data.loader.dataset import CachedBatches
from distilcache.data.storage.files import write_json
from distilcache.stages.models.device import keep_freed_memory, resolve_device, resolve_dtype
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.export import CardFacts
from distilcache.stages.student_train.model import DistillationModel
from distilcache.stages.student_train.output import open_output
from distilcache.stages.student_train.run import finish, fit
from distilcache.stages.student_train.signals import Signals
from distilcache.stages.student_train.student import build_student
from distilcache.stages.teacher_cache.teacher import Teacher, load_teacher


class LiveTeacher(HiddenDecoder):
    """Hidden states of the batch's positions from the teacher itself.

    Args:
        teacher: Frozen; runs under its own autocast type, as in stage one.
    """

    def __init__(self, teacher: Teacher) -> None:
        super().__init__("live")
        self.model: torch.nn.Module = teacher.model
        self.teacher = teacher

    def train(self, mode: bool = True) -> "LiveTeacher":
        """Stay in evaluation mode: the teacher has no dropout, the student's draws are its own."""
        return super().train(False)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Last hidden states at ``hidden_index``, float32 [H, D]."""
        mask_BL = batch.get("attention_mask")
        (hidden_HD,) = self.teacher.encode(
            batch["input_ids"],
            None if mask_BL is None else mask_BL.bool(),
            (self.teacher.num_layers,),
            batch["hidden_index"],
        )
        return hidden_HD.float()


class LiveBatches:
    """Batches of a mask-only cache, told at which positions the teacher is asked.

    Args:
        batches: Of the mask-only cache.
        everywhere: All attended positions (the published recipe), not the masked ones alone.
    """

    def __init__(self, batches: CachedBatches, *, everywhere: bool) -> None:
        self.batches = batches
        self.everywhere = everywhere
        self.steps_per_epoch = batches.steps_per_epoch

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        """Batch k with ``ce_index`` and ``hidden_index``."""
        batch = self.batches[k]
        index = batch["masked_index"]
        if self.everywhere:
            attended = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            index = attended.flatten().nonzero().squeeze(1)
        return {**batch, "ce_index": index, "hidden_index": index}


def train_live(
    *,
    cache_dir: Path,
    teacher_dir: Path,
    out: Path,
    size: str,
    student: StudentConfig,
    train: TrainConfig,
    everywhere: bool,
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """``train_student`` with the teacher in place of its cache.

    Args:
        cache_dir: Mask-only cache.
        teacher_dir: The teacher's checkpoint.
        out: Folder of this student; an interrupted training goes on.
        size: ``LAYERSxWIDTH``.
        student: Recipe section.
        train: Recipe section; ``signal`` has to be ``replay``.
        everywhere: L_ce and L_cos at all attended positions.
        device: See ``resolve_device``.
        dtype: See ``resolve_dtype``.
    """
    target = resolve_device(device)
    keep_freed_memory(target)
    kind = resolve_dtype(dtype, target)
    cache = Cache.open(cache_dir)
    settings = {
        "cache": cache.manifest.fingerprint,
        "live": "all" if everywhere else "masked",
        "size": size,
        "dtype": str(kind).removeprefix("torch."),
        "dropout": student.dropout,
        "train": asdict(train),
    }
    finished = open_output(out, settings)
    if finished is not None:
        return finished
    write_json(out / "training.json", {"settings": settings})
    model = build_student(
        size=size,
        student=student,
        seed=train.seed,
        encoding=cache.encoding,
        teacher_dir=teacher_dir,
    )
    teacher = load_teacher(str(teacher_dir), target, kind)
    module, batches = assemble_live(cache, model, teacher, train, everywhere=everywhere)
    figures = fit(
        module,
        batches,
        train=train,
        out=out,
        device=target,
        dtype=kind,
        label=out.name,
    )
    facts = CardFacts(
        name=size,
        role="student",
        cache_fingerprint=cache.manifest.fingerprint,
        train=train,
        settings=settings,
        figures=figures,
    )
    finish(module, cache, out=out, settings=settings, facts=facts)
    return figures


def assemble_live(
    cache: Cache,
    student: PreTrainedModel,
    teacher: Teacher,
    train: TrainConfig,
    *,
    everywhere: bool,
) -> tuple[DistillationModel, LiveBatches]:
    """``assemble`` with the teacher in place of its cache."""
    module = DistillationModel(
        student,
        train=train,
        signals=Signals(train.signal, train.alpha_cos > 0),
        lm_head=teacher.lm_head,
        hidden_decoder=LiveTeacher(teacher),
        teacher_width=teacher.width,
    )
    batches = CachedBatches(
        cache,
        batch_size=train.batch_size,
        seed=train.seed,
        window_blocks=train.window_blocks,
        streams=train.streams,
    )
    return module, LiveBatches(batches, everywhere=everywhere)
