"""The distillation losses as plain formulas: pure functions that return sums.

Shapes: ``N`` selected positions, ``K`` stored tokens, ``V`` vocabulary, ``D`` hidden width.

Every function sums over positions; the training step divides by the global number of positions,
so that neither gradient accumulation nor the number of devices changes the result. Training
itself uses :func:`stages.student_train.head_loss.head_loss`, which computes the same sums and
their gradients in row chunks; the tests hold the two against each other.
"""

import torch
from torch import Tensor
from torch.nn import functional


def kl_full(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float) -> Tensor:
    """L_ce from full distributions.

    ``T^2 * sum_n sum_v p_nv (log p_nv - log q_nv)`` with ``p = softmax(teacher / T)`` and
    ``q = softmax(student / T)``. The factor T^2 keeps the size of the gradient when T changes
    (Hinton et al. 2015, arXiv:1503.02531); DistilBERT's L_ce (Sanh et al. 2019,
    arXiv:1910.01108) is this sum divided by the number of positions.

    Returns:
        Scalar, summed over positions, in nats times T^2.
    """
    log_q_NV = functional.log_softmax(student_logits_NV / temperature, dim=-1)
    log_p_NV = functional.log_softmax(teacher_logits_NV / temperature, dim=-1)
    return temperature**2 * (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum()


def sparse_log_probs(
    logits_NK: Tensor, logsumexp_N: Tensor, log_tail_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Teacher distribution over the stored tokens plus one tail bucket.

    ``log p_k = logit_k / T - logsumexp``; head and tail are divided by their sum, which differs
    from 1 only through the rounding of the stored values.

    Args:
        logits_NK: Stored raw logits.
        logsumexp_N: Logsumexp of all V logits divided by T.
        log_tail_N: Log of the mass outside the stored tokens at T; -inf: no such mass.
        temperature: T.

    Returns:
        ``log_p_NK`` and ``log_tail_N`` that sum to 1 after exp.
    """
    log_p_NK = logits_NK / temperature - logsumexp_N[:, None]
    log_sum_N = torch.logaddexp(torch.logsumexp(log_p_NK, dim=-1), log_tail_N)
    return log_p_NK - log_sum_N[:, None], log_tail_N - log_sum_N


def kl_sparse(
    student_logits_NV: Tensor,
    ids_NK: Tensor,
    log_p_NK: Tensor,
    log_tail_N: Tensor,
    temperature: float,
) -> Tensor:
    """L_ce from stored logits: a head of K tokens and one bucket for everything else.

    ``T^2 * sum_n [sum_k p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail)]`` with
    ``q = softmax(student / T)`` and ``q_tail`` its mass outside the stored tokens, from a
    logsumexp over the rest (``1 - sum q_k`` would cancel). ``log_tail = -inf`` contributes
    nothing. It is the KL divergence of the two distributions after merging the tail into one
    outcome, so never more than :func:`kl_full`, and equal to it where K = V. T^2 as there.

    Args:
        student_logits_NV: The student's logits.
        ids_NK: Stored token ids, distinct within a row.
        log_p_NK: Teacher log probabilities of those ids at T, see :func:`sparse_log_probs`.
        log_tail_N: Log of the teacher's remaining mass at T.
        temperature: T.

    Returns:
        Scalar, summed over positions, in nats times T^2.
    """
    scaled_NV = student_logits_NV / temperature
    head_NK = scaled_NV.gather(1, ids_NK)
    log_z_N = torch.logsumexp(scaled_NV, dim=-1)
    loss = (log_p_NK.exp() * (log_p_NK - head_NK + log_z_N[:, None])).sum()
    if ids_NK.shape[1] < student_logits_NV.shape[1]:
        rest_NV = scaled_NV.scatter(1, ids_NK, float("-inf"))
        log_q_tail_N = torch.logsumexp(rest_NV, dim=-1) - log_z_N
        term_N = log_tail_N.exp() * (log_tail_N - log_q_tail_N)
        loss = loss + torch.where(log_tail_N.isneginf(), 0.0, term_N).sum()
    return temperature**2 * loss


def masked_cross_entropy(student_logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """L_mlm: ``sum_n -log softmax(student)[label]`` at T = 1; labels below 0 do not count.

    Masked language modelling as in BERT (Devlin et al. 2018, arXiv:1810.04805).
    """
    return functional.cross_entropy(student_logits_NV, labels_N, ignore_index=-100, reduction="sum")


def cosine_distance(student_hidden_ND: Tensor, teacher_hidden_ND: Tensor) -> Tensor:
    """L_cos: ``sum_n 1 - cos(student_n, teacher_n)`` of the last hidden states.

    DistilBERT's alignment term (Sanh et al. 2019, arXiv:1910.01108), in float32 whatever the
    autocast.
    """
    student_ND = student_hidden_ND.to(torch.promote_types(student_hidden_ND.dtype, torch.float32))
    cosine_N = functional.cosine_similarity(
        student_ND, teacher_hidden_ND.to(student_ND.dtype), dim=-1
    )
    return (1.0 - cosine_N).sum()
