"""Training with the teacher beside the student, through the code that trains from a cache.

Training reads batches and a decoder of stored hidden states. Here the batches come from a cache
that holds masks alone, and the decoder runs the teacher on them. Everything else (model, losses,
loop, schedule, dropout) is the product's own.

Shapes: ``B`` sequences, ``L`` positions, ``H`` positions with hidden states, ``D`` hidden width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distilcache.data.cache.cache import Cache
from distilcache.data.codecs.hidden import HiddenDecoder
from distilcache.data.loader.dataset import CachedBatches
from distilcache.stages.models.device import resolve_device, resolve_dtype
from distilcache.stages.models.families import shape_of
from distilcache.stages.models.relations import RelationTap
from distilcache.stages.student_train import run
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.model import DistillationModel
from distilcache.stages.student_train.signals import Signals, relation_heads
from distilcache.stages.student_train.vocabulary import sampled_vocabulary
from distilcache.stages.teacher_cache.teacher import Teacher, load_teacher


class LiveTeacher(HiddenDecoder):
    """Runs the teacher for the hidden states of a batch, in its own autocast type."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__("live")
        self.model: torch.nn.Module = teacher.model
        self.teacher = teacher

    def train(self, mode: bool = True) -> "LiveTeacher":
        """Stay in evaluation mode: a teacher's dropout would also change the student's draws."""
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


class LiveRelations(torch.nn.Module):
    """Runs the teacher for its last layer's queries, keys and values, as the layer gives them."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher
        self._tap = RelationTap(teacher.model, -1, "benchmark: teacher")

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """As of :class:`~distilcache.data.codecs.relations.Relations`, float32."""
        mask_BL = batch.get("attention_mask")
        attended = None if mask_BL is None else mask_BL.bool()
        rows_N, layers = batch["masked_index"], (self.teacher.num_layers,)
        with self._tap:
            self.teacher.encode(batch["input_ids"], attended, layers, rows_N)
        return self._tap.gave().float()


class LiveBatches:
    """Batches of a cache with the positions at which the teacher's output is used.

    Args:
        batches: Without any signal.
        everywhere: All attended positions (the published recipe) and not the masked ones alone.
    """

    def __init__(self, batches: CachedBatches, *, everywhere: bool) -> None:
        self.batches = batches
        self.everywhere = everywhere
        self.steps_per_epoch = batches.steps_per_epoch
        self.stop: int | None = None

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        """Batch k with ``ce_index`` and ``hidden_index``."""
        batch = self.batches[k]
        index = batch["masked_index"]
        if self.everywhere:
            attended = batch["attention_mask"]
            index = attended.flatten().nonzero().squeeze(1)
        return {**batch, "ce_index": index, "hidden_index": index}


def masked_batches(cache: Cache, train: TrainConfig) -> CachedBatches:
    """Masked tokens alone, in the order of a run."""
    return CachedBatches(
        cache,
        batch_size=train.batch_size,
        seed=train.seed,
        window_blocks=train.window_blocks,
        streams=train.streams,
        signal=None,
        hidden=False,
    )


def assemble_live(
    cache: Cache,
    student: PreTrainedModel,
    teacher: Teacher,
    train: TrainConfig,
    *,
    everywhere: bool = False,
) -> tuple[DistillationModel, LiveBatches]:
    """``assemble`` with the teacher in place of stored signals."""
    related = train.alpha_rel > 0
    shapes = [shape_of(model.config) for model in (teacher.model, student)]
    module = DistillationModel(
        student,
        train=train,
        signals=Signals("replay" if train.alpha_ce else None, train.alpha_cos > 0, rel=related),
        lm_head=teacher.lm_head,
        hidden_decoder=LiveTeacher(teacher),
        teacher_width=teacher.width,
        relations=LiveRelations(teacher) if related else None,
        relation_heads=relation_heads(train, *shapes) if related else 0,
        vocabulary=sampled_vocabulary(cache, teacher.vocab_size, train),
    )
    return module, LiveBatches(masked_batches(cache, train), everywhere=everywhere)


def train_live(
    *, teacher_dir: Path, everywhere: bool, device: str, dtype: str, **settings: Any
) -> dict[str, Any]:
    """``train_student`` with the teacher beside the student.

    Args:
        teacher_dir: The teacher's checkpoint.
        everywhere: L_ce and L_cos at all attended positions.
        device: See ``resolve_device``.
        dtype: See ``resolve_dtype``.
        settings: The other arguments; ``cache_dir`` may be a mask-only cache.
    """
    target = resolve_device(device)
    teacher = load_teacher(str(teacher_dir), target, resolve_dtype(dtype, target))

    def assemble(
        cache: Cache, student: PreTrainedModel, train: TrainConfig, *_: Any
    ) -> tuple[DistillationModel, LiveBatches]:
        return assemble_live(cache, student, teacher, train, everywhere=everywhere)

    # A mask-only cache holds no signals, and is asked for none.
    with mock.patch.multiple(run, assemble=assemble, required_signals=lambda *_, **__: None):
        return run.train_student(teacher_dir=teacher_dir, device=device, dtype=dtype, **settings)
