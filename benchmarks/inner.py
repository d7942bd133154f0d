"""A loss on inner layers beside those of a cache: no part of the product, measured to say so.

As in TinyBERT (Jiao et al. 2020, arXiv:1909.10351) and PKD (Sun et al. 2019, arXiv:1908.09355),
layer i of a student's n follows layer i N / n of the teacher's N. No cache holds these states, so
the teacher runs beside the student for them.

Shapes: ``B`` sequences, ``L`` positions, ``N`` positions, ``D`` hidden width.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from distilcache.stages.models.device import resolve_device, resolve_dtype
from distilcache.stages.models.families import shape_of
from distilcache.stages.student_train import assembly
from distilcache.stages.student_train.losses import cosine_distance
from distilcache.stages.student_train.model import DistillationModel
from distilcache.stages.student_train.run import train_student
from distilcache.stages.teacher_cache.teacher import Teacher, load_teacher

ALPHA = 5.0
"""Weight of the loss, as of L_cos in ``recipes/minilm.toml``."""


class InnerLayers(DistillationModel):
    """Adds ``ALPHA`` L_cos of all layers but the last: mean over layers and attended positions.

    Args:
        student: As wide as its teacher.
        teacher: Runs on every batch.
        settings: The other arguments of the base class.
    """

    def __init__(self, student: Any, *, teacher: Teacher, **settings: Any) -> None:
        super().__init__(student, **settings)
        layers = shape_of(student.config).layers
        self._layers = tuple(range(1, layers))
        self._theirs = tuple(i * teacher.num_layers // layers for i in self._layers)
        self._teacher = [teacher]  # in a list: no part of the trained model
        self._states: list[Tensor] = []

    def encode(self, batch: Mapping[str, Tensor], rows_N: Tensor) -> Tensor:
        """The student's last hidden states, [N, D]; its inner ones are kept for the loss."""
        *self._states, last_ND = self._encoder.states(
            batch["input_ids"],
            batch.get("attention_mask"),
            everywhere(batch),
            (*self._layers, len(self._layers) + 1),
        )
        return last_ND.index_select(0, torch.searchsorted(everywhere(batch), rows_N))

    def forward(
        self, batch: Mapping[str, Tensor], counts: Mapping[str, float]
    ) -> tuple[Tensor, Tensor]:
        """Loss and terms of the base class; the loss holds the inner layers, the terms do not."""
        loss, terms = super().forward(batch, counts)
        rows_N, mask_BL = everywhere(batch), batch.get("attention_mask")
        attended_BL = None if mask_BL is None else mask_BL.bool()
        theirs = self._teacher[0].encode(batch["input_ids"], attended_BL, self._theirs, rows_N)
        distance = sum(map(cosine_distance, self._states, theirs), torch.zeros_like(loss))
        return loss + ALPHA / (len(theirs) * len(rows_N)) * distance, terms


def everywhere(batch: Mapping[str, Tensor]) -> Tensor:
    """Flat positions of a batch that are no padding, int64 [N]."""
    attended_BL = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return attended_BL.flatten().nonzero().squeeze(1)


def train_inner(*, teacher_dir: Path, device: str, dtype: str, **settings: Any) -> dict[str, Any]:
    """``train_student`` with the loss on inner layers, in one micro-batch a step."""
    target = resolve_device(device)
    teacher = load_teacher(str(teacher_dir), target, resolve_dtype(dtype, target))
    losses = partial(InnerLayers, teacher=teacher)
    with mock.patch.object(assembly, "DistillationModel", losses):
        return train_student(teacher_dir=teacher_dir, device=device, dtype=dtype, **settings)
