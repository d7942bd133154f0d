"""Replayed logits put right where the cache knows better: at the stored tokens of a position.

Replay (``lm_head.py``) gives every logit, with the error of the coded hidden state. Stored logits
are exact but few. Joined, the stored tokens keep their own probabilities, and the replayed softmax
shares out what they leave.

The stored ids of a position are distinct; where it holds fewer than K of them the rest of its
row is padding (value -inf) whose id is 0 and may be the id of a stored token, so both updates
are minima and maxima, in which padding has no effect and order does not matter.

Shapes: ``N`` positions, ``K`` stored tokens, ``V`` vocabulary.
"""

import torch
from torch import Tensor

INFINITY = float("inf")
NEG = -1e4
"""Stands for log 0: its exponential is 0 in every type, and 0 times it is 0 and not nan."""


@torch.no_grad()
def corrected_log_probs(
    scaled_NV: Tensor, ids_NK: Tensor, log_p_NK: Tensor, log_tail_N: Tensor
) -> Tensor:
    """Head-corrected replay: log probabilities of the joined distribution, in place.

    At stored tokens ``log p_k`` as given; elsewhere

        log_tail + scaled_v - log sum_{w not stored} exp(scaled_w)

    Each row sums to one as far as ``sum_k p_k + p_tail = 1``. A row of padding alone (``log_p``
    -inf, ``log_tail`` 0) is ``log_softmax(scaled)``. All results are finite: where no mass is
    left to the rest (``log_tail`` -inf), they are about ``NEG`` or below, of which exp is 0.

    Args:
        scaled_NV: Replayed logits divided by T; overwritten.
        ids_NK: Stored token ids, int64.
        log_p_NK: Their log probabilities at T, -inf in padding, see
            ``topk_log_probs``.
        log_tail_N: Log of the mass outside the stored tokens at T.

    Returns:
        ``scaled_NV``, now log probabilities.
    """
    knock_out(scaled_NV, ids_NK, log_p_NK)
    log_tail_N1 = log_tail_N.to(scaled_NV.dtype).clamp(min=NEG)[:, None]
    torch.add(torch.log_softmax(scaled_NV, -1), log_tail_N1, out=scaled_NV)
    return _put(scaled_NV, ids_NK, log_p_NK)


@torch.no_grad()
def substituted_logits(logits_NV: Tensor, ids_NK: Tensor, values_NK: Tensor) -> Tensor:
    """Replayed logits with the stored ones in their places, in place.

    Args:
        logits_NV: Replayed raw logits (T = 1), above ``NEG``; overwritten.
        ids_NK: Stored token ids, int64.
        values_NK: Their raw logits, above ``NEG``; -inf in padding.

    Returns:
        ``logits_NV``.
    """
    return _put(knock_out(logits_NV, ids_NK, values_NK), ids_NK, values_NK)


def knock_out(x_NV: Tensor, ids_NK: Tensor, values_NK: Tensor) -> Tensor:
    """Give the stored tokens ``NEG``, in place; ``values_NK`` is -inf where one is padding."""
    floor_NK = torch.where(values_NK.isneginf(), INFINITY, NEG).to(x_NV.dtype)
    return x_NV.scatter_reduce_(1, ids_NK, floor_NK, "amin")


def _put(x_NV: Tensor, ids_NK: Tensor, values_NK: Tensor) -> Tensor:
    """Put values above ``NEG`` into places that were knocked out."""
    return x_NV.scatter_reduce_(1, ids_NK, values_NK.to(x_NV.dtype), "amax")
