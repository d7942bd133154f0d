"""The teacher's distribution in its several forms, and the loss of one chunk of rows.

The functions take the student's logits of C rows and return each row's loss and its gradient with
respect to those logits, computed in place where possible: each needs a few buffers of C x V. No
shape depends on the data, and nothing waits for the device.

Stored tokens are padded: where a row has fewer than K, ``log_p`` (and the raw value) is -inf, and
the id there may be that of a real token. So stored tokens enter by operations that padding does not
change: minimum with +inf, maximum with -inf, adding 0.

Shapes: ``N`` selected positions, ``C`` rows of one chunk, ``K`` stored tokens, ``R`` draws, ``V``
vocabulary, ``D`` width of the teacher's decoder.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distilcache.data.codecs.joined import NEG, knock_out, substituted_logits


@dataclass(frozen=True, slots=True)
class TopkTarget:
    """The stored tokens of each position, with the teacher's exact logits."""

    ids_NK: Tensor
    values_NK: Tensor
    """Raw logits; -inf: padding."""
    log_p_NK: Tensor | None
    """Log probabilities at the temperature of the loss; -inf: padding. None: their mass is not
    known, and the raw logits alone replace the replayed ones."""
    log_tail_N: Tensor | None
    """Log of the mass outside the stored tokens; 0 where a row has none."""


@dataclass(frozen=True, slots=True)
class ResidualTarget:
    """Signed draws from the true minus the replayed distribution, at the loss's temperature."""

    ids_NR: Tensor
    """R is even; the first half adds probability, the second half subtracts it."""
    mass_N: Tensor
    """Probability that the draws of each half add up to."""


@dataclass(frozen=True, slots=True)
class FullTarget:
    """The teacher's full distribution, replayed by its decoder chunk by chunk."""

    rows_ND: Tensor
    """Input of the teacher's decoder (after the LM head's transform); D is the teacher's width."""
    weight_VD: Tensor
    bias_V: Tensor
    replay_bias_V: Tensor | None = None
    """Added to the logits of L_ce: corrects the bias of the softmax of coded hidden states at T."""
    topk: TopkTarget | None = None
    """Corrects the replay: stored tokens get their exact logits and probabilities."""
    residual: ResidualTarget | None = None
    """Makes the (corrected) replay unbiased."""

    def products(self, chunk: slice, product: torch.dtype) -> Tensor:
        """Raw logits of some rows without their bias, [C, V] in the type ``product``."""
        return self.rows_ND[chunk].to(product) @ self.weight_VD.to(product).T


@dataclass(frozen=True, slots=True)
class SparseTarget:
    """The teacher's stored tokens at the temperature of the loss, and the tail outside them."""

    ids_NK: Tensor
    """K may be 0."""
    log_p_NK: Tensor
    """-inf: padding."""
    log_tail_N: Tensor
    """Log of the mass outside the stored tokens; -inf: none."""
    tail_ids_NR: Tensor | None = None
    """Draws from the tail, each with 1 / R of its mass; None: one bucket for the tail."""


