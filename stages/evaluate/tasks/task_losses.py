"""Losses of fine-tuning: from labels, and from a fine-tuned teacher's logits.

Shapes: B examples, C classes (or 1 score), L tokens. A span task classifies tokens twice: which is
the first of the answer, and which the last. Tagging classifies the first token of each word.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distilcache.stages.evaluate.tasks.catalogue import SCORE, SPAN, TAGS
from distilcache.stages.evaluate.tasks.features import NO_TAG


def hard_loss(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, or the squared error of scores; per example [B].

    Args:
        kind: Kind of the task.
        logits: [B, C], [B, 1], [B, C, L], or [B, 2, L] with minus infinity (or near it) at padding.
        labels: [B] classes, [B] scores, [B, L] tags with ``NO_TAG`` at other tokens, or [B, 2]
            tokens.
    """
    logits = logits.float()
    if kind == SCORE:
        return (logits[:, 0] - labels).square()
    if kind == SPAN:
        both = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return both.view(-1, 2).mean(1)
    if kind == TAGS:
        each_BL = F.cross_entropy(logits, labels, reduction="none", ignore_index=NO_TAG)
        return _over_words(each_BL, labels != NO_TAG)
    return F.cross_entropy(logits, labels, reduction="none")


def soft_loss(
    kind: str, logits: Tensor, teacher: Tensor, temperature: float, mask_BL: Tensor
) -> Tensor:
    """``T^2 KL(teacher_T || student_T)``, or the squared error of scores; per example [B].

    T^2 keeps the gradient's size from falling with the temperature (Hinton et al. 2015,
    arXiv:1503.02531).

    Args:
        kind: Kind of the task.
        logits: The student's, as in :func:`hard_loss`.
        teacher: The teacher's, of the same shape.
        temperature: T of both; not used for scores.
        mask_BL: For spans 0 at padding, for tags 0 at all but the first tokens of words; else of no
            use.
    """
    logits, teacher = logits.float(), teacher.float()
    if kind == SCORE:
        return (logits - teacher).square()[:, 0]
    if kind == SPAN:
        teacher = hide_padding(teacher, mask_BL)
    axis = 1 if kind == TAGS else -1
    student = torch.log_softmax(logits / temperature, dim=axis)
    wanted = torch.log_softmax(teacher / temperature, dim=axis)
    gap = F.kl_div(student, wanted, reduction="none", log_target=True).sum(axis)
    if kind == TAGS:
        gap = _over_words(gap, mask_BL)
    return temperature**2 * (gap.mean(1) if kind == SPAN else gap)


def _over_words(values_BL: Tensor, there_BL: Tensor) -> Tensor:
    """Mean of each example over the first tokens of its words, [B]."""
    return (values_BL * there_BL).sum(1) / there_BL.sum(1).clamp(min=1)


def cos_loss(states_BW: Tensor, teacher_BW: Tensor) -> Tensor:
    """L_cos of DistilBERT (Sanh et al. 2019, arXiv:1910.01108): ``1 - cos``, per example [B]."""
    return 1 - F.cosine_similarity(states_BW.float(), teacher_BW.float(), dim=-1)


def hide_padding(logits_B2L: Tensor, mask_BL: Tensor) -> Tensor:
    """Set logits at padding so low that its probability is 0."""
    low = torch.finfo(torch.float32).min / 4
    return logits_B2L.float().masked_fill(mask_BL[:, None, :] == 0, low)
