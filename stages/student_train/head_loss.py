"""L_ce and L_mlm with their gradients, from decoder input to sums, in row chunks.

The logits of N positions over a vocabulary of V are the largest tensors of a training step by
far. They never exist at once here: for each chunk of rows, logits, loss and the gradient
(softmax - target, formed in place of the logits) are computed and contracted with the decoder at
once, so the memory is ``row_chunk x V``, teacher included.

Shapes: ``N`` selected positions, ``C`` rows of one chunk, ``K`` stored tokens, ``V`` vocabulary,
``D`` width of the decoder's input.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True, slots=True)
class FullTarget:
    """The teacher's full distribution, replayed by its decoder chunk by chunk."""

    rows_ND: Tensor
    """Input of the teacher's decoder (after the head's transform); its own width D."""
    weight_VD: Tensor
    bias_V: Tensor


@dataclass(frozen=True, slots=True)
class SparseTarget:
    """The teacher's stored tokens at the temperature of the loss, plus one tail bucket."""

    ids_NK: Tensor
    log_p_NK: Tensor
    """Renormalised, see :func:`stages.student_train.losses.sparse_log_probs`."""
    log_tail_N: Tensor
    """-inf where no mass lies outside the stored tokens."""


@dataclass(frozen=True, slots=True)
class _Spec:
    """What the chunk loop needs besides the differentiable tensors."""

    target: FullTarget | SparseTarget | None
    labels_N: Tensor | None
    temperature: float
    ce_weight: float
    mlm_weight: float
    row_chunk: int
    dtype: torch.dtype
    grad: bool


