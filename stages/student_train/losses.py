"""The distillation losses as plain formulas: pure functions that return sums.

Shapes: ``N`` selected positions, ``K`` stored tokens, ``R`` draws, ``V`` vocabulary, ``D`` hidden
width.

Every function sums over positions and returns a scalar, L_ce in nats times T^2; the training step
divides by the global number of positions, so that neither gradient accumulation nor the number of
devices changes the result. Importance weights (None: 1) multiply a position's term: with
``cache.positions = "masked+P"`` the sum then estimates the one over all positions. Training uses
``lm_head_loss``, which computes the same sums and their gradients in row chunks; tests compare the
two. The formulas here are written for reading, not for speed.

Of stored tokens, ``ids_NK`` are distinct within a row but for padding, ``log_p_NK`` are the
teacher's log probabilities at T (-inf: padding, whatever the id), and ``log_tail_N`` is the log of
its mass outside them. K may be 0.
"""

import torch
from torch import Tensor
from torch.nn import functional

NEGATIVE_INFINITY = float("-inf")
NOTHING = -1e4
"""In place of log 0 where a gradient passes: exp gives exactly 0, without 0 times infinity."""


def kl_full(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float) -> Tensor:
    """L_ce from full distributions.

    ``T^2 * sum_n sum_v p_nv (log p_nv - log q_nv)`` with ``p = softmax(teacher / T)`` and
    ``q = softmax(student / T)``. The factor T^2 keeps the size of the gradient when T changes
    (Hinton et al. 2015, arXiv:1503.02531); DistilBERT's L_ce (Sanh et al. 2019,
    arXiv:1910.01108) is this sum divided by the number of positions.
    """
    log_p_NV = functional.log_softmax(teacher_logits_NV / temperature, dim=-1)
    return kl_replay(student_logits_NV, log_p_NV, temperature)


def corrected_log_probs(
    teacher_logits_NV: Tensor,
    ids_NK: Tensor,
    log_p_NK: Tensor,
    log_tail_N: Tensor,
    temperature: float,
) -> Tensor:
    """Replay corrected by the stored logits: their probabilities, and the replayed shape elsewhere.

    ``log p_v = log p_k`` where v is the k-th stored token; elsewhere ``log_tail + z_v / T -
    logsumexp of z / T over the tokens that are not stored``, z the replayed logits. It sums to 1
    because stored tokens and tail do.

    Returns:
        Log probabilities [N, V].
    """
    stored_NV, p_NV = _spread(teacher_logits_NV, ids_NK, log_p_NK)
    rest_NV = (teacher_logits_NV / temperature).masked_fill(stored_NV, NOTHING)
    rest_NV = functional.log_softmax(rest_NV, dim=-1) + log_tail_N[:, None]
    return torch.where(stored_NV, p_NV.log(), rest_NV)


def kl_replay(
    student_logits_NV: Tensor,
    log_p_NV: Tensor,
    temperature: float,
    *,
    residual_ids_NR: Tensor | None = None,
    residual_mass_N: Tensor | None = None,
    weights_N: Tensor | None = None,
) -> Tensor:
    """L_ce from a replayed distribution p_hat, with or without residual draws.

    ``T^2 * sum_n w_n [sum_v p_hat_nv (log p_hat_nv - log q_nv) + sum_j s_j (mass_n / h)
    (log p_hat_nv_j - log q_nv_j)]`` with ``h = R / 2``, ``s_j = +1`` for the first h draws v_j
    and -1 for the others. The draws are unbiased for ``p - p_hat``, so the expectation of the loss
    is ``T^2 sum_n w_n [KL(p || q) - KL(p || p_hat)]``: its gradient is that of the true
    distribution p, and its value differs by a constant of the student; with draws, single values
    may be negative. T^2 as in :func:`kl_full`.

    Args:
        student_logits_NV: The student's logits.
        log_p_NV: Log of p_hat, normalised.
        temperature: T.
        residual_ids_NR: Draws from the positive part of ``p - p_hat``, then as many from the
            negative part.
        residual_mass_N: Mass of the positive part (and of the negative one).
        weights_N: Importance weights.
    """
    log_q_NV = functional.log_softmax(student_logits_NV / temperature, dim=-1)
    gap_NV = log_p_NV.clamp(min=NOTHING) - log_q_NV
    loss_N = (log_p_NV.exp() * gap_NV).sum(-1)
    if residual_ids_NR is not None and residual_mass_N is not None:
        half = residual_ids_NR.shape[1] // 2
        gap_NR = gap_NV.gather(1, residual_ids_NR)
        signed_N = gap_NR[:, :half].sum(-1) - gap_NR[:, half:].sum(-1)
        loss_N = loss_N + residual_mass_N / half * signed_N
    return temperature**2 * _weighted(loss_N, weights_N).sum()


