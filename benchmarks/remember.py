"""Stage one for benchmarks that write many caches of one corpus.

The teacher runs over each batch once, and codecs are fitted to another text than they are measured
on, as those of a large cache are to a small part of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any
from unittest import mock

import torch

from distilcache.data.codecs.hidden import HiddenCodec
from distilcache.data.corpus.store import Corpus
from distilcache.stages.teacher_cache import encoding as plan
from distilcache.stages.teacher_cache import ensemble
from distilcache.stages.teacher_cache.task import Plan
from distilcache.stages.teacher_cache.teacher import Teacher, load_teacher


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

    try:
        with mock.patch.object(ensemble, "load_teacher", loaded):
            yield
    finally:
        RememberingTeacher.seen.clear()  # what another teacher says of the same words is not it


@contextmanager
def calibrating_on(corpus: Corpus) -> Iterator[None]:
    """Within this context stage one fits codecs to blocks of this corpus, whatever it codes."""
    fit = plan._calibrate_layer

    def fitted(plan: Plan, layer: int) -> HiddenCodec:
        return fit(replace(plan, corpus=corpus), layer)

    with mock.patch.object(plan, "_calibrate_layer", fitted):
        yield
