"""The student inside its losses on a cache, and the step that it takes."""

import torch

from distilcache.data.cache.cache import Cache
from distilcache.stages.student_train.assembly import assemble
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.model import TERMS
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
    student = build(cache, size)
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


def same_over_a_sample(model, batches):
    """Asserts that a step over a sample is one over all tokens, those outside with weight 0."""
    columns, plain = batches[0], batches[0]
    counts = count_positions(columns)
    rows = len(model.vocabulary._weights_V)
    assert model.vocabulary.apply([columns], 0) < rows
    log_weight = torch.full((rows,), -1e9)
    log_weight[columns["vocabulary"]] = columns["log_weight"]
    everything = {**plain, "vocabulary": torch.arange(rows), "log_weight": log_weight}
    found = [gradient(model, batch, counts) for batch in (columns, everything, plain)]
    losses = [torch.stack([loss, *sums.values()]) for loss, sums, _ in found]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-6)
    # Other weights, other losses.
    assert not torch.isclose(losses[0][0], losses[2][0])