def kl_sparse(
    student_logits_NV: Tensor,
    ids_NK: Tensor,
    log_p_NK: Tensor,
    log_tail_N: Tensor,
    temperature: float,
    weights_N: Tensor | None = None,
) -> Tensor:
    """L_ce from stored logits: K stored tokens, and one bucket for everything else.

    ``T^2 * sum_n w_n [sum_k p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail)]`` with
    ``q = softmax(student / T)`` and ``q_tail`` its mass outside the stored tokens, from a
    logsumexp over the rest (``1 - sum q_k`` would cancel). ``log_tail = -inf`` contributes
    nothing. It is the KL divergence of the two distributions after merging the tail into one
    outcome, so never more than :func:`kl_full`, and equal to it where K = V. T^2 as there.
    """
    stored_NV, p_NV = _spread(student_logits_NV, ids_NK, log_p_NK)
    log_q_NV = functional.log_softmax(student_logits_NV / temperature, dim=-1)
    loss_N = (torch.xlogy(p_NV, p_NV) - p_NV * log_q_NV).sum(-1)
    log_q_tail_N = torch.logsumexp(log_q_NV.masked_fill(stored_NV, NOTHING), dim=-1)
    tail_N = log_tail_N.exp() * (log_tail_N.clamp(min=NOTHING) - log_q_tail_N)
    return temperature**2 * _weighted(loss_N + tail_N, weights_N).sum()


def cross_entropy_sampled(
    student_logits_NV: Tensor,
    ids_NK: Tensor,
    log_p_NK: Tensor,
    log_tail_N: Tensor,
    tail_ids_NR: Tensor,
    temperature: float,
    weights_N: Tensor | None = None,
) -> Tensor:
    """L_ce from stored logits and tokens drawn from the tail.

    ``T^2 * sum_n w_n [sum_k p_k (log p_k - log q_k) - sum_j (p_tail / R) log q_v_j]``: every draw
    v_j has ``1 / R`` of the tail's mass. The expectation over the draws is
    ``KL(p || q)`` plus ``-sum of p log p over the tail``, which does not depend on the student,
    so the gradient is unbiased (random sampling of logits as in Anshumann et al. 2025,
    arXiv:2503.16870, here for the tail alone). The draws ``tail_ids_NR`` are with replacement, from
    the teacher's tail at T. T^2 as in :func:`kl_full`.
    """
    _, p_NV = _spread(student_logits_NV, ids_NK, log_p_NK)
    log_q_NV = functional.log_softmax(student_logits_NV / temperature, dim=-1)
    loss_N = (torch.xlogy(p_NV, p_NV) - p_NV * log_q_NV).sum(-1)
    loss_N = loss_N - log_tail_N.exp() * log_q_NV.gather(1, tail_ids_NR).mean(-1)
    return temperature**2 * _weighted(loss_N, weights_N).sum()


def squared_error(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, weights_N: Tensor | None = None
) -> Tensor:
    """L_mse: ``sum_n w_n sum_v (student_nv - teacher_nv)^2`` of raw logits, no temperature.

    The published DistilBERT step (huggingface/transformers, ``distiller.py``) divides this sum by
    the number of positions, not by V.
    """
    return _weighted((student_logits_NV - teacher_logits_NV).square().sum(-1), weights_N).sum()


def masked_cross_entropy(student_logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """L_mlm: ``sum_n -log softmax(student)[label]`` at T = 1; labels below 0 do not count.

    Masked language modelling as in BERT (Devlin et al. 2018, arXiv:1810.04805).
    """
    return functional.cross_entropy(student_logits_NV, labels_N, ignore_index=-100, reduction="sum")


def cosine_distance(
    student_hidden_ND: Tensor, teacher_hidden_ND: Tensor, weights_N: Tensor | None = None
) -> Tensor:
    """L_cos: ``sum_n w_n (1 - cos(student_n, teacher_n))`` of the last hidden states.

    DistilBERT's alignment term (Sanh et al. 2019, arXiv:1910.01108), in float32 whatever the
    autocast.
    """
    student_ND = student_hidden_ND.to(torch.promote_types(student_hidden_ND.dtype, torch.float32))
    cosine_N = functional.cosine_similarity(
        student_ND, teacher_hidden_ND.to(student_ND.dtype), dim=-1
    )
    return _weighted(1.0 - cosine_N, weights_N).sum()


def over_sample(
    logits_NV: Tensor, ids_S: Tensor, log_weight_S: Tensor, temperature: float
) -> Tensor:
    """Logits of a sample of the vocabulary, for the losses of a softmax at temperature T.

    L_mse is no such loss: it weighs each of its squares by w_v.

    ``z_v + T log w_v`` for v in S, where token v is in S with probability pi_v and ``w_v = 1 /
    pi_v``. With them ``sum_S exp(z_v / T + log w_v)`` estimates the normaliser
    ``Z = sum_V exp(z_v / T)``: its mean is Z, and where tokens are drawn independently its variance
    is ``sum_V (1 / pi_v - 1) exp(2 z_v / T)``. The losses are ratios of such sums, so their bias is
    of the order of that variance over Z^2, one over the size of S. Tokens that a loss names (stored
    tokens, draws, labels) need ``pi_v = 1``.

    Returns:
        Logits [N, S].
    """
    return logits_NV[:, ids_S] + temperature * log_weight_S


def _weighted(loss_N: Tensor, weights_N: Tensor | None) -> Tensor:
    return loss_N if weights_N is None else loss_N * weights_N


def _spread(like_NV: Tensor, ids_NK: Tensor, log_p_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are stored, bool [N, V], and their probabilities, 0 elsewhere."""
    p_NV = torch.zeros_like(like_NV).scatter_add(1, ids_NK, log_p_NK.to(like_NV.dtype).exp())
    real_NK = (log_p_NK > NEGATIVE_INFINITY).to(like_NV.dtype)
    return torch.zeros_like(like_NV).scatter_add(1, ids_NK, real_NK) > 0, p_NV
