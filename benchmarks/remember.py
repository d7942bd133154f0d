"""A teacher that runs over each batch once, for benchmarks that write many caches of one corpus."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any
from unittest import mock

import torch

from stages.teacher_cache import run as stage_one
from stages.teacher_cache.adapters import Teacher, load_teacher


class RememberingTeacher(Teacher):
    """Runs over each batch once; every further cache gets the same hidden states."""

    seen: dict[bytes, list[torch.Tensor]] = {}

    def encode(
        self,
        ids_BL: torch.Tensor,
        attention_BL: torch.Tensor | None,
        layers: tuple[int, ...],
        rows_N: torch.Tensor | None = None,
        most: int = 0,
    ) -> list[torch.Tensor]:
        """The teacher's own, from memory where it has seen the batch."""
        key = ids_BL.cpu().numpy().tobytes()
        if key not in self.seen:
            self.seen[key] = Teacher.encode(self, ids_BL, attention_BL, layers)
        if rows_N is None:
            return self.seen[key]
        return [states.flatten(0, 1).index_select(0, rows_N) for states in self.seen[key]]


@contextmanager
def remembering() -> Iterator[None]:
    """Within this context stage one loads teachers that remember."""
    load = load_teacher

    def loaded(*args: Any, **kwargs: Any) -> Teacher:
        teacher = load(*args, **kwargs)
        return RememberingTeacher(**{f.name: getattr(teacher, f.name) for f in fields(teacher)})

    with mock.patch.object(stage_one, "load_teacher", loaded):
        yield
