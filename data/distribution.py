"""The teacher's distribution at any temperature, from what a cache stores of it.

If the last hidden state is stored, the LM head computes the full distribution (replay), with the
codec's bias, and stored logits replace those of the replay. Else only the stored tokens and the
mass of all others are known, at the temperatures of the cache.

Shapes: ``N`` positions, ``K`` stored tokens, ``V`` vocabulary, ``S`` temperatures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distilcache.data.cache.cache import Cache
from distilcache.data.codecs.hidden import HiddenDecoder
from distilcache.data.codecs.joined import corrected_log_probs, substituted_logits
from distilcache.data.codecs.lm_head import LMHead
from distilcache.data.codecs.logits import topk_log_probs


@dataclass(frozen=True, slots=True)
class TopK:
    """The stored logits of N positions; K may be 0."""

    ids_NK: Tensor
    """int64."""
    values_NK: Tensor
    """-inf: padding."""
    odds_NS: Tensor
    """Log odds of the stored tokens, at the temperatures of the cache."""

    @classmethod
    def of(cls, columns: Mapping[str, Any], count: int) -> "TopK":
        """From columns of a batch or a sample, tensors or arrays; K = 0 where there are none."""
        if "logit_ids" not in columns:
            return cls(torch.zeros(count, 0).long(), torch.zeros(count, 0), torch.zeros(count, 0))
        types = {"logit_ids": np.int64, "logit_values": np.float32, "log_odds": np.float32}
        return cls(*(torch.from_numpy(np.array(columns[n], t)) for n, t in types.items()))

    def __getitem__(self, rows: Any) -> "TopK":
        """Some of the positions."""
        return TopK(self.ids_NK[rows], self.values_NK[rows], self.odds_NS[rows])


class Distribution:
    """How the signals of an open cache give the teacher's distribution."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.encoding = cache.encoding
        self.temperatures = (1.0, *cache.encoding.temperatures)
        """Those at which the mass of the stored tokens is known."""

    @property
    def replays(self) -> bool:
        """Whether the full distribution is known, at every temperature."""
        return self.encoding.hidden_layer() is not None

    @cached_property
    def decoder(self) -> HiddenDecoder:
        """Decoder of the last layer's hidden states."""
        return self.cache.teacher.hidden_decoder()

    @cached_property
    def lm_head(self) -> LMHead:
        """The teacher's LM head."""
        return self.cache.teacher.lm_head()

    @torch.no_grad()
    def replayed(self, hidden_ND: Tensor) -> Tensor:
        """Raw logits [N, V] of hidden states, without any correction."""
        logits_NV: Tensor = self.lm_head(hidden_ND)
        return logits_NV

    @torch.no_grad()
    def log_probs(self, logits_NV: Tensor, topk: TopK, temperature: float) -> Tensor:
        """The full distribution [N, V] at T: replayed logits, corrected by all that is stored.

        The logits are those of :meth:`replayed`; they are not changed.
        """
        bias_V = self.bias_at(temperature)
        scaled_NV = (logits_NV if bias_V is None else logits_NV + bias_V) / temperature
        if not topk.ids_NK.shape[1]:
            return torch.log_softmax(scaled_NV, -1)
        if temperature in self.temperatures:
            log_p_NK, log_tail_N = self.topk_log_probs(topk, temperature)
            return corrected_log_probs(scaled_NV, topk.ids_NK, log_p_NK, log_tail_N)
        # The mass of the stored tokens is not known at T: their logits are.
        joined_NV = substituted_logits(logits_NV.clone(), topk.ids_NK, topk.values_NK)
        return torch.log_softmax(joined_NV / temperature, -1)

    def topk_log_probs(self, topk: TopK, temperature: float) -> tuple[Tensor, Tensor]:
        """Log probabilities of stored tokens [N, K] and all others [N], at a T of the cache."""
        odds_N = topk.odds_NS[:, self.temperatures.index(temperature)]
        return topk_log_probs(topk.values_NK, odds_N, temperature)

    def bias_at(self, temperature: float) -> Tensor | None:
        """What is added to replayed logits at T, [V]; None: nothing."""
        codec = self.decoder.codec if self.replays else None
        return None if codec is None else codec.bias_at(temperature)
