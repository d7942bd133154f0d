"""The student inside its losses on a cache, and the step that it takes."""

import torch

from distilcache.data.cache.cache import Cache
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.model import TERMS
from distilcache.stages.student_train.run import assemble
from distilcache.stages.student_train.signals import count_positions, required_signals
from distilcache.stages.student_train.student import build_student

VOCABULARY = 72
EXACT = {"hidden_dtype": "float32", "logits_dtype": "float32"}


def build(cache, size, **student):
    """A student as it begins."""
    return build_student(
        size=size,
        student=StudentConfig(sizes=(size,), **student),
        seed=0,
        encoding=cache.encoding,
        teacher_dir=cache.teacher_dir,
    )


def in_losses(cache, student, **train):
    """The student inside its losses, and its batches."""
    config = TrainConfig(**train)
    return assemble(cache, student, config, required_signals(cache.encoding, config))


def make(cache_dir, size="1x32", batch_size=5, **train):
    """The same without dropout, for a tiny vocabulary."""
    cache = Cache.open(cache_dir)
    student = build(cache, size, dropout=0.0)
    return in_losses(cache, student, row_chunk=7, batch_size=batch_size, streams=1, **train)


def gradient(model, batch, counts=None):
    """Loss, sums of its terms, and the gradient of all parameters in one row."""
    model.zero_grad()
    loss, sums = model(batch, counts or count_positions(batch))
    loss.backward()
    flat = [
        torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
        for p in model.student.parameters()
    ]
    return loss.detach(), dict(zip(TERMS, sums, strict=True)), torch.cat(flat)
