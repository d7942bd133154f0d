"""Logits of a few positions, the largest of them as the loader gives them, and relations."""

import math

import torch

from distilcache.stages.student_train.lm_head_loss import HeadTerms, lm_head_loss
from distilcache.stages.student_train.targets import TopkTarget

N, V, D, K, R = 7, 23, 3, 6, 4
INFINITY = float("inf")
RAGGED = (0, 1, 3, K, 2, 0, K)
"""Stored tokens per position: none, all K, and between."""


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(N, V, generator=generator, dtype=torch.float64)
    values[::2, 0] += 3 * scale  # Id 0 is stored in some rows: the one that padding shows.
    return values


def stored(teacher: torch.Tensor, temperature: float, lengths=(K,) * N) -> TopkTarget:
    """The largest logits of each row, padded as the loader pads, and exact masses at T."""
    values, ids = teacher.topk(max(lengths), dim=-1)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    log_probs = (teacher / temperature).log_softmax(-1)
    held = torch.zeros(N, V).scatter_add(1, ids, real.float()) > 0
    return TopkTarget(
        ids.masked_fill(~real, 0),
        values.masked_fill(~real, -INFINITY),
        log_probs.gather(1, ids).masked_fill(~real, -INFINITY),
        log_probs.masked_fill(held, -INFINITY).logsumexp(-1),
    )


def head_loss(rows, weight, bias, **terms):
    return lm_head_loss(rows, weight, bias, HeadTerms(**terms))


def dense_relations(student, teacher, heads, lengths):
    """L_rel sequence by sequence and head by head, without padding."""
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        for x, t, length in zip(ours, theirs, lengths, strict=True):
            for own, wanted in zip(x[:length].chunk(heads, 1), t[:length].chunk(heads, 1),
                                   strict=True):  # fmt: skip
                q = (own @ own.T / math.sqrt(own.shape[1])).softmax(-1)
                p = (wanted @ wanted.T / math.sqrt(wanted.shape[1])).softmax(-1)
                total = total + (p * (p / q).log()).sum() / heads
    return total