def head_loss(
    rows_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    *,
    target: FullTarget | SparseTarget | None,
    labels_N: Tensor | None,
    temperature: float,
    ce_weight: float,
    mlm_weight: float,
    row_chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ce_weight * L_ce + mlm_weight * L_mlm`` of the same student rows, summed over rows.

    The formulas are :func:`~stages.student_train.losses.kl_full` or ``kl_sparse`` (T^2 within)
    and ``masked_cross_entropy``. The weights come in because the gradient is formed in the
    forward pass; they already hold the division by global counts. Under autocast the matrix
    products run in its type, everything else in float32 (float64 stays float64).

    Args:
        rows_ND: Input of the student's decoder, differentiable.
        weight_VD: The student's decoder, differentiable.
        bias_V: Its bias, differentiable.
        target: The teacher at these rows; None: no L_ce.
        labels_N: True tokens, below 0 where a row has none; None: no L_mlm.
        temperature: T of L_ce.
        ce_weight: Factor of the L_ce sum.
        mlm_weight: Factor of the L_mlm sum.
        row_chunk: Rows per pass.

    Returns:
        The weighted total (differentiable), and the plain sums L_ce and L_mlm (not
        differentiable).
    """
    device = rows_ND.device.type
    autocast = torch.is_autocast_enabled(device)
    spec = _Spec(
        target=target,
        labels_N=labels_N,
        temperature=temperature,
        ce_weight=ce_weight,
        mlm_weight=mlm_weight,
        row_chunk=row_chunk,
        dtype=torch.get_autocast_dtype(device) if autocast else weight_VD.dtype,
        grad=torch.is_grad_enabled(),
    )
    with torch.autocast(device, enabled=False):
        total, ce, mlm = _HeadLoss.apply(  # type: ignore[no-untyped-call]
            rows_ND, weight_VD, bias_V, spec
        )
    return total, ce, mlm


class _HeadLoss(torch.autograd.Function):
    """Chunk loop of :func:`head_loss`; backward only scales what forward has computed."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, spec: _Spec
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        rows, weight = rows_ND.to(spec.dtype), weight_VD.to(spec.dtype)
        sums = torch.zeros(2, dtype=wide, device=rows.device)
        grad_rows = torch.empty_like(rows_ND) if spec.grad else None
        grad_weight = torch.zeros_like(weight_VD) if spec.grad else None
        grad_bias = torch.zeros_like(bias_V) if spec.grad else None
        for start in range(0, len(rows), spec.row_chunk):
            part = slice(start, min(start + spec.row_chunk, len(rows)))
            logits_CV = (rows[part] @ weight.T).to(wide).add_(bias_V)
            gradient_CV = _chunk(logits_CV, part, spec, sums)
            if grad_rows is None or grad_weight is None or grad_bias is None:
                continue
            grad_bias += gradient_CV.sum(0)
            gradient_CV = gradient_CV.to(spec.dtype)
            grad_rows[part] = gradient_CV @ weight
            if spec.dtype == grad_weight.dtype:
                grad_weight.addmm_(gradient_CV.T, rows[part])
            else:
                grad_weight += gradient_CV.T @ rows[part]
        ce, mlm = sums.unbind()
        if spec.grad:
            ctx.save_for_backward(grad_rows, grad_weight, grad_bias)
        ctx.mark_non_differentiable(ce, mlm)
        return spec.ce_weight * ce + spec.mlm_weight * mlm, ce, mlm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        grad_rows, grad_weight, grad_bias = ctx.saved_tensors
        return grad_rows * grad_total, grad_weight * grad_total, grad_bias * grad_total, None


def _chunk(logits_CV: Tensor, part: slice, spec: _Spec, sums: Tensor) -> Tensor:
    """Add this chunk's L_ce and L_mlm to ``sums``; return the gradient by its logits.

    ``logits_CV`` is overwritten.
    """
    gradient_CV = None
    if spec.labels_N is not None:
        loss, gradient_CV = _cross_entropy(logits_CV, spec.labels_N[part])
        gradient_CV.mul_(spec.mlm_weight)
        sums[1] += loss
    if spec.target is not None:
        scaled_CV = logits_CV.div_(spec.temperature)
        if isinstance(spec.target, FullTarget):
            loss, ce_gradient_CV = _kl_full(scaled_CV, spec.target, part, spec)
        else:
            loss, ce_gradient_CV = _kl_sparse(scaled_CV, spec.target, part)
        # Loss T^2 * KL, logits divided by T: one T is left.
        ce_gradient_CV.mul_(spec.ce_weight * spec.temperature)
        gradient_CV = ce_gradient_CV if gradient_CV is None else gradient_CV.add_(ce_gradient_CV)
        sums[0] += spec.temperature**2 * loss
    return logits_CV.zero_() if gradient_CV is None else gradient_CV


def _cross_entropy(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log q[label] and its gradient ``q - onehot``; rows without a label give 0."""
    has_label_C1 = (labels_C >= 0).to(logits_CV.dtype)[:, None]
    index_C1 = labels_C.clamp(min=0)[:, None]
    log_q_CV = torch.log_softmax(logits_CV, dim=-1)
    loss = -(log_q_CV.gather(1, index_C1) * has_label_C1).sum()
    gradient_CV = log_q_CV.exp_().mul_(has_label_C1)
    return loss, gradient_CV.scatter_add_(1, index_C1, -has_label_C1)


def _kl_full(
    scaled_CV: Tensor, target: FullTarget, part: slice, spec: _Spec
) -> tuple[Tensor, Tensor]:
    """KL(p || q) and its gradient ``q - p`` by the scaled logits."""
    teacher_CV = (target.rows_ND[part].to(spec.dtype) @ target.weight_VD.to(spec.dtype).T).to(
        scaled_CV.dtype
    )
    teacher_CV.add_(target.bias_V).div_(spec.temperature)
    log_p_CV = torch.log_softmax(teacher_CV, dim=-1)
    p_CV = torch.exp(log_p_CV, out=teacher_CV)
    log_q_CV = torch.log_softmax(scaled_CV, dim=-1)
    loss = torch.linalg.vecdot(p_CV, log_p_CV.sub_(log_q_CV)).sum()
    return loss, log_q_CV.exp_().sub_(p_CV)


def _kl_sparse(scaled_CV: Tensor, target: SparseTarget, part: slice) -> tuple[Tensor, Tensor]:
    """KL of head and tail bucket and its gradient by the scaled logits (overwritten).

    At stored tokens the gradient is ``q_k - p_k``; elsewhere ``q_v - p_tail q_v / q_tail``, the
    second factor being the student's softmax over the rest.
    """
    ids_CK, log_tail_C = target.ids_NK[part], target.log_tail_N[part]
    log_p_CK = target.log_p_NK[part]
    head_CK = scaled_CV.gather(1, ids_CK)
    p_CK = log_p_CK.exp()
    if ids_CK.shape[1] == scaled_CV.shape[1]:
        log_q_CV = torch.log_softmax(scaled_CV, dim=-1)
        loss = (p_CK * (log_p_CK - log_q_CV.gather(1, ids_CK))).sum()
        return loss, log_q_CV.exp_().scatter_add_(1, ids_CK, -p_CK)
    rest_CV = scaled_CV.scatter_(1, ids_CK, NEGATIVE_INFINITY)
    log_rest_C = torch.logsumexp(rest_CV, dim=-1)
    log_z_C = torch.logaddexp(log_rest_C, torch.logsumexp(head_CK, dim=-1))
    log_q_CK = head_CK - log_z_C[:, None]
    p_tail_C = log_tail_C.exp()
    tail_C = p_tail_C * (log_tail_C - log_rest_C + log_z_C)
    loss = (p_CK * (log_p_CK - log_q_CK)).sum()
    loss = loss + torch.where(log_tail_C.isneginf(), 0.0, tail_C).sum()
    # q_v - p_tail softmax_rest(v) = softmax_rest(v) (q_tail - p_tail): no overflow, 0 at the head.
    gap_C1 = ((log_rest_C - log_z_C).exp() - p_tail_C)[:, None]
    gradient_CV = torch.softmax(rest_CV, dim=-1).mul_(gap_C1)
    return loss, gradient_CV.scatter_(1, ids_CK, log_q_CK.exp() - p_CK)
