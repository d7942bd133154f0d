"""Replay and stored logits joined in one distribution.

Replay (``lm_head.py``) gives the logits of all tokens, with the error of the coded hidden state.
The stored logits of the K likeliest tokens are exact. In the joined distribution these tokens have
their stored probabilities, and the replayed softmax divides the rest of the mass.

The stored ids of a position are distinct. If a position has fewer than K, the rest of its row is
padding: value -inf and id 0, which may also be the id of a stored token. So updates are minima and
maxima, on which padding has no effect.

Shapes: ``N`` positions, ``K`` stored tokens, ``V`` vocabulary.
"""

import torch
from torch import Tensor

INFINITY = float("inf")
NEG = -1e4
"""In place of log 0: its exponential is 0 in every type, and 0 times it is 0, not nan."""


@torch.no_grad()
def corrected_log_probs(
    scaled_NV: Tensor, ids_NK: Tensor, log_p_NK: Tensor, log_tail_N: Tensor
) -> Tensor:
    """Log probabilities of the joined distribution, in place.

    At stored tokens ``log p_k`` as given; at other tokens

        log_tail + scaled_v - log sum_{w not stored} exp(scaled_w)

    A row of padding only (``log_p`` -inf, ``log_tail`` 0) is ``log_softmax(scaled)``. All results
    are finite: if no mass is left for other tokens (``log_tail`` -inf), these get about ``NEG`` or
    less, of which exp is 0.

    Args:
        scaled_NV: Replayed logits divided by T; overwritten.
        ids_NK: Stored token ids, int64.
        log_p_NK: Their log probabilities at T, -inf in padding, see ``topk_log_probs``.
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
    """Put the stored logits into the replayed ones, in place.

    Args:
        logits_NV: Replayed raw logits (T = 1), above ``NEG``; overwritten.
        ids_NK: Stored token ids, int64.
        values_NK: Their raw logits, above ``NEG``; -inf in padding.

    Returns:
        ``logits_NV``.
    """
    return _put(knock_out(logits_NV, ids_NK, values_NK), ids_NK, values_NK)


def knock_out(x_NV: Tensor, ids_NK: Tensor, values_NK: Tensor) -> Tensor:
    """Set the stored tokens to ``NEG``, in place; ``values_NK`` is -inf in padding."""
    floor_NK = torch.where(values_NK.isneginf(), INFINITY, NEG).to(x_NV.dtype)
    return x_NV.scatter_reduce_(1, ids_NK, floor_NK, "amin")


def _put(x_NV: Tensor, ids_NK: Tensor, values_NK: Tensor) -> Tensor:
    """Put values above ``NEG`` in places that were set to ``NEG``."""
    return x_NV.scatter_reduce_(1, ids_NK, values_NK.to(x_NV.dtype), "amax")
