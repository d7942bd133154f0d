"""L_ce, L_mlm and L_mse with their gradients, from decoder input to sums, in row chunks.

The logits of N positions over a vocabulary of V are by far the largest tensors of a training step.
Here they never exist as a whole: for each chunk of rows, logits, loss and gradient (softmax -
target, in place of the logits) are computed and multiplied with the decoder at once. So the memory
is ``row_chunk x V``, for student and teacher each. On a CPU everything between the matrix products
runs on blocks of a few rows, which stay in the CPU's cache.

Shapes: ``N`` selected positions, ``C`` rows of one chunk or of one block of it, ``V`` vocabulary
(or the tokens of the step, see ``vocabulary.py``), ``D`` width of the decoder's input.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilcache.stages.student_train.targets import (
    FullTarget,
    SparseTarget,
    kl_full_rows,
    kl_sparse_rows,
    normalized,
    replayed_logits,
    squared_error_rows,
)

CPU_LOGITS = 2**18
"""Logits of a block on a CPU, per thread: a block's tensors stay in its cache. So the rows are
fewer the larger the vocabulary (measured for 7,630 to 250,002 tokens)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadTerms:
    """What is computed of some rows: L_ce, L_mlm and L_mse, and their weights.

    The weights are here because the forward pass computes the gradient; they include the division
    by global counts. A term whose weight is 0 is not computed, and its sum is 0.
    """

    target: FullTarget | SparseTarget | None
    """The teacher at these rows; None: neither L_ce nor L_mse."""
    labels_N: Tensor | None
    """True tokens, below 0 where a row has none; None: no L_mlm."""
    temperature: float
    """T of L_ce."""
    ce_weight: float
    mlm_weight: float
    mse_weight: float = 0.0
    """It must be 0 unless the target is a ``FullTarget``."""
    row_chunk: int
    """Rows per pass."""
    row_weights_N: Tensor | None = None
    """Importance weights of the rows of L_ce and L_mse (L_mlm has none); None: 1."""
    log_weight_V: Tensor | None = None
    """Where V is a sample of the vocabulary, log of each token's weight; 0 at the tokens of labels,
    stored logits and draws. See ``losses.over_sample``."""


def lm_head_loss(
    rows_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, terms: HeadTerms
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``ce_weight L_ce + mlm_weight L_mlm + mse_weight L_mse`` of the same rows, summed over rows.

    The formulas are those of ``distilcache.stages.student_train.losses``. L_ce (times T^2) is
    ``kl_full``; ``kl_replay`` with stored logits or residual draws; ``kl_sparse``; or
    ``cross_entropy_sampled``. L_mlm is ``masked_cross_entropy``, L_mse ``squared_error``. Under
    autocast the matrix products run in its type, everything else in float32 (float64 stays
    float64).

    Args:
        rows_ND: Input of the student's decoder, differentiable.
        weight_VD: The student's decoder, differentiable.
        bias_V: Its bias, differentiable.
        terms: What is computed.

    Returns:
        The weighted total (differentiable), and the plain sums L_ce, L_mlm and L_mse (not
        differentiable), importance weights included.
    """
    assert terms.mse_weight == 0 or not isinstance(terms.target, SparseTarget), "L_mse needs logits"
    device = rows_ND.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight_VD.dtype
    with torch.autocast(device, enabled=False):
        total, ce, mlm, mse = _LMHeadLoss.apply(  # type: ignore[no-untyped-call]
            rows_ND, weight_VD, bias_V, terms, dtype, torch.is_grad_enabled()
        )
    return total, ce, mlm, mse


class _LMHeadLoss(torch.autograd.Function):
    """Chunk loop of :func:`lm_head_loss`; backward only scales what forward has computed."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        terms: HeadTerms,
        dtype: torch.dtype,
        grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        rows, weight = rows_ND.to(dtype), weight_VD.to(dtype)
        sums = torch.zeros(3, dtype=wide, device=rows.device)
        grad_rows = torch.zeros_like(rows_ND)
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias_V)
        count = 0 if terms.target is None and terms.labels_N is None else len(rows)
        for chunk in _cut(slice(0, count), terms.row_chunk):
            logits_CV = rows[chunk] @ weight.T
            full = terms.target if isinstance(terms.target, FullTarget) else None
            teacher_CV = None if full is None else full.products(chunk, dtype)
            for block in _cut(chunk, _block_rows(logits_CV)):
                part = slice(block.start - chunk.start, block.stop - chunk.start)
                gradient_CV = _block(
                    logits_CV[part].to(wide).add_(bias_V),
                    None if teacher_CV is None else teacher_CV[part],
                    block,
                    terms,
                    sums,
                )
                grad_bias += gradient_CV.sum(0)
                logits_CV[part] = gradient_CV
            if grad:
                grad_rows[chunk] = logits_CV @ weight
                product_VD = logits_CV.T @ rows[chunk]
                # Starting from the first chunk's product saves filling [V, D] with zeros.
                grad_weight = (
                    product_VD.to(weight_VD.dtype)
                    if grad_weight is None
                    else grad_weight.add_(product_VD)
                )
        ce, mlm, mse = sums.unbind()
        if grad:
            if grad_weight is None:  # No memory of its own.
                grad_weight = weight_VD.new_zeros(()).expand_as(weight_VD)
            ctx.save_for_backward(grad_rows, grad_weight, grad_bias)
        ctx.mark_non_differentiable(ce, mlm, mse)
        total = terms.ce_weight * ce + terms.mlm_weight * mlm + terms.mse_weight * mse
        return total, ce, mlm, mse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        # Training passes 1. On a CPU a comparison is cheaper than a pass over [V, D]; on other
        # devices it would wait for the device.
        if grad_total.device.type != "cpu" or grad_total != 1:
            gradients = [gradient * grad_total for gradient in gradients]
        return (*gradients, None, None, None)


