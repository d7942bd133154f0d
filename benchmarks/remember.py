"""A teacher that runs over each batch once, for benchmarks that write many caches of one corpus."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from stages.teacher_cache import run as stage_one
from stages.teacher_cache.adapters import Teacher, load_teacher


class RememberingTeacher(Teacher):
    """Runs over each batch once; every further cache gets the same hidden states."""

    seen: dict[bytes, list[torch.Tensor]] = {}

    def encode(
        self, ids_BL: torch.Tensor, attention_BL: torch.Tensor | None, layers: tuple[int, ...]
    ) -> list[torch.Tensor]:
        """The teacher's own, from memory where it has seen the batch."""
        key = ids_BL.cpu().numpy().tobytes()
        if key not in self.seen:
            self.seen[key] = Teacher.encode(self, ids_BL, attention_BL, layers)
        return self.seen[key]


@contextmanager
def remembering() -> Iterator[None]:
    """Within this context stage one loads teachers that remember."""
    load = load_teacher

    def loaded(*args: Any, **kwargs: Any) -> Teacher:
        teacher = load(*args, **kwargs)
        return RememberingTeacher(
            teacher.model, teacher.head, teacher.spec, teacher.device, teacher.dtype
        )

    with mock.patch.object(stage_one, "load_teacher", loaded):
        yield
