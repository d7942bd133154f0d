"""Choose basis, step and prediction of the codec of a layer's relations.

The codec must keep what the relation softmax feels. With X = W h + b the queries (or keys, or
values) of one head of d units, and p_i = softmax(X x_i / sqrt(d)) the relations of position i,
noise in x_j is felt

    as a key by every row i     sum_i p_ij (1 - p_ij) x_i x_i'
    as a query by its own row   Cov over p_j of the rows of X
    and where both are j        p_jj (x_j (x_j - m_j)' + (x_j - m_j) x_j'),  m_j = sum_i p_ji x_i

The mean of the sum over positions, divided by d, is the Fisher metric of x; W carries it back to h.
As with the LM head (``calibrate.py``) its root turns relation error into plain Euclidean error.

Most of a lower layer's state follows from its token. So a linear map of the teacher's word
embedding, fitted by least squares, is taken off first; it needs no bytes.

Shapes: ``N`` positions, ``D`` width of what the layer reads, ``E`` width of the word embeddings,
``R`` relations, ``B`` sequences, ``L`` positions, ``P`` width of queries, ``A`` heads, ``d`` units.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from distilcache.data.codecs.hidden import HiddenCodec
from distilcache.data.codecs.relations import RelationMaps, in_heads, relation_kl, relation_logits
from distilcache.data.errors import require
from distilcache.stages.teacher_cache.calibrate import basis_of, with_limits
from distilcache.stages.teacher_cache.calibrate_step import step_for

TINY = 1e-30
"""In place of a sum of squares of 0: that of a coordinate which is always the same."""
FLOOR = 1e-4
"""Added to the metric's diagonal, as a fraction of its mean."""
RIDGE = 0.1
"""Added to the diagonal of the embeddings' covariance, as a fraction of its mean."""
MOST_GAIN = 3.0
"""Of a coordinate: one whose codes are nearly all 0 would be little but noise."""
DEAD_ZONE = 0.1
"""Of the codes: a value is rounded up from 0.6 on (measured: 5 % fewer bytes at the same error)."""
BASIS_TOKENS = 1 << 16
"""Tokens that prediction and basis are fitted to."""
METRIC_TOKENS = 1 << 13
"""Tokens whose relations give the metric."""
QUALITY_TOKENS = 1 << 12
"""Tokens whose relations the error is measured on."""
CHUNK_TOKENS = 1 << 10
"""Tokens, padding included, whose relations exist at a time."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Calibration sequences: one tensor of each per sequence."""

    read: Sequence[Tensor]
    """What the layer reads, float32 [L, D]."""
    embedded: Sequence[Tensor]
    """Word embeddings, float32 [L, E]."""

    def spaced(self, tokens: int) -> "Texts":
        """Evenly spaced sequences of about as many tokens."""
        total = sum(map(len, self.read))
        count = max(1, min(len(self.read), len(self.read) * tokens // max(1, total)))
        chosen = [i * len(self.read) // count for i in range(count)]
        return Texts([self.read[i] for i in chosen], [self.embedded[i] for i in chosen])

    def chunks(self) -> Iterator["Texts"]:
        """Sequences that are worked on together."""
        longest = max(map(len, self.read))
        size = max(1, CHUNK_TOKENS // longest)
        for first in range(0, len(self.read), size):
            part = slice(first, first + size)
            yield Texts(self.read[part], self.embedded[part])


def calibrate_relations(
    texts: Texts,
    maps: RelationMaps,
    heads: int,
    quality: float,
    progress: Callable[[float], Any] = lambda part: None,
    what: str = "the relations",
) -> HiddenCodec:
    """Fit the codec of what a layer reads to the relations of its queries, keys and values.

    Args:
        texts: Calibration sequences.
        maps: The layer's linear maps.
        heads: Relation heads that the error is measured in: the teacher's.
        quality: Mean relation KL in nats, over queries, keys and values, heads and positions.
        progress: Called with the fraction of the work that a part of it has been.
        what: Whose codec it is, for people.
    """
    metric = _metric(texts.spaced(METRIC_TOKENS), maps, heads)
    progress(0.3)
    fitted = texts.spaced(BASIS_TOKENS)
    read_ND, embedded_NE = torch.cat(list(fitted.read)), torch.cat(list(fitted.embedded))
    prediction = _prediction(read_ND, embedded_NE)
    left_ND = read_ND - embedded_NE @ prediction.to(read_ND.device)
    mean, analysis, synthesis, scale = basis_of(left_ND, metric)
    measured = texts.spaced(QUALITY_TOKENS)

    def codec(step: float) -> HiddenCodec:
        plain = with_limits(mean, analysis, synthesis, step, left_ND)
        plain = replace(plain, dead_zone=DEAD_ZONE)
        return replace(plain, offsets=_offsets(plain, left_ND), prediction=prediction)

    def error(step: float) -> float:
        return codec_kl(codec(step), measured, maps, heads)

    step = step_for(quality, error, scale, lambda part: progress(0.7 * part), what, "nats")
    found = codec(step)
    return replace(found, gains=_gains(found, left_ND))


def codec_kl(codec: HiddenCodec, texts: Texts, maps: RelationMaps, heads: int) -> float:
    """Mean relation KL in nats of coded states, over relations, heads and positions."""
    total = torch.zeros((), dtype=torch.float64)
    for chunk in texts.chunks():
        lengths = [len(read) for read in chunk.read]
        read_ND, embedded_NE = torch.cat(list(chunk.read)), torch.cat(list(chunk.embedded))
        decoded_ND = codec.decode(codec.encode(read_ND, embedded_NE)[0], embedded_NE)
        true_BLD, present_BL = _padded(chunk.read)
        again_BLD, _ = _padded(torch.split(decoded_ND, lengths))
        found = relation_kl(maps(true_BLD), maps(again_BLD), heads, present_BL)
        total += found.mean().cpu()
    return float(total) / sum(map(len, texts.read))


def _padded(read: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences as [B, L, D], and where they are, [B, L]."""
    lengths = torch.tensor([len(x) for x in read], device=read[0].device)
    padded_BLD = pad_sequence(list(read), batch_first=True)
    places = torch.arange(padded_BLD.shape[1], device=lengths.device)
    return padded_BLD, places < lengths[:, None]


def _metric(texts: Texts, maps: RelationMaps, heads: int) -> Tensor:
    """Fisher metric of what the layer reads, and a little of the identity, float64 [D, D]."""
    width = maps.weight.shape[1]
    units = maps.width // heads
    felt_RAdd = torch.zeros(3, heads, units, units, dtype=torch.float64)
    for chunk in texts.chunks():
        read_BLD, present_BL = _padded(chunk.read)
        for felt_Add, x_BLP in zip(felt_RAdd, maps(read_BLD), strict=True):
            felt_Add += _felt(x_BLP, heads, present_BL).double().cpu()
    felt_RAdd /= units * sum(map(len, texts.read))
    weight_RAdD = maps.weight.double().cpu().view(3, heads, units, width)
    metric = torch.einsum("rade,radx,raey->xy", felt_RAdd, weight_RAdD, weight_RAdD)
    require(
        0 < float(metric.trace()) < float("inf"),
        "teacher: model's relations must depend on what the layer reads, got the same ones "
        "whatever it is; choose another cache.relation_layer",
    )
    # Directions that two terms cancel in must not become negative.
    values, vectors = torch.linalg.eigh((metric + metric.T) / 2)
    floor = FLOOR * float(metric.trace()) / width
    felt: Tensor = (vectors * values.clamp_min(0).add(floor)) @ vectors.T
    return felt


def _felt(x_BLP: Tensor, heads: int, present_BL: Tensor) -> Tensor:
    """Sum over positions of how much noise in one position is felt, [A, d, d]."""
    there_BL = present_BL.to(x_BLP.dtype)
    p = relation_logits(x_BLP, heads, present_BL).softmax(-1) * there_BL[:, None, :, None]
    x = in_heads(x_BLP, heads)
    mean = p @ x
    as_key = torch.einsum("bal,bald,bale->ade", (p * (1 - p)).sum(-1), x, x)
    as_query = torch.einsum("bal,bald,bale->ade", p.sum(-2), x, x)
    as_query -= torch.einsum("bald,bale->ade", mean, mean)
    own = torch.einsum("bal,bald,bale->ade", p.diagonal(dim1=-2, dim2=-1), x, x - mean)
    felt_Add: Tensor = as_key + as_query + own + own.transpose(-1, -2)
    return felt_Add


def _prediction(read_ND: Tensor, embedded_NE: Tensor) -> Tensor:
    """Least squares from word embeddings to what the layer reads, float32 [E, D]."""
    x, y = embedded_NE.double(), read_ND.double()
    x, y = x - x.mean(0), y - y.mean(0)
    gram, products = (x.T @ x).cpu(), (x.T @ y).cpu()
    ridge = max(RIDGE * float(gram.trace()) / len(gram), 1e-12)
    gram += ridge * torch.eye(len(gram), dtype=gram.dtype)
    prediction_ED: Tensor = torch.linalg.solve(gram, products).float()
    return prediction_ED


def _offsets(codec: HiddenCodec, left_ND: Tensor) -> Tensor:
    """Mean of (magnitude - magnitude of the code) where the code is not 0, per coordinate [D]."""
    scaled_ND, codes_ND = _codes(codec, left_ND)
    coded_ND = codes_ND != 0
    gaps_ND = (scaled_ND.abs() - codes_ND.abs()) * coded_ND
    return (gaps_ND.sum(0) / coded_ND.sum(0).clamp_min(1)).cpu()


def _gains(codec: HiddenCodec, left_ND: Tensor) -> Tensor:
    """What makes decoded coordinates right on average, per coordinate [D].

    The value that is nearest to all that get one code is their mean. So values come back drawn
    towards 0: x as g x and noise, and g = cov(x_hat, x) / var(x) is the smaller, the more codes are
    0. A student's gradient is a sum over positions. There the noise cancels out, but g does not.
    """
    scaled_ND, values_ND = _codes(codec, left_ND)
    assert codec.offsets is not None
    values_ND += values_ND.sign() * codec.offsets.to(values_ND.device)
    scaled_ND -= scaled_ND.mean(0)
    kept_D = (scaled_ND * values_ND).sum(0) / scaled_ND.square().sum(0).clamp_min(TINY)
    return (1 / kept_D.clamp(1 / MOST_GAIN, 1)).cpu()


def _codes(codec: HiddenCodec, left_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates in units of the step, and their codes, [N, D]."""
    device = left_ND.device
    scaled_ND = (left_ND - codec.mean.to(device)) @ codec.analysis.to(device) / codec.step
    return scaled_ND, codec.rounded(scaled_ND.clone())
