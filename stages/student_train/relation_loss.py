"""L_rel with its gradient, from queries, keys and values to sums, a few sequences at a time.

MiniLMv2 (Wang et al. 2021, arXiv:2012.15828): the student's last layer reproduces the relations of
one of the teacher's layers, of queries, of keys and of values. With the X of A heads of d units and
the teacher's T,

    sum_i 1/A sum_a KL(softmax(t_i T' / sqrt(d_t)) || softmax(x_i X' / sqrt(d)))

over the positions i of a sequence, for each of the three. Widths may differ, heads may not.

Relations are L x L per head, far larger than what they come from. Here they exist for a few
sequences at a time: their gradient, with G the student's softmax less the teacher's, is
``(G + G') X / sqrt(d)`` and is computed in the forward pass.

Shapes: ``R`` relations (3), ``B`` sequences, ``L`` positions, ``A`` relation heads, ``d`` units of
a head, ``P`` width of queries.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilcache.data.codecs.relations import in_heads, relation_logits

ELEMENTS = {"cpu": 1 << 19}
"""Elements of the relations that exist at a time, by kind of device: on a CPU they stay in its
cache."""
MOST_ELEMENTS = 1 << 25
"""The same on other devices."""


def relation_loss(
    student_RBLP: Tensor,
    teacher_RBLP: Tensor,
    heads: int,
    present_BL: Tensor | None,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """``weight L_rel``, summed over positions and the three relations, mean over heads.

    Args:
        student_RBLP: The student's queries, keys and values, differentiable.
        teacher_RBLP: The teacher's, of any width.
        heads: Relation heads A.
        present_BL: Where there are tokens; None: everywhere. Others neither count nor are seen.
        weight: Factor of the sum; it includes the division by the global count.

    Returns:
        The weighted sum (differentiable), and the plain one.
    """
    with torch.autocast(student_RBLP.device.type, enabled=False):
        total, plain = _RelationLoss.apply(  # type: ignore[no-untyped-call]
            student_RBLP, teacher_RBLP, heads, present_BL, weight, torch.is_grad_enabled()
        )
    return total, plain


def at_the_teachers_tokens(
    student_RBLP: Tensor, batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Queries, keys and values at the tokens whose relations are learnt.

    Args:
        student_RBLP: At all of the student's positions.
        batch: See ``CachedBatches``; of a student with fewer ids, ``trimmed_batch``.

    Returns:
        Those, and where there are tokens; None: everywhere.
    """
    places_BL = batch.get("relation_places")
    if places_BL is None:
        return student_RBLP, batch.get("attention_mask")
    places_1BL1 = places_BL.clamp(min=0)[None, :, :, None]
    shape = (len(student_RBLP), -1, -1, student_RBLP.shape[-1])
    return student_RBLP.gather(2, places_1BL1.expand(shape)), places_BL >= 0


class _RelationLoss(torch.autograd.Function):
    """Chunk loop of :func:`relation_loss`; backward only scales what forward has computed."""

    @staticmethod
    def forward(
        ctx: Any,
        student_RBLP: Tensor,
        teacher_RBLP: Tensor,
        heads: int,
        present_BL: Tensor | None,
        weight: float,
        grad: bool,
    ) -> tuple[Tensor, Tensor]:
        device = student_RBLP.device
        wide = torch.promote_types(student_RBLP.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=device)
        gradient = torch.empty_like(student_RBLP) if grad else None
        length = student_RBLP.shape[2]
        size = max(1, ELEMENTS.get(device.type, MOST_ELEMENTS) // (heads * length * length))
        for relation, (ours_BLP, theirs_BLP) in enumerate(
            zip(student_RBLP, teacher_RBLP.to(student_RBLP.dtype), strict=True)
        ):
            for first in range(0, len(ours_BLP), size):
                part = slice(first, first + size)
                there_BL = None if present_BL is None else present_BL[part].bool()
                loss, by_logits_BALL = _chunk(ours_BLP[part], theirs_BLP[part], heads, there_BL)
                total += loss
                if gradient is not None:
                    gradient[relation, part] = _by_queries(
                        by_logits_BALL.mul_(weight / heads), ours_BLP[part], heads
                    )
        total /= heads
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(total)
        return weight * total, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_total, None, None, None, None, None


def _chunk(
    ours_BLP: Tensor, theirs_BLP: Tensor, heads: int, present_BL: Tensor | None
) -> tuple[Tensor, Tensor]:
    """KL of some sequences' relations, summed over positions and heads, and its gradient.

    That is by the student's logits [B, A, L, L]: its softmax less the teacher's; 0 at padding.
    """
    wide = torch.promote_types(ours_BLP.dtype, torch.float32)
    log_p, log_q = (
        torch.log_softmax(relation_logits(x, heads, present_BL).to(wide), -1)
        for x in (theirs_BLP, ours_BLP)
    )
    p = log_p.exp()
    rows_BAL = torch.linalg.vecdot(p, log_p.sub_(log_q))
    gradient_BALL = log_q.exp_().sub_(p)
    if present_BL is not None:
        there_B1L = present_BL[:, None].to(wide)
        rows_BAL = rows_BAL * there_B1L
        gradient_BALL.mul_(there_B1L[..., None])
    return rows_BAL.sum(), gradient_BALL


def _by_queries(by_logits_BALL: Tensor, x_BLP: Tensor, heads: int) -> Tensor:
    """Gradient by queries [B, L, P] from that by their products."""
    both_BALL = (by_logits_BALL + by_logits_BALL.mT).to(x_BLP.dtype)
    x_BALd = in_heads(x_BLP, heads)
    gradient_BALd: Tensor = both_BALL @ x_BALd * x_BALd.shape[-1] ** -0.5
    return gradient_BALd.transpose(1, 2).reshape(x_BLP.shape)
