"""The teacher's predictions at positions of a batch.

Shapes: ``N`` positions with the teacher's distribution, ``H`` positions with hidden states, ``K``
stored logits, ``V`` vocabulary, ``D`` hidden width.
"""

from typing import Any

import torch
from torch import Tensor

from distilcache.data.distribution import Distribution, TopK
from distilcache.data.errors import UserError, require
from distilcache.data.loader.batch import Batch


class Predictions:
    """What the signals of a batch say of the teacher's distribution at N of its positions.

    Raises:
        UserError: The batch has no such signals.
    """

    def __init__(self, distribution: Distribution, batch: Batch) -> None:
        self._path = distribution.cache.path
        self._distribution = distribution
        self._batch = batch
        if "ce_index" not in batch:
            raise UserError(
                f"cache: {self._path} must hold a teacher's predictions, got only masks, "
                "relations or other layers; make one with cache.hidden_dtype=coded "
                "cache.hidden_layers=-1"
            )
        self.positions: Tensor = batch["ce_index"]
        """Of the N rows, into the flattened B * L positions, int64 [N]."""

    @torch.no_grad()
    def log_probs(self, temperature: float, rows: Any) -> Tensor:
        """Over the vocabulary, float32 [N, V]: as in the loss, with float32 products."""
        require(temperature > 0, f"cache: temperature must be above 0, got {temperature}")
        batch, distribution = self._batch, self._distribution
        require(
            distribution.replays,
            f"cache: {self._path} must hold hidden states of the last layer for all log "
            "probabilities, got stored logits alone; top_tokens() reads those",
        )
        hidden_HD = distribution.decoder(batch)
        hidden_ND = hidden_HD[batch["ce_rows"]] if "ce_rows" in batch else hidden_HD
        logits_NV = distribution.replayed(hidden_ND[rows])
        return distribution.log_probs(logits_NV, self._topk(rows), temperature)

    def likeliest(self, k: int, temperature: float, rows: Any) -> tuple[Tensor, Tensor]:
        """Ids of the likeliest tokens and their log probabilities, [N, at most k]."""
        require(k >= 1, f"cache: k must be at least 1, got {k}")
        if not self._distribution.replays:
            log_p_NK = self._topk_log_probs(temperature, rows)
            log_p, order = log_p_NK.topk(min(k, log_p_NK.shape[1]))
            return self._batch["logit_ids"][rows].gather(1, order), log_p
        log_p_NV = self.log_probs(temperature, rows)
        log_p, ids = log_p_NV.topk(min(k, log_p_NV.shape[1]))
        return ids, log_p

    def _topk(self, rows: Any) -> TopK:
        """The stored logits of some rows; K = 0 where there are none."""
        return TopK.of(self._batch, len(self.positions))[rows]

    def _topk_log_probs(self, temperature: float, rows: Any) -> Tensor:
        """Log probabilities of the stored tokens [N, K]."""
        known = self._distribution.temperatures
        require(
            temperature in known,
            "cache: temperature must be one that the cache holds where it has no hidden states "
            f"({', '.join(f'{t:g}' for t in known)}), got {temperature:g}",
        )
        return self._distribution.topk_log_probs(self._topk(rows), temperature)[0]
