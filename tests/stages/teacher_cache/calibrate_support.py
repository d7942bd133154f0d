"""A head and hidden states to calibrate codecs for."""

import torch

from distilcache.data.codecs.hidden import HiddenCodec
from distilcache.data.codecs.lm_head import ROLES, LMHead

D, V = 24, 150


def make_head(seed=0, scale=1.0) -> LMHead:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {
        "dense.weight": draw(D, D) / D**0.5,
        "dense.bias": 0.1 * draw(D),
        "norm.weight": 1 + 0.1 * draw(D),
        "norm.bias": 0.1 * draw(D),
        "decoder.weight": scale * draw(V, D) / 2,
        "decoder.bias": draw(V),
    }
    assert set(tensors) == set(ROLES) - {"decoder.columns"}
    return LMHead(tensors, "gelu", 1e-12)


def states(rows=1500, seed=3) -> torch.Tensor:
    """Correlated hidden states with one outlier dimension, as in real encoders."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=generator) * torch.logspace(0.5, -1.5, D)
    values = torch.randn(rows, D, generator=generator) @ mix.T + torch.randn(D, generator=generator)
    values[:, 5] *= 30
    return values


def round_trip(codec: HiddenCodec, hidden: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(hidden)[0])