def _cut(rows: slice, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` rows."""
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))


def _block_rows(logits_CV: Tensor) -> int:
    """Rows of a block; on other devices a chunk is one."""
    rows, vocabulary = logits_CV.shape
    if logits_CV.device.type != "cpu":
        return rows
    return max(1, CPU_LOGITS // vocabulary) * torch.get_num_threads()


def _block(
    logits_CV: Tensor, products_CV: Tensor | None, part: slice, terms: HeadTerms, sums: Tensor
) -> Tensor:
    """Add this block's L_ce, L_mlm and L_mse to ``sums``; return the gradient by its logits.

    Args:
        logits_CV: The student's logits; overwritten.
        products_CV: The teacher's, from ``FullTarget.products``.
        part: Which of the N rows.
        terms: Everything else.
        sums: L_ce, L_mlm and L_mse so far.
    """
    gradients: list[Tensor] = []
    teacher_CV: Tensor | None = None
    if terms.labels_N is not None:
        weighted_CV = logits_CV if terms.log_weight_V is None else logits_CV + terms.log_weight_V
        loss, gradient_CV = _cross_entropy(weighted_CV, terms.labels_N[part], terms.mlm_weight)
        sums[1] += loss
        gradients.append(gradient_CV)
    if isinstance(terms.target, FullTarget) and products_CV is not None:
        teacher_CV = replayed_logits(terms.target, products_CV, logits_CV.dtype)
    if terms.mse_weight and isinstance(terms.target, FullTarget) and teacher_CV is not None:
        loss_C, gradient_CV = squared_error_rows(
            logits_CV, teacher_CV, terms.target, part, terms.log_weight_V
        )
        sums[2] += _weigh(loss_C, gradient_CV, terms.mse_weight, part, terms)
        gradients.append(gradient_CV)
    if terms.ce_weight and terms.target is not None:
        scaled_CV = logits_CV.div_(terms.temperature)
        if terms.log_weight_V is not None:
            scaled_CV.add_(terms.log_weight_V)
        if isinstance(terms.target, SparseTarget):
            loss_C, gradient_CV = kl_sparse_rows(scaled_CV, terms.target, part)
        else:
            assert teacher_CV is not None
            loss_C, gradient_CV = kl_full_rows(
                scaled_CV, teacher_CV, terms.target, part, terms.temperature, terms.log_weight_V
            )
        # Loss T^2 * KL, logits divided by T: one T is left.
        loss = _weigh(loss_C, gradient_CV, terms.ce_weight * terms.temperature, part, terms)
        sums[0] += terms.temperature**2 * loss
        gradients.append(gradient_CV)
    if not gradients:
        return logits_CV.zero_()
    return functools.reduce(Tensor.add_, gradients)


def _weigh(
    loss_C: Tensor, by_logits_CV: Tensor, weight: float, part: slice, terms: HeadTerms
) -> Tensor:
    """Sum of the rows' losses by importance; scales the gradient in place, also by ``weight``."""
    if terms.row_weights_N is None:
        by_logits_CV.mul_(weight)
        return loss_C.sum()
    importance_C = terms.row_weights_N[part].to(loss_C.dtype)
    by_logits_CV.mul_((weight * importance_C)[:, None])
    return importance_C.dot(loss_C)


def _cross_entropy(logits_CV: Tensor, labels_C: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Sum of -log q[label], and ``weight (q - onehot)``; rows without a label give 0."""
    has_label_C1 = (labels_C >= 0).to(logits_CV.dtype)[:, None]
    index_C1 = labels_C.clamp(min=0)[:, None]
    q_CV, log_z_C = normalized(logits_CV)
    loss_C1 = log_z_C[:, None] - logits_CV.gather(1, index_C1)
    weight_C1 = weight * has_label_C1
    return (loss_C1 * has_label_C1).sum(), q_CV.mul_(weight_C1).scatter_add_(
        1, index_C1, -weight_C1
    )
