"""The tokens over which one training step takes its losses.

Most of a small student's step is the vocabulary: two decoders and their softmaxes over V tokens.
Here each step draws a sample S of the tokens. Token v is in S with probability ``pi_v``, and has
the weight ``w_v = 1 / pi_v`` there. log w is added to the logits of teacher and student, after the
division by the temperature, and L_ce and L_mlm are then ordinary softmax losses over S; L_mse
weighs its squares by w. So each sum over the vocabulary, such as ``sum_v exp(z_v / T)``, becomes an
unbiased estimate (Horvitz and Thompson 1952; for the softmax of one model: Bengio and Senecal
2008).

Tokens that the step's batches name (labels, stored logits, draws) are always in S: what the cache
says of single tokens stays exact. The others are drawn in proportion to the probability that the
teacher gives them on average, since that is how much they weigh in the sums and in the gradient.

Shapes: ``V`` vocabulary, ``S`` tokens of a step, ``N`` positions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilcache.data.cache.cache import Cache
from distilcache.data.distribution import Distribution
from distilcache.data.loader.batch import batch_of
from distilcache.data.loader.window import Plan, in_order, join, read_sequences
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.ranks import ALONE, Ranks

LEAST = 4096
"""Tokens of a step at least: the error of a sampled sum depends on their number, not on V."""
UNIFORM = 0.1
"""Part of the draws that is uniform, so that a student that is far from its teacher may give
probability to any token."""
SEQUENCES, POSITIONS = 128, 2048
"""Of the cache's first block, over which the teacher's probabilities are averaged (at most)."""
AT_ONCE = 64
"""Positions whose logits are made together."""
TURN = 64
"""Steps with the same places of the tokens; over many turns nothing is left of their chance."""
GOLDEN = (5**0.5 - 1) / 2
"""How far all places move from step to step: so the steps at which a token is drawn lie as evenly
as they can."""
NAMED = ("labels", "logit_ids", "tail_ids", "residual_ids")
"""Columns of a batch that hold token ids for the losses."""

Floats = npt.NDArray[np.float64]


class SampledVocabulary:
    """Draws the tokens of each step.

    Args:
        weights_V: Tokens are drawn in proportion to these numbers, all above 0.
        size: Tokens of a step.
        seed: Of the draws.
    """

    def __init__(self, weights_V: Floats, size: int, seed: int) -> None:
        self.size = size
        self._weights_V = weights_V
        self._order_V = np.argsort(-weights_V, kind="stable")
        self._seed = seed
        self._turn, self._begun_V = -1, np.empty(0)

    def apply(self, batches: Sequence[dict[str, Tensor]], step: int, ranks: Ranks = ALONE) -> int:
        """Draw S for one step, and rewrite its batches, which are on the CPU.

        Ids that the losses read become places in S. Added are ``vocabulary`` int64 [S], the ids in
        ascending order, and ``log_weight`` float32 [S]. S depends on the seed, the step and the
        batches of all ranks, and is the same on all of them.

        Args:
            batches: The step's micro-batches of this rank.
            step: Number of the step.
            ranks: The processes that train together; all must call.

        Returns:
            Tokens in S: ``size``, or more where the batches name more than half of that many. Where
            that would be all of V, the batches stay as they are.
        """
        vocabulary = len(self._weights_V)
        named_V = np.zeros(vocabulary, dtype=np.uint8)
        columns = [(batch, name) for batch in batches for name in NAMED if name in batch]
        for batch, name in columns:
            named_V[batch[name].numpy()] = 1
        named_V = ranks.any_of_each(named_V)
        half = self.size // 2
        size = self.size + half * max(0, -(-(int(named_V.sum()) - half) // half))
        if size >= vocabulary:
            return vocabulary
        pi_V = self._inclusion(named_V, size)
        ids_S = _drawn(pi_V, self._places(step))
        place_V = np.zeros(vocabulary, dtype=np.int64)
        place_V[ids_S] = np.arange(len(ids_S))
        for batch, name in columns:
            batch[name] = torch.from_numpy(place_V[batch[name].numpy()])
        log_weight_S = torch.from_numpy(-np.log(pi_V[ids_S]).astype(np.float32))
        for batch in batches:
            batch["vocabulary"], batch["log_weight"] = torch.from_numpy(ids_S), log_weight_S
        return len(ids_S)

    def _places(self, step: int) -> Floats:
        """A number in [0, 1) for each token, [V]: drawn anew for each turn, then moved along."""
        turn, moved = divmod(step, TURN)
        if self._turn != turn:
            generator = np.random.default_rng((self._seed, turn))
            self._turn, self._begun_V = turn, generator.random(len(self._weights_V))
        places_V: Floats = self._begun_V + moved * GOLDEN
        places_V -= np.floor(places_V)  # `% 1.0` is the same, in five times the time.
        return places_V

    def _inclusion(self, named_V: npt.NDArray[np.uint8], size: int) -> Floats:
        """``pi_v``: 1 for named tokens, else ``min(1, c weight_v)``; their sum is ``size``."""
        order = self._order_V[named_V[self._order_V] == 0]
        weights = self._weights_V[order]  # descending
        rest = np.cumsum(weights[::-1])[::-1]
        places = size - (len(named_V) - len(order)) - np.arange(len(order))
        # The first k tokens are sure, where k is the least for which the next one is below 1.
        k = int(np.argmax(places * weights < rest))
        pi_V = np.ones(len(named_V))
        pi_V[order[k:]] = places[k] / rest[k] * weights[k:]
        return pi_V


class TiedRows:
    """Rows of a decoder that is also the embedding of the input.

    Their gradient is added to the one that the embedding makes anyway, just before that reaches the
    parameter. So no second tensor [V, D], nearly all of it zeros, is made and added. The decoder's
    gradient is always there first, because the parameter's waits for both.

    Args:
        weight_VD: The parameter.
    """

    def __init__(self, weight_VD: Tensor) -> None:
        self._weight_VD = weight_VD
        self._kept: tuple[Tensor, Tensor] | None = None
        self._hooked = False

    def rows(self, ids_S: Tensor) -> Tensor:
        """Some rows [S, D], differentiable; once for each backward pass."""
        if not self._hooked:  # Not before the parameter is on its device: a move may lose hooks.
            self._weight_VD.register_hook(self._add)  # type: ignore[no-untyped-call]
            self._hooked = True
        rows_SD: Tensor = _Rows.apply(self._weight_VD, ids_S, self)  # type: ignore[no-untyped-call]
        return rows_SD

    def keep(self, ids_S: Tensor, gradient_SD: Tensor) -> None:
        """Hold the gradient of some rows until that of the embedding comes."""
        self._kept = ids_S, gradient_SD

    def _add(self, gradient_VD: Tensor) -> Tensor:
        if self._kept is None:
            return gradient_VD
        (ids_S, gradient_SD), self._kept = self._kept, None
        return gradient_VD.index_add_(0, ids_S, gradient_SD.to(gradient_VD.dtype))


class _Rows(torch.autograd.Function):
    """Rows of a parameter, whose gradient goes to :class:`TiedRows`."""

    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, ids_S: Tensor, tied: TiedRows) -> Tensor:
        ctx.ids_S, ctx.tied = ids_S, tied
        return weight_VD.index_select(0, ids_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SD: Tensor) -> tuple[None, None, None]:
        ctx.tied.keep(ctx.ids_S, gradient_SD)
        return None, None, None


def _drawn(pi_V: Floats, places_V: Floats) -> npt.NDArray[np.int64]:
    """Pareto sampling: always as many tokens as the sum of ``pi``.

    A token is drawn where its place in [0, 1) is below its ``pi``, but for a few near that bound,
    by which the number is kept; the probability of each approaches ``pi`` as the sample grows.
    Returns ids in ascending order. Source: Rosen 1997, "On sampling with probability proportional
    to size".
    """
    open_U = np.flatnonzero(pi_V < 1)
    pi_U, places_U = pi_V[open_U], places_V[open_U]
    count = round(pi_U.sum())
    ranks_U = places_U * (1 - pi_U) / (pi_U * (1 - places_U))
    chosen = open_U[np.argpartition(ranks_U, count - 1)[:count]]
    return np.sort(np.concatenate([np.flatnonzero(pi_V == 1), chosen]))


def sample_size(rows: int, fraction: float) -> int:
    """Tokens of a step, of a vocabulary of ``rows``; small ones are used whole."""
    size = max(LEAST, round(fraction * rows))
    return rows if rows < 2 * LEAST else min(size, rows)


def sampled_vocabulary(
    cache: Cache, rows: int, train: TrainConfig, kept_n: npt.NDArray[np.int64] | None = None
) -> SampledVocabulary | None:
    """The sampled vocabulary of a run; None where each step takes all tokens, or none.

    Args:
        cache: An open cache; its first block tells how likely tokens are.
        rows: V, rows of the decoders: there may be more than the tokenizer has tokens.
        train: Fraction of V, temperature and seed.
        kept_n: The teacher's ids that the student has; None: all.
    """
    size = sample_size(rows, train.vocabulary_fraction)
    if size == rows or not train.has_head:
        return None
    theirs = rows if kept_n is None else cache.encoding.vocab_size
    mean_V = _mean_distribution(cache, theirs, train.temperature)
    if kept_n is not None:
        mean_V = mean_V[kept_n] / mean_V[kept_n].sum()
    return SampledVocabulary((1 - UNIFORM) * mean_V + UNIFORM / rows, size, train.seed)


def _mean_distribution(cache: Cache, rows: int, temperature: float) -> Floats:
    """How likely each token is on average, [V].

    By the teacher's replayed distributions at T = 1 and T. Without them, by the frequency of the
    tokens to the power 3/4, as negative samples are drawn in word2vec (Mikolov et al. 2013).
    """
    columns, encoding = cache.read_block(0), cache.encoding
    hidden = encoding.hidden_layer()
    if hidden is None:
        often_V = np.bincount(columns["input_ids"], minlength=rows) ** 0.75
        return np.asarray(often_V / often_V.sum())
    count = min(len(columns["lengths"]), SEQUENCES)
    plan = Plan(encoding, "replay", (hidden.layer,), restrict_ce_to_mask=False)
    read = in_order(join([read_sequences(columns, 0, count, plan)]))
    distribution = Distribution(cache)
    hidden_ND = distribution.decoder(batch_of(read, 0, count, plan))[:POSITIONS]
    sum_V = torch.zeros(1, dtype=torch.float64)
    for part_ND in hidden_ND.split(AT_ONCE):
        logits_NV = distribution.replayed(part_ND)
        for t in (1.0, temperature):
            sum_V = sum_V + torch.softmax(logits_NV / t, -1).sum(0)
    mean_V: Floats = (sum_V / (2 * len(hidden_ND))).numpy()
    return mean_V