def replayed_logits(target: FullTarget, products_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """:meth:`FullTarget.products` with the bias, without the corrections; may be in place."""
    return products_CV.to(dtype).add_(target.bias_V)


def squared_error_rows(
    logits_CV: Tensor,
    teacher_CV: Tensor,
    target: FullTarget,
    part: slice,
    log_weight_V: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per row ``sum_v w_v (student_v - teacher_v)^2``, and its gradient by the student's logits.

    Stored logits replace the replayed ones. ``replay_bias_V`` is not added: rounding errors bias
    the softmax, not the logits themselves. w is 1 but where the vocabulary is sampled.
    """
    if target.topk is not None:
        substituted_logits(teacher_CV, target.topk.ids_NK[part], target.topk.values_NK[part])
    difference_CV = logits_CV - teacher_CV
    if log_weight_V is None:
        return torch.linalg.vecdot(difference_CV, difference_CV), difference_CV.mul_(2.0)
    weighted_CV = difference_CV * log_weight_V.exp()
    return torch.linalg.vecdot(difference_CV, weighted_CV), weighted_CV.mul_(2.0)


def normalized(scaled_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax [C, V] and logsumexp [C] with one exponential per element."""
    q_CV = torch.softmax(scaled_CV, dim=-1)
    # At the largest element, where log q is most precise.
    return q_CV, scaled_CV.amax(-1) - q_CV.amax(-1).log()


def kl_full_rows(
    scaled_CV: Tensor,
    teacher_CV: Tensor,
    target: FullTarget,
    part: slice,
    temperature: float,
    log_weight_V: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per row the KL of ``kl_replay``, without its T^2.

    Let a be the replayed logits divided by T, and p_hat = softmax(a), but stored tokens have their
    own p_k, and all others together have the mass of the tail:

        sum_v p_hat_v log p_hat_v = tail (log tail + sum_rest softmax(a)_v a_v - lse_rest a)
                                    + sum_k p_k log p_k

    Where the mass of the stored tokens is not known, their a is their stored logit divided by T,
    and p_hat = softmax(a) of all.

    Args:
        scaled_CV: The student's logits divided by T, plus the log weights.
        teacher_CV: From :func:`replayed_logits`; overwritten.
        target: Replay bias, stored logits and residual.
        part: Which rows.
        temperature: T.
        log_weight_V: Where the vocabulary is sampled, log of each token's weight.

    Returns:
        Loss [C], and its gradient [C, V] by the scaled logits: ``q - p_hat``, minus the residual
        at its draws.
    """
    topk = target.topk
    if target.replay_bias_V is not None:
        teacher_CV.add_(target.replay_bias_V)
    teacher_CV.div_(temperature)
    if log_weight_V is not None:
        teacher_CV.add_(log_weight_V)
    if topk is not None and topk.log_p_NK is None:
        substituted_logits(teacher_CV, topk.ids_NK[part], topk.values_NK[part] / temperature)
        topk = None
    if topk is not None and topk.log_p_NK is not None:
        knock_out(teacher_CV, topk.ids_NK[part], topk.log_p_NK[part])
    p_CV, log_rest_C = normalized(teacher_CV)
    q_CV, log_z_C = normalized(scaled_CV)
    gap_CV = teacher_CV.sub_(scaled_CV)
    loss_C = torch.linalg.vecdot(p_CV, gap_CV) - log_rest_C
    if topk is not None:
        loss_C = _put_topk(p_CV, loss_C, scaled_CV, topk, part)
    loss_C = loss_C + log_z_C
    gradient_CV = q_CV.sub_(p_CV)
    if target.residual is not None:
        ids_CR = target.residual.ids_NR[part]
        mass_CR = _signed_mass(target.residual.mass_N[part].to(loss_C.dtype), ids_CR.shape[1])
        # They sum to zero, so log z is not needed.
        log_p_CR = p_CV.gather(1, ids_CR).log().clamp(min=NEG)
        loss_C = loss_C + (mass_CR * (log_p_CR - scaled_CV.gather(1, ids_CR))).sum(-1)
        gradient_CV.scatter_add_(1, ids_CR, -mass_CR)
    return loss_C, gradient_CV


def _put_topk(
    p_CV: Tensor, loss_C: Tensor, scaled_CV: Tensor, topk: TopkTarget, part: slice
) -> Tensor:
    """Write the stored tokens' probabilities into ``p_CV``; return the loss with their terms."""
    assert topk.log_p_NK is not None
    assert topk.log_tail_N is not None
    ids_CK = topk.ids_NK[part]
    log_p_CK = topk.log_p_NK[part].to(p_CV.dtype)
    log_tail_C = topk.log_tail_N[part].to(p_CV.dtype)
    p_CK, tail_C = log_p_CK.exp(), log_tail_C.exp()
    p_CV.mul_(tail_C[:, None]).scatter_reduce_(1, ids_CK, p_CK, "amax")
    gap_CK = log_p_CK.clamp(min=NEG) - scaled_CV.gather(1, ids_CK)
    return tail_C * (loss_C + log_tail_C.clamp(min=NEG)) + (p_CK * gap_CK).sum(-1)


def _signed_mass(mass_C: Tensor, draws: int) -> Tensor:
    """What each draw adds to its token's probability: mass / (R/2), negative in the second half."""
    mass_C1 = (mass_C / (draws // 2))[:, None]
    return torch.cat([mass_C1, -mass_C1], 1).repeat_interleave(draws // 2, 1)


def kl_sparse_rows(scaled_CV: Tensor, target: SparseTarget, part: slice) -> tuple[Tensor, Tensor]:
    """Per row the loss of ``kl_sparse`` or ``cross_entropy_sampled``, without their T^2.

    See ``distilcache.stages.student_train.losses``.

    Args:
        scaled_CV: The student's logits divided by T; overwritten.
        target: Stored tokens, and draws from the tail or none.
        part: Which rows.

    Returns:
        Loss [C], and its gradient [C, V] by the scaled logits.
    """
    ids_CK, log_p_CK = target.ids_NK[part], target.log_p_NK[part].to(scaled_CV.dtype)
    log_tail_C = target.log_tail_N[part].to(scaled_CV.dtype)
    if target.tail_ids_NR is None:
        return _bucket_rows(scaled_CV, ids_CK, log_p_CK, log_tail_C)
    return _sampled_rows(scaled_CV, ids_CK, log_p_CK, log_tail_C, target.tail_ids_NR[part])


def _bucket_rows(
    scaled_CV: Tensor, ids_CK: Tensor, log_p_CK: Tensor, log_tail_C: Tensor
) -> tuple[Tensor, Tensor]:
    """KL of the stored tokens and the tail bucket.

    At stored tokens the gradient is ``q_k - p_k``; elsewhere ``q_v - p_tail q_v / q_tail``, the
    second factor being the student's softmax over the rest.
    """
    padding_CK = log_p_CK.isneginf()
    stored_CK = scaled_CV.gather(1, ids_CK)
    rest_CV, log_rest_C = normalized(knock_out(scaled_CV, ids_CK, log_p_CK))
    log_stored_C = torch.logsumexp(stored_CK.masked_fill(padding_CK, float("-inf")), dim=-1)
    log_z_C = torch.logaddexp(log_rest_C, log_stored_C)
    log_q_CK = stored_CK - log_z_C[:, None]
    p_CK, p_tail_C = log_p_CK.exp(), log_tail_C.exp()
    loss_C = (p_CK * (log_p_CK.clamp(min=NEG) - log_q_CK)).sum(-1)
    loss_C = loss_C + p_tail_C * (log_tail_C.clamp(min=NEG) - log_rest_C + log_z_C)
    # q_v - p_tail softmax_rest(v) = softmax_rest(v) (q_tail - p_tail): no overflow, and 0 at the
    # stored tokens.
    gap_C1 = ((log_rest_C - log_z_C).exp() - p_tail_C)[:, None]
    gradient_CV = rest_CV.mul_(gap_C1)
    stored_gradient_CK = (log_q_CK.exp() - p_CK).masked_fill(padding_CK, 0.0)
    return loss_C, gradient_CV.scatter_add_(1, ids_CK, stored_gradient_CK)


def _sampled_rows(
    scaled_CV: Tensor, ids_CK: Tensor, log_p_CK: Tensor, log_tail_C: Tensor, tail_ids_CR: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy against stored tokens and drawn tail; the gradient is ``q`` less both."""
    q_CV, log_z_C = normalized(scaled_CV)
    p_CK, tail_C = log_p_CK.exp(), log_tail_C.exp()
    mass_CR = (tail_C / tail_ids_CR.shape[1])[:, None].expand(tail_ids_CR.shape)
    log_q_CK = scaled_CV.gather(1, ids_CK) - log_z_C[:, None]
    log_q_CR = scaled_CV.gather(1, tail_ids_CR) - log_z_C[:, None]
    loss_C = (p_CK * (log_p_CK.clamp(min=NEG) - log_q_CK)).sum(-1)
    loss_C = loss_C - (mass_CR * log_q_CR).sum(-1)
    gradient_CV = q_CV.scatter_add_(1, ids_CK, -p_CK)
    return loss_C, gradient_CV.scatter_add_(1, tail_ids_CR, -mass_CR)
