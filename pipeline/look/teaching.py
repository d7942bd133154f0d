"""The teacher's distribution at any temperature, from what a cache holds of it.

Where the last hidden state is stored, the full distribution as the losses see it: replayed by the
LM head, with the codec's bias, and the stored tokens in their places. Else the stored tokens and
one number for all others, at the temperatures of the cache.

Shapes: ``N`` positions, ``K`` stored tokens, ``V`` vocabulary, ``S`` temperatures.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distilcache.data.cache.cache import Cache
from distilcache.data.codecs.hidden import HiddenDecoder
from distilcache.data.codecs.joined import corrected_log_probs, substituted_logits
from distilcache.data.codecs.lm_head import LMHead
from distilcache.data.codecs.logits import head_log_probs
from distilcache.pipeline.look.sample import Sample


@dataclass(frozen=True, slots=True)
class Stored:
    """The stored logits of N positions; K may be 0."""

    ids_NK: Tensor
    values_NK: Tensor
    """-inf: padding."""
    odds_NS: Tensor

    @classmethod
    def of(cls, signals: Mapping[str, np.ndarray], count: int) -> "Stored":
        """What a sample holds; K = 0 where it holds no logits."""
        if "logit_ids" not in signals:
            return cls(
                torch.zeros(count, 0, dtype=torch.int64),
                torch.zeros(count, 0),
                torch.full((count, 1), float("-inf")),
            )
        return cls(
            torch.from_numpy(signals["logit_ids"].astype(np.int64)),
            torch.from_numpy(signals["logit_values"].astype(np.float32)),
            torch.from_numpy(signals["log_odds"].astype(np.float32)),
        )


class Teaching:
    """What the teacher of a cache said, by sample and temperature.

    Args:
        cache: An open cache.
    """

    def __init__(self, cache: Cache) -> None:
        encoding = cache.encoding
        self.encoding = encoding
        self.held = (1.0, *encoding.temperatures)
        """Temperatures at which the mass of the stored tokens is known."""
        self.decoder: HiddenDecoder | None = None
        self._lm_head: LMHead | None = None
        if encoding.hidden_layer() is not None:
            self.decoder = cache.hidden_decoder()
            self._lm_head = cache.lm_head()

    @property
    def replays(self) -> bool:
        """Whether the full distribution is known, at every temperature."""
        return self.decoder is not None

    def stored(self, sample: Sample) -> Stored:
        """The stored logits of a sample."""
        return Stored.of(sample.signals, len(sample.positions))

    @torch.no_grad()
    def hidden(self, sample: Sample) -> Tensor | None:
        """Last hidden states at the sample's positions, float32 [N, D]; None: not stored."""
        if self.decoder is None:
            return None
        return decode_hidden(self.decoder, sample.signals[self.decoder.name])

    @torch.no_grad()
    def replayed(self, hidden_ND: Tensor) -> Tensor:
        """Raw logits [N, V], without any correction."""
        assert self._lm_head is not None
        logits: Tensor = self._lm_head(hidden_ND)
        return logits

    @torch.no_grad()
    def log_probs(self, logits_NV: Tensor, stored: Stored, temperature: float) -> Tensor:
        """The full distribution [N, V] at T from :meth:`replayed` logits, corrected by the rest."""
        bias_V = self._bias(temperature)
        scaled_NV = (logits_NV if bias_V is None else logits_NV + bias_V) / temperature
        if not stored.ids_NK.shape[1]:
            return torch.log_softmax(scaled_NV, -1)
        if temperature in self.held:
            log_p_NK, log_tail_N = self.head(stored, temperature)
            return corrected_log_probs(scaled_NV, stored.ids_NK, log_p_NK, log_tail_N)
        joined_NV = substituted_logits(logits_NV.clone(), stored.ids_NK, stored.values_NK)
        return torch.log_softmax(joined_NV / temperature, -1)

    def bias(self, temperature: float, token: int) -> float:
        """What is added to a replayed logit at T; 0 where the cache has no such bias."""
        bias_V = self._bias(temperature)
        return 0.0 if bias_V is None else float(bias_V[token])

    def has_bias(self, temperature: float) -> bool:
        """Whether :meth:`bias` is anything but 0 at T."""
        return self._bias(temperature) is not None

    def _bias(self, temperature: float) -> Tensor | None:
        codec = None if self.decoder is None else self.decoder.codec
        return None if codec is None else codec.bias_at(temperature)

    def head(self, stored: Stored, temperature: float) -> tuple[Tensor, Tensor]:
        """Log probabilities of the stored tokens [N, K], and of all others [N], at a held T."""
        if not stored.ids_NK.shape[1]:
            return stored.values_NK, torch.zeros(len(stored.values_NK))
        odds_N = stored.odds_NS[:, self.held.index(temperature)]
        return head_log_probs(stored.values_NK, odds_N, temperature)


def decode_hidden(decoder: HiddenDecoder, stored: np.ndarray) -> Tensor:
    """Hidden states of a sample's rows: code planes [N, G] or plain values [N, D]."""
    # A copy: a sample's rows are read-only views of its block.
    rows = torch.from_numpy(np.array(stored.T if decoder.codec else stored, order="C"))
    hidden: Tensor = decoder({decoder.name: rows})
    return hidden
