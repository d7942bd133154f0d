"""Random logits of a small vocabulary."""

import torch

V = 57
INFINITY = float("inf")
FIELDS = ("lengths", "ids", "values", "log_odds", "tail_ids")


def logits(rows, seed=0, scale=4.0, vocab=V) -> torch.Tensor:
    """Normal ones [N, V], the same for the same seed."""
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
