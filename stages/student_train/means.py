"""Means of the loss terms between two log lines."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distilcache.stages.student_train.model import TERMS
from distilcache.stages.student_train.ranks import Ranks


class LossMeans:
    """Sums of the loss terms on the device, and the positions that they are sums over.

    Only :meth:`take` and :meth:`state` wait for the device. Trainer's own loss is a mean over the
    steps of this process, which an interruption would reset; these sums are kept in checkpoints.

    Args:
        weights: ``alpha`` of each term.
        ranks: The processes that train together; counts are over all of them.
        device: Where the losses are computed.
    """

    def __init__(self, weights: Mapping[str, float], ranks: Ranks, device: torch.device) -> None:
        self._weights = weights
        self._ranks = ranks
        self._sums = torch.zeros(len(TERMS), device=device)
        self._counts = dict.fromkeys(TERMS, 0)

    def empty(self) -> "LossMeans":
        """Others of the same losses, without any sums yet."""
        return LossMeans(self._weights, self._ranks, self._sums.device)

    def add(self, sums: Tensor) -> None:
        """Add this rank's sums of one micro-batch, in the order of ``TERMS``."""
        self._sums += sums

    def count(self, counts: Sequence[float]) -> None:
        """Add the positions of one step, over all ranks."""
        for term, count in zip(TERMS, counts, strict=True):
            self._counts[term] += int(count)

    def take(self) -> dict[str, float]:
        """``loss = sum of alpha * mean``, and the mean of each weighted term; resets the sums."""
        means = {
            term: value / max(self._counts[term], 1)
            for term, value in zip(TERMS, self._of_all(), strict=True)
            if self._weights[term] > 0
        }
        self._sums.zero_()
        self._counts = dict.fromkeys(TERMS, 0)
        return {"loss": sum(self._weights[term] * mean for term, mean in means.items()), **means}

    def state(self) -> dict[str, Any]:
        """Sums and counts over all ranks, for a checkpoint; all ranks call it."""
        return {"sums": self._of_all(), "counts": dict(self._counts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set what :meth:`state` returned; the first rank takes the sums of all ranks."""
        # Checkpoints of earlier versions know fewer terms.
        self._counts = {term: int(state["counts"].get(term, 0)) for term in TERMS}
        if self._ranks.is_first:
            self._sums[: len(state["sums"])] = torch.tensor(state["sums"])

    def _of_all(self) -> list[float]:
        sums = self._sums.clone()
        self._ranks.sum_on_device(sums)
        values: list[float] = sums.tolist()
        return values
