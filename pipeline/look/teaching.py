"""The teacher's distribution at the positions of samples."""

import numpy as np
import torch
from torch import Tensor

from distilcache.data.codecs.hidden import HiddenDecoder
from distilcache.data.distribution import Distribution, TopK
from distilcache.pipeline.look.sample import Sample


class Teaching(Distribution):
    """What the teacher of a cache predicted, by sample and temperature."""

    def stored(self, sample: Sample) -> TopK:
        """The stored logits of a sample; K = 0 where it holds none."""
        return TopK.of(sample.signals, len(sample.positions))

    @torch.no_grad()
    def hidden(self, sample: Sample) -> Tensor | None:
        """Last hidden states at the sample's positions, float32 [N, D]; None: not stored."""
        if not self.replays:
            return None
        return decode_hidden(self.decoder, sample.signals[self.decoder.name])

    def bias(self, temperature: float, token: int) -> float:
        """What is added to a replayed logit at T; 0 where the cache has no such bias."""
        bias_V = self.bias_at(temperature)
        return 0.0 if bias_V is None else float(bias_V[token])


def decode_hidden(decoder: HiddenDecoder, stored: np.ndarray) -> Tensor:
    """Hidden states of a sample's rows: code planes [N, G] or plain values [N, D]."""
    # A copy: a sample's rows are read-only views of its block.
    rows = torch.from_numpy(np.array(stored.T if decoder.codec else stored, order="C"))
    hidden: Tensor = decoder({decoder.name: rows})
    return hidden
